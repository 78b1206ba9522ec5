"""Ranks that use a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from bench import environment
from bench.launchers import Interpreters, plan
from bench.team import Team


def team(ranks: int, runtime: str = "bls", more: Mapping[str, str] | None = None) -> Team:
    """Started, with more in their environment, and not ready yet. Raises Unavailable."""
    launch = plan(runtime, ranks, environment.cores(), Interpreters())
    return Team(runtime, ranks, replace(launch, environment={**launch.environment, **(more or {})}))


def words(error: Exception) -> str:
    """What happened to a team, in one line: the first rank's own words."""
    first, *more = str(error).splitlines() or [type(error).__name__]
    return f"{first} {more[0].strip()}" if more and first.endswith(":") else first
