"""Training speed, side by side: maelab, Hugging Face's models of the same shape, and the matrix products alone."""

import datetime
import functools
import itertools
import math
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from maelab import native, recipes
from maelab.config import FinetuneConfig, PretrainConfig, RunOptions, check_count
from maelab.data import Dataset, ImageSet
from maelab.data.augment import augment
from maelab.data.batches import batch_index, step_generator, to_device
from maelab.errors import MaelabError, RunError, UsageError
from maelab.export import export
from maelab.model.masks import len_keep
from maelab.runs import read_metrics, write_atomically, write_json
from maelab.tasks import finetune, pretrain
from maelab.training import blocks
from maelab.training.capture import WARM_UP, captured
from maelab.training.checkpoint import load_model
from maelab.training.optim import build_optimizers, keep_learning_rate
from maelab.training.parallel import choose_precision
from maelab.training.runlog import environment

IMAGES = 10_000
CLASSES = 10
TURN_SECONDS = 1.0
STEP_SECONDS = 15.0  # who needs longer for a step is only said to
BUDGET_SECONDS = 270.0  # for all cases together
COLUMNS = {
    "maelab_images_per_s": "maelab", "peer_fp32_images_per_s": "peer fp32", "peer_bf16_images_per_s": "peer bf16",
    "floor_images_per_s": "products alone", "ratio_fp32": "x fp32", "ratio_bf16": "x bf16",
    "fraction_of_floor": "share of it", "fraction_of_peak": "of peak", "data_share": "batches", "peak_rss_mb": "MB",
}  # fmt: skip
QUICKSTART, GOAL = "quickstart", 0.99  # a validation accuracy
TO_GOAL = {
    "pretraining_s": "pretraining s", "finetuning_s": "fine-tuning s", "seconds_to_goal": f"s to {GOAL:g}",
    "val_accuracy": "validation", "test_accuracy": "test",
}  # fmt: skip
SERVED = "maelab:mnist-classifier"
SERVING = {"serve-mnist-1": 1, "serve-mnist-256": 256}  # images at a time
SERVERS = {"torch": "torch fp32", "native": "torch bf16", "onnx": "onnxruntime", "onnx_int8": "onnxruntime int8"}

Step = Callable[[int], object]

VIT_T = {"patch_size": 4, "embed_dim": 192, "depth": 12, "num_heads": 3, "crop_padding": 4, "flip": True}


def cases() -> dict[str, PretrainConfig | FinetuneConfig]:
    """What is measured: ViT-T on 32x32x3 as an autoencoder, the default recipe for MNIST, and ViT-T as a classifier."""
    return {
        "mae-vit-t-32": PretrainConfig(data="cifar10", **VIT_T),
        "mae-mnist": recipes.pretrain_mnist(),
        "finetune-vit-t-32": FinetuneConfig(data="cifar10", **VIT_T, global_pool="token"),
    }


def _shape(config: PretrainConfig | FinetuneConfig) -> tuple[int, int, int]:
    return (3, 32, 32) if config.data == "cifar10" else (1, 28, 28)


def noise_images(config: PretrainConfig | FinetuneConfig, device: str) -> ImageSet:
    """Random pixels of the data set's shape: what they show does not change the speed."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (IMAGES, *_shape(config)), dtype=torch.uint8, generator=generator)
    return ImageSet(images, torch.randint(CLASSES, (IMAGES,), generator=generator)).to(device)


def _batch(config: PretrainConfig | FinetuneConfig, data: ImageSet, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images float32 (B, C, H, W) in [-1, 1] from uint8, varied, and labels (B,): the same for everyone."""
    assert data.labels is not None
    index = batch_index(len(data), config.batch_size, config.seed, step)
    labels = data.labels[to_device(index, data.labels.device)]
    return augment(data.images, index, config, step_generator(config.seed, step)), labels


def our_step(
    config: PretrainConfig | FinetuneConfig, data: ImageSet, device: str, kernels: Literal["auto", "torch"] = "auto"
) -> Step:
    """Whole training steps of maelab, forward, backward and update; each call does the one of its number.

    Args:
        config: of the training; its data set says the shape of the images.
        data: images uint8 (N, C, H, W) with labels, such as `noise_images`.
        device: where to compute.
        kernels: 'torch' does without the native kernels.
    """
    dataset = Dataset("bench", data, data, tuple(map(str, range(CLASSES))), {}, ())
    if isinstance(config, PretrainConfig):
        model = pretrain.model_spec(config, dataset).build()
    else:
        model = finetune.model_spec(config, dataset).build()
    model.to(device).train()
    precision = choose_precision(config.precision, device, kernels)
    bf16 = precision == "bf16"
    if kernels == "auto" and precision != "fp32" and device == "cpu":
        blocks.install(model, always=not bf16)
    optimizers = build_optimizers(model, config)
    keep_learning_rate(optimizers, torch.device(device) if device == "cuda" else None)

    def update(images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            if isinstance(config, PretrainConfig):
                loss = model.training_loss(images, config.mask_ratio)  # type: ignore[operator]
            else:
                loss = F.cross_entropy(model(images).float(), labels)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return {}

    run = captured(update) if device == "cuda" else update
    return lambda number: run(*_batch(config, data, number))


def _peer_step(config: PretrainConfig | FinetuneConfig, data: ImageSet, device: str, bf16: bool) -> Step:
    """Hugging Face's model of the same shape, as it comes, with AdamW."""
    try:
        import transformers
    except ImportError as error:
        raise UsageError("the benchmark's peer is not installed: pip install 'maelab[dev]'") from error
    shape: dict[str, Any] = {
        "image_size": data.images.shape[-1], "num_channels": data.images.shape[1], "patch_size": config.patch_size,
        "hidden_size": config.embed_dim, "num_hidden_layers": config.depth, "num_attention_heads": config.num_heads,
        "intermediate_size": int(config.embed_dim * config.mlp_ratio),
    }  # fmt: skip
    if isinstance(config, PretrainConfig):
        decoder: dict[str, Any] = {
            "decoder_hidden_size": config.decoder_embed_dim, "decoder_num_hidden_layers": config.decoder_depth,
            "decoder_num_attention_heads": config.decoder_num_heads,
            "decoder_intermediate_size": int(config.decoder_embed_dim * config.mlp_ratio),
        }  # fmt: skip
        model: Any = transformers.ViTMAEForPreTraining(
            transformers.ViTMAEConfig(**shape, **decoder, mask_ratio=config.mask_ratio)
        )
    else:
        labels: dict[str, Any] = {"num_labels": CLASSES}
        model = transformers.ViTForImageClassification(transformers.ViTConfig(**shape, **labels))
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step(number: int) -> None:
        images, truth = _batch(config, data, number)
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            more = {} if isinstance(config, PretrainConfig) else {"labels": truth}
            loss = model(pixel_values=images, **more).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def products(
    config: PretrainConfig | FinetuneConfig, image: tuple[int, int, int]
) -> Iterator[tuple[int, int, int, int]]:
    """The matrix products of a training step, each (count, M, K, N): count products of (M, K) by (K, N).

    Forward x w^T; backward g w and g^T x, for every linear layer. q k^T and p v of every head, and the four products
    of their backward pass. Nothing twice, nothing that the loss does not read, no gradient of the pixels.
    """
    B, (C, height, width) = config.batch_size, image
    patches, pixels, prefix = height * width // config.patch_size**2, config.patch_size**2 * C, int(config.class_token)

    def linear(rows: int, K: int, N: int, first: bool = False) -> Iterator[tuple[int, int, int, int]]:
        yield 1, B * rows, K, N
        yield 1, N, B * rows, K
        if not first:
            yield 1, B * rows, N, K

    def block(D: int, heads: int, tokens: int, out: int) -> Iterator[tuple[int, int, int, int]]:
        d, hidden = D // heads, int(D * config.mlp_ratio)
        yield from linear(tokens, D, 3 * D)
        for M, K, N in ((out, d, tokens), (out, tokens, d), (tokens, out, d), (out, d, tokens), (out, tokens, d)):
            yield B * heads, M, K, N  # scores, values; gradients of v, of the weights, of q
        yield B * heads, tokens, out, d  # gradient of k
        yield from linear(out, D, D)
        yield from linear(out, D, hidden)
        yield from linear(out, hidden, D)

    D = config.embed_dim
    if isinstance(config, FinetuneConfig):
        yield from linear(patches, pixels, D, first=True)
        for _ in range(config.depth):
            yield from block(D, config.num_heads, prefix + patches, prefix + patches)
        yield from linear(1, D, CLASSES)
        return
    visible = len_keep(patches, config.mask_ratio)
    yield from linear(visible, pixels, D, first=True)
    for _ in range(config.depth):
        yield from block(D, config.num_heads, prefix + visible, prefix + visible)
    width = config.decoder_embed_dim
    yield from linear(prefix + visible, D, width)
    for i in range(config.decoder_depth):
        last = i == config.decoder_depth - 1
        yield from block(
            width, config.decoder_num_heads, prefix + patches, patches - visible if last else prefix + patches
        )
    yield from linear(patches - visible, width, pixels)


def _floor_step(config: PretrainConfig | FinetuneConfig, data: ImageSet, device: str) -> Step:
    """The step's products alone, by torch.bmm into memory at hand. Each has its factors as they lie or transposed,
    whichever of the four ways is the fastest here, though training cannot always choose."""
    dtype = torch.bfloat16 if choose_precision("auto", device) == "bf16" else torch.float32
    _, C, height, width = data.images.shape
    todo = list(products(config, (C, height, width)))
    runs: dict[tuple[int, int, int, int], Callable[[], object]] = {}
    for count, M, K, N in set(todo):
        out = torch.empty(count, M, N, device=device, dtype=dtype)
        ways = []
        for turn_left, turn_right in itertools.product((False, True), repeat=2):
            left = torch.randn(count, *((K, M) if turn_left else (M, K)), device=device).to(dtype)
            right = torch.randn(count, *((N, K) if turn_right else (K, N)), device=device).to(dtype)
            left, right = left.mT if turn_left else left, right.mT if turn_right else right
            if count == 1:
                run = functools.partial(torch.mm, left[0], right[0], out=out[0])
            else:
                run = functools.partial(torch.bmm, left, right, out=out)
            ways.append((min(_seconds(lambda _, run=run: run(), 0, 1, device) for _ in range(4)), run))
        runs[count, M, K, N] = min(ways, key=lambda way: way[0])[1]

    def step(number: int) -> None:
        for key in todo:
            runs[key]()

    return step


def _serving_step(who: str, batch_size: int) -> Step:
    """Classify `batch_size` images with the weights that maelab ships."""
    model = load_model(SERVED)[0].eval()
    images = torch.rand(batch_size, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    if who in ("torch", "native"):
        blocks.install(model)

        def in_torch(number: int) -> None:
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=who == "native"):
                model(images)

        return in_torch
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        export(SERVED, format="onnx", out=file, int8=who == "onnx_int8")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(file.read_bytes(), options, providers=["CPUExecutionProvider"])
    pixels = images.numpy()
    return lambda number: session.run(["logits"], {"images": pixels})


def _seconds(step: Step, first: int, count: int, device: str) -> float:
    """Mean time of `count` steps."""
    if device == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    for number in range(first, first + count):
        step(number)
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begun) / count


def _peak_rss_mb() -> float:
    """Peak resident memory of this process."""
    status = Path("/proc/self/status")  # getrusage would count the parent's memory before exec
    return float(status.read_text().split("VmHWM:")[1].split()[0]) / 1024 if status.exists() else float("nan")


def _steps(name: str, device: str) -> dict[str, Callable[[], Step]]:
    """The contestants of a case, and how each is built."""
    if name in SERVING:
        return {who: lambda who=who: _serving_step(who, SERVING[name]) for who in SERVERS}
    config = cases()[name]
    data = noise_images(config, device)
    return {
        "maelab": lambda: our_step(config, data, device),
        "peer_fp32": lambda: _peer_step(config, data, device, bf16=False),
        "peer_bf16": lambda: _peer_step(config, data, device, bf16=True),
        "floor": lambda: _floor_step(config, data, device),
        "batch": lambda: lambda number: _batch(config, data, number),
    }


def _contestant(pipe: Connection, name: str, who: str, device: str, threads: int) -> None:
    """A process that takes its turns when it is told (first, count): one step to warm up, the rest timed."""
    try:
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        step = _steps(name, device)[who]()
        pipe.send("built")
        pipe.send(_seconds(step, 0, WARM_UP + 2 if device == "cuda" else 1, device))
        while (turn := pipe.recv()) is not None:
            first, count = turn
            pipe.send(_seconds(step, first, count, device))
        pipe.send(torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else _peak_rss_mb())
    except Exception as error:  # whoever asks says it, in one line
        pipe.send(error if isinstance(error, MaelabError) else RunError(f"{who}: {type(error).__name__}: {error}"))


class _TooSlow(Exception):
    """A step took longer than anyone waits."""


@dataclass(frozen=True)
class _Turns:
    """Seconds a step of every contestant, turn by turn; who was too slow; peak memory of the first in MB."""

    times: dict[str, list[float]]
    too_slow: list[str]
    peak_mb: float


def _turns(name: str, repeats: int, device: str, budget_s: float, say: Callable[[str], None]) -> _Turns:
    """Let the contestants take turns, each at most `repeats`, and no new round once `budget_s` seconds have gone.

    Each lives in a process of its own, so that none has another's settings (of memory, say) or warm pages.
    """
    context, pipes, processes = multiprocessing.get_context("spawn"), {}, {}
    deadline = time.perf_counter() + budget_s

    def answer(who: str, within_s: float | None = None) -> Any:
        if not pipes[who].poll(within_s):
            raise _TooSlow
        if isinstance(said := pipes[who].recv(), MaelabError):
            raise said
        return said

    def ask(who: str, question: tuple[int, int] | None) -> float:
        pipes[who].send(question)
        return answer(who)

    times: dict[str, list[float]] = {}
    too_slow: list[str] = []
    try:
        for who in _steps(name, "cpu"):
            say(f"{name}: the first step of {who}")
            pipes[who], end = context.Pipe()
            given = (end, name, who, device, torch.get_num_threads())
            processes[who] = context.Process(target=_contestant, args=given, daemon=True)
            processes[who].start()
            answer(who)
            try:
                answer(who, STEP_SECONDS)
                times[who] = []
            except _TooSlow:
                too_slow.append(who)
                processes[who].kill()
        for turn in range(repeats):
            begun = time.perf_counter()
            for who in times:
                say(f"{name}: turn {turn + 1} of {repeats}, {who}")
                seconds = ask(who, (100 * turn, 1))  # after another's turn the caches are cold
                if seconds < TURN_SECONDS / 2:
                    seconds = ask(who, (100 * turn + 1, max(1, min(50, round(TURN_SECONDS / seconds)))))
                times[who].append(seconds)
            if 2 * time.perf_counter() - begun > deadline:  # another round as long would not end in time
                break
        peaks = [ask(who, None) for who in times]
        return _Turns(times, too_slow, peaks[0] if peaks else math.nan)
    finally:
        for process in processes.values():
            process.kill()
            process.join()


def measure(
    name: str, repeats: int, device: str, budget_s: float = math.inf, say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """One case: all contestants in turns of about a second or one step, and their medians.

    Args:
        name: of the case.
        repeats: turns of each contestant at most.
        device: where to compute.
        budget_s: seconds after which no new round of turns begins.
        say: is told what is measured now.

    Returns:
        Images per second and ratios; None for who did not finish a step in time, which `limits` bounds from above.
    """
    turns = _turns(name, repeats, device, budget_s, say)
    median = {who: statistics.median(values) for who, values in turns.times.items()}
    batch_size = SERVING[name] if name in SERVING else cases()[name].batch_size
    rate = {who: batch_size / seconds for who, seconds in median.items()}
    result: dict[str, Any] = {
        "name": name,
        "batch_size": batch_size,
        "turns": max(map(len, turns.times.values()), default=0),
    }
    result |= {"spread": {who: [round(min(v), 4), round(max(v), 4)] for who, v in turns.times.items()}}
    result |= {"limits": {who: round(batch_size / STEP_SECONDS, 1) for who in turns.too_slow}}

    rates = {
        f"{who}_images_per_s": round(rate[who], 1) if who in rate else None
        for who in [*turns.times, *turns.too_slow]
        if who != "batch"
    }
    if name in SERVING:
        return result | rates
    ours = rate.get("maelab")

    def ratio(other: str, digits: int) -> float | None:
        return round(ours / rate[other], digits) if ours and other in rate else None

    config = cases()[name]
    flops = sum(2 * count * M * K * N for count, M, K, N in products(config, _shape(config))) / batch_size
    peak = native.peak_flops() if device == "cpu" else None
    return result | rates | {
        "ratio_fp32": ratio("peer_fp32", 2), "ratio_bf16": ratio("peer_bf16", 2),
        "fraction_of_floor": ratio("floor", 3),
        "fraction_of_peak": round(ours * flops / peak / torch.get_num_threads(), 3) if ours and peak else None,
        "data_share": round(median["batch"] / median["maelab"], 4) if {"batch", "maelab"} <= median.keys() else None,
        "peak_rss_mb": round(turns.peak_mb) if ours else None,
    }  # fmt: skip


def time_to_goal(device: Literal["cpu", "cuda"], threads: int) -> dict[str, Any]:
    """Both trainings of recipe `quickstart`, kept nowhere, and after how much training a validation reached GOAL.

    Returns:
        Seconds of training, without reading data and drawing pictures; `seconds_to_goal` is None where none did.
    """
    with tempfile.TemporaryDirectory(prefix="maelab-bench-") as place:
        mae, classifier = (RunOptions(out=Path(place) / who, device=device, threads=threads) for who in ("mae", "c"))
        _, before = pretrain.pretrain(recipes.pretrain_quickstart(), options=mae, recipe=QUICKSTART)
        config = replace(recipes.finetune_quickstart(), init=str(mae.out))
        folder, after = finetune.finetune(config, options=classifier, recipe=QUICKSTART)
        rows = read_metrics(folder)
    good = {row["epoch"] for row in rows if row["split"] == "val" and row["accuracy"] >= GOAL}
    times = [row["seconds"] for row in rows if row["split"] == "train" and row["epoch"] in good]
    return {
        "name": QUICKSTART, "pretraining_s": before["train_time_s"], "finetuning_s": after["train_time_s"],
        "seconds_to_goal": round(before["train_time_s"] + min(times), 2) if times else None,
        "val_accuracy": after["val"]["accuracy"], "test_accuracy": after["test"]["accuracy"], "limits": {},
    }  # fmt: skip


def bench(
    names: Sequence[str] = (),
    *,
    repeats: int = 5,
    device: Literal["cpu", "cuda"] = "cpu",
    threads: int | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """Measure training speed beside Hugging Face's models and the matrix products alone.

    A table goes to stderr.

    Args:
        names: cases; none measures all but `quickstart`, which trains whole models: minutes.
        repeats: turns that each contestant gets at most; slow machines get fewer, so that it ends in five minutes.
        device: where to compute.
        threads: CPU threads; None takes one per core.
        out: folder for a dated JSON file and a row in its README.md.

    Returns:
        {"cases": [...], "date", "repeats", "kernels", "environment"}; images per second are of whole training steps.

    Raises:
        UsageError: for an unknown case, or without transformers.
    """
    known = [*cases(), *SERVING, QUICKSTART]
    if unknown := set(names).difference(known):
        raise UsageError(f"unknown case {min(unknown)}: choose from {', '.join(known)}")
    check_count("--repeats", repeats, 1, 10_000)
    readme = Path(out or ".") / "README.md"
    if out is not None and readme.exists() and _HEAD not in readme.read_text(encoding="utf-8", errors="replace"):
        raise UsageError(f"--out {out} has a README.md that is no table of speeds; name another folder")
    if threads is not None:
        check_count("--threads", threads, 1, 1024)
        torch.set_num_threads(threads)
    console = Console(stderr=True, width=140)
    versions = environment(device, {})
    console.print(
        f"{versions['cpu'] if device == 'cpu' else device}, {torch.get_num_threads()} threads, {native.reason()}"
    )
    results: list[dict[str, Any]] = []
    todo, begun = [name for name in names or known[:-1] if name != QUICKSTART], time.perf_counter()
    with console.status("") as status:
        for i, name in enumerate(todo):
            budget_s = max(0.0, BUDGET_SECONDS - (time.perf_counter() - begun)) / (len(todo) - i)
            left = f"at most {BUDGET_SECONDS - (time.perf_counter() - begun):.0f} s left"
            results.append(
                measure(name, repeats, device, budget_s, lambda text, left=left: status.update(f"{text}; {left}"))
            )
            if not console.is_terminal:
                console.print(f"{name}: {results[-1]['turns']} turns")
    if QUICKSTART in names:
        results.append(time_to_goal(device, torch.get_num_threads()))
    import transformers

    now = datetime.datetime.now(datetime.UTC)
    versions |= {"transformers": transformers.__version__}
    result = {
        "cases": results, "date": now.isoformat(timespec="seconds"), "repeats": repeats,
        "kernels": native.reason() if device == "cpu" else "torch", "environment": versions,
    }  # fmt: skip
    titles = {"Whole training steps, images per second, medians": COLUMNS}
    titles["Classifying, images per second, medians"] = {f"{who}_images_per_s": SERVERS[who] for who in SERVERS}
    titles["Recipe quickstart, from nothing to a classifier of MNIST"] = TO_GOAL
    for title, columns in titles.items():
        table = Table("case", title=title, caption=result["kernels"], box=SIMPLE)
        for column in columns.values():
            table.add_column(column, justify="right")
        rows = [case for case in results if columns.keys() <= case.keys()]
        for case in rows:
            table.add_row(case["name"], *(_cell(case, key) for key in columns))
        if rows:
            console.print(table)
    if out is not None:
        write_json(out / f"{now:%Y-%m-%d-%H%M%S}.json", result)
        _append_rows(out / "README.md", result)
    return result


def _cell(case: dict[str, Any], key: str) -> str:
    """A figure, or where there is none the bound on it."""
    if case[key] is not None:
        return f"{case[key]:g}"
    limit = case["limits"].get(key.removesuffix("_images_per_s"))
    return f"under {limit:g}" if limit else "-"


_HEAD = "| date | case |"


def _append_rows(readme: Path, result: dict[str, Any]) -> None:
    """Add a line for each case at the end of the table in `readme`."""
    text = readme.read_text() if readme.exists() else "# Speed\n\n"
    if _HEAD not in text:
        text += f"{_HEAD} " + " | ".join(COLUMNS.values()) + " | threads | commit |\n"
        text += "|---" * (len(COLUMNS) + 4) + "|\n"
    versions = result["environment"]
    for case in [case for case in result["cases"] if COLUMNS.keys() <= case.keys()]:
        cells = [result["date"][:10], case["name"], *(_cell(case, key) for key in COLUMNS)]
        text += "| " + " | ".join([*cells, str(versions["threads"]), str(versions["git_commit"])]) + " |\n"
    write_atomically(readme, text.encode())
