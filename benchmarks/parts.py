"""The parts of the suite, and what each offers: names, a run, and a check of its answers."""

from __future__ import annotations

import argparse
import re
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


class Attack(Part):
    name = "attack"
    about = "the attack engine against the loops of AdaAD, RSLAD and TRADES"

    def _cases(self, options: Options) -> Any:
        from benchmarks.attack.__main__ import CPU_CASES, CUDA_CASES

        cases = CUDA_CASES if options.device.startswith("cuda") else CPU_CASES
        if options.only is not None:
            return [case for case in cases if re.search(options.only, case.name)]
        return [case for case in cases if options.full or case.size == 8]

    def names(self, options: Options) -> list[str]:
        return [case.name for case in self._cases(options)]

    def run(self, options: Options, limits: Any) -> list[Record]:
        from benchmarks.attack.__main__ import run_case, table

        settings = argparse.Namespace(
            compile=not options.smoke, budget=4 * options.seconds, min_rounds=3 if options.smoke else 5
        )
        records = []
        for case in self._cases(options):
            measured = run_case(case, options.device, limits, settings)
            print(table(measured), flush=True)
            records += measured
        return records

    def wrong(self, records: list[Record]) -> list[str]:
        return [
            f"{r.name}: reaches {r.details['kl_share_of_loop']:.0%} of the KL that the loop reaches"
            for r in records
            if not r.peer and not r.details["kl_share_of_loop"] > 0.9
        ]


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


PARTS: dict[str, Part] = {part.name: part for part in (Kernels(), Sweep(), Accuracy(), Attack(), Training())}
