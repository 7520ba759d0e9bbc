from __future__ import annotations

import pytest

from megatron_vcr1.data.rows import sample_from_row
from megatron_vcr1.errors import UserError
from megatron_vcr1.judge import Judge
from megatron_vcr1.judge.lexical import LexicalBackend
from megatron_vcr1.rewards import score
from megatron_vcr1.tasks import free_form
from megatron_vcr1.tasks.free_form import TASK, TextMetric, TextTarget
from megatron_vcr1.tasks.row_fields import RowError
from tests.rewards.samples import parts_of, sample

ROW = {"id": "a", "task": "free_form", "video": "a.mp4", "duration_s": None, "query": "what does the sign say?"}


@pytest.mark.parametrize(
    "answer, accuracy, reason",
    [
        (" a  dog\nBARKS ", 1, None),
        ('"A dog barks"', 1, None),
        ("A cat barks.", 0, "wrong answer"),
        (" . ", 0, "empty answer"),
    ],
)
def test_exact_match_ignores_case_spaces_and_punctuation_at_the_ends(
    answer: str, accuracy: float, reason: str | None
) -> None:
    reward = score(sample("free_form"), f"<answer>{answer}</answer>", thinking=False)
    assert parts_of(reward) == {"format": 1, "accuracy": accuracy}
    assert reward.reasons.get("accuracy") == reason


def test_exact_match_of_other_scripts() -> None:
    chinese = sample("free_form", TextTarget("禁止入内"))
    assert TASK.metrics(chinese, "禁止入内。").values == {"accuracy": 1}
    assert TASK.metrics(chinese, "<answer>入内</answer>").values == {"accuracy": 0}


def test_rouge_grades_by_the_longest_common_subsequence() -> None:
    pytest.importorskip("rouge_score")
    target = sample("free_form", TextTarget("The cat sits on the mat", TextMetric.ROUGE))
    # "the cat on the mat" is common: precision 5/5 and recall 5/6.
    assert score(target, "<answer>the cat on the mat</answer>", thinking=False).accuracy == pytest.approx(10 / 11)
    assert TASK.metrics(target, "The cat sits on the mat!").values == {"accuracy": 1}
    assert TASK.metrics(target, "dogs").reasons == {"accuracy": "wrong answer"}


def test_rouge_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(free_form, "find_spec", lambda name: None)
    free_form.check_rouge.cache_clear()
    with pytest.raises(UserError, match=r'pip install "megatron_vcr1\[rouge\]"'):
        sample_from_row({**ROW, "target": {"answer": "stop", "metric": "rouge"}})


def test_the_judge_decides_whether_an_answer_states_the_true_one() -> None:
    judged = sample("free_form", TextTarget("a red bicycle", TextMetric.JUDGE))
    assert TASK.needs_judge(judged) and not TASK.needs_judge(sample("free_form"))
    judge = Judge(LexicalBackend())
    assert judge.recalls([judged] * 2, ["It is a red bicycle.", "a blue car"]) == [1, 0]
    assert score(judged, "<answer>a red bicycle</answer>", thinking=False, judged=1.0).total == 2
    assert score(judged, "<answer>a red bicycle</answer>", thinking=False).total is None
    assert score(judged, "<answer></answer>", thinking=False).reasons == {"accuracy": "empty answer"}
    assert score(judged, "<answer>?!</answer>", thinking=False, judged=1.0).reasons == {"accuracy": "empty answer"}
    assert TASK.judged_metrics(0.0, 1.0).reasons == {"accuracy": "wrong answer"}


@pytest.mark.parametrize(
    "target, message",
    [
        ({}, "'target.answer' is missing"),
        ({"answer": "?"}, "the answer is empty"),
        ({"answer": "stop", "metric": "bleu"}, "'target.metric': \"bleu\" is not one of exact, rouge, judge"),
        ({"answer": "禁止入内", "metric": "rouge"}, "rouge compares words of ASCII letters"),
    ],
)
def test_bad_targets_name_the_key(target: dict[str, object], message: str) -> None:
    with pytest.raises(RowError, match=message):
        sample_from_row({**ROW, "target": target})
