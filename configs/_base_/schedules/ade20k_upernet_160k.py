"""160 000 iterations of AdamW, 1500 of warm-up, then a linear decay to zero; batches of 16."""

train_cfg = dict(type="IterBasedTrainLoop", max_iters=160_000, val_interval=8000)
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="PolyLR", eta_min=0.0, power=1.0, begin=1500, end=160_000, by_epoch=False),
]
