"""Where a model and its tokenizer come from: an object, a folder, or a name on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoTokenizer

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def check_source(source: str | Path) -> str:
    """Return ``source`` as a string once it can be meant: an existing folder, or something like a hub name.

    Raises FileNotFoundError for what is spelled as a path and does not exist, NotADirectoryError for a file,
    and FileNotFoundError for a folder without ``config.json``.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"{path} holds no model: it has no config.json")
        return str(path)
    if path.exists():
        raise NotADirectoryError(f"{path} is a file; pass the folder that holds config.json and the weights")
    text = str(source)
    if isinstance(source, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise FileNotFoundError(f"no such model folder: {source}")
    return text


def load_tokenizer(source: str | Path) -> Any:
    """Load the tokenizer saved in ``source``; FileNotFoundError when the folder has none."""
    name = check_source(source)
    if Path(name).is_dir() and not any((Path(name) / file).is_file() for file in _TOKENIZER_FILES):
        raise FileNotFoundError(f"{name} holds no tokenizer; pass tokenizer=...")
    try:
        return AutoTokenizer.from_pretrained(name)
    except OSError as error:
        raise FileNotFoundError(f"no tokenizer '{name}' here; the hub gave: {_first_line(error)}") from None


def find_tokenizer(model: nn.Module) -> Any | None:
    """Return the tokenizer saved beside ``model`` when the model remembers its folder, else None."""
    name = getattr(model, "name_or_path", "") or getattr(getattr(model, "config", None), "_name_or_path", "")
    if name and any((Path(name) / file).is_file() for file in _TOKENIZER_FILES):
        return load_tokenizer(name)
    return None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
