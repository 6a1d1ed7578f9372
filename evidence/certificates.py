"""A certificate for the servers of a run, and those who trust it."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING

import trustme

if TYPE_CHECKING:
    from pathlib import Path


def issue(directory: Path, *addresses: str) -> tuple[Path, Path]:
    """The files of the servers at *addresses*, and of who is to trust them."""
    authority = trustme.CA()
    server, trust = directory / "server.pem", directory / "authority.pem"
    issued = authority.issue_cert(*addresses)
    issued.private_key_and_cert_chain_pem.write_to_path(server)
    authority.cert_pem.write_to_path(trust)
    return server, trust


def server_context(certificate: str | Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


def client_context(trust: str | Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=trust)
