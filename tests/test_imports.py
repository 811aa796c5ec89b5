"""Imports inside maelab point one way, and heavy libraries stay where they belong."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import pytest

PACKAGE = Path(__file__).parents[1] / "maelab"

# From the bottom up: a unit (a module, or a package with all in it) imports only units of lower layers. Units of one
# layer do not import each other, apart from SIBLINGS.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "names"),
    ("progress",),
    ("config", "model", "files"),
    ("native", "recipes"),
    ("runs", "data", "weights", "commandline"),
    ("foreign",),
    ("training", "inference", "figures"),
    ("encoder",),
    ("tasks",),
    ("sweep", "report", "export", "bench", "pretrained"),
    ("page",),
    ("fitting",),
    ("__init__",),
    ("printing",),
    ("cli",),
    ("__main__",),
)
SIBLINGS: frozenset[tuple[str, str]] = frozenset({("bench", "export")})  # (importer, imported)

LAYER = {unit: number for number, units in enumerate(LAYERS) for unit in units}
ENGINE = ("torch.distributed", "torch.nn.parallel")
HEAVY = {"torch", "numpy", "matplotlib", "PIL", "transformers"}
NO_TORCH = ("config", "commandline", "files", "recipes", "runs", "report", "pretrained")

Files = dict[str, tuple[str, bool]]  # dotted name -> source, and whether it is a package's __init__


class Import(NamedTuple):
    name: str  # dotted, absolute
    when: Literal["start", "call", "types"]  # at import of the module, inside a function, or for type checkers only
    line: int


def read(folder: Path) -> Files:
    """Every module under `folder`, a package."""
    files: Files = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder.parent).with_suffix("").parts
        package = parts[-1] == "__init__"
        files[".".join(parts[:-1] if package else parts)] = (path.read_text(encoding="utf-8"), package)
    return files


def imports(name: str, files: Files) -> Iterator[Import]:
    """Every import of module `name`; `from package import x` names package.x where that is a module.

    What maelab says about itself, `maelab.__version__` and the like, is no import of its public API.
    """
    source, package = files[name]
    tree = ast.parse(source, filename=name)
    uses = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "maelab"}

    def visit(node: ast.AST, when: Literal["start", "call", "types"]) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name != "maelab" or alias.asname or not all(use.startswith("__") for use in uses):
                    yield Import(alias.name, when, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = name.split(".")
                parents = parts[: len(parts) - node.level + package]
                base = ".".join([*parents, base] if base else parents)
            for alias in node.names:
                if base == "maelab" and alias.name.startswith("__"):
                    continue
                full = f"{base}.{alias.name}"
                known = full in files or (base == "maelab" and alias.name in LAYER)
                yield Import(full if known else base, when, node.lineno)
        elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for child in node.body:
                yield from visit(child, "types")
            for child in node.orelse:
                yield from visit(child, when)
        else:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and when == "start":
                when = "call"
            for child in ast.iter_child_nodes(node):
                yield from visit(child, when)

    yield from visit(tree, "start")


def unit(name: str) -> str:
    """maelab.data.sources -> data; maelab itself -> __init__."""
    return name.split(".")[1] if "." in name else "__init__"


def loaded(name: str, known: dict[str, list[Import]]) -> dict[str, str]:
    """What importing module `name` loads: dotted name -> 'module:line' that asks for it, through all of maelab, whose
    modules' imports are `known`."""
    found: dict[str, str] = {}
    todo = [(name, "")]
    while todo:
        module, by = todo.pop()
        if module in found:
            continue
        found[module] = by
        parents = module.split(".")[:-1]
        todo += [(".".join(parents[:i]), by) for i in range(1, len(parents) + 1)]  # their __init__ runs first
        todo += [(i.name, f"{module}:{i.line}") for i in known.get(module, ()) if i.when == "start"]
    return found


def violations(files: Files) -> list[str]:
    """Everything in `files` that breaks a rule, one line each."""
    problems, known = [], {name: list(imports(name, files)) for name in files}
    for name in files:
        here = unit(name)
        if here not in LAYER:
            problems.append(
                f"{name} is not in the table: add {here!r} to LAYERS in {Path(__file__).name}, at its layer"
            )
            continue
        for target, when, line in known[name]:
            top, place = target.split(".")[0], f"{name}:{line}"
            if top == "maelab":
                there = unit(target)
                if there not in LAYER:
                    problems.append(f"{place} imports {target}, which is not in the table: add {there!r} to LAYERS")
                elif here != there and LAYER[there] >= LAYER[here] and (here, there) not in SIBLINGS:
                    problems.append(f"{place} imports {target}: {here} may import only what lies below it in LAYERS")
                elif here == "tasks" and target.startswith("maelab.tasks.") and not target.startswith(name):
                    problems.append(f"{place} imports {target}: a task imports no other")
                elif (here, there) == ("native", "model"):
                    problems.append(f"{place} imports {target}: native knows no modules of model, tensors only")
                elif here == "model" and there != "model":
                    problems.append(f"{place} imports {target}: model imports only torch and the standard library")
            elif here == "model" and top != "torch" and top not in sys.stdlib_module_names:
                problems.append(f"{place} imports {target}: model imports only torch and the standard library")
            if target.startswith(ENGINE) and name != "maelab.training.parallel":
                problems.append(f"{place} imports {target}: only maelab.training.parallel may")
            if here in NO_TORCH and top == "torch" and when != "types":
                problems.append(f"{place} imports {target}: {here} needs no torch")
            if here == "cli" and top in HEAVY and when == "start":
                problems.append(f"{place} imports {target}: import it inside the command, so that --help is fast")
    for name in files:
        forbidden = {"torch"} if unit(name) in NO_TORCH else HEAVY if unit(name) == "cli" else set()
        for module, by in loaded(name, known).items():
            if module in forbidden:
                problems.append(f"importing {name} loads {module}, by {by}: import it inside a function")
    return list(dict.fromkeys(problems))


def test_maelab_follows_the_rules():
    files = read(PACKAGE)
    assert {"maelab", "maelab.errors", "maelab.model.mae"} <= files.keys()
    problems = violations(files)
    assert not problems, "\n" + "\n".join(problems)


def tree(sources: dict[str, str]) -> Files:
    """A small maelab of these modules; a dot at the end of a name makes it a package's __init__."""
    files: Files = {"maelab": ("", True)}
    return files | {f"maelab.{name}".rstrip("."): (source, name.endswith(".")) for name, source in sources.items()}


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({"errors": "import maelab.config"}, "maelab.errors:1 imports maelab.config: errors may import only"),
        ({"config": "from maelab import recipes", "recipes": ""}, "config may import only what lies below"),
        ({"figures": "def f():\n    from maelab.inference import g"}, "maelab.figures:2 imports maelab.inference"),
        ({"data.images": "from ..training import loop", "training.loop": ""}, "imports maelab.training.loop"),
        ({"data.": "from .. import sweep", "sweep": ""}, "maelab.data:1 imports maelab.sweep"),
        ({"data": "from maelab import VisionTransformer"}, "maelab.data:1 imports maelab: data may"),
        ({"data": "import maelab\nmaelab.VisionTransformer"}, "maelab.data:1 imports maelab: data may"),
        ({"tasks.probe": "from maelab.cli import main"}, "tasks may import only"),
        ({"tasks.probe": "from maelab.tasks.pretrain import f", "tasks.pretrain": ""}, "a task imports no other"),
        ({"model.vit": "from maelab.errors import RunError"}, "model imports only torch"),
        ({"model.vit": "import numpy as np"}, "model imports only torch"),
        ({"model.vit": "from maelab import native"}, "model may import only what lies below"),
        ({"native.block": "from maelab.model.vit import Block"}, "native knows no modules of model"),
        ({"native": "def f():\n    from maelab.training import blocks", "training": ""}, "native may import only"),
        ({"data": "import torch.distributed as dist"}, "only maelab.training.parallel may"),
        ({"training.loop": "def f():\n    from torch.nn.parallel import X"}, "only maelab.training.parallel"),
        ({"report.page": "def f():\n    import torch"}, "report needs no torch"),
        ({"recipes": "import torch.nn"}, "recipes needs no torch"),
        ({"report.": "from maelab.figures import f", "figures": "import torch"}, "report loads torch, by"),
        ({"cli": "import numpy as np"}, "inside the command"),
        ({"cli": "try:\n    from PIL import Image\nexcept ImportError:\n    pass"}, "inside the command"),
        ({"cli": "from maelab.data.images import f", "data.images": "import numpy"}, "cli loads numpy"),
        ({"cli": "import maelab.data.x", "data.": "import torch", "data.x": ""}, "cli loads torch"),
        ({"helpers": ""}, "maelab.helpers is not in the table: add 'helpers' to LAYERS"),
        ({"sweep": "import maelab.helpers"}, "imports maelab.helpers, which is not in the table"),
    ],
)
def test_each_rule_can_fail(sources, message):
    assert any(message in problem for problem in violations(tree(sources))), violations(tree(sources))


@pytest.mark.parametrize(
    "sources",
    [
        {"tasks": "from maelab.training.loop import run\nfrom maelab import config", "config": "import json"},
        {"model.mae": "from maelab.model.vit import Block\nimport torch.nn\nimport math"},
        {"training.parallel": "import torch.distributed"},
        {"training": "import maelab\nfrom maelab import __version__\nprint(maelab.__file__)"},
        {"data.": "from maelab.data.sources import f\nfrom . import sources", "data.sources": "import numpy"},
        {"cli": "def f():\n    import torch\n    from maelab import sweep", "sweep": "import torch"},
        {"report": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"},
        {"cli": "import maelab.report", "report": "def f():\n    import matplotlib.pyplot"},
    ],
)
def test_what_the_rules_allow(sources):
    assert not violations(tree(sources))


def test_the_table_names_each_unit_once():
    assert len(LAYER) == sum(len(units) for units in LAYERS)
