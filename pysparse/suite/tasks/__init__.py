"""The tasks by name; one is imported when it is used, as each brings libraries of its own."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

from pysparse.methods.registry import lookup
from pysparse.suite.tasks.protocol import Quality, Scope, Speed, Task

__all__ = ["TASKS", "Quality", "Scope", "Speed", "Task", "task_for"]

TASKS: dict[str, str] = {  # name -> "module:class"
    "language": "pysparse.suite.tasks.language:Language",
    "embedding": "pysparse.suite.tasks.embedding:Embedding",
    "zero-shot": "pysparse.suite.tasks.zero_shot:ZeroShot",
    "classification": "pysparse.suite.tasks.classification:Classification",
    "detection": "pysparse.suite.tasks.detection:Detection",
    "generation": "pysparse.suite.tasks.generation:Generation",
}


def task_for(name: str, options: Mapping[str, Any] | None = None) -> Task:
    """Return the task of that name with its options set.

    Raises ValueError with the closest known name for an unknown task or option, and for an option that is not of
    its default's type or that the task refuses; ModuleNotFoundError that names the extra it needs.
    """
    module, _, kind = lookup("task", name, TASKS).partition(":")
    made = getattr(importlib.import_module(module), kind)
    fields = {field.name: field for field in dataclasses.fields(made) if field.init}
    given = dict(options or {})
    for key, value in given.items():
        field = lookup(f"option of task '{name}'", key, fields)
        given[key] = _as_declared(f"task '{name}': {key}", value, field.default)
    try:
        task: Task = made(**given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"task '{name}': {error}") from None
    return task


def _as_declared(where: str, value: Any, default: Any) -> Any:
    """Return ``value`` with lists as tuples; ValueError when its type is another than that of ``default``."""
    value = tuple(value) if isinstance(value, list) else value
    value = float(value) if isinstance(default, float) and type(value) is int else value
    if default is not dataclasses.MISSING and default is not None and type(value) is not type(default):
        raise ValueError(f"{where} is a {type(value).__name__}, expected a {type(default).__name__}")
    return value
