"""Kernels for language models on CPUs: arrays in, arrays out, in Python compiled by Numba."""
