"""A folder of images, with captions in a file or beside the images, or with one folder for each class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import SupportsIndex

from coca_jax.data.records import BadExample, Record
from coca_jax.data.sources import content, files, tables
from coca_jax.data.sources.base import Spec
from coca_jax.data.sources.folder_layouts import find_layout

_OPTIONS = ("captions", "root", "split", "image", "caption", "question", "label", "template", "templates", "classes")


class Folder:
    """Images under a folder. A random one costs the opening of its file, and of the text beside it.

    With a file of captions its lines are the records, in their order; several lines with one image are one record
    with several captions. In a .jsonl the image may be a list of them, the frames of a clip in order. Without, the
    records are the images that have a text beside them, in the order of their paths; or all, and the first folder on
    the path is the label. docs/data.md has the layouts.

    Args:
      spec: location is the folder, or a file of captions in it; options are `captions` (a file, relative to the folder
        unless absolute), `root` (the folder of the images, where it is another), `split` (where the folder has some;
        by default the training set), and `image`, `caption`, `label`, which name columns of the file; `question` names
        one like `caption`, and every line is then a record, whose label is the answer.

    Attributes:
      remarks: how the folder was understood, and what was found in it but is not read.
      labels: the names of folders that are classes.

    Raises:
      DataError: no such folder or file, no column with the images, an image's path that leaves the folder, or nothing
        that says what the images show.
    """

    tokenizer_path = None
    attribution = ""
    class_names: Mapping[str, Sequence[str]] | None = None

    def __init__(self, spec: Spec):
        self.name = spec.text
        self._asks = bool(spec.get("question"))
        layout = find_layout(spec)
        self._root, self._entries, self._fingerprint = layout.root, layout.entries, layout.fingerprint
        self.remarks, self.labels = layout.notes, layout.labels

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: SupportsIndex) -> Record:
        entry = self._entries[index]
        where = f"{entry.table} line {entry.line}" if entry.line else f"{self._root}: {entry.path!r}"
        if entry.problem:
            raise BadExample(entry.problem[0], f"{where}: {entry.problem[1]}")
        read = tables.read_sidecar(self._root, entry.texts, where) if entry.texts else entry.captions
        captions = tuple(caption for caption in read if caption.strip())
        if any("\udc80" <= char <= "\udcff" for text in (*captions, entry.label) for char in text):
            raise BadExample("encoding", f"{where}: the text of {entry.path!r} is not UTF-8")
        if not captions and (entry.texts or not entry.label):
            raise BadExample("no_caption", f"{where}: {entry.path!r} has no caption")
        image = files.picture(self._root, entry.path, where)
        frames = tuple(files.picture(self._root, frame, where) for frame in entry.frames)
        key = f"{entry.path}:{entry.line}" if self._asks else entry.path
        return Record(key, image, captions, entry.label, frames=frames)

    def __repr__(self) -> str:
        return f"Folder({self.name})"

    def fingerprint(self) -> str:
        """16 hexadecimal digits of names, captions and labels; without a file of captions, of names and sizes."""
        return self._fingerprint

    def contents(self) -> dict[str, str]:
        """See Source."""
        tables = dict.fromkeys(entry.table.rpartition("/")[2] for entry in self._entries if entry.table)
        names = dict.fromkeys(entry.path for entry in self._entries if entry.path)
        found = {" and ".join(tables) or content.LIST: self._fingerprint} | content.of_named(self._root, list(names))
        if beside := [entry.texts for entry in self._entries if entry.texts]:
            found |= content.of_named(self._root, beside)
        return found


def open_folder(spec: Spec) -> Folder:
    """See `open_source`."""
    spec.check(_OPTIONS, ("template",))
    return Folder(spec)
