"""Run folders, checkpoints and weights of other libraries, as inputs to mutate."""

import contextlib
import hashlib
import io
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.figure  # noqa: F401 - it makes its own cache, as it should: before anything is watched
import torch
from engine import JSON_TOKENS, Target
from safetensors.torch import save, save_file

from maelab import fitting, foreign, printing
from maelab.errors import UsageError
from maelab.files import parse_json, read_json
from maelab.fitting.plan import read_configs
from maelab.model import MaskedAutoencoderViT, VisionTransformer
from maelab.recipes import finetune_smoke, pretrain_smoke
from maelab.report import groups, report
from maelab.runs import checkpoints, commit, find_checkpoint, listing, settle
from maelab.runs.ensure import resolved
from maelab.training.checkpoint import ModelSpec, load_model, portable, read_training

Feed = Callable[[bytes, Path], object]
Seeds = Callable[[Path], list[bytes]]

TINY: dict[str, Any] = {"img_size": (8, 8), "patch_size": 4, "in_chans": 1, "embed_dim": 8, "depth": 1, "num_heads": 2}
TINY_MAE = {**TINY, "decoder_embed_dim": 8, "decoder_depth": 1, "decoder_num_heads": 2}
TINY_CLASSIFIER = {**TINY, "num_classes": 2, "global_pool": "avg"}
ROWS = b"".join(
    json.dumps({"epoch": e, "split": s, "loss": 0.5, "masked_mse": 0.4, "accuracy": 0.3}).encode() + b"\n"
    for e in (1, 2)
    for s in ("train", "val")
)


def spec(kind: str = "VisionTransformer") -> ModelSpec:
    if kind == "VisionTransformer":
        return ModelSpec(kind, TINY_CLASSIFIER, "mnist", ("a", "b"))
    return ModelSpec(kind, TINY_MAE, "mnist", (), 0.75)


def build(folder: Path) -> Path:
    """A complete pretraining and a fine-tuning from it, as small as can be."""
    for kind, task, config, result in (
        ("MaskedAutoencoderViT", "pretrain", pretrain_smoke(), {"val": {"masked_mse": 0.4, "loss": 0.4}, "epochs": 2}),
        ("VisionTransformer", "finetune", finetune_smoke(),
         {"val": {"accuracy": 0.5, "loss": 1.0}, "test": {"accuracy": 0.5, "per_class": {"a": 0.5, "b": 0.5},
          "confusion": [[1, 1], [1, 1]]}, "epochs": 2, "best_epoch": 1}),
    ):  # fmt: skip
        run, made = folder / task, spec(kind)
        run.mkdir()
        torch.manual_seed(0)
        files = portable(made, made.build().state_dict())
        commit(
            run, {f"{at}/{name}": content for at in ("best", "last") for name, content in files.items()}, {"step": 6}
        )
        (run / "config.json").write_text(json.dumps(resolved(task, "smoke", config)))
        (run / "result.json").write_text(json.dumps(result | {"data": "mnist", "init": "none", "train_images": 5}))
        (run / "env.json").write_text(json.dumps({"hardware": "cpu, fp32", "threads": 2, "data_md5": {"a": "b"}}))
        (run / "metrics.jsonl").write_bytes(ROWS)
    return folder


def seeds_of_run(name: str) -> Seeds:
    def seeds(place: Path) -> list[bytes]:
        build(place)
        return [(place / task / name).read_bytes() for task in ("pretrain", "finetune")]

    return seeds


def into_run(name: str) -> Feed:
    """What lists, compares and shows runs."""

    def feed(content: bytes, place: Path) -> None:
        (place / "finetune" / name).write_bytes(content)
        rows = listing.summaries(place)
        listing.select(rows, ["epochs>0", "recipe!=x"], "seed")
        if rows:
            printing._table(rows, [c for c in printing._COLUMNS if any(c in row for row in rows)])
        json.dumps(rows)
        runs, _, _ = groups.load([place])
        for family in groups.families(runs):
            for group in family:
                group.measured("val", "masked_mse")

    return feed


def page_of_run(content: bytes, place: Path) -> None:
    """The whole page, with one file of a run damaged: its name is in the first byte."""
    files = ("config.json", "result.json", "env.json", "metrics.jsonl")
    victim = place / "finetune" / files[hashlib.sha256(content).digest()[0] % len(files)]
    before = victim.read_bytes()
    victim.write_bytes(content)
    try:
        report([place], out=place / "page.html")
    finally:
        victim.write_bytes(before)


def seeds_of_page(place: Path) -> list[bytes]:
    return [content for name in ("config.json", "result.json") for content in seeds_of_run(name)(_fresh(place))] + [
        ROWS
    ]


def _fresh(place: Path) -> Path:
    for task in ("pretrain", "finetune"):
        shutil.rmtree(place / task, ignore_errors=True)
    return place


def seeds_of_plan(place: Path) -> list[bytes]:
    config = {"pretrain": pretrain_smoke(), "finetune": finetune_smoke()}
    plan = {"data": "mnist", "minutes": 1, "seed": 0, "fingerprint": "x"}
    rates = {stage: {"images": 10, "validation_images": 2, "images_per_s": 5.0} for stage in config}
    fields = {stage: vars(c) | {"img_size": [28, 28], "data": "mnist"} for stage, c in config.items()}
    return [json.dumps(plan | {"measured": rates} | fields).encode()]


def feed_plan(content: bytes, place: Path) -> None:
    (place / "plan.json").write_bytes(content)
    plan = read_json(place / "plan.json")
    if fitting._recall(place, plan, {"data": "mnist", "minutes": 1, "seed": 0, "fingerprint": "x"}, False):
        read_configs(plan, place)


def seeds_of_sweep(place: Path) -> list[bytes]:
    build(place)
    (place / "mask_ratio=0.5").mkdir()
    (place / "pretrain").rename(place / "mask_ratio=0.5" / "pretrain")
    cell = {"settings": {"mask_ratio": "0.5"}, "masked_mse": 0.1, "knn_accuracy": 0.5, "finetune_accuracy": 0.1}
    return [
        json.dumps({"complete": True, "best": cell["settings"], "lowest_masked_mse": None, "cells": [cell]}).encode()
    ]


def feed_sweep(content: bytes, place: Path) -> None:
    (place / "sweep.json").write_bytes(content)
    _, grids, _ = groups.load([place])
    for grid in grids:
        groups.sweep_command(grid)


def feed_json(content: bytes, place: Path) -> None:
    with contextlib.suppress(ValueError):
        json.dumps(parse_json(content))


# -------------------------------------------------------------------------------------------------------- checkpoints


def seeds_of_commit(place: Path) -> list[bytes]:
    build(place)
    return [(place / "finetune" / "checkpoints" / "commit.json").read_bytes()]


def feed_commit(content: bytes, place: Path) -> None:
    run = place / "finetune"
    file = run / "checkpoints" / "commit.json"
    file.write_bytes(content)
    checkpoints._say_once.cache_clear()
    checkpoints.intact(run, checkpoints.NAMES)
    find_checkpoint(run)
    settle(run)
    checkpoints.last_commit(run)
    commit(run, {"last/training.pt": b"x"}, {"step": 1})


def both(kind: str) -> Seeds:
    """Descriptions of checkpoints, or weights, of an autoencoder and a classifier; weights behind their description."""

    def seeds(place: Path) -> list[bytes]:
        found = []
        for name in ("VisionTransformer", "MaskedAutoencoderViT"):
            torch.manual_seed(0)
            files = portable(spec(name), spec(name).build().state_dict())
            about = json.dumps({k: v for k, v in json.loads(files["config.json"]).items() if k != "sha256"}).encode()
            (place / f"{name}.json").write_bytes(about)
            (place / f"{name}.weights").write_bytes(files["model.safetensors"])
            found.append(about if kind == "config" else files["model.safetensors"])
        return found

    return seeds


def feed_checkpoint(kind: str) -> Feed:
    def feed(content: bytes, place: Path) -> None:
        folder = place / "checkpoint"
        folder.mkdir(exist_ok=True)
        mae = b"decoder" in content
        other = (
            place
            / f"{'MaskedAutoencoderViT' if mae else 'VisionTransformer'}.{'weights' if kind == 'config' else 'json'}"
        )
        (folder / ("config.json" if kind == "config" else "model.safetensors")).write_bytes(content)
        (folder / ("model.safetensors" if kind == "config" else "config.json")).write_bytes(other.read_bytes())
        _use(load_model(folder)[0])

    return feed


def _use(model: Any) -> None:
    """A forward pass over one image, where the model is no larger than it was."""
    if sum(p.numel() for p in model.parameters()) < 10**5 and max(model.img_size) <= 64:
        with torch.no_grad():
            model.forward_features(torch.zeros(1, model.in_chans, *model.img_size))


def seeds_of_training(place: Path) -> list[bytes]:
    model = spec().build()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 1, 8, 8)).sum().backward()
    optimizer.step()
    position = {"step": 1, "seconds": 0.5, "images": 5, "sums": {"loss": torch.tensor(1.0)}, "rows": ROWS.decode()}
    position |= {"best_epoch": 1, "best": {"loss": 0.5}, "train": {"loss": 0.5}}
    found = []
    for small in (False, True):
        file = io.BytesIO()
        state = model.state_dict() if not small else {}
        content = {"position": position, "model": state, "optimizers": [optimizer.state_dict()] * (not small)}
        torch.save(content | {"average": None}, file)
        found.append(file.getvalue())
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new, zipfile.ZipFile(io.BytesIO(found[1])) as old:
        for record in old.namelist():
            new.writestr(record, old.read(record))
    return [*found, packed.getvalue()]


def feed_training(content: bytes, place: Path) -> None:
    (place / "training.pt").write_bytes(content)
    state = read_training(place / "training.pt")
    model = spec().build()
    optimizer = torch.optim.AdamW(model.parameters())
    with contextlib.suppress(KeyError, ValueError, TypeError, AttributeError, RuntimeError):  # as the loop does
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizers"][0])


PICKLE_TOKENS = (
    b"PK\x03\x04",
    b"PK\x01\x02",
    b"PK\x05\x06",
    b"data.pkl",
    b"ctorch\nFloatStorage\n",
    b"cos\nsystem\n",
    b"R.",
    b"c__builtin__\neval\n",
    b"X\x04\0\0\0",
    b"\x80\x02}q\0",
    b"K\xff",
    b"J\xff\xff\xff\x7f",
    b"tR",
    b"h\0",
)


def timm_state(kind: type = VisionTransformer, **more: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return kind(**({**TINY, "in_chans": 3, "embed_dim": 64, "num_heads": 1} | more)).state_dict()


def seeds_of_safetensors(place: Path) -> list[bytes]:
    state = timm_state(num_classes=2)
    own = {"maelab": json.dumps({"num_heads": 2, "img_size": [8, 8], "class_names": ["a", "b"]})}
    return [save(state), save(state, own), save({k: v.half() for k, v in state.items()})]


def seeds_of_pth(place: Path) -> list[bytes]:
    found = []
    for content in ({"model": timm_state(), "epoch": 3}, {"state_dict": timm_state(num_classes=2)}, timm_state()):
        for zipped in (True, False):
            file = io.BytesIO()
            torch.save(content, file, _use_new_zipfile_serialization=zipped)
            found.append(file.getvalue())
    return found


def feed_file(name: str) -> Feed:
    def feed(content: bytes, place: Path) -> None:
        (place / name).write_bytes(content)
        _use(load_model(place / name)[0])

    return feed


HF: dict[str, Any] = {
    "image_size": 8, "patch_size": 4, "num_channels": 1, "hidden_size": 8, "num_hidden_layers": 1,
    "num_attention_heads": 2, "intermediate_size": 32, "layer_norm_eps": 1e-6, "hidden_act": "gelu",
    "id2label": {"0": "a", "1": "b"}, "decoder_hidden_size": 8, "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2, "norm_pix_loss": False, "mask_ratio": 0.5,
}  # fmt: skip


def seeds_of_folder(file: str) -> Seeds:
    def seeds(place: Path) -> list[bytes]:
        torch.manual_seed(0)
        for kind, model in (("vit", VisionTransformer(**{**TINY, "num_classes": 2})),
                            ("vit_mae", MaskedAutoencoderViT(**TINY_MAE))):  # fmt: skip
            (place / kind).mkdir()
            (place / kind / "config.json").write_text(json.dumps(HF | {"model_type": kind}))
            save_file(foreign.to_hugging_face(model.state_dict()), place / kind / "model.safetensors")
            colours = {"do_normalize": True, "image_mean": [0.4], "image_std": [0.2]}
            (place / kind / "preprocessor_config.json").write_text(json.dumps(colours))
        return [(place / kind / file).read_bytes() for kind in ("vit", "vit_mae")]

    return seeds


def feed_folder(file: str) -> Feed:
    def feed(content: bytes, place: Path) -> None:
        folder = place / ("vit_mae" if b"vit_mae" in content or b"decoder" in content else "vit")
        before = (folder / file).read_bytes()
        (folder / file).write_bytes(content)
        try:
            _use(load_model(folder)[0])
        except UsageError as error:
            assert "no run folder or checkpoint" not in str(error)
        finally:
            (folder / file).write_bytes(before)

    return feed


TARGETS: dict[str, Target] = {
    "json": Target(lambda place: [ROWS[:90], b'{"a": [1, 2.5, null, {"b": "c"}]}'], feed_json, JSON_TOKENS),
    **{
        name: Target(seeds_of_run(name), into_run(name), JSON_TOKENS)
        for name in ("config.json", "result.json", "env.json", "metrics.jsonl")
    },
    "report page": Target(seeds_of_page, page_of_run, JSON_TOKENS, seconds=15, share=0.02),
    "plan.json": Target(seeds_of_plan, feed_plan, JSON_TOKENS),
    "sweep.json": Target(seeds_of_sweep, feed_sweep, JSON_TOKENS),
    "commit.json": Target(seeds_of_commit, feed_commit, JSON_TOKENS),
    "checkpoint config.json": Target(both("config"), feed_checkpoint("config"), JSON_TOKENS),
    "checkpoint model.safetensors": Target(both("weights"), feed_checkpoint("weights"), JSON_TOKENS),
    "training.pt": Target(seeds_of_training, feed_training, PICKLE_TOKENS),
    "foreign .safetensors": Target(seeds_of_safetensors, feed_file("a.safetensors"), JSON_TOKENS, ("maelab", "/")),
    "foreign .pth": Target(seeds_of_pth, feed_file("a.pth"), PICKLE_TOKENS, ("maelab", "/")),
    **{
        f"transformers {name}": Target(seeds_of_folder(name), feed_folder(name), JSON_TOKENS, ("maelab", "/"))
        for name in ("config.json", "preprocessor_config.json", "model.safetensors")
    },
}
