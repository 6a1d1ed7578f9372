"""The examples as programs, and the pages that show them."""

from __future__ import annotations

import socket
import ssl
from pathlib import Path

import pytest
import trustme
from test_readme import connect, free_port
from test_serve_processes import answers, example, loops, read_to_end, running

from anyio_rst import PeerClose

from serving import LONG, Seen

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["download", "proxy", "line_protocol", "push"])
def test_page_shows_the_example(name: str) -> None:
    text = (ROOT / "docs" / f"{name}.md").read_text()
    assert text.index(f"<!-- examples/{name}.py -->")
    assert f"    python examples/{name}.py" in text
    assert f"docs/{name}.md" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    ("page", "name"),
    [
        ("limits", "limits"),
        ("balancer", "behind_haproxy"),
        ("observability", "log_json"),
        ("observability", "metrics"),
        ("tls", "tls_server"),
    ],
)
def test_guide_shows_the_example(page: str, name: str) -> None:
    text = (ROOT / "docs" / f"{page}.md").read_text()
    assert f"<!-- examples/{name}.py -->\n" in text


def certificate(directory: Path) -> tuple[Path, ssl.SSLContext]:
    """A certificate with its key, in a file, and a client's context that trusts it."""
    authority = trustme.CA()
    pem = directory / "server.pem"
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(pem)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    return pem, trusting


@loops
def test_line_protocol(loop: str, tmp_path: Path) -> None:
    port = free_port()
    pem, trusting = certificate(tmp_path)
    with running([*example("line_protocol.py", loop), str(port), str(pem)]) as process:
        with connect(port, process) as sock:
            sock.sendall(b"EXPLAIN EPIPE\r\nSTARTTLS\r\n")
            answers(sock, b"+OK ready\r\n+OK Broken pipe\r\n+OK go ahead\r\n")
            with trusting.wrap_socket(sock, server_hostname="localhost") as secure:
                secure.sendall(b"QUIT\r\n")
                assert secure.recv(100) == b"+OK bye\r\n"
                assert secure.recv(100) == b""  # a close_notify, or it would raise
        with socket.create_connection(("127.0.0.1", port), timeout=LONG) as sock:
            sock.sendall(b"STARTTLS\r\nEXPLAIN EPIPE\r\n")
            assert read_to_end(sock) == Seen(b"+OK ready\r\n", PeerClose.RST)


NAMES = [("Ada", b"Hello, ADA", True), ("Zoë", b"Hello, ", False)]


@loops
def test_tls_server(loop: str, tmp_path: Path) -> None:
    port = free_port()
    pem, trusting = certificate(tmp_path)
    with running([*example("tls_server.py", loop, port=port), str(pem)]) as process:
        for name, answer, is_whole in NAMES:
            with trusting.wrap_socket(
                connect(port, process),
                server_hostname="localhost",
                suppress_ragged_eofs=False,
            ) as secure:
                secure.sendall(name.encode())
                answers(secure, answer)
                if is_whole:
                    assert secure.recv(100) == b""  # a close_notify
                else:
                    with pytest.raises((ConnectionResetError, ssl.SSLEOFError)):
                        secure.recv(100)
