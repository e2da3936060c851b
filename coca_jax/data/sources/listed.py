"""Images that a file of captions lists: finding that file, and what its rows make."""

from __future__ import annotations

import dataclasses
import os
import posixpath
import re
from collections.abc import Sequence

from coca_jax.data.records import BadExample, DataError
from coca_jax.data.sources import files, tables
from coca_jax.data.sources.base import Spec, digest
from coca_jax.data.sources.entries import CAPTION_FILES, Entry, Layout
from coca_jax.data.sources.listing import Tree, count_text, folders_of
from coca_jax.data.sources.unlisted import find_sidecars, found_text, worded

_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
# Words that may stand beside a split in the name of its folder (`train_images`, `TestSet`); so may a letter (`trainA`).
_BESIDE = frozenset(
    ("set", "sets", "data", "dataset", "split", "subset", "image", "images", "img", "imgs", "pictures", "photos", "seg")
)
_CANDIDATES = 100  # files that may hold captions, of which the heads are looked at


def split_of(name: str, *, file: bool = False) -> str:
    """train, validation or test, by the name of a folder (`Train`, `val2017`, `test_images`); empty where it is none.

    Args:
      name: of a folder, or a word for a split.
      file: it is a file's without its ending, where any words may stand beside the split (`captions_train2014`).
    """
    words = [word.lower() for word in re.findall(r"[A-Z]?[^\W\d_A-Z]+|[^\W\d_a-z]+(?![a-z])", name)]
    found = [_SPLITS[word] for word in words if word in _SPLITS]
    if len(found) != 1 or not (file or all(word in _BESIDE or word in _SPLITS or len(word) == 1 for word in words)):
        return ""
    return found[0]


def without_split(spec: Spec) -> Spec:
    """The specification of a part that the split has chosen."""
    return dataclasses.replace(spec, options={name: v for name, v in spec.options.items() if name != "split"})


def find_tables(spec: Spec, where: Tree, images: Tree) -> list[str]:
    """Paths of files of captions in a folder.

    Those are one with a usual name at the top, all with such names below (Hugging Face's metadata files), or those
    whose rows name images that are there.

    Args:
      spec: names columns.
      where: the folder.
      images: what the files' images are looked for in.
    """
    beside = set(find_sidecars(where).values())
    usual = [path for path in where.sizes if posixpath.basename(path) in CAPTION_FILES and path not in beside]
    usual = [path for path in usual if not path.endswith((".txt", ".json")) or _is_table(spec, where, path, images)]
    for name in CAPTION_FILES:
        if name in usual:
            return [name]
    if usual:
        return usual
    ends = tuple(ending for ending in tables.ENDINGS if ending != ".parquet")
    maybe = [path for path in where.sizes if path.lower().endswith(ends) and path not in beside]
    maybe.sort(key=lambda path: (path.count("/"), path))
    found = [path for path in maybe[:_CANDIDATES] if _is_table(spec, where, path, images)]
    found = [path for path in found if path.count("/") == found[0].count("/")]
    return [path for path in found if "lemma" not in path.lower()] or found  # Flickr8k.lemma.token.txt


def choose_table(spec: Spec, where: Tree, images: Tree) -> tuple[Spec, list[str]]:
    """The files of captions that are read, and the specification that is left for their rows.

    Raises:
      DataError: there are several, and they are no splits.
    """
    found = find_tables(spec, where, images)
    if len(found) < 2 or all(posixpath.basename(path) in CAPTION_FILES for path in found):
        return spec, found
    splits = {path: split_of(posixpath.splitext(posixpath.basename(path))[0], file=True) for path in found}
    if all(splits.values()):
        wanted = [split_of(name) for name in spec.fields("split") or ("train",)]
        if chosen := [path for path in found if splits[path] in wanted]:
            return without_split(spec), chosen
    raise DataError(
        f"{spec.text}: {count_text(len(found), 'file', found)} of {where.root} name its images and have texts: say "
        f"which, ?captions={found[0]}"
    )


def _is_table(spec: Spec, where: Tree, path: str, images: Tree) -> bool:
    """Whether half of a file's first rows name images that are there and have a text or a label."""
    folder = posixpath.dirname(path)
    try:
        file = f"{where.root.rstrip('/')}/{path}"
        rows = tables.read_table(spec, file, lambda name: bool(images.find(name, folder)), 200).rows
    except (DataError, BadExample, OSError):
        return False
    good = [r for r in rows if r.images and images.find(r.images[0], folder) and (worded(r.captions) or r.label)]
    return bool(rows) and 2 * len(good) >= len(rows)


def of_tables(spec: Spec, tree: Tree, paths: Sequence[str]) -> Layout:
    """The rows of files of captions, in their order.

    Args:
      spec: `split` chooses rows by a column of that name.
      tree: where the images are.
      paths: of the files; images are looked for from the folder of each on.

    Raises:
      DataError: a file cannot be read, none of its images is there, or one leaves the folder.
    """
    reader = _Reader(spec, tree)
    for path in paths:
        reader.read(path)
    return reader.layout(paths)


class _Reader:
    """Makes entries of rows."""

    def __init__(self, spec: Spec, tree: Tree):
        self._spec, self._tree = spec, tree
        self._wanted = [split_of(name) or name for name in spec.fields("split")]
        self._entries: dict[object, Entry] = {}
        self._missing: list[str] = []
        self._notes: list[str] = []
        self._splits: set[str] = set()
        self._size = 0

    def read(self, path: str) -> None:
        """Adds the rows of a file."""
        top, folder = self._tree.root.rstrip("/") + "/", posixpath.dirname(path)
        folder = folder.removeprefix(top) if folder.startswith(top) else ""
        table = tables.read_table(self._spec, path, lambda name: bool(self._tree.find(name, folder)))
        self._notes += [f"{posixpath.basename(path)}: {note}" for note in table.notes]
        self._size += files.look(path).size
        tops = folders_of(self._tree.images)
        # `train/a.jpg` and `test/b.jpg` of one file that does not speak of splits.
        by_folder = len(tops) > 1 and all(map(split_of, tops)) and not any(row.split for row in table.rows)
        for row in table.rows:
            if by_folder and row.images:
                row = row._replace(split=self._tree.find(row.images[0], folder).rpartition("/")[0].partition("/")[0])
            self._splits.add(row.split)
            if not self._wanted or (split_of(row.split) or row.split) in self._wanted:
                self._add(row, path, folder)

    def _add(self, row: tables.Row, path: str, folder: str) -> None:
        """Puts a row among the entries: several with one image are one entry with several captions."""
        problem, names = row.problem, list[str]()
        for name in row.images:
            try:
                name.isascii() or os.fsencode(name)
            except UnicodeEncodeError:  # half of a surrogate pair, which JSON can hold
                problem = ("unreadable", f"{name[:40]!r} cannot be a file's name")
                break
            names.append(self._tree.find(name, folder) or self._elsewhere(name, folder, f"{path} line {row.line}"))
        if problem:
            self._entries[path, row.line] = Entry("", row.line, [], problem=problem, table=path)
            return
        image, *frames = names
        # Each question has an answer of its own.
        key = (path, row.line) if self._spec.get("question") else (image, *frames)
        entry = self._entries.setdefault(key, Entry(image, row.line, [], frames=tuple(frames), table=path))
        entry.captions += row.captions
        entry.label = entry.label or row.label

    def _elsewhere(self, name: str, folder: str, where: str) -> str:
        """The path of an image that is not among those that were listed: a link, or missing."""
        path = posixpath.join(folder, name)
        files.inside(self._tree.root, path, where, links=False)  # links at reading: there may be millions
        if not self._tree.listed:
            return path
        if files.is_remote(self._tree.root) or not os.path.lexists(f"{self._tree.root}/{path}"):
            self._missing.append(path)
        return path

    def layout(self, paths: Sequence[str]) -> Layout:
        spec, tree, entries = self._spec, self._tree, list(self._entries.values())
        splits = ", ".join(sorted(self._splits - {""})) or "no column split, and no folders train, test and so on"
        if self._wanted and not entries:
            raise DataError(f"{spec.text}: no split {spec.get('split')!r} in {paths[0]}; there are {splits}")
        missing = set(self._missing)
        if missing and all(entry.path in missing or not entry.path for entry in entries):
            raise DataError(
                f"{spec.text}: none of the images that {paths[0]} names is in {tree.root}, e.g. "
                f"{self._missing[0][:200]!r}; {found_text(tree)}; name their folder by ?root=FOLDER"
            )
        notes = [f"captions are read from {count_text(len(paths), 'file', paths)}", *self._notes]
        if self._splits - {""} and not self._wanted:
            notes.append(f"all splits are read ({splits}): ?split=NAME chooses")
        if missing:
            one, many = "row names an image that is not there", "rows name images that are not there"
            notes.append(count_text(len(self._missing), one, self._missing, many))
        read = {path for entry in entries for path in (entry.path, *entry.frames)}
        if unnamed := [path for path in tree.images if path not in read]:
            one, many = "image that no row names", "images that no row names"
            notes.append(f"{count_text(len(unnamed), one, unnamed, many)}: not read")
        parts = (repr((e.path, e.captions, e.label, *([e.frames] if e.frames else []))) for e in entries)
        return Layout(tree.root, entries, tuple(notes), digest(["folder", self._size, len(entries), *parts]))
