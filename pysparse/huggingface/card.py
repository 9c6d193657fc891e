"""The README.md of a saved model: what it is and how to load it."""

from __future__ import annotations

from pysparse.nn.structure import Structure

_HEADER = """---
library_name: transformers
tags:
- pysparse
- sparse
---
"""

_PYSPARSE = """# {architecture}, sparse

{layers} linear layers of this model are stored without their zeros.

## Loading

**Import pysparse first**: `pip install pysparse`, then

```python
import pysparse

model = pysparse.from_pretrained("path/to/this/folder")
```

After `import pysparse` the ordinary `AutoModel....from_pretrained` works too. Without it transformers stops
with a size mismatch of `....weight`: the empty tensors of that name are there to make sure that it does.
`pysparse.from_pretrained(..., format="dense")` gives ordinary layers.

## On disk

For each layer that `quantization_config.nnz` in `config.json` lists, `model*.safetensors` holds
`.compressed` (the kept weights, row after row), `.bitmask` (uint8, a bit for each weight, the lowest bit
first), `.row_offsets` (int64, where each row begins in `.compressed`) and `.shape` (rows, columns).
Where `quantization_config.packings` gives a layer int8 values, a weight is its value times the entry of `.scales`
(float32, rows x groups of `group_size` columns, or one a row) that belongs to it.
"""

_DENSE = """# {architecture}, pruned

An ordinary checkpoint whose linear layers hold zeros; any tool reads it.
`pysparse.sparsify_(model)` packs it for sparse kernels.
"""

_LEGACY = """# {architecture}, sparse

{layers} linear layers are stored in the `sparse-bitmask` layout of compressed-tensors.

## Loading

With `pysparse.from_pretrained("path/to/this/folder")`, or with compressed-tensors up to 0.14.

**Not with plain transformers and compressed-tensors 0.15 or later**: they no longer know the layout and leave
these layers with random weights. `pysparse.convert(folder, new, format="dense")` gives one that loads there.
"""

_STRUCTURE = """
## Structure

{removed} attention modules are gone and {layers} linear layers are narrower than `config.json` says elsewhere:
`quantization_config.structure` lists them. So this model loads after `import pysparse` only, by
`pysparse.from_pretrained` or the ordinary `AutoModel....from_pretrained`. It generates with the ordinary KV cache.
"""

_TEXTS = {"pysparse": _PYSPARSE, "dense": _DENSE, "compressed-tensors": _LEGACY}


def model_card(architecture: str, format: str, layers: int, structure: Structure | None = None) -> str:
    """Return the text for a model of class ``architecture`` saved in ``format`` with ``layers`` packed layers."""
    text = _HEADER + "\n" + _TEXTS[format].format(architecture=architecture, layers=layers)
    if structure is None:
        return text
    text = text.replace(
        "An ordinary checkpoint whose linear layers hold zeros; any tool reads it.", "Dense weights."
    )
    return text + _STRUCTURE.format(removed=len(structure.removed), layers=len(structure.shapes))
