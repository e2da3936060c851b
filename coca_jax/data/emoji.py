"""The built-in set: emoji of three designers, captioned by their Unicode names.

Train on Twemoji and OpenMoji, test on Noto: a designer whose drawings were never seen. One in ten base concepts and one
in ten skin-tone combinations are held out of training too. The set is prepared once into ArrayRecord files in a cache
folder; its pictures come out of installed packages and are never shipped with this code.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import importlib.metadata
import io
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import tqdm

from coca_jax import cache
from coca_jax.data import emoji_art, records
from coca_jax.data.emoji_art import Concept
from coca_jax.data.records import DataError, Record
from coca_jax.data.tokenizer import Tokenizer

# Raise it with every change of what is prepared: a folder of another version is prepared again.
FORMAT_VERSION = 1
VOCAB_SIZE = 2000
TRAIN, NOTO, TOKENIZER, MANIFEST = "train.array_record", "noto.array_record", "tokenizer.model", "manifest.json"

# A picture that is to be written: what it shows, whose style, the file.
_Item = tuple[Concept, str, Path]


def default_folder() -> Path:
    """Where the prepared set lies unless another folder is named: `emoji` in `cache.folder()`."""
    return cache.folder() / "emoji"


def prepare(out: str | os.PathLike[str] | None = None, *, force: bool = False, progress: bool = True) -> dict[str, Any]:
    """Prepares the set where it is not there yet, and returns its manifest.

    Everything is written into a temporary folder that takes its name last, so that a preparation that was killed is
    never taken for a whole one. A folder of another format version, or with damaged files, is prepared again.

    Args:
      out: folder of the set, on a local disk; None: `default_folder()`.
      force: prepare again even if it is there.
      progress: show a progress bar, and print the attribution of the pictures after preparing.

    Returns:
      The manifest, which also lies in the folder as JSON: `splits` (each a range of records of a file), `pictures` per
      designer, `dropped` files by reason, `files` with sizes and SHA-256, `licences`, `attribution`, `packages`.

    Raises:
      DataError: the extra is not installed, or `out` holds something else.
    """
    folder = Path(out) if out is not None else default_folder()
    if ":/" in os.fspath(folder):
        raise DataError(f"{folder}: the emoji set is prepared on a local disk; set COCA_JAX_CACHE to a local folder")
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is a file: name a folder")
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MANIFEST).is_file():
            raise DataError(f"{folder} holds something else: name an empty folder, or remove it")
        try:
            manifest = verify(folder)
        except DataError as error:
            print(f"preparing the emoji set again: {error}")
        else:
            if not force and manifest["format_version"] == FORMAT_VERSION:
                return manifest
    emoji_art.require_packages()
    folder.parent.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        manifest = _build(temporary, progress)
        _replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if progress:
        print(manifest["attribution"])
    return manifest


def verify(folder: str | os.PathLike[str], *, checksums: bool = False) -> dict[str, Any]:
    """The manifest of a prepared folder, after a look at its files.

    Args:
      folder: what `prepare` wrote.
      checksums: compare the files' SHA-256 as well as their sizes.

    Raises:
      DataError: no manifest, or a file that is missing or differs.
    """
    path = Path(folder)
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest["name"] != "emoji" or not isinstance(manifest["format_version"], int):
            raise ValueError(manifest["name"])
        files = {name: (wanted["bytes"], wanted["sha256"]) for name, wanted in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{path} holds no emoji set: python -m coca_jax.data.prepare emoji") from None
    for name, (size, digest) in files.items():
        file = path / name
        found = file.stat().st_size if file.is_file() else 0
        if found != size:
            raise DataError(f"{file}: {found} bytes where the manifest says {size}; prepare the set again")
        if checksums and _sha256(file) != digest:
            raise DataError(f"{file}: its SHA-256 is not the manifest's; prepare the set again with --force")
    return manifest


# ---------------------------------------------------------------------------------------------------------------------


def _build(folder: Path, progress: bool) -> dict[str, Any]:
    """Writes files and manifest into `folder`."""
    named = emoji_art.concepts()
    drops: dict[str, int] = {}
    files = emoji_art.pictures(named, drops)
    train = [
        (named[key], style, path)
        for style in ("twemoji", "openmoji")
        for key, path in _mixed(files[style])
        if not named[key].held_out
    ]
    # Parts of the Noto file, in this order, so that every split is one range of it. A name that no training style draws
    # would be an unseen concept by accident and not by the draw.
    noto: dict[str, list[_Item]] = {"base": [], "toned": [], "combinations": [], "concepts": []}
    unknown = "noto: in no training style"
    drops[unknown] = 0
    for key, path in _mixed(files["noto"]):
        concept = named[key]
        if key not in files["twemoji"] and key not in files["openmoji"]:
            drops[unknown] += 1
        else:
            noto[concept.held_out or ("base" if concept.base == key else "toned")].append((concept, "noto", path))
    tested = [item for part in noto.values() for item in part]
    with tqdm.tqdm(total=len(train) + len(tested), desc="emoji", unit=" pictures", disable=not progress) as bar:
        _write(folder / TRAIN, train, bar)
        _write(folder / NOTO, tested, bar)
    tokenizer = Tokenizer.train(sorted({concept.name for concept, _, _ in train}), folder / TOKENIZER, VOCAB_SIZE)

    twemoji = sum(style == "twemoji" for _, style, _ in train)
    base = len(noto["base"])
    seen = base + len(noto["toned"])
    combinations = seen + len(noto["combinations"])
    splits = {
        "train": (TRAIN, 0, len(train)),
        "twemoji": (TRAIN, 0, twemoji),
        "openmoji": (TRAIN, twemoji, len(train)),
        "base": (NOTO, 0, base),
        "seen": (NOTO, 0, seen),
        "combinations": (NOTO, seen, combinations),
        "concepts": (NOTO, combinations, len(tested)),
        "all": (NOTO, 0, len(tested)),
    }
    manifest = {
        "name": "emoji",
        "format_version": FORMAT_VERSION,
        "splits": {
            name: {"file": file, "start": start, "stop": stop, "count": stop - start}
            for name, (file, start, stop) in splits.items()
        },
        "pictures": {style: len(found) for style, found in files.items()},
        "dropped": drops,
        "labels": len({concept.label for concept, _, _ in tested if concept.label}),
        "vocab_size": tokenizer.vocab_size,
        "licences": {style: f"{licence}, {credit}" for style, (_, licence, credit) in emoji_art.DESIGNERS.items()},
        "attribution": emoji_art.ATTRIBUTION,
        "packages": {package: importlib.metadata.version(package) for package in emoji_art.PACKAGES},
        "files": {
            name: {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)}
            for name in (TRAIN, NOTO, TOKENIZER)
        },
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return manifest


def _mixed(files: dict[str, Path]) -> list[tuple[str, Path]]:
    """In a fixed order that mixes all kinds: the first pictures of a split are then a fair sample of it."""
    return sorted(files.items(), key=lambda item: hashlib.sha256(f"order:{item[0]}".encode()).digest())


def _write(path: Path, items: Iterable[_Item], bar: tqdm.tqdm) -> None:
    def packed() -> Iterator[bytes]:
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:  # rasterising releases the GIL
            for data in pool.map(_pack, items):
                bar.update()
                yield data

    records.write(path, packed())


def _pack(item: _Item) -> bytes:
    concept, style, path = item
    data = emoji_art.read_png(path)
    with PIL.Image.open(io.BytesIO(data)) as image:
        width, height = image.size
    record = Record(f"{style}/{concept.key}", data, (concept.name,), concept.label, style)
    return records.pack(record, width=width, height=height)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sweep(folder: Path) -> None:
    """Removes what preparations that were killed more than an hour ago left beside `folder`."""
    for left in folder.parent.glob(f".{folder.name}-*"):
        with contextlib.suppress(FileNotFoundError):  # another process sweeps too
            if time.time() - left.stat().st_mtime > 3600:
                shutil.rmtree(left, ignore_errors=True)


def _replace(temporary: Path, folder: Path) -> None:
    """Moves `temporary` to `folder`, in the place of what is there."""
    temporary.chmod(0o755)  # temporary folders are their owner's alone; a cache may be shared
    if folder.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        with contextlib.suppress(FileNotFoundError):
            os.replace(folder, old)
        shutil.rmtree(old, ignore_errors=True)
    try:
        os.replace(temporary, folder)
    except OSError:  # another process was quicker in that moment; what it made is the same
        verify(folder)
