"""Every command from start to end on real images, as real processes; every refusal in one line."""

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from processes import Maelab, environment

from maelab import __version__
from maelab.cli import COMMANDS
from maelab.config import DataConfig
from maelab.data import load, training_sets

HEAVY = ("torch", "numpy", "matplotlib", "PIL", "tensorboard", "safetensors")
CPU = ("--threads", 1, "--kernels", "torch")
SMALL = ("--limit", 96, "--batch-size", 32, *CPU)


@pytest.fixture(scope="module")
def work(maelab: Maelab, digits_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one finished run of every kind: mae, classifier, scratch, and runs/probe-mae-1. Do not change."""
    cwd = tmp_path_factory.mktemp("work")
    data = ("--data", f"folder:{digits_folder}")
    (cwd / "said").mkdir()
    for name, *command in (
        ("mae", "pretrain", "smoke", *data, "--out", "mae"),
        ("classifier", "finetune", "smoke", *data, "--init", "mae", "--out", "classifier"),
        ("scratch", "finetune", "smoke", *data, "--init", "none", "--out", "scratch", "--val-fraction", 0.1),
        ("probe", "probe", "mae", "--epochs", 2),
    ):
        ended = maelab.run(*command, *SMALL, "--json", cwd=cwd, drawn=True)
        (cwd / "said" / f"{name}.json").write_text(json.dumps(ended.json()))
        (cwd / "said" / f"{name}.err").write_text(ended.err)
    return cwd


def said(work: Path, name: str) -> dict[str, Any]:
    return json.loads((work / "said" / f"{name}.json").read_text())


# --- help -----------------------------------------------------------------------------------------------------------


def test_help_loads_nothing_heavy(tmp_path):
    """That is what makes it fast. Asked for in one fresh process, one help after the other."""
    lines = [[], ["--version"], ["--help"], *([c, "--help"] for c in COMMANDS), ["pretrain", "mnist", "--help"]]
    code = f"""if True:
        import contextlib, io, json, sys
        from maelab.cli import main
        answers = []
        for line in {lines!r}:
            with contextlib.redirect_stdout(io.StringIO()) as out:
                status = main(line)
            answers.append([line, status, out.getvalue(), [m for m in {HEAVY!r} if m in sys.modules]])
        print(json.dumps(answers))"""
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment(tmp_path), capture_output=True, check=True
    )
    for line, status, text, loaded in json.loads(out.stdout):
        assert (status, loaded) == (0, []), line
        assert len(text) > (100 if "--version" not in line else 3), line
    helps = {" ".join(line): text for line, _, text, _ in json.loads(out.stdout)}
    for command in COMMANDS:
        assert f"  {command} " in helps["--help"]
        assert {"--json", "--debug"} <= set(helps[f"{command} --help"].replace(",", " ").split()), command
    pretrain = helps["pretrain --help"]
    assert "--mask-ratio" in pretrain and "mnist, quickstart, cifar10, folder, smoke" in pretrain
    assert "--label-fraction" in helps["finetune --help"] and "--out" not in helps["evaluate --help"]


def test_the_module_is_the_command(work):
    command = [sys.executable, "-m", "maelab", "info", str(work / "mae"), "--json"]
    done = subprocess.run(command, env=environment(work), capture_output=True, text=True, check=True)
    assert done.stderr == "" and json.loads(done.stdout)["complete"] is True


def test_the_installed_command(tmp_path):
    command = Path(sys.executable).with_name("maelab")
    if not command.exists():
        pytest.skip("maelab is not installed beside this Python")
    done = subprocess.run([command, "--version"], env=environment(tmp_path), capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == (f"{__version__}\n", "")


# --- every command --------------------------------------------------------------------------------------------------


def test_pretrain(work, digits_folder):
    result, folder = said(work, "mae"), work / "mae"
    assert result.pop("run") == "mae"
    assert result == json.loads((folder / "result.json").read_text())
    expected = {"task": "pretrain", "data": f"folder:{digits_folder}", "seed": 0, "epochs": 2, "patch_size": 7}
    assert expected.items() <= result.items() and result["mask_ratio"] == 0.75
    for part in ("train", "val"):
        assert 0 < result[part]["masked_mse"] < 4
    assert result["train_time_s"] > 0 and result["images_per_s"] > 0
    assert 0 < result["mean_predictor_loss"] < 1 and result["masked_mse_uses"] == "the prediction alone"
    for name in ("figures/curves.png", "figures/reconstructions.png"):
        with Image.open(folder / name) as picture:
            picture.load()
    for name in ("best", "last"):
        assert {p.name for p in (folder / "checkpoints" / name).iterdir()} >= {"model.safetensors", "config.json"}
    config = json.loads((folder / "config.json").read_text())
    assert (config["task"], config["recipe"], config["limit"], config["patch_size"]) == ("pretrain", "smoke", 96, 7)
    env = json.loads((folder / "env.json").read_text())
    assert env["torch"] and env["threads"] == 1 and env["cpu"] and set(env["data_md5"]) == {"images", "files", "labels"}


def test_people_read_stderr(work):
    """What is about to happen, then epoch, losses, the mean predictor, learning rate, speed and time left."""
    first, *epochs = (work / "said" / "mae.err").read_text().splitlines()
    assert first.startswith("pretrain on folder:") and "96 images" in first and "16 patches of 7x7" in first
    assert len(epochs) == 2 and epochs[0].startswith("epoch 1/2  train loss ")
    for epoch in epochs:
        for part in ("val masked_mse ", "(mean predictor ", "  lr ", " images/s  ", " left"):
            assert part in epoch
    assert len((work / "said" / "classifier.err").read_text().splitlines()) == 3


def size_of(folder, part, fraction=0.1):
    """Images in the test part of a folder, or in its validation part."""
    data = load(f"folder:{folder}")
    val = training_sets(data, DataConfig(data=data.name, val_fraction=fraction))[1]
    return len(data.test or "") if part == "test" else len(val)


@pytest.mark.parametrize(("name", "init"), [("classifier", "mae"), ("scratch", "none")])
def test_finetune(work, digits_folder, name, init):
    result = said(work, name)
    assert result.pop("run") == name
    assert result == json.loads((work / name / "result.json").read_text())
    assert (result["task"], result["init"], result["epochs"], result["train_images"]) == ("finetune", init, 2, 96)
    assert result["best_epoch"] in (1, 2) and result["params"] > 1000
    for part in ("test", "val"):
        n = size_of(digits_folder, part, 0.05 if name == "classifier" else 0.1)
        assert 0 < result[part]["loss"] < 10
        correct = result[part]["accuracy"] * n
        assert correct == pytest.approx(round(correct)), "a fraction of the images, not percent"
    assert {p.name for p in (work / name / "figures").iterdir()} == {"curves.png", "predictions.png", "confusion.png"}


def test_finetune_takes_shape_and_weights_from_init(work):
    """The recipe is as narrow as the autoencoder, so ask for a wider one: what was not typed is taken from --init."""
    from safetensors.torch import load_file

    config = json.loads((work / "classifier" / "config.json").read_text())
    assert config["init"] == "mae" and config["patch_size"] == 7
    source, scratch = load_file(work / "mae/checkpoints/best/model.safetensors"), "blocks.0.attn.qkv.weight"
    near, far = (load_file(work / n / "checkpoints/best/model.safetensors")[scratch] for n in ("classifier", "scratch"))
    assert (near - source[scratch]).norm() < 0.3 * (far - source[scratch]).norm()


def test_probe(work):
    result = said(work, "probe")
    assert result.pop("run") == "runs/probe-mae-1"
    assert result == json.loads((work / "runs/probe-mae-1/result.json").read_text())
    assert (result["task"], result["init"], result["train_images"]) == ("probe", "mae", 96)
    for part in ("test", "val"):
        assert 0 <= result[part]["accuracy"] <= 1 and 0 <= result[part]["knn_accuracy"] <= 1
    assert result["test"]["knn_accuracy"] > 0.2, "even after two epochs the features beat chance, 0.1"


def test_a_probe_validates_on_what_the_run_held_out(work, maelab, digits_folder):
    size = len(load(f"folder:{digits_folder}").train)
    for typed, held_out in (((), 0.1), (("--val-fraction", 0.2), 0.2)):
        line = ("probe", "scratch", *typed, "--epochs", 1, *CPU, "--json", "--out", f"probe-{held_out}")
        assert maelab.run(*line, cwd=work).json()["train_images"] == size - size_of(digits_folder, "val", held_out)


def test_evaluate_repeats_what_training_said(work, maelab, digits_folder):
    for split in ("test", "val"):
        n = size_of(digits_folder, split)
        result = maelab.run("evaluate", "scratch", "--split", split, *CPU, "--json", cwd=work).json()
        assert (result["run"], result["split"], result["images"]) == ("scratch", split, n)
        assert result["data"] == f"folder:{digits_folder}"
        for key in ("accuracy", "loss"):
            assert result[key] == pytest.approx(said(work, "scratch")[split][key], abs=1e-6)
        assert list(result["per_class"]) == list("0123456789")
        right = sum(row[i] for i, row in enumerate(result["confusion"]))
        assert sum(map(sum, result["confusion"])) == n and right == round(result["accuracy"] * n)
    result = maelab.run("evaluate", "mae", "--split", "val", *CPU, "--json", cwd=work).json()
    assert result["masked_mse"] == pytest.approx(said(work, "mae")["val"]["masked_mse"], abs=1e-6)
    assert result["mask_ratio"] == 0.75


def test_evaluate_for_people(work, maelab, digits_folder, cifar_folder):
    classifier = maelab.run("evaluate", "scratch", *CPU, cwd=work)
    first, *classes = classifier.out.splitlines()
    n, n_other = size_of(digits_folder, "test"), len(list(cifar_folder.rglob("*.png")))  # another folder: all of it
    assert first.startswith("accuracy 0.") and f"on {n} test images" in first and len(classes) == 10
    other = ("--data", f"folder:{cifar_folder}", "--mask-ratio", 0.5)  # colour photographs, made grey and 28 x 28
    autoencoder = maelab.run("evaluate", "mae", *other, *CPU, cwd=work)
    assert autoencoder.out.startswith("masked MSE ") and f"with 50% hidden on {n_other} test images" in autoencoder.out
    assert classifier.status == autoencoder.status == 0 and classifier.err == autoencoder.err == ""


def test_reconstruct(work, maelab, tmp_path, digits_folder, cifar_folder):
    few = maelab.run("reconstruct", work / "mae", "--count", 3, "--seed", 1, "--json", *CPU, cwd=tmp_path, drawn=True)
    result = few.json()
    assert result.items() >= {"run": str(work / "mae"), "out": "reconstruction.png", "images": 3}.items()
    assert list(result["masked_mse"]) == ["0.75"] and 0 < result["masked_mse"]["0.75"] < 4
    with Image.open(tmp_path / "reconstruction.png") as picture:
        picture.load()
    files = [next((digits_folder / "3").iterdir()), next((cifar_folder / "cat").iterdir())]
    ratios = ("--mask-ratio", 0.5, 0.75, "--out", "deep/in/two.png")
    many = maelab.run("reconstruct", work / "mae", *files, *ratios, "--json", *CPU, cwd=tmp_path, drawn=True).json()
    assert many["images"] == 2 and list(many["masked_mse"]) == ["0.5", "0.75"]
    with Image.open(tmp_path / "deep/in/two.png") as picture:
        picture.load()
        assert picture.height > picture.width, "two ratios, so two groups of three rows"
    again = maelab.run("reconstruct", work / "mae", "--count", 3, "--seed", 1, *CPU, cwd=tmp_path)
    assert again.out.splitlines() == [
        f"masked MSE {result['masked_mse']['0.75']:.4f} with 75% hidden (12 of 16 patches);"
        f" mean of the visible pixels {result['visible_mean_mse']['0.75']:.4f}",
        "reconstruction.png",
    ]


def test_reconstruct_under_drawn_masks_and_sweeps(work, maelab, tmp_path):
    (tmp_path / "mask.txt").write_text("1 1 1 1\n1 0 0 1\n1 0 0 1\n1 1 1 1\n")
    pixels = Image.new("L", (28, 28), "black")
    pixels.paste("white", (7, 7, 21, 21))  # the same mask, dark is hidden
    pixels.save(tmp_path / "mask.png")
    line = ("reconstruct", work / "mae", "--count", 3, *CPU, "--json")
    text, drawn = (maelab.run(*line, "--mask-file", f"mask.{end}", cwd=tmp_path).json() for end in ("txt", "png"))
    assert text == drawn and text["hidden"] == {"0.75": 12} and text["patches"] == 16
    grid = maelab.run(*line, "--mask-kind", "grid", "--mask-ratio", 0.8, cwd=tmp_path).json()
    assert grid["hidden"] == {"0.75": 12} and grid["masked_mse"] != text["masked_mse"]
    swept = maelab.run(*line, "--sweep", "--mask-kind", "block", "--out", "s.png", cwd=tmp_path, drawn=True).json()
    assert list(swept["masked_mse"]) == [f"0.{i}" for i in range(1, 10)] and len(set(swept["hidden"].values())) > 6
    moving = maelab.run(*line, "--sweep", "--out", "s.gif", cwd=tmp_path).json()
    assert (
        list(moving["hidden"].values()) == list(range(1, 16)) and moving["hidden"].keys() == moving["masked_mse"].keys()
    )
    with Image.open(tmp_path / "s.png") as picture, Image.open(tmp_path / "s.gif") as gif:
        assert picture.width > 300 and (gif.format, gif.n_frames) == ("GIF", 15)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("run", "what"), [("mae", "pretrain"), ("scratch", "finetune"), ("runs/probe-mae-1", "probe")])
def test_info(run, what, work, maelab):
    summary = maelab.run("info", run, "--json", cwd=work).json()
    assert (summary["run"], summary["complete"], summary["epochs_done"]) == (run, True, 2)
    assert summary["result"] == json.loads((work / run / "result.json").read_text())
    assert summary["config"]["task"] == what and summary["env"]["threads"] == 1
    assert [row["split"] for row in summary["last_metrics"]] == ["train", "val"]
    text = maelab.run("info", run, cwd=work).out
    assert text.startswith(f"{run}: {what} ") and "(complete)" in text and "  batch_size = 32\n" in text


def test_info_of_a_checkpoint(work, maelab):
    assert maelab.run("info", "mae/checkpoints/best", cwd=work).out.startswith(
        "mae/checkpoints/best: checkpoint of a MaskedAutoencoderViT\n"
    )


def test_data_from_files_at_hand(maelab, tmp_path):
    """Half of CIFAR-10 will do to see that it is looked at; the whole is for the tests of the sources."""
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "data_batch_1.bin").write_bytes(b"\3" * 3073)
    message = maelab.run("data", "cifar10", "--data-dir", "files", cwd=tmp_path).error()
    assert (
        message.startswith("--data-dir files has no good copy of cifar10: ")
        and "data_batch_1.bin has SHA-256" in message
    )


# --- refusals -------------------------------------------------------------------------------------------------------

DATA = "--data folder:DIGITS --limit 96 --threads 1 --kernels torch --out new"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("pretran smoke", "there is no command 'pretran'; did you mean pretrain?"),
        ("zzz", "there is no command 'zzz'; choose from data, data shard, pretrain, finetune, fit, probe, "),
        ("pretrain", "pretrain needs RECIPE: mnist, quickstart, cifar10, folder, smoke; see maelab pretrain --help"),
        ("pretrain --epochs 3", "pretrain needs RECIPE: mnist, "),
        ("pretrain smok", "there is no pretrain recipe 'smok'; did you mean smoke?"),
        ("finetune cifar --init none", "there is no finetune recipe 'cifar'; did you mean cifar10?"),
        ("finetune zzz", "there is no finetune recipe 'zzz'; choose from mnist, quickstart, cifar10, folder, smoke"),
        ("probe", "probe needs RUN: run folder or checkpoint to judge; see maelab probe --help"),
        (
            "evaluate",
            "evaluate needs RUN: run folder or checkpoint of a masked autoencoder or a classifier; see maelab ",
        ),
        ("reconstruct --json", "reconstruct needs RUN: run folder or checkpoint of a masked autoencoder; see maelab "),
        ("info", "info needs RUN: run folder or checkpoint; see maelab info --help"),
        ("data", "data needs NAMES: mnist, fashion-mnist, cifar10; see maelab data --help"),
        ("fit --minutes 1", "fit needs FOLDER: images: a sub-folder for each class, "),
        ("report", "report needs FOLDERS: run folders, sweeps, "),
        ("sweep smoke", "sweep needs --grid: field=value,value,...: a field of the recipe and the values to try"),
        ("data mnst", "there is no data set 'mnst'; did you mean 'mnist'?"),
        ("data mnist --data-dir nowhere", "--data-dir nowhere is not a folder"),
        ("pretrain smoke --mask-rato 0.5", "unknown flag --mask-rato; did you mean --mask-ratio?"),
        ("pretrain smoke --batch_sise=8", "unknown flag --batch-sise; did you mean --batch-size?"),
        ("pretrain smoke --qqqqqq", "unknown flag --qqqqqq; see maelab pretrain --help"),
        ("evaluate mae -n 3", "unknown flag -n; see maelab evaluate --help"),
        ("predict classifier x.png --data-dir x", "unknown flag --data-dir; see maelab predict --help"),
        ("fit x --data-dir x", "unknown flag --data-dir; see maelab fit --help"),
        ("pretrain smoke --no-flap", "unknown flag --no-flap; did you mean --no-flip?"),
        ("evaluate mae --overwrite", "unknown flag --overwrite"),
        ("reconstruct mae --devices 2", "unknown flag --devices; did you mean --device?"),
        ("pretrain smoke extra", "unexpected 'extra'; see maelab pretrain --help"),
        ("info mae -- --json", "unexpected '--json'; see maelab info --help"),
        ("pretrain smoke --mask-ratio", "--mask-ratio: expected one argument; see maelab pretrain --help"),
        ("pretrain smoke --mask-ratio half", "--mask-ratio must be a finite number, got 'half'"),
        ("pretrain smoke --epochs 1.5", "--epochs must be a whole number, got '1.5'"),
        ("pretrain smoke --img-size 28", "--img-size must be 2 of them, each a whole number, or None, got '28'"),
        ("pretrain smoke --optimizer sgd", "--optimizer must be adamw or muon, got 'sgd'"),
        ("pretrain smoke --mask-ratio 1.5", "--mask-ratio must lie between 0 and 1, got 1.5"),
        ("pretrain smoke --epochs 0", "--epochs must be at least 1, got 0"),
        ("pretrain smoke --blr nan", "--blr must be a finite number, got 'nan'"),
        ("pretrain smoke --warmup-epochs inf", "--warmup-epochs must be a finite number, got 'inf'"),
        ("pretrain smoke --seed 9223372036854775808", "--seed must be below 2**63, got 9223372036854775808"),
        ("pretrain smoke --threads 0", "--threads must be at least 1, got 0"),
        ("pretrain smoke --embed-dim 30", "--embed-dim must be a multiple of 4"),
        ("pretrain smoke --accumulate 3", "--accumulate 3 does not divide --batch-size 256"),
        ("finetune smoke --label-fraction 0", "--label-fraction must be above 0"),
        ("pretrain smoke --data mnst", "there is no data set 'mnst'; did you mean 'mnist'?"),
        ("pretrain smoke --data folder:nowhere", "there is no folder nowhere"),
        ("pretrain smoke --data mae", "there is no data set 'mae'; for images of your own write 'folder:mae'"),
        (f"pretrain smoke {DATA} --patch-size 5", "--patch-size 5 does not divide the image size 28x28"),
        (f"finetune smoke {DATA} --patch-size 5", "--patch-size 5 does not divide the image size 28x28"),
        (f"pretrain smoke {DATA} --mask-ratio 0.99", "--mask-ratio 0.99 leaves no patch to see: the image has 16"),
        (f"pretrain smoke {DATA} --mask-ratio 1e-20", "--mask-ratio 1e-20 leaves no patch hidden"),
        (f"pretrain smoke {DATA} --limit 999", "--limit 999 is not between 1 and"),
        (f"pretrain smoke {DATA} --accumulate 64", "a batch of 96 images cannot be cut into 64 equal parts"),
        (f"finetune smoke {DATA} --data folder:DIGITS/3", "folder:DIGITS/3 has no labels: to fine-tune, put the"),
        (f"finetune smoke {DATA} --init nowhere", "no run folder or checkpoint at nowhere"),
        (f"finetune smoke {DATA} --init mae --depth 3", "--depth 3 does not fit --init mae, which has 2"),
        (f"finetune smoke {DATA} --init mae --patch_size=4", "--patch-size 4 does not fit --init mae, which has 7"),
        (f"finetune smoke {DATA} --init mae --class-token", "--class-token True does not fit --init mae"),
        (f"finetune smoke {DATA} --init runs/probe-mae-1", "--init runs/probe-mae-1 is a Linear and has no encoder"),
        (f"finetune smoke {DATA} --init mae --img-size 30 30", "--patch-size 7 does not divide the image size 30x30"),
        ("probe nowhere", "no run folder or checkpoint at nowhere"),
        ("probe runs/probe-mae-1", "runs/probe-mae-1 is a linear probe; name the run that it judged"),
        ("probe mae --pool token", "mae has no class token; use --pool avg"),
        ("evaluate nowhere", "no run folder or checkpoint at nowhere"),
        ("evaluate said", "said holds no checkpoint (looked for model.safetensors and config.json, and for checkp"),
        ("evaluate said/mae.json", "said/mae.json holds no checkpoint"),
        ("evaluate runs/probe-mae-1", "runs/probe-mae-1 is a linear probe; its figures are in its result.json"),
        ("evaluate mae --mask-ratio 1", "--mask-ratio must lie between 0 and 1, got 1.0"),
        ("evaluate mae --mask-ratio 0", "--mask-ratio must lie between 0 and 1, got 0.0"),
        ("evaluate mae --split all", "--split must be test or val, got 'all'"),
        ("evaluate mae/checkpoints/best --split val", "--split val needs a run folder: its config.json says which"),
        (
            "evaluate scratch --data folder:CIFAR",
            "folder:CIFAR has other classes than the model was trained on: 10 (air",
        ),
        ("evaluate scratch --data folder:DIGITS/3", "folder:DIGITS/3 has no test images; use --split val"),
        ("evaluate scratch --split val --data folder:DIGITS/3", "folder:DIGITS/3 has no labels to evaluate"),
        ("reconstruct scratch", "scratch is a VisionTransformer; only a pretraining run can reconstruct"),
        ("reconstruct mae nowhere.png", "cannot read the image nowhere.png: No such file or directory"),
        (
            "reconstruct mae said/mae.json",
            "cannot read the image said/mae.json: not a PNG, JPEG, WEBP",
        ),
        ("reconstruct mae --count 0", "--count must be at least 1, got 0"),
        ("reconstruct mae --mask-ratio nan", "--mask-ratio must be a finite number, or None, got 'nan'"),
        ("reconstruct mae --mask-ratio 0.5 0.96", "--mask-ratio 0.96 leaves no patch to see: the image has 16 patches"),
        ("reconstruct mae --out a.jpg", "--out a.jpg: the picture is a PNG; give a name that ends in .png"),
        ("reconstruct mae --out a.gif", "--out a.gif: only --sweep makes an animation; give a name that ends in .png"),
        ("reconstruct mae --sweep --out a.jpg", "--out a.jpg: the picture is a PNG; give a name that ends in .png (or"),
        ("reconstruct mae --sweep --mask-ratio 0.5", "--mask-ratio, --mask-file and --sweep exclude each other"),
        ("reconstruct mae --mask-kind grid --mask-file x.png", "--mask-kind and --mask-file exclude each other"),
        ("reconstruct mae --mask-file nowhere", "cannot read the mask nowhere: No such file or directory"),
        ("reconstruct mae --mask-file DIGITS/3", "cannot read the mask DIGITS/3: Is a directory"),
        (
            "reconstruct mae --mask-kind blocks",
            "--mask-kind must be random, block or grid, got 'blocks'; did you mean block?",
        ),
        ("info nowhere", "no run folder or checkpoint at nowhere"),
        ("info said", "said holds no checkpoint"),
    ],
)
def test_bad_usage_is_one_line(line, message, work, maelab, digits_folder, cifar_folder):
    places = {"DIGITS": str(digits_folder), "CIFAR": str(cifar_folder)}
    for short, long in places.items():
        line, message = line.replace(short, long), message.replace(short, long)
    before = sorted(work.rglob("*"))
    ended = maelab.run(*line.split(), cwd=work)
    assert ended.error().startswith(message) and ended.status == 2
    assert sorted(work.rglob("*")) == before, "a refusal leaves nothing behind"


def test_wrong_channels(work, maelab, monkeypatch):
    """No folder can be wrong, it is converted; of the built-in sets the small copies in tests/ would have to do."""
    import torch

    from maelab.data import Dataset, ImageSet
    from maelab.errors import UsageError
    from maelab.training import checkpoint

    colour = ImageSet(torch.zeros(4, 3, 28, 28, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64))
    monkeypatch.setattr(checkpoint, "load", lambda name, **_: Dataset(name, colour, colour, ("a",), {}))
    spec = checkpoint.read_spec(work / "mae")
    with pytest.raises(UsageError, match=r"^cifar10 has images with 3 channels; the model was trained with 1$"):
        checkpoint.load_matching_data(spec, "cifar10", None)


def copy(work: Path, name: str, to: Path) -> Path:
    return Path(shutil.copytree(work / name, to / name))


DAMAGE = {
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "garbage": lambda content: b"\xff\x00garbage" * 100,
    "list": lambda content: b"[1, 2]",
    "other": lambda content: (
        b'{"format": 1, "model": "VisionTransformer", "arguments": {"depth": 1}, "data": "mnist", "class_names": []}'
    ),
}


@pytest.mark.parametrize(
    ("command", "file", "damage"),
    [("evaluate", file, damage) for file in ("model.safetensors", "config.json") for damage in DAMAGE]
    + [(command, "model.safetensors", "cut") for command in ("reconstruct", "probe", "finetune smoke --init")]
    + [(command, "config.json", "cut") for command in ("reconstruct", "probe", "finetune smoke --init", "info")],
)
def test_a_damaged_checkpoint_is_named(command, file, damage, work, maelab, tmp_path):
    shutil.copytree(work / "mae" / "checkpoints" / "best", tmp_path / "mae")  # which has no checkpoint before it
    target = tmp_path / "mae" / file
    target.write_bytes(DAMAGE[damage](target.read_bytes()))
    data = ["--data", "folder:nowhere"] if "finetune" in command else []
    ended = maelab.run(*command.split(), "mae", *data, cwd=tmp_path)
    # A sound config.json of another model shows only when the weights do not fit.
    named = "model.safetensors" if damage == "other" else file
    assert ended.status == 1 and ended.error().startswith(f"mae/{named} is damaged")


@pytest.mark.parametrize("file", ["config.json", "result.json", "env.json"])
def test_a_damaged_run_folder_is_named(file, work, maelab, tmp_path):
    (copy(work, "scratch", tmp_path) / file).write_bytes(b'{"task": "finetune", ')
    assert maelab.run("info", "scratch", cwd=tmp_path).error().startswith(f"scratch/{file} is damaged: ")
    if file == "config.json":
        assert maelab.run("evaluate", "scratch", cwd=tmp_path).error().startswith("scratch/config.json is damaged: ")


def test_rows_cut_off_in_metrics_are_left_out(work, maelab, tmp_path):
    rows = copy(work, "scratch", tmp_path) / "metrics.jsonl"
    rows.write_bytes(rows.read_bytes()[:-20] + b"\n\xff\xfe\n")
    summary = maelab.run("info", "scratch", "--json", cwd=tmp_path).json()
    assert [row["split"] for row in summary["last_metrics"]] == ["val", "train"]


# --- no room, no right ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out", ["file", "file/run", "/proc/run"])
def test_a_place_that_cannot_be_written(out, maelab, tmp_path, digits_folder):
    (tmp_path / "file").write_text("mine")
    ended = maelab.run("pretrain", "smoke", "--data", f"folder:{digits_folder}", *SMALL, "--out", out, cwd=tmp_path)
    assert ended.error().startswith(
        "--out file is a file; give the name of a folder" if out == "file" else f"cannot write the run folder {out}: "
    )
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "mine"


def test_a_picture_that_cannot_be_written(work, maelab, tmp_path):
    (tmp_path / "folder.png").mkdir()
    for out, why in (("folder.png", "Is a directory"), ("/proc/a.png", "")):
        message = maelab.run("reconstruct", work / "mae", "--out", out, *CPU, cwd=tmp_path).error()
        assert message.startswith(f"cannot write {out}: {why}")
    assert [p.name for p in tmp_path.rglob("*")] == ["folder.png"], "nothing half-written is left"


@pytest.mark.parametrize(
    ("room", "file"),
    [
        (100, "new/config.json"),
        (5_000, "new/checkpoints/last/model.safetensors"),
        (200_000, "new/checkpoints/last/training.pt"),
    ],
)
def test_a_full_disk_in_the_first_epoch(room, file, maelab, tmp_path, digits_folder):
    """As if the disk had no room for files beyond a size. Nothing could be saved, so nothing stays."""
    line = ("pretrain", "smoke", "--data", f"folder:{digits_folder}", *SMALL, "--out", "new")
    ended = maelab.run(*line, cwd=tmp_path, largest_file=room)
    assert ended.status == 1 and ended.error().startswith(f"cannot write {file}: ")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_old_picture(work, maelab, tmp_path):
    old = tmp_path / "reconstruction.png"
    old.write_bytes(b"old")
    ended = maelab.run("reconstruct", work / "mae", *CPU, cwd=tmp_path, largest_file=1000)
    assert ended.status == 1 and ended.error() == "cannot write reconstruction.png: File too large"
    assert old.read_bytes() == b"old" and list(tmp_path.iterdir()) == [old]


def test_stdout_that_is_full_or_closed(work, maelab):
    full = maelab.run("info", work / "mae", cwd=work, stdout="/dev/full")
    assert (full.status, full.err) == (1, "maelab: No space left on device\n")
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "maelab", "--help"]
    closed = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, env=environment(work))
    os.close(writer)
    assert (closed.returncode, closed.stderr) == (0, b""), "like any command before `head`"


# --- the unexpected -------------------------------------------------------------------------------------------------


def test_debug_shows_where(work, maelab):
    quiet, loud = (maelab.run("evaluate", "nowhere", *debug, cwd=work) for debug in ([], ["--debug"]))
    assert quiet.err == "maelab: no run folder or checkpoint at nowhere\n"
    assert loud.err.startswith("Traceback (most recent call last):") and "find_checkpoint" in loud.err
    assert loud.err.endswith("\n" + quiet.err) and loud.status == quiet.status == 2
    for line in ("--debug evaluate nowhere", "evaluate --debug nowhere", "evaluate nowhere --json --debug"):
        assert maelab.run(*line.split(), cwd=work).err == loud.err, line
    assert maelab.run("evaluate", "--", "--debug", cwd=work).err == "maelab: no run folder or checkpoint at --debug\n"


def test_too_large_for_memory(maelab, tmp_path, digits_folder):
    line = ("pretrain", "smoke", "--data", f"folder:{digits_folder}", *SMALL, "--embed-dim", 65_536, "--depth", 1000)
    assert maelab.run(*line, cwd=tmp_path).error().startswith("there is not enough memory; try a smaller --batch-size")


def alone(code: str, words: list[str], home: Path, **streams: Any) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, in which `code` has changed what `maelab info` does."""
    code = f"import sys, os, threading; from maelab import cli\n{code}\nsys.exit(cli.main())"
    line = [sys.executable, "-c", code, *words]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
    return subprocess.run(line, env=environment(home), text=True, timeout=60, **streams)


BROKEN = """
def broken(run):
    raise ZeroDivisionError("one\\ntwo")
cli.info = broken
"""
OTHER_PIPE = """
def broken(run):
    reader, writer = os.pipe()
    os.close(reader)
    os.write(writer, b"to a process that has ended")
cli.info = broken
"""
THREAD = """
def broken(run):
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()
    return {"run": run, "complete": True, "config": {}, "model": "none"}
cli.info = broken
"""
EXITS = """
def broken(run):
    sys.exit("a library has had enough")
cli.info = broken
"""


def test_a_programming_error_is_one_line_too(tmp_path):
    quiet = alone(BROKEN, ["info", "x"], tmp_path)
    said = "maelab: ZeroDivisionError: one (this should not happen; --debug shows where)\n"
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (1, "", said)


def test_a_pipe_that_breaks_is_a_failure_unless_it_is_stdout(tmp_path):
    """As when a worker or a tracker ends before it has read everything."""
    ended = alone(OTHER_PIPE, ["info", "x"], tmp_path)
    assert (ended.returncode, ended.stdout) == (1, "") and ended.stderr.startswith("maelab: a pipe broke: ")
    with open(tmp_path / "out", "w") as file:
        assert alone(OTHER_PIPE, ["info", "x"], tmp_path, stdout=file).returncode == 1
    reader, writer = os.pipe()
    os.close(reader)
    large = "cli.info = lambda run: {'run': 'x' * 200_000, 'complete': True, 'config': {}, 'model': 'none'}"
    closed = alone(large, ["info", "x"], tmp_path, stdout=writer)
    os.close(writer)
    assert (closed.returncode, closed.stderr) == (0, "")


def test_no_traceback_without_debug(tmp_path):
    thread = alone(THREAD, ["info", "x"], tmp_path)
    said = "maelab: ZeroDivisionError: division by zero (this should not happen; --debug shows where)\n"
    assert (thread.returncode, thread.stderr) == (0, said)
    assert "Traceback" in alone(THREAD, ["--debug", "info", "x"], tmp_path).stderr
    gave_up = alone(EXITS, ["info", "x"], tmp_path)
    assert (gave_up.returncode, gave_up.stdout) == (1, "")
    assert gave_up.stderr.startswith("maelab: SystemExit: a library has had enough")


@pytest.mark.parametrize("closed", [1, 2])
def test_streams_that_were_closed_before_the_start(closed, work):
    line = f'exec "$0" -m maelab "$@" {closed}>&-'
    good, bad = (
        subprocess.run(
            ["bash", "-c", line, sys.executable, "info", name], cwd=work, env=environment(work), capture_output=True
        )
        for name in ("mae", "nowhere")
    )
    assert (good.returncode, bad.returncode) == (0, 2)
    assert good.stderr == b"" and (good.stdout == b"") == (closed == 1)
    assert bad.stdout == b"" and bad.stderr == (
        b"" if closed == 2 else b"maelab: no run folder or checkpoint at nowhere\n"
    )


def test_a_second_interrupt_shows_no_traceback(tmp_path):
    """Whoever presses Ctrl-C twice sees one line, and is rid of it."""
    twice = "import signal\nsay = cli.printing.complain\ncli.info = lambda run: os.kill(os.getpid(), signal.SIGINT)\n"
    twice += (
        "def said(message):\n    say(message)\n    os.kill(os.getpid(), signal.SIGINT)\ncli.printing.complain = said"
    )
    ended = alone(twice, ["info", "x"], tmp_path)
    assert ended.returncode == -signal.SIGINT and ended.stderr.startswith("maelab: interrupted; ")
    assert ended.stderr.count("\n") == 1, ended.stderr


def test_images_that_cannot_be_read_are_named(maelab, tmp_path, digits_folder):
    mine = Path(shutil.copytree(digits_folder, tmp_path / "digits"))
    (mine / "3" / "bad.png").write_bytes(b"not a picture")
    ended = maelab.run("pretrain", "smoke", "--data", "folder:digits", *SMALL, "--json", cwd=tmp_path)
    assert ended.json()["task"] == "pretrain"
    assert "maelab: skipped 1 of 301 images: 3/bad.png (not a PNG, JPEG, WEBP, " in ended.err


def test_messages_are_worded_alike():
    """They follow 'maelab: ', so they begin in lower case, or with a name, and end without a full stop."""
    package, seen = Path(__file__).parents[1] / "maelab", 0
    for file in package.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
            if called not in ("UsageError", "RunError", "Interrupted", "_Busy"):
                continue
            assert isinstance(node, ast.Call)
            message = node.args[0]
            parts = message.values if isinstance(message, ast.JoinedStr) else [message]
            texts = [part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]
            place = f"{file.name}:{node.lineno}"
            if isinstance(parts[0], ast.Constant):
                first = texts[0].split()[0]
                assert not first[0].isupper() or first.isupper(), f"{place}: {texts[0]}"
            if isinstance(parts[-1], ast.Constant):
                assert not texts[-1].replace("...", "").endswith((".", "!")), f"{place}: {texts[-1]}"
            assert "\n" not in "".join(texts), place
            seen += 1
    assert seen > 60
