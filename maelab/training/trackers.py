"""Who else gets the metrics of a run: TensorBoard's events, and Weights & Biases or MLflow."""

import contextlib
import io
import os
import struct
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from maelab.errors import UsageError
from maelab.names import encodable
from maelab.runs import config_of, find_checkpoint, read_json, write_json
from maelab.runs.ensure import Ranks
from maelab.runs.folder import EVENTS, FIGURES, figure_of


class Tracker(Protocol):
    """Where the metrics of a run go, and at its end its figures and best weights."""

    def log(self, values: Mapping[str, float], epoch: int) -> None: ...

    def keep(self, figures: list[Path], weights: Path) -> None:
        """Take these pictures, and the folder of a checkpoint."""

    def finish(self, done: bool) -> None: ...


class Events:
    """TensorBoard events of a run, written at once through one open file: neither a thread nor the folder is needed."""

    def __init__(self, folder: Path, purge_from: int) -> None:
        """Begin a file of events in `folder`; events of an earlier process from step `purge_from` on are hidden."""
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        seconds, rest = divmod(time.time_ns(), 10**9)  # TensorBoard reads files in the order of their names
        name = f"events.out.tfevents.{seconds:010d}.{rest:09d}.{os.getpid()}.{uuid.uuid4().hex[:8]}{EVENTS}"
        self._file = open(folder / name, "wb")  # noqa: SIM115 - closed by close()
        self._records = RecordWriter(self._file)
        self._event: Any = event_pb2  # generated: no types
        self._summary: Any = summary_pb2
        self._write(file_version="brain.Event:2")
        self._write(session_log=self._event.SessionLog(status=self._event.SessionLog.START), step=purge_from)

    def log(self, values: Mapping[str, float], epoch: int) -> None:
        """Write these values for this epoch."""
        scalars = [self._summary.Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(summary=self._summary.Summary(value=scalars), step=epoch)

    def keep(self, config: Mapping[str, Any], scores: Mapping[str, float], figures: list[Path], epoch: int) -> None:
        """Write what a run began with, for the tab of hyperparameters, what it came to, and its pictures."""
        from tensorboard.plugins.hparams import summary_v2 as hparams

        plain = {k: v if isinstance(v, bool | int | float) else encodable(str(v)) for k, v in config.items()}
        metrics = [hparams.Metric(name) for name in scores]
        self._write(summary=hparams.hparams_config_pb([hparams.HParam(k) for k in plain], metrics))
        self._write(summary=hparams.hparams_pb(plain))
        self.log(scores, epoch)
        for file in figures:
            content = file.read_bytes()
            width, height = struct.unpack(">II", content[16:24])  # where a PNG has them
            image = self._summary.Summary.Image(encoded_image_string=content, width=width, height=height, colorspace=3)
            value = self._summary.Summary.Value(tag=f"figures/{file.stem}", image=image)
            self._write(summary=self._summary.Summary(value=[value]), step=epoch)

    def close(self) -> None:
        self._file.close()

    def _write(self, **fields: Any) -> None:
        self._records.write(self._event.Event(wall_time=time.time(), **fields).SerializeToString())
        self._file.flush()


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
    """Give TensorBoard, and a tracker if there is one, what a finished run leaves beside its curves: scores, figures,
    and the tracker the best weights."""
    found = {f"best/{part}_{k}": v for part in ("val", "test") for k, v in result.get(part, {}).items()}
    scores, epoch = {k: v for k, v in found.items() if isinstance(v, float)}, result["epochs"]
    figures = [file for name in FIGURES if (file := figure_of(folder, name)).is_file()]
    with contextlib.closing(Events(folder, purge_from=epoch + 1)) as events:
        events.keep(config_of(folder), scores, figures, epoch)
    if tracker is not None:
        tracker.log(scores, epoch)
        tracker.keep(figures, find_checkpoint(folder).model.parent)
