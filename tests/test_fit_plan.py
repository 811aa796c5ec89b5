"""What `maelab fit` plans, from rates whose numbers all differ, without training anything."""

import contextlib
import math
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from maelab import fitting, recipes
from maelab.config import FinetuneConfig, RunOptions
from maelab.data import load, training_sets
from maelab.data.folder import scan
from maelab.errors import RunError, UsageError
from maelab.fitting import plan as planning


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

        monkeypatch.setattr(planning, "_measure", measure)
        seen = replace(scan(asked["data"]), **changes)
        begun = time.perf_counter() - waited
        return planning.make_plan(seen, asked, begun, RunOptions()) | {"calls": measured}

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


def test_where_most_images_have_no_label_time_is_kept_for_learning_from_them(planned, cifar_folder, tmp_path):
    """A step with four other images for each, and a teacher that only goes forward, takes 1 + 4 * 4/3 steps."""
    assert "unlabelled" not in planned(8.0, unlabelled=10)
    plan = planned(30.0, unlabelled=5_800)
    learning, measured = plan["unlabelled"], plan["measured"]["finetune"]
    assert (learning["unlabelled"], learning["ema_decay"], learning["init"]) == (4, 0.98, "finetune")
    assert learning["muon_lr"] == plan["finetune"]["muon_lr"] / 2 and 1 < learning["epochs"] <= measured["epochs"]
    others = seconds(plan, "finetune", learning["epochs"], 0.01 * (1 + 4 * 4 / 3), 0.5)
    twice = 2 * seconds(plan, "finetune", plan["finetune"]["epochs"], 0.01, 0.5)
    assert seconds(plan, "pretrain", plan["pretrain"]["epochs"], 0.01, 0.5) + twice + others <= 0.92 * (30 * 60 - 16)
    for stage in ("finetune", "scratch"):
        later = planning.learn_on(plan, stage, None)
        config = planning.read_configs(later, tmp_path)["unlabelled"]
        assert isinstance(config, FinetuneConfig) and config.init == str(tmp_path / stage)
        assert (config.epochs, config.unlabelled, config.limit) == (learning["epochs"], 4, None)
    early = planning.learn_on(plan, "finetune", time.perf_counter() - 60)["unlabelled"]
    assert learning["epochs"] < early["epochs"] <= measured["epochs"]
    late = planning.learn_on(plan, "finetune", time.perf_counter() - 30 * 60)["unlabelled"]
    assert (late["epochs"], late["limit"]) == (learning["epochs"] // 2, None)
    assert "unlabelled" not in planned(1.0, unlabelled=5_800), "too few updates"
    foreign = {**plan, "unlabelled": {**learning, "init": "../elsewhere"}}
    with pytest.raises(RunError, match=r"is damaged \(unlabelled begins from \.\./elsewhere\)"):
        planning.read_configs(foreign, tmp_path)


@pytest.mark.parametrize(
    ("minutes", "changes", "patch", "size"),
    [
        (8.0, {}, 4, (32, 32)),
        (0.7, {}, 4, (32, 32)),  # 21 s for pretraining, at 0.01 s an image
        (0.3, {}, 8, (32, 32)),
        (0.1, {}, 8, (32, 32)),  # four patches in each direction are the fewest
        (0.3, {"side": 60}, 16, (64, 64)),
        (0.1, {"side": 150}, 24, (144, 144)),
        (0.1, {"side": 300}, 32, (224, 224)),
    ],
)
def test_in_little_time_patches_are_larger(planned, capsys, minutes, changes, patch, size):
    """Fewer of them are computed in less time, so that every image is seen more often (docs/log.md)."""
    plan = planned(minutes, **changes)
    for stage in ("pretrain", "finetune"):
        assert (plan[stage]["patch_size"], plan[stage]["img_size"]) == (patch, size)
    usual = recipes.pretrain_folder(200, changes.get("side", 32)).patch_size
    assert ("too little time for so many patches" in capsys.readouterr().err) is (patch != usual)


def test_a_plan_keeps_grey_images_as_they_are(planned):
    for channels, mirrored in ((1, False), (3, True)):
        plan = planned(8.0, channels=channels)
        assert plan["pretrain"]["flip"] is plan["finetune"]["flip"] is mirrored


def test_unlabelled_images_are_counted_for_pretraining_alone(cifar_folder, tmp_path, monkeypatch):
    root = Path(shutil.copytree(cifar_folder, tmp_path / "own"))
    (root / "dog").rename(root / "unlabelled")
    asked = {"data": f"folder:{root}", "minutes": 8.0, "seed": 0, "fingerprint": "x"}
    monkeypatch.setattr(planning, "_measure", lambda *_: (0.1, 0.5))
    plan = planning.make_plan(scan(asked["data"]), asked, time.perf_counter(), RunOptions())
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


def test_going_on_that_was_stopped_anywhere_is_done_by_the_next_call(tmp_path, monkeypatch):
    """Whatever the step is at which it ends, the call after it leaves the same files."""
    made = ("pretrain/result.json", "finetune/result.json", "scratch/config.json", "mistakes.png", "fit.json")
    for steps in range(6):
        out = tmp_path / str(steps)
        for name in (*made, "before-1/result.json"):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_text(name)
        left = [steps]

        def counted(work: Any, left: list[int] = left) -> Any:
            def step(*given: Any, **more: Any) -> Any:
                left[0] -= 1
                if left[0] < 0:
                    raise KeyboardInterrupt
                return work(*given, **more)

            return step

        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            for name in ("unlink", "rename"):
                patch.setattr(Path, name, counted(getattr(Path, name)))
            fitting._go_on(out, {"round": 2})
        fitting._go_on(out, {"round": 2})
        assert [path.name for path in out.rglob("*") if path.is_file()] == ["result.json"], steps
        assert (out / "before-2" / "result.json").read_text() == "pretrain/result.json"


@pytest.mark.parametrize("minutes", [0.0, -1.0, math.inf, math.nan])
def test_minutes_are_a_number_above_0(minutes, cifar_folder, tmp_path):
    with pytest.raises(UsageError, match="--minutes must be above 0 and at most 525600"):
        fitting.fit(cifar_folder, minutes=minutes, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_each_stage_has_its_own_config_and_only_one_its_weights(planned, tmp_path):
    """As plan.json is read back: lists for tuples."""
    plan = planned(8.0)
    for stage in ("pretrain", "finetune"):
        plan[stage]["img_size"] = list(plan[stage]["img_size"])
    configs = planning.read_configs(plan, tmp_path)
    tuned, scratch = configs["finetune"], configs["scratch"]
    assert isinstance(tuned, FinetuneConfig) and isinstance(scratch, FinetuneConfig)
    assert tuned.init == str(tmp_path / "pretrain") and scratch == replace(tuned, init="none")
    assert configs["pretrain"].epochs == plan["pretrain"]["epochs"] and tuned.epochs == plan["finetune"]["epochs"]


def test_fine_tuning_keeps_half_of_what_was_planned_however_late_it_is(planned, capsys):
    """A machine that became slower costs time, and not the comparison."""
    plan = planned(8.0)
    epochs = plan["finetune"]["epochs"]
    late = planning.refit(plan, time.perf_counter() - 8 * 60)
    assert late["finetune"]["epochs"] == epochs // 2 > 1 and late["finetune"]["limit"] is None
    assert "take longer than asked" in capsys.readouterr().err
    assert planning.refit(plan, time.perf_counter() - 60)["finetune"]["epochs"] >= epochs
