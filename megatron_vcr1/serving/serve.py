"""Loads a model and serves it until the process is told to end."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType

from megatron_vcr1.checkpoint.load import load_model_weights
from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.data.processor import PromptProcessor
from megatron_vcr1.errors import UserError
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.video_language_model import build_model
from megatron_vcr1.parallel import mesh
from megatron_vcr1.rollout.build import build_local_engine
from megatron_vcr1.rollout.special_tokens import SpecialTokens, read_repetition_penalty
from megatron_vcr1.serving.app import Limits
from megatron_vcr1.serving.server import ChatServer


def serve(
    config: RunConfig, address: tuple[str, int], limits: Limits, *, name: str | None, extra_hosts: Sequence[str]
) -> None:
    """Serve a model until SIGTERM or Ctrl-C.

    Args:
        config: the model and its layout, which must be one process.
        address: host and port; port 0 takes any free port, which is printed.
        limits: limits on requests; the repetition penalty is the model's own.
        name: the model's name for clients; None takes the name of its folder.
        extra_hosts: further host names that clients may use.

    Raises:
        UserError: the model or the address cannot be used, or the job has several processes.
    """
    if mesh.launched_world_size() > 1:
        raise UserError("vcr1 serve is one process; for a model that needs several, serve its export with SGLang")
    folder = config.model.path
    penalty = read_repetition_penalty(folder)
    limits = replace(limits, repetition_penalty=penalty)
    model_config = ModelConfig.from_pretrained(folder)
    processor = PromptProcessor.from_pretrained(folder, model_config)
    tokens = SpecialTokens.from_pretrained(folder, processor, model_config.num_embeddings)
    with mesh.world(config.parallel):
        model = build_model(model_config, config.model, config.parallel, config.recompute).to(mesh.device()).eval()
        load_model_weights(model, folder)
        engine = build_local_engine(config.rollout, model, processor, tokens)
        host, port = address
        try:
            server = ChatServer(address, name or folder.resolve().name, engine, processor, limits, extra_hosts)
        except (OSError, OverflowError) as error:
            raise UserError(f"--host {host} --port {port}: {error}; choose another address") from error
        with server.listening(), _stopped_by_sigterm(server):
            if penalty != 1:
                print(f"repetition_penalty: {penalty} from generation_config.json, for requests that set none")
            shown = f"[{host}]" if ":" in host else host
            print(f"{server.name}: http://{shown}:{server.port}/v1", flush=True)
            server.run()


@contextmanager
def _stopped_by_sigterm(server: ChatServer) -> Iterator[None]:
    """Let SIGTERM end the server after the batch that is running; a second SIGTERM ends the process at once."""

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        server.stop()

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
