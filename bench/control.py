"""The line between the controller and a rank: JSON objects, one a line, over a Unix socket.

A rank that has nothing to do sleeps in a read of this socket, so it costs nothing while another system is measured.
"""

from __future__ import annotations

import json
import socket
from typing import Any

ADDRESS = "BENCH_CONTROL"  # environment: the path of the controller's socket
Message = dict[str, Any]


class Line:
    """One end."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._read = b""

    @staticmethod
    def to(path: str) -> Line:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.connect(path)
        return Line(connection)

    def send(self, message: Message) -> None:
        self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> Message | None:
        """The next message; None when the other end is gone. Raises TimeoutError, if a timeout is set."""
        while not self.pending:
            chunk = self._socket.recv(1 << 16)
            if not chunk:
                return None
            self._read += chunk
        line, _, self._read = self._read.partition(b"\n")
        message: Message = json.loads(line)
        return message

    @property
    def pending(self) -> bool:
        """Whether a message has been read from the socket and not yet been taken: then select() does not show it."""
        return b"\n" in self._read

    def fileno(self) -> int:
        return self._socket.fileno()

    def timeout(self, seconds: float | None) -> None:
        self._socket.settimeout(seconds)

    def close(self) -> None:
        self._socket.close()
