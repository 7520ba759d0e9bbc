"""The Triton kernels and their launchers; imported only where Triton runs (see `vcr1_kernels.backend`)."""
