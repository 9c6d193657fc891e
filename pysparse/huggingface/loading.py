"""Load a model folder, sparse or not, ours or an orphaned one; convert between formats."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from pysparse.huggingface.layout import CheckpointError
from pysparse.huggingface.quantizer import ALLOW_OTHER_SHAPES, FUSE, attach_quantizer
from pysparse.huggingface.saving import FORMATS, write_folder
from pysparse.huggingface.source import Source
from pysparse.nn import Packing

_LOAD_FORMATS = ("sparse", "dense")
_HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
_DOWNLOADED = ("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json")


def from_pretrained(
    path: str | Path,
    *,
    format: str = "sparse",
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    fuse: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """Load the model in a folder (or of that name on the hub) and return it in evaluation mode.

    The class is the one named by ``architectures`` in config.json. With ``format`` "sparse" packed layers
    become :class:`SparseLinear`, or :class:`CompactLinear` where they have int8 values or compact n:m indices,
    ready for the kernels; with "dense" they become ordinary ``nn.Linear``
    with zeros. An ordinary dense checkpoint loads as it is, either way. Folders in compressed-tensors'
    ``sparse-bitmask`` and ``sparse-24-bitmask`` layouts, which its later releases no longer read, load like
    our own. ``dtype`` converts values and leaves the masks alone; with ``fuse`` sparse layers that share an input
    are computed in fewer calls (see :func:`pysparse.nn.fuse_`); ``kwargs`` go to transformers.

    Raises CheckpointError (a ValueError) that names file, tensor and bound when anything in the folder is
    damaged or contradicts the rest, FileNotFoundError for a missing folder or config.json.
    """
    if format not in _LOAD_FORMATS:
        raise ValueError(f'format is one of {list(_LOAD_FORMATS)}, got "{format}"')
    source = Source.open(_local_folder(path, kwargs))
    trusted = bool(kwargs.pop("trust_remote_code", False))  # transformers' None would stop and ask
    config, kwargs = _read_config(source, kwargs, trusted)
    kwargs["trust_remote_code"] = trusted
    if dtype is not None:
        kwargs["dtype"] = dtype
    if not _is_cpu(device_map):
        kwargs["device_map"] = device_map
    shapes = ALLOW_OTHER_SHAPES.set(bool(kwargs.get("ignore_mismatched_sizes", False)))
    fusing = FUSE.set(fuse)
    try:
        model = _build(source, config, kwargs)
    finally:
        FUSE.reset(fusing)
        ALLOW_OTHER_SHAPES.reset(shapes)
    if format == "dense" and source.layout is not None:
        model.dequantize()
        attach_quantizer(model)
    loaded: nn.Module = model.eval()
    return loaded


def convert(
    old: str | Path,
    new: str | Path,
    *,
    format: str = "pysparse",
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str = "5GB",
    packing: Packing | None = None,
) -> Path:
    """Load the folder ``old`` in whatever format it is and save it as ``new`` in ``format``; return ``new``.

    Formats and ``packing`` are those of :func:`save_pretrained`; the tokenizer's and other small files come
    along. Raises what :func:`from_pretrained` and :func:`save_pretrained` raise.
    """
    if format not in FORMATS:
        raise ValueError(f'format is one of {list(FORMATS)}, got "{format}"')
    model = from_pretrained(old, dtype=dtype)
    source = Path(str(model.name_or_path))

    def add_small_files(folder: Path) -> None:
        for file in source.iterdir():
            weights = file.match("*.safetensors*") or file.suffix in (".bin", ".pt", ".pth")
            if file.is_file() and not weights and not (folder / file.name).exists():
                shutil.copy(file, folder / file.name)

    return write_folder(model, new, format, add_small_files, max_shard_size, packing=packing)


def _local_folder(path: str | Path, kwargs: dict[str, Any]) -> Path:
    """Return an existing folder, or fetch a hub name's files into the cache and return that."""
    folder = Path(path).expanduser()
    hub = {name: kwargs.pop(name) for name in _HUB_OPTIONS if name in kwargs}
    subfolder = kwargs.pop("subfolder", "")
    if not folder.is_dir():
        if isinstance(path, Path) or folder.exists() or str(path).startswith((".", "/", "~")):
            raise FileNotFoundError(f"no such model folder: {path}")
        patterns = [f"{subfolder}/{name}" if subfolder else name for name in _DOWNLOADED]
        folder = Path(snapshot_download(str(path), allow_patterns=patterns, **hub))
    return folder / subfolder if subfolder else folder


def _read_config(source: Source, kwargs: dict[str, Any], trusted: bool) -> tuple[Any, dict[str, Any]]:
    """Return transformers' config, with our layout in it, and the arguments it did not take."""
    given = kwargs.pop("config", None)
    if isinstance(given, PreTrainedConfig):
        config, unused = copy.deepcopy(given), kwargs
    else:
        try:
            config, unused = AutoConfig.from_pretrained(
                given or source.folder, return_unused_kwargs=True, trust_remote_code=trusted, **kwargs
            )
        except Exception as error:
            raise CheckpointError(
                f"{source.folder / 'config.json'}: transformers cannot read it: {_first_line(error)}"
            ) from error
    if source.layout is not None:
        config.quantization_config = source.layout.to_dict()
    if source.legacy and hasattr(config, "compression_config"):
        del config.compression_config
    return config, unused


def _build(source: Source, config: Any, kwargs: dict[str, Any]) -> Any:
    """Build and fill the model; tell a config that describes no model from other failures."""
    model_class = _model_class(source, config, remote_code=bool(kwargs.get("trust_remote_code")))
    try:
        model, info = model_class.from_pretrained(
            str(source.folder), config=config, output_loading_info=True, **kwargs
        )
        _check_complete(source, info)
        return model
    except (CheckpointError, MemoryError, ImportError):
        raise
    except Exception as error:
        if source.layout is not None and not _describes_a_model(model_class, config):
            raise CheckpointError(
                f"{source.folder / 'config.json'}: transformers cannot build {model_class.__name__} from it: "
                f"{_first_line(error)}"
            ) from error
        raise


def _check_complete(source: Source, info: dict[str, Any]) -> None:
    """Legacy files list no names of their own to check, so hear what transformers found missing."""
    missing = sorted(info["missing_keys"])
    if source.legacy and missing:
        raise CheckpointError(
            f"{source.folder}: the model needs tensor '{missing[0]}', which is missing (as are "
            f"{len(missing) - 1} others)"
        )


def _describes_a_model(model_class: Any, config: Any) -> bool:
    try:
        with torch.device("meta"):
            model_class._from_config(config)
    except Exception:  # whatever a constructor throws at nonsense: the question is only whether it works
        return False
    return True


def _model_class(source: Source, config: Any, *, remote_code: bool) -> Any:
    """Return the class that config.json's ``architectures`` names; for trusted remote code, its Auto class."""
    custom = source.config.get("auto_map")
    if remote_code and isinstance(custom, dict):
        known = [name for name in custom if name.startswith("AutoModel") and hasattr(transformers, name)]
        if known:
            return getattr(transformers, known[0])
    architectures = source.config.get("architectures")
    if architectures is None and source.layout is None:
        return AutoModel
    name = architectures[0] if isinstance(architectures, list) and architectures else architectures
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    if isinstance(found, type) and issubclass(found, PreTrainedModel) and found.config_class is type(config):
        return found
    raise CheckpointError(
        f"{source.folder / 'config.json'}: architectures names {str(name)[:60]!r}, which is no model of type "
        f"'{config.model_type}' in transformers {transformers.__version__}"
    )


def _is_cpu(device_map: Any) -> bool:
    """Tell whether ``device_map`` asks for what happens anyway, and needs no accelerate."""
    if isinstance(device_map, dict):
        return set(map(str, device_map.values())) == {"cpu"}
    return device_map is None or str(device_map) == "cpu"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
