"""A warning about installed libraries that are newer than those that the project is tested with.

setup.py bounds the versions that pip installs; a container can bring others.
"""

from __future__ import annotations

import logging
from functools import cache
from importlib.metadata import PackageNotFoundError, version

logger = logging.getLogger(__name__)

NEWEST_TESTED = {
    "torch": "2.14",
    "megatron-core": "0.19",
    "transformers": "5.24",
    "triton": "3.8",
    "transformer-engine": "2.20",
    "av": "19",
    "numpy": "2.5",
}


@cache
def warn_about_untested_versions() -> None:
    """Log a warning for each installed library that is newer than `NEWEST_TESTED`, once per process."""
    for package, tested in NEWEST_TESTED.items():
        try:
            installed = version(package)
        except PackageNotFoundError:
            continue
        known = _numbers(tested)
        if _numbers(installed)[: len(known)] > known:
            logger.warning(
                "%s %s is newer than %s, the newest version that megatron_vcr1 is tested with",
                package,
                installed,
                tested,
            )


def _numbers(version_text: str) -> list[int]:
    """Return major and minor number, or the major number of a version that has no other."""
    return [int(part) for part in version_text.split(".")[:2]]
