"""Serve the todo demo of one mizusync.py by a clock that hardly moves.

Under valgrind, which counts the instructions for bench.py, everything but the clock
takes some 50 times as long. By that clock a push would be cut into several commits, and
much of what is counted would be timers: the sweep, pings, looks at the database by an
idle writer. So a second lasts longer here, for the event loop and for threads that
wait. Usage: bench_counted.py MIZUSYNC.PY [OPTIONS]"""

import gc
import importlib
import selectors
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SLOWER = 1000

monotonic = time.monotonic
time.monotonic = lambda: monotonic() / SLOWER  # before anything else imports it

import queue  # noqa: E402
import threading  # noqa: E402


class SlowQueue(queue.SimpleQueue[Any]):
    """A queue whose timeouts are in slow seconds."""

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        return super().get(block, timeout and timeout * SLOWER)


def slow(wait: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method that waits, with its timeout in slow seconds."""

    def slowed(self: Any, timeout: float | None = None) -> Any:
        return wait(self, timeout and timeout * SLOWER)

    return slowed


def main() -> int:
    queue.SimpleQueue = SlowQueue  # type: ignore[misc]
    select, wait = selectors.DefaultSelector.select, threading.Condition.wait
    selectors.DefaultSelector.select = slow(select)  # type: ignore[method-assign]
    threading.Condition.wait = slow(wait)  # type: ignore[method-assign]
    sys.setswitchinterval(sys.getswitchinterval() * SLOWER)
    path = Path(sys.argv[1]).resolve()
    sys.path.insert(0, str(path.parent))
    module = importlib.import_module(path.stem)
    # A full collection of garbage costs as much as many requests, and would fall into
    # one row or into another. What is there now lives for ever: leave it out.
    gc.collect()
    gc.freeze()
    return int(module.main(sys.argv[2:]))


if __name__ == "__main__":
    sys.exit(main())
