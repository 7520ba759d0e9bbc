"""The disk channel: a Hugging Face directory, from which servers load the weights."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import save_file

from megatron_vcr1.rollout.sglang.channels.base import NamedTensors
from megatron_vcr1.rollout.sglang.http import call


class DiskChannel:
    """A `Channel` that writes each bucket to a file, and makes servers load the directory at the end.

    The directory stays until the next version is complete, because restarted servers load it, too.
    """

    def __init__(self, model_dir: Path, folder: Path, version: str, *, timeout_s: float) -> None:
        """Create the directory, without weights.

        Args:
            model_dir: a model directory, from which configuration, tokenizer and processor files are copied.
            folder: parent folder of the directories of all versions.
            version: weight version, which is the name of the directory.
            timeout_s: maximum time for a server to load the weights.
        """
        self.directory = folder / version
        self._timeout_s = timeout_s
        self._num_files = 0
        shutil.rmtree(self.directory, ignore_errors=True)  # left by an attempt that has failed
        self.directory.mkdir(parents=True)
        for source in model_dir.iterdir():
            # The index of the model's own weight files would hide the new files.
            if source.suffix in (".json", ".jinja", ".txt", ".model") and not source.name.endswith(".index.json"):
                shutil.copy(source, self.directory)

    def begin(self, url: str) -> None:
        """Do nothing: SGLang reads all files in one call, at the end."""

    def prepare(self, bucket: NamedTensors) -> None:
        self._num_files += 1
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in bucket}
        save_file(tensors, self.directory / f"model-{self._num_files:05}.safetensors", {"format": "pt"})

    def send(self, url: str, prepared: None) -> None:
        """Do nothing: the file is written, and servers read it in `finish`."""

    def finish(self, url: str) -> None:
        body = {"model_path": str(self.directory), "load_format": "auto"}
        call(url, "POST", "/update_weights_from_disk", body, timeout_s=self._timeout_s)

    def abort(self, url: str) -> None:
        """Do nothing: there is no state per server."""

    def remove_other_versions(self) -> None:
        """Remove the directories of other versions. Call it once a server has loaded this one."""
        for other in self.directory.parent.iterdir():
            if other != self.directory:
                shutil.rmtree(other)
