"""Computes per-token log-probs of given responses in any parallel layout (`vcr1 score`)."""

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
from megatron_vcr1.data.messages import MessageError, check_text
from megatron_vcr1.data.packing import Group, pack_groups
from megatron_vcr1.data.processor import PromptProcessor
from megatron_vcr1.data.video_types import VideoError
from megatron_vcr1.errors import UserError
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.context_shard import pack_for_rank
from megatron_vcr1.model.mrope import check_prompt
from megatron_vcr1.model.packed_batch import PackedBatch
from megatron_vcr1.model.video_language_model import VideoLanguageModel, build_model
from megatron_vcr1.parallel import collectives, mesh, schedule
from megatron_vcr1.parallel.prompts import broadcast_prompts
from megatron_vcr1.text_files import parse_json, read_lines

# Requests that a replica encodes before it computes: enough microbatches to fill a pipeline, and few enough videos to
# hold in memory.
REQUESTS_PER_ROUND = 16


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """A prompt and the response to score."""

    id: str
    messages: list[dict[str, Any]]
    response: str | list[int]


@dataclass(frozen=True, slots=True)
class FailedRequest:
    """A request that cannot be encoded, and the reason."""

    id: str
    error: str


def read_requests(path: Path) -> list[ScoreRequest]:
    """Read and check all lines before anything is computed.

    Raises:
        UserError: the file is missing, or a line is malformed; names the line and the key.
    """
    requests, seen = [], set()
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        request = _parse_request(line, f"{path}:{number}")
        if request.id in seen:
            raise UserError(f"{path}:{number}: id {request.id!r} appears twice; every line needs its own id")
        seen.add(request.id)
        requests.append(request)
    if not requests:
        raise UserError(f"{path}: the file holds no requests")
    return requests


def _parse_request(line: str, where: str) -> ScoreRequest:
    row = parse_json(line, where)
    if not isinstance(row, dict) or not {"id", "messages", "response"} <= row.keys():
        raise UserError(f'{where}: needs the keys "id", "messages" and "response"')
    messages, response = row["messages"], row["response"]
    if not isinstance(messages, list) or not all(
        isinstance(message, dict) and {"role", "content"} <= message.keys() for message in messages
    ):
        raise UserError(f'{where}: "messages" must be a list of {{"role", "content"}}')
    is_ids = isinstance(response, list) and all(type(id) is int and id >= 0 for id in response)
    if not (isinstance(response, str) or is_ids) or not response:
        raise UserError(f'{where}: "response" must be a non-empty text or a non-empty list of token ids')
    return ScoreRequest(str(row["id"]), messages, response)


def write_log_probs(run: RunConfig, data: Path, out: Path, *, temperature: float, microbatch_tokens: int) -> int:
    """Compute the log-probs of a file of requests. All ranks of the job call this.

    The rows are in the order of the requests: ``{"id", "token_ids", "log_probs"}``, or ``{"id", "error"}`` for a
    request that cannot be computed, for example because its video cannot be read. The file appears under its name when
    it is complete.

    Args:
        run: the model and its layout.
        data: the requests.
        out: the file to write.
        temperature: logits are divided by this before the softmax.
        microbatch_tokens: number of tokens that are computed at once.

    Returns:
        The number of requests that failed.

    Raises:
        UserError: before anything is computed, if the requests, the model or the layout are invalid.
    """
    requests = read_requests(data)
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise UserError(f"{out}: must be a file in an existing folder; it is written at the end")
    config = ModelConfig.from_pretrained(run.model.path)
    check_layout(config.shape, run.parallel, run.recompute, mesh.launched_world_size())
    processor = PromptProcessor.from_pretrained(run.model.path, config)
    with mesh.world(run.parallel):
        model = build_model(config, run.model, run.parallel, run.recompute).to(mesh.device()).eval()
        load_model_weights(model, run.model.path)
        scorer = LogProbScorer(model, processor, temperature, microbatch_tokens)
        return _write_rows(scorer, requests, out)


class LogProbScorer:
    """A loaded model with its prompt processor.

    All ranks of a replica call it together, with the same requests.
    """

    def __init__(
        self, model: VideoLanguageModel, processor: PromptProcessor, temperature: float, microbatch_tokens: int
    ) -> None:
        self.model = model
        self.processor = processor
        self.temperature = temperature
        self.microbatch_tokens = microbatch_tokens

    def score(self, requests: Sequence[ScoreRequest]) -> dict[str, dict[str, Any]]:
        """Return the row of each request by id, on the replica's output rank; an empty dict on the other ranks."""
        # The replica leader encodes; the other ranks receive the groups.
        encoded = broadcast_prompts(lambda: [self._encode(request) for request in requests])
        ready = [item for item in encoded if isinstance(item, Group)]
        rows = self._log_probs(ready) if ready else {}
        rows |= {item.id: {"id": item.id, "error": item.error} for item in encoded if isinstance(item, FailedRequest)}
        return rows if mesh.is_output_rank() else {}

    def _encode(self, request: ScoreRequest) -> Group | FailedRequest:
        """Decode, resize and tokenize a request. An error in it must not affect the rows of other requests."""
        try:
            return self._encode_checked(request)
        except (MessageError, VideoError) as error:  # the message names the part or the file
            return FailedRequest(request.id, str(error))

    def _encode_checked(self, request: ScoreRequest) -> Group | FailedRequest:
        response = request.response
        vocab_size = self.model.model_config.text.vocab_size
        # Checked before the conversion to a tensor, which fails for integers above 64 bits.
        if not isinstance(response, str) and max(response) >= vocab_size:
            return FailedRequest(request.id, f"token id {max(response)} is not in the vocabulary of {vocab_size}")
        if isinstance(response, str):
            check_text(response, "response")
        token_ids = self.processor.tokenize_text(response) if isinstance(response, str) else torch.tensor(response)
        if not len(token_ids):
            return FailedRequest(request.id, "the tokenizer returns no tokens for the response")
        if int(token_ids.max()) >= vocab_size:
            return FailedRequest(
                request.id, f"token id {int(token_ids.max())} is not in the vocabulary of {vocab_size}"
            )
        prompt = encode_messages(request.messages, self.processor)
        try:
            check_prompt(prompt, self.model.model_config, len(token_ids) - 1)
        except UserError as error:
            return FailedRequest(request.id, str(error))
        return Group(request.id, prompt, (token_ids,))

    def _log_probs(self, ready: Sequence[Group]) -> dict[str, dict[str, Any]]:
        """Return the rows with log-probs, on the ranks of the last stage."""
        microbatches = pack_groups(ready, self.microbatch_tokens)
        batches = [
            pack_for_rank(microbatch, self.model.model_config, pad_to_multiple_of=self.model.token_multiple)
            for microbatch in microbatches
        ]

        def collect(batch: PackedBatch, hidden: Tensor) -> Tensor:
            values = self.model.log_probs(hidden, batch.target_ids, temperature=self.temperature)
            return batch.gather_targets(values).cpu()

        results = schedule.forward_only(self.model, [batch.to(mesh.device()) for batch in batches], collect)
        rows = {}
        # Only the last stage has results, so the two sequences may differ in length.
        for microbatch, values in zip(microbatches, results, strict=False):
            responses = [group.responses[0] for group in microbatch]
            parts = values.split(list(map(len, responses)))
            for group, response, log_probs in zip(microbatch, responses, parts, strict=True):
                rows[group.id] = {"id": group.id, "token_ids": response.tolist(), "log_probs": log_probs.tolist()}
        return rows


def _write_rows(scorer: LogProbScorer, requests: Sequence[ScoreRequest], out: Path) -> int:
    """Write the rows of all replicas, round by round. All ranks call it, and the first rank writes."""
    writes = mesh.is_first_rank()
    partial = out.with_name(f".{out.name}.partial")
    num_failed = 0
    num_replicas = mesh.num_replicas()
    with (
        tqdm(total=len(requests), unit="response", disable=not writes, desc="score") as bar,
        _open_for_writing(partial if writes else None) as file,
    ):
        for start in range(0, len(requests), num_replicas * REQUESTS_PER_ROUND):
            chunk = requests[start : start + num_replicas * REQUESTS_PER_ROUND]
            mine = scorer.score(chunk[mesh.replica_index() :: num_replicas])
            gathered = collectives.gather_objects(mine)  # all ranks call it
            rows = {id: row for part in gathered for id, row in part.items()}
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
    except BaseException:  # a failure or Ctrl-C leaves no partial file
        path.unlink(missing_ok=True)
        raise
