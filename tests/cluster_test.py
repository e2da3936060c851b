"""The launchers for clusters, against stand-ins for gcloud, xpk and Slurm's programs: a cluster made of folders.

A stand-in writes down what it is called with. Where a machine would do something (copy a file, run a command), it does
so in a folder of its own, with an interpreter that writes down its arguments, or with the real supervisor and a small
program in the place of coca_jax.main.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent

# What shells, YAML and Python's formatting trip over.
NASTY = """--config.data.train=array_record:/a  b/it's "quoted" $HOME $(id) `id` \\n \\ * {x} %s & ; # 'é'"""
RUN = ["--config=configs/debug.py", "--workdir=gs://bucket/my run", NASTY, ""]
CACHE = "gs://bucket/my run/compilation_cache"

# In the place of the interpreter of an environment.
_PYTHON = f"""#!/bin/bash
if [[ $1 == -c ]]; then echo {sys.version_info.major}.{sys.version_info.minor}; exit; fi
"""
_PYTHON += """
[[ $2 == coca_jax.supervise ]] || exit 9
while [[ $1 != -- ]]; do shift; done
shift
printf '%s\\0' "$@" >"$HOME/arguments"
env -0 >"$HOME/environment"
pwd >"$HOME/directory"
echo "step 1"
trap 'echo saved; exit 143' TERM
while [[ ! -e $HOME/finish ]]; do sleep 0.05; done
exit "$(<"$HOME/finish")"
"""

_TOOLS = {
    # Makes an environment with that interpreter.
    "uv": """case $1 in
  venv) mkdir -p "${!#}/bin" && cp "$TOOLS/fake_python" "${!#}/bin/python" ;;
esac""",
    # TPUs: a folder for each VM. A queued resource waits once, then it is there.
    "gcloud": """case "$3 $4" in
  "queued-resources describe") [[ -e $CLOUD/state ]] && cat "$CLOUD/state"; s=$?
    [[ $s != 0 || $(<"$CLOUD/state") != WAITING_FOR_RESOURCES ]] || echo "${STATE:-ACTIVE}" >"$CLOUD/state"; exit $s ;;
  "queued-resources create") echo WAITING_FOR_RESOURCES >"$CLOUD/state" ;;
  "tpu-vm scp") mkdir -p "$CLOUD/${6%%:*}" && cp "$5" "$CLOUD/${6%%:*}/${6#*:}" ;;
  "tpu-vm ssh") mkdir -p "$CLOUD/$5" && cd "$CLOUD/$5"
    for a; do [[ $a != --command=* ]] || HOME=$PWD exec bash -c "${a#--command=}"; done ;;
  *) exit 2 ;;
esac""",
    "xpk": "true",
    "kubectl": "true",
    "sbatch": 'SLURM_JOB_ID=7 exec bash "${!#}"',
    "srun": 'while [[ $1 == -* ]]; do shift; done; exec "$@"',
    "scontrol": "true",
}


class Cloud:
    """The stand-ins in a folder, and what they were called with."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder / "cloud"
        self.log = folder / "calls"
        self.tools = folder / "tools"
        self.clone = folder / "a clone"  # of what a launcher needs, so that nothing is written into this repository
        for made in (self.folder, self.tools, self.clone / "configs", self.clone / "coca_jax"):
            made.mkdir(parents=True)
        shutil.copytree(REPOSITORY / "launch", self.clone / "launch")
        for name in ("setup.py", "pyproject.toml", "configs/debug.py"):
            shutil.copy(REPOSITORY / name, self.clone / name)
        for name, body in _TOOLS.items():
            # At once: two machines' calls must not be mixed, and bash writes line by line.
            recorded = f"""printf '%s\\0' {name} "$@" $'\\n' >"$LOG.$$"; cat "$LOG.$$" >>"$LOG"; rm "$LOG.$$"\n"""
            self._write(name, f"#!/bin/bash\n{recorded if name != 'uv' else ''}{body}\n")
        self._write("fake_python", _PYTHON)

    def _write(self, name: str, text: str) -> None:
        (self.tools / name).write_text(text)
        (self.tools / name).chmod(0o755)

    def run(self, *command: str | pathlib.Path, **env: str) -> subprocess.CompletedProcess[str]:
        environment = {
            "PATH": f"{self.tools}:{os.environ['PATH']}",
            "HOME": str(self.folder),
            "TOOLS": str(self.tools),
            "CLOUD": str(self.folder),
            "LOG": str(self.log),
            "POLL_SECONDS": "0",
            "PYTHON": sys.executable,  # so that none is searched for
            **env,
        }
        return subprocess.run(
            [*map(str, command)], env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
        )

    def launch(self, script: str, *arguments: str, main: Sequence[str] = RUN, **env: str):
        return self.run("bash", self.clone / "launch" / script, *arguments, "--", *main, **env)

    def calls(self) -> list[list[str]]:
        """What the stand-ins were called with since the last look."""
        text = self.log.read_text() if self.log.exists() else ""
        self.log.unlink(missing_ok=True)
        return [call.split("\0")[:-1] for call in text.split("\n\0")[:-1]]

    def ran(self, machine: str = ".") -> tuple[list[str], dict[str, str]]:
        """Arguments and environment of coca_jax.main on a machine."""
        folder = self.folder / machine
        arguments = (folder / "arguments").read_text().split("\0")[:-1]
        pairs = (folder / "environment").read_text().split("\0")[:-1]
        (folder / "arguments").unlink()
        return arguments, dict(pair.split("=", 1) for pair in pairs)


@pytest.fixture
def cloud(tmp_path: pathlib.Path):
    found = Cloud(tmp_path)
    yield found
    for machine in found.folder.glob("pod*"):  # whatever a failed test left running
        (machine / "finish").write_text("0")


# In the place of coca_jax.main, under the real supervisor: killed at its first start, asked to end at its second.
_MAIN = """
import os, pathlib, signal, sys, time
home = pathlib.Path(os.environ["HOME"])
with (home / "starts").open("a") as file:
    file.write("\\0".join(sys.argv[1:]) + "\\n\\n")
if (home / "starts").read_text().count("\\n\\n") == 1:
    os.kill(os.getpid(), signal.SIGKILL)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
time.sleep(60)
"""


def test_a_lost_process_is_started_again_on_its_machine(cloud: Cloud) -> None:
    """on_worker with the real supervisor, as launch/tpu_pod calls it; launch/gke calls it in the foreground."""
    environment = cloud.folder / ".venv"
    (environment / "bin").mkdir(parents=True)
    (environment / "bin/python").symlink_to(sys.executable)
    (cloud.clone / "coca_jax/__init__.py").touch()
    (cloud.clone / "coca_jax/main.py").write_text(_MAIN)
    for name in ("supervise.py", "parent.py"):
        shutil.copy(REPOSITORY / "coca_jax" / name, cloud.clone / "coca_jax" / name)
    worker = ("bash", cloud.clone / "launch/on_worker")
    told = {"COCA_JAX_VENV": str(environment), "PYTHONPATH": str(cloud.clone)}
    starts = cloud.folder / "starts"
    assert cloud.run(*worker, "start", "--extra=cpu", "--grace=60", "--", *RUN, **told).returncode == 0
    deadline = time.monotonic() + 50
    while not starts.exists() or starts.read_text().count("\n\n") < 2:
        assert time.monotonic() < deadline, (cloud.folder / "coca_jax_run/log").read_text()
        time.sleep(0.1)
    assert "running, process" in cloud.run(*worker, "status", **told).stdout
    time.sleep(0.5)  # until it listens
    assert cloud.run(*worker, "stop", **told).returncode == 0
    while "ended with status 143" not in (said := cloud.run(*worker, "status", **told).stdout):
        assert time.monotonic() < deadline, said
    log = (cloud.folder / "coca_jax_run/log").read_text()
    assert "process 0 of 1 was ended by SIGKILL" in log and "starts again in 5 s" in log, log
    assert starts.read_text() == ("\0".join(RUN) + "\n\n") * 2


def test_a_process_that_has_the_number_of_a_run_is_not_the_run(cloud: Cloud) -> None:
    """After a restart of the machine another process may have it: it is neither waited for nor ended."""
    environment = cloud.folder / ".venv"
    (environment / "bin").mkdir(parents=True)
    shutil.copy(cloud.tools / "fake_python", environment / "bin/python")
    worker = ("bash", cloud.clone / "launch/on_worker")
    told, folder = {"COCA_JAX_VENV": str(environment)}, cloud.folder / "coca_jax_run"
    start = (*worker, "start", "--extra=cpu", "--", *RUN)
    assert cloud.run(*start, **told).returncode == 0
    assert "running, process" in cloud.run(*worker, "status").stdout
    (cloud.folder / "finish").write_text("0")
    deadline = time.monotonic() + 20
    while not (folder / "status").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    (folder / "status").unlink()  # as if the machine had been switched off
    with subprocess.Popen(["sleep", "60"]) as other:
        try:
            (folder / "pid").write_text(f"{other.pid}\n")
            assert "nothing was started" in cloud.run(*worker, "status").stdout
            followed = cloud.run(*worker, "follow")
            assert (followed.returncode, followed.stdout) == (1, "step 1\n")
            assert "may have been restarted" in followed.stderr
            assert [cloud.run(*worker, action).returncode for action in ("idle", "stop")] == [0, 0]
            assert other.poll() is None
            assert cloud.run(*start, **told).returncode == 0
        finally:
            other.kill()


POD = ("--name=pod", "--zone", "us-central2-b")


def test_a_pod_is_asked_for_and_runs_the_arguments_as_they_were_given(cloud: Cloud) -> None:
    options = (*POD, "--type=v4-16", "--slices=2", "--spot", "--project=mine", "--env=A=it's $B", "--detach")
    done = cloud.launch("tpu_pod", *options)
    assert done.returncode == 0, done.stderr
    for machine in ("pod-0", "pod-1"):
        given, environment = cloud.ran(machine)
        assert given == RUN
        assert (environment["A"], environment["JAX_COMPILATION_CACHE_DIR"]) == ("it's $B", CACHE)
        assert (cloud.folder / machine / "directory").read_text() == f"{cloud.folder / machine}/coca_jax\n"
    create = [call for call in cloud.calls() if call[3:5] == ["queued-resources", "create"]]
    place = ["--zone=us-central2-b", "--project=mine"]
    wanted = ["--accelerator-type=v4-16", "--runtime-version=tpu-ubuntu2204-base"]
    nodes = ["--node-count=2", "--node-prefix=pod"]
    assert create == [
        ["gcloud", "compute", "tpus", "queued-resources", "create", "pod", *place, *wanted, *nodes, "--spot"]
    ]
    for word in ("# Log:", "# Status:", "# Stop:", "# Delete:"):
        assert word in done.stdout


def test_a_run_on_a_pod_is_followed_refused_twice_stopped_and_started_again(cloud: Cloud) -> None:
    assert cloud.launch("tpu_pod", *POD, "--detach").returncode == 0
    assert not any("queued-resources" in call for call in cloud.calls())  # without --type the VM is there already
    machine = cloud.folder / "pod"
    kept = machine / "coca_jax/kept"
    kept.touch()
    again = cloud.launch("tpu_pod", *POD, "--detach")
    assert again.returncode == 1 and "still runs a training" in again.stderr and "stop" in again.stderr
    assert kept.exists()  # what runs keeps its files
    hints = {name: line.partition(": ")[2] for line in again.stdout.splitlines() for name in [line[2:].split(":")[0]]}
    assert "running, process" in cloud.run("bash", "-c", hints["Status"].strip()).stdout
    assert cloud.run("bash", "-c", hints["Stop"].strip()).returncode == 0
    assert "saved" in (machine / "coca_jax_run/log").read_text()
    deadline = time.monotonic() + 10
    while "ended with status 143" not in (said := cloud.run("bash", "-c", hints["Status"].strip()).stdout):
        assert time.monotonic() < deadline, said

    (machine / "finish").write_text("7")
    failed = cloud.launch("tpu_pod", *POD)
    assert failed.returncode == 1 and "step 1" in failed.stdout
    assert "this failed with status 7: show the log" in failed.stderr
    assert not kept.exists() and cloud.ran("pod")[0] == RUN
    (machine / "finish").write_text("0")
    assert cloud.launch("tpu_pod", *POD).returncode == 0


def test_a_queued_resource_that_failed_is_said(cloud: Cloud) -> None:
    done = cloud.launch("tpu_pod", *POD, "--type=v5p-8", STATE="SUSPENDED")
    assert done.returncode == 1
    assert "error: the queued resource is SUSPENDED: remove it and start again: gcloud compute tpus" in done.stderr
    assert not (cloud.folder / "pod").exists()


def test_a_clone_instead_of_a_copy(cloud: Cloud) -> None:
    for command in (["init", "-q", "-b", "main"], ["add", "."], ["commit", "-q", "-m", "all"]):
        author = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        assert cloud.run("git", "-C", cloud.clone, *author, *command).returncode == 0
    done = cloud.launch("tpu_pod", *POD, "--detach", f"--clone={cloud.clone}", "--ref=main")
    assert done.returncode == 0, done.stderr
    assert cloud.ran("pod")[0] == RUN
    assert not any("scp" in call for call in cloud.calls())


def test_gke_starts_a_copy_with_a_command_in_a_file(cloud: Cloud) -> None:
    options = ("--cluster=c", "--workload=coca-1", "--env=A=it's $B", "--xpk-option=--spot", "--zone=z")
    done = cloud.launch("gke", *options, "--type=v5p-128", "--slices=2")
    assert done.returncode == 0, done.stderr
    staged = cloud.clone / "runs/launch/coca-1"
    ((name, *arguments),) = cloud.calls()
    assert [name, *arguments[:2]] == ["xpk", "workload", "create"]
    assert {"--tpu-type=v5p-128", "--num-slices=2", f"--script-dir={staged}", "--spot", "--zone=z"} <= set(arguments)
    # XPK writes it into YAML as it is: so nothing in it may need quotes.
    assert arguments[-1] == "--command=exec bash launch_command.sh"
    (cloud.folder / "finish").write_text("0")
    assert cloud.run("bash", staged / "launch_command.sh").returncode == 0
    given, environment = cloud.ran()
    assert given == RUN
    assert (environment["A"], environment["JAX_COMPILATION_CACHE_DIR"]) == ("it's $B", CACHE)
    assert (cloud.folder / "directory").read_text() == f"{staged}\n"

    # GPUs, in an image that has everything installed: what XPK says about the machines is said to JAX.
    shutil.copy(cloud.tools / "fake_python", cloud.tools / "python")
    done = cloud.launch("gke", *options, "--type=h100-80gb-8", "--slices=4", "--installed")
    assert done.returncode == 0, done.stderr
    assert {"--device-type=h100-80gb-8", "--num-nodes=4"} <= set(cloud.calls()[-1])
    xpk = {"JAX_COORDINATOR_ADDRESS": "first", "JAX_COORDINATOR_PORT": "6002", "NNODES": "4", "NODE_RANK": "3"}
    assert cloud.run("bash", staged / "launch_command.sh", **xpk).returncode == 0
    given, environment = cloud.ran()
    assert given == RUN
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    assert [environment[name] for name in names] == ["first:6002", "4", "3"]


SLURM = [RUN[0], "--workdir=/data/my run", *RUN[2:]]


def test_slurm_runs_one_process_a_gpu(cloud: Cloud) -> None:
    python = str(cloud.tools / "fake_python")
    (cloud.folder / "finish").write_text("0")
    options = ("--nodes=2", "--gpus-per-node=4", "--time=1-00:00:00", f"--python={python}", "--env=A=it's $B")
    comment = """--comment=a "quoted" back\\slash it's"""
    done = cloud.launch("slurm", *options, f"--sbatch-option={comment}", "--cpus-per-gpu=8", main=SLURM)
    assert done.returncode == 0, done.stderr
    given, environment = cloud.ran()
    assert given == SLURM
    assert (environment["A"], environment["SRUN_CPUS_PER_TASK"]) == ("it's $B", "8")
    assert "JAX_LOCAL_DEVICE_IDS" not in environment
    script = cloud.clone / "runs/launch/coca.sbatch"
    submitted, started = cloud.calls()
    assert submitted == ["sbatch", str(script)]
    # JAX counts on all GPUs of a node being visible to each of its tasks.
    assert "--gpu-bind=none" in started and not any("gpus-per-task" in word for word in started)
    # sbatch splits these lines as a shell does, but for $ and `.
    lines = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH ")]
    read = [word for line in lines for word in shlex.split(line.removeprefix("#SBATCH "))]
    assert {"--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--cpus-per-task=8", comment} <= set(read)
    assert f"--output={cloud.clone}/runs/launch/coca-%j.log" in read and len(read) == len(lines)


def test_slurm_runs_one_process_a_node_and_goes_on_after_the_time_limit(cloud: Cloud) -> None:
    options = ("--gpus-per-node=4", "--per-node", "--cpus-per-gpu=8", "--requeue")
    (cloud.folder / "finish").write_text("143")  # asked to end at the time limit, and saved
    done = cloud.launch("slurm", *options, main=SLURM)  # without --python: installs
    assert done.returncode == 1 and "status 143" in done.stderr
    given, environment = cloud.ran()
    assert given == SLURM
    assert (environment["JAX_LOCAL_DEVICE_IDS"], environment["SRUN_CPUS_PER_TASK"]) == ("0,1,2,3", "32")
    assert [call for call in cloud.calls() if call[0] == "scontrol"] == [["scontrol", "requeue", "7"]]
    (cloud.folder / "finish").write_text("1")  # a failure is not tried again
    assert cloud.launch("slurm", *options, main=SLURM).returncode == 1
    assert not [call for call in cloud.calls() if call[0] == "scontrol"]


def test_a_slurm_job_that_is_cancelled_saves_and_stays_cancelled(cloud: Cloud) -> None:
    """The signal reaches script and steps alike; that of the time limit, above, the steps alone."""
    (cloud.folder / "finish").write_text("0")
    python = str(cloud.tools / "fake_python")
    assert cloud.launch("slurm", "--requeue", f"--python={python}", main=SLURM).returncode == 0
    for left in ("finish", "environment", "directory"):
        (cloud.folder / left).unlink()
    cloud.calls()
    environment = {"PATH": f"{cloud.tools}:{os.environ['PATH']}", "HOME": str(cloud.folder), "LOG": str(cloud.log)}
    script = str(cloud.clone / "runs/launch/coca.sbatch")
    job = subprocess.Popen(
        ["bash", script],
        env=environment | {"SLURM_JOB_ID": "7"},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert job.stdout and job.stdout.readline() == "step 1\n"
        time.sleep(0.3)  # until it listens
        os.killpg(job.pid, signal.SIGTERM)
        said, _ = job.communicate(timeout=30)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
    assert (job.returncode, said) == (143, "saved\n")
    assert [call[0] for call in cloud.calls()] == ["srun"]


@pytest.mark.parametrize(
    ("script", "options", "main"),
    [
        ("tpu_pod", [*POD, "--type=v6e-16", "--slices=2", "--env=A=it's $B"], RUN),
        ("gke", ["--cluster=c", "--workload=w", "--type=v6e-16", "--env=A=it's $B"], RUN),
        ("slurm", ["--nodes=3", "--env=A=it's $B", "--sbatch-option=--comment=a b"], SLURM),
    ],
)
def test_a_dry_run_does_nothing_and_prints_what_would_be_done(
    cloud: Cloud, script: str, options: list[str], main: list[str]
) -> None:
    for machine in (".", "pod-0", "pod-1"):
        (cloud.folder / machine).mkdir(exist_ok=True)
        (cloud.folder / machine / "finish").write_text("0")
    printed = cloud.launch(script, *options, "--dry-run", main=main)
    assert (printed.returncode, printed.stderr) == (0, "")
    assert cloud.calls() == [] and not (cloud.clone / "runs").exists()
    # What it prints is a script: run, it calls the same programs with the same words as the launcher itself.
    done = cloud.run("bash", "-c", printed.stdout)
    assert done.returncode == 0, done.stderr
    by_script = cloud.calls()
    (cloud.folder / "state").unlink(missing_ok=True)
    assert cloud.launch(script, *options, main=main).returncode == 0
    assert sorted(by_script) == sorted(cloud.calls()) and by_script


@pytest.mark.parametrize("script", ["tpu_pod", "gke", "slurm"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "is missing: --"),
        (["--bogus=1"], "unknown option --bogus"),
        (["stray"], "unexpected argument stray"),
        (["--env"], "--env needs a value"),
        (["--dry-run=yes"], "--dry-run takes no value, not yes"),
        (["..."], "no recipe: end with -- --config=configs/NAME.py --workdir=FOLDER"),
        (["...", "--", "--config=configs/debug.py"], "no workdir"),
        (["...", "--", "--config=configs/none.py", "--workdir=gs://a/b"], "configs/none.py: no such file"),
        (["...", "--", "--config=configs/debug.py", "--workdir=here"], "--workdir=here"),
        (["...", "--env=A", "--", *RUN], "--env=A: write --env=NAME=VALUE"),
        (["...", "--", *SLURM[:1], "--workdir=gs://a/b"], "is not on the PATH"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(cloud: Cloud, script: str, arguments: list[str], message: str) -> None:
    good = {"tpu_pod": POD, "gke": ("--cluster=c", "--workload=w", "--type=v4-8"), "slurm": ("--nodes=2",)}[script]
    if script == "slurm" and not arguments:
        message = "no recipe"  # it needs no option
    given = [word for argument in arguments for word in (good if argument == "..." else (argument,))]
    for name in ("gcloud", "xpk", "sbatch"):
        (cloud.tools / name).unlink()
    here = cloud.tools / "only"
    here.mkdir()
    for tool in ("bash", "dirname", "git", "cat"):
        (here / tool).symlink_to(shutil.which(tool) or tool)
    done = cloud.run("bash", cloud.clone / "launch" / script, *given, PATH=str(here))
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and message in done.stderr, done.stderr


@pytest.mark.parametrize("script", ["tpu_pod", "gke"])
def test_a_recipe_that_would_not_be_on_the_machines_is_refused(cloud: Cloud, script: str) -> None:
    """Before anything is asked for; under Slurm all nodes see the working tree itself."""
    options = {"tpu_pod": POD, "gke": ("--cluster=c", "--workload=w", "--type=v4-8")}
    (cloud.clone / "runs").mkdir()
    for recipe in (cloud.clone / "runs/mine.py", cloud.clone.parent / "mine.py"):
        shutil.copy(REPOSITORY / "configs/debug.py", recipe)
    cloud.run("git", "-C", cloud.clone, "init", "--quiet")
    shutil.copy(REPOSITORY / ".gitignore", cloud.clone)
    for config, message in (
        (f"{cloud.clone}/configs/debug.py:x", "as it is called in this working tree, --config=configs/debug.py"),
        ("../mine.py", "is outside of this working tree"),
        ("runs/mine.py", "git ignores it"),
    ):
        main = (f"--config={config}", "--workdir=gs://bucket/folder")
        done = cloud.launch(script, *options[script], "--dry-run", main=main)
        assert done.returncode == 1 and done.stderr.count("\n") == 1 and message in done.stderr, done.stderr
        done = cloud.launch("slurm", "--dry-run", main=main)
        assert done.returncode == 0, done.stderr
    main = ("--config=configs/debug.py", "--workdir=gs://bucket/folder")
    assert cloud.launch(script, *options[script], "--dry-run", main=main).returncode == 0
    assert cloud.calls() == []


@pytest.mark.parametrize("script", ["tpu_pod", "gke", "slurm", "on_worker", "pack"])
def test_help_names_every_option_and_docs_do_too(cloud: Cloud, script: str) -> None:
    done = cloud.run("bash", cloud.clone / "launch" / script, "--help")
    assert done.returncode == 0 and done.stdout.startswith(f"Usage: bash launch/{script} "), done.stderr
    text = (cloud.clone / "launch" / script).read_text()
    options = {word for line in text.split("parse_options ")[1:] for word in line.split(' "$@"')[0].split('"')}
    names = {name for word in options for name in word.split() if name not in ("\\",)}
    page = (REPOSITORY / "docs/launch.md").read_text()
    assert f"launch/{script}" in page
    for name in names:
        assert f"--{name}" in done.stdout and f"--{name}" in page, name
    assert names or script in ("on_worker", "pack")


def test_a_working_tree_is_packed_without_what_git_ignores(cloud: Cloud) -> None:
    git = ["git", "-C", str(cloud.clone), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    (cloud.clone / ".gitignore").write_text("/runs/\n.venv/\n")
    (cloud.clone / "gone").touch()
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        assert cloud.run(*git, *command).returncode == 0
    (cloud.clone / "gone").unlink()
    (cloud.clone / "a new\nfile").write_text("new")
    (cloud.clone / "setup.py").write_text("# changed\n")
    for ignored in ("runs/data", ".venv/bin/python"):
        (cloud.clone / ignored).parent.mkdir(parents=True)
        (cloud.clone / ignored).touch()
    wanted = {"setup.py", "pyproject.toml", "configs/debug.py", ".gitignore", "a new\nfile", "launch/pack"}

    target = cloud.folder / "tree.tar.gz"
    assert cloud.run("bash", cloud.clone / "launch/pack", target).returncode == 0
    with tarfile.open(target) as archive:
        names = set(archive.getnames())
        assert archive.extractfile("setup.py").read() == b"# changed\n"
    assert wanted <= names and not {"gone", "runs/data", ".venv/bin/python"} & names

    folder = cloud.folder / "tree"
    for _ in range(2):  # a second time it is emptied first
        assert cloud.run("bash", cloud.clone / "launch/pack", folder).returncode == 0
        found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        assert found == names | {".packed"}
        (folder / "left over").touch()
    (folder / ".packed").unlink()
    refused = cloud.run("bash", cloud.clone / "launch/pack", folder)
    assert refused.returncode == 1 and "launch/pack did not write" in refused.stderr
    assert (folder / "left over").exists()

    shutil.rmtree(cloud.clone / ".git")
    assert cloud.run("bash", cloud.clone / "launch/pack", target).returncode == 0
    with tarfile.open(target) as archive:
        names = {name.removeprefix("./") for name in archive.getnames()}
    assert wanted <= names and not {"runs/data", ".venv/bin/python"} & names
