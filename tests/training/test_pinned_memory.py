from __future__ import annotations

from unittest import mock

import pytest
import torch

from megatron_vcr1.errors import UserError
from megatron_vcr1.training import pinned_memory as module
from megatron_vcr1.training.pinned_memory import pinned_memory


class _Owner:
    """An object that weak references can refer to."""


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> mock.Mock:
    """CUDA's runtime library on an emulated GPU machine."""
    runtime = mock.Mock(cudaHostRegister=mock.Mock(return_value=0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: runtime.stream)
    return runtime


def test_memory_is_registered_until_its_owner_is_gone(runtime: mock.Mock) -> None:
    owner = _Owner()
    memory = pinned_memory(5000, owner, "optimizer.state")
    assert memory.shape == (5000,) and memory.untyped_storage().nbytes() == 5000
    address = memory.data_ptr()
    assert runtime.mock_calls == [mock.call.cudaHostRegister(address, 5000, 0)]
    del memory, owner
    assert runtime.mock_calls[1:] == [mock.call.stream.query(), mock.call.cudaHostUnregister(address)]


def test_memory_stays_registered_and_allocated_if_a_copy_may_be_under_way(
    runtime: mock.Mock, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[torch.Tensor] = []
    monkeypatch.setattr(module, "_in_use", kept)
    runtime.stream.query.return_value = False
    owner = _Owner()
    address = pinned_memory(5000, owner, "optimizer.state").data_ptr()
    del owner
    assert not runtime.cudaHostUnregister.called and [memory.data_ptr() for memory in kept] == [address]


def test_memory_that_cannot_be_pinned_is_a_user_error(runtime: mock.Mock) -> None:
    runtime.cudaHostRegister.return_value = 2
    with pytest.raises(UserError, match=r"grpo\.reference = 'host': 0\.1 GB .* \(CUDA error 2\); raise the limit of"):
        pinned_memory(100_000_000, _Owner(), "grpo.reference")
    assert not runtime.cudaHostUnregister.called


def test_nothing_is_registered_without_memory_or_gpu(runtime: mock.Mock, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pinned_memory(0, _Owner(), "optimizer.state").numel() == 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pinned_memory(8, _Owner(), "optimizer.state").numel() == 8
    assert not runtime.mock_calls
