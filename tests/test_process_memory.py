"""The resident memory of the process."""

from __future__ import annotations

import mmap

from megatron_vcr1.process_memory import peak_rss_bytes, reset_peak_rss, rss_bytes


def test_the_peak_includes_what_was_freed_until_it_is_reset() -> None:
    reset_peak_rss()
    before = peak_rss_bytes()
    with mmap.mmap(-1, 80_000_000) as memory:  # new pages: malloc could reuse memory that was freed before
        memory.write(bytes(80_000_000))
        assert rss_bytes() - before > 60e6
    peak = peak_rss_bytes()
    assert peak - before > 60e6
    reset_peak_rss()
    assert peak - peak_rss_bytes() > 60e6
