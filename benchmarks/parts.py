"""The parts of the suite, and what each offers: names, a run, and a check of its answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from benchmarks.options import Options
from benchmarks.results import Record


class Part(ABC):
    """One part of the suite; its results are one file."""

    name: str
    about: str

    @abstractmethod
    def names(self, options: Options) -> list[str]:
        """What would run."""

    @abstractmethod
    def run(self, options: Options, limits: Any) -> list[Record]:
        """Measure, printing as it goes."""

    def wrong(self, records: list[Record]) -> list[str]:
        """Sentences about answers that are wrong, whatever they took."""
        return []


class Kernels(Part):
    name = "kernels"
    about = "every op x shape family x dtype x mode, against eager, torch.compile and Liger-Kernel"

    def _cases(self, options: Options) -> Any:
        from benchmarks.kernels import suite

        return suite.selected(suite.kernel_cases(), options)

    def names(self, options: Options) -> list[str]:
        return [case.name for case in self._cases(options)]

    def run(self, options: Options, limits: Any) -> list[Record]:
        from benchmarks.kernels import suite

        return suite.run(self._cases(options), options, limits)

    def wrong(self, records: list[Record]) -> list[str]:
        from benchmarks.kernels.case import wrong_answers

        return list(wrong_answers(records))


class Sweep(Kernels):
    name = "sweep"
    about = "softmax_kl over four decades of rows and of classes, against the limits"

    def _cases(self, options: Options) -> Any:
        from benchmarks.kernels import suite

        return suite.selected_sweep(options)


class Accuracy(Part):
    name = "accuracy"
    about = "errors of KL and gradients against float64, for students far from and near their teacher"

    def names(self, options: Options) -> list[str]:
        from benchmarks.kernels import accuracy

        return [setting.name for setting in accuracy.settings(options)]

    def run(self, options: Options, limits: Any) -> list[Record]:
        from benchmarks.kernels import accuracy

        return accuracy.run(list(accuracy.settings(options)), options)

    def wrong(self, records: list[Record]) -> list[str]:
        from benchmarks.kernels import accuracy

        return list(accuracy.wrong_answers(records))


class Training(Part):
    name = "training"
    about = "whole training steps against those of AdaAD, RSLAD and TRADES, and where their time goes"

    def names(self, options: Options) -> list[str]:
        from benchmarks.training import step

        return [setting.name for setting in step.chosen(options)]

    def run(self, options: Options, limits: Any) -> list[Record]:
        from benchmarks.training import step

        return step.run(step.chosen(options), options, limits)

    def wrong(self, records: list[Record]) -> list[str]:
        from benchmarks.training import step

        return list(step.wrong_answers(records))


PARTS: dict[str, Part] = {part.name: part for part in (Kernels(), Sweep(), Accuracy(), Training())}
