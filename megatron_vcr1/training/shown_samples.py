"""Validation samples for people: a strip of the frames that the model sees, with the prompt and the response."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_vcr1.data.prompts import PreparedSample
from megatron_vcr1.data.templates import PromptTemplates, build_messages
from megatron_vcr1.evaluation.benchmark_result import BenchmarkResult

NUM_FRAMES = 4
MAX_HEIGHT = 160  # pixels of a strip
COLUMNS = ("id", "prompt", "response", "metrics")


@dataclass(frozen=True, slots=True)
class ShownSample:
    """A validation sample with its response.

    Attributes:
        label: the benchmark's label.
        metrics: the sample's metrics as text.
        frames: a few frames side by side, uint8 [height, width, 3]; None for a prompt of text alone.
    """

    label: str
    id: str
    prompt: str
    response: str
    metrics: str
    frames: NDArray[np.uint8] | None

    @property
    def texts(self) -> tuple[str, str, str, str]:
        """The cells of its row in a table, without the frames: see `COLUMNS`."""
        return self.id, self.prompt, self.response, self.metrics


@dataclass(slots=True)
class SampleCollector:
    """Keeps the frames of a benchmark's first samples while they are on their way to the engine."""

    num_samples: int
    strips: dict[str, NDArray[np.uint8] | None] = field(default_factory=dict)

    def add(self, item: PreparedSample) -> None:
        """Keep a sample's frames if fewer than `num_samples` are kept so far."""
        if len(self.strips) < self.num_samples:
            self.strips[item.sample.id] = film_strip(item)

    def shown(
        self, label: str, result: BenchmarkResult, templates: PromptTemplates, *, thinking: bool
    ) -> list[ShownSample]:
        """Return the kept samples with the responses of a result."""
        found = []
        for sample, prediction, metrics in zip(result.samples, result.predictions, result.sample_metrics, strict=True):
            if sample.id in self.strips:
                messages = build_messages(sample, templates, thinking=thinking)
                parts = [part for message in messages for part in message["content"] if part["type"] == "text"]
                values = ", ".join(f"{name} {value:.3g}" for name, value in metrics.values.items())
                prompt = "\n".join(part["text"] for part in parts)
                frames = self.strips[sample.id]
                found.append(ShownSample(label, sample.id, prompt, prediction.output or "", values, frames))
        return found


def film_strip(item: PreparedSample) -> NDArray[np.uint8] | None:
    """Return a few evenly spaced frames of a prompt's first video or image side by side; None without any."""
    if not item.prompt.vision:
        return None
    frames = item.prompt.vision[0].frames  # uint8 [num_frames, height, width, 3]
    picked = np.unique(np.linspace(0, len(frames) - 1, NUM_FRAMES).round().astype(int))
    stride = -(-frames.shape[1] // MAX_HEIGHT)
    small = frames[torch.from_numpy(picked)][:, ::stride, ::stride].cpu().numpy()
    return np.concatenate(list(small), axis=1)
