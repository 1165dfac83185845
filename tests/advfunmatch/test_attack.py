"""The attack engine: what it returns, what it must not touch, and what it must not compute."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from advfunmatch.attacks import capture, looks
from advfunmatch.attacks.capture import GraphCache
from advfunmatch.attacks.pgd import PGDAttack, Target, input_gradient
from advfunmatch.lean import prepare_for_attack
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

SEED = 0
EPS, STEP = 0.1, 0.03


def network(seed: int, width: int = 6) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * width * 16, 4),
    )
    net(torch.rand(64, 3, 8, 8))  # settles the running statistics away from 0 and 1
    return net.eval()


@pytest.fixture
def student() -> nn.Sequential:
    return network(1)


@pytest.fixture
def teacher() -> nn.Sequential:
    return network(2)


@pytest.fixture
def images() -> Tensor:
    return torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(SEED))


LABELS = torch.tensor([0, 1, 2, 3, 0])


def kl_rows(student: nn.Module, teacher: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        log_q, log_p = student(x).log_softmax(1), teacher(x).log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


class Recorder(TorchDispatchMode):
    """Every operator with its tensors' shapes, and a refusal of those that read the device."""

    READS = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple]] = []
        self.masks: list[list[bool]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.READS, f"{name} reads the device"
        out = func(*args, **(kwargs or {}))
        flat = torch.utils._pytree.tree_leaves((args, out))
        self.calls.append((name, tuple(tuple(t.shape) for t in flat if isinstance(t, Tensor))))
        if name == "convolution_backward":
            self.masks.append(list(args[10]))
        return out


# ---- what comes back ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("init", ["gaussian", "uniform", "zero"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_stays_in_the_ball_and_the_clip_range(student, teacher, images, norm, init, dtype) -> None:
    eps = EPS if norm == "linf" else 0.7
    x = images.to(dtype)
    attack = PGDAttack(norm=norm, eps=eps, step_size=eps / 2, steps=4, init=init, clip=(0.0, 1.0), seed=SEED)
    x_adv = attack(student.to(dtype), teacher.to(dtype), x)
    assert x_adv.dtype == dtype
    assert not x_adv.requires_grad
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    moved = x_adv.double() - x.double()
    ulp = torch.finfo(dtype).eps
    if norm == "linf":
        assert moved.abs().max() <= eps + ulp
        assert moved.abs().max() > eps / 2
    else:
        length = moved.flatten(1).norm(dim=1)
        assert length.max() <= eps + ulp * x[0].numel() ** 0.5
        assert length.min() > eps / 4


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_returns_the_images_memory_format(student, teacher, images, memory_format, prepared) -> None:
    x = images.contiguous(memory_format=memory_format)
    if prepared:
        student, teacher = prepare_for_attack(student), prepare_for_attack(teacher)
    x_adv = PGDAttack(eps=EPS, step_size=STEP, steps=2, seed=SEED)(student, teacher, x)
    assert x_adv.stride() == x.stride()


@pytest.mark.parametrize("objective", ["mismatch", "fixed_teacher", "cross_entropy", "margin"])
def test_raises_its_objective(student, teacher, images, objective) -> None:
    attack = PGDAttack(objective, eps=EPS, step_size=STEP, steps=8, seed=SEED)
    labels = student(images).argmax(1)
    x_adv = attack(student, teacher, images, labels)
    with torch.no_grad():
        z_t = teacher(images) if objective == "fixed_teacher" else None
        before = attack.objective.score(student(images), z_t if z_t is not None else teacher(images), labels)
        after = attack.objective.score(student(x_adv), z_t if z_t is not None else teacher(x_adv), labels)
    assert (after > before).all()


def test_equals_the_loop_it_replaces(student, teacher, images) -> None:
    """AdaAD's inner loop, in float64, where no sign is within rounding of flipping."""
    student, teacher, x = student.double(), teacher.double(), images.double()
    x_adv = PGDAttack("mismatch", eps=EPS, step_size=STEP, steps=5, init="zero")(student, teacher, x)
    reference = x.clone()
    for _ in range(5):
        reference = reference.detach().requires_grad_()
        loss = F.kl_div(student(reference).log_softmax(1), teacher(reference).softmax(1), reduction="sum")
        (gradient,) = torch.autograd.grad(loss, reference)
        reference = reference.detach() + STEP * gradient.sign()
        reference = torch.min(torch.max(reference, x - EPS), x + EPS).clamp(0, 1)
    torch.testing.assert_close(x_adv, reference, rtol=0, atol=1e-12)


def test_fixed_teacher_without_a_teacher_is_the_attack_of_trades(student, images) -> None:
    attack = PGDAttack("fixed_teacher", eps=EPS, step_size=STEP, steps=3, seed=SEED)
    alone = attack(student, None, images)
    with torch.no_grad():
        logits = student(images)
    again = PGDAttack("fixed_teacher", eps=EPS, step_size=STEP, steps=3, seed=SEED)
    assert torch.equal(alone, again(student, None, images, teacher_logits=logits))


def test_targeted_attack_reaches_its_targets_more_often(student, images) -> None:
    with torch.no_grad():
        targets = student(images).argmin(1)
    attack = PGDAttack("cross_entropy", eps=0.5, step_size=0.1, steps=20, targeted=True, seed=SEED)
    x_adv = attack(student, None, images, targets)
    probability = [student(x).softmax(1).gather(1, targets[:, None]) for x in (images, x_adv)]
    assert (probability[1] > probability[0] + 0.02).all()


def test_a_users_callable_is_an_objective(student, teacher, images) -> None:
    def disagree(z_s: Tensor, z_t: Tensor, labels: None) -> tuple[Tensor, Tensor]:
        return z_s - z_t, z_t - z_s  # the gradient of ½‖z_s − z_t‖²

    x_adv = PGDAttack(disagree, eps=EPS, step_size=STEP, steps=5, seed=SEED)(student, teacher, images)
    with torch.no_grad():
        before, after = ((student(x) - teacher(x)).square().sum(1) for x in (images, x_adv))
    assert (after > before).all()


def test_restarts_keep_the_best_of_each_image(student, teacher, images) -> None:
    options = {"eps": EPS, "step_size": STEP, "steps": 2, "init": "uniform", "seed": SEED}
    single = PGDAttack(**options)
    singles = torch.stack([kl_rows(student, teacher, single(student, teacher, images)) for _ in range(4)])
    best = kl_rows(student, teacher, PGDAttack(**options, restarts=4)(student, teacher, images))
    torch.testing.assert_close(best, singles.amax(0))
    assert (singles.argmax(0) > 0).any()  # some image's best was not the first start


@pytest.mark.parametrize("restarts", [1, 3])
def test_early_stop_finds_the_same_images_and_moves_the_broken_ones_less(student, images, restarts) -> None:
    generator = torch.Generator().manual_seed(SEED)
    x = torch.rand(40, 3, 8, 8, generator=generator)
    labels = student(x).argmax(1)
    options = {"eps": 0.2, "step_size": 0.02, "steps": 10, "init": "zero", "restarts": restarts}
    full = PGDAttack("margin", **options)(student, None, x, labels)
    stopped = PGDAttack("margin", **options, early_stop=True)(student, None, x, labels)
    broken = [student(x_adv).argmax(1) != labels for x_adv in (full, stopped)]
    assert broken[0].sum() > 5
    assert (broken[1] >= broken[0]).all()
    assert (stopped - x).abs().sum() < (full - x).abs().sum()


def test_early_stop_leaves_images_alone_that_are_wrong_already(student, images) -> None:
    labels = (student(images).argmax(1) + 1) % 4
    x_adv = PGDAttack("cross_entropy", eps=EPS, step_size=STEP, steps=3, init="zero", early_stop=True)(
        student, None, images, labels
    )
    assert torch.equal(x_adv, images)


@pytest.mark.parametrize("size", [0, 1, 3])
def test_short_batches_are_ordinary(student, teacher, images, size) -> None:
    x_adv = PGDAttack(eps=EPS, step_size=STEP, steps=2, seed=SEED)(student, teacher, images[:size])
    assert x_adv.shape == images[:size].shape


def test_under_no_grad_and_inference_mode_it_attacks_all_the_same(student, teacher, images) -> None:
    want = PGDAttack(eps=EPS, step_size=STEP, steps=2, seed=SEED)(student, teacher, images)
    with torch.no_grad():
        assert torch.equal(
            want, PGDAttack(eps=EPS, step_size=STEP, steps=2, seed=SEED)(student, teacher, images)
        )
    with torch.inference_mode():
        x = images.clone()
        assert torch.equal(want, PGDAttack(eps=EPS, step_size=STEP, steps=2, seed=SEED)(student, teacher, x))


def test_float16_networks_are_attacked_where_student_and_teacher_nearly_agree(student, images) -> None:
    """The KL's gradient starts near 1e-8 here: float16 holds nothing below 6e-8, so unscaled rows would not move."""
    near = copy.deepcopy(student)
    with torch.no_grad():
        near[-1].bias += torch.tensor([2e-3, 0, 0, 0])
    x_adv = PGDAttack(eps=EPS, step_size=STEP, steps=3, init="zero", keep="last")(
        student.half(), near.half(), images.half()
    )
    assert ((x_adv - images.half()).abs().flatten(1).amax(1) > EPS / 2).all()


# ---- what it must not touch --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bn", ["eval", "batch", "train"])
@pytest.mark.parametrize("training", [False, True])
def test_the_networks_are_as_they_were(student, teacher, images, bn, training) -> None:
    student.train(training)
    student[1].eval()  # a frozen BatchNorm inside a training network stays one
    for index, parameter in enumerate(student.parameters()):
        parameter.grad = torch.full_like(parameter, float(index))
    before = [
        (
            copy.deepcopy(net.state_dict()),
            [m.training for m in net.modules()],
            [getattr(m, "track_running_stats", None) for m in net.modules()],
            [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in net.parameters()],
        )
        for net in (student, teacher)
    ]
    PGDAttack(eps=EPS, step_size=STEP, steps=2, bn=bn, seed=SEED)(student, teacher, images)
    for net, (state, modes, tracking, gradients) in zip((student, teacher), before, strict=True):
        updates = bn == "train" and net is student
        for name, value in net.state_dict().items():
            statistic = "running" in name or "tracked" in name
            assert torch.equal(value, state[name]) != (updates and statistic), name
        assert [m.training for m in net.modules()] == modes
        assert [getattr(m, "track_running_stats", None) for m in net.modules()] == tracking
        for parameter, (requires_grad, gradient) in zip(net.parameters(), gradients, strict=True):
            assert parameter.requires_grad == requires_grad
            assert (parameter.grad is None) == (gradient is None)
            assert gradient is None or torch.equal(parameter.grad, gradient)


def test_batch_statistics_are_the_batchs_own(student, teacher, images) -> None:
    """Against a loop with the student in training mode, which is what ARD's code runs."""
    student, teacher, x = student.double(), teacher.double(), images.double()
    results = [
        PGDAttack("cross_entropy", eps=EPS, step_size=STEP, steps=3, init="zero", bn=bn)(
            copy.deepcopy(student), None, x, LABELS
        )
        for bn in ("eval", "batch", "train")
    ]
    reference = x.clone()
    training = copy.deepcopy(student).train()
    for _ in range(3):
        reference = reference.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(training(reference), LABELS), reference)
        reference = reference.detach() + STEP * gradient.sign()
        reference = torch.min(torch.max(reference, x - EPS), x + EPS).clamp(0, 1)
    torch.testing.assert_close(results[1], reference, rtol=0, atol=1e-12)
    assert torch.equal(results[1], results[2])
    assert not torch.allclose(results[0], reference, rtol=0, atol=1e-3)


def test_modes_are_restored_when_the_network_raises(student, teacher, images) -> None:
    student.train()
    with pytest.raises(RuntimeError):
        PGDAttack(eps=EPS, step_size=STEP, steps=1, bn="batch")(student, teacher, images[:, :2])
    assert all(m.training for m in student.modules())
    assert student[1].track_running_stats


@pytest.mark.parametrize("init", ["gaussian", "uniform", "zero"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_seed_leaves_the_callers_random_state_alone_and_repeats(
    student, teacher, images, norm, init
) -> None:
    torch.manual_seed(SEED)
    before = torch.get_rng_state()
    attack = PGDAttack(norm=norm, eps=EPS, step_size=STEP, steps=1, init=init, seed=3)
    first, second = attack(student, teacher, images), attack(student, teacher, images)
    assert torch.equal(torch.get_rng_state(), before)
    again = PGDAttack(norm=norm, eps=EPS, step_size=STEP, steps=1, init=init, seed=3)
    assert torch.equal(first, again(student, teacher, images))
    assert torch.equal(first, second) == (init == "zero")


def test_the_random_state_can_be_saved_and_continued(student, teacher, images) -> None:
    options = {"eps": EPS, "step_size": STEP, "steps": 1, "init": "uniform", "seed": 3}
    attack = PGDAttack(**options)
    attack(student, teacher, images)
    state = attack.get_rng_state()
    want = attack(student, teacher, images)
    resumed = PGDAttack(**options)
    resumed.set_rng_state(state)
    assert torch.equal(resumed(student, teacher, images), want)


def test_a_seed_means_the_same_start_for_prepared_networks(student, teacher, images) -> None:
    prepared = prepare_for_attack(student), prepare_for_attack(teacher)
    starts = [
        PGDAttack(eps=EPS, step_size=STEP, steps=0, init="uniform", seed=3)(*networks, images)
        for networks in ((student, teacher), prepared)
    ]
    assert torch.equal(*starts)


@pytest.fixture
def process_group() -> Iterator[None]:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_ddp_student_is_attacked_and_can_still_be_trained(process_group, student, teacher, images) -> None:
    wrapped = nn.parallel.DistributedDataParallel(student.train())
    want = PGDAttack(eps=EPS, step_size=STEP, steps=2, seed=SEED)(student, teacher, images)
    for _ in range(2):
        assert torch.equal(
            want, PGDAttack(eps=EPS, step_size=STEP, steps=2, seed=SEED)(wrapped.eval(), teacher, images)
        )
        wrapped.train()
        wrapped(images).sum().backward()
        wrapped.zero_grad()
        want = PGDAttack(eps=EPS, step_size=STEP, steps=2, seed=SEED)(student, teacher, images)


@pytest.mark.slow
def test_prepared_networks_compile_without_a_graph_break(student, teacher, images) -> None:
    prepared = prepare_for_attack(student), prepare_for_attack(teacher)
    compiled = [torch.compile(network, fullgraph=True) for network in prepared]
    want = input_gradient(*prepared, images)
    torch.testing.assert_close(input_gradient(*compiled, images), want, rtol=1e-4, atol=1e-6)


# ---- what it must not compute ------------------------------------------------------------------------------------


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("objective", ["mismatch", "fixed_teacher", "cross_entropy", "margin"])
def test_no_weight_gradient_no_read_of_the_device_and_shapes_without_data(
    student, teacher, images, objective, prepared, monkeypatch
) -> None:
    """The CPU stands for a device here, which no look may wait for."""
    monkeypatch.setattr(looks, "waits_for", lambda values: True)
    if prepared:
        student, teacher = prepare_for_attack(student), prepare_for_attack(teacher)
    traces = []
    for x in (images, torch.zeros_like(images)):
        attack = PGDAttack(objective, eps=EPS, step_size=STEP, steps=2, restarts=2, seed=SEED, clip=(0, 1))
        with Recorder() as recorder:
            attack._attack(Target(student, teacher, LABELS), x, None, attack._generator(x.device))
        # oneDNN's pointwise operators are the forward of a prepared network's convolutions
        assert recorder.masks
        assert all(mask == [True, False, False] for mask in recorder.masks)
        assert not any("embedding" in name or name == "linear_backward" for name, _ in recorder.calls)
        traces.append(recorder.calls)
    assert traces[0] == traces[1]


@pytest.mark.parametrize("objective", ["mismatch", "cross_entropy"])
def test_looks_save_work_and_change_no_bit(student, teacher, images, objective, monkeypatch) -> None:
    results, counts = [], []
    for waits in (False, True):
        monkeypatch.setattr(looks, "waits_for", lambda values, waits=waits: waits)
        attack = PGDAttack(objective, eps=EPS, step_size=STEP, steps=3, seed=SEED)
        recorder = Recorder()
        recorder.READS = ()
        with recorder:
            results.append(attack(student, teacher, images, LABELS))
        assert attack.zero_gradients == 0
        counts.append(len(recorder.calls))
    assert torch.equal(*results)
    assert counts[0] < counts[1] - 30


def count_forwards(model: nn.Module) -> list[bool]:
    """Appends, for each forward, whether autograd recorded it."""
    calls: list[bool] = []
    model.register_forward_hook(lambda module, args, out: calls.append(out.requires_grad))
    return calls


@pytest.mark.parametrize(
    ("objective", "student_calls", "teacher_calls"),
    [
        # at the clean images and at the last iterate, to know the best
        ("mismatch", [False, *[True] * 3, False], [False, *[True] * 3, False]),
        ("fixed_teacher", [True] * 3, [False]),
        ("cross_entropy", [True] * 3, []),
        ("margin", [True] * 3, []),
    ],
)
def test_no_forward_more_than_the_steps_need(
    student, teacher, images, objective, student_calls, teacher_calls
) -> None:
    calls = count_forwards(student), count_forwards(teacher)
    PGDAttack(objective, eps=EPS, step_size=STEP, steps=3)(student, teacher, images, LABELS)
    assert calls == (student_calls, teacher_calls)


# ---- capture, as far as it goes without a GPU --------------------------------------------------------------------


def replayed_eagerly(
    run: Callable[[], Tensor], device: torch.device, generator: torch.Generator | None
) -> tuple[Tensor, Callable[[], None]]:
    """Stands for a CUDA graph: the same function, into the same output memory."""
    state = generator.get_state() if generator is not None else None
    output = run().clone()
    if generator is not None and state is not None:
        generator.set_state(state)
    return output, lambda: output.copy_(run())


def test_captured_attacks_equal_eager_ones_for_every_shape_and_after_an_update(
    monkeypatch, student, teacher, images
) -> None:
    monkeypatch.setattr(capture, "capture_graph", replayed_eagerly)
    monkeypatch.setattr(PGDAttack, "_captures", lambda *_: True)
    captured = PGDAttack(eps=EPS, step_size=STEP, steps=2, seed=SEED, max_graphs=2)
    monkeypatch.undo()
    eager = PGDAttack(eps=EPS, step_size=STEP, steps=2, seed=SEED)
    monkeypatch.setattr(capture, "capture_graph", replayed_eagerly)
    lean_student, lean_teacher = prepare_for_attack(student), prepare_for_attack(teacher)
    for size in (5, 5, 3, 5, 2, 3):
        x = torch.rand(size, 3, 8, 8, generator=torch.Generator().manual_seed(size))
        want = eager(lean_student, lean_teacher, x)
        captured._captures = lambda *_: True  # type: ignore[method-assign]
        assert torch.equal(captured(lean_student, lean_teacher, x), want)
        assert len(captured._graphs) <= 2
        with torch.no_grad():
            student[0].weight.mul_(1.1)  # which both see, the replayed one too


def test_graphs_are_kept_by_recent_use() -> None:
    cache = GraphCache(2)
    made: list[str] = []

    def get(key: str) -> str:
        return cache.get(key, lambda: made.append(key) or key)

    for key in ("a", "b", "a", "c", "a", "b"):
        assert get(key) == key
    assert made == ["a", "b", "c", "b"]
    assert len(cache) == 2


def test_other_addresses_are_another_graph(student) -> None:
    before = capture._addresses(student)
    with torch.no_grad():
        student[0].weight.mul_(2)
    assert capture._addresses(student) == before
    student[0].weight = nn.Parameter(student[0].weight.clone())
    assert capture._addresses(student) != before


# ---- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"objective": "nonsense"}, ValueError, "objective must be one of"),
        ({"objective": 3}, TypeError, "objective must be a name or a callable, got int"),
        ({"norm": "l1"}, ValueError, "norm must be one of linf, l2, got 'l1'"),
        ({"init": "ones"}, ValueError, "init must be one of"),
        ({"bn": "frozen"}, ValueError, "bn must be one of"),
        ({"eps": 0.0}, ValueError, "eps must be positive and finite"),
        ({"eps": float("nan")}, ValueError, "eps must be positive and finite"),
        ({"step_size": float("inf")}, ValueError, "step_size must be positive and finite"),
        ({"step_size": "2/255"}, TypeError, "step_size must be a number"),
        ({"steps": -1}, ValueError, "steps must be at least 0"),
        ({"steps": 2.0}, TypeError, "steps must be an integer"),
        ({"restarts": 0}, ValueError, "restarts must be at least 1"),
        ({"max_graphs": 0}, ValueError, "max_graphs must be at least 1"),
        ({"clip": (1.0, 0.0)}, ValueError, "lowest < highest"),
        ({"clip": 1.0}, ValueError, "clip must be a pair"),
        ({"clip": ("0", "1")}, TypeError, "clip must hold numbers"),
        ({"seed": 1.5}, TypeError, "seed must be an integer, got float"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"temperature": "4"}, TypeError, "temperature must be a number, got str"),
        ({"early_stop": True}, ValueError, "success"),
        ({"objective": lambda s, t, y: s, "restarts": 2}, ValueError, "score"),
        ({"objective": lambda s, t, y: s, "targeted": True}, ValueError, "targeted"),
        ({"objective": "margin", "early_stop": True, "bn": "batch"}, ValueError, "bn='eval'"),
    ],
)
def test_bad_options_are_named(options, error, words) -> None:
    with pytest.raises(error, match=words):
        PGDAttack(**options)


@pytest.mark.parametrize(
    ("objective", "call", "error", "words"),
    [
        ("mismatch", {"teacher": None}, ValueError, "teacher must be a module"),
        ("cross_entropy", {}, ValueError, "needs labels"),
        ("cross_entropy", {"labels": LABELS.float()}, ValueError, "labels must be integers"),
        ("cross_entropy", {"labels": [0] * 5}, TypeError, "labels must be a tensor or None, got list"),
        ("cross_entropy", {"labels": LABELS + 4}, ValueError, r"labels must be in \[0, 4\)"),
        ("margin", {"labels": LABELS - 4}, ValueError, r"labels must be in \[0, 4\)"),
        ("mismatch", {"teacher": len}, TypeError, "teacher must be a torch.nn.Module, got builtin"),
        ("fixed_teacher", {"teacher_logits": 0}, TypeError, "teacher_logits must be a tensor"),
        ("cross_entropy", {"labels": LABELS[:3]}, ValueError, "labels must be integers of shape"),
        ("mismatch", {"teacher_logits": torch.zeros(5, 4)}, ValueError, "Mismatch is not one"),
        (
            "fixed_teacher",
            {"teacher_logits": torch.zeros(2, 4)},
            ValueError,
            "a row for each of the 5 images",
        ),
        (
            "mismatch",
            {"x": torch.zeros(5, 3, 8, 8, dtype=torch.uint8)},
            TypeError,
            "x must be a floating-point",
        ),
        ("mismatch", {"x": torch.zeros(5)}, ValueError, "at least 2 dimensions"),
        (lambda s, t, y: s[:2], {}, ValueError, "student gradient must be a tensor of shape"),
        (lambda s, t, y: (None, None), {}, ValueError, "no gradient for either side"),
        (lambda s, t, y: (s, s, s), {}, ValueError, "one gradient or a pair"),
    ],
)
def test_bad_calls_are_named(student, teacher, images, objective, call, error, words) -> None:
    arguments = {"teacher": teacher, "x": images, **call}
    with pytest.raises(error, match=words):
        PGDAttack(objective, eps=EPS, step_size=STEP, steps=1)(student, **arguments)


def test_images_and_radii_outside_the_clip_range_are_pointed_out(student, images) -> None:
    """Normalised images, or a radius of 8 for 8/255, would be attacked without a sign of the mistake."""
    with pytest.warns(UserWarning, match=r"eps=8 is more than .* range of clip=\(0\.0, 1\.0\)"):
        PGDAttack("cross_entropy", eps=8)
    attack = PGDAttack("cross_entropy", eps=EPS, step_size=EPS, steps=1)
    with pytest.warns(UserWarning, match=r"x holds values from -.* outside clip=\(0\.0, 1\.0\)"):
        attack(student, None, images - 0.5, LABELS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attack(student, None, images, LABELS)
        PGDAttack("cross_entropy", eps=8, steps=4, clip=(0, 255))(student, None, 255 * images, LABELS)
        PGDAttack("cross_entropy", eps=8, steps=4, clip=None)(student, None, images - 0.5, LABELS)


def test_the_default_step_follows_the_radius() -> None:
    assert PGDAttack(eps=0.5).step_size == 0.125
    assert PGDAttack().step_size == 2 / 255


@pytest.mark.parametrize(
    ("options", "reaches"),
    [
        ({"eps": 0.5, "step_size": 2 / 255}, False),
        ({"eps": 8 / 255, "steps": 4, "init": "zero"}, True),
        ({"eps": 8 / 255, "steps": 3, "init": "zero"}, False),
        ({"eps": 8 / 255, "steps": 2, "init": "uniform"}, True),
        ({"eps": 8 / 255, "steps": 1, "init": "uniform"}, False),
        ({"eps": 0.003, "steps": 1, "step_size": 1e-4, "init": "gaussian"}, True),  # the noise alone does
        ({"eps": 0.5, "steps": 1, "norm": "l2", "init": "uniform"}, True),  # it starts there
        ({"eps": 0.5, "steps": 3, "norm": "l2"}, False),
        ({"eps": 0.5, "steps": 0}, True),  # a start is what was asked for
    ],
)
def test_steps_that_do_not_reach_the_edge_are_pointed_out(options: dict, reaches: bool) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        PGDAttack("cross_entropy", **options)
    assert ["do not reach the edge" in str(each.message) for each in said] == [True] * (not reaches)


def test_numpys_numbers_are_numbers(student, teacher, images) -> None:
    python = PGDAttack(eps=0.25, step_size=0.125, steps=2, seed=SEED)
    numpy = PGDAttack(
        eps=np.float32(0.25), step_size=np.float64(0.125), steps=np.int64(2), seed=np.int32(SEED)
    )
    assert torch.equal(numpy(student, teacher, images), python(student, teacher, images))


def test_networks_prepared_in_inference_mode_can_be_attacked(student, teacher, images) -> None:
    with torch.inference_mode():
        pair = prepare_for_attack(student), prepare_for_attack(teacher)
        pair[0].refresh_()
    x_adv = PGDAttack(eps=EPS, step_size=STEP, steps=1)(*pair, images)
    assert 0 < float((x_adv - images).abs().max()) <= EPS + 1e-6


def test_a_prepared_student_has_no_batch_statistics(student, teacher, images) -> None:
    with pytest.raises(ValueError, match="bn='batch'"):
        PGDAttack(bn="batch")(prepare_for_attack(student), teacher, images)


def test_cuda_graph_on_a_cpu_is_refused(student, teacher, images) -> None:
    with pytest.raises(ValueError, match="cuda_graph=True needs images on a CUDA device"):
        PGDAttack(cuda_graph=True)(student, teacher, images)


def test_a_network_that_returns_no_logits_is_named(teacher, images) -> None:
    class TwoOutputs(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    with pytest.raises(TypeError, match=r"TwoOutputs must return a tensor of logits, .*got tuple"):
        PGDAttack(eps=EPS, step_size=STEP)(TwoOutputs(), teacher, images)


def test_a_network_that_its_images_do_not_move_is_named(student, images) -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = student

        def forward(self, x: Tensor) -> Tensor:
            return self.network(x.detach())

    with pytest.raises(ValueError, match=r"no logits .* depend on x_adv differentiably"):
        PGDAttack("cross_entropy", steps=1)(Detached(), None, images, LABELS)


def test_input_gradient_is_one_steps_gradient(student, teacher, images) -> None:
    x = images.clone().requires_grad_()
    log_q, log_p = student(x).log_softmax(1), teacher(x).log_softmax(1)
    (want,) = torch.autograd.grad((log_p.exp() * (log_p - log_q)).sum(), x)
    torch.testing.assert_close(input_gradient(student, teacher, images), want, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="FixedTeacher needs teacher_logits on the clean images, got None"):
        input_gradient(student, teacher, images, "fixed_teacher")
    with pytest.raises(ValueError, match="objective Margin needs labels, got None"):
        input_gradient(student, None, images, "margin")


@pytest.mark.parametrize("objective", ["cross_entropy", "margin"])
@pytest.mark.parametrize("options", [{"early_stop": True}, {"restarts": 2, "steps": 0}, {}])
def test_labels_that_are_no_classes_are_named(student, images, objective: str, options: dict) -> None:
    with pytest.raises(ValueError, match=r"labels must be in \[0, "):
        PGDAttack(objective, **{"steps": 1, **options})(student, None, images, LABELS + 1000)


def test_a_network_is_not_its_own_teacher_in_two_modes(student, images) -> None:
    for objective, bn in (("mismatch", "batch"), ("fixed_teacher", "train")):
        with pytest.raises(ValueError, match="bn must be 'eval' where the teacher has BatchNorm modules"):
            PGDAttack(objective, bn=bn, steps=1)(student, student, images)
    PGDAttack("fixed_teacher", bn="batch", steps=1)(student, None, images)
    PGDAttack("mismatch", steps=1)(student, student, images)


def test_a_start_of_the_callers_own(student: nn.Module, teacher: nn.Module, images: Tensor) -> None:
    settings = {"eps": EPS, "step_size": STEP, "steps": 2}
    start = PGDAttack(init="uniform", seed=SEED, **settings).draw_start(images)
    expected = PGDAttack(init="uniform", seed=SEED, **settings)(student, teacher, images)
    # Whole or in parts: an image's attack depends on its own start alone.
    parts = zip(images.split(3), start.split(3), strict=True)
    attacked = [PGDAttack(**settings)(student, teacher, part, x_start=own) for part, own in parts]
    torch.testing.assert_close(torch.cat(attacked), expected)
    with pytest.raises(ValueError, match="x_start must be like x"):
        PGDAttack(**settings)(student, teacher, images, x_start=start[:2])
    unmoved = PGDAttack(**{**settings, "steps": 0})(student, teacher, images, x_start=start)
    assert torch.equal(unmoved, start)
    assert unmoved.data_ptr() != start.data_ptr()
