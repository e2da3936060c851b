"""The command line, its answers and its exit statuses."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from coca_jax.data.prepare import command
from tests.conftest import REPOSITORY
from tests.data.prepare import sets


def failure(capsys, arguments: list[str], status: int = 1) -> str:
    """The one line that it ends with."""
    assert command.main(arguments) == status
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    return error


def test_convert_and_describe(mixed, tmp_path, capsys):
    out = tmp_path / "set"
    arguments = ["convert", f"--source={mixed}", f"--out={out}", "--max_bad=0.2", "--workers=1", "--shard_size=20KB"]
    assert command.main(arguments) == 0
    page = capsys.readouterr().out
    for wanted in (
        f"{out}: 36 records in ",
        f"from {mixed}, 40 records",
        "1  no_caption: it has no caption",
        "'key-19'",
    ):
        assert wanted in page, page
    assert f"read it as array_record:{out}/*.array_record" in page
    sheet = tmp_path / "sheet.jpg"
    assert command.main(["describe", f"array_record:{out}/*.array_record", f"--contact_sheet={sheet}"]) == 0
    said = capsys.readouterr().out
    assert "36 records, all of them read" in said and said.endswith(f"contact sheet: {sheet}\n")
    assert sheet.read_bytes().startswith(b"\xff\xd8")


def test_names_that_are_not_utf_8_are_refused(mixed, tmp_path, capsys):
    odd = os.fsdecode(b"caf\xe9")
    (tmp_path / odd / "class").mkdir(parents=True)
    (tmp_path / odd / "class" / "0.jpg").write_bytes(b"i")
    for arguments in (
        ["describe", f"folder:{tmp_path}/{odd}"],
        ["convert", f"--source=folder:{tmp_path}/{odd}", f"--out={tmp_path}/out"],
        ["convert", f"--source={mixed}", f"--out={tmp_path}/out-{odd}"],
        ["convert", f"--source={mixed}", f"--out={tmp_path}/out", f"--name={odd}"],
    ):
        said = failure(capsys, arguments)
        assert said.isascii() and "is not UTF-8, as a manifest is: rename it" in said
    assert sorted(os.listdir(tmp_path)) == [odd]


@pytest.mark.parametrize(
    "arguments",
    [
        ["describe", "--source={mixed}"],
        ["--describe", "{mixed}"],
        ["--describe={mixed}"],
        ["--source={mixed}", "--describe"],
    ],
)
def test_ways_to_ask_for_a_description(mixed, capsys, arguments):
    assert command.main([argument.format(mixed=mixed) for argument in [*arguments, "--sample=5"]]) == 0
    assert "40 records, 5 of them read" in capsys.readouterr().out


def test_as_a_command(mixed, tmp_path):
    """In a process of its own: a bar and the page, or one line."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "coca_jax.data.prepare", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)

    done = run("convert", f"--source={mixed}", "--out=set", "--max_bad=0.2", "--workers=1", "--max_side=40")
    assert done.returncode == 0 and "set: 36 records in 1 shard," in done.stdout
    assert "40/40" in done.stderr and "records/s" in done.stderr
    assert sorted(sets.contents(tmp_path / "set"))[-1] == "set-00000-of-00001.array_record"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["convert", "--source=nonsense", "--out={out}"], "write kind:location"),
        (["convert", "--source=array_record:/no/such", "--out={out}"], "no file matches"),
        (["convert", "--source={mixed}", "--out={out}", "--beam_args=--x"], "name a --runner"),
        (["convert", "--source={mixed}", "--out={out}", "--workers=1", "--max_bad=0.05"], "raise --max_bad"),
        (["convert", "--source={mixed}", "--out={out}", "--workers=1", "--bad=stop"], "record 7: truncated: "),
        (
            ["convert", "--source={mixed}", "--out={out}", "--tokenizer=/no", "--max_bad=1", "--workers=1"],
            "no such file",
        ),
        (
            ["convert", "--source={mixed}", "--out={out}", "--vocab_size=5", "--max_bad=1", "--workers=1"],
            "vocab_size=5",
        ),
        (
            ["convert", "--source={mixed}", "--out={out}", "--vocab_size=300", "--tokenizer=t.model"],
            "--tokenizer=t.model counts tokens where none is trained",
        ),
        (["convert", "--source={mixed}", "--out={out}", "--name=a/b"], "--name=a/b"),
        (["describe", "array_record:/no/such"], "no file matches"),
        (["describe", "tfrecord:/no/such"], "no file matches"),
        (["describe", "--", "--surce"], "source '--surce'"),  # no flag behind the two lines
        (["describe", "{mixed}", "--tokenizer=/no/such"], "no such file"),
    ],
)
def test_data_errors_are_one_line(mixed, tmp_path, capsys, arguments, said):
    filled = [argument.format(mixed=mixed, out=tmp_path / "out") for argument in arguments]
    assert said in failure(capsys, filled)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "COMMAND"),
        (["conver"], "invalid choice"),
        (["convert"], "--source, --out"),
        (["convert", "--source=a", "--out=b", "--shard_size=1", "--records_per_shard=1"], "not allowed with"),
        (["convert", "--source=a", "--out=b", "--shard_size=big"], "is not a size: write 500MB"),
        (["convert", "--source=a", "--out=b", "--max_bad=2"], "'2' is not a share"),
        (["convert", "--source=a", "--out=b", "--quality=101"], "101 is not 1 to 100"),
        (["convert", "--source=a", "--out=b", "--records_per_shard=0"], "0 is not 1 or more"),
        (["convert", "--source=a", "--out=b", "--runner=Spark"], "invalid choice"),
        (["convert", "--source=a", "--out=b", "--worker=3"], "error: unknown flag --worker: did you mean --workers?"),
        (["convert", "--surce=a", "--out=b"], "error: unknown flag --surce: did you mean --source?"),
        (["describe", "--surce", "a"], "error: unknown flag --surce: did you mean --source?"),
        (["convert", "--out=b", "--zzz"], "error: unknown flag --zzz\n"),
        (["describe"], "SPEC"),
        (["--describe"], "SPEC"),
        (["describe", "a", "--source=b"], "not allowed with"),
        (["--describ", "a"], "invalid choice"),
        (["describe", "a", "--sample=x"], "'x' is not a whole number"),
    ],
)
def test_wrong_usage_is_status_2(capsys, arguments, said):
    with pytest.raises(SystemExit) as stop:
        command.main(arguments)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", ["convert", "describe", "emoji"])
def test_help(capsys, name):
    with pytest.raises(SystemExit) as stop:
        command.main([name, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "usage: python -m coca_jax.data.prepare" in shown
    assert ("tfrecord:PATTERN" in shown) == (name != "emoji")


def test_sizes():
    wanted = {"1": 1, "20KB": 20_000, "1.5k": 1500, "512MiB": 512 << 20, "1 GiB": 1 << 30, "2gb": 2 * 10**9}
    assert {text: command._size(text) for text in wanted} == wanted


def test_interruption(mixed, tmp_path, capsys, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("coca_jax.data.prepare.shards.process", interrupt)
    assert command.main(["convert", f"--source={mixed}", f"--out={tmp_path / 'out'}", "--workers=1"]) == 130
    assert "the same command goes on where it was" in capsys.readouterr().err
