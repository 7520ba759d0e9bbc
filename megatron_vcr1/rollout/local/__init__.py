"""The in-process engine: the trained model samples its own responses."""
