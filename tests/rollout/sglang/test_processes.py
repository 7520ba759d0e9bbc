"""Real processes that stand in for servers: started, watched, started anew, ended."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch

from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.errors import UserError
from megatron_vcr1.rollout.engine import EngineError
from megatron_vcr1.rollout.sglang import processes
from megatron_vcr1.rollout.sglang.loan import MemoryLoan
from megatron_vcr1.rollout.sglang.processes import ServerGroup, ServerSpec, server_specs

# Answers 200 to everything; with "refuse" it starts and is never ready.
SCRIPT = """
import http.server, json, os, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        content = json.dumps({"pid": os.getpid(), "arguments": sys.argv[1:]}).encode()
        self.send_response(503 if "refuse" in sys.argv else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
    def log_message(self, *args):
        pass
print("stand-in starts")
if "crash" in sys.argv:
    sys.exit("no memory left on the device")
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture(autouse=True)
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "WATCH_S", 0.05)
    monkeypatch.setattr(processes, "PROBE_S", 0.5)


Start = Callable[..., ServerGroup]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    groups = []

    def start(*arguments: str, max_restarts: int = 1, startup_timeout_s: float = 60) -> ServerGroup:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = (sys.executable, "-c", SCRIPT, str(port), *arguments)
        spec = ServerSpec(port, command, os.environ, tmp_path / "server.log")
        groups.append(ServerGroup([spec], startup_timeout_s=startup_timeout_s, max_restarts=max_restarts))
        return groups[-1]

    yield start
    for group in groups:
        group.close()


def answer(group: ServerGroup) -> dict[str, Any]:
    """What the server says once it answers."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return httpx.get(group.urls[0], timeout=0.5).json()
        except httpx.HTTPError:
            assert time.monotonic() < deadline, "no answer"
            time.sleep(0.05)


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def new_answer(group: ServerGroup, old_pid: int) -> dict[str, Any]:
    wait_for(lambda: answer(group)["pid"] != old_pid)
    return answer(group)


def test_a_server_is_ready_and_closing_ends_it(start: Start) -> None:
    group = start()
    group.wait_until_ready()
    pid = answer(group)["pid"]
    group.close()
    assert not psutil.pid_exists(pid)


def test_a_killed_server_is_started_again_until_no_restart_is_left(start: Start) -> None:
    group = start(max_restarts=1)
    group.wait_until_ready()
    first = answer(group)["pid"]
    os.kill(first, signal.SIGKILL)
    second = new_answer(group, first)["pid"]
    group.wait_until_ready()
    os.kill(second, signal.SIGKILL)
    wait_for(lambda: group.failure(group.urls[0]))
    failure = group.failure(group.urls[0])
    assert failure is not None
    assert "ended with exit code" in failure and "no restart left (sglang.max_restarts)" in failure
    assert failure.count("stand-in starts") == 2  # the log is kept, and quoted


def test_a_hung_server_is_replaced(start: Start) -> None:
    group = start()
    group.wait_until_ready()
    pid = answer(group)["pid"]
    os.kill(pid, signal.SIGSTOP)
    new_answer(group, pid)
    assert not psutil.pid_exists(pid)


def test_a_restart_can_begin_with_other_weights(start: Start) -> None:
    group = start()
    group.wait_until_ready()
    pid = answer(group)["pid"]
    group.start_from(group.urls[0], Path("somewhere"), "3@run")
    group.restart(group.urls[0], "refused an update")
    arguments = new_answer(group, pid)["arguments"]
    assert arguments[1:] == ["--model-path", "somewhere", "--load-format", "auto", "--weight-version", "3@run"]


def test_nothing_is_restarted_while_memory_is_lent(start: Start) -> None:
    group = start()
    group.wait_until_ready()
    pid = answer(group)["pid"]
    group.held = True
    os.kill(pid, signal.SIGKILL)
    time.sleep(0.5)
    with pytest.raises(httpx.HTTPError):
        httpx.get(group.urls[0], timeout=0.5)
    group.held = False
    new_answer(group, pid)


def test_memory_is_lent_by_servers_that_have_it(start: Start) -> None:
    """One that starts up would take its memory while training computes, and so would one that cannot give it."""
    group = start()
    loan = MemoryLoan(group.urls, group, timeout_s=5)
    loan.take_back()  # nothing is there yet
    loan.lend()
    assert group.is_ready(group.urls[0]) and group.held  # it was waited for
    with pytest.raises(httpx.HTTPError):
        httpx.get(group.urls[0], timeout=0.5)  # it does not know how to lend, and is gone
    loan.take_back()
    assert answer(group)  # started anew


def test_a_server_that_cannot_start_fails_with_the_end_of_its_log(start: Start) -> None:
    with pytest.raises(EngineError, match=r"(?s)ended with exit code 1.*no memory left on the device"):
        start("crash", max_restarts=1).wait_until_ready()


def test_a_server_that_is_never_ready_fails_in_time(start: Start) -> None:
    with pytest.raises(EngineError, match=r"was not ready within 1 s \(sglang.startup_timeout_s\)"):
        start("refuse", max_restarts=0, startup_timeout_s=1).wait_until_ready()


def test_a_server_that_cannot_be_started_anew_is_tried_until_no_restart_is_left(start: Start, tmp_path: Path) -> None:
    group = start(max_restarts=3)
    group.wait_until_ready()
    pid = answer(group)["pid"]
    log = tmp_path / "server.log"
    log.rename(tmp_path / "old.log")
    log.mkdir()  # opening it as a file fails
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: group.failure(group.urls[0]))
    failure = group.failure(group.urls[0])
    assert failure is not None
    assert "no restart left (sglang.max_restarts)" in failure and "Its log cannot be read" in failure


def config(folder: Path, **sglang: Any) -> RunConfig:
    (folder / "model").mkdir()
    return RunConfig.model_validate(
        {"model": {"path": folder / "model"}, "train": {"run_dir": folder / "run"}, "sglang": sglang}
    )


def test_the_command_follows_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("RANK", "3")
    run = config(tmp_path, num_servers=2, tensor=4, port=31000, server_args=["--log-level", "error"], python="/env/py")
    first, second = server_specs(run)
    assert first.command[:3] == ("/env/py", "-m", "sglang.launch_server")
    assert first.command[-2:] == ("--log-level", "error")
    text = " ".join(second.command)
    for part in ("--host 127.0.0.1", "--port 31001", "--tp 4", "--dtype bfloat16", "--enable-weights-cpu-backup"):
        assert part in text
    assert "--load-format dummy --weight-version none" in text  # the model's directory holds no safetensors
    assert (first.url, second.log.name) == ("http://127.0.0.1:31000", "server_31001.log")
    assert "--sleep-on-idle" in first.command
    [elsewhere, _] = server_specs(run, host="0.0.0.0")
    assert "--host 0.0.0.0" in " ".join(elsewhere.command) and elsewhere.url == first.url
    [named, _] = server_specs(run, host="10.0.0.5")
    assert named.url == "http://10.0.0.5:31000"
    assert not {"RANK", "TORCHELASTIC_USE_AGENT_STORE"} & first.environment.keys()
    [place, *_] = first.environment["PYTHONPATH"].split(os.pathsep)
    assert [path.name for path in Path(place).iterdir()] == ["megatron_vcr1"]


def test_weights_are_loaded_where_there_are_any(tmp_path: Path) -> None:
    run = config(tmp_path, colocated=False)
    (tmp_path / "model" / "model.safetensors").touch()
    [spec] = server_specs(run)
    text = " ".join(spec.command)
    assert "--weight-version default" in text and "dummy" not in text and "memory-saver" not in text


@pytest.mark.parametrize(
    "argument, reason",
    [
        ("--enable-deterministic-inference", "all responses of a group are the same"),
        ("--dp-size=2", "new weights do not reach replicas"),
        ("--pp", "new weights do not reach replicas and stages"),
    ],
)
def test_an_argument_that_would_not_do_is_refused(tmp_path: Path, argument: str, reason: str) -> None:
    with pytest.raises(UserError, match=f"sglang.server_args: leave {argument} out: .*{reason}"):
        server_specs(config(tmp_path, server_args=["--log-level", "error", argument, "2"]))


def test_servers_that_share_gpus_with_training_can_give_their_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "expandable_segments:True")  # training's; the memory saver refuses it
    run = config(tmp_path)
    [spec] = server_specs(run)
    assert not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & spec.environment.keys()
    assert spec.environment["SGLANG_MEMORY_SAVER_CUDA_GRAPH"] == "1"  # else CUDA graphs stay
    assert spec.environment["SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK"] == "0"
    [alone] = server_specs(run.model_copy(update={"sglang": run.sglang.model_copy(update={"colocated": False})}))
    assert not {name for name in alone.environment if name.startswith("SGLANG_MEMORY_SAVER")}


def test_servers_have_the_gpus_that_the_process_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    run = config(tmp_path, num_servers=2, tensor=2)
    last = server_specs(run, first_gpu=4)[-1].command
    assert last[last.index("--base-gpu-id") + 1] == "6"
    with pytest.raises(UserError, match="need GPUs 5 to 8, and this process sees 8"):
        server_specs(run, first_gpu=5)


def test_another_runs_server_is_not_taken_for_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes.guard, "GRACE_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        spec = ServerSpec(port, (sys.executable, "-c", "pass"), os.environ, tmp_path / "server.log")
        with pytest.raises(UserError, match=f"sglang.port: port {port}"):
            ServerGroup([spec], startup_timeout_s=1, max_restarts=0)
