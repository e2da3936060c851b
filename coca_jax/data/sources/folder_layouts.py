"""What a folder of images holds: a file of captions, texts beside the images, or a folder for each class."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping

from coca_jax.data.records import DataError
from coca_jax.data.sources import files
from coca_jax.data.sources.base import READ_EXTENSIONS, Spec, digest
from coca_jax.data.sources.entries import CAPTION_FILES, Entry, Layout
from coca_jax.data.sources.listed import choose_table, find_tables, of_tables, split_of, without_split
from coca_jax.data.sources.listing import Tree, count_text, folders_of, walk
from coca_jax.data.sources.unlisted import find_sidecars, found_text, of_classes, of_sidecars, other_files


def find_layout(spec: Spec) -> Layout:
    """Looks at a folder. Raises DataError where it is none, or nothing says what its images show."""
    location = spec.location.rstrip("/") or "/"
    captions = spec.path("captions")
    if not files.is_remote(location) and os.path.isfile(location) and not captions:
        location, captions = os.path.dirname(location) or ".", os.path.basename(location)
    if not files.is_remote(location) and not os.path.isdir(location):
        raise DataError(f"{spec.text}: no folder {location}; write folder:PATH with the pictures in it")
    root = spec.path("root").rstrip("/") or location
    if not files.is_remote(root) and not os.path.isdir(root):
        raise DataError(f"{spec.text}: no folder {root}; ?root= is the folder with the pictures")
    if root == location and not captions and (known := _in_store(location)):
        return of_tables(spec, Tree(root, {}, listed=False), [known])
    tree = walk(root, spec.text)
    if not tree.images and not captions and root == location:
        raise DataError(f"{spec.text}: no {', '.join(READ_EXTENSIONS)} file in {root}; {found_text(tree)}")
    if captions:
        layout = of_tables(spec, tree, [_given(spec, location, captions)])
    elif root != location:
        where = walk(location, spec.text)
        rest, found = choose_table(spec, where, tree)
        if not found:
            raise DataError(f"{spec.text}: no file of {location} names images of {root}; write ?captions=FILE")
        layout = of_tables(rest, tree, [f"{location}/{path}" for path in found])
    elif not any(name in tree.sizes for name in CAPTION_FILES) and (splits := _split_folders(tree)):
        layout = _of_splits(spec, tree, splits)
    else:
        layout = _of_tree(spec, tree)
    return dataclasses.replace(layout, notes=(*layout.notes, *other_files(tree), *tree.notes))


def _in_store(location: str) -> str:
    """The file of captions at the top of a folder in a store, which is then not listed: that may take minutes."""
    for name in CAPTION_FILES if files.is_remote(location) else ():
        try:
            return files.look(f"{location}/{name}").path if not name.endswith((".txt", ".json")) else ""
        except OSError:
            continue
    return ""


def _given(spec: Spec, location: str, name: str) -> str:
    """The file that ?captions= names."""
    path = name if files.is_remote(name) or os.path.isabs(name) else f"{location}/{name}"
    try:
        return files.look(path).path
    except files.UnusableFile:
        raise
    except OSError:
        raise DataError(
            f"{spec.text}: no file {path}; ?captions= is a path in the folder, or an absolute one"
        ) from None


def _split_folders(tree: Tree) -> dict[str, str]:
    """Folders at the top that are splits, and which.

    They are where all folders with images have such names; or two have, one of them the training set's. One alone
    among others is a class: a train.
    """
    tops = folders_of(tree.images)
    splits = {top: split for top in tops if (split := split_of(top))}
    return splits if len(splits) == len(tops) or (len(splits) > 1 and "train" in splits.values()) else {}


def _of_splits(spec: Spec, tree: Tree, splits: Mapping[str, str]) -> Layout:
    wanted = spec.fields("split")
    chosen: list[str] = []
    for name in wanted or ("train",):
        same = [folder for folder in splits if folder.lower() == name.lower()]
        same = same or [folder for folder, split in splits.items() if name.isalpha() and split == split_of(name)]
        if not same:
            what = f"no split {name!r}" if wanted else "say which split by ?split=NAME"
            raise DataError(f"{spec.text}: {what}: in {tree.root} there are {', '.join(splits)}")
        chosen += [folder for folder in same if folder not in chosen]
    parts = [(folder, _of_split(without_split(spec), tree, folder)) for folder in chosen]
    entries = [_moved(entry, folder) for folder, layout in parts for entry in layout.entries]
    others = [folder for folder in folders_of(tree.images) if folder not in chosen]
    notes = [
        f"split {', '.join(chosen)} is read" + (f", {', '.join(others)} not: ?split=NAME chooses" if others else "")
    ]
    if outside := [path for path in tree.images if "/" not in path]:
        one, many = "image beside the splits", "images beside the splits"
        notes.append(f"{count_text(len(outside), one, outside, many)}: not read")
    notes += [f"{folder}: {note}" for folder, layout in parts for note in layout.notes]
    labels = tuple(dict.fromkeys(label for _, layout in parts for label in layout.labels))
    return Layout(
        tree.root,
        entries,
        tuple(notes),
        digest(["splits", *(f"{folder} {part.fingerprint}" for folder, part in parts)]),
        labels,
    )


def _of_split(spec: Spec, tree: Tree, folder: str) -> Layout:
    """One split: its captions may lie beside the splits, as COCO's `annotations` do."""
    part = tree.under(folder)
    try:
        return _of_tree(spec, part)
    except DataError:
        beside = {path: size for path, size in tree.sizes.items() if not path.startswith(f"{folder}/")}
        found = find_tables(spec, Tree(tree.root, beside), part)
        if len(found) != 1:
            raise
        return of_tables(spec, part, [f"{tree.root.rstrip('/')}/{found[0]}"])


def _moved(entry: Entry, folder: str) -> Entry:
    """An entry of a split's folder as one of the folder above it."""
    path, texts = (f"{folder}/{path}" if path else "" for path in (entry.path, entry.texts))
    return dataclasses.replace(entry, path=path, texts=texts, frames=tuple(f"{folder}/{f}" for f in entry.frames))


def _of_tree(spec: Spec, tree: Tree) -> Layout:
    """A folder in which no file and no root is named."""
    rest, found = choose_table(spec, tree, tree)
    if found:
        return of_tables(rest, tree, [f"{tree.root.rstrip('/')}/{path}" for path in found])
    if spec.get("split"):
        raise DataError(
            f"{spec.text}: no split {spec.get('split')!r}: {tree.root} has no folders train, test and so on"
        )
    if unused := [name for name in ("image", "caption", "question", "label") if spec.get(name)]:
        raise DataError(
            f"{spec.text}: ?{unused[0]}= names a column, and there is no {', '.join(CAPTION_FILES)} in {tree.root}; "
            "name the file by ?captions=FILE"
        )
    beside, tops = find_sidecars(tree), folders_of(tree.images)
    if beside and (2 * len(beside) >= len(tree.images) or len(tops) < 2):
        return of_sidecars(spec, tree, beside)
    return of_classes(spec, tree, tops, beside)
