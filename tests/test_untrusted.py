"""Pickles that would run code, in every place where torch's reader of pickles comes in: they are refused, not run."""

import json
import os
import shutil
import signal
import zipfile
from pathlib import Path

import pytest
import torch
from processes import Maelab

from maelab.errors import RunError, UsageError
from maelab.export import export
from maelab.model import VisionTransformer
from maelab.runs import commit
from maelab.training.checkpoint import ModelSpec, load_model, read_training, save_model

TINY = ("--limit", 40, "--batch-size", 20, "--threads", 1, "--kernels", "torch", "--epochs", 2)


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def would_run(file: Path, trace: Path) -> None:
    """Nothing has come of it so far, and with another reader it would have."""
    assert not trace.exists()
    torch.load(file, weights_only=False)
    assert trace.exists()


@pytest.fixture(scope="module")
def stopped(maelab: Maelab, digits_folder, tmp_path_factory) -> tuple[tuple[object, ...], Path]:
    """A command, and its run folder, killed once the first of two epochs was saved."""
    line = ("pretrain", "smoke", "--data", f"folder:{digits_folder}", *TINY, "--out", "run")
    work = tmp_path_factory.mktemp("stopped")
    ended = maelab.run(*line, cwd=work, die=("run/checkpoints/commit.json", 1, "after"))
    assert ended.status == -signal.SIGKILL
    return line, work / "run"


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_a_training_state_of_the_right_sum_runs_nothing(form, stopped, maelab: Maelab, tmp_path):
    """Who sends a run folder can give any file its sum in commit.json; the state is all there, and one object more."""
    line, run = stopped
    run, trace = Path(shutil.copytree(run, tmp_path / "run")), tmp_path / "trace"
    state = read_training(run / "checkpoints/last/training.pt") | {"more": Hostile(trace)}

    def save(place: Path) -> None:
        torch.save(state, place, _use_new_zipfile_serialization=form == "zip")

    commit(run, {"last/training.pt": save}, {"step": 2, "epoch": 1})
    ended = maelab.run(*line, cwd=tmp_path)
    assert ended.status == 1 and ended.error().startswith("run/checkpoints/last/training.pt is damaged (")
    with pytest.raises(RunError, match=r"training\.pt is damaged"):
        read_training(run / "checkpoints/last/training.pt")
    would_run(run / "checkpoints/last/training.pt", trace)


@pytest.mark.parametrize("name", ["vit.pth", "vit.pt", "vit.bin", "folder/pytorch_model.bin"])
@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_weights_of_others_run_nothing(form, name, tmp_path):
    file, trace = tmp_path / name, tmp_path / "trace"
    file.parent.mkdir(exist_ok=True)
    (file.parent / "config.json").write_text('{"model_type": "vit"}')
    state = VisionTransformer(img_size=16, embed_dim=64, depth=1, num_heads=1).state_dict()
    torch.save({"model": state, "args": Hostile(trace)}, file, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(RunError, match=r"is damaged or not safe to read: "):
        load_model(file.parent if "/" in name else file)
    would_run(file, trace)


def test_compressed_records_are_refused_before_anything_is_unpacked(tmp_path):
    """torch writes none; a few bytes of them could fill the memory."""
    torch.save(VisionTransformer(img_size=16, embed_dim=64, depth=1, num_heads=1).state_dict(), tmp_path / "a.pth")
    with (
        zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED) as new,
        zipfile.ZipFile(tmp_path / "a.pth") as old,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(RunError, match="compressed records, which torch does not write"):
        load_model(tmp_path / "b.pth")
    load_model(tmp_path / "a.pth")


@pytest.mark.parametrize(("eps", "taken"), [(1e-12, True), (1e-6, True), (1e-5, False), (1e-3, False)])
def test_another_layer_norm_is_refused_where_it_could_be_seen_and_named_where_not(eps, taken, tmp_path, capsys):
    model = VisionTransformer(img_size=16, embed_dim=64, depth=1, num_heads=1, num_classes=3)
    save_model(tmp_path / "run", ModelSpec("VisionTransformer", {"img_size": 16, "embed_dim": 64, "depth": 1,
               "num_heads": 1, "num_classes": 3}, "x"), model.state_dict())  # fmt: skip
    export(tmp_path / "run", format="hf", out=tmp_path / "hf")
    file = tmp_path / "hf" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"layer_norm_eps": eps}))
    if taken:
        load_model(tmp_path / "hf")
        assert ("layer norms with 1e-12 taken for 1e-06" in capsys.readouterr().err) == (eps == 1e-12)
    else:
        with pytest.raises(UsageError, match="has another activation or layer norm than maelab's models"):
            load_model(tmp_path / "hf")
