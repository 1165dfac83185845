#!/usr/bin/env bash
# torch.jit.script looks builtins up by id() in a table that does not keep them alive. Operators whose overloads are
# registered one after the other (torch.library; what torch.compile imports does so) get a new Python function each time: the
# old one is freed, its id stays. Any attribute of a module to be scripted that comes to lie at such an address, such as
# the list of a convolution's padding, passes for the operator, and scripting fails with "builtin cannot be used as a
# value". Seen once in some hundreds of runs of a test suite, in a process that had compiled something before.
#
# Met with torch 2.14.1: shown here by the ids that stay behind. Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "torch==2.14.1" "numpy"
cat > "$folder/table.py" <<'PY'
import sys
import weakref

import torch

print("torch", torch.__version__)
library = torch.library.Library("example", "DEF")
library.define("scale(Tensor x) -> Tensor")
packet = torch.ops.example.scale
function, address = weakref.ref(packet._op), id(packet._op)
library.define("scale.twice(Tensor x, int n) -> Tensor")
said = torch.jit._builtins._get_builtin_table().get(address)
print("one overload more: the packet's function is", "gone" if function() is None else "alive")
print("the table of builtins still has its id, for", said)
if function() is not None or said != "example::scale":
    sys.exit("changed: the id of a freed function stayed in the table of builtins")
import torch._inductor.fx_passes.quantization  # noqa: E402, F401

stale = [
    name
    for key, name in torch.jit._builtins._get_builtin_table().items()
    if name.startswith("quantized_decomposed::")
    and key not in {id(each._op) for each in vars(torch.ops.quantized_decomposed).values() if hasattr(each, "_op")}
]
print(f"what torch.compile imports leaves {len(stale)} such ids: {sorted(set(stale))}")
if not stale:
    sys.exit("changed: importing torch.compile's parts left ids of freed operators")
PY
"$folder/venv/bin/python" "$folder/table.py"
