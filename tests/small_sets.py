"""Small real sets laid out as the published ones, a mirror on 127.0.0.1 that serves them, and their checksums."""

import contextlib
import gzip
import hashlib
import http.server
import io
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from maelab.data import formats, sources

DATA = Path(__file__).parent / "data"
MNIST = {
    f"{part}-{kind}": gzip.decompress((DATA / f"mnist-{part}-{kind}.gz").read_bytes())
    for part in ("train", "t10k")
    for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
}
MNIST_GZ = {f"{name}.gz": gzip.compress(data, mtime=0) for name, data in MNIST.items()}
# 300 real images as five batches of 60, and 100 for testing
_ROWS = gzip.decompress((DATA / "cifar10-train.bin.gz").read_bytes())
CIFAR = {f"data_batch_{i + 1}.bin": _ROWS[i * 60 * 3073 : (i + 1) * 60 * 3073] for i in range(5)}
CIFAR["test_batch.bin"] = gzip.decompress((DATA / "cifar10-test.bin.gz").read_bytes())


def md5s(files: dict[str, bytes]) -> dict[str, str]:
    return {name: hashlib.md5(data).hexdigest() for name, data in files.items()}


def sha256s(files: dict[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}


def publish_small_sets(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache, no sources, and the small sets instead of the full ones as what is published."""
    monkeypatch.setenv("MAELAB_DATA", str(cache))
    stored = {"mnist": MNIST, "fashion-mnist": MNIST_GZ, "cifar10": CIFAR}
    monkeypatch.setattr(sources, "FILES", {name: md5s(files) for name, files in stored.items()})
    published = stored | {"mnist": MNIST | MNIST_GZ}
    monkeypatch.setattr(sources, "SHA256", {name: sha256s(files) for name, files in published.items()})
    monkeypatch.setattr(sources, "SOURCES", {name: () for name in sources.NAMES})


def publish(name: str, files: dict[str, bytes]) -> dict[str, bytes]:
    """Have the sums of `files` known as those of the set `name`, until the test ends."""
    sources.SHA256[name] |= sha256s(files)
    return files


def tar_gz(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def python_batch(title: bytes, data: bytes) -> bytes:
    """A binary batch as a CIFAR-10 "python" batch, byte by byte as Python 2 pickled the published ones."""

    def string(text: bytes) -> bytes:
        return b"U" + bytes([len(text)]) + text

    images, labels = formats.read_cifar_binary(data)
    numbers = [b"K%c" % label for label in labels.tolist()]
    chunks = [b"(%se" % b"".join(numbers[i : i + 1000]) for i in range(0, len(numbers), 1000)]
    count = b"K%c" % len(labels) if len(labels) < 256 else b"M" + len(labels).to_bytes(2, "little")
    names = [string(b"image_%d.png" % i) + b"r" + (20 + i).to_bytes(4, "little") for i in range(len(labels))]
    return b"".join(
        (
            b"\x80\x02}q\x01(" + string(b"batch_label") + b"q\x02" + string(title) + b"q\x03",
            string(b"labels") + b"q\x04]q\x05" + b"".join(chunks),
            string(b"data") + b"q\x06cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\0\x85",
            string(b"b")
            + b"\x87Rq\t(K\1"
            + count
            + b"M\0\x0c\x86cnumpy\ndtype\nq\n"
            + string(b"u1")
            + b"K\0K\1\x87Rq\x0b",
            b"(K\3" + string(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb\x89",
            b"T" + images.size.to_bytes(4, "little") + images.tobytes() + b"q\x0ctb",
            string(b"filenames") + b"q\x0d]q\x0e(" + b"".join(names) + b"eu.",
        )
    )


def python_batches() -> dict[str, bytes]:
    """The small set in the CIFAR-10 "python" layout."""
    titles = {f"data_batch_{i}.bin": b"training batch %d of 5" % i for i in range(1, 6)}
    titles["test_batch.bin"] = b"testing batch 1 of 1"
    return {name.removesuffix(".bin"): python_batch(titles[name], data) for name, data in CIFAR.items()}


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` (path -> bytes); `broken` paths stop half-way, `slow` delays every answer. Counts requests.

    `moved` paths are answered with a redirect, `endless` ones go on and on.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.moved: dict[str, str] = {}
        self.broken: set[str] = set()
        self.endless: set[str] = set()
        self.slow = False
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def serve_mnist(self, folder: str = "/mnist/") -> str:
        """Have the small MNIST, gzipped, in a folder; its URL."""
        self.files |= {f"{folder}{name}": data for name, data in MNIST_GZ.items()}
        return self.url + folder


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        if self.path in self.server.moved:
            self.send_response(302)
            self.send_header("Location", self.server.moved[self.path])
            return self.end_headers()
        if self.path in self.server.endless:
            self.send_response(200)
            self.send_header("Content-Length", "of no number")
            self.end_headers()
            with contextlib.suppress(ConnectionError):
                for _ in range(1024):  # 64 MiB, should nobody hang up
                    self.wfile.write(bytes(1 << 16))
            return
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


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()
