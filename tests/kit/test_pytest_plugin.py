"""The plugin, in suites of its users, and docs/testing.md."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from conftest import BACKENDS, HAS_UVLOOP

pytest_plugins = ["pytester"]

DOCS = Path(__file__).parents[2] / "docs" / "testing.md"

# What this suite has for itself, and its users may not.
OTHERS = ("-p", "no:hypothesispytest", "-p", "no:timeout")

ALONE = ("-p", "no:anyio", "-p", "no:asyncio", "-p", "no:trio")
ANYIO = ("-p", "no:asyncio", "-p", "no:trio")
TRIO = ("-p", "no:anyio", "-p", "no:asyncio")
ASYNCIO = ("-p", "no:anyio", "-p", "no:trio")

LOOPS = [backend for backend in BACKENDS if backend.id != "uvloop" or HAS_UVLOOP]

CONFTEST = f"""
    import pytest

    @pytest.fixture(
        params={[backend.values[0] for backend in LOOPS]},
        ids={[backend.id for backend in LOOPS]},
    )
    def anyio_backend(request):
        return request.param
"""

SUITE = """
    import pytest
    from anyio_rst.testing import assert_fin, assert_rst

    pytestmark = pytest.mark.MARK

    async def test_pair(rst_pair):
        async with rst_pair() as (client, server):
            await client.send(b"ping")
            assert await server.receive() == b"ping"
        assert client.ending.kind.value == server.ending.kind.value == "FIN"

    async def test_peer(rst_peer):
        with pytest.raises(ZeroDivisionError):
            async with rst_peer() as (conn, peer):
                await conn.send(b"half")
                1 / 0
        assert (await assert_rst(peer)).data == b"half"

    async def test_connect(rst_peer, rst_connect):
        import socket
        with socket.create_server(("127.0.0.1", 0)) as listener:
            async with rst_connect(listener.getsockname()[1]) as peer:
                listener.accept()[0].close()
                await assert_fin(peer, b"")

    async def test_proxy(rst_peer, rst_connect, rst_proxy):
        import socket
        with socket.create_server(("127.0.0.1", 0)) as listener:
            async with rst_proxy(listener.getsockname()[1]) as proxy:
                proxy.cut(kind="rst")
                async with rst_connect(proxy.port) as peer:
                    await assert_rst(peer)

    async def test_failure(rst_peer):
        async with rst_peer() as (conn, peer):
            pass
        await assert_rst(peer)
"""

SEGMENTS = """
    import socket
    from anyio_rst.testing import TCPFlag

    def test_segments(rst_segments):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
            with rst_segments(port) as capture:
                socket.create_connection(("127.0.0.1", port)).close()
        assert len(capture.having(TCPFlag.SYN)) == 2
"""


BLOCKING = """
    import socket

    def test_proxy(rst_proxy):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            with rst_proxy(listener.getsockname()[1]) as proxy:
                proxy.cut(kind="fin")
                address = ("127.0.0.1", proxy.port)
                with socket.create_connection(address, 10) as client:
                    assert client.recv(1) == b""
"""


def run(pytester: pytest.Pytester, *args: str) -> pytest.RunResult:
    # What the suite leaves open fails it; what its plugins deprecate does not.
    strict = [
        "-Werror::ResourceWarning",
        "-Werror::pytest.PytestUnraisableExceptionWarning",
    ]
    return pytester.runpytest_subprocess("-ra", *strict, *OTHERS, *args)


def test_with_anyio_s_plugin(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(SUITE.replace("MARK", "anyio"))
    result = run(pytester, *ANYIO)
    result.assert_outcomes(passed=4 * len(LOOPS), failed=len(LOOPS))
    told = "*AssertionError: expected RST; got FIN after 0 bytes"
    result.stdout.fnmatch_lines([told] * len(LOOPS))


def test_with_pytest_trio(pytester: pytest.Pytester) -> None:
    pytest.importorskip("pytest_trio")
    pytester.makepyfile(SUITE.replace("MARK", "trio"))
    run(pytester, *TRIO).assert_outcomes(passed=4, failed=1)


def test_with_pytest_asyncio(pytester: pytest.Pytester) -> None:
    pytest.importorskip("pytest_asyncio")
    pytester.makepyfile(SUITE.replace("MARK", "asyncio"))
    run(pytester, *ASYNCIO).assert_outcomes(passed=4, failed=1)


def test_proxy_without_a_plugin_for_async_tests(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(BLOCKING)
    run(pytester, *ALONE).assert_outcomes(passed=1)


def test_segments_are_captured_or_the_test_is_skipped(
    pytester: pytest.Pytester,
) -> None:
    pytester.makepyfile(SEGMENTS)
    outcomes = run(pytester, *ALONE).parseoutcomes()
    assert outcomes in ({"passed": 1}, {"skipped": 1})


@pytest.mark.skipif(os.geteuid() != 0, reason="nobody else can give up CAP_NET_RAW")
def test_segments_that_cannot_be_captured_skip_the_test(
    pytester: pytest.Pytester,
) -> None:
    pytester.makepyfile(SEGMENTS)
    pytester.makeconftest(
        """
        import os
        import pytest

        @pytest.fixture(autouse=True)
        def nobody():
            os.seteuid(65534)
            yield
            os.seteuid(0)
        """
    )
    result = run(pytester, *ALONE)
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["SKIPPED*capturing segments needs CAP_NET_RAW"])


def test_suites_without_it_are_left_alone(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import sys

        def test_imports(request):
            assert "pytest_anyio_rst" in sys.modules
            assert not {"anyio", "anyio_rst", "outcome", "trio"} & set(sys.modules)

        def test_fixtures(request):
            assert not [name for name in request.fixturenames if "rst" in name]
        """
    )
    run(pytester, *ALONE).assert_outcomes(passed=2)


def test_can_be_turned_off(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test(rst_pair): pass")
    result = run(pytester, *ALONE, "-p", "no:anyio_rst")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*fixture 'rst_pair' not found"])


def test_the_examples_do_what_they_say(pytester: pytest.Pytester) -> None:
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile("\n".join(blocks))
    result = run(pytester, *ANYIO)
    outcomes = result.parseoutcomes()
    # One is skipped where there is no CAP_NET_RAW.
    assert outcomes.pop("passed") + outcomes.pop("skipped", 0) == 8 * len(LOOPS) + 1
    assert not outcomes
