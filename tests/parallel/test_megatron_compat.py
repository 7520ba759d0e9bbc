"""Differences between versions of megatron-core are known to one module. All other tests run with both versions."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import torch
from megatron.core.transformer import TransformerConfig

from megatron_vcr1.parallel.megatron_compat import no_cuda_graphs

ROOT = Path(__file__).parents[2]
VERSION_QUESTION = re.compile(
    r"megatron\.core\.__version__|package_info|is_te_min_version|is_torch_min_version|"
    r"version\(['\"]megatron-core['\"]\)|cuda_graph_(?:scope|modules)"
)


def test_no_other_module_asks_for_the_version_of_megatron_core() -> None:
    files = [path for package in ("megatron_vcr1", "kernels/vcr1_kernels") for path in (ROOT / package).rglob("*.py")]
    asking = {path.name for path in files if VERSION_QUESTION.search(path.read_text())}
    assert asking == {"megatron_compat.py"}


def test_configurations_without_cuda_graphs_are_accepted_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, **no_cuda_graphs())


def test_the_current_stream_waits_for_nothing_without_cuda() -> None:
    if not torch.cuda.is_available():
        torch.cuda.current_stream().wait_stream(torch.cuda.current_stream())
