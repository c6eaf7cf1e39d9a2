"""One place where the random numbers of a process are set."""

from __future__ import annotations

import random

import numpy as np
import torch


def seed_all(*entropy: int) -> None:
    """Seed Python, NumPy and torch from a tuple of non-negative integers."""
    python, numpy, torch_seed = (int(word) for word in np.random.SeedSequence(entropy).generate_state(3))
    random.seed(python)
    np.random.seed(numpy)
    torch.manual_seed(torch_seed)
