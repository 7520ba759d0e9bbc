"""mRoPE: rotary positions of tokens over three axes, time, height and width.

The positions are those that the published models were trained with. Text advances all three axes together. A vision
block starts at the next free position; its family decides how its time axis advances (`Family.vision_blocks`). The text
after it starts at **one past the largest position so far**, on any axis. transformers 5 advances by the block's height
and width only, so its positions overlap for long videos; pass our positions to it as ``position_ids`` when comparing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_vcr1.data.encoding import EncodedPrompt
from megatron_vcr1.model.config import ModelConfig


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


def rotary_angles(position_ids: Tensor, axes: Sequence[int], rotary_base: float) -> Tensor:
    """Compute the rotary angles of queries and keys.

    The angles are elementwise products. megatron-core and transformers use a matmul, which rounds positions above 2048
    where float32 matmuls run in TF32, as NVIDIA's containers configure it.

    Args:
        position_ids: int64 [3, tokens].
        axes: axis of each frequency, from the highest on: 0 time, 1 height, 2 width.
        rotary_base: base of the frequencies (rope_theta).

    Returns:
        float32 [tokens, 2 * len(axes)]: the angles of all frequencies, repeated twice.
    """
    head_dim = 2 * len(axes)
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim
    axis_of_frequency = torch.tensor(axes, device=position_ids.device)
    angles = position_ids.float().T[:, axis_of_frequency] * (1 / rotary_base**exponents)
    return torch.cat((angles, angles), dim=-1)
