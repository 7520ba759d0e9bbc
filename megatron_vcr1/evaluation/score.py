"""Per-token log-probs of given responses, at any tensor- and pipeline-parallel size."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_vcr1.checkpoint.load import load_model_weights
from megatron_vcr1.config.layout import check_layout
from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.data.encoding import encode_messages
from megatron_vcr1.data.packing import Group, pack_groups
from megatron_vcr1.data.processor import PromptProcessor, read_processor
from megatron_vcr1.errors import UserError
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.packed_batch import PackedBatch, pack
from megatron_vcr1.model.qwen_vl import QwenVLModel, build_model
from megatron_vcr1.parallel import collectives, mesh, schedule
from megatron_vcr1.parallel.prompts import broadcast_prompts

# Requests that one copy of the model encodes before it computes: enough microbatches to fill a pipeline, few enough
# videos to hold.
REQUESTS_A_ROUND = 16


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """A prompt and the response to be scored behind it."""

    id: str
    messages: list[dict[str, Any]]
    response: str | list[int]


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A request whose own files or text are at fault."""

    id: str
    error: str


def read_requests(path: Path) -> list[ScoreRequest]:
    """Read and check all lines before anything is computed.

    Raises:
        UserError: the file is missing, or a line is not what it should be; names the line and the key.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: a text may hold Unicode's separators
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    requests, seen = [], set()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        request = _parse_request(line, f"{path}:{number}")
        if request.id in seen:
            raise UserError(f"{path}:{number}: id {request.id!r} appears twice; give every line an id of its own")
        seen.add(request.id)
        requests.append(request)
    if not requests:
        raise UserError(f"{path}: no requests in it")
    return requests


def _parse_request(line: str, where: str) -> ScoreRequest:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON: {error}") from None
    if not isinstance(row, dict) or not {"id", "messages", "response"} <= row.keys():
        raise UserError(f'{where}: needs the keys "id", "messages" and "response"')
    messages, response = row["messages"], row["response"]
    if not isinstance(messages, list) or not all(
        isinstance(one, dict) and {"role", "content"} <= one.keys() for one in messages
    ):
        raise UserError(f'{where}: "messages" must be a list of {{"role", "content"}}')
    is_ids = isinstance(response, list) and all(type(one) is int and one >= 0 for one in response)
    if not (isinstance(response, str) or is_ids) or not response:
        raise UserError(f'{where}: "response" must be a text or a list of token ids, and not empty')
    return ScoreRequest(str(row["id"]), messages, response)


def score_file(run: RunConfig, data: Path, out: Path, *, temperature: float, microbatch_tokens: int) -> int:
    """Score a file of requests; every rank of the job calls this.

    Rows come out in the order of the requests: ``{"id", "token_ids", "log_probs"}``, or ``{"id", "error"}`` for a
    request whose image or video cannot be read. The file appears under its name when it is whole.

    Returns:
        How many requests failed.

    Raises:
        UserError: before anything is computed, if the requests, the model or the layout are at fault.
    """
    requests = read_requests(data)
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise UserError(f"{out}: must be a file in a folder that exists; it is written at the end")
    config = ModelConfig.from_pretrained(run.model.path)
    check_layout(config.shape, run.parallel, run.recompute, mesh.launched_world_size())
    processor = read_processor(run.model.path)
    with mesh.world(run.parallel):
        model = build_model(config, run).to(mesh.device()).eval()
        load_model_weights(model, run.model.path)
        scorer = Scorer(model, processor, temperature, microbatch_tokens)
        return _write_rows(scorer, requests, out)


class Scorer:
    """A loaded model, and what turns requests into its input.

    The ranks of one copy of the model call it together, with the same requests.
    """

    def __init__(
        self, model: QwenVLModel, processor: PromptProcessor, temperature: float, microbatch_tokens: int
    ) -> None:
        self.model = model
        self.processor = processor
        self.temperature = temperature
        self.microbatch_tokens = microbatch_tokens

    def score(self, requests: Sequence[ScoreRequest]) -> dict[str, dict[str, Any]]:
        """The row of each request, by id, on the copy's first rank of the last stage; nothing on the others."""
        encoded = broadcast_prompts(lambda: [self._encode(request) for request in requests])
        ready = [one for one in encoded if isinstance(one, Group)]
        rows = self._log_probs(ready) if ready else {}
        rows |= {one.id: {"id": one.id, "error": one.error} for one in encoded if isinstance(one, Unreadable)}
        return rows if mesh.is_output_rank() else {}

    def _encode(self, request: ScoreRequest) -> Group | Unreadable:
        """Decode, resize and tokenize."""
        response = request.response
        token_ids = self.processor.tokenize(response) if isinstance(response, str) else torch.tensor(response)
        vocab_size = self.model.model_config.text.vocab_size
        if not len(token_ids):
            return Unreadable(request.id, "the tokenizer makes no tokens of the response")
        if int(token_ids.max()) >= vocab_size:
            return Unreadable(request.id, f"token id {int(token_ids.max())} is not in the vocabulary of {vocab_size}")
        try:
            return Group(request.id, encode_messages(request.messages, self.processor), (token_ids,))
        except ValueError as error:  # a VideoError too
            return Unreadable(request.id, str(error))

    def _log_probs(self, ready: Sequence[Group]) -> dict[str, dict[str, Any]]:
        """Rows with log-probs, on the last stage."""
        config = self.model.config
        pad_to_multiple_of = config.tensor_model_parallel_size if config.sequence_parallel else 1
        longest = max(group.num_tokens for group in ready)
        microbatches = pack_groups(ready, max(self.microbatch_tokens, longest))
        batches = [pack(one, self.model.model_config, pad_to_multiple_of=pad_to_multiple_of) for one in microbatches]

        def collect(batch: PackedBatch, hidden: Tensor) -> tuple[Tensor, ...]:
            values = self.model.log_probs(hidden, batch.target_ids, temperature=self.temperature)
            return values.cpu().split(batch.response_lengths)

        results = schedule.forward_only(self.model, [batch.to(mesh.device()) for batch in batches], collect)
        return {
            group.id: {"id": group.id, "token_ids": group.responses[0].tolist(), "log_probs": log_probs.tolist()}
            for microbatch, values in zip(microbatches, results, strict=False)  # no results but on the last stage
            for group, log_probs in zip(microbatch, values, strict=True)
        }


def _write_rows(scorer: Scorer, requests: Sequence[ScoreRequest], out: Path) -> int:
    """Rank 0 writes what all copies of the model compute, round by round."""
    writes = mesh.is_first_rank()
    partial = out.with_name(f".{out.name}.partial")
    num_failed = 0
    copies = mesh.num_replicas()
    with (
        tqdm(total=len(requests), unit="response", disable=not writes, desc="score") as bar,
        _open_for_writing(partial if writes else None) as file,
    ):
        for start in range(0, len(requests), copies * REQUESTS_A_ROUND):
            chunk = requests[start : start + copies * REQUESTS_A_ROUND]
            mine = scorer.score(chunk[mesh.replica_index() :: copies])
            rows = {name: row for part in collectives.gather_objects(mine) for name, row in part.items()}
            for request in chunk:
                row = rows[request.id]
                num_failed += "error" in row
                if file is not None:
                    file.write(json.dumps(row) + "\n")
            bar.update(len(chunk))
    if writes:
        os.replace(partial, out)
        explanation = " (their rows say why)" if num_failed else ""
        print(f"{len(requests) - num_failed} scored, {num_failed} failed{explanation}: {out}")
    return num_failed


@contextmanager
def _open_for_writing(path: Path | None) -> Iterator[TextIO | None]:
    if path is None:
        yield None
        return
    try:
        with path.open("w", encoding="utf-8") as file:
            yield file
    except BaseException:  # a failure or Ctrl-C leaves nothing behind
        path.unlink(missing_ok=True)
        raise
