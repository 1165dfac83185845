"""The operators: their schemas, their fakes, and the table of which backend serves what.

Two namespaces carry the same schemas. ``afm_kernels`` holds the compiled kernels: the CPU module implements
its CPU key and the CUDA module its CUDA key. ``afm_kernels_triton`` holds the Triton kernels, on the CUDA
key, and on the CPU key under Triton's interpreter. The reference backend is plain PyTorch and needs no
operator.

Note [Operator contract]
~~~~~~~~~~~~~~~~~~~~~~~~
What every backend may assume, because ``functional`` has checked it, and must deliver:

* ``student``, ``teacher``: (..., C) with the class dimension last and C >= 1, equal shapes, one device, each
  of float16, bfloat16, float32 or float64, not necessarily the same. Any strides: a backend runs on rows in
  place where the class stride is 1, whatever the other strides are, and copies otherwise. The *accumulation
  dtype* is float64 if either is float64, else float32.
* ``row_weight``: accumulation dtype, contiguous, the shape of the rows. A row of weight 0 contributes exactly
  0 to loss and gradients whatever it holds.
* ``labels``: int64, contiguous, the shape of the rows. A row whose label is ``ignore_index`` has no
  cross-entropy term. Any other label outside [0, C) makes the row NaN, or raises where that waits for no device.
* ``reduction``: an index into ``REDUCTIONS``. 0 returns the rows' values (accumulation dtype, contiguous); 1
  their sum (zero-dimensional). Both are multiplied by ``row_weight`` and ``scale``; mean, batchmean and T²
  are folded into ``scale`` by the caller.
* ``divergence``: an index into ``DIVERGENCES``. ``beta`` is the weight of JS and ignored by the others.
* ``grad_loss``: accumulation dtype; zero-dimensional, or the shape of the rows and contiguous.
* ``row_stats``: (rows, ROW_STATS), of Triton's operators (rows, triton.ROW_STATS), accumulation dtype. What is in it
  is the backend's own business: a backward is always served by the backend of its forward.
* softmax_kl_forward_backward: the summed loss, and the bits that its backward would give for this ``grad_loss``, a
  number. See Note [Expected gradients] in autograd/expected.py; only the compiled CPU kernel serves it.
* ``class_weight`` (dkl): accumulation dtype, contiguous, the shape of the logits; absent, the weights are
  softmax(teacher / weight_temperature). No gradient flows into weights of either kind. ``symmetric`` says
  whether the squared term's gradient reaches the student too (IKL) or the teacher alone (DKL, whose gradients
  are KL's).
* topk_kl: ``teacher`` holds the log-probabilities (..., k) of the classes ``indices`` (int32 or int64), of those rows,
  and ``log_tail`` (accumulation dtype, the shape of the rows) that of all the others; all three contiguous. ``mode``:
  an index into ``TOPK_MODES``. An id of -1 is padding, whatever its log-probability is; one outside of [-1, C) makes
  the row NaN. What twice the same id comes to is the backend's own business. No gradient flows into what is stored:
  ``wrt_teacher`` is False. Of topk_kl_forward_grad_out, ``grad_student`` may be ``student`` itself. The semantics:
  Note [K classes and a tail] in reference/topk_kl.py.
* A term whose factor is 0 (``alpha``, ``1 - alpha``, ``beta`` of dkl) contributes exactly 0 whatever it
  holds.
* Gradients are those of the loss as defined above (row_weight and scale included), times ``grad_loss`` in a
  backward. They have their logits' dtype, shape and, where those are dense and non-overlapping, strides
  (``torch.empty_like``). A gradient that was not asked for (``wrt_student``, ``wrt_teacher``) is an empty
  tensor of shape (0,).
* softmax_kl_direction: the gradients of each row's KL divided by exp(``log_scale``), one number a row (accumulation
  dtype, contiguous), so that the largest entry of those asked for is at least 1/2 and at most 1. A row whose gradients
  are exactly 0 has a log_scale of -inf; one that has none, NaN. Note [Direction of a row] in
  reference/softmax_kl_direction.py.
* linear_kl_rows: row values of divergence_weight * divergence + label_weight * cross-entropy (at temperature 1), times
  ``row_weight`` and ``scale``. The logits of each side that is asked for are overwritten with their gradients; they
  overlap nothing. ``labels`` come with kl, or with a divergence_weight of 0.
* pgd_step, pgd_start: ``x_adv``, ``x``, ``out`` of one dtype, ``grad`` and ``noise`` of any; one shape and device,
  any strides. ``norm``: an index into ``NORMS``. ``out`` may be one of the inputs. The semantics, those of NaN, 0
  and infinity included: Note [PGD step] in reference/pgd_step.py.
* apgd_step: ``x_adv``, ``x_old``, ``x_best``, ``x_hit``, ``x`` of one dtype, ``grad`` and ``grad_best`` of another; all
  of one shape and of one layout, dense with one image behind the other. ``numbers`` (4, N), ``loss`` (N,): float64 if
  an image or a gradient is, else float32; ``counts`` (3, N) int32, ``misclassified`` (N,) bool; all contiguous. What is
  written lies apart. Note [APGD step] in reference/apgd_step.py.
* square_step: ``x_adv``, ``x_best``, ``high``, ``low`` (N, C, H, W) of one dtype and of the same strides, whatever they
  are; ``margin`` (N,) float64; ``logits`` (N, classes) float32 or float64; ``labels`` (N,), ``last_corners`` and
  ``corners`` (N, 2) int64; ``is_high`` (N, C) bool; all but the images contiguous. What is written lies apart. Squares
  lie within the images. Note [Square step] in reference/square_step.py.
* scale_shift_relu: ``x`` (N, C, ...) of any strides; ``scale``, ``shift`` (C,) of any stride and dtype;
  ``residual`` like ``x``, of any dtype. ``output`` is what the forward returned; where it is not <= 0 the
  gradient passes.
* conv3x3: stride 1, padding 1, ``x`` (N, in, H, W), ``weight`` (out, in, 3, 3). The compiled kernel takes float32,
  numbers of channels that are multiples of 16, dense channels-last images, and a weight that is dense along ``out``
  (forward) or ``in`` (gradient); it raises on anything else. In the gradient, ``grad_output`` counts as 0 where
  ``output``, what a forward with ReLU returned, is <= 0; ``added`` is added to the gradient by ``x``, which then is 0
  where ``input``, the forward's ``x``, is <= 0: the gate of a ReLU that made it.
* small_conv: any stride and padding, the same in both directions, and up to 49 taps; float32, dense channels-last
  images. ``weight`` (out, in, height, width) is dense along ``out`` (forward) or ``in`` (gradient); with at most 4
  ``in``, the gradient's is dense along ``out`` too. ``height`` and ``width`` are of the forward's ``x``; ``added`` and
  ``input`` as for conv3x3.
* In the hard rows "p > 0" means that the logit is above -inf: an underflowed probability is still positive.
* Nothing is written but the outputs, nothing synchronises with the device, the current stream is used.
"""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from afm_kernels import reference, triton
from afm_kernels.reference.rows import ROW_STATS
from afm_kernels.schemas import SCHEMAS, accumulation_dtype
from afm_kernels.version import __version__

DIVERGENCES = ("kl", "reverse_kl", "jeffreys", "js")
REDUCTIONS = ("none", "sum")
NORMS = ("linf", "l2")
TOPK_MODES = ("tail", "renormalise", "both", "truncate")

BACKENDS = ("cuda", "cpp", "triton", "reference")  # "auto" takes the first of these that serves
DEVICES = ("cpu", "cuda")
_COMPILED_MODULES = {"cpp": "_cpu.abi3.so", "cuda": "_cuda.abi3.so"}

_library = torch.library.Library("afm_kernels", "DEF")
_triton_library = torch.library.Library("afm_kernels_triton", "DEF")
for _name, _signature in SCHEMAS.items():
    for _each in (_library, _triton_library):
        _each.define(_name + _signature, tags=torch.Tag.pt2_compliant_tag)


# Fakes: shapes, dtypes and strides of the outputs, for torch.compile and torch.export. -------------------------


def _fake_loss(student: torch.Tensor, teacher: torch.Tensor, reduction: int) -> torch.Tensor:
    shape = student.shape[:-1] if reduction == 0 else ()
    return student.new_empty(shape, dtype=accumulation_dtype(student, teacher))


def _fake_rows(student: torch.Tensor, teacher: torch.Tensor, *args: Any) -> torch.Tensor:
    return _fake_loss(student, teacher, 0)


def _fake_stats(student: torch.Tensor, teacher: torch.Tensor, columns: int) -> torch.Tensor:
    rows = 1
    for size in student.shape[:-1]:
        rows = rows * size
    return student.new_empty((rows, columns), dtype=accumulation_dtype(student, teacher))


def _fake_grads(
    student: torch.Tensor, teacher: torch.Tensor, wrt_student: bool, wrt_teacher: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.empty_like(student) if wrt_student else student.new_empty(0),
        torch.empty_like(teacher) if wrt_teacher else teacher.new_empty(0),
    )


def _fake_forward(student: torch.Tensor, teacher: torch.Tensor, *args: Any) -> Any:
    return _fake_loss(student, teacher, args[-2]), _fake_stats(student, teacher, ROW_STATS)


def _fake_triton_forward(student: torch.Tensor, teacher: torch.Tensor, *args: Any) -> Any:
    return _fake_loss(student, teacher, args[-2]), _fake_stats(student, teacher, triton.ROW_STATS)


def _fake_backward(_: torch.Tensor, student: torch.Tensor, teacher: torch.Tensor, *args: Any) -> Any:
    return _fake_grads(student, teacher, *args[-2:])


def _fake_forward_grad(student: torch.Tensor, teacher: torch.Tensor, *args: Any) -> Any:
    return _fake_loss(student, teacher, args[-4]), *_fake_grads(student, teacher, *args[-2:])


def _fake_forward_backward(student: torch.Tensor, teacher: torch.Tensor, *args: Any) -> Any:
    return _fake_loss(student, teacher, 1), *_fake_grads(student, teacher, *args[-2:])


def _fake_forward_grad_out(student: torch.Tensor, teacher: torch.Tensor, *args: Any) -> Any:
    return _fake_loss(student, teacher, args[-3])


def _fake_grad(student: torch.Tensor, teacher: torch.Tensor, *args: Any) -> Any:
    return _fake_grads(student, teacher, *args[-2:])


def _fake_direction(student: torch.Tensor, teacher: torch.Tensor, *args: Any) -> Any:
    return *_fake_grads(student, teacher, *args[-2:]), _fake_loss(student, teacher, 0)


def _fake_nothing(*args: Any) -> None:
    return None


def _fake_like_first(first: torch.Tensor, *args: Any) -> torch.Tensor:
    return torch.empty_like(first)


def _fake_scale_shift_relu_backward(
    grad_output: torch.Tensor, output: torch.Tensor, scale: torch.Tensor, wrt_x: bool, wrt_residual: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.empty_like(output) if wrt_x else output.new_empty(0),
        torch.empty_like(output) if wrt_residual else output.new_empty(0),
    )


def _fake_image(like: torch.Tensor, channels: int, height: int, width: int) -> torch.Tensor:
    return like.new_empty((like.shape[0], channels, height, width)).to(memory_format=torch.channels_last)


def _fake_conv3x3_forward(x: torch.Tensor, weight: torch.Tensor, *args: Any) -> torch.Tensor:
    return _fake_image(x, weight.shape[0], *x.shape[2:])


def _fake_conv3x3_input_grad(
    grad_output: torch.Tensor, output: torch.Tensor | None, weight: torch.Tensor, *args: Any
) -> torch.Tensor:
    return _fake_image(grad_output, weight.shape[1], *grad_output.shape[2:])


def _fake_small_conv_forward(x: torch.Tensor, weight: torch.Tensor, *args: Any) -> torch.Tensor:
    stride, padding = args[-2:]
    sizes = [
        (n + 2 * padding - kernel) // stride + 1
        for n, kernel in zip(x.shape[2:], weight.shape[2:], strict=True)
    ]
    return _fake_image(x, weight.shape[0], *sizes)


def _fake_small_conv_input_grad(
    grad_output: torch.Tensor,
    weight: torch.Tensor,
    added: torch.Tensor | None,
    input: torch.Tensor | None,
    height: int,
    width: int,
    *args: Any,
) -> torch.Tensor:
    return _fake_image(grad_output, weight.shape[1], height, width)


_FAKES: dict[str, Callable[..., Any]] = {
    "softmax_kl_forward": _fake_forward,
    "softmax_kl_backward": _fake_backward,
    "softmax_kl_forward_grad": _fake_forward_grad,
    "softmax_kl_forward_backward": _fake_forward_backward,
    "softmax_kl_grad": _fake_grad,
    "softmax_kl_grad_out": _fake_nothing,
    "softmax_kl_direction": _fake_direction,
    "distillation_forward": _fake_forward,
    "distillation_backward": _fake_backward,
    "distillation_forward_grad": _fake_forward_grad,
    "linear_kl_rows": _fake_rows,
    "dkl_forward": _fake_forward,
    "dkl_backward": _fake_backward,
    "dkl_forward_grad": _fake_forward_grad,
    "topk_kl_forward": _fake_forward,
    "topk_kl_backward": _fake_backward,
    "topk_kl_forward_grad": _fake_forward_grad,
    "topk_kl_forward_grad_out": _fake_forward_grad_out,
    "pgd_step": _fake_like_first,
    "pgd_step_out": _fake_nothing,
    "pgd_start": _fake_like_first,
    "apgd_step": _fake_nothing,
    "square_step": _fake_nothing,
    "scale_shift_relu_forward": _fake_like_first,
    "scale_shift_relu_backward": _fake_scale_shift_relu_backward,
    "conv3x3_forward": _fake_conv3x3_forward,
    "conv3x3_input_grad": _fake_conv3x3_input_grad,
    "small_conv_forward": _fake_small_conv_forward,
    "small_conv_input_grad": _fake_small_conv_input_grad,
}
for _name, _fake in _FAKES.items():
    torch.library.register_fake(f"afm_kernels::{_name}", _fake, lib=_library)
    _fake = _fake_triton_forward if _fake is _fake_forward else _fake
    torch.library.register_fake(f"afm_kernels_triton::{_name}", _fake, lib=_triton_library)


# Backends: who is there, and who serves what. --------------------------------------------------------------------


def _load_compiled_module(backend: str) -> str:
    """Loads the compiled module of ``backend`` and says what came of it."""
    path = Path(__file__).with_name(_COMPILED_MODULES[backend])
    if not path.exists():
        return f"not built ({path.name} is missing)"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        reason = f"built, but does not load: {error}"
        warnings.warn(f"afm_kernels: {path.name} is {reason}", RuntimeWarning, stacklevel=2)
        return reason
    return "loaded"


def _register_triton() -> str:
    """Registers the launchers of ``afm_kernels.triton`` and says what came of it.

    ``afm_kernels/triton/__init__.py`` imports no triton, and holds ``SERVES``:
    operator name -> name of the module in that package whose function of the operator's name launches the
    kernel. The module is imported at the first launch, since importing triton takes a second.
    """
    if find_spec("triton") is None:
        return "triton is not installed"
    from importlib import import_module

    def launcher(op: str, module: str) -> Callable[..., Any]:
        def launch(*args: Any) -> Any:
            return getattr(import_module(f"afm_kernels.triton.{module}"), op)(*args)

        return launch

    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    for op, module in triton.SERVES.items():
        _triton_library.impl(op, launcher(op, module), "CUDA")
        if interpreted:
            _triton_library.impl(op, launcher(op, module), "CPU")
    return "registered for cuda" + (" and, interpreted, for cpu" if interpreted else "")


def _register_linear_kl_rows() -> None:
    """Where no kernel overwrites logits, those of the losses serve, and their gradients are copied."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    for library, namespace, keys in (
        (_library, torch.ops.afm_kernels, ("CUDA",) if STATUS["cuda"] == "loaded" else ()),
        (_triton_library, torch.ops.afm_kernels_triton, ("CUDA", "CPU") if interpreted else ("CUDA",)),
    ):
        rows = reference.linear_kl_rows_by(
            namespace.softmax_kl_forward_grad.default, namespace.distillation_forward_grad.default
        )
        for key in (
            keys if namespace is torch.ops.afm_kernels or STATUS["triton"].startswith("registered") else ()
        ):
            library.impl("linear_kl_rows", rows, key)


def _make_table() -> dict[tuple[str, str], dict[str, Callable[..., Any]]]:
    table = {}
    for op in _FAKES:
        for device in DEVICES:
            key = device.upper()
            served: dict[str, Callable[..., Any]] = {}
            compiled = "cpp" if device == "cpu" else "cuda"
            if torch._C._dispatch_has_kernel_for_dispatch_key(f"afm_kernels::{op}", key):
                served[compiled] = getattr(torch.ops.afm_kernels, op).default
            if torch._C._dispatch_has_kernel_for_dispatch_key(f"afm_kernels_triton::{op}", key):
                served["triton"] = getattr(torch.ops.afm_kernels_triton, op).default
            if hasattr(reference, op):
                served["reference"] = getattr(reference, op)
            table[op, device] = served
    return table


#: backend -> what came of loading it
STATUS = {
    "cuda": _load_compiled_module("cuda"),
    "cpp": _load_compiled_module("cpp"),
    "triton": _register_triton(),
    "reference": "always there",
}

_register_linear_kl_rows()

#: (operator, device type) -> {backend: what to call}. The visible truth about what serves what.
TABLE = _make_table()


class _Selection(threading.local):
    """The backend chosen by ``use_backend`` in this thread."""

    name = "auto"


selection = _Selection()


def _auto_backend(op: str, device_type: str) -> str:
    served = TABLE.get((op, device_type))
    if served is None:  # a device this library knows nothing of: plain PyTorch runs there
        return "reference"
    if device_type == "cpu" and "cpp" not in served:
        return "reference"  # the interpreter is for tests, never what "auto" means
    for backend in BACKENDS:
        if backend in served:
            return backend
    raise RuntimeError(f"no backend serves {op} on {device_type}")


_AUTO = {(op, device): _auto_backend(op, device) for (op, device), served in TABLE.items() if served}

# Whether plain PyTorch serves a device for want of a compiled module only, which is said at the first call. One that is
# there and does not load has said so itself.
_unbuilt = {
    "cpu": STATUS["cpp"].startswith("not built"),
    "cuda": STATUS["cuda"].startswith("not built") and not STATUS["triton"].startswith("registered"),
}


def _warn_unbuilt(device_type: str) -> None:
    _unbuilt[device_type] = False
    folder = Path(__file__).parent
    backend = "cpp" if device_type == "cpu" else "cuda"
    name = _COMPILED_MODULES[backend]
    elsewhere = [
        str(Path(entry).resolve())
        for entry in sys.path
        if Path(entry, folder.name, name).exists() and Path(entry).resolve() != folder.parent.resolve()
    ]
    if elsewhere:
        remedy = f"{elsewhere[0]} holds a build of them: run Python in a folder that holds no afm_kernels of its own"
    elif (folder.parent / "setup.py").exists():
        remedy = f"build them with `python setup.py build_ext --inplace` in {folder.parent}"
    else:
        remedy = "install the package again where its build finds a compiler"
    warnings.warn(
        f"afm_kernels was imported from {folder}, which lacks the compiled kernels ({name}), so that plain PyTorch "
        f"serves {device_type} tensors, many times slower; {remedy}. use_backend('reference') asks for it and says "
        "nothing",
        RuntimeWarning,
        stacklevel=3,
    )


def backend_for(op: str, device_type: str) -> str:
    """The name of the backend that serves ``op`` on ``device_type`` in this thread."""
    name = selection.name
    if name == "auto":
        name = _AUTO.get((op, device_type), "reference")
        # A warning cannot be traced; there Inductor fuses the reference.
        if name == "reference" and not torch.compiler.is_compiling() and _unbuilt.get(device_type):
            _warn_unbuilt(device_type)
        return name
    if name != "reference" and name not in TABLE.get((op, device_type), ()):
        raise RuntimeError(
            f"use_backend({name!r}): that backend does not serve {op} on {device_type!r}; served there by "
            f"{', '.join(TABLE.get((op, device_type), ['reference']))}"
        )
    return name


def kernel(op: str, device_type: str, backend: str | None = None) -> Callable[..., Any]:
    """What to call for ``op`` on ``device_type``: by ``backend``, or by the one that serves in this thread."""
    if backend is None:
        backend = backend_for(op, device_type)
    return TABLE[op, device_type if device_type in DEVICES else "cpu"][backend]


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Make one backend serve every operator of this thread for the duration of a ``with`` block.

    Args:
        name: "reference", "cpp", "cuda", "triton", or "auto" (the default choice, see ``backend_info``).

    Raises:
        ValueError: ``name`` is none of these.
        RuntimeError: the backend is not there; also later, when an operator or device is not served by it.

    The choice belongs to the calling thread, and a backward runs on the backend of its forward. Around a
    compiled function it selects (and compiles once) the variant for that backend.

    >>> import torch, afm_kernels
    >>> with afm_kernels.use_backend("reference"):
    ...     loss = afm_kernels.softmax_kl_div(torch.zeros(4, 10), torch.zeros(4, 10))
    >>> loss.item()
    0.0
    """
    if name != "auto":
        if name not in BACKENDS:
            raise ValueError(
                f"backend is {name!r}; allowed: {', '.join(map(repr, sorted(BACKENDS)))}, 'auto'"
            )
        if not any(name in served for served in TABLE.values()):
            raise RuntimeError(f"backend {name!r} is not available here: {STATUS[name]}")
    previous = selection.name
    selection.name = name
    try:
        yield
    finally:
        selection.name = previous


def backend_info() -> dict[str, Any]:
    """Say what is installed and what serves what.

    Returns:
        A dictionary: ``versions`` (afm_kernels, torch, triton, cuda), ``backends`` (name -> what came of loading
        it), ``cpu_capability`` (the instruction set of the compiled CPU operators, or None), ``selected`` (the
        choice of ``use_backend`` in this thread) and ``serves`` ("operator/device" -> the backend that serves it,
        or None).

    >>> import afm_kernels
    >>> afm_kernels.backend_info()["backends"]["reference"]
    'always there'
    """
    triton_version = None
    if find_spec("triton") is not None:
        from importlib.metadata import PackageNotFoundError, version

        try:
            triton_version = version("triton")
        except PackageNotFoundError:
            triton_version = "unknown"
    return {
        "versions": {
            "afm_kernels": __version__,
            "torch": torch.__version__,
            "triton": triton_version,
            "cuda": torch.version.cuda,
        },
        "backends": dict(STATUS),
        "cpu_capability": torch.ops.afm_kernels.cpu_capability() if STATUS["cpp"] == "loaded" else None,
        "selected": selection.name,
        "serves": {
            f"{op}/{device}": served_by(op, device) for (op, device), served in TABLE.items() if served
        },
    }


def served_by(op: str, device_type: str) -> str | None:
    """The backend that serves ``op`` in this thread, or None where the chosen one does not."""
    name = selection.name
    return _AUTO[op, device_type] if name == "auto" else name if name in TABLE[op, device_type] else None
