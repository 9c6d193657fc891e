"""Every Python example of a README runs as it is printed, on the bundled model in place of "path/to/model"."""

import json
import re
from pathlib import Path

import pytest

from pysparse.data import demo_model_path

ROOT = Path(__file__).parents[1]
READMES = sorted([ROOT / "README.md", *(ROOT / "pysparse").rglob("README.md")])
TEXTS = ["Sparse weights are read from memory once for every token. " * 40] * 4


def examples():
    for readme in READMES:
        for number, block in enumerate(re.findall(r"(?ms)^```python\n(.*?)^```", readme.read_text())):
            name = f"{readme.parent.relative_to(ROOT)}-{number}"
            yield pytest.param(block, id=name)


def runnable(block: str) -> str:
    """The block with what stands for the reader's own model and texts filled in."""
    return block.replace('"path/to/model"', repr(str(demo_model_path()))).replace(
        '["your texts", ...]', repr(TEXTS)
    )


@pytest.mark.slow
@pytest.mark.parametrize("block", list(examples()))
@pytest.mark.filterwarnings("default")  # what a reader sees once (an untuned machine) is not an error here
def test_an_example_runs_and_prints(block, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in 10 * TEXTS))
    exec(compile(runnable(block), "README", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out.strip()


def test_every_room_readme_is_named_in_the_main_one():
    main = (ROOT / "README.md").read_text()
    for readme in READMES[1:]:
        assert str(readme.relative_to(ROOT)) in main


def test_the_main_readme_stays_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
