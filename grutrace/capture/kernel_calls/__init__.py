"""Calls of the GRU kernels: how they are heard, and what is observed of each."""
