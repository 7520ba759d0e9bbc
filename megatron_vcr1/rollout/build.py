"""The engine that the settings ask for."""

from __future__ import annotations

import os
from functools import partial

from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.data.processor import PromptProcessor
from megatron_vcr1.model.qwen_vl import QwenVLModel
from megatron_vcr1.rollout.engine import RolloutEngine
from megatron_vcr1.rollout.local.engine import LocalEngine
from megatron_vcr1.rollout.special_tokens import SpecialTokens


def build_engine(config: RunConfig, model: QwenVLModel, processor: PromptProcessor) -> RolloutEngine:
    """Every rank calls it, once the model's weights are loaded.

    Args:
        config: `rollout.engine` decides; `model.path` names the end tokens.
        model: this rank's share of the policy.

    Raises:
        UserError: no end token is known, or a setting of the servers cannot work.
        EngineError: a server does not start or does not answer.
    """
    tokens = SpecialTokens.from_pretrained(config.model.path, processor)
    if config.rollout.engine == "sglang":
        from megatron_vcr1.rollout.sglang.engine import SglangEngine

        return SglangEngine.start(config, model.model_config, tokens)
    decode = partial(processor.decode, skip_special_tokens=False)
    return LocalEngine(model, tokens, decode, max_batch_responses=config.rollout.max_batch_responses)


def disable_nccl_cumem(config: RunConfig) -> None:
    """Before the world is made, where NCCL brings weights to servers: its memory is of one kind on both sides.

    SGLang turns CUDA's virtual memory off for NCCL. A broadcast between processes of both kinds hangs or crashes.
    """
    section = config.sglang
    lends_memory = section.colocated and not section.urls  # shared memory brings these their weights
    if config.rollout.engine == "sglang" and section.weight_sync == "broadcast" and not lends_memory:
        os.environ.setdefault("NCCL_CUMEM_ENABLE", "0")
