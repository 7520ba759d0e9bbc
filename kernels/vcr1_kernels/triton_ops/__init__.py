"""The Triton kernels and their launch functions. Imported only where Triton runs (see `vcr1_kernels.backend`)."""
