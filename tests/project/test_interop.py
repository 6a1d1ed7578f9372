"""Interoperability: that its judge and the page say what is so."""

from __future__ import annotations

import itertools
import threading
from contextlib import contextmanager
from pathlib import Path
from socket import create_server
from typing import TYPE_CHECKING

import pytest

from evidence.certificates import issue
from evidence.interop import (
    clients,
    cut_clients,
    cut_servers,
    cuts,
    cutting,
    programs,
    proxied,
    proxies,
    report,
)
from evidence.interop.results import (
    ANSWERS,
    CHUNKS,
    HALF_FIN,
    HALF_RST,
    JUDGE,
    ROUTES,
    TLS_ROUTES,
    Results,
    Told,
    load,
)
from evidence.sockets import HOST, RESET_ON_CLOSE

from serving import LONG

if TYPE_CHECKING:
    from collections.abc import Iterator

OURS = ["direct", "proxy.py"]


@pytest.fixture(scope="module")
def results() -> Results:
    return load(report.RESULTS)


def test_results_are_those_of_a_full_run(results: Results) -> None:
    expected = [
        (scheme, answer, route, client)
        for scheme, routes in (("http", ROUTES), ("https", TLS_ROUTES))
        for answer in ANSWERS
        for route in routes
        for client in clients.BY_SCHEME[scheme]
    ]
    found = [(c.scheme, c.answer, c.route, c.client) for c in results.cells]
    assert found == expected
    assert [row.route for row in results.upstream] == list(ROUTES)


def test_results_say_nothing_of_the_machine(results: Results) -> None:
    assert results.about["system"] == "Linux"
    for path in (report.RESULTS, report.CUTS):
        assert "/tmp" not in path.read_text()


# What the paragraphs of the page say, which nothing writes anew.


def test_only_our_own_proxy_passes_a_reset_on(results: Results) -> None:
    found = results.find(HALF_RST)
    for route in ROUTES:
        said = {told.said for told in found[route, JUDGE].told}
        assert ("RST" in said) is (route in OURS), route
        assert len(said) == 1, route


@pytest.mark.parametrize("route", ROUTES)
def test_who_notices(results: Results, route: str) -> None:
    def noticed(answer: str) -> set[bool | None]:
        found = results.find(answer)
        names = [name for name in clients.BY_SCHEME["http"] if name != "nc"]
        return {found[route, name].noticed for name in names}

    assert noticed(HALF_FIN) == {False}
    assert noticed(CHUNKS) == {True}
    passes = route in OURS or route.startswith("nginx-http")
    assert noticed(HALF_RST) == {passes}


def test_over_tls_all_but_curl_insist_on_the_close_notify(results: Results) -> None:
    found = results.find(HALF_RST, "https")
    for route in TLS_ROUTES:
        for name in clients.BY_SCHEME["https"]:
            insists = route in OURS or name != "curl"
            assert found[route, name].noticed is insists, (route, name)


def test_what_the_origin_is_told(results: Results) -> None:
    def always(end: str) -> list[str]:
        return [end] * int(results.about["rounds"])

    rows = {row.route: row for row in results.upstream}
    resets = {route for route, row in rows.items() if row.of_reset == always("RST")}
    assert resets == {
        *OURS,
        "haproxy-tcp",
        "haproxy-nolinger",
        "haproxy-abortonclose",
    }
    assert rows["nginx-stream"].of_reset == always("FIN")
    all_of_it = rows["direct"].there_was
    for told in rows["nginx-stream"].after_fin:
        assert told.said == "FIN"
        assert told.size != all_of_it
    for route in ("nginx-http", "nginx-http-unbuffered"):
        for told in rows[route].after_fin:
            assert told.noticed is (told.size != all_of_it)
    for told in rows["nginx-half-close"].after_fin:
        assert told.size == all_of_it


@contextmanager
def answering(response: bytes, *, reset: bool) -> Iterator[str]:
    """The URL of a plain socket that answers once, and ends the connection."""
    with create_server((HOST, 0)) as listener:

        def answer() -> None:
            sock, _ = listener.accept()
            with sock:
                sock.recv(1000)
                sock.sendall(response)
                if reset:
                    sock.setsockopt(*RESET_ON_CLOSE)

        thread = threading.Thread(target=answer)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        thread.join(LONG)
        assert not thread.is_alive()


CLOSE = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nhalf"
CHUNK = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n"
LAST = b"0\r\n\r\n"


@pytest.mark.parametrize(
    ("response", "reset", "told"),
    [
        (CLOSE, False, Told("FIN", 4, noticed=False)),
        (CLOSE, True, Told("RST", 4, noticed=True)),
        (CHUNK, False, Told("FIN, last chunk missing", 4, noticed=True)),
        (CHUNK, True, Told("RST, last chunk missing", 4, noticed=True)),
        (CHUNK + LAST, False, Told("FIN, last chunk there", 4, noticed=False)),
        (CHUNK + LAST, True, Told("RST, last chunk there", 4, noticed=False)),
        (CLOSE[:9], False, Told("FIN", 0, noticed=True)),
        (b"", True, Told("RST", 0, noticed=True)),
    ],
)
def test_judge_sees_what_is_so(response: bytes, reset: bool, told: Told) -> None:
    with answering(response, reset=reset) as url:
        assert clients.by_socket(url, Path()) == told


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(proxies, "STREAM_MODULE", Path("/nowhere"))
    with pytest.raises(SystemExit) as caught:
        proxied.check_programs()
    packages = "nginx haproxy curl wget netcat-openbsd openssl libnginx-mod-stream"
    assert str(caught.value).endswith(f"on Debian: apt-get install {packages}")


# Cut in the middle.


@pytest.fixture(scope="module")
def cut() -> cuts.Cuts:
    return cuts.load(report.CUTS)


def test_cuts_are_those_of_a_full_run(cut: cuts.Cuts) -> None:
    ends = ["whole", *cuts.ENDS]
    expected = [
        *(
            (name, body, end)
            for name in cut_clients.HTTP
            for body in cuts.BODIES
            for end in ends
        ),
        *itertools.product(cuts.OTHERS, [""], ends),
    ]
    assert [(cell.client, cell.body, cell.end) for cell in cut.cells] == expected
    assert not cut.left_out
    assert {len(cell.told) for cell in cut.cells} == {int(cut.about["rounds"])}


def test_what_was_not_cut_was_whole(cut: cuts.Cuts) -> None:
    for cell in cut.cells:
        assert cell.is_right is (cell.end == "whole"), cell


def who(cut: cuts.Cuts, body: str, end: str) -> set[str]:
    """Who notices; and that everybody does so always or never."""
    found = [cell for cell in cut.cells if (cell.body, cell.end) == (body, end)]
    assert all(cell.noticed is not None for cell in found)
    return {cell.client for cell in found if cell.noticed}


def test_what_the_page_says_of_cuts(cut: cuts.Cuts) -> None:
    everybody = set(cut_clients.HTTP)
    wget, fetch = "wget --tries=1", "fetch of Node"
    assert who(cut, "close", "fin") == set()
    assert who(cut, "length", "fin") == everybody
    assert who(cut, "chunked", "fin") == everybody - {wget}
    assert who(cut, "chunked-close", "fin") == everybody - {wget, fetch}
    assert who(cut, "tls", "fin") == {wget}
    assert who(cut, "close-notify", "fin") == set()
    assert who(cut, "close", "rst") == everybody - {"aiohttp", fetch}
    assert who(cut, "length", "rst") == who(cut, "chunked", "rst") == everybody
    assert who(cut, "chunked-close", "rst") == everybody - {fetch}
    for body in ("tls", "close-notify"):
        assert who(cut, body, "rst") == {"curl", wget}
    assert who(cut, "", "fin") == {"psycopg", "asyncpg", "redis-py"}
    assert who(cut, "", "rst") == {"psycopg", "asyncpg", "redis-py", "ftplib"}


@pytest.mark.parametrize("end", ["whole", "fin", "rst"])
def test_cuts_are_measured(end: str, tmp_path: Path) -> None:
    """With clients that are always there."""
    server, trust = issue(tmp_path, HOST)
    with cut_servers.http(server) as ports:
        for body in cuts.BODIES:
            how = "urllib.request", body, ports, trust, end
            told = cutting.ask_over_http(*how)
            if body == "length":
                assert told.noticed is (end != "whole")
            if body == "close" and end == "fin":
                assert told.size is not None
                assert 0 < told.size < cuts.SIZE
    with cut_servers.ftp(tmp_path) as port:
        assert cutting.ask_another("ftplib", port, end).noticed is (end == "rst")


def test_who_is_not_there_is_left_out_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for module in (cut_clients, cut_servers):
        monkeypatch.setattr(module, "find", lambda _: None)
    monkeypatch.setattr(cut_clients, "find_spec", lambda _: None)
    assert cut_clients.why_not("curl") == "curl is not installed"
    assert cut_clients.why_not("redis-py") == "redis is not installed"
    assert cut_clients.why_not("ftplib") is None
    for server in (cut_servers.redis, cut_servers.postgresql):
        with pytest.raises(programs.Unavailable, match="no "):
            with server(tmp_path):
                pass
