"""Run folders: stopped, killed and continued runs end as if nothing had happened; nothing is lost or overwritten."""

import json
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from processes import Maelab
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.metadata import parse_session_start_info_plugin_data

from maelab import cli
from maelab.training import loop
from maelab.training.trackers import Events

pytestmark = pytest.mark.usefixtures("nothing_drawn")
EPOCHS, STEPS = 3, 6  # of 96 images in batches of 16
SMALL = ("--limit", 96, "--batch-size", 16, "--threads", 1)
PRETRAIN = ("pretrain", "smoke", "--epochs", EPOCHS, "--val-fraction", 0.02, *SMALL, "--kernels", "torch")
FINETUNE = ("finetune", "smoke", "--init", "none", "--epochs", EPOCHS, *SMALL, "--kernels", "torch")
MUON_AVERAGE = ("--optimizer", "muon", "--ema-decay", 0.9, "--accumulate", 2, "--clip-grad", 1, "--flip")
MIXED = ("--mixup", 0.8, "--cutmix", 1, "--drop-path", 0.3, "--rand-augment-ops", 2, "--random-erasing", 0.5)
SAVED = "run/checkpoints/commit.json"  # put in place once for each checkpoint, after all else
TIMES = {"seconds", "images_per_s", "train_time_s"}


@pytest.fixture(scope="module")
def data(digits_folder: Path) -> tuple[str, str]:
    return "--data", f"folder:{digits_folder}"


Whole = Callable[..., Path]


@pytest.fixture(scope="module")
def whole(maelab: Maelab, data: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """The folder of an uninterrupted run of a command."""
    cwd = tmp_path_factory.mktemp("whole")
    done: dict[tuple[Any, ...], Path] = {}

    def run(*command: object) -> Path:
        if command not in done:
            done[command] = cwd / str(len(done))
            ended = maelab.run(*command, *data, "--out", done[command], cwd=cwd)
            assert ended.status == 0, ended.err
        return done[command]

    return run


def rows(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on time; every line must be whole."""
    lines = (folder / "metrics.jsonl").read_bytes().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def result(folder: Path) -> dict[str, Any]:
    content = json.loads((folder / "result.json").read_text())
    return {k: v for k, v in content.items() if k not in TIMES}


def assert_same(folder: Path, whole: Path) -> None:
    """Two finished runs are the same, bit by bit, and hold the same files but for TensorBoard's."""
    for name in ("best", "last"):
        for file in ("model.safetensors", "config.json"):
            one, two = (f / "checkpoints" / name / file for f in (folder, whole))
            assert one.read_bytes() == two.read_bytes(), f"{name}/{file}"
    assert rows(folder) == rows(whole) and result(folder) == result(whole)
    files = [{p.relative_to(f) for p in f.rglob("*") if not p.name.startswith("events.")} for f in (folder, whole)]
    assert files[0] == files[1], "no temporary file stays"


def state(folder: Path) -> dict[str, bytes]:
    """Every file but TensorBoard's, which holds nothing that a run needs."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and not p.name.startswith("events.")]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def at_step(monkeypatch: pytest.MonkeyPatch, number: int, action: Callable[[], object]) -> None:
    """Do something in the middle of a step (counted from 0 over the whole run) of a run in this process."""
    original = loop.schedule

    def schedule(step: int, *others: int) -> float:
        if step == number:
            action()
        return original(step, *others)

    monkeypatch.setattr(loop, "schedule", schedule)


def here(*command: object) -> int:
    """Run a command in this process."""
    return cli.main([str(part) for part in command])


# --- stopped and continued ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_process_says_how_to_go_on_and_does(number, maelab, whole, data, tmp_path):
    line = (*PRETRAIN, "--epochs", 20, *data, "--out", "run")
    process = maelab.start(*line, cwd=tmp_path)
    process.wait_for(tmp_path / "run" / "metrics.jsonl", 6)
    process.signal(signal.SIGSTOP)
    second = maelab.run(*line, cwd=tmp_path)
    process.signal(number)
    process.signal(signal.SIGCONT)
    stopped = process.wait()
    assert second.status == 2
    assert second.error() == "another process is working in run; wait for it or choose another --out"
    message = stopped.error()
    assert stopped.status == 130, stopped
    assert message.startswith("stopped at step ") and message.endswith(
        " of 120 and saved in run; the same command goes on from there"
    )
    assert not (tmp_path / "run" / "result.json").exists()
    info = maelab.run("info", "run", "--json", cwd=tmp_path).json()
    step = int(message.split()[3])
    assert info["complete"] is False and info["epochs_done"] == step // STEPS
    ended = maelab.run(*line, cwd=tmp_path)
    assert ended.status == 0 and f"going on from step {step} of 120\n" in ended.err
    assert_same(tmp_path / "run", whole(*PRETRAIN, "--epochs", 20))


@pytest.mark.parametrize("stop", [0, STEPS - 1, STEPS + 3], ids=["first", "last of an epoch", "within an epoch"])
def test_stopped_at_a_step(stop, monkeypatch, capsys, whole, data, tmp_path):
    """The signal comes within a step, which is still finished. The run stops a second time, further on."""
    monkeypatch.chdir(tmp_path)
    line = (*PRETRAIN, *MUON_AVERAGE, *data, "--out", "run")
    for step in (stop, stop + 4):
        with monkeypatch.context() as patch:
            at_step(patch, step, lambda: signal.raise_signal(signal.SIGINT))
            assert here(*line) == 130
        assert f"stopped at step {step + 1} of {EPOCHS * STEPS} and saved" in capsys.readouterr().err
    assert here(*line) == 0
    assert_same(tmp_path / "run", whole(*PRETRAIN, *MUON_AVERAGE))


def test_a_signal_in_the_last_step_changes_nothing(monkeypatch, whole, data, tmp_path):
    at_step(monkeypatch, EPOCHS * STEPS - 1, lambda: signal.raise_signal(signal.SIGTERM))
    assert here(*PRETRAIN, *data, "--out", tmp_path / "run") == 0
    assert_same(tmp_path / "run", whole(*PRETRAIN))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "the loop gives the signals back"


@pytest.mark.parametrize(
    "command",
    [
        (*FINETUNE, *MUON_AVERAGE, *MIXED),
        (*FINETUNE, *MIXED, "--layer-decay", 0.7, "--label-fraction", 0.5, "--class-token", "--learned-pos-embed"),
        (*PRETRAIN, "--norm-pix-loss", "--knn-every", 1, "--crop-scale", 0.5, "--affine-degrees", 10),
        (*FINETUNE[:-2], "--num-heads", 1, "--precision", "bf16"),  # the default kernels
    ],
    ids=["muon and average", "everything else", "pretrain", "bf16"],
)
def test_every_option_resumes_exactly(command, monkeypatch, maelab, whole, data, tmp_path):
    """Killed hard once the second epoch is saved, then continued: twice, the second time at its very end."""
    line = (*command, *data, "--out", "run")
    assert maelab.run(*line, cwd=tmp_path, die=(SAVED, 2, "after")).status == -signal.SIGKILL
    assert maelab.run(*line, cwd=tmp_path, die=("result.json", 1, "before")).status == -signal.SIGKILL
    assert maelab.run(*line, cwd=tmp_path).status == 0
    assert_same(tmp_path / "run", whole(*command))


def test_a_fine_tuning_with_images_without_labels_resumes_exactly(maelab, whole, data, tmp_path):
    few = ("--limit", 50, "--label-fraction", 0.2, "--unlabelled", 3, "--ema-decay", 0.8, "--epochs", 4)
    few = (*few, "--init", whole(*FINETUNE))
    line = (*(part for part in FINETUNE if part not in ("--limit", 96)), *few, *data)
    assert maelab.run(*line, "--out", "run", cwd=tmp_path, die=(SAVED, 2, "before")).status == -signal.SIGKILL
    for out in ("run", "whole"):
        assert maelab.run(*line, "--out", out, cwd=tmp_path).status == 0
    assert_same(tmp_path / "run", tmp_path / "whole")
    assert all("sure" in row for row in rows(tmp_path / "run") if row["split"] == "train")
    for changes, message in (
        (("--label-fraction", 1.0), "so --unlabelled adds nothing"),
        (("--init", "none"), "begins from a classifier of the same classes, which --init none is not"),
        (("--init", whole(*PRETRAIN)), "begins from a classifier of the same classes"),
    ):
        assert message in maelab.run(*line, *changes, "--out", "other", cwd=tmp_path).error()


def test_images_without_labels_go_on_from_the_classifier(maelab, whole, data, tmp_path):
    """With rates of zero it stays what it was, its head included."""
    line = ("--init", whole(*FINETUNE), "--label-fraction", 0.2, "--unlabelled", 3, "--ema-decay", 0.8)
    ended = maelab.run(*FINETUNE, *line, "--limit", 50, "--epochs", 1, "--blr", 0, *data, "--out", "run", cwd=tmp_path)
    assert ended.status == 0, ended.err
    assert result(tmp_path / "run")["val"]["accuracy"] == result(whole(*FINETUNE))["val"]["accuracy"]


def test_a_probe_resumes_exactly(maelab, whole, data, tmp_path):
    line = ("probe", whole(*PRETRAIN), "--epochs", 4, *SMALL, "--kernels", "torch")
    assert maelab.run(*line, "--out", "run", cwd=tmp_path, die=(SAVED, 2, "before")).status == -signal.SIGKILL
    for out in ("run", "whole"):
        assert maelab.run(*line, "--out", out, cwd=tmp_path).status == 0
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_a_probe_whose_config_still_has_fields_that_nothing_read_is_the_same(maelab, whole, data, tmp_path):
    """Unfinished it goes on, complete it is used."""
    line = ("probe", whole(*PRETRAIN), "--epochs", 2, *SMALL, "--kernels", "torch", "--json")
    assert maelab.run(*line, cwd=tmp_path, die=(SAVED[4:], 1, "after")).status == -signal.SIGKILL
    (run,) = (tmp_path / "runs").iterdir()
    for out in ((), ("--out", run)):
        config = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps(config | {"optimizer": "adamw", "muon_lr": 0.02}))
        assert maelab.run(*line, *out, cwd=tmp_path).json()["run"].endswith(run.name)
    assert config.keys().isdisjoint({"optimizer", "muon_lr"})
    refused = maelab.run(*line, "--muon-lr", 0.1, cwd=tmp_path)
    assert refused.error().startswith("unknown flag --muon-lr")


@pytest.mark.parametrize(
    "moment",
    [
        ("run/config.json", 1, "after"),  # nothing is there yet but that
        ("checkpoints/best/model.safetensors", 1, "after"),  # the best weights are saved, their epoch is not
        ("checkpoints/last/model.safetensors", 2, "before"),  # between two files of one checkpoint
        ("checkpoints/last/training.pt", 3, "after"),
        ("previous/commit.json", 2, "after"),
    ],
    ids=lambda moment: f"{moment[2]} {moment[0].replace('/', '-')}",
)
def test_killed_at_the_worst_moment(moment, maelab, whole, data, tmp_path):
    line = (*PRETRAIN, *data, "--out", "run")
    assert maelab.run(*line, cwd=tmp_path, die=moment).status == -signal.SIGKILL
    assert not (tmp_path / "run" / "result.json").exists(), "it is written last"
    assert maelab.run(*line, cwd=tmp_path).status == 0
    assert_same(tmp_path / "run", whole(*PRETRAIN))


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("n", range(1, 25))
def test_killed_at_every_write(n, when, maelab, whole, data, tmp_path):
    line = (*FINETUNE, *MUON_AVERAGE, *data, "--out", "run")
    killed = maelab.run(*line, cwd=tmp_path, die=("", n, when))
    complete = (tmp_path / "run" / "result.json").exists()
    if killed.status == 0:
        assert n > 15, "this run writes fewer files"
    else:
        assert killed.status == -signal.SIGKILL and not (complete and when == "before")
    if not complete:
        assert maelab.run(*line, cwd=tmp_path).status == 0
    assert_same(tmp_path / "run", whole(*FINETUNE, *MUON_AVERAGE))


def kill_at_random(seed: int, kills: int, maelab: Maelab, line: tuple[object, ...], cwd: Path) -> None:
    chance = random.Random(seed)
    for _ in range(kills):
        process = maelab.start(*line, cwd=cwd)
        time.sleep(chance.uniform(0.05, 0.8))
        process.signal(chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
        ended = process.wait()
        assert ended.status in (0, 130, -signal.SIGKILL) or "a complete run" in ended.err, (seed, ended)
        if ended.status == 0 or ended.status == 2:
            break


@pytest.mark.parametrize(
    ("seed", "kills"), [(0, 3), *(pytest.param(seed, 20, marks=pytest.mark.slow) for seed in range(1, 6))]
)
def test_killed_at_random(seed, kills, maelab, whole, data, tmp_path):
    command = (*PRETRAIN, "--epochs", 20)
    kill_at_random(seed, kills, maelab, (*command, *data, "--out", "run"), tmp_path)
    ended = maelab.run(*command, *data, "--out", "run", cwd=tmp_path)
    assert ended.status == 0 or "a complete run" in ended.err, (seed, ended)
    assert_same(tmp_path / "run", whole(*command))


def test_rows_that_no_checkpoint_covers_are_written_again(monkeypatch, whole, data, tmp_path):
    """As a kill between metrics.jsonl and the checkpoint leaves it, then stops before the next row is written."""
    line, file = (*PRETRAIN, *data, "--out", tmp_path / "run"), tmp_path / "run" / "metrics.jsonl"
    for step in (STEPS + 1, STEPS + 3):
        with monkeypatch.context() as patch:
            at_step(patch, step, lambda: signal.raise_signal(signal.SIGINT))
            assert here(*line) == 130
        with open(file, "ab") as out:
            out.write(b'{"epoch": 2, "split": "train", "loss": 0.5}\n{"epoch"')
    assert here(*line) == 0
    assert_same(tmp_path / "run", whole(*PRETRAIN))


# --- what is written as it goes -------------------------------------------------------------------------------------


def test_metrics_have_a_row_for_each_epoch_and_split(whole):
    folder = whole(*FINETUNE, *MUON_AVERAGE, *MIXED)
    assert [(row["epoch"], row["split"]) for row in rows(folder)] == [
        (epoch, split) for epoch in (1, 2, 3) for split in ("train", "val")
    ]
    train, val = rows(folder)[-2:]
    assert set(train) == {"epoch", "split", "loss", "accuracy", "lr"} and set(val) == {
        "epoch", "split", "loss", "accuracy"
    }  # fmt: skip
    assert result(folder)["train"] == {k: train[k] for k in ("loss", "accuracy")}
    best = max((row for row in rows(folder) if row["split"] == "val"), key=lambda row: (row["accuracy"], -row["loss"]))
    assert (result(folder)["best_epoch"], result(folder)["val"]["accuracy"]) == (best["epoch"], best["accuracy"])
    assert "knn_accuracy" in rows(whole(*PRETRAIN, "--norm-pix-loss", "--knn-every", 1, "--crop-scale", 0.5,
                                        "--affine-degrees", 10))[1]  # fmt: skip


def test_tensorboard_holds_every_epoch_once(maelab, data, tmp_path):
    """Also where a killed process left events of an epoch that is done again."""
    line = (*PRETRAIN, *data, "--out", "run")
    assert maelab.run(*line, cwd=tmp_path, die=(SAVED, 2, "before")).status == -signal.SIGKILL
    assert maelab.run(*line, cwd=tmp_path).status == 0
    assert len(list((tmp_path / "run").glob("events.*"))) == 3
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    named = {f"train/{k}" for k in ("loss", "lr", "images_per_s", "seconds")}
    named |= {f"val/{k}" for k in ("loss", "masked_mse", "knn_accuracy", "effective_rank")}
    assert {tag for tag in events.Tags()["scalars"] if not tag.startswith("best/")} == named
    for name in named - {"train/images_per_s", "train/seconds"}:
        split, key = name.split("/")
        logged = [(event.step, event.value) for event in events.Scalars(name)]
        written = [(row["epoch"], row[key]) for row in rows(tmp_path / "run") if row["split"] == split]
        assert [step for step, _ in logged] == [1, 2, 3]
        assert logged == [(epoch, pytest.approx(value, rel=1e-6)) for epoch, value in written]


def test_events_are_read_in_the_order_in_which_they_were_written(tmp_path):
    """A file of events hides those of its step that were read before it."""
    for number in range(20):
        events = Events(tmp_path, number)
        events.log({"loss": 1.0}, number)
        events.close()
    read = EventAccumulator(str(tmp_path))
    read.Reload()
    assert [said.step for said in read.Scalars("loss")] == [*range(20)]


def test_tensorboard_gets_hyperparameters_scores_and_pictures(maelab, data, tmp_path):
    assert maelab.run(*FINETUNE, *data, "--out", "run", cwd=tmp_path, drawn=True).status == 0
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    for part in ("val", "test"):
        (said,) = events.Scalars(f"best/{part}_accuracy")
        assert said.value == pytest.approx(result(tmp_path / "run")[part]["accuracy"], rel=1e-6)
    drawn = {f"figures/{file.stem}" for file in (tmp_path / "run" / "figures").iterdir()}
    assert set(events.Tags()["images"]) == drawn != set()
    (curves,) = events.Images("figures/curves")
    with Image.open(tmp_path / "run" / "figures" / "curves.png") as picture:
        assert picture.size == (curves.width, curves.height)
    content = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    asked = parse_session_start_info_plugin_data(content).hparams
    assert asked["depth"].number_value == 2 and asked["recipe"].string_value == "smoke"


def test_patience_stops_early(whole):
    """With a rate of zero nothing improves after the first epoch."""
    folder = whole(*FINETUNE, "--epochs", 50, "--blr", 0, "--patience", 2)
    assert (result(folder)["epochs"], result(folder)["best_epoch"], len(rows(folder))) == (3, 1, 6)


def test_limit_and_label_fraction(whole):
    """About 270 of the 300 images are for training, and about 14 of those for validation."""
    assert result(whole(*FINETUNE, "--limit", 50, "--epochs", 1))["train_images"] == 50
    few = result(
        whole("finetune", "smoke", "--limit", 20, "--label-fraction", 0.1, "--epochs", 1, "--kernels", "torch")
    )
    assert few["train_images"] == 20
    third = [part for part in FINETUNE if part not in ("--limit", 96)]
    assert result(whole(*third, "--limit", 80, "--label-fraction", 1 / 3, "--epochs", 1))["train_images"] == 80


# --- what may be written where --------------------------------------------------------------------------------------


def test_a_complete_run_is_replaced_only_when_asked(maelab, whole, data, tmp_path):
    run = Path(shutil.copytree(whole(*PRETRAIN), tmp_path / "run"))
    line, before = (*PRETRAIN, *data, "--out", "run"), state(run)
    refused = maelab.run(*line, "--seed", 1, cwd=tmp_path)
    assert refused.error() == (
        "run holds a complete run with seed 0 instead of 1; use --overwrite to replace it, or another --out"
    )
    assert refused.status == 2 and state(run) == before
    replaced = maelab.run(*line, "--seed", 1, "--overwrite", cwd=tmp_path, die=(SAVED, 2, "after"))
    assert replaced.status == -signal.SIGKILL and not (run / "result.json").exists()
    again = maelab.run(*line, "--seed", 1, "--overwrite", cwd=tmp_path)
    assert again.status == 0 and f"going on from step {2 * STEPS} of" in again.err, "the same command still resumes"
    assert_same(run, whole(*PRETRAIN, "--seed", 1))
    assert len(list(run.glob("events.*"))) == 3, "one of each process, one of the outcome, none of the first run"


def test_another_config_is_refused_and_named(maelab, data, tmp_path):
    line = (*PRETRAIN, *data, "--out", "run")
    assert maelab.run(*line, cwd=tmp_path, die=(SAVED, 2, "after")).status == -signal.SIGKILL
    before = state(tmp_path / "run")
    four = ("--depth", 1, "--seed", 3, "--epochs", 4, "--blr", 1)
    for other, named in (
        (four[2:4], "seed 0 instead of 3;"),
        (four[2:6], "epochs 3 instead of 4, seed 0 instead of 3;"),
        (four, "blr 0.001 instead of 1.0, depth 2 instead of 1, epochs 3 instead of 4, ...;"),
    ):
        refused = maelab.run(*line, *other, cwd=tmp_path)
        assert refused.error().startswith(f"run holds an unfinished run with {named} use --overwrite to replace it")
        assert state(tmp_path / "run") == before
    task = maelab.run(*FINETUNE, *data, "--out", "run", cwd=tmp_path)
    assert task.status == 2 and "run holds an unfinished run with " in task.error()
    assert maelab.run(*line, "--mask-ratio", 0.5, "--overwrite", cwd=tmp_path).status == 0


def test_other_images_are_another_run(maelab, digits_folder, tmp_path):
    shutil.copytree(digits_folder, tmp_path / "digits")
    line = (*PRETRAIN, "--data", "folder:digits", "--out", "run")
    assert maelab.run(*line, cwd=tmp_path, die=(SAVED, 1, "after")).status == -signal.SIGKILL
    Image.new("L", (28, 28)).save(sorted((tmp_path / "digits" / "0").iterdir())[0])
    refused = maelab.run(*line, cwd=tmp_path)
    assert "the data have changed since it began; use --overwrite" in refused.error() and refused.status == 2


def test_an_empty_folder_will_do(maelab, whole, data, tmp_path):
    (tmp_path / "empty").mkdir()
    assert maelab.run(*PRETRAIN, *data, "--out", "empty", cwd=tmp_path).status == 0
    assert_same(tmp_path / "empty", whole(*PRETRAIN))


def test_default_names(maelab, data, tmp_path):
    """The next free number; an unfinished run that is the same goes on, unless it is at work."""
    runs, line = tmp_path / "runs", (*PRETRAIN, "--epochs", 1, *data)
    long = (*PRETRAIN, "--epochs", 500, *data)

    def folder(*command: object) -> str:
        return maelab.run(*command, "--json", cwd=tmp_path).json()["run"]

    (runs / "pretrain-smoke-x").mkdir(parents=True)
    assert [folder(*line), folder(*line)] == ["runs/pretrain-smoke-1", "runs/pretrain-smoke-2"]
    (runs / "pretrain-smoke-7").mkdir()
    assert folder(*line, "--seed", 1) == "runs/pretrain-smoke-8"
    assert maelab.run(*line, cwd=tmp_path, die=("checkpoints/commit.json", 1, "after")).status == -signal.SIGKILL
    assert (runs / "pretrain-smoke-9").exists()
    assert folder(*line, "--overwrite") == "runs/pretrain-smoke-9", "it goes on, since it is unfinished"
    processes = [maelab.start(*long, cwd=tmp_path) for _ in range(3)]  # at once: each takes a number of its own
    for number in (10, 11, 12):
        processes[0].wait_for(runs / f"pretrain-smoke-{number}" / "metrics.jsonl", 2)
    for process in processes:
        process.signal(signal.SIGTERM)
    assert [process.wait().status for process in processes] == [130, 130, 130]
    assert folder(*line) == "runs/pretrain-smoke-13", "the last one is another run"


# --- failures -------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_from_the_start(maelab, data, tmp_path):
    ended = maelab.run(*PRETRAIN, *data, "--blr", 1e30, "--precision", "fp32", "--out", "run", cwd=tmp_path)
    message = ended.error()
    assert ended.status == 1 and message.startswith(("the loss is nan at step ", "the loss is inf at step "))
    assert message.endswith(
        " (epoch 1); nothing was saved yet; try a lower --blr or --muon-lr, --clip-grad 1, or --precision fp32"
    )
    assert list(tmp_path.iterdir()) == [], "a run that never saved leaves nothing"


@pytest.mark.parametrize("step", [2 * STEPS + 2, 2 * STEPS - 1], ids=["within an epoch", "last update of an epoch"])
def test_a_loss_that_is_no_longer_finite_spares_the_checkpoints(step, monkeypatch, capsys, whole, data, tmp_path):
    """At the last update of an epoch only validation sees that the weights have gone."""
    line, run, before = (*PRETRAIN, *data, "--precision", "fp32", "--out", tmp_path / "run"), tmp_path / "run", {}
    original, seen = loop.schedule, []

    def schedule(at: int, *others: int) -> float:
        seen.append(at)
        if at == step // STEPS * STEPS:  # the checkpoints after the last epoch that was good
            before.update(state(run))
        return float("inf") if at == step else original(at, *others)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "schedule", schedule)
        assert here(*line) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    at, epoch = (step + 2, 3) if step > 2 * STEPS else (step + 1, 2)
    assert message.startswith(f"maelab: the loss is nan at step {at} (epoch {epoch}); {run}/checkpoints/last stands as")
    after = state(run)
    assert {k: v for k, v in after.items() if "checkpoints" in k} == {
        k: v for k, v in before.items() if "ckpoints" in k
    }
    assert len(rows(run)) == 2 * (step // STEPS)
    assert all(tensor.isfinite().all() for tensor in load_file(run / "checkpoints/last/model.safetensors").values())
    assert here(*line) == 0, "without the fault the same command goes on"
    assert_same(run, whole(*PRETRAIN, "--precision", "fp32"))


def test_a_disk_that_fills_up_on_the_way(maelab, whole, data, tmp_path):
    line, training = (*PRETRAIN, *data, "--out", "run"), tmp_path / "run/checkpoints/last/training.pt"
    assert maelab.run(*line, cwd=tmp_path, die=(SAVED, 1, "after")).status == -signal.SIGKILL
    saved, best = training.read_bytes(), (tmp_path / "run/checkpoints/best/model.safetensors").read_bytes()
    for room, why in ((300_000, "training.pt: the disk may be full; the checkpoint before it stands"),
                      (50_000, "model.safetensors: File too large; the checkpoint before it stands")):  # fmt: skip
        ended = maelab.run(*line, cwd=tmp_path, largest_file=room)
        assert ended.status == 1 and ended.error().endswith(why), ended
        assert training.read_bytes() == saved
    assert len(best) == (tmp_path / "run/checkpoints/best/model.safetensors").stat().st_size
    assert maelab.run(*line, cwd=tmp_path).status == 0
    assert_same(tmp_path / "run", whole(*PRETRAIN))


def test_a_disk_too_full_for_the_pictures(maelab, whole, data, tmp_path):
    """Training is done and saved by then, and its result stands; each picture that is missing is named."""
    line = (*PRETRAIN, *data, "--out", "run")
    assert (
        maelab.run(*line, cwd=tmp_path, die=("reconstructions.png", 1, "before"), drawn=True).status == -signal.SIGKILL
    )
    ended = maelab.run(*line, cwd=tmp_path, largest_file=5000, drawn=True)
    assert ended.status == 0
    assert ended.err.splitlines()[-3:] == [
        f"the picture {name}.png could not be drawn: cannot write run/figures/{name}.png: File too large;"
        " the result stands"
        for name in ("reconstructions", "neighbours", "curves")
    ]
    assert result(tmp_path / "run") == result(whole(*PRETRAIN)) and not list((tmp_path / "run" / "figures").iterdir())


@pytest.mark.parametrize("where", ["load", "figures.curves"])
def test_ctrl_c_outside_training(where, monkeypatch, capsys, whole, data, tmp_path):
    """While the images are read there is nothing to save, and nothing stays; while pictures are drawn, all is saved."""
    line = (*PRETRAIN, *data, "--out", tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(f"maelab.tasks.pretrain.{where}", lambda *_, **__: signal.raise_signal(signal.SIGINT))
        assert here(*line) == 130
    assert capsys.readouterr().err.endswith(
        "maelab: interrupted; the same command starts again, from the last checkpoint if there is one\n"
    )
    assert (tmp_path / "run").exists() == (where != "load")
    assert here(*line) == 0
    assert_same(tmp_path / "run", whole(*PRETRAIN))
