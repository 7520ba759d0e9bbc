"""Qwen2.5-VL: its configuration and weight names (`family`), and its vision tower with windows (`tower`)."""
