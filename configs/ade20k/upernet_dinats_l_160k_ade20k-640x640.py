"""UPerNet with DiNAT_s-L, 160 000 iterations of ADE20K.

Reported in the paper and its repository: mIoU 53.4, mIoU at several scales 54.6 (not measured here).
It starts from weights of ImageNet-22K.
The authors train in mixed precision: --amp.
To start from ImageNet weights: --cfg-options model.backbone.pretrained=<file>
"""

_base_ = "upernet_dinat_l_160k_ade20k-640x640.py"

model = dict(
    backbone=dict(
        name="dinats_l", dilations=((1, 20), (1, 10), (1, 2, 1, 3, 1, 4, 1, 5, 1, 2, 1, 3, 1, 4, 1, 5, 1, 5), (1, 2))
    )
)
