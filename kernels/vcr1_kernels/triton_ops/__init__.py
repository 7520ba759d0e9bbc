"""The Triton kernels and their launch functions. Imported only where Triton runs (see `vcr1_kernels.backend`)."""

from __future__ import annotations

from typing import Any

FUSED: dict[str, Any] = {"enable_fp_fusion": True}
"""A launch option of every kernel: a multiplication and the addition after it become one instruction.

Triton 3.9 warns where it is missing, because the default changes with 3.10.
"""
