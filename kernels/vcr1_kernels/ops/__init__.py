"""The public ops: validation, autograd and the PyTorch path of each; the package re-exports them."""
