"""Copies on object storage: in memory, where every step can be stopped, and on a real server that speaks S3."""

import json
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from processes import Ended, Maelab
from safetensors.torch import load_file

from maelab import recipes
from maelab.config import PretrainConfig, RunOptions
from maelab.errors import RunError, UsageError
from maelab.runs import HoldsAnother, commit, result_of
from maelab.runs import folder as folders
from maelab.runs.checkpoints import NAMES, intact, last_commit
from maelab.runs.mirror import Mirror, Overtaken, as_url, fetched, shown
from maelab.tasks.pretrain import pretrain

KEYS = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture
def url() -> str:
    """A new place in memory."""
    return f"memory://{uuid.uuid4().hex}/run"


def there(url: str) -> dict[str, bytes]:
    """What lies at a URL: relative name -> content."""
    storage, root = fsspec.core.url_to_fs(url)
    return {name.removeprefix(root + "/"): storage.cat_file(name) for name in storage.find(root)}


def here(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file() and file.name != ".maelab.lock")
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def config(folder: Path, **changes: Any) -> PretrainConfig:
    config = replace(recipes.pretrain_smoke(), data=f"folder:{folder}", precision="fp32", limit=96, batch_size=32)
    return replace(config, epochs=2, knn_every=0, **changes)


def options(out: Path, url: str, **changes: Any) -> RunOptions:
    return RunOptions(out=out, device="cpu", threads=1, mirror=url, **changes)


def run_with(folder: Path, number: int) -> None:
    """Commit number `number` of a run: files that say so."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"task": "pretrain"}')
    commit(folder, {name: f"{name} {number}".encode() for name in NAMES}, {"step": number})


def whole(folder: Path) -> int:
    """The number of the one commit that a run folder holds, after whatever befell it."""
    files, _ = intact(folder, NAMES)
    assert files.keys() == {*NAMES}
    (number,) = {int(file.read_text().split()[-1]) for file in files.values()}
    return number


def failing(monkeypatch: pytest.MonkeyPatch, method: str, after: int) -> None:
    """Let a method of the storage work so many times, and then fail."""
    left, real = [after], getattr(MemoryFileSystem, method)

    def broken(self: Any, *arguments: Any, **named: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise OSError("the line is dead")
        return real(self, *arguments, **named)

    monkeypatch.setattr(MemoryFileSystem, method, broken)


def test_a_run_and_its_copy_hold_the_same_and_another_machine_goes_on(digits_folder, tmp_path, url):
    _, result = pretrain(config(digits_folder), options=options(tmp_path / "a", url))
    assert there(url) == here(tmp_path / "a") and "result.json" in there(url)
    folder, again = pretrain(config(digits_folder), options=options(tmp_path / "b", url))  # knows nothing of a
    assert again == result and here(folder) == here(tmp_path / "a")
    with pytest.raises(HoldsAnother, match="a complete run with seed 0 instead of 1"):
        pretrain(config(digits_folder, seed=1), options=options(tmp_path / "c", url))
    with pytest.raises(UsageError, match=r"holds another run than .*new; use --overwrite to replace it"):
        pretrain(config(digits_folder, seed=1), options=options(tmp_path / "new", f"{url}-of-another"))
        pretrain(config(digits_folder, seed=1), options=options(tmp_path / "new", url))
    assert there(url) == here(tmp_path / "a")
    pretrain(config(digits_folder, seed=1), options=options(tmp_path / "b", url, overwrite=True))
    assert there(url) == here(tmp_path / "b") and json.loads(there(url)["config.json"])["seed"] == 1


def test_wherever_sending_stops_a_whole_commit_is_there(tmp_path, monkeypatch):
    ended, folder = [], tmp_path
    for stop in range(30):
        url, folder = f"memory://{uuid.uuid4().hex}/run", tmp_path / f"{stop}"
        mirror = Mirror(url)
        for number in (1, 2):
            run_with(folder, number)
            mirror.send(folder)
        run_with(folder, 3)
        with monkeypatch.context() as patch:
            failing(patch, "put_file", stop)
            try:
                mirror.send(folder)
                break
            except RunError as error:
                assert str(error).endswith("run: the line is dead")
        other = tmp_path / f"other{stop}"
        other.mkdir()
        Mirror(url).fetch(other)
        ended.append(whole(other))
        run_with(folder, 4)  # the next save sends all
        mirror.send(folder)
        assert there(url) == here(folder)
    assert ended == [2] * len(here(folder)), "commit.json is last"


def test_wherever_fetching_stops_the_run_here_stands(tmp_path, url, monkeypatch):
    mirror, far = Mirror(url), tmp_path / "far"
    for number in range(1, 5):
        run_with(far, number)
    mirror.send(far)
    stop, folder = 0, tmp_path
    for stop in range(30):
        folder = tmp_path / f"{stop}"
        run_with(folder, 1)
        before = here(folder)
        with monkeypatch.context() as patch:
            failing(patch, "get_file", stop)
            try:
                Mirror(url).fetch(folder)
                break
            except RunError:
                assert here(folder) == before
    assert stop == len(there(url)) and here(folder) == here(far) and whole(folder) == 4


def test_of_a_run_here_and_its_copy_the_further_one_counts(tmp_path, url):
    ahead, behind = tmp_path / "ahead", tmp_path / "behind"
    run_with(behind, 1)
    run_with(ahead, 1)
    run_with(ahead, 2)
    Mirror(url).send(behind)
    mirror = Mirror(url)
    assert mirror.fetch(ahead) and whole(ahead) == 2
    mirror.send(ahead)
    assert not Mirror(url).fetch(behind) and whole(behind) == 2
    assert not Mirror(url).fetch(ahead)


def test_a_disk_of_the_network_gets_its_folders(tmp_path):
    run_with(tmp_path / "run", 1)
    for number, slashes in enumerate(("/", "//", "///")):  # all of them mean the place that a reader finds
        far = tmp_path / str(number) / "away"
        mirror = Mirror(f"file:{slashes}{str(far).lstrip('/')}")
        mirror.check()
        mirror.send(tmp_path / "run")
        assert here(far) == here(tmp_path / "run")


def test_a_copy_on_this_machine_keeps_its_lock(tmp_path):
    """file:// may lead to a folder in which maelab works."""
    with folders.locked(tmp_path / "at-work"):
        Mirror((tmp_path / "at-work").as_uri()).check()
        with pytest.raises(UsageError, match="another process is working"), folders.locked(tmp_path / "at-work"):
            pass


def test_a_run_on_other_images_is_another_run(tmp_path, url):
    """Though its config is the same, and it is further: what is here stays."""
    here_, there_ = tmp_path / "here", tmp_path / "there"
    for folder, images in ((here_, "a"), (there_, "b")):
        run_with(folder, 1)
        (folder / "env.json").write_text(json.dumps({"data_md5": {"images": images}}))
    run_with(there_, 2)
    Mirror(url).send(there_)
    before = here(here_)
    with pytest.raises(HoldsAnother, match="holds another run than"):
        Mirror(url).fetch(here_)
    assert here(here_) == before and there(url) == here(there_)


def test_a_commit_that_is_no_json_counts_as_none(tmp_path, url):
    run_with(tmp_path / "run", 1)
    storage, root = fsspec.core.url_to_fs(url)
    for text in (b"", b"[" * 100_000, b"[]", b'{"step": "x"}'):
        storage.pipe_file(f"{root}/checkpoints/commit.json", text)
        assert Mirror(url).fetch(tmp_path / "run")


def test_two_that_send_to_one_place_are_told_apart(tmp_path, url):
    mine, theirs = Mirror(url), Mirror(url)
    for mirror, folder in ((mine, tmp_path / "mine"), (theirs, tmp_path / "theirs")):
        run_with(folder, 1)
        mirror.fetch(folder)
    mine.send(tmp_path / "mine")
    before = there(url)
    with pytest.raises(Overtaken, match=f"another process sends a run to {url}; this one stands in .*theirs"):
        theirs.send(tmp_path / "theirs")
    assert there(url) == before
    run_with(tmp_path / "mine", 2)
    mine.send(tmp_path / "mine")


def test_training_goes_on_without_the_storage_and_sends_all_when_it_is_back(
    digits_folder, tmp_path, url, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        failing(patch, "put_file", 3)
        with pytest.raises(RunError, match=r"the line is dead; the run is complete in .*, and the same command sends"):
            pretrain(config(digits_folder), options=options(tmp_path / "run", url))
    assert capsys.readouterr().err.count("the line is dead; the next save tries again") == 2
    assert result_of(tmp_path / "run") and "result.json" not in there(url)
    pretrain(config(digits_folder), options=options(tmp_path / "run", url))
    assert there(url) == here(tmp_path / "run")


def test_nothing_of_somebody_else_is_touched(digits_folder, tmp_path, url):
    storage, root = fsspec.core.url_to_fs(url)
    for name in ("thesis.pdf", "checkpoints/notes.txt", "config.json/x", "..\\env.json"):
        storage.pipe_file(f"{root}/{name}", b"mine")
        before = there(url)
        with pytest.raises(UsageError, match="which maelab did not write; choose another URL"):
            pretrain(config(digits_folder), options=options(tmp_path / "run", url, overwrite=True))
        assert there(url) == before and not (tmp_path / "run").exists()
        storage.rm(root, recursive=True)


@pytest.mark.parametrize(
    ("mirror", "said"),
    [
        ("nonsense://x/y", "nonsense://x/y: Protocol not known: nonsense"),
        ("runs/x", "runs/x is no URL; write one such as s3://bucket/run"),
        ("zip://a::memory://b", "zip://a::memory://b: one storage at a time, please, without ::"),
        ("http://127.0.0.1:9/x", "http://127.0.0.1:9/x: Cannot connect"),
    ],
)
def test_a_place_that_is_none_is_named_before_any_work(digits_folder, tmp_path, mirror, said):
    with pytest.raises((UsageError, RunError)) as raised:
        pretrain(config(digits_folder), options=options(tmp_path / "run", mirror))
    assert str(raised.value).startswith(said) and not (tmp_path / "run").exists()


def test_what_is_a_url():
    assert as_url(Path("s3://bucket/a/run/")) == "s3://bucket/a/run" == as_url("s3://bucket/a/run/")
    assert as_url(Path("file:///tmp/run")) == "file:///tmp/run"
    assert not any(map(as_url, ("runs/a", "C:\\runs", "C:/runs", "maelab:mnist-mae", "hf:google/vit", "a:b")))
    assert shown("ftp://me:secret@host/run") == "ftp://host/run"


def test_a_link_is_not_sent(tmp_path, url):
    run_with(tmp_path / "run", 1)
    (tmp_path / "secret").write_text("mine")
    (tmp_path / "run" / "metrics.jsonl").symlink_to(tmp_path / "secret")
    (tmp_path / "run" / "result.json").symlink_to(tmp_path / "nowhere")
    Mirror(url).send(tmp_path / "run")
    assert there(url).keys() == here(tmp_path / "run").keys() - {"metrics.jsonl"}


def test_a_run_is_read_by_its_url(tmp_path, url):
    with pytest.raises(UsageError, match=f"no run or checkpoint at {url}"):
        fetched(url)
    run_with(tmp_path / "run", 1)
    Mirror(url).send(tmp_path / "run")
    copy = fetched(url)
    assert copy == fetched(url) and (copy / "checkpoints/best/model.safetensors").is_file()
    assert not list(copy.rglob("training.pt"))  # three times the weights, and of no use


# --------------------------------------------------------------------------------------------------------------- on S3


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """Python code that makes a process use a server of S3 of its own, which has a bucket `bucket`."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = KEYS | {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "no_proxy": host}
    fsspec.filesystem("s3", key="a", secret="b", endpoint_url=settings["AWS_ENDPOINT_URL"]).mkdir("bucket")
    yield f"import os\nos.environ |= {settings!r}\n"
    server.stop()


def test_a_machine_is_lost_and_another_goes_on_from_s3(maelab: Maelab, s3, digits_folder, tmp_path):
    """Killed in epoch 3 of 4, its folder gone: the weights are those of a run that nothing befell."""

    def train(out: str, *more: Any, **request: Any) -> Ended:
        line = ("pretrain", "smoke", "--data", f"folder:{digits_folder}", "--limit", 96, "--batch-size", 32)
        line += ("--precision", "fp32", "--device", "cpu", "--threads", 1, "--epochs", 4, "--knn-every", 0)
        return maelab.run(*line, "--out", out, *more, cwd=tmp_path, first=s3, **request)

    assert train("undisturbed").status == 0
    killed = train("here", "--mirror", "s3://bucket/run", die=("commit.json", 5, "before"))  # previous/ has them too
    assert killed.status == -9 and last_commit(tmp_path / "here")["epoch"] == 2
    shutil.rmtree(tmp_path / "here")
    resumed = train("there", "--mirror", "s3://bucket/run")
    assert resumed.status == 0 and "going on from step" in resumed.err and "fetching s3://bucket/run" in resumed.err
    a, b = (load_file(tmp_path / name / "checkpoints/last/model.safetensors") for name in ("undisturbed", "there"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    image = str(next(digits_folder.rglob("*.png")))
    line = ("reconstruct", "s3://bucket/run", image, "--out", "picture.png", "--device", "cpu")
    assert maelab.run(*line, cwd=tmp_path, first=s3).status == 0
    refused = train("s3://bucket/elsewhere").error()
    assert refused == "--out is a folder on this machine; --mirror s3://bucket/elsewhere keeps a copy of a run there"
    refused = train("none", "--mirror", "s3://none/run").error()
    assert refused == "s3://none/run: The specified bucket does not exist"


def test_cells_of_a_sweep_are_not_computed_again_elsewhere(maelab: Maelab, s3, digits_folder, tmp_path):
    line = ("sweep", "smoke", "--data", f"folder:{digits_folder}", "--grid", "patch_size=14", "--limit", 100)
    line += ("--epochs", 1, "--finetune-epochs", 1, "--batch-size", 32, "--threads", 1, "--device", "cpu")
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        ended = maelab.run(*line, "--out", "sweep", "--mirror", "s3://bucket/sweep", cwd=tmp_path / place, first=s3)
        assert ended.status == 0, ended.err
        assert ended.err.count("fetching s3://bucket/sweep/") == (0 if place == "a" else 3)
    assert here(tmp_path / "a") == here(tmp_path / "b")  # the names of events are those of one process
