"""A store that fails now and then: sources read the same examples, asking again with pauses that grow."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import pytest

from coca_jax.data.records import BadExample, DataError
from coca_jax.data.sources import open_source, patience
from tests import faulty, pairs
from tests.data.sources import tars

PICTURE = pairs.png(pairs.picture("red", "dot"))


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> faulty.Faulty:
    monkeypatch.setenv("COCA_JAX_CACHE", str(tmp_path))
    return faulty.register()


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Those that were made, in no time."""
    made: list[float] = []
    monkeypatch.setattr(patience.time, "sleep", made.append)
    return made


def webdataset(bucket: faulty.Faulty) -> str:
    bucket.pipe({f"/bucket/{i}.tar": tars.tar(tars.samples(10 * i, 10)) for i in range(2)})
    return "webdataset:az://bucket/*.tar"


def folder(bucket: faulty.Faulty) -> str:
    lines = "".join(f"{i}.png,text {i}\n" for i in range(20))
    bucket.pipe({"/bucket/captions.csv": f"image,caption\n{lines}".encode()})
    bucket.pipe({f"/bucket/{i}.png": PICTURE + bytes(i) for i in range(20)})
    return "folder:az://bucket"


def parquet(bucket: faulty.Faulty) -> str:
    import io

    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table(
        {"image": [PICTURE + bytes(i) for i in range(20)], "caption": [f"text {i}" for i in range(20)]}
    )
    out = io.BytesIO()
    pyarrow.parquet.write_table(table, out, row_group_size=5)
    bucket.pipe({"/bucket/0.parquet": out.getvalue()})
    return "parquet:az://bucket/*.parquet"


def everything(spec: str) -> list[Any]:
    source = open_source(spec)
    return [source.fingerprint(), *(source[i] for i in range(len(source)))]


@pytest.mark.parametrize(
    ("made", "asked"),
    [
        (webdataset, {"find", "info", "open", "range", "cat_file"}),
        (folder, {"info", "cat_file"}),
        (parquet, {"find", "info", "open", "range"}),
    ],
)
def test_what_fails_twice_is_read(
    made: Callable[[faulty.Faulty], str],
    asked: set[str],
    bucket: faulty.Faulty,
    pauses: list[float],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    spec = made(bucket)
    wanted = everything(spec)
    assert len(wanted) == 21 and not pauses
    kinds = set(bucket.asked) - {"write"}  # an index that may be left beside a tar
    assert kinds == asked
    bucket.rm("/bucket", recursive=True)  # the index that was left beside a tar too
    made(bucket)
    monkeypatch.setenv("COCA_JAX_CACHE", str(tmp_path / "anew"))
    for kind in kinds:
        bucket.faults[kind].extend([ConnectionResetError("reset by peer"), faulty.Throttled("slow down")])
    assert everything(spec) == wanted
    assert not any(bucket.faults.values()), bucket.faults  # all were met
    assert len(kinds) < len(pauses) <= 2 * len(kinds)  # Arrow asks for several ranges at once
    assert "reset by peer; asked again in 0." in caplog.text and "slow down; asked again in" in caplog.text


def test_one_that_does_not_come_back_is_given_up(bucket: faulty.Faulty, pauses: list[float]) -> None:
    source = open_source(folder(bucket))
    bucket.faults["cat_file"].extend([TimeoutError("no answer")] * (len(patience.WAITS) + 1))
    with pytest.raises(BadExample, match=r"az://bucket/3\.png cannot be read: .*no answer"):
        source[3]
    assert not bucket.faults["cat_file"]
    for pause, wait in zip(pauses, patience.WAITS, strict=True):  # twice as long each time, a quarter more or less
        assert 0.75 * wait <= pause <= 1.25 * wait
    assert patience.WAITS[:5] == (0.5, 1.0, 2.0, 4.0, 8.0) and 90 < sum(pauses) < 160
    assert source[3].image == PICTURE + bytes(3)  # and later it is there again


def test_what_is_missing_or_refused_is_not_asked_for_again(bucket: faulty.Faulty, pauses: list[float]) -> None:
    spec = webdataset(bucket)
    with pytest.raises(DataError, match="no file matches"):
        open_source("webdataset:az://bucket/7.tar")
    refused = faulty.Throttled("no such permission")
    refused.code = 403
    bucket.faults["find"].append(refused)
    with pytest.raises(DataError, match=r"cannot be listed: .*no such permission"):
        open_source(spec)
    source = open_source(spec)
    bucket.faults["cat_file"].append(PermissionError("not yours"))
    with pytest.raises(DataError, match="not yours"):
        source[0]
    assert not pauses
