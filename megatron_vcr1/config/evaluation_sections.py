"""Sections [judge], [evaluate] and [validation]: how captions are judged, and which benchmarks are evaluated."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from megatron_vcr1.config.section import Section, with_default_thinking


class JudgeSection(Section):
    """The judge of captions, which decides for the event-recall reward and metric which events a caption describes."""

    kind: Literal["lexical", "openai"] = Field(
        default="lexical",
        description="Type of judge: 'lexical' (built-in word matching, for demonstrations) or 'openai' (a language "
        "model behind any OpenAI-compatible API).",
    )
    base_url: str = Field(
        default="http://127.0.0.1:8000/v1", description="URL of the OpenAI-compatible API, up to and including /v1."
    )
    model: str = Field(default="Qwen/Qwen2.5-72B-Instruct", description="Name of the judge's model at the API.")
    api_key_env: str = Field(
        default="OPENAI_API_KEY",
        description="Name of the environment variable that holds the API key. A server without keys needs none. Change "
        "it if the key is in another variable.",
    )
    concurrency: int = Field(
        default=32,
        ge=1,
        description="Maximum number of requests to the judge that are in flight at once. Raise it to the number of "
        "requests that the server processes at once.",
    )
    timeout_s: float = Field(
        default=60.0, gt=0, description="Maximum time to wait for one reply, in seconds. Raise it for a slow model."
    )
    max_retries: int = Field(
        default=4,
        ge=0,
        description="Number of retries after a failed request (with growing pauses) or an unusable reply. Raise it for "
        "an endpoint that is often busy.",
    )
    send_temperature: bool = Field(
        default=True,
        description="Whether requests name a temperature: 0, and 0.7 for the retry after an unusable reply. Set it to "
        "false for models that accept only their default temperature.",
    )
    cache: Path | None = Field(
        default=None,
        description="Folder in which the judge's replies are cached. Unset: the folder judge_cache in the run "
        "directory. Set it to share replies between runs.",
    )
    max_unscored_fraction: float = Field(
        default=0.2,
        ge=0,
        le=1,
        description="Maximum fraction of captions that may be left without a verdict, in a training step or a "
        "benchmark, because requests to the judge failed. Above it training stops, and `vcr1 evaluate` exits with code "
        "1. Raise it if the endpoint often fails and lost rewards are acceptable.",
    )


class BenchmarkSource(Section):
    """A benchmark to evaluate, and its samples."""

    name: str = Field(
        description="Name of the benchmark; `vcr1 evaluate --help` lists them.", examples=["charades_sta"]
    )
    manifest: Path = Field(
        description="Path of the manifest with the benchmark's samples; `vcr1 data import` writes one.",
        examples=["data/test.jsonl"],
    )
    label: str | None = Field(
        default=None,
        description="Name of this benchmark in reports, and of its folder of results; needed to evaluate one "
        "benchmark twice. Unset: the name of the benchmark.",
    )
    thinking: bool = Field(
        default=True,
        description="Whether the prompts of this benchmark ask for reasoning inside <think> before the answer. Left "
        "out: evaluate.thinking or validation.thinking decides.",
    )
    prompt: str | None = Field(
        default=None,
        description="Name of the task whose prompt is used, for example 'grounded_qa' to ask multiple-choice questions "
        "for time spans (glue) too. Unset: the prompt of the benchmark's own task.",
    )
    max_samples: int | None = Field(
        default=None,
        ge=1,
        description="Number of samples to evaluate, from the start of the manifest. Unset: all samples. Set it for a "
        "quick validation.",
    )


class EvaluateSection(Section):
    """Evaluation with `vcr1 evaluate CONFIG.toml`. Results are written to the folder evaluation in train.run_dir."""

    thinking: bool = Field(
        default=True,
        description="Whether prompts ask for reasoning inside <think> before the answer. A benchmark can set its own. "
        "Set it as the model was trained.",
    )
    benchmarks: tuple[BenchmarkSource, ...] = Field(
        default=(), description="Benchmarks to evaluate: one table [[evaluate.benchmarks]] per benchmark."
    )
    max_new_tokens: int = Field(
        default=1024,
        ge=1,
        description="Maximum length of a response in tokens; longer responses are cut off. Raise it if many responses "
        "are truncated.",
    )
    prompts_per_batch: int = Field(
        default=32,
        ge=1,
        description="Number of samples per data-parallel replica that are generated at once. Lower it if memory is "
        "short.",
    )

    @field_validator("benchmarks")
    @classmethod
    def _inherit_thinking(
        cls, benchmarks: tuple[BenchmarkSource, ...], info: ValidationInfo
    ) -> tuple[BenchmarkSource, ...]:
        return with_default_thinking(benchmarks, info)


class ValidationSection(Section):
    """Validation: benchmarks that are evaluated during training, by the run's own engine with greedy decoding."""

    thinking: bool = Field(
        default=True,
        description="Whether prompts ask for reasoning inside <think> before the answer. A benchmark can set its own. "
        "Set it as the sources of the training.",
    )
    benchmarks: tuple[BenchmarkSource, ...] = Field(
        default=(),
        description="Benchmarks to evaluate during training: one table [[validation.benchmarks]] per benchmark. Empty: "
        "no validation.",
    )
    every_steps: int = Field(
        default=50,
        ge=1,
        description="Number of training steps between validations. The initial model (step 0) and the last step are "
        "always validated. Raise it if time/validation_s is a large part of the run.",
    )
    max_new_tokens: int = Field(
        default=1024,
        ge=1,
        description="Maximum length of a response in tokens; longer responses are cut off. Raise it if many responses "
        "are truncated.",
    )
    prompts_per_batch: int = Field(
        default=32,
        ge=1,
        description="Number of samples per data-parallel replica that are generated at once. Lower it if memory is "
        "short.",
    )
    patience: int | None = Field(
        default=None,
        ge=1,
        description="Early stopping: end the run after this number of validations in a row that did not improve "
        "checkpoint.keep_best. Unset: no early stopping.",
    )
    num_shown_samples: int = Field(
        default=4,
        ge=0,
        description="Number of samples of each benchmark whose frames and responses are sent to TensorBoard and "
        "Weights & Biases. Set it to 0 to send none.",
    )

    @field_validator("benchmarks")
    @classmethod
    def _inherit_thinking(
        cls, benchmarks: tuple[BenchmarkSource, ...], info: ValidationInfo
    ) -> tuple[BenchmarkSource, ...]:
        return with_default_thinking(benchmarks, info)
