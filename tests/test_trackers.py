"""Runs as MLflow and Weights & Biases have them: real processes, and what their own readers find afterwards."""

import builtins
import json
import signal

import mlflow
import pytest
from PIL import Image
from processes import Maelab
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from maelab.config import RunOptions
from maelab.errors import UsageError
from maelab.runs import read_json, read_metrics
from maelab.training.parallel import start_engine
from maelab.training.trackers import log_outcome, open_tracker


@pytest.fixture
def command(digits_folder) -> list[str]:
    flags = "--limit 200 --val-fraction 0.1 --batch-size 20 --threads 1"
    return ["pretrain", "smoke", "--data", f"folder:{digits_folder}", *flags.split()]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")  # MLflow's own use of its database
def test_mlflow_has_parameters_curves_figures_and_model_of_a_run_that_was_interrupted(
    command, maelab: Maelab, tmp_path
):
    command += ["--epochs", "12", "--logger", "mlflow", "--out", "run"]
    process = maelab.start(*command, cwd=tmp_path)
    process.wait_for(tmp_path / "run" / "metrics.jsonl", lines=2)
    process.signal(signal.SIGINT)
    assert process.wait().status == 130
    done = maelab.run(*command, cwd=tmp_path)
    assert done.status == 0 and "going on from step" in done.err and "INFO" not in done.err, done.err

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "maelab"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    assert run.data.params["patch_size"] == "7" and run.data.params["task"] == "pretrain"
    history = client.get_metric_history(run.info.run_id, "val/masked_mse")
    rows = read_metrics(tmp_path / "run")
    expected = {row["epoch"]: row["masked_mse"] for row in rows if row["split"] == "val"}
    assert {point.step: point.value for point in history} == expected and len(expected) == 12
    scores = read_json(tmp_path / "run" / "result.json")["val"]
    assert run.data.metrics["best/val_masked_mse"] == scores["masked_mse"]
    kept = tmp_path / experiment.artifact_location.removeprefix("file://") / run.info.run_id / "artifacts"
    assert {"curves.png", "reconstructions.png"} <= {path.name for path in (kept / "figures").iterdir()}
    ours = tmp_path / "run" / "checkpoints" / "best" / "model.safetensors"
    assert (kept / "model" / "model.safetensors").read_bytes() == ours.read_bytes()


def test_wandb_stays_in_the_run_folder(command, maelab: Maelab, tmp_path):
    done = maelab.run(*command, "--logger", "wandb", "--out", "run", cwd=tmp_path)
    assert done.status == 0 and "wandb" not in done.err, done.err
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    (log,) = folder.glob("*.wandb")
    assert b"val/masked_mse" in log.read_bytes() and b"decoder_embed_dim" in log.read_bytes()
    assert len(list((folder / "files" / "media" / "images" / "figures").glob("*.png"))) == 3
    assert (folder / "files" / "best" / "model.safetensors").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_missing_tracker_is_one_line_that_names_the_extra(monkeypatch, tmp_path):
    load = builtins.__import__

    def without(name: str, *more, **named):
        if name == "mlflow":
            raise ModuleNotFoundError(name)
        return load(name, *more, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    engine = start_engine(RunOptions(device="cpu"))
    with pytest.raises(UsageError, match=r"maelab\[trackers\]"), open_tracker("mlflow", tmp_path, engine):
        pass


def test_tensorboard_gets_names_that_are_no_text_and_no_picture_of_somebody_else(tmp_path, capsys):
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "mine.png").write_text("private")
    Image.new("RGB", (30, 20)).save(tmp_path / "figures" / "curves.png")
    (tmp_path / "config.json").write_text(json.dumps({"task": "finetune", "data": "folder:/caf\udce9"}))
    log_outcome(None, tmp_path, {"epochs": 1, "test": {"accuracy": 0.5}})
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Tags()["images"] == ["figures/curves"]
    content = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    assert b"folder:/caf\\xe9" in content
