"""AutoAttack's frame: what goes into a stage, what counts as broken, and what a result does not depend on."""

from __future__ import annotations

import os
import signal
import socket
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from advfunmatch import InputError, create_model
from advfunmatch.attacks.attacked import AutoAttackWarning
from advfunmatch.attacks.auto_attack import AutoAttack
from advfunmatch.attacks.stages import STAGES, stage
from processes import SERVER
from torch import Tensor, nn

EPS = 0.06


class Toy:
    """Steps along signs that are drawn, kept where the margin falls: what a random search does, in few passes."""

    def __init__(self, steps: int, stream: int, dies_at: int = 0) -> None:
        self.steps, self.stream = steps, stream
        self._dies_at = dies_at
        self._seen: list[Tensor] = []  # no settings, by which a state file knows an attack

    def seen(self) -> Tensor:
        return torch.cat([torch.zeros(0, 1, 8, 8), *(x.float() for x in self._seen)])

    def __call__(self, searched: Any, x: Tensor, y: Tensor, draws: Any, progress: Any = None) -> Tensor:
        self._seen.append(x)
        if self._dies_at == len(self._seen):
            os.kill(os.getpid(), signal.SIGKILL)
        best, kept = x, margin(searched.logits(x), y)
        for step in range(self.steps):
            tried = (x + EPS * draws.signs(self.stream, step, x.shape[1:], x.dtype)).clamp(0, 1)
            found = margin(searched.logits(tried), y)
            best = torch.where((found < kept).view(-1, 1, 1, 1), tried, best)
            kept = torch.minimum(found, kept)
        return best


def margin(logits: Tensor, y: Tensor) -> Tensor:
    of_y = logits.gather(1, y[:, None]).squeeze(1)
    return of_y - logits.scatter(1, y[:, None], -torch.inf).amax(1)


def network(classes: int = 10, seed: int = 0) -> nn.Module:
    """One that tells the classes apart, as an untrained one does not by itself."""
    torch.manual_seed(seed)
    model = create_model("small_cnn-4", num_classes=classes, in_channels=1).eval()
    with torch.no_grad():
        model.fc.bias -= model(noise(100)).mean(0)
    return model


def noise(count: int) -> Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def images(count: int = 40) -> tuple[Tensor, Tensor]:
    x = noise(count)
    y = network()(x).argmax(1)
    y[::7] = (y[::7] + 1) % 10
    return x, y


def toys(dies_at: int = 0) -> dict[str, Toy]:
    return {"first": Toy(3, 1), "second": Toy(12, 2, dies_at)}


def attacked(model: nn.Module, x: Tensor, y: Tensor, **given: Any):
    made = {name: given.pop(name) for name in ("batch_size", "seed", "dtype") if name in given}
    return AutoAttack("linf", EPS, stages=given.pop("stages", None) or toys(), **made)(model, x, y, **given)


def same(a: Any, b: Any) -> bool:
    counted = [(s.name, s.broken.tolist(), s.forwards, s.backwards, s.unverified) for s in a.stages]
    return (
        torch.equal(a.x_adv, b.x_adv)
        and torch.equal(a.robust, b.robust)
        and counted == [(s.name, s.broken.tolist(), s.forwards, s.backwards, s.unverified) for s in b.stages]
    )


def test_stages_get_what_is_left_and_every_break_is_one():
    model = network()
    x, y = images()
    stages = toys()
    result = attacked(model, x, y, stages=stages)
    clean, first, second = result.stages
    correct = model(x).argmax(1) == y
    assert clean.broken.tolist() == (~correct).nonzero().flatten().tolist()
    assert torch.equal(stages["first"].seen(), x[correct])
    assert first.images == int(correct.sum())
    assert 0 < len(first.broken) < first.images
    assert second.images == first.images - len(first.broken)
    assert len(second.broken) > 0
    wrong = model(result.x_adv).argmax(1) != y
    assert torch.equal(result.robust, ~wrong)
    assert bool((result.x_adv <= x + EPS).all())
    assert bool((result.x_adv >= x - EPS).all())
    assert torch.equal(result.x_adv[result.robust], x[result.robust])
    assert (first.forwards, first.backwards) == (
        4 * first.images + first.unverified,
        0,
    ) or first.unverified == 0
    assert result.accuracy == second.accuracy == 100 * float(result.robust.double().mean())
    assert f"{result.accuracy:.2f}" in str(result)


def test_neither_batches_nor_order_change_the_result():
    model = network().double()
    x, y = images()
    whole = attacked(model, x.double(), y)
    assert same(whole, attacked(model, x.double(), y, batch_size=7))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(2))
    other = attacked(model, x.double()[order], y[order], batch_size=11)
    assert torch.equal(other.x_adv, whole.x_adv[order])
    assert torch.equal(other.robust, whole.robust[order])
    assert not same(whole, attacked(model, x.double(), y, seed=1))


def test_what_the_network_itself_withstands_goes_on():
    """A stage that leaves the ball, and one that answers with no numbers, break nothing; the next one may."""
    model = network()
    x, y = images()

    def far(searched: Any, x: Tensor, y: Tensor, draws: Any, progress: Any = None) -> Tensor:
        out = x + 0.5
        out[::2] = torch.nan
        return out

    result = attacked(model, x, y, stages={"far": far, "second": Toy(12, 2)})
    assert bool(((result.x_adv - x).abs() <= EPS * (1 + 1e-6)).all())
    assert bool(result.x_adv.isfinite().all())
    assert result.stages[2].images == result.stages[1].images - len(result.stages[1].broken)
    assert torch.equal(model(result.x_adv).argmax(1) == y, result.robust)


def test_breaks_of_the_searched_network_alone_are_counted():
    """Searched in bfloat16 to just beyond its boundary, some images are still right for the network itself."""
    model = network()
    x, y = images()

    def to_boundary(searched: Any, x: Tensor, y: Tensor, draws: Any, progress: Any = None) -> Tensor:
        inside, outside = x, Toy(12, 2)(searched, x, y, draws)
        for _ in range(20):
            middle = (inside + outside) / 2
            wrong = (margin(searched.logits(middle), y) < 0).view(-1, 1, 1, 1)
            inside, outside = torch.where(wrong, inside, middle), torch.where(wrong, middle, outside)
        return outside

    result = attacked(model, x, y, dtype=torch.bfloat16, stages={"boundary": to_boundary})
    assert torch.equal(model(result.x_adv).argmax(1) == y, result.robust)
    assert len(result.stages[1].broken) > 0
    assert result.stages[1].unverified > 0


def _in_process(work: Any, *arguments: Any) -> int | None:
    process = SERVER.Process(target=work, args=arguments)
    process.start()
    process.join(60)
    return process.exitcode


def _dying(path: Path, x: Tensor, y: Tensor) -> None:
    torch.set_num_threads(1)
    from advfunmatch.attacks import records

    records.PAUSE = 0.0
    attacked(network(), x, y, batch_size=4, state=path, stages=toys(dies_at=3))


def test_killed_it_goes_on_to_the_same_result(tmp_path):
    x, y = images()
    whole = attacked(network(), x, y)
    path = tmp_path / "state"
    assert _in_process(_dying, path, x, y) == -signal.SIGKILL
    stages = toys()
    result = attacked(network(), x, y, batch_size=5, state=path, stages=stages)
    assert same(result, whole)
    assert not len(stages["first"].seen())
    assert 0 < len(stages["second"].seen()) == result.stages[2].images - 8
    again = toys()
    assert same(attacked(network(), x, y, state=path, stages=again), whole)
    assert not len(again["second"].seen())
    for changed, said in (
        ({"seed": 1}, "seed was 0, and is 1"),
        ({"x": x.flip(3)}, "data is another"),
        ({"model": network(seed=1)}, "model is another"),
        ({"stages": {"first": Toy(3, 1)}}, "stages was"),
    ):
        given = {"model": network(), "x": x, "y": y, "state": path} | changed
        with pytest.raises(InputError, match=said):
            attacked(**given)
    path.write_bytes(b"nothing")
    with pytest.raises(InputError, match="holds no state of AutoAttack"):
        attacked(network(), x, y, state=path)


def _sharing(rank: int, port: int, state: Path, out: Path, x: Tensor, y: Tensor) -> None:
    torch.set_num_threads(1)
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ.update(where)
    result = attacked(network().double(), x.double(), y, batch_size=8, state=state)
    torch.save(result, out / f"{rank}.pt")


def test_two_processes_find_what_one_finds(tmp_path):
    x, y = images()
    whole = attacked(network().double(), x.double(), y)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (port, tmp_path / "state", tmp_path, x, y)
    processes = [SERVER.Process(target=_sharing, args=(rank, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    for rank in range(2):
        assert same(torch.load(tmp_path / f"{rank}.pt", weights_only=False), whole)
    assert [path.name for path in sorted(tmp_path.glob("state*"))] == ["state"]


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_few_classes_go_through_every_stage(classes: int, norm: str):
    model = network(classes)
    x = noise(6)
    y = model(x).argmax(1)
    settings = {"apgd_t": {"steps": 5}, "fab_t": {"steps": 5}, "square": {"queries": 20}}
    stages = {name: stage(name, norm, 0.05, **settings.get(name, {"steps": 5})) for name in STAGES}
    result = AutoAttack(norm, 0.05, stages=stages)(model, x, y)
    assert [each.name for each in result.stages] == ["clean", *stages]
    assert torch.equal(model(result.x_adv).argmax(1) == y, result.robust)


class Changed(nn.Module):
    def __init__(self, change: Any) -> None:
        super().__init__()
        self.network, self.change = network(), change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.network, x)


def test_networks_and_images_that_cannot_be_measured_are_refused():
    x, y = images()
    noisy = Changed(lambda inner, x: inner(x + 0.01 * torch.randn_like(x)))
    with pytest.raises(InputError, match="version='rand'"):
        attacked(noisy, x, y)
    with pytest.raises(InputError, match=r"from -1 to .* images in \[0, 1\]"):
        attacked(network(), 2 * x.round() - 1, y)
    with pytest.raises(InputError, match="10 logits"):
        attacked(network(), x, y + 9)
    with pytest.raises(InputError, match="y must be 40 integers"):
        attacked(network(), x, y.float())
    with pytest.raises(InputError, match="y must be 40 integers"):
        attacked(network(), x, y > 0)
    silent = Changed(lambda inner, x: inner(x) * torch.nan)
    with pytest.raises(InputError, match="got NaN for 40 of 40 images"):
        attacked(silent, x, torch.zeros_like(y))
    with pytest.raises(ValueError, match="version must be one of standard, plus, rand"):
        AutoAttack("linf", EPS, "full")
    with pytest.raises(TypeError, match="stages must be a mapping of names to attacks, got list"):
        AutoAttack("linf", EPS, stages=["square"])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="state must be the path of a file, or None, got int"):
        attacked(network(), x, y, state=3)


def test_nan_is_no_right_answer():
    """argmax finds class 0 in rows of NaN."""
    x = 0.5 * noise(4)
    silent = Changed(lambda inner, z: inner(z) * 0 + torch.where(z.flatten(1)[:, :1] > 0.5, torch.nan, 0.0))
    moved = {"moved": lambda searched, x, y, draws: x + EPS}
    x[:, 0, 0, 0] = torch.tensor([0.2, 0.48, 0.3, 0.49])
    result = attacked(silent, x, torch.zeros(4).long(), stages=moved)
    assert result.robust.tolist() == [True, False, True, False]


def test_what_holds_logits_goes_through_every_stage():
    x = noise(6)
    plain, holder = network(), Changed(lambda inner, x: SimpleNamespace(logits=inner(x)))
    y = plain(x).argmax(1)
    settings = {"square": {"queries": 20}}
    stages = {name: stage(name, "linf", EPS, **settings.get(name, {"steps": 5})) for name in STAGES}
    found = AutoAttack("linf", EPS, stages=stages)(holder, x, y)
    assert torch.equal(found.robust, AutoAttack("linf", EPS, stages=stages)(plain, x, y).robust)


def test_doubtful_networks_are_said():
    x, y = images()
    assert not attacked(network(), x, y).warnings
    with pytest.warns(AutoAttackWarning, match="probabilities"):
        attacked(Changed(lambda inner, x: inner(x).softmax(1)), x, y)
    with pytest.warns(AutoAttackWarning, match="of 40 images have a gradient of exactly zero"):
        attacked(Changed(lambda inner, x: inner((255 * x).round() / 255)), x, y)
    with pytest.warns(AutoAttackWarning, match="Square, which sees no gradients, lowers"):
        attacked(network(), x, y, stages={"first": Toy(1, 1), "square": Toy(12, 2)})
    model = network().train()
    with pytest.warns(AutoAttackWarning, match="judged in eval mode"):
        result = attacked(model, x, y)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(result.robust, attacked(network(), x, y).robust)


def test_random_networks_are_attacked_as_they_are():
    x, y = images()
    noisy = Changed(lambda inner, x: inner(x + 0.01 * torch.randn_like(x)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = AutoAttack("linf", EPS, "rand", stages=toys())(noisy, x, y)
    assert 0 < result.accuracy < 100


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_networks_of_other_dtypes(dtype: torch.dtype):
    model = network().to(dtype)
    x = noise(40)
    y = model(x.to(dtype)).argmax(1)
    result = attacked(model, x, y)
    assert torch.equal(model(result.x_adv.to(dtype)).argmax(1) == y, result.robust)
    assert result.x_adv.dtype == torch.float32
    assert 0 < result.accuracy < 100


def test_progress_ends_where_it_says(capsys):
    x, y = images()
    told: list[tuple[int, int]] = []
    attacked(network(), x, y, progress=lambda done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1] > 0
    assert all(done <= total for done, total in told)
    attacked(network(), x, y, progress=True)
    assert "AutoAttack: 100%" in capsys.readouterr().err


def test_versions_are_the_published_ones():
    standard, plus, rand = (AutoAttack("l2", 0.5, version).stages for version in ("standard", "plus", "rand"))
    assert list(standard) == ["apgd_ce", "apgd_t", "fab_t", "square"]
    assert list(plus) == ["apgd_ce", "apgd_dlr", "fab", "square", "apgd_t", "fab_t"]
    assert [attack.restarts for attack in plus.values()] == [5, 5, 5, 1, 1, 1]
    assert [(name, attack.eot, attack.restarts) for name, attack in rand.items()] == [
        ("apgd_ce", 20, 1),
        ("apgd_dlr", 20, 1),
    ]
    steps = [attack.steps for attack in (*list(standard.values())[:3], *rand.values())]
    assert steps == [100] * 5
    assert (standard["apgd_t"].targets, standard["fab_t"].targets, standard["square"].queries) == (9, 9, 5000)
    assert {(attack.norm, attack.eps) for attack in plus.values()} == {("l2", 0.5)}
