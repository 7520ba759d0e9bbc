"""The documented commands convert the predictions of other projects, and our metrics equal their published formulas.

The files have the projects' formats and seeded values; the formulas are those of Video-MME's eval_your_results.py,
NExT-GQA's eval_ground.py, Moment-DETR's standalone_eval, lmms-eval's eval_tvg.py and VTimeLLM's metric.py.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_vcr1.cli.main import main
from tests.docs.pages import ROOT
from tests.evaluation import published

NUM_SAMPLES = 80
Spans = list[list[float]]


def run_documented_commands(heading: str) -> dict[str, float]:
    """Run the commands below a heading of docs/evaluation.md in this folder; return the metrics."""
    page = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")
    section = page.partition(f"\n### {heading}\n")[2].partition("\n### ")[0]
    (block,) = re.findall(r"^```sh\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    conversion, _, evaluation = block.rpartition("\nvcr1 ")
    python = f'python() {{ {shlex.quote(sys.executable)} "$@"; }}'
    subprocess.run(["bash", "-ec", f"{python}\n{conversion}"], check=True)
    assert main(shlex.split(evaluation)) == 0
    metrics = json.loads(Path("metrics.json").read_text())["metrics"]
    return {name: metric["value"] for name, metric in metrics.items()}


@pytest.fixture
def random(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> np.random.Generator:
    monkeypatch.chdir(tmp_path)
    return np.random.default_rng(3)


def write(name: str, content: Any) -> None:
    Path(name).write_text(json.dumps(content), encoding="utf-8")


def write_lines(name: str, rows: list[dict[str, Any]]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def random_spans(random: np.random.Generator, number: int, length_s: float = 60.0) -> Spans:
    starts = random.uniform(0, length_s * 0.6, number).tolist()
    return [[round(start, 1), round(start + float(random.uniform(1, length_s * 0.4)), 1)] for start in starts]


def near(random: np.random.Generator, span: list[float]) -> list[float]:
    start = abs(round(span[0] + float(random.normal(0, 4)), 1))
    return [start, round(start + (span[1] - span[0]) * float(random.uniform(0.5, 1.5)) + 0.1, 1)]


def question(id: str, task: str, target: dict[str, Any], options: list[str]) -> dict[str, Any]:
    return {
        **{"id": id, "task": task, "video": f"{id}.mp4", "duration_s": 120.0, "query": "what?"},
        **{"options": options, "target": target},
    }


def test_videomme(random: np.random.Generator) -> None:
    forms = ["{}", "{}.", "({})", "{}. Some text.", "The best answer is: {}", "The answer is {}."]
    truth, said = random.choice(list("ABCD"), (2, NUM_SAMPLES))
    responses = [forms[index % len(forms)].format(letter) for index, letter in enumerate(said)]
    ids = [f"{index // 3:03d}-{index % 3 + 1}" for index in range(NUM_SAMPLES)]
    rows = [
        {"question_id": id, "answer": str(a), "response": b} for id, a, b in zip(ids, truth, responses, strict=True)
    ]
    write("output.json", [{"video_id": str(at), "questions": rows[at : at + 3]} for at in range(0, NUM_SAMPLES, 3)])
    options = ["Red.", "Green.", "Blue.", "White."]
    samples = [
        question(id, "multiple_choice_qa", {"choice": str(a)}, options) for id, a in zip(ids, truth, strict=True)
    ]
    write_lines("videomme.jsonl", samples)
    accuracy = np.mean([published.videomme_letter(row["response"]) == row["answer"] for row in rows])
    assert run_documented_commands("Video-MME")["accuracy"] == pytest.approx(accuracy)
    assert 0.1 < accuracy < 0.5


def test_nextgqa(random: np.random.Generator) -> None:
    truth = {f"{index}_{index % 7}": random_spans(random, 1 + index % 3) for index in range(NUM_SAMPLES)}
    spans = {id: near(random, targets[0]) for id, targets in truth.items()}
    answers = {
        id: {"prediction": int(said), "answer": int(right)}
        for id, said, right in zip(truth, *random.integers(0, 3, (2, NUM_SAMPLES)), strict=True)
    }
    write("test_ground.json", spans)
    write("test-res.json", answers)
    samples = [
        question(id, "grounded_qa", {"choice": "ABCDE"[answers[id]["answer"]], "intervals": truth[id]}, list("vwxyz"))
        for id in truth
    ]
    write_lines("nextgqa_test.jsonl", samples)
    right = {id: answer["prediction"] == answer["answer"] for id, answer in answers.items()}
    expected = published.nextgqa_scores(spans, truth, right)
    ours = run_documented_commands("NExT-GQA")
    assert {name: ours[name] for name in expected} == pytest.approx(expected)
    assert 0.1 < expected["Acc@GQA"] < expected["mIoP"] < 0.95


def test_qvhighlights(random: np.random.Generator) -> None:
    annotations, submission = [], []
    for qid in range(NUM_SAMPLES):
        windows = random_spans(random, 1 + qid % 4, 150.0)
        row = {"qid": qid, "query": "a dog runs", "vid": f"v{qid}_60.0_210.0", "duration": 150}
        annotations.append({**row, "relevant_windows": windows, "relevant_clip_ids": [], "saliency_scores": []})
        ranked = [[*near(random, window), 0.9 - rank / 10] for rank, window in enumerate(windows)]
        submission.append({**row, "pred_relevant_windows": ranked, "pred_saliency_scores": []})
    write_lines("highlight_val_release.jsonl", annotations)
    write_lines("hl_val_submission.jsonl", submission)
    expected = {
        f"R@{threshold}": published.recall_at_one(
            [row["pred_relevant_windows"][0][:2] for row in submission],
            [row["relevant_windows"] for row in annotations],
            threshold,
        )
        for threshold in (0.5, 0.7)
    }
    ours = run_documented_commands("QVHighlights")
    assert {name: ours[name] for name in expected} == pytest.approx(expected)
    assert 0.1 < expected["R@0.7"] < expected["R@0.5"] < 0.95


def test_lmms_eval_charades(random: np.random.Generator) -> None:
    forms = ["{} - {}", "{} to {}", "The given query happens in {} - {} seconds.", "It happens from {} to {} seconds."]
    truth = random_spans(random, NUM_SAMPLES, 30.0)
    texts = [forms[index % len(forms)].format(*near(random, span)) for index, span in enumerate(truth)]
    texts[5] = "I cannot tell."
    keys = [f"V{index}.mp4>>>a person opens door {index}>>>{span}" for index, span in enumerate(truth)]
    write("inference_results_temporal_grounding_charades.json", dict(zip(keys, texts, strict=True)))
    expected = published.grounding_scores([published.lmms_eval_span(text) for text in texts], truth)
    ours = run_documented_commands("lmms-eval")
    assert {name: ours[f"{name} (lenient)"] for name in expected} == pytest.approx(expected)
    assert 0.3 < expected["mIoU"] < 0.8
    assert ours["mIoU"] < 0.8 * expected["mIoU"]  # the strict reading needs "to"


def test_vtimellm(random: np.random.Generator) -> None:
    annotations, log, ious = {}, [], []
    for number in range(NUM_SAMPLES // 4):
        duration, spans = float(random.integers(100, 300)), []
        for sentence in range(4):
            start, end = sorted(random.choice(99, 2, replace=False) / 100)
            said = np.clip([100 * start + random.integers(-9, 9), 100 * end + random.integers(-9, 9)], 0, 99).astype(
                int
            )
            spans.append([start * duration, end * duration])
            answer = f"The dog barks from {said[0]:02d} to {said[1]:02d}." if sentence else "I cannot tell."
            ious.append(published.vtimellm_iou(answer, (start, end)))
            info = {"sentence_id": sentence, "iou": ious[-1]}
            log.append({"video_id": f"v{number}", "task": "grounding", "query_id": 0, "answer": answer, "info": info})
        log.append({"video_id": f"v{number}", "task": "captioning", "query_id": 0, "answer": "from 00 to 29: a dog"})
        annotations[f"v{number}"] = {"duration": duration, "timestamps": spans, "sentences": ["a dog barks"] * 4}
    write("annotations.json", annotations)
    write_lines("log.txt", log)
    ours = run_documented_commands("VTimeLLM")
    assert ours["mIoU"] == pytest.approx(np.mean(ious), abs=0.005)
    for threshold in (0.3, 0.5, 0.7):
        assert ours[f"R@{threshold}"] == pytest.approx(np.mean(np.array(ious) >= threshold), abs=1.1 / NUM_SAMPLES)
    assert 0.3 < np.mean(ious) < 0.8
