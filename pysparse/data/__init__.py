"""What ships with the project: a small real language model, and text it has never seen.

The model (5.5 M parameters, Llama architecture with grouped-query attention, bf16) was trained by
``benchmarks/demo_model/train.py`` on documentation of permissively licensed Python packages. It exists so
that every command runs without a download. Its layers are too small for speed figures; its quality is real.
"""

from __future__ import annotations

import json
from pathlib import Path

__all__ = ["calibration_texts", "demo_model_path", "held_out_texts"]

_HERE = Path(__file__).resolve().parent


def demo_model_path() -> Path:
    """Folder of the bundled model, in the layout of ``save_pretrained``.

    Returns:
        A folder with ``config.json``, ``model.safetensors`` (bf16) and the tokenizer's files, that
        ``AutoModelForCausalLM.from_pretrained`` and ``AutoTokenizer.from_pretrained`` read without a network.

    Raises:
        FileNotFoundError: the weights are missing from the installation.
    """
    folder = _HERE / "demo_model"
    return _existing(folder / "model.safetensors").parent


def calibration_texts() -> list[str]:
    """Documents for calibration: files that are neither in the training text nor in :func:`held_out_texts`.

    Returns:
        One string per document, in a fixed order; together below 400 kB.

    Raises:
        FileNotFoundError: the text is missing from the installation.
    """
    return _texts("calibration.jsonl")


def held_out_texts() -> list[str]:
    """Documents for evaluation: files that are neither in the training text nor in :func:`calibration_texts`.

    Returns:
        One string per document, in a fixed order; together below 400 kB.

    Raises:
        FileNotFoundError: the text is missing from the installation.
    """
    return _texts("held_out.jsonl")


def _texts(name: str) -> list[str]:
    """The ``text`` field of each line of a bundled jsonl file."""
    with _existing(_HERE / name).open(encoding="utf-8") as lines:
        return [str(json.loads(line)["text"]) for line in lines]


def _existing(path: Path) -> Path:
    """``path``, when the installation has it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: the bundled data was not installed; reinstall pysparse")
    return path
