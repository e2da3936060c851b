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
