"""A fingerprint of a model's weights, to recognize the same weights in another directory, format or layout."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor

from megatron_vcr1.checkpoint.shard_slices import ShardedModel, ShardSlice, parameter_slices
from megatron_vcr1.parallel import collectives, mesh

_BLOCK_VALUES = 2**22  # values that are hashed at once; bounds the memory for int64 temporaries
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # integer type of the same size, by bytes
# Multipliers of the finalizer of splitmix64, as signed 64-bit integers.
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9 - 2**64
_MULTIPLIER_2 = 0x94D049BB133111EB - 2**64


def weights_fingerprint(model: ShardedModel) -> str:
    """Compute a fingerprint of all weights of a model. All ranks of the job call this together.

    The fingerprint depends on the bits of every value and on its position in its global tensor, and not on how the
    model is sharded, nor on the directory or format from which it was loaded. A change of a single value always changes
    it; any other change goes unnoticed with a probability of 2**-64.

    The bits of every value, as an integer, are multiplied by an odd pseudo-random number that depends on the tensor's
    key and the value's position, and the products are summed modulo 2**64. A sum does not depend on the order, so each
    rank sums over its own shards. Zeros do not contribute, so the padding of a vocabulary does not matter.

    Returns:
        16 hexadecimal digits, the same on every rank.
    """
    total = 0
    if mesh.weight_holder_index() == 0:  # the other ranks of this place hold the same weights
        for shard in chain.from_iterable(parameter_slices(model).values()):
            if shard.is_main_replica:
                total += sum(_hash_block(shard.key, *block) for block in _blocks(shard))
    return f"{sum(collectives.gather_objects(total)) % 2**64:016x}"


def _blocks(shard: ShardSlice) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (values, positions) of a shard, a few rows at a time: two tensors of the same shape.

    The positions are row-major indices into the global tensor. They do not depend on the number of rows of the global
    tensor, which may be padded.
    """
    values = shard.values.view(shard.shape)
    strides = [math.prod(shard.global_shape[dim + 1 :]) for dim in range(len(shard.shape))]
    rows_per_block = max(1, _BLOCK_VALUES // max(math.prod(shard.shape[1:]), 1))
    for first in range(0, shard.shape[0], rows_per_block):
        block = values[first : first + rows_per_block]
        offsets = (shard.offsets[0] + first, *shard.offsets[1:])
        positions = torch.zeros((), dtype=torch.int64, device=block.device)
        for offset, size, stride in zip(offsets, block.shape, strides, strict=True):
            indices = (torch.arange(size, device=block.device) + offset) * stride
            positions = positions[..., None] + indices
        yield block, positions


def _hash_block(key: str, values: Tensor, positions: Tensor) -> int:
    """Return the sum over values of bits * odd pseudo-random number. int64 arithmetic wraps, as intended."""
    bits = values.contiguous().view(_BITS[values.dtype.itemsize]).to(torch.int64)
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big", signed=True)
    mixed = positions + seed
    mixed = (mixed ^ (mixed >> 30)) * _MULTIPLIER_1
    mixed = (mixed ^ (mixed >> 27)) * _MULTIPLIER_2
    return int((bits * ((mixed ^ (mixed >> 31)) | 1)).sum())
