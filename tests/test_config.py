"""Configs: every option is read, explained and checked. A dead option is a lie."""

import ast
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from maelab import config as config_module
from maelab.cli import COMMANDS, signature
from maelab.config import (
    Augment,
    BlocksConfig,
    ComputeOptions,
    DataConfig,
    EncoderConfig,
    FinetuneConfig,
    LoopConfig,
    PretrainConfig,
    ProbeConfig,
    RunOptions,
)
from maelab.errors import UsageError

PACKAGE = Path(config_module.__file__).parent
SHARED = ["data/*.py", "training/*.py"]  # what every task reads its config with
RUN = [*SHARED, "runs/*.py"]
ENGINE = ["training/parallel.py"]
# Command -> the modules that read the fields of its config, of its options, and of what to print.
READERS: dict[str, dict[str, list[str]]] = {
    "pretrain": {"config": [*SHARED, "tasks/pretrain.py"], "options": [*RUN, "tasks/pretrain.py"]},
    "finetune": {"config": [*SHARED, "tasks/finetune.py", "runs/commands.py"], "options": [*RUN, "tasks/finetune.py"]},
    "probe": {"config": [*SHARED, "tasks/probe.py"], "options": [*RUN, "tasks/probe.py"]},
    "sweep": {"config": [*SHARED, "tasks/pretrain.py"], "options": [*RUN, "tasks/pretrain.py", "sweep.py"]},
    "fit": {"options": [*ENGINE, "fit.py"]},
    "evaluate": {"options": [*ENGINE, "tasks/evaluate.py"]},
    "predict": {"options": [*ENGINE, "tasks/predict.py"]},
    "reconstruct": {"options": [*ENGINE, "tasks/reconstruct.py", "training/checkpoint.py"]},
    "attention": {"options": [*ENGINE, "tasks/attention.py", "training/checkpoint.py"]},
    "features": {"options": [*ENGINE, "tasks/features.py"]},
    "similar": {"options": ENGINE},
    "map": {"options": ENGINE},
    "odd": {"options": ENGINE},
}
HOLDERS = {"config", "cfg", "options", "self", "output"}  # names that a config goes by


def reads(source: str) -> set[str]:
    """Fields that a module reads: `config.field`, or 'field' in a tuple of names for getattr."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in HOLDERS:
            found.add(node.attr)
        if isinstance(node, ast.Tuple):
            found |= {e.value for e in node.elts if isinstance(e, ast.Constant) and isinstance(e.value, str)}
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_read_by_the_command_that_takes_it(command):
    """Those of the function in its body, the others wherever the object goes."""
    module, _, name = COMMANDS[command].task.partition(":")
    place = PACKAGE.parent / module.replace(".", "/")
    source = (place / "__init__.py" if place.is_dir() else place.with_suffix(".py")).read_text()
    (function,) = (n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == name)
    loaded = {n.id for part in function.body for n in ast.walk(part) if isinstance(n, ast.Name)}
    readers = {"": [], "output": ["printing.py"], **READERS.get(command, {})}
    read = {owner: reads_of(globs) for owner, globs in readers.items()}
    read |= {"": loaded, "output": read["output"] | {"debug"}}  # --debug may stand anywhere: main looks for it
    taken = signature(command)
    assert taken.owners.keys() == readers.keys() - {""}
    assert not [option.label for option in taken.options if option.name not in read[option.owner]]


def reads_of(globs: list[str]) -> set[str]:
    return set().union(*(reads(file.read_text()) for glob in globs for file in PACKAGE.glob(glob)))


def test_only_what_trains_takes_processes_and_a_run_folder():
    takes = {command for command in COMMANDS if signature(command).owners.get("options") is RunOptions}
    assert takes == {"pretrain", "finetune", "probe", "sweep"}
    assert "data_dir" not in reads_of(READERS["predict"]["options"]) | reads_of(READERS["fit"]["options"])


def test_a_field_that_is_only_written_or_named_is_not_read():
    source = 'result = {"epochs": 3}; x = replace(c, seed=1); config.blr; names = ("depth", "width")'
    assert reads(source) == {"blr", "depth", "width"}


@pytest.mark.parametrize("kind", [c for c in vars(config_module).values() if isinstance(c, type)])
def test_every_class_and_field_has_help(kind):
    if kind.__module__ != config_module.__name__ or kind.__name__[0] == "_":
        return
    (tree,) = (
        node
        for node in ast.parse(Path(config_module.__file__).read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == kind.__name__
    )
    assert ast.get_docstring(tree)
    for field, text in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign):
            assert isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant), ast.unparse(field)
            help_text = text.value.value
            assert isinstance(help_text, str) and len(help_text) > 5 and not help_text.endswith("."), help_text


@pytest.mark.parametrize("kind", [PretrainConfig, FinetuneConfig, ProbeConfig, RunOptions])
def test_configs_are_frozen_and_take_no_unknown_field(kind):
    config = kind(**required(kind))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 3
    with pytest.raises(TypeError, match="unexpected keyword argument 'learning_rate'"):
        kind(**required(kind), learning_rate=1)


def required(kind: type) -> dict[str, Any]:
    """Values for the fields without a default."""
    return {field.name: "mnist" for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING}


WRONG = [
    (DataConfig, {"limit": 0}, "--limit must be at least 1, got 0"),
    (DataConfig, {"split_seed": -1}, "--split-seed must be at least 0, got -1"),
    (DataConfig, {"split_seed": 2**63}, "--split-seed must be below 2**63, got 9223372036854775808"),
    (DataConfig, {"val_fraction": 0.0}, "--val-fraction must lie between 0 and 1, got 0.0"),
    (DataConfig, {"val_fraction": 1.0}, "--val-fraction must lie between 0 and 1, got 1.0"),
    (LoopConfig, {"epochs": 0}, "--epochs must be at least 1, got 0"),
    (LoopConfig, {"batch_size": -8}, "--batch-size must be at least 1, got -8"),
    (LoopConfig, {"seed": -1}, "--seed must be at least 0, got -1"),
    (LoopConfig, {"seed": 2**63}, "--seed must be below 2**63, got 9223372036854775808"),
    (LoopConfig, {"blr": -1e-3}, "--blr must be at least 0, got -0.001"),
    (LoopConfig, {"blr": math.nan}, "--blr must be"),
    (BlocksConfig, {"muon_lr": -0.1}, "--muon-lr must be at least 0, got -0.1"),
    (LoopConfig, {"weight_decay": math.inf}, "--weight-decay must be"),
    (LoopConfig, {"ema_decay": 1.0}, r"--ema-decay must lie in [0, 1), got 1.0"),
    (LoopConfig, {"beta2": 1.0}, "--beta2 must lie between 0 and 1, got 1.0"),
    (LoopConfig, {"batch_size": 10, "accumulate": 3}, "--accumulate 3 does not divide --batch-size 10"),
    (EncoderConfig, {"patch_size": 0}, "--patch-size must be at least 1, got 0"),
    (EncoderConfig, {"num_heads": 5}, "--num-heads 5 does not divide --embed-dim 192"),
    (EncoderConfig, {"embed_dim": 6, "num_heads": 3}, "--embed-dim must be a multiple of 4"),
    (EncoderConfig, {"mlp_ratio": 0.0}, "--mlp-ratio must be above 0, got 0.0"),
    (EncoderConfig, {"img_size": (0, 28)}, "--img-size must be positive, got (0, 28)"),
    (Augment, {"crop_padding": -1}, "--crop-padding must be at least 0, got -1"),
    (Augment, {"crop_scale": 0.0}, "--crop-scale must be above 0"),
    (Augment, {"crop_scale": 1.5}, "--crop-scale must lie between 0 and 1, got 1.5"),
    (Augment, {"affine_scale": 1.0}, "--affine-scale must be below 1, got 1.0"),
    (Augment, {"random_erasing": 2.0}, "--random-erasing must lie between 0 and 1, got 2.0"),
    (Augment, {"rand_augment_magnitude": 11.0}, "--rand-augment-magnitude must be at most 10, got 11"),
    (PretrainConfig, {"mask_ratio": 0.0}, "--mask-ratio must lie between 0 and 1, got 0.0"),
    (PretrainConfig, {"mask_ratio": 1.0}, "--mask-ratio must lie between 0 and 1, got 1.0"),
    (PretrainConfig, {"decoder_num_heads": 5}, "--decoder-num-heads 5 does not divide --decoder-embed-dim 192"),
    (PretrainConfig, {"decoder_embed_dim": 6}, "--decoder-embed-dim must be a multiple of 4"),
    (PretrainConfig, {"knn_every": -1}, "--knn-every must be at least 0, got -1"),
    (FinetuneConfig, {"label_fraction": 0.0}, "--label-fraction must be above 0"),
    (FinetuneConfig, {"label_fraction": 1.1}, "--label-fraction must lie between 0 and 1, got 1.1"),
    (FinetuneConfig, {"label_smoothing": 1.1}, "--label-smoothing must lie between 0 and 1, got 1.1"),
    (FinetuneConfig, {"layer_decay": 1.1}, "--layer-decay must lie between 0 and 1, got 1.1"),
    (FinetuneConfig, {"layer_decay": 0.0}, "--layer-decay must be above 0"),
    (FinetuneConfig, {"drop_path": 1.0}, "--drop-path must lie in [0, 1), got 1.0"),
    (FinetuneConfig, {"patch_drop": 1.0}, "--patch-drop must lie in [0, 1), got 1.0"),
    (FinetuneConfig, {"patience": 2, "keep": "last"}, "--patience needs --keep best"),
    (FinetuneConfig, {"patience": -1}, "--patience must be at least 0, got -1"),
    (FinetuneConfig, {"global_pool": "token", "class_token": False}, "--global-pool token needs --class-token"),
    (FinetuneConfig, {"unlabelled": 2}, "--unlabelled needs --ema-decay, such as 0.99"),
    (ProbeConfig, {"neighbours": 0}, "--neighbours must be at least 1, got 0"),
    (ProbeConfig, {"label_fraction": 0.0}, "--label-fraction must be above 0"),
    (ComputeOptions, {"threads": 0}, "--threads must be at least 1, got 0"),
    (RunOptions, {"devices": 0}, "--devices must be at least 1, got 0"),
    (RunOptions, {"num_nodes": 0}, "--num-nodes must be at least 1, got 0"),
]


@pytest.mark.parametrize(("kind", "values", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_impossible_values_are_refused_by_their_flag(kind, values, message):
    with pytest.raises(UsageError) as refused:
        kind(**{**required(kind), **values})
    text = str(refused.value)
    assert text.startswith(message) and "\n" not in text


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (DataConfig, {"limit": 1, "val_fraction": 0.99, "split_seed": 2**63 - 1}),
        (LoopConfig, {"blr": 0.0, "ema_decay": 0.0, "warmup_epochs": 0.0, "batch_size": 8, "accumulate": 8}),
        (LoopConfig, {"seed": 2**63 - 1, "beta2": 0.01, "clip_grad": 0.0, "weight_decay": 0.0}),
        (EncoderConfig, {"img_size": (28, 14), "patch_size": 7, "mlp_ratio": 0.5}),
        (Augment, {"crop_scale": 0.08, "rand_augment_magnitude": 10.0, "random_erasing": 1.0}),
        (PretrainConfig, {"decoder_depth": 0, "mask_ratio": 0.01}),
        (FinetuneConfig, {"label_fraction": 1.0, "layer_decay": 1.0, "global_pool": "avg", "class_token": False}),
    ],
)
def test_values_at_the_edge_are_taken(kind, values):
    config = kind(**{**required(kind), **values})
    assert {name: getattr(config, name) for name in values} == values


def test_a_subclass_checks_what_its_parents_check():
    for parent, values, message in WRONG:
        for kind in (PretrainConfig, FinetuneConfig, ProbeConfig):
            if issubclass(kind, parent):
                with pytest.raises(UsageError, match=message.split(" ")[0]):
                    kind(**{**required(kind), **values})
