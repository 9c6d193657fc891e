"""Drop-ins for ``nn.Embedding`` and ``nn.EmbeddingBag`` over a pruned table: smaller in memory and on disk."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pysparse.formats.embedding import EmbeddingTable
from pysparse.ops import embedding as ops

FORMAT = "pysparse-embedding-1"
PADDING = 32  # entries behind the last value: kernels read whole registers
_ARRAYS = ("values", "bitmask", "codebook", "field_rows")


class SparseEmbedding(nn.Module):
    """Lookups in a table pruned entry by entry; what was pruned is the codebook's entry of the row's field, or zero.

    ``per_field=False``: ids [...] are rows of the table, as in ``nn.Embedding``. ``per_field=True``: ids [..., fields]
    count from the first row of their field. The result is [..., dims] in the table's dtype. For inference: there is
    no gradient (fine-tune the dense table under its mask, then pack it). Ids outside raise IndexError.
    """

    values: Tensor
    records: Tensor
    codebook: Tensor
    field_rows: Tensor

    def __init__(self, table: EmbeddingTable, per_field: bool = False) -> None:
        super().__init__()
        self.per_field = per_field
        for name in ("values", "records", "codebook", "field_rows"):
            self.register_buffer(name, None, persistent=False)
        self._take(table)

    @classmethod
    def from_dense(
        cls, embedding: nn.Module | Tensor, keep: Tensor | None = None, *, field_sizes: Sequence[int] | None = None,
        codebook: Tensor | None = None, per_field: bool = False,
    ) -> SparseEmbedding:  # fmt: skip
        """Pack a table or an ``nn.Embedding``; see :meth:`EmbeddingTable.from_dense` for the rest and its errors."""
        weight = embedding.weight if isinstance(embedding, nn.Module) else embedding
        if isinstance(embedding, nn.Module) and getattr(embedding, "max_norm", None) is not None:
            raise ValueError("max_norm renormalises rows at each lookup; a packed table does not change")
        assert isinstance(weight, Tensor)
        table = EmbeddingTable.from_dense(weight, keep, field_sizes=field_sizes, codebook=codebook)
        return cls(table, per_field)

    def _take(self, table: EmbeddingTable) -> None:
        table.validate()
        # Room for a register's read past the last value; the buffer's own length stays the number of values.
        room = table.values.new_zeros(table.values.numel() + PADDING)
        room[: table.values.numel()] = table.values
        self.values = room
        self.records = ops.pack_records(table.bitmask, table.dims)
        self.codebook = table.codebook.contiguous()
        self.field_rows = table.field_rows.contiguous()

    @property
    def table(self) -> EmbeddingTable:
        """The table in the format that goes to disk; its values share memory with the module's."""
        bitmask = ops.record_masks(self.records, self.num_embeddings)
        values = self.values[: self.values.numel() - PADDING]
        return EmbeddingTable(values, bitmask, self.codebook, self.field_rows.cpu(), self.embedding_dim)

    @property
    def num_embeddings(self) -> int:
        """Rows of the table."""
        return int(self.field_rows[-1])

    @property
    def embedding_dim(self) -> int:
        """Columns of the table."""
        return self.codebook.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes that the table occupies in memory."""
        return sum(x.nbytes for x in (self.values, self.records, self.codebook, self.field_rows))

    def to_dense(self) -> nn.Embedding:
        """Return an ``nn.Embedding`` with the rows that lookups see."""
        dense: nn.Embedding = nn.Embedding.from_pretrained(self.table.to_dense(), freeze=False)
        return dense

    def _arrays(self) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
        columns = self.field_rows.numel() - 1 if self.per_field else 0
        return self.values, self.records, self.codebook, self.field_rows, columns

    def forward(self, ids: Tensor) -> Tensor:
        """Return [..., dims] for int64 or int32 ``ids`` [...] ([..., fields] with ``per_field``)."""
        return ops.sparse_embedding(ids, *self._arrays())

    def extra_repr(self) -> str:
        """Describe shape, fields and density."""
        stored = self.values.numel() - PADDING
        share = stored / max(1, self.num_embeddings * self.embedding_dim)
        return f"{self.num_embeddings}, {self.embedding_dim}, fields={self.field_rows.numel() - 1}, density={share:.3f}"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as one safetensors file, beside and then renamed, so that no half file is ever seen."""
        target = Path(path)
        table = self.table
        beside = target.with_name(target.name + ".part")
        metadata = {"format": FORMAT, "dims": str(table.dims), "per_field": str(int(self.per_field))}
        arrays = {name: getattr(table, name).cpu().contiguous() for name in _ARRAYS}
        save_file(arrays, beside, metadata)
        os.replace(beside, target)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SparseEmbedding:
        """Read what :meth:`save` wrote. Raises ValueError, naming the offence, for a file that is not sound."""
        with safe_open(os.fspath(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT or set(file.keys()) != set(_ARRAYS):
                raise ValueError(
                    f"{path} is not a {FORMAT} file: format {metadata.get('format')!r}, {sorted(file.keys())}"
                )
            arrays = {name: file.get_tensor(name) for name in _ARRAYS}
        if not metadata.get("dims", "").isdecimal() or metadata.get("per_field") not in ("0", "1"):
            raise ValueError(
                f"{path}: dims {metadata.get('dims')!r} or per_field {metadata.get('per_field')!r} is not a number"
            )
        return cls(EmbeddingTable(**arrays, dims=int(metadata["dims"])), metadata["per_field"] == "1")

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        table = self.table
        for name in _ARRAYS:
            destination[prefix + name] = getattr(table, name)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        absent = [prefix + name for name in _ARRAYS if prefix + name not in state_dict]
        if absent:
            missing_keys.extend(absent)
            return
        device = self.values.device
        arrays = {name: state_dict[prefix + name] for name in _ARRAYS}
        try:
            self._take(EmbeddingTable(**arrays, dims=arrays["codebook"].shape[-1]))
        except ValueError as error:
            error_msgs.append(f"{prefix}: {error}")
            return
        self.to(device)


class SparseEmbeddingBag(SparseEmbedding):
    """Sums or means of rows of a pruned table, as ``nn.EmbeddingBag`` computes them from ids, offsets and weights."""

    def __init__(self, table: EmbeddingTable, per_field: bool = False, mode: str = "mean") -> None:
        super().__init__(table, per_field)
        if mode not in ("sum", "mean"):
            raise ValueError(f"mode is 'sum' or 'mean', got {mode!r}")
        self.mode = mode

    @classmethod
    def from_dense(
        cls, embedding: nn.Module | Tensor, keep: Tensor | None = None, *, field_sizes: Sequence[int] | None = None,
        codebook: Tensor | None = None, per_field: bool = False,
    ) -> SparseEmbeddingBag:  # fmt: skip
        """Pack an ``nn.EmbeddingBag`` or a table (then with mode "mean"); a padding_idx is refused."""
        if getattr(embedding, "padding_idx", None) is not None:
            raise ValueError("padding_idx is not supported: leave the id out of the bag or give it weight 0")
        result = super().from_dense(
            embedding, keep, field_sizes=field_sizes, codebook=codebook, per_field=per_field
        )
        assert isinstance(result, SparseEmbeddingBag)
        if isinstance(embedding, nn.Module):
            result.mode = str(embedding.mode)
        if result.mode not in ("sum", "mean"):
            raise ValueError(f"mode is 'sum' or 'mean', got {result.mode!r}")
        return result

    def forward(
        self, ids: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        """Return [bags, dims]: ids [bags, ids each], or ids [N] with ``offsets`` [bags], where each bag begins."""
        if (ids.dim() == 2) == (offsets is not None) or ids.dim() not in (1, 2):
            raise ValueError(f"ids are [bags, n], or [N] with offsets [bags]; got {ids.dim()} dimensions")
        if offsets is None:
            ends = torch.arange(ids.shape[0] + 1, dtype=torch.int64, device=ids.device) * ids.shape[1]
        else:
            ends = torch.cat([offsets.to(torch.int64), offsets.new_tensor([ids.numel()], dtype=torch.int64)])
        weights = None if per_sample_weights is None else per_sample_weights.float().flatten()
        if not self.per_field:
            ids = ids.flatten()
        return ops.sparse_embedding_bag(ids, ends, weights, self.mode == "mean", *self._arrays())
