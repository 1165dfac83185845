"""Timing several ways of doing one thing, interleaved, so that their ratios can be believed.

    times = interleave({"eager": eager, "ours": ours}, budget=2.0)
    print(times["ours"].median, ratio(times, "eager", "ours").median)

Note [Fair timing]
~~~~~~~~~~~~~~~~~~
* Candidates take turns: one sample of each per round, in an order that changes from round to round. A
  machine that slows down for a second slows all of them. Ratios are taken within a round and the median of
  those is quoted.
* A sample repeats a call until it lasts ``min_sample`` seconds, because a clock read and a cold instruction
  cache would otherwise be part of a ten-microsecond call. All candidates are warmed up first, compilation
  included.
* What a call returns is freed inside the timed region: the caller of a loss pays for its temporaries too.
* Python's garbage collector is off while a sample runs.
* On CPUs, glibc hands large blocks back to the kernel and faults every page in again at the next
  allocation. That costs more than the arithmetic and varies tenfold between runs: a program that times
  should call ``settle_allocator()`` first, before it imports torch.
* On CUDA, time is what events on the stream say, behind a short spin that lets the host run ahead: without
  the backlog, events around a kernel of a few microseconds measure how fast Python enqueues.
  ``clock="wall"`` measures that on purpose.
"""

from __future__ import annotations

import gc
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

ALLOCATOR_SETTINGS = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
"""glibc settings under which freed memory stays with the process; see Note [Fair timing]."""

QUIET = 0.1
"""The share of the processors that other programs may use beside a timing that is to be believed."""

_SPIN_HZ = 2.0e9  # the fastest clock of current GPUs: a spin then lasts no shorter than asked


def settle_allocator() -> None:
    """Start this program again, once, under ``ALLOCATOR_SETTINGS``; glibc reads them only at start-up."""
    if all(os.environ.get(name) == value for name, value in ALLOCATOR_SETTINGS.items()):
        return
    if os.environ.get("_AFM_ALLOCATOR_SETTLED"):  # somebody strips the environment: do not loop
        return
    os.environ.update(ALLOCATOR_SETTINGS, _AFM_ALLOCATOR_SETTLED="1")
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def quantile(values: list[float] | tuple[float, ...], q: float) -> float:
    """The q-quantile (0 <= q <= 1) of ``values``, linear between neighbours."""
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


@dataclass(frozen=True)
class Samples:
    """What repeated measurement of one number gave: seconds a call, or a ratio of two such."""

    values: tuple[float, ...]
    calls: int = 1
    """How many calls each value is the mean of."""

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def minimum(self) -> float:
        return min(self.values)

    @property
    def low(self) -> float:
        """The lower quartile."""
        return quantile(self.values, 0.25)

    @property
    def high(self) -> float:
        """The upper quartile."""
        return quantile(self.values, 0.75)

    @property
    def spread(self) -> float:
        """The distance of the quartiles, relative to the median."""
        return (self.high - self.low) / self.median if self.median else 0.0

    def as_dict(self) -> dict[str, float | int]:
        """For a JSON file: median, minimum, quartiles and how many samples of how many calls."""
        return {
            "median": self.median,
            "minimum": self.minimum,
            "low": self.low,
            "high": self.high,
            "samples": len(self.values),
            "calls": self.calls,
        }


def ratio(times: Mapping[str, Samples], baseline: str, candidate: str) -> Samples:
    """How many times faster ``candidate`` is than ``baseline``: the ratios within each round of one run."""
    pairs = zip(times[baseline].values, times[candidate].values, strict=True)
    return Samples(tuple(slow / fast for slow, fast in pairs))


def interleave(
    candidates: Mapping[str, Callable[[], object]],
    *,
    budget: float = 2.0,
    min_rounds: int = 5,
    max_rounds: int = 200,
    min_sample: float = 500e-6,
    warmup: int = 3,
    before: Callable[[], object] | None = None,
    device: str = "cpu",
    clock: str = "auto",
    seed: int = 0,
) -> dict[str, Samples]:
    """Time every candidate in turns and return its seconds a call, one value for each round.

    Args:
        candidates: what to time, by name; each takes no argument, and what it returns is dropped.
        budget: seconds to spend on rounds, over all candidates; ``min_rounds`` may exceed it.
        min_rounds, max_rounds: bounds on the number of rounds (samples of each candidate).
        min_sample: a sample repeats the call until it lasts this many seconds.
        warmup: untimed calls of each candidate before the first round.
        before: called untimed before each sample, to flush a cache for instance.
        device: "cpu" or a CUDA device; decides the clock.
        clock: "auto" (events on CUDA, else wall), "events", or "wall", which on CUDA waits for the device
            and so includes the host's overhead.
        seed: of the order within rounds.

    Example:
        >>> times = interleave({"ten": lambda: sum(range(10)), "many": lambda: sum(range(9999))}, budget=0.05)
        >>> ratio(times, "many", "ten").median > 10
        True
    """
    if not candidates:
        raise ValueError("candidates must name at least one callable, got none")
    if clock not in ("auto", "events", "wall"):
        raise ValueError(f"clock must be 'auto', 'events' or 'wall', got {clock!r}")
    on_cuda = device.startswith("cuda")
    if clock == "events" and not on_cuda:
        raise ValueError(f"clock='events' needs a CUDA device, got device={device!r}")
    events = on_cuda and clock != "wall"
    finish = _cuda_synchronise if on_cuda else _nothing

    calls: dict[str, int] = {}
    lasts: dict[str, float] = {}
    for name, call in candidates.items():
        for _ in range(warmup):
            call()
        finish()
        calls[name], lasts[name] = _calls_for(call, min_sample, finish)

    order = list(candidates)
    shuffle = random.Random(seed).shuffle
    values: dict[str, list[float]] = {name: [] for name in candidates}
    start = time.perf_counter()
    for done in range(max_rounds):
        if done >= min_rounds and (time.perf_counter() - start) * (done + 1) / done > budget:
            break
        shuffle(order)
        for name in order:
            if before is not None:
                before()
            if events:
                values[name].append(_cuda_sample(candidates[name], calls[name], lasts[name]))
            else:
                values[name].append(_wall_sample(candidates[name], calls[name], finish))
    return {name: Samples(tuple(values[name]), calls[name]) for name in candidates}


# Seconds that nothing but a call takes: a pause that another program makes is shorter.
_UNDISTURBED = 0.1


def _calls_for(
    call: Callable[[], object], min_sample: float, finish: Callable[[], object]
) -> tuple[int, float]:
    """How many calls make a sample of ``min_sample`` seconds, and how long it lasts."""
    calls = 1
    while True:
        each = _wall_sample(call, calls, finish)
        if min_sample <= each * calls < _UNDISTURBED:
            each = min(
                each, _wall_sample(call, calls, finish)
            )  # another program may have had the core meanwhile
        if each * calls >= min_sample:
            calls = max(1, min(calls, round(min_sample / each + 0.5)))
            return calls, each * calls
        calls = max(2 * calls, min(10 * calls, int(1.2 * min_sample / max(each, 1e-9))))


def _wall_sample(call: Callable[[], object], calls: int, finish: Callable[[], object]) -> float:
    collecting = gc.isenabled()
    gc.disable()
    try:
        finish()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        finish()
        return (time.perf_counter() - start) / calls
    finally:
        if collecting:
            gc.enable()


def _cuda_sample(call: Callable[[], object], calls: int, backlog: float) -> float:
    import torch

    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(int(backlog * _SPIN_HZ))  # no public function spins a stream
    first.record()
    for _ in range(calls):
        call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) * 1e-3 / calls


def _cuda_synchronise() -> None:
    import torch

    torch.cuda.synchronize()


def _nothing() -> None:
    return None


def peak_memory(call: Callable[[], object], device: str = "cpu") -> int:
    """Bytes that one call has allocated from PyTorch at its highest, above what was there before it."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - held

    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        call()
    results = profile.profiler.kineto_results
    changes = sorted(
        (event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]"
    )
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


class OtherLoad:
    """Measures how much of the processors other programs used while a ``with`` block ran.

    ``fraction`` is None where the system does not tell (it needs /proc/stat). Timings of small parallel work are
    worth nothing above a few percent: each parallel region waits for the thread that was pushed aside.
    """

    fraction: float | None = None

    def __enter__(self) -> OtherLoad:
        self._start = _cpu_seconds()
        return self

    def __exit__(self, *exception: object) -> None:
        end = _cpu_seconds()
        if self._start is None or end is None:
            return
        total, busy, own = (after - before for before, after in zip(self._start, end, strict=True))
        self.fraction = max(0.0, (busy - own) / total) if total > 0 else None


def _cpu_seconds() -> tuple[float, float, float] | None:
    """Seconds of all processors together so far: in all, busy, and of this process and the children it waited for."""
    try:
        with open("/proc/stat") as file:
            ticks = [int(value) for value in file.readline().split()[1:9]]
    except OSError:
        return None
    idle = ticks[3] + ticks[4]
    each = os.sysconf("SC_CLK_TCK")
    used = os.times()
    own = used.user + used.system + used.children_user + used.children_system
    return sum(ticks) / each, (sum(ticks) - idle) / each, own
