"""A reward that keeps a run in its step, so that a test can do something to the job before the run ends."""

from __future__ import annotations

import os
import time
from pathlib import Path

from megatron_vcr1.types import Sample
from tests.training import own_rewards


def variety(sample: Sample, completion: str) -> float:
    """Wait while the file that the environment variable GATE names exists; then return `own_rewards.variety`."""
    while Path(os.environ["GATE"]).exists():
        time.sleep(0.05)
    return own_rewards.variety(sample, completion)
