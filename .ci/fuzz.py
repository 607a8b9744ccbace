"""The fuzzer: malformed, ambiguous and rude clients, all at once, and one healthy one
among them.

    4 workers --seeded cases--> the todo demo (python -X dev) --answers--> what must be
    true of them 1 healthy client --push, pull, hints, each within 2 s--^

A case is bytes, and what must come back: of a valid one each status, result and
message; of a broken one a refusal and then the end; of a mutated one only answers that
are well-formed. Behind each broken request, and in bodies that are not one, stands a
push that nobody may ever see applied. At the end the server has to be as it was: its
log, descriptors, threads, sessions and memory.

By hand: `python .ci/fuzz.py --seconds 600 --seed 1`, on Linux, for /proc. The exit
status is 0 or 1; after a fault the folder with the cases stays. `--case N` sends one
case alone, as it was sent."""

from __future__ import annotations

import argparse
import gzip
import http.client
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
from collections.abc import Callable, Sequence
from contextlib import suppress
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import trial
from trial import Fault, check

HOST, WORKERS, CHURN = "127.0.0.1", 4, 10_000
PATIENCE, PROMPT = (
    20.0,
    2.0,
)  # seconds: until an end counts as never; what a healthy client waits
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
T = TypeVar("T")


class Want(NamedTuple):
    """What must answer one request."""

    statuses: tuple[int, ...]
    results: list[str] | None = None  # of a push: of each mutation its code, "" for ok
    no_body: bool = False  # it was HEAD
    closes: bool = False  # nothing behind it may be answered


class Case(NamedTuple):
    sent: bytes
    wants: list[Want] | None = (
        None  # None: it was mutated, and anything well-formed will do
    )
    said: list[Any] | None = (
        None  # on a WebSocket: its pongs and the codes of its errors; its end
    )


# --- HTTP requests --------------------------------------------------------------------
# Valid ones, from a grammar; then the catalogue of what RFC 9112 calls malformed or
# ambiguous. The tables are by the status that must answer. Only a scope that stays
# small has its snapshot asked for: of one that grows the answers do, and with them the
# memory.

ENDPOINTS = {
    200: ("GET /", "GET /healthz", "HEAD /healthz", "GET /sync/snapshot?scope=healthy",
          "GET /sync/pull?scope=a&cursor=0&limit=1000", "HEAD /sync/pull?scope=a",
          "GET /sync/pull?scope=gr%C3%B6%C3%9Fer+%F0%9F%92%A7&limit=99999999&cursor=0",
          "GET /sync/pull?scope=nobody&wait=0.2", "GET /s%79nc/pull?&&x=%00&scope=+"),
    204: ("OPTIONS *", "OPTIONS /sync/push", "OPTIONS /ws"),
    400: ("GET /sync/pull?cursor=9007199254740992", "GET /sync/pull?limit=0",
          "GET /sync/pull?cursor=-1", "GET /sync/pull?limit=%D9%A3",
          "GET /sync/pull?wait=1e3", "GET /sync/pull?wait=nan",
          "GET /sync/pull?scope=%ff", "GET /sync/pull?scope=%ED%A0%80",
          "GET /sync/pull?scope=%2", "GET /sync/pull?scope=a&scope=a",
          "GET /sync/snapshot?scope=", f"GET /sync/snapshot?scope={'x' * 257}",
          f"GET /sync/pull?cursor={'9' * 7000}"),
    404: ("GET /nothing", "GET //", "GET /%00%F0%9F%92%A7", f"PRI /{'x' * 8190}",
          "GET /../ws"),
    405: ("GET /sync/push", "DELETE /sync/pull", "get /healthz", "POST /ws"),
    410: ("GET /sync/pull?cursor=9007199254740991", "GET /sync/pull?cursor=1&epoch=x"),
    415: ("POST /sync/push",),
    426: ("GET /ws?scope=a",),
}  # fmt: skip
ODD_FIELDS = (
    "X-Odd: \xe9\xff", "X-Odd: again", "X-Empty:", "Cookie: a=b; c",
    "Connection: keep-alive", "Accept-Encoding: gzip;q=0.5, br",
    "Accept-Encoding: gzip;q=0", "TE: trailers", "Via: 1.1 x", "Upgrade: h2c",
    "X-HTTP-Method-Override: DELETE", "!#$%&'*+.^_`|~: ::", "X: a\x85Host: x",
)  # fmt: skip
NO_MUTATIONS: Sequence[Any] = (
    None, 5, "x", [], {}, {"id": 5, "name": "x"}, {"id": "", "name": "x"},
    {"id": "x", "name": []}, {"id": "x" * 129, "name": "x"},
    {"id": "x", "name": "x", "scope": ""}, {"id": "x", "name": "todo.create"},
    {"id": "x", "name": "todo.create", "args": {"id": 1}},
    {"id": "x", "name": "todo.create", "args": {"id": "y", "title": ""}},
    {"id": "x", "name": "todo.create",
     "args": {"id": "y", "title": "z", "completed": 1}},
)  # fmt: skip
TEXTS = ("milk", '"\\\n\0', "größer \U0001f4a7", "x" * 1000, "\u2028</script>")
BODIES = {
    200: (b'["\\ud83d\\udca7"]', b"[-9223372036854775809]", b"[" * 64 + b"]" * 64,
          b'["' + b"\\" * (2**20 - 4) + b'"]', b'["' + b"[" * (2**20 - 4) + b'"]',
          b"[5" + b" " * (2**20 - 3) + b"]",
          b'[{"id":1,"id":"TAG","name":"todo.create",'
          b'"args":{"id":"TAG","title":"x"}}]'),
    400: (b"{}", b"[]", b"[{}", b"[{},]", b"\xef\xbb\xbf[{}]", b"[{}]\0", b"['x']",
          b'["\xff"]', "[5]".encode("utf-16"), b'["\xed\xa0\x80"]', b'["\\ud800"]',
          b'["\\udc00\\ud800"]', b"[NaN]", b"[-Infinity]", b"[1e999]", b"[01]",
          b'["\n"]', b"[" + b"9" * 500_000 + b"]", b"[" * 65 + b"]" * 65,
          b'[{"x":' * 2**15, b"[]" * 2**16, b'"' * 2**20,
          b"[" * 99_999 + b"]" * 99_999),
    413: (b"[" + b"5," * 100 + b"5]", b"[" * 2**20, b'[{"x":' * 2**17, b"[]" * 2**19,
          b"[" + b"5," * 500_000 + b"5]", b'["",",' * 2**17),
}  # fmt: skip
LINES = {  # (RFC 9112 §3); the last three have a body that nobody has read
    400: ("POST /sync/push HTTP/1.1 ", " POST /sync/push HTTP/1.1", "POST /sync/push",
          "POST", "{}", "POST  /sync/push HTTP/1.1", "POST\t/sync/push HTTP/1.1",
          "POST /sync /push HTTP/1.1", "POST /sync/push\0 HTTP/1.1",
          "POST /sync/push\xa0HTTP/1.1", "POST /sync/push HTTP/1.10",
          "POST /sync/push HTTP/1.1\x0b", "POST /sync/push http/1.1",
          "POST /sync/push HTTP/11", "P(ST /sync/push HTTP/1.1",
          "POST /sync/push#x HTTP/1.1", "POST sync/push HTTP/1.1",
          "POST /sync/p%zzsh HTTP/1.1", "POST /%ff HTTP/1.1", "POST * HTTP/1.1", "\0",
          "POST http://a@b/sync/push HTTP/1.1", "POST http:///sync/push HTTP/1.1",
          "POST /sync/püsh HTTP/1.1", "CONNECT example.org:80 HTTP/1.1",
          ": /sync/push HTTP/1.1"),
    414: (f"POST /{'x' * 8192} HTTP/1.1", f"POST /{'x' * 70000} HTTP/1.1"),
    505: ("POST /sync/push HTTP/2.0", "POST /sync/push HTTP/0.9"),
    403: ("POST http://evil.example/sync/push HTTP/1.1",),
    404: ("POST /nothing HTTP/1.1",),
    426: ("GET /ws HTTP/1.1",),
}  # fmt: skip
FIELDS = {  # (RFC 9112 §5)
    400: ("Host : x", "Host: localhost", "Content-Type: text/plain", ":x", " folded",
          "\tfold: x", "no colon", "X-\xe9: x", "X: \0", "X: a\rb", "X: a\x7fb",
          "X\x0b: a", "X: \x1b[0m", "X Y: z", "X(y): z", "Content-Length: 5",
          "Content-Length: 0", "content-LENGTH:", "Transfer-Encoding: chunked",
          "Transfer-Encoding:", "X: a\nContent-Length: 0"),
    403: ("Origin: http://evil.example", "Origin: null"),
    431: ("\r\n".join(f"X-{number}: y" for number in range(100)), f"X: {'y' * 66000}"),
}  # fmt: skip
HOSTS = {
    400: ("X: y", "Host: a b", "Host: a/b", "Host: a@b", "Host: a, b", "Host: [::1",
          "Host: \xe9", "Host: a:123456"),
    403: ("Host: evil.example", "Host: localhost.evil.example",
          "Host: 127.0.0.1.nip.io:80"),
}  # fmt: skip
LENGTHS = {  # (RFC 9112 §6)
    400: ("Content-Length: ", "Content-Length: +5", "Content-Length: -1",
          "Content-Length: 0x5", "Content-Length: 5, 5", "Content-Length: 5 5",
          "Content-Length: 5\r\nContent-Length: 5", "Content-Length: \xb2",
          "Content-Length: 1e2", f"Content-Length: {2**64}",
          "Transfer-Encoding: identity", "Transfer-Encoding: chunked, identity",
          "Transfer-Encoding: xchunked", "Transfer-Encoding: chunked\x0b",
          "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
          'Transfer-Encoding: "chunked"', "Transfer-Encoding: chunked;x=y"),
    413: ("Content-Length: 1048577", f"Content-Length: {10**17}"),
    501: ("Transfer-Encoding: gzip, chunked", "Transfer-Encoding: chunked, chunked"),
}  # fmt: skip
CHUNKS = {  # (RFC 9112 §7.1); SIZE is the body's, LESS and MORE are beside it
    400: (b"g\r\n", b"\r\n", b"-1\r\n", b"0xSIZE\r\nBODY\r\n0\r\n\r\n",
          b" SIZE\r\nBODY\r\n0\r\n\r\n", b"0000000SIZE\r\nBODY\r\n0\r\n\r\n",
          b"SIZE\nBODY\r\n0\r\n\r\n", b"f" * 16 + b"\r\n", b"SIZE\r\nBODY\n0\r\n\r\n",
          b"SIZE\r\nBODYxx0\r\n\r\n", b"LESS\r\nBODY\r\n0\r\n\r\n",
          b"MORE\r\nBODY\r\n0\r\n\r\n", b"SIZE;a=\0\r\nBODY\r\n0\r\n\r\n",
          b"SIZE;\r\nBODY\r\n0\r\n\r\n", b"SIZE \r\nBODY\r\n0\r\n\r\n",
          b"SIZE\r\nBODY\r\n\r\n0\r\n\r\n", b"SIZE\r\nBODY\r\n0\r\nno colon\r\n\r\n",
          b"SIZE\r\nBODY\r\n0\r\n fold: x\r\n\r\n",
          b"SIZE\r\nBODY\r\n0\r\nA: b\nC: d\r\n\r\n", b"SIZE\r\nBODY\r\n0\n\n",
          b"SIZE\r\nBODY\r\n0\r\n\n\r\n\r\n", b"SIZE\r\nBODY\r\n0;\x7f\r\n\r\n"),
    431: (b"SIZE;" + b"x" * 9000 + b"\r\nBODY\r\n0\r\n\r\n",
          b"SIZE\r\nBODY\r\n0\r\nX: " + b"x" * 9000 + b"\r\n\r\n"),
    413: (b"FFFFFFFF\r\n", b"100001\r\nBODY",
          b"1\r\n \r\n" * 14000 + b"SIZE\r\nBODY\r\n0\r\n\r\n"),
}  # fmt: skip
LINE_ENDS = ("\n", "\r", "\n\r", "\r\r\n", "\x0b\r\n", "\0\r\n", "\n\n")


def either(source: random.Random, table: dict[int, tuple[T, ...]]) -> tuple[T, int]:
    """One of the table, each as likely, and its status."""
    return source.choice(
        [(one, status) for status, some in table.items() for one in some]
    )


def smuggled(tag: str) -> tuple[bytes, bytes]:
    """A push that must never be applied: its body, and the whole request."""
    wish = {"id": tag, "scope": "smuggled", "name": "todo.create"}
    body = json.dumps(
        [wish | {"args": {"id": f"of case {tag}", "title": "x"}}]
    ).encode()
    head = (
        f"POST /sync/push HTTP/1.1\r\nHost: {HOST}\r\n"
        "Content-Type: application/json\r\n"
    )
    return body, f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def push(source: random.Random, tag: str) -> tuple[bytes, Want]:
    """Mutations of todos that no other case has, and what becomes of each."""
    todos, wishes, codes, scope = (
        set[str](),
        list[Any](),
        list[str](),
        source.choice(SCOPES),
    )
    for number in range(source.choice((1, 1, 2, 3, 5, 20, 100))):
        name = source.choice(
            ("create", "create", "update", "toggle", "delete", "vanish", "")
        )
        todo = f"{tag} {source.randrange(3)}"
        args = {"id": todo, "title": source.choice(TEXTS)}
        wish = {
            "id": f"{tag} {number}",
            "scope": scope,
            "name": f"todo.{name}",
            "args": args,
        }
        if not name and isinstance(wrong := source.choice(NO_MUTATIONS), dict):
            wrong = {
                key: wish["id"] if value == "x" else value
                for key, value in wrong.items()
            }
        wishes.append(wish if name else wrong)
        if name in ("vanish", ""):
            codes.append("invalid_mutation")
        elif name == "create":
            codes.append("conflict" if todo in todos else "")
            todos.add(todo)
        else:
            codes.append("" if todo in todos else "not_found")
            todos -= {todo} if name == "delete" else set()
    return json.dumps(wishes, ensure_ascii=source.random() < 0.5).encode(), Want(
        (200,), codes
    )


def wreck(source: random.Random, value: Any) -> Any:
    """The same JSON value with a wrong one somewhere inside."""
    if isinstance(value, list) and value and source.random() < 0.8:
        at = source.randrange(len(value))
        return [*value[:at], wreck(source, value[at]), *value[at + 1 :]]
    if isinstance(value, dict) and value and source.random() < 0.8:
        key = source.choice(list(value))
        return value | {source.choice((key, key, "")): wreck(source, value[key])}
    deep = json.loads("[" * 70 + "]" * 70)
    wrong: Any = (
        None,
        True,
        -1,
        2**63,
        2**64,
        1e308,
        float("nan"),
        "",
        "\ud800",
        "\0",
        "x" * 300,
    )
    return source.choice(
        (*wrong, [], {}, deep, [value], {"id": value}, str(value), [None] * 101)
    )


def chunked(source: random.Random, body: bytes) -> bytes:
    """In any chunks, with everything that the grammar has."""
    made, extensions = b"", ("", ";a", ' ;a="b;c"', "\t; a=b ;c", ';a="\xe9"')
    while body:
        size = min(len(body), source.choice((1, 7, 100, 5000)) + len(body) // 9)
        line = (
            f"{size:{source.choice(('x', 'X', '06x'))}}{source.choice(extensions)}\r\n"
        )
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
    """A valid request, and what must answer it; a wild one is to be mutated."""
    body, fields, line = (
        b"",
        [source.choice(("Host: localhost", f"Host: {HOST}:1"))],
        "",
    )
    if source.random() < 0.5:
        body, want = push(source, tag)
        line, kind = "POST /sync/push", source.random()
        if kind < 0.3:
            raw, status = either(source, BODIES)
            body, want = raw.replace(b"TAG", tag.encode()), Want((status,))
        elif kind < 0.6:
            text = json.dumps(
                wreck(source, json.loads(body)), ensure_ascii=source.random() < 0.5
            )
            body, want = text.encode(errors="surrogatepass"), Want((200, 400, 413))
        kinds = (
            "Content-Type: application/json",
            "content-type:\tAPPLICATION/Json ; charset=utf-8 ",
        )
        fields.append(source.choice(kinds))
    while (
        not line or wild and ("HEAD" in line or "wait" in line)
    ):  # who could tell their end?
        line, status = either(source, ENDPOINTS)
        want = Want(
            (status, 404) if line == "GET /" else (status,), no_body="HEAD" in line
        )
        body = b""
        if source.random() < 0.3 and status not in (404, 426) and not wild:
            body = smuggled(tag)[1]
    fields += source.sample(ODD_FIELDS, source.choice((0, 0, 1, 3, 12)))
    version = source.choice(("1.1", "1.1", "1.7"))
    if last:
        fields = [one for one in fields if "keep-alive" not in one] + [
            "Connection: x,, Close"
        ]
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


def broken(source: random.Random, tag: str) -> tuple[bytes, Want]:
    """A push that must be refused for its framing or its place, and end the
    connection."""
    kind, status, (body, _) = source.randrange(6), 400, smuggled(tag)
    length = f"Content-Length: {len(body)}"
    lines = [
        "POST /sync/push HTTP/1.1",
        f"Host: {HOST}",
        "Content-Type: application/json",
        length,
    ]
    # With this a push would be applied by whoever takes its length for chunked after
    # all.
    chunks, coding = (
        b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body),
        "Transfer-Encoding: chunked",
    )
    if kind == 0:
        lines[0], status = either(source, LINES)
    elif kind == 1:
        field, status = either(source, FIELDS)
        if "Transfer" in field:
            lines[3], body = f"Content-Length: {len(chunks)}", chunks
        lines.insert(source.randint(1, 4), field)
    elif kind == 2:
        lines[1], status = either(source, HOSTS)
    elif kind == 3:
        lines[3], status = either(source, LENGTHS)
        if source.random() < 0.1:
            lines[0], lines[3], status = "POST /sync/push HTTP/1.0", coding, 400
        body = chunks if "Transfer" in lines[3] else body
    elif kind == 4:
        lines[3], (raw, status) = coding, either(source, CHUNKS)
        for word, more in ((b"SIZE", 0), (b"LESS", -1), (b"MORE", 1)):
            raw = raw.replace(word, b"%x" % (len(body) + more))
        body = raw.replace(b"BODY", body)
    parts = "\r\n".join((*lines, "", "")).split("\r\n")
    if kind == 5:
        at = source.randrange(1, len(parts))
        parts[at - 1 : at + 1] = [parts[at - 1] + source.choice(LINE_ENDS) + parts[at]]
    return "\r\n".join(parts).encode("latin-1") + body, Want((status,), closes=True)


# --- WebSocket ------------------------------------------------------------------------
# Conversations that are valid, then the catalogue of what RFC 6455 forbids, by its
# close code.


def frame(first: int, payload: bytes = b"", key: bytes = b"\0\0\0\0") -> bytes:
    """A client's frame: its first byte as it is given, its length in the shortest
    form."""
    size = len(payload)
    form = (
        struct.pack(">B", 128 | size) if size < 126 else struct.pack(">BQ", 255, size)
    )
    if 126 <= size < 1 << 16:
        form = struct.pack(">BH", 254, size)
    mask = int.from_bytes((key * (size // 4 + 1))[:size], "big")
    masked = (int.from_bytes(payload, "big") ^ mask).to_bytes(size, "big")
    return b"%c" % first + form + key + masked


KEY, ACCEPT = (
    "dGhlIHNhbXBsZSBub25jZQ==",
    "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=",
)  # (RFC 6455 §1.3)
HANDSHAKE = f"""GET /ws?scope=SCOPE HTTP/1.1\r\nHost: {HOST}\r
Connection: keep-alive, Upgrade\r\nUpgrade: WebSocket\r
Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {KEY}\r\n\r\n"""
HANDSHAKES = {  # what stands there, and what instead
    400: ((KEY, "x"), (KEY, KEY[:-3] + "R=="),
          (KEY, KEY + "\r\nSec-WebSocket-Key: " + KEY), ("HTTP/1.1", "HTTP/1.0"),
          ("\r\n\r\n", "\r\nContent-Length: 5\r\n\r\n[1,2]"), ("SCOPE", ""),
          ("SCOPE", "%ff"), ("SCOPE", "x" * 257), ("SCOPE", "a&scope=b")),
    401: (("?scope=SCOPE", ""), ("scope", "Scope")),
    405: (("GET", "POST"), ("GET", "PUT")),
    426: (("Upgrade: WebSocket", "Upgrade: h2c"), (", Upgrade", ""), (": 13", ": 12")),
}  # fmt: skip
MESSAGES = {  # and the code of the error that answers; "": none does
    "": ('{"topic":"subscribe"}', '{"topic":"subscribe","data":{"changes":true}}',
         '{"topic":"unsubscribe","data":{}}',
         '{"topic":"subscribe","data":{"scope":"größer"}}'),
    "unknown_topic": ('{"topic":"chat","data":[1]}', '{"topic":""}',
                      '{"topic":"sync:a"}'),
    "invalid_message": ("", "[]", "5", "{", '{"topic":5}', '"\0"', "[" * 999,
                        '{"topic":"\\ud800"}', '{"topic":"subscribe","data":[]}',
                        '{"topic":"x","data":NaN}', "\ufeff{}",
                        '{"topic":"subscribe","data":{"scope":""}}',
                        "[" * 64 + "{}" + "]" * 64),
}  # fmt: skip
VIOLATIONS = {
    1002: (frame(0xC1, b"x"), frame(0xA1, b"x"), frame(0x91, b"x"), b"\x81\x01x",
           b"\x89\x00",
           *(frame(0x80 | opcode) for opcode in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)),
           frame(0x09), frame(0x08), frame(0x89, bytes(126)), b"\x81\xfe\x00\x7d",
           b"\x89\xff", b"\x81\xff\0\0\0\0\0\0\xff\xff", b"\x82\xff\x80\0\0\0\0\0\0\0",
           frame(0x80, b"x"), frame(0x00, b"x"), frame(0x01, b"x") + frame(0x81, b"y"),
           frame(0x01) + frame(0x82),
           *(frame(0x88, struct.pack(">H", code)) for code in (
               0, 999, 1004, 1005, 1006, 1015, 1016, 2999, 5000, 65535)),
           frame(0x88, b"\x03")),
    1003: (frame(0x82), frame(0x82, b"\xff" * 70000),
           frame(0x02, b"[") + frame(0x80, b"]")),
    1007: (frame(0x81, b"\xff"), frame(0x81, b'"\xe2\x82'), frame(0x01, b"\xc0"),
           frame(0x81, b"\xc0\x80"), frame(0x01, b"\xed\xa0\x80"),
           frame(0x81, b"\xf4\x90\x80\x80"),
           frame(0x01, b"\xe2") + frame(0x00, b"\x82\xe2"),
           frame(0x88, b"\x03\xe8\xff")),
    1009: (b"\x81\xff\0\0\0\0\0\x10\0\1", b"\x82\xff\x7f" + b"\xff" * 7,
           frame(0x01, b" " * 2**20) + frame(0x80, b" ")),
}  # fmt: skip


def talk(source: random.Random, tag: str, wild: bool) -> tuple[bytes, list[Any]]:
    """A session from its handshake to its end, which may be a violation."""
    sent, said = HANDSHAKE.replace("SCOPE", f"ws+{tag}").encode(), list[Any]()
    for _ in range(source.choice((0, 1, 2, 5, 30))):
        code, some = source.choice(list(MESSAGES.items()))
        text = source.choice(some)
        if wild and source.random() < 0.5:
            text = json.dumps(
                wreck(source, {"topic": "subscribe", "data": {"scope": "x"}})
            )
        raw, opcode = text.encode(), 1  # cut anywhere, also within a character
        cuts = sorted(
            source.randint(0, len(raw)) for _ in range(source.choice((0, 0, 1, 4)))
        )
        for start, end in itertools.pairwise((0, *cuts, len(raw))):
            last = end == len(raw)
            sent += frame(0x80 * last | opcode, raw[start:end], source.randbytes(4))
            said += [code] if last and code else []
            if source.random() < 0.2:
                payload = source.randbytes(source.choice((0, 5, 125)))
                sent += frame(0x8A, payload) + frame(0x89, payload, source.randbytes(4))
                said.append(payload)
            opcode = 0
            if last:
                break
    match source.randrange(3):
        case 0:  # the same code comes back
            ending = source.choice((1000, 1001, 1003, 1011, 1014, 3000, 4999))
            reason = "größer".encode() * source.choice((0, 1, 15))
            sent += frame(0x88, struct.pack(">H", ending) + reason, source.randbytes(4))
            said.append(ending)
        case 1:
            violation, ending = either(source, VIOLATIONS)
            sent += violation
            said.append(ending)
        case _:
            return sent, said
    return sent + (b"" if wild else smuggled(tag)[1]) + frame(0x89, b"too late"), said


# --- Cases ----------------------------------------------------------------------------

NASTY = (
    b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b"\xff\xfe", b"\xc2\x85", b"%",
    b"\x7f", b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b"\r\n\r\n",
    b"0\r\n\r\n", b"9" * 99, b"x" * 8192, b"A: b\r\n" * 101, b"GET / HTTP/1.1\r\n",
)  # fmt: skip


def mutate(source: random.Random, data: bytes) -> bytes:
    for _ in range(source.choice((1, 1, 2, 3, 8))):
        at = source.randrange(source.choice((len(data), min(len(data), 300))) + 1)
        size = source.choice((1, 1, 4, 30))
        match source.randrange(6):
            case 0:
                data = data[:at] + source.randbytes(size) + data[at + size :]
            case 1:
                data = data[:at] + data[at + size :]
            case 2:
                data = data[:at] + source.choice(NASTY) + data[at:]
            case 3:
                data = data[:at] + data[at : at + size] * 2 + data[at + size :]
            case 4 if at < len(data):
                data = (
                    data[:at]
                    + bytes([data[at] ^ 1 << source.randrange(8)])
                    + data[at + 1 :]
                )
            case _:  # lines lost, twice, elsewhere
                lines = data.split(b"\r\n")
                line = lines.pop(source.randrange(len(lines)))
                for _ in range(source.randrange(3)):
                    lines.insert(source.randint(0, len(lines)), line)
                data = b"\r\n".join(lines)
    return data


def make(source: random.Random, tag: str) -> Case:
    """Several requests one behind the other, all valid but for the last; or a
    WebSocket."""
    kind, wild = source.random(), source.random() < 0.3
    tag = f"wild {tag}" if wild else tag  # no flip of a bit makes it another case's
    if kind < 0.3:
        sent, said = talk(source, tag, wild)
        if not wild:
            return Case(sent, [Want((101,))], said)
        at = (
            sent.index(b"\r\n\r\n") + 4 if source.random() < 0.8 else 0
        )  # mostly frames alone
        return Case(sent[:at] + mutate(source, sent[at:]))
    if kind < 0.33:
        (old, new), status = either(source, HANDSHAKES)
        return Case(HANDSHAKE.replace(old, new).encode(), [Want((status,))])
    sent, wants, last = b"", list[Want](), source.choice((0, 0, 1, 2, 4))
    for number in range(last + 1):
        if number == last and source.random() < 0.5 and not wild:
            raw, want = broken(source, tag)
            raw += (
                smuggled(tag)[1] + b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
            )
        else:
            raw, want = request(source, f"{tag}.{number}", number == last, wild)
        sent, wants = sent + raw, [*wants, want]
    return Case(mutate(source, sent)) if wild else Case(sent, wants)


# --- Judge ----------------------------------------------------------------------------
# What came back, read by the letter of the RFCs.


def judge(case: Case, got: bytes, whole: bool) -> None:
    """Raises Fault. Of a case that was not sent whole, each answer may be missing, or a
    400."""
    number, over, wants = 0, False, case.wants
    while got:
        check(not over, "there is something behind an answer that closes:", got)
        check(wants is None or number < len(wants), "an answer too many:", got)
        want = wants[number] if wants else None
        status, fields, body, got = take_answer(got, bool(want and want.no_body))
        if status == 100:
            continue
        over, number = "close" in fields.get("connection", ""), number + 1
        if status == 101:
            check(want is None or 101 in want.statuses, "an upgrade, but not", want)
            judge_frames(case, got, whole)
            got = b""
        if want and status not in want.statuses:
            cut = not whole and over and status == 400
            check(cut, "answered", status, "and not", want.statuses, body)
        elif want:
            check(over or not want.closes, "refused, and goes on:", fields, body)
            codes = (
                [result.get("code", "") for result in json.loads(body)]
                if want.results
                else []
            )
            check(
                codes == (want.results or []),
                "results:",
                codes,
                "and not",
                want.results,
            )
    check(
        not whole or wants is None or number == len(wants),
        "only",
        number,
        "answers of",
        wants,
    )


def take_answer(raw: bytes, no_body: bool) -> tuple[int, dict[str, str], bytes, bytes]:
    """The first response, and what is behind it (RFC 9110, RFC 9112)."""
    head, end, rest = raw.partition(b"\r\n\r\n")
    line, *lines = head.decode("latin-1").split("\r\n")
    check(
        end and re.fullmatch(r"HTTP/1\.1 [1-5][0-9]{2} [ -~]+", line),
        "no status line:",
        raw,
    )
    status, fields = int(line[9:12]), dict[str, str]()
    for one in lines:
        name, _, value = one.partition(": ")
        check(re.fullmatch(r"[A-Za-z-]+: [!-~]([ -~]*[!-~])?", one), "no header:", one)
        check(name.lower() not in fields, "a header twice:", head)
        fields[name.lower()] = value
    if status == 100:
        return status, fields, b"", rest
    age = time.time() - parsedate_to_datetime(fields["date"]).timestamp()
    check(
        -5 < age < PATIENCE + 5 and fields["date"].endswith(" GMT"), "the date:", head
    )
    check(fields.get("cache-control") == "no-store", "it might be stored:", head)
    if status in (101, 204):
        check(
            not {"content-length", "content-type"} & fields.keys(),
            "a body of none:",
            head,
        )
        check(
            status == 204 or fields["sec-websocket-accept"] == ACCEPT,
            "the key's answer:",
            head,
        )
        return status, fields, b"", rest
    check(
        status == 200 or status in CODES, "an answer that nothing here should get:", raw
    )
    size = 0 if no_body else int(fields["content-length"])
    check(len(rest) >= size, "the body is", len(rest), "bytes, and not", size)
    body = rest[:size]
    if fields.get("content-encoding") == "gzip":
        body = gzip.decompress(body)
    if fields["content-type"] == "application/json" and not no_body:
        value = json.loads(
            body.decode(), parse_constant=lambda word: check(False, "JSON:", word)
        )
        if status != 200:
            check(list(value) == ["code", "error"], "no envelope:", body)
            check(
                value["code"] == CODES[status] and value["error"],
                "not of",
                status,
                body,
            )
    must = {401: "www-authenticate", 405: "allow", 426: "upgrade"}
    check(status not in must or must[status] in fields, "a header is missing:", head)
    return status, fields, body, rest[size:]


def take_frame(buffer: bytes) -> tuple[int, bytes, bytes] | None:
    """A server's frame: opcode, payload, and what is behind it; None until it is
    whole."""
    size, start = (buffer[1] if len(buffer) > 1 else 0), 2
    check(size < 128, "a server's frame is not masked:", buffer)
    if size > 125:
        start, least = (4, 126) if size == 126 else (10, 1 << 16)
        if len(buffer) >= start:
            size = int.from_bytes(buffer[2:start], "big")
            check(size >= least, "a length that is not the shortest:", buffer)
    if len(buffer) < start + size:
        return None
    check(buffer[0] in (0x81, 0x88, 0x89, 0x8A), "no frame of this server:", buffer)
    check(buffer[0] == 0x81 or size < 126, "a long control frame:", buffer)
    return buffer[0] & 15, buffer[start : start + size], buffer[start + size :]


def judge_frames(case: Case, got: bytes, whole: bool) -> None:
    said: list[Any] = []  # pongs, codes of errors, the code of the close
    while got:
        check(
            not (said and isinstance(said[-1], int)),
            "there is something behind a close:",
            got,
        )
        check(taken := take_frame(got), "half a frame:", got)
        opcode, payload, got = taken or (0, b"", b"")
        if opcode == 8:
            code = int.from_bytes(payload[:2], "big") if payload else 1005
            payload[2:].decode()
            check(1000 <= code < 1015 or 3000 <= code < 5000, "a close with", payload)
            check(
                code != 1011 or payload[2:] == b"",
                "not an echo; the server failed:",
                payload,
            )
            said.append(code)
        elif opcode == 10:
            said.append(payload)
        elif opcode == 1:
            message = json.loads(payload.decode())
            check(list(message) == ["topic", "data"], "no message:", payload)
            if message["topic"] == "error":
                check(list(message["data"]) == ["code", "error"], "no error:", payload)
                said.append(message["data"]["code"])
            else:
                check(
                    message["topic"].startswith("sync:"), "no topic of ours:", payload
                )
                check(isinstance(message["data"]["cursor"], int), "no hint:", payload)
    if case.said is not None:
        wanted = case.said if whole else case.said[: len(said)]
        pairs = enumerate(itertools.zip_longest(said, wanted))
        check(
            said == wanted,
            "said, and not:",
            [pair for pair in pairs if len(set(pair[1])) > 1],
        )


# --- Clients --------------------------------------------------------------------------


def connect(port: int) -> socket.socket:
    return socket.create_connection((HOST, port), PATIENCE)


def reset(sock: socket.socket) -> None:
    with suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def deliver(source: random.Random, case: Case, port: int) -> socket.socket | None:
    """Send a case in some pieces and some manner; gives the socket if nobody ever reads
    it.

    Raises Fault for what came, or did not.
    """
    manner = source.choices(
        ("read", "cut", "reset", "close", "hold"), (80, 8, 4, 4, 2)
    )[0]
    sent = (
        case.sent[: source.randrange(len(case.sent) + 1)]
        if manner == "cut"
        else case.sent
    )
    cuts = [source.randint(0, len(sent)) for _ in range(source.choice((0, 0, 1, 3, 9)))]
    cuts += range(min(len(sent), 60)) if source.random() < 0.05 else ()  # byte by byte
    if source.random() < 0.05:  # each way of cutting the end of a head, too
        cuts += range(max(0, sent.find(b"\r\n\r\n") - 3), sent.find(b"\r\n\r\n") + 6)
    sock, got, pause = connect(port), b"", source.choice((0.0, 0.0005, 0.01))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with suppress(OSError):  # who was refused may be cut off while still sending
        for start, end in itertools.pairwise((0, *sorted(cuts), len(sent))):
            sock.sendall(sent[start:end])
            time.sleep(pause)
        # Whether the server ends by itself after what it has to refuse is seen without.
        closes = case.wants and (case.wants[-1].closes or b"x,, Close" in case.sent)
        if not closes or manner == "cut" or source.random() < 0.5:
            sock.shutdown(socket.SHUT_WR)
    if manner == "hold":
        return sock
    if manner in ("reset", "close"):
        (reset if manner == "reset" else socket.socket.close)(sock)
        return None
    try:
        with sock, suppress(ConnectionResetError):  # what is missing is seen
            while more := sock.recv(1 << 16):
                got += more
        judge(case, got, whole=manner != "cut")
    except (
        Exception
    ) as error:  # a time-out, and whatever can't be read as what it should be
        what = error if isinstance(error, Fault) else traceback.format_exc()
        raise Fault(f"{what}\n  got ({manner}): {got[:1500]!r}") from None
    return None


class Healthy(threading.Thread):
    """Changes one todo, pulls, and follows over a WebSocket, whatever the others do."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self.port, self.over, self.fault, self.worst = (
            port,
            threading.Event(),
            "",
            Counter[str](),
        )
        self.log: list[Any] = []
        self.http, self.buffer = (
            http.client.HTTPConnection(HOST, port, timeout=PATIENCE),
            b"",
        )
        self.live = connect(port)
        self.live.sendall(HANDSHAKE.replace("SCOPE", "healthy").encode())
        self.live.sendall(frame(0x81, b'{"topic":"subscribe"}'))
        while (
            b"\r\n\r\n" not in self.buffer
        ):  # byte by byte: no frame shall come with it
            check(more := self.live.recv(1), "no upgrade:", self.buffer)
            self.buffer += more
        self.buffer = b""

    def run(self) -> None:
        try:
            while not self.over.wait(0.02):
                self.step()
        except Exception:
            self.fault = f"the healthy client: {traceback.format_exc()}"

    def ask(self, target: str, body: Any = None) -> Any:
        fields = {"Content-Type": "application/json"}
        raw = json.dumps(body) if body else None
        self.http.request("POST" if body else "GET", target, raw, fields)
        return json.loads(self.http.getresponse().read())

    def timed(self, what: str, call: Callable[[], Any]) -> Any:
        start = time.monotonic()
        result = call()
        self.worst[what] = max(
            self.worst[what], took := int(1000 * (time.monotonic() - start))
        )
        check(took < 1000 * PROMPT, what, "took", took, "ms")
        return result

    def step(self) -> None:
        number, known = len(self.log), self.log[-1]["cursor"] if self.log else 0
        name, args = (
            "todo.update" if number else "todo.create",
            {"id": "x", "title": f"n {number}"},
        )
        wish = {"id": f"n {number}", "scope": "healthy", "name": name, "args": args}
        result, *_ = self.timed("push", lambda: self.ask("/sync/push", [wish]))
        check(result["ok"] and len(result["changes"]) == 1, "its push:", result)
        page = self.timed(
            "pull", lambda: self.ask(f"/sync/pull?scope=healthy&cursor={known}")
        )
        check(
            page["changes"] == result["changes"], "its pull:", page, "and not", result
        )
        self.log += page["changes"]
        self.timed("hint", lambda: self.hear(result["cursor"]))

    def hear(self, cursor: int) -> None:
        while True:
            while (taken := take_frame(self.buffer)) is None:
                check(more := self.live.recv(65536), "its socket was closed")
                self.buffer += more
            opcode, payload, self.buffer = taken
            if opcode == 9:
                self.live.sendall(frame(0x8A, payload))
            elif json.loads(payload)["data"]["cursor"] >= cursor:
                return

    def pull(self, scope: str) -> list[Any]:
        """All the changes of a scope."""
        changes: list[Any] = []
        while True:
            after = changes[-1]["cursor"] if changes else 0
            page = self.ask(f"/sync/pull?scope={scope}&limit=1000&cursor={after}")
            changes += page["changes"]
            if not page["hasMore"]:
                return changes


# --- Fuzz -----------------------------------------------------------------------------


class Fuzz:
    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder, self.counts = args, folder, Counter[str]()
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

    def try_case(self, number: int, held: deque[socket.socket]) -> None:
        source = random.Random(f"{self.args.seed} {number}")
        case = make(source, str(number))
        try:
            if sock := deliver(source, case, self.port):
                held.append(sock)
            if len(held) > 20:
                reset(held.popleft())
        except Exception as error:
            (self.folder / f"case-{number}").write_bytes(case.sent)
            what = error if isinstance(error, Fault) else traceback.format_exc()
            where = f"seed {self.args.seed} case {number}, {len(case.sent)} bytes"
            self.fail(f"{what}\n  {where}: {case.sent[:1500]!r}")
        self.counts["cases"] += 1

    def mix(self, seconds: float, healthy: Healthy) -> None:
        """All workers at once, for so long, or until it is red enough."""
        end = time.monotonic() + seconds

        def work() -> None:
            held: deque[socket.socket] = deque()
            while (
                time.monotonic() < end and len(self.faults) < 10 and not healthy.fault
            ):
                self.try_case(next(self.numbers), held)
                time.sleep(0.002)  # a shared machine
            for sock in held:
                reset(sock)

        workers = [threading.Thread(target=work, daemon=True) for _ in range(WORKERS)]
        for worker in workers:
            worker.start()
        while any(worker.is_alive() for worker in workers):
            time.sleep(0.1)
            self.tell(healthy)

    def churn(self, healthy: Healthy) -> None:
        """Clients that come and go in every rude way, at any point of what they might
        do."""
        source, held = random.Random(self.args.seed), deque[socket.socket]()
        greeting = HANDSHAKE.replace("SCOPE", "healthy").encode()
        greeting += frame(0x81, b'{"topic":"subscribe","data":{"changes":true}}')
        parts = (
            b"",
            greeting,
            greeting * 2,
            smuggled("churn")[1][:-1],
            b"GET / HTTP/1.1\r\n",
        )
        asks = b"GET /nothing HTTP/1.1\r\nHost: localhost\r\n\r\n" * 5000
        floods = (
            asks,
            greeting + frame(0x81, b"[]") * 9000,
            greeting + frame(0x89, bytes(125)) * 9000,
        )
        while (
            self.counts["churned"] < CHURN
            and not healthy.fault
            and len(self.faults) < 10
        ):
            # Now and then much to answer, for somebody who reads nothing.
            part = source.choice(floods if source.random() < 0.01 else parts)
            with suppress(OSError):
                held.append(sock := connect(self.port))
                sock.settimeout(0.2)
                sock.sendall(
                    part[: source.choice((len(part), source.randint(0, len(part))))]
                )
                if source.random() < 0.3:
                    sock.shutdown(source.choice((socket.SHUT_WR, socket.SHUT_RDWR)))
                if source.random() < 0.3:
                    sock.settimeout(0.01)
                    sock.recv(source.choice((1, 1000)))
            while len(held) > source.choice((0, 0, 100)):
                source.choice((reset, socket.socket.close))(held.popleft())
            self.counts["churned"] += 1
            self.tell(healthy)

    def settle(self, before: dict[str, int]) -> dict[str, int]:
        """What it holds once it is quiet: of sessions the healthy one, all else as
        before."""
        proc = Path(f"/proc/{self.popen.pid}")
        # It still handles what a flood has sent: thousands of messages, one a turn.
        deadline = time.monotonic() + 5 * PATIENCE
        time.sleep(3)  # longer than it lingers
        while True:
            lines = (proc / "status").read_text().splitlines()
            status = dict(line.split(":\t") for line in lines)
            now = {name: int(status[name].split()[0]) for name in ("VmRSS", "Threads")}
            connection = http.client.HTTPConnection(HOST, self.port, timeout=PATIENCE)
            connection.request("GET", "/healthz")
            now["sessions"] = json.loads(connection.getresponse().read())["sessions"]
            connection.close()
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
    parser.add_argument("--case", type=int, help="send this case alone")
    args = parser.parse_args()

    def work(folder: Path) -> None:
        fuzz = Fuzz(args, folder)
        fuzz.run()
        check(not fuzz.faults, "of those above there are", len(fuzz.faults))

    return trial.run("fuzz", work)


if __name__ == "__main__":
    sys.exit(main())
