from __future__ import annotations

import pickle
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from megatron_vcr1.data.encoding import EncodedPrompt
from megatron_vcr1.data.loader import MAX_ATTEMPTS, PromptLoader
from megatron_vcr1.data.manifest import read_manifest
from megatron_vcr1.data.order import SampleOrder, Source
from megatron_vcr1.data.prompts import PreparedSample, PromptTooLongError, prepare_sample
from megatron_vcr1.data.synthesize import synthesize
from megatron_vcr1.data.templates import load_templates
from megatron_vcr1.data.video import VideoError
from megatron_vcr1.errors import UserError
from megatron_vcr1.types import Sample
from tests.data.orders import ids, order, samples
from tests.data.tiny_processor import tiny_processor


def prepare(sample: Sample) -> PreparedSample:
    """Prepare every sample except a3, a4 and b1."""
    if sample.id in ("a3", "b1"):
        raise VideoError(sample.media[0].path, "no such file")
    if sample.id == "a4":
        raise PromptTooLongError("sample a4: too long")
    reduction = "smaller" if sample.id == "a5" else None
    return PreparedSample(sample, EncodedPrompt(torch.tensor([1]), ()), reduction)


def take(loader: PromptLoader, number: int) -> list[str]:
    return [prepared.sample.id for prepared in islice(loader, number)]


def test_a_reduction_is_reported_with_its_sample() -> None:
    reductions = {prepared.sample.id: prepared.reduction for prepared in islice(PromptLoader(order(), prepare), 17)}
    assert reductions["a5"] == "smaller" and reductions["a0"] is None


def test_a_bad_sample_is_replaced_and_listed() -> None:
    loader = PromptLoader(order(), prepare)
    taken, planned = take(loader, 17), ids(order(), 17)
    bad = {"a3", "a4", "b1"}
    assert len(taken) == 17 and not bad & set(taken)
    assert [got for got, plan in zip(taken, planned, strict=True) if plan not in bad] == [
        plan for plan in planned if plan not in bad
    ]
    substitutes = [(plan[0], got[0]) for got, plan in zip(taken, planned, strict=True) if plan in bad]
    assert all(plan == got for plan, got in substitutes)  # of the same source
    assert {skip.id for skip in loader.skipped} == bad
    reasons = {skip.id: skip.reason for skip in loader.skipped}
    assert reasons["a3"] == "a3.mp4: no such file" and reasons["a4"] == "sample a4: too long"


def broken(sample: Sample) -> PreparedSample:
    raise VideoError(sample.media[0].path, "no such file")


def test_a_run_without_readable_samples_ends_and_lists_what_was_tried() -> None:
    loader = PromptLoader(order(), broken)
    with pytest.raises(UserError, match=rf"{MAX_ATTEMPTS} samples in a row(.|\n)*\.mp4: no such file"):
        next(iter(loader))
    assert len(loader.skipped) == MAX_ATTEMPTS


def mistaken(sample: Sample) -> PreparedSample:
    raise TypeError("our own mistake")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_programming_error_ends_the_run_at_the_first_sample(num_workers: int) -> None:
    loader = PromptLoader(order(), mistaken, num_workers=num_workers)
    with pytest.raises(TypeError, match="our own mistake"):
        next(iter(loader))
    assert loader.skipped == []


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_ranks_divide_the_positions(num_ranks: int) -> None:
    whole = take(PromptLoader(order(), prepare), 24)
    for rank in range(num_ranks):
        assert take(PromptLoader(order(), prepare, rank=rank, num_ranks=num_ranks), 6) == whole[rank::num_ranks][:6]


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (4, 2), (2, 3), (1, 4)])
def test_a_run_resumes_exactly_with_any_number_of_ranks(before: int, after: int) -> None:
    whole = take(PromptLoader(order(), prepare), 48)
    states = []
    for rank in range(before):
        loader = PromptLoader(order(), prepare, rank=rank, num_ranks=before)
        take(loader, 12 // before)
        states.append(loader.state_dict())
    assert all(state == states[0] for state in states)
    for rank in range(after):
        loader = PromptLoader(order(), prepare, rank=rank, num_ranks=after)
        loader.load_state_dict(pickle.loads(pickle.dumps(states[0])))
        assert take(loader, 6) == whole[12 + rank :: after][:6]


def test_a_checkpoint_of_other_data_is_refused() -> None:
    state = PromptLoader(order(), prepare).state_dict()
    for other in (order(seed=1), order(weights=(1.0, 2.0)), SampleOrder([Source("a", samples("a", 12))], 0)):
        with pytest.raises(UserError, match=r"other data .* or another train\.seed"):
            PromptLoader(other, prepare).load_state_dict(state)


def test_each_source_has_its_own_prepare_function() -> None:
    def prepare_b(sample: Sample) -> PreparedSample:
        return PreparedSample(sample, EncodedPrompt(torch.tensor([2]), ()), None)

    loader = PromptLoader(order(), [prepare, prepare_b], rank=1, num_ranks=2)
    assert loader.position == 1
    for position, prepared in zip(range(1, 35, 2), loader, strict=False):
        assert order().source_at(position) == "ab".index(prepared.sample.id[0])
        assert prepared.prompt.token_ids.item() == 1 + order().source_at(position)
        assert loader.position == position + 2


def test_iterating_does_not_use_the_global_random_generator() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    take(PromptLoader(order(), prepare), 3)
    assert torch.equal(torch.rand(3), expected)


def test_a_rank_must_exist() -> None:
    with pytest.raises(ValueError, match="rank 2 of 2 ranks"):
        PromptLoader(order(), prepare, rank=2, num_ranks=2)


class StaysHere(list[Sample]):
    """Samples that cannot be pickled: a manifest may have millions, and must not be sent to a worker."""

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise AssertionError("sent to a worker")


def test_workers_give_the_same_samples_in_the_same_order(tmp_path: Path) -> None:
    """End to end on real files, one of them damaged. The state counts the samples that were yielded."""
    for _ in synthesize(tmp_path, num_videos=12, num_test_videos=1, seed=0, tasks=["temporal_grounding"]):
        pass
    (tmp_path / "videos/train/000005.mp4").write_text("no video")
    source = Source("train", StaysHere(read_manifest(tmp_path / "train.jsonl")))
    prepare_real = partial(
        prepare_sample,
        templates=load_templates(),
        processor=tiny_processor(),
        thinking=False,
        max_tokens=1000,
        video_options={"min_pixels": 240, "total_pixels": 256 * 12},
    )
    here = PromptLoader(SampleOrder([source], 0), prepare_real)
    apart = PromptLoader(SampleOrder([source], 0), prepare_real, num_workers=1)
    for one, other in zip(islice(here, 12), islice(apart, 12), strict=False):
        assert one.sample == other.sample
        assert torch.equal(one.prompt.token_ids, other.prompt.token_ids)
        assert torch.equal(one.prompt.vision[0].frames, other.prompt.vision[0].frames)
        assert one.prompt.vision[0].grid_thw == (12, 2, 2)
    assert apart.state_dict() == here.state_dict()
    assert apart.state_dict()["next_position"] == 12
    assert [skip.id for skip in apart.skipped] == [skip.id for skip in here.skipped]
    assert set(skip.id for skip in apart.skipped) == {"train_000005"}
