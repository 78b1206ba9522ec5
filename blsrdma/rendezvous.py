"""How ranks find each other: one blob per rank in a torch.distributed Store, and everybody's blobs back as one value.

The store may be dirty: after a restart it still holds what an earlier incarnation of a rank wrote. So nothing found in
it is believed until its author has shown that it is alive:

1. every rank r sets `hello/r`: a fresh id, its settings and its blob;
2. rank 0 publishes all hellos it sees as one *round* under a fresh id, and again under a new one whenever a hello
changes; 3. a rank that finds its own fresh id in the round sets `ack/r` to the round's id; a stale hello is never
acknowledged; 4. when all have acknowledged, or those who have disagree on a setting, or one reported an error, rank 0
sets `go` to the
   round's id and a verdict. Everyone acts on that.

Then the ranks connect, and confirm() tells all of them whether all have. The round's id gives the *epoch*, which goes
into
every check word: a late write of an earlier incarnation does not pass for one of this.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import math
import sys
import time
import uuid
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from blsrdma import launchers
from blsrdma.errors import RendezvousError, SettingsError, SettingsMismatch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch.distributed import Store

log = logging.getLogger("blsrdma")

PROTOCOL = 1  # raised with every change of what ranks write into each other's memory or into the store
# How long no hello must have changed before bad news is told: an error in the store may be an earlier incarnation's,
# about to be replaced, and a rank that still comes has to hear of a mismatch too.
GRACE_S = 1.0


@dataclass(frozen=True)
class Round:
    """What a rendezvous gives: every rank's blob, in rank order, and the epoch they share."""

    id: str
    blobs: list[dict[str, Any]]

    @property
    def epoch(self) -> int:
        """64 bits, the same on every rank and different in every round."""
        return int.from_bytes(hashlib.sha256(self.id.encode()).digest()[:8], "little")


def environment_ranks() -> tuple[int, int]:
    """(rank, world size) as this process's launcher gives them. Raises SettingsError where none has started it."""
    place = launchers.place()
    return place.rank, place.world_size


def store_from_environment(rank: int, world_size: int, timeout: float = 60.0) -> Store:
    """The TCPStore of this job, see blsrdma.launchers; rank 0 hosts it unless the launcher does. Raises SettingsError
    where the environment does not say where it is, RendezvousError where it cannot be reached within `timeout`
    seconds."""
    place = launchers.meeting(rank, world_size)
    from torch.distributed import DistError, PrefixStore, TCPStore

    try:
        # Multi-tenant: a second exchange of this process, or init_process_group, finds the server it already has.
        store = TCPStore(
            place.host, place.port, world_size, is_master=rank == 0 and not place.hosted,
            timeout=timedelta(seconds=min(timeout, 1e8)), wait_for_workers=False, multi_tenant=True,
        )  # fmt: skip
    except DistError as error:
        what = "host" if rank == 0 and not place.hosted else "reach"
        reason = str(error).partition("\n")[0]
        raise RendezvousError(f"rank {rank} cannot {what} the store at {place.host}:{place.port}: {reason}") from None
    return PrefixStore(f"blsrdma/{place.job}", store)


class Rendezvous:
    """One rank's part in one meeting. The deadline holds for the whole of it."""

    def __init__(self, store: Store, name: str, rank: int, world_size: int, timeout: float) -> None:
        if not 0 <= rank < world_size:
            raise SettingsError(f"rank = {rank}: must be in 0 .. world_size - 1 = {world_size - 1}")
        self._store = store
        self._prefix = f"blsrdma/{name}/"
        self._rank = rank
        self._world = world_size
        self._deadline = time.monotonic() + timeout
        self._timeout = timeout
        self._id = uuid.uuid4().hex
        self._round_id = ""

    def meet(self, agreed: Mapping[str, Any], blob: Mapping[str, Any]) -> Round:
        """Publish `blob` and return everybody's.

        `agreed` are the settings that must be equal on all ranks. Raises SettingsMismatch, naming ranks and values;
        RendezvousError naming the ranks that are missing at the deadline, or the rank that reported an error.
        """
        agreed = {"protocol": PROTOCOL, "world_size": self._world, "byte_order": sys.byteorder, **agreed}
        self._hello({"agreed": agreed, "blob": _encode(blob)})
        return self._lead() if self._rank == 0 else self._follow()

    def report(self, error: BaseException) -> None:
        """Tell the others, who are on their way to meet(), that this rank will not come."""
        self._hello({"error": f"{type(error).__name__}: {error}"[:2000]})

    def confirm(self, error: BaseException | None) -> None:
        """After a meeting: return when every rank has confirmed without an error, else raise RendezvousError."""
        text = "" if error is None else f"{type(error).__name__}: {error}"[:2000]
        prefix = f"{self._round_id}/done/"
        self._set(prefix + str(self._rank), text or "ok")
        if self._rank == 0:
            waiting, verdict = set(range(self._world)), ""
            while waiting and not verdict:
                for r in [r for r in waiting if self._check(prefix + str(r))]:
                    said = self._get(prefix + str(r))
                    waiting.discard(r)
                    if said != "ok":
                        verdict = f"rank {r} could not connect: {said}"
                if waiting and not verdict and self._late():
                    verdict = f"ranks {_list(waiting)} have not connected within {self._timeout:g} s"
            self._set(self._round_id + "/verdict", verdict or "ok")
        else:
            self._await(self._round_id + "/verdict", "rank 0 has not said whether all ranks are connected")
            verdict = self._get(self._round_id + "/verdict")
        if verdict not in ("", "ok"):
            raise RendezvousError(verdict) from error

    # --- rank 0

    def _lead(self) -> Round:
        hellos: dict[int, dict[str, Any]] = {}
        raw: dict[int, str] = {}
        acking: set[int] = set()
        changed_at = time.monotonic()
        while True:
            # A rank beyond our world is looked for too: it believes in a larger one, and must hear that we do not.
            beyond = range(self._world, max([self._world - 1, *raw]) + 2)
            known = [r for r in (*range(self._world), *beyond) if r in raw or self._check(f"hello/{r}")]
            present = dict(zip(known, self._get_all([f"hello/{r}" for r in known]), strict=True))
            if present != raw:
                raw = present
                hellos = {r: json.loads(text) for r, text in raw.items()}
                self._round_id, changed_at = uuid.uuid4().hex, time.monotonic()
                self._set("ack/0", self._round_id)
                self._set("round", json.dumps({"id": self._round_id, "hellos": hellos}))
            may_have = [r for r in hellos if r in acking or self._check(f"ack/{r}")]
            acking.update(may_have)
            acks = dict(zip(may_have, self._get_all([f"ack/{r}" for r in may_have]), strict=True))
            acked = [r for r in may_have if acks[r] == self._round_id]
            verdict = _disagreement({r: hellos[r]["agreed"] for r in acked})
            failed = [r for r in hellos if "error" in hellos[r]]
            settled = time.monotonic() - changed_at > GRACE_S
            if failed and settled:
                verdict = {"error": f"rank {failed[0]} failed: {hellos[failed[0]]['error']}"}
            if settled if verdict else set(acked) >= set(range(self._world)):
                self._set("go", json.dumps({"id": self._round_id, **verdict}))
                return self._result(hellos, verdict)
            if self._late():
                missing = sorted(set(range(self._world)) - set(acked))
                error = f"ranks {_list(missing)} have not come within {self._timeout:g} s"
                self._set("go", json.dumps({"id": self._round_id, "error": error}))
                raise RendezvousError(error)

    # --- every other rank

    def _follow(self) -> Round:
        hellos: dict[int, dict[str, Any]] = {}
        failing_since = math.inf
        while True:
            if self._check("round"):
                found = json.loads(self._get("round"))
                members = {int(r): hello for r, hello in found["hellos"].items()}
                if found["id"] != self._round_id and members.get(self._rank, {}).get("id") == self._id:
                    self._round_id, hellos = found["id"], members
                    self._set(f"ack/{self._rank}", self._round_id)
            if self._check("hello/0"):
                leader = json.loads(self._get("hello/0"))
                if "error" not in leader:
                    failing_since = math.inf
                elif time.monotonic() - (failing_since := min(failing_since, time.monotonic())) > GRACE_S:
                    raise RendezvousError(f"rank 0 failed: {leader['error']}")
            if self._round_id and self._check("go"):
                verdict = json.loads(self._get("go"))
                if verdict.pop("id") == self._round_id:
                    return self._result(hellos, verdict)
            if self._late():
                raise RendezvousError(
                    f"rank 0 has not brought all {self._world} ranks together within {self._timeout:g} s"
                    if self._round_id
                    else f"rank 0 has not answered within {self._timeout:g} s"
                )

    def _result(self, hellos: dict[int, dict[str, Any]], verdict: Mapping[str, str]) -> Round:
        if "mismatch" in verdict:
            raise SettingsMismatch(verdict["mismatch"])
        if "error" in verdict:
            raise RendezvousError(verdict["error"])
        return Round(self._round_id, [_decode(hellos[r]["blob"]) for r in range(self._world)])

    # --- the store

    def _hello(self, content: Mapping[str, Any]) -> None:
        self._set(f"hello/{self._rank}", json.dumps({"id": self._id, **content}))

    def _set(self, key: str, value: str) -> None:
        self._store.set(self._prefix + key, value)

    def _check(self, key: str) -> bool:
        return bool(self._store.check([self._prefix + key]))

    def _get(self, key: str) -> str:
        return self._store.get(self._prefix + key).decode()

    def _get_all(self, keys: list[str]) -> list[str]:
        if not getattr(self._store, "has_extended_api", bool)():
            return [self._get(key) for key in keys]
        return [value.decode() for value in self._store.multi_get([self._prefix + key for key in keys])]

    def _await(self, key: str, otherwise: str) -> None:
        while not self._check(key):
            if self._late():
                raise RendezvousError(f"{otherwise} within {self._timeout:g} s")

    def _late(self) -> bool:
        """Sleep for a moment; whether the deadline has passed."""
        time.sleep(0.002)
        return time.monotonic() > self._deadline


def _disagreement(settings: Mapping[int, Mapping[str, Any]]) -> dict[str, str]:
    """{} if all ranks' settings are equal, else {"mismatch": every setting that differs, with each value's ranks}."""
    names = dict.fromkeys(name for each in settings.values() for name in each)
    differences = []
    for name in names:
        ranks_of: dict[str, list[int]] = {}
        for rank in sorted(settings):
            ranks_of.setdefault(repr(settings[rank].get(name)), []).append(rank)
        if len(ranks_of) > 1:
            held = "; ".join(f"{value} on rank{'s' * (len(r) > 1)} {_list(r)}" for value, r in ranks_of.items())
            differences.append(f"{name} is {held}")
    return {"mismatch": "ranks disagree: " + ", and ".join(differences)} if differences else {}


def _list(ranks: Sequence[int] | set[int]) -> str:
    return ", ".join(str(r) for r in sorted(ranks))


def _encode(blob: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: {"b64": base64.b64encode(value).decode()} if isinstance(value, bytes) else value
        for key, value in blob.items()
    }


def _decode(blob: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: base64.b64decode(value["b64"]) if isinstance(value, dict) and "b64" in value else value
        for key, value in blob.items()
    }


__all__ = ["Rendezvous", "Round", "environment_ranks", "store_from_environment"]
