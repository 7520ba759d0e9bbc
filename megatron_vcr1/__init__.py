"""Reinforcement fine-tuning of video language models on megatron-core."""
