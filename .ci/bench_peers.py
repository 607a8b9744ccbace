"""The benchmark's peers: the same service as one would write it with aiohttp, with
FastAPI, or with what is fastest today: Starlette with msgspec.

Push, pull and live hints over SQLite: WAL, synchronous=FULL, one thread for the
database, one transaction a push; one task tells the subscribers, and merges what they
have not been told yet. No snapshots, no epochs, no changes in hints. Their `apply` is
the demo's own, so they check what it checks. bench.py starts it: `bench_peers.py
aiohttp --db FILE`."""

import argparse
import asyncio
import json
import socket
import sqlite3
import sys
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mizusync import TODO_SCHEMA, SyncError, apply_todo

Json = dict[str, Any]
Send = Callable[[str], Awaitable[None]]

SCHEMA = (
    TODO_SCHEMA
    + """
    CREATE TABLE IF NOT EXISTS changes (cursor INTEGER PRIMARY KEY AUTOINCREMENT,
        scope TEXT NOT NULL, time TEXT NOT NULL, data TEXT NOT NULL);
    CREATE INDEX IF NOT EXISTS changes_of_scope ON changes (scope, cursor);
    CREATE TABLE IF NOT EXISTS mutations (scope TEXT NOT NULL, id TEXT NOT NULL,
        cursor INTEGER NOT NULL, PRIMARY KEY (scope, id)) WITHOUT ROWID;
"""
)


class Store:
    """The change log. It blocks, so it has a thread of its own: call it through
    `run`."""

    def __init__(
        self,
        path: str,
        encode: Callable[[Any], str] = json.dumps,
        decode: Callable[[str], Any] = json.loads,
    ) -> None:
        self.encode, self.decode = encode, decode  # of a change's data
        self.thread = ThreadPoolExecutor(1)
        self.db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self.db.execute("PRAGMA journal_mode = WAL")
        self.db.execute("PRAGMA synchronous = FULL")
        self.db.executescript(SCHEMA)

    async def run(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(
            self.thread, work, *arguments
        )

    def head(self, scope: str) -> int:
        sql = "SELECT coalesce(max(cursor), 0) FROM changes WHERE scope = ?"
        return int(self.db.execute(sql, (scope,)).fetchone()[0])

    def push(self, mutations: list[Any]) -> list[Json]:
        """Apply mutations: objects with the fields that `apply` reads."""
        now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        with self.db:  # commits, or rolls back
            self.db.execute("BEGIN IMMEDIATE")
            return [self._push_one(mutation, now) for mutation in mutations]

    def _push_one(self, mutation: Any, now: str) -> Json:
        scope, key = mutation.scope, mutation.id
        sql = """
            SELECT cursor, time, data FROM mutations JOIN changes USING (cursor)
            WHERE mutations.scope = ? AND id = ?
        """
        if seen := self.db.execute(sql, (scope, key)).fetchone():
            result = applied(scope, seen[0], seen[1], self.decode(seen[2]))
            return result | {"duplicate": True}
        try:
            # It checks before it writes, so a refusal has nothing to undo.
            (data,) = apply_todo(self.db, mutation)
        except SyncError as refusal:
            return {"ok": False, "code": refusal.code, "error": str(refusal)}
        sql = "INSERT INTO changes (scope, time, data) VALUES (?, ?, ?)"
        cursor = self.db.execute(sql, (scope, now, self.encode(data))).lastrowid
        self.db.execute("INSERT INTO mutations VALUES (?, ?, ?)", (scope, key, cursor))
        return applied(scope, cursor, now, data)

    def pull(self, scope: str, cursor: int, limit: int) -> Json:
        sql = """
            SELECT cursor, time, data FROM changes WHERE scope = ? AND cursor > ?
            ORDER BY cursor LIMIT ?
        """
        rows = self.db.execute(sql, (scope, cursor, limit + 1)).fetchall()
        changes = [
            {"cursor": at, "scope": scope, "time": time, "data": self.decode(data)}
            for at, time, data in rows[:limit]
        ]
        head = changes[-1]["cursor"] if changes else cursor
        return {"changes": changes, "cursor": head, "hasMore": len(rows) > limit}


def applied(scope: str, cursor: int | None, time: str, data: Json) -> Json:
    change = {"cursor": cursor, "scope": scope, "time": time, "data": data}
    return {"ok": True, "cursor": cursor, "changes": [change]}


class Live:
    """The subscribers of each scope: the framework's methods that send them a text."""

    def __init__(self) -> None:
        self.followers = defaultdict[str, set[Send]](set)
        # of each scope the newest cursor that was not sent yet
        self.news: dict[str, int] = {}
        self.wake = asyncio.Event()

    def publish(self, results: list[Json]) -> None:
        for result in results:
            if result["ok"]:
                self.news[result["changes"][0]["scope"]] = result["cursor"]
        self.wake.set()

    async def run(self) -> None:
        while await self.wake.wait():
            self.wake.clear()
            news, self.news = self.news, {}
            for scope, cursor in news.items():
                text = hint(scope, cursor)
                for send in list(self.followers[scope]):
                    try:
                        await send(text)
                    except Exception:
                        # It is gone; each framework has errors of its own for that.
                        self.followers[scope].discard(send)


def hint(scope: str, cursor: int) -> str:
    return json.dumps({"topic": f"sync:{scope}", "data": {"cursor": cursor}})


# --- aiohttp --------------------------------------------------------------------------


def run_aiohttp(path: str, listener: socket.socket) -> None:
    from aiohttp import WSMsgType, web

    store, live = Store(path), Live()

    @dataclass
    class Mutation:
        id: str
        name: str
        scope: str = "_default"
        args: Any = None

        def __post_init__(self) -> None:
            for value, longest in ((self.id, 128), (self.name, 128), (self.scope, 256)):
                if not isinstance(value, str) or not 1 <= len(value) <= longest:
                    raise ValueError("a mutation has an id and a name")

    async def push(request: web.Request) -> web.Response:
        try:
            body = await request.json()
            if not isinstance(body, list) or not 1 <= len(body) <= 100:
                raise ValueError("1 to 100 mutations")
            mutations = [Mutation(**value) for value in body]
        except (TypeError, ValueError) as error:
            raise web.HTTPBadRequest(text=str(error)) from None
        results = await store.run(store.push, mutations)
        live.publish(results)
        return web.json_response(results)

    async def pull(request: web.Request) -> web.Response:
        scope = request.query.get("scope", "_default")
        try:
            cursor = int(request.query.get("cursor", 0))
            limit = int(request.query.get("limit", 100))
            if cursor < 0 or limit < 1:
                raise ValueError
        except ValueError:
            raise web.HTTPBadRequest(text="cursor and limit are numbers") from None
        return web.json_response(
            await store.run(store.pull, scope, cursor, min(limit, 1000))
        )

    async def websocket(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        scope = request.query.get("scope", "_default")
        send = socket.send_str  # one object: a bound method is made anew each time
        try:
            async for message in socket:
                if message.type == WSMsgType.TEXT:
                    if json.loads(message.data).get("topic") == "subscribe":
                        live.followers[scope].add(send)
                        await send(hint(scope, await store.run(store.head, scope)))
                    else:
                        await socket.send_json({"topic": "error", "data": {}})
        finally:
            live.followers[scope].discard(send)
        return socket

    async def life(app: web.Application) -> AsyncIterator[None]:
        task = asyncio.create_task(live.run())
        yield
        task.cancel()

    app = web.Application()
    app.cleanup_ctx.append(life)
    app.router.add_post("/sync/push", push)
    app.router.add_get("/sync/pull", pull)
    app.router.add_get("/ws", websocket)
    web.run_app(app, sock=listener, access_log=None, print=None, backlog=1024)


# --- Starlette's sockets, which are FastAPI's too -------------------------------------


async def follow(socket: Any, scope: str, store: Store, live: Live) -> None:
    """Serve a WebSocket until it ends: subscribe it when it asks."""
    from starlette.websockets import WebSocketDisconnect

    await socket.accept()
    send = socket.send_text  # one object: a bound method is made anew each time
    try:
        while True:
            message = await socket.receive_json()
            if message.get("topic") == "subscribe":
                live.followers[scope].add(send)
                await send(hint(scope, await store.run(store.head, scope)))
            else:
                await socket.send_json({"topic": "error", "data": {}})
    except WebSocketDisconnect:
        pass
    finally:
        live.followers[scope].discard(send)


def lifespan_of(live: Live) -> Any:
    """Return what runs the task of the hints as long as the application."""

    @asynccontextmanager
    async def life(app: Any) -> AsyncIterator[None]:
        task = asyncio.create_task(live.run())
        yield
        task.cancel()

    return life


# --- FastAPI --------------------------------------------------------------------------


def run_fastapi(path: str, listener: socket.socket) -> None:
    import uvicorn
    from fastapi import Body, FastAPI, Query, WebSocket
    from fastapi.responses import JSONResponse
    from pydantic import BaseModel, Field

    store, live = Store(path), Live()

    class Mutation(BaseModel):
        id: str = Field(min_length=1, max_length=128)
        scope: str = Field("_default", min_length=1, max_length=256)
        name: str = Field(min_length=1, max_length=128)
        args: Any = None

    async def push(
        mutations: Annotated[list[Mutation], Body(min_length=1, max_length=100)],
    ) -> JSONResponse:
        results = await store.run(store.push, mutations)
        live.publish(results)
        return JSONResponse(results)

    async def pull(
        scope: str = "_default",
        cursor: Annotated[int, Query(ge=0)] = 0,
        limit: Annotated[int, Query(ge=1)] = 100,
    ) -> JSONResponse:
        return JSONResponse(
            await store.run(store.pull, scope, cursor, min(limit, 1000))
        )

    async def websocket(socket: WebSocket, scope: str = "_default") -> None:
        await follow(socket, scope, store, live)

    app = FastAPI(lifespan=lifespan_of(live))
    app.post("/sync/push")(push)
    app.get("/sync/pull", response_model=None)(pull)
    app.websocket("/ws")(websocket)
    config = uvicorn.Config(app, log_level="warning", access_log=False)
    uvicorn.Server(config).run(sockets=[listener])


# --- Starlette, msgspec ---------------------------------------------------------------
# uvicorn with uvloop and httptools. JSON goes from bytes to checked structs in one
# step, and stored JSON goes out as it is.


def run_starlette(path: str, listener: socket.socket) -> None:
    import msgspec
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route, WebSocketRoute
    from starlette.websockets import WebSocket

    encoder = msgspec.json.Encoder()
    store = Store(
        path,
        encode=lambda data: encoder.encode(data).decode(),
        decode=lambda text: msgspec.Raw(text.encode()),
    )
    live = Live()
    Name = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
    Scope = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]

    class Mutation(msgspec.Struct, gc=False):
        id: Name
        name: Name
        scope: Scope = "_default"
        args: Any = None

    Push = Annotated[list[Mutation], msgspec.Meta(min_length=1, max_length=100)]
    decoder = msgspec.json.Decoder(Push)

    def answer(value: Any) -> Response:
        return Response(encoder.encode(value), media_type="application/json")

    async def push(request: Request) -> Response:
        try:
            mutations = decoder.decode(await request.body())
        except msgspec.ValidationError as error:
            return Response(str(error), 400)
        results = await store.run(store.push, mutations)
        live.publish(results)
        return answer(results)

    async def pull(request: Request) -> Response:
        query = request.query_params
        try:
            cursor = int(query.get("cursor", 0))
            limit = int(query.get("limit", 100))
        except ValueError:
            cursor = limit = -1
        if cursor < 0 or limit < 1:
            return Response("cursor and limit are numbers", 400)
        scope = query.get("scope", "_default")
        return answer(await store.run(store.pull, scope, cursor, min(limit, 1000)))

    async def websocket(socket: WebSocket) -> None:
        scope = socket.query_params.get("scope", "_default")
        await follow(socket, scope, store, live)

    routes = [
        Route("/sync/push", push, methods=["POST"]),
        Route("/sync/pull", pull),
        WebSocketRoute("/ws", websocket),
    ]
    app = Starlette(routes=routes, lifespan=lifespan_of(live))
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, loop="uvloop", http="httptools"
    )
    uvicorn.Server(config).run(sockets=[listener])


PEERS = {"aiohttp": run_aiohttp, "FastAPI": run_fastapi, "Starlette": run_starlette}


def main() -> None:
    parser = argparse.ArgumentParser(description="A peer of the benchmark.")
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--db", default="peer.db")
    args = parser.parse_args()
    # Bound here, and announced: the first clients wait in its backlog until the loop
    # runs.
    listener = socket.create_server(("127.0.0.1", args.port), backlog=1024)
    # Accepted sockets inherit this. asyncio sets it only on a socket that was made with
    # IPPROTO_TCP; without it each answer of uvicorn's would wait 40 ms for an ACK.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    PEERS[args.peer](args.db, listener)


if __name__ == "__main__":
    main()
