#!/usr/bin/env bash
# Lint, types and tests, on a machine that has Python 3.11 and nothing else. Arguments go to pytest:
#   bash tools/test.sh [-k NAME] [-n WORKERS] [tests/...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash tools/venv.sh
.venv/bin/ruff check
.venv/bin/ruff format --check
.venv/bin/mypy
exec .venv/bin/python -m pytest -n 2 --dist loadgroup "$@"
