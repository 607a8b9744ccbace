"""The benchmark: what a push, a pull and a hint cost, in one Markdown table.

    servers, on the first core                      this process, on the other cores
    mizusync, or a peer, on a file of its own  <--  one epoll loop: connections,
    followers
       ^
       +-- /proc/PID/stat before and after each part: the CPU time that the server took

By hand: `python .ci/bench.py`, under 4 minutes; `--quick` is half of that. `--peers`
adds what one would write instead, bench_peers.py beside this file, for a Python that
has the packages: `python -m venv lab && lab/bin/pip install aiohttp fastapi
'uvicorn[standard]'`, and then `lab/bin/python .ci/bench.py --peers`. Linux only.

`--count` counts the server's instructions instead, under valgrind (`apt-get install
valgrind`). That is a table of its own, the same to 1 % on a busy machine; it takes 2 to
5 minutes a file. To see what a change costs, compare two versions: `python .ci/bench.py
--count OTHER_mizusync.py`.

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
from pathlib import Path
from typing import Self

HOST = "127.0.0.1"
PATIENCE = 60.0  # seconds until what must happen counts as never
# seconds of each part that are not counted: first uses of code, caches, the WAL
WARM_UP = 0.2
TAIL = 100  # changes: a page in its usual size
LOG, SMALL, BIG = 100_000, 10_000, 1_000_000  # changes in the logs of P3 and of P7

Right = Callable[[bytearray], bool]  # judges a whole answer
Row = tuple[str, str, Sequence[float]]  # what was done, the unit, the numbers

clock = time.perf_counter
numbers = itertools.count(
    1
)  # of mutations: an id that was used before would be a duplicate
wrong: Counter[str] = Counter()  # every answer that was not right


# --- Loop -----------------------------------------------------------------------------
# select.epoll and a heap of timers: asyncio would cost the client more than the server
# its work.


class Loop:
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
        """Go on until `done`, at most so long; whether it was done."""
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
    """A real process with a database of its own; only what was started here is ended
    here."""

    def __init__(
        self, command: Sequence[str], loop: Loop, folder: Path, db: str = ""
    ) -> None:
        self.loop, self.own = loop, not db
        self.db = Path(db) if db else folder / f"{next(numbers)}.db"
        env = {
            name: value
            for name, value in os.environ.items()
            if name != "MIZUSYNC_TOKEN"
        }
        words = [*command, "--port", "0", "--db", str(self.db)]
        began = clock()
        self.popen = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=env)
        if len(CORES) > 1:
            os.sched_setaffinity(self.popen.pid, CORES[:1])
        assert self.popen.stdout
        line = self.popen.stdout.readline()  # it says where it listens
        self.opening = clock() - began
        found = re.search(r"http://[0-9.]+:(\d+)", line)
        if not found:
            self.popen.kill()
            raise ChildProcessError(f"it never listened: {' '.join(words)}: {line!r}")
        self.port = int(found[1])
        self.ask(
            get("/sync/pull")
        )  # some announce themselves first, and load the rest then

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.popen.terminate()
        try:
            self.popen.wait(10)
        except subprocess.TimeoutExpired:  # some wait for connections that we left open
            self.popen.kill()
            self.popen.wait()
        if self.own:
            remove(self.db)

    def cpu(self) -> float:
        """Seconds of all its threads, user and system; the kernel tells hundredths."""
        stat = Path(f"/proc/{self.popen.pid}/stat").read_text()
        user, system = stat.rpartition(")")[2].split()[
            11:13
        ]  # behind the name (man 5 proc)
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def memory(self) -> int:
        """KiB that are resident."""
        found = re.search(
            r"VmRSS:\s+(\d+)", Path(f"/proc/{self.popen.pid}/status").read_text()
        )
        assert found
        return int(found[1])

    def connect(self) -> socket.socket:
        sock = socket.create_connection((HOST, self.port), PATIENCE)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def ask(self, request: bytes, connection: Connection | None = None) -> bytearray:
        """Return the answer to one request; without a connection, over one of its
        own."""
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

FIELDS = f"Host: {HOST}\r\nUser-Agent: bench/1\r\nAccept: application/json\r\n"
CURSOR = re.compile(rb'"cursor": ?(\d+)')  # in a hint its first is the hint's own
CHANGE = re.compile(rb'\{"cursor": ?(\d+), ?"scope"')


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\n{FIELDS}\r\n".encode()


def pull(scope: str, cursor: int, limit: int = TAIL) -> bytes:
    return get(f"/sync/pull?scope={scope}&cursor={cursor}&limit={limit}")


def pushes(scope: str, size: int = 1) -> Iterator[bytes]:
    """Pushes without end, of `size` new todos each."""
    make = (
        '{"id":"m-%d","scope":"%s","name":"todo.create",'
        '"args":{"id":"t-%d","title":"%s %d"}}'
    )
    head = f"POST /sync/push HTTP/1.1\r\n{FIELDS}Content-Type: application/json\r\n"
    while True:
        some = (
            make % (n, scope, n, "Buy milk, number", n)
            for n in itertools.islice(numbers, size)
        )
        body = f"[{','.join(some)}]"
        yield f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()


def pushed(size: int = 1) -> Right:
    """The answer to a push: so many results, each applied for the first time."""

    def right(answer: bytearray) -> bool:
        applied = answer.count(b'"ok"') == size == answer.count(b'"time"')
        return is_ok(answer) and applied and answer.find(b'"duplicate"') < 0

    return right


def cursor_of(answer: bytearray) -> int:
    """Return the cursor in the answer to a push of one mutation."""
    found = CURSOR.search(answer)
    if not pushed()(answer) or not found:
        wrong[answer[:200].decode(errors="replace")] += 1
        return 0
    return int(found[1])


def paged(size: int, more: bool) -> Right:
    end = b"true}" if more else b"false}"  # hasMore comes last
    return lambda a: is_ok(a) and a.count(b'"time"') == size and a.endswith(end)


def is_ok(answer: bytearray) -> bool:
    return answer.startswith(b"HTTP/1.1 200 ")


def check_log(server: Server, scope: str, acknowledged: int) -> int:
    """Read a whole scope with a real parser: what was acknowledged is there, once. Its
    head."""
    cursor, titles, more = 0, Counter[str](), True
    while more:
        page = json.loads(
            server.ask(pull(scope, cursor, 1000)).partition(b"\r\n\r\n")[2]
        )
        found = [change["cursor"] for change in page["changes"]]
        if found != sorted(set(found)) or (found and found[0] <= cursor):
            wrong["cursors out of order"] += 1
        titles.update(change["data"]["todo"]["title"] for change in page["changes"])
        cursor, more = page["cursor"], page["hasMore"]
    if len(titles) != acknowledged or titles.total() != acknowledged:
        wrong[f"{titles.total()} changes in a log, {acknowledged} acknowledged"] += 1
    return cursor


# --- Load -----------------------------------------------------------------------------


class Connection:
    """Asks one thing at a time, so all that has come in is one answer."""

    def __init__(self, server: Server) -> None:
        self.loop, self.sock = server.loop, server.connect()
        self.sock.setsockopt(
            socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 18
        )  # takes any push at once
        self.sock.setblocking(False)
        self.began = 0.0
        self.loop.add(self.sock, self._read)

    def ask(
        self, request: bytes, heard: Callable[[Connection, bytearray], None]
    ) -> None:
        self.heard, self.answer, self.size = heard, bytearray(), 0
        self.began = clock()
        if self.sock.send(request) != len(request):
            raise BufferError("a request that the kernel does not take at once")

    def _read(self) -> None:
        if not (data := self.sock.recv(1 << 18)):
            raise ConnectionError("the server closed a connection")
        self.answer += data
        if not self.size and (end := self.answer.find(b"\r\n\r\n")) > 0:
            head = self.answer[:end].lower()
            at = head.index(b"content-length:") + 15
            self.size = end + 4 + int(head[at:].split(b"\r", 1)[0])
        if self.size and len(self.answer) >= self.size:
            self.heard(self, self.answer)

    def close(self) -> None:
        self.loop.remove(self.sock)


class Load:
    """Connections that ask again as soon as they are answered, or after a `pause` of
    seconds."""

    def __init__(
        self,
        server: Server,
        width: int,
        requests: Iterator[bytes],
        right: Right,
        pause: float = 0,
    ) -> None:
        self.server, self.requests, self.right, self.pause = (
            server,
            requests,
            right,
            pause,
        )
        self.times: list[float] = []  # seconds, of each answer
        self.over, self.busy = False, width
        self.connections = [Connection(server) for _ in range(width)]
        for number, connection in enumerate(self.connections):
            ask = functools.partial(self._ask, connection)
            server.loop.after(
                pause * number / width, ask
            )  # so they do not march in step

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
            wrong[answer[:200].decode(errors="replace")] += 1
        if self.pause:
            self.server.loop.after(self.pause, functools.partial(self._ask, connection))
        else:
            self._ask(connection)

    def measure(self, seconds: float) -> Part:
        """So long, or until there are no more requests, without the warm-up."""
        loop = self.server.loop
        loop.pause(WARM_UP)
        known, before = len(self.times), self.server.cpu()
        loop.wait(lambda: not self.busy, seconds)
        return Part(self.times[known:], self.server.cpu() - before)

    def end(self) -> None:
        self.over = True
        self.server.loop.until(lambda: not self.busy, "the last answers")


class Part:
    """What was measured: the seconds of each answer, and the server's of CPU for all of
    them."""

    def __init__(self, times: Sequence[float], cpu: float) -> None:
        self.times, self.cpu = times, cpu

    def each(self, operations: int = 1) -> float:
        """CPU us by the operation; so many an answer."""
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
    """p50 and p99; of few times the p99 is the worst."""
    ordered = sorted(times) or [0.0]
    return ordered[len(ordered) // 2] * unit, ordered[len(ordered) * 99 // 100] * unit


# --- Followers ------------------------------------------------------------------------
# The client of the protocol, as far as it has to hear and to pull: one pull at a time,
# and one more after it where a hint came meanwhile.


class Audience:
    """Followers of one scope, and what they know, all together: counting is what is
    cheap."""

    def __init__(
        self,
        server: Server,
        scope: str,
        size: int,
        pulls: bool = False,
        changes: bool = False,
    ) -> None:
        self.server, self.loop, self.scope, self.changes = (
            server,
            server.loop,
            scope,
            changes,
        )
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
            self.loop.remove(follower.sock)
            if follower.puller:
                follower.puller.close()
        self.loop.pause(0.2)  # for the server to see it, too

    def wait(self, cursor: int) -> None:
        """Wait until every follower has heard of this cursor, or of a later one."""
        everybody = self.followers
        self.loop.until(
            lambda: all(one.told >= cursor for one in everybody), "everybody knows"
        )


class Follower:
    def __init__(self, audience: Audience, pulls: bool) -> None:
        self.audience, self.buffer = audience, b""
        self.told, self.cursor, self.pulling = -1, 0, False
        self.hints: list[
            tuple[int, float]
        ] = []  # their cursors, which rise, and when they came
        self.puller = Connection(audience.server) if pulls else None
        self.sock = audience.server.connect()
        upgrade = (
            "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        )
        key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        hello = get(f"/ws?scope={audience.scope}")[:-2] + (upgrade + key).encode()
        self.sock.sendall(hello)
        while b"\r\n\r\n" not in self.buffer:
            self.buffer += self.sock.recv(4096)
        if not self.buffer.startswith(b"HTTP/1.1 101 "):
            raise ConnectionError(f"no WebSocket: {self.buffer!r}")
        self.buffer = self.buffer.partition(b"\r\n\r\n")[2]
        wish = {
            "topic": "subscribe",
            "data": {"changes": True} if audience.changes else {},
        }
        text = json.dumps(wish).encode()
        self.sock.sendall(
            bytes((0x81, 0x80 | len(text), 0, 0, 0, 0)) + text
        )  # masked with zeros
        self.sock.setblocking(False)
        audience.loop.add(self.sock, self._read)

    def heard(self, cursor: int) -> float:
        """Return when it first heard of this cursor, or of a later one."""
        return self.hints[bisect.bisect_left(self.hints, (cursor, 0.0))][1]

    def _read(self) -> None:
        if not (data := self.sock.recv(1 << 16)):
            raise ConnectionError("the server closed a WebSocket")
        buffer = self.buffer + data if self.buffer else data
        while len(buffer) >= 4:
            size, start = buffer[1], 2
            if size == 126:
                size, start = int.from_bytes(buffer[2:4], "big"), 4
            if len(buffer) < start + size:
                break
            if buffer[0] == 0x81:
                self._hear(buffer[start : start + size])
            buffer = buffer[start + size :]
        self.buffer = buffer

    def _hear(self, message: bytes) -> None:
        audience, found = self.audience, CURSOR.search(message)
        if not found:
            wrong[message[:200].decode()] += 1
        elif (cursor := int(found[1])) > self.told:
            if self.told < 0:  # the answer to the subscription
                audience.ready += 1
            else:
                audience.told += 1
                audience.last = clock()
                self.hints.append((cursor, audience.last))
            self.told = cursor
            after = (
                re.search(rb'"after": ?(\d+)', message) if audience.changes else None
            )
            if after and int(after[1]) <= self.cursor and not self.pulling:
                new = sum(
                    int(number) > self.cursor for number in CHANGE.findall(message)
                )
                self._take(new, cursor)
            self._pull()

    def _pull(self) -> None:
        if self.puller and self.told > self.cursor and not self.pulling:
            self.pulling = True
            self.puller.ask(pull(self.audience.scope, self.cursor), self._page)

    def _page(self, _: Connection, answer: bytearray) -> None:
        found = CURSOR.match(
            answer, answer.rfind(b'"cursor"')
        )  # the last one is the page's
        if not is_ok(answer) or not found:
            wrong[answer[:200].decode(errors="replace")] += 1
            return
        self.pulling = False
        self._take(answer.count(b'"time"'), int(found[1]))
        self._pull()

    def _take(self, new: int, cursor: int) -> None:
        self.cursor = cursor
        self.audience.got += new
        self.audience.last = clock()


# --- Scenarios: every server ----------------------------------------------------------
# Each starts servers, and tells its rows as it has them. T is the length of a part in
# seconds.

Start = Callable[..., Server]


def requests(start: Start, T: float) -> Iterator[Row]:
    """P1, P2, P3: what a request costs. The log that P2 fills is the one that P3
    reads."""
    with start() as server:
        for width, scope in ((1, "one"), (64, "many")):
            load = Load(server, width, pushes(scope), pushed())
            part = load.measure(T)
            load.end()
            check_log(server, scope, len(load.times))
            name = f"P1 push of one mutation, {width} connection{'s' * (width > 1)}"
            yield name, "CPU us", (part.each(),)
            yield name, "p50 / p99 us", half_and_most(part.times, 1e6)

        load = Load(server, 1, pushes("alone"), pushed(), pause=0.01)
        part = load.measure(2 * T)
        load.end()
        name = "P1 push of one mutation, alone, 0.01 s after the last answer"
        yield name, "p50 / p99 us", half_and_most(part.times, 1e6)

        batches = itertools.islice(pushes("log", 100), LOG // 100)
        part = measure(server, 4, batches, pushed(100), PATIENCE)
        yield "P2 push of 100, 4 connections", "CPU us a mutation", (part.each(100),)

        # Only this scope's numbers follow one another from here on: its tail is found
        # by counting.
        head = json.loads(
            server.ask(get("/sync/pull?scope=log&limit=1")).partition(b"\r\n\r\n")[2]
        )
        first = int(head["changes"][0]["cursor"])
        last = first + LOG - 1
        for what, request, right in (
            ("P3 empty pull at the head", pull("log", last), paged(0, False)),
            ("P3 tail page of 100", pull("log", last - TAIL), paged(TAIL, False)),
            (
                f"P3 first page of 100 of {LOG:,}, from disk",
                pull("log", 0),
                paged(TAIL, True),
            ),
        ):
            part = measure(server, 16, itertools.repeat(request), right, T)
            yield what, "CPU us", (part.each(),)


def hints(start: Start, T: float, changes: bool) -> Iterator[Row]:
    """P4, P5: how soon everybody knows, and has. With `changes` for servers that put
    them in."""
    kinds = [("last has pulled", True, False)]
    kinds += [("last has it, changes in hints", True, True)] if changes else []
    with start() as server:
        for size in (100, 1000):
            with Audience(server, f"steady-{size}", size) as audience:
                times = steady(audience, 20, 2 * T)
            name = f"P4 {size} subscribers, 20 pushes a second: last notified"
            yield name, "p50 / p99 ms", half_and_most(times, 1e3)
        with Audience(server, "told", 1000) as audience:
            times = list(one_by_one(audience, T, lambda: audience.told))
        name = "P4 1000 subscribers, one push: last "
        yield name + "notified", "p50 / p99 ms", half_and_most(times, 1e3)
        for number, (what, pulls, inside) in enumerate(kinds):
            with Audience(server, f"has-{number}", 1000, pulls, inside) as audience:
                times = list(one_by_one(audience, T, lambda: audience.got))
            yield (
                name.removesuffix("last ") + what,
                "p50 ms",
                half_and_most(times, 1e3)[:1],
            )
    for what, pulls, inside in kinds:
        times, deadline = [], clock() + 3 * T
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
    audience: Audience, T: float, known: Callable[[], int]
) -> Iterator[float]:
    """From a push until the last has heard of it, or has it; then a pause, and the
    next."""
    connection, source = Connection(audience.server), pushes(audience.scope)
    deadline = clock() + 2 * T

    def heard(_: Connection, answer: bytearray) -> None:
        if not pushed()(answer):
            wrong[answer[:200].decode(errors="replace")] += 1

    for number in itertools.count(1):
        connection.ask(next(source), heard)
        reached = functools.partial(
            lambda size: known() >= size, number * len(audience.followers)
        )
        audience.loop.until(reached, "everybody knows")
        if number > 2:  # the first ones warm up
            yield audience.last - connection.began
        audience.loop.pause(0.05)  # longer than a server may space its hints
        if clock() > deadline:
            break
    connection.close()
    if known() != number * len(audience.followers):
        wrong["something was heard twice"] += 1


def steady(audience: Audience, rate: int, seconds: float) -> list[float]:
    """Push at a fixed rate; return how long after each push the last follower had heard
    of it."""
    connection, source = Connection(audience.server), pushes(audience.scope)
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
    """Seconds from the first of `count` pushes until every follower has every
    change."""
    began, size = clock(), count * len(audience.followers)
    load = Load(
        audience.server, 8, itertools.islice(pushes(audience.scope), count), pushed()
    )
    audience.loop.until(
        lambda: audience.got >= size and not load.busy, "everybody has everything"
    )
    if audience.got != size:
        wrong["a follower has a change twice"] += 1
    return audience.last - began


def memory(start: Start, sessions: int) -> Iterator[Row]:
    """P6: after a few sessions that load what all of them share."""
    with start() as server, Audience(server, "idle", 50):
        before = server.memory()
        with Audience(server, "idle", sessions):
            each = (server.memory() - before) / sessions
    yield f"P6 memory of an idle subscribed session, of {sessions:,}", "KiB", (each,)


# --- Scenarios: mizusync alone --------------------------------------------------------


def growth(start: Start, folder: Path, T: float) -> Iterator[Row]:
    """P7: what 1,000,000 changes cost more than 10,000. Two servers take turns, so that
    the weather is the same for both; their logs are written with SQL: a million pushes
    would take too long."""
    sizes, files = (SMALL, BIG), [folder / "small.db", folder / "big.db"]
    for size, db in zip(sizes, files, strict=True):
        with start(db=str(db)):
            pass  # makes the tables
        write_log(db, size)
    with start(db=str(files[0])) as small, start(db=str(files[1])) as big:
        servers = small, big
        yield f"P7 start to listening, {SMALL:,} / {BIG:,} changes", "ms", [
            server.opening * 1e3 for server in servers
        ]  # fmt: skip
        for what, place, right in (  # pages first, since a push moves the tail
            ("tail page of 100", (SMALL - TAIL, BIG - TAIL), paged(TAIL, False)),
            ("first page of 100", (0, 0), paged(TAIL, True)),
            ("middle page of 100", (SMALL // 2, BIG // 2), paged(TAIL, True)),
            ("push of one mutation", (), pushed()),
        ):
            costs = [Part((), 0), Part((), 0)]
            for turn in range(6):
                which = turn % 2
                page = itertools.repeat(pull("log", place[which])) if place else None
                costs[which] += measure(
                    servers[which], 16, page or pushes("log"), right, T / 2
                )
            small_cost, big_cost = (cost.each() for cost in costs)
            yield f"P7 {what} at {BIG:,} changes", "CPU us", (big_cost,)
            yield (
                f"P7 {what} at {BIG:,} changes against {SMALL:,}",
                "ratio",
                (big_cost / small_cost,),
            )
            if what == "first page of 100":
                part = measure(big, 1, itertools.repeat(pull("log", 0)), right, T)
                name = f"P7 {what} at {BIG:,} changes, 1 connection"
                yield name, "p50 / p99 us", half_and_most(part.times, 1e6)
        yield (
            f"P7 memory of the server at {BIG:,} changes",
            "MiB",
            (big.memory() / 1024,),
        )
    for db in files:
        remove(db)


def write_log(db: Path, size: int) -> None:
    """As pushes of one todo each would have written it; the tables are mizusync's
    Store's."""
    connection = sqlite3.connect(db, isolation_level=None)
    with contextlib.closing(connection):
        # One write of each page, and none of them has to survive us. The server sets
        # WAL again.
        connection.executescript(
            "PRAGMA journal_mode = DELETE; PRAGMA synchronous = OFF; BEGIN;"
        )
        for sql in (
            "INSERT INTO mizusync_changes SELECT n, n, 'log',"
            """ '2026-01-01T00:00:00.000Z', printf(
                '{"op":"create","todo":{"id":"s-%08d","title":"Buy milk, number %d",'
                || '"completed":false}}', n, n) FROM rows""",
            "INSERT INTO mizusync_mutations"
            " SELECT 'log', printf('s-%08d', n), n, n FROM rows",
            "INSERT INTO todos SELECT n, 'log', printf('s-%08d', n),"
            """ 'Buy milk, number ' || n, 0
                FROM rows""",
        ):
            connection.execute(
                f"""WITH RECURSIVE rows (n) AS
                (SELECT 1 UNION ALL SELECT n + 1 FROM rows WHERE n < {size}) {sql}"""
            )
        connection.execute("COMMIT")


def fairness(start: Start, T: float) -> Iterator[Row]:
    """What others make a calm client wait: one that pushes, and 0.1 s after the answer
    again.

    There are four of them, for the sake of more times; the others have connections of
    their own."""
    with start() as server:
        fill(server, "log", 5000)
        head = json.loads(server.ask(pull("log", 0, 1)).partition(b"\r\n\r\n")[2])[
            "changes"
        ][0]
        tail = int(head["cursor"]) + 5000 - 1 - TAIL
        memory_page = (16, itertools.repeat(pull("log", tail)), paged(TAIL, False))
        disk_page = (16, itertools.repeat(pull("log", 0)), paged(TAIL, True))
        for what, others in (
            ("alone", None),
            ("beside 16 that pull from memory without end", memory_page),
            ("beside 16 that pull from disk without end", disk_page),
            (
                "beside 4 that push 100 without end",
                (4, pushes("other", 100), pushed(100)),
            ),
        ):
            load = Load(server, *others) if others else None
            yield f"A push each 0.1 s, {what}", "p50 / p99 ms", calm(server, T)
            if load:
                load.end()
        with Audience(server, "calm", 1000):
            what = "with 1000 subscribers"
            yield f"A push each 0.1 s, {what}", "p50 / p99 ms", calm(server, T)


def calm(server: Server, T: float) -> tuple[float, float]:
    probe = Load(server, 4, pushes("calm"), pushed(), pause=0.1)
    part = probe.measure(2 * T)
    probe.end()
    return half_and_most(part.times, 1e3)


def snapshots(start: Start, T: float, todos: int = 50_000) -> Iterator[Row]:
    """How long a big snapshot holds the server for everybody else."""
    with start() as server:
        fill(server, "big", todos)
        whole = server.ask(get("/sync/snapshot?scope=big"))
        if not is_ok(whole) or whole.count(b'"completed"') != todos:
            wrong["a snapshot that is not whole"] += 1
        # The same body each time; to count in it again would hold this client instead.
        same = len(whole)
        taking = itertools.repeat(get("/sync/snapshot?scope=big"))
        name = "A small request each 2 ms"
        for what in ("alone", f"beside snapshots of {todos:,} todos without end"):
            load = (
                Load(server, 1, taking, lambda a: len(a) == same)
                if what != "alone"
                else None
            )
            probe = Load(
                server, 1, itertools.repeat(pull("none", 0)), paged(0, False), 0.002
            )
            part = probe.measure(2 * T)
            probe.end()
            if load:
                load.end()
                what += f" ({statistics.median(load.times) * 1e3:.0f} ms each)"
            worst = max(part.times, default=0.0) * 1e3
            times = *half_and_most(part.times, 1e3), worst
            yield f"{name}, {what}", "p50 / p99 / worst ms", times


# --- Count ----------------------------------------------------------------------------
# One client asks one thing at a time, so that the server does the same work in each
# run, in the same order. Only HTTP and the command line are used: versions of the file
# differ in the rest.


class CountedServer(Server):
    """A server under valgrind, which counts the instructions of its process, not the
    kernel's."""

    def __init__(self, file: str, loop: Loop, folder: Path) -> None:
        self.dumps = folder / f"instructions-{next(numbers)}"
        valgrind = [
            "valgrind",
            "-q",
            "--tool=callgrind",
            f"--callgrind-out-file={self.dumps}",
        ]
        slowed = [sys.executable, str(HERE / "bench_counted.py"), file]
        super().__init__([*valgrind, *slowed], loop, folder)
        self.parts = 0  # so many files that callgrind has written
        self.connection = Connection(self)
        idle = self.count(lambda: loop.pause(3))
        if idle > 3 * 10_000:
            # bench_counted.py has to slow a way to wait that it does not know.
            wrong[
                f"timers take {idle // 3:,} instructions a second: no count is exact"
            ] += 1

    def count(self, work: Callable[[], None]) -> int:
        """Return the instructions that the server needs for `work`."""
        self.rest()
        self._dump()
        work()
        self.rest()
        return self._dump()

    def count_each(self, work: Callable[[int], None], size: int) -> float:
        """Return the instructions of one request, where `work(n)` makes `n` of them.

        It is the median of five parts: what is rare (a checkpoint, a full collection of
        garbage) would fall into a row of one run and into another row of the next.
        """
        part = size // 5
        return (
            statistics.median(self.count(lambda: work(part)) for _ in range(5)) / part
        )

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
        for request in requests:
            self.rest()
            if not right(answer := self.ask(request, self.connection)):
                wrong[answer[:200].decode(errors="replace")] += 1

    def rest(self) -> None:
        """Wait until all the server's threads sleep: a request that comes earlier costs
        less."""
        stats = list(Path(f"/proc/{self.popen.pid}/task").glob("*/stat"))
        while any(" S " not in stat.read_text() for stat in stats):
            time.sleep(0.001)


def instructions(server: CountedServer) -> Iterator[Row]:
    """The script: what each kind of request costs. The log that pushes of 100 fill is
    read then."""
    unit = "instructions"
    warm_up = 30  # requests of each row

    def row(
        what: str, requests: Iterator[bytes], right: Right, size: int, width: int
    ) -> Row:
        first = itertools.islice(requests, warm_up)
        measure(server, width, first, right, 10 * PATIENCE)  # to their end

        def work(part: int) -> None:
            server.ask_all(itertools.islice(requests, part), right)

        return what, unit, (server.count_each(work, size),)

    # First, since in a server that has done a lot already it repeats less well.
    with Audience(server, "told", 20) as audience:
        announce = functools.partial(push_and_wait, server, audience)
        announce(10)
        cost = server.count_each(announce, 40)
    yield "push of 1, and its hint to 20 subscribers", unit, (cost,)

    for mutations, scope, size in (1, "one", 270), (10, "ten", 50), (100, "log", 20):
        source, right = pushes(scope, mutations), pushed(mutations)
        yield row(f"push of {mutations}", source, right, size, width=1)

    changes = (warm_up + 20) * 100  # memory keeps the newest 1000
    first = int(
        json.loads(server.ask(pull("log", 0, 1)).partition(b"\r\n\r\n")[2])["cursor"]
    )
    last = first + changes - 1

    def whole(answer: bytearray) -> bool:
        return is_ok(answer) and answer.count(b'"completed"') == warm_up + 270

    for what, request, right, size in (
        ("empty pull", pull("log", last), paged(0, False), 300),
        ("pull of 100 from memory", pull("log", last - TAIL), paged(TAIL, False), 300),
        (
            "pull of 100 from disk",
            pull("log", first + changes // 2),
            paged(TAIL, True),
            100,
        ),
        ("first page of 100, from disk", pull("log", 0), paged(TAIL, True), 100),
        ("snapshot of 300 todos", get("/sync/snapshot?scope=one"), whole, 100),
    ):
        # Many at once warm up each of the server's threads and connections that read.
        yield row(what, itertools.repeat(request), right, size, width=16)


def push_and_wait(server: CountedServer, audience: Audience, size: int) -> None:
    """Push `size` times, each time until every subscriber has heard of it."""
    for request in itertools.islice(pushes(audience.scope), size):
        server.rest()
        audience.wait(cursor_of(server.ask(request, server.connection)))
        audience.loop.pause(
            1
        )  # longer than a server may space its hints, even when slowed


# --- Table ----------------------------------------------------------------------------


def table(columns: dict[str, list[Row]]) -> Iterator[str]:
    names = list(dict.fromkeys(row[:2] for rows in columns.values() for row in rows))
    found = {
        (server, *row[:2]): row[2] for server, rows in columns.items() for row in rows
    }
    yield f"| scenario | unit | {' | '.join(columns)} |"
    yield f"| --- | --- |{' ---: |' * len(columns)}"
    for name in names:
        cells = (
            " / ".join(map(number, found.get((server, *name), ())))
            for server in columns
        )
        yield f"| {' | '.join((*name, *(cell or '-' for cell in cells)))} |"


def number(value: float) -> str:
    return (
        f"{value:,.0f}"
        if value >= 100
        else f"{value:.1f}"
        if value >= 10
        else f"{value:.2f}"
    )


def about(folder: Path, peers: Sequence[str]) -> Iterator[str]:
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    cores = f"{len(CORES)} cores of {model[1] if model else platform.machine()}"
    yield f"{time.strftime('%Y-%m-%d')}, {cores}, Linux {platform.release()}"
    versions = f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}"
    yield f"{versions}; one core a server"
    for package in ("aiohttp", "fastapi", "uvicorn") if peers else ():
        yield f"{package} {importlib.metadata.version(package)}"
    sync = half_and_most(list(syncs(folder)), 1e6)[0]
    yield f"fdatasync of 4 KiB in {folder.parent}: p50 {sync:.0f} us"


def syncs(folder: Path) -> Iterator[float]:
    """What the disk makes each commit wait, at least."""
    with (folder / "sync").open("wb", buffering=0) as file:
        for _ in range(300):
            file.write(bytes(4096))
            began = clock()
            os.fdatasync(file.fileno())
            yield clock() - began


HERE = Path(__file__).resolve().parent
CORES = sorted(os.sched_getaffinity(0))


def measure_all(args: argparse.Namespace, folder: Path) -> None:
    T, sessions = (0.8, 1000) if args.quick else (1.5, 3000)
    commands = {"mizusync": [sys.executable, args.server]}
    if args.peers:
        peers = [sys.executable, str(HERE / "bench_peers.py")]
        commands |= {name: [*peers, name] for name in ("aiohttp", "FastAPI")}
    columns: dict[str, list[Row]] = {name: [] for name in commands}
    loop = Loop()
    for server, command in commands.items():
        start = functools.partial(Server, command, loop, folder)
        ours = server == "mizusync"
        scenarios: list[Iterator[Row]] = [
            requests(start, T), hints(start, T, ours), memory(start, sessions)
        ]  # fmt: skip
        if ours:
            scenarios += (
                growth(start, folder, T),
                fairness(start, T),
                snapshots(start, T),
            )
        columns[server] = report(server, itertools.chain.from_iterable(scenarios))
    print(*table(columns), "", *about(folder, list(commands)[1:]), sep="\n")


def count_all(files: Sequence[str], folder: Path) -> None:
    """Count for each file; of two, show the second by the first."""
    os.environ["PYTHONHASHSEED"] = "0"  # the servers inherit it, too
    columns: dict[str, list[Row]] = {}
    global numbers
    for file in files:
        numbers = itertools.count(1)  # the same requests for each
        name = file if file not in columns else f"{file}, again"
        with CountedServer(file, Loop(), folder) as server:
            columns[name] = report(name, instructions(server))
    if len(files) == 2:
        old, new = columns.values()
        columns["ratio"] = [
            (*after[:2], (after[2][0] / before[2][0],))
            for before, after in zip(old, new, strict=True)
        ]
    print(*table(columns), "", *about(folder, ()), sep="\n")


def report(name: str, rows: Iterable[Row]) -> list[Row]:
    """Return the rows; say each one as soon as it is there."""
    began, known = clock(), list[Row]()
    for row in rows:
        print(f"{clock() - began:5.1f} {name}: {row}", file=sys.stderr)
        known.append(row)
    return known


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Measure mizusync, and what one would use instead."
    )
    add = parser.add_argument
    add(
        "--server",
        default=str(HERE.parent / "mizusync.py"),
        help="the mizusync.py to measure",
    )
    add("--peers", action="store_true", help="measure aiohttp and FastAPI, too")
    add("--quick", action="store_true", help="shorter parts: for a first look")
    help_count = (
        "count instructions instead; beside those of OTHER, another mizusync.py"
    )
    add("--count", nargs="?", const="", metavar="OTHER", help=help_count)
    args = parser.parse_args()
    if len(CORES) > 1:
        os.sched_setaffinity(0, CORES[1:])
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # the servers inherit it
    with tempfile.TemporaryDirectory(prefix="mizusync-bench-") as name:
        if args.count is None:
            measure_all(args, Path(name))
        else:
            count_all(
                [args.count, args.server] if args.count else [args.server], Path(name)
            )
    for what, count in wrong.most_common(20):
        print(f"WRONG, {count} times: {what}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
