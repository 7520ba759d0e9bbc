"""Sections [rollout] and [sglang]: how responses are sampled, and the SGLang servers."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from megatron_vcr1.config.section import Names, Section, Texts


class RolloutSection(Section):
    """The engine that samples responses, and its sampling parameters."""

    engine: Literal["local", "sglang"] = Field(
        default="local",
        description="Rollout engine: 'local' (the trained model itself, in the training process) or 'sglang' (SGLang "
        "servers). Use 'sglang' on GPUs, where it is faster.",
    )
    max_new_tokens: int = Field(
        default=1024,
        ge=1,
        description="Maximum length of a response; a longer one is truncated and marked. Raise it if "
        "truncated_fraction is high.",
    )
    temperature: float = Field(
        default=1.0,
        gt=0,
        description="Sampling temperature in training; log-probs are computed at the same temperature. Lower it only "
        "if most responses are unusable: groups then differ less.",
    )
    top_p: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Nucleus sampling: sample from the smallest set of most probable tokens whose total probability "
        "reaches this value. 1: from all tokens. Leave it at 1 in training: the loss assumes that responses are "
        "sampled from all tokens.",
    )
    top_k: int = Field(
        default=0,
        ge=0,
        description="Sample from the k most probable tokens; 0: from all tokens. Leave it at 0 in training: the loss "
        "assumes that responses are sampled from all tokens.",
    )
    stop: Texts = Field(
        default=(),
        description="Strings that end a response, in addition to the model's own end tokens. Set it for a model that "
        "does not end its responses itself.",
    )
    max_batch_responses: int = Field(
        default=256,
        ge=1,
        description="Number of responses that one replica decodes at once in the in-process engine. Lower it if the KV "
        "cache runs out of memory.",
    )


class SglangSection(Section):
    """SGLang servers that the run starts, or running servers that it connects to."""

    urls: Names[str] = Field(
        default=(),
        description="URLs of running servers (`vcr1 rollout serve` starts them). Empty: the run starts its own.",
    )
    num_servers: int = Field(
        default=1,
        ge=1,
        description="Number of servers per node. Colocated servers usually cover the node: num_servers * tensor GPUs.",
    )
    tensor: int = Field(
        default=1,
        ge=1,
        description="Tensor-parallel size (number of GPUs) of one server. Raise it until the model and its KV cache "
        "fit.",
    )
    port: int = Field(
        default=30000,
        ge=1024,
        le=65000,
        description="Port of the first server of a node; its other servers use the next ports. Change it if other "
        "programs of the node use these ports.",
    )
    python: Path | None = Field(
        default=None,
        description="Python interpreter of the environment in which sglang is installed. Unset: this process's "
        "interpreter. Set it if training needs another torch than SGLang.",
    )
    server_args: Texts = Field(default=(), description="Additional command-line arguments for sglang.launch_server.")
    memory_fraction: float = Field(
        default=0.85,
        gt=0,
        lt=1,
        description="Fraction of the GPU memory that is free when a server starts, to be used by the server for "
        "weights and KV cache. Colocated training allocates the optimizer state later, in its first step: leave room "
        "for it (`vcr1 config --check FILE --ranks N` compares). Raise it if the KV cache cannot hold all requests.",
    )
    colocated: bool = Field(
        default=True,
        description="Servers share the GPUs with training and release their memory while training computes. False: "
        "servers have GPUs of their own. Separate servers are needed for grpo.one_step_off.",
    )
    weight_sync: Literal["broadcast", "tensor", "disk"] = Field(
        default="broadcast",
        description="How weights reach the servers: 'broadcast' (NCCL or gloo; colocated servers on GPUs read the GPU "
        "memory of training instead), 'tensor' (shared memory of one host) or 'disk' (a Hugging Face directory). Use "
        "'tensor' if servers cannot open the GPU memory of training, and 'disk' if nothing else works.",
    )
    weight_sync_bucket_mb: int = Field(
        default=512,
        ge=1,
        description="Size of the buckets in which weights are sent, in MiB. Raise it if time/sync_s is large; lower it "
        "if the sync runs out of memory.",
    )
    transport: Literal["inline", "file"] = Field(
        default="inline",
        description="How video frames reach the servers: 'inline' (inside the request) or 'file' (shared memory of one "
        "host). Use 'file' for large videos if servers and training share a host.",
    )
    concurrency: int = Field(
        default=64,
        ge=1,
        description="Maximum number of concurrent requests per server. Lower it if servers run out of memory, raise it "
        "if they are not busy.",
    )
    request_timeout_s: float = Field(
        default=600.0,
        gt=0,
        description="Maximum time for one request to a server, in generation and in weight sync. Raise it for very "
        "long responses.",
    )
    startup_timeout_s: float = Field(
        default=600.0,
        gt=0,
        description="Maximum time from the start of a server until it is ready. Raise it for large models on a slow "
        "file system.",
    )
    max_restarts: int = Field(
        default=3,
        ge=0,
        description="Number of times that a failed server is restarted before the run stops. Raise it for long runs.",
    )
