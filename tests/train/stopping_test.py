"""What a request to end does: in processes of their own, as most of it ends them."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
import textwrap

import pytest

from coca_jax.train.stopping import EXIT_STOPPED, Interrupted, Stopping
from tests import conftest

NOTHING = "stopped: there is nothing new to save"

PLACES = {
    "where Python works": "ask(); loop()",
    "by a lost terminal": "os.kill(os.getpid(), signal.SIGHUP); loop()",
    "in a call that Python cannot leave": "threading.Timer(0.5, ask).start(); pbkdf2_hmac('md5', b'', b'', 1 << 30)",
    "in the garbage collector": "gc.callbacks.append(lambda *_: ask()); gc.collect(); loop()",  # forgets what is raised
    "in a weak reference's callback": "x = set(); r = weakref.ref(x, lambda _: ask()); del x; loop()",  # and this one
    "as a thread starts": "ask(); Slow().start()",  # which could not be joined
}


def ended(body: str, grace: float = 240.0) -> subprocess.CompletedProcess[str]:
    """A program in a Stopping: body, and then the word `over`."""
    program = f"""
        import gc, multiprocessing, os, signal, threading, time, weakref
        from hashlib import pbkdf2_hmac
        from coca_jax.train import stopping

        def ask():
            os.kill(os.getpid(), signal.SIGTERM)

        def loop(*_):
            while True:
                time.sleep(0.01)

        class Slow(threading.Thread):
            _bootstrap_inner = loop  # without a word that it has begun

            def __init__(self):
                super().__init__(daemon=True)

        with stopping.Stopping({grace}) as stop:
            stop.held.callback(print, "given back")
            {body}
        print("over")
    """
    return run(program)


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=conftest.REPOSITORY,
        env=os.environ | conftest.BYTECODE,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.usefixtures("hangup")
@pytest.mark.parametrize("place", PLACES)
def test_with_nothing_to_save_it_ends_wherever_it_is(place: str) -> None:
    done = ended(PLACES[place])
    assert done.returncode == EXIT_STOPPED and done.stdout.split("\n") == ["given back", "", NOTHING, ""], done
    assert not done.stderr


def test_what_is_not_given_back_in_time_is_left() -> None:
    done = ended("stop.held.callback(loop); ask(); loop()")
    assert done.returncode == EXIT_STOPPED and NOTHING in done.stdout and "given back" not in done.stdout, done


def test_it_ends_though_nobody_reads_what_it_says() -> None:
    assert ended("os.close(1); ask(); loop()").returncode == EXIT_STOPPED


def test_readers_of_data_do_not_outlive_it() -> None:
    """One that did would hold the output, which is read to its end."""
    child = "multiprocessing.get_context('spawn').Process(target=time.sleep, args=(300,)).start()"
    done = ended(f"{child}; ask(); loop()")
    assert done.returncode == EXIT_STOPPED and NOTHING in done.stdout, done


def test_with_something_to_save_it_has_its_grace() -> None:
    done = ended("stop.unsaved = True; ask(); time.sleep(0.5); print(stop.asked())")
    assert (done.returncode, done.stdout) == (0, "True\ngiven back\nover\n"), done
    done = ended("stop.unsaved = True; ask(); loop()", grace=0.5)
    assert done.returncode == EXIT_STOPPED, done
    assert "stopped without saving: 0.5 s (config.checkpoint.grace) were not enough" in done.stdout


def test_it_is_noted_and_polled_and_a_second_ctrl_c_interrupts() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Stopping(grace=30.0) as stop:
        stop.unsaved = True
        stop.check()
        signal.raise_signal(signal.SIGINT)
        assert stop.asked()
        with pytest.raises(Interrupted):
            stop.check()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.usefixtures("hangup")
def test_a_terminal_that_goes_away_asks_too(tmp_path: pathlib.Path) -> None:
    """And printing to it ends nothing before all is saved: by SIGHUP, or by a supervisor's SIGTERM."""
    for number in (signal.SIGHUP, signal.SIGTERM):
        program = f"""
            import os, pty, signal, time
            from coca_jax.train import stopping

            reader, terminal = pty.openpty()
            os.dup2(terminal, 1)
            os.close(terminal)
            with stopping.Stopping(30) as stop:
                stop.unsaved = True
                print("seen", flush=True)
                os.close(reader)
                os.kill(os.getpid(), {number})
                while not stop.asked():
                    time.sleep(0.01)
                print("saved", flush=True)
                open({str(tmp_path / number.name)!r}, "w").close()
        """
        done = run(program)
        assert (done.returncode, done.stderr) == (0, "") and (tmp_path / number.name).exists(), done


def test_what_ignores_hang_ups_goes_on_doing_so() -> None:
    done = run("""
        import os, signal
        from coca_jax.train import stopping

        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        with stopping.Stopping(30) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            print(stop.asked())
    """)
    assert (done.returncode, done.stdout) == (0, "False\n"), done
