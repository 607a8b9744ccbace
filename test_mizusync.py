"""Tests of mizusync, in the order of its sections: each name is a promise, in the
protocol's words.

What goes over a socket goes through RawClient in .ci/client.py, which is written from
the RFCs and imports no parser of ours, so that no mistake cancels itself. Hostile bytes
come from the catalogue in .ci/hostile.py: this file has the well-formed ones. Nothing
sleeps to wait: a condition has a deadline."""

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

sys.path.insert(0, str(Path(__file__).resolve().parent / ".ci"))
try:
    import hostile
    from client import (
        ACCEPT,
        BINARY,
        CLOSE,
        PATIENCE,
        PING,
        PONG,
        TEXT,
        Frame,
        RawClient,
        Reply,
        chunked,
        masked,
        pieces,
        raw,
        take_frame,
    )
except ModuleNotFoundError as error:
    pytest.fail(f"the tests need .ci/{error.name}.py of the repository", pytrace=False)

MOMENT = 0.125  # a limit that a test wants to see run out

SMALL = Settings(linger_timeout=1.0, close_timeout=1.0, shutdown_timeout=5.0)
KEY = b"Sec-WebSocket-Key: " + hostile.KEY
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
    """Apply a mutation of the tests; its name says what becomes of it."""
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
    """Return an `apply` in which every mutation stays until it is released."""

    def apply_stalled(db: sqlite3.Connection, mutation: Mutation) -> list[Any]:
        entered.set()
        release.wait(PATIENCE)
        return [mutation.id]

    return apply_stalled


# Every push that waits for the writer joins the transaction that is being made.
ONE_TRANSACTION = Settings(max_commit_time=PATIENCE)


def note(key: str, args: Any = None, **fields: Any) -> dict[str, Any]:
    return {"id": key, "name": "note", "args": args, **fields}


def table(name: str, rows: Mapping[str, Any]) -> pytest.MarkDecorator:
    """Run the test once for each row, under the row's name."""
    return pytest.mark.parametrize(name, list(rows.values()), ids=list(rows))


def until(condition: Callable[[], T]) -> T:
    """Wait until the condition is true, and return its value; fail at a deadline."""
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.002)
    return value


class Records(logging.Handler):
    """The lines of the log, with their tracebacks."""

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
    """Record everything that is logged in the block, at every level."""
    everything = Records()
    everything.setLevel(logging.DEBUG)
    with ExitStack() as stack:
        for logger in map(logging.getLogger, ("mizusync", "asyncio")):
            stack.callback(logger.setLevel, logger.level)
            stack.callback(logger.removeHandler, everything)
            logger.setLevel(logging.DEBUG)
            logger.addHandler(everything)
        yield everything


@pytest.fixture
def log() -> Iterator[Records]:
    """Record everything that is logged during the test, at every level."""
    with recorded() as everything:
        yield everything


class Live:
    """A server in a thread of its own, so that tests are plain functions."""

    address: tuple[str, int]
    loop: asyncio.AbstractEventLoop
    thread: threading.Thread

    def __init__(self, engine: Engine, server: Server) -> None:
        self.engine, self.server = engine, server
        self.records = Records()
        self.clients = ExitStack()
        self.stopping = asyncio.Event()
        self.left = set[str]()  # tasks that outlived the server

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

    def end(self) -> None:
        """Close the clients, stop the server, and wait until it has ended."""
        self.clients.close()
        self.stop()
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive(), "the server did not end"

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function or coroutine function in the server's loop."""

        async def called() -> Any:
            value = function(*arguments)
            return await value if asyncio.iscoroutine(value) else value

        return asyncio.run_coroutine_threadsafe(called(), self.loop).result(PATIENCE)

    def tasks(self) -> int:
        return int(self.call(lambda: len(asyncio.all_tasks())))

    def client(self, receive_buffer: int = 0) -> RawClient:
        return self.clients.enter_context(
            closing(RawClient(self.address, receive_buffer=receive_buffer))
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
        """Wait for a record that the test expects, and forget it."""
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
    """Serve this engine; at the end nothing may be left but records that `may_log`.

    A task that outlives the server, or an unexpected record, fails the test."""
    with closing(engine), ExitStack() as stack:
        live = Live(engine, Server(engine, **options))
        prepare(live.server)
        for logger in (logging.getLogger("mizusync"), logging.getLogger("asyncio")):
            logger.addHandler(live.records)
            stack.callback(logger.removeHandler, live.records)
        stack.callback(
            gc.collect, 1
        )  # logs the exceptions of tasks that nobody awaited
        run = functools.partial(asyncio.run, live.main())
        live.thread = threading.Thread(target=run, daemon=True)
        live.thread.start()
        until(lambda: hasattr(live, "address") or not live.thread.is_alive())
        try:
            yield live
        finally:
            live.end()
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
    """Serve the tests' application on a file in this folder."""
    path = folder / "log.db"
    engine = Engine(
        path, apply=apply, snapshot=snapshot, schema=SCHEMA, settings=settings
    )
    with serving(engine, **options) as live:
        yield live


Start = Callable[..., Live]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start servers that end with the test.

    A keyword is a setting, an option of `serve` or of Server, `route` for the handler
    of GET /it, or `websocket` for that of /it."""

    def start_one(
        *,
        route: Callable[..., Any] | None = None,
        websocket: Callable[..., Any] | None = None,
        prepare: Callable[[Server], Any] = lambda server: None,
        **options: Any,
    ) -> Live:
        def prepare_all(server: Server) -> None:
            prepare(server)
            if route is not None:
                server.route("GET", "/it")(route)
            if websocket is not None:
                server.websocket("/it")(websocket)

        changed = {name: options.pop(name) for name in asdict(SMALL) if name in options}
        settings = replace(SMALL, **changed)
        return stack.enter_context(
            serve(tmp_path, settings, prepare=prepare_all, **options)
        )

    with ExitStack() as stack:
        yield start_one


async def echo(websocket: Any) -> None:
    async for message in websocket:
        await websocket.send(message)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Live]:
    with serve(tmp_path) as live:
        yield live


@pytest.fixture
def client(server: Live) -> RawClient:
    return server.client()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    def prepare(server: Server) -> None:
        server.websocket("/echo")(echo)

    folder = tmp_path_factory.mktemp("shared")
    with serve(folder, prepare=prepare, may_log=".") as live:
        yield live


@pytest.fixture
def visitor(shared: Live) -> Iterator[RawClient]:
    """A client of a shared server, where nothing may be applied or logged."""
    shared.records.texts.clear()
    with closing(RawClient(shared.address)) as client:
        yield client
    gc.collect(1)
    assert not shared.records.texts
    with closing(RawClient(shared.address)) as client:
        assert client.pull()["changes"] == []


def refused(reply: Reply, *statuses: int, code: str = "") -> bool:
    """Return whether this is such a refusal, with its code, sentence and fields."""
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
    """Open an engine on this file, with the tests' application."""
    usual: dict[str, Any] = {"apply": apply, "snapshot": snapshot, "schema": SCHEMA}
    return Engine(path, **(usual | options))


def ask(coroutine: Coroutine[Any, Any, T], debug: bool | None = None) -> T:
    """Run a coroutine in a loop of its own.

    asyncio's debug mode notes where each call comes from: without it, a thousand calls
    take a fourth of the time."""
    return asyncio.run(asyncio.wait_for(coroutine, PATIENCE), debug=debug)


def push(engine: Engine, *mutations: Any) -> list[Any]:
    """Push, and return the results as a client reads them."""
    return [
        json.loads(result.encoded)
        for result in engine.submit(mutations).result(PATIENCE)
    ]


def pull(
    engine: Engine, cursor: int = 0, scope: str = DEFAULT, **parameters: Any
) -> Any:
    """Pull, and return the page as a client reads it."""
    return json.loads(
        ask(engine.pull(scope, cursor, **parameters), debug=False).encode()
    )


def pages(
    engine: Engine, cursor: int = 0, scope: str = DEFAULT, limit: int = 1000
) -> list[Any]:
    """Pull every page from here on."""
    found = [pull(engine, cursor, scope, limit=limit)]
    while found[-1]["hasMore"]:
        found.append(pull(engine, found[-1]["cursor"], scope, limit=limit))
    return found


def whole_log(engine: Engine, scope: str = DEFAULT, limit: int = 1000) -> list[Any]:
    return [
        change for page in pages(engine, 0, scope, limit) for change in page["changes"]
    ]


def fold(changes: Iterable[Any]) -> list[Any]:
    """Return what `snapshot` gives after these changes."""
    return [change["data"] for change in changes]


def ledger(db: sqlite3.Connection, mutation: Mutation) -> Iterator[Change]:
    """Make one change in each scope, so that a snapshot is the fold of the changes.

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
    elif failure == "internal_error":  # the worst: it rolls back the whole transaction
        db.execute("CREATE TABLE only (n UNIQUE ON CONFLICT ROLLBACK)")
        db.execute("INSERT INTO only VALUES (1), (1)")
    if failure:
        raise REFUSALS[failure]("a reason")


def entry(
    key: str, *scopes: str, fail: str | None = None, scope: str = DEFAULT
) -> dict[str, Any]:
    """Return a mutation of `ledger`: one change in each of these scopes."""
    return {"id": key, "scope": scope, "name": "entry", "args": [list(scopes), fail]}


def cursor_of(change: Any) -> int:
    return int(change["cursor"])


def made_by(engine: Engine, result: Any, scopes: list[str]) -> list[Any]:
    """Pull the changes of an entry: its result shows only its own scope."""
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


def make_certificate(folder: Path) -> tuple[str, str]:
    """Make the key and the certificate of a proxy; skip the test without openssl."""
    if (openssl := shutil.which("openssl")) is None:
        pytest.skip("no openssl to make a certificate with")
    key, certificate = str(folder / "key.pem"), str(folder / "certificate.pem")
    make = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    named = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = [openssl, *make.split(" "), *named, "-keyout", key, "-out", certificate]
    subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE)
    return key, certificate


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
        "a busy_timeout that SQLite takes as 0": ("busy_timeout", 2**31),
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


@table("one", hostile.JSON)
def test_bytes_that_are_no_strict_json_or_too_large_are_refused(
    one: hostile.Hostile,
) -> None:
    error = mizusync.InvalidRequest if one.expected == 400 else mizusync.TooLarge
    with pytest.raises(error):
        mizusync.parse_json(one.sent)


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


@pytest.mark.parametrize("piece", hostile.JSON_PIECES)
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
        "an empty object": ({}, "id", "string of 1 to 128"),
        "no id": ({"name": "n"}, "id", "string of 1 to 128"),
        "an id of null": ({"id": None, "name": "n"}, "id", "string of 1 to 128"),
        "a long id": ({"id": "x" * 129, "name": "n"}, "id", "1 to 128"),
        "half a surrogate pair": ({"id": "\ud800", "name": "n"}, "id", "1 to 128"),
        "a number as a name": ({"id": "1", "name": 5}, "name", "string of 1 to 128"),
        "no name": ({"id": "1"}, "name", "string of 1 to 128"),
        "an empty scope": ({"id": "1", "name": "n", "scope": ""}, "scope", "1 to 256"),
        "a long scope": (
            {"id": "1", "name": "n", "scope": "x" * 257},
            "scope",
            "1 to 256",
        ),
    },
)
def test_the_refusal_of_a_mutation_names_the_field_and_the_rule(
    case: tuple[Any, str | None, str],
) -> None:
    value, field, rule = case
    with pytest.raises(mizusync.InvalidMutation, match=rule) as caught:
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
    fields = ["data", "cursor", "epoch", "database"]
    assert list(json.loads(encoded_snapshot)) == fields


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
        with pytest.raises(sqlite3.DatabaseError, match="not authorized|denied"):
            ask(engine.read(create))
        assert fold(whole_log(engine)) == [1, 2]
    assert any("authoriz" in text and "TEMP" in text for text in records.texts)


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

KEPT: list[Any] = []  # cursors that an application keeps open
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


def roll_back_and_use_a_held_cursor(db: sqlite3.Connection) -> Any:
    """Go on with statements that Python has cached, after the transaction is lost."""
    cursor = db.cursor()
    for _ in range(2):
        with suppress(sqlite3.Error):
            cursor.execute("SAVEPOINT item")
            cursor.execute(TRACE)
            cursor.execute("RELEASE item")
            roll_back_by_conflict(db)
    return ["fine"]


def roll_back_and_write_many(db: sqlite3.Connection) -> Any:
    sql = "WITH one(data) AS (SELECT ?) INSERT INTO notes SELECT 'many', data FROM one"
    for _ in range(2):
        with suppress(sqlite3.Error):
            db.executemany(sql, [("1",)])
            roll_back_by_conflict(db)
    return ["fine"]


class FailingCursor(sqlite3.Cursor):
    def close(self) -> None:
        raise RuntimeError("this cursor can't be closed")


def write_with_cursor_that_fails(db: sqlite3.Connection) -> Any:
    cursor = db.cursor(FailingCursor)
    cursor.execute(TRACE)
    raise mizusync.InvalidMutation("no")


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
    "a blob": lambda db: db.blobopen("notes", "data", 1),
    "ROLLBACK on conflict": roll_back_by_conflict,
    "ROLLBACK on conflict, suppressed": roll_back_and_write,
    "a held cursor after a ROLLBACK": roll_back_and_use_a_held_cursor,
    "executemany after a ROLLBACK": roll_back_and_write_many,
    "a cursor whose close fails": write_with_cursor_that_fails,
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
    "factories changed": change_factories,
    "a table of its own": create_table,
    "reading a PRAGMA": lambda db: db.execute("PRAGMA foreign_keys").fetchall(),
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
    if "RETURNING" in use and sqlite3.sqlite_version_info < (3, 35):
        pytest.skip("needs RETURNING")
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


# A mutation that fails leaves no trace, whatever it did before. Its neighbours do.

TRACES_SCHEMA = """
    PRAGMA foreign_keys = ON;
    CREATE TABLE IF NOT EXISTS words (word TEXT);
    CREATE TABLE IF NOT EXISTS keys (key INTEGER PRIMARY KEY, size INTEGER UNIQUE);
    CREATE TABLE IF NOT EXISTS doors (key INTEGER REFERENCES keys ON DELETE CASCADE);
    CREATE TABLE IF NOT EXISTS history (word TEXT);
    CREATE TRIGGER IF NOT EXISTS remember AFTER DELETE ON words
        BEGIN INSERT INTO history VALUES (old.word); END;
    CREATE VIEW IF NOT EXISTS shouts AS SELECT word FROM words;
    CREATE TRIGGER IF NOT EXISTS shout INSTEAD OF INSERT ON shouts
        BEGIN INSERT INTO words VALUES (upper(new.word)); END;
"""
TRACES = {
    "a row": "INSERT INTO words VALUES ('one')",
    "rows": "INSERT INTO words SELECT word || '.' FROM words LIMIT 3",
    "an update": "UPDATE words SET word = word || '+'",
    "a deletion, with a trigger": "DELETE FROM words WHERE length(word) < 6",
    "all rows": "DELETE FROM history",
    "a view": "INSERT INTO shouts VALUES ('two')",
    "a key": "INSERT INTO keys VALUES (1, (SELECT count(*) FROM words))",
    "another key": "INSERT OR REPLACE INTO keys VALUES (2, 2)",
    "an upsert": "INSERT INTO keys VALUES (2, 5) ON CONFLICT DO UPDATE SET size = 7",
    "a key or nothing": "INSERT OR IGNORE INTO keys VALUES (1, 1)",
    "a foreign key": "INSERT INTO doors VALUES (2)",
    "a cascade": "DELETE FROM keys WHERE key = 2",
    "a table": "CREATE TABLE IF NOT EXISTS more (n)",
    "no table": "DROP TABLE IF EXISTS more",
    "a savepoint": "SAVEPOINT one",
    "a rollback to it": "ROLLBACK TO one",
    "its release": "RELEASE one",
    "a half-read query": "SELECT word FROM words UNION ALL VALUES (1), (2)",
    "half-read rows": "INSERT INTO words VALUES ('r'), ('s') RETURNING word",
    "a mistake": "INSERT INTO nowhere VALUES (1)",
    "a key or the end": "INSERT OR ROLLBACK INTO keys VALUES (1, 1)",
}


def leave_traces(db: sqlite3.Connection, names: list[str]) -> Iterator[None]:
    """Run some statements of TRACES, and yield after each.

    "?" suppresses an error of the one behind it.
    """
    held = []
    for before, name in itertools.pairwise(["", *names]):
        if name != "?":
            with suppress(*[sqlite3.Error] * (before == "?")):
                held.append(db.execute(TRACES[name]))
                held[-1].fetchone()
        yield


def traces(path: Path) -> list[str]:
    """Return the application's tables as SQL."""
    with closing(sqlite3.connect(path)) as db:
        lines = list(db.iterdump())
    return [line for line in lines if "mizusync" not in line and "sequence" not in line]


trace_names = st.lists(st.sampled_from([*TRACES, "?"]), max_size=5)


@pytest.mark.skipif(sqlite3.sqlite_version_info < (3, 35), reason="needs RETURNING")
@settings(max_examples=25)
@given(
    pushes=st.lists(
        st.lists(st.tuples(trace_names, st.sampled_from(["", "conflict", "bug"]))),
        max_size=3,
    )
)
def test_a_push_writes_what_its_mutations_write_that_succeed_one_by_one(
    pushes: list[list[tuple[list[str], str]]],
) -> None:
    def apply_traces(db: sqlite3.Connection, mutation: Mutation) -> list[Any]:
        names, end = mutation.args
        for _ in leave_traces(db, names):
            pass
        if end:
            raise mizusync.Conflict if end == "conflict" else RuntimeError
        return list(names)

    with tempfile.TemporaryDirectory() as folder:
        path, model = Path(folder) / "log.db", Path(folder) / "model.db"
        make_database(model)
        expected = []
        with (
            closing(sqlite3.connect(model, isolation_level=None)) as db,
            closing(sqlite3.connect(":memory:")) as before,
        ):
            db.executescript(TRACES_SCHEMA)
            for names, end in itertools.chain(*pushes):
                db.backup(before)
                db.execute("BEGIN")
                try:
                    for _ in leave_traces(db, names):
                        if not db.in_transaction:  # whatever it suppressed
                            end = "bug"
                except sqlite3.Error:
                    end = "bug"
                if db.in_transaction:
                    db.execute("ROLLBACK" if end else "COMMIT")
                if end:
                    before.backup(db)
                codes = {"": None, "conflict": "conflict", "bug": "internal_error"}
                expected.append(codes[end])
        options: dict[str, Any] = {"apply": apply_traces, "schema": TRACES_SCHEMA}
        with closing(open_log(path, **options)) as engine:
            keys = itertools.count()
            results = [
                push(engine, *(note(str(next(keys)), args) for args in mutations))
                for mutations in pushes
            ]
        assert [one.get("code") for one in itertools.chain(*results)] == expected
        assert traces(path) == traces(model)


@table(
    "breaker",
    {
        "ROLLBACK on conflict": "INSERT OR ROLLBACK INTO only VALUES (1), (1)",
        "AUTOINCREMENT at its highest number": "INSERT INTO ends VALUES (NULL)",
        "a constraint that fails at COMMIT": "INSERT INTO children VALUES (1)",
    },
)
@table("end", {"refused": "conflict", "with a savepoint": None})
def test_whatever_ends_a_transaction_the_other_mutations_have_their_own_results(
    path: Path, breaker: str, end: str | None
) -> None:
    schema = f"""{SCHEMA}
        PRAGMA foreign_keys = ON;
        CREATE TABLE only (n UNIQUE);
        CREATE TABLE ends (n INTEGER PRIMARY KEY AUTOINCREMENT);
        INSERT INTO ends VALUES (9223372036854775807);
        CREATE TABLE parents (n INTEGER PRIMARY KEY);
        CREATE TABLE children (n REFERENCES parents DEFERRABLE INITIALLY DEFERRED);
    """

    def break_or_write(db: sqlite3.Connection, mutation: Mutation) -> Any:
        if mutation.args == "break":
            db.execute(breaker)
            return []
        changes = apply(db, mutation)
        if end:
            raise mizusync.Conflict
        db.execute("SAVEPOINT mine")
        return changes

    with closing(open_log(path, apply=break_or_write, schema=schema)) as engine:
        results = push(engine, note("1", "break"), note("2", 2), note("3", 3))
        codes = [result.get("code") for result in results]
        assert codes == ["internal_error", end, end]
        assert fold(whole_log(engine)) == ([] if end else [2, 3])


SPLIT = "INSERT INTO splits VALUES (?)"


@table(
    "write",
    {
        "all rows of a table WITHOUT ROWID": lambda db: db.execute("DELETE FROM pairs"),
        "OR FAIL in a trigger": lambda db: db.execute(SPLIT, ["[7, 8, 7]"]),
        "OR FAIL in a trigger, for many": lambda db: db.executemany(
            SPLIT, [["[7, 8, 7]"]]
        ),
        "RAISE(FAIL) in a trigger": lambda db: db.execute(
            "REPLACE INTO seats VALUES (1, 'Ben')"
        ),
    },
)
def test_a_refused_mutation_is_undone_where_sqlite_counts_no_rows_that_it_wrote(
    path: Path, write: Use
) -> None:
    schema = """
        PRAGMA recursive_triggers = ON;
        CREATE TABLE pairs (a, b, PRIMARY KEY (a, b)) WITHOUT ROWID;
        INSERT INTO pairs VALUES (1, 2);
        CREATE TABLE numbers (n UNIQUE);
        CREATE VIEW splits AS SELECT n FROM numbers;
        CREATE TRIGGER split INSTEAD OF INSERT ON splits
            BEGIN INSERT OR FAIL INTO numbers SELECT value FROM json_each(new.n); END;
        CREATE TABLE seats (seat PRIMARY KEY, holder);
        INSERT INTO seats VALUES (1, 'Ann');
        CREATE TRIGGER keep AFTER DELETE ON seats BEGIN SELECT RAISE(FAIL, 'no'); END;
    """

    def write_and_refuse(db: sqlite3.Connection, mutation: Mutation) -> list[Any]:
        if mutation.args == "refuse":
            with suppress(sqlite3.IntegrityError):
                write(db)
            raise mizusync.Conflict
        return [1]

    with closing(open_log(path, apply=write_and_refuse, schema=schema)) as engine:
        before = traces(path)
        for key in ("first ", "second "):  # the second time with savepoints
            pushed = [note(key + args, args) for args in ("before", "refuse", "after")]
            codes = [result.get("code") for result in push(engine, *pushed)]
            assert codes == [None, "conflict", None]
            assert traces(path) == before


@pytest.mark.skipif(
    sqlite3.sqlite_version_info < (3, 36), reason="each mutation has a savepoint there"
)
def test_a_mutation_that_fails_after_it_wrote_costs_one_transaction_of_many(
    path: Path,
) -> None:
    def write_or_fail(db: sqlite3.Connection, mutation: Mutation) -> list[Any]:
        if mutation.args == "refuse":
            raise mizusync.Conflict
        db.execute("INSERT INTO notes VALUES ('', '')")
        if mutation.args == "write and refuse":
            raise mizusync.Conflict
        return [1]

    def commits(*args: str) -> int:
        before = engine.stats()["commits"]
        results = push(engine, *(note(str(next(keys)), one) for one in args))
        assert [one["ok"] for one in results] == [one == "" for one in args]
        return engine.stats()["commits"] - before

    keys = itertools.count()
    with closing(open_log(path, apply=write_or_fail)) as engine:
        assert commits("", "refuse", "") == 1  # nothing is there to undo
        assert commits("", "write and refuse", "") == 3
        assert commits("", "write and refuse", "") == 1  # there is a savepoint now
        assert commits("write and refuse", "refuse") == 1


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


def test_the_memory_for_a_mutation_does_not_grow_with_its_statements(
    path: Path,
) -> None:
    def run_many(db: sqlite3.Connection, mutation: Mutation) -> Any:
        half_read = db.execute("VALUES (1), (2)")
        half_read.fetchone()
        tracemalloc.start()
        try:
            for _ in range(30_000):
                db.execute("SELECT 1")
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
        KEPT.append(half_read)

    peaks: list[int] = []
    with closing(open_log(path, apply=run_many)) as engine:
        assert push(engine, note("1"))[0]["ok"]
        assert peaks[0] < 500_000
        with pytest.raises(sqlite3.ProgrammingError, match="closed cursor"):
            KEPT.pop().fetchone()


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
    assert_refused_and_unchanged(orphan(tmp_path), "-wal exists, but")


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
def test_mount_points_are_found_as_linux_writes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: tuple[bytes, bytes]
) -> None:
    line, mount_point = case
    sysfs = b"22 28 0:21 / /sys rw,nosuid shared:7 - sysfs sysfs rw\n"
    mounts = tmp_path / "mountinfo"
    mounts.write_bytes(sysfs + line + b"\n")
    monkeypatch.setattr(mizusync, "MOUNTS", str(mounts))
    mounted = [b"/sys", mount_point]
    others = [b"/", b"/a", b"/sy", b"/sys/x", b"/dev/vda", mount_point + b"x"]
    found = [
        path for path in mounted + others if mizusync.is_mount_point(os.fsdecode(path))
    ]
    assert found == mounted


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
        "VACUUM": ("BEGIN; VACUUM;", "cannot VACUUM from within"),
        "a constraint": (
            "CREATE TABLE t (n CHECK (n)); REPLACE INTO t SELECT 0",
            "CHECK",
        ),
    },
)
def test_a_schema_with_a_mistake_is_refused_with_the_reason(
    path: Path, case: tuple[str, str]
) -> None:
    schema, reason = case
    with pytest.raises(StoreError, match=f"the schema for {path}.*{reason}"):
        open_log(path, schema=schema)
    with closing(open_log(path)) as engine:
        assert push(engine, note("1"))[0]["ok"]


def test_a_schema_with_a_transaction_is_rolled_back_if_a_part_of_it_fails(
    path: Path,
) -> None:
    with pytest.raises(StoreError, match='near "NO": syntax error'):
        open_log(path, schema="BEGIN; CREATE TABLE t (n); NO; COMMIT;")
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
        "a transaction of its own": f"BEGIN; {TRIGGER} COMMIT; PRAGMA user_version = 7",
        "a transaction that it leaves open": f"BEGIN; {TRIGGER}",
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


# What many programs begin with, and what a log needs.
PRAGMAS = """
    PRAGMA journal_mode = DELETE;
    PRAGMA synchronous = NORMAL;
    PRAGMA fullfsync = OFF;
    PRAGMA busy_timeout = 5000;
    PRAGMA foreign_keys = ON;
"""


def test_a_commit_waits_for_the_disk_whatever_pragmas_the_schema_sets(
    path: Path,
) -> None:
    names = ["journal_mode", "synchronous", "fullfsync", "busy_timeout", "foreign_keys"]

    def read_pragmas(db: sqlite3.Connection, mutation: Mutation) -> list[Any]:
        return [db.execute(f"PRAGMA {name}").fetchone()[0] for name in names]

    for key in ("1", "2"):
        schema = SCHEMA + PRAGMAS
        with closing(open_log(path, apply=read_pragmas, schema=schema)) as engine:
            (result,) = push(engine, note(key))
            assert fold(result["changes"]) == ["wal", 2, 1, 0, 1]


@table(
    "step",
    {
        "none": "",
        "an update": "UPDATE seats SET price = price + 1;",
        "a column": "ALTER TABLE seats ADD COLUMN row DEFAULT 1;",
        "a transaction": (
            "BEGIN IMMEDIATE; UPDATE seats SET price = price + 1;"
            "PRAGMA user_version = 2; COMMIT;"
        ),
    },
)
def test_no_step_of_a_schema_runs_again_where_the_writer_has_to_reconnect(
    path: Path, step: str
) -> None:
    tables = """
        CREATE TABLE IF NOT EXISTS seats (seat PRIMARY KEY, price);
        CREATE INDEX IF NOT EXISTS of_price ON seats (price);
        PRAGMA foreign_keys = ON;
    """
    schema = f"{tables} INSERT INTO seats VALUES (1, 20);"
    open_log(path, schema=schema).close()

    def close_or_read(db: sqlite3.Connection, mutation: Mutation) -> list[Any]:
        if mutation.args == "close":
            db.close()
        seats = db.execute("SELECT * FROM seats").fetchall()
        return [*seats, db.execute("PRAGMA foreign_keys").fetchone()]

    with closing(open_log(path, apply=close_or_read, schema=tables + step)) as engine:
        before, closed, after = push(engine, note("1"), note("2", "close"), note("3"))
        assert closed["code"] == "internal_error"
        assert fold(after["changes"]) == fold(before["changes"])
        assert fold(after["changes"])[-1] == [1]


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
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
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


def test_a_writer_that_waited_in_vain_for_another_one_warns_of_it_as_well(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 31, 0))
    impatient = Settings(busy_timeout=MOMENT)
    with (
        recorded() as records,
        closing(open_log(path, settings=impatient)) as engine,
        closing(sqlite3.connect(path, isolation_level=None)) as other,
    ):
        push(engine, note("1"))
        other.execute("BEGIN IMMEDIATE")
        other.execute("INSERT INTO notes VALUES ('n', '1')")
        with pytest.raises(Unavailable):
            push(engine, note("2"))
        other.execute("COMMIT")
        push(engine, note("2"))
        assert "walresetbug" in records.texts[-1]


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


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit of descriptors")
def test_a_read_for_which_no_descriptor_is_free_is_unavailable(path: Path) -> None:
    import resource

    with closing(open_log(path)) as engine:
        push(engine, note("a"))
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        store = engine.store
        assert isinstance(store, mizusync.SQLiteStore)
        store._idle.clear()
        with ExitStack() as files:
            files.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
            resource.setrlimit(resource.RLIMIT_NOFILE, (200, limits[1]))
            with suppress(OSError):
                while True:
                    files.callback(os.close, os.open(os.devnull, os.O_RDONLY))
            with pytest.raises(mizusync.StoreRefused):
                store.read(lambda db: db.execute("SELECT 1").fetchone())
        assert store.read(lambda db: db.execute("SELECT 1").fetchone()) == (1,)


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


def test_a_commit_that_another_process_overtakes_hides_no_restored_backup(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the engine's first COMMIT and its note of that, another process commits,
    and clients of the engine hear of it."""
    run_own = mizusync.run_own
    known: list[mizusync.Position] = []
    idle = Settings(watch_interval=1000.0)
    with (
        closing(open_log(path, settings=idle)) as engine,
        closing(open_log(path, settings=idle)) as other,
    ):
        store = engine.store
        assert isinstance(store, mizusync.SQLiteStore)
        push(other, note("before"))

        def run_and_overtake(db: Any, sql: str, *parameters: Any) -> Any:
            rows = run_own(db, sql, *parameters)
            if sql == "COMMIT" and db is store._write_db and not known:
                backups.append(back_up(path))
                push(other, note("late"))
                known.append(store.latest())
            return rows

        backups: list[Path] = []
        monkeypatch.setattr(mizusync, "run_own", run_and_overtake)
        push(engine, note("first"))
        monkeypatch.undo()
        other.close()
        restore(path, backups[0])
        push(engine, *(note(f"new {number}") for number in range(5)))
        with pytest.raises(mizusync.CursorUnknown):
            ask(engine.pull(cursor=known[0].head, epoch=known[0].epoch))


def test_a_hint_counts_as_seen_and_a_restore_begins_one_epoch(path: Path) -> None:
    hints: list[Hint] = []
    with closing(open_log(path, settings=UNWATCHED)) as engine:
        push(engine, note("1"))
        backup = back_up(path)
        engine.add_listener(lambda changed: hints.append(changed["_default"]))
        push(engine, note("lost"))
        until(lambda: len(hints) == 1)
        restore(path, backup)
        push(engine, note("another"))
        with pytest.raises(mizusync.CursorUnknown):
            ask(engine.pull(cursor=hints[0].cursor, epoch=hints[0].epoch))
        push(engine, note("3"))
        until(lambda: len(hints) == 3)
    lost, *later = [hint.epoch for hint in hints]
    assert (later[0] != lost, later[0] == later[1]) == (True, True)


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


# A snapshot names the database. Every copy keeps the name, and a new file has another.


def database_of(engine: Engine) -> str:
    return ask(engine.snapshot()).database


def test_each_engine_and_each_opening_give_a_database_the_same_name(path: Path) -> None:
    with two_engines(path) as (engine, other_engine):
        name = database_of(engine)
        push(engine, note("1"))
        push(other_engine, note("2"))  # it begins an epoch
        assert database_of(engine) == database_of(other_engine) == name != ""
    with closing(open_log(path)) as engine:
        push(engine, note("3"))
        assert database_of(engine) == name
        assert pull(engine)["epoch"] != name


@table("is_open", {"a new opening": False, "into the open file": True})
def test_a_restored_backup_keeps_the_name_of_its_database(
    path: Path, is_open: bool
) -> None:
    with closing(open_log(path)) as engine:
        push(engine, note("1"))
        backup = back_up(path)
        push(engine, note("lost"))
        name = database_of(engine)
        if is_open:
            restore(path, backup)
            push(engine, note("new"))
            assert database_of(engine) == name
    backup.replace(path)
    with closing(open_log(path)) as engine:
        push(engine, note("newer"))
        assert database_of(engine) == name


@table("adopt", {"a new file": False, "an adopted one": True})
def test_another_file_is_another_database(path: Path, adopt: bool) -> None:
    names = set[str]()
    for name in ("one.db", "other.db"):
        file = path.with_name(name)
        if adopt:
            make_database(file, SCHEMA)
        with closing(open_log(file, adopt=adopt)) as engine:
            names.add(database_of(engine))
        with closing(open_log(file)) as engine:
            names.add(database_of(engine))
    assert len(names) == 2


def test_a_snapshot_names_the_database_that_its_data_came_from(path: Path) -> None:
    with closing(open_log(path.with_name("other.db"))) as other_engine:
        push(other_engine, note("1", "of the other"))
        other_name = database_of(other_engine)
    with closing(open_log(path)) as engine:
        push(engine, note("1", "of the one"))
        before = ask(engine.snapshot())
        restore(path, path.with_name("other.db"))
        after = ask(engine.snapshot())
    assert (before.data, after.data) == (["of the one"], ["of the other"])
    assert before.database != after.database == other_name


def rename_database(path: Path) -> None:
    """Run the statement of the README, while engines have the file open."""
    (statement,) = set(re.findall(r"^(UPDATE mizusync_epochs .*);$", readme(), re.M))
    make_database(path, statement)


@table("openings", {"in its first epoch": 1, "in a later one": 2})
def test_a_renamed_database_is_another_one_and_goes_on(
    path: Path, openings: int
) -> None:
    for number in range(openings - 1):
        with closing(open_log(path)) as engine:
            push(engine, note(f"old {number}"))
    with closing(open_log(path)) as engine:
        first = database_of(engine)
        push(engine, note("1"))
        page = pull(engine)
        rename_database(path)
        assert database_of(engine) not in ("", first)
        for epoch in (first, page["epoch"]):
            with pytest.raises(mizusync.CursorUnknown):
                pull(engine, 1, epoch=epoch)
        (result,) = push(engine, note("2"))
        assert result["cursor"] == openings + 1
        with pytest.raises(mizusync.CursorUnknown):
            pull(engine, 1, epoch=first)
        assert len(whole_log(engine)) == openings + 1
        renamed = database_of(engine)
    with closing(open_log(path)) as engine:
        push(engine, note("3"))
        assert database_of(engine) == renamed


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


@pytest.mark.parametrize("limit", [1, 2, 3, 5])
@pytest.mark.parametrize("scope", ["a", 'quote " and \\', "雨 %d %s"])
def test_sqlite_joins_a_page_as_python_does(
    path: Path, monkeypatch: pytest.MonkeyPatch, scope: str, limit: int
) -> None:
    texts = ["[1,  2.50]", '{"a": "%s %d"}', '"雨"', "null", '"\\u0000"', "not json"]

    def write(db: sqlite3.Connection, mutation: Mutation) -> list[Any]:
        changes: list[Any] = [Json(texts[number]) for number in mutation.args]
        return [Change(0, scope="between"), *changes, Change("after", scope="between")]

    with closing(open_log(path, apply=write)) as engine:
        for number, places in enumerate([[0], [1, 2, 3], [], [4, 5], [0, 1], [2]]):
            engine.submit([note(str(number), places, scope=scope)]).result(PATIENCE)
        position = engine.store.latest()

        def every_page(db: sqlite3.Connection) -> list[bytes]:
            load = functools.partial(engine._tails.load_page, db, scope)
            cursors = range(position.head + 1)
            return [load(at, limit, position.epoch).encode() for at in cursors]

        joined = engine.store.read(every_page)
        by_rows = mizusync.Store.read_full_page
        monkeypatch.setattr(mizusync.SQLiteStore, "read_full_page", by_rows)
        assert joined == engine.store.read(every_page)


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


def test_each_id_of_long_pushes_in_one_transaction_applies_once(path: Path) -> None:
    """One look-up names many ids. The transaction may have applied some of them."""
    with closing(open_log(path, settings=ONE_TRANSACTION)) as engine:
        (before,) = push(engine, note("150"))
        scopes = (DEFAULT, "other")
        first, second = (
            [note(str(number), scope=scope) for number in numbers for scope in scopes]
            for numbers in (range(100, 250), range(20, 300))
        )
        with writer_held(engine):
            futures = [engine.submit(mutations) for mutations in (first, second)]
        results = [
            (mutation["scope"], int(mutation["id"]), result)
            for mutations, future in zip((first, second), futures, strict=True)
            for mutation, result in zip(mutations, future.result(PATIENCE), strict=True)
        ]
        assert engine.counts["commits"] == 2
        seen = {(DEFAULT, 150): before["cursor"]}
        for scope, number, result in results:
            cursor = seen.setdefault((scope, number), result.cursor)
            assert result.cursor == cursor
        repeated = [key for key in seen if 100 <= key[1] < 250] + [(DEFAULT, 150)]
        assert sum(result.duplicate for _, _, result in results) == len(repeated)
        for scope in scopes:
            cursors = sorted(seen[scope, number] for number in range(20, 300))
            page = ask(engine.pull(scope, limit=1000))
            assert [change.cursor for change in page.changes] == cursors


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


def test_a_large_push_that_is_repeated_takes_time_linear_in_its_size(
    engine: Engine,
) -> None:
    # If the time grew with the square of the size, it would be ten times as long.
    pushes = [note(str(number)) for number in range(10_000)]
    times = []
    for _ in range(2):
        started = time.process_time()
        results = engine.submit(pushes).result(4 * PATIENCE)
        times.append(time.process_time() - started)
    assert all(result.duplicate for result in results)
    assert times[1] < 4 * times[0]


def test_a_generator_may_change_and_yield_one_object_again_and_again(
    path: Path,
) -> None:
    def apply(db: sqlite3.Connection, mutation: Mutation) -> Iterator[Any]:
        change: dict[str, int] = {}
        for number in range(3):
            change["number"] = number
            yield change

    with closing(open_log(path, apply=apply)) as engine:
        (result,) = push(engine, note("a"))
    data = [change["data"] for change in result["changes"]]
    assert data == [{"number": number} for number in range(3)]


@pytest.mark.parametrize("made", [0, False])
def test_a_value_that_is_no_iterable_is_an_internal_error(
    path: Path, made: Any
) -> None:
    with closing(open_log(path, apply=lambda db, mutation: made)) as engine:
        (result,) = push(engine, note("a"))
    assert result["code"] == "internal_error"


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


def test_keep_changes_holds_where_each_push_adds_more_than_a_trim_removes(
    path: Path,
) -> None:
    few = Settings(keep_changes=10)
    many = [[number] * 300 for number in range(1000)]
    apply = {"apply": lambda db, mutation: many[mutation.args]}
    with closing(open_log(path, settings=few, **apply)) as engine:
        for number in range(10):
            push(engine, note(f"{number}", number), note(f"again {number}", number))
        db = sqlite3.connect(path)
        with closing(db):
            (count,) = db.execute("SELECT count(*) FROM mizusync_changes").fetchone()
    assert count <= 1200


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


def test_a_push_is_freed_without_the_garbage_collector(path: Path) -> None:
    """The steps of a push refer to their list; otherwise large args stay for long."""
    with closing(open_log(path)) as engine:
        push(engine, note("first"))
        gc.collect()
        gc.disable()
        try:
            push(engine, note("a", "x" * 1000))
            ask(asyncio.sleep(0))
            steps = [one for one in gc.get_objects() if isinstance(one, mizusync.Step)]
        finally:
            gc.enable()
    assert steps == []


def test_an_exit_in_the_callback_of_a_refused_future_ends_no_thread(
    path: Path,
) -> None:
    impatient = Settings(busy_timeout=0.1)
    with (
        closing(open_log(path, settings=impatient)) as engine,
        closing(sqlite3.connect(path, isolation_level=None)) as other,
        recorded(),
    ):
        push(engine, note("a"))
        other.execute("BEGIN IMMEDIATE")
        future = engine.submit([note("b")])
        future.add_done_callback(lambda future: sys.exit(1))
        until(future.done)
        other.execute("ROLLBACK")
        (result,) = engine.submit([note("c")]).result(PATIENCE)
        assert result.ok


def test_a_trim_that_is_on_disk_is_answered_where_the_jobs_beside_it_are_refused() -> (
    None
):
    """Its result is a number; a push's is a Result. Both may wait in one refusal."""
    future: Future[list[Any]] = Future()
    job = mizusync.Job([mizusync.Step(lambda batch: 2, (), "a trim", 2)], future)
    job.refuse()
    job.answer()
    assert future.result(0) == [2]


def test_a_look_at_other_processes_that_fails_refuses_no_push(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = threading.Event()
    with (
        closing(open_log(path, settings=Settings(watch_interval=0.01))) as engine,
        recorded(),
    ):
        push(engine, note("first"))
        read = engine.store.read

        def fail(work: Callable[[Any], Any]) -> Any:
            if threading.current_thread().name != "mizusync-writer":
                return read(work)
            looked.set()
            until(lambda: engine.stats()["pushes_waiting"] > 0)
            raise mizusync.StoreRefused("no reader can be opened")

        with closing(open_log(path)) as other:
            monkeypatch.setattr(engine.store, "read", fail)
            push(other, note("foreign"))
            assert looked.wait(PATIENCE)
            (result,) = engine.submit([note("a")]).result(PATIENCE)
            monkeypatch.undo()
    assert result.ok


@pytest.mark.skipif(sys.version_info < (3, 12), reason="needs autocommit")
def test_an_application_that_sets_autocommit_stops_no_later_push(path: Path) -> None:
    schema = (
        SCHEMA
        + """
        CREATE TABLE IF NOT EXISTS parent (id PRIMARY KEY);
        CREATE TABLE IF NOT EXISTS child (
            id REFERENCES parent DEFERRABLE INITIALLY DEFERRED);
        PRAGMA foreign_keys = ON;
    """
    )

    def apply(db: Any, mutation: Mutation) -> list[Any]:
        db.autocommit = False
        if mutation.args == "orphan":
            db.execute("INSERT INTO child VALUES (1)")
        return [mutation.id]

    with closing(open_log(path, apply=apply, schema=schema)) as engine, recorded():
        results = [push(engine, note(key, key))[0] for key in ("a", "orphan", "b")]
    assert [result["ok"] for result in results] == [True, False, True]


@contextmanager
def failing_log() -> Iterator[None]:
    """Let every log line of the block fail, as a filter that wants a request does."""

    def fail(record: logging.LogRecord) -> bool:
        raise LookupError("outside of a request")

    logger, handler = logging.getLogger("mizusync"), logging.NullHandler()
    handler.handle = fail  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def test_a_logging_filter_that_raises_blocks_no_answer_and_ends_no_thread(
    path: Path,
) -> None:
    with closing(open_log(path, apply=apply_carelessly)) as engine, failing_log():
        engine.add_listener(lambda hints: raising(ZeroDivisionError()))
        results = push(engine, note("1"), note("SystemExit"), note("2"))
        assert ask(engine.push([note("3")]))[0].ok
    codes = [result.get("code", "") for result in results]
    assert codes == ["", "internal_error", ""]


def test_a_logging_filter_that_raises_acknowledges_nothing_that_was_rolled_back(
    path: Path,
) -> None:
    def apply_or_roll_back(db: sqlite3.Connection, mutation: Mutation) -> Any:
        if mutation.id == "faulty":
            return roll_back_by_conflict(db)
        return apply(db, mutation)

    with closing(open_log(path, apply=apply_or_roll_back)) as engine, failing_log():
        results = push(engine, note("1", "1"), note("faulty"), note("2", "2"))
        assert [result["ok"] for result in results] == [True, False, True]
        assert ask(engine.snapshot()).data == ["1", "2"]


def test_a_line_of_the_log_names_the_function_that_logs_it(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(open_log(path, apply=apply_carelessly)) as engine:
        push(engine, note("SystemExit"))
    assert [record.funcName for record in caplog.records] == ["apply"]


@pytest.mark.parametrize("interval", [1e-9, 1e6])
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


class StoreWithoutNUL(mizusync.SQLiteStore):
    """A store of a database whose text can't hold a NUL."""

    def run(self, db: Any, sql: str, *parameters: Any) -> list[Any]:
        if any(isinstance(value, str) and "\0" in value for value in parameters):
            raise ValueError("a NUL")
        return super().run(db, sql, *parameters)


def test_a_mutation_whose_id_the_store_cant_look_up_fails_alone(path: Path) -> None:
    with closing(Engine(StoreWithoutNUL(path, SCHEMA), apply=apply)) as engine:
        results = push(engine, *(note(key, key) for key in ("1", "2", "\0", "3")))
        codes = [result.get("code") for result in results]
        assert codes == [None, None, "internal_error", None]
        assert fold(whole_log(engine)) == ["1", "2", "3"]


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
    with closing(sqlite3.connect(":memory:")) as db:
        db.executescript(schema)
        try:
            db.execute(statement)
        except sqlite3.DatabaseError:
            pass
        else:
            pytest.skip("this SQLite sees no error here")

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
def full_disk(path: Path, room: int = 100) -> Iterator[None]:
    """Keep files from growing much beyond this database's WAL while the block lasts."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = path.with_name(f"{path.name}-wal").stat().st_size
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + room, old[1]))
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
@table("size", {"at the commit": 2**19, "within apply": 2**22})
def test_on_a_nearly_full_disk_a_large_mutation_is_unavailable_until_it_has_room(
    engine: Engine, path: Path, size: int
) -> None:
    push(engine, note("0"))
    large = note("large", "x" * size)
    with full_disk(path, room=2**17):
        for key in ("1", "2", "3"):  # a small one fits each time
            results = push(engine, note(key), large)
            assert [result.get("code") for result in results] == [None, "unavailable"]
        assert len(whole_log(engine)) == len(ask(engine.snapshot()).data) == 4
    (sent_again,) = push(engine, large)
    assert sent_again["ok"]
    assert "duplicate" not in sent_again
    assert len(whole_log(engine)) == len(ask(engine.snapshot()).data) == 5


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


def faults(stderr: str) -> str:
    """Return the lines that are not warnings of asyncio about a slow machine."""
    slow = r"^(?:.* WARNING asyncio )?Executing <.* took [0-9.]+ seconds\n"
    return re.sub(slow, "", stderr, flags=re.M)


def test_pulls_while_the_engine_closes_are_answered_or_unavailable(path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CLOSER, str(path)],
        env=os.environ | {"PYTHONPATH": str(Path(mizusync.__file__).parent)},
        capture_output=True,
        text=True,
        timeout=PATIENCE * 4,
        check=False,
    )
    assert done.returncode == 0
    assert faults(done.stderr) == ""


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
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
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
# Topics, numbers and bytes; the messages are plain JSON here. A hub sends its hints
# from tasks, so each test is a coroutine.


class Recorder:
    """A subscriber that keeps what it is sent; it may be slow to take it."""

    def __init__(self, pause: float = 0.0) -> None:
        self.messages: list[Any] = []
        self.pause = pause

    def hint(self, topic: str, cursor: int, message: bytes) -> None:
        self.message(message)
        assert self.messages[-1]["topic"] == topic
        assert self.messages[-1]["data"]["cursor"] == cursor
        started = time.monotonic()
        while time.monotonic() < started + self.pause:
            pass

    def message(self, message: bytes) -> None:
        self.messages.append(json.loads(message))

    @property
    def data(self) -> list[Any]:
        return [message["data"] for message in self.messages]

    @property
    def cursors(self) -> list[int]:
        return [data["cursor"] for data in self.data]

    async def until(self, cursor: int) -> None:
        """Wait until this cursor was sent."""
        while cursor not in self.cursors:
            await asyncio.sleep(0.001)


def make_hub(**limits: Any) -> Hub:
    return Hub(Settings(**limits), bytes)


def make_hint(cursor: int, *changes: Any, after: int | None = None) -> Hint:
    encoded = tuple(json.dumps(change).encode() for change in changes)
    before = cursor - len(changes) if after is None else after
    return Hint(cursor, "e", before, encoded)


def hint_data(cursor: int, after: int, changes: list[Any]) -> dict[str, Any]:
    return {"cursor": cursor, "epoch": "e", "after": after, "changes": changes}


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a coroutine function as a test."""

    @functools.wraps(test)
    def run(*arguments: Any, **named: Any) -> None:
        ask(test(*arguments, **named))

    return run


@in_loop
async def test_a_hint_goes_to_the_subscribers_of_its_topic_alone() -> None:
    hub = make_hub()
    one, two, other = Recorder(), Recorder(), Recorder()
    for subscriber, topic in ((one, "sync:a"), (two, "sync:a"), (other, "sync:b")):
        hub.subscribe(topic, subscriber)
    hub.hint("sync:a", Hint(5))
    await two.until(5)
    assert one.messages == two.messages == [{"topic": "sync:a", "data": {"cursor": 5}}]
    assert other.messages == []


@in_loop
async def test_a_hint_is_sent_after_the_callers_turn() -> None:
    hub, subscriber = make_hub(), Recorder()
    hub.subscribe("sync:a", subscriber)
    hub.hint("sync:a", Hint(5))
    assert subscriber.messages == []
    await asyncio.sleep(0)
    assert subscriber.cursors == [5]


@in_loop
async def test_only_subscribers_that_asked_get_the_changes_in_their_hints() -> None:
    hub, plain, asking = make_hub(), Recorder(), Recorder()
    hub.subscribe("sync:a", plain)
    hub.subscribe("sync:a", asking, changes=True)
    hub.hint("sync:a", make_hint(5, "x", "y"))
    await asking.until(5)
    assert plain.data == [{"cursor": 5}]
    assert asking.data == [hint_data(5, 3, ["x", "y"])]


@in_loop
async def test_the_last_subscribe_decides_on_changes() -> None:
    hub, subscriber = make_hub(hint_gap=0.0), Recorder()
    for cursor, changes, fields in ((5, True, 4), (6, False, 1)):
        hub.subscribe("sync:a", subscriber, changes=changes)
        hub.unsubscribe("sync:a", Recorder())  # that never subscribed
        hub.hint("sync:a", make_hint(cursor, "x"))
        await subscriber.until(cursor)
        assert len(subscriber.data[-1]) == fields


async def burst(hints: list[Hint], changes: bool = True, **limits: Any) -> Recorder:
    """Return a subscriber after the first hint, and then all others at once."""
    hub, subscriber = make_hub(**limits), Recorder(pause=0.03)
    hub.subscribe("sync:a", subscriber, changes)
    for hint in hints:
        hub.hint("sync:a", hint)
        if hint is hints[0]:
            await subscriber.until(hint.cursor)
    await subscriber.until(hints[-1].cursor)
    return subscriber


@in_loop
async def test_the_hints_of_a_burst_are_merged_into_one() -> None:
    subscriber = await burst(
        [make_hint(cursor, str(cursor)) for cursor in range(1, 11)]
    )
    later = [str(cursor) for cursor in range(2, 11)]
    assert subscriber.data == [hint_data(1, 0, ["1"]), hint_data(10, 1, later)]


@in_loop
async def test_a_topic_pauses_until_it_has_earned_the_time_of_its_broadcasts() -> None:
    # The first takes 30 ms of a budget of 5, and the rest has to be earned.
    for changes, share in ((True, 1 / 4), (False, 1 / 16)):
        started = time.monotonic()
        await burst([make_hint(1, 1), make_hint(2, 2)], changes, hint_gap=5.0)
        assert time.monotonic() - started >= 0.025 / share


@in_loop
async def test_no_pause_is_longer_than_the_hint_gap() -> None:
    # The budget asks for a pause of 160 ms, and after the second hint for 640.
    hints = [make_hint(1, 1), make_hint(2, 2)]
    subscriber = await burst(hints, False, hint_gap=0.0)
    assert subscriber.cursors == [1, 2]
    topic = mizusync.Topic(0.0)
    spend = functools.partial(topic.spend, share=0.1, longest_pause=2.0)
    assert spend(100.0, now=100.0) == pytest.approx(2.0)
    assert spend(0.0, now=102.0) == pytest.approx(0.0)


@given(
    used=st.lists(st.floats(0, 1), min_size=1, max_size=50),
    share=st.sampled_from([1 / 16, 1 / 4]),
)
def test_broadcasts_use_no_more_than_their_share_of_the_loops_time(
    used: list[float], share: float
) -> None:
    topic, now = mizusync.Topic(0.0), 0.0
    total = 0.0
    for seconds in used:
        now += seconds
        total += seconds
        now += topic.spend(seconds, now, share, longest_pause=1e9)
        assert total <= mizusync.BURST + now * share + 1e-6


@in_loop
async def test_a_hint_with_too_many_changes_comes_without_them() -> None:
    hints = [make_hint(1, 1), *(make_hint(cursor, 1) for cursor in range(2, 7))]
    subscriber = await burst(hints, max_hint_changes=5)
    assert subscriber.data[1:] == [hint_data(6, 1, [1] * 5)]
    subscriber = await burst(hints, max_hint_changes=4)
    assert subscriber.data[1:] == [{"cursor": 6}]
    large = make_hint(3, 1, 1, 1, 1, 1, after=2)
    subscriber = await burst([hints[0], hints[1], large], max_hint_changes=4)
    assert subscriber.data[1:] == [{"cursor": 3}]


@in_loop
async def test_a_hint_with_large_changes_comes_without_them() -> None:
    for size, fields in ((100, 4), (101, 1)):
        hub, subscriber = make_hub(max_hint_size=102), Recorder()
        hub.subscribe("sync:a", subscriber, changes=True)
        hub.hint("sync:a", make_hint(1, "x" * size))
        await subscriber.until(1)
        assert len(subscriber.data[0]) == fields


@in_loop
async def test_a_large_broadcast_yields_to_others_and_keeps_its_order() -> None:
    hub = make_hub()
    crowd = [Recorder() for _ in range(3 * mizusync.BROADCAST_BATCH + 1)]
    for number, subscriber in enumerate(crowd):
        hub.subscribe("sync:a", subscriber, changes=number % 2 == 0)
    hub.hint("sync:a", make_hint(1, 1))
    await asyncio.sleep(0)
    sent = [len(subscriber.messages) for subscriber in crowd]
    assert sent == sorted(sent, reverse=True)
    assert sum(sent) == mizusync.BROADCAST_BATCH
    hub.hint("sync:a", make_hint(2, 2))  # it waits for the end of the broadcast
    hub.hint("sync:a", make_hint(3, 3))
    gone = crowd.pop()
    hub.unsubscribe("sync:a", gone)
    late = Recorder()
    hub.subscribe("sync:a", late)
    hub.send_current("sync:a", late, 3)
    while len(late.messages) < 2:  # it is the last one of the last broadcast
        await asyncio.sleep(0)
    assert all(subscriber.cursors == [1, 3] for subscriber in crowd)
    assert crowd[0].data[1] == hint_data(3, 1, [2, 3])
    assert (gone.messages, late.cursors) == ([], [3, 3])


@in_loop
async def test_a_merged_hint_never_hides_a_gap() -> None:
    foreign = Hint(4, "e")  # another process's commit, whose changes are not known here
    first, second = make_hint(1, 1), make_hint(2, 2)
    subscriber = await burst([first, second, foreign, make_hint(5, 5)])
    assert subscriber.data[1:] == [{"cursor": 5}]
    subscriber = await burst([first, second, make_hint(9, 9, after=7)])
    assert subscriber.data[1:] == [{"cursor": 9}]


@settings(max_examples=40)
@given(
    commits=st.lists(st.integers(0, 4), min_size=1, max_size=30), few=st.integers(1, 12)
)
@in_loop
async def test_hints_with_changes_have_no_gap_and_end_at_the_newest(
    commits: list[int], few: int
) -> None:
    hub, subscriber, cursor = make_hub(max_hint_changes=few), Recorder(), 0
    hub.subscribe("sync:a", subscriber, changes=True)
    for count in commits:
        changes = range(cursor + 1, cursor + count + 2)
        cursor += count + 1
        hub.hint("sync:a", make_hint(cursor, *changes))
        if count == 3:
            await subscriber.until(cursor)
    await subscriber.until(cursor)
    assert subscriber.cursors == sorted(set(subscriber.cursors))
    for data in subscriber.data:
        if "changes" in data:
            assert data["changes"] == list(range(data["after"] + 1, data["cursor"] + 1))
            assert len(data["changes"]) <= few


@in_loop
async def test_a_new_subscriber_is_sent_the_newest_cursor_and_never_a_lower_one() -> (
    None
):
    hub, subscriber = make_hub(hint_gap=0.0), Recorder()
    hub.subscribe("sync:a", subscriber)
    hub.send_current("sync:a", subscriber, 7)
    hub.send_current("sync:a", subscriber, 3)  # read before a commit, sent after it
    hub.hint("sync:a", Hint(9))
    await subscriber.until(9)
    hub.send_current("sync:a", subscriber)
    assert subscriber.cursors == [7, 7, 9, 9]
    hub.send_current("sync:b", subscriber, 1)  # a topic that it is not subscribed to
    assert len(subscriber.messages) == 4


@in_loop
async def test_the_newest_hint_of_each_silent_topic_is_sent_again() -> None:
    hub = make_hub(heartbeat=100.0, hint_gap=0.0)
    subscribers = {name: Recorder() for name in ("first", "second", "third")}
    for topic, subscriber in subscribers.items():
        hub.subscribe(topic, subscriber, changes=True)
        hub.hint(topic, make_hint(1, "x"))
        await subscriber.until(1)
    early = time.monotonic()
    until(lambda: time.monotonic() > early)
    hub.hint("first", make_hint(2, "y"))
    await subscribers["first"].until(2)
    late = time.monotonic()
    hub.send_heartbeats(early + 100)
    await asyncio.sleep(0.01)
    sent = [subscriber.cursors for subscriber in subscribers.values()]
    assert sent == [[1, 2], [1, 1], [1, 1]]
    assert subscribers["second"].data[-1] == {"cursor": 1}
    until(lambda: time.monotonic() > late)
    hub.send_heartbeats(late + 100)
    await asyncio.sleep(0.01)
    sent = [subscriber.cursors for subscriber in subscribers.values()]
    assert sent == [[1, 2, 2], [1, 1], [1, 1]]


def test_a_look_for_silent_topics_makes_no_copy_of_the_others() -> None:
    hub, subscriber = make_hub(heartbeat=100.0), Recorder()
    for number in range(5000):
        hub.subscribe(f"sync:{number}", subscriber)
        hub.send_current(f"sync:{number}", subscriber, 1)
        hub.subscribe(f"news {number}", subscriber)  # which never has a hint
        hub.topics[f"news {number}"].last_sent = -math.inf
    tracemalloc.start()
    try:
        hub.send_heartbeats(time.monotonic())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10_000  # bytes; a list of all has 650,000


@in_loop
async def test_a_topic_that_never_had_a_hint_has_no_heartbeat() -> None:
    hub, subscriber = make_hub(heartbeat=1.0), Recorder()
    hub.subscribe("news", subscriber)
    hub.send_heartbeats(time.monotonic() + 5)
    await asyncio.sleep(0.01)
    assert subscriber.messages == []


@in_loop
async def test_a_topic_without_subscribers_is_forgotten_with_its_pending_hint() -> None:
    hub, subscriber, later = make_hub(), Recorder(pause=0.005), Recorder()
    hub.subscribe("sync:a", subscriber)
    hub.hint("sync:a", Hint(1))
    await subscriber.until(1)
    hub.hint("sync:a", Hint(2))  # it waits
    hub.unsubscribe("sync:a", subscriber)
    assert not hub.topics
    hub.hint("sync:a", Hint(3))
    hub.publish("sync:a", b"3")
    hub.unsubscribe("sync:a", subscriber)
    hub.subscribe("sync:a", later)
    hub.send_current("sync:a", later, 3)
    await asyncio.sleep(0.05)
    assert (subscriber.cursors, later.cursors) == ([1], [3])


def test_a_message_reaches_every_subscriber_and_none_is_merged() -> None:
    hub, one, two = make_hub(), Recorder(), Recorder()
    hub.subscribe("news", one)
    hub.subscribe("news", two)
    for number in range(50):
        hub.publish("news", b"%d" % number)
    assert one.data == two.data == list(range(50))
    hub.publish("another", b"1")


class Leaver(Recorder):
    """A subscriber that leaves every topic when it is sent this cursor."""

    def __init__(self, hub: Hub, last: int) -> None:
        super().__init__()
        self.hub, self.last = hub, last

    def hint(self, topic: str, cursor: int, message: bytes) -> None:
        super().hint(topic, cursor, message)
        if cursor == self.last:
            for name in list(self.hub.topics):
                self.hub.unsubscribe(name, self)


@in_loop
async def test_a_subscriber_that_leaves_during_a_broadcast_disturbs_no_other() -> None:
    hub, last = make_hub(), Recorder()
    hub.subscribe("sync:a", Leaver(hub, last=1))
    hub.subscribe("sync:a", last)
    hub.hint("sync:a", Hint(1))
    await last.until(1)
    assert len(hub.topics["sync:a"].subscribers) == 1


@in_loop
async def test_a_subscriber_may_leave_every_topic_at_a_heartbeat() -> None:
    hub = make_hub(heartbeat=1.0, hint_gap=0.0)
    leaver, before = Leaver(hub, last=0), asyncio.all_tasks()
    for topic in ("sync:a", "sync:b"):
        hub.subscribe(topic, leaver)
        hub.hint(topic, Hint(1))
    await asyncio.sleep(0.01)
    leaver.last = 1
    hub.send_heartbeats(time.monotonic() + 5)
    await asyncio.sleep(0.01)
    assert (leaver.cursors, len(hub.topics)) == ([1, 1, 1], 0)
    assert asyncio.all_tasks() == before  # no broadcast is left


@in_loop
async def test_a_subscriber_that_fails_keeps_nothing_from_another() -> None:
    hub, last = make_hub(), Recorder()

    class Broken(Recorder):
        def message(self, message: bytes) -> None:
            raise ConnectionError("gone")

    hub.subscribe("sync:a", Broken())
    hub.subscribe("sync:a", last)
    for cursor in (1, 2):
        hub.hint("sync:a", Hint(cursor))
        await last.until(cursor)
    hub.publish("sync:a", b'{"cursor": 3}')
    assert last.cursors == [1, 2, 3]


@pytest.mark.skipif(sys.version_info < (3, 12), reason="needs eager tasks")
@in_loop
async def test_hints_go_on_where_tasks_begin_at_once() -> None:
    loop = asyncio.get_running_loop()
    loop.set_task_factory(getattr(asyncio, "eager_task_factory"))  # noqa: B009
    hub, subscriber = make_hub(), Recorder()
    hub.subscribe("sync:a", subscriber)
    for cursor in range(1, 5):
        hub.hint("sync:a", Hint(cursor))
        await subscriber.until(cursor)


# --- HTTP/1.1 -------------------------------------------------------------------------
# First the parser alone, then transcripts of requests and their answers, then the
# endpoints. A message that two parsers could read differently is refused, the
# connection is closed, and nothing behind it is read as a request.

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
    """Draw a request without a body, by the grammar (RFC 9112 §3, RFC 9110 §5)."""
    query = draw(st.sampled_from(["", "?", "?scope=a+b&cursor=7", "?scope=%C3%A9%20"]))
    lines = [f"{draw(tokens)} /{draw(paths)}{query} HTTP/1.1", "Host: localhost"]
    for name, value in draw(st.lists(st.tuples(tokens, printable), max_size=4)):
        space = draw(st.sampled_from(["", " ", "\t", " \t "]))
        lines.append(f"X-{name}:{space}{value}{space}")
    return raw(*(line.encode() for line in lines))


@st.composite
def spoiled_heads(draw: st.DrawFn) -> bytes:
    """Draw a good request, and write over a few places of it."""
    head = bytearray(draw(request_heads()))
    stuff = st.sampled_from(hostile.FRAGMENTS) | st.binary(max_size=3)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(head)))
        head[at : at + draw(st.integers(0, 3))] = draw(stuff)
    return bytes(head)


def read_heads(parts: Iterable[bytes]) -> list[Any]:
    """Parse the requests in these bytes; a refusal that ended them comes last."""
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
def test_requests_are_parsed_the_same_however_their_bytes_arrive(
    sent: list[bytes], cuts: list[int]
) -> None:
    found = read_heads(pieces(b"".join(sent), cuts))
    assert found == read_heads([b"".join(sent)])
    assert [one[0].encode() for one in found] == [head.split(b" ")[0] for head in sent]


@given(spoiled_heads(), st.lists(st.integers(0, 900), max_size=5))
@settings(max_examples=200)
def test_a_spoiled_head_is_a_request_or_a_refusal_however_its_bytes_arrive(
    head: bytes, cuts: list[int]
) -> None:
    assert read_heads(pieces(head, cuts)) == read_heads([head])


@given(st.binary(max_size=100))
def test_any_bytes_are_a_request_or_a_refusal(data: bytes) -> None:
    read_heads([data + b"\r\n\r\n"])


def test_the_parser_takes_one_head_off_the_front_of_the_buffer() -> None:
    buffer = bytearray(
        raw(b"GET /a%20b?c=d+e HTTP/1.1", b"HOST: localhost", b"X-A:\t1 ", body=b"rest")
    )
    request = mizusync.parse_request(buffer, Settings())
    assert request is not None
    assert (request.method, request.target) == ("GET", "/a%20b?c=d+e")
    assert (request.path, request.query) == ("/a b", {"c": "d e"})
    assert request.headers == {"host": "localhost", "x-a": "1"}
    assert buffer == b"rest"


def test_the_parser_leaves_half_a_head_in_the_buffer() -> None:
    buffer = bytearray(HEALTHZ[:-1])
    assert mizusync.parse_request(buffer, Settings()) is None
    assert buffer == HEALTHZ[:-1]


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
def test_parameters_are_parsed_as_html_forms_write_them(case: tuple[str, str]) -> None:
    written, scope = case
    buffer = bytearray(get(b"/sync/pull?scope=%b" % written.encode()))
    request = mizusync.parse_request(buffer, Settings())
    assert request is not None
    assert request.query == {"scope": scope}


def test_a_hostile_weight_of_a_coding_takes_time_linear_in_its_size() -> None:
    # When the time grew with the square of the size, this took 19 s.
    head = get(b"/", b"Accept-Encoding: gzip;q=0." + b"1" * 60_000 + b"x")
    request = mizusync.parse_request(bytearray(head), Settings())
    assert request is not None
    started = time.process_time()
    assert not request.accepts_gzip
    assert time.process_time() - started < PATIENCE / 4


class Transcript(NamedTuple):
    """What a client sends, the status that comes back, and whether it may go on."""

    sent: bytes
    status: int | str  # hostile.REFUSED is any from 400 on
    stays_open: bool


def transcripts(
    rows: Mapping[int, Mapping[str, bytes]], *, stays_open: bool
) -> dict[str, Transcript]:
    """Make transcripts of the bytes that each status answers."""
    return {
        name: Transcript(sent, status, stays_open)
        for status, requests in rows.items()
        for name, sent in requests.items()
    }


def check_transcript(client: RawClient, transcript: Transcript, size: int) -> None:
    """Send the bytes, `size` at a time, and a request behind them; check the answers.

    If the connection stays open, that request is answered, too; if the server closes,
    it is never read."""
    sent, status, stays_open = transcript
    everything = sent + HEALTHZ
    for at in range(0, len(everything), size):
        client.send(everything[at : at + size])
    bodiless = sent.startswith(b"HEAD ")
    reply = client.read_reply(bodiless=bodiless)
    assert status in (reply.status, hostile.REFUSED), reply
    if status == hostile.REFUSED or reply.status >= 400:
        code = "cursor_unknown" if reply.status == 410 else ""
        assert reply.status >= 400
        assert bodiless or refused(reply, reply.status, code=code)
    elif sent.startswith(b"POST"):
        assert [result["ok"] for result in reply.json] == [True]
    upgrade = ["Upgrade"] * (reply.status == 426)  # RFC 9110 §7.8
    if stays_open:
        assert reply.headers.get("connection", "") == ", ".join(upgrade)
        assert client.read_reply().json["status"] == "ok"
    else:
        # RFC 9112 §9.6
        assert reply.headers["connection"] == ", ".join([*upgrade, "close"])
        assert client.ended()


def coded(
    *lines: bytes, line: bytes = PUSH, body: bytes = chunked(BODY), host: bytes = HOST
) -> bytes:
    """Return a push with a body in chunks, whatever its fields say."""
    return post(*lines, line=line, body=body, host=host)


LONGEST = b"/healthz?x=" + b"x" * (8 * 1024 - 11)  # bytes of a target
LOST, CONTINUE = get(b"/nowhere"), b"Expect: 100-continue"
GET_1_0, POST_1_0 = b"GET /healthz HTTP/1.0", b"POST /sync/push HTTP/1.0"
CLOSED = {
    # Limits.
    413: {
        "The body is too large": post(
            b"Content-Length: %d" % (3 * 2**20), body=b" " * (3 * 2**20)
        ),
        "The chunks are too large": coded(CHUNKED, body=chunked(*[b" " * 2**16] * 17)),
        "The body of a HEAD request is too large": raw(
            b"HEAD /healthz HTTP/1.1", HOST, b"Content-Length: 1048577"
        ),
        "A body that is too large is not asked for": post(
            b"Content-Length: 1048577", CONTINUE, body=b""
        ),
    },
    # A refusal that leaves a body unread ends the connection.
    404: {
        "The path of a body is unknown": post(LENGTH, line=b"POST /nowhere HTTP/1.1")
    },
    403: {
        "A body is for another host": post(LENGTH, host=EVIL),
        "A body that was not asked for is sent": post(LENGTH, CONTINUE, host=EVIL),
    },
    200: {
        "The client asks to close": get(b"/healthz", b"Connection: X-A , CLOSE"),
        "A push stands behind the last request": get(
            b"/healthz", b"Connection: , close", body=post(LENGTH)
        ),
        "A push stands behind a request of HTTP/1.0": raw(GET_1_0, body=post(LENGTH)),
        "HTTP/1.0 asks to keep alive": raw(GET_1_0, HOST, b"Connection: Keep-Alive"),
    },
}
QUERIES = [
    "cursor=0", "cursor=000", "wait=0", "wait=0.05", "wait=0.15000000000000002",
    "epoch=", "limit=9999", "colour=red",
]  # fmt: skip
KINDS = [
    "", "text/plain", "application/x-www-form-urlencoded", "application/jsonp", "json",
]  # fmt: skip
LEFT_OPEN = {
    # Forms that a server has to accept (RFC 9112 §2.2, §3.2.2; RFC 9110 §2.5, §5.6.1).
    200: {
        "An empty line stands before the request": b"\r\n" + HEALTHZ,
        "The body of a GET looks like a request": get(
            b"/healthz", b"Content-Length: %d" % len(LOST), body=LOST
        ),
        "The target is in absolute form": get(b"http://localhost/healthz"),
        "The absolute form has a port": get(b"http://localhost:80/sync/pull?cursor=0"),
        "The absolute form is for us": get(b"http://localhost/healthz", host=EVIL),
        "Scheme and host are in upper case": get(b"HTTP://LOCALHOST/healthz"),
        "The minor version is a later one": raw(b"GET /healthz HTTP/1.9", HOST),
        "The port has no digits": get(b"/healthz", host=b"Host: localhost:"),
        "The client offers another protocol": get(
            b"/healthz", b"Connection: Upgrade", b"Upgrade: h2c"
        ),
        "A list has empty elements": get(b"/healthz", b"Connection: , ,x-a,"),
        "The target is of the longest size": get(LONGEST),
        "The head has as many fields as it may": get(b"/healthz", *[b"X-A: 1"] * 99),
        **{f"The query is {it}": get(b"/sync/pull?" + it.encode()) for it in QUERIES},
    },
    # Methods (RFC 9110 §9.1) and content types.
    404: {"The method is unknown": raw(b"BREW / HTTP/1.1", HOST)},
    415: {
        "The content type is in a trailer": raw(
            *(PUSH, HOST, CHUNKED), body=chunked(BODY, trailer=JSON + b"\r\n")
        ),
        **{
            f"The content type is {kind or 'empty'}": raw(
                *(PUSH, HOST, LENGTH, b"Content-Type: " + kind.encode()), body=BODY
            )
            for kind in KINDS
        },
    },
}


HOSTILE_REQUESTS = {
    name: Transcript(one.sent, one.expected, stays_open=False)
    for name, one in hostile.requests(BODY).items()
} | {
    name: Transcript(raw(one.sent + b" HTTP/1.1", HOST), one.expected, stays_open=True)
    for name, one in (hostile.TARGETS | hostile.QUERIES).items()
}


@table(
    "transcript",
    transcripts(CLOSED, stays_open=False)
    | transcripts(LEFT_OPEN, stays_open=True)
    | HOSTILE_REQUESTS,
)
def test_a_request_has_its_status_however_its_bytes_arrive(
    visitor: RawClient, transcript: Transcript
) -> None:
    size = len(transcript.sent)
    check_transcript(visitor, transcript, 2 * size)
    if size < 1000:
        with closing(RawClient(visitor.address)) as other:
            check_transcript(other, transcript, 1)


EXTENDED = b'%x;a=b; c="d e" ;f\r\n' % len(BODY) + BODY + b"\r\n0\r\n"
IN_THREE = chunked(BODY[:5], BODY[5:6], BODY[6:])
PUSHES = {
    "The body has a length": post(LENGTH),
    "The body comes in chunks": coded(b"TRANSFER-encoding:\tChunked ", body=IN_THREE),
    "The chunks have extensions and trailers": coded(
        CHUNKED, body=EXTENDED + b"X-Sum: 1\r\nX-More:\r\n\r\n"
    ),
    "The content type is in upper case": raw(
        *(PUSH, HOST, LENGTH, b"Content-Type: APPLICATION/Json"), body=BODY
    ),
    "The content type names its charset": raw(
        *(PUSH, HOST, LENGTH, JSON + b"; charset=utf-8"), body=BODY
    ),
}
LAST_PUSHES = {
    "HTTP/1.0 is not told to continue": post(LENGTH, CONTINUE, line=POST_1_0)
}


@table(
    "transcript",
    transcripts({200: PUSHES}, stays_open=True)
    | transcripts({200: LAST_PUSHES}, stays_open=False),
)
def test_a_push_is_applied_in_any_pieces(server: Live, transcript: Transcript) -> None:
    for size in (1000, 1):
        check_transcript(server.client(), transcript, size)
    assert len(server.client().pull()["changes"]) == 1


def test_a_body_of_the_largest_size_is_applied(client: RawClient) -> None:
    body = BODY + b" " * (2**20 - len(BODY))
    assert client.request("POST", "/sync/push", body).json[0]["ok"]


def test_a_head_request_behind_an_empty_line_gets_no_body(visitor: RawClient) -> None:
    visitor.send(b"\r")
    with closing(RawClient(visitor.address)) as other:
        # When this is answered, the first byte has arrived.
        assert other.request("GET", "/healthz").status == 200
    visitor.send(b"\n" + raw(b"HEAD /healthz#part HTTP/1.1", HOST))
    assert visitor.read_reply(bodiless=True).status == 400
    assert visitor.ended()


@table(
    "sent",
    {
        "less than the length": post(b"Content-Length: 99"),
        "no last chunk": post(CHUNKED, body=chunked(BODY)[:-5]),
        "no end of the trailers": post(CHUNKED, body=chunked(BODY)[:-2]),
    },
)
def test_half_a_body_is_not_applied(visitor: RawClient, sent: bytes) -> None:
    visitor.send(sent)
    visitor.half_close()
    assert b"200 OK" not in visitor.read_rest()  # an answer of 400 may come


def test_a_client_that_half_closes_still_gets_its_answer(client: RawClient) -> None:
    client.send(post(LENGTH))
    client.half_close()
    assert client.read_reply().json[0]["ok"]
    assert client.ended()


@table(
    "case",
    {
        "a length": (post(LENGTH, b"Expect: 100-Continue", body=b""), BODY),
        "chunks": (post(CHUNKED, b"Expect: 100-continue", body=b""), chunked(BODY)),
    },
)
def test_a_body_is_asked_for_if_the_client_expects_it(
    client: RawClient, case: tuple[bytes, bytes]
) -> None:
    head, body = case
    client.send(head)
    assert client.read_reply() == Reply(100, {}, b"")
    client.send(body)
    assert client.read_reply().json[0]["ok"]


def test_pipelined_requests_are_answered_in_order(client: RawClient) -> None:
    wait = raw(b"GET /sync/pull?scope=other&wait=%f HTTP/1.1" % MOMENT, HOST)
    client.send(wait + post(LENGTH) + get(b"/nowhere") + HEALTHZ)
    assert client.read_reply().json["changes"] == []
    assert client.read_reply().json[0]["ok"]
    assert refused(client.read_reply(), 404)
    assert client.read_reply().json["status"] == "ok"


LONG_HEAD = get(b"/healthz", b"X-A: " + b"a" * 150, *[b"a:"] * 50)
SLOW_HEADS = {
    "a byte": [LONG_HEAD[at : at + 1] for at in range(len(LONG_HEAD))],
    "a line": LONG_HEAD.splitlines(keepends=True),
    "the end of one line, and most of the next": re.split(rb"(?<=\r)", LONG_HEAD),
}


@table("packets", SLOW_HEADS)
def test_a_head_that_comes_in_pieces_is_not_parsed_anew_for_each(
    server: Live, monkeypatch: pytest.MonkeyPatch, packets: list[bytes]
) -> None:
    parse, parsed = mizusync.parse_request, list[int]()

    def counting(buffer: bytearray, settings: Settings) -> Any:
        parsed.append(len(buffer))
        return parse(buffer, settings)

    monkeypatch.setattr(mizusync, "parse_request", counting)
    client = server.client()
    for packet in packets:
        client.send(packet)
        server.call(lambda: None)  # so that it arrives alone
    assert client.read_reply().status == 200
    assert len(parsed) == 2  # at its first byte and at its last


def test_a_head_that_comes_too_slowly_times_out(start: Start) -> None:
    client, started = start(head_timeout=MOMENT).client(), time.monotonic()
    client.send(b"GET /healthz HTTP/1.1\r\nX-A: ")
    while not select.select([client.sock], [], [], MOMENT / 10)[0]:
        assert time.monotonic() < started + PATIENCE
        client.send(b"a")  # each byte in time, the head never
    assert time.monotonic() - started > MOMENT * 0.9
    assert refused(client.read_reply(), 408)


def test_a_body_that_comes_slowly_times_out_and_is_not_applied(start: Start) -> None:
    live = start(body_timeout=MOMENT)
    client = live.client()
    client.send(post(LENGTH, body=BODY[:-1]))
    assert refused(client.read_reply(), 408)
    assert client.ended()
    assert live.client().pull()["changes"] == []


def test_the_deadline_of_a_bad_body_does_not_interrupt_its_answer(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    compress, phases = gzip.compress, list[mizusync.Phase]()

    def watching(*arguments: Any, **options: Any) -> bytes:
        phases.extend(connection.phase for connection in live.server._connections)
        return compress(*arguments, **options)

    monkeypatch.setattr(gzip, "compress", watching)
    live = start(min_gzip_size=0)
    live.client().send(coded(CHUNKED, b"Accept-Encoding: gzip", body=b"zz\r\n"))
    until(lambda: phases)
    assert phases == [mizusync.Phase.HANDLE]


def test_a_connection_without_a_request_times_out(start: Start) -> None:
    live = start(idle_timeout=MOMENT * 2, head_timeout=MOMENT)
    silent, idle = live.client(), live.client()
    assert idle.request("GET", "/healthz").status == 200
    assert idle.ended()
    silent.read_rest()  # an answer of 408 may come before the end


def test_an_empty_line_after_a_body_begins_no_request(start: Start) -> None:
    live = start(idle_timeout=MOMENT * 3, head_timeout=MOMENT)
    client = live.client()
    client.send(post(LENGTH, body=BODY + b"\r\n"))
    assert client.read_reply().status == 200
    client.send(b"\r")
    live.call(lambda: None)  # so that it arrives alone
    client.send(b"\n")
    assert client.ended()  # when its idle time is over, without a 408


HEAD_TARGETS = ["/healthz", "/sync/pull?scope=a", "/sync/snapshot", "/nowhere"]


@pytest.mark.parametrize("target", [*HEAD_TARGETS, "/sync/client.js"])
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
        "client": ("/sync/client.js", {"GET", "HEAD", "OPTIONS"}),
        "healthz": ("/healthz", {"GET", "HEAD", "OPTIONS"}),
    },
)
def test_allow_names_the_methods_of_an_endpoint(
    visitor: RawClient, case: tuple[str, set[str]]
) -> None:
    target, methods = case
    options = visitor.request("OPTIONS", target)
    delete = visitor.request("DELETE", target)
    assert options.status == 204
    assert refused(delete, 405)
    for reply in (options, delete):
        assert set(reply.headers["allow"].replace(" ", "").split(",")) == methods


def test_every_answer_has_a_date_and_no_store(client: RawClient) -> None:
    for target in (*HEAD_TARGETS, "/sync/pull?limit=x"):
        headers = client.request("GET", target).headers
        assert headers["cache-control"] == "no-store"
        assert re.fullmatch(
            r"\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT", headers["date"]
        )
        named = email.utils.parsedate_to_datetime(headers["date"]).timestamp()
        assert abs(time.time() - named) < PATIENCE


def test_no_header_of_an_answer_repeats_the_request(visitor: RawClient) -> None:
    mark = "reflected"
    names = ["Cookie", "Accept", "X-Request-Id", "Access-Control-Request-Headers"]
    fields = dict.fromkeys([*names, "Sec-WebSocket-Protocol"], mark)
    targets = (f"/{mark}", f"/healthz?{mark}=%0d%0a{mark}:", f"/sync/pull?scope={mark}")
    methods = ("GET", "OPTIONS", "DELETE", mark)
    origins: list[dict[str, str]] = [{}, {"Origin": mark}]
    for method, target, origin in itertools.product(methods, targets, origins):
        reply = visitor.request(method, target, headers=fields | origin)
        assert mark not in str(reply.headers).lower()


def response_of(*values: Any, **fields: Any) -> Callable[[Any], Any]:
    return lambda request: mizusync.Response(*values, **fields)


@pytest.mark.parametrize("status", [204, 304])
def test_an_answer_that_may_have_no_content_has_none(start: Start, status: int) -> None:
    client = start(route=response_of(status=status, body=b"content")).client()
    client.send(get(b"/it") + HEALTHZ)
    reply = client.read_reply()  # RFC 9112 §6.3; it also looks for a Content-Length
    assert (reply.status, "date" in reply.headers) == (status, True)
    assert client.read_reply().json["status"] == "ok"


@pytest.mark.parametrize("origins", [[], ["https://app.example"]])
def test_a_compressed_answer_says_how_it_varies(
    start: Start, origins: list[str]
) -> None:
    route = response_of(body=b" " * 20_000, headers={"Cache-Control": "max-age=60"})
    client = start(route=route, allow_origin=origins).client()
    reply = client.request("GET", "/it", headers={"Accept-Encoding": "gzip"})
    varies = ["Origin"] * len(origins) + ["Accept-Encoding"]  # RFC 9110 §12.5.5
    assert reply.headers["content-encoding"] == "gzip"
    assert reply.headers["vary"].split(", ") == varies


GZIP = ["gzip", "br, GZIP ;q=0.5", "gzip;q=1.000, *;q=0", "gzip;q=0.001"]
NO_GZIP = ["", "gzip;q=0", "gzip;q=0.000", "br", "gzipped", "identity"]


def test_large_answers_are_compressed_if_the_client_accepts_it(start: Start) -> None:
    client = start(page=PROGRAM.with_name("demo.html")).client()
    client.push(note("a", "x" * 20_000))
    small = ("/sync/pull?cursor=1", "/healthz")
    large = ("/sync/pull", "/sync/snapshot", "/sync/client.js", "/")
    for target in (*large, *small):
        plain = client.request("GET", target)
        assert "content-encoding" not in plain.headers
        assert (len(plain.body) <= 16 * 1024) == (target in small)
        for codings in GZIP + NO_GZIP:
            accepting = {"Accept-Encoding": codings}
            answer = client.request("GET", target, headers=accepting)
            if codings in NO_GZIP or target in small:
                assert answer.body == plain.body
                assert "content-encoding" not in answer.headers
                continue
            assert answer.headers["content-encoding"] == "gzip"
            assert len(answer.body) < len(plain.body) / 2
            assert gzip.decompress(answer.body) == plain.body
            head = client.request("HEAD", target, headers=accepting)
            assert head.headers["content-length"] == str(len(answer.body))


# -- push, pull, snapshot and healthz


def mutation_with(args: bytes) -> bytes:
    return b'[{"id": "a", "name": "note", "args": %b}]' % args


def push_of(body: bytes) -> bytes:
    return post(b"Content-Length: %d" % len(body), body=body)


@table("one", hostile.JSON)
def test_hostile_json_is_refused_as_a_push_and_as_args_and_the_connection_goes_on(
    visitor: RawClient, one: hostile.Hostile
) -> None:
    for body in (one.sent, mutation_with(one.sent)):
        if len(body) <= 2**20:
            transcript = Transcript(push_of(body), one.expected, stays_open=True)
            check_transcript(visitor, transcript, 2**21)


@table("one", hostile.BODIES)
def test_a_body_that_holds_no_mutation_applies_none_and_the_connection_goes_on(
    visitor: RawClient, one: hostile.Hostile
) -> None:
    if one.expected == 200:
        reply = visitor.request("POST", "/sync/push", one.sent)
        assert reply.status == 200
        assert {result["code"] for result in reply.json} == {"invalid_mutation"}
    else:
        transcript = Transcript(push_of(one.sent), one.expected, stays_open=True)
        check_transcript(visitor, transcript, 2**21)


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
    assert refused(reply := visitor.read_reply(), 400)
    about = r"cursor|limit|transfer-encoding|content-length|http/1\.0"
    assert set(re.findall(about, reply.json["error"].lower())) == named


def test_the_limit_of_values_holds_for_push_message_and_route(start: Start) -> None:
    def echo_json(server: Server) -> None:
        server.route("POST", "/echo")(lambda request: request.json)

    live = start(max_json_values=5, prepare=echo_json)
    client, session = live.client(), live.socket()
    for args, status in (([], 200), ([1, 2], 413)):
        body = json.dumps([note("a", args)]).encode()
        assert client.request("POST", "/sync/push", body).status == status
    session.send_message("chat", [1, 2, 3, 4])
    assert session.read_message()["data"]["code"] == "too_large"
    session.send_message("chat", [1, 2])
    assert session.read_message()["data"]["code"] == "unknown_topic"
    large = b"[0%b]" % (b",0" * 100_000)
    assert refused(client.request("POST", "/echo", large), 413)


def test_a_number_beyond_64_bits_is_pulled_as_a_float(client: RawClient) -> None:
    body = mutation_with(b"[100000000000000000000, -18446744073709551616, 1]")
    (result,) = client.request("POST", "/sync/push", body).json
    assert result["ok"]
    (change,) = client.pull()["changes"]
    assert change["data"] == [1e20, -(2.0**64), 1]


def test_json_values_are_pulled_as_they_were_pushed(client: RawClient) -> None:
    written = [
        b"[" * 62 + b"]" * 62,
        b'"' + b"[{" * 100 + b'"',
        b'"\\"' + b"[" * 100 + b'\\\\"',
        b'"\\ud83d\\ude00 \xf0\x9f\x98\x80"',
        b'"\\u0000"',
        b'"\\u2028\\u2029"',
        b"9007199254740991",
        b"-0.5e-3",
        b'{"a": 1, "a": 2}',
    ]
    mutations = [
        b'{"id": "%d", "name": "note", "args": %b}' % one for one in enumerate(written)
    ]
    results = client.request("POST", "/sync/push", b"[%b]" % b",".join(mutations)).json
    changes = [change for result in results for change in result["changes"]]
    assert fold(changes) == [json.loads(args) for args in written]
    assert client.pull()["changes"] == changes


def test_the_last_of_two_equal_keys_counts(client: RawClient) -> None:
    body = b'[{"id": "a", "id": "b", "name": "note", "args": 1, "args": 2}]'
    assert client.request("POST", "/sync/push", body).json[0]["changes"][0]["data"] == 2
    assert "duplicate" not in client.push(note("a"))[0]
    assert client.push(note("b"))[0]["duplicate"]


def test_a_push_has_one_result_a_mutation_in_order(client: RawClient) -> None:
    refuse = {"id": "b", "name": "refuse", "args": "conflict"}
    results = client.push(note("a", 1), refuse, note("c", 3))
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


def test_the_scope_is_default_if_none_is_named(client: RawClient) -> None:
    assert client.push(note("a"))[0]["changes"][0]["scope"] == "_default"
    assert client.push(note("a", scope="_default"))[0]["duplicate"]
    assert client.pull()["changes"] == client.pull(scope="_default")["changes"] != []


def test_a_mutation_that_apply_refuses_fails_alone(client: RawClient) -> None:
    refusing = [{"id": code, "name": "refuse", "args": code} for code in REFUSALS]
    before, *failed, after = client.push(note("a"), *refusing, note("c"))
    reason = "a reason for people"
    assert failed == [{"ok": False, "code": code, "error": reason} for code in REFUSALS]
    assert (before["ok"], after["ok"]) == (True, True)


def test_an_exception_of_apply_is_an_internal_error_that_shows_nothing(
    server: Live, client: RawClient
) -> None:
    failed, after = client.push({"id": "a", "name": "crash"}, note("b"))
    assert (failed["ok"], failed["code"]) == (False, "internal_error")
    assert after["ok"]
    assert "secret" not in failed["error"]
    server.logged("a secret of the inside")


def test_malformed_mutations_among_good_ones_fail_alone(client: RawClient) -> None:
    bad = [one.sent for one in hostile.MUTATIONS.values()]
    good = [json.dumps(note(key)).encode() for key in ("one", "two")]
    body = b"[%b]" % b",".join([good[0], *bad, good[1]])
    before, *failed, after = client.request("POST", "/sync/push", body).json
    expected = {name: one.expected for name, one in hostile.MUTATIONS.items()}
    codes = [result.get("code") for result in failed]
    assert dict(zip(hostile.MUTATIONS, codes, strict=True)) == expected
    assert {tuple(result) for result in failed} == {("ok", "code", "error")}
    assert (before["ok"], after["ok"]) == (True, True)


def test_unknown_fields_are_ignored(client: RawClient) -> None:
    assert client.push(note("a", client="me", seq=1))[0]["ok"]
    assert len(client.pull(colour="red")["changes"]) == 1


def test_a_push_of_a_hundred_mutations_is_applied(client: RawClient) -> None:
    results = client.push(*(note(f"n{number}") for number in range(100)))
    assert [result["ok"] for result in results] == [True] * 100


def test_a_pull_gives_changes_of_one_scope_above_its_cursor(client: RawClient) -> None:
    one, _, three = client.push(note("a", 1), note("b", 2, scope="other"), note("c", 3))
    page = client.pull()
    assert list(page) == ["changes", "cursor", "epoch", "hasMore"]
    assert page["changes"] == one["changes"] + three["changes"]
    assert (page["cursor"], page["hasMore"]) == (three["cursor"], False)
    later = client.pull(cursor=one["cursor"], epoch=page["epoch"])
    assert later["changes"] == three["changes"]


def test_a_pull_gives_at_most_the_limit_and_has_more(client: RawClient) -> None:
    client.push(*(note(f"n{number}", number) for number in range(5)))
    cursor, found = 0, []
    for more in (True, True, False):
        page = client.pull(cursor=cursor, limit=2)
        assert page["hasMore"] is more
        cursor = page["cursor"]
        found += fold(page["changes"])
    assert found == [0, 1, 2, 3, 4]


def test_a_page_has_100_changes_by_default_and_1000_at_most(client: RawClient) -> None:
    client.push(
        *({"id": f"n{number}", "name": "notes", "args": 20} for number in range(51))
    )
    assert len(client.pull()["changes"]) == 100
    assert len(client.pull(limit=1001)["changes"]) == 1000
    assert client.pull(limit=5000)["hasMore"]


def test_a_push_answers_a_pull_that_waits(server: Live, client: RawClient) -> None:
    client.send(get(b"/sync/pull?wait=60&scope=s"))
    server.client().push(note("a", scope="other"))
    (result,) = server.client().push(note("b", scope="s"))
    assert client.read_reply().json["changes"] == result["changes"]


def test_a_pull_does_not_wait_if_there_are_changes(client: RawClient) -> None:
    client.push(note("a"))
    assert len(client.pull(wait=1000)["changes"]) == 1


def test_a_pull_that_waits_ends_when_its_time_is_over(client: RawClient) -> None:
    started = time.monotonic()
    page = client.pull(wait=MOMENT)
    assert page["changes"] == []
    assert MOMENT * 0.9 < time.monotonic() - started < PATIENCE / 2


def test_a_wait_above_the_limit_is_taken_as_the_limit(start: Start) -> None:
    assert start(max_pull_wait=MOMENT).client().pull(wait=60)["changes"] == []


def test_a_pull_that_waits_ends_when_its_client_resets(server: Live) -> None:
    before = server.tasks()
    client = server.client()
    client.send(get(b"/sync/pull?wait=60"))
    until(lambda: server.tasks() > before)
    client.reset()
    until(lambda: server.tasks() <= before)


def test_an_unknown_epoch_makes_the_cursor_unknown(client: RawClient) -> None:
    (result,) = client.push(note("a"))
    reply = client.request("GET", f"/sync/pull?cursor={result['cursor']}&epoch=another")
    assert refused(reply, 410, code="cursor_unknown")
    assert client.pull(cursor=result["cursor"], epoch="")["changes"] == []


def test_a_cursor_before_a_trim_is_too_old(server: Live, client: RawClient) -> None:
    cursors = [client.push(note(f"n{number}"))[0]["cursor"] for number in range(4)]
    epoch = client.pull()["epoch"]
    assert server.call(server.engine.trim, "_default", cursors[2]) == 2
    for cursor in (0, cursors[0]):
        for more in ("", f"&epoch={epoch}", "&wait=9"):
            reply = client.request("GET", f"/sync/pull?cursor={cursor}{more}")
            assert refused(reply, 410, code="cursor_too_old")
    assert len(client.pull(cursor=cursors[1], epoch=epoch)["changes"]) == 2
    assert client.pull(scope="other")["changes"] == []


def test_a_snapshot_is_the_state_of_its_scope_at_its_cursor(client: RawClient) -> None:
    client.push(
        note("a", 1, scope="s"), note("b", 2, scope="other"), note("c", 3, scope="s")
    )
    taken = client.request("GET", "/sync/snapshot?scope=s").json
    assert list(taken) == ["data", "cursor", "epoch", "database"]
    assert taken["data"] == [1, 3]
    client.push(note("d", 4, scope="s"))
    page = client.pull(scope="s", cursor=taken["cursor"], epoch=taken["epoch"])
    assert fold(page["changes"]) == [4]


def test_without_a_snapshot_function_a_snapshot_is_not_found(start: Start) -> None:
    assert refused(start(snapshot=None).client().request("GET", "/sync/snapshot"), 404)


@pytest.mark.parametrize(
    "error", [RuntimeError, StopIteration, SystemExit, KeyboardInterrupt]
)
def test_an_exception_of_the_snapshot_function_is_an_internal_error_that_shows_nothing(
    start: Start, error: type[BaseException]
) -> None:
    def broken(db: sqlite3.Connection, scope: str) -> Any:
        raise error("a secret of the inside")

    live = start(snapshot=broken)
    client = live.client()
    reply = client.request("GET", "/sync/snapshot")
    assert refused(reply, 500)
    assert b"secret" not in reply.body
    assert client.request("GET", "/healthz").status == 200
    live.logged("a secret of the inside")


CLIENT = "/sync/client.js"


def test_the_client_is_part_one_of_the_page_as_a_module(visitor: RawClient) -> None:
    reply = visitor.request("GET", CLIENT)
    assert reply.status == 200
    assert reply.headers["content-type"] == "text/javascript; charset=utf-8"
    assert reply.headers["cache-control"] == "no-cache"
    assert reply.headers["x-content-type-options"] == "nosniff"
    notice, _, module = reply.body.decode().partition("\n")
    assert notice.startswith(f"// mizusync {mizusync.__version__} ")
    assert "MIT License" in notice
    _, _, text = part_one().partition("\n")  # without its banner
    assert module == text.strip() + "\n"
    assert re.fullmatch(r"export \{ .*SyncClient.* \};", module.splitlines()[-1])
    assert refused(visitor.request("POST", CLIENT, b""), 405)


@table(
    "case",
    {
        "its tag": ("{tag}", 304),
        "its tag, strong": ("{strong}", 304),
        "any": ("*", 304),
        "a list": ('"x", W/"y" ,,{tag}', 304),
        "a list with the strong tag": ('{strong},"x"', 304),
        "behind a tag with a comma": ('"x,y", {tag}', 304),
        "another tag": ('W/"x"', 200),
        "a star between commas in another tag": ('"x,*,y"', 200),
        "a list of others": ('"x", "y"', 200),
        "the beginning of its tag": ('{strong:.9}"', 200),
        "its tag without quotes": ("{bare}", 200),
        "its tag in capital letters": ("{loud}", 200),
        "no tag": ("", 200),
    },
)
def test_if_none_match_spares_a_client_that_is_the_same(
    visitor: RawClient, case: tuple[str, int]
) -> None:
    condition, status = case
    got = visitor.request("GET", CLIENT)
    tag = got.headers["etag"]
    assert re.fullmatch(r'W/"[0-9a-f]{32}"', tag)  # RFC 9110 §8.8.3
    strong = tag.removeprefix("W/")
    forms = {"tag": tag, "strong": strong, "bare": strong[1:-1], "loud": tag.upper()}
    headers = {"If-None-Match": condition.format(**forms)}
    for method in ("GET", "HEAD"):
        reply = visitor.request(method, CLIENT, headers=headers)
        assert reply.status == status
        has_body = (method, status) == ("GET", 200)
        assert reply.body == (got.body if has_body else b"")
        for name in ("etag", "cache-control", "vary"):  # RFC 9110 §15.4.5
            assert reply.headers[name] == got.headers[name]
    assert visitor.request("GET", "/healthz").status == 200


def test_if_none_match_may_be_several_fields(visitor: RawClient) -> None:
    tag = visitor.request("GET", CLIENT).headers["etag"].encode()
    visitor.send(
        get(b"/sync/client.js", b'If-None-Match: "x"', b"If-None-Match: " + tag)
    )
    assert visitor.read_reply().status == 304


@pytest.mark.parametrize("origins", [[], ["https://app.example"]])
def test_the_client_has_one_tag_whether_it_is_compressed_or_not(
    start: Start, origins: list[str]
) -> None:
    client = start(allow_origin=origins).client()
    plain = client.request("GET", CLIENT)
    packed = client.request("GET", CLIENT, headers={"Accept-Encoding": "gzip"})
    assert packed.headers["content-encoding"] == "gzip"
    assert gzip.decompress(packed.body) == plain.body
    known = {"Accept-Encoding": "gzip", "If-None-Match": plain.headers["etag"]}
    same = client.request("GET", CLIENT, headers=known)
    assert same.status == 304
    assert "content-encoding" not in same.headers
    varies = ["Accept-Encoding"] + ["Origin"] * len(origins)
    for reply in (plain, packed, same):
        assert reply.headers["etag"] == plain.headers["etag"]
        assert reply.headers["vary"].split(", ") == varies


def test_healthz_has_its_five_fields_in_order(server: Live, client: RawClient) -> None:
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


def test_a_push_above_max_pending_pushes_is_unavailable(start: Start) -> None:
    entered, release = threading.Event(), threading.Event()
    live = start(max_pending_pushes=1, apply=stalled(entered, release))
    clients = [live.client() for _ in range(4)]
    try:
        for number, client in enumerate(clients):
            client.send(push_of(json.dumps([note(f"n{number}")]).encode()))
            assert entered.wait(PATIENCE)
        assert refused(clients[-1].read_reply(), 503)
    finally:
        release.set()
    assert clients[0].read_reply().json[0]["ok"]
    assert "n3" not in fold(live.client().pull()["changes"])


def test_a_deleted_database_is_unavailable(start: Start, tmp_path: Path) -> None:
    client = start(may_log=".").client()
    client.push(note("a"))
    for file in tmp_path.glob("log.db*"):
        file.unlink()
    until(lambda: client.request("POST", "/sync/push", BODY).status == 503)
    assert refused(client.request("POST", "/sync/push", BODY), 503)
    assert refused(client.request("GET", "/healthz"), 503)


# --- WebSocket ------------------------------------------------------------------------
# RFC 6455 §4 to §8: the parser alone, then the handshake, then transcripts of frames,
# among them the cases of the Autobahn test suite (its numbers stand beside them).

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
    """Parse the frames in these bytes; the code of an error comes last."""
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
def test_frames_are_parsed_the_same_however_their_bytes_arrive(
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
def test_spoiled_frames_are_frames_or_an_error_however_their_bytes_arrive(
    sent: list[Frame], spoilt: list[tuple[int, int]], cuts: list[int]
) -> None:
    data = bytearray(b"".join(masked(*frame) for frame in sent))
    for at, byte in spoilt:
        data[at % len(data)] = byte
    found = read_frames(pieces(bytes(data), cuts), max_payload=300)
    assert found == read_frames([bytes(data)], max_payload=300)
    assert not found or isinstance(found[-1], Frame) or found[-1] in (1002, 1009)


@pytest.mark.parametrize("size", [0, 125, 126, 65535, 65536])
def test_frames_of_the_server_have_no_mask_and_the_shortest_length(size: int) -> None:
    sent = bytearray(mizusync.encode_frame(BINARY, b"x" * size))
    assert take_frame(sent) == Frame(BINARY, b"x" * size)
    assert not sent


def test_empty_fragments_take_no_memory() -> None:
    assembler, nothing = mizusync.Assembler(1000), mizusync.Frame(0, b"", fin=False)
    assembler.add(mizusync.Frame(TEXT, b"", fin=False))
    tracemalloc.start()
    try:
        for _ in range(20_000):
            assert assembler.add(nothing) is None
        # A list of them would take twice that.
        assert tracemalloc.get_traced_memory()[0] < 80_000
    finally:
        tracemalloc.stop()


# -- the handshake


def test_the_handshake_answers_the_key(client: RawClient) -> None:
    reply = client.upgrade()
    assert reply.status == 101
    assert reply.headers["upgrade"].lower() == "websocket"
    assert reply.headers["connection"].lower() == "upgrade"
    assert reply.headers["sec-websocket-accept"] == ACCEPT
    absent = {"sec-websocket-extensions", "content-length", "transfer-encoding"}
    assert not absent & set(reply.headers)


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
def test_a_good_handshake_is_accepted_without_an_extension(
    visitor: RawClient, fields: dict[str, str]
) -> None:
    port = visitor.address[1]
    headers = {name: value.format(port=port) for name, value in fields.items()}
    reply = visitor.upgrade(headers=headers)
    assert (reply.status, reply.headers.get("sec-websocket-extensions")) == (101, None)
    assert visitor.quiet()


@table("one", hostile.HANDSHAKES)
def test_a_handshake_that_breaks_a_rule_is_refused_with_its_status(
    visitor: RawClient, one: hostile.Hostile
) -> None:
    for size in (len(one.sent), 1):
        with closing(RawClient(visitor.address)) as client:
            for at in range(0, len(one.sent), size):
                client.send(one.sent[at : at + size])
            reply = client.read_reply()
            assert refused(reply, int(one.expected))
            if reply.status == 426:
                assert reply.headers["upgrade"].lower() == "websocket"
                assert "upgrade" in reply.headers["connection"].lower()  # RFC 9110 §7.8
                assert reply.headers["sec-websocket-version"] == "13"  # RFC 6455 §4.4


@pytest.mark.parametrize(
    ("offer", "answer"),
    [
        ("chat", None),
        ("MIZUSYNC", None),
        ("chat, mizusync", "mizusync"),
        (",mizusync,", "mizusync"),
    ],
)
def test_the_subprotocol_is_one_that_the_client_offered(
    visitor: RawClient, offer: str, answer: str | None
) -> None:
    reply = visitor.upgrade(headers={"Sec-WebSocket-Protocol": offer})
    # RFC 6455 §4.2.2
    assert (reply.status, reply.headers.get("sec-websocket-protocol")) == (101, answer)


def test_bytes_behind_the_handshake_belong_to_the_websocket(client: RawClient) -> None:
    subscribe = masked(TEXT, b'{"topic": "subscribe", "data": {}}')
    client.send(get(b"/ws", KEY, *UPGRADE) + subscribe + masked(PING, b"!"))
    assert client.read_reply().status == 101
    frames = {
        frame.opcode: frame.payload
        for frame in (client.read_frame(), client.read_frame())
    }
    assert frames[PONG] == b"!"
    assert json.loads(frames[TEXT])["topic"] == "sync:_default"


# -- frames


class Dialogue(NamedTuple):
    """What a client sends, the frames that come back, and how the connection ends."""

    sent: bytes
    frames: list[Frame]
    close: bytes | None = None  # how the payload of the server's close frame begins
    is_answer: bool = False  # to a close frame of the client


def goes_on(*sent: bytes, back: Iterable[Frame] = ()) -> Dialogue:
    """After these frames the connection stays open."""
    return Dialogue(b"".join(sent), list(back))


def ends(code: int, *sent: bytes, back: Iterable[Frame] = ()) -> Dialogue:
    """After these frames the server closes with this code."""
    return Dialogue(b"".join(sent), list(back), code.to_bytes(2, "big"))


def answers(code: int, *sent: bytes, back: Iterable[Frame] = ()) -> Dialogue:
    """After these frames the server answers the client's close with its own code."""
    return Dialogue(b"".join(sent), list(back), code.to_bytes(2, "big"), is_answer=True)


def text(payload: bytes, fin: bool = True) -> bytes:
    return masked(TEXT, payload, fin)


def more(payload: bytes, fin: bool = False) -> bytes:
    """Return the bytes of a continuation frame."""
    return masked(0, payload, fin)


def ping(payload: bytes = b"ping", fin: bool = True) -> bytes:
    return masked(PING, payload, fin)


def goodbye(code: int, reason: bytes = b"") -> bytes:
    """Return the bytes of a client's close frame."""
    return masked(CLOSE, code.to_bytes(2, "big") + reason)


def fragmented(opcode: int, payload: bytes, size: int) -> bytes:
    """Return a message in frames of `size` bytes."""
    parts = [payload[at : at + size] for at in range(0, len(payload), size)]
    first, *others = [
        (part, number == len(parts)) for number, part in enumerate(parts, 1)
    ]
    return masked(opcode, *first) + b"".join(more(*other) for other in others)


def check_dialogue(address: tuple[str, int], target: str, dialogue: Dialogue) -> None:
    """Play the dialogue with all bytes at once, and once more with few at a time."""
    sent, frames, close, is_answer = dialogue
    few = 1 if len(sent) < 1000 else 997
    for step in (few, len(sent)):
        with closing(RawClient(address)) as client:
            assert client.upgrade(target).status == 101
            for start in range(0, len(sent), step):
                client.send(sent[start : start + step])
            assert [client.read_frame() for _ in frames] == frames
            if close is None:
                assert client.quiet()
                continue
            opcode, payload, _ = client.read_frame()
            assert (opcode, payload[:2]) == (CLOSE, close)
            payload[2:].decode()
            if not is_answer:
                client.send_frame(CLOSE, payload)
            assert client.ended()  # no pong and no echo after the close (§5.5.1)


HELLO = Frame(TEXT, b"hello")
PONGED = Frame(PONG, b"ping")
GOOD = text(b"hello")
GREEK = "\u03ba\u1f79\u03c3\u03bc\u03b5".encode()
MIB = 2**20

SIZES = (0, 125, 126, 127, 128, 65535, 65536)
ECHOES = {
    # 1.* and 9.*: messages of every size that is encoded differently, and large ones
    **{
        f"{kind} message of {size:,} bytes is echoed": goes_on(
            masked(opcode, b"*" * size), back=[Frame(opcode, b"*" * size)]
        )
        for kind, opcode in (("A text", TEXT), ("A binary", BINARY))
        for size in (*SIZES, MIB // 4, MIB)
    },
    "A binary message of any bytes is echoed": goes_on(
        masked(BINARY, bytes(range(256)) * 400),
        back=[Frame(BINARY, bytes(range(256)) * 400)],
    ),
    # 9.3, 9.4 and 10.1: in fragments
    **{
        f"A message of {size:,} bytes in frames of {part:,} is echoed": goes_on(
            fragmented(opcode, b"*" * size, part), back=[Frame(opcode, b"*" * size)]
        )
        for opcode, size, part in (
            (TEXT, 2**16, 1300),
            (TEXT, MIB, 4096),
            (BINARY, MIB, 2**16),
            (BINARY, 2**14, 64),
        )
    },
    # 2.*: pings and pongs
    "An empty ping is answered": goes_on(ping(b""), back=[Frame(PONG, b"")]),
    "A ping of text is answered": goes_on(ping(), back=[PONGED]),
    "A ping of any bytes is answered": goes_on(
        ping(bytes(range(125))), back=[Frame(PONG, bytes(range(125)))]
    ),
    "A pong is not answered": goes_on(masked(PONG, b""), masked(PONG, b"unasked")),
    "A pong before a ping is not answered": goes_on(
        masked(PONG, b"unasked"), ping(), back=[PONGED]
    ),
    "Ten pings are answered in order": goes_on(
        *(ping(b"%d" % number) for number in range(10)),
        back=[Frame(PONG, b"%d" % number) for number in range(10)],
    ),
    # 5.*: fragments, with control frames in between
    "A text in two fragments is echoed": goes_on(
        text(b"hel", False), more(b"lo", True), back=[HELLO]
    ),
    "A ping between two fragments is answered first": goes_on(
        text(b"hel", False), ping(), more(b"lo", True), back=[PONGED, HELLO]
    ),
    "Pings and pongs between fragments do not disturb them": goes_on(
        text(b"h", False),
        more(b"e"),
        ping(),
        more(b"l"),
        masked(PONG, b"unasked"),
        more(b"l"),
        ping(),
        more(b"o", True),
        GOOD,
        back=[PONGED, PONGED, HELLO, HELLO],
    ),
    "Empty fragments around a text do not disturb it": goes_on(
        text(b"", False), more(b"hello"), more(b"", True), back=[HELLO]
    ),
    # 6.*: UTF-8
    "Three empty fragments are an empty text": goes_on(
        text(b"", False), more(b""), more(b"", True), back=[Frame(TEXT, b"")]
    ),
    "A text is echoed though each byte has a frame": goes_on(
        fragmented(TEXT, GREEK, 1), back=[Frame(TEXT, GREEK)]
    ),
    **{
        f"A text with U+{point:04X} is echoed": goes_on(
            text(chr(point).encode()), back=[Frame(TEXT, chr(point).encode())]
        )
        for point in (
            *(0, 0x7F, 0x80, 0x7FF, 0x800, 0xD7FF, 0xE000, 0xFFFD, 0xFFFE, 0xFFFF),
            *(0x10000, 0x1FFFE, 0x1FFFF, 0x10FFFE, 0x10FFFF),
        )
    },
}

# Behind each stands a ping, which nothing may answer.
HOSTILE_FRAMES = {
    name: ends(int(one.expected), one.sent, ping())
    for name, one in hostile.FRAMES.items()
}
BINARY_MESSAGES = {  # only a session refuses them
    name: HOSTILE_FRAMES.pop(name)
    for name, one in hostile.FRAMES.items()
    if one.expected == 1003
}
CLOSES = {
    **HOSTILE_FRAMES,
    # The text is refused as soon as it is wrong (6.4.*): its last frame does not come.
    **{
        f"A text has {name}": ends(1007, text(GREEK + one.sent + b"edited"), ping())
        for name, one in hostile.NOT_UTF_8.items()
    },
    **{
        f"A fragment has {name}": ends(
            1007, text(GREEK, False), more(one.sent + b"edited"), ping()
        )
        for name, one in hostile.NOT_UTF_8.items()
    },
    # Limits
    "A text is above the limit": ends(1009, text(b" " * (MIB + 1))),
    "A text is far above the limit": ends(1009, text(b" " * (8 * MIB))),
    # 7.*: the client closes
    **{
        f"A close with the code {code} is answered": answers(code, goodbye(code, GREEK))
        for code in (
            *(1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 1014),
            *(3000, 3999, 4000, 4999),
        )
    },
    "A close without a code is answered": Dialogue(
        masked(CLOSE, b""), [], b"", is_answer=True
    ),
    "A close with the longest reason is answered": answers(
        1000, goodbye(1000, b"x" * 123)
    ),
    "A second close is not answered": answers(1000, goodbye(1000), goodbye(1000)),
    "A ping after a close is not answered": answers(1000, goodbye(1000), ping()),
    "A message after a close is not answered": answers(1000, goodbye(1000), GOOD),
    "A close ends a message in fragments": answers(
        1000, text(b"hel", False), goodbye(1000), more(b"lo", True)
    ),
}
# The same after a message, which is echoed before the close.
CLOSES_OF_ECHO = {
    "A close after a message": answers(1000, GOOD, goodbye(1000), back=[HELLO]),
    "A close after a large message": answers(
        1000,
        masked(BINARY, b"*" * (MIB // 4)),
        goodbye(1000),
        ping(),
        back=[Frame(BINARY, b"*" * (MIB // 4))],
    ),
    "Reserved bits after a message": ends(
        1002, GOOD, masked(0x20 | TEXT, b"hi"), ping(), back=[HELLO]
    ),
    "A reserved opcode after a message": ends(
        1002, GOOD, masked(5, b"hi"), ping(), back=[HELLO]
    ),
    "A continuation after a message in fragments": ends(
        1002, text(b"hel", False), more(b"lo", True), more(b"hi"), GOOD, back=[HELLO]
    ),
    "Bad UTF-8 after a message": ends(1007, GOOD, text(b"\xff"), back=[HELLO]),
}


@table("dialogue", ECHOES | CLOSES_OF_ECHO)
def test_a_raw_websocket_echoes_messages_and_answers_control_frames(
    visitor: RawClient, dialogue: Dialogue
) -> None:
    check_dialogue(visitor.address, "/echo", dialogue)


@table("dialogue", CLOSES)
def test_a_websocket_closes_with_the_code_of_the_fault(
    visitor: RawClient, dialogue: Dialogue
) -> None:
    for target in ("/ws", "/echo"):
        check_dialogue(visitor.address, target, dialogue)


@table("dialogue", BINARY_MESSAGES)
def test_a_binary_message_closes_a_session_with_1003(
    visitor: RawClient, dialogue: Dialogue
) -> None:
    check_dialogue(visitor.address, "/ws", dialogue)


def test_a_message_may_come_in_fragments_between_pings(server: Live) -> None:
    client = server.socket()
    message = '{"topic": "subscribe", "data": {"scope": "\u00e9"}}'.encode()
    first, *others = pieces(message, range(1, len(message)))  # also inside the é
    client.send_frame(TEXT, first, fin=False)
    for piece in others:
        client.send_frame(0, piece, fin=False)
        client.send_frame(PING, piece)
        assert client.read_frame() == Frame(PONG, piece)
    client.send_frame(0, b"", fin=True)
    assert client.read_message()["topic"] == "sync:\u00e9"


@table(
    "dialogue",
    {
        "a binary message": ends(1003, masked(BINARY, b"")),
        "a broken frame": ends(1002, masked(3, b""), ping(b"x"), text(b"{}")),
        "a close inside a message": answers(1000, text(b"{", False), goodbye(1000)),
    },
)
def test_after_a_close_comes_no_hint_or_pong(server: Live, dialogue: Dialogue) -> None:
    client = server.socket()
    client.subscribe()
    client.send(dialogue.sent)
    frame = client.read_frame()
    assert (frame.opcode, frame.payload[:2]) == (CLOSE, dialogue.close)
    server.client().push(note("a"))
    client.send(ping(b"x") + goodbye(1000))
    assert client.ended()  # RFC 6455 §5.5.1, §7.1.7


def test_a_client_that_answers_no_close_is_disconnected_in_time(start: Start) -> None:
    client = start(close_timeout=MOMENT).socket()
    client.send_frame(BINARY, b"")
    assert client.read_frame().payload[:2] == b"\x03\xeb"
    assert client.ended()


def test_a_client_that_answers_pings_stays_connected(start: Start) -> None:
    client = start(ping_interval=MOMENT / 4, ping_timeout=MOMENT * 2).socket()
    started = time.monotonic()
    while time.monotonic() < started + MOMENT * 4:
        frame = client.read_frame()
        assert frame.opcode == PING
        client.send_frame(PONG, frame.payload)
    client.send_message("subscribe", {})
    assert client.read_message()["data"] == {"cursor": 0}


def test_a_client_that_answers_no_ping_is_disconnected(start: Start) -> None:
    live = start(ping_interval=MOMENT / 3, ping_timeout=MOMENT)
    client = live.socket()
    assert client.read_frame().opcode == PING
    until(lambda: live.client().request("GET", "/healthz").json["sessions"] == 0)
    with suppress(ConnectionResetError):
        client.read_rest()


def test_a_client_that_reads_no_pongs_is_no_longer_read_from(start: Start) -> None:
    live = start(send_buffer=4096)
    client = live.socket(receive_buffer=4096)
    client.send(masked(PING, b"x" * 125) * 2000)
    for _ in range(2000):  # turns in which the server could answer
        live.call(lambda: None)
    (connection,) = live.server._connections
    assert connection.unsent_size < 1000


REFUSED_MESSAGES = {
    "no message": b"x",
    "an unknown topic": b'{"topic": "x"}',
    "a forbidden scope": b'{"topic": "subscribe", "data": {"scope": "closed"}}',
    "one topic too many": b'{"topic": "subscribe", "data": {"scope": "s"}}',
}


@table("message", REFUSED_MESSAGES)
def test_a_client_that_reads_no_errors_is_no_longer_read_from(
    start: Start, message: bytes
) -> None:
    small = {"send_buffer": 4096, "max_session_queue": 4096, "max_session_topics": 1}
    live = start(on_auth=lambda request, scope: scope != "closed", **small)
    client = live.socket(receive_buffer=4096)
    client.subscribe()
    client.send(text(message) * 800)
    for _ in range(500):  # turns in which the server could answer
        live.call(lambda: None)
    assert live.server.stats()["unsent_bytes"] < 1000
    for _ in range(800):  # once it reads, it gets them all, and is not cut off
        assert client.read_message()["topic"] == "error"


def close(session: mizusync.Session, topic: str, data: Any) -> None:
    session.close(*data)


def test_a_long_close_reason_is_cut_between_characters(start: Start) -> None:
    client = start(on_message=close).socket()
    client.send_message("close", [4000, "\u00e9" * 200])
    # RFC 6455 §5.5
    assert client.read_frame() == Frame(CLOSE, b"\x0f\xa0" + b"\xc3\xa9" * 61)


def test_a_forbidden_close_code_is_an_error_of_the_application(start: Start) -> None:
    live = start(on_message=close)
    client = live.socket()
    for code in (0, 999, 1004, 1006, 1015, 2000, 5000, 70000):
        client.send_message("close", [code, ""])
        live.logged("Traceback")  # RFC 6455 §7.4
        assert client.quiet()


# --- Live -----------------------------------------------------------------------------
# A session gets hints, never late, never going down; an application adds topics and raw
# WebSocket endpoints of its own.


def hint_of(scope: str, cursor: int) -> dict[str, Any]:
    return {"topic": f"sync:{scope}", "data": {"cursor": cursor}}


def test_subscribe_answers_the_current_cursor_at_once(server: Live) -> None:
    (result,) = server.client().push(note("a", scope="s"))
    server.client().push(note("b", scope="other"))
    client = server.socket("/ws?scope=s")
    assert client.subscribe() == hint_of("s", result["cursor"])


def test_the_current_cursor_is_0_before_the_first_change(server: Live) -> None:
    server.client().push(note("b", scope="other"))
    assert server.socket().subscribe() == hint_of(DEFAULT, 0)


def test_a_trim_does_not_lower_the_current_cursor(server: Live) -> None:
    (result,) = server.client().push(note("a"))
    server.call(server.engine.trim, "_default", result["cursor"] + 1)
    assert server.socket().subscribe()["data"] == {"cursor": result["cursor"]}


def test_a_push_is_hinted_and_a_pull_sees_it(server: Live) -> None:
    client = server.socket("/ws?scope=caf%C3%A9")
    client.subscribe()
    (result,) = server.client().push(note("a", scope="caf\u00e9"))
    assert client.read_message() == hint_of("caf\u00e9", result["cursor"])
    assert server.client().pull(scope="caf\u00e9")["changes"] == result["changes"]


def test_a_session_may_subscribe_to_another_scope(server: Live) -> None:
    client = server.socket("/ws?scope=one")
    assert client.subscribe(scope="two")["topic"] == "sync:two"
    server.client().push(note("a", scope="one"))
    (result,) = server.client().push(note("b", scope="two"))
    assert client.read_message() == hint_of("two", result["cursor"])


def test_a_change_in_another_scope_is_hinted_there(server: Live) -> None:
    client = server.socket()
    client.subscribe(scope="two")
    share = {"id": "a", "name": "share", "args": ["one", "two", "one"]}
    (result,) = server.client().push(share)
    assert client.read_message()["data"] == {"cursor": result["cursor"] - 1}


def test_a_session_that_unsubscribed_gets_no_more_hints(server: Live) -> None:
    client, witness = server.socket(), server.socket()
    for one in (client, witness):
        one.subscribe()
        one.subscribe(scope="two")
    client.send_message("unsubscribe", {})
    client.send_message("unsubscribe", {"scope": "two"})
    assert client.quiet()
    server.client().push(note("a"), note("b", scope="two"))
    topics = {witness.read_message()["topic"] for _ in range(2)}
    assert topics == {"sync:_default", "sync:two"}
    assert client.quiet()


def test_a_session_that_did_not_subscribe_gets_no_hint(server: Live) -> None:
    client, witness = server.socket(), server.socket()
    witness.subscribe()
    server.client().push(note("a"))
    witness.read_message()
    assert client.quiet()


def test_hints_carry_the_changes_to_a_session_that_asked_for_them(server: Live) -> None:
    plain, client = server.socket(), server.socket()
    plain.subscribe()
    assert client.subscribe(changes=True)["data"]["cursor"] == 0
    (result,) = server.client().push(note("a", {"x": "\u00e9"}))
    hint = client.read_message()
    assert list(hint) == ["topic", "data"]
    assert list(hint["data"]) == ["cursor", "epoch", "after", "changes"]
    assert hint["data"]["changes"] == result["changes"]
    assert hint["data"]["cursor"] == result["cursor"] > hint["data"]["after"] >= 0
    assert hint["data"]["epoch"] == server.client().pull()["epoch"]
    assert plain.read_message()["data"] == {"cursor": result["cursor"]}


def test_hints_with_changes_and_pulls_give_the_whole_log(server: Live) -> None:
    client, pusher = server.socket(), server.client()
    cursor, found, epoch = 0, list[Any](), server.client().pull()["epoch"]
    client.subscribe(changes=True)
    for number in range(60):
        (result,) = pusher.push({"id": str(number), "name": "notes", "args": number})
    while cursor < result["cursor"]:
        hint = client.read_message()["data"]
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
def test_a_large_hint_comes_without_changes(server: Live, args: dict[str, Any]) -> None:
    client = server.socket()
    client.subscribe(changes=True)
    (result,) = server.client().push(note("a") | args)
    assert client.read_message()["data"] == {"cursor": result["cursor"]}


def test_the_last_subscribe_decides_whether_hints_carry_changes(server: Live) -> None:
    client = server.socket()
    client.subscribe(changes=True)
    client.subscribe(changes=False)
    (result,) = server.client().push(note("a"))
    assert client.read_message()["data"] == {"cursor": result["cursor"]}
    client.subscribe(changes=True)
    server.client().push(note("b"))
    assert "changes" in client.read_message()["data"]


def test_cursors_of_a_topic_never_go_down(server: Live) -> None:
    client, pusher = server.socket(), server.client()
    cursors = [client.subscribe()["data"]["cursor"]]
    for number in range(50):
        (result,) = pusher.push(note(str(number)))
        client.send_message("subscribe", {"changes": number % 2 == 0})
    while cursors[-1] < result["cursor"]:
        cursors.append(client.read_message()["data"]["cursor"])
    assert cursors == sorted(cursors)


def test_a_commit_of_another_process_is_hinted(server: Live, tmp_path: Path) -> None:
    session, waiting = server.socket(), server.client()
    session.subscribe()
    waiting.send(get(b"/sync/pull?wait=60"))
    with closing(Engine(tmp_path / "log.db", apply=apply, schema=SCHEMA)) as other:
        (result,) = other.submit([Mutation("a", "note", 7)]).result(PATIENCE)
    assert session.read_message()["data"]["cursor"] == result.cursor
    assert waiting.read_reply().json["changes"][0]["data"] == 7


def test_the_newest_cursor_is_sent_again_after_silence(start: Start) -> None:
    live = start(heartbeat=MOMENT)
    (result,) = live.client().push(note("a"))
    client, started = live.socket(), time.monotonic()
    hint = client.subscribe()
    assert client.read_message() == client.read_message() == hint
    assert hint["data"] == {"cursor": result["cursor"]}
    assert time.monotonic() - started > MOMENT * 1.5


def test_a_session_that_reads_slowly_gets_the_newest_cursor(start: Start) -> None:
    live = start(send_buffer=4096, heartbeat=600.0)  # which would heal a lost hint
    client, pusher = live.socket(receive_buffer=4096), live.client()
    client.subscribe(changes=True)
    for number in range(100):
        (result,) = pusher.push(note(str(number), "x" * 12_000))
    size, cursor = 0, 0
    while cursor < result["cursor"]:
        hint = client.read_message()["data"]
        size, cursor = size + len(json.dumps(hint)), hint["cursor"]
    assert size < 600_000  # of 1,200,000: hints that it did not read were merged
    (result,) = pusher.push(note("after"))
    assert client.read_message()["data"]["cursor"] == result["cursor"]


def subscribers(live: Live) -> int:
    """Push, and return how many subscribers of the default scope got a hint."""
    witness, before = live.socket(), live.server.stats()["hints_sent"]
    witness.subscribe()
    live.client().push(note(f"{uuid.uuid4()}"))
    witness.read_message()
    until(lambda: live.server.stats()["hints_sent"] > before)
    return int(live.server.stats()["hints_sent"] - before - 1)


def joined(
    start: Start, **options: Any
) -> tuple[Live, Callable[[RawClient], mizusync.Session]]:
    """Start a server, and return it with a way to subscribe a client to "news"."""
    came: list[mizusync.Session] = []

    def on_message(session: mizusync.Session, topic: str, data: Any) -> None:
        came.append(session)

    live = start(on_message=on_message, **options)

    def join(client: RawClient) -> mizusync.Session:
        number = len(came)
        client.send_message("join")
        until(lambda: len(came) > number)
        live.call(live.server.subscribe, came[-1], "news")
        return came[-1]

    return live, join


def test_a_topic_of_the_application_reaches_its_subscribers_alone(start: Start) -> None:
    live, join = joined(start)
    member, guest = live.socket(), live.socket()
    session = join(member)
    live.call(live.server.publish, "news", {"n": [1, "\u00e9"]})
    assert member.read_message() == {"topic": "news", "data": {"n": [1, "\u00e9"]}}
    live.call(live.server.unsubscribe, session, "news")
    live.call(live.server.publish, "news", 2)
    assert member.quiet()
    assert guest.quiet()


def test_a_session_too_slow_for_published_messages_is_closed(start: Start) -> None:
    live, join = joined(
        start, send_buffer=4096, max_session_queue=2**15, close_timeout=PATIENCE
    )
    slow, quick = live.socket(receive_buffer=4096), live.socket()
    join(slow)
    join(quick)
    for number in range(500):
        live.call(live.server.publish, "news", [number, "x" * 2000])
        assert quick.read_message()["data"][0] == number
    assert slow.read_close() == 1013
    until(lambda: live.client().request("GET", "/healthz").json["sessions"] == 1)


def test_a_session_that_has_ended_cannot_be_subscribed(start: Start) -> None:
    ended = list[mizusync.Session]()
    live = start(on_close=lambda session, error: ended.append(session))
    live.socket().close()
    until(lambda: ended)
    live.call(live.server.subscribe, ended[0], "news")
    assert ended[0].topics == {}
    key = ended.pop().id

    def kept() -> bool:
        gc.collect()
        objects = gc.get_objects()
        return any(isinstance(o, mizusync.Session) and o.id == key for o in objects)

    until(lambda: not kept())  # no topic holds it


def test_restoring_an_older_copy_closes_sessions(start: Start, tmp_path: Path) -> None:
    live = start(may_log="walresetbug")
    client, older = live.client(), live.socket()
    client.push(note("a"))
    backup = back_up(tmp_path / "log.db")
    client.push(note("b"), note("c"))
    late = client.pull()
    assert older.subscribe()["data"] == {"cursor": 3}
    restore(tmp_path / "log.db", backup)
    # The close is 1001, and the client does not answer it.
    assert older.read_frame().payload[:2] == b"\x03\xe9"
    session = live.socket()
    assert session.subscribe()["data"] == {"cursor": 1}
    query = f"cursor={late['cursor']}&epoch={late['epoch']}"
    for key in ("d", "e", "f"):  # past the old cursor
        reply = client.request("GET", f"/sync/pull?{query}")
        assert refused(reply, 410, code="cursor_unknown")
        (result,) = client.push(note(key))
        assert session.read_message()["data"] == {"cursor": result["cursor"]}


def test_heartbeats_go_on_if_another_subscriber_fails(start: Start) -> None:
    class Broken(Recorder):
        def hint(self, topic: str, cursor: int, message: bytes) -> None:
            self.messages.append(topic)
            if len(self.messages) > 2:
                for name in ("sync:a", "sync:b"):
                    live.server.hub.unsubscribe(name, self)
                raise ConnectionError("gone")

    broken = Broken()

    def subscribe() -> None:
        for name in ("sync:a", "sync:b"):
            live.server.hub.subscribe(name, broken)
            live.server.hub.send_current(name, broken, 1)

    live = start(heartbeat=MOMENT)
    live.call(subscribe)
    until(lambda: len(broken.messages) > 2)
    live.logged("gone")
    client = live.socket()
    assert client.subscribe() == client.read_message() == client.read_message()


def test_a_subscribe_whose_on_auth_fails_ends_the_session_at_once(
    start: Start,
) -> None:
    def on_auth(request: mizusync.Request, scope: str) -> None:
        if scope == "broken":
            raise RuntimeError("no database of users")

    live = start(on_auth=on_auth)
    client = live.socket()
    client.send_message("subscribe", {"scope": "broken"})
    assert client.read_close() == 1011
    live.logged("no database of users")


def test_messages_that_have_arrived_are_handled_after_their_client_left(
    start: Start,
) -> None:
    handled: list[Any] = []

    async def on_message(session: mizusync.Session, topic: str, data: Any) -> None:
        await asyncio.sleep(3 * MOMENT)
        handled.append(data)

    def on_close(session: mizusync.Session, error: Exception | None) -> None:
        handled.append("closed")

    live = start(on_message=on_message, on_close=on_close, close_timeout=MOMENT)
    client = live.socket()
    for number in range(3):
        client.send_message("slow", number)
    client.close()
    until(lambda: "closed" in handled)
    assert handled == [0, 1, 2, "closed"]


def test_the_application_cannot_publish_to_the_topic_of_a_scope(server: Live) -> None:
    with pytest.raises(ValueError, match="sync:"):
        server.call(server.server.publish, "sync:_default", {"cursor": 7})


def test_topics_of_scopes_never_reach_the_application(start: Start) -> None:
    live, join = joined(start)
    client = live.socket()
    client.send_message("sync:_default", {"cursor": 1})
    assert client.read_message()["data"]["code"] == "unknown_topic"
    join(client)  # it would find the other message first


@table("one", hostile.MESSAGES)
def test_a_message_that_can_not_be_served_is_answered_and_the_session_goes_on(
    visitor: RawClient, one: hostile.Hostile
) -> None:
    assert visitor.upgrade().status == 101
    sent = masked(TEXT, one.sent)
    for size in (len(sent), 1) if len(sent) < 1000 else (len(sent),):
        for at in range(0, len(sent), size):
            visitor.send(sent[at : at + size])
        answer = visitor.read_message()
        assert list(answer) == ["topic", "data"]
        assert list(answer["data"]) == ["code", "error"]
        assert (answer["topic"], answer["data"]["code"]) == ("error", one.expected)
        assert isinstance(answer["data"]["error"], str)
    assert visitor.subscribe() == {"topic": "sync:_default", "data": {"cursor": 0}}


def test_unknown_fields_of_a_message_are_ignored(server: Live) -> None:
    client = server.socket()
    client.send_frame(TEXT, b'{"ref": 1, "topic": "subscribe", "data": {"since": 3}}')
    assert client.read_message()["topic"] == "sync:_default"


def test_more_topics_than_a_session_may_have_are_too_large(start: Start) -> None:
    live = start(max_session_topics=2)
    client = live.socket()
    assert client.subscribe()["topic"] == "sync:_default"
    assert client.subscribe(scope="two")["topic"] == "sync:two"
    assert client.subscribe(scope="three")["data"]["code"] == "too_large"
    assert client.subscribe(scope="two")["topic"] == "sync:two"  # one that it has
    client.send_message("unsubscribe", {"scope": "two"})
    assert client.subscribe(scope="three")["topic"] == "sync:three"


@pytest.mark.parametrize("waits", [False, True])
def test_other_topics_are_handed_to_on_message(start: Start, waits: bool) -> None:
    def at_once(session: mizusync.Session, topic: str, data: Any) -> None:
        session.send("answer", [session.scope, topic, data])

    async def later(session: mizusync.Session, topic: str, data: Any) -> None:
        await asyncio.sleep(0)
        at_once(session, topic, data)

    live = start(on_message=later if waits else at_once)
    client = live.socket("/ws?scope=s")
    for number in range(3):
        client.send_message("hello", number)
    for number in range(3):
        assert client.read_message() == {
            "topic": "answer",
            "data": ["s", "hello", number],
        }
    assert client.subscribe()["topic"] == "sync:s"


@pytest.mark.parametrize("waits", [False, True])
def test_an_exception_of_on_message_ends_no_session(start: Start, waits: bool) -> None:
    def broken(session: mizusync.Session, topic: str, data: Any) -> None:
        raise RuntimeError("a secret of the inside")

    async def broken_later(session: mizusync.Session, topic: str, data: Any) -> None:
        broken(session, topic, data)

    live = start(on_message=broken_later if waits else broken)
    client = live.socket()
    client.send_message("hello")
    client.send_message("subscribe", {})
    received = [client.read_message()]
    if received[0]["topic"] == "error":  # it may say that it failed, but not why
        received.append(client.read_message())
    assert "secret" not in str(received)
    assert received[-1]["topic"] == "sync:_default"
    live.logged("a secret of the inside")


def test_a_session_ends_with_its_peer_though_on_message_hangs(start: Start) -> None:
    entered, release = list[asyncio.Event](), asyncio.Event()

    async def hang(session: mizusync.Session, topic: str, data: Any) -> None:
        entered.append(release)
        await release.wait()

    live = start(
        ping_interval=MOMENT, ping_timeout=MOMENT, close_timeout=MOMENT, on_message=hang
    )
    for leave in (RawClient.close, RawClient.reset):
        client, before = live.socket(), len(entered)
        client.subscribe()
        for _ in range(20):  # more than is read ahead
            client.send_message("hello", "x" * 10_000)
        until(lambda: len(entered) > before)  # noqa: B023
        leave(client)
    until(lambda: live.server.stats()["sessions"] == 0)
    assert subscribers(live) == 0
    live.call(release.set)


def test_messages_are_handled_one_at_a_time_even_after_a_reset(start: Start) -> None:
    handled, at_once, closed = list[int](), list[int](), threading.Event()

    async def slowly(session: mizusync.Session, topic: str, data: Any) -> None:
        at_once.append(len(at_once) - len(handled))
        await asyncio.sleep(0.01)
        handled.append(data)

    live = start(on_message=slowly, on_close=lambda *_: closed.set())
    client = live.socket()
    client.send(b"".join(text(b'{"topic":"t","data":%d}' % n) for n in range(12)))
    until(lambda: handled)
    client.reset()
    assert closed.wait(PATIENCE)
    assert handled == list(range(len(handled)))
    assert set(at_once) == {0}


def test_a_receive_that_times_out_loses_no_message(start: Start) -> None:
    got = list[Any]()

    async def impatient(websocket: Any) -> None:
        while not websocket.ended:
            with suppress(TimeoutError):
                async with asyncio.timeout(0):
                    got.append(await websocket.receive())
            got.append(await websocket.receive())

    client = start(websocket=impatient).socket("/it")
    client.send(b"".join(text(b"%d" % n) for n in range(50)))
    client.send(goodbye(1000))
    client.read_close()
    until(lambda: got and got[-1] is None)
    assert [message for message in got if message is not None] == [
        str(n) for n in range(50)
    ]


def test_a_session_goes_on_if_what_on_message_waits_for_is_cancelled(
    start: Start,
) -> None:
    async def on_message(session: mizusync.Session, topic: str, data: Any) -> None:
        raise asyncio.CancelledError

    live = start(on_message=on_message)
    client = live.socket()
    for _ in range(2):
        client.send_message("hello")
    assert client.subscribe()["topic"] == "sync:_default"
    live.logged("on_message failed")


@table(
    "leave",
    {
        "closes": lambda client: client.send(goodbye(1000)),
        "half-closes": RawClient.half_close,
        "resets": RawClient.reset,
        "breaks a rule": lambda client: client.send_frame(3, b""),
    },
)
def test_on_close_is_called_once_with_the_session(
    start: Start, leave: Callable[[RawClient], None]
) -> None:
    closed = list[mizusync.Session]()
    live, join = joined(start, on_close=lambda session, error: closed.append(session))
    client, other = live.socket(), live.socket()
    session = join(client)
    leave(client)
    client.close()
    until(lambda: closed)
    assert other.quiet()
    assert closed == [session]
    live.end()
    assert len(closed) == 2


def test_an_exception_of_on_close_is_logged_and_the_session_ends(start: Start) -> None:
    async def broken(session: mizusync.Session, error: BaseException | None) -> None:
        raise RuntimeError("a secret of the inside")

    live = start(on_close=broken)
    live.socket().close()
    live.logged("a secret of the inside")
    client = live.client()
    until(lambda: client.request("GET", "/healthz").json["sessions"] == 0)


def test_an_on_close_that_never_returns_does_not_delay_a_stop(start: Start) -> None:
    async def hanging(session: mizusync.Session, error: BaseException | None) -> None:
        await asyncio.Event().wait()

    live = start(
        shutdown_timeout=MOMENT,
        linger_timeout=MOMENT,
        close_timeout=PATIENCE * 3,
        on_close=hanging,
    )
    with closing(RawClient(live.address)) as client:
        assert client.upgrade().status == 101  # it stays, and answers no close
        live.end()


def test_the_application_may_close_a_session(start: Start) -> None:
    def on_message(session: mizusync.Session, topic: str, data: Any) -> None:
        session.close(4000, "enough")

    live = start(on_message=on_message)
    client = live.socket()
    client.send_message("hello")
    assert client.read_frame() == Frame(CLOSE, b"\x0f\xa0enough")


def test_sessions_have_ids_of_their_own(start: Start) -> None:
    live, join = joined(start)
    sessions = [join(live.socket(f"/ws?scope={scope}")) for scope in ("one", "two")]
    assert [session.scope for session in sessions] == ["one", "two"]
    assert len({session.id for session in sessions}) == 2
    assert all(isinstance(session.id, str) and session.id for session in sessions)


def test_a_raw_websocket_accepts_messages_up_to_its_limit(start: Start) -> None:
    message = os.urandom(2**23)
    live = start(max_message_size=2**23, websocket=echo)
    client = live.socket("/it")
    writer = threading.Thread(target=client.send_frame, args=(BINARY, message))
    writer.start()
    assert client.read_frame() == Frame(BINARY, message)
    writer.join(PATIENCE)


def test_a_raw_websocket_sends_no_more_once_its_peers_end_was_received(
    start: Start,
) -> None:
    ended = threading.Event()

    async def talk(websocket: Any) -> None:
        reading = asyncio.create_task(websocket.receive())
        try:
            while True:
                await websocket.send("more")
                await asyncio.sleep(0.01)
        finally:
            await reading
            ended.set()

    live = start(websocket=talk)
    client = live.socket("/it")
    client.half_close()
    assert ended.wait(PATIENCE)


def test_a_raw_websocket_ends_with_its_function(start: Start) -> None:
    async def once(websocket: Any) -> None:
        await websocket.send("bye")

    live = start(websocket=once)
    client = live.socket("/it")
    assert client.read_frame() == Frame(TEXT, b"bye")
    assert client.read_close() == 1000


def test_an_endless_raw_websocket_does_not_starve_others(start: Start) -> None:
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

    live = start(close_timeout=MOMENT, websocket=stream)
    reader = threading.Thread(target=drain, args=[live.socket("/it")])
    reader.start()
    for _ in range(3):
        assert live.client().request("GET", "/healthz").status == 200
    live.stop()
    reader.join(PATIENCE)
    live.end()
    assert (ended, late) == ([mizusync.ConnectionLost], [])


def test_a_raw_websocket_that_only_sends_ends_with_its_peer(start: Start) -> None:
    async def pour(websocket: Any) -> None:
        while True:
            await websocket.send("x")

    live = start(websocket=pour)
    client = live.socket("/it", receive_buffer=4096)
    client.send(masked(TEXT, b"x" * 100_000))  # more than is read ahead
    client.close()
    until(lambda: live.server.stats()["connections"] == 0)


def test_an_exception_of_a_raw_websocket_closes_with_1011(start: Start) -> None:
    async def broken(websocket: Any) -> None:
        await websocket.send("hello")
        raise RuntimeError("a secret of the inside")

    live = start(websocket=broken)
    assert live.socket("/it").read_close() == 1011
    live.logged("a secret of the inside")


def test_a_cancelled_future_of_a_raw_websocket_closes_with_1011(start: Start) -> None:
    async def cancelling(websocket: Any) -> None:
        await websocket.send("hello")
        await cancelled(websocket.request)

    live = start(websocket=cancelling)
    assert live.socket("/it").read_close() == 1011
    live.logged("Traceback")


def test_a_raw_websocket_sending_to_a_lost_one_closes_with_1011(start: Start) -> None:
    gone = list[Any]()

    async def relay(websocket: Any) -> None:
        gone.append(websocket)
        async for _ in websocket:
            await gone[0].send("to a client that has gone")

    live = start(websocket=relay)
    first, second = live.socket("/it"), live.socket("/it")
    until(lambda: len(gone) == 2)
    first.close()
    until(lambda: live.server.stats()["connections"] == 1)
    second.send_message("hello")
    assert second.read_close() == 1011
    live.logged("Traceback")


def test_a_raw_websocket_ends_though_a_task_still_reads_from_it(start: Start) -> None:
    reading = set[asyncio.Task[Any]]()

    async def leave(websocket: Any) -> None:
        websocket.accept()
        reading.add(asyncio.create_task(websocket.receive()))
        await asyncio.sleep(0)

    live = start(websocket=leave)
    assert live.socket("/it").read_close() == 1000
    until(lambda: all(task.done() for task in reading))


def test_the_websockets_library_gets_hints_with_changes(server: Live) -> None:
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
        # An iterator has no length, so the body comes in chunks.
        chunks = iter([json.dumps([note("a", "x" * 20_000)]).encode()])
        json_type = {"Content-Type": "application/json"}
        (result,) = client.post("/sync/push", content=chunks, headers=json_type).json()
        assert client.get("/sync/pull").json()["changes"] == result["changes"]
        assert client.get("/sync/pull").headers["content-encoding"] == "gzip"
        assert client.head("/sync/snapshot").status_code == 200
        assert client.get("/nowhere").json()["code"] == "not_found"
        assert server.server.stats()["connections"] == 1


def test_the_aiohttp_library_pushes_and_gets_hints(server: Live) -> None:
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
# Host, Origin, the token and on_auth decide about access. A page of another origin gets
# nothing.


def try_everything(
    live: Live, headers: Mapping[str, str], query: str = ""
) -> list[Reply]:
    """Push, pull, take a snapshot and open a WebSocket; return the four replies."""
    return [
        live.client().request("POST", "/sync/push", BODY, headers),
        live.client().request("GET", f"/sync/pull{query}", headers=headers),
        live.client().request("GET", f"/sync/snapshot{query}", headers=headers),
        live.client().upgrade(f"/ws{query}", headers),
    ]


@pytest.mark.parametrize(
    "host", ["localhost", "LocalHost", "127.0.0.1", "[::1]", "127.0.0.1:{port}"]
)
def test_a_loopback_server_accepts_its_names(visitor: RawClient, host: str) -> None:
    headers = {"Host": host.format(port=visitor.address[1])}
    assert visitor.request("GET", "/sync/pull", headers=headers).status == 200


OTHER_HOSTS = [
    "evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "10.0.0.1.5",
    "evil",
]  # fmt: skip


@pytest.mark.parametrize("host", OTHER_HOSTS)
def test_a_loopback_server_refuses_another_host(
    shared: Live, visitor: RawClient, host: str
) -> None:
    for name in (host, f"{host}:{shared.address[1]}"):
        headers = {"Host": name}
        replies = try_everything(shared, headers)
        for target in ("/", "/healthz", CLIENT):
            replies.append(shared.client().request("GET", target, headers=headers))
        for reply in replies:
            assert refused(reply, 403)
            assert "--allow-host" in reply.json["error"]


@pytest.mark.parametrize("allowed", [[], ["sync.example"]])
def test_an_ip_address_is_accepted_since_dns_rebinding_needs_a_name(
    start: Start, allowed: list[str]
) -> None:
    client = start(allow_host=allowed).client()
    for host in ("10.0.0.1", "10.0.0.1:80", "[fd00::1]", "[fd00::1]:80"):
        assert client.request("GET", "/healthz", headers={"Host": host}).status == 200


def test_the_host_of_the_absolute_form_counts(visitor: RawClient) -> None:
    assert refused(visitor.request("GET", "http://evil.example/sync/pull"), 403)


def test_an_allowed_host_is_accepted_and_another_is_not(start: Start) -> None:
    client = start(allow_host=["sync.example"]).client()
    for host, status in (("sync.example", 200), ("evil.example", 403)):
        reply = client.request("GET", "/sync/pull", headers={"Host": host})
        assert reply.status == status


FOREIGN = [
    "http://evil.example", "null", "http://127.0.0.1:1", "http://localhost:{port}",
    "file://", "http://127.0.0.1:{port}.evil.example", "",
]  # fmt: skip


@pytest.mark.parametrize("origin", FOREIGN)
def test_a_page_of_another_origin_gets_nothing(
    shared: Live, visitor: RawClient, origin: str
) -> None:
    headers = {"Origin": origin.format(port=shared.address[1])}
    push, pull, _, upgrade = try_everything(shared, headers)
    assert refused(push, 403)
    assert refused(upgrade, 403)
    asked = headers | {"Access-Control-Request-Method": "POST"}
    for reply in (
        pull,
        shared.client().request("OPTIONS", "/sync/push", headers=asked),
    ):
        names = [name for name in reply.headers if name.startswith("access-control-")]
        assert names == []


def test_the_servers_own_origin_is_accepted(server: Live) -> None:
    headers = {"Origin": "http://{}:{}".format(*server.address)}
    replies = try_everything(server, headers)
    assert [reply.status for reply in replies] == [200, 200, 200, 101]


APP = {"Origin": "https://app.example"}
ALLOWING = {"allow_origin": ["https://app.example"]}


def test_an_allowed_origin_may_use_the_methods_of_a_route(start: Start) -> None:
    def prepare(server: Server) -> None:
        server.route("PUT", "/put")(lambda request: b"")

    client = start(prepare=prepare, **ALLOWING).client()
    asked = APP | {"Access-Control-Request-Method": "PUT"}
    preflight = client.request("OPTIONS", "/put", headers=asked)
    assert "PUT" in preflight.headers["access-control-allow-methods"].split(", ")


def test_an_allowed_origin_gets_the_headers_that_it_needs(start: Start) -> None:
    client = start(**ALLOWING).client()
    asked = APP | {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    preflight = client.request("OPTIONS", "/sync/push", headers=asked)
    assert preflight.status == 204
    assert "POST" in preflight.headers["access-control-allow-methods"]
    allowed = preflight.headers["access-control-allow-headers"].lower()
    assert "content-type" in allowed
    assert "authorization" in allowed
    pushed = client.request("POST", "/sync/push", BODY, APP)
    missing = client.request("GET", "/nowhere", headers=APP)
    for reply in (preflight, pushed, missing):
        assert reply.headers["access-control-allow-origin"] == "https://app.example"
        assert "origin" in reply.headers["vary"].lower()
    assert client.upgrade(headers=APP).status == 101


def test_a_page_of_an_allowed_origin_and_no_other_may_import_the_client(
    start: Start,
) -> None:
    client = start(**ALLOWING).client()
    got = client.request("GET", CLIENT, headers=APP)
    known = {"If-None-Match": got.headers["etag"]}
    same = client.request("GET", CLIENT, headers=APP | known)
    assert (got.status, same.status) == (200, 304)
    for reply in (got, same):
        assert reply.headers["access-control-allow-origin"] == "https://app.example"
    other = client.request("GET", CLIENT, headers={"Origin": "https://evil.example"})
    assert refused(other, 403)
    assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize(
    "origin", ["https://app.example.evil.example", "http://app.example", "https://evil"]
)
def test_an_origin_like_an_allowed_one_is_forbidden(start: Start, origin: str) -> None:
    push, _, _, upgrade = try_everything(start(**ALLOWING), {"Origin": origin})
    assert refused(push, 403)
    assert refused(upgrade, 403)


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ("http://localhost:5173", "http://localhost:5173"),
        ("HTTP://LocalHost:5173", "http://localhost:5173"),
        ("http://app.example:443", "http://app.example:443"),
        ("capacitor://localhost", "capacitor://localhost"),
        ("http://[::1]:5173", "http://[::1]:5173"),
    ],
)
def test_an_origin_may_be_allowed_in_another_form_than_browsers_send(
    start: Start, given: str, sent: str
) -> None:
    client = start(allow_origin=[given]).client()
    reply = client.request("GET", "/sync/pull", headers={"Origin": sent})
    assert reply.headers["access-control-allow-origin"] == sent


NOWHERE = "/nowhere/todos.db"  # a program that accepts its arguments ends with 1
NO_ORIGINS = [  # no browser sends them
    "x.y", "*", "null", "", "http://", "http://x.y/path", "http://x.y,http://z",
    "http://x y", "https://*.x.y", "http://x.y:0", "http://x.y:80", "https://x.y:443",
    "http://u@x.y", "http://x.y?q", "http://x.y/", "http://b\u00fccher.example",
    "ws://x.y", "file:///x", "http://[::1",
]  # fmt: skip
NO_HOSTS = [
    "*", "", "*.x.y", "https://x.y", "x.y:8080", "x.y/path", "x y", "x.y,z",
    "b\u00fccher.example",
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "value"),
    [*(("origin", it) for it in NO_ORIGINS), *(("host", it) for it in NO_HOSTS)],
)
def test_an_impossible_origin_or_host_is_refused_at_once(
    engine: Engine, kind: str, value: str, refusal: Refuse
) -> None:
    good = {"origin": "https://app.example", "host": "app.example"}[kind]
    options: dict[str, Any] = {f"allow_{kind}": [good, value]}
    with pytest.raises(ValueError, match="can never match"):
        Server(engine, **options)
    status, sentence = refusal("--db", NOWHERE, f"--allow-{kind}", value)
    assert status == 2
    assert "can never match" in sentence
    assert f"--allow-{kind}" in sentence


@pytest.mark.parametrize("option", ["allow_origin", "allow_host"])
def test_one_string_for_a_list_of_origins_or_hosts_is_a_type_error(
    engine: Engine, option: str
) -> None:
    options: dict[str, Any] = {option: "x.y"}
    with pytest.raises(TypeError, match=r"one string"):
        Server(engine, **options)


def test_a_page_of_an_allowed_origin_may_read_retry_after(start: Start) -> None:
    client = start(route=failing(Unavailable("come back later")), **ALLOWING).client()
    assert refused(reply := client.request("GET", "/it", headers=APP), 503)
    exposed = reply.headers["access-control-expose-headers"]
    assert "retry-after" in exposed.lower().split(", ")
    for headers in ({"Origin": "https://other.example"}, {}):
        reply = client.request("GET", "/it", headers=headers)
        assert "access-control-expose-headers" not in reply.headers


@pytest.fixture
def guarded(start: Start) -> Live:
    return start(token="s3cret-token")


WRONG_TOKENS = [
    None, "Bearer another", "Bearer s3cret", "Bearer s3cret-token2", "Bearer",
    "s3cret-token", "Basic s3cret-token", "Bearer \u00e9",
]  # fmt: skip


@pytest.mark.parametrize("given", WRONG_TOKENS)
def test_a_wrong_token_is_unauthorized(guarded: Live, given: str | None) -> None:
    headers = {} if given is None else {"Authorization": given}
    for reply in try_everything(guarded, headers, "?token=s3cret-token"):
        assert refused(reply, 401)
        assert reply.headers["www-authenticate"].split()[0] == "Bearer"
        assert b"s3cret" not in reply.body


ANNOUNCED = b"Content-Length: 1000000"  # of a body that never comes


@table(
    "sent",
    {
        "a push": post(ANNOUNCED, body=b""),
        "a push that waits for 100 Continue": post(
            ANNOUNCED, b"Expect: 100-continue", body=b""
        ),
        "a push in chunks": post(CHUNKED, body=b"10000\r\n["),
        "a pull": get(b"/sync/pull", ANNOUNCED),
        "a snapshot": get(b"/sync/snapshot", ANNOUNCED),
    },
)
def test_without_the_token_a_body_is_not_read(guarded: Live, sent: bytes) -> None:
    client = guarded.client()
    client.send(sent)
    assert refused(reply := client.read_reply(), 401)
    assert reply.headers["connection"] == "close"
    assert client.ended()


@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
def test_with_the_token_every_request_is_allowed(guarded: Live, scheme: str) -> None:
    replies = try_everything(guarded, {"Authorization": f"{scheme} s3cret-token"})
    assert [reply.status for reply in replies] == [200, 200, 200, 101]
    assert replies[0].json[0]["ok"]


def test_a_browser_offers_the_token_as_a_subprotocol(guarded: Live) -> None:
    client = guarded.client()
    offer = {"Sec-WebSocket-Protocol": "mizusync, bearer.s3cret-token"}
    reply = client.upgrade(headers=offer)
    assert (reply.status, reply.headers["sec-websocket-protocol"]) == (101, "mizusync")
    assert client.subscribe()["topic"] == "sync:_default"


@pytest.mark.parametrize(
    "offer", ["mizusync", "mizusync, bearer.another", "mizusync, s3cret-token"]
)
def test_another_subprotocol_is_unauthorized(guarded: Live, offer: str) -> None:
    headers = {"Sec-WebSocket-Protocol": offer}
    assert refused(guarded.client().upgrade(headers=headers), 401)


def test_healthz_shows_its_status_alone_if_there_is_a_token(guarded: Live) -> None:
    reply = guarded.client().request("GET", "/healthz")
    assert (reply.status, reply.json) == (200, {"status": "ok"})
    assert guarded.client().request("GET", "/").status != 401


def test_the_token_is_not_logged(log: Records, start: Start) -> None:
    live = start(token="s3cret-token")
    client = live.client()
    for scheme in ("Bearer", "Basic"):
        headers = {"Authorization": f"{scheme} s3cret-token"}
        client.request("GET", "/sync/pull", headers=headers)
    offer = {"Sec-WebSocket-Protocol": "mizusync, bearer.s3cret-token"}
    assert client.upgrade(headers=offer).status == 101
    live.end()
    assert log.texts
    assert not [text for text in log.texts if "s3cret" in text]


class Doors:
    """An on_auth that wants a name, forbids `secret`, and may be shut for everyone."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.shut = False

    def now(self, request: mizusync.Request, scope: str) -> str:
        self.asked.append(scope)
        if self.shut or scope == "closed" or "x-name" not in request.headers:
            raise mizusync.Unauthorized("a name is missing")
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
def watched(start: Start, doors: Doors) -> Live:
    return start(on_auth=doors.later)


def test_a_mutation_in_a_forbidden_scope_fails_alone(watched: Live) -> None:
    client = watched.client()
    results = client.push(
        note("a"), note("b", scope="secret"), note("c", scope="s"), headers=ANN
    )
    assert [result["ok"] for result in results] == [True, False, True]
    assert results[1] == {"ok": False, "code": "forbidden", "error": "not for you"}
    assert watched.call(watched.engine.current, "secret") == 0


def test_a_push_asks_on_auth_once_for_each_scope(watched: Live, doors: Doors) -> None:
    watched.client().push(
        note("a"), note("b", scope="s"), note("c"), note("d", scope="s"), headers=ANN
    )
    assert sorted(doors.asked) == ["_default", "s"]


def test_one_unauthorized_scope_refuses_the_whole_push(watched: Live) -> None:
    body = json.dumps([note("a"), note("b", scope="closed")]).encode()
    assert refused(watched.client().request("POST", "/sync/push", body, ANN), 401)
    assert refused(watched.client().request("POST", "/sync/push", BODY), 401)
    assert watched.call(watched.engine.current, "_default") == 0


def test_on_auth_is_asked_by_a_pull_a_snapshot_and_a_websocket(watched: Live) -> None:
    assert all(refused(reply, 401) for reply in try_everything(watched, {}))
    for query in ("?scope=secret", "?scope=%73ecret&wait=1"):
        _, *replies = try_everything(watched, ANN, query)
        assert all(refused(reply, 403) for reply in replies)
    _, *replies = try_everything(watched, ANN, "?scope=s")
    assert [reply.status for reply in replies] == [200, 200, 101]


def test_healthz_and_the_page_are_open_to_everyone(watched: Live, doors: Doors) -> None:
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
def test_the_value_that_on_auth_returned_is_the_identity(
    start: Start, gate: Callable[[mizusync.Request, str], Any]
) -> None:
    def on_message(session: mizusync.Session, topic: str, data: Any) -> None:
        session.send("you", session.identity)

    live = start(on_auth=gate, on_message=on_message)
    (result,) = live.client().push({"id": "a", "name": "who"}, headers=ANN)
    assert result["changes"][0]["data"] == "ann"
    client = live.socket("/ws", ANN)
    client.send_message("who?")
    assert client.read_message() == {"topic": "you", "data": "ann"}


def test_an_exception_of_on_auth_refuses_every_request(start: Start) -> None:
    def broken(request: mizusync.Request, scope: str) -> None:
        raise KeyError("a secret of the inside")

    live = start(on_auth=broken)
    for reply in try_everything(live, {}):
        assert refused(reply, 500)
        assert b"secret" not in reply.body
    live.logged("a secret of the inside")
    assert live.call(live.engine.current, "_default") == 0


@pytest.mark.parametrize("waits", [False, True], ids=["a function", "a coroutine"])
def test_an_on_auth_that_returns_false_forbids(start: Start, waits: bool) -> None:
    def user_may(request: mizusync.Request, scope: str) -> bool:
        return scope == "open"

    async def user_may_later(request: mizusync.Request, scope: str) -> bool:
        return user_may(request, scope)

    live = start(on_auth=user_may_later if waits else user_may)
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
def test_any_other_value_of_on_auth_is_an_identity(start: Start, identity: Any) -> None:
    live = start(on_auth=lambda request, scope: identity)
    (result,) = live.client().push({"id": "a", "name": "who"})
    assert fold(result["changes"]) == json.loads(json.dumps([identity]))


ASKING = {"auth_interval": MOMENT / 2}  # seconds


def test_a_session_that_lost_permission_is_closed(start: Start, doors: Doors) -> None:
    live = start(**ASKING, on_auth=doors.later)
    client = live.socket("/ws", ANN)
    until(lambda: len(doors.asked) > 2)
    assert client.subscribe()["topic"] == "sync:_default"
    doors.shut = True
    assert client.read_close() == 1008


def test_an_on_auth_that_hangs_is_asked_once_more(start: Start) -> None:
    asked: list[str] = []

    async def on_auth(request: mizusync.Request, scope: str) -> None:
        asked.append(scope)
        if len(asked) == 2:
            await asyncio.Event().wait()
        if len(asked) > 2:
            raise mizusync.Forbidden("no more")

    live = start(**ASKING, on_auth=on_auth)
    assert live.socket().read_close() == 1008
    live.logged("TimeoutError")


class Permits:
    """An on_auth that returns or raises `answers[scope]`; ... never returns.

    For every other scope it returns "ann"."""

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
        """Wait until the server has asked about all scopes once more."""
        before = self.asked
        until(lambda: self.asked > before + 5)  # it asks about two at a time, at most


@pytest.fixture
def permits() -> Permits:
    return Permits()


@table("no", {"Forbidden": mizusync.Forbidden("no more"), "False": False})
def test_a_scope_without_permission_is_unsubscribed(
    start: Start, permits: Permits, no: Any
) -> None:
    live = start(**ASKING, on_auth=permits)
    client = live.socket()
    client.subscribe(scope="s")
    client.subscribe(scope="t")
    permits.answers["s"] = no
    answer = client.read_message()
    assert answer["topic"] == "error"
    assert (answer["data"]["code"], answer["data"]["scope"]) == ("forbidden", "s")
    live.engine.submit([note("a", scope="s"), note("b", scope="t")]).result(PATIENCE)
    assert client.read_message()["topic"] == "sync:t"  # the session goes on
    permits.ask_again()
    assert client.quiet()  # the error comes once
    permits.answers.clear()
    assert client.subscribe(scope="s")["data"]["cursor"] == 1


def test_a_refused_subscribe_also_unsubscribes(start: Start, permits: Permits) -> None:
    live = start(on_auth=permits)  # which is asked when the client subscribes
    client = live.socket()
    client.subscribe(scope="s")
    client.subscribe(scope="t")
    permits.answers["s"] = mizusync.Forbidden("no more")
    client.send_message("subscribe", {"scope": "s"})
    answer = client.read_message()["data"]
    assert (answer["code"], answer["scope"]) == ("forbidden", "s")
    live.engine.submit([note("a", scope="s"), note("b", scope="t")]).result(PATIENCE)
    assert client.read_message()["topic"] == "sync:t"
    assert client.quiet()


def test_a_session_may_outlive_its_own_scope(start: Start, permits: Permits) -> None:
    live = start(**ASKING, on_auth=permits)
    client = live.socket("/ws?scope=own")
    client.subscribe(scope="other")
    permits.answers["own"] = mizusync.Forbidden("no more")
    assert client.read_message()["data"]["scope"] == "own"
    permits.ask_again()
    assert client.quiet()
    permits.answers["other"] = mizusync.Forbidden("no more")
    assert client.read_message()["data"]["scope"] == "other"
    assert client.read_close() == 1008


def test_a_session_without_scopes_is_closed(start: Start, permits: Permits) -> None:
    live = start(**ASKING, on_auth=permits)
    client = live.socket()
    client.subscribe(scope="s")
    permits.answers |= {"s": False, "_default": False}
    assert client.read_close() == 1008


def test_one_unauthorized_scope_closes_a_session(
    start: Start, permits: Permits
) -> None:
    live = start(**ASKING, on_auth=permits)
    client = live.socket()
    client.subscribe(scope="s")
    permits.answers["s"] = mizusync.Unauthorized("no more")
    assert client.read_close() == 1008


def test_a_subscribe_that_is_unauthorized_closes_the_session(
    start: Start, permits: Permits
) -> None:
    live = start(on_auth=permits)  # which is asked when the client subscribes
    client = live.socket()
    client.subscribe(scope="s")
    permits.answers["t"] = mizusync.Unauthorized("no more")
    client.send_message("subscribe", {"scope": "t"})
    assert client.read_close() == 1008


def test_the_own_scope_decides_the_identity(start: Start, permits: Permits) -> None:
    def on_message(session: mizusync.Session, topic: str, data: Any) -> None:
        session.send("you", session.identity)

    live = start(**ASKING, on_auth=permits, on_message=on_message)
    client = live.socket("/ws?scope=own")
    client.subscribe(scope="other")

    def identity() -> Any:
        client.send_message("who?")
        return client.read_message()["data"]

    assert identity() == "ann"
    permits.answers |= {"other": "bob", "own": "ann, admin"}
    until(lambda: identity() == "ann, admin")
    permits.ask_again()
    assert identity() == "ann, admin"


@table(
    "fault",
    {"fails": KeyError("inside"), "hangs": ..., "is busy": Unavailable("later")},
)
def test_three_failures_of_on_auth_close_a_session(
    start: Start, permits: Permits, fault: Any
) -> None:
    live = start(**ASKING, on_auth=permits, may_log="on_auth failed")
    client = live.socket()
    permits.answers["_default"] = fault
    before = permits.asked
    assert client.read_close() == 1011
    assert permits.asked >= before + 3
    assert len([text for text in live.records.texts if "on_auth failed" in text]) == 3


def test_a_session_stays_if_on_auth_fails_only_twice_in_a_row(start: Start) -> None:
    asked = itertools.count()

    def on_auth(request: mizusync.Request, scope: str) -> str:
        if next(asked) % 3:
            raise KeyError("inside")
        return "ann"

    live = start(**ASKING, on_auth=on_auth, may_log="on_auth failed")
    client = live.socket()
    until(lambda: len(live.records.texts) >= 4)
    assert client.quiet()


def test_an_on_auth_that_catches_its_cancellation_is_not_asked_about_an_ended_session(
    start: Start,
) -> None:
    asked: list[str] = []

    async def on_auth(request: mizusync.Request, scope: str) -> str:
        asked.append(scope)
        if len(asked) > 1:
            with suppress(BaseException):
                await asyncio.Event().wait()
        return "ann"

    live = start(**ASKING, on_auth=on_auth)
    before = live.tasks()
    client = live.socket()
    until(lambda: len(asked) > 1)
    client.reset()
    until(lambda: live.tasks() <= before)


def test_hanging_scopes_do_not_delay_another(start: Start, permits: Permits) -> None:
    scopes = [*map(str, range(9)), "_default"]
    live = start(**ASKING, on_auth=permits, may_log="on_auth failed")
    client = live.socket()
    for scope in (*scopes, "s"):
        client.subscribe(scope=scope)
    permits.answers = dict.fromkeys(scopes, ...) | {"s": mizusync.Forbidden("no more")}
    assert client.read_message()["data"]["scope"] == "s"


@pytest.mark.parametrize("target", ["/ws", "/sync/pull", "subscribe"])
def test_a_reset_while_on_auth_runs_leaves_no_task(start: Start, target: str) -> None:
    async def think(request: mizusync.Request, scope: str) -> None:
        if scope != "quick":
            await asyncio.Event().wait()

    live = start(close_timeout=MOMENT, on_auth=think)
    before = live.tasks()
    if target == "subscribe":
        client = live.socket("/ws?scope=quick")
        client.send_message("subscribe", {"scope": "another"})
    else:
        client = live.client()
        client.send(RUDE_UPGRADE.replace(b"/ws", target.encode()))
    until(lambda: live.tasks() > before)
    client.reset()
    until(lambda: live.tasks() <= before)


NO_TOKENS = ["", " ", "a b", "a,b", "YWJj/Q==", "a\n", "b\u00fccher", '"a"', "\udcff"]


@pytest.mark.parametrize("token", NO_TOKENS)
def test_a_token_that_no_browser_sends_is_refused(engine: Engine, token: str) -> None:
    with pytest.raises(ValueError, match=r"a token has 1 or more letters") as raised:
        Server(engine, token=token)
    assert len(token) < 2 or token not in str(raised.value)


def test_a_token_that_is_no_string_is_a_type_error(engine: Engine) -> None:
    wrong: Any = b"s3cret"
    with pytest.raises(TypeError):
        Server(engine, token=wrong)


def test_a_token_may_have_every_allowed_character(start: Start) -> None:
    token = "!#$%&'*+-.^_`|~09AZaz"
    offer = {"Sec-WebSocket-Protocol": f"mizusync, bearer.{token}"}
    live = start(token=token)
    shown = {"Authorization": f"Bearer {token}"}
    assert live.client().request("GET", "/sync/pull", headers=shown).status == 200
    assert live.client().upgrade(headers=offer).status == 101


def test_a_second_scope_does_not_bypass_on_auth(watched: Live) -> None:
    for target in ("/sync/pull", "/sync/snapshot", "/ws"):
        for query in ("scope=s&scope=secret", "scope=secret&%73cope=s"):
            assert refused(watched.client().upgrade(f"{target}?{query}", ANN), 400)


def test_head_or_a_repeated_key_does_not_bypass_on_auth(watched: Live) -> None:
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
    assert client.read_message()["data"]["code"] == "forbidden"


def test_a_pull_that_waits_may_lose_its_permission(start: Start, doors: Doors) -> None:
    live = start(on_auth=doors.later)
    client = live.client()
    client.send(get(b"/sync/pull?wait=60", b"X-Name: ann"))
    until(lambda: doors.asked)
    doors.shut = True
    live.engine.submit([note("a")]).result(PATIENCE)
    assert refused(client.read_reply(), 401)


def test_the_client_is_for_everybody(start: Start, doors: Doors) -> None:
    client = start(token="s3cret", on_auth=doors.later).client()
    assert client.request("GET", CLIENT).status == 200
    wrong = {"Authorization": "Bearer wrong"}
    assert client.request("GET", CLIENT, headers=wrong).status == 200
    assert doors.asked == []


def test_a_preflight_needs_no_token(start: Start) -> None:
    live = start(token="s3cret", **ALLOWING)
    asked = APP | {"Access-Control-Request-Method": "POST"}
    reply = live.client().request("OPTIONS", "/sync/push", headers=asked)
    assert (reply.status, "authorization" in str(reply.headers).lower()) == (204, True)


def test_the_page_may_run_its_own_script_and_the_servers(start: Start) -> None:
    reply = start(page=PROGRAM.with_name("demo.html")).client().request("GET", "/")
    policy = reply.headers["content-security-policy"].split("; ")
    for tag in ("script", "style"):
        inline = (
            reply.body.split(f"<{tag}".encode())[1].split(b">", 1)[1].split(b"</")[0]
        )
        digest = base64.b64encode(hashlib.sha256(inline).digest()).decode()
        also = "'self' " if tag == "script" else ""
        policy.remove(f"{tag}-src {also}'sha256-{digest}'")
    nothing = [f"{kind} 'none'" for kind in ("base-uri", "default-src", "form-action")]
    more = ["connect-src 'self'", "frame-ancestors 'none'", "img-src data:"]
    more.append("worker-src 'self'")
    assert sorted(policy) == sorted(nothing + more)
    assert reply.headers["x-content-type-options"] == "nosniff"


def test_the_log_has_no_token_and_no_forged_line(log: Records, start: Start) -> None:
    def broken(request: mizusync.Request, scope: str) -> None:
        if scope != "s":
            raise KeyError("inside")

    headers = {"Authorization": "Bearer s3cret"}
    live = start(token="s3cret", on_auth=broken, may_log="inside")
    for target in ("/%0AERROR", "/sync/pull?t=s3cret", "/?s3cret"):
        assert live.client().request("PUT", target, b"s3cret", headers).status >= 400
    assert live.client().upgrade("/%0AERROR", headers).status == 404
    assert refused(live.client().request("GET", "/sync/pull", headers=headers), 500)
    client = live.socket("/ws?scope=s", headers)
    client.send(goodbye(1000, b"bye\nERROR all is lost"))
    client.read_close()
    live.end()
    assert not [text for text in log.texts if "s3cret" in text or "\nERROR" in text]
    assert [text for text in log.texts if "all is lost" in text]


# --- Server ---------------------------------------------------------------------------
# Routes of the application, limits of the whole server, and a stop that loses nothing.


def test_the_page_is_served(start: Start, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<!doctype html><title>caf\u00e9</title>", encoding="utf-8")
    client = start(page=page).client()
    reply = client.request("GET", "/")
    content_type = reply.headers["content-type"].replace(" ", "").lower()
    assert (reply.status, reply.body) == (200, page.read_bytes())
    assert content_type == "text/html;charset=utf-8"
    assert reply.headers["cache-control"] == "no-store"
    assert refused(client.request("POST", "/", b""), 405)


def test_a_server_in_a_thread_stops_gracefully(engine: Engine) -> None:
    server, announced = Server(engine), list[str]()
    run = functools.partial(server.run, "127.0.0.1", 0, announced.append)
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    until(lambda: announced)
    port = int(announced[0].split(":")[-1][:-1])
    with closing(RawClient(("127.0.0.1", port))) as session:
        assert session.upgrade().status == 101
        server.stop()
        assert session.read_close() == 1001
    thread.join(PATIENCE)
    server.stop()
    assert not thread.is_alive()
    assert refuses(lambda: engine.submit([note("1")]))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_run_leaves_the_signal_handlers_as_they_were(
    engine: Engine, number: int
) -> None:
    def handler(*_: object) -> None: ...

    server = Server(engine)
    old = signal.signal(number, handler)
    try:
        server.run("127.0.0.1", 0, lambda _: signal.raise_signal(number))
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, old)


def test_run_refuses_a_running_loop_and_leaves_the_engine_open(engine: Engine) -> None:
    async def main() -> None:
        with pytest.raises(RuntimeError, match="listen"):
            Server(engine).run("127.0.0.1", 0)
        async with Server(engine).listen("127.0.0.1", 0):
            assert (await engine.push([note("1")]))[0].ok

    ask(main())


def test_a_server_that_was_stopped_early_ends_at_once(engine: Engine) -> None:
    server = Server(engine)
    server.stop()
    thread = threading.Thread(target=server.run, args=("127.0.0.1", 0), daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert refuses(lambda: engine.submit([note("1")]))


def test_a_page_may_be_absent_but_not_missing(
    client: RawClient, engine: Engine, tmp_path: Path
) -> None:
    assert refused(client.request("GET", "/"), 404)
    with pytest.raises(OSError, match="nowhere"):
        Server(engine, page=tmp_path / "nowhere.html")


def test_a_page_may_have_another_policy(start: Start, tmp_path: Path) -> None:
    csp = "default-src 'self'; img-src *"
    page = tmp_path / "page.html"
    page.write_text("<!doctype html><script>1</script>")
    reply = start(page=page, csp=csp).client().request("GET", "/")
    assert reply.headers["content-security-policy"] == csp
    assert reply.headers["x-content-type-options"] == "nosniff"


@table(
    "case",
    {
        "bytes": (b"default-src 'self'", TypeError, "a string, not bytes"),
        "a list": (["default-src 'self'"], TypeError, "a string, not list"),
        "nothing": ("", ValueError, "a line of"),
        "a line break": ("default-src 'self';\n img-src *", ValueError, "a line of"),
        "CR and LF": ("img-src *\r\nX-A: 1", ValueError, "a line of"),
        "a letter beyond ASCII": ("img-src caf\u00e9", ValueError, "ASCII"),
    },
)
def test_a_policy_that_no_header_can_hold_is_refused(
    engine: Engine, tmp_path: Path, case: tuple[Any, type[Exception], str]
) -> None:
    csp, error, words = case
    (tmp_path / "page.html").touch()
    with pytest.raises(error, match=words):
        Server(engine, page=tmp_path / "page.html", csp=csp)


def test_a_policy_without_a_page_is_refused(engine: Engine) -> None:
    with pytest.raises(ValueError, match="page="):
        Server(engine, csp="default-src 'self'")


def prepared(server: Server) -> None:
    """Add routes as an application would."""

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


def test_routes_return_text_bytes_json_or_a_response(start: Start) -> None:
    client = start(prepare=prepared).client()
    assert client.request("GET", "/text?name=a+b").body.decode() == "h\u00e9llo a b"
    reply = client.request("POST", "/upper", b"abc", {"Content-Type": "x/y"})
    assert reply.body == b"ABC"
    assert client.request("GET", "/json").json == {"x": [1, None]}
    made = client.request("GET", "/response")
    assert (made.status, made.body, made.headers["x-a"]) == (201, b"made", "1")
    assert made.headers["content-type"] == "a/b"
    options = client.request("OPTIONS", "/upper")
    assert "POST" in options.headers["allow"].split(", ")


@pytest.mark.parametrize("body", [b"", b"{", b"NaN", b"\xff", b"[" * 65 + b"]" * 65])
def test_a_route_that_reads_json_refuses_other_bodies(
    start: Start, body: bytes
) -> None:
    client = start(prepare=prepared).client()
    assert refused(client.request("POST", "/keys", body), 400)
    assert client.request("POST", "/keys", b'{"a": [1]}').json == ["a"]


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
        "the push": ("POST", "/sync/push", "POST /sync/push"),
        "the pull": ("GET", "/sync/pull", "GET /sync/pull"),
        "the same in lower case": ("get", "/sync/pull", "GET /sync/pull"),
        "the pull's HEAD": ("HEAD", "/sync/pull", "HEAD /sync/pull"),
        "the client": ("GET", "/sync/client.js", "GET /sync/client.js"),
        "the sessions": ("GET", "/ws", "GET /ws"),
        "the page": ("GET", "/", "GET /"),
        "a route of the application": ("PUT", "/twice", "PUT /twice"),
    },
)
def test_a_route_that_would_never_match_or_is_taken_is_refused(
    tmp_path: Path, engine: Engine, case: tuple[str, str, str]
) -> None:
    (tmp_path / "page.html").touch()
    method, path, words = case
    server = Server(engine, page=tmp_path / "page.html")
    server.route("PUT", "/twice")(len)
    with pytest.raises(ValueError, match=words):
        server.route(method, path)(print)


@pytest.mark.parametrize(
    "target", ["/sync/pull", "/ws", "/socket", "/rooms/{id}", "socket"]
)
def test_a_websocket_that_is_taken_is_refused(engine: Engine, target: str) -> None:
    server = Server(engine)
    server.websocket("/socket")(echo)
    with pytest.raises(ValueError, match=re.escape(target)):
        server.websocket(target)(echo)


def test_a_refused_route_changes_nothing(start: Start) -> None:
    def prepare(server: Server) -> None:
        for path in ("/sync/pull", "/other/{id}"):
            with suppress(ValueError):
                server.route("GET", path)(lambda request: b"another")
        for path in ("/literal/(id)", "/caf\u00e9 $1", "/a:b"):
            server.route("GET", path)(lambda request: request.path)
        server.route("PUT", "/sync/pull")(lambda request: b"put")

    live = start(prepare=prepare)
    client = live.client()
    assert client.pull()["changes"] == []
    assert refused(client.request("GET", "/other/{id}"), 404)
    assert client.request("PUT", "/sync/pull", b"").body == b"put"
    for target in ("/literal/(id)", "/caf%C3%A9%20$1", "/a:b"):
        assert client.request("GET", target).status == 200


class Odd(mizusync.SyncError, status=499, code="odd"):
    """A refusal of the application, with a status that HTTP does not know."""

    def __init__(self, sentence: str, **fields: Any) -> None:
        super().__init__(sentence)
        self.headers = fields


def failing(error: BaseException) -> Callable[[Any], Any]:
    def handler(request: mizusync.Request) -> Any:
        raise error

    return handler


async def cancelled(request: mizusync.Request) -> None:
    future = asyncio.get_running_loop().create_future()
    future.cancel()
    await future


BAD_ANSWERS = {
    "text as a body": response_of(200, "text"),
    "text as a status": response_of("404"),
    "no body": response_of(200, None),
    "a header with a line break": response_of(headers={"X-A": "1\r\nX-B: 2"}),
    "a set, which JSON lacks": lambda request: {1, 2},
    "a refusal with a line break in a header": failing(Odd("-", Location="1\r\nX: 2")),
    "a refusal with a number as a header": failing(Odd("-", Age=5)),
    "a cancelled future": cancelled,
}


@table("handler", BAD_ANSWERS)
def test_a_bad_answer_of_a_route_is_logged_and_an_internal_error(
    start: Start, handler: Callable[[Any], Any]
) -> None:
    live = start(route=handler)
    client = live.client()
    assert refused(client.request("GET", "/it"), 500)
    live.logged("Traceback")
    assert client.request("GET", "/healthz").status == 200  # on the same connection


class Large(mizusync.Response):
    """A response of the application."""

    def __init__(self, text: str) -> None:
        super().__init__(200, text.encode(), {}, "text/plain")


def test_a_response_may_be_of_a_subclass(start: Start) -> None:
    client = start(route=lambda request: Large("x" * 20_000), **ALLOWING).client()
    reply = client.request("GET", "/it", headers=APP | {"Accept-Encoding": "gzip"})
    assert (reply.status, gzip.decompress(reply.body)) == (200, b"x" * 20_000)


def test_a_refusal_may_have_a_status_of_the_application(start: Start) -> None:
    reply = start(route=failing(Odd("it is odd"))).client().request("GET", "/it")
    assert (reply.status, reply.json) == (499, {"code": "odd", "error": "it is odd"})


def test_a_refusal_of_a_route_is_shown_and_an_exception_is_not(start: Start) -> None:
    live = start(prepare=prepared)
    client = live.client()
    assert refused(client.request("GET", "/refuse"), 409)
    reply = client.request("GET", "/crash")
    assert refused(reply, 500)
    assert b"secret" not in reply.body
    live.logged("a secret of the inside")
    assert live.client().request("GET", "/json").status == 200


def test_stats_count_the_sessions_that_are_open(server: Live) -> None:
    assert server.call(server.server.stats)["sessions"] == 0
    client = server.socket()
    assert server.call(server.server.stats)["sessions"] == 1
    client.close()
    until(lambda: server.call(server.server.stats)["sessions"] == 0)


def explained_numbers(since: str = "") -> list[str]:
    """Return the names that the README's tables have, from one heading on."""
    tables = readme("Numbers").partition(since)[2] if since else readme("Numbers")
    rows = re.findall(r"^\|(.*?)\|", tables, re.M)
    return re.findall(r"`(\w+)`", "".join(rows))


def test_stats_have_every_name_that_the_readme_explains(server: Live) -> None:
    stats = server.server.stats()
    assert sorted(explained_numbers()) == sorted(stats)
    assert stats.pop("version") == mizusync.__version__
    assert stats.pop("database_bytes") >= 4096
    assert stats.pop("wal_bytes") > 0
    assert not any(stats.values())


def test_stats_count_pushes_by_outcome_commits_pulls_and_answers(start: Start) -> None:
    live = start(may_log="secret")
    client = live.client()
    notes = {"id": "c", "name": "notes", "args": 7}
    client.push(note("a"), note("a"), note("b"), notes)
    client.push(*({"id": code, "name": "refuse", "args": code} for code in REFUSALS))
    client.push({"id": "d", "name": "apply fails"})
    for scope in (DEFAULT, DEFAULT, "new"):
        client.pull(scope=scope)
    for target, status in (("/sync/snapshot", 200), ("/nowhere", 404)):
        assert client.request("GET", target).status == status
    client.send(b"nonsense\r\n\r\n")
    assert client.read_reply().status == 400
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


def test_stats_count_waiting_and_failed_pushes(start: Start, tmp_path: Path) -> None:
    entered, release = threading.Event(), threading.Event()
    live = start(apply=stalled(entered, release), may_log="pushes failed")
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
    assert [stats[name] for name in ("pushes_waiting", "pushes_failed", "pushes")] == [
        0,
        1,
        2,
    ]
    assert (stats["database_bytes"], stats["wal_bytes"]) == (0, 0)


def test_stats_count_hints_sent_and_merged(server: Live) -> None:
    sessions = [server.socket(), server.socket()]
    for session in sessions:
        session.subscribe()

    def burst() -> None:
        # The first hint leaves at once; the others merge, and leave a little later.
        for cursor in range(1, 10):
            server.server.hub.notify({DEFAULT: Hint(cursor, "epoch")})

    server.call(burst)
    for session in sessions:
        while session.read_message()["data"]["cursor"] < 9:
            pass

    def are_counted() -> bool:
        stats = server.server.stats()
        sent = len(sessions) * (9 - stats["hints_merged"])
        return bool(stats["hints_merged"] and stats["hints_sent"] == sent)

    until(are_counted)


ENDS: dict[str, tuple[Callable[[RawClient, Live], Any], str]] = {
    "the client closes": (
        lambda client, live: client.send(goodbye(1001, b"bye")),
        "the peer closed: 1001 bye",
    ),
    "the client disconnects": (
        lambda client, live: client.close(),
        "the peer closed the connection",
    ),
    "the client resets": (lambda client, live: client.reset(), "reset by peer"),
    "the client breaks a rule": (
        lambda client, live: client.send(b"\xff\xff"),
        "1002 ",
    ),
    "the client sends bytes": (
        lambda client, live: client.send_frame(BINARY, b"x"),
        "1003 messages are",
    ),
    "the application closes": (
        lambda client, live: client.send_message("enough"),
        "1008 not any more",
    ),
    "the client answers no ping": (
        lambda client, live: None,
        f"no answer to a ping for {MOMENT:g} s",
    ),
    "the server stops": (
        lambda client, live: live.stop(),
        "1001 the server is stopping",
    ),
}


@table("ending", ENDS)
def test_the_log_has_one_line_a_session_with_its_end(
    log: Records, start: Start, ending: tuple[Callable[[RawClient, Live], Any], str]
) -> None:
    def enough(session: mizusync.Session, topic: str, data: Any) -> None:
        session.close(1008, "not any more")

    end, reason = ending
    interval = MOMENT if "to a ping" in reason else PATIENCE
    live = start(
        close_timeout=MOMENT,
        linger_timeout=MOMENT,
        ping_interval=interval,
        ping_timeout=interval,
        on_message=enough,
    )
    end(live.socket("/ws?scope=family"), live)
    lines = until(lambda: [text for text in log.texts if " ended: " in text])
    assert re.match(r"INFO mizusync\.live: session \S+ of 'family'.* ended: ", lines[0])
    assert reason in lines[0]
    live.end()
    assert len([text for text in log.texts if " ended: " in text]) == 1


def test_the_last_line_of_a_session_names_its_peer(
    log: Records, start: Start, doors: Doors
) -> None:
    client = start(on_auth=doors.later).socket("/ws?scope=family", ANN)
    host, port = client.sock.getsockname()
    client.close()
    (line,) = until(lambda: [text for text in log.texts if " ended: " in text])
    assert "'family'" in line
    assert "'ann'" in line
    assert host in line
    assert str(port) in line


REFUSALS_OF_HANDSHAKES = {  # the target, the headers, and words of the reason
    "the host is another": ("/ws", ANN | {"Host": "evil.example"}, "--allow-host"),
    "the origin is another": ("/ws", ANN | {"Origin": "null"}, "--allow-origin"),
    "the name is missing": ("/ws", {}, "a name is missing"),
    "the scope is forbidden": ("/ws?scope=secret", ANN, "not for you"),
    "the version is another": (
        "/ws",
        ANN | {"Sec-WebSocket-Version": "8"},
        "WebSocket, version 13",
    ),
}


@table("case", REFUSALS_OF_HANDSHAKES)
def test_a_refused_handshake_is_logged_at_info_with_its_reason(
    log: Records, start: Start, doors: Doors, case: tuple[str, dict[str, str], str]
) -> None:
    target, headers, reason = case
    live = start(on_auth=doors.later)
    assert live.client().upgrade(target, headers).status >= 400
    live.end()
    lines = [text for text in log.texts if text.startswith("INFO mizusync")]
    assert len([line for line in lines if reason in line]) == 1


def test_port_scans_and_health_checks_log_at_debug(log: Records, start: Start) -> None:
    live = start(head_timeout=MOMENT)
    assert live.client().request("GET", "/healthz").status == 200
    for garbage in (
        b"",
        b"\0",
        b"GET",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"SSH-2.0-x\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
    ):
        live.client().send(garbage)
        live.client().reset()
    until(lambda: sum("no request from " in text for text in log.texts) >= 4)
    live.end()
    assert [text for text in log.texts if "GET '/healthz' -> 200" in text]
    assert not [text for text in log.texts if not text.startswith("DEBUG ")]


@pytest.mark.parametrize("part", ["", ".store", ".engine", ".http", ".live"])
def test_the_module_installs_no_handler_and_no_level(part: str) -> None:
    logger = logging.getLogger(f"mizusync{part}")
    # Records are handlers of the tests.
    assert all(isinstance(handler, Records) for handler in logger.handlers)
    assert (logger.level, logger.propagate) == (logging.NOTSET, True)
    assert f"`mizusync{part}`" in readme("What the log means")


def test_more_sessions_than_the_limit_are_unavailable(
    log: Records, start: Start
) -> None:
    live = start(max_sessions=1)
    first = live.socket()
    assert refused(live.client().upgrade(), 503)
    assert [text for text in log.texts if "503 'the server has too many" in text]
    first.close()
    until(lambda: live.client().upgrade().status == 101)


def test_more_connections_than_the_limit_are_unavailable(
    log: Records, start: Start
) -> None:
    live = start(max_connections=2)
    first, second, third = live.client(), live.client(), live.client()
    for client in (first, second):
        assert client.request("GET", "/healthz").status == 200
    assert refused(third.read_reply(), 503)
    assert third.ended()
    peer = "{}:{}".format(*third.sock.getsockname())
    (line,) = [text for text in log.texts if "too many connections" in text]
    assert line.startswith(f"INFO mizusync.http: no request from {peer}: ")
    third.close()
    assert first.request("GET", "/healthz").status == 200
    second.close()

    def is_accepted() -> bool:
        with closing(live.client()) as client:
            return client.request("GET", "/healthz").status == 200

    until(is_accepted)


# Bytes of a page: far more than the kernel buffers for a client that does not read.
LARGE = 2**24


@contextmanager
def unread(live: Live, count: int) -> Iterator[list[RawClient]]:
    """Let clients ask for a page of LARGE bytes each, and not read it."""
    answered = live.server.stats()["answers_2xx"]
    clients = [live.client(receive_buffer=4096) for _ in range(count)]
    for client in clients:
        client.send(get(b"/sync/pull"))
    until(lambda: live.server.stats()["answers_2xx"] == answered + count)
    yield clients
    for client in clients:
        client.reset()


def test_an_unread_answer_takes_no_memory_but_its_own_bytes(start: Start) -> None:
    # So each page is read from the disk.
    live = start(max_tail_size=0)
    push(live.engine, note("a", "x" * LARGE))
    tracemalloc.start()
    try:
        with unread(live, 3):
            held = live.call(
                lambda: (gc.collect(), tracemalloc.get_traced_memory()[0])[1]
            )
    finally:
        tracemalloc.stop()
    assert 2 * LARGE < held < 4 * LARGE  # three answers, and once each of them twice


def test_above_max_unsent_requests_are_unavailable(start: Start) -> None:
    live = start(max_unsent=LARGE // 2, route=lambda request: b"it")
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
            assert session.quiet()  # an open session stays
            assert slow.read_reply().status == 200
            until(lambda: live.client().request("GET", "/it").status == 200)
    until(lambda: live.server.stats()["unsent_bytes"] == 0)
    assert [change["cursor"] for change in client.pull()["changes"]] == [1]


@pytest.mark.parametrize(
    "lines", [[], [b"Accept-Encoding: gzip"]], ids=["plain", "gzip"]
)
def test_pulls_that_waited_together_are_answered_up_to_max_unsent(
    start: Start, lines: list[bytes]
) -> None:
    live = start(max_unsent=LARGE, max_tail_size=4 * LARGE)
    live.client().pull()  # from here on pulls are answered from memory: in one turn
    waiting = [live.client(receive_buffer=4096) for _ in range(8)]
    for client in waiting:
        client.send(get(b"/sync/pull?wait=60", *lines))
    until(lambda: live.server.stats()["pulls_from_memory"] == 8)
    push(live.engine, note("a", "x" * LARGE))
    begun = [client.sock.recv(12) for client in waiting]  # and no more is read
    assert sorted(begun) == [b"HTTP/1.1 200"] + [b"HTTP/1.1 503"] * 7


def test_messages_that_a_session_does_not_read_count_as_unsent(start: Start) -> None:
    live, join = joined(start, send_buffer=4096, max_unsent=2**17)
    slow = live.socket(receive_buffer=4096)
    join(slow)
    for _ in range(6):
        live.call(live.server.publish, "news", "x" * 2**16)
    until(lambda: live.client().request("GET", "/healthz").status == 503)
    slow.reset()
    until(lambda: live.client().request("GET", "/healthz").status == 200)


def test_a_stop_closes_sessions_and_answers_pulls_that_wait(server: Live) -> None:
    session, waiting, idle = server.socket(), server.client(), server.client()
    assert idle.request("GET", "/healthz").status == 200
    waiting.send(HEALTHZ + get(b"/sync/pull?wait=60"))
    assert (
        waiting.read_reply().json["status"] == "ok"
    )  # so the pull has arrived as well
    server.stop()
    assert session.read_close() == 1001
    assert waiting.read_reply().json["changes"] == []
    assert waiting.ended()
    assert idle.ended()
    with pytest.raises(ConnectionError):
        until(lambda: server.client() is None)


def test_a_push_in_flight_is_answered_before_the_server_stops(start: Start) -> None:
    entered, release = threading.Event(), threading.Event()
    live = start(apply=stalled(entered, release))
    client, session = live.client(), live.socket()
    client.send(post(LENGTH))
    assert entered.wait(PATIENCE)
    live.stop()
    assert session.read_close() == 1001
    release.set()
    assert client.read_reply().json[0]["changes"][0]["data"] == "a"
    assert client.ended()


def test_a_stop_waits_until_on_auth_has_cleaned_up(start: Start) -> None:
    asked: list[str] = []
    cleaned: list[str] = []

    async def on_auth(request: mizusync.Request, scope: str) -> None:
        asked.append(scope)
        if scope == "slow":
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(MOMENT)  # a connection goes back to its pool
                cleaned.append(scope)

    live = start(on_auth=on_auth, close_timeout=MOMENT, shutdown_timeout=MOMENT)
    live.socket().send_message("subscribe", {"scope": "slow"})
    until(lambda: "slow" in asked)
    live.end()
    assert cleaned == ["slow"]


SOON = 5.0  # seconds: much less than the limits that would end it otherwise


@table(
    "half", {"a head": b"GET /healthz HTTP/1.1\r\nHost:", "a body": post(LENGTH)[:-1]}
)
def test_a_stop_does_not_wait_for_half_a_request(start: Start, half: bytes) -> None:
    late = 4 * PATIENCE
    live = start(head_timeout=late, body_timeout=late, shutdown_timeout=late)
    client = live.client()
    client.send(HEALTHZ + half)
    assert client.read_reply().status == 200  # so the half has arrived as well
    live.stop()
    client.sock.settimeout(SOON)
    while client.sock.recv(65536):  # an answer such as 408, or none
        pass


@pytest.mark.parametrize("behind", [b"\r\n", b"GET"], ids=["an empty line", "a word"])
def test_bytes_behind_a_pull_that_waits_hide_no_end_of_its_client(
    server: Live, behind: bytes
) -> None:
    client = server.client()
    client.send(HEALTHZ + get(b"/sync/pull?wait=60"))
    assert client.read_reply().status == 200  # so the pull has arrived as well
    client.send(behind)
    client.close()
    until(lambda: not server.server.stats()["connections"])


def test_the_cleanup_of_a_route_whose_client_resets_is_not_cancelled(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mizusync, "PEER_CHECK", 0.01)
    entered, cleaned = threading.Event(), threading.Event()

    async def slow(request: mizusync.Request) -> None:
        entered.set()
        try:
            await asyncio.sleep(PATIENCE)
        finally:
            await asyncio.sleep(3 * MOMENT)
            cleaned.set()

    client = start(route=slow).client()
    client.send(get(b"/it"))
    assert entered.wait(PATIENCE)
    client.reset()
    assert cleaned.wait(PATIENCE)


def test_a_server_listens_once_on_an_address_that_its_name_has_twice(
    engine: Engine,
) -> None:
    async def listen() -> None:
        async with Server(engine).listen("twice.localhost", 0) as (host, _):
            assert host == "127.0.0.1"

    with resolving("twice.localhost", "127.0.0.1", "127.0.0.1"):
        ask(listen())


def test_a_half_close_answers_a_pull_that_waits(client: RawClient) -> None:
    client.send(get(b"/sync/pull?wait=60"))
    client.half_close()
    client.sock.settimeout(SOON)
    assert client.read_reply().json["changes"] == []
    assert client.ended()


def test_a_pull_that_waits_does_not_keep_a_closed_connection(server: Live) -> None:
    clients = [server.client() for _ in range(20)]
    for client in clients:
        client.send(HEALTHZ + get(b"/sync/pull?wait=60"))
        assert client.read_reply().status == 200  # so the pull has arrived as well
        client.close()
    deadline = time.monotonic() + SOON
    while server.call(server.server.stats)["connections"]:
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.01)


def test_clients_that_connected_before_a_stop_are_answered(server: Live) -> None:
    entered, release = threading.Event(), threading.Event()

    def hold_and_stop() -> None:
        entered.set()
        release.wait(PATIENCE)
        server.stopping.set()

    server.loop.call_soon_threadsafe(hold_and_stop)
    assert entered.wait(PATIENCE)
    clients = [server.client() for _ in range(20)]  # not accepted yet
    for client in clients:
        client.send(HEALTHZ)
    release.set()
    assert [client.read_reply().status for client in clients] == [200] * len(clients)


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


def test_a_server_listens_on_every_address_of_a_name(engine: Engine) -> None:
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


def test_a_server_listens_on_a_link_local_address(engine: Engine) -> None:
    host = link_local_address()

    async def connect() -> None:
        async with Server(engine, token="s3cret").listen(host, 0) as address:
            socket.create_connection((host, address[1]), PATIENCE).close()

    ask(connect())


def test_acknowledged_changes_are_there_after_a_restart(tmp_path: Path) -> None:
    with serve(tmp_path) as live:
        results = live.client().push(note("a", 1), note("b", 2, scope="s"))
        epoch = live.client().pull()["epoch"]
    with serve(tmp_path) as live:
        client = live.client()
        assert client.pull()["changes"] == results[0]["changes"]
        assert client.push(note("b", scope="s")) == [results[1] | {"duplicate": True}]
        (result,) = client.push(note("c"))
        assert result["cursor"] > results[1]["cursor"]
        # After an ordinary restart, the client's cursor and epoch are still good.
        assert (
            len(client.pull(cursor=results[1]["cursor"], epoch=epoch)["changes"]) == 1
        )


def test_a_cursor_that_a_restored_copy_never_issued_is_unknown(tmp_path: Path) -> None:
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


def test_a_client_that_does_not_read_its_answers_is_disconnected(start: Start) -> None:
    live = start(send_timeout=MOMENT)
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
    RUDE_UPGRADE + text(b'{"topic": "subscribe", "data": {}}'),
    RUDE_UPGRADE + text(b"x" * 300)[:100],
    RUDE_UPGRADE + masked(CLOSE, b""),
]


def test_pipelined_requests_do_not_starve_other_tasks(start: Start) -> None:
    answered = 0
    answered_before_another_task: list[int] = []

    def count() -> None:
        answered_before_another_task.append(answered)

    def answer(request: mizusync.Request) -> None:
        nonlocal answered
        answered += 1
        if answered == 1:
            asyncio.get_running_loop().call_soon(count)

    client = start(route=answer).client()
    client.send(get(b"/it") * 500)
    for _ in range(500):
        assert client.read_reply().status == 200
    assert answered_before_another_task[0] < 5


def test_a_client_that_resets_before_its_answers_does_not_flood_the_log(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    live = start()
    before = live.tasks()
    for _ in range(20):
        client = live.client()
        client.send(get(b"/it") * 1000)
        client.reset()
    until(lambda: live.tasks() <= before)
    live.end()
    assert not [one for one in caplog.messages if "socket.send" in one]


def test_refused_handshakes_and_a_reset_leave_no_connection(start: Start) -> None:
    live = start(token="s3cret")
    for _ in range(5):
        client = live.client(receive_buffer=4096)
        client.sock.settimeout(MOMENT)
        with suppress(TimeoutError):
            client.send(RUDE_UPGRADE * 2000)
        client.reset()
    with closing(live.client()) as last:  # accepted after all of them
        assert last.request("GET", "/healthz").status == 200
    until(lambda: live.server.stats()["connections"] == 0)


def test_http_client_of_the_standard_library_is_served(server: Live) -> None:
    host, port = server.address
    with closing(http.client.HTTPConnection(host, port, PATIENCE)) as connection:
        chunks = iter([BODY[:9], BODY[9:]])
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/sync/push", chunks, headers)
        assert json.load(connection.getresponse())[0]["ok"]
        connection.request("GET", "/sync/pull")
        reply = connection.getresponse()
        assert len(json.load(reply)["changes"]) == 1
        assert not reply.will_close
        connection.request("HEAD", "/healthz")
        assert connection.getresponse().read() == b""
        connection.request("DELETE", "/healthz")
        assert connection.getresponse().status == 405


def test_a_refused_client_that_stays_is_closed_after_the_linger(start: Start) -> None:
    live = start(linger_timeout=MOMENT)
    client = live.client()
    client.send(b"nonsense\r\n\r\n")
    assert refused(client.read_reply(), 400)
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
                await asyncio.sleep(MOMENT)  # the server waits for its handler
            with pytest.raises(asyncio.CancelledError):
                await listening
        assert server.stats()["connections"] == 0
        async with server.listen("127.0.0.1", 0):
            pass

    ask(go())


def test_pipelined_pulls_that_wait_end_with_their_client(start: Start) -> None:
    live = start(max_pull_wait=MOMENT)
    client = live.client()
    client.send(get(b"/sync/pull?wait=60") * 4000)  # all of them would take minutes
    assert client.read_reply().status == 200
    client.close()
    until(lambda: live.server.stats()["connections"] == 0)


def test_a_client_that_sends_nothing_does_not_delay_a_stop(start: Start) -> None:
    live = start(shutdown_timeout=PATIENCE * 3)
    live.client()
    until(lambda: live.server.stats()["connections"] == 1)
    live.stop()
    until(lambda: live.loop.is_closed())


def test_a_reset_is_no_failure_on_a_loop_whose_closed_transports_refuse_all(
    start: Start,
) -> None:
    def refuse(**limits: int) -> None:
        raise RuntimeError("the handler is closed")  # as that of uvloop does

    live = start()
    client = live.client()
    assert client.request("GET", "/healthz").status == 200
    (connection,) = live.server._connections
    connection.transport.set_write_buffer_limits = refuse
    client.reset()
    until(lambda: live.server.stats()["connections"] == 0)


def test_resets_of_slow_sessions_are_not_logged_as_failures(start: Start) -> None:
    live, join = joined(start)
    clients = [live.socket(receive_buffer=4096) for _ in range(10)]
    for client in clients:
        join(client)
    for _ in range(30):  # their sockets are full
        live.call(live.server.publish, "news", "x" * 20_000)
    for client in clients:
        client.reset()
    until(lambda: live.server.stats()["connections"] == 0)


def test_a_large_answer_reaches_a_client_that_reads_slowly(start: Start) -> None:
    live = start(linger_timeout=MOMENT, route=lambda request: b"x" * 4_000_000)
    client = live.client(receive_buffer=4096)
    client.send(get(b"/it", b"Connection: close"))
    started, whole = time.monotonic(), bytearray()
    while piece := client.sock.recv(16384):
        whole += piece
        due = started + 3 * MOMENT * len(whole) / 4_000_000
        while time.monotonic() < due:  # it reads on and on, but slowly
            time.sleep(0.001)
    assert len(whole.partition(b"\r\n\r\n")[2]) == 4_000_000


def test_a_client_that_reads_slowly_is_not_taken_for_one_that_reads_nothing(
    start: Start,
) -> None:
    timeout = 4 * MOMENT
    live = start(send_timeout=timeout, route=lambda request: b"x" * 12_000_000)
    client = live.client()
    client.send(get(b"/it", b"Connection: close"))
    started, whole = time.monotonic(), bytearray()
    while piece := client.sock.recv(16384):
        whole += piece
        # For three times as long it reads less than the kernel can hold for it.
        due = started + 3 * timeout * min(1.0, len(whole) / 1_500_000)
        while time.monotonic() < due:
            time.sleep(0.001)
    assert len(whole.partition(b"\r\n\r\n")[2]) == 12_000_000


def test_no_more_readers_read_at_once_than_the_limit(start: Start) -> None:
    entered, most, release = list[str](), list[int](), threading.Event()

    def slow(db: Any, scope: str) -> None:
        entered.append(scope)
        most.append(len(entered))
        release.wait(PATIENCE)
        entered.remove(scope)

    live = start(readers=2, snapshot=slow)
    clients = [live.client() for _ in range(5)]
    for number, client in enumerate(clients):
        client.send(get(b"/sync/snapshot?scope=%d" % number))
    until(lambda: len(entered) == 2)
    # When this is answered, all five requests have arrived.
    assert live.client().request("GET", "/nowhere").status == 404
    release.set()
    assert [client.read_reply().status for client in clients] == [200] * 5
    assert max(most) == 2


def test_memory_holds_no_more_of_the_log_than_the_limit(tmp_path: Path) -> None:
    few, scopes = Settings(max_tail_size=10_000), [str(number) for number in range(9)]
    with closing(open_log(tmp_path / "log", settings=few)) as engine:
        push(engine, *(note(scope, "x" * 3000, scope=scope) for scope in scopes))
        for scope in scopes:
            assert len(pull(engine, scope=scope)["changes"]) == 1
        assert engine.stats()["pulls_from_memory"] <= 3


def test_a_transaction_takes_no_push_once_its_time_is_over(tmp_path: Path) -> None:
    entered, release = threading.Event(), threading.Event()
    at_once = Settings(max_commit_time=0.0)
    options = {"apply": stalled(entered, release), "settings": at_once}
    with closing(open_log(tmp_path / "log", **options)) as engine:
        futures = [engine.submit([note("first")])]
        assert entered.wait(PATIENCE)
        futures += [engine.submit([note(str(number))]) for number in range(3)]
        release.set()
        assert all(future.result(PATIENCE)[0].ok for future in futures)
        assert engine.stats()["commits"] == 4


def test_rude_clients_leave_nothing_behind(start: Start) -> None:
    # A pull may wait on after its client has half-closed, until its time is over.
    live = start(max_pull_wait=MOMENT, readers=1)

    def rudeness(times: int) -> tuple[int, int]:
        for number in range(times):
            client = live.client()
            client.send(RUDE[number % len(RUDE)])
            client.reset() if number % 3 else client.close()
        # This is accepted after all of them, and read from disk after their pulls.
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
    # Bytes: a connection that is kept would take thousands.
    assert after[1] - before[1] < 120 * 600


LINUX = pytest.mark.skipif(
    sys.platform != "linux", reason="counts descriptors in /proc"
)


@LINUX
def test_a_program_without_descriptors_lets_new_clients_wait(tmp_path: Path) -> None:
    with program("--db", str(tmp_path / "todos.db")) as running, ExitStack() as stack:

        def connect() -> RawClient:
            return stack.enter_context(closing(RawClient(running.address)))

        def spent() -> int:
            """Return the CPU time of the process, in clock ticks (proc(5))."""
            fields = (process / "stat").read_text().rpartition(") ")[2].split()
            user, system = fields[11:13]
            return int(user) + int(system)

        process, errors = Path(f"/proc/{running.process.pid}"), running.process.stderr
        first, limit = connect(), len(os.listdir(process / "fd")) + 20
        first.push(todo("create", id="1", title="x"))
        resource.prlimit(running.process.pid, resource.RLIMIT_NOFILE, (limit, limit))
        others, waiting = [connect() for _ in range(20)], connect()
        waiting.send(HEALTHZ)
        assert errors is not None
        watchdog = threading.Timer(PATIENCE, running.process.kill)
        watchdog.start()
        assert "new clients wait" in until(lambda: faults(errors.readline()))
        watchdog.cancel()
        for target in ("/sync/snapshot?scope=list", "/sync/pull?scope=new", "/healthz"):
            assert first.request("GET", target).status == 200  # the file can be opened
        before = spent()
        assert first.pull(scope="new", wait=0.4)["changes"] == []
        assert spent() - before < os.sysconf("SC_CLK_TCK") / 10  # nothing spins
        for _ in range(20):  # there is room, and there is none, again and again
            others.pop(0).close()
            others.append(connect())
            first.pull(scope="new", wait=0.01)
        assert first.push(todo("create", id="2", title="y"))[0]["ok"]
        for client in (*others, first):
            client.close()
        assert waiting.read_reply().status == 200
        waiting.close()
        status, _, complained = running.end(signal.SIGTERM)
        assert (status, faults(complained).count("\n") <= 1) == (0, True), complained


# --- Todo -----------------------------------------------------------------------------
# The demo is an application like any other.


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
    "a number as a title": (todo("create", id="2", title=7), "invalid_mutation"),
    "no title": (todo("create", id="2"), "invalid_mutation"),
    "no id": (todo("create", title="x"), "invalid_mutation"),
    "a list as an id": (todo("delete", id=[1]), "invalid_mutation"),
    "an empty title in an update": (
        todo("update", id="1", title=""),
        "invalid_mutation",
    ),
    "a string as completed": (
        todo("update", id="1", completed="yes"),
        "invalid_mutation",
    ),
    "no args": (todo("toggle") | {"args": None}, "invalid_mutation"),
    "another name": (todo("rename", id="1"), "invalid_mutation"),
}


def test_a_bad_todo_is_refused_with_its_code(todos: RawClient) -> None:
    todos.push(todo("create", id="1", title="x" * 1000))
    results = todos.push(*(mutation for mutation, _ in BAD_TODOS.values()))
    codes = [result["code"] for result in results]
    expected = {name: code for name, (_, code) in BAD_TODOS.items()}
    assert dict(zip(BAD_TODOS, codes, strict=True)) == expected
    data = todos.request("GET", "/sync/snapshot?scope=list").json["data"]
    assert len(data["todos"]) == 1


# --- Command line ---------------------------------------------------------------------
# The program as a user starts it, in a process of its own.

PROGRAM = Path(mizusync.__file__)


@contextmanager
def held(address: tuple[str, int]) -> Iterator[None]:
    """Keep other programs from the address of one that ended and will come back."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(address)  # and never listens
        yield


class Program:
    """`python mizusync.py` on a port of its own, and clients of it."""

    def __init__(
        self,
        *arguments: str,
        file: Path | None = None,
        folder: Path | None = None,
        **environment: str,
    ) -> None:
        self.clients = ExitStack()
        python = [sys.executable, "-X", "dev"]
        self.process = subprocess.Popen(
            [*python, str(file or PROGRAM), "--port", "0", *arguments],
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
        found = re.search(r"http://([^:/]+):(\d+)/", self.line)
        assert found, (self.line, self.process.communicate())
        self.address = (found[1], int(found[2]))

    def client(self) -> RawClient:
        return self.clients.enter_context(closing(RawClient(self.address)))

    def end(self, number: int) -> tuple[int, str, str]:
        """Send a signal; return the exit status and the rest of stdout and stderr."""
        self.process.send_signal(number)
        stdout, stderr = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, stdout, faults(stderr)


@contextmanager
def program(*arguments: str, **options: Any) -> Iterator[Program]:
    running = Program(*arguments, **options)
    try:
        yield running
    finally:
        running.clients.close()
        running.process.kill()
        running.process.communicate()


StartProgram = Callable[..., Program]


@pytest.fixture
def start_program(tmp_path: Path) -> Iterator[StartProgram]:
    """Start programs on one database; they end with the test."""
    database = str(tmp_path / "todos.db")
    with ExitStack() as stack:
        yield lambda *arguments, **options: stack.enter_context(
            program("--db", database, *arguments, **options)
        )


def run_to_its_end(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PROGRAM), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE, check=False
    )


class Refusal(NamedTuple):
    status: int
    sentence: str


Refuse = Callable[..., Refusal]


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Refuse:
    """Return a function that calls main() with arguments that it refuses.

    It runs in this process, since the start of another takes long."""

    def main(*arguments: str) -> Refusal:
        try:
            status: Any = mizusync.main(["--port", "0", *arguments])
        except SystemExit as end:
            status = end.code
        stdout, stderr = capsys.readouterr()
        assert (stdout, stderr[-1:]) == ("", "\n")
        return Refusal(status, stderr)

    return main


def test_the_program_announces_its_address_and_wants_a_scope(
    start_program: StartProgram, tmp_path: Path
) -> None:
    running = start_program()
    assert running.line == (
        f"mizusync {mizusync.__version__}: open"
        f" http://127.0.0.1:{running.address[1]}/ (data in {tmp_path / 'todos.db'})\n"
    )
    client = running.client()
    assert client.request("GET", "/healthz").json["status"] == "ok"
    assert refused(client.upgrade("/ws"), 401)


LOCKED_OUT = """
import mizusync

settings = mizusync.Settings(busy_timeout=600, shutdown_timeout=1)
engine = mizusync.Engine("log.db", apply=lambda db, mutation: [], settings=settings)
server = mizusync.Server(engine)
server.run("127.0.0.1", 0, announce=lambda line: print(line, flush=True))
"""


def test_a_stop_does_not_wait_for_the_lock_of_another_process(tmp_path: Path) -> None:
    script = tmp_path / "locked_out.py"
    script.write_text(LOCKED_OUT)
    environment = {"PYTHONPATH": str(PROGRAM.parent)}
    with (
        program(file=script, folder=tmp_path, **environment) as running,
        closing(sqlite3.connect(tmp_path / "log.db", isolation_level=None)) as db,
    ):
        db.execute("BEGIN IMMEDIATE")
        pusher = running.client()
        pusher.send(post(LENGTH))
        assert running.client().request("GET", "/healthz").status == 200
        # The program has PATIENCE to end; the writer would wait for 600 s.
        status, _, stderr = running.end(signal.SIGTERM)
        assert status == 0
        assert "the writer did not end in time" in stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_program_gracefully(
    start_program: StartProgram, tmp_path: Path, number: int
) -> None:
    running = start_program()
    session, waiting = running.client(), running.client()
    assert session.upgrade("/ws?scope=list").status == 101
    waiting.send(HEALTHZ + get(b"/sync/pull?wait=60"))
    assert waiting.read_reply().status == 200
    session.subscribe()
    running.process.send_signal(number)
    assert session.read_close() == 1001
    assert waiting.read_reply().json["changes"] == []
    waiting.close()
    stdout, stderr = running.process.communicate(timeout=PATIENCE)
    assert (running.process.returncode, stdout) == (0, "")
    assert "Traceback" not in stderr
    assert not (tmp_path / "todos.db-wal").exists()  # it was checkpointed


def test_a_second_signal_ends_the_program_at_once(start_program: StartProgram) -> None:
    running = start_program()
    session = running.client()
    assert session.upgrade("/ws?scope=list").status == 101
    running.process.send_signal(signal.SIGTERM)
    # The client does not answer the close, so the server waits.
    assert session.read_frame().opcode == CLOSE
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


def ends_at_a_second_signal(running: Program, session: RawClient, number: int) -> None:
    """Send a signal twice. The session tells that the first has arrived."""
    running.process.send_signal(number)
    assert session.read_frame().opcode == CLOSE
    running.process.send_signal(number)
    assert running.process.wait(PATIENCE) == -number


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_a_program_whose_writer_waits_for_a_lock(
    start_program: StartProgram, tmp_path: Path, number: int
) -> None:
    file = tmp_path / "server.py"
    file.write_text(WAITING_LONG)
    running = start_program(file=file, PYTHONPATH=str(PROGRAM.parent))
    session, pusher = running.client(), running.client()
    database = sqlite3.connect(tmp_path / "todos.db", isolation_level=None)
    with closing(database) as other:
        assert session.upgrade().status == 101
        other.execute("BEGIN IMMEDIATE")
        pusher.send(HEALTHZ + post(LENGTH))
        assert pusher.read_reply().status == 200  # so the push has arrived as well
        ends_at_a_second_signal(running, session, number)


NEVER_ENDING = """
import asyncio, contextlib, functools, mizusync, sys, time

async def stay(request):
    while True:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(600)

use = {"apply": lambda db, mutation: [], "snapshot": lambda db, scope: time.sleep(600)}
server = mizusync.Server(mizusync.Engine(sys.argv[-1], **use))
server.route("GET", "/stay")(stay)
server.run("127.0.0.1", 0, functools.partial(print, flush=True))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@table("path", {"a handler": b"/stay", "a snapshot": b"/sync/snapshot"})
def test_a_second_signal_ends_a_program_with_application_code_that_never_ends(
    start_program: StartProgram, tmp_path: Path, path: bytes, number: int
) -> None:
    file = tmp_path / "server.py"
    file.write_text(NEVER_ENDING)
    running = start_program(file=file, PYTHONPATH=str(PROGRAM.parent))
    session, waiting = running.client(), running.client()
    assert session.upgrade().status == 101
    waiting.send(HEALTHZ + get(path))
    assert waiting.read_reply().status == 200  # so the other has arrived as well
    ends_at_a_second_signal(running, session, number)


def test_a_program_that_was_killed_loses_nothing(start_program: StartProgram) -> None:
    running = start_program()
    client = running.client()
    sent = [todo("create", id=str(number), title="x") for number in range(50)]
    results = [client.push(one)[0] for one in sent]
    epoch = client.pull()["epoch"]
    running.process.kill()
    running.process.wait(PATIENCE)
    client = start_program().client()
    assert client.push(*sent) == [result | DUPLICATE for result in results]
    page = client.pull(scope="list", epoch=epoch)
    changes = [change for result in results for change in result["changes"]]
    assert page["changes"] == changes
    taken = client.request("GET", "/sync/snapshot?scope=list").json
    assert len(taken["data"]["todos"]) == 50


@pytest.mark.parametrize("how", ["an argument", "the environment"])
def test_the_program_has_options_for_access(
    start_program: StartProgram, how: str
) -> None:
    allowed = ("--allow-origin", "https://app.example", "--allow-host", "sync.example")
    token = ("--token", "s3cret") if how == "an argument" else ()
    environment = {} if token else {"MIZUSYNC_TOKEN": "s3cret"}
    headers = APP | {"Host": "sync.example"}
    running = start_program(*allowed, *token, **environment)
    assert "s3cret" not in running.line
    client = running.client()
    assert refused(client.request("GET", "/sync/pull", headers=headers), 401)
    headers |= {"Authorization": "Bearer s3cret"}
    reply = client.request("GET", "/sync/pull", headers=headers)
    assert reply.status == 200
    assert reply.headers["access-control-allow-origin"] == "https://app.example"
    assert "s3cret" not in running.end(signal.SIGTERM)[2]


@pytest.mark.parametrize("how", ["an argument", "the environment"])
def test_an_empty_token_is_exit_status_2(
    how: str, refusal: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIZUSYNC_TOKEN", "")
    token = ("--token", "") if how == "an argument" else ()
    status, sentence = refusal("--db", NOWHERE, *token)
    assert (status, "MIZUSYNC_TOKEN" in sentence) == (2, True)


@pytest.mark.parametrize("token", ["two words", "YWJj/Q=="])
def test_a_refused_token_is_not_printed(token: str, refusal: Refuse) -> None:
    status, sentence = refusal("--db", NOWHERE, "--token", token)
    assert (status, token in sentence) == (2, False)


OPEN = "is open to anybody"


@table(
    "case",
    {
        "every address": ("0.0.0.0", (), 1),
        "the loopback": ("127.0.0.1", (), 0),
        "every address, with a token": ("0.0.0.0", ("--token", "s3cret"), 0),
    },
)
def test_the_program_warns_once_if_everyone_may_use_it(
    start_program: StartProgram, case: tuple[str, tuple[str, ...], int]
) -> None:
    host, token, warnings = case
    running = start_program("--host", host, *token)
    assert running.end(signal.SIGTERM)[2].count(OPEN) == warnings


@table(
    "case",
    {
        "every address": ("0.0.0.0", {}, 1),
        "the loopback": ("127.0.0.1", {}, 0),
        "every address, with a token": ("0.0.0.0", {"token": "s3cret"}, 0),
        "every address, with on_auth": ("0.0.0.0", {"on_auth": Doors().now}, 0),
    },
)
def test_a_server_warns_once_if_everyone_may_use_it(
    engine: Engine, log: Records, case: tuple[str, dict[str, Any], int]
) -> None:
    host, options, warnings = case

    async def listen() -> None:
        async with Server(engine, **options).listen(host, 0):
            pass

    ask(listen())
    assert len([text for text in log.texts if OPEN in text]) == warnings


@pytest.mark.parametrize("name", ["donn\u00e9es.db", "\U0001f375.db"])
def test_an_announced_path_is_escaped_for_the_output(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with (
        program("--db", str(path), PYTHONIOENCODING="ascii") as running,
        closing(RawClient(running.address)) as client,
    ):
        assert name.encode("ascii", "backslashreplace").decode() in running.line
        assert client.request("GET", "/healthz").status == 200
        assert running.end(signal.SIGTERM)[0] == 0
    assert path.exists()


def test_a_program_runs_without_a_reader_of_its_announcement(tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        address = holder.getsockname()
    options = ["--db", str(tmp_path / "todos.db"), "--port", str(address[1])]
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as output:
        command = [sys.executable, str(PROGRAM), *options]
        running = subprocess.Popen(command, stdout=output)

    def is_serving() -> bool:
        assert running.poll() is None
        with suppress(ConnectionRefusedError), closing(RawClient(address)) as client:
            return client.request("GET", "/healthz").status == 200
        return False

    try:
        until(is_serving)
        running.send_signal(signal.SIGTERM)
        assert running.wait(PATIENCE) == 0
    finally:
        running.kill()
        running.wait()


def test_an_unread_log_delays_no_request_or_exit(start_program: StartProgram) -> None:
    running = start_program("--log-level", "debug")
    client = running.client()
    for _ in range(300):  # some 1,000 bytes of log each; a pipe holds 64 KiB
        assert client.request("GET", "/" + "x" * 900).status == 404
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(PATIENCE) == 0
    _, stderr = running.process.communicate(timeout=PATIENCE)
    assert stderr.count("x' -> 404") > 30


def test_a_graceful_exit_writes_the_whole_log(start_program: StartProgram) -> None:
    running = start_program("--log-level", "debug")
    client = running.client()
    for number in range(500):
        assert refused(client.request("GET", f"/{number}"), 404)
    status, _, stderr = running.end(signal.SIGTERM)
    logged = re.findall(r"GET '/([0-9]+)' -> 404", stderr)
    assert (status, logged) == (0, [str(number) for number in range(500)])


def test_an_exit_waits_until_a_slow_reader_has_read_the_log() -> None:
    reader, writer = os.pipe()
    handler = mizusync.LogWriter(writer)
    for number in range(mizusync.LOG_LINES):  # more than a pipe holds
        handler.handle(logging.makeLogRecord({"msg": f"{number} {'x' * 1000}"}))
    with os.fdopen(reader, "rb") as output, ThreadPoolExecutor(1) as pool:
        reading = pool.submit(output.read)
        handler.flush()  # which the logging module calls at exit
        os.close(writer)
        assert reading.result(PATIENCE).count(b"\n") == mizusync.LOG_LINES


def test_a_log_that_is_read_again_counts_the_lines_that_were_dropped() -> None:
    reader, writer = os.pipe()
    handler = mizusync.LogWriter(writer)
    os.set_blocking(reader, False)
    with os.fdopen(reader, "rb") as output, os.fdopen(writer, "wb"):
        for number in range(3 * mizusync.LOG_LINES):  # much more than a pipe holds
            handler.handle(logging.makeLogRecord({"msg": f"{number} {'x' * 100}"}))
        seen = bytearray()

        def dropped() -> int:
            seen.extend(output.read() or b"")
            found = re.findall(rb"^([0-9]+) log lines were dropped", seen, re.M)
            return sum(map(int, found))

        def written() -> int:
            return len(re.findall(rb"^[0-9]+ x+$", seen, re.M))

        until(lambda: dropped() + written() == 3 * mizusync.LOG_LINES)
        assert dropped() > 0


OLDER = [*Path.home().glob(".pyenv/versions/3.[89].*/bin/python"),
         *Path.home().glob(".pyenv/versions/3.10.*/bin/python")]  # fmt: skip


def test_an_old_python_gets_one_sentence() -> None:
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
def test_an_installed_older_python_gets_the_sentence(python: Path) -> None:
    command = [str(python), str(PROGRAM)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout) == (1, "")
    assert "3.11 or newer" in done.stderr


def test_the_program_prints_its_version() -> None:
    done = run_to_its_end("--version")
    assert (done.returncode, done.stdout) == (0, f"mizusync {mizusync.__version__}\n")


def test_the_program_without_its_page_explains_where_it_belongs(
    start_program: StartProgram, tmp_path: Path
) -> None:
    file = Path(shutil.copy(PROGRAM, tmp_path))
    reply = start_program(file=file).client().request("GET", "/")
    assert (reply.status, b"demo.html" in reply.body) == (200, True)


PART = "// === Part {}: something ===\n"


@table(
    "text",
    {
        "no page": None,
        "no parts": "<!doctype html>",
        "one part": PART.format("one"),
        "the parts in the wrong order": PART.format("two") + PART.format("one"),
        "a part that begins inside a line": " "
        + PART.format("one")
        + PART.format("two"),
    },
)
def test_without_part_one_beside_the_program_the_client_is_not_found(
    start_program: StartProgram, tmp_path: Path, text: str | None
) -> None:
    file = Path(shutil.copy(PROGRAM, tmp_path))
    if text is not None:
        (tmp_path / "demo.html").write_text(text)
    client = start_program(file=file).client()
    reply = client.request("GET", CLIENT)
    assert refused(reply, 404)
    assert "demo.html" in reply.json["error"]
    assert client.request("GET", "/sync/pull?scope=s").status == 200


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_the_client_is_cut_from_the_page_beside_the_program(
    start_program: StartProgram, tmp_path: Path, line_end: str
) -> None:
    file = Path(shutil.copy(PROGRAM, tmp_path))
    lines = ["<script>", "// === Part one: a ===", "", "export { A };  // caf\u00e9"]
    lines += ["", "// === Part two: b ===", "1;", "// === Part two: c ==="]
    (tmp_path / "demo.html").write_bytes(line_end.join(lines).encode())
    body = start_program(file=file).client().request("GET", CLIENT).body.decode()
    assert body.split("\n")[1:] == ["export { A };  // caf\u00e9", ""]


def test_a_bad_host_or_a_busy_port_is_one_sentence(
    tmp_path: Path, server: Live
) -> None:
    port = str(server.address[1])
    for option, value in (("--host", "127.0.0..1"), ("--port", port)):
        done = run_to_its_end(option, value, "--db", str(tmp_path / "todos.db"))
        assert (done.returncode, done.stdout) == (1, "")
        assert faults(done.stderr).count("\n") == 1
        assert value in done.stderr


def test_a_bad_argument_is_exit_status_2(refusal: Refuse) -> None:
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
def test_a_file_of_another_program_is_one_sentence_and_unchanged(
    tmp_path: Path, path: Path, content: bytes | None, refusal: Refuse
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
    tmp_path: Path, refusal: Refuse
) -> None:
    status, sentence = refusal("--db", str(orphan(tmp_path)))
    assert (status, sentence.count("\n")) == (1, 1)
    assert "-wal exists, but" in sentence


def test_a_missing_or_unwritable_folder_is_one_sentence(
    tmp_path: Path, refusal: Refuse
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "locked").mkdir(mode=0o500)
    places = ["nowhere/todos.db", "file/todos.db", ""]
    if os.geteuid() != 0:  # root may write everywhere
        places.append("locked/todos.db")
    for place in places:
        status, sentence = refusal("--db", str(tmp_path / place))
        assert (status, sentence.count("\n")) == (1, 1)


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


def fitted(text: str, places: Mapping[str, str]) -> str:
    """Return a text of the README with other ports or paths in it."""
    for there, here in places.items():
        assert text.count(there) == 1, there
        text = text.replace(there, here)
    return text


def steady(shown: str) -> str:
    """Without what is another one in each run."""
    shown = re.sub(r'"\d{4}-\d\d-\d\dT[0-9:.]+Z"', '"a time"', shown)
    return re.sub(r'"(epoch|database)":"[^"]+"', r'"\1":"a name"', shown).strip()


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
    (shell,) = blocks("sh", "A backup")
    places = {
        "/var/lib/seats/seats.db": str(tmp_path / "mizusync.db"),
        "/var/backups/seats.db": str(tmp_path / "backup.db"),
    }
    shell = fitted(shell, places | {"python3 ": f"{shlex.quote(sys.executable)} "})
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
        subprocess.run(["sh", "-ec", shell], cwd=tmp_path, check=True)
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


@pytest.fixture
def seats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """The application of the README, before its server runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Server, "run", lambda server, host, port: None)
    (application,) = blocks("python", "An application of your own")
    names: dict[str, Any] = {}
    exec(application, names)
    engine = names["engine"]
    assert isinstance(engine, Engine)
    return engine


def test_the_application_of_the_readme_works(seats: Engine) -> None:
    with serving(seats) as live:
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


def run_in_node(folder: Path, script: str, *arguments: str) -> list[str]:
    """Run a module that has the client where a page has it; return what it prints."""
    if (node := shutil.which("node")) is None:
        pytest.skip("no node to run the README's JavaScript with")
    (folder / "sync").mkdir()
    (folder / "sync" / "client.js").write_text(part_one(), encoding="utf-8")
    (folder / "package.json").write_text('{"type": "module"}', encoding="utf-8")
    (folder / "main.js").write_text(script, encoding="utf-8")
    done = subprocess.run(
        [node, "--no-warnings", "main.js", *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


# What a page has, and Node has not.
BROWSER = """
class WebStorage extends Map {
  get length() { return this.size; }
  key(index) { return [...this.keys()][index] ?? null; }
  getItem(key) { return this.get(key) ?? null; }
  setItem(key, text) { this.set(key, text); }
  removeItem(key) { this.delete(key); }
}
globalThis.localStorage = new WebStorage();
globalThis.sessionStorage = new WebStorage();
globalThis.location = new URL(process.argv[2]);
"""
# What the snippets of the README leave to the reader.
SEATS = """
const initial = {};
const apply = (seats, { data }) => ({ ...seats, [data.seat]: data.holder });
const predict = (seats, { args }) => ({ ...seats, [args.seat]: args.holder });
"""


def test_what_awaits_the_server_in_the_readme_tells_a_yes_and_a_no(
    seats: Engine, tmp_path: Path
) -> None:
    (awaiting,) = blocks("js", "Its page")
    script = f"""
        import {{ SyncClient }} from "./sync/client.js";
        {BROWSER} {SEATS}
        const client = new SyncClient({{ url: ".", scope: "gala", initial, apply }});
        client.start();
        {{ {awaiting} }}
        {{ {awaiting} }}
        await client.forget();
    """
    with serving(seats) as live:
        address = "http://{}:{}/".format(*live.address)
        shown = run_in_node(tmp_path, script, address)
    assert shown == ["yours", "conflict seat A1 is taken"]


# What the version before has kept: a list, and two mutations.
OLD_VISIT = """
const key = process.argv[3];
const state = [{ seat: "A1", holder: "Ann" }];
const saved = { generation: 0, cursor: 0, epoch: "e", database: "d", state };
localStorage.setItem(`${key} state`, JSON.stringify(saved));
for (const [id, name] of [["1", "seat.hold"], ["2", "seat.take"]]) {
  const mutation = { id, scope: "gala", name, args: { seat: "B2", holder: "Ann" } };
  sessionStorage.setItem(`${key} queue tab ${id}`, JSON.stringify(mutation));
}
"""


def test_what_the_readme_says_of_keys_versions_and_storages_is_so(
    seats: Engine, tmp_path: Path
) -> None:
    (options,) = blocks("js", "What the browser keeps")
    (storage,) = blocks("js", "SyncClient")
    key = readme("What the browser keeps").partition("`mizusync ")[2]
    key = "mizusync " + key.partition(" queue ")[0]
    script = f"""
        {BROWSER} {SEATS} {OLD_VISIT} {storage} {options}
        const show = (...values) => console.log(JSON.stringify(values));
        await client.ready;
        show(client.state, client.pending.map(({{ id }}) => id));
        client.start();
        await client.confirmed("2");
        client.close();
        const now = JSON.parse(localStorage.getItem(`${{key}} state`));
        show(now.version, now.state);

        const other = {{ url: ".", scope: "gala", initial, apply, storage }};
        const own = new SyncClient(other);
        own.start();
        await own.ready;
        own.close();
        const next = new SyncClient(other);
        await next.ready;
        show(next.state, states.size);
        await next.forget();
        show(states.size);
    """
    with serving(seats) as live:
        address = "http://{}:{}/".format(*live.address)
        for name, value in (("url", address), ("scope", "gala"), ("user", "")):
            key = key.replace(f"<{name}>", value)
        shown = run_in_node(tmp_path, script, address, key)
    taken = {"B2": "Ann"}
    assert [json.loads(line) for line in shown] == [
        [{"A1": "Ann", **taken}, ["2"]],
        [2, taken],
        [taken, 1],
        [0],
    ]


MEMBERS = """
import * as module from "./sync/client.js";
const { SyncClient } = module;
const options = { url: "http://a.example/", scope: "a", initial: 0, apply: () => 0 };
const client = new SyncClient(options);
console.log(Object.keys(module).join(" "));
const names = Object.getOwnPropertyNames;
const own = [...Object.keys(client), ...names(SyncClient.prototype)];
console.log([...own, ...names(SyncClient)].join(" "));
console.log(Object.keys(client.status).join(" "));
client.close();
"""


def test_the_readme_has_every_option_member_status_and_event_of_the_client(
    tmp_path: Path,
) -> None:
    tables = re.findall(
        r"^\| `?(\w+)`? \| \|\n\| --- \| --- \|\n((?:\|.*\n)+)",
        readme("SyncClient"),
        re.M,
    )
    shown = {
        head: set(
            re.findall(
                r"`(?:await |SyncClient\.)?(\w+)(?=[(`])",
                "".join(re.findall(r"^\|(.*?)\|", rows, re.M)),
            )
        )
        for head, rows in tables
    }
    exports, members, status = (
        set(line.split()) for line in run_in_node(tmp_path, MEMBERS)
    )
    hidden = {"constructor", "addEventListener", "removeEventListener"}
    of_functions = {"length", "name", "prototype"}
    (options,) = re.findall(r"@typedef \{object\} Options\n(.*?)\*/", part_one(), re.S)
    assert shown == {
        "option": set(re.findall(r"@property \{.*?\} \[?(\w+)", options, re.S)),
        "member": members - hidden - of_functions,
        "status": status,
        "event": set(re.findall(r'emit\("(\w+)"', part_one())),
    }
    (imported,) = re.findall(r"^`import \{ (.*?) \} from", readme("SyncClient"), re.M)
    assert set(imported.split(", ")) == exports


def test_the_proxy_of_the_readme_passes_on_all_that_the_client_asks_for(
    tmp_path: Path,
) -> None:
    (proxy,) = blocks("js", "React and TypeScript")
    script = f"const {{ server }} = {{ {proxy} }};"
    (shown,) = run_in_node(
        tmp_path, script + "console.log(JSON.stringify(server.proxy));"
    )
    target = {"target": "http://127.0.0.1:8080", "changeOrigin": False}
    assert json.loads(shown) == {"/sync": target, "/ws": {**target, "ws": True}}
    asked = re.findall(r'(?:request|addressOf)\("([\w/]+)"', part_one())
    assert {path.partition("/")[0] for path in asked} == {"sync", "ws"}


def test_the_contents_are_the_sections_and_no_section_uses_a_lower_one() -> None:
    source = Path(mizusync.__file__).read_text(encoding="utf-8")
    _, *sections = re.split(r"^# --- (.*?) -+$", source, flags=re.M)
    contents = (mizusync.__doc__ or "").partition("Contents")[2]
    listed = re.findall(r"^    (\S.*?)  +", contents, re.M)
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


def lines_by_name(source: str) -> dict[str, int]:
    """Return how many lines each class, function, method and constant has."""

    def walk(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, int]]:
        for node in body:
            lines = (node.end_lineno or 0) - node.lineno + 1
            if isinstance(node, ast.ClassDef):
                yield prefix + node.name, lines
                yield from walk(node.body, f"{node.name}.")
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield prefix + node.name, lines
            elif isinstance(node, ast.Assign):
                yield ast.unparse(node.targets[0]), lines

    return dict(walk(ast.parse(source).body))


def test_the_first_reading_exists_and_has_at_most_1000_lines() -> None:
    source = Path(mizusync.__file__).read_text(encoding="utf-8")
    laws = dict(re.findall(r"^# --- (.*?) -+\n((?:#.*\n)+)", source, re.M))
    lines = lines_by_name(source)
    text = (mizusync.__doc__ or "").partition("A first reading")[2].split("\n\n")[1]
    entries = re.findall(r"^    (\S.*?)  +(\w.*(?:\n {20,}.*)*)", text, re.M)
    total = 0
    for section, names in entries:
        total += laws[section].count("\n")
        total += sum(lines[name] for name in re.findall(r"[\w.]+", names))
    assert len(entries) > 10
    assert 800 < total <= 1000


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


def test_the_protocol_in_the_readme_names_the_limits_of_the_settings() -> None:
    limits = Settings()
    text = " ".join(f"{readme('HTTP')} {readme('WebSocket')}".split())
    for phrase in (
        f"array of 1 to {limits.max_push_mutations} mutations",
        f"(default {limits.pull_limit}, at most {limits.max_pull_limit:,})",
        f"({limits.max_pull_wait:.0f} at most)",
        f"after {limits.heartbeat:.0f} s of silence",
        f"at most {limits.max_hint_changes} changes",
        f"and {limits.max_hint_size >> 10} KiB",
    ):
        assert phrase in text


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
        ben.send_message("say", {"text": "nobody knows me"})
        assert ben.read_message()["topic"] == "error"
        for client, name, present, hearers in (
            (ann, "Ann", ["Ann"], [ann]),
            (ben, "Ben", ["Ann", "Ben"], [ann, ben]),
            (again, "Ann", ["Ann", "Ben"], [ann, ben, again]),
            (away, "Cy", ["Cy"], [away]),
        ):
            client.send_message("hello", {"name": name})
            for hearer in hearers:
                where = "attic" if client is away else "hall"
                assert hearer.read_message() == {
                    "topic": f"here:{where}",
                    "data": present,
                }
        ben.send_message("say", {"text": "tea?"})
        for hearer in (ann, again, ben):
            said = {"topic": "chat:hall", "data": {"name": "Ben", "text": "tea?"}}
            assert hearer.read_message() == said
        assert away.quiet()
        again.close()
        assert ben.read_message()["data"] == [
            "Ann",
            "Ben",
        ]  # one of her two pages is still open
        ann.reset()
        assert ben.read_message()["data"] == ["Ben"]
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
            while session.read_message()["data"]["cursor"] < 8:
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
    counts = {name: len(topic.subscribers) for name, topic in hub.topics.items()}
    return counts, len(asyncio.all_tasks())
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


def test_under_fastapi_one_socket_subscribes_to_several_scopes(
    under_fastapi: tuple[str, int],
) -> None:
    with (
        closing(RawClient(under_fastapi)) as client,
        followed(under_fastapi) as (socket, _),
    ):

        def send(topic: str, **data: Any) -> None:
            socket.send(json.dumps({"topic": topic, "data": data}))

        def receive(topic: str) -> Any:
            """Return the next message of a topic; others may come before it."""
            while (message := json.loads(socket.recv(PATIENCE)))["topic"] != topic:
                pass
            return message["data"]

        own, topic = "user:ann", "sync:user:ann"
        (before,) = client.push(create(scope=own), headers=ANN_7)
        send("subscribe", scope=own, changes=True)
        assert receive(topic) == {"cursor": before["cursor"]}
        (result,) = client.push(create(scope=own), headers=ANN_7)
        while (hint := receive(topic))["cursor"] < result["cursor"]:
            pass
        assert hint["changes"] == result["changes"]
        for name, scope, code in (
            ("subscribe", "user:ben", "forbidden"),
            ("subscribe", 7, "invalid_message"),
            ("unsubscribe", "", "invalid_message"),
            ("hello", own, "unknown_topic"),
        ):
            send(name, scope=scope)
            error = receive("error")
            assert error["code"] == code
            assert error.get("scope") == (scope if code == "forbidden" else None)
        socket.send("[]")
        assert receive("error")["code"] == "invalid_message"
        send("unsubscribe", scope=own)
        send("hello")
        receive("error")  # so the message before it was obeyed
        counts, _ = client.request("GET", "/load", headers=ANN_7).json
        assert counts == {"sync:demo": 1}


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
            stack.enter_context(closing(RawClient(under_fastapi, receive_buffer=4096)))
            for _ in "12"
        )
        for lazy in (slow, gone):
            assert lazy.upgrade("/ws?scope=demo", offer).status == 101
            lazy.send_message("subscribe", {"changes": True})
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
                cursor, count = slow.read_message()["data"]["cursor"], count + 1
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


def test_a_page_logs_in_and_its_client_works_until_the_token_ends(
    tmp_path: Path,
) -> None:
    (login,) = blocks("js", "Users and tokens")
    script = f"""
        import {{ SyncClient }} from "./sync/client.js";
        {BROWSER}
        const send = globalThis.fetch;
        globalThis.fetch = (path, init) => send(new URL(path, location), init);
        const user = "ann", password = "pass-a", initial = [];
        const apply = (items, {{ data }}) => [...items, data], predict = undefined;
        await fetch("/register",
          {{ method: "POST", body: JSON.stringify({{ user, password }}) }});
        {login}
        await client.confirmed(client.mutate("add", "milk"));
        console.log(JSON.stringify(client.state));
        client.stop();
        const stopped = new Promise((resolve) => {{
          const look = () => client.status.error?.action === "token" && resolve();
          client.addEventListener("status", look);
        }});
        client.mutate("add", "bread");
        client.start("of yesterday");
        await stopped;
        console.log(client.status.error.action, client.pending.length);
        client.start(token);
        await client.confirmed(client.pending[0]);
        console.log(client.state.length);
        await client.forget();
    """
    with recipe(
        "Users and tokens", tmp_path, signal.SIGTERM, SECRET="a secret" * 4
    ) as found:
        shown = run_in_node(tmp_path, script, "http://{}:{}/".format(*found["open"]))
    assert shown == ['[{"item":"milk","by":"ann"}]', "token 1", "2"]


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


# -- An existing SQLite database


PRODUCTS = "CREATE TABLE products (id INTEGER PRIMARY KEY, name TEXT, price INTEGER)"


def test_plain_sql_of_another_program_reaches_the_clients_of_an_adopted_database(
    tmp_path: Path,
) -> None:
    heading, path = "An existing SQLite database", tmp_path / "shop.db"
    edit = ("asyncio.sleep(0.25)", "asyncio.sleep(0.05)")
    make_database(path, PRODUCTS, "INSERT INTO products VALUES (1, 'tea', 3)")

    def product(id: int, name: str, price: int) -> dict[str, Any]:
        return {"id": id, "product": {"name": name, "price": price}}

    with (
        recipe(heading, tmp_path, signal.SIGTERM, edit) as found,
        closing(RawClient(found[""])) as client,
        closing(RawClient(found[""])) as session,
        closing(sqlite3.connect(path, isolation_level=None)) as cron,
    ):

        def heard() -> Any:
            return [one["data"] for one in session.read_message()["data"]["changes"]]

        start = client.request("GET", "/sync/snapshot?scope=shop").json
        assert start["data"] == {"1": {"name": "tea", "price": 3}}
        assert client.request("GET", "/sync/snapshot?scope=other").status == 403
        assert session.upgrade("/ws?scope=shop").status == 101
        assert session.subscribe(changes=True)["data"] == {"cursor": start["cursor"]}
        cron.execute("UPDATE products SET price = 4")
        assert heard() == [product(1, "tea", 4)]
        cron.execute("INSERT INTO products VALUES (2, 'milk', 1)")
        assert heard() == [product(2, "milk", 1)]
        cron.execute("DELETE FROM products WHERE id = 1")
        assert heard() == [{"id": 1, "product": None}]
        cron.execute("UPDATE products SET id = 3")
        gone, moved = sorted(heard(), key=lambda change: int(change["id"]))
        assert (gone, moved) == ({"id": 2, "product": None}, product(3, "milk", 1))
        wish = {"scope": "shop", "name": "price", "args": {"id": 3, "price": 2}}
        drain = {"id": "d", "scope": "shop", "name": "drain"}
        done, forged = client.push({"id": "p", **wish}, drain)
        assert [one["data"] for one in done["changes"]] == [product(3, "milk", 2)]
        assert forged["code"] == "invalid_mutation"
        assert heard() == [product(3, "milk", 2)]
        # More than a mutation may change; nothing is pushed while nothing waits.
        rows = [(number, "x", 1) for number in range(4, 1104)]
        cron.execute("BEGIN")
        cron.executemany("INSERT INTO products VALUES (?, ?, ?)", rows)
        cron.execute("COMMIT")
        last = done["cursor"] + 1100
        until(lambda: client.request("GET", "/healthz").json["cursor"] == last)
        (marks,) = cron.execute("SELECT count(*) FROM mizusync_mutations").fetchone()
        assert marks == 4 + 1 + 3


# -- Which lists am I in


LISTS = "Which lists am I in"


def lists_program(folder: Path) -> None:
    """Write the program that other recipes import."""
    (program,) = blocks("python", LISTS)
    (folder / "lists.py").write_text(program, encoding="utf-8")


def test_a_page_opens_a_client_for_each_list_that_its_user_is_in(
    tmp_path: Path,
) -> None:
    (page,) = blocks("js", LISTS)
    script = f"""
        import {{ SyncClient }} from "./sync/client.js";
        {BROWSER}
        function open(user, token) {{
          {page}
          return {{ mine, lists }};
        }}
        const until = (client, condition) => new Promise((resolve) => {{
          const look = () => condition() && resolve();
          client.addEventListener("change", look);
          look();
        }});
        const ann = open("ann", "ann-7"), ben = open("ben", "ben-8");
        const create = {{ id: "1", title: "Food" }};
        await ann.mine.confirmed(ann.mine.mutate("list.create", create));
        const food = ann.lists.get("1");
        await food.confirmed(food.mutate("member.add", "ben"));
        await until(ben.mine, () => ben.lists.has("1"));
        const members = ben.lists.get("1");
        await until(members, () => members.state.length === 2);
        console.log(JSON.stringify([ben.mine.state, members.state]));
        await food.confirmed(food.mutate("member.remove", "ben"));
        await until(ben.mine, () => ben.lists.get("1") === null);
        console.log(JSON.stringify([ben.mine.state, ann.mine.state, food.state]));
        process.exit(0);
    """
    with (
        recipe(LISTS, tmp_path) as found,
        closing(RawClient(found["open"])) as client,
    ):
        shown = run_in_node(tmp_path, script, "http://{}:{}/".format(*found["open"]))
        for scope, token, status in (
            ("list:1", "ann-7", 200),
            ("list:1", "ben-8", 403),
            ("user:ann", "ben-8", 403),
            ("other", "ann-7", 403),
            ("user:ann", "x", 401),
        ):
            bearer = {"Authorization": f"Bearer {token}"}
            reply = client.request("GET", f"/sync/pull?scope={scope}", headers=bearer)
            assert reply.status == status
    assert [json.loads(line) for line in shown] == [
        [{"1": "Food"}, ["ann", "ben"]],
        [{"1": None}, {"1": "Food"}, ["ann"]],
    ]


# -- Testing your own functions


def run_python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python on what stands in a folder, beside this module."""
    return subprocess.run(
        [sys.executable, "-X", "dev", *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=PATIENCE,
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(PROGRAM.parent),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # it starts in half the time
        },
        check=False,
    )


def test_the_tests_of_the_readme_pass_and_find_a_mistake(tmp_path: Path) -> None:
    lists_program(tmp_path)
    (tests,) = blocks("python", "Testing your own functions")
    (tmp_path / "test_lists.py").write_text(tests, encoding="utf-8")
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error"]
    done = run_python(tmp_path, *command)
    assert (done.returncode, done.stdout.count("7 passed")) == (0, 1), done.stdout
    program = tmp_path / "lists.py"
    text = program.read_text(encoding="utf-8")
    program.write_text(fitted(text, {"return False": "return user"}))
    done = run_python(tmp_path, *command)
    assert "2 failed, 5 passed" in done.stdout


# -- A schema migration


def test_missing_steps_run_once_and_together_and_no_newer_file_is_opened(
    tmp_path: Path,
) -> None:
    path = tmp_path / "seats.db"
    names: dict[str, Any] = {"apply": apply, "snapshot": None}
    exec(blocks("python", "A schema migration")[0], names)
    steps: list[str] = names["STEPS"]

    def opened() -> int:
        """Open the file as the recipe does; return its version."""
        with closing(names["open_engine"](path)) as engine:
            assert whole_log(engine) == []
        return int(query("PRAGMA user_version")[0][0])

    def query(sql: str) -> list[Any]:
        with closing(sqlite3.connect(path)) as db:
            return db.execute(sql).fetchall()

    later = steps.pop()
    assert opened() == 1
    make_database(path, "INSERT INTO seats VALUES ('gala', 'A1', 'Ann')")
    steps.append(later)
    assert [opened(), opened()] == [2, 2]
    assert query("SELECT * FROM seats") == [("gala", "A1", "Ann", 25)]
    steps.append("CREATE TABLE events (name TEXT); INSERT INTO nowhere VALUES (1);")
    with pytest.raises(StoreError, match="nowhere"):
        opened()
    assert query("SELECT name FROM sqlite_master WHERE name = 'events'") == []
    del steps[1:]
    with pytest.raises(SystemExit, match="newer version"):
        opened()


# -- Background work


def test_the_program_releases_what_was_held_for_long(tmp_path: Path) -> None:
    edits = ("HOLD = 600", "HOLD = 0"), ("asyncio.sleep(1)", "asyncio.sleep(0.1)")
    held_seat = {"scope": "gala", "name": "hold", "args": "A1"}
    with (
        recipe("Background work", tmp_path, signal.SIGTERM, *edits) as found,
        closing(RawClient(found[""])) as client,
    ):
        release = {"id": "r", "scope": "gala", "name": "release", "args": "A1"}
        done, forged = client.push({"id": "1", **held_seat}, release)
        assert (done["ok"], forged["code"]) == (True, "invalid_mutation")
        page = client.pull(scope="gala", cursor=done["cursor"], wait=PATIENCE)
        released = {"seat": "A1", "held": False}
        assert [change["data"] for change in page["changes"]] == [released]
        assert client.push({"id": "2", **held_seat})[0]["ok"]


def test_a_program_whose_background_work_fails_ends(tmp_path: Path) -> None:
    (text,) = blocks("python", "Background work")
    places = {"8080": "0", "LIMIT 100": "LIMIT nothing"}
    (tmp_path / "work.py").write_text(fitted(text, places), encoding="utf-8")
    done = run_python(tmp_path, "work.py")
    assert done.returncode == 1
    assert 'near "nothing"' in done.stderr


# -- A continuous copy


def test_a_copy_by_litestream_is_a_beginning_of_the_log_and_names_the_database(
    tmp_path: Path,
) -> None:
    if (litestream := shutil.which("litestream")) is None:
        pytest.skip("no litestream to copy with")
    heading, path = "A continuous copy", tmp_path / "seats.db"
    places = {
        "/var/lib/seats/seats.db": str(path),
        "/backup/seats": str(tmp_path / "copy"),
    }
    (config,) = blocks("yaml", heading)
    (tmp_path / "litestream.yml").write_text(fitted(config, places))
    (command,) = blocks("sh", heading)
    copy = tmp_path / "copy.db"
    places = {"/var/lib/seats/seats.db": str(path), "/var/backups/seats.db": str(copy)}
    name, *words = shlex.split(fitted(command, places))
    assert name == "litestream"
    with closing(open_log(path)) as engine:
        replicate = [litestream, "replicate", "-config", "litestream.yml"]
        with subprocess.Popen(replicate, cwd=tmp_path, stdout=subprocess.PIPE) as run:
            try:
                for number in range(20):
                    push(engine, note(f"{number}"))

                def restored() -> bool:
                    copy.unlink(missing_ok=True)
                    subprocess.run(
                        [litestream, *words], cwd=tmp_path, capture_output=True
                    )
                    if not copy.exists():
                        return False
                    with closing(open_log(copy)) as other:
                        log = whole_log(other)
                        assert log == whole_log(engine)[: len(log)]
                        assert database_of(other) == database_of(engine)
                        return len(log) == 20

                until(restored)
            finally:
                run.kill()


# -- Several processes


def test_a_script_pushes_beside_the_server_and_its_clients_hear_of_it(
    tmp_path: Path,
) -> None:
    lists_program(tmp_path)
    (script,) = blocks("python", "Several processes")
    (tmp_path / "script.py").write_text(script, encoding="utf-8")
    offer = {"Sec-WebSocket-Protocol": "mizusync, bearer.ann-7"}
    with (
        recipe(LISTS, tmp_path) as found,
        closing(RawClient(found["open"])) as session,
    ):
        assert session.upgrade("/ws?scope=user:ann", offer).status == 101
        assert session.subscribe(changes=True)["data"] == {"cursor": 0}
        for _ in range(2):
            done = run_python(tmp_path, "script.py")
            assert (done.stdout, done.stderr) == ("ok\n", "")
        hint = session.read_message()["data"]
        assert hint["cursor"] == 1


# -- TLS by nginx


class Front(NamedTuple):
    """A proxy, as the README configures it; only the ports and the paths are others."""

    port: int
    trusting: ssl.SSLContext

    def client(self) -> RawClient:
        client = RawClient(("127.0.0.1", self.port))
        client.sock = self.trusting.wrap_socket(
            client.sock, server_hostname="127.0.0.1"
        )
        return client


@contextmanager
def listening(
    process: subprocess.Popen[bytes], front: Front, log: Path
) -> Iterator[None]:
    """Wait until a proxy listens; end it after the block."""

    def listens() -> bool:
        assert process.poll() is None, log.read_text()
        with suppress(ConnectionRefusedError), closing(front.client()):
            return True
        return False

    try:
        until(listens)
        yield
    finally:
        process.terminate()
        process.wait(PATIENCE)


@contextmanager
def nginx(folder: Path, upstream: int) -> Iterator[Front]:
    if (
        command := shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    ) is None:
        pytest.skip("no nginx to go through")
    key, certificate = make_certificate(folder)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (text,) = blocks("nginx", "TLS by nginx")
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
    with listening(process, front, errors):
        yield front


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
        assert waiting.read_reply().json["changes"] == second["changes"]
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
        for _ in range(10):
            assert client.request("GET", "/healthz").status == 200
        with closing(live.client()) as other:
            # Connections that nginx did not keep would be closed while this pull waits.
            other.pull(wait=MOMENT)
            assert 2 <= live.server.stats()["connections"] < 10


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
    limits = Settings()
    found = readme("TLS by nginx") + readme("A service")

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


def test_the_endpoint_for_prometheus_says_what_it_reads(tmp_path: Path) -> None:
    (recipe,) = blocks("python", "Numbers")
    names: dict[str, Any] = {"mizusync": mizusync}
    with serve(
        tmp_path, prepare=lambda server: exec(recipe, names | {"server": server})
    ) as live:
        live.client().push(note("a"), note("b"), note("b"))
        reply = live.client().request("GET", "/metrics")
        assert reply.headers["content-type"] == "text/plain; version=0.0.4"
        # https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format
        family = r"# TYPE (mizusync_(\w+?)(_total)?) (counter|gauge)\n\1 (\d+)\n"
        about = f"""mizusync_info{{version="{mizusync.__version__}"}} 1\n"""
        kind, line, text = reply.body.decode().partition(about)
        assert (kind, line) == ("# TYPE mizusync_info gauge\n", about)
        assert re.sub(family, "", text) == ""
        found = {
            name: (kind, int(n)) for _, name, _, kind, n in re.findall(family, text)
        }
        assert (found["applied"], found["cursor"]) == (("counter", 3), ("gauge", 2))
        assert list(found) == list(live.server.stats())[1:]
        counters = [
            name for _, name, total, kind, _ in re.findall(family, text) if total
        ]
        assert counters == [name for name in found if found[name][0] == "counter"]
        assert sorted(counters) == sorted(explained_numbers("since the start"))


# -- A service


def seats_program(folder: Path) -> str:
    """Write the application as the service runs it; return its name."""
    (application,) = blocks("python", "An application of your own")
    (ending,) = blocks("python", "A service")
    beginning = application.partition("\nengine = ")[0]
    (folder / "seats.py").write_text(
        f"{beginning}\n{ending.replace('8080', '0')}", encoding="utf-8"
    )
    return "seats.py"


@contextmanager
def service(folder: Path, token: str = "t") -> Iterator[tuple[str, int]]:
    """Run the service's program on a database in this folder, until a clean stop."""
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(PROGRAM.parent),
        "STATE_DIRECTORY": str(folder),
        "MIZUSYNC_TOKEN": token,
    }
    command = [sys.executable, "-X", "dev", seats_program(folder)]
    log = folder / "stderr"
    with (
        log.open("w") as stderr,
        subprocess.Popen(command, stderr=stderr, cwd=folder, env=environment) as run,
    ):
        try:
            found = until(
                lambda: (
                    re.search(r"INFO mizusync: .*http://(.*):(\d+)", log.read_text())
                    or run.poll() is not None
                )
            )
            assert isinstance(found, re.Match), log.read_text()
            yield found[1], int(found[2])
            run.terminate()
            assert run.wait(PATIENCE) == 0
        finally:
            run.kill()


BEARER_T = {"Authorization": "Bearer t"}


def take(seat: str) -> dict[str, Any]:
    args = {"seat": seat, "holder": "Ann"}
    return {"id": seat, "scope": "gala", "name": "seat.take", "args": args}


def test_the_service_logs_who_was_refused_and_each_end_and_never_the_token(
    tmp_path: Path,
) -> None:
    with service(tmp_path, "secret-7") as address, ExitStack() as stack:
        right = {"Sec-WebSocket-Protocol": "mizusync, bearer.secret-7"}
        wrong = {"Sec-WebSocket-Protocol": "mizusync, bearer.secret-8"}
        named = {"Host": "sync.example"}
        for headers, status in (
            (right | named, 101),
            (wrong, 401),
            (right | {"Host": "evil.example"}, 403),
        ):
            client = stack.enter_context(closing(RawClient(address)))
            assert client.upgrade("/ws?scope=gala", headers).status == status
    lines = (tmp_path / "stderr").read_text()
    peer = r"127\.0\.0\.1:\d+"
    shown = (
        rf"INFO mizusync\.live: refused a WebSocket at '/ws' from {peer}: 401 .*\n"
        rf"INFO mizusync\.live: refused a WebSocket at '/ws' from {peer}: 403 .*\n"
        rf"INFO mizusync\.live: session \S+ of 'gala' from {peer} ended: '.*'\n"
    )
    assert re.search(shown, lines), lines
    assert "secret" not in lines
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(PROGRAM.parent)}
    done = subprocess.run(
        [sys.executable, "seats.py"],
        cwd=tmp_path,
        env=environment | {"STATE_DIRECTORY": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert (done.returncode, "MIZUSYNC_TOKEN" in done.stderr) == (1, True)


def test_the_unit_and_the_container_start_what_there_is(
    tmp_path: Path,
) -> None:
    (unit,) = blocks("ini", "A service")
    (install,) = blocks("sh", "A service")
    (start,) = re.findall(r"^ExecStart=(.+)", unit, re.M)
    assert start == "/usr/bin/python3 /srv/seats/seats.py"
    assert "-t /srv/seats mizusync.py demo.html seats.py\n" in install
    # With "=-" a missing file would be no error.
    (secrets,) = re.findall(r"^EnvironmentFile=(/.+)", unit, re.M)
    assert f"> {secrets})\n" in install
    (user,) = re.findall(r"^User=(.+)", unit, re.M)
    assert f"useradd --system --user-group {user}\n" in install
    (container,) = blocks("dockerfile", "In a container")
    (entry,) = re.findall(r"^ENTRYPOINT (.+)", container, re.M)
    _, script, *arguments = json.loads(entry)
    assert (script, mizusync.parse_args(arguments).port) == ("/srv/mizusync.py", 8080)
    if (analyze := shutil.which("systemd-analyze")) is None:
        pytest.skip("no systemd-analyze to check the unit with")
    (tmp_path / "seats.py").touch()
    path = tmp_path / "seats.service"
    places = {"/usr/bin/python3 /srv/seats": f"{sys.executable} {tmp_path}"}
    path.write_text(fitted(unit, places))
    done = subprocess.run(
        [analyze, "verify", path], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_shell_makes_a_token_that_root_alone_can_read(tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a token with")
    (install,) = blocks("sh", "A service")
    (command,) = re.findall(r"^\(umask.*\)$", install, re.M)
    file = tmp_path / "seats.env"
    subprocess.run(["sh", "-c", fitted(command, {"/etc/seats.env": str(file)})])
    assert file.stat().st_mode & 0o777 == 0o600
    (token,) = re.findall(r"^MIZUSYNC_TOKEN=(\S+)\n$", file.read_text())
    mizusync.validate_token(token)
    assert len(token) == 64


# -- A backup, and a restore


def run_shell(folder: Path, *headings: str) -> None:
    """Run the README's commands on the files in a folder, all but systemctl's."""
    (folder / "backups").mkdir(exist_ok=True)
    owner = f"-o {os.getuid()} -g {os.getgid()}"
    for heading in headings:
        text = "".join(blocks("sh", heading))
        text = re.sub("^systemctl .*\n", "", text, flags=re.M)
        text = text.replace("-o seats -g seats", owner)
        text = text.replace("/var/lib/seats", str(folder))
        text = text.replace("/var/backups", str(folder / "backups"))
        text = text.replace("python3 ", f"{shlex.quote(sys.executable)} ")
        subprocess.run(["sh", "-ec", text], check=True, timeout=PATIENCE)


@pytest.mark.parametrize("stop", ["a clean stop", "a crash"])
def test_a_restore_by_the_commands_of_the_readme_is_the_backup_again(
    tmp_path: Path, stop: str
) -> None:
    path = tmp_path / "seats.db"

    with service(tmp_path) as address, closing(RawClient(address)) as client:
        (first,) = client.push(take("A1"), headers=BEARER_T)
        assert first["ok"]
        run_shell(tmp_path, "A backup")
        assert client.push(take("B2"), headers=BEARER_T)[0]["ok"]
        if stop == "a crash":
            for suffix in ("", "-wal", "-shm"):
                shutil.copy(f"{path}{suffix}", f"{path}{suffix}.now")
    if stop == "a crash":
        for suffix in ("", "-wal", "-shm"):
            os.replace(f"{path}{suffix}.now", f"{path}{suffix}")
    else:
        assert not path.with_name("seats.db-wal").exists()
    run_shell(tmp_path, "A restore")
    assert path.stat().st_mode & 0o777 == 0o600
    with service(tmp_path) as address, closing(RawClient(address)) as client:
        reply = client.request("GET", "/sync/snapshot?scope=gala", headers=BEARER_T)
        assert reply.json["data"] == {"A1": "Ann"}
        late = f"/sync/pull?scope=gala&cursor={first['cursor'] + 1}"
        reply = client.request("GET", late, headers=BEARER_T)
        assert (reply.status, reply.json["code"]) == (410, "cursor_unknown")


# -- TLS by a proxy


@contextmanager
def caddy(folder: Path, upstream: int) -> Iterator[Front]:
    """A Caddy, as the README configures it; but for its port and its certificate."""
    if (command := shutil.which("caddy")) is None:
        pytest.skip("no caddy to go through")
    key, certificate = make_certificate(folder)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (text,) = blocks("caddyfile", "TLS by a proxy")
    here = f"https://sync.example:{port}, https://127.0.0.1:{port} {{\n"
    here += f"    bind 127.0.0.1\n    tls {certificate} {key}"
    places = {"sync.example {": here, "127.0.0.1:8080": f"127.0.0.1:{upstream}"}
    # Nothing of this machine is changed, and nobody is asked for a certificate.
    options = "admin off\n    auto_https off\n    skip_install_trust"
    text = f"{{\n    {options}\n}}\n{fitted(text, places)}"
    (folder / "Caddyfile").write_text(text)
    with (folder / "caddy.log").open("w") as log:
        process = subprocess.Popen(
            [command, "run", "--config", "Caddyfile", "--adapter", "caddyfile"],
            stderr=log,
            stdout=log,
            cwd=folder,
            env={"PATH": os.environ["PATH"], "HOME": str(folder)},
        )
    front = Front(port, ssl.create_default_context(cafile=certificate))
    with listening(process, front, folder / "caddy.log"):
        yield front


def test_caddy_passes_on_pushes_pulls_that_wait_sockets_and_refusals(
    tmp_path: Path,
) -> None:
    def prepare(server: Server) -> None:
        server.route("GET", "/metrics")(lambda request: "for those inside")

    options: Any = {"allow_host": ["sync.example"], "prepare": prepare}
    with (
        serve(tmp_path, may_log=".", **options) as live,
        caddy(tmp_path, live.address[1]) as front,
        closing(front.client()) as client,
        closing(front.client()) as waiting,
        closing(front.client()) as session,
    ):
        named = {"Host": f"sync.example:{front.port}"}
        named["Origin"] = f"https://sync.example:{front.port}"
        (first,) = client.push(note("a", scope="s"), headers=named)
        assert session.upgrade("/ws?scope=s", headers=named).status == 101
        assert session.subscribe()["data"] == {"cursor": first["cursor"]}
        before = live.engine.counts["pulls_from_memory"]
        late = f"/sync/pull?scope=s&wait=60&cursor={first['cursor']}"
        waiting.send_request("GET", late, headers=named)
        until(lambda: live.engine.counts["pulls_from_memory"] > before)
        (result,) = client.push(note("b", scope="s"))
        assert waiting.read_reply().json["changes"] == result["changes"]
        assert session.read_message()["data"] == {"cursor": result["cursor"]}
        evil = {**named, "Origin": "https://evil.example"}
        reply = client.request("GET", "/sync/pull", headers=evil)
        assert (reply.status, reply.json["code"]) == (403, "forbidden")
        assert client.request("GET", "/metrics").status == 404
        session.reset()  # it is gone without a word
        until(lambda: live.server.stats()["sessions"] == 0)


# -- What the log means


def test_the_readme_explains_every_warning_and_error_of_the_log() -> None:
    rows = re.findall(r"^\|(.*?)\|", readme("What the log means"), re.M)
    explained = set(re.findall(r"`([^`]+)`", "".join(rows)))
    source = Path(mizusync.__file__).read_text(encoding="utf-8")
    pattern = r'log\.(?:warning|error|exception)\(\s*"([^"]+)'
    lines = [re.sub("%[sr]", "...", line) for line in re.findall(pattern, source)]
    assert len(lines) > 15
    assert "log lines were dropped" in source
    explained.remove("log lines were dropped")
    starts = {
        next((words for words in explained if line.startswith(words)), line)
        for line in lines
    }
    assert starts == explained


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


def postgres_programs() -> Path:
    """Return the folder of PostgreSQL's programs; skip the test if there is none."""
    found = (
        shutil.which("initdb"),
        *sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb")),
    )
    if not any(found):
        pytest.skip("no PostgreSQL server to run the store on")
    return Path(str(list(filter(None, found))[-1])).parent


@contextmanager
def postgres_server(folder: Path) -> Iterator[None]:
    """A PostgreSQL of our own in this folder, which refuses to be root."""
    initdb = postgres_programs() / "initdb"
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
    test_each_engine_and_each_opening_give_a_database_the_same_name,
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


def test_a_database_in_postgres_keeps_its_name_until_it_is_renamed(
    on_postgres: Postgres, path: Path
) -> None:
    with closing(open_log(path)) as engine:
        push(engine, note("1"))
        first = database_of(engine)
        on_postgres.back_up(path)
        push(engine, note("lost"))
        on_postgres.put_back(path)
        assert database_of(engine) == first
        rename = "UPDATE mizusync_epochs SET epoch = 'renamed' WHERE number = 1"
        on_postgres.run(rename, path)
        assert database_of(engine) == "renamed"
        with pytest.raises(mizusync.CursorUnknown):
            pull(engine, 0, epoch=first)
        push(engine, note("2"))
        assert fold(whole_log(engine)) == [None, None]


def test_a_copy_of_a_postgres_log_takes_over_a_part_of_the_scopes(
    on_postgres: Postgres, path: Path
) -> None:
    with closing(open_log(path)) as engine:
        push(engine, note("1", scope="stays"), note("2", scope="moves"))
        page = pull(engine, scope="moves")
    shard = copy.copy(on_postgres)
    shard.server = on_postgres.server.replace("dbname=postgres", "dbname=shard")
    host = on_postgres.server.split()[0].removeprefix("host=")
    dump = ("pg_dump", "-n", on_postgres.schemas[path], "postgres")
    restore = ("psql", "-v", "ON_ERROR_STOP=1", "shard")
    done = b""
    for name, *options in (("createdb", "shard"), dump, restore):
        program = str(postgres_programs() / name)
        command = [program, "-h", host, "-U", "postgres", *options]
        done = subprocess.run(
            command, input=done, check=True, capture_output=True, timeout=PATIENCE
        ).stdout
    with (
        closing(on_postgres.open_log(path)) as first,
        closing(shard.open_log(path)) as second,
    ):
        cursor, epoch = page["cursor"], page["epoch"]
        assert pull(second, cursor, epoch=epoch, scope="moves")["changes"] == []
        (again,) = push(second, note("2", scope="moves"))
        assert again["duplicate"]
        for engine, scope in ((first, "stays"), (second, "moves")):
            (result,) = push(engine, note("3", scope=scope))
            changes = pull(engine, 2, epoch=epoch, scope=scope)["changes"]
            assert changes == result["changes"]
        assert database_of(first) == database_of(second)


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
from mizusync import check_todo

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

function add(id, work, wait) {
  // As browsers do.
  timers.set(id, { at: now + (wait >= 1 && wait < 2 ** 31 ? wait : 1), work });
  return id;
}
const later = (work, wait = 0, ...given) => add(++number, () => work(...given), wait);
const every = (work, gap, id = ++number) =>
  add(id, () => (every(work, gap, id), work()), gap);
const forget = (id) => void timers.delete(id);
const sleep = (seconds) => new Promise((resolve) => later(resolve, 1000 * seconds));
globalThis.simulated = {
  setTimeout: later, clearTimeout: forget, setInterval: every, clearInterval: forget,
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
    now = Math.max(now, first[1].at);
    first[1].work();
  }
}

/** What the client says to the developer, and errors that nobody caught. A script that
 * expects some takes them with reports(); others fail it. */
const words = [];
for (const way of ["error", "warn"]) {
  console[way] = (...said) => words.push(said.map(String).join(" "));
}
for (const event of ["unhandledRejection", "uncaughtException"]) {
  process.on(event, (error) => words.push(`${event}: ${error?.stack ?? error}`));
}
const reports = () => words.splice(0);

/** Give the page a global for as long as the script runs. */
const undo = [];
function setGlobal(name, value) {
  const old = Object.getOwnPropertyDescriptor(globalThis, name);
  undo.push(() => {
    delete globalThis[name];
    if (old) Object.defineProperty(globalThis, name, old);
  });
  Object.defineProperty(globalThis, name, { value, configurable: true });
}
/** A window whose events a script dispatches. */
function makePage() {
  const page = new EventTarget(), document = { hidden: false };
  setGlobal("addEventListener", page.addEventListener.bind(page));
  setGlobal("document", document);
  return Object.assign(page, {
    document,
    tell: (event) => page.dispatchEvent(new Event(event)),
    hide(hidden = true) { document.hidden = hidden, page.tell("visibilitychange"); },
  });
}
/** Locks; `tab` says who asks, and end(tab) is the end of all that it holds. */
function makeLocks() {
  const held = new Map(), locks = {
    held, tab: "",
    end(tab) { for (const [name, by] of held) if (by === tab) held.delete(name); },
    async request(name, { ifAvailable }, work) {
      assert.ok(ifAvailable);  // who waited would win it from a tab that is reloaded
      if (held.has(name)) return work(null);
      held.set(name, locks.tab);
      await work({});
      held.delete(name);
    },
  };
  setGlobal("navigator", { locks });
  return locks;
}

const fails = (name) => () => { throw new DOMException("It is not there.", name); };
/** A Web Storage; `limits` may have it full, or its page gone. */
function makeStorage(items = new Map(), limits = {}) {
  return {
    items, get length() { return items.size; },
    get queue() { return [...items.keys()].filter((key) => key.includes(" queue ")); },
    key: (index) => [...items.keys()][index] ?? null,
    getItem: (key) => items.get(key) ?? null,
    removeItem: (key) => limits.gone || items.delete(key),
    setItem(key, value) {
      if (limits.full) fails("QuotaExceededError")();
      if (!limits.gone) items.set(key, value);
    },
  };
}
/** A Web Storage that throws at everything. */
function makeForbidden() {
  const storage = { get length() { return fails("SecurityError")(); } };
  for (const name of ["key", "getItem", "setItem", "removeItem"]) {
    storage[name] = fails("SecurityError");
  }
  return storage;
}

/** A storage of states that answers later, and writes as IndexedDB does: a position, a
 * state, and the changes since; and the mutations that are retained, by key and id.
 * `limits`: `load`, `save`, `retain` and `remove` may be "fails", "hangs" or seconds to
 * wait; its page may be gone, or go after the next save. */
function makeStates(rows = new Map(), limits = {}, memory = new Map()) {
  const trouble = async (kind) => {
    await track(new Promise(setImmediate));
    if (kind === "fails") fails("QuotaExceededError")();
    if (kind === "hangs") await NEVER;
    if (kind > 0) await sleep(kind);
    if (limits.gone) await NEVER;
  };
  const states = {
    rows, limits, saves: [],
    /** What is retained, of all scopes and users. */
    get memory() {
      const texts = [...memory.values()].flatMap((byId) => [...byId.values()]);
      return texts.map((text) => JSON.parse(text));
    },
    /** What is stored, with its changes beside it. */
    get saved() {
      const [row] = rows.values();
      return row && { ...row.position, ...JSON.parse(row.text) };
    },
    async load(key) {
      await trouble(limits.load);
      const row = rows.get(key);
      return row && { ...row.position, ...JSON.parse(row.text) };
    },
    async save(key, { state, ...position }, tail) {
      states.saves.push({ at: now, state, position, tail });
      await trouble(limits.save);
      const row = rows.get(key), old = row?.position;
      const { generation, cursor, epoch } = position;
      const isNewer = epoch === old?.epoch && cursor > old.cursor;
      const isOlder = generation < old?.generation ||
        (generation === old?.generation && !isNewer);
      if (isOlder) return old;
      const known = row && JSON.parse(row.text);
      const isSame = old?.epoch === position.epoch && old.version === position.version;
      const fresh = tail?.changes.filter((change) => change.cursor > old?.cursor) ?? [];
      const changes = [...known?.changes ?? [], ...fresh];
      const fits = isSame && old.cursor >= tail?.since && changes.length <= 200;
      const whole = { state, since: cursor, changes: [] };
      const content = fits ? { ...known, changes } : whole;
      rows.set(key, { position, text: JSON.stringify(content) });
      if (limits.crash) limits.gone = true, await NEVER;
      return position;
    },
    async retained(key) {
      await trouble(limits.load);
      return [...memory.get(key)?.values() ?? []].map((text) => JSON.parse(text));
    },
    async retain(key, added, removed) {
      await trouble(limits.retain);
      const byId = memory.get(key) ?? new Map();
      memory.set(key, byId);
      for (const one of added) byId.set(one.mutation.id, JSON.stringify(one));
      for (const id of removed) byId.delete(id);
    },
    async remove(key) {
      await trouble(limits.remove);
      rows.delete(key), memory.delete(key);
    },
  };
  return states;
}
const makeKept = () => ({ queue: makeStorage(), storage: makeStates() });
/** A browser whose tabs hear of each other's writes. Each call of the function that it
 * returns makes a tab. end() is its end without a word: it gives its locks back, and
 * nothing of it is stored or sent any more. */
function makeBrowser() {
  const locks = makeLocks(), maps = [new Map(), new Map(), new Map()], tabs = [];
  return (fake, options) => {
    const page = makePage(), tab = tabs.push(page), limits = {};
    const [items, rows, memory] = maps;
    const queue = makeStorage(items, limits), { setItem, removeItem } = queue;
    const tell = (key) => {
      const others = tabs.filter((other) => other !== page && !other.isFrozen);
      const event = () => Object.assign(new Event("storage"), { key });
      others.forEach((other) => other.dispatchEvent(event()));
    };
    queue.setItem = (key, text) => (setItem(key, text), tell(key));
    queue.removeItem = (key) => (removeItem(key), tell(key));
    const storage = makeStates(rows, limits, memory);
    const fetch = async (...call) => limits.gone ? NEVER : fake.fetch(...call);
    locks.tab = tab;
    const client = fake.make({ queue, storage, fetch, ...options });
    const end = () => {
      limits.gone = true;
      locks.end(tab);
      client.stop();
    };
    return Object.assign(client, { page, queue, storage, limits, end });
  };
}
const json = (value, status = 200, headers = {}) =>
  [JSON.stringify(value), { status, headers }];
const refuse = (status, code, headers) =>
  json({ code, error: "a reason" }, status, headers);
const html = (status) => ["<h1>Something on the way</h1>", { status }];

/** The actions of all errors that the client's status has from now on. */
function actionsOf(client) {
  const actions = new Set(), look = () => actions.add(client.status.error?.action);
  client.addEventListener("status", look);
  return actions;
}

/** What rejects when `signal` says so. */
function aborted(signal) {
  const end = new Promise((_, reject) => {
    if (signal.aborted) reject(signal.reason);
    signal.addEventListener("abort", () => reject(signal.reason));
  });
  end.catch(() => {});
  return end;
}
/** A body that comes in `pieces`, with `gap` seconds before each; null stalls. */
function trickle({ pieces, gap }, signal) {
  const encoder = new TextEncoder();
  return new ReadableStream({
    async start(control) {
      signal.addEventListener("abort", () => control.error(signal.reason));
      for (const piece of pieces) {
        await sleep(gap);
        if (signal.aborted) return;
        if (piece === null) await NEVER;
        control.enqueue(encoder.encode(piece));
      }
      control.close();
    },
  });
}

// --- A server of a few lines, for scripts that say what it answers. Its state is a
// list.
function makeFake(SyncClient) {
  const results = {}, ends = new Map();  // by id; of epochs that are over
  const fake = {
    // `held`: paths of requests that wait for a call.answer(); `instead`: other answers
    log: [], epoch: "1", database: "d", calls: [], sockets: [], refused: [],
    healed: [],
    held: new Set(), instead: {},
    get data() { return fake.log.map(({ data }) => data); },
    get head() { return fake.log.length; },
    add(data, scope = "s") {
      if (typeof scope !== "string") scope = "s";  // an index of forEach()
      fake.log.push({ cursor: fake.head + 1, scope, time: "", data });
      return { ok: true, cursor: fake.head, changes: fake.log.slice(-1) };
    },
    of: (scope = "s") => fake.log.filter((change) => change.scope === scope),
    apply({ id, args, scope }) {
      if (results[id]) return { ...results[id], duplicate: true };
      return results[id] = fake.add(args, scope);
    },
    push: ({ body }) => json(body.map(fake.apply)),
    pull({ query: { scope, cursor, epoch } }) {
      const isKnown = epoch === fake.epoch || cursor <= ends.get(epoch);
      if (epoch && !isKnown) return refuse(410, "cursor_unknown");
      const changes = fake.of(scope).filter((change) => change.cursor > cursor);
      const page = changes.slice(0, 1000), hasMore = page.length < changes.length;
      const newest = hasMore ? page.at(-1).cursor : fake.head;
      return json({ changes: page, cursor: newest, epoch: fake.epoch, hasMore });
    },
    snapshot: ({ query: { scope } } = { query: {} }) => json({
      data: fake.of(scope).map(({ data }) => data), cursor: fake.head,
      epoch: fake.epoch, database: fake.database,
    }),
    /** Go on with another history, of these data. */
    restore(epoch, ...data) {
      fake.rewind(epoch, 0);
      ends.clear();
      data.forEach(fake.add);
    },
    /** Go on from a backup that was made at this cursor. */
    rewind(epoch, cursor) {
      ends.set(fake.epoch, cursor);
      fake.epoch = epoch;
      fake.log.length = Math.min(fake.head, cursor);
      for (const id in results) if (results[id].cursor > cursor) delete results[id];
    },
    all: (path) => fake.calls.filter((call) => call.path === path),
    last: (path) => fake.all(path).at(-1),
    /** Answer the request that is held, as the server would now. */
    answer: (path) => fake.last(path).answer(fake[path](fake.last(path))),
    /** Add a change, and tell of it. */
    hint(data) {
      const { cursor, changes } = fake.add(data);
      fake.socket.say({ cursor, epoch: fake.epoch, after: cursor - 1, changes });
    },
    get socket() { return fake.sockets.at(-1); },
    async fetch(address, { headers, body, signal }) {
      const url = new URL(address), path = url.pathname.split("/").at(-1);
      const query = Object.fromEntries(url.searchParams), end = aborted(signal);
      const token = headers.Authorization?.replace("Bearer ", "") ?? "";
      const parsed = body && JSON.parse(body);
      const call = { address, path, query, headers, token, body: parsed, at: now };
      fake.calls.push(call);
      const answer = new Promise((resolve) => {
        call.answer = (value) => resolve(Array.isArray(value) ? value : json(value));
      });
      const [text, options] = fake.held.has(path)
        ? await Promise.race([answer, end])
        : await Promise.race([(fake.instead[path] ?? fake[path])(call), end]);
      return new Response(text.pieces ? trickle(text, signal) : text, options);
    },
    WebSocket: class {
      sent = []; readyState = 0; CONNECTING = 0; welcomed = new Set(["s"]);
      constructor(...asked) { this.asked = asked, fake.sockets.push(this); }
      get token() { return this.asked[1][1]?.replace("bearer.", "") ?? ""; }
      get scope() { return new URL(this.asked[0]).searchParams.get("scope"); }
      /** The scopes of its messages of this topic. */
      scopes(topic) {
        const found = this.sent.filter((message) => message.topic === topic);
        return found.map(({ data }) => data.scope);
      }
      send(text) {
        const { topic, data } = JSON.parse(text), { scope } = data;
        this.sent.push({ topic, data });
        if (topic === "unsubscribe") this.welcomed.delete(scope);
        if (topic !== "subscribe" || this.welcomed.has(scope)) return;
        this.welcomed.add(scope);
        queueMicrotask(() => this.say({ cursor: 0 }, scope));
      }
      close() { this.closed = true, this.readyState = 3; }
      open() {
        const isFirst = this.readyState !== 1;
        this.readyState = 1;
        if (isFirst) this.onopen?.({});
        this.say({ cursor: 0 });
      }
      say(data, scope = "s") { this.tell(`sync:${scope}`, data); }
      tell(topic, data) { this.onmessage?.({ data: JSON.stringify({ topic, data }) }); }
      end(code = 1006) { this.readyState = 3, this.onclose?.({ code }); }
    },
    make(options) {
      const client = new SyncClient({
        url: "http://fake", scope: "s", initial: [],
        queue: makeStorage(), storage: makeStates(),
        WebSocket: null, fetch: fake.fetch,
        apply: (state, { data }) => [...state, data],
        predict: (state, { args }) => [...state, args], ...options,
      });
      client.addEventListener("refused", ({ detail }) => fake.refused.push(detail));
      client.addEventListener("healed", ({ detail }) => fake.healed.push(detail));
      return client;
    },
    async start(options) {
      const client = fake.make(options);
      client.start();
      await quiet();
      return client;
    },
    async live(options) {
      const client = await fake.start({ WebSocket: fake.WebSocket, ...options });
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
  /** The server is killed while the request is under way. */
  async kill(go, { server, moment }) {
    const answer = go();
    answer.catch(() => {});
    await track(new Promise((resolve) => setTimeout(resolve, moment)));
    process.kill(server, "SIGKILL");
    return answer;
  },
  /** The page ends once the server has the request, and before it hears of it. */
  async vanish(go, line) {
    await go();
    line.limits.gone = true;
    return NEVER;
  },
};

/** Note what the client is told of the mutations that it pushed. */
function noteResults(address, { body }, [text, { status }]) {
  if (!address.endsWith("/push") || status !== 200) return;
  let results = [];
  try { results = JSON.parse(text); } catch {}  // it was torn
  JSON.parse(body).forEach(({ id }, index) => results[index]?.ok && told.add(id));
}

/** The line and the storages of a tab; those outlive it. */
function makeLine({ items, rows, memory }) {
  const line = { faults: [], lag: 0, isBlocked: false, limits: {} };
  line.queue = makeStorage(items, line.limits);
  line.storage = makeStates(rows, line.limits, memory);
  line.fetch = async (address, { signal, ...options }) => {
    if (line.limits.gone) return NEVER;
    const isLong = /wait=[1-9]/.test(address), fault = FAULTS[line.faults.shift()];
    const go = () => (isLong ? hold(address, options) : track(send(address, options)));
    const asked = fault ? fault(go, line) : go();
    const answer = await Promise.race([asked, aborted(signal)]);
    if (line.limits.gone) return NEVER;
    noteResults(address, options, answer);
    return new Response(...answer);
  };
  line.WebSocket = class {
    due = 0; waiting = [];
    constructor(address, protocols) {
      line.socket = this;
      if (line.isBlocked) return void later(() => this.end());
      this.socket = new WebSocket(real(address), protocols);
      this.socket.onopen = () => (this.waiting.shift()?.(), this.onopen?.());
      // A server that is killed during the upgrade is an error without a close.
      this.socket.onclose = this.socket.onerror = () => this.end();
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
    end() {
      if (this.isOver) return;
      this.isOver = true;
      this.close(), this.onclose?.({ code: 1006 });
    }
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

/** The module, as another page has it: nothing of one is shared with another's. */
const importClient = () => import(`./client.mjs?${++number}`);

let people = [];  // {client, line, kept, made: ids of mutations}
// Ids that a client was told ok, and refused; cursors that apply() met twice; what each
// event "healed" said.
const told = new Set(), refused = new Set(), repeated = [], healings = [];
async function open(person) {
  const { SyncClient } = await importClient();
  person.line = makeLine(person.kept);
  person.client = new SyncClient({
    url: "http://there", scope: "_default", initial: { todos: [] }, apply, predict,
    ...person.line,
  });
  person.client.addEventListener("refused", ({ detail }) =>
    refused.add(detail.mutation.id));
  person.client.addEventListener("healed", ({ detail }) => healings.push(detail));
  person.client.start();
}
function leave({ client, line }) {
  line.limits.gone = true;
  client.stop();
}

const calls = {
  async begin(address, isShared) {
    people.forEach(leave);
    for (const each of [timers, told, refused]) each.clear();
    repeated.length = healings.length = 0;
    place = address;
    const names = ["items", "rows", "memory"];
    const stores = [1, 2, 3].map(() =>
      Object.fromEntries(names.map((name) => [name, new Map()])));
    if (isShared) stores[2] = stores[1];
    people = stores.map((kept) => ({ kept, made: [] }));
    for (const person of people) await open(person);
  },
  /** Return the id of the mutation; null where the page has gone meanwhile. */
  edit(who, name, args) {
    if (people[who].line.limits.gone) return null;
    const { id } = people[who].client.mutate(name, args);
    people[who].made.push(id);
    return id;
  },
  look(who) { return people[who].client.state.todos; },
  fault(who, ...kinds) { people[who].line.faults.push(...kinds); },
  line(who, change) { Object.assign(people[who].line, change); },
  /** From now on, "fails", "hangs" or seconds: what a storage of states does. */
  storage(who, limits) { Object.assign(people[who].line.limits, limits); },
  drop(who) { people[who].line.socket?.end(); },
  mute(who) { if (people[who].line.socket) people[who].line.socket.isMute = true; },
  stop(who) { people[who].client.stop(); },
  start(who) { people[who].client.start(); },
  vanish(who) { leave(people[who]); },
  close(who) { people[who].client.close(); },
  open(who) {
    now += 10;
    return open(people[who]);
  },
  reload(who) {
    calls.vanish(who);
    return calls.open(who);
  },
  /** End between the next save and what it erases, if there is one soon. */
  async crash(who) {
    people[who].line.limits.crash = true;
    await pass(1.1);
    await calls.reload(who);
  },
  move(address) { place = address, people.forEach((_, who) => calls.drop(who)); },
  async pass(seconds) {
    await pass(seconds);
    people.forEach(({ line }) => line.socket?.hear());
    await quiet();
  },
  /** Without faults, for `least` seconds; then until all see the same and wait for
   * nothing, or for `most` more. */
  async converge(most, least = 40) {
    for (const { client, line } of people) {
      Object.assign(line, { faults: [], lag: 0, isBlocked: false });
      Object.assign(line.limits, { load: 0, save: 0 });
      client.start();
    }
    const end = now + 1000 * (least + most);
    const seen = ({ client }) => JSON.stringify(client.state.todos);
    const differs = ({ client, line }) =>
      client.pending.length || line.queue.queue.length
        || seen({ client, line }) !== seen(people[0]);
    // Until then one may wait who has not heard of the newest server.
    await calls.pass(least);
    while (now < end && people.some(differs)) await calls.pass(5);
    return {
      states: people.map(({ client }) => client.state.todos),
      made: people.map(({ made }) => made),
      waiting: people.map(({ client, line }) =>
        client.pending.length + line.queue.queue.length),
      told: [...told], refused: [...refused], repeated, healings,
      statuses: people.map(({ client }) => client.status),
    };
  },
  async script(text) {
    timers.clear(), reports();
    const { SyncClient, webStorage } = await importClient();
    const names = {
      assert, pass, quiet, sleep, json, refuse, html, reports, setGlobal, makePage,
      makeLocks, makeStorage, makeForbidden, makeStates, makeKept, makeBrowser,
      fake: makeFake(SyncClient), actionsOf, SyncClient, webStorage,
    };
    const Script = calls.script.constructor;
    try {
      const script = new Script(...Object.keys(names), text);
      const late = new Promise((_, reject) =>
        setTimeout(reject, 20e3, new Error("The script waits for ever.")).unref());
      await Promise.race([script(...Object.values(names)), late]);
      await quiet();
      assert.deepEqual(reports(), []);
    } finally {
      while (undo.length) undo.pop()();
    }
  },
};

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
    ours = "setTimeout, clearTimeout, setInterval, clearInterval, Date"
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
    "a mutation stays in the queue until the saved state contains it": """
        fake.held.add("push").add("pull");
        const queue = makeStorage(), storage = makeStates();
        const client = await fake.start({ queue, storage });
        fake.answer("pull");
        client.mutate("add", "a");
        assert.equal(queue.queue.length, 1);  // before mutate() returned
        await pass(1.1);
        fake.answer("push");
        await quiet();
        assert.deepEqual([client.pending, queue.queue.length, client.state],
          [[], 1, ["a"]]);
        fake.answer("pull");
        await pass(0.9);
        assert.deepEqual([storage.saved.changes, queue.queue.length, client.state],
          [[], 1, ["a"]]);
        await pass(0.2);
        assert.deepEqual([storage.saved.cursor, queue.queue, client.state],
          [1, [], ["a"]]);
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
        const queue = makeStorage(), client = await fake.start({ queue });
        client.mutate("add", "a");
        await quiet();
        const [{ mutation, code, error }] = fake.refused;
        assert.deepEqual([mutation.args, code, error], ["a", "conflict", "a reason"]);
        assert.deepEqual([client.state, client.status.waiting, queue.queue],
          [[], 0, []]);
        await pass(60);
        assert.equal(fake.all("push").length, 1);
    """,
    "401 twice and 403 stop it until it is started again": """
        for (const [status, code, action] of
          [[401, "unauthorized", "token"], [403, "forbidden", "start"]]) {
          fake.instead = { push: () => refuse(status, code) };
          const client = await fake.live({ token: "old" });
          assert.equal(fake.last("pull").token, "old");
          assert.deepEqual(fake.socket.asked[1], ["mizusync", "bearer.old"]);
          client.mutate("add", status);
          await quiet();
          const { running, error } = client.status, { length } = fake.calls;
          assert.deepEqual([running, error.status, error.code, error.action],
            [false, status, code, action]);
          assert.ok(fake.socket.closed);
          await pass(300);
          assert.deepEqual([fake.calls.length, client.status.waiting], [length, 1]);
          fake.instead = {};
          client.start("new");
          await pass(1);
          assert.equal(fake.last("push").token, "new");
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
          // Without any answer, a pull finds out first whose server is there now.
          const times = fake.all(status ? "push" : "pull").map(({ at }) => at);
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
        const queue = makeStorage(), client = await fake.start({ queue });
        client.mutate("add", "a");
        await pass(600);
        assert.ok(fake.all("push").length > 10);
        assert.deepEqual([fake.refused, client.pending.length], [[], 1]);
        assert.equal(client.status.online, true);  // it was heard
        code = "internal_error";
        fake.calls.length = 0;
        await pass(600);
        assert.equal(fake.all("push").length, 5);
        assert.deepEqual([fake.refused[0].code, client.state, queue.queue],
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
        const storage = makeStates(), client = await fake.start({ storage });
        fake.held.add("pull");
        fake.add("of another");
        client.mutate("add", "own");
        await pass(1.1);
        assert.deepEqual([storage.saved.cursor, client.state], [0, ["own"]]);
        fake.held.clear();
        fake.answer("pull");
        await quiet();
        assert.deepEqual(client.state, ["of another", "own"]);
    """,
    "a page is applied as a whole, or not at all": """
        let isBad = true;
        const apply = (state, { data }) => {
          if (data === "b" && isBad) throw new Error("a fault of the application");
          return [...state, data];
        };
        const storage = makeStates(), client = await fake.start({ storage, apply });
        fake.instead.snapshot = () => refuse(503, "unavailable");
        ["a", "b", "c"].forEach(fake.add);
        await pass(40);
        assert.deepEqual([client.state, storage.saved.cursor], [[], 0]);
        fake.instead = {};
        isBad = false;
        await pass(40);
        assert.deepEqual([client.state, storage.saved.cursor], [["a", "b", "c"], 3]);
        assert.match(reports()[0], /apply.. of change 2 failed: a fault/);
    """,
    "what apply fails on in a hint is reported, and a snapshot follows": """
        for (const fault of [undefined, new Error("a fault of the application")]) {
          const apply = (state, { data }) => {
            if (fault) throw fault;
          };
          const client = await fake.live({ apply }), seen = [];
          client.addEventListener("status", () => seen.push(client.status.error));
          fake.calls.length = 0;
          fake.hint("a");
          await quiet();
          const { action, message } = client.status.error;
          assert.deepEqual([action, client.status.online], ["report", true]);
          assert.ok(message.includes(fault?.message ?? "it returned undefined"));
          assert.equal(reports().length, 1);
          await pass(5);
          assert.deepEqual([client.state, client.status.error], [fake.data, null]);
          assert.equal(fake.all("snapshot").length, 1);
          client.stop();
        }
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
          [{ topic: "subscribe", data: { scope: "s", changes: true } }]);
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
          fake.hint(data);
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
        const queue = makeStorage(), storage = makeStates();
        fake.add("a");
        const client = await fake.start({ queue, storage });
        client.stop();
        client.mutate("add", "own");
        await pass(1.1);
        const again = fake.make({ queue, storage });
        await again.ready;
        assert.deepEqual([again.state, again.status.waiting], [["a", "own"], 1]);
        assert.ok(again.status.loaded);
        const { length } = fake.calls;
        again.start();
        await pass(2);
        assert.deepEqual([fake.calls.length > length, fake.all("snapshot").length],
          [true, 1]);
        assert.deepEqual([again.state, fake.data, queue.queue],
          [["a", "own"], ["a", "own"], []]);
    """,
    "without a socket its pulls wait for news": """
        fake.held.add("pull");
        const client = await fake.start();
        for (const data of [[], ["a"], ["a", "b"]]) {
          assert.equal(fake.last("pull").query.wait, data.length ? "25" : "0");
          data.slice(-1).forEach(fake.add);
          fake.answer("pull");
          await quiet();
          assert.deepEqual([client.state, fake.all("pull").length],
            [data, data.length + 2]);
        }
    """,
    "a page that nobody sees holds no connection": """
        makePage().document.hidden = true;
        const client = await fake.start();
        await pass(120);
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
        const client = await fake.start({ WebSocket: fake.WebSocket });
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
        const { length } = fake.sockets;
        while (fake.sockets.length === length) await pass(1);
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
    "after a close with 1008 it comes back once, with a new token": """
        let number = 0;
        const client = await fake.live({ token: () => `token${++number}` });
        fake.socket.end(1008);
        await pass(2);
        assert.deepEqual(fake.sockets.map(({ token }) => token), ["token1", "token2"]);
        fake.socket.end(1008);
        await pass(300);
        fake.add("a");
        await pass(40);
        assert.deepEqual([fake.sockets.length, client.state, number], [2, ["a"], 2]);
        client.stop(), client.start();
        await pass(2);
        assert.deepEqual([fake.sockets.length, fake.socket.token], [3, "token3"]);
        fake.socket.open();
        await pass(60);  // it was accepted, for as long as that
        fake.socket.say({ cursor: 1 });
        fake.socket.end(1008);
        await pass(2);
        assert.equal(fake.sockets.length, 4);
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
        const client = await fake.start({ WebSocket: fake.WebSocket });
        for (let time = 0; time < 300; time++) {
          if (!fake.socket.ended) {
            fake.socket.open(), fake.socket.end(fake.socket.ended = 1011);
          }
          await pass(1);
        }
        assert.ok(fake.sockets.length < 30, fake.sockets.length);
        client.stop();
    """,
    "on another network what is under way on the old one is given up at once": """
        const page = makePage(), client = await fake.live();
        fake.held.add("pull");
        fake.socket.say({ cursor: 1 });
        await quiet();
        fake.held.clear();
        fake.add("a");
        page.tell("online");
        await pass(2);
        assert.deepEqual([fake.sockets[0].closed, fake.sockets.length], [true, 2]);
        assert.deepEqual(client.state, ["a"]);
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
    "no storage stops it, however it fails, and it tells what a reload would lose": """
        const full = makeStorage(new Map(), { full: true });
        for (const queue of [full, makeForbidden(), null, undefined]) {
          const client = await fake.start({ queue });
          fake.held.add("push");
          client.mutate("add", "a");
          assert.equal(client.status.saved, false);
          await quiet();
          fake.held.clear();
          fake.answer("push");
          await pass(2);
          assert.deepEqual([client.state, client.status.waiting, client.status.saved],
            [fake.data, 0, true]);
          client.close();
        }
        for (const limits of [{ load: "fails", save: "fails" }, { save: "fails" }]) {
          const storage = makeStates(new Map(), limits), queue = makeStorage();
          const client = await fake.start({ storage, queue });
          client.mutate("add", "a");
          await pass(31);
          assert.deepEqual([client.state, client.status.saved], [fake.data, false]);
          assert.deepEqual(queue.queue, []);  // the server has it
          assert.match(reports().join(), /^SyncClient: the state is not saved: Quota/);
          limits.save = limits.load = 0;
          client.mutate("add", "b");
          await pass(31);
          assert.deepEqual([storage.saved.state, client.status.saved],
            [fake.data, true]);
          client.close();
        }
        const both = [{ queue: null, storage: null },
          { queue: full, storage: webStorage(full) },
          { queue: makeForbidden(), storage: webStorage(makeForbidden()) }];
        for (const kept of both) {
          const client = await fake.start(kept);
          client.mutate("add", "a");
          await pass(2);
          assert.deepEqual([client.state, client.status.waiting], [fake.data, 0]);
          assert.equal(client.status.saved, kept.storage === null);
          client.close();
          reports();
        }
    """,
    "it tells whether what waits would outlive a reload": """
        const limits = {}, seen = [];
        const client = fake.make({ queue: makeStorage(new Map(), limits) });
        client.addEventListener("status", () => seen.push(client.status.saved));
        for (limits.full of [false, true, false]) client.mutate("add", "a");
        // The second is still only in memory.
        assert.deepEqual(seen, [true, false, false]);
    """,
    "two tabs without locks lose nothing of each other's queue": """
        const kept = makeKept(), { queue } = kept;
        const one = fake.make(kept);
        one.mutate("add", 1);
        const two = fake.make(kept);
        two.mutate("add", 2), one.mutate("add", 3);
        assert.equal(queue.queue.length, 3);
        two.start();
        await pass(2);
        assert.deepEqual([fake.data, queue.queue.length], [[1, 2], 1]);
        one.start();
        await pass(40);
        assert.deepEqual([fake.data, queue.queue], [[1, 2, 3], []]);
        assert.deepEqual([one.state, two.state], [[1, 2, 3], [1, 2, 3]]);
    """,
    "with locks a tab's queue is its own until it closes": """
        const locks = makeLocks(), kept = makeKept();
        const open = (tab) => (locks.tab = tab, fake.make(kept));
        const one = open("one");
        one.mutate("add", 1);
        await quiet();
        // The lock came after it.
        assert.deepEqual([one.state, one.status.waiting], [[1], 1]);
        const two = open("two");
        await quiet();
        two.start();
        await pass(10);
        assert.deepEqual([fake.data, fake.all("push")], [[], []]);
        locks.end("one");
        await pass(10);
        assert.deepEqual([two.state, fake.data, kept.queue.queue], [[1], [1], []]);
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
        const queue = makeStorage(), old = fake.make({ queue });
        await pass(0.01);
        fake.make({ queue }).mutate("add", 1);  // the younger tab edits first
        await pass(0.01);
        old.mutate("add", 2);
        assert.deepEqual(fake.make({ queue }).state, [1, 2]);
        const key = queue.queue.at(-1);
        const ahead = key.replace(/[0-9]+$/, "9999999999999");
        queue.setItem(ahead, queue.getItem(key));
        queue.removeItem(key);
        const last = fake.make({ queue });
        last.mutate("add", 3);
        assert.deepEqual(fake.make({ queue }).state, [1, 2, 3]);
    """,
    "a pull that brings nothing changes nothing": """
        const queue = makeStorage(), storage = makeStates();
        const client = await fake.start({ queue, storage });
        await pass(1.1);
        let changes = 0;
        client.addEventListener("change", () => changes++);
        queue.setItem = () => { throw new Error("it was written again"); };
        await pass(300);
        assert.deepEqual([changes, storage.saves.length], [0, 1]);
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
        makeLocks();
        const queue = makeStorage(), one = fake.make({ queue });
        one.mutate("add", 1);
        await quiet();
        const two = fake.make({ queue }), other = fake.make({ queue, user: "ben" });
        two.start();
        await pass(10);
        assert.deepEqual([fake.data, other.state], [[], []]);
        one.close();
        await quiet();
        assert.equal(one.status.running, false);
        await pass(6);
        assert.deepEqual([two.state, other.state], [[1], []]);
        assert.deepEqual([fake.data, queue.queue], [[1], []]);
    """,
    "mutations keep their order over several reloads": """
        for (let round = 0; round < 10; round++) {
          const queue = makeStorage();
          for (const data of [1, 2, 3]) {
            fake.make({ queue }).mutate("add", data);
            await pass(0.01);
          }
          assert.deepEqual(fake.make({ queue }).state, [1, 2, 3]);
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
    "what predict does not understand is reported once, skipped, and pushed": """
        const bad = () => { throw new Error("It is of another form."); };
        for (const fault of [bad, () => undefined]) {
          const queue = makeStorage();
          fake.make({ queue }).mutate("add", "a");
          const predict = (state, { args }) =>
            args === "b" ? [...state, args] : fault();
          const client = await fake.start({ queue, predict });
          fake.held.add("push");
          for (const args of ["c", "b"]) client.mutate("add", args);
          assert.deepEqual(client.state, [...fake.data, "b"]);
          await pass(2);
          fake.held.clear();
          fake.answer("push");
          await pass(2);
          assert.deepEqual([client.state, queue.queue], [fake.data, []]);
          const said = reports();
          assert.equal(said.length, 2, said);
          assert.match(said[0], /predict.. of add failed: it (is|ret)/i);
          client.close();
        }
        assert.deepEqual(fake.data, ["a", "c", "b", "a", "c", "b"]);
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
        const queue = makeStorage(), storage = makeStates(), seen = [];
        const client = await fake.start({ queue, storage });
        fake.held.add("push").add("pull");
        const { length } = fake.all("pull");
        while (fake.all("pull").length === length) await pass(1);
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
        assert.deepEqual([client.state, client.pending, queue.queue.length],
          [["a"], [], 1]);
        const { cursor } = fake.last("pull").query;
        assert.notEqual(fake.last("pull"), before);
        fake.last("pull").answer(fake.pull({ query: { cursor } }));
        await pass(1.1);
        assert.deepEqual([client.state, queue.queue, storage.saved.cursor],
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
        assert.deepEqual([client.state, fake.sockets[0].closed], [["a"], true]);
        assert.ok(fake.sockets.length > 1);
    """,
    "what a crash left in both storages is shown once, and erased": """
        const kept = makeKept();
        const one = await fake.start(kept);
        one.mutate("add", "a");
        await quiet();
        kept.storage.limits.crash = true;
        await pass(1.1);  // saved, but the key is still there
        kept.storage.limits.crash = kept.storage.limits.gone = false;
        assert.deepEqual([kept.storage.saved.cursor, kept.queue.queue.length], [1, 1]);
        const two = await fake.start(kept);
        await pass(1.1);
        assert.deepEqual([fake.data, two.state, two.status.waiting], [["a"], ["a"], 0]);
        assert.deepEqual(kept.queue.queue, []);
    """,
    "a key goes also where the answer comes after the state was saved": """
        fake.instead.push = (call) => {
          fake.push(call);
          throw new TypeError("The answer was lost.");
        };
        const queue = makeStorage(), storage = makeStates();
        const client = await fake.live({ queue, storage });
        client.mutate("add", "a");
        await quiet();
        fake.socket.say({ cursor: 1 });
        fake.instead.push = () => refuse(503, "unavailable", { "Retry-After": "5" });
        await pass(2);
        assert.deepEqual([storage.saved.cursor, queue.queue.length], [1, 1]);
        fake.instead = {};
        await pass(9);
        assert.deepEqual([client.pending, queue.queue], [[], []]);
    """,
    "an older tab never overwrites a newer state": """
        for (const make of [makeStates, () => webStorage(makeStorage())]) {
          fake.restore("1");
          const storage = make(), old = await fake.start({ storage });
          await pass(1.1);
          old.stop();  // it sleeps
          const young = await fake.start({ storage });
          ["a", "b"].forEach(fake.add);
          await pass(40);
          fake.log.length = 1;
          old.start();
          await pass(2);
          assert.deepEqual(old.state, ["a"]);
          const load = async () => {
            const client = fake.make({ storage });
            await client.ready;
            client.close();
            return client.state;
          };
          assert.deepEqual(await load(), ["a", "b"]);
          young.stop(), old.stop();
          fake.restore("2", "x");
          young.start();
          await pass(2);
          // A later history wins, although its cursor is lower.
          assert.deepEqual(await load(), ["x"]);
          young.close(), old.close();
        }
    """,
    "a tab that slept over two histories heals, and goes on saving": """
        const kept = { ...makeKept(), keep: 0 };
        const old = await fake.start(kept), young = await fake.start(kept);
        ["a", "b", "c"].forEach(fake.add);
        await pass(40);
        old.stop();
        for (const epoch of ["2", "3"]) {
          fake.restore(epoch, `of ${epoch}`);
          await pass(40);
        }
        assert.equal(kept.storage.saved.generation, 2);
        young.close();
        old.start();
        await pass(2);
        assert.deepEqual(old.state, ["of 3"]);
        old.mutate("add", "x");
        await pass(5);
        assert.deepEqual([old.state, kept.storage.saved.cursor], [["of 3", "x"], 2]);
        assert.deepEqual(kept.queue.queue, []);
        old.stop();
        fake.restore("4", 1, 2, 3, 4, 5);
        const third = await fake.start(kept);
        await pass(2);
        third.close();
        assert.deepEqual([third.state, kept.storage.saved.epoch], [fake.data, "4"]);
        fake.restore("3", "of 3", "x");  // the server that the old tab knows is back
        old.start();
        old.mutate("add", "y");
        await pass(5);
        assert.deepEqual([old.state, kept.storage.saved.epoch],
          [["of 3", "x", "y"], "3"]);
        assert.deepEqual(kept.queue.queue, []);
    """,
    "the state is saved at most once a second, and at once when the page is hidden": """
        const page = makePage(), storage = makeStates();
        const client = await fake.live({ storage });
        for (let index = 0; index < 100; index++) {
          fake.hint(index);
          await pass(0.1);
        }
        const times = storage.saves.map(({ at }) => at);
        assert.ok(times.length >= 9 && times.length <= 11, times.length);
        assert.ok(times.slice(1).every((at, index) => at - times[index] >= 1000));
        for (const leave of [() => page.hide(), () => page.tell("pagehide")]) {
          await pass(2);
          fake.hint("last");
          leave();
          await quiet();
          assert.equal(storage.saved.cursor, fake.head);
        }
    """,
    "after the first save only the changes since are written, at most 200": """
        const storage = makeStates(), client = await fake.live({ storage });
        const hint = () => {
          fake.hint("x");
        };
        await pass(1.1);
        assert.equal(storage.saves[0].tail, null);
        for (const count of [1, 2, 3]) {
          for (let time = 0; time < count; time++) hint();
          await pass(1.1);
          const { since, changes } = storage.saves.at(-1).tail;
          assert.deepEqual([since, changes.length], [fake.head - count, count]);
        }
        assert.deepEqual([storage.saved.since, storage.saved.changes], [0, fake.log]);
        for (let time = 0; time < 201; time++) hint();
        await pass(1.1);
        assert.equal(storage.saves.at(-1).tail, null);
        assert.equal(storage.saved.changes.length, 0);
        hint();
        await pass(1.1);
        const again = fake.make({ storage });
        await again.ready;
        assert.deepEqual([storage.saved.changes.length, again.state], [1, fake.data]);
        again.close();
        await quiet();
        // A save that failed is made up for with the whole state.
        storage.limits.save = "fails";
        hint();
        await pass(1.1);
        storage.limits.save = 0;
        hint();
        await pass(31);
        assert.equal(storage.saves.at(-1).tail, null);
        assert.deepEqual([storage.saved.state, reports().length], [fake.data, 1]);
    """,
    "what the first edition kept is taken over once": """
        const key = 'mizusync ["http://fake/","s",""] ', queue = makeStorage();
        const first = { state: ["a"], cursor: 1, epoch: "1" };
        const mutation = { id: "i", scope: "s", name: "add", args: "b" };
        queue.setItem(`${key}base`, JSON.stringify(first));
        queue.setItem(`${key}queue 1-2 3`, JSON.stringify(mutation));
        const storage = makeStates(), client = fake.make({ queue, storage });
        await client.ready;
        assert.deepEqual([client.state, client.status.loaded], [["a", "b"], true]);
        fake.add("a");
        client.start();
        await pass(2);
        assert.deepEqual([fake.all("snapshot").length, client.state, queue.items.size],
          [0, ["a", "b"], 0]);
        assert.deepEqual([storage.saved.cursor, fake.data], [2, ["a", "b"]]);
        queue.setItem(`${key}base`, JSON.stringify({ ...first, state: ["old"] }));
        const again = fake.make({ queue, storage });
        await again.ready;
        assert.deepEqual(again.state, ["a", "b"]);
    """,
    "what the first edition kept stays until it is saved elsewhere": """
        const key = 'mizusync ["http://fake/","s",""] base', queue = makeStorage();
        const storage = makeStates(new Map(), { save: "fails" });
        fake.add("a");
        queue.setItem(key, JSON.stringify({ state: ["a"], cursor: 1, epoch: "1" }));
        const client = await fake.start({ queue, storage });
        await pass(2);
        assert.ok(queue.getItem(key));
        assert.deepEqual([client.status.saved, reports().length], [false, 1]);
    """,
    "a storage that hangs at the load is waited for 5 s, and then it works without": """
        fake.add("a");
        const storage = makeStates(new Map(), { load: "hangs" });
        const client = await fake.start({ storage });
        client.mutate("add", "b");
        await pass(4.9);
        assert.deepEqual([client.state, client.status.loaded, fake.calls.length],
          [["b"], false, 0]);
        await pass(0.2);
        assert.deepEqual([client.state, client.status.loaded, fake.data],
          [["a", "b"], true, ["a", "b"]]);
        assert.equal(client.status.saved, false);
        assert.match(reports()[0], /does not answer/);
        await pass(31);
        assert.deepEqual([client.status.saved, storage.saved.state],
          [true, ["a", "b"]]);
    """,
    "a storage that holds nonsense is as good as empty": """
        const values = ["{", "[]", "5", '"x"', "{}", '{"cursor":1}', "null"];
        for (const value of values) {
          const items = makeStorage(), key = 'mizusync ["http://fake/","s",""] ';
          items.setItem(`${key}state`, value);
          items.setItem(`${key}queue 1-1 1`, "{");
          items.setItem(`${key}base`, value);
          const client = fake.make({ queue: items, storage: webStorage(items) });
          client.addEventListener("change", () => assert.ok(client.state));
          await pass(1);
          assert.deepEqual([client.state, client.status.loaded], [[], false]);
          client.start();
          client.mutate("add", "a");
          await pass(2);
          assert.deepEqual([client.state, client.status.loaded], [fake.data, true]);
          client.close();
          reports();
        }
        assert.equal(fake.data.filter((data) => data === "a").length, 7);
    """,
    "a long queue drains with few pulls and few replays": """
        let replays = 0;
        const predict = (state, { args }) => (replays++, state);
        const apply = (state) => state + 1;
        fake.instead.snapshot = () => refuse(404, "not_found");
        const client = await fake.live({ predict, apply, initial: 0 });
        client.stop();
        for (let index = 0; index < 5000; index++) client.mutate("add", index);
        assert.equal(replays, 5000);
        fake.calls.length = 0;
        let changes = 0;
        client.addEventListener("change", () => changes++);
        const { push } = fake;
        fake.push = (call) => {
          const answer = push(call);
          fake.socket.say({ cursor: fake.head });
          return answer;
        };
        client.start();
        await quiet();
        fake.socket.open();
        await pass(1);
        assert.deepEqual([client.state, client.pending, fake.head], [5000, [], 5000]);
        assert.ok(fake.all("push").length <= 51, fake.all("push").length);
        assert.ok(fake.all("pull").length <= 10, fake.all("pull").length);
        assert.ok(replays <= 25e3, replays);
        assert.ok(changes <= 70, changes);
    """,
    "loaded is told as soon as there is a state, and ready resolves then": """
        fake.held.add("snapshot");
        const kept = makeKept(), seen = [];
        const client = fake.make({ WebSocket: fake.WebSocket, ...kept });
        client.ready.then(() => seen.push(client.state));
        client.addEventListener("status", () => {
          if (client.status.loaded) seen.push("loaded");
        });
        client.start();
        await quiet();
        fake.socket.open();
        await pass(1);
        assert.deepEqual([client.status.live, client.status.loaded, seen],
          [true, false, []]);
        fake.add("a");
        fake.last("snapshot").answer(fake.snapshot());
        await quiet();
        assert.deepEqual([client.status.loaded, seen[0]], [true, "loaded"]);
        assert.deepEqual(seen.at(-1), ["a"]);
        await pass(2);
        client.close();
        const offline = fake.make(kept);
        assert.equal(offline.status.loaded, false);
        await offline.ready;
        assert.deepEqual([offline.state, offline.status.loaded], [["a"], true]);
        const closed = fake.make();
        await quiet();
        closed.close();
        await assert.rejects(closed.ready, { code: "closed" });
    """,
    "pending is the same array while nothing changes": """
        const client = await fake.live(), { pending } = client;
        assert.equal(client.pending, pending);
        fake.held.add("push");
        const own = client.mutate("add", 1), after = client.pending;
        assert.notEqual(after, pending);
        assert.deepEqual(after, [own]);
        fake.hint("x");
        await pass(10);
        assert.equal(client.pending, after);
        const { state } = client;
        await pass(10);
        assert.equal(client.state, state);
        fake.held.clear();
        fake.answer("push");
        await quiet();
        assert.notEqual(client.pending, after);
        assert.equal(after.length, 1);
    """,
    "there is one change event for one update": """
        const client = await fake.live(), seen = [];
        client.addEventListener("change", () =>
          seen.push([client.state.length, client.pending.length]));
        const update = async (act, ...expected) => {
          seen.length = 0;
          act();
          await quiet();
          assert.deepEqual(seen, expected);
        };
        fake.held.add("push").add("pull");
        await update(() => client.mutate("add", 1), [1, 1]);
        await update(() => {
          fake.answer("push");
        }, [1, 0]);
        const hint = { cursor: 1, epoch: "1", after: 0, changes: fake.log };
        await update(() => fake.socket.say(hint), [1, 0]);
        ["x", "y"].forEach(fake.add);
        fake.socket.say({ cursor: 3 });
        await quiet();
        await update(() => fake.answer("pull"), [3, 0]);
        await update(() => fake.socket.say({ cursor: 3 }));
    """,
    "confirmed resolves when the confirmed state contains the mutation": """
        fake.held.add("push").add("pull");
        const queue = makeStorage(), client = fake.make({ queue }), seen = [];
        const first = client.mutate("add", 1);
        client.start();
        await quiet();
        client.confirmed(first).then(() => seen.push(1));
        client.confirmed(first.id).then(() => seen.push(2));
        fake.answer("push");
        await quiet();
        assert.deepEqual([client.pending, seen], [[], []]);
        fake.held.clear();
        fake.answer("pull");
        await quiet();
        assert.deepEqual(seen.sort(), [1, 2]);
        await client.confirmed(first);  // also afterwards
        await assert.rejects(client.confirmed("no such"), { code: "unknown" });
        await assert.rejects(fake.make().confirmed(first),
          { code: "unknown", mutation: first });
    """,
    "confirmed finds a mutation by its id after a reload": """
        const queue = makeStorage(), { id } = fake.make({ queue }).mutate("add", 1);
        const client = fake.make({ queue });
        let isConfirmed = false;
        client.confirmed(id).then(() => { isConfirmed = true; });
        await pass(5);
        assert.equal(isConfirmed, false);
        client.start();
        await pass(1);
        assert.ok(isConfirmed);
    """,
    "confirmed rejects what is refused, and what is open when the client closes": """
        const error = "a reason", refusal = { ok: false, code: "conflict", error };
        fake.instead.push = () => json([refusal]);
        const client = await fake.start(), mutation = client.mutate("add", 1);
        const expected = { name: "Error", code: "conflict", mutation };
        await assert.rejects(client.confirmed(mutation), expected);
        await assert.rejects(client.confirmed(mutation),
          (failure) => failure.error === error || failure.message === error);
        fake.held.add("push");
        const other = client.mutate("add", 2), waiting = client.confirmed(other);
        await quiet();
        client.close();
        await assert.rejects(waiting, { code: "closed" });
        await assert.rejects(client.confirmed(other), { code: "closed" });
    """,
    "what apply fails on in a page is reported, and a snapshot follows": """
        for (const fault of [() => { throw new Error("a fault"); }, () => undefined]) {
          const storage = makeStates();
          const client = await fake.start({ storage, apply: () => fault() });
          await pass(1.1);
          const seen = actionsOf(client);
          fake.add("a");
          await pass(40);
          assert.deepEqual([client.state, client.status.error], [fake.data, null]);
          assert.deepEqual([...seen], ["report", undefined]);
          assert.ok(storage.saves.every(({ state }) => Array.isArray(state)));
          assert.deepEqual([storage.saved.state, reports().length], [fake.data, 1]);
          client.close();
        }
    """,
    "what apply fails on at the load is reported, and a snapshot replaces it": """
        for (const fault of [() => { throw new Error("a fault"); }, () => undefined]) {
          fake.restore("1");
          const storage = makeStates(), first = await fake.start({ storage });
          fake.restore("2", "a");
          await pass(40);
          fake.add("b");
          await pass(40);
          first.close();
          await quiet();
          const { generation, changes } = storage.saved;
          assert.deepEqual([generation, changes.length], [1, 1]);
          const client = fake.make({ storage, apply: () => fault() });
          await pass(1);
          assert.deepEqual([client.state, client.status.loaded], [[], false]);
          assert.match(reports()[0], /apply/);
          client.start();
          await pass(3);
          assert.deepEqual([client.state, storage.saved.state, storage.saved.changes],
            [["a", "b"], ["a", "b"], []]);
          client.close();
        }
    """,
    "the first 401 asks for the token again, a second stops": """
        for (const isAsync of [false, true]) {
          let number = 0;
          const next = () => `t${++number}`;
          const token = isAsync ? () => sleep(1).then(next) : next;
          const strict = (least) => {
            for (const path of ["push", "pull", "snapshot"]) {
              fake.instead[path] = (call) => +call.token.slice(1) < least
                ? refuse(401, "unauthorized") : fake[path](call);
            }
          };
          fake.calls.length = 0;
          strict(2);
          const client = await fake.start({ token });
          await pass(3);
          assert.deepEqual([client.status.online, client.status.error, number],
            [true, null, 2]);
          assert.equal(fake.last("pull").token, "t2");  // it is kept while it is good
          strict(99);
          client.mutate("add", "a");
          await pass(3);
          const { running, error } = client.status;
          assert.deepEqual([running, error.action, error.status, number],
            [false, "token", 401, 3]);
          const { length } = fake.calls;
          await pass(100);
          assert.equal(fake.calls.length, length);
          fake.instead = {};
          client.start("fixed");
          await pass(1);
          assert.deepEqual([client.pending, fake.last("push").token], [[], "fixed"]);
          client.close();
        }
    """,
    "two requests that are refused with 401 ask for one token": """
        let number = 0;
        const token = async () => (await sleep(0.1), `t${++number}`);
        const client = await fake.start({ token });
        await pass(1);
        fake.held.add("push").add("pull");
        client.mutate("add", "a");
        fake.add("b");
        await pass(40);
        const push = fake.last("push"), pull = fake.last("pull");
        assert.deepEqual([push.token, pull.token, number], ["t1", "t1", 1]);
        fake.held.clear();
        push.answer(refuse(401, "unauthorized"));
        pull.answer(refuse(401, "unauthorized"));
        await pass(1);
        assert.deepEqual([number, fake.last("push").token, fake.last("pull").token],
          [2, "t2", "t2"]);
        assert.deepEqual([client.state, client.pending], [fake.data, []]);
    """,
    "a token function that fails is asked again later": """
        const faults = [() => { throw new Error("a fault"); }, () => Promise.reject(),
          () => Promise.reject(new Error("a fault"))];
        for (const fault of faults) {
          let tries = 0;
          const token = () => ++tries > 4 ? "good" : fault();
          const client = fake.make({ token, WebSocket: fake.WebSocket });
          client.start();
          await quiet();
          const { running, error } = client.status;
          assert.deepEqual([running, error.action], [true, "wait"]);
          client.mutate("add", "a");
          await pass(60);
          assert.deepEqual([client.pending, fake.last("push").token], [[], "good"]);
          assert.equal(fake.socket.token, "good");
          client.close();
        }
    """,
    "a token that no header can carry stops it, and asks for another": """
        for (const token of ["a b", "ä", "a\\nb", "\\u2028"]) {
          const client = await fake.start({ token });
          client.mutate("add", "a");
          await pass(5);
          const { running, error } = client.status;
          assert.deepEqual([running, error.action, fake.calls], [false, "token", []]);
        }
    """,
    "a token function that never answers does not outlive its start": """
        const client = fake.make({ token: () => new Promise(() => {}),
          WebSocket: fake.WebSocket });
        client.mutate("add", "a");
        client.start();
        await pass(10);
        assert.deepEqual([fake.calls, fake.sockets], [[], []]);
        client.stop();
        client.start("good");
        await pass(3);
        assert.deepEqual([client.pending, fake.last("push").token], [[], "good"]);
        assert.equal(fake.socket.token, "good");
    """,
    "a token of an earlier start never stops the new session": """
        const token = async () => (await sleep(5), "a b");
        const client = await fake.start({ token, WebSocket: fake.WebSocket });
        client.stop();
        client.start("good");
        client.mutate("add", "a");
        await pass(20);
        assert.deepEqual([client.status.running, client.pending], [true, []]);
        assert.deepEqual(fake.sockets.map((socket) => socket.token),
          fake.sockets.map(() => "good"));
    """,
    "a 4xx without a code of the protocol is tried again, with one it stops": """
        const codes = { 400: "invalid_request", 403: "forbidden", 404: "not_found",
          405: "method_not_allowed", 409: "conflict", 414: "uri_too_long",
          415: "unsupported_media_type", 431: "headers_too_large" };
        for (const [status, code] of Object.entries(codes)) {
          for (const path of ["push", "pull", "snapshot"]) {
            if (path === "snapshot" && status === "404") continue;  // it is allowed to
            if (path === "push" && status === "400") continue;  // it judges the body
            fake.calls.length = 0;
            fake.instead[path] = () => html(+status);
            const client = fake.make(), seen = actionsOf(client);
            client.start();
            await quiet();
            client.mutate("add", 1);
            await pass(200);
            const times = fake.all(path).map(({ at }) => at);
            const gaps = times.slice(1).map((at, index) => at - times[index]);
            assert.ok(times.length > 5 && times.length < 20, [path, status]);
            assert.ok(gaps.at(-1) > 14e3, [path, status]);
            assert.deepEqual([client.status.running, seen.has("wait"), seen.size],
              [true, true, 2]);
            fake.instead[path] = () => refuse(+status, code);
            await pass(70);
            const { running, error } = client.status;
            assert.deepEqual([running, error?.action, error?.code],
              [false, "start", code], [path, status]);
            fake.instead = {};
            client.start();
            await pass(2);
            assert.deepEqual([client.state, client.pending], [fake.data, []]);
            client.close();
          }
        }
        assert.deepEqual(fake.refused, []);
    """,
    "a refusal of an earlier start never stops the new session": """
        for (const path of ["push", "pull", "snapshot"]) {
          for (const status of [401, 403, 404]) {
            const code = { 401: "unauthorized", 403: "forbidden", 404: "not_found" };
            for (const isDeaf of [false, true]) {
              fake.held.add(path);
              const answers = [], slow = async (address, { signal, ...options }) => {
                // It answers although it was told to stop, as some polyfills do.
                const ours = isDeaf ? new AbortController().signal : signal;
                return fake.fetch(address, { ...options, signal: ours });
              };
              const client = fake.make({ fetch: slow, token: "t" });
              client.start();
              client.mutate("add", 1);
              await quiet();
              const call = fake.last(path);
              client.stop();
              fake.held.clear();
              client.start();
              call.answer(refuse(status, code[status]));
              await pass(5);
              const { running, online, error } = client.status;
              assert.deepEqual([running, online, error], [true, true, null],
                [path, status, isDeaf]);
              assert.deepEqual([client.state, client.pending], [fake.data, []]);
              client.close();
            }
          }
        }
    """,
    "an answer that is not the server's is tried again, and nothing of it applied": """
        const page = ["<h1>Log in</h1>", { status: 200 }];
        const shapes = [page, ["", {}], ['{"changes": [', {}], ["[{", {}],
          ...[null, [], {}, "text", 5, true, [null], [{}], [{ ok: 1 }], [[]],
            { cursor: 1 }, { changes: [] }, { changes: {}, cursor: 1 }, { data: [] },
            { cursor: 1, epoch: "1" }, { changes: [], cursor: 1 },
            { data: [], cursor: 1 }, { data: [], cursor: "1", epoch: "1" },
            { changes: [null], cursor: 1, epoch: "1" },
            [{ ok: true }, { ok: true }],
          ].map((value) => json(value))];
        for (const path of ["push", "pull", "snapshot"]) {
          for (const shape of shapes) {
            const storage = makeStates(), client = fake.make({ storage });
            const { id } = client.mutate("add", 1);
            fake.calls.length = 0;
            fake.instead[path] = () => shape;
            const seen = actionsOf(client);
            client.start();
            await pass(40);
            const where = [path, shape[0]];
            assert.ok(fake.all(path).length > 2, where);
            assert.ok(fake.all(path).length < 12, where);
            assert.deepEqual([client.status.running, seen.has("wait"), seen.size],
              [true, true, 2], where);
            // What was answered before the snapshot is asked again, after a pull.
            assert.deepEqual(client.pending.length, +(path !== "snapshot"), where);
            assert.deepEqual(client.state.at(-1), 1, where);
            assert.equal(client.status.loaded, path !== "snapshot", where);
            fake.instead = {};
            await pass(40);
            assert.deepEqual([client.state, client.pending, client.status.error],
              [fake.data, [], null], where);
            assert.ok(storage.saves.every(({ state }) => Array.isArray(state)));
            client.close();
          }
        }
        assert.deepEqual(fake.refused, []);
    """,
    "a snapshot that trickles is read to its end, one that stalls is given up": """
        ["a", "b"].forEach(fake.add);
        const text = fake.snapshot()[0], pieces = text.match(/.{1,6}/g);
        const gap = 300 / pieces.length;
        fake.instead.snapshot = () => [{ pieces, gap }, {}];
        const slow = await fake.start();
        await pass(290);
        assert.deepEqual([slow.status.loaded, fake.all("snapshot").length], [false, 1]);
        await pass(20);
        assert.deepEqual([slow.state, fake.all("snapshot").length], [["a", "b"], 1]);
        slow.close();
        fake.calls.length = 0;
        fake.instead.snapshot = () => [{ pieces: [pieces[0], null], gap: 10 }, {}];
        const stalled = await fake.start();
        await pass(69);
        assert.equal(fake.all("snapshot").length, 1);
        fake.instead = {};
        await pass(5);
        assert.deepEqual([fake.all("snapshot").length, stalled.state], [2, ["a", "b"]]);
    """,
    "an upgrade that hangs is given up after 10 s, and pulls go on": """
        const client = await fake.start({ WebSocket: fake.WebSocket });
        await pass(9);
        assert.equal(fake.sockets.length, 1);
        const hanging = fake.socket;
        await pass(3);
        assert.equal(fake.sockets.length, 2);
        fake.held.add("pull");
        await pass(31);
        fake.answer("pull");
        await quiet();
        assert.equal(fake.last("pull").query.wait, "25");
        fake.add("a");
        fake.held.clear();
        fake.answer("pull");
        await quiet();
        assert.deepEqual([client.state, client.status.live], [["a"], false]);
        hanging.open();  // too late
        assert.deepEqual([hanging.closed, client.status.live], [true, false]);
    """,
    "a WebSocket that cannot even be made is a reason to poll": """
        const WebSocket = class {
          constructor() { throw new DOMException("No.", "SecurityError"); }
        };
        fake.held.add("pull");
        await fake.start({ WebSocket, token: "a=" });
        fake.answer("pull");
        await quiet();
        assert.equal(fake.last("pull").query.wait, "25");
    """,
    "a listener that hears of a refusal once may start it again": """
        const client = await fake.start({ token: "old" });
        const renew = () => {
          if (client.status.error?.action !== "token") return;
          client.removeEventListener("status", renew);
          client.start("new");
        };
        client.addEventListener("status", renew);
        fake.instead.push = (call) => call.token === "old"
          ? refuse(401, "unauthorized") : fake.push(call);
        client.mutate("add", 1);
        await pass(5);
        assert.deepEqual([fake.data, client.status.error, client.status.running],
          [[1], null, true]);
    """,
    "the constructor names the argument that is missing or wrong": """
        const good = { url: "http://fake", scope: "s", initial: [], apply() {},
          queue: null, storage: null };
        const bad = {
          url: [undefined, null, "", "no address", "ftp://fake", "relative/", 5, {}],
          scope: [undefined, null, "", 5, {}, ["s"], "x".repeat(257), "𝄞".repeat(257)],
          apply: [undefined, null, "apply", {}],
          initial: [undefined],
        };
        for (const [name, values] of Object.entries(bad)) {
          for (const value of values) {
            assert.throws(() => new SyncClient({ ...good, [name]: value }), (error) =>
              error instanceof TypeError && error.message.includes(`\\`${name}`), name);
          }
        }
        for (const scope of ["s", "x".repeat(256), "𝄞".repeat(256)]) {
          new SyncClient({ ...good, scope });
        }
        for (const initial of [null, 0, "", false]) {
          assert.equal(new SyncClient({ ...good, initial }).state, initial);
        }
        new SyncClient({ ...good, url: new URL("https://fake/app/") });
    """,
    "the address may be relative to the page": """
        setGlobal("location", new URL("https://host/app/index.html?x#y"));
        const addresses = { ".": "/app/", "./": "/app/", "/": "/", "sub": "/app/sub/",
          "../other/": "/other/", "https://far/a/?b#c": "/a/" };
        for (const [url, folder] of Object.entries(addresses)) {
          const { WebSocket } = fake;
          const client = await fake.start({ url, WebSocket, scope: "a b" });
          const pull = new URL(fake.last("pull").address);
          const socket = new URL(fake.socket.asked[0]);
          assert.deepEqual([pull.pathname, socket.pathname],
            [`${folder}sync/pull`, `${folder}ws`]);
          assert.deepEqual([socket.protocol, socket.search], ["wss:", "?scope=a+b"]);
          client.close();
        }
    """,
    "a client that is closed saves, and takes nothing any more": """
        const queue = makeStorage(), storage = makeStates();
        const client = await fake.live({ queue, storage }), { length } = fake.calls;
        fake.hint("a");
        client.close();
        await quiet();
        assert.deepEqual([storage.saved.cursor, client.state], [1, ["a"]]);
        assert.ok(fake.socket.closed);
        assert.throws(() => client.start(), /closed/);
        assert.throws(() => client.mutate("add", "b"), /closed/);
        client.close(), client.stop();
        await pass(300);
        assert.deepEqual([fake.calls.length, queue.queue, storage.saves.length],
          [length, [], 1]);
        const early = fake.make({ queue, storage });
        early.close();  // before it has loaded
        await pass(10);
        assert.equal(storage.saved.cursor, 1);
    """,
    "forget removes every key and the state, also while a save is under way": """
        const items = makeStorage(), key = 'mizusync ["http://fake/","s",""] ';
        for (const delay of [0, 3]) {
          for (const wait of [0, 1.1]) {
            const storage = makeStates(new Map(), { save: delay });
            items.setItem("other", "stays");
            items.setItem(`${key}base`, "{}");
            items.setItem(`${key}queue another 1`, "{}");
            const other = fake.make({ queue: items, storage, user: "ben" });
            other.mutate("add", "of ben");
            const client = await fake.live({ queue: items, storage });
            client.mutate("add", "a");
            await pass(wait);
            client.mutate("add", "b");
            const gone = client.forget();
            await pass(10);
            await gone;
            await pass(10);
            assert.deepEqual(storage.rows.size, 0);
            assert.deepEqual([...items.items.keys()].filter((name) =>
              name !== "other" && !name.includes("ben")), []);
            assert.equal(items.queue.length, 1);
            assert.throws(() => client.start(), /closed/);
            other.forget();
            await quiet();
          }
        }
        assert.equal(items.getItem("other"), "stays");
    """,
    "forget removes the state also where it has just begun to load it": """
        const storage = makeStates(), queue = makeStorage();
        const first = await fake.start({ storage, queue });
        await pass(2);
        first.close();
        storage.limits.load = 2;
        const client = fake.make({ storage, queue }), gone = client.forget();
        await pass(30);
        await gone;
        assert.deepEqual([storage.rows.size, queue.items.size], [0, 0]);
    """,
    "forget removes the queue also where the storage hangs": """
        const storage = makeStates(new Map(), { save: "hangs", remove: "hangs" });
        const queue = makeStorage(), client = await fake.start({ storage, queue });
        fake.instead.push = () => refuse(503, "unavailable");
        await pass(2);
        client.mutate("add", "secret");
        const gone = assert.rejects(client.forget(), /does not answer/);
        await pass(10);
        assert.equal(queue.items.size, 0);
        await gone;
    """,
    "forget removes the state also where a save hangs, and tells of it": """
        const storage = makeStates(), client = await fake.live({ storage });
        await pass(2);
        assert.equal(storage.rows.size, 1);
        storage.limits.save = "hangs";
        fake.hint("a");
        await pass(2);
        const gone = assert.rejects(client.forget(), /does not answer/);
        await pass(1);
        assert.equal(storage.rows.size, 0);
        await pass(60);
        await gone;
    """,
    "a state of another version is replaced by a snapshot, and what waits is kept": """
        const kept = makeKept();
        fake.add("a");
        const old = await fake.start({ ...kept, version: 1 });
        await pass(2);
        fake.restore("2", "a", "b");
        await pass(40);
        old.stop();
        old.mutate("add", "own");
        old.close();
        await quiet();
        assert.equal(kept.storage.saved.generation, 1);
        const client = fake.make({ ...kept, version: 2 });
        await pass(1);
        assert.deepEqual([client.state, client.status.loaded], [["own"], false]);
        client.start();
        await pass(3);
        assert.deepEqual([client.state, client.pending], [["a", "b", "own"], []]);
        const { version, state } = kept.storage.saved;
        assert.deepEqual([version, state, kept.queue.queue], [2, client.state, []]);
        const again = fake.make({ ...kept, version: 2 });
        await again.ready;
        assert.deepEqual(again.state, client.state);
    """,
    "migrate changes the state and what waits, once": """
        const kept = makeKept(), asked = [];
        const one = await fake.live({ ...kept, version: "old" });
        await pass(1.1);
        fake.hint("a");
        await pass(1.1);
        assert.equal(kept.storage.saved.changes.length, 1);
        one.stop();
        ["b", "c", "d"].forEach((args) => one.mutate("add", args));
        one.close();
        const migrate = (state, pending, version) => {
          asked.push([state, pending.map(({ args }) => args), version]);
          const [b, , d] = pending;
          return { state: ["new"], pending: [{ ...b, args: `${b.args}!` }, d] };
        };
        const apply = (state, { data }) => [...state, `${data}?`];
        const options = { ...kept, version: "new", migrate, apply };
        for (let time = 0; time < 3; time++) {  // offline: nothing is confirmed
          const client = fake.make(options);
          assert.deepEqual(client.pending.length, time ? 2 : 3);
          await client.ready;
          assert.deepEqual(client.pending.map(({ args }) => args), ["b!", "d"]);
          assert.deepEqual(client.state, ["new", "b!", "d"]);
          client.close();
          await quiet();
        }
        assert.deepEqual(asked, [[[], ["b", "c", "d"], "old"]]);
        const client = await fake.start(options);
        await pass(2);
        assert.deepEqual(client.state, ["new", "a?", "b!?", "d?"]);
        assert.deepEqual(fake.data, ["a", "b!", "d"]);
        assert.deepEqual(kept.queue.queue, []);
        assert.equal(kept.storage.saved.version, "new");
    """,
    "what waits is migrated once, also where the new state could not be stored": """
        const kept = makeKept(), asked = [];
        const migrate = (state, pending) => {
          asked.push(pending.map(({ args }) => args));
          const changed = pending.filter(({ args }) => args !== "drop");
          const longer = ({ args, ...rest }) => ({ ...rest, args: `${args}!` });
          return { state, pending: changed.map(longer) };
        };
        const old = await fake.start(kept);
        await pass(2);
        old.stop();
        old.mutate("add", "a"), old.mutate("add", "drop");
        old.close();
        kept.storage.limits.load = 0.5;
        const closed = fake.make({ ...kept, version: 2, migrate });
        closed.close();  // before it has loaded
        await pass(5);
        assert.deepEqual(asked, []);
        kept.storage.limits.save = "fails";
        for (const pending of [["a", "drop"], [], []]) {
          const client = fake.make({ ...kept, version: 2, migrate });
          await pass(2);
          assert.deepEqual([asked.pop(), client.state], [pending, ["a!"]]);
          client.close();
          assert.equal(reports().length, 1);
        }
        kept.storage.limits.save = 0;
        const client = await fake.start({ ...kept, version: 2, migrate });
        await pass(5);
        assert.deepEqual([client.state, fake.data], [["a!"], ["a!"]]);
        assert.deepEqual([kept.storage.saved.version, kept.queue.queue], [2, []]);
    """,
    "a migrate that fails is reported, and a snapshot follows": """
        const faults = [() => { throw new Error("a fault"); }, () => undefined,
          () => ({}), (state) => ({ state }), (state, pending) => ({ pending })];
        fake.add("a");
        for (const migrate of faults) {
          const kept = makeKept();
          const old = await fake.start(kept);
          await pass(2);
          old.stop();
          old.mutate("add", "own");
          old.close();
          const client = fake.make({ ...kept, version: 2, migrate });
          await pass(1);
          assert.deepEqual([client.state, client.status.loaded], [["own"], false]);
          assert.equal(reports().length, 1);
          client.start();
          await pass(3);
          assert.deepEqual([client.state, client.pending], [fake.data, []]);
          assert.equal(kept.storage.saved.version, 2);
          assert.deepEqual(kept.storage.saved.state, fake.data);
          client.close();
        }
    """,
    "migrate is not given what was made while the state was loading": """
        const kept = makeKept(), old = await fake.start(kept);
        await pass(2);
        old.stop();
        old.mutate("add", "old");
        old.close();
        kept.storage.limits.load = 1;
        const longer = ({ args, ...rest }) => ({ ...rest, args: `${args}!` });
        const migrate = (state, pending) => ({ state, pending: pending.map(longer) });
        const client = fake.make({ ...kept, version: 2, migrate });
        client.mutate("add", "new");
        await pass(2);
        assert.deepEqual(client.state, ["old!", "new"]);
        client.start();
        await pass(2);
        assert.deepEqual([fake.data, kept.queue.queue], [["old!", "new"], []]);
    """,
    "a logout in one tab ends the others, and none writes the state back": """
        const page = makePage(), kept = makeKept(), written = [];
        const setItem = kept.queue.setItem;
        kept.queue.setItem = (key, value) => (written.push(key), setItem(key, value));
        const ben = await fake.live({ ...kept, user: "ben" });
        const one = await fake.live(kept), two = await fake.live(kept);
        await pass(2);
        kept.storage.limits.save = 2;
        fake.hint("a");
        await pass(1.1);
        one.forget();
        await quiet();
        const tell = (key) =>
          page.dispatchEvent(Object.assign(new Event("storage"), { key }));
        tell("another key");
        assert.ok(two.status.running);
        written.forEach(tell);
        await pass(30);
        assert.throws(() => two.start(), /closed/);
        assert.ok(ben.status.running);
        assert.deepEqual([...kept.storage.rows.keys()].filter((key) =>
          !key.includes("ben")), []);
        assert.deepEqual([...kept.queue.items.keys()], []);
    """,
    "forget removes the state also where an older save takes longer": """
        const storage = makeStates(), client = await fake.live({ storage });
        await pass(2);
        storage.limits.save = 9;
        fake.hint("a");
        await pass(1.1);
        storage.limits.save = 0;
        fake.hint("b");
        await pass(1.1);
        const gone = client.forget();
        await pass(20);
        await gone;
        assert.equal(storage.rows.size, 0);
    """,
    "twenty tabs over one storage see the same and lose nothing": """
        const kept = makeKept();
        const locks = makeLocks(), tabs = [];
        for (let tab = 0; tab < 20; tab++) {
          locks.tab = String(tab);
          tabs.push(await fake.start(kept));
        }
        tabs.forEach((tab, index) => tab.mutate("add", index));
        await pass(40);
        assert.deepEqual([...fake.data].sort((one, two) => one - two),
          tabs.map((_, index) => index));
        for (const tab of tabs) {
          assert.deepEqual([tab.state, tab.pending], [fake.data, []]);
        }
        assert.deepEqual([kept.queue.queue, kept.storage.saved.cursor], [[], 20]);
    """,
    "subscribe() tells of both events, until what it returned is called": """
        const client = fake.make();
        let calls = 0;
        const { subscribe } = client, end = subscribe(() => calls++);
        await quiet();
        calls = 0;
        client.mutate("add", 1);
        assert.equal(calls, 2);  // a change, and a status
        client.start();
        await pass(1);
        assert.ok(calls > 3);
        end();
        calls = 0;
        client.mutate("add", 2);
        await pass(1);
        assert.equal(calls, 0);
    """,
    "what is there first is saved at once, and the rest once a second": """
        fake.add("a");
        const { queue, storage } = makeKept();
        const client = await fake.live({ queue, storage });
        await pass(0.1);
        assert.deepEqual([storage.saves.length, storage.saved.state], [1, ["a"]]);
        const { changes } = fake.add("b");
        fake.socket.say({ cursor: 2, epoch: "1", after: 1, changes });
        await pass(0.8);
        assert.deepEqual([storage.saves.length, client.state], [1, ["a", "b"]]);
        await pass(0.3);
        assert.equal(storage.saves.length, 2);
    """,
    "forget() closes the clients in other tabs also where the queue is full": """
        const open = makeBrowser(), one = open(fake), two = open(fake);
        one.mutate("add", "a");
        await pass(2);
        const { items, setItem } = one.queue;
        one.queue.setItem = (key, text) => {
          if (items.size) throw new Error("It is full.");
          setItem(key, text);
        };
        await one.forget();
        await pass(1);
        assert.throws(() => two.mutate("add", "b"), /closed/);
        assert.equal(items.size, 0);
    """,
    "forget() closes the clients of the same user in other tabs": """
        const page = makePage(), { queue, storage } = makeKept();
        const write = queue.setItem;
        queue.setItem = (key, value) => {  // one of the browser's others hears of it
          write(key, value);
          page.dispatchEvent(Object.assign(new Event("storage"), { key }));
        };
        const one = await fake.start({ queue, storage, user: "ann" });
        const other = await fake.start({ queue, storage, user: "ann" });
        const ben = await fake.start({ queue, storage, user: "ben" });
        other.mutate("add", 1);
        await one.forget();
        await pass(60);
        assert.throws(() => other.start(), /closed/);
        assert.equal(ben.status.running, true);
        const kept = [...queue.items.keys(), ...storage.rows.keys()];
        assert.ok(kept.every((key) => key.includes('"ben"')), kept.join());
    """,
    "with migrate(), what is kept is not shown before it has the new form": """
        const { queue, storage } = makeKept(), met = [];
        fake.make({ queue, storage, version: 1 }).mutate("add", "old");
        const slow = makeStates(new Map(), { load: 2 });
        const predict = (state, { args }) => (met.push(args), [...state, args]);
        const migrate = (state, pending) => ({ state, pending });
        fake.make({ queue, storage: slow, predict, migrate, version: 2 });
        await pass(1);
        assert.deepEqual(met, []);
        await pass(2);
        assert.deepEqual(met, ["old"]);
    """,
    "a push that the application's own fetch gives up goes again": """
        let isFirst = true;
        const fetch = async (address, options) => {
          const isPush = address.endsWith("push");
          if (!isPush || !isFirst) return fake.fetch(address, options);
          isFirst = false;
          throw new DOMException("It took too long.", "AbortError");
        };
        const client = await fake.start({ fetch });
        client.mutate("add", "a");
        await pass(6);
        assert.deepEqual([isFirst, fake.data, client.pending], [false, ["a"], []]);
    """,
    "no hurry uses up the tries of a mutation": """
        const page = makePage(), client = await fake.live();
        fake.instead.push = () =>
          json([{ ok: false, code: "internal_error", error: "a reason" }]);
        client.mutate("add", "a");
        for (let wakes = 0; wakes < 10; wakes++) {
          page.tell("visibilitychange");
          await pass(0.05);
        }
        assert.deepEqual([fake.all("push").length, fake.refused], [1, []]);
        fake.instead = {};
        await pass(5);
        assert.deepEqual([fake.data, client.pending], [["a"], []]);
    """,
    "a token that never comes is asked for anew by the next start": """
        let asks = 0;
        const token = () => (++asks === 1 ? new Promise(() => {}) : "good");
        const client = await fake.start({ token });
        assert.equal(fake.calls.length, 0);
        client.stop();
        client.start();
        await pass(1);
        assert.deepEqual([asks, client.status.online], [2, true]);
    """,
    "a socket that says nothing of its scope is dead after 60 s": """
        const client = await fake.live(), { socket } = fake;
        for (let seconds = 0; seconds < 70; seconds += 10) {
          socket.onmessage?.({ data: JSON.stringify({ topic: "other", data: {} }) });
          await pass(10);
        }
        assert.deepEqual([socket.closed, fake.sockets.length > 1], [true, true]);
    """,
    "a repeat without its changes does not wait for the end of a held pull": """
        const hold = (signal) => new Promise((_, reject) => {
          signal.addEventListener("abort", () => reject(signal.reason));
        });
        const fetch = (address, options) => address.includes("wait=25")
          ? hold(options.signal) : fake.fetch(address, options);
        const client = await fake.start({ fetch });
        await pass(5);
        fake.add("a");
        fake.instead.push = () => json([{ ok: true, cursor: 1, duplicate: true }]);
        const mutation = client.mutate("add", "a");
        await pass(1);
        assert.deepEqual([client.state, client.pending], [["a"], []]);
        await client.confirmed(mutation);
    """,
    "whoever hears of a refusal sees the state without it": """
        fake.instead.push = () =>
          json([{ ok: false, code: "conflict", error: "a reason" }]);
        const client = await fake.start(), seen = [];
        client.addEventListener("refused", () => seen.push(client.state));
        client.mutate("add", "a");
        await pass(1);
        assert.deepEqual(seen, [[]]);
    """,
    "what is confirmed is retained, and counted": """
        const kept = makeKept(), client = await fake.start(kept);
        client.mutate("add", "a"), client.mutate("add", "b");
        assert.equal(client.status.retained, 0);
        await pass(2);
        assert.deepEqual(kept.storage.memory.map(({ mutation, cursor, database }) =>
          [mutation.args, cursor, database]), [["a", 1, "d"], ["b", 2, "d"]]);
        const age = simulated.Date.now() - kept.storage.memory[0].time;
        assert.ok(age > 1e3 && age <= 2e3, age);
        assert.equal(client.status.retained, 2);
        client.close();
        const again = fake.make(kept);
        await again.ready;
        await quiet();
        assert.equal(again.status.retained, 2);
    """,
    "nothing is retained without a storage that can, and with keep: 0": """
        const without = [{ keep: 0 }, { storage: null },
          { storage: webStorage(makeStorage()) }];
        for (const [index, options] of without.entries()) {
          const kept = makeKept(), client = await fake.start({ ...kept, ...options });
          client.mutate("add", "a");
          await pass(2);
          assert.deepEqual([client.status.retained, kept.storage.memory], [0, []]);
          assert.deepEqual([client.pending, kept.queue.queue], [[], []]);
          fake.rewind(`after ${index}`, 0);
          await pass(40);
          assert.deepEqual([fake.data, client.state, fake.healed], [[], [], []]);
          client.close();
        }
    """,
    "at most 1,000 mutations are retained, and the oldest go first": """
        const kept = makeKept(), client = await fake.start(kept);
        for (let index = 0; index < 1010; index++) client.mutate("add", index);
        await pass(60);
        const numbers = kept.storage.memory.map(({ mutation }) => mutation.args);
        assert.deepEqual([numbers.length, Math.min(...numbers)], [1000, 10]);
        assert.equal(client.status.retained, 1000);
        client.mutate("add", "one more");
        await pass(2);
        const { memory } = kept.storage;
        assert.deepEqual([memory.length, client.status.retained], [1000, 1000]);
        assert.ok(!memory.some(({ mutation }) => mutation.args === 10));
    """,
    "at most 4 MiB of mutations are retained": """
        const kept = makeKept(), client = await fake.start(kept);
        for (const letter of "abcdef") {
          client.mutate("add", letter.repeat(1e6));
          await pass(2);
        }
        const letters = kept.storage.memory.map(({ mutation }) => mutation.args[0]);
        assert.deepEqual(letters.sort(), ["c", "d", "e", "f"]);
        assert.equal(client.status.retained, 4);
        client.close();
        const again = await fake.start(kept);  // it knows their size
        again.mutate("add", "g".repeat(1e6));
        await pass(2);
        assert.deepEqual([kept.storage.memory.length, again.status.retained], [4, 4]);
    """,
    "a mutation is retained for 7 days, or as long as the application says": """
        const day = 24 * 3600;
        for (const [keep, limit] of [[undefined, 7 * day], [60e3, 60]]) {
          const kept = makeKept(), client = await fake.start({ ...kept, keep });
          const mutate = async (data, wait) => {
            client.stop();
            await pass(wait);
            client.start();
            client.mutate("add", data);
            await pass(4);
          };
          const retained = () => kept.storage.memory.map(({ mutation }) =>
            mutation.args).sort();
          await mutate("a", 0);
          await mutate("b", limit - 20);
          assert.deepEqual(retained(), ["a", "b"]);
          await mutate("c", 30);
          assert.deepEqual([retained(), client.status.retained], [["b", "c"], 2]);
          client.close();
        }
    """,
    "a key is erased only once its mutation is retained": """
        const kept = makeKept(), client = await fake.start(kept);
        await pass(2);
        kept.storage.limits.retain = 5;
        client.mutate("add", "a");
        await pass(4);
        assert.deepEqual([client.pending, kept.storage.saved.cursor], [[], 1]);
        assert.equal(kept.queue.queue.length, 1);
        await pass(5);
        assert.deepEqual([kept.queue.queue, kept.storage.memory.length], [[], 1]);
    """,
    "what a crash kept from being retained is retained by the next visit": """
        makeLocks();
        const open = makeBrowser(), one = open(fake);
        one.start();
        await pass(2);
        one.limits.retain = "hangs";
        one.mutate("add", "a");
        await pass(3);
        assert.deepEqual([one.storage.saved.cursor, one.storage.memory], [1, []]);
        one.end();
        const two = open(fake);
        two.start();
        await pass(5);
        assert.deepEqual([fake.data, two.state, two.pending], [["a"], ["a"], []]);
        assert.equal(two.storage.memory.length, 1);
        assert.deepEqual(two.queue.queue, []);
    """,
    "a restored server gets what it lost, in order, and then what waits": """
        const client = await fake.start();
        for (const data of ["a", "b", "c", "d"]) {
          client.mutate("add", data);
          await pass(1);
        }
        client.stop();
        client.mutate("add", "e");
        fake.calls.length = 0;
        fake.rewind("2", 2);
        client.start();
        await pass(5);
        assert.deepEqual(fake.data, ["a", "b", "c", "d", "e"]);
        assert.deepEqual([client.state, client.pending], [fake.data, []]);
        const pushes = fake.all("push").map(({ body }) => body.map(({ args }) => args));
        assert.deepEqual(pushes, [["a", "b", "c", "d"], ["e"]]);
        assert.deepEqual(fake.healed, [{ sent: 4, lost: 2 }]);
        assert.deepEqual([fake.refused, client.status.retained], [[], 5]);
    """,
    "a thousand are brought back in batches, and what had reached the backup stays": """
        const client = await fake.start();
        const many = Array.from({ length: 1000 }, (_, index) => index);
        many.forEach((index) => client.mutate("add", index));
        await pass(60);
        fake.rewind("2", 550);
        fake.calls.length = 0;
        await pass(60);
        assert.deepEqual([fake.data, client.state], [many, many]);
        assert.ok(fake.all("push").every(({ body }) => body.length <= 100));
        assert.deepEqual(fake.healed, [{ sent: 1000, lost: 450 }]);
    """,
    "a server that is restored once more is healed once more": """
        const storage = makeStates(), client = await fake.start({ storage });
        for (const data of ["a", "b", "c"]) client.mutate("add", data);
        await pass(5);
        for (const [epoch, cursor] of [["2", 1], ["3", 2], ["4", 0]]) {
          fake.rewind(epoch, cursor);
          if (epoch === "2") fake.add("of another");
          await pass(60);
          assert.deepEqual(client.state, fake.data);
          // What is retained has the cursors of the new history.
          for (const { mutation, cursor } of storage.memory) {
            assert.equal(fake.log[cursor - 1].data, mutation.args);
          }
        }
        assert.deepEqual(fake.data, ["a", "b", "c"]);
        assert.deepEqual(fake.healed.map(({ lost }) => lost), [2, 2, 3]);
    """,
    "what the server may have lost is known without a 410, too": """
        const client = await fake.start();
        client.mutate("add", "a");
        await pass(5);
        client.stop();
        fake.add("b");  // of another; a copy that knows our cursor is restored
        fake.held.add("pull");
        client.start();
        client.mutate("add", "c");
        await pass(5);
        fake.held.clear();
        fake.answer("pull");
        await pass(5);
        assert.deepEqual(client.state, ["a", "b", "c"]);
        fake.held.add("pull");
        client.mutate("add", "d");  // it is told ok, and does not see it
        await pass(2);
        fake.rewind("2", 3);
        fake.held.clear();
        fake.answer("pull");
        await pass(60);
        assert.deepEqual([fake.data, client.state], [["a", "b", "c", "d"], fake.data]);
    """,
    "what is brought back is neither pending nor predicted": """
        const client = await fake.start();
        client.mutate("add", "a");
        await pass(5);
        fake.rewind("2", 0);
        fake.held.add("push");
        await pass(40);
        assert.equal(fake.last("push").body[0].args, "a");
        assert.deepEqual([client.state, client.pending], [[], []]);
        assert.deepEqual([client.status.waiting, fake.healed], [0, []]);
        client.mutate("add", "b");  // waits behind it
        await pass(5);
        assert.deepEqual([client.state, fake.all("push").length], [["b"], 2]);
        fake.held.clear();
        fake.answer("push");
        await pass(5);
        assert.deepEqual([fake.data, client.state], [["a", "b"], ["a", "b"]]);
    """,
    "of a replaced server what waits is pushed, and nothing else": """
        const kept = makeKept(), client = await fake.start(kept), seen = [];
        client.addEventListener("replaced", ({ detail }) =>
          seen.push([detail, client.state]));
        client.mutate("add", "a");
        await pass(5);
        client.stop();
        client.mutate("add", "b");
        fake.restore("2", "x");
        fake.database = "other";
        client.start();
        await pass(5);
        assert.deepEqual([fake.data, client.state], [["x", "b"], ["x", "b"]]);
        assert.deepEqual(seen.map(([detail]) => detail),
          [{ database: "other", before: "d" }]);
        assert.ok(!seen[0][1].includes("a"));
        const texts = kept.storage.memory.map(({ mutation }) => mutation.args);
        assert.deepEqual([texts, client.status.retained, fake.healed], [["b"], 1, []]);
        assert.deepEqual([fake.refused, kept.storage.saved.database], [[], "other"]);
    """,
    "what the old server had only just acknowledged is dropped with it": """
        const kept = makeKept(), client = await fake.start(kept);
        fake.held.add("pull");
        const mutation = client.mutate("add", "a");
        await quiet();
        assert.deepEqual(client.pending, []);
        fake.restore("2");
        fake.database = "other";
        fake.held.clear();
        fake.answer("pull");
        await pass(60);
        assert.deepEqual([fake.data, client.state], [[], []]);
        assert.deepEqual([kept.queue.queue, kept.storage.memory], [[], []]);
        assert.equal(client.status.retained, 0);
    """,
    "a refusal while it heals is told when 10 s, 1 and 10 minutes did not help": """
        const client = await fake.start();
        client.mutate("add", "a"), client.mutate("add", "bad");
        await pass(5);
        fake.instead.push = ({ body }) => json(body.map((mutation) =>
          mutation.args === "bad" ? { ok: false, code: "not_found", error: "a reason" }
            : fake.apply(mutation)));
        fake.rewind("2", 0);
        fake.calls.length = 0;
        await pass(900);
        const times = fake.all("push").filter(({ body }) =>
          body.some(({ args }) => args === "bad")).map(({ at }) => at);
        const gaps = times.slice(1).map((at, index) => at - times[index]);
        assert.equal(gaps.length, 3, gaps);
        for (const [index, least] of [10e3, 60e3, 600e3].entries()) {
          assert.ok(gaps[index] >= least && gaps[index] < least + 6e3, gaps);
        }
        assert.deepEqual(fake.healed, [{ sent: 1, lost: 1 }]);
        assert.deepEqual(fake.refused.map(({ mutation, code }) =>
          [mutation.args, code]), [["bad", "not_found"]]);
        assert.deepEqual([fake.data, client.state], [["a"], ["a"]]);
    """,
    "each later round in which something is accepted is told": """
        let isThere = false;
        const client = await fake.start();
        client.mutate("add", "a"), client.mutate("add", "b");
        await pass(5);
        fake.instead.push = ({ body }) => json(body.map((mutation) =>
          mutation.args === "b" && !isThere
            ? { ok: false, code: "not_found", error: "a reason" }
            : fake.apply(mutation)));
        fake.rewind("2", 0);
        await pass(40);
        assert.deepEqual(fake.healed, [{ sent: 1, lost: 1 }]);
        isThere = true;
        await pass(80);
        assert.deepEqual(fake.healed, [{ sent: 1, lost: 1 }, { sent: 1, lost: 1 }]);
        assert.deepEqual([fake.data, client.state, fake.refused],
          [["a", "b"], ["a", "b"], []]);
    """,
    "what waited when the history changed is not refused at once, a later one is": """
        let isThere = false;
        const client = await fake.start();
        client.mutate("add", "a");
        await pass(5);
        client.stop();
        client.mutate("add", "early");
        fake.instead.push = ({ body }) => json(body.map((mutation) =>
          mutation.args !== "a" && !isThere
            ? { ok: false, code: "not_found", error: "a reason" }
            : fake.apply(mutation)));
        fake.rewind("2", 0);
        client.start();
        await pass(5);
        assert.deepEqual([client.state, client.status.waiting], [["a", "early"], 1]);
        client.mutate("add", "late");
        await pass(2);
        assert.deepEqual(fake.refused.map(({ mutation }) => mutation.args), ["late"]);
        isThere = true;
        await pass(20);
        assert.deepEqual([fake.data, client.pending], [["a", "early"], []]);
        assert.equal(fake.refused.length, 1);
    """,
    "a reload does not end the patience with what waited when the history changed": """
        let isThere = false;
        const kept = makeKept(), client = await fake.start(kept);
        client.mutate("add", "a");
        await pass(5);
        client.stop();
        client.mutate("add", "b");
        fake.instead.push = ({ body }) => json(body.map((mutation) =>
          mutation.args === "b" && !isThere
            ? { ok: false, code: "not_found", error: "a reason" }
            : fake.apply(mutation)));
        fake.rewind("2", 0);
        client.start();
        await pass(5);
        client.close();
        const again = await fake.start(kept);
        await pass(5);
        assert.deepEqual([again.state, again.status.waiting], [["a", "b"], 1]);
        isThere = true;
        await pass(80);
        assert.deepEqual([fake.data, again.state], [["a", "b"], ["a", "b"]]);
        assert.deepEqual(fake.refused, []);
    """,
    "what waits for others to heal is asked at once of a server restored again": """
        let isThere = false;
        const client = await fake.start();
        client.mutate("add", "a");
        await pass(5);
        client.stop();
        client.mutate("add", "b");
        fake.instead.push = ({ body }) => json(body.map((mutation) =>
          isThere ? fake.apply(mutation)
            : { ok: false, code: "not_found", error: "a reason" }));
        fake.rewind("2", 0);
        client.start();
        await pass(200);  // now both wait for 10 minutes
        fake.add("x");
        await pass(40);
        assert.deepEqual(client.state, ["x", "b"]);
        isThere = true;
        fake.rewind("3", 0);
        await pass(40);
        assert.deepEqual([fake.data, client.state, fake.refused],
          [["a", "b"], ["a", "b"], []]);
    """,
    "no event tells of a healing where there was nothing to send": """
        const client = await fake.start();
        fake.add("of another");
        await pass(40);
        for (const epoch of ["2", "3"]) {
          fake.rewind(epoch, 0);
          await pass(60);
        }
        assert.deepEqual([client.state, fake.healed, client.status.retained],
          [[], [], 0]);
        assert.equal(fake.all("push").length, 0);
    """,
    "the new history is not saved before the healing is over": """
        const kept = makeKept(), client = await fake.start(kept);
        client.mutate("add", "a");
        await pass(5);
        fake.rewind("2", 0);
        fake.held.add("push");
        await pass(50);
        assert.deepEqual([kept.storage.saved.epoch, kept.storage.saved.cursor],
          ["1", 1]);
        fake.held.clear();
        fake.answer("push");
        await pass(5);
        assert.deepEqual([kept.storage.saved.epoch, client.state], ["2", ["a"]]);
    """,
    "a crash while it heals begins the healing again, and nothing is applied twice": """
        for (const isApplied of [false, true]) {
          const open = makeBrowser(), one = open(fake);
          one.start();
          for (const data of ["a", "b"]) one.mutate("add", data);
          await pass(5);
          one.stop();
          one.mutate("add", "c");
          fake.rewind(`after ${fake.epoch}`, 0);
          fake.held.add("push");
          one.start();
          await pass(5);
          if (isApplied) fake.push(fake.last("push"));
          one.end();
          fake.held.clear();
          const two = open(fake);
          two.start();
          await pass(5);
          assert.deepEqual([fake.data, two.state], [["a", "b", "c"], fake.data]);
          assert.deepEqual(fake.healed.pop(), { sent: 2, lost: isApplied ? 0 : 2 });
          two.close();
          fake.restore(`before ${fake.epoch}`);
        }
    """,
    "what another tab has to bring back comes back with this one": """
        const open = makeBrowser(), one = open(fake), two = open(fake);
        one.start(), two.start();
        await pass(2);
        one.mutate("add", "a");
        await pass(40);
        two.mutate("add", "b");
        await pass(40);
        one.stop(), two.stop();
        one.end();
        fake.rewind("2", 0);
        two.start();
        await pass(5);
        assert.deepEqual([fake.data, two.state], [["a", "b"], ["a", "b"]]);
    """,
    "a storage that fails while it heals loses nothing": """
        for (const trouble of ["fails", 20, "hangs"]) {
          const { queue, storage } = makeKept();
          const client = await fake.start({ queue, storage });
          client.mutate("add", trouble);
          await pass(5);
          storage.limits.load = trouble;
          fake.rewind(`after ${trouble}`, 0);
          await pass(60);
          storage.limits.load = 0;
          client.close();
          await pass(5);
          const again = await fake.start({ queue, storage });
          await pass(60);
          assert.deepEqual([fake.data, again.state], [[trouble], [trouble]]);
          again.close();
          reports();
          fake.restore(`before ${trouble}`);
        }
    """,
    "what was confirmed and not saved yet is retained as the new history has it": """
        const kept = makeKept(), client = await fake.start(kept);
        await pass(2);
        client.mutate("add", "a");
        await quiet();
        assert.deepEqual([client.state, kept.storage.memory], [["a"], []]);
        fake.rewind("2", 0);
        fake.add("of another");
        client.stop(), client.start();
        await pass(5);
        assert.deepEqual([fake.data, client.state], [["of another", "a"], fake.data]);
        assert.deepEqual(kept.storage.memory.map(({ cursor }) => cursor), [2]);
        assert.deepEqual(fake.healed, [{ sent: 1, lost: 1 }]);
        assert.deepEqual(kept.queue.queue, []);
    """,
    "what was brought back is brought back again, also without a 410": """
        const client = await fake.start();
        client.mutate("add", "a"), client.mutate("add", "b");
        await pass(5);
        fake.instead.snapshot = (call) => {
          fake.held.add("pull");
          return fake.snapshot(call);
        };
        fake.rewind("2", 0);
        await pass(40);
        assert.deepEqual([fake.data, client.state], [["a", "b"], []]);
        fake.rewind("3", 0);  // it knows the position of a client that has seen nothing
        fake.held.clear();
        fake.answer("pull");
        await pass(40);
        assert.deepEqual([fake.data, client.state], [["a", "b"], ["a", "b"]]);
        assert.deepEqual(fake.healed, [{ sent: 2, lost: 2 }, { sent: 2, lost: 2 }]);
    """,
    "what had no changes is brought back, too": """
        const known = new Set(), kept = makeKept();
        fake.instead.push = ({ body }) => json(body.map(({ id }) => {
          const duplicate = known.has(id);
          known.add(id);
          return { ok: true, cursor: fake.head, duplicate, changes: [] };
        }));
        fake.add("a");
        const client = await fake.start(kept);
        await pass(5);
        client.mutate("count");
        await pass(5);
        for (const epoch of ["2", "3"]) {  // from a backup that was made just before
          known.clear();
          fake.rewind(epoch, 1);
          await pass(60);
          assert.equal(known.size, 1);
        }
        assert.deepEqual(fake.healed, [{ sent: 1, lost: 1 }, { sent: 1, lost: 1 }]);
    """,
    "what is told of a healing counts each mutation once": """
        const client = await fake.start();
        client.mutate("add", "a"), client.mutate("add", "b");
        await pass(5);
        fake.instead.snapshot = (call) => {
          fake.held.add("pull");
          return fake.snapshot(call);
        };
        fake.rewind("2", 0);
        await pass(40);
        fake.rewind("3", 2);  // nothing is lost
        fake.held.clear();
        fake.answer("pull");
        await pass(40);
        assert.deepEqual([fake.data, client.state], [["a", "b"], ["a", "b"]]);
        assert.deepEqual(fake.healed, [{ sent: 2, lost: 2 }]);
    """,
    "a state of another version does not keep a restored server from being healed": """
        const migrate = () => { throw new Error("It can't be read."); };
        for (const options of [{ version: 2 }, { version: 2, migrate }]) {
          const kept = makeKept(), old = await fake.start({ ...kept, version: 1 });
          old.mutate("add", "a");
          await pass(5);
          old.close();
          fake.rewind(`after ${fake.epoch}`, 0);
          const client = fake.make({ ...kept, ...options });
          client.mutate("add", "b");
          client.start();
          await pass(5);
          assert.deepEqual([fake.data, client.state], [["a", "b"], ["a", "b"]]);
          assert.deepEqual([fake.healed.pop(), client.pending],
            [{ sent: 1, lost: 1 }, []]);
          client.close();
          fake.restore(`before ${fake.epoch}`);
        }
        assert.equal(reports().length, 1);  // of migrate()
    """,
    "a state of another version still tells that the server was replaced": """
        const kept = makeKept(), old = await fake.start({ ...kept, version: 1 });
        const seen = [];
        old.mutate("add", "a");
        await pass(5);
        old.close();
        fake.restore("2");
        fake.database = "other";
        const client = fake.make({ ...kept, version: 2 });
        client.addEventListener("replaced", ({ detail }) => seen.push(detail));
        client.start();
        await pass(5);
        assert.deepEqual(seen, [{ database: "other", before: "d" }]);
        assert.deepEqual([fake.data, kept.storage.memory], [[], []]);
        assert.equal(client.status.retained, 0);
    """,
    "what the storage failed to retain is offered to it again": """
        const kept = makeKept(), client = await fake.start(kept);
        await pass(2);
        kept.storage.limits.retain = "fails";
        client.mutate("add", "a");
        await pass(3);
        assert.deepEqual([kept.storage.memory, client.status.saved], [[], false]);
        kept.storage.limits.retain = 0;
        client.mutate("add", "b");
        await pass(40);
        assert.deepEqual(kept.storage.memory.map(({ mutation }) => mutation.args),
          ["a", "b"]);
        assert.deepEqual([client.status.retained, client.status.saved], [2, true]);
        assert.equal(reports().length, 1);
    """,
    "a server whose snapshot has gone is not taken for another": """
        const kept = makeKept(), client = await fake.start(kept), seen = [];
        client.addEventListener("replaced", ({ detail }) => seen.push(detail));
        client.mutate("add", "a");
        await pass(5);
        fake.rewind("2", 0);
        fake.instead.snapshot = () => refuse(404, "not_found");
        await pass(60);
        assert.deepEqual([seen, client.status.retained], [[], 1]);
        assert.deepEqual(kept.storage.memory.map(({ mutation, database }) =>
          [mutation.args, database]), [["a", "d"]]);
    """,
    "a tab that had loaded nothing heals what the others knew": """
        const open = makeBrowser(), one = open(fake), two = open(fake);
        one.start();
        await pass(2);
        one.mutate("add", "a");
        await pass(3);
        one.stop(), one.end();
        fake.rewind("2", 0);
        ["x", "y"].forEach(fake.add);  // it seems to be newer than what is stored
        two.start();
        await pass(20);
        assert.deepEqual([fake.data, two.state], [["x", "y", "a"], fake.data]);
        assert.deepEqual(fake.healed, [{ sent: 1, lost: 1 }]);
        const { saved } = two.storage;
        assert.deepEqual([saved.epoch, saved.cursor], ["2", 3]);
    """,
    "what is confirmed while a state is saved keeps its key until it is retained": """
        const kept = makeKept(), client = await fake.start(kept);
        await pass(2);
        Object.assign(kept.storage.limits, { save: 9, retain: 20 });
        fake.instead.push = (call) => {
          fake.push(call);
          throw new TypeError("The answer was lost.");
        };
        client.mutate("add", "a");
        while (kept.storage.saves.length < 2) await pass(0.1);  // it contains "a"
        assert.equal(client.pending.length, 1);
        fake.instead = {};
        await pass(12);
        assert.deepEqual([client.pending, kept.storage.saved.cursor], [[], 1]);
        assert.deepEqual([kept.queue.queue.length, kept.storage.memory], [1, []]);
        await pass(20);
        assert.deepEqual([kept.queue.queue, kept.storage.memory.length], [[], 1]);
    """,
    "what was confirmed before the first snapshot is not lost with a restore": """
        fake.held.add("snapshot");
        const client = fake.make();
        const mutation = client.mutate("add", "a");
        client.start();
        await pass(2);
        assert.deepEqual([fake.data, client.status.loaded], [["a"], false]);
        fake.rewind("2", 0);
        fake.add("x");
        fake.held.clear();
        fake.answer("snapshot");
        await client.confirmed(mutation);
        await pass(2);
        assert.deepEqual([fake.data, client.state], [["x", "a"], ["x", "a"]]);
    """,
    "one push brings each mutation back once": """
        const kept = makeKept(), client = await fake.start(kept);
        await pass(2);
        kept.storage.limits.save = 5;
        client.mutate("add", "a");
        await pass(3);  // it is retained, and the state is being saved
        assert.deepEqual([kept.storage.memory.length, kept.queue.queue.length], [1, 1]);
        fake.rewind("2", 0);
        fake.calls.length = 0;
        client.stop(), client.start();
        await pass(20);
        assert.deepEqual(fake.all("push").map(({ body }) => body.length), [1]);
        assert.deepEqual([fake.data, client.state], [["a"], ["a"]]);
    """,
    "after an interruption nothing is pushed before a pull has ended": """
        const page = makePage(), kept = makeKept();
        const client = await fake.live(kept);
        await pass(2);
        const cut = {
          start: () => (client.stop(), client.start()),
          socket: () => fake.socket.end(),
          wake: () => page.tell("online"),
          request() {
            fake.instead.push = () => { throw new TypeError("It was lost."); };
            client.mutate("add", "lost");
          },
        };
        for (const [name, interrupt] of Object.entries(cut)) {
          fake.held.add("pull");
          fake.calls.length = 0;
          interrupt();
          await quiet();
          fake.instead = {};
          client.mutate("add", name);
          await pass(4);
          if (fake.socket.readyState === 0) fake.socket.open();
          await pass(1);
          const isPushed = ({ body }) => body.some(({ args }) => args === name);
          assert.ok(!fake.all("push").some(isPushed), name);
          assert.ok(fake.all("pull").length > 0, name);
          fake.held.clear();
          fake.answer("pull");
          await pass(5);
          assert.deepEqual([fake.data.at(-1), client.pending], [name, []]);
        }
    """,
    "after a silent request a mutation waits for the pull that finds a restore": """
        const client = await fake.start();
        await pass(2);
        fake.held.add("pull");
        await pass(100);
        assert.equal(client.status.error.code, "");
        fake.calls.length = 0;
        client.mutate("add", "a");
        await quiet();
        assert.deepEqual(fake.all("push"), []);
    """,
    "start() with a token frees what waits for another one": """
        const client = await fake.start({ token: () => new Promise(() => {}) });
        client.mutate("add", "a");
        await pass(5);
        assert.deepEqual(fake.calls, []);
        client.start("another");
        await pass(5);
        assert.deepEqual([fake.data, fake.last("push").token], [["a"], "another"]);
    """,
    "one token is asked for at a time, and start() frees all that wait for it": """
        let asked = 0;
        const token = () => ++asked === 2 ? new Promise(() => {}) : `t${asked}`;
        const client = await fake.live({ token });
        await pass(5);
        fake.instead.pull = () => refuse(401, "unauthorized");
        fake.socket.say({ cursor: 1 });
        await quiet();
        fake.instead = {};
        fake.add("a");
        fake.socket.end();
        await pass(5);  // the socket needs a new one, too
        client.start("another");
        await pass(5);
        assert.deepEqual([client.state, asked], [["a"], 2]);
    """,
    "a save that fails is tried again, and retains what was confirmed": """
        const kept = makeKept(), { storage } = kept, client = await fake.start(kept);
        await pass(5);
        storage.limits.save = storage.limits.retain = "fails";
        client.mutate("add", "a");
        await pass(5);
        assert.equal(reports().length, 1);
        assert.equal(client.status.saved, false);
        storage.limits.save = storage.limits.retain = 0;
        await pass(60);
        assert.deepEqual([storage.saved.state, storage.memory.length], [["a"], 1]);
        assert.ok(client.status.saved);
    """,
    "a save that hangs is not begun again with each change": """
        const kept = makeKept(), { storage } = kept, client = await fake.live(kept);
        await pass(5);
        storage.limits.save = "hangs";
        storage.saves.length = 0;
        for (let turn = 0; turn < 20; turn++) {
          fake.hint(turn);
          await pass(2);
        }
        assert.equal(storage.saves.length, 1);
    """,
    "a save that hangs is told and tried again after a minute, without news, too": """
        const storage = makeStates(), client = await fake.live({ storage });
        await pass(5);
        storage.limits.save = "hangs";
        fake.hint("a");
        await pass(2);
        storage.limits.save = 0;
        for (const isSaved of [true, true, true, false, true, true]) {
          await pass(20);
          fake.socket.say({ cursor: 1, epoch: "1" });
          assert.deepEqual([client.status.saved, client.status.live], [isSaved, true]);
        }
        assert.deepEqual([storage.saved.cursor, reports().length], [1, 1]);
    """,
    "a storage that failed once, when nothing changed, is saved to again": """
        const kept = makeKept(), { storage } = kept, first = await fake.start(kept);
        await pass(5);
        first.close();
        await quiet();
        storage.retained = async () => {
          await sleep(3);
          throw new Error("It is busy.");
        };
        const client = fake.make(kept);
        await pass(5);
        assert.deepEqual([client.status.saved, reports().length], [false, 1]);
        await pass(30);
        assert.ok(client.status.saved);
    """,
    "what could not be retained is healed while its page lives": """
        const kept = makeKept(), client = await fake.start(kept);
        await pass(5);
        kept.storage.limits.retain = "fails";
        client.mutate("add", "a");
        await pass(5);
        assert.deepEqual([fake.data, reports().length], [["a"], 1]);
        fake.rewind("2", 0);
        await pass(100);
        assert.deepEqual([fake.data, fake.healed], [["a"], [{ sent: 1, lost: 1 }]]);
        reports();
    """,
    "confirmed() is rejected if the client is closed while it opens": """
        makeLocks();  // it gets one later
        const kept = makeKept(), first = fake.make(kept), { id } = first.mutate("add");
        await quiet();
        first.close();
        await quiet();
        const client = fake.make(kept), outcome = client.confirmed(id);
        client.close();
        await assert.rejects(outcome, { code: "closed" });
    """,
    "what another tab has pushed is not shown twice, where pulls are held": """
        const open = makeBrowser(), tabs = [open(fake), open(fake)];
        const away = () => { throw new TypeError("away"); };
        const holding = async (call) => {
          if (call.query.wait !== "0") await sleep(25);
          return fake.pull(call);
        };
        fake.instead.pull = holding;
        for (const tab of tabs) tab.start();
        await pass(5);
        fake.instead = { push: away, pull: away };
        await pass(30);
        tabs[0].mutate("add", "a");
        await pass(5);
        assert.deepEqual(tabs.map(({ state }) => state), [["a"], ["a"]]);
        fake.instead = { pull: holding };
        for (const tab of tabs) tab.page.tell("online");
        await pass(8);
        assert.deepEqual(fake.data, ["a"]);
        assert.deepEqual(tabs.map(({ state }) => state), [["a"], ["a"]]);
    """,
    "what was never loaded does not keep a mutation back": """
        fake.held.add("snapshot").add("pull");
        const client = fake.make();
        client.mutate("add", "a");
        client.start();
        await pass(5);
        assert.deepEqual([fake.data, client.status.loaded], [["a"], false]);
    """,
    "a mutation waits for a server that is away without asking it again and again": """
        const client = await fake.start();
        await pass(2);
        fake.instead.pull = () => refuse(503, "unavailable");
        client.stop(), client.start();
        fake.calls.length = 0;
        client.mutate("add", "a");
        await pass(300);
        const { length } = fake.calls;
        assert.ok(length > 5 && length < 30, length);
        fake.instead = {};
        await pass(40);
        assert.deepEqual([fake.data, client.pending], [["a"], []]);
    """,
    "the first pull after a wake is not held": """
        const page = makePage(), client = await fake.start();
        fake.instead.pull = (call) => {
          if (call.query.wait === "0") fake.held.add("pull");  // the next one
          return fake.pull(call);
        };
        await pass(50);
        assert.equal(fake.last("pull").query.wait, "25");
        fake.calls.length = 0;
        fake.held.clear();
        page.hide(false);  // it is shown
        await quiet();
        const waits = fake.all("pull").map(({ query }) => query.wait);
        assert.deepEqual(waits, ["0", "25"]);
        assert.ok(client.status.online);
    """,
    "a socket that is lost makes no client pull before the next one opens": """
        const client = await fake.live();
        await pass(2);
        fake.calls.length = 0;
        fake.socket.end();
        await pass(9);
        assert.deepEqual([fake.sockets.length, fake.calls], [2, []]);
        fake.socket.open();
        await quiet();
        assert.deepEqual(fake.calls.map(({ path }) => path), ["pull"]);
        assert.ok(client.status.live);
    """,
    "three scopes of a page share one connection": """
        const { WebSocket } = fake, open = (scope) => fake.start({ WebSocket, scope });
        const [a, b, c] = [await open("a"), await open("b"), await open("c")];
        fake.socket.open();
        await quiet();
        assert.deepEqual([fake.sockets.length, fake.socket.scope], [1, "a"]);
        assert.deepEqual(fake.socket.sent, ["a", "b", "c"].map((scope) =>
          ({ topic: "subscribe", data: { scope, changes: true } })));
        assert.ok([a, b, c].every(({ status }) => status.live));
        fake.calls.length = 0;
        const { cursor, changes } = fake.add("x", "b");
        fake.socket.say({ cursor, epoch: "1", after: 0, changes }, "b");
        await quiet();
        assert.deepEqual([a.state, b.state, c.state], [[], ["x"], []]);
        assert.equal(fake.calls.length, 0);
        const d = await open("d");  // the socket is there
        await pass(1);
        assert.deepEqual([fake.sockets.length, d.status.live], [1, true]);
        assert.deepEqual(fake.socket.scopes("subscribe"), ["a", "b", "c", "d"]);
    """,
    "a client that stops unsubscribes, and the last one closes the socket": """
        const { WebSocket } = fake, open = (scope) => fake.start({ WebSocket, scope });
        const [a, b, twin] = [await open("a"), await open("b"), await open("b")];
        fake.socket.open();
        await pass(1);
        assert.ok(twin.status.live);
        const { socket } = fake;
        twin.stop();
        assert.deepEqual(socket.scopes("unsubscribe"), []);  // "b" has another client
        b.stop();
        assert.deepEqual([socket.scopes("unsubscribe"), b.status.live], [["b"], false]);
        assert.ok(a.status.live && !socket.closed);
        b.start();
        await pass(1);
        assert.deepEqual([fake.sockets.length, b.status.live], [1, true]);
        b.close();
        assert.deepEqual(socket.scopes("unsubscribe"), ["b", "b"]);
        assert.ok(!socket.closed);
        a.stop();
        await quiet();
        assert.ok(socket.closed);
        a.start();
        await pass(1);
        assert.equal(fake.sockets.length, 2);
    """,
    "a scope that is not allowed any more disturbs no other": """
        const { WebSocket } = fake, open = (scope) => fake.start({ WebSocket, scope });
        const [a, b, c] = [await open("a"), await open("b"), await open("c")];
        fake.socket.open();
        await pass(1);
        fake.calls.length = 0;
        const error = { code: "forbidden", error: "a reason" };
        fake.socket.tell("error", error);  // of no scope: it concerns nobody
        await quiet();
        assert.deepEqual([fake.calls, b.status.live], [[], true]);
        for (const path of ["pull", "snapshot"]) {
          fake.instead[path] = (call) => call.query.scope === "b"
            ? refuse(403, "forbidden") : fake[path](call);
        }
        fake.socket.tell("error", { ...error, scope: "b" });
        await quiet();
        const { status } = b;
        assert.deepEqual([status.live, status.running, status.error.action],
          [false, false, "start"]);
        assert.deepEqual(fake.calls.map(({ query }) => query.scope), ["b"]);
        await pass(300);
        assert.ok([a, c].every((client) => client.status.running));
        fake.hint("of nobody");
        fake.instead = {};
        b.start();
        await pass(10);
        assert.ok(b.status.online);
    """,
    "a scope that was refused does not keep the others from a socket": """
        const { WebSocket } = fake, open = (scope) => fake.start({ WebSocket, scope });
        const a = fake.make({ WebSocket, scope: "a" }), calls = [];
        fake.instead.pull = (call) => call.query.scope === "a"
          ? [{ pieces: [null], gap: 1 }, {}] : fake.pull(call);  // a slow one
        a.start();
        await quiet();
        const b = await open("b");
        for (let round = 0; round < 3; round++) {
          const { socket } = fake;
          assert.equal(socket.scope, "a");
          socket.end(1008);
          await pass(3);
          if (socket === fake.socket) break;
        }
        a.stop();
        await pass(5);
        fake.socket.open();
        await pass(1);
        assert.deepEqual([fake.socket.scope, b.status.live], ["b", true]);
    """,
    "a scope that is allowed again is subscribed again within 5 s": """
        const { WebSocket } = fake, open = (scope) => fake.start({ WebSocket, scope });
        const [a, b] = [await open("a"), await open("b")];
        fake.socket.open();
        await pass(1);
        fake.socket.tell("error", { code: "forbidden", error: "a reason", scope: "b" });
        await quiet();
        assert.deepEqual([a.status.live, b.status.live], [true, false]);
        assert.ok(b.status.running);  // its pulls succeed
        await pass(6);
        assert.deepEqual(fake.socket.scopes("subscribe"), ["a", "b", "b"]);
        fake.socket.say({ cursor: 0 }, "b");
        assert.ok(b.status.live);
        assert.equal(fake.sockets.length, 1);
    """,
    "a scope that is forbidden at the start keeps no other from the socket": """
        for (const path of ["pull", "snapshot"]) {
          fake.instead[path] = (call) => call.query.scope === "a"
            ? refuse(403, "forbidden") : fake[path](call);
        }
        const { WebSocket } = fake;
        const make = (scope) => fake.make({ WebSocket, scope });
        const [a, b, c] = ["a", "b", "c"].map(make);
        for (const client of [a, b, c]) client.start();
        await quiet();
        for (let seconds = 0; seconds < 60; seconds += 3) {
          // The server upgrades no request for "a".
          if (fake.socket.scope === "a") fake.socket.end();
          else if (fake.socket.readyState === 0) fake.socket.open();
          await pass(3);
        }
        assert.deepEqual([a.status.running, a.status.error.action], [false, "start"]);
        assert.deepEqual([b.status.live, c.status.live], [true, true]);
        assert.ok(fake.sockets.length <= 3, fake.sockets.length);
    """,
    "a topic that is silent for 60 s is subscribed anew, and the socket stays": """
        const { WebSocket } = fake, open = (scope) => fake.start({ WebSocket, scope });
        const [a, b] = [await open("a"), await open("b")];
        fake.socket.open();
        await quiet();
        for (let seconds = 0; seconds < 100; seconds += 10) {
          fake.socket.say({ cursor: 0 }, "a");
          await pass(10);
        }
        assert.deepEqual([fake.sockets.length, fake.socket.closed], [1, undefined]);
        assert.deepEqual(fake.socket.scopes("subscribe"), ["a", "b", "b"]);
        assert.deepEqual([a.status.live, b.status.live], [true, false]);
        fake.socket.say({ cursor: 0 }, "b");
        assert.ok(b.status.live);
    """,
    "a socket that lives by one scope is dead when all of them are silent": """
        const { WebSocket } = fake, open = (scope) => fake.start({ WebSocket, scope });
        await open("a"), await open("b");
        fake.socket.open();
        const [first] = fake.sockets;
        await pass(75);
        assert.deepEqual([first.closed, fake.sockets.length], [true, 2]);
    """,
    "what has another user, token, address or WebSocket has a socket of its own": """
        const token = () => "t", other = class extends fake.WebSocket {};
        const shared = { WebSocket: fake.WebSocket, user: "ann", token, scope: "a" };
        const differences = [{}, { user: "ben" }, { token: () => "t" }, { token: "t" },
          { url: "http://fake/sub/" }, { WebSocket: other }];
        for (const difference of differences) {
          await fake.start({ ...shared, ...difference });
        }
        assert.equal(fake.sockets.length, differences.length);
        for (const difference of differences) {
          await fake.start({ ...shared, ...difference, scope: "b" });
        }
        assert.equal(fake.sockets.length, differences.length);
    """,
    "a client that is started with a new token moves to a socket of that token": """
        const options = { WebSocket: fake.WebSocket, token: "old" };
        const a = await fake.start({ ...options, scope: "a" });
        const b = await fake.start({ ...options, scope: "b" });
        fake.socket.open();
        await pass(1);
        a.start("new");
        await pass(1);
        assert.deepEqual(fake.sockets.map(({ token }) => token), ["old", "new"]);
        const [old, fresh] = fake.sockets;
        fresh.open();
        await pass(1);
        assert.deepEqual([a.status.live, b.status.live, old.closed],
          [true, true, undefined]);
        assert.deepEqual([old.scopes("unsubscribe"), fresh.scopes("subscribe")],
          [["a"], ["a"]]);
        b.start("new");
        await pass(1);
        assert.deepEqual([fake.sockets.length, old.closed, b.status.live],
          [2, true, true]);
        assert.deepEqual(fresh.scopes("subscribe"), ["a", "b"]);
    """,
    "a close with 1008 that concerns the token is answered once for all scopes": """
        let number = 0;
        const token = () => `t${++number}`, { WebSocket } = fake;
        for (const scope of ["a", "b"]) await fake.start({ WebSocket, token, scope });
        fake.socket.open();
        await pass(1);
        fake.socket.end(1008);
        await pass(3);
        assert.equal(fake.sockets.length, 2);
        fake.socket.end(1008);
        await pass(300);
        assert.equal(fake.sockets.length, 2);
    """,
    "at most four pulls of a page are held, and a push finds a connection": """
        // A browser has six connections to a server; the server holds empty pulls.
        const open = new Set(), queue = [];
        let most = 0;
        const held = () => [...open].filter((address) => /wait=[1-9]/.test(address));
        const next = () => {
          if (open.size < 6) queue.shift()?.();
        };
        const fetch = async (address, options) => {
          const call = Object(address);
          if (open.size >= 6) await new Promise((resolve) => queue.push(resolve));
          open.add(call);
          most = Math.max(most, held().length);
          try {
            const answer = await fake.fetch(address, options);
            const { searchParams: query } = new URL(address);
            const end = sleep(query.get("wait"));
            const isEmpty = () => !fake.of(query.get("scope")).some(({ cursor }) =>
              cursor > query.get("cursor"));
            while (address.includes("pull") && isEmpty() && query.get("wait") > 0) {
              const more = sleep(0.5);
              const over = new Promise((_, reject) => options.signal.addEventListener(
                "abort", () => reject(options.signal.reason)));
              if (await Promise.race([end.then(() => true), more, over])) return answer;
            }
            return query.get("wait") > 0 ? fake.fetch(address, options) : answer;
          } finally {
            open.delete(call);
            next();
          }
        };
        const clients = [];
        for (const scope of "abcdefgh") {
          clients.push(await fake.start({ fetch, scope }));
        }
        await pass(100);
        assert.deepEqual([most, held().length], [4, 4]);
        for (const client of clients) {
          const mutation = client.mutate("add", client.scope);
          await pass(0.4);
          assert.ok(fake.of(client.scope).length, client.scope);
          await pass(7);
          assert.deepEqual([client.state, client.pending], [[client.scope], []]);
        }
        for (const client of clients) fake.add("of another", client.scope);
        await pass(7);
        for (const { state, scope } of clients) assert.equal(state.length, 2, scope);
        clients.slice(0, 7).forEach((client) => client.stop());
        await pass(40);
        assert.equal(held().length, 1);  // the last may hold one now
    """,
    "offline, a tab shows what waits in the others": """
        const open = makeBrowser(), one = open(fake), two = open(fake);
        one.start(), two.start();
        await pass(2);
        one.stop(), two.stop();
        one.mutate("add", "a");
        await pass(0.2);
        assert.deepEqual([two.state, two.status.waiting], [["a"], 1]);
        assert.deepEqual(two.pending, one.pending);
        two.mutate("add", "b");
        await pass(0.2);
        assert.deepEqual([one.state, two.state], [["a", "b"], ["a", "b"]]);
        const three = open(fake);  // it finds them there
        await pass(2);
        assert.deepEqual([three.state, three.status.waiting], [["a", "b"], 2]);
        const ben = open(fake, { user: "ben" });
        await pass(2);
        assert.deepEqual([ben.state, ben.status.waiting], [[], 0]);
    """,
    "a tab that loses the server shows what waits in the others": """
        const open = makeBrowser(), one = open(fake), two = open(fake);
        one.start(), two.start();
        await pass(2);
        for (const path of ["push", "pull"]) {
          fake.instead[path] = () => { throw new TypeError("There is no network."); };
        }
        one.mutate("add", "a");
        while (two.status.online) await pass(0.1);
        assert.deepEqual([two.state, two.status.waiting], [["a"], 1]);
        fake.instead = {};
        await pass(60);
        assert.deepEqual([fake.data, one.state, two.state], [["a"], ["a"], ["a"]]);
        assert.deepEqual([one.pending, two.pending], [[], []]);
        const ids = fake.all("push").flatMap(({ body }) => body.map(({ id }) => id));
        assert.equal(new Set(ids).size, 1);
    """,
    "another tab's mutations are not pushed while it lives": """
        const open = makeBrowser(), one = open(fake), two = open(fake);
        one.mutate("add", "a"), two.mutate("add", "b");
        await pass(2);
        two.start();
        await pass(60);
        assert.deepEqual([fake.data, one.status.waiting > 0], [["b"], true]);
        assert.deepEqual(fake.all("push").map(({ body }) => body[0].args), ["b"]);
        one.start();
        await pass(40);
        assert.deepEqual([fake.data, one.state, two.state],
          [["b", "a"], ["b", "a"], ["b", "a"]]);
        assert.deepEqual([one.pending, two.pending, one.queue.queue], [[], [], []]);
    """,
    "what another tab has pushed or lost is shown until the state tells of it": """
        const open = makeBrowser(), seen = [];
        const predict = (state, { args }) => [...new Set([...state, args])];
        const one = open(fake, { predict }), two = open(fake, { predict });
        two.start(), one.start();
        await pass(2);
        one.stop(), two.stop();
        one.mutate("add", "a");
        await pass(1);
        assert.deepEqual(two.state, ["a"]);
        two.addEventListener("change", () => seen.push(two.state.join()));
        fake.held.add("pull");
        two.start();
        one.start();
        await pass(2);
        fake.held.clear();
        for (const call of fake.all("pull")) call.answer(fake.pull(call));
        await pass(5);
        assert.deepEqual([fake.data, two.state, two.pending], [["a"], ["a"], []]);
        assert.deepEqual([...new Set(seen)], seen.slice(0, 1));
        assert.equal(seen.at(-1) ?? "a", "a");
        assert.deepEqual([one.state, one.queue.queue], [["a"], []]);
    """,
    "another tab's mutation that was refused is shown no longer": """
        for (const isLive of [true, false]) {
          const open = makeBrowser(), WebSocket = isLive ? fake.WebSocket : null;
          const one = open(fake), two = open(fake, { WebSocket });
          await pass(2);
          one.mutate("add", "a");
          await pass(1);
          assert.deepEqual(two.state, ["a"]);
          two.start();
          await quiet();
          if (isLive) fake.socket.open();
          await pass(2);
          fake.instead.push = () =>
            json([{ ok: false, code: "conflict", error: "a reason" }]);
          one.start();
          await pass(9);
          assert.deepEqual([one.state, two.state, two.pending], [[], [], []]);
          assert.equal(fake.refused.length, 1);  // its own tab alone tells of it
          fake.instead = {}, fake.refused.length = 0;
          one.close(), two.close();
        }
    """,
    "what a crashed tab left is taken over within 5 s": """
        const open = makeBrowser(), one = open(fake), two = open(fake);
        two.start();
        await pass(2);
        one.mutate("add", "a");
        await pass(2);
        one.end();
        await pass(6);
        assert.deepEqual([fake.data, two.state, two.pending], [["a"], ["a"], []]);
        assert.deepEqual(two.queue.queue, []);
    """,
    "a frozen tab's queue is taken over, and is not pushed again when it wakes": """
        const open = makeBrowser(), one = open(fake), two = open(fake);
        two.start();
        await pass(2);
        one.mutate("add", "a");
        await pass(2);
        one.page.tell("freeze");
        one.page.isFrozen = true;
        await pass(6);
        assert.deepEqual([fake.data, two.pending], [["a"], []]);
        one.page.isFrozen = false;
        one.page.tell("resume");
        fake.calls.length = 0;
        one.start();
        await pass(5);
        assert.deepEqual([one.state, one.pending], [fake.data, []]);
        assert.equal(fake.all("push").length, 0);
        one.mutate("add", "b");  // it works as before
        await pass(40);
        assert.deepEqual([two.state, one.pending], [fake.data, []]);
        assert.deepEqual(fake.data, ["a", "b"]);
    """,
    "a tab that was frozen and woken before anybody came pushes what it has": """
        const open = makeBrowser(), one = open(fake);
        one.mutate("add", "a");
        await pass(2);
        one.page.tell("freeze");
        await pass(60);
        one.page.tell("resume");
        await quiet();
        const two = open(fake);
        two.start();
        await pass(20);
        assert.deepEqual(fake.data, []);  // it lives, and has it
        one.start();
        await pass(5);
        assert.deepEqual([fake.data, one.state, one.pending], [["a"], ["a"], []]);
        assert.deepEqual(one.queue.queue, []);
    """,
    "what another tab had confirmed is retained by that tab alone": """
        const open = makeBrowser(), one = open(fake), two = open(fake);
        fake.add("x");
        await pass(2);
        one.mutate("add", "a");
        await pass(1);
        assert.deepEqual(two.pending, one.pending);
        one.start();
        await pass(3);
        assert.deepEqual([fake.data, one.queue.queue], [["x", "a"], []]);
        two.page.tell("freeze");  // it waits for a pull that tells of "a"
        two.page.tell("resume");
        two.start();
        await pass(5);
        assert.deepEqual([two.state, two.pending], [["x", "a"], []]);
        assert.deepEqual(two.storage.memory.map(({ cursor }) => cursor), [2]);
        assert.equal(fake.all("push").length, 1);
    """,
    "nobody waits for ever for a mutation that another tab took over": """
        const conflict = () =>
          json([{ ok: false, code: "conflict", error: "a reason" }]);
        for (const push of [fake.push, conflict]) {
          fake.instead.push = push;
          const open = makeBrowser(), one = open(fake), two = open(fake);
          two.start();
          await pass(2);
          const outcome = assert.rejects(one.confirmed(one.mutate("add", "a")),
            { code: "unknown" });
          await pass(2);
          one.page.tell("freeze");
          one.page.isFrozen = true;
          await pass(8);
          assert.deepEqual(two.queue.queue, []);
          one.page.isFrozen = false;
          one.page.tell("resume");
          one.start();
          await pass(5);
          assert.deepEqual([one.state, one.pending], [two.state, []]);
          await outcome;
          one.close(), two.close();
        }
        assert.deepEqual([fake.data, fake.refused.length], [["a"], 1]);
    """,
    "a tab that wakes shows what it has made all the time": """
        const open = makeBrowser(), { locks } = navigator, { request } = locks;
        locks.request = async (...asked) => (await null, request(...asked));
        const one = open(fake), seen = [];
        one.start();
        await pass(10);
        fake.held.add("push");
        const mutation = one.mutate("add", "a");
        one.addEventListener("change", () => seen.push(one.state.join()));
        await quiet();
        one.page.tell("freeze");
        await pass(6);  // timers that ran out meanwhile
        one.page.tell("resume");
        await pass(1);
        fake.held.clear();
        fake.answer("push");
        await pass(40);
        assert.deepEqual([fake.data, one.state, one.pending], [["a"], ["a"], []]);
        assert.deepEqual(seen.filter((state) => state !== "a"), []);
        await one.confirmed(mutation);
    """,
    "a tab that wakes pulls before it pushes": """
        const open = makeBrowser(), one = open(fake);
        one.start();
        await pass(2);
        one.mutate("add", "a");
        await pass(5);
        one.page.tell("freeze");
        fake.rewind("2", 0);
        one.page.tell("resume");
        one.mutate("add", "b");
        await pass(10);
        assert.deepEqual([fake.data, one.state], [["a", "b"], ["a", "b"]]);
        assert.deepEqual(fake.healed, [{ sent: 1, lost: 1 }]);
    """,
    "what a tab takes over is as patiently pushed as what it had": """
        let isThere = false;
        const open = makeBrowser(), one = open(fake), two = open(fake);
        two.start();
        await pass(2);
        two.mutate("add", "a");
        await pass(5);
        one.mutate("add", "b");
        await pass(1);
        two.stop();
        fake.instead.push = ({ body }) => json(body.map((mutation) =>
          mutation.args === "b" && !isThere
            ? { ok: false, code: "not_found", error: "a reason" }
            : fake.apply(mutation)));
        fake.rewind("2", 0);
        two.start();
        await pass(2);
        assert.deepEqual(fake.data, ["a"]);
        one.end();
        await pass(10);
        assert.deepEqual([fake.refused, two.status.waiting], [[], 1]);
        isThere = true;
        await pass(30);
        assert.deepEqual([fake.data, two.state], [["a", "b"], ["a", "b"]]);
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
troubles = st.sampled_from([0, 0, 0.5, 3, 10, "fails", "hangs"])
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
        self.live.loop.set_debug(False)  # else it takes half of the time
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
        who=persons,
        what=st.sampled_from(["drop", "mute", "stop", "start", "reload", "crash"]),
    )
    def do(self, who: int, what: str) -> None:
        self.node(what, who)

    @rule(who=persons, seconds=st.sampled_from([0, 3, 15]), blocked=st.booleans())
    def sockets_are(self, who: int, seconds: int, blocked: bool) -> None:
        self.node("line", who, {"lag": 1000 * seconds, "isBlocked": blocked})

    @rule(who=persons, load=troubles, save=troubles)
    def a_storage_has_trouble(self, who: int, load: Any, save: Any) -> None:
        self.node("storage", who, {"load": load, "save": save})

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
        self.serve("move")

    @rule(who=persons, times=st.integers(1, 2))
    def sleep_over_restores(self, who: int, times: int) -> None:
        self.edit(who, "e", ("create", {"title": "x"}))
        self.wait(0.1)
        self.node("stop", who)
        for _ in range(times):
            self.back_up()
            self.edit((who + 1) % 3, "d", ("create", {"title": "y"}))
            self.restore()
        self.node("start", who)

    def teardown(self) -> None:
        if not hasattr(self, "live"):
            return
        with self.stack:
            # A refusal by a restored server is told after some 11 minutes.
            seen = self.node("converge", 900)
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
        Persons, settings=settings(max_examples=12, stateful_step_count=30)
    )


class Ask(NamedTuple):
    """A mutation that a client made."""

    who: int
    name: str
    args: dict[str, Any]


class Outage:
    """Three clients, and a server that is killed and put back to its backup.

    The history is drawn by a seed; what the threads and processes of this machine make
    of it is not. Each todo has an id and a title of its own, so that the end tells
    which mutations are in it."""

    def __init__(self, node: Node, folder: Path, seed: int) -> None:
        self.node, self.path = node, folder / "todos.db"
        self.chance = random.Random(seed)
        self.asks = dict[str, Ask]()  # by the id of the mutation
        self.open, self.closed = {0, 1, 2}, set[int]()
        self.vanished = set[int]()  # at an outage
        self.running = ExitStack()
        self.start("0")
        is_shared = self.chance.random() < 0.3  # two are tabs of one browser
        self.do("begin", "{}:{}".format(*self.program.address), is_shared)

    def do(self, *call: Any) -> Any:
        print(*call)  # pytest shows it where the test fails
        return self.node(*call)

    def start(self, port: str) -> None:
        self.program = self.running.enter_context(
            program("--db", str(self.path), "--port", port)
        )

    def edit(self) -> None:
        """Let somebody edit what that client shows."""
        who = self.chance.choice(sorted(self.open))
        shown = [todo["id"] for todo in self.do("look", who)]
        kinds = ["create", "create", "title", "title", "done", "undone", "delete"]
        kind = self.chance.choice(kinds) if shown else "create"
        number = len(self.asks)
        key = f"todo {number}" if kind == "create" else self.chance.choice(shown)
        args = {"id": key}
        if kind in ("create", "title"):
            args["title"] = f"title {number}"
        elif kind in ("done", "undone"):
            args["completed"] = kind == "done"
        name = f"todo.{kind if kind in ('create', 'delete') else 'update'}"
        if made := self.do("edit", who, name, args):
            self.asks[made] = Ask(who, name, args)

    def live(self, moments: int) -> None:
        """Let clients edit, wait, and come and go."""
        for _ in range(moments):
            match self.chance.choices(["edit", "wait", "stop", "start"], [6, 3, 1, 2]):
                case ["edit"]:
                    self.edit()
                case ["wait"]:
                    self.do("pass", self.chance.choice([0, 0.1, 1.2, 5]))
                case [word]:
                    self.do(word, self.chance.choice(sorted(self.open)))

    def end(self, who: int, word: str) -> None:
        """Close the client, or end its page without a word."""
        self.do(word, who)
        if word == "vanish":
            self.vanished.add(who)
        self.open.discard(who)
        self.closed.add(who)

    def come_back(self, who: int) -> None:
        if who in self.closed:
            self.do("open", who)
            self.closed.discard(who)
            self.open.add(who)
        else:
            self.do("start", who)

    def kill(self) -> None:
        """Kill the server, at times while it has a request."""
        process = self.program.process
        if self.chance.random() < 0.6:
            who = self.chance.choice(sorted(self.open))
            moment = self.chance.uniform(0, 6)  # ms
            self.do("line", who, {"server": process.pid, "moment": moment})
            self.do("start", who)
            self.do("fault", who, "kill")
            self.edit()
            self.do("pass", self.chance.choice([0, 0.1, 40]))
        process.kill()
        process.wait(PATIENCE)

    def restore(self, backup: Path) -> None:
        for suffix in ("-wal", "-shm"):
            self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)
        shutil.copy(backup, self.path)

    def go_down_and_up(self, backup: Path | None) -> None:
        """Kill the server, restore the backup, and let the clients come back."""
        address = self.program.address
        self.kill()
        for who in sorted(self.open):
            fate = self.chance.choice(["stay", "stop", "close", "vanish"])
            if fate == "stop":
                self.do("stop", who)
            elif fate != "stay" and len(self.open) > 1:
                self.end(who, fate)
        self.live(3)
        if backup:
            self.restore(backup)
        with held(address):
            self.start(str(address[1]))
        order = [0, 1, 2]
        self.chance.shuffle(order)
        for who in order:
            self.do("pass", self.chance.choice([0, 0.3, 8, 45]))
            may_vanish = self.chance.random() < 0.3
            self.come_back(who)
            if may_vanish:  # in the middle of the healing
                self.do("fault", who, *["slow"] * self.chance.randrange(4), "vanish")
            self.live(self.chance.randrange(4))
            if may_vanish:
                self.do("pass", self.chance.choice([0, 0.3, 8, 45]))
                self.do("reload", who)

    def run(self) -> None:
        """Go through one history, and judge its end."""
        self.live(15)
        backup = back_up(self.path)
        self.live(15)
        self.go_down_and_up(backup)
        again = self.chance.choice(["no", "killed", "restored"])
        if again != "no":
            self.go_down_and_up(backup if again == "restored" else None)
        for who in sorted(self.closed):
            self.come_back(who)
        self.judge(self.do("converge", 300, 700))

    def judge(self, seen: Any) -> None:
        answer = self.program.client().request("GET", "/sync/snapshot")
        data = answer.json["data"]
        with closing(sqlite3.connect(self.path)) as db:
            marks = db.execute("SELECT id FROM mizusync_mutations").fetchall()
            (changes,) = db.execute("SELECT count(*) FROM mizusync_changes").fetchone()
        applied = {key for (key,) in marks}
        told, refused = set(seen["told"]), set(seen["refused"])
        print(*seen["statuses"], sep="\n")
        shown = {todo["id"]: todo for todo in data["todos"]}

        # All agree, and nothing waits any more.
        assert seen["states"] == 3 * [data["todos"]]
        assert (seen["waiting"], seen["repeated"]) == ([0, 0, 0], [])
        # Nothing is applied twice: each mutation makes one change.
        assert changes == len(applied)
        # What was told ok is there, and each mutation has one outcome.
        assert not self.named(told - refused - applied)
        assert not self.named(self.asks.keys() - applied - refused)
        assert not self.named(applied & refused)
        # A refusal concerns what somebody has deleted, and lost nothing. A page that
        # vanishes in the second before it saves what it has seen, or was told, does not
        # know at its next visit that this was lost: what it finds in its queue is then
        # refused at once.
        for key in refused:
            ask = self.asks[key]
            is_lost = ask.name == "todo.create" or ask.args["id"] in shown
            assert not is_lost or ask.who in self.vanished, ask
        # Each todo is there, unless somebody deleted it: then it stays deleted.
        asks = self.named(applied)
        deleted = {args["id"] for _, name, args in asks if name == "todo.delete"}
        created = {args["id"] for _, name, args in asks if name == "todo.create"}
        assert shown.keys() == created - deleted
        # What one client alone wrote has its last value.
        for key, todo in shown.items():
            for field in ("title", "completed"):
                of_this = [ask for ask in asks if ask.args["id"] == key]
                writes = [ask for ask in of_this if field in ask.args]
                if len({ask.who for ask in writes}) == 1:
                    assert todo[field] == writes[-1].args[field]

    def named(self, keys: Iterable[str]) -> list[Ask]:
        """Return these mutations, in the order in which they were made."""
        return [ask for key, ask in self.asks.items() if key in set(keys)]


@pytest.mark.parametrize("seed", range(int(os.environ.get("HEALINGS", "3"))))
def test_clients_bring_back_what_a_restored_server_has_lost(
    node: Node, tmp_path: Path, seed: int
) -> None:
    """HEALINGS=100 in the environment tries a hundred histories instead of a few."""
    outage = Outage(node, tmp_path, seed)
    with outage.running:
        outage.run()


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
    """The page in one window: all that it shows, or one of its lists."""

    def __init__(self, page: Any, name: str = "") -> None:
        self.page = page
        self.view = page.get_by_role("region", name=name, exact=True) if name else page
        self.new = self.view.get_by_role("textbox", name="New todo")
        self.field = page.get_by_role("textbox", name="Title", exact=True)
        self.list = self.view.get_by_role("list", name="Todos")
        self.titles = self.list.locator(".title")
        self.offline = page.get_by_role("switch", name="Work offline")
        self.status = self.view.get_by_role("status")
        self.notice = page.get_by_role("alert")
        self.news = page.locator("#told")
        self.trouble = page.locator("#why")
        self.undo = self.view.get_by_role("button", name="Undo")
        self.clear = self.view.get_by_role("button", name="Clear completed")
        self.empty = self.view.locator(".empty")
        self.names = page.locator(".view h2")
        self.rows = page.get_by_role("navigation", name="My lists").locator("li")
        self.scope = page.get_by_role("textbox", name="Scope")

    def of(self, name: str) -> Window:
        """One of the two lists that are shown."""
        return Window(self.page, name)

    def row(self, name: str) -> Any:
        """A list's row in "My lists"."""
        link = self.page.get_by_role("link", name=name, exact=True)
        return self.rows.filter(has=link)

    def open_beside(self, name: str) -> None:
        self.page.get_by_role("link", name=f"Open {name} beside", exact=True).click()

    def has_lists(self, *rows: str) -> None:
        expect(self.rows).to_have_text([re.compile(f"^{row}\\s*$") for row in rows])

    def unfold(self) -> None:
        """Open "My lists", which are folded on a phone."""
        self.page.locator("#fold").evaluate("(fold) => { fold.open = true; }")

    def take_off(self, name: str) -> None:
        words = f"Take {name} off my lists"
        self.page.get_by_role("button", name=words, exact=True).click()

    def title(self, title: str) -> Any:
        return self.titles.filter(has_text=re.compile(f"^{re.escape(title)}$"))

    def pencil(self, title: str) -> Any:
        return self.list.get_by_role("button", name=f"Edit {title}", exact=True)

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

    def delete_all(self) -> None:
        self.filter("All").check()
        for button in self.list.get_by_role("button", name="Delete").all():
            button.click()

    def filter(self, name: str) -> Any:
        return self.view.get_by_role("radio", name=name, exact=True)

    def shows(self, *titles: str) -> None:
        expect(self.titles.filter(visible=True)).to_have_text(list(titles))

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
    names = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
    if (path := next(filter(None, map(shutil.which, names)), None)) is None:
        pytest.skip(f"no browser to open the page in: none of {', '.join(names)}")
    quiet = ("background-networking", "component-update", "sync", "quic", "gpu")
    flags = ["--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in quiet)]
    # Two pages of the address line, in each window: half of what the windows take.
    # (Of this switch the last counts: Playwright's own names give way.)
    flags.append("--disable-features=WebUIOmniboxPopup,WebUIOmniboxAimPopup")
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


# How a window is taken offline, and what its status says then.
OFFLINE = {
    "the switch": (lambda window, yes: window.offline.set_checked(yes), "offline"),
    "the network": (
        lambda window, yes: window.page.context.set_offline(yes),
        "no connection",
    ),
}

UNREACHABLE = (
    "The server can't be reached. This page keeps trying. "
    "What you do meanwhile is kept."
)


def of_demo(name: str, **args: Any) -> dict[str, Any]:
    """A mutation of somebody else's."""
    return todo(name, **args) | {"scope": "demo"}


def titles_at(server: Live | Program, scope: str = "demo") -> list[str]:
    """The titles that the server has."""
    with closing(RawClient(server.address)) as client:
        state = client.request("GET", f"/sync/snapshot?scope={scope}").json["data"]
    return [todo["title"] for todo in state["todos"]]


STORAGE_PAGE = """<!doctype html><title>Storage</title><link rel=icon href=data:,>
<script type=module>
import { SyncClient, indexedDBStorage } from "./sync/client.js";

function put(todos, todo) {
  if (todos.every(({ id }) => id !== todo.id)) return [...todos, todo];
  return todos.map((old) => (old.id === todo.id ? todo : old));
}

function apply({ todos }, { data: { op, id, todo } }) {
  const gone = () => todos.filter((old) => old.id !== id);
  return { todos: op === "delete" ? gone() : put(todos, todo) };
}

const predict = ({ todos }, { args }) => ({ todos: put(todos, args) });

// A storage whose saves wait for release().
const { promise: opened, resolve: open } = Promise.withResolvers();
const own = indexedDBStorage();
let held;
const slow = { ...own, save: (...args) => held = opened.then(() => own.save(...args)) };

const requested = (request) => new Promise((resolve, reject) => {
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(request.error);
});

const place = `${location.origin}/`;
const prefix = (user) => `mizusync ${JSON.stringify([place, "demo", user])} `;

Object.assign(self, {
  make(more = {}, isSlow = false) {
    const options = { url: ".", scope: "demo", initial: { todos: [] }, apply, predict };
    const storage = isSlow ? { storage: slow } : {};
    self.client = new SyncClient({ ...options, ...storage, ...more });
  },
  mutate: (name, id, title) => client.mutate(`todo.${name}`, { id, title }),
  hide: () => dispatchEvent(new Event("pagehide")),
  release: () => (open(), held),
  stored: (user = "") => indexedDBStorage().load(prefix(user)),
  // Every key, and its value, of this origin's databases and of localStorage.
  async kept() {
    const found = Object.entries(localStorage);
    for (const { name } of await indexedDB.databases()) {
      const database = await requested(indexedDB.open(name));
      for (const store of database.objectStoreNames) {
        const all = database.transaction(store).objectStore(store);
        const [keys, values] = [requested(all.getAllKeys()), requested(all.getAll())];
        const list = await values;
        (await keys).forEach((key, index) => found.push([[key].flat(), list[index]]));
      }
      database.close();
    }
    return found;
  },
});
</script>
"""


class Tab:
    """A page that imports the client, and has one on the scope `demo`."""

    def __init__(self, page: Any, live: Live) -> None:
        self.page = page
        self.context = page.context
        self.page.goto("http://{}:{}/".format(*live.address))

    def make(self, *, start: bool = True, slow: bool = False, **options: Any) -> Tab:
        """Make the client. A slow one saves when the test releases it."""
        self.page.evaluate("([more, slow]) => make(more, slow)", [options, slow])
        if start:
            self.page.evaluate("client.start()")
        return self

    def make_all(self, scopes: str, **options: Any) -> None:
        """Make and start a client of each scope; the page has them in `all`."""
        script = """([scopes, options]) => {
            self.all = {};
            for (const scope of scopes) {
              make({ ...options, scope });
              all[scope] = client;
              client.start();
            }
        }"""
        self.page.evaluate(script, [scopes, options])

    def reload(self, **options: Any) -> Tab:
        self.page.reload()
        return self.make(**options)

    def mutate(self, name: str, key: str, title: str | None = None) -> None:
        words = [name, key, title]
        self.page.evaluate("(words) => void (self.last = mutate(...words))", words)

    def confirmed(self) -> None:
        """Wait until the last mutation of mutate() is confirmed."""
        told = "() => client.confirmed(last).then(() => { last.isConfirmed = true; })"
        self.page.evaluate(f"void ({told})()")
        self.page.wait_for_function("() => last.isConfirmed")

    def shows(self, *titles: str) -> None:
        """Wait until these todos are shown."""
        shown = "JSON.stringify(client.state.todos.map(({ title }) => title))"
        same = f"(titles) => {shown} === JSON.stringify(titles)"
        self.page.wait_for_function(same, arg=list(titles))

    def has(self, **status: Any) -> None:
        """Wait until these fields of the status have these values."""
        same = "([name, value]) => client.status[name] === value"
        for field in status.items():
            self.page.wait_for_function(same, arg=list(field))

    def keeps(self, cursor: int) -> None:
        """Wait until the state at this cursor is stored."""
        until(lambda: self.stored() == cursor)

    def stored(self, user: str = "") -> int:
        """The cursor of the stored state; 0 for none."""
        found = self.page.evaluate("(user) => stored(user)", user)
        return int(found["cursor"]) if found else 0

    def kept(self) -> list[Any]:
        return list(self.page.evaluate("kept()"))

    def command(self, name: str, **words: Any) -> None:
        """Send a command of the browser's own protocol."""
        self.context.new_cdp_session(self.page).send(name, words)

    def freeze(self) -> None:
        """Stop the page's script after its event, as a browser does with a page that
        nobody sees. Playwright shows every page: no browser's command freezes it."""
        self.page.evaluate("void document.dispatchEvent(new Event('freeze'))")
        self.debugger = self.context.new_cdp_session(self.page)
        self.debugger.send("Debugger.enable")
        self.debugger.send("Debugger.pause")

    def resume(self) -> None:
        self.debugger.send("Debugger.disable")
        self.debugger.detach()
        self.page.evaluate("void document.dispatchEvent(new Event('resume'))")

    def crash(self) -> None:
        """End the page's process, which runs nothing of the page's any more."""
        with self.page.expect_event("crash"), suppress(Exception):
            self.page.goto("chrome://crash")
        self.page.close()


def create_todo(importable: Live, title: str) -> int:
    """Let somebody else create a todo; return the cursor of the change."""
    (result,) = importable.client().push(of_demo("create", id=title, title=title))
    return int(result["cursor"])


@pytest.fixture
def importable(windows: Windows, tmp_path: Path) -> Live:
    page = tmp_path / "storage.html"
    page.write_text(STORAGE_PAGE)
    return windows.serve(page=page)


@pytest.fixture
def tab(windows: Windows, importable: Live) -> Tab:
    return Tab(windows.context().new_page(), importable)


FORBIDDEN = {
    "throws": "IDBFactory.prototype.open = () => { throw new Error('forbidden'); };",
    "fails": """IDBFactory.prototype.open = () => {
      const request = { error: new Error("forbidden") };
      setTimeout(() => request.onerror());
      return request;
    };""",
    "and localStorage throws": """
      IDBFactory.prototype.open = () => { throw new Error("forbidden"); };
      Object.defineProperty(self, "localStorage", {
        get() { throw new Error("forbidden"); },
      });""",
}


class StorageTests:
    """What a browser keeps: tests of TestPage, the one class that has a browser."""

    def test_a_state_and_what_waits_survive_a_reload_offline(
        self, windows: Windows, importable: Live, tab: Tab
    ) -> None:
        windows.may_say = "ERR_INTERNET_DISCONNECTED"
        cursor = create_todo(importable, "a")
        tab.make().shows("a")
        tab.keeps(cursor)
        tab.context.set_offline(True)
        tab.mutate("create", "b", "b")
        tab.shows("a", "b")
        tab.page.evaluate("client.stop()")
        tab.context.set_offline(False)
        tab.page.reload()
        tab.context.set_offline(True)
        tab.make()
        tab.shows("a", "b")
        tab.has(loaded=True, saved=True, online=False, waiting=1)
        assert titles_at(importable) == ["a"]
        tab.context.set_offline(False)
        tab.page.evaluate("dispatchEvent(new Event('online'))")
        tab.has(waiting=0)
        assert titles_at(importable) == ["a", "b"]

    def test_a_frozen_tab_never_overwrites_a_newer_state(
        self, importable: Live, tab: Tab
    ) -> None:
        other = Tab(tab.context.new_page(), importable).make()
        tab.make(slow=True)
        create_todo(importable, "a")
        for each in (tab, other):
            each.shows("a")
        tab.page.evaluate("hide()")  # it begins to save, and is frozen there
        tab.freeze()
        cursor = create_todo(importable, "b")
        other.shows("a", "b")
        other.keeps(cursor)
        tab.resume()
        tab.page.evaluate("release()")
        assert other.stored() == cursor
        tab.shows("a", "b")
        third = Tab(tab.context.new_page(), importable).make(start=False)
        third.shows("a", "b")

    def test_twenty_tabs_show_a_change_and_store_it_once(
        self, importable: Live, tab: Tab
    ) -> None:
        first = create_todo(importable, "a")
        pages = [tab.page, *(tab.context.new_page() for _ in range(19))]
        tabs = [Tab(page, importable).make() for page in pages]
        for each in tabs:
            each.shows("a")
            each.has(live=True)
        tab.keeps(first)
        asked = list[str]()
        tab.context.on("request", lambda request: asked.append(request.url))
        cursor = create_todo(importable, "b")
        for each in tabs:
            each.shows("a", "b")
            each.page.evaluate("hide()")
        tab.keeps(cursor)
        assert not asked  # each tab had the change from its hint
        kept = {tuple(key[1:]): value for key, value in tab.kept()}
        assert kept.keys() == {("position",), ("state",), ("tail",)}
        (change,) = kept["tail",]
        assert change["cursor"] == cursor

    def test_a_full_database_stops_no_client(
        self, windows: Windows, importable: Live, tab: Tab
    ) -> None:
        windows.may_say = "the state is not saved"
        origin = "http://{}:{}".format(*importable.address)
        tab.command("Storage.overrideQuotaForOrigin", origin=origin, quotaSize=1)
        create_todo(importable, "a")
        tab.make().shows("a")
        tab.page.evaluate("hide()")
        tab.has(saved=False, online=True)
        tab.mutate("create", "b", "b")
        tab.confirmed()
        cursor = create_todo(importable, "c")
        tab.shows("a", "b", "c")
        assert tab.stored() == 0
        tab.command("Storage.overrideQuotaForOrigin", origin=origin)
        tab.page.evaluate("hide()")
        tab.has(saved=True)
        tab.keeps(cursor)
        assert len(windows.faults) == 1  # it said so once

    def test_a_full_queue_takes_mutations_and_says_that_they_are_not_saved(
        self, importable: Live, tab: Tab
    ) -> None:
        tab.make(start=False)
        tab.page.evaluate("""() => {
            for (let size = 2 ** 23; size >= 1; size /= 2) {
              try {
                localStorage.setItem(`full ${size}`, "x".repeat(size));
              } catch {}
            }
        }""")
        tab.mutate("create", "a", "a")
        tab.shows("a")
        tab.has(saved=False, waiting=1)
        tab.page.evaluate("client.start()")
        tab.confirmed()
        tab.has(saved=True, waiting=0)
        assert titles_at(importable) == ["a"]

    @table("script", FORBIDDEN)
    def test_without_a_storage_it_works_and_says_so(
        self, windows: Windows, importable: Live, script: str
    ) -> None:
        windows.may_say = "the state is not saved"
        context = windows.context()
        context.add_init_script(script)
        create_todo(importable, "a")
        tab = Tab(context.new_page(), importable).make()
        tab.shows("a")
        tab.mutate("create", "b", "b")
        tab.confirmed()
        create_todo(importable, "c")
        tab.shows("a", "b", "c")
        tab.page.evaluate("hide()")
        tab.has(saved=False, online=True, error=None)
        assert titles_at(importable) == ["a", "b", "c"]
        assert len(windows.faults) == 1  # it said so once

    def test_what_the_first_edition_kept_is_taken_over(
        self, windows: Windows, importable: Live, tab: Tab
    ) -> None:
        create_todo(importable, "a")
        with closing(RawClient(importable.address)) as client:
            snapshot = client.request("GET", "/sync/snapshot?scope=demo").json
        place = "http://{}:{}/".format(*importable.address)
        prefix = "mizusync " + json.dumps([place, "demo", ""], separators=(",", ":"))
        base = {name: snapshot[name] for name in ("cursor", "epoch")}
        mutation = of_demo("create", id="b", title="b")
        first = {
            f"{prefix} base": base | {"state": snapshot["data"]},
            f"{prefix} queue 1700000000000-1-2-3-4 1700000000001": mutation,
        }
        for key, value in first.items():
            words = [key, json.dumps(value)]
            tab.page.evaluate("(words) => localStorage.setItem(...words)", words)
        asked = list[str]()
        tab.page.on("request", lambda request: asked.append(request.url))
        tab.make(start=False).shows("a", "b")
        tab.has(loaded=True, waiting=1)
        tab.page.evaluate("client.start()")
        until(lambda: titles_at(importable) == ["a", "b"])
        cursor = create_todo(importable, "c")
        tab.keeps(cursor)
        tab.page.wait_for_function("() => localStorage.length === 0")
        tab.reload(start=False).shows("a", "b", "c")
        assert not [url for url in asked if "snapshot" in url]

    def test_what_a_closed_tab_left_is_pushed_by_another(
        self, windows: Windows, importable: Live, tab: Tab
    ) -> None:
        tab.make(start=False)
        tab.mutate("create", "a", "a")
        other = Tab(tab.context.new_page(), importable).make()
        # What is pushed beside the first pull may be pushed again.
        other.has(loaded=True)
        other.mutate("create", "b", "b")
        other.confirmed()
        assert titles_at(importable) == ["b"]  # the tab that has "a" is there
        tab.page.close()
        # Unlike "online", this cuts no push that has begun.
        other.page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
        other.shows("b", "a")
        other.has(waiting=0)
        assert titles_at(importable) == ["b", "a"]
        assert len(windows.pushed) == len(set(windows.pushed)) == 2

    @table(
        "event",
        {
            "pagehide": "dispatchEvent(new Event('pagehide'))",
            "hidden": """() => {
                const event = new Event("visibilitychange", { bubbles: true });
                Object.defineProperty(document, "hidden", { value: true });
                document.dispatchEvent(event);
            }""",
            "closed": "client.close()",
        },
    )
    def test_a_state_is_saved_where_the_page_may_end(
        self, importable: Live, tab: Tab, event: str
    ) -> None:
        create_todo(importable, "a")
        # Of its own clock no second passes: a save that waits for one never comes.
        tab.page.clock.install()
        tab.page.clock.pause_at(datetime.now(UTC) + timedelta(minutes=1))
        tab.make().shows("a")
        cursor = create_todo(importable, "b")
        tab.shows("a", "b")
        assert tab.stored() == 0
        tab.page.evaluate(event)
        tab.keeps(cursor)

    def test_forget_leaves_nothing_of_this_user(
        self, windows: Windows, importable: Live, tab: Tab
    ) -> None:
        cursor = create_todo(importable, "a")
        other = Tab(tab.context.new_page(), importable).make(user="eve")
        other.shows("a")
        other.page.evaluate("hide()")
        until(lambda: other.stored("eve") == cursor)
        other.page.close()
        before = tab.kept()
        tab.make(user="").shows("a")
        tab.keeps(cursor)
        create_todo(importable, "b")
        tab.shows("a", "b")
        tab.page.evaluate("client.stop()")
        tab.mutate("create", "c", "c")
        assert len(tab.kept()) > len(before) > 0
        tab.page.evaluate("client.forget()")
        assert tab.kept() == before
        tab.reload(start=False)
        tab.has(loaded=False, waiting=0)

    def test_a_state_with_its_tail_is_the_servers_at_any_length(
        self, importable: Live, tab: Tab
    ) -> None:
        client = importable.client()
        tab.make().has(live=True)
        reader = Tab(tab.context.new_page(), importable)
        is_tail = set[bool]()
        for size in (1, 30, 100, 60, 9, 90, 3):  # a tail has 200 changes at most
            names = [f"{size} {number}" for number in range(size)]
            makes = [of_demo("create", id=name, title=name) for name in names]
            client.push(*makes)
            done = {"completed": True}
            changes = [of_demo("update", id=name, **done) for name in names[::7]]
            changes += [of_demo("delete", id=name) for name in names[3::5]]
            cursor = client.push(*changes)[-1]["cursor"]
            tab.shows(*titles_at(importable))
            tab.page.evaluate("hide()")
            reader.keeps(cursor)
            is_tail.add(any(key[1] == "tail" and rows for key, rows in reader.kept()))
            reader.reload(start=False).shows(*titles_at(importable))
            todos = reader.page.evaluate("client.state.todos")
            snapshot = client.request("GET", "/sync/snapshot?scope=demo").json
            assert todos == snapshot["data"]["todos"]
        assert is_tail == {True, False}

    def test_a_crash_loses_no_mutation(self, importable: Live, tab: Tab) -> None:
        tab.make(slow=True).has(live=True)
        tab.mutate("create", "a", "a")
        tab.confirmed()  # but not saved
        tab.page.evaluate("client.stop()")
        tab.mutate("create", "b", "b")
        tab.crash()
        again = Tab(tab.context.new_page(), importable).make(start=False)
        again.shows("a", "b")
        again.page.evaluate("client.start()")
        again.has(waiting=0)
        assert titles_at(importable) == ["a", "b"]

    def test_tabs_show_each_others_waiting_mutations_offline(
        self, windows: Windows, importable: Live, tab: Tab
    ) -> None:
        windows.may_say = "ERR_INTERNET_DISCONNECTED"
        create_todo(importable, "a")
        other = Tab(tab.context.new_page(), importable)
        for each in (tab, other):
            each.make().shows("a")
            each.has(live=True)
        tab.context.set_offline(True)
        for each in (tab, other):
            each.page.evaluate("dispatchEvent(new Event('offline'))")
            each.has(online=False)
        tab.mutate("create", "b", "b")
        other.shows("a", "b")
        other.mutate("create", "c", "c")
        for each in (tab, other):
            each.shows("a", "b", "c")
            each.has(waiting=2)
        assert not windows.pushed
        tab.context.set_offline(False)
        for each in (tab, other):
            each.page.evaluate("dispatchEvent(new Event('online'))")
        for each in (tab, other):
            each.has(waiting=0, online=True)
        assert sorted(titles_at(importable)) == ["a", "b", "c"]
        for each in (tab, other):
            each.shows(*titles_at(importable))
        # The event may cut a push that has begun: then it comes again.
        assert len(set(windows.pushed)) == 2

    @table("first", {"allowed": "abc", "forbidden": "bac"})
    def test_scopes_share_a_socket_and_a_forbidden_one_disturbs_no_other(
        self, windows: Windows, tmp_path: Path, first: str
    ) -> None:
        windows.may_say = "403|WebSocket connection to"
        page = tmp_path / "storage.html"
        page.write_text(STORAGE_PAGE)
        live = windows.serve(page=page, on_auth=lambda request, scope: scope != "b")
        tab, sockets = Tab(windows.context().new_page(), live), list[Any]()
        tab.page.on("websocket", lambda socket: sockets.append(socket))
        tab.make_all(first)
        for scope in "ac":
            tab.page.wait_for_function("(scope) => all[scope].status.live", arg=scope)
        tab.page.wait_for_function("() => all.b.status.error?.action === 'start'")
        for scope in "ca":
            live.client().push(todo("create", id="1", title=scope) | {"scope": scope})
            tab.page.wait_for_function(
                "(scope) => all[scope].state.todos[0]?.title === scope", arg=scope
            )
        assert [socket.is_closed() for socket in sockets].count(False) == 1

    def test_where_no_socket_gets_through_four_pulls_are_held_and_a_push_finds_a_line(
        self, importable: Live, tab: Tab
    ) -> None:
        tab.page.evaluate("""() => {
            const { fetch } = self;
            Object.assign(self, { held: 0, most: 0 });
            self.fetch = async (address, options) => {
              const isHeld = Number(address.includes("wait=25"));
              held += isHeld;
              most = Math.max(most, held);
              return fetch(address, options).finally(() => { held -= isHeld; });
            };
        }""")
        tab.make_all("abcdefgh", WebSocket=None)
        tab.page.wait_for_function("() => held === 4")
        for scope in "ah":
            began = time.monotonic()
            tab.page.evaluate("(scope) => void (self.client = all[scope])", scope)
            tab.mutate("create", "1", scope)
            tab.confirmed()
            # The server holds a pull for 25 s.
            assert time.monotonic() - began < PATIENCE / 2
        assert tab.page.evaluate("most") == 4

    @table("end", {"crashed": Tab.crash, "frozen": Tab.freeze})
    def test_the_queue_of_a_tab_that_stands_still_is_taken_over(
        self, windows: Windows, importable: Live, tab: Tab, end: Callable[[Tab], None]
    ) -> None:
        tab.make(start=False)
        tab.mutate("create", "a", "a")
        other = Tab(tab.context.new_page(), importable).make()
        # What is pushed beside the first pull may be pushed again.
        other.has(loaded=True)
        other.mutate("create", "b", "b")
        other.confirmed()
        assert titles_at(importable) == ["b"]  # the tab that has "a" lives
        end(tab)
        until(lambda: titles_at(importable) == ["b", "a"])  # within some seconds
        other.shows("b", "a")
        other.has(waiting=0)
        assert len(windows.pushed) == len(set(windows.pushed)) == 2
        if tab.page.is_closed():
            return
        tab.resume()
        tab.page.evaluate("client.start()")
        tab.shows("b", "a")
        tab.has(waiting=0)
        tab.mutate("create", "c", "c")
        tab.confirmed()
        other.shows("b", "a", "c")
        assert len(windows.pushed) == len(set(windows.pushed)) == 3


class TestPage(StorageTests):
    def test_two_windows_show_the_same(self, windows: Windows, demo: Live) -> None:
        one, other = windows.open(demo), windows.open(demo)
        one.add("Buy milk", "Buy bread")
        other.shows("Buy milk", "Buy bread")
        other.box("Buy milk").check()
        expect(one.box("Buy milk")).to_be_checked()
        one.edit("Buy bread", "Buy rye")
        other.shows("Buy milk", "Buy rye")
        expect(other.of("demo").view.get_by_text("1 left")).to_be_visible()
        other.delete("Buy milk")
        one.shows("Buy rye")
        for window in (one, other):
            window.says("in sync · live")
        assert titles_at(demo) == ["Buy rye"]

    @table("offline", OFFLINE)
    def test_what_two_windows_did_offline_comes_together(
        self, windows: Windows, demo: Live, offline: tuple[Callable[..., None], str]
    ) -> None:
        windows.may_say = "ERR_INTERNET_DISCONNECTED"
        switch, word = offline
        one, other = both = windows.open(demo), windows.open(demo)
        one.add("a", "b")
        one.settles()
        other.shows("a", "b")
        for window in both:
            switch(window, True)
            window.says(word)
        one.edit("a", "a of one")
        one.add("c")
        other.edit("a", "a of the other")
        other.delete("b")
        other.add("d")
        one.says(f"{word} · 2 not sent yet")
        one.shows("a of one", "b", "c")
        other.says(f"{word} · 3 not sent yet")
        other.shows("a of the other", "d")
        for window in both:
            switch(window, False)
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
        window.says("offline · 2 not sent yet")
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
            # What is pushed beside the first pull may be pushed again.
            window.says("in sync · live")
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
            one.says("no connection")
            one.add("of one")
            other.edit("before", "after")
            other.delete("after")
            other.add("of the other")
            one.says("no connection · 1 not sent yet")
            other.says("no connection · 3 not sent yet")
            expect(one.trouble).to_have_text(UNREACHABLE)
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
            window.says("no connection")
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
            expect(window.news).to_have_text(
                "The server's data was replaced by another database, which you see "
                "now. What was not sent yet stays, and is sent to it."
            )

    @table(
        "lost",
        {
            "one": (1, "1 change that the server had lost was sent again."),
            "of two lists": (3, "3 changes that the server had lost were sent again."),
        },
    )
    def test_a_restored_server_gets_back_what_it_had_lost_and_the_page_tells(
        self, windows: Windows, tmp_path: Path, lost: tuple[int, str]
    ) -> None:
        windows.may_say = (
            "ERR_CONNECTION_|ERR_EMPTY_RESPONSE|closed before the connection|410"
        )
        number, sentence = lost
        path, copy = tmp_path / "todos.db", tmp_path / "copy.db"
        with program("--db", str(path)) as running:
            window = windows.open(running, "#demo&beside=work")
            demo, work = window.of("demo"), window.of("work")
            for view in (demo, work):
                view.add("kept")
                view.says("in sync · live")
            window.settles()
            with closing(sqlite3.connect(path)) as db:
                db.execute("VACUUM INTO ?", [str(copy)])
            demo.add("lost")
            work.add(*map(str, range(number - 1)))
            window.settles()
            # Else a try of its own could begin at once, and be cut off: what is then
            # sent once more, the server has by that time.
            window.offline.check()
            running.process.kill()
        for file in tmp_path.glob("todos.db*"):
            file.unlink()
        copy.rename(path)
        port = str(running.address[1])
        with held(running.address), program("--db", str(path), "--port", port):
            window.offline.uncheck()
            expect(window.news).to_have_text(sentence)
            until(lambda: titles_at(running) == ["kept", "lost"])
            until(lambda: len(titles_at(running, "work")) == number)
            demo.shows("kept", "lost")
            window.page.get_by_role("button", name="OK").click()
            expect(window.news).to_be_empty()

    def test_what_a_restored_server_has_lost_comes_back_with_the_next_visit(
        self, windows: Windows, tmp_path: Path
    ) -> None:
        windows.may_say = (
            "ERR_CONNECTION_|ERR_EMPTY_RESPONSE|closed before the connection|410"
        )
        path = tmp_path / "todos.db"
        with program("--db", str(path)) as running:
            window = windows.open(running)
            window.add("a")
            window.settles()
            backup = back_up(path)
            window.add("b", "c")
            window.delete("a")
            window.settles()
            window.shows("b", "c")
            port = str(running.address[1])
            running.process.kill()
            window.says("no connection")
            window.add("d")
        for suffix in ("-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
        shutil.copy(backup, path)
        arguments = ("--db", str(path), "--port", port)
        with held(running.address), program(*arguments) as running:
            assert titles_at(running) == ["a"]
            again = windows.open(running, beside=window)
            window.page.close()
            again.shows("b", "c", "d")
            again.says("in sync · live")
            assert titles_at(running) == ["b", "c", "d"]

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
            "Not accepted: “Buy oat milk” (this todo is not there)"
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
        do("Enter", at="Edit a", then="Title")
        do("x", "Enter", then="Edit x")  # the old text was selected
        do("Enter", "y", "Escape", then="Edit x")
        window.shows("x", "b", "c")
        expect(window.box("x")).to_be_checked()
        do("Enter", at="Delete b", then="Done: c")
        do("Enter", at="Delete c", then="Done: x")
        do("Enter", at="Delete x", then="New todo")
        window.settles()
        do("Space", at="Work offline")
        window.says("offline")
        do("z", at="New todo", way="Shift+Tab")
        do("Enter", at="Add")
        window.says("offline · 1 not sent yet")
        do("Space", at="Work offline")
        window.says("in sync · live")
        assert titles_at(demo) == ["z"]

    def test_a_mouse_edits_with_two_clicks_and_saves_where_it_leaves(
        self, windows: Windows, demo: Live
    ) -> None:
        window = windows.open(demo)
        window.says("in sync · live")
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
        window.focused("Done: c new")
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
        window.says("in sync · live")  # the list's own class changes until then
        window.page.evaluate("""() => {
            const list = document.querySelector(".list"), all = [...list.children];
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

    def test_a_page_imports_the_client_and_runs_workers_of_its_server(
        self, windows: Windows, tmp_path: Path
    ) -> None:
        page = tmp_path / "page.html"
        page.write_bytes(
            b"<!doctype html><link rel=icon href=data:,>"
            b'<script type=module>import { SyncClient } from "./sync/client.js";'
            b"self.name = SyncClient.name;</script>"
        )
        script = b'postMessage("a worker works");'
        worker = response_of(body=script, content_type="text/javascript")
        live = windows.serve(
            page=page, prepare=lambda server: server.route("GET", "/worker.js")(worker)
        )
        window = windows.open(live).page
        window.wait_for_function("() => self.name === 'SyncClient'")
        said = """new Promise((resolve) => {
            new Worker("worker.js").onmessage = ({ data }) => resolve(data);
        })"""
        assert window.evaluate(said) == "a worker works"

    def test_a_page_of_an_allowed_origin_imports_the_client_of_another_server(
        self, windows: Windows, tmp_path: Path
    ) -> None:
        page = tmp_path / "page.html"
        page.write_bytes(b"<!doctype html><link rel=icon href=data:,>")
        own = windows.serve(page=page, csp="default-src * data:")
        window = windows.open(own).page
        windows.may_say = "CORS|ERR_FAILED"  # of the server that does not allow it
        allowing = windows.serve(allow_origin=["http://{}:{}".format(*own.address)])
        for live, found in ((allowing, "SyncClient"), (windows.serve(), "refused")):
            address = "http://{}:{}/sync/client.js".format(*live.address)
            client = f"import('{address}').then((module) => module.SyncClient.name)"
            assert window.evaluate(f"{client}.catch(() => 'refused')") == found

    def test_the_page_of_the_readme_is_live_and_tells_a_refusal(
        self, windows: Windows, seats: Engine, tmp_path: Path
    ) -> None:
        (page,) = blocks("html", "Its page")
        (tmp_path / "seats.html").write_text(page, encoding="utf-8")
        live = windows.servers.enter_context(
            serving(seats, page=tmp_path / "seats.html")
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

    def test_with_the_worker_of_the_readme_a_page_opens_without_its_server(
        self, windows: Windows, seats: Engine, tmp_path: Path
    ) -> None:
        (page,) = blocks("html", "Its page")
        worker, registration = blocks("js", "A page that opens offline")
        (recipe,) = blocks("python", "A page that opens offline")
        (application,) = blocks("python", "An application of your own")
        assert application.splitlines()[-1].startswith("mizusync.Server(engine).run(")
        (tmp_path / "seats.html").write_text(
            page.replace("</script>", f"{registration}</script>"), encoding="utf-8"
        )
        (tmp_path / "sw.js").write_text(worker, encoding="utf-8")
        names: dict[str, Any] = {"engine": seats, "mizusync": mizusync}
        exec(recipe, names)
        windows.may_say = "404|ERR_CONNECTION_REFUSED"
        with serving(
            seats,
            page=tmp_path / "seats.html",
            prepare=lambda server: server.route("GET", "/sw.js")(
                names["service_worker"]
            ),
        ) as live:
            window = windows.open(live)
            window.page.locator("input").fill("A1")
            window.page.locator("input").press("Enter")
            expect(window.page.locator("p")).to_have_text("live, 0 waiting")
            window.page.wait_for_function(  # unlike `ready`, it has an end
                "async () => (await navigator.serviceWorker.getRegistration())?.active"
            )
            window.settles()
        window.page.reload()
        window.page.locator("input").fill("B2")
        window.page.locator("input").press("Enter")
        later = windows.open(live, "?again#later", beside=window)
        for shown in (window.page, later.page):
            expect(shown.get_by_role("listitem")).to_contain_text(["A1: guest"])
        expect(window.page.get_by_role("listitem")).to_contain_text(["A1", "B2"])
        expect(window.page.locator("p")).to_have_text("offline, 1 waiting")

    def test_what_has_the_focus_is_not_hidden_under_the_form(
        self, windows: Windows, demo: Live
    ) -> None:
        demo.client().push(
            *(of_demo("create", id=str(n), title=f"{n}") for n in range(40))
        )
        window = windows.open(demo)
        expect(window.titles).to_have_count(40)
        under = """pencils => pencils.reverse().filter((pencil) => {
            pencil.focus();
            const form = document.querySelector(".add").getBoundingClientRect();
            return pencil.getBoundingClientRect().top < form.bottom;
        }).length"""
        hidden = window.list.locator(".pencil").evaluate_all(under)
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
        expect(window.names).to_have_text(["demo"])
        window.offline.check()
        window.add("waits")
        window.scope.fill("other list")
        window.scope.press("Enter")
        window.shows()
        expect(window.names).to_have_text(["other list"])
        expect(window.scope).to_be_empty()
        window.focused("New todo")
        expect(window.page).to_have_url(re.compile("#other%20list$"))
        expect(window.offline).to_be_checked()
        window.add("waits elsewhere")
        window.page.go_back()
        window.shows("waits")
        window.says("offline · 1 not sent yet")
        window.offline.uncheck()
        window.says("in sync · live")
        assert titles_at(demo) == ["waits"]
        window.page.go_forward()
        window.shows("waits elsewhere")
        window.says("in sync · live")
        assert titles_at(demo, "other+list") == ["waits elsewhere"]

    def test_my_lists_are_live_and_each_opens_at_once(
        self, windows: Windows, demo: Live
    ) -> None:
        window = windows.open(demo)
        window.has_lists("demo 0 left")
        take = window.page.get_by_role("button", name="Take demo off my lists")
        expect(take).to_be_hidden()  # the only one
        window.add("half a wor")
        window.new.fill("half")
        for name in ("work", "home"):
            window.scope.fill(name)
            window.scope.press("Enter")
            expect(window.names).to_have_text([name])
        window.has_lists("demo 1 left", "work 0 left", "home 0 left")
        demo.client().push(todo("create", id="1", title="a") | {"scope": "work"})
        window.has_lists("demo 1 left", "work 1 left", "home 0 left")
        link = window.row("work").get_by_role("link", name="work", exact=True)
        expect(link).not_to_have_attribute("aria-current", "true")
        link.click()
        expect(window.names).to_have_text(["work"])
        expect(link).to_have_attribute("aria-current", "true")
        window.shows("a")
        window.focused("New todo")
        expect(window.page).to_have_title("Todos work - mizusync")
        window.box("a").check()
        window.has_lists("demo 1 left", "work 0 left", "home 0 left")
        window.settles()
        window.offline.check()
        window.add("b")
        window.has_lists("demo 1 left", "work 1 not sent yet", "home 0 left")
        window.page.reload()
        window.has_lists("demo 1 left", "work 1 not sent yet", "home 0 left")
        expect(window.names).to_have_text(["work"])
        for _ in range(2):
            window.page.go_back()
        window.offline.uncheck()  # a list that is not shown is sent, too
        window.has_lists("demo 1 left", "work 1 left", "home 0 left")
        assert titles_at(demo, "work") == ["a", "b"]
        window.row("demo").get_by_role("link", name="demo", exact=True).click()
        expect(window.new).to_have_value("half")

    def test_a_second_list_stands_beside_and_has_all_that_the_first_has(
        self, windows: Windows, demo: Live
    ) -> None:
        window = windows.open(demo, "#work")
        window.scope.fill("demo")
        window.scope.press("Enter")
        window.open_beside("work")
        expect(window.names).to_have_text(["demo", "work"])
        expect(window.page).to_have_url(re.compile("#demo&beside=work$"))
        expect(window.page).to_have_title("Todos demo and work - mizusync")
        first, second = window.of("demo"), window.of("work")
        expect(second.new).to_be_focused()
        first.add("a", "b")
        second.add("x", "y", "z")
        first.shows("a", "b")
        second.box("x").check()
        second.edit("y", "y new")
        second.filter("Active").check()
        second.shows("y new", "z")
        second.delete("z")
        first.delete("a")
        expect(second.undo).to_be_visible()
        window.page.keyboard.press("Control+z")  # of the last one
        first.shows("b", "a")
        second.undo.click()
        second.shows("y new", "z")
        expect(first.filter("All")).to_be_checked()
        window.settles()
        first.new.fill("half")
        window.page.reload()
        expect(window.names).to_have_text(["demo", "work"])
        first.shows("b", "a")
        second.shows("y new", "z")
        expect(first.new).to_have_value("half")
        second.filter("Completed").check()
        second.clear.click()
        second.filter("All").check()
        second.shows("y new", "z")
        for view in (first, second):
            view.says("in sync · live")
        assert sorted(titles_at(demo)) == ["a", "b"]
        assert titles_at(demo, "work") == ["y new", "z"]
        window.page.get_by_role("link", name="Close demo").click()
        expect(window.names).to_have_text(["work"])
        expect(window.page).to_have_url(re.compile("#work$"))
        window.page.go_back()
        expect(window.names).to_have_text(["demo", "work"])

    def test_the_keyboard_opens_lists_beside_and_takes_them_off(
        self, windows: Windows, demo: Live
    ) -> None:
        window = windows.open(demo, "#work")
        window.page.evaluate("location.hash = 'demo'")
        expect(window.names).to_have_text(["demo"])

        def press(name: str) -> None:
            """Go back to what has this name, and press Enter."""
            focus = window.page.locator(":focus")
            for _ in range(20):
                window.page.keyboard.press("Shift+Tab")
                if focus.count() and f'"{name}"' in focus.aria_snapshot():
                    break
            window.focused(name)
            window.page.keyboard.press("Enter")

        window.focused("New todo")
        press("Open work beside")
        expect(window.of("work").new).to_be_focused()
        press("Close work")
        expect(window.names).to_have_text(["demo"])
        window.focused("New todo")
        press("work")
        expect(window.names).to_have_text(["work"])
        window.focused("New todo")
        press("Take demo off my lists")
        window.has_lists("work 0 left")
        window.focused("work")
        press("My lists")
        expect(window.rows).to_be_hidden()

    def test_the_lists_of_a_page_share_one_websocket(
        self, windows: Windows, demo: Live
    ) -> None:
        page, sockets = windows.context().new_page(), list[Any]()
        page.on("websocket", lambda socket: sockets.append(socket))
        page.goto("http://{}:{}/#home".format(*demo.address))
        page.evaluate("location.hash = 'demo&beside=work'")
        window = Window(page)
        for name in ("demo", "work"):
            window.of(name).says("in sync · live")
        window.has_lists("home 0 left", "demo 0 left", "work 0 left")
        for name in ("home", "demo", "work"):
            mutation = todo("create", id="1", title=name) | {"scope": name}
            demo.client().push(mutation)
        window.has_lists("home 1 left", "demo 1 left", "work 1 left")
        window.of("work").shows("work")
        assert len(sockets) == 1

    def test_a_list_is_taken_off_when_all_of_it_is_sent_and_stays_on_the_server(
        self, windows: Windows, demo: Live
    ) -> None:
        other = windows.open(demo, "#home")
        window = windows.open(demo, beside=other)
        for each in (window, other):
            each.has_lists("home 0 left", "demo 0 left")
        window.page.evaluate("location.hash = 'demo&beside=work'")
        window.of("work").add("a")
        window.of("work").says("in sync · live")
        window.offline.check()
        window.of("work").add("b")
        window.has_lists("home 0 left", "demo 0 left", "work 1 not sent yet")
        window.take_off("work")
        expect(window.news).to_have_text(
            "“work” stays in your lists until all of it is sent: 1 not sent yet."
        )
        window.offline.uncheck()
        window.of("work").says("in sync · live")
        other.has_lists("home 0 left", "demo 0 left", "work 2 left")
        window.take_off("work")
        expect(window.news).to_have_text(
            "“work” is off your lists. It is still on the server. "
            "Open it again by its name."
        )
        expect(window.names).to_have_text(["demo"])
        window.take_off("demo")  # the one that is shown
        expect(window.names).to_have_text(["home"])
        for each in (window, other):
            each.has_lists("home 0 left")
        window.page.reload()
        window.has_lists("home 0 left")
        window.scope.fill("work")
        window.scope.press("Enter")
        window.shows("a", "b")

    def test_of_more_than_twelve_lists_the_oldest_is_taken_off(
        self, windows: Windows, demo: Live
    ) -> None:
        window = windows.open(demo, "#0")
        window.says("in sync · live")
        window.offline.check()
        window.add("waits")
        window.offline.uncheck()
        for number in range(1, 13):
            window.page.evaluate("(name) => { location.hash = name; }", str(number))
            expect(window.names).to_have_text(str(number))
            window.settles()
        window.has_lists(*(f"{number} 0 left" for number in range(1, 13)))
        assert titles_at(demo, "0") == ["waits"]

    def test_a_list_that_is_not_allowed_is_named_and_does_not_disturb_the_other(
        self, windows: Windows
    ) -> None:
        def no_work(request: mizusync.Request, scope: str) -> None:
            if scope == "work":
                raise mizusync.Forbidden("this list is not yours")

        windows.may_say = "403"
        demo = windows.serve(on_auth=no_work)
        window = windows.open(demo, "#demo&beside=work")
        window.of("demo").says("in sync · live")
        window.of("work").says("stopped")
        expect(window.trouble).to_have_text(
            "The server refused “work”: this list is not yours. "
            "What you do meanwhile is kept."
        )
        window.has_lists("demo 0 left", "work refused")
        window.of("work").add("a")
        window.of("demo").add("b")
        window.has_lists("demo 1 left", "work 1 not sent yet")
        window.take_off("work")  # what waits for ever holds nothing up
        expect(window.news).to_have_text(
            "“work” is off your lists. What is not sent yet waits in this browser. "
            "Open it again by its name."
        )
        expect(window.trouble).to_be_empty()
        window.shows("b")
        window.offline.check()  # or the server might refuse what is sent again
        window.scope.fill("work")
        window.scope.press("Enter")
        window.shows("a")

    def test_a_refusal_in_a_list_that_is_not_shown_names_the_list(
        self, windows: Windows, demo: Live
    ) -> None:
        demo.client().push(todo("create", id="1", title="a") | {"scope": "work"})
        window = windows.open(demo, "#work")
        window.shows("a")
        window.offline.check()
        window.edit("a", "b")
        demo.client().push(todo("delete", id="1") | {"scope": "work"})
        window.page.evaluate("location.hash = 'demo'")
        expect(window.names).to_have_text(["demo"])
        window.offline.uncheck()
        expect(window.notice).to_have_text(
            "Not accepted in “work”: “b” (this todo is not there)"
        )

    def test_on_a_phone_my_lists_are_folded_until_they_are_wanted(
        self, windows: Windows, demo: Live
    ) -> None:
        size = {"width": 390, "height": 844}
        window = windows.open(
            demo, "#work", viewport=size, has_touch=True, is_mobile=True
        )
        window.page.evaluate("location.hash = 'demo'")
        expect(window.names).to_have_text(["demo"])
        expect(window.scope).to_be_hidden()
        my_lists = window.page.get_by_text("My lists")
        my_lists.tap()
        window.page.get_by_role("link", name="work", exact=True).tap()
        expect(window.names).to_have_text(["work"])
        expect(window.scope).to_be_hidden()
        expect(window.names).to_be_focused()  # a field would open the keyboard
        my_lists.tap()
        window.page.get_by_role("link", name="Open demo beside").tap()
        first, second = window.of("work").view, window.of("demo").view
        expect(second).to_be_in_viewport()
        assert first.bounding_box()["x"] == second.bounding_box()["x"]  # below it

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
        window.pencil("39").focus()
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
        asked = window.page.get_by_label("Token")
        expect(asked).to_be_visible()
        window.offline.check()
        expect(asked).to_be_hidden()  # it would lead online, past the switch
        window.offline.uncheck()
        asked.fill("s3cret")
        asked.press("Enter")
        window.says("in sync · live")
        window.page.route("**/sync/*", lambda route: route.abort())
        window.add("a")
        window.says("no connection · 1 not sent yet")
        expect(window.trouble).to_have_text(UNREACHABLE)
        window.offline.check()  # by oneself, which is no reason for a warning
        window.says("offline · 1 not sent yet")
        expect(window.trouble).to_be_empty()
        window.page.unroute("**/sync/*")
        window.offline.uncheck()
        window.says("in sync · live")

    def test_a_server_with_a_token_is_asked_for_with_it(self, windows: Windows) -> None:
        windows.may_say = "401|Authentication|closed before the connection"
        demo = windows.serve(token="s3cret")
        window = windows.open(demo)
        asked = window.page.get_by_label("Token")
        kept = "What you do meanwhile is kept."
        for token, why in (
            ("wrong", f"This server asks for a token. {kept}"),
            ("s3cret", f"The server did not accept this token. {kept}"),
        ):
            window.add(f"before {token}")
            expect(window.trouble).to_have_text(why)
            expect(asked).to_have_accessible_description(why)
            asked.fill(token)
            asked.press("Enter")
        window.says("in sync · live")
        expect(asked).to_be_hidden()
        window.focused("New todo")
        expect(window.trouble).to_be_empty()
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
        window.says("sending 2 · live")
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
        window.says("offline · 1 not sent yet")
        expect(window.trouble).to_have_text(
            "This browser's storage is full or blocked: "
            "a reload would lose what is not sent yet."
        )
        window.offline.uncheck()
        window.says("in sync · live")
        expect(window.trouble).to_be_empty()
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

    def test_axe_finds_no_fault_in_light_or_in_dark_or_on_a_phone(
        self, windows: Windows
    ) -> None:
        axe = pytest.importorskip(
            "axe_playwright_python.sync_playwright", reason="no axe"
        )
        windows.may_say = "401|Authentication|closed before the connection"
        window = windows.open(windows.serve(token="s3cret"))
        asked = window.page.get_by_label("Token")

        def judge() -> None:
            for width, scheme in itertools.product((1000, 390), ("light", "dark")):
                window.page.set_viewport_size({"width": width, "height": 800})
                window.page.emulate_media(color_scheme=scheme)
                window.unfold()
                found = axe.Axe().run(window.page)
                assert not found.response["violations"], found.generate_report()

        expect(asked).to_be_visible()
        window.add("a", "b", "c")
        window.box("a").check()
        window.delete("c")
        window.title("b").dblclick()
        judge()  # not loaded, a token asked for, a row edited, a delete offered
        asked.fill("s3cret")
        asked.press("Enter")
        window.says("in sync · live")
        window.filter("Completed").check()
        window.clear.click()
        window.shows()
        judge()  # a filter with nothing to show
        window.delete_all()
        expect(window.empty).to_contain_text("Nothing here yet.")
        for name in ("work&beside=demo", "demo&beside=home"):
            window.page.evaluate("(name) => { location.hash = name; }", name)
            expect(window.names).to_have_text(name.split("&beside="))
        window.of("home").add("a")
        window.unfold()
        window.take_off("work")
        expect(window.news).to_contain_text("It is still on the server")
        judge()  # two lists, one of them empty, and a notice

    def test_nothing_is_wider_than_a_small_phone(
        self, windows: Windows, demo: Live
    ) -> None:
        name = "W" * 200
        window = windows.open(
            demo, f"#{name}&beside=x", viewport={"width": 320, "height": 640}
        )
        first = window.of(name)
        first.add("W" * 1000, "with words " * 50, "short")
        window.page.get_by_text("My lists").click()
        first.title("short").dblclick()
        expect(window.scope).to_be_visible()
        assert window.page.evaluate("document.documentElement.scrollWidth") == 320

    def test_until_the_first_snapshot_the_page_shows_that_it_loads(
        self, windows: Windows, demo: Live
    ) -> None:
        demo.client().push(of_demo("create", id="1", title="a"))
        page, held = windows.context().new_page(), list[Any]()
        page.route("**/sync/snapshot*", lambda route: held.append(route))
        page.goto("http://{}:{}/".format(*demo.address))
        window = Window(page)
        window.says("loading")
        expect(window.empty).to_have_text(
            re.compile(r"\s*Loading…\s*"), use_inner_text=True
        )
        window.add("mine")
        until(lambda: titles_at(demo) == ["a", "mine"])
        window.shows("mine")
        window.says("loading")
        expect(window.empty).to_be_visible()  # what is there is not all
        expect(page.get_by_text("left", exact=False)).to_be_hidden()
        held[0].continue_()
        window.shows("a", "mine")
        window.says("in sync · live")
        expect(window.empty).to_be_hidden()

    def test_an_empty_list_invites_to_a_second_window(
        self, windows: Windows, demo: Live
    ) -> None:
        window = windows.open(demo)
        expect(window.empty).to_contain_text("Nothing here yet.")
        expect(window.empty).to_contain_text("work offline in one of the two")
        with window.page.expect_popup() as popup:
            window.empty.get_by_role("link", name="open a second window").click()
        second = Window(popup.value)
        window.offline.check()
        second.says("in sync · live")
        expect(second.offline).not_to_be_checked()
        window.add("b")
        second.add("a")
        second.says("in sync · live")
        second.shows("a")
        window.offline.uncheck()
        for each in (window, second):
            each.shows("a", "b")

    def test_a_list_that_was_never_loaded_is_not_called_empty(
        self, windows: Windows, demo: Live
    ) -> None:
        windows.may_say = "ERR_FAILED"
        context = windows.context()
        context.route("**/sync/*", lambda route: route.abort())
        page = context.new_page()
        page.goto("http://{}:{}/".format(*demo.address))
        window = Window(page)
        expect(window.trouble).to_have_text(UNREACHABLE)
        window.says("no connection")
        expect(window.empty).to_contain_text("This list has not been loaded yet.")
        context.unroute("**/sync/*")
        page.get_by_role("button", name="Try now").click()
        window.says("in sync · live")
        window.focused("New todo")  # the button has gone
        expect(window.trouble).to_be_empty()
        expect(window.empty).to_contain_text("Nothing here yet.")

    @table(
        "answer",
        {
            "an error": (
                (503, ""),
                "server error · 1 not sent yet",
                "The server answers with an error (503). This page keeps trying. "
                "What you do meanwhile is kept.",
            ),
            "a refusal": (
                (403, '{"code": "forbidden", "error": "this list is not yours"}'),
                "stopped · 1 not sent yet",
                "The server refused: this list is not yours. "
                "What you do meanwhile is kept.",
            ),
        },
    )
    def test_the_page_says_in_words_what_is_wrong_with_the_server(
        self, windows: Windows, demo: Live, answer: tuple[tuple[int, str], str, str]
    ) -> None:
        windows.may_say = "503|403"
        (status, body), summary, trouble = answer
        window = windows.open(demo)
        window.says("in sync · live")
        window.page.route(
            "**/sync/*", lambda route: route.fulfill(status=status, body=body)
        )
        window.add("a")
        window.says(summary)
        expect(window.trouble).to_have_text(trouble)
        window.page.unroute("**/sync/*")
        window.page.get_by_role("button", name="Try now").click()
        window.says("in sync · live")
        expect(window.trouble).to_be_empty()

    def test_a_pencil_shows_that_a_todo_can_be_edited(
        self, windows: Windows, demo: Live
    ) -> None:
        window = windows.open(demo)
        window.add("a", "b")
        window.new.hover()
        expect(window.pencil("a")).to_have_css("opacity", "0")
        window.title("a").hover()
        expect(window.pencil("a")).to_have_css("opacity", "1")
        expect(window.pencil("b")).to_have_css("opacity", "0")
        window.new.hover()
        window.page.keyboard.press("Tab")
        for name in ("Add", "Done: a", "Edit a"):
            window.focused(name)
            window.page.keyboard.press("Tab")
        expect(window.pencil("a")).to_have_css("opacity", "1")
        window.pencil("b").click()
        window.field.fill("c")
        window.field.press("Enter")
        window.shows("a", "c")
        window.focused("Edit c")
        phone = windows.open(demo, has_touch=True, is_mobile=True)
        expect(phone.pencil("a")).to_have_css("opacity", "1")
        phone.title("a").tap()
        phone.focused("Title")

    def test_the_log_names_what_each_change_did(
        self, windows: Windows, demo: Live
    ) -> None:
        one, other = windows.open(demo), windows.open(demo)
        one.add("a", "b")
        one.box("a").check()
        one.box("a").uncheck()
        one.edit("b", "c")
        one.delete("c")
        for window in (one, other):
            expect(window.page.locator("#log li")).to_have_text(
                [
                    re.compile(rf"no\. {number} +{words} +after \d")
                    for number, words in (
                        (6, "deleted: c"),
                        (5, "renamed: c"),
                        (4, "reopened: a"),
                        (3, "done: a"),
                        (2, "new: b"),
                        (1, "new: a"),
                    )
                ]
            )
        story = other.page.locator("#story")
        expect(story).to_have_text(re.compile(r"change no\. 6", re.IGNORECASE))

    def test_the_scope_has_a_label_that_is_seen(
        self, windows: Windows, demo: Live
    ) -> None:
        window = windows.open(demo)
        label = window.page.get_by_text("Scope", exact=True)
        assert label.bounding_box()["width"] > 20
        label.click()
        window.focused("Scope")

    def test_a_filter_hides_rows_and_survives_a_reload(
        self, windows: Windows, demo: Live
    ) -> None:
        window = windows.open(demo)
        window.add("a", "b", "c")
        window.box("b").check()
        window.filter("All").focus()
        window.page.keyboard.press("ArrowRight")
        window.focused("Active")
        window.shows("a", "c")
        window.settles()
        window.page.reload()
        window.shows("a", "c")
        expect(window.filter("Active")).to_be_checked()
        demo.client().push(of_demo("create", id="d", title="d"))
        window.shows("a", "c", "d")
        window.filter("Completed").check()
        window.shows("b")
        window.box("b").uncheck()
        window.shows()
        expect(window.empty).to_contain_text("No completed todos.")
        window.add("e")  # which would not be seen
        expect(window.filter("All")).to_be_checked()
        window.shows("a", "b", "c", "d", "e")
        window.filter("Active").check()
        window.page.evaluate("location.hash = 'other'")
        expect(window.empty).to_contain_text("Nothing here yet.")
        window.add("of the other")
        expect(window.filter("All")).to_be_checked()  # each list has its own
        window.page.go_back()
        window.shows("a", "b", "c", "d", "e")
        expect(window.filter("Active")).to_be_checked()

    def test_focus_stays_near_a_row_that_a_filter_hides(
        self, windows: Windows, demo: Live
    ) -> None:
        client = demo.client()
        client.push(*(of_demo("create", id=name, title=name) for name in "abcd"))
        window = windows.open(demo)
        window.filter("Active").check()
        window.shows("a", "b", "c", "d")
        window.box("b").focus()
        window.page.keyboard.press("Space")
        window.shows("a", "c", "d")
        window.focused("Done: c")
        client.push(of_demo("update", id="c", completed=True))
        window.shows("a", "d")
        window.focused("Done: d")
        window.pencil("d").click()
        window.field.fill("half a wor")
        client.push(of_demo("update", id="d", completed=True))
        client.push(of_demo("update", id="a", title="a new"))
        expect(window.title("a new")).to_be_visible()
        window.focused("Title")  # it is not taken away while it is edited
        window.field.press("Escape")
        window.shows("a new")
        window.focused("Done: a new")
        window.filter("Completed").check()
        window.shows("b", "c", "d")
        window.focused("Completed")

    def test_a_delete_can_be_undone_as_it_was(
        self, windows: Windows, demo: Live
    ) -> None:
        one, other = windows.open(demo), windows.open(demo)
        one.add("a", "b", "c")
        one.box("a").check()
        other.shows("a", "b", "c")
        one.delete("a")
        expect(one.page.get_by_text("Deleted “a”.")).to_be_visible()
        other.shows("b", "c")
        one.undo.click()
        for window in (one, other):
            window.shows("b", "c", "a")
            expect(window.box("a")).to_be_checked()
        one.focused("Done: a")
        expect(one.undo).to_be_hidden()
        one.delete("b")
        one.delete("c")
        one.page.keyboard.press("Control+z")  # the last one
        one.shows("a", "c")
        one.focused("Done: c")
        one.new.fill("x")
        one.delete("a")
        one.new.press("Control+z")  # that is the field's own
        one.shows("c")
        one.settles()
        other.shows("c")

    def test_completed_todos_are_cleared_and_put_back_at_once_offline_too(
        self, windows: Windows, demo: Live
    ) -> None:
        window = windows.open(demo)
        window.add("a", "b", "c")
        expect(window.clear).to_be_hidden()
        for title in "ac":
            window.box(title).check()
        window.settles()
        window.offline.check()
        window.filter("Active").check()
        window.clear.click()
        expect(window.page.get_by_text("Deleted 2 todos.")).to_be_visible()
        window.focused("Undo")  # the other button has gone
        expect(window.clear).to_be_hidden()
        window.filter("All").check()
        window.shows("b")
        window.undo.click()
        window.shows("b", "a", "c")
        for title in "ac":
            expect(window.box(title)).to_be_checked()
        window.says("offline · 6 not sent yet")
        window.page.reload()
        window.shows("b", "a", "c")
        window.offline.uncheck()
        window.says("in sync · live")
        assert titles_at(demo) == ["b", "a", "c"]
        expect(window.notice).to_be_empty()
        window.clear.click()
        window.shows("b")
        window.settles()
        assert titles_at(demo) == ["b"]

    def test_two_who_undo_the_same_delete_get_one_todo(
        self, windows: Windows, demo: Live
    ) -> None:
        both = one, other = windows.open(demo), windows.open(demo)
        one.add("a")
        other.shows("a")
        for window in both:
            window.offline.check()
            window.delete("a")
        for window in both:
            window.offline.uncheck()
            window.says("in sync · live")
        for window in both:
            window.undo.click()
            window.shows("a")
            window.settles()
        for window in both:
            window.says("in sync · live")
            window.shows("a")
            expect(window.notice).to_be_empty()
        assert titles_at(demo) == ["a"]

    def test_the_offer_to_undo_ends_unless_somebody_is_at_it(
        self, windows: Windows, demo: Live
    ) -> None:
        page = windows.context().new_page()
        page.clock.install()
        page.goto("http://{}:{}/".format(*demo.address))
        window = Window(page)
        window.add("a", "b")
        window.delete("a")
        window.undo.hover()
        page.clock.run_for(25_000)
        expect(window.undo).to_be_visible()
        window.new.hover()
        page.clock.run_for(25_000)
        expect(window.undo).to_be_hidden()
        expect(page.locator(".deleted")).to_be_empty()

    def test_a_page_that_would_lose_what_waits_asks_before_it_goes(
        self, windows: Windows, demo: Live
    ) -> None:
        window = windows.open(demo)
        window.offline.check()
        window.add("a")
        window.page.evaluate("""() => {
            Storage.prototype.setItem = () => {
              throw new DOMException("", "QuotaExceededError");
            };
        }""")
        may_go = """() => {
            const event = new Event("beforeunload", { cancelable: true });
            return dispatchEvent(event);
        }"""
        assert window.page.evaluate(may_go)
        window.add("b")
        assert not window.page.evaluate(may_go)


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
    session.send_message("subscribe", {"changes": True})
    page = puller.pull(scope="list")
    log = list(page["changes"])
    while len(log) < count or page["hasMore"]:
        cursor, epoch = page["cursor"], page["epoch"]
        hint = (
            {"cursor": cursor + 1}
            if page["hasMore"]
            else session.read_message()["data"]
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
            assert sessions[at].read_message()["data"] == {"cursor": result["cursor"]}
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
        hints = [session.read_message()["data"] for session in sessions]
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
            assert isinstance(pusher.exception(), OSError)
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
        self.databases: set[str] = set()  # the names that snapshots gave

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
        self.model.databases.add(taken.database)
        assert len(self.model.databases) == 1  # also after a restored backup
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
