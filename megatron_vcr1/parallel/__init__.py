"""Process groups, collectives and megatron-core's pipeline schedule."""
