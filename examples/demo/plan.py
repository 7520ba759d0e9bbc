"""The demo's jobs. Most of them call the `vcr1` command, and their logs show the exact command line."""

from __future__ import annotations

import hashlib
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from demo.data import Sizes, video_sets, write_manifests
from demo.jobs import Job

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "examples/configs/demo"
DEFAULT_OUT = "runs/demo"
"""The output directory as the configuration files write it; `Demo.config` replaces it."""

RUNS = ("base", "sft_grounding", "grpo_grounding", "sft_joint", "grpo_joint")
SMALL_RUNS = ("sft_small", "grpo_small")
TESTS = {
    "base": ("test_thinking", "test_answering", "test_others"),
    "sft_grounding": ("test_answering", "test_others"),
    "grpo_grounding": ("test_thinking", "test_others"),
    "sft_joint": ("test_answering", "test_others"),
    "grpo_joint": ("test_thinking", "test_others"),
    "sft_small": ("test_answering",),
    "grpo_small": ("test_thinking",),
}
"""Test configurations of each run. Grounding is tested in the mode, thinking or not, that the run was trained in."""

SIZES = Sizes(
    base={"temporal_grounding": 3000, "tracking": 1600, "grounded_qa": 800},
    train={"temporal_grounding": 2000, "tracking": 800, "grounded_qa": 1000},
    test=200,
)
QUICK_SIZES = Sizes(
    base=dict.fromkeys(SIZES.base, 16), train=dict.fromkeys(SIZES.train, 12), test=4, small=4, small_seeds=1
)
_QUICK_OPTIONS = {
    "--train.num_steps": 2,
    "--train.prompts_per_step": 6,
    "--optimizer.warmup_steps": 1,
    "--checkpoint.every_steps": 2,
}
_EXPECTED_S = {
    "base": 175.0,
    "sft_grounding": 20.0,
    "grpo_grounding": 60.0,
    "sft_joint": 30.0,
    "grpo_joint": 130.0,
    "sft_small": 6.0,
    "grpo_small": 25.0,
}


@dataclass(frozen=True, slots=True)
class Demo:
    """One demo: which jobs to run and where.

    Attributes:
        out: output directory; nothing is written elsewhere.
        seeds: seeds of the initial weights, the data order and the sampling. The comparison with few labels always has
            three seeds, which also choose the labels; all of them start from the base model of the first seed.
        quick: run only a few steps of each job, as a smoke test.
        family: family of the tiny model, one of `tiny_model.FAMILIES`.
    """

    out: Path
    seeds: tuple[int, ...] = (0, 1)
    quick: bool = False
    family: str = "qwen2_5_vl"

    @property
    def sizes(self) -> Sizes:
        return QUICK_SIZES if self.quick else SIZES

    @property
    def data(self) -> Path:
        return self.out / "data"

    def run_dir(self, name: str, seed: int) -> Path:
        return self.out / f"{name}-{seed}"

    def small_seeds(self) -> range:
        return range(self.sizes.small_seeds)

    def models(self) -> list[tuple[str, int]]:
        """List the name and seed of every model that is trained and tested."""
        full = [(name, seed) for seed in self.seeds for name in RUNS]
        return full + [(name, seed) for seed in self.small_seeds() for name in SMALL_RUNS]

    def config(self, name: str) -> Path:
        """Copy a configuration of examples/configs/demo with this demo's output directory in it; return the copy."""
        path = self.out / "configs" / f"{name}.toml"
        text = (CONFIGS / f"{name}.toml").read_text(encoding="utf-8").replace(DEFAULT_OUT, str(self.out))
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return path

    def fingerprint(self) -> str:
        """Return a digest of everything that the results depend on: settings, data, initial weights."""
        here = Path(__file__).parent
        files = [*sorted(CONFIGS.glob("*.toml")), *(here / name for name in ("data.py", "plan.py", "tiny_model.py"))]
        contents = [path.read_bytes() for path in (*files, here / "templates.toml")]
        return hashlib.sha256(b"\0".join((str(self.quick).encode(), self.family.encode(), *contents))).hexdigest()

    def jobs(self) -> list[Job]:
        """List all jobs; the ones that should start early when two processes share the work come first."""
        parts = [
            Job(f"videos-{part}", partial(_synthesize, self.data, self.sizes, part, 2), seconds=35.0) for part in (0, 1)
        ]
        videos = tuple(job.name for job in parts)
        jobs = [*parts, Job("manifests", partial(write_manifests, self.data, self.sizes), seconds=5.0)]
        for seed in self.seeds:
            jobs.append(
                Job(f"model-{seed}", partial(_make_model, self.out / f"model-{seed}", seed, self.family), seconds=3.0)
            )
        for seed in self.seeds:
            jobs.append(self._train("base", seed, after=(*videos, "manifests", f"model-{seed}")))
        for name in ("grpo_joint", "grpo_grounding", "sft_joint", "sft_grounding"):  # the longest first
            jobs += [self._train(name, seed, after=(f"base-{seed}",)) for seed in self.seeds]
        first_base = f"base-{self.seeds[0]}"
        jobs += [self._train(name, seed, after=(first_base,)) for seed in self.small_seeds() for name in SMALL_RUNS]
        jobs += [self._evaluate(name, seed) for name, seed in self.models()]
        jobs += [self._verify("grpo_joint", seed) for seed in self.seeds]
        return [*jobs, self._report(after=tuple(job.name for job in jobs))]

    def _train(self, name: str, seed: int, after: tuple[str, ...]) -> Job:
        run_dir = self.run_dir(name, seed)
        base = self.run_dir("base", self.seeds[0] if name in SMALL_RUNS else seed) / "export"
        model = self.out / f"model-{seed}" / "imported" if name == "base" else base
        options = {"--model.path": model, "--train.run_dir": run_dir, "--train.seed": seed}
        options |= _QUICK_OPTIONS if self.quick else {}
        arguments = [str(self.config(name)), *(str(word) for option in options.items() for word in option)]
        return Job(
            f"{name}-{seed}",
            partial(vcr1, "train", *arguments),
            after,
            seconds=_EXPECTED_S[name],
            num_steps=num_steps(self.config(name)),
            metrics=run_dir / "metrics.jsonl",
        )

    def _evaluate(self, name: str, seed: int) -> Job:
        """Run all tests of a model in one job, each as a call of `vcr1 evaluate`."""
        run_dir = self.run_dir(name, seed)
        options = ("--model.path", str(run_dir / "export"), "--train.run_dir", str(run_dir))
        calls = [("evaluate", str(self.config(test)), *options) for test in TESTS[name]]
        return Job(f"test-{name}-{seed}", partial(_in_turn, calls), after=(f"{name}-{seed}",), seconds=5.0 * len(calls))

    def _verify(self, name: str, seed: int) -> Job:
        tests = [self.config(test) for test in TESTS[name]]
        call = partial(_verify_export, self.run_dir(name, seed), tests, self.out / "verified" / f"{name}-{seed}.json")
        return Job(f"verify-{name}-{seed}", call, after=(f"test-{name}-{seed}",), seconds=10.0)

    def _report(self, after: tuple[str, ...]) -> Job:
        """Write the HTML report on the runs of the first seed, including those with few labels."""
        runs = [self.run_dir(name, self.seeds[0]) for name in RUNS] + [self.run_dir(name, 0) for name in SMALL_RUNS]
        arguments = (*map(str, runs), "--out", str(self.out / "report.html"))
        return Job("report", partial(vcr1, "report", *arguments), after, seconds=10.0)


def num_steps(config: Path) -> int:
    """Return train.num_steps of a configuration file."""
    # Imported here because worker processes unpickle this module even for jobs that need no configuration.
    from megatron_vcr1.config.loading import load_config

    steps = load_config(config).train.num_steps
    assert steps is not None, f"{config} does not set train.num_steps"
    return steps


def vcr1(*arguments: str) -> None:
    """Run the `vcr1` command in this process, which keeps the imported libraries for the next job.

    Raises:
        RuntimeError: the command returned a non-zero exit code.
    """
    from megatron_vcr1.cli.main import main

    print("$ vcr1", shlex.join(arguments), flush=True)
    if code := main(arguments):
        raise RuntimeError(f"vcr1 {arguments[0]} failed with exit code {code}")


def _in_turn(calls: Sequence[Sequence[str]]) -> None:
    for arguments in calls:
        vcr1(*arguments)


def _synthesize(folder: Path, sizes: Sizes, part: int, num_parts: int) -> None:
    for videos in video_sets(sizes):
        videos.write(folder, part, num_parts)


def _make_model(folder: Path, seed: int, family: str) -> None:
    """Write a Hugging Face directory with random weights, and import it."""
    from demo.tiny_model import write_model

    shutil.rmtree(folder, ignore_errors=True)  # remains of an interrupted attempt
    write_model(folder / "hf", seed, family)
    vcr1("convert", "import", "--hf", str(folder / "hf"), "--out", str(folder / "imported"))


def _verify_export(run_dir: Path, tests: Sequence[Path], out: Path) -> None:
    """Compare the export with the checkpoint (all tensors and log-probs), and with transformers (its answers)."""
    from demo.verify import write_comparison

    (checkpoint,) = (run_dir / "checkpoints").glob("step_*")
    vcr1("convert", "verify", "--hf", str(run_dir / "export"), "--checkpoint", str(checkpoint))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_comparison(run_dir / "export", tests, run_dir / "evaluation", out)
