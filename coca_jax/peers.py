"""Which processes of a job are alive, and how the others end when one is not.

Each process keeps a connection to process 0 and sends a beat over it; process 0 answers with its own and tells all when
one is gone. JAX's coordination service watches the processes too, but it ends them with `abort`, and not before the
timeout of its heartbeat: it is the second to find out, and the only one where these connections are not to be had.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import json
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any, NoReturn

EXIT_LOST = 75  # EX_TEMPFAIL: another process is gone, and nothing is wrong with this one
_LONGEST_LINE = 65_536  # bytes; who sends more is none of ours
_OWN_ERROR = 15.0  # seconds after another's error in which this process may find the same one and say so itself
_VERDICT = 1.0  # seconds in which the connections must show what another watcher has noticed

newest_checkpoint: int | None = None  # the step of it, kept up to date by the run


class Peers:
    """The watcher of one process: a thread that beats, listens, and ends the process when another one is lost.

    Process 0 makes it first, and the others with its `address`.

    Attributes:
      address: port, token and host of process 0, for the others.
    """

    def __init__(self, index: int, hosts: Sequence[str], heartbeat: float, address: Sequence[Any] = ()) -> None:
        """
        Args:
          index: number of this process.
          hosts: names of the machines, one for each process.
          heartbeat: seconds of silence after which a process counts as lost.
          address: where process 0 listens (port, token, names of its host); empty: this is process 0.

        Raises:
          OSError: process 0 cannot be reached there, or cannot listen.
        """
        self._index, self._hosts, self._heartbeat = index, list(hosts), heartbeat
        self._beat = min(5.0, heartbeat / 5)
        self._selector, self._links = selectors.DefaultSelector(), dict[socket.socket, _Link]()
        self._quiet = threading.Event()
        self._error, self._error_until = "", 0.0
        if address:
            port, self._token, *names = address
            link = _Link(_connect(port, names), 0)
            self._watch(link)
            link.send({"process": index, "token": self._token})
            self.address: list[Any] = list(address)
        else:
            both = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if both else socket.AF_INET
            listener = socket.create_server(("", 0), family=family, dualstack_ipv6=both, backlog=len(hosts))
            listener.setblocking(False)
            self._selector.register(listener, selectors.EVENT_READ)
            self._token = secrets.token_hex(16)
            self.address = [listener.getsockname()[1], self._token, socket.gethostname()]
        threading.Thread(target=self._run, name="peers", daemon=True).start()
        atexit.register(self.leave)

    def leave(self, error: str = "") -> None:
        """Tells the others that this process ends on purpose; from now on it is not ended for their sake.

        Args:
          error: what is wrong here; they end with it as the cause, unless they find the same.
        """
        if not self._quiet.is_set():
            self._quiet.set()
            self._send({"failed": self._index, "error": error} if error else {"bye": self._index})

    def _run(self) -> None:
        beaten, looked = 0.0, time.monotonic()
        while not self._quiet.is_set():
            events = self._selector.select(self._beat / 2)
            now = time.monotonic()
            if now - looked > self._beat + 2:  # this process stood still itself: it has heard nothing
                for link in self._links.values():
                    link.heard = now
            looked = now
            for key, _ in events:
                if isinstance(key.fileobj, socket.socket):
                    self._read(key.fileobj, now) if key.fileobj in self._links else self._accept(key.fileobj)
            if now - beaten > self._beat:
                self._send({})
                beaten = now
            for link in list(self._links.values()):
                silent = now - link.heard
                if link.index >= 0 and silent > self._heartbeat:
                    since = time.strftime("%H:%M:%S", time.localtime(time.time() - silent))
                    self._lost(
                        f"{self._name(link.index)} has given no sign of life for {silent:.0f} s, since {since}: it is "
                        "stopped, or its machine or the network is gone"
                    )
            if self._error and now > self._error_until:
                self._lost(self._error)

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            self._watch(_Link(listener.accept()[0], -1))

    def _watch(self, link: _Link) -> None:
        link.socket.setblocking(False)
        self._links[link.socket] = link
        self._selector.register(link.socket, selectors.EVENT_READ)

    def _forget(self, link: _Link) -> None:
        self._selector.unregister(link.socket)
        del self._links[link.socket]
        link.socket.close()

    def _read(self, connection: socket.socket, now: float) -> None:
        link = self._links[connection]
        lines, is_open = link.receive()
        for message in lines:
            link.heard = now
            if link.index < 0:
                if message.get("token") != self._token or message.get("process") not in range(1, len(self._hosts)):
                    return self._forget(link)
                link.index = int(message["process"])
            elif "lost" in message:
                self._lost(str(message["lost"]))
            elif "failed" in message:
                if not self._error:
                    self._error = f"{self._name(message['failed'])} has ended: {message['error']}"
                    self._error_until = now + _OWN_ERROR
                    self._send(message, but=link)
            elif "bye" in message:
                return self._forget(link)
        if not is_open:
            self._forget(link)
            if link.index >= 0:
                at = time.strftime("%H:%M:%S")
                self._lost(
                    self._error
                    or f"{self._name(link.index)} is gone: its connection closed at {at} without a word; it was killed "
                    "or crashed, or its machine or the network is gone"
                )

    def _lost(self, what: str) -> None:
        if self._quiet.is_set():
            return
        if self._index == 0:
            self._send({"lost": what})
            # JAX's service ends with this process, and with it the others: they are to have read the message.
            time.sleep(0.3)
        end(f"process {self._index} of {len(self._hosts)}: {what}")

    def _send(self, message: dict[str, Any], but: _Link | None = None) -> None:
        for link in list(self._links.values()):
            if link is not but and link.index >= 0:
                link.send(message)

    def _name(self, index: int) -> str:
        return f"process {index} of {len(self._hosts)} (on {self._hosts[index]})"


class _Link:
    """A connection that carries lines of JSON; `index` is the process at its other end, -1 until that has said so."""

    def __init__(self, connection: socket.socket, index: int) -> None:
        self.socket, self.index, self.heard = connection, index, time.monotonic()
        self._rest = b""

    def send(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # closed, or full: the next read or its silence tells
            self.socket.send(json.dumps(message).encode() + b"\n")

    def receive(self) -> tuple[list[dict[str, Any]], bool]:
        """The messages that have come, and whether the connection is still open."""
        try:
            data = self.socket.recv(_LONGEST_LINE)
        except BlockingIOError:
            return [], True
        except OSError:
            return [], False
        *lines, self._rest = (self._rest + data).split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            return [], False
        good = len(self._rest) < _LONGEST_LINE and all(isinstance(message, dict) for message in messages)
        return (messages, bool(data)) if good else ([], False)


def _connect(port: int, names: Sequence[str]) -> socket.socket:
    """The first of several names of a host that answers."""
    problem = OSError("no name")
    for name in names:
        try:
            return socket.create_connection((name, port), timeout=10)
        except OSError as error:
            problem = error
    raise problem


_ending = threading.Lock()  # never given back: there is one line


def end(what: str) -> NoReturn:
    """Ends the process with EXIT_LOST, whatever its other threads wait for; prints `what`, and what to do."""
    _ending.acquire()
    try:
        newest = "they go on from the newest checkpoint" + (f", step {newest_checkpoint}" if newest_checkpoint else "")
        os.write(
            2, f"{' '.join(what.split())}. Start all again (a supervisor does): {newest}\n".encode("utf-8", "replace")
        )
        flushing = threading.Thread(target=sys.stdout.flush, daemon=True)
        flushing.start()
        flushing.join(0.5)  # a terminal may not answer
    finally:
        os._exit(EXIT_LOST)


# ---------------------------------------------------------------------------------------------------------------------
# JAX's own end

_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)
_handlers: list[Any] = []  # the C library calls it: it must live


def end_instead_of_abort(who: str) -> None:
    """Makes an `abort` of this process, as JAX ends one that has lost another, a line and EXIT_LOST.

    JAX takes a callback for this, but cannot call it from Python: jaxlib 0.10 to 0.12 ends with std::bad_cast. The
    handler is the C library's: one of Python's would run in the main thread, later, and `abort` does not wait.

    Args:
      who: which process this is.
    """

    def handle(_: int) -> None:
        time.sleep(_VERDICT)  # the connections to the others show more, and whose loss it is
        end(
            f"{who}: aborted (see above), by JAX where another process is gone or process 0 cannot be reached, else by "
            "a fault in a library"
        )

    if not _handlers:
        _handlers.append(_HANDLER(handle))
        library = ctypes.CDLL(None)
        library.signal.argtypes, library.signal.restype = (ctypes.c_int, _HANDLER), ctypes.c_void_p
        library.signal(int(signal.SIGABRT), _handlers[0])
