"""AutoAttack (Croce and Hein 2020) on prepared networks: the standard protocol, each break verified.

Note [Protocol]
~~~~~~~~~~~~~~~
The stages are the official ones, in their order. Each starts from the clean images that no stage before it broke,
packed into full batches, and searches on the prepared network. What it returns is moved into the ball in the images'
own dtype and shown to the network itself, in eval mode and without TF32: only what that misclassifies is broken, and
everything else goes on to the next stage. So the prepared network's arithmetic can err towards robust only, and by how
much is counted (`Stage.unverified`). A random network is searched as it is.

Random numbers belong to images (Note [Draws]), so that the batch size, the order and the number of processes change
results by no more than they change the rounding of the network's own arithmetic.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor, nn

from ..models.frozen import frozen
from .arguments import check_choice, check_counts, check_images, check_options
from .attacked import CLEAN, AutoAttacked, AutoAttackWarning
from .network_checks import acts_in_training
from .processes import joined
from .staged import Staged, Told
from .stages import VERSIONS, SearchAttack, stages_of

__all__ = ["AutoAttack"]


class AutoAttack:
    """AutoAttack for linf and l2; see Note [Protocol].

    Args:
        norm: ``"linf"`` or ``"l2"``.
        eps: radius of the ball, for images in [0, 1].
        version: ``"standard"`` (APGD-CE, APGD-T, FAB-T, Square), ``"plus"`` (APGD-CE and -DLR and FAB with 5 restarts,
            Square, APGD-T, FAB-T), or ``"rand"`` for networks that answer at random (APGD-CE and -DLR, each gradient
            the mean of 20).
        seed: of every random number.
        stages: attacks of one's own choice instead of the version's: name to attack, in the order in which they run;
            see `SearchAttack`. Call it by another name than AutoAttack where it does less.
        batch_size: images at a time; None takes 256 on CPUs, and what fits into memory on GPUs.
        dtype: in which the search runs, such as ``torch.bfloat16`` on a GPU; None is the network's own.

    Raises:
        ValueError, TypeError: an argument that cannot be.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval()
        >>> x = torch.rand(4, 1, 8, 8)
        >>> y = network(x).argmax(1)
        >>> result = AutoAttack("linf", eps=0.2)(network, x, y)
        >>> result.robust.tolist(), [stage.name for stage in result.stages][:2]
        ([False, False, False, False], ['clean', 'apgd_ce'])
    """

    def __init__(
        self,
        norm: str,
        eps: float,
        version: str = "standard",
        seed: int = 0,
        *,
        stages: Mapping[str, SearchAttack] | None = None,
        batch_size: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_options(norm, "zero", "eval", eps, None)
        check_choice("version", version, VERSIONS)
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed must be an integer, got {type(seed).__name__}")
        if batch_size is not None:
            check_counts(batch_size=(batch_size, 1))
        if stages is not None and not isinstance(stages, Mapping):
            raise TypeError(f"stages must be a mapping of names to attacks, got {type(stages).__name__}")
        if stages is not None and (not stages or CLEAN in stages):
            raise ValueError(
                f"stages must name one or more attacks, none of them {CLEAN!r}, got {list(stages)}"
            )
        for name, attack in (stages or {}).items():
            if not callable(attack):
                raise TypeError(f"stages[{name!r}] must be an attack, got {type(attack).__name__}")
        self.norm, self.eps, self.version, self.seed = norm, eps, version, seed
        self.stages = dict(stages) if stages is not None else stages_of(version, norm, eps)
        self.batch_size, self.dtype = batch_size, dtype

    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        state: str | Path | None = None,
        progress: bool | Callable[[int, int], None] = False,
        shared: bool = True,
    ) -> AutoAttacked:
        """Attack a network.

        Args:
            model: images in [0, 1] to logits (N, C), C at least 2, or to an object with ``.logits``. It is put into
                eval mode meanwhile, and its parameters need no gradient.
            x: (N, C, H, W) in [0, 1].
            y: (N,) integers, the true classes.
            state: a file from which a call that was stopped goes on, with the same result.
            progress: True shows a bar; a function is called with how many passes of images through the network are
                done, and of how many at most.
            shared: under torchrun, whether all processes make this call together and each takes a share of the images.

        Warns:
            AutoAttackWarning: for what makes the figures doubtful.

        Raises:
            InputError: images outside [0, 1], labels that are no classes, a network that answers NaN, or the same
                images differently each time (but for version="rand"), or a state file of another run.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        check_images(x, None)
        if state is not None and not isinstance(state, (str, Path)):
            raise TypeError(f"state must be the path of a file, or None, got {type(state).__name__}")
        was_training = acts_in_training(model)
        with ExitStack() as stack:
            stack.enter_context(frozen(model))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            processes = stack.enter_context(joined(shared))
            told = stack.enter_context(Told(progress if processes.rank == 0 else False))
            result = Staged(
                model,
                x,
                y,
                norm=self.norm,
                eps=self.eps,
                seed=self.seed,
                stages=self.stages,
                random=self.version == "rand",
                batch_size=self.batch_size,
                dtype=self.dtype,
                state=state,
                processes=processes,
                told=told,
            ).run()
        if was_training:
            result.warnings.insert(
                0, "the network was in train mode; it was attacked and judged in eval mode"
            )
        for sentence in result.warnings:
            warnings.warn(sentence, AutoAttackWarning, stacklevel=2)
        return result
