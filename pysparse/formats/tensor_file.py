"""Safetensors files with Python's errors: OSError where the system fails, ValueError where the content is unsound."""

from __future__ import annotations

import errno
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what a write says that finds no room


@contextmanager
def system_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Raise a SafetensorError that reports a system call's failure as the OSError that it is, about ``path``."""
    try:
        yield
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        if found is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), os.fspath(path)) from error


def write_tensors(
    path: str | os.PathLike[str], arrays: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write one safetensors file, beside and then renamed: a reader sees the old file or the whole new one.

    Raises OSError for a folder that is missing or cannot be written, and for a full disk; then nothing is left.
    """
    target = Path(path)
    descriptor, beside = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".part")
    os.close(descriptor)
    try:
        with system_errors(target):
            on_cpu = {name: array.cpu().contiguous() for name, array in arrays.items()}
            save_file(on_cpu, beside, dict(metadata))
        os.chmod(beside, 0o644)  # mkstemp's 0600 would hide the file from the group
        os.replace(beside, target)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise


def read_tensors(
    path: str | os.PathLike[str], format: str, names: Iterable[str]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the arrays ``names`` and the metadata of a file of that ``format``.

    Raises ValueError for a file that is cut off, damaged, of another format or with other arrays; OSError for one
    that cannot be opened.
    """
    if Path(path).is_dir():
        raise IsADirectoryError(f"{path} is a folder, not a file")
    try:
        with system_errors(path), safe_open(os.fspath(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != format or set(file.keys()) != set(names):
                raise ValueError(
                    f"{path} is not a {format} file: format {metadata.get('format')!r}, {sorted(file.keys())}"
                )
            return {name: file.get_tensor(name) for name in names}, metadata
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or cut off: {error}") from error
