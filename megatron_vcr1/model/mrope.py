"""mRoPE: rotary positions of tokens over three axes, time, height and width.

The positions are those that the published models were trained with. Text advances all three axes together. A vision
block starts at the next free position; its family decides how its time axis advances (`Family.vision_blocks`). The text
after it starts at **one past the largest position so far**, on any axis. transformers 5 advances by the block's height
and width only, so its positions overlap for long videos; pass our positions to it as ``position_ids`` when comparing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_vcr1.data.encoding import EncodedPrompt
from megatron_vcr1.errors import UserError
from megatron_vcr1.model.config import ModelConfig, Yarn


def vision_positions(
    grid_thw: tuple[int, int, int], seconds_per_grid: float | None, *, merge_size: int, tokens_per_second: int | None
) -> Tensor:
    """Compute the positions of one image's or video's tokens, relative to the start of the vision block.

    Args:
        grid_thw: number of patches in time, height and width.
        seconds_per_grid: seconds of video between two temporal patches; None for an image.
        merge_size: each square of merge_size x merge_size patches becomes one token.
        tokens_per_second: time positions per second of video; None for one position per temporal patch.

    Returns:
        int64 [3, tokens]: time, height and width of each token; time varies slowest.
    """
    num_steps, height, width = grid_thw
    steps = torch.arange(num_steps)
    if tokens_per_second is not None and seconds_per_grid is not None:
        # In float32, multiplied in this order and then truncated, as in the models' training.
        steps = (steps * seconds_per_grid * tokens_per_second).long()
    # Time varies slowest and width fastest, in the order of the vision features.
    axes = torch.meshgrid(steps, torch.arange(height // merge_size), torch.arange(width // merge_size), indexing="ij")
    return torch.stack(axes).flatten(1)


def prompt_positions(config: ModelConfig, prompt: EncodedPrompt) -> Tensor:
    """Compute the positions of all tokens of a prompt; every image and video is expanded to its pad tokens.

    Returns:
        int64 [3, tokens].

    Raises:
        ValueError: the numbers of pad tokens do not match the grids.
    """
    is_vision = vision_token_mask(prompt.token_ids, config.pad_ids).tolist()
    blocks: list[Tensor] = []
    index, position = 0, 0  # index and position of the next token

    def add_text_until(end: int) -> None:
        nonlocal index, position
        if end > index:
            blocks.append((torch.arange(end - index) + position).expand(3, -1))
            index, position = end, position + end - index

    for number, item in enumerate(prompt.vision):
        for block in config.family.vision_blocks(config.vision, item.grid_thw, item.seconds_per_grid):
            # The block starts at the next pad; the tokens before it are text.
            start = next((i for i in range(index, len(is_vision)) if is_vision[i]), len(is_vision))
            add_text_until(start)
            end = start + block.shape[1]
            if end > len(is_vision) or not all(is_vision[start:end]):
                raise ValueError(
                    f"vision input {number} has a grid of {item.grid_thw} and needs {block.shape[1]} pad tokens in a "
                    f"row; the prompt has {sum(is_vision[start:end])} from token {start} on"
                )
            blocks.append(block + position)
            index, position = end, position + int(block.max()) + 1
    if any(is_vision[index:]):
        stray = is_vision.index(True, index)
        raise ValueError(
            f"{sum(is_vision[index:])} vision pad tokens from token {stray} on belong to no image or video"
        )
    add_text_until(len(is_vision))
    return torch.cat(blocks, dim=1) if blocks else torch.empty(3, 0, dtype=torch.long)


def vision_token_mask(token_ids: Tensor, vision_token_ids: frozenset[int]) -> Tensor:
    """Return a bool tensor [tokens] that is True at a prompt's pad tokens, which vision features replace."""
    return torch.isin(token_ids, torch.tensor(sorted(vision_token_ids), dtype=token_ids.dtype))


def rotary_angles(position_ids: Tensor, axes: Sequence[int], rotary_base: float, yarn: Yarn | None = None) -> Tensor:
    """Compute the rotary angles of queries and keys.

    The angles are elementwise products. megatron-core and transformers use a matmul, which rounds positions above 2048
    where float32 matmuls run in TF32, as NVIDIA's containers configure it.

    Args:
        position_ids: int64 [3, tokens].
        axes: axis of each frequency, from the highest on: 0 time, 1 height, 2 width.
        rotary_base: base of the frequencies (rope_theta).
        yarn: changes the lower frequencies.

    Returns:
        float32 [tokens, 2 * len(axes)]: the angles of all frequencies, repeated twice.
    """
    head_dim = 2 * len(axes)
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim
    frequencies = 1 / rotary_base**exponents
    if yarn is not None:
        kept = _kept_by_yarn(yarn, head_dim, rotary_base).to(position_ids.device, non_blocking=True)
        frequencies = frequencies / yarn.factor * (1 - kept) + frequencies * kept
    # Without waiting for the device: the host prepares the next kernels while the last microbatch still computes.
    axis_of_frequency = torch.tensor(axes).to(position_ids.device, non_blocking=True)
    angles = position_ids.float().T[:, axis_of_frequency] * frequencies
    return torch.cat((angles, angles), dim=-1)


def _kept_by_yarn(yarn: Yarn, head_dim: int, rotary_base: float) -> Tensor:
    """Return how much of each frequency YaRN keeps: 1 for the highest, 0 for the lowest, and a ramp in between."""

    def index_of(num_rotations: float) -> float:
        """Return the index of the frequency that makes this number of rotations over the original positions."""
        wavelength = yarn.original_max_positions / (num_rotations * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(rotary_base))

    first, last = max(math.floor(index_of(yarn.beta_fast)), 0), min(math.ceil(index_of(yarn.beta_slow)), head_dim - 1)
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32) - first) / max(last - first, 0.001)
    return 1 - ramp.clamp(0, 1)


def check_prompt(prompt: EncodedPrompt, config: ModelConfig, num_new_tokens: int = 0) -> None:
    """Raise UserError if a prompt is beyond the model's range of positions (see `check_positions`)."""
    check_positions(config, prompt_positions(config, prompt), num_new_tokens)


def check_positions(config: ModelConfig, position_ids: Tensor, num_new_tokens: int) -> None:
    """Raise UserError if a prompt's positions, or those of the tokens after it, are beyond the model's range.

    Args:
        position_ids: int64 [3, tokens], of the prompt.
        num_new_tokens: tokens that follow the prompt, of the longest response.
    """
    limit = config.text.max_positions
    last = int(position_ids.max()) + num_new_tokens
    if limit is not None and last >= limit:
        raise UserError(
            f"its rotary positions reach {last}, but the model's range ends at {limit} (config.json: "
            "max_position_embeddings). Take a shorter video or prompt (data.max_prompt_tokens), or extend the range by "
            'YaRN: set "rope_type": "yarn", "factor" and "original_max_position_embeddings" in the section of the '
            "language model's rotary positions (config.json: rope_scaling or rope_parameters)"
        )
