"""Kernels: a leaf that imports jax and numpy and nothing of ours."""
