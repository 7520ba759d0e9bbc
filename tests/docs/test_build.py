"""The manual and the API reference build without warnings, and links lead somewhere."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, pages

pytest.importorskip("sphinx")


def test_sphinx_builds_without_warnings(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", str(ROOT / "docs"), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    warnings = [line for line in result.stderr.splitlines() if "WARNING" in line or "ERROR" in line]
    assert result.returncode == 0, "\n".join(warnings)
    reference = (tmp_path / "api.html").read_text(encoding="utf-8")
    assert "linear_grpo_loss" in reference and "read_manifest" in reference


@pytest.mark.parametrize("name", ["configuration", "manifests"])
def test_a_generated_page_is_up_to_date(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    generator = importlib.import_module(f"generate_{name}")
    assert generator.PAGE.read_text(encoding="utf-8") == generator.render(), f"run `python docs/generate_{name}.py`"


def test_the_page_of_gpus_is_what_the_planner_says() -> None:
    """All cells up to 8 GPUs; larger clusters take the planner longer, so only one of them."""
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import generate_gpus as gpus
    finally:
        sys.path.pop(0)
    text = gpus.PAGE.read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    titles = [title for title, *_ in gpus.MODELS]
    tables = [{row[0]: row[1:] for row in rows[start : start + 6]} for start in (0, 6)]
    for gpu, table in zip(gpus.GPUS, tables, strict=True):
        assert list(table) == ["model", *titles] and len(table["model"]) == len(gpus.COUNTS)
        for title, model, freeze in gpus.MODELS:
            for number, shown in zip(gpus.COUNTS[:3], table[title][:3], strict=True):
                assert shown == gpus.cell(model, freeze, gpu, number), "run `python docs/generate_gpus.py`"
    assert tables[1]["72B"][3] == gpus.cell("qwen2.5-vl-72b", (), "h200", 32)
    assert text.startswith(gpus.INTRODUCTION) and text.endswith(gpus.ENDING)


@pytest.mark.parametrize("page", pages(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_relative_links_lead_to_files_and_headings(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, heading = target.partition("#")
        path = page.parent / file if file else page
        assert path.exists(), f"{page.name}: {target}"
        if heading:
            titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert heading in anchors, f"{page.name}: {target}"


def test_every_page_is_in_the_table_of_contents() -> None:
    index = (ROOT / "docs/index.md").read_text(encoding="utf-8").split()
    assert not [path.stem for path in (ROOT / "docs").glob("*.md") if path.stem not in (*index, "index")]


def test_the_readme_is_a_landing_page() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120
