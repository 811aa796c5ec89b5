"""The public API: every name is there and explained, and naming it is what loads it."""

import inspect
import subprocess
import sys

import pytest

import maelab


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", maelab.__all__)
def test_every_public_name_resolves_and_has_a_docstring(name):
    value = getattr(maelab, name)
    text = inspect.getdoc(value)
    assert text and len(text) > 20 and not text.startswith(f"{value.__name__}("), name  # a dataclass's own signature
    if inspect.isfunction(value):
        told = text.split("Args:")[-1]
        for parameter in inspect.signature(value).parameters:
            assert f"{parameter}" in told, f"{name} does not explain {parameter}"


def test_names_are_sorted_unique_and_lead_home():
    assert list(maelab.__all__) == sorted(set(maelab.__all__))
    from maelab.tasks.pretrain import pretrain

    assert maelab.pretrain is pretrain
    assert maelab.__version__ and maelab.__doc__


def test_what_type_checkers_see_is_what_there_is():
    import ast

    tree = ast.parse(inspect.getsource(maelab))
    (block,) = (n for n in tree.body if isinstance(n, ast.If))
    seen = {alias.asname or alias.name for n in block.body if isinstance(n, ast.ImportFrom) for alias in n.names}
    assert seen == set(maelab.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'maelab' has no attribute 'pretrian'"):
        maelab.pretrian  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(ImportError):
        from maelab import pretrian  # type: ignore[attr-defined]  # noqa: F401


def test_importing_maelab_loads_nothing_heavy():
    heavy = "torch numpy matplotlib PIL argparse rich tensorboard safetensors"
    code = f"import sys, maelab, maelab.recipes, maelab.config; print(*(set('{heavy}'.split()) & set(sys.modules)))"
    assert run(code) == ""
    assert run("import sys, maelab; maelab.PretrainConfig; print('torch' in sys.modules)") == "False"
