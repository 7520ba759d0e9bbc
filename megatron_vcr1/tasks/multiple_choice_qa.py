"""Multiple-choice QA: the letter of the right option."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vcr1.rewards.answer_parsing import read_choice
from megatron_vcr1.rewards.choices import parse_choice
from megatron_vcr1.rewards.parsing import last_answer
from megatron_vcr1.rewards.scoring import compute_part
from megatron_vcr1.tasks.base import NumberFormat, Task
from megatron_vcr1.tasks.metrics import SampleMetrics, choice_accuracy, lenient_choice
from megatron_vcr1.tasks.row_fields import TEXT, TargetField
from megatron_vcr1.types import OPTION_LETTERS, RewardPart, Sample, Target


@dataclass(frozen=True, slots=True)
class ChoiceTarget(Target):
    """The target of multiple-choice QA: the letter of the right option."""

    choice: str


class MultipleChoiceQA(Task[ChoiceTarget]):
    """Choose the option that answers the query; reward: format + accuracy."""

    name = "multiple_choice_qa"
    target_type = ChoiceTarget
    target_fields = (TargetField("choice", TEXT, "the letter of the right option"),)
    answer_prompt = """\
$query
$options
Reply with the letter of the right option, in this form:
<answer>A</answer>"""
    think_prompt = """\
$query
$options
First reason about what you see inside <think> </think>. Then give the letter of the right option, in this form:
<think>your reasoning</think>
<answer>A</answer>"""
    has_options = True

    def check_sample(self, sample: Sample) -> None:
        super().check_sample(sample)
        check_choice(self.target_of(sample).choice, sample)

    def target_text(self, sample: Sample, numbers: NumberFormat) -> str:
        return f"<answer>{self.target_of(sample).choice}</answer>"

    def reward_parts(self, sample: Sample, completion: str, judged: float | None) -> dict[str, RewardPart]:
        return {"accuracy": choice_part(sample, completion, self.target_of(sample).choice)}

    def metrics(self, sample: Sample, output: str) -> SampleMetrics:
        target = self.target_of(sample).choice
        accuracy, reasons = choice_accuracy(lambda: read_choice(output, sample.options), target)
        return SampleMetrics({"accuracy": accuracy}, reasons)

    def lenient_metrics(self, sample: Sample, output: str, frame_size: tuple[int, int] | None) -> SampleMetrics | None:
        accuracy, reasons = choice_accuracy(lambda: lenient_choice(sample, output), self.target_of(sample).choice)
        return SampleMetrics({"accuracy": accuracy}, reasons)


def check_choice(choice: str, sample: Sample) -> None:
    """Raise ValueError if a choice is not the letter of one of the sample's options."""
    letters = OPTION_LETTERS[: len(sample.options)]
    if len(choice) != 1 or choice not in letters:
        raise ValueError(f"choice {choice!r} is not one of the options' letters {letters}")


def choice_part(sample: Sample, completion: str, choice: str) -> RewardPart:
    """Return the accuracy of the chosen option, as a part of the reward."""

    def accuracy() -> float:
        return float(parse_choice(last_answer(completion), sample.options) == choice)

    return compute_part(accuracy, "wrong option")


TASK = MultipleChoiceQA()
