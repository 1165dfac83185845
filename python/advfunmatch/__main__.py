"""`python -m advfunmatch`, the same as the command `advfunmatch`."""

from .cli import main

if __name__ == "__main__":
    main()
