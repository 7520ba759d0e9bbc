"""An accountant of devices, for a machine without a GPU: it finds tensors that a GPU would not let meet.

Every tensor stays what it is, on the CPU, and is computed there. The books say which memory would be a GPU's: what was
made there or moved there, and what was computed from it. Where the program asks, such a tensor answers as a GPU's; what
would fail for its device raises `WrongDevice`, and where the host would wait for the GPU is counted. It knows neither
the kernels of a GPU nor its memory, streams and arithmetic: that all is well with the books does not say that it runs.

As a program it runs a command of vcr1 so, on one process that believes in CUDA and NCCL, and prints the waits as JSON:

    python -m tests.device_accountant train RUN.toml
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

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
_WAITING = (aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default)
_NO_ARITHMETIC = ("aten::_to_copy", "aten::_has_compatible_shallow_copy_type")
_bare = torch._C.DisableTorchFunction

waits: Counter[str] = Counter()
"""How often the host read from the GPU, by file and line of the project."""
_books: dict[int, StorageWeakRef] = {}  # by address; the reference keeps an address from being used again
_gloo: set[str] = set()  # groups that the program itself asked gloo for


class WrongDevice(AssertionError):
    """A GPU, or NCCL, would have refused this."""


def on_gpu(value: Any) -> bool:
    """Whether the books say that a tensor's memory is the GPU's."""
    with _bare():
        if not isinstance(value, Tensor) or value.device != CPU:
            return False
        entry = _books.get(value.untyped_storage()._cdata)
    return entry is not None and not entry.expired()


def _enter(tensor: Tensor, device: torch.device = GPU) -> Tensor:
    with _bare():
        if tensor.device == CPU:
            storage = tensor.untyped_storage()
            _books.pop(storage._cdata, None)
            if device.type == "cuda":
                _books[storage._cdata] = StorageWeakRef(storage)
    return tensor


def _wait() -> None:
    frame: Any = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        passes_on = path == Path(__file__) or frame.f_code.co_name == "__torch_function__"
        if path.is_relative_to(_ROOT) and ".venv" not in path.parts and not passes_on:
            waits[f"{path.relative_to(_ROOT)}:{frame.f_lineno}"] += 1
            return
        frame = frame.f_back


class _Answers(TorchFunctionMode):
    """What a program asks of a tensor, and where it makes or moves one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        mine = bool(args) and on_gpu(args[0])
        if func == Tensor.device.__get__ and mine:
            return GPU
        if func == Tensor.is_cuda.__get__:
            return mine
        if func is Tensor.type and mine and len(args) == 1:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if func is Tensor.tolist and mine:
            _wait()
        if func in (Tensor.numpy, Tensor.__array__) and mine:
            raise WrongDevice("numpy of a GPU tensor")
        if func in (Tensor.cpu, Tensor.cuda):
            args, kwargs = args[:1], {**kwargs, "device": CPU if func is Tensor.cpu else GPU}
            func = Tensor.to
        elif func is Tensor.to and len(args) > 1 and isinstance(args[1], str | int | torch.device):
            args, kwargs = (args[0], *args[2:]), {**kwargs, "device": args[1]}
        device = kwargs.pop("device", None)
        kwargs.pop("pin_memory", None)
        if device is None:
            result = func(*args, **kwargs)
            return _enter(result) if func is Tensor.new_tensor and mine else result
        device = GPU if isinstance(device, int) else torch.device(device)
        there = CPU if device.type == "cuda" else device
        moves = func is Tensor.to  # takes a device in front of its other arguments
        result = func(args[0], there, *args[1:], **kwargs) if moves else func(*args, device=there, **kwargs)
        if any(result is one or _share(result, one) for one in tree_leaves(args)):
            if mine == (device.type == "cuda"):
                return result
            result = result.clone()
        if mine and device == CPU:
            _wait()
        return _enter(result, device)


def _share(one: Tensor, other: Any) -> bool:
    with _bare():
        if not isinstance(other, Tensor) or one.device != CPU or other.device != CPU:
            return False
        return one.untyped_storage()._cdata == other.untyped_storage()._cdata


class _Rules(TorchDispatchMode):
    """Which tensors may meet in an operator or a collective, and what their result is."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with _bare():  # here it is their real device that counts
            return self._compute(func, args, kwargs or {})

    def _compute(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor) and one.device == CPU]
        if func.namespace == "c10d":
            _check_collective(func, args, tensors)
            return func(*args, **kwargs)
        mine = [on_gpu(one) for one in tensors]
        if func is aten.copy_.default:
            if mine == [False, True]:
                _wait()
            return func(*args, **kwargs)
        if not any(mine):
            return func(*args, **kwargs)
        if func in _WAITING:
            _wait()
        elif func.name().partition(".")[0] not in _NO_ARITHMETIC:
            _check_operands(func, args, tensors, mine)
        emulated = func is aten._scaled_dot_product_efficient_attention.default
        result = (_attention if emulated else func)(*args, **kwargs)
        for one in tree_leaves(result):
            if isinstance(one, Tensor):
                _enter(one)
        return result


def _check_operands(func: Any, args: Any, tensors: list[Tensor], mine: list[bool]) -> None:
    strangers = [one for one, is_mine in zip(tensors, mine, strict=True) if not is_mine and one.ndim > 0]
    if func in _INDEXING and on_gpu(args[0]):  # which takes indices from the CPU, and waits while they are copied
        indices = {id(one) for one in args[1]}
        if any(one.dtype == torch.bool for one in args[1] if one is not None):
            _wait()
        strangers = [one for one in strangers if id(one) not in indices]
    if strangers:
        raise WrongDevice(f"{func}: a tensor {list(strangers[0].shape)} of the CPU among the GPU's")


def _check_collective(func: Any, args: Any, tensors: list[Tensor]) -> None:
    if func.name().startswith(("c10d::barrier", "c10d::monitored_barrier")):
        return
    (name,) = (dist.ProcessGroup.unbox(one).group_name for one in args if "ProcessGroup" in str(one))
    for one in tensors:
        if on_gpu(one) == (name in _gloo):
            raise WrongDevice(f"{func}: a tensor of the {'GPU over gloo' if name in _gloo else 'CPU over NCCL'}")


def _attention(query: Any, key: Any, value: Any, bias: Any, *_: Any, scale: float | None = None) -> tuple[Tensor, ...]:
    """The GPU's operator, which rounds the number of log-sum-exps up to a multiple of 32."""
    with _disable_current_modes():
        scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
        scores = scores if bias is None else scores + bias
        log_sum_exp = torch.nn.functional.pad(scores.logsumexp(-1), (0, -query.shape[2] % 32))
        return scores.softmax(-1) @ value, log_sum_exp, torch.zeros(()), torch.zeros(())


@contextlib.contextmanager
def keeping_books() -> Any:
    """Tensors that are made on "cuda" in the with-block are entered, in this thread; `torch.cuda` is left alone."""
    with _Rules(), _Answers():
        yield


def _believe_in_cuda() -> None:
    """For the rest of this process: `torch.cuda` answers, NCCL is gloo, threads and backward passes keep the books."""
    cuda = torch.cuda
    answers: dict[str, Any] = dict(is_available=True, current_device=0, device_count=1, max_memory_allocated=0)
    answers |= dict(set_device=None, synchronize=None, empty_cache=None, reset_peak_memory_stats=None)
    answers |= dict(get_device_name="a GPU in the books")
    for name, answer in answers.items():
        setattr(cuda, name, lambda *_, _answer=answer, **__: _answer)
    cuda._initialized = True
    cuda.default_generators = (torch.Generator(),)
    torch._C._cuda_getDevice = lambda: 0
    torch._C.DisableTorchFunction = contextlib.nullcontext  # which is used for speed: what is asked there, too

    run_thread, run_backward = threading.Thread.run, torch.autograd._engine_run_backward
    reduce = Tensor._reduce_ex_internal

    def thread(self: threading.Thread) -> None:
        with keeping_books():
            run_thread(self)

    def backward(*args: Any, **kwargs: Any) -> Any:  # called from within a torch function, which has no mode any more
        with _Answers():
            return run_backward(*args, **kwargs)

    def pickled(self: Tensor, protocol: int) -> Any:
        if on_gpu(self):
            raise WrongDevice("a GPU tensor is pickled: whoever reads it would get it on that GPU")
        return reduce(self, protocol)

    Tensor._reduce_ex_internal = pickled
    threading.Thread.run = thread
    torch.autograd._engine_run_backward = backward
    _believe_in_nccl()


def _believe_in_nccl() -> None:
    initialize, new = c10d.init_process_group, c10d.new_group

    def new_group(ranks: Any = None, timeout: Any = None, backend: Any = None, *args: Any, **kwargs: Any) -> Any:
        group = new(ranks, timeout, "gloo", *args, **kwargs)
        if backend == "gloo":
            _gloo.add(group.group_name)
        return group

    def name(group: Any = None) -> str:
        return (group or c10d._get_default_group()).group_name

    for module in (dist, c10d):
        module.init_process_group = lambda backend, **kwargs: initialize("gloo", **kwargs)
        module.new_group = new_group
        module.get_backend = lambda group=None: "gloo" if name(group) in _gloo else "nccl"
    c10d._get_object_coll_device = lambda group=None: CPU if name(group) in _gloo else GPU


def main(arguments: list[str]) -> int:
    _believe_in_cuda()
    import vcr1_kernels.backend

    from megatron_vcr1.cli.main import main as vcr1

    vcr1_kernels.backend._triton_is_installed = lambda: False  # its kernels need a GPU
    with keeping_books():
        code = vcr1(arguments)
    print(json.dumps(waits))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
