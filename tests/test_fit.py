"""`maelab fit` and recipe `folder`: real folders of CIFAR-10 images among files that nobody would want there."""

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from markupsafe import escape
from PIL import Image
from processes import Maelab

from maelab import recipes
from maelab.data import load, training_sets
from maelab.data.folder import scan
from maelab.fitting import STAGES
from maelab.fitting.plan import _batch_size, _fitted
from maelab.fitting.verdict import _cells, _confused, _variance

ONE = ("--threads", 1)
NARROW = ("--embed-dim", 24, "--depth", 1, "--num-heads", 1)


@pytest.fixture(scope="session")
def photos(cifar_folder, cifar_small, tmp_path_factory) -> Path:
    """Two classes of 20 images and what a real folder holds beside: 12 unlabelled ones, and odd and broken files."""
    root = tmp_path_factory.mktemp("own") / "photos"
    for name in ("cat", "ship"):
        shutil.copytree(cifar_folder / name, root / name)
    (root / "unlabelled" / "deeper").mkdir(parents=True)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in cifar_small.test.images[:16]]
    for i, picture in enumerate(pictures[4:]):
        picture.save(root / "unlabelled" / "deeper" / f"{i}.png")
    cat = root / "cat"
    (cat / "zero.jpg").touch()
    (cat / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n damaged")
    pictures[0].resize((3000, 2000)).save(cat / "huge.jpg")
    pictures[0].save(cat / "animated.webp", save_all=True, append_images=pictures[1:3])
    pictures[1].convert("CMYK").save(cat / "cmyk.jpg")
    Image.fromarray(np.asarray(pictures[2].convert("L")).astype(np.uint16) * 257).save(cat / "sixteen.png")
    (cat / "drawing.svg").write_text("<svg/>")
    (cat / "notes.txt").write_text("not an image")
    return root


@pytest.fixture(scope="module")
def fitted(photos, maelab: Maelab, tmp_path_factory):
    work = tmp_path_factory.mktemp("fit")
    ended = maelab.run("fit", photos, "--minutes", 0.02, *ONE, "--json", cwd=work, drawn=True)
    return work, ended


def test_a_scan_counts_what_is_there(photos):
    found = scan(f"folder:{photos}")
    assert list(found.classes) == ["cat", "ship"] and found.labelled + found.test == 44 and found.held_out
    assert found.unlabelled == 12 and found.test >= 2
    assert [line.split(" (")[0] for line in found.broken] == ["cat/broken.png", "cat/zero.jpg"]
    assert found.animated == 1 and found.ignored == {".txt": 1, ".svg": 1} and found.side == 32 and not found.grey
    assert found.modes == {"RGB": 54, "CMYK": 1, "I;16": 1} and (found.smallest, found.largest) == (
        (32, 32), (2000, 3000),
    )  # fmt: skip


def test_unlabelled_images_are_for_pretraining_alone(photos):
    data = load(f"folder:{photos}", img_size=(32, 32))
    config = recipes.pretrain_folder(images=52)
    train, val = training_sets(data, config)
    more, same_val = training_sets(data, config, unlabelled=True)
    assert data.test is not None and train.labels is not None and more.labels is not None and val.labels is not None
    assert len(train) + len(val) + len(data.test) == 44 and len(more) == len(train) + 12
    assert more.labels.tolist() == train.labels.tolist() + [-1] * 12 and min(val.labels.tolist()) == 0
    assert same_val.images.equal(val.images) and more.images[: len(train)].equal(train.images)
    written = {np.asarray(Image.open(path)).tobytes() for path in (photos / "unlabelled").rglob("*.png")}
    assert {image.permute(1, 2, 0).numpy().tobytes() for image in more.images[len(train) :]} == written


def test_a_fit_ends_with_a_verdict_a_page_and_a_model(fitted, photos, maelab: Maelab):
    work, ended = fitted
    result = ended.json()
    out = work / "runs" / "fit-photos"
    stages = {stage: json.loads((out / stage / "result.json").read_text()) for stage in ("finetune", "scratch")}
    tuned, scratch = stages.values()
    n = scan(f"folder:{photos}").test
    assert tuned["init"] == "runs/fit-photos/pretrain" and scratch["init"] == "none"
    assert all(tuned[field] == scratch[field] for field in ("epochs", "train_images", "params", "seed"))
    assert result["test"] == {
        "images": n, "pretrained": tuned["test"]["accuracy"], "scratch": scratch["test"]["accuracy"]
    }  # fmt: skip
    clear = abs(result["difference"]) > 2 * result["standard_error"]  # either: how many epochs fit depends on the speed
    assert result["val"]["images"] >= 2 and result["beyond_noise"] is clear
    best = max(stages, key=lambda s: (stages[s]["val"]["accuracy"], -stages[s]["val"]["loss"]))
    assert result["model"] == f"runs/fit-photos/{best}"
    assert f"on test (n = {n})" in result["verdict"] and ("within the noise" in result["verdict"]) is not clear
    assert result["verdict"].startswith("The model is right on ")
    good, following, worth = result["verdict"].split("\n\n")
    assert worth.startswith("Pretraining made no clear difference on test") is not clear
    assert "To use it: maelab predict" in following
    assert "held out of your images by their content" in result["verdict"]
    page = (out / "report.html").read_text()
    places = [page.index(escape(part)) for part in (good, following, worth)]
    assert places == sorted(places) and places[-1] < page.index("<nav") and "<h1>maelab fit: photos</h1>" in page
    wrong = result["accuracy"] < 1
    assert ("test images that it gets wrong" in page.lower()) is wrong is (out / "mistakes.png").exists()
    assert (result["mistakes"] == str(Path("runs/fit-photos/mistakes.png"))) is wrong
    assert "3 finished runs (1 pretraining, 2 fine-tuning)" in page
    with Image.open(work / result["reconstruction"]) as picture:
        assert picture.width > 100
    assert "unreadable, left out: 2" in ended.err and "plan for 0.02 minutes: pretrain" in ended.err
    guess = maelab.run("predict", result["model"], photos / "ship", *ONE, "--json", cwd=work).json()["predictions"]
    assert len(guess) == 20 and {entry["label"] for entry in guess} <= {"cat", "ship"}


@pytest.mark.slow
def test_an_encoder_from_elsewhere_is_a_third_contender(photos, maelab: Maelab, tmp_path):
    """It has its own shape and patches, is fine-tuned as it is, and may be the model if validation says so."""
    shape = ("--embed-dim", 32, "--depth", 2, "--num-heads", 2, "--patch-size", 8, "--epochs", 1)
    given = maelab.run(
        "finetune", "folder", "--data", f"folder:{photos}", *shape, *ONE, "--out", "given", "--json", cwd=tmp_path
    ).json()["run"]
    ended = maelab.run("fit", photos, "--init", given, "--minutes", 0.02, *ONE, "--json", cwd=tmp_path)
    result, out = ended.json(), tmp_path / "runs" / "fit-photos"
    ran = [stage for stage in STAGES if stage != "unlabelled"]  # most images have a label
    stages = {stage: json.loads((out / stage / "result.json").read_text()) for stage in ran}
    assert stages["transfer"]["init"] == str(tmp_path / "given") and stages["finetune"]["init"].endswith("pretrain")
    adapted = ["position embedding 4x4 -> 8x8: interpolate", "patches 8x8 -> 4x4 pixels: resize"]
    assert stages["transfer"]["adapted"] == adapted
    configs = {stage: json.loads((out / stage / "config.json").read_text()) for stage in ran}
    assert configs["transfer"]["embed_dim"] == 32 and configs["finetune"]["embed_dim"] == 96
    for part in ("val", "test"):
        assert result[part]["transfer"] == stages["transfer"][part]["accuracy"]
    best = max(stages[stage]["val"]["accuracy"] for stage in ran[1:])
    assert stages[result["chosen"]]["val"]["accuracy"] == best
    assert f"finetune {tmp_path / 'given'} " in ended.err
    assert f"Fine-tuned from {tmp_path / 'given'} (0.0" in result["verdict"]
    again = maelab.run("fit", photos, "--init", "given", "--minutes", 0.02, *ONE, "--json", cwd=tmp_path)
    assert again.json() == result
    refused = maelab.run("fit", photos, "--minutes", 0.02, *ONE, cwd=tmp_path).error()
    assert refused.startswith(f"runs/fit-photos holds a fit with --init {tmp_path / 'given'} instead of none")


@pytest.mark.slow
def test_where_most_images_have_no_label_the_best_model_learns_from_those_too(photos, maelab: Maelab, tmp_path):
    for name in ("cat", "ship"):
        for file in sorted((photos / name).glob("*.png"))[:20]:
            place = tmp_path / "own" / (name if int(file.stem[-1]) % 3 == 0 else "unlabelled") / f"{name}-{file.name}"
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, place)
    line = ("fit", "own", "--minutes", 0.5, *ONE, "--json")
    soon = "import maelab.fitting.plan\nmaelab.fitting.plan._LEAST = 1\n"  # half a minute is too little else
    ended = maelab.run(*line, cwd=tmp_path, first=soon)
    result, out = ended.json(), tmp_path / "runs" / "fit-own"
    stages = {s: json.loads((out / s / "result.json").read_text()) for s in ("finetune", "scratch", "unlabelled")}
    start, learned = result["unlabelled"]["from"], stages["unlabelled"]
    assert learned["init"] == f"runs/fit-own/{start}" and learned["adapted"] == ["head kept"]
    assert start == max(
        ("finetune", "scratch"), key=lambda s: (stages[s]["val"]["accuracy"], -stages[s]["val"]["loss"])
    )
    assert (result["val"]["unlabelled"], result["test"]["unlabelled"]) == (
        learned["val"]["accuracy"], learned["test"]["accuracy"],
    )  # fmt: skip
    count = result["found"]["unlabelled"]
    assert f"learned from {count} images without labels too (epochs: {learned['epochs']})" in result["verdict"]
    assert "with the images without labels, from the best of these" in ended.err
    (out / "fit.json").unlink()
    plan = (out / "plan.json").read_bytes()
    again = maelab.run(*line, cwd=tmp_path)
    assert again.json() == result and plan == (out / "plan.json").read_bytes()


@pytest.mark.slow
def test_pretraining_begins_from_an_autoencoder(photos, maelab: Maelab, tmp_path):
    given = "maelab:mnist-mae"
    ended = maelab.run("fit", photos, "--init", given, "--minutes", 0.02, *ONE, "--json", cwd=tmp_path)
    out = tmp_path / "runs" / "fit-photos"
    assert ended.json()["plan"]["pretrain"]["init"] == given and not (out / "transfer").exists()
    result = json.loads((out / "pretrain" / "result.json").read_text())
    adapted = ["position embedding 7x7 -> 8x8: interpolate", "patch embedding 1 -> 3 channels: inflate"]
    assert (result["init"], result["adapted"]) == (given, adapted)
    config = json.loads((out / "finetune" / "config.json").read_text())
    assert (config["embed_dim"], config["depth"], config["init"]) == (192, 6, "runs/fit-photos/pretrain")
    more = maelab.run("fit", photos, "--init", given, "--minutes", 0.04, *ONE, "--json", cwd=tmp_path).json()
    assert more["plan"]["round"] == 1
    result = json.loads((out / "pretrain" / "result.json").read_text())
    assert (result["init"], result["adapted"]) == ("runs/fit-photos/before-1", [])


def test_a_fit_goes_on_where_it_was(fitted, photos, maelab: Maelab):
    work, first = fitted
    out = work / "runs" / "fit-photos"
    before = {stage: (out / stage / "result.json").stat().st_mtime_ns for stage in ("pretrain", "finetune")}
    scratch = json.loads((out / "scratch" / "result.json").read_text())
    shutil.rmtree(out / "scratch")
    (out / "fit.json").unlink()
    ended = maelab.run("fit", photos, "--minutes", 0.02, *ONE, "--json", cwd=work)
    again, first = ended.json(), first.json()
    assert {stage: (out / stage / "result.json").stat().st_mtime_ns for stage in before} == before
    assert "timing" not in ended.err and ended.err.count("done before") == 2
    assert json.loads((out / "scratch" / "result.json").read_text())["test"] == scratch["test"]
    assert again == first == json.loads((out / "fit.json").read_text())
    other = maelab.run("fit", photos, "--minutes", 0.02, "--resize", "pad", *ONE, cwd=work)
    assert other.status == 2 and "with --resize crop instead of pad; use --overwrite" in other.err
    less = maelab.run("fit", photos, "--minutes", 0.01, *ONE, "--json", cwd=work)
    assert less.json() == first and "holds a fit of 0.02 minutes; it stays as it is" in less.err
    (photos / "unlabelled" / "new.png").write_bytes((photos / "unlabelled" / "deeper" / "0.png").read_bytes())
    other = maelab.run("fit", photos, "--minutes", 0.02, *ONE, cwd=work)
    assert other.status == 2 and "with other images; use --overwrite" in other.err
    (photos / "unlabelled" / "new.png").unlink()


@pytest.mark.slow
def test_more_minutes_go_on_with_the_fit_that_lies_there(fitted, photos, maelab: Maelab, tmp_path):
    work = Path(shutil.copytree(fitted[0], tmp_path / "work"))
    out = work / "runs" / "fit-photos"
    weights = [(out / "pretrain" / "checkpoints" / "last" / "model.safetensors").read_bytes()]
    for number, minutes in enumerate((0.04, 0.06), 1):
        ended = maelab.run("fit", photos, "--minutes", minutes, *ONE, "--json", cwd=work)
        result, plan = ended.json(), json.loads((out / "plan.json").read_text())
        assert (plan["minutes"], plan["spent"], plan["round"]) == (minutes, pytest.approx(minutes - 0.02), number)
        assert f"plan for 0.02 minutes more, after {minutes - 0.02:g}: " in ended.err
        assert result == json.loads((out / "fit.json").read_text()) and result["plan"] == plan
        before = out / f"before-{number}"
        assert (before / "checkpoints" / "last" / "model.safetensors").read_bytes() == weights[-1]
        assert json.loads((out / "pretrain" / "result.json").read_text())["init"] == f"runs/fit-photos/before-{number}"
        weights.append((out / "pretrain" / "checkpoints" / "last" / "model.safetensors").read_bytes())
        assert [path.name for path in sorted(out.glob("before-*"))] == [f"before-{number}"]
        again = maelab.run("fit", photos, "--minutes", minutes, *ONE, "--json", cwd=work)
        assert again.json() == result and again.err.count("done before") == 3
    assert len(set(weights)) == 3
    ended = maelab.run("fit", photos, "--minutes", 0.02, "--overwrite", *ONE, "--json", cwd=work)
    assert ended.json()["plan"].get("round", 0) == 0 and not list(out.glob("before-*"))


@pytest.mark.slow
def test_more_minutes_for_a_fit_that_was_stopped_before_there_was_anything(photos, maelab: Maelab, tmp_path):
    out = tmp_path / "runs" / "fit-photos"
    process = maelab.start("fit", photos, "--minutes", 3, *ONE, cwd=tmp_path)
    process.wait_for(process.err, text="plan for 3 minutes")
    process.signal(signal.SIGKILL)
    process.wait()
    assert (out / "plan.json").exists()
    ended = maelab.run("fit", photos, "--minutes", 3.02, *ONE, "--json", cwd=tmp_path)
    assert ended.status == 0 and ended.json()["plan"]["spent"] == 3.0, ended


def test_two_folders_of_one_name_do_not_share_a_fit(photos, maelab: Maelab, tmp_path):
    for place in "ab":
        shutil.copytree(photos / "ship", tmp_path / place / "images")
    for _ in range(2):
        for place, name in (("a", "fit-images"), ("b", "fit-images-2")):
            ended = maelab.run("fit", f"{place}/images", "--minutes", 0.02, *ONE, "--json", cwd=tmp_path)
            assert ended.json()["fit"] == f"runs/{name}"


def test_flags_of_a_fit_reach_its_runs(photos, maelab: Maelab, tmp_path):
    flags = ("--resize", "squash", "--no-flip", "--img-size", 24, 40, "--group", r"cat/\d|ship/\d", "--seed", 3)
    flags += ("--class-weights", "balanced")
    ended = maelab.run("fit", photos, "--minutes", 0.02, *flags, *ONE, "--json", cwd=tmp_path)
    assert ended.status == 0, ended
    for stage in ("pretrain", "finetune", "scratch"):
        config = json.loads((tmp_path / "runs" / "fit-photos" / stage / "config.json").read_text())
        assert config.get("class_weights", "balanced") == "balanced"
        asked = ("resize", "flip", "img_size", "group", "seed")
        assert [config[name] for name in asked] == ["squash", False, [24, 40], r"cat/\d|ship/\d", 3]


def test_a_fit_that_is_stopped_while_it_times_its_steps_promises_nothing(photos, maelab: Maelab, tmp_path):
    """What it saved by then lay in a temporary folder that is gone."""
    line = ("fit", photos, "--minutes", 1, *ONE, "--out", "out")
    for there in (False, True):
        if there:
            (tmp_path / "out").mkdir()
        process = maelab.start(*line, cwd=tmp_path)
        process.wait_for(process.err, text="timing a few steps")
        process.signal(signal.SIGINT)
        ended = process.wait()
        last = ended.err.splitlines()[-1]
        assert ended.status == 130 and last.startswith("maelab: interrupted; the same command starts again"), ended
        assert (tmp_path / "out").exists() == there and not list(tmp_path.glob("out/*"))


def test_a_picture_that_fails_costs_no_verdict(fitted, photos, maelab: Maelab, tmp_path):
    work = Path(shutil.copytree(fitted[0], tmp_path / "work"))
    out = work / "runs" / "fit-photos"
    for name in ("reconstruction.png", "report.html", "fit.json"):
        (out / name).unlink()
    (out / "report.html").mkdir()
    ended = maelab.run("fit", photos, "--minutes", 0.02, *ONE, "--json", cwd=work, largest_file=20_000)
    assert ended.status == 0 and "reconstruction.png could not be drawn: " in ended.err, ended
    assert "report.html could not be built: " in ended.err and (out / "fit.json").exists()


def test_a_plan_that_is_none_is_named(fitted, photos, maelab: Maelab, tmp_path):
    work = Path(shutil.copytree(fitted[0], tmp_path / "work"))
    file = work / "runs" / "fit-photos" / "plan.json"
    plan = json.loads(file.read_text())
    bad = [{"pretrain": []}, {"pretrain": plan["pretrain"] | {"img_size": 7}}, {"pretrain": {"epochs": "x"}}]
    bad += [{"measured": 3}, {"finetune": None}, {"measured": {}}, {"finetune": plan["finetune"] | {"extra": 1}}]
    for changes in bad:
        file.write_text(json.dumps(plan | changes))
        ended = maelab.run("fit", photos, "--minutes", 0.02, *ONE, cwd=work)
        assert ended.status == 1 and "plan.json is damaged (" in ended.error() and "--overwrite" in ended.error()


def test_without_classes_a_fit_pretrains_and_says_what_next(photos, maelab: Maelab, tmp_path):
    out = tmp_path / "fit"
    ended = maelab.run(
        "fit", photos / "unlabelled" / "deeper", "--minutes", 0.02, *ONE, "--kernels", "torch", "--attention", "fused",
        "--out", out, "--json", cwd=tmp_path,
    )  # fmt: skip
    result = ended.json()
    assert result["model"] is None and "has no classes, so there is no classifier yet" in result["verdict"]
    assert f"maelab finetune folder --init {out / 'pretrain'}" in result["next"]
    assert (out / "reconstruction.png").exists() and (out / "report.html").exists()
    assert not (out / "scratch").exists()
    hardware = json.loads((out / "pretrain" / "env.json").read_text())["hardware"]
    assert "fused attention" in hardware and "native" not in hardware, "the options reach the runs"
    line = ("fit", photos / "unlabelled" / "deeper", "--init", "maelab:mnist-classifier", "--minutes", 0.02, *ONE)
    refused = maelab.run(*line, "--out", "other", cwd=tmp_path).error()
    assert refused.endswith("is no autoencoder, and without classes there is nothing else to do with it")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ((), "fit needs FOLDER: images"),
        (("nowhere",), "there is no folder"),
        (("photos", "--minutes", "0"), "--minutes must be above 0"),
        (("photos", "--minutes", "1e20"), "--minutes must be above 0 and at most 525600 (a year), got 1e+20"),
        (("photos", "--minutes", "inf"), "--minutes must be a finite number, got 'inf'"),
        (("photos", "--minutes", "10min"), "--minutes must be a finite number, got '10min'"),
        (("photos", "--out", "photos/fit"), "lies among your images"),
        (("photos", "--out", "other"), "which maelab did not write"),
    ],
)
def test_a_fit_that_cannot_be_is_refused(line, message, photos, maelab: Maelab, tmp_path):
    (tmp_path / "photos").symlink_to(photos)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x").touch()
    ended = maelab.run("fit", *line, cwd=tmp_path)
    assert ended.status == 2 and message in ended.err and "Traceback" not in ended.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "photos"]


def test_recipe_folder_fills_in_what_was_found(photos, maelab: Maelab, tmp_path):
    small = (*NARROW, *ONE, "--epochs", 1)
    decoder = ("--decoder-embed-dim", 24, "--decoder-depth", 1, "--decoder-num-heads", 1, "--patch-size", 8)
    line = ("pretrain", "folder", "--data", f"folder:{photos}", *small, *decoder, "--out", "mae")
    ended = maelab.run(*line, cwd=tmp_path)
    assert ended.status == 0, ended
    found = scan(f"folder:{photos}")
    images = found.labelled + found.unlabelled
    assert "found 56 images" in ended.err and f"chosen for {images} images: 32x32" in ended.err
    config = json.loads((tmp_path / "mae" / "config.json").read_text())
    assert (config["img_size"], config["patch_size"], config["batch_size"]) == ([32, 32], 8, 16)
    assert config["val_fraction"] == 0.2 and config["epochs"] == 1 and config["crop_padding"] == 4
    line = ("finetune", "folder", "--init", "mae", "--data", f"folder:{photos}", *ONE, "--epochs", 1, "--out", "tuned")
    tuned = maelab.run(*line, "--json", cwd=tmp_path)
    assert 24 <= tuned.json()["train_images"] < found.labelled and "from --init mae" in tuned.err
    assert json.loads((tmp_path / "tuned" / "config.json").read_text())["patch_size"] == 8
    guess = maelab.run("predict", "tuned", photos / "ship", *ONE, "--json", cwd=tmp_path).json()["predictions"]
    assert {entry["label"] for entry in guess} <= {"cat", "ship"}
    refused = maelab.run("pretrain", "folder", cwd=tmp_path)
    assert refused.status == 2 and "needs --data folder:PATH" in refused.error()


@pytest.mark.parametrize("side", [*range(1, 240, 7), 32, 224, 5000])
def test_recipe_folder_keeps_to_its_sizes(side):
    config = recipes.pretrain_folder(images=1000, side=side)
    assert config.img_size is not None
    height, width = config.img_size
    assert height == width and 32 <= height <= 224 and 49 <= (height // config.patch_size) ** 2 <= 196
    assert height % config.patch_size == 0 and abs(height - min(224, max(32, side))) <= config.patch_size / 2


def test_recipe_folder_scales_with_the_number_of_images():
    few, some, many = (recipes.pretrain_folder(images=n) for n in (30, 3_000, 300_000))
    assert few.epochs > some.epochs > many.epochs and few.batch_size < some.batch_size <= many.batch_size
    assert (few.embed_dim, few.depth) < (many.embed_dim, many.depth) and few.val_fraction > many.val_fraction
    assert not recipes.pretrain_folder(grey=True).flip and some.flip
    own = recipes.finetune_folder(img_size=(48, 96), patch_size=16)
    assert own.img_size == (48, 96) and own.patch_size == 16


def test_a_plan_keeps_within_the_time():
    config = recipes.pretrain_folder(images=3_200)
    per_epoch = 3_200 // config.batch_size * 0.1 + 1 + 0.1 / 3 * 320 / config.batch_size
    for seconds in (10.0, 60.0, 120.0):
        chosen, takes = _fitted(config, 3_200, 320, 0.1, 1.0, seconds=seconds)
        assert (
            chosen["limit"] is None and takes <= seconds < takes + per_epoch and takes == chosen["epochs"] * per_epoch
        )
    chosen, takes = _fitted(config, 3_200, 320, 0.1, 1.0, seconds=3.0)
    assert chosen["epochs"] == 1 and chosen["limit"] < 3_200 and takes <= 3.0
    assert _fitted(config, 3_200, 320, 1e-6, 0.0, seconds=60.0)[0]["epochs"] == config.epochs, (
        "never more than sensible"
    )


@pytest.mark.parametrize(
    ("largest", "step", "seconds", "batch"),
    [(256, 0.4, 1e4, 256), (256, 0.4, 150, 64), (256, 0.4, 1, 32), (16, 1, 1, 16)],
)
def test_in_little_time_batches_are_smaller(largest, step, seconds, batch):
    assert _batch_size(largest, step, seconds) == batch


def test_noise_and_confusion():
    assert _variance(0.5, 100) == pytest.approx(0.0025) and _variance(1.0, 10) > 0.005
    pairs = _confused(_cells({"confusion": [[5, 1, 0], [3, 2, 0], [0, 0, 5]]}), ["a", "b", "c"])
    assert [(p["class"], p["taken_for"], p["times"], p["of"]) for p in pairs] == [("b", "a", 3, 5), ("a", "b", 1, 6)]
