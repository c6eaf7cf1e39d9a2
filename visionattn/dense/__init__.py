"""Detection and segmentation: every family as a backbone in mmdetection, mmsegmentation and torchvision.

Importing this package registers ``visionattn.Backbone`` and ``visionattn.LayerDecayOptimWrapperConstructor`` with
mmengine, where it is installed; a config does so by ``custom_imports = dict(imports=["visionattn.dense"])``. The
torchvision route needs no mmengine.
"""

from importlib.util import find_spec

from visionattn.dense.backbone import Backbone
from visionattn.dense.datasets import check_coco, check_masks
from visionattn.dense.detector import torchvision_detector
from visionattn.dense.errors import BackboneError, ConfigError, DatasetError, DenseError, WeightsError
from visionattn.dense.voc import voc_to_coco

if find_spec("mmengine") is not None:
    from visionattn.dense import registry  # noqa: F401 - registers

__all__ = [
    "Backbone",
    "BackboneError",
    "ConfigError",
    "DatasetError",
    "DenseError",
    "WeightsError",
    "check_coco",
    "check_masks",
    "torchvision_detector",
    "voc_to_coco",
]
