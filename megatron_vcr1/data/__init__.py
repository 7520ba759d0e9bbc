"""Manifests, videos, prompts, packing and loading: from a line of a manifest to a microbatch.

`manifest` and `rows` read samples, and `order` decides when each is used. `templates` and `prompts` build a sample's
prompt, `video` and its backends decode its frames, and `encoding` converts both to token ids and vision inputs.
`loader` does this ahead of training in the processes of `workers`. `packing` puts groups into microbatches.

`importers` convert published annotations to manifests, `synthesize` writes videos with exact targets, and `check` finds
bad rows and videos.
"""

from __future__ import annotations

from typing import Any

__all__ = ["read_frames"]


def __getattr__(name: str) -> Any:
    """Import `read_frames` at its first use, so that reading a manifest does not import the decoders."""
    if name != "read_frames":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from megatron_vcr1.data.video import read_frames

    return read_frames
