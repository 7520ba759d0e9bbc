from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.limits import HANG_S
from tests.serving.requests import ServerProcess
from tests.training import workspace


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose chat template knows images too, and two videos."""
    folder = workspace.create(tmp_path_factory.mktemp("serve"), num_videos=2)
    template = folder / "model" / "chat_template.jinja"
    picture = "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% elif part.type == 'video' %}"
    template.write_text(template.read_text().replace("{% if part.type == 'video' %}", picture))
    return folder


@pytest.fixture(scope="session")
def server(folder: Path) -> Iterator[ServerProcess]:
    """`vcr1 serve` in a process of its own. No test may make it log a traceback."""
    options = ["--files", str(folder / "data"), "--max-new-tokens", "12", "--max-prompt-tokens", "400", "--batch", "4"]
    with ServerProcess(folder / "model", *options, "--allowed-host", "proxy.example") as server:
        yield server
        assert "Traceback" not in server.errors()


@pytest.fixture(scope="session")
def client(server: ServerProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=HANG_S)
