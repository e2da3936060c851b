"""Images that no file of captions lists: they have texts beside them, or lie in a folder for each class."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence

from coca_jax.data import label_names
from coca_jax.data.records import BadExample, DataError
from coca_jax.data.sources import tables
from coca_jax.data.sources.base import Spec, digest
from coca_jax.data.sources.entries import CAPTION_FILES, SIDECARS, Entry, Layout
from coca_jax.data.sources.listing import Tree, count_text, folders_of, is_image, shown

_LOOKED = 20  # texts, evenly over all
# Names of folders that say what kind of file lies in them, and nothing of what the images show. With one of the first
# no folder is a class; the others may be names of classes.
_FILES = frozenset(("image", "images", "img", "imgs", "jpg", "jpgs", "jpeg", "jpegs", "png", "pngs", "jpegimages"))
_PARTS = frozenset(
    (
        *("masks", "mask", "labels", "label", "annotations", "segmentation", "segmentations", "gt", "edges", "depth"),
        *("input", "inputs", "output", "outputs", "target", "targets", "source", "sources", "hr", "lr", "data"),
        *("pictures", "photos", "pics", "thumbnails", "thumbs", "originals", "original", "raw"),
    )
)


def worded(captions: Iterable[str]) -> bool:
    """Whether a text is one that describes: not a number, a file's name, or the numbers of an object in the image."""
    return any(map(_is_worded, captions))


def _is_worded(text: str) -> bool:
    words = re.findall(r"[^\s,;]+", text)
    numbers = sum(re.fullmatch(r"[-+]?[\d.]*\d[\d.]*(?:e[-+]?\d+)?", word) is not None for word in words)
    if numbers >= 4 and 3 * numbers > 2 * len(words):  # a class or a word and its box: YOLO, KITTI, DOTA, ICDAR
        return False
    return bool(label_names.name_of(text)) and (" " in text or not is_image(re.sub(r"#\d+$", "", text)))


def find_sidecars(tree: Tree) -> dict[str, str]:
    """The text beside each image that has one: `a.txt` or `a.jpg.txt` beside `a.jpg`, the ending in any case."""
    texts = [path for path in tree.sizes if path.lower().endswith(SIDECARS)]
    names = {stem + end.lower(): path for path in texts if not path.endswith(SIDECARS) for stem, end in [_cut(path)]}
    names |= {path: path for path in texts if path.endswith(SIDECARS)}
    found = {}
    for path in tree.images if names else ():
        for beside in (name + end for name in _stems(path) for end in SIDECARS):
            if beside in names:
                found[path] = names[beside]
                break
    return found


def of_sidecars(spec: Spec, tree: Tree, beside: Mapping[str, str]) -> Layout:
    """The images that have a text beside them.

    Raises:
      DataError: the first of the texts have no words.
    """
    first = list(beside.values())[:: -(-len(beside) // _LOOKED)]
    if not any(_describes(tree, text, spec.text) for text in first):
        raise DataError(
            f"{spec.text}: the texts beside the images of {tree.root} hold no words, e.g. {first[0]}: are they "
            "annotations of objects? Write a caption into each, or a captions.csv"
        )
    tops = folders_of(beside)
    named = len(tops) > 1 and all("/" in path for path in beside) and all(map(label_names.name_of, tops))
    entries = [Entry(path, 0, [], path.partition("/")[0] if named else "", texts=text) for path, text in beside.items()]
    notes = [f"captions are read from the texts beside the images, e.g. {first[0]}"]
    if without := [path for path in tree.images if path not in beside]:
        one, many = "image without a text beside it", "images without a text beside them"
        notes.append(f"{count_text(len(without), one, without, many)}: not read")
    used = set(beside.values()) | {stem + end for path in beside for stem in _stems(path) for end in SIDECARS}
    if other := [path for path in tree.sizes if path.lower().endswith(SIDECARS) and path not in used]:
        one, many = "text without an image", "texts without an image"
        notes.append(f"{count_text(len(other), one, other, many)}: not read")
    sizes = (f"{path} {tree.sizes[path]} {text} {tree.sizes[text]}" for path, text in beside.items())
    return Layout(tree.root, entries, tuple(notes), digest(["texts", len(entries), *sizes]))


def _cut(path: str) -> tuple[str, str]:
    stem, _, end = path.rpartition(".")
    return stem, f".{end}"


def _stems(path: str) -> tuple[str, str]:
    return path.rpartition(".")[0], path


def _describes(tree: Tree, text: str, where: str) -> bool:
    try:
        return worded(tables.read_sidecar(tree.root, text, where))
    except BadExample:
        return False


def of_classes(spec: Spec, tree: Tree, tops: Sequence[str], beside: Mapping[str, str]) -> Layout:
    """All images: the first folder on the path of each is its class.

    Args:
      spec: as it was written.
      tree: the folder.
      tops: the first folders on the paths of images.
      beside: texts beside some of the images, which are not read.

    Raises:
      DataError: the folders are no classes.
    """
    outside = [path for path in tree.images if "/" not in path]
    if problem := _no_classes(spec, tree, tops, outside):
        raise DataError(f"{spec.text}: the pictures in {tree.root} {problem}; {found_text(tree)}")
    notes = [f"each folder is a class: {count_text(len(tops), 'class', tops, 'classes')}"]
    if outside:
        one, many = "image beside the folders", "images beside the folders"
        notes.append(f"{count_text(len(outside), one, outside, many)}: no class")
    if bad := [] if spec.get("classes") else [top for top in tops if not label_names.name_of(top)]:
        one, many = "folder whose name is no word", "folders whose names are no words"
        notes.append(f"{count_text(len(bad), one, bad, many)}: no captions; name them by ?classes=FILE")
    if beside:
        one, many = "text beside an image", "texts beside images"
        notes.append(f"{count_text(len(beside), one, list(beside.values()), many)}: not read")
    used = set(beside.values())
    if others := [path for path in tree.sizes if path.lower().endswith(tables.ENDINGS) and path not in used]:
        one, many = "other file of text or data", "other files of text or data"
        notes.append(f"{count_text(len(others), one, others, many)}: not read")
    entries = [Entry(path, 0, [], path.partition("/")[0] if "/" in path else "") for path in tree.images]
    parts = (f"{path} {size}" for path, size in tree.images.items())
    return Layout(tree.root, entries, tuple(notes), digest(["folder", len(entries), *parts]), tuple(tops))


def _no_classes(spec: Spec, tree: Tree, tops: Sequence[str], outside: Sequence[str]) -> str:
    """Why the folders are no classes, and what to write instead; empty where they are."""
    write = "write a captions.csv, or name one by ?captions=FILE"
    if not tops:
        names = ", ".join(CAPTION_FILES[:4])
        return f"have neither captions ({names}, or a text beside each) nor a folder for each class: {write}"
    if 2 * len(outside) > len(tree.images):
        return f"lie beside folders, and not in a folder for each class: {write}"
    if spec.get("classes"):
        return ""
    if len(tops) == 1:
        all_in = posixpath.commonpath([posixpath.dirname(path) for path in tree.images if "/" in path])
        return (
            f"lie in one folder, {tops[0]!r}, which is no class without another: {write}; or open "
            f"folder:{tree.root.rstrip('/')}/{all_in}"
        )
    kinds = [re.sub(r"[\W\d_]+", "", top).lower() for top in tops]
    if 2 * sum(kind in _FILES for kind in kinds) >= len(tops) or all(kind in _FILES | _PARTS for kind in kinds):
        return f"lie in folders that are named for files and not for what they show, e.g. {shown(tops[0])!r}: {write}"
    if not any(map(label_names.name_of, tops)):
        known = "imagenet" if label_names.is_wordnet(tops[0]) else "FILE"
        fix = f"if they are classes name them by ?classes={known}; else {write}"
        return f"lie in folders whose names are no words, e.g. {tops[0]!r}: {fix}"
    direct = {path.partition("/")[0] for path in tree.images if path.count("/") == 1}
    if unclear := [top for top in tops if top not in direct]:
        below = shown(next(path for path in tree.images if path.startswith(f"{unclear[0]}/")))
        return (
            f"lie in folders within folders, e.g. {below!r}: which is the class? Keep one level of folders, or {write}"
        )
    return ""


def other_files(tree: Tree) -> tuple[str, ...]:
    """A line on the files that are neither images nor texts: what looks like an image may be among them."""
    ends = (*tables.ENDINGS, *SIDECARS)
    others = [path for path in tree.sizes if path not in tree.images and not path.lower().endswith(ends)]
    one, many = "file that is no image or text by its ending", "files that are no images or texts by their endings"
    return (f"{count_text(len(others), one, others, many)}: not read",) if others else ()


def found_text(tree: Tree) -> str:
    """What a folder holds, for who must say what it is."""
    texts = [path for path in tree.sizes if path.lower().endswith((*tables.ENDINGS, *SIDECARS))]
    folders = sorted({posixpath.dirname(path) for path in tree.sizes} - {""})
    images, notes = list(tree.images), (*other_files(tree), *tree.notes)
    return (
        f"found {count_text(len(images), 'image', images)}, {count_text(len(folders), 'folder', folders)}, "
        + "; ".join([count_text(len(texts), "file of text or data", texts, "files of text or data"), *notes])
    )
