"""examples/library/fused_loss.py."""

from __future__ import annotations

import pytest

from tests.examples.library.conftest import LoadExample


def test_fused_loss_equals_the_loss_written_out(load_example: LoadExample, capsys: pytest.CaptureFixture[str]) -> None:
    load_example("fused_loss").main()  # it compares both losses and both gradients itself
    difference = capsys.readouterr().out.rpartition(": ")[2]
    assert float(difference) < 1e-6


def test_another_loss_is_noticed(load_example: LoadExample, monkeypatch: pytest.MonkeyPatch) -> None:
    example = load_example("fused_loss")
    fused = example.linear_grpo_loss
    monkeypatch.setattr(example, "linear_grpo_loss", lambda *args, **keys: fused(*args, **{**keys, "kl_coef": 0.05}))
    with pytest.raises(AssertionError):
        example.main()
