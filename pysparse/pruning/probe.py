"""What removing a block's attention, or some of its neurons, means there: found by running the block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pysparse.calib.batches import Batch
from pysparse.calib.calls import Call, hidden_of, record_calls
from pysparse.nn.structure import NoAttention, PassThrough, Surgery
from pysparse.pruning.parts import Anatomy, Block


@dataclass(frozen=True, slots=True)
class Seats:
    """What removing a block's attention changes in the block."""

    attention: str  # path
    idle: tuple[str, ...]  # paths of norms and dropouts that serve it alone
    outputs: int  # values that it returns

    def clear(self, surgery: Surgery) -> None:
        """Remove the attention."""
        surgery.replace(self.attention, NoAttention(self.outputs))
        for path in self.idle:
            surgery.replace(path, PassThrough())


def find_seats(anatomy: Anatomy, batches: Sequence[Batch], removal: bool = True) -> list[Seats]:
    """Return what removing each block's attention changes, after trying it on a few tokens.

    Raises ValueError when a block without its attention is not the block whose attention returns zeros (as where the
    attention module adds the residual itself), and when its FFN's neurons are not laid out as they seem. Without
    ``removal`` only the neurons are looked at.
    """
    tiny = batches[0].rows(slice(0, 1), slice(0, 8))
    recorded = record_calls(anatomy.model, anatomy.stack, tiny)
    assert recorded.first_input is not None
    makes: dict[Any, tuple[tuple[str, ...], int]] = {}
    seats = []
    for index, block in enumerate(anatomy.blocks):
        if block.signature not in makes:
            probe = _Probe(anatomy, index, recorded.calls[index], recorded.first_input)
            makes[block.signature] = probe.served_alone()
            if removal:
                probe.check_removal(*makes[block.signature])
            probe.check_neurons()
        names, outputs = makes[block.signature]
        seats.append(Seats(block.attention[0], tuple(f"{block.path}.{name}" for name in names), outputs))
    return seats


@dataclass(frozen=True, slots=True, eq=False)
class _Probe:
    """One block, run on a few tokens."""

    anatomy: Anatomy
    index: int
    call: Call
    hidden: Tensor  # [1, T, C]

    @property
    def _block(self) -> Block:
        return self.anatomy.blocks[self.index]

    def _output(self) -> Tensor:
        return hidden_of(self.call.replay(self._block.module, self.hidden.clone()))

    def served_alone(self) -> tuple[tuple[str, ...], int]:
        """Return modules of the block that only the attention reads, or that only read it, and its outputs."""
        block = self._block
        attention = block.attention[1]
        uses: dict[int, list[str]] = {}  # id of a tensor -> modules that were given it
        made: dict[int, str] = {}  # id of a tensor -> module that returned it
        alive: list[Any] = []
        outputs = [1]
        skip = {id(module) for module in attention.modules()}
        relative = {module: name for name, module in block.module.named_modules() if name and id(module) not in skip
                    and not any(module.children())}  # fmt: skip
        relative[attention] = ""

        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            alive.append((args, kwargs, output))
            for value in (*args, *kwargs.values()):
                if isinstance(value, Tensor):
                    uses.setdefault(id(value), []).append(relative[module])
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, Tensor):
                made[id(first)] = relative[module]
            if module is attention and isinstance(output, tuple):
                outputs[0] = len(output)

        handles = [module.register_forward_hook(hook, with_kwargs=True) for module in relative]
        try:
            self._output()
        finally:
            for handle in handles:
                handle.remove()
        before = [name for one, name in made.items() if uses.get(one) == [""]]
        own = [one for one, name in made.items() if name == ""]
        after = [name for one in own for name in uses.get(one, [])]
        return tuple(dict.fromkeys((*before, *after))), outputs[0]

    def check_removal(self, idle: tuple[str, ...], outputs: int) -> None:
        """Compare the block without its attention to the block whose attention returns zeros."""
        block = self._block

        def silence(module: Any, args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (torch.zeros_like(output[0]), *output[1:])
            return torch.zeros_like(output)

        handle = block.attention[1].register_forward_hook(silence)
        try:
            wanted = self._output()
        finally:
            handle.remove()
        surgery = Surgery(self.anatomy.model)
        try:
            Seats(block.attention[0], tuple(f"{block.path}.{name}" for name in idle), outputs).clear(surgery)
            found = self._output()
        except (TypeError, AttributeError) as error:
            raise ValueError(f"{block.attention[0]} cannot be removed: {error}") from error
        finally:
            surgery.undo()
        if not torch.equal(found, wanted):
            raise ValueError(
                f"{block.attention[0]} cannot be removed: {block.path} without it is not the block whose attention "
                "returns zeros"
            )

    def check_neurons(self) -> None:
        """Compare the FFN with half of its neurons to the FFN whose other neurons give the writer zeros."""
        block = self._block
        width = block.ffn.width
        neurons = torch.arange(0, width, 2)
        drop = torch.ones(width, dtype=torch.bool).index_fill(0, neurons, False)
        outputs: list[Tensor] = []
        writer = block.ffn.writer[1]
        handles = [
            writer.register_forward_pre_hook(
                lambda m, args: (args[0].masked_fill(drop.to(args[0].device), 0),)
            ),
            writer.register_forward_hook(lambda m, args, output: outputs.append(output)),
        ]
        surgery = Surgery(self.anatomy.model)
        try:
            self._output()
            handles.pop(0).remove()
            block.ffn.cut(surgery, neurons)
            self._output()
        finally:
            surgery.undo()
            for handle in handles:
                handle.remove()
        wanted, found = (one.float() for one in outputs)
        bound = 16 * torch.finfo(outputs[0].dtype).eps * float(wanted.norm())  # sums in another order
        if not float((found - wanted).norm()) <= bound:
            raise ValueError(
                f"{block.path}: the rows of {block.ffn.readers[0][0]} are not laid out neuron by neuron as its shape "
                "suggests: its FFN cannot be cut"
            )
