"""The benchmark's tables: whoever is too slow is bounded, nobody waits, and the ratios are of the rates beside them."""

import json
from dataclasses import replace

import pytest

from maelab import bench, native, recipes


@pytest.mark.slow
def test_who_is_too_slow_is_bounded_and_ends(monkeypatch, tmp_path, capsys):
    """As the peer under autocast is where no unit multiplies bfloat16."""
    monkeypatch.setattr(bench, "STEP_SECONDS", 1e-6)
    steps = bench._steps
    monkeypatch.setattr(bench, "_steps", lambda *a: {who: steps(*a)[who] for who in ("maelab", "floor")})
    result = bench.bench(["mae-mnist"], repeats=1, threads=1, out=tmp_path)
    (case,) = result["cases"]
    assert case["turns"] == 0 and case["spread"] == {}
    assert case["maelab_images_per_s"] is None and case["ratio_fp32"] is None
    assert case["limits"] == {"maelab": 256e6, "floor": 256e6}
    (dated,) = tmp_path.glob("*.json")
    assert json.loads(dated.read_text())["cases"] == [case]


def test_a_case_is_measured_in_turns(monkeypatch, capsys):
    monkeypatch.setattr(bench, "TURN_SECONDS", 0.01)
    monkeypatch.setattr(bench, "SERVING", {"serve-mnist-1": 1})
    monkeypatch.setattr(bench, "SERVERS", {"torch": "torch fp32", "native": "torch bf16"})
    result = bench.measure("serve-mnist-1", 2, "cpu")
    assert result["turns"] == 2 and result["limits"] == {}
    for who in ("torch", "native"):
        least, most = result["spread"][who]
        assert 1 / most * 0.9 <= result[f"{who}_images_per_s"] <= 1 / least * 1.1


@pytest.mark.skipif(not native.available(), reason=f"no native kernels: {native.reason()}")
def test_the_peak_is_one_that_products_stay_below():
    peak = native.peak_flops()
    assert peak is not None and 1e9 < peak < 1e13


def test_a_cell_is_a_figure_or_a_bound():
    case = {"a_images_per_s": 12.34, "b_images_per_s": None, "ratio": None, "limits": {"b": 17.1}}
    cells = [bench._cell(case, key) for key in ("a_images_per_s", "b_images_per_s", "ratio")]
    assert cells == [
        "12.34",
        "under 17.1",
        "-",
    ]


@pytest.mark.slow
def test_the_quickstart_is_timed_to_its_goal(monkeypatch, tmp_path, digits_folder, capsys):
    def small(config):
        return lambda: replace(config, data=f"folder:{digits_folder}", limit=64, batch_size=16, epochs=2)

    monkeypatch.setattr(recipes, "pretrain_quickstart", small(recipes.pretrain_smoke()))
    monkeypatch.setattr(recipes, "finetune_quickstart", small(recipes.finetune_smoke()))
    for goal, reached in ((0.0, True), (1.1, False)):
        monkeypatch.setattr(bench, "GOAL", goal)
        (case,) = bench.bench(["quickstart"], threads=1)["cases"]
        assert case["pretraining_s"] > 0 and 0 <= case["test_accuracy"] <= 1
        if reached:  # after the first epoch of two
            assert case["pretraining_s"] <= case["seconds_to_goal"] <= case["pretraining_s"] + case["finetuning_s"]
        else:
            assert case["seconds_to_goal"] is None
    assert "quickstart" in capsys.readouterr().err
