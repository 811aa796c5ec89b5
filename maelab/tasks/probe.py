"""Probing: how good are frozen features? k-nearest neighbours and a linear classifier tell."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from maelab import figures
from maelab.config import ProbeConfig, RunOptions
from maelab.data import training_sets
from maelab.data.batches import batch_index, rank_slice, to_device
from maelab.errors import UsageError
from maelab.inference import classification_scores, extract_features, knn_accuracy
from maelab.model import VisionTransformer
from maelab.runs import check_out, read_metrics
from maelab.training.checkpoint import ModelSpec, load_matching_data, load_model
from maelab.training.loop import Step, Task, train
from maelab.training.parallel import prepare, start_engine
from maelab.training.ranks import in_processes
from maelab.training.runlog import environment, open_task, say
from maelab.training.trackers import log_outcome


@in_processes
def probe(
    config: ProbeConfig, *, options: RunOptions | None = None, recipe: str = "custom"
) -> tuple[Path, dict[str, Any]]:
    """Judge frozen features by k-NN and a linear classifier.

    They are standardised by their training mean and deviation (as the batch norm without affine parameters of He et al.
    2021, section A.1).

    Args:
        config: what to judge, on what.
        options: where to run, and where to keep it.
        recipe: a name for the default run folder.

    Returns:
        The run folder and the content of its result.json: for val and test the accuracy of both.

    Raises:
        UsageError, RunError: see maelab.errors.
        Interrupted: after saving, on Ctrl-C or SIGTERM.
    """
    options = options or RunOptions()
    check_out(options)
    model, encoder = load_model(config.init)
    if not isinstance(model, VisionTransformer):
        raise UsageError(f"{config.init} is a linear probe; name the run that it judged")
    engine = start_engine(options, config.precision)
    if config.pool == "token" and not model.num_prefix_tokens:
        raise UsageError(f"{config.init} has no class token; use --pool avg")
    data = load_matching_data(encoder, None if config.data == "same" else config.data, options.data_dir)
    if data.train.labels is None or data.test is None:
        raise UsageError(f"{data.name} has no labels to probe with")
    hardware = prepare(model, engine, options)
    begun_from = environment(hardware, data.checksums, model)
    with open_task(engine, "probe", recipe, config, options, begun_from, data.listing) as (run, tracker):
        folder = run.folder
        if run.result:
            return folder, run.result
        parts = {"train": training_sets(data, config, config.label_fraction)[0]}
        parts |= {"val": training_sets(data, config)[1], "test": data.test}
        say(f"probe {config.init} on {data.name}: {len(parts['train'])} images; {hardware}; {folder}")
        model.to(engine.device)
        with engine.autocast():
            features = {k: extract_features(model, v.to(engine.device), config.pool) for k, v in parts.items()}
        mean, deviation = features["train"].mean(dim=0), features["train"].std(dim=0) + 1e-6
        labels = {k: v.labels.to(engine.device) for k, v in parts.items() if v.labels is not None}

        def neighbours(part: str) -> float:
            return knn_accuracy(features["train"], labels["train"], features[part], labels[part], config.neighbours)

        torch.manual_seed(config.seed)
        arguments: dict[str, Any] = {"in_features": model.embed_dim, "out_features": len(data.class_names)}
        linear = nn.Linear(**arguments)
        nn.init.zeros_(linear.weight)

        def logits(linear: Any, rows: torch.Tensor) -> torch.Tensor:
            return linear((rows - mean) / deviation).float()

        def batch(step: int, part: int, parts: int) -> tuple[torch.Tensor, torch.Tensor]:
            index = rank_slice(batch_index(len(labels["train"]), config.batch_size, config.seed, step), part, parts)
            index = to_device(index, engine.device)
            return features["train"][index], labels["train"][index]

        def loss(linear: Any, rows: torch.Tensor, truth: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": F.cross_entropy(logits(linear, rows), truth)}

        def scores(linear: Any, part: str) -> dict[str, float]:
            return classification_scores(logits(linear, features[part]).softmax(dim=1), labels[part])

        task = Task(
            model=linear,
            spec=ModelSpec("Linear", arguments, data.name, data.class_names, reading=data.reading),
            items=len(parts["train"]),
            step=Step(batch, loss),
            validate=lambda linear, epoch: scores(linear, "val"),
            metric="accuracy",
            higher_is_better=True,
        )
        outcome = train(engine, run, task, config, tracker)
        with torch.no_grad(), engine.autocast():
            test = {"knn_accuracy": neighbours("test"), **scores(linear, "test")}
            val = {"knn_accuracy": neighbours("val"), **outcome.val}
        result = {
            "task": "probe",
            "data": data.name,
            "init": config.init,
            "seed": config.seed,
            "epochs": outcome.epochs,
            "train_images": len(parts["train"]),
            "test": test,
            "val": val,
            "best_epoch": outcome.best_epoch,
            "train_time_s": outcome.train_time_s,
            "images_per_s": outcome.images_per_s,
        }
        if engine.is_global_zero:
            with figures.optional("the picture curves.png could not be drawn"):
                figures.curves(run.figure("curves"), read_metrics(folder), outcome.best_epoch)
            with figures.optional("the tracker did not get the whole outcome"):
                log_outcome(tracker, folder, result)
            run.finish(result)
        return folder, result
