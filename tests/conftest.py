"""Small real data for every test, read from `tests/data` without a download."""

import gzip
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from PIL import Image
from processes import Maelab, draw_nothing

from maelab.data.datasets import cifar_set, idx_set
from maelab.data.sets import Dataset, ImageSet
from maelab.data.sources import cache_dir, obtain_package
from maelab.errors import RunError
from maelab.page import RUNTIME, RUNTIME_SHA256

if TYPE_CHECKING:
    from playwright.sync_api import Browser

DATA = Path(__file__).parent / "data"
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # by a shell's `make test &`; commands inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)  # one test process per core: see addopts in pyproject.toml
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A run inside the test process sets the number of threads; the next test has one again."""
    yield
    torch.set_num_threads(1)


@contextmanager
def drawing_nothing() -> Iterator[None]:
    """Runs inside this process draw no pictures."""
    from matplotlib.figure import Figure

    from maelab.tasks import finetune, pretrain

    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((Figure, "savefig"), (pretrain, "PICTURED"), (finetune, "PICTURED")):
            patch.setattr(module, name, getattr(module, name))  # to have it back
        draw_nothing()
        yield


@pytest.fixture(scope="module")
def nothing_drawn() -> Iterator[None]:
    """For tests that train in this process and do not look at the pictures."""
    with drawing_nothing():
        yield


def _idx(part: str) -> ImageSet:
    return idx_set(*((DATA / f"mnist-{part}-{kind}-ubyte.gz").read_bytes() for kind in ("images-idx3", "labels-idx1")))


def read_mnist_small() -> Dataset:
    """600 training and 200 test images of MNIST, balanced: uint8 (N, 1, 28, 28)."""
    return Dataset("mnist", _idx("train"), _idx("t10k"), tuple("0123456789"), {})


def read_cifar_small() -> Dataset:
    """300 training and 100 test images of CIFAR-10, balanced: uint8 (N, 3, 32, 32)."""
    train, test = (cifar_set([gzip.decompress((DATA / f"cifar10-{p}.bin.gz").read_bytes())]) for p in ("train", "test"))
    return Dataset("cifar10", train, test, CIFAR10_CLASSES, {})


@pytest.fixture(scope="session")
def mnist_small() -> Dataset:
    """600 training and 200 test images of MNIST, balanced: uint8 (N, 1, 28, 28). Do not write into the tensors."""
    return read_mnist_small()


@pytest.fixture(scope="session")
def cifar_small() -> Dataset:
    """300 training and 100 test images of CIFAR-10, balanced: uint8 (N, 3, 32, 32). Do not write into the tensors."""
    return read_cifar_small()


def write_folder(folder: Path, data: ImageSet, class_names: tuple[str, ...], n: int) -> Path:
    """Write the first `n` images of every class of `data` as PNG files into one sub-folder per class."""
    assert data.labels is not None
    for label, name in enumerate(class_names):
        (folder / name).mkdir(parents=True)
        for i in (data.labels == label).nonzero()[:n, 0].tolist():
            pixels = data.images[i].permute(1, 2, 0).squeeze(-1).numpy()  # (H, W) or (H, W, 3)
            Image.fromarray(pixels).save(folder / name / f"{i:04d}.png", compress_level=0)  # same bytes everywhere
    return folder


@pytest.fixture(scope="session")
def digits_folder(mnist_small: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 300 real digits, grey PNG of 28 x 28, in class sub-folders: for `--data folder:PATH`. Read only."""
    return write_folder(tmp_path_factory.mktemp("digits") / "digits", mnist_small.train, mnist_small.class_names, 30)


@pytest.fixture(scope="session")
def cifar_folder(cifar_small: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 200 real CIFAR-10 images, RGB PNG of 32 x 32, in class sub-folders. Read only."""
    return write_folder(tmp_path_factory.mktemp("cifar") / "cifar", cifar_small.train, cifar_small.class_names, 20)


@pytest.fixture(scope="session")
def maelab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Maelab]:
    """The command `maelab` as real processes that start at once and see neither the real home nor the real cache."""
    server = Maelab(tmp_path_factory.mktemp("home") / "home")
    yield server
    server.close()


@pytest.fixture(scope="session")
def runtime(maelab: Maelab) -> None:
    """onnxruntime-web in the real cache and in that of `maelab`, for pages."""
    try:
        obtain_package(RUNTIME, RUNTIME_SHA256)
    except RunError as error:
        pytest.skip(str(error))
    shutil.copytree(cache_dir() / "npm", maelab.home / "cache" / "npm")


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    """Chromium."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    missing = ["playwright"] * (find_spec("playwright") is None) + ["Chromium"] * (chromium is None)
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()
