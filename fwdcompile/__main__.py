"""The command line: `fwdcompile`, or `python -m fwdcompile`."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs it; says what to install where that is missing."""
    try:
        from .cli import main as run
    except ModuleNotFoundError as error:
        if error.name not in ("rich", "tqdm", "typer"):
            raise
        sys.exit(
            f"fwdcompile: the command line needs {error.name}: pip install 'fwdcompile[examples]'"
        )
    run()


if __name__ == "__main__":
    main()
