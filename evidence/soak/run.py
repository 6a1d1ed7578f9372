"""One loop's soak: its processes, and the rounds."""

from __future__ import annotations

import contextlib
import json
import random
import re
import select
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from evidence.certificates import issue
from evidence.processes import OTHER_CORES, PATIENCE, SERVER_CORES, Process, Stuck
from evidence.sockets import HOST

from . import link
from .deaths import die
from .disturbances import Disturbances
from .matching import SHOWN, Matching
from .processes import POLL, Lines, start
from .progress import Progress
from .records import Flow, flow
from .results import Result, Sample
from .shares import ALL_SHARES, LINK_SHARE, SCOPES_SHARE, SHARES, Share
from .wire import SERVER_ADDRESS

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Self

# Each round ends with a sample. Its last seconds are for those who wait for a timeout.
ROUNDS = 10
LEAST_PER_ROUND, MOST_PER_ROUND = 400, 20_000
STARVED_ACCEPTS = 3  # that fail in an episode: 200 ms
STARVE_AT = 0.1  # of a round's connections that have ended
# Of what the kernels count, what there is to say of segments that TCP did not take.
TELLING = re.compile("Drop|Skip|Challenge|Prune|Abort|PAWS|Overflow|Rst|Err|Fail|Reset")
FINISH_LINK = 0.5  # seconds to read what there is; all has arrived then


class Soak:
    """One loop."""

    def __init__(
        self, loop: str, seed: int, *, with_link: bool, link_only: bool = False
    ) -> None:
        self.result = Result(loop)
        self._seed = seed
        self._link_only = link_only
        self._rng = random.Random(f"{seed} {loop} disturbances")
        self._link: link.Link | None = None
        self._relay: Process | None = None
        self._progress = Progress(loop)
        # Of so many, or of the time.
        self._part: Callable[[int], float] = lambda _: 0.0
        self._started = 0
        self._expected_endings = 0
        self._matching = Matching(self.result, self._evidence)
        self._peers: dict[Share, Process] = {}
        self._seen: list[Lines] = []
        with contextlib.ExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            self._start(stack, loop, directory, with_link=with_link)
            self._stack = stack.pop_all()

    def _start(
        self,
        stack: contextlib.ExitStack,
        loop: str,
        directory: Path,
        *,
        with_link: bool,
    ) -> None:
        endings = directory / "endings"
        certificate, trust = self._certificate = issue(directory, HOST, SERVER_ADDRESS)
        listeners: list[int] = []
        if with_link:
            self._link = link.Link()
            stack.callback(self._link.close)
            listeners = [sock.fileno() for sock in self._link.listeners.values()]
            tuns = self._link.server_tun, self._link.peer_tun
            self._relay = stack.enter_context(
                start("relay", self._seed, *tuns, cores=OTHER_CORES, keep=tuns)
            )
        words: list[object] = [loop, endings, certificate, *listeners]
        self._server = stack.enter_context(
            start("server", *words, cores=SERVER_CORES, keep=listeners)
        )
        ports = self._server.answer()["ports"]
        self._endings = Lines(endings)
        stack.callback(self._endings.close)
        for share in (LINK_SHARE,) if self._link_only else SHARES:
            if share.lossy and self._link is None:
                continue
            place = ALL_SHARES.index(share)
            path = directory / f"seen-{place}"
            self._seen.append(Lines(path))
            stack.callback(self._seen[-1].close)
            words = [path, self._seed, trust]
            keep = []
            if self._link is not None and share.lossy:
                keep = [self._link.namespace]
                words += [json.dumps(self._link.ports), place, *keep]
            else:
                words += [json.dumps(ports), place]
            peers = start("peers", *words, cores=OTHER_CORES, keep=keep)
            self._peers[share] = stack.enter_context(peers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.end()
        self._stack.close()

    def run(self, connections: int | None, seconds: float | None) -> None:
        """*connections*, or for so many *seconds*."""
        start = time.monotonic()
        limit = seconds or 0.0

        def elapsed() -> float:
            return time.monotonic() - start

        if connections is not None:
            # The link keeps what it has seen of those of two rounds.
            most = MOST_PER_ROUND // 4 if self._link_only else MOST_PER_ROUND
            per_round = max(LEAST_PER_ROUND, min(most, -(-connections // ROUNDS)))
        else:
            per_round = MOST_PER_ROUND // 4  # a few minutes have to have enough of them
        self._sample()
        while True:
            done = self.result.connections
            count = per_round
            if connections is not None:
                count = min(per_round, connections - done)
                self._part = lambda done: done / connections
            else:
                self._part = lambda _: elapsed() / limit
                # One more only if most of it fits.
                if done and elapsed() * (1 + per_round / done / 2) > limit:
                    count = 0
            if count <= 0:
                break
            self._round(count)
            self.result.seconds = elapsed()
        self._progress.show(1.0, self.result)
        self._matching.check_totals(self._last)
        self._check_events()

    def _round(self, count: int) -> None:
        parts = {share: int(count * share.part) for share in self._peers}
        parts[next(iter(parts))] += count - sum(parts.values())
        if self._link is not None:
            self._counted = self._link.counters()
        with Disturbances(
            self._rng, self._server, self._peers.values(), self.result
        ) as disturbances:
            self._until_settled(count, parts, disturbances)
        self._until_quiet()
        flows: dict[int, Flow] = {}
        if self._relay is not None:
            found = self._relay.ask("report")
            flows = {int(port): flow(record) for port, record in found["flows"].items()}
            self.result.link.clear()
            self.result.link.update(found["totals"])
        for share, peers in self._peers.items():
            peers.tell("finish", *([FINISH_LINK] if share.lossy else []))
        self._until_over()
        self._sample()
        self._matching.match(self._endings, self._seen, flows)
        if not self._link_only:
            self._die()

    def _evidence(self, port: int) -> str:
        assert self._link is not None
        assert self._relay is not None
        trace = "\n".join(self._relay.ask("trace", port))
        counted = self._link.counters() - self._counted
        telling = {name: counted[name] for name in counted if TELLING.search(name)}
        return f"{trace}\nin this round: {telling}"

    def _die(self) -> None:
        """Have another server be killed, once a round."""
        result = self.result
        for shown, wrong in enumerate(
            die(result.loop, self._seed, result.deaths, *self._certificate, result)
        ):
            if shown < SHOWN:
                self._matching.show(wrong)

    def _begin(self, share: Share, part: int) -> None:
        self._peers[share].tell("round", self._started, part)
        self._started += part

    def _until_settled(
        self, count: int, parts: dict[Share, int], disturbances: Disturbances
    ) -> None:
        """Run the peers until all have begun, and count those over loopback.

        The scopes wait until the server has its descriptors again: the listeners that
        others make do not survive it, and a scope may need one for itself.
        """
        for share in self._peers:
            if share is not SCOPES_SHARE:
                self._begin(share, parts[share])
        waiting = dict(self._peers)
        done = 0
        starved = False
        until = time.monotonic() + PATIENCE
        while waiting:
            processes = {peers: share for share, peers in waiting.items()}
            patience = min(until - time.monotonic(), disturbances.until_next())
            ready = select.select(processes, [], [], patience)[0]
            disturbances.step()
            if not ready and time.monotonic() > until:
                raise Stuck("the peers do not come to an end")
            for peers in ready:
                for line in peers.arrived():
                    word, number = line.split()
                    if word == "settled":
                        share = processes[peers]
                        del waiting[share]
                        self._expected_endings += 0 if share.lossy else int(number)
                        continue
                    done += int(number)
                    until = time.monotonic() + PATIENCE
            part = self._part(self.result.connections + done)
            self._progress.show(part, self.result, done)
            alone = [*waiting] == [SCOPES_SHARE]
            if not starved and (alone or done >= count * STARVE_AT):
                starved = True
                if not alone:  # else nobody connects: it is a round of a few
                    self._starve()
                if SCOPES_SHARE in self._peers:
                    self._begin(SCOPES_SHARE, parts[SCOPES_SHARE])

    def _starve(self) -> None:
        failures = self._server.ask("starve", STARVED_ACCEPTS)["failures"]
        self.result.episodes += failures > 0
        self.result.accept_failures += failures

    def _until_quiet(self) -> None:
        """Until every connection has ended, and the link has nothing more to bring."""
        until = time.monotonic() + PATIENCE
        status = {}
        while time.monotonic() < until:
            status = self._server.ask("status")
            if (
                status["open"] == status["children"] == 0
                and status["ended"] >= self._expected_endings
                and (self._link is None or self._link.is_quiet())
            ):
                return
            time.sleep(POLL)
        raise Stuck(
            f"the server's connections do not end: {status}, and "
            f"{self._expected_endings} were made over loopback"
        )

    def _until_over(self) -> None:
        waiting = set(self._peers.values())
        while waiting:
            ready = select.select(waiting, [], [], PATIENCE)[0]
            if not ready:
                raise Stuck("the peers do not finish")
            for peers in ready:
                if "over" in peers.arrived():
                    waiting.remove(peers)

    def _sample(self) -> None:
        found = self._server.ask("sample")
        self._last = found
        names = ("rss", "descriptors", "blocks")
        self.result.samples.append(Sample(**{name: found[name] for name in names}))

    def _check_events(self) -> None:
        """Whether all has happened that is to happen by chance, and nothing else."""
        result = self.result
        if self._link is not None and (lost := self._link.overflowed()):
            result.faults.append(f"{lost} packets were lost outside of the link")
        happened = {
            "no accept has ever failed with EMFILE": result.episodes,
            "the server has never forked": result.forks,
            "no peers have ever been stopped": result.stops,
            "no slow reader has outlasted the drain's limit": (
                self._link_only or result.outlasted
            ),
        }
        result.faults += [fault for fault, count in happened.items() if not count]
