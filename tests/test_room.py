"""Only maelab/runs knows what the files of a run folder are called."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMES = {"config.json", "env.json", "metrics.jsonl", "result.json", "training.pt", "commit.json", "checkpoints"}
NAMES |= {"sweep.json"}  # which is a sweep's own
EXCEPTIONS = {  # (file, name): config.json of other libraries' models
    ("maelab/export/__init__.py", "config.json"),
    ("maelab/foreign/__init__.py", "config.json"),
    ("maelab/foreign/hugging_face.py", "config.json"),
}


def named(source: str) -> Iterator[tuple[int, str]]:
    """(line, name) wherever code uses such a name: it is a part of a path, which a text for people is not.

    A path is a string, or a piece of an f-string, without white space; its parts lie between slashes. Strings that are
    statements are docstrings.
    """
    tree = ast.parse(source)
    said = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in said:
            parts = [] if any(map(str.isspace, node.value)) else node.value.split("/")
            yield from ((node.lineno, part) for part in parts if part in NAMES)


def test_no_other_code_names_the_files_of_a_run_folder():
    files = [file for place in ("maelab", "examples", "results", "bench") for file in (ROOT / place).rglob("*.py")]
    assert len(files) > 60
    found = {
        (str(file.relative_to(ROOT)), line, name)
        for file in files
        if ROOT / "maelab" / "runs" not in file.parents
        for line, name in named(file.read_text())
    }
    wrong = [f"{file}:{line} names {name}" for file, line, name in found if (file, name) not in EXCEPTIONS]
    assert not wrong, "\n".join(sorted(wrong))
    assert {(file, name) for file, _, name in found} == EXCEPTIONS  # none that nothing needs


@pytest.mark.parametrize(
    "code",
    ['read(folder / "config.json")', 'f"{run}/checkpoints/best"', 'X = ("metrics.jsonl",)', 'open(r"a/result.json")'],
)
def test_the_rule_finds_a_name(code):
    assert list(named(code))


@pytest.mark.parametrize(
    "code",
    [
        '"""reads config.json"""',
        'raise E("its config.json says so")',
        "# config.json",
        "checkpoints(run)",
        'x = "a.json"',
    ],
)
def test_the_rule_allows(code):
    assert not list(named(code))
