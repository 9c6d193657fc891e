"""Write a model folder whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pysparse.huggingface.layout import QUANT_METHOD

MARKER = "pysparse.json"  # says that save_pretrained wrote the folder, and what is in it

# What a save writes anew or leaves out on purpose; anything else in a replaced folder is somebody's and stays.
_OURS = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json")


@contextmanager
def replaced_folder(directory: str | Path) -> Iterator[Path]:
    """Yield a temporary folder to fill; on success it takes the place of ``directory``, else it is removed.

    The folder is filled beside its target, flushed to disk, then renamed, so ``directory`` holds the old
    model or the new one, never a mixture. Files that a save does not write are carried over from the old
    folder. Raises FileExistsError when ``directory`` is neither missing, empty, nor a pysparse model.
    """
    target = Path(os.path.realpath(Path(directory).expanduser()))
    _check_replaceable(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _new_sibling(target, "new")
    try:
        yield temporary
        if target.is_dir():
            _carry_over(target, temporary)
        _flush(temporary)
        _swap(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_replaceable(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise FileExistsError(f"{target} is a file; save_pretrained writes a folder")
    if any(target.iterdir()) and not is_ours(target):
        raise FileExistsError(
            f"{target} is neither empty nor a model that pysparse saved: nothing was written; "
            "choose another folder, or remove this one"
        )


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
