"""The training loop: pretraining, linear probing and fine-tuning all run through `train`.

All randomness of step t is a function of (seed, t), so a resumed run needs no generator state: it goes on at its step
and ends as if it had never stopped.
"""

import copy
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from maelab import native
from maelab.config import BlocksConfig, LoopConfig
from maelab.data.batches import knows_float64, part_seed, steps_per_epoch
from maelab.errors import MaelabError, RunError, UsageError
from maelab.progress import in_words
from maelab.runs import Run
from maelab.runs.checkpoints import TRAINING, checkpoints
from maelab.training.capture import captured
from maelab.training.checkpoint import ModelSpec, damaged, load_model, portable, read_training
from maelab.training.optim import build_optimizers, keep_learning_rate, schedule, set_learning_rate
from maelab.training.parallel import Engine
from maelab.training.runlog import RunLog
from maelab.training.trackers import Tracker

SAVE_SECONDS = 600  # between two saves, where an epoch takes longer
SHOW_SECONDS = 0.5  # between two updates of the progress line; on GPUs also between two looks at the loss


class Interrupted(MaelabError):
    """The run was asked to stop, and has saved: the same command goes on."""

    exit_status = 130


@dataclass(frozen=True)
class Step:
    """What a training step computes.

    Args:
        batch: (step, part, parts) -> tensors on the device: the given part of the step's batch.
        loss: (model, *batch) -> {"loss": mean, ...}; further entries are averaged over the epoch and logged. It may
            call any method of the model, and nothing else of it: among several processes a stand-in is passed, see
            `Engine.joined`. On CUDA it is recorded once and replayed: it reads nothing back from the device.
        teacher: whether `loss` takes the moving average of the model too, behind the model; needs `ema_decay`.
    """

    batch: Callable[[int, int, int], tuple[torch.Tensor, ...]]
    loss: Callable[..., dict[str, torch.Tensor]]
    teacher: bool = False


@dataclass(frozen=True)
class Task:
    """What is trained and how it is judged.

    Args:
        model: the whole model, on the CPU.
        spec: its description, for the portable checkpoint.
        items: how many training items make an epoch.
        step: batch and loss of a training step.
        validate: (model, epoch from 1) -> {"loss": ..., further metrics} on validation, without gradients. Only the
            first process is asked.
        metric: the entry of `validate` that chooses the best epoch; of equal ones the lower loss does.
        higher_is_better: direction of that metric.
        patience: epochs without a better one before stopping; 0 never stops.
        keep_last: whether the last epoch counts as the best whatever validation says.
        layer_decay: see `build_optimizers`.
        note: put behind each epoch's line, e.g. what the loss would be for a trivial prediction.
    """

    model: nn.Module
    spec: ModelSpec
    items: int
    step: Step
    validate: Callable[[Any, int], dict[str, float]]
    metric: str
    higher_is_better: bool
    patience: int = 0
    keep_last: bool = False
    layer_decay: float = 1.0
    note: str = ""


@dataclass(frozen=True)
class Outcome:
    """How a training ended: epochs done, the best one (from 1) and its metrics, seconds, rate, last train metrics."""

    epochs: int
    best_epoch: int
    val: dict[str, float]
    train: dict[str, float]
    train_time_s: float
    images_per_s: float


@contextmanager
def _stop_on_signal() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set; a second one ends the process at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def on_signal(number: int, frame: object) -> None:
        stop.set()
        signal.signal(number, signal.SIG_DFL)

    for number in previous:
        signal.signal(number, on_signal)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def train(engine: Engine, run: Run, task: Task, config: LoopConfig, tracker: Tracker | None = None) -> Outcome:
    """Train `task.model`, saving and logging into the run folder; go on where its last checkpoint stands.

    Leaves the best weights (on validation; averaged ones if `ema_decay` is set) in `task.model`.

    Raises:
        Interrupted: after saving, when Ctrl-C or SIGTERM asked to stop.
        RunError: when the loss is no longer finite; the checkpoints keep their last good state.
    """
    folder, parts = run.folder, engine.world_size * config.accumulate
    per_epoch = steps_per_epoch(task.items, config.batch_size)
    batch_size = min(config.batch_size, task.items)
    if batch_size % parts:
        raise UsageError(f"a batch of {batch_size} images cannot be cut into {parts} equal parts; see --batch-size")
    total_steps = config.epochs * per_epoch
    warmup_steps = min(round(config.warmup_epochs * per_epoch), total_steps // 2)
    resumed_from = checkpoints(folder) / "last" / TRAINING

    wide = torch.float64 if knows_float64(engine.device) else torch.float32  # of sums
    task.model.to(engine.device)  # before anything holds its parameters, or brings state to where they are
    learner = copy.deepcopy(task.model) if engine.sharded else task.model  # what is shared out is no longer a model
    average = copy.deepcopy(task.model).requires_grad_(False).eval() if config.ema_decay else None
    move_average = get_ema_multi_avg_fn(config.ema_decay)
    judged = task.model if average is None or engine.sharded else average
    model = engine.joined(learner)
    if engine.sharded and average is not None:
        engine.joined(average)
    optimizers = build_optimizers(learner, config, task.layer_decay, (engine.global_rank, engine.world_size))
    if engine.sharded and (task.step.teacher or any(isinstance(o, native.Muon) for o in optimizers)):
        raise UsageError(
            "--strategy fsdp shares matrices out, which Muon and --unlabelled need whole: --optimizer adamw"
        )
    position: dict[str, Any] = {"step": 0, "seconds": 0.0, "images": 0, "sums": {}, "rows": ""}
    position |= {"best_epoch": 0, "best": {}, "train": {}}
    saved = engine.first(lambda: read_training(resumed_from) if resumed_from.exists() else None)

    def load(part: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
        like = part.state_dict()
        part.load_state_dict({name: engine.shared_out(value, like.get(name)) for name, value in state.items()})

    if saved is not None:
        try:
            position |= saved["position"]
            position["sums"] = {k: v.to(wide).to(engine.device) for k, v in position["sums"].items()}
            load(learner, saved["model"])
            for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
                for parameter, kept in optimizer.state.items():
                    kept |= {name: engine.shared_out(value, parameter) for name, value in kept.items()}
            if average is not None:
                load(average, saved["average"])
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise damaged(resumed_from, error) from error
    capture = engine.captures and config.accumulate == 1
    keep_learning_rate(optimizers, engine.device if capture else None)
    models = (model, average) if task.step.teacher else (model,)

    def show_judged() -> None:
        """Make the weights that are judged and kept whole, where they are shared out."""
        if engine.sharded:
            judged.load_state_dict(engine.whole((learner if average is None else average).state_dict()))

    def gradients(*batch: torch.Tensor) -> dict[str, torch.Tensor]:
        with engine.autocast():
            values = task.step.loss(*models, *batch)
        (values["loss"] / config.accumulate).backward()
        return {name: value.detach() for name, value in values.items()}

    def update() -> None:
        if config.clip_grad:
            nn.utils.clip_grad_norm_(learner.parameters(), config.clip_grad)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
            if isinstance(optimizer, native.Muon):
                engine.exchange(optimizer.shares)
        if average is not None:  # moves exponentially (Polyak and Juditsky 1992)
            move_average(list(average.parameters()), list(learner.parameters()), 1)

    def gradients_and_update(*batch: torch.Tensor) -> dict[str, torch.Tensor]:
        values = gradients(*batch)
        update()
        return values

    run_step = captured(gradients_and_update) if capture else gradients

    def save(better: bool = False) -> None:
        """Commit the last state, and with it the best weights if these are the best."""
        position["rows"] = log.rows
        if engine.world_size > 1:  # the file keeps one process's sums, so let them be everyone's
            position["sums"] = {name: engine.mean(value) for name, value in position["sums"].items()}
            for optimizer in optimizers:
                if isinstance(optimizer, native.Muon):
                    engine.exchange(optimizer.momenta())
        show_judged()
        state: dict[str, Any] = {}
        if engine.is_global_zero or engine.sharded:
            state = {"position": position, "model": learner.state_dict()}
            state |= {"optimizers": [o.state_dict() for o in optimizers], "average": average and average.state_dict()}
            state = engine.whole(state)
        if engine.is_global_zero:
            weights = portable(task.spec, judged.state_dict())
            files: dict[str, Any] = {f"last/{name}": content for name, content in weights.items()}
            files |= {f"best/{name}": content for name, content in weights.items()} if better else {}
            files[f"last/{TRAINING}"] = lambda place: torch.save(state, place)
            if unsent := run.commit(files, {"step": position["step"], "epoch": position["step"] // per_epoch}):
                log.line(unsent)
        engine.barrier()

    def check(loss: float, step: int) -> None:
        if not math.isfinite(loss):
            kept = (
                f"{resumed_from.parent} stands as it was before" if resumed_from.exists() else "nothing was saved yet"
            )
            rates = "--blr or --muon-lr" if isinstance(config, BlocksConfig) else "--blr"
            raise RunError(
                f"the loss is {loss} at step {step + 1} (epoch {step // per_epoch + 1}); {kept};"
                f" try a lower {rates}, --clip-grad 1, or --precision fp32"
            )

    log_folder = folder if engine.is_global_zero else None
    log = RunLog(log_folder, position["rows"], position["step"] // per_epoch, total_steps, tracker)
    if saved is not None:
        log.line(f"going on from step {position['step']} of {total_steps}")
    begun, first_step = time.perf_counter(), position["step"]
    before, shown, saved_at = position["seconds"], begun, begun
    try:
        with _stop_on_signal() as stop:
            while position["step"] < total_steps and not _stale(position, per_epoch, task.patience):
                step = position["step"]
                set_learning_rate(optimizers, schedule(step, total_steps, warmup_steps))
                learner.train()
                loss = torch.zeros((), device=engine.device)
                for part in range(config.accumulate):
                    part_of_all = engine.global_rank * config.accumulate + part
                    torch.manual_seed(part_seed(config.seed, step, part_of_all))  # for dropped paths and patches
                    batch = task.step.batch(step, part_of_all, parts)
                    with engine.apart(model) if part + 1 < config.accumulate else nullcontext():
                        values = run_step(*batch)
                    loss += values["loss"] / config.accumulate
                    for key, value in values.items():
                        part_of_sum = value.to(wide) / config.accumulate
                        position["sums"][key] = position["sums"].get(key, 0) + part_of_sum
                stopping, due = stop.is_set(), time.perf_counter() - saved_at > SAVE_SECONDS
                if (
                    engine.world_size > 1
                ):  # all go on, stop or fail together: one alone would wait for the others forever
                    told = engine.mean(
                        torch.stack([torch.full_like(loss, x) for x in (stopping, due)] + [loss])
                    ).tolist()
                    stopping, due = told[0] > 0, told[1] > 0
                    check(told[2], step)
                elif engine.device.type == "cpu":  # elsewhere the loss is looked at now and then: reading it waits
                    check(float(loss), step)
                if not capture:
                    update()
                position["step"] += 1
                position["images"] += batch_size

                now = time.perf_counter()
                position["seconds"] = before + now - begun
                if now - shown > SHOW_SECONDS or stopping:
                    shown = now
                    mean = float(position["sums"]["loss"]) / (step % per_epoch + 1)
                    check(mean, step)
                    rate = batch_size * (position["step"] - first_step) / (now - begun)
                    text = f"epoch {step // per_epoch + 1}/{config.epochs}  loss {mean:.4f}{task.note}"
                    log.step(position["step"], f"{text}  lr {_top_rate(optimizers):.2e}  {rate:.0f} images/s")
                if position["step"] % per_epoch == 0:
                    epoch = position["step"] // per_epoch
                    sums, position["sums"] = position["sums"], {}
                    position["train"] = {name: float(engine.mean(value)) / per_epoch for name, value in sums.items()}
                    check(position["train"]["loss"], step)
                    show_judged()
                    judged.eval()
                    val: dict[str, float] = {}
                    if engine.is_global_zero:  # what it finds decides for all, to the last bit
                        with torch.no_grad(), engine.autocast(), engine.alone():
                            val = task.validate(judged, epoch)
                    val = engine.broadcast(val)
                    check(val["loss"], step)  # the weights may have gone with the last update
                    better = (
                        task.keep_last or not position["best"] or _merit(task, val) > _merit(task, position["best"])
                    )
                    if better:
                        position |= {"best_epoch": epoch, "best": val}
                    position["seconds"] = before + time.perf_counter() - begun
                    rates = {"lr": _top_rate(optimizers), "images_per_s": position["images"] / position["seconds"]}
                    log.epoch(epoch, "train", **position["train"], **rates, seconds=position["seconds"])
                    log.epoch(epoch, "val", **val)
                    left = (total_steps - position["step"]) * (time.perf_counter() - begun)
                    named = {f"train {k}": v for k, v in position["train"].items()}
                    named |= {f"val {k}": v for k, v in val.items()}
                    log.line(
                        f"epoch {epoch}/{config.epochs}  " + "  ".join(f"{k} {v:.4f}" for k, v in named.items())
                        + f"{task.note}  lr {rates['lr']:.2e}  {rates['images_per_s']:.0f} images/s"
                        f"  {in_words(left / (position['step'] - first_step))} left"
                    )  # fmt: skip
                    save(better)
                    saved_at = time.perf_counter()
                elif stopping or due:
                    save()
                    saved_at = time.perf_counter()
                if stopping and position["step"] < total_steps:
                    raise Interrupted(
                        f"stopped at step {position['step']} of {total_steps} and saved in {folder};"
                        " the same command goes on from there"
                    )
    finally:
        log.close()
    task.model.load_state_dict(engine.first(lambda: load_model(folder)[0].state_dict()))
    return Outcome(
        epochs=position["step"] // per_epoch,
        best_epoch=position["best_epoch"],
        val=position["best"],
        train=position["train"],
        train_time_s=round(position["seconds"], 2),
        images_per_s=round(position["images"] / position["seconds"], 1),
    )


def _stale(position: dict[str, Any], per_epoch: int, patience: int) -> bool:
    """Whether validation has not improved for `patience` whole epochs."""
    return patience > 0 and position["step"] // per_epoch - position["best_epoch"] >= patience


def _merit(task: Task, val: Mapping[str, float]) -> tuple[float, float]:
    """Few validation images give many epochs the same accuracy, the earliest first: their losses still differ."""
    return val[task.metric] if task.higher_is_better else -val[task.metric], -val["loss"]


def _top_rate(optimizers: Any) -> float:
    return max(float(group["lr"]) for optimizer in optimizers for group in optimizer.param_groups)
