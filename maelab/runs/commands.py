"""The command that makes a run again, from its config."""

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any

from maelab import recipes
from maelab.names import shell_word
from maelab.runs.checkpoints import saved_elsewhere
from maelab.runs.ensure import CONFIGS

# What comes with the weights of an encoder. Those of autoencoders have no registers.
ENCODER = ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "class_token", "reg_tokens")


def command(config: Mapping[str, Any], *, init: str | None = None, out: str | None = None) -> str:
    """The command that makes a run again: its recipe, a flag for each field that differs from it, and the seed.

    Args:
        config: of the run, with its task and recipe. A field that it lacks has the default of its task.
        init: what to call the run that it begins from; None is what the config calls it.
        out: the run folder to name; None names none.

    Returns:
        One line for a shell.
    """
    task = config["task"]
    config = {**_defaults(task), **config}
    init = init or config.get("init", "none")
    if task == "probe":
        words, base = ["maelab", "probe", init], {**_defaults(task), "init": config["init"]}
    else:
        recipe, base = nearest_recipe(config)
        words = ["maelab", task, recipe]
        if task == "finetune":
            words += ["--init", init]
            base = {**base, "init": config["init"]}
            if init != "none":
                base |= {field: config[field] for field in ENCODER}
            if saved_elsewhere(config["init"]):
                base |= recipes.FOR_FOREIGN
    words += [word for field in base if config[field] != base[field] for word in flag(field, config[field])]
    if "--seed" not in words:
        words += ["--seed", str(config["seed"])]
    return line([*words, *(["--out", out] if out else [])])


def line(words: list[str]) -> str:
    """Words as one line that can be copied to a shell."""
    return " ".join(map(shell_word, words))


def flag(field: str, value: Any) -> list[str]:
    """The words that give a field of the config this value."""
    name = field.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", *map(str, value if isinstance(value, list) else [value])]


def nearest_recipe(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The recipe of a pretraining or a fine-tuning, and its fields as JSON gives them back.

    Where no recipe has that name (a sweep's cell has none, a library's run its own), it is the one that is most alike.
    """
    known = _recipes(config["task"])
    name = config.get("recipe")
    if name not in known:
        name = min(known, key=lambda n: sum(config.get(field) != value for field, value in known[n].items()))
    return name, known[name]


@functools.cache
def _recipes(task: str) -> dict[str, dict[str, Any]]:
    names = [name for name in recipes.names(task) if name != "folder"]  # that one depends on the images
    return {name: json.loads(json.dumps(dataclasses.asdict(recipes.get(task, name)))) for name in names}


def _defaults(task: str) -> dict[str, Any]:
    return {f.name: f.default for f in dataclasses.fields(CONFIGS[task]) if f.default is not dataclasses.MISSING}
