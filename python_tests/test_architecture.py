"""Imports go down the floors only, and siblings on one floor do not know each other."""

import ast
from pathlib import Path

import pysparse

ROOT = Path(pysparse.__file__).parent
FLOORS = {
    "cli": 11,
    "suite": 10,
    "api": 9,
    "huggingface": 8,
    "models": 8,
    "methods": 7,
    "pruning": 6,
    "attention": 6,
    "shapley": 6,
    "bayes": 6,
    "calib": 5,
    "measure": 5,
    "nn": 4,
    "ops": 3,
    "formats": 2,
    "backend": 1,
    "nvrtc": 0,  # compiles texts; knows nothing of the package
    "_core": 0,
    "_cuda": 0,
    "data": 0,  # texts and a model on disk; knows nothing
}


def room(module):
    return module.split(".")[1] if "." in module else ""


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            if node.module == "pysparse":
                yield from (f"pysparse.{alias.name}" for alias in node.names)
            else:
                yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def arrows():
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] in ("__init__", "__main__"):
            continue  # the front door may open every room
        for module in imported(path):
            if module.split(".")[0] == "pysparse" and room(module) in FLOORS:
                yield path.relative_to(ROOT), parts[0], room(module)


def test_every_room_has_a_floor():
    rooms = {
        p.stem if p.is_file() else p.name
        for p in ROOT.iterdir()
        if p.suffix == ".py" or (p / "__init__.py").exists()
    }
    assert rooms - {"__init__", "__main__", "__pycache__"} <= set(FLOORS)


def test_imports_go_down_only():
    bad = [
        f"{path}: {here} (floor {FLOORS[here]}) imports {there} (floor {FLOORS[there]})"
        for path, here, there in arrows()
        if here != there and FLOORS[there] >= FLOORS[here]
    ]
    assert not bad, "\n".join(bad)


def test_only_the_upper_floors_know_transformers():
    offenders = [
        str(path.relative_to(ROOT))
        for path in ROOT.rglob("*.py")
        for module in imported(path)
        if module.split(".")[0] == "transformers"
        and FLOORS.get(path.relative_to(ROOT).with_suffix("").parts[0], 99) < 8
    ]
    assert not offenders
