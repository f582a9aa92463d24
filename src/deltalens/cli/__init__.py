"""The command line: parses, calls, prints; no logic. A file a family of commands.

Exit codes: 0 done, 1 it cannot be done (one line on stderr says why and what to do), 2 bad usage, 130 interrupted.
Everything but `--json` goes to stderr. Heavy rooms are imported inside the commands, so that `--help` is instant.
"""

from __future__ import annotations

import sys
from typing import NoReturn

# Their commands register themselves.
from deltalens.cli import compare, models, patches, study, subnetwork, train, trajectory, weights  # noqa: F401
from deltalens.cli.common import app
from deltalens.errors import DeltalensError

__all__ = ["app", "main"]

INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def _fail(message: str, code: int) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(code)


def main() -> None:
    """Run the command line; a user's mistake is one line, never a traceback."""
    try:
        app()
    except DeltalensError as error:
        _fail(f"deltalens: {error}", 1)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:  # typer turns Ctrl-C into this exit, without a word
            _fail("deltalens: interrupted; with -o, the same command goes on where it stopped", INTERRUPTED)
        raise
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
