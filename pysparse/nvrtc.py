"""Floor 0: machine code for a GPU that the wheel has none for, made from the wheel's own CUDA sources by NVRTC.

The sources travel with the wheel and are compiled as they are, host functions and all (csrc/cuda/nvrtc), so the kernels
have the names and parameters of the compiled-in ones, and what a GPU report says of their sources holds for both.
``_cuda`` plans and launches as ever and takes the code from here. Compiling needs no GPU. It needs NVIDIA's cuda-core,
NVRTC and the runtime's headers: ``pip install 'pysparse[cupy]'``.
"""

from __future__ import annotations

import hashlib
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

# What a GPU report vouches for, and so what is compiled at a time.
SOURCES = {
    "delta": ("delta.cu",),
    "fragment": ("fragment.cu", "strip.cu"),
    "pair": ("pair.cu", "strip.cu"),
    "nm": ("nm.cu",),
    "attention": ("attention.cu", "stripes.cu"),
    "embedding": ("embedding.cu",),
    "pruning": ("pruning.cu",),
    "shapley": ("shapley.cu",),
}
_CACHE_BYTES = 64 << 20
_DIGEST_BYTES = 32


class NvrtcError(RuntimeError):
    """NVRTC is missing, does not know the GPU, or refuses a source; the message says which and what helps."""


def has_code(architectures: str, capability: tuple[int, int]) -> bool:
    """Tell whether code for ``architectures`` ("80,90") runs on a GPU: same major number, minor not above its own."""
    major, minor = capability
    built = [divmod(int(arch), 10) for arch in architectures.split(",")]
    return any(have == major and least <= minor for have, least in built)


def machine_code(source: str, capability: tuple[int, int], sources: Path, cache_folder: Path) -> bytes:
    """Return the ELF image of all kernels of ``source`` (a file of ``sources``/cuda) for one compute capability.

    It comes from ``cache_folder`` where it has been compiled before from the same sources, headers and options by the
    same NVRTC, and is whole; else it is compiled (some seconds) and kept there. :class:`NvrtcError` as above.
    """
    core, utils = _library("cuda.core"), _library("cuda.core.utils")
    options = _options(core, source, capability, sources)
    text = (sources / "cuda" / source).read_text()
    key = utils.make_program_cache_key(
        code=text, code_type="c++", options=options, target_type="cubin", extra_digest=_fingerprint(sources)
    )
    try:
        with utils.FileStreamProgramCache(cache_folder, max_size_bytes=_CACHE_BYTES) as kept:
            image = _unsealed(kept.get(key))
            if image is None:
                image = _compile(core, text, options)
                kept[key] = hashlib.sha256(image).digest() + image
    except OSError as error:
        raise NvrtcError(
            f"the cache {cache_folder} cannot be used: {error}; set PYSPARSE_CACHE_DIR"
        ) from error
    return image


def load(
    cuda: Any, group: str, capabilities: list[tuple[int, int]], cache_folder: Path, *, always: bool = False
) -> None:
    """Let ``cuda`` (the module _cuda) launch compiled code of ``group`` on each device that it has none for.

    ``capabilities`` are those of the devices in order; ``always``: on all devices, native code or not. Raises
    :class:`NvrtcError`, and RuntimeError where the driver refuses the code.
    """
    folder = Path(cuda.__file__).parent / "cuda_sources"
    for device, capability in enumerate(capabilities):
        if always or not has_code(cuda.ARCHITECTURES, capability):
            for source in SOURCES[group]:
                cuda.load_code(machine_code(source, capability, folder, cache_folder), device)


def supported() -> list[tuple[int, int]]:
    """Return the compute capabilities that the installed NVRTC compiles for; :class:`NvrtcError` without one."""
    nvrtc = _library("cuda.bindings.nvrtc")
    try:
        status, known = nvrtc.nvrtcGetSupportedArchs()
    except (RuntimeError, ImportError) as error:  # no library behind the bindings
        raise NvrtcError(f"NVRTC could not be loaded ({error}): pip install 'pysparse[cupy]'") from error
    if int(status):
        raise NvrtcError(f"NVRTC does not say which GPUs it knows: {status}")
    return [divmod(arch, 10) for arch in known]


def _options(core: Any, source: str, capability: tuple[int, int], sources: Path) -> Any:
    known = supported()
    if capability not in known:
        raise NvrtcError(
            f"NVRTC {_version()} does not know {_name(capability)}; it knows {', '.join(map(_name, known))}. "
            "A later nvidia-cuda-nvrtc may"
        )
    folders = [sources / "cuda" / "nvrtc", sources / "cuda", sources / "include", _cuda_headers()]
    return core.ProgramOptions(
        name=source,
        arch=_name(capability),
        std="c++17",
        include_path=[str(folder) for folder in folders],
        pre_include="host_api.h",
        device_as_default_execution_space=True,
    )


def _compile(core: Any, text: str, options: Any, log: Any = None) -> bytes:
    try:
        return bytes(core.Program(text, "c++", options).compile("cubin", logs=log).code)
    except Exception as error:  # cuda-core's own class, which it does not export, with the compiler's log
        raise NvrtcError(f"NVRTC does not compile {options.name} for {options.arch}: {error}") from error


def _name(capability: tuple[int, int]) -> str:
    return f"sm_{capability[0]}{capability[1]}"


def _library(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise NvrtcError(f"{name} is not installed ({error}): pip install 'pysparse[cupy]'") from error


def _version() -> str:
    _, major, minor = _library("cuda.bindings.nvrtc").nvrtcVersion()
    return f"{major}.{minor}"


@cache
def _cuda_headers() -> Path:
    """Return the folder of cuda_fp16.h and its like: of NVIDIA's wheel, or of an installed toolkit."""
    found = _library("cuda.pathfinder").find_nvidia_header_directory("cudart")
    if found is None:
        raise NvrtcError(
            "the CUDA runtime's headers are missing: pip install 'pysparse[cupy]', or set CUDA_HOME"
        )
    return Path(found)


@cache
def _fingerprint(sources: Path) -> bytes:
    """Return a digest of all that a compilation may include: our sources and the runtime's version."""
    digest = hashlib.sha256((_cuda_headers() / "cuda_runtime_api.h").read_bytes())
    for path in sorted(path for path in sources.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(sources)}\n".encode() + path.read_bytes())
    return digest.digest()


def _unsealed(kept: bytes | None) -> bytes | None:
    """Return the image behind its digest; None where nothing is kept or what is kept has changed on disk."""
    if kept is None or hashlib.sha256(kept[_DIGEST_BYTES:]).digest() != kept[:_DIGEST_BYTES]:
        return None
    return kept[_DIGEST_BYTES:]
