# mizusync - Copyright (c) 2026 the mizusync authors. MIT License:
#
# Permission is hereby granted, free of charge, to any person obtaining a copy of this
# software and associated documentation files (the "Software"), to deal in the Software
# without restriction, including without limitation the rights to use, copy, modify,
# merge, publish, distribute, sublicense, and/or sell copies of the Software, and to
# permit persons to whom the Software is furnished to do so, subject to the following
# conditions: the above copyright notice and this permission notice shall be included in
# all copies or substantial portions of the Software.
#
# THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED,
# INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A
# PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT
# HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF
# CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE
# OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""mizusync: a durable sync server with instant updates, in one file.

It needs nothing but the standard library. A sync client normally polls. Here a sync
engine (push, pull, snapshot) is joined to a live server (topics over WebSocket) by one
arrow, notify:

    client A                                                          client B
       |                                                                 ^
       | push: mutations                        hint: "scope has 42" |   | pull from 41:
       v                                                             v   | change 42
    +------------------ the truth -------------------+        +- the accelerator -+
    | Engine: one writer thread, one transaction:    | notify | Hub: one frame to |
    | apply() + dedupe mark + changes -> log on disk |------->| every subscriber  |
    +------------------------------------------------+        +-------------------+

The left half alone is a complete sync server: a client that polls misses nothing. The
right half alone is a live server: it keeps nothing, and may lose a hint without harm.

The life of one change, and the section that does each step:

    bytes -> Request                HTTP requests   refused if two parsers could differ
    Request -> [Mutation, ...]      Endpoints       checked once, at the door
    -> a Job in the queue           Jobs            in the order of arrival
    -> rows, a mark, a result       Batch           one that fails leaves no trace
    -> one transaction              Writer          one fsync for all jobs that wait
    -> Change 42 in the log         SQLite          a number that is never issued again
    -> the answer, and the hint     Listeners       one hop from the writer to the loop
    -> every session                Hub             the same bytes for all
    -> a pull                       Tail            a join of encoded bytes

Contents. A section calls only what stands above it. In each one the heart comes first.
Code under a comment that begins with "against" handles faults and misuse. At a first
reading, skip it unless the list below names it:

    Settings          every limit and every timeout
    Errors            what a client may be told; what closes a socket
    JSON              strict, and limited before it is parsed
    Protocol          the words of protocol 1, and every byte of it
    Store             the change log: its rules, and the SQL that is the same everywhere
    Guard             the connection that `apply` gets, and what it may not do
    Database file     how a file is created, opened and checked
    SQLite            the log in that file
    Tail              the newest changes in memory
    Listeners         from the writer's thread back to each loop
    Jobs              what waits for the writer
    Batch             one transaction in the making
    Retention         trims
    Writer            one thread, one transaction, one fsync
    Engine            push, pull and snapshot, without a network
    Hub               topics, their subscribers, and the pace of hints
    HTTP requests     bytes to requests
    HTTP responses    responses to bytes
    WebSocket frames  RFC 6455 as pure functions
    Tasks             callbacks of the application, and work beside a connection
    Connection        a socket, its phases and its deadlines
    WebSocket         frames over a connection
    Gate              access: Host, Origin, token, on_auth
    Session           one live client
    Endpoints         push, pull, snapshot, and the client for a page
    Routes            from path and method to a handler
    HTTP server       accepting, the life of a request, the sweep, the stop
    Server            the two halves, and the arrow between them
    Todo              the demo, as an application would write it
    Command line      python mizusync.py

A first reading of an hour and 1,000 lines shows how a durable sync server works. In
each of these sections, read the comment that opens it and what is named here:

    Todo              apply_todo
    Protocol          Mutation, Change, Result.applied, Page, Hint
    Store             Position, Store.has_issued
    Guard             GuardedConnection.run_guarded
    Database file     LOG_SCHEMA
    SQLite            SQLiteStore.latest, SQLiteStore.begin, SQLiteStore.commit
    Tail              Tail, Tails._believed, Tails.page, Tails.load_page, Tails.advance
    Listeners         Listeners.notify
    Jobs              Step, Job
    Batch             Batch.apply, Batch._make_rows, Batch._add, Batch._repeat
    Writer            Writer._work, Writer._arriving, Writer._commit_steps,
                      Writer._run_alone, Writer._begin, Writer._commit, Writer._answer,
                      Writer._refuse
    Engine            Engine.push, Engine._mutation_steps, Engine._run_steps,
                      Engine.pull
    Hub               Hub.notify, Hub.hint, Hub._broadcast
    Session           Session.hint, LiveEndpoint._subscribe
    Endpoints         SyncEndpoints.push
    HTTP server       HTTPServer._serve_requests, HTTPServer._handle
    Server            Server.on_start

Where to add, and what goes with it:

    a limit               Settings, and MAY_BE_ZERO if it may be 0
    an error of `apply`   Errors, APPLY_MAY_RAISE, and its code in COUNTERS
    a counter             COUNTERS of Writer, or Hub.counts
    a column              LOG_SCHEMA, FORMAT and Row
    an endpoint           SyncEndpoints, its route in Server._add_routes, and for its
                          access `await self.gate.authorize_query(request)`
    state of one client   Session
    a deadline            Phase, and the table of Connection

To run the demo: `python mizusync.py`. To build on it, copy this file and write `apply`:

    def apply(db, mutation):            # inside the transaction: all of it, or nothing
        note = mutation.args["text"]
        db.execute("INSERT INTO notes VALUES (?, ?)", (mutation.id, note))
        return [{"note": note}]         # what every client of the scope will see

    engine = mizusync.Engine("notes.db", apply=apply, schema=SCHEMA)
    mizusync.Server(engine).run("127.0.0.1", 8080)
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - said before an import below fails
    _found = ".".join(map(str, sys.version_info[:3]))
    _sentence = "mizusync needs Python 3.11 or newer, and this is " + _found
    raise SystemExit(_sentence) if __name__ == "__main__" else ImportError(_sentence)

import argparse
import asyncio
import base64
import bisect
import codecs
import contextlib
import dataclasses
import email.utils
import enum
import errno
import functools
import gzip
import hashlib
import hmac
import http
import inspect
import io
import ipaddress
import itertools
import json
import logging
import marshal
import math
import os
import queue
import random
import re
import secrets
import signal
import socket
import sqlite3
import tempfile
import threading
import time
import urllib.parse
import weakref
from collections import Counter, OrderedDict
from collections.abc import (
    AsyncIterator,
    Callable,
    Coroutine,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar, cast

__version__ = "1.0.0"

__all__ = [
    # For an application.
    "Change", "Engine", "Json", "Mutation", "Server", "Settings",
    "Conflict", "Forbidden", "InvalidMutation", "NotFound",
    "Unauthorized", "Unavailable",
    # For its endpoints and its live clients.
    "Page", "Request", "Response", "Result", "Session", "Snapshot", "WebSocket",
    # For a store or a transport of its own.
    "Mark", "Position", "Row", "SQLiteStore", "Store",
    "StoreError", "StoreRefused", "Hint", "Hub", "Subscriber",
    # The other errors.
    "CursorTooOld", "CursorUnknown", "HTTPError", "InvalidRequest", "ProtocolError",
    "SyncError", "TooLarge",
]  # fmt: skip


class Log(logging.LoggerAdapter[logging.Logger]):
    """A logger that never raises what a filter or handler of the application raises.

    Many need a web framework's current request, and the writer's thread has none.
    """

    def log(self, *arguments: Any, **options: Any) -> None:
        with contextlib.suppress(Exception):
            super().log(*arguments, **options, stacklevel=2)  # the caller's line


log = Log(logging.getLogger("mizusync"))  # without a handler: the application decides
store_log = Log(logging.getLogger("mizusync.store"))
engine_log = Log(logging.getLogger("mizusync.engine"))
http_log = Log(logging.getLogger("mizusync.http"))
live_log = Log(logging.getLogger("mizusync.live"))

T = TypeVar("T")


# --- Settings -------------------------------------------------------------------------
# Every limit and every timeout is one line here. Sizes are in bytes, times in seconds.
# Whatever a peer can make grow has a limit here, or a constant beside the code that
# uses it.

MIB = 1024 * 1024  # bytes

# These may be 0; all others must be above 0.
MAY_BE_ZERO = {
    "max_pull_wait", "min_gzip_size", "linger_timeout", "max_hint_changes",
    "max_hint_size", "hint_gap", "max_sessions", "shutdown_timeout", "max_commit_time",
    "max_tail_changes", "max_tail_size", "busy_timeout",
}  # fmt: skip
# 11 days. SQLite's timeout and the waits of Windows are C integers, in ms.
MOST_SECONDS = 10**6


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The limits of an engine and a server: `Settings(max_sessions=100)` changes one.

    Raise TypeError for a value of another type, ValueError for one out of its range.
    """

    # One request.
    max_push_mutations: int = 100
    max_mutation_changes: int = 1000
    pull_limit: int = 100  # changes in a page, if the client names no number
    max_pull_limit: int = 1000
    max_pull_wait: float = 60.0
    max_page_size: int = 4 * MIB  # of a page, about; the next page has the rest
    # HTTP/1.1.
    max_target_size: int = 8 * 1024
    max_head_size: int = 64 * 1024
    max_head_fields: int = 100
    max_body_size: int = MIB
    max_json_depth: int = 64  # json.loads has another limit in each version of Python
    max_json_values: int = 100_000  # a megabyte of `[]` would block the loop for 0.3 s
    head_timeout: float = 10.0  # from the first byte of a head to its last
    body_timeout: float = 30.0  # for the whole body
    idle_timeout: float = 60.0  # between requests
    send_timeout: float = 30.0  # without progress, while the peer has an answer to read
    min_gzip_size: int = 16 * 1024  # a smaller answer is not compressed
    linger_timeout: float = 2.0  # after a refusal, for the peer to read it
    # WebSocket.
    max_message_size: int = MIB
    max_session_topics: int = 1000
    max_session_queue: int = MIB  # unsent messages that may not be merged; then 1013
    send_buffer: int = 64 * 1024  # SO_SNDBUF: what the kernel holds for a slow reader
    ping_interval: float = 20.0  # common proxies drop a quiet connection after 60
    ping_timeout: float = 60.0  # without a byte after a ping, the peer is dead
    close_timeout: float = 5.0  # for the peer's half of the closing handshake
    heartbeat: float = 25.0  # of silence before a topic's newest hint is sent again
    max_hint_changes: int = 32  # in one hint
    max_hint_size: int = 16 * 1024
    hint_gap: float = 0.03  # the longest pause between two broadcasts of a topic
    auth_interval: float | None = None  # ask on_auth again for open sessions
    # The whole server.
    max_sessions: int = 10_000
    max_connections: int = 12_000
    max_unsent: int = 256 * MIB  # that peers have yet to read; then 503
    shutdown_timeout: float = 8.0
    # The engine.
    max_commit_time: float = 0.02  # no more pushes join a transaction that is older
    max_pending_pushes: int = 10_000
    keep_changes: int | None = None  # of each scope, about; older ones are trimmed
    max_tail_changes: int = 1000  # of one scope in memory
    max_tail_size: int = 16 * MIB  # of all scopes together
    readers: int = 4  # threads that read the disk
    watch_interval: float = 0.05  # how often an idle writer checks for foreign commits
    busy_timeout: float = 5.0  # how long a commit waits for another process

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            # Annotations are strings here, because of the import from __future__.
            is_whole = str(field.type).startswith("int")
            kind = "a whole number" if is_whole else "a number of seconds"
            setting = f"Settings({field.name}={value!r}): it has to be {kind}"
            types = (int,) if is_whole else (int, float)
            if type(value) not in types:  # a bool is none of these
                raise TypeError(setting)
            largest = 10**15 if is_whole else MOST_SECONDS
            may_be_zero = field.name in MAY_BE_ZERO
            is_wrong_zero = value == 0 and not may_be_zero
            if is_wrong_zero or not 0 <= value <= largest:  # NaN is not in any range
                least = "0 or more" if may_be_zero else "above 0"
                raise ValueError(f"{setting}, {least}, at most {largest:,}")


# --- Errors ---------------------------------------------------------------------------
# A SyncError is a refusal that the client may see: an HTTP status, a code of the
# protocol, and a sentence. Any other exception is a bug of ours or of the application:
# the log records its traceback, and the client gets a bare internal_error.


class SyncError(Exception):
    """A refusal that the client may see. Raised itself, it reports internal_error.

    A subclass inherits the status and the code that it does not name.
    """

    status: int = 500
    code: str = "internal_error"
    headers: Mapping[str, str] = {}  # fields that belong to the status (RFC 9110 §15)

    def __init_subclass__(cls, status: int | None = None, code: str = "") -> None:
        cls.status = status or cls.status
        cls.code = code or cls.code


class InvalidRequest(SyncError, status=400, code="invalid_request"):
    """The request is malformed, or could be read in two ways."""


class InvalidMutation(SyncError, status=400, code="invalid_mutation"):
    """The mutation can never work, so the client drops it."""


class Unauthorized(SyncError, status=401, code="unauthorized"):
    """The client is not authenticated. Raised by `on_auth`, it refuses the request."""

    headers = {"WWW-Authenticate": 'Bearer realm="mizusync"'}


class Forbidden(SyncError, status=403, code="forbidden"):
    """The client is authenticated, but not allowed. `on_auth` may raise this."""


class NotFound(SyncError, status=404, code="not_found"):
    """The thing that the client names does not exist."""


class Conflict(SyncError, status=409, code="conflict"):
    """The data is not in the state that the mutation needs."""


class CursorTooOld(SyncError, status=410, code="cursor_too_old"):
    """Changes after this cursor were trimmed. The client continues from a snapshot."""


class CursorUnknown(SyncError, status=410, code="cursor_unknown"):
    """This history never issued this cursor. The client continues from a snapshot.

    Without an epoch, the engine notices this only while the cursor is above the head.
    """


class TooLarge(SyncError, status=413, code="too_large"):
    """The request holds more than the server takes at once. The client sends less."""


class Unavailable(SyncError, status=503, code="unavailable"):
    """The server can't do this now, and applied nothing of it."""

    headers = {"Retry-After": "1"}


class StoreRefused(Unavailable):
    """The database refused an operation: a full disk, or another process's lock.

    If it happens inside a transaction, that transaction is lost as a whole.
    """


# What `apply` raises to refuse a mutation; a subclass may have a code of its own.
# (StoreRefused is an Unavailable, too, but it means that the whole transaction is lost,
# so catch it first.)
APPLY_MAY_RAISE = (InvalidMutation, NotFound, Conflict, Forbidden, Unavailable)


class HTTPError(SyncError):
    """A refusal that concerns HTTP alone. Its status implies its code."""

    CODES: ClassVar = {
        405: "method_not_allowed", 408: "request_timeout", 414: "uri_too_long",
        415: "unsupported_media_type", 426: "upgrade_required",
        431: "headers_too_large", 501: "not_implemented", 505: "version_not_supported",
    }  # fmt: skip

    def __init__(
        self, status: int, sentence: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(sentence)
        self.status = status
        self.code = self.CODES[status]
        self.headers = headers or {}


class StoreError(Exception):
    """The database can't be opened: another program's file, say, or a newer format."""


class ProtocolError(Exception):
    """The peer broke a rule of RFC 6455. `code` is the code to close with."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code


# --- JSON -----------------------------------------------------------------------------
# Strict JSON (RFC 8259), with limits that hold before anything is built in memory:
# json.loads has a depth limit that differs between versions, no other limit, and it
# keeps the GIL while it parses.

# Without NaN and Infinity, which are not JSON (RFC 8259 §6), and without spaces.
encode_json = json.JSONEncoder(
    ensure_ascii=False, allow_nan=False, separators=(",", ":")
).encode
# The names of scopes and topics repeat: the same few are encoded again and again.
encode_name = functools.lru_cache(maxsize=1000)(encode_json)


def parse_json(raw: bytes, max_depth: int = 64, max_values: int = 100_000) -> Any:
    """Parse strict JSON: UTF-8; of duplicate keys the last one counts.

    An integer that does not fit 64 bits (SQLite's limit) becomes a float, as in
    JavaScript. Raise TooLarge for more than `max_values` values. Raise InvalidRequest
    for text that is not JSON or is nested deeper than `max_depth`, for NaN and
    infinities, and for half a surrogate pair.
    """
    check_structure(raw, max_depth, max_values)
    try:
        # json.loads(bytes) would guess UTF-16 and UTF-32 as well, so decode first.
        value = _DECODER.decode(raw.decode("utf-8"))
        # Most texts have no backslash, and a search for one byte is faster.
        if b"\\" in raw and b"\\u" in raw:
            encode_json(value).encode("utf-8")  # fails for half a surrogate pair
    except (ValueError, RecursionError) as error:
        sentence = f"the JSON can't be read: {error}"
        raise InvalidRequest(sentence[:200]) from None
    return value


def parse_integer(text: str) -> int | float:
    """Return an integer that fits 64 bits, or else a float. Raise ValueError."""
    if len(text) <= 20:  # to parse a million digits as an integer would take seconds
        number = int(text)
        if -(2**63) <= number < 2**63:
            return number
    return parse_finite(text)


def parse_finite(text: str) -> float:
    """Return a finite float. Raise ValueError for infinity and NaN."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is not a finite number")
    return number


_DECODER = json.JSONDecoder(
    parse_int=parse_integer, parse_float=parse_finite, parse_constant=parse_finite
)


# - against JSON that is deep, or has very many values

_NOT_STRUCTURE = bytes(set(range(256)) - set(b'[]{},"'))
# By how much each bracket changes the depth: 255 is -1 as a signed byte.
_DEPTH_CHANGES = bytes.maketrans(b"[{]}", bytes((1, 1, 255, 255)))


def check_structure(raw: bytes, max_depth: int, max_values: int) -> None:
    """Raise TooLarge for too many values, and InvalidRequest for too many levels.

    The time is linear in the size. An invalid text may pass, but parsing then fails.
    """
    # Most texts are far below both limits, even if brackets in strings count as well.
    if len(raw) <= max_values:
        most_levels = raw.count(b"[") + raw.count(b"{")
        if most_levels <= max_depth:
            return
    # Remove the strings, in four steps. 1. Remove escaped quotes. (Remove pairs of
    # backslashes first, because an odd number of them escapes a quote.) 2. Keep only
    # the structure and the quotes. 3. Remove pairs of quotes: most strings are empty
    # now. 4. Remove every second piece between quotes: it is inside a string.
    if b"\\" in raw:
        raw = raw.replace(rb"\\", b"").replace(rb"\"", b"")
    structure = raw.translate(None, _NOT_STRUCTURE).replace(b'""', b"")
    bare = b"".join(structure.split(b'"')[::2])
    openings = bare.count(b"[") + bare.count(b"{")
    if openings + bare.count(b",") > max_values:
        raise TooLarge(f"the JSON has more than {max_values} values")
    # A valid text has as many closing brackets as opening ones: cut there, so that a
    # megabyte of `]` costs nothing.
    brackets = bare.replace(b",", b"")[: 2 * openings]
    changes = memoryview(brackets.translate(_DEPTH_CHANGES)).cast("b")
    if max(itertools.accumulate(changes), default=0) > max_depth:
        raise InvalidRequest(f"the JSON is nested deeper than {max_depth} levels")


# --- Protocol -------------------------------------------------------------------------
# The words of protocol 1 as values, and every byte of it spelled once: only this
# section knows how a change, a result, a page, a snapshot, a hint, an error and a
# message are written. Data from outside is checked here, once; after that the types are
# true. A change is encoded once, on its way into the log; answers, pages and hints are
# joined from these encoded changes.

DEFAULT_SCOPE = "_default"
MAX_CURSOR = 2**53 - 1  # every JSON parser represents it exactly (RFC 8259 §6)
MAX_NAME = 128  # characters, of a mutation's id and name
MAX_SCOPE = 256  # characters
NAME_RULE = "the %s has to be a string of 1 to %d characters"
SYNC = "sync:"  # the topic of a scope is this prefix and the scope


@dataclasses.dataclass(frozen=True, slots=True)
class Json:
    """JSON text that is encoded already, by `json_group_array` for example."""

    text: str

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not self.text:
            raise TypeError(f"Json takes JSON text, not {self.text!r}")


@dataclasses.dataclass(slots=True)
class Mutation:
    """A client's request to change the data. Within its scope, an `id` applies once.

    `args` is any JSON value; `identity` is what `on_auth` returned for the client.
    """

    id: str
    name: str
    args: Any = None
    scope: str = DEFAULT_SCOPE
    identity: Any = None

    def __post_init__(self) -> None:
        if not is_name(self.id, MAX_NAME):
            raise InvalidMutation(NAME_RULE % ("id", MAX_NAME))
        if not is_name(self.name, MAX_NAME):
            raise InvalidMutation(NAME_RULE % ("name", MAX_NAME))
        if not is_name(self.scope, MAX_SCOPE):
            raise InvalidMutation(NAME_RULE % ("scope", MAX_SCOPE))

    def __str__(self) -> str:
        """Return what a log may say of it: not its args, which may be private."""
        return f"{self.name!r}, id {self.id!r} in scope {self.scope!r}"

    @classmethod
    def parse(cls, value: Any) -> Mutation:
        """Return the mutation that a JSON value describes. Raise InvalidMutation."""
        if not isinstance(value, (dict, Mapping)):  # dict is the faster check
            raise InvalidMutation("a mutation has to be a JSON object")
        return cls(
            value.get("id", ""),
            value.get("name", ""),
            value.get("args"),
            value.get("scope", DEFAULT_SCOPE),
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Change:
    """One row of the log, as every client of its scope sees it.

    An application makes `Change(data)`, or `Change(data, scope="another")`; without a
    scope the change belongs to the mutation's own. The log fills in the cursor and the
    time (RFC 3339, UTC).
    """

    data: Any
    scope: str | None = None
    cursor: int = 0
    time: str = ""


# A change as every client of its scope gets it. Python fills this in, and SQLite can.
CHANGE = '{"cursor":%d,"scope":%s,"time":"%s","data":%s}'


class Row(NamedTuple):
    """A change as the log keeps it. `first` is the first cursor of its mutation."""

    cursor: int
    first: int
    scope: str
    time: str
    data: str  # JSON text

    def encode(self) -> bytes:
        """Return the change as every client of its scope gets it."""
        scope = encode_name(self.scope)
        values = (self.cursor, scope, self.time, self.data)
        return (CHANGE % values).encode()


class Result(NamedTuple):
    """The outcome of one mutation. `encoded` is the JSON that the client gets.

    `cursor` is that of the mutation's last change, in whatever scope. A client must not
    pull from there: if it is 42, another client's change may be 41.
    """

    encoded: bytes
    ok: bool
    cursor: int = 0
    duplicate: bool = False
    code: str = ""
    error: str = ""

    @classmethod
    def applied(
        cls, cursor: int, changes: Sequence[bytes] | None, duplicate: bool = False
    ) -> Result:
        """Return the result of an applied mutation.

        `changes` are those in its own scope, encoded; None leaves them out.
        """
        shown = b"" if changes is None else b',"changes":[%b]' % b",".join(changes)
        again = b',"duplicate":true' if duplicate else b""
        encoded = b'{"ok":true,"cursor":%d%b%b}' % (cursor, shown, again)
        return cls(encoded, True, cursor, duplicate)

    @classmethod
    def refused(cls, refusal: SyncError) -> Result:
        """Return the result of a mutation that failed and left no trace."""
        code = refusal.code
        error = str(refusal)
        text = encode_json({"ok": False, "code": code, "error": error})
        encoded = text.encode(errors="replace")
        return cls(encoded, False, code=code, error=error)

    @property
    def changes(self) -> list[Change]:
        """The changes in the mutation's own scope; none if they were left out."""
        found = json.loads(self.encoded).get("changes", ())
        return [Change(**change) for change in found]


class Page(NamedTuple):
    """Some changes of one scope, in order. The next page begins after `cursor`."""

    encoded_changes: Sequence[bytes]  # each one change, or several with commas between
    cursor: int
    epoch: str
    has_more: bool = False

    @property
    def changes(self) -> list[Change]:
        text = b"[%b]" % b",".join(self.encoded_changes)
        return [Change(**change) for change in json.loads(text)]

    def encode(self) -> bytes:
        """Return the body that answers a pull."""
        return b'{"changes":[%b],"cursor":%d,"epoch":"%b","hasMore":%b}' % (
            b",".join(self.encoded_changes),
            self.cursor,
            self.epoch.encode(),
            b"true" if self.has_more else b"false",
        )


class Snapshot(NamedTuple):
    """The whole state of one scope at one cursor. `text` is its JSON."""

    text: str
    cursor: int
    epoch: str
    database: str  # its name, which every copy of it keeps

    @property
    def data(self) -> Any:
        return json.loads(self.text)

    def encode(self) -> bytes:
        """Return the body that answers a request for a snapshot."""
        history = f'"epoch":"{self.epoch}","database":"{self.database}"'
        return f'{{"data":{self.text},"cursor":{self.cursor},{history}}}'.encode()


class Hint(NamedTuple):
    """The newest cursor of a scope and, if they are few, the changes above `after`.

    `changes` (encoded) is empty if they are many, or another process's: then the
    subscribers have to pull.
    """

    cursor: int
    epoch: str = ""
    after: int = 0
    changes: tuple[bytes, ...] = ()

    def encode(self) -> bytes:
        """Return the data of a hint that carries its changes."""
        return b'{"cursor":%d,"epoch":"%b","after":%d,"changes":[%b]}' % (
            self.cursor,
            self.epoch.encode(),
            self.after,
            b",".join(self.changes),
        )


def encode_cursor(cursor: int) -> bytes:
    """Return the data of a hint without changes."""
    return b'{"cursor":%d}' % cursor


def encode_message(topic: str, data: bytes) -> bytes:
    """Return one message of the WebSocket; `data` is JSON."""
    return b'{"topic":%b,"data":%b}' % (encode_name(topic).encode(), data)


def encode_error(code: str, sentence: str, scope: str | None = None) -> bytes:
    """Return the body of an error, or the data of an `error` message."""
    fields = {"code": code, "error": sentence}
    if scope is not None:
        fields["scope"] = scope
    return encode_json(fields).encode(errors="replace")


def is_name(value: Any, longest: int) -> bool:
    """Return whether a value can name a scope or a mutation: UTF-8 can encode it."""
    if not isinstance(value, str) or not 0 < len(value) <= longest:
        return False
    return value.isascii() or not re.search("[\ud800-\udfff]", value)


def check_scope(value: Any) -> str:
    """Return the value if it can name a scope; raise InvalidRequest otherwise."""
    if not is_name(value, MAX_SCOPE):
        raise InvalidRequest(NAME_RULE % ("scope", MAX_SCOPE))
    return str(value)


# --- Store ----------------------------------------------------------------------------
# The change log. Each change is a row. Each mutation that was applied leaves a row as
# well, its dedupe mark, which is never deleted. Everything here blocks: writes run on
# the writer's thread, reads on connections of their own.
#
# A reader at cursor N has everything of its scope up to N, because
#   1. one writer at a time, over all processes, issues the cursors: from the head that
#      it finds under the write lock, without a gap (begin, Batch.apply). So cursors
#      rise in commit order. AUTOINCREMENT keeps the head, so that not even a trim or a
#      restart lowers it (https://sqlite.org/autoinc.html);
#   2. a read is one transaction and sees one moment (read), and a page never ends
#      inside the changes of one mutation (Tails.page, Tails.load_page);
#   3. a reader below the scope's highest trimmed cursor gets cursor_too_old
#      (load_page);
#   4. a reader with a cursor of another history gets cursor_unknown (has_issued). A
#      client that does not send the epoch of its cursor only has the head checked.
#
# The fourth needs epochs, because an older copy of the database may be restored and
# grow again. An epoch is a random name, and the head at which it began. A new log has
# its first one. A process that opens the log begins one with its first commit, because
# an older copy may have been restored before that; and with the first commit after a
# restore that it notices.
#
#     A began at 0     The log grows to 60, and someone makes a backup. It grows to 100;
#                      a client pulls, and remembers (A, 100).
#     B began at 60    The backup is restored, so the log ends at 60 again. The next
#                      commit begins B. The log grows to 200: the cursors 61 to 100 now
#                      belong to other changes.
#     (A, 100) asks    B began below 100, so the server answers cursor_unknown, and the
#                      client takes a snapshot. By the head alone, 100 of 200 would look
#                      valid, and the client would miss 40 changes.
#
# So this history issued (epoch, cursor) if it has the epoch, no later epoch began below
# the cursor, and the cursor is at most the head. A restart disturbs nobody: the new
# epoch begins at the head, and no client is above that.
#
# The first epoch also names the database (read_database). An older copy keeps the name,
# and a new log has another: so a client that gets cursor_unknown can tell which of the
# two the server has now. An operator may rename the database by one UPDATE of that row.
# Cursors of the first epoch are then unknown, as they are to any other database.
#
# The words: `head` is the newest cursor of the log, `current` that of one scope. Three
# positions of the log are kept:
#
#     Store.latest()   that of the database now, whichever process committed
#     Tails.position   that up to which memory is complete
#     _shown           of SQLiteStore: the newest one that a client may know from here


class Position(NamedTuple):
    """The state of the log. Until it changes, what memory holds of it is true."""

    head: int  # the newest cursor of the log
    epoch: str  # the newest epoch
    trims: int  # the number of the newest trim


class Mark(NamedTuple):
    """The dedupe mark of a mutation; its changes have the cursors `first` to `last`.

    If it made no changes, `first` is None and `last` was its scope's current cursor.
    """

    scope: str
    id: str
    first: int | None
    last: int


class Store:
    """What an engine needs from a database. Each operation may raise StoreRefused.

    A store implements the methods down to read_full_page. The SQL of those below works
    wherever there are tables with the columns of LOG_SCHEMA. `db` is a connection of
    the store's; `apply` and `snapshot` get it as it is.
    """

    # Any thread may call these.

    def latest(self) -> Position:
        """Return the position after the newest commit of any process; don't wait."""
        raise NotImplementedError

    def read(self, work: Callable[[Any], T]) -> T:
        """Return `work(db)`, run in a transaction that sees one moment."""
        raise NotImplementedError

    def close(self) -> None:
        """Close every connection."""
        raise NotImplementedError

    def stats(self) -> dict[str, int]:
        """Return numbers for Engine.stats, by name."""
        return {}

    # The writer's thread calls these: begin(), then run_guarded() for each mutation,
    # and at the end commit() or rollback().

    def begin(self) -> tuple[Any, Position]:
        """Begin a transaction that excludes every other writer; wait a while for it.

        Return its connection, and the position under the lock.
        """
        raise NotImplementedError

    def run_guarded(self, work: Callable[[Any], T]) -> T:
        """Return `work(db)`, application code; undo what it wrote if it raises.

        Raise StoreRefused if the transaction did not survive it.
        """
        raise NotImplementedError

    def commit(self, rows: Sequence[Row], marks: Sequence[Mark]) -> Position:
        """Append to the log, and commit: all of it is on disk when this returns.

        The engine has numbered the rows, from the head of begin() without a gap. Begin
        an epoch at that head if one is due. Return the position after the commit.
        """
        raise NotImplementedError

    def rollback(self) -> None:
        """End the transaction. This never raises: it abandons what it can't undo."""
        raise NotImplementedError

    # These run inside a transaction, on any thread.

    def run(self, db: Any, sql: str, *parameters: Any) -> list[Any]:
        """Run one statement, with `?` for each parameter, and return all its rows."""
        raise NotImplementedError

    def read_position(self, db: Any) -> Position:
        """Return the position of the log, as the transaction sees it."""
        raise NotImplementedError

    def read_changes(
        self, db: Any, scope: str, after: int
    ) -> Generator[Row, None, None]:
        """Yield the scope's changes above a cursor, in order and lazily."""
        raise NotImplementedError

    def read_full_page(
        self,
        db: Any,
        scope: str,
        after: int,
        limit: int,
        max_size: int,
    ) -> tuple[int, bytes] | None:
        """Return the last cursor and the encoded changes of a page that is not the end.

        This is for a database that can write JSON. None sends the caller to
        read_changes, as at the log's end, and for a page that may be too large.
        """
        return None

    # From here on the SQL is the same everywhere.

    def run_scalar(self, db: Any, sql: str, *parameters: Any) -> Any:
        """Run one statement; return the first column of its first row, or None."""
        rows = self.run(db, sql, *parameters)
        return rows[0][0] if rows else None

    def has_issued(self, db: Any, position: Position, epoch: str, cursor: int) -> bool:
        """Return whether a cursor of an epoch belongs to the history up to a position.

        The position is that of the log, as the transaction sees it.
        """
        if cursor > position.head:
            return False
        if epoch == position.epoch:  # most often
            return True
        sql = """
            SELECT 1 FROM mizusync_epochs AS known WHERE epoch = ? AND NOT EXISTS (
                SELECT 1 FROM mizusync_epochs
                WHERE number > known.number AND start < ?)
        """
        return bool(self.run(db, sql, epoch, cursor))

    def read_database(self, db: Any) -> str:
        """Return the name of the database: its first epoch, which every copy keeps."""
        sql = "SELECT epoch FROM mizusync_epochs ORDER BY number LIMIT 1"
        return str(self.run_scalar(db, sql))

    def read_current(self, db: Any, scope: str) -> int:
        """Return the scope's newest cursor, or 0. A trim does not lower it."""
        newest = self.read_nth_newest(db, scope, 1)
        return newest or self.read_trimmed(db, scope)

    def read_trimmed(self, db: Any, scope: str) -> int:
        """Return the scope's highest trimmed cursor, or 0."""
        sql = "SELECT cursor FROM mizusync_trims WHERE scope = ?"
        return self.run_scalar(db, sql, scope) or 0

    def read_nth_newest(self, db: Any, scope: str, n: int) -> int:
        """Return the cursor of the scope's n-th newest change, or 0."""
        sql = """
            SELECT cursor FROM mizusync_changes WHERE scope = ?
            ORDER BY cursor DESC LIMIT 1 OFFSET ?
        """
        return self.run_scalar(db, sql, scope, n - 1) or 0

    def read_range(self, db: Any, first: int, last: int) -> list[Row]:
        """Return the changes of all scopes from one cursor to another, in order."""
        sql = """
            SELECT * FROM mizusync_changes WHERE cursor BETWEEN ? AND ? ORDER BY cursor
        """
        rows = self.run(db, sql, first, last)
        return [Row(*row) for row in rows]

    def read_scopes_since(self, db: Any, position: Position) -> dict[str, int]:
        """Return the scopes that were changed or trimmed since.

        With each comes its newest change or its trim, whichever is the higher cursor.
        """
        sql = """
            SELECT scope, max(cursor) FROM (
                SELECT scope, cursor FROM mizusync_changes WHERE cursor > ?
                UNION ALL SELECT scope, cursor FROM mizusync_trims WHERE number > ?
            ) AS newer GROUP BY scope
        """
        newer = self.run(db, sql, position.head, position.trims)
        return dict(newer)

    def find_marks(self, db: Any, scope: str, ids: Sequence[str]) -> list[Mark]:
        """Return the dedupe marks of the ids that were applied before."""
        places = ", ".join("?" * len(ids))
        sql = f"""
            SELECT * FROM mizusync_mutations WHERE scope = ? AND id IN ({places})
        """
        rows = self.run(db, sql, scope, *ids)
        return [Mark(*row) for row in rows]

    def trim(self, db: Any, scope: str, before: int, limit: int) -> int:
        """Remove the oldest changes below `before`, about `limit`; return how many.

        Mutations go whole or not at all: of one with the changes 5 to 8, before=7
        removes nothing.
        """
        # 1. Find the newest change that goes: the last one of a mutation.
        newest = 0
        count = 0
        with contextlib.closing(self.read_changes(db, scope, 0)) as rows:
            for _, mutation in itertools.groupby(rows, key=lambda row: row.first):
                cursors = [row.cursor for row in mutation]
                if count >= limit or cursors[-1] >= before:
                    break
                newest = cursors[-1]
                count += len(cursors)
        if not count:
            return 0
        # 2. Record its cursor, so that readers below it are refused.
        sql = """
            INSERT INTO mizusync_trims (number, scope, cursor)
            VALUES ((SELECT coalesce(max(number), 0) + 1 FROM mizusync_trims), ?, ?)
            ON CONFLICT (scope)
            DO UPDATE SET number = excluded.number, cursor = excluded.cursor
        """
        self.run(db, sql, scope, newest)
        # 3. Remove the changes.
        sql = "DELETE FROM mizusync_changes WHERE scope = ? AND cursor <= ?"
        self.run(db, sql, scope, newest)
        return count

    def probe(self, db: Any) -> None:
        """Write a row and delete it, to learn whether the disk accepts writes."""
        # No mutation has an empty scope. An UPDATE that changes nothing would not do:
        # SQLite does not write it.
        self.run(db, "INSERT INTO mizusync_mutations VALUES ('', '', NULL, 0)")
        self.run(db, "DELETE FROM mizusync_mutations WHERE scope = ''")


# --- Guard ----------------------------------------------------------------------------
# The connection that `apply` and `snapshot` get. The application may do anything with
# it except control the transaction, leave the file, or change the log's own tables. An
# authorizer (https://sqlite.org/c3ref/set_authorizer.html) refuses these while
# application code runs.
#
# SQLite asks the authorizer only when it prepares a statement, and Python caches what
# it has prepared. If the engine's COMMIT and an application's were the same text, the
# application's would come from the cache, unasked. So the engine's own statements begin
# with a comment that no application uses.
#
# A mutation that fails leaves no trace. A savepoint for each one would cost a tenth of
# a push, and most need none: they only write rows, and check before they write. So at
# first there is none. If a mutation fails after it wrote, or does more than read and
# write rows, or one of its statements fails, the transaction is given up, and the
# writer runs each of its mutations alone. From the first rollback on, each mutation has
# a savepoint.

OWN_STATEMENT = "/* mizusync */ "

# What SQLite reports if the disk, the file or another process is in the way
# (https://sqlite.org/rescode.html). A statement of the application may have one of
# these codes for another reason: an AUTOINCREMENT at its highest number has that of a
# full disk. So the writer runs such a mutation again, in a transaction of its own.
REFUSAL_CODES = (
    sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_BUSY, sqlite3.SQLITE_PROTOCOL, sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_NOTADB,
)  # fmt: skip


def primary_code(error: BaseException) -> int:
    """Return SQLite's primary result code; 0 for an error of the Python module."""
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF


def raise_if_refusal(error: BaseException) -> None:
    """Raise StoreRefused if SQLite reports that something is in the way."""
    if primary_code(error) in REFUSAL_CODES:
        raise StoreRefused("the database can't write right now") from error


def run_own(db: sqlite3.Connection, sql: str, *parameters: Any) -> list[Any]:
    """Run a statement of the engine's own; return all its rows. Raise StoreRefused."""
    try:
        rows = sqlite3.Connection.execute(db, OWN_STATEMENT + sql, parameters)
        return rows.fetchall()
    except sqlite3.Error as error:
        raise_if_refusal(error)
        raise


def insert_own(
    db: sqlite3.Connection, table: str, rows: Sequence[Sequence[Any]]
) -> None:
    """Insert rows into a table of the engine's own. Raise StoreRefused.

    Fifty rows in one statement take less than half the time of fifty statements.
    """
    start = 0
    for size in (50, 5, 1):  # few sizes, so that few statements are prepared
        while start + size <= len(rows):
            values = itertools.chain.from_iterable(rows[start : start + size])
            sql = insert_statement(table, size, len(rows[0]))
            run_own(db, sql, *values)
            start += size


@functools.cache
def insert_statement(table: str, rows: int, columns: int) -> str:
    """Return a statement that inserts a number of rows."""
    row = f"({', '.join('?' * columns)})"
    return f"INSERT INTO {table} VALUES {', '.join([row] * rows)}"


class GuardedConnection(sqlite3.Connection):
    """A connection that runs application code, undoes what fails, and restricts it."""

    def __init__(self, path: str, mode: str, timeout: float = 5.0) -> None:
        """Open the file; `mode` is "ro", or "rwc", which writes and may create it."""
        # Quote every byte: a name need not be UTF-8, and in a URI //x is a host.
        name = urllib.parse.quote(os.fsencode(path), safe="")
        super().__init__(
            f"file:{name}?mode={mode}",
            uri=True,
            timeout=timeout,
            isolation_level=None,  # only an explicit BEGIN begins a transaction
            check_same_thread=False,  # any thread may use it, one at a time
        )
        self.path = path
        self.has_created_log = False
        self._timeout = timeout
        self._guarded = False  # application code has the connection
        # See above. Until 3.36, total_changes does not show that DELETE has emptied a
        # table WITHOUT ROWID.
        self.needs_savepoints = sqlite3.sqlite_version_info < (3, 36)
        self._cursors: list[weakref.ref[GuardedCursor]] = []  # of the application
        super().set_authorizer(self._authorize)

    def run_guarded(self, work: Callable[[Any], T]) -> T:
        """Return `work(self)`; if it raises, undo what it wrote.

        Outside of a transaction, the savepoint begins one, so that all reads see one
        moment (https://sqlite.org/lang_savepoint.html). Raise StoreRefused if the
        transaction did not survive, or if `work` ended with a refusal of SQLite's.
        """
        has_savepoint = self.needs_savepoints or not self.in_transaction
        if has_savepoint:
            run_own(self, "SAVEPOINT mizusync_guard")
        changes = self.total_changes
        self._guarded = True
        try:
            result = work(self)
        except BaseException as error:
            self._end_guard(has_savepoint, changes, failed=True)
            raise_if_refusal(error)
            if primary_code(error) == sqlite3.SQLITE_AUTH:
                error.add_note(GUARD_NOTE)
            raise
        self._end_guard(has_savepoint, changes, failed=False)
        return result

    def _end_guard(self, has_savepoint: bool, changes: int, failed: bool) -> None:
        """Close the application's cursors, undo its settings, and end the savepoint.

        `changes` is total_changes from before the application ran. A half-read INSERT
        ... RETURNING makes a later COMMIT fail, and a half-read SELECT keeps an old
        state of the file in use.
        """
        self._guarded = False
        self.row_factory = None
        self.text_factory = str
        try:
            for reference in self._cursors:
                cursor = reference()
                if cursor is not None:
                    with contextlib.suppress(sqlite3.Error):  # a thread may be using it
                        cursor.close()
            self._cursors.clear()
            if has_savepoint:
                if failed:
                    run_own(self, "ROLLBACK TO mizusync_guard")
                run_own(self, "RELEASE mizusync_guard")
                return
            has_written = self.total_changes != changes
            needs_undo = self.needs_savepoints or (failed and has_written)
            if needs_undo or not self.in_transaction:
                raise sqlite3.OperationalError("no savepoint can undo this mutation")
        except Exception as error:
            # There was no savepoint, or it went when everything was rolled back.
            raise StoreRefused("the transaction can't go on") from error

    def retry(self, work: Callable[..., T], *arguments: Any) -> T:
        """Call `work`; while another process holds the lock, roll back and try again.

        SQLite's own busy handler sleeps up to 100 ms between two tries: beside a busy
        writer of another process it might never get the lock. And PRAGMA journal_mode
        does not ask the busy handler at all.
        """
        deadline = time.monotonic() + self._timeout
        while True:
            try:
                return work(*arguments)
            except (sqlite3.Error, StoreRefused) as error:
                if self.in_transaction:
                    run_own(self, "ROLLBACK")
                code = primary_code(error.__cause__ or error)
                if code != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise_if_refusal(error)
                    raise
            time.sleep(0.0002)

    def cursor(self, factory: Any = None) -> Any:
        """Return a GuardedCursor, whatever the factory."""
        cursor = sqlite3.Connection.cursor(self, GuardedCursor)
        self._cursors.append(weakref.ref(cursor))
        if len(self._cursors) % 1000 == 0:  # most of them are gone
            self._cursors = [each for each in self._cursors if each() is not None]
        return cursor

    def execute(self, *statement: Any) -> Any:
        # sqlite3.Connection's own does not call cursor(). Nor does its executemany().
        return self.cursor().execute(*statement)

    def executemany(self, *statement: Any) -> Any:
        return self.cursor().executemany(*statement)

    def check_transaction(self) -> None:
        """Refuse a statement of the application if its transaction is lost.

        SQLITE_FULL and RAISE(ROLLBACK) roll the whole transaction back. If `apply` goes
        on, each statement would commit by itself.
        """
        if self._guarded and not self.in_transaction:
            raise sqlite3.OperationalError("the transaction was rolled back")

    # -- against an application that controls the transaction

    def _authorize(self, action: int, *names: str | None) -> int:
        """Allow or deny an action. The third name is the database's."""
        if action == sqlite3.SQLITE_INSERT and names[2] == "temp":
            # Everything that is created in TEMP begins with an INSERT there. SQLite
            # looks up names in TEMP first, so a table or trigger there could shadow the
            # log's. Refuse it at any time, also in the application's schema.
            return sqlite3.SQLITE_DENY
        if not self._guarded or action == sqlite3.SQLITE_READ:
            return sqlite3.SQLITE_OK
        if not self.in_transaction:  # as in check_transaction
            return sqlite3.SQLITE_DENY
        if action not in _ROWS:  # a table, a savepoint: total_changes does not show it
            self.needs_savepoints = True
        # Without a value, a PRAGMA only reads. Full-text search uses such ones.
        is_reading = action == sqlite3.SQLITE_PRAGMA and names[1] is None
        if action in _CONTROL and not is_reading:
            return sqlite3.SQLITE_DENY
        for name in names:
            if name and name.lower().startswith(_OWN_NAMES):
                return sqlite3.SQLITE_DENY
        return sqlite3.SQLITE_OK

    def _refuse(self, *arguments: Any, **options: Any) -> Any:
        raise sqlite3.ProgrammingError("an application can't use this method here")

    # An authorizer of its own would replace this one. A backup that `apply` makes would
    # wait for ever for the transaction that `apply` runs in. A blob asks no authorizer,
    # and if it stayed open, no later COMMIT would work.
    set_authorizer: Any = _refuse
    backup: Any = _refuse
    blobopen: Any = _refuse


class GuardedCursor(sqlite3.Cursor):
    """A cursor that runs nothing once the transaction is lost.

    With OR FAIL or RAISE(FAIL), a statement keeps what it wrote before its error. If a
    trigger wrote that, total_changes does not show it.
    """

    connection: GuardedConnection

    def execute(self, *statement: Any) -> Any:
        self.connection.check_transaction()
        try:
            return sqlite3.Cursor.execute(self, *statement)
        except sqlite3.Error:
            self.connection.needs_savepoints = True
            raise

    def executemany(self, *statement: Any) -> Any:
        self.connection.check_transaction()
        try:
            return sqlite3.Cursor.executemany(self, *statement)
        except sqlite3.Error:
            self.connection.needs_savepoints = True
            raise


# What would end the transaction, or leave the file. SAVEPOINT is not among them: it is
# allowed, and the engine's own is protected by its name.
_CONTROL = (
    sqlite3.SQLITE_TRANSACTION, sqlite3.SQLITE_PRAGMA,
    sqlite3.SQLITE_ATTACH, sqlite3.SQLITE_DETACH,
)  # fmt: skip
# What only reads and writes rows. (A PRAGMA that writes is refused.)
_ROWS = (
    sqlite3.SQLITE_SELECT, sqlite3.SQLITE_INSERT, sqlite3.SQLITE_UPDATE,
    sqlite3.SQLITE_DELETE, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE,
    sqlite3.SQLITE_PRAGMA,
)  # fmt: skip
_OWN_NAMES = ("mizusync_", "sqlite_sequence")  # prefixes; the sequence holds the head
GUARD_NOTE = (
    "An application can't end the engine's transaction, set a PRAGMA, use ATTACH or "
    "executescript, create anything in TEMP, or change what is named mizusync_*. As "
    "sqlite_sequence holds the log's head, it can't rename a table, or drop one with "
    "AUTOINCREMENT."
)


# --- Database file --------------------------------------------------------------------
# How a file becomes a log, and how it is opened. A file that is not ours, or that may
# lose what is written, is refused with one sentence before anything is written into it.

FORMAT = 1  # of the tables below; a file with a higher one is refused
# "mizu" (https://sqlite.org/pragma.html#pragma_application_id)
APPLICATION_ID = 0x6D697A75

# The columns stand in the order of Row and Mark. If you raise FORMAT, teach
# prepare_database to bring an older file up to date.
#
#   changes    `first` is the cursor of the first change of the same mutation.
#   mutations  The dedupe marks.
#   trims      A scope's highest trimmed cursor; each trim takes the next number.
#   epochs     `start` is the head at which the epoch began. The first one names the
#              database, so it stays.
#
# The rows inserted here give every log a head (in sqlite_sequence) and an epoch. The
# engine numbers the changes itself, from the head. AUTOINCREMENT keeps the highest of
# these numbers in sqlite_sequence, also after a trim has removed its row.
LOG_SCHEMA = f"""
    CREATE TABLE mizusync_format (format INTEGER NOT NULL);
    INSERT INTO mizusync_format VALUES ({FORMAT});
    CREATE TABLE mizusync_changes (
        cursor INTEGER PRIMARY KEY AUTOINCREMENT, first INTEGER NOT NULL,
        scope TEXT NOT NULL, time TEXT NOT NULL, data TEXT NOT NULL);
    INSERT INTO sqlite_sequence VALUES ('mizusync_changes', 0);
    CREATE INDEX mizusync_changes_of_scope ON mizusync_changes (scope, cursor);
    CREATE TABLE mizusync_mutations (
        scope TEXT NOT NULL, id TEXT NOT NULL, first INTEGER, last INTEGER NOT NULL,
        PRIMARY KEY (scope, id)) WITHOUT ROWID;
    CREATE TABLE mizusync_trims (
        number INTEGER PRIMARY KEY, scope TEXT NOT NULL UNIQUE,
        cursor INTEGER NOT NULL);
    CREATE TABLE mizusync_epochs (
        number INTEGER PRIMARY KEY, epoch TEXT NOT NULL UNIQUE, start INTEGER NOT NULL);
    INSERT INTO mizusync_epochs VALUES (1, hex(randomblob(9)), 0);
"""

StrPath = str | os.PathLike[str]


def open_database(
    path: str,
    schema: str,
    adopt: bool,
    timeout: float,
    again: bool = False,
) -> GuardedConnection:
    """Return a connection that writes; create what is missing. See SQLiteStore."""
    try:
        check_leftover_wal(path, adopt)
        db = GuardedConnection(path, "rwc", timeout)
        try:
            prepare_database(db, schema, adopt, again)
        except BaseException:
            db.close()
            raise
    except (sqlite3.Error, StoreRefused, OSError) as error:
        cause = error.__cause__ or error
        advice = OPENING_ADVICE.get(primary_code(cause), "")
        raise StoreError(
            f"the database {path} can't be used ({cause}){advice}"
        ) from error
    return db


def prepare_database(
    db: GuardedConnection, schema: str, adopt: bool, again: bool
) -> None:
    """Make sure that the log and the application's tables exist.

    If this process opens the file `again`, the schema runs only up to its first write.
    So its pragmas are set, but no step of a migration runs a second time.
    """
    is_new = not has_log(db, adopt)
    set_pragmas(db)
    if is_new:
        db.retry(run_own, db, "BEGIN IMMEDIATE")
        if not has_log(db, adopt):  # otherwise another process has just created it
            if not adopt:  # an adopted file keeps the id of its application
                run_own(db, f"PRAGMA application_id = {APPLICATION_ID}")
            for statement in LOG_SCHEMA.split(";"):
                run_own(db, statement)
            db.has_created_log = True
        run_own(db, "COMMIT")
    with contextlib.suppress(StoreRefused):  # another process may hold the lock
        # This fails if SQLite has silently opened the file read-only.
        run_own(db, "DELETE FROM mizusync_format WHERE false")
    has_run = again and not is_new
    if has_run:
        run_own(db, "PRAGMA query_only = ON")
    try:
        # Each statement commits by itself, unless there are BEGIN and COMMIT.
        db.retry(db.executescript, schema)
        db.commit()  # the schema's transaction, if it has left one open
    except (sqlite3.Error, ValueError) as error:  # ValueError: a NUL, for example
        reason = str(error)
        if primary_code(error) == sqlite3.SQLITE_AUTH:
            reason = "TEMP tables, views and triggers could shadow the log's"
        sentence = f"the schema for {db.path} can't be run: {reason}"
        if not has_run:
            raise StoreError(sentence) from error
    run_own(db, "PRAGMA query_only = OFF")
    set_pragmas(db)  # whatever the schema has set: many begin with synchronous = NORMAL


def set_pragmas(db: GuardedConnection) -> None:
    """Let each commit wait for the disk, and each read go on beside a commit."""
    run_own(db, "PRAGMA synchronous = FULL")
    run_own(db, "PRAGMA fullfsync = ON")  # macOS: for the drive's own cache as well
    run_own(db, "PRAGMA busy_timeout = 0")  # retry() waits instead
    (mode,) = db.retry(run_own, db, "PRAGMA journal_mode = WAL")[0]
    if mode != "wal":
        raise StoreError(
            f"the file system of {db.path} allows no WAL: use a local disk"
        )


def wal_path(path: str) -> str:
    """Return the path of the WAL. It lies beside the target of a symbolic link."""
    return f"{os.path.realpath(path)}-wal"


# - against files of other programs


def has_log(db: GuardedConnection, adopt: bool) -> bool:
    """Return whether the log exists. Raise StoreError for an unfit file."""
    encoding = run_own(db, "PRAGMA encoding")[0][0]
    if encoding != "UTF-8":
        # In UTF-16, SQLite stores U+FFFE and U+FFFF as U+FFFD: scopes would merge.
        raise StoreError(
            f"the database {db.path} is in {encoding}: the log needs UTF-8"
        )
    # One statement, because another process may be making the log right now.
    sql = "SELECT count(*), max(name = 'mizusync_format') FROM sqlite_master"
    objects, log_exists = run_own(db, sql)[0]
    if log_exists:
        format = run_own(db, "SELECT format FROM mizusync_format")[0][0]
        if format > FORMAT:
            raise StoreError(
                f"the database {db.path} has format {format}: use a newer mizusync"
            )
        return True
    application_id = run_own(db, "PRAGMA application_id")[0][0]
    is_ours = not objects and application_id in (0, APPLICATION_ID)
    if not is_ours and not adopt:
        raise StoreError(
            f"the database {db.path} belongs to another program: "
            "name another file, or open it with adopt=True to add the log to it"
        )
    return False


def check_leftover_wal(path: str, adopt: bool) -> None:
    """Refuse a WAL without its database, or of another program.

    A crash leaves a WAL, and SQLite would merge it as soon as it opens the file.
    """
    wal = wal_path(path)
    if not os.path.exists(wal):
        return
    if not os.path.exists(path):
        raise StoreError(
            f"{wal} exists, but {path} does not: put the database back; "
            "or, to start over, remove its -wal and -shm as well"
        )
    with contextlib.closing(GuardedConnection(path, "ro")) as db:
        has_log(db, adopt)


# - against files that can't be opened, and paths at which no log can be kept

OPENING_ADVICE = {
    sqlite3.SQLITE_BUSY: ": another process holds its lock",
    sqlite3.SQLITE_CANTOPEN: ": its folder has to exist, and be writable",
    sqlite3.SQLITE_NOTADB: ": name another file",
    sqlite3.SQLITE_READONLY: ": the file, its -wal, -shm and folder must be writable",
}
MOUNTS = "/proc/self/mountinfo"  # on Linux alone


def check_path(path: StrPath) -> None:
    """Raise StoreError for a path at which no log can be kept."""
    if os.fspath(path) in ("", ":memory:"):
        raise StoreError("the log needs a file: name one")
    if is_mount_point(os.path.realpath(path)):
        # In a container, the -wal beside the file would stay outside of the mount.
        raise StoreError(
            f"only the file {path} is mounted here: mount the folder that it is in, "
            "or its newest changes are lost"
        )


def is_mount_point(path: str) -> bool:
    """Return whether a file is mounted by itself, if the system can tell.

    os.path.ismount compares devices, and misses a file of the same file system.
    """
    # The mount point is the fifth field, with four characters in octal (proc(5)).
    name = os.fsencode(path)
    for byte in b"\\ \t\n":  # the backslash first
        name = name.replace(b"%c" % byte, b"\\%03o" % byte)
    try:
        with open(MOUNTS, "rb") as mounts:
            return any(mount.split(b" ")[4] == name for mount in mounts)
    except OSError:
        return False


# - against a fault of older versions of SQLite


def has_wal_reset_bug(version: tuple[int, ...]) -> bool:
    """Return whether this SQLite may lose a commit if several processes write.

    One of them resets the WAL while another one writes
    (https://sqlite.org/wal.html#walresetbug).
    """
    if version[:2] == (3, 44):
        return version < (3, 44, 6)
    if version[:2] == (3, 50):
        return version < (3, 50, 7)
    return version < (3, 51, 3)


# --- SQLite ---------------------------------------------------------------------------
# The log in one file. It shares the file with the application's tables, so one
# transaction holds the dedupe mark, the application's writes and the changes: a crash
# leaves all of it or none. In WAL mode, readers go on while the writer commits. One
# connection writes, one only reads the position, and each concurrent read has its own.

MAX_WAL = 64 * MIB  # SQLite keeps the WAL near 4 MiB, unless reads overlap
PROBE_SIZE = MIB  # if the disk has less room, a mutation that failed may be too large
# Seconds between two checks of the WAL. On Linux 6.13 and newer, a stat of a file makes
# the next write update its timestamp exactly, and the sync has to write that as well:
# with a stat of the WAL at each commit, commits took 80 us longer. (_check_file stats
# the main file, which no commit writes.)
WAL_CHECK_INTERVAL = 1.0


class SQLiteStore(Store):
    """The log in a SQLite file, together with the application's own tables.

    `schema` is the application's (CREATE TABLE IF NOT EXISTS ...); it runs at each
    opening. `adopt` adds the log to a database that an application already has.
    `busy_timeout` (seconds) limits how long a commit waits for another process. Raise
    StoreError for a file that is not ours or can't be used, and leave it as it is; of a
    schema that fails, the statements before the mistake may have run.
    """

    def __init__(
        self,
        path: StrPath,
        schema: str = "",
        adopt: bool = False,
        busy_timeout: float = 5.0,
    ) -> None:
        check_path(path)
        self._path = os.path.abspath(path)
        self._timeout = busy_timeout
        self._open = functools.partial(
            open_database, self._path, schema, adopt, busy_timeout
        )
        db = self._open()
        # None after a rollback that failed: the next transaction opens it again.
        self._write_db: GuardedConnection | None = db
        self._stat = os.stat(self._path)
        self._closed = False
        self._position_db = GuardedConnection(self._path, "ro", busy_timeout)
        # Three positions follow each other:
        #   begin()   takes the write lock, under which _begun is the position. It reads
        #             that only after a rollback, or if another connection committed.
        #   latest()  reads _latest at any moment, without that lock. It moves _shown up
        #             to it, unless this log never issued _shown: then an older copy was
        #             restored. begin() calls it if _shown is not _begun.
        #   commit()  begins an epoch if they still differ. Then both are its position.
        self._position_lock = threading.Lock()  # from _closed down to _shown
        self._latest = NO_POSITION
        self._latest_version: int | None = None  # the data_version that belongs to it
        # The newest position that a client may know from here. (A page from the disk
        # may be ahead of it, for a watch_interval at most.)
        self._shown = self.read_position(db) if db.has_created_log else NO_POSITION
        # NO_POSITION says that begin() has to read it.
        self._begun = NO_POSITION
        self._write_version: int | None = None  # the writer's data_version
        self._idle: list[GuardedConnection] = []  # connections of readers
        self._read_barrier = threading.Lock()  # while it is held, no read begins
        self._wal_limit = MAX_WAL
        self._next_wal_check = 0.0
        self._warns_of_others = has_wal_reset_bug(sqlite3.sqlite_version_info)

    # -- reading

    def run(self, db: Any, sql: str, *parameters: Any) -> list[Any]:
        return run_own(db, sql, *parameters)

    def read_position(self, db: Any) -> Position:
        # The head comes from the sequence: a trim could lower max(cursor).
        sql = """
            SELECT (SELECT seq FROM sqlite_sequence WHERE name = 'mizusync_changes'),
                   (SELECT epoch FROM mizusync_epochs ORDER BY number DESC LIMIT 1),
                   (SELECT coalesce(max(number), 0) FROM mizusync_trims)
        """
        return Position(*run_own(db, sql)[0])

    def read_changes(
        self, db: Any, scope: str, after: int
    ) -> Generator[Row, None, None]:
        """Yield rows as SQLite finds them: a reader stops when its page is full."""
        sql = """
            SELECT * FROM mizusync_changes
            WHERE scope = ? AND cursor > ? ORDER BY cursor
        """
        rows = sqlite3.Connection.execute(db, OWN_STATEMENT + sql, (scope, after))
        yield from map(Row._make, rows)

    def read_full_page(
        self,
        db: Any,
        scope: str,
        after: int,
        limit: int,
        max_size: int,
    ) -> tuple[int, bytes] | None:
        """Let SQLite join the page. Row by row, this thread would wait for the GIL."""
        # The page ends before the first row of another mutation behind its last row.
        sql = """
            WITH page AS (
                SELECT cursor, length(CAST(data AS BLOB)) AS size
                FROM mizusync_changes
                WHERE scope = ? AND cursor > ? ORDER BY cursor LIMIT ?
            ), total AS (SELECT max(cursor) AS last, sum(size) AS size FROM page)
            SELECT size, (
                SELECT cursor FROM mizusync_changes
                WHERE scope = ? AND cursor > last AND first > last
                ORDER BY cursor LIMIT 1
            ) FROM total
        """
        rows = run_own(db, sql, scope, after, limit, scope)
        size, end = rows[0]
        if end is None or size > max_size:
            return None
        sql = """
            SELECT max(cursor),
                   CAST(group_concat(printf(?, cursor, ?, time, data)) AS BLOB)
            FROM (SELECT * FROM mizusync_changes
                  WHERE scope = ? AND cursor > ? AND cursor < ? ORDER BY cursor)
        """
        parameters = (CHANGE, encode_name(scope), scope, after, end)
        rows = run_own(db, sql, *parameters)
        last, changes = rows[0]
        return last, changes

    def latest(self) -> Position:
        """Return the position after the newest commit, whichever process made it."""
        with self._position_lock:
            if self._closed:
                raise StoreRefused("the database is closed")
            db = self._position_db
            # A commit of any other connection changes the version, which costs half as
            # much to read as the position
            # (https://sqlite.org/pragma.html#pragma_data_version).
            version = self.run_scalar(db, "PRAGMA data_version")
            if version != self._latest_version:
                self._latest = self.read_position(db)
                # Move _shown on, unless this log never issued it: an older copy was
                # restored. Then keep it, so that commit() begins an epoch.
                shown = self._shown
                if self.has_issued(db, self._latest, shown.epoch, shown.head):
                    self._shown = self._latest
                self._latest_version = version
            return self._latest

    def read(self, work: Callable[[Any], T]) -> T:
        """Return `work(db)`, run on a reading connection that sees one moment."""
        self._check_file()
        with self._read_barrier:
            pass  # wait while the WAL is being reset
        try:
            db = self._idle.pop()
        except IndexError:
            try:
                db = GuardedConnection(self._path, "ro", self._timeout)
            except sqlite3.Error as error:  # no descriptor is free, for example
                raise_if_refusal(error)
                raise
        try:
            result = db.run_guarded(work)
        except BaseException:
            db.close()  # its state is unknown
            raise
        self._idle.append(db)
        return result

    # -- writing

    def begin(self) -> tuple[Any, Position]:
        """Begin a transaction. Its position is read under the write lock."""
        self._check_file()
        if self._write_db is None:
            self._write_db = self._open(again=True)
            self._write_db.needs_savepoints = True  # as after any rollback
            self._write_version = None
        db = self._write_db
        db.retry(run_own, db, "BEGIN IMMEDIATE")
        self._notice_others(db)
        if self._begun == NO_POSITION:
            self._begun = self.read_position(db)
        if self._shown != self._begun:
            self.latest()  # moves _shown to _begun, unless this log never issued it
        return db, self._begun

    def run_guarded(self, work: Callable[[Any], T]) -> T:
        assert self._write_db is not None
        return self._write_db.run_guarded(work)

    def commit(self, rows: Sequence[Row], marks: Sequence[Mark]) -> Position:
        """Append to the log and commit. COMMIT returns when the disk has it all."""
        db = self._write_db
        assert db is not None
        # They differ only if this log never issued _shown: see begin().
        begins_epoch = self._shown != self._begun
        if begins_epoch:  # the first commit, or a backup was restored
            sql = """
                INSERT INTO mizusync_epochs (epoch, start)
                SELECT hex(randomblob(9)), seq FROM sqlite_sequence
                WHERE name = 'mizusync_changes'
            """
            run_own(db, sql)  # before the rows: it starts at the head of begin()
        insert_own(db, "mizusync_changes", rows)
        insert_own(db, "mizusync_mutations", marks)
        position = self.read_position(db)
        run_own(db, "COMMIT")
        with self._position_lock:
            # After a new epoch, what was shown before belongs to another history.
            # Otherwise _shown never moves back: another process may have committed
            # since, and latest() may have found that.
            if begins_epoch or position.head > self._shown.head:
                self._shown = position
        self._begun = position  # the next begin() finds it, unless another one commits
        self._limit_wal(db)
        return position

    def rollback(self) -> None:
        """End the transaction, if there is one. If that fails, close the connection."""
        self._begun = NO_POSITION
        db = self._write_db
        if db is None:
            return
        db.needs_savepoints = True  # what was in it may now run alone, and fail alone
        try:
            # Not rollback(): with `autocommit = False`, Python would begin anew.
            if db.in_transaction:
                run_own(db, "ROLLBACK")
        except (sqlite3.Error, StoreRefused):
            store_log.exception("a rollback failed: the next transaction reconnects")
            self._write_db = None
            with contextlib.suppress(sqlite3.Error):
                db.close()

    def probe(self, db: Any) -> None:
        """Write into the database, and PROBE_SIZE bytes into a file beside it.

        Where a large mutation finds no room, a small write of SQLite's still succeeds:
        in the WAL, it overwrites what was rolled back.
        """
        super().probe(db)
        folder = os.path.dirname(wal_path(self._path))
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                # Random bytes, because some file systems compress zeros.
                file.write(secrets.token_bytes(PROBE_SIZE))
        except OSError as error:
            raise StoreRefused("the disk is nearly full") from error

    def close(self) -> None:
        """Close every connection. The last one writes the WAL into the file."""
        with self._position_lock:
            for db in (*self._idle, self._position_db, self._write_db):
                if db is not None:
                    db.close()
            self._closed = True

    def stats(self) -> dict[str, int]:
        """Return the sizes of the file and of its WAL (bytes)."""
        sizes = {"database_bytes": 0, "wal_bytes": 0}
        with contextlib.suppress(OSError):  # the file may be gone
            sizes["database_bytes"] = os.path.getsize(self._path)
            sizes["wal_bytes"] = os.path.getsize(wal_path(self._path))
        return sizes

    # -- against a file that is gone

    def _check_file(self) -> None:
        """Raise StoreRefused if the file was removed or replaced.

        SQLite goes on writing into a file that no name leads to, and what it writes is
        lost when the last process closes it.
        """
        with contextlib.suppress(OSError):
            found = os.stat(self._path)
            if os.path.samestat(found, self._stat):
                return
        raise StoreRefused(f"{self._path} was removed or replaced: restart the server")

    # -- against a WAL that grows

    def _limit_wal(self, db: GuardedConnection) -> None:
        """Measure the WAL from time to time, and reset it if it is large.

        Reads that overlap without a gap would let it grow without bound
        (https://sqlite.org/wal.html#avoiding_excessively_large_wal_files). So block new
        reads, and pushes, until the current reads finish, but for a second at most. If
        a read takes longer, try again when the WAL has grown by another MAX_WAL.
        """
        now = time.monotonic()
        if now < self._next_wal_check:
            return
        self._next_wal_check = now + WAL_CHECK_INTERVAL
        with contextlib.suppress(OSError, sqlite3.Error, StoreRefused):
            if os.path.getsize(wal_path(self._path)) <= self._wal_limit:
                return
            self._wal_limit += MAX_WAL
            with self._read_barrier:
                try:
                    run_own(db, "PRAGMA busy_timeout = 1000")
                    is_busy = self.run_scalar(db, "PRAGMA wal_checkpoint(TRUNCATE)")
                finally:
                    run_own(db, "PRAGMA busy_timeout = 0")
            if not is_busy:
                self._wal_limit = MAX_WAL

    # -- against other processes

    def _notice_others(self, db: GuardedConnection) -> None:
        """Forget the position if another connection has committed.

        Warn once if other processes write, and that may lose a commit.
        """
        # A connection's own commits do not change the version that it reads.
        version = self.run_scalar(db, "PRAGMA data_version")
        if version == self._write_version:
            return
        self._begun = NO_POSITION
        if self._warns_of_others and self._write_version is not None:
            self._warns_of_others = False
            store_log.warning(
                "another process writes to %s, and SQLite %s may lose a commit then: "
                "use 3.51.3 or newer (https://sqlite.org/wal.html#walresetbug)",
                self._path,
                sqlite3.sqlite_version,
            )
        self._write_version = version


NO_POSITION = Position(0, "", 0)  # no log has issued it: no epoch has an empty name


# --- Tail -----------------------------------------------------------------------------
# A tail is a copy of the log's end for one scope, encoded, so that a pull is a join of
# bytes. It answers a pull if everything that is new to the client fits on one page.
# Memory is believed only while the store's latest position equals the position that
# memory was brought up to: other processes write to the same file, and backups are
# restored into it. Any other pull reads the database.


OVERHEAD = 200  # bytes of memory that a change takes besides its own


class Tail:
    """All changes of one scope above `after`, in order, as two parallel lists.

    Memory keeps one for each scope in use. Batch.added has another for each scope of a
    transaction (an empty one if its mutations make no changes there). After the commit,
    Tails appends the second to the first.
    """

    def __init__(self, after: int) -> None:
        self.after = after
        self.cursors: list[int] = []
        self.changes: list[bytes] = []  # encoded
        self.size = 0  # bytes of memory, about

    @property
    def current(self) -> int:
        """The newest cursor of the scope, even if all its changes were trimmed."""
        return self.cursors[-1] if self.cursors else self.after

    def add(self, row: Row) -> bytes:
        """Append one change, and return it encoded."""
        encoded = row.encode()
        self.cursors.append(row.cursor)
        self.changes.append(encoded)
        self.size += len(encoded) + OVERHEAD
        return encoded


class Tails:
    """The tails of the scopes in use, and the position up to which they are complete.

    `position` is the only record of where memory stands. It moves together with the
    tails, under one lock, which any thread may take for some microseconds.
    """

    def __init__(self, store: Store, settings: Settings) -> None:
        self.position = store.latest()
        self._store = store
        self._settings = settings
        self._lock = threading.Lock()
        self._tails = OrderedDict[str, Tail]()  # least recently used first
        self._size = 0

    def _believed(self, scope: str) -> Tail | None:
        """Return the scope's tail if nothing was committed since. The lock is held."""
        tail = self._tails.get(scope)
        if tail is None or self._store.latest() != self.position:
            return None
        return tail

    def current(self, scope: str) -> int | None:
        """Return the scope's newest cursor, or None if memory can't answer."""
        with self._lock:
            tail = self._believed(scope)
            return tail.current if tail else None

    def page(
        self,
        scope: str,
        cursor: int,
        limit: int,
        epoch: str,
    ) -> Page | None:
        """Return all changes above a cursor, or None if memory can't answer.

        It can't if they do not fit on one page (the last one may go past its size),
        because only the database knows where a mutation ends; nor for an older epoch,
        because only the database knows where that ended.
        """
        with self._lock:
            tail = self._believed(scope)
            position = self.position
            if tail is None or not tail.after <= cursor <= position.head:
                return None
            if epoch not in ("", position.epoch):
                return None
            self._tails.move_to_end(scope)
            changes = tail.changes[bisect.bisect_right(tail.cursors, cursor) :]
            max_size = self._settings.max_page_size
            may_be_large = tail.size > max_size  # most often not: no need to measure
            if may_be_large and sum(map(len, changes[:-1])) > max_size:
                return None
            if len(changes) > limit:
                return None
            return Page(changes, tail.current if changes else cursor, position.epoch)

    def load_page(
        self, db: Any, scope: str, cursor: int, limit: int, epoch: str
    ) -> Page:
        """Return a page from the database; remember it if it reaches the log's end.

        `db` is in a transaction, so that all of it is of one moment. Raise
        CursorUnknown, CursorTooOld.
        """
        # 1. Did this history issue the cursor, and does it have all that comes after?
        position = self._store.read_position(db)
        epoch = epoch or position.epoch  # without one, only the head is checked
        if not self._store.has_issued(db, position, epoch, cursor):
            raise CursorUnknown(
                f"this history never issued cursor {cursor}: take a snapshot"
            )
        if cursor < self._store.read_trimmed(db, scope):
            raise CursorTooOld(f"changes above {cursor} were trimmed: take a snapshot")
        # 2. Read until the page is full, and then to the end of a mutation.
        max_size = self._settings.max_page_size
        full_page = self._store.read_full_page(db, scope, cursor, limit, max_size)
        if full_page:
            last, changes = full_page
            return Page([changes], last, position.epoch, has_more=True)
        tail = Tail(cursor)
        first = 0  # the first cursor of the mutation that the last row belongs to
        for row in self._store.read_changes(db, scope, cursor):
            is_full = len(tail.cursors) >= limit or tail.size > max_size
            if is_full and row.first != first:
                return Page(tail.changes, tail.current, position.epoch, has_more=True)
            tail.add(row)
            first = row.first
        # 3. The page reached the end of the log, so memory can serve the next pull. If
        #    the page is empty, the scope's newest change is at the cursor or below it.
        #    Begin the tail at that change: it still misses none, and it serves clients
        #    at lower cursors as well.
        page = Page(tail.changes, tail.current, position.epoch)
        if not tail.cursors:
            tail.after = self._store.read_current(db, scope)
        with self._lock:
            # A commit may have overtaken this reader.
            if position == self.position and scope not in self._tails:
                self._put(scope, tail)
        return page

    def advance(
        self,
        position: Position,
        outdated: Iterable[str] | None,
        added: Mapping[str, Tail],
    ) -> None:
        """Move to a position: drop tails that are outdated, and append what is new.

        Outdated are the scopes that were trimmed, or that another process changed; None
        means all. The next pull that reads the database puts them back.
        """
        with self._lock:
            for scope in list(self._tails) if outdated is None else outdated:
                self._remove(scope)
            for scope, newer in added.items():
                self._put(scope, newer)
            self.position = position

    def _put(self, scope: str, newer: Tail) -> None:
        """Extend a tail, or begin one; it becomes the most recently used.

        A tail that exists ends where the newer one begins: memory was brought up to
        date under the write lock, before the newer one was collected.
        """
        tail = self._remove(scope) or Tail(newer.after)
        tail.cursors += newer.cursors
        tail.changes += newer.changes
        tail.size += newer.size
        # Cut seldom: only above twice the limit.
        excess = len(tail.cursors) - self._settings.max_tail_changes
        if excess > self._settings.max_tail_changes:
            tail.after = tail.cursors[excess - 1]
            tail.size -= sum(map(len, tail.changes[:excess]))
            tail.size -= excess * OVERHEAD
            del tail.cursors[:excess]
            del tail.changes[:excess]
        self._tails[scope] = tail
        self._size += tail.size
        # The least recently used go first. One without changes takes some 1,000 bytes.
        max_size = self._settings.max_tail_size
        while self._size + 1000 * len(self._tails) > max_size:
            self._remove(next(iter(self._tails)))

    def _remove(self, scope: str) -> Tail | None:
        """Forget a tail, if there is one, and return it."""
        tail = self._tails.pop(scope, None)
        if tail is not None:
            self._size -= tail.size
        return tail


# --- Listeners ------------------------------------------------------------------------
# The way back from the writer's thread. Each commit makes one hop to each event loop
# that waits for it; the hop carries the answers of that loop's pushes, and after them
# the calls to its listeners. (After a transaction that failed, the hints of its steps
# come before the answers.) A listener gets the hints of all scopes in the commit.

Hints = Mapping[str, Hint]  # by scope
Listener = Callable[[Hints], None]
Loop = asyncio.AbstractEventLoop
Call = Callable[[], None]
Calls = dict[Loop | None, list[Call]]  # by the loop to make them on; None: right here


class Listeners:
    """The functions to call after a commit.

    There is no lock: each operation on the dict is one step for other threads. And the
    garbage collector may close an abandoned pull at any moment, which calls remove().
    A commit goes through all of them: for a thousand pulls that wait, some 90 us.
    """

    def __init__(self) -> None:
        self._all: dict[object, tuple[str | None, Loop | None, Listener]] = {}

    def add(self, listener: Listener, scope: str | None) -> Callable[[], None]:
        """Register a listener on the running loop, if any; return what removes it.

        It listens to one scope; None is for all.
        """
        key = object()
        loop = None
        with contextlib.suppress(RuntimeError):
            loop = asyncio.get_running_loop()
        self._all[key] = (scope, loop, listener)

        def remove() -> None:
            self._all.pop(key, None)

        return remove

    def notify(self, hints: Hints, calls: Calls, ends_waits: bool = False) -> None:
        """Make calls (the answers of a commit), and then those to the listeners."""
        for scope, loop, listener in self._all.copy().values():
            if scope is None:
                is_concerned = bool(hints)
            else:
                is_concerned = ends_waits or scope in hints
            if is_concerned:
                call = functools.partial(listener, hints)
                calls.setdefault(loop, []).append(call)
        for loop, its_calls in calls.items():
            if loop is not None:
                with contextlib.suppress(RuntimeError):  # it is closed: nobody waits
                    loop.call_soon_threadsafe(make_calls, its_calls)
        # Last: whatever these do, the loops have their answers.
        make_calls(calls.get(None, []))

    def end_waits(self) -> None:
        """Call the listeners to single scopes without hints: their pulls end."""
        self.notify({}, {}, ends_waits=True)


def make_calls(calls: Iterable[Call]) -> None:
    """Make calls one after the other. One that fails does not stop the others."""
    for call in calls:
        try:
            call()
        except (Exception, SystemExit):  # this must not end the writer's thread
            engine_log.exception("a listener failed")


# --- Jobs -----------------------------------------------------------------------------
# What waits for the writer. A job is a push or a trim, and a future that its caller
# waits for. A step is the unit that can run again in a transaction of its own.


@dataclasses.dataclass(slots=True)
class Step:
    """One mutation of a push, or a trim."""

    run: Callable[..., Any]  # takes the transaction's Batch, and then the arguments
    arguments: tuple[Any, ...]
    name: object  # for the log
    # What `run` returned: a Result, or how many changes a trim removed. None if it has
    # not run, or if its transaction has failed.
    result: Any = None


@dataclasses.dataclass
class Job:
    """A push or a trim. Its future gets a list of the results of its steps."""

    steps: list[Step]
    future: asyncio.Future[Any] | Future[Any]
    loop: Loop | None = None  # the future's, if it belongs to one
    refusal: StoreRefused | None = None  # instead of results, if nothing was applied

    def answer(self) -> None:
        """Resolve the future, on the loop that it belongs to."""
        if self.future.done():
            pass  # the caller gave up
        elif self.refusal:
            self.future.set_exception(self.refusal)
        else:
            self.future.set_result([step.result for step in self.steps])
        # Each step refers to the list of its push. Break that cycle, or all that was
        # pushed stays in memory until the garbage collector runs.
        self.steps.clear()

    def refuse(self) -> None:
        """Refuse the steps that have no result.

        If a part of a push was applied, its other mutations are `unavailable`. If
        nothing was, it is refused as a whole.
        """
        # One exception for each job, because raising it changes its traceback.
        refusal = StoreRefused("the database can't write right now")
        left = [step for step in self.steps if step.result is None]
        results = [step.result for step in self.steps]
        # Only a mutation that was applied leaves a trace. (That of a trim is a number.)
        if any(isinstance(result, Result) and result.ok for result in results):
            for step in left:
                step.result = Result.refused(refusal)
        elif left:
            self.refusal = refusal


# --- Batch ----------------------------------------------------------------------------
# What one transaction will append, collected until the commit: rows with their cursors,
# the dedupe marks, and the same changes encoded, for memory and for the hints. A batch
# lives on the writer's thread, and is dropped if its transaction fails.

# Not an iterable of changes, although Python can iterate over them.
NOT_CHANGES = (str, bytes, dict, Change, sqlite3.Cursor)
LOOK_AHEAD = 100  # mutations of a push that are looked up at once
FAILED = "the server failed on this mutation"
Apply = Callable[[Any, Mutation], Iterable[Any] | None]


@dataclasses.dataclass(eq=False)
class Batch:
    """One transaction while it is made.

    Its rows and marks reach the database only at the commit, so a mutation that repeats
    one of the same batch is found here.
    """

    store: Store
    db: Any
    start: int  # the head of the log, which does not move before the commit
    _apply_function: Apply
    _settings: Settings

    def __post_init__(self) -> None:
        self.rows: list[Row] = []
        self.marks: list[Mark] = []
        self.look_ahead = LOOK_AHEAD
        # The mutations that were looked up, by scope and id. None: not applied so far.
        self._known: dict[tuple[str, str], Mark | None] = {}
        self.added: dict[str, Tail] = {}  # by scope: the new changes, encoded
        self.trimmed: set[str] = set()  # scopes that lose changes
        # Of each push with repeated mutations: how many results, and their size.
        self._sizes: dict[int, tuple[int, int]] = {}
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._time = now.replace("+00:00", "Z")

    def apply(
        self, mutation: Mutation, args: bytes, push: Sequence[Step], place: int
    ) -> Result:
        """Apply a mutation; repeat the first answer if it was applied before.

        `args` are its args, marshalled. `push` holds the steps of its push, and this
        one is `push[place]`. Raise StoreRefused if the whole transaction has failed.
        """
        key = (mutation.scope, mutation.id)
        if key not in self._known:
            self._look_up(mutation.scope, push[place : place + self.look_ahead])
        mark = self._known[key]
        if mark:
            return self._repeat(mark, push, place)
        # Each run gets a copy, because `apply` may change it.
        mutation = Mutation(  # dataclasses.replace would take 1 us more
            mutation.id,
            mutation.name,
            marshal.loads(args),
            mutation.scope,
            mutation.identity,
        )
        try:
            rows = self.store.run_guarded(lambda db: self._make_rows(db, mutation))
        except StoreRefused:  # first, because it is an Unavailable, too
            raise
        except APPLY_MAY_RAISE as refusal:
            return Result.refused(refusal)
        except BaseException:
            # SystemExit, too, is the application's error, and must not end this thread.
            engine_log.exception("apply failed on %s", mutation)
            return Result.refused(SyncError(FAILED))
        return self._add(key, rows)

    def _look_up(self, scope: str, steps: Sequence[Step]) -> None:
        """Learn which mutations of a scope were applied before.

        One statement for a hundred ids takes a tenth of the time of a hundred.
        """
        mutations = [step.arguments[0] for step in steps]  # see Engine._mutation_steps
        ids = [mutation.id for mutation in mutations if mutation.scope == scope]
        for id in ids:
            # Keep the mark if this batch has applied it.
            self._known.setdefault((scope, id), None)
        for mark in self.store.find_marks(self.db, scope, ids):
            self._known[scope, mark.id] = mark

    def _make_rows(self, db: Any, mutation: Mutation) -> list[Row]:
        """Call the application, and return the changes that it makes as numbered rows.

        They are not in the batch yet. `db` is for the application. Raise TypeError or
        ValueError for what is no change, and InvalidMutation for too many changes.
        """
        scope = mutation.scope  # `apply` may change the mutation
        made = self._apply_function(db, mutation)
        if isinstance(made, NOT_CHANGES):
            raise TypeError("apply returns an iterable of changes, such as a list")
        limit = self._settings.max_mutation_changes
        first = self.start + len(self.rows) + 1
        rows: list[Row] = []
        try:
            for cursor, change in enumerate(() if made is None else made, first):
                if len(rows) == limit:
                    raise InvalidMutation(f"the mutation makes over {limit} changes")
                # Encode it before the next one is made: a generator may change one
                # object again and again.
                row_scope, text = encode_data(change, scope)
                rows.append(Row(cursor, first, row_scope, self._time, text))
        finally:
            # End a generator that is not exhausted, while its cleanup can still be
            # undone. `del` ends one inside a map, which has no close().
            close = getattr(made, "close", None)
            if close:
                close()
            del made
        return rows

    def _add(
        self,
        key: tuple[str, str],
        rows: Sequence[Row],
    ) -> Result:
        """Append the changes of a mutation, and mark it as applied."""
        scope, id = key
        shown = []
        for row in rows:
            encoded = self._tail(row.scope).add(row)
            if row.scope == scope:
                shown.append(encoded)
        self.rows += rows
        first = rows[0].cursor if rows else None
        last = rows[-1].cursor if rows else self._tail(scope).current
        mark = Mark(scope, id, first, last)
        self.marks.append(mark)
        self._known[key] = mark
        return Result.applied(last, shown)

    def _tail(self, scope: str) -> Tail:
        """Return the tail that collects what the transaction adds to a scope."""
        if scope not in self.added:
            self.added[scope] = Tail(self.store.read_current(self.db, scope))
        return self.added[scope]

    def hints(self, epoch: str) -> Hints:
        """Return a hint for each scope that this transaction changes."""
        return {
            scope: Hint(tail.current, epoch, tail.after, tuple(tail.changes))
            for scope, tail in self.added.items()
            if tail.changes
        }

    # -- against answers that were lost: the client sends the mutation again

    def _repeat(self, mark: Mark, push: Sequence[Step], place: int) -> Result:
        """Return the result that a mutation got when it was applied.

        Its changes in its own scope come with it, unless some of its changes, in any
        scope, were trimmed. A small request can ask again for a hundred large
        mutations, so the changes are left out once the answer is as large as a page.
        """
        shown = None
        if self._answer_size(push, place) <= self._settings.max_page_size:
            first = mark.first or mark.last + 1  # without changes, the range is empty
            if first > self.start:  # rows[0] of this batch is number start + 1
                end = mark.last - self.start
                rows = self.rows[first - self.start - 1 : end]
            else:
                rows = self.store.read_range(self.db, first, mark.last)
            if len(rows) == mark.last - first + 1:
                shown = [row.encode() for row in rows if row.scope == mark.scope]
        return Result.applied(mark.last, shown, duplicate=True)

    def _answer_size(self, push: Sequence[Step], place: int) -> int:
        """Return the size of a push's results before `place`.

        Add only what is new since the last call: an import may push 100,000 mutations
        at once, and push them again.
        """
        key = id(push)
        counted, size = self._sizes.get(key, (0, 0))
        for step in push[counted:place]:
            size += len(step.result.encoded)
        self._sizes[key] = place, size
        return size


def encode_data(change: Any, scope: str) -> tuple[str, str]:
    """Return the scope of a change that `apply` made, and its data as JSON text.

    `scope` is the mutation's. Raise TypeError or ValueError for what is no change.
    """
    data = change
    if isinstance(change, Change):
        data = change.data
        if change.scope is not None:
            scope = change.scope
        if not is_name(scope, MAX_SCOPE):
            raise ValueError(f"a change is for {scope!r}, which is no scope")
    text = data.text if isinstance(data, Json) else encode_json(data)
    text.encode()  # a lone surrogate fails here, where it can be undone
    return scope, text


# --- Retention ------------------------------------------------------------------------
# Trims remove the oldest changes of a scope, whole mutations, and only so many in each
# transaction that no push waits long behind them. A client that is behind a trim
# continues from a snapshot. With `keep_changes` each transaction trims some of the
# scopes that it adds to. There is no list of scopes: one that grows is found again.

TRIM_STEP = 200  # changes that one step of a trim removes
MAX_TRIM_PERIOD = 5000  # changes between two trims by apply_retention


def trim_scope(batch: Batch, scope: str, before: int, limit: int = TRIM_STEP) -> int:
    """Remove about `limit` of the oldest changes below a cursor; return how many."""
    removed = batch.store.trim(batch.db, scope, before, limit)
    if removed:
        batch.trimmed.add(scope)
    return removed


def apply_retention(batch: Batch, keep: int) -> None:
    """Trim scopes that a batch adds to down to their newest `keep` changes, about."""
    # To find where a trim would end takes `keep` steps, so not every commit does it. A
    # commit with n new changes trims their scope with a probability of n / period. So
    # between two trims a scope grows by a period, on average.
    period = min(keep // 10, MAX_TRIM_PERIOD)
    for scope, tail in batch.added.items():
        added = len(tail.changes)
        if random.random() * period < added:
            before = batch.store.read_nth_newest(batch.db, scope, keep)
            # Remove more than is added meanwhile, or the log would grow without end.
            limit = max(TRIM_STEP, 2 * period, 2 * added)
            trim_scope(batch, scope, before, limit)


# --- Writer ---------------------------------------------------------------------------
# One thread owns the connection that writes. It takes one job after the other and, for
# up to max_commit_time, commits them as one transaction (group commit): one fsync
# serves them all. The disk needs as long for a hundred pushes as for one. A mutation
# that fails leaves no trace (see Guard). Memory follows the commit, and then answers
# and hints.
#
# There is one rule for a transaction that fails: each of its steps runs again, in a
# transaction of its own. If a step succeeds alone, another one had made the transaction
# fail. If it fails again, the engine probes the disk with a write of its own. If the
# probe works, the step is at fault (internal_error). If it fails too, the disk is at
# fault (unavailable), and the steps that are left are refused without being tried.

COUNTERS = (
    "pushes", "pushes_failed", "applied", "invalid_mutation", "not_found", "conflict",
    "forbidden", "unavailable", "internal_error", "commits", "pulls_from_memory",
    "pulls_from_disk",
)  # fmt: skip


@dataclasses.dataclass(eq=False)
class Writer:
    """The thread that writes.

    Any thread may call the methods of the first part; the others run on this thread.
    """

    _store: Store
    _apply: Apply
    _tails: Tails
    _listeners: Listeners
    _settings: Settings
    # True while there is work: the server then yields the GIL once per request.
    busy: bool = False
    closed: bool = False
    rewinds: int = 0  # restored backups that it has noticed

    def __post_init__(self) -> None:
        self.counts = Counter(dict.fromkeys(COUNTERS, 0))
        # In the order of arrival: nothing overtakes in here. A None only wakes it up.
        self._waiting = queue.SimpleQueue[Job | None]()
        # Over `closed`: no job follows the last one. Reentrant, because the garbage
        # collector may run code that pushes on a thread that holds the lock.
        self._lock = threading.RLock()
        self._thread = threading.Thread(
            target=self._work, name="mizusync-writer", daemon=True
        )
        self._thread.start()

    # -- for any thread

    @property
    def waiting(self) -> int:
        """The number of jobs that wait."""
        return self._waiting.qsize()

    def submit(self, job: Job) -> None:
        """Queue a job. Raise Unavailable if too many wait, or after close()."""
        with self._lock:
            if self.closed:
                raise Unavailable("the engine is closed")
            if self.waiting >= self._settings.max_pending_pushes:
                raise Unavailable("too many pushes are waiting")
            self.busy = True
            self._waiting.put(job)

    def wake(self) -> None:
        """Check now for commits of other processes. This never blocks."""
        if not self.waiting:  # otherwise the writer is at work
            self._waiting.put(None)

    def close(self, timeout: float | None) -> bool:
        """Finish the jobs that wait, and end the thread; return whether it ended."""
        with self._lock:
            self.closed = True
        self.wake()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    # -- many jobs, one transaction

    def _work(self) -> None:
        """Commit jobs until the writer is closed. No error ends this thread."""
        # Read `closed` first: once it is true, no job arrives after the check.
        while not self.closed or self.waiting:
            # _arriving and _refuse add to this list.
            jobs = self._take(self._settings.watch_interval)
            try:
                if jobs:
                    hints = self._commit_steps(self._arriving(jobs))
                    # Never sooner: an answer says that the data is on disk, and a
                    # client that gets a hint finds the change.
                    self._answer(jobs, hints)
                else:
                    self._watch()
            except BaseException as error:
                self._refuse(jobs, error)
            self.busy = self.waiting > 0

    def _take(self, timeout: float) -> list[Job]:
        """Return the next job in a list, which is empty after the timeout or wake()."""
        try:
            job = self._waiting.get(timeout=timeout)
        except queue.Empty:
            return []
        return [job] if job else []

    def _arriving(self, jobs: list[Job]) -> Iterator[Step]:
        """Yield the steps of jobs, and for a while of those that arrive meanwhile.

        Add these to `jobs`, so that the caller answers them as well.
        """
        deadline = time.monotonic() + self._settings.max_commit_time
        for job in jobs:
            yield from job.steps
            if time.monotonic() < deadline:
                # This may also take the None of wake() off the queue. That is no loss:
                # the transaction began with a look at what other processes did, and
                # none of them can commit while it has the lock.
                jobs += self._take(0)

    def _commit_steps(self, steps: Iterator[Step]) -> Hints:
        """Run steps in one transaction, and commit it; return its hints.

        If it fails, run each of them alone, and return no hints: _run_alone has sent
        them. Raise StoreRefused if the disk refuses, or if no transaction can begin.
        The steps that are on disk have a result then, and the others have none.
        """
        batch = self._begin()  # an error here goes to _refuse(): no step has begun
        begun = []
        try:
            for step in steps:
                begun.append(step)
                step.result = step.run(batch, *step.arguments)
            return self._commit(batch)
        except BaseException as error:
            self._store.rollback()
            if not isinstance(error, StoreRefused):
                engine_log.exception("a transaction failed: its steps run alone")
        for step in begun:
            step.result = None  # it is not on disk
        # Those that had not begun follow, in the order of arrival.
        for step in itertools.chain(begun, steps):
            self._run_alone(step)
        return {}

    def _run_alone(self, step: Step) -> None:
        """Run a step in a transaction of its own, and notify of its commit.

        If it fails, its result is internal_error. Raise StoreRefused if the disk is at
        fault: then a write of the engine's own fails as well.
        """
        batch = self._begin()
        batch.look_ahead = 1  # a look-up that fails can only fail this mutation
        try:
            step.result = step.run(batch, *step.arguments)
            hints = self._commit(batch)
        except BaseException:
            step.result = None
            self._store.rollback()
            probe = self._begin()
            self._store.probe(probe.db)
            self._commit(probe)
            engine_log.exception("the transaction failed on %s", step.name)
            step.result = Result.refused(SyncError(FAILED))
        else:
            self._listeners.notify(hints, {})

    def _begin(self) -> Batch:
        """Begin a transaction, and bring memory up to date with other processes."""
        db, position = self._store.begin()
        if position != self._tails.position:
            self._catch_up(db)
        return Batch(self._store, db, position.head, self._apply, self._settings)

    def _commit(self, batch: Batch) -> Hints:
        """Put a transaction on disk, and then into memory; return its hints."""
        if self._settings.keep_changes:
            apply_retention(batch, self._settings.keep_changes)
        position = self._store.commit(batch.rows, batch.marks)
        self._tails.advance(position, batch.trimmed, batch.added)
        self.counts["commits"] += 1
        return batch.hints(position.epoch)

    def _answer(self, jobs: list[Job], hints: Hints) -> None:
        """Answer jobs, and notify of a commit."""
        calls: Calls = {}
        for job in jobs:
            calls.setdefault(job.loop, []).append(job.answer)
            self.counts["pushes_failed" if job.refusal else "pushes"] += 1
            for step in job.steps:
                if isinstance(step.result, Result):
                    self.counts[step.result.code or "applied"] += 1
        self._listeners.notify(hints, calls)

    # -- against a database that refuses

    def _refuse(self, jobs: list[Job], error: BaseException) -> None:
        """Refuse what is left of these jobs, and all that wait.

        If the database refuses, each of them would wait as long again: to refuse 20
        pushes would take 4 s, and not 0.2 s. Any other error is a bug; it must not end
        the thread either.
        """
        self._store.rollback()
        for _ in range(self.waiting if jobs else 0):  # _watch() refuses no job
            jobs += self._take(0)
        is_refusal = isinstance(error, StoreRefused)
        if jobs or not is_refusal:
            reason = error.__cause__ or error
            store_log.error("pushes failed: %r", reason, exc_info=not is_refusal)
        for job in jobs:
            job.refuse()
        self._answer(jobs, {})

    # -- against commits of other processes, and restored backups

    def _watch(self) -> None:
        """Check, while nothing waits, whether another process has committed."""
        if self._store.latest() != self._tails.position:
            self._store.read(self._catch_up)

    def _catch_up(self, db: Any) -> None:
        """Forget what memory has of scopes that others changed, and notify of them."""
        known = self._tails.position
        position = self._store.read_position(db)
        changed = self._store.read_scopes_since(db, known)
        # If the log has not issued what memory knows, another copy was restored, even
        # if it has grown past that since.
        is_rewound = not self._store.has_issued(db, position, known.epoch, known.head)
        self._tails.advance(position, None if is_rewound else changed, {})
        hints = {
            scope: Hint(cursor, position.epoch)
            for scope, cursor in changed.items()
            if cursor > known.head  # otherwise it was only trimmed
        }
        self._listeners.notify(hints, {})
        if is_rewound:
            self.rewinds += 1
            self._listeners.end_waits()  # those clients find out now


# --- Engine ---------------------------------------------------------------------------
# The truth, without a network: push, pull, snapshot. Writes go through the writer's
# thread; reads come from memory, or from the database on a reader's thread. The event
# loop itself only asks for the position, which takes some microseconds.

Mutations = Iterable[Mutation | Mapping[str, Any]]


class Engine:
    """The log and an application's `apply` function: a sync server without a network.

    `store` is the path of a SQLite file, or a Store. `schema` and `adopt` are those of
    SQLiteStore. Raise StoreError if the file can't be used.

    `apply(db, mutation)` runs on the writer's thread, inside the transaction, and
    returns an iterable of changes: JSON values, or `Change`s. It refuses by raising an
    error of APPLY_MAY_RAISE. It may run more than once for a mutation, because another
    one can make the transaction fail: what it does outside `db` may then happen twice.
    It must not wait for a push of its own: the writer would wait for itself.

    `snapshot(db, scope)` runs on a reader's thread, and returns the whole state of the
    scope: a JSON value, or `Json(text)`.

    The coroutines run on any loop; any thread may call the other methods. After a fork
    only the parent may use an engine: in the child, what reads or writes the database
    raises RuntimeError.
    """

    def __init__(
        self,
        store: StrPath | Store,
        *,
        apply: Apply,
        snapshot: Callable[[Any, str], Any] | None = None,
        schema: str = "",
        adopt: bool = False,
        settings: Settings | None = None,
    ) -> None:
        self.settings = settings or Settings()
        if snapshot is None and self.settings.keep_changes is not None:
            raise ValueError("keep_changes needs a snapshot function, for late clients")
        if isinstance(store, (str, os.PathLike)):
            store = SQLiteStore(store, schema, adopt, self.settings.busy_timeout)
        self.store: Store = store
        self._snapshot_function = snapshot
        self._process = os.getpid()
        self._tails = Tails(store, self.settings)
        self._listeners = Listeners()
        self._readers = ThreadPoolExecutor(self.settings.readers, "mizusync-reader")
        self._writer = Writer(store, apply, self._tails, self._listeners, self.settings)
        self.counts = self._writer.counts

    # -- push

    async def push(self, mutations: Mutations) -> list[Result]:
        """Apply mutations, in order; return a result for each. Each fails alone.

        Those that are ok are on disk. If the store refuses after a part was applied,
        the rest is `unavailable`; if it refuses the whole push, raise Unavailable.
        Raise InvalidMutation for a value that is no mutation, and ValueError for args
        that are not made of JSON values.
        """
        return await self._run_steps(self._mutation_steps(mutations))

    def submit(self, mutations: Mutations) -> Future[list[Result]]:
        """Push from a thread that has no loop: `engine.submit(mutations).result()`."""
        self._check_process()
        future = Future[list[Result]]()
        future.set_running_or_notify_cancel()  # from here on it can't be cancelled
        self._writer.submit(Job(self._mutation_steps(mutations), future))
        return future

    def _mutation_steps(self, values: Mutations) -> list[Step]:
        """Return a step for each mutation, with a copy of its args."""
        steps: list[Step] = []
        for place, value in enumerate(values):
            mutation = value if isinstance(value, Mutation) else Mutation.parse(value)
            args = marshal.dumps(mutation.args)  # five times as fast as deepcopy
            steps.append(Step(Batch.apply, (mutation, args, steps, place), mutation))
        return steps

    async def _run_steps(self, steps: list[Step]) -> list[Any]:
        """Queue a job for the writer, and wait for the results of its steps."""
        self._check_process()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[list[Any]] = loop.create_future()
        self._writer.submit(Job(steps, future, loop))
        return await future

    @property
    def committing(self) -> bool:
        """True while the writer is at work, and needs the GIL now and then."""
        return self._writer.busy

    # -- pull

    async def pull(
        self,
        scope: str = DEFAULT_SCOPE,
        cursor: int = 0,
        *,
        epoch: str = "",
        limit: int | None = None,
        wait: float = 0.0,
    ) -> Page:
        """Return the scope's changes above `cursor`, in order.

        A page holds about `limit` of them (1 or more), or about `max_page_size` bytes;
        it never ends inside a mutation. `wait` (seconds) holds an empty page back until
        there is a change. `epoch` is the one in which the client read the cursor, if it
        knows. Raise CursorTooOld, CursorUnknown, Unavailable.
        """
        limit = min(limit or self.settings.pull_limit, self.settings.max_pull_limit)
        read_page = functools.partial(self._read_page, scope, cursor, epoch, limit)
        if wait <= 0:
            return await read_page()
        changed = asyncio.Event()

        def on_commit(hints: Hints) -> None:
            # No hints mean that every wait ends, as when the engine closes. A hint of
            # another process's commit may come after the page that has its changes.
            if not hints or hints[scope].cursor > cursor:
                changed.set()

        # Listen first, then read: no commit can fall between the two.
        remove_listener = self.add_listener(on_commit, scope)
        try:
            if self._writer.closed:  # nothing would end the wait
                raise Unavailable("the engine is closed")
            page = await read_page()
            if page.encoded_changes:
                return page
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(wait, self.settings.max_pull_wait)):
                    await changed.wait()
            return await read_page()
        finally:
            remove_listener()

    async def _read_page(self, scope: str, cursor: int, epoch: str, limit: int) -> Page:
        """Return a page from memory if it is up to date, else from the database."""
        self._check_process()
        page = self._tails.page(scope, cursor, limit, epoch)
        if page is not None:
            self.counts["pulls_from_memory"] += 1
            return page
        self.counts["pulls_from_disk"] += 1
        return await self.read(
            lambda db: self._tails.load_page(db, scope, cursor, limit, epoch)
        )

    async def follow(
        self, scope: str = DEFAULT_SCOPE, cursor: int = 0
    ) -> AsyncIterator[Change]:
        """Yield every change of the scope above `cursor`, then each new one."""
        page = Page((), cursor, "")
        while True:
            page = await self.pull(scope, page.cursor, epoch=page.epoch, wait=math.inf)
            for change in page.changes:
                yield change
            if not page.encoded_changes:
                await asyncio.sleep(0.05)  # if max_pull_wait is 0, others have a turn

    # -- snapshots and other reads

    async def snapshot(self, scope: str = DEFAULT_SCOPE) -> Snapshot:
        """Return the scope's whole state, and its cursor at the same moment.

        Raise NotFound if the application has no snapshot function, and what that
        raises.
        """
        take = self._snapshot_function
        if take is None:
            raise NotFound("this application has no snapshots: pull from cursor 0")

        def read(db: Any) -> Snapshot:
            cursor = self.store.read_current(db, scope)
            epoch = self.store.read_position(db).epoch
            database = self.store.read_database(db)
            data = take(db, scope)
            text = data.text if isinstance(data, Json) else encode_json(data)
            return Snapshot(text, cursor, epoch, database)

        return await self.read(read)

    async def current(self, scope: str = DEFAULT_SCOPE) -> int:
        """Return the cursor of the scope's newest change, or 0. No trim lowers it."""
        self._check_process()
        current = self._tails.current(scope)
        if current is not None:
            return current
        return await self.read(lambda db: self.store.read_current(db, scope))

    async def position(self) -> Position:
        """Return the position of the log. Raise Unavailable."""
        return await self.read(self.store.read_position)

    async def read(self, work: Callable[[Any], T]) -> T:
        """Return `work(db)`, run on a reader's thread; it sees one moment.

        Raise Unavailable, and what `work` raises.
        """
        self._check_process()

        def read() -> T:
            try:
                return self.store.read(work)
            except BaseException as error:
                # A future can't hold StopIteration; KeyboardInterrupt ends the loop.
                if isinstance(error, StopIteration) or not isinstance(error, Exception):
                    raise RuntimeError(f"a read ended with {error!r}") from error
                raise

        try:
            return await asyncio.get_running_loop().run_in_executor(self._readers, read)
        except RuntimeError:  # the executor raises it, too, after close()
            if self._writer.closed:
                raise Unavailable("the engine is closed") from None
            raise

    def stats(self) -> dict[str, int]:
        """Return numbers for an operator: of the present, and since the start."""
        return {
            "cursor": self._tails.position.head,
            "pushes_waiting": self._writer.waiting,
            **self.store.stats(),
            **self.counts,
        }

    # -- listeners, trims, the end

    def add_listener(
        self, callback: Listener, scope: str | None = None
    ) -> Callable[[], None]:
        """Call `callback(hints)` after each commit that changes `scope`, or any scope.

        It is called on the running loop; without one, on the writer's thread, and has
        to be quick. Return a function that removes it.
        """
        return self._listeners.add(callback, scope)

    def end_waits(self) -> None:
        """End every pull that waits, now."""
        self._listeners.end_waits()

    def catch_up(self) -> None:
        """Check now for commits of other processes, for a store that is told of them.

        Otherwise the writer checks each `watch_interval`. This never blocks.
        """
        self._writer.wake()

    @property
    def rewinds(self) -> int:
        """The number of times that an older copy was restored under this engine."""
        return self._writer.rewinds

    async def trim(self, scope: str, before: int) -> int:
        """Remove the scope's changes below `before`, whole mutations; return how many.

        A client that is behind gets CursorTooOld and takes a snapshot. Raise NotFound
        if the application has no snapshot function. Raise Unavailable.
        """
        if self._snapshot_function is None:
            raise NotFound("without a snapshot function the log is never trimmed")
        # Changes that come meanwhile stay, or steady pushes would keep this going.
        end = min(before, (await self.position()).head + 1)
        total = 0
        while True:
            step = Step(trim_scope, (scope, end), f"a trim of {scope!r}")
            (removed,) = await self._run_steps([step])
            if isinstance(removed, Result):  # of a step that failed
                raise SyncError("the server failed on this trim")
            if not removed:
                return total
            total += removed

    def close(self, timeout: float | None = None) -> None:
        """Finish what waits, write the WAL back into the file, end the threads. Blocks.

        After `timeout` seconds, a writer that still waits for another process's lock,
        or for `apply`, is left to the end of the process. Reads are waited for.
        """
        self._check_process()
        in_time = self._writer.close(timeout)
        self._listeners.end_waits()
        if not in_time:
            engine_log.error("the writer did not end in time")
            return
        self._readers.shutdown()
        self.store.close()

    def _check_process(self) -> None:
        """Raise RuntimeError in a forked child, which has no writer's thread.

        This comes before any lock: a thread of the parent may have held it at the fork.
        """
        if os.getpid() != self._process:
            raise RuntimeError(
                "this process was forked: open the engine after the fork"
            )


# --- Hub ------------------------------------------------------------------------------
# The accelerator: topics and their subscribers. The hub knows names, numbers and bytes,
# and stores nothing: a lost hint does no harm, because the next one names a newer
# cursor, the newest is sent again after a silence, and a client pulls after each
# reconnect. Hints of a topic merge while they wait, and its broadcasts are paced, so a
# burst of pushes costs each subscriber few frames and the event loop a bounded share of
# its time.

BROADCAST_BATCH = 500  # subscribers between two turns of the event loop: some 5 ms
BURST = 0.005  # seconds of loop time that a topic may use after a quiet while
SHARE = 1 / 16  # of the loop's time; most is left for the pulls that hints cause
SHARE_WITH_CHANGES = 1 / 4  # these hints carry their changes, so no pulls follow


class Subscriber(Protocol):
    """One receiver of topics: a Session, or the socket of another framework."""

    def hint(self, topic: str, cursor: int, message: bytes) -> None:
        """Send a hint. A slow subscriber may skip all but the newest of each topic."""

    def message(self, message: bytes) -> None:
        """Send a message of the application's, which may not be skipped."""


@dataclasses.dataclass(slots=True)
class Topic:
    """The subscribers of a topic, and the hints that they are about to get."""

    last_sent: float
    # Each with whether it wants the changes in its hints.
    subscribers: dict[Subscriber, bool] = dataclasses.field(default_factory=dict)
    cursor: int | None = None  # the newest that was sent; it never goes down
    pending: Hint | None = None
    broadcaster: asyncio.Task[None] | None = None  # runs while a hint is pending
    budget_full_at: float = 0.0  # see spend()

    @property
    def wants_changes(self) -> bool:
        """True if some subscriber wants the changes in its hints."""
        return any(self.subscribers.values())

    def spend(
        self, used: float, now: float, share: float, longest_pause: float
    ) -> float:
        """Pay for a broadcast; return for how long to pause before the next one.

        The budget is a token bucket. It holds BURST seconds of loop time, and fills
        with `share` seconds in each second. So one number describes it: the time when
        it is full again. A broadcast may leave a debt, and the pause earns that back.
        """
        full_at = max(self.budget_full_at, now) + used / share
        # Without this limit, one slow broadcast would silence the topic for a second.
        cap = now + BURST / share + longest_pause
        self.budget_full_at = min(full_at, cap)
        return max(0.0, self.budget_full_at - BURST / share - now)


class Hub:
    """The topics of one event loop.

    `encode` turns the JSON of a message into what the transport sends; it runs once for
    all subscribers.
    """

    def __init__(self, settings: Settings, encode: Callable[[bytes], bytes]) -> None:
        self.settings = settings
        self.encode = encode
        self.topics: dict[str, Topic] = {}
        self.counts = Counter(hints_sent=0, hints_merged=0)

    def subscribe(
        self, name: str, subscriber: Subscriber, changes: bool = False
    ) -> None:
        """Add a subscriber. With `changes`, its hints carry the changes if they fit."""
        topic = self.topics.setdefault(name, Topic(time.monotonic()))
        topic.subscribers[subscriber] = changes

    def unsubscribe(self, name: str, subscriber: Subscriber) -> None:
        """Remove a subscriber; a topic without subscribers is forgotten."""
        topic = self.topics.get(name)
        if topic is None:
            return
        topic.subscribers.pop(subscriber, None)
        if not topic.subscribers:
            del self.topics[name]
            if topic.broadcaster is not None:
                topic.broadcaster.cancel()

    def publish(self, name: str, data: bytes) -> None:
        """Send JSON to every subscriber of a topic; none is merged or skipped."""
        topic = self.topics.get(name)
        if topic is None:
            return
        message = self.encode(encode_message(name, data))
        for subscriber in list(topic.subscribers):
            try:
                subscriber.message(message)
            except Exception:
                live_log.exception("a subscriber of %r failed", name)

    def notify(self, hints: Mapping[str, Hint]) -> None:
        """Pass on the hints of a commit: `engine.add_listener(hub.notify)`."""
        for scope, hint in hints.items():
            self.hint(f"{SYNC}{scope}", hint)

    def hint(self, name: str, hint: Hint) -> None:
        """Send a newer cursor to the topic's subscribers, soon, on the running loop."""
        topic = self.topics.get(name)
        if topic is None:
            return
        if topic.pending is not None:
            self.counts["hints_merged"] += 1
            hint = merge_hints(topic.pending, hint)
        is_long = len(hint.changes) > self.settings.max_hint_changes
        size = sum(map(len, hint.changes))
        if is_long or size > self.settings.max_hint_size:
            hint = hint._replace(changes=())
        topic.pending = hint
        if topic.broadcaster is None or topic.broadcaster.done():
            # A task, so that the push that caused the hint is answered first.
            work = self._broadcast_pending(name, topic)
            topic.broadcaster = asyncio.get_running_loop().create_task(work)

    async def _broadcast_pending(self, name: str, topic: Topic) -> None:
        """Send the pending hint, pause, and repeat until no hint is pending."""
        while topic.pending:
            hint = topic.pending
            topic.pending = None
            used = await self._broadcast(name, topic, hint)
            share = SHARE_WITH_CHANGES if topic.wants_changes else SHARE
            now = time.monotonic()
            pause = topic.spend(used, now, share, self.settings.hint_gap)
            if pause:
                await asyncio.sleep(pause)

    async def _broadcast(self, name: str, topic: Topic, hint: Hint) -> float:
        """Send a hint to each subscriber; return the seconds of loop time it took."""
        topic.last_sent = time.monotonic()
        cursor = topic.cursor = max(hint.cursor, topic.cursor or 0)
        short = self.encode(encode_message(name, encode_cursor(cursor)))
        long = short
        is_newest = hint.cursor == cursor  # older changes would leave a gap
        if hint.changes and is_newest and topic.wants_changes:
            long = self.encode(encode_message(name, hint.encode()))
        subscribers = list(topic.subscribers.items())
        used = 0.0
        for start in range(0, len(subscribers), BROADCAST_BATCH):
            if start:
                await asyncio.sleep(0)
            began = time.monotonic()
            for subscriber, changes in subscribers[start : start + BROADCAST_BATCH]:
                if subscriber not in topic.subscribers:  # it has unsubscribed meanwhile
                    continue
                try:
                    subscriber.hint(name, cursor, long if changes else short)
                except Exception:
                    live_log.exception("a subscriber of %r failed", name)
            used += time.monotonic() - began
        self.counts["hints_sent"] += len(subscribers)
        return used

    def send_current(self, name: str, subscriber: Subscriber, cursor: int = 0) -> None:
        """Send one subscriber the topic's newest cursor, or `cursor` if it is newer."""
        topic = self.topics.get(name)
        if topic is None or subscriber not in topic.subscribers:
            return
        cursor = topic.cursor = max(cursor, topic.cursor or 0)
        message = self.encode(encode_message(name, encode_cursor(cursor)))
        subscriber.hint(name, cursor, message)

    # -- against lost hints, and a log that lost its newest changes

    def send_heartbeats(self, now: float) -> None:
        """Send the newest hint again in each topic that was silent for `heartbeat`."""
        limit = now - self.settings.heartbeat
        # A copy of all 100,000 topics would take 40 ms, and this look takes 3 ms.
        hints = {
            name: Hint(topic.cursor)
            for name, topic in self.topics.items()
            if topic.last_sent <= limit and topic.cursor is not None
        }
        for name, hint in hints.items():
            self.hint(name, hint)

    def forget_cursors(self) -> None:
        """Let cursors go down once, after an older copy of the log was restored."""
        for topic in self.topics.values():
            topic.cursor = None
            topic.pending = None


def merge_hints(older: Hint, newer: Hint) -> Hint:
    """Return one hint for two; it has changes only if none is missing in between."""
    if older.changes and newer.changes and newer.after == older.cursor:
        changes = older.changes + newer.changes
        return newer._replace(after=older.after, changes=changes)
    return Hint(max(older.cursor, newer.cursor), newer.epoch)


# --- HTTP requests --------------------------------------------------------------------
# Bytes to requests (RFC 9110, RFC 9112). Nothing here waits: a parser takes what is
# complete off the front of a buffer. One rule stands above all others: a message that
# two parsers could read differently is refused, and its connection is closed.

TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]++"  # (RFC 9110 §5.6.2)
FIELD_VALUE = r"[\t -~\x80-\xff]*+"  # without the space around it (RFC 9110 §5.5)
REQUEST_LINE = re.compile(rf"({TOKEN}) ([!-~]+) HTTP/([0-9])\.([0-9])")
FIELD_LINE = re.compile(rf"({TOKEN}):({FIELD_VALUE})")
HEAD_END = re.compile(rb"\r\n\r\n|[^\r]\n")  # a line without CR is refused at once
CHUNK_LINE = re.compile(rf"([0-9A-Fa-f]{{1,8}})(?:[ \t]*;[ \t]*{TOKEN}{FIELD_VALUE})?")
ABSOLUTE_FORM = re.compile(r"https?://([^/?]*)/?(.*)", re.IGNORECASE)
REG_NAME = r"(?:[A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})+"  # (RFC 3986 §3.2.2)
IPV6 = r"\[(?=.*:.*:)[0-9A-Fa-f:.]+\]"
AUTHORITY = re.compile(f"(?:(?:{REG_NAME}|{IPV6})(?::[0-9]{{0,5}})?)?")
# A second line of one of these makes its meaning ambiguous.
SINGLE_FIELDS = {
    "authorization", "content-length", "content-type", "host", "origin",
    "sec-websocket-key", "sec-websocket-version", "transfer-encoding",
}  # fmt: skip


@dataclasses.dataclass(eq=False)
class Request:
    """A request (RFC 9110 §3.4). Names of header fields are in lower case."""

    method: str
    target: str  # as the client sent it
    version: tuple[int, int]
    headers: dict[str, str]  # values of a repeated field are joined with commas
    host: str  # in lower case, with its port
    path: str  # decoded
    length: int | None  # bytes of the body; None if it is chunked
    body: bytes = b""
    peer: str = ""  # address and port of the client, or of the proxy in front
    wait: asyncio.Timeout | None = None  # of a pull; the sweep may end it

    @functools.cached_property
    def query(self) -> dict[str, str]:
        """The parameters, as HTML forms write them.

        Raise InvalidRequest for a malformed one, and for one that is given twice.
        """
        query: dict[str, str] = {}
        _, _, pairs = self.target.partition("?")
        for pair in pairs.split("&"):
            name, _, value = pair.replace("+", " ").partition("=")
            name = unquote(name)
            if name in query:
                raise InvalidRequest(f"the parameter {name[:40]!r} is given twice")
            if pair:
                query[name] = unquote(value)
        return query

    @property
    def json(self) -> Any:
        """The body as strict JSON, of at most 64 levels and 100,000 values.

        Raise InvalidRequest or TooLarge.
        """
        return parse_json(self.body)

    @property
    def bearer(self) -> str:
        """The client's bearer token (RFC 6750 §2.1), or "".

        A browser's WebSocket can't send headers, so it offers `bearer.TOKEN` as a
        subprotocol.
        """
        scheme, _, token = self.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            return token.strip(" ")
        for offer in self.elements("sec-websocket-protocol"):
            if offer.startswith("bearer."):
                return offer.removeprefix("bearer.")
        return ""

    def number(self, name: str, default: float, pattern: str = "[0-9]{1,16}") -> float:
        """Return a numeric parameter. Raise InvalidRequest if it is no such number."""
        text = self.query.get(name)
        if text is None:
            return default
        if not re.fullmatch(pattern, text):
            raise InvalidRequest(f"{name}={text[:40]!r} is not a valid number")
        return float(text) if "." in text else int(text)

    def elements(self, name: str) -> list[str]:
        """Return the elements of a list field, without empty ones (RFC 9110 §5.6.1)."""
        elements = self.headers.get(name, "").split(",")
        stripped = [element.strip(" \t") for element in elements]
        return [element for element in stripped if element]

    def tokens(self, name: str) -> list[str]:
        """Return a header field that is a list of words, in lower case."""
        return [element.lower() for element in self.elements(name)]

    @property
    def is_handshake(self) -> bool:
        """True if the client asks for a WebSocket (RFC 6455 §4.1)."""
        return "websocket" in self.tokens("upgrade")

    @property
    def accepts_gzip(self) -> bool:
        """True if gzip is listed, without a weight of 0 (RFC 9110 §12.5.3)."""
        weight = r"[ \t]*;[ \t]*q=(1(\.0*+)?|0\.0*+[1-9][0-9]*+)"
        codings = self.tokens("accept-encoding")
        return any(re.fullmatch(f"gzip({weight})?", coding) for coding in codings)

    @property
    def keep_alive(self) -> bool:
        """True if the client may send another request here (RFC 9112 §9.3).

        In HTTP/1.0 it may not, even if it asks for that.
        """
        will_close = "close" in self.tokens("connection")
        return self.version >= (1, 1) and not will_close


def parse_request(buffer: bytearray, settings: Settings) -> Request | None:
    """Take a request's head off the front of `buffer`; None until it is complete.

    Raise the SyncError to answer with; then nothing behind the head can be read as a
    request. The bytes are judged in their order, so a head is refused for the same
    reason however it is cut into packets (RFC 9112 §2, §3).
    """
    skip_empty_lines(buffer)
    # First for its errors alone: a long first line is 414, not 431.
    find_line_end(buffer, b"\r\n", 0, settings.max_target_size + 64, 414)
    end = find_line_end(buffer, b"\r\n\r\n", 0, settings.max_head_size, 431)
    if end < 0:
        return None
    line, *fields = buffer[:end].decode("latin-1").split("\r\n")
    method, target, version = parse_request_line(line, settings)
    if len(fields) > settings.max_head_fields:
        raise HTTPError(
            431, f"the head has more than {settings.max_head_fields} fields"
        )
    headers = parse_fields(fields)
    host, target = parse_host(target, version, headers)
    if "#" in target or not target.startswith("/"):
        raise InvalidRequest("the request target has to be a path, without a fragment")
    path = unquote(target.partition("?")[0])
    length = parse_body_length(headers, version)
    # A refused head stays: whoever answers looks for HEAD in it, which gets no body.
    del buffer[: end + 4]
    return Request(method, target, version, headers, host, path, length)


def skip_empty_lines(buffer: bytearray) -> None:
    """Drop the empty line that some clients send after a body (RFC 9112 §2.2)."""
    while buffer.startswith(b"\r\n"):
        del buffer[:2]


def find_line_end(
    buffer: bytearray, ending: bytes, start: int, limit: int, status: int
) -> int:
    """Return where the ending of a line or a head begins; -1 if it may still come.

    Raise HTTPError with `status` if it does not come within `limit` bytes. Raise
    InvalidRequest for a bare LF before it: a parser that takes LF for the end of a line
    would see other lines (RFC 9112 §2.2). There is one if LF occurs more often than
    CRLF.
    """
    end = buffer.find(ending, start, limit)
    stop = end if end >= 0 else limit
    line_feeds = buffer.count(b"\n", start, stop)
    if line_feeds != buffer.count(b"\r\n", start, stop):
        raise InvalidRequest("a line ends without CR")
    if end < 0 and len(buffer) >= limit:
        raise HTTPError(status, f"a part of the request is longer than {limit} bytes")
    return end


def parse_request_line(
    line: str, settings: Settings
) -> tuple[str, str, tuple[int, int]]:
    """Return method, target and HTTP version (RFC 9112 §3)."""
    words = REQUEST_LINE.fullmatch(line)
    if words is None:
        raise InvalidRequest("the request line has to be: method, target, HTTP version")
    method, target, major, minor = words.groups()
    if major != "1":
        raise HTTPError(505, "this server speaks HTTP/1.1")
    longest = settings.max_target_size
    if len(target) > longest:
        raise HTTPError(414, f"the request target is longer than {longest} bytes")
    return method, target, (1, min(int(minor), 1))


def parse_fields(lines: Iterable[str]) -> dict[str, str]:
    """Return header fields by name (RFC 9112 §5).

    A folded line begins with a space, which no name does, so it is refused.
    """
    fields: dict[str, str] = {}
    for line in lines:
        words = FIELD_LINE.fullmatch(line)
        if words is None:
            raise InvalidRequest(
                "a header line is not: name, colon, value without control characters"
            )
        name = words[1].lower()
        value = words[2].strip(" \t")
        if name in fields:
            if name in SINGLE_FIELDS:
                raise InvalidRequest(f"the header {name} is given twice")
            value = f"{fields[name]}, {value}"
        fields[name] = value
    return fields


def parse_host(
    target: str, version: tuple[int, int], headers: Mapping[str, str]
) -> tuple[str, str]:
    """Return the host in lower case, and the target as a path (RFC 9112 §3.2).

    HTTP/1.1 requires a Host field. It has to be valid even where a target in absolute
    form overrides it.
    """
    refusal = InvalidRequest("the request needs one valid Host")
    host = headers.get("host", "" if version == (1, 0) else None)
    if host is None or not AUTHORITY.fullmatch(host):
        raise refusal
    absolute = ABSOLUTE_FORM.fullmatch(target)
    if absolute:
        host = absolute[1]
        target = "/" + absolute[2]
        if not host or not AUTHORITY.fullmatch(host):
            raise refusal
    return host.lower(), target


def parse_body_length(
    headers: Mapping[str, str], version: tuple[int, int]
) -> int | None:
    """Return the length of the body, or None if it is chunked (RFC 9112 §6.3)."""
    length = headers.get("content-length", "0")
    coding = headers.get("transfer-encoding")
    if coding is None:
        if not re.fullmatch("[0-9]{1,18}", length):
            raise InvalidRequest("the Content-Length is not a number")
        return int(length)
    if "content-length" in headers:
        # Both at once is how a request is smuggled past a proxy (RFC 9112 §6.1).
        raise InvalidRequest("Transfer-Encoding beside Content-Length")
    if version < (1, 1):
        raise InvalidRequest("HTTP/1.0 has no Transfer-Encoding")
    if coding.lower() == "chunked":
        return None
    last = coding.lower().rpartition(",")[2]
    if last.strip(" \t") != "chunked":
        raise InvalidRequest("a body whose last coding is not chunked has no end")
    raise HTTPError(501, "of the transfer codings only chunked is implemented")


def unquote(text: str) -> str:
    """Decode percent escapes strictly: each is complete, and they give UTF-8."""
    if "%" not in text:
        return text
    if re.search("%(?![0-9A-Fa-f]{2})", text):
        raise InvalidRequest("a percent sign without two hexadecimal digits")
    try:
        return urllib.parse.unquote(text, errors="strict")
    except UnicodeDecodeError:
        raise InvalidRequest("the percent-encoding is not UTF-8") from None


class ChunkedBody:
    """A body in chunks (RFC 9112 §7.1), decoded as it arrives."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.body = bytearray()
        # Bytes of sizes and line ends. Without a limit, chunks of one byte would cost
        # ten times what they carry.
        self.framing = 0

    def take(self, buffer: bytearray) -> bool:
        """Take the chunks that are complete off `buffer`; return True at the last one.

        Raise SyncError for a malformed or too large body.
        """
        while True:
            # A chunk's line, and the trailers, have the limit of a request's line.
            longest = self.settings.max_target_size
            end = find_line_end(buffer, b"\r\n", 0, longest, 431)
            if end < 0:
                return False
            line = CHUNK_LINE.fullmatch(buffer[:end].decode("latin-1"))
            if line is None:
                raise InvalidRequest("a chunk does not begin with its size")
            size = int(line[1], 16)
            if size == 0:
                return self._take_trailers(buffer, end, longest)
            check_body_size(len(self.body) + size, self.settings)
            stop = end + 2 + size
            if len(buffer) < stop + 2:
                return False
            if buffer[stop : stop + 2] != b"\r\n":
                raise InvalidRequest("a chunk is not as long as it says")
            self.body += buffer[end + 2 : stop]
            del buffer[: stop + 2]
            self.framing += end + 4
            if self.framing > self.settings.max_head_size:
                raise TooLarge("the chunks are too small for a body this long")

    def _take_trailers(self, buffer: bytearray, start: int, longest: int) -> bool:
        """Check the trailer fields behind the last chunk, and drop them."""
        end = find_line_end(buffer, b"\r\n\r\n", start, longest, 431)
        if end < 0:
            return False
        _, *fields = buffer[:end].decode("latin-1").split("\r\n")
        parse_fields(fields)
        del buffer[: end + 4]
        return True


def check_body_size(size: int, settings: Settings) -> None:
    """Raise TooLarge for a body over `max_body_size` bytes."""
    if size > settings.max_body_size:
        raise TooLarge(f"the body is longer than {settings.max_body_size} bytes")


# --- HTTP responses -------------------------------------------------------------------
# Responses to bytes (RFC 9110, RFC 9112). Date, Content-Type, Content-Length and
# Connection are written here alone, and every error has the same body. Nothing is
# cached unless a handler says otherwise, because each answer is of one moment.

PHRASES = {int(status): status.phrase for status in http.HTTPStatus}
# All answers of one second share one date.
http_date = functools.lru_cache(maxsize=1)(
    functools.partial(email.utils.formatdate, usegmt=True)
)


@dataclasses.dataclass(frozen=True)
class Response:
    """A response (RFC 9110 §3.4). Raise ValueError for a line break in a header.

    The server adds Date, Content-Type, Content-Length and Connection, so `headers` may
    not have them. It adds `Cache-Control: no-store` unless `headers` has another.
    """

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    content_type: str = "application/json"

    def __post_init__(self) -> None:
        if not isinstance(self.body, bytes) or not isinstance(self.status, int):
            raise TypeError("a response needs a number as status, and bytes as body")
        # A line break would begin a field, or a response, of an attacker's making.
        names = "".join(self.headers)
        written = names + "".join(self.headers.values()) + self.content_type
        if not (written.isascii() and written.isprintable()):
            raise ValueError(
                f"a response header has to be printable ASCII: {written!r}"
            )

    @classmethod
    def of(cls, value: Any) -> Response:
        """Return the response for a handler's result.

        That is a Response, text, bytes, or any other value that JSON can write.
        """
        if isinstance(value, Response):
            return value
        if isinstance(value, str):
            return cls(body=value.encode(), content_type="text/plain; charset=utf-8")
        if isinstance(value, bytes):
            return cls(body=value, content_type="application/octet-stream")
        return cls(body=encode_json(value).encode())

    @classmethod
    def refusal(cls, error: SyncError) -> Response:
        """Return the answer to a refused request, in the one format of all errors."""
        body = encode_error(error.code, str(error))
        return cls(error.status, body, error.headers)

    @classmethod
    def page(cls, html: bytes, csp: str | None = None) -> Response:
        """Return an HTML page that may use its own scripts and styles, and no others.

        Its Content-Security-Policy (CSP Level 3) names each by its hash. Scripts and
        workers may also come from this server's origin. `csp` is another policy.
        """
        # A browser sees no element inside a comment, and LF as the only line end.
        comment = rb"<!--(?:-?>|.*?--!?>)"
        attributes = rb"\b(?:\"[^\"]*\"|'[^']*'|[^>\"'])*+"
        element = rb"(?si)%b|<(script|style)%b>(.*?)</\1" % (comment, attributes)
        hashes = {b"script": "", b"style": ""}
        seen = re.sub(rb"\r\n?", b"\n", html)
        for tag, text in re.findall(element, seen):
            if tag:
                digest = hashlib.sha256(text).digest()
                name = base64.b64encode(digest).decode()
                hashes[tag.lower()] += f" 'sha256-{name}'"
        policy = (
            "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none';"
            " form-action 'none'; frame-ancestors 'none';"
            f" worker-src 'self'; script-src 'self'{hashes[b'script']};"
            f" style-src{hashes[b'style']}"
        )
        headers = {
            "Content-Security-Policy": policy if csp is None else csp,
            "X-Content-Type-Options": "nosniff",
        }
        return cls(200, html, headers, "text/html; charset=utf-8")

    def has_field(self, name: str) -> bool:
        """Return whether there is a header field of this name, in lower case."""
        return any(field.lower() == name for field in self.headers)

    def with_fields(self, fields: Mapping[str, str]) -> Response:
        """Return this response with more header fields; its Vary is extended."""
        headers = {**self.headers, **fields}
        if "Vary" in self.headers and "Vary" in fields:
            names = f"{self.headers['Vary']}, {fields['Vary']}".split(", ")
            headers["Vary"] = ", ".join(dict.fromkeys(names))
        return Response(self.status, self.body, headers, self.content_type)

    def compress(self) -> Response:
        """Return this response compressed (RFC 9110 §8.4.1.3), if that is worth it.

        Only text is compressed, and only if no coding was applied before.
        """
        is_text = self.content_type.startswith(("application/json", "text/"))
        if not is_text or self.status == 206 or self.has_field("content-encoding"):
            return self
        # Vary keeps caches from giving it to clients that can't read it (§12.5.5).
        fields = {"Content-Encoding": "gzip", "Vary": "Accept-Encoding"}
        body = gzip.compress(self.body, 1, mtime=0)
        return dataclasses.replace(self.with_fields(fields), body=body)

    def encode(self, connection: str = "", head_only: bool = False) -> bytes:
        """Return the bytes to send. `connection` is the Connection field, if any.

        `head_only` leaves the body out, for the answer to a HEAD request.
        """
        head = f"HTTP/1.1 {int(self.status)} {PHRASES.get(self.status, '')}\r\n"
        head += f"Date: {http_date(int(time.time()))}\r\n"
        if not self.has_field("cache-control"):
            head += "Cache-Control: no-store\r\n"
        # These have no content, and no fields about it (RFC 9110 §8.6, RFC 9112 §6.3).
        no_content = self.status < 200 or self.status in (204, 304)
        if not no_content:
            head += f"Content-Type: {self.content_type}\r\n"
            head += f"Content-Length: {len(self.body)}\r\n"
        if self.has_field("upgrade"):  # concerns this connection alone (RFC 9110 §7.8)
            connection = f"Upgrade, {connection}" if connection else "Upgrade"
        if connection:
            head += f"Connection: {connection}\r\n"
        for name, value in self.headers.items():
            head += f"{name}: {value}\r\n"
        encoded_head = f"{head}\r\n".encode()
        if head_only or no_content:
            return encoded_head
        return encoded_head + self.body


# --- WebSocket frames -----------------------------------------------------------------
# RFC 6455 for a server, as pure functions: frames, messages, the handshake. A peer that
# breaks a rule gets a ProtocolError with the code to close with (§7.4.1): 1002 protocol
# error, 1003 unsupported data, 1007 not UTF-8, 1009 too big.

# Opcodes (§11.8).
CONTINUATION = 0x0
TEXT = 0x1
BINARY = 0x2
CLOSE = 0x8
PING = 0x9
PONG = 0xA
MAX_CONTROL_PAYLOAD = 125  # bytes (§5.5)
NO_CODE = 1005  # stands for a close frame without a code; it is never sent (§7.4.1)
GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # (§1.3)


class Frame(NamedTuple):
    """One frame of a client, unmasked (§5.2)."""

    opcode: int
    payload: bytes
    fin: bool = True


def parse_frame(buffer: bytearray, max_payload: int) -> Frame | None:
    """Take one client frame off the front of `buffer`; None until it is complete.

    A frame begins with a byte of FIN, three reserved bits and the opcode. The next byte
    has MASK and a length, where 126 and 127 mean that the length follows in 2 or 8
    bytes. The masking key has 4 bytes. The payload is the rest.

    Raise ProtocolError as soon as the bytes show why: 1002 for a frame that breaks a
    rule, 1009 for a payload over `max_payload` bytes (§5.2, §7.4.1).
    """
    if len(buffer) < 2:
        return None
    fin = bool(buffer[0] & 0x80)
    opcode = buffer[0] & 0x0F
    size = buffer[1] & 0x7F
    if buffer[0] & 0x70:
        raise ProtocolError(1002, "a reserved bit is set")
    if opcode not in (CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG):
        raise ProtocolError(1002, f"the opcode {opcode} is reserved")
    if not buffer[1] & 0x80:
        raise ProtocolError(1002, "a client has to mask its frames")
    if opcode >= CLOSE and (size > MAX_CONTROL_PAYLOAD or not fin):
        raise ProtocolError(1002, "a control frame is long or fragmented")
    start = 2
    if size >= 126:
        start, shortest = (4, 126) if size == 126 else (10, 65536)
        if len(buffer) < start:
            return None
        size = int.from_bytes(buffer[2:start], "big")
        if not shortest <= size < 1 << 63:
            raise ProtocolError(1002, "the length is not in its shortest form")
    if opcode < CLOSE and size > max_payload:
        raise ProtocolError(1009, "the message is too long")
    key = buffer[start : start + 4]
    start += 4
    if len(buffer) < start + size:
        return None
    payload = unmask(key, buffer[start : start + size])
    del buffer[: start + size]
    return Frame(opcode, payload, fin)


def unmask(key: bytearray, payload: bytearray) -> bytes:
    """Return the payload XOR the repeated key (§5.3).

    Both are taken as one long number: a loop over the bytes takes 50 times as long.
    """
    size = len(payload)
    repeated = (key * (size // 4 + 1))[:size]
    mask = int.from_bytes(repeated, "little")
    number = int.from_bytes(payload, "little") ^ mask
    return number.to_bytes(size, "little")


def encode_frame(opcode: int, payload: bytes) -> bytes:
    """Return a complete frame of a server, which is not masked (§5.1)."""
    size = len(payload)
    if size < 126:
        return bytes((0x80 | opcode, size)) + payload
    mark, width = (126, 2) if size < 65536 else (127, 8)
    head = bytes((0x80 | opcode, mark))
    return head + size.to_bytes(width, "big") + payload


class Assembler:
    """Joins data frames to messages (§5.4).

    Text is checked frame by frame, so a message that is not UTF-8 fails at once (§8.1).
    """

    def __init__(self, max_size: int) -> None:
        self.room = max_size  # bytes that may still be added to the current message
        self._check_utf8 = codecs.getincrementaldecoder("utf-8")().decode
        self._opcode = CONTINUATION  # of the message; this one means none has begun
        # One buffer: a list of small frames would take 40 times the memory.
        self._data = bytearray()

    def add(self, frame: Frame) -> str | bytes | None:
        """Return the message if this frame completes it. Raise ProtocolError."""
        starts = self._opcode == CONTINUATION
        if starts == (frame.opcode == CONTINUATION):
            raise ProtocolError(1002, "fragments out of order")
        if starts:
            self._opcode = frame.opcode
        self._data += frame.payload
        self.room -= len(frame.payload)
        is_text = self._opcode == TEXT
        try:
            if is_text:
                self._check_utf8(frame.payload, frame.fin)
        except UnicodeDecodeError:
            raise ProtocolError(1007, "the text is not UTF-8") from None
        if not frame.fin:
            return None
        data = self._data
        self._data = bytearray()
        self._opcode = CONTINUATION
        self.room += len(data)
        return data.decode() if is_text else bytes(data)


def is_close_code(code: int) -> bool:
    """Return whether a close frame may carry this code (§7.4)."""
    is_reserved = code in (1004, 1005, 1006)
    return (1000 <= code <= 1014 and not is_reserved) or 3000 <= code <= 4999


def parse_close(payload: bytes) -> tuple[int, str]:
    """Return the code and the reason of a close frame (§5.5.1). Raise ProtocolError."""
    if not payload:
        return NO_CODE, ""
    code = int.from_bytes(payload[:2], "big")  # a single byte is no valid code
    if not is_close_code(code):
        raise ProtocolError(1002, "this close code may not be sent")
    try:
        return code, payload[2:].decode()
    except UnicodeDecodeError:
        raise ProtocolError(1007, "the close reason is not UTF-8") from None


def encode_close(code: int, reason: str) -> bytes:
    """Return a close frame; a long reason is cut between two characters.

    Raise ValueError for a code that may not be sent.
    """
    if code == NO_CODE:
        return encode_frame(CLOSE, b"")
    if not is_close_code(code):
        raise ValueError(f"the close code {code} may not be sent (RFC 6455 §7.4)")
    encoded = reason.encode(errors="replace")
    cut = encoded[: MAX_CONTROL_PAYLOAD - 2].decode(errors="ignore")
    return encode_frame(CLOSE, code.to_bytes(2, "big") + cut.encode())


def answer_handshake(request: Request) -> Response:
    """Return the 101 that accepts a handshake (§4.2). Raise SyncError to refuse it.

    Extensions are declined by not naming them.
    """
    is_upgrade = request.is_handshake and "upgrade" in request.tokens("connection")
    if not is_upgrade or request.headers.get("sec-websocket-version") != "13":
        spoken = {"Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
        raise HTTPError(426, "this endpoint speaks WebSocket, version 13", spoken)
    key = request.headers.get("sec-websocket-key", "")
    if not re.fullmatch("[A-Za-z0-9+/]{21}[AQgw]==", key):
        raise InvalidRequest("the Sec-WebSocket-Key is not 16 bytes in Base64")
    if request.length != 0 or request.version < (1, 1):
        raise InvalidRequest(
            "a WebSocket begins with a request of HTTP/1.1 without a body"
        )
    digest = hashlib.sha1(key.encode() + GUID).digest()
    accept = base64.b64encode(digest).decode()
    headers = {"Upgrade": "websocket", "Sec-WebSocket-Accept": accept}
    if "mizusync" in request.elements("sec-websocket-protocol"):
        headers["Sec-WebSocket-Protocol"] = "mizusync"
    return Response(101, headers=headers)


# --- Tasks ----------------------------------------------------------------------------
# What runs beside a connection's own task: callbacks of the application, tasks that the
# server has to end, and work that would block the event loop. What the application
# raises is its own failure, and never the server's.


async def call_app(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call an application callback, and await its result if it is awaitable.

    Raise what it raises. If what it waited for was cancelled, raise RuntimeError: only
    a cancellation of the server's own may end the task that calls it.
    """
    try:
        result = function(*arguments)
        if result is None or not inspect.isawaitable(result):
            return result
        return await result
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task and task.cancelling():
            raise
        raise RuntimeError("the application waited for something cancelled") from error


async def call_app_safely(function: Callable[..., Any], *arguments: Any) -> None:
    """Call an application callback; log what it raises."""
    try:
        await call_app(function, *arguments)
    except Exception:
        live_log.exception("%s failed", getattr(function, "__name__", function))


class Tasks:
    """The running tasks of a server, or those of them that belong to a session.

    asyncio itself keeps no reference to a task.
    """

    def __init__(self, whole: Tasks | None = None) -> None:
        self.running: set[asyncio.Task[Any]] = set()
        self._start = whole.spawn if whole else asyncio.create_task

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start a task, and keep it until it is done."""
        task = self._start(work)
        self.running.add(task)
        task.add_done_callback(self.running.discard)
        return task


async def parse_json_aside(raw: bytes, settings: Settings) -> Any:
    """Return strict JSON, as parse_json does; parse a long text in a thread.

    A megabyte can take 0.1 s, which is too long to block the event loop.
    """
    parse = functools.partial(
        parse_json, raw, settings.max_json_depth, settings.max_json_values
    )
    if len(raw) < 64 * 1024:
        return parse()
    return await asyncio.to_thread(parse)


# --- Connection -----------------------------------------------------------------------
# One socket as asyncio streams. Its task reads, calls the parsers and writes. The
# connection is always in one phase with one deadline, a number that the server's sweep
# compares with the clock ten times a second: a timer for each read would cost more than
# the read, and would let a peer live for ever on one byte a minute.
#
#     phase    the peer has to ...        deadline         when it passes
#     IDLE     send a request             idle_timeout     the socket is closed
#     HEAD     complete a head            head_timeout     408, then it is closed
#     BODY     complete a body            body_timeout     408, then it is closed
#     HANDLE   wait for the handler       PEER_CHECK       if it reset: task cancelled
#     SEND     read some of an answer     send_timeout     aborted, unless it did
#     LINGER   close its half             linger_timeout   aborted
#     OPEN     answer pings               ping_interval    a ping; later aborted
#     CLOSING  answer our close frame     close_timeout    aborted
#
# In IDLE, HEAD and BODY the task waits in `receive`, where the sweep, or a stop of the
# server, interrupts it. In HANDLE the sweep cancels the task. In all other phases the
# task waits for the peer, so aborting the transport wakes it. (In OPEN it may also wait
# for the application; then it notices when it reads or writes again.)

READ_SIZE = 64 * 1024  # bytes in one read, and in one write
PEER_CHECK = 1.0  # seconds between two looks whether a handler's client has left

Phase = enum.Enum("Phase", "IDLE HEAD BODY HANDLE SEND LINGER OPEN CLOSING")
RECEIVING = (Phase.IDLE, Phase.HEAD, Phase.BODY)


class ConnectionLost(ConnectionError):
    """The peer is gone: nothing that is sent can reach it."""


class Reader(asyncio.StreamReader):
    """A StreamReader that knows what has arrived, even if nobody reads it."""

    last_received = 0.0
    has_ended = False  # the peer has closed its half

    def feed_data(self, data: Any) -> None:
        self.last_received = time.monotonic()
        super().feed_data(data)

    def feed_eof(self) -> None:
        self.has_ended = True
        super().feed_eof()


@dataclasses.dataclass
class Unsent:
    """The bytes of all connections that their peers have yet to read."""

    limit: int
    answers: int = 0
    messages: int = 0  # of WebSockets; the sweep counts them once a second

    @contextlib.contextmanager
    def counting(self, size: int) -> Iterator[None]:
        """Count the bytes of an answer while the block lasts."""
        self.answers += size
        try:
            yield
        finally:
            self.answers -= size

    def check(self) -> None:
        """Raise Unavailable while too many bytes wait."""
        if self.answers + self.messages > self.limit:
            raise Unavailable("too many answers wait for their clients to read them")


@dataclasses.dataclass(eq=False)
class Connection:
    """One accepted socket, and the task that serves it."""

    reader: Reader
    writer: asyncio.StreamWriter
    settings: Settings
    unsent: Unsent
    request: Request | None = None  # the one that is being handled
    body_pending: bool = False  # a body that nobody took: nothing can follow it
    read_error: OSError | None = None  # why nothing more will arrive
    interruption: Exception | None = None  # what `receive` raises if cancelled
    ping_sent_at: float = math.inf
    unsent_at_last_check: int = 0

    def __post_init__(self) -> None:
        self.buffer = bytearray()  # received, and not yet parsed
        self.transport: Any = self.writer.transport
        self.task: Any = asyncio.current_task()
        address = self.writer.get_extra_info("peername") or ("?", 0)
        host, port, *_ = address
        self.peer = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self.enter(Phase.HANDLE, PEER_CHECK)

    @classmethod
    async def open(
        cls, sock: socket.socket, settings: Settings, unsent: Unsent
    ) -> Connection:
        """Return a connection over an accepted socket. Raise OSError if it is gone."""
        loop = asyncio.get_running_loop()
        reader = Reader(limit=READ_SIZE)
        protocol = asyncio.StreamReaderProtocol(reader)
        try:
            # asyncio does so only for sockets that name TCP; an accepted one does not.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # The kernel would take megabytes at once, and a slow peer's progress would
            # show after minutes. (Windows, and some sandboxes, have no such option.)
            with contextlib.suppress(AttributeError, OSError):
                option = socket.TCP_NOTSENT_LOWAT
                sock.setsockopt(socket.IPPROTO_TCP, option, READ_SIZE)
            transport, _ = await loop.connect_accepted_socket(lambda: protocol, sock)
        except BaseException:
            sock.close()
            raise
        writer = asyncio.StreamWriter(transport, protocol, reader, loop)
        return cls(reader, writer, settings, unsent)

    @property
    def unsent_size(self) -> int:
        """The bytes in the transport that the peer has yet to read."""
        return int(self.transport.get_write_buffer_size())

    @property
    def is_closing(self) -> bool:
        """True once the connection is closed, aborted or reset."""
        return bool(self.transport.is_closing())

    def enter(self, phase: Phase, seconds: float) -> None:
        """Begin a phase, which may last so many seconds."""
        self.phase = phase
        self.deadline = time.monotonic() + seconds

    # -- receiving

    async def receive(self) -> bytes:
        """Add the bytes that arrive next to `buffer`, and return them.

        Raise OSError at their end. In the phases of a request, raise what the sweep
        says when the deadline has passed.
        """
        if self.read_error:
            raise self.read_error
        try:
            data = await self.reader.read(READ_SIZE)
            if not data:
                raise ConnectionError("the peer closed the connection")
        except OSError as error:
            # After abort() it looks as if the peer had left. Keep the reason of that.
            self.read_error = self.read_error or error
            raise self.read_error from None
        except asyncio.CancelledError:
            if self.interruption is None:
                raise  # the server ends this task
            self.task.uncancel()  # interrupt() has cancelled it: it goes on
            raise self.interruption from None
        self.buffer += data
        return data

    async def read_request(self) -> Request:
        """Return the next request, without its body.

        Raise SyncError for a malformed or late one, OSError when there is none.
        """
        self.request = None
        self.enter(Phase.IDLE, self.settings.idle_timeout)
        skip_empty_lines(self.buffer)
        # Half of an empty line is no head yet.
        while not self.buffer or self.buffer == b"\r":
            await self.receive()
            skip_empty_lines(self.buffer)
        self.enter(Phase.HEAD, self.settings.head_timeout)
        request = parse_request(self.buffer, self.settings)
        while request is None:
            data = await self.receive()
            # Parsed again at each line, a slow sender would cost more than a fast one.
            limit = self.settings.max_target_size + 64
            if self.buffer.find(b"\n", 0, limit) >= 0:  # the first line is complete
                limit = self.settings.max_head_size
            recent = self.buffer[-len(data) - 3 :]
            if HEAD_END.search(recent) or len(self.buffer) >= limit:
                request = parse_request(self.buffer, self.settings)
        self.enter(Phase.HANDLE, PEER_CHECK)
        self.body_pending = request.length != 0
        request.peer = self.peer
        self.request = request
        return request

    async def read_body(self, request: Request) -> bytes:
        """Return the whole body. Raise SyncError for a late, cut or too large one."""
        size = request.length
        if size == 0:
            return b""
        check_body_size(size or 0, self.settings)
        is_waiting = "100-continue" in request.tokens("expect")
        if is_waiting and request.version >= (1, 1):
            # The client waits for this before it sends the body (RFC 9110 §10.1.1).
            self.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self.enter(Phase.BODY, self.settings.body_timeout)
        try:
            if size is None:
                chunked = ChunkedBody(self.settings)
                while not chunked.take(self.buffer):
                    await self.receive()
                body = bytes(chunked.body)
            else:
                while len(self.buffer) < size:
                    await self.receive()
                body = bytes(self.buffer[:size])
                del self.buffer[:size]
        except OSError:
            raise InvalidRequest("the body ended before its length") from None
        finally:
            self.enter(Phase.HANDLE, PEER_CHECK)
        self.body_pending = False
        return body

    # -- sending

    async def send(self, data: bytes) -> None:
        """Send with flow control: wait while much of it waits for the peer to read.

        Raise OSError if the peer is gone.
        """
        with self.unsent.counting(len(data)):
            # In pieces: the transport copies what it can't send at once.
            for start in range(0, len(data), READ_SIZE):
                if self.is_closing:
                    raise ConnectionLost("the peer is gone")
                self.writer.write(data[start : start + READ_SIZE])
                await self.drain()

    async def drain(self) -> None:
        """Wait until few of the bytes written wait for the peer to read them.

        The peer has to read some of them in each `send_timeout`.
        """
        self.unsent_at_last_check = self.unsent_size
        if not self.unsent_at_last_check:
            return
        self.enter(Phase.SEND, self.settings.send_timeout)
        await self.writer.drain()
        self.enter(Phase.HANDLE, PEER_CHECK)

    async def close_gracefully(self) -> None:
        """Close so that the peer can read our last words (RFC 9112 §9.6).

        Closing a socket with unread bytes resets it, and the reset overtakes the
        answer. So close half of it, and drop what arrives until the peer closes.
        """
        try:
            self.transport.set_write_buffer_limits(high=0)  # drain() waits for all
            await self.drain()
            self.enter(Phase.LINGER, self.settings.linger_timeout)
            if self.read_error is None:
                self.writer.write_eof()
                while await self.reader.read(READ_SIZE):
                    pass
        except (OSError, RuntimeError):
            pass  # the peer is gone, or a task of the application's reads
        self.writer.close()

    # -- against slow, silent and vanished peers

    def abort(self, reason: str = "the connection was aborted") -> None:
        """Close at once. The task that waits for the peer gets an OSError."""
        self.read_error = self.read_error or ConnectionLost(reason)
        self.transport.abort()

    def interrupt(self, reason: Exception) -> None:
        """Make the task's `receive` raise `reason`, in a phase of RECEIVING.

        An OSError closes the connection without a word, a SyncError is answered.
        """
        if self.phase in RECEIVING and self.interruption is None:
            self.interruption = reason
            if isinstance(reason, OSError):
                self.read_error = reason
            self.task.cancel()

    def check_deadline(self, now: float) -> None:
        """Act on a deadline that has passed, as the table above says."""
        match self.phase:  # a SyntaxError here: mizusync needs Python 3.11 or newer
            case Phase.IDLE:
                self.interrupt(ConnectionError("no request came"))
            case Phase.HEAD | Phase.BODY:
                self.interrupt(HTTPError(408, "the request did not arrive in time"))
            case Phase.HANDLE:
                if self.is_closing and not self.task.cancelling():
                    self.task.cancel()
                elif self.reader.has_ended and self.request and self.request.wait:
                    # The peer has closed its half, and a pull waits: it ends now.
                    self.request.wait.reschedule(0)
                    self.request.wait = None
                self.deadline = now + PEER_CHECK
            case Phase.SEND:
                unsent = self.unsent_size
                if unsent >= self.unsent_at_last_check:
                    self.abort("the peer reads nothing")
                self.unsent_at_last_check = unsent
                self.deadline = now + self.settings.send_timeout
            case Phase.LINGER | Phase.CLOSING:
                self.abort("the peer did not close in time")
            case Phase.OPEN:
                self.check_keepalive(now)

    def check_keepalive(self, now: float) -> None:
        """Ping a silent peer of a WebSocket, and abort if it shows no sign of life."""
        if self.is_closing:
            return
        received = self.reader.last_received
        interval = self.settings.ping_interval
        timeout = self.settings.ping_timeout
        unsent = self.unsent_size
        has_answered = received > self.ping_sent_at
        # A slow reader answers a ping late, because other bytes come before the ping.
        takes_bytes = unsent < self.unsent_at_last_check
        # The application is slow, so we read nothing, and could not see an answer.
        is_unheard = not unsent and not self.transport.is_reading()
        if has_answered or takes_bytes or is_unheard:
            self.ping_sent_at = math.inf
        self.unsent_at_last_check = unsent
        if self.ping_sent_at + timeout <= now:
            self.abort(f"no answer to a ping for {timeout:g} s")
        elif now - received < interval:
            self.deadline = received + interval
        else:
            if self.ping_sent_at == math.inf:
                self.ping_sent_at = now
                self.writer.write(encode_frame(PING, b""))
            self.deadline = min(now + interval, self.ping_sent_at + timeout)


# --- WebSocket ------------------------------------------------------------------------
# A WebSocket over a connection. Frames are taken off the connection's buffer, so what
# arrived together with the handshake is not lost. It goes one way through its life: a
# handshake that may still be refused in HTTP, then open, then closing (our close frame
# is sent, and nothing may follow it), then ended (nothing more is received).


class WebSocket:
    """The server's side of a WebSocket.

    Receive with `async for message in websocket`, send with
    `await websocket.send(message)`: text is str, binary is bytes. The server sends
    pings, and answers those of the peer, by itself. Until `accept` (or the first
    message), a SyncError that the handler raises still becomes an HTTP response.
    """

    def __init__(self, connection: Connection, request: Request) -> None:
        self.connection = connection
        self.request = request
        self.settings = connection.settings
        self.accepted = False
        self.closing = False
        self.ended = False
        self.label = f"WebSocket at {request.path!r} from {request.peer}"  # for the log
        self.reason = ""  # why it was closed
        self.error: Exception | None = None  # the fault that ended it, if one did
        self._response = answer_handshake(request)
        self._assembler = Assembler(self.settings.max_message_size)

    def accept(self) -> None:
        """Answer the handshake; from here on it is a WebSocket."""
        if not self.accepted:
            self.accepted = True
            self.connection.writer.write(self._response.encode())
            self.connection.enter(Phase.OPEN, self.settings.ping_interval)

    async def send(self, message: str | bytes) -> None:
        """Send a message, with flow control. Raise ConnectionLost without a peer."""
        self.accept()
        if isinstance(message, str):
            self.write(encode_frame(TEXT, message.encode()))
        else:
            self.write(encode_frame(BINARY, message))
        try:
            await self.drain()
        except OSError:
            raise ConnectionLost("the peer is gone") from None
        await asyncio.sleep(0)  # an endless sender would keep the loop to itself
        if self.closing or self.ended or self.connection.is_closing:
            raise ConnectionLost("the peer is gone, or going")

    def write(self, frame: bytes) -> None:
        """Write a frame unless the WebSocket is closing."""
        if not self.closing and not self.connection.is_closing:
            self.connection.writer.write(frame)

    async def drain(self) -> None:
        """Wait while much waits for the peer to read. The keepalive limits the time."""
        await self.connection.writer.drain()

    def close(self, code: int = 1000, reason: str = "") -> None:
        """Begin the closing handshake, which ends when the peer answers.

        Raise ValueError for a code that may not be sent (RFC 6455 §7.4).
        """
        if self.closing or self.ended:
            return
        frame = encode_close(code, reason)
        self.accept()
        self.reason = self.reason or f"{code} {reason}"
        self.write(frame)
        self.closing = True
        self.connection.enter(Phase.CLOSING, self.settings.close_timeout)

    async def __aiter__(self) -> AsyncIterator[str | bytes]:
        while (message := await self.receive()) is not None:
            yield message

    async def receive(self) -> str | bytes | None:
        """Return the next message, or None when there will be none."""
        self.accept()
        buffer = self.connection.buffer
        if buffer:
            # Messages that arrived together leave others their turn. Yield before one
            # is taken, so that a caller who is cancelled here loses none.
            await asyncio.sleep(0)
        try:
            while not self.ended:
                frame = parse_frame(buffer, self._assembler.room)
                if frame is None:
                    await self.connection.receive()
                    continue
                if frame.opcode == CLOSE:
                    code, reason = parse_close(frame.payload)
                    self.reason = self.reason or f"the peer closed: {code} {reason}"
                    self.close(code)  # answer with the same code (§5.5.1)
                    self.ended = True
                elif frame.opcode == PING:
                    self.write(encode_frame(PONG, frame.payload))
                    await self.drain()  # do not read from a peer that does not read
                elif frame.opcode != PONG and not self.closing:
                    message = self._assembler.add(frame)
                    if message is not None:
                        return message
                await asyncio.sleep(0)  # many pings leave others their turn as well
        except ProtocolError as error:
            self.error = self.error or error
            self.close(error.code, str(error))
        except OSError as error:
            self.error = self.error or error
            self.reason = self.reason or str(error)
        self.ended = True
        return None


async def run_websocket(
    websocket: WebSocket, handler: Callable[[WebSocket], Any]
) -> None:
    """Run a WebSocket's handler, then the closing handshake.

    Close with 1000 after the handler, or with 1011 if it fails. Raise what it raises
    before it accepts: that is answered in HTTP.
    """
    try:
        await call_app(handler, websocket)
        websocket.close()
    except Exception as error:
        if not websocket.accepted:
            raise
        # A handler that has lost its own peer ends normally. One that sends to another
        # WebSocket, and finds the peer of that one gone, has failed.
        is_lost = (
            websocket.closing or websocket.ended or websocket.connection.is_closing
        )
        if not (is_lost and isinstance(error, ConnectionLost)):
            live_log.exception("the %s failed", websocket.label)
            websocket.close(1011, "the server failed")
    with contextlib.suppress(RuntimeError):  # a task of the handler's reads already
        await websocket.receive()  # the peer's close frame
    reason = websocket.reason or websocket.connection.read_error
    live_log.info("%s ended: %r", websocket.label, str(reason))


# --- Gate -----------------------------------------------------------------------------
# Access. Host and Origin keep the pages of other sites out; the token and on_auth keep
# other people out. Each check takes the parsed value that is used afterwards, such as
# request.host, and not the bytes that it came from: two parsers might differ.

HOST = re.compile(r"[a-z0-9._-]+|\[[0-9a-f:.]+\]")
# As browsers write them: without the default port, and never with ws: or file:.
ORIGIN = re.compile(
    r"(?!wss?:|file:|http:.*:80$|https:.*:443$)[a-z][a-z0-9+.-]*://"
    rf"({HOST.pattern})(:[1-9][0-9]{{0,4}})?"
)
LOOPBACK = re.compile(
    r"((.*\.)?localhost|127(\.[0-9]{1,3}){3}|\[?::1\]?)(:[0-9]*)?"
)  # (RFC 6761 §6.3)


@dataclasses.dataclass
class Gate:
    """Decides who may use the server, and for what.

    `hosts` are the names that the server goes by besides those of the loopback; if
    there are none, and other machines can reach it, it goes by any name. `origins` are
    written as browsers write them: "https://example.org".
    """

    token: str | None
    hosts: frozenset[str]
    origins: frozenset[str]
    on_auth: Callable[[Request, str], Any] | None
    beyond_loopback: bool = False  # once it listens: can other machines reach it?

    def check_site(self, request: Request) -> None:
        """Check Host and Origin. Raise Forbidden."""
        host = request.host
        goes_by_any_name = self.beyond_loopback and not self.hosts
        if host and not goes_by_any_name and not is_loopback(host):
            # DNS rebinding: a page elsewhere lets its own name lead here. That takes a
            # name, so an IP address is safe.
            name = re.sub(":[0-9]*$", "", host)
            if name not in self.hosts and not is_address(name):
                raise Forbidden(
                    f"this server is not {name[:100]!r}: --allow-host can name it"
                )
        origin = request.headers.get("origin")
        if origin is not None and origin not in self.origins:
            scheme, _, authority = origin.lower().partition("://")
            port = {"http": ":80", "https": ":443"}.get(scheme)
            if not port or host not in (authority, authority + port):
                raise Forbidden(
                    "pages of this origin may not use this server: see --allow-origin"
                )

    def authenticate(self, request: Request) -> None:
        """Check the token, if the server has one. Raise Unauthorized."""
        if self.token is None:
            return
        shown = request.bearer.encode()
        if not hmac.compare_digest(self.token.encode(), shown):
            raise Unauthorized("this server wants a token: Authorization: Bearer ...")

    async def authorize(self, request: Request, scope: str) -> Any:
        """Return the client's identity for a scope: what on_auth returns, or None.

        Raise Unauthorized, or Forbidden, also where on_auth returns False.
        """
        self.authenticate(request)
        if self.on_auth is None:
            return None
        identity = await call_app(self.on_auth, request, scope)
        if identity is False:
            raise Forbidden("this scope is not allowed")
        return identity

    async def authorize_query(self, request: Request) -> tuple[str, Any]:
        """Return the scope that the address names, and the client's identity for it."""
        scope = check_scope(request.query.get("scope", DEFAULT_SCOPE))
        return scope, await self.authorize(request, scope)

    def cors_fields(self, request: Request, methods: str) -> dict[str, str]:
        """Return the fields that let a page of an allowed origin read the answer.

        `methods` is what a preflight allows (the Fetch standard, §3.2).
        """
        if not self.origins:
            return {}
        fields = {"Vary": "Origin"}
        origin = request.headers.get("origin", "")
        if origin in self.origins:
            fields["Access-Control-Allow-Origin"] = origin
            fields["Access-Control-Expose-Headers"] = "Retry-After"
            if "access-control-request-method" in request.headers:
                fields["Access-Control-Allow-Methods"] = methods
                fields["Access-Control-Allow-Headers"] = "Authorization, Content-Type"
                fields["Access-Control-Max-Age"] = "600"
        return fields


@functools.lru_cache(maxsize=100)
def is_loopback(host: str) -> bool:
    """Return whether a name or an address, perhaps with a port, is this machine's."""
    return bool(LOOPBACK.fullmatch(host))


def is_address(host: str) -> bool:
    """Return whether this is an IP address, in brackets or without."""
    try:
        ipaddress.ip_address(re.sub(r"^\[(.*)\]$", r"\1", host))
    except ValueError:
        return False
    return True


# - against settings that could never match


def validate_token(token: str | None) -> None:
    """Raise ValueError for a token that no client, or no browser, could send.

    A browser's WebSocket offers it in the name of a subprotocol (RFC 9110 §5.6.2). An
    empty token is a mistake, such as a variable that was never set.
    """
    if token is None:
        return
    if not re.fullmatch(TOKEN, token):  # the message must not reveal it
        raise ValueError(
            "--token, or MIZUSYNC_TOKEN: a token has 1 or more letters, digits and "
            "!#$%&'*+-.^_`|~, nothing else"
        )


def validate_names(names: Iterable[str], pattern: re.Pattern[str]) -> frozenset[str]:
    """Return hosts, or origins, in lower case. Raise ValueError for one that is none.

    "null" is no origin here: a sandboxed frame of any site can have it.
    """
    if isinstance(names, str):
        raise TypeError(f"one string, {names!r}, is given for a list of them")
    valid = frozenset(name.lower() for name in names)
    for name in valid:
        if not pattern.fullmatch(name):
            raise ValueError(
                f"{name[:100]!r} can never match: --allow-origin takes "
                "https://example.org, --allow-host sync.example"
            )
    return valid


# --- Session --------------------------------------------------------------------------
# One live client of the protocol, from its handshake to on_close. While its socket is
# full, a session is owed one cursor for each topic, the newest: so a slow reader costs
# a set of names, not a queue.

MAX_AUTH_FAILURES = 3  # in a row, when on_auth is asked again about a session


class Session:
    """One client that is connected to /ws: a Subscriber of the hub."""

    def __init__(
        self, websocket: WebSocket, hub: Hub, tasks: Tasks, scope: str, identity: Any
    ) -> None:
        self.id = secrets.token_urlsafe(9)
        self.scope = scope  # the one that it connected with
        self.identity = identity  # what on_auth returned for that scope
        self.granted = {scope}  # allowed even without a subscription
        self.websocket = websocket
        peer = websocket.request.peer
        who = "" if identity is None else f" for {identity!r:.100}"
        websocket.label = f"session {self.id} of {scope!r}{who} from {peer}"
        self.hub = hub
        self.settings = websocket.settings
        self.topics: dict[str, int] = {}  # with the newest cursor that each was sent
        self.pending_topics: set[str] = set()  # owed their newest cursor
        self.tasks = Tasks(tasks)  # they end with the session
        self._flushing: asyncio.Task[None] | None = None
        # The kernel holds little for the peer, and the transport reports all that it
        # has to hold: so a slow reader shows at once.
        transport = websocket.connection.transport
        transport.set_write_buffer_limits(high=0)
        sock = transport.get_extra_info("socket")
        with contextlib.suppress(OSError):  # the peer may have reset the socket
            size = self.settings.send_buffer
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)

    @property
    def scopes(self) -> set[str]:
        """The scopes that it may use, as on_auth last said."""
        topics = [topic for topic in self.topics if topic.startswith(SYNC)]
        return self.granted.union(topic.removeprefix(SYNC) for topic in topics)

    def send(self, topic: str, data: Any) -> None:
        """Send a message of the application's; it is neither merged nor skipped.

        A session with more than `max_session_queue` unsent bytes is closed with 1013.
        """
        text = encode_message(topic, encode_json(data).encode())
        self.message(encode_frame(TEXT, text))

    def send_error(self, code: str, sentence: str, scope: str | None = None) -> None:
        """Tell the client that a message, or a scope, is refused."""
        text = encode_message("error", encode_error(code, sentence, scope))
        self.message(encode_frame(TEXT, text))

    async def drain(self) -> None:
        """Wait until the client has read all: one that does not is not read from."""
        with contextlib.suppress(OSError):  # the peer is gone
            await self.websocket.drain()

    def close(self, code: int = 1000, reason: str = "") -> None:
        """Close with a code of RFC 6455 §7.4."""
        self.websocket.close(code, reason)

    # -- what the hub calls

    def hint(self, topic: str, cursor: int, message: bytes) -> None:
        """Send a hint, or owe it while the socket is full."""
        if self.websocket.connection.unsent_size:
            self.pending_topics.add(topic)
            if self._flushing is None or self._flushing.done():
                self._flushing = self.tasks.spawn(self._flush())
        elif cursor >= self.topics.get(topic, 0):
            self.topics[topic] = cursor
            self.websocket.write(message)

    async def _flush(self) -> None:
        """Send the newest cursor of each pending topic once the socket has room."""
        with contextlib.suppress(OSError):  # the peer is gone
            while self.pending_topics:
                await self.websocket.drain()
                topics = self.pending_topics
                self.pending_topics = set()
                for topic in topics:
                    self.hub.send_current(topic, self)

    def message(self, message: bytes) -> None:
        """Send a message that may not be skipped, or close with 1013."""
        unsent = self.websocket.connection.unsent_size
        if unsent + len(message) > self.settings.max_session_queue:
            self.close(1013, "too slow for a topic that is not merged")
        else:
            self.websocket.write(message)

    # -- topics

    def subscribe(self, topic: str, changes: bool = False) -> None:
        """Subscribe to a topic. Raise TooLarge past `max_session_topics`."""
        most = self.settings.max_session_topics
        if topic not in self.topics and len(self.topics) >= most:
            raise TooLarge(f"a session has at most {most} topics")
        self.topics.setdefault(topic, 0)
        self.hub.subscribe(topic, self, changes)

    def unsubscribe(self, topic: str) -> None:
        """Unsubscribe from a topic, and forget what was owed there."""
        self.topics.pop(topic, None)
        self.pending_topics.discard(topic)
        self.hub.unsubscribe(topic, self)

    def end(self) -> None:
        """Unsubscribe from every topic, and end the tasks of this session.

        A task of the application's that handles a message is left to its end.
        """
        for topic in list(self.topics):
            self.unsubscribe(topic)
        for task in self.tasks.running:
            if not task.cancelling():  # it may be cleaning up already
                task.cancel()

    def forbid(self, scope: str, refusal: Forbidden) -> None:
        """End the subscription to a scope, and tell the client so."""
        self.granted.discard(scope)
        self.unsubscribe(f"{SYNC}{scope}")
        self.send_error(refusal.code, str(refusal), scope)


@dataclasses.dataclass(eq=False)
class LiveEndpoint:
    """The endpoint /ws, with all sessions that are open.

    `on_message(session, topic, data)` gets the messages that are not the protocol's,
    `on_close(session, error)` is called at the end of each session.
    """

    engine: Engine
    hub: Hub
    gate: Gate
    tasks: Tasks
    settings: Settings
    on_message: Callable[[Session, str, Any], Any] | None
    on_close: Callable[[Session, Exception | None], Any] | None
    sessions: set[Session] = dataclasses.field(default_factory=set)

    async def run_session(self, websocket: WebSocket) -> None:
        """Serve one session, from its handshake to on_close."""
        scope, identity = await self.gate.authorize_query(websocket.request)
        if len(self.sessions) >= self.settings.max_sessions:
            raise Unavailable("the server has too many sessions")
        websocket.accept()
        session = Session(websocket, self.hub, self.tasks, scope, identity)
        self.sessions.add(session)
        interval = self.settings.auth_interval
        if interval is not None:
            session.tasks.spawn(self._ask_again(session, interval))
        work: asyncio.Task[None] | None = None
        try:
            while True:
                # Messages are handled one at a time, in order. While one is handled,
                # the next one is received: so pings are answered until it has arrived.
                message = await websocket.receive()
                if work and not await self._finish(work, websocket):
                    break
                if message is None:
                    break
                work = await self._handle(session, message)
        except Exception as error:
            websocket.error = error
            raise
        finally:
            self.sessions.discard(session)
            session.end()
            if self.on_close:
                await call_app_safely(self.on_close, session, websocket.error)

    async def _finish(self, work: asyncio.Task[None], websocket: WebSocket) -> bool:
        """Wait until a message is handled. Return False if the peer left first."""
        while not work.done():
            await asyncio.wait([work], timeout=self.settings.close_timeout)
            if websocket.connection.is_closing:
                break
        return work.done()

    async def _handle(
        self, session: Session, raw: str | bytes
    ) -> asyncio.Task[None] | None:
        """Handle one message. Return a task if the application works on it."""
        try:
            if isinstance(raw, bytes):
                session.close(1003, "messages are text")
                return None
            message = await parse_json_aside(raw.encode(), self.settings)
            topic = message.get("topic") if isinstance(message, dict) else None
            if not isinstance(topic, str):
                raise InvalidRequest('a message is {"topic": "...", "data": ...}')
            if topic in ("subscribe", "unsubscribe"):
                options = message.get("data", {})
                if not isinstance(options, dict):
                    raise InvalidRequest(f"the data of {topic} is an object")
                scope = check_scope(options.get("scope", session.scope))
                if topic == "subscribe":
                    changes = options.get("changes") is True
                    work = self._subscribe(session, scope, changes)
                    return session.tasks.spawn(work)
                session.unsubscribe(f"{SYNC}{scope}")
                return None
            if self.on_message and not topic.startswith(SYNC):
                data = message.get("data")
                call = call_app_safely(self.on_message, session, topic, data)
                return self.tasks.spawn(call)
            session.send_error("unknown_topic", f"nothing listens to {topic[:100]!r}")
        except InvalidRequest as refusal:
            session.send_error("invalid_message", str(refusal))
        except SyncError as refusal:
            session.send_error(refusal.code, str(refusal))
        await session.drain()
        return None

    async def _subscribe(self, session: Session, scope: str, changes: bool) -> None:
        """Subscribe a session to a scope, if on_auth allows it."""
        topic = f"{SYNC}{scope}"
        try:
            await self.gate.authorize(session.websocket.request, scope)
            if session not in self.sessions:  # it ended while on_auth was asked
                return
            # Subscribe first, then read: no change can fall between the two.
            session.subscribe(topic, changes)
            current = await self.engine.current(scope)
            if not session.websocket.closing:  # as after a restore: it was another log
                self.hub.send_current(topic, session, current)
        except Unauthorized as refusal:  # this concerns the client, not the scope
            session.close(1008, str(refusal))
        except Forbidden as refusal:
            session.forbid(scope, refusal)
            await session.drain()
        except SyncError as refusal:
            session.send_error(refusal.code, str(refusal))
            await session.drain()
        except Exception as error:
            session.websocket.error = error
            live_log.exception("on_auth failed for a session of %r", scope)
            session.close(1011, "the server failed")

    # -- against permissions that have ended

    async def _ask_again(self, session: Session, interval: float) -> None:
        """Ask on_auth again and again about each scope of a session; do what it says.

        A failure of on_auth changes nothing; after several in a row the session ends.
        """
        failures = 0
        # The end of the session cancels this task, but on_auth may have caught that.
        while session in self.sessions and failures < MAX_AUTH_FAILURES:
            await asyncio.sleep(interval)
            has_failed = False
            reason = "no scope is left"
            for scope in session.scopes:
                try:
                    async with asyncio.timeout(interval):
                        request = session.websocket.request
                        identity = await self.gate.authorize(request, scope)
                    if scope == session.scope:
                        session.identity = identity
                except Unauthorized as refusal:
                    session.close(1008, str(refusal))
                    return
                except Forbidden as refusal:
                    session.forbid(scope, refusal)
                    reason = str(refusal)
                except Exception:
                    has_failed = True
                    live_log.exception("on_auth failed for a session of %r", scope)
            if not session.scopes:
                session.close(1008, reason)
                return
            failures = failures + 1 if has_failed else 0
        session.close(1011, "on_auth failed three times in a row")


# --- Endpoints ------------------------------------------------------------------------
# From Request to Response, for the sync half of the protocol. Input is checked here,
# once; what the engine refuses comes out as a SyncError. The order is always the same:
# parse, ask for permission, call the engine, encode.

PAGE = os.path.join(os.path.dirname(__file__), "demo.html")  # optional
# The client is part one of the page's script.
CLIENT = re.compile(rb"(?ms)^// === Part one: [^\n]*\n(.*?)^// === Part two: ")


def load_client() -> Response | None:
    """Return the JavaScript client as an ES module, or None if demo.html is not here.

    A browser keeps the module, and asks before each use whether it has changed.
    """
    found = None
    with contextlib.suppress(OSError), open(PAGE, "rb") as file:
        found = CLIENT.search(file.read())
    if found is None:
        return None
    notice = f"mizusync {__version__} - Copyright (c) 2026 the mizusync authors. MIT"
    module = b"// %b License\n%b\n" % (notice.encode(), found[1].strip())
    headers = {
        "Cache-Control": "no-cache",
        # Weak: the same for the compressed module (RFC 9110 §8.8.3.3).
        "ETag": f'W/"{hashlib.sha256(module).hexdigest()[:32]}"',
        "Vary": "Accept-Encoding",
        "X-Content-Type-Options": "nosniff",
    }
    return Response(200, module, headers, "text/javascript; charset=utf-8")


@dataclasses.dataclass(eq=False)
class SyncEndpoints:
    """Push, pull, snapshot, and the client for a page."""

    engine: Engine
    gate: Gate
    settings: Settings
    may_wait: bool = True  # until the server stops
    client_module: Response | None = dataclasses.field(default_factory=load_client)

    async def push(self, request: Request) -> Response:
        """Apply the mutations that are well-formed and allowed; answer all in order."""
        values = await self._parse_push(request)
        identities: dict[str, Any] = {}
        checked = [await self._check(request, value, identities) for value in values]
        mutations = [one for one in checked if isinstance(one, Mutation)]
        applied = iter(await self.engine.push(mutations) if mutations else ())
        results = [one if isinstance(one, Result) else next(applied) for one in checked]
        encoded = b",".join(result.encoded for result in results)
        return Response(body=b"[%b]" % encoded)

    async def _parse_push(self, request: Request) -> list[Any]:
        """Return the JSON values of a push. Raise SyncError if it is malformed."""
        content_type = request.headers.get("content-type", "")
        media_type, _, _ = content_type.partition(";")
        if media_type.strip(" \t").lower() != "application/json":
            raise HTTPError(415, "a push is application/json")
        values = await parse_json_aside(request.body, self.settings)
        most = self.settings.max_push_mutations
        if not isinstance(values, list) or not values:
            raise InvalidRequest(f"a push is a JSON array of 1 to {most} mutations")
        if len(values) > most:
            raise TooLarge(f"a push has at most {most} mutations")
        return values

    async def _check(
        self, request: Request, value: Any, identities: dict[str, Any]
    ) -> Mutation | Result:
        """Return the mutation that a value describes, or the result that refuses it.

        `identities` has an identity, or a Forbidden, for each scope so far: permission
        is asked once for each.
        """
        try:
            mutation = Mutation.parse(value)
        except InvalidMutation as refusal:
            return Result.refused(refusal)
        scope = mutation.scope
        if scope not in identities:
            try:
                identities[scope] = await self.gate.authorize(request, scope)
            except Forbidden as refusal:
                identities[scope] = refusal
        identity = identities[scope]
        if identity is None:
            return mutation
        if isinstance(identity, Forbidden):
            return Result.refused(identity)
        return dataclasses.replace(mutation, identity=identity)

    async def pull(self, request: Request) -> Response:
        """Return a page of changes; with `wait`, wait for the first one."""
        scope, _ = await self.gate.authorize_query(request)
        cursor = int(request.number("cursor", 0))
        limit = int(request.number("limit", self.engine.settings.pull_limit))
        epoch = request.query.get("epoch", "")
        wait = request.number("wait", 0, r"[0-9]{1,9}(\.[0-9]{1,20})?")
        if cursor > MAX_CURSOR:
            raise InvalidRequest("the cursor has to be below 2**53")
        if limit < 1:
            raise InvalidRequest("the limit has to be 1 or more")
        pull = functools.partial(
            self.engine.pull, scope, cursor, epoch=epoch, limit=limit
        )
        if not wait or not self.may_wait:
            page = await pull()
            return Response(body=page.encode())
        try:
            async with asyncio.timeout(None) as request.wait:
                page = await pull(wait=wait)
        except TimeoutError:  # the client has closed its half: it gets what there is
            page = await pull()
        finally:
            request.wait = None
        await self.gate.authorize(request, scope)  # permission may have ended meanwhile
        return Response(body=page.encode())

    async def snapshot(self, request: Request) -> Response:
        """Return the whole state of a scope."""
        scope, _ = await self.gate.authorize_query(request)
        snapshot = await self.engine.snapshot(scope)
        return Response(body=snapshot.encode())

    def client(self, request: Request) -> Response:
        """Return the JavaScript client, or 304 if the browser's copy is current."""
        module = self.client_module
        if module is None:
            raise NotFound("the client is part of demo.html, which is not here")
        # The comparison ignores whether a tag is weak (RFC 9110 §13.1.2). Commas, and a
        # star, may also be in a tag.
        condition = request.headers.get("if-none-match", "")
        known = re.findall(r'"[^"]*"|\*', condition)
        tag = module.headers["ETag"].removeprefix("W/")
        if tag not in known and "*" not in known:
            return module
        return Response(304, headers=module.headers)


# --- Routes ---------------------------------------------------------------------------
# One table from path and method to a handler, for our endpoints and the application's
# alike. 404, 405, OPTIONS and Allow follow from it. Paths are literal: an application
# that wants patterns has a framework, and puts the engine and the hub under that.


class Route(NamedTuple):
    """A handler, and what happens before it is called."""

    handler: Callable[[Any], Any]
    is_websocket: bool = False
    needs_token: bool = False  # checked before the body is read


class Routes:
    """The routes of a server, by path and method."""

    def __init__(self) -> None:
        self.table: dict[str, dict[str, Route]] = {}

    def add(self, method: str, path: str, route: Route) -> None:
        """Add a route; one for GET answers HEAD as well.

        Raise ValueError for a path that can never match, and for one that is taken.
        """
        method = method.upper()
        if not path.startswith("/") or re.search(r"[{}<>*?#%]|/:", path):
            raise ValueError(
                f"the path {path!r} would never match: a path is literal, "
                "a slash and then no pattern, query or escape"
            )
        methods = self.table.get(path, {})
        if method in methods:
            raise ValueError(f"{method} {path} has a handler already")
        methods[method] = route
        if method == "GET" and not route.is_websocket:
            methods.setdefault("HEAD", route)
        self.table[path] = methods

    def find(self, request: Request) -> Route:
        """Return the route of a request. Raise NotFound if its path has none."""
        methods = self.table.get(request.path)
        if methods is None:
            raise NotFound(f"there is nothing at {request.path[:100]}")
        if request.method in methods:
            return methods[request.method]
        allowed = sorted({*methods, "OPTIONS"})
        allow = {"Allow": ", ".join(allowed)}

        def answer(request: Request) -> Response:
            if request.method == "OPTIONS":
                return Response(204, headers=allow)
            raise HTTPError(405, f"{request.path} takes {allow['Allow']}", allow)

        return Route(answer)


# --- HTTP server ----------------------------------------------------------------------
# Connections in, responses out, for a table of routes. Each connection has one task,
# which reads a request, calls its handler, sends the answer, and begins again.
# The sweep ends what is late, and a stop ends everything in a fixed order: first accept
# the clients that have connected, then answer what has arrived, then abort.

SWEEP_INTERVAL = 0.1  # seconds: how late a deadline may be noticed
ACCEPT_QUEUE = 1024  # connections that the kernel holds until we accept them


class HTTPServer:
    """HTTP/1.1 and WebSocket over TCP. A subclass adds its routes."""

    def __init__(self, settings: Settings, gate: Gate) -> None:
        self.settings = settings
        self.gate = gate
        self.tasks = Tasks()
        self._routes = Routes()
        self._connections: dict[Connection, WebSocket | None] = {}
        self._unsent = Unsent(settings.max_unsent)
        self._next_count = 0.0  # when to count the unsent messages again
        self._answers = Counter[int]()  # by the first digit of their status
        self._stopping = False

    def route(self, method: str, path: str) -> Callable[[T], T]:
        """Add an endpoint: `@server.route("GET", "/path")`.

        The function, or coroutine function, takes a Request and returns a Response,
        text, bytes or a JSON value. Host and Origin are checked before it is called; to
        check the client, it calls `await server.gate.authorize(request, scope)`.
        Raise ValueError for a path that can never match, and for one that is taken.
        """

        def register(handler: T) -> T:
            self._routes.add(method, path, Route(cast(Any, handler)))
            return handler

        return register

    def websocket(self, path: str) -> Callable[[T], T]:
        """Add a WebSocket: `@server.websocket("/path")`.

        The coroutine function has a WebSocket to itself. To check the client, it calls
        `gate.authorize(websocket.request, scope)` before it accepts. It learns that the
        peer has left when it receives or sends, and at no other time.
        """

        def register(handler: T) -> T:
            route = Route(cast(Any, handler), is_websocket=True)
            self._routes.add("GET", path, route)
            return handler

        return register

    # -- the life of a connection, and of a request

    async def _serve(self, sock: socket.socket) -> None:
        """Serve one connection, from accept to close."""
        try:
            connection = await Connection.open(sock, self.settings, self._unsent)
        except OSError:
            return  # the peer has reset it meanwhile
        self._connections[connection] = None
        try:
            await self._serve_requests(connection)
            await connection.close_gracefully()
        finally:
            connection.abort()
            del self._connections[connection]

    async def _serve_requests(self, connection: Connection) -> None:
        """Serve one request after the other, until none can follow."""
        try:
            if len(self._connections) > self.settings.max_connections:
                raise Unavailable("the server has too many connections")
            while True:
                request = await connection.read_request()
                response = await self._handle_safely(connection, request)
                if response is None:
                    return
                must_close = connection.body_pending or self._stopping
                keep_alive = request.keep_alive and not must_close
                data = await self._encode(request, response, keep_alive)
                # While the client reads, only `data` is kept.
                del request, response
                connection.request = None
                await connection.send(data)
                self.on_answer()
                if not keep_alive:
                    return
                if connection.buffer:
                    await asyncio.sleep(0)  # pipelined requests leave others their turn
        except SyncError as refusal:
            # This request can't be read, so nothing behind it can be read as one. Log
            # a full server at info, but the garbage of a port scan at debug.
            write_line = http_log.info if refusal.status == 503 else http_log.debug
            write_line("no request from %s: %r", connection.peer, refusal)
            self._answers[refusal.status // 100] += 1
            head_only = connection.buffer.startswith(b"HEAD ")
            answer = Response.refusal(refusal).encode("close", head_only)
            with contextlib.suppress(OSError):
                await connection.send(answer)
        except OSError as error:
            http_log.debug("no more requests: %r", error)

    async def _handle_safely(
        self, connection: Connection, request: Request
    ) -> Response | None:
        """Handle a request; log any failure, and answer it with 500.

        A refusal of the application may have a header that no response can hold.
        """
        try:
            return await self._handle(connection, request)
        except Exception:
            http_log.exception("failed on %s %s", request.method, request.path)
            return Response.refusal(SyncError("the server failed on this request"))

    async def _handle(
        self, connection: Connection, request: Request
    ) -> Response | None:
        """Return the response to a request; None after a WebSocket has ended."""
        try:
            self.gate.check_site(request)
            self._unsent.check()
            route = self._routes.find(request)
            if route.is_websocket:
                websocket = WebSocket(connection, request)
                self._connections[connection] = websocket
                await run_websocket(websocket, route.handler)
                return None
            if route.needs_token:
                self.gate.authenticate(request)
            request.body = await connection.read_body(request)
            response = Response.of(await call_app(route.handler, request))
            if request.method in ("GET", "HEAD"):
                # Many pulls may have waited for one change. (A push is applied by now,
                # so its answer is owed.)
                self._unsent.check()
            return response
        except SyncError as refusal:
            if request.is_handshake:
                details = request.path, request.peer, refusal.status, str(refusal)
                live_log.info("refused a WebSocket at %r from %s: %s %r", *details)
            return Response.refusal(refusal)

    async def _encode(
        self, request: Request, response: Response, keep_alive: bool
    ) -> bytes:
        """Return a response as bytes, with CORS and gzip where the request wants it."""
        http_log.debug("%s %r -> %s", request.method, request.path, response.status)
        self._answers[response.status // 100] += 1
        methods = response.headers.get("Allow", "GET")
        cors_fields = self.gate.cors_fields(request, methods)
        if cors_fields:
            response = response.with_fields(cors_fields)
        if len(response.body) > self.settings.min_gzip_size and request.accepts_gzip:
            with self._unsent.counting(len(response.body)):
                response = await asyncio.to_thread(response.compress)
        connection = "" if keep_alive else "close"
        return response.encode(connection, head_only=request.method == "HEAD")

    # -- accepting, and the sweep

    async def _accept(self, listener: socket.socket) -> None:
        """Accept connections, and serve each in a task of its own.

        asyncio.start_server would log without end while descriptors are used up.
        """
        loop = asyncio.get_running_loop()
        logged_at = -math.inf
        while not self._stopping:
            try:
                # Fail here, before a client is accepted, unless the descriptors that
                # the readers of the database may need are free.
                with contextlib.ExitStack() as spare:
                    for _ in range(2 * self.settings.readers + 2):
                        descriptor = os.open(os.devnull, os.O_RDONLY)
                        spare.callback(os.close, descriptor)
                sock, _ = await loop.sock_accept(listener)
            except OSError as error:
                if time.monotonic() > logged_at + 60:
                    http_log.error("new clients wait: %s", error)
                    logged_at = time.monotonic()
                await asyncio.sleep(0.1)
            else:
                self.tasks.spawn(self._serve(sock))
                await asyncio.sleep(0)  # in a flood, others have their turn

    async def _sweep(self) -> None:
        """Look at every deadline, ten times a second."""
        while True:
            await asyncio.sleep(SWEEP_INTERVAL)
            try:
                self.on_sweep(time.monotonic())
            except Exception:  # nobody would start this task again
                http_log.exception("the sweep failed")

    def on_sweep(self, now: float) -> None:
        """Act on the deadlines that have passed. A subclass adds its own."""
        due = [one for one in self._connections if one.deadline <= now]
        for connection in due:
            connection.check_deadline(now)
        if now >= self._next_count:  # seldom: it takes 2 ms for 10,000 sessions
            self._next_count = now + 1
            self._unsent.messages = sum(
                connection.unsent_size
                for connection, websocket in self._connections.items()
                if websocket and websocket.accepted
            )

    def on_answer(self) -> None:
        """Do what follows each answer. For a subclass."""

    def on_start(self) -> None:
        """Do what comes before the first request. For a subclass."""

    def on_stop(self) -> None:
        """End what waits: the server stops. For a subclass."""

    # -- start and stop

    @contextlib.asynccontextmanager
    async def listen(
        self, host: str, port: int, *, reuse_port: bool = False
    ) -> AsyncIterator[tuple[str, int]]:
        """Serve on the running loop while the block lasts; yield the address.

        Port 0 takes a free port. Raise OSError if it can't listen there. A server can
        listen again after the block, but not at two places at once.
        """
        listeners = open_listeners(host, port, reuse_port)
        name, number = listeners[0].getsockname()[:2]
        names = [listener.getsockname()[0] for listener in listeners]
        self.gate.beyond_loopback = not all(map(is_loopback, names))
        self._stopping = False
        self.on_start()
        sweep = self.tasks.spawn(self._sweep())
        accepting = [self.tasks.spawn(self._accept(one)) for one in listeners]
        try:
            yield name, number
        finally:
            self.on_stop()
            try:
                await self._stop_accepting(listeners, accepting)
                await self._finish_requests(sweep)
            finally:  # also when this task is cancelled in there
                await self._abort_all()

    async def _stop_accepting(
        self, listeners: list[socket.socket], accepting: list[asyncio.Task[None]]
    ) -> None:
        """Close the listeners, after taking the clients that have connected.

        The kernel has accepted them for us, and would reset them.
        """
        self._stopping = True
        loop = asyncio.get_running_loop()
        for listener in listeners:
            with contextlib.suppress(NotImplementedError):  # Windows has no such call
                loop.remove_reader(listener)
        await asyncio.sleep(0)  # let an accept that is under way finish
        for task in accepting:
            task.cancel()
        for listener in listeners:
            with contextlib.suppress(OSError):  # there is none left
                for _ in range(ACCEPT_QUEUE):
                    sock, _ = listener.accept()
                    self.tasks.spawn(self._serve(sock))
            listener.close()
        # Turns of the loop: to start the task, to connect the streams (two), to receive
        # the first request, and to parse it.
        for _ in range(5):
            await asyncio.sleep(0)

    async def _finish_requests(self, sweep: asyncio.Task[None]) -> None:
        """Answer what has arrived, end waits, close WebSockets with 1001."""
        deadline = time.monotonic() + self.settings.shutdown_timeout
        while self.tasks.running - {sweep} and time.monotonic() < deadline:
            for connection, websocket in list(self._connections.items()):
                if websocket and websocket.accepted:
                    websocket.close(1001, "the server is stopping")
                elif connection.phase is Phase.IDLE:
                    connection.interrupt(ConnectionError("the server is stopping"))
                else:
                    connection.interrupt(Unavailable("the server is stopping"))
            await asyncio.sleep(0.005)

    async def _abort_all(self) -> None:
        """End every connection and every task that is left."""
        for connection in list(self._connections):
            connection.abort()
        for _ in range(2):  # the first cancel runs on_close, which may hang too
            for task in self.tasks.running:
                task.cancel()
            if self.tasks.running:
                timeout = self.settings.linger_timeout
                await asyncio.wait(self.tasks.running, timeout=timeout)


def open_listeners(host: str, port: int, reuse_port: bool) -> list[socket.socket]:
    """Return a listening socket for each address of a host that this machine has.

    All have the same port. Raise OSError if there is none, or if one is in use.
    """
    found = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    found = list(dict.fromkeys(found))  # some systems name an address twice
    listeners: list[socket.socket] = []
    missing = OSError(f"{host} has no address")
    with contextlib.ExitStack() as undo:
        for family, _, _, _, (address, _, *interface) in found:
            try:
                listener = socket.create_server(
                    (address, port, *interface),
                    family=family,
                    backlog=ACCEPT_QUEUE,
                    reuse_port=reuse_port,
                )
            except OSError as error:
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                missing = error  # it is another machine's, or IPv6 is off
                continue
            undo.callback(listener.close)
            listener.setblocking(False)
            listeners.append(listener)
            port = listener.getsockname()[1]  # the first one chooses a free port
        if not listeners:
            raise missing
        undo.pop_all()
    return listeners


# --- Server ---------------------------------------------------------------------------
# The wiring of the two halves, and the one arrow between them: the engine notifies the
# hub of each commit, and the hub sends hints to the sessions. Without that arrow (see
# on_start) both halves still work, and clients poll.


@contextlib.contextmanager
def stopping_at_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` at a SIGTERM or SIGINT; let a second one end the process at once.

    A KeyboardInterrupt would not do that: if it is raised in the loop's own code, a
    task may never be woken again, and asyncio.run waits for all tasks. Nor would it end
    a thread that reads the database.
    """
    numbers = (signal.SIGTERM, signal.SIGINT)

    def on_signal(*_: object) -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
        stop()

    old = {}
    with contextlib.suppress(ValueError):  # only the first thread may set a handler
        for number in numbers:
            old[number] = signal.signal(number, on_signal)
    try:
        yield
    finally:
        for number, handler in old.items():
            # None stands for a handler in C, which can't be set again.
            signal.signal(number, handler or signal.SIG_DFL)


def check_topic(topic: str) -> None:
    """Raise ValueError for a topic of the engine's: on_auth guards those."""
    if topic.startswith(SYNC):
        raise ValueError(f"{topic!r}: topics that begin with sync: are the engine's")


def check_policy(csp: str | None, page: StrPath | None) -> None:
    """Raise TypeError or ValueError for a `csp` that can't be a page's policy."""
    if csp is None:
        return
    if not isinstance(csp, str):
        raise TypeError(f"csp is a string, not {type(csp).__name__}")
    if page is None:
        raise ValueError("csp is the policy of a page: it needs page=")
    if not (csp and csp.isascii() and csp.isprintable()):
        rule = "a line of printable ASCII, with a semicolon between its directives"
        raise ValueError(f"csp={csp!r}: a policy is {rule}")


class Server(HTTPServer):
    """HTTP and WebSocket over an engine.

    `token`, `allow_origin` and `allow_host` mean what the flags of the command line
    mean; a value that can never match raises ValueError. `page` is an HTML file for
    `GET /`; an OSError is raised if it can't be read. `csp` replaces the page's
    Content-Security-Policy, which allows the scripts and styles in the page, and
    scripts and workers of this server's origin.

    `on_auth(request, scope)` returns the identity of the client. To refuse it, it
    raises Unauthorized or Forbidden; False means Forbidden, and any other value, None
    too, grants access. `on_message(session, topic, data)` gets the messages that are
    not the protocol's; `on_close(session, error)` is called at each session's end. Each
    may be a function or a coroutine function.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        settings: Settings | None = None,
        token: str | None = None,
        allow_origin: Iterable[str] = (),
        allow_host: Iterable[str] = (),
        on_auth: Callable[[Request, str], Any] | None = None,
        on_message: Callable[[Session, str, Any], Any] | None = None,
        on_close: Callable[[Session, Exception | None], Any] | None = None,
        page: StrPath | None = None,
        csp: str | None = None,
    ) -> None:
        validate_token(token)
        check_policy(csp, page)
        gate = Gate(
            token=token,
            hosts=validate_names(allow_host, HOST),
            origins=validate_names(allow_origin, ORIGIN),
            on_auth=on_auth,
        )
        super().__init__(settings or engine.settings, gate)
        self.engine = engine
        self.hub = Hub(self.settings, functools.partial(encode_frame, TEXT))
        self._rewinds = 0  # of the log, as far as the sessions know
        self._stop = Future[None]()  # run() waits for it
        self._sync = SyncEndpoints(engine, gate, self.settings)
        self._live = LiveEndpoint(
            engine, self.hub, gate, self.tasks, self.settings, on_message, on_close
        )
        self.sessions = self._live.sessions
        self._add_routes(page, csp)

    def _add_routes(self, page: StrPath | None, csp: str | None) -> None:
        """Add the endpoints of the protocol, and the page if there is one."""
        add = self._routes.add
        add("POST", "/sync/push", Route(self._sync.push, needs_token=True))
        add("GET", "/sync/pull", Route(self._sync.pull, needs_token=True))
        add("GET", "/sync/snapshot", Route(self._sync.snapshot, needs_token=True))
        add("GET", "/sync/client.js", Route(self._sync.client))
        add("GET", "/ws", Route(self._live.run_session, is_websocket=True))
        add("GET", "/healthz", Route(self._healthz))
        if page is not None:
            with open(page, "rb") as file:
                response = Response.page(file.read(), csp)
            add("GET", "/", Route(lambda request: response))

    # -- for the application

    def publish(self, topic: str, data: Any) -> None:
        """Send a message to the subscribers of a topic of the application's.

        Call it on the server's loop. Raise ValueError for a topic of the engine's.
        """
        check_topic(topic)
        self.hub.publish(topic, encode_json(data).encode())

    def subscribe(self, session: Session, topic: str) -> None:
        """Subscribe an open session to a topic of the application's.

        Raise TooLarge past `max_session_topics`, ValueError for a topic of the
        engine's.
        """
        check_topic(topic)
        if session in self.sessions:
            session.subscribe(topic)

    def unsubscribe(self, session: Session, topic: str) -> None:
        """Unsubscribe a session from a topic; it need not have been subscribed."""
        session.unsubscribe(topic)

    def stats(self) -> dict[str, Any]:
        """Return numbers for an operator: of the present, and since the start."""
        answers = {f"answers_{n}xx": self._answers[n] for n in (2, 3, 4, 5)}
        return {
            "version": __version__,
            "connections": len(self._connections),
            "sessions": len(self.sessions),
            "unsent_bytes": self._unsent.answers + self._unsent.messages,
            **self.engine.stats(),
            **answers,
            **self.hub.counts,
        }

    async def _healthz(self, request: Request) -> Any:
        """Report the server's health; with a token, only that the store answers."""
        head, epoch, _ = await self.engine.position()
        if self.gate.token is not None:
            return {"status": "ok"}
        return {
            "status": "ok",
            "version": __version__,
            "cursor": head,
            "epoch": epoch,
            "sessions": len(self.sessions),
        }

    # -- what the server does between requests

    def on_answer(self) -> None:
        """Let the writer have the GIL, which a busy loop would keep."""
        if self.engine.committing:
            time.sleep(0)

    def on_sweep(self, now: float) -> None:
        """Look at deadlines and silent topics."""
        super().on_sweep(now)
        self.hub.send_heartbeats(now)
        if self._rewinds != self.engine.rewinds:
            self._rewinds = self.engine.rewinds
            self._restart_sessions()

    def on_start(self) -> None:
        """Join the two halves: from here on the hub hears of each commit."""
        self._sync.may_wait = True
        self._rewinds = self.engine.rewinds
        self._remove_listener = self.engine.add_listener(self.hub.notify)
        has_lock = self.gate.token is not None or self.gate.on_auth is not None
        if self.gate.beyond_loopback and not has_lock:
            log.warning("without token and on_auth the server is open to anybody")

    def on_stop(self) -> None:
        """Separate the two halves, and end the pulls that wait."""
        self._remove_listener()
        self._sync.may_wait = False
        self.engine.end_waits()

    def _restart_sessions(self) -> None:
        """Send all clients away after an older copy of the log was restored.

        Cursors went down, and hints never do: each client reconnects, pulls and learns.
        """
        self.hub.forget_cursors()
        for session in self.sessions:
            session.close(1001, "an older copy of the log was restored: come back")

    # -- start and stop

    def run(
        self,
        host: str,
        port: int,
        announce: Callable[[str], None] = log.info,
        *,
        reuse_port: bool = False,
    ) -> None:
        """Serve until SIGTERM, SIGINT or `stop`; then finish, and close the engine.

        Call `announce` with a sentence that has the address. A second signal ends the
        process at once. Raise OSError if it can't listen there, and RuntimeError where
        a loop is running already.
        """
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            pass  # as it should be
        else:
            raise RuntimeError(
                "a loop is running here, as in Jupyter: "
                "use `async with server.listen(host, port): ...`"
            )
        time_left = None
        with stopping_at_signals(self.stop):
            try:
                deadline = asyncio.run(
                    self._run_until_stopped(host, port, announce, reuse_port)
                )
                # At least a second: slow clients may have used up the rest.
                time_left = max(1.0, deadline - time.monotonic())
            finally:
                self.engine.close(time_left)

    async def _run_until_stopped(
        self, host: str, port: int, announce: Callable[[str], None], reuse_port: bool
    ) -> float:
        """Serve until `stop`; return the deadline of the stop."""
        async with self.listen(host, port, reuse_port=reuse_port) as (name, port):
            name = f"[{name}]" if ":" in name else name
            announce(f"open http://{name}:{port}/")
            await asyncio.wrap_future(self._stop)
            return time.monotonic() + self.settings.shutdown_timeout

    def stop(self) -> None:
        """End `run`, as a signal does. Call it from any thread, also before `run`."""
        with contextlib.suppress(InvalidStateError):  # twice does no harm
            self._stop.set_result(None)


# --- Todo -----------------------------------------------------------------------------
# The demo, as an application would write it: its tables, its apply, its snapshot. It
# uses public names alone, so it can be copied as a beginning.

TODO_SCHEMA = """
    CREATE TABLE IF NOT EXISTS todos (
        position INTEGER PRIMARY KEY,
        scope TEXT NOT NULL,
        id TEXT NOT NULL,
        title TEXT NOT NULL,
        completed INTEGER NOT NULL,
        UNIQUE (scope, id)
    );
"""


def apply_todo(db: sqlite3.Connection, mutation: Mutation) -> list[Any]:
    """Create, update, toggle or delete a todo; each scope has a list of its own."""
    # Whatever is raised here undoes this mutation alone.
    args = mutation.args if isinstance(mutation.args, dict) else {}
    check_todo(args)
    key = {"scope": mutation.scope, "id": args["id"]}
    sql = "SELECT title, completed FROM todos WHERE scope = :scope AND id = :id"
    old = db.execute(sql, key).fetchone()
    match mutation.name, old:
        case "todo.create", None:
            if "title" not in args:
                raise InvalidMutation("a new todo needs a title")
            new = {"title": args["title"], "completed": False}
        case "todo.create", _:
            raise Conflict("this todo is there already")
        case "todo.update" | "todo.toggle" | "todo.delete", None:
            raise NotFound("this todo is not there")
        case "todo.update", (title, completed):
            new = {"title": title, "completed": bool(completed)}
            new |= {name: args[name] for name in new if name in args}
        case "todo.toggle", (title, completed):
            new = {"title": title, "completed": not completed}
        case "todo.delete", _:
            db.execute("DELETE FROM todos WHERE scope = :scope AND id = :id", key)
            return [{"op": "delete", "id": args["id"]}]
        case _:
            raise InvalidMutation(f"there is no mutation {mutation.name!r}")
    sql = """
        INSERT INTO todos (scope, id, title, completed)
        VALUES (:scope, :id, :title, :completed)
        ON CONFLICT (scope, id) DO UPDATE SET title = :title, completed = :completed
    """
    db.execute(sql, key | new)
    # What every client of the scope will see.
    todo = {"id": args["id"]} | new
    return [{"op": "update" if old else "create", "todo": todo}]


def check_todo(args: Mapping[str, Any]) -> None:
    """Raise InvalidMutation unless the args of a mutation describe a todo."""
    key = args.get("id")
    if not isinstance(key, str) or not 1 <= len(key) <= 128:
        raise InvalidMutation("a todo's id is a string of 1 to 128 characters")
    title = args.get("title", "-")
    if not isinstance(title, str) or not 1 <= len(title) <= 1000:
        raise InvalidMutation("a todo's title is a string of 1 to 1,000 characters")
    if not isinstance(args.get("completed", False), bool):
        raise InvalidMutation("completed is true or false")


def snapshot_todos(db: sqlite3.Connection, scope: str) -> Json:
    """Return all todos of a scope. SQLite writes the JSON fast, without the GIL."""
    sql = """
        SELECT json_group_array(json_object(
            'id', id,
            'title', title,
            'completed', json(CASE WHEN completed THEN 'true' ELSE 'false' END)
        ))
        FROM (SELECT * FROM todos WHERE scope = ? ORDER BY position)
    """
    return Json(f'{{"todos":{db.execute(sql, (scope,)).fetchone()[0]}}}')


def require_scope(request: Request, scope: str) -> None:
    """Refuse a socket of the demo that names no scope, so that a mistake shows."""
    if request.path == "/ws" and "scope" not in request.query:
        raise Unauthorized("name a scope: /ws?scope=...")


# --- Command line ---------------------------------------------------------------------
# python mizusync.py: flags, the log, and the todo demo. A failure at the start is one
# sentence on stderr and an exit status: 1 if the program can't run, 2 for a
# wrong command line. Nobody has to read its output: neither a full pipe nor a paused
# terminal stops the server.

LOG_LINES = 1000  # that wait to be written; more are dropped, and counted
LOG_FLUSH = 1.0  # seconds that an exit waits for them


class LogWriter(logging.Handler):
    """Write log lines from a daemon thread, so that nobody waits for their reader.

    A terminal that is paused, or a full pipe, would otherwise stop the event loop.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        # Not a file object: a blocked write would hold its lock, which the exit takes.
        self.descriptor = descriptor
        self.dropped = 0
        # Garbage collection may log in the middle of a put. A SimpleQueue allows that.
        self.waiting = queue.SimpleQueue[str | threading.Event]()
        threading.Thread(target=self._write, daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a line; drop it if too many wait."""
        if self.waiting.qsize() < LOG_LINES:
            self.waiting.put(self.format(record))
        else:
            self.dropped += 1

    def flush(self) -> None:
        """Wait, but not for long, until all is written. `logging` calls it at exit."""
        written = threading.Event()
        self.waiting.put(written)
        written.wait(LOG_FLUSH)

    def _write(self) -> None:
        """Write one line after the other, as long as the process lives."""
        while True:
            line = self.waiting.get()
            if isinstance(line, threading.Event):
                line.set()
                continue
            if self.dropped:
                line += f"\n{self.dropped} log lines were dropped: nobody read them"
                self.dropped = 0
            data = f"{line}\n".encode(errors="backslashreplace")
            with contextlib.suppress(OSError):  # nobody is left to be told
                while data:
                    data = data[os.write(self.descriptor, data) :]


def log_to_stderr(level: str) -> None:
    """Set up logging for the program, unless its caller has done so."""
    handler: logging.Handler
    try:
        handler = LogWriter(sys.stderr.fileno())
    except (AttributeError, OSError):  # there is none, or it is no file
        handler = logging.StreamHandler()
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
        level=level.upper(),
        handlers=[handler],
    )


def say(line: str) -> None:
    """Print a line, whatever characters it has and whoever reads it."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        print(line, flush=True)
    except OSError:  # its reader has gone; the flush at the exit would fail as well
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line, with its help."""
    parser = argparse.ArgumentParser(
        prog="mizusync",
        description="A durable sync server with instant updates: the todo demo.",
    )
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    add("--port", type=int, default=8080, help="port; 0 takes a free one (%(default)s)")
    add("--db", default="mizusync.db", help="the database file (%(default)s)")
    trim = "trim the log to about so many changes a scope"
    add("--keep-changes", type=int, help=trim)
    token = os.environ.get("MIZUSYNC_TOKEN")
    add("--token", default=token, help="what clients must show")
    origin = "a web origin that may use the server"
    add("--allow-origin", action="append", default=[], help=origin)
    name = "a name that the server goes by"
    add("--allow-host", action="append", default=[], help=name)
    add("--reuse-port", action="store_true", help="share the port with other processes")
    add("--log-level", default="warning", choices=["debug", "info", "warning", "error"])
    add("--version", action="version", version=f"mizusync {__version__}")
    return parser


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments; end the program with 2 and a sentence for a wrong one."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if not 0 <= args.port <= 65535:
        parser.error(f"--port {args.port}: a port is a number from 0 to 65535")
    try:
        args.settings = Settings(keep_changes=args.keep_changes)
        validate_token(args.token)
        validate_names(args.allow_origin, ORIGIN)
        validate_names(args.allow_host, HOST)
    except ValueError as error:
        parser.error(str(error))
    return args


def make_todo_server(args: argparse.Namespace) -> Server:
    """Return the server of the demo. Raise StoreError, or OSError for its page."""
    engine = Engine(
        args.db,
        apply=apply_todo,
        snapshot=snapshot_todos,
        schema=TODO_SCHEMA,
        settings=args.settings,
    )
    has_page = os.path.exists(PAGE)
    server = Server(
        engine,
        token=args.token,
        allow_origin=args.allow_origin,
        allow_host=args.allow_host,
        on_auth=require_scope,
        page=PAGE if has_page else None,
    )
    if not has_page:
        advice = "It serves. Its page, demo.html, is not beside mizusync.py.\n"
        server.route("GET", "/")(lambda request: advice)
    return server


def main(argv: Sequence[str] | None = None) -> int:
    """Serve the todo demo. Return the exit status: 0, or 1 if it can't run."""
    args = parse_args(argv)
    log_to_stderr(args.log_level)
    try:
        server = make_todo_server(args)

        def announce(where: str) -> None:
            say(f"mizusync {__version__}: {where} (data in {args.db})")
            if args.token is None and server.gate.beyond_loopback:
                log.warning("without --token, %s is open to anybody", args.host)

        server.run(args.host, args.port, announce, reuse_port=args.reuse_port)
    except KeyboardInterrupt:
        return 130
    # A UnicodeError comes from a name that no host can have.
    except (StoreError, OSError, UnicodeError) as error:
        print(f"mizusync: {args.host}:{args.port}, {args.db}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
