"""Collect licence-clean English prose for the demo model: docstrings of permissive Python packages.

Files are read with ``ast`` and never imported. Every package's licence is read from its own metadata and
must be permissive, otherwise the package is left out and the manifest says so. A document is the prose of one
file; a paragraph that was seen before, anywhere, is dropped, so the three splits share no paragraph.

    pip install --no-deps --only-binary :all: --target SITE -r corpus-requirements.txt
    python corpus.py --site SITE --out CORPUS
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import inspect
import json
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from email.parser import HeaderParser
from pathlib import Path

END_OF_TEXT = "<|endoftext|>"
SPLITS = ("train", "calibration", "held_out")

# Directories whose files may carry another licence than the package's (vendored code) or no prose (tests).
SKIP_DIRS = frozenset(
    [
        *("tests", "test", "testing", "idlelib", "turtledemo", "ensurepip", "lib2to3", "__pycache__"),
        *("_vendor", "vendor", "vendored", "_vendored_packages", "extern", "externals", "_externals"),
        *("third_party", "node_modules", "site-packages", "dist-packages"),
    ]
)
PERMISSIVE = re.compile(
    r"\b(?:0?bsd(?:[- ]?[023])?(?:[- ]clause)?|mit|apache(?: software)?(?:[- ]?2(?:\.0)?)?|psf(?:-2\.0)?|isc|"
    r"python software foundation|cc0-1\.0)\b",
    re.IGNORECASE,
)
REFUSED = re.compile(
    r"\b(?:[al]?gpl\S*|gnu|mozilla|mpl\S*|eupl|proprietary|cc-by-(?:nc|sa)\S*)\b", re.IGNORECASE
)

MIN_LONG_STRING = 300  # shorter bare constants are messages and templates, not prose
MIN_DEDUP_CHARS = 40  # below this a repeat is a heading ("Parameters"), which every document may have
MIN_LETTERS = 0.70  # share of letters and blanks in a paragraph of prose; tables and code lie below
MIN_DOCUMENT_CHARS = 200


RawDocument = tuple[str, str, str, str, list[str]]  # source, package, licence, sha256, paragraphs


@dataclass(frozen=True, slots=True)
class Document:
    """The prose of one file: ``source`` is package-relative, ``sha256`` is that of the whole file."""

    source: str
    package: str
    licence: str
    sha256: str
    text: str


@dataclass(frozen=True, slots=True)
class Package:
    """One installed distribution: its top-level folders and what its metadata says about the licence."""

    name: str
    version: str
    licence: str
    accepted: bool
    folders: tuple[str, ...]


def licence_of(metadata_text: str) -> str:
    """The SPDX expression of a METADATA file, else its classifiers, else the first line of ``License``."""
    headers = HeaderParser().parsestr(metadata_text)
    if expression := headers.get("License-Expression"):
        return expression.strip()
    licences = (c for c in headers.get_all("Classifier") or [] if c.startswith("License ::"))
    classifiers = {c.split("::")[-1].strip() for c in licences} - {"OSI Approved"}
    if classifiers:
        return "; ".join(sorted(classifiers))
    return (headers.get("License") or "unknown").strip().splitlines()[0][:80]


def is_permissive(licence: str) -> bool:
    """True when the licence names a permissive licence and no copyleft one."""
    return bool(PERMISSIVE.search(licence)) and not REFUSED.search(licence)


def read_packages(site: Path, wanted: Path) -> list[Package]:
    """Distributions below ``site`` named in the requirements file ``wanted``, sorted by name."""
    names = {
        re.split(r"[=<>!~\[ ]", line)[0].lower().replace("_", "-")
        for line in wanted.read_text().splitlines()
        if line and not line.startswith("#")
    }
    packages = []
    for info in sorted(site.glob("*.dist-info")):
        text = (info / "METADATA").read_text(encoding="utf-8", errors="replace")
        headers = HeaderParser().parsestr(text)
        name = str(headers["Name"]).lower().replace("_", "-")
        if name not in names:
            continue
        record = (info / "RECORD").read_text(encoding="utf-8").splitlines()
        tops = {line.split("/", 1)[0] for line in record if "/" in line}
        folders = tuple(sorted(top for top in tops if re.fullmatch(r"\w+", top) and (site / top).is_dir()))
        licence = licence_of(text)
        packages.append(Package(name, str(headers["Version"]), licence, is_permissive(licence), folders))
    return packages


def prose_strings(tree: ast.AST) -> Iterator[str]:
    """Docstrings, attribute docs and long string constants of a module, in source order."""
    nodes = list(ast.walk(tree))
    bare = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    strings = [node for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    found = [node for node in strings if id(node) in bare or len(node.value) >= MIN_LONG_STRING]
    for node in sorted(found, key=lambda n: (n.lineno, n.col_offset)):
        yield inspect.cleandoc(node.value)


def is_prose(paragraph: str) -> bool:
    """False for doctest sessions, tables, markup and other text that is not mostly words."""
    if ">>>" in paragraph or not paragraph.replace("\n", "").isprintable():
        return False
    if any(len(word) > 80 for word in paragraph.split()):
        return False
    return sum(c.isalpha() or c.isspace() for c in paragraph) >= MIN_LETTERS * len(paragraph)


def paragraphs_of(strings: Iterable[str]) -> list[str]:
    """Prose paragraphs (blank-line separated) of several strings, trailing blanks removed."""
    parts = (part.strip("\n") for text in strings for part in re.split(r"\n\s*\n", text))
    tidy = ("\n".join(line.rstrip() for line in part.expandtabs().splitlines()) for part in parts)
    return [part for part in tidy if part.strip() and is_prose(part)]


def read_file(path: str) -> tuple[str, list[str]] | None:
    """(sha256 of the file, its prose paragraphs), or None when it does not parse."""
    data = Path(path).read_bytes()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's sources
            tree = ast.parse(data)
    except (SyntaxError, ValueError, RecursionError):
        return None
    return hashlib.sha256(data).hexdigest(), paragraphs_of(prose_strings(tree))


def python_files(root: Path) -> Iterator[Path]:
    """The .py files below ``root`` in sorted order, without the skipped folders."""
    for path in sorted(root.rglob("*.py")):
        if not SKIP_DIRS.intersection(path.relative_to(root).parts[:-1]):
            yield path


def topic_documents(stdlib: Path) -> Iterator[tuple[str, str, list[str]]]:
    """(source, sha256, paragraphs) of each pydoc help topic; one topic counts as one file."""
    tree = ast.parse((stdlib / "pydoc_data" / "topics.py").read_bytes())
    table = next(n for n in ast.walk(tree) if isinstance(n, ast.Dict))
    topics = ast.literal_eval(table)
    for name, text in sorted(topics.items()):
        digest = hashlib.sha256(text.encode()).hexdigest()
        yield f"python/topics/{name}", digest, paragraphs_of([inspect.cleandoc(text)])


def raw_documents(site: Path, packages: list[Package], workers: int) -> Iterator[RawDocument]:
    """Every file's prose in a fixed order, the standard library first."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    python = f"python-{platform.python_version()}"
    for source, digest, paragraphs in topic_documents(stdlib):
        yield source, python, "PSF-2.0", digest, paragraphs
    jobs = [
        (f"python/{p.relative_to(stdlib)}", python, "PSF-2.0", p)
        for p in python_files(stdlib)
        if p.name != "topics.py"
    ]
    for package in packages:
        label = f"{package.name}-{package.version}"
        for folder in package.folders if package.accepted else ():
            files = python_files(site / folder)
            jobs += [(str(p.relative_to(site)), label, package.licence, p) for p in files]
    with ProcessPoolExecutor(workers) as pool:
        results = pool.map(read_file, [str(job[3]) for job in jobs], chunksize=32)
        for (source, label, licence, _), result in zip(jobs, results, strict=True):
            if result is not None:
                yield source, label, licence, *result


def deduplicate(raw: Iterable[RawDocument]) -> Iterator[Document]:
    """Join the paragraphs of each file, without those that an earlier file or the same one had."""
    seen: set[bytes] = set()
    for source, package, licence, digest, paragraphs in raw:
        kept = []
        for paragraph in paragraphs:
            key = hashlib.blake2b(" ".join(paragraph.lower().split()).encode(), digest_size=12).digest()
            if len(paragraph) >= MIN_DEDUP_CHARS and key in seen:
                continue
            seen.add(key)
            kept.append(paragraph)
        text = "\n\n".join(kept)
        if len(text) >= MIN_DOCUMENT_CHARS and sum(len(p) >= MIN_DEDUP_CHARS for p in kept) >= 2:
            yield Document(source, package, licence, digest, text)


def split_of(sha256: str) -> str:
    """98/1/1 by the file's hash: the same file is in the same split on every machine."""
    return {0: "calibration", 1: "held_out"}.get(int(sha256[:8], 16) % 100, "train")


def sha256_of(text: str) -> str:
    """Hex digest of the UTF-8 bytes."""
    return hashlib.sha256(text.encode()).hexdigest()


def summarise(documents: dict[str, list[Document]], packages: list[Package]) -> dict[str, object]:
    """Totals per split and per package, and one hash over all file hashes of each split."""
    sizes: dict[str, int] = {}
    for split in SPLITS:
        for doc in documents[split]:
            sizes[doc.package] = sizes.get(doc.package, 0) + len(doc.text.encode())
    return {
        "python": platform.python_version(),
        "splits": {
            split: {
                "documents": len(documents[split]),
                "bytes": sum(len(d.text.encode()) for d in documents[split]),
                "sha256_of_file_hashes": sha256_of("".join(d.sha256 for d in documents[split])),
                "sha256_of_text": sha256_of(END_OF_TEXT.join(d.text for d in documents[split])),
            }
            for split in SPLITS
        },
        "sources": [
            {"package": f"{p.name}-{p.version}", "licence": p.licence, "accepted": p.accepted}
            for p in [Package("python", platform.python_version(), "PSF-2.0", True, ()), *packages]
        ],
        "bytes_per_source": dict(sorted(sizes.items())),
    }


def main() -> None:
    """Write CORPUS/{train,calibration,held_out}.jsonl and CORPUS/corpus.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--site", type=Path, required=True, help="folder that pip --target filled")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--requirements", type=Path, default=Path(__file__).with_name("corpus-requirements.txt")
    )
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    packages = read_packages(args.site, args.requirements)
    documents: dict[str, list[Document]] = {split: [] for split in SPLITS}
    for doc in deduplicate(raw_documents(args.site, packages, args.workers)):
        documents[split_of(doc.sha256)].append(doc)
    args.out.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        lines = (json.dumps(asdict(doc), ensure_ascii=False) for doc in documents[split])
        (args.out / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    summary = summarise(documents, packages)
    (args.out / "corpus.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(summary["splits"], indent=1))


if __name__ == "__main__":
    main()
