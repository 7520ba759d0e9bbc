"""The differences between the supported versions of megatron-core, 0.16.1 (the last for Python 3.11) to 0.19.

No other module asks for megatron-core's version. The functions here look for the interface that they need rather than
for a version, so that a newer version works as long as it keeps that interface. Two differences need no function: from
0.17 on, layers pass more arguments to their MLP (`model.layer_specs.PackedMLP` ignores them), and optimizers pass
`capturable` to Adam (`model.cpu.adam.Adam` ignores it).
"""

from __future__ import annotations

import logging
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig


def no_cuda_graphs() -> dict[str, Any]:
    """Return the argument of `TransformerConfig` that captures no module in a CUDA graph; 0.18 renamed it.

    The default would log a deprecation for each configuration.
    """
    names = {field.name for field in fields(TransformerConfig)}
    return {"cuda_graph_modules" if "cuda_graph_modules" in names else "cuda_graph_scope": []}


def patch_current_stream() -> None:
    """Replace torch's current CUDA stream on a machine without CUDA.

    0.19 asks for it before it reduces gradients, although only runs with CUDA graphs wait for anything.
    """
    stream = SimpleNamespace(wait_event=lambda event: None, wait_stream=lambda other: None)
    torch.cuda.current_stream = lambda device=None: stream  # type: ignore[assignment,return-value]


def silence_megatron() -> None:
    """Switch off warnings that megatron-core logs for each model or layer, and that call for no action here.

    0.16.1 compares MLP classes by identity and warns about ours in every layer. 0.19 announces that `GPTModel` will get
    no new features.
    """
    for name in ("transformer.transformer_layer", "models.gpt.gpt_model"):
        logging.getLogger(f"megatron.core.{name}").setLevel(logging.ERROR)
