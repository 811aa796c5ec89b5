"""The training loop: golden curves, equal results however a batch is cut, averaging, clipping, choosing the best."""

import json
import math
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from golden.regenerate import CURVES, FILE, record
from processes import FORKED_RANKS, Maelab
from safetensors.torch import load_file
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from maelab import recipes
from maelab.config import FinetuneConfig, LoopConfig, PretrainConfig, RunOptions
from maelab.errors import RunError, UsageError
from maelab.runs import Run, read_metrics
from maelab.tasks import finetune, pretrain
from maelab.training.checkpoint import ModelSpec, read_training
from maelab.training.loop import Outcome, Step, Task, train
from maelab.training.optim import schedule
from maelab.training.parallel import start_engine

pytestmark = pytest.mark.usefixtures("nothing_drawn")
GOLDEN = json.loads(FILE.read_text())


# --- whole runs -----------------------------------------------------------------------------------------------------


def test_the_golden_file_says_why_and_holds_every_curve():
    assert GOLDEN["losses"].keys() == CURVES.keys()
    assert len(GOLDEN["reason"].split()) > 2
    assert all(len(losses) == GOLDEN["steps"] == 20 for losses in GOLDEN["losses"].values())


@pytest.mark.parametrize("name", CURVES)
def test_golden_curve(name, tmp_path):
    """If this is meant to change: python tests/golden/regenerate.py REASON."""
    losses = record(CURVES[name], tmp_path)
    assert losses == pytest.approx(GOLDEN["losses"][name], rel=CURVES[name].tolerance)


def test_muon_in_float32_learns_the_same(tmp_path):
    name = "pretrain-pixels-muon"
    losses = record(CURVES[name], tmp_path, muon_in_bf16=False)
    assert losses == pytest.approx(GOLDEN["losses"][name], rel=5 * CURVES[name].tolerance)
    assert losses != pytest.approx(GOLDEN["losses"][name], rel=1e-6), "it was another arithmetic"


def tiny_pretrain(folder: Path, **changes) -> PretrainConfig:
    config = replace(recipes.pretrain_smoke(), data=f"folder:{folder}", precision="fp32", limit=96, batch_size=32)
    return replace(config, **changes)


def tiny_finetune(folder: Path, **changes) -> FinetuneConfig:
    config = replace(recipes.finetune_smoke(), data=f"folder:{folder}", precision="fp32", limit=96, batch_size=32)
    return replace(config, **changes)


def options(out: Path) -> RunOptions:
    return RunOptions(out=out, device="cpu", threads=1)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / "last" / "model.safetensors")


def numbers(run: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without times."""
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_s")} for row in read_metrics(run)]


def assert_close_rows(run: Path, other: Path, tolerance: float) -> None:
    for row, expected in zip(numbers(run), numbers(other), strict=True):
        assert row.pop("split") == expected.pop("split")
        assert row == pytest.approx(expected, rel=tolerance)


def assert_same_run(run: Path, other: Path, weight_tolerance: float) -> None:
    """Equal up to rounding: every logged number to 1e-5, every weight to the tolerance."""
    assert_close_rows(run, other, 1e-5)
    a, b = weights(run), weights(other)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].shape == b[name].shape
        if weight_tolerance and name.endswith(
            "qkv.bias"
        ):  # the softmax is blind to the keys' biases: rounding moves them
            a[name], b[name] = (torch.cat([t.chunk(3)[0], t.chunk(3)[2]]) for t in (a[name], b[name]))
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=weight_tolerance, msg=lambda m, n=name: f"{n}: {m}")


def test_the_same_run_twice_is_bit_identical_and_another_seed_is_not(digits_folder, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        config = tiny_pretrain(digits_folder, seed=seed, affine_degrees=10, epochs=1)
        pretrain.pretrain(config, options=options(tmp_path / name))
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert numbers(tmp_path / "a") == numbers(tmp_path / "b")
    assert not torch.equal(a["decoder_pred.weight"], c["decoder_pred.weight"])


@pytest.mark.parametrize("task", ["pretrain", "finetune"])
def test_accumulation_changes_nothing_but_rounding(digits_folder, tmp_path, task):
    """1 x 8 against 2 x 4; augmented and mixed."""
    for parts in (1, 2):
        changes: dict[str, Any] = {"batch_size": 8, "accumulate": parts, "clip_grad": 0.5, "limit": 64, "epochs": 1}
        run = options(tmp_path / str(parts))
        if task == "pretrain":
            pretrain.pretrain(tiny_pretrain(digits_folder, affine_degrees=10, **changes), options=run)
        else:
            finetune.finetune(tiny_finetune(digits_folder, mixup=0.5, cutmix=0.5, **changes), options=run)
    assert_same_run(tmp_path / "2", tmp_path / "1", 2e-5)


def in_processes(maelab: Maelab, task: str, folder: Path, out: Path, *flags: object) -> None:
    """Run `maelab TASK smoke` with two processes on the CPU, in which a warning is an error."""
    line = (task, "smoke", "--data", f"folder:{folder}", "--limit", 96, "--batch-size", 32, "--precision", "fp32")
    line += ("--device", "cpu", "--devices", 2, "--threads", 1, "--out", out, *flags)
    done = maelab.run(*line, cwd=out.parent, first="import os; os.environ['PYTHONWARNINGS'] = 'error::UserWarning'")
    assert done.status == 0, done.err
    assert done.err.count("2 processes") == 1, done.err  # the second one is silent
    assert "Warning" not in done.err and "Traceback" not in done.err, done.err


@pytest.mark.dist
def test_two_processes_equal_one(digits_folder, maelab, tmp_path):
    """2 processes x 2 parts x 8 images against 1 x 32, clipped and averaged."""
    config = tiny_pretrain(digits_folder, clip_grad=0.5, ema_decay=0.9)
    pretrain.pretrain(config, options=options(tmp_path / "one"))
    flags = ("--accumulate", "2", "--clip-grad", "0.5", "--ema-decay", "0.9")
    in_processes(maelab, "pretrain", digits_folder, tmp_path / "two", *flags)
    assert_same_run(tmp_path / "two", tmp_path / "one", 2e-5)
    one, two = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two"))
    assert two["val"] == pytest.approx(one["val"], rel=1e-5) and two["train"] == pytest.approx(one["train"], rel=1e-5)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("task", "optimizer"),
    [
        ("pretrain", "muon"),
        ("finetune", "adamw"),
        pytest.param("pretrain", "adamw", marks=pytest.mark.slow),
        pytest.param("finetune", "muon", marks=pytest.mark.slow),
    ],
)
def test_fifty_steps_of_two_processes_equal_those_of_one(digits_folder, maelab, tmp_path, task, optimizer):
    """Muon's matrices are shared out, and the checkpoint holds the state of all of them. In float32, Muon too: where it
    multiplies in bfloat16, the order of a sum shows."""
    first = FORKED_RANKS + "import maelab.native.muon\nmaelab.native.muon.torch_multiplies_bf16 = lambda: False\n"
    line = (task, "smoke", "--data", f"folder:{digits_folder}", "--limit", 112, "--batch-size", 32, "--threads", 1)
    line += ("--precision", "fp32", "--device", "cpu", "--optimizer", optimizer, "--ema-decay", 0.9, "--knn-every", 0)
    line = line[:-2] if task == "finetune" else line
    for n in (1, 2):
        done = maelab.run(*line, "--epochs", 17, "--devices", n, "--out", n, cwd=tmp_path, first=first)
        assert done.status == 0, done.err
    assert_same_run(tmp_path / "1", tmp_path / "2", 2e-5)
    (one, two) = (read_training(tmp_path / f"{n}" / "checkpoints" / "last" / "training.pt") for n in (1, 2))
    assert one["position"]["step"] == two["position"]["step"] > 50
    for ours, theirs in zip(one["optimizers"], two["optimizers"], strict=True):
        for number, state in ours["state"].items():
            assert all(torch.allclose(state[k], theirs["state"][number][k], rtol=0, atol=2e-5) for k in state)


@pytest.mark.dist
def test_in_16_bits_two_processes_are_near_one(digits_folder, maelab, tmp_path):
    """Their gradients travel in 16 bits, and arrive in both alike."""
    line = ("pretrain", "smoke", "--data", f"folder:{digits_folder}", "--limit", 96, "--batch-size", 32, "--threads", 1)
    line += ("--precision", "bf16", "--device", "cpu", "--epochs", 10, "--knn-every", 0)
    for n in (1, 2):
        done = maelab.run(*line, "--devices", n, "--out", n, cwd=tmp_path, first=FORKED_RANKS)
        assert done.status == 0, done.err
    one, two = ([r for r in read_metrics(tmp_path / n) if r["split"] == "train"] for n in ("1", "2"))
    assert [r["loss"] for r in two] == pytest.approx([r["loss"] for r in one], rel=0.01)
    assert [r["loss"] for r in two] != [r["loss"] for r in one]
    assert one[-1]["loss"] < 0.95 * one[0]["loss"]


SHARED = ("--optimizer", "adamw", "--clip-grad", 0.5, "--ema-decay", 0.9, "--accumulate", 2, "--strategy", "fsdp")


@pytest.mark.dist
@pytest.mark.parametrize("task", ["pretrain", pytest.param("finetune", marks=pytest.mark.slow)])
def test_processes_that_share_the_model_out_equal_one(digits_folder, maelab, tmp_path, task):
    """FSDP: 2 processes x 2 parts x 8 images against 1 x 32, clipped and averaged."""
    changes: dict[str, Any] = {"optimizer": "adamw", "clip_grad": 0.5, "ema_decay": 0.9}
    if task == "pretrain":
        pretrain.pretrain(tiny_pretrain(digits_folder, **changes), options=options(tmp_path / "one"))
    else:
        finetune.finetune(tiny_finetune(digits_folder, **changes), options=options(tmp_path / "one"))
    in_processes(maelab, task, digits_folder, tmp_path / "two", *SHARED)
    assert_same_run(tmp_path / "two", tmp_path / "one", 2e-5)
    one, two = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two"))
    assert two["val"] == pytest.approx(one["val"], rel=1e-5)


@pytest.mark.dist
@pytest.mark.parametrize("first", ["shared", pytest.param("alone", marks=pytest.mark.slow)])
def test_a_run_goes_on_with_the_model_shared_out_or_in_one_piece(digits_folder, maelab, tmp_path, first):
    """Stopped in the middle of an epoch; the checkpoint holds whole tensors."""
    line = ["pretrain", "smoke", "--data", f"folder:{digits_folder}", "--limit", 96, "--batch-size", 32, "--threads", 1]
    line += ["--precision", "fp32", "--device", "cpu", "--epochs", 30, *SHARED]
    alone, shared = ("--devices", 1), ("--devices", 2)
    assert maelab.run(*line, *alone, "--out", "whole", cwd=tmp_path).status == 0
    then = (shared, alone) if first == "shared" else (alone, shared)
    process = maelab.start(*line, *then[0], "--out", "run", cwd=tmp_path)
    process.wait_for(tmp_path / "run" / "metrics.jsonl", lines=6)
    process.signal(signal.SIGINT)
    stopped = process.wait()
    assert stopped.status == 130 and "of 90 and saved" in stopped.err, stopped.err
    ended = maelab.run(*line, *then[1], "--out", "run", cwd=tmp_path)
    assert ended.status == 0 and "going on from step " in ended.err, ended.err
    assert_same_run(tmp_path / "run", tmp_path / "whole", 2e-5)


def test_what_cannot_be_shared_out_is_refused(digits_folder, maelab, tmp_path):
    line = ("pretrain", "smoke", "--data", f"folder:{digits_folder}", "--limit", 96, "--device", "cpu", "--devices", 2)
    refused = maelab.run(*line, "--strategy", "fsdp", "--optimizer", "muon", cwd=tmp_path)
    assert "--strategy fsdp shares matrices out, which Muon and --unlabelled need whole" in refused.error()


def test_bf16_is_close_to_fp32_and_not_the_same(digits_folder, tmp_path):
    for precision in ("fp32", "bf16"):
        config = tiny_pretrain(digits_folder, precision=precision, num_heads=1, decoder_num_heads=1)
        pretrain.pretrain(config, options=options(tmp_path / precision))
    assert_close_rows(tmp_path / "bf16", tmp_path / "fp32", 0.01)
    assert numbers(tmp_path / "bf16") != numbers(tmp_path / "fp32")
    assert all(value.dtype == torch.float32 for value in weights(tmp_path / "bf16").values())


def test_rates_in_the_log_follow_the_schedule(digits_folder, tmp_path):
    config = tiny_pretrain(digits_folder, epochs=4, warmup_epochs=2, blr=1.0)
    pretrain.pretrain(config, options=options(tmp_path / "run"))
    rates = [row["lr"] for row in numbers(tmp_path / "run") if row["split"] == "train"]
    assert rates == pytest.approx([32 / 256 * schedule(3 * epoch - 1, 12, 6) for epoch in range(1, 5)])


# --- the loop itself, on a line with two weights ---------------------------------------------------------------------

X = torch.tensor([[1.0, 2.0], [-1.0, 0.5], [0.3, -2.0], [2.0, 1.0], [0.0, 1.5], [-2.0, -1.0]])
Y = X @ torch.tensor([[3.0], [-2.0]])


def line_task(validate: Callable[[Any, int], dict[str, float]] | None = None, **changes) -> Task:
    """Fit a line to six points, two at a time."""
    torch.manual_seed(0)

    def batch(step: int, part: int, parts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rows = torch.arange(2) + 2 * (step % 3)
        rows = rows[part * 2 // parts : (part + 1) * 2 // parts]
        return X[rows], Y[rows], torch.tensor(float(step))

    def loss(model: Any, x: torch.Tensor, y: torch.Tensor, step: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (model(x) - y).square().mean(), "step": step}

    task = Task(
        model=nn.Linear(2, 1),
        spec=ModelSpec("Linear", {"in_features": 2, "out_features": 1}, "none"),
        items=6,
        step=Step(batch, loss),
        validate=validate or (lambda model, epoch: {"loss": (model(X) - Y).detach().square().mean().item()}),
        metric="loss",
        higher_is_better=False,
    )
    return replace(task, **changes)


def fit(folder: Path, task: Task, **changes) -> Outcome:
    folder.mkdir(exist_ok=True)
    engine = start_engine(RunOptions(device="cpu", threads=1), "fp32")
    settings: dict[str, Any] = {"epochs": 4, "batch_size": 2, "blr": 6.4, "weight_decay": 0.0, "precision": "fp32"}
    return train(engine, Run(folder, {}), task, LoopConfig(**{**settings, **changes}))


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_the_line_is_learnt(tmp_path):
    task = line_task()
    outcome = fit(tmp_path, task, epochs=60)
    assert task.validate(task.model, 0)["loss"] < 1e-3
    assert outcome.epochs == 60 and outcome.images_per_s > 0 and outcome.train_time_s >= 0


def test_epoch_rows_are_means_over_the_epoch(tmp_path):
    outcome = fit(tmp_path, line_task(), accumulate=2, epochs=2)
    rows = [row for row in read_metrics(tmp_path) if row["split"] == "train"]
    assert [row["step"] for row in rows] == [1.0, 4.0]  # of steps 0, 1, 2 and 3, 4, 5
    assert outcome.train["step"] == 4.0
    assert [row["epoch"] for row in read_metrics(tmp_path)] == [1, 1, 2, 2]


def test_ema_equals_a_naive_average(tmp_path):
    task, after = line_task(), []
    start = flat(task.model)

    class Watch:  # the weights after each step are those before the next, and those at the end
        def __call__(self, *arguments: Any) -> dict[str, torch.Tensor]:
            after.append(flat(task.model))
            return task.step.loss(*arguments)

    judged = []
    watched = replace(
        task,
        step=replace(task.step, loss=Watch()),
        validate=lambda model, epoch: judged.append(flat(model)) or {"loss": -epoch},
    )
    fit(tmp_path, watched, ema_decay=0.8)
    assert torch.equal(after[0], start)
    last = load_training_model(tmp_path)
    average = start
    for i, current in enumerate([*after[1:], last], start=1):
        average = 0.8 * average + 0.2 * current
        if i % 3 == 0:
            torch.testing.assert_close(judged[i // 3 - 1], average)
    torch.testing.assert_close(flat(task.model), average)  # what is returned is the average too
    saved = load_file(tmp_path / "checkpoints" / "last" / "model.safetensors")
    torch.testing.assert_close(torch.cat([saved["weight"].flatten(), saved["bias"]]), average)
    assert not torch.allclose(average, last, atol=1e-3)


def load_training_model(folder: Path) -> torch.Tensor:
    state = torch.load(folder / "checkpoints" / "last" / "training.pt", weights_only=True)["model"]
    return torch.cat([state["weight"].flatten(), state["bias"]])


def gradients(folder: Path, **changes) -> list[torch.Tensor]:
    """What the optimizer is given at each of three steps."""
    found: list[torch.Tensor] = []

    def look(optimizer: torch.optim.Optimizer, *_: object) -> None:
        every = [p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]
        found.append(torch.cat(every).clone())

    hook = register_optimizer_step_pre_hook(look)
    try:
        fit(folder, line_task(), epochs=1, **changes)
    finally:
        hook.remove()
    assert len(found) == 3
    return found


def test_clipping_bounds_the_norm_and_keeps_the_direction(tmp_path):
    free, clipped = gradients(tmp_path / "free"), gradients(tmp_path / "clipped", clip_grad=0.5)
    assert min(g.norm() for g in free) > 2
    for gradient in clipped:
        assert gradient.norm() == pytest.approx(0.5, rel=1e-4)
    torch.testing.assert_close(clipped[0] / 0.5, free[0] / free[0].norm())


def test_gradients_of_the_parts_make_that_of_the_batch(tmp_path):
    """AdamW hardly minds their scale, so it is looked at here."""
    whole, parts = gradients(tmp_path / "whole"), gradients(tmp_path / "parts", accumulate=2)
    torch.testing.assert_close(torch.stack(parts), torch.stack(whole))


def scripted(
    values: list[float], seen: list[torch.Tensor], losses: Sequence[float] = range(1, 100)
) -> Callable[[Any, int], dict[str, float]]:
    """A validation that says what it is told to, and keeps the weights that it saw."""

    def validate(model: nn.Module, epoch: int) -> dict[str, float]:
        seen.append(flat(model))
        return {"score": values[epoch - 1], "loss": float(losses[epoch - 1])}

    return validate


@pytest.mark.parametrize(
    ("values", "higher_is_better", "best"),
    [([1, 3, 2, 0], True, 2), ([1, 3, 2, 0], False, 4), ([5, 5, 5, 5], True, 1), ([-9, -8, -7, -7], True, 3)],
)
def test_the_best_weights_are_left_in_the_model(tmp_path, values, higher_is_better, best):
    seen: list[torch.Tensor] = []
    task = line_task(scripted(values, seen), metric="score", higher_is_better=higher_is_better)
    outcome = fit(tmp_path, task)
    assert outcome.epochs == 4 and outcome.best_epoch == best
    assert outcome.val == {"score": values[best - 1], "loss": best}
    assert torch.equal(flat(task.model), seen[best - 1])
    assert not any(torch.equal(seen[best - 1], other) for i, other in enumerate(seen) if i != best - 1)
    state = load_file(tmp_path / "checkpoints" / "best" / "model.safetensors")
    assert torch.equal(torch.cat([state["weight"].flatten(), state["bias"]]), seen[best - 1])


def test_the_last_weights_are_left_in_the_model_where_they_are_asked_for(tmp_path):
    task = line_task(scripted([1, 4, 3, 2], seen := []), metric="score", higher_is_better=True, keep_last=True)
    outcome = fit(tmp_path, task)
    assert outcome.best_epoch == 4 and outcome.val == {"score": 2, "loss": 4.0}
    assert torch.equal(flat(task.model), seen[3])


@pytest.mark.parametrize(("higher_is_better", "best"), [(True, 3), (False, 4)])
def test_of_epochs_that_score_the_same_the_one_with_the_lowest_loss_is_kept(tmp_path, higher_is_better, best):
    """Of 25 validation images many epochs get as many right, and the first of them is the least trained."""
    validate = scripted([3, 5, 5, 3], seen := [], [4, 3, 2, 1])
    task = line_task(validate, metric="score", higher_is_better=higher_is_better)
    assert fit(tmp_path, task).best_epoch == best
    assert torch.equal(flat(task.model), seen[best - 1])


@pytest.mark.parametrize(("patience", "epochs"), [(0, 8), (1, 3), (2, 6), (3, 8)])
def test_patience_stops_after_so_many_epochs_without_a_better_one(tmp_path, patience, epochs):
    values, seen = [1.0, 2.0, 2.0, 3.0, 1.0, 2.5, 4.0, 1.0], []
    task = line_task(scripted(values, seen), metric="score", higher_is_better=True, patience=patience)
    outcome = fit(tmp_path, task, epochs=8)
    assert outcome.epochs == len(seen) == epochs
    assert outcome.best_epoch == 1 + max(range(epochs), key=lambda i: (values[i], -i))
    assert torch.equal(flat(task.model), seen[outcome.best_epoch - 1])


def test_a_loss_that_is_not_a_number_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    task = line_task()

    def loss(*arguments: torch.Tensor) -> dict[str, torch.Tensor]:
        values = task.step.loss(*arguments)
        return {"loss": values["loss"] * (math.nan if values["step"] == 4 else 1)}

    with pytest.raises(RunError, match=r"the loss is nan at step 5 \(epoch 2\).*try a lower --blr, --clip"):
        fit(tmp_path, replace(task, step=replace(task.step, loss=loss)))
    saved = load_file(tmp_path / "checkpoints" / "last" / "model.safetensors")
    assert all(torch.isfinite(value).all() for value in saved.values())


def test_a_batch_that_cannot_be_cut_is_refused_at_once(tmp_path):
    def never(*arguments: Any) -> Any:
        raise AssertionError("a step was made")

    with pytest.raises(UsageError, match="a batch of 6 images cannot be cut into 4 equal parts; see --batch-size"):
        fit(tmp_path, line_task(step=Step(never, never)), batch_size=8, accumulate=4)


def test_rates_and_gradients_start_clean_each_step(tmp_path):
    """Three steps by hand, with AdamW's own arithmetic: nothing is left over from the step before."""
    task = line_task()
    reference = nn.Linear(2, 1)
    reference.load_state_dict(task.model.state_dict())
    fit(tmp_path, task, epochs=1, warmup_epochs=0)
    optimizer = torch.optim.AdamW(reference.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(3):
        optimizer.param_groups[0]["lr"] = 6.4 * 2 / 256 * schedule(step, 3, 0)
        rows = slice(2 * step, 2 * step + 2)
        optimizer.zero_grad()
        (reference(X[rows]) - Y[rows]).square().mean().backward()
        optimizer.step()
    torch.testing.assert_close(flat(task.model), flat(reference))
