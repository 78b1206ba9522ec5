"""The ranks of one runtime, seen from the controller."""

from __future__ import annotations

import ctypes
import os
import selectors
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.control import ADDRESS, Line, Message
from bench.launchers import ROOT, Launch

_START_SECONDS = 300.0
_LAST_WORDS_SECONDS = 2.0
_PR_SET_PDEATHSIG = 1


class TeamFailed(Exception):
    """A rank died, raised or hung; the team has been ended."""


class Team:
    """Starts the ranks (at once), and is ready after ready()."""

    def __init__(self, runtime: str, ranks: int, launch: Launch) -> None:
        self.runtime, self.ranks, self.launch = runtime, ranks, launch
        self.versions: dict[str, str] = {}
        self._lines: list[Line] = []
        self._folder = tempfile.TemporaryDirectory(prefix="bench-")
        folder = Path(self._folder.name)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(folder / "control"))
        self._listener.listen(ranks)
        self._log = folder / "log"
        environment = {**os.environ, **launch.environment, ADDRESS: str(folder / "control")}
        for name in ("RANK", "WORLD_SIZE"):  # of a launcher around us
            environment.pop(name, None)
        self._processes: list[subprocess.Popen[bytes]] = []
        with self._log.open("ab") as log:
            for rank in range(ranks) if launch.each else (None,):
                own = {} if rank is None else {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
                self._processes.append(
                    subprocess.Popen(
                        launch.command, env=environment | own, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log,
                        stderr=log, process_group=0, preexec_fn=_end_with_parent,
                    )
                )  # fmt: skip

    def ready(self) -> None:
        """Wait until every rank has called and they have joined."""
        deadline = time.monotonic() + _START_SECONDS
        hellos: dict[int, Message] = {}
        lines: dict[int, Line] = {}
        self._listener.settimeout(0.2)
        while len(hellos) < self.ranks:
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                if any(process.poll() is not None for process in self._processes):
                    raise self._failed("ended before all its ranks had started") from None
                if time.monotonic() > deadline:
                    raise self._failed(
                        f"had started {len(hellos)} of {self.ranks} ranks in {_START_SECONDS:.0f} s"
                    ) from None
                continue
            line = Line(connection)
            line.timeout(10)
            if (hello := line.receive()) is not None:
                lines[hello["rank"]], hellos[hello["rank"]] = line, hello["hello"]
        self._lines = [lines[rank] for rank in range(self.ranks)]
        joined = self.call("join", hellos=[hellos[rank] for rank in range(self.ranks)])
        self.versions = joined[0]["versions"]

    def call(
        self,
        command: str,
        *,
        limit: float = 120.0,
        progress: Callable[[int, int], None] | None = None,
        **arguments: Any,
    ) -> list[Message]:
        """Give every rank a command; returns their replies in rank order. Raises TeamFailed.

        limit: seconds until a rank that has not replied is ended, with its stacks in the message.
        progress(rank, done) is called for what ranks say on the way.
        """
        message = {"do": command, "limit": limit, **arguments}
        replies: dict[int, Message] = {}
        grace = limit + 5  # the ranks end themselves at the limit, with their stacks
        with selectors.DefaultSelector() as selector:
            for rank, line in enumerate(self._lines):
                line.timeout(10)
                try:
                    line.send(message)
                except OSError:
                    raise self._failed(f"rank {rank} was gone before {command}") from None
                selector.register(line, selectors.EVENT_READ, rank)
            deadline = time.monotonic() + grace
            errors: dict[int, str] = {}
            while len(replies) + len(errors) < self.ranks:
                events = selector.select(max(0.0, deadline - time.monotonic()))
                if not events:
                    break
                for key, _ in events:
                    rank, line = key.data, self._lines[key.data]
                    while rank not in replies and rank not in errors:
                        reply = line.receive()
                        if reply is None or "error" in reply:
                            errors[rank] = "ended without a word" if reply is None else reply["error"].strip()
                            deadline = min(deadline, time.monotonic() + _LAST_WORDS_SECONDS)  # for the others
                        elif "progress" not in reply:
                            replies[rank] = reply
                        elif progress:
                            progress(rank, reply["progress"])
                        if not line.pending:
                            break
                    if rank in replies or rank in errors:
                        selector.unregister(line)
        silent = sorted(set(range(self.ranks)) - set(replies) - set(errors))
        if errors:
            raise self._failed(f"{command} failed:\n{_told(errors, silent)}")
        if silent:
            raise self._failed(f"ranks {silent} hung in {command}")
        return [replies[rank] for rank in range(self.ranks)]

    def close(self) -> None:
        """End the ranks in order; by force if they do not."""
        try:
            if self._lines:
                self.call("quit", limit=20.0)
                for process in self._processes:
                    process.wait(10)
        except (TeamFailed, subprocess.TimeoutExpired):
            pass
        finally:
            self._end()

    def _failed(self, what: str) -> TeamFailed:
        time.sleep(0.2)  # for the last words in the log
        for process in self._processes:
            process.poll()
        log = self._log.read_text(errors="replace").strip() if self._log.exists() else ""
        self._end()
        return TeamFailed(f"{self.runtime} with {self.ranks} ranks: {what}" + (f"\n{log[-4000:]}" if log else ""))

    def _end(self) -> None:
        for line in self._lines:
            line.close()  # ranks that wait for a command end themselves
        self._lines = []
        for process in self._processes:
            if process.poll() is None:
                process.terminate()  # a launcher ends its ranks
        deadline = time.monotonic() + 3
        for process in self._processes:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self._listener.close()
        self._folder.cleanup()


def _told(errors: dict[int, str], silent: list[int]) -> str:
    """One line for each rank, and the stack of the one that seems to have begun it."""
    lines = [f"  rank {rank}: {error.splitlines()[-1]}" for rank, error in sorted(errors.items())]
    lines += [f"  rank {rank}: no reply" for rank in silent]
    first = next((e for e in errors.values() if "Peer" not in e.splitlines()[-1]), next(iter(errors.values())))
    return "\n".join([*lines, first] if "\n" in first else lines)


def _end_with_parent() -> None:
    """The kernel ends the process, or the launcher and so its ranks, when the controller dies, however it dies."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
