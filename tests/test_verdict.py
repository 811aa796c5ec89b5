"""What `maelab fit` concludes, from results whose numbers all differ, without training anything."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from maelab import recipes
from maelab.config import RunOptions
from maelab.data.folder import Found
from maelab.fitting import verdict
from maelab.inference import scores_by_class

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
    "data": "folder:/images",
    "measured": {
        "pretrain": {"images": 1970, "images_per_s": 9.0},
        "finetune": {"images": 1840, "validation_images": 97},
    },
    "pretrain": {"limit": None, "epochs": 4},
    "finetune": {"limit": None, "epochs": 6, "img_size": [32, 32]},
}


def judge(tuned: dict[str, Any], scratch: dict[str, Any], out: Path, **changes: Any) -> dict[str, Any]:
    """The verdict on runs of which only the results are there, so that the picture and the page are left out."""
    pretrain = {"val": {"masked_mse": 0.125, "loss": 0.25}, "train": {"masked_mse": 0.0625}, "mean_predictor_loss": 0.5}
    results = {"pretrain": pretrain, "finetune": tuned, "scratch": scratch}
    return verdict.judge(found(), {**PLAN, **changes}, out, results, RunOptions())


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
    assert "even once" not in result["verdict"] and "could not be drawn" in capsys.readouterr().err


def test_a_verdict_begins_with_whether_the_model_is_any_good(tmp_path):
    """The commonest class is the cat: 190 of 200 images, 12 of 20, or a third."""

    def begins(confusion: list[list[int]]) -> tuple[bool | None, str]:
        result = judge(outcome(0.8, 0.5, confusion), outcome(0.7, 0.5, confusion), tmp_path)
        assert result["accuracy"] == pytest.approx(sum(confusion[k][k] for k in range(3)) / sum(map(sum, confusion)))
        return result["better_than_guessing"], result["verdict"].split(" It confuses most")[0]

    better, said = begins([[190, 0, 0], [5, 1, 0], [4, 0, 0]])
    assert better is False and said == (
        "The model is right on 95.5% of 200 test images; always saying cat would be right on 95.0%, guessing on 33.3%."
        " That is no better than guessing. Some classes have few test images; with each class counted alike, it is"
        " right on 38.9%, least on ship: 0.0%."
    )
    better, said = begins([[10, 2, 0], [0, 4, 0], [0, 0, 4]])
    assert better is None and "20 test images are too few to say whether it is any good: 30 are the least." in said
    assert begins([[30, 2, 2], [1, 30, 2], [2, 1, 30]]) == (
        True, "The model is right on 90.0% of 100 test images; always saying cat would be right on 34.0%, guessing"
        " on 33.3%."
    )  # fmt: skip
    # 9 images gained and 1 lost are beyond two standard errors, 5 gained and 1 lost are not
    assert begins([[49, 1, 0], [41, 9, 0], [0, 0, 0]])[0] and not begins([[49, 1, 0], [45, 5, 0], [0, 0, 0]])[0]


def test_an_autoencoder_worse_than_the_mean_is_called_that(tmp_path):
    pretrain = {"val": {"masked_mse": 0.5}, "mean_predictor_loss": 0.5}
    results = {"pretrain": pretrain, "finetune": outcome(0.7, 1, counts(9)), "scratch": outcome(0.7, 1, counts(9))}
    said = verdict.judge(found(), PLAN, tmp_path, results, RunOptions())["verdict"]
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


def test_a_third_contender_is_chosen_by_validation_too(tmp_path):
    given = {"init": "hf:name", "epochs": 5}
    pretrain = {"val": {"masked_mse": 0.125}, "mean_predictor_loss": 0.5}
    tuned, scratch = outcome(0.9, 0.4, counts(20)), outcome(0.8, 0.4, counts(40))
    for val, chosen in ((0.95, "transfer"), (0.85, "finetune"), (0.9, "finetune")):
        third = outcome(val, 0.4, counts(10)) | {"params": 22_100_000}
        results = {"pretrain": pretrain, "finetune": tuned, "scratch": scratch, "transfer": third}
        result = verdict.judge(found(), {**PLAN, "transfer": given}, tmp_path, results, RunOptions())
        assert result["chosen"] == chosen and result["test"]["transfer"] == 0.975 and result["val"]["transfer"] == val
        assert result["transfer"]["difference"] == pytest.approx(0.025)
        # two standard errors: 0.975 and 0.95 of 400, one right and one wrong added
        noise = 2 * sum(p * (1 - p) / 400 for p in (391 / 402, 381 / 402)) ** 0.5
        said = result["verdict"]
        assert f"2.5 points more than the better of those two, no more than chance explains ({100 * noise:.1f})" in said
        assert "Fine-tuned from hf:name (22.1M parameters, epochs: 5) it is 97.5%" in said
        assert ("that of hf:name was chosen" in said) is (chosen == "transfer")
        assert f", {val:.1%} from hf:name)" in said


def test_what_images_without_labels_taught_is_compared_with_the_model_before(tmp_path):
    pretrain = {"val": {"masked_mse": 0.125}, "mean_predictor_mse": 0.5, "mean_predictor_loss": 0.5}
    tuned, scratch = outcome(0.8, 0.4, counts(20)), outcome(0.9, 0.4, counts(40))
    for val, chosen in ((0.95, "unlabelled"), (0.85, "scratch"), (0.9, "scratch")):
        results = {"pretrain": pretrain, "finetune": tuned, "scratch": scratch}
        results["unlabelled"] = outcome(val, 0.4, counts(10))
        plan = {**PLAN, "unlabelled": {"init": "scratch", "epochs": 7}}
        result = verdict.judge(found(unlabelled=2_000), plan, tmp_path, results, RunOptions())
        assert (
            result["chosen"] == chosen and result["test"]["unlabelled"] == 0.975 and result["val"]["unlabelled"] == val
        )
        assert result["unlabelled"]["from"] == "scratch"
        assert result["unlabelled"]["difference"] == pytest.approx(0.075)
        noise = 2 * sum(p * (1 - p) / 400 for p in (391 / 402, 361 / 402)) ** 0.5
        said = result["verdict"]
        assert (
            "Then the model trained from scratch, the best on validation by then, learned from 2000 images without"
            " labels too (epochs: 7): 97.5% on test, 7.5 points more than before, more than chance explains"
            f" ({100 * noise:.1f})"
        ) in said
        assert ("images without labels too was chosen" in said) is (chosen == "unlabelled")
        assert f", {val:.1%} with images without labels)" in said and "learns from the 2000 images" not in said


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
    assert result["verdict"].endswith("has 0.500.") and "no time to see every image even once" in result["verdict"]


def test_the_picture_and_the_page_are_of_the_runs_and_computed_as_asked(tmp_path, monkeypatch):
    drawn: list[Any] = []
    monkeypatch.setattr(verdict, "reconstruct", lambda *given, **more: drawn.append((given, more)))
    monkeypatch.setattr(verdict, "build_page", lambda *given, **more: drawn.append((given, more)))
    options = RunOptions(threads=3, attention="fused")
    pretrain = {"val": {"masked_mse": 0.125}, "mean_predictor_loss": 0.5}
    results = {"pretrain": pretrain, "finetune": outcome(0.7, 1, counts(9)), "scratch": outcome(0.7, 1, counts(9))}
    result = verdict.judge(found(), PLAN, tmp_path, results, options)
    (_, picture), ((stages,), page) = drawn
    assert picture == {"out": tmp_path / "reconstruction.png", "options": options}
    assert stages == [tmp_path / stage for stage in ("finetune", "pretrain", "scratch")]
    assert (page["out"], page["title"]) == (tmp_path / "report.html", "maelab fit: images")
    assert page["lead"] == result["verdict"].split("\n\n") and len(page["lead"]) == 3
    assert (result["reconstruction"], result["report"]) == tuple(str(more["out"]) for _, more in drawn)


# ---------------------------------------------------------------------------------------------------------- paragraphs


def said_of(confusion: list[list[int]], tmp_path: Path, seen: Found | None = None, **changes: Any) -> list[str]:
    results = {
        "pretrain": {"val": {"masked_mse": 0.125}, "mean_predictor_loss": 0.5},
        "finetune": outcome(0.8, 0.5, confusion),
        "scratch": outcome(0.7, 0.5, confusion),
    }
    return verdict.judge(seen or found(), {**PLAN, **changes}, tmp_path, results, RunOptions())["verdict"].split("\n\n")


def test_three_paragraphs_answer_in_the_order_in_which_a_person_asks(tmp_path):
    good, following, worth = said_of([[100, 20, 0], [30, 90, 0], [0, 0, 120]], tmp_path)
    assert good.startswith("The model is right on 86.1% of 360 test images") and "dog taken for cat (30 of 120)" in good
    assert following.startswith("Worth a try: ") and following.endswith(f"maelab predict {tmp_path}/finetune IMAGE...")
    assert worth.startswith("Pretraining made no clear difference") and worth.endswith("mean image has 0.500.")
    assert all(len(part.split(". ")) <= 7 for part in (good, following, worth))


def test_what_to_do_next_follows_from_the_figures(tmp_path):
    small = found(classes={"cat": 700, "dog": 12, "ship": 600}, side=200)
    confusion = [[400, 0, 0], [30, 5, 0], [0, 0, 300]]
    following = said_of(confusion, tmp_path, small)[1]
    assert "more labelled images of dog, which has 12 to learn from" in following
    assert "a larger --img-size: images of 200 pixels were scaled to 32x32" in following
    assert "there was time for 6 epochs of fine-tuning alone" in following and "--class-weights balanced" in following
    assert "for testing" not in following
    assert "weights from larger data, if these are photographs: --init hf:" in following
    grey = said_of(confusion, tmp_path, found(channels=1))[1]
    assert "larger data" not in grey
    long = {"finetune": {**PLAN["finetune"], "epochs": 60}, "class_weights": "balanced", "init": "hf:name"}
    following = said_of(confusion, tmp_path, found(), **long)[1]
    assert following == f"To use it: maelab predict {tmp_path}/finetune IMAGE..."
    config = dataclasses.asdict(recipes.finetune_folder(2_000, 32))
    given = {"finetune": {**config, "data": "folder:/images", "epochs": 60}}
    for count in (1_940, 1_939):
        following = said_of(confusion, tmp_path, found(unlabelled=count), **long | given)[1]
        flags = (
            "--init",
            f"{tmp_path}/finetune",
            "--data",
            "folder:/images",
            "--unlabelled",
            "4",
            "--ema-decay",
            "0.98",
        )
        line = following.partition(f"learns from the {count} images without labels by maelab finetune ")[2].split()
        assert set(flags) <= set(line) if count == 1_940 else not line
    assert "more images for testing" in said_of([[9, 1, 0], [0, 9, 0], [0, 0, 9]], tmp_path)[1]


def test_a_model_without_mistakes_has_no_picture_of_them(tmp_path):
    good = said_of([[100, 0, 0], [0, 100, 0], [0, 0, 100]], tmp_path)[0]
    assert good.endswith("It made no mistake on test.") and not (tmp_path / "mistakes.png").exists()


def test_without_a_classifier_the_paragraphs_say_what_is_there(tmp_path):
    plan = {name: value for name, value in PLAN.items() if name != "finetune"}
    results = {"pretrain": {"val": {"masked_mse": 0.125}, "mean_predictor_loss": 0.5}}
    for classes, why in (({}, "has no classes"), ({"cat": 9}, "has only one class")):
        result = verdict.judge(found(classes=classes), plan, tmp_path, results, RunOptions())
        none, following, rebuilt = result["verdict"].split("\n\n")
        assert none == f"The folder {why}, so there is no classifier yet." and "sort some images" in following
        assert rebuilt.startswith("The autoencoder rebuilds hidden patches") and result["model"] is None


def test_cells_of_many_classes_mean_what_a_matrix_means():
    matrix = torch.tensor([[3, 1, 0], [0, 0, 2], [0, 0, 0]])
    truth = torch.tensor([0, 0, 0, 0, 1, 1])
    guesses = torch.nn.functional.one_hot(torch.tensor([0, 0, 0, 1, 2, 2]), 3).float()
    dense = scores_by_class(guesses, truth, ("a", "b", "c"))
    assert dense == {"per_class": {"a": 0.75, "b": 0.0, "c": 0.0}, "confusion": matrix.tolist()}
    names = tuple(map(str, range(1_500)))
    many = scores_by_class(torch.nn.functional.pad(guesses, (0, 1_497)), truth, names)
    assert many["cells"] == [[0, 0, 3], [0, 1, 1], [1, 2, 2]] and "confusion" not in many
    one, other = (verdict._beside_guessing(verdict._cells(test), [*"abc"]) for test in (dense, many))
    assert one == other
