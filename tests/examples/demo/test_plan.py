"""The demo's jobs and configurations."""

from __future__ import annotations

from pathlib import Path

from demo.plan import CONFIGS, RUNS, TESTS, Demo

from megatron_vcr1.config.loading import load_config


def test_every_configuration_is_valid_and_its_manifests_exist(tmp_path: Path, data: Path) -> None:
    demo = Demo(tmp_path / "demo")
    demo.out.mkdir()
    (demo.out / "data").symlink_to(data)
    assert len(list(CONFIGS.glob("*.toml"))) == 10
    for path in CONFIGS.glob("*.toml"):
        config = load_config(demo.config(path.stem))
        tables = [*config.data.sources, *config.evaluate.benchmarks, *config.validation.benchmarks]
        assert tables
        assert all(table.manifest.is_file() for table in tables)
        assert all(table.manifest.stem.startswith("temporal_grounding") for table in tables if table.thinking)


def test_every_model_has_a_training_and_a_test_job_in_this_order(tmp_path: Path) -> None:
    demo = Demo(tmp_path, seeds=(0, 5), quick=True)
    jobs = {job.name: job for job in demo.jobs()}
    assert {name for name, seed in demo.models()} == set(TESTS)
    for name, seed in demo.models():
        assert jobs[f"test-{name}-{seed}"].after == (f"{name}-{seed}",)
    assert all(f"{name}-5" in jobs for name in RUNS)
    assert "base-0" in jobs["sft_small-0"].after
    assert set(jobs["report"].after) == set(jobs) - {"report"}


def test_the_fingerprint_depends_on_quick_and_the_family_but_not_on_the_output_folder(tmp_path: Path) -> None:
    assert Demo(tmp_path / "a").fingerprint() == Demo(tmp_path / "b").fingerprint()
    assert Demo(tmp_path / "a").fingerprint() != Demo(tmp_path / "a", quick=True).fingerprint()
    assert Demo(tmp_path / "a").fingerprint() != Demo(tmp_path / "a", family="qwen3_vl").fingerprint()
