from __future__ import annotations

import sys
from pathlib import Path

import pytest

from megatron_vcr1.cli.main import main


def test_a_missing_library_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith("megatron_vcr1.serving.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", "--model", "m"]) == 2
    assert "vcr1 serve needs uvicorn: pip install 'megatron_vcr1[serve]'" in capsys.readouterr().err


def test_a_missing_folder_of_files_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--model", "m", "--files", str(tmp_path / "nowhere")]) == 2
    assert "nowhere: no such folder" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--batch", "--max-new-tokens", "--max-prompt-tokens"])
def test_limits_must_be_positive(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["serve", "--model", "m", option, "0"])
    assert stopped.value.code == 2
    assert "0 is not above 0" in capsys.readouterr().err
