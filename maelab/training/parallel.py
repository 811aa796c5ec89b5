"""Devices, processes and precision: the only module that knows the distributed engine (lightning-fabric)."""

import logging
import os
import warnings
from pathlib import Path

import torch
from lightning_fabric import Fabric
from lightning_fabric.loggers.tensorboard import TensorBoardLogger

from maelab.config import RunOptions
from maelab.errors import UsageError

Engine = Fabric

logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # it repeats what `describe` says


def choose_precision(wanted: str, device: str) -> str:
    """'bf16' or 'fp32': what was asked for, or bf16 where the hardware has units for it."""
    if wanted != "auto":
        return wanted
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    if device == "cpu":
        return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "fp32"
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


def describe(engine: Engine) -> str:
    """One line that says what was chosen, e.g. 'cpu, bf16, 2 threads, 1 process'."""
    precision = "bf16" if "bf16" in engine._precision.precision else "fp32"
    kind = engine.device.type if engine.device.type == "cpu" else f"{engine.device.type} {torch.cuda.get_device_name()}"
    threads = f"{torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"
    return f"{kind}, {precision}, {threads}, {engine.world_size} process{'es' if engine.world_size > 1 else ''}"


def tensorboard(folder: Path, purge_from: int) -> TensorBoardLogger:
    """Writer of TensorBoard events into `folder`; events of an earlier process from step `purge_from` on are hidden."""
    return TensorBoardLogger(root_dir=folder, name="", version="", purge_step=purge_from)
