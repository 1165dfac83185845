"""Results of benchmarks as JSON: what was measured, where, of which commit, and a check that a file is complete.

A file holds the runs of one part of the suite. A run is one process on one machine at one commit; everything in it was
measured beside the limits it carries. A record is one way of doing one thing:

    name       "softmax_kl/both/512x1000/float32/ours": op, mode, shape, dtype and variant, unique in the file
    variant    the last part of the name; peers are what the project is compared with
    time       seconds a call: median, minimum, quartiles, number of samples and calls a sample; null where
               only errors were measured
    speedup    over each peer: the ratios within rounds, summarised like the time
    error      against float64: relative L2 error of the loss and of each gradient; null where it is not finite
    limits     seconds that one bound alone would take: "copy" (the minimal bytes, copied), "exp", "matmul", "call"
    bytes      the fewest bytes that must move; peak_bytes: the most that was allocated at once
    details    whatever else the benchmark wants to say; "other_load" is the share of the processors that other programs
               used while this was timed

A run's settings say what fairness rests on: "steady_allocator" (Note [Fair timing]) and the worst "other_load".

Times of different runs are not comparable on a shared machine; speedups are, and ``benchmarks.compare`` uses those.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.timing import ALLOCATOR_SETTINGS, Samples, ratio

SCHEMA = 1
ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks" / "results"

Json = dict[str, Any]
_SUMMARY = {"median": float, "minimum": float, "low": float, "high": float, "samples": int, "calls": int}
_PACKAGES = ("torch", "torchvision", "triton", "numpy", "liger-kernel")


class MissingResults(ValueError):
    """A results file is not there, or holds nothing of what was asked for."""


@dataclass
class Record:
    """One way of doing one thing, measured; see the head of this file."""

    name: str
    time: Json | None
    peer: bool = False
    speedup: dict[str, Json] = field(default_factory=dict)
    error: dict[str, float | None] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)
    bytes: int | None = None
    peak_bytes: int | None = None
    details: Json = field(default_factory=dict)

    @property
    def variant(self) -> str:
        return self.name.rpartition("/")[2]

    @property
    def group(self) -> str:
        """What the variants of one interleaved measurement share."""
        return self.name.rpartition("/")[0]

    def bound(self) -> tuple[str, float]:
        """The limit that binds, and the share of it that was reached."""
        assert self.time is not None
        name = max(self.limits, key=lambda limit: self.limits[limit])
        return name, self.limits[name] / self.time["median"]


def finite(value: float) -> float | None:
    """The value for JSON, which knows neither NaN nor infinity."""
    return float(value) if math.isfinite(value) else None


def records_of(
    group: str, times: Mapping[str, Samples], *, peers: tuple[str, ...], skip: tuple[str, ...] = ("copy",)
) -> dict[str, Record]:
    """One record for each variant that was timed, with its speedup over every peer but itself.

    Variants in ``skip`` were timed as limits and get no record.
    """
    records = {}
    for variant, samples in times.items():
        if variant in skip:
            continue
        over = [peer for peer in peers if peer in times and peer != variant]
        records[variant] = Record(
            name=f"{group}/{variant}",
            time=samples.as_dict(),
            peer=variant in peers,
            speedup={peer: ratio(times, peer, variant).as_dict() for peer in over},
        )
    return records


def machine() -> Json:
    """What the numbers depend on: processor, instruction set, cores, threads, memory, GPU."""
    import torch

    described = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                described = line.partition(":")[2].strip()
                break
    gpu = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        gpu = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return {
        "cpu": described,
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": gpu,
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    """Versions of Python and of what takes part, where it is installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    version_file = ROOT / "afm_kernels" / "version.py"
    scope: dict[str, str] = {}
    exec(version_file.read_text(), scope)  # not an import: that would load the kernels
    found["afm_kernels"] = scope["__version__"]
    return found


def commit() -> str:
    """The commit measured, followed by "+" if tracked files differ from it; "unknown" outside a clone."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":!benchmarks/results", ":!docs")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def new_run(limits: Json, records: list[Record], **settings: Any) -> Json:
    """One run, ready for ``save``.

    Its ``other_load`` is the worst of the timed stretches alone: between them torch.compile's own workers are "other
    programs" too.
    """
    written = [asdict(record) for record in records]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
        "settings": {
            "steady_allocator": all(os.environ.get(k) == v for k, v in ALLOCATOR_SETTINGS.items()),
            "other_load": worst_load(written),
            **settings,
        },
        "limits": limits,
        "records": written,
    }


def worst_load(written: list[Json]) -> float | None:
    """The largest share of the processors that other programs used during any of the records."""
    loads = [record["details"].get("other_load") for record in written]
    return max((load for load in loads if load is not None), default=None)


def save(path: Path, part: str, run: Json, *, append: bool = False) -> None:
    """Write a run to ``path``, atomically; with ``append``, keep the older runs' records of other names."""
    runs = []
    if append and path.exists():
        fresh = {record["name"] for record in run["records"]}
        for old in load(path)["runs"]:
            old["records"] = [record for record in old["records"] if record["name"] not in fresh]
            if old["records"]:
                old["settings"]["other_load"] = worst_load(old["records"])
                runs.append(old)
    content = {"schema": SCHEMA, "part": part, "runs": [*runs, run]}
    validate(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False) as file:
        json.dump(_rounded(content), file, indent=1, allow_nan=False)
        file.write("\n")
    Path(file.name).chmod(0o644)
    Path(file.name).replace(path)


def load(path: Path) -> Json:
    """A results file, validated."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise MissingResults(f"there are no results at {path}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    try:
        validate(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return content


def records(content: Json) -> Iterator[Record]:
    """Every record of a results file."""
    for run in content["runs"]:
        for record in run["records"]:
            yield Record(**record)


def validate(content: Json) -> None:
    """Raise a ValueError that names the first place where ``content`` is not a results file."""
    _fields(content, "file", {"schema": int, "part": str, "runs": list})
    if content["schema"] != SCHEMA:
        raise ValueError(f"file.schema is {content['schema']}, this program reads {SCHEMA}")
    seen: set[str] = set()
    for i, run in enumerate(content["runs"]):
        where = f"runs[{i}]"
        _fields(run, where, {"date": str, "commit": str, "machine": dict, "versions": dict})
        _fields(run, where, {"settings": dict, "limits": dict, "records": list})
        _fields(run["machine"], f"{where}.machine", {"cpu": str, "cores": int, "threads": int})
        _fields(run["settings"], f"{where}.settings", {"steady_allocator": bool})
        _fields(run["versions"], f"{where}.versions", {"python": str, "torch": str})
        for j, record in enumerate(run["records"]):
            _validate_record(record, f"{where}.records[{j}]")
            if record["name"] in seen:
                raise ValueError(f"{where}.records[{j}].name {record['name']!r} appears twice")
            seen.add(record["name"])


def _validate_record(record: Json, where: str) -> None:
    _fields(record, where, {"name": str, "peer": bool, "speedup": dict, "error": dict})
    _fields(record, where, {"limits": dict, "details": dict})
    unknown = set(record) - set(Record.__dataclass_fields__)
    if unknown:
        raise ValueError(f"{where} has unknown fields: {', '.join(sorted(unknown))}")
    if record["name"].count("/") < 1:
        raise ValueError(f"{where}.name is {record['name']!r}, not what/variant")
    summaries = {f"speedup[{peer!r}]": summary for peer, summary in record["speedup"].items()}
    if record.get("time") is not None:
        summaries["time"] = record["time"]
    for name, summary in summaries.items():
        _fields(summary, f"{where}.{name}", _SUMMARY)
        if not 0 < summary["minimum"] <= summary["low"] <= summary["median"] <= summary["high"]:
            raise ValueError(f"{where}.{name} is not in order: 0 < minimum <= low <= median <= high")
    for kind in ("error", "limits"):
        for name, value in record[kind].items():
            if value is None and kind == "error":
                continue
            if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
                raise ValueError(f"{where}.{kind}[{name!r}] is {value!r}, not a number of at least 0")


def _fields(value: Any, where: str, expected: Mapping[str, type]) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {type(value).__name__}, not an object")
    for name, kind in expected.items():
        if name not in value:
            raise ValueError(f"{where} has no field {name!r}")
        allowed = (int, float) if kind is float else kind
        if not isinstance(value[name], allowed) or (kind is not bool and isinstance(value[name], bool)):
            raise ValueError(f"{where}.{name} is {value[name]!r}, not {kind.__name__}")


def _rounded(value: Any) -> Any:
    """Five significant digits: more would be noise, and noise makes differences hard to read."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return value
