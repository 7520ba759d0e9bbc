"""A warning about installed libraries that are newer than those that the project is tested with.

setup.py bounds the versions that pip installs; a container can bring others.
"""

from __future__ import annotations

import logging
from functools import cache
from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

logger = logging.getLogger(__name__)

NEWEST_TESTED = {
    "torch": "2.15",
    "megatron-core": "0.19",
    "transformers": "5.24",
    "triton": "3.9",
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
        known = Version(tested).release
        if Version(installed).release[: len(known)] > known:
            logger.warning(
                "%s %s is newer than %s, the newest version that megatron_vcr1 is tested with",
                package,
                installed,
                tested,
            )
