"""`python -m advfunmatch`, the same as the command `advfunmatch`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; without the packages it is made of, one sentence and exit code 2."""
    try:
        from .cli import main as command_line
    except ModuleNotFoundError as error:
        if error.name not in ("rich", "typer"):
            raise
        print(f"the command line needs {error.name}: pip install 'advfunmatch[train]'", file=sys.stderr)
        sys.exit(2)
    command_line()


if __name__ == "__main__":
    main()
