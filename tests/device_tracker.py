"""An emulation of a GPU's memory, for machines without one: it finds tensors of different devices that meet.

Every tensor stays on the CPU and is computed there. The tracker records which memory would be on a GPU: tensors that
are created or moved there, and everything computed from them. To the program such a tensor reports a CUDA device. An
operation that would fail because of its operands' devices raises `WrongDevice`, and each time that the host would wait
for the GPU is counted. A GPU's kernels, streams, memory limits and rounding are not emulated, so a program that passes
may still fail on a GPU.

As a program it runs a command of vcr1 on one process that finds an emulated CUDA and NCCL, and prints the number of
host syncs by line of code as JSON:

    python -m tests.device_tracker train RUN.toml
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
aten = torch.ops.aten
_ROOT = Path(__file__).parents[1]
_INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
# Operators whose result the host reads, or whose result's shape depends on values.
_SYNCING = (aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default)
# Operators that accept operands of different devices.
_NO_ARITHMETIC = ("aten::_to_copy", "aten::_has_compatible_shallow_copy_type")
# Inside, tensors report their real device.
_untracked = torch._C.DisableTorchFunction

host_syncs: Counter[str] = Counter()
"""Number of times that the host read from the GPU, by file and line of the project."""
# GPU storages by address. The weak reference also tells whether the storage is alive, and keeps its address from being
# reused for another one.
_gpu_storages: dict[int, StorageWeakRef] = {}
_gloo_groups: set[str] = set()  # names of the groups that the program itself created with gloo


class WrongDevice(AssertionError):
    """An operation that a GPU, or NCCL, would have refused because of a tensor's device."""


def on_gpu(value: Any) -> bool:
    """Return whether a value is a tensor whose memory would be on the GPU."""
    with _untracked():
        if not isinstance(value, Tensor) or value.device != CPU:
            return False
        reference = _gpu_storages.get(value.untyped_storage()._cdata)
    return reference is not None and not reference.expired()


def _record(tensor: Tensor, device: torch.device = GPU) -> Tensor:
    """Record the device of a tensor's memory, and return the tensor."""
    with _untracked():
        if tensor.device == CPU:
            storage = tensor.untyped_storage()
            _gpu_storages.pop(storage._cdata, None)
            if device.type == "cuda":
                _gpu_storages[storage._cdata] = StorageWeakRef(storage)
    return tensor


def _count_sync() -> None:
    """Count a host sync at the innermost line of the project, other than code that only passes torch calls on."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        passes_on = path == Path(__file__) or frame.f_code.co_name == "__torch_function__"
        if path.is_relative_to(_ROOT) and "site-packages" not in path.parts and not passes_on:
            host_syncs[f"{path.relative_to(_ROOT)}:{frame.f_lineno}"] += 1
            return
        frame = frame.f_back


class _ReportedDevices(TorchFunctionMode):
    """Answers what a program asks about a tensor's device, and records where it creates or moves one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        is_gpu = bool(args) and on_gpu(args[0])
        if func == Tensor.device.__get__ and is_gpu:
            return GPU
        if func == Tensor.is_cuda.__get__:
            return is_gpu
        if func is Tensor.type and is_gpu and len(args) == 1:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if func is Tensor.tolist and is_gpu:
            _count_sync()
        if func in (Tensor.numpy, Tensor.__array__) and is_gpu:
            raise WrongDevice("numpy of a GPU tensor")
        # Tensor.cpu(), Tensor.cuda() and Tensor.to(device) all become Tensor.to(device=...).
        if func in (Tensor.cpu, Tensor.cuda):
            args, kwargs = args[:1], {**kwargs, "device": CPU if func is Tensor.cpu else GPU}
            func = Tensor.to
        elif func is Tensor.to and len(args) > 1 and isinstance(args[1], str | int | torch.device):
            args, kwargs = (args[0], *args[2:]), {**kwargs, "device": args[1]}
        device = kwargs.pop("device", None)
        kwargs.pop("pin_memory", None)
        if device is None:
            result = func(*args, **kwargs)
            return _record(result) if func is Tensor.new_tensor and is_gpu else result
        device = GPU if isinstance(device, int) else torch.device(device)
        return self._on_device(func, args, kwargs, device, is_gpu)

    @staticmethod
    def _on_device(func: Any, args: Any, kwargs: Any, device: torch.device, is_gpu: bool) -> Tensor:
        """Call a function that creates or moves a tensor, with its real device, and record the emulated one."""
        real_device = CPU if device.type == "cuda" else device
        if func is Tensor.to:  # it takes the device before its other arguments
            result = func(args[0], real_device, *args[1:], **kwargs)
        else:
            result = func(*args, device=real_device, **kwargs)
        if any(result is arg or _share_memory(result, arg) for arg in tree_leaves(args)):
            if is_gpu == (device.type == "cuda"):
                return result
            result = result.clone()  # a move to another device makes a copy
        if is_gpu and device == CPU:
            _count_sync()
        return _record(result, device)


def _share_memory(tensor: Tensor, other: Any) -> bool:
    with _untracked():
        if not isinstance(other, Tensor) or tensor.device != CPU or other.device != CPU:
            return False
        return tensor.untyped_storage()._cdata == other.untyped_storage()._cdata


class _DeviceRules(TorchDispatchMode):
    """Checks the devices of every operator's and collective's operands, and records the device of its results."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with _untracked():
            return self._compute(func, args, kwargs or {})

    def _compute(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.device == CPU]
        if func.namespace == "c10d":
            _check_collective(func, args, tensors)
            return func(*args, **kwargs)
        is_gpu = [on_gpu(x) for x in tensors]
        if func is aten.copy_.default:
            # A copy to pinned memory does not wait if it is asked not to; others are not told apart here.
            if is_gpu == [False, True] and not (len(args) > 2 and args[2]):
                _count_sync()
            return func(*args, **kwargs)
        if not any(is_gpu):
            return func(*args, **kwargs)
        if func in _SYNCING:
            _count_sync()
        elif func.name().partition(".")[0] not in _NO_ARITHMETIC:
            _check_operands(func, args, tensors, is_gpu)
        emulated = func is aten._scaled_dot_product_efficient_attention.default
        result = (_attention if emulated else func)(*args, **kwargs)
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                _record(x)
        return result


def _check_operands(func: Any, args: Any, tensors: list[Tensor], is_gpu: list[bool]) -> None:
    # Scalars (tensors without dimensions) of the CPU may be operands of a GPU's operator.
    on_cpu = [x for x, x_is_gpu in zip(tensors, is_gpu, strict=True) if not x_is_gpu and x.ndim > 0]
    if func in _INDEXING and on_gpu(args[0]):
        # Indices may be on the CPU; the host waits while they are copied. A boolean index is always read by the host.
        indices = [x for x in args[1] if x is not None]
        if any(x.dtype == torch.bool for x in indices):
            _count_sync()
        on_cpu = [x for x in on_cpu if all(x is not index for index in indices)]
    if on_cpu:
        raise WrongDevice(f"{func}: a CPU tensor {list(on_cpu[0].shape)} among GPU tensors")


def _check_collective(func: Any, args: Any, tensors: list[Tensor]) -> None:
    if func.name().startswith(("c10d::barrier", "c10d::monitored_barrier")):
        return
    (name,) = (dist.ProcessGroup.unbox(arg).group_name for arg in args if "ProcessGroup" in str(arg))
    for x in tensors:
        if on_gpu(x) == (name in _gloo_groups):
            raise WrongDevice(
                f"{func}: {'a GPU tensor over gloo' if name in _gloo_groups else 'a CPU tensor over NCCL'}"
            )


def _attention(query: Any, key: Any, value: Any, bias: Any, *_: Any, scale: float | None = None) -> tuple[Tensor, ...]:
    """Compute the GPU's attention operator, which pads the number of log-sum-exps to a multiple of 32."""
    with _disable_current_modes():
        scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
        scores = scores if bias is None else scores + bias
        log_sum_exp = torch.nn.functional.pad(scores.logsumexp(-1), (0, -query.shape[2] % 32))
        return scores.softmax(-1) @ value, log_sum_exp, torch.zeros(()), torch.zeros(())


@contextlib.contextmanager
def tracking_devices() -> Any:
    """Track the tensors that this thread creates on "cuda" in the with-block. `torch.cuda` itself is not emulated."""
    with _DeviceRules(), _ReportedDevices():
        yield


def _emulate_cuda() -> None:
    """Emulate torch.cuda and NCCL for the rest of this process, and track devices in threads and backward passes."""
    cuda = torch.cuda
    answers: dict[str, Any] = dict(is_available=True, current_device=0, device_count=1, max_memory_allocated=0)
    answers |= dict(set_device=None, synchronize=None, empty_cache=None, reset_peak_memory_stats=None)
    answers |= dict(get_device_name="an emulated GPU", current_stream=mock.Mock(), check_error=None)
    answers |= dict(stream=contextlib.nullcontext(), cudart=mock.Mock(cudaHostRegister=mock.Mock(return_value=0)))
    Tensor.record_stream = lambda self, stream: None  # type: ignore[method-assign]
    for name, answer in answers.items():
        setattr(cuda, name, lambda *_, _answer=answer, **__: _answer)
    cuda.Stream = type("Stream", (mock.Mock,), {})  # type: ignore[misc]
    cuda._initialized = True
    cuda.default_generators = (torch.Generator(),)
    torch._C._cuda_getDevice = lambda: 0
    # The package uses it for speed; the devices must be tracked there too.
    torch._C.DisableTorchFunction = contextlib.nullcontext

    run_thread, run_backward = threading.Thread.run, torch.autograd._engine_run_backward
    reduce = Tensor._reduce_ex_internal

    def run_tracked_thread(self: threading.Thread) -> None:
        with tracking_devices():
            run_thread(self)

    def run_tracked_backward(*args: Any, **kwargs: Any) -> Any:
        # Called from within a torch function, where no function mode is active.
        with _ReportedDevices():
            return run_backward(*args, **kwargs)

    def reduce_cpu_tensor(self: Tensor, protocol: int) -> Any:
        if on_gpu(self):
            raise WrongDevice("a GPU tensor is pickled: the process that reads it would restore it on that GPU")
        return reduce(self, protocol)

    Tensor._reduce_ex_internal = reduce_cpu_tensor
    threading.Thread.run = run_tracked_thread
    torch.autograd._engine_run_backward = run_tracked_backward
    _emulate_nccl()


def _emulate_nccl() -> None:
    """Replace NCCL by gloo, while torch.distributed still reports NCCL."""
    initialize, create = c10d.init_process_group, c10d.new_group

    def new_group(ranks: Any = None, timeout: Any = None, backend: Any = None, *args: Any, **kwargs: Any) -> Any:
        group = create(ranks, timeout, "gloo", *args, **kwargs)
        if backend == "gloo":
            _gloo_groups.add(group.group_name)
        return group

    def name(group: Any = None) -> str:
        return (group or c10d._get_default_group()).group_name

    for module in (dist, c10d):
        module.init_process_group = lambda backend, **kwargs: initialize("gloo", **kwargs)
        module.new_group = new_group
        module.get_backend = lambda group=None: "gloo" if name(group) in _gloo_groups else "nccl"
    c10d._get_object_coll_device = lambda group=None: CPU if name(group) in _gloo_groups else GPU


def main(arguments: list[str]) -> int:
    _emulate_cuda()
    import vcr1_kernels.backend

    from megatron_vcr1.cli.main import main as vcr1

    vcr1_kernels.backend._triton_is_installed = lambda: False  # Triton kernels need a real GPU
    with tracking_devices():
        code = vcr1(arguments)
    print(json.dumps(host_syncs))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
