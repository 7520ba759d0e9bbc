"""Specifications of servers to start: command line, environment, and checks of both."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_vcr1.config.model_sections import ModelSection
from megatron_vcr1.config.rollout_sections import SglangSection
from megatron_vcr1.errors import UserError
from megatron_vcr1.rollout.placement import Placement
from megatron_vcr1.rollout.sglang.http import INITIAL_WEIGHTS

LOOPBACK, ALL_INTERFACES = "127.0.0.1", "0.0.0.0"
NO_WEIGHTS = "none"
"""Weight version of a server that was started with random weights; the first weight sync brings the real ones."""
PLUGIN = "megatron_vcr1.rollout.sglang.plugin"
# Variables of torchrun and of training that servers must not inherit: a server is not a rank of this job. (SGLang's
# memory saver does not work with the allocator's expandable segments, which PYTORCH_*ALLOC_CONF may turn on.)
_RANK_VARIABLES = (
    *("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CUDA_DEVICE_MAX_CONNECTIONS"),
    *("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"),
    "CUBLAS_WORKSPACE_CONFIG",  # train.deterministic sets it, and it limits cuBLAS
)
_RANK_PREFIXES = ("LOCAL_", "GROUP_", "ROLE_", "TORCHELASTIC_", "TORCH_NCCL_")
# SGLang's environment variables for colocated servers. The first makes them release the memory of CUDA graphs, too. The
# second turns off a check that rejects GPUs with different free memory: training may use the GPUs unequally.
_COLOCATED_ENVIRONMENT = {"SGLANG_MEMORY_SAVER_CUDA_GRAPH": "1", "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0"}
# Server arguments that break training, and why.
_REJECTED_ARGUMENTS = {
    "--enable-deterministic-inference": "it makes all responses of a group equal",
    **dict.fromkeys(
        ("--dp", "--dp-size", "--data-parallel-size", "--pp", "--pp-size", "--pipeline-parallel-size"),
        "weight sync does not reach a server's replicas and stages; set sglang.num_servers or sglang.tensor",
    ),
}

# With CUDA graphs for the vision tower, SGLang interpolates the learned positions of Qwen3-VL in another way, unless
# the argument says otherwise.
_VISION_GRAPH_VARIABLE = "SGLANG_VIT_ENABLE_CUDA_GRAPH"
_EXACT_POSITIONS_ARGUMENT = "--enable-precise-embedding-interpolation"


@dataclass(frozen=True, slots=True)
class ServerSpec:
    """The specification of one server to start.

    Attributes:
        port: its HTTP port.
        command: program and arguments.
        environment: all environment variables of the process.
        log: file that its output is appended to.
        host: address that it listens on.
    """

    port: int
    command: tuple[str, ...]
    environment: Mapping[str, str]
    log: Path
    host: str = LOOPBACK

    @property
    def url(self) -> str:
        return server_url(self.port, self.host)


def server_url(port: int, host: str = LOOPBACK) -> str:
    """Return the URL at which this node reaches its own server, given the address that the server listens on."""
    return f"http://{LOOPBACK if host == ALL_INTERFACES else host}:{port}"


def require_sglang(python: Path | None) -> None:
    """Check that sglang is installed for the servers' interpreter.

    Without this check, a server would fail at every start, and its log would not say what to do.

    Args:
        python: `sglang.python`; None means this process's interpreter.

    Raises:
        UserError: the interpreter cannot be run, or has no sglang.
    """
    interpreter, missing = str(python or sys.executable), 3
    check = f"import importlib.util, sys; sys.exit(0 if importlib.util.find_spec('sglang') else {missing})"
    try:
        code = subprocess.run([interpreter, "-c", check], stdin=subprocess.DEVNULL, check=False).returncode
    except OSError as error:
        raise UserError(f"sglang.python: {interpreter} cannot be run ({error.strerror}); correct the path") from error
    if code == missing:
        raise UserError(
            f"sglang is not installed for {interpreter}: install the extra 'rollout' (Python 3.12, torch 2.14.1), or "
            "install sglang into an environment of its own (`pip install 'sglang>=0.5.23,<0.6'`) and set sglang.python "
            "to that environment's interpreter"
        )


def check_server_args(section: SglangSection) -> None:
    """Raise UserError for server arguments, and for a variable of SGLang, that break training."""
    for argument in section.server_args:
        if reason := _REJECTED_ARGUMENTS.get(argument.partition("=")[0]):
            raise UserError(f"sglang.server_args: remove {argument}: {reason}")
    uses_graphs = os.environ.get(_VISION_GRAPH_VARIABLE, "").lower() in ("true", "1", "yes", "y")  # as in SGLang
    if uses_graphs and _EXACT_POSITIONS_ARGUMENT not in section.server_args:
        raise UserError(
            f"sglang.server_args: {_VISION_GRAPH_VARIABLE} is set, so add {_EXACT_POSITIONS_ARGUMENT} (which does not "
            "affect other families), or unset the variable: otherwise the servers give Qwen3-VL other vision features "
            "than training"
        )


def server_specs(
    section: SglangSection,
    model: ModelSection,
    placement: Placement,
    *,
    run_dir: Path,
    seed: int,
    num_training_ranks: int = 0,
    host: str = LOOPBACK,
) -> list[ServerSpec]:
    """Build the specs of all servers of a node, and create their folders in the run directory.

    Args:
        section: settings of the servers.
        model: path and dtype of the model that they serve.
        placement: which GPUs they use, and whether they must be able to release memory.
        run_dir: run directory; logs go to its subfolder sglang/logs.
        seed: the run's seed; each server adds its port to it, so that no two servers sample the same responses.
        num_training_ranks: ranks of this job on this node.
        host: address that the servers listen on. Servers do not authenticate clients.

    Raises:
        UserError: a setting cannot work.
    """
    check_server_args(section)
    first_gpus = placement.server_gpus(num_training_ranks)
    folder = run_dir.absolute() / "sglang"
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    environment = _environment(folder, placement)
    specs = []
    for index in range(section.num_servers):
        port = section.port + index
        command = [str(section.python or sys.executable), "-m", "sglang.launch_server", "--host", host]
        command += ["--port", str(port), *_model_arguments(model), "--tp", str(section.tensor)]
        command += ["--mem-fraction-static", str(section.memory_fraction)]
        command += ["--random-seed", str(seed + port)]
        command += ["--sleep-on-idle"]  # otherwise an idle server keeps a CPU core busy
        if first_gpus is not None:
            command += ["--base-gpu-id", str(first_gpus[index])]
        if placement.colocated:
            command += ["--enable-memory-saver", "--enable-weights-cpu-backup"]
        log = folder / "logs" / f"server_{port}.log"
        # The user's arguments come last, because SGLang uses the last of two equal arguments.
        specs.append(ServerSpec(port, (*command, *section.server_args), environment, log, host))
    return specs


def _environment(folder: Path, placement: Placement) -> dict[str, str]:
    """Return the environment of a server: this process's, without the variables of a rank, with the plug-in."""
    # The servers' interpreter may lack this package. A folder that holds only a link to the package makes it
    # importable there. The package's parent folder would not do: it may hold all other packages of this environment.
    link = folder / "plugin" / "megatron_vcr1"
    _link(link, Path(__file__).parents[2])
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in _RANK_VARIABLES and not key.startswith(_RANK_PREFIXES)
    }
    environment["SGLANG_EXTERNAL_MM_PROCESSOR_PACKAGE"] = PLUGIN
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(link.parent), os.environ.get("PYTHONPATH"))))
    return environment | (_COLOCATED_ENVIRONMENT if placement.colocated else {})


def _model_arguments(model: ModelSection) -> list[str]:
    arguments = ["--model-path", str(model.path.absolute()), "--dtype", model.dtype]
    if any(model.path.glob("*.safetensors")):
        return [*arguments, "--weight-version", INITIAL_WEIGHTS]
    # An imported model or a training checkpoint. SGLang cannot read its weights: it reads the configuration, starts
    # with random weights, and gets the real ones from the first weight sync.
    return [*arguments, "--load-format", "dummy", "--weight-version", NO_WEIGHTS]


def _link(link: Path, package: Path) -> None:
    """Create or correct the link atomically, because several ranks of a node may do it at the same time."""
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.resolve() != package.resolve():
        new = link.with_name(f"{link.name}.{uuid.uuid4().hex}")
        new.symlink_to(package, target_is_directory=True)
        new.replace(link)
