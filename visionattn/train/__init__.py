"""Training and validation of image classifiers on accelerate and timm.

`tools/train.py` and `tools/validate.py` are thin command lines over this package:

    from visionattn.train import TrainConfig, train
    result = train(TrainConfig(model="biformer_t", dataset="digits", img_size=32, epochs=10))
"""

from visionattn.train.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    MissingDependencyError,
    NonFiniteLossError,
    TrainError,
    require,
)

for _module in ("accelerate", "yaml", "tqdm"):
    require(_module, "visionattn.train")

from visionattn.train.checkpoint import WeightsInfo, load_model, read_info  # noqa: E402 - after the check above
from visionattn.train.cli import build as build_config  # noqa: E402
from visionattn.train.cli import parse as parse_config  # noqa: E402
from visionattn.train.cli import parse_values  # noqa: E402
from visionattn.train.compare import compare  # noqa: E402
from visionattn.train.config import CompareConfig, TrainConfig, ValidateConfig  # noqa: E402
from visionattn.train.dry_run import dry_run  # noqa: E402
from visionattn.train.engine import TrainResult, train  # noqa: E402
from visionattn.train.table import validate_table  # noqa: E402
from visionattn.train.validate import validate  # noqa: E402

__all__ = [
    "CheckpointError",
    "CompareConfig",
    "ConfigError",
    "DataError",
    "MissingDependencyError",
    "NonFiniteLossError",
    "TrainConfig",
    "TrainError",
    "TrainResult",
    "ValidateConfig",
    "WeightsInfo",
    "build_config",
    "compare",
    "dry_run",
    "load_model",
    "parse_config",
    "parse_values",
    "read_info",
    "train",
    "validate",
    "validate_table",
]
