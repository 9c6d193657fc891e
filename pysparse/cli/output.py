"""Where the command writes, and how it fails: results on stdout, everything else on stderr."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console

from pysparse.formats.tensor_file import DISK_FULL
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

    Notes of the error, such as what is kept for --resume, follow on that line. So does Ctrl-C's, with exit code 130.
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
        hints = (" ".join(note.split()) for note in getattr(error, "__notes__", ()))
        typer.echo("; ".join((f"pysparse: error: {_sentence(error)}", *hints)), err=True)
        raise typer.Exit(EXIT_USER if isinstance(error, _USER_ERRORS) else EXIT_FAILED) from None


def _sentence(error: Exception) -> str:
    """Return what went wrong on one line, and where only a developer can tell, how to see more."""
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return f"no room left to write {error.filename or 'a file'} ({error.strerror}): free some space"
    message = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, _USER_ERRORS) or (isinstance(error, ImportError) and "pip install" in message):
        return message
    return f"{type(error).__name__}: {message} (run again with --debug for the traceback)"
