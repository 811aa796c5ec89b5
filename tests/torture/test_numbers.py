"""Limits of size, depth and type of what is read, one by one."""

import io
import zipfile

import pytest
import torch
from PIL import Image

from maelab.config import PretrainConfig
from maelab.data.decode import decode_upload
from maelab.errors import RunError, UsageError
from maelab.files import LARGEST_JSON, parse_json, read_json
from maelab.fitting.plan import read_configs
from maelab.recipes import pretrain_smoke
from maelab.runs import commit, find_checkpoint, read_metrics
from maelab.runs.checkpoints import NAMES
from maelab.training.checkpoint import read_training

HUGE = int("9" * 400)


@pytest.mark.parametrize(
    "rows",
    [
        b'{"epoch": true, "split": "val"}',
        b'{"epoch": 1, "split": ["val"], "loss": 1}',
        b'{"epoch": 1, "split": "val", "loss": "1"}',
        b'{"epoch": 1, "split": "val", "loss": null}',
        b'{"epoch": 1, "split": "val", "loss": ' + b"[" * 100 + b"]" * 100 + b"}",
    ],
)
def test_rows_of_metrics_that_maelab_does_not_write_are_left_out(rows, tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(rows + b'\n{"epoch": 2, "split": "val", "loss": 0.5}\n')
    assert read_metrics(tmp_path) == [{"epoch": 2, "split": "val", "loss": 0.5}]


def test_json_has_limits(tmp_path):
    for text in ("[" * 40 + "]" * 40, '{"a":' * 40 + "1" + "}" * 40, "[" * 10**6, "9" * 21, "{", ""):
        with pytest.raises(ValueError):
            parse_json(text)
    assert parse_json("[" * 30 + "]" * 30) is not None
    file = tmp_path / "large.json"
    with open(file, "wb") as out:
        out.truncate(LARGEST_JSON + 1)
    with pytest.raises(RunError, match=r"large.json is damaged: it is larger than 64 MiB"):
        read_json(file)


GOOD = {
    "step": 1,
    "seconds": 0.5,
    "images": 5,
    "sums": {},
    "rows": "",
    "best_epoch": 1,
    "best": {"loss": 1.0},
    "train": {},
}


@pytest.mark.parametrize(
    "change",
    [
        {"step": "1"},
        {"step": 1.0},
        {"step": True},
        {"step": -1},
        {"images": None},
        {"rows": 3},
        {"sums": []},
        {"best": {"loss": "x"}},
        {"sums": {"loss": torch.zeros(2)}},
        {"seconds": "long"},
        {"train": {1: 2.0}},
    ],
    ids=str,
)
def test_positions_that_no_run_could_go_on_from(change, tmp_path):
    state = {"position": GOOD, "model": {}, "optimizers": [], "average": None}
    torch.save(state, tmp_path / "training.pt")
    assert read_training(tmp_path / "training.pt")["position"] == GOOD
    torch.save(state | {"position": GOOD | change}, tmp_path / "training.pt")
    with pytest.raises(RunError, match="does not say where the run stood"):
        read_training(tmp_path / "training.pt")


def test_training_states_that_would_fill_the_memory(tmp_path):
    state = {"position": GOOD, "model": {"a": torch.zeros(1).expand(10**6, 10**6)}, "optimizers": [], "average": None}
    torch.save(state, tmp_path / "training.pt")
    with pytest.raises(RunError, match="claims to be larger than the file"):
        read_training(tmp_path / "training.pt")
    torch.save(state | {"model": {}}, tmp_path / "stored")
    packed = zipfile.ZipFile(tmp_path / "training.pt", "w", zipfile.ZIP_DEFLATED)
    with packed as new, zipfile.ZipFile(tmp_path / "stored") as old:
        for record in old.namelist():
            new.writestr(record, old.read(record))
    with pytest.raises(RunError, match="it is compressed"):
        read_training(tmp_path / "training.pt")


@pytest.mark.parametrize(
    "fields",
    [
        {"epochs": "3"},
        {"epochs": 3.0},
        {"epochs": True},
        {"flip": 1},
        {"blr": None},
        {"optimizer": "sgd"},
        {"data": 5},
        {"img_size": [28, 28]},
        {"img_size": (28,)},
        {"img_size": (28.0, 28)},
        {"seed": HUGE},
        {"depth": 10**6},
        {"mlp_ratio": 1e308},
        {"limit": "all"},
    ],
    ids=lambda fields: str(fields)[:30],
)
def test_configs_check_types_and_sizes(fields):
    with pytest.raises(UsageError, match=f"--{next(iter(fields)).replace('_', '-')} must be") as refusal:
        PretrainConfig(**({"data": "mnist"} | fields))
    assert len(str(refusal.value)) < 200


def test_a_plan_of_other_types_is_damaged(tmp_path):
    plan = {"data": "folder:x", "minutes": 1, "seed": 0, "fingerprint": "x"}
    plan |= {"measured": {"pretrain": {"images": 9, "validation_images": 3, "images_per_s": 9.0}}}
    config = vars(pretrain_smoke()) | {"img_size": [28, 28], "data": "folder:x"}
    assert read_configs(plan | {"pretrain": config}, tmp_path)["pretrain"].epochs
    for change in (
        {"epochs": "3"},
        {"epochs": 2.5},
        {"optimizer": "x"},
        {"data": "mnist"},
        {"seed": 5},
        {"img_size": 3},
        {"new": 1},
    ):
        with pytest.raises(RunError, match=r"plan.json is damaged"):
            read_configs(plan | {"pretrain": config | change}, tmp_path)


def test_a_commit_that_names_only_a_part_is_damaged(tmp_path):
    commit(tmp_path, {name: b"x" for name in NAMES}, {"step": 1})
    for sums in ('{"sha256": [1]}', '{"sha256": {"best/model.safetensors": 1}}', '{"step": 1}'):
        (tmp_path / "checkpoints" / "commit.json").write_text(sums)
        with pytest.raises(RunError, match=r"commit.json is damaged"):
            find_checkpoint(tmp_path)
        with pytest.raises(RunError, match=r"commit.json is damaged"):
            commit(tmp_path, {"last/training.pt": b"y"}, {"step": 2})
    for path in (tmp_path / "checkpoints").rglob("commit.json"):
        path.unlink()
    commit(tmp_path, {"best/model.safetensors": b"x"}, {"step": 1})
    with pytest.raises(RunError, match=r"commit.json is damaged: it does not name best/config.json"):
        find_checkpoint(tmp_path)


def test_odd_metadata_is_no_warning():
    """Warnings are errors in tests, and lines of their own on somebody's terminal."""
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x010E], exif[0x011A] = "a text of some length", 72.0
    Image.new("RGB", (8, 8)).save(file, "JPEG", exif=exif)
    content = file.getvalue().replace(b"\x01\x0e\x00\x02\x00\x00\x00", b"\x01\x0e\x00\x02\x00\x00\x7f")
    content = content.replace(b"JFIF", b"JFIX")  # or the resolution is not looked for in the metadata
    with pytest.warns(UserWarning):
        Image.open(io.BytesIO(content), formats=("JPEG",)).close()
    assert decode_upload(content, None).size == (8, 8)
