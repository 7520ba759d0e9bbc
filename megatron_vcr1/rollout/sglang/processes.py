"""The server processes of a node: started from the settings, watched, restarted, and never left behind."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.errors import UserError
from megatron_vcr1.rollout.engine import EngineError
from megatron_vcr1.rollout.sglang import guard
from megatron_vcr1.rollout.sglang.http import INITIAL_WEIGHTS, RequestRefused, ServerFault, call, is_ready

logger = logging.getLogger(__name__)

LOOPBACK, EVERYWHERE = "127.0.0.1", "0.0.0.0"
NO_WEIGHTS = "none"
"""Version of a server that was started without weights: they come with the first sync."""
PLUGIN = "megatron_vcr1.rollout.sglang.plugin"
WATCH_S = 1.0
"""Between two looks at a process."""
PROBE_S = 30.0
"""Between two questions to a server whether it still answers, and the longest wait for an answer."""
MAX_SILENT_PROBES = 3
LOG_LINES = 15
# What torchrun tells its ranks, and what was set for training: servers are no ranks of this job. (The memory saver does
# not work with the allocator's expandable segments.)
_RANK_VARIABLES = (
    *("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CUDA_DEVICE_MAX_CONNECTIONS"),
    *("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"),
)
_RANK_PREFIXES = ("LOCAL_", "GROUP_", "ROLE_", "TORCHELASTIC_", "TORCH_NCCL_")
# SGLang's names. CUDA graphs are lent, too; and training may fill the GPUs of a server unequally.
_COLOCATED_ENVIRONMENT = {"SGLANG_MEMORY_SAVER_CUDA_GRAPH": "1", "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0"}
# Arguments of a server that would not do, and why.
_UNFIT = {
    "--enable-deterministic-inference": "all responses of a group are the same with it",
    **dict.fromkeys(
        ("--dp", "--dp-size", "--data-parallel-size", "--pp", "--pp-size", "--pipeline-parallel-size"),
        "new weights do not reach replicas and stages; set sglang.num_servers or sglang.tensor",
    ),
}


@dataclass(frozen=True, slots=True)
class ServerSpec:
    """How one server is started."""

    port: int
    command: tuple[str, ...]
    environment: Mapping[str, str]
    log: Path
    host: str = LOOPBACK

    @property
    def url(self) -> str:
        return server_url(self.port, self.host)


def server_url(port: int, host: str = LOOPBACK) -> str:
    """Where this node finds its own server that listens on an address."""
    return f"http://{LOOPBACK if host == EVERYWHERE else host}:{port}"


def require_sglang(python: Path | None) -> None:
    """Raises UserError where the servers' interpreter has no sglang: a server would end at every start, and say less.

    Args:
        python: as in the settings; None is the one that runs this.
    """
    interpreter, missing = str(python or sys.executable), 3
    look = f"import importlib.util, sys; sys.exit(0 if importlib.util.find_spec('sglang') else {missing})"
    try:
        code = subprocess.run([interpreter, "-c", look], stdin=subprocess.DEVNULL, check=False).returncode
    except OSError as error:
        raise UserError(f"sglang.python: {interpreter} cannot be run ({error.strerror}); correct the path") from error
    if code == missing:
        raise UserError(
            f"sglang is not installed for {interpreter}: install it into an environment of its own, for it asks for a "
            "torch of its own (`pip install 'sglang>=0.5.23,<0.6'`), and name that one's interpreter with sglang.python"
        )


def server_specs(config: RunConfig, *, first_gpu: int = 0, host: str = LOOPBACK) -> list[ServerSpec]:
    """The servers that the settings ask for on a node.

    Args:
        first_gpu: of the first server; the others follow.
        host: address that they listen on. They ask nobody for a password.

    Raises:
        UserError: a setting cannot work.
    """
    section, folder = config.sglang, config.train.run_dir.absolute() / "sglang"
    for argument in section.server_args:
        if reason := _UNFIT.get(argument.partition("=")[0]):
            raise UserError(f"sglang.server_args: leave {argument} out: {reason}")
    num_gpus = first_gpu + section.num_servers * section.tensor
    if torch.cuda.is_available() and num_gpus > torch.cuda.device_count():
        raise UserError(
            f"sglang.num_servers: {section.num_servers} servers of sglang.tensor = {section.tensor} need GPUs "
            f"{first_gpu} to {num_gpus - 1}, and this process sees {torch.cuda.device_count()}"
        )
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    # The server's interpreter may be another one, without this package: it sees the package, and only it, here.
    link = folder / "plugin" / "megatron_vcr1"
    _link(link, Path(__file__).parents[2])
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in _RANK_VARIABLES and not key.startswith(_RANK_PREFIXES)
    }
    environment["SGLANG_EXTERNAL_MM_PROCESSOR_PACKAGE"] = PLUGIN
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(link.parent), os.environ.get("PYTHONPATH"))))
    if section.colocated:
        environment |= _COLOCATED_ENVIRONMENT
    specs = []
    for index in range(section.num_servers):
        port = section.port + index
        command = [str(section.python or sys.executable), "-m", "sglang.launch_server", "--host", host]
        command += ["--port", str(port), *_model_arguments(config), "--tp", str(section.tensor)]
        command += ["--mem-fraction-static", str(section.memory_fraction)]
        command += ["--random-seed", str(config.train.seed + port), "--sleep-on-idle"]  # else it takes a core to wait
        if torch.cuda.is_available():
            command += ["--base-gpu-id", str(first_gpu + index * section.tensor)]
        if section.colocated:
            command += ["--enable-memory-saver", "--enable-weights-cpu-backup"]
        log = folder / "logs" / f"server_{port}.log"
        specs.append(ServerSpec(port, (*command, *section.server_args), environment, log, host))
    return specs


def _model_arguments(config: RunConfig) -> list[str]:
    arguments = ["--model-path", str(config.model.path.absolute()), "--dtype", config.model.dtype]
    if any(config.model.path.glob("*.safetensors")):
        return [*arguments, "--weight-version", INITIAL_WEIGHTS]
    # An imported model, or a training checkpoint: SGLang reads its configuration, and gets the weights from training.
    return [*arguments, "--load-format", "dummy", "--weight-version", NO_WEIGHTS]


def _link(link: Path, package: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.resolve() != package.resolve():
        new = link.with_name(f"{link.name}.{uuid.uuid4().hex}")
        new.symlink_to(package, target_is_directory=True)
        new.replace(link)  # at once: other ranks of this node do the same


class ServerGroup:
    """A node's running servers. A thread restarts those that end or stop answering, up to `max_restarts` times each."""

    def __init__(self, specs: Sequence[ServerSpec], *, startup_timeout_s: float, max_restarts: int) -> None:
        """Start them; `wait_until_ready` waits for them.

        Raises:
            UserError: a port is taken, by the server of another run perhaps, which would be mistaken for this one's.
        """
        for spec in specs:
            _await_port(spec.host, spec.port)
        self._processes = [_Process(spec, startup_timeout_s, max_restarts) for spec in specs]
        self._closing = threading.Event()
        self.held = False
        """Nothing is restarted: the servers' memory is lent to training, and a new one would not find any."""
        self._watcher = threading.Thread(target=self._watch, name="sglang-watcher", daemon=True)
        try:
            for process in self._processes:
                process.start()
        except BaseException:
            self.close()
            raise
        self._watcher.start()

    @property
    def urls(self) -> list[str]:
        return [process.spec.url for process in self._processes]

    def wait_until_ready(self) -> None:
        """Raises EngineError, with the end of the log, when a server gives up or takes longer than it may."""
        for process in self._processes:
            while not process.ready.wait(0.1):
                if process.failure is not None:
                    raise EngineError(process.failure)

    def is_ready(self, url: str) -> bool:
        """Whether the server at a URL has started up."""
        return any(process.ready.is_set() for process in self._processes if process.spec.url == url)

    def settle(self) -> None:
        """Returns when none is starting up: each is ready, or given up."""
        for process in self._processes:
            while not process.ready.wait(0.1) and process.failure is None:
                continue

    def failure(self, url: str) -> str | None:
        """Why there will be no server at a URL any more; None while there is one, or may be one again."""
        return next((process.failure for process in self._processes if process.spec.url == url), None)

    def start_from(self, url: str, model_dir: Path, weights: str) -> None:
        """Let a restart of a server begin with these weights instead of the run's first ones."""
        arguments = ("--model-path", str(model_dir), "--load-format", "auto", "--weight-version", weights)
        for process in self._processes:
            if process.spec.url == url:
                process.more_arguments = arguments

    def restart(self, url: str, reason: str) -> None:
        """Have a server that is of no use killed and started anew; returns at once."""
        for process in self._processes:
            if process.spec.url == url:
                process.condemn(reason)

    def end(self, url: str) -> None:
        """Kill a server now. It is started anew once nothing is `held`."""
        for process in self._processes:
            if process.spec.url == url:
                process.stop()

    def pids(self) -> list[int]:
        """Of the guards (see guard.py), for tests and for the curious."""
        return [process.popen.pid for process in self._processes if process.popen is not None]

    def close(self) -> None:
        """End all servers and wait until they are gone."""
        self._closing.set()
        if self._watcher.is_alive() and self._watcher is not threading.current_thread():
            self._watcher.join()
        for process in self._processes:
            process.stop()

    def _watch(self) -> None:
        while not self._closing.wait(WATCH_S):
            for process in self._processes if not self.held else ():
                try:
                    process.look()
                except OSError as error:  # no memory or disk to start it with; the next look tries once more
                    logger.warning("SGLang server %s: %s", process.spec.url, error)


def _await_port(host: str, port: int) -> None:
    """Returns once a port is free: what a killed run leaves behind takes a moment to go."""
    deadline = time.monotonic() + 2 * guard.GRACE_S
    while True:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                return probe.bind((host, port))
            except OSError as error:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"sglang.port: port {port} of {host} cannot be had ({error.strerror}); set another"
                    ) from None
        time.sleep(0.2)


class _Process:
    """One server over its lives. Only the watcher calls `look`; the rest may come from any thread."""

    def __init__(self, spec: ServerSpec, startup_timeout_s: float, max_restarts: int) -> None:
        self.spec = spec
        self.startup_timeout_s = startup_timeout_s
        self.restarts_left = max_restarts
        self.more_arguments: tuple[str, ...] = ()  # the later of two equal ones counts
        self.popen: subprocess.Popen[bytes] | None = None
        self.ready = threading.Event()
        self.failure: str | None = None
        self._condemned: str | None = None
        self._started_s = self._probed_s = 0.0
        self._silent_probes = 0

    def start(self) -> None:
        spec = self.spec
        server = [*spec.command, *self.more_arguments]
        command = [sys.executable, "-I", guard.__file__, str(os.getpid()), *server]
        with spec.log.open("ab") as log:
            log.write(f"{' '.join(server)}\n".encode())
            log.flush()
            self.popen = subprocess.Popen(
                command, env=dict(spec.environment), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        self._started_s = self._probed_s = time.monotonic()
        self._silent_probes, self._condemned = 0, None
        logger.info("SGLang server on port %d starts; its log is %s", spec.port, spec.log)

    def condemn(self, reason: str) -> None:
        if self.ready.is_set():  # one that is just starting is left alone
            self._condemned = reason

    def look(self) -> None:
        """Notice that the server is ready, has ended, or no longer answers; act on it."""
        if self.failure is not None or self.popen is None:
            return
        code = self.popen.poll()
        if code is not None:
            self._replace(f"ended with exit code {code}")
        elif self._condemned is not None:
            self._replace(self._condemned)
        elif not self.ready.is_set():
            if is_ready(self.spec.url):
                self.ready.set()
                logger.info("SGLang server %s is ready", self.spec.url)
            elif time.monotonic() - self._started_s > self.startup_timeout_s:
                self._replace(f"was not ready within {self.startup_timeout_s:.0f} s (sglang.startup_timeout_s)")
        elif time.monotonic() - self._probed_s > PROBE_S:
            self._probe()

    def _probe(self) -> None:
        try:
            call(self.spec.url, "GET", "/model_info", timeout_s=PROBE_S)
            self._silent_probes = 0
        except (ServerFault, RequestRefused):
            self._silent_probes += 1
            if self._silent_probes == MAX_SILENT_PROBES:
                self._replace(f"has not answered for {MAX_SILENT_PROBES * PROBE_S:.0f} s")
        self._probed_s = time.monotonic()

    def _replace(self, reason: str) -> None:
        self.stop()
        self.ready.clear()
        what = f"SGLang server {self.spec.url} {reason}"
        if self.restarts_left == 0:
            self.failure = f"{what}, and has no restart left (sglang.max_restarts). {self.log_tail()}"
            logger.error("%s", self.failure)
            return
        self.restarts_left -= 1
        logger.warning("%s; it is started again (%d restarts left)", what, self.restarts_left)
        self.start()

    def stop(self) -> None:
        if self.popen is None:
            return
        self.popen.terminate()  # the guard kills the server and all of its processes
        try:
            self.popen.wait(2 * guard.GRACE_S)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()

    def log_tail(self) -> str:
        try:
            lines = self.spec.log.read_text(errors="replace").splitlines()[-LOG_LINES:]
        except OSError as error:
            return f"Its log cannot be read: {error}"
        return "\n  ".join([f"{self.spec.log} ends with:", *lines])
