"""SGLang's Qwen-VL processor, extended to take images and videos exactly as the trainer has them.

This is the only file that imports sglang. SGLang's own video path differs from the published models in timing (seconds
per temporal patch), in vision attention (all frames of a grid row attend to each other in the full-attention layers)
and, with transformers 5, in positions. For Qwen3-VL it differs in the choice of frames and in their pixels: it resizes
them to multiples of 28 pixels before transformers' processor resizes them again. This processor makes each temporal
step a grid row of its own, takes the positions from the trainer, and gives every image and video an identity that
covers everything its features depend on. Requests without our payload go to SGLang's processor unchanged.
"""

from __future__ import annotations

import asyncio
import inspect
import warnings
from typing import Any

import sglang
import torch
from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem, MultimodalProcessorOutput
from sglang.srt.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from sglang.srt.models.qwen2_vl import Qwen2VLForConditionalGeneration
from sglang.srt.models.qwen3_vl import Qwen3VLForConditionalGeneration
from sglang.srt.models.qwen3_vl_moe import Qwen3VLMoeForConditionalGeneration
from sglang.srt.multimodal.processors.qwen_vl import QwenVLImageProcessor

from megatron_vcr1.rollout.sglang.patches import to_patches
from megatron_vcr1.rollout.sglang.payload import Payload, is_payload, unpack

TESTED_VERSIONS = ("0.5.23",)


class ExactQwenVLProcessor(QwenVLImageProcessor):
    """A multimodal processor that SGLang finds through SGLANG_EXTERNAL_MM_PROCESSOR_PACKAGE."""

    models = (
        Qwen2VLForConditionalGeneration,
        Qwen2_5_VLForConditionalGeneration,
        Qwen3VLForConditionalGeneration,
        Qwen3VLMoeForConditionalGeneration,
    )

    async def process_mm_data_async(
        self, image_data: Any, input_text: Any, request_obj: Any, *args: Any, **kwargs: Any
    ) -> MultimodalProcessorOutput:
        """Process a request; SGLang calls this method. It turns a ValueError into HTTP status 400."""
        videos = request_obj.video_data or []
        if not any(is_payload(video) for video in videos):
            return await super().process_mm_data_async(image_data, input_text, request_obj, *args, **kwargs)
        if len(videos) != 1 or image_data:
            raise ValueError(
                "a payload holds all images and videos of a prompt: send no image_data and no other video_data with it"
            )
        if not isinstance(input_text, list):
            raise ValueError("a payload needs input_ids with expanded pad tokens, not text")
        # In a thread: reading and cutting frames takes long, and must not block the server's event loop.
        return await asyncio.to_thread(lambda: self._output(unpack(videos[0]), input_text))

    def _output(self, payload: Payload, token_ids: list[int]) -> MultimodalProcessorOutput:
        if payload.positions.shape[1] != len(token_ids):
            raise ValueError(f"positions of {payload.positions.shape[1]} tokens for a prompt of {len(token_ids)}")
        items = [self._item(payload, index, token_ids) for index in range(len(payload.media))]
        num_pads = sum(payload.num_tokens(item) for item in payload.media)
        found = sum(token_id in (self.IM_TOKEN_ID, self.VIDEO_TOKEN_ID) for token_id in token_ids)
        if found != num_pads:
            raise ValueError(f"the images and videos fill {num_pads} pad tokens, but the prompt has {found}")
        # SGLang's decoding adds this to the index of a token. The first response token then follows the position of the
        # last prompt token, as in training, where prompt and response are one sequence.
        delta = int(payload.positions[0, -1]) + 1 - len(token_ids)
        return MultimodalProcessorOutput(
            input_ids=token_ids,
            padded_input_ids=MultimodalProcessorOutput.build_padded_input_ids(token_ids, items),
            mm_items=items,
            im_start_id=self.vision_start_token_id,
            im_end_id=self.vision_end_token_id,
            im_token_id=self.IM_TOKEN_ID,
            video_token_id=self.VIDEO_TOKEN_ID,
            mrope_positions=payload.positions,
            mrope_position_delta=torch.tensor([[delta]]),
        )

    def _item(self, payload: Payload, index: int, token_ids: list[int]) -> MultimodalDataItem:
        media = payload.media[index]
        last = media.first_token + payload.num_tokens(media) - 1
        pad = self.VIDEO_TOKEN_ID if media.is_video else self.IM_TOKEN_ID
        if token_ids[media.first_token : last + 1].count(pad) != payload.num_tokens(media):
            raise ValueError(f"item {index}: tokens {media.first_token} to {last} are not all its pad token {pad}")
        patches, (time, rows, columns) = to_patches(media.frames, payload.patches)
        # One grid row per temporal step: SGLang attends within a grid row, and the steps must not see each other.
        grid = torch.tensor([[1, rows, columns]] * time)
        item = MultimodalDataItem(
            modality=Modality.VIDEO if media.is_video else Modality.IMAGE,
            feature=patches,
            offsets=[(media.first_token, last)],
            model_specific_data={"video_grid_thw" if media.is_video else "image_grid_thw": grid},
        )
        item.set_identity(payload.identity(media))
        return item


def check_sglang() -> None:
    """Reject an SGLang that lacks what this file uses, and warn about an untested version.

    Raises:
        RuntimeError: names what is missing and the tested versions.
    """
    tested = f"megatron_vcr1's plug-in is tested with sglang {', '.join(TESTED_VERSIONS)}, this is {sglang.__version__}"
    if missing := _missing_from_sglang():
        raise RuntimeError(f"{tested}, which lacks {', '.join(missing)}; install a tested version")
    if sglang.__version__ not in TESTED_VERSIONS:
        warnings.warn(f"{tested}: compare its log-probs with training's before you trust them", stacklevel=2)


def _missing_from_sglang() -> list[str]:
    """Return the names of the fields, methods and parameters that this file uses and that SGLang does not have."""
    output_fields = {"input_ids", "padded_input_ids", "mm_items", "mrope_positions", "mrope_position_delta"}
    output_fields.add("video_token_id")
    item_fields = {"modality", "feature", "offsets", "model_specific_data"}
    attributes = (
        (MultimodalDataItem, "set_identity"),
        (MultimodalProcessorOutput, "build_padded_input_ids"),
        (Modality, "VIDEO"),
        (Modality, "IMAGE"),
    )
    missing = [
        *(f"MultimodalProcessorOutput.{name}" for name in sorted(output_fields - _fields(MultimodalProcessorOutput))),
        *(f"MultimodalDataItem.{name}" for name in sorted(item_fields - _fields(MultimodalDataItem))),
        *(f"{kind.__name__}.{name}" for kind, name in attributes if not hasattr(kind, name)),
    ]
    parameters = list(inspect.signature(QwenVLImageProcessor.process_mm_data_async).parameters)
    if parameters[1:4] != ["image_data", "input_text", "request_obj"]:
        missing.append("QwenVLImageProcessor.process_mm_data_async(image_data, input_text, request_obj)")
    return missing


def _fields(struct: type) -> set[str]:
    """Return the field names of a msgspec struct."""
    return set(getattr(struct, "__struct_fields__", ()))
