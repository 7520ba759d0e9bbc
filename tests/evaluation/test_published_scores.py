"""Our metrics match the published rules, on the same seeded predictions and on the real annotations if available.

The literal numbers were computed with the published programs themselves, on these predictions: the package got10k 0.1.3
(not a dependency, because it requires matplotlib and shapely), NExT-GQA's eval_ground.py at 63772e0, and lmms-eval at
75571cf.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from megatron_vcr1.data.templates import load_templates, target_text
from megatron_vcr1.evaluation.annotations import read_annotations
from megatron_vcr1.evaluation.benchmark_result import needs_judge, score_predictions
from megatron_vcr1.evaluation.benchmarks import Benchmark, find_benchmark
from megatron_vcr1.evaluation.predictions import Prediction
from megatron_vcr1.evaluation.summary import summarize
from megatron_vcr1.tasks import (
    CaptionTarget,
    ChoiceTarget,
    GroundedChoiceTarget,
    GroundingTarget,
    TrackingTarget,
    find_task,
)
from megatron_vcr1.types import Box, Interval, Sample, Target, Video
from tests.evaluation import published

Spans = list[tuple[float, float]]


def metrics_of(name: str, samples: Sequence[Sample], outputs: Sequence[str]) -> dict[str, float]:
    predictions = [Prediction(sample.id, output) for sample, output in zip(samples, outputs, strict=True)]
    summary = score_predictions(find_benchmark(name), samples, predictions, None).summary
    return {metric: estimate.value for metric, estimate in summary.metrics.items()}


def sample(index: int, target: Target, options: tuple[str, ...] = (), category: str = "") -> Sample:
    return Sample(f"s{index}", (Video(f"{index}.mp4"),), target, query="what?", options=options, category=category)


def random_spans(random: np.random.Generator, number: int) -> Spans:
    edges = np.sort(random.uniform(0, 30, (number, 2)).round(2), axis=1)
    return [(start, end + 0.5) for start, end in edges.tolist()]


def noisy(random: np.random.Generator, span: tuple[float, float]) -> tuple[float, float]:
    start, end = (abs(round(value + random.normal(0, 2), 2)) for value in span)
    return (start, end) if start < end else (end, start + 0.25)


def test_temporal_grounding_matches_lmms_eval() -> None:
    random = np.random.default_rng(3)
    truth = random_spans(random, 300)
    spans = [None if random.random() < 0.1 else noisy(random, span) for span in truth]
    outputs = ["I cannot tell." if span is None else f"<answer>{span[0]} to {span[1]}</answer>" for span in spans]
    samples = [sample(index, GroundingTarget(Interval(*span))) for index, span in enumerate(truth)]
    expected = published.grounding_scores(spans, truth)
    ours = metrics_of("charades_sta", samples, outputs)
    assert {name: ours[name] for name in expected} == pytest.approx(expected, abs=1e-12)
    assert {name: ours[f"{name} (lenient)"] for name in expected} == pytest.approx(expected, abs=1e-12)
    assert expected["mIoU"] == pytest.approx(0.591131536340945, abs=1e-12)


def test_nextgqa_matches_the_published_rules() -> None:
    random = np.random.default_rng(5)
    truth = [random_spans(random, 1 + index % 3) for index in range(300)]
    spans = [noisy(random, targets[index % len(targets)]) for index, targets in enumerate(truth)]
    letters = random.choice(list("ABCDE"), (2, 300))
    options = tuple("vwxyz")
    samples = [
        sample(index, GroundedChoiceTarget(str(letter), tuple(Interval(*span) for span in targets)), options)
        for index, (letter, targets) in enumerate(zip(letters[0], truth, strict=True))
    ]
    outputs = [
        f"<answer>{letter}</answer><glue>[({start}, {end})]</glue>"
        for letter, (start, end) in zip(letters[1], spans, strict=True)
    ]
    expected = published.nextgqa_scores(
        {question.id: span for question, span in zip(samples, spans, strict=True)},
        {question.id: targets for question, targets in zip(samples, truth, strict=True)},
        {question.id: right for question, right in zip(samples, letters[0] == letters[1], strict=True)},
    )
    ours = metrics_of("nextgqa", samples, outputs)
    assert {name: ours[name] for name in expected} == pytest.approx(expected, abs=1e-12)
    assert expected["mIoP"] == pytest.approx(0.8357603732481577, abs=1e-12)
    assert 0.1 < expected["Acc@GQA"] < ours["accuracy"] < 0.3


def tracking_case(seed: int = 7, num_sequences: int = 50) -> tuple[np.ndarray, np.ndarray]:
    """Predicted and true boxes, [num_sequences, 8, 4]; some predicted boxes are inverted or extend beyond the frame."""
    random = np.random.default_rng(seed)
    truth = np.sort(random.uniform(0, 1, (num_sequences, 8, 2, 2)), axis=2).reshape(num_sequences, 8, 4).round(3)
    truth[..., 2:] = np.maximum(truth[..., 2:], truth[..., :2] + 0.05).clip(None, 1)
    truth[..., :2] = np.minimum(truth[..., :2], truth[..., 2:] - 0.05)
    truth = truth.round(3)
    return (truth + random.normal(0, 0.15, truth.shape)).round(3), truth


def test_got10k_matches_the_toolkit() -> None:
    predicted, truth = tracking_case()
    samples = [
        sample(index, TrackingTarget(tuple(Box(*box) for box in boxes.tolist()))) for index, boxes in enumerate(truth)
    ]
    ours = metrics_of("got10k", samples, [f"<answer>{boxes.tolist()}</answer>" for boxes in predicted])
    by_the_package = {"AO": 0.22087664301358256, "SR@0.5": 0.12571428571428572, "SR@0.75": 0.008571428571428572}
    assert {name: ours[name] for name in by_the_package} == pytest.approx(by_the_package, abs=1e-12)
    assert published.toolkit_scores(predicted, truth) == pytest.approx(by_the_package, abs=1e-12)


ANSWERS = ["{}", "({})", "{}.", "({}) some text", "{}. Some text", "<answer>{}</answer>", "<answer>({})</answer>"]


@pytest.mark.parametrize("name, letters, by_lmms_eval", [("videomme", "ABCD", 0.2975), ("mvbench", "ABCDE", 0.23)])
def test_multiple_choice_matches_lmms_eval(name: str, letters: str, by_lmms_eval: float) -> None:
    random = np.random.default_rng(11)
    truth, said = random.choice(list(letters), (2, 400))
    outputs = [ANSWERS[index % len(ANSWERS)].format(letter) for index, letter in enumerate(said)]
    samples = [
        sample(index, ChoiceTarget(str(letter)), tuple("vwxyz")[: len(letters)], f"task {index % 20}")
        for index, letter in enumerate(truth)
    ]
    read = published.videomme_letter if name == "videomme" else published.mvbench_letter
    untagged = [output.removeprefix("<answer>").removesuffix("</answer>") for output in outputs]
    expected = np.mean([read(output) == letter for output, letter in zip(untagged, truth, strict=True)])
    assert metrics_of(name, samples, outputs)["accuracy"] == pytest.approx(expected) == pytest.approx(by_lmms_eval)


def test_dream1k_averages_over_its_sources() -> None:
    random = np.random.default_rng(13)
    sources = {f"DREAM/{source}": random.uniform(0, 1, (2, 20 + 10 * source)) for source in range(5)}
    samples, sample_metrics = [], []
    for source, (recalls, precisions) in sources.items():
        for recall, precision in zip(recalls, precisions, strict=True):
            samples.append(sample(len(samples), CaptionTarget("A dog barks."), category=source))
            sample_metrics.append(find_task("captioning").judged_metrics(float(recall), float(precision)))
    summary = summarize(find_benchmark("dream1k"), samples, sample_metrics)
    expected = published.autodq_scores(
        {source: values[0] for source, values in sources.items()},
        {source: values[1] for source, values in sources.items()},
    )
    assert {name: estimate.value for name, estimate in summary.metrics.items()} == pytest.approx(expected, abs=1e-12)
    assert list(summary.categories) == list(sources)


REAL = {
    "charades_sta": (["charades_sta/charades_sta_test.txt", "charades_sta/Charades_v1_test_lengths.csv"], 3720),
    "activitynet": (["activitynet/videochat_r1_test.json"], 17031),
    "nextgqa": (["nextgqa/nextgqa_test.json"], 5553),
    "got10k": (["got10k/videochat_r1_val.json"], 180),
    "videomme": (["videomme/test-00000-of-00001.parquet"], 2700),
    "videomme_short": (["videomme/test-00000-of-00001.parquet"], 900),
    "mvbench": (["mvbench"], 4000),
    "vidtab": (["vidtab/Quality_Access_test.json"], 724),
    "dream1k": (["dream1k/DREAM-1k.jsonl"], 1000),
}


@pytest.mark.parametrize("name", REAL)
def test_target_texts_of_real_annotations_score_1(realdata: Path, name: str) -> None:
    benchmark: Benchmark = find_benchmark(name)
    files, num_published = REAL[name]
    samples = read_annotations(benchmark, [realdata / "annotations" / file for file in files])
    assert 0.99 * num_published <= len(samples) <= num_published
    if needs_judge(samples):
        return
    templates = load_templates()
    ours = metrics_of(name, samples, [target_text(sample, templates) for sample in samples])
    # Times are written with two decimals, boxes with three; the single span covers only one of several.
    exact = {metric: value for metric, value in ours.items() if "single" not in metric and not metric.startswith("IoU")}
    assert exact == pytest.approx(dict.fromkeys(exact, 1), abs=0.02)
    if name == "mvbench":
        predictions = [Prediction(sample.id, "A") for sample in samples]
        summary = score_predictions(benchmark, samples, predictions, None).summary
        by_task = [values["accuracy"] for values in summary.categories.values()]
        assert len(by_task) == 20
        assert summary.metrics["accuracy"].value == pytest.approx(np.mean(by_task))
