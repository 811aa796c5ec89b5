"""Labels in a table, and groups of images that stay together."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import classes, save

from maelab.config import DataConfig, Reading
from maelab.data import Dataset, load, training_sets
from maelab.data.folder import scan
from maelab.data.layout import list_files
from maelab.errors import UsageError

SHADE = {"cat": 40, "dog": 200, "": 120}


def photos(root: Path, labels: list[str], start: int = 0) -> list[str]:
    """Images whose shade tells their class; their names do not."""
    names = [f"p{i:03d}.png" for i in range(len(labels))]
    for i, (name, label) in enumerate(zip(names, labels, strict=True)):
        save(root / name, SHADE[label] + (start + i) % 50)
    return names


def write_csv(path: Path, rows: list[tuple[str, ...]], delimiter: str = ",") -> Path:
    path.write_text("".join(delimiter.join(row) + "\n" for row in rows))
    return path


def right(data: Dataset) -> bool:
    """Whether every image has the label of its shade."""
    parts = [part for part in (data.train, data.val, data.test) if part is not None]
    return all(
        (shade < 100) == (data.class_names[label] == "cat")
        for part in parts
        if part.labels is not None
        for shade, label in zip(part.images[:].float().mean(dim=(1, 2, 3)).tolist(), part.labels.tolist(), strict=True)
    )


LABELS = ["cat", "dog"] * 20


@pytest.mark.parametrize("name", ["labels.csv", "metadata.csv", "metadata.jsonl"])
def test_a_table_that_lies_there_gives_the_labels(name: str, tmp_path: Path) -> None:
    names = photos(tmp_path, LABELS)
    if name.endswith("jsonl"):
        rows = [json.dumps({"file_name": file, "label": label}) for file, label in zip(names, LABELS, strict=True)]
        (tmp_path / name).write_text("\n".join(rows))
    else:
        write_csv(tmp_path / name, [("file_name", "label"), *zip(names, LABELS, strict=True)])
    data = load(f"folder:{tmp_path}")
    assert data.class_names == ("cat", "dog") and right(data) and data.test is not None and data.held_out
    assert len(data.train) + len(data.test) == 40
    (said,) = [line for line in scan(f"folder:{tmp_path}").lines() if name in line]
    assert "column 'label'" in said and "40 of 40 images" in said
    assert not any("ignored" in line for line in scan(f"folder:{tmp_path}").lines()), "the table is used"


@pytest.mark.parametrize(
    ("file", "label", "delimiter", "named"),
    [
        ("filename", "class", ";", "p{:03d}.png"),
        ("Image", "Category", "\t", "images/p{:03d}.png"),
        ("id", "diagnosis", ",", "p{:03d}"),
        ("path", "target", ",", "./images\\p{:03d}.png"),
    ],
)
def test_tables_as_people_write_them(file: str, label: str, delimiter: str, named: str, tmp_path: Path) -> None:
    photos(tmp_path / "images", LABELS)
    rows = [(named.format(i), label_) for i, label_ in enumerate(LABELS)]
    write_csv(tmp_path / "mine.csv", [(file, label), *rows], delimiter)
    for asked in ("mine.csv", str(tmp_path / "mine.csv"), f"{tmp_path / 'mine.csv'}:{label}"):
        assert right(load(f"folder:{tmp_path}", reading=Reading(labels=asked)))


def test_a_table_may_lie_elsewhere_and_say_more(tmp_path: Path) -> None:
    photos(tmp_path / "photos", LABELS)
    rows = [(f"p{i:03d}.png", "5", label) for i, label in enumerate(LABELS)]
    table = write_csv(tmp_path / "sheet.csv", [("name", "age", "kind"), *rows])
    with pytest.raises(UsageError, match=r"which column of .* is the class\? .*'name', 'age', 'kind'"):
        load(f"folder:{tmp_path / 'photos'}", reading=Reading(labels=str(table)))
    assert right(load(f"folder:{tmp_path / 'photos'}", reading=Reading(labels=f"{table}:kind")))


def test_the_convention_of_datasets_with_a_table_in_each_part(tmp_path: Path) -> None:
    for part, start, n in (("train", 0, 20), ("validation", 20, 6), ("test", 26, 8)):
        names = photos(tmp_path / part, LABELS[:n], start)  # the same names in each
        write_csv(tmp_path / part / "metadata.csv", [("file_name", "label"), *zip(names, LABELS, strict=False)])
    data = load(f"folder:{tmp_path}", img_size=(8, 8))
    assert data.val is not None and data.test is not None and not data.held_out and right(data)
    assert (len(data.test), len(data.val), len(data.train)) == (8, 6, 20)


def test_a_column_says_what_an_image_is_for(tmp_path: Path) -> None:
    names = photos(tmp_path, LABELS[:20])
    for i, name in enumerate(names):
        save(tmp_path / name, SHADE[LABELS[i]] + i)
    split = ["train", "Train", "valid", "TEST"] * 5
    write_csv(tmp_path / "labels.csv", [("file", "label", "split"), *zip(names, LABELS, split, strict=False)])
    data = load(f"folder:{tmp_path}")
    assert data.val is not None and data.test is not None
    assert (len(data.train), len(data.val), len(data.test)) == (10, 5, 5) and right(data)
    write_csv(tmp_path / "labels.csv", [("file", "label", "split"), *zip(names, LABELS, ["fold1"] * 20, strict=False)])
    with pytest.raises(UsageError, match="'fold1'; it must be train, val or test"):
        load(f"folder:{tmp_path}")


def test_images_without_a_label_are_unlabelled_and_rows_without_an_image_counted(tmp_path: Path) -> None:
    names = photos(tmp_path, [*LABELS, "", "", ""])
    rows = [*zip(names[:41], [*LABELS, ""], strict=True), ("gone.png", "cat"), ("lost.png", "dog")]
    write_csv(tmp_path / "labels.csv", [("file", "label"), *rows])
    data = load(f"folder:{tmp_path}")
    assert data.unlabelled is not None and len(data.unlabelled) == 3 and right(data)
    (said,) = [line for line in scan(f"folder:{tmp_path}").lines() if "labels.csv" in line]
    assert "41 of 43 images" in said and "3 images have none" in said and "2 rows name no image here" in said
    assert "'gone.png'" in said


def test_numbers_are_classes_in_the_order_of_their_size(tmp_path: Path) -> None:
    names = photos(tmp_path, LABELS[:24])
    write_csv(tmp_path / "labels.csv", [("id", "label"), *((n, str(i % 12)) for i, n in enumerate(names))])
    assert load(f"folder:{tmp_path}").class_names == tuple(map(str, range(12)))


def test_folders_that_are_classes_go_before_a_table_that_happens_to_lie_there(tmp_path: Path) -> None:
    classes(tmp_path, "ab", 10)
    write_csv(tmp_path / "labels.csv", [("file", "label"), *((f"a/{i:02d}.png", "xy"[i % 2]) for i in range(10))])
    assert load(f"folder:{tmp_path}").class_names == ("a", "b")
    assert any("--labels labels.csv uses it" in line for line in scan(f"folder:{tmp_path}").lines())
    assert load(f"folder:{tmp_path}", reading=Reading(labels="labels.csv")).class_names == ("x", "y")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no rows"),
        (b"file,label\n", "holds no rows"),
        (b"file\np000.png\n", "two columns or more"),
        (b"file,label,label\na,b,c\n", "each once"),
        (b"file,label\np000.png\n", "line 2 of .* has 1 cells, and the first one 2"),
        (b"file,label\np000.png,cat\np000.png,dog\n", "'p000.png' twice"),
        (b"file,label\n\xff\xfe.png,cat\n", "no UTF-8 text"),
        (b'file,label\n"p000.png,cat\n', "no CSV file"),
        (b"file,label\np000.png,cat\np001.png,cat\n", "a single class, 'cat'"),
        (b"file,label\nq.png,cat\nr.png,dog\n", "gives no image"),
        (b"file,label\nsame.png,cat\np000.png,dog\n", "there are 2 such images"),
    ],
)
def test_a_table_that_cannot_be_meant_is_refused_in_one_line(content: bytes, message: str, tmp_path: Path) -> None:
    photos(tmp_path, LABELS[:6])
    for place in "xy":
        save(tmp_path / place / "same.png")
    (tmp_path / "mine.csv").write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        load(f"folder:{tmp_path}", reading=Reading(labels="mine.csv"))
    assert "\n" not in str(caught.value)


def test_json_lines_that_are_none(tmp_path: Path) -> None:
    photos(tmp_path, LABELS[:6])
    for content in ('{"file_name": "p000.png", "label": "cat"}\n[1]\n', "{", '{"a": ' + "[" * 100_000):
        (tmp_path / "mine.jsonl").write_text(content)
        with pytest.raises(UsageError, match="is no JSON object"):
            load(f"folder:{tmp_path}", reading=Reading(labels="mine.jsonl"))
    with pytest.raises(UsageError, match="there is no such file"):
        load(f"folder:{tmp_path}", reading=Reading(labels="nowhere.csv"))


# -------------------------------------------------------------------------------------------------------------- groups


def videos(root: Path, n: int = 16, frames: int = 6) -> Path:
    """Frames of videos, two classes; each frame another image."""
    for video in range(n):
        for frame in range(frames):
            save(root / ("cat", "dog")[video % 2] / f"video_{video:02d}_{frame}.png", (video * frames + frame) % 256)
    return root


def sides(data: Dataset) -> dict[int, set[str]]:
    """Group of six shades -> the parts that its images are in."""
    train, val = training_sets(data, DataConfig(data=data.name, val_fraction=0.2))
    found: dict[int, set[str]] = {}
    for name, part in (("train", train), ("val", val), ("test", data.test)):
        assert part is not None
        for shade in part.images[:].flatten(1)[:, 0].tolist():
            found.setdefault(shade // 6, set()).add(name)
    return found


@pytest.mark.parametrize("asked", [r"video_\d+", r"(video_\d+)_\d", r"video_(\d+)"])
def test_a_group_stays_on_one_side_of_every_split(asked: str, tmp_path: Path) -> None:
    root = videos(tmp_path / "frames")
    data = load(f"folder:{root}", reading=Reading(group=asked))
    found = sides(data)
    assert len(found) == 16 and all(len(parts) == 1 for parts in found.values())
    assert {next(iter(parts)) for parts in found.values()} == {"train", "val", "test"}
    apart = sides(load(f"folder:{root}"))
    assert any(len(parts) > 1 for parts in apart.values()), "without groups they are torn apart"
    (said,) = [line for line in scan(f"folder:{root}", Reading(group=asked)).lines() if "groups" in line]
    assert "16 groups by --group, of 6 to 6 images" in said


def test_a_column_may_be_the_group(tmp_path: Path) -> None:
    rows = []
    for i in range(96):
        save(tmp_path / f"{i:02d}.png", i)
        rows.append((f"{i:02d}.png", ("cat", "dog")[i // 6 % 2], f"patient {i // 6}"))
    write_csv(tmp_path / "labels.csv", [("file", "label", "patient"), *rows])
    data = load(f"folder:{tmp_path}", reading=Reading(group="patient"))
    found = sides(data)
    assert len(found) == 16 and all(len(parts) == 1 for parts in found.values())


def test_groups_that_span_classes_are_held_out_whole(tmp_path: Path) -> None:
    for i in range(60):
        save(tmp_path / ("cat", "dog")[i % 2] / f"scene{i // 6}_{i}.png", i)
    data = load(f"folder:{tmp_path}", reading=Reading(group=r"scene\d+"))
    found = sides(data)
    assert data.test is not None and len(data.test) and all(len(parts) == 1 for parts in found.values())


def test_images_of_a_group_that_the_test_folder_has_are_left_out_of_training(tmp_path: Path, capsys: Any) -> None:
    for i in range(40):
        save(tmp_path / "train" / "ab"[i % 2] / f"v{i // 4}_{i}.png", i)
    for i in range(4):
        save(tmp_path / "test" / "ab"[i % 2] / f"v{i % 2}_{100 + i}.png", 100 + i)
    data = load(f"folder:{tmp_path}", reading=Reading(group=r"v\d+"))
    assert data.test is not None and (len(data.test), len(data.train)) == (4, 32)
    assert "left 8 images out of training, whose groups have test images" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("asked", "message"),
    [("(", "neither a column nor a regular expression"), ("nothing", "finds 0 groups"), (r"^.*$", "of 1 at most")],
)
def test_groups_that_are_none(asked: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        load(f"folder:{videos(tmp_path)}", reading=Reading(group=asked))


def test_a_growing_folder_keeps_the_sides_of_its_groups(tmp_path: Path) -> None:
    root, reading = videos(tmp_path / "frames"), Reading(group=r"video_\d+")
    before = load(f"folder:{root}", reading=reading)
    save(root / "cat" / "video_90_0.png", 250)
    save(root / "cat" / "video_90_1.png", 251)
    after = load(f"folder:{root}", reading=reading)
    assert before.test is not None and after.test is not None
    assert set(before.test.keys.tolist()) <= set(after.test.keys.tolist())  # type: ignore[union-attr]
    assert not torch.isin(after.train.keys, before.test.keys).any()  # type: ignore[arg-type]
    assert len(list_files(root).files) == 98
