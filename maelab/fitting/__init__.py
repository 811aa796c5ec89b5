"""From a folder of images to a model within a given time: pretrain, fine-tune, the same from scratch, a verdict."""

import base64
import contextlib
import html
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from maelab.config import ComputeOptions, PretrainConfig, ReadingConfig, Resize, RunOptions, check_count
from maelab.data import reading_of
from maelab.data.folder import scan
from maelab.errors import RunError, UsageError
from maelab.files import read_json
from maelab.fitting.plan import BEFORE, PLAN, explain, is_count, learn_on, make_plan, read_configs, refit
from maelab.fitting.verdict import best, judge, pictures
from maelab.names import visible
from maelab.runs import find_checkpoint, open_collection, replace_collection, write_json
from maelab.runs import folder as folders
from maelab.tasks import finetune as finetuning
from maelab.tasks import pretrain as pretraining
from maelab.training.runlog import say

STAGES = ("pretrain", "transfer", "finetune", "scratch", "unlabelled")
_STARTS = {
    "pretrained": "own autoencoder",
    "scratch": "scratch",
    "transfer": "the weights given",
    "unlabelled": "the best of these, with images without labels",
}
ENTRIES = frozenset({"data", "minutes", "seed", "fingerprint", "measured", "pretrain"})
FILES = (  # all that a fit writes; the plan goes last
    "fit.json", "report.html", "reconstruction.png", "mistakes.png",
    *(f"{stage}/{file}" for stage in (*STAGES, BEFORE.format("*")) for file in folders.RUN), folders.LOCK, PLAN,
)  # fmt: skip
_LONGEST = 60 * 24 * 365  # minutes
_UNSAID: dict[str, Any] = {
    "labels": None,
    "group": None,
    "img_size": None,
    "resize": "crop",
    "init": "none",
    "flip": None,
    "class_weights": "none",
}


class Fit(dict[str, Any]):
    """What a fit came to: the content of fit.json. A notebook shows the verdict, the accuracies and the pictures."""

    def _repr_html_(self) -> str:
        parts = [f"<p>{html.escape(visible(text))}</p>" for text in self["verdict"].split("\n\n")]
        if "test" in self:
            val, test = self["val"], self["test"]
            parts.append(
                f"<table><tr><th>begins from</th><th>validation, n = {val['images']}</th>"
                f"<th>test, n = {test['images']}</th></tr>"
            )
            for start, text in _STARTS.items():
                if start in test:
                    parts.append(f"<tr><td>{text}</td><td>{val[start]:.4f}</td><td>{test[start]:.4f}</td></tr>")
            parts.append("</table>")
        for text, picture in pictures(self).items():
            data = base64.b64encode(picture.read_bytes()).decode()
            parts.append(f'<p>{text}:</p><img src="data:image/png;base64,{data}" alt="{text}">')
        for what in ("report", "model"):
            if self[what]:
                parts.append(f"<p>{what}: <code>{html.escape(visible(self[what]))}</code></p>")
        return "\n".join(parts)


def fit(
    folder: Path | str,
    *,
    minutes: float = 30,
    seed: int = 0,
    labels: str | None = None,
    group: str | None = None,
    img_size: tuple[int, int] | None = None,
    resize: Resize = "crop",
    flip: bool | None = None,
    class_weights: Literal["none", "balanced"] = "none",
    init: str = "none",
    out: Path | str | None = None,
    overwrite: bool = False,
    options: ComputeOptions | None = None,
) -> Fit:
    """Do it all for a folder of images, within a given time.

    It pretrains on every image that is not held out, fine-tunes on what has a class, and trains the same model from
    scratch with the same fine-tuning. Where at least as many images have no class as have one, the better of the two
    then learns from those as well. The best on validation is the model, and a verdict says what pretraining was worth.
    With `init`, pretraining begins from that autoencoder; any other encoder, such as one from larger data, is
    fine-tuned as it is, as a third contender. How many epochs, a measured rate of steps decides. Each stage is a run
    folder: stopped, the same call goes on; complete, it only answers again; with more minutes, its autoencoder learns
    on for the rest of them.

    Args:
        folder: images: a sub-folder for each class, those without a class in unlabelled/, or all directly in it; or a
            table with their labels, an archive, a Parquet file.
        minutes: time to spend, with what was spent on it before.
        seed: seed of initialisation, order, augmentation and masks.
        labels: table with the classes, PATH or PATH:COLUMN; None takes labels.csv or metadata.csv in the folder.
        group: keep images together on one side of every split: a column of that table, or a regular expression for
            what their paths share, such as 'video_[0-9]+'.
        img_size: height and width to train at; None is near the median of the images.
        resize: how an image comes to that size: crop cuts off what exceeds it, pad puts black around, squash distorts.
        flip: whether images are mirrored at random; None mirrors coloured ones.
        class_weights: balanced: images of rare classes weigh more in the loss, so that each class counts alike.
        init: weights to begin with: run folder or checkpoint, folder of transformers (ViT, ViTMAE, DINOv2) or hf:NAME
            from its hub, file of timm, such as hf:facebook/dinov2-small.
        out: folder for runs, page and verdict; None is runs/fit-NAME, with a number where that is another folder's.
        overwrite: begin anew where the folder holds another fit.
        options: where to compute.

    Returns:
        The content of fit.json, which a notebook shows with its pictures: "fit", "found", "plan", "pretrain" (run
        folder and masked_mse), "reconstruction" (a picture), "report", "model" (what `maelab predict` takes, None
        without classes), "verdict", "next"; and with classes "val" and "test" ("images", "pretrained", "scratch":
        accuracies), "difference" of the test accuracies, its "standard_error", "beyond_noise" (more than two of those),
        "confused" pairs of classes on test, and of the chosen model on test "accuracy", "balanced_accuracy" (mean
        recall), "recall" of each class, "majority" (the commonest class, and the accuracy of always naming it),
        "guessing" (the accuracy of naming any class alike), "uneven" (one class has over twice another's images) and
        "better_than_guessing" (than the majority; None below 30 test images); with a third contender its accuracies in
        "val" and "test", "transfer", and under that name its "params", the "difference" of its test accuracy from the
        better of the other two, and "standard_error"; where images without a class taught, "unlabelled" likewise, with
        "from", the stage whose model it began from, as the one that the "difference" is to.

    Raises:
        UsageError, RunError: see maelab.errors.
        Interrupted: after saving, on Ctrl-C or SIGTERM.
    """
    begun = time.perf_counter()
    if not 0 < minutes <= _LONGEST:
        raise UsageError(f"--minutes must be above 0 and at most {_LONGEST} (a year), got {minutes:g}")
    check_count("--seed", seed)
    folder = Path(str(folder).removeprefix("folder:")).expanduser().resolve()
    out = Path(out) if out else _default_out(folder)
    if out.resolve().is_relative_to(folder):
        raise UsageError(f"--out {out} lies among your images in {folder}; give --out a folder elsewhere")
    asked: dict[str, Any] = {"data": f"folder:{folder}", "minutes": minutes, "seed": seed, "labels": labels}
    asked |= {"group": group, "img_size": img_size and list(img_size), "resize": resize, "flip": flip}
    asked |= {"class_weights": class_weights, "init": _absolute(init)}
    found = scan(asked["data"], reading_of(ReadingConfig(labels=labels, group=group, resize=resize)))
    for line in found.lines():
        say(line)
    asked["fingerprint"] = found.fingerprint
    with open_collection(out, FILES, PLAN, ENTRIES) as there:
        runs = RunOptions(**vars(options or ComputeOptions()))
        plan = _recall(out, there, asked, overwrite)
        if fresh := not plan or plan["minutes"] < minutes:
            plan = make_plan(found, asked, begun, runs, _start_of(out, plan))
            write_json(out / PLAN, plan)
        configs = read_configs(plan, out)
        _go_on(out, plan)
        say(explain(plan))
        results: dict[str, Any] = {}
        for stage in configs:
            if stage == "finetune" and fresh:
                plan = refit(plan, begun)
                write_json(out / PLAN, plan)
                configs = read_configs(plan, out)
            if stage == "unlabelled":
                plan = learn_on(plan, best(results), begun if fresh else None)
                write_json(out / PLAN, plan)
                configs = read_configs(plan, out)
            config, place = configs[stage], replace(runs, out=out / stage)
            if isinstance(config, PretrainConfig):
                _, results[stage] = pretraining.pretrain(config, options=place, recipe="folder")
            else:
                _, results[stage] = finetuning.finetune(config, options=place, recipe="folder")
        result = Fit(judge(found, plan, out, results, runs))
        write_json(out / "fit.json", result)
    return result


def _default_out(folder: Path) -> Path:
    """runs/fit-NAME, or the first of runs/fit-NAME-2, -3, ... that is no other folder's."""
    name = folder.name if folder.is_dir() else folder.name.partition(".")[0]
    place, number = Path("runs") / f"fit-{name}", 1
    while (plan := _plan_of(place)) and plan.get("data") not in (None, f"folder:{folder}"):
        number += 1
        place = place.with_name(f"fit-{name}-{number}")
    return place


def _absolute(init: str) -> str:
    """The weights named so that they are the same from everywhere; a name of a hub or of maelab's own stays."""
    return str(Path(init).resolve()) if init != "none" and Path(init).exists() else init


def _plan_of(out: Path) -> dict[str, Any]:
    with contextlib.suppress(RunError):
        return read_json(out / PLAN)
    return {}


def _recall(out: Path, plan: dict[str, Any], asked: dict[str, Any], overwrite: bool) -> dict[str, Any]:
    """The plan that `out` holds, {} if there is none. With `overwrite`, another plan and its runs are removed.

    Raises:
        UsageError: if it is another plan, and nobody asked to replace it; or something else lies among its files.
    """
    names = {"fingerprint": "other images", "data": "other images"}
    other = []
    for name, value in asked.items():
        if name != "minutes" and (before := plan.get(name, _UNSAID.get(name))) != value:
            other.append(names.get(name) or f"--{name.replace('_', '-')} {before} instead of {value}")
    if not plan or not (other or overwrite):
        if plan and not is_count(plan.get("minutes")):
            raise RunError(f"{out / PLAN} is damaged (minutes); --overwrite begins anew")
        if plan and asked["minutes"] < plan["minutes"]:
            say(f"{out} holds a fit of {plan['minutes']:g} minutes; it stays as it is")
        return plan
    if not overwrite:
        said = ", ".join(dict.fromkeys(other))
        raise UsageError(f"{out} holds a fit with {said}; use --overwrite, or another --out")
    replace_collection(out, FILES)
    return {}


def _start_of(out: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """What a fit of more minutes goes on from: {"spent": minutes, "round": its number}; {} where nothing lies."""
    if not plan:
        return {}
    try:
        find_checkpoint(out / STAGES[0])
    except (UsageError, RunError):  # it was stopped before there was anything
        for stage in STAGES:
            if (out / stage).is_dir():
                folders.remove(out / stage, folders.RUN)
        return {"spent": plan["minutes"], "round": plan.get("round", 0)}
    return {"spent": plan["minutes"], "round": plan.get("round", 0) + 1}


def _go_on(out: Path, plan: dict[str, Any]) -> None:
    """Put the autoencoder that the plan goes on from where the plan says; the runs after it are done anew.

    Stopped at any point, the same call does the rest.
    """
    if not (round_ := plan.get("round", 0)):
        return
    before = out / BEFORE.format(round_)
    if not before.exists():
        for stage in STAGES[1:]:
            if (out / stage).is_dir():
                folders.remove(out / stage, folders.RUN)
        for file in ("fit.json", "report.html", "reconstruction.png", "mistakes.png"):
            (out / file).unlink(missing_ok=True)
        (out / STAGES[0]).rename(before)  # the last step: what is not there yet is begun again
    if (older := out / BEFORE.format(round_ - 1)).is_dir():
        folders.remove(older, folders.RUN, keep=())
        with contextlib.suppress(OSError):
            older.rmdir()
