"""What came out of a fit, in the order in which a person asks: is it any good, what next, was pretraining worth it."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch

from maelab import figures
from maelab.config import FinetuneConfig, RunOptions
from maelab.data.batches import scale
from maelab.data.faults import FEW_TEST, UNEVEN
from maelab.data.folder import Found
from maelab.fitting.plan import with_others
from maelab.inference import class_probabilities
from maelab.model import VisionTransformer
from maelab.names import shell_word
from maelab.report import build_page
from maelab.runs.commands import command
from maelab.tasks.reconstruct import reconstruct
from maelab.training.checkpoint import load_matching_data, load_model
from maelab.training.parallel import prepare, start_engine

_MISTAKES = 24  # wrong images on the picture
_FEW_TRAINING = 100  # images of a class, below which more of them are the first thing to try
_SHRUNK = 2.0  # times as large as the model's images: details are lost
_FEW_EPOCHS = 20  # of fine-tuning, below which more time is worth a try


def judge(
    found: Found, plan: dict[str, Any], out: Path, results: dict[str, Any], options: RunOptions
) -> dict[str, Any]:
    """Say what came out, draw the pictures, and build the page with all of it on top.

    Args:
        found: what the folder holds.
        plan: the plan of the fit.
        out: its folder.
        results: stage -> content of result.json.
        options: where to compute.

    Returns:
        The content of fit.json; see `maelab.fit`.
    """
    result = _measure(found, plan, out, results)
    if result["model"]:
        with figures.optional(f"the picture {out / 'mistakes.png'} could not be drawn"):
            result["mistakes"] = _draw_mistakes(result, out / "mistakes.png", options)
    if not (picture := out / "reconstruction.png").exists():
        with figures.optional(f"the picture {picture} could not be drawn"):
            reconstruct(out / "pretrain", out=picture, options=options)
    paragraphs = _paragraphs(result, found, plan)
    result["verdict"] = "\n\n".join(paragraphs)
    with figures.optional(f"the page {out / 'report.html'} could not be built"):
        stages = [out / stage for stage in sorted(results)]
        name = Path(plan["data"].removeprefix("folder:")).name
        drawn = pictures(result)
        build_page(stages, out=out / "report.html", title=f"maelab fit: {name}", lead=paragraphs, pictures=drawn)
    return result


def pictures(result: dict[str, Any]) -> dict[str, Path]:
    """Caption -> file, of the pictures that there are."""
    drawn = {
        "test images that it gets wrong, those first of which it was surest": result["mistakes"],
        "images, what was hidden of them, and what the autoencoder makes of the rest": result["reconstruction"],
    }
    return {text: Path(file) for text, file in drawn.items() if file and Path(file).is_file()}


def _measure(found: Found, plan: dict[str, Any], out: Path, results: dict[str, Any]) -> dict[str, Any]:
    """All that is known, without words and pictures."""
    result: dict[str, Any] = {
        "fit": str(out),
        "found": {f.name: getattr(found, f.name) for f in dataclasses.fields(found)},
        "plan": plan,
        "pretrain": {
            "run": str(out / "pretrain"),
            "masked_mse": results["pretrain"]["val"]["masked_mse"],
            "mean_predictor_mse": results["pretrain"]["mean_predictor_loss"],
        },
        "reconstruction": str(out / "reconstruction.png"),
        "mistakes": None,
        "report": str(out / "report.html"),
        "model": None,
    }
    if "finetune" not in plan:
        encoder = shell_word(str(out / "pretrain"))
        return result | {
            "next": (
                "sort some images of each class into a sub-folder of its own, leave the others in a sub-folder"
                f" unlabelled/, and run maelab fit again; or maelab finetune folder --init {encoder}"
                " --data folder:LABELLED"
            )
        }
    tuned, scratch = results["finetune"], results["scratch"]
    stage = best(results)
    test = results[stage]["test"]
    names, cells = list(test["per_class"]), _cells(test)
    n = int(cells[:, 2].sum())
    a, b = tuned["test"]["accuracy"], scratch["test"]["accuracy"]
    noise = _noise(a, b, n)
    n_val = plan["measured"]["finetune"]["validation_images"]
    result |= {
        "val": {"images": n_val, "pretrained": tuned["val"]["accuracy"], "scratch": scratch["val"]["accuracy"]},
        "test": {"images": n, "pretrained": a, "scratch": b},
        "difference": a - b,
        "standard_error": noise,
        "beyond_noise": abs(a - b) > 2 * noise,
        "confused": _confused(cells, names),
        "chosen": stage,
        "model": str(out / stage),
        "next": f"maelab predict {shell_word(str(out / stage))} IMAGE...",
    }
    if "transfer" in results:
        for part in ("val", "test"):
            result[part]["transfer"] = results["transfer"][part]["accuracy"]
        own, given = max(a, b), result["test"]["transfer"]
        result["transfer"] = {"params": results["transfer"]["params"], "difference": given - own}
        result["transfer"]["standard_error"] = _noise(given, own, n)
    if "unlabelled" in results:
        for part in ("val", "test"):
            result[part]["unlabelled"] = results["unlabelled"][part]["accuracy"]
        start, after = plan["unlabelled"]["init"], result["test"]["unlabelled"]
        before = results[start]["test"]["accuracy"]
        result["unlabelled"] = {"from": start, "difference": after - before, "standard_error": _noise(after, before, n)}
    return result | _beside_guessing(cells, names)


def best(results: dict[str, Any]) -> str:
    """The stage whose classifier is best on validation, the first of equals."""
    contenders = [stage for stage in ("finetune", "scratch", "transfer", "unlabelled") if stage in results]
    scores = {stage: (results[stage]["val"]["accuracy"], -results[stage]["val"]["loss"]) for stage in contenders}
    return max(contenders, key=scores.__getitem__)


def _cells(test: dict[str, Any]) -> torch.Tensor:
    """Rows of (true class, predicted class, images), int64 (cells, 3)."""
    if "cells" in test:
        return torch.tensor(test["cells"], dtype=torch.int64).reshape(-1, 3)
    matrix = torch.tensor(test["confusion"], dtype=torch.int64)
    places = matrix.nonzero()  # (cells, 2)
    return torch.cat([places, matrix[matrix > 0][:, None]], dim=1)


def _beside_guessing(cells: torch.Tensor, names: list[str]) -> dict[str, Any]:
    """What counts on test say of a model beside always naming the commonest class there."""
    truth, guesses, images = cells.T
    of = torch.zeros(len(names), dtype=torch.int64).index_add_(0, truth, images)
    right = torch.zeros_like(of).index_add_(0, truth, images * (truth == guesses))
    n, most = int(of.sum()), int(of.argmax())
    gained, lost = int(right.sum() - right[most]), int(of[most] - right[most])  # where only one of them is right
    return {
        "accuracy": int(right.sum()) / n,
        "balanced_accuracy": float((right[of > 0] / of[of > 0]).mean()),
        "uneven": bool(of.max() > 2 * of[of > 0].min()),
        "recall": {name: int(right[k]) / int(of[k]) for k, name in enumerate(names) if of[k]},
        "guessing": 1 / len(names),
        "majority": {"class": names[most], "accuracy": int(of[most]) / n},
        # two standard errors of the difference, by McNemar (1947); nothing is said of a handful
        "better_than_guessing": None if n < FEW_TEST else gained - lost > 2 * math.sqrt(gained + lost),
    }


def _variance(accuracy: float, n: int) -> float:
    """Of a share of n images; one right and one wrong are added, so that 0 or 1 of few images is not taken as sure."""
    share = (accuracy * n + 1) / (n + 2)
    return share * (1 - share) / n


def _noise(a: float, b: float, n: int) -> float:
    """Standard error of the difference of two shares of n images."""
    return math.sqrt(_variance(a, n) + _variance(b, n))


def _confused(cells: torch.Tensor, names: list[str]) -> list[dict[str, Any]]:
    """The three most frequent mistakes: class, what it was taken for, how often."""
    wrong = cells[cells[:, 0] != cells[:, 1]]
    found = wrong[wrong[:, 2].argsort(descending=True, stable=True)[:3]].tolist()
    return [
        {"class": names[i], "taken_for": names[j], "times": times, "of": int(cells[cells[:, 0] == i, 2].sum())}
        for i, j, times in found
    ]


def _draw_mistakes(result: dict[str, Any], file: Path, options: RunOptions) -> str | None:
    """Draw test images that the chosen model gets wrong, those first of which it was surest; None if there is none."""
    if result["accuracy"] == 1:
        return None
    if file.exists():
        return str(file)
    model, spec = load_model(result["model"])
    assert isinstance(model, VisionTransformer)
    engine = start_engine(options)
    prepare(model.to(engine.device), engine, options)
    test = load_matching_data(spec, None, None).test
    assert test is not None and test.labels is not None
    with engine.autocast():
        probabilities = class_probabilities(model, test.to(engine.device)).cpu()
    sure, guesses = probabilities.max(dim=1)
    wrong = (guesses != test.labels).nonzero()[:, 0]
    if not len(wrong):
        return None
    chosen = wrong[sure[wrong].argsort(descending=True, stable=True)[:_MISTAKES]]
    shown = scale(test.images[chosen])
    figures.predictions(file, shown, test.labels[chosen].tolist(), probabilities[chosen], spec.class_names)
    return str(file)


# --------------------------------------------------------------------------------------------------------------- words


def _paragraphs(result: dict[str, Any], found: Found, plan: dict[str, Any]) -> list[str]:
    """Three short ones: is it any good, what to do next, what was pretraining worth."""
    error, trivial = result["pretrain"]["masked_mse"], result["pretrain"]["mean_predictor_mse"]
    rebuilt = (
        f"The autoencoder rebuilds hidden patches with an error of {error:.3f} on validation images, guessing the mean"
        f" image has {trivial:.3f}."
    )
    rebuilt += " So it is no better than the mean image." if error >= trivial else ""
    if not result["model"]:
        why = "has only one class" if found.classes else "has no classes"
        return [f"The folder {why}, so there is no classifier yet.", f"Next: {result['next']}.", rebuilt]
    return [_usefulness(result), _what_next(result, found, plan), f"{_worth(result, found, plan)} {rebuilt}"]


def _usefulness(result: dict[str, Any]) -> str:
    """Whether the model is any good, and what it gets wrong."""
    n, better, majority = result["test"]["images"], result["better_than_guessing"], result["majority"]
    said = f"The model is right on {result['accuracy']:.1%} of {n} test images"
    said += f"; always saying {majority['class']} would be right on {majority['accuracy']:.1%}"
    said += f", guessing on {result['guessing']:.1%}."
    if better is None:
        said += f" {n} test images are too few to say whether it is any good: {FEW_TEST} are the least."
    elif not better:
        said += " That is no better than guessing."
    if result["uneven"]:
        worst = min(result["recall"], key=result["recall"].__getitem__)
        share = f"{result['balanced_accuracy']:.1%}"
        said += f" Some classes have few test images; with each class counted alike, it is right on {share}"
        said += f", least on {worst}: {result['recall'][worst]:.1%}."
    if not result["confused"]:
        return f"{said} It made no mistake on test."
    pairs = [f"{p['class']} taken for {p['taken_for']} ({p['times']} of {p['of']})" for p in result["confused"]]
    said += f" It confuses most, on test: {', '.join(pairs)}"
    return f"{said}; mistakes.png shows the wrong ones." if result["mistakes"] else f"{said}."


def _what_next(result: dict[str, Any], found: Found, plan: dict[str, Any]) -> str:
    """What is worth a try, the likeliest first, and the command that uses the model."""
    tries = []
    epochs = plan["transfer" if result["chosen"] == "transfer" else "finetune"]["epochs"]
    recall = {name: share for name, share in result["recall"].items() if name in found.classes}
    if recall and min(recall.values()) < 1:
        worst = min(recall, key=lambda name: (recall[name], found.classes[name]))
        if found.classes[worst] < _FEW_TRAINING:
            tries.append(f"more labelled images of {worst}, which has {found.classes[worst]} to learn from")
    if result["better_than_guessing"] is None or result["test"]["images"] < 10 * FEW_TEST:
        tries.append("more images for testing, without which small differences cannot be seen")
    if any(plan[stage]["limit"] for stage in plan["measured"]):
        tries.append("more --minutes: there was no time to see every image even once")
    elif epochs < _FEW_EPOCHS:
        tries.append(f"more --minutes: there was time for {epochs} epochs of fine-tuning alone")
    height, width = plan["finetune"]["img_size"]
    if found.side >= _SHRUNK * min(height, width):
        tries.append(f"a larger --img-size: images of {found.side} pixels were scaled to {height}x{width}")
    if found.unlabelled >= found.labelled and result["better_than_guessing"] and "unlabelled" not in plan:
        config = plan["transfer" if result["chosen"] == "transfer" else "finetune"]
        config = with_others(FinetuneConfig(**{**config, "init": result["model"], "limit": None}))
        line = command({"task": "finetune", **dataclasses.asdict(config)})
        tries.append(f"what it learns from the {found.unlabelled} images without labels by {line}")
    if found.channels == 3 and plan.get("init", "none") == "none":
        tries.append("weights from larger data, if these are photographs: --init hf:facebook/dinov2-small")
    trained = found.classes.values()
    if max(trained) >= UNEVEN * min(trained) and plan.get("class_weights", "none") == "none":
        tries.append("--class-weights balanced")
    said = f"Worth a try: {'; '.join(tries)}. " if tries else ""
    return f"{said}To use it: {result['next']}"


def _worth(result: dict[str, Any], found: Found, plan: dict[str, Any]) -> str:
    """What pretraining was worth, and how that is known."""
    test, val, points = result["test"], result["val"], 100 * result["difference"]
    a, b, n = test["pretrained"], test["scratch"], test["images"]
    what = f"{'helped' if points > 0 else 'hurt'} by {abs(points):.1f} points"
    what = what if result["beyond_noise"] else "made no clear difference"
    head = f"Pretraining {what} on test (n = {n}): {a:.1%} right with it, {b:.1%}"
    head += f" for the same model trained from scratch with the same fine-tuning (epochs: {plan['finetune']['epochs']})"
    chance = f"two standard errors of the difference are {200 * result['standard_error']:.1f} points"
    if result["beyond_noise"]:
        noise = f"That is more than chance in the choice of {n} test images explains ({chance}), for one seed."
    else:
        noise = f"That is within the noise of so few test images: {chance}."
    where = "held out of your images by their content, as there is no test/" if found.held_out else "those in test/"
    given = plan["transfer"]["init"] if "transfer" in result else ""
    names = {
        "finetune": "the pretrained model",
        "scratch": "the model trained from scratch",
        "transfer": f"that of {given}",
        "unlabelled": "the model that learned from images without labels too",
    }
    said = f"Test images are {where}; they were read once per model. By validation (n = {val['images']}:"
    said += f" {val['pretrained']:.1%} with pretraining, {val['scratch']:.1%} from scratch"
    said += f", {val['transfer']:.1%} from {given}" if given else ""
    said += f", {val['unlabelled']:.1%} with images without labels" if "unlabelled" in val else ""
    said += f") {names[result['chosen']]} was chosen."
    more = _larger(result, plan) if given else ""
    more += _without_labels(result, found, plan) if "unlabelled" in test else ""
    return f"{head}. {noise} {more}{said}"


def _larger(result: dict[str, Any], plan: dict[str, Any]) -> str:
    """What the weights given by --init were worth beside the better of the own two."""
    more, config = result["transfer"], plan["transfer"]
    points, chance = 100 * more["difference"], 200 * more["standard_error"]
    what = f"{abs(points):.1f} points {'more' if points > 0 else 'less'} than the better of those two"
    sure = "more" if abs(points) > chance else "no more"
    return (
        f"Fine-tuned from {config['init']} ({more['params'] / 1e6:.1f}M parameters, epochs: {config['epochs']}) it is"
        f" {result['test']['transfer']:.1%}: {what}, {sure} than chance explains ({chance:.1f}). "
    )


def _without_labels(result: dict[str, Any], found: Found, plan: dict[str, Any]) -> str:
    """What learning from the images without labels was worth, beside the model that it began from."""
    more, names = result["unlabelled"], {"finetune": "with pretraining", "scratch": "from scratch"}
    points, chance = 100 * more["difference"], 200 * more["standard_error"]
    start = names.get(more["from"]) or f"from {plan['transfer']['init']}"
    return (
        f"Then the model trained {start}, the best on validation by then, learned from {found.unlabelled} images"
        f" without labels too (epochs: {plan['unlabelled']['epochs']}): {result['test']['unlabelled']:.1%} on test,"
        f" {abs(points):.1f} points {'more' if points > 0 else 'less'} than before,"
        f" {'more' if abs(points) > chance else 'no more'} than chance explains ({chance:.1f}). "
    )
