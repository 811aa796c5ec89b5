"""Command lines, paths and names, as inputs to mutate."""

import contextlib
import csv
import io
import sys
from pathlib import Path

from engine import Target
from PIL import Image
from targets_data import publish_all

from maelab import cli, commandline, names
from maelab.config import AS_IT_IS
from maelab.data import images
from maelab.errors import RunError, UsageError

# ----------------------------------------------------------------------------------------------------- words and names

LINES = (
    "pretrain smoke --data folder:nowhere --epochs 3 --seed 1 --mask-ratio 0.5 --img-size 28 28 --out x",
    "finetune smoke --init none --data folder:nowhere --label-fraction 0.5 --global-pool token --class-token",
    "probe nowhere --epochs 2 --pool avg --neighbours 5",
    "evaluate nowhere --split val --mask-ratio 0.5 --json",
    "predict nowhere a.png b.png --top 3 --csv --batch-size 7",
    "reconstruct nowhere --mask-kind block --sweep --count 3",
    "attention nowhere --seed 3 --out a.png",
    "features nowhere a.png --pool token --out f.npz",
    "info nowhere --json",
    "runs . --filter task=finetune --sort test.accuracy --descending --columns path,task",
    "report . --out page.html",
    "sweep smoke --grid patch_size=4,7 --grid mask_ratio=0.5 --data folder:nowhere",
    "fit nowhere --minutes 3 --seed 1",
    "export nowhere --format onnx --int8",
    "data mnist --data-dir nowhere",
    "--help",
    "--version",
    "pretrain folder --data folder:nowhere --patch-size 4",
    "finetune --help",
    "pretrain mnist --help",
)
WORD_TOKENS = (
    b" --",
    b"=",
    b"-1",
    b"1e9999",
    b"9" * 400,
    b"None",
    b" --no-",
    b"\xed\xb3\xa9",
    b"nan",
    b" --help",
    b" --threads ",
    b"'",
)


def feed_line(content: bytes, place: Path) -> None:
    """As the shell would give it. What would start a server, a download or a measurement is left out."""
    words = content.decode(errors="replace").replace("\0", "").split()[:30]
    if words[:1] in (["demo"], ["bench"], ["data"]) or any(
        ".." in word or "/" in word or "~" in word for word in words
    ):
        return
    publish_all()
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main(words)
    said = err.getvalue()
    assert status in (0, 1, 2) and "Traceback" not in said and "should not happen" not in said, (words, said[-1000:])
    if status:
        assert said.endswith("\n") and said.splitlines()[-1].startswith("maelab: "), (words, said[-1000:])
        raise UsageError("refused")


def seeds_of_paths(place: Path) -> list[bytes]:
    for name in ("a.png", "b [1].png", "ü.png"):
        Image.new("L", (4, 4)).save(place / name)
    return [
        b"a.png\nb [1].png\n",
        b"*.png\n",
        "ü.png\r\nnowhere.png".encode(),
        b"\n\n\xe9.png\n.\n",
        b"a.png\0\n[ab]*\n",
    ]


def feed_paths(content: bytes, place: Path) -> None:
    """The lines of stdin, without those that would look through all of the machine."""
    if any(line[:1] in b"/~" or b".." in line for line in content.splitlines() if line):
        return
    before, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(content))
    try:
        read = 0
        for batch in images.read_batches(commandline._with_stdin(["-"]), (4, 4), 1, AS_IT_IS, 16):
            for path, image in batch:
                assert isinstance(image, str) or image.shape == (1, 4, 4)
                assert names.visible(path).isprintable() or True
                read += not isinstance(image, str)
        if not read:
            raise RunError("nothing was read")
    finally:
        sys.stdin = before


def feed_name(content: bytes, place: Path) -> None:
    """Whatever bytes a file is named by, or a class in someone's JSON."""
    for text in (
        content.decode(errors="surrogateescape"),
        content.decode("utf-16-le", errors="surrogatepass" if len(content) % 2 == 0 else "replace"),
    ):
        shown = names.visible(text)
        shown.encode()
        assert len(shown.splitlines()) <= 1 and not names._HIDDEN.search(shown)
        assert names.visible(shown) == shown
        assert len(names.short(text, 20)) <= 20
        names.encodable(text).encode()
        names.shell_word(text).encode()
        cell, file = names.csv_cell(text), io.StringIO()
        csv.writer(file, lineterminator="\n").writerow([cell, "x"])
        ((again, last),) = csv.reader(io.StringIO(file.getvalue(), newline=""))
        assert (again, last) == (cell, "x") and cell[:1] not in ("=", "+", "-", "@")
        cell.encode(errors="surrogateescape")


NAME_SEEDS = (
    b"plain",
    "ü ぬ 🙂".encode(),
    b"=cmd|' /C calc'!A0",
    b"\x1b[31mred\x07",
    b"a\nb\r\n\tc",
    b"\xe9\xff",
    b"$(touch x)`y`",
    "\u202egnp.exe\u2066".encode(),
    b"'\"\\",
    "\uff1d1".encode(),
    b"-rf",
    b"@SUM(1)",
    b"x" * 300,
)

TARGETS: dict[str, Target] = {
    "command line": Target(lambda place: [line.encode() for line in LINES], feed_line, WORD_TOKENS),
    "paths on stdin": Target(
        seeds_of_paths, feed_paths, (b"\n", b"*", b"[", b"]", b"?", b"**", b"\0", b"\xff", b"a.png")
    ),
    "name": Target(
        lambda place: list(NAME_SEEDS),
        feed_name,
        ("\u202e".encode(), b"\x1b[", b"=", b"\r\n", b"\0", b"\xd8\x00", b"'", b"\\"),
    ),
}
