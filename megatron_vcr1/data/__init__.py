"""Manifests, videos, prompts, packing and loading."""

from __future__ import annotations

from typing import Any

__all__ = ["read_frames"]


def __getattr__(name: str) -> Any:
    """Import `read_frames` at its first use, so that reading a manifest does not import the decoders."""
    if name != "read_frames":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from megatron_vcr1.data.video import read_frames

    return read_frames
