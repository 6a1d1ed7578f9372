"""Servers that are killed while a child, which they have forked, lives on.

Each has peers of its own. All of them have been heard, and most are in the middle of
their work, when the server forks, and soon after it is killed: SIGKILL. The child does
nothing, and outlives what is seen of the connections, so whatever it would keep open is
found.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import signal
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from evidence.processes import OTHER_CORES, PATIENCE, SERVER_CORES, Process, Stuck

from .disturbances import fork
from .judge import WRONG, judge
from .matching import Endings
from .processes import POLL, Lines, start
from .records import Ended, Seen
from .results import Result
from .shares import ALL_SHARES, KILLED_SHARE

if TYPE_CHECKING:
    from collections.abc import Iterator

PEERS = 96  # at once
KILLED_AFTER = 0.3  # seconds at most, from the fork
CHILD_LIVES = 20.0  # seconds, if it is not killed
FINISH = 3.0  # seconds to read what there is
ENDS_WITHIN = 6.0  # seconds after the death, what the slowest reader takes


def die(
    loop: str, seed: int, number: int, certificate: Path, trust: Path, result: Result
) -> Iterator[str]:
    """One server's death, counted in *result*. Yields what is wrong, in full."""
    rng = random.Random(f"{seed} {loop} death {number}")
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(TemporaryDirectory()))
        paths = directory / "endings", directory / "seen"
        endings, lines = map(Lines, paths)
        stack.callback(endings.close)
        stack.callback(lines.close)
        server = stack.enter_context(
            start("server", loop, paths[0], certificate, cores=SERVER_CORES)
        )
        ports = json.dumps(server.answer()["ports"])
        place = ALL_SHARES.index(KILLED_SHARE)
        words = paths[1], seed, trust, ports, place
        peers = stack.enter_context(start("peers", *words, cores=OTHER_CORES))
        peers.tell("round", number * PEERS, PEERS)
        _until_accepted(server)
        child = fork(server, CHILD_LIVES)
        try:
            time.sleep(rng.uniform(0, KILLED_AFTER))
            server.kill()
            _until_settled(peers)
            peers.tell("finish", FINISH)
            _until_over(peers)
        finally:
            os.kill(child, signal.SIGKILL)
        result.deaths += 1
        ends = Endings(Result(loop))
        for line in endings.new():
            ends.add(Ended(*line))
        for line in lines.new():
            seen = Seen(*line)
            ended = ends.pop(seen)
            verdict, reason = judge(seen, ended, None, killed=True)
            result.killed[verdict.name] += 1
            if verdict in WRONG:
                yield f"killed, {seen.way}: {reason}: {seen}, {ended}"


def _until_accepted(server: Process) -> None:
    """All of the peers, and in their scopes: no others are those of the library."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        status = server.ask("status")
        if status["begun"] >= PEERS:
            return
        time.sleep(POLL)
    raise Stuck("the server that is to be killed does not get its connections")


def _until_settled(peers: Process) -> None:
    """Or until they should have been: who has not seen an end by then is to be found."""
    until = time.monotonic() + ENDS_WITHIN
    while (left := until - time.monotonic()) > 0:
        if select.select([peers], [], [], left)[0] and any(
            line.startswith("settled") for line in peers.arrived()
        ):
            return


def _until_over(peers: Process) -> None:
    while True:
        if not select.select([peers], [], [], PATIENCE)[0]:
            raise Stuck("the peers of a server that was killed do not finish")
        if "over" in peers.arrived():
            return
