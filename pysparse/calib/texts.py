"""Texts from a list, an iterable or a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any


def load_texts(source: Iterable[str] | str | Path, field: str = "text") -> list[str]:
    """Return the texts of ``source``, empty ones left out.

    ``source`` is a list or iterable of strings, or the path of a file: .txt (one document), .jsonl (one
    string or object a line) or .json (a list of strings or objects); objects hold their text in ``field``.
    A string is always a path, never a text. Raises ValueError without any text, for a damaged file and for
    the name of a data set (nothing is downloaded), TypeError for an item that is no string.
    """
    if isinstance(source, str | Path):
        texts, name = _read(_existing(source), field), f"'{source}'"
    else:
        texts, name = [_checked(item, index) for index, item in enumerate(source)], "the list of texts"
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError(f"{name} is empty: give at least one non-empty text")
    return texts


def _checked(item: Any, index: int) -> str:
    if not isinstance(item, str):
        raise TypeError(f"text {index} is a {type(item).__name__}, expected a string")
    return item


def _existing(source: str | Path) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        raise ValueError(f"'{source}' is a folder; pass one .txt, .json or .jsonl file, or a list of texts")
    if path.is_file():
        return path
    if path.exists():
        raise ValueError(
            f"'{source}' is a device or a pipe; pass one .txt, .json or .jsonl file, or a list of texts"
        )
    if isinstance(source, Path) or path.suffix in _READERS or str(source).startswith((".", "/", "~")):
        raise FileNotFoundError(f"no such file: {source}")
    raise ValueError(
        f"'{source}' is not a file, and data sets are not fetched over a network: pass the texts themselves, "
        "calibration=[text, ...], or the path of a .txt, .json or .jsonl file"
    )


def _read(path: Path, field: str) -> list[str]:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"'{path}' is not one of {', '.join(_READERS)}")
    try:
        content = path.read_text(encoding="utf-8-sig")  # with or without a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"'{path}' is not UTF-8 text ({error.reason} at byte {error.start})") from None
    return [_text_of(value, field, place) for place, value in reader(content, str(path))]


def _text_of(value: Any, field: str, place: str) -> str:
    if isinstance(value, dict):
        if field not in value:
            raise ValueError(f"{place} has no field '{field}'; its fields are {', '.join(map(str, value))}")
        value = value[field]
    if not isinstance(value, str):
        raise ValueError(
            f"{place} is a {type(value).__name__}, expected a string or an object with '{field}'"
        )
    return value


Reader = Callable[[str, str], Iterator[tuple[str, Any]]]


def _documents(content: str, name: str) -> Iterator[tuple[str, Any]]:
    yield name, content


def _json_lines(content: str, name: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(content.split("\n"), start=1):  # not splitlines: texts may hold U+2028
        if line.strip():
            yield f"{name}:{number}", _parsed(line, f"{name}:{number}")


def _json_list(content: str, name: str) -> Iterator[tuple[str, Any]]:
    values = _parsed(content, name)
    for index, value in enumerate(values if isinstance(values, list) else [values]):
        yield f"{name}, item {index},", value


def _parsed(content: str, place: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not JSON: {error}") from None


_READERS: dict[str, Reader] = {".txt": _documents, ".jsonl": _json_lines, ".json": _json_list}
