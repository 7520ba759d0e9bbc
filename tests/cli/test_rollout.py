"""Tests of the arguments of `vcr1 rollout serve`; tests/rollout/sglang runs the servers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_vcr1.cli.main import main
from megatron_vcr1.rollout.sglang import serving


@pytest.mark.parametrize("arguments, host", [([], "127.0.0.1"), (["--host", "0.0.0.0"], "0.0.0.0")])
def test_serve_gets_the_settings_and_the_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], host: str
) -> None:
    calls: list[tuple[Any, Any, dict[str, Any]]] = []

    def serve(section: Any, model: Any, **rest: Any) -> int:
        calls.append((section, model, rest))
        return 1

    monkeypatch.setattr(serving, "serve", serve)
    file = tmp_path / "run.toml"
    file.write_text(f'[model]\npath = "{tmp_path}"\n[train]\nrun_dir = "{tmp_path / "run"}"\nseed = 7\n')
    assert main(["rollout", "serve", str(file), *arguments, "--sglang.num_servers", "2"]) == 1
    [(section, model, rest)] = calls
    assert (section.num_servers, model.path) == (2, tmp_path)
    assert rest == {"run_dir": tmp_path / "run", "seed": 7, "host": host}
