"""The fuzzer: malformed, ambiguous and rude clients beside a healthy one, all at once.

    4 workers --seeded cases--> the todo demo (python -X dev) --answers--> the judge
    1 healthy client --push, pull, hints, each within 2 s--^

A case is bytes, and what must come back: of a valid one each status, result and
message; of a broken one a refusal and then the end; of a mutated one only answers that
are well-formed. The broken ones come from hostile.py. Behind each broken request, and
in bodies that are not one, stands a push that nobody may ever see applied. At the end
the server has to be as it was: its log, descriptors, threads, sessions and memory.

By hand: `python .ci/fuzz.py --seconds 600 --seed 1`, on Linux, for /proc. The exit
status is 0 or 1; after a fault the folder with the cases stays. `--case N` sends one
case alone, as it was sent."""

from __future__ import annotations

import argparse
import base64
import gzip
import hashlib
import itertools
import json
import os
import random
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, NamedTuple

import hostile
import trial
from client import (
    CLOSE,
    PATIENCE,
    PING,
    PONG,
    TEXT,
    Ended,
    RawClient,
    Reply,
    masked,
    pieces,
    take_frame,
    take_reply,
)
from trial import Fault, check

HOST = "127.0.0.1"
WORKERS = 4
CHURN = 10_000  # connections that come and go
PROMPT = 2.0  # seconds that a healthy client may wait
# KiB of memory: readers' caches and arenas of threads take 35 MiB, after 90 s as after
# 220.
GROWTH = 48 * 1024
SCOPES = ("a", "b c", "größer \U0001f4a7")
CODES = {
    400: "invalid_request",
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    410: "cursor_unknown",
    413: "too_large",
    414: "uri_too_long",
    415: "unsupported_media_type",
    426: "upgrade_required",
    431: "headers_too_large",
    501: "not_implemented",
    505: "version_not_supported",
}
# Not among them: 408, 500, 503. Nothing here is that slow, and nothing may fail.
REQUIRED_HEADERS = {401: "www-authenticate", 405: "allow", 426: "upgrade"}


class Want(NamedTuple):
    """The answer that one request must get."""

    statuses: tuple[int, ...]
    results: list[str] | None = None  # of a push: of each mutation its code, "" for ok
    no_body: bool = False  # it was HEAD
    closes: bool = False  # nothing behind it may be answered


class Case(NamedTuple):
    """The bytes that are sent, and what must come back."""

    sent: bytes
    # None: it was mutated, and any well-formed answer will do
    wants: list[Want] | None = None
    # on a WebSocket: its pongs, the codes of its errors, the code of its close
    said: list[Any] | None = None


# --- HTTP requests --------------------------------------------------------------------
# Valid ones from a grammar, then broken ones from the catalogue. Only a scope that
# stays small has its snapshot asked for: of one that grows the answers do, and with
# them the memory.

ENDPOINTS = {
    "GET /": 200,
    "GET /sync/client.js": 200,
    "HEAD /sync/client.js": 200,
    "GET /healthz": 200,
    "HEAD /healthz": 200,
    "GET /sync/snapshot?scope=healthy": 200,
    "GET /sync/pull?scope=a&cursor=0&limit=1000": 200,
    "HEAD /sync/pull?scope=a": 200,
    "GET /sync/pull?scope=gr%C3%B6%C3%9Fer+%F0%9F%92%A7&limit=99999999&cursor=0": 200,
    "GET /sync/pull?scope=nobody&wait=0.2": 200,
    "GET /s%79nc/pull?&&x=%00&scope=+": 200,
    "OPTIONS /sync/push": 204,
    "OPTIONS /ws": 204,
}
# Not found where demo.html is not beside the server.
FROM_PAGE = {"GET /", "GET /sync/client.js", "HEAD /sync/client.js"}
ENDPOINTS |= {one.sent.decode(): int(one.expected) for one in hostile.TARGETS.values()}
ODD_FIELDS = (
    *("X-Odd: \xe9\xff", "X-Odd: again", "X-Empty:", "Cookie: a=b; c"),
    *("Connection: keep-alive", "Accept-Encoding: gzip;q=0.5, br"),
    *("Accept-Encoding: gzip;q=0", "TE: trailers", "Via: 1.1 x", "Upgrade: h2c"),
    *("X-HTTP-Method-Override: DELETE", "!#$%&'*+.^_`|~: ::", "X: a\x85Host: x"),
)
BODIES = [*hostile.JSON.values(), *hostile.BODIES.values()]
# None of these is a mutation of the todo demo; where "x" stands, the id comes.
NO_MUTATIONS: list[Any] = [json.loads(one.sent) for one in hostile.MUTATIONS.values()]
NO_MUTATIONS += [
    {"id": "x", "name": "todo.create"},
    {"id": "x", "name": "todo.create", "args": {"id": 1}},
    {"id": "x", "name": "todo.create", "args": {"id": "y", "title": ""}},
    {
        "id": "x",
        "name": "todo.create",
        "args": {"id": "y", "title": "z", "completed": 1},
    },
]
TEXTS = ("milk", '"\\\n\0', "größer \U0001f4a7", "x" * 1000, "\u2028</script>")


def smuggled(tag: str) -> tuple[bytes, bytes]:
    """Return a push that must never be applied: its body, and the whole request."""
    args = {"id": f"of case {tag}", "title": "x"}
    mutation = {"id": tag, "scope": "smuggled", "name": "todo.create", "args": args}
    body = json.dumps([mutation]).encode()
    return body, hostile.assemble(hostile.push_lines(body), body)


def push(source: random.Random, tag: str) -> tuple[bytes, Want]:
    """Return mutations of todos that no other case has, and what becomes of each."""
    scope = source.choice(SCOPES)
    todos: set[str] = set()
    mutations: list[Any] = []
    codes: list[str] = []
    for number in range(source.choice((1, 1, 2, 3, 5, 20, 100))):
        names = ("create", "create", "update", "toggle", "delete", "vanish", "")
        name = source.choice(names)
        key = f"{tag} {number}"
        todo = f"{tag} {source.randrange(3)}"
        if not name:
            mutations.append(with_id(source.choice(NO_MUTATIONS), key))
        else:
            args = {"id": todo, "title": source.choice(TEXTS)}
            mutation = {"id": key, "scope": scope, "name": f"todo.{name}", "args": args}
            mutations.append(mutation)
        if name in ("vanish", ""):
            codes.append("invalid_mutation")
        elif name == "create":
            codes.append("conflict" if todo in todos else "")
            todos.add(todo)
        else:
            codes.append("" if todo in todos else "not_found")
            if name == "delete":
                todos.discard(todo)
    body = json.dumps(mutations, ensure_ascii=source.random() < 0.5).encode()
    return body, Want((200,), codes)


def with_id(value: Any, key: str) -> Any:
    """Return the value with this id, if it has a good one."""
    if not isinstance(value, dict):
        return value
    return {name: key if inner == "x" else inner for name, inner in value.items()}


def wreck(source: random.Random, value: Any) -> Any:
    """Return the same JSON value with a wrong one somewhere inside."""
    if isinstance(value, list) and value and source.random() < 0.8:
        at = source.randrange(len(value))
        return [*value[:at], wreck(source, value[at]), *value[at + 1 :]]
    if isinstance(value, dict) and value and source.random() < 0.8:
        key = source.choice(list(value))
        return value | {source.choice((key, key, "")): wreck(source, value[key])}
    deep = json.loads("[" * 70 + "]" * 70)
    wrong: list[Any] = [None, True, -1, 2**63, 2**64, 1e308, float("nan")]
    wrong += ["", "\ud800", "\0", "x" * 300]
    wrong += [[], {}, deep, [value], {"id": value}, str(value), [None] * 101]
    return source.choice(wrong)


def chunked(source: random.Random, body: bytes) -> bytes:
    """Return the body in any chunks, with everything that the grammar has."""
    made, extensions = b"", ("", ";a", ' ;a="b;c"', "\t; a=b ;c", ';a="\xe9"')
    while body:
        size = min(len(body), source.choice((1, 7, 100, 5000)) + len(body) // 9)
        number = f"{size:{source.choice(('x', 'X', '06x'))}}"
        line = f"{number}{source.choice(extensions)}\r\n"
        made += line.encode("latin-1") + body[:size] + b"\r\n"
        body = body[size:]
    trailers = (
        "",
        "Content-Length: 5\r\n",
        "Host: x\r\nX-Sum: y\r\nTransfer-Encoding: z\r\n",
    )
    return made + f"0\r\n{source.choice(trailers)}\r\n".encode()


def request(
    source: random.Random, tag: str, last: bool, wild: bool
) -> tuple[bytes, Want]:
    """Return a valid request, and what must answer it; a wild one is to be mutated."""
    fields = [source.choice(("Host: localhost", f"Host: {HOST}:1"))]
    if source.random() < 0.5:
        line = "POST /sync/push"
        body, want = push_body(source, tag)
        kinds = (
            "Content-Type: application/json",
            "content-type:\tAPPLICATION/Json ; charset=utf-8 ",
        )
        fields.append(source.choice(kinds))
    else:
        line, status = source.choice(list(ENDPOINTS.items()))
        while wild and ("HEAD" in line or "wait" in line):  # who could tell their end?
            line, status = source.choice(list(ENDPOINTS.items()))
        statuses = (status, 404) if line in FROM_PAGE else (status,)
        want = Want(statuses, no_body="HEAD" in line)
        body = b""
        if source.random() < 0.3 and status not in (404, 426) and not wild:
            _, body = smuggled(tag)
    fields += source.sample(ODD_FIELDS, source.choice((0, 0, 1, 3, 12)))
    version = source.choice(("1.1", "1.1", "1.7"))
    if last:
        fields = [field for field in fields if "keep-alive" not in field]
        fields.append("Connection: x,, Close")
        version = source.choice((version, version, "1.0"))
    if source.random() < 0.2 and " /" in line and len(line) < 1000:
        line = line.replace(" /", " http://localhost:99999/")
    if body and source.random() < 0.3:
        fields.append("Expect: 100-Continue")
    if body and version != "1.0" and source.random() < 0.5:
        fields.append("Transfer-Encoding: Chunked")
        body = chunked(source, body)
    elif body or source.random() < 0.1:
        fields.append(f"Content-Length: {len(body):03}")
    source.shuffle(fields)
    head = "\r\n".join((f"{line} HTTP/{version}", *fields, "", "")).encode("latin-1")
    return source.choice((b"", b"", b"\r\n", b"\r\n\r\n")) + head + body, want


def push_body(source: random.Random, tag: str) -> tuple[bytes, Want]:
    """Return the body of a push, which may be hostile, and what must answer it."""
    body, want = push(source, tag)
    kind = source.random()
    if kind < 0.3:
        one = source.choice(BODIES)
        return one.sent, Want((int(one.expected),))
    if kind < 0.6:
        value = wreck(source, json.loads(body))
        text = json.dumps(value, ensure_ascii=source.random() < 0.5)
        return text.encode(errors="surrogatepass"), Want((200, 400, 413))
    return body, want


def broken(source: random.Random, tag: str) -> tuple[bytes, Want]:
    """Return a push that must be refused for its framing or its place.

    The refusal must end the connection.
    """
    body, _ = smuggled(tag)
    table, build = source.choice(list(hostile.PLACES.values()))
    one = source.choice(list(table.values()))
    if build is hostile.with_field:
        sent = build(one.sent, body, at=source.randint(1, 4))
    elif build is hostile.with_line_end:
        sent = build(one.sent, body, at=source.randint(1, 5))
    else:
        sent = build(one.sent, body)
    return sent, refusal(one)


def refusal(one: hostile.Hostile) -> Want:
    """Return the refusal that must end the connection."""
    any_refusal = one.expected == hostile.REFUSED
    statuses = tuple(CODES) if any_refusal else (int(one.expected),)
    return Want(statuses, no_body=one.sent.startswith(b"HEAD "), closes=True)


# --- WebSocket ------------------------------------------------------------------------
# Conversations that are valid, then violations from the catalogue.

SUBSCRIPTIONS = (
    '{"topic":"subscribe"}',
    '{"topic":"subscribe","data":{"changes":true}}',
    '{"topic":"unsubscribe","data":{}}',
    '{"topic":"subscribe","data":{"scope":"größer"}}',
)
# The todo demo refuses a WebSocket without a scope.
WITHOUT_SCOPE = (
    hostile.UPGRADE.replace(b"?scope=a", b""),
    hostile.UPGRADE.replace(b"scope=a", b"Scope=a"),
)
HANDSHAKES = [(one.sent, int(one.expected)) for one in hostile.HANDSHAKES.values()]
HANDSHAKES += [(sent, 401) for sent in WITHOUT_SCOPE]


def handshake(scope: str) -> bytes:
    """Return a handshake for this scope, as an address spells it."""
    return hostile.UPGRADE.replace(b"scope=a", b"scope=" + scope.encode())


def talk(source: random.Random, tag: str, wild: bool) -> tuple[bytes, list[Any]]:
    """Return a session from its handshake to its end, which may be a violation."""
    sent = handshake(f"ws+{tag.replace(' ', '+')}")
    said: list[Any] = []
    for _ in range(source.choice((0, 1, 2, 5, 30))):
        message, code = choose_message(source, wild)
        opcode = TEXT
        # cut anywhere, also within a character
        cuts = [
            source.randint(0, len(message)) for _ in range(source.choice((0, 0, 1, 4)))
        ]
        *fragments, end = pieces(message, cuts)
        for fragment in fragments:
            sent += masked(opcode, fragment, False, source.randbytes(4))
            opcode = 0
            if source.random() < 0.2:
                sent += ping(source, said)
        sent += masked(opcode, end, True, source.randbytes(4))
        if code:
            said.append(code)
        if source.random() < 0.2:
            sent += ping(source, said)
    match source.randrange(3):
        case 0:  # the same code comes back
            ending = source.choice((1000, 1001, 1003, 1011, 1014, 3000, 4999))
            reason = "größer".encode() * source.choice((0, 1, 15))
            payload = struct.pack(">H", ending) + reason
            sent += masked(CLOSE, payload, key=source.randbytes(4))
            said.append(ending)
        case 1:
            violation = source.choice(list(hostile.FRAMES.values()))
            sent += violation.sent
            said.append(violation.expected)
        case _:
            return sent, said
    if not wild:
        sent += smuggled(tag)[1]
    return sent + masked(PING, b"too late"), said


def choose_message(source: random.Random, wild: bool) -> tuple[bytes, int | str]:
    """Return a message, and the code of the error that answers it, or ""."""
    if wild and source.random() < 0.5:
        value = wreck(source, {"topic": "subscribe", "data": {"scope": "x"}})
        return json.dumps(value).encode(), ""
    if source.random() < 0.4:
        return source.choice(SUBSCRIPTIONS).encode(), ""
    one = source.choice(list(hostile.MESSAGES.values()))
    return one.sent, one.expected


def ping(source: random.Random, said: list[Any]) -> bytes:
    """Return a pong that nobody asked for, and a ping, whose payload comes back."""
    payload = source.randbytes(source.choice((0, 5, 125)))
    said.append(payload)
    return masked(PONG, payload) + masked(PING, payload, key=source.randbytes(4))


# --- Cases ----------------------------------------------------------------------------


def mutate(source: random.Random, data: bytes) -> bytes:
    """Return the data with a few changes: bytes that are others, lost, twice, new."""
    for _ in range(source.choice((1, 1, 2, 3, 8))):
        at = source.randrange(source.choice((len(data), min(len(data), 300))) + 1)
        size = source.choice((1, 1, 4, 30))
        before, here, behind = data[:at], data[at : at + size], data[at + size :]
        match source.randrange(6):
            case 0:
                data = before + source.randbytes(size) + behind
            case 1:
                data = before + behind
            case 2:
                data = before + source.choice(hostile.FRAGMENTS) + here + behind
            case 3:
                data = before + here * 2 + behind
            case 4 if here:
                flipped = here[0] ^ 1 << source.randrange(8)
                data = before + bytes([flipped]) + here[1:] + behind
            case _:  # lines lost, twice, elsewhere
                lines = data.split(b"\r\n")
                line = lines.pop(source.randrange(len(lines)))
                for _ in range(source.randrange(3)):
                    lines.insert(source.randint(0, len(lines)), line)
                data = b"\r\n".join(lines)
    return data


def make(source: random.Random, tag: str) -> Case:
    """Return several requests, all valid but for the last; or a WebSocket."""
    kind, wild = source.random(), source.random() < 0.3
    if wild:
        tag = f"wild {tag}"  # no flip of a bit makes it another case's
    if kind < 0.3:
        sent, said = talk(source, tag, wild)
        if not wild:
            return Case(sent, [Want((101,))], said)
        head_too = source.random() < 0.2  # mostly frames alone are mutated
        at = 0 if head_too else sent.index(b"\r\n\r\n") + 4
        return Case(sent[:at] + mutate(source, sent[at:]))
    if kind < 0.33:
        sent, status = source.choice(HANDSHAKES)
        return Case(sent, [Want((status,))])
    sent = b""
    wants: list[Want] = []
    last = source.choice((0, 0, 1, 2, 4))
    for number in range(last + 1):
        if number == last and source.random() < 0.5 and not wild:
            raw, want = broken(source, tag)
            raw += smuggled(tag)[1]
            raw += b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
        else:
            raw, want = request(source, f"{tag}.{number}", number == last, wild)
        sent += raw
        wants.append(want)
    return Case(mutate(source, sent)) if wild else Case(sent, wants)


def catalogue() -> Iterator[tuple[str, Case]]:
    """Yield a case for each entry of the catalogue, as it stands."""
    body, behind = smuggled("catalogue")
    for name, one in hostile.requests(body).items():
        yield name, Case(one.sent + behind, [refusal(one)])
    queries = {one.sent.decode(): int(one.expected) for one in hostile.QUERIES.values()}
    for target, status in (ENDPOINTS | queries).items():
        statuses = (status, 404) if target in FROM_PAGE else (status,)
        want = Want(statuses, no_body="HEAD" in target)
        line = f"{target} HTTP/1.1".encode()
        yield target, Case(hostile.assemble([line, hostile.HOST], b""), [want])
    for name, one in (*hostile.JSON.items(), *hostile.BODIES.items()):
        sent = hostile.assemble(hostile.push_lines(one.sent), one.sent)
        yield name, Case(sent, [Want((int(one.expected),))])
    for name, one in hostile.MUTATIONS.items():
        body = b"[%b]" % one.sent
        sent = hostile.assemble(hostile.push_lines(body), body)
        yield name, Case(sent, [Want((200,), [str(one.expected)])])
    for sent, status in HANDSHAKES:
        yield f"handshake {status}", Case(sent, [Want((status,))])
    begin = handshake("catalogue")
    for name, one in hostile.FRAMES.items():
        yield name, Case(begin + one.sent, [Want((101,))], [one.expected])
    for name, one in hostile.NOT_UTF_8.items():
        sent = begin + hostile.frame(hostile.TEXT, one.sent + b"x")
        yield name, Case(sent, [Want((101,))], [one.expected])
    for name, one in hostile.MESSAGES.items():
        sent = begin + masked(TEXT, one.sent)
        yield name, Case(sent, [Want((101,))], [one.expected])


# --- Judge ----------------------------------------------------------------------------
# The client reads the answers by the letter of the RFCs; here is what this server owes.


def judge(case: Case, got: bytearray, whole: bool) -> None:
    """Raise Fault for a wrong answer.

    Of a case that was not sent whole, each answer may be missing, or a 400.
    """
    number, over, wants = 0, False, case.wants
    while got:
        check(not over, "there is something behind an answer that closes:", got)
        check(wants is None or number < len(wants), "an answer too many:", got)
        want = wants[number] if wants else None
        no_body = bool(want and want.no_body)
        reply = take_reply(got, bodiless=no_body)
        if reply is None:
            raise Fault(f"half an answer: {bytes(got[:1000])!r}")
        if reply.headers.get("content-encoding") == "gzip" and not no_body:
            reply = reply._replace(body=gzip.decompress(reply.body))
        status = reply.status
        if status == 100:
            continue
        judge_reply(reply, no_body, case.sent)
        over = "close" in reply.headers.get("connection", "")
        number += 1
        if status == 101:
            check(want is None or 101 in want.statuses, "an upgrade, but not", want)
            judge_frames(case, got, whole)
            got = bytearray()
        if want and status not in want.statuses:
            was_cut = not whole and over and status == 400
            check(was_cut, "answered", status, "and not", want.statuses, reply.body)
        elif want:
            check(over or not want.closes, "refused, and goes on:", reply)
            if want.results:
                codes = [result.get("code", "") for result in reply.json]
                check(codes == want.results, "results:", codes, "and not", want.results)
    complete = not whole or wants is None or number == len(wants)
    check(complete, "only", number, "answers of", wants)


GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455 §1.3


def judge_reply(reply: Reply, no_body: bool, sent: bytes) -> None:
    """Raise Fault for a reply that the protocol does not allow.

    `sent` may have been mutated in the key of a handshake, and still be a good one.
    """
    status, headers, body = reply
    date = headers["date"]
    age = time.time() - parsedate_to_datetime(date).timestamp()
    check(-5 < age < PATIENCE + 5 and date.endswith(" GMT"), "the date:", date)
    is_client = "javascript" in headers.get("content-type", "")
    caching = "no-cache" if is_client else "no-store"
    check(headers.get("cache-control") == caching, "wrongly stored:", headers)
    if status == 101:
        keys = re.findall(rb"(?i)sec-websocket-key:[ \t]*(\S+)", sent)
        digests = [hashlib.sha1(key + GUID).digest() for key in keys]
        answers = [base64.b64encode(digest).decode() for digest in digests]
        is_right = headers["sec-websocket-accept"] in answers
        check(is_right, "the key's answer:", headers)
    if status in (101, 204):
        check("content-type" not in headers, "a body of none:", headers)
        return
    known = status == 200 or status in CODES
    check(known, "an answer that nothing here should get:", reply)
    if status in REQUIRED_HEADERS:
        check(REQUIRED_HEADERS[status] in headers, "a header is missing:", headers)
    if headers["content-type"] == "application/json" and not no_body:
        value = json.loads(body.decode(), parse_constant=refuse_constant)
        if status != 200:
            check(list(value) == ["code", "error"], "not an error's fields:", body)
            right = value["code"] == CODES[status] and value["error"]
            check(right, "not of", status, body)


def refuse_constant(word: str) -> None:
    """Raise Fault for NaN and the infinities, which are no JSON."""
    raise Fault(f"JSON: {word}")


def judge_frames(case: Case, got: bytearray, whole: bool) -> None:
    """Raise Fault for frames that the protocol does not allow, or that are others."""
    said: list[Any] = []  # pongs, codes of errors, the code of the close
    while got:
        is_over = said and isinstance(said[-1], int)
        check(not is_over, "there is something behind a close:", got)
        frame = take_frame(got)
        if frame is None:
            raise Fault(f"half a frame: {bytes(got[:1000])!r}")
        opcode, payload, fin = frame
        known = opcode in (TEXT, CLOSE, PING, PONG)
        check(fin and known, "no frame of this server:", frame)
        if opcode == CLOSE:
            code = int.from_bytes(payload[:2], "big") if payload else 1005
            payload[2:].decode()
            check(1000 <= code < 1015 or 3000 <= code < 5000, "a close with", payload)
            # An echo of 1011 has no reason.
            is_echo = code != 1011 or payload[2:] == b""
            check(is_echo, "the server failed:", payload)
            said.append(code)
        elif opcode == PONG:
            said.append(payload)
        elif opcode == TEXT:
            message = json.loads(payload.decode())
            check(list(message) == ["topic", "data"], "no message:", payload)
            data = message["data"]
            if message["topic"] == "error":
                check(list(data) == ["code", "error"], "no error:", payload)
                said.append(data["code"])
            else:
                is_hint = message["topic"].startswith("sync:")
                check(is_hint, "no topic of ours:", payload)
                check(isinstance(data["cursor"], int), "no hint:", payload)
    if case.said is not None:
        wanted = case.said if whole else case.said[: len(said)]
        pairs = enumerate(itertools.zip_longest(said, wanted))
        others = [pair for pair in pairs if pair[1][0] != pair[1][1]]
        check(said == wanted, "said, and not:", others)


# --- Clients --------------------------------------------------------------------------


def deliver(
    source: random.Random, case: Case, port: int, manner: str
) -> RawClient | None:
    """Send a case in some pieces and a manner; return a client that is never read.

    Raise Fault for what came, or did not.
    """
    sent = case.sent
    if manner == "cut":
        sent = sent[: source.randrange(len(sent) + 1)]
    cuts = [source.randint(0, len(sent)) for _ in range(source.choice((0, 0, 1, 3, 9)))]
    if source.random() < 0.05:  # byte by byte
        cuts += range(min(len(sent), 60))
    if source.random() < 0.05:  # each way of cutting the end of a head
        end = sent.find(b"\r\n\r\n")
        cuts += [at for at in range(end - 3, end + 6) if 0 <= at <= len(sent)]
    pause = source.choice((0.0, 0.0005, 0.01))
    client = RawClient((HOST, port))
    with suppress(OSError):  # a client that is refused may be cut off while it sends
        for piece in pieces(sent, cuts):
            client.send(piece)
            time.sleep(pause)
        # Without a half-close it is seen whether the server ends by itself.
        closes = case.wants and (case.wants[-1].closes or b"x,, Close" in case.sent)
        if not closes or manner == "cut" or source.random() < 0.5:
            client.half_close()
    match manner:
        case "hold":
            return client
        case "reset":
            client.reset()
            return None
        case "close":
            client.close()
            return None
    got = b""
    try:
        # After a reset, what is missing is seen.
        with closing(client), suppress(Ended, ConnectionResetError):
            while True:
                client.fill()
        got = bytes(client.buffer)
        judge(case, client.buffer, whole=manner != "cut")
    except Exception as error:  # a timeout, and what can't be read as what it should be
        what = error if isinstance(error, Fault) else traceback.format_exc()
        got = got or bytes(client.buffer)
        raise Fault(f"{what}\n  got ({manner}): {got[:1500]!r}") from None
    return None


class Healthy(threading.Thread):
    """A client that changes one todo, pulls, and follows, whatever the others do."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self.over = threading.Event()
        self.fault = ""
        self.worst = Counter[str]()  # ms, by what took them
        self.log: list[Any] = []
        self.http = RawClient((HOST, port))
        self.live = RawClient((HOST, port))
        reply = self.live.upgrade("/ws?scope=healthy")
        check(reply.status == 101, "no upgrade:", reply)
        self.live.send_message("subscribe", {})

    def run(self) -> None:
        try:
            while not self.over.wait(0.02):
                self.step()
        except Exception:
            self.fault = f"the healthy client: {traceback.format_exc()}"

    def ask(self, target: str, body: Any = None) -> Any:
        """Return the answer's JSON."""
        if body is None:
            return self.http.request("GET", target).json
        return self.http.request("POST", target, json.dumps(body).encode()).json

    def timed(self, what: str, call: Callable[[], Any]) -> Any:
        """Return what the call returns; raise Fault if that took too long."""
        start = time.monotonic()
        result = call()
        took = int(1000 * (time.monotonic() - start))
        self.worst[what] = max(self.worst[what], took)
        check(took < 1000 * PROMPT, what, "took", took, "ms")
        return result

    def step(self) -> None:
        """Push, pull what came of it, and wait for the hint."""
        number = len(self.log)
        known = self.log[-1]["cursor"] if self.log else 0
        mutation = {
            "id": f"n {number}",
            "scope": "healthy",
            "name": "todo.update" if number else "todo.create",
            "args": {"id": "x", "title": f"n {number}"},
        }
        [result] = self.timed("push", lambda: self.ask("/sync/push", [mutation]))
        check(result["ok"] and len(result["changes"]) == 1, "its push:", result)
        target = f"/sync/pull?scope=healthy&cursor={known}"
        page = self.timed("pull", lambda: self.ask(target))
        same = page["changes"] == result["changes"]
        check(same, "its pull:", page, "and not", result)
        self.log += page["changes"]
        self.timed("hint", lambda: self.hear(result["cursor"]))

    def hear(self, cursor: int) -> None:
        """Wait for a hint of this cursor, or of a later one."""
        while self.live.read_message()["data"]["cursor"] < cursor:
            pass

    def pull(self, scope: str) -> list[Any]:
        """Return all the changes of a scope."""
        changes: list[Any] = []
        while True:
            after = changes[-1]["cursor"] if changes else 0
            page = self.ask(f"/sync/pull?scope={scope}&limit=1000&cursor={after}")
            changes += page["changes"]
            if not page["hasMore"]:
                return changes


# --- Fuzz -----------------------------------------------------------------------------


class Fuzz:
    """One run: a server, the workers, and what was found."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args = args
        self.folder = folder
        self.counts = Counter[str]()
        self.faults: list[str] = []
        self.numbers = itertools.count(1)
        self.started, self.told = time.monotonic(), 0.0
        self.stderr = folder / "stderr"
        command = [sys.executable, "-X", "dev", args.server, "--port", "0", "--db"]
        env = {
            name: value
            for name, value in os.environ.items()
            if name != "MIZUSYNC_TOKEN"
        }
        with self.stderr.open("w") as stderr:
            pipes: Any = {"stdout": subprocess.PIPE, "stderr": stderr, "text": True}
            self.popen = subprocess.Popen(
                [*command, str(folder / "fuzz.db")], env=env, **pipes
            )
        line = self.popen.stdout.readline() if self.popen.stdout else ""
        found = re.search(r":([0-9]+)/ ", line)
        check(found, "it never listened:", self.stderr.read_text())
        self.port = int(found[1]) if found else 0

    def run(self) -> None:
        try:
            if self.args.case:
                return self.try_case(self.args.case, deque())
            healthy = Healthy(self.port)
            healthy.start()
            self.try_catalogue()
            # Pages of SQLite, threads, arenas: what is held for good is held after a
            # while.
            warm = min(30.0, self.args.seconds / 4)
            self.mix(warm, healthy)
            before = self.settle({})
            self.mix(self.args.seconds - warm, healthy)
            self.settle(before)
            self.churn(healthy)
            after = self.settle(before)
            grown = after["VmRSS"] - before["VmRSS"]
            print(f"memory grew by {grown} KiB")
            if grown > GROWTH:
                self.fail("memory grew by", grown, "KiB")
            self.finish(healthy)
        finally:
            self.popen.kill()
            self.popen.wait()

    def fail(self, *sentence: object) -> None:
        self.faults.append(fault := " ".join(map(str, sentence)))
        print("FAULT:", fault, file=sys.stderr, flush=True)

    def try_case(self, number: int, held: deque[RawClient]) -> None:
        """Make and send the case of this number."""
        source = random.Random(f"{self.args.seed} {number}")
        case = make(source, str(number))
        manners = ("read", "cut", "reset", "close", "hold")
        [manner] = source.choices(manners, (80, 8, 4, 4, 2))
        client = self.send(f"case {number}", source, case, manner)
        if client:
            held.append(client)
        if len(held) > 20:
            held.popleft().reset()
        self.counts["cases"] += 1

    def try_catalogue(self) -> None:
        """Send each entry of the catalogue once."""

        def send(entry: tuple[str, Case]) -> None:
            name, case = entry
            source = random.Random(f"{self.args.seed} {name}")
            self.send(name, source, case, "read")

        with ThreadPoolExecutor(WORKERS) as pool:
            entries = list(catalogue())
            list(pool.map(send, entries))
        self.counts["entries of the catalogue"] = len(entries)

    def send(
        self, name: str, source: random.Random, case: Case, manner: str
    ) -> RawClient | None:
        """Deliver a case; note a fault, and keep the bytes then."""
        try:
            return deliver(source, case, self.port, manner)
        except Exception as error:
            file = re.sub("[^a-z0-9]+", "-", name.lower())
            (self.folder / file).write_bytes(case.sent)
            what = error if isinstance(error, Fault) else traceback.format_exc()
            where = f"seed {self.args.seed}, {name}, {len(case.sent)} bytes"
            self.fail(f"{what}\n  {where}: {case.sent[:1500]!r}")
            return None

    def mix(self, seconds: float, healthy: Healthy) -> None:
        """Run all workers at once, for so long, or until there are enough faults."""
        end = time.monotonic() + seconds

        def work() -> None:
            held: deque[RawClient] = deque()
            try:
                while time.monotonic() < end and not self.is_red(healthy):
                    self.try_case(next(self.numbers), held)
                    time.sleep(0.002)  # a shared machine
            except Exception:  # a fault of the fuzzer's own; nobody else would see it
                self.fail(traceback.format_exc())
            for client in held:
                client.reset()

        workers = [threading.Thread(target=work, daemon=True) for _ in range(WORKERS)]
        for worker in workers:
            worker.start()
        while any(worker.is_alive() for worker in workers):
            time.sleep(0.1)
            self.tell(healthy)

    def churn(self, healthy: Healthy) -> None:
        """Let clients come and go in every rude way, at any point of what they do."""
        source, held = random.Random(self.args.seed), deque[RawClient]()
        greeting = handshake("healthy")
        subscribe = b'{"topic":"subscribe","data":{"changes":true}}'
        greeting += masked(TEXT, subscribe)
        parts = (
            b"",
            greeting,
            greeting * 2,
            smuggled("churn")[1][:-1],
            b"GET / HTTP/1.1\r\n",
        )
        floods = (
            b"GET /nothing HTTP/1.1\r\nHost: localhost\r\n\r\n" * 5000,
            greeting + masked(TEXT, b"[]") * 9000,
            greeting + masked(PING, bytes(125)) * 9000,
        )
        while self.counts["churned"] < self.args.churn and not self.is_red(healthy):
            # Now and then much to answer, for somebody who reads nothing.
            part = source.choice(floods if source.random() < 0.01 else parts)
            size = source.choice((len(part), source.randint(0, len(part))))
            with suppress(OSError):
                client = RawClient((HOST, self.port))
                held.append(client)
                client.sock.settimeout(0.2)
                client.send(part[:size])
                if source.random() < 0.3:
                    how = source.choice((socket.SHUT_WR, socket.SHUT_RDWR))
                    client.sock.shutdown(how)
                if source.random() < 0.3:
                    client.sock.settimeout(0.01)
                    client.sock.recv(source.choice((1, 1000)))
            while len(held) > source.choice((0, 0, 100)):
                leave = source.choice((RawClient.reset, RawClient.close))
                leave(held.popleft())
            self.counts["churned"] += 1
            self.tell(healthy)

    def is_red(self, healthy: Healthy) -> bool:
        """Return whether there are enough faults to stop."""
        return len(self.faults) >= 10 or bool(healthy.fault)

    def settle(self, before: dict[str, int]) -> dict[str, int]:
        """Return what the server holds once it is quiet.

        It is a fault if that is more than before, or another session than the healthy
        client's.
        """
        proc = Path(f"/proc/{self.popen.pid}")
        # It still handles what a flood has sent: thousands of messages, one a turn.
        deadline = time.monotonic() + 5 * PATIENCE
        time.sleep(3)  # longer than it lingers
        while True:
            lines = (proc / "status").read_text().splitlines()
            status = dict(line.split(":\t") for line in lines)
            now = {name: int(status[name].split()[0]) for name in ("VmRSS", "Threads")}
            with closing(RawClient((HOST, self.port))) as client:
                now["sessions"] = client.request("GET", "/healthz").json["sessions"]
            now["descriptors"] = len(list((proc / "fd").iterdir()))
            # Its readers and their connections come as they are needed: four of each.
            spare = {"sessions": 0, "Threads": 4, "descriptors": 8}
            more = {
                name: now[name] > before.get(name, now[name]) + n
                for name, n in spare.items()
            }
            kept = now["sessions"] == 1 and not any(more.values())
            if kept or time.monotonic() > deadline:
                break
            time.sleep(0.2)
        print(
            f"{time.monotonic() - self.started:4.0f} s: quiet, it holds {now}",
            flush=True,
        )
        if not kept:
            self.fail("a leak:", before, now)
        return now

    def tell(self, healthy: Healthy, now: bool = False) -> None:
        if (seconds := time.monotonic() - self.started) > self.told + 10 or now:
            self.told = seconds
            counts = ", ".join(
                f"{count} {what}" for what, count in sorted(self.counts.items())
            )
            worst = ", ".join(
                f"{what} {ms} ms" for what, ms in sorted(healthy.worst.items())
            )
            line = f"{counts}; healthy: {len(healthy.log)} changes, at worst {worst}"
            print(f"{seconds:4.0f} s: {line}; {len(self.faults)} faults", flush=True)

    def finish(self, healthy: Healthy) -> None:
        healthy.over.set()
        healthy.join()
        self.tell(healthy, now=True)
        if healthy.fault:
            return self.fail(healthy.fault)
        if seen := healthy.pull("smuggled"):
            self.fail("applied, and should not be:", seen[:5])
        if healthy.pull("healthy") != healthy.log or len(healthy.log) < 10:
            self.fail("the healthy client's log is another")
        self.popen.terminate()
        if (status := self.popen.wait(PATIENCE)) != 0:
            self.fail("SIGTERM: exit status", status)
        signs = (
            r"Traceback| ERROR |never (retr|await)|was destroyed|socket\.send"
            r"|[a-z]Warning"
        )
        lines = self.stderr.read_text().splitlines()
        if complaints := [line for line in lines if re.search(signs, line)]:
            self.fail(
                "the server complains,", len(complaints), "times:", complaints[:5]
            )
        slow = sum(
            "Executing" in line for line in lines
        )  # asyncio's debug mode, on a slow machine
        print(f"stderr: {len(lines)} lines, {slow} of them on slow steps of the loop")
        return None


def main() -> int:
    parser = trial.options("Send mizusync what no client should, and look.")
    add = parser.add_argument
    add("--case", type=int, help="send this case alone")
    add("--churn", type=int, default=CHURN, help="connections at the end (%(default)s)")
    args = parser.parse_args()

    def work(folder: Path) -> None:
        fuzz = Fuzz(args, folder)
        fuzz.run()
        check(not fuzz.faults, "of those above there are", len(fuzz.faults))

    return trial.run("fuzz", work)


if __name__ == "__main__":
    sys.exit(main())
