"""The interface of a model family: everything in which families differ.

A family is a stateless object that `ModelConfig.family` refers to. Training, rollout, checkpoints, evaluation and
throughput use this interface, and the facts in `ModelConfig`; only the modules of a family name it.

Trap: decoding processes have a `ModelConfig`, and must not spend a second and 100 MB on importing megatron-core. So a
family imports its vision tower in `build_vision_tower`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from megatron_vcr1.data.media_rules import MediaRules
from megatron_vcr1.json_fields import Fields

if TYPE_CHECKING:
    from megatron.core.models.backends import BackendSpecProvider
    from megatron.core.transformer import TransformerConfig

    from megatron_vcr1.model.config import ModelConfig, VisionConfig
    from megatron_vcr1.model.hf_layout import TensorLayout
    from megatron_vcr1.model.vision import VisionTower

Grid = tuple[int, int, int]  # patches in time, height, width


class Family(ABC):
    """A model family. Implementations are frozen dataclasses without fields, so equal families compare equal.

    Attributes:
        model_type: the "model_type" in config.json.
        title: the published name, for messages.
        media: what the family expects of images and videos.
    """

    model_type: ClassVar[str]
    title: ClassVar[str]
    media: ClassVar[MediaRules]

    @abstractmethod
    def read_config(self, raw: Fields) -> ModelConfig:
        """Read a config.json whose model_type is this family's.

        Raises:
            UserError: a key is missing or has a value that is not supported; the message names the key.
        """

    @abstractmethod
    def tensor_layouts(self, config: ModelConfig) -> Iterator[TensorLayout]:
        """Yield every tensor of the model, with its Hugging Face names and shapes, in the order of the forward pass."""

    @abstractmethod
    def vision_blocks(self, vision: VisionConfig, grid: Grid, seconds_per_grid: float | None) -> list[Tensor]:
        """Compute the positions of an image's or video's tokens.

        Args:
            vision: the vision tower's configuration.
            grid: patches in time, height, width.
            seconds_per_grid: seconds of video between two temporal patches; None for an image.

        Returns:
            One int64 [3, tokens] for each run of pads in the prompt: time, height and width of its tokens, relative to
            the position where the run starts.
        """

    @abstractmethod
    def build_vision_tower(
        self, vision: VisionConfig, config: TransformerConfig, backend: BackendSpecProvider
    ) -> VisionTower:
        """Build this rank's shard of the vision tower, with its mergers.

        Args:
            vision: the vision tower's configuration.
            config: the same for megatron-core, from `transformer_config.vision_transformer_config`.
            backend: provides the linear layers and norms.
        """

    def vision_pairs(self, vision: VisionConfig, grid: Grid) -> int:
        """Count the pairs of query and key patches of an image or video, summed over all layers of the vision tower.

        The default is attention within each temporal step, in every layer.
        """
        num_steps, height, width = grid
        return vision.num_layers * num_steps * (height * width) ** 2

    def num_feature_layers(self, vision: VisionConfig) -> int:
        """Return how many language layers, from the first on, add vision features to their output (DeepStack).

        The vision tower has a patch merger for each of them, besides the one that replaces the pads' embeddings.
        """
        return 0
