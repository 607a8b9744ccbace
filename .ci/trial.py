"""The frame of the soak and of the fuzzer: options, faults, and the exit status."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path


class Fault(AssertionError):
    """A promise that was broken."""


def check(kept: object, *sentence: object) -> None:
    """Raise Fault with this sentence, unless the promise was kept."""
    if not kept:
        raise Fault(" ".join(map(str, sentence))[:1500])


def options(description: str) -> argparse.ArgumentParser:
    """Return a parser of what every trial can be told."""
    beside = Path(__file__).resolve().parent.parent / "mizusync.py"
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("--seconds", type=float, default=600.0, help="how long, about (%(default)s)")
    add("--seed", type=int, default=1, help="what is done (%(default)s)")
    add("--server", default=str(beside), help="the mizusync.py to try (%(default)s)")
    return parser


def run(name: str, work: Callable[[Path], None]) -> int:
    """Work in a folder that stays if there is a fault; return the exit status."""
    folder = Path(tempfile.mkdtemp(prefix=f"mizusync-{name}-"))
    try:
        work(folder)
    except BaseException as error:
        fault = error if isinstance(error, Fault) else traceback.format_exc()
        print(f"FAULT: {fault}\neverything is in {folder}", file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    print("all was well")
    return 0
