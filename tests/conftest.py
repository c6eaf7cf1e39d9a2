"""Where there is no GPU, Triton's kernels run in its interpreter: on CPU tensors, slowly, one block after the other."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported
