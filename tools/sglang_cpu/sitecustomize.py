"""Makes torchvision importable with a CPU build of torch, in the environment in which tests run SGLang on the CPU.

torchvision's wheels are built for CUDA, so their compiled operators do not load here. torchvision then fails to import,
because it registers fake implementations of two of these operators (nms, qnms), which do not exist. Nothing in SGLang's
Qwen-VL path calls them, so this file declares both before torchvision is imported. Python imports a module of this name
at start-up.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from typing import Any


class _DeclareOperatorsFirst(MetaPathFinder):
    """An import hook that declares the operators when torchvision is imported, and finds no module itself."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch
            from torch import library

            if torch.version.cuda is not None:  # a CUDA build of torch loads torchvision's own operators
                torch.cuda.synchronize = lambda device=None: None  # SGLang calls it before it releases memory
                return
            _kept.append(library.Library("torchvision", "FRAGMENT"))
            for operator in ("nms", "qnms"):
                _kept[0].define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


_kept: list[Any] = []  # an operator is declared as long as its library object lives
sys.meta_path.insert(0, _DeclareOperatorsFirst())
