"""A sweep, as a user runs it: every cell judged, a failing one survived, nothing done twice."""

import json

import pytest

GRID = ("--grid", "patch_size=5,7,14", "--grid", "mask_ratio=0.5")
SMALL = ("--limit", "100", "--epochs", "1", "--finetune-epochs", "1", "--val-fraction", "0.2", "--batch-size", "32")


@pytest.fixture(scope="module")
def swept(maelab, digits_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    line = ("sweep", "smoke", "--data", f"folder:{digits_folder}", *GRID, *SMALL, "--threads", "1")
    return folder, line, maelab.run(*line, cwd=folder)


def test_cells_are_judged_and_a_failing_one_is_reported(swept):
    folder, _, ended = swept
    assert ended.status == 1 and "some cells failed" in ended.err and "Traceback" not in ended.err
    result = json.loads((folder / "runs" / "sweep-smoke" / "sweep.json").read_text())
    bad, *good = result["cells"]
    assert bad["settings"] == {"patch_size": "5", "mask_ratio": "0.5"}
    assert "5 does not divide the image size 28x28" in bad["error"]
    for row in good:
        place = folder / "runs" / "sweep-smoke" / f"patch_size={row['settings']['patch_size']},mask_ratio=0.5"
        for task, field, judgement in (
            ("pretrain", "masked_mse", "masked_mse"),
            ("probe", "knn_accuracy", "knn_accuracy"),
            ("probe", "accuracy", "linear_accuracy"),
            ("finetune", "accuracy", "finetune_accuracy"),
        ):
            assert json.loads((place / task / "result.json").read_text())["val"][field] == row[judgement]
    assert result["best"] == max(good, key=lambda row: row["finetune_accuracy"])["settings"]
    assert result["lowest_masked_mse"] == min(good, key=lambda row: row["masked_mse"])["settings"]
    assert len(list((folder / "runs" / "sweep-smoke" / "figures").glob("*.png"))) == 4


def test_one_line_for_each_cell(swept):
    lines = [line for line in swept[2].err.splitlines() if line.startswith("cell ")]
    assert [line.split(":")[0] for line in lines] == [f"cell {n} of 3" for n in (1, 2, 3)]
    assert "5 does not divide" in lines[0] and "finetune_accuracy 0." in lines[1] and " left" in lines[1]
    assert "epoch 1/1" not in swept[2].err and "left" not in lines[2]


def test_what_is_finished_is_not_done_again(swept, maelab):
    folder, line, _ = swept
    results = sorted((folder / "runs").rglob("result.json"))
    before = {file: file.stat().st_mtime_ns for file in results}
    ended = maelab.run(*line, cwd=folder)
    assert len(results) == 6 and {file: file.stat().st_mtime_ns for file in results} == before
    assert "pretrain on" not in ended.err


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ((), "at least one --grid"),
        (("--grid", "patch_size"), "write field=value,value"),
        (("--grid", "patch_sise=4"), "did you mean --patch-size?"),
        (("--grid", "mask_ratio=0.5,2"), "--mask-ratio"),
    ],
)
def test_a_wrong_grid_is_refused_before_any_work(grid, message, maelab, tmp_path):
    ended = maelab.run("sweep", "smoke", *grid, cwd=tmp_path)
    assert ended.status == 2 and message in ended.error()
    assert not list(tmp_path.iterdir())


def test_a_value_that_is_a_path_does_not_lead_out_of_the_folder(maelab, digits_folder, tmp_path):
    (work := tmp_path / "a" / "b" / "c" / "d").mkdir(parents=True)
    (tmp_path / "digits").symlink_to(digits_folder)
    grid = ("--data", "folder:../../../../digits", "--grid", "data=folder:../../../../digits")
    ended = maelab.run("sweep", "smoke", *grid, *SMALL, "--threads", "1", "--out", "out", cwd=work)
    assert ended.status == 0, ended
    assert [path.name for path in work.iterdir()] == ["out"]
    assert (work / "out" / "data=folder:..%2F..%2F..%2F..%2Fdigits" / "finetune" / "result.json").is_file()
