"""The whole page: its content, its safety against texts of models, and its rendering in a browser."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageColor

from megatron_vcr1.cli.main import report as command
from megatron_vcr1.data.manifest import read_manifest
from megatron_vcr1.errors import UserError
from tests.limits import HANG_S
from tests.report.runs import add_evaluation, make_run, synthetic_manifest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = "</pre><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">&amp; \ud800"


def report(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers(required=True))
    args = parser.parse_args(["report", *map(str, arguments)])
    return args.run(args)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    return synthetic_manifest(tmp_path_factory.mktemp("videos"))


@pytest.fixture
def run_dir(tmp_path, manifest) -> Path:
    run = make_run(tmp_path / "grpo", read_manifest(manifest))
    add_evaluation(run, "charades_sta", manifest, right=0.5)
    return run


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def count(self, tag: str, **attributes: str) -> int:
        return sum(tag == name and attributes.items() <= found.items() for name, found in self.tags)


@pytest.fixture(scope="module")
def html(tmp_path_factory, manifest) -> str:
    """The page of one run."""
    run = make_run(tmp_path_factory.mktemp("runs") / "grpo", read_manifest(manifest))
    add_evaluation(run, "charades_sta", manifest, right=0.5)
    assert report(run) == 0
    return (run / "report.html").read_text()


def test_the_page_of_one_run(html):
    page = Page(html)
    for text in (
        "Reward, first → last 10 % of steps",
        "R@0.7",
        "45.0",
        "Reasons for zero rewards",
        "no <answer>",
        "rollout",
    ):
        assert text in page.text
    assert "Step 1: tracking" in page.text and "Step 40: captioning" in page.text
    assert "charades_sta: worst of 6" in page.text
    # 3 steps and 1 benchmark; 8 frames per sample
    assert page.count("article") == 3 * 6 + 3 and page.count("img") == 8 * (3 * 6 + 3)
    assert page.count("rect", **{"class": "truth"}) >= 3 * 8  # true boxes of the tracking sample at three steps
    assert page.count("div", **{"class": "bar best"}) and page.count("div", **{"class": "bar truth"})


def test_thinking_and_answering_share_a_column(tmp_path, run_dir, manifest):
    add_evaluation(run_dir, "charades_sta_thinking", manifest, right=5 / 6, thinking=True)
    other = make_run(tmp_path / "other", [], num_steps=2)
    add_evaluation(other, "charades_sta", manifest, right=1 / 6)
    out = tmp_path / "both.html"
    assert report(run_dir, other, "--out", out, "--max-samples", 0) == 0
    results = Page(out.read_text()).text.partition("Results")[2].partition("Learning curves")[0]
    main, _, whole = results.partition("All benchmarks with all metrics")
    assert "83.3" in main and "thinking" in main and "answering" in main and "50.0" not in main
    assert "50.0" in whole and whole.count("grpo") == 2 and whole.count("other") == 1  # rows only where it was tested


def test_the_page_needs_no_network_and_no_scripts(html):
    assert "default-src 'none'" in html
    for tag, attributes in Page(html).tags:
        assert tag not in ("script", "iframe", "link", "object")
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href"):
                assert value.startswith(("data:image/jpeg;base64,", "#"))


def test_several_runs_are_compared_with_the_first(tmp_path, run_dir, manifest):
    better = make_run(tmp_path / "better", read_manifest(manifest)[:1], num_steps=20, seed=1)
    config = (better / "config.toml").read_text()
    (better / "config.toml").write_text(config.replace("kl_coef = 0.04", "kl_coef = 0.0"))
    add_evaluation(better, "charades_sta", manifest, right=5 / 6)
    add_evaluation(better, "activitynet", manifest, right=1 / 6, model="models/other")
    out, numbers = tmp_path / "pages" / "both.html", tmp_path / "both.json"
    assert report(run_dir, better, "--out", out, "--json", numbers, "--max-samples", 4) == 0
    page = Page(out.read_text())
    assert "grpo · better" in page.text and "+33.3" in page.text and "grpo.kl_coef" in page.text
    assert page.count("article") == 4
    assert "are based on 18 answers to 6 test samples" in page.text and "the gallery shows 4 of " in page.text
    results = json.loads(numbers.read_text())["results"]
    (miou,) = (
        row for row in results if (row["run"], row["label"], row["metric"]) == ("better", "charades_sta", "mIoU")
    )
    assert miou["value"] == pytest.approx(5 / 6) and miou["delta"] == pytest.approx(1 / 3)
    assert [row["delta"] for row in results if row["run"] == "grpo"] == [None] * 3
    assert [row["delta"] for row in results if row["model"] == "models/other"] == [None] * 3
    with pytest.raises(UserError, match="--out FILE"):
        report(run_dir, better)


def test_texts_of_models_are_escaped(run_dir):
    path = run_dir / "rollouts/step_40.jsonl"
    groups = [json.loads(line) for line in path.read_text().splitlines()]
    for group in groups:
        group["sample"] |= {"query": HOSTILE, "id": HOSTILE}
        group["responses"][0] |= {"text": HOSTILE, "finish_reason": HOSTILE}
        group["responses"][0]["reward"] |= {"reasons": {"format": HOSTILE}, "extra": {HOSTILE: 0.5}}
    path.write_text("".join(json.dumps(group) + "\n" for group in groups))
    (run_dir / "skipped.jsonl").write_text(json.dumps({"step": 1, "id": HOSTILE, "reason": HOSTILE}) + "\n")
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(
            json.dumps({"step": 41, f"zero_rewards/{HOSTILE}/iou/x": 1, f"reward/{HOSTILE}/total": 1, HOSTILE: 1.0})
            + "\n"
        )
    assert report(run_dir) == 0
    html = (run_dir / "report.html").read_text()
    assert "<script" not in html and "<img src=x" not in html
    assert "&lt;script&gt;document.title=" in html
    assert Page(html).count("pre") >= 18


def test_missing_files_are_reported(tmp_path, manifest, capsys):
    samples = [sample for sample in read_manifest(manifest) if sample.task == "tracking"]
    run = make_run(tmp_path / "run", samples, num_steps=2)
    rollouts = run / "rollouts/step_1.jsonl"
    group = json.loads(rollouts.read_text())
    absent = tmp_path / "absent.mp4"
    group["sample"]["video"] = str(absent)
    rollouts.write_text(json.dumps(group) + "\n" + json.dumps({"sample": {}}) + "\n" + '{"step": 1, "sam')
    add_evaluation(run, "moved", manifest, right=1.0)
    summary = json.loads((run / "evaluation/moved/metrics.json").read_text())
    (run / "evaluation/moved/metrics.json").write_text(json.dumps(summary | {"manifest": str(absent)}))
    assert report(run) == 0
    html = (run / "report.html").read_text()
    assert f"No frames: {absent}" in html
    notes = capsys.readouterr().err
    assert "samples of the gallery without all of their frames: 1; each states the reason" in notes
    assert "1 groups cannot be read" in notes and "last line is incomplete" in notes
    assert "evaluation/moved: no samples are shown" in notes


def test_evaluations_without_training_give_a_report(tmp_path, manifest):
    run = tmp_path / "base"
    add_evaluation(run, "charades_sta", manifest, right=0.5)
    assert report(run, "--max-samples", 0) == 0
    page = Page((run / "report.html").read_text())
    assert "are based on 6 answers to 6 test samples" in page.text
    assert "R@0.7" in page.text and page.count("svg") == page.count("article") == 0


def test_a_long_run_and_long_answers_stay_small(tmp_path, manifest):
    run = make_run(tmp_path / "long", read_manifest(manifest)[:1], num_steps=10_000)
    path = run / "rollouts/step_10000.jsonl"
    group = json.loads(path.read_text())
    for response in group["responses"]:
        response["text"] = "<think>" + "again and " * 100_000
    path.write_text(json.dumps(group) + "\n")
    assert report(run) == 0
    html = (run / "report.html").read_text()
    assert len(html) < 2_000_000 and "more characters" in html


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
def test_a_browser_renders_the_page(tmp_path, run_dir, manifest):
    path = run_dir / "rollouts/step_1.jsonl"
    text = path.read_text().replace("I am not sure", json.dumps(HOSTILE)[1:-1])
    text = text.replace("train_0", "train_" + "0" * 300).replace('"no <', f'"no {"o" * 300}<')  # ids, reasons
    path.write_text(re.sub(r"<answer>[\d.]+ to [\d.]+", "<answer>3 to 1e300", text))
    add_evaluation(run_dir, "a" * 200, manifest, right=0.5)
    assert report(run_dir) == 0
    url = (run_dir / "report.html").as_uri()

    light, dark = tmp_path / "light.png", tmp_path / "dark.png"
    dumped = browse(tmp_path, f"--screenshot={light}", "--dump-dom", "--window-size=1300,9000", url)
    assert "CONSOLE" not in dumped.stderr, "the browser complains about the page"
    page = Page(dumped.stdout)
    assert "<title>grpo: report</title>" in dumped.stdout
    assert page.count("article") == 24 and page.count("script") == 0 and "1e+300 s" in page.text
    pixels = np.asarray(Image.open(light).convert("RGB")).astype(int)
    for colour in ("#00875a", "#1f6fd6", "#d2521b"):  # target, best and worst spans; curves
        assert near(pixels, ImageColor.getrgb(colour)) > 100, f"no pixel is {colour}"
    assert (pixels[:, 1292:] == pixels[0, 0]).all(), "long words or numbers run over the page's edge"
    assert near(pixels, (255, 0, 255)) > 1000, "the magenta circle of the tracking video is not visible"

    browse(tmp_path, f"--screenshot={dark}", "--window-size=1300,900", "--blink-settings=preferredColorScheme=0", url)
    background = [int(np.median(np.asarray(Image.open(path).convert("L")))) for path in (light, dark)]
    assert background[0] > 200 and background[1] < 60


def browse(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    flags = ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync", "hide-scrollbars")
    quiet = ("disable-background-networking", "disable-component-update", "enable-logging=stderr")
    own = ("disable-dev-shm-usage", f"user-data-dir={folder / 'profile'}")  # the machine's /dev/shm may be full
    return subprocess.run(
        [BROWSER, *(f"--{flag}" for flag in (*flags, *quiet, *own)), *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=HANG_S,
    )


def near(pixels: np.ndarray, colour: tuple[int, ...]) -> int:
    """Count the pixels of about this colour."""
    return int((np.abs(pixels - np.array(colour)).max(axis=-1) < 12).sum())
