"""A new prompt in the form that a run was trained with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_vcr1.data.preparation import video_options
from megatron_vcr1.data.templates import load_templates
from megatron_vcr1.errors import UserError
from megatron_vcr1.evaluation.trained_run import TrainedRun, trained_tasks
from megatron_vcr1.tasks import UnknownTaskError, find_task


def trained_message(
    run: TrainedRun,
    query: str,
    media: Sequence[Mapping[str, Any]],
    *,
    task_name: str | None = None,
    options: Sequence[str] = (),
    thinking: bool | None = None,
    values: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Write a query into the prompt template of a run's task; return the user's message.

    Args:
        run: the run.
        query: the event, object, question or instruction.
        media: the parts of the message with its videos and images.
        task_name: the task; None is the only task of the run's training data.
        options: the options of multiple choice.
        thinking: whether to ask for reasoning before the answer; None is as in the training.
        values: values of other placeholders of the template, such as the first box of tracking.

    Raises:
        UserError: task or thinking are not clear from the training, or a placeholder has no value.
    """
    if task_name is None:
        tasks = trained_tasks(run)
        if len(tasks) != 1:
            raise UserError(f"--run {run.path}: it was trained on {', '.join(tasks) or 'no data'}; choose with --task")
        (task_name,) = tasks
    if thinking is None:
        ways = {source.thinking for source in run.config.data.sources}
        if len(ways) != 1:
            raise UserError(f"--run {run.path}: choose --thinking or --no-thinking; it was trained both ways")
        (thinking,) = ways
    try:
        task = find_task(task_name)
    except UnknownTaskError as error:
        raise UserError(f"--task {error}") from None
    templates = load_templates(run.config.data.templates)
    try:
        text = templates.text_of_query(task, query, options, values or {}, thinking=thinking)
    except KeyError as error:
        (name,) = error.args
        how = "--options TEXT ..." if name == "options" else f"--value {name}=..."
        raise UserError(f"the prompt of {task.name} states its {name}: add {how}") from None
    part = {"type": "text", "text": text}
    return {"role": "user", "content": [part, *media] if templates.text_first else [*media, part]}


def trained_video_options(run: TrainedRun) -> dict[str, Any]:
    """Return the options of a video part with which the run's training read its videos."""
    return video_options(run.config.data)
