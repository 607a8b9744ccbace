"""The benchmark's peers: the same service as one would write it with aiohttp, or with
FastAPI.

Push, pull and live hints over SQLite: WAL, synchronous=FULL, one thread for the
database, one transaction a push; one task tells the subscribers, and merges what they
have not been told yet. No snapshots, no epochs, no changes in hints. bench.py starts
it: `bench_peers.py aiohttp --db FILE`."""

import argparse
import asyncio
import json
import socket
import sqlite3
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Annotated, Any

Json = dict[str, Any]
Send = Callable[[str], Awaitable[None]]

SCHEMA = """
    CREATE TABLE IF NOT EXISTS changes (cursor INTEGER PRIMARY KEY AUTOINCREMENT,
        scope TEXT NOT NULL, time TEXT NOT NULL, data TEXT NOT NULL);
    CREATE INDEX IF NOT EXISTS changes_of_scope ON changes (scope, cursor);
    CREATE TABLE IF NOT EXISTS mutations (scope TEXT NOT NULL, id TEXT NOT NULL,
        cursor INTEGER NOT NULL, PRIMARY KEY (scope, id)) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS todos (scope TEXT NOT NULL, id TEXT NOT NULL,\
 title TEXT NOT NULL,
        completed INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (scope, id)) WITHOUT ROWID;
"""


class Store:
    """The change log. It blocks, so it has a thread of its own: call it through
    `run`."""

    def __init__(self, path: str) -> None:
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

    def push(self, mutations: list[Json]) -> list[Json]:
        now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        with self.db:  # commits, or rolls back
            self.db.execute("BEGIN IMMEDIATE")
            return [self._apply(mutation, now) for mutation in mutations]

    def _apply(self, mutation: Json, now: str) -> Json:
        scope, key, args = mutation["scope"], mutation["id"], mutation["args"]
        sql = """
            SELECT cursor, time, data FROM mutations JOIN changes USING (cursor)
            WHERE mutations.scope = ? AND id = ?
        """
        if seen := self.db.execute(sql, (scope, key)).fetchone():
            return applied(scope, seen[0], seen[1], json.loads(seen[2])) | {
                "duplicate": True
            }
        match mutation["name"], args:
            case "todo.create", {"id": str(todo), "title": str(title)}:
                data = {
                    "op": "create",
                    "todo": {"id": todo, "title": title, "completed": False},
                }
            case _:
                return {
                    "ok": False,
                    "code": "invalid_mutation",
                    "error": "only todo.create",
                }
        sql = "INSERT OR REPLACE INTO todos (scope, id, title) VALUES (?, ?, ?)"
        self.db.execute(sql, (scope, todo, title))
        sql = "INSERT INTO changes (scope, time, data) VALUES (?, ?, ?)"
        cursor = self.db.execute(sql, (scope, now, json.dumps(data))).lastrowid
        self.db.execute("INSERT INTO mutations VALUES (?, ?, ?)", (scope, key, cursor))
        return applied(scope, cursor, now, data)

    def pull(self, scope: str, cursor: int, limit: int) -> Json:
        sql = """
            SELECT cursor, time, data FROM changes WHERE scope = ? AND cursor > ?
            ORDER BY cursor LIMIT ?
        """
        rows = self.db.execute(sql, (scope, cursor, limit + 1)).fetchall()
        changes = [
            {"cursor": at, "scope": scope, "time": time, "data": json.loads(data)}
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

    def is_name(value: Any, longest: int) -> bool:
        return isinstance(value, str) and 1 <= len(value) <= longest

    def checked(value: Any) -> Json:
        given = value if isinstance(value, dict) else {}
        mutation = {"scope": "_default", "args": None} | given
        limits = ("id", 128), ("name", 128), ("scope", 256)
        if not all(is_name(mutation.get(field), longest) for field, longest in limits):
            raise ValueError("a mutation has an id and a name")
        return mutation

    async def push(request: web.Request) -> web.Response:
        try:
            body = await request.json()
            if not isinstance(body, list) or not 1 <= len(body) <= 100:
                raise ValueError("1 to 100 mutations")
            mutations = [checked(value) for value in body]
        except ValueError as error:
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


# --- FastAPI --------------------------------------------------------------------------


def run_fastapi(path: str, listener: socket.socket) -> None:
    import uvicorn
    from fastapi import Body, FastAPI, Query, WebSocket, WebSocketDisconnect
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
        results = await store.run(
            store.push, [mutation.model_dump() for mutation in mutations]
        )
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

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(live.run())
        yield
        task.cancel()

    app = FastAPI(lifespan=life)
    app.post("/sync/push")(push)
    app.get("/sync/pull", response_model=None)(pull)
    app.websocket("/ws")(websocket)
    config = uvicorn.Config(app, log_level="warning", access_log=False)
    uvicorn.Server(config).run(sockets=[listener])


def main() -> None:
    parser = argparse.ArgumentParser(description="A peer of the benchmark.")
    parser.add_argument("peer", choices=["aiohttp", "FastAPI"])
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
    run = {"aiohttp": run_aiohttp, "FastAPI": run_fastapi}[args.peer]
    run(args.db, listener)


if __name__ == "__main__":
    main()
