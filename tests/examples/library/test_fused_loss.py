"""examples/library/fused_loss.py."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest


def test_fused_loss_equals_the_loss_written_out(
    load_example: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    load_example("fused_loss").main()  # it compares both losses and both gradients itself
    difference = capsys.readouterr().out.rpartition(": ")[2]
    assert float(difference) < 1e-6


def test_another_loss_is_noticed(load_example: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    example = load_example("fused_loss")
    fused = example.linear_grpo_loss
    monkeypatch.setattr(example, "linear_grpo_loss", lambda *args, **keys: fused(*args, **{**keys, "kl_coef": 0.05}))
    with pytest.raises(AssertionError):
        example.main()
