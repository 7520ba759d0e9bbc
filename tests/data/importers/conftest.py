"""Annotations that several importers' tests use."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.importers.importing import write


@pytest.fixture
def charades(tmp_path: Path) -> tuple[Path, Path]:
    """Charades-STA's text file and lengths: one good row, and one row with each kind of problem."""
    text = write(
        tmp_path / "train.txt",
        "AAA 1.0 4.0##a person sits ## down.\nAAA 5.0 2.0##inverted\nBBB 8.0 12.5##past the end\n"
        "BBB 11.0 12.0##after the end\nBBB 1.0 2.0## \n",
    )
    return text, write(tmp_path / "lengths.csv", "id,length,subject\nAAA,10.0,x\nBBB,10.5,y\n")
