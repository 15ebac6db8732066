"""Several processes at one piece of work, over `accelerate`: sums, lists, and errors that stop all of them.

Started by `accelerate launch` or `torchrun`; for one process alone everything here is trivial. What is called
collective must be called by every process.
"""

import atexit
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from threading import current_thread, main_thread
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, broadcast_object_list, gather_object, parse_flag_from_env, reduce
from torch import Tensor

from .runtime.errors import BackboneError, ProcessLostError, SOAPError, first_sentence

Result = TypeVar("Result")


def join_processes(device: str | torch.device | None = None, *, timeout: timedelta | None = None) -> PartialState:
    """Joins the processes of a launcher, if there is one; `"cpu"` keeps off an accelerator. Twice does no harm.

    `timeout` is how long they wait for each other; default: torch's.
    """
    launched = "LOCAL_RANK" in os.environ
    asked = str(device) == "cpu" or parse_flag_from_env("ACCELERATE_USE_CPU")
    on_cpu = asked or not torch.accelerator.is_available()
    if launched and not PartialState._shared_state:  # the first time
        atexit.register(_leave_processes)
    waiting: dict[str, Any] = {"timeout": timeout} if launched and timeout is not None else {}
    return PartialState(cpu=True, **waiting) if launched and on_cpu else PartialState(**waiting)


def _leave_processes() -> None:
    """Ends the threads of the process group, which may abort a process that exits while they run."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def find_device(device: str | torch.device | None = None) -> torch.device:
    """A device by name, which must be usable here; by default this process's accelerator if there is one."""
    try:
        target = torch.device(device) if device is not None else PartialState().device
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:
        raise BackboneError(f"Device {device!r} cannot be used here ({first_sentence(error)}); try cpu.") from error
    return target


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The sum of a tensor that every process has in one shape, on its device. Collective."""
    return _over_processes(lambda mine: reduce(mine, "sum"), tensor)


def from_main(tensor: Tensor) -> Tensor:
    """The main process's tensor. Collective."""
    return _over_processes(broadcast, tensor)


def _over_processes(collect: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    state = PartialState()
    if state.num_processes == 1:
        return tensor
    with _others_alive():
        return collect(tensor.to(state.device).contiguous()).to(tensor.device)


def gather_lists(items: list) -> list:
    """The lists of all processes, one after the other. Collective."""
    if PartialState().num_processes == 1:
        return items
    with _others_alive():
        return gather_object(items)


def sum_unless_one_failed(error: Exception | None, numbers: Sequence[int]) -> list[int]:
    """Sums of some numbers over the processes; if one failed (`error`), all raise that, with its rank. Collective."""
    if PartialState().num_processes == 1:
        if error is not None:
            raise error
        return list(numbers)
    failed, *sums = sum_over_processes(torch.tensor([error is not None, *numbers])).tolist()
    if not failed:
        return sums
    for rank, found in enumerate(gather_lists([None if error is None else _as_ours(error)])):
        if found is not None:
            raise type(found)(f"Process {rank} of {PartialState().num_processes}: {found}") from error
    raise AssertionError("a process failed without an error")


def from_main_alone(function: Callable[..., Result], *arguments: Any, **options: Any) -> Result:
    """What a function gives in the main process, for all of them; what it raises there, all raise. Collective."""
    state = PartialState()
    if state.num_processes == 1:
        return function(*arguments, **options)
    found: list[Any] = [None]
    if state.is_main_process:
        try:
            found = [function(*arguments, **options)]
        except Exception as error:
            found = [_as_ours(error)]
    with _others_alive():
        found = broadcast_object_list(found)
    if isinstance(found[0], SOAPError):
        raise found[0]
    return found[0]


def on_main(function: Callable[..., None], *arguments: object) -> None:
    """Calls a function in the main process alone."""
    if PartialState().is_main_process:
        function(*arguments)


def _as_ours(error: Exception) -> SOAPError:
    return error if isinstance(error, SOAPError) else SOAPError(f"{type(error).__name__}: {first_sentence(error)}.")


@contextmanager
def _others_alive() -> Iterator[None]:
    """Within the block, a broken connection is told as what it means."""
    try:
        yield
    except RuntimeError as error:
        raise ProcessLostError(
            "Another process of this run has ended, or its connection; see what it said, and start all again."
        ) from error


@contextmanager
def note_signals(names: list[str], wanted: bool) -> Iterator[None]:
    """Within the block SIGINT and SIGTERM only note their names, if `wanted` and in the main thread."""
    asked = (signal.SIGINT, signal.SIGTERM) if wanted and current_thread() is main_thread() else ()
    before = {one: signal.signal(one, lambda number, _: names.append(signal.Signals(number).name)) for one in asked}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ended_by(names: Sequence[str], error: SOAPError) -> SOAPError:
    """The error, with the `exit_status` of a process that the last of these signals ended; none: another process's."""
    vars(error)["exit_status"] = 128 + signal.Signals[names[-1] if names else "SIGINT"]
    return error
