"""Tests of results in shared memory: exactness, and errors that reach the reader when there is no room."""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vcr1.config.data_sections import DataSection
from megatron_vcr1.data import shared_memory
from megatron_vcr1.data.shared_memory import PackedResult, max_bytes_in_flight, pack, unpack
from megatron_vcr1.errors import UserError
from tests.data.tiny_processor import tiny_processor
from tests.limits import HANG_S

MB = 2**20


def test_unpack_inverts_pack_and_leaves_no_shared_memory() -> None:
    frames = torch.arange(24, dtype=torch.uint8).reshape(2, 2, 2, 3)
    result = {"frames": frames, "view": frames[:, ::2], "text": "a"}
    packed = pack(result)
    assert not frames.is_shared()  # a worker keeps decoded videos in its cache, which must not fill shared memory
    found = unpack(packed)
    assert found["text"] == "a" and not found["frames"].is_shared()
    assert torch.equal(found["frames"], frames) and torch.equal(found["view"], frames[:, ::2])


def test_a_result_that_cannot_be_pickled_is_an_error_of_the_code() -> None:
    with pytest.raises((AttributeError, TypeError), match="pickle"):
        pack(lambda: None)
    with pytest.raises(RuntimeError, match="requires_grad"):
        pack(torch.ones(3, requires_grad=True) * 2)


@pytest.fixture
def file_limit() -> Any:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MB, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_lack_of_room_is_reported_when_the_result_is_unpacked(file_limit: None) -> None:
    packed = pack(torch.zeros(2 * MB, dtype=torch.uint8))
    with pytest.raises(UserError, match=r"File too large.*/dev/shm has \d+ MB free of \d+ MB.*--shm-size"):
        unpack(packed)


READER = """
import resource, sys
import torch
from megatron_vcr1.data.workers import decode_ahead

def make(item):
    return torch.full((8 << 20,), item, dtype=torch.uint8)

def make_limited(item):
    size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + (12 << 20), resource.RLIM_INFINITY))  # room for one copy only
    return make(item)

if __name__ == "__main__":
    if sys.argv[1] == "file size":
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
    results = decode_ahead(make_limited if sys.argv[1] == "address space" else make, range(9), num_workers=2)
    print([int(result[0]) for result in results])
"""


def run_reader(folder: Path, limit: str, *wrapper: str) -> subprocess.CompletedProcess[str]:
    script = folder / "reader.py"
    script.write_text(READER)
    command = [*wrapper, sys.executable, str(script), limit]
    return subprocess.run(command, capture_output=True, text=True, timeout=HANG_S)


@pytest.mark.parametrize("limit", ["file size", "address space"])
def test_a_worker_without_room_ends_the_reader_with_an_error(tmp_path: Path, limit: str) -> None:
    result = run_reader(tmp_path, limit)
    assert result.returncode == 1
    # With an address-space limit, decoding may run out of memory before the result is packed.
    assert "UserError: a decoding worker cannot send" in result.stderr or "allocate memory" in result.stderr


def in_tmpfs(size: str) -> list[str]:
    """Return a command that runs its arguments with a /dev/shm of this size, or skip the test."""
    mount = f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", mount, "sh"]
    if shutil.which("unshare") is None or subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    return command


def test_a_full_dev_shm_ends_the_reader_with_an_error(tmp_path: Path) -> None:
    result = run_reader(tmp_path, "none", *in_tmpfs("4m"))
    assert result.returncode == 1
    assert "UserError: a decoding worker cannot send a decoded sample to its rank" in result.stderr
    assert "/dev/shm has 4 MB free of 4 MB" in result.stderr and "--shm-size" in result.stderr


def test_shared_memory_for_the_samples_in_flight_is_enough(tmp_path: Path) -> None:
    """Two workers with two samples each, and the one that is copied: 5 of the 9 samples of 8 MB."""
    result = run_reader(tmp_path, "none", *in_tmpfs("41m"))
    assert (result.returncode, result.stdout) == (0, f"{list(range(9))}\n"), result.stderr


def test_the_reader_reports_its_own_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(content: bytes) -> Any:
        raise RuntimeError("unable to mmap 8 bytes from file </torch_1>: Cannot allocate memory (12)")

    monkeypatch.setattr(shared_memory.pickle, "loads", refuse)
    with pytest.raises(UserError, match="unable to mmap"):
        unpack(PackedResult(b""))


PROCESSOR = tiny_processor(patch_size=14)


def test_needed_bytes_follow_the_settings() -> None:
    # 100 frames of at most 28 * 28 * 10 pixels: their share of the pixel budget.
    section = DataSection(num_workers=3, max_frames=100, total_pixels=28 * 28 * 500, min_pixels=28 * 28)
    assert max_bytes_in_flight(section, PROCESSOR) == (3 * 2 + 1) * 3 * 28 * 28 * 1000
    short = section.model_copy(update={"max_prompt_tokens": 100})
    assert max_bytes_in_flight(short, PROCESSOR) == (3 * 2 + 1) * 3 * 28 * 28 * 200
    assert max_bytes_in_flight(section.model_copy(update={"num_workers": 0}), PROCESSOR) == 0


def test_a_small_dev_shm_is_reported_at_the_start(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shared_memory.shutil, "disk_usage", lambda path: usage(64_000_000, 0, 64_000_000))
    section = DataSection(num_workers=2, max_frames=100, total_pixels=28 * 28 * 4000)
    shared_memory.warn_if_shared_memory_is_small(section, PROCESSOR, num_readers=4)
    assert "/dev/shm has 64 MB free, but up to 376 MB can be needed: 4 ranks x (2 data.num_workers" in caplog.text
    assert "--shm-size" in caplog.text
    caplog.clear()
    shared_memory.warn_if_shared_memory_is_small(
        section.model_copy(update={"num_workers": 0}), PROCESSOR, num_readers=4
    )
    assert caplog.text == ""
