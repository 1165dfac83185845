"""The time budget: kept by trimming repetitions, and what is left out is named."""

from dataclasses import dataclass

import pytest

from benchmarks.schedule import LEAST, Schedule


@dataclass
class Case:
    name: str
    cost: float


CASES = [Case(name, 5.0) for name in "abcdefgh"]


class World:
    """A clock that the cases move on; ``slower`` is how many times longer than their cost they take."""

    def __init__(self, slower=1.0):
        self.now, self.slower = 100.0, slower

    def run(self, cases, budget, seconds=2.0):
        self.schedule = Schedule(budget, seconds, clock=lambda: self.now)
        given = {}
        start = self.now
        for case, each in self.schedule.turns(cases):
            given[case.name] = each
            self.now += self.slower * case.cost + each
        self.took = self.now - start
        return given


def test_without_a_budget_every_case_has_its_seconds():
    world = World(slower=9)
    assert world.run(CASES, None) == dict.fromkeys("abcdefgh", 2.0)
    assert world.schedule.left_out == []


def test_repetitions_are_trimmed_first():
    world = World()
    given = world.run(CASES, 48.0)  # 40 s of cost leave 8 s of rounds for eight cases
    assert given == pytest.approx(dict.fromkeys("abcdefgh", 1.0))
    assert world.took <= 48
    assert world.schedule.left_out == []


@pytest.mark.parametrize("slower", [0.3, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("budget", [10.0, 40.0, 80.0])
def test_the_budget_is_kept_on_any_machine(slower, budget):
    world = World(slower)
    given = world.run(CASES, budget)
    # At most the case during which it is found out that this machine is slower.
    assert world.took <= max(budget, slower * 5 + 2) + slower * 5
    assert all(LEAST * 2 <= seconds <= 2 for seconds in given.values())
    assert [*given, *world.schedule.left_out] == list("abcdefgh")


def test_a_case_too_long_for_what_is_left_does_not_keep_out_a_short_one():
    world = World()
    given = world.run([Case("short", 1.0), Case("long", 500.0), Case("last", 1.0)], 20.0)
    assert list(given) == ["short", "last"]
    assert world.schedule.left_out == ["long"]


def test_progress_says_which_case_and_how_long(capsys):
    World().run(CASES[:2], 60.0)
    assert capsys.readouterr().err.splitlines() == ["[1/2, 0:00, 0:14 left] a", "[2/2, 0:07, 0:07 left] b"]
