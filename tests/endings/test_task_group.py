"""`Connection.create_task_group()`: the reset comes with the failure, not after it."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from anyio import wait_all_tasks_blocked
from anyio.lowlevel import checkpoint

from anyio_rst import Cause, CloseKind, Connection, PeerClose
from anyio_rst.testing import Seen, assert_rst, open_peer

from serving import assert_finished, assert_reset, connection_of, serve

if TYPE_CHECKING:
    from anyio.abc import TaskStatus

if sys.version_info < (3, 11):
    from exceptiongroup import ExceptionGroup

pytestmark = pytest.mark.anyio


class Failure(Exception):
    pass


class Stop(Exception):
    pass


class SlowCleanUp:
    """A child whose shielded clean-up lasts until what it waits for has come."""

    def __init__(self, waits_for: Callable[[], Awaitable[object]]) -> None:
        self._waits_for = waits_for
        self.running = anyio.Event()
        self.ended = anyio.Event()
        self.got: object = None

    async def __call__(self) -> None:
        try:
            self.running.set()
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                self.got = await self._waits_for()
                self.ended.set()


async def fail() -> None:
    raise Failure


async def test_failing_child_resets_before_its_siblings_have_cleaned_up(
    kind: str,
) -> None:
    with pytest.raises(ExceptionGroup) as caught:
        async with connection_of(kind) as (conn, peer):
            sibling = SlowCleanUp(peer.read_to_end)
            await conn.send(b"half")
            async with conn.create_task_group() as tg:
                tg.start_soon(sibling)
                await sibling.running.wait()
                tg.start_soon(fail)
    assert sibling.got == Seen(b"half", PeerClose.RST)
    await assert_reset(conn, peer, Cause.GROUP_FAILED)
    assert [type(exc) for exc in caught.value.exceptions] == [Failure]


async def test_failing_body_of_the_group_resets_before_the_children_have_cleaned_up(
    kind: str,
) -> None:
    with pytest.raises(ExceptionGroup):
        async with connection_of(kind) as (conn, peer):
            child = SlowCleanUp(peer.read_to_end)
            async with conn.create_task_group() as tg:
                tg.start_soon(child)
                await child.running.wait()
                raise Failure
    assert child.got == Seen(b"", PeerClose.RST)
    await assert_reset(conn, peer, Cause.GROUP_FAILED)


@pytest.mark.parametrize("host", ["in the body", "at the end", "shielded"])
async def test_cancellation_from_outside_resets_before_the_children_have_cleaned_up(
    kind: str, host: str
) -> None:
    async def cancel() -> None:
        await wait_all_tasks_blocked()
        outside.cancel_scope.cancel()

    async with anyio.create_task_group() as outside:
        async with connection_of(kind) as (conn, peer):
            # Only the child notices if its host is shielded, and then when it has ended.
            waits_for = checkpoint if host == "shielded" else peer.read_to_end
            child = SlowCleanUp(waits_for)
            async with conn.create_task_group() as tg:
                tg.start_soon(child)
                await child.running.wait()
                outside.start_soon(cancel)
                if host == "in the body":
                    await anyio.sleep_forever()
                elif host == "shielded":
                    with anyio.CancelScope(shield=True):
                        await assert_rst(peer)
    if host != "shielded":
        assert child.got == Seen(b"", PeerClose.RST)
    await assert_reset(conn, peer, Cause.CANCELLED)


@pytest.mark.parametrize("how", ["from the body", "from a child"])
async def test_stopping_the_helpers_by_cancelling_the_group_finishes(
    kind: str, how: str
) -> None:
    helper = SlowCleanUp(checkpoint)

    async def stop() -> None:
        tg.cancel_scope.cancel()

    async with connection_of(kind) as (conn, peer):
        async with conn.create_task_group() as tg:
            tg.start_soon(helper)
            await helper.running.wait()
            if how == "from the body":
                tg.cancel_scope.cancel()
            else:
                tg.start_soon(stop)
        assert helper.ended.is_set()
        assert tg.cancel_scope.cancel_called
        await conn.send(b"all of it")
    await assert_finished(conn, peer, Cause.RETURNED, b"all of it")


async def test_children_that_return_finish(kind: str) -> None:
    async with connection_of(kind) as (conn, peer):
        async with conn.create_task_group() as tg:
            tg.start_soon(conn.send, b"all of it", name="sender")
    await assert_finished(conn, peer, Cause.RETURNED, b"all of it")


async def test_finish_on_in_a_child_is_no_failure_of_the_others(kind: str) -> None:
    sibling = SlowCleanUp(checkpoint)

    async def stop() -> None:
        raise Stop

    async def handler(conn: Connection) -> None:
        await conn.send(b"all of it")
        async with conn.create_task_group() as tg:
            tg.start_soon(sibling)
            await sibling.running.wait()
            tg.start_soon(stop)

    async with serve(kind, handler, finish_on=Stop) as service:
        with service.connect() as peer:
            assert (await peer.read_to_end()).close is PeerClose.FIN
        ending = await service.ending()
    assert (ending.kind, ending.cause) == (CloseKind.FIN, Cause.FINISH_ON)


async def test_failure_of_a_clean_up_after_a_clean_stop_resets(kind: str) -> None:
    async def fail_to_clean_up() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            raise Failure

    with pytest.raises(ExceptionGroup):
        async with connection_of(kind) as (conn, peer):
            async with conn.create_task_group() as tg:
                tg.start_soon(fail_to_clean_up)
                await wait_all_tasks_blocked()
                tg.cancel_scope.cancel()
    await assert_reset(conn, peer, Cause.GROUP_FAILED)


async def test_start_that_fails_is_the_callers_to_judge(kind: str) -> None:
    async def fail_to_start(*, task_status: TaskStatus[None]) -> None:
        raise Failure

    async with connection_of(kind) as (conn, peer):
        async with conn.create_task_group() as tg:
            with pytest.raises(Failure):
                await tg.start(fail_to_start)
            assert conn.ending is None
    await assert_finished(conn, peer, Cause.RETURNED)


async def test_failure_after_the_start_resets(kind: str) -> None:
    async def start_then_fail(word: str, *, task_status: TaskStatus[str]) -> None:
        task_status.started(word)
        await sibling.running.wait()
        raise Failure

    with pytest.raises(ExceptionGroup):
        async with connection_of(kind) as (conn, peer):
            sibling = SlowCleanUp(peer.read_to_end)
            async with conn.create_task_group() as tg:
                assert await tg.start(start_then_fail, "ready") == "ready"
                tg.start_soon(sibling)
    assert sibling.got == Seen(b"", PeerClose.RST)
    await assert_reset(conn, peer, Cause.GROUP_FAILED)


@pytest.mark.parametrize("how", ["create_task", "start_soon", "start"])
async def test_stopping_one_helper_by_its_handle_finishes(kind: str, how: str) -> None:
    async def helper(*, task_status: Any = anyio.TASK_STATUS_IGNORED) -> None:
        task_status.started()
        await anyio.sleep_forever()

    async with connection_of(kind) as (conn, peer):
        async with conn.create_task_group() as tg:
            if how == "create_task":
                handle = tg.create_task(helper(), name="helper")
            elif how == "start_soon":
                handle = tg.start_soon(helper)
            else:
                handle = await tg.start(helper, return_handle=True)
            await wait_all_tasks_blocked()
            handle.cancel()
            await handle.wait()
            assert conn.ending is None
    await assert_finished(conn, peer, Cause.RETURNED)


async def test_a_task_handle_gives_the_result() -> None:
    async def answer() -> int:
        return 42

    async with open_peer() as (conn, peer):
        async with conn.create_task_group() as tg:
            handle = tg.create_task(answer())
            assert "answer" in handle.name
            assert await handle == 42
            with pytest.raises(TypeError, match="expected a coroutine"):
                tg.create_task(answer)  # type: ignore[arg-type]
    await assert_finished(conn, peer, Cause.RETURNED)


async def test_a_task_group_that_is_over_takes_no_tasks() -> None:
    async with open_peer() as (conn, peer):
        async with conn.create_task_group() as tg:
            pass
        with pytest.raises(RuntimeError, match="not active"):
            tg.start_soon(fail)
    await assert_finished(conn, peer, Cause.RETURNED)


async def test_timeout_around_the_group_is_a_cancellation_from_outside(kind: str) -> None:
    async with connection_of(kind) as (conn, peer):
        with anyio.move_on_after(0.01):
            async with conn.create_task_group() as tg:
                tg.start_soon(anyio.sleep_forever)
    await assert_reset(conn, peer, Cause.CANCELLED)


async def test_deadline_of_the_group_itself_finishes(kind: str) -> None:
    async with connection_of(kind) as (conn, peer):
        async with conn.create_task_group() as tg:
            tg.cancel_scope.deadline = anyio.current_time() + 0.01
            tg.start_soon(anyio.sleep_forever)
    await assert_finished(conn, peer, Cause.RETURNED)


@pytest.mark.parametrize("how", ["the group", "the child"])
async def test_stopping_a_group_stops_the_groups_within_it_without_a_reset(
    kind: str, how: str
) -> None:
    async def nested(conn: Connection) -> None:
        async with conn.create_task_group() as inner:
            inner.start_soon(anyio.sleep_forever)

    async with connection_of(kind) as (conn, peer):
        async with conn.create_task_group() as outer:
            handle = outer.start_soon(nested, conn)
            await wait_all_tasks_blocked()
            if how == "the group":
                outer.cancel_scope.cancel()
            else:
                handle.cancel()
        assert conn.ending is None
    await assert_finished(conn, peer, Cause.RETURNED)


async def test_a_failure_cancels_the_scope_of_the_group_like_anyios() -> None:
    async with open_peer() as (conn, peer):
        with pytest.raises(ExceptionGroup):
            async with conn.create_task_group() as tg:
                tg.start_soon(fail)
        assert tg.cancel_scope.cancel_called
    await assert_reset(conn, peer, Cause.GROUP_FAILED)
