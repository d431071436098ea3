"""The Triton backend: one file per operation, under the contract of `densenet_efficient.kernels`."""
