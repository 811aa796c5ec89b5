"""Devices, processes and precision: the only module that knows the distributed engine (lightning-fabric)."""

import contextlib
import io
import logging
import os
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from lightning_fabric import Fabric
from lightning_fabric.loggers.logger import Logger
from lightning_fabric.loggers.tensorboard import TensorBoardLogger
from torch import nn

from maelab import native
from maelab.config import RunOptions
from maelab.errors import UsageError
from maelab.model.vit import Attention, Block
from maelab.runs import config_of, find_checkpoint, read_json, write_json
from maelab.runs.folder import EVENTS
from maelab.training import blocks

Engine = Fabric
Tracker = Logger

logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # it repeats what `describe` says
# The gradient of a patch embedding of one channel has a dimension of size 1, whose stride means nothing.
warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")


def choose_precision(wanted: str, device: str) -> str:
    """'bf16' or 'fp32': what was asked for, or bf16 where it is the faster one.

    That is where a GPU or a CPU has units for its products, and on CPUs that maelab's own kernels serve. AVX-512's
    instruction for bfloat16 alone is no reason: some processors run it at half the rate of float32.
    """
    if wanted != "auto":
        return wanted
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    if device == "cpu":
        return "bf16" if torch.cpu._is_amx_tile_supported() or native.available() else "fp32"
    return "fp32"


def start_engine(options: RunOptions, precision: str = "auto") -> Engine:
    """Start the processes and choose device and precision.

    Args:
        options: device, devices, num_nodes, threads.
        precision: 'auto', 'fp32' or 'bf16'.

    Returns:
        The engine, launched: from here on every process runs the same code.

    Raises:
        UsageError: if the device is not there.
    """
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device == "cuda" and torch.cuda.device_count() < options.devices:
        raise UsageError(f"--devices {options.devices}: found {torch.cuda.device_count()} CUDA devices")
    if device == "mps" and not torch.backends.mps.is_available():
        raise UsageError("--device mps: this machine has none; use --device cpu")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    elif options.devices > 1 and device == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // options.devices))
    if device == "cuda":
        torch.set_float32_matmul_precision("high")
    with warnings.catch_warnings():  # advice on precision and cluster environments that is not about this run
        warnings.simplefilter("ignore")
        engine = Fabric(
            accelerator=device,
            devices=options.devices,
            num_nodes=options.num_nodes,
            strategy="ddp" if options.devices * options.num_nodes > 1 else "auto",
            precision="bf16-mixed" if choose_precision(precision, device) == "bf16" else "32-true",
        )
        engine.launch()
    return engine


def prepare(model: nn.Module, engine: Engine, options: RunOptions) -> str:
    """Set how the blocks of a model compute, for the hardware at hand or as forced by the options.

    Returns:
        One line that says what was chosen, e.g. 'cpu, bf16, native kernels on AMX, 2 threads'.
    """
    device, precision = engine.device.type, "bf16" if "bf16" in engine._precision.precision else "fp32"
    compiled = options.compile == "on" or (options.compile == "auto" and device == "cuda")
    for module in model.modules():
        if isinstance(module, Block):
            module.fast = None
            if compiled:
                module.compile()  # block by block: equal blocks share one compilation
        elif isinstance(module, Attention):
            module.form = options.attention
    kernels = ""
    if options.kernels == "auto" and device == "cpu" and precision == "bf16" and not compiled:
        kernels = blocks.install(model)  # a compiled block would pass them over
    attention = options.attention
    if attention == "auto":
        attention = "matmul" if device == "cpu" else "fused"
    chosen = [f"cuda ({torch.cuda.get_device_name()})" if device == "cuda" else device, precision]
    chosen += [kernels] if kernels else []
    if any(isinstance(module, Block) and module.fast is None for module in model.modules()):
        chosen += [f"{attention} attention"]
    chosen += ["compiled"] if compiled else []
    if device == "cpu":
        chosen += [f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"]
    if engine.world_size > 1:
        chosen += [f"{engine.world_size} processes"]
    return ", ".join(chosen)


def tensorboard(folder: Path, purge_from: int) -> TensorBoardLogger:
    """Writer of TensorBoard events into `folder`; events of an earlier process from step `purge_from` on are hidden."""
    return TensorBoardLogger(root_dir=folder, name="", version="", purge_step=purge_from, filename_suffix=EVENTS)


@contextlib.contextmanager
def open_tracker(kind: str, folder: Path, engine: Engine) -> Iterator[Tracker | None]:
    """Weights & Biases or MLflow, through the engine's own loggers, for the run in `folder`.

    It begins with what config.json holds; a resumed run goes on under the same id, which is kept in tracker.json.

    Args:
        kind: 'wandb', 'mlflow', or 'tensorboard' for none: its events are always written.
        folder: the run folder.
        engine: only its first process gets a tracker.

    Raises:
        UsageError: if a package is missing.
    """
    if kind == "tensorboard" or not engine.is_global_zero:
        yield None
        return
    os.environ |= {"WANDB_SILENT": "true", "MLFLOW_DISABLE_TELEMETRY": "true"}
    about = read_json(folder / "tracker.json")
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")  # what they say at their start is not about this run
            from pytorch_lightning.loggers import MLFlowLogger, WandbLogger

            logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
            if kind == "mlflow":
                place = os.environ.get("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
                tracker: Any = MLFlowLogger("maelab", folder.name, tracking_uri=place, run_id=about.get("mlflow"))
                about["mlflow"] = tracker.run_id
            else:
                about.setdefault("wandb", uuid.uuid4().hex[:8])
                offline = os.environ.get("WANDB_MODE", "offline") != "online"
                tracker = WandbLogger(folder.name, folder, about["wandb"], offline, project="maelab", resume="allow")
            tracker.log_hyperparams(config_of(folder))
    except ModuleNotFoundError as error:
        raise UsageError(f"--logger {kind} needs more packages: pip install 'maelab[trackers]'") from error
    write_json(folder / "tracker.json", about)
    status = "failed"
    try:
        yield tracker
        status = "success"
    finally:
        tracker.finalize(status)
        if kind == "wandb":
            tracker.experiment.finish()


def log_outcome(tracker: Tracker | None, folder: Path, result: dict[str, Any]) -> None:
    """Give a tracker, if there is one, what a finished run leaves beside its curves: scores, figures, best weights."""
    if tracker is None:
        return
    scores = {f"best/{part}_{k}": v for part in ("val", "test") for k, v in result.get(part, {}).items()}
    tracker.log_metrics({k: v for k, v in scores.items() if isinstance(v, float)}, step=result["epochs"])
    figures, best = folder / "figures", find_checkpoint(folder).model.parent
    experiment, run = cast(Any, tracker).experiment, cast(Any, tracker).version
    if hasattr(experiment, "log_artifacts"):  # MLflow's client
        if figures.is_dir():
            experiment.log_artifacts(run, str(figures), "figures")
        experiment.log_artifacts(run, str(best), "model")
    else:
        for picture in sorted(figures.glob("*.png")):
            cast(Any, tracker).log_image(f"figures/{picture.stem}", [str(picture)])
        for file in sorted(best.iterdir()):
            experiment.save(str(file), base_path=str(best.parent), policy="now")
