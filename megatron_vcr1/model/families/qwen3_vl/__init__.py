"""Qwen3-VL: its configuration and weight names (`family`), and its vision tower with DeepStack (`tower`)."""
