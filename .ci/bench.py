"""The benchmark: what a push, a pull and a hint cost, in one Markdown table.

    servers, on the first core                      this process, on the other cores
    mizusync, or a peer, on a file of its own  <--  one epoll loop: connections,
       ^                                            followers
       +-- /proc/PID/stat before and after each part: the CPU time that the server took

`python .ci/bench.py` takes under 4 minutes; `--quick` takes a third of that. `--old
FILE` compares another mizusync.py with this one, and counts the instructions of both,
in some 4 minutes. `--count` only counts instructions, under valgrind (`apt-get install
valgrind`): numbers that stay the same to 1 % on a busy machine. `--peers` adds what one
would write instead, bench_peers.py beside this file, for a Python that has the
packages: `python -m venv lab && lab/bin/pip install aiohttp fastapi msgspec
'uvicorn[standard]'`, and then `lab/bin/python .ci/bench.py --peers`. Linux only.

Of the times, trust "CPU us" most: the server's user and system time by the operation,
which neither a slow client nor a busy machine changes much. Where waiting is the point
there are wall-clock times, and in those this Python client has its share: some 20 us a
request. Compare numbers of one run only. Every answer is checked; what was wrong stands
below the table, and the exit status is 1."""

from __future__ import annotations

import argparse
import bisect
import contextlib
import functools
import heapq
import importlib.metadata
import itertools
import json
import os
import platform
import re
import resource
import select
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Self

from client import PING, PONG, TEXT, RawClient, measure_reply, raw, take_frame

HOST = "127.0.0.1"
PATIENCE = 60.0  # seconds until what must happen counts as never
# seconds of each part that are not counted: first uses of code, caches, the WAL
WARM_UP = 0.2
TAIL = 100  # changes: a page in its usual size
SMALL = 10_000  # changes in the smaller log of P7
TODOS = 50_000  # in the big snapshot
COUNT_WARM_UP = 3  # pushes of each row that are not counted

Right = Callable[[bytearray], bool]  # judges a whole answer
Row = tuple[str, str, Sequence[float]]  # what was done, the unit, the numbers


class Sizes(NamedTuple):
    """How much is measured; with less the table is sooner there, and less exact."""

    part: float = 1.5  # seconds of each part
    sessions: int = 3000
    log: int = 100_000  # changes in the log of P2 and P3
    big: int = 1_000_000  # changes in the larger log of P7


QUICK = Sizes(part=0.7, sessions=1000, log=20_000, big=200_000)

clock = time.perf_counter
# of mutations: an id that was used before would be a duplicate
numbers = itertools.count(1)
wrong: Counter[str] = Counter()  # every answer that was not right


def note_wrong(answer: bytes | bytearray) -> None:
    """Remember an answer that was not right."""
    wrong[answer[:200].decode(errors="replace")] += 1


# --- Loop -----------------------------------------------------------------------------
# select.epoll and a heap of timers: asyncio would cost the client more than the server
# its work.


class Loop:
    """Sockets that wait for bytes, and calls that wait for their time."""

    def __init__(self) -> None:
        self.epoll = select.epoll()
        self.readers: dict[int, Callable[[], None]] = {}
        self.timers: list[tuple[float, int, Callable[[], None]]] = []
        self.order = itertools.count()  # of timers that are due at the same time

    def add(self, sock: socket.socket, reader: Callable[[], None]) -> None:
        self.readers[sock.fileno()] = reader
        self.epoll.register(sock, select.EPOLLIN)

    def remove(self, sock: socket.socket) -> None:
        del self.readers[sock.fileno()]
        self.epoll.unregister(sock)
        sock.close()

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        heapq.heappush(self.timers, (clock() + seconds, next(self.order), call))

    def wait(self, done: Callable[[], object], seconds: float) -> bool:
        """Run until `done`, at most so many seconds; return whether it was done."""
        deadline = clock() + seconds
        while not done():
            if (now := clock()) >= deadline:
                return False
            if self.timers and self.timers[0][0] <= now:
                heapq.heappop(self.timers)[2]()
                continue  # that may be what was waited for
            wake = min(deadline, self.timers[0][0]) if self.timers else deadline
            for fd, _ in self.epoll.poll(max(0.0, wake - clock()), 256):
                if reader := self.readers.get(fd):
                    reader()
        return True

    def pause(self, seconds: float) -> None:
        self.wait(lambda: False, seconds)

    def until(self, done: Callable[[], object], what: str) -> None:
        if not self.wait(done, PATIENCE):
            raise TimeoutError(f"in {PATIENCE:.0f} s not: {what}")


# --- Server ---------------------------------------------------------------------------


class Server:
    """A process of its own, on a database of its own.

    A database that is named stays when the server ends.
    """

    def __init__(
        self,
        command: Sequence[str],
        loop: Loop,
        folder: Path,
        db: Path | None = None,
        core: int = 0,
    ) -> None:
        self.loop = loop
        self.is_own_db = db is None
        self.db = db or folder / f"{next(numbers)}.db"
        env = {
            name: value
            for name, value in os.environ.items()
            if name != "MIZUSYNC_TOKEN"
        }
        words = [*command, "--port", "0", "--db", str(self.db)]
        began = clock()
        self.popen = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=env)
        if len(CORES) > 1:
            os.sched_setaffinity(self.popen.pid, {CORES[core]})
        assert self.popen.stdout
        line = self.popen.stdout.readline()  # it says where it listens
        self.opening = clock() - began
        found = re.search(r"http://[0-9.]+:(\d+)", line)
        if not found:
            self.popen.kill()
            raise ChildProcessError(f"it never listened: {' '.join(words)}: {line!r}")
        self.port = int(found[1])
        # Some peers say where they listen first, and load the rest then.
        self.ask(get("/sync/pull"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.popen.terminate()
        try:
            self.popen.wait(10)
        except subprocess.TimeoutExpired:  # some wait for connections that we left open
            self.popen.kill()
            self.popen.wait()
        if self.is_own_db:
            remove(self.db)

    def cpu(self) -> float:
        """Return the CPU seconds of all its threads, user and system.

        The kernel tells hundredths.
        """
        stat = Path(f"/proc/{self.popen.pid}/stat").read_text()
        behind_name = stat.rpartition(")")[2]  # man 5 proc
        user, system = behind_name.split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def memory(self) -> int:
        """Return the KiB that are resident."""
        status = Path(f"/proc/{self.popen.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+)", status)
        assert found
        return int(found[1])

    def connect(self) -> RawClient:
        """Return a connection to it."""
        return RawClient((HOST, self.port))

    def ask(self, request: bytes, connection: Connection | None = None) -> bytearray:
        """Return the answer to one request.

        It has a connection of its own, unless one is given.
        """
        answers: list[bytearray] = []
        used = connection or Connection(self)
        used.ask(request, lambda _, answer: answers.append(answer))
        self.loop.until(lambda: answers, "an answer")
        if not connection:
            used.close()
        return answers[0]


def remove(db: Path) -> None:
    for end in ("", "-wal", "-shm"):
        Path(f"{db}{end}").unlink(missing_ok=True)


# --- Requests and answers -------------------------------------------------------------
# Prepared bytes out, and a few counts in: enough to tell a wrong answer, at little
# cost.

CURSOR = re.compile(rb'"cursor": ?(\d+)')  # in a hint its first is the hint's own
CHANGE = re.compile(rb'\{"cursor": ?(\d+), ?"scope"')
AFTER = re.compile(rb'"after": ?(\d+)')
FIELDS = (
    f"Host: {HOST}".encode(),
    b"User-Agent: bench/1",
    b"Accept: application/json",
)


def get(target: str) -> bytes:
    return raw(f"GET {target} HTTP/1.1".encode(), *FIELDS)


def pull(scope: str, cursor: int, limit: int = TAIL) -> bytes:
    return get(f"/sync/pull?scope={scope}&cursor={cursor}&limit={limit}")


def pushes(scope: str, size: int = 1) -> Iterator[bytes]:
    """Yield pushes without end, of `size` new todos each."""
    todo = (
        '{"id":"m-%d","scope":"%s","name":"todo.create",'
        '"args":{"id":"t-%d","title":"Buy milk, number %d"}}'
    )
    lines = b"POST /sync/push HTTP/1.1", *FIELDS, b"Content-Type: application/json"
    while True:
        some = itertools.islice(numbers, size)
        text = ",".join(todo % (number, scope, number, number) for number in some)
        body = f"[{text}]".encode()
        yield raw(*lines, b"Content-Length: %d" % len(body), body=body)


def pushed(size: int = 1) -> Right:
    """Return a judge of pushes: so many results, each applied for the first time."""

    def right(answer: bytearray) -> bool:
        applied = answer.count(b'"ok"') == size == answer.count(b'"time"')
        return is_ok(answer) and applied and answer.find(b'"duplicate"') < 0

    return right


def cursor_of(answer: bytearray) -> int:
    """Return the cursor in the answer to a push of one mutation."""
    found = CURSOR.search(answer)
    if not pushed()(answer) or not found:
        note_wrong(answer)
        return 0
    return int(found[1])


def paged(size: int, more: bool) -> Right:
    """Return a judge of pulls: so many changes, and whether there are more."""
    end = b"true}" if more else b"false}"  # hasMore comes last
    return lambda a: is_ok(a) and a.count(b'"time"') == size and a.endswith(end)


def is_ok(answer: bytearray) -> bool:
    return answer.startswith(b"HTTP/1.1 200 ")


def read_json(answer: bytearray) -> Any:
    """Return the body of an answer, parsed."""
    return json.loads(answer.partition(b"\r\n\r\n")[2])


def check_log(server: Server, scope: str, acknowledged: int) -> None:
    """Read a whole scope: each change that was acknowledged has to be there, once."""
    cursor, titles, more = 0, Counter[str](), True
    while more:
        page = read_json(server.ask(pull(scope, cursor, 1000)))
        found = [change["cursor"] for change in page["changes"]]
        if found != sorted(set(found)) or (found and found[0] <= cursor):
            wrong["cursors out of order"] += 1
        titles.update(change["data"]["todo"]["title"] for change in page["changes"])
        cursor, more = page["cursor"], page["hasMore"]
    if len(titles) != acknowledged or titles.total() != acknowledged:
        wrong[f"{titles.total()} changes in a log, {acknowledged} acknowledged"] += 1


# --- Load -----------------------------------------------------------------------------


class Connection:
    """A connection that asks one thing at a time: all that comes is one answer."""

    def __init__(self, server: Server) -> None:
        self.loop = server.loop
        self.sock = server.connect().sock
        # takes any push at once
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 18)
        self.sock.setblocking(False)
        self.began = 0.0
        self.loop.add(self.sock, self._read)

    def ask(
        self, request: bytes, heard: Callable[[Connection, bytearray], None]
    ) -> None:
        """Send a request; `heard` is called with the answer."""
        self.heard = heard
        self.answer = bytearray()
        self.size = 0
        self.began = clock()
        if self.sock.send(request) != len(request):
            raise BufferError("a request that the kernel does not take at once")

    def _read(self) -> None:
        data = self.sock.recv(1 << 18)
        if not data:
            raise ConnectionError("the server closed a connection")
        self.answer += data
        self.size = self.size or measure_reply(self.answer)
        if self.size and len(self.answer) >= self.size:
            self.heard(self, self.answer)

    def close(self) -> None:
        self.loop.remove(self.sock)


class Load:
    """Connections that ask again when they are answered, or `pause` seconds later."""

    def __init__(
        self,
        server: Server,
        width: int,
        requests: Iterator[bytes],
        right: Right,
        pause: float = 0,
    ) -> None:
        self.server = server
        self.requests = requests
        self.right = right
        self.pause = pause
        self.times: list[float] = []  # seconds, of each answer
        self.over = False
        self.busy = width
        for number in range(width):
            ask = functools.partial(self._ask, Connection(server))
            # so that they do not march in step
            server.loop.after(pause * number / width, ask)

    def _ask(self, connection: Connection) -> None:
        request = None if self.over else next(self.requests, None)
        if request:
            connection.ask(request, self._heard)
        else:
            self.busy -= 1
            connection.close()

    def _heard(self, connection: Connection, answer: bytearray) -> None:
        self.times.append(clock() - connection.began)
        if not self.right(answer):
            note_wrong(answer)
        if self.pause:
            self.server.loop.after(self.pause, functools.partial(self._ask, connection))
        else:
            self._ask(connection)

    def measure(self, seconds: float) -> Part:
        """Measure for so long, or until there are no more requests.

        The warm-up is left out.
        """
        loop = self.server.loop
        loop.pause(WARM_UP)
        known, before = len(self.times), self.server.cpu()
        loop.wait(lambda: not self.busy, seconds)
        return Part(self.times[known:], self.server.cpu() - before)

    def end(self) -> None:
        self.over = True
        self.server.loop.until(lambda: not self.busy, "the last answers")


class Part:
    """A measurement: the seconds of each answer, and the server's CPU for them all."""

    def __init__(self, times: Sequence[float], cpu: float) -> None:
        self.times, self.cpu = times, cpu

    def each(self, operations: int = 1) -> float:
        """Return the CPU us of one operation; an answer stands for so many."""
        return self.cpu / max(1, len(self.times)) / operations * 1e6

    def __add__(self, other: Part) -> Part:
        return Part([*self.times, *other.times], self.cpu + other.cpu)


def measure(
    server: Server, width: int, requests: Iterable[bytes], right: Right, seconds: float
) -> Part:
    load = Load(server, width, iter(requests), right)
    part = load.measure(seconds)
    load.end()
    return part


def fill(server: Server, scope: str, changes: int) -> None:
    requests = itertools.islice(pushes(scope, 100), changes // 100)
    measure(server, 4, requests, pushed(100), PATIENCE)


def half_and_most(times: Sequence[float], unit: float) -> tuple[float, float]:
    """Return p50 and p99; of few times the p99 is the worst."""
    ordered = sorted(times) or [0.0]
    return ordered[len(ordered) // 2] * unit, ordered[len(ordered) * 99 // 100] * unit


# --- Followers ------------------------------------------------------------------------
# The client of the protocol, as far as it has to hear and to pull: one pull at a time,
# and one more after it where a hint came meanwhile.


class Audience:
    """Followers of one scope, and what they know together: counting is cheap."""

    def __init__(
        self,
        server: Server,
        scope: str,
        size: int,
        pulls: bool = False,
        changes: bool = False,
    ) -> None:
        self.server = server
        self.loop = server.loop
        self.scope = scope
        self.changes = changes
        self.ready = 0  # followers that have heard their first cursor
        self.told = 0  # hints of something new, to all of them
        self.got = 0  # changes that they have, all of them
        self.last = 0.0  # when either happened
        self.followers = [Follower(self, pulls) for _ in range(size)]
        self.loop.until(lambda: self.ready == size, "every subscription")

    def __enter__(self) -> Audience:
        return self

    def __exit__(self, *_: object) -> None:
        for follower in self.followers:
            self.loop.remove(follower.client.sock)
            if follower.puller:
                follower.puller.close()
        self.loop.pause(0.2)  # for the server to see it, too

    def wait(self, cursor: int) -> None:
        """Wait until every follower has heard of this cursor, or of a later one."""

        def know() -> bool:
            return all(follower.told >= cursor for follower in self.followers)

        self.loop.until(know, "everybody knows")


class Follower:
    """A session that subscribes to one scope, and pulls, if it `pulls`."""

    def __init__(self, audience: Audience, pulls: bool) -> None:
        self.audience = audience
        self.told = -1  # the newest cursor of its hints
        self.cursor = 0  # of the changes that it has
        self.pulling = False
        # the cursors of its hints, which rise, and when they came
        self.hints: list[tuple[int, float]] = []
        self.puller = Connection(audience.server) if pulls else None
        self.client = audience.server.connect()
        reply = self.client.upgrade(f"/ws?scope={audience.scope}")
        if reply.status != 101:
            raise ConnectionError(f"no WebSocket: {reply}")
        data = {"changes": True} if audience.changes else {}
        self.client.send_message("subscribe", data)
        self.client.sock.setblocking(False)
        audience.loop.add(self.client.sock, self._read)

    def heard(self, cursor: int) -> float:
        """Return when it first heard of this cursor, or of a later one."""
        return self.hints[bisect.bisect_left(self.hints, (cursor, 0.0))][1]

    def _read(self) -> None:
        self.client.fill()
        while frame := take_frame(self.client.buffer):
            if frame.opcode == TEXT:
                self._hear(frame.payload)
            elif frame.opcode == PING:
                self.client.send_frame(PONG, frame.payload)

    def _hear(self, message: bytes) -> None:
        found = CURSOR.search(message)
        if not found:
            note_wrong(message)
            return
        cursor = int(found[1])
        if cursor <= self.told:
            return
        audience = self.audience
        if self.told < 0:  # the answer to the subscription
            audience.ready += 1
        else:
            audience.told += 1
            audience.last = clock()
            self.hints.append((cursor, audience.last))
        self.told = cursor
        after = AFTER.search(message) if audience.changes else None
        if after and int(after[1]) <= self.cursor and not self.pulling:
            cursors = map(int, CHANGE.findall(message))
            self._take(sum(one > self.cursor for one in cursors), cursor)
        self._pull()

    def _pull(self) -> None:
        if self.puller and self.told > self.cursor and not self.pulling:
            self.pulling = True
            self.puller.ask(pull(self.audience.scope, self.cursor), self._page)

    def _page(self, _: Connection, answer: bytearray) -> None:
        # The last cursor is the page's.
        found = CURSOR.match(answer, answer.rfind(b'"cursor"'))
        if not is_ok(answer) or not found:
            note_wrong(answer)
            return
        self.pulling = False
        self._take(answer.count(b'"time"'), int(found[1]))
        self._pull()

    def _take(self, new: int, cursor: int) -> None:
        self.cursor = cursor
        self.audience.got += new
        self.audience.last = clock()


# --- Scenarios: every server ----------------------------------------------------------
# Each starts servers, and yields its rows as it has them.

Start = Callable[..., Server]


def requests(start: Start, sizes: Sizes) -> Iterator[Row]:
    """Measure P1, P2, P3: a request. P3 reads the log that P2 fills."""
    with start() as server:
        for width, scope in ((1, "one"), (64, "many")):
            load = Load(server, width, pushes(scope), pushed())
            part = load.measure(sizes.part)
            load.end()
            check_log(server, scope, len(load.times))
            name = f"P1 push of one mutation, {width} connection{'s' * (width > 1)}"
            yield name, "CPU us", (part.each(),)
            yield name, "p50 / p99 us", half_and_most(part.times, 1e6)

        load = Load(server, 1, pushes("alone"), pushed(), pause=0.01)
        part = load.measure(2 * sizes.part)
        load.end()
        name = "P1 push of one mutation, alone, 0.01 s after the last answer"
        yield name, "p50 / p99 us", half_and_most(part.times, 1e6)

        batches = itertools.islice(pushes("log", 100), sizes.log // 100)
        part = measure(server, 4, batches, pushed(100), PATIENCE)
        yield "P2 push of 100, 4 connections", "CPU us a mutation", (part.each(100),)

        # Only this scope's numbers follow one another: its tail is found by counting.
        last = first_cursor(server, "log") + sizes.log - 1
        for what, request, right in (
            ("P3 empty pull at the head", pull("log", last), paged(0, False)),
            ("P3 tail page of 100", pull("log", last - TAIL), paged(TAIL, False)),
            (
                f"P3 first page of 100 of {sizes.log:,}, from disk",
                pull("log", 0),
                paged(TAIL, True),
            ),
        ):
            part = measure(server, 16, itertools.repeat(request), right, sizes.part)
            yield what, "CPU us", (part.each(),)


def first_cursor(server: Server, scope: str) -> int:
    """Return the cursor of the first change of a scope."""
    page = read_json(server.ask(pull(scope, 0, 1)))
    return int(page["changes"][0]["cursor"])


def steady_hints(start: Start, sizes: Sizes) -> Iterator[Row]:
    """Measure P4 at a steady rate: how soon everybody knows."""
    with start() as server:
        for size in (100, 1000):
            with Audience(server, f"steady-{size}", size) as audience:
                times = steady(audience, 20, 4 * sizes.part)
            name = f"P4 {size} subscribers, 20 pushes a second: last notified"
            yield name, "p50 / p99 ms", half_and_most(times, 1e3)


def hints(start: Start, sizes: Sizes, changes: bool) -> Iterator[Row]:
    """Measure P4, P5: how soon everybody knows, and has.

    With `changes`, for servers that put them in their hints, these, too.
    """
    kinds = [("last has pulled", True, False)]
    kinds += [("last has it, changes in hints", True, True)] if changes else []
    with start() as server:
        with Audience(server, "told", 1000) as audience:
            times = list(one_by_one(audience, sizes.part, lambda: audience.told))
        name = "P4 1000 subscribers, one push: last "
        yield name + "notified", "p50 / p99 ms", half_and_most(times, 1e3)
        for number, (what, pulls, inside) in enumerate(kinds):
            with Audience(server, f"has-{number}", 1000, pulls, inside) as audience:
                times = list(one_by_one(audience, sizes.part, lambda: audience.got))
            what = name.removesuffix("last ") + what
            yield what, "p50 ms", half_and_most(times, 1e3)[:1]
    for what, pulls, inside in kinds:
        times, deadline = [], clock() + 3 * sizes.part
        with start() as server:
            for number in itertools.count():
                with Audience(
                    server, f"burst-{number}", 200, pulls, inside
                ) as audience:
                    times.append(burst(audience, 1000))
                if clock() > deadline or len(times) == 5:
                    break
        how = what.partition(", ")[2]
        name = f"P5 200 subscribers, 1000 pushes in a burst{', ' * bool(how)}{how}"
        yield f"{name}: all have all", "ms", (statistics.median(times) * 1e3,)


def one_by_one(
    audience: Audience, seconds: float, known: Callable[[], int]
) -> Iterator[float]:
    """Push, wait until the last one has heard of it, or has it; pause, and push again.

    Yield the seconds of each.
    """
    connection = Connection(audience.server)
    source = pushes(audience.scope)
    deadline = clock() + 2 * seconds

    def heard(_: Connection, answer: bytearray) -> None:
        if not pushed()(answer):
            note_wrong(answer)

    for number in itertools.count(1):
        connection.ask(next(source), heard)
        reached = functools.partial(
            lambda size: known() >= size, number * len(audience.followers)
        )
        audience.loop.until(reached, "everybody knows")
        if number > 2:  # the first ones warm up
            yield audience.last - connection.began
        audience.loop.pause(0.05)  # longer than a server may space its hints
        if clock() > deadline and number > 5:
            break
    connection.close()
    if known() != number * len(audience.followers):
        wrong["something was heard twice"] += 1


def steady(audience: Audience, rate: int, seconds: float) -> list[float]:
    """Push at a fixed rate; return the seconds until the last heard of each push."""
    connection = Connection(audience.server)
    source = pushes(audience.scope)
    sent: list[tuple[float, int]] = []  # when, and the cursor in the answer
    began = clock()
    for number in range(1, int(rate * seconds) + 1):
        # As a client does, it waits for the answer, but for no subscriber.
        cursor = cursor_of(audience.server.ask(next(source), connection))
        sent.append((connection.began, cursor))
        audience.loop.pause(began + number / rate - clock())
    audience.wait(cursor)
    connection.close()
    # A hint stands for every push up to its cursor.
    return [
        max(follower.heard(cursor) for follower in audience.followers) - when
        for when, cursor in sent[2:]  # the first ones warm up
    ]


def burst(audience: Audience, count: int) -> float:
    """Return the seconds from the first push until every follower has every change."""
    began, size = clock(), count * len(audience.followers)
    source = itertools.islice(pushes(audience.scope), count)
    load = Load(audience.server, 8, source, pushed())
    audience.loop.until(
        lambda: audience.got >= size and not load.busy, "everybody has everything"
    )
    if audience.got != size:
        wrong["a follower has a change twice"] += 1
    return audience.last - began


def memory(start: Start, sizes: Sizes) -> Iterator[Row]:
    """Measure P6, after a few sessions that load what all of them share."""
    sessions = sizes.sessions
    with start() as server, Audience(server, "idle", 50):
        before = server.memory()
        with Audience(server, "idle", sessions):
            each = (server.memory() - before) / sessions
    yield f"P6 memory of an idle subscribed session, of {sessions:,}", "KiB", (each,)


# --- Scenarios: mizusync alone --------------------------------------------------------


def growth(start: Start, sizes: Sizes, folder: Path) -> Iterator[Row]:
    """Measure P7: what a long log costs more than a short one.

    Two servers take turns, so that the weather is the same for both. Their logs are
    written with SQL: a million pushes would take too long.
    """
    lengths = SMALL, sizes.big
    files = folder / "small.db", folder / "big.db"
    for length, db in zip(lengths, files, strict=True):
        make_log(start, db, length)
    with start(db=files[0]) as small, start(db=files[1]) as big:
        servers = small, big
        openings = [server.opening * 1e3 for server in servers]
        yield (
            f"P7 start to listening, {SMALL:,} / {sizes.big:,} changes",
            "ms",
            openings,
        )
        for what, place, right in (  # pages first, since a push moves the tail
            ("tail page of 100", [each - TAIL for each in lengths], paged(TAIL, False)),
            ("first page of 100", (0, 0), paged(TAIL, True)),
            ("middle page of 100", [each // 2 for each in lengths], paged(TAIL, True)),
            ("push of one mutation", (), pushed()),
        ):
            costs = [Part((), 0), Part((), 0)]
            for turn in range(6):
                which = turn % 2
                page = itertools.repeat(pull("log", place[which])) if place else None
                costs[which] += measure(
                    servers[which], 16, page or pushes("log"), right, sizes.part / 2
                )
            small_cost, big_cost = (cost.each() for cost in costs)
            name = f"P7 {what} at {sizes.big:,} changes"
            yield name, "CPU us", (big_cost,)
            yield f"{name} against {SMALL:,}", "ratio", (big_cost / small_cost,)
            if what == "first page of 100":
                first_page = itertools.repeat(pull("log", 0))
                part = measure(big, 1, first_page, right, sizes.part)
                yield (
                    f"{name}, 1 connection",
                    "p50 / p99 us",
                    half_and_most(part.times, 1e6),
                )
        name = f"P7 memory of the server at {sizes.big:,} changes"
        yield name, "MiB", (big.memory() / 1024,)
    for db in files:
        remove(db)


WRITE_LOG = """
    -- One write of each page, and none of them has to survive us. The server sets WAL
    -- again.
    PRAGMA journal_mode = DELETE;
    PRAGMA synchronous = OFF;
    BEGIN;
    CREATE TEMP VIEW rows AS
        WITH RECURSIVE rows (n) AS
            (SELECT 1 UNION ALL SELECT n + 1 FROM rows WHERE n < {length})
        SELECT n FROM rows;
    INSERT INTO mizusync_changes (cursor, first, scope, time, data)
        SELECT n, n, 'log', '2026-01-01T00:00:00.000Z', printf(
            '{{"op":"create","todo":{{"id":"s-%08d","title":"Buy milk, number %d",'
            || '"completed":false}}}}', n, n)
        FROM rows;
    INSERT INTO mizusync_mutations (scope, id, first, last)
        SELECT 'log', printf('s-%08d', n), n, n FROM rows;
    INSERT INTO todos (position, scope, id, title, completed)
        SELECT n, 'log', printf('s-%08d', n), 'Buy milk, number ' || n, 0 FROM rows;
    COMMIT;
"""


def make_log(start: Start, db: Path, length: int) -> None:
    """Write a log as pushes of one todo each; the server makes its tables."""
    with start(db=db):
        pass
    with contextlib.closing(sqlite3.connect(db, isolation_level=None)) as connection:
        connection.executescript(WRITE_LOG.format(length=length))


def fairness(start: Start, sizes: Sizes) -> Iterator[Row]:
    """Measure how long a calm client waits beside others.

    It pushes, and 0.1 s after the answer again. There are four of them, for the sake of
    more times; the others have connections of their own.
    """
    name = "A push each 0.1 s"
    with start() as server:
        fill(server, "log", 5000)
        tail = first_cursor(server, "log") + 5000 - 1 - TAIL
        memory_page = (16, itertools.repeat(pull("log", tail)), paged(TAIL, False))
        disk_page = (16, itertools.repeat(pull("log", 0)), paged(TAIL, True))
        batches = (4, pushes("other", 100), pushed(100))
        for what, others in (
            ("alone", None),
            ("beside 16 that pull from memory without end", memory_page),
            ("beside 16 that pull from disk without end", disk_page),
            ("beside 4 that push 100 without end", batches),
        ):
            load = Load(server, *others) if others else None
            times = calm(server, sizes)
            if load:
                load.end()
            yield f"{name}, {what}", "p50 / p99 ms", times
        with Audience(server, "calm", 1000):
            what = "with 1000 subscribers"
            yield f"{name}, {what}", "p50 / p99 ms", calm(server, sizes)


def calm(server: Server, sizes: Sizes) -> tuple[float, float]:
    """Return p50 and p99 of calm pushes, in ms."""
    probe = Load(server, 4, pushes("calm"), pushed(), pause=0.1)
    part = probe.measure(2 * sizes.part)
    probe.end()
    return half_and_most(part.times, 1e3)


def snapshots(start: Start, sizes: Sizes, folder: Path) -> Iterator[Row]:
    """Measure how long a big snapshot holds the server for everybody else."""
    db = folder / "snapshot.db"
    make_log(start, db, TODOS)
    with start(db=db) as server:
        take = get("/sync/snapshot?scope=log")
        whole = server.ask(take)
        if not is_ok(whole) or whole.count(b'"completed"') != TODOS:
            wrong["a snapshot that is not whole"] += 1
        # The same body each time; to count in it again would hold this client instead.
        size = len(whole)
        for what in ("alone", f"beside snapshots of {TODOS:,} todos without end"):
            load = None
            if what != "alone":
                taking = itertools.repeat(take)
                load = Load(server, 1, taking, lambda answer: len(answer) == size)
            small = itertools.repeat(pull("none", 0))
            probe = Load(server, 1, small, paged(0, False), pause=0.002)
            part = probe.measure(2 * sizes.part)
            probe.end()
            if load:
                load.end()
                each = statistics.median(load.times) * 1e3
                print(f"a snapshot takes {each:.0f} ms", file=sys.stderr)
            worst = max(part.times, default=0.0) * 1e3
            times = *half_and_most(part.times, 1e3), worst
            yield f"A small request each 2 ms, {what}", "p50 / p99 / worst ms", times
    remove(db)


# --- Count ----------------------------------------------------------------------------
# One client asks one thing at a time, so that the server does the same work in each
# run, in the same order. Only HTTP and the command line are used: versions of the file
# differ in the rest.


class CountedServer(Server):
    """A server under valgrind, which counts its instructions, not the kernel's."""

    def __init__(self, file: str, loop: Loop, folder: Path, core: int) -> None:
        self.dumps = folder / f"instructions-{core}"
        valgrind = ["valgrind", "-q", "--tool=callgrind"]
        valgrind += [f"--callgrind-out-file={self.dumps}"]
        slowed = [sys.executable, str(HERE / "bench_counted.py"), file]
        db = folder / f"counted-{core}.db"
        make_log(
            functools.partial(Server, [sys.executable, file], loop, folder), db, SMALL
        )
        super().__init__([*valgrind, *slowed], loop, folder, db, core)
        self.parts = 0  # so many files that callgrind has written
        self.connection = Connection(self)
        idle = int(self.count_each(lambda _: loop.pause(1), 5))
        if idle > 10_000:
            # bench_counted.py has to slow a way to wait that it does not know.
            what = f"timers take {idle:,} instructions a second: no count is exact"
            wrong[what] += 1

    def count_each(self, work: Callable[[int], None], size: int) -> float:
        """Return the instructions of one request, where `work(n)` makes `n` of them.

        It is the median of five parts: what is rare (a checkpoint, a full collection of
        garbage) would fall into a row of one run and into another row of the next.
        """
        part = size // 5
        counts: list[int] = []
        self.rest()
        self._dump()
        for _ in range(5):
            work(part)
            self.rest()
            counts.append(self._dump())
        return statistics.median(counts) / part

    def _dump(self) -> int:
        """Return the instructions since the last dump."""
        dump = ["vgdb", f"--pid={self.popen.pid}", "dump"]
        subprocess.run(dump, check=True, stderr=subprocess.DEVNULL)
        self.parts += 1
        file = Path(f"{self.dumps}.{self.parts}")
        found = re.search(r"^totals: (\d+)$", file.read_text(), re.MULTILINE)
        file.unlink()
        assert found
        return int(found[1])

    def ask_all(self, requests: Iterable[bytes], right: Right) -> None:
        """Ask one after the other, each once the server rests."""
        for request in requests:
            self.rest()
            answer = self.ask(request, self.connection)
            if not right(answer):
                note_wrong(answer)

    def rest(self) -> None:
        """Wait until all the server's threads sleep.

        A request that comes earlier costs less.
        """
        stats = list(Path(f"/proc/{self.popen.pid}/task").glob("*/stat"))
        while any(" S " not in stat.read_text() for stat in stats):
            time.sleep(0.001)


def instructions(server: CountedServer) -> Iterator[Row]:
    """Count what each kind of request costs.

    The log was there before the server, so memory has only what is pushed now.
    """
    unit = "instructions"

    def row(
        what: str,
        requests: Iterator[bytes],
        right: Right,
        size: int,
        warm_up: int = COUNT_WARM_UP,
        width: int = 1,
    ) -> Row:
        first = itertools.islice(requests, warm_up)
        measure(server, width, first, right, 10 * PATIENCE)  # to their end

        def work(part: int) -> None:
            server.ask_all(itertools.islice(requests, part), right)

        return what, unit, (server.count_each(work, size),)

    # First, since in a server that has done a lot already it repeats less well.
    with Audience(server, "told", 20) as audience:
        announce = functools.partial(push_and_wait, server, audience)
        announce(COUNT_WARM_UP)
        cost = server.count_each(announce, 15)
    yield "push of 1, and its hint to 20 subscribers", unit, (cost,)

    for mutations, scope, size in ((1, "one", 100), (10, "ten", 25), (100, "log", 5)):
        source, right = pushes(scope, mutations), pushed(mutations)
        yield row(f"push of {mutations}", source, right, size)

    todos = COUNT_WARM_UP + 100
    first = first_cursor(server, "log")
    last = int(read_json(server.ask(get("/healthz")))["cursor"])
    middle = first + SMALL // 2

    def whole(answer: bytearray) -> bool:
        return is_ok(answer) and answer.count(b'"completed"') == todos

    empty, full, more = paged(0, False), paged(TAIL, False), paged(TAIL, True)
    for what, request, right, size in (
        ("empty pull", pull("log", last), empty, 100),
        ("pull of 100 from memory", pull("log", last - TAIL), full, 100),
        ("pull of 100 from disk", pull("log", middle), more, 50),
        ("first page of 100, from disk", pull("log", 0), more, 50),
        (f"snapshot of {todos} todos", get("/sync/snapshot?scope=one"), whole, 50),
    ):
        # Many at once warm up each of the server's threads and connections that read.
        yield row(what, itertools.repeat(request), right, size, 32, width=16)


def push_and_wait(server: CountedServer, audience: Audience, size: int) -> None:
    """Push `size` times, each time until every subscriber has heard of it."""
    for request in itertools.islice(pushes(audience.scope), size):
        server.rest()
        audience.wait(cursor_of(server.ask(request, server.connection)))
        # longer than a server may space its hints, even when slowed
        audience.loop.pause(1)


# --- Table ----------------------------------------------------------------------------


def table(columns: dict[str, list[Row]]) -> Iterator[str]:
    """Yield the lines of a Markdown table, one column a server."""
    names = dict.fromkeys(row[:2] for rows in columns.values() for row in rows)
    found = {
        (server, *row[:2]): row[2] for server, rows in columns.items() for row in rows
    }
    yield f"| scenario | unit | {' | '.join(columns)} |"
    yield f"| --- | --- |{' ---: |' * len(columns)}"
    for name in names:
        cells = [
            " / ".join(map(format_number, found.get((server, *name), ()))) or "-"
            for server in columns
        ]
        yield f"| {' | '.join((*name, *cells))} |"


def ratios(old: list[Row], new: list[Row]) -> list[Row]:
    """Return the new numbers by the old ones, of each row that both have."""
    before = {row[:2]: row[2] for row in old}
    return [
        (
            *row[:2],
            [b / a if a else 0.0 for a, b in zip(before[row[:2]], row[2], strict=True)],
        )
        for row in new
        if row[:2] in before
    ]


def format_number(value: float) -> str:
    """Return a number with three digits at least."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def about(folder: Path, peers: bool) -> Iterator[str]:
    """Yield the lines that say where this was measured."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    cores = f"{len(CORES)} cores of {model[1] if model else platform.machine()}"
    yield f"{time.strftime('%Y-%m-%d')}, {cores}, Linux {platform.release()}"
    versions = f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}"
    yield f"{versions}; one core a server"
    for package in PACKAGES if peers else ():
        yield f"{package} {importlib.metadata.version(package)}"
    median, _ = half_and_most(list(time_syncs(folder)), 1e6)
    yield f"fdatasync of 4 KiB in {folder.parent}: p50 {median:.0f} us"


def time_syncs(folder: Path) -> Iterator[float]:
    """Yield the seconds that the disk makes each commit wait, at least."""
    with (folder / "sync").open("wb", buffering=0) as file:
        for _ in range(300):
            file.write(bytes(4096))
            began = clock()
            os.fdatasync(file.fileno())
            yield clock() - began


HERE = Path(__file__).resolve().parent
CORES = sorted(os.sched_getaffinity(0))
PEERS = ("aiohttp", "FastAPI", "Starlette")
PACKAGES = ("aiohttp", "fastapi", "starlette", "uvicorn", "uvloop", "msgspec")
SCENARIOS = (
    *("requests", "steady", "hints", "memory", "growth", "fairness", "snapshots"),
    "count",
)


def find_commands(args: argparse.Namespace) -> dict[str, list[str]]:
    """Return the commands that start what is measured, by the names of the columns."""
    commands = {"mizusync": [sys.executable, args.server]}
    if args.old:
        commands = {"old": [sys.executable, args.old], "new": commands["mizusync"]}
    if args.peers:
        peers = [sys.executable, str(HERE / "bench_peers.py")]
        commands |= {name: [*peers, name] for name in PEERS}
    return commands


def measure_all(args: argparse.Namespace, folder: Path) -> dict[str, list[Row]]:
    """Measure each server in each scenario."""
    sizes = QUICK if args.quick or args.old else Sizes()
    commands = find_commands(args)
    columns: dict[str, list[Row]] = {name: [] for name in commands}
    loop = Loop()
    for scenario in args.only:
        if scenario == "count":
            continue
        runs: dict[str, Iterator[Row]] = {}
        for name, command in commands.items():
            start = functools.partial(Server, command, loop, folder / name)
            ours = name not in PEERS
            runs[name] = iter(run_scenario(scenario, start, sizes, folder / name, ours))
        for name, rows in take_turns(runs).items():
            columns[name] += rows
    return columns


def take_turns(runs: dict[str, Iterator[Row]]) -> dict[str, list[Row]]:
    """Return all rows; of several servers, each row is measured on all of them in turn.

    So they have the same weather. A server is idle while another one is measured. Each
    row is printed as soon as it is there, with the seconds that it took.
    """
    columns: dict[str, list[Row]] = {name: [] for name in runs}
    waiting = dict(runs)
    while waiting:
        for name in list(waiting):
            began = clock()
            row = next(waiting[name], None)
            if row is None:
                del waiting[name]
                continue
            columns[name].append(row)
            what, unit, values = row
            cell = " / ".join(map(format_number, values))
            took = clock() - began
            print(f"{took:5.1f} s {name}: {what}: {cell} {unit}", file=sys.stderr)
    return columns


def run_scenario(
    scenario: str, start: Start, sizes: Sizes, folder: Path, ours: bool
) -> Iterable[Row]:
    """Return the rows of one scenario; a peer has none of those that are ours alone."""
    match scenario:
        case "requests":
            return requests(start, sizes)
        case "steady":
            return steady_hints(start, sizes)
        case "hints":
            return hints(start, sizes, ours)
        case "memory":
            return memory(start, sizes)
        case "growth" if ours:
            return growth(start, sizes, folder)
        case "fairness" if ours:
            return fairness(start, sizes)
        case "snapshots" if ours:
            return snapshots(start, sizes, folder)
    return ()


def count_all(args: argparse.Namespace, folder: Path) -> dict[str, list[Row]]:
    """Count the instructions of each file, each on a core of its own."""
    files = {"old": args.old, "new": args.server}
    if not args.old:
        files = {"mizusync": args.server}
    # A table of another process has another order, unless the seed is fixed.
    os.environ["PYTHONHASHSEED"] = "0"  # the servers inherit it
    columns: dict[str, list[Row]] = {}
    with ProcessPoolExecutor(len(CORES)) as pool:
        counts = {
            name: pool.submit(count_one, name, file, folder, core % len(CORES))
            for core, (name, file) in enumerate(files.items())
        }
        for name, count in counts.items():
            columns[name], found = count.result()
            wrong.update(found)
    return columns


def count_one(
    name: str, file: str, folder: Path, core: int
) -> tuple[list[Row], Counter[str]]:
    """Count for one file, in a process of its own; return also what was wrong.

    Each process begins with the same numbers, so it sends the same requests.
    """
    global numbers
    numbers = itertools.count(1)
    wrong.clear()
    if len(CORES) > 1:
        os.sched_setaffinity(0, CORES)
    with CountedServer(file, Loop(), folder, core) as server:
        return take_turns({name: instructions(server)})[name], wrong


HELP = """
scenarios, and the seconds that each took two files with --old, on two cores that had
other work, too (243 s in all; on a machine with three times more work than cores 373):
  requests   17   P1 a push, P2 a push of 100, P3 a pull: CPU
  steady     15   P4 hints at 20 pushes a second, to 100 and 1000 subscribers: p50, p99
  hints      33   P4 one push, P5 a burst of 1000: until everybody knows, and has
  memory      3   P6 KiB of an idle subscribed session
  growth     34   P7 what a long log costs more than a short one
  fairness   22   a calm client beside busy ones
  snapshots   9   a small request beside snapshots of 50,000 todos
  count     110   instructions a request, under valgrind; two files at the same time

comparing two versions:
  bench.py --old OLD.py                       all of these, for both, and their ratios
  bench.py --old OLD.py --only count memory   some of them
  bench.py --old OLD.py --count               instructions alone, to 1 %
  bench.py --count OLD.py                     the same
"""


def parse_arguments() -> argparse.Namespace:
    """Return the arguments; `only` names the scenarios that are to run."""
    parser = argparse.ArgumentParser(
        description="Measure mizusync, another version of it, and its peers.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=HELP,
    )
    add = parser.add_argument
    beside = str(HERE.parent / "mizusync.py")
    add("--server", default=beside, help="the mizusync.py to measure (%(default)s)")
    add("--old", metavar="FILE", help="another one, to compare it with")
    add("--peers", action="store_true", help="measure bench_peers.py, too")
    add("--quick", action="store_true", help="measure less; --old does so, too")
    add(
        "--only",
        nargs="+",
        choices=SCENARIOS,
        metavar="SCENARIO",
        help="run these scenarios alone",
    )
    add(
        "--count",
        nargs="?",
        const="",
        metavar="FILE",
        help="count instructions alone; with FILE as with --old FILE",
    )
    args = parser.parse_args()
    if args.count is not None:
        args.old = args.count or args.old
        args.only = ["count"]
    if not args.only:
        # Without another file to compare with, a count says little.
        args.only = [name for name in SCENARIOS if args.old or name != "count"]
    return args


def main() -> int:
    args = parse_arguments()
    began = clock()
    if len(CORES) > 1:
        os.sched_setaffinity(0, CORES[1:])
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # the servers inherit it
    with tempfile.TemporaryDirectory(prefix="mizusync-bench-") as name:
        folder = Path(name)
        for column in find_commands(args):
            (folder / column).mkdir()
        columns = measure_all(args, folder)
        if "count" in args.only:
            for column, rows in count_all(args, folder).items():
                columns[column] += rows
        if args.old:
            columns["new / old"] = ratios(columns["old"], columns["new"])
        print(*table(columns), "", *about(folder, args.peers), sep="\n")
    print(f"this took {clock() - began:.0f} s")
    for what, count in wrong.most_common(20):
        print(f"WRONG, {count} times: {what}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
