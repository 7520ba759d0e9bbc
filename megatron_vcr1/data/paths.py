"""Paths of videos and images, which may be URLs."""

from __future__ import annotations


def is_remote(path: str) -> bool:
    """Return whether a path is a URL that fsspec opens (``s3://...``) rather than a local file."""
    return "://" in path
