"""The operators themselves: schemas, fakes, the table of backends, and who is told what."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import Sample, draw

import afm_kernels
from afm_kernels import ops, softmax_kl_div, use_backend

OPCHECKED = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
# test_autograd_registration is left out: autograd lives outside the operators, see afm_kernels/autograd.


def arguments_of(op: str, sample: Sample) -> tuple[Any, ...]:
    """Arguments of a loss operator for a sample."""
    student, teacher = sample.class_last()
    if op == "softmax_kl_direction":
        # Rows of weight 0 may hold anything, and a NaN is not equal to itself.
        return student.nan_to_num(0, 0, 0), teacher.nan_to_num(0, 0, 0), 2.0, True, False
    weight = sample.operator_row_weight()
    labels = sample.labels()
    classes = torch.rand(student.shape, device=student.device).to(ops.accumulation_dtype(student, teacher))
    stem, kind = (
        op.rsplit("_", 1) if not op.startswith("softmax_kl") else ("softmax_kl", op[len("softmax_kl_") :])
    )
    for name in ("softmax_kl", "distillation", "dkl"):
        if op.startswith(name):
            stem, kind = name, op[len(name) + 1 :]
    tensors = {"softmax_kl": (weight,), "distillation": (labels, weight), "dkl": (classes, weight)}[stem]
    params = {
        "softmax_kl": (2.0, 3, 0.3),
        "distillation": (2.0, 0.4, 0.1, -100),
        "dkl": (2.0, 1.5, 0.7, 1.3),
    }[stem]
    grad_params = (True,) if stem == "dkl" else ()
    forward = (student, teacher, *tensors, *params)
    if kind == "forward":
        return *forward, 0, 0.5
    if kind == "forward_backward":
        return *forward, 0.5, 0.7, True, True
    if kind == "forward_grad":
        return *forward, *grad_params, 1, 0.5, True, False
    if kind == "grad":
        return *forward, 0.5, True, True
    if kind == "grad_out":
        return *forward, 0.5, torch.empty_like(student), torch.empty_like(teacher)
    _, stats = getattr(getattr(torch.ops, NAMESPACE), f"{stem}_forward")(*forward, 1, 0.5)
    grad_loss = torch.ones((), dtype=ops.accumulation_dtype(student, teacher), device=student.device)
    return grad_loss, student, teacher, *tensors, stats, *params, *grad_params, 0.5, True, True


NAMESPACE = "afm_kernels"
LOSS_OPERATORS = [op for op in ops.SCHEMAS if op.startswith(("softmax_kl", "distillation", "dkl"))]


def served_operators() -> list[Any]:
    """The loss operators that some compiled or interpreted kernel serves here."""
    found = []
    for op in LOSS_OPERATORS:
        for device in ops.DEVICES:
            if device == "cuda" and not torch.cuda.is_available():
                continue
            for backend in set(ops.TABLE[op, device]) - {"reference"}:
                marks = [pytest.mark.gpu] if device == "cuda" else []
                found.append(pytest.param(op, backend, device, id=f"{op}-{backend}-{device}", marks=marks))
    return found


@pytest.mark.parametrize(("op", "backend", "device_type"), served_operators())
@pytest.mark.parametrize("name", ["weighted", "sliced", "channels_last"])
def test_opcheck(op: str, backend: str, device_type: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the schema says about mutation and aliasing is true, and the fake gives the real outputs' metadata."""
    namespace = "afm_kernels_triton" if backend == "triton" else "afm_kernels"
    monkeypatch.setattr(sys.modules[__name__], "NAMESPACE", namespace)
    operator = getattr(getattr(torch.ops, namespace), op).default
    torch.library.opcheck(operator, arguments_of(op, draw(name, device=device_type)), test_utils=OPCHECKED)


# The backwards' outputs are those of forward_grad, and out= has none.
@pytest.mark.parametrize(
    "op",
    [op for op in LOSS_OPERATORS if not op.endswith(("_backward", "out")) or op.endswith("forward_backward")],
)
@pytest.mark.parametrize("name", ["weighted", "sliced", "channels_last", "vector", "no_rows"])
def test_fake_has_the_metadata_of_the_reference(op: str, name: str) -> None:
    """A fake that promises other strides than a backend returns makes compiled code read the wrong memory."""
    sample = draw(name)
    arguments = arguments_of(op, sample)
    real = getattr(afm_kernels.reference, op)(*arguments)
    with torch._subclasses.FakeTensorMode() as mode:
        fake_arguments = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
        fake = getattr(torch.ops.afm_kernels, op).default(*fake_arguments)
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def test_every_operator_has_both_namespaces_a_fake_and_a_reference() -> None:
    for op in ops.SCHEMAS:
        schema = getattr(torch.ops.afm_kernels, op).default._schema
        twin = getattr(torch.ops.afm_kernels_triton, op).default._schema
        assert str(schema).split("(", 1)[1] == str(twin).split("(", 1)[1]
        if op != "cpu_capability":
            for device in ops.DEVICES:
                assert "reference" in ops.TABLE[op, device]


def test_auto_prefers_compiled_kernels() -> None:
    info = afm_kernels.backend_info()
    for (op, device), served in ops.TABLE.items():
        chosen = info["serves"][f"{op}/{device}"]
        if device == "cpu":
            assert chosen == ("cpp" if "cpp" in served else "reference")
        else:
            assert chosen == next(b for b in ops.BACKENDS if b in served)


def test_use_backend() -> None:
    assert ops.backend_for("softmax_kl_forward", "mps") == "reference"  # a device without kernels of ours
    with use_backend("reference"):
        assert ops.backend_for("softmax_kl_forward", "cpu") == "reference"
        with use_backend("auto"):
            assert (
                ops.backend_for("softmax_kl_forward", "cpu")
                == afm_kernels.backend_info()["serves"]["softmax_kl_forward/cpu"]
            )
        assert ops.backend_for("softmax_kl_forward", "cpu") == "reference"
        assert afm_kernels.backend_info()["selected"] == "reference"
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert afm_kernels.backend_info()["selected"] == "auto"


def test_use_backend_refuses() -> None:
    with pytest.raises(
        ValueError, match=r"backend is 'cudnn'; allowed: 'cpp', 'cuda', 'reference', 'triton', 'auto'"
    ):
        use_backend("cudnn").__enter__()
    for backend, status in ops.STATUS.items():
        if not any(backend in served for served in ops.TABLE.values()):
            with pytest.raises(RuntimeError, match=f"backend '{backend}' is not available here"):
                use_backend(backend).__enter__()
            assert status != "loaded"


def test_a_backend_that_does_not_serve_a_device_says_so() -> None:
    """No silent fallback: not even to another backend of the same device."""
    device_bound = {"cpp": "cuda", "cuda": "cpu"}
    checked = 0
    for backend, elsewhere in device_bound.items():
        if any(backend in served for served in ops.TABLE.values()):
            with (
                use_backend(backend),
                pytest.raises(RuntimeError, match="does not serve softmax_kl_forward on"),
            ):
                ops.backend_for("softmax_kl_forward", elsewhere)
            checked += 1
    if not checked:
        pytest.skip("no compiled backend here")


def test_the_choice_is_the_threads_own() -> None:
    seen = []
    inside, done = threading.Event(), threading.Event()

    def other() -> None:
        with use_backend("reference"):
            seen.append(ops.backend_for("softmax_kl_forward", "cpu"))
            inside.set()
            done.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(10)
    assert afm_kernels.backend_info()["selected"] == "auto"
    done.set()
    thread.join()
    assert seen == ["reference"]


SAID_OF_A_MISSING_MODULE = """
import sys, warnings
import torch
sys.path[:0] = sys.argv[1:]
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    from afm_kernels import ops, pgd_start, softmax_kl_div, use_backend
    rows = torch.zeros(2, 3)
    with use_backend("reference"):
        softmax_kl_div(rows, rows)
    ops.backend_for("softmax_kl_forward", "mps")
    if ops.STATUS["triton"].startswith("registered"):
        ops.backend_for("softmax_kl_forward", "cuda")
    assert not said, said
    torch.compile(lambda x: softmax_kl_div(x, x), fullgraph=True, backend="eager")(rows)
    assert not said, said
    for _ in range(2):
        softmax_kl_div(rows, rows)
        pgd_start(rows, eps=0.1)
(warning,) = said
print(warning.message)
"""


def test_a_compiled_module_that_is_missing_is_said_once(tmp_path: Path) -> None:
    """As in the folder of a clone that was installed, but not built in place: Python finds the sources first."""
    clone, installed = tmp_path / "clone", tmp_path / "installed"
    shutil.copytree(
        Path(afm_kernels.__file__).parent, clone / "afm_kernels", ignore=shutil.ignore_patterns("*.so")
    )
    (installed / "afm_kernels").mkdir(parents=True)
    (installed / "afm_kernels" / "_cpu.abi3.so").touch()

    done = subprocess.run(
        [sys.executable, "-c", SAID_OF_A_MISSING_MODULE, str(clone), str(installed)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )
    assert done.returncode == 0, done.stderr
    assert f"imported from {clone / 'afm_kernels'}, which lacks the compiled kernels" in done.stdout
    assert (
        f"{installed} holds a build of them: run Python in a folder that holds no afm_kernels" in done.stdout
    )


def test_command_line() -> None:
    """python -m afm_kernels says for every operator who serves it."""
    out = subprocess.run(
        [sys.executable, "-m", "afm_kernels"], capture_output=True, text=True, check=True
    ).stdout
    info = afm_kernels.backend_info()
    for op in ops.SCHEMAS:
        if op != "cpu_capability":
            (line,) = (line for line in out.splitlines() if line.split()[:1] == [op])
            assert line.split()[1:] == [info["serves"][f"{op}/{device}"] for device in ops.DEVICES]
    assert torch.__version__ in out
    assert afm_kernels.__version__ in out


def test_import_costs_no_triton() -> None:
    """triton takes a second to import, and not everybody has it."""
    code = "import afm_kernels, sys; sys.exit('triton' in sys.modules or 'advfunmatch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_library_without_compiled_modules(tmp_path: Any) -> None:
    """Where nothing could be compiled the library imports, the reference serves, and backend_info says so."""
    code = """
import sys, pathlib, shutil
source, target = map(pathlib.Path, sys.argv[1:])
shutil.copytree(source, target / "afm_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
sys.path.insert(0, str(target))
import torch, afm_kernels
assert afm_kernels.__file__.startswith(str(target))
info = afm_kernels.backend_info()
assert {name for op, name in info["serves"].items() if op.endswith("/cpu")} == {"reference"}, info
assert "not built" in info["backends"]["cpp"], info
assert afm_kernels.softmax_kl_div(torch.zeros(2, 3), torch.zeros(2, 3)) == 0
try:
    afm_kernels.use_backend("cpp").__enter__()
except RuntimeError as error:
    assert "not built" in str(error)
else:
    sys.exit("use_backend('cpp') did not raise")
"""
    source = str(afm_kernels.__path__[0])
    subprocess.run([sys.executable, "-c", code, source, str(tmp_path)], check=True, cwd=tmp_path)


def test_loss_is_served_by_the_operator_of_its_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table is what is called, not only what is printed."""
    called = []
    served = dict(ops.TABLE["softmax_kl_forward", "cpu"])
    original = served["reference"]
    served["reference"] = lambda *args: called.append("reference") or original(*args)
    monkeypatch.setitem(ops.TABLE, ("softmax_kl_forward", "cpu"), served)
    with use_backend("reference"):
        softmax_kl_div(torch.zeros(2, 3), torch.zeros(2, 3))
    assert called == ["reference"]
