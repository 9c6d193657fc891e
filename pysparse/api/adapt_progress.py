"""Where an adaptation keeps its rounds on disk, so that a later run can go on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import safe_open

from pysparse.formats.tensor_file import write_tensors
from pysparse.methods.adaptation import Round, State, Trained
from pysparse.nn import Adapter
from pysparse.pruning.identity import differences

_IDENTITY = "identity.json"
_STATE = "round.safetensors"  # replaced by each round, whole


@contextmanager
def kept_after_error(folder: Path) -> Iterator[None]:
    """After an error or Ctrl-C note on it what is kept in ``folder``; where nothing is yet, leave no folder."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as stop:
        if (folder / _STATE).is_file():
            stop.add_note(f"the progress is kept in {folder}; resume goes on from there")
        else:
            (folder / _IDENTITY).unlink(missing_ok=True)
            with suppress(OSError):  # what is not ours stays
                folder.rmdir()
        raise


class AdaptProgress:
    """One file: the model as it went into the training of the last round that was begun.

    The Trainer's own checkpoints lie beside it, in a folder for each round.
    """

    def __init__(self, folder: Path, resume: bool) -> None:
        self._folder, self._resume = folder, resume

    @classmethod
    def open(cls, folder: Path, identity: Mapping[str, Any], *, resume: bool) -> AdaptProgress:
        """Start in ``folder``, or go on there.

        Raises FileExistsError for progress of an earlier run without ``resume``, ValueError that names what
        differs when it is another run's.
        """
        path = folder / _IDENTITY
        now = json.loads(json.dumps(dict(identity)))
        if (folder / _STATE).is_file():
            if not resume:
                raise FileExistsError(
                    f"an interrupted run left its progress in {folder}: pass resume=True (--resume) to go on with it, "
                    "or remove that folder to start over"
                )
            changed = differences(json.loads(path.read_text(encoding="utf-8")), now)
            if changed:
                raise ValueError(
                    f"the progress in {folder} belongs to another run: {'; '.join(changed)}. Resume with the same "
                    "settings, or remove that folder to start over"
                )
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(now, indent=1), encoding="utf-8")
        return cls(folder, resume)

    def save(self, state: State) -> None:
        """Write ``state`` beside and put it in place."""
        tensors = {f"weight:{path}": weight.contiguous() for path, weight in state.weights.items()}
        for path, adapter in state.adapters.items():
            tensors[f"up:{path}"], tensors[f"down:{path}"] = adapter.up, adapter.down
        scales = {path: adapter.scale for path, adapter in state.adapters.items()}
        facts = {
            "index": state.index, "target": state.target, "rates": state.rates, "errors": state.errors,
            "ranks": state.ranks, "scales": scales, "done": [dataclasses.asdict(one) for one in state.done],
        }  # fmt: skip
        write_tensors(self._folder / _STATE, tensors, {"facts": json.dumps(facts)})

    def load(self) -> State | None:
        """Return the state that was written last; None when there is none."""
        path = self._folder / _STATE
        if not self._resume or not path.is_file():
            return None
        with safe_open(path, framework="pt") as file:
            facts = json.loads(file.metadata()["facts"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        adapters = {
            path: Adapter(tensors[f"up:{path}"], tensors[f"down:{path}"], scale)
            for path, scale in facts.pop("scales").items()
        }
        weights = {name[7:]: tensor for name, tensor in tensors.items() if name.startswith("weight:")}
        done = [Round(**{**one, "trained": Trained(**one["trained"])}) for one in facts.pop("done")]
        return State(**facts, weights=weights, adapters=adapters, done=done)
