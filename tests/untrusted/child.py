"""A process that reads damaged files until one is a fault: python -m tests.untrusted.child FOLDER CASES TARGET...

Prints a JSON line for each target. Ends with status 1, after what Hypothesis says of the smallest such file, where
something else than an error of the project's was raised; with another where it crashed, was too slow or took too much
memory. The file that did it is then FOLDER/case. With --seed=N other files are made than every time.
"""

from __future__ import annotations

import faulthandler
import itertools
import json
import os
import pathlib
import resource
import shutil
import sys
import tempfile
import time

import hypothesis

from tests.untrusted import guard, targets

SECONDS = 60  # that one file may take
MEBIBYTES = 1536  # that reading damaged files may add to what the process needs anyway
ADDRESSES = 24 << 30  # of address space, JAX's included: what would take more fails at once


def run(name: str, folder: pathlib.Path, cases: int, seed: int | None, watch: guard.Guard) -> dict[str, object]:
    """Reads so many files made for a target."""
    target = targets.TARGETS[name]
    files = target.files()
    numbers = itertools.count()
    done = {"read": 0, "refused": 0}
    slowest = 0.0
    before = peak()

    def one(data: bytes) -> None:
        nonlocal slowest
        (folder / "case").write_bytes(data)
        own = folder / f"work-{next(numbers)}"
        own.mkdir()
        started = time.monotonic()
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        watch.active = True
        try:
            done["read" if target.read(data, own) else "refused"] += 1
        finally:
            watch.active = False
            faulthandler.cancel_dump_traceback_later()
            shutil.rmtree(own)
        slowest = max(slowest, time.monotonic() - started)
        assert not watch.seen, watch.seen
        assert not (found := guard.strays(os.fspath(folder), _KNOWN)), found
        assert not os.listdir(folder / "here"), os.listdir(folder / "here")
        assert peak() - before < MEBIBYTES, f"{peak() - before} MiB more than before"

    settings = hypothesis.settings(
        max_examples=cases,
        derandomize=seed is None,
        database=None,
        deadline=None,
        print_blob=False,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    test = settings(hypothesis.given(data=files)(one))
    if seed is not None:
        test = hypothesis.seed(seed)(test)
    started = time.monotonic()
    test()
    seconds = round(time.monotonic() - started, 1)
    return {"target": name, **done, "seconds": seconds, "slowest": round(slowest, 2), "mebibytes": peak() - before}


_KNOWN = ("case", "here", "cache")


def peak() -> int:
    """The most memory that this process has held, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (20 if sys.platform == "darwin" else 10)


def main(arguments: list[str]) -> None:
    seed = next((int(a.removeprefix("--seed=")) for a in arguments if a.startswith("--seed=")), None)
    folder, cases, *names = (a for a in arguments if not a.startswith("--"))
    faulthandler.enable()
    root = pathlib.Path(folder).resolve()
    (root / "here").mkdir(exist_ok=True)
    os.chdir(root / "here")  # what is written by a relative path is seen there
    (root / "cache").mkdir(exist_ok=True)
    os.environ["COCA_JAX_CACHE"] = tempfile.tempdir = str(root / "cache")
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
    watch = guard.Guard(os.fspath(root))
    sys.addaudithook(watch)
    for name in names or targets.TARGETS:
        print(json.dumps(run(name, root, int(cases), seed, watch)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
