"""What a fit does with its time: batches and epochs for each training, by the measured rate of its steps."""

import dataclasses
import math
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from maelab import recipes
from maelab.config import FinetuneConfig, PretrainConfig, RunOptions
from maelab.data import Dataset, ImageSet, load, reading_of, training_sets
from maelab.data.folder import Found
from maelab.errors import RunError, UsageError
from maelab.inference import class_probabilities, classification_scores, masked_mse
from maelab.names import visible
from maelab.progress import heartbeat, in_words, say_once
from maelab.runs import Run, saved_elsewhere
from maelab.runs.commands import ENCODER
from maelab.tasks import finetune as finetuning
from maelab.tasks import pretrain as pretraining
from maelab.training.capture import WARM_UP
from maelab.training.checkpoint import read_spec
from maelab.training.loop import Interrupted, Task, train
from maelab.training.parallel import prepare, start_engine
from maelab.training.runlog import console, say

PLAN = "plan.json"
BEFORE = "before-{}"  # the autoencoder that a fit of more minutes goes on from, by the number of its fit
_TO_SPEND = 0.92  # of the time left: rates vary while others use the machine
_MANY = 10  # times the epochs of the recipe, at most, for pretraining
_DRAWING = 4.0  # seconds for the pictures and the test of each run
_STEPS = 1_000  # updates that a training should have, if smaller batches can give them
_ENOUGH = 10  # passes over the images for pretraining, below which fewer and larger patches teach more (docs/log.md)
_LARGEST_PATCH = 32  # pixels
_LEAST = 50  # updates with images without labels
_OTHERS, _EMA = 4, 0.98  # images without a label for each with one, and the average that teaches (docs/log.md)
_WITH_OTHERS = 1 + _OTHERS * (1 + 1 / 3)  # steps without them that such a step takes: the teacher only goes forward


_Stage = tuple[PretrainConfig | FinetuneConfig, int, int, float, float]  # images, validation images, and `_measure`


def _passes(stage: _Stage, seconds: float) -> float:
    """How often the images of a stage can be seen in so many seconds."""
    config, images, _, step, _ = stage
    return seconds / step * config.batch_size / images


def _fits(patch_size: int, img_size: tuple[int, int] | None, exactly: bool) -> bool:
    """Whether images of about, or exactly, this size can have such patches, at least 4 x 4 of them."""
    assert img_size is not None
    most = min(_LARGEST_PATCH, min(img_size) // 4)
    return patch_size <= most and not (exactly and any(side % patch_size for side in img_size))


def with_others(config: FinetuneConfig) -> FinetuneConfig:
    """The same training with images that have no label beside; it goes on from a classifier, so at half the rate."""
    return replace(config, unlabelled=_OTHERS, ema_decay=_EMA, muon_lr=config.muon_lr / 2, blr=config.blr / 2)


def make_plan(
    found: Found, asked: dict[str, Any], begun: float, options: RunOptions, start: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Configs that fit into the time: the recipe's, with epochs (and if need be images) by the measured rate.

    Args:
        found: what the folder holds.
        asked: what the call says.
        begun: when it began, by `time.perf_counter`.
        options: where to compute.
        start: what it goes on from, {} where nothing lies; see `maelab.fitting`.
    """
    start = start or {}
    budget = 60 * (asked["minutes"] - start.get("spent", 0))
    labelled = len(found.classes) > 1
    others = labelled and found.unlabelled >= found.labelled
    images = found.labelled + found.unlabelled
    both = ("labels", "group", "resize", "flip", "data", "seed")
    common: dict[str, Any] = {name: asked[name] for name in both if asked.get(name) is not None}
    size = tuple(asked["img_size"]) if asked.get("img_size") else None
    init = asked.get("init", "none")
    spec = None if init == "none" else read_spec(init)
    if spec is not None and spec.model != "MaskedAutoencoderViT" and not labelled:
        raise UsageError(f"--init {init} is no autoencoder, and without classes there is nothing else to do with it")
    going_on = spec if spec is not None and spec.model == "MaskedAutoencoderViT" else None
    patch = None if going_on is None else going_on.arguments["patch_size"]

    def configs(patch: int | None) -> tuple[PretrainConfig, FinetuneConfig]:
        before = recipes.pretrain_folder(images, found.side, found.grey, patch, size)
        after = recipes.finetune_folder(found.labelled, found.side, found.grey, patch, size)
        if going_on is not None:
            before = pretraining.with_shape_of(replace(before, init=init), going_on)
        if labelled:  # the same validation images, so that pretraining does not see them either
            common["val_fraction"] = after.val_fraction
        before = replace(before, **common, knn_every=0)
        shape = {field: getattr(before, field) for field in ENCODER if field != "reg_tokens"}
        return before, replace(after, **common, **shape, class_weights=asked.get("class_weights", "none"))

    before, after = configs(patch)
    given = None
    if spec is not None and going_on is None:
        given = replace(after, **recipes.FOR_FOREIGN) if saved_elsewhere(init) else after
        given = finetuning.with_encoder_of(replace(given, init=init, adapt_patch_embed="resize"), spec)

    loading = time.perf_counter()
    data = load(before.data, img_size=before.img_size, reading=reading_of(before))
    loading = time.perf_counter() - loading
    for line in data.faults:
        say_once(line, data.name)
    say(f"{recipes.explain_folder(before, images, found.side, found.channels, found.val)}; timing a few steps")

    def timed(config: PretrainConfig | FinetuneConfig, share: float) -> _Stage:
        train_set, val_set = training_sets(data, config, unlabelled=config is before)
        measured = _measure(config, data, train_set, val_set, options, budget / 20)
        smaller = _batch_size(config.batch_size, measured[0], share * budget)
        if smaller < config.batch_size:
            config = replace(config, batch_size=smaller)
            measured = _measure(config, data, train_set, val_set, options, budget / 20)
        return config, len(train_set), len(val_set), *measured

    stages = [timed(before, 0.5)]
    larger = 2 * before.patch_size
    while (
        patch is None and _passes(stages[0], budget / 2) < _ENOUGH and _fits(larger, before.img_size, size is not None)
    ):
        before, after = configs(larger)
        say(f"too little time for so many patches; {larger}x{larger} pixels each instead")
        if before.img_size != tuple(data.train.images.shape[2:]):
            data = load(before.data, img_size=before.img_size, reading=reading_of(before))
        stages, larger = [timed(before, 0.5)], 2 * larger
    if labelled:
        stages.append(timed(after, 0.25))
    if given is not None:
        stages.append(timed(given, 0.25))
    testing = [found.test * step / config.batch_size / 3 for config, _, _, step, _ in stages]  # forwards only
    testing[0] = 0.0
    times = {"pretrain": 1, "finetune": 2, "transfer": 1}  # fine-tuning comes from scratch once more
    passes = [runs for _, runs in zip(stages, times.values(), strict=False)]
    left = budget - (time.perf_counter() - begun) - (sum(passes) + others) * (loading + _DRAWING)
    left -= sum(n * each for n, each in zip(passes, testing, strict=True)) + others * testing[-1]
    left = max(1.0, _TO_SPEND * left)
    chosen: dict[str, Any] = {}
    for name, runs, stage in [*zip(times, passes, stages, strict=False)][1:]:
        chosen[name], seconds = _fitted(*stage, seconds=left / 4)
        left -= runs * seconds
    if others:
        config, n, n_val, step, beside = stages[-1]
        assert isinstance(config, FinetuneConfig)
        learned, seconds = _fitted(with_others(config), n, n_val, _WITH_OTHERS * step, beside, seconds=left / 4)
        if not learned["limit"] and learned["epochs"] * max(1, n // config.batch_size) >= _LEAST:
            chosen["unlabelled"] = {**learned, "init": "finetune"}
            left -= seconds
    # The time is there to be used, and of many epochs the best on validation is kept.
    many = replace(stages[0][0], epochs=_MANY * stages[0][0].epochs)
    chosen["pretrain"], _ = _fitted(many, *stages[0][1:], seconds=left)
    if start.get("round"):
        chosen["pretrain"]["init"] = BEFORE.format(start["round"])
    rates = {
        name: {
            "images": n, "validation_images": n_val, "images_per_s": round(config.batch_size / step, 1),
            "step_s": step, "beside_s": beside, "beside_runs_s": loading + _DRAWING + each, "epochs": config.epochs,
        }
        for name, each, (config, n, n_val, step, beside) in zip(times, testing, stages, strict=False)
    }  # fmt: skip
    return {**asked, **start, "faults": list(data.faults), "measured": rates} | chosen


def refit(plan: dict[str, Any], begun: float) -> dict[str, Any]:
    """The plan with as many epochs of fine-tuning as the time left allows, now that pretraining is over.

    They are at least half of those that were planned: where the machine became slower meanwhile, a comparison of two
    models that hardly trained would be worth nothing, and it takes longer instead.
    """
    measured = plan["measured"]["finetune"]
    left = 60 * (plan["minutes"] - plan.get("spent", 0)) - (time.perf_counter() - begun)
    seconds = _TO_SPEND * (left - 2 * measured["beside_runs_s"]) / 2
    config = FinetuneConfig(**{**plan["finetune"], "img_size": tuple(plan["finetune"]["img_size"]), "limit": None})
    config = replace(config, epochs=measured["epochs"])
    images, val_images = measured["images"], measured["validation_images"]
    step, beside = measured["step_s"], measured["beside_s"]
    chosen, _ = _fitted(config, images, val_images, step, beside, seconds=max(1.0, seconds))
    half = plan["finetune"]["epochs"] // 2
    if half > 0 and (chosen["limit"] or chosen["epochs"] < half):
        say(f"the machine became slower; {half} epochs of fine-tuning, twice, take longer than asked")
        return plan | {"finetune": {**plan["finetune"], "epochs": half}}
    if (chosen["epochs"], chosen["limit"]) != (plan["finetune"]["epochs"], plan["finetune"]["limit"]):
        say(f"{in_words(max(0.0, left))} are left: {chosen['epochs']} epochs of fine-tuning, twice")
    return plan | {"finetune": chosen}


def learn_on(plan: dict[str, Any], stage: str, begun: float | None) -> dict[str, Any]:
    """The plan with its last stage, which learns from images without a label, begun from the classifier of `stage`.

    It has as many epochs as the time left allows, at least half of those planned; where `begun` is None, those planned.
    """
    kind = "transfer" if stage == "transfer" else "finetune"
    measured, planned = plan["measured"][kind], plan["unlabelled"]["epochs"]
    size = tuple(plan[kind]["img_size"])
    config = with_others(FinetuneConfig(**{**plan[kind], "img_size": size, "limit": None, "epochs": planned}))
    chosen = dataclasses.asdict(config)
    if begun is not None:
        config = replace(config, epochs=measured["epochs"])
        left = 60 * (plan["minutes"] - plan.get("spent", 0)) - (time.perf_counter() - begun)
        seconds = max(1.0, _TO_SPEND * (left - measured["beside_runs_s"]))
        of = measured["images"], measured["validation_images"], _WITH_OTHERS * measured["step_s"], measured["beside_s"]
        chosen, _ = _fitted(config, *of, seconds=seconds)
        least = max(1, planned // 2)
        chosen |= {"limit": None, "epochs": least if chosen["limit"] else max(least, chosen["epochs"])}
    return plan | {"unlabelled": {**chosen, "init": stage}}


def _measure(
    config: PretrainConfig | FinetuneConfig,
    data: Dataset,
    train_set: ImageSet,
    val_set: ImageSet,
    options: RunOptions,
    seconds: float,
) -> tuple[float, float]:
    """Seconds of a training step, and what an epoch takes beside its steps and its validation (saving above all).

    From real epochs of one step and of four; where those would take more than `seconds`, all is put on the step."""
    engine = start_engine(options, config.precision)
    train_set, some = train_set.to(engine.device), val_set[torch.arange(min(16, len(val_set)))].to(engine.device)

    stage = "pretraining" if isinstance(config, PretrainConfig) else "fine-tuning"
    beat = heartbeat(f"timing steps of {stage}")

    def epoch(steps: int) -> float:
        if isinstance(config, PretrainConfig):
            spec, metric = pretraining.model_spec(config, data), "loss"
        else:
            spec, metric = finetuning.model_spec(config, data), "accuracy"
        torch.manual_seed(config.seed)
        model: Any = spec.build()
        prepare(model, engine, options)

        def validate(model: Any, _: int) -> dict[str, float]:
            if isinstance(config, PretrainConfig):
                return masked_mse(model, some, config.mask_ratio, config.split_seed)
            assert some.labels is not None
            return classification_scores(class_probabilities(model, some), some.labels)

        if isinstance(config, PretrainConfig):
            step = pretraining.make_step(config, train_set, model.num_patches)
        else:
            step = finetuning.make_step(config, train_set, len(data.class_names))
        times: list[float] = []

        def batch(*where: int) -> Any:
            beat(1 + where[0])
            return step.batch(*where)

        def timed(model: Any, number: int) -> dict[str, float]:
            times.append(time.perf_counter())
            return validate(model, number)

        task = Task(model, spec, steps * config.batch_size, replace(step, batch=batch), timed, metric, metric != "loss")
        with tempfile.TemporaryDirectory(prefix="maelab-fit-") as place:
            train(engine, Run(Path(place), {}), task, replace(config, epochs=WARM_UP + 2 if engine.captures else 3))
        return times[-1] - times[-2]  # the first epoch also builds and allocates, the first steps are not yet captured

    loud, console.quiet = console.quiet, True
    try:
        one = epoch(1)
        four = epoch(4) if 12 * one < seconds else 4 * one
    except Interrupted:  # what it saved is gone, so there is nothing to go on from
        raise KeyboardInterrupt from None
    finally:
        console.quiet = loud
    step = max((four - one) / 3, four / 10)  # where noise is larger than a step, rather too long
    return step, max(0.0, one - step)


def _batch_size(largest: int, step: float, seconds: float) -> int:
    """The largest power of two that leaves time for _STEPS updates, within 32 and what the recipe has.

    Few large batches teach less than many small ones: on 9,723 images, 7 epochs of pretraining in batches of 256 (266
    steps) ended at a masked MSE of 0.148 on validation, in batches of 64 (1,064 steps) at 0.110 (docs/log.md).
    """
    affordable = seconds / step * largest / _STEPS
    return min(largest, max(32, 2 ** int(math.log2(max(1.0, affordable)))))


def _fitted(
    config: PretrainConfig | FinetuneConfig, images: int, val_images: int, step: float, beside: float, *, seconds: float
) -> tuple[dict[str, Any], float]:
    """The config with as many epochs as `seconds` allow, at most the recipe's, and the seconds that they take.

    Where not even one pass over the images fits, it is one pass over fewer.
    """
    steps = max(1, images // config.batch_size)
    evaluating = step / 3 * val_images / config.batch_size  # forwards only
    epochs = int(seconds / (steps * step + beside + evaluating))
    limit = None
    if epochs < 1:
        affordable = max(1, int((seconds - beside - evaluating) / step))
        steps, epochs = min(steps, affordable), 1
        limit = min(images, steps * config.batch_size)
    epochs = min(epochs, config.epochs)
    chosen = dataclasses.asdict(replace(config, epochs=epochs, limit=limit))
    return chosen, epochs * (steps * step + beside + evaluating)


def read_configs(plan: dict[str, Any], out: Path) -> dict[str, PretrainConfig | FinetuneConfig]:
    """Stage -> its config, in order."""

    def read(stage: str, kind: Any, **more: Any) -> Any:
        config = kind(**{**plan[stage], "img_size": tuple(plan[stage]["img_size"]), **more})
        if (config.data, config.seed) != (plan["data"], plan["seed"]):
            raise ValueError(f"the images or the seed of {stage} are others")
        return config

    try:
        configs = {"pretrain": read("pretrain", PretrainConfig)}
        if "finetune" in plan:
            if "transfer" in plan:
                configs["transfer"] = read("transfer", FinetuneConfig)
            configs["finetune"] = read("finetune", FinetuneConfig, init=str(out / "pretrain"))
            configs["scratch"] = read("finetune", FinetuneConfig)
        if "unlabelled" in plan:
            if (stage := plan["unlabelled"]["init"]) not in configs:
                raise ValueError(f"unlabelled begins from {visible(str(stage))}")
            configs["unlabelled"] = read("unlabelled", FinetuneConfig, init=str(out / stage))
        if plan.get("round"):  # init is a name within the folder
            configs["pretrain"] = read("pretrain", PretrainConfig, init=str(out / plan["pretrain"]["init"]))
        if not (is_count(plan.get("spent", 0)) and type(plan.get("round", 0)) is int):
            raise ValueError("spent or round")
        explain(plan)
    except (KeyError, TypeError, ValueError, UsageError) as error:
        raise RunError(f"{out / PLAN} is damaged ({error}); --overwrite begins anew") from error
    return configs


def explain(plan: dict[str, Any]) -> str:
    said = []
    for stage in ("pretrain", "transfer", "finetune"):
        if stage in plan:
            rate, config = plan["measured"][stage], plan[stage]
            images = f"{config['limit']} of {rate['images']}" if config["limit"] else str(rate["images"])
            epochs = f"{config['epochs']} epoch{'s' * (config['epochs'] > 1)}"
            what = f"finetune {config['init']}" if stage == "transfer" else stage
            said.append(
                f"{what} {epochs} of {images} images, {config['batch_size']} at a time, at {rate['images_per_s']:g}/s"
            )
    twice = ", twice: from the pretrained encoder, and from scratch as a control" if "finetune" in plan else ""
    if "unlabelled" in plan:
        epochs = plan["unlabelled"]["epochs"]
        twice += f"; then {epochs} epoch{'s' * (epochs > 1)} with the images without labels, from the best of these"
    if any(plan[stage]["limit"] for stage in plan["measured"]):
        twice += "; too little time to see every image once, so give more --minutes"
    more = plan["minutes"] - plan.get("spent", 0)
    time_ = f"{more:g} minutes more, after {plan['spent']:g}" if plan.get("spent") else f"{more:g} minutes"
    return f"plan for {time_}: {', '.join(said)}{twice}"


def is_count(value: object) -> bool:
    """Whether JSON holds a number that can count something."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
