"""What mmengine's registries find under ``visionattn.``, from any toolbox's scope."""

from mmengine.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS, Registry

from visionattn.dense.backbone import Backbone
from visionattn.dense.layer_decay import LayerDecayOptimWrapperConstructor

# A name with a dot is looked up in the child of that scope, so the root registries get one.
Registry("model", parent=MODELS, scope="visionattn").register_module(module=Backbone)
Registry("optimizer wrapper constructor", parent=OPTIM_WRAPPER_CONSTRUCTORS, scope="visionattn").register_module(
    module=LayerDecayOptimWrapperConstructor
)
