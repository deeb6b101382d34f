"""What the launchers of a job's machines say to each other: that they are ready, that they live, and how they ended.

Training traffic goes through torch's, accelerate's and DeepSpeed's collectives alone. Those notice a dead machine or a broken
network late (NCCL and gloo wait for hours, as they must: a rank may be waiting for the longest answer), and never say which
machine it was. So the launchers, one per machine, hold a TCP connection each to that of machine 0, over which a few short lines of
JSON go: a beat per second, Ctrl-C, the first cause of an end. Whoever hears nothing for `system.silence_timeout_seconds` ends its
own processes. Nothing else is sent, and no command: every machine runs the command line that it was started with.

    machine i                                machine 0
    hello {report}            ->             compares the reports of all
                              <-             go {port, environment, ...}   or   leave {code, line}
    beat                      <->            beat
    failed                    ->             stop                          -> everybody ends its processes
    ended {code, failure}     ->             (all have ended) leave {code, line}

There are no threads: the launcher's loop calls `tick`.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from common.errors import UserError, warn
from common.nodes import Place

BEAT_SECONDS = 1.0
CONNECT_SECONDS = 600.0
"""How long another machine tries to reach machine 0, and ..."""
SUMMONED_SECONDS = 10.0
"""... how long where machine 0 has started it, or where it only says that it has ended."""
INTERRUPT, KILL, TERMINATE, STOP, HURRY = "interrupt", "kill", "terminate", "stop", "hurry"
"""What machines are told to do with their processes: a first Ctrl-C, a second one, SIGTERM, another one has failed, others have
ended after Ctrl-C."""


class Left(Exception):
    """The job is over for this machine before its processes were started: exit `code`, with `line` on the terminal."""

    def __init__(self, code: int, line: str | None) -> None:
        super().__init__(line)
        self.code, self.line = code, line


@dataclass
class Failure:
    """Why a machine ends."""

    order: int
    """Which of several is the cause: a lost machine (0), a killed process (1), what a process said or how it ended (2)."""
    age: float
    """Seconds since it happened; on machine 0: the time of its clock when it happened."""
    code: int
    line: str


class Wire:
    """Lines of JSON over one TCP connection, never blocking."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection = connection
        self.last_heard = self.last_beat = time.monotonic()
        self.is_open = True
        self.unread: list[dict[str, Any]] = []
        """Messages that came together with one that was taken before them."""
        self._received, self._unsent = b"", b""

    def send(self, kind: str, **content: Any) -> None:
        self._unsent += json.dumps({"kind": kind, **content}).encode() + b"\n"
        self._flush()

    def beat(self) -> None:
        if time.monotonic() - self.last_beat > BEAT_SECONDS:
            self.last_beat = time.monotonic()
            self.send("beat")

    def receive(self) -> list[dict[str, Any]]:
        """What has come since the last call; `is_open` is False from then on where it was the end. Raises ValueError where it is
        nothing of ours."""
        self._flush()
        while self.is_open:
            try:
                data = self.connection.recv(1 << 16)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            if not data:
                self.is_open = False
                break
            self.last_heard = time.monotonic()
            self._received += data
        *lines, self._received = self._received.split(b"\n")
        unread, self.unread = self.unread, []
        return unread + [_message(line) for line in lines if line]

    def _flush(self) -> None:
        while self.is_open and self._unsent:
            try:
                self._unsent = self._unsent[self.connection.send(self._unsent) :]
            except BlockingIOError:
                return
            except OSError:
                self.is_open = False

    def close(self) -> None:
        """What is still to be sent goes on its way first, if the other side takes it within a second."""
        deadline = time.monotonic() + 1.0
        self._flush()
        while self._unsent and self.is_open and time.monotonic() < deadline:
            time.sleep(0.01)
            self._flush()
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
        self.connection.close()
        self.is_open = False


@dataclass
class Go:
    """With what a machine's processes start."""

    address: str
    """Where the ranks meet: machine 0, ..."""
    port: int
    """... at a port of their own."""
    silence_seconds: float
    environment: dict[str, str] = field(default_factory=dict)
    """Variables of machine 0 for the processes of the others."""


class Link:
    """This machine's side. `Hub` (common/nodes_hub.py) is machine 0's, `Spoke` that of any other."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.go: Go | None = None
        self.orders: list[str] = []
        self.has_ended = False
        """Whether this machine's own processes have all ended."""
        self.parted: tuple[int, str | None] | None = None
        """With what, once it has left."""

    def start(self, report: dict[str, Any]) -> Go:
        """Wait until all machines are there and alike. Raises Left where they are not, UserError on machine 0."""
        raise NotImplementedError

    def tick(self) -> list[str]:
        """Exchange what there is, without waiting; returns what this machine has to do, in order."""
        raise NotImplementedError

    def wait(self, seconds: float) -> None:
        """Until something comes, but no longer. What is told is told with its age, so it must not lie about."""
        wires = [wire.connection for wire in self._wires() if wire.is_open]
        if wires:
            select.select(wires, [], [], seconds)
        else:
            time.sleep(seconds)

    def _wires(self) -> list[Wire]:
        raise NotImplementedError

    def tell_order(self, order: str) -> None:
        """A signal came here: the other machines are to act on it too."""
        raise NotImplementedError

    def tell_failure(self) -> None:
        """A process of this machine has failed; why is told at the end, when more is known."""
        raise NotImplementedError

    def tell_end(self, code: int, failure: Failure | None) -> None:
        """All processes of this machine have ended."""
        raise NotImplementedError

    def is_over(self) -> bool:
        """Whether nothing is left to wait for."""
        raise NotImplementedError

    def local_address(self) -> str:
        """This machine's address on the network that it shares with the others."""
        raise NotImplementedError

    def leave(self, code: int = 0, line: str | None = None) -> tuple[int, str | None]:
        """Part from the others. `code` and `line`: what they should end with, unless the job has come to an end of its own. Returns
        what this one should end with."""
        if self.parted is None:
            self.parted = self._leave(code, line)
        return self.parted

    def _leave(self, code: int, line: str | None) -> tuple[int, str | None]:
        raise NotImplementedError

    def _take_orders(self) -> list[str]:
        orders, self.orders = self.orders, []
        return orders


class Spoke(Link):
    """Any other machine: knows machine 0 alone."""

    def __init__(self, place: Place, only_leaves: bool = False) -> None:
        """Connects. Raises UserError where machine 0 cannot be reached in time. only_leaves: to say that there will be no start."""
        super().__init__(place)
        # One that machine 0 has started comes to an open door, or to a job that is over by now.
        is_short = place.started_by_machine_0 or only_leaves
        self.wire = Wire(_connect(place, SUMMONED_SECONDS if is_short else CONNECT_SECONDS, tells=not only_leaves))
        self.wire.send("name", index=place.index, number=place.number, host=socket.gethostname())
        self.verdict: tuple[int, str | None] | None = None

    def start(self, report: dict[str, Any]) -> Go:
        self.wire.send("hello", report=report)
        while self.go is None:
            for message in self.wire.receive():
                if message.pop("kind") == "go":
                    self.go = Go(**message)
                elif "line" in message:
                    raise Left(message["code"], message["line"])
            if self.go is None and not self.wire.is_open:
                raise Left(1, f"error: machine 0 ({self.place.address}) has ended before the start: see its output")
            self.wire.beat()
            time.sleep(0.02)
        self.wire.last_heard = time.monotonic()
        return self.go

    def tick(self) -> list[str]:
        assert self.go is not None
        for message in self.wire.receive():
            if message["kind"] == "order":
                self.orders.append(message["order"])
            elif message["kind"] == "leave":
                self.verdict = message["code"], message["line"]
                if not self.has_ended:  # machine 0 has given up on this one
                    self.orders.append(STOP)
        silent = time.monotonic() - self.wire.last_heard
        if self.verdict is None:
            machine_0 = f"error: machine 0 ({self.place.address}) is lost"
            if not self.wire.is_open:
                self.verdict = 1, f"{machine_0}: its connection broke: the machine, or the launcher on it, has ended"
            elif silent > self.go.silence_seconds:
                self.verdict = 1, f"{machine_0}: nothing heard of it for {silent:.0f} s: the machine or the network is down"
            if self.verdict is not None:
                self.orders.append(STOP)
        self.wire.beat()
        return self._take_orders()

    def _wires(self) -> list[Wire]:
        return [self.wire]

    def tell_order(self, order: str) -> None:
        self.wire.send("order", order=order)

    def tell_failure(self) -> None:
        self.wire.send("failed")

    def tell_end(self, code: int, failure: Failure | None) -> None:
        self.has_ended = True
        self.wire.send("ended", code=code, failure=None if failure is None else asdict(failure))

    def local_address(self) -> str:
        return plain(self.wire.connection.getsockname()[0])

    def is_over(self) -> bool:
        return self.has_ended and self.verdict is not None

    def _leave(self, code: int, line: str | None) -> tuple[int, str | None]:
        if self.go is None and self.wire.is_open:
            self.wire.send("leave", code=code, line=line)
        self.wire.close()
        return self.verdict if self.verdict is not None else (code, line)


def _message(line: bytes) -> dict[str, Any]:
    message = json.loads(line)
    if not isinstance(message, dict) or "kind" not in message:
        raise ValueError("no message of a launcher")
    return message


def _connect(place: Place, timeout_seconds: float, tells: bool = True) -> socket.socket:
    deadline, told = time.monotonic() + timeout_seconds, not tells
    while True:
        try:
            connection = socket.create_connection((place.address, place.port), timeout=10.0)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            return connection
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"machine 0 ({place.address}, port {place.port}): not reached in {timeout_seconds:.0f} s "
                    f"({error.strerror or error}): is the job started there, and is that its address?"
                ) from error
            if not told:
                told = True
                warn(f"machine 0 ({place.address}, port {place.port}) does not answer yet ({error.strerror or error}): waiting")
        time.sleep(0.2)


def plain(address: str) -> str:
    """An IPv4 address that a dual-stack socket shows as one of IPv6."""
    return address.removeprefix("::ffff:")
