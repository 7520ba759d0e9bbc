"""From manifests and videos to the prompts that the model computes.

A sample takes this way: `rows` and `manifest` read it, `order` decides when it is used, `templates` and `prompts` make
its prompt, `video` and its backends decode the frames, `encoding` makes token ids and vision inputs, `loader` does this
ahead of training in the processes of `workers`, and `packing` puts groups into microbatches. `importers` convert
published annotations to manifests, `synthesize` makes videos with exact targets, `check` looks for bad rows and videos.
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
