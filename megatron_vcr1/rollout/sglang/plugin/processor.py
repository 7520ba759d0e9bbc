"""SGLang's Qwen-VL processor, taught to take a prompt's pictures as the trainer has them. The one door to sglang.

SGLang's own video path differs from the published models in timing (seconds a grid step), in vision attention (all
frames of a grid row attend to each other in the full-attention layers) and, with transformers 5, in positions. Here
each temporal step is a grid row of its own, positions are the trainer's, and the pictures' identity covers everything
that their features depend on. Requests without our payload go to SGLang's processor unchanged.
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
from sglang.srt.multimodal.processors.qwen_vl import QwenVLImageProcessor

from megatron_vcr1.rollout.sglang.patches import to_patches
from megatron_vcr1.rollout.sglang.payload import Payload, is_payload, unpack

TESTED_VERSIONS = ("0.5.23",)


class ExactQwenVLProcessor(QwenVLImageProcessor):
    """Found by SGLang through SGLANG_EXTERNAL_MM_PROCESSOR_PACKAGE."""

    models = (Qwen2VLForConditionalGeneration, Qwen2_5_VLForConditionalGeneration)

    async def process_mm_data_async(
        self, image_data: Any, input_text: Any, request_obj: Any, *args: Any, **kwargs: Any
    ) -> MultimodalProcessorOutput:
        """SGLang's hook. A ValueError becomes HTTP status 400."""
        videos = request_obj.video_data or []
        if not any(is_payload(one) for one in videos):
            return await super().process_mm_data_async(image_data, input_text, request_obj, *args, **kwargs)
        if len(videos) != 1 or image_data:
            raise ValueError("one payload holds all pictures of a prompt: no image_data, and no other video_data")
        if not isinstance(input_text, list):
            raise ValueError("a payload goes with input_ids in which the pad tokens are expanded, not with text")
        return await asyncio.to_thread(self._output, unpack(videos[0]), input_text)

    def _output(self, payload: Payload, token_ids: list[int]) -> MultimodalProcessorOutput:
        if payload.positions.shape[1] != len(token_ids):
            raise ValueError(f"positions of {payload.positions.shape[1]} tokens for a prompt of {len(token_ids)}")
        items = [self._item(payload, index, token_ids) for index in range(len(payload.pictures))]
        num_pads = sum(payload.num_tokens(one) for one in payload.pictures)
        found = sum(one in (self.IM_TOKEN_ID, self.VIDEO_TOKEN_ID) for one in token_ids)
        if found != num_pads:
            raise ValueError(f"the pictures fill {num_pads} pad tokens, the prompt has {found}")
        # Decoding goes on from the last position, which is what a forward over prompt and response does.
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
        picture = payload.pictures[index]
        last = picture.first_token + payload.num_tokens(picture) - 1
        pad = self.VIDEO_TOKEN_ID if picture.is_video else self.IM_TOKEN_ID
        if token_ids[picture.first_token : last + 1].count(pad) != payload.num_tokens(picture):
            raise ValueError(f"picture {index}: tokens {picture.first_token} to {last} are not all its pad token {pad}")
        patches, (time, rows, columns) = to_patches(picture.frames, payload.patches)
        grid = torch.tensor([[1, rows, columns]] * time)  # one row a temporal step keeps the steps apart
        item = MultimodalDataItem(
            modality=Modality.VIDEO if picture.is_video else Modality.IMAGE,
            feature=patches,
            offsets=[(picture.first_token, last)],
            model_specific_data={"video_grid_thw" if picture.is_video else "image_grid_thw": grid},
        )
        item.set_identity(payload.identity(picture))
        return item


def check_sglang() -> None:
    """Refuse an SGLang that lacks what this file uses, and warn about one that it was not tested with.

    Raises:
        RuntimeError: names what is missing and the tested versions.
    """
    tested = f"megatron_vcr1's plug-in is tested with sglang {', '.join(TESTED_VERSIONS)}, this is {sglang.__version__}"
    parameters = list(inspect.signature(QwenVLImageProcessor.process_mm_data_async).parameters)
    fields = {"input_ids", "padded_input_ids", "mm_items", "mrope_positions", "mrope_position_delta", "video_token_id"}
    missing = [
        *(f"MultimodalProcessorOutput.{one}" for one in sorted(fields - set(_fields(MultimodalProcessorOutput)))),
        *(
            f"MultimodalDataItem.{one}"
            for one in sorted(
                {"modality", "feature", "offsets", "model_specific_data"} - set(_fields(MultimodalDataItem))
            )
        ),
        *(
            f"{kind.__name__}.{name}"
            for kind, name in (
                (MultimodalDataItem, "set_identity"),
                (MultimodalProcessorOutput, "build_padded_input_ids"),
                (Modality, "VIDEO"),
                (Modality, "IMAGE"),
            )
            if not hasattr(kind, name)
        ),
    ]
    if parameters[1:4] != ["image_data", "input_text", "request_obj"]:
        missing.append("QwenVLImageProcessor.process_mm_data_async(image_data, input_text, request_obj)")
    if missing:
        raise RuntimeError(f"{tested}, which lacks {', '.join(missing)}; install a tested version")
    if sglang.__version__ not in TESTED_VERSIONS:
        warnings.warn(f"{tested}: compare its log-probs with training's before you trust them", stacklevel=2)


def _fields(struct: type) -> tuple[str, ...]:
    return getattr(struct, "__struct_fields__", ())
