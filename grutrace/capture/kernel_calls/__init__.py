"""Observe the calls of PyTorch's GRU kernels."""
