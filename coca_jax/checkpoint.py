"""Says what checkpoints there are, and whether they are what was saved.

    python -m coca_jax.checkpoint list runs/mine
    python -m coca_jax.checkpoint verify runs/mine                 # every step
    python -m coca_jax.checkpoint verify runs/mine runs/other --step=8000

Several workdirs may be given. `verify` reads every file and every leaf, compares them with the digests that were
written when they were saved (docs/checkpoints.md), prints a line for each step and one for each thing that is wrong,
and exits with 1 where anything is. Nothing is changed. A step from before there were digests is said to be unverified.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from absl import flags

from coca_jax import commandline
from coca_jax.config import printing

COMMANDS = ("list", "verify")

_STEP = flags.DEFINE_integer("step", None, "This one alone. All if left out.", lower_bound=0)


def main(argv: list[str]) -> None:
    command, folders = argv[1] if len(argv) > 1 else "", argv[2:]
    if command not in COMMANDS:
        sys.exit(f"error: {command or 'a command'!r} is not {' or '.join(COMMANDS)}: write {COMMANDS[1]} WORKDIR")
    if not folders:
        sys.exit(f"error: name a workdir: {command} WORKDIR")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # an accelerator may belong to the run that is looked at
    commandline.quiet()
    bad = 0
    try:
        for name in folders:
            bad += _folder(name, verify=command == "verify", step=_STEP.value)
    except KeyboardInterrupt:
        sys.exit(commandline.stopped("stopped: not everything was looked at"))
    sys.exit(1 if bad else 0)


def _folder(name: str, *, verify: bool, step: int | None = None) -> int:
    """Prints what there is to say of a workdir, of one step or of all; how many things are wrong."""
    with commandline.starting():
        from coca_jax.train.checkpoint import CheckpointError, workdir_at
        from coca_jax.train.checkpoint.folder import Folder
        from coca_jax.train.checkpoint.paths import FOLDER

    try:
        path = workdir_at(name)
    except CheckpointError as error:
        print(error)
        return 1
    # A workdir, or its folder of checkpoints.
    path = path / FOLDER if (path / FOLDER).exists() else path
    try:
        steps = Folder(path, None, "")
        found = [one for one in steps.all() if step in (None, one)]
        aside = steps.aside()
    except OSError as error:
        print(f"{path}: cannot be read: {error}")
        return 1
    for moved in aside:
        print(f"{path / moved}: set aside as damaged{_reason(path / moved)}")
    if not found:
        print(f"{path}: no checkpoint{'' if step is None else f' of step {step}'}")
        return 1
    return sum(_step(path / str(one), verify) for one in found)


def _step(folder: Any, verify: bool) -> int:
    import tqdm

    from coca_jax.train.checkpoint import verify as verification
    from coca_jax.train.checkpoint.manifest import Damaged
    from coca_jax.train.checkpoint.paths import one_line

    try:
        state, size = verification.state_of(folder)
        if not verify or state != "manifest":
            said = {"manifest": "has a manifest", "unverified": "older than manifests: unverified"}
            print(f"{folder}: {size / 1e6:.1f} MB, {said.get(state, 'DAMAGED: its manifest is missing or damaged')}")
            return int(state == "damaged")
        with tqdm.tqdm(total=None, unit="B", unit_scale=True, desc=f"step {folder.name}", leave=False) as bar:
            wrong = verification.check_step(folder, bar.update)
    except (Damaged, OSError) as error:
        wrong, size = [one_line(error)], 0
    if not wrong:
        print(f"{folder}: {size / 1e6:.1f} MB, verified")
    for line in wrong:
        print(f"{folder}: DAMAGED: {line}")
    return len(wrong)


def _reason(folder: Any) -> str:
    from coca_jax.train.checkpoint.folder import REASON

    try:
        return ": " + printing.one_line((folder / REASON).read_text())
    except OSError:
        return ""


def cli() -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # the compiler's notes to itself
    commandline.run(main)


if __name__ == "__main__":
    cli()
