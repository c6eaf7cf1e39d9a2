"""Semantic FPN with BiFormer-B, 80 000 iterations of ADE20K.

Reported in the paper: mIoU 49.9 (not measured here).
The authors train in mixed precision: --amp.
To start from ImageNet weights: --cfg-options model.backbone.pretrained=<file>
"""

_base_ = [
    "../_base_/segmentation.py",
    "../_base_/models/semantic_fpn.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/ade20k_fpn_80k.py",
]

sync_bn = "torch"  # the batch norms of the backbone see the images of all GPUs

# Images are aligned to multiples of 32 for testing; batches of 32.
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(2048, 512), keep_ratio=True),
    dict(type="ResizeToMultiple", size_divisor=32),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="PackSegInputs"),
]
train_dataloader = dict(batch_size=4)
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
auto_scale_lr = dict(base_batch_size=32)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=1000),
    dict(type="CosineAnnealingLR", eta_min=0.0, by_epoch=False, begin=1000, end=80_000, T_max=79_000),
]

model = dict(backbone=dict(name="biformer_b", n_win=8, drop_path_rate=0.3), neck=dict(in_channels=[96, 192, 384, 768]))
optim_wrapper = dict(optimizer=dict(lr=2e-4))
