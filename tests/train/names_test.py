"""Workdirs of any name: either all of a checkpoint's life works there, or the run is refused before it begins."""

from __future__ import annotations

import pathlib
import re
from typing import Any

import pytest

from coca_jax import checkpoint as program
from coca_jax import run
from coca_jax.train.checkpoint import CheckpointError, Checkpoints, rehearse
from tests.train.storage_test import MESH, recipe, whole_steps  # noqa: F401  (a fixture)
from tests.train.verified_test import KEEP, at, fresh, restore, save  # noqa: F401  (a fixture)


@pytest.mark.parametrize(
    "name",
    [
        "run[1]",
        "*",
        "?",
        "{a,b}",
        " a b ",
        "~",
        "x~",
        "#%41&;$HOME'\"",
        "new\nline\t",
        "c:d",
        "s3:",
        "\u202e\x1b[31m",
        "-a=b@c",
    ],
)
def test_a_workdir_may_have_any_name(name: str, tmp_path: pathlib.Path, fresh: Any) -> None:  # noqa: F811
    workdir = tmp_path / name
    (tmp_path / "run1").mkdir()  # which run[1] would be, as a pattern
    with Checkpoints(workdir, KEEP) as checkpoints:
        rehearse(workdir, MESH)
        save(checkpoints, at(fresh, 1))
    assert whole_steps(workdir) == [1]
    assert program._folder(str(workdir), verify=True) == 0
    found = restore(workdir, fresh)
    assert found and int(found[0].step) == 1
    assert {path.name for path in tmp_path.iterdir()} == {name, "run1"}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("back\\slash", r"has \\ in it"),
        ("gs:", "has gs:/ in it"),
        ("logs:/run", "has gs:/ in it"),
        ("caf\udce9", "not UTF-8"),
    ],
)
def test_a_name_that_the_libraries_change_is_refused_and_nothing_is_called_damaged(
    name: str,
    said: str,
    tmp_path: pathlib.Path,
    recipe: Any,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    workdir = tmp_path / name
    answer = str(run.run(recipe, str(workdir)))
    assert re.search(rf"^error: the workdir .* {said}.*use another --workdir$", answer), answer
    assert not workdir.exists()
    (workdir / "checkpoints" / "1").mkdir(parents=True)  # of a run that was renamed
    with pytest.raises(CheckpointError, match=said):
        Checkpoints(workdir)
    assert program._folder(str(workdir), verify=True) == 1
    printed = capsys.readouterr().out
    assert "the workdir" in printed and "DAMAGED" not in printed


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("x" * 256, "cannot be read .*File name too long"),
        ("y/" * 2500, "cannot be read .*File name too long"),
        ("circle", "cannot be read .*symbolic links"),
        ("circle/run", "cannot be read .*symbolic links"),
        ("nowhere", "leads through a link, .*/nowhere, to /not/there, which is not there"),
        ("nowhere/run", "leads through a link, .*/nowhere, to /not/there, which is not there"),
    ],
)
def test_a_workdir_that_cannot_be_looked_into_is_refused_in_a_line(
    name: str,
    said: str,
    tmp_path: pathlib.Path,
    recipe: Any,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "nowhere").symlink_to("/not/there")
    answer = str(run.run(recipe, str(tmp_path / name)))
    assert re.search(rf"^error: the workdir .* {said}.*use another --workdir$", answer), answer
    assert program._folder(str(tmp_path / name), verify=True) == 1
    assert re.search(said, capsys.readouterr().out)
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")  # one that leads somewhere is a folder like any other
    with Checkpoints(tmp_path / "link/run") as checkpoints:
        assert checkpoints.latest() is None
