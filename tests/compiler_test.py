from __future__ import annotations

import ctypes
import json
import os
import pathlib
import subprocess
import textwrap
import time
import zlib
from collections.abc import Callable

import pytest

from coca_jax import cache, compiler

# The fixture of tests/conftest.py.
RunPython = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> pytest.MonkeyPatch:
    """None of the variables that matter is set, and the cache is in a folder of the test."""
    for name in ("LIBTPU_INIT_ARGS", "XLA_FLAGS", "JAX_PLATFORMS", compiler.SWITCH, compiler.CACHE_DIR):
        monkeypatch.setenv(name, "")  # so that monkeypatch knows it, and takes back what the test's subject sets
        monkeypatch.delenv(name)
    monkeypatch.setenv("COCA_JAX_CACHE", str(tmp_path / "cache"))
    return monkeypatch


def test_the_cache_folder_is_the_users_choice(environment: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    environment.setenv("HOME", str(tmp_path))
    assert cache.folder() == tmp_path / "cache"
    environment.delenv("COCA_JAX_CACHE")
    environment.delenv("XDG_CACHE_HOME", raising=False)
    assert cache.folder() == tmp_path / ".cache/coca_jax"
    environment.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.folder() == tmp_path / "xdg/coca_jax"
    environment.setenv("XDG_CACHE_HOME", "relative")
    assert cache.folder() == tmp_path / ".cache/coca_jax"
    environment.setenv("COCA_JAX_CACHE", "~/mine")
    assert cache.folder() == tmp_path / "mine"


@pytest.mark.parametrize(
    ("asked", "found"),
    [("cpu", ()), ("tpu", ("tpu",)), ("cuda,cpu", ("gpu",)), ("GPU", ("gpu",)), ("rocm", ("gpu",)), ("axon", ())],
)
def test_platforms_are_those_asked_for(environment: pytest.MonkeyPatch, asked: str, found: tuple[str, ...]) -> None:
    environment.setenv("JAX_PLATFORMS", asked)
    assert compiler.found_platforms() == found


def test_platforms_are_those_installed(environment: pytest.MonkeyPatch) -> None:
    installed: set[str] = set()
    environment.setattr(compiler.importlib.util, "find_spec", lambda name: name if name in installed else None)
    assert compiler.found_platforms() == ()
    installed.add("jax_cuda13_plugin")
    assert compiler.found_platforms() == ("gpu",)
    installed.add("libtpu")
    assert compiler.found_platforms() == ("tpu", "gpu")


@pytest.mark.parametrize("platform", compiler.PLATFORMS)
def test_what_the_user_set_stays_and_the_rest_is_added(environment: pytest.MonkeyPatch, platform: str) -> None:
    variable, flags = compiler.PLATFORMS[platform]
    theirs = [f"--{flags[0].name}=false", f"--{flags[1].name}", "--xla_dump_to=/tmp/a"]
    environment.setenv(variable, "  ".join(theirs))
    compiler.setup([platform])
    now = os.environ[variable].split()
    assert now == [*theirs, *(f"--{flag.name}={flag.value}" for flag in flags[2:])]
    compiler.setup([platform])
    assert os.environ[variable].split() == now  # a second call adds nothing


def test_no_flag_where_they_are_switched_off_or_in_a_file(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("XLA_FLAGS", "/home/me/flags.txt")
    compiler.setup(["gpu"])
    assert os.environ["XLA_FLAGS"] == "/home/me/flags.txt"
    environment.delenv("XLA_FLAGS")
    environment.setenv(compiler.SWITCH, "off")
    compiler.setup(["gpu", "tpu"])
    assert "XLA_FLAGS" not in os.environ and "LIBTPU_INIT_ARGS" not in os.environ
    assert compiler.CACHE_DIR in os.environ  # the cache is another matter


def test_every_flag_has_a_reason_and_a_source() -> None:
    for _, flags in compiler.PLATFORMS.values():
        assert len({flag.name for flag in flags}) == len(flags) > 3
        assert all(len(flag.reason) > 20 and flag.source for flag in flags)


def test_the_documentation_lists_every_flag() -> None:
    page = (pathlib.Path(__file__).resolve().parent.parent / "docs/launch.md").read_text(encoding="utf-8")
    for variable, flags in compiler.PLATFORMS.values():
        assert variable in page
        for flag in flags:
            assert f"| `--{flag.name}={flag.value}` | {flag.reason} | {flag.source} |" in page


def test_xla_knows_the_gpu_flags(run_python: RunPython) -> None:
    """XLA ends the process at a flag that it does not know, for a GPU too where there is none."""
    program = "import jax; print(jax.numpy.zeros(3) + 1)"
    flags = " ".join(f"--{flag.name}={flag.value}" for flag in compiler.GPU)
    # The fixture appends to XLA_FLAGS of its own; what is given in `env` stands instead.
    assert run_python(program, env={"XLA_FLAGS": flags}).stdout == "[1. 1. 1.]\n"
    done = run_python(program, env={"XLA_FLAGS": f"{flags} --xla_gpu_no_such_flag=true"}, check=False)
    assert done.returncode != 0 and "xla_gpu_no_such_flag" in done.stderr


_TPU_PROGRAM = """
    import os, sys
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    from coca_jax import compiler
    compiler.setup(["tpu"])
    import jax
    from jax.experimental import topologies
    from jax.sharding import NamedSharding, PartitionSpec
    from coca_jax.plan.topology import parse_topology
    topology = topologies.get_topology_desc(**parse_topology(sys.argv[1]).options())
    mesh = topologies.make_mesh(topology, (len(topology.devices),), ("fsdp",))
    sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
    arrays = [jax.ShapeDtypeStruct((256, 256), "bfloat16", sharding=sharding)] * 2
    compiled = jax.jit(lambda a, b: a @ b, out_shardings=sharding).lower(*arrays).compile()
    print("all-gather" in compiled.as_text())
"""


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_libtpu_takes_the_tpu_flags_for_every_chip(run_python: RunPython, topology: str) -> None:
    pytest.importorskip("libtpu", reason="NOT RUN: libtpu is not installed: pip install 'coca_jax[plan]'")
    program = ["-c", textwrap.dedent(_TPU_PROGRAM), topology]
    assert run_python(program, devices=1).stdout.splitlines()[-1] == "True"


@pytest.mark.slow
def test_libtpu_ends_at_a_flag_that_it_does_not_know(run_python: RunPython) -> None:
    pytest.importorskip("libtpu", reason="NOT RUN: libtpu is not installed: pip install 'coca_jax[plan]'")
    program = ["-c", textwrap.dedent(_TPU_PROGRAM), "v5e:2x2"]
    done = run_python(program, devices=1, env={"LIBTPU_INIT_ARGS": "--xla_tpu_no_such_flag=true"}, check=False)
    assert done.returncode != 0 and "xla_tpu_no_such_flag" in done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Compiled programs

_COUNTED = """
    import json, os, warnings
    from coca_jax import compiler
    compiler.setup()
    import jax
    from jax import monitoring
    events = []
    monitoring.register_event_listener(lambda event, **_: events.append(event.rsplit("/", 1)[-1]))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        print(float(jax.jit(lambda x: jax.numpy.sin(x @ x).sum())(jax.numpy.ones((8, 8)))))
    print(json.dumps([events.count("cache_hits"), events.count("cache_misses"), [str(w.message) for w in warned]]))
"""


def _start(run_python: RunPython, folder: pathlib.Path, **env: str) -> tuple[int, int, list[str]]:
    """Hits and misses of the cache, and the warnings, of a process that compiles a few small programs."""
    quick = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "COCA_JAX_CACHE": str(folder)}
    done = run_python(_COUNTED, devices=1, env={**quick, **env})
    hits, misses, warned = json.loads(done.stdout.splitlines()[-1])
    return hits, misses, warned


def test_a_second_start_compiles_nothing_and_a_damaged_entry_is_replaced(
    run_python: RunPython, tmp_path: pathlib.Path
) -> None:
    hits, misses, _ = _start(run_python, tmp_path)
    entries = sorted((tmp_path / "xla" / compiler.processor()).glob("*-cache"))
    assert (hits, misses) == (0, len(entries)) and entries
    # What a process leaves that is killed while it writes: a part of the entry.
    whole = entries[0].read_bytes()
    entries[0].write_bytes(whole[: len(whole) // 2])
    assert _start(run_python, tmp_path) == (misses - 1, 1, [])
    assert _start(run_python, tmp_path) == (misses, 0, [])


def test_the_users_own_cache_setting_wins(environment: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    for own in (str(tmp_path / "mine"), "gs://bucket/mine", ""):  # empty: none
        environment.setenv(compiler.CACHE_DIR, own)
        compiler.setup([])
        assert os.environ[compiler.CACHE_DIR] == own
    assert not (tmp_path / "cache").exists()


def test_jax_reads_the_users_setting(run_python: RunPython, tmp_path: pathlib.Path) -> None:
    mine = tmp_path / "mine"
    hits, misses, _ = _start(run_python, tmp_path / "cache", JAX_COMPILATION_CACHE_DIR=str(mine))
    assert (hits, misses) == (0, len(list(mine.glob("*-cache")))) and misses


def test_only_what_is_damaged_goes(tmp_path: pathlib.Path) -> None:
    data = zlib.compress(os.urandom(3 << 20))
    contents = {
        "whole": data,
        "zstandard": b"\x28\xb5\x2f\xfd and whatever follows",
        "half": data[: len(data) // 2],
        "start": data[:3],
        "empty": b"",
        "other": b"not compressed at all",
    }
    for name, content in contents.items():
        (tmp_path / f"{name}-cache").write_bytes(content)
    (tmp_path / "half-atime").write_bytes(b"")  # not an entry
    compiler.drop_damaged(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"whole-cache", "zstandard-cache", "half-atime", ".checked"}


def test_an_entry_is_looked_at_once(tmp_path: pathlib.Path) -> None:
    old, new = tmp_path / "old-cache", tmp_path / "new-cache"
    old.write_bytes(zlib.compress(b"program"))
    os.utime(old, (time.time() - 10, time.time() - 10))
    compiler.drop_damaged(tmp_path)
    old.write_bytes(b"")
    os.utime(old, (time.time() - 10, time.time() - 10))
    new.write_bytes(b"")
    compiler.drop_damaged(tmp_path)
    assert old.exists() and not new.exists()


def test_a_cache_that_cannot_be_written_is_said_in_one_line(
    environment: pytest.MonkeyPatch, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    compiler.setup([])
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(tmp_path / "cache") in said and f"set {compiler.CACHE_DIR}" in said
    assert compiler.CACHE_DIR not in os.environ


def test_a_bucket_is_left_to_jax(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("COCA_JAX_CACHE", "gs://bucket/cache/")
    compiler.setup([])
    assert os.environ[compiler.CACHE_DIR] == f"gs://bucket/cache/xla/{compiler.processor()}"


def test_main_sets_it_up_before_jax_is_loaded(run_python: RunPython, tmp_path: pathlib.Path) -> None:
    """`main` itself, with a stand-in for `run`, which is what loads JAX."""
    program = """
        import os, sys, types
        from coca_jax import main
        run = types.ModuleType("coca_jax.run")
        run.run = lambda *_, **__: print("jax" in sys.modules, os.environ["JAX_COMPILATION_CACHE_DIR"]) or 0
        sys.modules["coca_jax.run"] = run
        sys.argv = ["main", "--config=configs/debug.py", "--workdir=somewhere"]
        main.cli()
    """
    done = run_python(program, env={"COCA_JAX_CACHE": str(tmp_path)})
    assert done.stdout == f"False {tmp_path}/xla/{compiler.processor()}\n"


PROGRAM = """
    import resource
    from coca_jax import compiler
    kept = compiler.keep_memory()
    import jax, jax.numpy as jnp
    # An outer product that a sort needs as a whole: 64 MB which the program takes at each call.
    function = jax.jit(lambda x: jnp.sort(x[:, None] * x[None, :], axis=0)[7].sum())
    x = jnp.arange(4096.0)
    def faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        function(x).block_until_ready()
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    print(kept, min([faults() for _ in range(12)][1:]))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="no glibc, whose malloc this is about")
@pytest.mark.slow
def test_what_a_step_frees_is_kept_for_the_next(run_python: RunPython) -> None:
    def pages_taken_anew(switch: str) -> tuple[str, int]:
        environment = {"JAX_PLATFORMS": "cpu", compiler.KEEP_MEMORY: switch}
        kept, faults = run_python(PROGRAM, devices=1, env=environment).stdout.split()
        return kept, int(faults)

    kept, faults = pages_taken_anew("on")
    assert kept == "True" and faults < 160  # of 16,384 that the array has, of 4 KiB
    kept, without = pages_taken_anew("")
    assert kept == "False" and without > faults + 10  # 32 where the system has pages of 2 MiB


def test_memory_that_cannot_be_kept_is_said(
    environment: pytest.MonkeyPatch, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compiler.sys, "platform", "darwin")
    environment.setenv(compiler.KEEP_MEMORY, "on")
    assert not compiler.keep_memory()
    assert "COCA_JAX_KEEP_MEMORY has no effect: it needs Linux" in capsys.readouterr().err
    environment.delenv(compiler.KEEP_MEMORY)
    assert not compiler.keep_memory() and not capsys.readouterr().err  # nobody asked
