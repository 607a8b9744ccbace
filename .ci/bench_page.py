"""The benchmark of the page's client: what it costs the main thread of a browser.

    server                        headless Chromium                    this process
    mizusync.py, with a page of   part one of demo.html, with an  <--  drives it, pushes
    the benchmark's own     <-->  application that counts its own      what others do,
                                  time                                 reads the trace

`python .ci/bench_page.py` takes some 2 minutes, in a Python that has playwright, where
there is a Chromium. `--old FILE` measures the client of another demo.html, too. Linux
only.

The browser's own trace says how long each task of a main thread took, from its start to
its end; what the application's apply() and predict() took of it is subtracted. So what
is left is the client, and the browser's work for it: parsing, timers, events, saving.
Numbers of one run are compared with their limits; trust them less on a busy machine."""

from __future__ import annotations

import argparse
import itertools
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

from client import RawClient

HOST = "127.0.0.1"
HERE = Path(__file__).resolve().parent
PATIENCE = 120.0  # seconds until what must happen counts as never
TITLE = "x" * 200
TODOS = 10_000  # in the usual list
MANY_TODOS = 80_000  # 20 MB
CHANGES = 250  # one after the other: more than a client saves beside a state
GAP = 0.04  # seconds between two of them
OFFLINE = 5000  # mutations that wait for the network
TABS = 20
CLIENT = re.compile(r"(?ms)^// === Part one.*?(?=^// === Part two)")

clock = time.perf_counter
numbers = itertools.count(1)


class Row(NamedTuple):
    what: str
    unit: str
    limit: float | None
    value: float


# --- Page -----------------------------------------------------------------------------
# The application is that of the demo, or one on buckets, which copies 1/256 of its list
# for a change. `spent` has each call of it: when it began, and how long it took.

PAGE = """<!doctype html>
<meta charset="utf-8">
<title>Benchmark</title>
<link rel="icon" href="data:,">
<script type="module">
%s
const spent = [];
let cursor = 0;  // of the newest change that was applied

function timed(work) {
  return (...args) => {
    const began = performance.now();
    try {
      return work(...args);
    } finally {
      spent.push([began, performance.now() - began]);
    }
  };
}

const remove = (state, id) => ({ todos: state.todos.filter((todo) => todo.id !== id) });

function put(state, todo) {
  if (!state.todos.some(({ id }) => id === todo.id)) {
    return { todos: [...state.todos, todo] };
  }
  return { todos: state.todos.map((old) => (old.id === todo.id ? todo : old)) };
}

const demo = {
  find: (state, id) => state.todos.find((todo) => todo.id === id),
  count: (state) => state.todos.length,
  put,
  remove,
};

const WIDTH = 256;
const known = new WeakMap();  // a list of the server's -> its buckets

function bucketOf(id) {
  let sum = 0;
  for (let at = 0; at < id.length; at++) sum = (31 * sum + id.charCodeAt(at)) >>> 0;
  return sum %% WIDTH;
}

function fill(todos) {
  const buckets = Array.from({ length: WIDTH }, () => []);
  for (const todo of todos) buckets[bucketOf(todo.id)].push(todo);
  known.set(todos, buckets);
  return buckets;
}

const bucketsOf = (state) =>
  state.buckets ?? known.get(state.todos) ?? fill(state.todos);

function change(state, id, more) {
  const buckets = [...bucketsOf(state)], at = bucketOf(id);
  buckets[at] = [...buckets[at].filter((todo) => todo.id !== id), ...more];
  return { buckets };
}

const quick = {
  find: (state, id) => bucketsOf(state)[bucketOf(id)].find((todo) => todo.id === id),
  count: (state) => bucketsOf(state).reduce((sum, { length }) => sum + length, 0),
  put: (state, todo) => change(state, todo.id, [todo]),
  remove: (state, id) => change(state, id, []),
};

function make(kind, scope) {
  const app = { demo, quick }[kind];
  let saves = 0;
  const own = typeof indexedDBStorage === "function" ? indexedDBStorage() : null;
  const storage = own && { ...own, save: async (...args) => {
    const stored = await own.save(...args);
    saves++;
    return stored;
  } };
  const client = new SyncClient({
    url: new URL(".", location.href), scope, initial: { todos: [] },
    ...(storage && { storage }),
    apply: timed((state, { cursor: number, data }) => {
      cursor = Math.max(cursor, number);
      if (data.op === "delete") return app.remove(state, data.id);
      return app.put(state, data.todo);
    }),
    predict: timed((state, { name, args }) => {
      const old = app.find(state, args.id);
      if (name === "todo.create") {
        return old ? state : app.put(state, { ...args, completed: false });
      }
      return old ? app.put(state, { ...old, ...args }) : state;
    }),
  });
  Object.assign(self, {
    client,
    count: () => app.count(client.state),
    saves: () => saves,
    cursor: () => cursor,
    spent: () => ({ at: performance.now(), calls: spent.splice(0) }),
    isIdle: () => client.status.live && client.status.waiting === 0,
  });
}

performance.setResourceTimingBufferSize(100_000);
Object.assign(self, {
  make,
  asked: (path) => performance.getEntriesByType("resource")
    .filter(({ name }) => name.includes(path)).length,
});
</script>
"""


def make_page(file: Path) -> str:
    """Return the page, with the client of this demo.html."""
    found = CLIENT.search(file.read_text())
    assert found, f"{file} has no part one"
    return PAGE % found[0]


# --- Server ---------------------------------------------------------------------------


class Server:
    """A mizusync.py on a database of its own, which serves this page as its demo."""

    def __init__(self, module: Path, page: str, folder: Path, todos: int = 0) -> None:
        folder.mkdir()
        shutil.copy(module, folder / "mizusync.py")
        (folder / "demo.html").write_text(page)
        self.db = folder / "todos.db"
        if todos:
            fill = [sys.executable, __file__, "--fill", str(todos), str(folder)]
            subprocess.run(fill, check=True)
        words = [sys.executable, str(folder / "mizusync.py"), "--port", "0"]
        words += ["--db", str(self.db)]
        self.popen = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert self.popen.stdout
        line = self.popen.stdout.readline()
        found = re.search(r"http://[0-9.]+:(\d+)", line)
        assert found, line
        self.url = found[0] + "/"
        self.client = RawClient((HOST, int(found[1])))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.popen.terminate()
        self.popen.wait()

    def change(self) -> int:
        """Rename a todo, and return the cursor of the change."""
        number = next(numbers)
        mutation = {"id": f"m{number}", "scope": "demo", "name": "todo.update"}
        args = {"id": f"t{number * 37 % TODOS}", "title": f"{number} {TITLE}"[:200]}
        body = json.dumps([mutation | {"args": args}]).encode()
        reply = self.client.request("POST", "/sync/push", body=body)
        return int(reply.json[0]["cursor"])


def fill_database(count: int, folder: Path) -> None:
    """Put todos into a database. Runs in a process that has the folder's mizusync."""
    sys.path.insert(0, str(folder))
    import mizusync

    engine = mizusync.Engine(
        folder / "todos.db",
        apply=mizusync.apply_todo,
        snapshot=mizusync.snapshot_todos,
        schema=mizusync.TODO_SCHEMA,
    )
    for start in range(0, count, 100):
        todos = [{"id": f"t{start + more}", "title": TITLE} for more in range(100)]
        one = {"scope": "demo", "name": "todo.create"}
        mutations = [one | {"id": f"f{todo['id']}", "args": todo} for todo in todos]
        assert all(result.ok for result in engine.submit(mutations).result())
    engine.close()


# --- Trace ----------------------------------------------------------------------------


class Spent(NamedTuple):
    """The ms that the main threads worked. Only `application` is the application's."""

    client: float
    longest: float
    application: float


class Task(NamedTuple):
    start: float  # us
    end: float  # us
    worked: float  # ms


Thread = tuple[int, int]  # the process and the thread
RUN_TASK = "ThreadControllerImpl::RunTask"
CHECKPOINT = "BlinkScheduler_PerformMicrotaskCheckpoint"


class Measured:
    """Records what the main threads of some pages do, in a `with` block."""

    def __init__(self, browser: Any, *pages: Any) -> None:
        self.browser, self.pages = browser, pages
        self.spent = Spent(0, 0, 0)

    def __enter__(self) -> Self:
        for page in self.pages:
            page.evaluate("void spent()")
        categories = ["toplevel", "blink.user_timing"]
        self.browser.start_tracing(categories=categories)
        for number, page in enumerate(self.pages):
            page.evaluate("(name) => { performance.mark(name); }", f"page {number}")
        return self

    def __exit__(self, *_: object) -> None:
        calls = [page.evaluate("spent()") for page in self.pages]
        events = json.loads(self.browser.stop_tracing())["traceEvents"]
        self.spent = read_trace(events, calls)


def read_trace(events: list[dict[str, Any]], answers: list[Any]) -> Spent:
    """Add up the tasks of each thread that has a page's mark, from it to the answer.

    A task that the machine interrupts takes longer, but its thread has worked no more:
    the calls of the application, which know the clock alone, get their share of that.
    """
    windows: dict[Thread, tuple[float, float]] = {}
    calls: dict[Thread, list[tuple[float, float]]] = {}
    tasks: dict[Thread, list[dict[str, Any]]] = {}
    for event in events:
        thread = event["pid"], event["tid"]
        if event["name"].startswith("page ") and "data" in event["args"]:
            answer = answers[int(event["name"].split()[1])]
            zero = event["ts"] - 1000 * event["args"]["data"]["startTime"]
            windows[thread] = event["ts"], zero + 1000 * answer["at"]
            made = [(zero + 1000 * began, took) for began, took in answer["calls"]]
            calls.setdefault(thread, []).extend(made)
        elif event["name"] in (RUN_TASK, CHECKPOINT) and "dur" in event:
            tasks.setdefault(thread, []).append(event)
    made_in_all = sum(len(answer["calls"]) for answer in answers)
    assert windows, "the trace has no mark"
    assert sum(map(len, calls.values())) == made_in_all, "a mark is missing"
    client = application = longest = 0.0
    for thread, (begin, end) in windows.items():
        waiting = deque(sorted(calls[thread]))
        for task in join_tasks(tasks[thread]):
            if not begin <= task.start <= task.end < end:
                continue
            own = 0.0
            while waiting and waiting[0][0] < task.end:
                own += waiting.popleft()[1]
            own = min(1000 * own * task.worked / (task.end - task.start), task.worked)
            application += own
            client += task.worked - own
            longest = max(longest, task.worked - own)
    return Spent(client, longest, application)


def join_tasks(events: list[dict[str, Any]]) -> Iterator[Task]:
    """Yield each task, with the promises that were settled right after it."""
    task: Task | None = None
    for event in sorted(events, key=lambda event: float(event["ts"])):
        start, end = event["ts"], event["ts"] + event["dur"]
        worked = event.get("tdur", event["dur"]) / 1000
        if task and end <= task.end:
            continue  # inside of it
        if task and event["name"] == CHECKPOINT:
            task = Task(task.start, end, task.worked + worked)
            continue
        if task:
            yield task
        task = Task(start, end, worked)
    if task:
        yield task


# --- Scenarios ------------------------------------------------------------------------

Start = Callable[[int], Server]  # takes the number of todos


def open_page(context: Any, server: Server, kind: str, scope: str = "demo") -> Any:
    page = context.new_page()
    page.set_default_timeout(1000 * PATIENCE)
    page.goto(server.url)
    page.evaluate("([kind, scope]) => make(kind, scope)", [kind, scope])
    return page


def start(page: Any, count: int) -> None:
    """Start the client, until it is live, has all, and has saved it."""
    page.evaluate("client.start()")
    page.wait_for_function(f"() => isIdle() && count() === {count}")
    page.wait_for_function("() => !client.ready || saves()")


def changes(browser: Any, starting: Start) -> Iterator[Row]:
    """At a usual list: what a change of others, and one of its own, cost."""
    with starting(TODOS) as server, browser.new_context() as context:
        page = open_page(context, server, "demo")
        start(page, TODOS)
        time.sleep(2)  # until nothing is left to do
        idle = rest(browser, page)
        with Measured(browser, page) as remote:
            began = clock()
            cursor = push_slowly(server)
            page.wait_for_function(f"() => cursor() >= {cursor}")
            page.wait_for_timeout(1500)  # until it is saved
            took = clock() - began
        yield cost("a change of others", remote.spent, idle * took)
        yield Row("a change of others: longest task", "ms", None, remote.spent.longest)
        with Measured(browser, page) as local:
            began = clock()
            page.evaluate(MUTATE_SLOWLY, [CHANGES, 1000 * GAP])
            page.wait_for_function("isIdle")
            page.wait_for_timeout(1500)
            took = clock() - began
        yield cost("a mutation", local.spent, idle * took)
        yield Row("a mutation: longest task", "ms", None, local.spent.longest)
        with Measured(browser, page) as bare:
            began = clock()
            page.evaluate(FETCH_SLOWLY, [CHANGES, 1000 * GAP])
            took = clock() - began
        what = "a mutation: fetch() alone"
        yield cost(what, bare.spent, idle * took)._replace(limit=None)


FETCH_SLOWLY = """async ([count, gap]) => {
  const headers = { "Content-Type": "application/json" };
  for (let number = 0; number < count; number++) {
    const args = { id: `t${number}`, title: `mine ${number}` };
    const mutation = { id: `bare${number}`, scope: "bare", name: "todo.create", args };
    const body = JSON.stringify([mutation]);
    fetch("sync/push", { method: "POST", body, headers }).then((got) => got.json());
    await new Promise((resolve) => setTimeout(resolve, gap));
  }
}"""

MUTATE_SLOWLY = """async ([count, gap]) => {
  for (let number = 0; number < count; number++) {
    client.mutate("todo.update", { id: `t${number * 37}`, title: `mine ${number}` });
    await new Promise((resolve) => setTimeout(resolve, gap));
  }
}"""


def rest(browser: Any, page: Any) -> float:
    """Return the ms a second of a page that has nothing to do."""
    with Measured(browser, page) as idle:
        began = clock()
        page.wait_for_timeout(3000)
        took = clock() - began
    return idle.spent.client / took


def push_slowly(server: Server) -> int:
    """Change one todo after the other; return the last cursor."""
    cursor = 0
    due = clock()
    for _ in range(CHANGES):
        cursor = server.change()
        due += GAP
        time.sleep(max(0.0, due - clock()))
    return cursor


def cost(what: str, spent: Spent, idle: float) -> Row:
    return Row(what, "ms each", 3, (spent.client - idle) / CHANGES)


def large(browser: Any, starting: Start) -> Iterator[Row]:
    """At a large list: until it is loaded and saved, and loaded again."""
    with starting(MANY_TODOS) as server, browser.new_context() as context:
        page = open_page(context, server, "demo")
        with Measured(browser, page) as first:
            began = clock()
            page.evaluate("client.start()")
            page.wait_for_function(f"() => count() === {MANY_TODOS}")
            loaded = clock() - began
            page.wait_for_function("() => saves()")
        yield Row("20 MB: loaded from the server", "s", None, loaded)
        yield Row(
            "20 MB: longest task, until it is saved", "ms", 200, first.spent.longest
        )
        page.close()
        page = context.new_page()
        page.set_default_timeout(1000 * PATIENCE)
        page.goto(server.url)
        page.evaluate("self.spent = () => null")
        with Measured(browser, page) as again:
            began = clock()
            page.evaluate("() => { make('demo', 'demo'); return client.ready; }")
            loaded = clock() - began
            assert page.evaluate("count()") == MANY_TODOS
        yield Row("20 MB: loaded from storage", "s", None, loaded)
        yield Row("20 MB: longest task of that", "ms", 200, again.spent.longest)
        page.evaluate("client.start()")
        page.wait_for_function("isIdle")
        page.wait_for_timeout(1500)
        with Measured(browser, page) as remote:
            for _ in range(CHANGES):  # in one hint, or in many: until a state is saved
                cursor = server.change()
            page.wait_for_function(f"() => cursor() >= {cursor}")
            page.wait_for_function("() => saves()")
            page.wait_for_timeout(1500)
        what = f"20 MB: longest task of {CHANGES} changes, saved"
        yield Row(what, "ms", 200, remote.spent.longest)


def queue(browser: Any, starting: Start, kind: str) -> Iterator[Row]:
    """What was done offline, until all of it is confirmed."""
    what = f"{OFFLINE} mutations offline"
    if kind == "demo":
        what += ", the demo's application"
    with starting(0) as server, browser.new_context() as context:
        page = open_page(context, server, kind)
        with Measured(browser, page) as offline:
            page.evaluate(MUTATE_OFFLINE, OFFLINE)
        each = offline.spent.client / OFFLINE
        yield Row(f"{what}: each", "ms", None, each)
        with Measured(browser, page) as online:
            seconds = page.evaluate(GO_ONLINE) / 1000
            page.wait_for_timeout(1500)
        own = online.spent.application / 1000
        pulls, pushes = (page.evaluate(f"asked('sync/{p}')") for p in ("pull", "push"))
        limit = 5 if kind == "quick" else None
        yield Row(f"{what}: confirmed", "s", limit, seconds)
        yield Row(f"{what}: of this the application", "s", None, own)
        yield Row(f"{what}: longest task", "ms", 200, online.spent.longest)
        yield Row(f"{what}: pulls", "requests", None, pulls)
        yield Row(f"{what}: pushes", "requests", None, pushes)
        assert page.evaluate("count()") == OFFLINE


MUTATE_OFFLINE = """(count) => {
  for (let number = 0; number < count; number++) {
    const id = `m${number}`;
    self.last = client.mutate("todo.create", { id, title: `mine ${number}` });
  }
}"""

GO_ONLINE = """async () => {
  const began = performance.now();
  client.start();
  if (client.confirmed) await client.confirmed(self.last ?? "");
  while (client.status.waiting) {
    await new Promise((resolve) => setTimeout(resolve, 5));
  }
  return performance.now() - began;
}"""


def tabs(browser: Any, starting: Start) -> Iterator[Row]:
    """One change of others: in a tab alone, and in many tabs of one browser."""
    for count in (1, TABS):
        with starting(TODOS) as server, browser.new_context() as context:
            pages = [open_page(context, server, "demo") for _ in range(count)]
            for page in pages:
                page.evaluate("client.start()")
            for page in pages:
                page.wait_for_function(f"() => isIdle() && count() === {TODOS}")
            server.change()  # with the server's first one, its history gets a new epoch
            time.sleep(3)
            with Measured(browser, *pages) as idle:
                time.sleep(3)
            with Measured(browser, *pages) as remote:
                cursor = server.change()
                for page in pages:
                    page.wait_for_function(f"() => cursor() >= {cursor}")
                time.sleep(3)
            each = (remote.spent.client - idle.spent.client) / count
            yield Row(f"one change of others, tabs: {count}", "ms a tab", None, each)


SCENARIOS: dict[str, Callable[[Any, Start], Iterator[Row]]] = {
    "changes": changes,
    "large": large,
    "queue": lambda browser, starting: queue(browser, starting, "quick"),
    "demo": lambda browser, starting: queue(browser, starting, "demo"),
    "tabs": tabs,
}


# --- Table ----------------------------------------------------------------------------


def measure(browser: Any, file: Path, folder: Path, only: list[str]) -> list[Row]:
    """Return all rows of one client; print each as soon as it is there."""
    page = make_page(file)
    is_old = "indexedDBStorage" not in page.split("const spent")[0]
    rows: list[Row] = []

    def starting(todos: int) -> Server:
        place = folder / str(next(numbers))
        return Server(HERE.parent / "mizusync.py", page, place, todos)

    for name in only:
        if is_old and name == "large":
            continue  # it saves nothing above 5 MB
        for row in SCENARIOS[name](browser, starting):
            print(f"{row.what}: {row.value:.2f} {row.unit}", file=sys.stderr)
            rows.append(row)
    return rows


def table(columns: dict[str, list[Row]]) -> Iterator[str]:
    """Yield the lines of a Markdown table, one column a client."""
    yield f"| what | unit | limit | {' | '.join(columns)} |"
    yield f"| --- | --- | ---: |{' ---: |' * len(columns)}"
    for row in next(iter(columns.values())):
        found = (
            [f"{other.value:,.2f}" for other in rows if other.what == row.what] or ["-"]
            for rows in columns.values()
        )
        limit = "" if row.limit is None else f"{row.limit:g}"
        cells = (row.what, row.unit, limit, *itertools.chain(*found))
        yield f"| {' | '.join(cells)} |"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the page's client.")
    add = parser.add_argument
    page = str(HERE.parent / "demo.html")
    add("--page", default=page, help="the demo.html to measure (%(default)s)")
    add("--old", metavar="FILE", help="another one, to compare it with")
    add("--only", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    add("--fill", nargs=2, help=argparse.SUPPRESS)  # the number and the folder
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    if args.fill:
        fill_database(int(args.fill[0]), Path(args.fill[1]))
        return 0
    from playwright.sync_api import sync_playwright

    names = ("chromium", "chromium-browser", "google-chrome")
    chromium = next(filter(None, map(shutil.which, names)), None)
    assert chromium, f"there is no browser here: none of {', '.join(names)}"
    columns: dict[str, list[Row]] = {}
    files = {"client": args.page} | ({"old": args.old} if args.old else {})
    with (
        tempfile.TemporaryDirectory(prefix="mizusync-bench-") as folder,
        sync_playwright() as playwright,
    ):
        for name, file in files.items():
            flags = ["--no-sandbox", "--no-first-run", "--disable-gpu"]
            launch = playwright.chromium.launch
            with launch(executable_path=chromium, args=flags) as browser:
                rows = measure(browser, Path(file), Path(folder), args.only)
            columns[name] = rows
    print(*table(columns), sep="\n")
    missed = [row for row in columns["client"] if row.limit and row.value > row.limit]
    for row in missed:
        print(f"OVER ITS LIMIT: {row.what}: {row.value:.2f} {row.unit}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
