"""Where the command writes, and how it fails: results on stdout, everything else on stderr."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console

from pysparse.measure.results import dumps, write_json

EXIT_FAILED, EXIT_USER = 1, 2
EXIT_INTERRUPTED = 130  # what a shell makes of Ctrl-C
_WIDTH = 130  # of tables in a pipe or a file, where there is no terminal to ask
_USER_ERRORS = (
    ValueError,
    TypeError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
)


def console(stderr: bool = False) -> Console:
    """Return a console; without a terminal its tables are wide enough not to be cut."""
    terminal = Console(stderr=stderr)
    if terminal.is_terminal or "COLUMNS" in os.environ:
        return terminal
    return Console(stderr=stderr, width=_WIDTH)


def say(text: str) -> None:
    """Tell the user something that is not a result."""
    console(stderr=True).print(text, highlight=False, markup=False)


def emit(result: Any, json_target: str | None, content: Any) -> None:
    """Print ``result`` as a table, or for "-" ``content`` as JSON; another target is a file to write as well."""
    if json_target == "-":
        typer.echo(dumps(content))
        return
    console().print(result)
    if json_target is not None:
        say(f"wrote {write_json(json_target, content)}")


@contextmanager
def guarded(debug: bool) -> Iterator[None]:
    """Turn errors into one line on stderr: exit code 2 for the user's to mend, 1 for everything else.

    Ctrl-C is one line as well, with the notes of the interrupt, and exit code 130.
    """
    logging.basicConfig(level=logging.DEBUG if debug else logging.WARNING)
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # our own progress is shown; a bar per file drowns it
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except KeyboardInterrupt as interrupt:
        hints = getattr(interrupt, "__notes__", ())
        typer.echo(": ".join(("pysparse: interrupted", *hints)), err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except Exception as error:
        if debug:
            raise
        user = isinstance(error, _USER_ERRORS)
        message = " ".join(str(error).split()) or type(error).__name__
        if not user:
            message = f"{type(error).__name__}: {message} (run again with --debug for the traceback)"
        typer.echo(f"pysparse: error: {message}", err=True)
        raise typer.Exit(EXIT_USER if user else EXIT_FAILED) from None
