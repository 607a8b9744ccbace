"""The catalogue of hostile inputs: what no client should send, and what must come back.

One table for each place that a hostile client can reach, from the request line down to
a WebSocket's message. A table maps a name to a `Hostile`: the bytes, and the status,
the close code or the error code that must answer them. The HTTP tables hold parts of a
request; `requests()` builds them into whole requests, each of them a push that no
server may apply. The fuzzer takes its seeds from here, and the tests run each table.

This module imports only the standard library, so that any tool and any test can import
it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

REFUSED = "any refusal"  # any status from 400 on


class Hostile(NamedTuple):
    """One hostile input, and what must come back.

    `expected` is an HTTP status, a WebSocket close code, a code of the protocol for a
    mutation or a message, or REFUSED. The status 200 stands for a body that is
    accepted, and of which no mutation is applied.
    """

    sent: bytes
    expected: int | str


Table = dict[str, Hostile]


def expecting(expected: int | str, inputs: dict[str, bytes]) -> Table:
    """Return a table in which all the inputs have the same answer."""
    return {name: Hostile(sent, expected) for name, sent in inputs.items()}


# --- The push around it ---------------------------------------------------------------
# An HTTP input stands in a push that would otherwise be accepted. So a server that
# reads it differently shows itself: the push is applied.

HOST = b"Host: 127.0.0.1"
LINE = b"POST /sync/push HTTP/1.1"
JSON_TYPE = b"Content-Type: application/json"
CODING = b"Transfer-Encoding: chunked"
SMUGGLED = b'[{"id":"smuggled","scope":"smuggled","name":"smuggled"}]'


def assemble(lines: Iterable[bytes], body: bytes) -> bytes:
    """Return a request of these lines and this body."""
    return b"\r\n".join((*lines, b"", b"")) + body


def push_lines(body: bytes) -> list[bytes]:
    """Return the four lines of a push that is in order."""
    return [LINE, HOST, JSON_TYPE, b"Content-Length: %d" % len(body)]


def fill(sent: bytes, body: bytes) -> bytes:
    """Return the input with its words replaced.

    BODY is the push's body and CHUNKED the same in one chunk. LENGTH is its size, SIZE
    the same in hexadecimal; LESS and MORE are beside it.
    """
    words = {
        b"LENGTH": b"%d" % len(body),
        b"SIZE": b"%x" % len(body),
        b"LESS": b"%x" % (len(body) - 1),
        b"MORE": b"%x" % (len(body) + 1),
        b"CHUNKED": in_one_chunk(body),
        b"BODY": body,
    }
    for word, meaning in words.items():
        sent = sent.replace(word, meaning)
    return sent


def in_one_chunk(body: bytes) -> bytes:
    """Return the body in chunked coding (RFC 9112 §7.1)."""
    return b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)


def frame(first: int, payload: bytes = b"") -> bytes:
    """Return a client's frame whose first byte is given as it is (RFC 6455 §5.2).

    The mask is zero, so the payload stands in the clear.
    """
    size = len(payload)
    if size < 126:
        length = bytes([0x80 | size])
    elif size < 2**16:
        length = b"\xfe" + size.to_bytes(2, "big")
    else:
        length = b"\xff" + size.to_bytes(8, "big")
    return bytes([first]) + length + bytes(4) + payload


# --- HTTP: the head -------------------------------------------------------------------

# Request lines in the place of a push's (RFC 9112 §3).
REQUEST_LINES = expecting(
    400,
    {
        "a space at the end": b"POST /sync/push HTTP/1.1 ",
        "a space at the start": b" POST /sync/push HTTP/1.1",
        "no version": b"POST /sync/push",
        "a method alone": b"POST",
        "no method": b" /sync/push HTTP/1.1",
        "a NUL alone": b"\0",
        "a body in the place of a line": b"{}",
        "a field in the place of a line": b": /sync/push HTTP/1.1",
        "two spaces": b"POST  /sync/push HTTP/1.1",
        "a tab for a space": b"POST\t/sync/push HTTP/1.1",
        "a tab for each space": b"POST\t/sync/push\tHTTP/1.1",
        "a space in the target": b"POST /sync /push HTTP/1.1",
        "a NUL in the target": b"POST /sync/push\0 HTTP/1.1",
        "a control character in the target": b"POST /sync/pu\x01sh HTTP/1.1",
        "a bare CR in the target": b"POST /sync/pu\rsh HTTP/1.1",
        "a no-break space": b"POST /sync/push\xa0HTTP/1.1",
        "a version of three digits": b"POST /sync/push HTTP/1.10",
        "a version without a point": b"POST /sync/push HTTP/11",
        "a version of a letter": b"POST /sync/push HTTP/1.x",
        "another script's digit": "POST /sync/push HTTP/1.\u0661".encode(),
        "a vertical tab behind the version": b"POST /sync/push HTTP/1.1\x0b",
        "http in small letters": b"POST /sync/push http/1.1",
        "a method that is no token": b"P(ST /sync/push HTTP/1.1",
        "a fragment": b"POST /sync/push#x HTTP/1.1",
        "a fragment of a HEAD request": b"HEAD /healthz#x HTTP/1.1",
        "a relative target": b"POST sync/push HTTP/1.1",
        "an asterisk for a push": b"POST * HTTP/1.1",
        "a wrong escape": b"POST /sync/p%zzsh HTTP/1.1",
        "an escape that is not UTF-8": b"POST /%ff HTTP/1.1",
        "a raw byte in the target": b"POST /sync/p\xfcsh HTTP/1.1",
        "an address with a user": b"POST http://a@b/sync/push HTTP/1.1",
        "an address without a host": b"POST http:///sync/push HTTP/1.1",
        "an address with a port alone": b"POST http://:80/sync/push HTTP/1.1",
        "CONNECT": b"CONNECT example.org:80 HTTP/1.1",
    },
)
REQUEST_LINES |= expecting(
    414,
    {
        "a target past 8 KiB": b"POST /%b HTTP/1.1" % (b"x" * 8192),
        "a target past a whole head": b"POST /%b HTTP/1.1" % (b"x" * 70_000),
    },
)
REQUEST_LINES |= expecting(
    505,
    {
        "HTTP/2.0": b"POST /sync/push HTTP/2.0",
        "HTTP/3.1": b"POST /sync/push HTTP/3.1",
        "HTTP/0.9": b"POST /sync/push HTTP/0.9",
    },
)
# The body of these is never read, so nothing behind it may be read either.
REQUEST_LINES |= {
    "another server's address": Hostile(
        b"POST http://evil.example/sync/push HTTP/1.1", 403
    ),
    "a path that does not exist": Hostile(b"POST /nothing HTTP/1.1", 404),
    "a WebSocket without an upgrade": Hostile(b"GET /ws HTTP/1.1", 426),
}

# One more field in the head of a push (RFC 9112 §5).
FIELDS = expecting(
    400,
    {
        "a space before the colon": b"Host : x",
        "a second host": b"Host: localhost",
        "a second type": b"Content-Type: text/plain",
        "no name": b":x",
        "a folded line": b" folded",
        "a line folded by a tab": b"\tfold: x",
        "a field that a space folds": b"X: y\r\n z",
        "a field that a tab folds": b"X: y\r\n\tz",
        "no colon": b"no colon",
        "a name that is not ASCII": b"X-\xe9: x",
        "a name with a space": b"X Y: z",
        "a name with a parenthesis": b"X(y): z",
        "a name with a vertical tab": b"X\x0b: a",
        "a NUL in a value": b"X: \0",
        "a bare CR in a value": b"X: a\rb",
        "a DEL in a value": b"X: a\x7fb",
        "a vertical tab in a value": b"X: a\x0b",
        "an escape sequence in a value": b"X: \x1b[0m",
        "a second length": b"Content-Length: 5",
        "a second length of 0": b"Content-Length: 0",
        "a second length without digits": b"content-LENGTH:",
        "a coding beside a length": b"Transfer-Encoding: chunked",
        "an empty coding beside a length": b"Transfer-Encoding:",
        "a length behind a bare LF": b"X: a\nContent-Length: 0",
        "a field behind a bare LF": b"X: a\nX-Y: z",
        "two versions of WebSocket": (
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Version: 13"
        ),
    },
)
FIELDS |= expecting(
    403,
    {
        "another origin": b"Origin: http://evil.example",
        "an opaque origin": b"Origin: null",
    },
)
FIELDS |= expecting(
    431,
    {
        "100 more fields": b"\r\n".join(b"X-%d: y" % number for number in range(100)),
        "a field past 64 KiB": b"X: " + b"y" * 66_000,
    },
)

# The field in the place of Host (RFC 9112 §3.2, RFC 9110 §7.2).
HOSTS = expecting(
    400,
    {
        "no host": b"X: y",
        "a space": b"Host: a b",
        "a path": b"Host: a/b",
        "a user": b"Host: a@b",
        "a list": b"Host: a, b",
        "half a bracket": b"Host: [::1",
        "no address in brackets": b"Host: [:]",
        "a port alone": b"Host: :80",
        "half an escape": b"Host: localhost%4",
        "a wrong escape": b"Host: %zz.localhost",
        "a raw byte": b"Host: \xe9",
        "a port of six digits": b"Host: a:123456",
        "a port of letters": b"Host: localhost:http",
    },
)
HOSTS |= expecting(
    403,  # DNS rebinding needs a name
    {
        "another name": b"Host: evil.example",
        "a name that begins like ours": b"Host: localhost.evil.example",
        "a name that resolves to loopback": b"Host: 127.0.0.1.nip.io:80",
    },
)

# The field in the place of Content-Length (RFC 9112 §6).
FRAMINGS = expecting(
    400,
    {
        "no digits": b"Content-Length: ",
        "a sign": b"Content-Length: +LENGTH",
        "a negative length": b"Content-Length: -1",
        "a hexadecimal length": b"Content-Length: 0xSIZE",
        "a list that agrees": b"Content-Length: LENGTH, LENGTH",
        "a list that differs": b"Content-Length: LENGTH, 3",
        "a space inside": b"Content-Length: 2 9",
        "two lengths that agree": b"Content-Length: LENGTH\r\nContent-Length: LENGTH",
        "a superscript": b"Content-Length: \xb2",
        "a superscript in UTF-8": "Content-Length: \u00b2".encode(),
        "another script's digit": "Content-Length: \u0665".encode(),
        "two of another script's digits": "Content-Length: \u0662\u0669".encode(),
        "an underscore": b"Content-Length: 2_9",
        "a fraction": b"Content-Length: LENGTH.0",
        "an exponent": b"Content-Length: LENGTHe0",
        "a vertical tab behind the length": b"Content-Length: LENGTH\x0b",
        "a no-break space behind the length": b"Content-Length: LENGTH\xa0",
        "a space before the length's colon": b"Content-Length : LENGTH",
        "a length past 64 bits": b"Content-Length: %d" % 2**64,
        "an empty coding": b"Transfer-Encoding: ",
        "identity": b"Transfer-Encoding: identity",
        "chunked, but not last": b"Transfer-Encoding: chunked, identity",
        "chunked before gzip": b"Transfer-Encoding: chunked, gzip",
        "gzip alone": b"Transfer-Encoding: gzip",
        "a coding like chunked": b"Transfer-Encoding: xchunked",
        "a vertical tab behind chunked": b"Transfer-Encoding: chunked\x0b",
        "a no-break space behind chunked": b"Transfer-Encoding: chunked\xa0",
        "a vertical tab before chunked": b"Transfer-Encoding: \x0bchunked",
        "chunked in two fields": (
            b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked"
        ),
        "chunked and identity in two fields": (
            b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity"
        ),
        "chunked in quotes": b'Transfer-Encoding: "chunked"',
        "chunked with a parameter": b"Transfer-Encoding: chunked;x=y",
        "a folded coding": b"Transfer-Encoding:\r\n chunked",
        "a space before the colon": b"Transfer-Encoding : chunked",
    },
)
FRAMINGS |= expecting(
    413,
    {
        "a length past 1 MiB": b"Content-Length: 1048577",
        "a length of 18 digits": b"Content-Length: %d" % 10**17,
    },
)
FRAMINGS |= expecting(
    501,
    {
        "a coding that the server lacks": b"Transfer-Encoding: gzip, chunked",
        "chunked twice": b"Transfer-Encoding: chunked, chunked",
    },
)

# The end of one of the head's lines (RFC 9112 §2.2).
LINE_ENDS = expecting(
    400,
    {
        "a bare LF": b"\n",
        "a bare CR": b"\r",
        "LF before CR": b"\n\r",
        "two CRs": b"\r\r\n",
        "a vertical tab": b"\x0b\r\n",
        "a NUL": b"\0\r\n",
        "two bare LFs": b"\n\n",
    },
)

# Whole requests, and the greetings of other protocols.
GREETINGS = expecting(
    400,
    {
        "a coding in HTTP/1.0": assemble(
            [b"POST /sync/push HTTP/1.0", HOST, JSON_TYPE, CODING], b"CHUNKED"
        ),
        "a length and a coding in HTTP/1.0": assemble(
            [b"POST /sync/push HTTP/1.0", *push_lines(b"")[1:], CODING], b"CHUNKED"
        ),
        "an absolute form without its Host field": assemble(
            [
                b"POST http://localhost/sync/push HTTP/1.1",
                JSON_TYPE,
                b"Content-Length: LENGTH",
            ],
            b"BODY",
        ),
        "an absolute form with a bad Host field": assemble(
            [
                b"POST http://localhost/sync/push HTTP/1.1",
                b"Host: a b",
                JSON_TYPE,
                b"Content-Length: LENGTH",
            ],
            b"BODY",
        ),
        "bare LFs alone": b"POST /sync/push HTTP/1.1\nHost: 127.0.0.1\n\nBODY\r\n\r\n",
        "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        "SSH": b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        "a proxy's address line": b"PROXY TCP4 127.0.0.1 127.0.0.1 1 2\r\n\r\n",
        "Redis": b"*1\r\n$4\r\nPING\r\n\r\n",
    },
)
GREETINGS |= expecting(414, {"a target without an end": b"GET /" + b"x" * 100_000})
GREETINGS |= expecting(REFUSED, {"HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"})

# --- HTTP: chunked bodies -------------------------------------------------------------
# What stands behind the head of a push (RFC 9112 §7.1).

CHUNKS = expecting(
    400,
    {
        "a size that is no number": b"g\r\n",
        "no size": b"\r\n",
        "a negative size": b"-1\r\n",
        "a sign before the size": b"+SIZE\r\nBODY\r\n0\r\n\r\n",
        "a size of 16 digits": b"f" * 16 + b"\r\n",
        "a size of 2**64": b"1" + b"0" * 16 + b"\r\nBODY\r\n0\r\n\r\n",
        "an underscore in the size": b"0_SIZE\r\nBODY\r\n0\r\n\r\n",
        "a letter behind the size": b"SIZEg\r\nBODY\r\n0\r\n\r\n",
        "another script's digit": "\u0661d\r\nBODY\r\n0\r\n\r\n".encode(),
        "0x before the size": b"0xSIZE\r\nBODY\r\n0\r\n\r\n",
        "a space before the size": b" SIZE\r\nBODY\r\n0\r\n\r\n",
        "a space behind the size": b"SIZE \r\nBODY\r\n0\r\n\r\n",
        "a vertical tab behind the size": b"SIZE\x0b\r\nBODY\r\n0\r\n\r\n",
        "many zeros before the size": b"0000000SIZE\r\nBODY\r\n0\r\n\r\n",
        "1,000 zeros before the size": b"0" * 1000 + b"SIZE\r\nBODY\r\n0\r\n\r\n",
        "a bare LF behind the size": b"SIZE\nBODY\r\n0\r\n\r\n",
        "a bare LF behind the chunk": b"SIZE\r\nBODY\n0\r\n\r\n",
        "other bytes behind the chunk": b"SIZE\r\nBODYxx0\r\n\r\n",
        "an empty line behind the chunk": b"SIZE\r\nBODY\r\n\r\n0\r\n\r\n",
        "no line end behind the chunk": b"SIZE\r\nBODY0\r\n\r\n",
        "a size below the chunk's": b"LESS\r\nBODY\r\n0\r\n\r\n",
        "a size above the chunk's": b"MORE\r\nBODY\r\n0\r\n\r\n",
        "a NUL in an extension": b"SIZE;a=\0\r\nBODY\r\n0\r\n\r\n",
        "a bare CR in an extension": b"SIZE;a\rb\r\nBODY\r\n0\r\n\r\n",
        "a bare LF in an extension": b"SIZE;a\nb\r\nBODY\r\n0\r\n\r\n",
        "a DEL in the last extension": b"SIZE\r\nBODY\r\n0;\x7f\r\n\r\n",
        "an extension without a name": b"SIZE;\r\nBODY\r\n0\r\n\r\n",
        "a trailer without a colon": b"SIZE\r\nBODY\r\n0\r\nno colon\r\n\r\n",
        "a space before a trailer's colon": b"SIZE\r\nBODY\r\n0\r\nX : y\r\n\r\n",
        "a folded trailer": b"SIZE\r\nBODY\r\n0\r\n fold: x\r\n\r\n",
        "a trailer that a space folds": b"SIZE\r\nBODY\r\n0\r\nX: y\r\n z\r\n\r\n",
        "a trailer that ends in a bare LF": b"SIZE\r\nBODY\r\n0\r\nX: y\n\r\n",
        "a second trailer part": b"SIZE\r\nBODY\r\n0\r\nA: b\nC: d\r\n\r\n",
        "bare LFs at the end": b"SIZE\r\nBODY\r\n0\n\n",
        "a bare LF in the trailers": b"SIZE\r\nBODY\r\n0\r\n\n\r\n\r\n",
    },
)
CHUNKS |= expecting(
    431,
    {
        "a long extension": b"SIZE;" + b"x" * 9000 + b"\r\nBODY\r\n0\r\n\r\n",
        "a long trailer": b"SIZE\r\nBODY\r\n0\r\nX: " + b"x" * 9000 + b"\r\n\r\n",
        "an extension without an end": b"SIZE;" + b"a" * 200_000,
        "a trailer of 200,000 bytes": (
            b"SIZE\r\nBODY\r\n0\r\nX: " + b"a" * 200_000 + b"\r\n\r\n"
        ),
        "20,000 trailers": b"SIZE\r\nBODY\r\n0\r\n" + b"X: y\r\n" * 20_000 + b"\r\n",
    },
)
CHUNKS |= expecting(
    413,
    {
        "a chunk of 4 GiB": b"FFFFFFFF\r\n",
        "a chunk past 1 MiB": b"100001\r\nBODY",
        "14,000 chunks of a byte": b"1\r\n \r\n" * 14_000
        + b"SIZE\r\nBODY\r\n0\r\n\r\n",
    },
)


# --- HTTP: whole requests -------------------------------------------------------------


def with_request_line(sent: bytes, body: bytes) -> bytes:
    """Return a push with another request line."""
    return assemble([sent, *push_lines(body)[1:]], body)


def with_field(sent: bytes, body: bytes, at: int = 1) -> bytes:
    """Return a push with one more field, as the line number `at`."""
    if b"Transfer-Encoding" in sent:
        # Whoever believes the coding and not the length would apply this push.
        body = in_one_chunk(body)
    lines = push_lines(body)
    lines.insert(at, sent)
    return assemble(lines, body)


def with_host(sent: bytes, body: bytes) -> bytes:
    """Return a push with another field in the place of Host."""
    line, _, *others = push_lines(body)
    return assemble([line, sent, *others], body)


def with_framing(sent: bytes, body: bytes) -> bytes:
    """Return a push with another field in the place of Content-Length."""
    plain = body
    if b"Transfer-Encoding" in sent:
        body = in_one_chunk(body)
    return assemble([LINE, HOST, JSON_TYPE, fill(sent, plain)], body)


def with_line_end(sent: bytes, body: bytes, at: int = 1) -> bytes:
    """Return a push in which another end stands before the line number `at`.

    The line behind the fields is empty; `at` is 1 to 5.
    """
    lines = [*push_lines(body), b"", b""]
    before = b"\r\n".join(lines[:at])
    behind = b"\r\n".join(lines[at:])
    return before + sent + behind + body


def with_greeting(sent: bytes, body: bytes) -> bytes:
    """Return a whole request, or a greeting, with the push's body in it."""
    return fill(sent, body)


def with_chunks(sent: bytes, body: bytes) -> bytes:
    """Return a push in these chunks."""
    return assemble([LINE, HOST, JSON_TYPE, CODING], fill(sent, body))


PLACES: dict[str, tuple[Table, Callable[..., bytes]]] = {
    "request line": (REQUEST_LINES, with_request_line),
    "field": (FIELDS, with_field),
    "host": (HOSTS, with_host),
    "framing": (FRAMINGS, with_framing),
    "line end": (LINE_ENDS, with_line_end),
    "greeting": (GREETINGS, with_greeting),
    "chunks": (CHUNKS, with_chunks),
}


def requests(body: bytes = SMUGGLED) -> Table:
    """Return whole requests, one for each input of a head and of chunks.

    A field is behind the request line in one, and behind the length in another; another
    line end is behind each line. Each request must be refused, must end its connection,
    and must not apply `body`.
    """
    found: Table = {}
    for place, (table, build) in PLACES.items():
        for name, one in table.items():
            for number, sent in enumerate(each_way(build, one.sent, body)):
                key = f"{place}: {name}" + f", {number + 1}" * (number > 0)
                found[key] = Hostile(sent, one.expected)
    return found


def each_way(build: Callable[..., bytes], sent: bytes, body: bytes) -> list[bytes]:
    """Return the requests that a builder makes of one input."""
    if build is with_field:
        return [with_field(sent, body, at) for at in (1, 4)]
    if build is with_line_end:
        return [with_line_end(sent, body, at) for at in range(1, 6)]
    return [build(sent, body)]


# --- HTTP: targets --------------------------------------------------------------------
# A method and a target; the request is whole, so the connection may go on.

TARGETS = expecting(
    400,
    {
        "a cursor past 2**53": b"GET /sync/pull?cursor=9007199254740992",
        "a negative cursor": b"GET /sync/pull?cursor=-1",
        "a cursor of 7,000 digits": b"GET /sync/pull?cursor=" + b"9" * 7000,
        "a limit of 0": b"GET /sync/pull?limit=0",
        "another script's digit": b"GET /sync/pull?limit=%D9%A3",
        "an exponent": b"GET /sync/pull?wait=1e3",
        "NaN seconds": b"GET /sync/pull?wait=nan",
        "a scope that is not UTF-8": b"GET /sync/pull?scope=%ff",
        "a scope with a surrogate": b"GET /sync/pull?scope=%ED%A0%80",
        "half an escape": b"GET /sync/pull?scope=%2",
        "a scope twice": b"GET /sync/pull?scope=a&scope=a",
        "an empty scope": b"GET /sync/snapshot?scope=",
        "a scope of 257 characters": b"GET /sync/snapshot?scope=" + b"x" * 257,
    },
)
TARGETS |= expecting(
    404,
    {
        "no such path": b"GET /nothing",
        "two slashes": b"GET //",
        "a NUL in the path": b"GET /%00%F0%9F%92%A7",
        "the longest path": b"PRI /" + b"x" * 8190,
        "a path that climbs": b"GET /../ws",
        "a path that climbs from another": b"GET /healthz/../x",
        "two slashes before a path": b"GET //healthz",
        "a slash too many at the end": b"GET /sync/push/",
        "the beginning of a path": b"GET /sync",
        "a path in capital letters": b"GET /SYNC/PULL",
    },
)
TARGETS |= expecting(
    405,
    {
        "a push by GET": b"GET /sync/push",
        "a pull by DELETE": b"DELETE /sync/pull",
        "a method in small letters": b"get /healthz",
        "TRACE": b"TRACE /healthz",
        "DELETE": b"DELETE /healthz",
        "a WebSocket by POST": b"POST /ws",
        "the client by PUT": b"PUT /sync/client.js",
    },
)
TARGETS |= expecting(
    410,
    {
        "a cursor above the head": b"GET /sync/pull?cursor=9007199254740991",
        "an unknown epoch": b"GET /sync/pull?cursor=1&epoch=x",
    },
)
TARGETS |= expecting(415, {"a push without a type": b"POST /sync/push"})
TARGETS |= expecting(
    426, {"no upgrade": b"GET /ws?scope=a", "no upgrade and no scope": b"GET /ws"}
)

# Parameters of a target that are malformed, out of their range, or given twice.
_NUMBERS = "%2B1 1_0 %D9%A3 %C2%B2 -1 -0 %201 1%20 1%0B +1 0x1 1e1 null nan inf 1.2.3 ."
_ESCAPES = "%zz % %4 a%FF %ED%A0%80 %C0%AF"
_SCOPES = ["", "x" * 257, *_ESCAPES.split(), "a&scope=a", "a&%73cope=b"]
_QUERIES = [
    *(
        f"/sync/pull?{name}={value}"
        for name in ("cursor", "limit", "wait")
        for value in ["", *_NUMBERS.split()]
    ),
    *(f"/sync/pull?cursor={value}" for value in ("1.5", 2**53, "9" * 30, "9" * 5000)),
    *(f"/sync/pull?limit={value}" for value in ("0", "1.5", "ten")),
    *(
        f"/sync/{name}?scope={scope}"
        for name in ("pull", "snapshot")
        for scope in _SCOPES
    ),
    "/sync/pull?scope=a&cursor=0&scope=b",
    "/sync/pull?cursor=0&cursor=0",
    "/sync/pull?limit=1&limit=2",
    "/sync/pull?wait=0&wait=0",
    "/sync/pull?epoch=&epoch=",
]
QUERIES = expecting(
    400, {query[:60]: f"GET {query}".encode() for query in dict.fromkeys(_QUERIES)}
)

# --- JSON -----------------------------------------------------------------------------
# Bytes that a strict parser refuses, as a body and anywhere else (RFC 8259).

JSON = expecting(
    400,
    {
        # The grammar (§2 to §5).
        "nothing": b"",
        "a blank": b" ",
        "two blanks": b"  ",
        "an open array": b"[{}",
        "an open bracket": b"[",
        "a trailing comma in an array": b"[1,]",
        "a trailing comma in an object": b'{"a":1,}',
        "a key without a value": b'{"a"}',
        "two values": b"[1] 2",
        "two arrays": b"[1][1]",
        "brackets that do not match": b"[}",
        "a comment": b"1 /* one */",
        "a NUL behind the value": b"[{}]\0",
        "a no-break space": b"\xc2\xa01",
        "a cut literal": b"nul",
        "a literal of Python": b"True",
        # Numbers (§6).
        "a leading zero": b"[01]",
        "a plus sign": b"+1",
        "no digit before the point": b".5",
        "no digit after the point": b"1.",
        "hexadecimal": b"0x1",
        "an Arabic digit": "\u0661".encode(),
        "NaN": b"NaN",
        "NaN in an array": b"[NaN]",
        "Infinity": b"Infinity",
        "-Infinity": b"[-Infinity]",
        "1e400": b"1e400",
        "-1e400": b"-1e400",
        "1e999 in an object": b'{"a": 1e999}',
        "310 digits": b"1" * 310,
        "5,000 digits": b"-" + b"9" * 5000,
        "500,000 digits": b"[" + b"9" * 500_000 + b"]",
        # Strings (§7).
        "single quotes": b"['x']",
        "a string without its end": b'"',
        "an escape without its end": b'"\\',
        "an unknown escape": rb'"\x41"',
        "a control character": b'"\x01"',
        "a tab": b'"\t"',
        "a line feed": b'["\n"]',
        "a mebibyte of quotes": b'"' * 2**20,
        "half a surrogate pair, high": rb'["\ud800"]',
        "half a surrogate pair, low": rb'"\udc00"',
        "half a surrogate pair in a key": rb'{"\ud800": 1}',
        "two high surrogates": rb'["\ud800\ud800"]',
        "a surrogate pair in the wrong order": rb'["\udc00\ud800"]',
        # UTF-8 (§8.1).
        "a surrogate in UTF-8": b'["\xed\xa0\x80"]',
        "an overlong encoding": b'"\xc0\xaf"',
        "a byte that UTF-8 never has": b'["\xff"]',
        "Latin-1": b'"\xe9"',
        "a byte order mark": b"\xef\xbb\xbf[{}]",
        "UTF-16": "[1]".encode("utf-16"),
        "UTF-16, little-endian": "[1]".encode("utf-16-le"),
        "UTF-16, big-endian": "[1]".encode("utf-16-be"),
        "UTF-32": "[1]".encode("utf-32"),
        # Depth: 64 levels are the limit. A recursive parser would exhaust its stack.
        "65 levels": b"[" * 65 + b"]" * 65,
        "99,990 levels": b"[" * 99_990 + b"]" * 99_990,
        "90,000 levels without an end": b"[" * 90_000,
        "32,768 levels of both kinds": b'[{"x":' * 2**15,
        "65,536 arrays side by side": b"[]" * 2**16,
    },
)
# A parser that builds these first holds the event loop for 110 to 400 ms.
JSON |= expecting(
    413,
    {
        "a mebibyte of brackets": b"[" * 2**20,
        "a mebibyte of lists": b"[]" * 2**19,
        "a mebibyte of both brackets": b'[{"x":' * 2**17,
        "500,001 numbers": b"[" + b"5," * 500_000 + b"5]",
        "100,001 values": b"[0" + b",0" * 100_000 + b"]",
        "262,144 strings": b'["",",' * 2**17,
    },
)

# Pieces for a long text, on which a parser may spend the square of its size.
JSON_PIECES = tuple(
    rb'" \" "\ [ [" "[ {"a": [] [[] "", 1 \ 1e ] , ",", "[", \\",'.split()
)

# --- Bodies ---------------------------------------------------------------------------
# JSON that is well-formed, but no push; and with 200 arrays that are large or odd, and
# hold no mutation.

BODIES = expecting(
    400,
    {
        "an object": b"{}",
        "a string": b'"[]"',
        "a number": b"5",
        "null": b"null",
        "no mutation": b"[]",
    },
)
BODIES |= expecting(413, {"101 mutations": b"[" + b"5," * 100 + b"5]"})
BODIES |= expecting(
    200,
    {
        "a surrogate pair": rb'["\ud83d\udca7"]',
        "an integer past 64 bits": b"[-9223372036854775809]",
        "64 levels": b"[" * 64 + b"]" * 64,
        "a mebibyte of backslashes": b'["' + b"\\" * (2**20 - 4) + b'"]',
        "a mebibyte of brackets in a string": b'["' + b"[" * (2**20 - 4) + b'"]',
        "a mebibyte of blanks": b"[5" + b" " * (2**20 - 3) + b"]",
        "of two ids the last one counts": b'[{"id":"x","id":1,"name":"x"}]',
    },
)

# --- Mutations ------------------------------------------------------------------------
# An element of a push; it fails alone. Its id, where it has a good one, is "x".

MUTATIONS = expecting(
    "invalid_mutation",
    {
        "null": b"null",
        "a number": b"5",
        "a string": b'"x"',
        "an array": b"[]",
        "an empty object": b"{}",
        "an array of a mutation": b'[{"id":"x","name":"x"}]',
        "no id": b'{"name":"x"}',
        "an id of null": b'{"id":null,"name":"x"}',
        "a number as an id": b'{"id":5,"name":"x"}',
        "an empty id": b'{"id":"","name":"x"}',
        "an id of 129 characters": b'{"id":"%b","name":"x"}' % (b"x" * 129),
        "no name": b'{"id":"x"}',
        "a number as a name": b'{"id":"x","name":5}',
        "an array as a name": b'{"id":"x","name":[]}',
        "an empty scope": b'{"id":"x","name":"x","scope":""}',
        "a scope of 257 characters": (
            b'{"id":"x","name":"x","scope":"%b"}' % (b"x" * 257)
        ),
    },
)

# --- WebSocket: handshakes ------------------------------------------------------------

KEY = b"dGhlIHNhbXBsZSBub25jZQ=="  # of RFC 6455 §1.3
UPGRADE = assemble(
    [
        b"GET /ws?scope=a HTTP/1.1",
        HOST,
        b"Connection: keep-alive, Upgrade",
        b"Upgrade: WebSocket",
        b"Sec-WebSocket-Version: 13",
        b"Sec-WebSocket-Key: " + KEY,
    ],
    b"",
)


def _instead(expected: int, changes: dict[str, tuple[bytes, bytes]]) -> Table:
    """Return handshakes in which one part is replaced by another."""
    table: Table = {}
    for name, (part, other) in changes.items():
        assert part in UPGRADE
        table[name] = Hostile(UPGRADE.replace(part, other), expected)
    return table


# Whole requests (RFC 6455 §4.1).
HANDSHAKES = _instead(
    400,
    {
        "a short key": (KEY, b"x"),
        "a long key": (KEY, b"x" * 24),
        "a key of 10 bytes": (KEY, b"dGhlIHNhbXBsZQ=="),
        "a key that is not base64": (KEY, b"dGhlIHNhbXBsZSBub25j*Q=="),
        "a key with bits to spare": (KEY, KEY[:-3] + b"R=="),
        "an empty key": (KEY, b""),
        "no key": (b"Sec-WebSocket-Key", b"X-Key"),
        "two keys": (KEY, KEY + b"\r\nSec-WebSocket-Key: " + KEY),
        "two versions": (b": 13", b": 13\r\nSec-WebSocket-Version: 13"),
        "HTTP/1.0": (b"HTTP/1.1", b"HTTP/1.0"),
        "a body": (b"\r\n\r\n", b"\r\nContent-Length: 5\r\n\r\n[1,2]"),
        "an empty scope": (b"scope=a", b"scope="),
        "a scope that is not UTF-8": (b"scope=a", b"scope=%ff"),
        "a scope of 257 characters": (b"scope=a", b"scope=" + b"x" * 257),
        "two scopes": (b"scope=a", b"scope=a&scope=b"),
    },
)
HANDSHAKES |= _instead(405, {"POST": (b"GET", b"POST"), "PUT": (b"GET", b"PUT")})
HANDSHAKES |= _instead(
    426,
    {
        "another upgrade": (b"Upgrade: WebSocket", b"Upgrade: h2c"),
        "no upgrade in Connection": (b", Upgrade", b""),
        "an empty upgrade": (b"Upgrade: WebSocket", b"Upgrade: "),
        "no upgrade at all": (b"Upgrade: WebSocket", b"X: y"),
        "an older version": (b": 13", b": 8"),
        "another version": (b": 13", b": 12"),
    },
)

# --- WebSocket: frames ----------------------------------------------------------------
# Bytes behind a handshake, and the code that the server closes with (RFC 6455 §5,
# §7.4).

TEXT, BINARY, CLOSE, PING = 0x81, 0x82, 0x88, 0x89
FIRST_TEXT, FIRST_BINARY, MORE, LAST = 0x01, 0x02, 0x00, 0x80  # of a fragmented message

FRAMES = expecting(
    1002,
    {
        "RSV1": frame(0xC1, b"x"),
        "RSV2": frame(0xA1, b"x"),
        "RSV3": frame(0x91, b"x"),
        "RSV1 and RSV3": frame(0xD1, b"x"),
        "RSV2 and RSV3": frame(0xB1, b"x"),
        "RSV1 and RSV3 of a binary message": frame(0xD2, b"x"),
        "RSV1 and RSV2 of a ping": frame(0xE9, b"x"),
        "all reserved bits of a close": frame(0xF8, b"\x03\xe8"),
        "no mask": b"\x81\x01x",
        "a ping without a mask": b"\x89\x00",
        "a ping in fragments": frame(0x09),
        "a pong in fragments": frame(0x0A, b"x"),
        "a close in fragments": frame(0x08),
        "a ping of 126 bytes": frame(PING, bytes(126)),
        "a close of 126 bytes": frame(CLOSE, b"\x03\xe8" + b"x" * 124),
        "a ping of eight length bytes": b"\x89\xff",
        "two bytes for a short length": b"\x81\xfe\x00\x7d",
        "eight bytes for a short length": b"\x81\xff\0\0\0\0\0\0\xff\xff",
        "a length past 63 bits": b"\x82\xff\x80\0\0\0\0\0\0\0",
        "the end of no message": frame(LAST, b"x"),
        "the middle of no message": frame(MORE, b"x"),
        "a message inside another": frame(FIRST_TEXT, b"x") + frame(TEXT, b"y"),
        "fragments inside another message": frame(FIRST_TEXT, b"x") * 2,
        "a binary message inside another": frame(FIRST_TEXT) + frame(BINARY),
        "a close of one byte": frame(CLOSE, b"\x03"),
    },
)
FRAMES |= expecting(
    1002,
    {
        f"the reserved opcode {opcode} {payload.decode()}": frame(
            0x80 | opcode, payload
        )
        for opcode in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)
        for payload in (b"", b"x")
    },
)
FRAMES |= expecting(
    1002,
    {
        f"a close with {code}": frame(CLOSE, code.to_bytes(2, "big"))
        for code in (
            *(0, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999),
            *(5000, 65535),
        )
    },
)
FRAMES |= expecting(
    1003,
    {
        "a binary message": frame(BINARY),
        "a large binary message": frame(BINARY, b"\xff" * 70_000),
        "a binary message in fragments": frame(FIRST_BINARY, b"[") + frame(LAST, b"]"),
    },
)
FRAMES |= expecting(
    1007,
    {
        "a byte that UTF-8 never has": frame(TEXT, b"\xff"),
        "a cut character": frame(TEXT, b'"\xe2\x82'),
        "a cut character in fragments": (
            frame(FIRST_TEXT, b"\xf0\x90") + frame(LAST, b"\x80")
        ),
        "an overlong character": frame(TEXT, b"\xc0\x80"),
        "a character past U+10FFFF": frame(TEXT, b"\xf4\x90\x80\x80"),
        # These do not wait for the rest of the message.
        "a wrong byte in a first fragment": frame(FIRST_TEXT, b"\xc0"),
        "a surrogate in a first fragment": frame(FIRST_TEXT, b"\xed\xa0\x80"),
        "a wrong byte over a border": frame(FIRST_TEXT, b"\xe2")
        + frame(MORE, b"\x82\xe2"),
        "a wrong byte behind a border": frame(FIRST_TEXT, b"\xf4")
        + frame(MORE, b"\x90"),
        "a close whose reason is not UTF-8": frame(CLOSE, b"\x03\xe8\xff"),
    },
)
FRAMES |= expecting(
    1009,
    {
        "a length past 1 MiB": b"\x81\xff\0\0\0\0\0\x10\0\1",
        "the greatest length": b"\x82\xff\x7f" + b"\xff" * 7,
        "1 MiB and a byte in fragments": (
            frame(FIRST_TEXT, b" " * 2**20) + frame(LAST, b" ")
        ),
    },
)

# --- WebSocket: texts that are not UTF-8 ----------------------------------------------
# Bytes in the middle of a text, and the code that the server closes with. The text is
# refused as soon as it is wrong (RFC 6455 §8.1).

NOT_UTF_8 = expecting(
    1007,
    {
        "a first continuation byte": b"\x80",
        "a last continuation byte": b"\xbf",
        "all continuation bytes": bytes(range(0x80, 0xC0)),
        "a byte that begins two": b"\xc3 ",
        "a byte that begins three": b"\xe0 ",
        "a byte that begins four": b"\xf0 ",
        "a character of two without its last byte": b"\xc3",
        "a character of three without its last byte": b"\xef\xbf",
        "a character of four without its last byte": b"\xf0\x90\x80",
        "FE": b"\xfe",
        "FF": b"\xff",
        "a slash in two bytes": b"\xc0\xaf",
        "a slash in three bytes": b"\xe0\x80\xaf",
        "a slash in four bytes": b"\xf0\x80\x80\xaf",
        "a slash in five bytes": b"\xf8\x80\x80\x80\xaf",
        "a slash in six bytes": b"\xfc\x80\x80\x80\x80\xaf",
        "U+007F in two bytes": b"\xc1\xbf",
        "U+07FF in three bytes": b"\xe0\x9f\xbf",
        "U+FFFF in four bytes": b"\xf0\x8f\xbf\xbf",
        "a NUL in two bytes": b"\xc0\x80",
        "the first surrogate": b"\xed\xa0\x80",
        "the last surrogate": b"\xed\xbf\xbf",
        "a pair of surrogates": b"\xed\xa0\x80\xed\xb0\x80",
        "U+110000": b"\xf4\x90\x80\x80",
        "U+1FFFFF": b"\xf7\xbf\xbf\xbf",
        "a character in five bytes": b"\xf8\x88\x80\x80\x80",
        "a character in six bytes": b"\xfc\x84\x80\x80\x80\x80",
    },
)

# --- WebSocket: messages --------------------------------------------------------------
# The text of a message, and the code of the error that answers it; the session goes on.

MESSAGES = expecting(
    "unknown_topic",
    {
        "a topic of the application's": b'{"topic":"chat","data":[1]}',
        "an empty topic": b'{"topic":""}',
        "a topic of the server's": b'{"topic":"sync:a"}',
        "a topic of no scope": b'{"topic":"sync:"}',
        "a topic in other letters": b'{"topic":"Subscribe","data":{}}',
    },
)
MESSAGES |= expecting(
    "invalid_message",
    {
        "nothing": b"",
        "no JSON": b"hello",
        "a cut object": b"{",
        "a list": b"[]",
        "a number": b"5",
        "null": b"null",
        "no topic": b'{"data":{}}',
        "a topic that is no string": b'{"topic":5}',
        "a topic of null": b'{"topic":null}',
        "a topic of half a surrogate pair": rb'{"topic":"\ud800"}',
        "a NUL in a string": b'"\0"',
        "NaN": b'{"topic":"x","data":NaN}',
        "a number that becomes infinite": b'{"topic":"x","data":1e400}',
        "5,000 digits": b'{"topic":"x","data":%b}' % (b"9" * 5000),
        "a byte order mark": b"\xef\xbb\xbf{}",
        "65 levels": b"[" * 64 + b"{}" + b"]" * 64,
        "65 levels of data": b'{"topic":"x","data":%b}' % (b"[" * 64 + b"]" * 64),
        "999 open brackets": b"[" * 999,
        "90,000 levels": (b'{"topic":"x","data":%b}' % (b"[" * 90_000 + b"]" * 90_000)),
        "data that is no object": b'{"topic":"subscribe","data":[]}',
        "an empty scope": b'{"topic":"subscribe","data":{"scope":""}}',
        "a scope of 257 characters": (
            b'{"topic":"subscribe","data":{"scope":"%b"}}' % (b"x" * 257)
        ),
        "a scope that is no string": b'{"topic":"subscribe","data":{"scope":7}}',
        "an empty scope to unsubscribe": b'{"topic":"unsubscribe","data":{"scope":""}}',
    },
)

# --- Fragments ------------------------------------------------------------------------
# Bytes that mean something to a parser, for a fuzzer to insert anywhere.

FRAGMENTS = (
    *(b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b"%", b"\x7f"),
    *(b"\xff\xfe", b"\xc2\x85", b"\r\n\r\n", b"0\r\n\r\n"),
    *(b",", b"\x0b", b"\xa0", b"\xff", b"HTTP/1.0"),
    *(b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n"),
    *(b"9" * 99, b"x" * 8192, b"A: b\r\n" * 101, b"GET / HTTP/1.1\r\n"),
)
