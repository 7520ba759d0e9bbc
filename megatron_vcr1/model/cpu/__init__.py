"""Code that is needed only on machines without CUDA, or without TransformerEngine and Apex.

    cuda_emulation    megatron-core without CUDA, over gloo
    adam              an AdamW that megatron-core can save and resume, where TransformerEngine and Apex are missing
    weight_gradients  weight gradients that are added to the gradient buffers in one matmul, where Apex is missing
    decode            the decoder layers for one new token per response, without megatron-core's modules
    skinny_linear     a fast matmul for a few rows

Every program calls `install` once at start-up. Importing the package changes nothing.
"""

from __future__ import annotations

import torch

from megatron_vcr1.model.cpu import adam, cuda_emulation, weight_gradients


def install() -> None:
    """Make megatron-core work on this machine, with what is installed on it.

    Call it once in each process, in the main thread, before `parallel.mesh.initialize`. Further calls do nothing.

    - Without CUDA, megatron-core gets the CPU wherever it asks for the CUDA device (`cuda_emulation`).
    - Without TransformerEngine and Apex, with or without CUDA, megatron-core's optimizers get an Adam whose state they
      can save and resume (`adam`).
    - Without Apex, with or without CUDA, megatron-core's linear layers add their weight gradients to the gradient
      buffers as they do with Apex's extension (`weight_gradients`).

    Where CUDA and Apex exist, it changes nothing.
    """
    if not torch.cuda.is_available():
        cuda_emulation.install()
    adam.install()
    weight_gradients.install()
