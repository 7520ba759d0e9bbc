"""The model families on megatron-core: configuration, layers, packed batches, KV cache and conversion of weights."""
