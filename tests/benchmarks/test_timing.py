"""The timing that every benchmark rests on."""

import os
import subprocess
import sys
import time

import pytest

from benchmarks import timing
from benchmarks.timing import OtherLoad, Samples, interleave, peak_memory, quantile, ratio


def busy(seconds: float):
    def call() -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass

    return call


def test_ratio_of_known_durations():
    times = interleave({"slow": busy(2e-3), "fast": busy(0.5e-3)}, budget=0.5)
    # Of the minima, which other programs beside the tests do not move; the median of the ratios they do.
    assert times["slow"].minimum / times["fast"].minimum == pytest.approx(4, rel=0.25)
    assert ratio(times, "slow", "fast").median > 1
    assert times["fast"].minimum >= 0.5e-3


def test_every_candidate_has_one_sample_a_round():
    counts = {"a": 0, "b": 0, "c": 0}

    def count(name):
        def call():
            counts[name] += 1
            busy(1e-3)()

        return call

    times = interleave(
        {name: count(name) for name in counts}, budget=0, min_rounds=7, warmup=1, min_sample=1e-6
    )
    assert [len(samples.values) for samples in times.values()] == [7, 7, 7]
    assert counts == {
        "a": 10,
        "b": 10,
        "c": 10,
    }  # one warm-up, two to find the number of calls, seven samples


def test_a_short_call_is_repeated():
    times = interleave({"short": lambda: None}, budget=0.05, min_sample=1e-3)
    assert times["short"].calls > 1000


def test_a_pause_while_the_number_of_calls_is_sought_is_not_taken_for_the_calls(monkeypatch):
    seconds = iter([5e-3])  # a call of a microsecond, of which the first is held up
    monkeypatch.setattr(timing, "_wall_sample", lambda call, calls, finish: next(seconds, 1e-6))
    assert interleave({"short": lambda: None}, min_sample=1e-3)["short"].calls >= 1000


def test_budget_and_bounds():
    times = interleave({"a": busy(10e-3)}, budget=0.1, min_rounds=3)
    assert 3 <= len(times["a"].values) <= 11
    assert len(interleave({"a": busy(1e-4)}, budget=5, max_rounds=4)["a"].values) == 4


def test_summary():
    samples = Samples((4.0, 1.0, 2.0, 3.0, 5.0))
    assert (samples.minimum, samples.low, samples.median, samples.high) == (1, 2, 3, 4)
    assert samples.spread == pytest.approx(2 / 3)
    assert samples.as_dict()["samples"] == 5
    assert quantile([1.0, 2.0], 0.25) == 1.25


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [({"clock": "sundial"}, "clock must be"), ({"clock": "events"}, "needs a CUDA device")],
)
def test_bad_arguments(kwargs, words):
    with pytest.raises(ValueError, match=words):
        interleave({"a": lambda: None}, **kwargs)
    with pytest.raises(ValueError, match="at least one"):
        interleave({})


def test_peak_memory_counts_what_is_alive_at_once():
    torch = pytest.importorskip("torch")
    x = torch.ones(1 << 18)  # 1 MiB

    def two_then_one():
        y = x + 1
        z = y * 2
        del y
        return z - 1

    assert peak_memory(two_then_one) == pytest.approx(2 << 20, rel=0.01)


def test_allocator_settings_reach_the_process_once():
    program = (
        "from benchmarks.timing import settle_allocator, ALLOCATOR_SETTINGS; settle_allocator();"
        "import os; print(os.getpid(), {n: os.environ[n] for n in ALLOCATOR_SETTINGS})"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=True
    )
    assert done.stdout.count("MALLOC_MMAP_MAX_': '0'") == 1


def test_other_load_does_not_count_this_process():
    with OtherLoad() as load:
        busy(0.3)()
    if load.fraction is None:
        pytest.skip("the system does not tell how busy it is")
    used = os.times()
    with OtherLoad() as load:
        child = "import time; end = time.perf_counter() + 1\nwhile time.perf_counter() < end: pass"
        process = subprocess.Popen([sys.executable, "-c", child])
        time.sleep(0.8)  # asleep: what is busy meanwhile is somebody else
    process.wait()
    assert os.times().user - used.user < 0.5
    assert load.fraction > 0.5 / os.cpu_count()
