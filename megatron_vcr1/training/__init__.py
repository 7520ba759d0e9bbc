"""GRPO and SFT: advantages, losses, optimizer, steps and the run."""
