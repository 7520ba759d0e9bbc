"""Triton kernels for reinforcement learning of video language models, each with a PyTorch path and a reference.

`ops` has a module for each operation: argument checks, autograd, and the PyTorch path. `triton_ops` has the kernels
under the same module names. `reference` has each operation in plain PyTorch, for tests. `layout` and `records` define
the data structures that they share.
"""

from vcr1_kernels.layout import SegmentLayout
from vcr1_kernels.ops.attention import attention_backward, attention_forward, shared_prefix_attention
from vcr1_kernels.ops.linear_grpo_loss import linear_grpo_loss, linear_objective_loss
from vcr1_kernels.ops.linear_log_probs import linear_log_probs
from vcr1_kernels.ops.log_probs import log_probs_from_logits
from vcr1_kernels.ops.mrope import mrope, qkv_mrope
from vcr1_kernels.ops.patches import frames_to_patches
from vcr1_kernels.ops.rms_norm import rms_norm
from vcr1_kernels.ops.swiglu import swiglu
from vcr1_kernels.ops.token_loss import grpo_token_loss
from vcr1_kernels.records import LinearGrpoLoss, Objective, TokenLoss

__all__ = [
    "LinearGrpoLoss",
    "Objective",
    "SegmentLayout",
    "TokenLoss",
    "attention_backward",
    "attention_forward",
    "frames_to_patches",
    "grpo_token_loss",
    "linear_grpo_loss",
    "linear_log_probs",
    "linear_objective_loss",
    "log_probs_from_logits",
    "mrope",
    "qkv_mrope",
    "rms_norm",
    "shared_prefix_attention",
    "swiglu",
]
