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
"""mizusync: a durable sync server with instant updates, in one file, on the standard
library.

A sync client normally polls. Here a sync engine (push, pull, snapshot) is joined to a
live server (topics over WebSocket) by one arrow, notify:

    client A                                                                      client B
       |                                                                             ^
       | push: mutations                                    hint: "scope has 42" |   | pull from 41:
       v                                                                         v   | change 42
    +------------------- the truth -------------------+        +----- the accelerator ------+
    | Engine: one writer thread, one transaction:     | notify | Hub: one frame, written to |
    | apply() + dedupe mark + changes -> log on disk  |------->| every session of the
    topic |
    +-------------------------------------------------+        +----------------------------+

The left half alone is a complete sync server: a client that polls misses nothing. The
right half alone is a live server: it tells, keeps nothing, and may lose a hint without
harm.

The life of one change, and where each step stands in this file:

    bytes -> Request                parse_request   no parser here does I/O
    Request -> [Mutation, ...]      Server          checked once, at the door
    -> one transaction              Engine          with all that waits: one fsync for everybody
    -> Change 42 in the log         Store           a number that is never given out again
    -> the answer, and the hint     Engine.listen   one hop from the writer's thread to the loop
    -> every session                Hub             the same bytes to all
    -> a pull                       Engine.pull     from memory: a join of encoded bytes

Contents, each section using only what stands above it:

    Settings        every limit and time-out
    Errors          what a client may be told; what closes a socket
    Values          the protocol's words; strict JSON
    Store           the change log on disk
    Engine          the writer's thread, dedupe, the newest changes in memory
    Hub             topics, and who follows them
    HTTP/1.1        bytes to requests, responses to bytes
    WebSocket       frames and messages
    Connection      a socket: bytes, deadlines, a close that is heard; a WebSocket over it
    Session         one live client
    Gate            who may
    Server          routes, sessions, life; the arrow from engine to hub
    Todo            the demo, as an application would write it
    Command line    python mizusync.py

Where to add: a limit in Settings; a refusal in Errors, and in Engine._apply if `apply`
may raise it; a number in COUNTED; a column in LOG_SCHEMA, with FORMAT and Row; an
endpoint where Server is made; what is one client's in Session, undone where
Server._live ends.

To run the demo: `python mizusync.py`. To build on it: copy this file and write an
`apply` function:

    def apply(db, mutation):                  # inside the transaction: all of it, or nothing
        db.execute("INSERT INTO notes VALUES (?, ?)", (mutation.id,
        mutation.args["text"]))
        return [{"note": mutation.args["text"]}]      # what every client of the scope will see

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
    # What an application writes against.
    "Engine", "Server", "Settings", "Mutation", "Change", "Json",
    "InvalidMutation", "NotFound", "Conflict", "Forbidden", "Unauthorized", "Unavailable",
    # What its endpoints and live clients get.
    "Request", "Response", "Session", "WebSocket", "Result", "Page", "Snapshot",
    # What a store or a transport of one's own is made of.
    "Store", "Position", "Row", "Mark", "SQLStore", "SQLiteStore", "StoreError", "StoreRefused",
    "TransactionLost", "Hub", "Hint", "Subscriber",
    # The rest of what may be raised.
    "SyncError", "HTTPError", "InvalidRequest", "TooLarge", "CursorTooOld", "CursorUnknown",
    "ProtocolError",
]  # fmt: skip

log = logging.getLogger("mizusync")  # without a handler: the application decides
store_log, engine_log, http_log, live_log = map(
    log.getChild, ("store", "engine", "http", "live")
)

T = TypeVar("T")


# --- Settings -------------------------------------------------------------------------
# Every limit that an operator may want to move, and every time-out, is a line here.
# Sizes are in bytes, times in seconds. Whatever a peer can make grow has a limit, here
# or where it stands.


# These may be 0. The other whole numbers are 1 or more, the other times above 0.
MAY_BE_ZERO = {
    "pull_wait_max", "gzip_size", "linger", "hint_changes", "hint_size", "hint_gap",
    "sessions", "shutdown_timeout", "commit_time", "tail_changes", "tail_size",
    "busy_timeout",
}  # fmt: skip
# The system's own limits. For each new client the server tries whether the readers have
# descriptors; a larger busy_timeout would overflow SQLite's milliseconds, and become 0.
LARGEST = {"readers": 256, "send_buffer": 2**31 - 1, "busy_timeout": 10**6}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The limits of a server and its engine. `Settings(sessions=100)` changes one.

    Raises TypeError for a value of another type, ValueError for one out of range.
    """

    # What one request may ask for.
    push_mutations: int = 100
    mutation_changes: int = 1000
    pull_limit: int = 100  # changes a page, when the client names no number
    pull_limit_max: int = 1000
    pull_wait_max: float = 60.0
    page_size: int = (
        4 * 1024 * 1024
    )  # bytes of a page, about; what is left is the next one's
    # HTTP/1.1.
    target_size: int = 8 * 1024
    head_size: int = 64 * 1024
    head_fields: int = 100
    body_size: int = 1024 * 1024
    json_depth: int = (
        64  # levels; json.loads has a limit of its own, another in each version
    )
    max_json_values: int = 100_000  # a megabyte of "[]" would hold the loop for 0.3 s
    head_timeout: float = 10.0  # from the first byte of a head to its last
    body_timeout: float = 30.0  # for the whole body
    idle_timeout: float = 60.0  # between requests
    send_timeout: float = 30.0  # without progress, while the peer has an answer to read
    gzip_size: int = 16 * 1024  # a smaller answer is sent as it is
    linger: float = (
        2.0  # after a refusal, for the peer to read it before the socket goes
    )
    # WebSocket.
    message_size: int = 1024 * 1024
    session_topics: int = 1000
    session_queue: int = (
        1024 * 1024
    )  # unsent bytes of messages that may not be merged; then 1013
    send_buffer: int = (
        64 * 1024
    )  # SO_SNDBUF of a session: what the kernel holds for a slow reader
    ping_interval: float = 20.0  # common proxies drop a quiet connection after 60
    ping_timeout: float = 60.0  # without a byte after a ping: dead
    close_timeout: float = 5.0  # for the peer's half of the closing handshake
    heartbeat: float = 25.0  # silence of a topic before its newest hint is sent again
    hint_changes: int = 32  # at most so many changes inside a hint,
    hint_size: int = 16 * 1024  # and so many bytes of them
    hint_gap: float = 0.03  # at most so long a pause between two fan-outs of a topic
    auth_interval: float | None = None  # ask on_auth again for open sessions
    # The whole server.
    sessions: int = 10_000
    connections: int = 12_000
    max_unsent: int = (
        256 * 1024 * 1024
    )  # bytes that wait for their readers; above it, 503
    shutdown_timeout: float = 8.0
    # The engine.
    commit_time: float = 0.02  # no mutation joins a transaction that is older than this
    pending_pushes: int = 10_000
    keep_changes: int | None = None  # of each scope, about; older ones are trimmed
    tail_changes: int = 1000  # of one scope, in memory
    tail_size: int = 16 * 1024 * 1024  # of all scopes together
    readers: int = 4  # threads that read the disk
    watch_interval: float = (
        0.05  # how often an idle writer looks for another process's commits
    )
    busy_timeout: float = 5.0  # how long a commit waits for another process's

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            given = f"Settings({field.name}={value!r})"
            whole = str(field.type).startswith("int")
            kind = "a whole number" if whole else "a number of seconds"
            number = isinstance(value, int if whole else (int, float))
            if not number or isinstance(value, bool):
                raise TypeError(f"{given}: it has to be {kind}")
            largest = LARGEST.get(field.name, 10**15)
            if field.name in MAY_BE_ZERO:
                fits, least = 0 <= value <= largest, "0 or more"
            elif whole:
                fits, least = 1 <= value <= largest, "1 or more"
            else:
                fits, least = 0 < value <= largest, "above 0"
            if not fits:  # as nothing compares with NaN, it does not fit
                raise ValueError(
                    f"{given}: it has to be {kind}, {least}, at most {largest:,}"
                )


# --- Errors ---------------------------------------------------------------------------
# A SyncError is a refusal that the client may see: an HTTP status, a code of the
# protocol, a sentence. Any other exception is our mistake or the application's: the log
# sees it whole, the client a bare internal_error. Server turns both into answers,
# Engine into results of mutations.


class SyncError(Exception):
    """A refusal that the client may see. By itself: our mistake, without a word of the
    inside."""

    status: int = 500
    code: str = "internal_error"
    headers: Mapping[
        str, str
    ] = {}  # field lines that belong to the status (RFC 9110 §15)

    def __init_subclass__(cls, status: int | None = None, code: str = "") -> None:
        # What is not named is that of the class above.
        cls.status, cls.code = status or cls.status, code or cls.code


class InvalidRequest(SyncError, status=400, code="invalid_request"):
    """The request can't be understood, or could be understood in two ways."""


class InvalidMutation(SyncError, status=400, code="invalid_mutation"):
    """This mutation can never work: the client drops it. For `apply` to raise."""


class Unauthorized(SyncError, status=401, code="unauthorized"):
    """Who asks is not known. For `on_auth` to raise; it refuses the whole request."""

    headers = {"WWW-Authenticate": 'Bearer realm="mizusync"'}


class Forbidden(SyncError, status=403, code="forbidden"):
    """Who asks is known and may not. For `apply` and `on_auth` to raise."""


class NotFound(SyncError, status=404, code="not_found"):
    """It is not there. For `apply` to raise, too."""


class Conflict(SyncError, status=409, code="conflict"):
    """The data is not in the state that the mutation needs. For `apply` to raise."""


class CursorTooOld(SyncError, status=410, code="cursor_too_old"):
    """The changes after this cursor were trimmed: take a snapshot and go on from
    there."""


class CursorUnknown(SyncError, status=410, code="cursor_unknown"):
    """This history never gave out this cursor: take a snapshot and go on from there.

    Without its epoch a cursor is found out only while it is above the head.
    """


class TooLarge(SyncError, status=413, code="too_large"):
    """More than the server takes at once: a client sends fewer at a time."""


class Unavailable(SyncError, status=503, code="unavailable"):
    """Not now, and nothing was applied: try again later. For `apply` to raise, too."""

    headers = {"Retry-After": "1"}


class StoreRefused(Unavailable):
    """The disk or the database refuses. An open transaction is lost as a whole."""


class TransactionLost(StoreRefused):
    """An application ended the transaction: what was in it has to be done again,
    without that."""


class HTTPError(SyncError):
    """A refusal that belongs to HTTP alone; the protocol's code follows from the
    status."""

    CODES: ClassVar = {
        405: "method_not_allowed", 408: "request_timeout", 414: "uri_too_long",
        415: "unsupported_media_type", 426: "upgrade_required", 431: "headers_too_large",
        501: "not_implemented", 505: "version_not_supported",
    }  # fmt: skip

    def __init__(
        self, status: int, sentence: str, headers: Mapping[str, str] = {}
    ) -> None:
        super().__init__(sentence)
        self.status, self.code, self.headers = status, self.CODES[status], headers


class StoreError(Exception):
    """The database can't be used at all: another program's, a newer format, no
    database."""


class ProtocolError(Exception):
    """The peer broke a rule of RFC 6455: `code` is what to close with, the text is the
    reason."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code


def complain(log: logging.Logger, *words: Any, traceback: bool = True) -> None:
    """Log an error. A filter of the application's that fails then shall not be one
    more."""
    with contextlib.suppress(Exception):
        log.error(*words, exc_info=traceback)


# --- Values ---------------------------------------------------------------------------
# The protocol's words. What comes from outside is checked here, once; after that the
# types are true and nobody asks again. A change is encoded once on its way in: the log,
# the answers, the pages from memory and the hints are joined from these encoded bytes,
# the *fragments*.

DEFAULT_SCOPE = "_default"
MAX_CURSOR = (
    2**53 - 1
)  # the last integer that every JSON reader holds exactly (RFC 8259 §6)
MAX_SCOPE = 256  # characters
MAX_NAME = 128  # characters of a mutation's id and of its name


@dataclasses.dataclass(frozen=True, slots=True)
class Json:
    """JSON text that is encoded already (by `json_group_array`, say) and is sent as it
    is."""

    text: str

    def __post_init__(self) -> None:
        if not (isinstance(self.text, str) and self.text):
            raise TypeError(f"Json takes JSON text, not {self.text!r}")


@dataclasses.dataclass(frozen=True, slots=True)
class Mutation:
    """What a client asks for. `id` names it for ever within its scope: it applies once.

    `args` is any JSON value. `identity` is what `on_auth` returned for the one who
    asks."""

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
        """The mutation that a JSON value holds. Raises InvalidMutation."""
        if not isinstance(value, Mapping):
            raise InvalidMutation("a mutation has to be a JSON object")
        scope = value.get("scope", DEFAULT_SCOPE)
        return cls(value.get("id", ""), value.get("name", ""), value.get("args"), scope)


@dataclasses.dataclass(frozen=True, slots=True)
class Change:
    """What became of a mutation, as every client of the scope sees it.

    An application makes `Change(data)`, or `Change(data, scope="another")`; without a
    scope it is the mutation's own. Cursor and time (RFC 3339, UTC) come from the log.
    """

    data: Any
    scope: str | None = None
    cursor: int = 0
    time: str = ""


class Result(NamedTuple):
    """What became of one mutation. `encoded` is the same as JSON, for the client.

    It shows changes in the mutation's own scope only: others are for those who may read
    their scopes.
    """

    encoded: bytes
    ok: bool
    cursor: int = 0
    duplicate: bool = False
    code: str = ""
    error: str = ""

    @classmethod
    def applied(
        cls, cursor: int, fragments: Sequence[bytes] | None, again: bool = False
    ) -> Result:
        """Return the result of an applied mutation, with its changes in its own scope.

        `fragments` is None where they are left out: some change of the mutation was
        trimmed, or the answer to the push is large already.
        """
        changes = (
            b"" if fragments is None else b',"changes":[%b]' % b",".join(fragments)
        )
        duplicate = b',"duplicate":true' if again else b""
        encoded = b'{"ok":true,"cursor":%d%b%b}' % (cursor, changes, duplicate)
        return cls(encoded, True, cursor, again)

    @classmethod
    def refused(cls, refusal: SyncError) -> Result:
        """It left no trace."""
        shown = {"ok": False, "code": refusal.code, "error": str(refusal)}
        encoded = encode_json(shown).encode(errors="replace")
        return cls(encoded, False, code=refusal.code, error=str(refusal))

    @property
    def changes(self) -> list[Change]:
        return [
            Change(**change) for change in json.loads(self.encoded).get("changes", ())
        ]


class Page(NamedTuple):
    """Some changes of one scope, in order. `cursor` is what to ask with next."""

    fragments: Sequence[bytes]
    cursor: int
    epoch: str
    has_more: bool = False

    @property
    def changes(self) -> list[Change]:
        return [Change(**json.loads(fragment)) for fragment in self.fragments]

    def encode(self) -> bytes:
        """The body that answers a pull."""
        more = b"true" if self.has_more else b"false"
        words = b",".join(self.fragments), self.cursor, self.epoch.encode(), more
        return b'{"changes":[%b],"cursor":%d,"epoch":"%b","hasMore":%b}' % words


class Snapshot(NamedTuple):
    """The whole state of one scope at one cursor, as JSON text."""

    text: str
    cursor: int
    epoch: str

    @property
    def data(self) -> Any:
        return json.loads(self.text)

    def encode(self) -> bytes:
        """The body that answers a request for a snapshot."""
        return f'{{"data":{self.text},"cursor":{self.cursor},"epoch":"{self.epoch}"}}'.encode()


def is_name(value: Any, longest: int) -> bool:
    """Whether this can name something. Half a surrogate pair can't: it has no UTF-8."""
    fits = isinstance(value, str) and 0 < len(value) <= longest
    return fits and (value.isascii() or not re.search("[\ud800-\udfff]", value))


def explain_name(field: str, value: Any, longest: int) -> str:
    """Return the sentence that tells a client why `is_name` refuses this value."""
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


# Without NaN and Infinity, which are not JSON (RFC 8259 §6), and without needless
# spaces.
encode_json = json.JSONEncoder(
    ensure_ascii=False, allow_nan=False, separators=(",", ":")
).encode
# For the names of scopes and topics: the same few come again and again.
encode_name = functools.lru_cache(maxsize=1000)(encode_json)

_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_STEPS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}  # levels up and down


def check_scope(value: Any) -> str:
    """The value, if it can name a scope. Raises InvalidRequest."""
    if not is_name(value, MAX_SCOPE):
        raise InvalidRequest(explain_name("scope", value, MAX_SCOPE))
    return str(value)


def parse_json(raw: bytes, depth: int = 64, most: int = 100_000) -> Any:
    """Read strict JSON (RFC 8259): UTF-8, of duplicate keys the last.

    An integer that does not fit 64 bits (SQLite's limit) becomes a float, as in
    JavaScript. Raises TooLarge for more than `most` values. Raises InvalidRequest for
    the rest: more than `depth` levels, NaN and Infinity, a number that became infinite,
    half a surrogate pair."""
    # Measured before anything is built or recurses. Both counts are too high where
    # strings hold such characters, and only then are the strings taken out.
    openings = raw.count(b"[") + raw.count(b"{")
    if openings > depth or openings + raw.count(b",") > most:
        check_structure(without_strings(raw), depth, most)
    try:
        # json.loads(bytes) would guess UTF-16 and UTF-32 as well: decode first.
        value = _DECODER.decode(raw.decode("utf-8"))
        if b"\\u" in raw:
            encode_json(value).encode("utf-8")  # fails on half a pair
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the JSON can't be read: {str(error)[:200]}") from None
    return value


def without_strings(raw: bytes) -> bytes:
    """Return JSON text without its strings; one that never ends goes to the end.

    A backslash outside a string may confuse this, but reading fails there anyway. Each
    step takes time by the size alone. A regular expression would take four times as
    long."""
    # Pairs of backslashes first: a quote is escaped by an odd number of them.
    unescaped = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    return b"".join(unescaped.split(b'"')[::2])


def check_structure(bare: bytes, depth: int, most: int) -> None:
    """Raise TooLarge for too many values, InvalidRequest for too many levels.

    `bare` is JSON text without its strings.
    """
    openings = bare.count(b"[") + bare.count(b"{")
    if openings + bare.count(b",") > most:
        raise TooLarge(f"the JSON has more than {most} values")
    # As many brackets close as open. So reading fails before it comes to more of them,
    # or to what is not balanced and may count as less deep.
    brackets = bare.translate(None, _NOT_BRACKETS)[: 2 * openings]
    levels = itertools.accumulate(map(_STEPS.__getitem__, brackets))
    if max(levels, default=0) > depth:
        raise InvalidRequest(f"the JSON is nested deeper than {depth} levels")


def _integer(text: str) -> int | float:
    # Its length first: to read a million digits as an integer would take seconds.
    if len(text) <= 20 and -(2**63) <= (number := int(text)) < 2**63:
        return number
    return _finite(text)


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:20]} is not a finite number")
    return number


_DECODER = json.JSONDecoder(
    parse_int=_integer, parse_float=_finite, parse_constant=_finite
)


# --- Store ----------------------------------------------------------------------------
# The change log on disk. A row a change; AUTOINCREMENT keeps a cursor once given out
# from coming back, also after a trim or a restart (https://sqlite.org/autoinc.html). A
# row a mutation that was applied, its dedupe mark, is kept for ever. There is one
# writer at a time, so cursors are handed out in commit order: a reader that is at N has
# everything up to N. All of this blocks.
#
# An epoch names a stretch of the history: (name, head when it began). The first commit
# of each opening begins one, so two copies of a file that went different ways differ by
# their epochs. (epoch, cursor) belongs to this history if the epoch is there and the
# cursor is not above the place where the next epoch begins. No clock is asked, and
# opening a file writes nothing into it but the application's schema.


class Position(NamedTuple):
    """Where a history stands: whatever happens to it moves one of these on."""

    head: int  # the highest cursor over all scopes
    epoch: str  # the newest
    trims: int  # the number of the last one


class Row(NamedTuple):
    """A change in the log. `first` is its mutation's first cursor: a page ends where it
    changes."""

    cursor: int
    first: int
    scope: str
    time: str
    data: str  # JSON text

    def encode(self) -> bytes:
        """The fragment: this change as the protocol writes it."""
        words = f'"cursor":{self.cursor},"scope":{encode_name(self.scope)},"time":"{self.time}"'
        return f'{{{words},"data":{self.data}}}'.encode()


class Mark(NamedTuple):
    """That a mutation was applied. Its changes have the cursors from `first` to `last`.

    Without changes `first` is None, and `last` what its scope's current cursor was.
    """

    scope: str
    id: str
    first: int | None
    last: int


class Store(Protocol):
    """What the engine needs of a database: a few steps, each of which may raise
    StoreRefused.

    `db` is whatever the database's own connection is; `apply` and `snapshot` get it as
    it is."""

    # On any thread.
    def look(
        self,
    ) -> Position: ...  # where the last commit put it, whoever made that; in no time
    def read(
        self, work: Callable[[Any], T]
    ) -> T: ...  # work(db), with a db that sees one moment
    def close(self) -> None: ...

    # On any thread, with a db that is in a transaction.
    def position(self, db: Any) -> Position: ...
    def current(
        self, db: Any, scope: str
    ) -> int: ...  # its newest cursor, also after a trim
    def nth_newest(
        self, db: Any, scope: str, n: int
    ) -> int: ...  # its cursor; 0: there is none
    def trimmed(
        self, db: Any, scope: str
    ) -> int: ...  # the highest cursor that a trim removed
    def epoch_end(
        self, db: Any, epoch: str
    ) -> int | None: ...  # its highest; None: not known
    def changes(
        self, db: Any, scope: str, after: int
    ) -> Iterator[Row]: ...  # read as one asks
    def between(self, db: Any, first: int, last: int) -> list[Row]: ...  # of all scopes
    def touched(
        self, db: Any, since: Position
    ) -> dict[str, int]: ...  # scopes, newest cursors
    def find(self, db: Any, scope: str, id: str) -> Mark | None: ...

    # On the writer's thread, from begin to commit or rollback.
    def begin(
        self,
    ) -> tuple[Any, Position]: ...  # waits for other processes, but not for ever
    def attempt(
        self, work: Callable[[Any], T]
    ) -> T: ...  # if work(db) raises, it left no trace
    def append(
        self, rows: Sequence[Row], marks: Sequence[Mark]
    ) -> None: ...  # numbered by engine
    def trim(
        self, db: Any, scope: str, before: int, limit: int
    ) -> int: ...  # how many went
    def probe(self, db: Any) -> None: ...  # write something, and take it back
    def commit(self) -> None: ...  # on disk when this returns
    def rollback(self) -> None: ...  # never raises: what it can't undo, it abandons


FORMAT = 1  # of the tables below; a file with a higher one is refused
APPLICATION_ID = (
    0x6D697A75  # "mizu" (https://sqlite.org/pragma.html#pragma_application_id)
)

# The columns stand in the order of Row and Mark (SELECT *, VALUES), and no statement
# holds a semicolon. Whoever raises FORMAT writes into _prepare what makes an older file
# a newer one.
#
# `first` in changes: cursor of the first change of the same mutation. mutations: the
# dedupe marks. trims: the low-water marks, the highest cursor that was removed. epochs:
# the head when each began. With their rows from the start, the head (in
# sqlite_sequence) and an epoch are always there.
LOG_SCHEMA = f"""
    CREATE TABLE mizusync_format (format INTEGER NOT NULL);
    INSERT INTO mizusync_format VALUES ({FORMAT});
    CREATE TABLE mizusync_changes (cursor INTEGER PRIMARY KEY AUTOINCREMENT,
        first INTEGER NOT NULL, scope TEXT NOT NULL, time TEXT NOT NULL, data TEXT NOT NULL);
    INSERT INTO sqlite_sequence VALUES ('mizusync_changes', 0);
    CREATE INDEX mizusync_changes_of_scope ON mizusync_changes (scope, cursor);
    CREATE TABLE mizusync_mutations (scope TEXT NOT NULL, id TEXT NOT NULL,
        first INTEGER, last INTEGER NOT NULL, PRIMARY KEY (scope, id)) WITHOUT ROWID;
    CREATE TABLE mizusync_trims (number INTEGER PRIMARY KEY, scope TEXT NOT NULL UNIQUE,
        cursor INTEGER NOT NULL);
    CREATE TABLE mizusync_epochs (number INTEGER PRIMARY KEY,
        epoch TEXT NOT NULL UNIQUE, start INTEGER NOT NULL);
    INSERT INTO mizusync_epochs VALUES (1, hex(randomblob(9)), 0);
"""

WAL_SIZE = (
    64 * 1024 * 1024
)  # bytes; SQLite itself keeps it near 4 MiB, unless reads overlap
# Seconds between two looks at it. After a stat of a file Linux (6.13 and newer) gives
# its next write an exact time, which the sync then has to write too: each commit took
# 80 us longer.
WAL_LOOK = 1.0

StrPath = str | os.PathLike[str]

# SQLite's result codes (https://sqlite.org/rescode.html) when the disk is in the way,
# the file, or another process: the statement itself was right, and may work later,
# there or on a mended file.
_DISK = (
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_CORRUPT,
)
_REFUSED = (*_DISK, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PROTOCOL,
            sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_NOTADB)  # fmt: skip

# What apply may not do to the engine's transaction; and what it may only read.
_DENIED = sqlite3.SQLITE_TRANSACTION, sqlite3.SQLITE_ATTACH, sqlite3.SQLITE_PRAGMA
_OURS = "mizusync_", "sqlite_sequence"  # as names begin, of tables and all else
_ASKED = (
    ("data_version", None),
    ("page_size", None),
)  # as a pragma, by full-text search and R*Trees


def primary_code(error: BaseException | None) -> int:
    """SQLite's primary result code; 0 for what the Python module raised by itself."""
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF


def is_busy(refusal: StoreRefused) -> bool:
    """Return whether another connection held the lock."""
    return primary_code(refusal.__cause__) == sqlite3.SQLITE_BUSY


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """SQLite's own refusals as StoreRefused; whatever else is wrong, as it is."""
    try:
        yield
    except sqlite3.Error as error:
        if primary_code(error) in _REFUSED:
            raise StoreRefused("the database refuses, for now") from error
        raise


_PREFIX = (
    "/* mizusync */ "  # what a statement of the engine's own begins with, and no other
)


def _run(db: sqlite3.Connection, sql: str, *parameters: Any) -> list[Any]:
    """All rows of a statement of the engine's own, past the guard. Raises
    StoreRefused."""
    try:
        return sqlite3.Connection.execute(db, _PREFIX + sql, parameters).fetchall()
    except sqlite3.Error:
        with refusals():  # around the statement it would cost as much as that does
            raise


class GuardedCursor(sqlite3.Cursor):
    """Writes nothing outside the engine's transaction, and notes when the disk was in
    the way."""

    def _guarded(self, method: Callable[..., Any], statement: Sequence[Any]) -> Any:
        db: Any = self.connection
        if (
            db.lent and not db.in_transaction
        ):  # SQLITE_FULL, say, has rolled it all back
            raise sqlite3.OperationalError(
                "the transaction is lost: this would commit by itself"
            )
        try:
            return method(*statement)
        except sqlite3.Error as error:  # which the application may catch
            db.refused = db.refused or primary_code(error) in _DISK
            raise

    def execute(self, *statement: Any) -> Any:
        return self._guarded(super().execute, statement)

    def executemany(self, *statement: Any) -> Any:
        return self._guarded(super().executemany, statement)

    def executescript(self, *statement: Any) -> Any:
        return self._guarded(super().executescript, statement)


class GuardedConnection(sqlite3.Connection):
    """The connection that `apply` and `snapshot` get: theirs for everything but the
    transaction.

    While it is lent, an authorizer refuses what would end the engine's transaction,
    leave the file, or change the log's tables (or sqlite_sequence, which holds the
    head); and every cursor that was opened is closed afterwards: a half-read INSERT ...
    RETURNING makes a later COMMIT fail, and a half-read SELECT keeps an old state of
    the file in use. At any time, also for the application's schema, the authorizer
    refuses to create things in TEMP.

    An authorizer is asked only when a statement is prepared, so what the engine itself
    runs is spelled as no application spells it: an application's COMMIT must not find
    ours in the cache (`cached_statements` in the sqlite3 module's documentation).
    executescript begins with a COMMIT of Python's own, so `apply` can't use it."""

    def __init__(self, path: str, mode: str, timeout: float) -> None:
        # Every byte is quoted: a name need not be UTF-8, and a URI that begins with two
        # slashes names a host.
        name = urllib.parse.quote(os.fsencode(path), safe="")
        uri = f"file:{name}?mode={mode}"  # "rwc" may create the file
        # In autocommit, until an explicit BEGIN; on any thread, but on one at a time.
        options: dict[str, Any] = {"isolation_level": None, "check_same_thread": False}
        super().__init__(uri, timeout=timeout, uri=True, **options)
        self.lent, self.refused, self._writes = False, False, mode != "ro"
        self._opened: list[
            weakref.ref[Any]
        ] = []  # cursors and blobs; one that is dropped closes
        super().set_authorizer(self._authorize)

    def _authorize(self, action: int, *names: str | None) -> int:
        # To create anything in TEMP begins with an INSERT into its schema table. SQLite
        # looks for a name in TEMP first: a table there could stand in for the log's.
        temporary = action == sqlite3.SQLITE_INSERT and names[2] == "temp"
        ours = any(str(name).lower().startswith(_OURS) for name in names[:2])
        denied = action in _DENIED and names[:2] not in _ASKED
        denied = denied or (ours and action != sqlite3.SQLITE_READ)
        if temporary or (denied and self.lent):
            return sqlite3.SQLITE_DENY
        return sqlite3.SQLITE_OK

    def set_authorizer(self, *callback: Any) -> None:
        raise sqlite3.ProgrammingError("the engine has set its own authorizer")

    def cursor(
        self, factory: Any = None
    ) -> Any:  # whatever is asked for: another has no guard
        opened = super().cursor(GuardedCursor)
        self._opened.append(weakref.ref(opened))
        return opened

    # Connection.execute does not go through an overridden cursor(), so each has to.
    def execute(self, *statement: Any) -> Any:
        return self.cursor().execute(*statement)

    def executemany(self, *statement: Any) -> Any:
        return self.cursor().executemany(*statement)

    def executescript(self, *statement: Any) -> Any:
        return self.cursor().executescript(*statement)

    def blobopen(self, table: str, *place: Any, **options: Any) -> Any:
        if self.lent and table.lower().startswith(_OURS):  # no authorizer is asked
            raise sqlite3.DatabaseError(f"not authorized: {table} is the engine's")
        opened = super().blobopen(table, *place, **options)
        self._opened.append(weakref.ref(opened))
        return opened

    def backup(self, *target: Any, **options: Any) -> None:
        if (
            self.lent and self._writes
        ):  # it would wait for its own transaction, for ever
            raise sqlite3.ProgrammingError("no backup inside apply: take one in a read")
        super().backup(*target, **options)

    def close(self) -> None:
        if self.lent:
            raise sqlite3.ProgrammingError("the engine's connection stays open")
        super().close()

    def lend(self, work: Callable[[Any], T]) -> T:
        """`work(self)` in the application's hands, under a savepoint; afterwards all is
        as before.

        If the application raises, it left no trace. Where there is no transaction yet,
        the savepoint is one, of one moment (https://sqlite.org/lang_savepoint.html).
        """
        _run(self, "SAVEPOINT mizusync_lent")
        self.lent, self.refused = True, False
        try:
            result = work(self)
        except BaseException as error:
            if primary_code(error) == sqlite3.SQLITE_AUTH:
                error.add_note(
                    "in the engine's transaction none may end it, use PRAGMA or ATTACH,"
                )
                error.add_note("create things in TEMP, change what is named")
                error.add_note(
                    "mizusync_*, rename a table, or drop one with AUTOINCREMENT"
                )
            self._take_back(error)
            raise
        self._take_back(None)
        return result

    def _take_back(self, failure: BaseException | None) -> None:
        """The connection is ours again, what failed is undone.

        Raises StoreRefused where the disk was in the way, TransactionLost where the
        application ended the transaction."""
        self.lent, self.row_factory, self.text_factory = False, None, str
        self.set_progress_handler(None, 0)
        while self._opened:
            with contextlib.suppress(
                sqlite3.Error
            ):  # a thread of the application's may be in it
                if opened := self._opened.pop()():
                    opened.close()
        refused = self.refused or primary_code(failure) in _DISK
        try:
            if failure:
                _run(self, "ROLLBACK TO mizusync_lent")
            _run(self, "RELEASE mizusync_lent")
        except (sqlite3.Error, StoreRefused):
            # No savepoint: the whole transaction was rolled back. By SQLite, where the
            # disk was in the way (SQLITE_FULL), although the application may have
            # caught that and gone on; or else by the application itself
            # (RAISE(ROLLBACK)).
            if not refused:
                raise TransactionLost(
                    "the application ended the transaction"
                ) from failure
        if refused:
            raise StoreRefused("the database gave up the transaction") from failure


class SQLStore(Store):
    """What a Store reads alike in every SQL database: tables with the columns of
    LOG_SCHEMA."""

    def run(self, db: Any, sql: str, *parameters: Any) -> list[Any]:
        """All rows of a statement, with question marks for its parameters."""
        raise NotImplementedError

    def one(self, db: Any, sql: str, *parameters: Any) -> Any:
        """The first column of the first row; None where there is no row."""
        rows = self.run(db, sql, *parameters)
        return rows[0][0] if rows else None

    def current(self, db: Any, scope: str) -> int:
        return self.nth_newest(db, scope, 1) or self.trimmed(db, scope)

    def nth_newest(self, db: Any, scope: str, n: int) -> int:
        sql = "SELECT cursor FROM mizusync_changes WHERE scope = ? ORDER BY cursor DESC"
        return self.one(db, f"{sql} LIMIT 1 OFFSET ?", scope, n - 1) or 0

    def trimmed(self, db: Any, scope: str) -> int:
        return (
            self.one(db, "SELECT cursor FROM mizusync_trims WHERE scope = ?", scope)
            or 0
        )

    def epoch_end(self, db: Any, epoch: str) -> int | None:
        # Within one file starts never fall, so the least of those behind it is the next
        # one's.
        next_start = "SELECT min(start) FROM mizusync_epochs WHERE number > this.number"
        sql = f"SELECT coalesce(({next_start}), ?) FROM mizusync_epochs AS this WHERE epoch = ?"
        end: int | None = self.one(db, sql, self.position(db).head, epoch)
        return end

    def between(self, db: Any, first: int, last: int) -> list[Row]:
        sql = "SELECT * FROM mizusync_changes WHERE cursor BETWEEN ? AND ? ORDER BY cursor"
        return list(map(Row._make, self.run(db, sql, first, last)))

    def touched(self, db: Any, since: Position) -> dict[str, int]:
        changes = "SELECT scope, cursor FROM mizusync_changes WHERE cursor > ?"
        trims = "SELECT scope, cursor FROM mizusync_trims WHERE number > ?"
        sql = f"SELECT scope, max(cursor) FROM ({changes} UNION ALL {trims}) AS news GROUP BY scope"
        return dict(self.run(db, sql, since.head, since.trims))

    def find(self, db: Any, scope: str, id: str) -> Mark | None:
        sql = "SELECT * FROM mizusync_mutations WHERE scope = ? AND id = ?"
        rows = self.run(db, sql, scope, id)
        return Mark(*rows[0]) if rows else None

    def trim(self, db: Any, scope: str, before: int, limit: int) -> int:
        changes = "FROM mizusync_changes WHERE scope = ?"
        # Mutations go whole. The one in which the limit falls is the last that may go.
        # The first that stays is the one behind it, or an earlier one with a change
        # that `before` protects: of one with the changes 5 to 8, before=7 removes
        # nothing.
        at_limit = f"SELECT first {changes} ORDER BY cursor LIMIT 1 OFFSET ?"
        last = self.one(db, at_limit, scope, limit - 1) or before
        stays = f"SELECT first {changes} AND (cursor >= ? OR first > ?) ORDER BY cursor LIMIT 1"
        end = self.one(db, stays, scope, before, last) or before
        sql = f"SELECT max(cursor), count(*) {changes} AND cursor < ?"
        newest, count = self.run(db, sql, scope, end)[0]
        if count:
            number = "(SELECT coalesce(max(number), 0) + 1 FROM mizusync_trims)"
            sql = f"INSERT INTO mizusync_trims (number, scope, cursor) VALUES ({number}, ?, ?)"
            moved = "SET number = excluded.number, cursor = excluded.cursor"
            self.run(db, f"{sql} ON CONFLICT (scope) DO UPDATE {moved}", scope, newest)
            self.run(db, f"DELETE {changes} AND cursor <= ?", scope, newest)
        return int(count)

    def probe(self, db: Any) -> None:
        # No mutation has an empty scope. (An UPDATE to the same value writes nothing.)
        self.run(db, "INSERT INTO mizusync_mutations VALUES ('', '', NULL, 0)")
        self.run(db, "DELETE FROM mizusync_mutations WHERE scope = ''")


# Blanks and comments, then the first word of a statement.
_FIRST_WORD = re.compile(r"(?:\s|--[^\n]*+|/\*.*?\*/)*+(\w*)", re.DOTALL)
_TRANSACTION_WORDS = "BEGIN", "COMMIT", "END", "ROLLBACK"

_ADVICE = {  # on what SQLite says when a database can't be used
    sqlite3.SQLITE_BUSY: "another process holds its lock",
    sqlite3.SQLITE_CANTOPEN: "its folder has to be there, and be writable",
    sqlite3.SQLITE_NOTADB: "name another file",
    sqlite3.SQLITE_READONLY: "the server's user has to be able to write to the file, to"
    " its -wal and -shm, and to the folder",
}


def first_word(statement: str) -> str:
    """Return the first word of an SQL statement, in capitals; "" if there is none."""
    match = _FIRST_WORD.match(statement)
    return match[1].upper() if match else ""


def is_pragma(statement: str) -> bool:
    """Return whether this SQL statement is a PRAGMA."""
    return first_word(statement) == "PRAGMA"


def split_statements(script: str) -> Iterator[str]:
    """Yield the statements of an SQL script; the last one may lack its semicolon.

    A semicolon in a string, in a comment or in the body of a trigger ends no statement.
    """
    start = 0
    for semicolon in re.finditer(";", script):
        statement = script[start : semicolon.end()]
        if sqlite3.complete_statement(statement):
            yield statement
            start = semicolon.end()
    yield script[start:]


def mount_points(mountinfo: bytes) -> set[bytes]:
    """Return the mount points in the content of /proc/self/mountinfo.

    The mount point is the fifth field, with blanks and backslashes in octal (proc(5)).
    """
    found = set()
    for line in mountinfo.split(b"\n"):
        fields = line.split(b" ")
        if len(fields) > 4:
            octal = rb"\\([0-3][0-7]{2})"
            found.add(re.sub(octal, lambda code: bytes([int(code[1], 8)]), fields[4]))
    return found


def is_mount_point(path: str) -> bool:
    """Return whether this file is mounted by itself, where the system tells (Linux).

    os.path.ismount compares devices, so it misses a file of the same file system.
    """
    try:
        with open("/proc/self/mountinfo", "rb") as mountinfo:
            return os.fsencode(os.path.realpath(path)) in mount_points(mountinfo.read())
    except OSError:
        return False


def has_wal_reset_bug(version: tuple[int, ...]) -> bool:
    """Return whether this SQLite may lose a commit when several processes write.

    It happens when one of them resets the WAL at the moment in which another writes
    (https://sqlite.org/wal.html#walresetbug).
    """
    if version[:2] == (3, 44):
        return version < (3, 44, 6)
    if version[:2] == (3, 50):
        return version < (3, 50, 7)
    return version < (3, 51, 3)


class SQLiteStore(SQLStore):
    """The log in a SQLite file, together with the application's own tables.

    `schema` is the application's (CREATE TABLE IF NOT EXISTS ...), run at each opening,
    as one transaction. `adopt` takes an existing database of an application on.
    `busy_timeout`, in seconds, is how long a commit waits for other processes'. Raises
    StoreError for a file that is not ours or can't be used, and leaves it unchanged.
    """

    def __init__(
        self,
        path: StrPath,
        schema: str = "",
        adopt: bool = False,
        busy_timeout: float = 5.0,
    ) -> None:
        try:
            can_exist = b"\0" not in os.fsencode(path)
        except UnicodeEncodeError:  # the file system's encoding lacks a character
            can_exist = False
        if not can_exist:
            raise StoreError(f"no file can be named {os.fspath(path)!r}")
        self.path, self.schema, self.busy_timeout = (
            os.path.abspath(path),
            schema,
            busy_timeout,
        )
        self._connect = functools.partial(
            GuardedConnection, self.path, timeout=busy_timeout
        )
        self._db: Any = (
            None  # the writer's connection; None: begin() has to open it anew
        )
        self._looker: GuardedConnection | None = None
        self._looking = threading.Lock()
        self._seen: tuple[int, Position] = (
            0,
            Position(0, "", 0),
        )  # the last look's version
        self._idle: list[GuardedConnection] = []  # readers that nobody uses now
        self._turnstile = threading.Lock()  # held: no read begins
        self._wal_path = (
            f"{os.path.realpath(self.path)}-wal"  # SQLite follows links, too
        )
        self._wal_limit, self._wal_size, self._wal_look = (
            WAL_SIZE,
            0,
            0.0,
        )  # the next look's time
        # The highest head that we know of. A transaction that finds a lower one stands
        # on a copy that was restored: it begins an epoch. Until our first commit this
        # is above any head, so that one begins an epoch as well; but 0 in a file that
        # we just made, which has its first.
        self._known_head = self._next_head = MAX_CURSOR + 1
        # Whether to look for other writers; the writer's data_version at its opening.
        self._warns_of_others = has_wal_reset_bug(sqlite3.sqlite_version_info)
        self._writers_version = 0
        if os.fspath(path) in ("", ":memory:") or sqlite3.sqlite_version_info < (3, 31):
            raise StoreError("the log needs a file, and SQLite 3.31 or newer")
        if is_mount_point(self.path):
            # SQLite would keep its -wal and -shm beside it, outside of what is mounted.
            advice = "mount the folder that it is in, or its newest changes are lost"
            raise StoreError(f"only the file {self.path} is mounted here: {advice}")
        try:
            if os.path.exists(self._wal_path):
                if not os.path.exists(self.path):
                    advice = "put that back; or, to begin anew, remove its -wal and -shm as well"
                    raise StoreError(
                        f"{self._wal_path} is there without {self.path}: {advice}"
                    )
                # A crash left it, of another program perhaps, and to open it for
                # writing would move it into the file. So this looks first, and leaves a
                # foreign file as it is.
                with contextlib.closing(self._connect("ro")) as db:
                    self._has_log(db, adopt)
            self._db = self._connect("rwc")
            self._prepare(self._db, adopt)
            self._looker, self._file = self._connect("ro"), os.stat(self.path)
            self.position(self._looker)  # which opens the WAL
            self._wal = os.stat(self._wal_path)
        except (sqlite3.Error, StoreRefused, OSError, StoreError) as error:
            self.close()
            if isinstance(error, StoreError):
                raise
            cause = error.__cause__ or error
            advice = _ADVICE.get(primary_code(cause), "")
            sentence = f"the database {self.path} can't be used ({cause})"
            raise StoreError(": ".join(filter(None, (sentence, advice)))) from error

    # -- opening

    def _prepare(self, db: GuardedConnection, adopt: bool) -> None:
        """Make the file ours, and this connection its writer. Raises StoreError."""
        _run(db, "PRAGMA synchronous = FULL")  # a commit waits for the disk
        _run(
            db, "PRAGMA fullfsync = ON"
        )  # on macOS fsync leaves the data in the drive's cache
        if not self._has_log(db, adopt):
            timeout = self.one(db, "PRAGMA busy_timeout")
            _run(db, "PRAGMA busy_timeout = 0")  # _insist waits better
            self._insist(db, "BEGIN IMMEDIATE")
            # In a file that is not in WAL mode yet, the COMMIT has to wait for readers.
            _run(db, f"PRAGMA busy_timeout = {timeout}")
            with db:  # commits, or rolls back
                if not self._has_log(db, adopt):  # unless another process just made it
                    if not self.one(db, "SELECT count(*) FROM sqlite_master"):
                        # An adopted file keeps its application's.
                        _run(db, f"PRAGMA application_id = {APPLICATION_ID}")
                    for statement in LOG_SCHEMA.split(";")[:-1]:
                        _run(db, statement)
                    self._known_head = 0
        self._insist(db, "PRAGMA journal_mode = WAL")
        _run(db, "PRAGMA busy_timeout = 0")  # _insist waits by itself
        try:
            # SQLite opens a file that it may not write to as read-only, without a word.
            # This statement changes nothing, but it fails then. It also fails, with
            # another code, while another process holds the lock, which does no harm.
            _run(db, "DELETE FROM mizusync_format WHERE false")
        except StoreRefused as refusal:
            if not is_busy(refusal):
                raise
        self._run_schema(db)
        self._writers_version = self.one(db, "PRAGMA data_version")

    def _run_schema(self, db: GuardedConnection) -> None:
        """Run the application's schema. Raise StoreError for a mistake in it.

        It is one transaction, except that each PRAGMA runs by itself, at its place:
        many do nothing inside a transaction, or fail there. It parts two transactions.
        """
        failed = f"the schema for {self.path} can't be run"
        try:
            statements = list(split_statements(self.schema))
            for word in map(first_word, statements):
                if word in _TRANSACTION_WORDS:
                    raise StoreError(f"{failed}: it is a transaction, leave out {word}")
            for are_pragmas, group in itertools.groupby(statements, is_pragma):
                if are_pragmas:
                    for pragma in group:
                        self._insist(db, pragma)
                else:
                    self._run_together(db, list(group))
        except (sqlite3.Error, ValueError) as error:  # ValueError: it holds a NUL, say
            why = str(error)
            if primary_code(error) == sqlite3.SQLITE_AUTH:
                why += ": TEMP tables, views and triggers could stand in for the log's"
            raise StoreError(f"{failed}: {why}") from error

    def _run_together(self, db: GuardedConnection, statements: Sequence[str]) -> None:
        """Run statements in one transaction, which takes the lock if one writes.

        Where the lock can't be had, all of them run again once it can.
        """

        def transact(begin: str) -> None:
            self._insist(db, begin)
            with db:  # commits, or rolls back
                for statement in statements:
                    _run(db, statement)

        try:
            transact("BEGIN")
        except StoreRefused as refusal:
            if not is_busy(refusal):
                raise
            transact("BEGIN IMMEDIATE")

    def _insist(self, db: GuardedConnection, sql: str) -> None:
        """Run what takes a lock, until another process gives it back.

        SQLite's own busy handler pauses up to 100 ms between two tries: beside a busy
        writer of another process it would never get its turn. And journal_mode does not
        ask it at all."""
        deadline = time.monotonic() + self.busy_timeout
        while True:
            try:
                _run(db, sql)
                return
            except StoreRefused as refusal:
                if not is_busy(refusal) or time.monotonic() > deadline:
                    raise
            time.sleep(0.0002)

    def _has_log(self, db: GuardedConnection, adopt: bool) -> bool:
        """Whether the log is there. Raises StoreError for another program's, a newer
        format."""
        if (encoding := self.one(db, "PRAGMA encoding")) != "UTF-8":
            # There SQLite makes U+FFFD of U+FFFE and U+FFFF, so it would merge scopes.
            why = f"it is in {encoding}, the log needs UTF-8"
            raise StoreError(f"the database {self.path} can't be used: {why}")
        # In one look, for another process may be making the log just now.
        sql = "SELECT count(*), max(name = 'mizusync_format') FROM sqlite_master"
        ((objects, made),) = _run(db, sql)
        if made:
            if (found := self.one(db, "SELECT format FROM mizusync_format")) <= FORMAT:
                return True
            raise StoreError(
                f"the database {self.path} has format {found}: use a newer mizusync"
            )
        marked = self.one(db, "PRAGMA application_id") not in (0, APPLICATION_ID)
        if (objects or marked) and not adopt:
            advice = (
                "name another file, or open it with adopt=True to add the log to it"
            )
            raise StoreError(
                f"the database {self.path} belongs to another program: {advice}"
            )
        return False

    def _stat(self, path: str, known: os.stat_result) -> os.stat_result:
        """What is there: a file that was unlinked or replaced takes commits, and they
        are lost."""
        with contextlib.suppress(OSError):
            if os.path.samestat(found := os.stat(path), known):
                return found
        raise StoreRefused(
            f"the database {path} was removed or replaced: restart the server"
        )

    def _check_wal(self) -> None:
        """The WAL stays as long as anyone has the file open."""
        if (now := time.monotonic()) >= self._wal_look:
            self._wal_size = self._stat(self._wal_path, self._wal).st_size
            self._wal_look = now + WAL_LOOK

    # -- reading

    def run(self, db: Any, sql: str, *parameters: Any) -> list[Any]:
        return _run(db, sql, *parameters)

    def look(self) -> Position:
        with self._looking:
            if self._looker is None:
                raise StoreRefused("the database is closed")
            # Half the price of the position, and any commit moves it, whoever makes it
            # (https://sqlite.org/pragma.html#pragma_data_version).
            if (version := self.one(self._looker, "PRAGMA data_version")) != self._seen[
                0
            ]:
                self._seen = version, self.position(self._looker)
                if self._known_head <= MAX_CURSOR:  # others' commits count, too
                    self._known_head = max(self._known_head, self._seen[1].head)
            return self._seen[1]

    @refusals()
    def read(self, work: Callable[[Any], T]) -> T:
        self._stat(self.path, self._file)
        with self._turnstile:
            pass
        try:
            db = self._idle.pop()
        except IndexError:
            db = self._connect("ro")
        try:
            result = db.lend(work)
        except BaseException as error:
            db.close()
            if getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_READONLY:
                raise RuntimeError(
                    "only apply may write"
                ) from error  # it is not the disk's fault
            raise
        self._idle.append(db)
        return result

    def position(self, db: Any) -> Position:
        # The sequence, not max(cursor), which a trim could lower.
        head = "SELECT seq FROM sqlite_sequence WHERE name = 'mizusync_changes'"
        epoch = "SELECT epoch FROM mizusync_epochs ORDER BY number DESC LIMIT 1"
        trims = "SELECT coalesce(max(number), 0) FROM mizusync_trims"
        return Position(*_run(db, f"SELECT ({head}), ({epoch}), ({trims})")[0])

    def changes(self, db: Any, scope: str, after: int) -> Iterator[Row]:
        sql = "SELECT * FROM mizusync_changes WHERE scope = ? AND cursor > ? ORDER BY cursor"
        with contextlib.closing(
            sqlite3.Connection.execute(db, sql, (scope, after))
        ) as rows:
            yield from map(Row._make, rows)

    # -- writing

    @refusals()
    def begin(self) -> tuple[Any, Position]:
        self._stat(self.path, self._file)
        if self._db is None:
            db = self._connect("rw")
            try:
                self._prepare(db, adopt=False)
            except BaseException:
                db.close()
                raise
            self._db = db
        self._insist(self._db, "BEGIN IMMEDIATE")
        if self._warns_of_others:
            self._look_for_others()
        self._check_wal()
        position = self.position(self._db)
        if position.head < self._known_head:
            sql = "INSERT INTO mizusync_epochs (epoch, start) VALUES (hex(randomblob(9)), ?)"
            _run(self._db, sql, position.head)
            position = self.position(self._db)
        self._next_head = position.head
        return self._db, position

    def _look_for_others(self) -> None:
        """Warn once of other writers: this version of SQLite may lose a commit then."""
        version = self.one(self._db, "PRAGMA data_version")  # our own commits keep it
        if version != self._writers_version:
            self._warns_of_others = False
            store_log.warning(
                "another process writes to %s, and SQLite %s may lose a commit then:"
                " use 3.51.3 or newer (https://sqlite.org/wal.html#walresetbug)",
                self.path,
                sqlite3.sqlite_version,
            )

    def attempt(self, work: Callable[[Any], T]) -> T:
        made: T = self._db.lend(work)
        return made

    @refusals()
    def append(self, rows: Sequence[Row], marks: Sequence[Mark]) -> None:
        many = functools.partial(sqlite3.Connection.executemany, self._db)
        many(f"{_PREFIX}INSERT INTO mizusync_changes VALUES (?, ?, ?, ?, ?)", rows)
        many(f"{_PREFIX}INSERT INTO mizusync_mutations VALUES (?, ?, ?, ?)", marks)
        self._next_head = rows[-1].cursor if rows else self._next_head

    def commit(self) -> None:
        _run(self._db, "COMMIT")
        self._known_head = self._next_head
        if self._wal_size > self._wal_limit:
            with contextlib.suppress(
                sqlite3.Error, StoreRefused
            ):  # it is committed already
                self._empty_wal()

    def _empty_wal(self) -> None:
        """Let no read begin until those under way have ended: the WAL begins anew only
        then.

        Reads that overlap without a gap would let it grow for ever
        (https://sqlite.org/wal.html#avoiding_excessively_large_wal_files).
        """
        deadline, self._wal_size = (
            time.monotonic() + 1,
            0,
        )  # until it is looked at again
        self._wal_limit += (
            WAL_SIZE  # if one takes long: others shall not wait at each commit
        )
        with self._turnstile:
            while time.monotonic() < deadline:
                if not self.one(
                    self._db, "PRAGMA wal_checkpoint(TRUNCATE)"
                ):  # busy: 0 or 1
                    self._wal_limit = WAL_SIZE
                    return
                time.sleep(0.001)

    def rollback(self) -> None:
        try:
            if self._db and self._db.in_transaction:
                _run(self._db, "ROLLBACK")
        except (sqlite3.Error, StoreRefused):
            complain(store_log, "a rollback failed: the database will be opened anew")
            self._db.close()
            self._db = None

    def stats(self) -> dict[str, int]:
        """Optional in a Store: what an operator may want to know of it."""
        sizes = {"database_bytes": 0, "wal_bytes": 0}
        with contextlib.suppress(OSError):  # the file may be gone
            sizes["database_bytes"] = os.path.getsize(self.path)
            sizes["wal_bytes"] = os.path.getsize(self._wal_path)
        return sizes

    def close(self) -> None:
        """Close every connection; the last one out writes the WAL back into the
        file."""
        if self._db:
            with contextlib.suppress(
                sqlite3.Error, StoreRefused
            ):  # a reader may hold it back
                _run(self._db, "PRAGMA wal_checkpoint(TRUNCATE)")
        with self._looking:
            for db in filter(None, (*self._idle, self._looker, self._db)):
                db.close()
            self._idle, self._looker, self._db = [], None, None


# --- Engine ---------------------------------------------------------------------------
# The truth: push, pull, snapshot. One thread writes; it takes everything that waits and
# commits it as one transaction, each mutation under a savepoint of its own: one fsync
# serves all, and a failure spoils no other. The mark, the application's writes and the
# changes commit together.
#
# What is in memory is a copy of the log's end, a *tail* a scope, and is believed only
# while the file stands where the memory does: another process may write to the same
# file.

COUNTED = ("pushes", "pushes_failed", "applied", "duplicate", "invalid_mutation", "not_found",
           "conflict", "forbidden", "unavailable", "internal_error", "commits", "changes", "trims",
           "pulls_from_memory", "pulls_from_disk", "snapshots")  # fmt: skip


class Hint(NamedTuple):
    """A newest cursor and, while they are few, the encoded items after the one before.

    `items` is None where another process made them: who wants them pulls.
    """

    cursor: int
    epoch: str = ""
    after: int = 0
    items: tuple[bytes, ...] | None = None


News = Mapping[str, Hint]  # what a commit did: the scopes in it
Listener = Callable[[News], None]
Mutations = Iterable[Mutation | Mapping[str, Any]]
Loop = asyncio.AbstractEventLoop
Call = tuple[Loop | None, Callable[[Any], None], Any]  # where, what, with what


@dataclasses.dataclass(slots=True)
class Tail:
    """The newest changes of one scope, encoded: all those above `after`.

    Memory has one for each scope that is in use; a transaction makes one of what it
    adds."""

    after: int
    cursors: list[int] = dataclasses.field(default_factory=list)
    firsts: list[int] = dataclasses.field(default_factory=list)
    fragments: list[bytes] = dataclasses.field(default_factory=list)
    size: int = 0  # bytes of memory, about
    trimmed: int = (
        0  # of a transaction's: the highest cursor that it removed from the log
    )

    @property
    def current(self) -> int:
        return self.cursors[-1] if self.cursors else self.after

    def add(self, row: Row) -> bytes:
        """Encode one more change; returns the fragment."""
        fragment = row.encode()
        self.cursors.append(row.cursor)
        self.firsts.append(row.first)
        self.fragments.append(fragment)
        self.size += len(fragment) + 200
        return fragment

    def extend(self, newer: Tail, keep: int) -> None:
        """Follow a transaction; forget all but the newest `keep` once there are twice
        as many."""
        self.forget(newer.trimmed)
        self.cursors += newer.cursors
        self.firsts += newer.firsts
        self.fragments += newer.fragments
        self.size += newer.size
        if len(self.cursors) > 2 * keep:
            self.forget(self.cursors[-keep - 1])

    def forget(self, cursor: int) -> None:
        """Forget the changes up to this one."""
        self.after, drop = (
            max(self.after, cursor),
            bisect.bisect_right(self.cursors, cursor),
        )
        self.size -= sum(map(len, self.fragments[:drop])) + 200 * drop
        del self.cursors[:drop], self.firsts[:drop], self.fragments[:drop]

    def page(self, cursor: int, limit: int, size: int, epoch: str) -> Page:
        start, length = bisect.bisect_right(self.cursors, cursor), len(self.cursors)
        if start == length:
            return Page((), cursor, epoch)
        stop = min(start + limit, length)
        if self.size > size:  # then it is worth to look at each
            sizes = itertools.accumulate(map(len, self.fragments[start:stop]))
            stop = start + max(1, sum(1 for so_far in sizes if so_far <= size))
        while stop < length and self.firsts[stop] == self.firsts[stop - 1]:
            stop += 1  # a page never ends inside a mutation
        return Page(
            self.fragments[start:stop], self.cursors[stop - 1], epoch, stop < length
        )


class Batch:
    """One transaction while it is being made: rows and marks that are not in the log
    yet."""

    def __init__(self, store: Store, db: Any, position: Position) -> None:
        self.store, self.db, self.position = store, db, position
        self.time = datetime.now(UTC).isoformat(timespec="milliseconds")[:-6] + "Z"
        self.rows: list[Row] = []
        self.marks: dict[tuple[str, str], Mark] = {}
        self.grown: dict[
            str, Tail
        ] = {}  # of each touched scope: where it stood, and these rows
        self.counts: Counter[str] = Counter(commits=1)

    def tail(self, scope: str) -> Tail:
        if scope not in self.grown:
            self.grown[scope] = Tail(self.store.current(self.db, scope))
        return self.grown[scope]

    def add(self, mutation: Mutation, rows: Sequence[Row]) -> Result:
        """Take what a mutation made, and mark it as applied."""
        self.counts["applied"] += 1
        first, last = None, self.tail(mutation.scope).current
        if rows:
            first, last = rows[0].cursor, rows[-1].cursor
        own: list[bytes] = []
        for row in rows:
            fragment = self.tail(row.scope).add(row)
            if row.scope == mutation.scope:
                own.append(fragment)
        self.rows += rows
        key = (mutation.scope, mutation.id)
        self.marks[key] = Mark(*key, first, last)
        return Result.applied(last, own)

    def repeat(self, mark: Mark, with_changes: bool) -> Result:
        """Return the first answer of a mutation that was applied before.

        Without changes, their rows are not even read.
        """
        self.counts["duplicate"] += 1
        first, last = (
            mark.first or mark.last + 1,
            mark.last,
        )  # without changes: an empty range
        if not with_changes:
            return Result.applied(last, None, again=True)
        if first > (start := self.position.head):
            rows = self.rows[first - start - 1 : last - start]
        else:
            rows = self.store.between(self.db, first, last)
        if len(rows) < last - first + 1:  # some were trimmed, in whatever scope
            return Result.applied(last, None, again=True)
        own = [row.encode() for row in rows if row.scope == mark.scope]
        return Result.applied(last, own, again=True)

    def news(self) -> News:
        """What to tell, once it is in the log."""
        epoch = self.position.epoch
        told = {scope: tail for scope, tail in self.grown.items() if tail.fragments}
        return {
            s: Hint(t.current, epoch, t.after, tuple(t.fragments))
            for s, t in told.items()
        }


class Step(NamedTuple):
    """One mutation, or one trim: what may become a transaction of its own."""

    run: Callable[[Batch, int], Any]  # the int: bytes of its push's answer so far
    name: tuple[str, str, str]  # for the log: the mutation's name, id and scope


class Job(NamedTuple):
    """Work for the writer, and the future to answer, on which loop (None: any thread).

    The outcome is a list of what each step gave, or an exception if nothing was done.
    """

    steps: Sequence[Step]
    future: asyncio.Future[list[Any]] | Future[list[Any]]
    loop: Loop | None = None
    is_push: bool = True

    def answer(self, outcome: list[Any] | Exception) -> None:
        if self.future.done():  # the caller has gone
            return
        if isinstance(outcome, Exception):
            self.future.set_exception(outcome)
        else:
            self.future.set_result(outcome)


def answer_size(result: Any) -> int:
    """Return how many bytes of a push's answer a result takes; a trim's takes none."""
    return len(result.encoded) if isinstance(result, Result) else 0


class Engine:
    """The log and the application's `apply` function: a sync server without a network.

    `store` is the path of a SQLite file, or a Store of one's own. `schema` and `adopt`
    are SQLiteStore's. Raises StoreError where the file can't be used.

    `apply(db, mutation)` runs on the writer's thread, inside the transaction, and
    returns the changes that it made: JSON values, or `Change`s. It refuses by raising
    InvalidMutation, NotFound, Conflict, Forbidden, or Unavailable. It may run again for
    one mutation, with the same args, if the transaction failed: what it does outside
    `db` may happen twice. `snapshot(db, scope)` runs on a reader's thread and returns
    the whole state of the scope: a JSON value, or `Json(text)`.

    Its coroutines run on any loop; everything else may be called from any thread. After
    a fork only the parent may use it: in the child every call raises RuntimeError.
    """

    def __init__(
        self,
        store: StrPath | Store,
        *,
        apply: Callable[[Any, Mutation], Iterable[Any]],
        snapshot: Callable[[Any, str], Any] | None = None,
        schema: str = "",
        adopt: bool = False,
        settings: Settings | None = None,
    ) -> None:
        self.settings = settings or Settings()
        if snapshot is None and self.settings.keep_changes is not None:
            raise ValueError(
                "keep_changes: who is behind a trim needs a snapshot function"
            )
        if isinstance(store, (str, os.PathLike)):
            store = SQLiteStore(store, schema, adopt, self.settings.busy_timeout)
        self.store: Store = store
        self.counts = Counter(dict.fromkeys(COUNTED, 0))
        self.committing = (
            False  # the writer is at work, and wants the interpreter's lock at times
        )
        self._apply_function, self._snapshot_function = apply, snapshot
        self._closed = False
        self._process = os.getpid()
        self.rewinds = 0  # how often an older copy of the log was restored into it
        self._overfull: dict[
            str, None
        ] = {}  # scopes to trim, the one that waits longest first
        self._looked_this_turn: dict[Loop, Position] = {}  # of this turn of each loop
        # Over _position, the tails, the listeners and _closed; held for microseconds.
        # Reentrant: on a thread that holds it the garbage collector may end a lost
        # pull, which calls unlisten.
        self._lock = threading.RLock()
        self._position = store.look()
        self._tails: OrderedDict[str, Tail] = (
            OrderedDict()
        )  # the least recently used first
        self._tails_size = 0
        self._listeners: dict[
            str | None, dict[object, tuple[Loop | None, Listener]]
        ] = {}
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()  # None: look up
        self._readers = ThreadPoolExecutor(self.settings.readers, "mizusync-reader")
        self._writer = threading.Thread(
            target=self._write, name="mizusync-writer", daemon=True
        )
        self._writer.start()

    def _check_process(self) -> None:
        """Raise RuntimeError in a forked child, which has no writer's thread.

        It stands before whatever takes a lock: a thread of the parent may have held it.
        """
        if os.getpid() != self._process:
            sentence = "this process was forked: open the engine after the fork"
            raise RuntimeError(sentence)

    # -- push

    async def push(self, mutations: Mutations) -> list[Result]:
        """Apply mutations, in order; each succeeds or fails alone. One Result each, in
        order.

        Those that are ok are on disk. Raises Unavailable if the store refuses (nothing
        of this push was applied), and InvalidMutation for a mapping that is no mutation
        or args that are not made of JSON values, tuples and bytes.
        """
        return await self._on_writer(self._steps_of(mutations))

    def submit(self, mutations: Mutations) -> Future[list[Result]]:
        """The same for a thread that has no loop:
        `engine.submit(mutations).result()`."""
        future: Future[list[Result]] = Future()
        # it is pushed, whatever becomes of who asks
        future.set_running_or_notify_cancel()
        self._enqueue(Job(self._steps_of(mutations), future))
        return future

    def _steps_of(self, values: Mutations) -> list[Step]:
        self._check_process()
        steps: list[Step] = []
        for value in values:
            mutation = value if isinstance(value, Mutation) else Mutation.parse(value)
            try:
                args = marshal.dumps(mutation.args)
            except ValueError as error:
                sentence = f"args are JSON values, tuples and bytes: {error}"
                raise InvalidMutation(sentence) from error
            run = functools.partial(self._apply, mutation=mutation, args=args)
            steps.append(Step(run, (mutation.name, mutation.id, mutation.scope)))
        return steps

    async def _on_writer(
        self,
        steps: Sequence[Step],
        is_push: bool = True,
    ) -> list[Any]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[list[Any]] = loop.create_future()
        self._enqueue(Job(steps, future, loop, is_push))
        return await future

    def _enqueue(self, job: Job) -> None:
        if self._jobs.qsize() >= self.settings.pending_pushes:
            raise Unavailable("too many pushes are waiting")
        with self._lock:  # so that the writer, once closed, leaves none behind
            if self._closed:
                raise Unavailable("the engine is closed")
            self._jobs.put(job)
        self.committing = True

    def _apply(
        self,
        batch: Batch,
        size: int,
        mutation: Mutation,
        args: bytes,
    ) -> Result:
        """Apply a mutation, with a copy of its args; or repeat its first answer.

        `size` is how many bytes the answer to its push has already. Raises StoreRefused
        if the transaction failed as a whole.
        """
        key = (mutation.scope, mutation.id)
        if mark := batch.marks.get(key) or self.store.find(batch.db, *key):
            # A hundred repeats of a large mutation, a small request, must stay small.
            return batch.repeat(mark, with_changes=size <= self.settings.page_size)
        # Whatever `apply` does with its args, another run gets them as they came.
        mutation = dataclasses.replace(mutation, args=marshal.loads(args))
        try:  # the store's savepoint and guard, in them the application's function
            made = self.store.attempt(lambda db: self._rows_of(mutation, db, batch))
        except StoreRefused:  # of the whole transaction
            raise
        except (InvalidMutation, NotFound, Conflict, Forbidden, Unavailable) as error:
            refusal: SyncError = error  # each of these is a count in COUNTED, too
        except (
            BaseException
        ):  # SystemExit too: it is the application's, not this thread's
            complain(
                engine_log,
                "apply failed on %r, %r of %r",
                mutation.name,
                *reversed(key),
            )
            refusal = SyncError("the server failed on this mutation")
        else:
            return batch.add(mutation, made)
        batch.counts[refusal.code] += 1
        return Result.refused(refusal)

    def _rows_of(self, mutation: Mutation, db: Any, batch: Batch) -> list[Row]:
        """What the application makes of a mutation, checked and numbered: data as
        JSON."""
        made: Any = self._apply_function(db, mutation)
        if isinstance(made, (str, bytes, Mapping, Change, sqlite3.Cursor)):
            raise TypeError(
                f"apply returns an iterable of changes, not one {type(made).__name__}"
            )
        first, most = (
            batch.position.head + len(batch.rows) + 1,
            self.settings.mutation_changes,
        )
        rows: list[Row] = []
        try:
            for change in () if made is None else made:
                data, scope = change, mutation.scope
                if isinstance(change, Change):
                    data, scope = (
                        change.data,
                        scope if change.scope is None else change.scope,
                    )
                    if not is_name(scope, MAX_SCOPE):
                        raise ValueError(
                            f"apply made a change for {scope!r}: that names no scope"
                        )
                text = data.text if isinstance(data, Json) else encode_json(data)
                # half a surrogate pair fails here, where it can still be undone
                text.encode()
                rows.append(Row(first + len(rows), first, scope, batch.time, text))
                if len(rows) > most:
                    raise InvalidMutation(f"it makes over {most} changes")
        finally:
            if inspect.isgenerator(made):
                # what it does at its end can be undone here, and not later
                made.close()
            made = None  # the same for one that another iterator holds
        return rows

    # -- the writer's thread

    def _write(self) -> None:
        """Commit what waits, until closed. Nothing that goes wrong in here may end the
        thread."""
        watch = min(max(0.001, self.settings.watch_interval), threading.TIMEOUT_MAX)
        while not (self._closed and self._jobs.empty()):
            job: Job | None = None
            with contextlib.suppress(queue.Empty):
                job = self._jobs.get(timeout=0.0 if self._overfull else watch)
            try:
                if job or self._overfull:
                    self._commit([job] if job else [])
                elif self.store.look() != self._position:
                    # Another process has committed, while there was nothing to write.
                    self.store.read(
                        lambda db: self._catch_up(db, self.store.position(db))
                    )
            except BaseException as error:
                if not isinstance(error, StoreRefused):  # a push will tell of that
                    complain(engine_log, "the writer's thread goes on after this")
            self.committing = not self._jobs.empty()

    def _commit(self, jobs: list[Job]) -> None:
        """Do these jobs and all that waits in one transaction, and answer them.

        If the transaction fails, do each of their mutations again, alone: an error that
        does not come back then was a neighbour's.
        """
        try:
            batch = self._begin()
        except StoreRefused as refusal:  # another process has the lock, say
            self._refuse(jobs, refusal)
            return
        try:
            outcomes = self._run_together(batch, jobs)
            self._retain(batch)
            self._finish(batch)
        except BaseException as error:
            self._undo()
            if jobs:
                self._run_alone(jobs)
            else:
                why = error.__cause__ or error
                is_ours = not isinstance(error, StoreRefused)
                complain(store_log, "a trim failed: %s", why, traceback=is_ours)
        else:
            self._answer(zip(jobs, outcomes, strict=True), batch.news())

    def _begin(self) -> Batch:
        """Begin a transaction. Raises StoreRefused, and nothing else."""
        try:
            db, position = self.store.begin()
            if position != self._position:
                # An epoch that begin() may have begun is not committed yet: if this
                # transaction fails, memory must not stand in an epoch that never was.
                self._catch_up(db, position._replace(epoch=self._position.epoch))
            return Batch(self.store, db, position)
        except BaseException as error:
            self._undo()
            if isinstance(error, StoreRefused):
                raise
            complain(store_log, "no transaction could begin")
            raise StoreRefused("the database fails") from error

    def _run_together(self, batch: Batch, jobs: list[Job]) -> list[list[Any]]:
        """Run these jobs, and those that join them until `commit_time` is over."""
        outcomes: list[list[Any]] = []
        deadline = time.monotonic() + self.settings.commit_time
        for job in jobs:  # it grows as we go
            results: list[Any] = []
            size = 0
            for step in job.steps:
                results.append(step.run(batch, size))
                size += answer_size(results[-1])
            outcomes.append(results)
            with contextlib.suppress(queue.Empty):
                if time.monotonic() < deadline and (more := self._jobs.get_nowait()):
                    jobs.append(more)
        return outcomes

    def _finish(self, batch: Batch) -> None:
        """Commit, then put it into memory: a client that is told finds it there."""
        self.store.append(batch.rows, list(batch.marks.values()))
        self.store.commit()
        self.counts.update({**batch.counts, "changes": len(batch.rows)})
        with self._lock:
            for scope, tail in batch.grown.items():
                self._keep_tail(scope, tail)
            head = batch.position.head + len(batch.rows)
            self._position = batch.position._replace(head=head)

    def _undo(self) -> None:
        self.store.rollback()
        self._overfull.clear()  # they will be found again

    def _run_alone(self, jobs: list[Job]) -> None:
        """Run each mutation of a failed transaction in one of its own; answer each job.

        Once the disk refuses, what is left and all that waits is unavailable, untried.
        """
        for place, job in enumerate(jobs):
            results: list[Any] = []
            outcome: list[Any] | Exception = results
            size = 0
            try:
                for step in job.steps:
                    results.append(self._run_step(step, size))
                    size += answer_size(results[-1])
            except StoreRefused as refusal:
                if not any(isinstance(one, Result) and one.ok for one in results):
                    self._refuse(jobs[place:], refusal)
                    return
                left = len(job.steps) - len(results)
                self.counts["unavailable"] += left
                self._answer([(job, results + [Result.refused(refusal)] * left)])
                self._refuse(jobs[place + 1 :], refusal)
                return
            if not job.is_push and isinstance(results[0], Result):
                outcome = SyncError(results[0].error)
            self._answer([(job, outcome)])

    def _run_step(self, step: Step, size: int) -> Any:
        """Run one mutation, or one trim, in a transaction of its own.

        Raises StoreRefused if the disk refuses. A disk's error that comes although an
        empty write works is the mutation's own: an AUTOINCREMENT at its end, say, has
        the code of a full disk.
        """
        batch = self._begin()
        try:
            result = step.run(batch, size)
            self._finish(batch)
        except BaseException as error:
            self._undo()
            ended = isinstance(error, TransactionLost)  # by the application
            if isinstance(error, StoreRefused) and not ended:
                self._probe()
            complain(engine_log, "the transaction failed on %r, %r of %r", *step.name)
            self.counts["internal_error"] += 1
            return Result.refused(SyncError("the server failed on this mutation"))
        self._answer((), batch.news())
        return result

    def _probe(self) -> None:
        """Commit an empty write of our own. Raises StoreRefused if that fails, too."""
        batch = self._begin()
        try:
            self.store.probe(batch.db)
            self._finish(batch)
        except BaseException as error:
            self._undo()
            if isinstance(error, StoreRefused):
                raise
            raise StoreRefused("the database fails") from error

    def _refuse(self, jobs: Sequence[Job], refusal: StoreRefused) -> None:
        """Refuse these jobs and all that waits: each would wait as long by itself."""
        refused = list(jobs)
        with contextlib.suppress(queue.Empty):
            while True:
                if job := self._jobs.get_nowait():
                    refused.append(job)
        if refused:
            why = refusal.__cause__ or refusal
            complain(store_log, "pushes failed: %s", why, traceback=False)
        self._answer([(job, refusal) for job in refused])

    def _answer(
        self,
        outcomes: Iterable[tuple[Job, list[Any] | Exception]],
        news: News | None = None,
    ) -> None:
        """Count and send the outcomes of jobs, and tell of the commit."""
        calls: list[Call] = []
        for job, outcome in outcomes:
            failed = isinstance(outcome, Exception)
            if job.is_push:
                self.counts["pushes_failed" if failed else "pushes"] += 1
            calls.append((job.loop, job.answer, outcome))
        self._tell(news or {}, calls)

    def _retain(self, batch: Batch) -> None:
        """Trim some of the scopes that grew past `keep_changes`: in each commit a
        little."""
        if (keep := self.settings.keep_changes) is None:
            return
        # Twice what comes in goes, and no more: no push waits for the trims of many
        # scopes.
        for scope in list(itertools.islice(self._overfull, 1 + len(batch.rows) // 100)):
            if not self._trim(
                batch, scope, self.store.nth_newest(batch.db, scope, keep)
            ):
                del self._overfull[scope]
        # To find the change where a trim ends takes `keep` steps, so it is done some
        # ten times in as many changes, by chance: that needs no memory, and no pattern
        # of pushes evades it.
        for scope, tail in batch.grown.items():
            if random.random() * keep < 10 * len(tail.fragments):
                self._overfull[scope] = None

    def _trim(self, batch: Batch, scope: str, before: int) -> int:
        # So few at a time that no push waits long behind them.
        if removed := self.store.trim(
            batch.db, scope, min(before, MAX_CURSOR + 1), 200
        ):
            batch.counts["trims"] += 1
            batch.tail(scope).trimmed = self.store.trimmed(batch.db, scope)
            batch.position = self.store.position(batch.db)
        return removed

    def _keep_tail(self, scope: str, newer: Tail) -> None:
        """Extend a tail and put it last, at the cost of the least recently used. Under
        the lock."""
        tail = self._drop_tail(scope) or Tail(newer.after)
        tail.extend(newer, self.settings.tail_changes)
        self._tails[scope] = tail
        self._tails_size += tail.size
        # One without changes takes about 1,000 bytes, too.
        while self._tails_size + 1000 * len(self._tails) > self.settings.tail_size:
            self._drop_tail(next(iter(self._tails)))

    def _drop_tail(self, scope: str) -> Tail | None:
        if tail := self._tails.pop(scope, None):
            self._tails_size -= tail.size
        return tail

    def _catch_up(self, db: Any, position: Position) -> None:
        """Forget what memory has of scopes that another process wrote to, and tell of
        them."""
        known, touched = self._position.head, self.store.touched(db, self._position)
        # An older copy was restored into it, and may have grown again since.
        end = self.store.epoch_end(db, self._position.epoch)
        went_back = end is None or end < self._position.head
        self.rewinds += went_back
        with self._lock:
            for scope in list(self._tails) if went_back else touched:
                self._drop_tail(scope)
            self._position = position
        newer = {
            scope: cursor for scope, cursor in touched.items() if cursor > known
        }  # not trims
        self._tell(
            {scope: Hint(cursor, position.epoch) for scope, cursor in newer.items()}
        )

    def _tell(self, news: News, answers: Iterable[Call] = ()) -> None:
        """Answer, then call who listens to these scopes: each on its loop, in one hop
        to each."""
        with self._lock:
            scopes = (None, *news) if news else ()
            heard = [list(self._listeners.get(scope, {}).values()) for scope in scopes]
        of_loop: dict[Loop | None, list[Call]] = {}
        for call in (*answers, *((*to, news) for hearers in heard for to in hearers)):
            of_loop.setdefault(call[0], []).append(call)
        for loop, calls in of_loop.items():
            if loop is None:
                call_here(
                    calls, BaseException
                )  # SystemExit, too, is not for this thread
            else:
                with contextlib.suppress(
                    RuntimeError
                ):  # a closed loop: nobody waits there
                    loop.call_soon_threadsafe(call_here, calls)

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
        """The scope's changes above `cursor`, in order: `limit` of them, then to a
        mutation's end.

        `wait` (seconds) holds an empty page back until there is a change. `epoch` is
        the one that the cursor was read in, if known. Raises CursorTooOld,
        CursorUnknown, Unavailable."""
        self._check_process()
        limit = min(
            max(1, limit or self.settings.pull_limit), self.settings.pull_limit_max
        )
        if wait <= 0:
            return await self._page(scope, cursor, epoch, limit)
        # The listener stands before the page is looked at: no commit can fall between
        # the two.
        changed = asyncio.Event()

        def hear(news: News) -> None:
            # Of another process's commit the watcher tells late: it may be in the page
            # already.
            if (
                not news or news[scope].cursor > cursor
            ):  # without any it is wake() that calls
                changed.set()

        unlisten = self.listen(hear, scope)
        try:
            if self._closed:  # after that nothing would wake it
                raise Unavailable("the engine is closed")
            page = await self._page(scope, cursor, epoch, limit)
            if not page.fragments:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(wait, self.settings.pull_wait_max)):
                        await changed.wait()
                page = await self._page(scope, cursor, epoch, limit)
            return page
        finally:
            unlisten()

    def wake(self) -> None:
        """End every pull that waits, now: a listener of one scope is called with no
        news at all."""
        self._check_process()
        with self._lock:
            of_scopes = [
                to for scope, to in list(self._listeners.items()) if scope is not None
            ]
            calls: list[Call] = [
                (*to, {}) for one in of_scopes for to in list(one.values())
            ]
        self._tell({}, calls)

    async def _page(self, scope: str, cursor: int, epoch: str, limit: int) -> Page:
        if scope in self._tails:
            position = self._look()
            with self._lock:
                # Where the file stands elsewhere, it has commits that memory does not
                # hold yet; and only the file knows how far an older epoch goes.
                known = position == self._position and epoch in ("", position.epoch)
                tail = self._tails.get(scope)
                if known and tail and tail.after <= cursor <= position.head:
                    self._tails.move_to_end(scope)
                    self.counts["pulls_from_memory"] += 1
                    return tail.page(
                        cursor, limit, self.settings.page_size, position.epoch
                    )
        self.counts["pulls_from_disk"] += 1
        return await self.read(
            lambda db: self._page_on_disk(db, scope, cursor, epoch, limit)
        )

    def _look(self) -> Position:
        """Where the file stands: while that is where memory stands, asked once a turn
        of the loop.

        One look serves all pulls of the turn: asyncio reads the sockets once a turn, so
        these were asked before it, and what comes after it is handled after the pop.
        """
        loop = asyncio.get_running_loop()
        if self._looked_this_turn.get(loop) != self._position:
            self._looked_this_turn[loop] = self.store.look()
            loop.call_soon(self._looked_this_turn.pop, loop, None)
        return self._looked_this_turn[loop]

    def _page_on_disk(
        self, db: Any, scope: str, cursor: int, epoch: str, limit: int
    ) -> Page:
        position = self.store.position(db)
        trimmed = self.store.trimmed(db, scope)
        newest = epoch in ("", position.epoch)
        end = position.head if newest else self.store.epoch_end(db, epoch)
        if end is None or cursor > end:
            raise CursorUnknown(
                f"this history never gave out cursor {cursor}: take a snapshot"
            )
        if cursor < trimmed:
            raise CursorTooOld(
                f"changes {cursor} to {trimmed} were trimmed: take a snapshot"
            )
        tail, room = Tail(cursor), self.settings.page_size
        for row in self.store.changes(db, scope, cursor):
            full = len(tail.cursors) >= limit or room < len(row.data)
            if full and tail.firsts and row.first != tail.firsts[-1]:
                # It begins a mutation that the page has no room for.
                return Page(tail.fragments, tail.current, position.epoch, has_more=True)
            room -= len(tail.add(row))
        # The page reached the log's end: the next pull here will find it in memory.
        if not tail.cursors:
            tail.after = self.store.current(db, scope)
        with self._lock:
            if position == self._position and scope not in self._tails:
                self._keep_tail(scope, tail)
        return Page(tail.fragments, max(cursor, tail.current), position.epoch)

    async def read(self, work: Callable[[Any], T]) -> T:
        """`work(db)` on a reader's thread, in a transaction of its own: all of one
        moment.

        Raises Unavailable, and what `work` raises.
        """
        self._check_process()

        def read() -> T:
            try:
                return self.store.read(work)
            except BaseException as error:
                # The application's: neither a future nor a loop can hold all of these.
                if isinstance(error, StopIteration) or not isinstance(error, Exception):
                    raise RuntimeError("a read failed") from error
                raise

        try:
            return await asyncio.get_running_loop().run_in_executor(self._readers, read)
        except RuntimeError:  # the executor's, too
            if self._closed:
                raise Unavailable("the engine is closed") from None
            raise

    # -- and the rest

    async def snapshot(self, scope: str = DEFAULT_SCOPE) -> Snapshot:
        """The scope's whole state, and its cursor at the same moment.

        Raises NotFound where the application has no snapshot function, and what that
        raises."""
        self._check_process()
        take = self._snapshot_function
        if take is None:
            raise NotFound("this application has no snapshots: pull from cursor 0")
        self.counts["snapshots"] += 1

        def read(db: Any) -> Snapshot:
            cursor, epoch = self.store.current(db, scope), self.store.position(db).epoch
            data = take(db, scope)
            text = data.text if isinstance(data, Json) else encode_json(data)
            return Snapshot(text, cursor, epoch)

        return await self.read(read)

    async def head(self, scope: str = DEFAULT_SCOPE) -> int:
        """The scope's current cursor: of its newest change, 0 before the first."""
        self._check_process()
        position = self._look()
        with self._lock:
            if position == self._position and (tail := self._tails.get(scope)):
                return tail.current
        return await self.read(lambda db: self.store.current(db, scope))

    async def position(self) -> Position:
        """The highest cursor over all scopes, and the epoch. Raises Unavailable."""
        return await self.read(self.store.position)

    def stats(self) -> dict[str, int]:
        """Where the log stands, what waits, and what was done since the start."""
        self._check_process()
        now = {"cursor": self._position.head, "pushes_waiting": self._jobs.qsize()}
        return {**now, **getattr(self.store, "stats", dict)(), **self.counts}

    async def follow(
        self, scope: str = DEFAULT_SCOPE, cursor: int = 0
    ) -> AsyncIterator[Change]:
        """Every change of the scope above `cursor`, then each new one as it comes,
        without end."""
        epoch = ""
        while True:
            page = await self.pull(
                scope, cursor, epoch=epoch, wait=self.settings.pull_wait_max
            )
            for change in page.changes:
                yield change
            cursor, epoch = page.cursor, page.epoch
            if (
                not page.fragments
            ):  # where pulls may not wait, it would keep the loop to itself
                await asyncio.sleep(0.05)

    def listen(
        self, callback: Listener, scope: str | None = None
    ) -> Callable[[], None]:
        """Call `callback(news)` after each commit (to `scope`).

        On this loop, or where none runs on the writer's thread: it must be quick.
        Returns the function that ends it."""
        self._check_process()
        key, loop = object(), None
        with contextlib.suppress(RuntimeError):
            loop = asyncio.get_running_loop()
        with self._lock:
            self._listeners.setdefault(scope, {})[key] = loop, callback

        def unlisten() -> None:
            with self._lock:
                if (
                    (others := self._listeners.get(scope))
                    and others.pop(key, None)
                    and not others
                ):
                    del self._listeners[scope]

        return unlisten

    def catch_up(self) -> None:
        """Look at once, not only each `watch_interval`, whether another process has
        committed.

        For a store that is told of it. From any thread; it never blocks.
        """
        self._check_process()
        if self._jobs.empty():  # whoever waits there looks, too
            self._jobs.put(None)

    async def trim(self, scope: str, before: int) -> int:
        """Remove the scope's changes with cursors below `before`, whole mutations; how
        many.

        Who is behind then gets CursorTooOld and takes a snapshot: so it raises NotFound
        where the application has no snapshot function. Raises Unavailable."""
        self._check_process()
        if self._snapshot_function is None:
            raise NotFound("without a snapshot function the log is never trimmed")

        def remove(batch: Batch, size: int) -> int:
            return self._trim(batch, scope, before)

        step = Step(remove, ("trim", "", scope))
        total = 0
        while True:
            (removed,) = await self._on_writer([step], is_push=False)
            if not removed:
                return total
            total += removed

    def close(self, timeout: float | None = None) -> None:
        """Finish what waits, write the WAL back into the file, end the threads. Blocks.

        A writer that still waits after `timeout` seconds, for another process's lock or
        for `apply`, is left to the end of this process.
        """
        self._check_process()
        with self._lock:
            self._closed = True
            self._jobs.put(None)
        self._writer.join(timeout)
        if self._writer.is_alive():
            complain(engine_log, "the writer did not end in time", traceback=False)
            return
        self.wake()
        self._readers.shutdown()
        self.store.close()


def call_here(calls: Iterable[Call], caught: type[BaseException] = Exception) -> None:
    for _, function, argument in calls:
        try:
            function(argument)
        except caught:
            complain(engine_log, "a listener failed")


# --- Hub ------------------------------------------------------------------------------
# The accelerator: topics, and who follows them. It knows names, numbers and bytes, and
# keeps nothing: a hint that is lost does no harm, for the follower pulls, or hears the
# next one. Hints of a topic merge, and are paced: the first leaves at once, the next no
# sooner than a small multiple of what that fan-out took. A burst of pushes costs a
# follower few frames, and the loop a share.


HANDFUL = 500  # followers that are told before the loop goes round: some 5 ms
SYNC = "sync:"  # what the engine's topics begin with; clients know it


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
    def wants_items(self) -> bool:
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
            message = self._message(name, data)
            for subscriber in list(topic.followers):
                try:
                    subscriber.message(message)
                except Exception:  # another transport's: it hurts nobody else
                    complain(live_log, "a follower of %s failed", name)

    def _message(self, name: str, data: bytes) -> bytes:
        return self.encode(
            b'{"topic":%b,"data":%b}' % (encode_name(name).encode(), data)
        )

    def notify(self, news: Mapping[str, Hint]) -> None:
        """The arrow, `engine.listen(hub.notify)`: a hint to the followers of each
        scope."""
        for scope, hint in news.items():
            self.hint(f"{SYNC}{scope}", hint)

    def hint(self, name: str, hint: Hint) -> None:
        """Tell of a newer cursor: now, or merged with others when the topic may speak
        again."""
        if (topic := self.topics.get(name)) is None:
            return
        # Two that follow on are one with the items of both; of others only the newer
        # cursor stays.
        older, items, most = topic.pending, hint.items, self.settings.hint_changes
        if older and older.items and items and hint.after == older.cursor:
            both = older.items + items
            if (
                len(items) <= most < len(both)
                and topic.wants_items
                and not topic.speaking
            ):
                self._fan_out(
                    name, topic
                )  # now, while they fit: to pull them would cost more
            else:
                hint = hint._replace(after=older.after, items=both)
        elif older:
            hint = Hint(max(older.cursor, hint.cursor), hint.epoch)
        if hint.items and len(hint.items) > most:
            hint = hint._replace(items=None)
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
        short = long = self._message(name, b'{"cursor":%d}' % topic.cursor)
        changes = b",".join(hint.items or ()) if topic.wants_items else b""
        if 0 < len(changes) <= self.settings.hint_size and hint.cursor == topic.cursor:
            words = hint.cursor, hint.epoch.encode(), hint.after, changes
            whole = b'{"cursor":%d,"epoch":"%b","after":%d,"changes":[%b]}' % words
            long = self._message(name, whole)
        followers, cursor = list(topic.followers.items()), topic.cursor

        def tell_some(start: int) -> None:
            for subscriber, items in followers[start : start + HANDFUL]:
                if subscriber in topic.followers:  # still
                    try:
                        subscriber.hint(name, cursor, long if items else short)
                    except Exception:  # another transport's: it hurts nobody else
                        complain(live_log, "a follower of %s failed", name)
            if start + HANDFUL < len(followers):
                asyncio.get_running_loop().call_soon(tell_some, start + HANDFUL)
                return
            topic.speaking = False
            self.counts["hints_sent"] += len(followers)
            # So hints take a fifth of the loop; or a 17th, where each follower comes
            # and pulls then, which costs more than its frame. More only where hint_gap
            # ends the pause before.
            now, pause = time.monotonic(), 4 if topic.wants_items else 16
            topic.ready = now + min(pause * (now - topic.spoke), self.settings.hint_gap)
            if topic.pending:
                self._plan(name, topic)

        tell_some(0)

    def tell(self, name: str, subscriber: Subscriber, cursor: int = 0) -> None:
        """Send one follower the newest cursor: `cursor`, or one that the topic had
        since."""
        if (topic := self.topics.get(name)) and subscriber in topic.followers:
            topic.cursor = cursor = max(cursor, topic.cursor)
            subscriber.hint(
                name, cursor, self._message(name, b'{"cursor":%d}' % cursor)
            )

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
    "authorization", "content-length", "content-type", "host", "origin", "sec-websocket-key",
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
        buffer, b"\r\n", 0, settings.target_size + 64, 414
    )  # has a limit of its own
    end = find_line(buffer, b"\r\n\r\n", 0, settings.head_size, 431)
    if end < 0:
        return None
    line, *fields = buffer[:end].decode("latin-1").split("\r\n")
    if not (words := _REQUEST_LINE.fullmatch(line)):
        raise InvalidRequest("the request line is not: method, target, HTTP version")
    method, target, major, minor = words.groups()
    version = int(major), min(int(minor), 1)
    if version[0] != 1:
        raise HTTPError(505, "this server speaks HTTP/1.1")
    if len(target) > settings.target_size:
        raise HTTPError(
            414, f"the request target is longer than {settings.target_size} bytes"
        )
    if len(fields) > settings.head_fields:
        raise HTTPError(431, f"the head has more than {settings.head_fields} fields")
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
            self.settings.target_size
        )  # bytes of a line; of the last chunk with its trailers
        while (end := find_line(buffer, b"\r\n", 0, longest, 431)) >= 0:
            if not (digits := _CHUNK_SIZE.fullmatch(buffer[:end].decode("latin-1"))):
                raise InvalidRequest("a chunk does not begin with its size")
            if len(self.body) + (size := int(digits[1], 16)) > self.settings.body_size:
                raise TooLarge(
                    f"the body is longer than {self.settings.body_size} bytes"
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
            if self.framing > self.settings.head_size:
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
        body = encode_json({"code": error.code, "error": str(error)}).encode(
            errors="replace"
        )
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
            head += f"Content-Type: {self.content_type}\r\nContent-Length: {len(self.body)}\r\n"
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
                    settings.head_size if b"\n" in buffer else settings.target_size + 64
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
        if size and size > self.settings.body_size:
            raise TooLarge(f"the body is longer than {self.settings.body_size} bytes")
        if "100-continue" in request.tokens("expect") and request.version >= (1, 1):
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")  # (RFC 9110 §10.1.1)
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
        self.give(self.settings.linger, self.abort)
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
        self._assembler = Assembler(self.settings.message_size)

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
        """Send a message of the application's. Past `session_queue` unsent bytes:
        1013."""
        self.message(
            encode_frame(TEXT, encode_json({"topic": topic, "data": data}).encode())
        )

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
        if unsent + len(message) > self.settings.session_queue:
            self.close(1013, "too slow for a topic that is not merged")
        else:
            self.websocket.write(message)

    def follow(self, topic: str, items: bool = False) -> None:
        """Subscribe. Raises TooLarge past `session_topics`."""
        if (
            topic not in self.topics
            and len(self.topics) >= self.settings.session_topics
        ):
            raise TooLarge(
                f"a session has at most {self.settings.session_topics} topics"
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
        error = {"code": refusal.code, "error": str(refusal), "scope": scope}
        self.send("error", error)


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
        `session_topics`."""
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
        crowded = len(self._connections) >= self.settings.connections

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
            begin, end = self.settings.head_timeout, self.settings.linger
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
            complain(http_log, "failed on %s %s", request.method, request.path)
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
        if len(response.body) > self.settings.gzip_size and request.takes_gzip:
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
                complain(live_log, "the WebSocket at %s failed", websocket.request.path)
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
        values, most = await self._parse(request.body), self.settings.push_mutations
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
        depth, most = self.settings.json_depth, self.settings.max_json_values
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
        if len(self.sessions) >= self.settings.sessions:
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
                error = {
                    "code": "unknown_topic",
                    "error": f"nothing listens to {topic[:100]!r}",
                }
                session.send("error", error)
        except SyncError as refusal:
            code = (
                "invalid_message"
                if isinstance(refusal, InvalidRequest)
                else refusal.code
            )
            session.send("error", {"code": code, "error": str(refusal)})
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
            await asking
            # First follow, then read: no change can fall between the two.
            session.follow(f"{SYNC}{scope}", wish.get("changes") is True)
            self.hub.tell(f"{SYNC}{scope}", session, await self.engine.head(scope))

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
                complain(live_log, "on_auth failed for a session of %r", scope)
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
            complain(live_log, "%s failed", getattr(function, "__name__", function))

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
        self._stopping, unlisten = False, self.engine.listen(self.hub.notify)
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
                self.engine.wake()
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
                        await asyncio.wait(self._tasks, timeout=self.settings.linger)

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
                    complain(http_log, "new clients wait: %s", error, traceback=False)
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
        self.engine.wake()  # who polls is told at once


# --- Todo -----------------------------------------------------------------------------
# The demo, as an application would write it: its tables, its apply, its snapshot.

TODO_SCHEMA = """
    CREATE TABLE IF NOT EXISTS todos (position INTEGER PRIMARY KEY, scope TEXT NOT NULL,
        id TEXT NOT NULL, title TEXT NOT NULL, completed INTEGER NOT NULL, UNIQUE (scope, id));
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
        INSERT INTO todos (scope, id, title, completed) VALUES (:scope, :id, :title, :completed)
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
    if args.keep_changes is not None and args.keep_changes < 1:
        parser.error(
            f"--keep-changes {args.keep_changes}: at least the newest change stays"
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
