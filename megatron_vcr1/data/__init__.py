"""Manifests, videos, prompts, packing and loading."""
