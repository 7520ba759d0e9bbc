"""Checkpoints: conversion from and to Hugging Face, loading into a sharded model, and saving and resuming a run.

How a parameter becomes bytes in a file, and a parameter again under another layout:

1. Each rank holds a **shard** of a parameter: the part that tensor and pipeline parallelism assign to it. Its place in
   the **global tensor**, the whole parameter, is known from megatron-core's sharded state dict. Optimizer state has the
   shape of its parameter; the distributed optimizer keeps only a flat range of each shard per data-parallel rank.
   `shard_slices.ShardSlice` describes both cases; `optimizer_state` finds them for the optimizer.
2. A slice is split into rectangles of the global tensor, the **chunks**. Each rank writes its chunks one after another
   to a file of its own (`training_tensors`, `torch_dist.write_chunks`), without communication.
3. Rank 0 then writes an index of all chunks of all ranks (`torch_dist.write_metadata`). The result is a checkpoint in
   megatron-core's ``torch_dist`` format, which megatron-core itself can load.
4. To load, a rank computes its own slices under its own layout and copies from every stored chunk the part that
   overlaps (`shard_slices.read_slices`). How the chunks were cut when they were written does not matter.

Conversion uses the same files. `hf_import` cuts the tensors of a Hugging Face model by rows into chunks; `hf_export`
reads chunks and writes their rows to the right places of safetensors files (`stored_model`, `hf_weights`,
`safetensors_io`). `load` fills a sharded model from either kind of directory, `hf_stream` gathers it for an engine,
`verify` and `verify_log_probs` compare a checkpoint with its Hugging Face original.

`run_store` saves and finds the checkpoints of a run so that a crash at any instant leaves the last one intact; see
there for what is durable when.
"""
