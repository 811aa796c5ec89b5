"""Every experiment behind the figures of docs/results.md: `make results`, or `make results PART=quickstart`.

Full run folders lie in runs/results; a part that is stopped goes on where it was. What is small of them is kept in
results/runs.jsonl, and their tables and the page, results/build/report.html, are made from that alone.
"""

import argparse
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from maelab import runs
from maelab.report import build_page

HERE = Path(__file__).resolve().parent
WORK = HERE.parent / "runs" / "results"
TABLE, PICTURES, BUILD = HERE / "runs.jsonl", HERE / "pictures", HERE / "build"
README, RESULTS = HERE.parent / "README.md", HERE.parent / "docs" / "results.md"
SEEDS = (0, 1, 2)
LONG_SEEDS = (0, 1)  # of runs that take over half an hour where there is no AMX
# What others have published (sources: maelab/report/published.py): theirs, our figure and how; the same fine-tuning
# from scratch: runs, or what there is to say instead.
BESIDE = {
    "CIFAR-10 from an own autoencoder, test": (
        "0.8977 after 2000 + 100 epochs, 0.912 after 400 + 100, 5.4M parameters;"
        " 0.9641 after a long run on 36x36 pixels",
        ("longest-cifar-s?", "test", "accuracy"),
        "after 60 + 100, 2.7M parameters, 57 min of both cores and 149 of one",
        "0.9303 ± 0.0023 (2 seeds, a GPU); 0.9381 after 153 epochs, as long as all of it (1 seed)",
    ),
    "CIFAR-10 from an MNIST autoencoder, test": (
        "0.7512 after 1000 + 20 epochs",
        ("transfer-s?", "test", "accuracy"),
        "after 60 + 20",
        "transfer-scratch-s?",
    ),
    "the same from an autoencoder of 10 epochs": (
        "0.829 claimed of validation after 10 + 10",
        ("augmented-mnist-s?", "test", "accuracy"),
        "after 10 + 10",
        "augmented-scratch-s?",
    ),
    "MNIST, test": (
        "0.9927 after 1000 + 20 epochs",
        ("best-mnist-s?", "test", "accuracy"),
        "after 60 + 20",
        "scratch-mnist-s?",
    ),
    "the same by recipe `mnist`": (
        "0.985 of validation after 10 + 10",
        ("bf16-s?-f", "test", "accuracy"),
        "after 6 + 6",
        "mnist-scratch-s?",
    ),
    "masked MSE of an MNIST autoencoder, patches of 4, 75% hidden, training": (
        "0.0871 after 1000 epochs, 6.7 days on a GPU server (0.0877, but it divides by 0.75 where 37 of 49 are hidden)",
        ("mae-mnist-long", "train", "masked_mse"),
        "after 60, 84 min",
        "-",
    ),
    "the same with patches of 7, 50% hidden, validation": (
        "0.2395 after 10 epochs",
        ("sweep/patch_size=7,mask_ratio=0.5/pretrain", "val", "masked_mse"),
        "after 10",
        "-",
    ),
    "the same with patches of 14, 50% hidden, validation": (
        "0.2302 after 10 epochs",
        ("sweep/patch_size=14,mask_ratio=0.5/pretrain", "val", "masked_mse"),
        "after 10",
        "-",
    ),
}
ROWS = {  # of the table of runs: what it says, then which autoencoders and which classifiers
    "MNIST, 6 epochs + 6, bfloat16: recipe `mnist` as it comes": ("bf16-s?-p", "bf16-s?-f"),
    "the same in float32": ("fp32-s?-p", "fp32-s?-f"),
    "MNIST, an autoencoder of 60 epochs, 2.9M parameters": ("mae-mnist-long", ""),
    "MNIST, 20 epochs from that, strong affine distortion, random erasing": ("", "best-mnist-s?"),
    "the same with elastic distortion instead of erasing": ("", "elastic-mnist-s?"),
    "the same with elastic distortion and more erasing": ("", "erased-mnist-s?"),
    "CIFAR-10, 10 epochs from an MNIST autoencoder": ("mae-mnist-s?", "augmented-mnist-s?"),
    "the same with new position embeddings": ("", "new-positions-s?"),
    "with a new patch embedding": ("", "new-patches-s?"),
    "with both new": ("", "new-both-s?"),
    "CIFAR-10, 20 epochs from the MNIST autoencoder of 60": ("", "transfer-s?"),
    "CIFAR-10, 30 epochs from a CIFAR-10 autoencoder of 60": ("", "best-cifar-s?"),
    "the same with 100 epochs": ("", "longest-cifar-s?"),
}
CONTROLS = {  # of its table of controls: which classifiers from scratch, from an MNIST and from a CIFAR-10 autoencoder
    "MNIST, 6 epochs": ("mnist-scratch-s?", "bf16-s?-f", ""),
    "MNIST, 20 epochs, strong augmentation": ("scratch-mnist-s?", "best-mnist-s?", ""),
    "MNIST, 10% of the labels, 30 epochs": ("mnist-share10-scratch-s?", "mnist-share10-mae-s?", ""),
    "MNIST, 1% of the labels, 100 epochs": ("mnist-share1-scratch-s?", "mnist-share1-mae-s?", ""),
    "CIFAR-10, 20 epochs": ("transfer-scratch-s?", "transfer-s?", ""),
    "CIFAR-10, 10 epochs": ("augmented-scratch-s?", "augmented-mnist-s?", "augmented-cifar-s?"),
    "CIFAR-10, 10 epochs, no augmentation": ("plain-scratch-s?", "plain-mnist-s?", "plain-cifar-s?"),
    "CIFAR-10, 10% of the labels, 30 epochs": ("share10-scratch-s?", "share10-mnist-s?", "share10-cifar-s?"),
    "CIFAR-10, 1% of the labels, 100 epochs": ("share1-scratch-s?", "share1-mnist-s?", "share1-cifar-s?"),
}
KINDS = ("reconstructions", "predictions")  # of pictures of runs on the page; it draws the others itself
WIDE_ENCODER = "--embed-dim 192 --num-heads 3"  # the width of recipe cifar10
WIDE = f"{WIDE_ENCODER} --decoder-embed-dim 96 --decoder-num-heads 3"
AUGMENTATIONS = {"augmented": "", "plain": " --crop-padding 0 --no-flip"}
SHARES = {  # no validation label chooses the epoch, and each seed has its own images
    "share1": " --label-fraction 0.01 --epochs 100 --batch-size 64 --val-fraction 0.01 --keep last",
    "share10": " --label-fraction 0.1 --epochs 30 --batch-size 128 --val-fraction 0.01 --keep last",
}
ADAPTATIONS = {
    "new-patches": " --adapt-patch-embed reinit",
    "new-positions": " --adapt-pos-embed reinit",
    "new-both": " --adapt-patch-embed reinit --adapt-pos-embed reinit",
}
STRONG_MNIST = "--affine-degrees 15 --affine-scale 0.15 --affine-translate 0.1 --affine-shear 10"
LONG_MNIST = {  # what else the long classifiers of MNIST are told
    "best": "--ema-decay 0.999 --random-erasing 0.2",
    "erased": "--ema-decay 0.998 --random-erasing 0.5 --elastic 0.03",
}
TRIALS_MNIST = {  # and the trials of ten epochs that led from the first to the second
    "trial-erasing-0.2": "--ema-decay 0.999 --random-erasing 0.2",
    "trial-erasing-0.2-elastic": "--ema-decay 0.999 --random-erasing 0.2 --elastic 0.03",
    "trial-erasing-0.2-elastic-ema-0.995": "--ema-decay 0.995 --random-erasing 0.2 --elastic 0.03",
    "trial-erasing-0.5": "--ema-decay 0.999 --random-erasing 0.5",
    "trial-elastic-patch-drop": "--ema-decay 0.999 --elastic 0.03 --patch-drop 0.25",
}
STRONG_CIFAR = "--mixup 0.2 --cutmix 1 --ema-decay 0.999"
DIGITS = "digits that the autoencoder had not seen, a quarter of each, and what it makes of it"
SHIPPED = {"mae-mnist-long": "mnist-mae", "mae-cifar-long": "cifar10-mae"}  # run -> NAME of maelab:NAME
START, END = "<!-- results/make.py writes these tables -->\n", "<!-- end -->"


def experiments() -> dict[str, dict[str, str]]:
    """Part -> name of a run -> what maelab is told; @NAME is the folder of another run of the table."""
    quickstart, controls, transfer, adapted, labels = {}, {}, {}, {}, {}
    for name in ("bf16", "fp32"):
        for seed in SEEDS:
            run = f"{name}-s{seed}"
            quickstart[f"{run}-p"] = f"pretrain mnist --seed {seed} --precision {name}"
            quickstart[f"{run}-f"] = f"finetune mnist --init @{run}-p --seed {seed} --precision {name}"
    for seed in SEEDS:
        seeds = f"--seed {seed} --split-seed {seed}"
        controls[f"mae-cifar-s{seed}"] = f"pretrain cifar10 --seed {seed}"
        controls[f"mae-mnist-s{seed}"] = f"pretrain mnist {WIDE} --epochs 10 --seed {seed}"
        for origin in ("scratch", "mnist", "cifar"):
            init = "" if origin == "scratch" else f" --init @mae-{origin}-s{seed}"
            few = init if origin != "cifar" else " --init @mae-cifar-long"  # one for all seeds: it comes with maelab
            for name, flags in SHARES.items():
                labels[f"{name}-{origin}-s{seed}"] = f"finetune cifar10{few}{flags} {seeds}"
            for name, flags in AUGMENTATIONS.items():
                controls[f"{name}-{origin}-s{seed}"] = f"finetune cifar10{init}{flags} --seed {seed}"
        for origin, init in {"scratch": "", "mae": f" --init @bf16-s{seed}-p"}.items():
            for name, flags in SHARES.items():
                labels[f"mnist-{name}-{origin}-s{seed}"] = f"finetune mnist{init}{flags} {seeds}"
        labels[f"mnist-scratch-s{seed}"] = f"finetune mnist --seed {seed}"
    for seed in LONG_SEEDS:
        transfer[f"transfer-s{seed}"] = f"finetune cifar10 --init @mae-mnist-long --epochs 20 --seed {seed}"
        transfer[f"transfer-scratch-s{seed}"] = f"finetune cifar10 --epochs 20 --seed {seed}"
        for name, flags in ADAPTATIONS.items():
            adapted[f"{name}-s{seed}"] = f"finetune cifar10 --init @mae-mnist-s{seed}{flags} --seed {seed}"
    mnist = {"mae-mnist-long": f"pretrain mnist {WIDE} --epochs 60 --batch-size 128"}
    strong = f"finetune mnist --init @mae-mnist-long --epochs 20 {STRONG_MNIST}"
    mnist |= {f"{name}-mnist-s{s}": f"{strong} {flags} --seed {s}" for name, flags in LONG_MNIST.items() for s in SEEDS}
    control = f"finetune mnist {WIDE_ENCODER} --epochs 20 {STRONG_MNIST} {LONG_MNIST['best']}"
    mnist |= {f"scratch-mnist-s{seed}": f"{control} --seed {seed}" for seed in SEEDS}
    mnist["elastic-mnist-s0"] = f"{strong} --ema-decay 0.999 --elastic 0.04"
    trial = f"finetune mnist --init maelab:mnist-mae --epochs 10 --val-fraction 0.2 {STRONG_MNIST}"
    trials = {name: f"{trial} {flags}" for name, flags in TRIALS_MNIST.items()}
    cifar = {"mae-cifar-long": "pretrain cifar10 --epochs 60"}
    cifar |= {
        f"{name}-cifar-s0": f"finetune cifar10 --init @mae-cifar-long --epochs {epochs} {STRONG_CIFAR}"
        for name, epochs in {"best": 30, "longest": 100}.items()
    }
    grid = "--grid patch_size=14,7,4,2 --grid mask_ratio=0.3,0.5,0.7,0.9"  # the quick cells first
    sweep = {"sweep": f"sweep mnist {grid} --epochs 10 --val-fraction 0.2 --finetune-epochs 2"}
    reported = {  # report B's cells with patches of 2, whose first epoch a warm-up of one epoch loses
        f"reported-2-{ratio}": f"pretrain mnist --patch-size 2 --mask-ratio {ratio} --epochs 10 --val-fraction 0.2"
        " --warmup-epochs 0.1"
        for ratio in (0.3, 0.5)
    }
    return {
        "quickstart": quickstart, "sweep": sweep, "reported": reported, "controls": controls, "transfer": transfer,
        "adaptations": adapted, "labels": labels, "mnist": mnist, "trials": trials, "cifar10": cifar,
    }  # fmt: skip


def command(text: str) -> list[str]:
    return [str(WORK / word[1:]) if word.startswith("@") else word for word in shlex.split(text)]


def needed(names: list[str], table: dict[str, str]) -> dict[str, str]:
    """The runs of these names, each after those that it begins from."""
    todo: dict[str, str] = {}
    for name in names:
        origins = [word[1:] for word in shlex.split(table[name]) if word.startswith("@")]
        todo |= needed(origins, table) | {name: table[name]}
    return todo


def belongs(name: str, whole: str) -> bool:
    """Whether a record is that of a run or a sweep, or of a run within it."""
    return name == whole or name.startswith(f"{whole}/")


def restore(name: str) -> None:
    """Put back what is kept of a run, with its weights where they come with maelab, unless its folder is there."""
    if not (WORK / name).exists():
        for other, record in runs.read_records(TABLE).items():
            if belongs(other, name):
                runs.restore(record, WORK / other, f"maelab:{SHIPPED[name]}" if name in SHIPPED else None)


def run(todo: dict[str, str], asked: Collection[str], jobs: int) -> None:
    """Call each command, `jobs` at a time; with several, each gets one thread. A command finds out itself what of its
    run is done. What others begin from is not trained again where its weights come with maelab, unless it is among
    those `asked` for. A sweep that reports cells which failed is done all the same.

    Raises:
        SystemExit: with the status of the first that fails, after those that still run have ended; 130 when
            interrupted, after those that run have saved themselves.
    """
    for name in todo:
        if name in SHIPPED and name not in asked:
            restore(name)
    done = {name for name in todo if name in SHIPPED and name not in asked and runs.is_complete(WORK / name)}
    waiting = {name: text for name, text in todo.items() if name not in done}
    running: dict[str, subprocess.Popen[bytes]] = {}
    status = 0
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        while (waiting and not status) or running:
            for name, text in list(waiting.items()):
                ready = all(word[1:] in done for word in shlex.split(text) if word.startswith("@"))
                if ready and len(running) < jobs and not status:
                    print(f"{time.strftime('%H:%M')} {name}: maelab {text}", file=sys.stderr)
                    threads = ["--threads", "1"] if jobs > 1 else []
                    words = [sys.executable, "-m", "maelab", *command(text), "--out", str(WORK / name), *threads]
                    running[name] = subprocess.Popen(words, stdout=subprocess.DEVNULL, start_new_session=True)
                    del waiting[name]
            time.sleep(0.1)
            for name, process in list(running.items()):
                if process.poll() is not None:
                    some_cells = process.returncode == 1 and runs.sweep_of(WORK / name).get("complete")
                    status = status or (0 if some_cells else process.returncode)
                    done.add(name)
                    del running[name]
    except KeyboardInterrupt:
        for process in running.values():
            process.send_signal(signal.SIGINT)
        for process in running.values():
            process.wait()
        status = 130
    if status:
        raise SystemExit(status)


def keep(names: Collection[str]) -> None:
    """Put what is small of the complete runs into the table; of a sweep half done its complete runs."""
    records = runs.read_records(TABLE)
    for name in names:
        new = runs.records_under(WORK / name) if (WORK / name).is_dir() else {}
        whole = records.get(name, {}).get("sweep", {}).get("complete")
        half = whole and not new.get(name, {}).get("sweep", {}).get("complete")  # which replaces no whole one
        if any("result" in record for record in new.values()) and not half:
            records = {other: record for other, record in records.items() if not belongs(other, name)} | new
    runs.write_records(TABLE, records)


def build(records: Mapping[str, runs.Record]) -> None:
    """Make the page and its figures from the table, and keep those pictures of runs that the page shows.

    A picture comes from the run folder, if that holds the very run of the table, or else from those kept before.
    """
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary) / "runs"
        for name, record in records.items():
            runs.restore(record, place / name)
            same = runs.is_complete(WORK / name) and runs.record_of(WORK / name) == record
            for kind in KINDS:
                fresh, old = runs.figure_of(WORK / name, kind), PICTURES / name / f"{kind}.png"
                target = runs.figure_of(place / name, kind)
                target.parent.mkdir(parents=True, exist_ok=True)
                if same and fresh.is_file():
                    with Image.open(fresh) as image:  # 64 colours are plenty, and a third of the bytes
                        image.convert("RGB").quantize(64, dither=Image.Dither.NONE).save(target, optimize=True)
                elif old.is_file():
                    shutil.copyfile(old, target)
        shutil.rmtree(BUILD, ignore_errors=True)
        rebuilt = runs.figure_of(place / "mae-mnist-long", "reconstructions")
        shown = build_page(
            [place],
            out=BUILD / "report.html",
            figures=BUILD / "figures",
            title="Masked autoencoders on MNIST and CIFAR-10",
            lead=opening(records) if rebuilt.is_file() else [],  # of a table that is whole
            pictures={DIGITS: rebuilt} if rebuilt.is_file() else {},
        )["pictures"]
        shutil.rmtree(PICTURES, ignore_errors=True)
        for file in map(Path, shown):
            target = PICTURES / file.parents[1].relative_to(place.resolve()) / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)


def statistic(results: list[dict[str, Any]], part: str, key: str) -> str:
    """Mean, and sample standard deviation where there are several; a dash for none."""
    values = [result[part][key] for result in results]
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{spread}" if values else "-"


def results_of(records: Mapping[str, runs.Record], pattern: str) -> list[dict[str, Any]]:
    return [record["result"] for name, record in records.items() if pattern and fnmatchcase(name, pattern)]


def opening(records: Mapping[str, runs.Record]) -> list[str]:
    """What was done, four figures, and what pretraining was worth, for the top of the page."""

    def accuracy(pattern: str) -> str:
        results = results_of(records, pattern)
        return f"{statistic(results, 'test', 'accuracy')} ({len(results)} seed{'s' * (len(results) != 1)})"

    done = [record["result"]["task"] for record in records.values() if "result" in record]
    few, few_alone, all_, all_alone, best, alone = map(
        accuracy,
        ("share1-cifar-s?", "share1-scratch-s?", "augmented-cifar-s?", "augmented-scratch-s?", "best-mnist-s?",
         "scratch-mnist-s?"),
    )  # fmt: skip
    return [
        f"{done.count('pretrain')} autoencoders learned from MNIST and CIFAR-10 without labels, and"
        f" {done.count('finetune')} classifiers began from their encoders or from scratch.",
        f"Test accuracy: MNIST {accuracy('erased-mnist-s?')}; CIFAR-10 {accuracy('longest-cifar-s?')} from its own"
        f" autoencoder, {accuracy('transfer-s?')} from one of MNIST; with 1 % of its labels {few}.",
        "What pretraining was worth, beside the same fine-tuning from scratch: with 1 % of CIFAR-10's labels"
        f" {few} instead of {few_alone}; with all of them, after ten epochs, {all_} instead of {all_alone}; on MNIST"
        f" with all labels, after twenty epochs, nothing: {best} beside {alone}.",
    ]


def gains(records: Mapping[str, runs.Record]) -> str:
    """What pretraining adds, as Markdown, from what is kept."""
    head = "| fine-tuning | from scratch | from an MNIST autoencoder | from a CIFAR-10 autoencoder |"
    lines = [head, "|---|---|---|---|"]
    for what, names in CONTROLS.items():
        starts = [results_of(records, name) for name in names]
        cells = [statistic(start, "test", "accuracy") + f" ({len(start)})" * bool(start) for start in starts]
        if any(starts):
            lines.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def tables(records: Mapping[str, runs.Record]) -> str:
    """All results as Markdown, from what is kept."""
    kept = partial(results_of, records)

    def counted(results: list[dict[str, Any]]) -> str:
        return f"({len(results)} seed" + "s" * (len(results) > 1) + ")"

    lines = ["| | published | maelab, on two CPU cores | the same fine-tuning from scratch |", "|---|---|---|---|"]
    for what, (theirs, (pattern, *path), how, control) in BESIDE.items():
        if results := kept(pattern):
            scratch = kept(control)
            without = f"{statistic(scratch, *path)} {counted(scratch)}" if scratch else control
            figure = f"**{statistic(results, *path)}** {how} {counted(results)}"
            lines.append(f"| {what} | {theirs} | {figure} | {without} |")
    question = "Does pretraining help? Test accuracy of the same fine-tuning from each start (in brackets: seeds):"
    lines += ["", question, "", gains(records)]
    head = "| what | seeds | masked MSE, validation | accuracy, validation | accuracy, test |"
    lines += [head, "|---|---|---|---|---|"]
    for what, names in ROWS.items():
        pretrained, tuned = map(kept, names)
        figures = statistic(pretrained, "val", "masked_mse"), statistic(tuned, "val", "accuracy")
        if seeds := len(tuned or pretrained):
            lines.append(f"| {what} | {seeds} | {' | '.join(figures)} | {statistic(tuned, 'test', 'accuracy')} |")
    return "\n".join(lines) + "\n"


def with_tables(text: str, made: str) -> str:
    """A page's text with the tables of today."""
    before, rest = text.split(START)
    return before + START + made + END + rest.split(END, 1)[1]


def main() -> None:
    parts = experiments()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"which of {', '.join(parts)}, or names of runs; none is all")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--page", action="store_true", help="run nothing: make the page and the tables")
    arguments = parser.parse_args()
    table = {name: text for part in parts.values() for name, text in part.items()}
    if unknown := set(arguments.parts) - set(parts) - set(table):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(parts)}")
    if not arguments.page:
        asked = [name for part in arguments.parts or parts for name in parts.get(part, [part])]
        todo = needed(asked, table)
        try:
            run(todo, asked, arguments.jobs)
        finally:
            keep(todo)
    records = runs.read_records(TABLE)
    build(records)
    for page, made in ((README, gains(records)), (RESULTS, tables(records))):
        page.write_text(with_tables(page.read_text(), made))


if __name__ == "__main__":
    main()
