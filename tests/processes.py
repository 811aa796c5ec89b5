"""Starts `maelab` as real processes within milliseconds: a server imports everything once, and forks for each.

`Maelab` is for the tests; the rest of this file is the server, which is run as a script.
"""

import atexit
import contextlib
import gc
import io
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

# For `first`: the processes of a run are forks of the command too, so that none of them imports torch again. What they
# are given is pickled all the same.
FORKED_RANKS = """
import multiprocessing, pickle
from maelab.training import ranks

started, fork = ranks.launch, multiprocessing.get_context("fork")

def launch(*arguments, **named):
    arguments, named = pickle.loads(pickle.dumps((arguments, named)))
    return started(*arguments, **named)

ranks.launch, multiprocessing.get_context = launch, lambda *_: fork
"""


@dataclass(frozen=True)
class Ended:
    """How a process ended: exit status (negative: killed by this signal), stdout, stderr."""

    status: int
    out: str
    err: str

    def error(self) -> str:
        """The one line that a failed command says, without its prefix."""
        lines = [line for line in self.err.splitlines() if line.startswith("maelab: ")]
        assert self.status in (1, 2, 130) and self.out == "" and len(lines) == 1, self
        assert "Traceback" not in self.err and "should not happen" not in self.err, self.err
        assert self.err.endswith(lines[0] + "\n"), self.err
        return lines[0].removeprefix("maelab: ")

    def json(self) -> dict[str, Any]:
        """The one JSON object that stdout holds."""
        assert self.status == 0 and self.out.count("\n") == 1, self
        return json.loads(self.out)


class Maelab:
    """The command `maelab`, in a folder of its own and with the cache and home given."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self._files, self._started = home / "output", 0
        self._running: set[int] = set()
        self._files.mkdir(parents=True)
        self._server = subprocess.Popen(
            [sys.executable, __file__], env=environment(home), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def _ask(self, **request: Any) -> int:
        assert self._server.stdin and self._server.stdout
        print(json.dumps(request), file=self._server.stdin, flush=True)
        return int(self._server.stdout.readline())

    def start(self, *arguments: object, cwd: Path, **request: Any) -> "Process":
        """Start a process.

        Args:
            arguments: of the command.
            cwd: its working directory.
            request: stdin, stdout: a file instead of the usual one; largest_file: bytes, as if the disk were
                full beyond; temp: folder for temporary files; drawn: whether pictures show what they should;
                first: Python code to run before the command; die: (end of a path, n, "before" | "after"), kill it
                when it puts the n-th such file in place.
        """
        self._started += 1
        out, err = (self._files / f"{self._started}.{end}" for end in ("out", "err"))
        request = {"stdout": str(out)} | request
        pid = self._ask(arguments=[str(a) for a in arguments], cwd=str(cwd), stderr=str(err), **request)
        self._running.add(pid)
        return Process(self, pid, out, err)

    def run(self, *arguments: object, cwd: Path, **request: Any) -> Ended:
        """Start a process and wait for its end."""
        return self.start(*arguments, cwd=cwd, **request).wait()

    def close(self) -> None:
        """End the server, and whatever a failed test left running."""
        for pid in self._running:
            os.kill(pid, signal.SIGKILL)
        assert self._server.stdin and self._server.stdout
        self._server.stdin.close()
        self._server.stdout.close()
        self._server.kill()
        self._server.wait()


@dataclass(frozen=True)
class Process:
    """A process under way."""

    maelab: Maelab
    pid: int
    out: Path
    err: Path

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> Ended:
        status = self.maelab._ask(wait=self.pid)
        self.maelab._running.remove(self.pid)
        return Ended(
            status, self.out.read_text(errors="surrogateescape") if self.out.exists() else "", self.err.read_text()
        )

    def wait_for(self, file: Path, lines: int = 1, text: str = "") -> None:
        """Until a file has so many lines, and this text."""
        end = time.monotonic() + 300
        while not (file.exists() and (held := file.read_bytes()).count(b"\n") >= lines and text.encode() in held):
            assert time.monotonic() < end, f"{file} did not grow: {self.err.read_text()[-300:]}"
            time.sleep(0.001)


def environment(home: Path) -> dict[str, str]:
    """Nothing of the real home and cache, no network, one thread."""
    own = {"HOME": str(home), "MAELAB_DATA": str(home / "cache"), "MPLCONFIGDIR": str(home / "matplotlib")}
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MAELAB", "XDG", "LOCAL_", "COLUMNS"))}
    own |= {f"{scheme}_proxy": "http://127.0.0.1:9" for scheme in ("http", "https")}
    return kept | own | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}


def draw_nothing() -> None:
    """Drawing is more than half the time of a small run, and most of a report's: from here on figures are put together
    of fewer images, and what is written of them shows nothing."""
    from matplotlib.figure import Figure
    from PIL import Image

    from maelab.tasks import finetune, pretrain

    nothing = io.BytesIO()
    Image.effect_noise((160, 160), 64).save(nothing, "PNG")

    def savefig(self: Figure, fname: Any, **_: Any) -> None:
        Path(fname).write_bytes(nothing.getvalue())

    Figure.savefig = savefig
    finetune.PICTURED = pretrain.PICTURED = 3


def _die_at(name: str, n: int, when: str) -> None:
    """Kill this very process, as hard as can be, at the n-th replacement of a file whose path ends in `name`."""
    replace, seen = os.replace, 0

    def deadly(source: Any, target: Any, **more: Any) -> None:
        nonlocal seen
        seen += str(target).endswith(name)
        if when == "after" or seen != n:
            replace(source, target, **more)
        if seen == n:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = deadly


def _exit(main: Callable[[], int], first: str) -> NoReturn:
    """Run the code and the command, and end as the interpreter ends a process, but without a second's work of taking
    every module down."""
    status = 70
    try:
        exec(first, {})
        status = main()
        atexit._run_exitfuncs()
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(status)


def _serve() -> None:
    # What a command imports or builds only when it runs is done here too, so that each fork has it.
    import numpy.ctypeslib
    import numpy.random  # noqa: F401
    import torch._dynamo
    import torch.distributed
    import torch.utils.serialization.config  # noqa: F401
    from matplotlib.figure import Figure
    from tensorboard.compat.proto import event_pb2, summary_pb2  # noqa: F401
    from tensorboard.plugins.hparams import summary_v2  # noqa: F401
    from tensorboard.summary.writer import record_writer  # noqa: F401

    from maelab import figures, fitting  # noqa: F401
    from maelab.cli import main
    from maelab.tasks import attention, evaluate, features, predict, probe, reconstruct  # noqa: F401

    draw, figures.DPI = Figure.savefig, 30
    with contextlib.redirect_stderr(io.StringIO()), tempfile.TemporaryDirectory() as folder:
        assert main(["pretrain", "smoke", "--epochs", "0"]) == 2
        figures.curves(Path(folder) / "curves.png", [{"epoch": 1, "split": "train", "loss": 1.0}])
    draw_nothing()
    gc.freeze()  # nor need a fork copy what the collector would mark
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        pid = os.fork()
        if pid:
            print(pid, flush=True)
            continue
        os.chdir(request["cwd"])
        if "stdin" in request:
            os.dup2(os.open(request["stdin"], os.O_RDONLY), 0)
            sys.stdin = open(0, closefd=False)  # noqa: SIM115 - the server's own has read ahead
        for file, number in ((request["stdout"], 1), (request["stderr"], 2)):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        if "largest_file" in request:
            resource.setrlimit(resource.RLIMIT_FSIZE, (request["largest_file"],) * 2)
        if "temp" in request:
            tempfile.tempdir = request["temp"]
        if request.get("drawn"):
            Figure.savefig = draw
        if "die" in request:
            _die_at(*request["die"])
        sys.argv = ["maelab", *request["arguments"]]
        _exit(main, request.get("first", ""))


if __name__ == "__main__":
    _serve()
