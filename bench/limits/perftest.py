"""UCX's own benchmark, ucx_perftest, of the UCX that blsrdma uses: puts between two processes."""

from __future__ import annotations

import csv
import importlib.util
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

from bench.launchers import Unavailable

# Where put_lat reports (the median of one way) and where put_bw does (the time of a message in a stream of them).
_COLUMNS = {"ucp_put_lat": "50.0_percentile_lat", "ucp_put_bw": "overall_lat"}


def put(test: str, size: int, transports: str, seconds: float, runs: int = 3) -> list[float]:
    """Nanoseconds per put, one number a run; test: ucp_put_lat or ucp_put_bw. Raises Unavailable."""
    program, libraries = _find()
    environment = os.environ | {"UCX_TLS": transports, "UCX_WARN_UNUSED_ENV_VARS": "n"}
    if libraries:
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, [libraries, os.environ.get("LD_LIBRARY_PATH")]))
    # The number of puts is given, not the time: find out what fits.
    turns = 500
    per_put = _run(program, environment, test, size, turns)
    turns = max(turns, min(1_000_000, int(seconds * 1e9 / runs / per_put)))
    return [_run(program, environment, test, size, turns) for _ in range(runs)]


def _run(program: str, environment: dict[str, str], test: str, size: int, turns: int) -> float:
    port = _free_port()
    server = subprocess.Popen(
        [program, "-p", str(port)], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    command = [program, "127.0.0.1", "-p", str(port), "-t", test, "-s", str(size), "-n", str(turns), "-w", "200", "-fv"]
    try:
        deadline = time.monotonic() + 10
        while True:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
            if done.returncode == 0:
                break
            if time.monotonic() > deadline or server.poll() is not None:
                raise Unavailable(f"ucx_perftest {test}: {done.stderr.strip()[-300:]}")
            time.sleep(0.1)  # the server is not yet listening
    except subprocess.TimeoutExpired:
        raise Unavailable(f"ucx_perftest {test} did not end") from None
    finally:
        server.kill()
        server.wait()
    rows = list(csv.DictReader(line for line in done.stdout.splitlines() if "," in line))
    if not rows:
        raise Unavailable(f"ucx_perftest {test} printed no result")
    return float(rows[-1][_COLUMNS[test]]) * 1000


def _find() -> tuple[str, str]:
    """The program and where its libraries lie."""
    spec = importlib.util.find_spec("libucx")
    for folder in spec.submodule_search_locations or [] if spec else []:
        program = Path(folder) / "bin/ucx_perftest"
        if program.exists():
            return str(program), str(Path(folder) / "lib")
    if program_there := shutil.which("ucx_perftest"):
        return program_there, ""
    raise Unavailable("no ucx_perftest (the wheel libucx has one)")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port
