"""Triton kernels and their launchers, one file an operator. Importing this package does not import Triton."""
