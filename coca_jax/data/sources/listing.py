"""The files under a folder: images, texts and others, without those that systems and editors hide there."""

from __future__ import annotations

import dataclasses
import functools
import os
import posixpath
import re
import unicodedata
from collections.abc import Collection, Sequence

from absl import logging

from coca_jax.data.records import DataError
from coca_jax.data.sources import files
from coca_jax.data.sources.base import IMAGE_EXTENSIONS, one_line

# Beside names that begin with a dot, and folders that begin with two underscores (as Hugging Face's datasets has it).
_HIDDEN = frozenset(
    ("@eadir", "@recycle", "#recycle", "$recycle.bin", "system volume information", "lost+found", "thumbs.db")
)
_IMAGE_ENDS = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)


def count_text(count: int, one: str, examples: Collection[str] = (), many: str = "") -> str:
    """`3 images (a.jpg, b.jpg, ...)`."""
    few = [shown(example) for example in list(examples)[:3]]
    named = f" ({', '.join([*few, '...'] if count > len(few) else few)})" if few else ""
    return f"{count:,} {one if count == 1 else many or one + 's'}{named}"


def shown(name: str) -> str:
    """A file's name as it is printed: without control characters, and of a long one the end."""
    plain = "".join(char if char.isprintable() else "?" for char in name)
    return plain if len(plain) <= 80 else f"...{plain[-77:]}"


def is_image(path: str) -> bool:
    """Whether a file is an image by its ending."""
    return path.lower().endswith(_IMAGE_ENDS)


def _leaves(path: str) -> bool:
    return path.startswith(("/", "~")) or "://" in path or ".." in path.split("/")


def is_hidden(path: str) -> bool:
    """Whether a file, or a folder that it lies in, is one that systems and editors hide in a folder of data."""
    *folders, name = path.split("/")
    return _hidden(name, False) or any(_hidden(folder, True) for folder in folders)


def _hidden(name: str, folder: bool) -> bool:
    return name.startswith(".") or name.lower() in _HIDDEN or (folder and name.startswith("__"))


@dataclasses.dataclass(frozen=True)
class Tree:
    """The files under a folder.

    Attributes:
      root: the folder.
      sizes: bytes of each regular file, by its path relative to the folder, sorted.
      special: paths of pipes, devices, sockets and broken links.
      notes: what was passed over.
      listed: whether all files are known; else every name is taken for that of a file.
    """

    root: str
    sizes: dict[str, int]
    special: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()
    listed: bool = True

    @functools.cached_property
    def images(self) -> dict[str, int]:
        """Sizes of those that are images by their endings."""
        return {path: size for path, size in self.sizes.items() if is_image(path)}

    def under(self, folder: str) -> Tree:
        """The part of it under a folder in it."""
        start = f"{folder}/"
        sizes = {path.removeprefix(start): size for path, size in self.sizes.items() if path.startswith(start)}
        special = frozenset(path.removeprefix(start) for path in self.special if path.startswith(start))
        return Tree(f"{self.root.rstrip('/')}/{folder}", sizes, special)

    @functools.cached_property
    def _by_end(self) -> dict[str, str | None]:
        """Paths by name and by name without ending, in lower case; None where several have it."""
        found: dict[str, str | None] = {}
        for path in self.images:
            name = unicodedata.normalize("NFC", posixpath.basename(path).lower())
            for end in (name, posixpath.splitext(name)[0]):
                found[end] = path if found.get(end, path) == path else None
        return found

    def find(self, name: str, folder: str = "") -> str:
        """The path of the file that data call `name`; empty where there is none.

        It is looked for from `folder` on, then from the root, then by its last part where one image alone has that,
        in any case and form of Unicode, with or without its ending. `\\` may stand for `/`, and `name#2` for `name`
        (Flickr8k). A path from the root of the disk must lead into the folder, or its last part be that of an image
        in it.
        """
        if (path := f"{folder}/{name}" if folder else name) in self.sizes:
            return path
        for written in dict.fromkeys((name, re.sub(r"#\d+$", "", name))):
            for plain in dict.fromkeys((written, written.replace("\\", "/"))):
                if found := self._find(plain, folder):
                    return found
        path = posixpath.join(folder, name)
        return "" if self.listed or not is_image(name) or _leaves(path) else path

    def _find(self, name: str, folder: str) -> str:
        if not name or "://" in name or "\0" in name or name.startswith("~"):
            return ""
        if name.startswith("/") or re.match(r"[A-Za-z]:/", name):
            top = "" if files.is_remote(self.root) else os.path.abspath(self.root).rstrip("/") + "/"
            candidates = [name.removeprefix(top)] if top and name.startswith(top) else []
        else:
            candidates = [posixpath.normpath(posixpath.join(folder, name)), posixpath.normpath(name)]
        for path in candidates:
            if path in self.sizes or path in self.special:
                return path
        parts = name.split("/")
        if ".." in parts and not name.startswith(".."):
            return ""
        return self._by_end.get(unicodedata.normalize("NFC", parts[-1].lower())) or ""


def walk(root: str, where: str) -> Tree:
    """All files under a folder on a disk or in a bucket; links to folders are not followed, which is logged.

    Raises:
      DataError: the folder cannot be listed.
    """
    if files.is_remote(root):
        return _stored(root)
    sizes: dict[str, int] = {}
    special: list[str] = []
    hidden: list[str] = []
    closed: list[str] = []
    folders = [""]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(os.path.join(root, folder)) as entries:
                found = list(entries)
        except OSError as error:
            if not folder:
                raise DataError(f"{where}: {root} cannot be listed: {one_line(error)}") from error
            closed.append(f"{folder}: {error.strerror}")
            continue
        for entry in found:
            path = f"{folder}/{entry.name}" if folder else entry.name
            try:
                is_folder = entry.is_dir(follow_symlinks=False)
                if _hidden(entry.name, is_folder):
                    if is_folder or is_image(path):
                        hidden.append(path)
                elif is_folder:
                    folders.append(path)
                elif entry.is_dir():  # it may leave the folder, or lead back to where it is
                    text = "%s is a link to a folder, which is not followed: move or mount the pictures there"
                    logging.warning(text, entry.path)
                elif entry.is_file():
                    sizes[path] = entry.stat().st_size
                else:
                    special.append(path)
            except OSError:
                special.append(path)
    notes = [
        (hidden, "hidden file or folder", "hidden files or folders", "passed over"),
        (special, "pipe, device, socket or broken link", "pipes, devices, sockets or broken links", "not read"),
        (closed, "folder that cannot be listed", "folders that cannot be listed", "not read"),
    ]
    said = tuple(f"{count_text(len(what), one, sorted(what), many)}: {how}" for what, one, many, how in notes if what)
    return Tree(root, dict(sorted(sizes.items())), frozenset(special), said)


def _stored(root: str) -> Tree:
    files.forget_listings(root)
    system, top = files.store(root)
    try:
        listed = system.find(top, detail=True)
    except OSError as error:
        raise DataError(f"{root} cannot be listed: {one_line(error)}") from error
    sizes = {path.removeprefix(top).lstrip("/"): int(info["size"]) for path, info in listed.items()}
    kept = {path: sizes[path] for path in sorted(sizes) if not is_hidden(path)}
    hidden = [path for path in sizes if path not in kept and is_image(path)]
    notes = (f"{count_text(len(hidden), 'hidden file', hidden)}: passed over",) if hidden else ()
    return Tree(root, kept, notes=notes)


def folders_of(paths: Sequence[str] | Collection[str]) -> list[str]:
    """The first folders on the paths, in the order of the paths."""
    return list(dict.fromkeys(path.partition("/")[0] for path in paths if "/" in path))
