"""The tasks: one file for each, with its targets, manifest keys, prompts, SFT target text, reward and metrics.

`base` is the interface. Nothing outside of this package distinguishes between tasks.
"""

from megatron_vcr1.tasks.base import NumberFormat, Reference, Task, lettered_options
from megatron_vcr1.tasks.captioning import CaptionTarget
from megatron_vcr1.tasks.free_form import TextMetric, TextTarget
from megatron_vcr1.tasks.grounded_qa import GroundedChoiceTarget
from megatron_vcr1.tasks.metrics import SampleMetrics, with_lenient
from megatron_vcr1.tasks.multiple_choice_qa import ChoiceTarget
from megatron_vcr1.tasks.numeric import NumberMetric, NumberTarget
from megatron_vcr1.tasks.quality import QualityTarget
from megatron_vcr1.tasks.registry import BUILT_IN_TASKS, UnknownTaskError, find_task, load_tasks, task_names, task_of
from megatron_vcr1.tasks.temporal_grounding import GroundingTarget
from megatron_vcr1.tasks.tracking import TrackingTarget
from megatron_vcr1.types import Target

__all__ = [
    "BUILT_IN_TASKS",
    "CaptionTarget",
    "ChoiceTarget",
    "GroundedChoiceTarget",
    "GroundingTarget",
    "NumberFormat",
    "NumberMetric",
    "NumberTarget",
    "QualityTarget",
    "Reference",
    "SampleMetrics",
    "Target",
    "Task",
    "TextMetric",
    "TextTarget",
    "TrackingTarget",
    "UnknownTaskError",
    "find_task",
    "lettered_options",
    "load_tasks",
    "task_names",
    "task_of",
    "with_lenient",
]
