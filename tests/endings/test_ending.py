"""The verdict, without a socket."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any, cast

import anyio
import outcome
import pytest

from anyio_rst import Cause, CloseKind, Ending, PeerClose
from anyio_rst._ending import KIND_OF, cause_of_exit, check_finish_on, verdict

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup, ExceptionGroup


class Stop(Exception):
    pass


@pytest.mark.parametrize("cause", Cause)
def test_every_cause_has_a_kind(cause: Cause) -> None:
    assert KIND_OF[cause] in CloseKind


@pytest.mark.parametrize("cause", Cause)
def test_a_torn_send_turns_every_fin_into_a_reset_and_nothing_else(cause: Cause) -> None:
    assert verdict(cause, torn=False) is cause
    torn = verdict(cause, torn=True)
    assert torn is (Cause.TORN_SEND if KIND_OF[cause] is CloseKind.FIN else cause)
    assert KIND_OF[torn] is not CloseKind.FIN


@pytest.mark.anyio
async def test_cause_of_exit() -> None:
    def group(*inner: BaseException) -> BaseException:
        return BaseExceptionGroup("", inner)

    cancelled: BaseException | None = None
    with anyio.CancelScope() as scope:
        scope.cancel()
        try:
            await anyio.sleep_forever()
        except BaseException as exc:
            cancelled = exc
            raise
    assert cancelled is not None
    on_stop = (Stop,)
    table: list[tuple[BaseException | None, tuple[type[BaseException], ...], Cause]] = [
        (None, (), Cause.RETURNED),
        (Stop(), (), Cause.RAISED),
        (Stop(), on_stop, Cause.FINISH_ON),
        (KeyboardInterrupt(), (Exception,), Cause.RAISED),
        (cancelled, (), Cause.CANCELLED),
        (cancelled, on_stop, Cause.CANCELLED),
        (cancelled, (type(cancelled),), Cause.FINISH_ON),
        (group(cancelled, group(cancelled)), (), Cause.CANCELLED),
        (group(Stop(), group(Stop())), on_stop, Cause.FINISH_ON),
        (group(Stop(), OSError()), on_stop, Cause.GROUP_FAILED),
        (group(Stop(), cancelled), on_stop, Cause.GROUP_FAILED),
        (group(OSError()), (), Cause.GROUP_FAILED),
    ]
    for left_by, finish_on, cause in table:
        assert cause_of_exit(left_by, finish_on) is cause, (left_by, finish_on)


def test_cause_of_exit_needs_no_event_loop() -> None:
    assert cause_of_exit(GeneratorExit(), ()) is Cause.RAISED


def test_finish_on_takes_a_type_or_several() -> None:
    assert check_finish_on(Stop) == (Stop,)
    assert check_finish_on([Stop, OSError]) == (Stop, OSError)
    assert check_finish_on(()) == ()


@pytest.mark.parametrize(
    "wrong", [Stop(), [Stop()], "Stop", int, (Stop, None), 3, None, object()]
)
def test_finish_on_refuses_what_is_not_an_exception_type(wrong: Any) -> None:
    with pytest.raises(TypeError, match="finish_on takes exception types, not"):
        check_finish_on(wrong)


def test_finish_on_refuses_groups() -> None:
    with pytest.raises(TypeError, match="finish_on cannot take ExceptionGroup"):
        check_finish_on(cast("type[BaseException]", ExceptionGroup))


def test_an_ending_is_immutable() -> None:
    ending = Ending(
        kind=CloseKind.FIN,
        cause=Cause.RETURNED,
        outcome=outcome.Value(None),
        peer=PeerClose.FIN,
        remote_address=("127.0.0.1", 1),
        discarded=0,
        unacknowledged=0,
        fin_sent_before_reset=False,
        duration=1.5,
        sent=6,
        received=3,
        tls=None,
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        ending.kind = CloseKind.RST  # type: ignore[misc]
