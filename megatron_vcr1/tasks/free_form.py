"""Free-form answers: a text, compared with the true one exactly, by ROUGE, or by a judge."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from importlib.util import find_spec
from typing import Any

from megatron_vcr1.errors import UserError
from megatron_vcr1.rewards.answer_parsing import read_answer
from megatron_vcr1.rewards.parsing import UnparsableError, last_answer
from megatron_vcr1.rewards.scoring import compute_part
from megatron_vcr1.tasks.base import NumberFormat, Reference, Task
from megatron_vcr1.tasks.metrics import SampleMetrics, reason_if_zero, value_or_default, with_tagged_answer
from megatron_vcr1.tasks.row_fields import TEXT, TargetField, choice_of
from megatron_vcr1.types import RewardPart, Sample, Target

_PUNCTUATION = " .,;:!?\"'`*()[]{}“”\u2018\u2019。、"
_ROUGE_WORD = re.compile(r"[A-Za-z0-9]")


class TextMetric(StrEnum):
    """How an answered text is compared with the true one."""

    EXACT = "exact"
    """1 if the texts are equal, ignoring case, white space and punctuation at the ends, else 0."""
    ROUGE = "rouge"
    """The F1 score of ROUGE-L: how much of the words, in order, the texts have in common."""
    JUDGE = "judge"
    """1 if the judge finds that the answer states what the true one states, else 0."""


@dataclass(frozen=True, slots=True)
class TextTarget(Target):
    """The target of a free-form question.

    Attributes:
        answer: the true answer.
        metric: how answers are compared with it.
    """

    answer: str
    metric: TextMetric = TextMetric.EXACT

    def __post_init__(self) -> None:
        if not normalized(self.answer):
            raise ValueError("the answer is empty")
        if self.metric is TextMetric.ROUGE and not _ROUGE_WORD.search(self.answer):
            raise ValueError(
                "rouge compares words of ASCII letters and digits, and the answer has none; use another metric"
            )


class FreeForm(Task[TextTarget]):
    """Answer the query with a text; reward: format + accuracy, which is graded for ROUGE."""

    name = "free_form"
    target_type = TextTarget
    target_fields = (
        TargetField("answer", TEXT, "the true answer"),
        TargetField("metric", choice_of(TextMetric), "how answers are compared; exact by default", required=False),
    )
    answer_prompt = """\
$query
Reply with the answer alone, in this form:
<answer>your answer</answer>"""
    think_prompt = """\
$query
First reason about what you see inside <think> </think>. Then give the answer alone, in this form:
<think>your reasoning</think>
<answer>your answer</answer>"""

    def check_sample(self, sample: Sample) -> None:
        super().check_sample(sample)
        if self.target_of(sample).metric is TextMetric.ROUGE:
            check_rouge()

    def target_text(self, sample: Sample, numbers: NumberFormat) -> str:
        return f"<answer>{self.target_of(sample).answer}</answer>"

    def reward_parts(self, sample: Sample, completion: str, judged: float | None) -> dict[str, RewardPart]:
        def compute() -> float | None:
            answered = nonempty(last_answer(completion))  # without an answer, the part is 0, judged or not
            return judged if self.needs_judge(sample) else accuracy(answered, self.target_of(sample))

        return {"accuracy": compute_part(compute, "wrong answer")}

    def metrics(self, sample: Sample, output: str) -> SampleMetrics:
        target = self.target_of(sample)
        value, reasons = value_or_default("accuracy", 0.0, lambda: accuracy(read_answer(output), target))
        return SampleMetrics({"accuracy": value}, reasons or reason_if_zero("accuracy", value, "wrong answer"))

    def lenient_metrics(self, sample: Sample, output: str, frame_size: tuple[int, int] | None) -> SampleMetrics | None:
        return self.metrics(sample, with_tagged_answer(output))

    def needs_judge(self, sample: Sample) -> bool:
        return self.target_of(sample).metric is TextMetric.JUDGE

    def reference(self, sample: Sample) -> Reference:
        """Return the true answer, which is the only event of the reference: the recall of an answer is 1 or 0."""
        answer = self.target_of(sample).answer
        return Reference(answer, (answer,))

    def judged_metrics(self, recall: float, precision: float) -> SampleMetrics:
        return SampleMetrics({"accuracy": recall}, reason_if_zero("accuracy", recall, "wrong answer"))


def accuracy(answered: str, target: TextTarget) -> float:
    """Compare an answer with the true one by the target's metric, without a judge.

    Raises:
        UnparsableError: the answer is empty.
    """
    nonempty(answered)
    if target.metric is TextMetric.ROUGE:
        return rouge(answered, target.answer)
    return float(normalized(answered) == normalized(target.answer))


def nonempty(answered: str) -> str:
    """Return an answer. Raises UnparsableError if it consists of white space and punctuation."""
    if not normalized(answered):
        raise UnparsableError("empty answer")
    return answered


def normalized(text: str) -> str:
    """Return a text in lower case, with single spaces and without punctuation at its ends."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).strip(_PUNCTUATION)


@cache  # only success is cached: an error is raised again by the next call
def check_rouge() -> None:
    """Raise UserError if the optional package rouge-score is not installed."""
    if find_spec("rouge_score") is None:
        raise UserError('the metric "rouge" needs the package rouge-score: pip install "megatron_vcr1[rouge]"')


def rouge(answered: str, reference: str) -> float:
    """Return the F1 score of ROUGE-L, in [0, 1]. It compares words of ASCII letters and digits."""
    return float(_rouge_scorer().score(reference, answered)["rougeL"].fmeasure)


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # imports nltk, which takes seconds

    return RougeScorer(["rougeL"])


TASK = FreeForm()
