"""The inputs of recomputed layers in host memory.

With full recomputation, a layer keeps only its input for the backward pass. Here that input is copied to host memory
when the layer has run, and back shortly before the backward pass needs it. Both copies overlap the layers' computation:
on a GPU they run on a stream of their own, and the input of the layer before is fetched while a layer is recomputed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


def offload_layer_inputs(block: nn.Module) -> None:
    """Keep the inputs of a block's recomputed layers in host memory, from the end of the block's forward pass on.

    Args:
        block: megatron-core's TransformerBlock. What its final norm saves stays where it is: the backward pass needs it
            first.
    """
    _save_with(block, lambda: _Offload().pack, _unpack)
    norm = getattr(block, "final_layernorm", None)
    if isinstance(norm, nn.Module):
        _save_with(norm, lambda: _unchanged, _unchanged)  # the innermost hooks win


def _save_with(
    module: nn.Module, make_pack: Callable[[], Callable[[Tensor], Any]], unpack: Callable[[Any], Tensor]
) -> None:
    """Let each forward pass of a module that is trained use saved-tensor hooks."""
    forward: Callable[..., Any] = module.forward

    def forward_with_hooks(*args: Any, **kwargs: Any) -> Any:
        if not (module.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        with saved_tensors_hooks(make_pack(), unpack):
            return forward(*args, **kwargs)

    module.forward = forward_with_hooks  # type: ignore[method-assign]


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


class _Offload:
    """The saved tensors of one forward pass of a block."""

    def __init__(self) -> None:
        self._last: _HostTensor | None = None

    def pack(self, tensor: Tensor) -> Tensor | _HostTensor:
        if tensor.ndim != 3:  # not hidden states
            return tensor
        self._last = _HostTensor(tensor, self._last)
        return self._last


def _unpack(packed: Tensor | _HostTensor) -> Tensor:
    return packed if isinstance(packed, Tensor) else packed.take()


class _HostTensor:
    """A tensor of hidden states, [tokens, 1, hidden_size], in host memory.

    Attributes:
        previous: the tensor that was saved before this one; the backward pass needs it after this one.
    """

    def __init__(self, tensor: Tensor, previous: _HostTensor | None) -> None:
        self.previous = previous
        self._device = tensor.device
        self._values = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
        self._fetched: Tensor | None = None
        if tensor.is_cuda:
            copies = _copy_stream()
            copies.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(copies):
                self._values.copy_(tensor, non_blocking=True)
            tensor.record_stream(copies)  # its memory is not used again before it has been copied
        else:
            self._values.copy_(tensor)

    def take(self) -> Tensor:
        """Return the tensor on its device, and start to fetch the previous one."""
        self._fetch()
        values, self._fetched = self._fetched, None
        assert values is not None
        if values.is_cuda:
            current = torch.cuda.current_stream()
            current.wait_stream(_copy_stream())
            values.record_stream(current)  # it was allocated for the other stream
        if self.previous is not None:
            self.previous._fetch()
        return values

    def _fetch(self) -> None:
        if self._fetched is not None:
            return
        if self._device.type != "cuda":
            self._fetched = self._values
            return
        with torch.cuda.stream(_copy_stream()):  # behind the copy to the host
            self._fetched = self._values.to(self._device, non_blocking=True)


@cache
def _copy_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()
