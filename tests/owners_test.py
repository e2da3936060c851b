"""Files of users and groups that the system cannot name, and a user without a name and a home: as in containers."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
import textwrap
from typing import Any

import pytest
from etils import epath

from coca_jax import checkpoint as program
from coca_jax.data import addresses
from coca_jax.data.prepare import convert as prepare
from coca_jax.train.checkpoint import Checkpoints
from coca_jax.train.metrics import Writer, read_lines
from tests import pairs
from tests.train.verified_test import KEEP, at, fresh, restore, save  # noqa: F401  (a fixture)

UNKNOWN = 54321
AS_UNKNOWN = ("setpriv", f"--reuid={UNKNOWN}", f"--regid={UNKNOWN}", "--clear-groups")

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="NOT RUN: only root can give files to an unknown user")


def give_away(folder: pathlib.Path) -> None:
    for path in (folder, *folder.rglob("*")):
        os.chown(path, UNKNOWN, UNKNOWN)


def test_a_run_in_a_folder_of_an_unknown_group_saves_and_goes_on(tmp_path: pathlib.Path, fresh: Any) -> None:  # noqa: F811
    os.chown(tmp_path, -1, UNKNOWN)
    tmp_path.chmod(0o2775)  # what is made in it is of that group too
    workdir = tmp_path / "run"
    for step in (1, 2):
        with Checkpoints(workdir, KEEP) as checkpoints:
            save(checkpoints, at(fresh, step))
        writer = Writer(addresses.path(workdir), step - 1)
        writer.write(step, {"loss": 1.0})
        writer.close()
    assert (workdir / "checkpoints" / "2" / "manifest.json").stat().st_gid == UNKNOWN
    found = restore(workdir, fresh)
    assert found and int(found[0].step) == 2
    assert [line["step"] for line in read_lines(addresses.path(workdir) / "metrics.jsonl")] == [1, 2]


def test_what_unknown_people_wrote_is_listed_verified_and_loaded(
    tmp_path: pathlib.Path,
    fresh: Any,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Checkpoints(tmp_path / "run", KEEP) as checkpoints:
        save(checkpoints, at(fresh, 1))
    give_away(tmp_path)
    for verify, said in ((False, "has a manifest"), (True, "verified")):
        assert program._folder(str(tmp_path / "run"), verify=verify) == 0
        assert said in capsys.readouterr().out
    assert restore(tmp_path / "run", fresh)
    # How Orbax tells the age of a step that says nothing of it.
    assert epath.Path(addresses.path(tmp_path / "run")).stat().mtime > 0


def test_prepared_data_of_unknown_people_is_verified(tmp_path: pathlib.Path) -> None:
    for color, shape in pairs.examples()[:6]:
        (tmp_path / "images" / color).mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / color / f"{shape}.png").write_bytes(pairs.png(pairs.picture(color, shape)))
    give_away(tmp_path)
    made = prepare.convert(f"folder:{tmp_path}/images", tmp_path / "out", workers=1)
    give_away(tmp_path)
    assert prepare.convert(f"folder:{tmp_path}/images", tmp_path / "out", workers=1) == made


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="NOT RUN: there is no setpriv, of util-linux")
def test_a_user_without_a_name_and_a_home_works(tmp_path: pathlib.Path, fresh: Any) -> None:  # noqa: F811
    with Checkpoints(tmp_path / "run", KEEP) as checkpoints:
        save(checkpoints, at(fresh, 1))
    give_away(tmp_path)
    code = f"""
        import os, pwd, sys
        from coca_jax import cache, compiler
        assert os.getuid() == {UNKNOWN}
        compiler.setup()
        assert os.path.isdir(os.environ["JAX_COMPILATION_CACHE_DIR"])
        assert cache.folder() == cache.folder()
        print(cache.folder())
        sys.argv = ["checkpoint", "verify", {str(tmp_path / "run")!r}]
        from coca_jax import checkpoint
        checkpoint.cli()
        """
    without = ("HOME", "USER", "LOGNAME", "XDG_CACHE_HOME", "COCA_JAX_CACHE", "JAX_COMPILATION_CACHE_DIR")
    env = {name: value for name, value in os.environ.items() if name not in without}
    root = pathlib.Path(program.__file__).parent.parent
    for folder in (tmp_path, *tmp_path.parents):  # pytest's are its user's alone
        if not folder.stat().st_mode & 0o001:
            folder.chmod(folder.stat().st_mode | 0o055)
    done = subprocess.run(
        [*AS_UNKNOWN, sys.executable, "-c", textwrap.dedent(code)],
        env=env | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    if done.returncode in (126, 127):  # the interpreter, or its library, lies in a folder that is its owner's alone
        pytest.skip(f"NOT RUN: another user cannot start {sys.executable}")
    assert done.returncode == 0, done.stderr
    kept, verified = done.stdout.splitlines()
    assert verified.endswith("verified") and "Traceback" not in done.stderr
    assert not os.path.exists(kept)  # one of the process's own, gone with it
