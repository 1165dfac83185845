"""Images through the stages of AutoAttack: packed, attacked, verified, recorded. See Note [Protocol]."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..data.digest import add_tensor
from ..errors import InputError
from ..lean import prepare_for_attack
from ..models.digest import digest_of_network
from .attacked import CLEAN, AutoAttacked, Stage
from .draws import Draws, image_keys
from .network_checks import (
    ASKED,
    CHECKED,
    check_answers,
    check_data,
    check_labels,
    looks_like_probabilities,
    zero_gradients_of,
)
from .processes import Processes
from .records import Record, Records, StateFile
from .searched import Searched
from .stages import SearchAttack, passes
from .verified import Judge, into_ball

if TYPE_CHECKING:
    from ..progress import ProgressBar

__all__ = ["Staged", "Told"]

CPU_BATCH, GPU_BATCH = 256, 2048  # images; on a GPU halved until they fit into its memory
# What a batch takes where a file is written after it, but never fewer images than that.
STATE_SECONDS, STATE_BATCH = 120.0, 16
SQUARE_GAINS = (
    0.2  # percentage points by which Square may lower what white-box attacks leave (the official limit)
)


class Told:
    """A bar, a function, or nothing, told of passes through the network: how many are done, and of how many at most."""

    def __init__(self, progress: bool | Callable[[int, int], None]) -> None:
        self.function = progress if callable(progress) else None
        self.bar: ProgressBar | None = None
        if progress is True:
            # It needs rich, which those who import only the attack may not have.
            from ..progress import ProgressBar

            self.bar = ProgressBar("AutoAttack", 1)
        self.done = self.total = 0

    def __enter__(self) -> Told:
        if self.bar:
            self.bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar:
            self.bar.__exit__(kind, error, trace)

    def plan(self, total: int, note: str = "") -> None:
        """How many there are at most, those done included."""
        self.total = max(total, self.done)
        if self.bar:
            self.bar.expect(self.total)
            self.bar.say(note)
        self.advance(0)

    def advance(self, images: int) -> None:
        """So many more are done."""
        self.done += images
        if self.bar:
            self.bar.advance(images)
        if self.function:
            self.function(min(self.done, self.total), self.total)


class Staged:
    """One call of `AutoAttack`, whose arguments these are."""

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        norm: str,
        eps: float,
        seed: int,
        stages: Mapping[str, SearchAttack],
        random: bool,
        batch_size: int | None,
        dtype: torch.dtype | None,
        state: str | Path | None,
        processes: Processes,
        told: Told,
    ) -> None:
        check_data(x, y)
        self.given = x
        x = x.detach()
        self.x = x if x.dtype == torch.float64 else x.float()
        self.y = y.long()
        self.norm, self.eps, self.seed, self.stages, self.random = norm, eps, seed, stages, random
        self.batch_size, self.processes, self.told = batch_size, processes, told
        self.judge = Judge(model)
        self.device = self.judge.device or x.device
        lean = None if random else prepare_for_attack(model, dtype)
        self.searched = Searched(self.judge if lean is None else lean, self.told.advance)
        self.records = Records(len(x))
        content = blake2b(digest_size=16)
        add_tensor(content, self.x)
        add_tensor(content, self.y)
        self.about = {
            "model": digest_of_network(model, type(model).__name__),
            "data": content.hexdigest(),
            "norm": norm,
            "eps": eps,
            "seed": seed,
            "stages": ", ".join(f"{name}: {described(attack)}" for name, attack in stages.items()),
            "dtype": str(dtype),
        }
        # The others have nothing to write to where only the first was told of a file.
        self.file = StateFile(processes.gathered(state)[0], self.about, processes.rank)

    def run(self) -> AutoAttacked:
        """All stages, or those that the state file leaves to do."""
        self._check_network()
        self._join(self.file.read())
        standing = torch.ones(len(self.x), dtype=torch.bool)
        accuracies, attacked = {}, {}
        for name in (CLEAN, *self.stages):
            self._plan(name, standing)
            attacked[name] = int(standing.sum())
            standing = self._stage(name, standing)
            accuracies[name] = 100 * float(standing.double().mean())
        self.told.plan(self.told.done)
        return self._result(standing, attacked, accuracies)

    def _plan(self, name: str, standing: Tensor) -> None:
        """Tell how many passes are left at most, of this process."""
        names = list(self.stages)
        left = int((standing & ~self.records.done(name)).sum())
        total = 2 * left if name == CLEAN else left * passes(self.stages[name], self.num_classes)
        for later in names if name == CLEAN else names[names.index(name) + 1 :]:
            todo = int((standing & ~self.records.done(later)).sum())
            total += todo * passes(self.stages[later], self.num_classes)
        self.told.plan(self.told.done + total // self.processes.size, f"{name}, {int(standing.sum())} left")

    def _check_network(self) -> None:
        if not len(self.x):
            raise InputError("x must hold one image or more, got none")
        alike = self.processes.gathered(self.about)
        if any(about != self.about for about in alike):
            raise InputError(
                f"the {self.processes.size} processes were given different networks, images or settings, but must be "
                "given the same to share them out"
            )
        x = self.x[:CHECKED].to(self.device)
        answers = [self.judge.logits(x) for _ in range(1 if self.random else ASKED)]
        check_answers(answers)
        self.num_classes = answers[0].shape[1]
        check_labels(self.y, self.num_classes)
        self.probabilities = looks_like_probabilities(answers[0])

    def _join(self, records: list[Record]) -> None:
        """Put together what all processes have, in the first's file."""
        for found in self.processes.gathered(records):
            self.records.add(found)
        self._settle()

    def _settle(self) -> None:
        """All processes have the same records: the first writes them, and the others' files go."""
        if self.processes.rank == 0:
            self.file.write(self.records.all, now=True)
            self.file.remove_others()
        self.processes.gathered(None)  # nobody writes before that

    def _stage(self, name: str, standing: Tensor) -> Tensor:
        """(N,) bool: what of the standing images a stage leaves standing."""
        left = (standing & ~self.records.done(name)).nonzero().flatten()
        mine = left[self.processes.rank :: self.processes.size]
        found: list[Record] = []
        size = self._size(name, len(mine))
        while len(mine):
            try:
                found.append(self._batch(name, mine[:size]))
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
                size = -(-size // 2)
                torch.cuda.empty_cache()
                continue
            mine = mine[size:]
            alone = self.processes.size == 1
            self.file.write([*self.records.all, *found] if alone or self.processes.rank == 0 else found)
        if bool(left.numel()):
            for records in self.processes.gathered(found):
                self.records.add(records)
            self._settle()
        standing = standing.clone()
        for record in self.records.of(name):
            standing[record.images[record.broken]] = False
        return standing

    def _size(self, name: str, images: int) -> int:
        """How many images go into a batch of a stage."""
        if self.batch_size is not None:
            return self.batch_size
        size = GPU_BATCH if self.device.type == "cuda" else CPU_BATCH
        if self.file.path is not None and name != CLEAN:
            clean = self.records.of(CLEAN)
            seconds = sum(record.counts["seconds"] for record in clean) / len(self.x)  # about three passes
            timely = STATE_SECONDS / (seconds / 3 * passes(self.stages[name], self.num_classes))
            size = min(size, max(int(timely), STATE_BATCH))
        return max(1, min(size, images))

    def _batch(self, name: str, images: Tensor) -> Record:
        """What a stage makes of some images."""
        started = time.perf_counter()
        before = self.searched.forwards, self.searched.backwards
        x, y = self.x[images].to(self.device), self.y[images].to(self.device)
        if name == CLEAN:
            x_adv, broken = x, self.judge.wrong(x, y)
            counts = {"zero_gradients": float((zero_gradients_of(self.searched, x, y) & ~broken).sum())}
        else:
            draws = Draws(self.seed, image_keys(x))
            x_adv = into_ball(self.stages[name](self.searched, x, y, draws), x, self.norm, self.eps)
            broken = self.judge.wrong(x_adv, y)
            missed = ~broken & (x_adv != x).flatten(1).any(1)
            counts = {"unverified": 0.0}
            if not self.random and bool(missed.any()):
                wrong = self.searched.logits(x_adv[missed]).argmax(1) != y[missed]
                counts["unverified"] = float(wrong.sum())
        kept = x_adv[broken].cpu() if name != CLEAN else x_adv[:0].cpu()
        counts |= {
            "forwards": float(self.searched.forwards - before[0]),
            "backwards": float(self.searched.backwards - before[1]),
            "seconds": time.perf_counter() - started,
        }
        return Record(name, images, broken.cpu(), kept, counts)

    def _result(
        self, standing: Tensor, attacked: dict[str, int], accuracies: dict[str, float]
    ) -> AutoAttacked:
        x_adv = self.x.clone()
        stages = []
        for name in (CLEAN, *self.stages):
            records = self.records.of(name)
            for record in records if name != CLEAN else ():
                x_adv[record.images[record.broken].to(x_adv.device)] = record.x_adv.to(x_adv)
            counts = {
                key: sum(record.counts.get(key, 0.0) for record in records)
                for key in ("unverified", "seconds", "forwards", "backwards")
            }
            broken = torch.cat(
                [record.images[record.broken] for record in records] or [torch.zeros(0).long()]
            )
            stages.append(
                Stage(
                    name=name,
                    images=attacked[name],
                    broken=broken.sort().values,
                    unverified=round(counts["unverified"]),
                    accuracy=accuracies[name],
                    seconds=counts["seconds"],
                    forwards=round(counts["forwards"]),
                    backwards=round(counts["backwards"]),
                )
            )
        zero = round(sum(record.counts["zero_gradients"] for record in self.records.of(CLEAN)))
        return AutoAttacked(x_adv, standing.to(x_adv.device), stages, zero, self._doubts(stages, zero))

    def _doubts(self, stages: list[Stage], zero_gradients: int) -> list[str]:
        """What makes the figures doubtful, a sentence each."""
        said = []
        if self.probabilities:
            said.append(
                "the network returns what look like probabilities, but the losses are made for logits: return those"
            )
        if zero_gradients:
            said.append(
                f"{zero_gradients} of {len(self.x)} images have a gradient of exactly zero, which gradient attacks "
                "cannot follow: gradients are masked, or the logits too large for their dtype"
            )
        before = stages[0]
        for stage in stages[1:]:
            gained = before.accuracy - stage.accuracy
            if stage.name == "square" and before.name != CLEAN and gained > SQUARE_GAINS:
                said.append(
                    f"Square, which sees no gradients, lowers the accuracy by {gained:.2f} points more than the "
                    "attacks before it that do: gradients may be masked"
                )
            before = stage
        return said


def described(attack: SearchAttack) -> str:
    """The settings of an attack, by which one is known again."""
    settings = ", ".join(
        f"{name}={value!r}" for name, value in vars(attack).items() if not name.startswith("_")
    )
    return f"{type(attack).__name__}({settings})"
