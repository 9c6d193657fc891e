"""Drop-ins for ``nn.Embedding`` and ``nn.EmbeddingBag`` over a pruned table: smaller in memory and on disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from pysparse.formats.embedding import EmbeddingTable
from pysparse.formats.tensor_file import read_tensors, write_tensors
from pysparse.nn.conversion import converted
from pysparse.ops import embedding as ops

FORMAT = "pysparse-embedding-1"
PADDING = 32  # entries behind the last value: kernels read whole registers
_ARRAYS = ("values", "bitmask", "codebook", "field_rows")
_OF_GRADIENTS = (
    "padding_idx",
    "sparse",
    "scale_grad_by_freq",
)  # nothing to a lookup; a dense copy gets them back
_FORWARDS = (nn.Embedding.forward, nn.EmbeddingBag.forward)
_DENSE = "to_dense() gives a module that holds it"


class SparseEmbedding(nn.Module):
    """Lookups in a table pruned entry by entry; what was pruned is the codebook's entry of the row's field, or zero.

    ``per_field=False``: ids [...] are rows of the table, as in ``nn.Embedding``. ``per_field=True``: ids [..., fields]
    count from the first row of their field. The result is [..., dims] in the table's dtype. For inference: there is
    no gradient (fine-tune the dense table under its mask, then pack it), so that ``padding_idx``, ``sparse`` and
    ``scale_grad_by_freq`` of the ``nn.Embedding`` only matter to :meth:`to_dense`. Ids outside raise IndexError.
    """

    values: Tensor
    records: Tensor
    codebook: Tensor
    field_rows: Tensor

    def __init__(self, table: EmbeddingTable, per_field: bool = False) -> None:
        super().__init__()
        self.per_field = per_field
        self._dense_options: dict[str, Any] = {}
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
        if isinstance(embedding, nn.Module) and type(embedding).forward not in _FORWARDS:
            raise ValueError(
                f"{type(embedding).__name__} has a forward of its own, which a packed table would not run: pass its "
                "weight, and do the rest yourself"
            )
        assert isinstance(weight, Tensor)
        table = EmbeddingTable.from_dense(weight, keep, field_sizes=field_sizes, codebook=codebook)
        result = cls(table, per_field)
        if isinstance(embedding, nn.Module):
            result._dense_options = {name: getattr(embedding, name) for name in _OF_GRADIENTS}
        return result

    def _take(self, table: EmbeddingTable) -> None:
        table.validate()
        self._rows = table.rows
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
        rows = self.field_rows if self.field_rows.is_meta else self.field_rows.cpu()
        return EmbeddingTable(values, bitmask, self.codebook, rows, self.embedding_dim)

    @property
    def num_embeddings(self) -> int:
        """Rows of the table."""
        return self._rows

    @property
    def embedding_dim(self) -> int:
        """Columns of the table."""
        return self.codebook.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes that the table occupies in memory."""
        return sum(x.nbytes for x in (self.values, self.records, self.codebook, self.field_rows))

    def to_dense(self) -> nn.Embedding | nn.EmbeddingBag:
        """Return an ``nn.Embedding`` with the rows that lookups see."""
        dense: nn.Embedding = nn.Embedding.from_pretrained(
            self.table.to_dense(), freeze=False, **self._dense_options
        )
        return dense

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseEmbedding:
        """Move or convert the table; ValueError, before anything changes, for a dtype that it cannot hold."""
        converted(self, fn, self.codebook, _DENSE)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

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

    def _metadata(self) -> dict[str, str]:
        return {"format": FORMAT, "dims": str(self.embedding_dim), "per_field": str(int(self.per_field))}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as one safetensors file, beside and then renamed, so that no half file is ever seen.

        Raises OSError for a folder that is missing or cannot be written, and for a full disk.
        """
        table = self.table
        write_tensors(path, {name: getattr(table, name) for name in _ARRAYS}, self._metadata())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what :meth:`save` wrote.

        Raises ValueError, naming the offence, for a file that is cut off or not sound; OSError for one that cannot
        be read.
        """
        arrays, metadata = read_tensors(path, FORMAT, _ARRAYS)
        if not metadata.get("dims", "").isdecimal() or metadata.get("per_field") not in ("0", "1"):
            raise ValueError(
                f"{path}: dims {metadata.get('dims')!r} or per_field {metadata.get('per_field')!r} is not a number"
            )
        table = EmbeddingTable(**arrays, dims=int(metadata["dims"]))
        return cls(table, metadata["per_field"] == "1", **cls._options_of(metadata))

    @classmethod
    def _options_of(cls, metadata: dict[str, str]) -> dict[str, Any]:
        """Return the rest of the constructor's arguments, from a file's metadata."""
        return {}

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
        if device.type != "meta":  # a table without data takes the given one, where it is
            self.to(device)


class SparseEmbeddingBag(SparseEmbedding):
    """Sums or means of rows of a pruned table, as ``nn.EmbeddingBag`` computes them from ids, offsets and weights.

    With ``include_last_offset`` the offsets [bags + 1] end with the end of the last bag, as CSR's do.
    """

    def __init__(
        self,
        table: EmbeddingTable,
        per_field: bool = False,
        mode: str = "mean",
        include_last_offset: bool = False,
    ) -> None:
        super().__init__(table, per_field)
        if mode not in ("sum", "mean"):
            raise ValueError(f"mode is 'sum' or 'mean', got {mode!r}")
        self.mode, self.include_last_offset = mode, include_last_offset

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
            result.mode = str(getattr(embedding, "mode", result.mode))
            result.include_last_offset = bool(getattr(embedding, "include_last_offset", False))
        if result.mode not in ("sum", "mean"):
            raise ValueError(f"mode is 'sum' or 'mean', got {result.mode!r}")
        return result

    def forward(
        self, ids: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        """Return [bags, dims]: ids [bags, ids each], or ids [N] with ``offsets`` [bags], where each bag begins.

        ``per_sample_weights`` are of the shape of ``ids`` and for mode "sum", as in torch. Raises ValueError for
        offsets that do not begin with 0, fall, or leave the ids, and for weights that do not fit.
        """
        if (ids.dim() == 2) == (offsets is not None) or ids.dim() not in (1, 2):
            raise ValueError(f"ids are [bags, n], or [N] with offsets [bags]; got {ids.dim()} dimensions")
        if per_sample_weights is not None and self.mode != "sum":
            raise ValueError(
                f"per_sample_weights are for mode 'sum', as in torch; this bag's is {self.mode!r}"
            )
        if per_sample_weights is not None and per_sample_weights.shape != ids.shape:
            raise ValueError(
                f"per_sample_weights have shape {tuple(per_sample_weights.shape)}, the ids {tuple(ids.shape)}"
            )
        ends = self._ends(ids, offsets)
        weights = None if per_sample_weights is None else per_sample_weights.float().flatten()
        if not self.per_field:
            ids = ids.flatten()
        return ops.sparse_embedding_bag(ids, ends, weights, self.mode == "mean", *self._arrays())

    def _ends(self, ids: Tensor, offsets: Tensor | None) -> Tensor:
        """Return int64 [bags + 1], where bags begin and the last one ends."""
        if offsets is None:
            return torch.arange(ids.shape[0] + 1, dtype=torch.int64, device=ids.device) * ids.shape[1]
        if offsets.dim() != 1 or offsets.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"offsets are int64 or int32 [bags], got {offsets.dtype} {tuple(offsets.shape)}")
        if self.include_last_offset:
            if not offsets.numel():
                raise ValueError(
                    "include_last_offset: offsets have at least the end of the last bag, got none"
                )
            return offsets.to(torch.int64)
        return torch.cat([offsets.to(torch.int64), offsets.new_tensor([ids.numel()], dtype=torch.int64)])

    def to_dense(self) -> nn.EmbeddingBag:
        """Return an ``nn.EmbeddingBag`` of the same bags over the rows that lookups see."""
        options = {"mode": self.mode, "include_last_offset": self.include_last_offset, **self._dense_options}
        dense: nn.EmbeddingBag = nn.EmbeddingBag.from_pretrained(
            self.table.to_dense(), freeze=False, **options
        )
        return dense

    def extra_repr(self) -> str:
        """Describe the table and how bags are made of its rows."""
        last = ", include_last_offset=True" if self.include_last_offset else ""
        return f"{super().extra_repr()}, mode={self.mode}{last}"

    def _metadata(self) -> dict[str, str]:
        return {
            **super()._metadata(),
            "mode": self.mode,
            "include_last_offset": str(int(self.include_last_offset)),
        }

    @classmethod
    def _options_of(cls, metadata: dict[str, str]) -> dict[str, Any]:
        last = metadata.get("include_last_offset", "0")
        if last not in ("0", "1"):
            raise ValueError(f"include_last_offset is 0 or 1 in a file, got {last!r}")
        return {"mode": metadata.get("mode", "mean"), "include_last_offset": last == "1"}
