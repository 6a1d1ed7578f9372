"""One loop's soak: the rounds, and the matching of both sides."""

from __future__ import annotations

import contextlib
import json
import select
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from . import link
from .judge import WRONG, judge
from .matching import Endings
from .plans import NATIVE_SHARE, NATIVE_WAYS, SCOPES_SHARE, SHARES, Share, Way
from .processes import OTHER_CORES, PATIENCE, POLL, SERVER_CORES, Lines, Process, Stuck
from .progress import Progress
from .records import Ended, Flow, Seen, flow
from .report import Result, Sample
from .tls import make_certificate

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Self

# Each round ends with a sample. Its last seconds are for those who wait for a timeout.
ROUNDS = 10
LEAST_PER_ROUND, MOST_PER_ROUND = 400, 20_000
STARVED_ACCEPTS = 3  # that fail in an episode: 200 ms
STARVE_AT = 0.1  # of a round's connections that have ended
SHOWN = 5  # connections of each way that went wrong

EXPECTED_RECORDS = (
    "ERROR a handler failed",
    "ERROR accept: ",
    "INFO the peer went away",
    "INFO %s: %r",  # a TLS handshake that failed
)


class Soak:
    """One loop."""

    def __init__(self, loop: str, seed: int, *, with_link: bool) -> None:
        self.result = Result(loop)
        self._seed = seed
        self._link: link.Link | None = None
        self._relay: Process | None = None
        self._progress = Progress(loop)
        self._part: Callable[[int], float] = lambda done: (
            0.0
        )  # of so many, or of the time
        self._started = 0
        self._expected_endings = 0
        self._native_endings: Counter[str] = Counter()
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
        certificate, trust = make_certificate(directory)
        listeners: list[int] = []
        if with_link:
            self._link = link.Link()
            stack.callback(self._link.close)
            listeners = [sock.fileno() for sock in self._link.listeners.values()]
            tuns = self._link.server_tun, self._link.peer_tun
            self._relay = stack.enter_context(
                Process("relay", self._seed, *tuns, cores=OTHER_CORES, keep=tuns)
            )
        self._server = stack.enter_context(
            Process(
                "server",
                loop,
                endings,
                certificate,
                *listeners,
                cores=SERVER_CORES,
                keep=listeners,
            )
        )
        ports = self._server.ask()["ports"]
        self._endings = Lines(endings)
        stack.callback(self._endings.close)
        for place, share in enumerate(SHARES):
            if share.lossy and self._link is None:
                continue
            path = directory / f"seen-{place}"
            self._seen.append(Lines(path))
            stack.callback(self._seen[-1].close)
            words: list[object] = [path, self._seed, trust]
            keep = []
            if self._link is not None and share.lossy:
                keep = [self._link.namespace]
                words += [json.dumps(self._link.ports), place, *keep]
            else:
                words += [json.dumps(ports), place]
            peers = Process("peers", *words, cores=OTHER_CORES, keep=keep)
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
            per_round = min(MOST_PER_ROUND, -(-connections // ROUNDS))
            per_round = max(LEAST_PER_ROUND, per_round)
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
        self._check_totals()

    def _round(self, count: int) -> None:
        parts = {share: int(count * share.part) for share in self._peers}
        parts[NATIVE_SHARE] += count - sum(parts.values())
        self._until_settled(count, parts)
        self._until_quiet()
        flows: dict[int, Flow] = {}
        if self._relay is not None:
            found = self._relay.ask("report")
            flows = {int(port): flow(record) for port, record in found["flows"].items()}
            self.result.link.clear()
            self.result.link.update(found["totals"])
        for peers in self._peers.values():
            peers.tell("finish")
        self._until_over()
        self._sample()
        self._match(flows)

    def _begin(self, share: Share, part: int) -> None:
        self._peers[share].tell("round", self._started, part)
        self._started += part

    def _until_settled(self, count: int, parts: dict[Share, int]) -> None:
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
            ready = select.select(processes, [], [], until - time.monotonic())[0]
            if not ready:
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
                status["open"] == 0
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

    def _match(self, flows: dict[int, Flow]) -> None:
        result = self.result
        ends = Endings(result)
        for line in self._endings.new():
            ended = Ended(*line)
            ends.add(ended)
            if Way(ended.way) in NATIVE_WAYS:
                self._native_endings[ended.kind] += 1
        for lines in self._seen:
            for line in lines.new():
                seen = Seen(*line)
                passed = flows.get(seen.port) if seen.lossy else None
                self._add(seen, ends.pop(seen), passed)
        result.faults += [f"an Ending of no connection: {e}" for e in ends.left()]

    def _add(self, seen: Seen, ended: Ended | None, passed: Flow | None) -> None:
        result = self.result
        verdict, reason = judge(seen, ended, passed)
        result.add(seen, verdict)
        of_its_way = sum(result.ways[seen.way][wrong.name] for wrong in WRONG)
        if verdict in WRONG and of_its_way <= SHOWN:
            wrong = f"{seen.way}: {reason}: {seen}, {ended}, {passed}"
            result.wrong.append(wrong)
            print(f"\n{wrong}", file=sys.stderr, flush=True)

    def _check_totals(self) -> None:
        """The sums that the server and its log have kept."""
        result, found = self.result, self._last
        kinds = {kind: count for kind, count in found["kinds"].items() if count}
        if kinds != self._native_endings:
            result.faults.append(
                f"statistics() has {kinds}, and not {self._native_endings}"
            )
        for record in found["records"]:
            if not record.startswith(EXPECTED_RECORDS):
                result.faults.append(f"in the log: {record}")
        if self._link is not None and (lost := self._link.overflowed()):
            result.faults.append(f"{lost} packets were lost outside of the link")
        if not result.episodes:
            result.faults.append("no accept has ever failed with EMFILE")
