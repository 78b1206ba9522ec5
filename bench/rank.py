"""What runs in every rank: `python -m bench.rank RUNTIME`, started by bench.team.

It obeys the controller's commands one by one and sleeps between them. A command that takes longer than the controller
allows ends the rank with the stacks of its threads on stderr.
"""

from __future__ import annotations

import faulthandler
import importlib
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

from bench import loop
from bench.control import ADDRESS, Line, Message
from bench.systems import MODULES
from bench.systems.base import Job, Runtime, System
from bench.values import Pool

Progress = Callable[[int], None]


class Rank:
    """The commands."""

    def __init__(self, runtime: Runtime, line: Line) -> None:
        self.runtime = runtime
        self.line = line
        self.open_systems: dict[str, System] = {}

    def join(self, hellos: list[Message]) -> Message:
        return {"versions": self.runtime.join(hellos)}

    def open(self, **job: Any) -> Message:
        about = Job(rank=self.runtime.rank, ranks=self.runtime.ranks, **job)
        self.open_systems[about.name] = system = self.runtime.open(about)
        return {"facts": system.facts()}

    def verify(self, name: str, turns: int) -> Message:
        system = self.open_systems[name]
        return {"checked_bytes": loop.verified(system, Pool(system.job.largest), turns)}

    def time(self, name: str, warm: int, chunks: int, turns: int, read: bool) -> Message:
        began = resource.getrusage(resource.RUSAGE_SELF)
        stamps = loop.timed(self.open_systems[name], warm, chunks, turns, read)
        ended = resource.getrusage(resource.RUSAGE_SELF)
        cpu = ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime
        return {"stamps": stamps, "cpu_seconds": cpu}

    def delayed(self, name: str, warm: int, stalls: list[list[float]]) -> Message:
        """stalls: by rank and iteration, seconds."""
        began = resource.getrusage(resource.RUSAGE_SELF)
        begun, done, slept = loop.delayed(self.open_systems[name], warm, stalls[self.runtime.rank])
        ended = resource.getrusage(resource.RUSAGE_SELF)
        cpu = ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime
        return {"begun": begun, "done": done, "slept": slept, "cpu_seconds": cpu}

    def shut(self, name: str) -> Message:
        system = self.open_systems.pop(name)
        facts = system.facts()
        system.close()
        return {"facts": facts}

    def run(self, function: str, **arguments: Any) -> Message:
        """Any function `module:name`(runtime, progress, ...) that returns a message."""
        module, name = function.split(":")
        result: Message = getattr(importlib.import_module(module), name)(self.runtime, self._progress, **arguments)
        return result

    def _progress(self, done: int) -> None:
        self.line.send({"progress": done})


def main() -> None:
    name = sys.argv[1]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the controller gets it too, and ends the ranks in order
    package = importlib.import_module(f"bench.systems.{MODULES[name]}")
    runtime: Runtime = next(
        kind for kind in vars(package).values()
        if isinstance(kind, type) and issubclass(kind, Runtime) and kind.__module__ == package.__name__
    )(name)  # fmt: skip
    line = Line.to(os.environ[ADDRESS])
    line.send({"rank": runtime.rank, "pid": os.getpid(), "hello": runtime.hello()})
    rank = Rank(runtime, line)
    while (message := line.receive()) is not None and (command := message.pop("do")) != "quit":
        faulthandler.dump_traceback_later(message.pop("limit"), exit=True)
        try:
            line.send(getattr(rank, command)(**message))
        except BaseException:
            line.send({"error": traceback.format_exc()})
            os._exit(1)  # an orderly end could wait for other ranks
        finally:
            faulthandler.cancel_dump_traceback_later()
    if message is None:
        os._exit(1)  # the controller is gone
    for system in rank.open_systems.values():
        system.close()
    runtime.close()
    line.send({"closed": True})


if __name__ == "__main__":
    main()
