"""Gathers of parameters that arrive as late as possible: code that does not wait for them computes with NaN."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup, shard_buffer
from torch import Tensor


@contextmanager
def late_parameters() -> Iterator[None]:
    """Within the with-block, `overlap_param_gather` fills what a rank gathers with NaN until somebody waits for it."""
    start, finish = _ParamAndGradBucketGroup.start_param_sync, _ParamAndGradBucketGroup.finish_param_sync
    arriving: dict[Any, list[Tensor]] = {}

    def start_late(group: Any, force_sync: bool = False) -> None:
        start(group, force_sync=force_sync)
        if group.param_gather_handle is None:
            return
        group.param_gather_handle.wait()
        arriving[group] = [bucket.param_data.clone() for bucket in group.buckets]
        rank, size = (
            group.intra_distributed_optimizer_instance_rank,
            group.intra_distributed_optimizer_instance_size,
        )
        for bucket in group.buckets:
            for index, shard in enumerate(shard_buffer(bucket.param_data, size)):
                if index != rank:
                    shard.fill_(float("nan"))

    def finish_late(group: Any, skip_next_bucket_dispatch: bool = False) -> None:
        if group in arriving:
            for bucket, values in zip(group.buckets, arriving.pop(group), strict=True):
                bucket.param_data.copy_(values)
        finish(group, skip_next_bucket_dispatch=skip_next_bucket_dispatch)

    with (
        mock.patch.object(_ParamAndGradBucketGroup, "start_param_sync", start_late),
        mock.patch.object(_ParamAndGradBucketGroup, "finish_param_sync", finish_late),
    ):
        yield
