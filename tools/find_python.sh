#!/usr/bin/env bash
# Prints the first Python whose version is one of those given, or fails with a message:
#   bash tools/find_python.sh 3.12 3.13
# Looks on PATH, then among the versions that pyenv has installed. PYTHON=/path/to/python names one instead.
set -euo pipefail

for version in "$@"; do
    for candidate in ${PYTHON:-"python$version" python3 "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/python}; do
        found=$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
        if [ "$found" = "$version" ]; then
            echo "$candidate"
            exit
        fi
    done
done
echo "found no Python ${*}${PYTHON:+ (PYTHON is $PYTHON)}; install one, or set PYTHON=/path/to/python" >&2
exit 1
