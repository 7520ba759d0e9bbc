"""The resident memory of this process, read from /proc (Linux).

getrusage is not an alternative: after fork and exec, its peak includes the memory of the parent process.
Linux counts pages per core and adds them up now and then: values are exact to a few hundred kilobytes only.
"""

from __future__ import annotations

from pathlib import Path


def rss_bytes() -> int:
    """Return the resident memory."""
    return _status_bytes("VmRSS")


def peak_rss_bytes() -> int:
    """Return the peak of the resident memory since the process started, or since the last reset."""
    return _status_bytes("VmHWM")


def reset_peak_rss() -> None:
    """Start a new peak at the present resident memory."""
    Path("/proc/self/clear_refs").write_text("5")  # 5 resets VmHWM


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{field}:"))) * 1024
