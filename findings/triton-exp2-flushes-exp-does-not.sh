#!/usr/bin/env bash
# Triton compiles tl.exp2 of float32 to NVIDIA's ex2.approx.ftz, which gives 0 for every result below 2^-126, and
# tl.exp to ex2.approx, which gives the subnormal number, for every architecture. exp(x) is exp2(x·log2 e), and kernels
# are often rewritten from the one to the other "to save a multiplication": that changes what they return below 1e-38.
# No GPU is needed: the kernels are compiled ahead of time, and PTX is read. TRITON_INTERPRET=1 cannot show it, since
# NumPy computes there.
#
# Met with triton 3.8.0. Fails if the instructions are others.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "triton==3.8.0"
export TRITON_CACHE_DIR="$folder/cache"
cat > "$folder/flushes.py" <<'PY'
import re
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def exp(x, y, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(y + i, tl.exp(tl.load(x + i)))


@triton.jit
def exp2(x, y, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(y + i, tl.exp2(tl.load(x + i)))


def instruction(kernel, architecture):
    source = ASTSource(kernel, {"x": "*fp32", "y": "*fp32", "n": "constexpr"}, constexprs={(2,): 128})
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32))
    return " ".join(sorted(set(re.findall(r"ex2\S+", compiled.asm["ptx"]))))


print("triton", triton.__version__)
found = {(k, a): instruction({"exp": exp, "exp2": exp2}[k], a) for k in ("exp", "exp2") for a in (80, 90, 100)}
for (kernel, architecture), name in found.items():
    print(f"tl.{kernel:<5} sm_{architecture:<4} {name}")
expected = {"exp": "ex2.approx.f32", "exp2": "ex2.approx.ftz.f32"}
if any(found[key] != expected[key[0]] for key in found):
    sys.exit("changed: tl.exp2 flushed to zero (.ftz) and tl.exp did not")
print("tl.exp2 flushes results below 2^-126 to 0, tl.exp does not")
PY
"$folder/venv/bin/python" "$folder/flushes.py"
