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

The life of one change, and the section in which each step stands:

    bytes -> Request                HTTP/1.1        refused if two parsers could differ
    Request -> [Mutation, ...]      Server          checked once, at the door
    -> a Job in the queue           Jobs            in the order of arrival
    -> rows, a mark, a result       Batch           each mutation under a savepoint
    -> one transaction              Writer          one fsync for all jobs that wait
    -> Change 42 in the log         SQLite          a number that is never issued again
    -> the answer, and the hint     Listeners       one hop from the writer to the loop
    -> every session                Hub             the same bytes for all
    -> a pull                       Tail            a join of encoded bytes

Contents. A section calls only what stands above it. In each one the heart comes first.
What stands behind a comment that begins with "against" is about faults and misuse, and
can wait for a second reading:

    Settings        every limit and every timeout
    Errors          what a client may be told; what closes a socket
    JSON            strict, and limited before it is parsed
    Protocol        the words of protocol 1, and every byte of it
    Store           the change log: its rules, and the SQL that is the same everywhere
    Guard           the connection that `apply` gets, and what it may not do
    Database file   how a file is created, opened and checked
    SQLite          the log in that file
    Tail            the newest changes in memory
    Listeners       from the writer's thread back to each loop
    Jobs            what waits for the writer
    Batch           one transaction in the making
    Retention       trims
    Writer          one thread, one transaction, one fsync
    Engine          push, pull and snapshot, without a network
    Hub             topics, and their subscribers
    HTTP/1.1        bytes to requests, responses to bytes
    WebSocket       frames and messages
    Connection      a socket: bytes, deadlines, a close that the peer can read
    Session         one live client
    Gate            access: Host, Origin, token, on_auth
    Server          routes, sessions, life; the arrow from engine to hub
    Todo            the demo, as an application would write it
    Command line    python mizusync.py

Where to add: a limit in Settings; an error that `apply` may raise in Errors, with
APPLY_MAY_RAISE and its code in COUNTERS; a counter in COUNTERS; a column in LOG_SCHEMA,
with FORMAT and Row; an endpoint where Server is made; state of one client in Session.

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
import functools
import gzip
import hashlib
import hmac
import http
import inspect
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
import ssl as tls
import threading
import time
import urllib.parse
import weakref
from collections import Counter, OrderedDict
from collections.abc import (
    AsyncIterator,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

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

log = logging.getLogger("mizusync")  # without a handler: the application decides
store_log = log.getChild("store")
engine_log = log.getChild("engine")
http_log = log.getChild("http")
live_log = log.getChild("live")

T = TypeVar("T")


# --- Settings -------------------------------------------------------------------------
# Every limit and every timeout is one line here. Sizes are in bytes, times in seconds.
# Whatever a peer can make grow has a limit here, or a constant beside the code that
# uses it.

MIB = 1024 * 1024  # bytes

# These may be 0. Other whole numbers are at least 1, and other times above 0.
MAY_BE_ZERO = {
    "max_pull_wait", "min_gzip_size", "linger_timeout", "max_hint_changes",
    "max_hint_size", "hint_gap", "max_sessions", "shutdown_timeout", "max_commit_time",
    "max_tail_changes", "max_tail_size", "busy_timeout",
}  # fmt: skip
# Limits of the system: a thread that reads needs descriptors, SO_SNDBUF and SQLite's
# busy timeout (in milliseconds) are C integers.
LARGEST = {
    "readers": 256,
    "send_buffer": 2**31 - 1,
    "busy_timeout": 10**6,
}


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
    max_unsent: int = 256 * MIB  # of answers that no peer has read yet; then 503
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
            check_setting(field.name, value, is_whole)


def check_setting(name: str, value: Any, is_whole: bool) -> None:
    """Raise TypeError or ValueError for a wrong setting, and name it."""
    kind = "a whole number" if is_whole else "a number of seconds"
    types = int if is_whole else (int, float)
    if not isinstance(value, types) or isinstance(value, bool):
        raise TypeError(f"Settings({name}={value!r}): it has to be {kind}")
    largest = LARGEST.get(name, 10**15)
    if name in MAY_BE_ZERO:
        rule = "0 or more"
        fits = 0 <= value <= largest
    elif is_whole:
        rule = "1 or more"
        fits = 1 <= value <= largest
    else:
        rule = "above 0"
        fits = 0 < value <= largest
    if not fits:  # NaN compares with nothing, so it does not fit
        raise ValueError(
            f"Settings({name}={value!r}): it has to be {kind}, {rule}, "
            f"at most {largest:,}"
        )


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


# What `apply` raises to refuse a mutation; a subclass may have a code of its own. (Not
# StoreRefused: it says that the whole transaction is lost.)
APPLY_MAY_RAISE = (InvalidMutation, NotFound, Conflict, Forbidden, Unavailable)


class HTTPError(SyncError):
    """A refusal that concerns HTTP alone. Its status implies its code."""

    CODES: ClassVar = {
        405: "method_not_allowed", 408: "request_timeout", 414: "uri_too_long",
        415: "unsupported_media_type", 426: "upgrade_required",
        431: "headers_too_large", 501: "not_implemented", 505: "version_not_supported",
    }  # fmt: skip

    def __init__(
        self,
        status: int,
        sentence: str,
        headers: Mapping[str, str] | None = None,
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


def log_error(logger: logging.Logger, *message: Any, traceback: bool = True) -> None:
    """Log an error. Ignore what a logging filter of the application raises."""
    with contextlib.suppress(Exception):
        logger.error(*message, exc_info=traceback)


# --- JSON -----------------------------------------------------------------------------
# Strict JSON (RFC 8259), with limits that hold before anything is built in memory:
# json.loads has a depth limit that differs between versions, no other limit, and it
# blocks every thread while it parses.

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
    for text that is no JSON or is nested deeper than `max_depth`, for NaN and
    infinities, and for half a surrogate pair.
    """
    # These counts include the brackets and commas inside strings. Only if they exceed a
    # limit, count again without the strings.
    openings = raw.count(b"[") + raw.count(b"{")
    if openings > max_depth or openings + raw.count(b",") > max_values:
        check_structure(without_strings(raw), max_depth, max_values)
    try:
        # json.loads(bytes) would guess UTF-16 and UTF-32 as well, so decode first.
        value = _DECODER.decode(raw.decode("utf-8"))
        if b"\\u" in raw:
            encode_json(value).encode("utf-8")  # fails for half a surrogate pair
    except (ValueError, RecursionError) as error:
        reason = str(error)[:200]
        raise InvalidRequest(f"the JSON can't be read: {reason}") from None
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


# Against JSON that is deep, or has very many values.

_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_LEVELS = {
    ord("["): 1,
    ord("{"): 1,
    ord("]"): -1,
    ord("}"): -1,
}


def without_strings(raw: bytes) -> bytes:
    """Return JSON text without its strings. An unterminated string runs to the end.

    The time is linear in the size; a regular expression takes four times as long. A
    backslash outside of a string may confuse this, but parsing fails there anyway.
    """
    # First remove pairs of backslashes: an odd number of them escapes a quote.
    unescaped = raw.replace(rb"\\", b"").replace(rb"\"", b"")
    return b"".join(unescaped.split(b'"')[::2])


def check_structure(bare: bytes, max_depth: int, max_values: int) -> None:
    """Raise TooLarge for too many values, and InvalidRequest for too many levels.

    `bare` is JSON text without its strings.
    """
    openings = bare.count(b"[") + bare.count(b"{")
    if openings + bare.count(b",") > max_values:
        raise TooLarge(f"the JSON has more than {max_values} values")
    # A valid text has as many closing brackets as opening ones: cut there, so that a
    # megabyte of `]` costs nothing. An invalid text may look shallower than it is, but
    # the parser stops at the bracket that does not match.
    brackets = bare.translate(None, _NOT_BRACKETS)[: 2 * openings]
    levels = itertools.accumulate(map(_LEVELS.__getitem__, brackets))
    if max(levels, default=0) > max_depth:
        raise InvalidRequest(f"the JSON is nested deeper than {max_depth} levels")


# --- Protocol -------------------------------------------------------------------------
# The words of protocol 1 as values, and every byte of it spelled once: only this
# section knows the shape of a change, a result, a page, a snapshot, a hint, an error or
# a message. Data from outside is checked here, once; after that the types are true. A
# change is encoded once, on its way into the log; answers, pages and hints are joined
# from these encoded changes.

DEFAULT_SCOPE = "_default"
MAX_CURSOR = 2**53 - 1  # every JSON parser represents it exactly (RFC 8259 §6)
MAX_SCOPE = 256  # characters
MAX_NAME = 128  # characters of a mutation's id, and of its name
SYNC = "sync:"  # the topic of a scope is this prefix and the scope


@dataclasses.dataclass(frozen=True, slots=True)
class Json:
    """JSON text that is encoded already, by `json_group_array` for example."""

    text: str

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not self.text:
            raise TypeError(f"Json takes JSON text, not {self.text!r}")


@dataclasses.dataclass(frozen=True, slots=True)
class Mutation:
    """A client's request to change the data. Within its scope, an `id` applies once.

    `args` is any JSON value; `identity` is what `on_auth` returned for the client.
    Raise InvalidMutation if the id, the name or the scope can't be one.
    """

    id: str
    name: str
    args: Any = None
    scope: str = DEFAULT_SCOPE
    identity: Any = None

    def __post_init__(self) -> None:
        if not is_name(self.id, MAX_NAME):
            raise InvalidMutation(explain_name("id", self.id, MAX_NAME))
        if not is_name(self.name, MAX_NAME):
            raise InvalidMutation(explain_name("name", self.name, MAX_NAME))
        if not is_name(self.scope, MAX_SCOPE):
            raise InvalidMutation(explain_name("scope", self.scope, MAX_SCOPE))

    @classmethod
    def parse(cls, value: Any) -> Mutation:
        """Return the mutation that a JSON value describes. Raise InvalidMutation."""
        if not isinstance(value, Mapping):
            raise InvalidMutation("a mutation has to be a JSON object")
        return cls(
            id=value.get("id", ""),
            name=value.get("name", ""),
            args=value.get("args"),
            scope=value.get("scope", DEFAULT_SCOPE),
        )

    def with_args(self, args: Any) -> Mutation:
        """Return this mutation with other args."""
        return Mutation(self.id, self.name, args, self.scope, self.identity)


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


class Result(NamedTuple):
    """The outcome of one mutation. `encoded` is the JSON that the client gets.

    `cursor` is that of the mutation's last change, in whatever scope: a client may not
    pull from there, because others' changes may lie before it.
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
        return cls(text.encode(errors="replace"), False, code=code, error=error)

    @property
    def changes(self) -> list[Change]:
        """The changes in the mutation's own scope; none if they were left out."""
        found = json.loads(self.encoded).get("changes", ())
        return [Change(**change) for change in found]


class Page(NamedTuple):
    """Some changes of one scope, in order. The next page begins after `cursor`."""

    encoded_changes: Sequence[bytes]
    cursor: int
    epoch: str
    has_more: bool = False

    @property
    def changes(self) -> list[Change]:
        return [Change(**json.loads(change)) for change in self.encoded_changes]

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

    @property
    def data(self) -> Any:
        return json.loads(self.text)

    def encode(self) -> bytes:
        """Return the body that answers a request for a snapshot."""
        position = f'"cursor":{self.cursor},"epoch":"{self.epoch}"'
        return f'{{"data":{self.text},{position}}}'.encode()


class Hint(NamedTuple):
    """The newest cursor of a scope and, if they are few, the changes above `after`.

    `changes` (encoded) is None for a commit of another process: subscribers must pull.
    """

    cursor: int
    epoch: str = ""
    after: int = 0
    changes: tuple[bytes, ...] | None = None

    def encode(self) -> bytes:
        """Return the data of a hint that carries its changes."""
        return b'{"cursor":%d,"epoch":"%b","after":%d,"changes":[%b]}' % (
            self.cursor,
            self.epoch.encode(),
            self.after,
            b",".join(self.changes or ()),
        )


def encode_cursor(cursor: int) -> bytes:
    """Return the data of a hint without changes."""
    return b'{"cursor":%d}' % cursor


def encode_change(cursor: int, scope: str, time: str, data: str) -> bytes:
    """Return one change as the protocol writes it; `data` is JSON text."""
    place = f'"cursor":{cursor},"scope":{encode_name(scope)},"time":"{time}"'
    return f'{{{place},"data":{data}}}'.encode()


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
    """Return whether a value can name a scope or a mutation.

    A lone surrogate, half of a pair, can't: it has no UTF-8.
    """
    if not isinstance(value, str) or not 0 < len(value) <= longest:
        return False
    return value.isascii() or not re.search("[\ud800-\udfff]", value)


def explain_name(field: str, value: Any, longest: int) -> str:
    """Return a sentence that tells a client why is_name() refuses a value."""
    if not isinstance(value, str):
        fault = "is no string"
    elif not value:
        fault = "is empty or missing"
    elif len(value) > longest:
        fault = f"has {len(value)}"
    else:
        fault = "holds half a surrogate pair"
    rule = f"has to be a string of 1 to {longest} characters"
    return f"the {field} {rule}: this one {fault}"


def check_scope(value: Any) -> str:
    """Return the value if it can name a scope; raise InvalidRequest otherwise."""
    if not is_name(value, MAX_SCOPE):
        raise InvalidRequest(explain_name("scope", value, MAX_SCOPE))
    return str(value)


# --- Store ----------------------------------------------------------------------------
# The change log. Each change is a row. Each mutation that was applied leaves a row as
# well, its dedupe mark, which is never deleted. Everything here blocks: writes run on
# the writer's thread, reads on connections of their own.
#
# A reader at cursor N has everything of its scope up to N, because
#   1. one writer at a time, over all processes, issues the cursors: from the head that
#      it finds under the write lock, without a gap (begin, Batch.make_rows). So cursors
#      rise in commit order. AUTOINCREMENT keeps the head, so that not even a trim or a
#      restart lowers it (https://sqlite.org/autoinc.html);
#   2. a read is one transaction and sees one moment (read), and a page never ends
#      inside the changes of one mutation (Tail.page, Tails.load_page);
#   3. a reader below the scope's highest trimmed cursor gets cursor_too_old
#      (load_page);
#   4. a reader with a cursor of another history gets cursor_unknown (has_issued).
#
# The fourth needs epochs, because an older copy of the database may be restored and
# grow again. An example:
#
#     A begins at 0    The log grows to 60, and someone makes a backup. It grows to 100;
#                      a client pulls, and remembers (A, 100).
#     B begins at 60   The backup is restored, so the log ends at 60 again. Its next
#                      commit begins an epoch. The log grows to 200: the cursors 61 to
#                      100 now belong to other changes.
#     (A, 100) asks    A ended at 60, so the server answers cursor_unknown, and the
#                      client takes a snapshot. By the head alone, 100 of 200 would look
#                      valid, and the client would miss 40 changes.
#
# An epoch is a random name and the head at which it begins. The first commit after each
# opening of the database begins one, so two copies that went different ways differ.
# (epoch, cursor) belongs to this history if the epoch is in the table and the cursor is
# at most the start of the next epoch. An ordinary restart disturbs nobody: the new
# epoch starts at the head, which no client is above.


# The words: `head` is the newest cursor of the log, `current` that of one scope. The
# `latest` position is that of the database now; Tails.position is that of memory.


class Position(NamedTuple):
    """The state of the log: equal positions mean that no change or trim came between.

    This is how the engine knows that what it has in memory is still true.
    """

    head: int  # the newest cursor of the log
    epoch: str  # the newest epoch
    trims: int  # the number of the newest trim


class Row(NamedTuple):
    """One change in the log. `first` is the first cursor of the same mutation."""

    cursor: int
    first: int
    scope: str
    time: str
    data: str  # JSON text

    def encode(self) -> bytes:
        """Return the change as the protocol writes it."""
        return encode_change(self.cursor, self.scope, self.time, self.data)


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

    The first ones are each database's own. The SQL of the others is the same wherever
    there are tables with the columns of LOG_SCHEMA. `db` is a connection of the
    store's; `apply` and `snapshot` get it as it is.
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
        """Begin a transaction that excludes every other writer.

        Wait a while for the lock. Return the connection, and the position under it.
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
        self,
        db: Any,
        scope: str,
        after: int,
    ) -> Iterator[Row]:
        """Yield the scope's changes above a cursor, in order, as they are taken."""
        raise NotImplementedError

    # From here on the SQL is the same everywhere.

    def run_scalar(self, db: Any, sql: str, *parameters: Any) -> Any:
        """Run one statement; return the first column of its first row, or None."""
        rows = self.run(db, sql, *parameters)
        return rows[0][0] if rows else None

    def has_issued(self, db: Any, epoch: str, cursor: int) -> bool:
        """Return whether a cursor of an epoch belongs to this history."""
        # An epoch ends where the next one begins, and the newest at the head. Each
        # begins at or above the one before, so the next has the least start.
        sql = """
            SELECT coalesce(
                (SELECT min(start) FROM mizusync_epochs WHERE number > this.number), ?)
            FROM mizusync_epochs AS this WHERE epoch = ?
        """
        head = self.read_position(db).head
        end: int | None = self.run_scalar(db, sql, head, epoch)
        return end is not None and cursor <= end

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

    def read_range(
        self,
        db: Any,
        first: int,
        last: int,
    ) -> list[Row]:
        """Return the changes of all scopes from one cursor to another, in order."""
        sql = """
            SELECT * FROM mizusync_changes WHERE cursor BETWEEN ? AND ? ORDER BY cursor
        """
        rows = self.run(db, sql, first, last)
        return list(map(Row._make, rows))

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
        rows = self.run(db, sql, position.head, position.trims)
        return dict(rows)

    def find_mark(self, db: Any, scope: str, id: str) -> Mark | None:
        sql = "SELECT * FROM mizusync_mutations WHERE scope = ? AND id = ?"
        rows = self.run(db, sql, scope, id)
        return Mark(*rows[0]) if rows else None

    def trim(
        self,
        db: Any,
        scope: str,
        before: int,
        limit: int,
    ) -> int:
        """Remove the oldest changes below `before`, about `limit`; return how many.

        Mutations go whole or not at all.
        """
        # 1. The mutation with the limit-th change is the last one that may go: find its
        #    first cursor. With fewer changes, only `before` limits the trim.
        sql = """
            SELECT first FROM mizusync_changes WHERE scope = ?
            ORDER BY cursor LIMIT 1 OFFSET ?
        """
        last_first = self.run_scalar(db, sql, scope, limit - 1) or before
        # 2. Find where the first mutation begins that stays: the next one, or an
        #    earlier one with a change that `before` protects. Of a mutation with the
        #    changes 5 to 8, before=7 removes nothing.
        sql = """
            SELECT first FROM mizusync_changes
            WHERE scope = ? AND (cursor >= ? OR first > ?) ORDER BY cursor LIMIT 1
        """
        end = self.run_scalar(db, sql, scope, before, last_first) or before
        # 3. Record the highest cursor that goes, so that readers below it are refused.
        sql = """
            SELECT max(cursor), count(*) FROM mizusync_changes
            WHERE scope = ? AND cursor < ?
        """
        newest, count = self.run(db, sql, scope, end)[0]
        if not count:
            return 0
        sql = """
            INSERT INTO mizusync_trims (number, scope, cursor)
            VALUES ((SELECT coalesce(max(number), 0) + 1 FROM mizusync_trims), ?, ?)
            ON CONFLICT (scope)
            DO UPDATE SET number = excluded.number, cursor = excluded.cursor
        """
        self.run(db, sql, scope, newest)
        # 4. Remove them.
        sql = "DELETE FROM mizusync_changes WHERE scope = ? AND cursor <= ?"
        self.run(db, sql, scope, newest)
        return int(count)

    def probe(self, db: Any) -> None:
        """Write something and take it back, so that a disk that refuses is noticed."""
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

OWN_STATEMENT = "/* mizusync */ "

# What would end the transaction, or leave the file. SAVEPOINT is not among them: it is
# allowed, and the engine's own is protected by its name.
_CONTROL = (
    sqlite3.SQLITE_TRANSACTION,
    sqlite3.SQLITE_ATTACH,
    sqlite3.SQLITE_DETACH,
    sqlite3.SQLITE_PRAGMA,
)
_OWN_NAMES = ("mizusync_", "sqlite_sequence")  # prefixes; the sequence holds the head
# Full-text search and R*Trees ask for these two pragmas.
_HARMLESS = (
    (sqlite3.SQLITE_PRAGMA, "data_version", None),
    (sqlite3.SQLITE_PRAGMA, "page_size", None),
)
GUARD_NOTE = (
    "In the engine's transaction, an application can't end the transaction, use "
    "PRAGMA, ATTACH or executescript, create anything in TEMP, or change what is named "
    "mizusync_*. Because sqlite_sequence holds the log's head, it also can't rename a "
    "table, or drop one with AUTOINCREMENT."
)


def run_own(db: sqlite3.Connection, sql: str, *parameters: Any) -> list[Any]:
    """Run a statement of the engine's own; return all its rows. Raise StoreRefused."""
    try:
        rows = sqlite3.Connection.execute(db, OWN_STATEMENT + sql, parameters)
        return rows.fetchall()
    except sqlite3.Error as error:
        if primary_code(error) in REFUSAL_CODES:
            raise StoreRefused("the database refuses, for now") from error
        raise


class GuardedConnection(sqlite3.Connection):
    """A connection that runs application code under a savepoint, and restricts it."""

    def __init__(self, path: str, mode: str, timeout: float) -> None:
        """Open the file; `mode` is "ro", "rw", or "rwc", which may create it."""
        # Quote every byte: a name need not be UTF-8, and in a URI //x is a host.
        name = urllib.parse.quote(os.fsencode(path), safe="")
        super().__init__(
            f"file:{name}?mode={mode}",
            uri=True,
            timeout=timeout,
            isolation_level=None,  # only an explicit BEGIN begins a transaction
            check_same_thread=False,  # any thread may use it, one at a time
        )
        self.guarded = False  # application code has the connection
        self._writes = mode != "ro"
        self._opened: list[weakref.ref[Any]] = []  # the application's cursors and blobs
        super().set_authorizer(self._authorize)

    def run_guarded(self, work: Callable[[Any], T]) -> T:
        """Return `work(self)`; if it raises, undo what it wrote.

        Outside of a transaction, the savepoint begins one, so that all reads see one
        moment (https://sqlite.org/lang_savepoint.html). Raise StoreRefused if the
        transaction did not survive, or if `work` ended with an error of the disk: the
        writer then runs each step again by itself (see Writer).
        """
        run_own(self, "SAVEPOINT mizusync_guard")
        self.guarded = True
        try:
            result = work(self)
        except BaseException as error:
            self._end_guard()
            self._leave_savepoint("ROLLBACK TO mizusync_guard", error)
            self._leave_savepoint("RELEASE mizusync_guard", error)
            if primary_code(error) in DISK_CODES:
                raise StoreRefused("the database refuses, for now") from error
            if primary_code(error) == sqlite3.SQLITE_AUTH:
                error.add_note(GUARD_NOTE)
            raise
        self._end_guard()
        self._leave_savepoint("RELEASE mizusync_guard", None)
        return result

    def _end_guard(self) -> None:
        """Close what the application left open, and undo its settings.

        A half-read INSERT ... RETURNING makes a later COMMIT fail, and a half-read
        SELECT keeps an old state of the file in use.
        """
        self.guarded = False
        self.row_factory = None
        self.text_factory = str
        with contextlib.suppress(sqlite3.Error):  # the application has closed it
            self.set_progress_handler(None, 0)
        while self._opened:
            opened = self._opened.pop()()
            if opened is not None:
                with contextlib.suppress(sqlite3.Error):  # a thread may be using it
                    opened.close()

    def _leave_savepoint(self, how: str, failure: BaseException | None) -> None:
        try:
            run_own(self, how)
        except Exception:  # MemoryError, too, leaves the transaction in doubt
            # The savepoint is gone: SQLite or the application rolled everything back.
            raise StoreRefused("the transaction was rolled back") from failure

    # -- against an application that controls the transaction

    def _authorize(
        self,
        action: int,
        first: str | None,
        second: str | None,
        database: str | None,
        trigger: str | None,
    ) -> int:
        """Allow or deny an action. Its first two names depend on the action."""
        if action == sqlite3.SQLITE_INSERT and database == "temp":
            # Everything that is created in TEMP begins with an INSERT there. SQLite
            # looks up names in TEMP first, so a table or trigger there could shadow the
            # log's. Refuse it at any time, also in the application's schema.
            return sqlite3.SQLITE_DENY
        if not self.guarded or action == sqlite3.SQLITE_READ:
            return sqlite3.SQLITE_OK
        if action in _CONTROL and (action, first, second) not in _HARMLESS:
            return sqlite3.SQLITE_DENY
        for name in (first, second):
            if name and name.lower().startswith(_OWN_NAMES):
                return sqlite3.SQLITE_DENY
        return sqlite3.SQLITE_OK

    def set_authorizer(self, *callback: Any) -> None:
        raise sqlite3.ProgrammingError("the engine has an authorizer of its own")

    def backup(self, *target: Any, **options: Any) -> None:
        if self.guarded and self._writes:
            # It would wait for its own transaction for ever.
            raise sqlite3.ProgrammingError("apply can't make a backup: use Engine.read")
        super().backup(*target, **options)

    # -- against cursors that outlive apply, or write after a rollback

    def cursor(self, factory: Any = None) -> Any:
        # `factory` is ignored: a cursor of another class would have no guard.
        opened = super().cursor(GuardedCursor)
        self._opened.append(weakref.ref(opened))
        return opened

    def check_transaction(self) -> None:
        """Raise OperationalError if the application goes on after a rollback.

        SQLITE_FULL and RAISE(ROLLBACK) roll the whole transaction back. If `apply`
        caught the error and went on writing, each statement would commit by itself.
        """
        if self.guarded and not self.in_transaction:
            raise sqlite3.OperationalError("the transaction was rolled back already")

    # sqlite3.Connection's own do not call an overridden cursor().

    def execute(self, *statement: Any) -> Any:
        return self.cursor().execute(*statement)

    def executemany(self, *statement: Any) -> Any:
        return self.cursor().executemany(*statement)

    def executescript(self, *statement: Any) -> Any:
        return self.cursor().executescript(*statement)

    def blobopen(self, *place: Any, **options: Any) -> Any:
        self.check_transaction()
        opened = super().blobopen(*place, **options)
        self._opened.append(weakref.ref(opened))
        return opened


class GuardedCursor(sqlite3.Cursor):
    """A cursor that runs nothing once the transaction is lost."""

    connection: GuardedConnection

    def execute(self, *statement: Any) -> Any:
        self.connection.check_transaction()
        return super().execute(*statement)

    def executemany(self, *statement: Any) -> Any:
        self.connection.check_transaction()
        return super().executemany(*statement)

    def executescript(self, *statement: Any) -> Any:
        self.connection.check_transaction()
        return super().executescript(*statement)


# Against a database that refuses. SQLite's result codes: https://sqlite.org/rescode.html

# Errors of an application's statement that may be the disk's. They need not be: an
# AUTOINCREMENT at its highest number has the code of a full disk.
DISK_CODES = (
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_CORRUPT,
)
# Errors of the engine's own statements, which are right: so the disk, the file or
# another process is in the way.
REFUSAL_CODES = (
    *DISK_CODES,
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_PROTOCOL,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_NOTADB,
)


def primary_code(error: BaseException | None) -> int:
    """Return SQLite's primary result code; 0 for an error of the Python module."""
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Turn SQLite's refusals in the block into StoreRefused."""
    try:
        yield
    except sqlite3.Error as error:
        if primary_code(error) in REFUSAL_CODES:
            raise StoreRefused("the database refuses, for now") from error
        raise


def is_busy(refusal: StoreRefused) -> bool:
    """Return whether another process's lock is the reason of a refusal."""
    return primary_code(refusal.__cause__) == sqlite3.SQLITE_BUSY


def execute_with_retry(db: sqlite3.Connection, sql: str, timeout: float) -> None:
    """Run a statement, retrying while another process holds the lock.

    SQLite's own busy handler sleeps up to 100 ms between two tries: beside a busy
    writer of another process it might never get the lock. And PRAGMA journal_mode does
    not ask the busy handler at all.
    """
    deadline = time.monotonic() + timeout
    while True:
        try:
            run_own(db, sql)
            return
        except StoreRefused as refusal:
            if not is_busy(refusal) or time.monotonic() > deadline:
                raise
        time.sleep(0.0002)


# --- Database file --------------------------------------------------------------------
# How a file becomes a log, and how it is opened. A file that is not ours, or that can't
# keep what it takes, is refused with one sentence before anything is written into it.

FORMAT = 1  # of the tables below; a file with a higher one is refused
# "mizu" (https://sqlite.org/pragma.html#pragma_application_id)
APPLICATION_ID = 0x6D697A75

# The columns stand in the order of Row and Mark. If you raise FORMAT, teach
# prepare_writer to bring an older file up to date.
#
#   changes    `first` is the cursor of the first change of the same mutation.
#   mutations  The dedupe marks.
#   trims      A scope's highest trimmed cursor; each trim takes the next number.
#   epochs     `start` is the head at which the epoch began.
#
# The rows inserted here give every log a head (in sqlite_sequence) and an epoch.
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


class DatabaseFile:
    """The SQLite file of a log, with the application's own tables in it.

    `schema` is the application's, and runs whenever a connection that writes is opened.
    `busy_timeout` (seconds) limits how long a statement waits for another process.
    """

    def __init__(self, path: StrPath, schema: str, busy_timeout: float) -> None:
        check_path(path)
        self.path = os.path.abspath(path)
        # SQLite follows a symbolic link, and puts the WAL beside the file itself.
        self.wal_path = f"{os.path.realpath(self.path)}-wal"
        self.created_log = False  # by this process
        self._schema = schema
        self._busy_timeout = busy_timeout

    def open(self, adopt: bool) -> tuple[GuardedConnection, GuardedConnection]:
        """Return a connection that writes, and one that reads. Raise StoreError.

        `adopt` adds the log to a database that an application already has.
        """
        with contextlib.ExitStack() as opened:
            try:
                self._check_leftover_wal(adopt)
                writer = opened.enter_context(contextlib.closing(self.connect("rwc")))
                self.prepare_writer(writer, adopt)
                reader = opened.enter_context(contextlib.closing(self.connect("ro")))
                run_own(reader, "SELECT 1 FROM mizusync_format")  # opens the WAL
                self._stat = os.stat(self.path)
            except (sqlite3.Error, StoreRefused, OSError) as error:
                cause = error.__cause__ or error
                advice = OPENING_ADVICE.get(primary_code(cause), "")
                raise StoreError(
                    f"the database {self.path} can't be used ({cause}){advice}"
                ) from error
            opened.pop_all()  # both stay open
            return writer, reader

    def connect(self, mode: str) -> GuardedConnection:
        """Return a connection: "ro" reads, "rw" writes, "rwc" may create the file."""
        return GuardedConnection(self.path, mode, self._busy_timeout)

    def prepare_writer(self, db: GuardedConnection, adopt: bool = False) -> None:
        """Make sure that the log and the application's tables exist."""
        run_own(db, "PRAGMA synchronous = FULL")  # a commit waits for the disk
        run_own(db, "PRAGMA fullfsync = ON")  # macOS: for the drive's own cache as well
        if not self._has_log(db, adopt):
            self._create_log(db, adopt)
        execute_with_retry(db, "PRAGMA journal_mode = WAL", self._busy_timeout)
        run_own(db, "PRAGMA busy_timeout = 0")  # execute_with_retry() waits instead
        self._check_permission(db)
        self._run_schema(db)

    def _create_log(self, db: GuardedConnection, adopt: bool) -> None:
        """Create the log's tables, unless another process has just done so."""
        run_own(db, "PRAGMA busy_timeout = 0")  # execute_with_retry() waits instead
        execute_with_retry(db, "BEGIN IMMEDIATE", self._busy_timeout)
        # If the file is not in WAL mode yet, COMMIT has to wait for its readers.
        run_own(db, f"PRAGMA busy_timeout = {int(self._busy_timeout * 1000)}")
        with db:  # commits, or rolls back
            if not self._has_log(db, adopt):
                if not run_own(db, "SELECT 1 FROM sqlite_master"):
                    # An adopted file keeps the id of its application.
                    run_own(db, f"PRAGMA application_id = {APPLICATION_ID}")
                for statement in LOG_SCHEMA.split(";")[:-1]:
                    run_own(db, statement)
                self.created_log = True

    # -- against files of other programs

    def _has_log(self, db: GuardedConnection, adopt: bool) -> bool:
        """Return whether the log exists. Raise StoreError for an unfit file."""
        encoding = run_own(db, "PRAGMA encoding")[0][0]
        if encoding != "UTF-8":
            # In UTF-16, SQLite stores U+FFFE and U+FFFF as U+FFFD: scopes would merge.
            raise StoreError(
                f"the database {self.path} is in {encoding}: the log needs UTF-8"
            )
        # One statement, because another process may be making the log right now.
        sql = "SELECT count(*), max(name = 'mizusync_format') FROM sqlite_master"
        objects, has_log = run_own(db, sql)[0]
        if has_log:
            format = run_own(db, "SELECT format FROM mizusync_format")[0][0]
            if format > FORMAT:
                raise StoreError(
                    f"the database {self.path} has format {format}: "
                    "use a newer mizusync"
                )
            return True
        application_id = run_own(db, "PRAGMA application_id")[0][0]
        is_foreign = application_id not in (0, APPLICATION_ID)
        if (objects or is_foreign) and not adopt:
            raise StoreError(
                f"the database {self.path} belongs to another program: "
                "name another file, or open it with adopt=True to add the log to it"
            )
        return False

    def _check_leftover_wal(self, adopt: bool) -> None:
        """Refuse a WAL without its database, or of another program.

        A crash leaves a WAL, and SQLite would merge it as soon as it opens the file.
        """
        if not os.path.exists(self.wal_path):
            return
        if not os.path.exists(self.path):
            raise StoreError(
                f"{self.wal_path} exists, and {self.path} does not: put the database "
                "back; or, to begin anew, remove its -wal and -shm as well"
            )
        with contextlib.closing(self.connect("ro")) as db:
            self._has_log(db, adopt)

    # -- against mistakes in the application's schema

    def _run_schema(self, db: GuardedConnection) -> None:
        """Run the application's schema. Raise StoreError, with the reason.

        What stands between two PRAGMAs is one transaction. A PRAGMA runs by itself,
        because many do nothing, or fail, inside a transaction.
        """
        try:
            statements = list(split_statements(self._schema))
            for word in map(first_word, statements):
                if word in ("BEGIN", "COMMIT", "END", "ROLLBACK"):
                    raise StoreError(
                        f"the schema for {self.path} can't be run: it is a transaction "
                        f"by itself, so leave out {word}"
                    )
            for are_pragmas, group in itertools.groupby(statements, is_pragma):
                if are_pragmas:
                    for pragma in group:
                        execute_with_retry(db, pragma, self._busy_timeout)
                else:
                    self._run_together(db, list(group))
        except (sqlite3.Error, ValueError) as error:  # ValueError: a NUL, for example
            reason = str(error)
            if primary_code(error) == sqlite3.SQLITE_AUTH:
                reason += ": TEMP tables, views and triggers could shadow the log's"
            raise StoreError(
                f"the schema for {self.path} can't be run: {reason}"
            ) from error

    def _run_together(self, db: GuardedConnection, statements: Sequence[str]) -> None:
        """Run statements in one transaction; lock only if one of them writes.

        IF NOT EXISTS writes nothing, so a second process opens beside a busy writer.
        """
        try:
            self._run_after("BEGIN", db, statements)
        except StoreRefused as refusal:
            if not is_busy(refusal):
                raise
            self._run_after("BEGIN IMMEDIATE", db, statements)

    def _run_after(
        self, begin: str, db: GuardedConnection, statements: Sequence[str]
    ) -> None:
        execute_with_retry(db, begin, self._busy_timeout)
        with db:  # commits, or rolls back
            for statement in statements:
                run_own(db, statement)

    # -- against files that can't be written, or are gone

    def _check_permission(self, db: GuardedConnection) -> None:
        """Raise StoreRefused if SQLite has silently opened the file read-only."""
        try:
            run_own(db, "DELETE FROM mizusync_format WHERE false")  # writes nothing
        except StoreRefused as refusal:
            if not is_busy(refusal):  # another process's lock says nothing of this one
                raise

    def check(self) -> None:
        """Raise StoreRefused if the file was removed or replaced.

        SQLite goes on writing into a file that no name leads to, and what it writes is
        lost when the last process closes it.
        """
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(self.path), self._stat):
                return
        raise StoreRefused(f"{self.path} was removed or replaced: restart the server")


# Against files that can't be opened, and paths at which no log can be kept.

OPENING_ADVICE = {
    sqlite3.SQLITE_BUSY: ": another process holds its lock",
    sqlite3.SQLITE_CANTOPEN: ": its folder has to exist, and be writable",
    sqlite3.SQLITE_NOTADB: ": name another file",
    sqlite3.SQLITE_READONLY: (
        ": the server's user needs to write to the file, to its -wal and -shm, "
        "and to the folder"
    ),
}


def check_path(path: StrPath) -> None:
    """Raise StoreError for a path at which no log can be kept."""
    if sqlite3.sqlite_version_info < (3, 31):
        found = sqlite3.sqlite_version
        raise StoreError(f"the log needs SQLite 3.31 or newer, and this is {found}")
    if os.fspath(path) in ("", ":memory:"):
        raise StoreError("the log needs a file: name one")
    try:
        can_exist = b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:  # the file system's encoding lacks a character
        can_exist = False
    if not can_exist:
        raise StoreError(f"no file can be named {os.fspath(path)!r}")
    if is_mount_point(os.path.realpath(path)):
        # In a container, the -wal beside the file would stay outside of the mount.
        raise StoreError(
            f"only the file {path} is mounted here: mount the folder that it is in, "
            "or its newest changes are lost"
        )


def is_mount_point(path: str) -> bool:
    """Return whether a file is mounted by itself, if the system can tell (Linux).

    os.path.ismount compares devices, and misses a file of the same file system.
    """
    try:
        with open("/proc/self/mountinfo", "rb") as mountinfo:
            return os.fsencode(path) in mount_points(mountinfo.read())
    except OSError:
        return False


def mount_points(mountinfo: bytes) -> set[bytes]:
    """Return the mount points in the content of /proc/self/mountinfo.

    They are the fifth field, with blanks and backslashes as octal escapes (proc(5)).
    """

    def unescape(code: re.Match[bytes]) -> bytes:
        return bytes([int(code[1], 8)])

    found = set()
    for line in mountinfo.split(b"\n"):
        fields = line.split(b" ")
        if len(fields) > 4:
            found.add(re.sub(rb"\\([0-3][0-7]{2})", unescape, fields[4]))
    return found


# Against mistakes in the application's schema: the text of its statements.

# Blanks and comments, and then the first word.
_FIRST_WORD = re.compile(r"(?:\s|--[^\n]*+|/\*.*?\*/)*+(\w*)", re.DOTALL)


def first_word(statement: str) -> str:
    """Return the first word of an SQL statement, in capitals, or ""."""
    match = _FIRST_WORD.match(statement)
    return match[1].upper() if match else ""


def is_pragma(statement: str) -> bool:
    """Return whether an SQL statement is a PRAGMA."""
    return first_word(statement) == "PRAGMA"


def split_statements(script: str) -> Iterator[str]:
    """Yield the statements of an SQL script; the last one may lack its semicolon.

    A semicolon in a string, a comment or the body of a trigger ends no statement.
    """
    start = 0
    for semicolon in re.finditer(";", script):
        statement = script[start : semicolon.end()]
        if sqlite3.complete_statement(statement):
            yield statement
            start = semicolon.end()
    rest = script[start:]
    if rest.strip():
        yield rest


# --- SQLite ---------------------------------------------------------------------------
# The log in one file. It shares the file with the application's tables, so one
# transaction holds the dedupe mark, the application's writes and the changes: a crash
# leaves all of it or none. In WAL mode, readers go on while the writer commits. One
# connection writes, one only reads the position, and each concurrent read has its own.

MAX_WAL = 64 * MIB  # SQLite keeps the WAL near 4 MiB, unless reads overlap
# Seconds between two checks of the WAL. On Linux 6.13 and newer, a stat of a file makes
# the next write update its timestamp exactly, and the sync has to write that as well:
# with a check at each commit, commits took 80 us longer.
WAL_CHECK_INTERVAL = 1.0


class SQLiteStore(Store):
    """The log in a SQLite file, together with the application's own tables.

    `schema` is the application's (CREATE TABLE IF NOT EXISTS ...); it runs at each
    opening. `adopt` adds the log to a database that an application already has.
    `busy_timeout` (seconds) limits how long a commit waits for another process. Raise
    StoreError for a file that is not ours or can't be used, and leave it as it is.
    """

    def __init__(
        self,
        path: StrPath,
        schema: str = "",
        adopt: bool = False,
        busy_timeout: float = 5.0,
    ) -> None:
        self._file = DatabaseFile(path, schema, busy_timeout)
        self._busy_timeout = busy_timeout
        # Each is None once it is closed; the next transaction opens _write_db again.
        self._write_db: GuardedConnection | None
        self._position_db: GuardedConnection | None
        self._write_db, self._position_db = self._file.open(adopt)
        # The first commit of each opening begins an epoch. A log that this process has
        # created has its first one.
        self._epoch_is_due = not self._file.created_log
        # The newest position that this process has noted. If the log has not issued it
        # any more, a backup was restored: see _see().
        self._seen = self.read_position(self._position_db)
        self._seen_lock = threading.Lock()
        self._position_lock = threading.Lock()
        # The data_version that was read last, and the position at that time.
        self._latest: tuple[int, Position] | None = None
        self._idle: list[GuardedConnection] = []  # connections of readers
        self._read_barrier = threading.Lock()  # while it is held, no read begins
        self._wal_limit = MAX_WAL
        self._next_wal_check = 0.0
        self._write_version = self._read_data_version(self._write_db)
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
        self,
        db: Any,
        scope: str,
        after: int,
    ) -> Iterator[Row]:
        """Yield rows as SQLite finds them: a reader stops when its page is full."""
        sql = """
            SELECT * FROM mizusync_changes
            WHERE scope = ? AND cursor > ? ORDER BY cursor
        """
        rows = sqlite3.Connection.execute(db, OWN_STATEMENT + sql, (scope, after))
        with contextlib.closing(rows):
            yield from map(Row._make, rows)

    def latest(self) -> Position:
        """Return the position after the newest commit, whichever process made it."""
        with self._position_lock:
            if self._position_db is None:
                raise StoreRefused("the database is closed")
            # A commit of any other connection changes the version, which costs half as
            # much to read as the position.
            version = self._read_data_version(self._position_db)
            if self._latest is None or self._latest[0] != version:
                self._latest = (version, self.read_position(self._position_db))
                self._see(self._position_db, self._latest[1])
            return self._latest[1]

    def _read_data_version(self, db: GuardedConnection) -> int:
        # https://sqlite.org/pragma.html#pragma_data_version
        version: int = run_own(db, "PRAGMA data_version")[0][0]
        return version

    @refusals()
    def read(self, work: Callable[[Any], T]) -> T:
        """Return `work(db)`, run on a reading connection that sees one moment."""
        self._file.check()
        with self._read_barrier:
            pass  # wait while the WAL is being reset
        try:
            db = self._idle.pop()
        except IndexError:
            db = self._file.connect("ro")
        try:
            result = db.run_guarded(work)
        except SyncError as error:
            if isinstance(error, StoreRefused):
                db.close()
            else:
                self._idle.append(db)  # a refusal such as cursor_too_old, and no fault
            raise
        except BaseException as error:
            db.close()  # its state is unknown
            # The plain code alone: SQLITE_READONLY_RECOVERY, say, is the disk's.
            if getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_READONLY:
                raise RuntimeError("only apply may write to the database") from error
            raise
        self._idle.append(db)
        return result

    # -- writing

    @refusals()
    def begin(self) -> tuple[Any, Position]:
        """Begin a transaction. Its position is read under the write lock."""
        self._file.check()
        if self._write_db is None:
            self._write_db = self._reconnect()
        db = self._write_db
        execute_with_retry(db, "BEGIN IMMEDIATE", self._busy_timeout)
        self._warn_of_others(db)
        position = self.read_position(db)
        self._see(db, position)
        return db, position

    def run_guarded(self, work: Callable[[Any], T]) -> T:
        assert self._write_db is not None
        return self._write_db.run_guarded(work)

    @refusals()
    def commit(self, rows: Sequence[Row], marks: Sequence[Mark]) -> Position:
        """Append to the log and commit. COMMIT returns when the disk has it all."""
        db = self._write_db
        assert db is not None
        if self._epoch_is_due:
            sql = """
                INSERT INTO mizusync_epochs (epoch, start)
                SELECT hex(randomblob(9)), seq FROM sqlite_sequence
                WHERE name = 'mizusync_changes'
            """
            run_own(db, sql)  # before the rows: it starts at the head of begin()
        insert = functools.partial(sqlite3.Connection.executemany, db)
        insert(f"{OWN_STATEMENT}INSERT INTO mizusync_changes VALUES (?,?,?,?,?)", rows)
        insert(f"{OWN_STATEMENT}INSERT INTO mizusync_mutations VALUES (?,?,?,?)", marks)
        position = self.read_position(db)
        run_own(db, "COMMIT")
        with self._seen_lock:
            self._epoch_is_due = False
            # Another process may have committed since, and latest() noted that.
            if position.head >= self._seen.head:
                self._seen = position
        self._limit_wal(db)
        return position

    def rollback(self) -> None:
        """End the transaction, if there is one. What can't be rolled back is closed."""
        db = self._write_db
        if db is None:
            return
        try:
            if db.in_transaction:
                run_own(db, "ROLLBACK")
        except (sqlite3.Error, StoreRefused):
            log_error(store_log, "a rollback failed: the next transaction reconnects")
            self._write_db = None
            with contextlib.suppress(sqlite3.Error):
                db.close()

    def _reconnect(self) -> GuardedConnection:
        """Open the writer's connection again, after a rollback that failed."""
        db = self._file.connect("rw")
        try:
            self._file.prepare_writer(db)
        except BaseException:
            db.close()
            raise
        self._write_version = self._read_data_version(db)
        return db

    def close(self) -> None:
        """Close every connection, and write the WAL into the file if possible."""
        if self._write_db is not None:
            with contextlib.suppress(sqlite3.Error, StoreRefused):  # a reader holds it
                run_own(self._write_db, "PRAGMA wal_checkpoint(TRUNCATE)")
        with self._position_lock:
            for db in (*self._idle, self._position_db, self._write_db):
                if db is not None:
                    db.close()
            self._idle = []
            self._position_db = None
            self._write_db = None

    def stats(self) -> dict[str, int]:
        """Return the sizes of the file and of its WAL (bytes)."""
        sizes = {"database_bytes": 0, "wal_bytes": 0}
        with contextlib.suppress(OSError):  # the file may be gone
            sizes["database_bytes"] = os.path.getsize(self._file.path)
            sizes["wal_bytes"] = os.path.getsize(self._file.wal_path)
        return sizes

    # -- against backups that are restored under a running server

    def _see(self, db: GuardedConnection, position: Position) -> None:
        """Note a position. An epoch is due if the history is another one than before.

        If this process saw (A, 100), and the log in the file has not issued that, then
        another copy was restored. An epoch stays due until a commit has begun it.
        """
        with self._seen_lock:
            if position != self._seen:
                if not self.has_issued(db, self._seen.epoch, self._seen.head):
                    self._epoch_is_due = True
                    self._seen = position
                elif position.head >= self._seen.head:  # otherwise it is noted late
                    self._seen = position

    # -- against a WAL that grows

    def _limit_wal(self, db: GuardedConnection) -> None:
        """Measure the WAL from time to time, and reset it if it is large."""
        now = time.monotonic()
        if now < self._next_wal_check:
            return
        self._next_wal_check = now + WAL_CHECK_INTERVAL
        with contextlib.suppress(OSError, sqlite3.Error, StoreRefused):
            if os.path.getsize(self._file.wal_path) > self._wal_limit:
                self._reset_wal(db)

    def _reset_wal(self, db: GuardedConnection) -> None:
        """Block new reads until the current ones finish; let SQLite reset the WAL.

        Reads that overlap without a gap would let it grow without bound
        (https://sqlite.org/wal.html#avoiding_excessively_large_wal_files). Pushes wait
        for this as well, up to a second. If a read takes longer, the next try comes
        when the WAL has grown by another MAX_WAL.
        """
        deadline = time.monotonic() + 1
        self._wal_limit += MAX_WAL
        with self._read_barrier:
            while time.monotonic() < deadline:
                busy = self.run_scalar(db, "PRAGMA wal_checkpoint(TRUNCATE)")
                if not busy:
                    self._wal_limit = MAX_WAL
                    return
                time.sleep(0.001)

    # -- against other processes

    def _warn_of_others(self, db: GuardedConnection) -> None:
        """Warn once of other processes that write, if that may lose a commit."""
        if not self._warns_of_others:
            return
        # A connection's own commits do not change the version that it reads.
        if self._read_data_version(db) != self._write_version:
            self._warns_of_others = False
            store_log.warning(
                "another process writes to %s, and SQLite %s may lose a commit then: "
                "use 3.51.3 or newer (https://sqlite.org/wal.html#walresetbug)",
                self._file.path,
                sqlite3.sqlite_version,
            )


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


# --- Tail -----------------------------------------------------------------------------
# A tail is a copy of the log's end for one scope, encoded, so that a pull is a join of
# bytes. It answers a pull if everything that is new to the client fits on one page.
# Memory is believed only while the store's latest position equals the position that
# memory was brought up to: other processes write to the same file, and backups are
# restored into it. Any other pull reads the database.


OVERHEAD = 200  # bytes of memory that a change takes besides its own


class Tail:
    """All changes of one scope above `after`, in order, as two parallel lists.

    Memory keeps one for each scope in use. Batch.added holds a second one for each
    scope that a transaction adds to; after the commit it is appended to the first.
    """

    def __init__(self, after: int) -> None:
        self.after = after
        self.cursors: list[int] = []
        self.changes: list[bytes] = []  # encoded
        self.size = 0  # bytes of memory, about

    @property
    def current(self) -> int:
        """The newest cursor of the scope, also if its changes were all trimmed."""
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
        self._tails: OrderedDict[str, Tail] = OrderedDict()  # least recently used first
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

    def page(self, scope: str, cursor: int, limit: int, epoch: str) -> Page | None:
        """Return all changes above a cursor, or None if memory can't answer.

        It can't if they do not fit on one page (the last one may go past its size): a
        page never ends inside a mutation, and only the database knows where one ends.
        Nor does memory know where an older epoch ended.
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
            if len(changes) > limit or (
                tail.size > max_size and sum(map(len, changes[:-1])) > max_size
            ):
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
        issued = cursor <= position.head
        if epoch not in ("", position.epoch):
            issued = self._store.has_issued(db, epoch, cursor)
        if not issued:
            raise CursorUnknown(
                f"this history never issued cursor {cursor}: take a snapshot"
            )
        if cursor < self._store.read_trimmed(db, scope):
            raise CursorTooOld(f"changes above {cursor} were trimmed: take a snapshot")
        # 2. Read until the page is full, and then to the end of a mutation.
        tail = Tail(cursor)
        mutation = 0
        for row in self._store.read_changes(db, scope, cursor):
            is_full = (
                len(tail.cursors) >= limit or tail.size > self._settings.max_page_size
            )
            if is_full and row.first != mutation:
                return Page(tail.changes, tail.current, position.epoch, has_more=True)
            tail.add(row)
            mutation = row.first
        # 3. The page reached the end of the log, so memory can serve the next pull. If
        #    it is empty, the scope's newest change is at or below the cursor: a tail
        #    that begins there is complete, and serves lower cursors as well.
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
        """Extend a tail, or begin one; it becomes the most recently used."""
        tail = self._remove(scope) or Tail(newer.after)
        tail.cursors += newer.cursors
        tail.changes += newer.changes
        tail.size += newer.size
        # Cut seldom: only above twice the limit.
        excess = len(tail.cursors) - self._settings.max_tail_changes
        if excess > self._settings.max_tail_changes:
            tail.after = tail.cursors[excess - 1]
            tail.size -= sum(map(len, tail.changes[:excess])) + excess * OVERHEAD
            del tail.cursors[:excess]
            del tail.changes[:excess]
        self._tails[scope] = tail
        self._size += tail.size
        # The least recently used go first. One without changes takes some 1,000 bytes.
        while self._size + 1000 * len(self._tails) > self._settings.max_tail_size:
            self._remove(next(iter(self._tails)))

    def _remove(self, scope: str) -> Tail | None:
        tail = self._tails.pop(scope, None)
        if tail is not None:
            self._size -= tail.size
        return tail


# --- Listeners ------------------------------------------------------------------------
# The way back from the writer's thread. Each commit makes one hop to each event loop
# that waits for it; the hop carries the answers of that loop's pushes, and after them
# the calls to its listeners. A listener gets the hints of all scopes in the commit.

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
            # Those to all scopes are called after commits alone, with some hints.
            if scope in hints or (hints if scope is None else ends_waits):
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
    """Make calls one after the other. One that fails keeps none of the others back."""
    for call in calls:
        try:
            call()
        except Exception:
            log_error(engine_log, "a listener failed")


# --- Jobs -----------------------------------------------------------------------------
# What waits for the writer. A job is a push or a trim, and a future that its caller
# waits for. A step of it is the unit that can be run again in a transaction of its own.


@dataclasses.dataclass
class Step:
    """One mutation of a push, or a trim."""

    run: Callable[[Any], Any]  # takes the transaction's Batch
    name: str  # for the log
    result: Any = None  # what `run` returned; None if its transaction has failed


@dataclasses.dataclass
class Job:
    """A push or a trim. Its future gets a list of the results of its steps."""

    steps: Sequence[Step]
    future: asyncio.Future[Any] | Future[Any]
    loop: Loop | None = None  # the future's, if it belongs to one
    refusal: StoreRefused | None = None  # instead of results, if nothing was applied

    def answer(self) -> None:
        """Resolve the future, on the loop that it belongs to."""
        if self.future.done():  # the caller gave up
            return
        if self.refusal:
            self.future.set_exception(self.refusal)
        else:
            self.future.set_result([step.result for step in self.steps])

    def refuse(self) -> None:
        """Refuse the steps that have no result.

        If a part of a push was applied, its other mutations are `unavailable`. If
        nothing was, it is refused as a whole.
        """
        # One exception for each job, because raising it changes its traceback.
        refusal = StoreRefused("the database refuses, for now")
        left = [step for step in self.steps if step.result is None]
        if left and any(step.result.ok for step in self.steps if step.result):
            for step in left:
                step.result = Result.refused(refusal)
        elif left:
            self.refusal = refusal


# --- Batch ----------------------------------------------------------------------------
# What one transaction will append, collected until the commit: rows with their cursors,
# the dedupe marks, and the same changes encoded, for memory and for the hints. A batch
# lives on the writer's thread, and is dropped if its transaction fails.

# Not an iterable of changes, although Python can iterate over them.
NOT_CHANGES = (str, bytes, Mapping, Change, sqlite3.Cursor)
Apply = Callable[[Any, Mutation], Iterable[Any] | None]


class Batch:
    """One transaction while it is made.

    The database does not have its rows and marks before the commit, so a mutation that
    repeats one of the same batch is looked up here first.
    """

    def __init__(
        self, store: Store, apply: Apply, settings: Settings, db: Any, head: int
    ) -> None:
        self.store = store
        self.db = db
        self.rows: list[Row] = []
        self.marks: dict[tuple[str, str], Mark] = {}
        self.added: dict[str, Tail] = {}  # by scope: the new changes, encoded
        self.trimmed: set[str] = set()  # scopes that lose changes
        self._apply_function = apply
        self._settings = settings
        self._start = head  # it does not move before the commit
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._time = now.replace("+00:00", "Z")

    def apply(self, mutation: Mutation, args: bytes, push: Sequence[Step]) -> Result:
        """Apply a mutation of a push; repeat the first answer if it was applied before.

        `args` is a copy of its args. Raise StoreRefused if the whole transaction has
        failed.
        """
        key = (mutation.scope, mutation.id)
        mark = self.marks.get(key) or self.store.find_mark(self.db, *key)
        if mark:
            return self._repeat(mark, push)
        # Each run gets a copy of the args, because `apply` may change them.
        mutation = mutation.with_args(marshal.loads(args))
        try:
            rows = self.store.run_guarded(lambda db: self._make_rows(db, mutation))
        except StoreRefused:
            raise
        except APPLY_MAY_RAISE as refusal:
            return Result.refused(refusal)
        except BaseException:
            # SystemExit, too, is the application's error, and must not end this thread.
            log_error(engine_log, "apply failed on %s", describe(mutation))
            return Result.refused(SyncError("the server failed on this mutation"))
        return self._add(mutation, rows)

    def _make_rows(self, db: Any, mutation: Mutation) -> list[Row]:
        """Call the application, and return the changes that it makes as numbered rows.

        They are not in the batch yet. `db` is for the application. Raise TypeError or
        ValueError for what is no change, and InvalidMutation for too many changes.
        """
        limit = self._settings.max_mutation_changes
        made = self._apply_function(db, mutation)
        if isinstance(made, NOT_CHANGES):
            raise TypeError("apply returns an iterable of changes, such as a list")
        try:
            changes = list(itertools.islice(made or (), limit + 1))
        finally:
            # A generator that is not exhausted ends here, while what it does at its end
            # can still be undone.
            del made
        if len(changes) > limit:
            raise InvalidMutation(f"the mutation makes over {limit} changes")
        first = self._start + len(self.rows) + 1
        rows = []
        for cursor, change in enumerate(changes, first):
            data = change
            scope = mutation.scope
            if isinstance(change, Change):
                data = change.data
                scope = scope if change.scope is None else change.scope
                if not is_name(scope, MAX_SCOPE):
                    raise ValueError(f"a change is for {scope!r}, which is no scope")
            text = data.text if isinstance(data, Json) else encode_json(data)
            text.encode()  # a lone surrogate fails here, where it can be undone
            rows.append(Row(cursor, first, scope, self._time, text))
        return rows

    def _add(self, mutation: Mutation, rows: Sequence[Row]) -> Result:
        """Append the changes of a mutation, and mark it as applied."""
        shown = []
        for row in rows:
            encoded = self._tail(row.scope).add(row)
            if row.scope == mutation.scope:
                shown.append(encoded)
        self.rows += rows
        first = rows[0].cursor if rows else None
        last = rows[-1].cursor if rows else self._tail(mutation.scope).current
        key = (mutation.scope, mutation.id)
        self.marks[key] = Mark(*key, first, last)
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

    def _repeat(self, mark: Mark, push: Sequence[Step]) -> Result:
        """Return the result that a mutation got when it was applied.

        Its changes in its own scope come with it, unless some were trimmed. A hundred
        repeats of a large mutation are a small request: leave the changes out once the
        answer is as large as a page.
        """
        shown = None
        size = sum(len(step.result.encoded) for step in push if step.result)
        if size <= self._settings.max_page_size:
            first = mark.first or mark.last + 1  # without changes, the range is empty
            if first > self._start:  # this batch has applied it
                rows = self.rows[first - self._start - 1 : mark.last - self._start]
            else:
                rows = self.store.read_range(self.db, first, mark.last)
            if len(rows) == mark.last - first + 1:
                shown = [row.encode() for row in rows if row.scope == mark.scope]
        return Result.applied(mark.last, shown, duplicate=True)


def describe(mutation: Mutation) -> str:
    """Return what a log may say of a mutation: not its args, which may be private."""
    return f"{mutation.name!r}, id {mutation.id!r} in scope {mutation.scope!r}"


# --- Retention ------------------------------------------------------------------------
# Trims remove the oldest changes of a scope, whole mutations, a few in each
# transaction. A client that is behind a trim continues from a snapshot. With
# `keep_changes` each transaction trims some of the scopes that it adds to. There is no
# list of scopes: one that grows is found again.

TRIM_STEP = 200  # changes that one transaction removes: no push waits long behind it


def trim_scope(batch: Batch, scope: str, before: int, limit: int = TRIM_STEP) -> int:
    """Remove about `limit` of the oldest changes below a cursor; return how many."""
    removed = batch.store.trim(batch.db, scope, before, limit)
    if removed:
        batch.trimmed.add(scope)
    return removed


def apply_retention(batch: Batch, keep: int) -> None:
    """Trim scopes that a batch adds to down to their newest `keep` changes, about."""
    # To find where a trim would end takes `keep` steps, so not every commit does it.
    # Each change selects its scope with a probability of 10 / keep. Between two trims a
    # scope grows by a tenth of `keep`, so each may remove twice as much.
    for scope, tail in batch.added.items():
        if random.random() * keep < 10 * len(tail.changes):
            before = batch.store.read_nth_newest(batch.db, scope, keep)
            trim_scope(batch, scope, before, max(TRIM_STEP, keep // 5))


# --- Writer ---------------------------------------------------------------------------
# One thread owns the connection that writes. It takes one job after the other and, for
# up to max_commit_time, commits them as one transaction (group commit): one fsync
# serves them all. Each mutation runs under a savepoint, so one that fails leaves no
# trace. Memory follows the commit, and then answers and hints.
#
# There is one rule for a transaction that fails: each of its steps runs again, in a
# transaction of its own. A step that works then had a neighbour at fault. If it fails
# again, the engine probes the disk with a write of its own: if that works, the step is
# at fault (internal_error); if it fails too, the disk is (unavailable), and what is
# left is refused without being tried.

COUNTERS = (
    "pushes", "pushes_failed", "applied", "invalid_mutation", "not_found", "conflict",
    "forbidden", "unavailable", "internal_error", "commits", "pulls_from_memory",
    "pulls_from_disk",
)  # fmt: skip


class Writer:
    """The thread that writes.

    Any thread may call the methods of the first part; the others run on this thread.
    """

    def __init__(
        self,
        store: Store,
        apply: Apply,
        tails: Tails,
        listeners: Listeners,
        settings: Settings,
    ) -> None:
        # True while there is work: the server then yields the GIL once per request.
        self.busy = False
        self.closed = False
        self.rewinds = 0  # restored backups that it has noticed
        self._store = store
        self._apply = apply
        self._tails = tails
        self._listeners = listeners
        self.counts = Counter(dict.fromkeys(COUNTERS, 0))
        self._settings = settings
        # In the order of arrival: nothing overtakes in here. None is that of wake().
        self._waiting: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
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
        interval = min(self._settings.watch_interval, threading.TIMEOUT_MAX)
        # `closed` comes first: once it is true, no job is added that `waiting` misses.
        while not self.closed or self.waiting:
            jobs = self._take(interval)
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
        """Yield the steps of jobs, and for a while of those that arrive meanwhile."""
        deadline = time.monotonic() + self._settings.max_commit_time
        for job in jobs:  # it grows
            yield from job.steps
            if time.monotonic() < deadline:
                # If this takes the mark of wake(), nothing is missed: _begin() has
                # caught up, and under its lock no other process can commit.
                jobs += self._take(0)

    def _commit_steps(self, steps: Iterable[Step], alone: bool = False) -> Hints:
        """Run steps in one transaction, and commit it; return its hints.

        If it fails, run each step alone, and return no hints: they went out with each.
        Raise StoreRefused if the disk refuses, or the lock can't be had: the steps that
        are on disk have a result then, and the others have none.
        """
        # Without the lock, no job that waits can be served: _refuse().
        batch = self._begin()
        begun = []
        try:
            for step in steps:
                begun.append(step)
                step.result = step.run(batch)
            return self._commit(batch)
        except BaseException as error:
            for step in begun:
                step.result = None  # it is not on disk
            self._store.rollback()
            if alone:
                # Is the disk at fault? Then a write of the engine's own fails as well.
                probe = self._begin()
                self._store.probe(probe.db)
                self._commit(probe)
                log_error(engine_log, "the transaction failed on %s", step.name)
                failure = SyncError("the server failed on this mutation")
                step.result = Result.refused(failure)
            elif not isinstance(error, StoreRefused):
                log_error(engine_log, "a transaction failed: its steps run alone")
        if not alone:
            # Those that were not begun as well, in the order of arrival.
            for step in itertools.chain(begun, steps):
                hints = self._commit_steps([step], alone=True)
                self._listeners.notify(hints, {})
        return {}

    def _begin(self) -> Batch:
        """Begin a transaction, and bring memory up to date with other processes."""
        db, position = self._store.begin()
        if position != self._tails.position:
            self._catch_up(db)
        return Batch(self._store, self._apply, self._settings, db, position.head)

    def _commit(self, batch: Batch) -> Hints:
        """Put a transaction on disk, and then into memory; return its hints."""
        if self._settings.keep_changes:
            apply_retention(batch, self._settings.keep_changes)
        marks = list(batch.marks.values())
        position = self._store.commit(batch.rows, marks)
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

        If the database refuses, each of them would wait as long again: 20 pushes would
        be refused after 4 s, and not after 0.2 s. Any other error is a bug; it must not
        end the thread either.
        """
        self._store.rollback()
        for _ in range(self.waiting):
            jobs += self._take(0)
        is_refusal = isinstance(error, StoreRefused)
        if jobs or not is_refusal:
            reason = error.__cause__ or error
            log_error(store_log, "pushes failed: %r", reason, traceback=not is_refusal)
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
        # Otherwise another copy was restored, even if it has grown past `known` since.
        is_rewound = not self._store.has_issued(db, known.epoch, known.head)
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

        Those that are ok are on disk. Raise Unavailable if the store refuses; nothing
        of this push was applied then. Raise InvalidMutation for a value that is no
        mutation, and ValueError for args that are not made of JSON values.
        """
        return await self._run_steps(self._mutation_steps(mutations))

    def submit(self, mutations: Mutations) -> Future[list[Result]]:
        """Push from a thread that has no loop: `engine.submit(mutations).result()`."""
        self._check_process()
        future: Future[list[Result]] = Future()
        future.set_running_or_notify_cancel()  # from here on it can't be cancelled
        self._writer.submit(Job(self._mutation_steps(mutations), future))
        return future

    def _mutation_steps(self, values: Mutations) -> list[Step]:
        """Return a step for each mutation, with a copy of its args."""
        steps: list[Step] = []
        for value in values:
            mutation = value if isinstance(value, Mutation) else Mutation.parse(value)
            args = marshal.dumps(mutation.args)  # five times as fast as deepcopy
            run = functools.partial(
                Batch.apply, mutation=mutation, args=args, push=steps
            )
            steps.append(Step(run, describe(mutation)))
        return steps

    async def _run_steps(self, steps: list[Step]) -> list[Any]:
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

        A page holds about `limit` of them, or about `max_page_size` bytes; it never
        ends inside a mutation. `wait` (seconds) holds an empty page back until there is
        a change. `epoch` is the one in which the client read the cursor, if it knows.
        Raise CursorTooOld, CursorUnknown, Unavailable.
        """
        limit = min(limit or self.settings.pull_limit, self.settings.max_pull_limit)
        if wait <= 0:
            return await self._read_page(scope, cursor, epoch, limit)
        changed = asyncio.Event()

        def on_commit(hints: Hints) -> None:
            # Without hints, every pull is to end: the engine closes, say. A hint of
            # another process's commit comes late; the page may have its changes.
            if not hints or hints[scope].cursor > cursor:
                changed.set()

        # Listen first, then read: no commit can fall between the two.
        remove_listener = self.add_listener(on_commit, scope)
        try:
            if self._writer.closed:  # nothing would end the wait
                raise Unavailable("the engine is closed")
            page = await self._read_page(scope, cursor, epoch, limit)
            if page.encoded_changes:
                return page
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(wait, self.settings.max_pull_wait)):
                    await changed.wait()
            return await self._read_page(scope, cursor, epoch, limit)
        finally:
            remove_listener()

    async def _read_page(self, scope: str, cursor: int, epoch: str, limit: int) -> Page:
        """Return a page from memory if it is up to date, else from the database."""
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
            data = take(db, scope)
            text = data.text if isinstance(data, Json) else encode_json(data)
            return Snapshot(text, cursor, epoch)

        return await self.read(read)

    async def current(self, scope: str = DEFAULT_SCOPE) -> int:
        """Return the cursor of the scope's newest change, or 0. No trim lowers it."""
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
            run = functools.partial(trim_scope, scope=scope, before=end)
            step = Step(run, f"a trim of {scope!r}")
            (removed,) = await self._run_steps([step])
            if isinstance(removed, Result):  # of a step that failed
                raise SyncError("the server failed on this trim")
            if not removed:
                return total
            total += removed

    def close(self, timeout: float | None = None) -> None:
        """Finish what waits, write the WAL back into the file, end the threads. Blocks.

        After `timeout` seconds, a writer that still waits for another process's lock,
        or for `apply`, is left to the end of the process.
        """
        self._check_process()
        in_time = self._writer.close(timeout)
        self._listeners.end_waits()
        if not in_time:
            log_error(engine_log, "the writer did not end in time", traceback=False)
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
# The accelerator: topics, and who follows them. It knows names, numbers and bytes, and
# keeps nothing: a hint that is lost does no harm, for the follower pulls, or hears the
# next one. Hints of a topic merge, and are paced: the first leaves at once, the next no
# sooner than a small multiple of what that fan-out took. A burst of pushes costs a
# follower few frames, and the loop a share.


HANDFUL = 500  # followers that are told before the loop goes round: some 5 ms


class Subscriber(Protocol):
    """Whoever follows topics: a Session here, a socket of another framework
    elsewhere."""

    def hint(
        self, topic: str, cursor: int, message: bytes
    ) -> None: ...  # may skip to the newest
    def message(self, message: bytes) -> None: ...  # may skip none


@dataclasses.dataclass(slots=True)
class Topic:
    """Followers (and whether they want items in their hints), and what they are to
    hear."""

    spoke: float  # when it last did,
    ready: float = 0.0  # and when it may again
    cursor: int = -1  # the newest that was told; -1: none yet
    speaking: bool = False  # a hint goes round, and its end looks at `pending`
    pending: Hint | None = (
        None  # what a timer is going to tell, or the end of that round
    )
    followers: dict[Subscriber, bool] = dataclasses.field(default_factory=dict)

    @property
    def wants_changes(self) -> bool:
        return any(self.followers.values())


class Hub:
    """Topics of one event loop. `encode` makes a transport's message of JSON, once for
    all."""

    def __init__(self, settings: Settings, encode: Callable[[bytes], bytes]) -> None:
        self.settings, self.encode = settings, encode
        self.topics: OrderedDict[str, Topic] = OrderedDict()  # the longest silent first
        self.counts = Counter(hints_sent=0, hints_merged=0)

    def subscribe(self, name: str, subscriber: Subscriber, items: bool = False) -> None:
        self.topics.setdefault(name, Topic(time.monotonic())).followers[subscriber] = (
            items
        )

    def unsubscribe(self, name: str, subscriber: Subscriber) -> None:
        if topic := self.topics.get(name):
            topic.followers.pop(subscriber, None)
            if not topic.followers:
                del self.topics[name]  # its timer finds nobody to tell

    def publish(self, name: str, data: bytes) -> None:
        """Send JSON to every follower of a topic; none of it is merged or skipped."""
        if topic := self.topics.get(name):
            message = self.encode(encode_message(name, data))
            for subscriber in list(topic.followers):
                try:
                    subscriber.message(message)
                except Exception:  # another transport's: it hurts nobody else
                    log_error(live_log, "a follower of %s failed", name)

    def notify(self, hints: Mapping[str, Hint]) -> None:
        """The arrow, `engine.add_listener(hub.notify)`: a hint to the followers of each
        scope."""
        for scope, hint in hints.items():
            self.hint(f"{SYNC}{scope}", hint)

    def hint(self, name: str, hint: Hint) -> None:
        """Tell of a newer cursor: now, or merged with others when the topic may speak
        again."""
        if (topic := self.topics.get(name)) is None:
            return
        # Two that follow on are one with the items of both; of others only the newer
        # cursor stays.
        older, items, most = topic.pending, hint.changes, self.settings.max_hint_changes
        if older and older.changes and items and hint.after == older.cursor:
            both = older.changes + items
            if (
                len(items) <= most < len(both)
                and topic.wants_changes
                and not topic.speaking
            ):
                self._fan_out(
                    name, topic
                )  # now, while they fit: to pull them would cost more
            else:
                hint = hint._replace(after=older.after, changes=both)
        elif older:
            hint = Hint(max(older.cursor, hint.cursor), hint.epoch)
        if hint.changes and len(hint.changes) > most:
            hint = hint._replace(changes=None)
        self.counts["hints_merged"] += topic.pending is not None
        topic.pending = hint
        if (
            older is None
        ):  # else the timer that was set for that tells this one, or a round's end
            self._plan(name, topic)

    def _plan(self, name: str, topic: Topic) -> None:
        if time.monotonic() < topic.ready:
            asyncio.get_running_loop().call_at(topic.ready, self._fan_out, name, topic)
        else:
            self._fan_out(name, topic)

    def _fan_out(self, name: str, topic: Topic) -> None:
        if topic.speaking or (hint := topic.pending) is None or not topic.followers:
            return
        topic.pending, topic.speaking, topic.spoke = None, True, time.monotonic()
        topic.cursor = max(hint.cursor, topic.cursor)
        self.topics.move_to_end(name)
        short = self.encode(encode_message(name, encode_cursor(topic.cursor)))
        long = short
        size = sum(map(len, hint.changes or ()))
        fits = 0 < size <= self.settings.max_hint_size
        if fits and topic.wants_changes and hint.cursor == topic.cursor:
            long = self.encode(encode_message(name, hint.encode()))
        followers, cursor = list(topic.followers.items()), topic.cursor

        def tell_some(start: int) -> None:
            for subscriber, items in followers[start : start + HANDFUL]:
                if subscriber in topic.followers:  # still
                    try:
                        subscriber.hint(name, cursor, long if items else short)
                    except Exception:  # another transport's: it hurts nobody else
                        log_error(live_log, "a follower of %s failed", name)
            if start + HANDFUL < len(followers):
                asyncio.get_running_loop().call_soon(tell_some, start + HANDFUL)
                return
            topic.speaking = False
            self.counts["hints_sent"] += len(followers)
            # So hints take a fifth of the loop; or a 17th, where each follower comes
            # and pulls then, which costs more than its frame. More only where hint_gap
            # ends the pause before.
            now, pause = time.monotonic(), 4 if topic.wants_changes else 16
            topic.ready = now + min(pause * (now - topic.spoke), self.settings.hint_gap)
            if topic.pending:
                self._plan(name, topic)

        tell_some(0)

    def tell(self, name: str, subscriber: Subscriber, cursor: int = 0) -> None:
        """Send one follower the newest cursor: `cursor`, or one that the topic had
        since."""
        if (topic := self.topics.get(name)) and subscriber in topic.followers:
            topic.cursor = cursor = max(cursor, topic.cursor)
            message = self.encode(encode_message(name, encode_cursor(cursor)))
            subscriber.hint(name, cursor, message)

    def beat(self, now: float) -> None:
        """Send again what topics said last that have been silent for long: a lost hint
        heals."""
        limit = now - self.settings.heartbeat
        silent = itertools.takewhile(
            lambda item: item[1].spoke <= limit, self.topics.items()
        )
        for name, topic in list(silent):
            if topic.followers:  # who was told of another may have left this one
                topic.spoke = now
                self.topics.move_to_end(name)
                if topic.cursor >= 0:
                    self.hint(name, Hint(topic.cursor))


# --- HTTP/1.1 -------------------------------------------------------------------------
# Bytes to requests, responses to bytes (RFC 9110, RFC 9112); nothing here waits. One
# rule above all: a message that two parsers could read differently is refused, and the
# connection closed.

_SINGLE = {  # fields that a second line makes ambiguous, not longer
    "authorization", "content-length", "content-type", "host", "origin",
    "sec-websocket-key",
    "sec-websocket-version", "transfer-encoding",
}  # fmt: skip
_SENT_BY_ITSELF = {
    "connection",
    "content-length",
    "content-type",
    "date",
    "transfer-encoding",
}
_TOKEN, _VALUE = (
    r"[!#$%&'*+.^_`|~0-9A-Za-z-]++",
    r"[\t -~\x80-\xff]*+",
)  # (RFC 9110 §5.5, §5.6.2)
_REQUEST_LINE = re.compile(rf"({_TOKEN}) ([!-~]+) HTTP/([0-9])\.([0-9])")
_FIELD = re.compile(rf"({_TOKEN}):({_VALUE})")
_HEAD_END = re.compile(rb"\n\r\n|(?<!\r)\n")  # or what shows that it is none
_CHUNK_SIZE = re.compile(rf"([0-9A-Fa-f]{{1,8}})(?:[ \t]*;[ \t]*{_TOKEN}{_VALUE})?")
_LENGTH = re.compile("[0-9]{1,18}")
_REG_NAME = r"(?:[A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})+"  # (RFC 3986 §3.2.2)
_ADDRESS = r"\[(?=.*:.*:)[0-9A-Fa-f:.]+\]"  # of IPv6, which has two colons or more
_AUTHORITY = re.compile(f"(?:(?:{_REG_NAME}|{_ADDRESS})(?::[0-9]{{0,5}})?)?")
_ABSOLUTE_FORM = re.compile(r"https?://([^/?]*)/?(.*)", re.IGNORECASE)
_PHRASES = {int(status): status.phrase for status in http.HTTPStatus}
# One second's answers have one date.
_http_date = functools.lru_cache(maxsize=1)(
    functools.partial(email.utils.formatdate, usegmt=True)
)


@dataclasses.dataclass
class Request:
    """A request (RFC 9110 §3.4). Field names are in lower case; lines of one name are
    joined."""

    method: str
    target: str  # as it came
    version: tuple[int, int]
    headers: dict[str, str]
    host: str  # of the Host field or the absolute form, in lower case, with its port
    path: str  # decoded
    length: int | None  # bytes of the body; None: chunked
    body: bytes = b""

    @functools.cached_property
    def query(self) -> dict[str, str]:
        """The parameters, as HTML forms write them. Raises InvalidRequest: also for one
        twice."""
        query: dict[str, str] = {}
        for pair in filter(None, self.target.partition("?")[2].split("&")):
            name, _, value = pair.replace("+", " ").partition("=")
            if (name := unquote(name)) in query:
                raise InvalidRequest(f"the parameter {name[:40]!r} is given twice")
            query[name] = unquote(value)
        return query

    @property
    def json(self) -> Any:
        """The body as strict JSON, of at most 64 levels and 100,000 values.

        Raises InvalidRequest, TooLarge.
        """
        return parse_json(self.body)

    def number(self, name: str, default: float, pattern: str = "[0-9]{1,16}") -> float:
        """A parameter that is a number of ASCII digits. Raises InvalidRequest."""
        if (text := self.query.get(name)) is None:
            return default
        if not re.fullmatch(pattern, text):
            raise InvalidRequest(f"{name}={text[:40]!r} is not a number that it can be")
        return float(text) if "." in text else int(text)

    def elements(self, name: str) -> list[str]:
        """A field that is a list, without its empty elements (RFC 9110 §5.6.1)."""
        values = self.headers.get(name, "").split(",")
        return [element for value in values if (element := value.strip(" \t"))]

    def tokens(self, name: str) -> list[str]:
        """A field that is a list of words, in lower case."""
        return [element.lower() for element in self.elements(name)]

    @property
    def bearer(self) -> str:
        """The token that it shows (RFC 6750 §2.1), or "".

        A browser's WebSocket can't send headers: it offers `bearer.TOKEN` among its
        subprotocols."""
        scheme, _, token = self.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            return token.strip(" ")
        offers = self.elements("sec-websocket-protocol")
        return next((offer[7:] for offer in offers if offer.startswith("bearer.")), "")

    @property
    def takes_gzip(self) -> bool:
        """Whether the answer may be compressed: gzip, without a weight of 0 (RFC 9110
        §12.5.3)."""
        weight = r"[ \t]*;[ \t]*q=(1(\.0*+)?|0\.0*+[1-9][0-9]*+)"
        codings = self.tokens("accept-encoding")
        return any(re.fullmatch(f"gzip({weight})?", coding) for coding in codings)

    @property
    def keep_alive(self) -> bool:
        """Whether the peer would send another request here (RFC 9112 §9.3)."""
        options = self.tokens("connection")
        return "close" not in options and (
            self.version >= (1, 1) or "keep-alive" in options
        )


def parse_request(buffer: bytearray, settings: Settings) -> Request | None:
    """Take a request's head off the front of `buffer`; None, and nothing taken, until
    it is whole.

    Raises SyncError with the status to answer; then nothing behind it can be read as a
    request. Judged in the order of the bytes, so any way of cutting them gives the same
    (RFC 9112 §2, §3)."""
    skip_empty_lines(buffer)
    find_line(
        buffer, b"\r\n", 0, settings.max_target_size + 64, 414
    )  # has a limit of its own
    end = find_line(buffer, b"\r\n\r\n", 0, settings.max_head_size, 431)
    if end < 0:
        return None
    line, *fields = buffer[:end].decode("latin-1").split("\r\n")
    if not (words := _REQUEST_LINE.fullmatch(line)):
        raise InvalidRequest("the request line is not: method, target, HTTP version")
    method, target, major, minor = words.groups()
    version = int(major), min(int(minor), 1)
    if version[0] != 1:
        raise HTTPError(505, "this server speaks HTTP/1.1")
    if len(target) > settings.max_target_size:
        raise HTTPError(
            414, f"the request target is longer than {settings.max_target_size} bytes"
        )
    if len(fields) > settings.max_head_fields:
        raise HTTPError(
            431, f"the head has more than {settings.max_head_fields} fields"
        )
    headers = parse_fields(fields)
    host = headers.get(
        "host", "" if version < (1, 1) else "?"
    )  # 1.1 has to send it (§3.2)
    valid = _AUTHORITY.fullmatch(
        host
    )  # also where the absolute form overrides it (§3.2.2)
    if absolute := _ABSOLUTE_FORM.fullmatch(target):
        host, target = absolute[1], "/" + absolute[2]
        valid = valid and _AUTHORITY.fullmatch(host or "?")
    if not valid:
        raise InvalidRequest("the request needs one valid Host")
    if (
        "#" in target
        or not target.startswith("/")
        and (method, target) != ("OPTIONS", "*")
    ):
        raise InvalidRequest("the request target has to be a path, without a fragment")
    path, length = unquote(target.partition("?")[0]), body_length(headers, version)
    del buffer[: end + 4]  # one that is refused stays: to HEAD the refusal has no body
    return Request(method, target, version, headers, host.lower(), path, length)


def skip_empty_lines(buffer: bytearray) -> None:
    while buffer.startswith(
        b"\r\n"
    ):  # some clients end a body with one (RFC 9112 §2.2)
        del buffer[:2]


def find_line(
    buffer: bytearray, mark: bytes, start: int, limit: int, status: int
) -> int:
    """Where `mark`, an end of lines, begins; -1 while it may still come.

    Raises HTTPError with `status` once it can't come within `limit` bytes, and
    InvalidRequest for LF alone before it: who takes that for a line's end would see
    other lines (RFC 9112 §2.2)."""
    end = buffer.find(mark, start, limit)
    stop = end if end >= 0 else limit
    if buffer.count(b"\n", start, stop) != buffer.count(b"\r\n", start, stop):
        raise InvalidRequest("a line ends without CR")
    if end < 0 and len(buffer) >= limit:
        raise HTTPError(status, f"a part of the request is longer than {limit} bytes")
    return end


def parse_fields(lines: Iterable[str]) -> dict[str, str]:
    """Field lines by name (RFC 9112 §5). A folded one begins with a space: its name is
    no token."""
    fields: dict[str, str] = {}
    for line in lines:
        if not (words := _FIELD.fullmatch(line)):
            raise InvalidRequest(
                "a header line is not: name, colon, value without controls"
            )
        key, text = words[1].lower(), words[2].strip(" \t")
        if key in fields:
            if key in _SINGLE:
                raise InvalidRequest(f"the header {key} is given twice")
            text = f"{fields[key]}, {text}"
        fields[key] = text
    return fields


def body_length(headers: Mapping[str, str], version: tuple[int, int]) -> int | None:
    """How a body is framed: its length, or None for chunked (RFC 9112 §6.3)."""
    coding, length = (
        headers.get("transfer-encoding"),
        headers.get("content-length", "0"),
    )
    if coding is None:
        if not _LENGTH.fullmatch(length):
            raise InvalidRequest("the Content-Length is not a number")
        return int(length)
    if "content-length" in headers:
        # Both at once is how a request is smuggled past a proxy (§6.1): refuse, and
        # close.
        raise InvalidRequest("Transfer-Encoding beside Content-Length")
    if version < (1, 1):
        raise InvalidRequest("HTTP/1.0 has no Transfer-Encoding")
    if coding.lower() == "chunked":
        return None
    if coding.lower().rpartition(",")[2].strip(" \t") != "chunked":
        raise InvalidRequest(
            "a body whose last transfer coding is not chunked has no end"
        )
    raise HTTPError(501, "of the transfer codings only chunked is implemented")


def unquote(text: str) -> str:
    """Percent-decode, strictly: each escape whole, and UTF-8 in the end."""
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
        self.settings, self.body = settings, bytearray()
        # Bytes that are not the body's: chunks of one byte carry little at much cost.
        self.framing = 0

    def take(self, buffer: bytearray) -> bool:
        """Take what is whole off the front of `buffer`; True when the body is. Raises
        SyncError."""
        longest = (
            self.settings.max_target_size
        )  # bytes of a line; of the last chunk with its trailers
        while (end := find_line(buffer, b"\r\n", 0, longest, 431)) >= 0:
            if not (digits := _CHUNK_SIZE.fullmatch(buffer[:end].decode("latin-1"))):
                raise InvalidRequest("a chunk does not begin with its size")
            if (
                len(self.body) + (size := int(digits[1], 16))
                > self.settings.max_body_size
            ):
                raise TooLarge(
                    f"the body is longer than {self.settings.max_body_size} bytes"
                )
            if size == 0:
                if (end := find_line(buffer, b"\r\n\r\n", end, longest, 431)) < 0:
                    return False
                # Checked, and left: nothing here uses trailers.
                parse_fields(buffer[:end].decode("latin-1").split("\r\n")[1:])
                del buffer[: end + 4]
                return True
            stop = end + 2 + size
            if len(buffer) < stop + 2:
                return False
            if buffer[stop : stop + 2] != b"\r\n":
                raise InvalidRequest("a chunk is not as long as it says")
            self.body += buffer[end + 2 : stop]
            del buffer[: stop + 2]
            self.framing += end + 4
            if self.framing > self.settings.max_head_size:
                raise TooLarge(
                    "the chunked body has more framing than a head may have bytes"
                )
        return False


@dataclasses.dataclass(frozen=True)
class Response:
    """A response (RFC 9110 §3.4). Date, Content-Length and Connection are added as it
    is sent.

    So is `Cache-Control: no-store`, where it has no Cache-Control of its own. What is
    checked here can't be changed afterwards. Raises TypeError, ValueError."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    content_type: str = "application/json"

    def __post_init__(self) -> None:
        if not isinstance(self.body, bytes):
            raise TypeError(
                f"a response's body is bytes, not {type(self.body).__name__}"
            )
        # A line break in a value would begin a field, or a response, of somebody else's
        # making.
        values = "".join((self.content_type, *self.headers.values()))
        if not (values.isascii() and values.isprintable()):
            raise ValueError(f"a response header has to be printable ASCII: {values!r}")
        for name in self.headers:
            if not re.fullmatch(_TOKEN, name):
                raise ValueError(f"a response header's name is a token, not {name!r}")
            if name.lower() in _SENT_BY_ITSELF:
                raise ValueError(f"the server itself sends {name}")
        if not (
            200 <= self.status < 600
            or (self.status == 101 and "Upgrade" in self.headers)
        ):
            raise ValueError(f"{self.status} is not the status of a last response")
        object.__setattr__(self, "headers", MappingProxyType(dict(self.headers)))

    @classmethod
    def of(cls, value: Any) -> Response:
        """What a handler returned: a Response, text, bytes, or else a JSON value."""
        if isinstance(value, Response):
            return value
        if isinstance(value, str):
            return cls(body=value.encode(), content_type="text/plain; charset=utf-8")
        if isinstance(value, bytes):
            return cls(body=value, content_type="application/octet-stream")
        return cls(body=encode_json(value).encode())

    @classmethod
    def refusal(cls, error: SyncError) -> Response:
        """The one envelope of all errors."""
        body = encode_error(error.code, str(error))
        return cls(error.status, body, error.headers)

    @classmethod
    def page(cls, html: bytes) -> Response:
        """An HTML page whose own script and style may run, and nothing else (CSP Level
        3)."""
        # What a browser sees: no element in a comment, and of line ends LF alone.
        comment, attributes = (
            rb"<!--(?:-?>|.*?--!?>)",
            rb"\b(?:\"[^\"]*\"|'[^']*'|[^>\"'])*+",
        )
        element = rb"(?si)%b|<(script|style)%b>(.*?)</\1" % (comment, attributes)
        sources = {
            b"": "",
            b"script": "",
            b"style": "",
        }  # of a comment too, for nothing
        for tag, text in re.findall(element, re.sub(rb"\r\n?", b"\n", html)):
            digest = base64.b64encode(hashlib.sha256(text).digest()).decode()
            sources[tag.lower()] += f" 'sha256-{digest}'"
        policy = (
            "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none';"
        )
        policy += " form-action 'none'; frame-ancestors 'none';"
        policy += f" script-src{sources[b'script']}; style-src{sources[b'style']}"
        headers = {
            "Content-Security-Policy": policy,
            "X-Content-Type-Options": "nosniff",
        }
        return cls(200, html, headers, "text/html; charset=utf-8")

    def _has(self, name: str) -> bool:
        return name in map(str.lower, self.headers)

    def compress(self) -> Response:
        """The same, compressed (RFC 9110 §8.4.1.3): if it is text, and not encoded
        already."""
        is_text = self.content_type.startswith(("application/json", "text/"))
        if not is_text or self.status == 206 or self._has("content-encoding"):
            return self
        # So that no cache gives it to who can't read it (RFC 9110 §12.5.5).
        vary = ", ".join(filter(None, (self.headers.get("Vary"), "Accept-Encoding")))
        headers = {**self.headers, "Content-Encoding": "gzip", "Vary": vary}
        body = gzip.compress(self.body, 1, mtime=0)
        return Response(self.status, body, headers, self.content_type)

    def encode(self, connection: str = "", head_only: bool = False) -> bytes:
        """As bytes. `connection` is the Connection field, where there is something to
        say."""
        head = f"HTTP/1.1 {int(self.status)} {_PHRASES.get(self.status, '')}\r\n"
        head += f"Date: {_http_date(int(time.time()))}\r\n"
        if not self._has("cache-control"):
            head += "Cache-Control: no-store\r\n"
        bodiless = self.status < 200 or self.status in (
            204,
            304,
        )  # (RFC 9112 §6.3, 9110 §8.6)
        if not bodiless:
            head += f"Content-Type: {self.content_type}\r\n"
            head += f"Content-Length: {len(self.body)}\r\n"
        if self._has("upgrade"):  # a field of this connection alone (RFC 9110 §7.8)
            connection = f"Upgrade, {connection}" if connection else "Upgrade"
        if connection:
            head += f"Connection: {connection}\r\n"
        for name, value in self.headers.items():
            head += f"{name}: {value}\r\n"
        whole = f"{head}\r\n".encode()
        return whole if head_only or bodiless else whole + self.body


# --- WebSocket ------------------------------------------------------------------------
# RFC 6455, server side: the handshake, frames, messages; nothing here waits. What
# breaks a rule raises ProtocolError with the code to close with (§7.4.1): 1002 protocol
# error, 1003 data of a kind that is not taken, 1007 not UTF-8, 1009 too big. Others are
# 1000 normal, 1001 going away, 1008 policy, 1011 our fault, 1013 try again later.

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = (
    0x0,
    0x1,
    0x2,
    0x8,
    0x9,
    0xA,
)  # opcodes (§11.8)
MAX_CONTROL_PAYLOAD = 125  # bytes (§5.5)
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # (§1.3)


class Frame(NamedTuple):
    """One frame of a client, unmasked (§5.2)."""

    opcode: int
    payload: bytes
    fin: bool = True


def parse_frame(buffer: bytearray, max_payload: int) -> Frame | None:
    """Take one client frame off the front of `buffer`; None, and nothing taken, until
    more comes.

    It has one byte with FIN, three reserved bits and the opcode; one with MASK and a
    length, where 126 and 127 mean that the length follows in 2 or 8 bytes; 4 bytes of
    key; and its payload. Raises ProtocolError: 1002 for a frame that breaks a rule,
    1009 for one of more than `max_payload` bytes (§5.2, §7.4.1); as soon as the bytes
    that show it are there."""
    if len(buffer) < 2:
        return None
    fin, opcode, size = bool(buffer[0] & 0x80), buffer[0] & 0x0F, buffer[1] & 0x7F
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
        start, least = (4, 126) if size == 126 else (10, 1 << 16)
        if len(buffer) < start:
            return None
        size = int.from_bytes(buffer[2:start], "big")
        if not least <= size < 1 << 63:
            raise ProtocolError(1002, "the length is not in its shortest form")
    if opcode < CLOSE and size > max_payload:
        raise ProtocolError(1009, "the message is too long")
    start += 4  # behind the masking key
    if len(buffer) < start + size:
        return None
    # XOR with the repeated key (§5.3), as two long numbers: byte by byte takes 50 times
    # as long.
    mask = int.from_bytes(
        (buffer[start - 4 : start] * (size // 4 + 1))[:size], "little"
    )
    payload = int.from_bytes(buffer[start : start + size], "little") ^ mask
    del buffer[: start + size]
    return Frame(opcode, payload.to_bytes(size, "little"), fin)


def encode_frame(opcode: int, payload: bytes) -> bytes:
    """A whole frame of a server: not masked (§5.1)."""
    size = len(payload)
    if size < 126:
        return bytes((0x80 | opcode, size)) + payload
    mark, width = (126, 2) if size < 1 << 16 else (127, 8)
    return bytes((0x80 | opcode, mark)) + size.to_bytes(width, "big") + payload


class Assembler:
    """Data frames to messages (§5.4); text is judged as its frames come, not at its end
    (§8.1)."""

    def __init__(self, max_size: int) -> None:
        self.room = max_size  # bytes that the message under way may still have
        self._judge = codecs.getincrementaldecoder("utf-8")().decode
        self._opcode = CONTINUATION  # of the message under way, if there is one
        self._data = (
            bytearray()
        )  # its frames so far: one by one they would take 40 times as much

    def add(self, frame: Frame) -> str | bytes | None:
        """The message, when this frame was its last. Raises ProtocolError."""
        if (frame.opcode == CONTINUATION) == (self._opcode == CONTINUATION):
            raise ProtocolError(1002, "fragments out of order")
        self._opcode = self._opcode or frame.opcode
        self._data += frame.payload
        self.room -= len(frame.payload)
        text = self._opcode == TEXT
        try:
            if text:
                self._judge(frame.payload, frame.fin)
        except UnicodeDecodeError:
            raise ProtocolError(1007, "the text is not UTF-8") from None
        if not frame.fin:
            return None
        data, self._data, self._opcode = self._data, bytearray(), CONTINUATION
        self.room += len(data)
        return data.decode() if text else bytes(data)


def is_close_code(code: int) -> bool:
    return (
        1000 <= code <= 1014 and code not in (1004, 1005, 1006) or 3000 <= code <= 4999
    )


def parse_close(payload: bytes) -> tuple[int, str]:
    """A close frame's code and reason; 1005: it has none (§5.5.1, §7.4). Raises
    ProtocolError."""
    if not payload:
        return 1005, ""
    code = int.from_bytes(
        payload[:2], "big"
    )  # of a single byte, which is refused: below 256
    if not is_close_code(code):
        raise ProtocolError(1002, "the close code is not one to be sent")
    try:
        return code, payload[2:].decode("utf-8")
    except UnicodeDecodeError:
        raise ProtocolError(1007, "the close reason is not UTF-8") from None


def handshake(request: Request) -> Response:
    """The answer to a handshake (§4.2); extensions it declines by naming none. Raises
    SyncError."""
    upgrade, connection = request.tokens("upgrade"), request.tokens("connection")
    version = request.headers.get("sec-websocket-version")
    if "websocket" not in upgrade or "upgrade" not in connection or version != "13":
        spoken = {"Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
        raise HTTPError(426, "this endpoint speaks WebSocket, version 13", spoken)
    key = request.headers.get("sec-websocket-key", "")
    if not re.fullmatch("[A-Za-z0-9+/]{21}[AQgw]==", key):
        raise InvalidRequest("the Sec-WebSocket-Key is not 16 bytes in Base64")
    if request.length != 0 or request.version < (1, 1):
        raise InvalidRequest(
            "a WebSocket begins with a request of HTTP/1.1, without a body"
        )
    digest = base64.b64encode(hashlib.sha1(key.encode() + _GUID).digest()).decode()
    headers = {"Upgrade": "websocket", "Sec-WebSocket-Accept": digest}
    if "mizusync" in request.elements("sec-websocket-protocol"):  # in its own case
        headers["Sec-WebSocket-Protocol"] = "mizusync"
    return Response(101, headers=headers)


# --- Connection -----------------------------------------------------------------------
# A socket: bytes in, bytes out. One place reads, and hands what it has to the parsers
# above. Each phase has one deadline, a number that the server's sweep looks at: a timer
# for each read would cost more than the read, and would let a peer live for ever on a
# byte a minute. (On a WebSocket a peer that sends anything is alive, see
# WebSocket._ping, and a message's size is its limit.)

READ_SIZE = (
    64 * 1024
)  # bytes; also what may wait for the peer to read before we wait for it


class ConnectionLost(ConnectionError):
    """The peer is gone: nothing that is sent can reach it."""


class Connection(asyncio.Protocol):
    """One accepted socket. `deadline` is the end of its phase, `expire` what then
    happens."""

    def __init__(self, settings: Settings, on_lost: Callable[[], None]) -> None:
        self.settings, self.on_lost = settings, on_lost
        self.transport: Any = None
        self.buffer = bytearray()  # what came, and nobody has taken yet
        self.heard = 0.0  # when bytes came last
        self.full: asyncio.Event | None = (
            None  # while more waits for the peer to read than should
        )
        self.on_writable: Callable[[], None] = lambda: (
            None
        )  # the peer has read what waited
        self.lingering = False  # all is said, and what still comes is dropped
        self.unread = (
            False  # a body that nobody took off the buffer: nothing can follow it
        )
        self.end: Exception | None = None  # why nothing more will come
        self._arrival: asyncio.Future[None] | None = None  # of what somebody waits for
        self.give(math.inf, self.abort)

    # -- what asyncio calls

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.set_write_buffer_limits(READ_SIZE)  # TLS's own would be 512 KiB

    def data_received(self, data: bytes) -> None:
        self.heard = time.monotonic()
        if not self.lingering:
            self.buffer += data
            if self._arrival is None and len(self.buffer) > READ_SIZE:
                self.transport.pause_reading()  # until somebody asks for more
            self._wake()

    def eof_received(self) -> bool:
        self._fail(ConnectionError("the peer closed the connection"))
        # It may still read; but not over TLS. False: the transport closes itself.
        return not self.lingering and bool(self.transport.can_write_eof())

    def pause_writing(self) -> None:
        self.full = asyncio.Event()

    def resume_writing(self) -> None:
        if self.full:
            self.full.set()
            self.full = None
        self.on_writable()

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(exc or ConnectionError("the connection is closed"))
        self.on_lost()
        self.resume_writing()  # else who waits for the peer to read waits for ever

    def _wake(self) -> None:
        if self._arrival and not self._arrival.done():
            self._arrival.set_result(None)

    def _fail(self, error: Exception) -> None:
        self.end = self.end or error
        self._wake()

    # -- time

    def give(self, seconds: float, expire: Callable[[], object]) -> None:
        """Begin a phase that may take so long."""
        self.deadline, self.expire = time.monotonic() + seconds, expire

    def abort(self) -> None:
        if self.transport:
            self.transport.abort()

    @property
    def idle(self) -> bool:
        """Whether it waits and nothing has come: no byte of a head, no head before a
        body."""
        shaking_hands = self.transport is None  # in TLS
        return (
            shaking_hands
            or self._arrival is not None
            and not (self.buffer or self.unread)
        )

    def _time_out(self) -> None:
        # This only wakes who reads; Server._serve then calls `finish`. A bare close()
        # would wait for ever for a peer that does not read its answer, and a second one
        # breaks TLS.
        if (
            self._arrival and not self._arrival.done()
        ):  # else bytes came in this very turn
            late = HTTPError(408, "the request did not arrive in time")
            self._fail(ConnectionError("no request came") if self.idle else late)

    # -- in

    async def receive(self) -> None:
        """Wait for more bytes. Raises OSError at their end, or what a deadline says."""
        if self.end:
            raise self.end
        if self._arrival:
            raise RuntimeError("two tasks wait for the same bytes")
        self.transport.resume_reading()
        self._arrival = asyncio.get_running_loop().create_future()
        try:
            await self._arrival
        finally:
            self._arrival = None

    def glance(self) -> None:
        """Read on if the peer has gone: over TLS its end shows only to who reads."""
        if self.transport.is_reading() or self.transport.can_write_eof():
            return
        gone = contextlib.suppress(
            OSError, AttributeError
        )  # nothing came; the socket is gone
        with gone, self.transport.get_extra_info("socket").dup() as sock:
            if not sock.recv(1, socket.MSG_PEEK):
                self.transport.resume_reading()  # what came before the end, and the end

    async def next_request(self) -> Request:
        """The next head. Raises SyncError for a bad or late one, OSError when none
        comes."""
        settings, buffer = self.settings, self.buffer
        self.give(settings.idle_timeout, self._time_out)
        self.glance()
        skip_empty_lines(buffer)
        while not buffer:
            await self.receive()
            skip_empty_lines(buffer)
        self.give(settings.head_timeout, self._time_out)
        start = limit = 0
        while True:
            # Parsed only when an empty line, a bare LF or its limit may end it: at each
            # byte anew, a slow sender would cost more than a fast one.
            if len(buffer) >= limit or _HEAD_END.search(buffer, start):
                if request := parse_request(buffer, settings):
                    break
                limit = (
                    settings.max_head_size
                    if b"\n" in buffer
                    else settings.max_target_size + 64
                )
            start = max(0, len(buffer) - 2)
            await self.receive()
        if self.transport.is_closing():  # a pipeline whose answers nobody will read
            raise ConnectionLost("the peer is gone")
        self.deadline, self.unread = math.inf, request.length != 0
        return request

    async def read_body(self, request: Request) -> bytes:
        """The whole body, or SyncError: one that did not arrive whole is never looked
        at."""
        if (size := request.length) == 0:
            return b""
        if size and size > self.settings.max_body_size:
            raise TooLarge(
                f"the body is longer than {self.settings.max_body_size} bytes"
            )
        if "100-continue" in request.tokens("expect") and request.version >= (1, 1):
            # (RFC 9110 §10.1.1)
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self.give(self.settings.body_timeout, self._time_out)
        chunked = ChunkedBody(self.settings)
        try:
            while not (
                chunked.take(self.buffer) if size is None else len(self.buffer) >= size
            ):
                await self.receive()
        except OSError:
            raise InvalidRequest("the body ended before its length") from None
        self.deadline, self.unread = math.inf, False
        body = chunked.body if size is None else self.buffer[:size]
        del self.buffer[: size or 0]
        return bytes(body)

    # -- out

    async def send(self, data: bytes) -> None:
        """Write, and wait while the peer has much to read: who does not read is not
        read from."""
        # In pieces: what TLS has handed to the socket's transport, it does not see any
        # more.
        for start in range(0, len(data), READ_SIZE):
            if start:
                await asyncio.sleep(
                    0
                )  # after a turn TLS knows, too, whether the peer is gone
            if self.transport.is_closing():
                raise ConnectionLost("the peer is gone")
            self.transport.write(data[start : start + READ_SIZE])
            if self.full:
                self._press()
                await self.drain()
                self.deadline = math.inf

    async def drain(self) -> None:
        if self.full:
            await self.full.wait()

    def _press(self, left: float = math.inf) -> None:
        """Wait for the peer to read: each send_timeout has to bring some progress."""
        if (still := self.transport.get_write_buffer_size()) >= left:
            self.abort()
        self.give(self.settings.send_timeout, functools.partial(self._press, still))

    async def finish(self) -> None:
        """Close so that the peer can read our last words: half now, the rest when it
        has.

        A close with unread bytes in the socket would reset it, and the reset overtakes
        the answer (RFC 9112 §9.6)."""
        if not self.transport.is_closing():
            self.transport.set_write_buffer_limits(
                1, 0
            )  # TLS takes 0 for "always full"
        self._press()
        await self.drain()  # until all that we said is the kernel's
        self.lingering = True
        self.give(self.settings.linger_timeout, self.abort)
        if self.transport.is_closing():
            return
        by_half = self.transport.can_write_eof()  # TLS can't
        # An OSError: the peer has said all that it will, or no request came.
        if isinstance(self.end, OSError) or not (by_half or self.unread):
            self.transport.close()
            return
        if by_half:
            self.transport.write_eof()
        self.transport.resume_reading()


class WebSocket:
    """A WebSocket's server side: `async for message in websocket`, `await
    websocket.send(message)`.

    Text is str, binary is bytes. Until `accept` (or the first message) a SyncError that
    is raised still becomes an HTTP answer. Pings are answered, and sent, by themselves.
    """

    def __init__(self, connection: Connection, request: Request) -> None:
        self.connection, self.request, self.settings = (
            connection,
            request,
            connection.settings,
        )
        # In this order: the handshake is answered, we send nothing more, we read
        # nothing more.
        self.accepted = self.closing = self.over = False
        self.name, self.reason = (
            request.path,
            "",
        )  # for the log: who it is, why it was closed
        self.error: Exception | None = None  # what went wrong, if anything did
        self._response = handshake(request)
        self._assembler = Assembler(self.settings.max_message_size)

    def accept(self) -> None:
        """Answer the handshake: from here on it is a WebSocket."""
        if not self.accepted:
            self.accepted = True
            self.connection.transport.write(self._response.encode())
            self._ping()

    async def send(self, message: str | bytes) -> None:
        """Send a message, waiting while the peer has much to read. Raises
        ConnectionLost."""
        self.accept()
        frame = (
            (TEXT, message.encode()) if isinstance(message, str) else (BINARY, message)
        )
        self.write(encode_frame(*frame))
        await self.connection.drain()
        self.connection.glance()
        await asyncio.sleep(0)  # who sends without end would keep the loop to itself
        if self.closing or self.connection.transport.is_closing():
            raise ConnectionLost("the peer is gone, or going")

    def write(self, frame: bytes) -> None:
        # asyncio warns of writes to a socket that is gone, and a peer can make us owe
        # it many.
        if not self.closing and not self.connection.transport.is_closing():
            self.connection.transport.write(frame)

    def close(self, code: int = 1000, reason: str = "") -> None:
        """Begin the closing handshake; it ends when the peer answers, or after
        close_timeout."""
        if code != 1005 and not is_close_code(code):
            raise ValueError(f"{code} is no close code to be sent (RFC 6455 §7.4)")
        if not self.closing:
            self.accept()
            self.reason = self.reason or f"{code} {reason}"
            words = (
                reason.encode()[: MAX_CONTROL_PAYLOAD - 2]
                .decode(errors="ignore")
                .encode()
            )
            payload = b"" if code == 1005 else code.to_bytes(2, "big") + words
            self.write(encode_frame(CLOSE, payload))
            self.closing = True
            self.connection.give(self.settings.close_timeout, self.connection.abort)

    async def __aiter__(self) -> AsyncIterator[str | bytes]:
        while (message := await self.receive()) is not None:
            yield message

    async def receive(self) -> str | bytes | None:
        """The next message; None when there will be none."""
        self.accept()
        buffer = self.connection.buffer
        try:
            while not self.over:
                if (
                    buffer
                ):  # of many frames that came together each lets others have a turn,
                    await asyncio.sleep(
                        0
                    )  # before it is taken: who gives up here loses none
                while (frame := parse_frame(buffer, self._assembler.room)) is None:
                    await self.connection.receive()
                if frame.opcode == CLOSE:
                    code, reason = parse_close(frame.payload)
                    self.reason = self.reason or f"the peer closed: {code} {reason}"
                    self.close(code)  # the same code back (§5.5.1)
                    break
                if frame.opcode == PING:
                    self.write(encode_frame(PONG, frame.payload))
                    await self.connection.drain()  # who does not read is not read from
                elif frame.opcode == PONG or self.closing:
                    # a pong shows life by itself; after our close nothing else counts
                    pass
                elif (message := self._assembler.add(frame)) is not None:
                    return message
        except (ProtocolError, OSError) as error:
            self.error = self.error or error
            if isinstance(error, ProtocolError):  # else there is nobody to tell
                self.connection.unread = (
                    True  # it may still be sending, and shall hear why
                )
                self.close(error.code, str(error))
        self.closing = self.over = True
        return None

    def _ping(self, pinged: float = math.inf, unsent: int = 0) -> None:
        """Ping after some silence, and give up a peer without a sign of life in
        ping_timeout.

        `pinged` is when an answer was asked for, `unsent` how much it had to read
        before that."""
        connection, transport, now = (
            self.connection,
            self.connection.transport,
            time.monotonic(),
        )
        interval, timeout = self.settings.ping_interval, self.settings.ping_timeout
        still, deaf = transport.get_write_buffer_size(), not transport.is_reading()
        # A slow reader answers late, a dead one never: does it still take bytes? While
        # we do not read from it, and wait for nothing to be sent, its answer can't be
        # heard: no judgement.
        if still < unsent or (deaf and not still) or connection.heard > pinged:
            pinged = math.inf
        connection.glance()
        if pinged + timeout <= now:
            self.reason = f"no answer to a ping for {timeout:g} s"
            connection.abort()
        elif (quiet := now - connection.heard) < interval:
            connection.give(interval - quiet, self._ping)
        else:
            if pinged > now:
                pinged = now
                self.write(encode_frame(PING, b""))
            pause = min(
                interval, pinged + timeout - now
            )  # who answered is pinged in time again
            connection.give(pause, functools.partial(self._ping, pinged, still))


# --- Session --------------------------------------------------------------------------
# One live client of the protocol. While its socket is full it is owed one cursor a
# topic, the newest: a slow reader costs a set of names, not a queue.


class Session:
    """One client that is connected to /ws. A Subscriber of the hub."""

    def __init__(
        self, websocket: WebSocket, hub: Hub, scope: str, identity: Any
    ) -> None:
        self.id = secrets.token_urlsafe(9)
        self.scope, self.identity = (
            scope,
            identity,
        )  # that it came with, and what on_auth returned
        self.websocket, self.hub, self.settings = websocket, hub, websocket.settings
        self.topics: dict[
            str, int
        ] = {}  # the newest cursor that each was sent; it never goes down
        self.asked = time.monotonic()  # when on_auth was, last
        self.failures = 0  # of on_auth in a row, when it was asked again
        self.holds_scope = True  # whether it still may see the scope that it came with
        self._owed: set[str] = set()
        # The kernel holds a little for the peer, the transport nothing: so a slow
        # reader shows.
        transport, size = websocket.connection.transport, self.settings.send_buffer
        transport.set_write_buffer_limits(1, 0)
        with contextlib.suppress(
            OSError, AttributeError
        ):  # the peer may be gone, and the socket
            transport.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_SNDBUF, size
            )
        websocket.connection.on_writable = self._pay

    @property
    def scopes(self) -> set[str]:
        """The scopes that it may see, as on_auth last said."""
        topics = [topic for topic in self.topics if topic.startswith(SYNC)]
        subscribed = {topic.removeprefix(SYNC) for topic in topics}
        return subscribed | {self.scope} if self.holds_scope else subscribed

    def send(self, topic: str, data: Any) -> None:
        """Send a message of the application's. Past `max_session_queue` unsent bytes:
        1013."""
        text = encode_message(topic, encode_json(data).encode())
        self.message(encode_frame(TEXT, text))

    def send_error(self, code: str, sentence: str, scope: str | None = None) -> None:
        """Tell the client that a message, or a scope, is refused."""
        text = encode_message("error", encode_error(code, sentence, scope))
        self.message(encode_frame(TEXT, text))

    def close(self, code: int = 1000, reason: str = "") -> None:
        """Close with a code of RFC 6455 §7.4."""
        self.websocket.close(code, reason)

    def hint(self, topic: str, cursor: int, message: bytes) -> None:
        if self.websocket.connection.full:
            self._owed.add(topic)
        elif cursor >= self.topics.get(topic, 0):
            self.topics[topic] = cursor
            self.websocket.write(message)

    def _pay(self) -> None:
        owed, self._owed = self._owed, set()
        for topic in owed:
            self.hub.tell(topic, self)

    def message(self, message: bytes) -> None:
        unsent = self.websocket.connection.transport.get_write_buffer_size()
        if unsent + len(message) > self.settings.max_session_queue:
            self.close(1013, "too slow for a topic that is not merged")
        else:
            self.websocket.write(message)

    def follow(self, topic: str, items: bool = False) -> None:
        """Subscribe. Raises TooLarge past `max_session_topics`."""
        if (
            topic not in self.topics
            and len(self.topics) >= self.settings.max_session_topics
        ):
            raise TooLarge(
                f"a session has at most {self.settings.max_session_topics} topics"
            )
        self.topics.setdefault(topic, 0)
        self.hub.subscribe(topic, self, items)

    def leave(self, topic: str) -> None:
        self.topics.pop(topic, None)
        self._owed.discard(topic)
        self.hub.unsubscribe(topic, self)

    def allow(self, scope: str, identity: Any) -> None:
        """Take the identity that on_auth returned for the session's own scope."""
        if scope == self.scope:
            self.identity, self.holds_scope = identity, True

    def forbid(self, scope: str, refusal: Forbidden) -> None:
        """End the subscription to a scope, and tell the client so."""
        if scope == self.scope:
            self.holds_scope = False
        self.leave(f"{SYNC}{scope}")
        self.send_error(refusal.code, str(refusal), scope)


# --- Gate -----------------------------------------------------------------------------
# Who may. Host and Origin keep web pages of other sites out, the token and on_auth
# everybody else; what is asked about is the parsed value that is then used.

_AUTHORITY_OF_PAGE = r"(?P<host>[a-z0-9._-]+|\[[0-9a-f:.]+\])(:(?P<port>[0-9]{1,5}))?/?"
_HOST = re.compile(_AUTHORITY_OF_PAGE)
# No page has an origin of ws: or file: (for the latter browsers send "null").
_SCHEME = r"(?!wss?:|file:)(?P<scheme>[a-z][a-z0-9+.-]*)"
_ORIGIN = re.compile(f"{_SCHEME}://{_AUTHORITY_OF_PAGE}")


@dataclasses.dataclass
class Gate:
    """`hosts` None: any. `origins` as browsers write them: "https://example.org"."""

    token: str | None
    hosts: frozenset[str] | None
    origins: frozenset[str]
    on_auth: Callable[[Request, str], Any] | None

    def check(self, request: Request) -> None:
        """Host and Origin. Raises Forbidden."""
        host, origin = request.host, request.headers.get("origin")
        if self.hosts is not None and host and not is_loopback(host):
            # A page elsewhere can make its own name lead here (DNS rebinding): it gets
            # nothing. That takes a name: an IP address can't be made to lead elsewhere.
            name = re.sub(":[0-9]*$", "", host)
            if name not in self.hosts and not is_address(name):
                raise Forbidden(
                    f"this server is not {name[:100]!r}: --allow-host can name it"
                )
        if origin is not None and origin not in self.origins:
            scheme, _, authority = origin.lower().partition("://")
            port = {"http": ":80", "https": ":443"}.get(scheme)
            if not port or host not in (authority, authority + port):
                raise Forbidden(
                    "pages of this origin may not use this server: see --allow-origin"
                )

    def cors(self, request: Request, methods: str) -> dict[str, str]:
        """What lets a page of an allowed origin read the answer (the Fetch standard,
        §3.2)."""
        headers = {"Vary": "Origin"} if self.origins else {}
        if (origin := request.headers.get("origin", "")) in self.origins:
            headers["Access-Control-Allow-Origin"] = origin
            headers["Access-Control-Expose-Headers"] = "Retry-After"
            if "access-control-request-method" in request.headers:
                headers["Access-Control-Allow-Methods"] = methods
                headers["Access-Control-Allow-Headers"] = "Authorization, Content-Type"
                headers["Access-Control-Max-Age"] = "600"
        return headers

    def check_token(self, request: Request) -> None:
        """Raises Unauthorized, where there is a token to show."""
        if self.token is None:
            return
        shown = request.bearer.encode()
        if not shown or not hmac.compare_digest(self.token.encode(), shown):
            raise Unauthorized("this server wants a token: Authorization: Bearer ...")

    async def identify(self, request: Request, scope: str) -> Any:
        """Who asks, for this scope: what on_auth returns. Raises Unauthorized,
        Forbidden."""
        self.check_token(request)
        if self.on_auth is None:
            return None
        identity = await call_app(self.on_auth, request, scope)
        if identity is False:  # many an application writes `return user_may(...)`
            raise Forbidden("this scope is not allowed")
        return identity


async def call_app(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function or a coroutine of the application's gives. Raises what it raises.

    Its own end, as SystemExit or by what it waited for and was cancelled, is a
    RuntimeError here."""
    try:
        result = function(*arguments)
        quick = result is None or not inspect.isawaitable(
            result
        )  # which takes a while to look
        return result if quick else await result
    except BaseException as error:
        if isinstance(error, (Exception, KeyboardInterrupt, GeneratorExit)):
            raise  # by the last a coroutine is told that nobody waits for it any more
        task = asyncio.current_task()
        if isinstance(error, asyncio.CancelledError) and task and task.cancelling():
            raise  # it is we who were cancelled
        raise RuntimeError(f"the application ended with {error!r}") from error


@functools.lru_cache(maxsize=100)  # every request asks, and most for the same
def is_loopback(host: str) -> bool:
    """Whether a name or an address, and perhaps a port, means this machine (RFC 6761
    §6.3)."""
    names = r"((.*\.)?localhost|127(\.[0-9]{1,3}){3}|\[?::1\]?)(:[0-9]*)?"
    return bool(re.fullmatch(names, host))


@functools.lru_cache(maxsize=100)
def is_address(host: str) -> bool:
    """Return whether this is an IP address, in brackets or without."""
    try:
        ipaddress.ip_address(re.sub(r"^\[(.*)\]$", r"\1", host))
    except ValueError:
        return False
    return True


def validate_token(token: str | None) -> None:
    """Raise ValueError for a token that no client, or no browser, could show.

    A browser's WebSocket offers it in the name of a subprotocol, which is a token of
    RFC 9110 §5.6.2. An empty one is a mistake: a variable, say, that was never set.
    """
    if token is None:
        return
    if not isinstance(token, str):
        raise TypeError(f"a token is a string, not {type(token).__name__}")
    if not re.fullmatch(_TOKEN, token):  # which the sentence must not show
        rule = "1 or more letters, digits and !#$%&'*+-.^_`|~"
        raise ValueError(f"a token has {rule}, nothing else")


def normalize_origins(origins: Iterable[str]) -> frozenset[str]:
    """Return origins as browsers write them. Raise ValueError for what none sends.

    "null" is refused, too: a sandboxed frame of any site can have that origin.
    """
    return frozenset(map(_normalize_origin, _each(origins, "an origin")))


def normalize_hosts(hosts: Iterable[str]) -> frozenset[str]:
    """Return hosts as Gate compares them. Raise ValueError for what is no host."""
    return frozenset(map(_normalize_host, _each(hosts, "a host")))


def _each(values: Iterable[str], noun: str) -> list[str]:
    if isinstance(values, (str, bytes)):
        raise TypeError(f"one string, {values!r}, is given for a list of them")
    values = list(values)
    for value in values:
        if not isinstance(value, str):
            raise TypeError(f"{noun} is a string, not {value!r}")
    return values


def _normalize_origin(text: str) -> str:
    advice = "https://example.org or http://localhost:5173, as browsers write it"
    wrong = ValueError(f"{text[:100]!r} is no origin; one is {advice}")
    parts = _ORIGIN.fullmatch(text.lower())
    if not parts:
        raise wrong
    scheme, host, port = parts["scheme"], parts["host"], parts["port"]
    if host.startswith("["):
        try:
            host = f"[{ipaddress.IPv6Address(host[1:-1])}]"
        except ValueError:
            raise wrong from None
    if port is None or int(port) == {"http": 80, "https": 443}.get(scheme):
        return f"{scheme}://{host}"
    if not 0 < int(port) <= 65535:
        raise wrong
    return f"{scheme}://{host}:{int(port)}"


def _normalize_host(text: str) -> str:
    if is_address(text):
        return text
    parts = _HOST.fullmatch(text.lower())
    if not parts:
        raise ValueError(f"{text[:100]!r} is no host; sync.example would be one")
    return parts["host"]  # the port of a Host field is not compared


# --- Server ---------------------------------------------------------------------------
# Routes, sessions, life; and the one arrow between the two halves: the engine tells of
# a commit, the hub tells the topic of each scope in it.

MAX_AUTH_FAILURES = 3  # in a row, when on_auth is asked again about a session


class Server:
    """HTTP and WebSocket over an engine.

    `token`, `allow_origin` and `allow_host` mean what the command line's flags mean;
    what can never match raises ValueError. `on_auth(request, scope)` returns the
    identity of the client. To refuse it raises Unauthorized or Forbidden; False means
    Forbidden, and any other value, None too, is a yes. `on_message(session, topic,
    data)` gets the messages that are not the protocol's; `on_close(session, error)`
    hears of each session's end. Each may be a function or a coroutine. `page` is an
    HTML file, which `GET /` shows; raises OSError where it can't be read.
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
    ) -> None:
        self.engine, self.settings = engine, settings or engine.settings
        self.on_message, self.on_close = on_message, on_close
        validate_token(token)
        self.gate = Gate(token, None, normalize_origins(allow_origin), on_auth)
        self.hub = Hub(self.settings, functools.partial(encode_frame, TEXT))
        self.sessions: set[Session] = set()
        self._answers: Counter[int] = Counter()  # by the hundreds of their status
        self._unsent_answers = 0  # bytes of HTTP answers that are not sent yet
        self._unsent_messages = (
            0  # bytes that WebSockets have to read; the sweep counts
        )
        self._allow_host = normalize_hosts(allow_host)
        self.beyond_loopback = False  # whether others reach it, once it listens
        self._connections: dict[Connection, WebSocket | None] = {}  # and what it became
        self._tasks: set[asyncio.Task[None]] = set()  # while there are any, it listens
        self._stopping = False
        self._stop: Future[None] = Future()  # what run waits for
        # By path and method: a handler, and whether it is a WebSocket's.
        self._routes: dict[str, dict[str, tuple[Callable[[Any], Any], bool]]] = {}
        self.route("POST", "/sync/push")(self._push)
        self.route("GET", "/sync/pull")(self._pull)
        self.route("GET", "/sync/snapshot")(self._snapshot)
        self.route("GET", "/healthz")(self._healthz)
        self.websocket("/ws")(self._live)
        # OPTIONS * asks about the server as a whole (RFC 9110 §9.3.7).
        self._routes["*"] = self._routes["/healthz"] | self._routes["/sync/push"]
        if page is not None:
            with open(page, "rb") as file:
                response = Response.page(file.read())
            self.route("GET", "/")(lambda request: response)

    # -- endpoints and topics of the application's own

    def route(self, method: str, path: str) -> Callable[[T], T]:
        """`@server.route("GET", "/path")`: from a Request to a Response, text, bytes or
        JSON.

        A function or a coroutine. One for GET answers HEAD as well. Host and Origin
        were checked; who asks is for it to ask: `await server.gate.identify(request,
        scope)`. Raises ValueError for a path that can never match, and for one that is
        taken."""
        return functools.partial(self._register, path, method.upper(), False)

    def websocket(self, path: str) -> Callable[[T], T]:
        """`@server.websocket("/path")`: a coroutine that has a WebSocket to itself.

        Who asks is for it to ask, before it accepts: `gate.identify(websocket.request,
        scope)`. That the peer has gone it hears when it reads or sends, and at no other
        time."""
        return functools.partial(self._register, path, "GET", True)

    def _register(self, path: str, method: str, websocket: bool, handler: Any) -> Any:
        if not path.startswith("/"):
            raise ValueError(f"the path {path!r} does not begin with a slash")
        if re.search(r"[{}<>*?#%]|/:", path):
            rule = "a path is literal, without patterns, query and escapes"
            raise ValueError(f"the path {path!r} would never match: {rule}")
        if not re.fullmatch(_TOKEN, method):
            raise ValueError(f"{method!r} is not the name of a method")
        if method == "OPTIONS":
            raise ValueError(f"the server itself answers OPTIONS {path}")
        taken = self._routes.get(path, {})
        methods = ("GET", "HEAD") if method == "GET" and not websocket else (method,)
        for name in methods:
            if name in taken:
                raise ValueError(f"{name} {path} has a handler already")
        for name in methods:
            self._routes.setdefault(path, {})[name] = handler, websocket
        return handler

    def publish(self, topic: str, data: Any) -> None:
        """Send a message to all sessions that follow a topic of the application's. On
        the loop."""
        if topic.startswith(SYNC):
            raise ValueError(
                f"{topic!r}: topics that begin with sync: are the engine's"
            )
        self.hub.publish(topic, encode_json(data).encode())

    def subscribe(self, session: Session, topic: str) -> None:
        """Let a session follow a topic, while it lives. Raises TooLarge past
        `max_session_topics`."""
        if session in self.sessions:
            session.follow(topic)

    def unsubscribe(self, session: Session, topic: str) -> None:
        session.leave(topic)

    def stats(self) -> dict[str, Any]:
        """What an operator asks: numbers of now, and since the start."""
        now = {"connections": len(self._connections), "sessions": len(self.sessions)}
        now["unsent_bytes"] = self._unsent_answers + self._unsent_messages
        answers = {f"answers_{n}xx": self._answers[n] for n in (2, 3, 4, 5)}
        return {
            "version": __version__,
            **now,
            **self.engine.stats(),
            **answers,
            **self.hub.counts,
        }

    # -- the life of a connection, and of a request

    async def _serve(self, sock: socket.socket, ssl: tls.SSLContext | None) -> None:
        """A connection's whole life."""
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        crowded = len(self._connections) >= self.settings.max_connections

        def on_lost() -> None:
            websocket = self._connections.pop(connection, None)
            if websocket and websocket.accepted:
                live_log.info(
                    "%s ended: %r", websocket.name, websocket.reason or connection.end
                )
            elif task:  # by HTTP there is nobody left to answer, whatever it is at
                http_log.debug("no more requests: %r", connection.end)
                task.cancel()

        connection = Connection(self.settings, on_lost)
        self._connections[connection] = None
        if task:
            connection.give(
                math.inf, task.cancel
            )  # TLS's handshake has a time-out of its own
        try:
            # asyncio does so only to a socket that names its protocol, and an accepted
            # one doesn't.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # Without limits, a peer that does not answer TLS's handshake would hold its
            # socket for 60 s, one that does not answer its close for 30 s.
            begin, end = self.settings.head_timeout, self.settings.linger_timeout
            limits = (
                {"ssl_handshake_timeout": begin, "ssl_shutdown_timeout": end}
                if ssl
                else {}
            )
            await loop.connect_accepted_socket(
                lambda: connection, sock, ssl=ssl, **limits
            )
            await self._take_requests(connection, crowded)
            await connection.finish()
        except OSError as error:
            connection.end = connection.end or error
        finally:
            if not connection.lingering:
                connection.abort()
            if not connection.transport:
                sock.close()
                on_lost()

    async def _take_requests(self, connection: Connection, crowded: bool) -> None:
        """One request after another, until none can follow."""
        try:
            if crowded:
                raise Unavailable("the server has too many connections")
            while await self._exchange(connection):
                if (
                    connection.buffer
                ):  # requests that came together: others have their turn
                    await asyncio.sleep(0)
        except (
            SyncError
        ) as refusal:  # what came is no request, so nothing can follow it
            http_log.debug("no request: %r", refusal)
            self._answers[refusal.status // 100] += 1
            connection.unread = True
            head_only = connection.buffer.startswith(b"HEAD ")
            answer = Response.refusal(refusal).encode("close", head_only)
            connection.transport.write(answer)
        except OSError:
            pass  # none came; on_lost will say why

    async def _exchange(self, connection: Connection) -> bool:
        """One request and its answer. Whether another may follow; raises what
        next_request does."""
        request = await connection.next_request()
        try:
            try:
                response = await self._respond(connection, request)
            except SyncError as refusal:  # the client sees it
                response = Response.refusal(refusal)
        except (
            Exception
        ):  # our bug, or the application's: the log sees it, the client a bare 500
            log_error(http_log, "failed on %s %s", request.method, request.path)
            response = Response.refusal(SyncError("the server failed on this request"))
        if response is None:
            return False
        keep = request.keep_alive and not connection.unread and not self._stopping
        with self._counted(len(response.body)):
            data = await self._encode(request, response, keep)
        del request, response  # while the peer reads, these bytes are all that is kept
        with self._counted(len(data)):
            await connection.send(data)
        if self.engine.committing:
            time.sleep(
                0
            )  # a busy loop never lets the writer's thread have the interpreter
        return keep

    @contextlib.contextmanager
    def _counted(self, size: int) -> Iterator[None]:
        """Count the bytes of an answer among the unsent ones while the block lasts."""
        self._unsent_answers += size
        try:
            yield
        finally:
            self._unsent_answers -= size

    def _check_unsent(self) -> None:
        """Raise Unavailable while too many bytes wait for clients to read them."""
        unsent = self._unsent_answers + self._unsent_messages
        if unsent > self.settings.max_unsent:
            raise Unavailable("too many answers wait for their clients to read them")

    async def _respond(
        self, connection: Connection, request: Request
    ) -> Response | None:
        """What its route says; None: it was a WebSocket."""
        self.gate.check(request)
        self._check_unsent()
        if (routes := self._routes.get(request.path)) is None:
            raise NotFound(f"there is nothing at {request.path[:100]}")
        handler, is_websocket = routes.get(request.method, (None, False))
        if handler and is_websocket:
            websocket = self._connections[connection] = WebSocket(connection, request)
            await self._converse(websocket, handler)
            return None
        if handler in (self._push, self._pull, self._snapshot):
            # Before the body: without the token nobody makes the server read or parse
            # one.
            self.gate.check_token(request)
        request.body = await connection.read_body(request)
        if handler is None or request.method == "OPTIONS":
            allow = {"Allow": ", ".join(sorted({*routes, "OPTIONS"}))}
            if request.method == "OPTIONS":
                return Response(204, headers=allow)
            raise HTTPError(405, f"{request.path} takes {allow['Allow']}", allow)
        response = Response.of(await call_app(handler, request))
        if request.method in ("GET", "HEAD"):
            self._check_unsent()  # many may have waited for the same change
        return response

    async def _encode(self, request: Request, response: Response, keep: bool) -> bytes:
        """Return the answer as bytes, with what the request lets it have: CORS,
        gzip."""
        http_log.debug("%s %r -> %s", request.method, request.path, response.status)
        self._answers[response.status // 100] += 1
        if cors := self.gate.cors(request, response.headers.get("Allow", "GET")):
            if vary := response.headers.get("Vary"):  # the application's own stays
                cors["Vary"] = f"{vary}, Origin"
            headers = {**response.headers, **cors}
            response = Response(
                response.status, response.body, headers, response.content_type
            )
        if len(response.body) > self.settings.min_gzip_size and request.takes_gzip:
            response = await asyncio.to_thread(response.compress)
        word = "" if keep else "close"
        if keep and request.version < (1, 1):
            word = "keep-alive"
        return response.encode(word, head_only=request.method == "HEAD")

    async def _converse(
        self, websocket: WebSocket, handler: Callable[[Any], Any]
    ) -> None:
        """A WebSocket's whole life. A SyncError before it was accepted is answered in
        HTTP."""
        try:
            await call_app(handler, websocket)
            websocket.close()
        except Exception as error:
            websocket.error = error
            is_lost = websocket.closing or websocket.connection.transport.is_closing()
            if not (
                isinstance(error, ConnectionLost) and is_lost
            ):  # it may be another's loss
                if not websocket.accepted:
                    raise
                log_error(
                    live_log, "the WebSocket at %s failed", websocket.request.path
                )
                websocket.close(1011, "the server failed")
        with contextlib.suppress(
            RuntimeError
        ):  # a task that the handler left reads it already
            await websocket.receive()  # the peer's half of the closing handshake

    # -- the protocol's endpoints

    async def _push(self, request: Request) -> Response:
        media_type = request.headers.get("content-type", "").partition(";")[0]
        if media_type.strip(" \t").lower() != "application/json":
            raise HTTPError(415, "a push is application/json")
        values, most = await self._parse(request.body), self.settings.max_push_mutations
        if not isinstance(values, list) or not values:
            raise InvalidRequest(f"a push is a JSON array of 1 to {most} mutations")
        if len(values) > most:
            raise TooLarge(f"a push has at most {most} mutations")
        mutations: list[Mutation] = []
        refused: dict[int, Result] = {}  # by their place in the push
        identities: dict[
            str, Any
        ] = {}  # of each scope, or its refusal: permission is asked once
        for place, value in enumerate(values):
            try:
                mutation = Mutation.parse(value)
                if (scope := mutation.scope) not in identities:
                    identities[scope] = await self.gate.identify(request, scope)
                if isinstance(identity := identities[scope], Forbidden):
                    raise identity
                if identity is not None:
                    mutation = dataclasses.replace(mutation, identity=identity)
                mutations.append(mutation)
            except InvalidMutation as refusal:
                refused[place] = Result.refused(refusal)
            except Forbidden as refusal:
                identities[scope] = refusal
                refused[place] = Result.refused(refusal)
        applied = iter(await self.engine.push(mutations) if mutations else ())
        results = [refused.get(place) or next(applied) for place in range(len(values))]
        return Response(body=b"[%b]" % b",".join(result.encoded for result in results))

    async def _parse(self, text: bytes) -> Any:
        """Strict JSON. A large text takes 0.1 s at worst, which the loop has not."""
        depth, most = self.settings.max_json_depth, self.settings.max_json_values
        parse = functools.partial(parse_json, text, depth, most)
        return parse() if len(text) < READ_SIZE else await asyncio.to_thread(parse)

    async def _admit(self, request: Request) -> tuple[str, Any]:
        """The scope that a request names and may have, and who asks."""
        scope = check_scope(request.query.get("scope", DEFAULT_SCOPE))
        return scope, await self.gate.identify(request, scope)

    async def _pull(self, request: Request) -> Response:
        scope, _ = await self._admit(request)
        cursor, limit = (
            int(request.number("cursor", 0)),
            int(request.number("limit", 0)),
        )
        wait = request.number("wait", 0.0, r"[0-9]{1,9}(\.[0-9]{1,20})?")
        if cursor > MAX_CURSOR:
            raise InvalidRequest("the cursor has to be below 2**53")
        if limit < 1 and "limit" in request.query:
            raise InvalidRequest("the limit has to be 1 or more")
        epoch, wait = request.query.get("epoch", ""), 0.0 if self._stopping else wait
        page = await self.engine.pull(
            scope, cursor, epoch=epoch, limit=limit, wait=wait
        )
        if wait:  # meanwhile permission may have ended
            await self.gate.identify(request, scope)
        return Response(body=page.encode())

    async def _snapshot(self, request: Request) -> Response:
        scope, _ = await self._admit(request)
        return Response(body=(await self.engine.snapshot(scope)).encode())

    async def _healthz(self, request: Request) -> Any:
        head, epoch, _ = await self.engine.position()
        if self.gate.token is not None:
            return {"status": "ok"}
        where = {"cursor": head, "epoch": epoch, "sessions": len(self.sessions)}
        return {"status": "ok", "version": __version__, **where}

    # -- live

    async def _live(self, websocket: WebSocket) -> None:
        """/ws: a session, from its handshake to on_close."""
        scope, identity = await self._admit(websocket.request)
        if len(self.sessions) >= self.settings.max_sessions:
            raise Unavailable("the server has too many sessions")
        websocket.accept()
        session = Session(websocket, self.hub, scope, identity)
        websocket.name = f"session {session.id} of {scope!r}"
        self.sessions.add(session)
        work: asyncio.Task[None] | None = None
        try:
            async for message in websocket:
                # One at a time, in order. One more is read ahead, so that pings are
                # answered.
                if not await self._finish(work, websocket):
                    break
                work = await self._handle(session, message)
            await self._finish(work, websocket)
        except Exception as error:
            websocket.error = error
            raise
        finally:
            self.sessions.discard(session)
            for topic in list(session.topics):
                session.leave(topic)
            if self.on_close:
                await self._call(self.on_close, session, websocket.error)

    async def _finish(
        self, work: asyncio.Task[None] | None, websocket: WebSocket
    ) -> bool:
        """Whether the application is done with it; if the peer has gone, it may never
        be."""
        while work and not work.done():
            await asyncio.wait([work], timeout=self.settings.close_timeout)
            if websocket.connection.transport.is_closing():
                break
        return work is None or work.done()

    async def _handle(
        self, session: Session, raw: str | bytes
    ) -> asyncio.Task[None] | None:
        """One message of a client. A task where the application goes on working on
        it."""
        try:
            if isinstance(raw, bytes):
                session.close(1003, "messages are text")
                return None
            message = await self._parse(raw.encode())
            if not isinstance(message, dict) or not isinstance(
                topic := message.get("topic"), str
            ):
                raise InvalidRequest('a message is {"topic": "...", "data": ...}')
            if topic in ("subscribe", "unsubscribe"):
                await self._subscribe(session, topic, message.get("data", {}))
            elif self.on_message and not topic.startswith(SYNC):
                return self._spawn(
                    self._call(self.on_message, session, topic, message.get("data"))
                )
            else:
                sentence = f"nothing listens to {topic[:100]!r}"
                session.send_error("unknown_topic", sentence)
        except SyncError as refusal:
            code = (
                "invalid_message"
                if isinstance(refusal, InvalidRequest)
                else refusal.code
            )
            session.send_error(code, str(refusal))
        return None

    async def _subscribe(self, session: Session, verb: str, wish: Any) -> None:
        scope = check_scope(
            wish.get("scope", session.scope) if isinstance(wish, dict) else None
        )
        if verb == "unsubscribe":
            session.leave(f"{SYNC}{scope}")
        else:
            asking = self._spawn(self.gate.identify(session.websocket.request, scope))
            if not await self._finish(asking, session.websocket):
                asking.cancel()
                raise ConnectionLost("the peer is gone: nobody is left to be told")
            try:
                await asking
            except Forbidden as refusal:
                session.forbid(scope, refusal)
                return
            # First follow, then read: no change can fall between the two.
            session.follow(f"{SYNC}{scope}", wish.get("changes") is True)
            self.hub.tell(f"{SYNC}{scope}", session, await self.engine.current(scope))

    async def _ask_again(self, session: Session) -> None:
        """Ask on_auth about each scope of a session again, and obey the answers.

        Where on_auth fails, all stays as it was; after three failures in a row the
        session ends.
        """
        failed, reason = False, "no scope is left"
        request = session.websocket.request
        for scope in session.scopes:  # each by itself: none keeps another from its turn
            if session not in self.sessions:
                return
            try:
                async with asyncio.timeout(self.settings.auth_interval):
                    identity = await self.gate.identify(request, scope)
            except Unauthorized as refusal:
                session.close(1008, str(refusal))
                return
            except Forbidden as refusal:
                session.forbid(scope, refusal)
                reason = str(refusal)
            except Exception:
                failed = True
                log_error(live_log, "on_auth failed for a session of %r", scope)
            else:
                session.allow(scope, identity)
        session.failures = session.failures + 1 if failed else 0
        if not session.scopes:
            session.close(1008, reason)
        elif session.failures >= MAX_AUTH_FAILURES:
            session.close(1011, "on_auth failed again and again")
        else:
            session.asked = time.monotonic()

    async def _call(self, function: Callable[..., Any], *arguments: Any) -> None:
        """A function or coroutine of the application's; what it raises hurts nobody
        else."""
        try:
            await call_app(function, *arguments)
        except Exception:
            log_error(live_log, "%s failed", getattr(function, "__name__", function))

    # -- life

    def run(
        self,
        host: str,
        port: int,
        announce: Callable[[str], None] = log.info,
        **options: Any,
    ) -> None:
        """Serve until SIGTERM, SIGINT or `stop`; then end gently, and close the engine.
        Blocks.

        `announce` is told where to open the page; the options are listen's, and what it
        raises. Raises RuntimeError where a loop is running already."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            pass  # as it should be
        else:
            advice = "async with server.listen(host, port): ..."
            raise RuntimeError(f"a loop is running here, as in Jupyter: use `{advice}`")

        deadline = math.inf  # of the stop

        async def serve() -> None:
            nonlocal deadline
            loop, signals = asyncio.get_running_loop(), (signal.SIGTERM, signal.SIGINT)
            # Neither a thread other than the first nor Windows can have signal handlers
            # here.
            with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
                for one in signals:
                    loop.add_signal_handler(one, self.stop)
            async with self.listen(host, port, **options) as (name, number):
                name = f"[{name}]" if ":" in name else name
                announce(
                    f"open {'https' if options.get('ssl') else 'http'}://{name}:{number}/"
                )
                await asyncio.wrap_future(self._stop)
                deadline = time.monotonic() + self.settings.shutdown_timeout
                with contextlib.suppress(NotImplementedError):
                    for one in signals:
                        loop.remove_signal_handler(one)  # a second one ends at once

        try:
            asyncio.run(serve())
        finally:
            # A second at least: a slow client may have used the rest.
            left = min(max(1.0, deadline - time.monotonic()), threading.TIMEOUT_MAX)
            self.engine.close(left if math.isfinite(deadline) else None)

    def stop(self) -> None:
        """End `run`, as a signal does. From any thread, also before it has begun."""
        with contextlib.suppress(InvalidStateError):  # twice does no harm
            self._stop.set_result(None)

    @contextlib.asynccontextmanager
    async def listen(
        self,
        host: str,
        port: int,
        *,
        ssl: tls.SSLContext | None = None,
        reuse_port: bool = False,
    ) -> AsyncIterator[tuple[str, int]]:
        """Serve on the running loop while the block lasts; gives the address. Port 0: a
        free one.

        Raises OSError where the address can't be had.
        """
        if self._tasks:
            raise RuntimeError("this server is listening already")
        kind = socket.SOCK_STREAM
        family, *_, address = socket.getaddrinfo(
            host, port, type=kind, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.create_server(
            address[:2], family=family, reuse_port=reuse_port
        )
        listener.listen(1024)
        listener.setblocking(False)
        name, number = listener.getsockname()[:2]
        self.beyond_loopback = not is_loopback(name)
        self.gate.hosts = (
            self._allow_host if self._allow_host or is_loopback(name) else None
        )
        has_lock = self.gate.token is not None or self.gate.on_auth is not None
        if self.beyond_loopback and not has_lock:
            log.warning("without token and on_auth %s is open to anybody", name)
        self._stopping, unlisten = False, self.engine.add_listener(self.hub.notify)
        accepting, sweeping = (
            self._spawn(self._accept(listener, ssl)),
            self._spawn(self._sweep()),
        )
        try:
            yield name, number
        finally:
            # Finish what was begun: answer pushes, end long polls, close sockets with
            # 1001.
            self._stopping, latest = (
                True,
                time.monotonic() + self.settings.shutdown_timeout,
            )
            with contextlib.suppress(NotImplementedError):  # Windows has no readers
                # An accept that is due already would run after the close,
                asyncio.get_running_loop().remove_reader(listener)
            try:
                await asyncio.sleep(
                    0
                )  # and who was accepted in this very turn would be forgotten.
                accepting.cancel()
                listener.close()
                self.engine.end_waits()
                while (
                    self._tasks - {sweeping} or self._connections
                ) and time.monotonic() < latest:
                    for connection, websocket in list(self._connections.items()):
                        if websocket and websocket.accepted:
                            websocket.close(1001, "the server is stopping")
                        elif connection.idle:
                            connection.expire()
                    await asyncio.sleep(0.005)  # most ends are quick
            finally:  # also when it is cancelled in there
                unlisten()
                for connection in list(self._connections):
                    connection.abort()
                for _ in range(
                    2
                ):  # an on_close that the first cancel began may hang, too
                    for task in self._tasks:
                        task.cancel()
                    if self._tasks:
                        await asyncio.wait(
                            self._tasks, timeout=self.settings.linger_timeout
                        )

    async def _accept(
        self, listener: socket.socket, ssl: tls.SSLContext | None
    ) -> None:
        """Our own accept loop: asyncio's logs without end when descriptors run out."""
        loop, silent = asyncio.get_running_loop(), 0.0  # until when
        while not self._stopping:
            try:
                # What the store's readers may have to open, tried and given back: no
                # client is taken at whose cost they would fail.
                with contextlib.ExitStack() as spare:
                    for _ in range(2 * self.engine.settings.readers + 2):
                        spare.callback(os.close, os.open(os.devnull, os.O_RDONLY))
                sock, _ = await loop.sock_accept(listener)
            except OSError as error:
                if (now := time.monotonic()) >= silent:
                    log_error(http_log, "new clients wait: %s", error, traceback=False)
                    silent = now + 60  # it may come and go ten times a second
                await asyncio.sleep(0.1)
            else:
                self._spawn(self._serve(sock, ssl))
                await asyncio.sleep(
                    0
                )  # an accept that never waits would keep the loop to itself

    def _spawn(self, work: Any) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _sweep(self) -> None:
        """Every deadline of every connection, in one task."""
        rewinds = self.engine.rewinds
        while True:
            await asyncio.sleep(0.1)
            # Whatever these raise is logged: nobody would start this task again.
            await self._call(self._expire, time.monotonic())
            if rewinds != self.engine.rewinds:
                rewinds = self.engine.rewinds
                await self._call(self._begin_anew)

    def _expire(self, now: float) -> None:
        self._unsent_messages = sum(
            connection.transport.get_write_buffer_size()
            for connection, websocket in self._connections.items()
            if websocket and connection.full
        )
        interval = self.settings.auth_interval or math.inf
        for connection in [one for one in self._connections if one.deadline <= now]:
            connection.expire()
        for session in [one for one in self.sessions if one.asked + interval <= now]:
            session.asked = math.inf  # one question at a time
            self._spawn(self._call(self._ask_again, session))
        self.hub.beat(now)

    def _begin_anew(self) -> None:
        """Cursors went down, and no hint may: each client comes back, pulls, and finds
        out."""
        for topic in self.hub.topics.values():
            topic.cursor, topic.pending = -1, None
        for session in self.sessions:
            session.close(1001, "an older copy of the log was restored: come back")
        self.engine.end_waits()  # who polls is told at once


# --- Todo -----------------------------------------------------------------------------
# The demo, as an application would write it: its tables, its apply, its snapshot.

TODO_SCHEMA = """
    CREATE TABLE IF NOT EXISTS todos (position INTEGER PRIMARY KEY, scope TEXT NOT NULL,
        id TEXT NOT NULL, title TEXT NOT NULL, completed INTEGER NOT NULL,
        UNIQUE (scope, id));
"""


def apply_todo(db: sqlite3.Connection, mutation: Mutation) -> list[Any]:
    """todo.create, todo.update, todo.toggle, todo.delete; in each scope a list of its
    own."""
    # What comes from outside is checked first. Whatever is raised undoes this mutation
    # alone.
    args = mutation.args if isinstance(mutation.args, dict) else {}
    key, title, completed = args.get("id"), args.get("title"), args.get("completed")
    if not isinstance(key, str) or not 1 <= len(key) <= 128:
        raise InvalidMutation("a todo's id is a string of 1 to 128 characters")
    if "title" in args and not (isinstance(title, str) and 1 <= len(title) <= 1000):
        raise InvalidMutation("a todo's title is a string of 1 to 1,000 characters")
    if "completed" in args and not isinstance(completed, bool):
        raise InvalidMutation("completed is true or false")
    where = {"scope": mutation.scope, "id": key}
    sql = "SELECT title, completed FROM todos WHERE scope = :scope AND id = :id"
    old = db.execute(sql, where).fetchone()
    # What is asked for, and what is there: each case has its line.
    match mutation.name, old:  # mizusync needs Python 3.11 or newer: 3.9 stops here
        case "todo.create", None if title:
            new = {"title": title, "completed": False}
        case "todo.create", None:
            raise InvalidMutation("a new todo needs a title")
        case "todo.create", _:
            raise Conflict("this todo is there already")
        case "todo.update" | "todo.toggle" | "todo.delete", None:
            raise NotFound("this todo is not there")
        case "todo.update", (text, done):
            new = {
                "title": args.get("title", text),
                "completed": args.get("completed", bool(done)),
            }
        case "todo.toggle", (text, done):
            new = {"title": text, "completed": not done}
        case "todo.delete", _:
            db.execute("DELETE FROM todos WHERE scope = :scope AND id = :id", where)
            return [{"op": "delete", "id": key}]
        case _:
            raise InvalidMutation(f"there is no mutation {mutation.name!r}")
    sql = """
        INSERT INTO todos (scope, id, title, completed)
        VALUES (:scope, :id, :title, :completed)
        ON CONFLICT (scope, id) DO UPDATE SET title = :title, completed = :completed
    """
    db.execute(sql, where | new)
    # What every client of the scope will see.
    return [{"op": "update" if old else "create", "todo": {"id": key} | new}]


def snapshot_todos(db: sqlite3.Connection, scope: str) -> Json:
    """All todos of a scope. SQLite writes the JSON: fast, and without the interpreter's
    lock."""
    sql = """
        SELECT json_group_array(json_object('id', id, 'title', title, 'completed',
                                json(CASE WHEN completed THEN 'true' ELSE 'false' END)))
        FROM (SELECT * FROM todos WHERE scope = ? ORDER BY position)
    """
    return Json(f'{{"todos":{db.execute(sql, (scope,)).fetchone()[0]}}}')


def require_scope(request: Request, scope: str) -> None:
    """The guide's rule for the demo: a socket names its scope."""
    if request.path == "/ws" and "scope" not in request.query:
        raise Unauthorized("name a scope: /ws?scope=...")


# --- Command line ---------------------------------------------------------------------

PAGE = os.path.join(os.path.dirname(__file__), "demo.html")  # need not be there

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
        # A SimpleQueue: the collection of a task, which logs, may interrupt its put.
        self.waiting: queue.SimpleQueue[str | threading.Event] = queue.SimpleQueue()
        self.thread: threading.Thread | None = None

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if self.waiting.qsize() >= LOG_LINES:
                self.dropped += 1
                return
            self.waiting.put(self.format(record))
            if self.thread is None:
                self.thread = threading.Thread(target=self._write, daemon=True)
                self.thread.start()
        except Exception:
            self.handleError(record)

    def flush(self) -> None:
        """Wait, but not for long, until all is written. `logging` calls it at exit."""
        if self.thread:
            written = threading.Event()
            self.waiting.put(written)
            written.wait(LOG_FLUSH)

    def _write(self) -> None:
        while True:
            line = self.waiting.get()
            if isinstance(line, threading.Event):
                line.set()
                continue
            if self.dropped:
                line += f"\n{self.dropped} log lines were dropped: nobody read them"
                self.dropped = 0
            data = f"{line}\n".encode(errors="backslashreplace")
            with contextlib.suppress(OSError):  # there is nobody to be told
                while data:
                    data = data[os.write(self.descriptor, data) :]


def log_to_stderr(level: str) -> None:
    """Set up logging for the program, unless its caller has done so."""
    handler: logging.Handler
    try:
        handler = LogWriter(sys.stderr.fileno())
    except (AttributeError, OSError):  # there is none, or it is no file
        handler = logging.StreamHandler()
    line = "%(asctime)s %(levelname)s %(name)s %(message)s"
    logging.basicConfig(format=line, level=level.upper(), handlers=[handler])


def say(line: str) -> None:
    """Print a line, whatever characters it has and whoever reads it."""
    encoding = getattr(sys.stdout, "encoding", None) or "ascii"
    shown = line.encode(encoding, "backslashreplace").decode(encoding)
    try:
        print(shown, flush=True)
    except OSError:  # its reader has gone; the exit would fail on what is left to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    about = "A durable sync server with instant updates: the todo demo."
    parser = argparse.ArgumentParser(prog="mizusync", description=about)
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    add("--port", type=int, default=8080, help="port; 0 takes a free one (%(default)s)")
    add("--db", default="mizusync.db", help="the database file (%(default)s)")
    add(
        "--keep-changes", type=int, help="trim the log to about so many changes a scope"
    )
    token = os.environ.get("MIZUSYNC_TOKEN")
    add("--token", default=token, help="what clients must show")
    add(
        "--allow-origin",
        action="append",
        default=[],
        help="a web origin that may use the server",
    )
    add(
        "--allow-host",
        action="append",
        default=[],
        help="a name that the server goes by",
    )
    add("--certfile", help="a certificate chain, for TLS; with --keyfile")
    add("--keyfile", help="the certificate's key")
    add("--reuse-port", action="store_true", help="share the port with other processes")
    add("--log-level", default="warning", choices=["debug", "info", "warning", "error"])
    add("--version", action="version", version=f"mizusync {__version__}")
    args = parser.parse_args(argv)
    if not 0 <= args.port <= 65535:
        parser.error(f"--port {args.port}: a port is a number from 0 to 65535")
    try:
        Settings(keep_changes=args.keep_changes)
    except ValueError:
        parser.error(
            f"--keep-changes {args.keep_changes}: keep 1 to {10**15:,} changes"
        )
    if bool(args.certfile) != bool(args.keyfile):
        parser.error("--certfile and --keyfile go together")
    try:
        validate_token(args.token)
    except ValueError as error:
        parser.error(f"--token, or MIZUSYNC_TOKEN of the environment: {error}")
    try:
        normalize_origins(args.allow_origin)
        normalize_hosts(args.allow_host)
    except ValueError as error:
        parser.error(f"--allow-origin, --allow-host: {error}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Serve the todo demo. The exit status: 0, 1 where it can't run, 2 for a bad
    command line."""
    args, ssl = parse_args(argv), None
    log_to_stderr(args.log_level)
    try:
        if args.certfile:
            ssl = tls.create_default_context(tls.Purpose.CLIENT_AUTH)
            ssl.load_cert_chain(args.certfile, args.keyfile)
        todo: dict[str, Any] = {"apply": apply_todo, "snapshot": snapshot_todos}
        settings = Settings(keep_changes=args.keep_changes)
        engine = Engine(args.db, **todo, schema=TODO_SCHEMA, settings=settings)
        page = PAGE if os.path.exists(PAGE) else None
        gate: dict[str, Any] = {"token": args.token, "allow_host": args.allow_host}
        gate |= {"allow_origin": args.allow_origin, "on_auth": require_scope}
        server = Server(engine, page=page, **gate)
        if page is None:
            advice = "It serves. Its page, demo.html, is not beside mizusync.py.\n"
            server.route("GET", "/")(lambda request: advice)

        def announce(where: str) -> None:
            say(f"mizusync {__version__}: {where} (data in {args.db})")
            if args.token is None and server.beyond_loopback:
                log.warning("without --token, %s is open to anybody", args.host)

        server.run(args.host, args.port, announce, ssl=ssl, reuse_port=args.reuse_port)
    except KeyboardInterrupt:
        return 130
    except (
        StoreError,
        OSError,
        UnicodeError,
    ) as error:  # the last: of what can't be a host
        print(f"mizusync: {args.host}:{args.port}, {args.db}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
