"""Whether what a peer saw and what the server reported are the same."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

from .plans import DRAIN_TIMEOUT, SIP_EVERY, Manner, Way, Work

if TYPE_CHECKING:
    from .records import Ended, Flow, Seen


class Verdict(enum.Enum):
    AGREED = "agreed"
    RST_LOST = "the server's RST was lost on the link"
    PEER_RST_LOST = "the peer's RST was lost on the link"
    NEVER_REACHED = "nothing of the peer reached the server"
    NEVER_SCOPED = "the peer reset before its scope began"
    NEVER_CONNECTED = "no handshake across the link"
    VANISHED = "the peer had vanished on the link"
    SERVER_TOO_LATE = "the server's machine had no time, and it timed out"
    PEER_TOO_LATE = "the peer reset after the limit of the drain"
    CUT_OFF = "FIN, and then cut off at the limit of the drain"
    KILLED = "the server had been killed"
    DISAGREEMENT = "disagreement"
    LOST_ANSWER = "disagreement, and an answer was lost"


WRONG = (Verdict.DISAGREEMENT, Verdict.LOST_ANSWER)

# Kinds of peers that send what no handler reads.
UPLOADING = ("flooding", "sipping")
CUT_SHORT = (Work.CUT, Work.CUT_BY_OTHER)
# Less than this between two sips is progress for the drain. An ACK may be 40 ms late; and
# over TLS every second sip is from the same record, of 16 KiB.
PROGRESS_WITHIN = DRAIN_TIMEOUT - 0.1
PROGRESS_WITHIN_TLS = PROGRESS_WITHIN - SIP_EVERY

EXPECTED = {
    Work.ANSWER: ("FIN", "RETURNED"),
    Work.PIECES: ("FIN", "RETURNED"),
    Work.CLOSE: ("FIN", "CLOSED"),
    Work.SHIELDED: ("FIN", "CLOSED"),
    Work.CUT: ("FIN", "CLOSED"),
    Work.CUT_BY_OTHER: ("FIN", "CLOSED"),
    Work.FINISH_ON: ("FIN", "FINISH_ON"),
    Work.GROUP: ("FIN", "RETURNED"),
    Work.EOF: ("FIN", "RETURNED"),
    Work.READ_ALL: ("FIN", "RETURNED"),
    Work.RAISE: ("RST", "RAISED"),
    Work.READ_ALL_RAISE: ("RST", "RAISED"),
    Work.CANCEL: ("RST", "CANCELLED"),
    Work.GIVE_UP: ("RST", "CANCELLED"),
    Work.FORCEFULLY: ("RST", "CANCELLED"),
    Work.GROUP_FAIL: ("RST", "GROUP_FAILED"),
    Work.ABORT: ("RST", "ABORTED"),
    Work.TORN: ("RST", "TORN_SEND"),
    Work.EOF_RAISE: ("RST", "RAISED"),
    Work.WAIT: ("RST", "RAISED"),
    Work.HOLD: ("RST", "RAISED"),
}
TIMED_OUT = ("RST", "RAISED", "TimeoutError")


class Disagreement(Exception):
    def __init__(self, reason: str, verdict: Verdict = Verdict.DISAGREEMENT) -> None:
        super().__init__(reason)
        self.verdict = verdict


def judge(
    seen: Seen, ended: Ended | None, flow: Flow | None, *, killed: bool = False
) -> tuple[Verdict, str]:
    """One connection; *flow* if it went across the link. With what is wrong, if it is.

    *killed* if its server has been, after it had accepted the connection, and while a
    forked child of it lived on.
    """
    try:
        if killed and ended is None:
            return _killed(seen), ""
        return _judge(seen, ended, flow), ""
    except Disagreement as disagreement:
        return disagreement.verdict, str(disagreement)


def _killed(seen: Seen) -> Verdict:
    """The end is the kernel's: an RST, unless the FIN was out, or at least queued."""
    _check(seen.connected, "no connection")
    _check(not seen.wrong, "the answer has wrong bytes, or too many")
    _check(seen.close != "NONE", "the server is dead, and its peer does not know")
    whole = seen.received == seen.size
    if seen.close == "FIN":
        if not whole:
            raise Disagreement("FIN, and not all of the answer", Verdict.LOST_ANSWER)
        kind, _ = EXPECTED[Work(seen.work)]
        _check(kind == "FIN" or seen.work == Work.EOF_RAISE, "FIN of work that failed")
        _check(
            seen.close_notify == Way(seen.way).is_tls,
            "FIN, and no close_notify before it",
        )
    elif seen.close_notify and not whole:
        raise Disagreement("a close_notify, and not all of the answer")
    return Verdict.KILLED


def _judge(seen: Seen, ended: Ended | None, flow: Flow | None) -> Verdict:
    if seen.wrong:
        raise Disagreement("the answer has wrong bytes, or too many")
    if ended is None:
        return _never_accepted(seen, flow)
    _check(seen.way == ended.way, "it came another way")
    if ended.kind == "REFUSED":
        if ended.error == "TimeoutError" and ended.had_no_time:
            _check(seen.received == 0, "an answer without a scope")
            return Verdict.SERVER_TOO_LATE  # for the handshake before the scope
        _check(seen.close == "RESET", "no scope, and the peer had not reset")
        return Verdict.NEVER_SCOPED
    _check(seen.connected, "an Ending of a connection that was never made")
    if ended.number is None:
        # A handler that has not read the request does not know what to do.
        _check(seen.received == 0, "an answer to a request that did not arrive")
    else:
        _check(ended.number == seen.number, "the Ending of another connection")
    _check(ended.error != "AssertionError", "the handler has not found what it should")
    _check_close_notify(seen, ended)
    _check_cause(seen, ended, flow)
    _check_counts(seen, ended)
    if seen.close == "RESET":
        return _reset_by_peer(ended, flow)
    vanished = seen.kind == "vanishing" and flow is not None
    if ended.peer == "RST":
        raise Disagreement("the Ending has a reset by a peer that sent none")
    if seen.close == "NONE" and vanished:
        return _vanished(seen, ended)
    if ended.kind == "FIN":
        return _after_fin(seen, ended)
    return _after_rst(seen, ended, flow)


def _never_accepted(seen: Seen, flow: Flow | None) -> Verdict:
    if flow is not None:
        if not seen.connected:
            return Verdict.NEVER_CONNECTED
        if not flow.server.reached and seen.received == 0 and seen.close != "FIN":
            return Verdict.NEVER_REACHED
    raise Disagreement("no Ending")


def _check_close_notify(seen: Seen, ended: Ended) -> None:
    """It says that all of the answer is there, whatever comes behind it."""
    if seen.close_notify:
        if seen.received < seen.size:
            raise Disagreement(
                "a close_notify, and not all of the answer", Verdict.LOST_ANSWER
            )
        _check(ended.kind == "FIN", "a close_notify before the RST")
    elif seen.close == "FIN":
        _check(not Way(seen.way).is_tls, "FIN, and no close_notify before it")


def _check_cause(seen: Seen, ended: Ended, flow: Flow | None) -> None:
    if ended.number is None or seen.kind in ("resetting", "vanishing"):
        # No request, or no peer to the end.
        causes = ["RAISED"] if ended.kind == "RST" else ["RETURNED"]
        if ended.number is None and Way(seen.way).is_tls:
            causes.append("CANCELLED")  # the handshake, by its timeout
        gone = seen.kind == "resetting" and ended.peer == "RST"
        _check(ended.cause in causes or gone, "an unexpected cause")
        waited = seen.manner == Manner.WAITING.value or ended.number is None
        _check(not waited or ended.kind == "RST", "FIN of a handler that cannot return")
    elif not (
        _timed_out(ended) and (flow is not None or ended.had_no_time)
    ):  # as all may across the link
        kind, cause = EXPECTED[Work(seen.work)]
        if seen.work == Work.EOF_RAISE and ended.peer == "FIN":
            kind = "FIN"  # it was over before the failure, by both FINs
        _check(ended.kind == kind, f"expected {kind}")
        _check(ended.cause == cause, f"expected {cause}")
    eof_sent = seen.work == Work.EOF_RAISE and ended.number is not None
    _check(ended.fin_sent_before_reset <= eof_sent, "a FIN before the reset, of whom?")


def _timed_out(ended: Ended) -> bool:
    if ended.number is None and Way(ended.way).is_tls and ended.kind == "RST":
        return ended.cause == "CANCELLED" or ended.error == "TimeoutError"
    return (ended.kind, ended.cause, ended.error) == TIMED_OUT


def _check_counts(seen: Seen, ended: Ended) -> None:
    way = Way(seen.way)
    if way.is_tls or (way.may_read_ahead and seen.kind in UPLOADING):
        # Nobody counts what has been read ahead, and TLS reads whole records.
        _check(ended.discarded <= seen.sent, "discarded more than was sent")
    elif ended.kind == "FIN" and ended.peer == "FIN" and seen.kind in UPLOADING:
        # The handler has read the request and nothing else.
        _check(ended.discarded == seen.sent, f"discarded is not the {seen.sent} sent")
    elif seen.kind not in UPLOADING:
        _check(ended.discarded == 0, "discarded what was never sent")
    else:
        _check(ended.discarded <= seen.sent, "discarded more than was sent")
    if ended.kind == "FIN" and ended.peer == "NONE":
        cut_short = seen.work in CUT_SHORT  # that it was, the handler finds out
        _check(cut_short or ended.waited_in_vain, "the drain was over before the limit")
    if ended.kind == ended.peer == "FIN" and seen.kind != "half-closing":
        # The peer's FIN came after it had seen ours.
        _check(ended.unacknowledged == 0, "unacknowledged, but the peer saw the FIN")


def _reset_by_peer(ended: Ended, flow: Flow | None) -> Verdict:
    if ended.peer == "RST":
        return Verdict.AGREED
    if _timed_out(ended) and ended.had_no_time:
        return Verdict.SERVER_TOO_LATE
    if flow is not None and flow.server.reset_is_lost:
        return Verdict.PEER_RST_LOST
    if ended.kind == "FIN" and ended.peer == "NONE":
        return Verdict.PEER_TOO_LATE  # it waited for as long as it should
    raise Disagreement("the peer's RST is not in the Ending")


def _vanished(seen: Seen, ended: Ended) -> Verdict:
    _check(ended.peer == "NONE", "the Ending has an end of a peer that sent none")
    if ended.kind == "FIN":
        missing = seen.size - seen.received
        unacknowledged = ended.unacknowledged
        _check(
            unacknowledged is not None and unacknowledged >= missing,
            f"the peer has not received {missing} bytes that are acknowledged",
        )
    return Verdict.VANISHED


def _after_fin(seen: Seen, ended: Ended) -> Verdict:
    if seen.close == "FIN":
        if seen.received < seen.size:
            raise Disagreement("FIN, and not all of the answer", Verdict.LOST_ANSWER)
        return Verdict.AGREED
    cut_off = ended.peer == "NONE" and seen.sent > ended.discarded
    if seen.kind == "sipping" and not seen.lossy:
        # A slow reader that goes on has all the time that it takes.
        is_tls = Way(seen.way).is_tls
        cut_off &= seen.pause >= (PROGRESS_WITHIN_TLS if is_tls else PROGRESS_WITHIN)
    if seen.close == "RST" and cut_off:
        return Verdict.CUT_OFF
    raise Disagreement(f"FIN, and the peer saw {seen.close}", Verdict.LOST_ANSWER)


def _after_rst(seen: Seen, ended: Ended, flow: Flow | None) -> Verdict:
    if seen.close == "RST":
        return Verdict.AGREED
    if seen.close == "FIN":
        _check(ended.fin_sent_before_reset, "RST, and the peer saw FIN")
        _check(seen.received == seen.size, "FIN by send_eof(), and not all of the answer")
        return Verdict.AGREED
    if seen.close == "NONE" and flow is not None and flow.peer.reset_is_lost:
        return Verdict.RST_LOST
    raise Disagreement(f"RST, and the peer saw {seen.close}")


def _check(holds: bool, reason: str) -> None:
    if not holds:
        raise Disagreement(reason)
