"""Zero-shot accuracy through lm-eval, on a local task made from held-out text: which continuation is true?"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pysparse import data
from pysparse.api.loading import tokenizer_for
from pysparse.calib.extras import optional, require
from pysparse.suite.tasks.language import CausalModels, model_source
from pysparse.suite.tasks.protocol import Quality

CONTINUATION = "pysparse_continuation"
_WORDS = 24  # of context; of an answer, half
_CHOICES = 4
_YAML = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: " "
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1
"""


def questions(limit: int) -> list[dict[str, Any]]:
    """Return multiple-choice questions: a passage of held-out text, its true continuation and three from elsewhere.

    Each is {"context": str, "choices": [str] of 4, "answer": index}; the answers stand in every place in turn. Wrong
    answers come from other documents, spread over the text, so that nothing is drawn at random.
    """
    passages = [found for text in data.held_out_texts() for found in _passages(text)]
    passages = passages[:: max(1, len(passages) // limit)][:limit]
    if len(passages) < _CHOICES:
        raise ValueError(f"items={limit}: at least {_CHOICES} passages make a question")
    result = []
    for index, (context, truth) in enumerate(passages):
        step = max(1, len(passages) // _CHOICES)
        wrong = [passages[(index + k * step) % len(passages)][1] for k in range(1, _CHOICES)]
        place = index % _CHOICES
        result.append(
            {"context": context, "choices": [*wrong[:place], truth, *wrong[place:]], "answer": place}
        )
    return result


def _passages(text: str) -> Iterator[tuple[str, str]]:
    """Yield (context, continuation) from paragraphs that are long enough."""
    for paragraph in re.split(r"\n\s*\n", text):
        words = paragraph.split()
        if len(words) >= _WORDS + _WORDS // 2:
            yield " ".join(words[:_WORDS]), " ".join(words[_WORDS : _WORDS + _WORDS // 2])


@contextlib.contextmanager
def local_tasks(items: int) -> Iterator[Path]:
    """Write the task's YAML and its questions into a folder that lm-eval's ``include_path`` takes."""
    with tempfile.TemporaryDirectory(prefix="pysparse-zero-shot-") as folder:
        place = Path(folder)
        lines = "".join(json.dumps(question) + "\n" for question in questions(items))
        (place / "questions.jsonl").write_text(lines, encoding="utf-8")
        file = json.dumps(str(place / "questions.jsonl"))
        (place / "continuation.yaml").write_text(_YAML.format(name=CONTINUATION, file=file), encoding="utf-8")
        yield place


def lm_eval_scores(
    model: nn.Module, tokenizer: Any, task: str = CONTINUATION, *, include: Path, limit: int | None = None
) -> dict[str, float]:
    """Return what lm-eval measures on a task: {"acc": ..., "acc_norm": ..., "acc_stderr": ...}.

    ``include`` is a folder of task files. Raises ModuleNotFoundError that names the extra where lm-eval is missing,
    ValueError for an unknown task.
    """
    lm_eval = optional("lm_eval", "eval")
    huggingface, tasks = optional("lm_eval.models.huggingface", "eval"), optional("lm_eval.tasks", "eval")
    for name in ("lm_eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    optional("datasets", "eval").disable_progress_bars()
    manager = tasks.TaskManager(include_path=str(include), include_defaults=False)
    if task not in manager.all_tasks:
        raise ValueError(f"unknown lm-eval task '{task}' in {include}; known: {', '.join(manager.all_tasks)}")
    wrapped = huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8, device="cpu")
    with contextlib.redirect_stderr(io.StringIO()):  # its bars, several a model; errors come as exceptions
        found = lm_eval.simple_evaluate(
            wrapped, tasks=[task], task_manager=manager, limit=limit, bootstrap_iters=0
        )
    scores = found["results"][task]
    return {
        key.partition(",")[0]: float(value) for key, value in scores.items() if isinstance(value, float | int)
    }


@dataclass(frozen=True, slots=True)
class ZeroShot(CausalModels):
    """Accuracy on a local task of lm-eval; ``acc_norm`` (by the length of an answer) stands beside it.

    The default task is made here from the bundled held-out text. ``include`` and ``task`` name a folder of lm-eval
    task files and one of them instead, for data of your own.
    """

    items: int = 200  # questions of the default task, of another at most so many
    task: str = CONTINUATION
    include: str = ""
    prompt_len: int = 64
    new_tokens: int = 32
    rounds: int = 5

    name = "zero-shot"

    def __post_init__(self) -> None:
        require("eval", "lm_eval")
        if self.include and not Path(self.include).is_dir():
            raise ValueError(f"include is a folder of lm-eval task files, there is none at {self.include}")

    def quality(self, model: nn.Module, name: str, *, seed: int) -> Quality:
        """Accuracy of lm-eval; no example is shown to the model before."""
        tokenizer = tokenizer_for(model_source(name), model, None)
        state = torch.get_rng_state()  # lm-eval seeds torch's generator
        try:
            if self.include:
                scores = lm_eval_scores(
                    model, tokenizer, self.task, include=Path(self.include), limit=self.items
                )
            else:
                with local_tasks(self.items) as folder:
                    scores = lm_eval_scores(model, tokenizer, self.task, include=folder)
        finally:
            torch.set_rng_state(state)
        value = scores.pop("acc")
        return Quality("accuracy", value, higher_is_better=True, others=scores)
