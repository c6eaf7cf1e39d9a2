"""Looking into models and operators: what attention attends to, what outputs depend on, and benchmarks.

`record_attention` gives exact weights of every attention operator in a forward pass; `rollout` multiplies them up
(arXiv:2005.00928), `grad_cam` shows evidence for a class (arXiv:1610.02391), `receptive_fields` what a unit depends on
(arXiv:1701.04128), `feature_maps` what a stage computed. `look` does all of it for an image, `render_page` makes one
HTML page of it, and `visualize` does so for folders of images.
"""

from visionattn.analysis.attention import AttentionLayer, Maps, NoAttentionError, Recording, record_attention
from visionattn.analysis.features import feature_maps, principal_colours
from visionattn.analysis.findings import METHODS, Findings, look
from visionattn.analysis.gallery import Source, Summary, as_picture, image_sources, visualize
from visionattn.analysis.gradients import GradCam, NoEvidenceError, ReceptiveField, grad_cam, receptive_fields
from visionattn.analysis.page import render_page
from visionattn.analysis.rollouts import Rollout, UndefinedError, rollout

__all__ = [
    "METHODS",
    "AttentionLayer",
    "Findings",
    "GradCam",
    "Maps",
    "NoAttentionError",
    "NoEvidenceError",
    "ReceptiveField",
    "Recording",
    "Rollout",
    "Source",
    "Summary",
    "UndefinedError",
    "as_picture",
    "feature_maps",
    "grad_cam",
    "image_sources",
    "look",
    "principal_colours",
    "receptive_fields",
    "record_attention",
    "render_page",
    "rollout",
    "visualize",
]
