#!/usr/bin/env bash
# Creates .venv/sglang, in which the tests run a real SGLang server on the CPU. The first time takes one or two minutes
# and 620 MB of disk space.
#
# SGLang's own requirements are several gigabytes of CUDA packages. sglang_requirements.txt lists only the packages that
# its Qwen-VL path imports on a CPU, and they are installed without dependencies. torch, transformers and the others come
# from .venv, which tools/venv.sh creates. sglang_cpu/ replaces two packages that are compiled for CUDA.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv/sglang
# The hash of everything that determines the environment. An environment contains its own path, so it cannot be moved.
fingerprint() {
    { pwd; .venv/bin/python --version; cat tools/sglang_venv.sh tools/sglang_requirements.txt; find tools/sglang_cpu -name '*.py' -exec cat {} +; } |
        sha256sum | cut -d ' ' -f 1
}

if [ "$(cat $venv/installed.sha256 2>/dev/null)" = "$(fingerprint)" ]; then
    exit 0
fi
echo "installing SGLang into $venv"
.venv/bin/python -m venv --clear $venv
site=$($venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# Append the packages of .venv to sys.path, so that trainer and server use the same torch and transformers.
.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$site/tests_environment.pth"
$venv/bin/python -m pip -qq --disable-pip-version-check install --no-deps --requirement tools/sglang_requirements.txt
cp -r tools/sglang_cpu/. "$site"
fingerprint >$venv/installed.sha256
