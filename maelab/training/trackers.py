"""Who else gets the metrics of a run: TensorBoard's events, and Weights & Biases or MLflow."""

import contextlib
import io
import os
import uuid
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from maelab.errors import UsageError
from maelab.runs import config_of, find_checkpoint, read_json, write_json
from maelab.runs.ensure import Ranks
from maelab.runs.folder import EVENTS


class Tracker(Protocol):
    """Where the metrics of a run go, and at its end its figures and best weights."""

    def log(self, values: Mapping[str, float], epoch: int) -> None: ...

    def keep(self, figures: list[Path], weights: Path) -> None:
        """Take these pictures, and the folder of a checkpoint."""

    def finish(self, done: bool) -> None: ...


def tensorboard(folder: Path, purge_from: int) -> Any:
    """Writer of TensorBoard events into `folder`; events of an earlier process from step `purge_from` on are hidden."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder, purge_step=purge_from, filename_suffix=EVENTS)


@contextlib.contextmanager
def open_tracker(kind: str, folder: Path, ranks: Ranks) -> Iterator[Tracker | None]:
    """Weights & Biases or MLflow for the run in `folder`.

    It begins with what config.json holds; a resumed run goes on under the same id, which is kept in tracker.json.

    Args:
        kind: 'wandb', 'mlflow', or 'tensorboard' for none: its events are always written.
        folder: the run folder.
        ranks: the processes, of which the first alone gets a tracker.

    Raises:
        UsageError: if a package is missing.
    """
    if kind == "tensorboard" or not ranks.is_global_zero:
        yield None
        return
    os.environ |= {"WANDB_SILENT": "true", "MLFLOW_DISABLE_TELEMETRY": "true"}
    about = read_json(folder / "tracker.json")
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")  # what they say at their start is not about this run
            tracker = (_mlflow if kind == "mlflow" else _wandb)(folder, about)
    except ModuleNotFoundError as error:
        raise UsageError(f"--logger {kind} needs more packages: pip install 'maelab[trackers]'") from error
    write_json(folder / "tracker.json", about)
    done = False
    try:
        yield tracker
        done = True
    finally:
        tracker.finish(done)


@dataclass(frozen=True)
class MLflow:
    """A run of MLflow: its client, and the run's id."""

    client: Any
    run: str

    def log(self, values: Mapping[str, float], epoch: int) -> None:
        for name, value in values.items():
            self.client.log_metric(self.run, name, value, step=epoch)

    def keep(self, figures: list[Path], weights: Path) -> None:
        for picture in figures:
            self.client.log_artifact(self.run, str(picture), "figures")
        self.client.log_artifacts(self.run, str(weights), "model")

    def finish(self, done: bool) -> None:
        self.client.set_terminated(self.run, "FINISHED" if done else "FAILED")


def _mlflow(folder: Path, about: dict[str, Any]) -> Tracker:
    import mlflow

    client = mlflow.MlflowClient(os.environ.get("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db"))
    if "mlflow" in about:
        client.update_run(about["mlflow"], status="RUNNING")
    else:
        experiment = client.get_experiment_by_name("maelab")
        number = experiment.experiment_id if experiment else client.create_experiment("maelab")
        about["mlflow"] = client.create_run(number, run_name=folder.name).info.run_id
    for name, value in config_of(folder).items():
        client.log_param(about["mlflow"], name, value)
    return MLflow(client, about["mlflow"])


@dataclass(frozen=True)
class Wandb:
    """A run of Weights & Biases."""

    run: Any

    def log(self, values: Mapping[str, float], epoch: int) -> None:
        self.run.log({**values, "epoch": epoch})

    def keep(self, figures: list[Path], weights: Path) -> None:
        import wandb

        self.run.log({f"figures/{picture.stem}": wandb.Image(str(picture)) for picture in figures})
        for file in sorted(weights.iterdir()):
            self.run.save(str(file), base_path=str(weights.parent), policy="now")

    def finish(self, done: bool) -> None:
        self.run.finish(exit_code=0 if done else 1)


def _wandb(folder: Path, about: dict[str, Any]) -> Tracker:
    import wandb

    about.setdefault("wandb", uuid.uuid4().hex[:8])
    run = wandb.init(
        project="maelab", name=folder.name, id=about["wandb"], dir=folder, resume="allow", config=config_of(folder),
        mode="online" if os.environ.get("WANDB_MODE") == "online" else "offline",
    )  # fmt: skip
    run.define_metric("*", step_metric="epoch")
    return Wandb(run)


def log_outcome(tracker: Tracker | None, folder: Path, result: dict[str, Any]) -> None:
    """Give a tracker, if there is one, what a finished run leaves beside its curves: scores, figures, best weights."""
    if tracker is None:
        return
    scores = {f"best/{part}_{k}": v for part in ("val", "test") for k, v in result.get(part, {}).items()}
    tracker.log({k: v for k, v in scores.items() if isinstance(v, float)}, result["epochs"])
    tracker.keep(sorted((folder / "figures").glob("*.png")), find_checkpoint(folder).model.parent)
