"""40 000 iterations of AdamW and a decay by the power of 0.9; batches of 16."""

train_cfg = dict(type="IterBasedTrainLoop", max_iters=40_000, val_interval=4000)
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=1e-4, weight_decay=1e-4))
param_scheduler = [dict(type="PolyLR", eta_min=0.0, power=0.9, begin=0, end=40_000, by_epoch=False)]
