from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_vcr1.data.rows import row_from_sample
from megatron_vcr1.errors import UserError
from megatron_vcr1.tasks import free_form
from megatron_vcr1.types import Interval
from tests.data.importers.importing import issues, run, write


def problem(number: int, **changes: Any) -> dict[str, Any]:
    row = {"problem_id": number, "problem": " What is it? ", "data_type": "video", "problem_type": "multiple choice"}
    row |= {"options": ["A. a cat", "B. a dog"], "solution": "<answer>B</answer>", "data_source": "STAR"}
    return row | {"path": f"./STAR/{number}.mp4"} | changes


def test_video_r1_multiple_choice(tmp_path: Path) -> None:
    rows = [
        problem(1),
        problem(2, process="<think>It barks.\n</think>", solution="<answer> B. a dog </answer>", data_source=""),
        problem(3, solution="<answer>none</answer>"),
    ]
    samples, report = run("video_r1", write(tmp_path / "a.json", rows))
    assert [(sample.id, sample.media[0].path, sample.query) for sample in samples] == [
        ("1", "STAR/1.mp4", "What is it?"),
        ("2", "STAR/2.mp4", "What is it?"),
    ]
    assert {(sample.options, sample.target.choice) for sample in samples} == {(("a cat", "a dog"), "B")}
    assert [(sample.thinking, sample.category) for sample in samples] == [
        ("", "STAR/multiple choice"),
        ("It barks.", "unknown/multiple choice"),
    ]
    assert issues(report) == [("3", "invalid_row", "skipped")]


def test_video_r1_problems_of_every_type(tmp_path: Path) -> None:
    pytest.importorskip("rouge_score")  # an extra: answers that it compares need it
    image = {"data_type": "image", "path": "./Math/5.png"}
    rows = [
        problem(1, problem_type="numerical", options=[], solution="<answer>1,234.5</answer>"),
        problem(2, problem_type="regression", options=[], solution="<answer>0.8</answer>"),
        problem(3, problem_type="OCR", options=[], solution="<answer>EXIT 12</answer>"),
        problem(4, problem_type="free-form", options=[], solution="<answer>出口</answer>"),
        problem(5, **image),
        problem(6, problem_type="numerical", solution="<answer>many</answer>"),
        problem(7, problem_type="essay"),
        problem(8, data_type="audio"),
    ]
    samples, report = run("video_r1", write(tmp_path / "a.json", rows))
    written = {sample.id: row_from_sample(sample) for sample in samples}
    assert {row_id: (row["task"], row["target"]) for row_id, row in written.items()} == {
        "1": ("numeric", {"value": 1234.5, "metric": "exact", "tolerance": 0.005}),
        "2": ("numeric", {"value": 0.8, "metric": "mean_relative_accuracy"}),
        "3": ("free_form", {"answer": "EXIT 12", "metric": "rouge"}),
        "4": ("free_form", {"answer": "出口", "metric": "exact"}),
        "5": ("multiple_choice_qa", {"choice": "B"}),
    }
    assert written["5"]["image"] == "Math/5.png"
    assert issues(report) == [
        ("6", "invalid_row", "skipped"),
        ("7", "other_task", "skipped"),
        ("8", "other_medium", "skipped"),
    ]


def test_videochat_r1_5_rows_have_the_task_of_their_keys(tmp_path: Path) -> None:
    question = {"video": "a/b.mp4", "question": "why? ", "options": ["(A) fun", "(B) rest"], "answer": "(B)"}
    rows = [
        {"video": "a/b.mp4", "question": "a dog barks", "glue": [1.5, 4], "duration": 9},
        question | {"glue": [[1, 2], [3, 4]], "duration": 9},
        question,
        {"image": "c.jpg", "question": "cat", "glue": [10, 20, 30, 40]},
        {"image": "c.jpg", "question": "what?", "options": ["(A) cat", "(B) dog"], "answer": "(B)"},
        {"video": "a/b.mp4", "question": "nothing else"},
    ]
    samples, report = run("videochat_r1_5", write(tmp_path / "rows.json", rows))
    assert [(sample.id, str(sample.task)) for sample in samples] == [
        ("a_b_0", "temporal_grounding"),
        ("a_b_1", "grounded_qa"),
        ("a_b_2", "multiple_choice_qa"),
        ("c_1", "multiple_choice_qa"),
    ]
    assert [[(span.start_s, span.end_s) for span in sample.intervals] for sample in samples] == [
        [(1.5, 4.0)],
        [(1.0, 2.0), (3.0, 4.0)],
        [],
        [],
    ]
    assert samples[0].target.intervals == (Interval(1.5, 4.0),)  # a list: the prompt asks for a list
    assert samples[1].options == ("fun", "rest") and samples[1].target.choice == samples[2].target.choice == "B"
    assert [(problem, action) for _, problem, action in issues(report)] == [
        ("box_in_image", "skipped"),
        ("invalid_row", "skipped"),
    ]


@pytest.mark.parametrize(("answer", "choice"), [("A dog", "B"), ("B) A dog", "B"), ("(B)", "B"), ("B. any", "B")])
def test_the_article_of_an_answer_is_not_the_letter_of_an_option(tmp_path: Path, answer: str, choice: str) -> None:
    row = {"video": "b.mp4", "question": "who?", "options": ["A man", "A dog"], "answer": answer}
    (sample,), _ = run("videochat_r1_5", write(tmp_path / "rows.json", [row]))
    assert sample.target.choice == choice
    row = problem(1, options=row["options"], solution=f"<answer>{answer}</answer>")
    (sample,), _ = run("video_r1", write(tmp_path / "a.json", [row]))
    assert sample.target.choice == choice


def test_the_index_of_videochat_r1_5_lists_files_beside_it(tmp_path: Path) -> None:
    write(tmp_path / "tg.json", [{"video": "a.mp4", "question": "a dog barks", "glue": [1, 4]}])
    entry = {"media_type": "video", "task_type": "tg", "visual_base": "s3://x", "json_path": "/elsewhere/tg.json"}
    (sample,), _ = run("videochat_r1_5", write(tmp_path / "index.json", {"charades": entry}))
    assert sample.media[0].path == "a.mp4"
    with pytest.raises(UserError, match=r"'lost': neither /elsewhere/lost\.json nor"):
        run("videochat_r1_5", write(tmp_path / "index.json", {"lost": entry | {"json_path": "/elsewhere/lost.json"}}))
    with pytest.raises(UserError, match="'charades' names no json_path"):
        run("videochat_r1_5", write(tmp_path / "index.json", {"charades": [1]}))


def test_a_package_that_is_not_installed_ends_the_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(free_form, "find_spec", lambda name: None)
    free_form.check_rouge.cache_clear()
    rows = [problem(1), problem(2, problem_type="free-form", options=[], solution="<answer>a dog</answer>")]
    with pytest.raises(UserError, match=r'pip install "megatron_vcr1\[rouge\]"'):
        run("video_r1", write(tmp_path / "a.json", rows))


def test_an_image_of_videochat_r1_5_may_have_an_empty_video(tmp_path: Path) -> None:
    row = {"video": None, "image": "a.jpg", "question": "what?", "options": ["(A) cat", "(B) dog"], "answer": "(B)"}
    samples, report = run(
        "videochat_r1_5", write(tmp_path / "rows.json", [row, row | {"video": "a.mp4"}, row | {"glue": [1, 2, 3, 4]}])
    )
    assert [(sample.id, sample.media[0].kind) for sample in samples] == [("a_0", "image"), ("a_1", "video")]
    assert issues(report) == [("a_2", "box_in_image", "skipped")]
