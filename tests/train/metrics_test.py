from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
import pytest
from etils import epath

from coca_jax import chips
from coca_jax.config import ConfigError
from coca_jax.train import metrics
from coca_jax.train.profile import Profile, Steps, read_steps
from tests import faulty


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that a rate sees: set its only element."""
    now = [0.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    return now


def progress(clock: list[float]) -> metrics.Progress:
    """After three steps, half a second each: the first compiles and does not count."""
    line = metrics.Progress(0, 10, batch_size=32, step_flops=4e12)
    for step in (1, 2, 3):
        clock[0] += 0.5 if step > 1 else 90.0
        line.update(step, {"loss": 1.0})
    line.close()
    return line


def test_rates_are_those_of_a_device(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    n = jax.device_count()
    rates = progress(clock).rates
    assert rates == pytest.approx(
        {
            "examples_per_second": 64.0,
            "images_per_second_per_device": 64.0 / n,
            "model_tflops_per_device": 8.0 / n,
        }
    )  # no MFU: what a CPU could do is not in the table


def test_the_share_of_the_peak_is_given_for_known_chips(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chip = chips.tpu("v5e")
    monkeypatch.setattr(metrics.chips, "from_device_kind", lambda kind: chip)
    assert progress(clock).rates["mfu"] == pytest.approx(8.0 / jax.device_count() / 197)
    assert f"MFU {8.0 / jax.device_count() / 197:.1%}" in capsys.readouterr().err


def test_nothing_is_said_of_a_rate_before_it_is_known() -> None:
    line = metrics.Progress(0, 10, batch_size=32, step_flops=4e12)
    line.update(1, {"loss": 1.0})
    line.close()
    assert line.rates == {"examples_per_second": 0.0}


def test_steps_to_trace() -> None:
    assert read_steps("", 10) is None
    assert read_steps("3:5", 10) == Steps(3, 5) and read_steps("10:10", 10) == Steps(10, 10)
    for text in ("3", "a:b", "5:3", "0:3", "3:", "3:5:7", "-1:2"):
        with pytest.raises(ConfigError, match=f"--profile={text} is not start:stop"):
            read_steps(text, 10)
    with pytest.raises(ConfigError, match=r"--profile=3:11 goes beyond the run, which ends at config\.steps=10"):
        read_steps("3:11", 10)


def test_the_steps_asked_for_are_traced(tmp_path: pathlib.Path) -> None:
    profile = Profile(epath.Path(tmp_path), Steps(3, 4), start_step=1)
    function = jax.jit(lambda x: x @ x)
    written = []
    for step in range(2, 7):
        with profile.step(step):
            y = function(jnp.ones((4, 4)))
        written.append(profile.after(step, y))
    profile.close()
    assert written == [False, False, True, False, False]
    (trace,) = tmp_path.glob("profile/plugins/profile/*/*.xplane.pb")
    # Names of steps are in the trace as text: the first and the last of them, and no other.
    assert b"train" in trace.read_bytes()


def test_what_was_traced_is_kept_where_the_run_ends_before(tmp_path: pathlib.Path) -> None:
    profile = Profile(epath.Path(tmp_path), Steps(1, 9), start_step=0)
    with profile.step(1):
        pass
    profile.close()
    assert list(tmp_path.glob("profile/plugins/profile/*/*.xplane.pb"))


def test_steps_that_are_past_are_not_traced(tmp_path: pathlib.Path) -> None:
    profile = Profile(epath.Path(tmp_path), Steps(2, 3), start_step=2)
    for step in (3, 4):
        with profile.step(step):
            pass
        assert not profile.after(step, jnp.ones(()))
    profile.close()
    assert not (tmp_path / "profile").exists()


def test_a_bucket_that_does_not_answer_gets_every_line_once(
    clock: list[float], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # TensorBoard's writer takes this bucket for a folder
    bucket, path = faulty.register(), epath.Path("az://bucket/run")
    writer = metrics.Writer(path, 0)
    writer.write(1, {"loss": 1.0})
    bucket.faults["write"].extend([ConnectionResetError("reset by peer"), faulty.Throttled("slow down")] * 2)
    tried: list[float] = []
    for step in range(2, 30):
        clock[0] += 1.0
        before = bucket.asked["write"]
        writer.write(step, {"loss": 1.0 / step})
        tried += [clock[0]] * (bucket.asked["write"] - before)
        if len(tried) < 5:  # until then nothing is there but the first, and nothing is lost
            assert [line["step"] for line in metrics.read_lines(path / metrics.METRICS_FILE)] == [1]
    writer.close()
    # Tried again after 1, 2, 4 and 8 seconds, and then at every step.
    assert tried[:6] == [1.0, 2.0, 4.0, 8.0, 16.0, 17.0]
    assert [line["step"] for line in metrics.read_lines(path / metrics.METRICS_FILE)] == list(range(1, 30))
