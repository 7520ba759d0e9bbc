"""The gathering of updated parameters from the replicas while the next forward pass already computes."""

from __future__ import annotations

from typing import Any

from megatron.core.distributed import DistributedDataParallel


class OverlappedGather:
    """Completes megatron-core's `overlap_param_gather` for replicas that do not all run the same modules.

    After an optimizer step each rank has the new values of its shard only, and gathers the others. megatron-core starts
    to gather a bucket of parameters when a module is about to use one of them. Two things are missing:

    - Replicas may need their buckets in different orders, or none: a microbatch of text alone does not run the vision
      tower, and a replica without microbatches has no forward pass. Collectives with different orders on two ranks
      would mix up their data. So all buckets start at once after the optimizer step, in the order of the forward pass.
      They still arrive one after the other, and a module waits for its own bucket only.
    - The head's weight is used by the loss, not by a module. So the end of the model's forward pass waits for all.

    Code that reads parameters without a forward pass must call `wait` first.
    """

    def __init__(self, ddp_model: DistributedDataParallel) -> None:
        """Gather the present parameters, so that no module starts to gather them."""
        assert ddp_model.ddp_config.align_param_gather, "modules would start to gather the next bucket"
        self._groups = ddp_model.bucket_groups[::-1]  # buckets are numbered from the last parameter to the first
        ddp_model.module.register_forward_hook(self._wait_after_forward)
        self.start()
        self.wait()

    def start(self) -> None:
        """Start to gather all parameters. All ranks call it after every update, whether it was applied or not."""
        for group in self._groups:
            group.start_param_sync()

    def wait(self) -> None:
        """Wait until all parameters are gathered; on a GPU, work that is queued from now on waits.

        Trap: once the gradients are reduced, megatron-core's `finish_param_sync` would gather once more, so a rank must
        have waited before.
        """
        for group in self._groups:
            if group.param_gather_handle is not None:
                group.finish_param_sync(skip_next_bucket_dispatch=True)

    def _wait_after_forward(self, *unused: Any) -> None:
        self.wait()
