"""Starts the processes of a run (its ranks) and answers for them: one result, or the error that came first.

The process that is asked takes no part in the work. It waits, passes on Ctrl-C, and leaves no process behind; so a
notebook may ask for several processes too, and what fails in one of them fails nothing else.
"""

import functools
import math
import multiprocessing
import os
import pickle
import re
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import connection, resource_tracker
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from maelab.config import RunOptions
from maelab.errors import RunError, UsageError
from maelab.training.parallel import MEETING, leave
from maelab.training.runlog import part_of, whole

_LOST = re.compile("Connection (closed|reset) by|Broken pipe|(?i:socket timeout|remote process exited|ncclRemoteError)")
GRACE = 5.0  # seconds that the others have to put away their work, once one process has failed
P = ParamSpec("P")
R = TypeVar("R")


def in_processes(task: Callable[P, R]) -> Callable[P, R]:
    """Have a task run in as many processes as its `options` say: (..., options=RunOptions) -> anything picklable.

    A script that asks for several processes needs `if __name__ == "__main__":`, as always where Python starts some.
    """

    @functools.wraps(task)
    def run(*arguments: P.args, **named: P.kwargs) -> R:
        options: Any = named.get("options") or RunOptions()
        if options.devices * options.num_nodes == 1 or "RANK" in os.environ:  # one of several, of ours or of torchrun's
            try:
                return task(*arguments, **named)
            except RuntimeError as error:
                if not _LOST.search(str(error)):
                    raise
                raise RunError(
                    "lost another process of the run; its own words, or those of its machine, tell why."
                    " The same command goes on from the last checkpoint"
                ) from error
        return launch(run, options, *arguments, **named)

    return run


def launch(function: Callable[..., R], options: RunOptions, /, *arguments: Any, **named: Any) -> R:
    """Call a function in `options.devices` new processes, which find each other with `start_engine`.

    Args:
        function: of a module, so that each process can import it.
        options: how many processes, here and on other machines.
        arguments, named: of the function.

    Returns:
        What the function returned in the first of these processes.

    Raises:
        UsageError: if there are to be other machines, and it is not said how to find them.
        RunError: if a process was killed.
        Exception: whatever was raised first in any of them.
        KeyboardInterrupt: on Ctrl-C or SIGTERM, unless the function itself answers to it.
    """
    with tempfile.TemporaryDirectory(prefix="maelab-ranks-") as folder:
        environments = [_environment(options, rank, Path(folder)) for rank in range(options.devices)]
        ranks: list[_Rank] = []
        try:
            with _stop_requests(ranks) as requests:
                with _no_interrupt():
                    for environment in environments:
                        ranks.append(_Rank(environment, function, arguments, named))
                if requests:  # one of them may have come too late to hear it
                    for rank in ranks:
                        rank.process.terminate()
                return _outcome(ranks, requests)
        finally:
            for rank in ranks:
                rank.process.kill()
                rank.process.join()


class _Rank:
    """A process, and the end of a pipe on which it answers: when, and a result or an exception."""

    def __init__(
        self, environment: dict[str, str], function: Callable[..., Any], arguments: Any, named: dict[str, Any]
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self.number = environment["RANK"]
        self.answer, theirs = context.Pipe(duplex=False)
        work = (theirs, environment, whole(), function, arguments, named)
        self.process = context.Process(target=_work, args=work)
        self.process.start()
        theirs.close()  # so that the pipe ends where the process does

    def read(self, asked: bool) -> tuple[float, Any]:
        """Its answer; of a process that died without one, an error that tells, and that goes before all others."""
        with suppress(EOFError, OSError):
            return self.answer.recv()
        self.process.join()
        code = self.process.exitcode or 0
        if code == -signal.SIGTERM and asked:  # before it could listen
            return math.inf, KeyboardInterrupt()
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        memory = code == -9  # SIGKILL, whose name Windows lacks
        hint = "; if memory ran out, try a smaller --batch-size or --accumulate 2" if memory else ""
        return -math.inf, RunError(f"process {self.number} of the run {how}{hint}")


def _outcome(ranks: list[_Rank], requests: list[int]) -> Any:
    """What the first process returned. As soon as one fails, the others are asked to stop; then its error is raised.

    Where a person asked first, each takes its time: it may be sending what it has to a tracker."""
    waiting = {rank.answer: rank for rank in ranks}
    answers: dict[str, tuple[float, Any]] = {}
    end: float | None = None
    while waiting:
        ready = connection.wait(list(waiting), None if end is None else max(0.0, end - time.monotonic()))
        if not ready:  # what does not put its work away by itself is ended by `launch`
            break
        for answer in ready:
            rank = waiting.pop(answer)  # type: ignore[arg-type]
            answers[rank.number] = rank.read(bool(requests) or end is not None)
        if end is None and not requests and any(_is_error(result) for _, result in answers.values()):
            end = time.monotonic() + GRACE
            for rank in waiting.values():
                rank.process.terminate()
    failures = [found for found in answers.values() if _is_error(found[1])]
    if failures:  # of the others, most lost their connection to the first
        raise min(failures, key=lambda found: found[0])[1]
    for rank in ranks:
        rank.process.join(GRACE)
    return answers[ranks[0].number][1]


def _work(
    answer: connection.Connection,
    environment: dict[str, str],
    of: str,
    function: Callable[..., Any],
    arguments: Any,
    named: dict[str, Any],
) -> None:
    """All that a new process does."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # a terminal sends it to all processes; the one that waits passes it on
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.environ |= environment
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        with part_of(of):
            result: Any = function(*arguments, **named)
        leave()
    except BaseException as error:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # another one may have failed too, and been faster to say so
        result = _portable(error)
    with suppress(OSError):  # nobody waits any more
        answer.send((time.monotonic(), result if environment["LOCAL_RANK"] == "0" or _is_error(result) else None))


def _is_error(result: Any) -> bool:
    return isinstance(result, BaseException)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _portable(error: BaseException) -> BaseException:
    """The error as another process can raise it; where it came from is noted in it."""
    where = "".join(traceback.format_exception(error))
    try:
        error = pickle.loads(pickle.dumps(error))
    except Exception:  # whatever an exception of a library does when it is taken apart
        error = RunError(f"{type(error).__name__}: {error}")
    error.add_note(where)
    return error


def _environment(options: RunOptions, local_rank: int, folder: Path) -> dict[str, str]:
    """What tells a process its number, how many there are, and where they meet."""
    node = 0
    if options.num_nodes == 1:
        meeting = {MEETING: (folder / "meeting").as_uri()}
        loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
        if loopback:  # whatever the machine's name resolves to, and nothing listens to other machines
            meeting |= {"GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", loopback[0])}
    else:
        try:
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            node = int(os.environ.get("NODE_RANK") or os.environ["SLURM_NODEID"])
        except (KeyError, ValueError):
            raise UsageError(
                f"--num-nodes {options.num_nodes}: start the same command on each machine, with MASTER_ADDR,"
                " MASTER_PORT and, but under Slurm, NODE_RANK (from 0) in the environment"
            ) from None
        meeting = {MEETING: f"tcp://{address}:{port}"}
        if interface := _interface_to(address, port):
            meeting |= {"GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", interface)}
    rank, size = node * options.devices + local_rank, options.devices * options.num_nodes
    local = {"LOCAL_RANK": str(local_rank), "LOCAL_WORLD_SIZE": str(options.devices)}
    return meeting | local | {"RANK": str(rank), "WORLD_SIZE": str(size)}


def _interface_to(address: str, port: int) -> str | None:
    """The network interface on which another machine is reached. Without it, gloo listens where the machine's own name
    leads, which often is the loopback."""
    if sys.platform != "linux":
        return None
    import fcntl

    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, port))  # sends nothing
        ours = socket.inet_aton(probe.getsockname()[0])
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # it has no address
                if fcntl.ioctl(probe, 0x8915, struct.pack("256s", name.encode()[:15]))[20:24] == ours:  # SIOCGIFADDR
                    return name
    return None


@contextmanager
def _no_interrupt() -> Iterator[None]:
    """Processes started inside do not see Ctrl-C, from their first moment on."""
    resource_tracker.ensure_running()  # it undoes this where it has to start
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _stop_requests(ranks: list[_Rank]) -> Iterator[list[int]]:
    """The signals that asked to stop: the first is passed on, so that the run can save; a second ends everything."""
    requests: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield requests
        return

    def on_signal(number: int, frame: object) -> None:
        requests.append(number)
        for rank in ranks:
            rank.process.terminate() if len(requests) == 1 else rank.process.kill()
        if len(requests) > 1:
            raise KeyboardInterrupt

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requests
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
