#!/usr/bin/env bash
# Makes .venv/sglang, in which the tests run a real SGLang server on the CPU; a minute or two and 620 MB the first time.
#
# SGLang's own requirements are for CUDA, several gigabytes of them. What its Qwen-VL path imports on a CPU is listed in
# sglang_requirements.txt, without dependencies; torch, transformers and the rest it takes from .venv, which
# tools/venv.sh makes. sglang_cpu/ holds two stand-ins for what is compiled for CUDA (they say what they do).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv/sglang
# The place of .venv is written into it.
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
# After its own packages on sys.path, the tests' environment: the same torch and transformers on both sides.
.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$site/tests_environment.pth"
$venv/bin/python -m pip -qq --disable-pip-version-check install --no-deps --requirement tools/sglang_requirements.txt
cp -r tools/sglang_cpu/. "$site"
fingerprint >$venv/installed.sha256
