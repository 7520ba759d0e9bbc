from __future__ import annotations

import pytest
import torch
from torch import Tensor
from vcr1_kernels import linear_log_probs, reference

from tests.kernels.accuracy import assert_accurate, gradients, to_float64


def _inputs(
    num_tokens: int, vocab_size: int, hidden_size: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = torch.randn(num_tokens, hidden_size), torch.randn(vocab_size, hidden_size) / hidden_size**0.5
    return hidden.to(device, dtype), weight.to(device, dtype), torch.randint(vocab_size, (num_tokens,)).to(device)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CPU_CHUNK_BYTES", "GPU_CHUNK_BYTES"):
        monkeypatch.setattr(f"vcr1_kernels.ops.linear_log_probs.{name}", 2**16)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (45, 1023, 33), (40, 300, 64)])
def test_matches_float64(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    hidden, weight, target_ids = _inputs(*shape, dtype, device)

    def op(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return linear_log_probs(hidden, weight, target_ids, temperature=0.7, return_entropy=True)

    def reference_op(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return reference.linear_log_probs(hidden, weight, target_ids.cpu(), temperature=0.7, return_entropy=True)

    exact = to_float64(hidden, weight)
    for actual, expected in zip(op(hidden, weight), reference_op(*exact), strict=True):
        assert_accurate(actual, expected, dtype)
    for actual, expected in zip(gradients(op, [hidden, weight]), gradients(reference_op, exact), strict=True):
        assert actual.dtype == dtype
        assert_accurate(actual, expected, dtype)


@pytest.mark.usefixtures("small_chunks")
def test_chunk_size_changes_only_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, target_ids = _inputs(45, 1023, 33, torch.float64, torch.device("cpu"))
    chunked = linear_log_probs(hidden, weight, target_ids)
    monkeypatch.setattr("vcr1_kernels.ops.linear_log_probs.CPU_CHUNK_BYTES", 2**30)
    torch.testing.assert_close(chunked, linear_log_probs(hidden, weight, target_ids), rtol=1e-13, atol=0)


def test_gradcheck() -> None:
    hidden, weight, target_ids = _inputs(3, 7, 4, torch.float64, torch.device("cpu"))
    torch.autograd.gradcheck(
        lambda h, w: linear_log_probs(h, w, target_ids, temperature=0.7, return_entropy=True),
        (hidden.requires_grad_(), weight.requires_grad_()),
    )


def test_gradients_of_frozen_inputs_are_skipped(device: torch.device) -> None:
    hidden, weight, target_ids = _inputs(6, 50, 8, torch.float32, device)
    both = gradients(lambda h, w: linear_log_probs(h, w, target_ids), [hidden, weight])
    (hidden_only,) = gradients(lambda h: linear_log_probs(h, weight, target_ids), [hidden])
    (weight_only,) = gradients(lambda w: linear_log_probs(hidden, w, target_ids), [weight])
    torch.testing.assert_close((hidden_only, weight_only), both)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_gradient_is_added_to_the_buffer(dtype: torch.dtype, device: torch.device) -> None:
    hidden, weight, target_ids = _inputs(45, 300, 64, dtype, device)
    (expected,) = gradients(lambda w: linear_log_probs(hidden, w, target_ids), [weight])
    buffer = expected.float().clone()
    log_probs = linear_log_probs(hidden, weight.requires_grad_(), target_ids, weight_grad=buffer)
    assert torch.equal(buffer, expected.float())
    (projected,) = gradients(lambda x: x, [log_probs])
    log_probs.backward(projected)
    assert weight.grad is None
    assert_accurate(buffer, 2 * expected.double(), dtype)
    with pytest.raises(ValueError, match=r"weight_grad must be \[300, 64\]"):
        linear_log_probs(hidden, weight, target_ids, weight_grad=buffer[1:])


def test_empty_input(device: torch.device) -> None:
    hidden, weight, target_ids = _inputs(0, 50, 8, torch.float32, device)
    grad_hidden, grad_weight = gradients(lambda h, w: linear_log_probs(h, w, target_ids), [hidden, weight])
    assert grad_hidden.shape == (0, 8) and grad_weight.eq(0).all()


@pytest.mark.parametrize(
    ("hidden", "weight", "message"),
    [
        (torch.zeros(2, 3, 4), torch.zeros(5, 4), r"hidden must be \[tokens, hidden_size\]"),
        (torch.zeros(3, 4), torch.zeros(5, 6), r"weight must be \[vocab_shard, 4\], got \[5, 6\]"),
        (torch.zeros(3, 4), torch.zeros(5, 4).half(), "hidden is torch.float32 but weight is torch.float16"),
    ],
)
def test_invalid_input_raises(hidden: Tensor, weight: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_log_probs(hidden, weight, torch.zeros(3, dtype=torch.int64))
