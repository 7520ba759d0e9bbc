"""Lets torchvision be imported beside a CPU build of torch, in the environment where tests run SGLang.

torchvision's wheels are built for CUDA. Their compiled operators do not load here, and declaring fake versions of two
of them (nms, qnms) then fails the import. Nothing in SGLang's Qwen-VL path calls them, so they are declared beforehand.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from typing import Any


class _DeclareOperatorsFirst(MetaPathFinder):
    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            from torch import library

            _kept.append(library.Library("torchvision", "FRAGMENT"))
            for operator in ("nms", "qnms"):
                _kept[0].define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


_kept: list[Any] = []  # a declaration lives as long as its object
sys.meta_path.insert(0, _DeclareOperatorsFirst())
