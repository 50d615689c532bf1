"""Triton twins of the native kernels; same names, same argument order."""
