"""Builds the rollout engine that the settings select, and prepares the process for it."""

from __future__ import annotations

import os
from functools import partial

from megatron_vcr1.config.rollout_sections import RolloutSection, SglangSection
from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.data.processor import PromptProcessor
from megatron_vcr1.model.video_language_model import VideoLanguageModel
from megatron_vcr1.rollout.engine import RolloutEngine
from megatron_vcr1.rollout.local.engine import LocalEngine
from megatron_vcr1.rollout.placement import Placement
from megatron_vcr1.rollout.special_tokens import SpecialTokens


def build_engine(
    config: RunConfig, model: VideoLanguageModel, processor: PromptProcessor, tokens: SpecialTokens
) -> RolloutEngine:
    """Build the engine that `rollout.engine` selects. Every rank calls it, after the model's weights are loaded.

    Args:
        config: all settings.
        model: this rank's shard of the policy.
        processor: the model's tokenizer.
        tokens: end tokens, and tokens that are never sampled.

    Raises:
        UserError: a setting of the servers cannot work.
        EngineError: a server does not start or does not answer.
    """
    if config.rollout.engine == "sglang":
        from megatron_vcr1.rollout.sglang.engine import SglangEngine

        return SglangEngine.start(
            config.sglang,
            config.model,
            model.model_config,
            tokens,
            run_dir=config.train.run_dir,
            seed=config.train.seed,
            weights_change_while_sampling=config.grpo.one_step_off,
        )
    return build_local_engine(config.rollout, model, processor, tokens)


def build_local_engine(
    rollout: RolloutSection, model: VideoLanguageModel, processor: PromptProcessor, tokens: SpecialTokens
) -> LocalEngine:
    """Build the in-process engine; the arguments are those of `build_engine`."""
    decode = partial(processor.decode, skip_special_tokens=False)
    return LocalEngine(model, tokens, decode, max_batch_responses=rollout.max_batch_responses)


def disable_nccl_cumem(rollout: RolloutSection, sglang: SglangSection) -> None:
    """Set NCCL_CUMEM_ENABLE=0 in this process if weights may reach SGLang servers by an NCCL broadcast.

    SGLang disables NCCL's cuMem allocations (CUDA virtual memory management) in its servers. A broadcast between
    processes with different values of this variable hangs or crashes. NCCL reads the variable when it creates its first
    communicator, so call this once at start-up, before torch.distributed is initialized. A value that the user has set
    is kept.
    """
    if rollout.engine == "sglang" and Placement.from_section(sglang).may_broadcast_weights:
        os.environ.setdefault("NCCL_CUMEM_ENABLE", "0")
