"""Profiles of training steps: a trace of torch's profiler with the phases, and a table of where the time went."""

from __future__ import annotations

import gzip
import json
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from megatron_vcr1 import timeline
from megatron_vcr1.config.training_sections import ProfileSection
from megatron_vcr1.timeline import Span
from megatron_vcr1.training.metrics import PHASES

logger = logging.getLogger(__name__)

TRAINING_PHASES = ("reference", "old_log_probs", "update")
NUM_OPERATORS = 20
_EVENTS_START = '"traceEvents": ['


class StepProfile:
    """Profiles the steps that [profile] names, counted from this start of the run."""

    def __init__(self, section: ProfileSection, folder: Path) -> None:
        self._section = section
        self._is_enabled = section.enabled and dist.get_rank() in section.ranks
        self._folder = folder
        self._num_started_steps = 0
        self._profile = ExitStack()

    def next_step(self) -> None:
        """Tell the profile that a step starts. It begins at first_step and is written after last_step."""
        self._num_started_steps += 1
        if self._is_enabled and self._num_started_steps == self._section.first_step:
            self._profile.enter_context(profiled(self._folder, f"rank_{dist.get_rank()}"))
        if self._num_started_steps == self._section.last_step + 1:
            self.close()

    def close(self) -> None:
        """Write the profile if it is in progress."""
        self._profile.close()
        if self._is_enabled and self._num_started_steps < self._section.first_step:
            logger.warning(
                "no profile: the run ended before profile.first_step = %d of this start", self._section.first_step
            )


@contextmanager
def profiled(folder: Path, name: str) -> Iterator[None]:
    """Profile the with-block, including other threads and decoding workers, into NAME.json.gz and NAME.txt in `folder`.

    The trace opens in https://ui.perfetto.dev and chrome://tracing.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities) as profiler, timeline.recording() as spans:
        start_ns = time.time_ns()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        end_ns = time.time_ns()
    window = [clipped for span in spans if (clipped := _clip(span, start_ns, end_ns)) is not None]
    folder.mkdir(parents=True, exist_ok=True)
    trace = folder / f"{name}.json.gz"
    _write_trace(profiler, window, trace)
    table = "\n\n".join((phase_table(window, (end_ns - start_ns) / 1e9), operator_table(profiler.key_averages())))
    (folder / f"{name}.txt").write_text(table + "\n", encoding="utf-8")
    logger.info("profile: %s\n%s", trace, table)


def phase_table(spans: Sequence[Span], total_s: float) -> str:
    """Format the seconds of every phase of the main thread, and how much of the other tracks overlaps with them.

    Args:
        spans: spans within the profile, of all tracks.
        total_s: length of the profile. Time in no phase is listed as "other".
    """
    main = {
        phase: merge_spans([span for span in spans if span.track == "MainThread" and span.name == phase])
        for phase in PHASES
    }
    seconds = {phase: total_seconds(main[phase]) for phase in PHASES if phase != "total" and main[phase]}
    seconds["other"] = total_s - sum(seconds.values())
    lines = [f"{'phase':<24}{'seconds':>10}{'share':>9}"]
    seconds["total"] = total_s
    lines += [f"{phase:<24}{phase_s:>10.3f}{phase_s / total_s:>9.1%}" for phase, phase_s in seconds.items()]
    tracks = sorted({span.track for span in spans} - {"MainThread"})
    if not tracks:
        return "\n".join(lines)
    training = merge_spans([span for phase in TRAINING_PHASES for span in main[phase]])
    waiting = merge_spans([*main["decode"], *main["rollout"]])
    lines += ["", f"{'in the background':<24}{'seconds':>10}{'during training':>18}{'waited for':>13}"]
    for track in tracks:
        busy = merge_spans([span for span in spans if span.track == track])
        hidden_s = total_seconds(intersect_spans(busy, training))
        waited_s = total_seconds(intersect_spans(busy, waiting))
        fraction = hidden_s / total_seconds(busy)
        lines.append(f"{track:<24}{total_seconds(busy):>10.3f}{hidden_s:>10.3f} ({fraction:>4.0%}){waited_s:>14.3f}")
    return "\n".join(
        [*lines, f"(during training: in the phases {', '.join(TRAINING_PHASES)}; waited for: in decode and rollout)"]
    )


def operator_table(averages: Any) -> str:
    """Format the GPU kernels with the most self time, or the operators if no kernel was recorded.

    On a GPU no kernels are recorded if another program is already profiling it.

    Args:
        averages: `profile.key_averages()`.
    """
    averages = [average for average in averages if not average.is_user_annotation]
    on_gpu = any(average.device_type != DeviceType.CPU for average in averages)
    rows = [
        (
            average.key,
            average.count,
            (average.self_device_time_total if on_gpu else average.self_cpu_time_total) / 1e6,
        )
        for average in averages
        if (average.device_type != DeviceType.CPU) == on_gpu
    ]
    rows.sort(key=lambda row: -row[2])
    total_s = sum(self_s for _, _, self_s in rows)
    rows = [*rows[:NUM_OPERATORS], ("all", sum(count for _, count, _ in rows), total_s)]
    lines = [f"{'kernel' if on_gpu else 'operator (self time)':<60}{'calls':>8}{'seconds':>10}{'share':>9}"]
    lines += [f"{key[:58]:<60}{count:>8}{self_s:>10.3f}{self_s / total_s:>9.1%}" for key, count, self_s in rows]
    return "\n".join(lines)


def merge_spans(spans: Sequence[Span]) -> list[Span]:
    """Return the union of spans, as spans that do not overlap, in the order of time."""
    merged: list[Span] = []
    for span in sorted(spans, key=lambda span: span.start_ns):
        if merged and span.start_ns <= merged[-1].end_ns:
            last = merged.pop()
            span = Span(last.name, last.track, last.start_ns, max(last.end_ns, span.end_ns))
        merged.append(span)
    return merged


def intersect_spans(left: Sequence[Span], right: Sequence[Span]) -> list[Span]:
    """Return the intersection of two sets of spans; neither set may overlap with itself."""
    return [both for span in left for other in right if (both := _clip(span, other.start_ns, other.end_ns)) is not None]


def total_seconds(spans: Sequence[Span]) -> float:
    """Return the total length of spans that do not overlap, in seconds."""
    return sum(span.end_ns - span.start_ns for span in spans) / 1e9


def _clip(span: Span, start_ns: int, end_ns: int) -> Span | None:
    """Return the part of a span that is within a window; None if the two do not overlap."""
    start_ns, end_ns = max(span.start_ns, start_ns), min(span.end_ns, end_ns)
    return Span(span.name, span.track, start_ns, end_ns) if start_ns < end_ns else None


def _write_trace(profiler: profile, spans: Sequence[Span], path: Path) -> None:
    """Write the profiler's trace, with the spans as an additional process that has one track per thread or worker.

    The spans are inserted as text while the file is copied: a step on GPUs has millions of events, too many to parse.
    """
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(plain))
        with plain.open(encoding="utf-8") as source, gzip.open(path, "wt", encoding="utf-8", compresslevel=3) as target:
            base_ns = 0  # time stamps in the trace are relative to this
            for line in source:
                if '"baseTimeNanoseconds":' in line:
                    base_ns = int(line.split(":")[1].strip(" ,\n"))
                target.write(line)
                if line.strip() == _EVENTS_START:
                    target.writelines(json.dumps(event) + ",\n" for event in _trace_events(spans, base_ns))
                    break
            target.writelines(source)


def _trace_events(spans: Sequence[Span], base_ns: int) -> Iterator[dict[str, Any]]:
    process = "phases and background work"
    yield {"ph": "M", "name": "process_sort_index", "pid": process, "tid": 0, "args": {"sort_index": -1}}
    for span in spans:
        yield {
            "ph": "X",
            "cat": "span",
            "name": span.name,
            "pid": process,
            "tid": span.track,
            "ts": (span.start_ns - base_ns) / 1e3,  # microseconds
            "dur": (span.end_ns - span.start_ns) / 1e3,
        }
