"""Tests with four ranks and a server that only pretends to compute: which rank talks to it, and who sees errors."""

from __future__ import annotations

import sys
import threading
import time
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.errors import UserError
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.parallel import collectives, mesh
from megatron_vcr1.rollout.engine import EngineError, GenerationRequest, SamplingParams
from megatron_vcr1.rollout.sglang.engine import SglangEngine
from megatron_vcr1.rollout.sglang.http import ServerFault, call
from megatron_vcr1.rollout.special_tokens import SpecialTokens
from tests.gloo import GlooPool
from tests.limits import HANG_S
from tests.model import tiny
from tests.ports import free_ports
from tests.rollout.sglang.conftest import start_with
from tests.rollout.sglang.fake_server import FakeServer, Reply

pytestmark = pytest.mark.xdist_group("gloo")

LAYOUTS = ({"tensor": 2}, {"pipeline": 2}, {"tensor": 2, "pipeline": 2})


class Pretender:
    """A server whose n-th response has n tokens, so that no two responses are equal."""

    def __init__(self) -> None:
        self.version = "default"
        self.broken = False
        self._num_responses = 0
        self._lock = threading.Lock()

    def __call__(self, path: str, body: Any) -> Reply:
        if path == "/generate":
            return (400, {"message": "too long"}) if self.broken else (200, self._responses(body))
        if path == "/update_weight_version":
            self.version = body["new_version"]
        return 200, {"tp_size": 1, "weight_version": self.version}

    def _responses(self, body: Any) -> list[dict[str, Any]]:
        with self._lock:
            self._num_responses += 1
            length = self._num_responses
        meta = {
            "finish_reason": {"type": "stop"},
            "weight_version": self.version,
            "output_token_logprobs": [[-1.0, 9, None]] * length,
            "output_token_ids_logprobs": [[[-1e38, 5, None]]] * length,
            "cached_tokens": 2,
        }
        return [{"meta_info": meta}] * body["sampling_params"]["n"]


def _engine(folder: Path, url: str, parallel: dict[str, Any], **sglang: Any) -> SglangEngine:
    config = RunConfig.model_validate(
        {
            "model": {"path": folder},
            "train": {"run_dir": folder / "run"},
            "parallel": parallel,
            "sglang": {"urls": [url], "weight_sync": "tensor", "weight_sync_bucket_mb": 1, "request_timeout_s": HANG_S}
            | sglang,
        }
    )
    mesh.initialize(config.parallel)
    model_config = ModelConfig.from_dict(tiny.hf_config("qwen2_5_vl").to_dict())
    return start_with(config, SpecialTokens(frozenset([1]), (5,)), model_config)


def _sample_and_update(folder: Path, url: str, parallel: dict[str, Any]) -> dict[str, Any]:
    engine = _engine(folder, url, parallel)
    sent = [GenerationRequest(str(index), tiny.prompt("", seed=index), 2) for index in range(3)]
    before = engine.generate(sent, SamplingParams(64))
    gathered: list[weakref.ref[torch.Tensor]] = []
    num_alive = []  # whenever a tensor is about to be gathered

    def tensors() -> Any:
        for index in range(3):
            num_alive.append(sum(tensor() is not None for tensor in gathered))
            tensor = torch.full((300_000,), float(index))  # each fills a bucket
            gathered.append(weakref.ref(tensor))
            yield f"w{index}", tensor
            del tensor

    engine.update_weights(tensors(), 4)
    after = engine.generate(sent, SamplingParams(64))
    return {
        "replica": mesh.replica_index(),
        "before": before,
        "after": after,
        "num_alive": num_alive,
        "version": engine.policy_version,
    }


@pytest.mark.parametrize("parallel", LAYOUTS, ids=str)
def test_one_rank_of_a_replica_talks_and_all_get_the_responses(
    tmp_path: Path, gloo_pool: GlooPool, parallel: dict[str, Any]
) -> None:
    with FakeServer(Pretender()) as server:
        results = gloo_pool.run(_sample_and_update, tmp_path, server.url, parallel)
        num_replicas = len({result["replica"] for result in results})
        assert server.count("/generate") == 2 * 3 * num_replicas
        assert server.count("/update_weights_from_tensor") == 3  # by one of the replicas, after all had their responses
    for result in results:
        # All ranks take part in the collectives that gather the tensors, and free a bucket when it has been sent.
        assert result["num_alive"] == [0, 1, 1]
        assert result["version"] == 4
        first = next(other for other in results if other["replica"] == result["replica"])
        assert (result["before"], result["after"]) == (first["before"], first["after"])
        assert [group.id for group in result["after"]] == ["0", "1", "2"]
        assert {rollout.policy_version for group in result["before"] for rollout in group.rollouts} == {0}
        assert {rollout.policy_version for group in result["after"] for rollout in group.rollouts} == {4}


def _lose_the_server(folder: Path, url: str, first: int) -> set[int]:
    """Let one replica sample, restart the server, let the others sample; return the versions of their responses."""
    engine = _engine(folder, url, {"tensor": 2})
    sent = [GenerationRequest(str(index), tiny.prompt("", seed=index), 2) for index in range(3)]
    engine.update_weights([("w", torch.zeros(5))], 1)
    if mesh.replica_index() == first:
        engine.generate(sent, SamplingParams(64))
    collectives.gather_objects(None)
    if mesh.is_first_rank():
        call(url, "POST", "/update_weight_version", {"new_version": "default"}, timeout_s=HANG_S)
    collectives.gather_objects(None)
    groups = engine.generate(sent, SamplingParams(64)) if mesh.replica_index() != first else []
    return {rollout.policy_version for group in groups for rollout in group.rollouts}


@pytest.mark.parametrize("first", [0, 1, 2], ids=["owner trains", "other trains", "both sample"])
def test_any_replica_sends_weights_to_a_shared_server_that_was_restarted(
    tmp_path: Path, gloo_pool: GlooPool, first: int
) -> None:
    with FakeServer(Pretender()) as server:
        versions = gloo_pool.run(_lose_the_server, tmp_path, server.url, first)
        assert server.count("/update_weights_from_tensor") == 2  # at first, and after the restart
    assert versions == [set() if replica == first else {1} for replica in (0, 0, 1, 1)]


def _fail(folder: Path, url: str, parallel: dict[str, Any]) -> str:
    engine = _engine(folder, url, parallel)
    try:
        engine.generate([GenerationRequest("s7", tiny.prompt("", seed=0), 2)], SamplingParams(4))
    except EngineError as error:
        return str(error)
    return "no error"


def test_an_error_is_raised_on_every_rank(tmp_path: Path, gloo_pool: GlooPool) -> None:
    pretender = Pretender()
    pretender.broken = True
    with FakeServer(pretender) as server:
        for message in gloo_pool.run(_fail, tmp_path, server.url, {"tensor": 2, "pipeline": 2}):
            assert message.startswith("sample s7: ") and "too long" in message


def _fail_to_start(folder: Path, url: str, sglang: dict[str, Any]) -> str:
    try:
        _engine(folder, url, {"tensor": 2}, **sglang)
    except (EngineError, UserError) as error:
        return str(error)
    return "no error"


def test_a_missing_server_is_an_error_on_every_rank(tmp_path: Path, gloo_pool: GlooPool) -> None:
    server = FakeServer(Pretender())
    server.close()
    for message in gloo_pool.run(_fail_to_start, tmp_path, server.url, {}):
        assert "sglang.urls: " in message and "start it with `vcr1 rollout serve`" in message


# In place of an interpreter with sglang. Its server reports its process id and the initial weights.
INTERPRETER = """#!%s
import http.server, json, os, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        content = json.dumps({"pid": os.getpid(), "weight_version": "default"}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
if "sglang.launch_server" in sys.argv:
    port = int(sys.argv[sys.argv.index("--port") + 1])
    http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def _start_own(folder: Path, port: int) -> tuple[list[str], bool]:
    """Return the servers that this rank supervises, and whether it restarts one that is marked as dead."""
    sglang = {"urls": [], "num_servers": 2, "port": port, "python": folder / "python", "colocated": False}
    engine = _engine(folder, "", {"tensor": 2}, **sglang)
    processes = engine._fleet.processes
    try:
        if processes is None:
            return [], False
        (url,) = processes.urls
        pid = call(url, "GET", "/model_info", timeout_s=HANG_S)["pid"]
        processes.restart(url, "a test")
        deadline, is_new = time.monotonic() + HANG_S, False
        while not is_new and time.monotonic() < deadline:
            time.sleep(0.1)
            with suppress(ServerFault):
                is_new = call(url, "GET", "/model_info", timeout_s=HANG_S)["pid"] != pid
        return [url], is_new
    finally:
        engine.close()


def test_each_replica_starts_and_supervises_its_own_servers(tmp_path: Path, gloo_pool: GlooPool) -> None:
    (tmp_path / "python").write_text(INTERPRETER % sys.executable)
    (tmp_path / "python").chmod(0o755)
    port = free_ports(2)
    results = gloo_pool.run(_start_own, tmp_path, port)
    urls = [f"http://127.0.0.1:{number}" for number in (port, port + 1)]
    assert results == [([urls[0]], True), ([], False), ([urls[1]], True), ([], False)]


def test_replicas_cannot_share_a_server_that_releases_its_memory(tmp_path: Path, gloo_pool: GlooPool) -> None:
    for message in gloo_pool.run(_fail_to_start, tmp_path, "", {"urls": [], "colocated": True}):
        assert "sglang.num_servers: 2 replicas share 1 servers" in message
