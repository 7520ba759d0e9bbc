from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from vcr1_kernels import (
    SegmentLayout,
    attention_backward,
    attention_forward,
    reference,
    shared_prefix_attention,
)
from vcr1_kernels.backend import use_triton
from vcr1_kernels.ops.attention import _dense_blocks

from tests.kernels.accuracy import assert_accurate, gradients, to_float64

LAYOUTS = {
    "group": SegmentLayout((40, 33, 5, 18), (-1, 0, 0, 0)),
    "two-groups-and-an-empty-response": SegmentLayout((9, 4, 0, 36, 3), (-1, 0, 0, -1, 3)),
    "empty-prefix": SegmentLayout((0, 4, 6), (-1, 0, 0)),
    "prefix-after-and-between-its-segments": SegmentLayout((5, 7, 6, 3), (1, -1, 1, -1)),
    "packed": SegmentLayout.packed((3, 3, 40, 1, 0)),
    "windows": SegmentLayout.packed((16, 16, 8, 16, 5), causal=False),
    "prefix-not-causal": SegmentLayout((20, 9, 9), (-1, 0, 0), causal=False),
    "responses-as-long-as-the-prompt": SegmentLayout((8, 8, 8), (-1, 0, 0)),
    "equal-windows": SegmentLayout.packed((16, 16, 16), causal=False),
    "one-token": SegmentLayout.packed((1,)),
    # The ranks of a context-parallel group: two parts of the prefix and some of the responses.
    "context-rank": SegmentLayout((40, 33, 5), (-1, 0, 0), queries=((0, 11), (29, 40), (40, 78))),
    "context-rank-without-response": SegmentLayout((40,), (-1,), queries=((11, 22), (22, 29))),
    "context-rank-with-last-prompt-token": SegmentLayout((40, 36), (-1, 0), queries=((11, 20), (39, 40), (40, 76))),
    "context-rank-two-groups": SegmentLayout(
        (40, 9, 30, 9, 3), (-1, 0, -1, 2, -1), queries=((10, 20), (20, 30), (57, 64), (64, 71), (40, 49), (79, 91))
    ),
    "part-of-a-response-backwards": SegmentLayout((9, 24), (-1, 0), queries=((25, 33), (13, 19), (9, 9), (2, 5))),
}


def _inputs(
    layout: SegmentLayout, num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """Return a random query, key and value."""
    sizes = ((layout.num_queries, num_heads), (layout.num_tokens, num_kv_heads), (layout.num_tokens, num_kv_heads))
    return [torch.randn(*size, head_dim).to(device, dtype) for size in sizes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_matches_float64(
    layout: SegmentLayout, dtype: torch.dtype, device: torch.device, skip_bfloat16_matmul_in_interpreter: None
) -> None:
    inputs = _inputs(layout, 2, 1, 20, dtype, device)

    def op(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return shared_prefix_attention(query, key, value, layout)

    def reference_op(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return reference.shared_prefix_attention(query, key, value, layout)

    output = op(*inputs)
    assert output.dtype == dtype
    assert_accurate(output, reference_op(*to_float64(*inputs)), dtype)
    for actual, expected in zip(gradients(op, inputs), gradients(reference_op, to_float64(*inputs)), strict=True):
        # If every query sees only one key, the gradients of query and key are exactly 0, up to rounding. A relative
        # error would mean nothing.
        if expected.norm() > 1e-9:
            assert_accurate(actual, expected, dtype)


def test_heads_can_be_computed_apart(device: torch.device) -> None:
    """Context parallelism does so. The parts are views: the heads of a token are not next to each other."""
    layout = LAYOUTS["context-rank"]
    inputs = [tensor.requires_grad_() for tensor in _inputs(layout, 4, 2, 20, torch.float32, device)]
    output = shared_prefix_attention(*inputs, layout)
    grad_output = torch.randn_like(output)
    grads = torch.autograd.grad(output, inputs, grad_output)
    for kv_head in range(2):
        queries, keys = slice(2 * kv_head, 2 * kv_head + 2), slice(kv_head, kv_head + 1)
        slices = (queries, keys, keys)
        query, key, value = (tensor.detach()[:, part] for tensor, part in zip(inputs, slices, strict=True))
        result, log_sum_exp = attention_forward(query, key, value, layout)
        torch.testing.assert_close(result, output[:, queries])
        results = attention_backward(
            grad_output[:, queries], query, key, value, output.detach()[:, queries], log_sum_exp, layout
        )
        for actual, expected, part in zip(results, grads, slices, strict=True):
            torch.testing.assert_close(actual, expected[:, part])


@pytest.mark.parametrize("queries", [None, ((60, 147), (150, 229))], ids=["all", "some"])
@pytest.mark.parametrize("num_sms", [1, 1000], ids=["large-tiles", "small-tiles-and-split-queries"])
def test_every_tile_size_matches_float64(
    queries: tuple[tuple[int, int], ...] | None, num_sms: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tiles of half precision depend on the number of programs per SM; segments are longer than a tile."""
    if use_triton(torch.empty(0, device=device)):
        monkeypatch.setattr("vcr1_kernels.triton_ops.attention._num_sms", lambda device: num_sms)
    layout = SegmentLayout((150, 70, 9), (-1, 0, 0), queries=queries)
    inputs = _inputs(layout, 3, 1, 40, torch.float16, device)

    def op(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return shared_prefix_attention(query, key, value, layout)

    def reference_op(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return reference.shared_prefix_attention(query, key, value, layout)

    exact = to_float64(*inputs)
    assert_accurate(op(*inputs), reference_op(*exact), torch.float16)
    for actual, expected in zip(gradients(op, inputs), gradients(reference_op, exact), strict=True):
        assert_accurate(actual, expected, torch.float16)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="production shapes need a GPU")
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "layout"),
    [
        (28, 4, 128, SegmentLayout((6000, *[256] * 8), (-1, *[0] * 8))),
        (28, 4, 128, SegmentLayout((6000, 256, 256), (-1, 0, 0), queries=((751, 1501), (4501, 5251), (6000, 6512)))),
        (7, 1, 128, SegmentLayout((6000, *[256] * 8), (-1, *[0] * 8))),
        (7, 1, 128, SegmentLayout((2011, *range(17, 1000, 123)), (-1, *[0] * 8))),
        (16, 2, 128, SegmentLayout((2000, 100, 300, 3000, 200, 1), (-1, 0, 0, -1, 3, 3))),
        (16, 16, 80, SegmentLayout.packed([64] * 90 + [48, 16, 32], causal=False)),
        (16, 16, 80, SegmentLayout.packed([1500, 1500, 1000], causal=False)),
        (16, 16, 72, SegmentLayout.packed([1500, 1500, 1000], causal=False)),
    ],
    ids=["7b-tp1", "7b-cp4", "7b-tp4", "7b-tp4-short", "3b-two-groups", "windows", "vision", "vision-qwen3"],
)
def test_production_shapes_match_float64(
    num_heads: int, num_kv_heads: int, head_dim: int, layout: SegmentLayout
) -> None:
    """Compare the first and the last key-value head, with their query heads, with torch in float64 on the same GPU."""
    device = torch.device("cuda")
    inputs = _inputs(layout, num_heads, num_kv_heads, head_dim, torch.bfloat16, device)
    grad_output = torch.randn_like(inputs[0])
    leaves = [tensor.requires_grad_() for tensor in inputs]
    output = shared_prefix_attention(*leaves, layout)
    results = (output, *torch.autograd.grad(output, leaves, grad_output))
    mask = reference.attention_mask(layout).to(device)
    group_size = num_heads // num_kv_heads
    for kv_head in {0, num_kv_heads - 1}:
        queries, keys = slice(kv_head * group_size, (kv_head + 1) * group_size), slice(kv_head, kv_head + 1)
        parts = (queries, keys, keys)
        exact = [tensor.detach()[:, part].double().requires_grad_() for tensor, part in zip(inputs, parts, strict=True)]
        exact_output = torch.cat(
            [_float64_rows(*exact, mask, rows, grad_output[:, queries]) for rows in torch.arange(len(mask)).split(512)]
        )
        expected = (exact_output, *(tensor.grad for tensor in exact))
        for actual, exact_result, part in zip(results, expected, (queries, *parts), strict=True):
            assert exact_result is not None
            assert_accurate(actual[:, part], exact_result, torch.bfloat16)


def _float64_rows(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, rows: Tensor, grad_output: Tensor) -> Tensor:
    """Compute some rows of the output with torch and add their part of the gradients.

    All rows at once would take 20 GB, and several tests run at the same time.
    """
    by_head = (tensor.transpose(0, 1) for tensor in (query[rows], key, value))
    output = F.scaled_dot_product_attention(*by_head, attn_mask=mask[rows], enable_gqa=True).transpose(0, 1)
    output.backward(grad_output[rows].double())
    return output.detach()


def test_matches_separate_sequences(device: torch.device) -> None:
    """Compare with torch's attention of one sequence prompt + response per response, which does not use layouts."""
    prompt, responses, num_heads, num_kv_heads = 21, (7, 12, 1), 4, 2
    layout = SegmentLayout((prompt, *responses), (-1, 0, 0, 0))
    inputs = _inputs(layout, num_heads, num_kv_heads, 16, torch.float32, device)

    def unshared(*inputs: Tensor) -> Tensor:
        outputs = []
        for start, end in zip(layout.starts[1:], layout.starts[2:], strict=False):
            tokens = [*range(prompt), *range(start, end)]
            query, key, value = (tensor[tokens].transpose(0, 1)[None] for tensor in inputs)
            key, value = (tensor.repeat_interleave(num_heads // num_kv_heads, 1) for tensor in (key, value))
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True)[0].transpose(0, 1)
            outputs.append(out if not outputs else out[prompt:])  # the prompt's output is the same every time
        return torch.cat(outputs)

    def shared(*inputs: Tensor) -> Tensor:
        return shared_prefix_attention(*inputs, layout)

    exact = to_float64(*inputs)
    assert_accurate(shared(*inputs), unshared(*exact), torch.float32)
    for actual, expected in zip(gradients(shared, inputs), gradients(unshared, exact), strict=True):
        assert_accurate(actual, expected, torch.float32)


def test_query_key_and_value_may_be_slices_of_one_projection(device: torch.device) -> None:
    layout = SegmentLayout((6, 3), (-1, 0))
    packed = torch.randn(9, 4 + 2 + 2, 16, device=device)
    views = packed.split([4, 2, 2], dim=1)
    copies = [view.contiguous() for view in views]
    torch.testing.assert_close(
        shared_prefix_attention(*views, layout, scale=0.3), shared_prefix_attention(*copies, layout, scale=0.3)
    )


def test_gradcheck() -> None:
    layout = SegmentLayout((3, 2, 2), (-1, 0, 0))
    inputs = [tensor.requires_grad_() for tensor in _inputs(layout, 2, 1, 4, torch.float64, torch.device("cpu"))]
    torch.autograd.gradcheck(lambda *x: shared_prefix_attention(*x, layout), inputs)


def test_equal_windows_are_computed_in_one_batch() -> None:
    layout = SegmentLayout.packed([16] * 4000, causal=False)
    query, key, value = _inputs(layout, 2, 2, 16, torch.float32, torch.device("cpu"))
    output = shared_prefix_attention(query, key, value, layout)
    windows = [tensor.unflatten(0, (-1, 16)).transpose(1, 2) for tensor in (query, key, value)]
    torch.testing.assert_close(output, F.scaled_dot_product_attention(*windows).transpose(1, 2).flatten(0, 1))
    assert len(_dense_blocks(layout)) == 1


def test_empty_input(device: torch.device) -> None:
    layout = SegmentLayout((), ())
    inputs = _inputs(layout, 2, 1, 8, torch.float32, device)
    assert [g.shape for g in gradients(lambda *x: shared_prefix_attention(*x, layout), inputs)] == [
        tensor.shape for tensor in inputs
    ]


def test_keys_without_queries_have_a_gradient_of_zero(device: torch.device) -> None:
    layout = SegmentLayout((5, 3), (-1, 0), queries=())
    inputs = _inputs(layout, 2, 1, 8, torch.float32, device)
    output, log_sum_exp = attention_forward(*inputs, layout)
    by_hand = attention_backward(output, *inputs, output, log_sum_exp, layout)
    for query, key, value in (by_hand, gradients(lambda *x: shared_prefix_attention(*x, layout), inputs)):
        assert query.shape == output.shape == (0, 2, 8)
        assert not key.any() and not value.any()


@pytest.mark.parametrize(
    ("query", "key", "value", "message"),
    [
        (torch.zeros(4, 2, 8), torch.zeros(5, 2, 8), torch.zeros(5, 2, 8), r"query must be \[5, num_heads, head_dim\]"),
        (torch.zeros(5, 2, 8), torch.zeros(5, 2, 4), torch.zeros(5, 2, 4), r"key must be \[5, num_kv_heads, 8\]"),
        (torch.zeros(5, 2, 8), torch.zeros(5, 2, 8), torch.zeros(5, 1, 8), r"value must be \[5, 2, 8\]"),
        (torch.zeros(5, 3, 8), torch.zeros(5, 2, 8), torch.zeros(5, 2, 8), "3 query heads are not a multiple of 2"),
        (torch.zeros(5, 2, 8), torch.zeros(5, 2, 8).half(), torch.zeros(5, 2, 8), "query is torch.float32 but key"),
        (
            torch.zeros(5, 2, 8),
            torch.zeros(5, 2, 8, device="meta"),
            torch.zeros(5, 2, 8),
            "query is on cpu but key is on",
        ),
        (torch.zeros(5, 8, 2).mT, torch.zeros(5, 2, 8), torch.zeros(5, 2, 8), "last dimension of query"),
    ],
)
def test_invalid_input_raises(query: Tensor, key: Tensor, value: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shared_prefix_attention(query, key, value, SegmentLayout((2, 3), (-1, 0)))


def test_scale_must_be_positive() -> None:
    with pytest.raises(ValueError, match=r"scale must be positive, got -1"):
        shared_prefix_attention(*(torch.zeros(5, 2, 8),) * 3, SegmentLayout((2, 3), (-1, 0)), scale=-1)
