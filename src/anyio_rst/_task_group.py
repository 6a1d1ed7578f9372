"""A task group whose failure ends a connection at once."""

from __future__ import annotations

from collections.abc import Coroutine
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
from anyio.abc import TaskGroup

from ._ending import Cause, cause_of_exit

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from contextvars import Context
    from types import TracebackType

    from anyio import TaskHandle
    from anyio.abc import TaskStatus
    from typing_extensions import Self

    from ._idle import Idle
    from ._lifecycle import Lifecycle

T = TypeVar("T")


class ConnectionTaskGroup(TaskGroup):
    """An AnyIO task group that tells of a failure when it happens.

    An ordinary group raises when its last child is done, after every shielded clean-up.
    This one calls *reset* before that, at the first of:

    - a child, or the body of the group, leaves with an exception;
    - a cancellation from outside arrives: at the body, at a child or at the wait for
      the children.

    Not failures: an exception of *finish_on*, and cancelling the group (`cancel_scope`),
    one child by its handle, or a group of the same connection around this one.
    """

    def __init__(
        self,
        life: Lifecycle,
        reset: Callable[[Cause], None],
        finish_on: tuple[type[BaseException], ...],
    ) -> None:
        # A scope of its own around AnyIO's group: AnyIO cancels the group's scope for
        # a cancellation from outside as well, and then it could not be told who did.
        self.cancel_scope = anyio.CancelScope()
        self._life = life  # of the connection, whichever scope it is seen from
        self._reset = reset
        self._finish_on = finish_on
        self._group = anyio.create_task_group()
        self._children = 0
        self._childless: anyio.Event | None = None
        self._around: ConnectionTaskGroup | _Child | None = None
        self._idle: Idle | None = None

    async def __aenter__(self) -> Self:
        self._idle = self._life.native.idle
        self._around = _around.get()
        _around.set(self)
        self.cancel_scope.__enter__()
        await self._group.__aenter__()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> bool:
        # By hand: contextlib's stacks make a cycle of an exception and its frames.
        left = exc_val
        try:
            if left is None:
                try:
                    await self._wait_for_children()
                except BaseException as exc:
                    left = exc
            if left is not None:
                self._member_raised(left, self)
            try:
                if await self._group.__aexit__(*_exc_info(left)):
                    left = None
            except BaseException as exc:
                left = exc
            if self.cancel_scope.__exit__(*_exc_info(left)):
                left = None
            if left is None or left is exc_val:
                return left is None
            raise left
        finally:
            _around.set(self._around)
            del exc_val, exc_tb, left

    async def _wait_for_children(self) -> None:
        while self._children:
            self._childless = anyio.Event()
            await self._childless.wait()

    def was_stopped(self, life: Lifecycle) -> bool:
        """Whether it, or what is around it, was cancelled on purpose."""
        if self._life is life and (
            self.cancel_scope.cancel_called or _is_over(self._idle)
        ):
            return True
        return self._around is not None and self._around.was_stopped(life)

    def _member_raised(
        self, exc: BaseException, member: ConnectionTaskGroup | _Child
    ) -> None:
        cause = cause_of_exit(exc, self._finish_on)
        if cause is Cause.CANCELLED:
            if not member.was_stopped(self._life):
                self._reset(Cause.CANCELLED)
            return
        if cause is not Cause.FINISH_ON:
            self._reset(Cause.GROUP_FAILED)
        # What AnyIO does next, and no cancellation from outside for the others.
        self.cancel_scope.cancel()

    async def _run(self, child: _Child, running: Awaitable[T]) -> T:
        _around.set(child)
        try:
            return await running
        except BaseException as exc:
            if child.has_started:
                self._member_raised(exc, child)
            raise
        finally:
            self._children -= 1
            if not self._children and self._childless is not None:
                self._childless.set()

    def create_task(
        self,
        coro: Coroutine[Any, Any, T],
        *,
        name: object = None,
        context: Context | None = None,
    ) -> TaskHandle[T]:
        if not isinstance(coro, Coroutine):
            raise TypeError(f"expected a coroutine, got {type(coro).__qualname__}")
        child = _Child(self)
        if name is None:
            name = getattr(coro, "__qualname__", None)
        running = self._run(child, coro)
        self._children += 1
        try:
            child.handle = self._group.create_task(running, name=name, context=context)
        except BaseException:
            self._children -= 1
            coro.close()
            raise
        return child.handle

    async def start(
        self,
        func: Callable[..., Coroutine[Any, Any, Any]],
        *args: object,
        name: object = None,
        **kwargs: Any,
    ) -> Any:
        child: _Child | None = None

        async def run(*, task_status: TaskStatus[Any]) -> Any:
            nonlocal child
            self._children += 1
            child = _Child(self, task_status)
            return await self._run(child, func(*args, task_status=child))

        name = name or _name_of(func)
        started = await self._group.start(run, name=name, **kwargs)
        if child is not None and kwargs.get("return_handle"):
            child.handle = started
        return started


class _Child:
    """A child task, and the `task_status` of one that has to start first."""

    def __init__(
        self, group: ConnectionTaskGroup, task_status: TaskStatus[Any] | None = None
    ) -> None:
        # Until it has started, its failure is that of the task that waits for it.
        self.has_started = task_status is None
        self.handle: TaskHandle[Any] | None = None
        self._group = group
        self._task_status = task_status

    def started(self, value: Any = None) -> None:
        assert self._task_status is not None
        self._task_status.started(value)
        self.has_started = True

    def was_stopped(self, life: Lifecycle) -> bool:
        """Whether it, or what is around it, was cancelled on purpose."""
        handle = self.handle
        if handle is not None and handle.status is type(handle).Status.CANCELLING:
            return True
        return self._group.was_stopped(life)


# Where the running task is, so that a group knows the groups around it.
_around: ContextVar[ConnectionTaskGroup | _Child | None] = ContextVar(
    "anyio_rst task group", default=None
)


def is_stopped(life: Lifecycle) -> bool:
    """Whether the running task is in what has been stopped on purpose.

    That is a group of that connection, or its :meth:`~Connection.idle`.
    """
    if _is_over(life.native.idle):
        return True
    around = _around.get()
    return around is not None and around.was_stopped(life)


def _is_over(idle: Idle | None) -> bool:
    return idle is not None and idle._is_over


def _exc_info(
    exc: BaseException | None,
) -> tuple[type[BaseException] | None, BaseException | None, TracebackType | None]:
    """*exc* as `sys.exc_info()` shows it."""
    return (None, None, None) if exc is None else (type(exc), exc, exc.__traceback__)


def _name_of(func: Callable[..., Any]) -> str:
    return f"{getattr(func, '__module__', '')}.{getattr(func, '__qualname__', func)}"
