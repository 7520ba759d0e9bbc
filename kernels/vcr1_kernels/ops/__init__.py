"""The public ops: argument checks, autograd and the PyTorch path of each. `vcr1_kernels` re-exports them."""
