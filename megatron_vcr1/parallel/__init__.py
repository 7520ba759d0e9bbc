"""Everything about ranks: process groups, collectives, megatron-core's pipeline schedule and Slurm's variables."""
