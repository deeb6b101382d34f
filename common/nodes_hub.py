"""Machine 0's side of what the launchers of a job's machines say to each other (common/nodes_link.py)."""

from __future__ import annotations

import contextlib
import socket
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Callable

from common.errors import UserError
from common.nodes import Place
from common.nodes_link import HURRY, STOP, Failure, Go, Link, Wire, plain

if TYPE_CHECKING:
    from common.nodes_remote import Remote

LATE_SECONDS = 10.0
"""How long machine 0, whose job is over before its start, waits for others to tell them."""


@dataclass
class _Machine:
    """Another machine, as machine 0 sees it."""

    index: int
    host: str
    wire: Wire
    report: dict[str, Any] | None = None
    ended: bool = False

    @property
    def name(self) -> str:
        return f"machine {self.index} ({self.host})"


class Hub(Link):
    """Machine 0: hears of everything, and tells all."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.summon: Callable[[], Remote] | None = None
        """Starts the others, where they do not start by themselves; called when this machine is ready."""
        self.remote: Remote | None = None
        """What has started them."""
        self.machines: dict[int, _Machine] = {}
        self.failures: list[Failure] = []
        self.code = 0
        self.interrupted = self.stopping = False
        self.waited = False
        """Whether there was time enough for all to come."""
        self._new: list[Wire] = []
        self._listener = self._listen(place.port)

    @staticmethod
    def _listen(port: int) -> socket.socket:
        try:
            try:
                listener = socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=64)
            except (OSError, ValueError):  # no IPv6 here
                listener = socket.create_server(("", port), backlog=64)
        except OSError as error:
            raise UserError(f"port {port}, at which the other machines report: {error.strerror}: choose another one") from error
        listener.setblocking(False)
        return listener

    # -- before the start

    def start(
        self,
        report: dict[str, Any],
        check: Callable[[dict[str, Any]], str | None] = lambda report: None,
        timeout_seconds: float = 600.0,
        silence_seconds: float = 30.0,
        free_port: Callable[[], int] = lambda: 0,
        environment: dict[str, str] | None = None,
    ) -> Go:
        """check: a machine's report -> what is wrong with it, or None. Raises UserError, naming the machine."""
        if self.summon is not None:
            self.remote = self.summon()
        others = range(1, self.place.number)
        deadline, told = time.monotonic() + timeout_seconds, time.monotonic() + 5.0
        while missing := [i for i in others if i not in self.machines or self.machines[i].report is None]:
            self._accept()
            for machine in self.machines.values():
                for message in machine.wire.receive():
                    if message["kind"] == "hello":
                        machine.report = message["report"]
                    elif message["kind"] == "leave":
                        raise UserError(f"{machine.name}: {(message['line'] or 'has ended').removeprefix('error: ')}")
                    elif message["kind"] == "order":
                        raise UserError(f"{machine.name}: was ended by a signal before it was ready")
                machine.wire.beat()
                if not machine.wire.is_open:
                    raise UserError(f"{machine.name}: its launcher ended before it was ready: see its output")
            for index, why in self.remote.absent().items() if self.remote is not None else []:
                if index in missing:
                    raise UserError(f"machine {index} ({self._host_of(index)}): {why}")
            if time.monotonic() > deadline:
                self.waited = True
                names = ", ".join(f"{i} ({self._host_of(i)})" for i in missing)
                raise UserError(
                    f"machine {names}: not there after {timeout_seconds:.0f} s (system.start_timeout_seconds): is the job started "
                    f"on it, and can it reach port {self.place.port} of {self.place.address}?"
                )
            if told is not None and time.monotonic() > told:
                print(f"waiting for machine {', '.join(map(str, missing))}", flush=True)
                told = None
            time.sleep(0.02)
        for index in others:
            machine = self.machines[index]
            assert machine.report is not None
            wrong = check(machine.report)
            if wrong is not None:
                raise UserError(f"{machine.name} {wrong}")
        self.go = Go(self.local_address(), free_port(), silence_seconds, environment or {})
        for machine in self.machines.values():
            machine.wire.last_heard = time.monotonic()  # until now it may have been busy
            machine.wire.send("go", **asdict(self.go))
        return self.go

    def _host_of(self, index: int) -> str:
        if index in self.machines:
            return self.machines[index].host
        return self.place.hosts[index] if index < len(self.place.hosts) else "not yet heard of"

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                break
            self._new.append(Wire(connection))
        for wire in list(self._new):
            try:
                messages = wire.receive()
            except ValueError:  # a port scanner, another program
                self._new.remove(wire)
                wire.close()
                continue
            for message in messages[:1]:
                self._new.remove(wire)
                wire.unread = messages[1:]
                index, number = message.get("index"), message.get("number")
                if message["kind"] != "name" or index is None:
                    wire.close()
                elif number != self.place.number:
                    raise UserError(
                        f"machine {index} ({message['host']}): takes itself for one of {number} machines, machine 0 for one of "
                        f"{self.place.number}: give them the same variables"
                    )
                elif index in self.machines or not 0 < index < self.place.number:
                    raise UserError(
                        f"machine {index} ({message['host']}): "
                        f"{self.machines[index].host if index in self.machines else 'this machine'} has the same index: "
                        "give every machine its own, from 0"
                    )
                else:
                    self.machines[index] = _Machine(index, message["host"], wire)
            if wire in self._new and not wire.is_open:
                self._new.remove(wire)

    # -- while the processes run

    def tick(self) -> list[str]:
        now = time.monotonic()
        assert self.go is not None
        for machine in self.machines.values():
            for message in machine.wire.receive():
                self._hear(machine, message)
            if machine.ended:
                continue
            silent = now - machine.wire.last_heard
            if not machine.wire.is_open:
                self._lose(machine, "its connection broke: the machine, or the launcher on it, has ended")
            elif silent > self.go.silence_seconds:
                self._lose(machine, f"nothing heard of it for {silent:.0f} s: the machine or the network is down")
            else:
                machine.wire.beat()
        if self.remote is not None:
            self.remote.forward()
        return self._take_orders()

    def _wires(self) -> list[Wire]:
        return [machine.wire for machine in self.machines.values()]

    def _hear(self, machine: _Machine, message: dict[str, Any]) -> None:
        kind = message["kind"]
        if kind == "failed":
            self._stop()
        elif kind == "order":
            self.interrupted = True
            self._tell_all(message["order"], but=machine)
            self.orders.append(message["order"])
        elif kind == "ended":
            machine.ended = True
            self.code = self.code or message["code"]
            if message["failure"] is not None:
                self._fail(Failure(**message["failure"]))
            self._one_has_ended()

    def _lose(self, machine: _Machine, how: str) -> None:
        machine.ended = True
        machine.wire.close()
        self._fail(Failure(0, 0.0, 1, f"error: {machine.name} is lost: {how}"))
        self._one_has_ended()

    def _fail(self, failure: Failure) -> None:
        failure.age = time.monotonic() - failure.age
        self.failures.append(failure)
        self._stop()

    def _stop(self) -> None:
        if not self.interrupted and not self.stopping:
            self.stopping = True
            self.orders.append(STOP)
            self._tell_all(STOP)

    def _one_has_ended(self) -> None:
        if self.interrupted:
            self._tell_all(HURRY)
            self.orders.append(HURRY)

    def _tell_all(self, order: str, but: _Machine | None = None) -> None:
        for machine in self.machines.values():
            if machine is not but and machine.wire.is_open:
                machine.wire.send("order", order=order)

    def tell_order(self, order: str) -> None:
        self.interrupted = True
        self._tell_all(order)

    def tell_failure(self) -> None:
        self._stop()

    def tell_end(self, code: int, failure: Failure | None) -> None:
        self.has_ended = True
        self.code = self.code or code
        if failure is not None:
            self._fail(failure)
        self._one_has_ended()

    def local_address(self) -> str:
        return plain(self.machines[1].wire.connection.getsockname()[0])

    def is_over(self) -> bool:
        return self.has_ended and all(machine.ended for machine in self.machines.values())

    def _leave(self, code: int, line: str | None) -> tuple[int, str | None]:
        if self.is_over():
            cause = min(self.failures, key=lambda f: (f.order, f.age), default=None)
            code, line = (cause.code, cause.line) if cause is not None else (self.code, None)
        # Those that were started by hand or by Slurm may come a little later: they would knock at a closed door for minutes.
        late = self.go is None and self.summon is None and not self.waited
        deadline = time.monotonic() + (LATE_SECONDS if late else 0.0)
        told: set[int] = set()
        while True:
            with contextlib.suppress(UserError):
                self._accept()
            for machine in self.machines.values():
                if machine.index not in told and machine.wire.is_open:
                    machine.wire.send("leave", code=code, line=line)
                machine.wire.close()
                told.add(machine.index)
            if len(told) == self.place.number - 1 or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        self._listener.close()
        if self.remote is not None:
            self.remote.close()
        return code, line
