"""The client of the tests, bench, fuzz and soak: HTTP/1.1 and WebSocket, from the RFCs.

The functions take bytes and return values: no socket, no clock. RawClient is a blocking
socket on top of them; the benchmark reads many of them in one loop. Nothing here comes
from mizusync, so that no mistake of the server's is made twice and cancels itself."""

from __future__ import annotations

import json
import re
import socket
import struct
from collections.abc import Iterable, Mapping
from contextlib import suppress
from itertools import pairwise
from typing import Any, NamedTuple
from urllib.parse import urlencode

PATIENCE = 20.0  # seconds until an answer counts as never
READ_SIZE = 1 << 18  # bytes
TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10
KEY = "dGhlIHNhbXBsZSBub25jZQ=="  # with its answer in RFC 6455 §1.3
ACCEPT = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="

STATUS_LINE = re.compile(rb"HTTP/1\.1 ([1-5][0-9]{2}) [ -~]*")
FIELD_LINE = re.compile(rb"([A-Za-z0-9-]+): ([!-~]([ -~]*[!-~])?)")
CONTENT_LENGTH = re.compile(rb"\r\ncontent-length: *([0-9]+)", re.IGNORECASE)
NO_BODY = (101, 204, 304)  # besides 100; a Content-Length would be wrong in them


class Malformed(AssertionError):
    """Raised for bytes that no server may send."""


class Ended(ConnectionError):
    """Raised where the server has closed the connection, in order."""


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


# --- Bytes to send --------------------------------------------------------------------


def raw(*lines: bytes, body: bytes = b"") -> bytes:
    """Return a request: its lines, an empty one, its body."""
    return b"\r\n".join((*lines, b"", b"")) + body


def chunked(*parts: bytes, trailer: bytes = b"") -> bytes:
    """Return a body in chunks, one for each part (RFC 9112 §7.1)."""
    chunks = [b"%x\r\n%b\r\n" % (len(part), part) for part in (*parts, b"")]
    return b"".join(chunks)[:-2] + trailer + b"\r\n"


def masked(
    opcode: int, payload: bytes, fin: bool = True, key: bytes = b"\x37\xfa\x21\x3d"
) -> bytes:
    """Return a client's frame, its length in the shortest form (RFC 6455 §5.2).

    The opcode may have reserved bits above it.
    """
    size = len(payload)
    head = bytearray([fin << 7 | opcode])
    if size < 126:
        head.append(0x80 | size)
    elif size < 2**16:
        head += b"\xfe" + size.to_bytes(2, "big")
    else:
        head += b"\xff" + size.to_bytes(8, "big")
    pad = int.from_bytes((key * (size // 4 + 1))[:size], "big")
    hidden = int.from_bytes(payload, "big") ^ pad
    return bytes(head) + key + hidden.to_bytes(size, "big")


def pieces(data: bytes, cuts: Iterable[int]) -> list[bytes]:
    """Return the same bytes, cut at these places; the first and last may be empty.

    A place behind the end is counted on from the start.
    """
    places = [0, *sorted({cut % (len(data) + 1) for cut in cuts}), len(data)]
    return [data[start:end] for start, end in pairwise(places)]


# --- Bytes that came ------------------------------------------------------------------


def measure_reply(buffer: bytearray, *, bodiless: bool = False) -> int:
    """Return the bytes of the first reply; return 0 until its head is complete.

    This is all that the benchmark parses of a reply, so it does not check the rest.
    """
    end = buffer.find(b"\r\n\r\n")
    if end < 0:
        return 0
    found = None if bodiless else CONTENT_LENGTH.search(buffer, 0, end)
    return end + 4 + (int(found[1]) if found else 0)


def take_reply(buffer: bytearray, *, bodiless: bool = False) -> Reply | None:
    """Take one reply off the front of `buffer`; return None until it is complete.

    A `bodiless` reply is that to a HEAD. Raise Malformed for a status line or a header
    that breaks the grammar, a header that comes twice, or a missing or wrong
    Content-Length (RFC 9110, RFC 9112).
    """
    size = measure_reply(buffer, bodiless=bodiless)
    if not 0 < size <= len(buffer):
        return None
    head, _, body = bytes(buffer[:size]).partition(b"\r\n\r\n")
    line, *lines = head.split(b"\r\n")
    found = STATUS_LINE.fullmatch(line)
    if not found:
        raise Malformed(f"no status line: {head!r}")
    status = int(found[1])
    headers: dict[str, str] = {}
    for line in lines:
        field = FIELD_LINE.fullmatch(line)
        if not field:
            raise Malformed(f"no header: {line!r}")
        name = field[1].decode().lower()
        if name in headers:
            raise Malformed(f"a header twice: {head!r}")
        headers[name] = field[2].decode()
    has_length = "content-length" in headers
    if has_length and not headers["content-length"].isdecimal():
        raise Malformed(f"no length: {head!r}")
    may_have_length = status >= 200 and status not in NO_BODY
    if has_length != may_have_length:
        raise Malformed(f"a length where none is, or none where one is: {head!r}")
    del buffer[:size]
    return Reply(status, headers, body)


def take_frame(buffer: bytearray) -> Frame | None:
    """Take a server's frame off the front of `buffer`, once it is complete.

    Return None until then.
    Raise Malformed for a frame that breaks RFC 6455 §5.2 or §5.5.
    """
    if len(buffer) < 2:
        return None
    first, size = buffer[0], buffer[1]
    start = 2
    if first & 0x70:
        raise Malformed("an extension that was never agreed on")
    if size > 127:
        raise Malformed("a server masks nothing (RFC 6455 §5.1)")
    if first & 8 and (size > 125 or first < 0x80):
        raise Malformed("a control frame that is long, or in fragments")
    if size > 125:
        start, shortest = (4, 126) if size == 126 else (10, 2**16)
        if len(buffer) < start:
            return None
        size = int.from_bytes(buffer[2:start], "big")
        if size < shortest:
            raise Malformed("a length in more bytes than it needs")
    end = start + size
    if len(buffer) < end:
        return None
    payload = bytes(buffer[start:end])
    del buffer[:end]
    return Frame(first & 15, payload, first > 127)


# --- Client ---------------------------------------------------------------------------


class RawClient:
    """A blocking socket that speaks HTTP/1.1 and WebSocket, and checks what comes.

    Its methods raise OSError when the connection fails, Ended (an OSError, too) when
    the server closes it, and TimeoutError after `timeout` seconds. After a timeout a
    read may be tried again: what has come of it stays in `buffer`.
    """

    def __init__(
        self,
        address: tuple[str, int],
        timeout: float = PATIENCE,
        receive_buffer: int = 0,
    ) -> None:
        self.address = address
        self.buffer = bytearray()
        self.sock = socket.socket()
        self.sock.settimeout(timeout)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if receive_buffer:  # in bytes; the connection has to know it when it begins
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        try:
            self.sock.connect(address)
        except OSError:
            self.sock.close()
            raise

    def close(self) -> None:
        """Close the socket; the kernel still sends what was not sent yet."""
        self.sock.close()

    def reset(self) -> None:
        """Close the socket with a reset, without reading what has come."""
        linger = struct.pack("ii", 1, 0)
        with suppress(OSError):  # the server has reset it already
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.sock.close()

    def send(self, data: bytes) -> None:
        """Send all these bytes."""
        self.sock.sendall(data)

    def half_close(self) -> None:
        """Tell the server that nothing more will be sent."""
        self.sock.shutdown(socket.SHUT_WR)

    def fill(self) -> None:
        """Read once into the buffer."""
        data = self.sock.recv(READ_SIZE)
        if not data:
            raise Ended(f"the server closed after {bytes(self.buffer[:500])!r}")
        self.buffer += data

    def ended(self) -> bool:
        """Return whether the server closes next, without a reset or another byte."""
        return not self.buffer and self.sock.recv(1) == b""

    def read_rest(self) -> bytes:
        """Return everything that comes until the server closes, without a reset."""
        with suppress(Ended):
            while True:
                self.fill()
        return bytes(self.buffer)

    # HTTP

    def request(
        self,
        method: str,
        target: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        """Send a request, and return the reply to it."""
        self.send_request(method, target, body, headers)
        return self.read_reply(bodiless=method == "HEAD")

    def send_request(
        self,
        method: str,
        target: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Send a request, a body as JSON."""
        fields = {"Host": "{}:{}".format(*self.address)}
        if body is not None:
            fields["Content-Type"] = "application/json"
            fields["Content-Length"] = str(len(body))
        fields |= headers or {}
        lines = [f"{method} {target} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in fields.items()]
        self.send(raw(*(line.encode() for line in lines), body=body or b""))

    def read_reply(self, *, bodiless: bool = False) -> Reply:
        """Return the next reply."""
        while (reply := take_reply(self.buffer, bodiless=bodiless)) is None:
            self.fill()
        return reply

    def push(
        self, *mutations: Any, headers: Mapping[str, str] | None = None
    ) -> list[Any]:
        """Push the mutations, and return the results."""
        body = json.dumps(mutations).encode()
        reply = self.request("POST", "/sync/push", body, headers)
        assert reply.status == 200, reply
        results: list[Any] = reply.json
        return results

    def pull(self, **parameters: Any) -> Any:
        """Pull, and return the page."""
        reply = self.request("GET", "/sync/pull?" + urlencode(parameters))
        assert reply.status == 200, reply
        return reply.json

    # WebSocket

    def upgrade(
        self, target: str = "/ws", headers: Mapping[str, str] | None = None
    ) -> Reply:
        """Send a handshake, and return the reply, which may be a refusal."""
        fields = {
            "Connection": "Upgrade",
            "Upgrade": "websocket",
            "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Key": KEY,
        }
        fields |= headers or {}
        reply = self.request("GET", target, headers=fields)
        if reply.status == 101 and reply.headers.get("sec-websocket-accept") != ACCEPT:
            raise Malformed(f"not the key's answer: {reply.headers}")
        return reply

    def send_frame(self, opcode: int, payload: bytes, fin: bool = True) -> None:
        """Send one frame."""
        self.send(masked(opcode, payload, fin))

    def read_frame(self) -> Frame:
        """Return the next frame."""
        while (frame := take_frame(self.buffer)) is None:
            self.fill()
        return frame

    def send_message(self, topic: str, data: Any = None) -> None:
        """Send one message of the protocol."""
        self.send_frame(TEXT, json.dumps({"topic": topic, "data": data}).encode())

    def read_message(self) -> Any:
        """Return the next message, parsed; answer the pings before it.

        Raise Ended for a close frame.
        """
        while True:
            frame = self.read_frame()
            if frame.opcode == TEXT:
                return json.loads(frame.payload.decode())
            if frame.opcode == PING:
                self.send_frame(PONG, frame.payload)
            elif frame.opcode == CLOSE:
                raise Ended(f"the server closed with {frame.payload!r}")
            else:
                raise Malformed(f"no frame of this server: {frame}")

    def subscribe(self, **data: Any) -> Any:
        """Subscribe, and return the next message."""
        self.send_message("subscribe", data)
        return self.read_message()

    def quiet(self) -> bool:
        """Return whether the answer to a ping is the next frame."""
        self.send_frame(PING, b"quiet?")
        return self.read_frame() == Frame(PONG, b"quiet?")

    def read_close(self) -> int:
        """Answer the server's close frame, expect the end, and return the code."""
        while (frame := self.read_frame()).opcode != CLOSE:
            pass
        self.send_frame(CLOSE, frame.payload)
        assert self.ended()
        self.close()
        frame.payload[2:].decode()
        return int.from_bytes(frame.payload[:2], "big")
