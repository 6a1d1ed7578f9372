"""What the watch makes of packets, and of segments and times; with no sockets."""

from __future__ import annotations

import random
import struct
from collections import Counter
from socket import AF_INET, AF_INET6, inet_pton
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_model import PROFILE

from anyio_rst.commands._output import WIDTH
from anyio_rst.commands._watch_connection import Connection, End
from anyio_rst.commands._watch_report import Totals, as_dict, shown, table
from anyio_rst.commands._watch_segments import (
    ACK,
    FIN,
    RST,
    SYN,
    Segment,
    Unreadable,
    parse,
    reverse,
    source,
)
from anyio_rst.commands._watch_table import LINGER, PATIENCE, Table

# Packets.

V4 = inet_pton(AF_INET, "192.0.2.1"), inet_pton(AF_INET, "192.0.2.2")
V6 = inet_pton(AF_INET6, "2001:db8::1"), inet_pton(AF_INET6, "2001:db8::2")

PORTS = struct.pack("!HH", 50000, 80)

# The options of a SYN: maximum segment size, SACK, timestamps, window scale.
OPTIONS = bytes.fromhex("020405b40402080a01020304000000000103030a")


def tcp(flags: int = ACK, options: bytes = b"", data: bytes = b"") -> bytes:
    offset = (20 + len(options)) // 4 << 4
    fixed = struct.pack("!IIBBHHH", 7, 9, offset, flags, 0, 0, 0)
    return PORTS + fixed + options + data


def ipv4(
    payload: bytes, *, options: bytes = b"", fragment: int = 0, protocol: int = 6
) -> bytes:
    size = 20 + len(options)
    fixed = struct.pack(
        "!BBHHHBBH",
        0x40 | size // 4,
        0,
        size + len(payload),
        1,
        fragment,
        61,
        protocol,
        0,
    )
    return fixed + b"".join(V4) + options + payload


def ipv6(payload: bytes, *, header: int = 6) -> bytes:
    fixed = struct.pack("!IHBB", 6 << 28, len(payload), header, 61)
    return fixed + b"".join(V6) + payload


def parsed(packet: bytes, **options: Any) -> Segment:
    segment = parse(packet, len(packet), **options)
    assert segment is not None
    return segment


HOP_BY_HOP = bytes([43, 0, 1, 4, 0, 0, 0, 0])
ROUTING = bytes([44, 1, *range(14)])
FIRST_FRAGMENT = bytes([51, 0, 0, 1, 0, 0, 0, 1])
AUTHENTICATION = bytes([6, 4, *range(22)])

PACKETS = {
    "IPv4": ipv4(tcp(data=b"hello")),
    "IPv4, with options": ipv4(tcp(SYN, OPTIONS), options=b"\x01" * 8),
    "IPv4, first fragment": ipv4(tcp(data=b"hello"), fragment=0x2000),
    "IPv6": ipv6(tcp(data=b"hello")),
    "IPv6, with options": ipv6(tcp(SYN, OPTIONS)),
    "IPv6, with extensions": ipv6(
        HOP_BY_HOP + ROUTING + FIRST_FRAGMENT + AUTHENTICATION + tcp(data=b"hello"),
        header=0,
    ),
}
each_packet = pytest.mark.parametrize("packet", PACKETS.values(), ids=PACKETS)


@each_packet
def test_headers_are_read(packet: bytes) -> None:
    segment = parsed(packet)
    assert segment.flags in (ACK, SYN)
    assert segment[2:] == (7, 9, 5 if segment.flags == ACK else 0, 61)
    host = "192.0.2.1" if packet[0] >> 4 == 4 else "2001:db8::1"
    assert source(segment.way) == (host, 50000)
    assert source(reverse(segment.way)) == (host[:-1] + "2", 80)
    assert reverse(reverse(segment.way)) == segment.way


@each_packet
def test_tags_of_vlans_are_stripped(packet: bytes) -> None:
    kind = b"\x08\x00" if packet[0] >> 4 == 4 else b"\x86\xdd"
    for tags in (b"\x20\x05", b"\x40\x05\x81\x00\x45\x06", b"\x60\x05\x88\xa8\x65\x00"):
        assert parsed(tags + kind + packet, tagged=True) == parsed(packet)
    assert parsed(packet, tagged=True) == parsed(packet)  # as the kernel may show it


@each_packet
def test_packet_that_is_cut_short_is_never_misread(packet: bytes) -> None:
    whole = parsed(packet)
    for size in range(len(packet)):
        try:
            segment = parse(packet[:size], len(packet))
        except Unreadable:
            continue
        # What is missing is data, or options, of which the length is known.
        assert segment == whole
        assert size >= len(packet) - whole.length - len(OPTIONS) - 6


@each_packet
def test_length_is_that_of_the_packet_and_not_of_what_is_captured(packet: bytes) -> None:
    # Padded to the least that Ethernet takes; and nonsense that claims too much.
    assert parse(packet + bytes(20), len(packet) + 20) == parsed(packet)
    at = 2 if packet[0] >> 4 == 4 else 4
    long = packet[:at] + b"\xff\xff" + packet[at + 2 :]
    assert parse(long, len(packet)) == parsed(packet)
    # 0: of more than 64 KB, as network interfaces cut them.
    big = packet[:at] + b"\0\0" + packet[at + 2 :]
    expected = parsed(packet).length + 100_000
    segment = parse(big, len(packet) + 100_000)
    assert segment is not None
    assert segment.length == expected


@pytest.mark.parametrize(
    "packet",
    [
        ipv4(tcp(), protocol=17),
        ipv4(tcp(), fragment=0x2001),
        ipv6(tcp(), header=17),
        ipv6(bytes([6, 0, 0, 8, 0, 0, 0, 1]) + tcp(), header=44),
        ipv6(bytes([58, 0, 1, 4, 0, 0, 0, 0]) + bytes(20), header=0),  # ICMPv6
        ipv6(b"", header=59),
        bytes(60),
    ],
)
def test_other_packets_are_none_of_ours(packet: bytes) -> None:
    assert parse(packet, len(packet)) is None


@pytest.mark.parametrize(
    "packet",
    [
        b"",
        b"\x45",
        bytes([0x44]) + ipv4(tcp())[1:],
        ipv4(tcp()[:12] + b"\x40" + tcp()[13:]),  # a header of 16 bytes
        ipv4(tcp()[:12] + b"\xf0" + tcp()[13:]),  # of more than there is
        ipv6(tcp()[:12] + b"\x40" + tcp()[13:]),
        ipv6(bytes([0, 255]) * 10, header=0),
    ],
)
def test_nonsense_is_unreadable(packet: bytes) -> None:
    for tagged in (False, True):
        with pytest.raises(Unreadable):
            parse(packet, len(packet), tagged=tagged)


edits = st.lists(
    st.tuples(st.integers(0, 127), st.integers(0, 4), st.binary(max_size=4)), max_size=4
)


@st.composite
def spoilt(draw: st.DrawFn) -> bytes:
    data = bytearray(draw(st.sampled_from([*PACKETS.values(), b""])))
    data[:0] = draw(st.sampled_from([b"", b"\x20\x05\x08\x00", b"\x60\x05\x81\x00"]))
    for at, remove, insert in draw(edits):
        data[at : at + remove] = insert
    return bytes(data[: draw(st.integers(0, 176))])


@settings(PROFILE, max_examples=PROFILE.max_examples * 10)
@given(st.lists(st.tuples(spoilt() | st.binary(max_size=176), st.booleans())))
def test_garbage_does_no_harm(packets: list[tuple[bytes, bool]]) -> None:
    followed = Table(limit=3)
    for now, (packet, tagged) in enumerate(packets):
        try:
            segment = parse(packet, len(packet), tagged=tagged)
        except Unreadable:
            continue
        if segment is None:
            continue
        assert 0 <= segment.length <= len(packet)
        followed.feed(now, segment)
        followed.expire(now)
        assert sum(followed.open.values()) <= 3
    followed.expire(1000.0)
    totals = Totals()
    for connection in followed.ended:
        assert as_dict(connection)["bytes_up"] >= 0
        assert max(map(len, shown(connection).splitlines())) <= WIDTH
        totals.add(connection)
    totals.rows(followed.open)


# Segments.

CLIENT, SERVER = "client", "server"

HERE = b"".join(V4) + PORTS


class Talk:
    """What two sides say, of which the table sees what it is fed."""

    def __init__(self, table: Table | None = None, *, isn: int = 1000, way: bytes = HERE):
        self.table = table or Table()
        self.now = 100.0
        self.ways = {CLIENT: way, SERVER: reverse(way)}
        # What each has sent, and what the other has acknowledged of it.
        self.next = {CLIENT: isn, SERVER: isn + 5000}
        self.acknowledged = dict(self.next)
        self.said: list[Segment] = []

    def feed(self, segment: Segment) -> None:
        self.now += 0.01
        self.table.feed(self.now, segment)

    def say(
        self,
        side: str,
        flags: int = ACK,
        size: int = 0,
        *,
        ttl: int = 64,
        lost: bool = False,
    ) -> None:
        other = SERVER if side == CLIENT else CLIENT
        if flags & ACK:
            self.acknowledged[other] = self.next[other]
        segment = Segment(
            self.ways[side],
            flags,
            self.next[side] % 2**32,
            self.acknowledged[other] % 2**32 if flags & ACK else 0,
            size,
            ttl,
        )
        self.next[side] += size + bool(flags & SYN) + bool(flags & FIN)
        self.said.append(segment)
        if not lost:
            self.feed(segment)

    def open(self) -> Talk:
        self.say(CLIENT, SYN)
        self.say(SERVER, SYN | ACK)
        self.say(CLIENT)
        return self

    def finish(self, first: str) -> None:
        self.say(first, FIN | ACK)
        self.say(SERVER if first == CLIENT else CLIENT, FIN | ACK)
        self.say(first)

    @property
    def ended(self) -> Connection:
        (connection,) = self.table.ended
        assert not self.table.open
        return connection

    def told(self) -> dict[str, Any]:
        return as_dict(self.ended)


def exchanged(**expected: Any) -> dict[str, Any]:
    """What is told of one with nothing unusual about it."""
    return {
        "event": "connection",
        "client_address": "192.0.2.1",
        "client_port": 50000,
        "server_address": "192.0.2.2",
        "server_port": 80,
        "from_start": True,
        "bytes_up": 0,
        "bytes_down": 0,
        "last_data": None,
        "end": "FIN",
        "first_how": expected.get("end", "FIN"),
        "reset_by": None,
        "half_closed_seconds": None,
        "in_flight_up": 0,
        "in_flight_down": 0,
        "syns": 1,
        "reset_ttl": None,
        "usual_ttl": None,
        **expected,
    }


def check(talk: Talk, **expected: Any) -> None:
    told = talk.told()
    del told["time"], told["duration_seconds"]
    assert told == exchanged(**expected)


@pytest.mark.parametrize("first", [CLIENT, SERVER])
@pytest.mark.parametrize("isn", [1000, 2**32 - 1, 2**32 - 150, 2**32 - 5050])
def test_fins(first: str, isn: int) -> None:
    talk = Talk(isn=isn).open()
    talk.say(CLIENT, size=100)
    talk.say(SERVER, size=3000)
    talk.finish(first)
    check(
        talk,
        first=first,
        bytes_up=100,
        bytes_down=3000,
        last_data=SERVER,
        half_closed_seconds=0.01,
    )
    assert talk.ended.duration == pytest.approx(0.06)


@pytest.mark.parametrize("by", [CLIENT, SERVER])
def test_reset(by: str) -> None:
    talk = Talk().open()
    talk.say(CLIENT, size=100)
    talk.say(SERVER, size=3000)
    talk.say(SERVER, ACK, 500)
    talk.say(by, RST | ACK if by == CLIENT else RST)
    check(
        talk,
        end="RST",
        first=by,
        reset_by=by,
        bytes_up=100,
        bytes_down=3500,
        last_data=SERVER,
        in_flight_down=0 if by == CLIENT else 3500,
        reset_ttl=64,
    )


def test_reset_after_a_fin() -> None:
    talk = Talk().open()
    talk.say(CLIENT, FIN | ACK)
    talk.say(SERVER, ACK, 700)
    talk.say(CLIENT, RST)
    check(
        talk,
        end="RST",
        first=CLIENT,
        first_how="FIN",
        reset_by=CLIENT,
        bytes_down=700,
        last_data=SERVER,
        in_flight_down=700,
        half_closed_seconds=0.02,
        reset_ttl=64,
    )


def test_last_words_of_both_that_nobody_acknowledges() -> None:
    talk = Talk().open()
    talk.say(CLIENT, FIN | ACK)
    talk.say(SERVER, FIN | ACK, 50)
    talk.table.expire(talk.now + LINGER / 2)
    assert not talk.table.ended
    talk.table.expire(talk.now + LINGER)
    check(
        talk,
        first=CLIENT,
        bytes_down=50,
        in_flight_down=50,
        last_data=SERVER,
        half_closed_seconds=0.01,
    )


def test_half_closed_connection_stays_open() -> None:
    talk = Talk().open()
    talk.say(CLIENT, FIN | ACK)
    talk.say(SERVER)
    talk.table.expire(talk.now + 10_000)
    assert talk.table.open == Counter({80: 1})
    talk.say(SERVER, FIN | ACK, 50)
    talk.say(CLIENT)
    assert talk.ended.client.sent == 0
    assert talk.ended.server.sent == 50


def test_rst_with_another_ttl_is_perhaps_somebody_elses() -> None:
    talk = Talk().open()
    talk.say(SERVER, ACK, 10, ttl=52)
    talk.say(SERVER, RST | ACK, ttl=61)
    told = talk.told()
    assert (told["reset_ttl"], told["usual_ttl"]) == (61, 52)
    assert "TTL 61 after 52: perhaps from something in between" in shown(talk.ended)


# Before there is a connection.


def test_refused() -> None:
    talk = Talk()
    talk.say(CLIENT, SYN)
    for acknowledgment in (0, 900, 1002, 2**31):
        stray = Segment(talk.ways[SERVER], RST | ACK, 0, acknowledgment, 0, 64)
        talk.feed(stray)
    talk.feed(Segment(talk.ways[SERVER], RST, 0, 1001, 0, 64))
    assert not talk.table.ended
    talk.feed(Segment(talk.ways[SERVER], RST | ACK, 0, 1001, 0, 64))
    check(talk, end="REFUSED", first=SERVER, first_how="RST", reset_by=SERVER)
    assert shown(talk.ended).endswith("\n  refused; 0.060 s, up 0, down 0")


@pytest.mark.parametrize("acknowledged", [1001, 1101])
def test_refused_with_data_in_the_syn(acknowledged: int) -> None:
    talk = Talk()
    talk.say(CLIENT, SYN, 100)
    talk.feed(Segment(talk.ways[SERVER], RST | ACK, 0, acknowledged, 0, 64))
    assert talk.ended.end is End.REFUSED


def test_data_in_the_syn_counts_once() -> None:
    talk = Talk()
    talk.say(CLIENT, SYN, 100)
    talk.say(SERVER, SYN | ACK)
    talk.say(CLIENT)
    talk.finish(CLIENT)
    assert talk.told()["bytes_up"] == 100


def test_syn_that_nobody_answers() -> None:
    talk = Talk()
    talk.say(CLIENT, SYN)
    for pause in (1.0, 2.0, 4.0):
        talk.now += pause
        talk.table.expire(talk.now)
        talk.feed(talk.said[0])
        talk.feed(talk.said[0])  # on another interface
    talk.table.expire(talk.now + 13)
    assert not talk.table.ended
    talk.table.expire(talk.now + 15)
    check(talk, end="UNANSWERED", first=None, first_how=None, syns=4)
    assert "no answer to 4 SYNs" in shown(talk.ended)


def test_answer_to_a_syn_that_nobody_answers() -> None:
    talk = Talk()
    talk.say(CLIENT, SYN)
    talk.say(SERVER, SYN | ACK)
    talk.table.expire(talk.now + PATIENCE)
    check(talk, end="UNANSWERED", first=None, first_how=None)
    assert "no answer to the server's SYN" in shown(talk.ended)


def test_client_that_resets_in_the_handshake() -> None:
    talk = Talk()
    talk.say(CLIENT, SYN)
    talk.say(SERVER, SYN | ACK)
    talk.say(CLIENT, RST)
    check(talk, end="RST", first=CLIENT, reset_by=CLIENT, reset_ttl=64)


def test_answer_without_a_syn_tells_who_is_who() -> None:
    talk = Talk(way=HERE[:8] + struct.pack("!HH", 80, 50000))
    talk.say(CLIENT, SYN, lost=True)
    talk.say(SERVER, SYN | ACK)
    talk.say(CLIENT)
    talk.say(CLIENT, size=10)
    talk.finish(SERVER)
    check(
        talk,
        first=SERVER,
        bytes_up=10,
        last_data=CLIENT,
        client_port=80,
        server_port=50000,
        half_closed_seconds=0.01,
        syns=0,
    )


def test_both_connect_at_once() -> None:
    talk = Talk()
    talk.say(CLIENT, SYN)
    talk.say(SERVER, SYN)
    for side in (CLIENT, SERVER):
        other = SERVER if side == CLIENT else CLIENT
        again = talk.said[0 if side == CLIENT else 1]._replace(
            flags=SYN | ACK, acknowledgment=talk.next[other]
        )
        talk.feed(again)
    talk.say(CLIENT, size=3)
    talk.finish(SERVER)
    check(talk, first=SERVER, bytes_up=3, last_data=CLIENT, half_closed_seconds=0.01)


def test_connection_with_itself() -> None:
    way = HERE[:4] * 2 + struct.pack("!HH", 50000, 50000)
    talk = Talk(way=way)
    talk.say(CLIENT, SYN)
    talk.feed(talk.said[0]._replace(flags=SYN | ACK, acknowledgment=1001))
    talk.say(CLIENT, size=3)
    talk.say(CLIENT, RST)
    talk.table.expire(1000)
    assert talk.ended.end is End.RST


# What is seen in part, or twice, or again.


@pytest.mark.parametrize("ports", [(), (80,)])
def test_connection_that_was_open_before(ports: tuple[int, ...]) -> None:
    talk = Talk(Table(ports))
    for side, flags in ((CLIENT, SYN), (SERVER, SYN | ACK), (CLIENT, ACK)):
        talk.say(side, flags, lost=True)
    talk.say(CLIENT, size=1000, lost=True)
    talk.say(SERVER)  # only acknowledges: perhaps that was its end
    assert not talk.table.open
    talk.say(SERVER, size=30)
    talk.say(CLIENT, size=20)
    talk.say(SERVER, RST)
    check(
        talk,
        from_start=False,
        end="RST",
        first=SERVER,
        reset_by=SERVER,
        bytes_up=20,
        bytes_down=30,
        in_flight_up=20,
        last_data=CLIENT,
        syns=0,
        reset_ttl=64,
    )
    assert "open before, 0.020 s" in shown(talk.ended)


def test_port_that_was_asked_for_is_the_servers() -> None:
    way = HERE[:8] + struct.pack("!HH", 100, 8000)
    for ports, port in (((8000,), 8000), ((), 100), ((100, 8000), 100)):
        talk = Talk(Table(ports), way=way)
        talk.say(CLIENT, size=1)
        assert talk.table.open == Counter({port: 1})


def test_other_ports_are_left_out() -> None:
    talk = Talk(Table((443,))).open()
    talk.say(CLIENT, RST)
    talk.table.expire(1000)
    assert (talk.table.ended, talk.table.open) == ([], Counter())


def test_what_the_capture_lost_is_known_from_what_follows() -> None:
    talk = Talk().open()
    talk.say(CLIENT, size=100, lost=True)
    talk.say(SERVER, size=1000)  # acknowledges it
    talk.say(SERVER, size=1000, lost=True)
    talk.say(SERVER, size=1000)
    talk.say(CLIENT, FIN | ACK, lost=True)
    talk.say(SERVER, FIN | ACK)
    talk.feed(talk.said[-2])  # it comes too late
    talk.say(CLIENT)
    told = talk.told()
    assert (told["bytes_up"], told["bytes_down"]) == (100, 3000)
    assert told["end"] == "FIN"


def test_blind_segments_are_not_believed() -> None:
    talk = Talk().open()
    far = Segment(talk.ways[CLIENT], RST, 2**31, 0, 0, 64)
    talk.feed(far)
    talk.feed(far._replace(flags=ACK, length=1000))
    talk.feed(far._replace(flags=FIN))
    assert not talk.table.ended
    talk.finish(CLIENT)
    assert talk.told()["bytes_up"] == 0


def test_port_that_is_used_again() -> None:
    table = Table()
    talk = Talk(table).open()
    talk.say(CLIENT, size=10)
    again = Talk(table, isn=70_000)
    again.now = talk.now
    again.open()
    again.finish(SERVER)
    first, second = table.ended
    assert (first.end, first.client.sent) == (End.UNSEEN, 10)
    assert (second.end, second.client.sent) == (End.FIN, 0)
    assert "end not seen" in shown(first)
    table.ended.clear()
    # In its TIME-WAIT, and after that.
    for isn, pause in ((200_000, 0.0), (300_000, 2 * LINGER)):
        again = Talk(table, isn=isn)
        again.now = talk.now = talk.now + 1 + pause
        table.expire(talk.now)
        again.open()
        again.finish(CLIENT)
        assert again.ended.end is End.FIN
        table.ended.clear()


def test_echoes_of_an_end_are_no_new_connection() -> None:
    talk = Talk().open()
    talk.finish(CLIENT)
    for segment in list(talk.said[2:]):
        talk.feed(segment)
    talk.feed(talk.said[1])
    talk.feed(talk.said[-1]._replace(flags=RST))
    assert talk.ended.end is End.FIN
    talk.table.expire(talk.now + LINGER)
    talk.say(CLIENT)  # and much later
    assert not talk.table.open


def test_the_oldest_makes_room() -> None:
    table = Table(limit=2)
    for port in range(3):
        Talk(table, way=HERE[:8] + struct.pack("!HH", 50000 + port, 80)).open()
    (oldest,) = table.ended
    assert oldest.end is End.UNSEEN
    assert oldest.client.endpoint.port == 50000
    assert table.open == Counter({80: 2})


actions = st.lists(
    st.tuples(
        st.sampled_from([CLIENT, SERVER]),
        st.sampled_from(["data", "data", "ack", "again", "fin", "rst"]),
        st.integers(1, 2**20),
    ),
    max_size=30,
)


@settings(PROFILE, max_examples=PROFILE.max_examples * 5)
@given(actions, st.integers(0, 2**32 - 1), st.booleans())
@example([(SERVER, "data", 1), (CLIENT, "fin", 1), (SERVER, "rst", 1)], 2**32 - 1, True)
def test_any_conversation_is_counted_exactly(
    script: list[tuple[str, str, int]], isn: int, twice: bool
) -> None:
    """With what is sent again, or captured twice, in it."""
    talk = Talk(isn=isn).open()
    sent = {CLIENT: 0, SERVER: 0}
    fins: list[str] = []
    last = None
    for side, what, size in script:
        if what == "again":
            talk.feed(talk.said[size % len(talk.said)])
        elif what == "ack":
            talk.say(side)
        elif what == "rst":
            talk.say(side, RST)
            break
        elif side not in fins:
            if what == "data":
                sent[side] += size
                last = side
                # Without an acknowledgment, so that something is in flight.
                talk.say(side, 0, size)
            else:
                fins.append(side)
                talk.say(side, FIN)
        if twice:
            talk.feed(talk.said[-1])
        if talk.table.ended:
            break
    else:
        side = CLIENT
        talk.say(side, RST)
    told = talk.told()
    by = side if told["end"] == "RST" else None
    assert told["reset_by"] == by
    assert told["first"] == (fins[0] if fins else by)
    assert told["first_how"] == ("FIN" if fins else "RST")
    assert (told["bytes_up"], told["bytes_down"]) == (sent[CLIENT], sent[SERVER])
    assert told["last_data"] == last
    in_flight = {
        each: max(0, talk.next[each] - (each in fins) - talk.acknowledged[each])
        for each in sent
    }
    assert (told["in_flight_up"], told["in_flight_down"]) == tuple(in_flight.values())
    if told["end"] == "FIN":
        assert in_flight == {CLIENT: 0, SERVER: 0}
        assert len(fins) == 2


@settings(PROFILE)
@given(st.integers(0, 2**32 - 1), st.randoms(use_true_random=False))
def test_a_capture_with_gaps_is_never_far_off(isn: int, chance: random.Random) -> None:
    talk = Talk(isn=isn)
    talk.say(CLIENT, SYN)
    talk.say(SERVER, SYN | ACK, lost=chance.random() < 0.5)
    for _ in range(20):
        side = chance.choice([CLIENT, SERVER])
        talk.say(side, size=chance.randrange(5000), lost=chance.random() < 0.5)
    talk.say(CLIENT, size=1)
    talk.say(SERVER, size=1)
    talk.say(CLIENT)
    talk.say(SERVER, RST)
    told = talk.told()
    assert told["bytes_up"] == talk.next[CLIENT] - isn - 1
    assert told["in_flight_up"] == told["in_flight_down"] == 0
    assert told["end"] == "RST"


# What is printed.


def test_lines_fit_a_terminal() -> None:
    ways = [b"\xfd" * 32 + PORTS, HERE]
    for way in ways:
        talk = Talk(way=way).open()
        for side in (CLIENT, SERVER):
            for _ in range(100):
                talk.say(side, 0, 2**29)
        talk.say(SERVER, FIN | ACK)
        talk.say(CLIENT, FIN)
        talk.say(SERVER, RST, ttl=3)
        lines = shown(talk.ended).splitlines()
        assert max(map(len, lines)) <= WIDTH
        assert all(line.startswith("  ") for line in lines[1:])


def test_table_of_totals() -> None:
    totals = Totals()
    still_open = Counter({443: 5, 81: 1})
    for port, times in ((80, 20), (81, 1), (82, 2)):
        for _ in range(times):
            talk = Talk(way=HERE[:8] + struct.pack("!HH", 50000, port)).open()
            talk.say(CLIENT, size=10)
            if port == 81:
                talk.say(SERVER, RST)
            else:
                talk.finish(SERVER)
            totals.add(talk.ended)
    rows = totals.rows(still_open)
    assert [row["port"] for row in rows] == [80, 443, 81, 82]
    assert rows[0]["bytes_up"] == 200
    lines = table(rows, 3)
    assert max(map(len, lines)) <= WIDTH
    assert lines[2].split() == ["80", "0", "0", "20", "0", "0", "0", "0", "0"]
    assert lines[4].split() == ["81", "1", "0", "0", "0", "1", "0", "0", "0"]
    assert lines[5] == "and 2 connections to 1 other ports"
