"""What the kernel knows about a TCP connection."""

from __future__ import annotations

import errno
import functools
import os
import socket
import struct
import sys
from contextlib import suppress

from ._sockets import (
    DONTWAIT,
    IPPROTO_MPTCP,
    PEEK,
    RESET_ERRNOS,
    can_dissolve,
    is_multipath,
    pending_error,
)


def loss(sock: socket.socket) -> OSError | None:
    """What ended the connection, or None if it has not ended.

    ENOTCONN if that has been told before, or if both sides have finished.
    """
    error = pending_error(sock)
    if error is None:
        try:
            sock.getpeername()
        except OSError as exc:
            error = pending_error(sock) or exc  # which may have come since
    return error


def is_unknown(loss: BaseException) -> bool:
    """Whether *loss* only says that there is no connection, and not why."""
    return isinstance(loss, OSError) and loss.errno == errno.ENOTCONN


def is_peers_reset(sock: socket.socket, loss: BaseException) -> bool:
    """Whether *loss* is a reset by the peer, and not by another owner of *sock*."""
    is_reset = isinstance(loss, OSError) and loss.errno in RESET_ERRNOS
    return is_reset and not _is_dissolved(sock)


def _refuses_to_send(sock: socket.socket) -> bool:
    """Whether nothing can be sent on *sock*, whose connection is there."""
    sock.getpeername()  # else the send would be told what has ended it
    try:
        sock.send(b"", DONTWAIT)
    except OSError as exc:
        return exc.errno == errno.EPIPE
    return False


# The interface is Linux's, with its numbers; gVisor has it as well. What the kernel
# behind it tells is another matter, and asked.
if sys.platform == "linux":
    from fcntl import ioctl
    from termios import FIONREAD, TIOCOUTQ

    # Our FIN has been queued: RFC 9293, 3.3.2; numbers of linux/tcp_states.h.
    _FINISHED = {4, 5, 6, 9, 11}  # FIN_WAIT1 and 2, TIME_WAIT, LAST_ACK, CLOSING
    _BOTH_FINISHED = {6, 9, 11}  # the peer's has arrived as well
    _PEER_FINISHED = _BOTH_FINISHED | {8}  # CLOSE_WAIT
    _UNFINISHED = {1, 8}  # ESTABLISHED, CLOSE_WAIT
    _SYN_RECEIVED = 3  # accepted before the handshake is over: Fast Open, RFC 7413
    _CLOSED = 7  # by both FINs, or by an RST

    # What TCP_INFO tells of an MPTCP socket is its first subflow's (net/mptcp/sockopt.c),
    # on which one end or both may be out, or none, whatever has become of the whole.

    # Not in Python's modules: linux/sockios.h, linux/tcp.h.
    _SIOCOUTQNSD = 0x894B
    _TCP_INQ = 36
    _SOL_MPTCP, _MPTCP_INFO = 284, 1  # linux/mptcp.h

    # The question of sock_diag(7): linux/netlink.h, linux/sock_diag.h, linux/inet_diag.h.
    _SOCK_DIAG, _BY_FAMILY, _REQUEST, _ERROR, _PROTOCOL = 4, 20, 1, 2, 3

    def fin_is_out(sock: socket.socket) -> bool:
        """Whether our side has finished."""
        try:
            if is_multipath(sock):
                return _refuses_to_send(sock)
            return _state(sock) in _FINISHED
        except OSError:
            return False

    def _state(sock: socket.socket) -> int:
        """tcpi_state of tcp(7), a number of linux/tcp_states.h."""
        state: int = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
        return state

    def false_end(sock: socket.socket) -> OSError | None:
        """Why the input of *sock* ended without a FIN; None if with one, or not known.

        To recv(2) an end is an end: that which the peer's FIN makes, that of a lost
        connection whose SO_ERROR somebody else has read (ENOTCONN), and what somebody
        else has made by shutdown(SHUT_RD) (ESHUTDOWN).
        """
        try:
            multipath = is_multipath(sock)
            code = _false_multipath_end(sock) if multipath else _false_tcp_end(sock)
        except OSError:
            return None
        return OSError(code, os.strerror(code)) if code else None

    def _false_tcp_end(sock: socket.socket) -> int:
        state = _state(sock)
        if state in _PEER_FINISHED or _may_have_fin(sock, state):
            return 0
        return errno.ENOTCONN if state == _CLOSED else errno.ESHUTDOWN

    def _false_multipath_end(sock: socket.socket) -> int:
        flags_token = _flags_and_token(sock)
        if flags_token is None:  # one connection, whose loss is no end of the input
            state = _state(sock)
        elif token := flags_token[1]:
            state = _multipath_state(token)
        else:
            return errno.ENOTCONN
        return 0 if state in _PEER_FINISHED or state == _CLOSED else errno.ESHUTDOWN

    def _flags_and_token(sock: socket.socket) -> tuple[int, int] | None:
        """Of MPTCP_INFO, which is refused of a connection that fell back to TCP.

        The token (RFC 8684, 3.2) is 0 once it has been reset, the flags after a reset of
        our own: else there is MPTCP_INFO_FLAG_REMOTE_KEY_RECEIVED.
        """
        try:
            info = sock.getsockopt(_SOL_MPTCP, _MPTCP_INFO, 16)
        except OSError:
            return None
        flags, token = struct.unpack("8xII", info)
        return flags, token

    def _multipath_state(token: int) -> int:
        """The state of the whole, not of its first subflow: sock_diag(7) alone tells it.

        Raises:
          OSError: it does not tell this process, or not here. The kernel may lack
            INET_MPTCP_DIAG, and the socket may be of another network namespace.
        """
        # struct inet_diag_req_v2, whose sdiag_protocol has no room for that of MPTCP.
        question = struct.pack("=B47xII", socket.AF_INET, token, 0)
        question += struct.pack("=HHI", 8, _PROTOCOL, IPPROTO_MPTCP)
        header = struct.pack("=IHHII", 16 + len(question), _BY_FAMILY, _REQUEST, 0, 0)
        kind = socket.SOCK_RAW | socket.SOCK_NONBLOCK
        with socket.socket(socket.AF_NETLINK, kind, _SOCK_DIAG) as kernel:
            kernel.send(header + question)
            answer = kernel.recv(64)
        if struct.unpack_from("4xH", answer) == (_ERROR,):
            raise OSError(-struct.unpack_from("16xi", answer)[0], "sock_diag")
        return answer[17]  # idiag_state

    def _may_have_fin(sock: socket.socket, state: int) -> bool:
        # Where the kernel does not tell, one that has been received shows in the state
        # for as long as that is not that of a connection that is over.
        return _has_fin(sock) if _tells_of_fin() else state == _CLOSED

    def _has_fin(sock: socket.socket) -> bool:
        """Whether a FIN has been received on *sock*.

        TCP_CM_INQ, the bytes that wait, counts it as one, also when it has been read
        (tcp_inq_hint() in net/ipv4/tcp.c, from Linux 5.1 on), and SIOCINQ does not.
        """
        sock.setsockopt(socket.IPPROTO_TCP, _TCP_INQ, 1)
        size = socket.CMSG_SPACE(4)
        for *_, told in sock.recvmsg(1, size, PEEK | DONTWAIT)[1]:
            waiting: int = struct.unpack("i", told)[0]
            return waiting != _queue_size(sock, FIONREAD)
        return True

    @functools.cache
    def _tells_of_fin() -> bool:
        """Whether this kernel has :func:`_has_fin` right: asked of a FIN of our own."""
        if not can_dissolve():
            # gVisor. At the end of the input recvmsg() there leaves the buffer for
            # TCP_CM_INQ as it was, and Python takes what is in it for messages.
            return False
        with socket.socket() as own:
            own.setblocking(False)
            own.bind(("127.0.0.1", 0))
            own.connect_ex(own.getsockname())  # to itself: RFC 9293, 3.5
            own.shutdown(socket.SHUT_WR)
            return own.recv(1) == b"" and _has_fin(own)

    def _is_dissolved(sock: socket.socket) -> bool:
        # As by reset(): first it says ECONNRESET, as after a reset by the peer.
        try:
            if is_multipath(sock):
                return _flags_and_token(sock) == (0, 0)
            sock.recv(1, PEEK | DONTWAIT)
        except OSError as exc:
            return exc.errno == errno.ENOTCONN
        return False

    def queued(sock: socket.socket) -> int | None:
        """Bytes sent that the peer's TCP has not acknowledged; None if it can't tell.

        SIOCOUTQ of tcp(7), which counts the FIN as one byte more.
        """
        size = _queue_size(sock, TIOCOUTQ)
        try:
            if size == 0 and _state(sock) == _SYN_RECEIVED:
                return None  # it is 0 then, whatever was sent
            if size and is_multipath(sock) and _flags_and_token(sock) is None:
                # mptcp_ioctl_outq() of net/mptcp/protocol.c is one too many at first.
                return size if _has_acked(sock) else None
        except OSError:
            return None
        return size

    def _has_acked(sock: socket.socket) -> bool:
        """Whether the peer has acknowledged more than the SYN: tcpi_bytes_acked."""
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 128)
        acked: int = struct.unpack("120xQ", info)[0]
        return acked > 1

    def given(sock: socket.socket) -> int | None:
        """Bytes that the kernel has been given to send; None if none, or it can't tell.

        tcpi_bytes_sent, without tcpi_bytes_retrans, and tcpi_notsent_bytes of
        linux/tcp.h, from Linux 4.19 on. gVisor leaves all at 0, and MPTCP has a queue of
        its own above them.
        """
        try:
            if is_multipath(sock):
                return None
            info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 216)
            waiting, sent, again = struct.unpack("144xI52xQQ", info)
        except (OSError, struct.error):
            return None
        return int(waiting + sent - again) or None

    def fin_has_left(sock: socket.socket) -> bool:
        """Whether the FIN that was queued has been sent: nothing is in the queue unsent.

        So it stays after a reset, which a FIN behind a closed window does not survive.
        Where the kernel cannot tell, it is taken for granted, unless the state has not
        changed: gVisor's did so with the segment, and since 2026 it does with shutdown().

        Before the handshake is over it waits for that: tcp_shutdown() of net/ipv4/tcp.c.
        """
        unsent = _queue_size(sock, _SIOCOUTQNSD)
        if unsent:
            return False
        with suppress(OSError):
            if unsent is None:
                return _state(sock) not in _UNFINISHED
            if is_multipath(sock):  # handed to its subflows
                info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 148)
                return info[144:] == bytes(4)  # tcpi_notsent_bytes
            return _state(sock) != _SYN_RECEIVED
        return True

    def both_finished(sock: socket.socket) -> bool:
        """Whether both FINs are out, and an RST would not be sent any more.

        That is so in tcp_disconnect() of net/ipv4/tcp.c, and in RFC 9293, 3.10.5.
        """
        try:
            if is_multipath(sock):
                error = loss(sock)
                is_over = error is not None and is_unknown(error)
                return is_over and false_end(sock) is None
            state = _state(sock)
            return (state in _BOTH_FINISHED and fin_has_left(sock)) or (
                state == _CLOSED
                and pending_error(sock) is None
                and _may_have_fin(sock, state)
            )
        except OSError:
            return False

    def _queue_size(sock: socket.socket, request: int) -> int | None:
        try:
            answer = ioctl(sock.fileno(), request, b"\0" * 4)
        except (OSError, ValueError):  # ValueError: sock is closed
            return None
        size: int = struct.unpack("i", answer)[0]
        return size

    def backlog(listener: socket.socket) -> int | None:
        """How many connections wait to be accepted: tcpi_unacked of a listening socket.

        So tcp_get_info() of net/ipv4/tcp.c has it, the fifth of the ints behind 8 bytes,
        and in the sixth how many there may be. gVisor leaves both at 0.
        """
        try:
            info = listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 32)
        except OSError:
            return None
        size, most = struct.unpack("24xII", info)
        return int(size) if most else None
else:

    def fin_is_out(sock: socket.socket) -> bool:
        """Whether our side has finished, and the connection is still there."""
        try:
            return _refuses_to_send(sock)
        except OSError:
            return False

    def false_end(sock: socket.socket) -> OSError | None:
        """Why the input of *sock* ended without a FIN: not known here."""
        return None

    def _is_dissolved(sock: socket.socket) -> bool:
        return False

    def queued(sock: socket.socket) -> int | None:
        """Bytes sent that the peer's TCP has not acknowledged: not known here."""
        return None

    def given(sock: socket.socket) -> int | None:
        """Bytes that the kernel has been given to send: not known here."""
        return None

    def fin_has_left(sock: socket.socket) -> bool:
        """Not known here: taken for granted."""
        return True

    def both_finished(sock: socket.socket) -> bool:
        """Whether there is no connection any more, and nothing has broken it."""
        error = loss(sock)
        return error is not None and error.errno == errno.ENOTCONN

    def backlog(listener: socket.socket) -> int | None:
        """How many connections wait to be accepted: not known here."""
        return None
