#!/usr/bin/env bash
# compat.sh TORCH_VERSION...: check the wheel in dist/ on each version of torch, in environments of their own.
#
# torch is installed without its CUDA libraries where it imports without them (a CPU build, or a loader that finds
# none and goes on), and with them otherwise: that downloads gigabytes.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
wheel=$(ls dist/*.whl)

for torch in "$@"; do
  environment=build/compat/torch-$torch
  bin=$environment/bin
  echo "== torch $torch"
  if [ ! -e "$environment/.ready" ]; then
    rm -rf "$environment"
    "$python" -m venv "$environment"
    "$bin/python" -m pip --disable-pip-version-check install --quiet --no-deps "torch==$torch"
    "$bin/python" -m pip --disable-pip-version-check install --quiet \
      numpy typing-extensions sympy networkx jinja2 fsspec filelock "setuptools>=77"
    if ! "$bin/python" -c 'import torch' 2>/dev/null; then
      echo "torch $torch does not import without its CUDA libraries: installing those too"
      "$bin/python" -m pip --disable-pip-version-check install "torch==$torch"
    fi
    touch "$environment/.ready"
  fi
  "$bin/python" -m pip --disable-pip-version-check install --quiet --no-deps --force-reinstall "$wheel"
  (cd "$environment" && bin/python -W error::UserWarning ../../../tests/check_wheel.py)
done
