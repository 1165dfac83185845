"""What comes from outside: the tables that anyone may add a row to, and the files and packages that do.

Note [Doors]
~~~~~~~~~~~~
Models, data sets, methods and attacks are rows of a `Registry` each; the package adds its own by the same decorators
as everyone else. A row knows its `Origin`, so that a name taken twice says by whom, tables say what a plugin brought,
and a checkpoint can say what it needs. Outside rows are found

* in files and modules that are asked for (`load_plugins`, ``--import my.py``), which must work;
* in installed packages with an entry point of the group ``advfunmatch.plugins``, which are only looked at when a name
  is not known without them, or a table is printed. One that is broken is named in a warning, and the others serve.

What fails half-way leaves no row behind. Nothing that a checkpoint names is ever loaded for it: it says what to add.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import re
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import FrameType
from typing import TypeVar

from .errors import InputError, one_of

GROUP = "advfunmatch.plugins"
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")

Row = TypeVar("Row")


@dataclass(frozen=True)
class Origin:
    """Where a row was written, and what brought that here.

    Attributes:
        kind: ``built in``, ``import`` (a file or module), ``plugin`` (an installed package) or ``script``.
        name: what to give for it: the file, the module, or the package with its version.
        module: the module that registered it.
        file, line: the place there.
    """

    kind: str
    name: str
    module: str = ""
    file: str = ""
    line: int = 0

    def __str__(self) -> str:
        if self.kind == "built in":
            return "advfunmatch itself"
        package = f"the package {self.name}, " if self.kind == "plugin" else ""
        return f"{package}{self.file}, line {self.line}"

    def to_dict(self) -> dict[str, str]:
        """What a checkpoint keeps of it."""
        return {"kind": self.kind, "name": self.name}


def how_to_supply(origin: Mapping[str, str], setting: str) -> str:
    """What a user must do so that what a setting names is there again.

    Args:
        origin: where it came from, as `Origin.to_dict` says, or ``{"kind": "given", "name": its name}``.
        setting: the argument of `train` that it was given as.

    >>> how_to_supply({"kind": "import", "name": "my.py"}, "model")
    "add --import my.py (in Python: advfunmatch.load_plugins(['my.py']))"
    """
    name = origin["name"]
    if origin["kind"] == "given":
        if setting == "teacher":
            return "give it in Python again, as teacher=…, or name the file of its weights"
        decorator = "register_dataset" if setting == "data" else f"register_{setting}"
        return (
            f"give it in Python again, as {setting}=…; for the command line, register it ({decorator}) in a file, and "
            "add --import FILE"
        )
    if origin["kind"] == "plugin":
        return f"install the package {name}"
    if origin["kind"] == "script":
        return (
            f"it was registered by the program {name!r}: register it in a file of its own, and --import that"
        )
    return f"add --import {shlex.quote(name)} (in Python: advfunmatch.load_plugins([{name!r}]))"


class Registry(Mapping[str, Row]):
    """One table: names and rows. See Note [Doors].

    Iterating shows what was registered so far; looking for a name that is not there looks at installed plugins too.

    Args:
        kind: what a row is, for sentences: ``model``, ``data``, ``method``, ``attack``.
        overlap: the name in the table that a new one could be taken for, if names are more than themselves.
    """

    def __init__(self, kind: str, overlap: Callable[[str], str | None] | None = None) -> None:
        self.kind, self._overlap = kind, overlap
        self._rows: dict[str, Row] = {}
        self._origins: dict[str, Origin] = {}
        _registries.append(self)

    def add(self, name: str, row: Row, origin: Origin, pattern: re.Pattern[str] = NAME) -> None:
        """Add a row; `origin` is what `caller` says in the function that users call.

        A row that the same place registers again, as a notebook's cell that is run twice does, replaces the first.

        Raises:
            InputError: the name is no name, or taken.
        """
        if not isinstance(name, str) or not pattern.fullmatch(name):
            raise InputError(
                f"{self.kind} is to be registered as {name!r}, but its name must be of letters, digits, '_', '-', '.' "
                "and '+'"
            )
        taken = name if name in self._rows else self._overlap(name) if self._overlap else None
        if taken is not None and not (taken == name and _again(self._origins[name], origin)):
            same = "" if taken == name else f", which {taken!r} covers,"
            raise InputError(
                f"{self.kind} {name!r} of {origin}{same} is already registered by {self._origins[taken]}; one of them "
                "needs another name"
            )
        self._rows[name], self._origins[name] = row, origin

    def origin(self, name: str) -> Origin:
        """Where that row came from."""
        self[name]
        return self._origins[name]

    def find(self, name: str, what: str = "") -> Row:
        """The row of that name; InputError lists the names if there is none, `what` being the setting that gave it."""
        if name not in self:
            raise one_of(what or self.kind, name, self)
        return self[name]

    def outside(self) -> dict[str, Origin]:
        """The rows that are not the package's own, those of installed plugins included."""
        load_installed()
        return {name: origin for name, origin in self._origins.items() if origin.kind != "built in"}

    def __getitem__(self, name: str) -> Row:
        if name not in self._rows:
            load_installed()
        return self._rows[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def _copy(self) -> tuple[dict[str, Row], dict[str, Origin]]:
        return dict(self._rows), dict(self._origins)

    def _put_back(self, copy: tuple[dict[str, Row], dict[str, Origin]]) -> None:
        self._rows, self._origins = dict(copy[0]), dict(copy[1])

    def _forget(self, kind: str, name: str) -> None:
        for row, origin in list(self._origins.items()):
            if (origin.kind, origin.name) == (kind, name):
                del self._rows[row], self._origins[row]


_registries: list[Registry] = []
_bringing: list[tuple[str, str]] = []  # kind and name of what is being loaded, the innermost last
_loaded: dict[str, bytes] = {}  # path -> digest of the content that was run
_installed_were_loaded = False


def caller(depth: int = 2) -> Origin:
    """The origin of a row that the caller's caller registers."""
    frame: FrameType = sys._getframe(depth)
    module, file = frame.f_globals.get("__name__", "?"), frame.f_code.co_filename
    file = os.path.abspath(file) if os.path.exists(file) else file
    if module.partition(".")[0] == __package__:
        kind, name = "built in", "advfunmatch"
    elif _bringing:
        kind, name = _bringing[-1]
    elif module == "__main__":
        kind, name = "script", file
    else:
        kind, name = "import", module
    return Origin(kind, name, module, file, frame.f_lineno)


def load_plugins(imports: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> tuple[str, ...]:
    """Run files and modules that register models, data sets, methods and attacks, each once.

    A file that has changed since is run again, and replaces what it registered. Its folder goes to the end of Python's
    path, as does the present folder for modules, so that it may import its neighbours.

    Args:
        imports: paths of Python files, and names of modules.

    Returns:
        The same, with paths absolute: what a checkpoint keeps.

    Raises:
        InputError: there is no such file or module, or it fails; nothing that it registered stays then.

    Example:
        >>> load_plugins([])
        ()
    """
    if isinstance(imports, str | os.PathLike):
        imports = [imports]
    return tuple(_load(os.fspath(given)) for given in imports)


def load_installed() -> None:
    """Load the installed packages' entry points of the group ``advfunmatch.plugins``, once.

    An entry point names a module that registers, or a function of one that does when it is called.

    Warns:
        UserWarning: names each one that fails, and why; its rows are missing then.
    """
    global _installed_were_loaded
    if _installed_were_loaded:
        return
    _installed_were_loaded = True
    for point in entry_points(group=GROUP):
        package = f"{point.dist.name} {point.dist.version}" if point.dist else point.value
        try:
            with _rows_of("plugin", package):
                _enter(point)
        except (Exception, SystemExit) as error:
            warnings.warn(
                f"plugin {point.name!r} of the package {package} cannot be used, so what it registers is missing: "
                f"{_reason(error)}",
                stacklevel=2,
            )


def _enter(point: EntryPoint) -> None:
    found = point.load()
    if point.attr:
        found()


def _load(given: str) -> str:
    if given.endswith(".py") or os.sep in given:
        return _run_file(given)
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)
    if given not in sys.modules:
        with _rows_of("import", given), _failing(given):
            try:
                importlib.import_module(given)
            except ModuleNotFoundError as error:
                if error.name is None or not f"{given}.".startswith(f"{error.name}."):
                    raise
                raise InputError(
                    f"import is {given!r}, but Python finds no such module; a file is given by its path, such as my.py"
                ) from error
    return given


def _run_file(given: str) -> str:
    path = os.path.realpath(given)
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"import is {given!r}, which cannot be read: {error.strerror}") from error
    digest = hashlib.blake2b(content).digest()
    if _loaded.get(path) == digest:
        return path
    name = f"imported_{hashlib.blake2b(path.encode(), digest_size=4).hexdigest()}_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InputError(f"import is {given!r}, but must be a Python file, whose name ends in .py")
    folder = os.path.dirname(path)
    if folder not in sys.path:
        sys.path.append(folder)
    with _rows_of("import", path), _failing(given):
        for registry in _registries:
            registry._forget("import", path)
        before = sys.modules.get(name)
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        try:
            # Not spec.loader.exec_module, whose bytecode cache goes by whole seconds.
            exec(compile(content, path, "exec"), module.__dict__)
        except BaseException:
            if before is None:
                del sys.modules[name]
            else:
                sys.modules[name] = before
            raise
    _loaded[path] = digest
    return path


def fault_of_plugin(error: BaseException) -> str | None:
    """An error that came out of a file from outside as one line with its place there; None if no such file had a part.

    Asked where an error would otherwise show the frames of this package, which has no part in it.
    """
    files = {
        origin.file
        for registry in _registries
        for origin in registry._origins.values()
        if origin.kind != "built in"
    }
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename in files or frame.filename in _loaded
    ]
    if not frames:
        return None
    text = " ".join(str(error).split())
    return f"{frames[-1].filename}, line {frames[-1].lineno}, in {frames[-1].name}: {type(error).__name__}: {text}"


@contextmanager
def _rows_of(kind: str, name: str) -> Iterator[None]:
    """What is registered in this block has that origin; all of it goes again if the block fails."""
    copies = [(registry, registry._copy()) for registry in _registries]
    _bringing.append((kind, name))
    try:
        yield
    except BaseException:
        for registry, copy in copies:
            registry._put_back(copy)
        raise
    finally:
        _bringing.pop()


@contextmanager
def _failing(given: str) -> Iterator[None]:
    """Whatever goes wrong in this block is an InputError of what was given."""
    try:
        yield
    except InputError as error:
        raise InputError(f"import {given!r}: {error}") from error
    except (Exception, SystemExit) as error:
        raise InputError(f"import {given!r} fails: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """An error as one line, with the place that raised it."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename != __file__ and not frame.filename.startswith("<frozen")
    ]
    text = " ".join(str(error).split())
    said = text if isinstance(error, InputError) else f"{type(error).__name__}: {text}".rstrip(": ")
    return f"{said} ({frames[-1].filename}, line {frames[-1].lineno})" if frames else said


def _again(first: Origin, second: Origin) -> bool:
    """Whether two registrations of one name are the same one: a cell or a module that is run once more."""
    return first.module == second.module and (first.file != second.file or first.line == second.line)
