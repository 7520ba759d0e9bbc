"""The imports of multi-process tests. A fork server imports this module once, and its processes then start at once."""

from __future__ import annotations

import gc
from importlib.util import find_spec

if find_spec("megatron") is not None:  # missing on a machine that runs tests/kernels only
    import megatron_vcr1.cli.main
    import megatron_vcr1.evaluation.evaluate
    import megatron_vcr1.evaluation.log_probs
    import megatron_vcr1.evaluation.single_prompt
    import megatron_vcr1.training.train  # noqa: F401
    import tests.checkpoint.toy_run  # noqa: F401

# Garbage collections skip frozen objects. For these half a million, each collection would take 0.2 s, and copy their
# pages in a fork.
gc.collect()
gc.freeze()
