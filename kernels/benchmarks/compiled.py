#!/usr/bin/env python3
"""Compile every kernel that the ops launch, without a GPU, and report registers, spills and instructions.

    python kernels/benchmarks/compiled.py 90       # or 100 for Blackwell: the GPU's compute capability, times 10
    python kernels/benchmarks/compiled.py 90 --record      # also writes results/compiled_sm90.json

The launch functions run on CPU tensors. The launch itself is replaced by a compilation with exactly the argument types
and specializations that a real launch would have, and by a check of the tensor descriptors. Prints one JSON object. A
test compares the numbers with the recorded ones: record them again, with the reason in the commit, after a change that
raises them.
"""

from __future__ import annotations

import datetime
import json
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature
from triton.tools.tensor_descriptor import TensorDescriptor

if __name__ == "__main__":  # the benchmarks are not installed; they are imported from the folder of the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import vcr1_kernels as vk
from vcr1_kernels import backend

# FFN sizes of the published language models, and of their vision towers as they are in training.
FFN_SIZES = (6144, 8960, 9728, 11008, 12288, 18944, 25600, 27648, 29568, 3456, 3584)
TARGET = GPUTarget("cuda", int(sys.argv[1]), 32)
MAX_BOX_SIZE = 256  # in each dimension
MAX_ROW_BYTES = (2**40, 32, 64, 128)  # of a box, by CUDA's number of its swizzle; 0 is no swizzle
compiled: dict[str, dict[str, Any]] = defaultdict(dict)  # by kernel name and specialization


def compile_instead_of_launching(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    """Replace `JITFunction.run`: compile the kernel for this call's specialization, unless it is compiled already."""
    compiler = make_backend(TARGET)
    binder = create_function_from_signature(kernel.signature, kernel.params, compiler)
    bound_args, specialization, _ = binder(*args, **kwargs, debug=False)
    options = {name: kwargs[name] for name in ("num_warps", "num_stages", "enable_fp_fusion") if name in kwargs}
    _, signature, constants, attributes = kernel._pack_args(compiler, options, bound_args, specialization, None)
    key = repr((specialization, options))
    descriptors = [argument for argument in bound_args.values() if isinstance(argument, TensorDescriptor)]
    is_float32 = bool(descriptors) and descriptors[0].base.dtype == torch.float32
    kernels = compiled[kernel.__name__ + " float32" if is_float32 else kernel.__name__]
    if key not in kernels:
        source = ASTSource(kernel, signature, constants, attributes)
        kernels[key] = triton.compile(source, target=TARGET, options=options)
    if descriptors:
        check_descriptors(descriptors, kernels[key].metadata.tensordesc_meta)


def check_descriptors(descriptors: Sequence[TensorDescriptor], boxes: Sequence[dict[str, Any]]) -> None:
    """Assert that cuTensorMapEncodeTiled, which a launch calls for each descriptor, would accept them.

    Neither the interpreter nor the compiler calls it. A box is what one instruction loads: a block of the kernel or a
    part of its channels. It may be wider than the tensor: the rest is filled with zeros.
    """
    for descriptor, box in zip(descriptors, boxes, strict=True):
        item_bytes, sizes = box["elem_size"], box["block_size"]
        strides = [stride * item_bytes for stride in descriptor.strides]
        assert descriptor.base.data_ptr() % 16 == 0 and descriptor.base.element_size() == item_bytes
        assert len(descriptor.shape) == len(sizes) <= 5 and all(0 < size < 2**32 for size in descriptor.shape)
        assert strides[-1] == item_bytes and all(stride % 16 == 0 and stride < 2**40 for stride in strides[:-1])
        assert all(0 < size <= MAX_BOX_SIZE for size in sizes)
        assert sizes[-1] * item_bytes % 16 == 0 and sizes[-1] * item_bytes <= MAX_ROW_BYTES[box["swizzle"]]


def run_every_op(num_tokens: int, dtype: torch.dtype) -> None:
    """Run each op forward and backward. The results are uninitialized memory, because no kernel runs."""
    vocab_size, hidden_size, num_heads, num_kv_heads, head_dim = 1600, 64, 28, 4, 128

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype).requires_grad_()

    def per_token() -> Tensor:
        return torch.randn(num_tokens + 3)[3:]  # a slice, like those of a packed batch: not aligned to 16 bytes

    hidden, weight, target_ids = leaf(num_tokens, hidden_size), leaf(vocab_size, hidden_size), torch.arange(num_tokens)
    for entropy in (False, True):
        vk.linear_log_probs(hidden, weight, target_ids, return_entropy=entropy, temperature=1 / num_tokens)
    loss = vk.linear_grpo_loss(
        hidden,
        weight,
        target_ids,
        per_token(),
        token_weights=per_token(),
        ref_log_probs=per_token(),
        rollout_log_probs=per_token(),
        kl_coef=1 / num_tokens,
        dual_clip=3.0,
        entropy_coef=0.1,
    ).loss
    loss.backward()
    vk.log_probs_from_logits(leaf(num_tokens, vocab_size), target_ids).sum().backward()
    for ffn_size in FFN_SIZES:
        for ranks in (1, 2, 4, 8):
            width = 2 * ffn_size // ranks
            for bias in (None, leaf(width)):
                vk.swiglu(leaf(num_tokens % 7, width), bias).sum().backward()
    angles = torch.randn(num_tokens, head_dim)
    vk.mrope(leaf(num_tokens, num_heads, head_dim) * 1, leaf(num_tokens, num_kv_heads, head_dim) * 1, angles, angles)
    for kv_heads, group_size, dim in ((num_kv_heads, num_heads // num_kv_heads, head_dim), (1, 7, 128), (16, 1, 80)):
        projection, angles = leaf(num_tokens, kv_heads, group_size + 2, dim), torch.randn(num_tokens, dim)
        for bias in (None, leaf(kv_heads, group_size + 2, dim)):
            torch.cat(vk.qkv_mrope(projection, angles, angles, bias=bias), dim=1).sum().backward()
    frames = torch.zeros(num_tokens % 7, 56, 28 * (num_tokens % 5), 3, dtype=torch.uint8)
    for order in (None, torch.arange(-(-len(frames) // 2) * 2 * (num_tokens % 5))):
        vk.frames_to_patches(
            frames,
            patch_size=14,
            temporal_patch_size=2,
            merge_size=2,
            mean=(0.5, 0.4, 0.3),
            std=(0.2, 0.3, 0.4),
            unit_order=order,
            dtype=dtype,
        )


def run_attention(num_tokens: int) -> None:
    """Run attention forward and backward, in bfloat16 with the heads of published models, and in float32."""
    text, vision = (28, 4, 128), (16, 16, 80)  # query heads, key-value heads, head size
    half, single = torch.bfloat16, torch.float32
    # Small tiles for a short group, large tiles for a long one, a group in which some tokens have no query, and the
    # windows of a vision tower.
    for (num_heads, num_kv_heads, head_dim), dtype, layout in (
        (text, half, vk.SegmentLayout((num_tokens - 40, 30, 10), (-1, 0, 0))),
        (text, half, vk.SegmentLayout((100 * num_tokens, 200, 100), (-1, 0, 0))),
        (text, half, vk.SegmentLayout((200 * num_tokens, 200), (-1, 0), queries=((9, 100 * num_tokens),))),
        (vision, half, vk.SegmentLayout.packed((64, num_tokens % 64), causal=False)),
        (vision, half, vk.SegmentLayout.packed((100 * num_tokens, num_tokens), causal=False)),
        ((4, 2, 32), single, vk.SegmentLayout((num_tokens - 40, 30, 10), (-1, 0, 0))),
        ((4, 2, 64), single, vk.SegmentLayout((num_tokens - 40, 30, 10), (-1, 0, 0))),
        ((4, 4, 64), single, vk.SegmentLayout.packed((64, num_tokens % 64), causal=False)),
    ):
        query, key, value = (
            torch.randn(length, heads, head_dim, dtype=dtype).requires_grad_()
            for length, heads in (
                (layout.num_queries, num_heads),
                (layout.num_tokens, num_kv_heads),
                (layout.num_tokens, num_kv_heads),
            )
        )
        vk.shared_prefix_attention(query, key, value, layout).sum().backward()


@dataclass(frozen=True)
class MachineCode:
    """The assembler's result for one kernel.

    Attributes:
        registers: per thread.
        instructions: in the whole kernel.
        spills: loads and stores of local memory, where the compiler puts values that do not fit into registers.
    """

    registers: int
    instructions: int
    spills: int

    @classmethod
    def of(cls, cubin: bytes) -> MachineCode:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            command = [triton.knobs.nvidia.cuobjdump.path, "-sass", "-res-usage", file.name]
            text = subprocess.check_output(command, text=True)
        return cls(
            registers=max(map(int, re.findall(r"\bREG:(\d+)", text))),
            instructions=len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+\S", text, re.MULTILINE)),
            spills=len(re.findall(r"\b(?:LDL|STL)\b", text)),
        )


def num_narrow_accesses(ptx: str) -> int:
    """Count the loads and stores of global memory that move less than 16 bytes."""
    sizes = re.findall(r"\b(?:ld|st)\.global\S*?(?:\.v(\d))?\.b(\d+)\b", ptx)
    return sum(int(count or 1) * int(bits) < 128 for count, bits in sizes)


def main() -> None:
    JITFunction.run = compile_instead_of_launching
    backend._interpreting = True  # CPU tensors reach the launch functions
    run_every_op(64, torch.bfloat16)
    run_attention(64)
    # Whatever is compiled after this point was compiled only because lengths, alignment or temperature differ.
    num_compiled = {name: len(kernels) for name, kernels in compiled.items()}
    run_every_op(93, torch.bfloat16)
    run_attention(93)
    codes = {
        name: [MachineCode.of(kernel.asm["cubin"]) for kernel in kernels.values()] for name, kernels in compiled.items()
    }
    report = {
        name: {
            "compiled": num_compiled[name],
            "recompiled": len(kernels) - num_compiled[name],
            "shared_bytes": max(kernel.metadata.shared for kernel in kernels.values()),
            "scratch_bytes": max(kernel.metadata.global_scratch_size for kernel in kernels.values()),
            "registers": max(code.registers for code in codes[name]),
            "instructions": max(code.instructions for code in codes[name]),
            "spills": sum(code.spills for code in codes[name]),
            "narrow_accesses": sum(num_narrow_accesses(kernel.asm["ptx"]) for kernel in kernels.values()),
            "tensor_cores": all(
                re.search("wgmma|tcgen05", kernel.asm["ptx"]) is not None for kernel in kernels.values()
            ),
        }
        for name, kernels in compiled.items()
    }
    print(json.dumps(report))
    if "--record" in sys.argv:
        record = {"date": datetime.date.today().isoformat(), "triton": triton.__version__, "kernels": report}
        path = Path(__file__).parent / "results" / f"compiled_sm{TARGET.arch}.json"
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
