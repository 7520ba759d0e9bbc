"""Judges of captions: which events of a reference a caption tells."""
