"""Captioning: a description of the video, which a judge compares with a reference event by event."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vcr1.rewards.parsing import parse_caption
from megatron_vcr1.rewards.scoring import compute_part
from megatron_vcr1.tasks.base import NumberFormat, Reference, Task
from megatron_vcr1.tasks.metrics import SampleMetrics, reason_if_zero
from megatron_vcr1.tasks.row_fields import TEXT, TargetField, list_of
from megatron_vcr1.types import RewardPart, Sample, Target


@dataclass(frozen=True, slots=True)
class CaptionTarget(Target):
    """The target of captioning: a reference caption and, if annotated, its atomic events."""

    caption: str
    events: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.caption.strip():
            raise ValueError("the reference caption is empty")


class Captioning(Task[CaptionTarget]):
    """Describe the video; reward: format + the fraction of the reference's events that a judge finds in the caption."""

    name = "captioning"
    target_type = CaptionTarget
    needs_media = "some"
    target_fields = (
        TargetField("caption", TEXT, "a reference caption"),
        TargetField("events", list_of(TEXT), "its atomic events; the judge extracts missing ones", required=False),
    )
    answer_prompt = """\
Describe this video in detail: who and what is in it, and everything that happens, in order.
Reply with the description alone, in this form:
<answer>your description</answer>"""
    think_prompt = """\
Describe this video in detail: who and what is in it, and everything that happens, in order.
First go through the video inside <think> </think>. Then give the description, in this form:
<think>your reasoning</think>
<answer>your description</answer>"""
    needs_query = False

    def target_text(self, sample: Sample, numbers: NumberFormat) -> str:
        return f"<answer>{self.target_of(sample).caption}</answer>"

    def reward_parts(self, sample: Sample, completion: str, judged: float | None) -> dict[str, RewardPart]:
        def recall() -> float | None:
            parse_caption(completion)  # raises without a caption: such a completion scores 0, judged or not
            return judged

        return {"recall": compute_part(recall, "no event entailed")}

    def needs_judge(self, sample: Sample) -> bool:
        return True

    def reference(self, sample: Sample) -> Reference:
        target = self.target_of(sample)
        return Reference(target.caption, target.events)

    def judged_metrics(self, recall: float, precision: float) -> SampleMetrics:
        """Return AutoDQ's recall and precision of a caption. Their F1 is computed from the means, in `summary`."""
        values = {"recall": recall, "precision": precision}
        return SampleMetrics(values, reason_if_zero("recall", recall, "no event entailed"))


TASK = Captioning()
