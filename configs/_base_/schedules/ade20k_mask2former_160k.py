"""160 000 iterations of AdamW, a decay by the power of 0.9, gradients clipped at 0.01; batches of 16.

The backbone learns at a tenth of the rate. No weight decay on 1-D parameters, nor on queries and level embeddings.
"""

train_cfg = dict(type="IterBasedTrainLoop", max_iters=160_000, val_interval=5000)
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05),
    clip_grad=dict(max_norm=0.01, norm_type=2),
    constructor="visionattn.LayerDecayOptimWrapperConstructor",
    paramwise_cfg=dict(
        layer_decay=1.0,
        custom_keys={
            "backbone": dict(lr_mult=0.1),
            "query_embed": dict(decay_mult=0.0),
            "query_feat": dict(decay_mult=0.0),
            "level_embed": dict(decay_mult=0.0),
        },
    ),
)
param_scheduler = [dict(type="PolyLR", eta_min=0.0, power=0.9, begin=0, end=160_000, by_epoch=False)]
