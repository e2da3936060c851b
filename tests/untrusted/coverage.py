"""Damaged files made by what parts of the code they reach.

    python -m tests.untrusted.coverage TARGET [--folder=FOLDER] [libFuzzer's options]

Needs Atheris, `pip install "coca_jax[fuzz]"`. Begins with the sound files of tests/untrusted/seeds.py in a folder of
its own and goes on until `-max_total_time=SECONDS`, `-runs=N`, or a fault: the file is then FOLDER/fault-*. Only Python
code is watched, not libraries in C.
"""

from __future__ import annotations

import os
import pathlib
import sys
import tempfile
from collections.abc import Callable

import atheris

with atheris.instrument_imports(include=["coca_jax.data", "coca_jax.interop", "coca_jax.config"]):
    from tests.untrusted import guard, seeds, targets

# Sound files of a target.
CORPORA: dict[str, Callable[[], list[bytes]]] = {
    **{"images": seeds.images, "tar": seeds.tar_files, "array_record": seeds.array_records, "parquet": seeds.parquet},
    **{"tfrecord": seeds.tfrecords, "captions": seeds.caption_files},
    "tar_index": lambda: [targets._tar_index()],
    "sentencepiece": lambda: [seeds.tokenizer().to_bytes()],
    "merges": lambda: [seeds.gzipped(seeds.merges())],
    "exported_json": lambda: [targets._exported()["coca_jax.json"]],
    "exported_weights": lambda: [targets._exported()["model.safetensors"]],
    "open_clip_json": lambda: [targets._open_clip()["open_clip_config.json"]],
    "open_clip_weights": lambda: [targets._open_clip()["open_clip_model.safetensors"]],
    "vision_weights": targets._vision,
}


def main(arguments: list[str]) -> None:
    names = [a for a in arguments if not a.startswith("-")]
    if len(names) != 1 or names[0] not in CORPORA:
        sys.exit(f"error: name one of {', '.join(CORPORA)}")
    given = next((a.removeprefix("--folder=") for a in arguments if a.startswith("--folder=")), "")
    folder = pathlib.Path(given or tempfile.mkdtemp()).resolve()
    for name in ("corpus", "work", "cache"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    os.environ["COCA_JAX_CACHE"] = tempfile.tempdir = str(folder / "cache")
    for number, data in enumerate(CORPORA[names[0]]()):
        (folder / "corpus" / f"seed-{number}").write_bytes(data)
    read = targets.TARGETS[names[0]].read
    watch = guard.Guard(os.fspath(folder))
    sys.addaudithook(watch)

    def one(data: bytes) -> None:
        with tempfile.TemporaryDirectory(dir=folder / "work") as own:
            watch.active = True
            try:
                read(data, pathlib.Path(own))
            finally:
                watch.active = False

    # libFuzzer reads a folder of files, and writes what reaches something new into it.
    options = [a for a in arguments if a.startswith("-") and not a.startswith("--folder=")]
    atheris.Setup(
        [sys.argv[0], *options, f"-artifact_prefix={folder}/fault-", "-timeout=60", str(folder / "corpus")], one
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1:])
