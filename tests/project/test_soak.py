"""The soak: that a small one passes on each loop, and that it would find a lie."""

from __future__ import annotations

import json
import os
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from subprocess import PIPE
from types import SimpleNamespace
from typing import Any

import pytest
from test_readme import free_port

from evidence import ROOT
from evidence.certificates import issue, server_context
from evidence.processes import Stuck
from evidence.soak import link, records, relay, report
from evidence.soak.deaths import PEERS
from evidence.soak.disturbances import FIRST, Disturbances
from evidence.soak.judge import WRONG, Verdict, judge
from evidence.soak.matching import Endings
from evidence.soak.peer import Peer
from evidence.soak.plans import (
    DRAIN_TIMEOUT,
    KIB,
    NOT_IN_TLS,
    SIP_EVERY,
    TRIO_WAYS,
    Manner,
    Way,
    Work,
    plans,
)
from evidence.soak.receiver import FIN, RST, SYN, Receiver
from evidence.soak.records import Arrived, Ended, Flow, Seen
from evidence.soak.results import Report, Result, Sample, load
from evidence.soak.run import Soak
from evidence.soak.shares import ALL_SHARES, KINDS, LINK_SHARE, SHARES
from evidence.soak.tls import TLSSocket, peer_context
from evidence.soak.wire import (
    LINK_PORTS,
    LOOPBACK_PORTS,
    PATTERN,
    PEER_ADDRESS,
    SERVER_ADDRESS,
    place,
)
from evidence.sockets import HOST, RESET_ON_CLOSE

CONNECTIONS = 400
ACK, TCP_CLOSE = 0x10, 7  # a flag, and a state of tcpi_state

SEEN = Seen(
    number=7,
    kind="good",
    work=Work.ANSWER,
    manner=Manner.PLAIN.value,
    size=100,
    lossy=False,
    way=Way.NATIVE.value,
    host="127.0.1.1",
    port=10_007,
    connected=True,
    close="FIN",
    received=100,
    sent=0,
    wrong=False,
    close_notify=False,
    pause=0.0,
    left="",
)
ENDED = Ended(
    host="127.0.1.1",
    port=10_007,
    number=7,
    kind="FIN",
    cause="RETURNED",
    peer="FIN",
    discarded=0,
    unacknowledged=0,
    fin_sent_before_reset=False,
    error=None,
    drained=0.01,
    way=Way.NATIVE.value,
    late=0.0,
)
SEEN_RST = SEEN._replace(kind="failing", work=Work.RAISE, close="RST", received=50)
ENDED_RST = ENDED._replace(kind="RST", cause="RAISED", peer="NONE", error="Failure")
SEEN_RESET = SEEN._replace(kind="resetting", work=Work.WAIT, close="RESET", received=0)
ENDED_RESET = ENDED_RST._replace(peer="RST", error="PeerReset")
SEEN_FLOODING = SEEN._replace(kind="flooding", sent=5000)
ENDED_FLOODING = ENDED._replace(discarded=5000)
SEEN_SIPPING = SEEN._replace(kind="sipping", sent=10, pause=0.4)
ENDED_SIPPING = ENDED._replace(discarded=10, drained=3.0)
SEEN_CUT_OFF = SEEN_SIPPING._replace(close="RST", received=50)
ENDED_CUT_OFF = ENDED_SIPPING._replace(peer="NONE", discarded=9)
SEEN_CUT = SEEN._replace(kind="slow", work=Work.CUT, manner=Manner.LATE.value)
ENDED_CUT = ENDED._replace(cause="CLOSED", peer="NONE", drained=0.05)

SEEN_TLS = SEEN._replace(way=Way.NATIVE_TLS.value, close_notify=True)
ENDED_TLS = ENDED._replace(way=Way.NATIVE_TLS.value)
SEEN_TLS_RST = SEEN_RST._replace(way=Way.NATIVE_TLS.value)
ENDED_TLS_RST = ENDED_RST._replace(way=Way.NATIVE_TLS.value)
SEEN_SCOPE_RESET = SEEN_RESET._replace(way=Way.SCOPE.value)
REFUSED = ENDED_RESET._replace(kind="REFUSED", cause="", number=None, way=Way.SCOPE.value)

PASSED = Arrived(lost=0, refused=0, obeyed=0, reached=9)
OBEYED = PASSED._replace(obeyed=1)
LOST = PASSED._replace(lost=1)


@pytest.mark.parametrize("loop", ["asyncio", "uvloop", "trio"])
def test_small_soak_passes(loop: str, tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    run = [sys.executable, "-m", "evidence.soak", "--loops", loop, "--json", str(path)]
    run += ["--connections", str(CONNECTIONS)]
    found = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    (result,) = load(path).results
    assert result.connections == CONNECTIONS
    assert sum(result.verdicts.values()) == CONNECTIONS
    assert result.disagreements() == 0
    assert set(result.seen) == set(KINDS)
    ways = {way.value for way in Way if loop == "trio" or way not in TRIO_WAYS}
    assert set(result.ways) == ways
    assert sum(map(Counter.total, result.ways.values())) == CONNECTIONS
    assert result.accept_failures
    assert result.stops
    assert result.forks
    assert result.outlasted
    assert result.deaths == 1
    assert result.killed.total() == PEERS
    assert result.killed[Verdict.KILLED.name]
    assert f"{CONNECTIONS} connections" in found.stderr
    if (missing := link.available()) is None:
        assert result.link["packets"] > result.link["lost"] > 0
        assert result.lossy == CONNECTIONS // 10
    else:
        assert missing in found.stderr


@pytest.mark.skipif(link.available() is not None, reason="there is no link")
def test_small_soak_of_the_link_alone_passes(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    run = [sys.executable, "-m", "evidence.soak", "--loops", "asyncio", "--link-only"]
    run += ["--connections", str(CONNECTIONS), "--json", str(path)]
    found = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    (result,) = load(path).results
    assert result.connections == result.lossy == CONNECTIONS
    assert result.deaths == 0


@pytest.mark.skipif(link.available() is not None, reason="there is no link")
def test_what_is_known_of_a_connection_that_went_wrong_is_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def disagree(*_: object) -> tuple[Verdict, str]:
        return Verdict.DISAGREEMENT, "made up"

    monkeypatch.setattr("evidence.soak.matching.judge", disagree)
    with Soak("asyncio", 0, with_link=True, link_only=True) as soak:
        soak.run(CONNECTIONS, None)
    shown = soak.result.wrong[0]
    assert soak.result.disagreements() == CONNECTIONS
    assert "made up" in shown
    assert " by peer 02 " in shown  # its SYN
    assert "server Tcp:OutRsts" in shown
    assert shown in capsys.readouterr().err


def test_killed_soak_leaves_no_process_behind() -> None:
    """And with the processes go the namespaces and devices of the link."""
    run = [sys.executable, "-m", "evidence.soak", "--loops", "asyncio"]
    with subprocess.Popen(run, cwd=ROOT, stderr=subprocess.PIPE) as soak:
        children = Path(f"/proc/{soak.pid}/task/{soak.pid}/children")
        expected = 3 if link.available() is not None else 5
        while len(children.read_text().split()) < expected:
            assert soak.poll() is None
            time.sleep(0.02)
        soak.kill()
        # The pipe ends when the last one that has inherited it does.
        soak.communicate(timeout=30)


@pytest.mark.parametrize(
    ("seen", "ended"),
    [
        (SEEN, ENDED),
        (SEEN_RST, ENDED_RST),
        (SEEN_RESET, ENDED_RESET),
        (SEEN_FLOODING, ENDED_FLOODING),
        (
            SEEN_RST._replace(work=Work.EOF_RAISE, close="FIN", received=100),
            ENDED_RST._replace(fin_sent_before_reset=True),
        ),
        (
            SEEN_RST._replace(work=Work.EOF_RAISE, close="FIN", received=100),
            ENDED._replace(cause="RAISED", error="Failure"),
        ),
        (SEEN_TLS, ENDED_TLS),
        (SEEN_TLS_RST, ENDED_TLS_RST),
        (
            # The handshake, by its timeout.
            SEEN_TLS_RST._replace(kind="vanishing", received=0),
            ENDED_TLS_RST._replace(number=None, cause="CANCELLED"),
        ),
        (
            SEEN_RST._replace(work=Work.FORCEFULLY),
            ENDED_RST._replace(cause="CANCELLED", error=None),
        ),
        (SEEN._replace(work=Work.SHIELDED), ENDED._replace(cause="CLOSED")),
        (SEEN_CUT, ENDED_CUT),
        (SEEN_CUT._replace(work=Work.CUT_BY_OTHER), ENDED_CUT),
        (SEEN_SIPPING, ENDED_SIPPING),
        (
            # What AnyIO's stream has read ahead is in no count.
            SEEN_FLOODING._replace(way=Way.SCOPE.value),
            ENDED_FLOODING._replace(way=Way.SCOPE.value, discarded=10),
        ),
    ],
)
def test_truth_is_agreed_upon(seen: Seen, ended: Ended) -> None:
    assert judge(seen, ended, None) == (Verdict.AGREED, "")


@pytest.mark.parametrize(
    ("seen", "ended", "reason"),
    [
        (SEEN._replace(received=99), ENDED, "not all of the answer"),
        (SEEN._replace(close="RST"), ENDED, "the peer saw RST"),
        (SEEN._replace(close="NONE"), ENDED, "the peer saw NONE"),
        (SEEN_TLS._replace(received=99), ENDED_TLS, "not all of the answer"),
        (
            SEEN_TLS_RST._replace(close_notify=True),
            ENDED_TLS_RST,
            "close_notify, and not all",
        ),
        (SEEN_CUT_OFF, ENDED_CUT_OFF, "the peer saw RST"),
        (SEEN_CUT._replace(close="RST", received=50), ENDED_CUT, "the peer saw RST"),
    ],
)
def test_lost_answer_is_found(seen: Seen, ended: Ended, reason: str) -> None:
    verdict, found = judge(seen, ended, None)
    assert verdict is Verdict.LOST_ANSWER
    assert reason in found


@pytest.mark.parametrize(
    ("seen", "ended", "reason"),
    [
        (SEEN._replace(wrong=True), ENDED, "wrong bytes"),
        (SEEN, None, "no Ending"),
        (SEEN, ENDED._replace(number=8), "another connection"),
        (SEEN, ENDED._replace(cause="CLOSED"), "expected RETURNED"),
        (SEEN, ENDED._replace(peer="RST"), "reset by a peer that sent none"),
        (SEEN, ENDED._replace(discarded=1), "discarded"),
        (SEEN, ENDED._replace(unacknowledged=1), "unacknowledged"),
        (SEEN, ENDED._replace(fin_sent_before_reset=True), "FIN before"),
        (SEEN_RST._replace(close="FIN"), ENDED_RST, "RST, and the peer saw FIN"),
        (SEEN_RST._replace(close="NONE"), ENDED_RST, "RST, and the peer saw NONE"),
        (SEEN_RST._replace(close="ETIMEDOUT"), ENDED_RST, "the peer saw ETIMEDOUT"),
        (SEEN_RST, ENDED, "expected RST"),
        (SEEN, ENDED._replace(peer="NONE"), "before the limit"),
        (SEEN_RESET, ENDED_RESET._replace(peer="NONE"), "RST is not in the Ending"),
        (SEEN_FLOODING, ENDED_FLOODING._replace(discarded=4999), "the 5000 sent"),
        (SEEN_TLS._replace(close_notify=False), ENDED_TLS, "no close_notify"),
        (
            SEEN_TLS_RST._replace(close_notify=True, received=100),
            ENDED_TLS_RST,
            "a close_notify before the RST",
        ),
        (SEEN_TLS_RST._replace(close="FIN"), ENDED_TLS_RST, "no close_notify"),
        (SEEN, ENDED_TLS, "another way"),
        (
            SEEN_RST._replace(received=0),
            ENDED_RST._replace(number=None, cause="CANCELLED"),
            "an unexpected cause",
        ),
        (
            SEEN_FLOODING._replace(way=Way.SCOPE.value),
            ENDED_FLOODING._replace(way=Way.SCOPE.value, discarded=5001),
            "more than was sent",
        ),
        (
            SEEN_RST._replace(way=Way.SCOPE.value),
            REFUSED,
            "the peer had not reset",
        ),
        (SEEN._replace(work=Work.FORCEFULLY), ENDED._replace(cause="CLOSED"), "RST"),
        (SEEN_RST._replace(work=Work.SHIELDED), ENDED_RST, "expected FIN"),
        (SEEN_CUT, ENDED_CUT._replace(error="AssertionError"), "has not found"),
        (SEEN_SIPPING, ENDED_SIPPING._replace(discarded=9), "the 10 sent"),
        (SEEN_RST, ENDED._replace(cause="RAISED"), "expected RST"),
        (
            SEEN_RST._replace(work=Work.EOF_RAISE, close="FIN", received=100),
            ENDED_RST._replace(peer="FIN", fin_sent_before_reset=True),
            "expected FIN",
        ),
    ],
)
def test_lie_is_found(seen: Seen, ended: Ended | None, reason: str) -> None:
    verdict, found = judge(seen, ended, None)
    assert verdict is Verdict.DISAGREEMENT
    assert reason in found


def test_slow_reader_is_cut_off_only_after_a_pause_that_is_too_long() -> None:
    """As a stop of its process is."""
    stopped = SEEN_CUT_OFF._replace(pause=DRAIN_TIMEOUT)
    assert judge(stopped, ENDED_CUT_OFF, None)[0] is Verdict.CUT_OFF
    soon = SEEN_CUT_OFF._replace(pause=DRAIN_TIMEOUT - SIP_EVERY)
    assert judge(soon, ENDED_CUT_OFF, None)[0] is Verdict.LOST_ANSWER
    tls = Way.NATIVE_TLS.value
    soon, ended = soon._replace(way=tls), ENDED_CUT_OFF._replace(way=tls)
    assert judge(soon, ended, None)[0] is Verdict.CUT_OFF


@contextmanager
def late_peer() -> Iterator[tuple[Peer, socket.socket]]:
    """With the server's side, which resets when it is closed."""
    (plan,) = plans(0, 1, 0, LINK_SHARE, {Way.NATIVE: 1})
    plan = replace(plan, kind="slow", manner=Manner.LATE)
    with socket.create_server((HOST, 0)) as listener:
        sock = socket.create_connection(listener.getsockname())
        accepted, _ = listener.accept()
    with sock, accepted:
        sock.setblocking(False)
        accepted.setsockopt(*RESET_ON_CLOSE)
        yield Peer(plan, sock.getsockname(), sock, None), accepted


def test_peer_that_is_out_of_time_has_read_what_there_is() -> None:
    """One that sleeps, on a machine that has had no time for it either."""
    with late_peer() as (peer, server):
        assert next(peer.steps) == 1.5 * DRAIN_TIMEOUT
        server.sendall(PATTERN[place(peer.plan.number) :][:10])
        server.close()
        peer.read_what_is_left()
        seen = Seen(*json.loads(peer.line()))
    assert (seen.close, seen.received, seen.wrong) == ("RST", 10, False)


def test_peer_that_was_reset_before_it_looked_has_been_connected() -> None:
    with late_peer() as (peer, server):
        server.close()
        with pytest.raises(ConnectionResetError):
            next(peer.steps)
        assert peer.connected


@pytest.mark.parametrize(
    "seen",
    [
        SEEN,  # its FIN was queued
        SEEN_RST,
        SEEN._replace(close="RST", received=50),
        SEEN_RESET,
        SEEN_TLS,
        SEEN_RST._replace(work=Work.EOF_RAISE, close="FIN", received=100),
    ],
)
def test_death_of_the_server_is_told(seen: Seen) -> None:
    assert judge(seen, None, None, killed=True) == (Verdict.KILLED, "")


@pytest.mark.parametrize(
    ("seen", "reason"),
    [
        (SEEN_RST._replace(close="NONE"), "its peer does not know"),
        (SEEN_RST._replace(close="FIN"), "not all of the answer"),
        (SEEN_RST._replace(close="FIN", received=100), "work that failed"),
        (SEEN._replace(wrong=True), "wrong bytes"),
        (SEEN_TLS._replace(close_notify=False), "no close_notify"),
        (SEEN_TLS_RST._replace(close_notify=True), "not all of the answer"),
        (SEEN._replace(connected=False), "no connection"),
    ],
)
def test_lie_about_a_death_is_found(seen: Seen, reason: str) -> None:
    verdict, found = judge(seen, None, None, killed=True)
    assert verdict in WRONG
    assert reason in found


def test_ending_that_was_written_before_the_death_counts() -> None:
    assert judge(SEEN, ENDED, None, killed=True)[0] is Verdict.AGREED
    assert judge(SEEN_RST, ENDED, None, killed=True)[0] is Verdict.DISAGREEMENT


def test_peers_that_were_stopped_go_on() -> None:
    """At the end of the round, and when its end is not the planned one."""
    result = Result("asyncio")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=PIPE) as process:
        peers: Any = [process]
        server: Any = SimpleNamespace(ask=lambda *words: {"child": 1})
        with (
            pytest.raises(Stuck),
            Disturbances(random.Random(0), server, peers, result) as disturbances,
        ):
            while state(process.pid) != "T":
                assert disturbances.until_next() <= FIRST[1]
                disturbances.step()
            raise Stuck
        while state(process.pid) == "T":
            pass
    assert result.stops == 1
    assert result.stopped > 0


def state(pid: int) -> str:
    """A letter of proc_pid_stat(5)."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_stopped_process_does_not_outlive_a_soak_that_is_killed() -> None:
    child = "import os; os.kill(os.getpid(), 19)"
    child = f"processes.die_with_parent(); print('!'); {child}"
    child = f"from evidence.soak import processes; {child}"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-uc', {child!r}])"
    with subprocess.Popen(
        [sys.executable, "-c", parent], cwd=ROOT, stdout=PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read(1) == b"!"
        process.kill()
        process.communicate(timeout=30)  # the child has the same pipe


def test_peer_that_reset_before_its_scope_is_matched_without_an_address() -> None:
    result = Result("asyncio")
    ends = Endings(result)
    anonymous = REFUSED._replace(host=None, port=None)
    numbered = ENDED_RESET._replace(host=None, port=None, way=Way.SCOPE.value)
    for ended in (anonymous, numbered, numbered._replace(number=8)):
        ends.add(ended)
    still_there = SEEN._replace(way=Way.SCOPE.value, number=9)
    other_way = SEEN_SCOPE_RESET._replace(way=Way.SCOPED.value, number=9)
    assert ends.pop(still_there) is None
    assert ends.pop(other_way) is None
    assert ends.pop(SEEN_SCOPE_RESET) == numbered
    assert ends.pop(SEEN_SCOPE_RESET._replace(number=9)) == anonymous
    assert judge(SEEN_SCOPE_RESET, anonymous, None)[0] is Verdict.NEVER_SCOPED
    assert [ended.number for ended in ends.left()] == [8]
    assert result.endings == Counter(RST=2)


def test_each_share_has_its_ways_and_tls_only_what_it_can() -> None:
    ways: Counter[Way] = Counter()
    for share in ALL_SHARES:
        for plan in plans(0, 2000, 0, share, share.ways):
            assert plan.way in share.ways
            assert plan.size <= KIB or not share.small or plan.manner is Manner.IN_ANSWER
            assert not (plan.way.is_tls and plan.work in NOT_IN_TLS)
            ways[plan.way] += 1
    assert set(ways) == set(Way)
    assert sum(share.part for share in SHARES) == pytest.approx(1)


def test_no_peer_has_the_port_of_another_test_s_program() -> None:
    """Which could not listen there, while the soak runs in another worker of pytest's."""
    assert free_port() not in LOOPBACK_PORTS


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("end", ["nothing", "close_notify", "garbage"])
def test_tls_peer_tells_the_ends_apart(old: bool, end: str, tmp_path: Path) -> None:
    certificate, trust = issue(tmp_path, HOST)
    with socket.create_server((HOST, 0)) as listener:
        sock = socket.create_connection(listener.getsockname())
        accepted, _ = listener.accept()

    def serve() -> None:
        context = server_context(certificate)
        with context.wrap_socket(accepted, server_side=True) as tls:
            assert tls.recv(5) == b"hello"
            tls.sendall(b"answer")
            if end == "nothing":
                socket.socket(fileno=tls.detach()).close()
                return
            raw = tls.unwrap()
            if end == "garbage":
                raw.sendall(b"!")
            raw.close()

    thread = threading.Thread(target=serve)
    thread.start()
    with sock:
        tls = TLSSocket(sock, peer_context(str(trust), old=old), HOST)
        tls.do_handshake()
        assert tls.send(b"hello") == 5
        assert tls.recv(100) == b"answer"
        if end != "nothing":
            tls.shutdown(socket.SHUT_WR)
        assert tls.recv(100) == (b"!" if end == "garbage" else b"")
        assert tls.close_notify is (end != "nothing")
        assert tls.recv(100) == b""
    thread.join()


def test_lost_reset_is_explained_only_by_what_the_link_knows() -> None:
    seen = SEEN_RST._replace(close="NONE", lossy=True)
    refused = PASSED._replace(refused=1)
    for arrived in (LOST, refused):
        assert judge(seen, ENDED_RST, Flow(arrived, PASSED))[0] is Verdict.RST_LOST
    for arrived in (PASSED, OBEYED, LOST._replace(obeyed=1)):
        verdict, _ = judge(seen, ENDED_RST, Flow(arrived, PASSED))
        assert verdict is Verdict.DISAGREEMENT


def test_lost_reset_of_a_peer_is_explained_only_by_what_the_link_knows() -> None:
    seen = SEEN_RESET._replace(lossy=True)
    ended = ENDED_RESET._replace(peer="NONE", error="TimeoutError")
    assert judge(seen, ended, Flow(PASSED, LOST))[0] is Verdict.PEER_RST_LOST
    assert judge(seen, ended, Flow(PASSED, OBEYED))[0] is Verdict.DISAGREEMENT


# Three connections whose reset was never seen, as the link has recorded them, without
# what is delivered in order before: flags, sequence number and length. Each has lost a
# segment, an ACK and an RST behind it have come, and what follows from the challenge ACK
# has been lost.
UNHEARD = """
to peer 12 3037210143 +0
lost to peer 18 3037210144 +339
to peer 10 3037210144 +0
to peer 10 3037210483 +0
to peer 14 3037210483 +0
to server 10 1672787923 +0
lost to peer 04 3037210144 +0
"""
UNHEARD_TLS = """
to peer 12 3885202367 +0
to peer 18 3885202368 +933
lost to peer 18 3885203301 +510
to peer 10 3885203811 +0
to peer 14 3885203811 +0
to server 10 147902410 +0
lost to peer 04 3885203301 +0
"""
UNHEARD_BY_SERVER = """
to server 02 1649752316 +0
to server 18 1649752317 +517
to server 18 1649752834 +80
lost to server 18 1649752914 +39
to peer 18 3836142153 +510
to server 10 1649752953 +0
to server 14 1649752953 +0
lost to peer 10 3836142663 +0
to peer 14 3836142663 +0
"""


def passed(trace: str) -> Flow:
    flow = relay.Flow(LINK_PORTS.start)
    for line in trace.split("\n")[1:-1]:
        *lost, _, to, flags, seq, length = line.split()
        segment = int(flags, 16), int(seq), int(length)
        receiver = flow.server if to == "server" else flow.peer
        if not lost:
            receiver.deliver(*segment)
        elif segment[0] & RST:
            receiver.lost += 1
    return records.flow(flow.record())


@pytest.mark.parametrize(
    ("trace", "missing", "answer"),
    [
        (
            UNHEARD,
            "lost to peer 18 3037210144 +339",
            "lost to peer 04 3037210144 +0",
        ),
        (
            UNHEARD_TLS,
            "lost to peer 18 3885203301 +510",
            "lost to peer 04 3885203301 +0",
        ),
    ],
)
def test_reset_behind_a_lost_segment_is_unheard(
    trace: str, missing: str, answer: str
) -> None:
    """Unless the segment has come, or the RST that answers the challenge ACK."""
    seen = SEEN_RST._replace(close="NONE", lossy=True, received=0)
    assert judge(seen, ENDED_RST, passed(trace))[0] is Verdict.RST_LOST
    for lost in (missing, answer):
        heard = trace.replace(lost, lost.removeprefix("lost "))
        assert heard != trace
        verdict, _ = judge(seen, ENDED_RST, passed(heard))
        assert verdict is Verdict.DISAGREEMENT


def test_reset_of_a_peer_behind_a_lost_segment_is_unheard() -> None:
    seen = SEEN_RESET._replace(lossy=True)
    ended = ENDED_RESET._replace(peer="NONE", error="TimeoutError")
    trace, missing = UNHEARD_BY_SERVER, "lost to server 18 1649752914 +39"
    assert judge(seen, ended, passed(trace))[0] is Verdict.PEER_RST_LOST
    answered = trace + "to server 04 1649752914 +0\n"
    for heard in (trace.replace(missing, missing.removeprefix("lost ")), answered):
        verdict, _ = judge(seen, ended, passed(heard))
        assert verdict is Verdict.DISAGREEMENT


def test_late_reset_of_a_peer_is_explained_only_by_a_drain_to_its_limit() -> None:
    seen = SEEN_RESET._replace(work=Work.ANSWER, manner=Manner.AFTER_END.value)
    ended = ENDED._replace(peer="NONE", drained=DRAIN_TIMEOUT)
    assert judge(seen, ended, None)[0] is Verdict.PEER_TOO_LATE
    early = ended._replace(drained=DRAIN_TIMEOUT / 2)
    assert judge(seen, early, None)[0] is Verdict.DISAGREEMENT


def test_time_out_is_explained_by_a_server_that_had_no_time() -> None:
    late = ENDED_RST._replace(error="TimeoutError", late=1.5)
    reset = SEEN_RESET, late._replace(number=None)
    assert judge(*reset, None)[0] is Verdict.SERVER_TOO_LATE
    assert judge(SEEN._replace(close="RST"), late, None)[0] is Verdict.AGREED
    refused = REFUSED._replace(error="TimeoutError")
    no_scope = SEEN_RST._replace(way=Way.SCOPE.value, received=0)
    assert judge(no_scope, refused._replace(late=1.5), None)[0] is Verdict.SERVER_TOO_LATE
    assert judge(no_scope, refused, None)[0] is Verdict.DISAGREEMENT
    for change in ({"late": 0.5}, {"error": "Failure"}):
        other = late._replace(**change)
        assert judge(SEEN_RESET, other, None)[0] is Verdict.DISAGREEMENT
        assert judge(SEEN._replace(close="RST"), other, None)[0] in WRONG


def test_missing_ending_is_explained_only_if_nothing_reached_the_server() -> None:
    seen = SEEN_RESET._replace(lossy=True)
    nothing = Flow(PASSED, PASSED._replace(reached=0))
    assert judge(seen, None, nothing)[0] is Verdict.NEVER_REACHED
    assert judge(seen, None, Flow(PASSED, PASSED))[0] is Verdict.DISAGREEMENT


@pytest.mark.parametrize(
    ("segments", "obeyed"),
    [
        ([(0, 1001, 100), (RST, 1101, 0)], True),
        ([(RST, 1101, 0)], False),
        ([(0, 1101, 100), (0, 1001, 100), (RST, 1201, 0)], True),
        ([(0, 1101, 100), (RST, 1001, 0)], True),
        ([(0, 1101, 100), (RST, 1201, 0)], True),  # the end of a SACK
        ([(0, 1101, 100), (RST, 1301, 0)], False),
        ([(0, 1101, 100), (0, 1301, 100), (RST, 1201, 0)], False),  # not of the last
        ([(0, 1101, 100), (0, 1301, 100), (RST, 1401, 0)], True),
        ([(0, 1301, 100), (0, 1101, 100), (RST, 1401, 0)], True),
        ([(0, 1101, 100), (0, 1201, 100), (RST, 1201, 0)], False),  # within it
        ([(0, 1101, 0), (RST, 1101, 0)], False),  # an ACK is not reported by SACK
        ([(0, 1101, 100), (0, 1301, 0), (RST, 1201, 0)], True),
        ([(FIN, 1101, 0), (RST, 1102, 0)], True),
        ([(FIN, 1001, 0), (RST, 1002, 0)], True),
        ([(SYN, 1000, 0), (0, 1001, 9), (SYN, 1000, 0), (RST, 1010, 0)], True),
    ],
)
def test_link_knows_which_resets_tcp_obeys(
    segments: list[tuple[int, int, int]], obeyed: bool
) -> None:
    receiver = Receiver()
    receiver.deliver(SYN, 1000, 0)
    for segment in segments:
        receiver.deliver(*segment)
    assert (receiver.obeyed, receiver.refused) == (obeyed, not obeyed)
    if link.available() is None:
        assert kernel_obeys(segments) == obeyed


def kernel_obeys(segments: list[tuple[int, int, int]]) -> bool:
    """Whether the last of *segments* resets a connection of this kernel's TCP.

    What is written to a TUN has been received when write(2) returns.
    """
    end = link.Link()
    server = end.ports[Way.NATIVE.name]
    addresses = map(socket.inet_aton, (PEER_ADDRESS, SERVER_ADDRESS))
    pseudo = b"".join(addresses) + struct.pack("!HH", socket.IPPROTO_TCP, 20)

    def send(flags: int, seq: int, length: int, acked: int, options: bytes = b"") -> None:
        size = 20 + len(options) + length
        words = LINK_PORTS.start, server, seq, acked, (20 + len(options)) << 10 | flags
        tcp = struct.pack("!HHIIHHHH", *words, 2**16 - 1, 0, 0) + options + bytes(length)
        total = checksum(pseudo[:-2] + struct.pack("!H", size) + tcp)
        tcp = tcp[:16] + struct.pack("!H", total) + tcp[18:]
        head = struct.pack("!HHIBBH", 0x4500, 20 + size, 0, 64, socket.IPPROTO_TCP, 0)
        head = head[:10] + struct.pack("!H", checksum(head + pseudo[:8])) + pseudo[:8]
        os.write(end.server_tun, head + tcp)

    try:
        # SACK permitted: RFC 2018, 2; and two options that do nothing.
        send(SYN, 1000, 0, 0, b"\x04\x02\x01\x01")
        answer = None
        while answer is None:  # IPv6 looks for routers
            packet = os.read(end.server_tun, link.MTU)
            answer = relay.parsed(packet, to_server=False)
        acked = (answer[2] + 1) % 2**32
        send(ACK, 1001, 0, acked)
        listener = end.listeners[Way.NATIVE]
        listener.settimeout(5)
        with listener.accept()[0] as sock:
            for flags, seq, length in segments:
                send(flags if flags & SYN else flags | ACK, seq, length, acked)
            state = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
            return state == TCP_CLOSE
    finally:
        end.close()


def checksum(data: bytes) -> int:
    """RFC 1071."""
    data += b"\0" * (len(data) % 2)
    words: tuple[int, ...] = struct.unpack(f"!{len(data) // 2}H", data)
    return 0xFFFF - sum(words) % 0xFFFF


def test_sequence_numbers_begin_again() -> None:
    receiver = Receiver()
    receiver.deliver(SYN, 2**32 - 11, 0)
    receiver.deliver(0, 40, 10)
    receiver.deliver(0, 2**32 - 10, 50)
    assert receiver.expected == 50


def steady(**changes: int) -> Result:
    first = Sample(rss=40 * 2**20, descriptors=9, blocks=100_000)
    last = Sample(**{**vars(first), **changes})
    return Result("asyncio", samples=[first] * 8 + [last] * 8)


def test_flat_memory_is_no_failure() -> None:
    assert steady(rss=43 * 2**20, blocks=102_000).failures() == []


@pytest.mark.parametrize(
    "changes", [{"rss": 45 * 2**20}, {"blocks": 106_000}, {"descriptors": 10}]
)
def test_growth_is_a_failure(changes: dict[str, int]) -> None:
    (failure,) = steady(**changes).failures()
    assert next(iter(changes)) in failure


@pytest.mark.parametrize("verdict", [Verdict.DISAGREEMENT, Verdict.LOST_ANSWER])
def test_disagreement_is_a_failure(verdict: Verdict) -> None:
    result = steady()
    result.add(SEEN, Verdict.AGREED)
    result.add(SEEN_TLS, verdict)
    assert result.failures() == ["1 disagreements", "1 of them: `serve_tcp`, TLS"]


def test_results_are_those_of_a_long_run_without_a_failure() -> None:
    stored = load(report.RESULTS)
    assert [result.loop for result in stored.results] == ["asyncio", "uvloop", "trio"]
    for result in stored.results:
        assert result.failures() == []
        assert result.connections == 200_000
        assert result.lossy > 0
        assert sum(map(Counter.total, result.ways.values())) == 200_000


def test_results_can_be_stored(tmp_path: Path) -> None:
    result = steady()
    result.add(SEEN, Verdict.AGREED)
    result.add(SEEN_TLS, Verdict.AGREED)
    stored = Report({"seed": "0"}, [result])
    stored.save(tmp_path / "results.json")
    assert load(tmp_path / "results.json") == stored
    assert json.loads((tmp_path / "results.json").read_text())["results"]
