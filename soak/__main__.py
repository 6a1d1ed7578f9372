"""Soak `serve_tcp`: `python -m soak --help`; docs/soak.md says how. Linux only."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import select
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import link, report
from .judge import WRONG, Ended, Flow, Seen, flow, judge
from .report import Report, Result, Sample

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from typing_extensions import Self

ROOT = Path(__file__).parents[1]
LOOPS = ("asyncio", "uvloop", "trio")
CONNECTIONS = 200_000  # of each loop
# Each round ends with a sample. Its last seconds are for those who wait for a timeout.
ROUNDS = 10
LEAST_PER_ROUND, MOST_PER_ROUND = 400, 20_000
LOSSY = 10  # one in so many goes across the link
STARVED_ACCEPTS = 3  # that fail in an episode: 200 ms
STARVE_AT = 0.1  # of a round's connections that have ended
POLL = 0.05  # seconds
PATIENCE = 120.0  # seconds, for one step of a round
SHOWN = 10  # connections that went wrong

# One core for the server, the others for the rest.
CORES = sorted(os.sched_getaffinity(0))
SERVER_CORES, OTHER_CORES = CORES[-1:], CORES[:-1] or CORES


class Stuck(Exception):
    """Something does not come to its end."""


class Process:
    def __init__(
        self, module: str, *arguments: object, cores: list[int], keep: Sequence[int] = ()
    ) -> None:
        self._name = module
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.{module}", *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            pass_fds=keep,
            start_new_session=True,  # Ctrl-C is for us; they end with their input
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        os.sched_setaffinity(self._process.pid, cores)
        self._read = b""

    def fileno(self) -> int:
        return self._stdout.fileno()

    def tell(self, *words: object) -> None:
        self._stdin.write(" ".join(map(str, words)).encode() + b"\n")
        self._stdin.flush()

    def arrived(self) -> list[str]:
        """The lines that are there, after waiting for the first."""
        data = os.read(self.fileno(), 2**20)
        if not data:
            raise Stuck(f"the process of soak.{self._name} has died")
        *lines, self._read = (self._read + data).split(b"\n")
        return [line.decode() for line in lines]

    def ask(self, *words: object) -> Any:
        if words:
            self.tell(*words)
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            if select.select([self], [], [], POLL)[0] and (lines := self.arrived()):
                (line,) = lines
                return json.loads(line)
        raise Stuck(f"soak.{self._name} does not answer")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._process:
            self._process.kill()


class Progress:
    """A bar on a terminal, and a line now and then elsewhere."""

    WIDTH = 30
    STEP = 0.1

    def __init__(self, loop: str) -> None:
        self._loop = loop
        self._start = time.monotonic()
        self._told = 0.0
        self._is_terminal = sys.stderr.isatty()

    def show(self, part: float, result: Result, under_way: int = 0) -> None:
        part = min(part, 1.0)
        if not self._is_terminal:
            if part < self._told + self.STEP and (part < 1 or self._told >= 1):
                return
            self._told = part
        done = result.connections + under_way
        rate = done / max(time.monotonic() - self._start, 0.001)
        bar = "#" * int(part * self.WIDTH)
        text = (
            f"{self._loop:8}[{bar:{self.WIDTH}}] {part:4.0%} {done:>9,} connections, "
            f"{rate:6,.0f} a second, {result.disagreements()} disagreements"
        )
        end = "" if self._is_terminal else "\n"
        start = "\r" if self._is_terminal else ""
        print(start + text, end=end, file=sys.stderr, flush=True)

    def end(self) -> None:
        if self._is_terminal:
            print(file=sys.stderr)


class Lines:
    """What a process appends to a file, as it comes."""

    def __init__(self, path: Path) -> None:
        path.touch()
        self._file = path.open()

    def new(self) -> Iterator[Any]:
        for line in self._file:
            yield json.loads(line)

    def close(self) -> None:
        self._file.close()


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
        with contextlib.ExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            self._peers = self._start(stack, loop, directory, with_link=with_link)
            self._stack = stack.pop_all()

    def _start(
        self,
        stack: contextlib.ExitStack,
        loop: str,
        directory: Path,
        *,
        with_link: bool,
    ) -> list[Process]:
        """Start the server, and return the peers of either part."""
        endings = directory / "endings"
        files = [directory / "loopback", directory / "lossy"]
        listeners = []
        if with_link:
            self._link = link.Link()
            stack.callback(self._link.close)
            listeners = [self._link.listener.fileno()]
            tuns = self._link.server_tun, self._link.peer_tun
            self._relay = stack.enter_context(
                Process("link", self._seed, *tuns, cores=OTHER_CORES, keep=tuns)
            )
        self._server = stack.enter_context(
            Process(
                "server", loop, endings, *listeners, cores=SERVER_CORES, keep=listeners
            )
        )
        port = self._server.ask()["port"]
        self._endings = Lines(endings)
        stack.callback(self._endings.close)
        self._seen = [Lines(path) for path in files]
        for lines in self._seen:
            stack.callback(lines.close)
        peers = [Process("peers", files[0], self._seed, port, cores=OTHER_CORES)]
        stack.enter_context(peers[0])
        if self._link is not None:
            namespace = self._link.namespace
            words = files[1], self._seed, self._link.port, namespace
            peers.append(Process("peers", *words, cores=OTHER_CORES, keep=(namespace,)))
            stack.enter_context(peers[1])
        return peers

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
        shares = [count]
        if self._relay is not None:
            shares = [count - count // LOSSY, count // LOSSY]
        for peers, share in zip(self._peers, shares, strict=True):
            peers.tell("round", self._started, share)
            self._started += share
        connected = self._until_settled(count)
        self._until_quiet(connected)
        flows: dict[int, Flow] = {}
        if self._relay is not None:
            found = self._relay.ask("report")
            flows = {int(port): flow(record) for port, record in found["flows"].items()}
            self.result.link.clear()
            self.result.link.update(found["totals"])
        for peers in self._peers:
            peers.tell("finish")
        self._until_over()
        self._sample()
        self._match(flows)

    def _until_settled(self, count: int) -> int:
        """Return how many have connected over loopback."""
        waiting = dict.fromkeys(self._peers, -1)
        done = 0
        starved = False
        until = time.monotonic() + PATIENCE
        while -1 in waiting.values():
            ready = select.select(self._peers, [], [], until - time.monotonic())[0]
            if not ready:
                raise Stuck("the peers do not come to an end")
            for peers in ready:
                for line in peers.arrived():
                    word, number = line.split()
                    if word == "settled":
                        waiting[peers] = int(number)
                        continue
                    done += int(number)
                    until = time.monotonic() + PATIENCE
            part = self._part(self.result.connections + done)
            self._progress.show(part, self.result, done)
            if not starved and done >= count * STARVE_AT:
                starved = True
                failures = self._server.ask("starve", STARVED_ACCEPTS)["failures"]
                self.result.episodes += failures > 0
                self.result.accept_failures += failures
        return waiting[self._peers[0]]

    def _until_quiet(self, connected: int) -> None:
        """Until every connection has ended, and the link has nothing more to bring."""
        self._expected_endings += connected
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
        waiting = set(self._peers)
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
        ended: dict[tuple[str, int], Ended] = {}
        for line in self._endings.new():
            ending = Ended(*line)
            key = ending.host, ending.port
            if key in ended:
                result.faults.append(f"two Endings of one connection: {ending}")
            ended[key] = ending
            result.endings[ending.kind] += 1
            result.causes[ending.cause] += 1
        for lines in self._seen:
            for line in lines.new():
                self._add(Seen(*line), ended, flows)
        result.faults += [f"an Ending of no connection: {e}" for e in ended.values()]

    def _add(
        self, seen: Seen, ended: dict[tuple[str, int], Ended], flows: dict[int, Flow]
    ) -> None:
        result = self.result
        ending = ended.pop((seen.host, seen.port), None)
        passed = flows.get(seen.port) if seen.lossy else None
        verdict, reason = judge(seen, ending, passed)
        result.connections += 1
        result.lossy += seen.lossy
        counts = result.seen.setdefault(seen.kind, Counter())
        counts[seen.close] += 1
        result.verdicts[verdict.name] += 1
        if verdict in WRONG and len(result.wrong) < SHOWN:
            wrong = f"{reason}: {seen}, {ending}, {passed}"
            result.wrong.append(wrong)
            print(f"\n{wrong}", file=sys.stderr, flush=True)

    def _check_totals(self) -> None:
        """The sums that the server and its log have kept."""
        result, found = self.result, self._last
        kinds = {kind: count for kind, count in found["kinds"].items() if count}
        if kinds != result.endings:
            result.faults.append(f"statistics() has {kinds}, and not {result.endings}")
        for record in found["records"]:
            if not record.startswith(EXPECTED_RECORDS):
                result.faults.append(f"in the log: {record}")
        if self._link is not None and (lost := self._link.overflowed()):
            result.faults.append(f"{lost} packets were lost outside of the link")
        if not result.episodes:
            result.faults.append("no accept has ever failed with EMFILE")


EXPECTED_RECORDS = (
    "ERROR a handler failed",
    "ERROR accept: ",
    "INFO the peer went away",
)


def about(seed: int, missing: str | None) -> dict[str, str]:
    versions = [f"python {platform.python_version()}"]
    for package in ("anyio_rst", "anyio", "trio", "uvloop"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{package} {importlib.metadata.version(package)}")
    there = (
        f"loses {link.LOSS:.0%} of the packets in either direction, doubles "
        f"{link.DOUBLED:.0%}, and delays each by {link.DELAY * 1000:.0f} to "
        f"{(link.DELAY + link.JITTER) * 1000:.0f} ms"
    )
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "seed": str(seed),
        "versions": ", ".join(versions),
        "processor": processor(),
        "cores": str(os.cpu_count()),
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "link": there if missing is None else f"left out, {missing}",
    }


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be greater than 0, not {text}")
    return value


def number_of_connections(text: str) -> int:
    value = int(text)
    if value < LEAST_PER_ROUND:
        raise argparse.ArgumentTypeError(f"must be at least {LEAST_PER_ROUND}")
    return value


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m soak", description="Soak serve_tcp, and match both sides."
    )
    add = parser.add_argument
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument(
        "--connections",
        type=number_of_connections,
        help=f"through each loop (default: {CONNECTIONS:,})",
    )
    amount.add_argument("--minutes", type=positive, help="for all loops together")
    amount.add_argument("--short", action="store_true", help="the same as --minutes 5")
    add("--loops", nargs="+", choices=LOOPS, help="default: all that are installed")
    add("--seed", type=int, default=0, help="of what the peers and the link do")
    add("--no-link", action="store_true", help="loopback alone")
    add("--json", type=Path, help="where to write every figure")
    add("--write", action="store_true", help="soak/results.json and docs/soak.md")
    options = parser.parse_args()
    loops = options.loops or [
        loop for loop in LOOPS if loop == "asyncio" or importlib.util.find_spec(loop)
    ]
    minutes = 5.0 if options.short else options.minutes
    missing = "as asked" if options.no_link else link.available()
    if missing is not None:
        print(f"WITHOUT THE LOSSY LINK: {missing}", file=sys.stderr)
    results = []
    for loop in loops:
        with Soak(loop, options.seed, with_link=missing is None) as soak:
            seconds = minutes and minutes * 60 / len(loops)
            connections = None if minutes else options.connections or CONNECTIONS
            results.append(soak.result)
            try:
                soak.run(connections, seconds)
            except Stuck as exc:
                soak.result.faults.append(str(exc))
            except KeyboardInterrupt:
                soak.result.faults.append("interrupted")
                break
    found = Report(about(options.seed, missing), results)
    print(report.tables(found))
    if options.json:
        found.save(options.json)
    status = 0
    for result in results:
        for failure in result.failures():
            print(f"FAILED, {result.loop}: {failure}", file=sys.stderr)
            status = 1
    if options.write and not status:
        found.save(report.RESULTS)
        report.write(found)
    return status


if __name__ == "__main__":
    sys.exit(main())
