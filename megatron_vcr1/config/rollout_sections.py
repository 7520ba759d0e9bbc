"""Settings of rollouts, of the judge and of evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from megatron_vcr1.config.section import Names, Section, Texts


class RolloutSection(Section):
    """What samples responses, and how."""

    engine: Literal["local", "sglang"] = Field(
        default="local", description="'local' (the trained model itself, in this process) or 'sglang' (servers)."
    )
    max_new_tokens: int = Field(default=1024, ge=1, description="Longest response; a longer one is cut and marked.")
    temperature: float = Field(default=1.0, gt=0, description="Of sampling in training.")
    top_p: float = Field(default=1.0, gt=0, le=1, description="Smallest set of tokens with this probability.")
    top_k: int = Field(default=0, ge=0, description="Most probable tokens to sample from; 0: all.")
    stop: Texts = Field(default=(), description="Texts that end a response, besides the model's own end.")
    max_batch_responses: int = Field(
        default=256, ge=1, description="Responses that the local engine decodes at a time on a copy of the model."
    )


class SglangSection(Section):
    """SGLang servers: started by the run, or given by URL."""

    urls: Names[str] = Field(
        default=(),
        description="Servers that run already (`vcr1 rollout serve` starts them). Empty: the run starts its own.",
    )
    num_servers: int = Field(default=1, ge=1, description="Servers that a node starts.")
    tensor: int = Field(default=1, ge=1, description="GPUs of one server.")
    port: int = Field(default=30000, ge=1024, le=65000, description="Of the first server; the others count up.")
    python: Path | None = Field(
        default=None, description="The interpreter that sglang is installed for. Unset: the one that runs this."
    )
    server_args: Texts = Field(default=(), description="More arguments of the server.")
    memory_fraction: float = Field(
        default=0.85,
        gt=0,
        lt=1,
        description="Weights and KV cache, as a share of the GPU memory that is free when a server starts. Colocated "
        "training makes the optimizer's state later, in its first step: leave room.",
    )
    colocated: bool = Field(
        default=True, description="Servers share the training's GPUs and release their memory while it computes."
    )
    sync: Literal["distributed", "tensor", "disk"] = Field(
        default="distributed",
        description="How new weights reach the servers: 'distributed' (broadcast; to colocated servers on GPUs it is "
        "'tensor'), 'tensor' (shared memory of one host) or 'disk'.",
    )
    sync_bucket_mb: int = Field(default=512, ge=1, description="Weights sent at a time.")
    transport: Literal["inline", "file"] = Field(
        default="inline", description="Video frames travel in the request, or through shared memory of one host."
    )
    concurrency: int = Field(default=64, ge=1, description="Requests under way at once on a server.")
    timeout_s: float = Field(default=600.0, gt=0, description="Longest wait for one answer.")
    startup_timeout_s: float = Field(default=600.0, gt=0, description="Longest wait for a server to be healthy.")
    max_restarts: int = Field(default=3, ge=0, description="Restarts of a server that dies before the run stops.")


class JudgeSection(Section):
    """Who reads captions for the event recall reward."""

    kind: Literal["lexical", "openai"] = Field(
        default="lexical",
        description="'lexical' (embedded word matching, for demonstrations) or 'openai' (any compatible endpoint).",
    )
    base_url: str = Field(default="http://127.0.0.1:8000/v1", description="The endpoint.")
    model: str = Field(default="Qwen/Qwen2.5-72B-Instruct", description="The judge's name at the endpoint.")
    api_key_env: str = Field(default="OPENAI_API_KEY", description="Environment variable that holds the key.")
    concurrency: int = Field(default=32, ge=1, description="Requests under way at once.")
    timeout_s: float = Field(default=60.0, gt=0, description="Longest wait for one answer.")
    max_retries: int = Field(default=4, ge=0, description="Further tries of a request, with growing pauses.")
    cache: Path | None = Field(default=None, description="Folder of answers. Unset: judge_cache in the run's folder.")
    max_unscored_fraction: float = Field(
        default=0.2, ge=0, le=1, description="Share of a step's captions without a verdict above which the run stops."
    )


class BenchmarkSource(Section):
    """One benchmark to evaluate on."""

    name: str = Field(description="A benchmark (`vcr1 evaluate --help` lists them).", examples=["charades_sta"])
    manifest: Path = Field(description="Its samples (`vcr1 data import` makes them).", examples=["data/test.jsonl"])
    label: str | None = Field(default=None, description="Name in reports and folder of the results. Unset: the name.")
    thinking: bool = Field(default=True, description="Ask for reasoning before the answer.")
    max_samples: int | None = Field(default=None, ge=1, description="Evaluate the first so many only.")


class EvaluateSection(Section):
    """`vcr1 evaluate CONFIG.toml`; results go to train.run_dir/evaluation."""

    benchmarks: tuple[BenchmarkSource, ...] = Field(
        default=(), description="One table [[evaluate.benchmarks]] a benchmark."
    )
    max_new_tokens: int = Field(default=1024, ge=1, description="Longest answer.")
    prompts_per_batch: int = Field(default=32, ge=1, description="Samples that a copy of the model answers at a time.")
