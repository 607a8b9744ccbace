"""Tests of mizusync, in the order of its sections: each name is a promise, in the
protocol's words.

What goes over a socket goes through RawClient, which is written from the RFCs and
imports no parser of ours, so that no mistake cancels itself. Nothing sleeps to wait: a
condition has a deadline."""

from __future__ import annotations

import ast
import asyncio
import base64
import copy
import email.utils
import functools
import gc
import gzip
import hashlib
import hmac
import http.client
import inspect
import itertools
import json
import logging
import math
import os
import random
import re
import resource
import select
import shlex
import shutil
import signal
import socket
import sqlite3
import ssl
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import tracemalloc
import uuid
import weakref
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlencode

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import mizusync
from mizusync import (
    Change,
    Engine,
    Hint,
    Hub,
    Json,
    Mutation,
    Server,
    Settings,
    StoreError,
    Unavailable,
)

PATIENCE = 20.0  # seconds that anything may take which should happen at once
MOMENT = 0.125  # a limit that a test wants to see run out

SMALL = Settings(linger_timeout=1.0, close_timeout=1.0, shutdown_timeout=5.0)
KEY = b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="  # with its answer in RFC 6455 §1.3
TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10
CODES = {  # the protocol's "errors", but for 410, which has two
    400: "invalid_request",
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    409: "conflict",
    413: "too_large",
    414: "uri_too_long",
    415: "unsupported_media_type",
    426: "upgrade_required",
    431: "headers_too_large",
    500: "internal_error",
    501: "not_implemented",
    503: "unavailable",
    505: "version_not_supported",
}
OBLIGED = {401: "www-authenticate", 405: "allow", 426: "upgrade", 503: "retry-after"}

T = TypeVar("T")


# --- Helpers --------------------------------------------------------------------------
# An application of a few lines, a server in a thread, and a client that knows the RFCs
# alone.

SCHEMA = "CREATE TABLE IF NOT EXISTS notes (scope TEXT, data TEXT);"
REFUSALS: dict[str, type[mizusync.SyncError]] = {
    "invalid_mutation": mizusync.InvalidMutation,
    "not_found": mizusync.NotFound,
    "conflict": mizusync.Conflict,
    "forbidden": mizusync.Forbidden,
}


def apply(db: sqlite3.Connection, mutation: Mutation) -> list[Any]:
    """Apply a mutation of the tests: one name for each thing that can become of one."""
    match mutation.name, mutation.args:
        case "hold", _:  # see writer_held
            held = HELD[mutation.id]
            held.entered.set()
            assert held.release.wait(PATIENCE)
            return []
        case "note", data:
            db.execute(
                "INSERT INTO notes VALUES (?, ?)", (mutation.scope, json.dumps(data))
            )
            return [data]
        case "notes", int(count):
            return list(range(count))
        case "share", [*scopes]:
            return [Change(mutation.id, scope=scope) for scope in scopes]
        case "who", _:
            return [mutation.identity]
        case "refuse", str(code):
            raise REFUSALS[code]("a reason for people")
    raise RuntimeError("a secret of the inside")


def snapshot(db: sqlite3.Connection, scope: str) -> list[Any]:
    rows = db.execute("SELECT data FROM notes WHERE scope = ? ORDER BY rowid", (scope,))
    return [json.loads(data) for (data,) in rows]


class Held(NamedTuple):
    """The two moments of a mutation that keeps the writer busy."""

    entered: threading.Event
    release: threading.Event


HELD: dict[str, Held] = {}  # by the id of the mutation


@contextmanager
def writer_held(engine: Engine) -> Iterator[Future[list[mizusync.Result]]]:
    """Keep the engine's writer inside a mutation while the block lasts.

    What is pushed in the block waits, and joins that mutation's transaction if the
    engine's `max_commit_time` allows it (see ONE_TRANSACTION). Its `apply` has to hand
    the mutation "hold" to the tests' own. Yield the future of its push."""
    key = f"hold {uuid.uuid4()}"
    held = HELD[key] = Held(threading.Event(), threading.Event())
    holding = engine.submit([{"id": key, "name": "hold"}])
    assert held.entered.wait(PATIENCE)
    try:
        yield holding
    finally:
        held.release.set()
        assert holding.result(PATIENCE)[0].ok


def stalled(
    entered: threading.Event, release: threading.Event
) -> Callable[..., list[Any]]:
    """An application in which every mutation stays until it is released."""

    def apply_stalled(db: sqlite3.Connection, mutation: Mutation) -> list[Any]:
        entered.set()
        release.wait(PATIENCE)
        return [mutation.id]

    return apply_stalled


# Whatever waits for the writer joins the transaction that is being made.
ONE_TRANSACTION = Settings(max_commit_time=PATIENCE)


def note(key: str, args: Any = None, **fields: Any) -> dict[str, Any]:
    return {"id": key, "name": "note", "args": args, **fields}


def table(name: str, rows: Mapping[str, Any]) -> pytest.MarkDecorator:
    """One test for each row, under the row's own name."""
    return pytest.mark.parametrize(name, list(rows.values()), ids=list(rows))


def until(condition: Callable[[], T]) -> T:
    """Wait for what should become true; a deadline, never a sleep that hopes."""
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.002)
    return value


def raw(*lines: bytes, body: bytes = b"") -> bytes:
    """A request as it goes over the wire: its lines, an empty one, its body."""
    return b"\r\n".join((*lines, b"", b"")) + body


def chunked(*parts: bytes, trailer: bytes = b"") -> bytes:
    """RFC 9112 §7.1."""
    chunks = [b"%x\r\n%b\r\n" % (len(part), part) for part in (*parts, b"")]
    return b"".join(chunks)[:-2] + trailer + b"\r\n"


def masked(opcode: int, payload: bytes, fin: bool = True, rsv: int = 0) -> bytes:
    """A client's frame (RFC 6455 §5.2)."""
    head = bytearray([fin << 7 | rsv << 4 | opcode])
    if len(payload) < 126:
        head.append(0x80 | len(payload))
    elif len(payload) < 2**16:
        head += b"\xfe" + len(payload).to_bytes(2, "big")
    else:
        head += b"\xff" + len(payload).to_bytes(8, "big")
    key = b"\x37\xfa\x21\x3d"
    pad = int.from_bytes((key * (len(payload) // 4 + 1))[: len(payload)], "big")
    return (
        bytes(head)
        + key
        + (int.from_bytes(payload, "big") ^ pad).to_bytes(len(payload), "big")
    )


def pieces(data: bytes, cuts: Iterable[int]) -> list[bytes]:
    """The same bytes, cut at these places."""
    places = sorted({cut % (len(data) + 1) for cut in cuts} | {0, len(data)})
    return [data[start:end] for start, end in itertools.pairwise(places)]


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body.decode())


class Frame(NamedTuple):
    opcode: int
    payload: bytes
    fin: bool = True


class RawClient:
    """A blocking socket that speaks HTTP/1.1 and WebSocket, and checks what it is
    told."""

    def __init__(self, address: tuple[str, int], receive_buffer: int = 0) -> None:
        self.address, self.buffer = address, bytearray()
        self.sock = socket.socket()
        self.sock.settimeout(PATIENCE)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if receive_buffer:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        try:
            self.sock.connect(address)
        except OSError:
            self.sock.close()
            raise

    def close(self) -> None:
        self.sock.close()

    def reset(self) -> None:
        """Go without a word, and without reading what was said."""
        self.sock.setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
        )
        self.sock.close()

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def half_close(self) -> None:
        self.sock.shutdown(socket.SHUT_WR)

    def take(self, size: int) -> bytes:
        while len(self.buffer) < size:
            if not (more := self.sock.recv(65536)):
                raise EOFError(f"the server closed after {bytes(self.buffer)!r}")
            self.buffer += more
        taken = bytes(self.buffer[:size])
        del self.buffer[:size]
        return taken

    def line(self) -> bytes:
        line = bytearray()
        while not line.endswith(b"\r\n"):
            line += self.take(1)
        return bytes(line[:-2])

    def ended(self) -> bool:
        """Whether the server closes now, in order (no reset), and said nothing more."""
        return not self.buffer and self.sock.recv(1) == b""

    def request(
        self,
        method: str,
        target: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        fields = {"Host": "{}:{}".format(*self.address)} | dict(headers or {})
        if body is not None:
            fields = {
                "Content-Type": "application/json",
                "Content-Length": str(len(body)),
            } | fields
        lines = [
            f"{method} {target} HTTP/1.1",
            *(f"{k}: {v}" for k, v in fields.items()),
        ]
        self.send(raw(*(line.encode() for line in lines), body=body or b""))
        return self.response(bodiless=method == "HEAD")

    def response(self, *, bodiless: bool = False) -> Reply:
        version, status, _ = self.line().split(b" ", 2)
        assert version == b"HTTP/1.1"
        headers: dict[str, str] = {}
        while line := self.line():
            name, value = line.decode("ascii").split(":", 1)
            assert re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name), line
            assert name.lower() not in headers, line
            headers[name.lower()] = value.strip(" \t")
        if int(status) < 200 or status in (b"204", b"304"):
            assert "content-length" not in headers  # RFC 9110 §8.6
            return Reply(int(status), headers, b"")
        size = 0 if bodiless else int(headers["content-length"])
        return Reply(int(status), headers, self.take(size))

    def push(
        self, *mutations: Any, headers: Mapping[str, str] | None = None
    ) -> list[Any]:
        reply = self.request(
            "POST", "/sync/push", json.dumps(mutations).encode(), headers
        )
        assert reply.status == 200, reply
        results: list[Any] = reply.json
        return results

    def pull(self, **parameters: Any) -> Any:
        reply = self.request("GET", "/sync/pull?" + urlencode(parameters))
        assert reply.status == 200, reply
        return reply.json

    def upgrade(
        self, target: str = "/ws", headers: Mapping[str, str] | None = None
    ) -> Reply:
        key, value = KEY.decode().split(": ")
        fields = {
            "Connection": "Upgrade",
            "Upgrade": "websocket",
            "Sec-WebSocket-Version": "13",
        }
        return self.request(
            "GET", target, headers=fields | {key: value} | dict(headers or {})
        )

    def send_frame(self, opcode: int, payload: bytes, fin: bool = True) -> None:
        self.send(masked(opcode, payload, fin))

    def read_frame(self) -> Frame:
        first, second = self.take(2)
        assert not first & 0x70, "an extension that was never agreed on"
        assert not second & 0x80, "a server masks nothing (RFC 6455 §5.1)"
        size, shortest = second, 0
        if second > 125:
            shortest = 126 if second == 126 else 2**16
            size = int.from_bytes(self.take(2 if second == 126 else 8), "big")
        assert size >= shortest, "a length in more bytes than it needs"
        return Frame(first & 15, self.take(size), bool(first & 0x80))

    def read_json(self) -> Any:
        """The next message; a ping on the way is answered."""
        while (frame := self.read_frame()).opcode == PING:
            self.send_frame(PONG, frame.payload)
        assert frame.opcode == TEXT, frame
        return json.loads(frame.payload.decode())

    def read_close(self) -> int:
        """The code of the server's close frame, which is answered; then nothing but the
        end."""
        while (frame := self.read_frame()).opcode != CLOSE:
            pass
        self.send_frame(CLOSE, frame.payload)
        assert self.ended()
        self.close()
        frame.payload[2:].decode()
        return int.from_bytes(frame.payload[:2], "big")

    def say(self, topic: str, data: Any = None) -> None:
        self.send_frame(TEXT, json.dumps({"topic": topic, "data": data}).encode())

    def subscribe(self, **data: Any) -> Any:
        self.say("subscribe", data)
        return self.read_json()

    def quiet(self) -> bool:
        """Whether nothing stood in the way of the answer to a ping."""
        self.send_frame(PING, b"quiet?")
        return self.read_frame() == Frame(PONG, b"quiet?")


class Records(logging.Handler):
    """What was logged, as text, tracebacks included."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        # asyncio's warnings are about slow machines, its errors about our faults.
        self.addFilter(
            lambda record: "mizusync" in record.name or record.levelno >= logging.ERROR
        )
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(
            logging.Formatter("%(levelname)s %(name)s: %(message)s").format(record)
        )


@contextmanager
def recorded() -> Iterator[Records]:
    """All that is logged meanwhile, down to the last request."""
    everything, loggers = (
        Records(),
        list(map(logging.getLogger, ("mizusync", "asyncio"))),
    )
    everything.setLevel(logging.DEBUG)
    with ExitStack() as stack:
        for logger in loggers:
            stack.callback(logger.setLevel, logger.level)
            stack.callback(logger.removeHandler, everything)
            logger.setLevel(logging.DEBUG)
            logger.addHandler(everything)
        yield everything


class Live:
    """A server at work in a thread of its own, so that tests are plain functions."""

    address: tuple[str, int]
    loop: asyncio.AbstractEventLoop

    def __init__(self, engine: Engine, server: Server) -> None:
        self.engine, self.server = engine, server
        self.records, self.clients = Records(), ExitStack()
        self.stopping, self.left = asyncio.Event(), set[str]()

    async def main(self) -> None:
        async with self.server.listen("127.0.0.1", 0) as (host, port):
            self.loop = asyncio.get_running_loop()
            self.address = (host, port)
            await self.stopping.wait()
        self.left = {
            repr(task) for task in asyncio.all_tasks() - {asyncio.current_task()}
        }

    def stop(self) -> None:
        with suppress(RuntimeError):  # its loop is closed: a test has stopped it before
            self.loop.call_soon_threadsafe(self.stopping.set)

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What the function or coroutine function gives, called in the server's
        loop."""

        async def called() -> Any:
            value = function(*arguments)
            return await value if asyncio.iscoroutine(value) else value

        return asyncio.run_coroutine_threadsafe(called(), self.loop).result(PATIENCE)

    def tasks(self) -> int:
        return int(self.call(lambda: len(asyncio.all_tasks())))

    def client(self, receive_buffer: int = 0) -> RawClient:
        return self.clients.enter_context(
            closing(RawClient(self.address, receive_buffer))
        )

    def socket(
        self,
        target: str = "/ws",
        headers: Mapping[str, str] | None = None,
        receive_buffer: int = 0,
    ) -> RawClient:
        client = self.client(receive_buffer)
        assert client.upgrade(target, headers).status == 101
        return client

    def logged(self, words: str) -> None:
        """The test expects this record, and only then is it no fault."""
        until(lambda: any(words in text for text in self.records.texts))
        self.records.texts = [text for text in self.records.texts if words not in text]


@contextmanager
def serving(
    engine: Engine,
    *,
    prepare: Callable[[Server], Any] = lambda server: None,
    may_log: str = "$^",
    **options: Any,
) -> Iterator[Live]:
    """A server on this engine; both end with it, without a task or an unexpected record
    left."""
    with closing(engine), ExitStack() as stack:
        live = Live(engine, Server(engine, **options))
        prepare(live.server)
        for logger in (logging.getLogger("mizusync"), logging.getLogger("asyncio")):
            logger.addHandler(live.records)
            stack.callback(logger.removeHandler, live.records)
        stack.callback(gc.collect, 1)  # a task that failed unheard is heard of now
        thread = threading.Thread(target=lambda: asyncio.run(live.main()), daemon=True)
        thread.start()
        until(lambda: hasattr(live, "address") or not thread.is_alive())
        try:
            yield live
        finally:
            live.clients.close()
            live.stop()
            thread.join(PATIENCE)
    assert not thread.is_alive(), "the server did not end"
    assert not live.left, "tasks were left"
    assert not [text for text in live.records.texts if not re.search(may_log, text)]


@contextmanager
def serve(
    folder: Path,
    settings: Settings = SMALL,
    *,
    apply: Callable[[sqlite3.Connection, Mutation], Iterable[Any]] = apply,
    snapshot: Callable[[sqlite3.Connection, str], Any] | None = snapshot,
    **options: Any,
) -> Iterator[Live]:
    """A server on a file in this folder, and the tests' application on it."""
    path = folder / "log.db"
    engine = Engine(
        path, apply=apply, snapshot=snapshot, schema=SCHEMA, settings=settings
    )
    with serving(engine, **options) as live:
        yield live


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Live]:
    with serve(tmp_path) as live:
        yield live


@pytest.fixture
def client(server: Live) -> RawClient:
    return server.client()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with serve(tmp_path_factory.mktemp("shared"), may_log=".") as live:
        yield live


@pytest.fixture
def visitor(shared: Live) -> Iterator[RawClient]:
    """A client of one server for all that is only refused: nothing is applied, nothing
    logged."""
    shared.records.texts.clear()
    with closing(RawClient(shared.address)) as client:
        yield client
    gc.collect(1)
    assert not shared.records.texts
    with closing(RawClient(shared.address)) as client:
        assert client.pull()["changes"] == []


def refused(reply: Reply, *statuses: int, code: str = "") -> bool:
    """Whether this is one of these refusals, whole: code, sentence, and the fields it
    needs."""
    assert reply.status in statuses, reply
    assert list(reply.json) == ["code", "error"]
    assert reply.json["code"] == (code or CODES[reply.status])
    assert " " in str(reply.json["error"])
    assert reply.headers["content-type"].split(";")[0] == "application/json"
    assert reply.headers["cache-control"] == "no-store"
    assert "date" in reply.headers
    return reply.headers.get(OBLIGED.get(reply.status, "date")) not in (None, "")


settings.register_profile(
    "mizusync", deadline=None, max_examples=60, derandomize="CI" in os.environ
)
settings.load_profile("mizusync")

DEFAULT = "_default"
DUPLICATE = {"duplicate": True}  # a retry's result has this besides the first result


def open_log(path: Path, **options: Any) -> Engine:
    """An engine on this file, with the tests' application."""
    usual: dict[str, Any] = {"apply": apply, "snapshot": snapshot, "schema": SCHEMA}
    return Engine(path, **(usual | options))


def ask(coroutine: Coroutine[Any, Any, T], debug: bool | None = None) -> T:
    """What a coroutine gives, in a loop of its own.

    asyncio's debug mode writes down where each call comes from: without it, what is
    asked a thousand times takes a fourth of the time."""
    return asyncio.run(asyncio.wait_for(coroutine, PATIENCE), debug=debug)


def push(engine: Engine, *mutations: Any) -> list[Any]:
    """The results, as a client reads them."""
    return [
        json.loads(result.encoded)
        for result in engine.submit(mutations).result(PATIENCE)
    ]


def pull(
    engine: Engine, cursor: int = 0, scope: str = DEFAULT, **parameters: Any
) -> Any:
    """A page, as a client reads it."""
    return json.loads(
        ask(engine.pull(scope, cursor, **parameters), debug=False).encode()
    )


def pages(
    engine: Engine, cursor: int = 0, scope: str = DEFAULT, limit: int = 1000
) -> list[Any]:
    """Every page from here on."""
    found = [pull(engine, cursor, scope, limit=limit)]
    while found[-1]["hasMore"]:
        found.append(pull(engine, found[-1]["cursor"], scope, limit=limit))
    return found


def whole_log(engine: Engine, scope: str = DEFAULT, limit: int = 1000) -> list[Any]:
    return [
        change for page in pages(engine, 0, scope, limit) for change in page["changes"]
    ]


def fold(changes: Iterable[Any]) -> list[Any]:
    """What `snapshot` gives after these changes."""
    return [change["data"] for change in changes]


def ledger(db: sqlite3.Connection, mutation: Mutation) -> Iterator[Change]:
    """An application whose snapshot is the fold of its changes, and that may fail when
    all is done.

    `args` is a list of scopes, and the code to fail with at the end or null.
    """
    scopes, failure = mutation.args
    for number, scope in enumerate(scopes):
        data = f"{mutation.id}.{number}"
        db.execute("INSERT INTO notes VALUES (?, ?)", (scope, json.dumps(data)))
        yield Change(data, scope=scope)
    if failure == "internal_error" and len(scopes) % 2:  # as if the disk were full
        db.execute("CREATE TABLE ends (n INTEGER PRIMARY KEY AUTOINCREMENT)")
        db.execute("INSERT INTO ends VALUES (9223372036854775807), (NULL)")
    elif failure == "internal_error":  # the worst: with it goes the whole transaction
        db.execute("CREATE TABLE only (n UNIQUE ON CONFLICT ROLLBACK)")
        db.execute("INSERT INTO only VALUES (1), (1)")
    if failure:
        raise REFUSALS[failure]("a reason")


def entry(
    key: str, *scopes: str, fail: str | None = None, scope: str = DEFAULT
) -> dict[str, Any]:
    """A mutation of `ledger`: one change in each of these scopes."""
    return {"id": key, "scope": scope, "name": "entry", "args": [list(scopes), fail]}


def cursor_of(change: Any) -> int:
    return int(change["cursor"])


def made_by(engine: Engine, result: Any, scopes: list[str]) -> list[Any]:
    """What an entry with these scopes changed: its result shows only its own scope."""
    first = result["cursor"] - len(scopes) + 1
    found = [
        change
        for scope in set(scopes)
        for change in pull(engine, first - 1, scope, limit=1000)["changes"]
        if change["cursor"] <= result["cursor"]
    ]
    changes = sorted(found, key=cursor_of)
    assert [change["scope"] for change in changes] == scopes
    return changes


def make_database(path: Path, *statements: str) -> None:
    """Run statements on a SQLite file, without the engine."""
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        for statement in statements:
            db.execute(statement)


def raising(error: BaseException) -> Any:
    raise error


def refuses(action: Callable[[], Any]) -> bool:
    """Return whether an action raises Unavailable."""
    try:
        action()
    except Unavailable:
        return True
    return False


async def asked(question: Callable[[], Any]) -> Any:
    """Call a coroutine function inside the running loop, and await it."""
    return await question()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log.db"


@pytest.fixture
def engine(path: Path) -> Iterator[Engine]:
    with closing(open_log(path)) as engine:
        yield engine


# --- Settings -------------------------------------------------------------------------
# A wrong setting is refused at once, by its name and with its value.


@pytest.mark.parametrize("name", list(asdict(Settings())))
def test_a_wrong_setting_is_refused_with_its_name_and_value(name: str) -> None:
    default = getattr(Settings(), name)
    is_whole = isinstance(default, int) or name == "keep_changes"
    wrong_types: list[Any] = ["5", b"5", [], True, 1j]
    out_of_range: list[Any] = [-1, 10**400]
    floats = [-0.5, math.nan, math.inf, -math.inf]
    if is_whole:
        wrong_types += [2.5, *floats]
    else:
        out_of_range += floats
    if default is not None:
        wrong_types.append(None)
    for value in wrong_types:
        with pytest.raises(TypeError, match=re.escape(f"{name}={value!r}")):
            Settings(**{name: value})
    for value in out_of_range:
        with pytest.raises(ValueError, match=re.escape(f"{name}={value!r}")):
            Settings(**{name: value})


@table(
    "case",
    {
        "a keep_changes of 0": ("keep_changes", 0),
        "a keep_changes with a fraction": ("keep_changes", 5.0),
        "an auth_interval of 0": ("auth_interval", 0),
        "a send_buffer that no kernel takes": ("send_buffer", 2**31),
        "a busy_timeout that SQLite takes as 0": ("busy_timeout", 2**31),
        "more readers than there are descriptors": ("readers", 100_000),
        "no readers": ("readers", 0),
        "a close_timeout of 0": ("close_timeout", 0.0),
    },
)
def test_a_setting_with_which_nothing_could_work_is_refused(
    case: tuple[str, Any],
) -> None:
    name, value = case
    with pytest.raises((TypeError, ValueError), match=f"{name}={value!r}"):
        replace(SMALL, **{name: value})


def test_with_every_setting_at_0_that_may_be_0_pushes_and_pulls_work(
    tmp_path: Path,
) -> None:
    zeros: dict[str, Any] = {
        "max_pull_wait": 0,
        "min_gzip_size": 0,
        "linger_timeout": 0,
        "max_hint_changes": 0,
        "max_hint_size": 0,
        "hint_gap": 0,
        "max_sessions": 0,
        "shutdown_timeout": 0,
        "max_commit_time": 0,
        "max_tail_changes": 0,
        "max_tail_size": 0,
        "busy_timeout": 0,
    }
    assert set(zeros) == mizusync.MAY_BE_ZERO
    with serve(tmp_path, Settings(**zeros)) as live:
        client = live.client()
        (result,) = client.push(note("a"))
        assert client.pull()["changes"] == result["changes"]


# --- JSON -----------------------------------------------------------------------------
# Strict, and limited in depth and in values before anything is built.

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
almost_json = st.text('[]{}",:\\ud8f0123456789eE+-. \ntrualsNIf\u00e9\U0001f600').map(
    str.encode
)


@given(value=json_values, ascii_only=st.booleans(), indent=st.sampled_from([None, 2]))
def test_any_json_value_is_parsed_as_it_was_encoded(
    value: Any, ascii_only: bool, indent: int | None
) -> None:
    encoded = json.dumps(value, ensure_ascii=ascii_only, indent=indent).encode()
    assert mizusync.parse_json(encoded) == value


@settings(max_examples=300)
@given(data=st.binary() | almost_json, depth=st.integers(1, 64))
def test_any_bytes_are_a_json_value_or_an_invalid_request(
    data: bytes, depth: int
) -> None:
    with suppress(mizusync.InvalidRequest):
        value = mizusync.parse_json(data, depth)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()


@table(
    "data",
    {
        # Grammar (RFC 8259 §2 to §5).
        "nothing": b"",
        "a blank": b" ",
        "two blanks": b"  ",
        "a trailing comma in an array": b"[1,]",
        "a trailing comma in an object": b'{"a":1,}',
        "a key without a value": b'{"a"}',
        "two values": b"[1] 2",
        "brackets that do not match": b"[}",
        "a comment": b"1 /* one */",
        "a no-break space": b"\xc2\xa01",
        "a cut literal": b"nul",
        "a literal of Python": b"True",
        # Numbers (§6).
        "a leading zero": b"01",
        "a plus sign": b"+1",
        "no digit before the point": b".5",
        "no digit after the point": b"1.",
        "hexadecimal": b"0x1",
        "an Arabic digit": "\u0661".encode(),
        "NaN": b"NaN",
        "NaN in an array": b"[NaN]",
        "Infinity": b"Infinity",
        "-Infinity": b"-Infinity",
        "1e400": b"1e400",
        "-1e400": b"-1e400",
        "1e999 in an object": b'{"a": 1e999}',
        "310 digits": b"1" * 310,
        "5,000 digits": b"-" + b"9" * 5000,
        # Strings (§7).
        "single quotes": b"{'a': 1}",
        "a string without its end": b'"',
        "an escape without its end": b'"\\',
        "an unknown escape": rb'"\x41"',
        "a control character": b'"\x01"',
        "a tab": b'"\t"',
        "half a surrogate pair, high": rb'"\ud800"',
        "half a surrogate pair, low": rb'"\udc00"',
        "half a surrogate pair in a key": rb'{"\ud800": 1}',
        "two high surrogates": rb'["\ud800\ud800"]',
        "a surrogate pair in the wrong order": rb'"\udc00\ud800"',
        # UTF-8 (§8.1).
        "a surrogate in UTF-8": b'"\xed\xa0\x80"',
        "an overlong encoding": b'"\xc0\xaf"',
        "a byte that UTF-8 never has": b'"\xff"',
        "Latin-1": b'"\xe9"',
        "a byte order mark": b"\xef\xbb\xbf1",
        "UTF-16": "[1]".encode("utf-16"),
        "UTF-16, little-endian": "[1]".encode("utf-16-le"),
        "UTF-16, big-endian": "[1]".encode("utf-16-be"),
        "UTF-32": "[1]".encode("utf-32"),
    },
)
def test_bytes_that_are_no_strict_json_in_utf_8_are_an_invalid_request(
    data: bytes,
) -> None:
    with pytest.raises(mizusync.InvalidRequest):
        mizusync.parse_json(data)


@pytest.mark.parametrize("number", [2**63 - 1, -(2**63), 2**53, 0])
def test_an_integer_of_64_bits_is_parsed_exactly(number: int) -> None:
    (value,) = mizusync.parse_json(b"[%d]" % number)
    assert (value, type(value)) == (number, int)


@table(
    "case",
    {
        "2**63": (b"9223372036854775808", 2.0**63),
        "-(2**63) - 1": (b"-9223372036854775809", -(2.0**63)),
        "1e20 as JavaScript writes it": (b"100000000000000000000", 1e20),
        "309 digits": (b"1" + b"0" * 308, 1e308),
    },
)
def test_an_integer_that_does_not_fit_64_bits_becomes_a_float(
    case: tuple[bytes, float],
) -> None:
    text, number = case
    (value,) = mizusync.parse_json(b"[%b]" % text)
    assert (value, type(value)) == (number, float)


def test_an_escaped_surrogate_pair_is_one_character() -> None:
    assert mizusync.parse_json(rb'"\ud83d\ude00"') == "\U0001f600"


@table(
    "case",
    {
        "arrays": (b"[", b"]", 1),
        "objects": (b'{"[":', b"}", 1),
        "both": (b'[{"\\"}":', b"}]", 2),
    },
)
def test_json_is_parsed_to_64_levels_and_no_deeper(
    case: tuple[bytes, bytes, int],
) -> None:
    opening, closing, levels = case
    times = 64 // levels
    mizusync.parse_json(opening * times + b"1" + closing * times)
    side_by_side = [opening + b"1" + closing] * 100
    mizusync.parse_json(b"[" + b",".join(side_by_side) + b"]")
    with pytest.raises(mizusync.InvalidRequest, match="deeper than 64 levels"):
        mizusync.parse_json(opening * (times + 1) + b"1" + closing * (times + 1))


def test_brackets_in_a_string_do_not_count_as_levels() -> None:
    text = '[{\\"[' * 100
    assert mizusync.parse_json(json.dumps([text]).encode()) == [text]


@table(
    "case",
    {  # a value, and the number of arrays and objects in it
        "a number": (b"0", 0),
        "a string": (b'"a"', 0),
        "a backslash": (b'"\\\\"', 0),
        "an array": (b"[]", 1),
        "an object": (b"{}", 1),
        "brackets, commas and quotes in strings": (b'[{"[,": "\\",["}]', 2),
    },
)
def test_json_of_more_values_than_the_limit_is_too_large(
    case: tuple[bytes, int],
) -> None:
    # Each `[`, each `{` and each `,` counts as a value.
    value, openings = case
    limit = 40 * (1 + openings)  # 40 times the value: the array, and 39 commas
    forty = b",".join([value] * 40)
    mizusync.parse_json(b"[" + forty + b"]", 64, limit)
    with pytest.raises(mizusync.TooLarge, match=f"{limit} values"):
        mizusync.parse_json(b"[" + forty + b",0]", 64, limit)


@pytest.mark.parametrize("text", [",", "[", '\\",', "\\\\,{", "\\u005b,", "\u00e9,"])
def test_brackets_and_commas_in_a_string_do_not_count_as_values(text: str) -> None:
    encoded = '"%s"' % (text * 150_000)
    assert mizusync.parse_json(encoded.encode()) == json.loads(encoded)


HOSTILE_PIECES = rb'" \" "\ [ [" "[ {"a": [] [[] "", 1 \ 1e ] , ",", "[", \\",'.split()


@pytest.mark.parametrize("piece", HOSTILE_PIECES)
def test_hostile_json_takes_time_linear_in_its_size(piece: bytes) -> None:
    # If the time grew with the square of the size, half a megabyte would take minutes.
    started = time.process_time()
    for prefix in (b"", b"[" * 65, b'["' + b"[" * 65):
        with suppress(mizusync.InvalidRequest, mizusync.TooLarge):
            mizusync.parse_json(prefix + piece * (2**19 // len(piece)))
    assert time.process_time() - started < PATIENCE / 4


# --- Protocol -------------------------------------------------------------------------
# A mutation is checked once, at the door. Each answer has the protocol's fields.


@pytest.mark.parametrize("args", [None, 0, False, "", [], {}, {"a": [1]}], ids=repr)
def test_the_args_of_a_mutation_are_any_json_value(args: Any) -> None:
    parsed = Mutation.parse({"id": "1", "name": "n", "args": args})
    assert parsed == Mutation("1", "n", args, DEFAULT)
    assert type(parsed.args) is type(args)  # 0 == False


def test_unknown_fields_of_a_mutation_are_ignored() -> None:
    parsed = Mutation.parse({"id": "1", "name": "n", "args": 5, "unknown": "ignored"})
    assert parsed == Mutation("1", "n", 5, DEFAULT)


def test_a_mutation_without_args_and_scope_has_null_and_the_default_scope() -> None:
    assert Mutation.parse({"id": "1", "name": "n"}) == Mutation("1", "n", None, DEFAULT)


@pytest.mark.parametrize("character", ["a", "\U0001f600"])
def test_the_longest_id_name_and_scope_are_counted_in_code_points(
    character: str,
) -> None:
    longest = {"id": character * 128, "name": character * 128, "scope": character * 256}
    parsed = Mutation.parse(longest)
    assert [parsed.id, parsed.name, parsed.scope] == list(longest.values())
    for field in longest:
        with pytest.raises(mizusync.InvalidMutation):
            Mutation.parse(longest | {field: longest[field] + character})


@table(
    "case",
    {  # a value, the field that is at fault, and a pattern of the sentence
        "null": (None, None, "has to be a JSON object"),
        "a number": (1, None, "has to be a JSON object"),
        "a string": ("text", None, "has to be a JSON object"),
        "an array": ([], None, "has to be a JSON object"),
        "an empty object": ({}, "id", "1 to 128 .* empty or missing"),
        "no id": ({"name": "n"}, "id", "1 to 128 .* empty or missing"),
        "an id of null": ({"id": None, "name": "n"}, "id", "no string"),
        "a long id": ({"id": "x" * 129, "name": "n"}, "id", "128 .* has 129"),
        "half a surrogate pair": ({"id": "\ud800", "name": "n"}, "id", "surrogate"),
        "a number as a name": ({"id": "1", "name": 5}, "name", "no string"),
        "no name": ({"id": "1"}, "name", "1 to 128 .* empty or missing"),
        "an empty scope": ({"id": "1", "name": "n", "scope": ""}, "scope", "empty"),
        "a long scope": (
            {"id": "1", "name": "n", "scope": "x" * 257},
            "scope",
            "256 .* has 257",
        ),
    },
)
def test_the_refusal_of_a_mutation_names_the_field_and_its_fault(
    case: tuple[Any, str | None, str],
) -> None:
    value, field, fault = case
    with pytest.raises(mizusync.InvalidMutation, match=fault) as caught:
        Mutation.parse(value)
    named = re.findall(r"\b(?:id|name|scope)\b", str(caught.value))
    assert set(named) == ({field} if field else set())


@settings(max_examples=15)
@given(data=st.lists(json_values, min_size=1, max_size=3))
def test_the_data_of_a_change_is_pulled_as_apply_returned_it(data: list[Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log.db"
        with closing(
            open_log(path, apply=lambda db, mutation: mutation.args)
        ) as engine:
            (result,) = push(engine, {"id": "1", "name": "n", "args": data})
            assert fold(result["changes"]) == data
            assert whole_log(engine) == result["changes"]
        with closing(open_log(path)) as engine:
            assert whole_log(engine) == result["changes"]


def test_answers_have_their_fields_in_the_order_of_the_protocol(engine: Engine) -> None:
    applied, duplicate, failed = push(
        engine, note("1"), note("1"), {"id": "2", "name": "?"}
    )
    assert list(applied) == ["ok", "cursor", "changes"]
    assert list(duplicate) == ["ok", "cursor", "changes", "duplicate"]
    assert list(failed) == ["ok", "code", "error"]
    assert list(applied["changes"][0]) == ["cursor", "scope", "time", "data"]
    assert list(pull(engine)) == ["changes", "cursor", "epoch", "hasMore"]
    encoded_snapshot = ask(engine.snapshot()).encode()
    assert list(json.loads(encoded_snapshot)) == ["data", "cursor", "epoch"]


def test_a_change_has_the_time_of_its_commit_in_utc(engine: Engine) -> None:
    before = datetime.now(UTC)
    (result,) = push(engine, note("1"))
    (change,) = result["changes"]
    moment = datetime.strptime(change["time"], "%Y-%m-%dT%H:%M:%S.%f%z")
    one_millisecond = timedelta(milliseconds=1)  # the precision of a change's time
    assert before - one_millisecond <= moment <= datetime.now(UTC)


def test_half_a_surrogate_pair_in_a_refusal_is_sent_as_a_question_mark(
    path: Path,
) -> None:
    def refuse(db: sqlite3.Connection, mutation: Mutation) -> Any:
        raise mizusync.InvalidMutation("no \ud800")

    with closing(open_log(path, apply=refuse)) as engine:
        for result in push(engine, note("1"), note("2")):
            assert result == {"ok": False, "code": "invalid_mutation", "error": "no ?"}


# --- Guard ----------------------------------------------------------------------------
# A statement that finds a lock is tried again until the lock is free.

BUSY_WRITER = """
import sqlite3, sys, time
db = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=60)
while True:
    db.execute("BEGIN IMMEDIATE")
    db.execute("INSERT INTO notes VALUES ('', '')")
    print(flush=True)
    time.sleep(0.005)
    db.execute("COMMIT")
"""


@table(
    "options",
    {
        "a schema": {"schema": "CREATE TABLE IF NOT EXISTS more (n);"},
        "a pragma": {"schema": "PRAGMA user_version = 7;"},
        "adopt": {"adopt": True},
    },
)
def test_opening_a_log_gets_its_turn_beside_a_busy_writer_of_another_process(
    path: Path, options: dict[str, Any]
) -> None:
    make_database(path, "PRAGMA journal_mode = WAL", SCHEMA)
    if "adopt" not in options:
        open_log(path, adopt=True).close()
    command = [sys.executable, "-c", BUSY_WRITER, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
        try:
            assert writer.stdout
            assert writer.stdout.readline()  # the writer is in a transaction
            patient = Settings(busy_timeout=PATIENCE)
            open_log(path, settings=patient, **options).close()
            assert writer.poll() is None
        finally:
            writer.kill()


# An application can't shadow the log, and can't touch the sequence that holds its head.


@table(
    "statements",
    {
        "a table": ["CREATE TEMP TABLE t (n)"],
        "a table of the schema temp": ["CREATE TABLE temp.t (n)"],
        "a table with a query": ["CREATE TEMPORARY TABLE t AS SELECT 1"],
        "a sequence": ["CREATE TEMP TABLE t (n INTEGER PRIMARY KEY AUTOINCREMENT)"],
        "a table that is renamed": [
            "CREATE TEMP TABLE t AS SELECT * FROM mizusync_changes",
            "ALTER TABLE t RENAME TO mizusync_changes",
        ],
        "a view": ["CREATE TEMP VIEW v AS SELECT 1"],
        "a trigger": [
            "CREATE TEMP TRIGGER w AFTER INSERT ON notes BEGIN SELECT 1; END"
        ],
        "a virtual table": ["CREATE VIRTUAL TABLE temp.v USING fts4(n)"],
    },
)
def test_nothing_is_created_in_temp_where_it_could_shadow_the_log(
    path: Path, statements: list[str]
) -> None:
    def create(db: sqlite3.Connection) -> list[Any]:
        for statement in statements:
            db.execute(statement)
        return []

    def apply_or_create(db: sqlite3.Connection, mutation: Mutation) -> Any:
        return create(db) if mutation.name == "create" else apply(db, mutation)

    with pytest.raises(StoreError, match="TEMP"):
        open_log(path, schema=f"{SCHEMA} {'; '.join(statements)}")
    with (
        recorded() as records,
        closing(open_log(path, apply=apply_or_create)) as engine,
    ):
        creation = {"id": "creation", "name": "create"}
        results = push(engine, note("1", 1), creation, note("2", 2))
        assert [result["ok"] for result in results] == [True, False, True]
        with pytest.raises(sqlite3.DatabaseError, match="not authorized"):
            ask(engine.read(create))
        assert fold(whole_log(engine)) == [1, 2]
    assert any("not authorized" in text and "TEMP" in text for text in records.texts)


def application_tables(path: Path) -> set[str]:
    """Return the names in a database's schema that are neither the log's nor SQLite's
    own."""
    with closing(sqlite3.connect(path)) as db:
        names = {name for (name,) in db.execute("SELECT name FROM sqlite_master")}
    return {name for name in names if not name.startswith(("mizusync_", "sqlite_"))}


def test_apply_alters_its_tables_but_renames_and_drops_no_sequence(path: Path) -> None:
    schema = """
        CREATE TABLE plain (n);
        CREATE TABLE kept (n);
        CREATE TABLE counted (n INTEGER PRIMARY KEY AUTOINCREMENT);
    """
    allowed = [
        "ALTER TABLE plain RENAME COLUMN n TO o",
        "ALTER TABLE plain ADD COLUMN p",
        "DROP TABLE plain",
        "INSERT INTO counted VALUES (NULL)",
        "CREATE TABLE new (n INTEGER PRIMARY KEY AUTOINCREMENT)",
    ]
    denied = [
        "DROP TABLE counted",
        "ALTER TABLE counted RENAME TO other",
        "ALTER TABLE kept RENAME TO other",
    ]

    def run_args(db: sqlite3.Connection, mutation: Mutation) -> list[Any]:
        db.execute(mutation.args)
        return []

    with closing(open_log(path, apply=run_args, schema=schema)) as engine:
        results = push(engine, *(note(sql, sql) for sql in allowed + denied))
        assert [result["ok"] for result in results] == [True] * 5 + [False] * 3
    assert application_tables(path) == {"kept", "counted", "new"}


def test_the_schema_may_rename_a_table_and_drop_a_sequence(path: Path) -> None:
    tables = """
        CREATE TABLE kept (n);
        CREATE TABLE counted (n INTEGER PRIMARY KEY AUTOINCREMENT);
        INSERT INTO counted VALUES (NULL);
    """
    open_log(path, schema=tables).close()
    schema = f"{SCHEMA} DROP TABLE counted; ALTER TABLE kept RENAME TO other"
    with closing(open_log(path, schema=schema)) as engine:
        assert push(engine, note("1"))[0]["ok"]
    assert application_tables(path) == {"notes", "other"}


# What an application may do with its connection, and what it may not: a misuse fails
# its own mutation, and no other.

KEPT: list[Any] = []  # cursors and blobs that an application keeps open
TRACE = "INSERT INTO notes VALUES ('_default', '\"a trace\"')"


def leave_select_open(db: sqlite3.Connection) -> Any:
    sql = """
        WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 999)
        SELECT i FROM n
    """
    cursor = db.execute(sql)
    assert cursor.fetchone() == (1,)
    KEPT.append(cursor)
    return ["fine"]


def leave_insert_returning_open(db: sqlite3.Connection) -> Any:
    cursor = db.cursor()
    cursor.execute("INSERT INTO notes VALUES ('n', '1'), ('n', '2') RETURNING data")
    assert cursor.fetchone() == ("1",)
    KEPT.append(cursor)
    return ["fine"]


def leave_blob_open(db: sqlite3.Connection) -> Any:
    (row,) = db.execute("SELECT max(rowid) FROM notes").fetchone()
    blob = db.blobopen("notes", "data", row)
    blob.write(b"n")  # of null
    KEPT.append(blob)
    return ["fine"]


def change_factories(db: sqlite3.Connection) -> Any:
    db.row_factory = sqlite3.Row
    db.text_factory = bytes
    return ["fine"]


def create_table(db: sqlite3.Connection) -> Any:
    db.execute("CREATE TABLE mine (n)")
    return ["fine"]


def use_savepoints(db: sqlite3.Connection) -> Any:
    db.execute("SAVEPOINT mine")
    db.execute("DELETE FROM notes")
    db.execute("ROLLBACK TO mine")
    db.execute("RELEASE mine")
    db.execute("SAVEPOINT left_open")
    return ["fine"]


def fail_inside_savepoint(db: sqlite3.Connection) -> Any:
    db.execute("SAVEPOINT mine")
    raise mizusync.Conflict("with a savepoint open")


def write_inside_with_db(db: sqlite3.Connection) -> Any:
    with db:
        db.execute("INSERT INTO notes VALUES ('n', '1')")
    return ["fine"]


def yield_inside_with_db(db: sqlite3.Connection) -> Iterator[Any]:
    with db:
        yield {"a set, which is no JSON"}


def yield_and_fail(db: sqlite3.Connection) -> Iterator[Any]:
    yield "first"
    db.execute("INSERT INTO notes VALUES ('n', '1')")
    raise ZeroDivisionError


def yield_and_write_when_closed(db: sqlite3.Connection) -> Iterator[Any]:
    try:
        yield {"a set, which is no JSON"}
    finally:
        db.execute(TRACE)


def leave_thread_in_cursor(db: sqlite3.Connection) -> Any:
    """Fail while a thread of the application still runs a statement."""
    running = threading.Event()
    name = f"running_{uuid.uuid4().hex}"  # one in use can't be replaced
    db.create_function(name, 0, running.set)
    sql = f"""
        WITH RECURSIVE n(i) AS
            (SELECT {name}() UNION ALL SELECT i + 1 FROM n LIMIT 200000)
        SELECT count(i) FROM n
    """
    cursor = db.cursor()

    def run() -> None:
        with suppress(sqlite3.Error):
            cursor.execute(sql)

    threading.Thread(target=run).start()
    assert running.wait(PATIENCE)
    raise TimeoutError("the statement takes too long")


def make_backup(db: sqlite3.Connection) -> Any:
    with closing(sqlite3.connect(":memory:")) as target:
        db.backup(target)  # it would wait for its own transaction
    return ["fine"]


def roll_back_by_conflict(db: sqlite3.Connection) -> Any:
    """Make SQLite roll the whole transaction back, and raise its error."""
    db.execute("CREATE TABLE only (n UNIQUE ON CONFLICT ROLLBACK)")
    db.execute("INSERT INTO only VALUES (1), (1)")


def roll_back_and_write(db: sqlite3.Connection) -> Any:
    """Suppress the error of a lost transaction, and write on."""
    with suppress(sqlite3.Error):
        roll_back_by_conflict(db)
    with suppress(sqlite3.Error):
        db.execute(TRACE)
    return ["fine"]


def roll_back_and_write_blob(db: sqlite3.Connection) -> Any:
    """Suppress the error of a lost transaction, and write into a row of before."""
    (row,) = db.execute("SELECT min(rowid) FROM notes").fetchone()
    with suppress(sqlite3.Error):
        roll_back_by_conflict(db)
    with db.blobopen("notes", "data", row) as blob:
        blob.write(b"9")
    return ["fine"]


def limit_time(db: sqlite3.Connection) -> Any:
    """Interrupt every statement from now on."""
    db.set_progress_handler(lambda: 1, 1)
    return ["fine"]


def write_mark(db: sqlite3.Connection) -> Any:
    sql = "INSERT INTO mizusync_mutations VALUES (?, ?, ?, ?)"
    db.execute(sql, ("a", "mark", None, 0))


def list_inside_itself() -> list[Any]:
    data: list[Any] = []
    data.append(data)
    return data


Use = Callable[[sqlite3.Connection], Any]


def run_statement(sql: str) -> Use:
    return lambda db: [*db.execute(sql), "done"]


FORBIDDEN_STATEMENTS = [
    # They would end the transaction, or the savepoint that guards a mutation.
    "BEGIN",
    "COMMIT",
    "commit",
    "COMMIT TRANSACTION",
    "END",
    "ROLLBACK",
    "VACUUM",
    "RELEASE mizusync_guard",
    "RELEASE MIZUSYNC_GUARD",
    "ROLLBACK TO mizusync_guard",
    'ROLLBACK TO "Mizusync_Guard"',
    # They would change the connection, or leave the file.
    "PRAGMA journal_mode = DELETE",
    "PRAGMA query_only = ON",
    "PRAGMA synchronous = OFF",
    "PRAGMA user_version = 3",
    "ATTACH ':memory:' AS other",
    "ATTACH 'data_version' AS other",  # the name of a pragma that is permitted
    "DETACH main",
    # They would change the log.
    "DELETE FROM mizusync_changes",
    "UPDATE mizusync_changes SET data = '1'",
    "INSERT INTO mizusync_epochs VALUES (9, 'x', 0)",
    "DELETE FROM MIZUSYNC_MUTATIONS",
    "REPLACE INTO mizusync_trims VALUES ('_default', 99)",
    "UPDATE sqlite_sequence SET seq = 0",
    "DROP TABLE mizusync_epochs",
    "DROP INDEX mizusync_changes_of_scope",
    "ALTER TABLE mizusync_trims RENAME TO trims",
    "ALTER TABLE mizusync_changes ADD COLUMN mine",
    "CREATE TRIGGER t AFTER INSERT ON mizusync_changes BEGIN DELETE FROM notes; END",
    "CREATE TEMP TRIGGER t AFTER INSERT ON mizusync_changes"
    " BEGIN DELETE FROM notes; END",
    "CREATE TEMP TABLE mizusync_changes (cursor, first, scope, time, data)",
]
MISUSES: dict[str, Use] = {
    # Of the connection.
    "with db": write_inside_with_db,
    "commit": lambda db: db.commit(),
    "rollback": lambda db: db.rollback(),
    "executescript": lambda db: db.executescript(
        "INSERT INTO notes VALUES ('n', '1');"
    ),
    "isolation_level": lambda db: setattr(db, "isolation_level", None),
    "close": lambda db: db.close(),
    "an authorizer of its own": lambda db: db.set_authorizer(None),
    "a backup": make_backup,
    "ROLLBACK on conflict": roll_back_by_conflict,
    "ROLLBACK on conflict, suppressed": roll_back_and_write,
    "ROLLBACK on conflict, and then a blob": roll_back_and_write_blob,
    "a failure inside a savepoint": fail_inside_savepoint,
    "a cursor in use by a thread": leave_thread_in_cursor,
    "a dedupe mark": write_mark,
    "a wrong statement": lambda db: db.execute("SELEC"),
    # Exceptions, and generators that raise them.
    "SystemExit": lambda db: raising(SystemExit(1)),
    "KeyboardInterrupt": lambda db: raising(KeyboardInterrupt()),
    "GeneratorExit": lambda db: raising(GeneratorExit()),
    "CancelledError": lambda db: raising(asyncio.CancelledError()),
    "MemoryError": lambda db: raising(MemoryError()),
    "StopIteration": lambda db: raising(StopIteration()),
    "a generator that fails midway": yield_and_fail,
    "a generator that writes when closed": yield_and_write_when_closed,
    "a generator inside with db": yield_inside_with_db,
    "a generator inside a map": lambda db: map(
        str.upper, yield_and_write_when_closed(db)
    ),
    # Values that are no changes.
    "a dict": lambda db: {"data": 1},
    "a string": lambda db: "text",
    "bytes": lambda db: b"text",
    "a number": lambda db: 5,
    "a bare Change": lambda db: Change(1),
    "a set as data": lambda db: [{1}],
    "NaN as data": lambda db: [float("nan")],
    "infinity as data": lambda db: [[float("-inf")]],
    "half a surrogate pair as data": lambda db: ["\ud800"],
    "half a surrogate pair as a key": lambda db: [{"\udfff": 1}],
    "half a surrogate pair in Json": lambda db: [Json('"\ud800"')],
    "Json without text": lambda db: [Json("")],
    "data inside itself": lambda db: [list_inside_itself()],
    "an empty scope": lambda db: [Change(1, scope="")],
    "a long scope": lambda db: [1, Change(1, scope="x" * 257)],
    "half a surrogate pair as scope": lambda db: [Change(1, scope="\ud800")],
    "a number as scope": lambda db: [Change(1, scope=5)],  # type: ignore[arg-type]
    "too many changes": lambda db: range(1001),
    "changes without end": lambda db: iter(lambda: 1, 2),
    **{sql: run_statement(sql) for sql in FORBIDDEN_STATEMENTS},
}
PERMITTED_USES: dict[str, Use] = {
    "savepoints of its own": use_savepoints,
    "a SELECT left open": leave_select_open,
    "INSERT RETURNING left open": leave_insert_returning_open,
    "a blob left open": leave_blob_open,
    "factories changed": change_factories,
    "a progress handler left in place": limit_time,
    "a table of its own": create_table,
    "reading the log": lambda db: db.execute(
        "SELECT cursor FROM mizusync_changes"
    ).fetchall(),
    "None": lambda db: None,
    "a generator": lambda db: (data for data in ("fine",)),
    "a tuple": lambda db: ("fine",),
    "a thousand changes": lambda db: range(1000),
}


def apply_carelessly(db: sqlite3.Connection, mutation: Mutation) -> Any:
    """Apply a mutation, and then use the connection as the mutation's id says."""
    changes = apply(db, mutation)
    use = (MISUSES | PERMITTED_USES).get(mutation.id)
    return use(db) if use else changes


@pytest.fixture(scope="module")
def misused_engines(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Engine, Engine]]:
    """Open an engine that lives through every misuse, and another on the same file."""
    path = tmp_path_factory.mktemp("misused") / "log.db"
    with (
        closing(open_log(path, apply=apply_carelessly)) as engine,
        closing(open_log(path)) as other_engine,
    ):
        push(engine, note("0"))
        yield engine, other_engine


@pytest.mark.parametrize("misuse", MISUSES)
def test_a_misuse_of_the_connection_fails_its_own_mutation_alone(
    misused_engines: tuple[Engine, Engine], misuse: str
) -> None:
    engine, other_engine = misused_engines
    start = ask(engine.current())
    data = ask(engine.snapshot()).data
    first, failed, last = push(
        engine, note(f"{misuse} 1", 1), note(misuse, "a trace"), note(f"{misuse} 2")
    )
    assert (first["ok"], failed["ok"], last["ok"]) == (True, False, True)
    assert failed["code"] in ("internal_error", "invalid_mutation", "conflict")
    (later,) = push(engine, note(f"{misuse} 3", 3))
    changes = [*first["changes"], *last["changes"], *later["changes"]]
    for reader in (engine, other_engine):
        assert pull(reader, start)["changes"] == changes
        assert ask(reader.snapshot()).data == [*data, 1, None, 3]
    (retried,) = push(other_engine, note(misuse))
    assert "duplicate" not in retried  # the failed mutation left no mark
    assert len(whole_log(engine)) == len(data) + 4


@pytest.mark.parametrize("use", PERMITTED_USES)
def test_a_permitted_use_of_the_connection_disturbs_no_later_mutation(
    path: Path, use: str
) -> None:
    with closing(open_log(path, apply=apply_carelessly)) as engine:
        results = push(engine, note("1", 1), note(use, None), note("2", 2))
        results += push(engine, note("3", 3))
        assert [result["ok"] for result in results] == [True] * 4
        (retried,) = push(engine, note("1", 1))  # its changes are read from the file
        assert retried == results[0] | DUPLICATE
        changes = [change for result in results for change in result["changes"]]
        assert whole_log(engine) == changes
    with closing(open_log(path)) as engine:
        assert whole_log(engine) == changes
        assert [data for data in ask(engine.snapshot()).data if data] == [1, 2, 3]
    KEPT.clear()


@table(
    "kind",
    {
        "full-text search": ("fts5(word)", "'milk'", "words MATCH 'milk'"),
        "old full-text search": ("fts4(word)", "'milk'", "words MATCH 'milk'"),
        "R*Tree": ("rtree(number, low, high)", "1, 2, 3", "low < 3"),
    },
)
def test_an_application_may_use_virtual_tables_also_after_a_restart(
    path: Path, kind: tuple[str, str, str]
) -> None:
    module, values, condition = kind
    schema = f"CREATE VIRTUAL TABLE IF NOT EXISTS words USING {module};"

    def write(db: sqlite3.Connection, mutation: Mutation) -> Any:
        db.execute("DELETE FROM words")
        db.execute(f"INSERT INTO words VALUES ({values})")
        return [1]

    def read(db: sqlite3.Connection, scope: str) -> Any:
        return len(db.execute(f"SELECT * FROM words WHERE {condition}").fetchall())

    for key in ("1", "2"):
        try:
            engine = open_log(path, apply=write, snapshot=read, schema=schema)
        except StoreError as error:
            pytest.skip(str(error.__cause__))
        with closing(engine):
            assert push(engine, note(key))[0]["ok"]
            assert ask(engine.snapshot()).data == 1


# Each call of `apply` or `snapshot` leaves the connection as it found it.


def test_a_database_cursor_that_apply_drops_is_closed_at_once(path: Path) -> None:
    def drop_cursor(db: sqlite3.Connection, mutation: Mutation) -> list[bool]:
        # The cursor is half read. If a thousand of them stayed open, they would take
        # a time that grows with the square of their number.
        dropped = weakref.ref(db.execute("SELECT 1 UNION SELECT 2"))
        return [dropped() is None]

    with closing(open_log(path, apply=drop_cursor)) as engine:
        (result,) = push(engine, note("1"))
        assert fold(result["changes"]) == [True]


@table(
    "statement",
    {
        "a commit": "COMMIT",
        "a pragma": "PRAGMA query_only = OFF",
        "a write": "DELETE FROM notes",
        "a write to the log": "DELETE FROM mizusync_changes",
        "another file": "ATTACH ':memory:' AS x",
    },
)
def test_a_snapshot_function_that_misuses_its_connection_fails_alone(
    path: Path, statement: str
) -> None:
    statements = [statement]
    kept_cursors: list[sqlite3.Cursor] = []

    def misuse(db: sqlite3.Connection, scope: str) -> Any:
        data = snapshot(db, scope)
        kept_cursors.append(db.execute("SELECT * FROM notes"))
        db.row_factory = lambda cursor, row: {}
        if statements:
            db.execute(statements.pop()).fetchall()
        return data

    with closing(open_log(path, snapshot=misuse)) as engine:
        push(engine, note("1", "here"))
        with pytest.raises((sqlite3.Error, RuntimeError)):
            ask(engine.snapshot())
        assert fold(whole_log(engine)) == ["here"]
        for _ in range(2):  # the second one uses the connection of the first
            assert ask(engine.snapshot()).data == ["here"]
        assert push(engine, note("2"))[0]["ok"]


# --- Database file --------------------------------------------------------------------
# A file that can't hold a log is refused, and stays as it is. Opening a log runs the
# application's schema, and writes nothing else.


def files_in(folder: Path) -> dict[str, bytes]:
    """Return the content of each file, except the WAL's index: readers write to it."""
    return {
        file.name: file.read_bytes()
        for file in folder.iterdir()
        if file.suffix != ".db-shm"
    }


def assert_refused_and_unchanged(path: Path, sentence: str, **options: Any) -> None:
    """Open a log; assert that this is refused with a sentence, and changes no file."""
    before = files_in(path.parent)
    with pytest.raises(StoreError, match=sentence):
        open_log(path, **options)
    assert files_in(path.parent) == before


@table(
    "statements",
    {
        "tables": ["CREATE TABLE invoices (n)", "INSERT INTO invoices VALUES (1)"],
        "an application id": ["PRAGMA application_id = 77", "PRAGMA user_version = 1"],
        "a WAL": ["PRAGMA journal_mode = WAL", "CREATE TABLE invoices (n)"],
    },
)
def test_another_programs_database_is_refused_and_unchanged(
    path: Path, statements: list[str]
) -> None:
    make_database(path, *statements)
    assert_refused_and_unchanged(path, "belongs to another program")


def test_a_wal_that_another_program_left_in_a_crash_is_refused_and_unchanged(
    tmp_path: Path, path: Path
) -> None:
    crashed = tmp_path / "crashed"
    crashed.mkdir()
    make_database(path, "PRAGMA journal_mode = WAL", "CREATE TABLE invoices (n)")
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("INSERT INTO invoices VALUES (1)")
        for file in tmp_path.glob("log.db*"):  # these are the files after a crash
            shutil.copy(file, crashed)
    assert files_in(crashed)["log.db-wal"]
    assert_refused_and_unchanged(crashed / "log.db", "belongs to another program")


@table(
    "data",
    {
        "a short text": b"no database at all",
        "a long text": b"text " * 4000,
        "the first bytes of a database": b"SQLite format 3\0" + bytes(200),
        "zeros": bytes(4096),
    },
)
def test_a_file_that_is_no_database_is_refused_and_unchanged(
    tmp_path: Path, path: Path, data: bytes
) -> None:
    path.write_bytes(data)
    assert_refused_and_unchanged(path, "can't be used")
    assert files_in(tmp_path) == {path.name: data}


def test_a_newer_format_is_refused_and_unchanged(path: Path) -> None:
    with closing(open_log(path)) as engine:
        push(engine, note("1"))
    make_database(path, "UPDATE mizusync_format SET format = format + 1")
    assert_refused_and_unchanged(path, "newer")


@table(
    "name",
    {
        "a folder that does not exist": "nowhere/log.db",
        "a folder": ".",
        "memory": ":memory:",
        "an empty name": "",
        "a NUL": "a\0b.db",
        "half a surrogate pair": "half a pair \ud800.db",
    },
)
def test_a_path_at_which_no_log_can_be_kept_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StoreError):
        Engine(name, apply=apply)
    assert list(tmp_path.iterdir()) == []


def orphan(folder: Path) -> Path:
    """Keep a database's WAL and lose the database; return the path that it had."""
    lost = folder / "lost"
    lost.mkdir()
    with closing(open_log(folder / "log.db")) as engine:
        push(engine, note("1"))
        shutil.copy(folder / "log.db-wal", lost)
    return lost / "log.db"


def test_a_wal_without_its_database_is_refused_and_unchanged(tmp_path: Path) -> None:
    assert_refused_and_unchanged(orphan(tmp_path), "-wal exists, and")


def test_an_empty_file_becomes_a_log_and_its_name_is_quoted_in_the_url(
    tmp_path: Path,
) -> None:
    strange = tmp_path / "50% ?mode=ro#\u00e9.db"
    strange.touch()
    with closing(open_log(strange)) as engine:
        assert push(engine, note("1"))[0]["ok"]
    assert strange.stat().st_size > 0


@table(
    "name",
    {
        "two slashes": lambda folder: f"/{folder}/log.db",
        "not UTF-8": lambda folder: os.fsdecode(os.fsencode(folder) + b"/\xff.db"),
    },
)
def test_a_path_that_is_no_url_is_opened(
    tmp_path: Path, name: Callable[[Path], str]
) -> None:
    strange = Path(name(tmp_path))
    try:
        strange.touch()
    except OSError:
        pytest.skip("this file system has no such names")
    for key in ("1", "2"):
        with closing(open_log(strange)) as engine:
            assert push(engine, note(key))[0]["ok"]
    assert strange.stat().st_size > 0
    assert len(list(tmp_path.iterdir())) == 1


UNPRIVILEGED = """
import os, sys, mizusync
mizusync.parse_args([])  # import everything while this user can still read it
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
sys.exit(mizusync.main(["--port", "0", "--db", sys.argv[1]]))
"""


@table(
    "case",
    {  # the database that the program opens, and the names without write permission
        "the file": ("log.db", ["log.db"]),
        "the WAL and its index": ("log.db", ["log.db-wal", "log.db-shm"]),
        "the WAL": ("log.db", ["log.db-wal"]),
        "the WAL's index": ("log.db", ["log.db-shm"]),
        "a backup": ("backup.db", ["backup.db"]),
        "the folder": ("log.db", ["."]),
    },
)
def test_a_database_without_write_permission_ends_the_program_with_one_sentence(
    case: tuple[str, list[str]],
) -> None:
    database, read_only = case
    with tempfile.TemporaryDirectory() as name:  # other users can't enter tmp_path
        root = Path(name)
        folder = root / "data"
        folder.mkdir()
        # All tables exist, so the program itself has nothing to write.
        schema = SCHEMA + mizusync.TODO_SCHEMA
        with closing(open_log(root / "log.db", schema=schema)) as engine:
            push(engine, note("1"))
            shutil.copy(root / "log.db", folder)
            if read_only != ["."]:  # a crash leaves these, too
                shutil.copy(root / "log.db-wal", folder)
                shutil.copy(root / "log.db-shm", folder)
        make_database(root / "log.db", f"VACUUM INTO '{folder}/backup.db'")
        for file in (root, folder, *folder.iterdir()):
            file.chmod(0o777)
        for file_name in read_only:
            (folder / file_name).chmod(0o555)
        ended = subprocess.run(
            [sys.executable, "-c", UNPRIVILEGED, str(folder / database)],
            cwd=PROGRAM.parent,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        folder.chmod(0o777)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert re.fullmatch(r"mizusync: .* can't be used .* writ\w+ .*\n", ended.stderr)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lists its mounts")
def test_a_database_file_that_is_mounted_without_its_folder_is_refused(
    tmp_path: Path,
) -> None:
    outside = tmp_path / "outside.db"
    mounted = tmp_path / "a blank, a \\ and a \n.db"
    link = tmp_path / "link.db"
    outside.touch()
    mounted.touch()
    link.symlink_to(mounted)
    mount = 'mount --bind "$1" "$2" && shift 2 && exec "$@"'
    in_namespace: list[Any] = ["unshare", "--mount", "sh", "-c", mount, "sh"]
    in_namespace += [outside, mounted]
    try:
        subprocess.run([*in_namespace, "true"], check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting is not allowed here")
    for file in (mounted, link):
        ended = subprocess.run(
            [*in_namespace, sys.executable, PROGRAM, "--port", "0", "--db", file],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert (ended.returncode, ended.stdout) == (1, "")
        assert "mount the folder" in ended.stderr
    assert outside.stat().st_size == 0


@table(
    "case",
    {  # a line of /proc/self/mountinfo, and its mount point
        "a file": (b"63 43 254:0 /a /d/x.db rw - ext4 /dev/vda rw", b"/d/x.db"),
        "optional fields": (b"1 2 0:5 / /p rw shared:1 master:2 - tmpfs t rw", b"/p"),
        "escapes": (rb"1 2 0:5 / /a\040b\134\011\012 rw - tmpfs t rw", b"/a b\\\t\n"),
        "not UTF-8": (b"1 2 0:5 / /\xff\r\x0c rw - tmpfs t rw", b"/\xff\r\x0c"),
    },
)
def test_mount_points_are_parsed_as_linux_writes_them(
    case: tuple[bytes, bytes],
) -> None:
    line, mount_point = case
    sysfs = b"22 28 0:21 / /sys rw,nosuid shared:7 - sysfs sysfs rw\n"
    assert mizusync.mount_points(sysfs + line + b"\n") == {b"/sys", mount_point}


@pytest.mark.parametrize("encoding", ["UTF-16le", "UTF-16be"])
def test_a_database_in_utf_16_is_refused_even_with_adopt(
    path: Path, encoding: str
) -> None:
    make_database(path, f"PRAGMA encoding = '{encoding}'", "CREATE TABLE invoices (n)")
    assert_refused_and_unchanged(path, encoding, adopt=True)


def test_an_empty_database_in_utf_16_is_refused_and_unchanged(path: Path) -> None:
    make_database(
        path, "PRAGMA encoding = 'UTF-16le'", "CREATE TABLE t (n)", "DROP TABLE t"
    )
    assert_refused_and_unchanged(path, "UTF-16")


def test_adopt_adds_the_log_to_an_applications_database(path: Path) -> None:
    make_database(
        path,
        "CREATE TABLE invoices (n)",
        "INSERT INTO invoices VALUES (41)",
        "PRAGMA user_version = 7",
        "PRAGMA application_id = 77",
    )
    with closing(open_log(path, adopt=True)) as engine:
        assert push(engine, note("1"))[0]["ok"]
    with closing(
        open_log(path)
    ) as engine:  # with a log in the file, adopt is not needed
        assert push(engine, note("2"))[0]["ok"]
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT * FROM invoices").fetchall() == [(41,)]
        assert db.execute("PRAGMA user_version").fetchone() == (7,)
        assert db.execute("PRAGMA application_id").fetchone() == (77,)


def test_every_table_of_the_log_is_named_mizusync(path: Path) -> None:
    with closing(open_log(path)) as engine:
        push(engine, note("1"))
    assert application_tables(path) == {"notes"}


def test_a_new_log_has_an_application_id_and_leaves_the_user_version(
    path: Path,
) -> None:
    with closing(open_log(path)) as engine:
        push(engine, note("1"))
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (0,)
        assert db.execute("PRAGMA application_id").fetchone() != (0,)


def test_opening_a_log_and_reading_from_it_write_nothing(path: Path) -> None:
    with closing(open_log(path)) as engine:
        push(engine, *(note(str(number)) for number in range(20)))
    before = path.read_bytes()
    with closing(open_log(path)) as engine:
        assert len(whole_log(engine)) == 20
        assert len(ask(engine.snapshot()).data) == 20
        assert path.read_bytes() == before
        assert path.with_name("log.db-wal").stat().st_size == 0
    assert path.read_bytes() == before


# The application's schema.


@table(
    "case",
    {  # a schema, and a pattern of the reason
        "a typing error": ("CREATE TABEL t (n);", 'near "TABEL": syntax error'),
        "a bracket is missing": ("CREATE TABLE t (n", "incomplete input"),
        "a string without its end": ("SELECT 'a;", "unrecognized token"),
        "a NUL": ("CREATE TABLE t (n); \0", "null character"),
        "BEGIN": ("-- all;\nbegin; CREATE TABLE t (n); COMMIT;", "leave out BEGIN"),
        "COMMIT": ("CREATE TABLE t (n); /* now */ COMMIT", "leave out COMMIT"),
        "END": ("CREATE TABLE t (n); END", "leave out END"),
        "ROLLBACK": ("CREATE TABLE t (n); ROLLBACK;", "leave out ROLLBACK"),
        "VACUUM": ("CREATE TABLE t (n); VACUUM;", "cannot VACUUM from within"),
        "a constraint": (
            "CREATE TABLE t (n CHECK (n)); REPLACE INTO t SELECT 0",
            "CHECK",
        ),
        "before a PRAGMA": ("CREATE TABLE t (n); NO; PRAGMA foreign_keys = ON", "NO"),
    },
)
def test_a_schema_with_a_mistake_is_refused_with_the_reason_and_rolled_back(
    path: Path, case: tuple[str, str]
) -> None:
    schema, reason = case
    with pytest.raises(StoreError, match=f"the schema for {path}.*{reason}"):
        open_log(path, schema=schema)
    with closing(open_log(path)) as engine:
        assert push(engine, note("1"))[0]["ok"]
    assert application_tables(path) == {"notes"}


TRIGGER = """
    CREATE TABLE IF NOT EXISTS seen (text TEXT);
    CREATE TRIGGER IF NOT EXISTS see AFTER INSERT ON notes BEGIN
        INSERT INTO seen VALUES (CASE WHEN new.data = '1' THEN 'one; 1' ELSE 'x' END);
        INSERT INTO seen VALUES ('two');
    END;
"""


@table(
    "schema",
    {
        "a trigger": TRIGGER,
        "comments": f"-- first;\n{TRIGGER} /* and; -- */ ; -- last",
        "no semicolon at the end": TRIGGER.rstrip("; \n"),
        "pragmas": f"PRAGMA user_version = 7; {TRIGGER}; /**/ pragma foreign_keys = ON",
        "a pragma for the journal": f"PRAGMA journal_mode = WAL; {TRIGGER}",
        "a semicolon in a string": (
            f"{TRIGGER} INSERT INTO seen SELECT 'a;b' WHERE false;"
        ),
    },
)
def test_all_statements_of_a_schema_run_at_each_opening(
    path: Path, schema: str
) -> None:
    for key in ("1", "2"):
        with closing(open_log(path, schema=SCHEMA + schema)) as engine:
            assert push(engine, note(key, int(key)))[0]["ok"]
    with closing(sqlite3.connect(path)) as db:
        seen = [text for (text,) in db.execute("SELECT text FROM seen ORDER BY rowid")]
    assert seen == ["one; 1", "two", "x", "two"]


def test_a_schema_needs_the_write_lock_only_if_it_writes(path: Path) -> None:
    schema = f"{SCHEMA} {TRIGGER} CREATE INDEX IF NOT EXISTS of_scope ON notes (scope);"
    larger_schema = f"{schema} CREATE TABLE IF NOT EXISTS more (n);"
    impatient = Settings(busy_timeout=MOMENT)
    open_log(path, schema=schema).close()
    with closing(sqlite3.connect(path, isolation_level=None)) as lock_holder:
        lock_holder.execute("BEGIN IMMEDIATE")
        with closing(open_log(path, schema=schema, settings=impatient)) as engine:
            assert whole_log(engine) == []
        with pytest.raises(StoreError, match="locked.*another process"):
            open_log(path, schema=larger_schema, settings=impatient)
        lock_holder.execute("ROLLBACK")
    open_log(path, schema=larger_schema, settings=impatient).close()


# --- SQLite ---------------------------------------------------------------------------
# The log in the file: commits, reads beside them, and the WAL.


def test_a_mutation_is_in_the_file_before_its_push_is_answered(
    engine: Engine, path: Path
) -> None:
    with closing(sqlite3.connect(path)) as db:
        for number in range(1, 11):
            push(engine, note(str(number)))
            changes = db.execute("SELECT count(*) FROM mizusync_changes").fetchone()
            notes = db.execute("SELECT count(*) FROM notes").fetchone()
            assert changes == (number,)
            assert notes == (number,)


def test_a_snapshot_function_that_writes_is_a_bug_and_not_a_refusal(path: Path) -> None:
    def write(db: sqlite3.Connection, scope: str) -> Any:
        db.execute("INSERT INTO notes VALUES ('n', '1')")

    with closing(open_log(path, snapshot=write)) as engine:
        with pytest.raises(RuntimeError, match="only apply may write"):
            ask(engine.snapshot())
        assert ask(engine.current()) == 0


def test_a_closed_log_is_one_file_that_passes_the_integrity_check(
    tmp_path: Path, path: Path
) -> None:
    with closing(open_log(path)) as engine:
        push(engine, *(note(str(number)) for number in range(20)))
    assert list(tmp_path.iterdir()) == [path]
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


# The WAL.


def limit_wal(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Let the engines reset a WAL of this size (bytes), and check it at each commit."""
    monkeypatch.setattr(mizusync, "MAX_WAL", size)
    monkeypatch.setattr(mizusync, "WAL_CHECK_INTERVAL", 0)


def trace_writer(
    trace: Callable[[str], object],
) -> Callable[[sqlite3.Connection, Mutation], list[Any]]:
    """Return the tests' `apply`; `trace` gets the writer's statements from then on, the
    engine's own among them."""

    def traced(db: sqlite3.Connection, mutation: Mutation) -> list[Any]:
        db.set_trace_callback(trace)
        return apply(db, mutation)

    return traced


@contextmanager
def read_held(engine: Engine) -> Iterator[None]:
    """Keep one of the engine's reads in its transaction while the block lasts."""
    entered = threading.Event()
    release = threading.Event()

    def hold(db: sqlite3.Connection) -> None:
        db.execute("SELECT * FROM notes").fetchall()
        entered.set()
        assert release.wait(PATIENCE)

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(ask, engine.read(hold))
        try:
            assert entered.wait(PATIENCE)
            yield
        finally:
            release.set()
        reading.result(PATIENCE)


class OverlappingReads:
    """A snapshot function: each read lasts until the next one has begun.

    While the engine lets no read begin, the next one can't, so a read also ends after
    20 ms."""

    def __init__(self) -> None:
        self.begun = 0
        self._next_begins = threading.Condition()

    def __call__(self, db: sqlite3.Connection, scope: str) -> None:
        db.execute("SELECT * FROM notes LIMIT 1").fetchone()
        with self._next_begins:
            self.begun += 1
            place = self.begun
            self._next_begins.notify_all()
            self._next_begins.wait_for(lambda: self.begun > place, timeout=0.02)


def test_reads_that_overlap_do_not_let_the_wal_grow(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_wal(monkeypatch, 2**16)
    reads = OverlappingReads()
    stopping = threading.Event()

    async def read_on(engine: Engine) -> None:
        while not stopping.is_set():
            await engine.snapshot()

    with (
        closing(open_log(path, snapshot=reads)) as engine,
        ThreadPoolExecutor(2) as pool,
    ):
        readers = [pool.submit(asyncio.run, read_on(engine)) for _ in range(2)]
        sizes = []
        try:
            until(lambda: reads.begun > 2)
            for number in range(25):
                push(engine, note(str(number), "x" * 20_000))
                sizes.append(engine.stats()["wal_bytes"])
        finally:
            stopping.set()
        assert [reader.result(PATIENCE) for reader in readers] == [None, None]
        assert max(sizes) < 2**18
        assert engine.stats()["database_bytes"] > 2**18


def test_no_read_begins_while_the_wal_is_being_reset(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_wal(monkeypatch, 2**16)
    events: list[str] = []
    resetting = threading.Event()

    def trace(statement: str) -> None:
        if "wal_checkpoint" in statement:
            events.append("reset")
            resetting.set()

    def read(db: sqlite3.Connection) -> None:
        events.append("read")

    with (
        closing(open_log(path, apply=trace_writer(trace))) as engine,
        ThreadPoolExecutor(1) as pool,
    ):
        push(engine, note("1", "x" * 2**17))
        with read_held(engine):
            push_in_reset = engine.submit([note("2")])  # its commit finds a large WAL
            assert resetting.wait(PATIENCE)
            reading = pool.submit(ask, engine.read(read))
            assert push_in_reset.result(PATIENCE)[0].ok
            reading.result(PATIENCE)
        assert events == ["reset"] * (len(events) - 1) + ["read"]


def test_a_read_that_takes_long_delays_one_commit_and_none_after_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_wal(monkeypatch, 2**18)
    statements: list[str] = []
    delayed = []  # the pushes whose commits waited for the read, to reset the WAL
    with (
        closing(open_log(path, apply=trace_writer(statements.append))) as engine,
        read_held(engine),
    ):
        for number in range(200):
            if engine.stats()["wal_bytes"] > 1.5 * 2**18:
                break
            statements.clear()
            push(engine, note(str(number)))
            if any("wal_checkpoint" in statement for statement in statements):
                delayed.append(number)
        assert engine.stats()["wal_bytes"] > 1.5 * 2**18
    assert len(delayed) == 1
    assert delayed[0] < number - 1


# Several processes.

# Fixed in 3.51.3, 3.50.7 and 3.44.6 (https://sqlite.org/wal.html#walresetbug).
LOSES_COMMITS = {
    "3.31.0": True,
    "3.44.5": True,
    "3.44.6": False,
    "3.45.0": True,
    "3.50.6": True,
    "3.50.7": False,
    "3.51.2": True,
    "3.51.3": False,
    "3.52.0": False,
}


@pytest.mark.parametrize(("version", "loses_commits"), LOSES_COMMITS.items())
def test_each_of_two_writers_warns_once_of_a_version_that_loses_commits(
    path: Path, monkeypatch: pytest.MonkeyPatch, version: str, loses_commits: bool
) -> None:
    version_info = tuple(map(int, version.split(".")))
    monkeypatch.setattr(sqlite3, "sqlite_version_info", version_info)
    with recorded() as records, closing(open_log(path)) as engine:
        for number in range(3):
            push(engine, note(f"alone {number}"))
            ask(engine.snapshot())
        assert records.texts == []
        with closing(open_log(path)) as other_engine:
            ask(other_engine.snapshot())
            push(engine, note("beside a reader"))
            assert records.texts == []
            for number in range(3):
                push(other_engine, note(f"other writer {number}"))
                push(engine, note(f"writer {number}"))
        warnings = [text for text in records.texts if "walresetbug" in text]
        assert records.texts == warnings
        assert len(warnings) == (2 if loses_commits else 0)


# The log in its file: cursors that are never issued again, and files that are removed,
# replaced or overwritten under a running engine.

lives = st.lists(
    st.tuples(st.just("push"), st.lists(st.sampled_from("ab"), max_size=4))
    | st.tuples(st.just("fail"), st.lists(st.sampled_from("ab"), max_size=4))
    | st.tuples(st.just("trim"), st.sampled_from("ab"))
    | st.tuples(st.just("reopen"), st.none()),
    min_size=3,
    max_size=25,
)


@settings(max_examples=20)
@given(events=lives)
def test_cursors_strictly_increase_and_are_never_issued_again(
    events: list[tuple[str, Any]],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log.db"
        engine = open_log(path, apply=ledger)
        newest = 0
        for number, event in enumerate(events):
            match event:
                case "push", scopes:
                    (result,) = push(engine, entry(str(number), *scopes))
                    for change in made_by(engine, result, scopes):
                        assert change["cursor"] > newest
                        newest = change["cursor"]
                case "fail", scopes:
                    failing = entry(str(number), *scopes, fail="conflict")
                    assert not push(engine, failing)[0]["ok"]
                case "trim", scope:
                    ask(engine.trim(scope, newest + 1))
                case "reopen", _:
                    engine.close()
                    engine = open_log(path, apply=ledger)
        engine.close()


@pytest.mark.parametrize("replaced", [False, True], ids=["removed", "replaced"])
def test_a_removed_or_replaced_file_makes_the_engine_unavailable(
    engine: Engine, path: Path, replaced: bool
) -> None:
    push(engine, note("1"))
    ask(engine.position())  # so that a connection which reads is open
    if replaced:
        copied = path.with_name("copy.db")
        shutil.copy(path, copied)
        copied.replace(path)
    else:
        path.unlink()
    calls: list[Callable[[], Any]] = [
        lambda: engine.push([note("2")]),
        engine.position,
        engine.snapshot,
    ]
    for call in calls:
        with pytest.raises(Unavailable):
            ask(asked(call))


def test_a_file_that_is_overwritten_makes_pushes_unavailable(path: Path) -> None:
    with closing(open_log(path)) as engine:
        push(engine, note("1"))
        make_database(path, "PRAGMA wal_checkpoint(TRUNCATE)")
        with path.open("r+b") as file:
            file.write(b"no database any more")
        with pytest.raises(Unavailable):
            push(engine, note("2"))


@pytest.mark.parametrize("exists", [True, False], ids=["old file", "new file"])
def test_a_symbolic_link_serves_as_well_as_the_file_that_it_names(
    tmp_path: Path, exists: bool
) -> None:
    (tmp_path / "data").mkdir()
    file = tmp_path / "data" / "real.db"
    link = tmp_path / "link.db"
    link.symlink_to(file)
    if exists:
        open_log(file).close()
    with closing(open_log(link)) as engine:
        assert push(engine, note("1"))[0]["ok"]
        assert engine.stats()["wal_bytes"] > 0
    with closing(open_log(file)) as engine:
        assert len(whole_log(engine)) == 1


# A cursor stays known over all openings of the file. One that a restored backup has
# lost is unknown.

# The writer checks for commits of other engines only when it begins a transaction.
UNWATCHED = Settings(watch_interval=PATIENCE * 6)


@contextmanager
def two_engines(path: Path, **options: Any) -> Iterator[tuple[Engine, Engine]]:
    """Open two engines on one file, as two processes do.

    This is no fixture, because other stores run the same tests with a path alone."""
    with (
        closing(open_log(path, **options)) as engine,
        closing(open_log(path, **options)) as other_engine,
    ):
        yield engine, other_engine


def assert_unknown(engine: Engine, page: Any) -> None:
    """Check that a client which has pulled this page has to take a snapshot."""
    with pytest.raises(mizusync.CursorUnknown):
        pull(engine, page["cursor"], epoch=page["epoch"])


def test_reopening_never_makes_a_cursor_unknown(path: Path) -> None:
    known = [(0, "")]
    head = 0
    scopes = [DEFAULT, DEFAULT, "other", None, DEFAULT, DEFAULT, DEFAULT]
    for opening, scope in enumerate(scopes):
        with closing(open_log(path)) as engine:
            known.append((head, pull(engine)["epoch"]))
            for cursor, epoch in known:
                pull(engine, cursor, epoch=epoch)
            if scope is not None:  # otherwise this opening only reads
                (result,) = push(engine, note(str(opening), scope=scope))
                head = result["cursor"]
            known += [(page["cursor"], page["epoch"]) for page in pages(engine)]
            for cursor, epoch in known:
                pull(engine, cursor, epoch=epoch)


def test_a_cursor_above_the_head_is_unknown(engine: Engine) -> None:
    (result,) = push(engine, note("1", scope="other"))
    head = result["cursor"]
    newest_epoch = pull(engine, scope="other")["epoch"]
    for scope in (DEFAULT, "other"):
        for epoch in ("", newest_epoch):
            assert pull(engine, head, scope, epoch=epoch)["changes"] == []
            with pytest.raises(mizusync.CursorUnknown):
                pull(engine, head + 1, scope, epoch=epoch)


def test_a_cursor_with_an_epoch_of_another_history_is_unknown(engine: Engine) -> None:
    push(engine, note("1"))
    whole_log(engine)
    for cursor in (0, 1):
        with pytest.raises(mizusync.CursorUnknown):
            pull(engine, cursor, epoch="another")


def back_up(path: Path) -> Path:
    """Copy the file, even if engines have it open, and return the copy's path."""
    backup = path.with_name("backup.db")
    backup.unlink(missing_ok=True)
    with closing(sqlite3.connect(path)) as db:
        db.execute("VACUUM INTO ?", (str(backup),))
    return backup


def restore(path: Path, backup: Path) -> None:
    """Copy a backup into the file while engines have it open, page by page."""
    with (
        closing(sqlite3.connect(path)) as db,
        closing(sqlite3.connect(backup)) as copied,
    ):
        copied.backup(db)


def push_lost_changes(engine: Engine, count: int) -> Any:
    """Push changes that a restore will undo; return a page that reaches the last."""
    push(engine, *(note(f"lost {number}") for number in range(count)))
    page = pull(engine)
    assert not page["hasMore"]
    return page


@table(
    "new_changes",
    {
        "no new changes": 0,
        "fewer new changes than lost": 3,
        "more new changes than lost": 20,
    },
)
@table("later_opening", {"same opening": False, "later opening": True})
def test_a_restored_backup_knows_its_own_cursors_and_no_later_ones(
    path: Path, later_opening: bool, new_changes: int
) -> None:
    """The lost changes were committed in the backup's own opening, or in a later one,
    which began an epoch that the backup does not have."""
    with closing(open_log(path)) as engine:
        push(engine, *(note(str(number)) for number in range(5)))
        kept_page = pull(engine)
        backup = back_up(path)
        if not later_opening:
            lost_page = push_lost_changes(engine, 5)
    if later_opening:
        with closing(open_log(path)) as engine:
            lost_page = push_lost_changes(engine, 5)
    backup.replace(path)
    with closing(open_log(path)) as engine:
        push(engine, *(note(f"new {number}") for number in range(new_changes)))
        page = pull(engine, kept_page["cursor"], epoch=kept_page["epoch"])
        assert len(page["changes"]) == new_changes
        assert_unknown(engine, lost_page)
        assert ask(engine.snapshot()).cursor == 5 + new_changes


def test_a_backup_restored_into_the_open_file_is_noticed(
    engine: Engine, path: Path
) -> None:
    push(engine, note("1"))
    backup = back_up(path)
    lost_page = push_lost_changes(engine, 3)
    restore(path, backup)
    assert len(whole_log(engine)) == 1
    assert_unknown(engine, lost_page)
    results = push(engine, *(note(f"new {number}", number) for number in range(9)))
    assert fold(whole_log(engine)) == [None, *range(9)]
    assert [result["cursor"] for result in results] == list(range(2, 11))
    assert_unknown(engine, lost_page)


def test_a_restored_backup_is_noticed_after_it_grew_past_the_known_head(
    path: Path,
) -> None:
    with closing(open_log(path, settings=UNWATCHED)) as engine:
        push(engine, note("1", "old"))
        backup = back_up(path)
        push(engine, note("2", "lost"), note("3", "lost"))
        assert len(whole_log(engine)) == 3
        restore(path, backup)
        with closing(open_log(path)) as other_engine:
            push(other_engine, *(note(key, scope="elsewhere") for key in "4567"))
        push(engine, note("8", scope="a third"))  # its transaction finds the head at 5
        assert fold(whole_log(engine)) == ["old"]


def test_an_engine_that_only_pulled_the_lost_changes_begins_an_epoch_as_well(
    path: Path,
) -> None:
    with two_engines(path) as (engine, other_engine):
        push(engine, note("1"))
        push(other_engine, note("2"))
        backup = back_up(path)
        lost_page = push_lost_changes(engine, 2)
        assert pull(other_engine)["cursor"] == 4
        restore(path, backup)
        push(other_engine, *(note(f"new {number}") for number in range(4)))
        assert_unknown(engine, lost_page)
        assert_unknown(other_engine, lost_page)


def test_a_second_backup_restored_over_a_first_one_begins_an_epoch(
    path: Path,
) -> None:
    with closing(open_log(path)) as engine:
        push(engine, note("1"))
        early_backup = back_up(path).rename(path.with_name("early.db"))
        push(engine, note("2"), note("3"))
        late_backup = back_up(path)
        lost_page = push_lost_changes(engine, 3)
        restore(path, early_backup)  # by mistake
        push(engine, note("mistaken"))
        restore(path, late_backup)
        push(engine, *(note(f"new {number}") for number in range(9)))
        assert_unknown(engine, lost_page)


def test_a_failing_mutation_after_another_engines_opening_is_no_restored_backup(
    path: Path,
) -> None:
    def apply_or_roll_back(db: sqlite3.Connection, mutation: Mutation) -> Any:
        if mutation.name == "roll back":
            return roll_back_by_conflict(db)
        return apply(db, mutation)

    with closing(
        open_log(path, apply=apply_or_roll_back, settings=UNWATCHED)
    ) as engine:
        push(engine, note("1"))
        with closing(open_log(path)) as other_engine:
            push(other_engine, note("2"))  # it begins an epoch
        for key in ("a", "b"):
            (result,) = push(engine, {"id": key, "name": "roll back"})
            assert result["code"] == "internal_error"
        assert engine.rewinds == 0
        assert len(whole_log(engine)) == 2


# --- Tail -----------------------------------------------------------------------------
# Pages are exactly the log, from memory and from the disk.


def in_scope(scope: str, changes: Iterable[Any]) -> list[Any]:
    """Return those of the changes that are in this scope."""
    return [change for change in changes if change["scope"] == scope]


def last_cursor(changes: list[Any]) -> int:
    """Return the cursor of the last change, or 0 without any."""
    return cursor_of(changes[-1]) if changes else 0


def made_by_each(
    engine: Engine, results: list[Any], scopes_of_entries: list[list[str]]
) -> list[list[Any]]:
    """Return a list for each entry: its changes in all scopes."""
    return [
        made_by(engine, result, scopes)
        for result, scopes in zip(results, scopes_of_entries, strict=True)
    ]


def assert_pages(found: list[Any], mutations: list[list[Any]], limit: int) -> None:
    """Check that pages have all changes of these mutations, in order, that each but the
    last has `limit` of them, and that none ends inside a mutation."""
    changes = [change for page in found for change in page["changes"]]
    assert changes == list(itertools.chain(*mutations))
    ends_of_mutations = {last_cursor(made) for made in mutations}
    assert {page["cursor"] for page in found} <= {0} | ends_of_mutations
    full_pages = found[:-1]
    assert all(len(page["changes"]) >= limit for page in full_pages)
    assert [page["hasMore"] for page in found] == [True] * len(full_pages) + [False]


@settings(max_examples=20)
@given(
    scopes_of_entries=st.lists(
        st.lists(st.sampled_from("ab"), max_size=5), min_size=1, max_size=12
    ),
    limit=st.integers(1, 7),
    max_tail_changes=st.sampled_from([1, 3, 1000]),
)
def test_a_client_that_pulls_pages_of_any_size_has_exactly_the_log(
    scopes_of_entries: list[list[str]], limit: int, max_tail_changes: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        open_engine = functools.partial(
            open_log,
            Path(folder) / "log.db",
            apply=ledger,
            settings=Settings(max_tail_changes=max_tail_changes),
        )
        with closing(open_engine()) as engine:
            entries = [
                entry(str(number), *scopes)
                for number, scopes in enumerate(scopes_of_entries)
            ]
            results = push(engine, *entries)
            before_restart = {scope: pages(engine, 0, scope, limit) for scope in "ab"}
        with closing(open_engine()) as engine:
            after_restart = {scope: pages(engine, 0, scope, limit) for scope in "ab"}
            assert engine.counts["pulls_from_disk"] >= 2
            mutations = made_by_each(engine, results, scopes_of_entries)
    for scope in "ab":
        made_in_scope = [in_scope(scope, changes) for changes in mutations]
        assert_pages(before_restart[scope], made_in_scope, limit)
        assert_pages(after_restart[scope], made_in_scope, limit)


def test_a_page_never_ends_inside_a_mutation(engine: Engine) -> None:
    push(engine, note("1"), {"id": "2", "name": "notes", "args": 7}, note("3"))
    assert [len(page["changes"]) for page in pages(engine, limit=2)] == [8, 1]
    assert [len(page["changes"]) for page in pages(engine, limit=1)] == [1, 7, 1]


def test_memory_answers_a_pull_if_everything_new_fits_on_one_page(
    engine: Engine,
) -> None:
    push(engine, *(note(str(number)) for number in range(9)))
    whole = pull(engine, limit=9)
    assert len(whole["changes"]) == 9
    assert pull(engine, 8, limit=1)["changes"] == whole["changes"][8:]
    assert engine.counts["pulls_from_disk"] == 0
    assert pull(engine, limit=8)["changes"] == whole["changes"][:8]
    assert engine.counts["pulls_from_disk"] == 1


def test_memory_answers_with_one_change_of_any_size_but_not_with_two(
    path: Path,
) -> None:
    with closing(open_log(path, settings=Settings(max_page_size=100))) as engine:
        push(engine, note("1", "x" * 1000))
        assert len(pull(engine)["changes"]) == 1
        assert engine.counts["pulls_from_disk"] == 0
        push(engine, note("2"))
        assert len(pull(engine)["changes"]) == 1
        assert engine.counts["pulls_from_disk"] == 1


@settings(max_examples=15)
@given(
    sizes_of_mutations=st.lists(
        st.lists(st.integers(0, 400), max_size=3), min_size=1, max_size=12
    ),
    max_page_size=st.integers(1, 1500),
)
def test_a_page_stops_at_max_page_size_but_holds_at_least_one_mutation(
    sizes_of_mutations: list[list[int]], max_page_size: int
) -> None:
    def apply_sizes(db: sqlite3.Connection, mutation: Mutation) -> list[str]:
        return [mutation.id + "\u20ac" * size for size in mutation.args]

    with tempfile.TemporaryDirectory() as folder:
        open_engine = functools.partial(
            open_log,
            Path(folder) / "log.db",
            apply=apply_sizes,
            settings=Settings(max_page_size=max_page_size),
        )
        with closing(open_engine()) as engine:
            mutations = [
                note(f"{number} ", sizes)
                for number, sizes in enumerate(sizes_of_mutations)
            ]
            results = push(engine, *mutations)
            pages_before_restart = pages(engine)
        with closing(open_engine()) as engine:
            pages_after_restart = pages(engine)
            assert engine.counts["pulls_from_disk"] > 0
    made = [change["data"] for result in results for change in result["changes"]]
    for found in (pages_before_restart, pages_after_restart):
        assert fold(change for page in found for change in page["changes"]) == made
        for page in found:
            texts = fold(page["changes"])
            assert texts or len(found) == 1
            # The last mutation may go past the limit, because it is never cut.
            last_number = texts[-1].split()[0] if texts else ""
            earlier = [text for text in texts if text.split()[0] != last_number]
            assert sum(len(text.encode()) for text in earlier) <= max_page_size


def test_small_tails_of_many_scopes_lose_no_changes(path: Path) -> None:
    small = Settings(max_tail_changes=2, max_tail_size=4000)
    with closing(open_log(path, settings=small)) as engine:
        for number in range(30):
            push(engine, note(str(number), number, scope=f"s{number % 7}"))
            scope = f"s{number * 3 % 7}"
            expected = [n for n in range(number + 1) if f"s{n % 7}" == scope]
            assert fold(whole_log(engine, scope, limit=3)) == expected


# --- Listeners ------------------------------------------------------------------------
# The garbage collector may close an abandoned pull, and so remove its listener, on any
# thread and at any moment.


class CollectingScope(str):
    """A scope that runs the garbage collector each time it is looked for."""

    def __hash__(self) -> int:
        gc.collect()
        return super().__hash__()


def test_an_abandoned_pull_may_be_collected_while_listeners_are_notified(
    path: Path,
) -> None:
    engine = open_log(path, settings=Settings(readers=1))
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda loop, context: None)  # would report each pull
    executor_log = logging.getLogger("concurrent.futures")
    loop_closed = threading.Event()

    async def abandon_pulls() -> list[Any]:
        reading = engine.read(lambda db: loop_closed.wait(PATIENCE))
        pulls = [engine.pull(str(number), wait=PATIENCE * 3) for number in range(50)]
        tasks = [asyncio.ensure_future(task) for task in (reading, *pulls)]
        await asyncio.sleep(0)  # each asks the reader, which will find the loop closed
        return tasks

    # The writer looks for this scope while it goes through the listeners.
    engine.add_listener(lambda hints: None, CollectingScope("collecting"))
    thread = threading.Thread(target=lambda: push(engine, note("1")), daemon=True)
    executor_log.disabled = True
    gc.disable()
    try:
        tasks = loop.run_until_complete(abandon_pulls())
        loop.close()
        loop_closed.set()
        ask(engine.position())  # the reader takes it after all of the pulls
        abandoned = weakref.WeakSet(tasks[1:])
        del loop, tasks
        assert len(abandoned) == 50
        thread.start()
        thread.join(PATIENCE)
        assert not thread.is_alive()
        assert not abandoned  # they were collected meanwhile
    finally:
        gc.enable()
        executor_log.disabled = False
    assert push(engine, note("2"))[0]["ok"]
    engine.close()


# A listener gets a hint for each scope that a commit changed.


def test_a_listener_is_notified_of_every_commit_once_and_in_order(
    engine: Engine,
) -> None:
    notified: list[tuple[str, Hint]] = []
    remove_listener = engine.add_listener(lambda hints: notified.extend(hints.items()))
    push(engine, note("1", scope="a"), note("2", scope="b"), note("3", scope="a"))
    push(engine, note("4", scope="a"))
    until(lambda: len(notified) == 3)
    remove_listener()
    push(engine, note("5", scope="a"))
    push(engine, note("6", scope="a"))  # the writer has notified of the fifth by now
    ranges = [(scope, hint.cursor, hint.after) for scope, hint in notified]
    assert ranges == [("a", 3, 0), ("b", 2, 0), ("a", 4, 3)]
    first_changes = notified[0][1].changes
    assert first_changes is not None
    assert list(map(json.loads, first_changes)) == whole_log(engine, "a")[:2]
    assert {hint.epoch for _, hint in notified} == {pull(engine)["epoch"]}


def test_a_pull_finds_the_change_that_a_listener_was_notified_of(
    engine: Engine,
) -> None:
    async def pull_on_hints() -> list[int]:
        pulls = []

        def start_pulls(hints: Mapping[str, Hint]) -> None:
            for scope, hint in hints.items():
                pulls.append(asyncio.create_task(engine.pull(scope, hint.cursor - 1)))

        engine.add_listener(start_pulls)
        for number in range(20):
            await engine.push([note(str(number))])
        found = await asyncio.gather(*pulls)
        return [page.changes[0].cursor for page in found]

    assert ask(pull_on_hints()) == list(range(1, 21))


def test_a_listener_that_fails_keeps_no_answer_and_no_hint_back(engine: Engine) -> None:
    notified: list[tuple[str, Hint]] = []

    def fail(hints: Mapping[str, Hint]) -> None:
        raise ZeroDivisionError

    engine.add_listener(fail)
    engine.add_listener(lambda hints: notified.extend(hints.items()))
    assert push(engine, note("1"))[0]["ok"]
    assert push(engine, note("2"))[0]["ok"]
    until(lambda: [hint.cursor for _, hint in notified] == [1, 2])


def test_a_push_is_answered_before_a_listener_is_notified_of_it(engine: Engine) -> None:
    answered: list[bool] = []
    with writer_held(engine):
        future = engine.submit([note("1")])
        engine.add_listener(lambda hints: answered.append(future.done()))
    push(engine, note("2"))  # the writer has notified of the first by now
    assert answered[0]


# --- Batch ----------------------------------------------------------------------------
# A mutation applies once. A retry gets the first result again, with its changes unless
# they were trimmed or the answer is large.


@settings(max_examples=25)
@given(
    pushes=st.lists(
        st.lists(st.integers(0, 5), min_size=1, max_size=4), min_size=1, max_size=12
    ),
    waits=st.lists(st.booleans(), min_size=12, max_size=12),
    reopen=st.integers(0, 12),
)
def test_retries_in_any_order_apply_each_mutation_once(
    pushes: list[list[int]], waits: list[bool], reopen: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log.db"
        engine = open_log(path, apply=ledger)
        answers = []
        for number, keys in enumerate(pushes):
            if number == reopen:
                engine.close()  # commits the pushes that wait
                engine = open_log(path, apply=ledger)
            mutations = [entry(str(key), *([DEFAULT] * key)) for key in keys]
            future = engine.submit(mutations)
            answers += [(key, future, place) for place, key in enumerate(keys)]
            if waits[number]:  # otherwise the next push follows while this one waits
                future.result(PATIENCE)
        first_results: dict[int, Any] = {}
        for key, future, place in answers:
            result = json.loads(future.result(PATIENCE)[place].encoded)
            if key in first_results:
                assert result == first_results[key] | DUPLICATE
            else:
                first_results[key] = result
        changes = [
            change for result in first_results.values() for change in result["changes"]
        ]
        changes.sort(key=cursor_of)
        assert whole_log(engine) == changes
        assert ask(engine.snapshot()).data == fold(changes)
        engine.close()


def test_one_id_sent_eight_times_at_once_applies_once(engine: Engine) -> None:
    start = threading.Barrier(8)

    def send(number: int) -> Any:
        start.wait(PATIENCE)
        return push(engine, note("1", number))[0]

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(send, range(8)))
    assert sorted("duplicate" in result for result in results) == [False] + [True] * 7
    assert all(result["changes"] == whole_log(engine) for result in results)
    assert len(ask(engine.snapshot()).data) == 1


def test_one_id_twice_in_one_push_applies_once(engine: Engine) -> None:
    first, second, retried = push(
        engine, note("1", "a"), note("2", "b"), note("1", "a")
    )
    assert retried == first | DUPLICATE
    assert whole_log(engine) == first["changes"] + second["changes"]


def test_one_id_applies_once_even_with_other_args_or_another_name(
    engine: Engine,
) -> None:
    (first,) = push(engine, note("1", "a"))
    for retry in (note("1", "b"), {"id": "1", "name": "refuse", "args": "conflict"}):
        assert push(engine, retry) == [first | DUPLICATE]


def test_one_id_in_two_scopes_names_two_mutations(engine: Engine) -> None:
    results = push(engine, note("1", scope="a"), note("1", scope="b"))
    assert ["duplicate" in result for result in results] == [False, False]


def test_a_retry_gets_the_first_result_after_other_pushes_and_a_restart(
    path: Path,
) -> None:
    mutation = {"id": "1", "name": "notes", "args": 3}
    with closing(open_log(path)) as engine:
        (first,) = push(engine, mutation)
        push(engine, *(note(str(number)) for number in range(2, 9)))
        assert push(engine, mutation) == [first | DUPLICATE]
    with closing(open_log(path)) as engine:
        assert push(engine, mutation) == [first | DUPLICATE]


def test_a_retry_after_a_trim_gets_the_first_result_without_changes(
    engine: Engine,
) -> None:
    share = {"id": "1", "name": "share", "args": ["a", "b"]}
    (first,) = push(engine, share)
    ask(engine.trim("a", first["cursor"]))  # one of its two changes
    assert push(engine, share) == [{"ok": True, "cursor": first["cursor"], **DUPLICATE}]


def test_a_result_without_changes_has_the_current_cursor_of_its_scope(
    path: Path,
) -> None:
    nothing = {"id": "3", "scope": "a", "name": "notes", "args": 0}
    with closing(open_log(path)) as engine:
        (changed,) = push(engine, note("1", scope="a"))
        push(engine, note("2", scope="b"))
        (first,) = push(engine, nothing)
        assert first == {"ok": True, "cursor": changed["cursor"], "changes": []}
        push(engine, note("4", scope="a"))
        assert push(engine, nothing) == [first | DUPLICATE]
        assert push(engine, nothing | {"scope": "new"})[0]["cursor"] == 0
    with closing(open_log(path)) as engine:
        assert push(engine, nothing) == [first | DUPLICATE]


def test_a_change_belongs_to_the_scope_that_it_names(engine: Engine) -> None:
    share = {"id": "1", "scope": "mine", "name": "share", "args": ["a", "b", "a"]}
    (result,) = push(engine, share)
    assert result["cursor"] == 3
    assert list(map(cursor_of, whole_log(engine, "a"))) == [1, 3]
    assert list(map(cursor_of, whole_log(engine, "b"))) == [2]
    assert whole_log(engine, "mine") == []
    assert ask(engine.current("mine")) == 0


@pytest.mark.parametrize("restart", [False, True], ids=["one opening", "a restart"])
def test_a_result_has_only_the_changes_in_its_mutations_scope(
    path: Path, restart: bool
) -> None:
    scopes = ["a", "mine", "b", "mine"]
    share = {"id": "1", "scope": "mine", "name": "share", "args": scopes}
    engine = open_log(path)
    (first,) = engine.submit([share]).result(PATIENCE)
    (retried,) = engine.submit([share]).result(PATIENCE)
    if restart:
        engine.close()
        engine = open_log(path)
    with closing(engine):
        (retried_later,) = engine.submit([share]).result(PATIENCE)
        changes = whole_log(engine, "mine")
        assert list(map(cursor_of, changes)) == [2, 4]
        for result in (first, retried, retried_later):
            assert [asdict(change) for change in result.changes] == changes
            assert json.loads(result.encoded)["changes"] == changes
            assert result.cursor == 4
        ask(engine.trim("b", 9))  # removes a change in another scope
        (after_trim,) = engine.submit([share]).result(PATIENCE)
        assert after_trim.changes == []
        assert "changes" not in json.loads(after_trim.encoded)


class CountingStore(mizusync.SQLiteStore):
    """Count how often the rows of a mutation are read."""

    reads = 0

    def read_range(self, db: Any, first: int, last: int) -> list[mizusync.Row]:
        self.reads += 1
        return super().read_range(db, first, last)


@pytest.mark.parametrize(
    "applied_before", [True, False], ids=["of the log", "of the same push"]
)
def test_retries_are_answered_without_changes_once_their_answer_is_large(
    path: Path, applied_before: bool
) -> None:
    store = CountingStore(path, SCHEMA)
    large = note("1", "x" * 1000)
    small_pages = Settings(max_page_size=5000)
    with closing(Engine(store, apply=apply, settings=small_pages)) as engine:
        if applied_before:
            push(engine, large)
        *results, new = push(engine, *[large] * 50, note("new", "y"))
        # The result that passes the limit still has its changes.
        complete = 5000 // len(json.dumps(results[0])) + 1
        assert all("changes" in result for result in results[:complete])
        without_changes = {"ok": True, "cursor": results[0]["cursor"], **DUPLICATE}
        assert results[complete:] == [without_changes] * (50 - complete)
        assert fold(new["changes"]) == ["y"]  # a first result always has its changes
        assert store.reads == (complete if applied_before else 0)
        assert "changes" in push(engine, large)[0]  # in a push of its own


def test_a_database_cursor_is_not_taken_for_changes(path: Path) -> None:
    def return_cursor(db: sqlite3.Connection, mutation: Mutation) -> Any:
        db.execute("INSERT INTO notes VALUES ('', 'a secret')")
        return db.execute("SELECT * FROM notes") if mutation.args else db.cursor()

    with recorded() as records, closing(open_log(path, apply=return_cursor)) as engine:
        results = push(engine, note("1", True), note("2", False))
        assert [result.get("code") for result in results] == ["internal_error"] * 2
        assert whole_log(engine) == ask(engine.snapshot("")).data == []
    errors = [text for text in records.texts if "TypeError: apply returns" in text]
    assert len(errors) == 2


def test_a_mutation_with_too_many_changes_is_invalid(path: Path) -> None:
    mutations = [{"id": str(count), "name": "notes", "args": count} for count in (3, 4)]
    with closing(open_log(path, settings=Settings(max_mutation_changes=3))) as engine:
        most, too_many = push(engine, *mutations)
    assert most["ok"]
    assert too_many["code"] == "invalid_mutation"


# --- Retention ------------------------------------------------------------------------
# A trim removes the oldest changes of a scope, whole mutations. A client behind it
# continues from a snapshot.


def test_without_a_snapshot_function_there_are_no_snapshots_and_no_trims(
    path: Path,
) -> None:
    with closing(open_log(path, snapshot=None)) as engine:
        push(engine, note("1"))
        with pytest.raises(mizusync.NotFound):
            ask(engine.snapshot())
        with pytest.raises(mizusync.NotFound):
            ask(engine.trim(DEFAULT, 9))
        assert len(whole_log(engine)) == 1


@settings(max_examples=15)
@given(
    sizes=st.lists(st.integers(1, 3), min_size=1, max_size=6),
    before=st.integers(0, 30),
    restart=st.booleans(),
)
def test_a_trim_removes_whole_mutations_and_lower_cursors_are_too_old(
    sizes: list[int], before: int, restart: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        open_engine = functools.partial(open_log, Path(folder) / "log.db", apply=ledger)
        engine = open_engine()
        scopes_of_entries = [["a", "b"] * size for size in sizes]
        entries = [
            entry(str(number), *scopes)
            for number, scopes in enumerate(scopes_of_entries)
        ]
        results = push(engine, *entries)
        mutations = made_by_each(engine, results, scopes_of_entries)
        made_in_a = [in_scope("a", changes) for changes in mutations]
        made_in_b = [in_scope("b", changes) for changes in mutations]
        trimmed = [changes for changes in made_in_a if last_cursor(changes) < before]
        assert ask(engine.trim("a", before)) == sum(map(len, trimmed))
        if restart:
            engine.close()
            engine = open_engine()
        with closing(engine):
            highest_trimmed = last_cursor(trimmed[-1]) if trimmed else 0
            log_of_a = list(itertools.chain(*made_in_a))
            for cursor in range(results[-1]["cursor"] + 1):
                if cursor < highest_trimmed:
                    with pytest.raises(mizusync.CursorTooOld):
                        pull(engine, cursor, "a")
                else:
                    newer = [
                        change for change in log_of_a if cursor_of(change) > cursor
                    ]
                    assert pull(engine, cursor, "a")["changes"] == newer
            assert ask(engine.current("a")) == last_cursor(log_of_a)
            assert whole_log(engine, "b") == list(itertools.chain(*made_in_b))


@pytest.mark.parametrize("before", [11, 12, 1000, 2**53 - 1])
def test_a_snapshots_cursor_is_not_too_old_after_a_trim_of_all_changes(
    engine: Engine, before: int
) -> None:
    push(engine, *(note(str(number)) for number in range(10)))
    assert ask(engine.trim(DEFAULT, before)) == 10
    taken = ask(engine.snapshot())
    assert taken.cursor == 10
    assert len(taken.data) == 10
    assert pull(engine, taken.cursor, epoch=taken.epoch)["changes"] == []
    assert ask(engine.current()) == 10
    (without_changes,) = push(engine, {"id": "nothing", "name": "notes", "args": 0})
    assert without_changes["cursor"] == 10
    (result,) = push(engine, note("more"))
    page = pull(engine, taken.cursor, epoch=taken.epoch)
    assert page["changes"] == result["changes"]


def test_a_large_trim_leaves_whole_mutations(engine: Engine) -> None:
    push(engine, *({"id": str(n), "name": "notes", "args": 300} for n in range(10)))
    assert ask(engine.trim(DEFAULT, 2500)) == 2400
    assert pull(engine, 2400, limit=1)["cursor"] == 2700
    with pytest.raises(mizusync.CursorTooOld):
        pull(engine, 2399)


def test_a_trim_below_a_cursor_of_over_64_bits_fails_no_push(path: Path) -> None:
    async def trim_in_the_same_transaction(engine: Engine) -> bool:
        with writer_held(engine):
            pushed = engine.submit([note("1")])
            trimming = asyncio.create_task(engine.trim(DEFAULT, 2**70))
            await asyncio.sleep(0)  # the task has submitted its first step
        await trimming
        return pushed.result(PATIENCE)[0].ok

    with closing(open_log(path, settings=ONE_TRANSACTION)) as engine:
        assert ask(trim_in_the_same_transaction(engine))


def test_keep_changes_needs_a_snapshot_function(path: Path) -> None:
    with pytest.raises(ValueError, match="snapshot"):
        open_log(path, snapshot=None, settings=Settings(keep_changes=5))


def test_keep_changes_keeps_the_newest_changes_of_each_scope(path: Path) -> None:
    # So few that each change selects its scope, whatever number random() returns.
    with closing(open_log(path, settings=Settings(keep_changes=5))) as engine:
        large = {"scope": "large", "name": "notes", "args": 100}
        push(engine, *({"id": str(number)} | large for number in range(9)))
        sizes = [1 + number % 4 for number in range(30)]
        pulled: list[Any] = []
        for number, size in enumerate(sizes):
            (result,) = push(engine, {"id": str(number), "name": "notes", "args": size})
            pulled += pull(engine, last_cursor(pulled))["changes"]
            # A client that keeps up misses nothing.
            assert pulled[-1] == result["changes"][-1]
            push(engine, note(f"{number} large", scope="large"))
        sql = "SELECT count(*) FROM mizusync_changes GROUP BY scope ORDER BY scope"
        with closing(sqlite3.connect(path)) as db:
            counts = [count for (count,) in db.execute(sql)]
        # Five changes before the last push, and the rest of the oldest one's mutation.
        assert all(5 <= count < 5 + 4 + 4 for count in counts)
        assert fold(pulled) == [number for size in sizes for number in range(size)]
        assert pull(engine, cursor_of(pulled[-6]))["changes"] == pulled[-5:]
        too_old = [
            (0, DEFAULT),
            (cursor_of(pulled[-14]), DEFAULT),
            (900, "large"),
        ]
        for cursor, scope in too_old:
            with pytest.raises(mizusync.CursorTooOld):
                pull(engine, cursor, scope)
        # Memory has forgotten the trimmed changes as well.
        (result,) = push(engine, note("last"))
        assert pull(engine, last_cursor(pulled))["changes"] == result["changes"]
        with pytest.raises(mizusync.CursorTooOld):
            pull(engine, cursor_of(pulled[-14]))


def test_with_keep_changes_the_file_stops_growing(path: Path) -> None:
    """Only the dedupe marks, of some 80 bytes each, go on growing, and the
    application's own tables; there are none here."""

    def apply_no_table(db: sqlite3.Connection, mutation: Mutation) -> list[Any]:
        return [mutation.args]

    # So few that each commit trims, whatever number random() returns.
    few = Settings(keep_changes=10)
    sizes: list[int] = []
    for opening in range(4):
        with closing(open_log(path, apply=apply_no_table, settings=few)) as engine:
            for number in range(40):
                push(engine, note(f"{opening} {number}", "x" * 4000))
        sizes.append(path.stat().st_size)
    assert sizes[0] < 40 * 4000
    assert sizes[-1] < sizes[0] + 120 * 120


def test_each_commit_trims_about_200_changes_of_a_scope_that_has_too_many(
    path: Path,
) -> None:
    with closing(open_log(path)) as engine:
        push(engine, *({"id": str(n), "name": "notes", "args": 10} for n in range(100)))
    with (
        closing(open_log(path, settings=Settings(keep_changes=5))) as engine,
        closing(sqlite3.connect(path)) as db,
    ):
        counts = []
        for number in range(6):
            push(engine, note(f"more {number}"))
            sql = "SELECT count(*) FROM mizusync_changes"
            counts += db.execute(sql).fetchone()
        assert counts == [801, 602, 403, 204, 15, 6]


# --- Writer ---------------------------------------------------------------------------
# One transaction for all jobs that wait. A mutation that fails leaves no trace in it;
# if the transaction itself fails, each mutation runs again, alone.


def test_the_mutations_of_one_push_share_one_transaction(engine: Engine) -> None:
    push(engine, *(note(str(number)) for number in range(50)))
    assert engine.counts["commits"] == 1


def test_all_pushes_that_wait_share_one_transaction(path: Path) -> None:
    with closing(open_log(path, settings=ONE_TRANSACTION)) as engine:
        with writer_held(engine):
            futures = [engine.submit([note(str(number))]) for number in range(50)]
        assert all(future.result(PATIENCE)[0].ok for future in futures)
        assert engine.counts["commits"] == 1
        assert len(whole_log(engine)) == 50


@pytest.mark.parametrize("code", [*REFUSALS, "internal_error"])
def test_a_failed_mutation_leaves_no_trace_and_applies_when_sent_again(
    path: Path, code: str
) -> None:
    with closing(open_log(path, apply=ledger)) as engine:
        failing = entry("failing", DEFAULT, "other", fail=code)
        first, failed, last = push(
            engine, entry("1", DEFAULT), failing, entry("2", DEFAULT)
        )
        assert (failed["ok"], failed["code"]) == (False, code)
        assert last["cursor"] == first["cursor"] + 1
        assert whole_log(engine) == first["changes"] + last["changes"]
        assert ask(engine.snapshot()).data == ["1.0", "2.0"]
        assert ask(engine.snapshot("other")).data == whole_log(engine, "other") == []
        (sent_again,) = push(engine, entry("failing", DEFAULT))
        assert sent_again["ok"]
        assert "duplicate" not in sent_again


def test_a_subclass_of_a_refusal_has_its_own_code_and_inherits_the_status(
    path: Path,
) -> None:
    class OutOfStock(mizusync.Conflict, code="out_of_stock"):
        pass

    class Closed(OutOfStock):
        pass

    def refuse(db: sqlite3.Connection, mutation: Mutation) -> Any:
        raise Closed("come back")

    with closing(open_log(path, apply=refuse)) as engine:
        (result,) = push(engine, note("1"))
    assert result["code"] == "out_of_stock"
    assert Closed.status == mizusync.Conflict.status
    assert mizusync.Conflict.code == "conflict"


def nested_list(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


@table(
    "make_args",
    {
        "an object": object,
        "a path inside": lambda: {"inside": [Path("a")]},
        "a subclass of dict": lambda: type("Own", (dict,), {})(),
        "too deep": lambda: nested_list(10_000),
    },
)
def test_a_push_of_args_that_can_not_be_copied_is_a_value_error(
    engine: Engine, make_args: Callable[[], Any]
) -> None:
    mutations = [note("1"), note("2", make_args())]
    with pytest.raises(ValueError, match="marshal"):
        engine.submit(mutations)
    with pytest.raises(ValueError, match="marshal"):
        ask(engine.push(mutations))
    assert whole_log(engine) == []


def test_each_run_of_apply_gets_the_args_as_they_were_pushed(path: Path) -> None:
    args = {
        "title": "t",
        "list": [[1]],
        "tuple": (1.5, [None]),
        "bytes": b"\0",
        "large": 2**70,
    }
    pushed = copy.deepcopy(args)
    seen: list[Any] = []

    def change_args(db: sqlite3.Connection, mutation: Mutation) -> Any:
        match mutation.id:
            case "changes its args":
                seen.append(copy.deepcopy(mutation.args))
                mutation.args.pop("title")
                mutation.args["list"][0].append(mutation.args["tuple"][1].pop())
                return ["done"]
            case "fails the transaction":
                return roll_back_by_conflict(db)
        return apply(db, mutation)

    engine = open_log(path, apply=change_args, settings=ONE_TRANSACTION)
    with closing(engine):
        with writer_held(engine):
            future = engine.submit(
                [note("changes its args", args), note("fails the transaction")]
            )
            args["title"] = "changed while the push waits"
        codes = [result.code for result in future.result(PATIENCE)]
        assert codes == ["", "internal_error"]
    assert len(seen) > 1
    assert seen == [pushed] * len(seen)
    assert args == pushed | {"title": "changed while the push waits"}


def test_a_logging_filter_that_raises_blocks_no_answer_and_ends_no_thread(
    path: Path,
) -> None:
    def fail(record: logging.LogRecord) -> bool:
        # A filter that needs the request of a web framework does this.
        raise LookupError("outside of a request")

    logger = logging.getLogger("mizusync")
    handler = logging.NullHandler()
    handler.handle = fail  # type: ignore[method-assign]
    with closing(open_log(path, apply=apply_carelessly)) as engine:
        engine.add_listener(lambda hints: raising(ZeroDivisionError()))
        logger.addHandler(handler)
        try:
            results = push(engine, note("1"), note("SystemExit"), note("2"))
            assert ask(engine.push([note("3")]))[0].ok
        finally:
            logger.removeHandler(handler)
        assert [result["ok"] for result in results] == [True, False, True]


@pytest.mark.parametrize("interval", [1e-9, 1e15])
def test_an_extreme_watch_interval_does_not_end_the_writer(
    path: Path, interval: float
) -> None:
    with closing(open_log(path, settings=Settings(watch_interval=interval))) as engine:
        assert push(engine, note("1"))[0]["ok"]


# When the transaction fails: each mutation runs again, and the faulty one fails alone.


def test_a_mutation_that_rolls_back_the_transaction_fails_alone(path: Path) -> None:
    def apply_or_roll_back(db: sqlite3.Connection, mutation: Mutation) -> Any:
        if mutation.name == "roll back":
            return roll_back_by_conflict(db)
        return apply(db, mutation)

    engine = open_log(path, apply=apply_or_roll_back, settings=ONE_TRANSACTION)
    with closing(engine):
        futures = []
        with writer_held(engine):
            for number in range(5):
                retried = {"id": "faulty", "name": "roll back"}
                another = {"id": f"faulty {number}", "name": "roll back"}
                futures += [
                    engine.submit([note(f"{number} first"), retried, another]),
                    engine.submit([note(f"{number} last")]),
                ]
        results = [result for future in futures for result in future.result(PATIENCE)]
        assert [result.ok for result in results] == [True, False, False, True] * 5
        assert {result.code for result in results} == {"", "internal_error"}
        changes = [asdict(change) for result in results for change in result.changes]
        assert whole_log(engine) == changes
        assert len(ask(engine.snapshot()).data) == 10


def test_a_constraint_that_fails_at_the_commit_fails_its_mutation_alone(
    path: Path,
) -> None:
    schema = f"""{SCHEMA}
        PRAGMA foreign_keys = ON;
        CREATE TABLE IF NOT EXISTS orders (
            n INTEGER PRIMARY KEY,
            of REFERENCES orders DEFERRABLE INITIALLY DEFERRED);
    """

    def violate(db: sqlite3.Connection, mutation: Mutation) -> Any:
        if mutation.id == "faulty":
            db.execute("INSERT INTO orders VALUES (1, 999)")
        return apply(db, mutation)

    engine = open_log(path, apply=violate, schema=schema, settings=ONE_TRANSACTION)
    with closing(engine):
        futures = []
        with writer_held(engine):
            for keys in (["1"], ["2", "faulty", "3"], ["4"]):
                futures.append(engine.submit([note(key, key) for key in keys]))
        results = [result for future in futures for result in future.result(PATIENCE)]
        codes = [result.code for result in results]
        assert codes == ["", "", "internal_error", "", ""]
        assert fold(whole_log(engine)) == ["1", "2", "3", "4"]
        assert ask(engine.snapshot()).data == ["1", "2", "3", "4"]


@table(
    "statement",
    {
        "AUTOINCREMENT at its highest number": "INSERT INTO ends VALUES (NULL)",
        "deleting from a full-text index without that row": (
            "INSERT INTO words (words, rowid, word) VALUES ('delete', 9, 'absent')"
        ),
    },
)
def test_a_mutation_whose_error_has_the_code_of_a_disk_error_fails_alone(
    path: Path, statement: str
) -> None:
    schema = f"""{SCHEMA}
        CREATE TABLE ends (n INTEGER PRIMARY KEY AUTOINCREMENT);
        INSERT INTO ends VALUES (9223372036854775807);
        CREATE VIRTUAL TABLE words USING fts5(word, content='');
    """

    def run_faulty(db: sqlite3.Connection, mutation: Mutation) -> Any:
        match mutation.id, mutation.args:
            case "faulty", "caught":
                with suppress(sqlite3.Error):
                    db.execute(statement)
            case "faulty", _:
                db.execute(statement)
        return apply(db, mutation)

    engine = open_log(path, apply=run_faulty, schema=schema, settings=ONE_TRANSACTION)
    with closing(engine):
        pushes = [
            [note("0", "0")],
            [note("1", "1")],
            [note("2", "2")],
            [note("3", "3"), note("faulty"), note("4", "4")],
            [note("faulty", "caught", scope="caught")],
            [note("5", "5")],
        ]
        with writer_held(engine):
            futures = [engine.submit(mutations) for mutations in pushes]
        codes = [
            [result.code for result in future.result(PATIENCE)] for future in futures
        ]
        failed = "internal_error"
        # `apply` may catch an error, unless the error has rolled back the transaction.
        if_caught = "" if "words" in statement else failed
        assert codes == [[""], [""], [""], ["", failed, ""], [if_caught], [""]]
        assert fold(whole_log(engine)) == list("012345")
        assert ask(engine.snapshot()).data == list("012345")
        assert engine.counts["pushes_failed"] == 0
        assert engine.counts[failed] == sum(failed in push for push in codes)


# When the disk or a lock refuses: nothing was applied, and later pushes work again.

needs_file_size_limit = pytest.mark.skipif(
    sys.platform != "linux", reason="needs a limit on the size of files"
)


@contextmanager
def full_disk(path: Path) -> Iterator[None]:
    """Keep this database's WAL from growing while the block lasts."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = path.with_name(f"{path.name}-wal").stat().st_size
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, old[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@contextmanager
def full_database(db: sqlite3.Connection) -> Iterator[None]:
    """Keep a database from growing by more than a page while the block lasts."""
    execute = sqlite3.Connection.execute
    (size,) = execute(db, "PRAGMA page_count").fetchone()
    execute(db, f"PRAGMA max_page_count = {size + 1}").fetchone()
    yield
    execute(db, f"PRAGMA max_page_count = {2**30}").fetchone()


def write_too_much(db: sqlite3.Connection) -> None:
    data = "printf('\"%.*c\"', 1000000, 'x')"
    db.execute(f"INSERT INTO notes VALUES ('_default', {data})")


def suppress_error(db: sqlite3.Connection) -> None:
    with suppress(sqlite3.Error):
        write_too_much(db)


def suppress_error_and_write(db: sqlite3.Connection) -> None:
    suppress_error(db)
    db.execute(TRACE)


def suppress_error_and_begin_savepoint(db: sqlite3.Connection) -> None:
    suppress_error(db)
    db.execute("SAVEPOINT mine")
    db.execute(TRACE)


def suppress_error_and_write_with_cursor(db: sqlite3.Connection) -> None:
    cursor = db.cursor()
    cursor.execute(TRACE)  # so that the statement is prepared already
    suppress_error(db)
    with suppress(sqlite3.Error):
        cursor.execute(TRACE)
    with suppress(sqlite3.Error):
        cursor.executescript(TRACE)
    with suppress(sqlite3.Error):
        cursor.executemany(TRACE, [()])


@pytest.mark.parametrize(
    "overflow",
    [
        write_too_much,
        suppress_error,
        suppress_error_and_write,
        suppress_error_and_write_with_cursor,
        suppress_error_and_begin_savepoint,
    ],
)
def test_a_mutation_too_large_for_the_disk_fails_alone_and_leaves_no_trace(
    path: Path, overflow: Callable[[sqlite3.Connection], None]
) -> None:
    connections: list[sqlite3.Connection] = []

    def apply_and_overflow(db: sqlite3.Connection, mutation: Mutation) -> Any:
        connections.append(db)
        changes = apply(db, mutation)
        if mutation.id == "large":
            overflow(db)
        return changes

    with closing(open_log(path, apply=apply_and_overflow)) as engine:
        push(engine, note("0"))
        with full_database(connections[0]):
            results = push(engine, note("1"), note("large"), note("2"))
            codes = [result.get("code") for result in results]
            assert codes == [None, "internal_error", None]
            assert len(whole_log(engine)) == len(ask(engine.snapshot()).data) == 3
        (sent_again,) = push(engine, note("large"))  # the failed one left no mark
        assert sent_again["ok"]
        assert "duplicate" not in sent_again
    with closing(open_log(path)) as engine:
        assert len(whole_log(engine)) == 4


@needs_file_size_limit
@table("data", {"at the commit": None, "within apply": "x" * 2**22})
def test_a_full_disk_makes_pushes_unavailable_until_it_has_room_again(
    engine: Engine, path: Path, data: str | None
) -> None:
    push(engine, note("1"))
    with full_disk(path):
        future = engine.submit([note("2", data)])
        with pytest.raises(Unavailable):
            future.result(PATIENCE)
        page = ask(engine.pull())
    assert len(page.changes) == 1
    assert "duplicate" not in push(engine, note("2", data))[0]
    assert len(whole_log(engine)) == len(ask(engine.snapshot()).data) == 2


@needs_file_size_limit
def test_once_the_disk_is_full_all_later_mutations_are_unavailable_and_not_run(
    path: Path,
) -> None:
    runs: list[str] = []
    limit = ExitStack()

    def fill_disk(db: sqlite3.Connection, mutation: Mutation) -> Any:
        if mutation.name == "hold":  # the disk has room while this one runs again
            limit.close()
            return apply(db, mutation)
        runs.append(mutation.id)
        changes = apply(db, mutation)
        if mutation.id == "fills":
            limit.enter_context(full_disk(path))
        return changes

    engine = open_log(path, apply=fill_disk, settings=ONE_TRANSACTION)
    with limit, closing(engine):
        with writer_held(engine):
            partial = engine.submit([note("0"), note("fills"), note("1")])
            refused = [engine.submit([note("2")]), engine.submit([note("3")])]
        codes = [result.code for result in partial.result(PATIENCE)]
        assert codes == ["", "unavailable", "unavailable"]
        for future in refused:
            assert isinstance(future.exception(PATIENCE), mizusync.StoreRefused)
        # All in one transaction, and then one by one until the disk refuses.
        assert runs == ["0", "fills", "1", "2", "3", "0", "fills"]
        assert engine.counts["pushes"] == 2  # the one that held the writer, and partial
        assert engine.counts["pushes_failed"] == 2
        assert engine.counts["unavailable"] == 2
        limit.close()
        results = push(engine, note("0"), note("1"), note("2"), note("3"))
        duplicates = ["duplicate" in result for result in results]
        assert duplicates == [True, False, False, False]
        assert len(whole_log(engine)) == len(ask(engine.snapshot()).data) == 4


@needs_file_size_limit
def test_a_refused_first_transaction_is_not_mistaken_for_a_restored_backup(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        closing(open_log(path)) as other_engine,
        closing(open_log(path)) as engine,
    ):
        push(other_engine, note("1", "x" * 100_000))
        latest = engine.store.latest
        checked = threading.Semaphore(0)

        def count_and_return_latest() -> mizusync.Position:
            checked.release()
            return latest()

        with full_disk(path):
            for _ in range(2):
                with pytest.raises(Unavailable):
                    push(engine, note("lost"))
        monkeypatch.setattr(engine.store, "latest", count_and_return_latest)
        for _ in range(3):  # times that the idle writer checks for foreign commits
            assert checked.acquire(timeout=PATIENCE)
        assert engine.rewinds == 0
        assert push(engine, note("2"))[0]["ok"]
        assert engine.rewinds == 0


def test_a_lock_of_another_process_makes_pushes_unavailable_and_reads_go_on(
    path: Path,
) -> None:
    with (
        closing(open_log(path, settings=Settings(busy_timeout=MOMENT))) as engine,
        closing(sqlite3.connect(path, isolation_level=None)) as db,
    ):
        push(engine, note("1"))
        db.execute("BEGIN IMMEDIATE")
        future = engine.submit([note("2")])
        assert len(whole_log(engine)) == 1  # while the push waits for the lock
        with pytest.raises(Unavailable):
            future.result(PATIENCE)
        db.execute("ROLLBACK")
        assert "duplicate" not in push(engine, note("2"))[0]


def test_all_jobs_that_wait_are_refused_after_one_wait_for_a_lock(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutations = [note(str(number)) for number in range(12)]
    attempts = 0

    async def push_and_trim(engine: Engine) -> list[Any]:
        jobs: list[Any] = [engine.push([mutation]) for mutation in mutations]
        jobs.append(engine.trim(DEFAULT, 2))
        return await asyncio.gather(*jobs, return_exceptions=True)

    with (
        closing(open_log(path, settings=Settings(busy_timeout=MOMENT))) as engine,
        closing(sqlite3.connect(path, isolation_level=None)) as db,
    ):
        begin = engine.store.begin

        def begin_when_all_wait() -> Any:
            nonlocal attempts
            attempts += 1
            if attempts == 1:  # the writer has taken one of the 13 jobs
                until(lambda: engine.stats()["pushes_waiting"] == 12)
            return begin()

        monkeypatch.setattr(engine.store, "begin", begin_when_all_wait)
        db.execute("BEGIN IMMEDIATE")
        outcomes = ask(push_and_trim(engine))
        assert attempts == 1
        assert [type(outcome) for outcome in outcomes] == [mizusync.StoreRefused] * 13
        db.execute("ROLLBACK")
        results = push(engine, *mutations)
        assert [result.get("duplicate") for result in results] == [None] * 12


# --- Engine ---------------------------------------------------------------------------
# Push and submit, close, and a fork of the process.


def test_apply_receives_the_identity_of_the_client(engine: Engine) -> None:
    mutation = Mutation("1", "who", identity="ann")
    (result,) = engine.submit([mutation]).result(PATIENCE)
    assert result.changes[0].data == "ann"


@pytest.mark.parametrize("value", ["", "\ud800", "x" * 257, 5, True, None, []])
@pytest.mark.parametrize("field", ["id", "name", "scope"])
def test_a_mutation_with_an_invalid_id_name_or_scope_is_refused(
    field: str, value: Any
) -> None:
    fields = {"id": "1", "name": "note"} | {field: value}
    with pytest.raises(mizusync.InvalidMutation):
        Mutation(**fields)
    with pytest.raises(mizusync.InvalidMutation):
        Mutation.parse(fields)


def test_a_push_with_an_invalid_mutation_applies_none(engine: Engine) -> None:
    with pytest.raises(mizusync.InvalidMutation):
        engine.submit([note("1"), {"id": ""}])
    assert whole_log(engine) == []


def test_threads_and_event_loops_push_to_one_engine(engine: Engine) -> None:
    async def push_from_tasks() -> None:
        pushes = [engine.push([note(f"loop {number}")]) for number in range(20)]
        await asyncio.gather(*pushes)

    def push_from_thread(key: str) -> None:
        push(engine, note(key))

    threads = [threading.Thread(target=lambda: ask(push_from_tasks()))]
    for number in range(20):
        thread = threading.Thread(target=push_from_thread, args=[str(number)])
        threads.append(thread)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert len(whole_log(engine)) == 40


def test_a_submitted_push_can_not_be_cancelled(engine: Engine) -> None:
    with writer_held(engine) as running:
        waiting = engine.submit([note("1")])
        assert not running.cancel()
        assert not waiting.cancel()
    assert waiting.result(PATIENCE)[0].ok


def test_pushes_beyond_max_pending_pushes_are_unavailable_and_leave_no_trace(
    path: Path,
) -> None:
    three_pushes = Settings(max_pending_pushes=3)
    with closing(open_log(path, settings=three_pushes)) as engine:
        with writer_held(engine):
            futures = [engine.submit([note(str(number))]) for number in range(3)]
            with pytest.raises(Unavailable):
                engine.submit([note("too many")])
        assert all(future.result(PATIENCE)[0].ok for future in futures)
        (sent_again,) = push(engine, note("too many"))
        assert sent_again["ok"]
        assert "duplicate" not in sent_again


def test_close_commits_the_pushes_that_wait_and_refuses_new_ones(path: Path) -> None:
    engine = open_log(path, settings=Settings(max_commit_time=0))  # no push joins
    closer = threading.Thread(target=engine.close)
    with writer_held(engine):
        futures = [engine.submit([note(key)]) for key in ("1", "2")]
        closer.start()
        until(lambda: refuses(lambda: engine.submit([])))
    closer.join(PATIENCE)
    assert all(future.result(0)[0].ok for future in futures)
    with closing(open_log(path)) as engine:
        assert len(whole_log(engine)) == 2


def test_a_closed_engine_is_unavailable_for_every_call(engine: Engine) -> None:
    push(engine, note("1"))
    whole_log(engine)  # so that memory holds the scope
    engine.close()
    engine.close()  # a second time does no harm
    with pytest.raises(Unavailable):
        engine.submit([note("2")])
    calls: list[Callable[[], Any]] = [
        lambda: engine.push([]),
        engine.pull,
        lambda: engine.pull("other"),
        engine.snapshot,
        engine.current,
        lambda: engine.current("other"),
        engine.position,
        lambda: engine.read(id),
        lambda: engine.trim(DEFAULT, 2),
    ]
    for call in calls:
        with pytest.raises(Unavailable):
            ask(asked(call))


FORKING = """
import asyncio, inspect, json, os, signal, sys
import mizusync

engine = mizusync.Engine(
    sys.argv[1],
    apply=lambda db, mutation: [1],
    snapshot=lambda db, scope: [],
)
mutation = {"id": "1", "name": "n"}

def submit():
    return engine.submit([mutation]).result()[0].ok

async def first(changes):
    return await anext(changes)

calls = {
    "push": lambda: engine.push([mutation]),
    "submit": submit,
    "trim": lambda: engine.trim("a", 1),
    "pull": lambda: engine.pull("a"),  # memory has nothing of this scope
    "read": lambda: engine.read(id),
    "snapshot": engine.snapshot,
    "current": lambda: engine.current("a"),
    "position": engine.position,
    "follow": lambda: first(engine.follow("a")),
    "close": engine.close,
}
harmless = {"add_listener", "end_waits", "catch_up", "stats"}
methods = inspect.getmembers(mizusync.Engine, inspect.isfunction)
public = {name for name, _ in methods if not name.startswith("_")}
assert set(calls) == public - harmless

def outcome(call):
    async def run():
        value = call()
        return await value if inspect.isawaitable(value) else value
    try:
        return repr(asyncio.run(run()))
    except RuntimeError as error:
        return str(error)

assert submit()
if (child := os.fork()) == 0:
    signal.alarm(10)  # a call that hangs ends the child
    outcomes = {outcome(call) for call in calls.values()}
    print(json.dumps(list(outcomes)), flush=True)
    os._exit(0)
_, status = os.waitpid(child, 0)
mutation["id"] = "2"
print(json.dumps([status, submit(), asyncio.run(engine.current())]))
engine.close()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_what_needs_the_database_fails_in_a_forked_child_and_the_parent_goes_on(
    path: Path,
) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", FORKING, str(path)],
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
        cwd=PROGRAM.parent,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    child, parent = map(json.loads, ended.stdout.splitlines())
    assert child == ["this process was forked: open the engine after the fork"]
    assert parent == [0, True, 2]
    assert not path.with_name(f"{path.name}-wal").exists()  # close() has removed it


# Pulls, also those that wait; follow, snapshots and other reads; the end.


async def reached(condition: Callable[[], Any]) -> None:
    """Let the event loop run until a condition is true; `ask` has the deadline."""
    while not condition():
        await asyncio.sleep(0)


def pull_count(engine: Engine) -> int:
    """Return how many pages the engine has begun to read."""
    return engine.counts["pulls_from_memory"] + engine.counts["pulls_from_disk"]


# -- pull


def test_a_pull_without_new_changes_is_empty_and_keeps_its_cursor(
    engine: Engine,
) -> None:
    (first,) = push(engine, note("1"))
    push(engine, note("2", scope="other"))
    current = first["cursor"]
    head = current + 1
    for cursor in (current, head):
        page = pull(engine, cursor)
        assert page["changes"] == []
        assert page["cursor"] == cursor
        assert page["hasMore"] is False
    push(engine, note("3"))
    assert len(pull(engine, head)["changes"]) == 1


def test_a_waiting_pull_returns_after_a_push_to_its_scope_or_end_waits(
    engine: Engine,
) -> None:
    async def wait_for_both() -> None:
        waiting = asyncio.create_task(engine.pull(wait=PATIENCE * 3))
        waiting_elsewhere = asyncio.create_task(engine.pull("other", wait=PATIENCE * 3))
        await reached(lambda: pull_count(engine) >= 2)
        await engine.push([note("1", "news")])
        page = await waiting
        assert [change.data for change in page.changes] == ["news"]
        assert not waiting_elsewhere.done()
        engine.end_waits()
        empty_page = await waiting_elsewhere
        assert empty_page.changes == []

    ask(wait_for_both())


def test_no_push_is_missed_between_the_read_of_a_pull_and_its_wait(
    engine: Engine,
) -> None:
    async def push_beside_pulls() -> None:
        cursor = 0
        for number in range(30):  # the push runs beside the pull's first read
            waiting = asyncio.create_task(engine.pull(cursor=cursor, wait=PATIENCE * 3))
            await asyncio.gather(engine.push([note(str(number))]), waiting)
            page = waiting.result()
            assert len(page.changes) == 1
            cursor = page.cursor

    ask(push_beside_pulls())


def test_closing_ends_a_waiting_pull(engine: Engine) -> None:
    async def close_beside_a_pull() -> None:
        waiting = asyncio.create_task(engine.pull(wait=PATIENCE * 3))
        await reached(lambda: pull_count(engine) > 0)
        await asyncio.to_thread(engine.close)
        with suppress(Unavailable):
            page = await waiting
            assert page.changes == []

    ask(close_beside_a_pull())


# SQLite crashes if a connection is closed while another thread reads from it. So this
# runs in a process of its own.
CLOSER = """
import asyncio, sys, mizusync

async def pull_until_closed(engine):
    closing = asyncio.create_task(asyncio.to_thread(engine.close))
    while not closing.done():
        try:
            await engine.pull()
            await engine.current()
        except mizusync.Unavailable:
            pass
        await asyncio.sleep(0)
    await closing

for number in range(20):
    engine = mizusync.Engine(sys.argv[1], apply=lambda db, mutation: [1])
    engine.submit([{"id": str(number), "name": "n"}]).result()
    asyncio.run(pull_until_closed(engine))
"""


def test_pulls_while_the_engine_closes_are_answered_or_unavailable(path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CLOSER, str(path)],
        env=os.environ | {"PYTHONPATH": str(Path(mizusync.__file__).parent)},
        capture_output=True,
        timeout=PATIENCE * 4,
        check=False,
    )
    assert done.returncode == 0
    assert done.stderr == b""


# -- follow


def test_follow_yields_every_change_once_and_then_each_new_one(engine: Engine) -> None:
    async def follow_five() -> list[Any]:
        await engine.push([note(str(number), number) for number in range(3)])
        changes = engine.follow()
        followed = [(await anext(changes)).data for _ in range(3)]
        pushing = asyncio.create_task(engine.push([note("3", 3), note("4", 4)]))
        followed += [(await anext(changes)).data for _ in range(2)]
        await pushing
        return followed

    assert ask(follow_five()) == [0, 1, 2, 3, 4]


def test_follow_yields_to_the_event_loop_where_pulls_may_not_wait(path: Path) -> None:
    async def follow_two(engine: Engine) -> list[int]:
        changes = engine.follow()
        return [(await anext(changes)).cursor for _ in range(2)]

    async def push_beside_follow(engine: Engine) -> list[int]:
        following = asyncio.create_task(follow_two(engine))
        await reached(lambda: pull_count(engine) >= 3)  # it has found nothing twice
        await engine.push([note("2")])
        return await following

    with closing(open_log(path, settings=Settings(max_pull_wait=0))) as engine:
        push(engine, note("1"))
        assert ask(push_beside_follow(engine)) == [1, 2]


def test_closing_ends_a_follow_while_a_reader_is_still_at_work(path: Path) -> None:
    reader_entered = threading.Event()
    reader_released = threading.Event()

    def slow_snapshot(db: sqlite3.Connection, scope: str) -> None:
        reader_entered.set()
        reader_released.wait(PATIENCE)

    async def follow_for_ever(engine: Engine) -> None:
        async for _ in engine.follow():
            pass

    async def close_beside_a_reader() -> None:
        engine = open_log(path, snapshot=slow_snapshot)
        await engine.push([note("1")])
        following = asyncio.create_task(follow_for_ever(engine))
        reading = asyncio.create_task(engine.snapshot())
        await reached(reader_entered.is_set)
        await reached(lambda: engine.counts["pulls_from_memory"] > 0)
        closing_engine = asyncio.create_task(asyncio.to_thread(engine.close))
        with pytest.raises(Unavailable):
            await following
        reader_released.set()
        await asyncio.gather(closing_engine, reading)

    ask(close_beside_a_reader())


# -- snapshots and other reads


def test_a_snapshot_is_of_the_moment_of_its_cursor_while_others_push(
    path: Path,
) -> None:
    stopped = threading.Event()

    def push_until_stopped(engine: Engine, name: str) -> None:
        number = 0
        while not stopped.is_set():
            scopes = [DEFAULT] * (number % 3) + ["other"]
            push(engine, entry(f"{name} {number}", *scopes))
            number += 1

    async def take_snapshots(engine: Engine) -> list[mizusync.Snapshot]:
        taken = [await engine.snapshot() for _ in range(20)]
        while taken[-1].cursor == taken[0].cursor:
            # One commit may take longer than all of these.
            taken.append(await engine.snapshot())
        return taken

    with closing(open_log(path, apply=ledger)) as engine, ThreadPoolExecutor(4) as pool:
        pushing = [pool.submit(push_until_stopped, engine, name) for name in "abc"]
        until(lambda: engine.counts["commits"] > 5)
        taken = ask(take_snapshots(engine))
        stopped.set()
        assert [future.result(PATIENCE) for future in pushing] == [None] * 3
        taken.append(ask(engine.snapshot()))
        log = whole_log(engine)
        for found in taken:
            assert found.data == fold(
                change for change in log if cursor_of(change) <= found.cursor
            )


def test_a_snapshot_of_encoded_json_is_sent_as_it_is(path: Path) -> None:
    def encoded(db: sqlite3.Connection, scope: str) -> Json:
        return Json('{"a": 1.50}')

    with closing(open_log(path, snapshot=encoded)) as engine:
        assert b'"data":{"a": 1.50}' in ask(engine.snapshot()).encode()


@pytest.mark.parametrize(
    "kind", [asyncio.CancelledError, GeneratorExit, SystemExit, StopIteration]
)
def test_a_control_flow_exception_of_a_snapshot_function_is_a_runtime_error(
    path: Path, kind: type[BaseException]
) -> None:
    def fail(db: sqlite3.Connection, scope: str) -> Any:
        raise kind

    with (
        closing(open_log(path, snapshot=fail)) as engine,
        pytest.raises(RuntimeError),
    ):
        ask(engine.snapshot())


def test_current_is_the_cursor_of_a_scopes_newest_change_or_0(path: Path) -> None:
    for key in ("1", "2"):
        with closing(open_log(path)) as engine:
            (result,) = push(engine, note(key, scope="a"))
            push(engine, note(key, scope="b"))
            assert ask(engine.current("a")) == result["cursor"]
            assert ask(engine.current("never")) == 0


def test_a_read_finds_the_applications_tables_and_can_not_write_to_them(
    engine: Engine,
) -> None:
    def select(db: sqlite3.Connection) -> list[Any]:
        return db.execute("SELECT data FROM notes").fetchall()

    push(engine, note("1", "milk"))
    assert ask(engine.read(select)) == [('"milk"',)]
    with pytest.raises(RuntimeError, match="only apply may write"):
        ask(engine.read(lambda db: db.execute("DELETE FROM notes")))
    assert ask(engine.read(select)) == [('"milk"',)]


# --- Several processes ----------------------------------------------------------------
# Engines on one file are one log: what one commits, no other misses.


def test_several_engines_may_open_a_new_file_at_once(tmp_path: Path) -> None:
    together = threading.Barrier(4)

    def open_and_close(number: int) -> None:
        together.wait(PATIENCE)
        open_log(tmp_path / f"{number // 4}.db").close()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(open_and_close, range(40))) == [None] * 40


def test_two_engines_on_one_file_are_one_log(path: Path) -> None:
    with two_engines(path) as (engine, other_engine):
        cursors = []
        for number in range(15):
            pushing, reading = engine, other_engine
            if number % 3 == 0:
                pushing, reading = other_engine, engine
            (result,) = push(pushing, note(str(number), number))
            cursors.append(result["cursor"])
            assert fold(whole_log(reading)) == list(range(number + 1))
            assert fold(whole_log(pushing)) == list(range(number + 1))
            assert push(reading, note(str(number)))[0]["duplicate"]
            assert ask(reading.current()) == cursors[-1]
        assert cursors == sorted(set(cursors))


def test_another_engines_commit_is_read_before_the_engine_has_noticed_it(
    path: Path,
) -> None:
    with two_engines(path, settings=UNWATCHED) as (engine, other_engine):
        push(engine, note("1"))
        assert len(whole_log(engine)) == 1
        push(other_engine, note("2"))
        assert ask(engine.current()) == 2
        assert len(whole_log(engine)) == 2


# -- notices of another engine's commits


def test_a_listener_is_notified_of_another_engines_commit(path: Path) -> None:
    with two_engines(path) as (engine, other_engine):
        notified: list[tuple[str, int]] = []

        def listener(hints: Mapping[str, Hint]) -> None:
            notified.extend((scope, hint.cursor) for scope, hint in hints.items())

        engine.add_listener(listener)
        (result,) = push(other_engine, note("1", scope="a"))
        until(lambda: ("a", result["cursor"]) in notified)


def test_a_waiting_pull_is_woken_by_another_engines_commit(path: Path) -> None:
    async def push_elsewhere() -> int:
        with two_engines(path) as (engine, other_engine):
            waiting = asyncio.create_task(engine.pull(wait=PATIENCE * 3))
            await reached(lambda: pull_count(engine) > 0)
            await other_engine.push([note("1")])
            page = await waiting
            return len(page.changes)

    assert ask(push_elsewhere()) == 1


def test_another_engines_commit_that_was_pulled_before_its_hint_ends_no_wait(
    path: Path,
) -> None:
    async def wait_after_a_pull(engine: Engine) -> None:
        notified = asyncio.Event()
        engine.add_listener(lambda hints: notified.set(), DEFAULT)
        page = await engine.pull()
        assert len(page.changes) == 1
        waiting = asyncio.create_task(
            engine.pull(cursor=page.cursor, wait=PATIENCE * 3)
        )
        await reached(lambda: pull_count(engine) == 2)
        await engine.read(id)  # the only reader has finished with the page before
        assert not notified.is_set()
        engine.catch_up()
        await notified.wait()
        for _ in range(3):  # a pull that the hint had woken would read again by now
            await asyncio.sleep(0)
        assert pull_count(engine) == 2
        await engine.push([note("2", "new")])
        page = await waiting
        assert [change.data for change in page.changes] == ["new"]

    unwatched = replace(UNWATCHED, readers=1)
    with two_engines(path, settings=unwatched) as (engine, other_engine):
        push(other_engine, note("1"))
        ask(wait_after_a_pull(engine))


def test_catch_up_notices_another_engines_commit_before_the_watch_interval(
    path: Path,
) -> None:
    with two_engines(path, settings=UNWATCHED) as (engine, other_engine):
        notified = threading.Event()
        engine.add_listener(lambda hints: notified.set(), "a")
        push(other_engine, note("1", scope="a"))
        engine.catch_up()
        assert notified.wait(PATIENCE)


# -- trims of another engine


def test_another_engines_trim_of_changes_not_in_memory_makes_a_cursor_too_old(
    path: Path,
) -> None:
    with two_engines(path, settings=UNWATCHED) as (engine, other_engine):
        (result,) = push(engine, note("1"))
        assert len(whole_log(engine)) == 1
        push(other_engine, note("2"))
        ask(other_engine.trim(DEFAULT, 1000))
        push(engine, note("3", scope="elsewhere"))
        with pytest.raises(mizusync.CursorTooOld):
            pull(engine, result["cursor"])
        push(engine, note("4"))
        with pytest.raises(mizusync.CursorTooOld):
            pull(engine, result["cursor"])


def test_another_engines_trim_of_changes_in_memory_makes_a_cursor_too_old(
    path: Path,
) -> None:
    with two_engines(path) as (engine, other_engine):
        # The epoch of the other engine begins here, so that only its trim is new later.
        push(other_engine, note("0", scope="elsewhere"))
        trimmed, kept = push(engine, note("1"), note("2"))
        assert len(whole_log(engine)) == 2
        ask(other_engine.trim(DEFAULT, kept["cursor"]))
        with pytest.raises(mizusync.CursorTooOld):
            pull(engine)
        assert pull(engine, trimmed["cursor"])["changes"] == kept["changes"]


def test_another_engines_trim_lowers_no_cursor_of_a_hint(path: Path) -> None:
    with two_engines(path) as (engine, other_engine):
        cursors: list[int] = []

        def listener(hints: Mapping[str, Hint]) -> None:
            cursors.append(hints[DEFAULT].cursor)

        engine.add_listener(listener, DEFAULT)
        push(engine, *(note(str(number)) for number in range(5)))
        ask(other_engine.trim(DEFAULT, 4))
        push(engine, note("so that it notices the trim by itself", scope="elsewhere"))
        push(other_engine, note("after"))
        until(lambda: cursors[-1] == 7)
        assert cursors == sorted(cursors)


# -- processes of their own

# It prints a line of JSON for each mutation that is acknowledged: id, cursor, thread,
# number. `starts` has the first number of each thread.
WORKER = """
import json, os, sys, threading
import mizusync

def apply(db, mutation):
    row = (mutation.scope, json.dumps(mutation.id))
    db.execute("INSERT INTO notes VALUES (?, ?)", row)
    return [mutation.id]

path, name = sys.argv[1:3]
starts = json.loads(sys.argv[3])
count = int(sys.argv[4])
engine = mizusync.Engine(path, apply=apply)

def push_numbers(thread, start):
    for number in range(start, start + count):
        key = f"{name} {thread} {number}"
        (result,) = engine.submit([{"id": key, "name": "note"}]).result()
        line = json.dumps([key, result.cursor, thread, number]) + "\\n"
        os.write(1, line.encode())  # at once, and in one piece

threads = [
    threading.Thread(target=push_numbers, args=(thread, start))
    for thread, start in enumerate(starts)
]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
engine.close()
"""


def start_worker(
    path: Path, name: str, starts: list[int], count: int
) -> subprocess.Popen[bytes]:
    """Start a process that pushes `count` mutations from each of its threads, and
    prints a line for each that is acknowledged (see WORKER)."""
    arguments = [str(path), name, json.dumps(starts), str(count)]
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, *arguments],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(Path(mizusync.__file__).parent)},
    )


def test_processes_that_write_to_one_file_make_one_log(path: Path) -> None:
    with closing(open_log(path)) as engine:
        workers = [start_worker(path, name, [0, 0], 30) for name in "ab"]
        pulled: list[Any] = []
        own_cursors: list[int] = []
        deadline = time.monotonic() + PATIENCE * 3
        while len(pulled) < 120 + len(own_cursors) or not own_cursors:
            assert time.monotonic() < deadline, "a worker failed"
            (result,) = push(engine, note(str(len(own_cursors))))
            own_cursors.append(result["cursor"])
            pulled += pull(engine, last_cursor(pulled), limit=1000)["changes"]
            assert own_cursors[-1] in map(cursor_of, pulled)
        outputs = [worker.communicate(timeout=PATIENCE)[0] for worker in workers]
        lines = [json.loads(line) for output in outputs for line in output.splitlines()]
        acknowledged: dict[int, Any] = dict.fromkeys(own_cursors)
        acknowledged |= {cursor: key for key, cursor, _, _ in lines}
        assert {cursor_of(change): change["data"] for change in pulled} == acknowledged
        assert list(map(cursor_of, pulled)) == sorted(acknowledged)
        assert whole_log(engine) == pulled


def head_after_more_commits(engine: Engine) -> int:
    """Return the current cursor once other processes have raised it by over 10."""
    start = ask(engine.current())
    until(lambda: ask(engine.current()) > start + 10)
    return ask(engine.current())


def test_a_process_gets_the_lock_beside_a_busy_writer(path: Path) -> None:
    # The unit is changes that the other process commits meanwhile, because a slow disk
    # slows both.
    waited = 0
    count = 30
    with closing(open_log(path)) as engine, ThreadPoolExecutor(1) as pool:
        worker = start_worker(path, "busy", [0] * 4, 100_000)
        output = pool.submit(worker.communicate)
        for number in range(count):
            head = head_after_more_commits(engine)
            (result,) = push(engine, note(str(number)))
            waited += result["cursor"] - head
        assert worker.poll() is None
        worker.kill()
        output.result(PATIENCE)
    # About 8 a push, and 30 on a busy machine; with SQLite's own busy handler 140 to
    # 550.
    assert waited < count * 60


# --- Hub ------------------------------------------------------------------------------
# Topics, numbers and bytes; its messages are plain JSON here.


class Follower:
    """A subscriber that writes down what it hears; it may be slow to write."""

    def __init__(self, pause: float = 0.0) -> None:
        self.heard: list[Any] = []
        self.times: list[float] = []
        self.pause = pause

    def hint(self, topic: str, cursor: int, message: bytes) -> None:
        self.message(message)
        assert self.heard[-1]["topic"] == topic
        assert self.heard[-1]["data"]["cursor"] == cursor
        started = time.monotonic()
        while time.monotonic() < started + self.pause:
            pass

    def message(self, message: bytes) -> None:
        self.heard.append(json.loads(message))
        self.times.append(time.monotonic())

    @property
    def data(self) -> list[Any]:
        return [message["data"] for message in self.heard]

    @property
    def cursors(self) -> list[int]:
        return [data["cursor"] for data in self.data]


def make_hub(**limits: Any) -> Hub:
    return Hub(Settings(**limits), bytes)


def news(cursor: int, *items: Any, after: int | None = None) -> Hint:
    encoded = tuple(json.dumps(item).encode() for item in items)
    return Hint(cursor, "e", cursor - len(items) if after is None else after, encoded)


async def quiet(follower: Follower, newest: int) -> None:
    """Until this cursor was heard."""
    while newest not in follower.cursors:
        await asyncio.sleep(0.001)


def test_a_hint_goes_to_the_followers_of_its_topic_alone() -> None:
    hub, one, two, other = make_hub(), Follower(), Follower(), Follower()
    for follower, topic in ((one, "sync:a"), (two, "sync:a"), (other, "sync:b")):
        hub.subscribe(topic, follower)
    hub.hint("sync:a", Hint(5))
    assert one.heard == two.heard == [{"topic": "sync:a", "data": {"cursor": 5}}]
    assert other.heard == []


def test_the_changes_are_in_the_hints_of_those_who_asked_for_them() -> None:
    hub, plain, asking = make_hub(), Follower(), Follower()
    hub.subscribe("sync:a", plain)
    hub.subscribe("sync:a", asking, items=True)
    hub.hint("sync:a", news(5, "x", "y"))
    assert plain.data == [{"cursor": 5}]
    assert asking.data == [
        {"cursor": 5, "epoch": "e", "after": 3, "changes": ["x", "y"]}
    ]


def test_the_last_subscribe_decides_on_changes() -> None:
    hub, follower = make_hub(hint_gap=0.0), Follower()
    for items, keys in ((True, 4), (False, 1)):
        hub.subscribe("sync:a", follower, items=items)
        hub.unsubscribe("sync:a", Follower())  # who never followed it
        hub.hint("sync:a", news(5, "x"))
        assert len(follower.data[-1]) == keys
    assert len(follower.heard) == 2


def burst(
    hints: list[Hint], at_once: int = 1, items: bool = True, **limits: Any
) -> list[Any]:
    """What a follower hears of hints that come at once, when the first was slow to
    tell."""

    async def all_at_once() -> list[Any]:
        hub, follower = make_hub(hint_gap=1.0, **limits), Follower(pause=0.03)
        hub.subscribe("sync:a", follower, items)
        for hint in hints:
            hub.hint("sync:a", hint)
        assert len(follower.heard) == at_once
        await quiet(follower, hints[-1].cursor)
        assert follower.times[-1] - follower.times[0] >= 4 * follower.pause
        assert len(follower.heard) == at_once + 1
        return follower.data

    return ask(all_at_once())


def test_hints_of_a_burst_merge_and_are_paced() -> None:
    _, merged = burst([news(cursor, str(cursor)) for cursor in range(1, 11)])
    assert merged == {
        "cursor": 10,
        "epoch": "e",
        "after": 1,
        "changes": [str(n) for n in range(2, 11)],
    }


def test_a_merged_hint_leaves_before_it_has_more_changes_than_it_may_carry() -> None:
    hints = [news(1, 1), *(news(cursor, 1) for cursor in range(2, 7))]
    assert burst(hints, max_hint_changes=5)[1:] == [news_data(6, 1, [1] * 5)]
    early, last = burst(hints, at_once=2, max_hint_changes=4)[1:]
    assert (early, last) == (news_data(5, 1, [1] * 4), news_data(6, 5, [1]))
    assert burst(hints, items=False, max_hint_changes=4)[1:] == [{"cursor": 6}]


def test_a_hint_with_many_changes_comes_without_them() -> None:
    large = news(3, 1, 1, 1, 1, 1, after=2)
    assert burst([news(1, 1), news(2, 1), large], max_hint_changes=4)[1:] == [
        {"cursor": 3}
    ]


def news_data(cursor: int, after: int, changes: list[Any]) -> dict[str, Any]:
    return {"cursor": cursor, "epoch": "e", "after": after, "changes": changes}


def test_a_hint_with_large_changes_comes_without_them() -> None:
    for size, keys in ((100, 4), (101, 1)):
        hub, follower = make_hub(max_hint_size=102), Follower()
        hub.subscribe("sync:a", follower, items=True)
        hub.hint("sync:a", news(1, "x" * size))
        assert len(follower.data[0]) == keys


def test_a_hint_to_many_lets_others_have_their_turn_and_keeps_its_order() -> None:
    async def go() -> None:
        hub, crowd = make_hub(), [Follower() for _ in range(3 * mizusync.HANDFUL + 1)]
        for number, follower in enumerate(crowd):
            hub.subscribe("sync:a", follower, items=number % 2 == 0)
        hub.hint("sync:a", news(1, 1))
        told = [len(follower.heard) for follower in crowd]
        assert told == sorted(told, reverse=True)
        assert sum(told) == mizusync.HANDFUL
        hub.hint("sync:a", news(2, 2))  # waits for the end of the round
        hub.hint("sync:a", news(3, 3))
        gone = crowd.pop()
        hub.unsubscribe("sync:a", gone)
        late = Follower()
        hub.subscribe("sync:a", late)
        hub.tell("sync:a", late, 3)
        while len(late.heard) < 2:  # it is the last of the last round
            await asyncio.sleep(0)
        assert all(follower.cursors == [1, 3] for follower in crowd)
        assert crowd[0].data[1] == news_data(3, 1, [2, 3])
        assert (gone.heard, late.cursors) == ([], [3, 3])

    ask(go())


def test_a_merged_hint_never_hides_a_gap() -> None:
    foreign = Hint(4, "e")  # another process's commit, whose changes are not known here
    assert burst([news(1, 1), news(2, 2), foreign, news(5, 5)])[1] == {"cursor": 5}
    assert burst([news(1, 1), news(2, 2), news(9, 9, after=7)])[1] == {"cursor": 9}


@settings(max_examples=40)
@given(
    commits=st.lists(st.integers(0, 4), min_size=1, max_size=30), few=st.integers(1, 12)
)
def test_hints_with_changes_have_no_gap_and_end_at_the_newest(
    commits: list[int], few: int
) -> None:
    async def follow() -> list[Any]:
        hub, follower, cursor = make_hub(max_hint_changes=few), Follower(), 0
        hub.subscribe("sync:a", follower, items=True)
        for count in commits:
            items = range(cursor + 1, cursor + count + 2)
            cursor += count + 1
            hub.hint("sync:a", news(cursor, *items))
            if count == 3:
                await quiet(follower, cursor)
        await quiet(follower, cursor)
        return follower.data

    heard = ask(follow())
    cursors = [data["cursor"] for data in heard]
    assert cursors == sorted(set(cursors))
    for data in heard:
        if "changes" in data:
            assert data["changes"] == list(range(data["after"] + 1, data["cursor"] + 1))
            assert len(data["changes"]) <= few


def test_a_new_follower_is_told_where_the_topic_stands_and_never_of_less() -> None:
    hub, follower = make_hub(hint_gap=0.0), Follower()
    hub.subscribe("sync:a", follower)
    hub.tell("sync:a", follower, 7)
    hub.tell("sync:a", follower, 3)  # read before a commit, told after it
    hub.hint("sync:a", Hint(9))
    hub.tell("sync:a", follower)
    assert follower.cursors == [7, 7, 9, 9]
    hub.tell("sync:b", follower, 1)  # a topic that it does not follow
    assert len(follower.heard) == 4


def test_the_newest_hint_is_sent_again_after_a_silence() -> None:
    hub, told, hinted = make_hub(heartbeat=100.0, hint_gap=0.0), Follower(), Follower()
    hub.subscribe("sync:a", told)
    hub.subscribe("sync:b", hinted, items=True)
    start = time.monotonic()
    hub.tell("sync:a", told, 1)
    hub.hint("sync:b", news(2, "x"))
    hub.beat(start + 99)
    assert (told.cursors, hinted.cursors) == ([1], [2])
    late = time.monotonic()
    until(lambda: time.monotonic() > late)
    hub.beat(late + 100)
    assert (told.cursors, hinted.cursors) == ([1, 1], [2, 2])
    assert hinted.data[-1] == {"cursor": 2}


def test_only_the_topics_that_were_silent_are_sent_again() -> None:
    hub = make_hub(heartbeat=100.0, hint_gap=0.0)
    followers = {name: Follower() for name in ("first", "second", "third")}
    for topic, follower in followers.items():
        hub.subscribe(topic, follower)
        hub.hint(topic, Hint(1))
    early = time.monotonic()
    until(lambda: time.monotonic() > early)
    hub.hint("first", Hint(2))
    late = time.monotonic()
    hub.beat(early + 100)
    assert [follower.cursors for follower in followers.values()] == [
        [1, 2],
        [1, 1],
        [1, 1],
    ]
    until(lambda: time.monotonic() > late)
    hub.beat(late + 100)
    assert [follower.cursors for follower in followers.values()] == [
        [1, 2, 2],
        [1, 1],
        [1, 1],
    ]


def test_a_topic_that_never_had_a_hint_has_no_heartbeat() -> None:
    hub, follower = make_hub(heartbeat=1.0), Follower()
    hub.subscribe("news", follower)
    hub.beat(time.monotonic() + 5)
    assert follower.heard == []


def test_a_topic_without_followers_is_forgotten_with_what_it_had_to_say() -> None:
    async def leave() -> None:
        hub, follower, later = make_hub(), Follower(pause=0.005), Follower()
        hub.subscribe("sync:a", follower)
        hub.hint("sync:a", Hint(1))
        hub.hint("sync:a", Hint(2))  # which has to wait
        hub.unsubscribe("sync:a", follower)
        assert not hub.topics
        hub.hint("sync:a", Hint(3))
        hub.publish("sync:a", b"3")
        hub.unsubscribe("sync:a", follower)
        hub.subscribe("sync:a", later)
        hub.tell("sync:a", later, 3)
        await asyncio.sleep(0.05)
        assert (follower.cursors, later.cursors) == ([1], [3])

    ask(leave())


def test_a_message_reaches_every_follower_and_none_is_merged() -> None:
    hub, one, two = make_hub(), Follower(), Follower()
    hub.subscribe("news", one)
    hub.subscribe("news", two)
    for number in range(50):
        hub.publish("news", b"%d" % number)
    assert one.data == two.data == list(range(50))
    hub.publish("nobody's", b"1")


def test_who_leaves_while_a_hint_goes_round_hurts_nobody() -> None:
    hub, last = make_hub(), Follower()

    class Leaver(Follower):
        def hint(self, topic: str, cursor: int, message: bytes) -> None:
            hub.unsubscribe(topic, self)

    hub.subscribe("sync:a", Leaver())
    hub.subscribe("sync:a", last)
    hub.hint("sync:a", Hint(1))
    assert last.cursors == [1]
    assert len(hub.topics["sync:a"].followers) == 1


class Leaver(Follower):
    """Who leaves every topic of this hub when it hears this cursor."""

    def __init__(self, hub: Hub, last: int) -> None:
        super().__init__(pause=0.005)
        self.hub, self.last = hub, last

    def hint(self, topic: str, cursor: int, message: bytes) -> None:
        super().hint(topic, cursor, message)
        if cursor == self.last:
            for name in list(self.hub.topics):
                self.hub.unsubscribe(name, self)


def test_who_leaves_everything_when_it_is_told_ends_no_heartbeat() -> None:
    hub = make_hub(heartbeat=1.0, hint_gap=0.0)
    leaver = Leaver(hub, last=0)
    for topic in ("sync:a", "sync:b"):
        hub.subscribe(topic, leaver)
        hub.hint(topic, Hint(1))
    leaver.last = 1
    hub.beat(time.monotonic() + 5)
    assert (leaver.cursors, len(hub.topics)) == ([1, 1, 1], 0)


def test_who_leaves_when_it_is_told_at_once_what_has_no_room_is_told_no_more() -> None:
    async def leave() -> None:
        failed: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(
            lambda loop, what: failed.append(what)
        )
        hub = make_hub(max_hint_changes=2, hint_gap=0.02)
        leaver = Leaver(hub, last=2)
        hub.subscribe("sync:a", leaver, items=True)
        for hint in (news(1, "x"), news(2, "y"), news(4, "z", "w")):
            hub.hint("sync:a", hint)
        await asyncio.sleep(0.05)
        assert (leaver.cursors, failed, len(hub.topics)) == ([1, 2], [], 0)

    ask(leave())


def test_a_follower_that_fails_hurts_no_other() -> None:
    hub, last = make_hub(), Follower()

    class Broken(Follower):
        def message(self, message: bytes) -> None:
            raise ConnectionError("gone")

    hub.subscribe("sync:a", Broken())
    hub.subscribe("sync:a", last)
    hub.publish("sync:a", b'{"cursor": 1}')
    hub.hint("sync:a", Hint(2))
    assert last.cursors == [1, 2]


# --- HTTP/1.1 -------------------------------------------------------------------------
# First the parser alone, then what goes over a socket. Whatever two parsers could read
# differently is refused, the connection closed, and nothing behind it read as a
# request.

HOST, EVIL = b"Host: localhost", b"Host: evil.example"
VERSION = b"Sec-WebSocket-Version: 13"
PUSH = b"POST /sync/push HTTP/1.1"
JSON = b"Content-Type: application/json"
BODY = b'[{"id": "a", "name": "note"}]'
LENGTH = b"Content-Length: %d" % len(BODY)
CHUNKED = b"Transfer-Encoding: chunked"


def get(target: bytes, *lines: bytes, host: bytes = HOST, body: bytes = b"") -> bytes:
    return raw(b"GET %b HTTP/1.1" % target, host, *lines, body=body)


def post(
    *lines: bytes, line: bytes = PUSH, host: bytes = HOST, body: bytes = BODY
) -> bytes:
    return raw(line, host, JSON, *lines, body=body)


HEALTHZ = get(b"/healthz")
tokens = st.text("ABCXYZabcxyz019!#$%&'*+-.^_`|~", min_size=1, max_size=12)
printable = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=20)
paths = st.text("abcXYZ09-._~!$&'()*+,;=:@/", max_size=30)


@st.composite
def request_heads(draw: st.DrawFn) -> bytes:
    """A request without a body, as the grammar allows it (RFC 9112 §3, RFC 9110 §5)."""
    query = draw(st.sampled_from(["", "?", "?scope=a+b&cursor=7", "?scope=%C3%A9%20"]))
    lines = [f"{draw(tokens)} /{draw(paths)}{query} HTTP/1.1", "Host: localhost"]
    for name, value in draw(st.lists(st.tuples(tokens, printable), max_size=4)):
        space = draw(st.sampled_from(["", " ", "\t", " \t "]))
        lines.append(f"X-{name}:{space}{value}{space}")
    return raw(*(line.encode() for line in lines))


@st.composite
def spoiled_heads(draw: st.DrawFn) -> bytes:
    """A good request in which a few places were written over."""
    head = bytearray(draw(request_heads()))
    framing = [
        b"\r\n\r\n",
        b"\r\nContent-Length: 1",
        b"\r\nTransfer-Encoding: chunked",
        b"HTTP/1.0",
    ]
    stuff = st.sampled_from(
        [*framing, *b"\r|\n|\r\n|\0| |\t|:|,|%|\x0b|\xa0|\xff".split(b"|")]
    )
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(head)))
        head[at : at + draw(st.integers(0, 3))] = draw(stuff | st.binary(max_size=3))
    return bytes(head)


def read_heads(parts: Iterable[bytes]) -> list[Any]:
    """The requests in these bytes, and the code of the refusal that ended them, if one
    did."""
    buffer, found = bytearray(), list[Any]()
    try:
        for part in parts:
            buffer += part
            while (request := mizusync.parse_request(buffer, Settings())) is not None:
                headers = sorted(request.headers.items())
                found.append((request.method, request.target, request.query, headers))
    except mizusync.SyncError as refusal:
        found.append(refusal.code)
    return found


@given(st.lists(request_heads(), max_size=3), st.lists(st.integers(0, 900), max_size=9))
def test_requests_read_the_same_however_the_bytes_arrive(
    sent: list[bytes], cuts: list[int]
) -> None:
    found = read_heads(pieces(b"".join(sent), cuts))
    assert found == read_heads([b"".join(sent)])
    assert [one[0].encode() for one in found] == [head.split(b" ")[0] for head in sent]


@given(spoiled_heads(), st.lists(st.integers(0, 900), max_size=5))
@settings(max_examples=200)
def test_a_spoiled_head_is_a_request_or_a_refusal_however_it_arrives(
    head: bytes, cuts: list[int]
) -> None:
    assert read_heads(pieces(head, cuts)) == read_heads([head])


@given(st.binary(max_size=100))
def test_any_bytes_are_a_request_or_a_refusal(data: bytes) -> None:
    read_heads([data + b"\r\n\r\n"])


def test_a_head_is_taken_off_the_front_and_the_rest_stays() -> None:
    buffer = bytearray(
        raw(b"GET /a%20b?c=d+e HTTP/1.1", b"HOST: localhost", b"X-A:\t1 ", body=b"rest")
    )
    request = mizusync.parse_request(buffer, Settings())
    assert request is not None
    assert (request.method, request.target) == ("GET", "/a%20b?c=d+e")
    assert (request.path, request.query) == ("/a b", {"c": "d e"})
    assert request.headers == {"host": "localhost", "x-a": "1"}
    assert buffer == b"rest"


def test_half_a_head_is_none_and_stays_whole() -> None:
    buffer = bytearray(HEALTHZ[:-1])
    assert mizusync.parse_request(buffer, Settings()) is None
    assert buffer == HEALTHZ[:-1]


BAD_HEADS = {
    "no version": raw(b"GET /healthz", HOST),
    "two spaces": raw(b"GET  /healthz HTTP/1.1", HOST),
    "a space in the target": raw(b"GET /heal thz HTTP/1.1", HOST),
    "a space at the end": raw(b"GET /healthz HTTP/1.1 ", HOST),
    "a space at the start": raw(b" GET /healthz HTTP/1.1", HOST),
    "tabs for spaces": raw(b"GET\t/healthz\tHTTP/1.1", HOST),
    "a small http": raw(b"GET /healthz http/1.1", HOST),
    "no number": raw(b"GET /healthz HTTP/1.x", HOST),
    "a long number": raw(b"GET /healthz HTTP/1.11", HOST),
    "another script's number": raw("GET /healthz HTTP/1.\u0661".encode(), HOST),
    "a method of no token": raw(b"G(T /healthz HTTP/1.1", HOST),
    "no method": raw(b" /healthz HTTP/1.1", HOST),
    "a relative target": raw(b"GET healthz HTTP/1.1", HOST),
    "a fragment": get(b"/healthz#top"),
    "a control character in the target": raw(b"GET /heal\x01thz HTTP/1.1", HOST),
    "a bare CR in the target": get(b"/heal\rthz"),
    "a raw byte in the target": raw(b"GET /h\xe9althz HTTP/1.1", HOST),
    "a TLS hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "no host": raw(b"GET /healthz HTTP/1.1"),
    "a percent sign alone in the host": raw(
        b"GET /healthz HTTP/1.1", b"Host: %zz.localhost"
    ),
    "no address in brackets": raw(b"GET /healthz HTTP/1.1", b"Host: [:]"),
    "a port without a host": raw(b"GET /healthz HTTP/1.1", b"Host: :80"),
    "a whole address without a host": raw(b"GET http://:80/healthz HTTP/1.1", HOST),
    "two hosts": get(b"/healthz", HOST),
    "a host of two": raw(b"GET /healthz HTTP/1.1", b"Host: localhost, localhost"),
    "a host with a space": raw(b"GET /healthz HTTP/1.1", b"Host: local host"),
    "a host with a path": raw(b"GET /healthz HTTP/1.1", b"Host: localhost/"),
    "a host with a user": raw(b"GET /healthz HTTP/1.1", b"Host: me@localhost"),
    "a port of letters": raw(b"GET /healthz HTTP/1.1", b"Host: localhost:http"),
    "a space before the colon": get(b"/healthz", b"X-A : 1"),
    "a space before the name": raw(b"GET /healthz HTTP/1.1", b" X-A: 1", HOST),
    "a folded line": get(b"/healthz", b"X-A: 1", b" 2"),
    "a line folded by a tab": get(b"/healthz", b"X-A: 1", b"\t2"),
    "no colon": get(b"/healthz", b"X-A"),
    "no name": get(b"/healthz", b": 1"),
    "a name of no token": get(b"/healthz", b"X(A: 1"),
    "a name of another script": get(b"/healthz", b"X-\xc3\xa9: 1"),
    "a NUL in a value": get(b"/healthz", b"X-A: 1\x002"),
    "a bare CR in a value": get(b"/healthz", b"X-A: 1\r2"),
    "a vertical tab in a value": get(b"/healthz", b"X-A: 1\x0b"),
    "a DEL in a value": get(b"/healthz", b"X-A: \x7f"),
    "a bare LF": b"GET /healthz HTTP/1.1\r\nHost: localhost\nX-A: 1\r\n\r\n",
    "bare LFs alone": b"GET /healthz HTTP/1.1\nHost: localhost\n\n",
    "a bare LF at the end": b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\n",
}


@pytest.mark.parametrize("before", [b"", b"\r\n"])
def test_a_head_request_that_is_refused_unread_gets_no_body(
    visitor: RawClient, before: bytes
) -> None:
    visitor.send(before[:1])
    with closing(RawClient(visitor.address)) as other:
        assert (
            other.request("GET", "/healthz").status == 200
        )  # by now the first byte has arrived
    visitor.send(before[1:] + raw(b"HEAD /healthz#part HTTP/1.1", HOST))
    assert visitor.response(bodiless=True).status == 400
    assert visitor.ended()


@table("head", BAD_HEADS)
def test_a_malformed_head_is_refused_and_nothing_behind_it_is_read(
    visitor: RawClient, head: bytes
) -> None:
    visitor.send(head + HEALTHZ)
    assert refused(visitor.response(), 400)
    assert visitor.ended()


BAD_FRAMING = {
    "both": [LENGTH, CHUNKED],
    "both, the other way round": [CHUNKED, LENGTH],
    "two lengths": [LENGTH, b"Content-Length: 3"],
    "two lengths that agree": [LENGTH, LENGTH],
    "a list of lengths": [LENGTH + b", 3"],
    "a list that agrees": [b"%b, %d" % (LENGTH, len(BODY))],
    "a sign": [b"Content-Length: +%d" % len(BODY)],
    "a negative length": [b"Content-Length: -1"],
    "an underscore": [b"Content-Length: 2_9"],
    "a hex length": [b"Content-Length: 0x1d"],
    "no length": [b"Content-Length:"],
    "a fraction": [b"Content-Length: 29.0"],
    "an exponent": [b"Content-Length: 29e0"],
    "another script's digits": ["Content-Length: \u0662\u0669".encode()],
    "a superscript": ["Content-Length: \u00b2".encode()],
    "a space inside": [b"Content-Length: 2 9"],
    "a vertical tab": [LENGTH + b"\x0b"],
    "a no-break space": [LENGTH + b"\xa0"],
    "a space before the colon of a length": [b"Content-Length : %d" % len(BODY)],
    "chunked twice": [b"Transfer-Encoding: chunked, chunked"],
    "chunked in two fields": [CHUNKED, CHUNKED],
    "chunked, but not last": [b"Transfer-Encoding: chunked, gzip"],
    "identity": [b"Transfer-Encoding: identity"],
    "chunked and identity": [CHUNKED, b"Transfer-Encoding: identity"],
    "no coding": [b"Transfer-Encoding:"],
    "a coding like chunked": [b"Transfer-Encoding: xchunked"],
    "chunked with a parameter": [b"Transfer-Encoding: chunked;a=b"],
    "chunked in quotes": [b'Transfer-Encoding: "chunked"'],
    "chunked behind a vertical tab": [b"Transfer-Encoding: \x0bchunked"],
    "chunked before a no-break space": [b"Transfer-Encoding: chunked\xa0"],
    "a space before the colon of a coding": [b"Transfer-Encoding : chunked"],
    "a folded coding": [b"Transfer-Encoding:", b" chunked"],
}


@table("fields", BAD_FRAMING)
def test_a_body_that_two_parsers_could_read_differently_is_refused(
    visitor: RawClient, fields: list[bytes]
) -> None:
    coded = any(b"ransfer" in field for field in fields)
    body = chunked(BODY) if coded and fields[0] != LENGTH else BODY
    visitor.send(post(*fields, body=body + HEALTHZ))
    assert refused(visitor.response(), *([400, 501] if coded else [400]))
    assert visitor.ended()


def test_an_http_1_0_request_with_a_transfer_coding_is_refused(
    visitor: RawClient,
) -> None:
    visitor.send(post(CHUNKED, line=b"POST /sync/push HTTP/1.0", body=chunked(BODY)))
    assert refused(visitor.response(), 400)
    assert visitor.ended()


def test_a_transfer_coding_that_the_server_lacks_is_not_implemented(
    visitor: RawClient,
) -> None:
    visitor.send(post(b"Transfer-Encoding: gzip, chunked", body=chunked(BODY)))
    assert refused(visitor.response(), 501)
    assert visitor.ended()


@pytest.mark.parametrize("version", [b"HTTP/2.0", b"HTTP/3.1", b"HTTP/0.9"])
def test_another_version_is_refused(visitor: RawClient, version: bytes) -> None:
    visitor.send(raw(b"GET /healthz " + version, HOST))
    assert refused(visitor.response(), 505)
    assert visitor.ended()


def test_an_empty_line_before_a_request_is_skipped(client: RawClient) -> None:
    client.send(b"\r\n" + HEALTHZ)
    assert client.response().status == 200


def test_a_target_past_the_limit_is_too_long(visitor: RawClient) -> None:
    at_limit = b"/healthz?x=" + b"x" * (8 * 1024 - 11)
    visitor.send(raw(b"GET %b HTTP/1.1" % at_limit, HOST))
    assert visitor.response().status == 200
    visitor.send(raw(b"GET %bx HTTP/1.1" % at_limit, HOST))
    assert refused(visitor.response(), 414)
    assert visitor.ended()


def test_a_target_without_an_end_is_too_long(visitor: RawClient) -> None:
    visitor.send(b"GET /" + b"x" * 100_000)
    assert refused(visitor.response(), 414)


def test_a_head_past_its_bytes_is_too_large(visitor: RawClient) -> None:
    visitor.send(get(b"/healthz", b"X-A: " + b"x" * 64 * 1024))
    assert refused(visitor.response(), 431)
    assert visitor.ended()


def test_a_head_past_its_fields_is_too_large(visitor: RawClient) -> None:
    visitor.send(get(b"/healthz", *[b"X-A: 1"] * 99))
    assert visitor.response().status == 200
    visitor.send(get(b"/healthz", *[b"X-A: 1"] * 100))
    assert refused(visitor.response(), 431)


def test_a_head_that_comes_byte_by_byte_is_not_parsed_anew_for_each(
    server: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    parse, parsed = mizusync.parse_request, list[int]()

    def counting(buffer: bytearray, settings: Settings) -> Any:
        parsed.append(len(buffer))
        return parse(buffer, settings)

    monkeypatch.setattr(mizusync, "parse_request", counting)
    client, head = server.client(), get(b"/healthz", b"X-A: " + b"a" * 150)
    for at in range(len(head)):
        client.send(head[at : at + 1])
        server.call(lambda: None)  # so that it comes alone
    assert client.response().status == 200
    assert len(parsed) <= 2 + head.count(b"\n")


def test_a_head_that_comes_too_slowly_is_timed_out(tmp_path: Path) -> None:
    with serve(tmp_path, replace(SMALL, head_timeout=MOMENT)) as live:
        client = live.client()
        started = time.monotonic()
        client.send(b"GET /healthz HTTP/1.1\r\nX-A: ")
        while not select.select([client.sock], [], [], MOMENT / 10)[0]:
            assert time.monotonic() < started + PATIENCE
            client.send(b"a")  # each byte in time, the head never
        assert time.monotonic() - started > MOMENT * 0.9
        assert refused(client.response(), 408)


def test_a_body_that_comes_too_slowly_is_timed_out_and_never_applied(
    tmp_path: Path,
) -> None:
    with serve(tmp_path, replace(SMALL, body_timeout=MOMENT)) as live:
        client = live.client()
        client.send(post(LENGTH, body=BODY[:-1]))
        assert refused(client.response(), 408)
        assert client.ended()
        assert live.client().pull()["changes"] == []


def test_a_connection_without_a_request_is_closed_in_time(tmp_path: Path) -> None:
    with serve(tmp_path, replace(SMALL, idle_timeout=1.0, head_timeout=MOMENT)) as live:
        silent, idle = live.client(), live.client()
        assert idle.request("GET", "/healthz").status == 200
        assert idle.ended()
        with pytest.raises(EOFError):  # 408 may be said first
            silent.take(10_000)


def test_an_empty_line_after_a_body_begins_no_request(tmp_path: Path) -> None:
    settings = replace(SMALL, idle_timeout=1.0, head_timeout=MOMENT)
    with serve(tmp_path, settings) as live:
        client = live.client()
        client.send(post(LENGTH, body=BODY + b"\r\n"))
        assert client.response().status == 200
        client.send(b"\r\n")
        assert client.ended()  # at the end of its idle time, without a 408


def test_connections_are_kept_alive(client: RawClient) -> None:
    for _ in range(3):
        reply = client.request("GET", "/healthz")
        assert (reply.status, reply.headers.get("connection")) in (
            (200, None),
            (200, "keep-alive"),
        )


def test_a_request_that_says_close_is_the_last(client: RawClient) -> None:
    reply = client.request("GET", "/healthz", headers={"Connection": "X-A , CLOSE"})
    assert (reply.status, reply.headers["connection"]) == (200, "close")
    assert client.ended()


def test_pipelined_requests_are_answered_in_order(client: RawClient) -> None:
    push = post(LENGTH)
    wait = raw(b"GET /sync/pull?scope=other&wait=%f HTTP/1.1" % MOMENT, HOST)
    lost = get(b"/nowhere")
    client.send(wait + push + lost + HEALTHZ)
    assert client.response().json["changes"] == []
    assert client.response().json[0]["ok"]
    assert refused(client.response(), 404)
    assert client.response().json["status"] == "ok"


def test_the_body_of_a_get_is_not_the_next_request(client: RawClient) -> None:
    smuggled = get(b"/nowhere")
    client.send(get(b"/healthz", b"Content-Length: %d" % len(smuggled), body=smuggled))
    client.send(raw(b"DELETE /healthz HTTP/1.1", HOST))
    assert client.response().status == 200
    assert refused(client.response(), 405)


def test_a_body_in_chunks_is_read(client: RawClient) -> None:
    coding = b"TRANSFER-encoding:\tChunked "
    client.send(post(coding, body=chunked(BODY[:5], BODY[5:6], BODY[6:])) + HEALTHZ)
    assert client.response().json[0]["ok"]
    assert client.response().json["status"] == "ok"


def test_a_body_in_chunks_is_read_byte_by_byte(client: RawClient) -> None:
    for byte in post(CHUNKED, body=chunked(BODY)):
        client.send(bytes([byte]))
    assert client.response().json[0]["ok"]


def test_chunk_extensions_and_trailers_are_skipped(client: RawClient) -> None:
    body = chunked(BODY, trailer=b"X-Sum: 1\r\nX-More:\r\n").replace(
        b"\r\n", b';a=b; c="d e" ;f\r\n', 1
    )
    client.send(post(CHUNKED, body=body) + HEALTHZ)
    assert client.response().json[0]["ok"]
    assert client.response().json["status"] == "ok"


def test_a_trailer_is_no_header(visitor: RawClient) -> None:
    body = chunked(BODY, trailer=b"Content-Type: application/json\r\n")
    visitor.send(raw(PUSH, HOST, CHUNKED, body=body))
    assert refused(visitor.response(), 415)


SIZE = b"%x" % len(BODY)
BAD_CHUNKS = {
    "a space behind the size": SIZE + b" \r\n" + BODY + b"\r\n0\r\n\r\n",
    "an extension without a name": SIZE + b";\r\n" + BODY + b"\r\n0\r\n\r\n",
    "a sign": b"+" + SIZE + b"\r\n" + BODY + b"\r\n0\r\n\r\n",
    "a negative size": b"-1\r\n" + BODY + b"\r\n0\r\n\r\n",
    "a prefix": b"0x" + SIZE + b"\r\n" + BODY + b"\r\n0\r\n\r\n",
    "an underscore": b"0_" + SIZE + b"\r\n" + BODY + b"\r\n0\r\n\r\n",
    "no digit": b"\r\n" + BODY + b"\r\n0\r\n\r\n",
    "no hex digit": b"1g\r\n" + BODY + b"\r\n0\r\n\r\n",
    "another script's digits": "\u0661d\r\n".encode() + BODY + b"\r\n0\r\n\r\n",
    "a space before": b" " + SIZE + b"\r\n" + BODY + b"\r\n0\r\n\r\n",
    "a vertical tab": SIZE + b"\x0b\r\n" + BODY + b"\r\n0\r\n\r\n",
    "a size past 64 bits": b"1" + b"0" * 16 + b"\r\n" + BODY + b"\r\n0\r\n\r\n",
    "a size of a thousand digits": b"0" * 1000
    + SIZE
    + b"\r\n"
    + BODY
    + b"\r\n0\r\n\r\n",
    "an LF behind the size": SIZE + b"\n" + BODY + b"\r\n0\r\n\r\n",
    "a CR in the extension": SIZE + b";a\rb\r\n" + BODY + b"\r\n0\r\n\r\n",
    "an LF in the extension": SIZE + b";a\nb\r\n" + BODY + b"\r\n0\r\n\r\n",
    "a NUL in the extension": SIZE + b";a\0\r\n" + BODY + b"\r\n0\r\n\r\n",
    "an extension without an end": SIZE
    + b";"
    + b"a" * 200_000
    + b"\r\n"
    + BODY
    + b"\r\n0\r\n\r\n",
    "data that is too long": SIZE + b"\r\n" + BODY + b"!\r\n0\r\n\r\n",
    "an LF behind the data": SIZE + b"\r\n" + BODY + b"\n0\r\n\r\n",
    "no line behind the data": SIZE + b"\r\n" + BODY + b"0\r\n\r\n",
    "a trailer with a space before the colon": chunked(BODY, trailer=b"X-A : 1\r\n"),
    "a folded trailer": chunked(BODY, trailer=b"X-A: 1\r\n 2\r\n"),
    "a trailer without a colon": chunked(BODY, trailer=b"X-A\r\n"),
    "a trailer that ends in LF": chunked(BODY, trailer=b"X-A: 1\n"),
    "a trailer past its bytes": chunked(
        BODY, trailer=b"X-A: " + b"a" * 200_000 + b"\r\n"
    ),
    "trailers past their number": chunked(BODY, trailer=b"X-A: 1\r\n" * 20_000),
}


@table("body", BAD_CHUNKS)
def test_a_broken_chunk_is_refused_and_nothing_behind_it_is_read(
    visitor: RawClient, body: bytes
) -> None:
    visitor.send(post(CHUNKED, body=body + HEALTHZ))
    assert refused(visitor.response(), 400, 413, 431)
    assert visitor.ended()


@table(
    "sent",
    {
        "less than the length": post(b"Content-Length: 99"),
        "no last chunk": post(CHUNKED, body=chunked(BODY)[:-5]),
        "no end of the trailers": post(CHUNKED, body=chunked(BODY)[:-2]),
    },
)
def test_a_body_that_did_not_arrive_whole_is_never_applied(
    visitor: RawClient, sent: bytes
) -> None:
    visitor.send(sent)
    visitor.half_close()
    with pytest.raises(EOFError):  # 400 may be said first
        visitor.take(10_000)
    assert b"200 OK" not in visitor.buffer


def test_the_end_of_what_a_client_sends_is_not_the_end_of_its_answer(
    client: RawClient,
) -> None:
    client.send(post(LENGTH))
    client.half_close()
    assert client.response().json[0]["ok"]
    assert client.ended()


def test_a_body_is_asked_for_where_the_client_expects_it(client: RawClient) -> None:
    client.send(post(LENGTH, b"Expect: 100-Continue", body=b""))
    assert client.response() == Reply(100, {}, b"")
    client.send(BODY)
    assert client.response().json[0]["ok"]


def test_a_body_that_would_be_refused_is_not_asked_for(visitor: RawClient) -> None:
    visitor.send(post(b"Content-Length: 1048577", b"Expect: 100-continue", body=b""))
    assert refused(visitor.response(), 413)
    assert visitor.ended()


def test_http_1_0_is_answered_and_closed_and_never_told_to_continue(
    client: RawClient,
) -> None:
    client.send(post(LENGTH, b"Expect: 100-continue", line=b"POST /sync/push HTTP/1.0"))
    assert client.response().json[0]["ok"]
    assert client.ended()


def test_http_1_0_is_kept_alive_if_both_say_so(client: RawClient) -> None:
    for _ in range(2):
        client.send(raw(b"GET /healthz HTTP/1.0", HOST, b"Connection: Keep-Alive"))
        reply = client.response()
        assert (reply.status, reply.headers["connection"].lower()) == (
            200,
            "keep-alive",
        )


def test_a_target_may_be_a_whole_address(client: RawClient) -> None:
    here = "http://{}:{}".format(*client.address)
    assert client.request("GET", f"{here}/healthz").json["status"] == "ok"
    assert client.request("GET", f"{here}/sync/pull?cursor=0").json["changes"] == []


@pytest.mark.parametrize(
    "target", ["/healthz", "/sync/pull?scope=a", "/sync/snapshot", "/nowhere"]
)
def test_head_is_get_without_its_body(visitor: RawClient, target: str) -> None:
    got, head = visitor.request("GET", target), visitor.request("HEAD", target)
    for name in ("content-length", "content-type", "cache-control"):
        assert head.headers[name] == got.headers[name]
    assert (head.status, head.body) == (got.status, b"")
    assert visitor.request("GET", "/healthz").status == 200


@table(
    "case",
    {
        "push": ("/sync/push", {"POST", "OPTIONS"}),
        "pull": ("/sync/pull", {"GET", "HEAD", "OPTIONS"}),
        "snapshot": ("/sync/snapshot", {"GET", "HEAD", "OPTIONS"}),
        "healthz": ("/healthz", {"GET", "HEAD", "OPTIONS"}),
    },
)
def test_allow_names_what_an_endpoint_can(
    visitor: RawClient, case: tuple[str, set[str]]
) -> None:
    target, methods = case
    options, delete = (
        visitor.request("OPTIONS", target),
        visitor.request("DELETE", target),
    )
    assert options.status == 204
    assert refused(delete, 405)
    for reply in (options, delete):
        assert set(reply.headers["allow"].replace(" ", "").split(",")) == methods


def test_options_of_the_server_itself_are_answered(client: RawClient) -> None:
    reply = client.request("OPTIONS", "*")
    assert (reply.status, "GET" in reply.headers["allow"]) == (204, True)


@pytest.mark.parametrize(
    "line", [b"CONNECT localhost:80", b"GET *", b"TRACE /healthz", b"BREW /"]
)
def test_a_method_that_nobody_serves_is_refused(
    visitor: RawClient, line: bytes
) -> None:
    visitor.send(raw(line + b" HTTP/1.1", HOST))
    assert refused(visitor.response(), 400, 405, 404)


def test_every_answer_has_a_date_a_length_and_no_store(client: RawClient) -> None:
    for target in (
        "/sync/pull",
        "/sync/snapshot",
        "/healthz",
        "/nowhere",
        "/sync/pull?limit=x",
    ):
        headers = client.request("GET", target).headers
        assert headers["cache-control"] == "no-store"
        assert re.fullmatch(
            r"\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT", headers["date"]
        )
        said = email.utils.parsedate_to_datetime(headers["date"]).timestamp()
        assert abs(time.time() - said) < PATIENCE


def test_a_body_past_the_limit_is_too_large_and_the_answer_is_heard(
    client: RawClient,
) -> None:
    length = b"Content-Length: %d" % (3 * 2**20)
    client.send(post(length, body=b" " * (3 * 2**20)))  # all of it, before reading
    assert refused(client.response(), 413)
    assert client.ended()


def test_a_body_of_the_limit_is_taken(client: RawClient) -> None:
    body = BODY + b" " * (2**20 - len(BODY))
    reply = client.request("POST", "/sync/push", body)
    assert reply.json[0]["ok"]


def test_chunks_past_the_limit_are_too_large(client: RawClient) -> None:
    body = chunked(*[b" " * 2**16] * 17)
    client.send(post(CHUNKED, body=body))
    assert refused(client.response(), 413)
    assert client.ended()


@pytest.mark.parametrize(
    "kind",
    [
        "",
        "text/plain",
        "application/x-www-form-urlencoded",
        "application/jsonp",
        "json",
    ],
)
def test_push_wants_json(visitor: RawClient, kind: str) -> None:
    reply = visitor.request("POST", "/sync/push", BODY, {"Content-Type": kind})
    assert refused(reply, 415)


@pytest.mark.parametrize(
    "kind", ["APPLICATION/Json", "application/json; charset=utf-8"]
)
def test_push_takes_json_however_it_is_spelt(client: RawClient, kind: str) -> None:
    assert (
        client.request("POST", "/sync/push", BODY, {"Content-Type": kind}).status == 200
    )


def mutation_with(args: bytes) -> bytes:
    return b'[{"id": "a", "name": "note", "args": %b}]' % args


BAD_JSON = {  # and all that parse_json refuses
    "nothing": b"",
    "an open bracket": b"[",
    "two values": BODY + BODY,
    "NaN": mutation_with(b"NaN"),
    "half a surrogate pair": mutation_with(b'"\\ud800"'),
    "bad UTF-8": mutation_with(b'"\xff"'),
    "UTF-16": BODY.decode().encode("utf-16-le"),
    "65 levels": mutation_with(b"[" * 63 + b"]" * 63),
    "90,000 levels": mutation_with(b"[" * 90_000 + b"]" * 90_000),
    "levels without an end": b"[" * 90_000,
    "a number past a double": mutation_with(b"1" * 310),
    "no array": BODY[1:-1],
    "an object": b"{}",
    "a string": b'"[]"',
    "null": b"null",
    "no mutation": b"[]",
}


@table("body", BAD_JSON)
def test_a_push_that_is_no_json_array_of_mutations_is_refused(
    visitor: RawClient, body: bytes
) -> None:
    assert refused(visitor.request("POST", "/sync/push", body), 400)


@table(
    "body",
    {
        "a megabyte of lists": b"[]" * 2**19,
        "a megabyte of brackets": b"[" * 2**20,
        "a list in a mutation": mutation_with(b"[0%b]" % (b",0" * 100_000)),
    },
)
def test_a_push_of_more_values_than_the_limit_is_too_large(
    visitor: RawClient, body: bytes
) -> None:
    assert refused(visitor.request("POST", "/sync/push", body), 413)
    assert visitor.request("GET", "/healthz").status == 200


def test_values_past_the_limit_are_too_large_in_a_push_a_message_and_a_route(
    tmp_path: Path,
) -> None:
    def echo(request: mizusync.Request) -> Any:
        return request.json

    def prepare(server: Server) -> None:
        server.route("POST", "/echo")(echo)

    with serve(tmp_path, replace(SMALL, max_json_values=5), prepare=prepare) as live:
        client, session = live.client(), live.socket()
        for args, fits in (([], True), ([1, 2], False)):
            body = json.dumps([note("a", args)]).encode()
            assert client.request("POST", "/sync/push", body).status == (
                200 if fits else 413
            )
        session.say("chat", [1, 2, 3, 4])
        assert session.read_json()["data"]["code"] == "too_large"
        session.say("chat", [1, 2])
        assert session.read_json()["data"]["code"] == "unknown_topic"
        assert refused(
            client.request("POST", "/echo", b"[0%b]" % (b",0" * 100_000)), 413
        )


def test_a_number_beyond_64_bits_is_pushed_and_pulled_as_a_float(
    client: RawClient,
) -> None:
    body = mutation_with(b"[100000000000000000000, -18446744073709551616, 1]")
    (result,) = client.request("POST", "/sync/push", body).json
    assert result["ok"]
    assert [change["data"] for change in client.pull()["changes"]] == [
        [1e20, -(2.0**64), 1]
    ]


def test_json_comes_back_as_it_was(client: RawClient) -> None:
    written = [
        *(
            b"[" * 62 + b"]" * 62,
            b'"' + b"[{" * 100 + b'"',
            b'"\\"' + b"[" * 100 + b'\\\\"',
        ),
        *(b'"\\ud83d\\ude00 \xf0\x9f\x98\x80"', b'"\\u0000"', b'"\\u2028\\u2029"'),
        *(b"9007199254740991", b"-0.5e-3", b'{"a": 1, "a": 2}'),
    ]
    mutations = [
        b'{"id": "%d", "name": "note", "args": %b}' % one for one in enumerate(written)
    ]
    results = client.request("POST", "/sync/push", b"[%b]" % b",".join(mutations)).json
    changes = [change for result in results for change in result["changes"]]
    assert [change["data"] for change in changes] == [
        json.loads(args) for args in written
    ]
    assert client.pull()["changes"] == changes


def test_of_duplicate_keys_the_last_one_counts(client: RawClient) -> None:
    body = b'[{"id": "a", "id": "b", "name": "note", "args": 1, "args": 2}]'
    assert client.request("POST", "/sync/push", body).json[0]["changes"][0]["data"] == 2
    assert "duplicate" not in client.push(note("a"))[0]
    assert client.push(note("b"))[0]["duplicate"]


def test_push_answers_one_result_per_mutation_in_order(client: RawClient) -> None:
    results = client.push(
        note("a", 1), {"id": "b", "name": "refuse", "args": "conflict"}, note("c", 3)
    )
    assert [result["ok"] for result in results] == [True, False, True]
    assert [list(result) for result in results] == [
        ["ok", "cursor", "changes"],
        ["ok", "code", "error"],
        ["ok", "cursor", "changes"],
    ]
    assert results[0]["cursor"] < results[2]["cursor"]


def test_a_change_has_its_four_fields(client: RawClient) -> None:
    (result,) = client.push(note("a", {"x": [1, None, "\u00e9"]}, scope="list"))
    (change,) = result["changes"]
    assert list(change) == ["cursor", "scope", "time", "data"]
    assert (change["cursor"], change["scope"]) == (result["cursor"], "list")
    assert change["data"] == {"x": [1, None, "\u00e9"]}
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|\+00:00)", change["time"]
    )


def test_the_scope_is_default_when_none_is_named(client: RawClient) -> None:
    assert client.push(note("a"))[0]["changes"][0]["scope"] == "_default"
    assert client.push(note("a", scope="_default"))[0]["duplicate"]
    assert client.pull()["changes"] == client.pull(scope="_default")["changes"] != []


def test_refusals_of_apply_are_told_and_fail_alone(client: RawClient) -> None:
    refusing = [{"id": code, "name": "refuse", "args": code} for code in REFUSALS]
    before, *failed, after = client.push(note("a"), *refusing, note("c"))
    reason = "a reason for people"
    assert failed == [{"ok": False, "code": code, "error": reason} for code in REFUSALS]
    assert (before["ok"], after["ok"]) == (True, True)


def test_a_fault_of_apply_is_an_internal_error_that_tells_nothing(
    server: Live, client: RawClient
) -> None:
    failed, after = client.push({"id": "a", "name": "crash"}, note("b"))
    assert (failed["ok"], failed["code"], after["ok"]) == (
        False,
        "internal_error",
        True,
    )
    assert "secret" not in failed["error"]
    server.logged("a secret of the inside")


def test_malformed_mutations_among_good_ones_fail_alone(client: RawClient) -> None:
    bad = [
        None,
        1,
        [note("a")],
        {},
        {"name": "note"},
        note(""),
        note("x" * 129),
        {"id": "a"},
    ]
    bad += [
        {"id": None, "name": "note"},
        {"id": "a", "name": ["note"]},
        note("a", scope=""),
    ]
    before, *failed, after = client.push(note("one"), *bad, note("two"))
    assert [result["code"] for result in failed] == ["invalid_mutation"] * len(bad)
    assert {tuple(result) for result in failed} == {("ok", "code", "error")}
    assert (before["ok"], after["ok"]) == (True, True)


def test_unknown_fields_are_ignored(client: RawClient) -> None:
    assert client.push(note("a", client="me", seq=1))[0]["ok"]
    assert len(client.pull(colour="red")["changes"]) == 1


def test_a_push_of_a_hundred_is_taken_and_of_more_is_too_large(
    client: RawClient,
) -> None:
    many = [note(f"n{number}") for number in range(101)]
    assert refused(client.request("POST", "/sync/push", json.dumps(many).encode()), 413)
    assert client.pull()["changes"] == []
    assert all(result["ok"] for result in client.push(*many[:100]))


def test_pull_gives_the_changes_of_one_scope_above_the_cursor(
    client: RawClient,
) -> None:
    one, _, three = client.push(note("a", 1), note("b", 2, scope="other"), note("c", 3))
    page = client.pull()
    assert list(page) == ["changes", "cursor", "epoch", "hasMore"]
    assert page["changes"] == one["changes"] + three["changes"]
    assert (page["cursor"], page["hasMore"]) == (three["cursor"], False)
    assert (
        client.pull(cursor=one["cursor"], epoch=page["epoch"])["changes"]
        == three["changes"]
    )


def test_pull_gives_at_most_the_limit_and_says_whether_there_is_more(
    client: RawClient,
) -> None:
    client.push(*(note(f"n{number}", number) for number in range(5)))
    cursor, found = 0, []
    for more in (True, True, False):
        page = client.pull(cursor=cursor, limit=2)
        assert page["hasMore"] is more
        cursor = page["cursor"]
        found += [change["data"] for change in page["changes"]]
    assert found == [0, 1, 2, 3, 4]


def test_a_page_has_100_changes_unasked_and_1000_at_most(client: RawClient) -> None:
    client.push(
        *({"id": f"n{number}", "name": "notes", "args": 20} for number in range(51))
    )
    assert len(client.pull()["changes"]) == 100
    assert len(client.pull(limit=1001)["changes"]) == 1000
    assert client.pull(limit=5000)["hasMore"]


def test_a_pull_that_waits_is_answered_by_a_push(
    server: Live, client: RawClient
) -> None:
    client.send(get(b"/sync/pull?wait=60&scope=s"))
    server.client().push(note("a", scope="other"))
    (result,) = server.client().push(note("b", scope="s"))
    assert client.response().json["changes"] == result["changes"]


def test_a_pull_that_waits_does_not_where_there_are_changes(client: RawClient) -> None:
    client.push(note("a"))
    assert len(client.pull(wait=1000)["changes"]) == 1


def test_a_pull_that_waits_ends_with_its_time(client: RawClient) -> None:
    started = time.monotonic()
    page = client.pull(wait=MOMENT)
    assert page["changes"] == []
    assert MOMENT * 0.9 < time.monotonic() - started < PATIENCE / 2


def test_a_wait_past_the_limit_is_taken_as_the_limit(tmp_path: Path) -> None:
    with serve(tmp_path, replace(SMALL, max_pull_wait=MOMENT)) as live:
        assert live.client().pull(wait=60)["changes"] == []


def test_a_client_that_gives_up_waiting_is_forgotten(server: Live) -> None:
    before = server.tasks()
    client = server.client()
    client.send(get(b"/sync/pull?wait=60"))
    until(lambda: server.tasks() > before)
    client.reset()
    until(lambda: server.tasks() <= before)


BAD_NUMBERS = (
    "%2B1 1_0 %D9%A3 %C2%B2 -1 -0 %201 1%20 1%0B +1 0x1 1e1 null nan inf 1.2.3 ."
)
BAD_ESCAPES = "%zz % %4 a%FF %ED%A0%80 %C0%AF"
BAD_QUERIES = {
    *(
        f"{name}={value}"
        for name in ("cursor", "limit", "wait")
        for value in ["", *BAD_NUMBERS.split()]
    ),
    *(f"cursor={value}" for value in ("1.5", 2**53, "9" * 30, "9" * 5000)),
    *("limit=0", "limit=1.5", "limit=ten"),
    *(f"scope={scope}" for scope in ["", "x" * 257, *BAD_ESCAPES.split()]),
    *(
        "scope=a&scope=a",
        "scope=a&cursor=0&scope=b",
        "scope=a&%73cope=b",
        "cursor=0&cursor=0",
    ),
    *("limit=1&limit=2", "wait=0&wait=0", "epoch=&epoch="),
}


@table("query", {f"{query:.40}": query for query in sorted(BAD_QUERIES)})
def test_a_malformed_parameter_is_refused(visitor: RawClient, query: str) -> None:
    assert refused(visitor.request("GET", f"/sync/pull?{query}"), 400)
    assert visitor.request("GET", "/healthz").status == 200


@table(
    "case",
    {
        "a cursor": (get(b"/sync/pull?cursor=9007199254740992"), {"cursor"}),
        "a limit": (get(b"/sync/pull?limit=0"), {"limit"}),
        "two lengths": (post(LENGTH, CHUNKED), {"transfer-encoding", "content-length"}),
        "HTTP/1.0": (
            post(CHUNKED, line=b"POST /sync/push HTTP/1.0"),
            {"transfer-encoding", "http/1.0"},
        ),
    },
)
def test_a_refusal_names_what_is_wrong_and_nothing_else(
    visitor: RawClient, case: tuple[bytes, set[str]]
) -> None:
    sent, named = case
    visitor.send(sent)
    assert refused(reply := visitor.response(), 400)
    about = r"cursor|limit|transfer-encoding|content-length|http/1\.0"
    assert set(re.findall(about, reply.json["error"].lower())) == named


@table(
    "case",
    {
        "a plus": ("a+b", "a b"),
        "a percent-encoded space": ("a%20b", "a b"),
        "a percent-encoded plus": ("a%2bb", "a+b"),
        "UTF-8": ("%C3%A9%F0%9F%98%80", "\u00e9\U0001f600"),
        "a slash and a question mark": ("a/b?c", "a/b?c"),
        "a percent-encoded ampersand": ("a%26b%3Dc", "a&b=c"),
        "an equals sign": ("a=b", "a=b"),
        "encoded once": ("%2541", "%41"),
    },
)
def test_parameters_are_read_as_forms_write_them(case: tuple[str, str]) -> None:
    written, scope = case
    buffer = bytearray(get(b"/sync/pull?scope=%b" % written.encode()))
    request = mizusync.parse_request(buffer, Settings())
    assert request is not None
    assert request.query == {"scope": scope}


@pytest.mark.parametrize(
    "query",
    [
        "cursor=0",
        "cursor=000",
        "wait=0",
        "wait=0.05",
        "wait=0.15000000000000002",
        "epoch=",
        "limit=9999",
    ],
)
def test_a_good_parameter_is_taken(visitor: RawClient, query: str) -> None:
    assert visitor.request("GET", f"/sync/pull?{query}").status == 200


def test_an_epoch_that_is_not_known_makes_the_cursor_unknown(client: RawClient) -> None:
    (result,) = client.push(note("a"))
    reply = client.request("GET", f"/sync/pull?cursor={result['cursor']}&epoch=another")
    assert refused(reply, 410, code="cursor_unknown")
    assert client.pull(cursor=result["cursor"], epoch="")["changes"] == []


def test_a_cursor_before_a_trim_is_too_old_also_0(
    server: Live, client: RawClient
) -> None:
    cursors = [client.push(note(f"n{number}"))[0]["cursor"] for number in range(4)]
    epoch = client.pull()["epoch"]
    assert server.call(server.engine.trim, "_default", cursors[2]) == 2
    for cursor in (0, cursors[0]):
        for query in (
            f"cursor={cursor}",
            f"cursor={cursor}&epoch={epoch}",
            f"cursor={cursor}&wait=9",
        ):
            assert refused(
                client.request("GET", f"/sync/pull?{query}"), 410, code="cursor_too_old"
            )
    assert len(client.pull(cursor=cursors[1], epoch=epoch)["changes"]) == 2
    assert client.pull(scope="other")["changes"] == []


def test_a_snapshot_is_the_state_at_a_cursor(client: RawClient) -> None:
    client.push(
        note("a", 1, scope="s"), note("b", 2, scope="other"), note("c", 3, scope="s")
    )
    taken = client.request("GET", "/sync/snapshot?scope=s").json
    assert list(taken) == ["data", "cursor", "epoch"]
    assert taken["data"] == [1, 3]
    client.push(note("d", 4, scope="s"))
    page = client.pull(scope="s", cursor=taken["cursor"], epoch=taken["epoch"])
    assert [change["data"] for change in page["changes"]] == [4]


def test_without_a_snapshot_function_a_snapshot_is_not_found(tmp_path: Path) -> None:
    with serve(tmp_path, snapshot=None) as live:
        assert refused(live.client().request("GET", "/sync/snapshot"), 404)


@pytest.mark.parametrize("query", ["scope=", "scope=a&scope=a", "scope=%zz"])
def test_a_snapshot_of_a_malformed_scope_is_refused(
    visitor: RawClient, query: str
) -> None:
    assert refused(visitor.request("GET", f"/sync/snapshot?{query}"), 400)


@pytest.mark.parametrize(
    "fault", [RuntimeError, StopIteration, SystemExit, KeyboardInterrupt]
)
def test_a_fault_of_the_snapshot_function_is_an_internal_error_that_tells_nothing(
    tmp_path: Path, fault: type[BaseException]
) -> None:
    def broken(db: sqlite3.Connection, scope: str) -> Any:
        raise fault("a secret of the inside")

    with serve(tmp_path, snapshot=broken) as live:
        client = live.client()
        reply = client.request("GET", "/sync/snapshot")
        assert refused(reply, 500)
        assert b"secret" not in reply.body
        assert client.request("GET", "/healthz").status == 200
        live.logged("a secret of the inside")


def test_healthz_tells_how_the_server_is(server: Live, client: RawClient) -> None:
    (result,) = client.push(note("a", scope="s"))
    server.socket()
    health = client.request("GET", "/healthz").json
    assert health == {
        "status": "ok",
        "version": mizusync.__version__,
        "cursor": result["cursor"],
        "epoch": client.pull()["epoch"],
        "sessions": 1,
    }
    assert list(health) == ["status", "version", "cursor", "epoch", "sessions"]


GZIP = {
    "gzip": True,
    "br, GZIP ;q=0.5": True,
    "gzip;q=1.000, *;q=0": True,
    "gzip;q=0.001": True,
    "": False,
    "gzip;q=0": False,
    "gzip;q=0.000": False,
    "br": False,
    "gzipped": False,
    "identity": False,
}


def test_large_answers_are_compressed_for_who_accepts_gzip(tmp_path: Path) -> None:
    with serve(tmp_path, page=PROGRAM.with_name("demo.html")) as live:
        client = live.client()
        client.push(note("a", "x" * 20_000))
        for target in (
            "/sync/pull",
            "/sync/snapshot",
            "/",
            "/sync/pull?cursor=1",
            "/healthz",
        ):
            plain = client.request("GET", target)
            assert "content-encoding" not in plain.headers
            for codings, accepted in GZIP.items():
                accepting = {"Accept-Encoding": codings}
                answer = client.request("GET", target, headers=accepting)
                if not accepted or len(plain.body) <= 16 * 1024:
                    assert answer.body == plain.body
                    assert "content-encoding" not in answer.headers
                    continue
                assert answer.headers["content-encoding"] == "gzip"
                assert len(answer.body) < len(plain.body) / 2
                assert gzip.decompress(answer.body) == plain.body
                head = client.request("HEAD", target, headers=accepting)
                assert head.headers["content-length"] == str(len(answer.body))


def test_an_unknown_path_is_not_found(visitor: RawClient) -> None:
    for target in (
        "/nowhere",
        "/sync/push/",
        "/sync",
        "//healthz",
        "/SYNC/PULL",
        "/healthz/../x",
    ):
        assert refused(visitor.request("GET", target), 404)
    assert refused(visitor.request("POST", "/nowhere", b"{}"), 404)


def test_what_the_writer_has_no_room_for_is_unavailable_and_not_applied(
    tmp_path: Path,
) -> None:
    entered, release = threading.Event(), threading.Event()
    slow = stalled(entered, release)
    with serve(tmp_path, replace(SMALL, max_pending_pushes=1), apply=slow) as live:
        clients = [live.client() for _ in range(4)]
        try:
            for number, client in enumerate(clients):
                body = json.dumps([note(f"n{number}")]).encode()
                client.send(post(b"Content-Length: %d" % len(body), body=body))
                assert entered.wait(PATIENCE)
            assert refused(clients[-1].response(), 503)
        finally:
            release.set()
        assert clients[0].response().json[0]["ok"]
        assert "n3" not in [
            change["data"] for change in live.client().pull()["changes"]
        ]


def test_a_database_that_was_taken_away_is_unavailable(tmp_path: Path) -> None:
    with serve(tmp_path, may_log=".") as live:
        client = live.client()
        client.push(note("a"))
        for file in tmp_path.glob("log.db*"):
            file.unlink()
        until(lambda: client.request("POST", "/sync/push", BODY).status == 503)
        assert refused(client.request("POST", "/sync/push", BODY), 503)
        assert refused(client.request("GET", "/healthz"), 503)


@table(
    "case",
    {  # RFC 9112 §6.3, §3.2, §9.3; RFC 9110 §8.6, §4.2.1, §4.2.4; RFC 6455 §11.3
        "a coding that is not chunked": (400, post(b"Transfer-Encoding: gzip")),
        "chunked, but not last": (400, post(b"Transfer-Encoding: chunked, gzip")),
        "a length past 64 bits": (400, post(b"Content-Length: 99999999999999999999")),
        "an address without a host": (400, get(b"http:///healthz")),
        "an address with a port alone": (400, get(b"http://:80/healthz")),
        "an address with a user": (400, get(b"http://me@localhost/healthz")),
        "a host with half an escape": (
            400,
            get(b"/healthz", host=b"Host: localhost%4"),
        ),
        "a host with half a bracket": (400, get(b"/healthz", host=b"Host: [::1")),
        "two versions of WebSocket": (400, get(b"/ws", VERSION, VERSION)),
        "a body that nobody wants": (404, post(LENGTH, line=b"POST /nowhere HTTP/1.1")),
        "a body for another host": (403, post(LENGTH, host=EVIL)),
        "a body that is not asked for": (
            403,
            post(LENGTH, b"Expect: 100-continue", host=EVIL),
        ),
    },
)
def test_a_refusal_has_its_status_and_nothing_behind_it_is_read(
    visitor: RawClient, case: tuple[int, bytes]
) -> None:
    visitor.send(case[1] + HEALTHZ)
    reply = visitor.response()
    assert refused(reply, case[0])
    assert reply.headers["connection"] == "close"  # RFC 9112 §9.6
    assert visitor.ended()


@table(
    "sent",
    {  # RFC 9112 §3.2.2; RFC 9110 §2.5, §4.2.3, §5.6.1, §7.8
        "a whole address beside another host": get(
            b"http://localhost/healthz", host=EVIL
        ),
        "a scheme and a host in capitals": get(b"HTTP://LOCALHOST/healthz"),
        "a later minor version": raw(b"GET /healthz HTTP/1.9", HOST),
        "a port without digits": get(b"/healthz", host=b"Host: localhost:"),
        "an upgrade that nobody serves": get(
            b"/healthz", b"Connection: Upgrade", b"Upgrade: h2c"
        ),
        "lists with empty elements": get(b"/healthz", b"Connection: , ,x-a,"),
    },
)
def test_what_a_server_has_to_take_is_taken(visitor: RawClient, sent: bytes) -> None:
    visitor.send(sent + HEALTHZ)
    assert [visitor.response().status for _ in range(2)] == [200, 200]


def test_a_method_in_another_case_is_another_method(visitor: RawClient) -> None:
    assert refused(visitor.request("get", "/healthz"), 405, 501)  # RFC 9110 §9.1


@pytest.mark.parametrize(
    "last", [get(b"/healthz", b"Connection: , close"), raw(b"GET /healthz HTTP/1.0")]
)
def test_a_push_behind_the_last_request_is_never_applied(
    visitor: RawClient, last: bytes
) -> None:
    visitor.send(last + post(LENGTH))  # RFC 9112 §9.6; the fixture pulls
    assert visitor.response().status == 200
    assert visitor.ended()


def test_the_refusal_of_a_head_has_no_content(visitor: RawClient) -> None:
    visitor.send(raw(b"HEAD /healthz HTTP/1.1", HOST, b"Content-Length: 1048577"))
    assert visitor.response(bodiless=True).status == 413  # RFC 9110 §9.3.2
    assert visitor.ended()


def test_a_body_in_chunks_is_asked_for_where_the_client_expects_it(
    client: RawClient,
) -> None:
    client.send(post(CHUNKED, b"Expect: 100-continue", body=b""))
    assert client.response().status == 100
    client.send(chunked(BODY))
    assert client.response().json[0]["ok"]


def answering(**response: Any) -> Callable[[Server], None]:
    def prepare(server: Server) -> None:
        server.route("GET", "/it")(lambda request: mizusync.Response(**response))

    return prepare


@pytest.mark.parametrize("status", [204, 304])
def test_an_answer_that_can_have_no_content_has_none(
    tmp_path: Path, status: int
) -> None:
    with serve(tmp_path, prepare=answering(status=status, body=b"content")) as live:
        client = live.client()
        client.send(get(b"/it") + HEALTHZ)
        reply = (
            client.response()
        )  # RFC 9112 §6.3; which also looks for a Content-Length
        assert (reply.status, "date" in reply.headers) == (status, True)
        assert client.response().json["status"] == "ok"


def test_a_hostile_weight_takes_time_by_its_size_alone() -> None:
    head = get(b"/", b"Accept-Encoding: gzip;q=0." + b"1" * 60_000 + b"x")
    request = mizusync.parse_request(bytearray(head), Settings())
    assert request is not None
    started = time.process_time()
    assert not request.takes_gzip
    assert (
        time.process_time() - started < PATIENCE / 4
    )  # as the square of the size it took 19 s


@pytest.mark.parametrize("origins", [[], ["https://app.example"]])
def test_a_compressed_answer_is_not_for_every_cache(
    tmp_path: Path, origins: list[str]
) -> None:
    route = answering(body=b" " * 20_000, headers={"Cache-Control": "max-age=60"})
    with serve(tmp_path, prepare=route, allow_origin=origins) as live:
        reply = live.client().request("GET", "/it", headers={"Accept-Encoding": "gzip"})
    varies = ["Origin"] * len(origins) + ["Accept-Encoding"]  # RFC 9110 §12.5.5
    assert reply.headers["content-encoding"] == "gzip"
    assert reply.headers["vary"].split(", ") == varies


def test_nothing_of_a_request_comes_back_in_a_header(visitor: RawClient) -> None:
    mark = "reflected"
    names = (
        "Origin",
        "Cookie",
        "Accept",
        "X-Request-Id",
        "Access-Control-Request-Headers",
    )
    fields = dict.fromkeys(names, mark) | {"Sec-WebSocket-Protocol": mark}
    for method in ("GET", "OPTIONS", "DELETE", mark):
        for target in (
            f"/{mark}",
            f"/healthz?{mark}=%0d%0a{mark}:",
            f"/sync/pull?scope={mark}",
        ):
            for headers in (
                fields,
                {name: mark for name in fields if name != "Origin"},
            ):
                reply = visitor.request(method, target, headers=headers)
                assert mark not in str(reply.headers).lower()


# --- WebSocket ------------------------------------------------------------------------
# RFC 6455 §4 to §8: again the parser alone, then the handshake, then frames over a
# socket.

UPGRADE = [b"Connection: Upgrade", b"Upgrade: websocket", VERSION]

frames = st.builds(
    Frame,
    st.sampled_from([0, 1, 2]),
    st.binary(max_size=200) | st.binary(min_size=126),
    st.booleans(),
) | st.builds(
    Frame, st.sampled_from([CLOSE, PING, PONG]), st.binary(max_size=125), st.just(True)
)


def read_frames(parts: Iterable[bytes], max_payload: int = 2**20) -> list[Any]:
    """The frames in these bytes, and the code of the close that ended them, if one
    did."""
    buffer, found = bytearray(), list[Any]()
    try:
        for part in parts:
            buffer += part
            while (
                frame := mizusync.parse_frame(buffer, max_payload=max_payload)
            ) is not None:
                found.append(Frame(int(frame.opcode), bytes(frame.payload), frame.fin))
    except mizusync.ProtocolError as error:
        found.append(int(error.code))
    return found


@given(st.lists(frames, max_size=4), st.lists(st.integers(0, 900), max_size=9))
def test_frames_read_the_same_however_the_bytes_arrive(
    sent: list[Frame], cuts: list[int]
) -> None:
    assert read_frames(pieces(b"".join(masked(*frame) for frame in sent), cuts)) == sent


@given(
    st.lists(frames, min_size=1, max_size=3),
    st.lists(
        st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=5
    ),
    st.lists(st.integers(0, 900), max_size=5),
)
@settings(max_examples=200)
def test_spoiled_frames_are_frames_or_a_close_however_they_arrive(
    sent: list[Frame], spoilt: list[tuple[int, int]], cuts: list[int]
) -> None:
    data = bytearray(b"".join(masked(*frame) for frame in sent))
    for at, byte in spoilt:
        data[at % len(data)] = byte
    found = read_frames(pieces(bytes(data), cuts), max_payload=300)
    assert found == read_frames([bytes(data)], max_payload=300)
    assert not found or isinstance(found[-1], Frame) or found[-1] in (1002, 1009)


BAD_FRAMES = {
    "no mask": (b"\x81\x02hi", 1002),
    "RSV1": (masked(TEXT, b"hi", rsv=4), 1002),
    "RSV2": (masked(TEXT, b"hi", rsv=2), 1002),
    "RSV3": (masked(PING, b"hi", rsv=1), 1002),
    "a reserved opcode": (masked(3, b"hi"), 1002),
    "another reserved opcode": (masked(7, b"hi"), 1002),
    "a reserved control opcode": (masked(11, b"hi"), 1002),
    "another reserved control opcode": (masked(15, b"hi"), 1002),
    "a long ping": (masked(PING, b"x" * 126), 1002),
    "a long close": (masked(CLOSE, b"\x03\xe8" + b"x" * 124), 1002),
    "a ping in fragments": (masked(PING, b"hi", fin=False), 1002),
    "two bytes for a short length": (b"\x81\xfe\x00\x02abcdhi", 1002),
    "eight bytes for a short length": (
        b"\x81\xff" + bytes(6) + b"\x00\x02abcdhi",
        1002,
    ),
    "a length past 63 bits": (b"\x81\xff\x80" + bytes(7) + b"abcd", 1002),
    "a length past the limit": (b"\x81\xff" + (2**20 + 1).to_bytes(8, "big"), 1009),
    "a huge length": (b"\x81\xff\x7f" + b"\xff" * 7, 1009),
}


@table("case", BAD_FRAMES)
def test_a_frame_that_breaks_the_rules_closes_with_its_code(
    visitor: RawClient, case: tuple[bytes, int]
) -> None:
    data, code = case
    assert read_frames([data]) == [code]
    assert visitor.upgrade().status == 101
    visitor.send(data)
    assert visitor.read_close() == code


@pytest.mark.parametrize("size", [0, 125, 126, 65535, 65536])
def test_the_servers_frames_are_not_masked_and_no_longer_than_need_be(
    size: int,
) -> None:
    ours, theirs = socket.socketpair()
    with ours, closing(RawClient.__new__(RawClient)) as client:
        client.sock, client.buffer = theirs, bytearray()
        ours.sendall(mizusync.encode_frame(BINARY, b"x" * size))
        assert client.read_frame() == Frame(BINARY, b"x" * size)


def test_the_handshake_answers_the_key(client: RawClient) -> None:
    reply = client.upgrade()
    assert reply.status == 101
    assert reply.headers["upgrade"].lower() == "websocket"
    assert reply.headers["connection"].lower() == "upgrade"
    assert reply.headers["sec-websocket-accept"] == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
    assert not {
        "sec-websocket-extensions",
        "content-length",
        "transfer-encoding",
    } & set(reply.headers)


@table(
    "fields",
    {
        "lists and other cases": {
            "Connection": "keep-alive, UPGRADE",
            "Upgrade": "h2c, WebSocket",
        },
        "an extension": {
            "Sec-WebSocket-Extensions": "permessage-deflate; client_max_window_bits"
        },
        "its own origin": {
            "Origin": "http://localhost:{port}",
            "Host": "localhost:{port}",
        },
    },
)
def test_a_handshake_that_is_good_is_taken(
    visitor: RawClient, fields: dict[str, str]
) -> None:
    port = visitor.address[1]
    reply = visitor.upgrade(
        headers={name: value.format(port=port) for name, value in fields.items()}
    )
    assert (reply.status, reply.headers.get("sec-websocket-extensions")) == (101, None)
    assert visitor.quiet()


@table(
    "fields",
    {
        "no upgrade": {"Upgrade": "", "Connection": "keep-alive"},
        "another upgrade": {"Upgrade": "h2c"},
        "another version": {"Sec-WebSocket-Version": "8"},
    },
)
def test_ws_wants_an_upgrade_to_version_13(
    visitor: RawClient, fields: dict[str, str]
) -> None:
    reply = visitor.upgrade(headers=fields)
    assert refused(reply, 426)
    assert reply.headers["upgrade"].lower() == "websocket"
    assert "upgrade" in reply.headers["connection"].lower()  # RFC 9110 §7.8
    if "Sec-WebSocket-Version" in fields:
        assert reply.headers["sec-websocket-version"] == "13"  # RFC 6455 §4.4


@pytest.mark.parametrize("target", ["/ws", "/ws?scope=s"])
def test_ws_without_an_upgrade_is_refused(visitor: RawClient, target: str) -> None:
    assert refused(visitor.request("GET", target), 426)


@pytest.mark.parametrize(
    "key", ["", "short", "x" * 24, "dGhlIHNhbXBsZQ==", "dGhlIHNhbXBsZSBub25j*Q=="]
)
def test_a_bad_key_is_refused(visitor: RawClient, key: str) -> None:
    assert refused(visitor.upgrade(headers={"Sec-WebSocket-Key": key}), 400)


@table(
    "lines",
    {
        "no key": [b"GET /ws HTTP/1.1"],
        "two keys": [b"GET /ws HTTP/1.1", KEY, KEY],
        "a post": [b"POST /ws HTTP/1.1", KEY],
        "HTTP/1.0": [b"GET /ws HTTP/1.0", KEY],
        "a malformed scope": [b"GET /ws?scope= HTTP/1.1", KEY],
        "two scopes": [b"GET /ws?scope=a&scope=b HTTP/1.1", KEY],
    },
)
def test_a_handshake_that_breaks_the_rules_is_refused(
    visitor: RawClient, lines: list[bytes]
) -> None:
    visitor.send(raw(*lines, HOST, *UPGRADE))
    assert refused(visitor.response(), 400, 405, 426)


def test_bytes_that_came_with_the_handshake_belong_to_the_websocket(
    client: RawClient,
) -> None:
    subscribe = masked(TEXT, b'{"topic": "subscribe", "data": {}}')
    client.send(get(b"/ws", KEY, *UPGRADE) + subscribe + masked(PING, b"!"))
    assert client.response().status == 101
    assert client.read_json() == {"topic": "sync:_default", "data": {"cursor": 0}}
    assert client.read_frame() == Frame(PONG, b"!")


def test_a_message_may_come_in_fragments_with_pings_in_between(server: Live) -> None:
    client = server.socket()
    message = json.dumps(
        {"topic": "subscribe", "data": {"scope": "\u00e9"}}, ensure_ascii=False
    )
    first, *others = pieces(message.encode(), range(1, 99))  # also inside the é
    client.send_frame(TEXT, first, fin=False)
    for piece in others:
        client.send_frame(0, piece, fin=False)
        client.send_frame(PING, piece)
        assert client.read_frame() == Frame(PONG, piece)
    client.send_frame(0, b"", fin=True)
    assert client.read_json()["topic"] == "sync:\u00e9"


def test_pings_are_answered_and_pongs_are_not(server: Live) -> None:
    client = server.socket()
    client.send_frame(PONG, b"unasked")
    for payload in (b"", b"hi", bytes(range(125))):
        client.send_frame(PING, payload)
        assert client.read_frame() == Frame(PONG, payload)


@table(
    "case",
    {
        "a continuation of nothing": ([masked(0, b"hi")], 1002),
        "a message inside another": (
            [masked(TEXT, b"hi", False), masked(TEXT, b"hi")],
            1002,
        ),
        "a binary message": ([masked(BINARY, b"{}")], 1003),
        "a binary message in fragments": (
            [masked(BINARY, b"{}", False), masked(0, b"")],
            1003,
        ),
        "bad UTF-8": ([masked(TEXT, b"\xff")], 1007),
        "a surrogate": ([masked(TEXT, b"\xed\xa0\x80")], 1007),
        "a cut character": ([masked(TEXT, b"\xc3")], 1007),
        "bad UTF-8 in a first fragment": ([masked(TEXT, b"a\xc0\xafb", False)], 1007),
        "bad UTF-8 over a border": (
            [masked(TEXT, b"\xf4", False), masked(0, b"\x90", False)],
            1007,
        ),
        "too much at once": ([masked(TEXT, b" " * (2**20 + 1))], 1009),
        "too much in fragments": (
            [
                masked(TEXT, b" " * 2**19, False),
                masked(0, b" " * 2**19, False),
                masked(0, b" "),
            ],
            1009,
        ),
    },
)
def test_a_message_that_breaks_the_rules_closes_with_its_code(
    visitor: RawClient, case: tuple[list[bytes], int]
) -> None:
    assert visitor.upgrade().status == 101
    for data in case[0]:
        visitor.send(data)
    assert visitor.read_close() == case[1]


@pytest.mark.parametrize("code", [1000, 1001, 1003, 1007, 1011, 3000, 4999])
def test_a_close_is_answered_and_the_connection_ends(
    visitor: RawClient, code: int
) -> None:
    assert visitor.upgrade().status == 101
    visitor.send_frame(CLOSE, code.to_bytes(2, "big") + "f\u00fcr immer".encode())
    visitor.send_frame(PING, b"after the close")
    frame = visitor.read_frame()
    assert frame.opcode == CLOSE
    assert int.from_bytes(frame.payload[:2], "big") in (1000, code)
    assert visitor.ended()


def test_a_close_without_a_code_is_answered(visitor: RawClient) -> None:
    assert visitor.upgrade().status == 101
    visitor.send_frame(CLOSE, b"")
    assert visitor.read_frame() in (Frame(CLOSE, b""), Frame(CLOSE, b"\x03\xe8"))
    assert visitor.ended()


BAD_CLOSES = {
    str(code): code.to_bytes(2, "big")
    for code in (0, 999, 1004, 1005, 1006, 1015, 1016)
}
BAD_CLOSES |= {
    str(code): code.to_bytes(2, "big") for code in (1100, 2000, 2999, 5000, 65535)
}


@table("payload", BAD_CLOSES | {"one byte": b"\x03", "bad UTF-8": b"\x03\xe8\xff"})
def test_a_bad_close_is_a_protocol_error(visitor: RawClient, payload: bytes) -> None:
    assert visitor.upgrade().status == 101
    visitor.send_frame(CLOSE, payload)
    assert visitor.read_close() in (1002, 1007 if len(payload) == 3 else 1002)


def test_a_client_that_does_not_answer_a_close_is_not_waited_for(
    tmp_path: Path,
) -> None:
    with serve(tmp_path, replace(SMALL, close_timeout=MOMENT)) as live:
        client = live.socket()
        client.send_frame(BINARY, b"")
        assert client.read_frame().payload[:2] == b"\x03\xeb"
        assert client.ended()


def test_the_server_pings_and_keeps_who_answers(tmp_path: Path) -> None:
    with serve(
        tmp_path, replace(SMALL, ping_interval=MOMENT / 4, ping_timeout=MOMENT * 8)
    ) as live:
        client, started = live.socket(), time.monotonic()
        while time.monotonic() < started + MOMENT * 10:
            frame = client.read_frame()
            assert frame.opcode == PING
            client.send_frame(PONG, frame.payload)
        client.say("subscribe", {})
        assert client.read_json()["data"] == {"cursor": 0}


def test_a_session_that_answers_no_ping_is_dropped(tmp_path: Path) -> None:
    with serve(
        tmp_path, replace(SMALL, ping_interval=MOMENT / 3, ping_timeout=MOMENT)
    ) as live:
        client = live.socket()
        assert client.read_frame().opcode == PING
        until(lambda: live.client().request("GET", "/healthz").json["sessions"] == 0)
        with pytest.raises((EOFError, ConnectionError)):
            client.take(10_000)


def test_pings_of_a_client_that_does_not_read_are_not_all_kept(tmp_path: Path) -> None:
    with serve(tmp_path, replace(SMALL, send_buffer=4096)) as live:
        client = live.socket(receive_buffer=4096)
        client.sock.settimeout(MOMENT * 2)

        def flood() -> None:
            for _ in range(400):
                client.send(masked(PING, b"x" * 125) * 500)

        with pytest.raises(
            (TimeoutError, ConnectionError)
        ):  # it is not read from any more
            flood()


def test_fragments_of_nothing_take_no_memory() -> None:
    assembler, nothing = mizusync.Assembler(1000), mizusync.Frame(0, b"", fin=False)
    assembler.add(mizusync.Frame(TEXT, b"", fin=False))
    tracemalloc.start()
    try:
        for _ in range(20_000):
            assert assembler.add(nothing) is None
        assert (
            tracemalloc.get_traced_memory()[0] < 80_000
        )  # a list of them takes twice that
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("offer", "answer"),
    [
        ("chat", None),
        ("MIZUSYNC", None),
        ("chat, mizusync", "mizusync"),
        (",mizusync,", "mizusync"),
    ],
)
def test_the_subprotocol_is_one_that_was_offered(
    visitor: RawClient, offer: str, answer: str | None
) -> None:
    reply = visitor.upgrade(
        headers={"Sec-WebSocket-Protocol": offer}
    )  # RFC 6455 §4.2.2
    assert (reply.status, reply.headers.get("sec-websocket-protocol")) == (101, answer)


@pytest.mark.parametrize("opcode", [3, 4, 5, 6, 7, 11, 12, 13, 14, 15])
def test_every_reserved_opcode_is_a_protocol_error(opcode: int) -> None:
    assert read_frames([masked(opcode, b"")]) == [1002]


@table(
    "case",
    {
        "it was said": (masked(BINARY, b""), 1003),
        "a broken frame": (
            masked(3, b"") + masked(PING, b"x") + masked(TEXT, b"{}"),
            1002,
        ),
        "inside a message": (
            masked(TEXT, b"{", False) + masked(CLOSE, b"\x03\xe8"),
            1000,
        ),
    },
)
def test_after_a_close_there_is_no_hint_and_no_pong(
    server: Live, case: tuple[bytes, int]
) -> None:
    client = server.socket()
    client.subscribe()
    client.send(case[0])
    frame = client.read_frame()
    assert (frame.opcode, frame.payload[:2]) == (CLOSE, case[1].to_bytes(2, "big"))
    server.client().push(note("a"))
    client.send(masked(PING, b"x") + masked(CLOSE, b"\x03\xe8"))
    assert client.ended()  # RFC 6455 §5.5.1, §7.1.7


def close(session: mizusync.Session, topic: str, data: Any) -> None:
    session.close(*data)


def test_a_long_reason_is_cut_between_characters(tmp_path: Path) -> None:
    with serve(tmp_path, on_message=close) as live:
        client = live.socket()
        client.say("close", [4000, "\u00e9" * 200])
        assert client.read_frame() == Frame(
            CLOSE, b"\x0f\xa0" + b"\xc3\xa9" * 61
        )  # §5.5


def test_a_code_that_may_not_be_sent_is_a_fault_of_the_application(
    tmp_path: Path,
) -> None:
    with serve(tmp_path, on_message=close) as live:
        client = live.socket()
        for code in (0, 999, 1004, 1006, 1015, 2000, 5000, 70000):
            client.say("close", [code, ""])
            live.logged("Traceback")  # RFC 6455 §7.4
            assert client.quiet()


# --- Live -----------------------------------------------------------------------------
# What a session is told: hints, never late, never going down; and what an application
# may add.


def test_subscribe_answers_the_current_cursor_at_once(server: Live) -> None:
    (result,) = server.client().push(note("a", scope="s"))
    server.client().push(note("b", scope="other"))
    client = server.socket("/ws?scope=s")
    assert client.subscribe() == {
        "topic": "sync:s",
        "data": {"cursor": result["cursor"]},
    }


def test_the_current_cursor_is_0_before_the_first_change(server: Live) -> None:
    server.client().push(note("b", scope="other"))
    assert server.socket().subscribe() == {
        "topic": "sync:_default",
        "data": {"cursor": 0},
    }


def test_a_trim_does_not_lower_the_current_cursor(server: Live) -> None:
    (result,) = server.client().push(note("a"))
    server.call(server.engine.trim, "_default", result["cursor"] + 1)
    assert server.socket().subscribe()["data"] == {"cursor": result["cursor"]}


def test_a_push_is_hinted_and_a_pull_sees_it(server: Live) -> None:
    client = server.socket("/ws?scope=caf%C3%A9")
    client.subscribe()
    (result,) = server.client().push(note("a", scope="caf\u00e9"))
    assert client.read_json() == {
        "topic": "sync:caf\u00e9",
        "data": {"cursor": result["cursor"]},
    }
    assert server.client().pull(scope="caf\u00e9")["changes"] == result["changes"]


def test_a_session_may_subscribe_to_another_scope(server: Live) -> None:
    client = server.socket("/ws?scope=one")
    assert client.subscribe(scope="two")["topic"] == "sync:two"
    server.client().push(note("a", scope="one"))  # nobody asked for it
    (result,) = server.client().push(note("b", scope="two"))
    assert client.read_json() == {
        "topic": "sync:two",
        "data": {"cursor": result["cursor"]},
    }


def test_a_change_in_another_scope_is_hinted_there(server: Live) -> None:
    client = server.socket()
    client.subscribe(scope="two")
    (result,) = server.client().push(
        {"id": "a", "name": "share", "args": ["one", "two", "one"]}
    )
    assert client.read_json()["data"] == {"cursor": result["cursor"] - 1}


def test_a_session_that_unsubscribed_hears_no_more(server: Live) -> None:
    client, witness = server.socket(), server.socket()
    for one in (client, witness):
        one.subscribe()
        one.subscribe(scope="two")
    client.say("unsubscribe", {})
    client.say("unsubscribe", {"scope": "two"})
    assert client.quiet()
    server.client().push(note("a"), note("b", scope="two"))
    assert {witness.read_json()["topic"] for _ in range(2)} == {
        "sync:_default",
        "sync:two",
    }
    assert client.quiet()


def test_a_session_that_did_not_subscribe_hears_nothing(server: Live) -> None:
    client, witness = server.socket(), server.socket()
    witness.subscribe()
    server.client().push(note("a"))
    witness.read_json()
    assert client.quiet()


def test_hints_carry_the_changes_for_who_asked(server: Live) -> None:
    plain, client = server.socket(), server.socket()
    plain.subscribe()
    assert client.subscribe(changes=True)["data"]["cursor"] == 0
    (result,) = server.client().push(note("a", {"x": "\u00e9"}))
    hint = client.read_json()
    assert list(hint) == ["topic", "data"]
    assert list(hint["data"]) == ["cursor", "epoch", "after", "changes"]
    assert hint["data"]["changes"] == result["changes"]
    assert hint["data"]["cursor"] == result["cursor"] > hint["data"]["after"] >= 0
    assert hint["data"]["epoch"] == server.client().pull()["epoch"]
    assert plain.read_json()["data"] == {"cursor": result["cursor"]}


def test_hints_with_changes_and_pulls_where_they_lack_give_the_whole_log(
    server: Live,
) -> None:
    client, pusher = server.socket(), server.client()
    cursor, found, epoch = 0, list[Any](), server.client().pull()["epoch"]
    client.subscribe(changes=True)
    for number in range(60):
        (result,) = pusher.push({"id": str(number), "name": "notes", "args": number})
    while cursor < result["cursor"]:
        hint = client.read_json()["data"]
        if hint.get("after", 2**53) > cursor or hint["epoch"] != epoch:
            hint = server.client().pull(cursor=cursor, epoch=epoch, limit=1000)
        found += [change for change in hint["changes"] if change["cursor"] > cursor]
        cursor, epoch = max(cursor, hint["cursor"]), hint.get("epoch", epoch)
    log = whole_log(server.engine)
    assert found == log
    assert len(log) == sum(range(60))


@table(
    "args",
    {"too many": {"name": "notes", "args": 33}, "too large": {"args": "x" * 2**14}},
)
def test_a_hint_of_a_large_commit_comes_without_its_changes(
    server: Live, args: dict[str, Any]
) -> None:
    client = server.socket()
    client.subscribe(changes=True)
    (result,) = server.client().push(note("a") | args)
    assert client.read_json()["data"] == {"cursor": result["cursor"]}


def test_the_last_subscribe_decides_whether_hints_carry_changes(server: Live) -> None:
    client = server.socket()
    client.subscribe(changes=True)
    client.subscribe(changes=False)
    (result,) = server.client().push(note("a"))
    assert client.read_json()["data"] == {"cursor": result["cursor"]}
    client.subscribe(changes=True)
    server.client().push(note("b"))
    assert "changes" in client.read_json()["data"]


def test_cursors_of_a_topic_never_go_down(server: Live) -> None:
    client, pusher = server.socket(), server.client()
    cursors = [client.subscribe()["data"]["cursor"]]
    for number in range(50):
        (result,) = pusher.push(note(str(number)))
        client.say("subscribe", {"changes": number % 2 == 0})
    while cursors[-1] < result["cursor"]:
        cursors.append(client.read_json()["data"]["cursor"])
    assert cursors == sorted(cursors)


def test_a_commit_of_another_process_is_hinted_and_ends_a_wait(
    server: Live, tmp_path: Path
) -> None:
    live, waiting = server.socket(), server.client()
    live.subscribe()
    waiting.send(get(b"/sync/pull?wait=60"))
    with closing(Engine(tmp_path / "log.db", apply=apply, schema=SCHEMA)) as other:
        (result,) = other.submit([Mutation("a", "note", 7)]).result(PATIENCE)
    assert live.read_json()["data"]["cursor"] == result.cursor
    assert waiting.response().json["changes"][0]["data"] == 7


def test_the_newest_cursor_is_sent_again_after_silence(tmp_path: Path) -> None:
    with serve(tmp_path, replace(SMALL, heartbeat=MOMENT)) as live:
        (result,) = live.client().push(note("a"))
        client, started = live.socket(), time.monotonic()
        hint = client.subscribe()
        assert client.read_json() == client.read_json() == hint
        assert hint["data"] == {"cursor": result["cursor"]}
        assert time.monotonic() - started > MOMENT * 1.5


def test_a_slow_reader_is_kept_and_gets_the_newest_cursor(tmp_path: Path) -> None:
    with serve(tmp_path, replace(SMALL, send_buffer=4096)) as live:
        client, pusher = live.socket(receive_buffer=4096), live.client()
        client.subscribe(changes=True)
        for number in range(100):
            (result,) = pusher.push(note(str(number), "x" * 12_000))
        size, cursor = 0, 0
        while cursor < result["cursor"]:
            hint = client.read_json()["data"]
            size, cursor = size + len(json.dumps(hint)), hint["cursor"]
        assert size < 600_000  # of 1,200,000: what it did not read was merged
        (result,) = pusher.push(note("after"))
        assert client.read_json()["data"]["cursor"] == result["cursor"]


@contextmanager
def joined(
    folder: Path, settings: Settings = SMALL, **options: Any
) -> Iterator[tuple[Live, Any]]:
    """A server whose sessions follow the topic `news` once they said `join`, and how to
    do so."""
    came: list[mizusync.Session] = []

    def on_message(session: mizusync.Session, topic: str, data: Any) -> None:
        came.append(session)

    with serve(folder, settings, on_message=on_message, **options) as live:

        def join(client: RawClient) -> mizusync.Session:
            number = len(came)
            client.say("join")
            until(lambda: len(came) > number)
            live.call(live.server.subscribe, came[-1], "news")
            return came[-1]

        yield live, join


def test_a_topic_of_the_application_is_heard_by_who_follows_it(tmp_path: Path) -> None:
    with joined(tmp_path) as (live, join):
        member, guest = live.socket(), live.socket()
        session = join(member)
        live.call(live.server.publish, "news", {"n": [1, "\u00e9"]})
        assert member.read_json() == {"topic": "news", "data": {"n": [1, "\u00e9"]}}
        live.call(live.server.unsubscribe, session, "news")
        live.call(live.server.publish, "news", 2)
        assert member.quiet()
        assert guest.quiet()


def test_a_reader_too_slow_for_what_may_not_be_merged_is_closed(tmp_path: Path) -> None:
    small = replace(
        SMALL, send_buffer=4096, max_session_queue=2**15, close_timeout=PATIENCE
    )
    with joined(tmp_path, small) as (live, join):
        slow, quick = live.socket(receive_buffer=4096), live.socket()
        join(slow)
        join(quick)
        for number in range(500):
            live.call(live.server.publish, "news", [number, "x" * 2000])
            assert quick.read_json()["data"][0] == number
        assert slow.read_close() == 1013
        until(lambda: live.client().request("GET", "/healthz").json["sessions"] == 1)


def test_a_session_that_has_ended_can_not_be_subscribed(tmp_path: Path) -> None:
    with joined(tmp_path) as (live, join):
        client = live.socket()
        session = join(client)
        client.close()
        until(lambda: not live.server.sessions)
        live.call(live.server.subscribe, session, "news")
        assert (session.topics, live.server.hub.topics) == ({}, {})


def test_an_older_copy_restored_under_a_session_sends_it_away_to_come_back(
    tmp_path: Path,
) -> None:
    with serve(tmp_path, may_log="walresetbug") as live:
        client, deaf = live.client(), live.socket()
        client.push(note("a"))
        backup = back_up(tmp_path / "log.db")
        client.push(note("b"), note("c"))
        late = client.pull()
        assert deaf.subscribe()["data"] == {"cursor": 3}
        restore(tmp_path / "log.db", backup)
        assert (
            deaf.read_frame().payload[:2] == b"\x03\xe9"
        )  # 1001, which it does not answer
        session = live.socket()
        assert session.subscribe()["data"] == {"cursor": 1}
        query = f"cursor={late['cursor']}&epoch={late['epoch']}"
        for key in ("d", "e", "f"):  # past the old cursor
            reply = client.request("GET", f"/sync/pull?{query}")
            assert refused(reply, 410, code="cursor_unknown")
            (result,) = client.push(note(key))
            assert session.read_json()["data"] == {"cursor": result["cursor"]}


def test_a_follower_of_another_transport_that_fails_or_leaves_ends_no_heartbeat(
    tmp_path: Path,
) -> None:
    class Broken(Follower):
        def hint(self, topic: str, cursor: int, message: bytes) -> None:
            self.heard.append(topic)
            if len(self.heard) > 2:
                for name in ("sync:a", "sync:b"):
                    live.server.hub.unsubscribe(name, self)
                raise ConnectionError("gone")

    def follow() -> None:
        broken = Broken()
        for name in ("sync:a", "sync:b"):
            live.server.hub.subscribe(name, broken)
            live.server.hub.tell(name, broken, 1)

    with serve(tmp_path, replace(SMALL, heartbeat=MOMENT)) as live:
        live.call(follow)
        until(lambda: not live.server.hub.topics)
        live.logged("gone")
        client = live.socket()
        assert client.subscribe() == client.read_json() == client.read_json()


def test_topics_of_scopes_are_not_the_applications_to_publish(server: Live) -> None:
    with pytest.raises(ValueError, match="sync:"):
        server.call(server.server.publish, "sync:_default", {"cursor": 7})


@pytest.mark.parametrize("topic", ["news", "sync:_default", "sync:", "", "Subscribe"])
def test_a_topic_that_nobody_serves_is_unknown(visitor: RawClient, topic: str) -> None:
    assert visitor.upgrade().status == 101
    visitor.say(topic, {"cursor": 1})
    answer = visitor.read_json()
    assert (answer["topic"], answer["data"]["code"]) == ("error", "unknown_topic")
    assert list(answer["data"]) == ["code", "error"]
    assert visitor.subscribe()["topic"] == "sync:_default"


def test_topics_of_scopes_are_refused_before_the_application_sees_them(
    tmp_path: Path,
) -> None:
    with joined(tmp_path) as (live, join):
        client = live.socket()
        client.say("sync:_default", {"cursor": 1})
        assert client.read_json()["data"]["code"] == "unknown_topic"
        join(client)  # which would find the other message first


BAD_MESSAGES = {
    "nothing": b"",
    "no JSON": b"hello",
    "a list": b"[]",
    "a number": b"1",
    "null": b"null",
    "no topic": b'{"data": {}}',
    "a topic of no string": b'{"topic": 1, "data": {}}',
    "a topic of null": b'{"topic": null}',
    "NaN": b'{"topic": "x", "data": NaN}',
    "a number that becomes infinite": b'{"topic": "x", "data": 1e400}',
    "a lone surrogate": b'{"topic": "\\ud800", "data": 1}',
    "65 levels": b'{"topic": "x", "data": ' + b"[" * 64 + b"]" * 64 + b"}",
    "90,000 levels": b'{"topic": "x", "data": ' + b"[" * 90_000 + b"]" * 90_000 + b"}",
    "5,000 digits": b'{"topic": "x", "data": ' + b"9" * 5000 + b"}",
    "an empty scope": b'{"topic": "subscribe", "data": {"scope": ""}}',
    "a scope of 257": b'{"topic": "subscribe", "data": {"scope": "%b"}}' % (b"x" * 257),
    "a scope of no string": b'{"topic": "subscribe", "data": {"scope": 7}}',
    "an empty scope to leave": b'{"topic": "unsubscribe", "data": {"scope": ""}}',
}


@table("message", BAD_MESSAGES)
def test_an_invalid_message_is_answered_and_the_session_goes_on(
    visitor: RawClient, message: bytes
) -> None:
    assert visitor.upgrade().status == 101
    visitor.send_frame(TEXT, message)
    answer = visitor.read_json()
    assert list(answer) == ["topic", "data"]
    assert (answer["topic"], answer["data"]["code"]) == ("error", "invalid_message")
    assert isinstance(answer["data"]["error"], str)
    assert visitor.subscribe() == {"topic": "sync:_default", "data": {"cursor": 0}}


def test_unknown_fields_of_a_message_are_ignored(server: Live) -> None:
    client = server.socket()
    client.send_frame(TEXT, b'{"ref": 1, "topic": "subscribe", "data": {"since": 3}}')
    assert client.read_json()["topic"] == "sync:_default"


def test_more_topics_than_a_session_may_have_are_too_large(tmp_path: Path) -> None:
    with serve(tmp_path, replace(SMALL, max_session_topics=2)) as live:
        client = live.socket()
        assert client.subscribe()["topic"] == "sync:_default"
        assert client.subscribe(scope="two")["topic"] == "sync:two"
        assert client.subscribe(scope="three")["data"]["code"] == "too_large"
        assert client.subscribe(scope="two")["topic"] == "sync:two"  # one that it has
        client.say("unsubscribe", {"scope": "two"})
        assert client.subscribe(scope="three")["topic"] == "sync:three"


@pytest.mark.parametrize("waits", [False, True])
def test_other_topics_are_the_applications(tmp_path: Path, waits: bool) -> None:
    def at_once(session: mizusync.Session, topic: str, data: Any) -> None:
        session.send("answer", [session.scope, topic, data])

    async def later(session: mizusync.Session, topic: str, data: Any) -> None:
        await asyncio.sleep(0)
        at_once(session, topic, data)

    with serve(tmp_path, on_message=later if waits else at_once) as live:
        client = live.socket("/ws?scope=s")
        for number in range(3):
            client.say("hello", number)
        for number in range(3):
            assert client.read_json() == {
                "topic": "answer",
                "data": ["s", "hello", number],
            }
        assert client.subscribe()["topic"] == "sync:s"


@pytest.mark.parametrize("waits", [False, True])
def test_a_fault_of_on_message_is_logged_and_hurts_nobody(
    tmp_path: Path, waits: bool
) -> None:
    def broken(session: mizusync.Session, topic: str, data: Any) -> None:
        raise RuntimeError("a secret of the inside")

    async def broken_later(session: mizusync.Session, topic: str, data: Any) -> None:
        broken(session, topic, data)

    with serve(tmp_path, on_message=broken_later if waits else broken) as live:
        client = live.socket()
        client.say("hello")
        client.say("subscribe", {})
        answers = [client.read_json()]
        if (
            answers[-1]["topic"] == "error"
        ):  # it may say that something went wrong, but not what
            answers.append(client.read_json())
        assert "secret" not in str(answers)
        assert answers[-1]["topic"] == "sync:_default"
        live.logged("a secret of the inside")


def test_an_on_message_that_never_returns_keeps_no_session_whose_peer_has_gone(
    tmp_path: Path,
) -> None:
    entered, release = list[asyncio.Event](), asyncio.Event()

    async def hang(session: mizusync.Session, topic: str, data: Any) -> None:
        entered.append(release)
        await release.wait()

    quick = replace(
        SMALL, ping_interval=MOMENT, ping_timeout=MOMENT, close_timeout=MOMENT
    )
    with serve(tmp_path, quick, on_message=hang) as live:
        for leave in (RawClient.close, RawClient.reset):
            client, before = live.socket(), len(entered)
            client.subscribe()
            client.say("hello")
            until(lambda: len(entered) > before)  # noqa: B023
            leave(client)
        until(lambda: not live.server.sessions and not live.server.hub.topics)
        live.call(release.set)


def test_messages_are_handled_one_at_a_time_also_when_their_sender_is_gone(
    tmp_path: Path,
) -> None:
    handled, at_once, closed = list[int](), list[int](), threading.Event()

    async def slowly(session: mizusync.Session, topic: str, data: Any) -> None:
        at_once.append(len(at_once) - len(handled))
        await asyncio.sleep(0.01)
        handled.append(data)

    with serve(tmp_path, on_message=slowly, on_close=lambda *_: closed.set()) as live:
        client = live.socket()
        client.send(
            b"".join(masked(TEXT, b'{"topic":"t","data":%d}' % n) for n in range(12))
        )
        until(lambda: handled)
        client.reset()
        assert closed.wait(PATIENCE)
        assert handled == list(range(len(handled)))
        assert set(at_once) == {0}


def test_who_gives_up_waiting_for_a_message_loses_none(tmp_path: Path) -> None:
    got = list[Any]()

    async def impatient(websocket: Any) -> None:
        while not websocket.over:
            with suppress(TimeoutError):
                async with asyncio.timeout(0):
                    got.append(await websocket.receive())
            got.append(await websocket.receive())

    with serve(
        tmp_path, prepare=lambda server: server.websocket("/raw")(impatient)
    ) as live:
        client = live.socket("/raw")
        client.send(b"".join(masked(TEXT, b"%d" % n) for n in range(50)))
        client.send_frame(CLOSE, b"\x03\xe8")
        client.read_close()
    assert [message for message in got if message is not None] == list(
        map(str, range(50))
    )


@pytest.mark.parametrize("error", [asyncio.CancelledError, SystemExit])
def test_an_on_message_that_was_cancelled_ends_no_session(
    tmp_path: Path, error: type[BaseException]
) -> None:
    async def on_message(session: mizusync.Session, topic: str, data: Any) -> None:
        raise error

    with serve(tmp_path, on_message=on_message) as live:
        client = live.socket()
        client.say("hello")
        client.say("hello")
        assert client.subscribe()["topic"] == "sync:_default"
        live.logged("on_message failed")


@table(
    "leave",
    {
        "a close": lambda client: client.send_frame(CLOSE, b"\x03\xe8"),
        "an end without a close": lambda client: client.half_close(),
        "a reset": lambda client: client.reset(),
        "a broken rule": lambda client: client.send_frame(3, b""),
    },
)
def test_on_close_is_called_once_with_the_session(
    tmp_path: Path, leave: Callable[[RawClient], None]
) -> None:
    closed: list[mizusync.Session] = []

    def on_close(session: mizusync.Session, error: BaseException | None) -> None:
        closed.append(session)

    with joined(tmp_path, on_close=on_close) as (live, join):
        client, other = live.socket(), live.socket()
        session = join(client)
        leave(client)
        client.close()
        until(lambda: closed)
        assert other.quiet()
        assert closed == [session]
    assert len(closed) == 2


def test_a_fault_of_on_close_is_logged_and_hurts_nobody(tmp_path: Path) -> None:
    async def broken(session: mizusync.Session, error: BaseException | None) -> None:
        raise RuntimeError("a secret of the inside")

    with serve(tmp_path, on_close=broken) as live:
        live.socket().close()
        live.logged("a secret of the inside")
        client = live.client()
        until(lambda: client.request("GET", "/healthz").json["sessions"] == 0)


def test_an_on_close_that_never_returns_does_not_hold_the_end(tmp_path: Path) -> None:
    async def hanging(session: mizusync.Session, error: BaseException | None) -> None:
        await asyncio.Event().wait()

    quick = Settings(
        shutdown_timeout=MOMENT, linger_timeout=MOMENT, close_timeout=PATIENCE * 3
    )
    with ExitStack() as stack, serve(tmp_path, quick, on_close=hanging) as live:
        client = stack.enter_context(
            closing(RawClient(live.address))
        )  # it outlives the server
        assert client.upgrade().status == 101  # and answers no close


def test_the_application_may_close_a_session(tmp_path: Path) -> None:
    def on_message(session: mizusync.Session, topic: str, data: Any) -> None:
        session.close(4000, "enough")

    with serve(tmp_path, on_message=on_message) as live:
        client = live.socket()
        client.say("hello")
        assert client.read_frame() == Frame(CLOSE, b"\x0f\xa0enough")


def test_sessions_have_ids_of_their_own(tmp_path: Path) -> None:
    with joined(tmp_path) as (live, join):
        sessions = [join(live.socket(f"/ws?scope={scope}")) for scope in ("one", "two")]
        assert [session.scope for session in sessions] == ["one", "two"]
        assert len({session.id for session in sessions}) == 2
        assert all(isinstance(session.id, str) and session.id for session in sessions)


async def echo(websocket: Any) -> None:
    async for message in websocket:
        await websocket.send(message)


def test_a_raw_websocket_echoes_text_and_binary(tmp_path: Path) -> None:
    with serve(
        tmp_path, prepare=lambda server: server.websocket("/echo")(echo)
    ) as live:
        client = live.socket("/echo")
        for frame in (
            Frame(TEXT, b""),
            Frame(BINARY, bytes(range(256)) * 400),
            Frame(TEXT, b"\xc3\xa9"),
        ):
            client.send_frame(*frame)
            assert client.read_frame() == frame
        client.send_frame(CLOSE, b"\x03\xe8")
        assert client.read_frame().opcode == CLOSE
        assert client.ended()


def test_a_raw_websocket_takes_a_large_message_where_the_settings_allow_it(
    tmp_path: Path,
) -> None:
    message = os.urandom(2**23)
    large = replace(SMALL, max_message_size=2**23)
    with serve(
        tmp_path, large, prepare=lambda server: server.websocket("/echo")(echo)
    ) as live:
        client = live.socket("/echo")
        writer = threading.Thread(target=client.send_frame, args=(BINARY, message))
        writer.start()
        assert client.read_frame() == Frame(BINARY, message)
        writer.join(PATIENCE)


def test_a_raw_websocket_ends_with_its_function(tmp_path: Path) -> None:
    async def once(websocket: Any) -> None:
        await websocket.send("bye")

    with serve(
        tmp_path, prepare=lambda server: server.websocket("/once")(once)
    ) as live:
        client = live.socket("/once")
        assert client.read_frame() == Frame(TEXT, b"bye")
        assert client.read_close() == 1000


def test_a_raw_websocket_that_sends_without_end_leaves_others_their_turn_and_ends(
    tmp_path: Path,
) -> None:
    ended, late = list[type[BaseException]](), []

    async def stream(websocket: Any) -> None:
        try:
            while True:
                late.extend(["after the close"] * websocket.closing)
                await websocket.send("x" * 1000)
        except BaseException as error:
            ended.append(type(error))
            raise

    def drain(client: RawClient) -> None:
        with suppress(OSError):
            while client.sock.recv(2**16):
                pass

    def prepare(server: Server) -> None:
        server.websocket("/stream")(stream)

    with serve(tmp_path, replace(SMALL, close_timeout=MOMENT), prepare=prepare) as live:
        reader = threading.Thread(target=drain, args=[live.socket("/stream")])
        reader.start()
        for _ in range(3):
            assert live.client().request("GET", "/healthz").status == 200
        live.stop()
        reader.join(PATIENCE)
    assert (ended, late) == ([mizusync.ConnectionLost], [])


def test_a_fault_of_a_raw_websocket_is_logged_and_closes_with_1011(
    tmp_path: Path,
) -> None:
    async def broken(websocket: Any) -> None:
        await websocket.send("hello")
        raise RuntimeError("a secret of the inside")

    with serve(
        tmp_path, prepare=lambda server: server.websocket("/broken")(broken)
    ) as live:
        assert live.socket("/broken").read_close() == 1011
        live.logged("a secret of the inside")


def test_a_raw_websocket_whose_function_waits_for_what_is_cancelled_closes_with_1011(
    tmp_path: Path,
) -> None:
    async def cancelling(websocket: Any) -> None:
        await websocket.send("hello")
        await cancelled(websocket.request)

    with serve(
        tmp_path, prepare=lambda server: server.websocket("/it")(cancelling)
    ) as live:
        assert live.socket("/it").read_close() == 1011
        live.logged("Traceback")


def test_a_raw_websocket_that_meets_the_loss_of_another_closes_with_1011(
    tmp_path: Path,
) -> None:
    gone = list[Any]()

    async def relay(websocket: Any) -> None:
        gone.append(websocket)
        async for _ in websocket:
            await gone[0].send("to one that has gone")

    with serve(tmp_path, prepare=lambda server: server.websocket("/it")(relay)) as live:
        first, second = live.socket("/it"), live.socket("/it")
        until(lambda: len(gone) == 2)
        first.close()
        until(lambda: live.server.stats()["connections"] == 1)
        second.say("hello")
        assert second.read_close() == 1011
        live.logged("Traceback")


def test_a_raw_websocket_that_a_task_still_reads_ends_as_any_other(
    tmp_path: Path,
) -> None:
    reading = set[asyncio.Task[Any]]()

    async def leave(websocket: Any) -> None:
        websocket.accept()
        reading.add(asyncio.create_task(websocket.receive()))
        await asyncio.sleep(0)

    with serve(tmp_path, prepare=lambda server: server.websocket("/it")(leave)) as live:
        assert live.socket("/it").read_close() == 1000
        until(lambda: all(task.done() for task in reading))


def test_the_websockets_library_hears_hints_with_changes(server: Live) -> None:
    client = pytest.importorskip("websockets.sync.client")
    with client.connect("ws://{}:{}/ws?scope=s".format(*server.address)) as socket:
        socket.send(json.dumps({"topic": "subscribe", "data": {"changes": True}}))
        assert json.loads(socket.recv(PATIENCE))["data"]["cursor"] == 0
        (result,) = server.client().push(note("a", "\u00e9", scope="s"))
        assert json.loads(socket.recv(PATIENCE))["data"]["changes"] == result["changes"]
        assert socket.ping().wait(PATIENCE)
    assert socket.close_code == 1000


def test_the_httpx_library_is_served_on_one_connection(server: Live) -> None:
    httpx = pytest.importorskip("httpx")
    with httpx.Client(base_url="http://{}:{}".format(*server.address)) as client:
        chunks = iter(
            [json.dumps([note("a", "x" * 20_000)]).encode()]
        )  # without a length
        json_type = {"Content-Type": "application/json"}
        (result,) = client.post("/sync/push", content=chunks, headers=json_type).json()
        assert client.get("/sync/pull").json()["changes"] == result["changes"]
        assert client.get("/sync/pull").headers["content-encoding"] == "gzip"
        assert client.head("/sync/snapshot").status_code == 200
        assert client.get("/nowhere").json()["code"] == "not_found"
        assert server.server.stats()["connections"] == 1


def test_the_aiohttp_library_pushes_follows_and_is_asked_for_its_body(
    server: Live,
) -> None:
    aiohttp = pytest.importorskip("aiohttp")

    async def go() -> None:
        address = "http://{}:{}".format(*server.address)
        async with (
            aiohttp.ClientSession(address) as client,
            client.ws_connect("/ws", compress=15) as socket,  # which is declined
        ):
            await socket.send_json({"topic": "subscribe", "data": {"changes": True}})
            assert (await socket.receive_json())["data"] == {"cursor": 0}
            async with client.post(
                "/sync/push", json=[note("a")], expect100=True
            ) as answer:
                (result,) = await answer.json()
            assert (await socket.receive_json())["data"]["changes"] == result["changes"]

    ask(go())


# --- Gate -----------------------------------------------------------------------------
# Who may: Host, Origin, token, on_auth. A browser's page of another origin gets
# nothing.


@pytest.mark.parametrize(
    "host", ["localhost", "LocalHost", "127.0.0.1", "[::1]", "127.0.0.1:{port}"]
)
def test_names_of_the_loopback_are_its_hosts(visitor: RawClient, host: str) -> None:
    headers = {"Host": host.format(port=visitor.address[1])}
    assert visitor.request("GET", "/sync/pull", headers=headers).status == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "10.0.0.1.5",
        "evil",
    ],
)
def test_another_host_is_forbidden_on_the_loopback(
    shared: Live, visitor: RawClient, host: str
) -> None:
    for target in ("/sync/pull", "/sync/snapshot", "/", "/healthz"):
        headers = {"Host": f"{host}:{shared.address[1]}"}
        reply = shared.client().request("GET", target, headers=headers)
        assert refused(reply, 403)
        assert "--allow-host" in reply.json["error"]
    assert refused(
        shared.client().request("POST", "/sync/push", BODY, {"Host": host}), 403
    )
    assert refused(shared.client().upgrade(headers={"Host": host}), 403)


@pytest.mark.parametrize("host", ["10.0.0.1", "[fd00::1]"])
def test_an_ip_address_is_a_host_for_dns_rebinding_needs_a_name(
    tmp_path: Path, host: str
) -> None:
    for allowed in ([], ["sync.example"]):
        with serve(tmp_path, allow_host=allowed) as live:
            for name in (host, f"{host}:80"):
                reply = live.client().request("GET", "/healthz", headers={"Host": name})
                assert reply.status == 200


def test_the_host_of_a_whole_address_is_the_host(visitor: RawClient) -> None:
    assert refused(visitor.request("GET", "http://evil.example/sync/pull"), 400, 403)


def test_a_host_that_is_allowed_is_taken(tmp_path: Path) -> None:
    with serve(tmp_path, allow_host=["sync.example"]) as live:
        client = live.client()
        assert (
            client.request("GET", "/sync/pull", headers={"Host": "sync.example"}).status
            == 200
        )
        assert refused(
            client.request("GET", "/sync/pull", headers={"Host": "evil.example"}), 403
        )


FOREIGN = [
    "http://evil.example",
    "null",
    "http://127.0.0.1:1",
    "http://localhost:{port}",
    "file://",
]


@pytest.mark.parametrize(
    "origin", [*FOREIGN, "http://127.0.0.1:{port}.evil.example", ""]
)
def test_a_websocket_from_another_origin_is_forbidden(
    visitor: RawClient, origin: str
) -> None:
    assert refused(
        visitor.upgrade(headers={"Origin": origin.format(port=visitor.address[1])}), 403
    )


@pytest.mark.parametrize("origin", FOREIGN)
def test_a_page_of_another_origin_gets_nothing(
    shared: Live, visitor: RawClient, origin: str
) -> None:
    headers = {"Origin": origin.format(port=shared.address[1])}
    assert refused(shared.client().request("POST", "/sync/push", BODY, headers), 403)
    asked = headers | {"Access-Control-Request-Method": "POST"}
    for reply in (
        shared.client().request("GET", "/sync/pull", headers=headers),
        shared.client().request("OPTIONS", "/sync/push", headers=asked),
    ):
        assert not [
            name for name in reply.headers if name.startswith("access-control-")
        ]


def test_its_own_origin_is_taken(client: RawClient) -> None:
    headers = {"Origin": "http://{}:{}".format(*client.address)}
    assert client.push(note("a"), headers=headers)[0]["ok"]
    assert client.upgrade(headers=headers).status == 101


def test_an_allowed_origin_may_use_what_methods_a_route_has(tmp_path: Path) -> None:
    def prepare(server: Server) -> None:
        server.route("PUT", "/it")(lambda request: b"")

    headers = {"Origin": "https://app.example", "Access-Control-Request-Method": "PUT"}
    with serve(tmp_path, prepare=prepare, allow_origin=["https://app.example"]) as live:
        preflight = live.client().request("OPTIONS", "/it", headers=headers)
        assert "PUT" in preflight.headers["access-control-allow-methods"].split(", ")


def test_an_allowed_origin_is_told_so(tmp_path: Path) -> None:
    with serve(tmp_path, allow_origin=["https://app.example"]) as live:
        client = live.client()
        headers = {"Origin": "https://app.example"}
        asked = {
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type",
        }
        preflight = client.request("OPTIONS", "/sync/push", headers=headers | asked)
        assert preflight.status == 204
        assert "POST" in preflight.headers["access-control-allow-methods"]
        allowed = preflight.headers["access-control-allow-headers"].lower()
        assert "content-type" in allowed
        assert "authorization" in allowed
        pushed = client.request("POST", "/sync/push", BODY, headers)
        missing = client.request("GET", "/nowhere", headers=headers)
        for reply in (preflight, pushed, missing):
            assert reply.headers["access-control-allow-origin"] == "https://app.example"
            assert "origin" in reply.headers["vary"].lower()
        assert client.upgrade(headers=headers).status == 101


def test_an_origin_like_an_allowed_one_is_forbidden(tmp_path: Path) -> None:
    with serve(tmp_path, allow_origin=["https://app.example"]) as live:
        for origin in (
            "https://app.example.evil.example",
            "http://app.example",
            "https://evil",
        ):
            headers = {"Origin": origin}
            assert refused(
                live.client().request("POST", "/sync/push", BODY, headers), 403
            )
            assert refused(live.client().upgrade(headers=headers), 403)


@table(
    "given",
    {
        "a closing slash": "http://localhost:5173/",
        "upper case": "HTTP://LocalHost:5173",
        "neither": "http://localhost:5173",
    },
)
def test_an_origin_may_be_allowed_as_people_write_it(
    tmp_path: Path, given: str
) -> None:
    headers = {"Origin": "http://localhost:5173"}
    with serve(tmp_path, allow_origin=[given]) as live:
        reply = live.client().request("GET", "/sync/pull", headers=headers)
        assert reply.headers["access-control-allow-origin"] == "http://localhost:5173"


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ("https://app.example:443", "https://app.example"),
        ("http://app.example:80/", "http://app.example"),
        ("http://app.example:443", "http://app.example:443"),
        ("capacitor://localhost", "capacitor://localhost"),
        ("http://[0:0::1]:5173", "http://[::1]:5173"),
    ],
)
def test_an_allowed_origin_is_compared_as_browsers_send_it(
    tmp_path: Path, given: str, sent: str
) -> None:
    with serve(tmp_path, allow_origin=[given]) as live:
        reply = live.client().request("GET", "/sync/pull", headers={"Origin": sent})
        assert reply.headers["access-control-allow-origin"] == sent


@pytest.mark.parametrize(
    "given", ["Sync.Example", "sync.example:8080", "sync.example/"]
)
def test_a_host_may_be_allowed_as_people_write_it(tmp_path: Path, given: str) -> None:
    with serve(tmp_path, allow_host=[given]) as live:
        headers = {"Host": "sync.example:8080"}
        assert live.client().request("GET", "/sync/pull", headers=headers).status == 200


NOWHERE = "/nowhere/todos.db"  # a program that takes its arguments ends with 1
NO_ORIGINS = [
    "x.y",
    "*",
    "null",
    "",
    "http://",
    "http://x.y/path",
    "http://x.y,http://z",
    "http://x y",
    "https://*.x.y",
    "http://x.y:99999",
    "http://x.y:0",
    "http://u@x.y",
    "http://x.y?q",
    "http://b\u00fccher.example",
    "ws://x.y",
    "file:///x",
    "http://[::1",
    "http://[:::]",
    "http://[1.2.3.4]",
]
NO_HOSTS = [
    "*",
    "",
    "*.x.y",
    "https://x.y",
    "x.y/path",
    "x y",
    "x.y,z",
    "b\u00fccher.example",
]


@pytest.mark.parametrize("origin", NO_ORIGINS)
def test_an_origin_that_no_browser_sends_is_refused_where_it_is_given(
    engine: Engine, origin: str, refusal: Callable[..., Refusal]
) -> None:
    with pytest.raises(ValueError, match="is no origin"):
        Server(engine, allow_origin=["https://app.example", origin])
    status, sentence = refusal("--db", NOWHERE, "--allow-origin", origin)
    assert (status, "is no origin" in sentence, "--allow-origin" in sentence) == (
        2,
        True,
        True,
    )


@pytest.mark.parametrize("host", NO_HOSTS)
def test_a_host_that_is_none_is_refused_where_it_is_given(
    engine: Engine, host: str, refusal: Callable[..., Refusal]
) -> None:
    with pytest.raises(ValueError, match="is no host"):
        Server(engine, allow_host=["app.example", host])
    status, sentence = refusal("--db", NOWHERE, "--allow-host", host)
    assert (status, "is no host" in sentence, "--allow-host" in sentence) == (
        2,
        True,
        True,
    )


@pytest.mark.parametrize("option", ["allow_origin", "allow_host"])
@pytest.mark.parametrize("given", ["https://app.example", b"x.y", [None], [b"x.y"]])
def test_what_is_no_list_of_strings_is_a_type_error(
    engine: Engine, option: str, given: Any
) -> None:
    options: dict[str, Any] = {option: given}
    with pytest.raises(TypeError, match=r"string"):
        Server(engine, **options)


def test_a_page_of_an_allowed_origin_may_read_when_to_come_back(tmp_path: Path) -> None:
    def busy(server: Server) -> None:
        server.route("GET", "/busy")(failing(Unavailable("come back later")))

    ours, other = {"Origin": "https://app.example"}, {"Origin": "https://other.example"}
    with serve(tmp_path, prepare=busy, allow_origin=["https://app.example"]) as live:
        client = live.client()
        assert refused(reply := client.request("GET", "/busy", headers=ours), 503)
        exposed = reply.headers["access-control-expose-headers"]
        assert "retry-after" in exposed.lower().split(", ")
        for headers in (other, {}):
            reply = client.request("GET", "/busy", headers=headers)
            assert "access-control-expose-headers" not in reply.headers


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Live]:
    with serve(tmp_path, token="s3cret-token") as live:
        yield live


BAD_TOKENS = [
    "Bearer another",
    "Bearer s3cret",
    "Bearer s3cret-token2",
    "Bearer",
    "s3cret-token",
    "Basic s3cret-token",
    "Bearer \u00e9",
]


def test_without_the_token_all_is_unauthorized(guarded: Live) -> None:
    for headers in ({}, *({"Authorization": shown} for shown in BAD_TOKENS)):
        for reply in (
            guarded.client().request("POST", "/sync/push", BODY, headers),
            guarded.client().request(
                "GET", "/sync/pull?token=s3cret-token", headers=headers
            ),
            guarded.client().request("GET", "/sync/snapshot", headers=headers),
            guarded.client().upgrade("/ws?token=s3cret-token", headers),
        ):
            assert refused(reply, 401)
            assert reply.headers["www-authenticate"].split()[0] == "Bearer"
            assert b"s3cret" not in reply.body


ANNOUNCED = b"Content-Length: 1000000"  # of a body that never comes


@table(
    "sent",
    {
        "a push": post(ANNOUNCED, body=b""),
        "a push that waits for a word": post(
            ANNOUNCED, b"Expect: 100-continue", body=b""
        ),
        "a push in chunks": post(CHUNKED, body=b"10000\r\n["),
        "a pull": get(b"/sync/pull", ANNOUNCED),
        "a snapshot": get(b"/sync/snapshot", ANNOUNCED),
    },
)
def test_without_the_token_a_body_is_not_even_read(guarded: Live, sent: bytes) -> None:
    client = guarded.client()
    client.send(sent)
    assert refused(reply := client.response(), 401)
    assert reply.headers["connection"] == "close"
    assert client.ended()


@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
def test_with_the_token_all_is_open(guarded: Live, scheme: str) -> None:
    client, headers = guarded.client(), {"Authorization": f"{scheme} s3cret-token"}
    assert client.push(note("a"), headers=headers)[0]["ok"]
    assert client.request("GET", "/sync/pull", headers=headers).status == 200
    assert client.request("GET", "/sync/snapshot", headers=headers).status == 200
    assert client.upgrade(headers=headers).status == 101


def test_a_browser_offers_the_token_as_a_subprotocol(guarded: Live) -> None:
    client = guarded.client()
    reply = client.upgrade(
        headers={"Sec-WebSocket-Protocol": "mizusync, bearer.s3cret-token"}
    )
    assert (reply.status, reply.headers["sec-websocket-protocol"]) == (101, "mizusync")
    assert client.subscribe()["topic"] == "sync:_default"


def test_another_subprotocol_is_unauthorized(guarded: Live) -> None:
    for offer in ("mizusync", "mizusync, bearer.another", "mizusync, s3cret-token"):
        assert refused(
            guarded.client().upgrade(headers={"Sec-WebSocket-Protocol": offer}), 401
        )


def test_healthz_tells_its_status_alone_where_there_is_a_token(guarded: Live) -> None:
    reply = guarded.client().request("GET", "/healthz")
    assert (reply.status, reply.json) == (200, {"status": "ok"})
    assert guarded.client().request("GET", "/").status != 401


def test_the_token_is_never_logged(tmp_path: Path) -> None:
    with recorded() as everything, serve(tmp_path, token="s3cret-token") as live:
        client = live.client()
        client.request(
            "GET", "/sync/pull", headers={"Authorization": "Bearer s3cret-token"}
        )
        client.request(
            "GET", "/sync/pull", headers={"Authorization": "Basic s3cret-token"}
        )
        client.upgrade(
            headers={"Sec-WebSocket-Protocol": "mizusync, bearer.s3cret-token"}
        )
    assert not [text for text in everything.texts if "s3cret" in text]


class Doors:
    """An on_auth: who says no name is nobody; `secret` is for nobody; once shut, all
    is."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.shut = False

    def now(self, request: mizusync.Request, scope: str) -> str:
        self.asked.append(scope)
        if self.shut or scope == "closed" or "x-name" not in request.headers:
            raise mizusync.Unauthorized("say who you are")
        if scope == "secret":
            raise mizusync.Forbidden("not for you")
        return request.headers["x-name"]

    async def later(self, request: mizusync.Request, scope: str) -> str:
        await asyncio.sleep(0)
        return self.now(request, scope)


ANN = {"X-Name": "ann"}


@pytest.fixture
def doors() -> Doors:
    return Doors()


@pytest.fixture
def watched(tmp_path: Path, doors: Doors) -> Iterator[Live]:
    with serve(tmp_path, on_auth=doors.later) as live:
        yield live


def test_a_push_fails_alone_where_its_scope_is_forbidden(watched: Live) -> None:
    client = watched.client()
    results = client.push(
        note("a"), note("b", scope="secret"), note("c", scope="s"), headers=ANN
    )
    assert [result["ok"] for result in results] == [True, False, True]
    assert results[1] == {"ok": False, "code": "forbidden", "error": "not for you"}
    assert watched.call(watched.engine.current, "secret") == 0


def test_a_push_asks_once_for_each_scope_that_its_mutations_name(
    watched: Live, doors: Doors
) -> None:
    watched.client().push(
        note("a"), note("b", scope="s"), note("c"), note("d", scope="s"), headers=ANN
    )
    assert sorted(doors.asked) == ["_default", "s"]


def test_a_push_is_refused_whole_where_one_scope_is_unauthorized(watched: Live) -> None:
    body = json.dumps([note("a"), note("b", scope="closed")]).encode()
    assert refused(watched.client().request("POST", "/sync/push", body, ANN), 401)
    assert refused(watched.client().request("POST", "/sync/push", BODY), 401)
    assert watched.call(watched.engine.current, "_default") == 0


@pytest.mark.parametrize("target", ["/sync/pull", "/sync/snapshot", "/ws"])
def test_each_way_in_is_asked_for(watched: Live, target: str) -> None:
    def asked(query: str, headers: dict[str, str]) -> Reply:
        client = watched.client()
        if target == "/ws":
            return client.upgrade(target + query, headers)
        return client.request("GET", target + query, headers=headers)

    assert refused(asked("", {}), 401)
    assert refused(asked("?scope=secret", ANN), 403)
    assert refused(asked("?scope=%73ecret&wait=1", ANN), 403)
    assert asked("?scope=s", ANN).status in (101, 200)


def test_healthz_and_the_page_are_open_to_all(watched: Live, doors: Doors) -> None:
    assert watched.client().request("GET", "/healthz").status == 200
    assert watched.client().request("GET", "/").status in (200, 404)
    assert doors.asked == []


def test_a_scope_that_is_not_allowed_cannot_be_subscribed_to(watched: Live) -> None:
    client = watched.socket("/ws", ANN)
    assert client.subscribe(scope="secret")["data"]["code"] == "forbidden"
    share = {"id": "a", "name": "share", "args": ["secret", "s"]}
    (result,) = watched.client().push(share, headers=ANN)
    assert client.subscribe(scope="s")["data"]["cursor"] == result["cursor"]
    assert client.quiet()


@table("gate", {"a function": Doors().now, "a coroutine": Doors().later})
def test_what_on_auth_returned_is_the_identity(
    tmp_path: Path, gate: Callable[[mizusync.Request, str], Any]
) -> None:
    def on_message(session: mizusync.Session, topic: str, data: Any) -> None:
        session.send("you", session.identity)

    with serve(tmp_path, on_auth=gate, on_message=on_message) as live:
        (result,) = live.client().push({"id": "a", "name": "who"}, headers=ANN)
        assert result["changes"][0]["data"] == "ann"
        client = live.socket("/ws", ANN)
        client.say("who?")
        assert client.read_json() == {"topic": "you", "data": "ann"}


def test_a_fault_of_on_auth_lets_nobody_in(tmp_path: Path) -> None:
    def broken(request: mizusync.Request, scope: str) -> None:
        raise KeyError("a secret of the inside")

    with serve(tmp_path, on_auth=broken) as live:
        client = live.client()
        assert refused(client.request("POST", "/sync/push", BODY), 500)
        assert refused(client.request("GET", "/sync/pull"), 500)
        reply = client.upgrade()
        assert refused(reply, 500)
        assert b"secret" not in reply.body
        live.logged("a secret of the inside")
        assert live.call(live.engine.current, "_default") == 0


@pytest.mark.parametrize("waits", [False, True], ids=["a function", "a coroutine"])
def test_an_on_auth_that_returns_false_forbids_the_scope(
    tmp_path: Path, waits: bool
) -> None:
    def user_may(request: mizusync.Request, scope: str) -> bool:
        return scope == "open"

    async def user_may_later(request: mizusync.Request, scope: str) -> bool:
        return user_may(request, scope)

    with serve(tmp_path, on_auth=user_may_later if waits else user_may) as live:
        client = live.client()
        no, yes = client.push(note("a"), note("b", scope="open"))
        assert (no["code"], yes["ok"]) == ("forbidden", True)
        assert refused(client.request("GET", "/sync/pull"), 403)
        assert refused(client.request("GET", "/sync/snapshot"), 403)
        assert refused(client.upgrade(), 403)
        session = live.socket("/ws?scope=open")
        assert session.subscribe(scope="_default")["data"]["code"] == "forbidden"
        assert session.subscribe()["data"]["cursor"] == yes["cursor"]


@pytest.mark.parametrize("identity", [None, 0, "", True, ()])
def test_every_other_value_that_on_auth_returns_is_an_identity(
    tmp_path: Path, identity: Any
) -> None:
    with serve(tmp_path, on_auth=lambda request, scope: identity) as live:
        (result,) = live.client().push({"id": "a", "name": "who"})
        assert result["changes"][0]["data"] == (
            list(identity) if identity == () else identity
        )


def test_a_session_whose_permission_ended_is_closed_with_1008(
    tmp_path: Path, doors: Doors
) -> None:
    settings = replace(SMALL, auth_interval=MOMENT / 2)
    with serve(tmp_path, settings, on_auth=doors.later) as live:
        client = live.socket("/ws", ANN)
        until(lambda: len(doors.asked) > 2)
        assert client.subscribe()["topic"] == "sync:_default"
        doors.shut = True
        assert client.read_close() == 1008


def test_an_on_auth_that_hangs_when_it_is_asked_again_is_asked_once_more(
    tmp_path: Path,
) -> None:
    asked: list[str] = []

    async def on_auth(request: mizusync.Request, scope: str) -> None:
        asked.append(scope)
        if len(asked) == 2:
            await asyncio.Event().wait()
        if len(asked) > 2:
            raise mizusync.Forbidden("no more")

    with serve(
        tmp_path, replace(SMALL, auth_interval=MOMENT / 2), on_auth=on_auth
    ) as live:
        assert live.socket().read_close() == 1008
        live.logged("TimeoutError")


ASKING = replace(SMALL, auth_interval=MOMENT / 2)


class Permits:
    """An on_auth that answers with `answers[scope]`, or raises it; others get "ann"."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {}
        self.asked = 0

    async def __call__(self, request: mizusync.Request, scope: str) -> Any:
        self.asked += 1
        answer = self.answers.get(scope, "ann")
        if answer is ...:
            await asyncio.Event().wait()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def ask_again(self) -> None:
        """Wait until all scopes were asked about once more."""
        before = self.asked
        until(lambda: self.asked > before + 5)  # two scopes a time, at most


@pytest.fixture
def permits() -> Permits:
    return Permits()


@table("no", {"Forbidden": mizusync.Forbidden("no more"), "False": False})
def test_a_scope_whose_permission_ended_is_unsubscribed_and_told(
    tmp_path: Path, permits: Permits, no: Any
) -> None:
    with serve(tmp_path, ASKING, on_auth=permits) as live:
        client = live.socket()
        client.subscribe(scope="s")
        client.subscribe(scope="t")
        permits.answers["s"] = no
        told = client.read_json()
        assert told["topic"] == "error"
        assert (told["data"]["code"], told["data"]["scope"]) == ("forbidden", "s")
        live.engine.submit([note("a", scope="s"), note("b", scope="t")]).result(
            PATIENCE
        )
        assert client.read_json()["topic"] == "sync:t"  # the session goes on
        permits.ask_again()
        assert client.quiet()  # it is told once
        permits.answers.clear()
        assert client.subscribe(scope="s")["data"]["cursor"] == 1


def test_a_subscribe_that_is_refused_ends_the_subscription_of_before(
    tmp_path: Path, permits: Permits
) -> None:
    with serve(tmp_path, on_auth=permits) as live:  # nothing but the client asks
        client = live.socket()
        client.subscribe(scope="s")
        client.subscribe(scope="t")
        permits.answers["s"] = mizusync.Forbidden("no more")
        client.say("subscribe", {"scope": "s"})
        told = client.read_json()["data"]
        assert (told["code"], told["scope"]) == ("forbidden", "s")
        live.engine.submit([note("a", scope="s"), note("b", scope="t")]).result(
            PATIENCE
        )
        assert client.read_json()["topic"] == "sync:t"
        assert client.quiet()


def test_a_session_may_outlive_the_scope_that_it_came_with(
    tmp_path: Path, permits: Permits
) -> None:
    with serve(tmp_path, ASKING, on_auth=permits) as live:
        client = live.socket("/ws?scope=own")
        client.subscribe(scope="other")
        permits.answers["own"] = mizusync.Forbidden("no more")
        assert client.read_json()["data"]["scope"] == "own"
        permits.ask_again()
        assert client.quiet()
        permits.answers["other"] = mizusync.Forbidden("no more")
        assert client.read_json()["data"]["scope"] == "other"
        assert client.read_close() == 1008


def test_a_session_without_a_scope_that_is_left_is_closed_with_1008(
    tmp_path: Path, permits: Permits
) -> None:
    with serve(tmp_path, ASKING, on_auth=permits) as live:
        client = live.socket()
        client.subscribe(scope="s")
        permits.answers |= {"s": False, "_default": False}
        assert client.read_close() == 1008


def test_a_client_that_is_unknown_now_is_closed_with_1008_whatever_scopes_are_left(
    tmp_path: Path, permits: Permits
) -> None:
    with serve(tmp_path, ASKING, on_auth=permits) as live:
        client = live.socket()
        client.subscribe(scope="s")
        permits.answers["s"] = mizusync.Unauthorized("who?")
        assert client.read_close() == 1008


def test_the_identity_of_a_session_follows_the_answer_for_the_scope_that_it_came_with(
    tmp_path: Path, permits: Permits
) -> None:
    def on_message(session: mizusync.Session, topic: str, data: Any) -> None:
        session.send("you", session.identity)

    def who(client: RawClient) -> Any:
        client.say("who?")
        return client.read_json()["data"]

    with serve(tmp_path, ASKING, on_auth=permits, on_message=on_message) as live:
        client = live.socket("/ws?scope=own")
        client.subscribe(scope="other")
        assert who(client) == "ann"
        permits.answers |= {"other": "nobody", "own": "ann, admin"}
        until(lambda: who(client) == "ann, admin")
        permits.ask_again()
        assert who(client) == "ann, admin"


@table(
    "fault",
    {"fails": KeyError("inside"), "hangs": ..., "is busy": Unavailable("later")},
)
def test_a_session_is_closed_with_1011_once_on_auth_failed_three_times_in_a_row(
    tmp_path: Path, permits: Permits, fault: Any
) -> None:
    with serve(tmp_path, ASKING, on_auth=permits, may_log="on_auth failed") as live:
        client = live.socket()
        permits.answers["_default"] = fault
        before = permits.asked
        assert client.read_close() == 1011
        assert permits.asked >= before + 3
        assert (
            len([text for text in live.records.texts if "on_auth failed" in text]) == 3
        )


def test_two_failures_of_on_auth_and_an_answer_are_no_three(tmp_path: Path) -> None:
    asked = itertools.count()

    def on_auth(request: mizusync.Request, scope: str) -> str:
        if next(asked) % 3:
            raise KeyError("inside")
        return "ann"

    with serve(tmp_path, ASKING, on_auth=on_auth, may_log="on_auth failed") as live:
        client = live.socket()
        until(lambda: len(live.records.texts) >= 8)
        assert client.quiet()


def test_no_scope_that_is_not_answered_for_keeps_another_from_its_end(
    tmp_path: Path, permits: Permits
) -> None:
    scopes = [*map(str, range(9)), "_default"]
    with serve(tmp_path, ASKING, on_auth=permits, may_log="on_auth failed") as live:
        client = live.socket()
        for scope in (*scopes, "s"):
            client.subscribe(scope=scope)
        permits.answers = dict.fromkeys(scopes, ...) | {
            "s": mizusync.Forbidden("no more")
        }
        assert client.read_json()["data"]["scope"] == "s"


@pytest.mark.parametrize("target", ["/ws", "/sync/pull", "subscribe"])
def test_a_client_that_goes_while_on_auth_thinks_is_forgotten(
    tmp_path: Path, target: str
) -> None:
    async def think(request: mizusync.Request, scope: str) -> None:
        if scope != "quick":
            await asyncio.Event().wait()

    with serve(tmp_path, on_auth=think) as live:
        before = live.tasks()
        if target == "subscribe":
            client = live.socket("/ws?scope=quick")
            client.say("subscribe", {"scope": "another"})
        else:
            client = live.client()
            client.send(RUDE_UPGRADE.replace(b"/ws", target.encode()))
        until(lambda: live.tasks() > before)
        client.reset()
        until(lambda: live.tasks() <= before)


NO_TOKENS = ["", " ", "a b", "a,b", "YWJj/Q==", "a\n", "b\u00fccher", '"a"', "\udcff"]


@pytest.mark.parametrize("token", NO_TOKENS)
def test_a_token_that_a_browser_cannot_show_is_refused_where_it_is_given(
    engine: Engine, token: str
) -> None:
    with pytest.raises(ValueError, match=r"^a token has 1 or more letters") as raised:
        Server(engine, token=token)
    assert len(token) < 2 or token not in str(raised.value)


def test_a_token_that_is_no_string_is_a_type_error(engine: Engine) -> None:
    wrong: Any = b"s3cret"
    with pytest.raises(TypeError, match="a token is a string"):
        Server(engine, token=wrong)


def test_a_token_of_every_character_that_it_may_have_opens_both_ways(
    tmp_path: Path,
) -> None:
    token = "!#$%&'*+-.^_`|~09AZaz"
    offer = {"Sec-WebSocket-Protocol": f"mizusync, bearer.{token}"}
    with serve(tmp_path, token=token) as live:
        shown = {"Authorization": f"Bearer {token}"}
        assert live.client().request("GET", "/sync/pull", headers=shown).status == 200
        assert live.client().upgrade(headers=offer).status == 101


def test_no_second_scope_leads_around_on_auth(watched: Live) -> None:
    for target in ("/sync/pull", "/sync/snapshot", "/ws"):
        for query in ("scope=s&scope=secret", "scope=secret&%73cope=s"):
            assert refused(watched.client().upgrade(f"{target}?{query}", ANN), 400)


def test_no_method_and_no_key_twice_leads_around_on_auth(watched: Live) -> None:
    client = watched.client()
    assert client.request("HEAD", "/sync/pull?scope=secret", headers=ANN).status == 403
    twice = b', "scope": "s", "scope": "secret"}'
    (result,) = client.request(
        "POST", "/sync/push", BODY.replace(b"}", twice), ANN
    ).json
    assert result["code"] == "forbidden"
    client = watched.socket("/ws?scope=s", ANN)
    subscribe = b'{"topic": "subscribe", "data": {}, "data": {"changes": true'
    client.send_frame(TEXT, subscribe + twice + b"}")
    assert client.read_json()["data"]["code"] == "forbidden"


def test_a_pull_whose_permission_ended_while_it_waited_gives_nothing(
    tmp_path: Path, doors: Doors
) -> None:
    with serve(tmp_path, on_auth=doors.later) as live:
        client = live.client()
        client.send(get(b"/sync/pull?wait=60", b"X-Name: ann"))
        until(lambda: doors.asked)
        doors.shut = True
        live.engine.submit([note("a")]).result(PATIENCE)
        assert refused(client.response(), 401)


def test_a_preflight_needs_no_token(tmp_path: Path) -> None:
    with serve(tmp_path, token="s3cret", allow_origin=["https://app.example"]) as live:
        asked = {
            "Origin": "https://app.example",
            "Access-Control-Request-Method": "POST",
        }
        reply = live.client().request("OPTIONS", "/sync/push", headers=asked)
        assert (reply.status, "authorization" in str(reply.headers).lower()) == (
            204,
            True,
        )


def test_the_page_may_run_its_own_script_and_nothing_else(tmp_path: Path) -> None:
    with serve(tmp_path, page=PROGRAM.with_name("demo.html")) as live:
        reply = live.client().request("GET", "/")
    policy = reply.headers["content-security-policy"].split("; ")
    for tag in ("script", "style"):
        inline = (
            reply.body.split(f"<{tag}".encode())[1].split(b">", 1)[1].split(b"</")[0]
        )
        digest = base64.b64encode(hashlib.sha256(inline).digest()).decode()
        policy.remove(f"{tag}-src 'sha256-{digest}'")
    nothing = [f"{kind} 'none'" for kind in ("base-uri", "default-src", "form-action")]
    more = ["connect-src 'self'", "frame-ancestors 'none'", "img-src data:"]
    assert sorted(policy) == sorted(nothing + more)
    assert reply.headers["x-content-type-options"] == "nosniff"


def test_the_log_has_no_token_and_no_line_of_a_clients_making(tmp_path: Path) -> None:
    def broken(request: mizusync.Request, scope: str) -> None:
        if scope != "s":
            raise KeyError("inside")

    shown = {"Authorization": "Bearer s3cret"}
    with (
        recorded() as everything,
        serve(tmp_path, token="s3cret", on_auth=broken, may_log="inside") as live,
    ):
        for target in ("/%0AERROR", "/sync/pull?t=s3cret", "/?s3cret"):
            assert live.client().request("PUT", target, b"s3cret", shown).status >= 400
        assert refused(live.client().request("GET", "/sync/pull", headers=shown), 500)
        client = live.socket("/ws?scope=s", shown)
        client.send_frame(CLOSE, b"\x03\xe8bye\nERROR all is lost")
        client.read_close()
    assert not [
        text for text in everything.texts if "s3cret" in text or "\nERROR" in text
    ]
    assert [text for text in everything.texts if "all is lost" in text]


# --- Server ---------------------------------------------------------------------------
# Routes of the application's own, limits of the whole, and an end that loses nothing.


def test_the_page_is_served(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<!doctype html><title>caf\u00e9</title>", encoding="utf-8")
    with serve(tmp_path, page=page) as live:
        reply = live.client().request("GET", "/")
        assert (reply.status, reply.body) == (200, page.read_bytes())
        assert (
            reply.headers["content-type"].replace(" ", "").lower()
            == "text/html;charset=utf-8"
        )
        assert reply.headers["cache-control"] == "no-store"
        assert refused(live.client().request("POST", "/", b""), 405)


def test_a_server_in_a_thread_ends_in_order_when_it_is_told_to_stop(
    engine: Engine,
) -> None:
    server, told = Server(engine), list[str]()
    run = functools.partial(server.run, "127.0.0.1", 0, told.append)
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    until(lambda: told)
    with closing(RawClient(("127.0.0.1", int(told[0].split(":")[-1][:-1])))) as session:
        assert session.upgrade().status == 101
        server.stop()
        assert session.read_close() == 1001
    thread.join(PATIENCE)
    server.stop()
    assert not thread.is_alive()
    assert refuses(lambda: engine.submit([note("1")]))


def test_a_server_does_not_run_where_a_loop_runs_and_leaves_the_engine_open(
    engine: Engine,
) -> None:
    async def main() -> None:
        with pytest.raises(RuntimeError, match="listen"):
            Server(engine).run("127.0.0.1", 0)
        async with Server(engine).listen("127.0.0.1", 0):
            assert (await engine.push([note("1")]))[0].ok

    ask(main())


def test_a_server_that_is_told_to_stop_before_it_runs_does_so_at_once(
    engine: Engine,
) -> None:
    server = Server(engine)
    server.stop()
    thread = threading.Thread(target=server.run, args=("127.0.0.1", 0), daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert refuses(lambda: engine.submit([note("1")]))


def test_a_server_without_a_page_has_none_and_one_that_is_named_has_to_be_there(
    engine: Engine, tmp_path: Path
) -> None:
    with serve(tmp_path) as live:
        assert refused(live.client().request("GET", "/"), 404)
    with pytest.raises(OSError, match="nowhere"):
        Server(engine, page=tmp_path / "nowhere.html")


def prepared(server: Server) -> None:
    """Routes as an application would add them."""

    @server.route("GET", "/text")
    async def text(request: mizusync.Request) -> str:
        return "h\u00e9llo " + request.query.get("name", "")

    @server.route("POST", "/upper")
    async def upper(request: mizusync.Request) -> bytes:
        return bytes(request.body).upper()

    @server.route("GET", "/json")
    async def value(request: mizusync.Request) -> Any:
        return {"x": [1, None]}

    @server.route("POST", "/keys")
    async def keys(request: mizusync.Request) -> Any:
        return list(request.json)

    @server.route("GET", "/response")
    async def response(request: mizusync.Request) -> Any:
        return mizusync.Response(
            status=201, body=b"made", headers={"X-A": "1"}, content_type="a/b"
        )

    @server.route("GET", "/refuse")
    async def refuse(request: mizusync.Request) -> Any:
        raise mizusync.Conflict("it is taken")

    @server.route("GET", "/crash")
    async def crash(request: mizusync.Request) -> Any:
        raise RuntimeError("a secret of the inside")


def test_routes_of_the_application_give_text_bytes_json_or_a_response(
    tmp_path: Path,
) -> None:
    with serve(tmp_path, prepare=prepared) as live:
        client = live.client()
        assert client.request("GET", "/text?name=a+b").body.decode() == "h\u00e9llo a b"
        assert (
            client.request("POST", "/upper", b"abc", {"Content-Type": "x/y"}).body
            == b"ABC"
        )
        assert client.request("GET", "/json").json == {"x": [1, None]}
        made = client.request("GET", "/response")
        assert (made.status, made.body, made.headers["x-a"]) == (201, b"made", "1")
        assert made.headers["content-type"] == "a/b"
        assert set(
            client.request("OPTIONS", "/upper").headers["allow"].split(", ")
        ) >= {"POST"}


@pytest.mark.parametrize("body", [b"", b"{", b"NaN", b"\xff", b"[" * 65 + b"]" * 65])
def test_a_route_that_wants_json_refuses_what_is_none(
    tmp_path: Path, body: bytes
) -> None:
    with serve(tmp_path, prepare=prepared) as live:
        assert refused(live.client().request("POST", "/keys", body), 400)
        assert live.client().request("POST", "/keys", b'{"a": [1]}').json == ["a"]


@table(
    "case",
    {
        "a parameter in braces": ("GET", "/x/{id}", "literal"),
        "a parameter in angle brackets": ("GET", "/x/<id>", "literal"),
        "a parameter with a colon": ("GET", "/x/:id", "literal"),
        "any rest": ("GET", "/x/*", "literal"),
        "a query": ("GET", "/x?scope=a", "literal"),
        "a fragment": ("GET", "/x#a", "literal"),
        "an escape": ("GET", "/caf%C3%A9", "literal"),
        "no slash": ("GET", "x", "slash"),
        "path and method in the wrong order": ("/x", "GET", "slash"),
        "no method": ("GET POST", "/x", "method"),
        "an empty method": ("", "/x", "method"),
        "what the server itself answers": ("OPTIONS", "/x", "OPTIONS"),
        "the push": ("POST", "/sync/push", "POST /sync/push"),
        "the pull": ("GET", "/sync/pull", "GET /sync/pull"),
        "the same in lower case": ("get", "/sync/pull", "GET /sync/pull"),
        "the pull's HEAD": ("HEAD", "/sync/pull", "HEAD /sync/pull"),
        "the sessions": ("GET", "/ws", "GET /ws"),
        "the page": ("GET", "/", "GET /"),
        "one of its own": ("PUT", "/twice", "PUT /twice"),
        "the GET of its own HEAD": ("GET", "/head", "HEAD /head"),
    },
)
def test_a_route_that_would_never_match_or_is_taken_is_refused(
    tmp_path: Path, engine: Engine, case: tuple[str, str, str]
) -> None:
    (tmp_path / "page.html").touch()
    method, path, words = case
    server = Server(engine, page=tmp_path / "page.html")
    server.route("PUT", "/twice")(len)
    server.route("HEAD", "/head")(len)
    with pytest.raises(ValueError, match=words):
        server.route(method, path)(print)


@pytest.mark.parametrize(
    "target", ["/sync/pull", "/ws", "/socket", "/rooms/{id}", "socket"]
)
def test_a_websocket_that_would_never_match_or_is_taken_is_refused(
    engine: Engine, target: str
) -> None:
    server = Server(engine)
    server.websocket("/socket")(echo)
    with pytest.raises(ValueError, match=re.escape(target)):
        server.websocket(target)(echo)


def test_a_refused_route_leaves_all_as_it_was(tmp_path: Path) -> None:
    def prepare(server: Server) -> None:
        for method, path in (
            ("GET", "/sync/pull"),
            ("OPTIONS", "/other"),
            ("G T", "/other"),
        ):
            with suppress(ValueError):
                server.route(method, path)(lambda request: b"another")
        for path in ("/literal/(id)", "/caf\u00e9 $1", "/a:b"):
            server.route("GET", path)(lambda request: request.path)
        server.route("PUT", "/sync/pull")(lambda request: b"put")

    with serve(tmp_path, prepare=prepare) as live:
        client = live.client()
        assert client.pull()["changes"] == []
        assert refused(client.request("GET", "/other"), 404)
        assert client.request("PUT", "/sync/pull", b"").body == b"put"
        for target in ("/literal/(id)", "/caf%C3%A9%20$1", "/a:b"):
            assert client.request("GET", target).status == 200


class Odd(mizusync.SyncError, status=499, code="odd"):
    """A refusal of an application's own, of whose status HTTP says nothing."""


def failing(error: BaseException) -> Callable[[Any], Any]:
    def handler(request: mizusync.Request) -> Any:
        raise error

    return handler


def set_late(request: mizusync.Request) -> mizusync.Response:
    response = mizusync.Response(302)
    response.headers["Location"] = "/a\r\nSet-Cookie: b=c"  # type: ignore[index]
    return response


async def cancelled(request: mizusync.Request) -> None:
    future = asyncio.get_running_loop().create_future()
    future.cancel()
    await future


def response_of(*values: Any, **fields: Any) -> Callable[[Any], Any]:
    return lambda request: mizusync.Response(*values, **fields)


ODD = Odd("it is odd")
ODD.headers = {"X-A": "\u00fc"}
AMISS = {
    "text as a body": response_of(200, "text"),
    "no body": response_of(200, None),
    "a header with a line break": response_of(headers={"X-A": "1\r\nX-B: 2"}),
    "a header that is set late": set_late,
    "a header's name with a space": response_of(headers={"X A": "1"}),
    "a header without a name": response_of(headers={"": "1"}),
    "a header of a refusal": failing(ODD),
    **{name: response_of(headers={name: "1"}) for name in ("Content-Length", "date")},
    **{
        name: response_of(headers={name: "1"})
        for name in ("Transfer-Encoding", "Connection")
    },
    "an interim status": response_of(103),
    "no status": response_of(600),
    "what is no JSON": lambda request: {1, 2},
    "a wait for what is cancelled": cancelled,
    "an exit": failing(SystemExit(3)),
    "an end of a library's own": failing(type("Timeout", (BaseException,), {})()),
    "a switch of protocols to none": response_of(101),
}


@table("handler", AMISS)
def test_what_a_route_does_amiss_is_logged_and_answered(
    tmp_path: Path, handler: Callable[[Any], Any]
) -> None:
    with serve(
        tmp_path, prepare=lambda server: server.route("GET", "/it")(handler)
    ) as live:
        client = live.client()
        assert refused(client.request("GET", "/it"), 500)
        live.logged("Traceback")
        assert client.request("GET", "/healthz").status == 200  # on the same connection


class Large(mizusync.Response):
    """A response of an application's own making."""

    def __init__(self, text: str) -> None:
        super().__init__(200, text.encode(), {}, "text/plain")


def test_a_response_may_be_of_a_class_of_its_own(tmp_path: Path) -> None:
    def prepare(server: Server) -> None:
        server.route("GET", "/it")(lambda request: Large("x" * 20_000))

    headers = {"Accept-Encoding": "gzip", "Origin": "https://app.example"}
    with serve(tmp_path, prepare=prepare, allow_origin=["https://app.example"]) as live:
        reply = live.client().request("GET", "/it", headers=headers)
        assert (reply.status, gzip.decompress(reply.body)) == (200, b"x" * 20_000)


def test_a_refusal_may_have_a_status_of_its_own(tmp_path: Path) -> None:
    refuse = failing(Odd("it is odd"))
    with serve(
        tmp_path, prepare=lambda server: server.route("GET", "/it")(refuse)
    ) as live:
        reply = live.client().request("GET", "/it")
        assert (reply.status, reply.json) == (
            499,
            {"code": "odd", "error": "it is odd"},
        )


def test_a_refusal_of_a_route_is_told_and_a_fault_is_not(tmp_path: Path) -> None:
    with serve(tmp_path, prepare=prepared) as live:
        client = live.client()
        assert refused(client.request("GET", "/refuse"), 409)
        reply = client.request("GET", "/crash")
        assert refused(reply, 500)
        assert b"secret" not in reply.body
        live.logged("a secret of the inside")
        assert live.client().request("GET", "/json").status == 200


def test_stats_tell_of_sessions_that_come_and_go(server: Live) -> None:
    assert server.call(server.server.stats)["sessions"] == 0
    client = server.socket()
    assert server.call(server.server.stats)["sessions"] == 1
    client.close()
    until(lambda: server.call(server.server.stats)["sessions"] == 0)


def test_stats_have_every_name_from_the_start_and_the_readme_explains_each(
    server: Live,
) -> None:
    stats = server.server.stats()
    assert re.findall(r"^\| `(\w+)` \|", readme("What to watch"), re.M) == list(stats)
    assert stats.pop("version") == mizusync.__version__
    assert stats.pop("database_bytes") >= 4096
    assert stats.pop("wal_bytes") > 0
    assert not any(stats.values())


def test_stats_count_pushes_by_outcome_commits_pulls_and_answers(
    tmp_path: Path,
) -> None:
    with serve(tmp_path, may_log="secret") as live:
        client = live.client()
        client.push(
            note("a"), note("a"), note("b"), {"id": "c", "name": "notes", "args": 7}
        )
        client.push(
            *({"id": code, "name": "refuse", "args": code} for code in REFUSALS)
        )
        client.push({"id": "d", "name": "apply fails"})
        client.pull(), client.pull(), client.pull(scope="new")
        for target, status in (("/sync/snapshot", 200), ("/nowhere", 404)):
            assert client.request("GET", target).status == status
        client.send(b"nonsense\r\n\r\n")
        assert client.response().status == 400
        client.close()
        until(lambda: live.server.stats()["connections"] == 0)
        stats = live.server.stats()
    counted = {name: value for name, value in stats.items() if "_bytes" not in name}
    assert {name: value for name, value in counted.items() if value} == {
        "version": mizusync.__version__,
        "cursor": 9,
        "pushes": 3,
        "applied": 4,
        **dict.fromkeys([*REFUSALS, "internal_error"], 1),
        "commits": 3,
        "pulls_from_memory": 2,
        "pulls_from_disk": 1,
        "answers_2xx": 7,
        "answers_4xx": 2,
    }


def test_stats_tell_of_pushes_that_wait_and_of_those_that_failed(
    tmp_path: Path,
) -> None:
    entered, release = threading.Event(), threading.Event()
    with serve(
        tmp_path, apply=stalled(entered, release), may_log="pushes failed"
    ) as live:
        engine = live.engine
        first = engine.submit([note("a")])
        assert entered.wait(PATIENCE)
        second = engine.submit([note("b")])
        assert live.server.stats()["pushes_waiting"] == 1
        release.set()
        assert first.result(PATIENCE)[0].ok
        assert second.result(PATIENCE)[0].ok
        for file in tmp_path.glob("log.db*"):
            file.unlink()
        with pytest.raises(Unavailable):
            engine.submit([note("c")]).result(PATIENCE)
        stats = live.server.stats()
        assert [
            stats[name] for name in ("pushes_waiting", "pushes_failed", "pushes")
        ] == [0, 1, 2]
        assert (stats["database_bytes"], stats["wal_bytes"]) == (0, 0)


def test_stats_count_hints_sent_and_merged(tmp_path: Path) -> None:
    with serve(tmp_path) as live:
        sessions = [live.socket(), live.socket()]
        for session in sessions:
            session.subscribe()

        def burst() -> (
            None
        ):  # the first is told at once, the others when it may speak again
            for cursor in range(1, 10):
                live.server.hub.hint(f"sync:{DEFAULT}", Hint(cursor, "epoch"))

        live.call(burst)
        for session in sessions:
            while session.read_json()["data"]["cursor"] < 9:
                pass
        hints = live.server.hub.counts
        until(
            lambda: hints["hints_sent"] == len(sessions) * (9 - hints["hints_merged"])
        )
        assert hints.items() <= live.server.stats().items()


def hang_up(client: RawClient, live: Live) -> None:
    client.send_frame(CLOSE, b"\x03\xe9bye")


ENDS: dict[str, tuple[Callable[[RawClient, Live], Any], str]] = {
    "it said goodbye": (hang_up, "the peer closed: 1001 bye"),
    "it is gone": (
        lambda client, live: client.close(),
        "the peer closed the connection",
    ),
    "it broke": (lambda client, live: client.reset(), "reset by peer"),
    "it broke a rule": (lambda client, live: client.send(b"\xff\xff"), "1002 "),
    "it sent bytes": (
        lambda client, live: client.send_frame(BINARY, b"x"),
        "1003 messages are",
    ),
    "the application": (lambda client, live: client.say("enough"), "1008 not any more"),
    "it is deaf": (lambda client, live: None, f"no answer to a ping for {MOMENT:g} s"),
    "the end": (lambda client, live: live.stop(), "1001 the server is stopping"),
}


@table("ending", ENDS)
def test_the_log_says_in_one_line_why_a_session_ended(
    tmp_path: Path, ending: tuple[Callable[[RawClient, Live], Any], str]
) -> None:
    def enough(session: mizusync.Session, topic: str, data: Any) -> None:
        session.close(1008, "not any more")

    end, why = ending
    impatient = replace(SMALL, close_timeout=MOMENT, linger_timeout=MOMENT)
    if "to a ping" in why:
        impatient = replace(impatient, ping_interval=MOMENT, ping_timeout=MOMENT)
    with (
        recorded() as everything,
        serve(tmp_path, impatient, on_message=enough) as live,
    ):
        end(live.socket("/ws?scope=family"), live)
        told: list[str] = until(
            lambda: [t for t in everything.texts if " ended: " in t]
        )
        assert re.match(
            r"INFO mizusync\.live: session \S+ of 'family' ended: ", told[0]
        )
        assert why in told[0]
    assert len([text for text in everything.texts if " ended: " in text]) == 1


def test_health_checks_and_port_scans_make_no_noise(tmp_path: Path) -> None:
    hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"  # TLS, on a port without it
    with (
        recorded() as everything,
        serve(tmp_path, replace(SMALL, head_timeout=MOMENT)) as live,
    ):
        assert live.client().request("GET", "/healthz").status == 200
        for garbage in (
            b"",
            b"\0",
            b"GET",
            hello,
            b"SSH-2.0-x\r\n",
            b"GET / HTTP/1.1\r\n\r\n",
        ):
            live.client().send(garbage)
            live.client().reset()
        until(lambda: sum("no request: " in text for text in everything.texts) >= 4)
    assert [text for text in everything.texts if "GET '/healthz' -> 200" in text]
    assert not [text for text in everything.texts if not text.startswith("DEBUG ")]


def test_the_module_installs_no_handler_and_no_level() -> None:
    for name in (
        "mizusync",
        *(f"mizusync.{part}" for part in ("store", "engine", "http", "live")),
    ):
        logger = logging.getLogger(name)
        assert all(
            isinstance(handler, Records) for handler in logger.handlers
        )  # those are ours
        assert (logger.level, logger.propagate) == (logging.NOTSET, True)
        assert f"`{name}`" in readme("Logs")


def test_more_sessions_than_the_limit_are_unavailable(tmp_path: Path) -> None:
    with serve(tmp_path, replace(SMALL, max_sessions=1)) as live:
        first = live.socket()
        assert refused(live.client().upgrade(), 503)
        first.close()
        until(lambda: live.client().upgrade().status == 101)


def test_more_connections_than_the_limit_are_unavailable(tmp_path: Path) -> None:
    with serve(tmp_path, replace(SMALL, max_connections=2)) as live:
        first, second, third = live.client(), live.client(), live.client()
        assert first.request("GET", "/healthz").status == 200
        assert second.request("GET", "/healthz").status == 200
        assert refused(third.response(), 503)
        assert third.ended()
        third.close()
        assert first.request("GET", "/healthz").status == 200
        second.close()

        def again() -> bool:
            with closing(live.client()) as client:
                return client.request("GET", "/healthz").status == 200

        until(again)


LARGE = (
    2**24
)  # bytes of a page: far more than the kernel takes for a client that does not read


@contextmanager
def unread(live: Live, count: int) -> Iterator[list[RawClient]]:
    """Clients that each ask for a page of LARGE bytes, and do not read it."""
    answered = live.server.stats()["answers_2xx"]
    clients = [live.client(receive_buffer=4096) for _ in range(count)]
    for client in clients:
        client.send(get(b"/sync/pull"))
    until(lambda: live.server.stats()["answers_2xx"] == answered + count)
    yield clients
    for client in clients:
        client.reset()


def test_an_answer_that_nobody_reads_takes_its_own_bytes_alone(tmp_path: Path) -> None:
    with serve(
        tmp_path, Settings(max_tail_size=0)
    ) as live:  # so each page is read from the disk
        push(live.engine, note("a", "x" * LARGE))
        tracemalloc.start()
        try:
            with unread(live, 3):
                held = live.call(
                    lambda: (gc.collect(), tracemalloc.get_traced_memory()[0])[1]
                )
        finally:
            tracemalloc.stop()
        assert (
            2 * LARGE < held < 4 * LARGE
        )  # three answers, and once each of them twice


def test_above_max_unsent_new_requests_are_unavailable_until_somebody_reads(
    tmp_path: Path,
) -> None:
    def say(server: Server) -> None:
        server.route("GET", "/it")(lambda request: b"it")

    with serve(tmp_path, replace(SMALL, max_unsent=LARGE // 2), prepare=say) as live:
        push(live.engine, note("a", "x" * LARGE))
        session, client = live.socket(), live.client()
        for _ in range(2):
            assert client.request("GET", "/sync/pull").status == 200  # and is read
            with unread(live, 1) as (slow,):
                until(lambda: live.server.stats()["unsent_bytes"] > LARGE // 2)
                for target in ("/sync/pull?cursor=1", "/it", "/healthz", "/nowhere"):
                    assert refused(client.request("GET", target), 503)
                assert refused(live.client().request("POST", "/sync/push", BODY), 503)
                assert refused(live.client().upgrade(), 503)
                assert session.quiet()  # who is there already stays
                assert slow.response().status == 200
                until(lambda: live.client().request("GET", "/it").status == 200)
        until(lambda: live.server.stats()["unsent_bytes"] == 0)
        assert [change["cursor"] for change in client.pull()["changes"]] == [1]


@pytest.mark.parametrize(
    "lines", [[], [b"Accept-Encoding: gzip"]], ids=["plain", "gzip"]
)
def test_pulls_that_waited_together_are_answered_up_to_max_unsent(
    tmp_path: Path, lines: list[bytes]
) -> None:
    with serve(
        tmp_path, replace(SMALL, max_unsent=LARGE, max_tail_size=4 * LARGE)
    ) as live:
        live.client().pull()  # from here on they are answered from memory: in one turn
        waiting = [live.client(receive_buffer=4096) for _ in range(8)]
        for client in waiting:
            client.send(get(b"/sync/pull?wait=60", *lines))
        until(lambda: live.server.stats()["pulls_from_memory"] == 8)
        push(live.engine, note("a", "x" * LARGE))
        statuses = [
            client.line().split()[1] for client in waiting
        ]  # and no more is read
        assert sorted(statuses) == [b"200"] + [b"503"] * 7


def test_messages_that_sessions_do_not_read_count_as_unsent(tmp_path: Path) -> None:
    small = replace(SMALL, send_buffer=4096, max_unsent=2**17)
    with joined(tmp_path, small) as (live, join):
        slow = live.socket(receive_buffer=4096)
        join(slow)
        for _ in range(6):
            live.call(live.server.publish, "news", "x" * 2**16)
        until(lambda: live.client().request("GET", "/healthz").status == 503)
        slow.reset()
        until(lambda: live.client().request("GET", "/healthz").status == 200)


def test_an_end_closes_sessions_with_1001_and_answers_who_waits(tmp_path: Path) -> None:
    with serve(tmp_path) as live:
        session, waiting, idle = live.socket(), live.client(), live.client()
        assert idle.request("GET", "/healthz").status == 200
        waiting.send(HEALTHZ + get(b"/sync/pull?wait=60"))
        assert (
            waiting.response().json["status"] == "ok"
        )  # so the other has arrived as well
        live.stop()
        assert session.read_close() == 1001
        assert waiting.response().json["changes"] == []
        assert waiting.ended()
        assert idle.ended()
        with pytest.raises(ConnectionError):
            until(lambda: live.client() is None)


def test_a_push_in_flight_is_answered_before_the_end(tmp_path: Path) -> None:
    entered, release = threading.Event(), threading.Event()
    slow = stalled(entered, release)
    with serve(tmp_path, apply=slow) as live:
        client, session = live.client(), live.socket()
        client.send(post(LENGTH))
        assert entered.wait(PATIENCE)
        live.stop()
        assert session.read_close() == 1001
        release.set()
        assert client.response().json[0]["changes"][0]["data"] == "a"
        assert client.ended()


# Seconds: much less than what would end it otherwise. It may be more (5, for a slow
# machine) once the tests below are not expected to fail any more, and to wait for it.
SOON = 1.0


@pytest.mark.xfail(
    strict=True,
    raises=TimeoutError,
    reason="a stop waits for requests that have not arrived",
)
@table(
    "half", {"a head": b"GET /healthz HTTP/1.1\r\nHost:", "a body": post(LENGTH)[:-1]}
)
def test_a_stop_does_not_wait_for_a_request_that_has_not_arrived(
    tmp_path: Path, half: bytes
) -> None:
    late = 4 * PATIENCE
    settings = replace(
        SMALL, head_timeout=late, body_timeout=late, shutdown_timeout=late
    )
    with serve(tmp_path, settings) as live:
        client = live.client()
        client.send(HEALTHZ + half)
        assert client.response().status == 200  # so the half has arrived as well
        live.stop()
        client.sock.settimeout(SOON)
        while client.sock.recv(65536):  # an answer such as 408, or none
            pass


@pytest.mark.xfail(
    strict=True,
    raises=TimeoutError,
    reason="a pull that waits does not see its client's end",
)
def test_a_pull_that_waits_ends_at_its_clients_end_and_a_half_close_gets_the_page(
    client: RawClient,
) -> None:
    client.send(get(b"/sync/pull?wait=60"))
    client.half_close()
    client.sock.settimeout(SOON)
    assert client.response().json["changes"] == []
    assert client.ended()


@pytest.mark.xfail(
    strict=True,
    raises=TimeoutError,
    reason="a pull that waits keeps its client's connection",
)
def test_a_client_that_goes_while_its_pull_waits_keeps_no_connection(
    server: Live,
) -> None:
    clients = [server.client() for _ in range(20)]
    for client in clients:
        client.send(HEALTHZ + get(b"/sync/pull?wait=60"))
        assert client.response().status == 200  # so the pull has arrived as well
        client.close()
    deadline = time.monotonic() + SOON
    while server.call(server.server.stats)["connections"]:
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.01)


@pytest.mark.xfail(
    strict=True,
    raises=(ConnectionError, EOFError),
    reason="who waits to be accepted is reset at a stop",
)
def test_who_has_connected_and_asked_before_a_stop_is_answered(server: Live) -> None:
    entered, release = threading.Event(), threading.Event()

    def hold_and_stop() -> None:
        entered.set()
        release.wait(PATIENCE)
        server.stopping.set()

    server.loop.call_soon_threadsafe(hold_and_stop)
    assert entered.wait(PATIENCE)
    clients = [server.client() for _ in range(20)]  # the kernel's: nobody accepts them
    for client in clients:
        client.send(HEALTHZ)
    release.set()
    assert [client.response().status for client in clients] == [200] * len(clients)


@contextmanager
def resolving(name: str, *addresses: str) -> Iterator[None]:
    """Let the resolver know this name, which has these addresses."""
    resolve = socket.getaddrinfo

    def getaddrinfo(host: Any, *details: Any, **options: Any) -> Any:
        if host != name:
            return resolve(host, *details, **options)
        return [one for host in addresses for one in resolve(host, *details, **options)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", getaddrinfo)
        yield


def has_address(host: str) -> bool:
    """Return whether this machine can listen on the address."""
    with suppress(OSError):
        ((family, *_, address),) = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
        with socket.socket(family) as sock:
            sock.bind(address)
            return True
    return False


@pytest.mark.xfail(
    strict=True,
    raises=ConnectionRefusedError,
    reason="it listens on a name's first address only",
)
def test_a_server_listens_on_every_address_of_a_name_that_the_machine_has(
    engine: Engine,
) -> None:
    mine = [host for host in ("127.0.0.1", "127.0.0.2", "::1") if has_address(host)]
    if len(mine) == 1:
        pytest.skip("this machine has one loopback address")

    async def connect() -> None:
        async with Server(engine).listen("both.localhost", 0) as address:
            assert address[0] == mine[0]
            for host in mine:  # on one port
                socket.create_connection((host, address[1]), PATIENCE).close()

    with resolving(
        "both.localhost", mine[0], "192.0.2.1", *mine[1:]
    ):  # not the machine's
        ask(connect())


def link_local_address() -> str:
    """Return an address of this machine that needs its interface's name; or skip."""
    if (known := Path("/proc/net/if_inet6")).exists():
        for line in known.read_text().splitlines():
            digits, *_, interface = line.split()
            host = ":".join(re.findall("....", digits)) + f"%{interface}"
            if digits.startswith("fe80") and has_address(host):
                return host
    pytest.skip("this machine has no link-local address")


@pytest.mark.xfail(
    strict=True, raises=OSError, reason="the interface of an address is dropped"
)
def test_a_server_listens_on_a_link_local_address_with_its_interface(
    engine: Engine,
) -> None:
    host = link_local_address()

    async def connect() -> None:
        async with Server(engine, token="s3cret").listen(host, 0) as address:
            socket.create_connection((host, address[1]), PATIENCE).close()

    ask(connect())


def test_what_was_acknowledged_is_there_after_a_restart(tmp_path: Path) -> None:
    with serve(tmp_path) as live:
        results = live.client().push(note("a", 1), note("b", 2, scope="s"))
        epoch = live.client().pull()["epoch"]
    with serve(tmp_path) as live:
        client = live.client()
        assert client.pull()["changes"] == results[0]["changes"]
        assert client.push(note("b", scope="s")) == [results[1] | {"duplicate": True}]
        (result,) = client.push(note("c"))
        assert result["cursor"] > results[1]["cursor"]
        # An ordinary restart disturbs nobody.
        assert (
            len(client.pull(cursor=results[1]["cursor"], epoch=epoch)["changes"]) == 1
        )


def test_a_cursor_that_a_restored_copy_never_gave_out_is_unknown(
    tmp_path: Path,
) -> None:
    with serve(tmp_path) as live:
        live.client().push(note("a"))
    copy = {file: file.read_bytes() for file in tmp_path.glob("log.db*")}
    with serve(tmp_path) as live:
        (lost,) = live.client().push(note("b"))
        epoch = live.client().pull()["epoch"]
    for file in tmp_path.glob("log.db*"):
        file.unlink()
    for file, data in copy.items():
        file.write_bytes(data)
    with serve(tmp_path) as live:
        client = live.client()
        client.push(note("c"), note("d"))  # the copy has grown past the cursor again
        reply = client.request(
            "GET", f"/sync/pull?cursor={lost['cursor']}&epoch={epoch}"
        )
        assert refused(reply, 410, code="cursor_unknown")


def test_a_client_that_does_not_read_its_answers_is_dropped(tmp_path: Path) -> None:
    with serve(tmp_path, replace(SMALL, send_timeout=MOMENT)) as live:
        push(live.engine, note("a", "x" * 2**19))
        before = live.tasks()
        greedy = live.client(receive_buffer=4096)
        greedy.send(get(b"/sync/pull") * 100)
        until(lambda: live.server.stats()["answers_2xx"])
        until(lambda: live.tasks() <= before)


RUDE_UPGRADE = get(b"/ws", KEY, *UPGRADE)
RUDE = [
    b"",
    b"GET /hea",
    HEALTHZ * 20,
    post(LENGTH, body=BODY[:5]),
    get(b"/sync/pull?wait=60"),
    RUDE_UPGRADE + masked(TEXT, b'{"topic": "subscribe", "data": {}}'),
    RUDE_UPGRADE + masked(TEXT, b"x" * 300)[:100],
    RUDE_UPGRADE + masked(CLOSE, b""),
]


def test_requests_that_came_together_leave_others_their_turn(tmp_path: Path) -> None:
    answered: list[int] = []  # how many, and how many when something else had its turn
    elsewhere: list[int] = []

    def answer(request: mizusync.Request) -> None:
        answered.append(len(answered))
        if len(answered) == 1:
            asyncio.get_running_loop().call_soon(
                lambda: elsewhere.append(len(answered))
            )

    with serve(
        tmp_path, prepare=lambda server: server.route("GET", "/it")(answer)
    ) as live:
        client = live.client()
        client.send(get(b"/it") * 500)
        for _ in range(500):
            assert client.response().status == 200
        assert elsewhere[0] < 5


def test_a_client_that_goes_before_its_answers_floods_no_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with serve(tmp_path) as live:
        before = live.tasks()
        for _ in range(20):
            client = live.client()
            client.send(get(b"/it") * 1000)
            client.reset()
        until(lambda: live.tasks() <= before)
    assert not [one for one in caplog.messages if "socket.send" in one]


def test_refused_upgrades_of_a_client_that_goes_leave_no_connection(
    tmp_path: Path,
) -> None:
    with serve(tmp_path, token="s3cret") as live:
        for _ in range(5):
            client = live.client(receive_buffer=4096)
            client.sock.settimeout(MOMENT)
            with suppress(TimeoutError):
                client.send(RUDE_UPGRADE * 2000)
            client.reset()
        with closing(
            live.client()
        ) as last:  # when it is heard, all of them were accepted
            assert last.request("GET", "/healthz").status == 200
        until(lambda: live.server.stats()["connections"] == 0)


def test_http_client_of_the_standard_library_is_served(server: Live) -> None:
    with closing(
        http.client.HTTPConnection(*server.address, timeout=PATIENCE)
    ) as connection:
        headers = {"Content-Type": "application/json"}
        connection.request(
            "POST", "/sync/push", iter([BODY[:9], BODY[9:]]), headers
        )  # in chunks
        assert json.load(connection.getresponse())[0]["ok"]
        connection.request("GET", "/sync/pull")
        reply = connection.getresponse()
        assert len(json.load(reply)["changes"]) == 1
        assert not reply.will_close
        connection.request("HEAD", "/healthz")
        assert connection.getresponse().read() == b""
        connection.request("DELETE", "/healthz")
        assert connection.getresponse().status == 405


def test_a_refused_client_that_stays_is_closed_after_the_linger(tmp_path: Path) -> None:
    with serve(tmp_path, replace(SMALL, linger_timeout=MOMENT)) as live:
        client = live.client()
        client.send(b"nonsense\r\n\r\n")
        assert refused(client.response(), 400)
        until(lambda: live.server.stats()["connections"] == 0)


def test_a_server_that_is_cancelled_twice_leaves_nothing_behind(engine: Engine) -> None:
    server, addresses, entered = Server(engine), list[Any](), asyncio.Event()

    @server.route("GET", "/hang")
    async def hang(request: mizusync.Request) -> None:
        entered.set()
        await asyncio.Event().wait()

    async def listen() -> None:
        async with server.listen("127.0.0.1", 0) as address:
            addresses.append(address)
            await asyncio.Event().wait()

    async def go() -> None:
        listening = asyncio.create_task(listen())
        while not addresses:
            await asyncio.sleep(0)
        with closing(RawClient(addresses[0])) as client:
            client.send(get(b"/hang"))
            await entered.wait()
            for _ in range(2):
                listening.cancel()
                await asyncio.sleep(MOMENT)  # in which it waits for that
            with pytest.raises(asyncio.CancelledError):
                await listening
        assert server.stats()["connections"] == 0
        async with server.listen("127.0.0.1", 0):
            pass

    ask(go())


def test_a_client_that_does_not_shake_hands_in_tls_is_closed_in_time(
    tmp_path: Path,
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)

    def over_tls(server: Server) -> None:
        listen = functools.partial(server.listen, ssl=context)
        setattr(server, "listen", listen)  # noqa: B010

    with serve(tmp_path, replace(SMALL, head_timeout=MOMENT), prepare=over_tls) as live:
        assert live.client().ended()


def test_no_more_readers_read_at_once_than_the_limit(tmp_path: Path) -> None:
    entered, most, release = list[str](), list[int](), threading.Event()

    def slow(db: Any, scope: str) -> None:
        entered.append(scope)
        most.append(len(entered))
        release.wait(PATIENCE)
        entered.remove(scope)

    with serve(tmp_path, replace(SMALL, readers=2), snapshot=slow) as live:
        clients = [live.client() for _ in range(5)]
        for number, client in enumerate(clients):
            client.send(get(b"/sync/snapshot?scope=%d" % number))
        until(lambda: len(entered) == 2)
        assert (
            live.client().request("GET", "/nowhere").status == 404
        )  # all five have been heard
        release.set()
        assert [client.response().status for client in clients] == [200] * 5
        assert max(most) == 2


def test_memory_holds_no_more_of_the_log_than_the_limit(tmp_path: Path) -> None:
    few = Settings(max_tail_size=10_000)
    with closing(
        Engine(tmp_path / "log", apply=apply, schema=SCHEMA, settings=few)
    ) as engine:
        push(
            engine,
            *(note(str(number), "x" * 3000, scope=str(number)) for number in range(9)),
        )
        for number in range(9):
            assert len(pull(engine, scope=str(number))["changes"]) == 1
        assert engine.counts["pulls_from_memory"] <= 3


def test_a_transaction_takes_nothing_more_once_its_time_is_over(tmp_path: Path) -> None:
    entered, release = threading.Event(), threading.Event()
    slow = stalled(entered, release)
    at_once = Settings(max_commit_time=0.0)
    with closing(Engine(tmp_path / "log", apply=slow, settings=at_once)) as engine:
        futures = [engine.submit([note("first")])]
        assert entered.wait(PATIENCE)
        futures += [engine.submit([note(str(number))]) for number in range(3)]
        release.set()
        assert all(future.result(PATIENCE)[0].ok for future in futures)
        assert engine.counts["commits"] == 4


def test_rude_clients_leave_nothing_behind(tmp_path: Path) -> None:
    # The end of what a client sends is not the end of its waiting: that has a time of
    # its own.
    with serve(tmp_path, replace(SMALL, max_pull_wait=MOMENT, readers=1)) as live:

        def rudeness(times: int) -> tuple[int, int]:
            for number in range(times):
                client = live.client()
                client.send(RUDE[number % len(RUDE)])
                client.reset() if number % 3 else client.close()
            # Accepted after all of them, and read from disk after all that they asked
            # for.
            with closing(live.client()) as last:
                last.pull(scope=f"of {times}")
            until(lambda: live.server.stats()["connections"] == 0)
            until(lambda: live.tasks() <= tasks)
            assert live.server.stats()["sessions"] == 0
            live.clients.pop_all()
            live.call(gc.collect)
            return len(os.listdir("/dev/fd")), tracemalloc.get_traced_memory()[0]

        tasks = live.tasks()
        tracemalloc.start()
        try:
            before, after = rudeness(40), rudeness(120)
        finally:
            tracemalloc.stop()
        assert after[0] <= before[0]
        assert (
            after[1] - before[1] < 120 * 600
        )  # bytes: a connection forgotten would be thousands


LINUX = pytest.mark.skipif(
    sys.platform != "linux", reason="counts descriptors in /proc"
)


@LINUX
def test_a_program_without_descriptors_serves_who_is_there_and_lets_others_wait(
    tmp_path: Path,
) -> None:
    with program("--db", str(tmp_path / "todos.db")) as running, ExitStack() as stack:

        def come() -> RawClient:
            return stack.enter_context(closing(RawClient(running.address)))

        def spent() -> int:
            return sum(
                map(
                    int,
                    (process / "stat").read_text().rpartition(") ")[2].split()[11:13],
                )
            )

        process, errors = Path(f"/proc/{running.process.pid}"), running.process.stderr
        first, limit = come(), len(os.listdir(process / "fd")) + 20
        first.push(todo("create", id="1", title="x"))
        resource.prlimit(running.process.pid, resource.RLIMIT_NOFILE, (limit, limit))
        others, waiting = [come() for _ in range(20)], come()
        waiting.send(HEALTHZ)
        assert errors is not None
        watchdog = threading.Timer(PATIENCE, running.process.kill)
        watchdog.start()
        assert "new clients wait" in until(lambda: faults(errors.readline()))
        watchdog.cancel()
        for target in ("/sync/snapshot?scope=list", "/sync/pull?scope=new", "/healthz"):
            assert (
                first.request("GET", target).status == 200
            )  # the log can still be opened
        before = spent()
        assert first.pull(scope="new", wait=0.4)["changes"] == []
        assert spent() - before < os.sysconf("SC_CLK_TCK") / 10  # nothing spins
        for _ in range(20):  # there is room, and there is none, again and again
            others.pop(0).close()
            others.append(come())
            first.pull(scope="new", wait=0.01)
        assert first.push(todo("create", id="2", title="y"))[0]["ok"]
        for client in (*others, first):
            client.close()
        assert waiting.response().status == 200
        waiting.close()
        status, _, complained = running.end(signal.SIGTERM)
        assert (status, faults(complained).count("\n") <= 1) == (0, True), complained


# --- Todo -----------------------------------------------------------------------------
# The demo, which is an application like any other.


@pytest.fixture
def todos(tmp_path: Path) -> Iterator[RawClient]:
    engine = Engine(
        tmp_path / "todo.db",
        apply=mizusync.apply_todo,
        snapshot=mizusync.snapshot_todos,
        schema=mizusync.TODO_SCHEMA,
        settings=SMALL,
    )
    with serving(engine) as live:
        yield live.client()


def todo(name: str, **args: Any) -> dict[str, Any]:
    return {
        "id": os.urandom(8).hex(),
        "scope": "list",
        "name": f"todo.{name}",
        "args": args,
    }


def test_todos_are_made_changed_toggled_and_deleted(todos: RawClient) -> None:
    results = todos.push(
        todo("create", id="1", title=" Buy milk\n"),
        todo("update", id="1", title="Buy bread"),
        todo("update", id="1", completed=True),
        todo("toggle", id="1"),
        todo("delete", id="1"),
    )

    def state(title: str, completed: bool) -> dict[str, Any]:
        return {"id": "1", "title": title, "completed": completed}

    assert [result["changes"][0]["data"] for result in results] == [
        {"op": "create", "todo": state(" Buy milk\n", False)},
        {"op": "update", "todo": state("Buy bread", False)},
        {"op": "update", "todo": state("Buy bread", True)},
        {"op": "update", "todo": state("Buy bread", False)},
        {"op": "delete", "id": "1"},
    ]


def test_a_snapshot_of_todos_is_in_the_order_of_creation_and_of_one_scope(
    todos: RawClient,
) -> None:
    made = [todo("create", id=key, title=f"todo {key}") for key in "cab"]
    todos.push(
        *made,
        todo("toggle", id="a"),
        todo("create", id="c", title="else") | {"scope": "two"},
    )
    data = todos.request("GET", "/sync/snapshot?scope=list").json["data"]
    assert data == {
        "todos": [
            {"id": "c", "title": "todo c", "completed": False},
            {"id": "a", "title": "todo a", "completed": True},
            {"id": "b", "title": "todo b", "completed": False},
        ]
    }


BAD_TODOS = {
    "a known id": (todo("create", id="1", title="again"), "conflict"),
    "an unknown id to update": (todo("update", id="2", title="x"), "not_found"),
    "an unknown id to toggle": (todo("toggle", id="2"), "not_found"),
    "an unknown id to delete": (todo("delete", id="2"), "not_found"),
    "an empty title": (todo("create", id="2", title=""), "invalid_mutation"),
    "a title of 1,001": (todo("create", id="2", title="x" * 1001), "invalid_mutation"),
    "a title of no string": (todo("create", id="2", title=7), "invalid_mutation"),
    "no title": (todo("create", id="2"), "invalid_mutation"),
    "no id": (todo("create", title="x"), "invalid_mutation"),
    "an id of no string": (todo("delete", id=[1]), "invalid_mutation"),
    "an empty title in an update": (
        todo("update", id="1", title=""),
        "invalid_mutation",
    ),
    "completed of no boolean": (
        todo("update", id="1", completed="yes"),
        "invalid_mutation",
    ),
    "no args": (todo("toggle") | {"args": None}, "invalid_mutation"),
    "another name": (todo("rename", id="1"), "invalid_mutation"),
}


def test_a_todo_that_cannot_be_is_refused(todos: RawClient) -> None:
    todos.push(todo("create", id="1", title="x" * 1000))
    results = todos.push(*(mutation for mutation, _ in BAD_TODOS.values()))
    codes = {name: code for name, (_, code) in BAD_TODOS.items()}
    assert (
        dict(zip(BAD_TODOS, (result["code"] for result in results), strict=True))
        == codes
    )
    assert (
        len(todos.request("GET", "/sync/snapshot?scope=list").json["data"]["todos"])
        == 1
    )


# --- Command line ---------------------------------------------------------------------
# The program as a user starts it, in a process of its own.

PROGRAM = Path(mizusync.__file__)


def faults(complained: str) -> str:
    """What stands on stderr, but for what asyncio's debug mode says of a slow
    machine."""
    slow = r"^(?:.* WARNING asyncio )?Executing <.* took [0-9.]+ seconds\n"
    return re.sub(slow, "", complained, flags=re.M)


@contextmanager
def held(address: tuple[str, int]) -> Iterator[None]:
    """Nobody else gets the address of a program that has gone, and will come back."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(address)  # and never listens
        yield


class Program:
    """`python mizusync.py` on a port of its own; what it said, and who answers
    there."""

    def __init__(
        self,
        *arguments: str,
        file: Path | None = None,
        folder: Path | None = None,
        **environment: str,
    ) -> None:
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-X",
                "dev",
                str(file or PROGRAM),
                "--port",
                "0",
                *arguments,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=folder,
            env={"PATH": os.environ["PATH"], "LANG": "C.UTF-8", **environment},
        )
        assert self.process.stdout is not None
        watchdog = threading.Timer(PATIENCE, self.process.kill)
        watchdog.start()
        self.line = self.process.stdout.readline()
        watchdog.cancel()
        found = re.search(r"https?://([^:/]+):(\d+)/", self.line)
        assert found, (self.line, self.process.communicate())
        self.address = (found[1], int(found[2]))

    def end(self, number: int) -> tuple[int, str, str]:
        """Its exit status after this signal, and what else it said."""
        self.process.send_signal(number)
        said, complained = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, said, faults(complained)


@contextmanager
def program(*arguments: str, **options: Any) -> Iterator[Program]:
    running = Program(*arguments, **options)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.communicate()


def run_to_its_end(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PROGRAM), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE, check=False
    )


class Refusal(NamedTuple):
    status: int
    sentence: str


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Callable[..., Refusal]:
    """How the program ends that can't run, called in this process: a start takes
    long."""

    def main(*arguments: str) -> Refusal:
        try:
            status: Any = mizusync.main(["--port", "0", *arguments])
        except SystemExit as end:
            status = end.code
        said, complained = capsys.readouterr()
        assert (said, complained[-1:]) == ("", "\n")
        return Refusal(status, complained)

    return main


def test_the_program_says_in_one_line_where_to_open_the_page_and_wants_a_scope(
    path: Path,
) -> None:
    with program("--db", str(path)) as running:
        assert running.line == (
            f"mizusync {mizusync.__version__}:"
            f" open http://127.0.0.1:{running.address[1]}/ (data in {path})\n"
        )
        with closing(RawClient(running.address)) as client:
            assert client.request("GET", "/healthz").json["status"] == "ok"
            assert refused(client.upgrade("/ws"), 401)


LOCKED_OUT = """
import mizusync

settings = mizusync.Settings(busy_timeout=600, shutdown_timeout=1)
engine = mizusync.Engine("log.db", apply=lambda db, mutation: [], settings=settings)
server = mizusync.Server(engine)
server.run("127.0.0.1", 0, announce=lambda line: print(line, flush=True))
"""


def test_a_stop_waits_for_no_other_process_s_lock(tmp_path: Path) -> None:
    script = tmp_path / "locked_out.py"
    script.write_text(LOCKED_OUT)
    environment = {"PYTHONPATH": str(PROGRAM.parent)}
    with (
        program(file=script, folder=tmp_path, **environment) as running,
        closing(sqlite3.connect(tmp_path / "log.db", isolation_level=None)) as db,
        closing(RawClient(running.address)) as pusher,
        closing(RawClient(running.address)) as witness,
    ):
        db.execute("BEGIN IMMEDIATE")
        body = json.dumps([note("1")]).encode()
        head = [
            b"POST /sync/push HTTP/1.1",
            b"Host: localhost",
            b"Content-Type: application/json",
        ]
        pusher.send(raw(*head, b"Content-Length: %d" % len(body), body=body))
        assert witness.request("GET", "/healthz").status == 200
        status, _, complained = running.end(
            signal.SIGTERM
        )  # which has PATIENCE, and not 600 s
        assert status == 0
        assert "the writer did not end in time" in complained


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_program_in_order(tmp_path: Path, number: int) -> None:
    with (
        program("--db", str(tmp_path / "todos.db")) as running,
        closing(RawClient(running.address)) as session,
        closing(RawClient(running.address)) as waiting,
    ):
        assert session.upgrade("/ws?scope=list").status == 101
        waiting.send(HEALTHZ + get(b"/sync/pull?wait=60"))
        assert waiting.response().status == 200
        session.subscribe()
        running.process.send_signal(number)
        assert session.read_close() == 1001
        assert waiting.response().json["changes"] == []
        waiting.close()
        said, complained = running.process.communicate(timeout=PATIENCE)
        assert (running.process.returncode, said) == (0, "")
        assert "Traceback" not in complained
        assert not (tmp_path / "todos.db-wal").exists()  # it was checkpointed


def test_a_second_signal_ends_the_program_at_once(tmp_path: Path) -> None:
    with (
        program("--db", str(tmp_path / "todos.db")) as running,
        closing(RawClient(running.address)) as session,
    ):
        assert session.upgrade("/ws?scope=list").status == 101
        running.process.send_signal(signal.SIGTERM)
        assert (
            session.read_frame().opcode == CLOSE
        )  # which is not answered: the server waits
        started = time.monotonic()
        assert "Traceback" not in running.end(signal.SIGTERM)[2]
        assert time.monotonic() - started < Settings().close_timeout / 2


WAITING_LONG = """
import functools, mizusync, sys
settings = mizusync.Settings(busy_timeout=600, shutdown_timeout=600)
todo = {"apply": mizusync.apply_todo, "schema": mizusync.TODO_SCHEMA}
engine = mizusync.Engine(sys.argv[-1], **todo, settings=settings)
mizusync.Server(engine).run("127.0.0.1", 0, functools.partial(print, flush=True))
"""


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(
            signal.SIGINT,
            marks=pytest.mark.xfail(
                strict=True,
                raises=subprocess.TimeoutExpired,
                reason="a second SIGINT waits for the writer, which waits for its lock",
            ),
        ),
    ],
)
def test_a_second_signal_ends_a_program_whose_writer_waits_for_a_lock(
    tmp_path: Path, number: int
) -> None:
    path, file = tmp_path / "todos.db", tmp_path / "server.py"
    file.write_text(WAITING_LONG)
    with (
        program(
            "--db", str(path), file=file, PYTHONPATH=str(PROGRAM.parent)
        ) as running,
        closing(RawClient(running.address)) as session,
        closing(RawClient(running.address)) as pusher,
        closing(sqlite3.connect(path, isolation_level=None)) as other,
    ):
        assert session.upgrade().status == 101
        other.execute("BEGIN IMMEDIATE")
        pusher.send(HEALTHZ + post(LENGTH))
        assert pusher.response().status == 200  # so the push has arrived as well
        running.process.send_signal(number)
        assert session.read_frame().opcode == CLOSE  # the first was seen
        running.process.send_signal(number)
        patience = SOON if number == signal.SIGINT else PATIENCE
        assert running.process.wait(patience) != 0


def test_kill_9_and_a_restart_keep_everything(tmp_path: Path) -> None:
    arguments = ("--db", str(tmp_path / "todos.db"))
    with program(*arguments) as running, closing(RawClient(running.address)) as client:
        sent = [todo("create", id=str(number), title="x") for number in range(50)]
        results = [client.push(one)[0] for one in sent]
        epoch = client.pull()["epoch"]
        running.process.kill()
    with program(*arguments) as running, closing(RawClient(running.address)) as client:
        assert client.push(*sent) == [
            result | {"duplicate": True} for result in results
        ]
        page = client.pull(scope="list", epoch=epoch)
        assert page["changes"] == [
            change for result in results for change in result["changes"]
        ]
        taken = client.request("GET", "/sync/snapshot?scope=list").json
        assert len(taken["data"]["todos"]) == 50


@pytest.mark.parametrize("how", ["an argument", "the environment"])
def test_the_program_takes_a_token_origins_and_hosts(path: Path, how: str) -> None:
    allowed = ("--allow-origin", "https://app.example", "--allow-host", "sync.example")
    token = ("--token", "s3cret") if how == "an argument" else ()
    environment = {} if token else {"MIZUSYNC_TOKEN": "s3cret"}
    headers = {"Host": "sync.example", "Origin": "https://app.example"}
    with program("--db", str(path), *allowed, *token, **environment) as running:
        assert "s3cret" not in running.line
        with closing(RawClient(running.address)) as client:
            assert refused(client.request("GET", "/sync/pull", headers=headers), 401)
            headers |= {"Authorization": "Bearer s3cret"}
            reply = client.request("GET", "/sync/pull", headers=headers)
            assert reply.status == 200
            assert reply.headers["access-control-allow-origin"] == "https://app.example"
        assert "s3cret" not in running.end(signal.SIGTERM)[2]


@pytest.mark.parametrize("how", ["an argument", "the environment"])
def test_an_empty_token_is_exit_2(
    how: str, refusal: Callable[..., Refusal], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIZUSYNC_TOKEN", "")
    token = ("--token", "") if how == "an argument" else ()
    status, sentence = refusal("--db", NOWHERE, *token)
    assert (status, "MIZUSYNC_TOKEN" in sentence) == (2, True)


@pytest.mark.parametrize("token", ["two words", "YWJj/Q=="])
def test_a_token_that_a_browser_cannot_show_is_exit_2_and_not_printed(
    token: str, refusal: Callable[..., Refusal]
) -> None:
    status, sentence = refusal("--db", NOWHERE, "--token", token)
    assert (status, token in sentence) == (2, False)


OPEN = "is open to anybody"


@table("case", {"beyond": ("0.0.0.0", (), 1), "loopback": ("127.0.0.1", (), 0),
                "with a token": ("0.0.0.0", ("--token", "s3cret"), 0)})  # fmt: skip
def test_the_program_warns_once_where_anybody_may_use_it(path: Path, case: Any) -> None:
    host, token, warnings = case
    with program("--db", str(path), "--host", host, *token) as running:
        assert running.end(signal.SIGTERM)[2].count(OPEN) == warnings


@table("case", {"beyond": ("0.0.0.0", {}, 1), "loopback": ("127.0.0.1", {}, 0),
                "with a token": ("0.0.0.0", {"token": "s3cret"}, 0),
                "with on_auth": ("0.0.0.0", {"on_auth": Doors().now}, 0)})  # fmt: skip
def test_a_server_warns_once_where_anybody_may_use_it(
    engine: Engine, case: Any
) -> None:
    host, options, warnings = case

    async def listen() -> None:
        async with Server(engine, **options).listen(host, 0):
            pass

    with recorded() as everything:
        ask(listen())
    assert len([text for text in everything.texts if OPEN in text]) == warnings


@pytest.mark.parametrize("name", ["donn\u00e9es.db", "\U0001f375.db"])
def test_a_name_that_the_output_cannot_show_is_announced_with_escapes(
    tmp_path: Path, name: str
) -> None:
    path = tmp_path / name
    with (
        program("--db", str(path), PYTHONIOENCODING="ascii") as running,
        closing(RawClient(running.address)) as client,
    ):
        assert name.encode("ascii", "backslashreplace").decode() in running.line
        assert client.request("GET", "/healthz").status == 200
        assert running.end(signal.SIGTERM)[0] == 0
    assert path.exists()


def test_an_announcement_that_nobody_reads_stops_nothing(tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        address = holder.getsockname()
    command = [
        sys.executable,
        str(PROGRAM),
        "--db",
        str(tmp_path / "todos.db"),
        "--port",
    ]
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as output:
        running = subprocess.Popen([*command, str(address[1])], stdout=output)
    try:

        def answers() -> bool:
            assert running.poll() is None
            with (
                suppress(ConnectionRefusedError),
                closing(RawClient(address)) as client,
            ):
                return client.request("GET", "/healthz").status == 200
            return False

        until(answers)
        running.send_signal(signal.SIGTERM)
        assert running.wait(PATIENCE) == 0
    finally:
        running.kill()
        running.wait()


def test_a_log_that_nobody_reads_stops_nothing_and_holds_no_exit(
    tmp_path: Path,
) -> None:
    arguments = ("--db", str(tmp_path / "todos.db"), "--log-level", "debug")
    with program(*arguments) as running, closing(RawClient(running.address)) as client:
        for _ in range(300):  # some 1,000 bytes of log each; a pipe holds 64 KiB
            assert client.request("GET", "/" + "x" * 900).status == 404
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(PATIENCE) == 0
        _, complained = running.process.communicate(timeout=PATIENCE)
        assert complained.count("x' -> 404") > 30


def test_what_was_logged_before_an_end_in_order_is_written(tmp_path: Path) -> None:
    arguments = ("--db", str(tmp_path / "todos.db"), "--log-level", "debug")
    with program(*arguments) as running, closing(RawClient(running.address)) as client:
        for number in range(500):
            assert refused(client.request("GET", f"/{number}"), 404)
        status, _, complained = running.end(signal.SIGTERM)
        logged = re.findall(r"GET '/([0-9]+)' -> 404", complained)
        assert (status, logged) == (0, [str(number) for number in range(500)])


def test_an_exit_waits_for_what_was_logged_where_somebody_reads() -> None:
    reader, writer = os.pipe()
    handler = mizusync.LogWriter(writer)
    for number in range(mizusync.LOG_LINES):  # more than a pipe holds
        handler.handle(logging.makeLogRecord({"msg": f"{number} {'x' * 1000}"}))
    with os.fdopen(reader, "rb") as output, ThreadPoolExecutor(1) as pool:
        reading = pool.submit(output.read)
        handler.flush()  # which the logging module calls at exit
        os.close(writer)
        assert reading.result(PATIENCE).count(b"\n") == mizusync.LOG_LINES


def test_a_log_that_is_read_again_says_how_much_of_it_was_dropped() -> None:
    reader, writer = os.pipe()
    handler = mizusync.LogWriter(writer)
    os.set_blocking(reader, False)
    with os.fdopen(reader, "rb") as output, os.fdopen(writer, "wb"):
        for number in range(3 * mizusync.LOG_LINES):  # much more than a pipe holds
            handler.handle(logging.makeLogRecord({"msg": f"{number} {'x' * 100}"}))
        text = bytearray()

        def dropped() -> int:
            text.extend(output.read() or b"")
            found = re.findall(rb"^([0-9]+) log lines were dropped", text, re.M)
            return sum(map(int, found))

        until(
            lambda: (
                dropped() + len(re.findall(rb"^[0-9]+ x+$", text, re.M))
                == 3 * mizusync.LOG_LINES
            )
        )
        assert dropped() > 0


OLDER = [*Path.home().glob(".pyenv/versions/3.[89].*/bin/python"),
         *Path.home().glob(".pyenv/versions/3.10.*/bin/python")]  # fmt: skip


def test_a_python_that_is_too_old_is_told_so_in_one_sentence() -> None:
    # The file has to parse there, or nothing of it runs.
    ast.parse(PROGRAM.read_text(encoding="utf-8"), feature_version=(3, 10))
    older = "import runpy, sys; sys.version_info = (3, 10, 13, 'final', 0)\n"
    ways = {
        f"runpy.run_path({str(PROGRAM)!r}, run_name='__main__')": "",
        f"runpy.run_path({str(PROGRAM)!r})": "ImportError: ",
    }
    for way, kind in ways.items():
        command = [sys.executable, "-c", older + way]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
        assert (done.returncode, done.stdout) == (1, "")
        sentence = faults(done.stderr).splitlines()[-1]
        assert sentence.startswith(f"{kind}mizusync needs Python 3.11 or newer")
        assert bool(kind) == ("Traceback" in done.stderr)


@pytest.mark.parametrize("python", OLDER, ids=lambda python: python.parts[-3])
def test_an_older_python_is_told_which_one_is_needed(python: Path) -> None:
    command = [str(python), str(PROGRAM)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout) == (1, "")
    assert "3.11 or newer" in done.stderr


def test_the_program_tells_its_version() -> None:
    done = run_to_its_end("--version")
    assert (done.returncode, done.stdout) == (0, f"mizusync {mizusync.__version__}\n")


def test_the_file_alone_says_that_its_page_is_not_there(tmp_path: Path) -> None:
    file = Path(shutil.copy(PROGRAM, tmp_path))
    with (
        program("--db", str(tmp_path / "todos.db"), file=file) as running,
        closing(RawClient(running.address)) as client,
    ):
        reply = client.request("GET", "/")
        assert (reply.status, b"demo.html" in reply.body) == (200, True)


def test_a_path_without_its_slash_is_refused(engine: Engine) -> None:
    with pytest.raises(ValueError, match="slash"):
        Server(engine).route("GET", "noslash")(print)


def test_a_host_that_can_be_none_is_one_sentence(tmp_path: Path) -> None:
    done = run_to_its_end("--host", "127.0.0..1", "--db", str(tmp_path / "todos.db"))
    assert (done.returncode, done.stdout, faults(done.stderr).count("\n")) == (1, "", 1)
    assert "127.0.0..1" in done.stderr


def test_a_busy_port_is_one_sentence(tmp_path: Path, server: Live) -> None:
    port = str(server.address[1])
    done = run_to_its_end("--port", port, "--db", str(tmp_path / "todos.db"))
    assert (done.returncode, done.stdout, faults(done.stderr).count("\n")) == (1, "", 1)
    assert port in done.stderr


def test_a_bad_argument_is_exit_2(refusal: Callable[..., Refusal]) -> None:
    for arguments in (["--port", "99999"], ["--port", "web"], ["--nonsense"], ["x"]):
        assert refusal(*arguments).status == 2


@table(
    "content",
    {
        "another program's database": None,
        "text": b"no database at all\n" * 100,
        "a cut head": b"SQLite format 3\0" + bytes(99),
    },
)
def test_a_file_that_is_not_ours_is_one_sentence_and_unchanged(
    tmp_path: Path, path: Path, content: bytes | None, refusal: Callable[..., Refusal]
) -> None:
    if content:
        path.write_bytes(content)
    else:
        make_database(path, "CREATE TABLE invoices (n INTEGER)")
    before = path.read_bytes()
    status, sentence = refusal("--db", str(path))
    assert (status, sentence.count("\n")) == (1, 1)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before


def test_a_write_ahead_log_without_its_file_is_one_sentence(
    tmp_path: Path, refusal: Callable[..., Refusal]
) -> None:
    status, sentence = refusal("--db", str(orphan(tmp_path)))
    assert (status, sentence.count("\n")) == (1, 1)
    assert "-wal exists, and" in sentence


def test_a_folder_that_is_not_there_or_not_writable_is_one_sentence(
    tmp_path: Path, refusal: Callable[..., Refusal]
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "locked").mkdir(mode=0o500)
    paths = [
        tmp_path / "nowhere" / "todos.db",
        tmp_path / "file" / "todos.db",
        tmp_path,
    ]
    if os.geteuid() != 0:  # root may write everywhere
        paths += [tmp_path / "locked" / "todos.db"]
    for path in paths:
        status, sentence = refusal("--db", str(path))
        assert (status, sentence.count("\n")) == (1, 1)


def test_a_certificate_that_is_not_there_is_one_sentence(
    tmp_path: Path, refusal: Callable[..., Refusal]
) -> None:
    files = (
        "--certfile",
        str(tmp_path / "c.pem"),
        "--keyfile",
        str(tmp_path / "k.pem"),
    )
    status, sentence = refusal("--db", str(tmp_path / "t.db"), *files)
    assert (status, sentence.count("\n")) == (1, 1)


@pytest.mark.parametrize("host", [b"", b"Host: a b\r\n"])
def test_a_target_in_absolute_form_does_not_excuse_a_bad_host(
    client: RawClient, host: bytes
) -> None:
    client.send(b"GET http://localhost/healthz HTTP/1.1\r\n" + host + b"\r\n")
    assert refused(client.response(), 400)


def make_certificate(folder: Path) -> tuple[str, str]:
    if (openssl := shutil.which("openssl")) is None:
        pytest.skip("no openssl to make a certificate with")
    key, certificate = str(folder / "key.pem"), str(folder / "certificate.pem")
    make = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    named = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = [openssl, *make.split(" "), *named, "-keyout", key, "-out", certificate]
    subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE)
    return key, certificate


@contextmanager
def serve_tls(
    folder: Path,
    settings: Settings,
    prepare: Callable[[Server], Any] = lambda server: None,
    **options: Any,
) -> Iterator[tuple[Live, Callable[[], RawClient]]]:
    """A server over TLS, and what makes clients of it; none has much room for what it
    reads."""
    key, certificate = make_certificate(folder)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    trusting = ssl.create_default_context(cafile=certificate)

    def over_tls(server: Server) -> None:
        listen = functools.partial(server.listen, ssl=context)
        setattr(server, "listen", listen)  # noqa: B010
        prepare(server)

    def make_client() -> RawClient:
        client = live.client(receive_buffer=4096)
        client.sock = trusting.wrap_socket(client.sock, server_hostname="127.0.0.1")
        return client

    with serve(folder, settings, prepare=over_tls, **options) as live:
        yield live, make_client


def test_pulls_that_wait_end_with_their_client_over_tls(tmp_path: Path) -> None:
    settings, may_log = replace(SMALL, max_pull_wait=MOMENT), "SSL connection is closed"
    with serve_tls(tmp_path, settings, may_log=may_log) as (live, make_client):
        client = make_client()
        client.send(get(b"/sync/pull?wait=60") * 4000)  # which would take minutes
        assert client.response().status == 200
        socket.socket.shutdown(
            client.sock, socket.SHUT_WR
        )  # a FIN; TLS has no half of a close
        until(lambda: live.server.stats()["connections"] == 0)


def test_a_session_ends_with_its_peer_over_tls_though_the_application_hangs(
    tmp_path: Path,
) -> None:
    async def hang(session: mizusync.Session, topic: str, data: Any) -> None:
        await asyncio.Event().wait()

    settings = replace(
        SMALL, ping_interval=MOMENT, ping_timeout=MOMENT, shutdown_timeout=1.0
    )
    with serve_tls(tmp_path, settings, on_message=hang) as (live, make_client):
        client = make_client()
        assert client.upgrade().status == 101
        for _ in range(20):  # more than is read ahead
            client.say("hello", "x" * 10_000)
        socket.socket.shutdown(client.sock, socket.SHUT_WR)
        client.close()
        until(lambda: live.server.stats()["sessions"] == 0)


def test_a_raw_websocket_that_only_sends_ends_with_its_peer_over_tls(
    tmp_path: Path,
) -> None:
    async def pour(websocket: Any) -> None:
        while True:
            await websocket.send("x")

    def prepare(server: Server) -> None:
        server.websocket("/it")(pour)

    may_log = "SSL connection is closed|socket.send"
    with serve_tls(tmp_path, SMALL, prepare, may_log=may_log) as (live, make_client):
        client = make_client()
        assert client.upgrade("/it").status == 101
        client.send(masked(TEXT, b"x" * 100_000))  # more than is read ahead
        socket.socket.shutdown(client.sock, socket.SHUT_WR)
        until(lambda: live.server.stats()["connections"] == 0)
        assert len(live.records.texts) < 100


def test_who_does_not_shake_hands_does_not_hold_the_end_over_tls(
    tmp_path: Path,
) -> None:
    with serve_tls(tmp_path, replace(SMALL, shutdown_timeout=PATIENCE * 3)) as (
        live,
        _,
    ):
        live.client()
        until(lambda: live.server.stats()["connections"] == 1)


def test_slow_sessions_that_reset_are_no_fault_over_tls(tmp_path: Path) -> None:
    joined = list[mizusync.Session]()

    def on_message(session: mizusync.Session, topic: str, data: Any) -> None:
        joined.append(session)

    with serve_tls(tmp_path, SMALL, on_message=on_message) as (live, make_client):
        clients = [make_client() for _ in range(10)]
        for client in clients:
            assert client.upgrade().status == 101
            client.say("join")
        until(lambda: len(joined) == len(clients))
        for _ in range(30):  # their sockets are full
            for session in joined:
                live.call(session.send, "news", "x" * 20_000)
        for client in clients:
            client.reset()
        until(lambda: live.server.stats()["connections"] == 0)


def test_a_large_answer_reaches_who_reads_it_slowly_over_tls(tmp_path: Path) -> None:
    def prepare(server: Server) -> None:
        server.route("GET", "/it")(lambda request: b"x" * 4_000_000)

    with serve_tls(tmp_path, replace(SMALL, linger_timeout=MOMENT), prepare) as (
        _,
        make_client,
    ):
        client = make_client()
        client.send(get(b"/it", b"Connection: close"))
        started, whole = time.monotonic(), bytearray()
        while piece := client.sock.recv(16384):
            whole += piece
            due = started + 3 * MOMENT * len(whole) / 4_000_000
            while time.monotonic() < due:  # it reads on and on, but slowly
                time.sleep(0.001)
        assert len(whole.partition(b"\r\n\r\n")[2]) == 4_000_000


def test_the_program_speaks_tls(tmp_path: Path) -> None:
    key, certificate = make_certificate(tmp_path)
    arguments = (
        "--db",
        str(tmp_path / "todos.db"),
        "--certfile",
        certificate,
        "--keyfile",
        key,
    )
    context = ssl.create_default_context(cafile=certificate)
    with program(*arguments) as running, closing(RawClient(running.address)) as client:
        assert "open https://" in running.line
        client.sock = context.wrap_socket(client.sock, server_hostname="127.0.0.1")
        origin = {"Origin": "https://{}:{}".format(*running.address)}
        assert client.push(todo("create", id="1", title="x"), headers=origin)[0]["ok"]
        with closing(
            RawClient(running.address)
        ) as other:  # a refusal is heard, to the last byte
            other.sock = context.wrap_socket(other.sock, server_hostname="127.0.0.1")
            other.send(post(CHUNKED, body=b""))
            for _ in range(100):
                other.send(b"ea60\r\n%b\r\n" % (b"x" * 60_000))
            assert refused(other.response(), 413)
        with closing(
            RawClient(running.address)
        ) as other:  # and so is why a WebSocket is closed
            other.sock = context.wrap_socket(other.sock, server_hostname="127.0.0.1")
            assert other.upgrade("/ws?scope=list", origin).status == 101
            other.send(masked(TEXT, b"x" * 8_000_000))
            assert other.read_frame().payload[:2] == (1009).to_bytes(2, "big")
        assert client.upgrade("/ws?scope=list", origin).status == 101
        before = client.subscribe()["data"]["cursor"]
        with closing(RawClient(running.address)) as other:
            other.sock = context.wrap_socket(other.sock, server_hostname="127.0.0.1")
            other.push(todo("create", id="2", title="y"), headers=origin)
        assert client.read_json()["data"]["cursor"] > before > 0
        running.process.send_signal(signal.SIGTERM)
        assert client.read_close() == 1001
        assert running.process.wait(PATIENCE) == 0


# --- README ---------------------------------------------------------------------------
# What it shows is what happens, and its tables name what there is.

UNITS = {"": 1, "s": 1, "KiB": 2**10, "MiB": 2**20}


def readme(heading: str = "") -> str:
    """Its text, or what stands between one of its headings and the next."""
    text = PROGRAM.with_name("README.md").read_text(encoding="utf-8")
    if not heading:
        return text
    found = re.search(
        rf"^#+ {re.escape(heading)}\n((?:```.*?^```$|(?!#+ ).)*)", text, re.M | re.S
    )
    assert found, heading
    return found[1]


def blocks(language: str, heading: str = "") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", readme(heading), re.M | re.S)


def steady(shown: str) -> str:
    """Without what is another one in each run."""
    shown = re.sub(r'"\d{4}-\d\d-\d\dT[0-9:.]+Z"', '"a time"', shown)
    return re.sub(r'"epoch":"[^"]+"', '"epoch":"an epoch"', shown).strip()


def test_the_commands_of_the_readme_print_what_it_shows(tmp_path: Path) -> None:
    if (curl := shutil.which("curl")) is None:
        pytest.skip("no curl to run the examples with")
    # A command ends with its line, but not inside quotes; what follows it is what it
    # prints.
    example = re.compile(r"^\$ ((?:'[^']*'|[^'\n])*)\n((?:(?!\$ ).*\n)*)", re.M)
    (start, line), *requests = example.findall("".join(blocks("console")))
    assert start == "python mizusync.py"
    with program("--db", str(tmp_path / "mizusync.db")) as running:
        port = str(running.address[1])
        assert (
            running.line.replace(f"{tmp_path}{os.sep}", "").replace(port, "8080")
            == line
        )
        for command, shown in requests:
            name, *words = shlex.split(
                command.replace("localhost:8080", f"127.0.0.1:{port}")
            )
            assert name == "curl"
            done = subprocess.run(
                [curl, "-q", "--noproxy", "*", *words],
                capture_output=True,
                timeout=PATIENCE,
                check=True,
            )
            assert steady(done.stdout.decode()) == steady(shown), command
    assert len(requests) > 5


def test_the_backup_of_the_readme_is_a_beginning_of_the_log_while_pushes_go_on(
    tmp_path: Path,
) -> None:
    (command,) = re.findall(r"^python (-c .*VACUUM.*)$", "".join(blocks("sh")), re.M)
    stop = threading.Event()
    acknowledged: list[Any] = []

    def pour() -> None:
        with closing(RawClient(running.address)) as client:
            for number in itertools.count():
                if stop.is_set():
                    return
                acknowledged.extend(
                    client.push(todo("create", id=str(number), title="x" * 500))
                )

    with program("--db", "mizusync.db", folder=tmp_path) as running:
        pouring = threading.Thread(target=pour)
        pouring.start()
        until(lambda: len(acknowledged) > 20)
        before = len(acknowledged)
        subprocess.run(
            [sys.executable, *shlex.split(command)], cwd=tmp_path, check=True
        )
        after = len(acknowledged)
        until(lambda: len(acknowledged) > after + 1)
        stop.set()
        pouring.join(PATIENCE)
    with closing(
        Engine(tmp_path / "backup.db", apply=apply, snapshot=mizusync.snapshot_todos)
    ) as copy:
        log = whole_log(copy, "list")
        assert log == [result["changes"][0] for result in acknowledged][: len(log)]
        assert before <= len(log) < len(acknowledged)
        assert len(ask(copy.snapshot("list")).data["todos"]) == len(log)
    with closing(sqlite3.connect(tmp_path / "backup.db")) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_the_application_of_the_readme_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Server, "run", lambda server, host, port: None)
    (application,) = blocks("python", "An application of your own")
    names: dict[str, Any] = {}
    exec(application, names)
    monkeypatch.undo()
    with serving(names["engine"]) as live:
        client = live.client()
        wish = {
            "scope": "gala",
            "name": "seat.take",
            "args": {"seat": "A1", "holder": "Ann"},
        }
        again = {
            "scope": "gala",
            "name": "seat.take",
            "args": {"seat": "A1", "holder": "Bob"},
        }
        taken, refused, invalid, once = client.push(
            {"id": "1", **wish},
            {"id": "2", **again},
            {"id": "3", "name": "?"},
            {"id": "1", **wish},
        )
        assert taken["changes"][0]["data"] == {"seat": "A1", "holder": "Ann"}
        assert (refused["code"], refused["error"]) == ("conflict", "seat A1 is taken")
        assert (invalid["code"], once["duplicate"]) == ("invalid_mutation", True)
        state = client.request("GET", "/sync/snapshot?scope=gala").json
        assert (state["data"], state["cursor"]) == ({"A1": "Ann"}, taken["cursor"])


def test_the_on_auth_of_the_readme_works(tmp_path: Path) -> None:
    names: dict[str, Any] = {"mizusync": mizusync, "user_of": {"Ann-7": "ann"}.get}
    exec(blocks("python", "Who may")[0], names)
    with serve(tmp_path, on_auth=names["on_auth"]) as live:
        for scope, token, status in (
            ("family", "Ann-7", 200),
            ("user:ann", "Ann-7", 200),
            ("user:ben", "Ann-7", 403),
            ("family", "?", 401),
            ("family", "", 401),
        ):
            shown = {"Authorization": f"Bearer {token}"} if token else {}
            reply = live.client().request(
                "GET", f"/sync/pull?scope={scope}", headers=shown
            )
            assert reply.status == status


@pytest.mark.parametrize("seat", ["A1", "constructor", "__proto__"])
def test_the_page_of_the_readme_shows_a_seat_of_any_name_at_once(seat: str) -> None:
    if (node := shutil.which("node")) is None:
        pytest.skip("no node to run the page's functions with")
    (page,) = blocks("html", "Its page")
    (predict,) = re.findall(r"^  predict: (.+),$", page, re.M)
    mutation = json.dumps({"args": {"seat": seat, "holder": "Ann"}})
    script = f"const predict = {predict}; const mutation = JSON.parse(process.argv[1]);"
    script += "console.log(Object.entries(predict({}, mutation)).join());"
    command = [node, "-e", script, mutation]
    shown = subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE, check=True
    )
    assert shown.stdout == f"{seat},Ann\n"


def test_the_contents_are_the_sections_and_no_section_uses_a_lower_one() -> None:
    source = Path(mizusync.__file__).read_text(encoding="utf-8")
    _, *sections = re.split(r"^# --- (.*?) -+$", source, flags=re.M)
    listed = re.findall(
        r"^    (\S.*?)  +", (mizusync.__doc__ or "").partition("Contents")[2], re.M
    )
    assert listed[: len(sections) // 2] == sections[::2]
    # Tests and the README may be read in any order; the file goes from top to bottom.
    above: set[str] = set()
    defined = re.compile(r"^(?:class|def|async def) (\w+)", re.M)
    everything = set(defined.findall(source))
    for body in sections[1::2]:
        above |= set(defined.findall(body))
        code = "\n".join(line.partition("#")[0] for line in body.split("\n"))
        used = set(
            re.findall(
                r"(?<![.\w\"'`])(\w+)\(", re.sub(r'""".*?"""', "", code, flags=re.S)
            )
        )
        assert used & everything <= above


def test_each_link_inside_the_readme_leads_to_a_heading() -> None:
    text = re.sub(r"^```.*?^```$", "", readme(), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)", text, re.M)
    anchors = {
        re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        for heading in headings
    }
    assert set(re.findall(r"\]\(#([^)]*)\)", text)) <= anchors
    assert len(headings) == len(anchors)


def test_the_readme_has_every_setting_with_its_default() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| (\S+) ?(s|KiB|MiB|) \|", readme("Settings"), re.M
    )
    shown = {
        name: None if number == "none" else float(number) * UNITS[unit]
        for name, number, unit in rows
    }
    assert shown == asdict(Settings())


def test_the_readme_has_every_flag_name_and_code() -> None:
    flags = set(re.findall(r"--[a-z-]+", run_to_its_end("--help").stdout)) - {"--help"}
    assert set(re.findall(r"`(--[a-z-]+)`", readme("Command line"))) == flags
    assert set(mizusync.__all__) <= set(re.findall(r"`(\w+)`", readme("Names")))
    errors = re.findall(r"^\| (\d+) \| `(\w+)` \|", readme(), re.M)
    assert {(int(status), code) for status, code in errors} == {
        *CODES.items(),
        *((410, code) for code in ("cursor_too_old", "cursor_unknown")),
    }


# --- Recipes --------------------------------------------------------------------------
# Each stands in the README, and runs here as it stands there.


# -- With endpoints, a chat and presence of its own


@contextmanager
def recipe(
    heading: str,
    folder: Path,
    number: int = signal.SIGTERM,
    *edits: tuple[str, str],
    **env: str,
) -> Iterator[dict[str, tuple[str, int]]]:
    """The addresses where a recipe's program listens, by the word before; a signal ends
    it well."""
    (text,) = blocks("python", heading)
    for old, new in (("8080", "0"), *edits):
        text = text.replace(old, new)
    (folder / "recipe.py").write_text(text, encoding="utf-8")
    start = "import logging, runpy, signal; logging.basicConfig(level='INFO');"
    # Who runs the tests in the background may have it ignored.
    start += "signal.signal(signal.SIGINT, signal.default_int_handler);"
    start += "runpy.run_path('recipe.py', run_name='__main__')"
    with subprocess.Popen(
        [sys.executable, "-X", "dev", "-c", start],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(PROGRAM.parent), **env},
    ) as process:
        watchdog = threading.Timer(2 * PATIENCE, process.kill)
        watchdog.start()
        assert process.stdout is not None
        said, found = "", dict[str, tuple[str, int]]()
        while len(found) < 1 + text.count("app.run("):
            line = process.stdout.readline()
            assert line, said
            said += line
            for word, host, port in re.findall(r"(\w*) ?http://([0-9.]+):(\d+)", line):
                found[word] = host, int(port)
        try:
            yield found
            process.send_signal(number)
            said += process.communicate(timeout=PATIENCE)[0]
            assert process.returncode == 0, said
            assert not re.search("Traceback|ERROR", said), said
        finally:
            process.kill()
            watchdog.cancel()


def test_the_board_has_notes_that_last_a_chat_and_who_is_there(tmp_path: Path) -> None:
    heading = "With endpoints, a chat and presence of its own"
    with recipe(heading, tmp_path) as found, ExitStack() as stack:
        address = found["open"]
        ann, again, ben, away = (
            stack.enter_context(closing(RawClient(address))) for _ in range(4)
        )
        for client, scope in (
            (ann, "hall"),
            (again, "hall"),
            (ben, "hall"),
            (away, "attic"),
        ):
            assert client.upgrade(f"/ws?scope={scope}").status == 101
        ben.say("say", {"text": "nobody knows me"})
        assert ben.read_json()["topic"] == "error"
        for client, name, present, hearers in (
            (ann, "Ann", ["Ann"], [ann]),
            (ben, "Ben", ["Ann", "Ben"], [ann, ben]),
            (again, "Ann", ["Ann", "Ben"], [ann, ben, again]),
            (away, "Cy", ["Cy"], [away]),
        ):
            client.say("hello", {"name": name})
            for hearer in hearers:
                where = "attic" if client is away else "hall"
                assert hearer.read_json() == {"topic": f"here:{where}", "data": present}
        ben.say("say", {"text": "tea?"})
        for hearer in (ann, again, ben):
            said = {"topic": "chat:hall", "data": {"name": "Ben", "text": "tea?"}}
            assert hearer.read_json() == said
        assert away.quiet()
        again.close()
        assert ben.read_json()["data"] == [
            "Ann",
            "Ben",
        ]  # one of her two pages is still open
        ann.reset()
        assert ben.read_json()["data"] == ["Ben"]
        with closing(RawClient(address)) as client:
            put = {
                "scope": "hall",
                "name": "note.put",
                "args": {"id": "1", "text": "milk"},
            }
            assert client.push({"id": "m", **put}, {"id": "n", "name": "?"})[0]["ok"]
            room = client.request("GET", "/room").json
            assert room == {"notes": {"1": "milk"}, "here": ["Ben"]}
    with (
        recipe(heading, tmp_path) as found,
        closing(RawClient(found["open"])) as client,
    ):
        assert client.request("GET", "/room").json == {
            "notes": {"1": "milk"},
            "here": [],
        }


# -- In a running asyncio program


def test_the_program_does_the_jobs_of_its_clients_and_those_of_an_earlier_run(
    tmp_path: Path,
) -> None:
    def results(client: RawClient) -> list[str]:
        data = [
            change["data"] for change in client.pull(scope="jobs", cursor=0)["changes"]
        ]
        return [change["result"] for change in data if "result" in change]

    heading, quoted = "In a running asyncio program", {"id": "1", "result": "?"}
    run = functools.partial(recipe, heading, tmp_path, signal.SIGINT)
    with run() as found, closing(RawClient(found[""])) as client:
        added, forged, elsewhere = client.push(
            {"id": "1", "scope": "jobs", "name": "job.add", "args": "tea"},
            {"id": "2", "scope": "jobs", "name": "job.done", "args": quoted},
            {"id": "3", "name": "job.add", "args": "tea"},
        )
        assert added["changes"][0]["data"] == {"id": "1", "text": "tea"}
        assert forged["code"] == elsewhere["code"] == "invalid_mutation"
        until(lambda: results(client) == ["TEA"])
    with closing(sqlite3.connect(tmp_path / "jobs.db")) as db, db:
        db.execute(
            "UPDATE jobs SET result = NULL"
        )  # as if that run had ended too early
    with run() as found, closing(RawClient(found[""])) as client:
        until(lambda: results(client) == ["TEA", "TEA"])


# -- Beside Flask or Django


def test_requests_of_flask_push_from_their_threads_and_live_clients_hear_of_it(
    tmp_path: Path,
) -> None:
    pytest.importorskip("flask", reason="no flask to stand beside")

    def order(key: str, dish: str = "soup") -> tuple[int, Any]:
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        with closing(
            http.client.HTTPConnection(*found["on"], timeout=PATIENCE)
        ) as client:
            client.request(
                "POST", "/orders", urlencode({"id": key, "dish": dish}), form
            )
            response = client.getresponse()
            return response.status, json.loads(response.read())

    edit = ('app.run("127.0.0.1", 5000', 'app.run("127.0.0.1", 0')
    with recipe("Beside Flask or Django", tmp_path, signal.SIGINT, edit) as found:
        with (
            closing(RawClient(found["open"])) as session,
            ThreadPoolExecutor(8) as pool,
        ):
            page = {"Origin": "http://127.0.0.1:5000"}
            assert session.upgrade("/ws?scope=main", page).status == 101
            assert session.subscribe()["data"] == {"cursor": 0}
            answers = list(pool.map(order, [str(number % 8) for number in range(24)]))
            assert {status for status, _ in answers} == {200}
            assert sum("duplicate" in result for _, result in answers) == 16
            while session.read_json()["data"]["cursor"] < 8:
                pass  # hints merge
        for key, dish, status in (("8", "", 409), ("", "soup", 400)):
            answer = order(key, dish)
            assert (answer[0], answer[1]["code"]) == (status, "invalid_mutation")
        with closing(
            http.client.HTTPConnection(*found["on"], timeout=PATIENCE)
        ) as client:
            client.request("GET", "/orders")
            assert json.loads(client.getresponse().read()) == {
                str(n): "soup" for n in range(8)
            }


# -- Under FastAPI


FASTAPI_EXTRA = """
import asyncio, dataclasses
from app import app, hub
from fastapi.responses import FileResponse

hub.settings = dataclasses.replace(hub.settings, heartbeat=0.5)

@app.get("/")
def page():
    return FileResponse("demo.html")

@app.get("/load")
async def load():
    followers = {name: len(topic.followers) for name, topic in hub.topics.items()}
    return followers, len(asyncio.all_tasks())
"""
ANN_7 = {"Authorization": "Bearer ann-7"}


TWO_CLIENTS = """
const clients = ["ann", "ben"].map((name) => Object.assign(new SyncClient({
  url: process.argv[2], scope: "demo", initial: { todos: [] },
  predict: (state) => state,
  apply: ({ todos }, { data }) => ({ todos: [...todos, data.todo] }),
}), { name }));
const titles = ({ state }) =>
  state.todos.map(({ title }) => title).filter((t) => t[0] !== "x");
const todo = clients.flatMap((one) => [0, 1].map((n) => [one, `${one.name} ${n}`]));

function look() {
  if (!clients.every((client) => client.status.live)) return;
  for (const [client, title] of todo.splice(0)) {
    client.mutate("todo.create", { id: SyncClient.newId(), title });
  }
  const isDone = (client) => titles(client).length === 4 && !client.status.waiting;
  if (clients.every(isDone)) {
    process.stdout.write(JSON.stringify(clients.map(titles)), () => process.exit(0));
  }
}
for (const client of clients) {
  client.addEventListener("status", look);
  client.addEventListener("change", look);
  client.start({ ann: "ann-7", ben: "ben-8" }[client.name]);
}
"""


@pytest.fixture(scope="module")
def under_fastapi(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[str, int]]:
    """The recipe as uvicorn serves it, with the page and a look inside; where it
    listens."""
    for library in ("fastapi", "uvicorn", "websockets", "httpx"):
        pytest.importorskip(library)
    folder = tmp_path_factory.mktemp("fastapi")
    (folder / "app.py").write_text(
        "".join(blocks("python", "Under FastAPI")), encoding="utf-8"
    )
    (folder / "more.py").write_text(FASTAPI_EXTRA, encoding="utf-8")
    shutil.copy(PROGRAM.with_name("demo.html"), folder)
    # A small buffer of the kernel's, which its connections have from it: so a slow
    # reader shows.
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**16)
    command = [
        sys.executable,
        "-m",
        "uvicorn",
        "more:app",
        "--timeout-keep-alive",
        "60",
    ]
    with (
        listener,
        subprocess.Popen(
            [*command, "--fd", str(listener.fileno())],
            pass_fds=[listener.fileno()],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            cwd=folder,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(PROGRAM.parent)},
        ) as process,
    ):
        said: list[str] = []
        assert process.stderr is not None
        listening = threading.Thread(target=said.extend, args=(process.stderr,))
        listening.start()
        try:
            until(lambda: "running on" in "".join(said) or process.poll() is not None)
            yield listener.getsockname()
            process.terminate()
            process.wait(PATIENCE)
        finally:
            process.kill()
            listening.join(PATIENCE)
    assert "Application shutdown complete" in "".join(said)
    assert not re.search("Traceback|Warning|never retrieved", "".join(said)), "".join(
        said
    )


@contextmanager
def followed(address: tuple[str, int], user: str = "ann-7") -> Iterator[Any]:
    """A WebSocket of the `websockets` library that is subscribed; and the first cursor
    it heard."""
    from websockets.sync.client import connect
    from websockets.typing import Subprotocol

    offers = [Subprotocol("mizusync"), Subprotocol(f"bearer.{user}")]
    with connect(
        "ws://{}:{}/ws?scope=demo".format(*address), subprotocols=offers
    ) as socket:
        assert socket.subprotocol == "mizusync"
        socket.send(json.dumps({"topic": "subscribe", "data": {"changes": True}}))
        yield socket, json.loads(socket.recv(PATIENCE))


def heard(socket: Any, cursor: int) -> Any:
    """The hint that says so; a heartbeat may come before it."""
    while (hint := json.loads(socket.recv(PATIENCE))["data"])["cursor"] < cursor:
        pass
    return hint


def test_under_fastapi_requests_keep_to_the_protocol(
    under_fastapi: tuple[str, int],
) -> None:
    with closing(RawClient(under_fastapi)) as client:

        def get(target: str) -> Reply:
            return client.request("GET", target, headers=ANN_7)

        assert refused(client.request("GET", "/sync/pull?scope=demo"), 401)
        assert refused(client.request("POST", "/sync/push", b"[]"), 401)
        assert refused(client.upgrade("/ws?scope=demo"), 401)
    with closing(RawClient(under_fastapi)) as client:
        assert refused(get("/sync/pull?scope=user:ben"), 403)
        assert refused(client.upgrade("/ws?scope=user:ben", headers=ANN_7), 403)
    with closing(RawClient(under_fastapi)) as client:
        wish = {**todo("create", id="1", title="\u00e9"), "scope": "user:ann"}
        assert refused(
            client.request(
                "POST",
                "/sync/push",
                json.dumps([wish, wish | {"scope": "x"}]).encode(),
                ANN_7,
            ),
            403,
        )
        (first,), (again,) = (client.push(wish, headers=ANN_7) for _ in range(2))
        assert (first["ok"], again) == (True, first | {"duplicate": True})
        assert client.push({**wish, "id": "2"}, headers=ANN_7)[0]["code"] == "conflict"
        reply = get("/sync/pull?scope=user:ann&cursor=0")
        assert reply.json["changes"] == first["changes"]
        assert reply.headers["cache-control"] == "no-store"
        place = urlencode(
            {"cursor": reply.json["cursor"], "epoch": reply.json["epoch"]}
        )
        assert get(f"/sync/pull?scope=user:ann&{place}").json["changes"] == []
        assert refused(
            get("/sync/pull?scope=user:ann&cursor=9999"), 410, code="cursor_unknown"
        )
        assert refused(
            get("/sync/pull?scope=user:ann&cursor=1&epoch=x"),
            410,
            code="cursor_unknown",
        )
        state = get("/sync/snapshot?scope=user:ann").json
        assert state["data"]["todos"] == [first["changes"][0]["data"]["todo"]]
        assert state["cursor"] == first["cursor"]


def test_under_fastapi_the_httpx_library_pushes_pulls_and_waits(
    under_fastapi: tuple[str, int],
) -> None:
    import httpx

    wish = {**todo("create", id="h", title="x"), "scope": "user:ben"}
    token = {"Authorization": "Bearer ben-8"}
    with (
        httpx.Client(
            base_url="http://{}:{}".format(*under_fastapi), headers=token
        ) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        waiting = pool.submit(
            client.get, "/sync/pull?scope=user:ben&wait=60", timeout=PATIENCE
        )
        (result,) = client.post("/sync/push", json=[wish]).json()
        assert waiting.result(PATIENCE).json()["changes"] == result["changes"]


def test_under_fastapi_a_subscriber_hears_the_cursor_at_once_changes_and_a_heartbeat(
    under_fastapi: tuple[str, int],
) -> None:
    with closing(RawClient(under_fastapi)) as client:
        (before,) = client.push(create(scope="demo"), headers=ANN_7)
        with followed(under_fastapi, "ben-8") as (socket, first):
            assert first == {"topic": "sync:demo", "data": {"cursor": before["cursor"]}}
            (result,) = client.push(create(scope="demo"), headers=ANN_7)
            hint = heard(socket, result["cursor"])
            assert hint["changes"] == result["changes"]
            assert hint["after"] == before["cursor"]
            page = client.request("GET", "/sync/pull?scope=demo", headers=ANN_7).json
            assert hint["epoch"] == page["epoch"]
            assert heard(socket, result["cursor"]) == {"cursor": result["cursor"]}


def test_under_fastapi_a_slow_or_gone_socket_hurts_nobody_and_nothing_is_left_of_it(
    under_fastapi: tuple[str, int],
) -> None:
    offer = {"Sec-WebSocket-Protocol": "mizusync, bearer.ann-7"}
    with closing(RawClient(under_fastapi)) as client, ExitStack() as stack:

        def load() -> Any:
            return client.request("GET", "/load", headers=ANN_7).json

        until(lambda: load()[0] == {})
        _, tasks = load()
        slow, gone = (
            stack.enter_context(closing(RawClient(under_fastapi, 4096))) for _ in "12"
        )
        for lazy in (slow, gone):
            assert lazy.upgrade("/ws?scope=demo", offer).status == 101
            lazy.say("subscribe", {"changes": True})
        until(lambda: load()[0] == {"sync:demo": 2})
        with followed(under_fastapi) as (socket, _):
            wishes = [
                create(scope="demo", args={"id": str(n), "title": "x" * 990})
                for n in range(12)
            ]
            client.push(*wishes, headers=ANN_7)
            for number in range(25):  # more than the buffers on the way hold
                for wish in wishes:
                    wish |= {"id": os.urandom(8).hex(), "name": "todo.update"}
                *_, last = client.push(*wishes, headers=ANN_7)
                heard(socket, last["cursor"])
                if number == 10:
                    gone.reset()
            count, cursor = 0, 0
            while cursor < last["cursor"]:
                cursor, count = slow.read_json()["data"]["cursor"], count + 1
            assert count < 25
            assert load()[0] == {"sync:demo": 2}
        slow.reset()
        until(lambda: (now := load())[0] == {} and now[1] <= tasks)


def test_under_fastapi_a_socket_that_says_no_json_is_closed(
    under_fastapi: tuple[str, int],
) -> None:
    offer = {"Sec-WebSocket-Protocol": "mizusync, bearer.ann-7"}
    for opcode, message in ((TEXT, b"{"), (BINARY, b"{}")):
        with closing(RawClient(under_fastapi)) as socket:
            assert socket.upgrade("/ws?scope=demo", offer).status == 101
            socket.send_frame(opcode, message)
            assert socket.read_close() == 1003


def test_under_fastapi_two_clients_of_the_pages_script_converge(
    under_fastapi: tuple[str, int], tmp_path: Path
) -> None:
    if (node := shutil.which("node")) is None:
        pytest.skip("no node to run the page's script with")
    with closing(RawClient(under_fastapi)) as client:
        page = client.request("GET", "/").body.decode()
    (part,) = re.findall(r"^// === Part one.*(?=^// === Part two)", page, re.M | re.S)
    (tmp_path / "two.mjs").write_text(part + TWO_CLIENTS, encoding="utf-8")
    address = "http://{}:{}/".format(*under_fastapi)
    done = subprocess.run(
        [node, "--experimental-websocket", "--no-warnings", "two.mjs", address],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done
    one, other = json.loads(done.stdout)
    assert one == other
    assert sorted(one) == ["ann 0", "ann 1", "ben 0", "ben 1"]


# -- Users and tokens


def test_tokens_open_what_is_ones_own_and_shared_as_long_as_they_may(
    tmp_path: Path,
) -> None:
    def enter(path: str, user: str, password: str) -> Reply:
        body = json.dumps({"user": user, "password": password}).encode()
        return guest.request("POST", path, body)

    def bearer(token: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {token}"}

    def status(scope: str, token: str) -> int:
        return guest.request(
            "GET", f"/sync/pull?scope={scope}", headers=bearer(token)
        ).status

    def wish(key: str, scope: str, name: str, args: Any) -> dict[str, Any]:
        return {"id": key, "scope": scope, "name": name, "args": args}

    # The test has no 10 s to wait for.
    edit, secret = ("auth_interval=10", "auth_interval=0.1"), "a secret" * 4
    with (
        recipe(
            "Users and tokens", tmp_path, signal.SIGTERM, edit, SECRET=secret
        ) as found,
        closing(RawClient(found["open"])) as guest,
        closing(RawClient(found["open"])) as session,
    ):
        assert enter("/register", "ann", "pass-a").status == 200
        ben = enter("/register", "ben", "pass-b").json["token"]
        assert refused(enter("/register", "ann", "mine"), 409)
        for user, password in (("ann", "pass-b"), ("ann", ""), ("cy", "pass-a")):
            assert refused(enter("/login", user, password), 401)
        for user in ("", "a.b", "Ann", "a/b", "a" * 33):
            assert refused(enter("/register", user, "p"), 400)
        ann = enter("/login", "ann", "pass-a").json["token"]
        assert re.fullmatch(r"[A-Za-z0-9._~-]+", ann)
        past = f"ann.{int(time.time()) - 1}"
        late = (
            f"{past}.{hmac.new(secret.encode(), past.encode(), 'sha256').hexdigest()}"
        )
        other = ann[:-1] + ("0" if ann[-1] != "0" else "1")
        for token in (
            "",
            "x",
            "..",
            late,
            other,
            ann.replace("ann", "ben"),
            f"{ann}.",
            ann[:-1],
        ):
            assert status("ann/diary", token) == 401
        # Of her own, and shared.
        assert (
            status("ann/diary", ann),
            status("ann/diary", ben),
            status("a", ann),
        ) == (
            200,
            403,
            403,
        )
        shop = wish("1", "ann/shop", "invite", "ben")
        assert guest.push(shop, headers=bearer(ben))[0]["code"] == "forbidden"
        assert guest.push(shop, headers=bearer(ann))[0]["ok"]
        added, inviting, forged = guest.push(
            wish("2", "ann/shop", "add", "milk"),
            wish("3", "ann/shop", "invite", "cy"),
            wish("4", "ben/x", "register", ["cy", "", ""]),
            headers=bearer(ben),
        )
        assert added["changes"][0]["data"] == {"item": "milk", "by": "ben"}
        assert inviting["code"] == forged["code"] == "invalid_mutation"
        # The same on a socket, until it ends.
        protocols = {"Sec-WebSocket-Protocol": f"mizusync, bearer.{ben}"}
        assert session.upgrade("/ws?scope=ann/shop", protocols).status == 101
        assert session.subscribe()["data"]["cursor"] == added["cursor"]
        assert session.subscribe(scope="ann/diary")["data"]["code"] == "forbidden"
        with closing(sqlite3.connect(tmp_path / "lists.db")) as db, db:
            db.execute("DELETE FROM members")
        assert session.read_close() == 1008
        assert status("ann/shop", ben) == 403


# -- A client in Python


# what an application makes of them: each page, or decision, as a line
PYTHON_CLIENTS = {
    "follow": """
        import json, sys
        from client import follow
        url, cursor, epoch = sys.argv[1:]
        for page in follow(url, "list", int(cursor), epoch):
            print(json.dumps(page), flush=True)
    """,
    "live": """
        import asyncio, json, sys
        from live import follow
        url, cursor, epoch = sys.argv[1:]
        async def main():
            async for page in follow(url, "list", int(cursor), epoch):
                print(json.dumps(page), flush=True)
        asyncio.run(main())
    """,
    "push": """
        import json, sys
        from client import push
        for decided in push(sys.argv[1], map(json.loads, sys.stdin)):
            print(json.dumps(decided), flush=True)
    """,
}


class Way:
    """A way to a server that may move; it cuts the next answer that has these bytes in
    half."""

    target: tuple[str, int]

    def __init__(self) -> None:
        self.cut = b""
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = "http://{}:{}".format(*self.listener.getsockname())
        self.thread = threading.Thread(target=self.accept, daemon=True)
        self.thread.start()

    def accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                threading.Thread(target=self.carry, args=(client,), daemon=True).start()

    def carry(self, client: socket.socket) -> None:
        with suppress(OSError), client:
            try:
                server = socket.create_connection(self.target)
            except OSError:  # as a proxy says it
                client.recv(65536)
                client.sendall(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")
                return
            with server:
                back = threading.Thread(
                    target=self.pour, args=(server, client), daemon=True
                )
                back.start()
                self.pour(client, server)
                back.join(PATIENCE)

    def pour(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if self.cut and self.cut in data:
                    self.cut = b""
                    target.sendall(data[: len(data) // 2])
                    break
                target.sendall(data)
        for end in (
            source,
            target,
        ):  # also who waits for the other in the thread beside
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join(PATIENCE)


class Reader:
    """One of these programs, and the lines that it has said."""

    def __init__(self, folder: Path, name: str, *arguments: str) -> None:
        self.said: list[Any] = []
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-X",
                "dev",
                "-c",
                textwrap.dedent(PYTHON_CLIENTS[name]),
                *arguments,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=folder,
            env={
                "PATH": os.environ["PATH"],
                "WEBSOCKETS_BACKOFF_INITIAL_DELAY": "0.2",
                "WEBSOCKETS_BACKOFF_MIN_DELAY": "0.2",
            },
        )
        self.thread = threading.Thread(target=self.read)
        self.thread.start()

    def read(self) -> None:
        assert self.process.stdout is not None
        self.said.extend(map(json.loads, self.process.stdout))

    def write(self, *values: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.writelines(json.dumps(value) + "\n" for value in values)
        self.process.stdin.flush()

    def stop(self) -> None:
        self.process.kill()
        self.thread.join(PATIENCE)

    def close(self) -> None:
        """It never ends, nor complains, by itself."""
        self.stop()
        _, complained = self.process.communicate(timeout=PATIENCE)
        assert (self.process.returncode, faults(complained)) == (-signal.SIGKILL, "")


def fold_pages(pages: Iterable[Any]) -> tuple[dict[str, Any], int]:
    """The list after these pages, and their number of snapshots; nothing is in them
    twice."""
    todos: dict[str, Any] = {}
    cursor, snapshots = 0, 0
    for page in list(pages):
        if "data" in page:
            todos, snapshots = (
                {one["id"]: one for one in page["data"]["todos"]},
                snapshots + 1,
            )
            cursor = page["cursor"]
            continue
        for change in page["changes"]:
            assert change["cursor"] > cursor, "twice, or back"
            cursor = change["cursor"]
            todos[change["data"]["todo"]["id"]] = change["data"]["todo"]
        assert page["cursor"] == cursor
    return todos, snapshots


@pytest.mark.parametrize("name", ["follow", "live"])
def test_a_client_in_python_misses_nothing_and_has_nothing_twice(
    tmp_path: Path, name: str
) -> None:
    if name == "live":
        pytest.importorskip("websockets")
    for file, text in zip(
        ("client", "live"), blocks("python", "A client in Python"), strict=True
    ):
        (tmp_path / f"{file}.py").write_text(text, encoding="utf-8")
    path, copy = tmp_path / "todos.db", tmp_path / "copy.db"
    pages, servers = list[Any](), list[Program]()

    def start() -> None:
        servers.append(stack.enter_context(program("--db", str(path))))
        way.target = servers[-1].address

    def kill() -> None:
        servers[-1].process.kill()
        servers[-1].process.wait()

    def agreed(snapshots: int) -> bool:
        """Whether the follower has what the server has."""
        with closing(RawClient(way.target)) as client:
            state = client.request("GET", "/sync/snapshot?scope=list").json["data"][
                "todos"
            ]
        return fold_pages(pages + follower.said) == (
            {one["id"]: one for one in state},
            snapshots,
        )

    with ExitStack() as stack:
        way = stack.enter_context(closing(Way()))
        start()
        pusher = stack.enter_context(closing(Reader(tmp_path, "push", way.address)))
        first = Reader(tmp_path, name, way.address, "0", "")
        follower = stack.enter_context(closing(first))

        # An answer to a push is lost, and one with changes.
        way.cut = b'"ok":true'
        pusher.write(*(create() for _ in range(3)))
        until(lambda: len(pusher.said) == 3)
        assert [result.get("duplicate") for _, result in pusher.said] == [
            True,
            None,
            None,
        ]
        until(lambda: agreed(0))
        way.cut = b'"hasMore"' if name == "follow" else b'"after"'
        pusher.write(create())
        until(lambda: agreed(0) and not way.cut)

        # The server is killed in the middle; meanwhile the follower's program ends, and
        # begins again from the place that it had kept.
        pusher.write(*(create() for _ in range(40)))
        until(lambda: len(pusher.said) > 10)
        kill()
        follower.stop()
        pages += follower.said
        place = str(pages[-1]["cursor"]), pages[-1]["epoch"]
        second = Reader(tmp_path, name, way.address, *place)
        follower = stack.enter_context(closing(second))
        start()
        until(lambda: len(pusher.said) == 44 and agreed(0))
        ids = [mutation["id"] for mutation, result in pusher.said if result["ok"]]
        assert len(set(ids)) == 44

        # While it is away, the log goes on and is trimmed: it takes a snapshot. The
        # file is copied.
        kill()
        application: dict[str, Any] = {
            "apply": mizusync.apply_todo,
            "schema": mizusync.TODO_SCHEMA,
        }
        with closing(
            Engine(path, **application, snapshot=mizusync.snapshot_todos)
        ) as engine:
            push(engine, create(), create())
            ask(engine.trim("list", ask(engine.current("list")) + 1))
        shutil.copy(path, copy)
        start()
        until(lambda: agreed(1))

        # It sees more, and then an older database is in the place of this one.
        pusher.write(create())
        until(lambda: len(pusher.said) == 45 and agreed(1))
        kill()
        for suffix in ("-wal", "-shm"):
            path.with_name(path.name + suffix).unlink()
        shutil.copy(copy, path)
        if name == "follow":  # it has even grown past the follower's cursor
            with closing(Engine(path, **application)) as engine:
                push(engine, create(), create())
        start()
        until(lambda: agreed(2))
        pusher.write(create())
        until(lambda: len(pusher.said) == 46 and agreed(2))


# -- Behind nginx


class Front(NamedTuple):
    """An nginx, as the README configures it; only the ports and the paths are
    others."""

    port: int
    trusting: ssl.SSLContext

    def client(self) -> RawClient:
        client = RawClient(("127.0.0.1", self.port))
        client.sock = self.trusting.wrap_socket(
            client.sock, server_hostname="127.0.0.1"
        )
        return client


def fitted(text: str, places: Mapping[str, str]) -> str:
    for there, here in places.items():
        assert text.count(there) == 1, there
        text = text.replace(there, here)
    return text


@contextmanager
def nginx(folder: Path, upstream: int) -> Iterator[Front]:
    if (
        command := shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    ) is None:
        pytest.skip("no nginx to go through")
    key, certificate = make_certificate(folder)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (text,) = blocks("nginx", "Behind nginx")
    places = {
        "443 ssl": f"127.0.0.1:{port} ssl",
        "127.0.0.1:8080": f"127.0.0.1:{upstream}",
        "/etc/ssl/sync.example.pem": certificate,
        "/etc/ssl/sync.example.key": key,
        "/var/log/nginx": str(folder),
    }
    for kind in (
        "client_body",
        "proxy",
        "fastcgi",
        "uwsgi",
        "scgi",
    ):  # only root may use its own
        places["http {"] = (
            f"{places.get('http {', 'http {')} {kind}_temp_path {folder}/{kind};"
        )
    (folder / "nginx.conf").write_text(fitted(text, places))
    errors = folder / "error.log"
    here = ["-p", str(folder), "-c", "nginx.conf", "-e", str(errors)]
    process = subprocess.Popen(
        [command, *here, "-g", f"daemon off; pid {folder}/nginx.pid;"],
        stderr=subprocess.DEVNULL,
    )
    front = Front(port, ssl.create_default_context(cafile=certificate))

    def listens() -> bool:
        assert process.poll() is None, errors.read_text()
        with suppress(ConnectionRefusedError), closing(front.client()):
            return True
        return False

    try:
        until(listens)
        yield front
    finally:
        process.terminate()
        process.wait(PATIENCE)


NAMED = {"Host": "sync.example"}


@pytest.fixture(scope="module")
def fronted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Live, Front]]:
    folder = tmp_path_factory.mktemp("nginx")
    with (  # other tests' records reach it, too
        serve(folder, allow_host=["sync.example"], may_log=".") as live,
        nginx(folder, live.address[1]) as front,
    ):
        yield live, front


def test_nginx_passes_on_pushes_pulls_that_wait_and_snapshots(
    fronted: tuple[Live, Front],
) -> None:
    live, front = fronted
    with closing(front.client()) as client, closing(front.client()) as waiting:
        named = {"Host": f"sync.example:{front.port}"}
        origin = {"Origin": f"https://sync.example:{front.port}"}
        (first,) = client.push(note("a", scope="s"), headers=named | origin)
        before = live.engine.counts["pulls_from_memory"]
        waiting.send(get(b"/sync/pull?scope=s&wait=60&cursor=%d" % first["cursor"]))
        until(
            lambda: live.engine.counts["pulls_from_memory"] > before
        )  # it found nothing
        (second,) = client.push(note("b", scope="s"))
        assert waiting.response().json["changes"] == second["changes"]
        assert client.request("GET", "/sync/snapshot?scope=s").json["data"] == [
            None,
            None,
        ]
        evil = {"Host": "evil.example"}
        assert refused(client.request("GET", "/sync/pull", headers=evil), 403)
        assert client.request("GET", "/metrics").status == 404


def test_nginx_keeps_its_connections_to_the_server(fronted: tuple[Live, Front]) -> None:
    live, front = fronted
    with closing(front.client()) as client:
        assert client.request("GET", "/healthz").status == 200
        first = set(live.server._connections)
        for _ in range(10):
            assert client.request("GET", "/healthz").status == 200
        assert first & set(live.server._connections)


def test_nginx_speaks_http_2_to_who_does(
    fronted: tuple[Live, Front], tmp_path: Path
) -> None:
    curl, name = shutil.which("curl"), f"sync.example:{fronted[1].port}"
    if (
        not curl
        or b"HTTP2" not in subprocess.run([curl, "-qV"], capture_output=True).stdout
    ):
        pytest.skip("no curl that speaks HTTP/2")
    (tmp_path / "headers").write_text(
        f"Origin: https://{name}\nContent-Type: application/json\n"
    )
    options = (
        f"-qsk --http2 --noproxy * --resolve {name}:127.0.0.1 -H @{tmp_path}/headers"
    )
    push = [
        *options.split(" "),
        "-w",
        "%{http_version}",
        "-d",
        "[{}]",
        f"https://{name}/sync/push",
    ]
    done = subprocess.run(
        [curl, *push], capture_output=True, timeout=PATIENCE, check=True
    )
    assert b'"invalid_mutation"' in done.stdout
    assert done.stdout.endswith(b"]2")


def test_nginx_passes_on_a_socket_and_its_end(fronted: tuple[Live, Front]) -> None:
    library = pytest.importorskip("websockets.sync.client")
    live, front = fronted
    address = f"wss://127.0.0.1:{front.port}/ws?scope=hints"
    with (
        library.connect(address, ssl=front.trusting) as socket,
        closing(front.client()) as client,
    ):
        socket.send('{"topic": "subscribe", "data": {}}')
        assert json.loads(socket.recv(PATIENCE))["data"] == {"cursor": 0}
        (result,) = client.push(note("a", scope="hints"))
        told = {"topic": "sync:hints", "data": {"cursor": result["cursor"]}}
        assert json.loads(socket.recv(PATIENCE)) == told
        with closing(front.client()) as other:
            assert other.upgrade("/ws?scope=hints").status == 101
            until(lambda: live.server.stats()["sessions"] == 2)
            other.reset()  # it is gone without a word
        until(lambda: live.server.stats()["sessions"] == 1)
    until(lambda: live.server.stats()["sessions"] == 0)


def test_what_is_too_large_for_nginx_is_refused_as_the_server_would(
    fronted: tuple[Live, Front],
) -> None:
    _, front = fronted
    frame = len(json.dumps([note("large", "")]))
    for size, status in ((2**20, 200), (2**20 + 1, 413)):
        body = json.dumps([note("large", "x" * (size - frame))]).encode()
        with closing(front.client()) as client:
            reply = client.request("POST", "/sync/push", body)
            assert reply.status == status
    assert refused(reply, 413)


def test_behind_nginx_a_server_may_go_and_come_back(tmp_path: Path) -> None:
    arguments = ["--db", str(tmp_path / "todos.db"), "--port"]
    with ExitStack() as stack:
        running = stack.enter_context(program(*arguments, "0"))
        port = str(running.address[1])
        client = stack.enter_context(
            closing(stack.enter_context(nginx(tmp_path, int(port))).client())
        )
        (result,) = client.push(todo("create", id="1", title="x"))
        running.process.kill()
        running.process.wait(PATIENCE)
        assert refused(client.request("POST", "/sync/push", b"[]"), 503)
        with held(running.address), program(*arguments, port):
            assert client.pull(scope="list")["changes"] == result["changes"]
            assert client.push(todo("create", id="2", title="y"))[0]["ok"]


def test_the_numbers_of_the_recipe_fit_the_settings() -> None:
    limits, found = Settings(), readme("Behind nginx")

    def number(name: str) -> int:
        return int(
            re.findall(
                rf"^ *{name}[ =](\d+)[sm]?(?:;|$)", re.sub(" +#.*", "", found), re.M
            )[0]
        )

    assert number("proxy_read_timeout") > max(
        limits.max_pull_wait, limits.ping_interval
    )
    assert number("keepalive_timeout") < limits.idle_timeout
    assert number("client_max_body_size") << 20 == limits.max_body_size
    assert number("worker_connections") >= 2 * limits.max_connections
    assert number("worker_rlimit_nofile") >= 2 * number("worker_connections")
    assert number("LimitNOFILE") > limits.max_connections + 100


def test_the_service_and_the_container_start_what_there_is(tmp_path: Path) -> None:
    (unit,), (container,) = (
        blocks(kind, "Behind nginx") for kind in ("ini", "dockerfile")
    )
    (start,) = re.findall(r"^ExecStart=(.+)", unit, re.M)
    (entry,) = re.findall(r"^ENTRYPOINT (.+)", container, re.M)
    for _, script, *arguments in (shlex.split(start), json.loads(entry)):
        assert (script, mizusync.parse_args(arguments).port) == (
            "/srv/mizusync.py",
            8080,
        )
    assert "EnvironmentFile=/" in unit  # with a "-" a missing file would mean: no token
    if (analyze := shutil.which("systemd-analyze")) is None:
        pytest.skip("no systemd-analyze to check the unit with")
    service = tmp_path / "mizusync.service"
    service.write_text(fitted(unit, {"/usr/bin/python3": sys.executable}))
    done = subprocess.run(
        [analyze, "verify", service], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_endpoint_for_prometheus_says_what_it_reads(tmp_path: Path) -> None:
    (recipe,) = blocks("python", "Behind nginx")
    names: dict[str, Any] = {"mizusync": mizusync}
    with serve(
        tmp_path, prepare=lambda server: exec(recipe, names | {"server": server})
    ) as live:
        live.client().push(note("a"), note("b"), note("b"))
        reply = live.client().request("GET", "/metrics")
        assert reply.headers["content-type"] == "text/plain; version=0.0.4"
        # https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format
        family = r"# TYPE (mizusync_(\w+?)(_total)?) (counter|gauge)\n\1 (\d+)\n"
        assert re.sub(family, "", text := reply.body.decode()) == ""
        found = {
            name: (kind, int(n)) for _, name, _, kind, n in re.findall(family, text)
        }
        assert (found["applied"], found["cursor"]) == (("counter", 3), ("gauge", 2))
        assert list(found) == list(live.server.stats())[1:]
        counters = [
            name for _, name, total, kind, _ in re.findall(family, text) if total
        ]
        assert counters == [name for name in found if found[name][0] == "counter"]
        since_the_start = readme("What to watch").partition("since the start")[2]
        assert counters == re.findall(r"^\| `(\w+)` \|", since_the_start, re.M)


# -- PostgreSQL instead of SQLite
# What the tests above say of a file is said again of a database, by the same tests.


class Postgres:
    """A server of our own, on a socket in a folder, and a log for each path that is
    asked for."""

    def __init__(self, folder: Path, names: Mapping[str, Any]) -> None:
        self.server = f"host={folder} user=postgres dbname=postgres"
        self.connect, self.store = names["psycopg"].connect, names["PostgresStore"]
        self.schemas: dict[Path, str] = {}

    def dsn(self, path: Path) -> str:
        """Each log has a schema of its own: that is quicker to make than a database."""
        if path not in self.schemas:
            self.schemas[path] = f"log{len(self.schemas)}"
            self.run(f"CREATE SCHEMA {self.schemas[path]}")
        options = f"options='-c search_path={self.schemas[path]}'"
        return f"{self.server} {options}"

    def run(self, statement: str, path: Path | None = None) -> list[Any]:
        with self.connect(self.dsn(path) if path else self.server) as db:
            done = db.execute(statement)
            return list(done.fetchall()) if done.description else []

    def open_log(self, path: Path, **options: Any) -> Engine:
        """What `open_log` is for a file."""
        usual: dict[str, Any] = {"apply": apply, "snapshot": snapshot} | options
        for name in ("apply", "snapshot"):
            usual[name] = usual[name] and functools.partial(spoken, usual[name])
        store = self.store(self.dsn(path), NOTES)
        engine = Engine(store, **usual)
        store.listen(engine.catch_up)
        return engine

    def back_up(self, path: Path) -> Path:
        copies = (
            f"DROP TABLE IF EXISTS old_{t}; CREATE TABLE old_{t} AS TABLE {t};"
            for t in LOG
        )
        self.run("".join(copies), path)
        return path

    def put_back(self, path: Path) -> None:
        insert = "INSERT INTO {0} OVERRIDING SYSTEM VALUE TABLE old_{0};"
        self.run("".join(f"TRUNCATE {t};" + insert.format(t) for t in LOG), path)


NOTES = "CREATE TABLE IF NOT EXISTS notes (scope text, data text, rowid serial)"
LOG = (
    "notes",
    *(f"mizusync_{name}" for name in ("changes", "mutations", "trims", "epochs")),
)


class Spoken:
    """The connection, for an application that speaks SQLite's dialect."""

    def __init__(self, db: Any) -> None:
        self.db = db

    def execute(self, statement: str, parameters: Any = ()) -> Any:
        if "ON CONFLICT ROLLBACK" in statement:  # the worst that an application can do
            statement = "COMMIT"
        return self.db.execute(statement.replace("?", "%s"), parameters)


def spoken(function: Callable[[Any, Any], Any], db: Any, argument: Any) -> Any:
    return function(Spoken(db), argument)


@contextmanager
def postgres_server(folder: Path) -> Iterator[None]:
    """A PostgreSQL of our own in this folder, which refuses to be root."""
    found = (
        shutil.which("initdb"),
        *sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb")),
    )
    if not any(found):
        pytest.skip("no PostgreSQL server to run the store on")
    initdb = Path(str(list(filter(None, found))[-1]))
    user: dict[str, Any] = {"cwd": folder}
    if os.geteuid() == 0:
        shutil.chown(folder, "postgres")
        user |= {"user": "postgres", "group": "postgres", "extra_groups": []}
    options = [
        "-D",
        "data",
        "-U",
        "postgres",
        "-A",
        "trust",
        "-E",
        "UTF8",
        "--locale=C",
        "-N",
    ]
    subprocess.run([initdb, *options], check=True, capture_output=True, **user)
    options = ["-D", "data", "-k", str(folder), "-h", "", "-F"]
    with (folder / "log").open("w") as said:
        command = [str(initdb.with_name("postgres")), *options]
        server = subprocess.Popen(command, stdout=said, stderr=said, **user)
    try:
        until(
            lambda: (
                server.poll() is not None
                or "ready to accept" in (folder / "log").read_text()
            )
        )
        assert server.poll() is None, (folder / "log").read_text()
        yield
    finally:
        server.send_signal(signal.SIGINT)  # without waiting for who is connected
        server.wait(PATIENCE)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    pytest.importorskip("psycopg")
    names: dict[str, Any] = {}
    exec(blocks("python", "PostgreSQL instead of SQLite")[0], names)
    # Not pytest's own folder, into which its owner alone may look.
    with tempfile.TemporaryDirectory() as name, postgres_server(folder := Path(name)):
        yield Postgres(folder, names)


@pytest.fixture
def on_postgres(postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> Postgres:
    """From here on `open_log` opens one in PostgreSQL."""
    monkeypatch.setitem(globals(), "open_log", postgres.open_log)
    monkeypatch.setitem(globals(), "back_up", postgres.back_up)
    return postgres


STORE_PROMISES: list[Callable[..., None]] = [
    test_one_id_sent_eight_times_at_once_applies_once,
    test_one_id_twice_in_one_push_applies_once,
    test_one_id_in_two_scopes_names_two_mutations,
    test_a_retry_gets_the_first_result_after_other_pushes_and_a_restart,
    test_a_retry_after_a_trim_gets_the_first_result_without_changes,
    test_a_result_without_changes_has_the_current_cursor_of_its_scope,
    test_a_closed_engine_is_unavailable_for_every_call,
    test_a_mutation_that_rolls_back_the_transaction_fails_alone,
    test_a_pull_finds_the_change_that_a_listener_was_notified_of,
    test_a_snapshot_is_of_the_moment_of_its_cursor_while_others_push,
    test_a_large_trim_leaves_whole_mutations,
    test_a_trim_below_a_cursor_of_over_64_bits_fails_no_push,
    test_another_engines_trim_of_changes_not_in_memory_makes_a_cursor_too_old,
    test_another_engines_trim_of_changes_in_memory_makes_a_cursor_too_old,
    test_reopening_never_makes_a_cursor_unknown,
    test_a_cursor_above_the_head_is_unknown,
    test_a_cursor_with_an_epoch_of_another_history_is_unknown,
    test_two_engines_on_one_file_are_one_log,
    test_a_waiting_pull_is_woken_by_another_engines_commit,
]


@table("promise", {promise.__name__: promise for promise in STORE_PROMISES})
def test_postgres_keeps_what_a_file_keeps(
    promise: Callable[..., None], on_postgres: Postgres, path: Path
) -> None:
    match promise.__annotations__:
        case {"engine": _}:
            with closing(on_postgres.open_log(path)) as engine:
                promise(engine)
        case _:
            promise(path)


def test_clients_converge_whatever_happens_to_postgres(on_postgres: Postgres) -> None:
    class ConvergenceOnPostgres(Convergence):
        def put_back(self) -> None:
            on_postgres.put_back(self.path)

    few = settings(max_examples=4, stateful_step_count=15)
    run_state_machine_as_test(ConvergenceOnPostgres, settings=few)


def test_a_reader_beside_two_writers_on_postgres_never_skips_a_number(
    on_postgres: Postgres, path: Path
) -> None:
    def pour(engine: Engine) -> None:
        for number in range(30):
            push(engine, note(f"{threading.get_ident()} {number}", number))

    with ExitStack() as stack:
        one, two, reader = (
            stack.enter_context(closing(open_log(path))) for _ in range(3)
        )
        pool = stack.enter_context(ThreadPoolExecutor(4))
        pouring = [pool.submit(pour, engine) for engine in (one, two, one, two)]
        seen: list[Any] = []

        def all_seen() -> bool:
            seen.extend(pull(reader, seen[-1]["cursor"] if seen else 0)["changes"])
            return len(seen) == 120

        until(all_seen)
        assert [done.result() for done in pouring] == [None] * 4
        assert list(map(cursor_of, seen)) == list(range(1, 121))
        assert whole_log(one) == whole_log(two) == seen


def test_postgres_itself_tells_of_another_process_s_commit(
    on_postgres: Postgres, path: Path
) -> None:
    blind = Settings(watch_interval=PATIENCE * 6)  # else it would look by itself
    with closing(open_log(path, settings=blind)) as one, closing(open_log(path)) as two:
        heard = threading.Event()
        one.add_listener(lambda news: heard.set(), "a")
        push(two, note("1", scope="a"))
        assert heard.wait(PATIENCE)
        on_postgres.run(f"SELECT pg_terminate_backend(pid) {OTHERS}")
        heard.clear()
        numbers = itertools.count(2)

        def told() -> bool:
            in_time(lambda: push(two, note(str(next(numbers)), scope="a")))
            return heard.wait(MOMENT)

        until(
            told
        )  # it listens again, though its first look may be through a lost connection


OTHERS = (
    "FROM pg_stat_activity"
    " WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
)


def in_time(function: Callable[[], T]) -> T:
    """What it gives, once the database is there again."""

    def given() -> list[T]:
        with suppress(Unavailable):
            return [function()]
        return []

    return until(given)[0]


def test_pushes_to_postgres_go_on_after_its_connections_were_cut(
    on_postgres: Postgres, path: Path
) -> None:
    cut = set[str]()

    def apply_and_cut(db: Any, mutation: Mutation) -> list[Any]:
        made = apply(db, mutation)
        if mutation.args % 10 == 7 and mutation.id not in cut:
            cut.add(mutation.id)
            db.db.execute(f"SELECT pg_terminate_backend(pid) {OTHERS}")
            db.db.execute("SELECT pg_terminate_backend(pg_backend_pid())")
        return made

    with closing(open_log(path, apply=apply_and_cut)) as engine:
        notes = [note(str(number), number) for number in range(20)]
        results = [in_time(functools.partial(push, engine, each))[0] for each in notes]
        made = [change for result in results for change in result["changes"]]
        assert not any("duplicate" in result for result in results)
        assert in_time(lambda: whole_log(engine)) == made
        assert in_time(lambda: ask(engine.snapshot())).data == list(range(20))
    assert len(cut) == 2


def test_the_seats_of_the_readme_are_sold_from_postgres(
    postgres: Postgres, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Server, "run", lambda server, host, port: None)
    store, application = blocks("python", "PostgreSQL instead of SQLite")
    names: dict[str, Any] = {}
    exec(store, names)
    exec(application.replace("postgresql://localhost/seats", postgres.dsn(path)), names)
    with serving(names["engine"]) as live:
        wish = {
            "scope": "gala",
            "name": "seat.take",
            "args": {"seat": "A1", "holder": "Ann"},
        }
        odd = {
            "scope": "gala",
            "name": "seat.take",
            "args": {"seat": "A\0", "holder": "Ann"},
        }
        client = live.client()
        taken, again, strange, once = client.push(
            {"id": "1", **wish},
            {"id": "2", **wish},
            {"id": "3", **odd},
            {"id": "1", **wish},
        )
        assert taken["changes"][0]["data"] == {"seat": "A1", "holder": "Ann"}
        assert (again["code"], again["error"]) == ("conflict", "seat A1 is taken")
        assert (strange["code"], once["duplicate"]) == ("invalid_mutation", True)
        state = client.request("GET", "/sync/snapshot?scope=gala").json
        assert (state["data"], state["cursor"]) == ({"A1": "Ann"}, taken["cursor"])
        assert refused(client.request("GET", "/sync/snapshot?scope=%00"), 400)
        strange = client.request("GET", "/sync/pull?scope=gala&epoch=%00")
        assert refused(strange, 410, code="cursor_unknown")


def test_a_name_with_a_nul_is_a_name_on_postgres_too(
    on_postgres: Postgres, path: Path
) -> None:
    def same(db: Any, mutation: Mutation) -> list[Any]:
        return [Change(mutation.args, scope="\0")]

    with closing(open_log(path, apply=same)) as engine:
        (result,) = push(engine, note("\0", "\0", scope="\0"))
        assert push(engine, note("\0", "\0", scope="\0")) == [result | DUPLICATE]
        assert pull(engine, scope="\0")["changes"] == result["changes"]
    with closing(open_log(path)) as engine:
        assert fold(whole_log(engine, "\0")) == ["\0"]


POSTGRES_MISUSES: dict[str, Callable[[Any], Any]] = {
    "commit": lambda db: db.commit(),
    "COMMIT": lambda db: db.execute("COMMIT"),
    "rollback": lambda db: db.rollback(),
    "ROLLBACK": lambda db: db.execute("ROLLBACK"),
    "ROLLBACK, and goes on": lambda db: (
        db.execute("ROLLBACK"),
        db.execute("SELECT 1"),
    ),
    "autocommit": lambda db: setattr(db, "autocommit", True),
    "close": lambda db: db.close(),
    "an error that it hides": lambda db: hidden(db, "nonsense"),
    "a COMMIT that it hides": lambda db: hidden(db, "COMMIT"),
}


def hidden(db: Any, statement: str) -> None:
    with suppress(Exception):
        db.execute(statement)


@table("misuse", POSTGRES_MISUSES)
def test_a_misuse_of_postgres_spoils_that_mutation_alone(
    on_postgres: Postgres, path: Path, misuse: Callable[[Any], Any]
) -> None:
    def apply_or_misuse(db: Any, mutation: Mutation) -> list[Any]:
        made = apply(db, mutation)
        if mutation.id == "bad":
            misuse(db.db)
        return made

    with closing(open_log(path, apply=apply_or_misuse)) as engine:
        results = push(engine, note("1", 1), note("bad", 2), note("3", 3))
        assert [result.get("code") for result in results] == [
            None,
            "internal_error",
            None,
        ]
        assert ask(engine.snapshot()).data == fold(whole_log(engine)) == [1, 3]


PROGRAM_ON_POSTGRES = """
from __future__ import annotations
import asyncio, signal, sys
sys.path.insert(0, {folder!r})
from mizusync import *

{recipe}
{apply}

def snapshot(db, scope):
    sql = "SELECT id, title, completed FROM todos WHERE scope = %s ORDER BY position"
    return {{"todos": [dict(zip(("id", "title", "completed"), row))
                      for row in db.execute(sql, (scope,))]}}

async def main():
    store = PostgresStore(sys.argv[sys.argv.index("--db") + 1], {schema!r})
    engine = Engine(store, apply=apply_todo, snapshot=snapshot)
    store.listen(engine.catch_up)
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    async with Server(engine).listen("127.0.0.1", 0) as (host, port):
        print(f"http://{{host}}:{{port}}/", flush=True)
        await stopped.wait()
    engine.close()

asyncio.run(main())
"""


@pytest.fixture
def todos_on_postgres(
    postgres: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """PROGRAM is the todo application as it is, but for its dialect; and a database for
    it."""
    words = {
        "folder": str(PROGRAM.parent),
        "recipe": blocks("python", "PostgreSQL instead of SQLite")[0],
        "apply": re.sub(
            r":(scope|id|title|completed)\b",
            r"%(\1)s",
            inspect.getsource(mizusync.apply_todo),
        ),
        "schema": mizusync.TODO_SCHEMA.replace(
            "INTEGER PRIMARY", "serial PRIMARY"
        ).replace("completed INTEGER", "completed boolean"),
    }
    (tmp_path / "todos.py").write_text(PROGRAM_ON_POSTGRES.format_map(words).lstrip())
    monkeypatch.setitem(globals(), "PROGRAM", tmp_path / "todos.py")
    return Path(postgres.dsn(tmp_path))


@pytest.mark.parametrize(
    "promise",
    [
        "test_followers_of_two_processes_see_one_log_while_both_are_pushed_to",
        "test_a_hint_of_one_process_is_true_at_the_other",
        "test_kill_9_of_one_process_loses_nothing_and_the_other_goes_on",
        "test_the_same_pull_gets_the_same_page_from_both_processes",
    ],
)
def test_two_processes_on_postgres(todos_on_postgres: Path, promise: str) -> None:
    function, words = globals()[promise], {"path": todos_on_postgres, "at": 1}
    with ExitStack() as stack:
        if "two" in function.__annotations__:
            words["two"] = stack.enter_context(two_programs(todos_on_postgres))
        function(
            **{name: words[name] for name in function.__annotations__ if name in words}
        )


def test_the_todo_application_is_the_same_on_postgres(todos_on_postgres: Path) -> None:
    with (
        program("--db", str(todos_on_postgres)) as running,
        closing(RawClient(running.address)) as one,
    ):
        test_todos_are_made_changed_toggled_and_deleted(one)


def test_a_postgres_that_lost_its_newest_commits_does_not_know_their_cursors(
    on_postgres: Postgres, path: Path
) -> None:
    """As when a standby takes over: the process goes on, and only its connections were
    cut."""
    with closing(open_log(path)) as engine, closing(open_log(path)) as other:
        push(engine, *(note(str(number)) for number in range(5)))
        early = pull(engine)
        on_postgres.back_up(path)
        push(engine, *(note(f"lost {number}") for number in range(5)))
        late = pull(engine)
        on_postgres.put_back(path)
        on_postgres.run(f"SELECT pg_terminate_backend(pid) {OTHERS}")
        for number in range(20):
            in_time(functools.partial(push, other, note(f"new {number}")))
        page = in_time(lambda: pull(engine, early["cursor"], epoch=early["epoch"]))
        assert len(page["changes"]) == 20
        with pytest.raises(mizusync.CursorUnknown):
            pull(engine, late["cursor"], epoch=late["epoch"])


def test_a_new_postgres_log_may_be_opened_by_several_at_once(
    on_postgres: Postgres, path: Path
) -> None:
    together = threading.Barrier(4)

    def open_and_close(path: Path) -> None:
        together.wait(PATIENCE)
        open_log(path).close()

    on_postgres.dsn(path)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(open_and_close, [path] * 4)) == [None] * 4


# --- SyncClient -----------------------------------------------------------------------
# Part one of the page's script, in Node. Its clock is the harness's: a minute passes at
# once.

HARNESS = r"""
// Each line of stdin is a call, [name, ...arguments], that one line of stdout answers.
// The client's time is ours: it passes when a test lets it, and waits for what is
// really under way.
import assert from "node:assert/strict";
import { createInterface } from "node:readline";

let now = Date.now(), number = 0;
// What waits for time; promises of real sockets.
const timers = new Map(), under = new Set();
const NEVER = new Promise(() => {});

function later(work, wait = 0, id = ++number) {
  // As browsers do.
  timers.set(id, { at: now + (wait >= 1 && wait < 2 ** 31 ? wait : 1), work });
  return id;
}
const every = (work, gap, id = ++number) =>
  later(() => (every(work, gap, id), work()), gap, id);
const forget = (id) => void timers.delete(id);
const sleep = (seconds) => new Promise((resolve) => later(resolve, 1000 * seconds));
function timeout(wait) {
  const control = new AbortController();
  const abort = () =>
    control.abort(new DOMException("It took too long.", "TimeoutError"));
  later(abort, wait);
  return control.signal;
}
globalThis.simulated = {
  setTimeout: later, clearTimeout: forget, setInterval: every, clearInterval: forget,
  AbortSignal: Object.assign(Object.create(AbortSignal), { timeout }),
  Date: class extends Date { static now() { return now; } },
};

function track(promise) {
  under.add(promise);
  promise.catch(() => {}).finally(() => under.delete(promise));
  return promise;
}
async function quiet() {
  do {
    await Promise.allSettled(under);
    for (let turn = 0; turn < 5; turn++) await new Promise(setImmediate);
  } while (under.size);
}
async function pass(seconds) {
  for (const end = now + 1000 * seconds; ; ) {
    await quiet();
    let first;
    for (const entry of timers) if (!first || entry[1].at < first[1].at) first = entry;
    if (!first || first[1].at > end) return void (now = end);
    forget(first[0]);
    now = first[1].at;
    first[1].work();
  }
}

/** A Storage; `limits` may have it full, or its page gone. */
function makeStorage(items = new Map(), limits = {}) {
  return {
    items, get length() { return items.size; },
    get queue() { return [...items.keys()].filter((key) => key.includes(" queue ")); },
    get base() {
      return JSON.parse([...items].find(([key]) => key.endsWith(" base"))[1]);
    },
    key: (index) => [...items.keys()][index] ?? null,
    getItem: (key) => items.get(key) ?? null,
    removeItem: (key) => limits.gone || items.delete(key),
    setItem(key, value) {
      if (limits.full) throw new DOMException("It is full.", "QuotaExceededError");
      if (!limits.gone) items.set(key, value);
    },
  };
}
const json = (value, status = 200, headers = {}) =>
  [JSON.stringify(value), { status, headers }];
const refuse = (status, code, headers) =>
  json({ code, error: "a reason" }, status, headers);

/** What rejects when `signal` says so. */
function aborted(signal) {
  const end = new Promise((_, reject) => {
    signal.addEventListener("abort", () => reject(signal.reason));
  });
  end.catch(() => {});
  return end;
}

// --- A server of a few lines, for scripts that say what it answers. Its state is a
// list.
function makeFake() {
  const results = {};  // by id
  const fake = {
    // `held`: paths of requests that wait for a call.answer(); `instead`: other answers
    log: [], epoch: "1", calls: [], sockets: [], refused: [],
    held: new Set(), instead: {},
    get data() { return fake.log.map(({ data }) => data); },
    get head() { return fake.log.length; },
    add(data) {
      fake.log.push({ cursor: fake.head + 1, scope: "s", time: "", data });
      return { ok: true, cursor: fake.head, changes: fake.log.slice(-1) };
    },
    push: ({ body }) =>
      json(body.map(({ id, args }) => results[id] ??= fake.add(args))),
    pull({ query: { cursor } }) {
      const changes = fake.log.filter((change) => change.cursor > cursor);
      return json({ changes, cursor: fake.head, epoch: fake.epoch, hasMore: false });
    },
    snapshot: () => json({ data: fake.data, cursor: fake.head, epoch: fake.epoch }),
    all: (path) => fake.calls.filter((call) => call.path === path),
    last: (path) => fake.all(path).at(-1),
    get socket() { return fake.sockets.at(-1); },
    async fetch(address, { headers, body, signal }) {
      const url = new URL(address), path = url.pathname.split("/").at(-1);
      const query = Object.fromEntries(url.searchParams), end = aborted(signal);
      const call = { path, query, headers, body: body && JSON.parse(body), at: now };
      fake.calls.push(call);
      const answer = new Promise((resolve) => {
        call.answer = (value) => resolve(Array.isArray(value) ? value : json(value));
      });
      if (fake.held.has(path)) {
        return new Response(...await Promise.race([answer, end]));
      }
      return new Response(...(fake.instead[path] ?? fake[path])(call));
    },
    WebSocket: class {
      sent = [];
      constructor(...asked) { this.asked = asked, fake.sockets.push(this); }
      send(text) { this.sent.push(JSON.parse(text)); }
      close() { this.closed = true; }
      open() { this.onopen?.({}), this.say({ cursor: 0 }); }
      say(data) {
        this.onmessage?.({ data: JSON.stringify({ topic: "sync:s", data }) });
      }
      end(code = 1006) { this.onclose?.({ code }); }
    },
    make(options) {
      const client = new SyncClient({
        url: "http://fake", scope: "s", initial: [], storage: makeStorage(),
        WebSocket: null, fetch: fake.fetch,
        apply: (state, { data }) => [...state, data],
        predict: (state, { args }) => [...state, args], ...options,
      });
      client.addEventListener("refused", ({ detail }) => fake.refused.push(detail));
      return client;
    },
    async start(options) {
      const client = fake.make(options);
      client.start();
      await quiet();
      return client;
    },
    async live(options) {
      const client = fake.make({ WebSocket: fake.WebSocket, ...options });
      client.start();
      fake.socket.open();
      await quiet();
      return client;
    },
  };
  return fake;
}

// --- The real server, over a line with the faults that it is told to have.
let place;  // where the server is now
const real = (address) => address.replace("//there", `//${place}`);

async function send(address, options) {
  const response = await fetch(real(address), options);
  return [await response.text(), { status: response.status }];
}

/** The server's clock is not ours: a long poll is cut short, and asks again without
 * the wait. */
function hold(address, options) {
  const control = new AbortController();
  const held = send(address, { ...options, signal: control.signal }).catch(() => NEVER);
  track(Promise.race([held, new Promise((resolve) => setTimeout(resolve, 5))]));
  const over = sleep(25).then(() => {
    control.abort();
    return track(send(address.replace(/wait=[^&]+/, "wait=0"), options));
  });
  return Promise.race([held, over]);
}

const FAULTS = {
  async lost() { throw new TypeError("It never arrived."); },
  async unheard(go) { await go(); throw new TypeError("The answer was lost."); },
  async torn(go) {
    const [text, options] = await go();
    return [text.slice(0, -2), options];
  },
  async twice(go) { await go(); return go(); },
  async slow(go) { const answer = await go(); await sleep(20); return answer; },
  async late(go) { await sleep(20); return go(); },
  async tooLate(go) { later(() => go().catch(() => {}), 90e3); return NEVER; },
  async busy() { return refuse(503, "unavailable", { "Retry-After": "2" }); },
};

function makeLine(items) {
  const line = { faults: [], lag: 0, isBlocked: false, limits: {} };
  line.storage = makeStorage(items, line.limits);
  line.fetch = async (address, { signal, ...options }) => {
    if (line.limits.gone) return NEVER;
    const isLong = /wait=[1-9]/.test(address), fault = FAULTS[line.faults.shift()];
    const go = () => (isLong ? hold(address, options) : track(send(address, options)));
    const answer = await Promise.race([fault ? fault(go) : go(), aborted(signal)]);
    return line.limits.gone ? NEVER : new Response(...answer);
  };
  line.WebSocket = class {
    due = 0; waiting = [];
    constructor(address, protocols) {
      line.socket = this;
      if (line.isBlocked) return void later(() => this.end());
      this.socket = new WebSocket(real(address), protocols);
      this.socket.onopen = () => (this.waiting.shift()?.(), this.onopen?.());
      this.socket.onclose = () => this.end();
      this.socket.onmessage = (message) => {
        if (JSON.parse(message.data).topic === "error") return this.waiting.shift()?.();
        this.due = Math.max(this.due, now + line.lag);  // late, but in order
        const hear = () => this.isMute || line.limits.gone || this.onmessage?.(message);
        this.due > now ? later(hear, this.due - now) : hear();
      };
      this.wait();
    }
    wait() { track(new Promise((resolve) => this.waiting.push(resolve))); }
    send(text) { this.socket.send(text), this.hear(); }
    /** What was said before the answer to nonsense has been heard with it. */
    hear() { if (this.socket?.readyState === 1) this.socket.send("?"), this.wait(); }
    close() {
      this.socket?.close(), this.waiting.splice(0).forEach((resolve) => resolve());
    }
    end() { this.close(), this.onclose?.({ code: 1006 }); }
  };
  return line;
}

const rid = ({ todos }, id) => ({ todos: todos.filter((todo) => todo.id !== id) });
function put({ todos }, todo) {
  if (!todos.some(({ id }) => id === todo.id)) return { todos: [...todos, todo] };
  return { todos: todos.map((old) => (old.id === todo.id ? todo : old)) };
}
function apply(state, { cursor, data: { op, id, todo } }) {
  if (cursor <= state.cursor) repeated.push(cursor);
  return { ...(op === "delete" ? rid(state, id) : put(state, todo)), cursor };
}
function predict(state, { name, args }) {
  const known = state.todos.find(({ id }) => id === args.id);
  if (name === "todo.delete") return rid(state, args.id);
  if (name === "todo.create") {
    return known ? state : put(state, { ...args, completed: false });
  }
  return known ? put(state, { ...known, ...args }) : state;
}

let people = [];  // {client, line, made: ids of mutations}
const refused = new Set(), repeated = [];  // ids; cursors that apply() met twice
function open(person, items = new Map()) {
  person.line = makeLine(items);
  person.client = new SyncClient({
    url: "http://there", scope: "_default", initial: { todos: [] }, apply, predict,
    ...person.line,
  });
  person.client.addEventListener("refused", ({ detail }) =>
    refused.add(detail.mutation.id));
  person.client.start();
}
function leave({ client, line }) {
  line.limits.gone = true;
  client.stop();
}

const calls = {
  begin(address, isShared) {
    people.forEach(leave);
    timers.clear(), refused.clear(), repeated.splice(0);
    place = address;
    people = [{ made: [] }, { made: [] }, { made: [] }];
    const shared = isShared ? new Map() : undefined;
    people.forEach((person, index) => open(person, index ? shared : undefined));
  },
  edit(who, name, args) {
    people[who].client.mutate(name, args);
    people[who].made.push(people[who].client.pending.at(-1).id);
  },
  fault(who, ...kinds) { people[who].line.faults.push(...kinds); },
  line(who, change) { Object.assign(people[who].line, change); },
  drop(who) { people[who].line.socket?.end(); },
  mute(who) { if (people[who].line.socket) people[who].line.socket.isMute = true; },
  stop(who) { people[who].client.stop(); },
  start(who) { people[who].client.start(); },
  reload(who) {
    leave(people[who]);
    now += 10;
    open(people[who], people[who].line.storage.items);
  },
  move(address) { place = address, people.forEach((_, who) => calls.drop(who)); },
  async pass(seconds) {
    await pass(seconds);
    people.forEach(({ line }) => line.socket?.hear());
    await quiet();
  },
  /** Without faults: until all see the same and wait for nothing, or for `most`
   * seconds. */
  async converge(most) {
    for (const { client, line } of people) {
      Object.assign(line, { faults: [], lag: 0, isBlocked: false });
      client.start();
    }
    const end = now + 1000 * most;
    const seen = ({ client }) => JSON.stringify(client.state.todos);
    const differs = (one) =>
      one.line.storage.queue.length || seen(one) !== seen(people[0]);
    // Until then one may wait who has not heard of the newest server.
    await calls.pass(40);
    while (now < end && people.some(differs)) await calls.pass(1);
    return {
      states: people.map(({ client }) => client.state.todos),
      made: people.map(({ made }) => made),
      waiting: people.map(({ client, line }) =>
        client.pending.length + line.storage.queue.length),
      refused: [...refused], repeated,
    };
  },
  async script(text) {
    timers.clear();
    const names = {
      assert, pass, quiet, json, refuse, makeStorage, fake: makeFake(), SyncClient,
    };
    const Script = calls.script.constructor;
    await new Script(...Object.keys(names), text)(...Object.values(names));
  },
};

const { SyncClient } = await import("./client.mjs");
for await (const line of createInterface({ input: process.stdin })) {
  const [name, ...rest] = JSON.parse(line);
  const failed = (error) => ({ error: String(error?.stack ?? error) });
  const called = async () => ({ value: await calls[name](...rest) });
  const answer = await called().catch(failed);
  process.stdout.write(JSON.stringify(answer) + "\n");
}
"""


class Node:
    """A process of Node that has the client, and does what HARNESS knows."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def __call__(self, name: str, *arguments: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([name, *arguments]) + "\n")
        self.process.stdin.flush()
        watchdog = threading.Timer(2 * PATIENCE, self.process.kill)
        watchdog.start()
        line = self.process.stdout.readline()
        watchdog.cancel()
        assert line, f"{name} did not end"
        answer = json.loads(line)
        assert "error" not in answer, answer["error"]
        return answer.get("value")


def part_one() -> str:
    """The client, as it stands in the page's script."""
    page = PROGRAM.with_name("demo.html").read_text(encoding="utf-8")
    found = re.search(r"^// === Part one.*?(?=^// === Part two)", page, re.M | re.S)
    assert found
    return found[0]


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    if (path := shutil.which("node")) is None:
        pytest.skip("no node to run the client with")
    command = [path, "--no-warnings", "--experimental-websocket"]  # needless from 22 on
    tried = subprocess.run(
        [*command, "-e", ""], capture_output=True, timeout=PATIENCE, check=False
    )
    if tried.returncode:
        pytest.skip(
            "this node is too old to run the client with:"
            " 20.10 is the first with WebSocket"
        )
    ours = "setTimeout, clearTimeout, setInterval, clearInterval, AbortSignal, Date"
    folder = tmp_path_factory.mktemp("node")
    (folder / "client.mjs").write_text(
        f"const {{ {ours} }} = globalThis.simulated;\n{part_one()}"
    )
    (folder / "harness.mjs").write_text(HARNESS)
    with subprocess.Popen(
        [*command, str(folder / "harness.mjs")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield Node(process)
        process.kill()


PROMISES = {
    "a mutation shows at once and is pushed": """
        fake.held.add("push");
        const client = await fake.start();
        client.mutate("add", "a");
        assert.deepEqual([client.state, client.status.waiting], [["a"], 1]);
        await quiet();
        assert.deepEqual(fake.last("push").body, client.pending);
    """,
    "a mutation is stored until the base has it": """
        fake.held.add("push").add("pull");
        const storage = makeStorage(), client = await fake.start({ storage });
        fake.last("pull").answer(fake.pull(fake.last("pull")));
        client.mutate("add", "a");
        await quiet();
        assert.equal(storage.queue.length, 1);
        fake.last("push").answer(fake.push(fake.last("push")));
        await quiet();
        assert.deepEqual([client.pending, storage.queue.length, client.state],
          [[], 1, ["a"]]);
        fake.last("pull").answer(fake.pull(fake.last("pull")));
        await quiet();
        assert.deepEqual([storage.queue, storage.base.state, client.state],
          [[], ["a"], ["a"]]);
    """,
    "every retry has the same id": """
        let tries = 0;
        fake.instead.push = (call) => {
          const answer = fake.push(call);
          if (++tries < 4) throw new TypeError("The answer was lost.");
          return answer;
        };
        const client = await fake.start();
        client.mutate("add", "a");
        await pass(60);
        const ids = fake.all("push").map(({ body }) => body[0].id);
        assert.deepEqual([ids.length, new Set(ids).size], [4, 1]);
        assert.deepEqual([fake.data, client.state], [["a"], ["a"]]);
    """,
    "batches are of at most 100, and in order": """
        const client = fake.make();
        const many = Array.from({ length: 250 }, (_, index) => index);
        many.forEach((index) => client.mutate("add", index));
        client.start();
        await pass(60);
        assert.deepEqual(fake.data, many);
        assert.deepEqual(client.state, many);
        assert.ok(fake.all("push").every(({ body }) => body.length <= 100));
        assert.equal(fake.all("push").at(-1).body.length, 50);
    """,
    "what is refused is rolled back and told": """
        fake.instead.push = () =>
          json([{ ok: false, code: "conflict", error: "a reason" }]);
        const storage = makeStorage(), client = await fake.start({ storage });
        client.mutate("add", "a");
        await quiet();
        const [{ mutation, code, error }] = fake.refused;
        assert.deepEqual([mutation.args, code, error], ["a", "conflict", "a reason"]);
        assert.deepEqual([client.state, client.status.waiting, storage.queue],
          [[], 0, []]);
        await pass(60);
        assert.equal(fake.all("push").length, 1);
    """,
    "401 and 403 stop it until it is started again": """
        for (const status of [401, 403]) {
          fake.instead = { push: () => refuse(status, "unauthorized") };
          const client = await fake.live({ token: "old" });
          assert.equal(fake.last("pull").headers.Authorization, "Bearer old");
          assert.deepEqual(fake.socket.asked[1], ["mizusync", "bearer.old"]);
          client.mutate("add", status);
          await quiet();
          const { running, error } = client.status, { length } = fake.calls;
          assert.deepEqual([running, error.status, fake.socket.closed],
            [false, status, true]);
          await pass(300);
          assert.deepEqual([fake.calls.length, client.status.waiting], [length, 1]);
          fake.instead = {};
          client.start("new");
          await pass(1);
          assert.equal(fake.last("push").headers.Authorization, "Bearer new");
          assert.deepEqual([client.pending, client.status.error], [[], null]);
          assert.equal(fake.data.at(-1), status);
          client.stop();
        }
    """,
    "5xx, 408, 429 and no network are tried again, slower and slower": """
        for (const status of [500, 503, 408, 429, 0]) {
          const lost = () => { throw new TypeError("There is no network."); };
          const fail = status ? () => refuse(status, "x") : lost;
          const client = await fake.start();
          fake.instead = { push: fail, pull: fail };
          fake.calls.length = 0;
          client.mutate("add", fake.head);
          await pass(300);
          const times = fake.all("push").map(({ at }) => at);
          const [first, second, ...gaps] =
            times.slice(1).map((at, index) => at - times[index]);
          assert.ok(first < 1500 && second > 900);
          assert.ok(gaps.at(-1) > 14e3 && gaps.at(-1) < 31e3);
          const { online, running, waiting } = client.status;
          assert.deepEqual([online, running, waiting], [false, true, 1]);
          fake.instead = {};
          await pass(60);
          assert.deepEqual([client.status.online, client.status.waiting], [true, 0]);
          client.stop();
        }
    """,
    "nothing comes before the server's Retry-After": """
        fake.instead.push = () => refuse(503, "unavailable", { "Retry-After": "100" });
        const client = await fake.live();
        client.mutate("add", "a");
        await pass(50);
        client.mutate("add", "b");
        fake.socket.open();  // otherwise a reason to hurry
        await pass(49);
        assert.equal(fake.all("push").length, 1);
        await pass(3);
        assert.equal(fake.all("push").length, 2);
    """,
    "413 halves the batch until what is alone too large is dropped and told": """
        fake.instead.push = (call) =>
          call.body.length > 4 || call.body.some(({ args }) => args === "large")
            ? refuse(413, "too_large") : fake.push(call);
        const client = fake.make(), many = [1, 2, 3, 4, 5, "large", 6, 7, 8, 9, 10];
        many.forEach((args) => client.mutate("add", args));
        client.start();
        await pass(1);
        assert.deepEqual(fake.data, many.filter((args) => args !== "large"));
        const told = fake.refused.map(({ mutation, code }) => [mutation.args, code]);
        assert.deepEqual([told, client.pending], [[["large", "too_large"]], []]);
    """,
    "a line on which a push takes too long is sent smaller ones": """
        fake.instead.push = (call) => {
          if (call.body.length > 10) return refuse(408, "request_timeout");
          if (call.body.length > 3) {
            throw new DOMException("It took too long.", "TimeoutError");
          }
          return fake.push(call);
        };
        const many = Array.from({ length: 100 }, (_, index) => index);
        const client = fake.make();
        many.forEach((args) => client.mutate("add", args));
        client.start();
        await pass(600);
        assert.deepEqual([fake.data, client.status.waiting], [many, 0]);
    """,
    "400 with a code finds what is malformed and drops it alone": """
        fake.instead.push = (call) => call.body.some(({ args }) => args === "bad")
          ? refuse(400, "invalid_request") : fake.push(call);
        const client = fake.make();
        [1, "bad", 2].forEach((args) => client.mutate("add", args));
        client.start();
        await pass(1);
        assert.deepEqual([fake.data, client.status.waiting], [[1, 2], 0]);
        assert.deepEqual(fake.refused.map(({ mutation }) => mutation.args), ["bad"]);
    """,
    "unavailable is kept, internal_error is dropped and told after five tries": """
        let code = "unavailable";
        fake.instead.push = () => json([{ ok: false, code, error: "a reason" }]);
        const storage = makeStorage(), client = await fake.start({ storage });
        client.mutate("add", "a");
        await pass(600);
        assert.ok(fake.all("push").length > 10);
        assert.deepEqual([fake.refused, client.pending.length], [[], 1]);
        assert.equal(client.status.online, true);  // it was heard
        code = "internal_error";
        fake.calls.length = 0;
        await pass(600);
        assert.equal(fake.all("push").length, 5);
        assert.deepEqual([fake.refused[0].code, client.state, storage.queue],
          [code, [], []]);
    """,
    "one that fails holds up none of its batch": """
        fake.instead.push = ({ body }) => json(body.map(({ args }) =>
          args === "bad" ? { ok: false, code: "not_found", error: "a reason" }
            : fake.add(args)));
        const client = await fake.start();
        client.stop();
        [1, "bad", 2].forEach((args) => client.mutate("add", args));
        client.start();
        await pass(1);
        assert.deepEqual([fake.data, client.state, fake.all("push").length],
          [[1, 2], [1, 2], 1]);
    """,
    "the cursor never moves by the result of a push": """
        const storage = makeStorage(), client = await fake.start({ storage });
        fake.held.add("pull");
        fake.add("of another");
        client.mutate("add", "own");
        await quiet();
        assert.deepEqual([storage.base.cursor, client.state], [0, ["own"]]);
        fake.held.clear();
        fake.last("pull").answer(fake.pull(fake.last("pull")));
        await quiet();
        assert.deepEqual(client.state, ["of another", "own"]);
    """,
    "a page is applied as a whole, or not at all": """
        let isBad = true;
        const apply = (state, { data }) => {
          if (data === "b" && isBad) throw new Error("a fault of the application");
          return [...state, data];
        };
        const storage = makeStorage(), client = await fake.start({ storage, apply });
        ["a", "b", "c"].forEach(fake.add);
        await pass(40);
        assert.deepEqual([client.state, storage.base.cursor], [[], 0]);
        isBad = false;
        await pass(40);
        assert.deepEqual([client.state, storage.base.cursor], [["a", "b", "c"], 3]);
    """,
    "what apply fails on in a hint is said, and asked for again": """
        let isBad = true;
        const apply = (state, { data }) => {
          if (isBad) throw new Error("a fault of the application");
          return [...state, data];
        };
        const client = await fake.live({ apply });
        const { changes } = fake.add("a");
        fake.socket.say({ cursor: 1, epoch: "1", after: 0, changes });
        await quiet();
        assert.equal(client.status.error.message, "a fault of the application");
        isBad = false;
        await pass(5);
        assert.deepEqual([client.state, client.status.error], [["a"], null]);
    """,
    "pages follow at once while there are more": """
        for (let index = 0; index < 10; index++) fake.add(index);
        fake.instead.snapshot = () => refuse(404, "not_found");
        fake.instead.pull = ({ query: { cursor } }) => json({
          changes: fake.log.slice(cursor, +cursor + 3),
          cursor: Math.min(+cursor + 3, 10), epoch: "1", hasMore: cursor < 7,
        });
        const client = await fake.live();
        assert.deepEqual(client.state, fake.data);
    """,
    "a hint at or below the cursor is ignored": """
        ["a", "b"].forEach(fake.add);
        const client = await fake.live(), { length } = fake.calls;
        fake.socket.say({ cursor: 2 });
        fake.socket.say({ cursor: 1 });
        fake.socket.say({ cursor: 2, epoch: "1", after: 0, changes: fake.log });
        await quiet();
        assert.deepEqual([client.state, fake.calls.length], [["a", "b"], length]);
    """,
    "a hint with changes that fits is applied without a pull": """
        const client = await fake.live();
        assert.deepEqual(fake.socket.sent,
          [{ topic: "subscribe", data: { changes: true } }]);
        ["a", "b"].forEach(fake.add);
        const { length } = fake.calls;
        const hint = { epoch: "1", after: 0 };
        fake.socket.say({ ...hint, cursor: 1, changes: fake.log.slice(0, 1) });
        fake.socket.say({ ...hint, cursor: 2, changes: fake.log });  // one is known
        assert.deepEqual([client.state, fake.calls.length], [["a", "b"], length]);
    """,
    "any other hint means a pull": """
        const client = await fake.live();
        for (const hint of [{}, { epoch: "2", after: 0 }, { epoch: "1", after: 99 }]) {
          const { changes, cursor } = fake.add("x"), { length } = fake.all("pull");
          fake.socket.say(hint.epoch ? { cursor, changes, ...hint } : { cursor });
          await quiet();
          assert.deepEqual([client.state, fake.all("pull").length],
            [fake.data, length + 1]);
        }
    """,
    "there is one pull at a time, and one more after hints during it": """
        const client = await fake.live();
        fake.held.add("pull");
        const { length } = fake.all("pull");
        for (const data of ["a", "b", "c"]) {
          const { cursor, changes } = fake.add(data);
          fake.socket.say({ cursor, epoch: "1", after: 0, changes });
          if (data === "a") fake.socket.say({ cursor: 99 });
          await quiet();
        }
        assert.equal(fake.all("pull").length, length + 1);
        fake.held.clear();
        fake.last("pull").answer(
          { changes: [], cursor: 1, epoch: "1", hasMore: false });
        await quiet();
        assert.deepEqual([fake.all("pull").length, client.state],
          [length + 2, ["a", "b", "c"]]);
    """,
    "410 leads to a snapshot, and nothing pending is lost": """
        fake.add("a");
        const client = await fake.live();
        fake.instead = {
          push: () => refuse(503, "unavailable"),
          pull: (call) => call.query.cursor < 3
            ? refuse(410, "cursor_too_old") : fake.pull(call),
        };
        client.mutate("add", "own");
        ["b", "c"].forEach(fake.add);
        fake.socket.say({ cursor: 3 });
        await quiet();
        assert.deepEqual([client.state, client.status.waiting],
          [["a", "b", "c", "own"], 1]);
        fake.instead = {};
        await pass(60);
        assert.deepEqual([client.state, client.status.waiting],
          [["a", "b", "c", "own"], 0]);
    """,
    "410 means that what was decided is asked again": """
        fake.add("a");
        const client = await fake.start();
        fake.held.add("pull");
        client.mutate("add", "own");
        await quiet();
        fake.log.length = 0;  // another history, without either
        fake.instead.push = ({ body }) => json(body.map(({ args }) => fake.add(args)));
        fake.held.clear();
        fake.last("pull").answer(refuse(410, "cursor_unknown"));
        await pass(60);
        assert.deepEqual([fake.data, client.state, client.pending],
          [["own"], ["own"], []]);
    """,
    "410 again and again is no reason to hurry": """
        fake.instead.pull = () => refuse(410, "cursor_unknown");
        await fake.live();
        await pass(300);
        assert.ok(fake.all("snapshot").length < 30, fake.all("snapshot").length);
    """,
    "it begins with a snapshot, and without one it pulls from 0": """
        ["a", "b"].forEach(fake.add);
        const first = await fake.start();
        assert.deepEqual([first.state, fake.all("pull")[0].query.cursor],
          [["a", "b"], "2"]);
        fake.calls.length = 0;
        fake.instead.snapshot = () => refuse(404, "not_found");
        const second = await fake.start();
        assert.deepEqual([second.state, fake.all("pull")[0].query.cursor],
          [["a", "b"], "0"]);
    """,
    "a reload shows the list and what waits before the network answers": """
        const storage = makeStorage();
        fake.add("a");
        const client = await fake.start({ storage });
        client.stop();
        client.mutate("add", "own");
        const again = fake.make({ storage });
        assert.deepEqual([again.state, again.status.waiting], [["a", "own"], 1]);
        const { length } = fake.calls;
        again.start();
        await pass(1);
        assert.deepEqual([fake.calls.length > length, fake.all("snapshot").length],
          [true, 1]);
        assert.deepEqual([again.state, fake.data, storage.queue],
          [["a", "own"], ["a", "own"], []]);
    """,
    "without a socket its pulls wait for news": """
        fake.held.add("pull");
        const client = await fake.start();
        for (const data of [[], ["a"], ["a", "b"]]) {
          assert.equal(fake.last("pull").query.wait, data.length ? "25" : "0");
          data.slice(-1).forEach(fake.add);
          fake.last("pull").answer(fake.pull(fake.last("pull")));
          await quiet();
          assert.deepEqual([client.state, fake.all("pull").length],
            [data, data.length + 2]);
        }
    """,
    "a page that nobody sees holds no connection": """
        globalThis.document = { hidden: true };
        const client = await fake.start();
        await pass(120);
        delete globalThis.document;
        const waits = fake.all("pull").map(({ query }) => query.wait);
        assert.deepEqual([waits.length > 3, new Set(waits)], [true, new Set(["0"])]);
        client.stop();
    """,
    "a server that does not wait is not hammered": """
        const client = await fake.start();
        await pass(600);
        const { length } = fake.all("pull");
        assert.ok(length >= 2 * 600 / 36 && length <= 2 * 600 / 28 + 2, length);
    """,
    "a socket that fails again and again is tried again, with polls in between": """
        const client = fake.make({ WebSocket: fake.WebSocket });
        client.start();
        for (let time = 0; time < 600; time += 10) {
          if (!fake.socket.closed) fake.socket.end();
          await pass(10);
        }
        assert.ok(fake.sockets.length > 15 && fake.sockets.length < 45,
          fake.sockets.length);
        fake.add("a");
        await pass(36);
        const { live, online } = client.status;
        assert.deepEqual([client.state, live, online], [["a"], false, true]);
        if (!fake.socket.closed) fake.socket.end();
        await pass(31);
        fake.socket.open();
        assert.equal(client.status.live, true);
    """,
    "it pulls after it came back, whatever it heard": """
        const client = await fake.live();
        fake.add("a");
        fake.socket.end(1001);
        await pass(2);
        assert.deepEqual([fake.sockets.length, client.state], [2, []]);
        fake.socket.open();
        await quiet();
        assert.deepEqual([client.state, client.status.live], [["a"], true]);
    """,
    "after a close with 1008 it comes back only when asked": """
        const client = await fake.live();
        fake.socket.end(1008);
        await pass(300);
        fake.add("a");
        await pass(40);
        assert.deepEqual([fake.sockets.length, client.state], [1, ["a"]]);
        client.stop(), client.start();
        await quiet();
        await pass(2);
        assert.equal(fake.sockets.length, 2);
    """,
    "a socket that is silent for 60 s is given up": """
        const client = await fake.live();
        await pass(50);
        fake.socket.say({ cursor: 0 });
        await pass(55);
        assert.equal(fake.sockets.length, 1);
        fake.add("a");
        await pass(15);
        assert.deepEqual([fake.sockets[0].closed, fake.sockets.length], [true, 2]);
        fake.socket.open();
        await quiet();
        assert.deepEqual(client.state, ["a"]);
    """,
    "a socket that ends after its first word is opened again slower and slower": """
        const client = fake.make({ WebSocket: fake.WebSocket });
        client.start();
        for (let time = 0; time < 300; time++) {
          if (!fake.socket.ended) {
            fake.socket.open(), fake.socket.end(fake.socket.ended = 1011);
          }
          await pass(1);
        }
        assert.ok(fake.sockets.length < 30, fake.sockets.length);
        client.stop();
    """,
    "on another network the old one's socket is given up at once": """
        const browser = new EventTarget();
        globalThis.addEventListener = (...how) => browser.addEventListener(...how);
        const client = await fake.live();
        delete globalThis.addEventListener;
        browser.dispatchEvent(new Event("online"));
        await pass(2);
        assert.deepEqual([fake.sockets[0].closed, fake.sockets.length], [true, 2]);
        client.stop();
    """,
    "a request without an answer is given up after 60 s": """
        fake.held.add("push");
        const client = await fake.start();
        client.mutate("add", "a");
        await pass(59);
        fake.held.clear();
        assert.equal(fake.all("push").length, 1);
        await pass(3);
        assert.deepEqual([fake.data, client.status.waiting], [["a"], 0]);
    """,
    "stopped, it asks for nothing, and takes mutations": """
        const client = await fake.live(), { length } = fake.calls;
        client.stop();
        client.mutate("add", "a");
        await pass(300);
        assert.deepEqual([fake.calls.length, client.state], [length, ["a"]]);
        client.start();
        await pass(2);
        assert.deepEqual([fake.data, client.status.waiting], [["a"], 0]);
    """,
    "a full storage does not stop it": """
        const storage = makeStorage(new Map(), { full: true });
        const client = await fake.start({ storage });
        client.mutate("add", "a");
        await pass(1);
        assert.deepEqual([fake.data, client.state, client.status.waiting],
          [["a"], ["a"], 0]);
    """,
    "it tells whether what waits would outlive a reload": """
        const limits = {}, told = [];
        const client = fake.make({ storage: makeStorage(new Map(), limits) });
        client.addEventListener("status", () => told.push(client.status.kept));
        for (limits.full of [false, true, false]) client.mutate("add", "a");
        // The second is still only in memory.
        assert.deepEqual(told, [true, false, false]);
    """,
    "without a storage it works": """
        const client = await fake.start({ storage: null });
        client.mutate("add", "a");
        await pass(1);
        assert.deepEqual([fake.data, client.state, client.status.waiting],
          [["a"], ["a"], 0]);
    """,
    "two tabs without locks lose nothing of each other's queue": """
        const storage = makeStorage(), one = fake.make({ storage });
        one.mutate("add", 1);
        const two = fake.make({ storage });
        two.mutate("add", 2), one.mutate("add", 3);
        assert.equal(storage.queue.length, 3);
        two.start();
        await pass(1);
        assert.deepEqual([fake.data, storage.queue.length], [[1, 2], 1]);
        one.start();
        await pass(40);
        assert.deepEqual([fake.data, storage.queue], [[1, 2, 3], []]);
        assert.deepEqual([one.state, two.state], [[1, 2, 3], [1, 2, 3]]);
    """,
    "with locks a tab's queue is its own until it closes": """
        const held = new Map();
        const ask = (tab) => async (name, { ifAvailable }, work) => {
          // Who waited for it would win it from a tab that is reloaded.
          assert.ok(ifAvailable);
          if (held.has(name)) return work(null);
          held.set(name, tab);
          return work({});
        };
        const open = (tab, storage) => {
          const value = { locks: { request: ask(tab) } };
          Object.defineProperty(globalThis, "navigator", { value, configurable: true });
          return fake.make({ storage });
        };
        const storage = makeStorage(), one = open("one", storage);
        one.mutate("add", 1);
        await quiet();
        // The lock came after it.
        assert.deepEqual([one.state, one.status.waiting], [[1], 1]);
        const two = open("two", storage);
        await quiet();
        assert.deepEqual([two.state, two.status.waiting], [[], 0]);
        two.start();
        await pass(10);
        assert.deepEqual([two.state, two.status.waiting], [[], 0]);
        for (const [name, tab] of held) if (tab === "one") held.delete(name);
        await pass(10);
        Object.defineProperty(globalThis, "navigator",
          { value: undefined, configurable: true });
        assert.deepEqual([two.state, fake.data, storage.queue], [[1], [1], []]);
    """,
    "who hears of a 401 may start it again at once": """
        const client = await fake.start({ token: "old" });
        client.addEventListener("status", () => {
          if (client.status.error?.status === 401) client.start("new");
        });
        fake.instead.push = (call) => call.headers.Authorization === "Bearer old"
          ? refuse(401, "unauthorized") : fake.push(call);
        client.mutate("add", 1);
        await pass(5);
        assert.deepEqual([fake.data, client.status.error, client.pending],
          [[1], null, []]);
    """,
    "a mutation that has to wait is not overtaken by the refusal of a later one": """
        let tries = 0;
        const wait = { ok: false, code: "internal_error", error: "a reason" };
        const error = "what was to be made is not there";
        const missing = { ok: false, code: "not_found", error };
        fake.instead.push = (call) =>
          ++tries > 1 ? fake.push(call) : json([wait, missing]);
        const client = fake.make();
        client.mutate("add", 1);
        client.mutate("add", 2);
        client.start();
        await pass(5);
        assert.deepEqual([fake.data, client.state, fake.refused], [[1, 2], [1, 2], []]);
    """,
    "what several tabs made keeps its order, also when a clock was set back": """
        const storage = makeStorage(), old = fake.make({ storage });
        await pass(0.01);
        fake.make({ storage }).mutate("add", 1);  // the younger tab edits first
        await pass(0.01);
        old.mutate("add", 2);
        assert.deepEqual(fake.make({ storage }).state, [1, 2]);
        const key = storage.queue.at(-1);
        const ahead = key.replace(/[0-9]+$/, "9999999999999");
        storage.setItem(ahead, storage.getItem(key));
        storage.removeItem(key);
        const last = fake.make({ storage });
        last.mutate("add", 3);
        assert.deepEqual(fake.make({ storage }).state, [1, 2, 3]);
    """,
    "a pull that brings nothing changes nothing": """
        const storage = makeStorage(), client = await fake.start({ storage });
        let changes = 0;
        client.addEventListener("change", () => changes++);
        storage.setItem = () => { throw new Error("it was written again"); };
        await pass(300);
        assert.equal(changes, 0);
        client.stop();
    """,
    "mutate gives the mutation, as a refusal will name it": """
        fake.instead.push = () =>
          json([{ ok: false, code: "conflict", error: "a reason" }]);
        const client = await fake.start(), { id } = client.mutate("add", 1);
        await pass(1);
        assert.deepEqual(fake.refused.map(({ mutation }) => mutation.id), [id]);
    """,
    "a client that is closed leaves what waits to the next": """
        const held = new Map();
        const request = async (name, options, work) => {
          if (held.has(name)) return work(null);
          held.set(name, work({}).finally(() => held.delete(name)));
        };
        Object.defineProperty(globalThis, "navigator",
          { value: { locks: { request } }, configurable: true });
        const storage = makeStorage(), one = fake.make({ storage });
        one.mutate("add", 1);
        await quiet();
        const two = fake.make({ storage }), other = fake.make({ storage, user: "ben" });
        await quiet();
        assert.deepEqual([two.state, other.state], [[], []]);
        one.addEventListener("status", () => one.start());
        one.close();
        one.start();
        await quiet();
        assert.equal(one.status.running, false);
        two.start();
        await pass(1);
        Object.defineProperty(globalThis, "navigator",
          { value: undefined, configurable: true });
        assert.deepEqual([two.state, other.state], [[1], []]);
        assert.deepEqual([fake.data, storage.queue], [[1], []]);
    """,
    "mutations keep their order over several reloads": """
        for (let round = 0; round < 10; round++) {
          const storage = makeStorage();
          for (const data of [1, 2, 3]) {
            fake.make({ storage }).mutate("add", data);
            await pass(0.01);
          }
          assert.deepEqual(fake.make({ storage }).state, [1, 2, 3]);
        }
    """,
    "no Retry-After makes it spin": """
        for (const seconds of ["1e10", "-100", "Infinity"]) {
          fake.instead.push = () =>
            refuse(503, "unavailable", { "Retry-After": seconds });
          fake.calls.length = 0;
          const client = await fake.start();
          client.mutate("add", "a");
          await pass(0.3);
          assert.equal(fake.all("push").length, 1);
          client.stop();
        }
    """,
    "a storage that throws at everything does not stop it": """
        const throws = () => {
          throw new DOMException("It is forbidden.", "SecurityError");
        };
        const storage = { get length() { return throws(); } };
        for (const name of ["key", "getItem", "setItem", "removeItem"]) {
          storage[name] = throws;
        }
        const client = await fake.start({ storage });
        client.mutate("add", "a");
        await pass(1);
        assert.deepEqual([fake.data, client.state], [["a"], ["a"]]);
    """,
    "a stored mutation that predict does not understand is pushed all the same": """
        const storage = makeStorage();
        fake.make({ storage }).mutate("add", "a");
        const predict = () => { throw new Error("It is of another form."); };
        const client = await fake.start({ storage, predict });
        await pass(1);
        assert.deepEqual([fake.data, client.state, storage.queue], [["a"], ["a"], []]);
    """,
    "what was decided in a history that is gone is asked again": """
        fake.add("a");
        const client = await fake.start();
        fake.held.add("pull");
        client.mutate("add", "own");
        await quiet();
        fake.log.pop();  // a copy of cursor 1 is restored, which knows our cursor
        fake.epoch = "2";
        fake.instead.push = ({ body }) => json(body.map(({ args }) => fake.add(args)));
        fake.held.clear();
        fake.last("pull").answer(
          { changes: [], cursor: 1, epoch: "2", hasMore: false });
        await pass(60);
        assert.deepEqual([fake.data, client.state], [["a", "own"], ["a", "own"]]);
    """,
    "an answer that was lost, and whose changes were trimmed since, hides nothing": """
        let isFirst = true;
        fake.instead = {
          push(call) {
            fake.push(call);
            if (isFirst) throw isFirst = false, new TypeError("The answer was lost.");
            return json([{ ok: true, cursor: 1, duplicate: true }]);
          },
          pull: (call) => call.query.cursor < fake.head
            ? refuse(410, "cursor_too_old") : fake.pull(call),
        };
        const client = await fake.start(), seen = new Set();
        client.addEventListener("change", () => seen.add(client.state.join()));
        client.mutate("add", "a");
        await pass(9);
        assert.deepEqual([client.state, client.pending], [["a"], []]);
        assert.ok([...seen].every((state) => state.includes("a")), [...seen]);
    """,
    "a repeat without its changes is shown until a pull begun after it has ended": """
        fake.held.add("push").add("pull");
        const storage = makeStorage(), seen = [];
        const client = await fake.start({ storage });
        client.addEventListener("change", () => seen.push(client.state.join()));
        const before = fake.last("pull");
        client.mutate("add", "a");
        await quiet();
        fake.add("a");
        // It was applied elsewhere.
        fake.last("push").answer(json([{ ok: true, cursor: 9, duplicate: true }]));
        await quiet();
        before.answer({ changes: [], cursor: 0, epoch: "1", hasMore: false });
        await quiet();
        assert.deepEqual([client.state, client.pending, storage.queue.length],
          [["a"], [], 1]);
        const { cursor } = fake.last("pull").query;
        assert.notEqual(fake.last("pull"), before);
        fake.last("pull").answer(fake.pull({ query: { cursor } }));
        await quiet();
        assert.deepEqual([client.state, storage.queue, storage.base.cursor],
          [["a"], [], 1]);
        assert.deepEqual(new Set(seen), new Set(["a"]));
    """,
    "a clock that is set back stops neither polls nor the look at a silent socket": """
        const client = await fake.start(), live = await fake.live();
        const { now } = simulated.Date;
        simulated.Date.now = () => now() - 3600e3;
        fake.add("a");
        await pass(70);
        simulated.Date.now = now;
        assert.deepEqual([client.state, fake.sockets.length], [["a"], 2]);
    """,
}


@table("script", PROMISES)
def test_the_client_keeps_its_promise_that(node: Node, script: str) -> None:
    node("script", script)


REFUSED_ONCE = set[str]()  # ids


def apply_and_record(db: sqlite3.Connection, mutation: Mutation) -> list[Any]:
    """The demo, and each mutation that it applied: one that it applied twice is there
    twice."""
    try:
        changes = mizusync.apply_todo(db, mutation)
    except mizusync.SyncError:
        REFUSED_ONCE.add(mutation.id)
        raise
    db.execute("INSERT INTO applied VALUES (?)", (mutation.id,))
    return changes


persons = st.integers(0, 2)
kinds = st.sampled_from(
    ["lost", "unheard", "torn", "twice", "slow", "late", "tooLate", "busy"]
)
edits = st.sampled_from(
    [
        ("create", {"title": "x"}),
        ("create", {"title": "y"}),
        ("update", {"title": "z"}),
        ("update", {"completed": True}),
        ("update", {"completed": False}),
        ("delete", {}),
    ]
)


class Persons(RuleBasedStateMachine):
    """Three clients on lines that fail, and a server that is trimmed and restored."""

    node: Node  # one for all

    @initialize(shared=st.booleans())
    def open(self, shared: bool) -> None:
        """Two of them may be tabs of one browser, over one storage."""
        self.stack = ExitStack()
        self.path = (
            Path(self.stack.enter_context(tempfile.TemporaryDirectory())) / "log.db"
        )
        self.running = self.stack.enter_context(ExitStack())
        self.backup: set[str] | None = None
        self.gone = set[str]()  # what was applied after the copy that was restored
        self.serve("begin", shared)

    def serve(self, call: str, *arguments: Any) -> None:
        engine = Engine(
            self.path,
            apply=apply_and_record,
            snapshot=mizusync.snapshot_todos,
            schema=mizusync.TODO_SCHEMA
            + "CREATE TABLE IF NOT EXISTS applied (id TEXT);",
            settings=replace(SMALL, hint_gap=0),
        )
        self.live = self.running.enter_context(serving(engine))
        self.node(call, "{}:{}".format(*self.live.address), *arguments)

    def applied(self) -> list[str]:
        with closing(sqlite3.connect(self.path)) as db:
            return [
                key for (key,) in db.execute("SELECT id FROM applied ORDER BY rowid")
            ]

    @rule(who=persons, key=st.sampled_from("abc"), edit=edits)
    def edit(self, who: int, key: str, edit: tuple[str, dict[str, Any]]) -> None:
        self.node("edit", who, f"todo.{edit[0]}", {"id": key, **edit[1]})

    @rule(who=persons, these=st.lists(kinds, min_size=1, max_size=4))
    def the_next_requests_are(self, who: int, these: list[str]) -> None:
        self.node("fault", who, *these)

    @rule(
        who=persons, what=st.sampled_from(["drop", "mute", "stop", "start", "reload"])
    )
    def do(self, who: int, what: str) -> None:
        self.node(what, who)

    @rule(who=persons, seconds=st.sampled_from([0, 3, 15]), blocked=st.booleans())
    def sockets_are(self, who: int, seconds: int, blocked: bool) -> None:
        self.node("line", who, {"lag": 1000 * seconds, "isBlocked": blocked})

    @rule(seconds=st.sampled_from([0, 0.1, 1, 5, 25, 100]))
    def wait(self, seconds: float) -> None:
        self.node("pass", seconds)

    @rule(behind=st.integers(0, 3))
    def trim(self, behind: int) -> None:
        head = self.live.call(self.live.engine.current)
        self.live.call(self.live.engine.trim, DEFAULT, max(head - behind, 0))

    @rule()
    def back_up(self) -> None:
        self.backup = set(self.applied())
        back_up(self.path)

    @precondition(lambda self: self.backup is not None)
    @rule()
    def restore(self) -> None:
        assert self.backup is not None
        self.node("pass", 100)  # what is on its way arrives before
        self.gone |= set(self.applied()) - self.backup
        self.running.close()
        shutil.copy(self.path.with_name("backup.db"), self.path)
        self.backup = None
        self.serve("move")

    def teardown(self) -> None:
        if not hasattr(self, "live"):
            return
        with self.stack:
            seen = self.node("converge", 200)
            data = json.loads(self.live.call(self.live.engine.snapshot).encode())[
                "data"
            ]
            assert seen["states"] == 3 * [data["todos"]]
            assert (seen["waiting"], seen["repeated"]) == ([0, 0, 0], [])
            applied, dropped = self.applied(), self.gone | set(seen["refused"])
            assert len(applied) == len(set(applied))
            for own in seen["made"]:
                kept = [key for key in own if key not in dropped]
                assert set(kept) <= set(applied)
                # In order; but of one that was refused, and whose refusal was lost on
                # the way, the retry may find what it lacked: the protocol lets it.
                sure = [key for key in kept if key not in REFUSED_ONCE]
                assert [key for key in applied if key in sure] == sure


def test_clients_on_bad_lines_see_the_same_in_the_end_and_lose_nothing(
    node: Node,
) -> None:
    Persons.node = node
    run_state_machine_as_test(
        Persons, settings=settings(max_examples=25, stateful_step_count=30)
    )


# --- Page -----------------------------------------------------------------------------
# The page in a real browser, where things are found as a screen reader finds them: by
# role and name. One class, at whose end the browser goes: while there is Playwright,
# its loop runs in this thread, and no other test could run one.

TITLES = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "<iframe srcdoc='<script>parent.alert(1)</script>'></iframe>",
    "&lt;b&gt; &amp;amp; ${alert(1)} {{alert(1)}}",
    "\U0001f469\u200d\U0001f467 \U0001f1ef\U0001f1f5 \U0001f44d\U0001f3fd",
    "\u05e9\u05dc\u05d5\u05dd, 3 \u05d7\u05dc\u05d1 \u0645\u0631\u062d\u0628\u0627",
    "report\u202efdp.exe",
]


class Window:
    """The page in one window."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.new = page.get_by_role("textbox", name="New todo")
        self.field = page.get_by_role("textbox", name="Title", exact=True)
        self.list = page.get_by_role("list", name="Todos")
        self.titles = self.list.locator(".title")
        self.offline = page.get_by_role("switch", name="Work offline")
        self.status = page.get_by_role("status")
        self.notice = page.get_by_role("alert")

    def title(self, title: str) -> Any:
        return self.list.get_by_role("button", name=title, exact=True)

    def box(self, title: str) -> Any:
        return self.list.get_by_role("checkbox", name=f"Done: {title}", exact=True)

    def add(self, *titles: str) -> None:
        for title in titles:
            self.new.fill(title)
            self.new.press("Enter")

    def edit(self, title: str, text: str) -> None:
        self.title(title).dblclick()
        self.field.fill(text)
        self.field.press("Enter")

    def delete(self, title: str) -> None:
        self.list.get_by_role("button", name=f"Delete {title}", exact=True).click()

    def shows(self, *titles: str) -> None:
        expect(self.titles).to_have_text(list(titles))

    def says(self, status: str) -> None:
        expect(self.status).to_have_text(status)

    def come_back(self) -> None:
        """The browser says so: it does not sit out a wait."""
        self.page.evaluate("dispatchEvent(new Event('online'))")

    def settles(self) -> None:
        """All that it asked for was answered: of that, nothing is kept for another
        try."""
        self.page.wait_for_function(
            "() => !Object.keys(localStorage).some((key) => key.includes('queue '))"
        )

    def focused(self, words: str) -> None:
        """What has the focus, by the name that it has for a screen reader."""
        expect(self.page.locator(":focus")).to_have_accessible_name(words)


class Windows:
    """Windows of one browser. Whatever any of them complains of is a fault."""

    def __init__(self, browser: Any) -> None:
        self.browser, self.contexts = browser, list[Any]()
        self.servers = ExitStack()  # which stay until the windows have gone
        self.faults, self.pushed = list[str](), list[str]()
        self.may_say = "$^"  # what the test brings about

    def open(
        self, at: Any, place: str = "", beside: Window | None = None, **how: Any
    ) -> Window:
        """A window on this server; `beside` another it shares that one's storage."""
        page = (beside.page.context if beside else self.context(**how)).new_page()
        page.goto("http://{}:{}/{}".format(*at.address, place))
        return Window(page)

    def serve(
        self,
        *,
        apply: Callable[
            [sqlite3.Connection, Mutation], list[Any]
        ] = mizusync.apply_todo,
        on_auth: Callable[[mizusync.Request, str], Any] = mizusync.require_scope,
        **options: Any,
    ) -> Live:
        """The demo, in this process."""
        folder = self.servers.enter_context(tempfile.TemporaryDirectory())
        engine = Engine(
            Path(folder, "todos.db"),
            apply=apply,
            snapshot=mizusync.snapshot_todos,
            schema=mizusync.TODO_SCHEMA,
            settings=SMALL,
        )
        options.setdefault("page", PROGRAM.with_name("demo.html"))
        return self.servers.enter_context(serving(engine, on_auth=on_auth, **options))

    def context(self, **how: Any) -> Any:
        how = {
            "reduced_motion": "reduce",
            **how,
        }  # to draw what moves takes most of the time
        context = self.browser.new_context(**how)
        self.contexts.append(context)
        context.set_default_timeout(1000 * PATIENCE)
        context.on("console", self.hear)
        context.on("weberror", lambda error: self.faults.append(str(error.error)))
        context.on("request", self.see)
        return context

    def hear(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.faults.append(message.text)

    def see(self, request: Any) -> None:
        if request.method == "POST":
            self.pushed += [mutation["id"] for mutation in request.post_data_json]

    def close(self) -> None:
        for context in self.contexts:
            for page in context.pages:
                page.evaluate("0")  # what it said before has come by then
            context.close()
        self.servers.close()
        assert not [
            fault for fault in self.faults if not re.search(self.may_say, fault)
        ]


def expect(locator: Any) -> Any:
    """Playwright's assertions, which wait."""
    return pytest.importorskip("playwright.sync_api").expect(locator)


@pytest.fixture(scope="class")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright")
    names = ("chromium", "chromium-browser", "google-chrome")
    if (path := next(filter(None, map(shutil.which, names)), None)) is None:
        pytest.skip(f"no browser to open the page in: none of {', '.join(names)}")
    quiet = ("background-networking", "component-update", "sync", "quic", "gpu")
    flags = ["--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in quiet)]
    playwright.expect.set_options(timeout=1000 * PATIENCE)
    with playwright.sync_playwright() as running:
        asyncio.get_running_loop().set_debug(False)  # it takes as long as all the rest
        browser = running.chromium.launch(executable_path=path, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def windows(browser: Any) -> Iterator[Windows]:
    windows = Windows(browser)
    yield windows
    windows.close()


@pytest.fixture
def demo(windows: Windows) -> Live:
    return windows.serve()


OFFLINE = {
    "the switch": lambda window, yes: window.offline.set_checked(yes),
    "the network": lambda window, yes: window.page.context.set_offline(yes),
}


def of_demo(name: str, **args: Any) -> dict[str, Any]:
    """A mutation of somebody else's."""
    return todo(name, **args) | {"scope": "demo"}


def titles_at(server: Live | Program, scope: str = "demo") -> list[str]:
    """The titles that the server has."""
    with closing(RawClient(server.address)) as client:
        state = client.request("GET", f"/sync/snapshot?scope={scope}").json["data"]
    return [todo["title"] for todo in state["todos"]]


class TestPage:
    def test_two_windows_show_the_same(self, windows: Windows, demo: Live) -> None:
        one, other = windows.open(demo), windows.open(demo)
        one.add("Buy milk", "Buy bread")
        other.shows("Buy milk", "Buy bread")
        other.box("Buy milk").check()
        expect(one.box("Buy milk")).to_be_checked()
        one.edit("Buy bread", "Buy rye")
        other.shows("Buy milk", "Buy rye")
        expect(other.page.get_by_text("1 left")).to_be_visible()
        other.delete("Buy milk")
        one.shows("Buy rye")
        for window in (one, other):
            window.says("in sync · live")
        assert titles_at(demo) == ["Buy rye"]

    @table("offline", OFFLINE)
    def test_what_two_windows_did_offline_comes_together(
        self, windows: Windows, demo: Live, offline: Callable[[Window, bool], None]
    ) -> None:
        windows.may_say = "ERR_INTERNET_DISCONNECTED"
        one, other = both = windows.open(demo), windows.open(demo)
        one.add("a", "b")
        one.settles()
        other.shows("a", "b")
        for window in both:
            offline(window, True)
            window.says("offline")
        one.edit("a", "a of one")
        one.add("c")
        other.edit("a", "a of the other")
        other.delete("b")
        other.add("d")
        one.says("offline · waiting (2)")
        one.shows("a of one", "b", "c")
        other.says("offline · waiting (3)")
        other.shows("a of the other", "d")
        for window in both:
            offline(window, False)
            window.says("in sync · live")
        for window in both:
            window.shows("a of the other", "c", "d")
        assert titles_at(demo) == ["a of the other", "c", "d"]

    def test_the_switch_and_what_waits_survive_a_reload(
        self, windows: Windows, demo: Live
    ) -> None:
        window = windows.open(demo)
        window.offline.check()
        window.add("a", "b")
        window.page.reload()
        expect(window.offline).to_be_checked()
        window.shows("a", "b")
        window.says("offline · waiting (2)")
        assert not windows.pushed
        window.offline.uncheck()
        window.says("in sync · live")
        assert titles_at(demo) == ["a", "b"]

    def test_a_window_closed_while_offline_pushes_when_it_is_opened_again(
        self, windows: Windows, demo: Live
    ) -> None:
        first = windows.open(demo)
        first.offline.check()
        first.add("a", "b")
        first.delete("a")
        again = windows.open(demo, beside=first)
        again.says("in sync · live")
        again.add("c")
        until(
            lambda: titles_at(demo) == ["c"]
        )  # the first window's are the first window's
        again.shows("c")
        first.page.close()
        again.come_back()
        again.shows("c", "b")
        again.says("in sync · live")
        third = windows.open(demo, beside=first)
        third.shows("c", "b")
        third.says("in sync · live")
        assert titles_at(demo) == ["c", "b"]
        # come_back() may cut a push that has begun already: then it comes again.
        assert len(set(windows.pushed)) == 4

    def test_two_windows_of_one_browser_push_nothing_twice(
        self, windows: Windows, demo: Live
    ) -> None:
        one = windows.open(demo)
        other = windows.open(demo, beside=one)
        for window in (one, other):
            window.offline.check()
        one.add("a", "b")
        other.add("c", "d")
        for window in (one, other):
            window.offline.uncheck()
            window.says("in sync · live")
        assert titles_at(demo) == ["a", "b", "c", "d"]
        assert len(windows.pushed) == len(set(windows.pushed)) == 4

    def test_kill_9_and_a_restart_lose_nothing_of_two_windows(
        self, windows: Windows, tmp_path: Path
    ) -> None:
        windows.may_say = (
            "ERR_CONNECTION_|ERR_EMPTY_RESPONSE|closed before the connection"
        )
        arguments = ("--db", str(tmp_path / "todos.db"))
        with program(*arguments) as running:
            one, other = windows.open(running), windows.open(running)
            one.add("before")
            one.settles()
            other.shows("before")
            running.process.kill()
            one.says("offline")
            one.add("of one")
            other.edit("before", "after")
            other.delete("after")
            other.add("of the other")
            one.says("offline · waiting (1)")
            other.says("offline · waiting (3)")
        port = str(running.address[1])
        with held(running.address), program(*arguments, "--port", port) as running:
            for window in (one, other):
                window.come_back()
                window.says("in sync · live")
            until(lambda: len(titles_at(running)) == 2)
            for window in (one, other):
                window.shows(*titles_at(running))
        assert set(windows.faults)  # the browser did complain that nobody was there

    def test_of_a_replaced_database_what_is_new_is_shown_and_what_waits_is_pushed(
        self, windows: Windows, tmp_path: Path
    ) -> None:
        windows.may_say = (
            "ERR_CONNECTION_|ERR_EMPTY_RESPONSE|closed before the connection|410"
        )
        with program("--db", str(tmp_path / "old.db")) as running:
            with closing(RawClient(running.address)) as client:
                client.push(of_demo("create", id="1", title="old"))
            window = windows.open(running)
            window.shows("old")
            window.says("in sync · live")
            running.process.kill()
            window.says("offline")
            window.add("mine")
        arguments = (
            "--db",
            str(tmp_path / "new.db"),
            "--port",
            str(running.address[1]),
        )
        with held(running.address), program(*arguments) as running:
            with closing(RawClient(running.address)) as client:
                client.push(of_demo("create", id="1", title="new"))
            window.come_back()
            window.says("in sync · live")
            until(lambda: sorted(titles_at(running)) == ["mine", "new"])
            window.shows(*titles_at(running))

    def test_a_refused_mutation_is_undone_and_told(
        self, windows: Windows, demo: Live
    ) -> None:
        demo.client().push(of_demo("create", id="1", title="Buy milk"))
        window = windows.open(demo)
        window.shows("Buy milk")
        window.offline.check()
        window.edit("Buy milk", "Buy oat milk")
        window.add("Buy bread")
        demo.client().push(of_demo("delete", id="1"))
        window.offline.uncheck()
        expect(window.notice).to_have_text(
            "Not accepted: Buy oat milk (this todo is not there)"
        )
        window.shows("Buy bread")
        window.says("in sync · live")
        window.add("Buy tea")
        expect(window.notice).to_be_empty()

    def test_a_title_is_text_and_never_more(self, windows: Windows, demo: Live) -> None:
        text = "all => all.map((one) => one.textContent)"
        window = windows.open(demo, "#%3Cimg src=x onerror=alert(1)%3E")
        window.add(*TITLES)
        window.shows(*TITLES)
        assert window.titles.evaluate_all(text) == TITLES  # as it was asked for
        window.settles()
        window.page.reload()
        window.shows(*TITLES)
        assert window.titles.evaluate_all(text) == TITLES  # as it was answered
        window.edit(TITLES[1], TITLES[0])
        for title in TITLES[2:4]:
            window.box(title).check()
            window.delete(title)
        window.shows(TITLES[0], TITLES[0], *TITLES[4:])
        assert window.page.locator("main :is(script, img, iframe)").count() == 0

    def test_the_keyboard_is_enough(self, windows: Windows, demo: Live) -> None:
        window = windows.open(demo)
        press, focus = window.page.keyboard.press, window.page.locator(":focus")

        def do(*keys: str, at: str = "", way: str = "Tab", then: str = "") -> None:
            """Tab to where this name is, press these keys, and find the focus there or
            `then`."""
            for _ in range(20):
                if not at or (focus.count() and f'"{at}"' in focus.aria_snapshot()):
                    break
                press(way)
            for key in keys:
                press(key)
            window.focused(then or at)

        window.focused("New todo")
        do("a", "Enter", "b", "Enter", "c", "Enter", then="New todo")
        window.shows("a", "b", "c")
        do("Space", at="Done: a")
        do("Enter", at="a", then="Title")
        do("x", "Enter", then="x")  # the old text was selected
        do("Enter", "y", "Escape", then="x")
        window.shows("x", "b", "c")
        expect(window.box("x")).to_be_checked()
        do("Enter", at="Delete b", then="c")
        do("Enter", at="Delete c", then="x")
        do("Enter", at="Delete x", then="New todo")
        window.settles()
        do("Space", at="Work offline")
        window.says("offline")
        do("z", at="New todo", way="Shift+Tab")
        do("Enter", at="Add")
        window.says("offline · waiting (1)")
        do("Space", at="Work offline")
        window.says("in sync · live")
        assert titles_at(demo) == ["z"]

    def test_a_mouse_edits_with_two_clicks_and_saves_where_it_leaves(
        self, windows: Windows, demo: Live
    ) -> None:
        window = windows.open(demo)
        window.add("a", "  ", "b")
        window.shows("a", "b")
        window.title("a").click()
        expect(window.field).to_have_count(0)
        window.title("a").dblclick()
        window.field.fill("  a new ")
        window.box("b").check()  # by which it leaves the field
        window.shows("a new", "b")
        expect(window.box("b")).to_be_checked()
        window.edit("b", "  ")  # no title at all: as it was
        window.shows("a new", "b")
        window.settles()
        assert titles_at(demo) == ["a new", "b"]
        assert len(windows.pushed) == 4

    def test_a_change_from_elsewhere_takes_neither_focus_nor_half_a_word(
        self, windows: Windows, demo: Live
    ) -> None:
        client = demo.client()
        client.push(*(of_demo("create", id=name, title=name) for name in "abc"))
        window = windows.open(demo)
        window.title("b").dblclick()
        window.field.fill("half a wor")
        window.field.press("ArrowLeft")
        client.push(of_demo("update", id="b", title="b of the other"))
        client.push(of_demo("update", id="c", title="c new"))
        client.push(of_demo("delete", id="a"), of_demo("create", id="d", title="d"))
        expect(window.title("d")).to_be_visible()
        window.focused("Title")
        window.page.keyboard.type("x")
        expect(window.field).to_have_value("half a woxr")
        window.field.press("Escape")
        window.shows("b of the other", "c new", "d")
        window.title("b of the other").dblclick()
        window.field.fill("too late")
        client.push(of_demo("delete", id="b"))
        window.focused("c new")
        window.new.fill("half")
        client.push(of_demo("create", id="e", title="e"))
        window.shows("c new", "d", "e")
        window.focused("New todo")
        expect(window.new).to_have_value("half")
        assert not windows.pushed

    def test_of_a_thousand_todos_a_change_touches_one(
        self, windows: Windows, demo: Live
    ) -> None:
        client = demo.client()
        for start in range(0, 1000, 100):
            client.push(
                *(of_demo("create", id=str(start + n), title="x") for n in range(100))
            )
        window = windows.open(demo)
        expect(window.titles).to_have_count(1000)
        window.page.evaluate("""() => {
            const list = document.getElementById("list"), all = [...list.children];
            const rowOf = (node) => all.findIndex((row) => row.contains(node));
            Object.assign(self, { list, all, touched: new Set() });
            new MutationObserver((records) => {
              for (const { target } of records) touched.add(rowOf(target));
            }).observe(list, { subtree: true, childList: true, attributes: true });
        }""")
        client.push(of_demo("update", id="500", title="changed"))
        # Not by expect(): what it writes down of a thousand rows, at each look, takes
        # seconds.
        until(lambda: window.titles.nth(500).text_content() == "changed")
        assert window.page.evaluate("[...touched]") == [500]
        window.page.evaluate("touched.clear()")
        client.push(
            of_demo("delete", id="0"), of_demo("create", id="new", title="the last")
        )
        until(lambda: window.titles.last.text_content() == "the last")
        assert window.page.evaluate("[...touched]") == [-1]  # no row: their list alone
        same = (
            "[...list.children].slice(0, -1)"
            ".every((row, index) => row === all[index + 1])"
        )
        assert window.page.evaluate(same)

    def test_every_script_and_style_of_a_page_runs_however_it_is_written(
        self, windows: Windows, tmp_path: Path
    ) -> None:
        page = tmp_path / "page.html"
        page.write_bytes(
            b"<!doctype html>\r\n<link rel=icon href=data:,>\r\n"
            b"<!-- a <script> here -->\r\n"
            b"<STYLE>\r\nbody { color: red }\r\n</STYLE>"
            b"<style>body { margin: 7px }</style>\r\n"
            b"<script type=module>\r\nself.one = '<!-- -->';\r\n</script>\r\n"
            b"<SCRIPT>\r\nself.two = 2;\r\n</SCRIPT>\r\n"
        )
        window = windows.open(windows.serve(page=page))
        assert window.page.evaluate("[self.one, self.two]") == ["<!-- -->", 2]
        style = (
            "(({ color, margin }) => [color, margin])(getComputedStyle(document.body))"
        )
        assert window.page.evaluate(style) == ["rgb(255, 0, 0)", "7px"]

    def test_the_page_of_the_readme_is_live_and_tells_a_refusal(
        self, windows: Windows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(Server, "run", lambda server, host, port: None)
        names: dict[str, Any] = {}
        exec(blocks("python", "An application of your own")[0], names)
        monkeypatch.undo()
        (page,), client = blocks("html", "Its page"), part_one()
        place = "// part one of the script in demo.html goes here\n"
        assert place in page
        (tmp_path / "seats.html").write_text(
            page.replace(place, client), encoding="utf-8"
        )
        live = windows.servers.enter_context(
            serving(names["engine"], page=tmp_path / "seats.html")
        )
        windows.may_say = "404"  # it has no icon
        one, other = windows.open(live).page, windows.open(live).page
        said: list[str] = []

        def hear(dialog: Any) -> None:
            said.append(dialog.message)
            dialog.dismiss()

        other.on("dialog", hear)
        one.locator("input").fill("A1")
        one.locator("input").press("Enter")
        for window in (one, other):
            expect(window.get_by_role("listitem")).to_have_text(re.compile("A1: guest"))
            expect(window.locator("p")).to_have_text("live, 0 waiting")
        other.locator("input").fill("A1")
        other.locator("input").press("Enter")
        until(lambda: said or other.wait_for_timeout(20))
        assert said == ["seat A1 is taken"]

    def test_what_has_the_focus_is_not_hidden_under_the_form(
        self, windows: Windows, demo: Live
    ) -> None:
        demo.client().push(
            *(of_demo("create", id=str(n), title=f"{n}") for n in range(40))
        )
        window = windows.open(demo)
        expect(window.titles).to_have_count(40)
        under = """titles => titles.reverse().filter((title) => {
            title.focus();
            const form = document.getElementById("add").getBoundingClientRect();
            return title.getBoundingClientRect().top < form.bottom;
        }).length"""
        hidden = window.titles.evaluate_all(under)
        assert hidden == 0

    def test_each_scope_is_a_list_of_its_own_and_the_address_names_it(
        self, windows: Windows, demo: Live
    ) -> None:
        one, other = windows.open(demo, "#caf%C3%A9 1/2"), windows.open(demo)
        one.add("of the café")
        one.says("in sync · live")
        other.add("of the demo")
        other.page.evaluate("location.hash = 'café 1/2'")
        other.shows("of the café")
        other.page.go_back()
        other.shows("of the demo")
        one.shows("of the café")
        with one.page.expect_popup() as popup:
            one.page.get_by_role("link", name="open a second window").click()
        Window(popup.value).shows("of the café")
        until(lambda: titles_at(demo) == ["of the demo"])

    def test_another_scope_can_be_chosen_and_nothing_is_lost_by_it(
        self, windows: Windows, demo: Live
    ) -> None:
        window = windows.open(demo)
        scope = window.page.get_by_role("textbox", name="Scope")
        expect(scope).to_have_value("demo")
        window.offline.check()
        window.add("waits")
        scope.fill("other list")
        scope.press("Enter")
        window.shows()
        expect(window.page).to_have_url(re.compile("#other%20list$"))
        scope.fill("not entered")
        window.new.focus()
        expect(scope).to_have_value("other list")
        expect(window.offline).to_be_checked()
        window.add("waits elsewhere")
        window.page.go_back()
        window.shows("waits")
        window.says("offline · waiting (1)")
        window.offline.uncheck()
        window.says("in sync · live")
        assert titles_at(demo) == ["waits"]
        window.page.go_forward()
        window.shows("waits elsewhere")
        window.says("in sync · live")
        assert titles_at(demo, "other+list") == ["waits elsewhere"]

    def test_the_way_of_a_change_is_shown_and_the_last_ones_are_listed(
        self, windows: Windows, demo: Live
    ) -> None:
        watch = """() => {
            self.lit = new Set();
            new MutationObserver((records) => records.forEach(({ target }) => {
              if (target.classList.contains("lit")) self.lit.add(target.dataset.step);
            })).observe(document.getElementById("way"),
              { subtree: true, attributes: true });
        }"""

        def has_seen(window: Window, steps: set[str]) -> bool:
            return steps <= set(window.page.evaluate("[...lit]"))

        one, other = windows.open(demo), windows.open(demo)
        for window in (one, other):
            window.says("in sync · live")
            window.page.evaluate(watch)
        one.add("a")
        other.shows("a")
        (change,) = demo.client().pull(scope="demo")["changes"]
        until(lambda: has_seen(one, {"push", "log"}))
        # Unless a pull, which was under way since the start, was there before the hint.
        until(lambda: has_seen(other, {"hint"}) or has_seen(other, {"pull"}))
        for window in (one, other):
            logged = window.page.locator("#log").get_by_role("listitem")
            words = re.compile(rf"\b{change['cursor']}\b.*\d m?s", re.DOTALL)
            expect(logged.filter(has_text=words)).to_have_count(1)
        assert not has_seen(other, {"push"})

    def test_a_notice_hides_nothing_that_is_needed(
        self, windows: Windows, demo: Live
    ) -> None:
        todos = [of_demo("create", id=str(n), title=f"{n}") for n in range(40)]
        demo.client().push(*todos)
        window = windows.open(demo, viewport={"width": 390, "height": 700})
        window.shows(*map(str, range(40)))
        window.offline.check()
        for number in range(3):
            window.edit(str(number), "new")
            demo.client().push(of_demo("delete", id=str(number)))
        window.offline.uncheck()
        expect(window.notice).to_contain_text("Not accepted")
        window.title("39").focus()
        hidden = """element => {
            const { left, top, width, height } = element.getBoundingClientRect();
            const middle = [left + width / 2, top + height / 2];
            return !element.contains(document.elementFromPoint(...middle));
        }"""
        assert not window.new.evaluate(hidden)
        for _ in range(20):
            window.page.keyboard.press("Shift+Tab")
            assert not window.page.locator(":focus").evaluate(hidden)

    def test_the_switch_is_the_one_that_decides(self, windows: Windows) -> None:
        windows.may_say = (
            "401|Authentication|closed before the connection|ERR_FAILED|404"
        )
        window = windows.open(windows.serve(token="s3cret"))
        asked = window.page.get_by_label("This server wants a token")
        expect(asked).to_be_visible()
        window.offline.check()
        expect(asked).to_be_hidden()  # it would lead online, past the switch
        window.offline.uncheck()
        asked.fill("s3cret")
        asked.press("Enter")
        window.says("in sync · live")
        window.page.route("**/sync/*", lambda route: route.abort())
        window.add("a")
        window.says("offline · waiting (1)")
        window.offline.check()  # by oneself, which is no reason for a warning
        window.page.unroute("**/sync/*")
        window.offline.uncheck()
        window.says("in sync · live")
        expect(window.notice).to_be_empty()
        window.page.route(
            "**/sync/*", lambda route: route.fulfill(status=404, body="{}")
        )
        window.add("b")
        expect(window.notice).to_contain_text("(What you wrote is kept.)")
        window.page.unroute("**/sync/*")
        window.offline.check()
        window.offline.uncheck()
        window.says("in sync · live")
        expect(window.notice).to_be_empty()  # it is over

    def test_a_server_with_a_token_is_asked_for_with_it(self, windows: Windows) -> None:
        windows.may_say = "401|Authentication|closed before the connection"
        demo = windows.serve(token="s3cret")
        window = windows.open(demo)
        asked = window.page.get_by_label("This server wants a token")
        for token in ("wrong", "s3cret"):
            window.add(f"before {token}")
            expect(window.notice).to_contain_text("(What you wrote is kept.)")
            asked.fill(token)
            asked.press("Enter")
        window.says("in sync · live")
        expect(asked).to_be_hidden()
        expect(window.notice).to_be_empty()
        window.page.reload()
        window.shows("before wrong", "before s3cret")
        window.says("in sync · live")
        with window.page.expect_popup() as popup:
            window.page.get_by_role("link", name="open a second window").click()
        second = Window(popup.value)
        second.shows("before wrong", "before s3cret")
        second.says("in sync · live")

    def test_the_status_says_what_waits_for_a_slow_server(
        self, windows: Windows
    ) -> None:
        go = threading.Event()

        def slow(db: sqlite3.Connection, mutation: Mutation) -> list[Any]:
            assert go.wait(PATIENCE)
            return mizusync.apply_todo(db, mutation)

        window = windows.open(windows.serve(apply=slow))
        window.says("in sync · live")
        window.add("a", "b")
        window.says("waiting (2) · live")
        go.set()
        window.says("in sync · live")

    def test_the_status_says_what_a_full_storage_would_lose(
        self, windows: Windows, demo: Live
    ) -> None:
        window = windows.open(demo)
        window.offline.check()
        window.page.evaluate("""() => {
            Storage.prototype.setItem = () => {
              throw new DOMException("", "QuotaExceededError");
            };
        }""")
        window.add("a")
        window.says("offline · waiting (1, lost by a reload)")
        window.offline.uncheck()
        window.says("in sync · live")
        assert titles_at(demo) == ["a"]

    def test_without_a_socket_the_page_polls(self, windows: Windows) -> None:
        def no_socket(request: mizusync.Request, scope: str) -> None:
            if request.path == "/ws":
                raise mizusync.Forbidden("no sockets here")

        windows.may_say = "403"
        demo = windows.serve(on_auth=no_socket)
        window = windows.open(demo)
        window.says("in sync · polling")
        window.add("a")
        window.settles()
        window.says("in sync · polling")
        demo.client().push(of_demo("create", id="1", title="b"))
        window.come_back()  # not in 30 s, but now
        window.shows("a", "b")

    def test_axe_finds_no_fault_in_light_or_in_dark(self, windows: Windows) -> None:
        axe = pytest.importorskip(
            "axe_playwright_python.sync_playwright", reason="no axe"
        )
        windows.may_say = "401|Authentication|closed before the connection"
        window = windows.open(windows.serve(token="s3cret"))
        window.add("a", "b", "c")
        window.box("a").check()
        window.title("b").dblclick()
        expect(window.notice).to_contain_text("kept")
        for scheme in ("light", "dark"):
            window.page.emulate_media(color_scheme=scheme)
            found = axe.Axe().run(window.page)
            assert not found.response["violations"], found.generate_report()

    def test_nothing_is_wider_than_a_small_phone(
        self, windows: Windows, demo: Live
    ) -> None:
        window = windows.open(demo, viewport={"width": 320, "height": 640})
        window.add("W" * 1000, "with words " * 50, "short")
        window.title("short").dblclick()
        assert window.page.evaluate("document.documentElement.scrollWidth") == 320


# --- Two processes --------------------------------------------------------------------
# Two programs on one file are one server: one log, and hints for whoever follows it.
# What arrives only with a heartbeat arrives too late: it beats every 25 s, and PATIENCE
# is 20.


class Two:
    """Two programs, and clients of each."""

    def __init__(self, *programs: Program) -> None:
        self.programs, self.clients = programs, ExitStack()

    def client(self, at: int) -> RawClient:
        return self.clients.enter_context(closing(RawClient(self.programs[at].address)))

    def session(self, at: int) -> RawClient:
        client = self.client(at)
        assert client.upgrade("/ws?scope=list").status == 101
        return client


@contextmanager
def two_programs(path: Path, *arguments: str) -> Iterator[Two]:
    """Two on this file; whichever is left at the end stops in order."""
    arguments = ("--db", str(path), *arguments)
    with program(*arguments) as one:
        port = one.address[1] if "--reuse-port" in arguments else 0
        with program(*arguments, "--port", str(port)) as other:
            two = Two(one, other)
            with two.clients:
                yield two
            for running in two.programs:
                if running.process.poll() is None:
                    status, said, complained = running.end(signal.SIGTERM)
                    assert (status, said) == (0, "")
                    assert "Traceback" not in complained


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Two]:
    """Of all tests that leave both alive; each has scopes of its own."""
    with two_programs(tmp_path_factory.mktemp("two") / "todos.db") as two:
        yield two


def create(**fields: Any) -> dict[str, Any]:
    return todo("create", id=os.urandom(8).hex(), title="x") | fields


def push_one_by_one(
    client: RawClient, mutations: list[Any], results: list[Any]
) -> None:
    for mutation in mutations:
        results += client.push(mutation)
        assert results[-1]["ok"], results[-1]


def log_of(*results: Any) -> list[Any]:
    """What was acknowledged, in the order of the log."""
    return sorted(
        (change for result in results for change in result["changes"]), key=cursor_of
    )


def follow_by_pulls(client: RawClient, count: int) -> list[Any]:
    """A client without a socket."""
    log: list[Any] = []
    place: dict[str, Any] = {}
    while len(log) < count:
        page = client.pull(scope="list", limit=3, wait=60, **place)
        place = {"cursor": page["cursor"], "epoch": page["epoch"]}
        log += page["changes"]
    return log


def follow_by_hints(session: RawClient, puller: RawClient, count: int) -> list[Any]:
    """A client that applies the hints that fit, and pulls for any other that is
    news."""
    session.say("subscribe", {"changes": True})
    page = puller.pull(scope="list")
    log = list(page["changes"])
    while len(log) < count or page["hasMore"]:
        cursor, epoch = page["cursor"], page["epoch"]
        hint = (
            {"cursor": cursor + 1} if page["hasMore"] else session.read_json()["data"]
        )
        if hint["cursor"] <= cursor:
            continue
        page = hint | {"hasMore": False}
        if hint.get("epoch") != epoch or hint["after"] > cursor:
            page = puller.pull(scope="list", cursor=cursor, epoch=epoch)
            assert page["cursor"] >= hint["cursor"] or page["hasMore"]
        log += [change for change in page["changes"] if change["cursor"] > cursor]
    return log


def test_followers_of_two_processes_see_one_log_while_both_are_pushed_to(
    two: Two,
) -> None:
    count, results = 40, list[Any]()
    with ThreadPoolExecutor(8) as pool:
        followers = [
            pool.submit(follow_by_pulls, two.client(at), 4 * count) for at in (0, 1)
        ]
        for at in (0, 1):  # a socket at one, pulls at the other
            clients = two.session(at), two.client(1 - at)
            followers.append(pool.submit(follow_by_hints, *clients, 4 * count))
        todos = [[create() for _ in range(count)] for _ in range(4)]
        pushing = [
            pool.submit(push_one_by_one, two.client(number % 2), todos[number], results)
            for number in range(4)
        ]
    assert [pusher.result() for pusher in pushing] == [None] * 4
    logs = [follower.result() for follower in followers]
    cursors = list(map(cursor_of, logs[0]))
    assert cursors == sorted(set(cursors))
    assert logs == [log_of(*results)] * 4


def test_a_hint_of_one_process_is_true_at_the_other(two: Two) -> None:
    pushers = [two.client(0), two.client(1)]
    sessions = [two.session(0), two.session(1)]
    cursors = {
        session.subscribe(scope="hinted")["data"]["cursor"] for session in sessions
    }
    assert cursors == {0}
    cursor = 0
    for number in range(20):
        (result,) = pushers[number % 2].push(create(scope="hinted"))
        if (
            number % 4 < 2
        ):  # its own commit to another scope, which must not hide the foreign one
            pushers[1 - number % 2].push(create(scope="beside"))
        for at in (0, 1):
            assert sessions[at].read_json()["data"] == {"cursor": result["cursor"]}
            page = pushers[1 - at].pull(scope="hinted", cursor=cursor)
            assert page["changes"] == result["changes"]
        cursor = page["cursor"]


@pytest.mark.skipif(
    sys.platform != "linux", reason="elsewhere one process may get everybody"
)
def test_two_processes_share_a_port_and_hint_each_others_sessions(
    tmp_path: Path,
) -> None:
    with two_programs(tmp_path / "todos.db", "--reuse-port") as two:
        assert two.programs[0].address == two.programs[1].address
        sessions = [two.session(0) for _ in range(30)]
        assert {session.subscribe()["data"]["cursor"] for session in sessions} == {0}
        client = two.client(0)
        assert 0 < client.request("GET", "/healthz").json["sessions"] < len(sessions)
        (result,) = client.push(create())
        hints = [session.read_json()["data"] for session in sessions]
        assert hints == [{"cursor": result["cursor"]}] * len(sessions)


def test_kill_9_of_one_process_loses_nothing_and_the_other_goes_on(path: Path) -> None:
    with two_programs(path) as two:
        todos = [[create() for _ in range(number)] for number in (5000, 5000, 60, 60)]
        results: list[list[Any]] = [[], [], [], []]
        with ThreadPoolExecutor(4) as pool:
            pushing = [
                pool.submit(
                    push_one_by_one,
                    two.client(number // 2),
                    todos[number],
                    results[number],
                )
                for number in range(4)
            ]
            until(
                lambda: (
                    min(map(len, results)) > 20
                    or any(pusher.done() for pusher in pushing)
                )
            )
            two.programs[0].process.kill()
        for pusher in pushing[:2]:
            assert isinstance(pusher.exception(), EOFError | OSError)
        assert [pusher.result() for pusher in pushing[2:]] == [None] * 2
        client = two.client(1)
        for number in range(
            2
        ):  # what was not answered is sent again, to the one that is left
            results[number] += client.push(todos[number][len(results[number])])
        log = follow_by_pulls(client, sum(map(len, results)))
        assert log == log_of(*(result for part in results for result in part))
        assert client.pull(scope="list", cursor=log[-1]["cursor"])["changes"] == []


def test_the_same_pull_gets_the_same_page_from_both_processes(two: Two) -> None:
    chance, clients = random.Random(2026), [two.client(0), two.client(1)]
    log, scopes = list[Any](), ["one", "two"]
    cursors = dict.fromkeys(scopes, [0])
    for _ in range(100):
        todos = [
            create(scope=chance.choice(scopes)) for _ in range(chance.randrange(4))
        ]
        if todos:
            log += log_of(*chance.choice(clients).push(*todos))
        scope, limit = chance.choice(scopes), chance.randint(1, 9)
        cursor = chance.choice(cursors[scope][-4:])  # one that memory has; 0 it may not
        first, second = chance.sample(clients, 2)
        page = first.pull(scope=scope, cursor=cursor, limit=limit)
        assert page == second.pull(scope=scope, cursor=cursor, limit=limit)
        left = [one for one in log if one["scope"] == scope and one["cursor"] > cursor]
        assert page["changes"] == left[:limit]
        assert page["hasMore"] == (len(left) > limit)
        cursors[scope] = [*cursors[scope], page["cursor"]]


# --- A power cut ----------------------------------------------------------------------
# strace writes down what a process asks of the kernel, in order: every write, sync and
# answer.

LINE = re.compile(r"(\d+) +(?:(\w+)\(|<\.\.\. \w+ resumed>)")
ARGUMENTS = re.compile(
    r'(?:\d+<([^>]*)>)?(?:, )?(?:"([^"]*)")?(?:.*?(\d+)\))?'
)  # file, data, at
SHOWN = re.compile(
    rb'"cursor":(\d+),"scope":"_default",[^{]*{"op":"create","todo":{"id":"([^"]+)"'
)


def strace(trace: Path, calls: str) -> list[str]:
    """What to put before a command, so that these system calls of it are written to
    `trace`."""
    options = f"-f -y -xx -qq -s 10000000 -e signal=none -e trace={calls}".split()
    command = ["strace", *options, "-o", str(trace)]
    try:
        subprocess.run(
            [*command, "true"], check=True, capture_output=True, timeout=PATIENCE
        )
    except FileNotFoundError:
        pytest.skip("no strace to see system calls with: apt-get install strace")
    except subprocess.CalledProcessError as error:
        pytest.skip(
            "strace may not trace here (in Docker: --cap-add SYS_PTRACE):"
            f" {error.stderr}"
        )
    return command


def system_calls(trace: Path) -> Iterator[tuple[str, str, bytes, int]]:
    """("began write", file, data, the last number), later ("write", ...) when it has
    returned.

    Calls of several threads overlap; such a call has two lines, each in its place.
    """
    begun: dict[str, tuple[str, str]] = {}
    with trace.open() as lines:
        for line in lines:
            if line.endswith(
                "<detached ...>\n"
            ):  # a thread that went with the program, in no call
                continue
            head = LINE.match(line)
            assert head, line
            name, before = (head[2], "") if head[2] else begun.pop(head[1])
            text = before + line[head.end() :].removesuffix(" <unfinished ...>\n")
            arguments = ARGUMENTS.match(text)
            assert arguments, line
            file, data = (
                bytes.fromhex((arguments[i] or "").replace("\\x", "")) for i in (1, 2)
            )
            fields = file.decode(), data, int(arguments[3] or 0)
            if head[2]:
                yield f"began {name}", *fields
            if text.endswith("\n"):
                yield name, *fields
            else:
                begun[head[1]] = name, text


class File:
    """Its bytes on the disk, and the writes that no sync has covered yet."""

    def __init__(self) -> None:
        self.synced, self.covered = bytearray(), 0
        self.waiting: list[
            tuple[int, bytes]
        ] = []  # without bytes: cut, or extended, to there

    def sync(self) -> None:
        for write in self.waiting[: self.covered]:
            put(self.synced, *write)
        del self.waiting[: self.covered]

    def remains(self, chance: random.Random | None) -> bytes:
        content = bytearray(self.synced)
        for at, data in self.waiting if chance else ():
            for start in range(
                0, len(data) or 1, 512
            ):  # a sector is written whole, or not at all
                if chance and chance.random() < 0.5:
                    put(content, at + start, data[start : start + 512])
        return bytes(content)


def put(content: bytearray, at: int, data: bytes) -> None:
    content.extend(bytes(max(0, at - len(content))))
    content[at : at + len(data) if data else None] = data


class Disk:
    """A folder on a disk that loses what was not synced, names as well as contents."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.names = folder, dict[str, File]()
        self.kept, self.covered = self.names, self.names

    def follow(self, call: str, path: str, data: bytes, number: int) -> None:
        if (
            call == "pwrite64"
            and path not in self.names
            and Path(path).parent == self.folder
        ):
            self.names = self.names | {path: File()}
        file = self.names.get(path, File())
        match call:
            case "pwrite64" | "ftruncate":
                file.waiting.append((number, data))
            case "unlink":
                self.names = {k: v for k, v in self.names.items() if k != data.decode()}
            # It covers what was written before it began, and is worth something once it
            # returned.
            case "began fsync" | "began fdatasync":
                file.covered = len(file.waiting)
                self.covered = self.names if path == str(self.folder) else self.covered
            case "fsync" | "fdatasync":
                file.sync()
                self.kept = self.covered if path == str(self.folder) else self.kept

    def after_a_power_cut(self, folder: Path, chance: random.Random | None) -> None:
        """Make the folder that is found then: what was synced; by chance, some of the
        rest too."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        names = chance.choice((self.kept, self.names)) if chance else self.kept
        for path, file in names.items():
            if not path.endswith("-shm"):  # shared memory, though it has a name
                (folder / Path(path).name).write_bytes(file.remains(chance))


def large_todo(key: str) -> dict[str, Any]:
    return {
        "id": key,
        "name": "todo.create",
        "args": {"id": key, "title": "\U0001f4a7" * 1000},
    }


def push_to_a_server_under(command: list[str], path: Path) -> set[tuple[int, str]]:
    """Four clients at once, to the program's end; what was acknowledged, and its
    cursor."""
    command = [*command, sys.executable, str(PROGRAM), "--port", "0", "--db", str(path)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert process.stdout
        port = int(process.stdout.readline().split(":")[3].split("/")[0])

        def push_some(name: str) -> list[tuple[int, str]]:
            told: list[tuple[int, str]] = []
            with closing(RawClient(("127.0.0.1", port))) as client:
                for size in (1, 40, 1, 40, 1, 40, 1, 1):
                    keys = [f"{name} {len(told) + number}" for number in range(size)]
                    results = client.push(*map(large_todo, keys))
                    told += zip(
                        (result["cursor"] for result in results), keys, strict=True
                    )
            return told

        with ThreadPoolExecutor() as pool:
            return {pair for told in pool.map(push_some, "abcd") for pair in told}
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.communicate(timeout=PATIENCE)


def assert_sound(path: Path, answered: set[tuple[int, str]]) -> None:
    """The server goes on with this file, and every answer that it gave holds."""
    cursor, key = max(answered)
    options: dict[str, Any] = {
        "apply": mizusync.apply_todo,
        "schema": mizusync.TODO_SCHEMA,
    }
    with (
        closing(open_log(path, **options)) as engine,
        closing(sqlite3.connect(path)) as db,
    ):
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        joined = (
            "mizusync_mutations JOIN todos USING (scope, id)"
            " JOIN mizusync_changes ON cursor = last"
        )
        found = set(db.execute(f"SELECT last, id FROM {joined}"))
        assert answered <= found
        for name in (
            "todos",
            "mizusync_changes",
            "mizusync_mutations",
        ):  # all, or nothing
            assert db.execute(f"SELECT count(*) FROM {name}").fetchone() == (
                len(found),
            )
        (again,) = push(engine, large_todo(key))
        assert (again["cursor"], again["duplicate"]) == (cursor, True)


def test_what_was_answered_survives_a_power_cut_at_any_moment(tmp_path: Path) -> None:
    disk, trace = Disk(tmp_path / "disk"), tmp_path / "trace"
    (path := disk.folder / "todos.db").parent.mkdir()
    calls = "?unlink,pwrite64,ftruncate,fsync,fdatasync,sendto"
    told = push_to_a_server_under(strace(trace, calls), path)
    answered: set[tuple[int, str]] = set()
    checkpoints: list[int] = []
    unproved = False
    for call, file, data, number in system_calls(trace):
        # Before the disk changes again (answers in a row find the same one), and where
        # a sync begins, since much is under way then. Before the first answer nothing
        # was promised.
        if (unproved and "sendto" not in call) or (
            answered and call == "began fdatasync"
        ):
            for chance in (None, random.Random(len(answered))):
                disk.after_a_power_cut(tmp_path / "left", chance)
                assert_sound(tmp_path / "left" / path.name, answered)
            unproved = False
        disk.follow(call, file, data, number)
        if call == "began sendto" and (answers := SHOWN.findall(data)):
            answered |= {(int(cursor), key.decode()) for cursor, key in answers}
            unproved = True
        if call == "fdatasync" and file == str(path):
            checkpoints.append(len(answered))
    trace.unlink()  # some 50 MB
    assert answered == told
    assert any(0 < count < len(told) for count in checkpoints), (
        "a larger push is needed"
    )


OPENING = (
    "import mizusync, os, sys; mizusync.Engine(sys.argv[1], apply=print); os._exit(0)"
)


def test_opening_a_large_log_reads_little_and_writes_nothing(tmp_path: Path) -> None:
    trace, reads = tmp_path / "trace", list[int]()
    command = [
        *strace(trace, "pread64,pwrite64,ftruncate"),
        sys.executable,
        "-c",
        OPENING,
    ]
    for count in (1, 50_000):
        path = tmp_path / f"{count}.db"
        with closing(open_log(path)) as engine:
            push(engine, note("first"))
        with closing(sqlite3.connect(path)) as db, db:
            sql = """
                WITH RECURSIVE numbers (n) AS (SELECT 2 UNION ALL\
 SELECT n + 1 FROM numbers LIMIT ?)
                INSERT INTO mizusync_changes\
 SELECT n, n, n % 100, '2026-01-01T00:00:00Z', 'null'
                FROM numbers
            """
            db.execute(sql, (count,))
        subprocess.run(
            [*command, str(path)], check=True, timeout=PATIENCE, cwd=PROGRAM.parent
        )
        log = (str(path), f"{path}-wal")
        asked = [call for call, file, *_ in system_calls(trace) if file in log]
        assert set(asked) == {"began pread64", "pread64"}
        reads.append(len(asked) // 2)
    assert reads[1] - reads[0] < 20


# --- Convergence ----------------------------------------------------------------------
# Crashes, lost answers, trims, and restored backups: in the end every client has
# exactly what was acknowledged.


def test_kill_9_at_any_moment_loses_and_repeats_no_mutation(path: Path) -> None:
    """The worker's threads retry what was not answered, while an engine of this process
    reads the log."""
    chance = random.Random(2026)
    acknowledged: dict[str, int] = {}
    starts = [0] * 16
    with closing(open_log(path)) as engine:
        log: list[Any] = []
        for _ in range(4):
            worker = start_worker(path, "w", starts, 10_000)
            assert worker.stdout is not None
            lines = [worker.stdout.readline() for _ in range(chance.randrange(20, 300))]
            worker.kill()
            lines += worker.stdout.readlines()
            worker.stdout.close()
            worker.wait(PATIENCE)
            for key, cursor, thread, number in map(json.loads, lines):
                assert acknowledged.setdefault(key, cursor) == cursor
                starts[thread] = number  # a retry, as if this answer had been lost
            earlier_log = log
            log = whole_log(engine)
            assert log[: len(earlier_log)] == earlier_log  # no cursor vanished
        cursors = {change["data"]: cursor_of(change) for change in log}
        assert len(cursors) == len(log)  # no id was applied twice
        assert acknowledged.items() <= cursors.items()
        # At each kill, a mutation of each thread may be applied and not acknowledged.
        assert len(log) <= len(acknowledged) + 4 * len(starts)
        assert ask(engine.snapshot()).data == fold(log)
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


SCOPES = ["a", "b"]


class Client:
    """A client that obeys the protocol, and what the test knows of its position."""

    def __init__(self, scope: str) -> None:
        self.scope = scope
        self.cursor = 0
        self.epoch = ""
        self.state: list[Any] = []
        # A backup was restored that is older than the cursor, or perhaps than the
        # epoch. (No client may have read an epoch, although the backup has it.)
        self.must_be_unknown = False
        self.may_be_unknown = False


class Model:
    """What the engines acknowledged. A restored backup brings back an earlier model."""

    def __init__(self) -> None:
        self.log: dict[str, list[Any]] = {scope: [] for scope in SCOPES}
        self.trimmed = dict.fromkeys(SCOPES, 0)  # the highest trimmed cursor
        self.results: dict[str, Any] = {}  # of each mutation, by its id
        self.made: dict[str, list[Any]] = {}  # its changes in all scopes
        self.head = 0
        self.epochs: set[str] = {""}

    def current(self, scope: str) -> int:
        return last_cursor(self.log[scope])


class Convergence(RuleBasedStateMachine):
    """Clients that lose answers and come back, on a file that is trimmed, reopened,
    shared with another engine, and restored. The model is the list of acknowledged
    changes."""

    clients = Bundle("clients")
    mutations = Bundle("mutations")

    @initialize()
    def open(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "log.db"
        self.engine = self.open_engine()
        self.other_engine: Engine | None = None
        self.model = Model()
        self.backup: Model | None = None
        self.all_clients: list[Client] = []
        self.mutation_count = 0

    def open_engine(self) -> Engine:
        small = Settings(max_tail_changes=3, watch_interval=PATIENCE)
        return open_log(self.path, apply=ledger, settings=small)

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            try:
                for client in self.all_clients:
                    self.pull_all(client)
                    assert client.state == fold(self.model.log[client.scope])
            finally:
                self.close_engines()
                self.folder.cleanup()

    def close_engines(self) -> None:
        self.engine.close()
        if self.other_engine:
            self.other_engine.close()
            self.other_engine = None

    @rule(target=clients, scope=st.sampled_from(SCOPES))
    def add_client(self, scope: str) -> Client:
        client = Client(scope)
        self.all_clients.append(client)
        return client

    # -- pushes

    @rule(
        target=mutations,
        scope=st.sampled_from(SCOPES),
        changes=st.lists(st.sampled_from(SCOPES), max_size=5) | st.just(["a"] * 40),
        fail=st.none() | st.sampled_from(["conflict", "not_found", "internal_error"]),
    )
    def push(self, scope: str, changes: list[str], fail: str | None) -> dict[str, Any]:
        mutation = self.new_mutation(changes, scope, fail)
        self.send(self.engine, mutation)
        return mutation

    @precondition(lambda self: self.other_engine)
    @rule(target=mutations, changes=st.lists(st.sampled_from(SCOPES), max_size=3))
    def push_to_the_other_engine(self, changes: list[str]) -> dict[str, Any]:
        assert self.other_engine
        mutation = self.new_mutation(changes, "a")
        self.send(self.other_engine, mutation)
        return mutation

    @rule(mutation=mutations)
    def retry_after_a_lost_answer(self, mutation: dict[str, Any]) -> None:
        self.send(self.engine, mutation)

    @rule(mutation=mutations)
    def retry_without_the_failure(self, mutation: dict[str, Any]) -> None:
        scopes, _ = mutation["args"]
        self.send(self.engine, mutation | {"args": [scopes, None]})

    @rule(repeated=st.lists(mutations, min_size=2, max_size=5))
    def push_several_with_repeats(self, repeated: list[dict[str, Any]]) -> None:
        self.send(self.engine, *repeated)

    def new_mutation(
        self, changes: list[str], scope: str, fail: str | None = None
    ) -> dict[str, Any]:
        self.mutation_count += 1
        return entry(str(self.mutation_count), *changes, fail=fail, scope=scope)

    def send(self, engine: Engine, *mutations: dict[str, Any]) -> None:
        """Push mutations, and check each result against the model."""
        for mutation, result in zip(mutations, push(engine, *mutations), strict=True):
            scopes, failure = mutation["args"]
            if mutation["id"] in self.model.results:
                assert result == self.repeated_result(mutation["id"])
            elif failure:
                assert result["ok"] is False
                assert result["code"] == failure
            else:
                changes = made_by(engine, result, scopes)
                self.acknowledge(mutation, result, changes)

    def repeated_result(self, key: str) -> dict[str, Any]:
        """Return the result of a retry: without changes if some were trimmed."""
        result: dict[str, Any] = self.model.results[key] | DUPLICATE
        for change in self.model.made[key]:
            if cursor_of(change) <= self.model.trimmed[change["scope"]]:
                result.pop("changes", None)
        return result

    def acknowledge(
        self, mutation: dict[str, Any], result: Any, changes: list[Any]
    ) -> None:
        """Check the result of a new mutation, and add its changes to the model."""
        assert result["ok"]
        assert "duplicate" not in result
        assert result["changes"] == in_scope(mutation["scope"], changes)
        for change in changes:
            # Cursors rise over all scopes, and none is used again.
            assert cursor_of(change) > self.model.head
            self.model.head = cursor_of(change)
            self.model.log[change["scope"]].append(change)
        current = self.model.current(mutation["scope"])
        assert result["cursor"] == (last_cursor(changes) if changes else current)
        self.model.results[mutation["id"]] = result
        self.model.made[mutation["id"]] = changes

    # -- pulls and snapshots

    @rule(client=clients, limit=st.integers(1, 6))
    def pull_a_page(self, client: Client, limit: int) -> None:
        self.pull(client, limit)

    def pull(self, client: Client, limit: int) -> bool:
        """Pull one page, or take the snapshot that a 410 asks for; return whether there
        is more."""
        log = self.model.log[client.scope]
        trimmed = self.model.trimmed[client.scope]
        try:
            page = pull(
                self.engine,
                client.cursor,
                client.scope,
                limit=limit,
                epoch=client.epoch,
            )
        except mizusync.CursorUnknown:
            assert client.must_be_unknown or client.may_be_unknown
            self.take_snapshot(client)
            return True
        except mizusync.CursorTooOld:
            assert client.cursor < trimmed
            assert not client.must_be_unknown
            self.take_snapshot(client)
            return True
        assert not client.must_be_unknown
        assert client.cursor >= trimmed
        newer = [change for change in log if cursor_of(change) > client.cursor]
        changes = page["changes"]
        assert changes == newer[: len(changes)]
        assert page["hasMore"] == (len(changes) < len(newer))
        assert len(changes) >= min(limit, len(newer))
        client.state += fold(changes)
        client.cursor = page["cursor"]
        self.finish_read(client, page["epoch"])
        return bool(page["hasMore"])

    def pull_all(self, client: Client) -> None:
        while self.pull(client, 1000):
            pass

    @rule(client=clients)
    def take_snapshot(self, client: Client) -> None:
        taken = ask(self.engine.snapshot(client.scope))
        assert taken.cursor == self.model.current(client.scope)
        client.state = taken.data
        client.cursor = taken.cursor
        self.finish_read(client, taken.epoch)

    def finish_read(self, client: Client, epoch: str) -> None:
        """Check the client's state against the model, and note its epoch."""
        assert client.state == fold(
            change
            for change in self.model.log[client.scope]
            if cursor_of(change) <= client.cursor
        )
        client.epoch = epoch
        client.must_be_unknown = False
        client.may_be_unknown = False
        self.model.epochs.add(epoch)

    # -- trims, other engines, and restored backups

    @rule(
        scope=st.sampled_from(SCOPES),
        behind=st.integers(-1, 8),
        by_other_engine=st.booleans(),
    )
    def trim(self, scope: str, behind: int, by_other_engine: bool) -> None:
        before = max(self.model.head - behind, 0)
        engine = self.engine
        if by_other_engine and self.other_engine:
            engine = self.other_engine
        ask(engine.trim(scope, before))
        for changes in self.model.made.values():
            last = last_cursor(in_scope(scope, changes))
            if last < before:
                self.model.trimmed[scope] = max(self.model.trimmed[scope], last)

    @rule()
    def reopen(self) -> None:
        self.engine.close()
        self.engine = self.open_engine()

    @precondition(lambda self: not self.other_engine)
    @rule()
    def open_another_engine(self) -> None:
        self.other_engine = self.open_engine()

    @precondition(lambda self: self.other_engine)
    @rule()
    def close_the_other_engine(self) -> None:
        assert self.other_engine
        self.other_engine.close()
        self.other_engine = None

    @rule()
    def back_up(self) -> None:
        back_up(self.path)
        self.backup = copy.deepcopy(self.model)

    @precondition(lambda self: self.backup)
    @rule()
    def restore(self) -> None:
        assert self.backup
        self.close_engines()
        self.put_back()
        self.engine = self.open_engine()
        self.model = copy.deepcopy(self.backup)
        for client in self.all_clients:
            if client.cursor > self.model.head:
                client.must_be_unknown = True
            if client.epoch not in self.model.epochs:
                client.may_be_unknown = True

    def put_back(self) -> None:
        shutil.copy(self.path.with_name("backup.db"), self.path)

    @invariant()
    def current_cursors_are_those_of_the_model(self) -> None:
        if hasattr(self, "engine"):
            expected = [self.model.current(scope) for scope in SCOPES]
            assert ask(self.current_cursors(), debug=False) == expected

    async def current_cursors(self) -> list[int]:
        return [await self.engine.current(scope) for scope in SCOPES]


TestConvergence = Convergence.TestCase
TestConvergence.settings = settings(max_examples=40, stateful_step_count=30)
