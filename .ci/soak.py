"""The soak: for minutes, processes are killed at random moments, and no promise may
break.

    16 writers --push--> two servers --+--> one file --> the checks, backups
    1 writer ----lines-> a cron job ---+       |
                                               +--> two servers --pull, hints--> 6
                                               followers

The servers are the todo demo, each killed with SIGKILL, or stopped with SIGTERM, and
started again. The cron job is another process with an engine of its own; its mutations
make several changes, in several scopes. Whatever was not answered is sent again under
the same ids. Every half minute the writers pause, and what everybody was told is
compared with the file. The second half runs with `--keep-changes`, where the server has
it.

By hand: `python .ci/soak.py --seconds 600 --seed 1`. The exit status is 0 or 1; after a
fault the folder with the database and the servers' log stays. The seed decides what is
done; when the threads get to do it, the machine decides, so a fault may need more than
one run to show again."""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import random
import socket
import sqlite3
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, closing, suppress
from itertools import pairwise
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlencode

import trial
from client import RawClient
from trial import Fault, check

HOST = "127.0.0.1"
SCOPES = ("home", "work", "garden & größer")
WRITERS = 16
# seconds until what must happen counts as never: two shared cores can be slow
PATIENCE = 45.0
# seconds until a socket counts as dead: so long that no poll hides a lost hint
SILENCE = 60.0
CHECK_EVERY, TELL_EVERY = 30.0, 10.0  # seconds
BACKUP = (
    "import sqlite3, sys;"
    " sqlite3.connect(sys.argv[1]).execute('VACUUM INTO ?', sys.argv[2:])"
)

Json = dict[str, Any]
Key = tuple[str, str]  # a mutation's scope and id


def check_same(told: Iterable[Any], found: Iterable[Any], sentence: str) -> None:
    """Raise Fault with the first differences of two sets, if there are any."""
    told, found = set(told), set(found)
    told_only = sorted(told - found)
    found_only = sorted(found - told)
    few = f"told only: {told_only[:3]}, found only: {found_only[:3]}"
    check(told == found, f"{sentence}: {len(told ^ found)} differ,", few)


def until(
    condition: Callable[[], object], *sentence: object, patience: float = PATIENCE
) -> None:
    """Wait for the condition; raise Fault with the sentence if it never comes true."""
    deadline = time.monotonic() + patience
    while not condition():
        check(time.monotonic() < deadline, *sentence)
        time.sleep(0.02)


# --- Ledger ---------------------------------------------------------------------------
# What the clients have been told, all of them together. What was told once stays true
# for ever.


Snapshots = list[tuple[int, list[Json]]]  # their cursors and todos


class Ledger:
    """The record of all answers: raise Fault as soon as two of them disagree."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        # whether changes may be trimmed by now, and to how many in a scope
        self.keep = 0
        self.log: dict[int, Json] = {}  # every change that anybody saw, by its cursor
        self.newest = dict.fromkeys(SCOPES, 0)  # their newest cursors among them
        # every mutation that was acknowledged, and its last cursor
        self.applied: dict[Key, int] = {}
        self.owners: dict[int, Key] = {}  # the mutation whose answer had this change
        # mutations that were refused, but an earlier try may still be at work
        self.doubtful: set[Key] = set()
        self.snapshots: dict[str, Snapshots] = {scope: [] for scope in SCOPES}
        self.databases: set[str] = set()  # the names that snapshots gave: one
        self.counts: Counter[str] = Counter()
        # the newest snapshot that was judged: its cursor and todos
        self._folded: dict[str, tuple[int, dict[str, Json]]] = {}

    def count(self, what: str) -> None:
        """Count one more of these."""
        with self.lock:
            self.counts[what] += 1

    def see(self, change: Json) -> None:
        """Take a change that a client saw."""
        cursor, scope = change["cursor"], change["scope"]
        with self.lock:
            known = self.log.setdefault(cursor, change)
            self.newest[scope] = max(self.newest[scope], cursor)
        check(known == change, "a change became another:", known, change)

    def acknowledge(self, mutation: Json, answer: Json, fresh: bool) -> None:
        """Take the answer to one mutation; a fresh one was never sent before."""
        key = mutation["scope"], mutation["id"]
        again = answer.get("duplicate", False)
        both = mutation, answer
        if not answer["ok"]:
            check(answer["code"] in ("not_found", "conflict"), "refused:", *both)
            check(key not in self.applied, "applied, and then refused:", *both)
            if not fresh:
                self.doubtful.add(key)
            return self.count("refused")
        cursor, changes = answer["cursor"], answer.get("changes")
        with self.lock:
            check(again or key not in self.applied, "applied twice:", *both)
            check(not (again and fresh), "a duplicate at first sight:", *both)
            known = self.applied.setdefault(key, cursor)
            check(known == cursor, "it moved:", *both)
            self.counts["duplicates" if again else "acknowledged"] += 1
            if changes is None:
                may_be_trimmed = again and self.keep
                return check(may_be_trimmed, "an answer without changes:", *both)
            newest = changes[-1]["cursor"] if changes else 0
            # A mutation of the cron job may end in another scope, which is not shown.
            may_end_elsewhere = isinstance(mutation["args"], list)
            right = newest == cursor or (newest < cursor and may_end_elsewhere)
            check(right, "not its last change's:", answer)
            for change in changes:
                check(change["scope"] == mutation["scope"], "another scope's:", change)
                self.see(change)
                owner = self.owners.setdefault(change["cursor"], key)
                check(owner == key, "one cursor for two mutations:", owner, *both)
        return None

    def fold(self, scope: str, unseen: set[int]) -> None:
        """Check that each snapshot is the one before it with the changes in between.

        `unseen` changes were trimmed before anybody asked: what folds over them can't
        be judged.
        """
        at, todos = self._folded.get(scope, (0, {}))
        changes = self.log.items()
        log = sorted(c for c, change in changes if change["scope"] == scope and c > at)
        ordered = sorted(self.snapshots[scope], key=lambda snapshot: snapshot[0])
        for cursor, shown in ordered:
            check(cursor >= at, "a snapshot before the last check:", scope, cursor, at)
            if any(at < hidden <= cursor for hidden in unseen):
                todos = {todo["id"]: todo for todo in shown}
                log = [c for c in log if c > cursor]
                self.counts["snapshots not judged"] += 1
            while log and log[0] <= cursor:
                fold_change(todos, self.log[log.pop(0)]["data"])
            what = "a snapshot is not the fold of the log:", scope, cursor
            check(list(todos.values()) == shown, *what, shown, list(todos.values()))
            at = cursor
            self.counts["snapshots judged"] += 1
        self._folded[scope] = at, todos
        self.snapshots[scope].clear()


def fold_change(todos: dict[str, Json], data: Json) -> None:
    """Apply one change of the todo demo's to the todos."""
    if data["op"] == "delete":
        check(todos.pop(data["id"], None), "deleted, but not there:", data)
        return
    todo = data["todo"]
    is_right = (todo["id"] in todos) == (data["op"] == "update")
    check(is_right, "there already, or not there:", data)
    todos[todo["id"]] = todo


# --- Processes ------------------------------------------------------------------------


class Process:
    """A server, or the cron job. It may only end when it is made to."""

    def __init__(self, command: list[str], log: IO[str]) -> None:
        self.command, self.log = command, log
        self.popen: subprocess.Popen[str] | None = None  # None: it is down
        self.options: list[str] = []

    def start(self) -> None:
        """Start it, unless it is up."""
        env = {
            name: value
            for name, value in os.environ.items()
            if name != "MIZUSYNC_TOKEN"
        }
        pipes: Any = {
            "stdin": subprocess.PIPE,
            "stdout": subprocess.PIPE,
            "stderr": self.log,
        }
        command = self.command + self.options
        self.popen = self.popen or subprocess.Popen(
            command, **pipes, text=True, env=env
        )

    def kill(self) -> bool:
        """Send SIGKILL; return whether it was up. The pipes stay open for a reader."""
        if popen := self.popen:
            status = popen.poll()
            check(status is None, "it ended by itself:", self.command, status)
            self.popen = None
            popen.kill()
            popen.wait()
        return popen is not None

    def stop(self) -> bool:
        """Send SIGTERM, once it listens; return whether it was up."""
        if popen := self.popen:
            line = popen.stdout and popen.stdout.readline()
            check(line, "it never listened:", self.command)
            popen.terminate()
            status = popen.wait(PATIENCE)
            check(status == 0, "SIGTERM: exit status", status)
            self.popen = None
        return popen is not None


def load(path: str) -> Any:
    """Return the module under test, wherever it lies and whatever its name is."""
    spec: Any = importlib.util.spec_from_file_location("mizusync_under_test", path)
    check(spec and spec.loader, "no Python file:", path)
    module = importlib.util.module_from_spec(spec)
    # where its dataclasses look for their types
    sys.modules["mizusync_under_test"] = module
    spec.loader.exec_module(module)
    return module


def open_engine(module: Any, db: str | Path, keep: int = 0, apply: Any = None) -> Any:
    """Return an engine of the todo demo on this file."""
    todo = {"schema": module.TODO_SCHEMA, "snapshot": module.snapshot_todos}
    if keep:
        todo["settings"] = module.Settings(keep_changes=keep)
    return module.Engine(db, apply=apply or module.apply_todo, **todo)


def cron(module: Any, db: str, keep: int) -> None:
    """Be the cron job: read a push a line, write its answer, or null for "not now"."""

    def apply(db: sqlite3.Connection, mutation: Any) -> list[Any]:
        steps = [
            module.Mutation.parse(step | {"id": mutation.id}) for step in mutation.args
        ]
        made = [
            (step.scope, data) for step in steps for data in module.apply_todo(db, step)
        ]
        return [module.Change(data, scope=scope) for scope, data in made]

    engine = open_engine(module, db, keep, apply)
    for line in sys.stdin:
        answer = "null"
        with suppress(module.Unavailable):
            results = engine.submit(json.loads(line)).result()
            answer = f"[{','.join(result.encoded.decode() for result in results)}]"
        print(answer, flush=True)


# --- Clients --------------------------------------------------------------------------
# Threads. Each holds its lock from one consistent moment to the next: a writer until
# its batch is answered, a follower until a page is taken in. So whoever has all the
# locks has a quiet world.


class Client(threading.Thread):
    """A client that takes one step after the other, against either server."""

    # seconds between two steps; without one nobody else would get the lock
    pause = (0.002, 0.01)

    def __init__(
        self, name: str, seed: int, ledger: Ledger, ports: Sequence[int]
    ) -> None:
        super().__init__(name=name, daemon=True)
        self.ledger = ledger
        self.ports = ports
        self.random = random.Random(f"{seed} {name}")
        self.connections: dict[int, RawClient] = {}  # by port
        self.lock = threading.Lock()
        self.over = False
        self.fault = ""

    def run(self) -> None:
        try:
            while not self.over:
                with self.lock:
                    self.step()
                time.sleep(self.random.uniform(*self.pause))
        except Exception as error:
            fault = error if isinstance(error, Fault) else traceback.format_exc()
            self.fault = f"{self.name}: {fault}"

    def step(self) -> None:
        raise NotImplementedError

    def ask(self, target: str, body: str | None = None, unheard: float = 0.0) -> Any:
        """Ask either server; return the answer's JSON.

        Return None where the server is down, dies over this, or says 503; or where this
        client hangs up before the answer, as it does now and then, so `unheard`.
        """
        port = self.random.choice(self.ports)
        method = "POST" if body else "GET"
        try:
            if port not in self.connections:
                self.connections[port] = RawClient((HOST, port), PATIENCE)
            client = self.connections[port]
            client.send_request(method, target, body.encode() if body else None)
            if self.random.random() < unheard:
                raise ConnectionError("hung up")
            reply = client.read_reply()
        except OSError:
            if port in self.connections:
                self.connections.pop(port).close()
            time.sleep(0.02)
            return None
        status, answer = reply.status, reply.json
        check(status in (200, 410, 503), target, status, answer)
        return None if status == 503 else answer


class Writer(Client):
    """A client that pushes until it is answered."""

    pause = 0.03, 0.3
    made = 0

    def step(self) -> None:
        batch = [self.make() for _ in range(self.random.randint(1, 5))]
        answers = self.push(batch, fresh=True)
        if self.random.random() < 0.1:  # as if the answer had been lost
            self.repeat(batch, answers)

    def repeat(self, batch: list[Json], answers: list[Json]) -> None:
        """Send the same once more: the answers have to be the same."""
        repeated = self.push(batch, fresh=False)
        for first, second in zip(answers, repeated, strict=True):
            same = [first | {"duplicate": True}]
            if self.ledger.keep:  # its changes may be trimmed by now
                cursor = first.get("cursor")
                same.append({"ok": True, "cursor": cursor, "duplicate": True})
            again = not first["ok"] or first.get("duplicate")
            check(again or second in same, first, second)

    def push(self, batch: list[Json], fresh: bool) -> list[Json]:
        """Send it until it is answered, whatever happens to the servers meanwhile."""
        deadline = time.monotonic() + PATIENCE
        while (answers := self.send(batch)) is None:
            fresh = False
            check(time.monotonic() < deadline, "never answered:", batch)
        for mutation, answer in zip(batch, answers, strict=True):
            self.ledger.acknowledge(mutation, answer, fresh)
        self.ledger.count("pushes")
        return answers

    def send(self, batch: list[Json]) -> list[Json] | None:
        """Send it once; return None where that was not answered."""
        text = json.dumps(batch)
        answers: list[Json] | None = self.ask("/sync/push", text, unheard=0.05)
        return answers

    def make(self) -> Json:
        """Return a mutation of one of few todos, so that about half are refused."""
        self.made += 1
        key = f"{self.name}-{self.made}"
        names = ("create", "update", "toggle", "delete")
        [name] = self.random.choices(names, (3, 2, 3, 2))
        args: Json = {"id": f"todo {self.random.randrange(40)}"}
        if name in ("create", "update"):
            args["title"] = f'of "{key}" \U0001f4a7'
        scope = self.random.choice(SCOPES)
        return {"id": key, "scope": scope, "name": f"todo.{name}", "args": args}


class CronWriter(Writer):
    """A client that gives the cron job its work.

    Its mutations make many changes, of which all or none may be seen.
    """

    pause = 0.2, 0.8
    process: Process

    def make(self) -> Json:
        last, steps = super().make(), list[Json]()
        for number in range(self.random.randint(1, 3)):
            args = {"id": f"{last['id']} {number}", "title": "not for long"}
            scope = self.random.choice(SCOPES)
            for name in ("create", "toggle", "delete"):
                steps.append({"name": f"todo.{name}", "scope": scope, "args": args})
        if self.random.random() < 0.3:
            # This one may be refused, and undoes those before it.
            steps.insert(self.random.randrange(len(steps)), last)
        return last | {"name": "several", "args": steps}

    def send(self, batch: list[Json]) -> list[Json] | None:
        with suppress(OSError, ValueError):  # half a line, where it was killed
            if (popen := self.process.popen) and popen.stdin and popen.stdout:
                print(json.dumps(batch), file=popen.stdin, flush=True)
                answers: list[Json] | None = json.loads(popen.stdout.readline())
                return answers
        time.sleep(0.05)
        return None


class Follower(Client):
    """A client that pulls all along, by the rules of the protocol."""

    def __init__(self, scope: str, *client: Any) -> None:
        super().__init__(*client)
        self.scope = scope
        self.cursor = 0
        self.epoch = ""
        self.since = 0  # the cursor where its log begins
        self.cursors: list[int] = []  # its log
        self.ends: set[int] = set()  # where it once was: never inside a mutation

    def step(self) -> None:
        limit = self.random.choice((1, 2, 3, 7, 50))
        wait = self.random.choice((0, 0.2, 1.5))
        self.pull(limit, wait)
        if self.random.random() < 0.01:
            self.snapshot()
        # With retention it sleeps now and then until what it needs has been trimmed.
        nap = self.ledger.keep and self.random.random() < 0.01
        self.pause = (3.0, 8.0) if nap else Client.pause

    def caught_up(self) -> bool:
        """Return whether it has all that anybody saw of its scope, or a fault."""
        return bool(self.fault) or self.cursor >= self.ledger.newest[self.scope]

    def take(self, changes: list[Json], cursor: int) -> None:
        """Take in a page, or a hint's changes, as a whole."""
        for change in changes:
            in_order = self.cursor < change["cursor"] <= cursor
            check(in_order, "out of order:", self.cursor, changes)
            check(change["scope"] == self.scope, "another scope's:", self.scope, change)
            self.ledger.see(change)
            self.cursor = change["cursor"]
            self.cursors.append(self.cursor)
        check(cursor >= self.cursor, "a cursor went down:", self.cursor, cursor)
        self.cursor = cursor
        self.ends.add(cursor)

    def pull(self, limit: int, wait: float) -> bool:
        """Pull one page; return whether it came, and there are no more."""
        known = self.ledger.newest[self.scope]
        where = {"scope": self.scope, "cursor": self.cursor, "epoch": self.epoch}
        query = urlencode(where | {"limit": limit, "wait": wait})
        page = self.ask("/sync/pull?" + query)
        if page is None:
            return False
        if "code" in page:
            check(self.ledger.keep and page["code"] == "cursor_too_old", where, page)
            self.start_over()
            return False
        self.take(page["changes"], page["cursor"])
        # What anybody was told before this pull was asked for, this pull has to see.
        late = self.name, "sees", self.cursor, "but not", known
        check(page["hasMore"] or self.cursor >= known, "a stale page:", *late)
        self.epoch = page["epoch"]
        return not page["hasMore"]

    def snapshot(self) -> Json | None:
        """Take a snapshot for the ledger, and return it; None where none came."""
        known = self.ledger.newest[self.scope]
        query = urlencode({"scope": self.scope})
        snapshot: Json | None = self.ask("/sync/snapshot?" + query)
        if snapshot:
            cursor = snapshot["cursor"]
            check(cursor >= known, "a stale snapshot:", cursor, known)
            self.ends.add(cursor)
            with self.ledger.lock:
                shown = cursor, snapshot["data"]["todos"]
                self.ledger.snapshots[self.scope].append(shown)
                names = self.ledger.databases
                names.add(snapshot.get("database", ""))  # none of an older server
                check(len(names) == 1, "the database has another name:", names)
        return snapshot

    def start_over(self) -> None:
        """Go on from a snapshot, since the changes in between are trimmed."""
        if snapshot := self.snapshot():
            cursor = snapshot["cursor"]
            check(cursor > self.cursor, "410 at the end of the log:", self.cursor)
            self.since = self.cursor = cursor
            self.epoch = snapshot["epoch"]
            self.cursors = []
            self.ledger.count("410s")


class LiveFollower(Follower):
    """A follower that lives on hints.

    It pulls when it connects, when a hint does not fit, and in silence.
    """

    live: RawClient | None = None
    behind = True  # it has to pull
    told = 0  # the newest cursor of this socket's hints
    heard = 0.0  # when the last hint came

    def step(self) -> None:
        try:
            if self.live is None:
                self.live = self.subscribe()
                self.behind = True
                self.told = 0
                self.heard = time.monotonic()
            if self.behind:
                self.behind = not self.pull(1000, 0)
            else:
                self.listen(self.live)
            self.behind |= time.monotonic() - self.heard > SILENCE
        except OSError:
            if self.live:
                self.live.close()
            self.live = None
            time.sleep(self.random.uniform(0.02, 0.2))

    def subscribe(self) -> RawClient:
        """Return a WebSocket that is subscribed, with changes in its hints."""
        live = RawClient((HOST, self.random.choice(self.ports)), PATIENCE)
        reply = live.upgrade("/ws?" + urlencode({"scope": self.scope}))
        if reply.status == 503:
            live.close()
            raise ConnectionError("not now")
        check(reply.status == 101, reply)
        live.send_message("subscribe", {"changes": True})
        return live

    def listen(self, live: RawClient) -> None:
        """Take in the next hint, if one comes within half a second."""
        live.sock.settimeout(0.5)
        with suppress(TimeoutError):
            self.hear(live.read_message())

    def hear(self, message: Json) -> None:
        """Take in a hint: its changes, if they fit; otherwise a pull has to follow."""
        check(message["topic"] == f"sync:{self.scope}", message)
        hint = message["data"]
        cursor = hint["cursor"]
        self.heard = time.monotonic()
        check(cursor >= self.told, "a hint went down:", self.told, hint)
        self.told = cursor
        if cursor <= self.cursor:
            return
        has_changes = "changes" in hint and hint["epoch"] == self.epoch
        if not has_changes or hint["after"] > self.cursor:
            self.behind = True
            return
        changes = hint["changes"]
        new = [change for change in changes if change["cursor"] > self.cursor]
        self.take(new, cursor)
        self.ledger.count("hints applied")


# --- Checks ---------------------------------------------------------------------------


def check_file(ledger: Ledger, path: Path) -> dict[int, Key]:
    """The database, or a copy of it, is sound, and exactly what was told up to its
    head.

    Only while every mutation is answered. Gives the mutation that each cursor belongs
    to."""
    with closing(
        sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=PATIENCE)
    ) as db:
        db.execute("BEGIN")  # all of one moment
        (sound,), *_ = db.execute("PRAGMA integrity_check")
        [(head,)] = db.execute(
            "SELECT seq FROM sqlite_sequence WHERE name = 'mizusync_changes'"
        )
        rows = list(
            db.execute("SELECT cursor, first, scope, time, data FROM mizusync_changes")
        )
        marks = list(
            db.execute("SELECT scope, id, first, last FROM mizusync_mutations")
        )
        trims = dict(db.execute("SELECT scope, cursor FROM mizusync_trims"))
        todos = list(
            db.execute(
                "SELECT scope, id, title, completed FROM todos ORDER BY position"
            )
        )
    check(sound == "ok", path, sound)
    # 1. The marks are the mutations that were acknowledged, each with the cursors it
    # was told.
    late = {
        (scope, id): last
        for scope, id, _, last in marks
        if (scope, id) in ledger.doubtful
    }
    ledger.applied = late | ledger.applied
    applied = ((*key, last) for key, last in ledger.applied.items() if last <= head)
    check_same(
        applied,
        ((scope, id, last) for scope, id, _, last in marks),
        f"{path}: mutations",
    )
    spans: dict[int, Key] = {}
    for scope, id, first, last in marks:
        for cursor in range(first, last + 1):
            check(
                cursor not in spans,
                "one cursor for two:",
                cursor,
                scope,
                id,
                spans.get(cursor),
            )
            spans[cursor] = scope, id
    owners = ((cursor, key) for cursor, key in ledger.owners.items() if cursor <= head)
    wrong = [
        (cursor, key, spans.get(cursor))
        for cursor, key in owners
        if spans.get(cursor) != key
    ]
    check(not wrong, "other cursors than it was told:", wrong[:3])
    # 2. The log is what was seen, to the letter, but for what was trimmed.
    firsts = {(scope, id): first for scope, id, first, _ in marks}
    for cursor, first, scope, written, data in rows:
        check(cursor in spans, "a change of no mutation:", cursor, data)
        check(
            firsts[spans[cursor]] == first,
            "its mutation begins elsewhere:",
            cursor,
            first,
        )
        check(ledger.keep or cursor in ledger.log, "nobody was told:", cursor, data)
        change = {
            "cursor": cursor,
            "scope": scope,
            "time": written,
            "data": json.loads(data),
        }
        ledger.see(change)
    log = {c: change["scope"] for c, change in ledger.log.items() if c <= head}
    expected = (cursor for cursor, scope in log.items() if cursor > trims.get(scope, 0))
    check_same(expected, (row[0] for row in rows), f"{path}: changes")
    if not ledger.keep:
        check_same(log, spans, "changes that were seen, and cursors that were given")
    # 3. The todos are one more snapshot of each scope.
    for name in SCOPES:
        current = max([trims.get(name, 0), *(row[0] for row in rows if row[2] == name)])
        mine = (todo[1:] for todo in todos if todo[0] == name)
        shown = [
            {"id": id, "title": text, "completed": bool(done)}
            for id, text, done in mine
        ]
        ledger.snapshots[name].append((current, shown))
    return spans


def check_million(server: str, path: Path) -> None:
    """To open a long log takes no time, and writes nothing."""
    module, wal = load(server), path.with_name(path.name + "-wal")
    open_engine(module, path).close()
    with closing(sqlite3.connect(path)) as db:
        db.executescript("""
            CREATE TEMP TABLE n AS WITH RECURSIVE n (i) AS
                (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1000000)\
 SELECT i FROM n;
            INSERT INTO mizusync_changes
                SELECT i, i, 'home', '2026-01-01T00:00:00.000Z',\
 '{"op":"delete","id":"x"}' FROM n;
            INSERT INTO mizusync_mutations SELECT 'home', 'mutation ' || i, i, i FROM n;
        """)
        db.commit()
    before, took = (
        (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).digest()),
        [],
    )
    for _ in range(5):
        start = time.perf_counter()
        engine = open_engine(module, path)
        took.append(time.perf_counter() - start)
        check(not wal.exists() or not wal.stat().st_size, "opening wrote to the WAL")
        engine.close()
        check(not wal.exists() or not wal.stat().st_size, "closing wrote to the WAL")
    after = path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).digest()
    check(before == after, "opening and closing wrote to the file")
    median = statistics.median(took)
    print(
        f"a log of 1,000,000 changes opens in {median * 1000:.1f} ms,"
        " and nothing is written"
    )
    check(median < 0.1, "that is too slow:", took)
    path.unlink()


# --- Soak -----------------------------------------------------------------------------


class Soak:
    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder, self.random = args, folder, random.Random(args.seed)
        self.ledger, self.db, self.log = (
            Ledger(),
            folder / "soak.db",
            folder / "servers.log",
        )
        self.backups: dict[Path, subprocess.Popen[bytes]] = {}
        self.started = self.told = time.monotonic()
        output, ports = self.log.open("a"), [free_port(self.random) for _ in range(2)]
        run = [sys.executable, args.server, "--db", str(self.db), "--port"]
        self.servers = [Process([*run, str(port)], output) for port in ports]
        job = [
            sys.executable,
            __file__,
            "--server",
            args.server,
            "--cron",
            str(self.db),
        ]
        self.processes = [*self.servers, Process(job, output)]
        client = args.seed, self.ledger, ports
        self.followers = [
            Follower(scope, f"puller of {scope}", *client) for scope in SCOPES
        ]
        self.followers += [
            LiveFollower(scope, f"socket of {scope}", *client) for scope in SCOPES
        ]
        cron = CronWriter("cron", *client)
        cron.process = self.processes[-1]
        self.writers = [cron, *(Writer(f"writer {n}", *client) for n in range(WRITERS))]

    def run(self) -> None:
        """Two halves of disturbed work; every half minute, and last of all, a check in
        peace."""
        usage = subprocess.run(
            [sys.executable, self.args.server, "--help"], capture_output=True
        )
        trims = self.args.keep_changes if b"--keep-changes" in usage.stdout else 0
        try:
            for client in (*self.writers, *self.followers):
                client.start()
            for keep in (0, trims) if trims else (0,):
                self.work(self.args.seconds / (2 if trims else 1), keep)
        finally:
            self.end()
        counts = self.ledger.counts
        check(
            counts["hints applied"] and counts["duplicates"],
            "something never ran:",
            counts,
        )
        check(not trims or counts["410s"], "nobody was ever too late:", counts)
        # Whatever is done to a server here, a client or a signal may do: none of it is
        # an error.
        signs, lines = (" ERROR ", "Traceback"), self.log.read_text().splitlines()
        complaints = [line for line in lines if any(sign in line for sign in signs)]
        check(not complaints, "a server complains:", complaints[:3])

    def work(self, seconds: float, keep: int) -> None:
        self.ledger.keep = keep
        for process in self.processes:
            process.kill()
            process.options = ["--keep-changes", str(keep)] if keep else []
        end, checked = time.monotonic() + seconds, time.monotonic()
        while (now := time.monotonic()) < end:
            self.disturb()
            if now - self.told > TELL_EVERY:
                self.tell()
            if now - checked > CHECK_EVERY:
                self.check()
                checked = time.monotonic()
        self.check()

    def disturb(self) -> None:
        """A moment of work, then a misfortune, or none."""
        for client in (*self.writers, *self.followers):
            check(not client.fault, client.fault)
        for process in self.processes:
            if self.random.random() < 0.8:
                process.start()
        time.sleep(self.random.uniform(0.1, 2.5))
        fate, victims = self.random.random(), [self.random.choice(self.processes)]
        if fate < 0.1:
            victims = self.processes
        if fate < 0.55:
            self.ledger.counts["kills"] += sum(process.kill() for process in victims)
        elif fate < 0.7:
            self.ledger.counts["stops"] += self.random.choice(self.servers).stop()
        elif fate < 0.8:
            copy = self.folder / f"backup-{self.ledger.counts['backups']}.db"
            command = [sys.executable, "-c", BACKUP, str(self.db), str(copy)]
            self.backups[copy] = subprocess.Popen(command)
            self.ledger.counts["backups"] += 1

    def check(self) -> None:
        """Let everything be answered and heard; then compare all that was told with the
        file."""
        for process in self.processes:
            process.start()
        ledger = self.ledger
        if ledger.keep:
            # Only pushes trim, each some of what is too much: so wait while they go on.
            until(self.is_trimmed, "too much is kept of a scope", patience=180)
        with ExitStack() as quiet:
            for writer in self.writers:
                check(
                    writer.lock.acquire(timeout=2 * PATIENCE), writer.name, "never ends"
                )
                quiet.callback(writer.lock.release)
            time.sleep(0.5)  # for what a client hung up on, and a server still works on
            for one in self.followers:
                until(
                    one.caught_up, one.name, "never hears of the newest:", ledger.newest
                )
            for one in self.followers:
                check(one.lock.acquire(timeout=2 * PATIENCE), one.name, "never ends")
                quiet.callback(one.lock.release)
                until(one.snapshot, one.name, "gets no snapshot")
            for client in (*self.writers, *self.followers):
                check(not client.fault, client.fault)
            for copy, making in self.backups.items():
                check(making.wait(PATIENCE) == 0, copy, "was not made")
                check_file(ledger, copy)
                copy.unlink()
            self.backups.clear()
            spans = check_file(ledger, self.db)
            check(
                max(spans) == max(ledger.applied.values()),
                "the log is longer than was told",
            )
            for scope in SCOPES:
                ledger.fold(scope, spans.keys() - ledger.log.keys())
            for one in self.followers:
                self.check_follower(one, spans)
            ledger.counts["checks"] += 1

    def check_follower(self, follower: Follower, spans: dict[int, Key]) -> None:
        known = self.ledger.log.items()
        log = sorted(
            cursor for cursor, change in known if change["scope"] == follower.scope
        )
        mine = [cursor for cursor in log if cursor > follower.since]
        check_same(mine, follower.cursors, f"the log of the {follower.name}")
        inside = {
            cursor for cursor, later in pairwise(log) if spans[cursor] == spans[later]
        }
        cut = sorted(inside & follower.ends)
        check(not cut, follower.name, "was inside a mutation at", cut[:5])

    def is_trimmed(self) -> bool:
        sql = "SELECT count(*) FROM mizusync_changes GROUP BY scope"
        with closing(sqlite3.connect(f"file:{self.db}?mode=ro", uri=True)) as db:
            return all(
                count <= 2 * self.ledger.keep + 100 for (count,) in db.execute(sql)
            )

    def tell(self) -> None:
        self.told = time.monotonic()
        counts, changes = self.ledger.counts, len(self.ledger.log)
        seen = ", ".join(f"{count} {what}" for what, count in sorted(counts.items()))
        print(
            f"{self.told - self.started:4.0f} s: {changes} changes, {seen}", flush=True
        )

    def end(self) -> None:
        """Only what was started here; whatever it is doing."""
        for client in (*self.writers, *self.followers):
            client.over = True
        for popen in (
            *(process.popen for process in self.processes),
            *self.backups.values(),
        ):
            if popen:
                popen.kill()
                popen.wait()
        self.tell()


def free_port(source: random.Random) -> int:
    """A port below those that systems give to clients: nobody takes it while a server
    is down."""
    while True:
        with suppress(OSError), closing(socket.socket()) as probe:
            probe.bind((HOST, port := source.randrange(20_000, 30_000)))
            return port


def main() -> int:
    parser = trial.options("Kill mizusync at random moments, and look.")
    add = parser.add_argument
    add(
        "--keep-changes",
        type=int,
        default=200,
        help="of the second half (%(default)s); 0: off",
    )
    add("--no-million", action="store_true", help="skip the log of 1,000,000 changes")
    add(
        "--cron", metavar="DB", help=argparse.SUPPRESS
    )  # for ourselves: be the cron job
    if "--cron" in sys.argv:
        parser.set_defaults(keep_changes=0)
    args = parser.parse_args()
    if args.cron:
        cron(load(args.server), args.cron, args.keep_changes)
        return 0

    def work(folder: Path) -> None:
        if not args.no_million:
            check_million(args.server, folder / "million.db")
        Soak(args, folder).run()

    return trial.run("soak", work)


if __name__ == "__main__":
    sys.exit(main())
