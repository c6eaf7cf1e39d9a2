"""What all tests share.

Where there is no GPU, Triton's kernels run in its interpreter: on CPU tensors, slowly, one block after the other.
"""

import os

import torch
from hypothesis import settings

# The same examples every time: a red test stays red until it is mended.
settings.register_profile("reproducible", derandomize=True, deadline=None)
settings.load_profile("reproducible")

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is looked up: local data sets are announced to the hub otherwise

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported
