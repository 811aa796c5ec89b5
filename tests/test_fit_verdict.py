"""What `maelab fit` plans and concludes, from rates and results whose numbers all differ, without training anything."""

import math
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from maelab import fit, recipes
from maelab.config import FinetuneConfig, RunOptions
from maelab.data import load, training_sets
from maelab.data.folder import Found, scan
from maelab.errors import UsageError

# ------------------------------------------------------------------------------------------------------------- verdict


def found(**changes: Any) -> Found:
    return Found(
        **{
            "classes": {"cat": 700, "dog": 640, "ship": 600}, "unlabelled": 30, "val": 0, "test": 400, "held_out": True,
            "side": 40, "smallest": (30, 32), "largest": (50, 60), "modes": {"RGB": 2370}, "animated": 0, "broken": (),
            "ignored": {}, "notes": (), "fingerprint": "f", **changes,
        }
    )  # fmt: skip


def outcome(val: float, val_loss: float, confusion: list[list[int]]) -> dict[str, Any]:
    """What a fine-tuning run says; its accuracy on test follows from the confusion."""
    right, n = sum(confusion[i][i] for i in range(3)), sum(map(sum, confusion))
    return {
        "val": {"accuracy": val, "loss": val_loss},
        "train": {"accuracy": 0.99, "loss": 0.01},
        "test": {
            "accuracy": right / n,
            "loss": 1.5,
            "per_class": {"cat": 0.1, "dog": 0.2, "ship": 0.3},
            "confusion": confusion,
        },
    }


def counts(wrong: int, of: int = 400) -> list[list[int]]:
    """So many mistakes, cats taken for ships."""
    return [[of - wrong - 30, 0, wrong], [0, 20, 0], [0, 0, 10]]


PLAN: dict[str, Any] = {
    "minutes": 3,
    "measured": {
        "pretrain": {"images": 1970, "images_per_s": 9.0},
        "finetune": {"images": 1840, "validation_images": 97},
    },
    "pretrain": {"limit": None, "epochs": 4},
    "finetune": {"limit": None, "epochs": 6},
}


def judge(tuned: dict[str, Any], scratch: dict[str, Any], out: Path, **changes: Any) -> dict[str, Any]:
    """The verdict on runs of which only the results are there, so that the picture and the page are left out."""
    pretrain = {"val": {"masked_mse": 0.125, "loss": 0.25}, "train": {"masked_mse": 0.0625}, "mean_predictor_loss": 0.5}
    results = {"pretrain": pretrain, "finetune": tuned, "scratch": scratch}
    return fit._judge(found(), {**PLAN, **changes}, out, results, RunOptions())


def test_every_number_of_a_verdict_comes_from_its_place(tmp_path, capsys):
    confusion = [[151, 29, 20], [5, 95, 0], [60, 0, 40]]
    result = judge(outcome(0.81, 0.5, confusion), outcome(0.77, 0.4, counts(200)), tmp_path)
    assert result["pretrain"] == {"run": str(tmp_path / "pretrain"), "masked_mse": 0.125, "mean_predictor_mse": 0.5}
    assert result["val"] == {"images": 97, "pretrained": 0.81, "scratch": 0.77}
    assert result["test"] == {"images": 400, "pretrained": 286 / 400, "scratch": 0.5}
    assert result["difference"] == pytest.approx(86 / 400) and result["beyond_noise"]
    shares = [(286 + 1) / 402, (200 + 1) / 402]
    assert result["standard_error"] == pytest.approx(math.sqrt(sum(p * (1 - p) / 400 for p in shares)))
    assert result["confused"] == [
        {"class": "ship", "taken_for": "cat", "times": 60, "of": 100},
        {"class": "cat", "taken_for": "dog", "times": 29, "of": 200},
        {"class": "cat", "taken_for": "ship", "times": 20, "of": 200},
    ]
    assert result["model"] == str(tmp_path / "finetune") and result["found"]["unlabelled"] == 30
    for said in (
        "Pretraining helped by 21.5 points on test (n = 400): 71.5% right with it, 50.0% for the same model",
        "(epochs: 6)",
        "That is more than chance in the choice of 400 test images explains",
        f"two standard errors of the difference are {200 * result['standard_error']:.1f} points",
        "By validation (n = 97: 81.0% with pretraining, 77.0% from scratch) the pretrained model was chosen.",
        "It confuses most, on test: ship taken for cat (60 of 100), cat taken for dog (29 of 200), cat taken",
        "error of 0.125 on validation images, guessing the mean image has 0.500.",
    ):
        assert said in result["verdict"], said
    assert "give more --minutes" not in result["verdict"] and "could not be drawn" in capsys.readouterr().err


def test_a_verdict_begins_with_whether_the_model_is_any_good(tmp_path):
    """The commonest class is the cat: 190 of 200 images, 12 of 20, or a third."""

    def begins(confusion: list[list[int]]) -> tuple[bool | None, str]:
        result = judge(outcome(0.8, 0.5, confusion), outcome(0.7, 0.5, confusion), tmp_path)
        assert result["accuracy"] == pytest.approx(sum(confusion[k][k] for k in range(3)) / sum(map(sum, confusion)))
        return result["better_than_guessing"], result["verdict"].split(" Pretraining ")[0]

    better, said = begins([[190, 0, 0], [5, 1, 0], [4, 0, 0]])
    assert better is False and said == (
        "The model is right on 95.5% of 200 test images; always saying cat would be right on 95.0%. That is no better"
        " than guessing. Classes are uneven; each counted alike, it is right on 38.9%, least on ship: 0.0%."
    )
    better, said = begins([[10, 2, 0], [0, 4, 0], [0, 0, 4]])
    assert better is None and "20 test images are too few to say whether it is any good: 30 are the least." in said
    assert begins([[30, 2, 2], [1, 30, 2], [2, 1, 30]]) == (
        True, "The model is right on 90.0% of 100 test images; always saying cat would be right on 34.0%."
    )  # fmt: skip
    # 9 images gained and 1 lost are beyond two standard errors, 5 gained and 1 lost are not
    assert begins([[49, 1, 0], [41, 9, 0], [0, 0, 0]])[0] and not begins([[49, 1, 0], [45, 5, 0], [0, 0, 0]])[0]


def test_an_autoencoder_worse_than_the_mean_is_called_that(tmp_path):
    pretrain = {"val": {"masked_mse": 0.5}, "mean_predictor_loss": 0.5}
    results = {"pretrain": pretrain, "finetune": outcome(0.7, 1, counts(9)), "scratch": outcome(0.7, 1, counts(9))}
    said = fit._judge(found(), PLAN, tmp_path, results, RunOptions())["verdict"]
    assert said.endswith("guessing the mean image has 0.500. So it is no better than the mean image.")


def test_the_model_is_chosen_by_validation_whatever_the_test_says(tmp_path):
    better, worse = counts(40), counts(300)
    result = judge(outcome(0.7, 0.1, better), outcome(0.8, 0.9, worse), tmp_path)
    assert (
        result["chosen"] == "scratch" and result["model"].endswith("scratch") and result["confused"][0]["times"] == 300
    )
    assert (
        "the model trained from scratch was chosen" in result["verdict"]
        and "helped by 65.0 points" in result["verdict"]
    )
    result = judge(outcome(0.8, 0.9, worse), outcome(0.7, 0.1, better), tmp_path)
    assert (
        result["chosen"] == "finetune"
        and result["model"].endswith("finetune")
        and result["confused"][0]["times"] == 300
    )
    assert "hurt by 65.0 points" in result["verdict"] and "the pretrained model was chosen" in result["verdict"]


def test_where_validation_accuracies_are_equal_the_smaller_loss_decides(tmp_path):
    for tuned, scratch, chosen in ((0.4, 0.5, "finetune"), (0.5, 0.4, "scratch"), (0.5, 0.5, "finetune")):
        result = judge(outcome(0.75, tuned, counts(40)), outcome(0.75, scratch, counts(50)), tmp_path)
        assert result["chosen"] == chosen


@pytest.mark.parametrize("errors", [0.9, 1.5, 1.95, 2.05, 3.0])
def test_a_difference_is_beyond_noise_from_two_standard_errors_on(errors, tmp_path):
    """A page of a million test images: there a share can be at any distance."""
    n = 1_000_000
    error = math.sqrt(2 * 0.25 / n)
    for sign in (1, -1):
        wrong = round(n * (0.5 - sign * errors * error))
        result = judge(outcome(0.7, 1, counts(wrong, n)), outcome(0.7, 1, counts(n // 2, n)), tmp_path)
        assert result["difference"] == pytest.approx(sign * errors * error, rel=0.01)
        assert result["beyond_noise"] is (errors > 2)
        verdict = "helped" if sign > 0 else "hurt"
        assert f"Pretraining {verdict if errors > 2 else 'made no clear difference'}" in result["verdict"]


def test_the_noise_is_of_both_accuracies(tmp_path):
    sure = judge(outcome(0.7, 1, counts(0)), outcome(0.7, 1, counts(200)), tmp_path)["standard_error"]
    unsure = judge(outcome(0.7, 1, counts(200)), outcome(0.7, 1, counts(200)), tmp_path)["standard_error"]
    same = judge(outcome(0.7, 1, counts(200)), outcome(0.7, 1, counts(0)), tmp_path)["standard_error"]
    assert sure == pytest.approx(same) and unsure == pytest.approx(math.sqrt(2) * 0.025, rel=0.01)
    assert sure == pytest.approx(0.025, rel=0.02)


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_verdict_says_when_not_every_image_was_seen(stage, tmp_path):
    changes = {stage: {**PLAN[stage], "limit": 50}}
    result = judge(outcome(0.7, 1, counts(9)), outcome(0.7, 1, counts(9)), tmp_path, **changes)
    assert result["verdict"].endswith("has 0.500.") and "see every image even once: give more --mi" in result["verdict"]


def test_the_picture_and_the_page_are_of_the_runs_and_computed_as_asked(tmp_path, monkeypatch):
    drawn: list[Any] = []
    monkeypatch.setattr(fit, "reconstruct", lambda *given, **more: drawn.append((given, more)))
    monkeypatch.setattr(fit, "report", lambda *given, **more: drawn.append((given, more)))
    options = RunOptions(threads=3, attention="fused")
    pretrain = {"val": {"masked_mse": 0.125}, "mean_predictor_loss": 0.5}
    results = {"pretrain": pretrain, "finetune": outcome(0.7, 1, counts(9)), "scratch": outcome(0.7, 1, counts(9))}
    result = fit._judge(found(), PLAN, tmp_path, results, options)
    assert drawn == [
        ((tmp_path / "pretrain",), {"out": tmp_path / "reconstruction.png", "options": options}),
        (([tmp_path / stage for stage in ("finetune", "pretrain", "scratch")],), {"out": tmp_path / "report.html"}),
    ]
    assert (result["reconstruction"], result["report"]) == tuple(str(more["out"]) for _, more in drawn)


# ---------------------------------------------------------------------------------------------------------------- plan


@pytest.fixture
def planned(cifar_folder, monkeypatch):
    """Makes a plan for 200 images in ten classes, on a machine that takes `step` seconds for an image in a step and
    `beside` for an epoch, and after some seconds that have passed."""

    def plan(
        minutes: float, step: float = 0.01, beside: float = 0.5, waited: float = 0, **changes: Any
    ) -> dict[str, Any]:
        asked = {"data": f"folder:{cifar_folder}", "minutes": minutes, "seed": 7, "fingerprint": "x"}
        measured: list[Any] = []

        def measure(config: Any, *more: Any) -> tuple[float, float]:
            measured.append((config, *more))
            return step * config.batch_size, beside

        monkeypatch.setattr(fit, "_measure", measure)
        seen = replace(scan(asked["data"]), **changes)
        begun = time.perf_counter() - waited
        return fit._plan(seen, asked, begun, RunOptions()) | {"calls": measured}

    return plan


def parts(plan: dict[str, Any], cifar_folder: Path, stage: str) -> tuple[int, int]:
    config = FinetuneConfig(data="x", val_fraction=plan[stage]["val_fraction"], split_seed=plan[stage]["split_seed"])
    train, val = training_sets(load(f"folder:{cifar_folder}", img_size=(32, 32)), config)
    return len(train), len(val)


def seconds(plan: dict[str, Any], stage: str, epochs: int, step: float, beside: float) -> float:
    """How long so many epochs take: steps, what is beside them, and forwards of the validation images."""
    batch, measured = plan[stage]["batch_size"], plan["measured"][stage]
    steps = max(1, measured["images"] // batch)
    return epochs * (steps * step * batch + beside + step * batch / 3 * measured["validation_images"] / batch)


@pytest.mark.parametrize("minutes", [3.0, 8.0, 20.0])
def test_a_plan_takes_the_time_it_was_given_and_no_more(planned, minutes):
    """92% of what is left, less 4 s for the pictures of each of three runs; half of it pretrains, a quarter each
    fine-tunes twice, and what the recipe's limit of epochs leaves over goes to pretraining."""
    plan = planned(minutes, waited=30.0)
    budget = 0.92 * (60 * minutes - 30 - 3 * 4)
    twice = seconds(plan, "finetune", plan["finetune"]["epochs"], 0.01, 0.5)
    one_more = seconds(plan, "finetune", plan["finetune"]["epochs"] + 1, 0.01, 0.5)
    assert twice <= budget / 4 and (one_more > budget / 4 - 2 or plan["finetune"]["epochs"] == 60)
    before = seconds(plan, "pretrain", plan["pretrain"]["epochs"], 0.01, 0.5)
    assert before + 2 * twice <= budget
    one_more = seconds(plan, "pretrain", plan["pretrain"]["epochs"] + 1, 0.01, 0.5)
    assert one_more + 2 * twice > budget - 3 or plan["pretrain"]["epochs"] == 4_000


def test_stages_share_seed_split_and_shape(planned, cifar_folder):
    """Of 6,000 images, of which 200 have a class, the recipes alone would differ in all of these."""
    plan = planned(8.0, unlabelled=5_800)
    before, after = plan["pretrain"], plan["finetune"]
    assert (before["embed_dim"], after["embed_dim"]) == (192, 192)
    for field in ("data", "seed", "val_fraction", "split_seed", "img_size", "patch_size", "depth", "num_heads"):
        assert before[field] == after[field], field
    assert before["seed"] == 7 and before["knn_every"] == 0 and before["img_size"] == (32, 32)
    assert before["val_fraction"] == recipes.finetune_folder(180).val_fraction == 0.2
    for stage in ("pretrain", "finetune"):
        rate = plan["measured"][stage]
        assert (rate["images"], rate["validation_images"]) == parts(plan, cifar_folder, stage)
        assert rate["images_per_s"] == 100.0 and plan[stage]["limit"] is None


def test_a_plan_keeps_grey_images_as_they_are(planned):
    for channels, mirrored in ((1, False), (3, True)):
        plan = planned(8.0, channels=channels)
        assert plan["pretrain"]["flip"] is plan["finetune"]["flip"] is mirrored


def test_unlabelled_images_are_counted_for_pretraining_alone(cifar_folder, tmp_path, monkeypatch):
    root = Path(shutil.copytree(cifar_folder, tmp_path / "own"))
    (root / "dog").rename(root / "unlabelled")
    asked = {"data": f"folder:{root}", "minutes": 8.0, "seed": 0, "fingerprint": "x"}
    monkeypatch.setattr(fit, "_measure", lambda *_: (0.1, 0.5))
    plan = fit._plan(scan(asked["data"]), asked, time.perf_counter(), RunOptions())
    assert plan["measured"]["pretrain"]["images"] == plan["measured"]["finetune"]["images"] + 20


def test_batches_shrink_until_a_thousand_steps_fit(planned):
    """200 images at 0.01 s each, in batches of 16: never larger than the recipe's, never below 32 unless it is."""
    assert planned(8.0)["pretrain"]["batch_size"] == 16
    for minutes, before, after in ((200.0, 256, 256), (30.0, 64, 32), (50.0, 128, 64), (2.0, 32, 32)):
        plan = planned(minutes, unlabelled=300_000, classes={"a": 30_000, "b": 30_000})
        assert (plan["pretrain"]["batch_size"], plan["finetune"]["batch_size"]) == (before, after), minutes
        sizes = [config.batch_size for config, *_ in plan["calls"]]
        assert sizes == [256, before, 256, after] or before == 256, "measured again at the size that it will have"


def test_measuring_may_take_a_twentieth_of_the_time(planned):
    assert {call[-1] for call in planned(8.0)["calls"]} == {8.0 * 60 / 20}


def test_without_classes_all_the_time_is_for_pretraining(planned, cifar_folder):
    plan = planned(8.0, classes={})
    assert "finetune" not in plan
    budget = 0.92 * (60 * 8 - 4)
    assert seconds(plan, "pretrain", plan["pretrain"]["epochs"] + 1, 0.01, 0.5) > budget - 2


@pytest.mark.parametrize("minutes", [0.0, -1.0, math.inf, math.nan])
def test_minutes_are_a_number_above_0(minutes, cifar_folder, tmp_path):
    with pytest.raises(UsageError, match="--minutes must be above 0 and at most 525600"):
        fit.fit(cifar_folder, minutes=minutes, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_each_stage_has_its_own_config_and_only_one_its_weights(planned, tmp_path):
    """As plan.json is read back: lists for tuples."""
    plan = planned(8.0)
    for stage in ("pretrain", "finetune"):
        plan[stage]["img_size"] = list(plan[stage]["img_size"])
    configs = fit._configs(plan, tmp_path)
    tuned, scratch = configs["finetune"], configs["scratch"]
    assert isinstance(tuned, FinetuneConfig) and isinstance(scratch, FinetuneConfig)
    assert tuned.init == str(tmp_path / "pretrain") and scratch == replace(tuned, init="none")
    assert configs["pretrain"].epochs == plan["pretrain"]["epochs"] and tuned.epochs == plan["finetune"]["epochs"]
