"""Splits a manifest into training, validation and test parts, so that no video or image is in two of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from megatron_vcr1.data.rows import relative_path
from megatron_vcr1.errors import UserError
from megatron_vcr1.types import Sample


def split_by_video(
    samples: Sequence[Sample], fractions: Mapping[str, float], *, seed: int, folder: Path
) -> dict[str, list[Sample]]:
    """Split samples at random; all samples of a video or image go to the same part, in their order.

    The videos are ordered by a hash of the seed and their path below `folder`: the result is the same on every machine.
    Videos and images that are together in a sample count as one video, and so does a sample of text alone.

    Args:
        samples: the samples.
        fractions: fraction of the videos by name of the part; they add up to 1. A part with a fraction above 0 gets at
            least one video.
        seed: seed of the random order.
        folder: the manifest's folder, which paths are made relative to.

    Raises:
        UserError: the fractions do not add up to 1, or there are fewer videos than parts.
    """
    if any(fraction < 0 for fraction in fractions.values()) or abs(sum(fractions.values()) - 1) > 1e-6:
        raise UserError(f"fractions {', '.join(map(str, fractions.values()))}: they must be 0 or more, and add up to 1")
    parts = {name: fraction for name, fraction in fractions.items() if fraction > 0}
    files = [names_of_files(sample, folder) for sample in samples]
    group_of = _connected(files)
    keys = [group_of[names[0]] for names in files]
    videos = sorted(set(keys), key=lambda key: hashlib.blake2b(f"{seed}/{key}".encode()).digest())
    if len(videos) < len(parts):
        raise UserError(f"{len(videos)} videos cannot be split into {len(parts)} parts; set a fraction to 0")
    part_of: dict[str, str] = {}
    for name, count in _counts(len(videos), parts).items():
        for _ in range(count):
            part_of[videos[len(part_of)]] = name
    return {name: [sample for sample, key in zip(samples, keys, strict=True) if part_of[key] == name] for name in parts}


def names_of_files(sample: Sample, folder: Path | None = None) -> tuple[str, ...]:
    """Return a name for each file of a sample's media; a sample of text alone has a name of its own.

    A video that is a list of frames has a name for each frame: another list may contain some of the same frames.

    Args:
        sample: the sample.
        folder: paths below this folder are made relative to it.
    """
    paths = [[medium.path] if isinstance(medium.path, str) else medium.path for medium in sample.media]
    names = tuple(json.dumps(relative_path(path, folder)) for files in paths for path in files)
    return names or (f"text of {sample.id}",)


def _connected(groups: Iterable[Sequence[str]]) -> dict[str, str]:
    """Map each name to the smallest name that it is connected with through groups (union-find)."""
    parent: dict[str, str] = {}

    def smallest(name: str) -> str:
        while (above := parent.setdefault(name, name)) != name:
            parent[name] = parent[above]  # shortens the path for the next call
            name = above
        return name

    for names in groups:
        for name in names:
            low, high = sorted((smallest(names[0]), smallest(name)))
            parent[high] = low
    return {name: smallest(name) for name in parent}


def _counts(num_videos: int, fractions: Mapping[str, float]) -> dict[str, int]:
    """Return the number of videos of each part: at least one, and rounded such that they add up."""
    counts = {name: max(round(num_videos * fraction), 1) for name, fraction in fractions.items()}
    while (excess := sum(counts.values()) - num_videos) != 0:
        largest = max(counts, key=lambda name: counts[name])
        counts[largest] -= 1 if excess > 0 else -1
    return counts
