"""A video language model of any family on megatron-core, sharded across tensor- and pipeline-parallel ranks."""

from __future__ import annotations

import logging
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlock, get_num_layers_to_build
from torch import Tensor
from vcr1_kernels import linear_log_probs
from vcr1_kernels.ops.flash_attn import flash_attn_is_installed

from megatron_vcr1.config.model_sections import ModelSection, ParallelSection, RecomputeSection
from megatron_vcr1.errors import UserError
from megatron_vcr1.model.activation_offload import offload_layer_inputs
from megatron_vcr1.model.attention import AttentionLayout, CachedAttention, RotaryTables
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.cpu import decode
from megatron_vcr1.model.cpu.skinny_linear import skinny_linear
from megatron_vcr1.model.experts import expert_mlps
from megatron_vcr1.model.kv_cache import KVCache
from megatron_vcr1.model.layer_features import LayerFeatures
from megatron_vcr1.model.layer_specs import LocalBackend, block_spec, choose_backend
from megatron_vcr1.model.mrope import rotary_angles
from megatron_vcr1.model.packed_batch import PackedBatch
from megatron_vcr1.model.sharding import broadcast_weights, mark_replicated_weights, mark_sharded_weights
from megatron_vcr1.model.transformer_config import (
    FP8_RECIPES,
    check_fp8,
    text_transformer_config,
    vision_transformer_config,
)
from megatron_vcr1.model.vision import VisionTower
from megatron_vcr1.model.vision_features import VisionFeatures, with_zero_gradients
from megatron_vcr1.parallel.feature_exchange import FeatureExchange, exchange_features
from megatron_vcr1.parallel.megatron_compat import silence_megatron

logger = logging.getLogger(__name__)

# One checkpoint key per layer, so that keys do not depend on the pipeline layout.
SHARDING_METADATA = {"non_homogeneous_layers": True}


class VideoLanguageModel(MegatronModule):
    """This rank's part of the model. The first stage also has the vision tower, the last stage the head.

    Calling it with a `PackedBatch` returns, on the last stage, the hidden state that predicts each target, [targets,
    hidden_size]; on other stages, the hidden states for the next stage. It does not apply the head: callers fuse the
    head with their loss (`head_weight`, `tensor_group`), or call `log_probs` or `logits`.
    """

    def __init__(
        self,
        config: ModelConfig,
        text_config: TransformerConfig,
        vision_config: TransformerConfig,
        backend: BackendSpecProvider,
    ) -> None:
        super().__init__(config=text_config)
        self.model_config = config
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process = parallel_state.is_pipeline_first_stage()
        self.post_process = parallel_state.is_pipeline_last_stage()
        self.share_embeddings_and_output_weights = config.text.tied_embeddings
        self.vision_tower: VisionTower | None = None
        if self.pre_process:
            self.vision_tower = config.family.build_vision_tower(config.vision, vision_config, backend)
        spec = block_spec(
            backend,
            num_layers=get_num_layers_to_build(text_config),
            causal=True,
            final_norm=True,
            qk_norm=config.text.qk_norm,
            adds_features=config.family.num_feature_layers(config.vision) > 0,
            selects_tokens=self.post_process,
            mlps=expert_mlps(config.text, text_config),
        )
        self.language_model = GPTModel(
            text_config,
            spec,
            vocab_size=config.text.vocab_size,
            max_sequence_length=0,  # used by learned positions only
            pre_process=self.pre_process,
            post_process=self.post_process,
            share_embeddings_and_output_weights=config.text.tied_embeddings,
            position_embedding_type="none",  # PackedSelfAttention applies the rotary positions
            scatter_embedding_sequence_parallel=False,  # `_embed` scatters after it has inserted vision features
        )

    @property
    def tensor_group(self) -> torch.distributed.ProcessGroup | None:
        """The tensor-parallel group, across which the vocabulary is sharded; None if it has one rank."""
        group = parallel_state.get_tensor_model_parallel_group()
        return group if group.size() > 1 else None

    @property
    def token_multiple(self) -> int:
        """The number of tokens of a training batch must be a multiple of this."""
        ranks = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
        return ranks * (1 if self.config.fp8 is None else FP8_RECIPES[self.config.fp8_recipe].token_multiple)

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Receive the previous stage's output; called by megatron-core's schedules."""
        self.language_model.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """Return the tied weight. The first and the last stage have one each; megatron-core sums their gradients."""
        return self.language_model.shared_embedding_or_output_weight()

    def forward(self, batch: PackedBatch, cached: CachedAttention | None = None) -> Tensor:
        """Run this stage.

        Args:
            batch: the tokens to compute.
            cached: in generation, the attention that replaces attention over `batch.layout`.

        Returns:
            [targets, hidden_size] on the last stage. On others [tokens, 1, hidden_size] (of this rank's tokens only,
            under sequence parallelism), followed by the vision features that layers of later stages add.
        """
        # The last layer drops the tokens that predict nothing, right after its attention. In three cases they are
        # dropped after the whole layer instead: under sequence parallelism, because the tokens are sharded across
        # ranks; with FP8, whose matmuls need a number of tokens that is a multiple of `token_multiple`; and on a rank
        # of which no token predicts anything, because TransformerEngine's norms do not accept zero tokens.
        selects = (
            self.post_process
            and not self.config.sequence_parallel
            and self.config.fp8 is None
            and len(batch.predicting_token_indices) > 0
        )
        hidden, features = self._embed(batch) if self.pre_process else self._received(batch)
        text = self.model_config.text
        rope = RotaryTables.from_angles(
            rotary_angles(batch.position_ids, text.mrope_axes, text.rope_theta, text.yarn),
            1.0 if text.yarn is None else text.yarn.attention_factor,
        )
        decoder = self.language_model.decoder
        if isinstance(cached, KVCache) and decode.supports(decoder):
            hidden = decode.run_layers(decoder, hidden[:, 0], rope, cached)[:, None]
        else:
            if features is not None:
                hidden = features.attach(hidden)
                if not self.pre_process:
                    decoder.set_input_tensor(hidden)  # the input of stages after the first
            hidden = decoder(
                hidden_states=hidden,
                attention_mask=None,
                packed_seq_params=AttentionLayout(
                    rope=rope,
                    full=batch.layout,
                    cached=cached,
                    keys=None if batch.context is None else batch.context.keys,
                    features=features,
                    selected=batch.predicting_token_indices if selects else None,
                ),
            )
        if not self.post_process:
            return hidden if features is None else features.append_to(hidden, decoder.layers[-1].layer_number)
        if selects:
            return hidden[:, 0]
        if self.config.sequence_parallel:
            # The head sums its input's gradient over the vocabulary's shards, so each rank receives the full gradient.
            # In backward it is only sliced here, not reduced (tensor_parallel_output_grad=False).
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        return hidden[:, 0].index_select(0, batch.predicting_token_indices)

    def num_input_rows(self, batch: PackedBatch) -> int:
        """Return the length of the first dimension of what a stage after the first receives for a batch.

        It is the number of this rank's tokens, plus the vision features that this stage and later ones add.
        """
        num_tokens, num_layers = self._num_tokens(batch), self._num_feature_layers()
        return num_tokens + (num_layers * len(self._vision_tokens(batch)[1]) if num_layers else 0)

    def _num_tokens(self, batch: PackedBatch) -> int:
        """Return the number of tokens of this rank, which has a part of them under sequence parallelism."""
        ranks = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
        return len(batch.token_ids) // ranks

    def _num_feature_layers(self) -> int:
        """Return the number of layers on this stage and on later ones that add vision features."""
        first_layer = self.language_model.decoder.layers[0].layer_number
        return max(self.model_config.family.num_feature_layers(self.model_config.vision) - first_layer + 1, 0)

    def _vision_tokens(self, batch: PackedBatch) -> tuple[slice, Tensor]:
        """Return the vision tokens that this rank has, among all of the batch, and their indices among its tokens."""
        if not self.config.sequence_parallel:
            return slice(None), batch.vision_token_indices
        num_tokens = self._num_tokens(batch)
        start = num_tokens * parallel_state.get_tensor_model_parallel_rank()
        mine = batch.vision_tokens_in(start, start + num_tokens)
        return mine, batch.vision_token_indices[mine] - start

    def _received(self, batch: PackedBatch) -> tuple[Tensor, LayerFeatures | None]:
        """Return the previous stage's hidden states, and the vision features that came with them."""
        decoder = self.language_model.decoder
        if not self._num_feature_layers():
            return decoder.input_tensor, None
        _, token_indices = self._vision_tokens(batch)
        if not len(token_indices):
            return decoder.input_tensor, None
        first_layer = decoder.layers[0].layer_number
        return LayerFeatures.split_off(decoder.input_tensor, self._num_tokens(batch), token_indices, first_layer)

    def _embed(self, batch: PackedBatch) -> tuple[Tensor, LayerFeatures | None]:
        """Embed the tokens, with vision features in place of the pads.

        Returns:
            [tokens, 1, hidden_size], under sequence parallelism of this rank's tokens; and the vision features that
            layers add, if there are any.
        """
        assert self.vision_tower is not None
        embeddings = self.language_model.embedding(batch.token_ids[None], position_ids=None)
        vision, features = self._vision_features(batch, embeddings), None
        if vision is not None:
            embeddings = embeddings.index_copy(0, batch.vision_token_indices, vision.embeddings[:, None])
            if vision.layers is not None:
                features = self._layer_features(vision.layers, batch)
        elif torch.is_grad_enabled():
            embeddings = with_zero_gradients(embeddings, self.vision_tower.parameters())
        if self.config.sequence_parallel:
            embeddings = tensor_parallel.scatter_to_sequence_parallel_region(embeddings)
        return embeddings, features

    def _layer_features(self, features: Tensor, batch: PackedBatch) -> LayerFeatures:
        """Collect the features [layers, vision tokens, hidden_size] that layers add to this rank's tokens."""
        mine, token_indices = self._vision_tokens(batch)
        if self.config.sequence_parallel:
            # Each rank uses the features of its own tokens; backward sums their gradients over the ranks.
            features = tensor_parallel.copy_to_tensor_model_parallel_region(features)[:, mine]
        return LayerFeatures(features, token_indices, first_layer=1)

    def _vision_features(self, batch: PackedBatch, embeddings: Tensor) -> VisionFeatures | None:
        """Encode the images and videos, together with the other ranks that share the frames.

        Args:
            embeddings: the embedded tokens, for their dtype and hidden size.

        Returns:
            The features of this rank's vision tokens; None if the microbatch has no images and videos.
        """
        assert self.vision_tower is not None
        memo = batch.memo
        if memo is not None and memo.features is not None:
            return memo.features
        if self.vision_tower.is_replicated and torch.is_grad_enabled():
            # `sum_gradients` would count frames that all tensor-parallel ranks encode several times.
            assert batch.frames is not None, "pack the microbatch with pack_for_rank"
        features = self.vision_tower(batch.vision).to(embeddings.dtype) if batch.vision else None
        if batch.frames is not None and batch.frames.exchange.num_features:
            features = self._exchange(features, batch.frames.exchange, embeddings)
        if memo is not None:
            memo.features = features
        return features

    def _exchange(self, features: VisionFeatures | None, plan: FeatureExchange, embeddings: Tensor) -> VisionFeatures:
        """Exchange the features that this rank has encoded, if any, for those of its vision tokens."""
        assert self.vision_tower is not None
        hidden_size = embeddings.shape[-1]
        if features is None:  # this rank encodes nothing, but its backward pass must take part in the exchange
            joined = embeddings.new_empty(0, hidden_size * (1 + self._num_feature_layers()))
            if torch.is_grad_enabled():
                joined = with_zero_gradients(joined, self.vision_tower.parameters())
        else:
            joined = features.join()
        return VisionFeatures.split(exchange_features(joined, plan), hidden_size)

    def head_weight(self) -> Tensor:
        """Return this rank's shard of the language-model head, [vocab_shard, hidden_size]; on the last stage."""
        if self.share_embeddings_and_output_weights:
            weight = self.shared_embedding_or_output_weight()
            assert weight is not None
            return weight
        return self.language_model.output_layer.weight

    def log_probs(self, hidden: Tensor, target_ids: Tensor, *, temperature: float = 1.0) -> Tensor:
        """Compute the log-probability of each target, with the head's logits never stored whole.

        Args:
            hidden: [targets, hidden_size], from `forward` on the last stage.
            target_ids: int64 [targets].
            temperature: divides the logits.

        Returns:
            float32 [targets], the same on every tensor-parallel rank.
        """
        weight = self.head_weight()
        return linear_log_probs(
            hidden,
            weight,
            target_ids,
            temperature=temperature,
            group=self.tensor_group,
            weight_grad=getattr(weight, "main_grad", None),  # accumulate into megatron-core's gradient buffer
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute the logits over the whole vocabulary, for generation and for comparisons, never for a loss.

        Args:
            hidden: [targets, hidden_size], from `forward` on the last stage.

        Returns:
            [targets, vocab_size], gathered from the tensor-parallel ranks.
        """
        if self.tensor_group is not None:
            hidden = tensor_parallel.copy_to_tensor_model_parallel_region(hidden)
        logits = skinny_linear(hidden, self.head_weight())
        return logits if self.tensor_group is None else tensor_parallel.gather_from_tensor_model_parallel_region(logits)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return megatron-core's sharded state dict, with one key per layer.

        TransformerEngine's extra states, which only FP8 uses, are left out.
        """
        state = super().sharded_state_dict(prefix, sharded_offsets, {**(metadata or {}), **SHARDING_METADATA})
        return {key: value for key, value in state.items() if not key.endswith("_extra_state")}


def build_model(
    config: ModelConfig,
    section: ModelSection,
    parallel: ParallelSection,
    recompute: RecomputeSection,
    *,
    initialize_weights: bool = False,
) -> VideoLanguageModel:
    """Build this rank's part of a model. Call it after `parallel.mesh.initialize`.

    Args:
        config: the model's configuration.
        section: dtype, FP8 recipe, layer implementation and frozen parts.
        parallel: the layout.
        recompute: activation recomputation, and whether layer inputs are kept in host memory.
        initialize_weights: fill the parameters with random numbers. Otherwise they are undefined until they are loaded.

    Raises:
        UserError: a setting needs TransformerEngine, which is not installed, or FP8, which the GPU or the model does
            not support.
    """
    silence_megatron()
    backend = choose_backend(section.layer_spec)
    fp8 = section.fp8
    if fp8 is not None:
        if isinstance(backend, LocalBackend):
            raise UserError(f"model.fp8 = '{fp8}' needs TransformerEngine and a GPU; unset model.fp8")
        check_fp8(fp8, config.text, parallel, torch.cuda.get_device_capability(), torch.version.cuda or "")
        logger.info("matmuls of the language model's layers: FP8, %s", fp8)
    logger.info("attention: %s", _attention_name())
    dtype = getattr(torch, section.dtype)
    model = VideoLanguageModel(
        config,
        text_transformer_config(
            config.text, parallel, recompute, dtype=dtype, fp8=fp8, initialize_weights=initialize_weights
        ),
        vision_transformer_config(
            config.vision, parallel, recompute, dtype=dtype, initialize_weights=initialize_weights
        ),
        backend,
    )
    mark_sharded_weights(model)
    if model.vision_tower is not None and model.vision_tower.is_replicated:
        mark_replicated_weights(model.vision_tower)
        if initialize_weights:
            broadcast_weights(model.vision_tower)
    if recompute.offload:
        for module in model.modules():
            if isinstance(module, TransformerBlock):
                offload_layer_inputs(module)
    freeze(model, section.freeze)
    return model


def _attention_name() -> str:
    """Return the name of the implementation that `vcr1_kernels.shared_prefix_attention` uses on this machine."""
    if not torch.cuda.is_available():
        return "torch SDPA (no GPU)"
    return "Triton, and flash-attn where no prefix is shared" if flash_attn_is_installed() else "Triton"


def freeze(model: VideoLanguageModel, parts: tuple[str, ...]) -> None:
    """Freeze parts of the model.

    Args:
        model: this rank's part of the model.
        parts: any of "vision_tower" (patch embedding and layers), "merger" and "language_model".
    """
    if "language_model" in parts:
        model.language_model.requires_grad_(False)
    if model.vision_tower is not None:
        model.vision_tower.freeze(parts)
