"""Quality assessment: one of the labels that the query names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_vcr1.rewards.answer_parsing import read_answer
from megatron_vcr1.rewards.lenient import lenient_answer, lenient_label, leniently
from megatron_vcr1.rewards.parsing import last_answer
from megatron_vcr1.rewards.scoring import compute_part
from megatron_vcr1.tasks.base import NumberFormat, Task
from megatron_vcr1.tasks.metrics import SampleMetrics, reason_if_zero, value_or_default
from megatron_vcr1.tasks.row_fields import TEXT, TargetField
from megatron_vcr1.types import RewardPart, Sample, Target


@dataclass(frozen=True, slots=True)
class QualityTarget(Target):
    """The target of quality assessment: one of the labels that the query names."""

    label: str

    def __post_init__(self) -> None:
        if not self.label.strip():
            raise ValueError("the quality label is empty")


class Quality(Task[QualityTarget]):
    """Choose one of the labels that the query names; reward: format + accuracy."""

    name = "quality"
    target_type = QualityTarget
    needs_media = "some"
    target_fields = (TargetField("label", TEXT, "the right label, as the query writes it"),)
    answer_prompt = """\
$query
Reply with the label alone, in this form:
<answer>the label</answer>"""
    think_prompt = """\
$query
First reason about what you see inside <think> </think>. Then give the label, in this form:
<think>your reasoning</think>
<answer>the label</answer>"""

    def target_text(self, sample: Sample, numbers: NumberFormat) -> str:
        return f"<answer>{self.target_of(sample).label}</answer>"

    def reward_parts(self, sample: Sample, completion: str, judged: float | None) -> dict[str, RewardPart]:
        label = self.target_of(sample).label.strip().lower()
        return {"accuracy": compute_part(lambda: float(last_answer(completion).lower() == label), "wrong label")}

    def metrics(self, sample: Sample, output: str) -> SampleMetrics:
        """Compute the accuracy of a VidTAB label, ignoring case."""
        return _accuracy(lambda: read_answer(output).lower(), self.target_of(sample).label.strip().lower())

    def lenient_metrics(self, sample: Sample, output: str, frame_size: tuple[int, int] | None) -> SampleMetrics | None:
        def read() -> str:
            answer = leniently(lambda: read_answer(output), lambda: lenient_answer(output))
            return lenient_label(answer)

        return _accuracy(read, lenient_label(self.target_of(sample).label))


def _accuracy(read: Callable[[], str], label: str) -> SampleMetrics:
    accuracy, reasons = value_or_default("accuracy", 0.0, lambda: float(read() == label))
    return SampleMetrics({"accuracy": accuracy}, reasons or reason_if_zero("accuracy", accuracy, "wrong label"))


TASK = Quality()
