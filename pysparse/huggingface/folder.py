"""Write a model folder whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pysparse.formats.tensor_file import system_errors
from pysparse.huggingface.layout import QUANT_METHOD

MARKER = "pysparse.json"  # says that save_pretrained wrote the folder, and what is in it

# What a save writes anew or leaves out on purpose; anything else in a replaced folder is somebody's and stays.
_OURS = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json")


@contextmanager
def replaced_folder(directory: str | Path) -> Iterator[Path]:
    """Yield a temporary folder to fill; on success it takes the place of ``directory``, else it is removed.

    The folder is filled beside its target, flushed to disk, then renamed, so ``directory`` holds the old
    model or the new one, never a mixture. Files that a save does not write are carried over from the old
    folder. Raises as :func:`check_replaceable` does, and OSError where a file of tensors finds no room.
    """
    target = check_replaceable(directory)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _new_sibling(target, "new")
    try:
        with system_errors(target):
            yield temporary
        if target.is_dir():
            _carry_over(target, temporary)
        _flush(temporary)
        _swap(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_replaceable(directory: str | Path) -> Path:
    """Return the real path of ``directory`` if :func:`replaced_folder` can make or replace it.

    Raises FileExistsError when it is neither missing, empty, nor a pysparse model; NotADirectoryError when it,
    or a folder above it, is a file; PermissionError when it, or the place where it would stand, is read-only.
    """
    target = Path(os.path.realpath(Path(directory).expanduser()))
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{directory} is a file; pass a folder")
    if target.is_dir() and any(target.iterdir()) and not is_ours(target):
        raise FileExistsError(
            f"{directory} is neither empty nor a model that pysparse saved: nothing was written; "
            "choose another folder, or remove this one"
        )
    if target.is_dir() and not os.access(target, os.W_OK):
        raise PermissionError(f"{directory} is read-only: choose another folder, or make it writable")
    _check_place(directory, target)
    return target


def _check_place(directory: str | Path, target: Path) -> None:
    """Make a folder where ``target`` will be filled and remove it: what permissions say is not the whole truth."""
    place = next(parent for parent in target.parents if parent.exists())
    if not place.is_dir():
        raise NotADirectoryError(f"{directory} cannot be made: {place} is a file")
    try:
        _new_sibling(place / target.name, "probe").rmdir()
    except OSError as error:
        raise PermissionError(
            f"{directory} cannot be written: {place} takes no new folder ({error.strerror}); choose another folder"
        ) from None


def is_ours(folder: Path) -> bool:
    """Tell whether ``folder`` holds a model that pysparse, or transformers on its behalf, saved."""
    if (folder / MARKER).is_file():
        return True
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return bool(config["quantization_config"]["quant_method"] == QUANT_METHOD)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _carry_over(old: Path, new: Path) -> None:
    for entry in old.iterdir():
        if (new / entry.name).exists() or any(entry.match(pattern) for pattern in _OURS):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, new / entry.name, symlinks=True)
        else:
            shutil.copy2(entry, new / entry.name, follow_symlinks=False)


def _flush(folder: Path) -> None:
    """Push files and directory entries to the disk, so that a crash after the rename finds them there."""
    for path in (*sorted(folder.rglob("*")), folder):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            continue
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _swap(new: Path, target: Path) -> None:
    """Rename ``new`` to ``target``; the old folder steps aside first and comes back if that fails."""
    if not target.exists():
        new.rename(target)
        return
    aside = _new_sibling(target, "old")
    target.rename(aside)  # an empty directory may be renamed over
    try:
        new.rename(target)
    except OSError:
        aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _new_sibling(target: Path, role: str) -> Path:
    """Make a hidden folder beside ``target``, with the usual permissions (tempfile's would keep others out)."""
    folder = target.parent / f".{target.name}.{role}-{secrets.token_hex(6)}"
    folder.mkdir()
    return folder
