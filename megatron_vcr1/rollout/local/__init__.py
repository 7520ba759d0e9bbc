"""The in-process engine: the trained model samples responses itself, with a KV cache."""
