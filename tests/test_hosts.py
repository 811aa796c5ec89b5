"""Trainings on several machines: network namespaces, each with its own address, loopback and processes of torchrun."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import environment
from test_ranks import children_of

from maelab.runs import read_metrics

ADDRESSES = ("10.203.0.1", "10.203.0.2")
PORT = 29_517
LINE = (
    *("pretrain", "smoke", "--limit", 112, "--batch-size", 32, "--knn-every", 0),
    *("--device", "cpu", "--threads", 1, "--precision", "fp32"),
)

pytestmark = [pytest.mark.dist, pytest.mark.slow]


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """Two namespaces that reach each other."""
    ip = shutil.which("ip") or "/usr/sbin/ip"
    if not Path(ip).exists() or os.geteuid() != 0:
        pytest.skip("network namespaces need root and iproute2")
    names = f"maelab-a-{os.getpid()}", f"maelab-b-{os.getpid()}"
    made = subprocess.run([ip, "netns", "add", names[0]], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no network namespaces here: {made.stderr.strip()}")
    try:
        subprocess.run([ip, "netns", "add", names[1]], check=True)
        link = [ip, "-n", names[0], "link", "add", "va", "type", "veth", "peer", "name", "vb", "netns", names[1]]
        subprocess.run(link, check=True)
        for name, device, address in zip(names, ("va", "vb"), ADDRESSES, strict=True):
            subprocess.run([ip, "-n", name, "addr", "add", f"{address}/24", "dev", device], check=True)
            for up in ("lo", device):
                subprocess.run([ip, "-n", name, "link", "set", up, "up"], check=True)
        yield names
    finally:
        for name in names:
            subprocess.run([ip, "netns", "del", name], capture_output=True)


def start(host: str | None, folder: Path, *words: object, **more: str) -> subprocess.Popen:
    """Python on a host; what it says goes to a file named after its number."""
    name = more.get("NODE_RANK", more.get("SLURM_NODEID", "0"))
    command = [sys.executable, "-m", *map(str, words)]
    with open(folder / f"said-{name}", "w") as said:
        return subprocess.Popen(
            command if host is None else ["ip", "netns", "exec", host, *command],
            stdout=said, stderr=said, env=environment(folder) | more, cwd=folder,
        )  # fmt: skip


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run)]


def training(data: Path, *more: object) -> list[object]:
    return ["maelab", *LINE, "--data", f"folder:{data}", *more]


def on_both(hosts: tuple[str, str], folders: tuple[Path, Path], port: int, words: list[object], **second: str) -> list:
    """The same command on both hosts. `second`: what tells the second its number."""
    meeting = {"MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": str(port)}
    numbers = {"NODE_RANK": "0"}, second or {"NODE_RANK": "1"}
    return [
        start(host, folder, *words, "--num-nodes", 2, "--out", "run", **meeting, **number)
        for host, folder, number in zip(hosts, folders, numbers, strict=True)
    ]


def test_two_machines_equal_one_and_only_the_first_writes(digits_folder, hosts, tmp_path):
    words = training(digits_folder, "--optimizer", "muon", "--epochs", 4)
    assert start(None, tmp_path, *words, "--out", "one").wait(300) == 0
    runs = on_both(hosts, (tmp_path, tmp_path), PORT, words, SLURM_NODEID="1")
    assert [run.wait(300) for run in runs] == [0, 0], (tmp_path / "said-0").read_text()
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)  # Muon may multiply in bf16
    assert "2 processes" in (tmp_path / "said-0").read_text() and "epoch" not in (tmp_path / "said-1").read_text()


def test_a_machine_that_dies_ends_the_run_on_the_other_with_one_line(digits_folder, hosts, tmp_path):
    words = training(digits_folder, "--epochs", 10_000)
    first, second = on_both(hosts, (tmp_path, tmp_path), PORT + 1, words)
    wait_for(lambda: len(losses(tmp_path / "run")) > 2, first)
    second.kill()
    second.wait()
    assert first.wait(60) == 1
    said = (tmp_path / "said-0").read_text()
    assert "Traceback" not in said and said.splitlines()[-1].startswith("maelab: lost another process of the run"), said


def test_only_the_first_machine_needs_the_run_folder_and_a_copy_replaces_it(digits_folder, hosts, tmp_path):
    folders = tmp_path / "0", tmp_path / "1"
    for folder in folders:
        folder.mkdir()
    words = training(digits_folder, "--optimizer", "muon", "--epochs", 40)
    mirrored = [*words, "--mirror", f"file://{tmp_path}/copy"]
    first, second = on_both(hosts, folders, PORT + 2, mirrored)
    wait_for(lambda: len(losses(folders[0] / "run")) > 2, first)
    first.send_signal(signal.SIGINT)
    assert first.wait(60) == 130 and second.wait(60) == 130
    shutil.rmtree(folders[0] / "run")
    assert [run.wait(300) for run in on_both(hosts, folders, PORT + 3, mirrored)] == [0, 0]
    assert "going on from step" in (folders[0] / "said-0").read_text()
    assert start(None, tmp_path, *words, "--out", "one").wait(300) == 0
    assert losses(folders[0] / "run") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)
    assert not (folders[1] / "run").exists()


def test_torchrun_starts_again_where_the_last_checkpoint_stands(digits_folder, tmp_path):
    torchrun = ("torch.distributed.run", "--nproc-per-node", 2, "--max-restarts", 1, "--standalone", "-m")
    words = training(digits_folder, "--epochs", 12, "--devices", 2, "--out", "run")
    run = start(None, tmp_path, *torchrun, *words)
    wait_for(lambda: len(losses(tmp_path / "run")) > 2, run)
    os.kill(children_of(run.pid)[-1], signal.SIGKILL)
    assert run.wait(300) == 0
    said = (tmp_path / "said-0").read_text()
    assert "going on from step" in said and len(losses(tmp_path / "run")) == 24  # of training and of validation


def wait_for(reached, process: subprocess.Popen) -> None:
    end = time.monotonic() + 200
    while True:
        try:
            if reached():
                return
        except OSError:
            pass
        assert process.poll() is None and time.monotonic() < end, "it ended before it was asked to"
        time.sleep(0.1)
