"""Three-axis rotary positions (mRoPE): where every token of a prompt stands in time, height and width.

The rule is the one that the published models were trained with: text advances all three axes together; a vision block
opens at the next free position, its time axis advancing with real time in Qwen2.5-VL; text after it starts at **one
past the largest position so far**, on any axis. transformers 5 advances by the block's spatial extent only, so its
positions overlap for long videos; pass these positions to it as ``position_ids`` when comparing.

This module needs torch alone: the rollout engine's plug-in imports it too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def vision_positions(
    grid_thw: tuple[int, int, int], seconds_per_grid: float | None, *, merge_size: int, tokens_per_second: int | None
) -> Tensor:
    """Positions of one image's or video's tokens, relative to where the block opens.

    Args:
        grid_thw: patches in time, height and width.
        seconds_per_grid: video time between two temporal patches; None for an image.
        merge_size: patches a side that become one token.
        tokens_per_second: time positions a second; None (Qwen2-VL) for one a temporal patch.

    Returns:
        int64 [3, tokens]: time, height and width of each token, time slowest.
    """
    num_steps, height, width = grid_thw
    steps = torch.arange(num_steps)
    if tokens_per_second is not None and seconds_per_grid is not None:
        # float32, multiplied before it is truncated, in this order: as the models were trained.
        steps = (steps * seconds_per_grid * tokens_per_second).long()
    axes = torch.meshgrid(steps, torch.arange(height // merge_size), torch.arange(width // merge_size), indexing="ij")
    return torch.stack(axes).flatten(1)


def prompt_positions(
    token_ids: Tensor,
    vision: Sequence[tuple[tuple[int, int, int], float | None]],
    *,
    vision_token_ids: frozenset[int],
    merge_size: int,
    tokens_per_second: int | None,
) -> Tensor:
    """Positions of a whole prompt.

    Args:
        token_ids: int64 [tokens], every image and video expanded to its pad tokens.
        vision: grid_thw and seconds_per_grid of each image and video, in the order of the prompt.
        vision_token_ids: ids of the pad tokens.

    Returns:
        int64 [3, tokens].

    Raises:
        ValueError: the pads in the prompt are not those that the grids call for.
    """
    is_vision = vision_token_mask(token_ids, vision_token_ids).tolist()
    pieces: list[Tensor] = []
    row, position = 0, 0

    def text_until(end: int) -> None:
        nonlocal row, position
        if end > row:
            pieces.append((torch.arange(end - row) + position).expand(3, -1))
            row, position = end, position + end - row

    for index, (grid_thw, seconds_per_grid) in enumerate(vision):
        block = vision_positions(grid_thw, seconds_per_grid, merge_size=merge_size, tokens_per_second=tokens_per_second)
        start = next((i for i in range(row, len(is_vision)) if is_vision[i]), len(is_vision))
        text_until(start)
        end = start + block.shape[1]
        if end > len(is_vision) or not all(is_vision[start:end]):
            raise ValueError(
                f"vision input {index} has a grid of {grid_thw} and needs {block.shape[1]} pad tokens in a row; "
                f"the prompt has {sum(is_vision[start:end])} from token {start} on"
            )
        pieces.append(block + position)
        row, position = end, position + int(block.max()) + 1
    if any(is_vision[row:]):
        stray = is_vision.index(True, row)
        raise ValueError(f"{sum(is_vision[row:])} vision pad tokens from token {stray} on belong to no image or video")
    text_until(len(is_vision))
    return torch.cat(pieces, dim=1) if pieces else torch.empty(3, 0, dtype=torch.long)


def vision_token_mask(token_ids: Tensor, vision_token_ids: frozenset[int]) -> Tensor:
    """bool [tokens]: which tokens of a prompt are pads that vision features replace."""
    return torch.isin(token_ids, torch.tensor(sorted(vision_token_ids), dtype=token_ids.dtype))


def rotary_angles(position_ids: Tensor, sections: Sequence[int], rotary_base: float) -> Tensor:
    """Angles that queries and keys are turned by.

    Without a matrix product, which megatron-core and transformers take: where float32 ones are left to TF32, as in
    NVIDIA's containers, positions above 2048 would be rounded.

    Args:
        position_ids: int64 [3, rows].
        sections: rotary frequencies of the time, height and width axes, the fastest first.

    Returns:
        float32 [rows, 2 * sum(sections)]: the frequencies' angles, twice.
    """
    head_dim = 2 * sum(sections)
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim
    frequencies = (1 / rotary_base**exponents).split(list(sections))
    angles = [positions[:, None] * some for positions, some in zip(position_ids.float(), frequencies, strict=True)]
    return torch.cat((*angles, *angles), dim=-1)
