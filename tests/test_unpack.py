"""Archives and tables of images are read like the folder that they hold."""

import io
import json
import os
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from maelab.data import Dataset, load
from maelab.data.sources import cache_dir
from maelab.data.unpack import is_archive, unpacked
from maelab.errors import RunError, UsageError

SHADE = {"cat": 40, "dog": 200}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MAELAB_DATA", str(tmp_path / "cache"))
    return tmp_path / "cache"


def png(shade: int, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("L", (8, 8), shade).save(file, form)
    return file.getvalue()


def pictures(n: int = 20, start: int = 0) -> list[tuple[str, bytes]]:
    """(class, content) of different images; the shade tells the class."""
    return [(name, png(SHADE[name] + start + i)) for i in range(n // 2) for name in SHADE]


def members(parts: dict[str, int] | None = None) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for part, start in (parts or {"": 0}).items():
        for i, (name, content) in enumerate(pictures(start=start)):
            found[f"{part}{'/' if part else ''}{name}/{i}.png"] = content
    return found


def zipped(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def tarred(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def right(data: Dataset, names: tuple[str, ...] = ("cat", "dog")) -> bool:
    assert data.class_names == names, data.class_names
    for part in (data.train, data.val, data.test):
        if part is None:
            continue
        assert part.labels is not None
        shades = part.images[:].float().mean(dim=(1, 2, 3)).tolist()
        if any((shade < 120) != (label == 0) for shade, label in zip(shades, part.labels.tolist(), strict=True)):
            return False
    return True


PACKERS = {"x.zip": zipped, "x.tar": tarred, "x.tar.gz": tarred, "x.TGZ": tarred}


@pytest.mark.parametrize("name", PACKERS)
@pytest.mark.parametrize("top", ["", "dataset", "a/b"])
def test_an_archive_of_class_folders(name: str, top: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {f"{top}{'/' if top else ''}{path}": content for path, content in members().items()}
    litter = {"__MACOSX/cat/._0.png": b"x", "cat/.DS_Store": b"x", "cat/Thumbs.db": b"x", "readme.txt": b"hello"}
    if name == "x.TGZ":
        name = "x.tgz"
    path = PACKERS.get(name, tarred)(tmp_path / name, files | litter)
    assert is_archive(path)
    data = load(f"folder:{path}")
    assert right(data) and data.test is not None and len(data.train) + len(data.test) == 20
    said = capsys.readouterr().err
    assert f"maelab: unpacking {path} once, into {cache_dir() / 'unpacked'}" in said and "unpacked 20 images" in said
    assert "1 .txt" in said


def test_it_is_unpacked_once_and_again_when_it_changes(tmp_path: Path, cache: Path) -> None:
    path = zipped(tmp_path / "x.zip", members())
    one = unpacked(path)
    stamp = (one / "cat" / "0.png").stat().st_mtime_ns
    assert unpacked(path) == one and (one / "cat" / "0.png").stat().st_mtime_ns == stamp
    zipped(path, members() | {"cat/more.png": png(1)})
    os.utime(path, ns=(1, 1))
    other = unpacked(path)
    assert other != one and not one.exists() and (other / "cat" / "more.png").exists()
    (cache / "unpacked" / "other").mkdir()
    (cache / "unpacked" / "other" / ".maelab.json").write_text("{")  # damaged, and none of this archive's business
    os.utime(path, ns=(2, 2))
    assert unpacked(path) != other and not other.exists()
    assert len(list((cache / "unpacked").glob("*/.maelab.json"))) == 2 and not list(cache.rglob("*.part"))


def test_parts_inside_an_archive_and_parts_that_are_shards(tmp_path: Path) -> None:
    data = load(f"folder:{zipped(tmp_path / 'x.zip', members({'train': 0, 'valid': 12, 'test': 24}))}")
    assert right(data) and data.val is not None and data.test is not None and not data.held_out
    for part, start in (("train-000", 0), ("train-001", 50), ("test-000", 24)):
        shard: dict[str, bytes] = {}
        for i, (name, content) in enumerate(pictures(start=start)):
            shard |= {f"{i:06d}.png": content, f"{i:06d}.cls": name.encode(), f"{i:06d}.json": b"{}"}
        (tmp_path / "shards").mkdir(exist_ok=True)
        tarred(tmp_path / "shards" / f"{part}.tar", shard)
    data = load(f"folder:{tmp_path / 'shards'}")
    assert data.class_names == ("cat", "dog") and data.test is not None and not data.held_out
    assert (len(data.train), len(data.test)) == (40, 20)


def test_archives_of_loose_images_are_a_class_each(tmp_path: Path) -> None:
    (tmp_path / "classes").mkdir()
    for name in SHADE:
        own = {f"{i}.png": content for i, (label, content) in enumerate(pictures()) if label == name}
        tarred(tmp_path / "classes" / f"{name}.tar", own)
    assert right(load(f"folder:{tmp_path / 'classes'}"))


FEATURES = {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
INFO = {b"huggingface": json.dumps({"info": {"features": FEATURES}}).encode()}


def table(rows: list[tuple[str, bytes]], kind: str) -> pa.Table:
    numbers = [0 if name == "cat" else 1 for name, _ in rows]
    structs = [{"bytes": content, "path": None} for _, content in rows]
    if kind == "text":
        return pa.table({"id": [1.0] * len(rows), "photo": [c for _, c in rows], "class": [name for name, _ in rows]})
    made = pa.table({"image": structs, "label": numbers})
    return made.replace_schema_metadata(INFO) if kind == "named" else made


@pytest.mark.parametrize(("kind", "names"), [("named", ("cat", "dog")), ("text", ("cat", "dog")), ("bare", ("0", "1"))])
def test_parquet(kind: str, names: tuple[str, ...], tmp_path: Path) -> None:
    pq.write_table(table(pictures(), kind), tmp_path / "photos.parquet", row_group_size=7)
    data = load(f"folder:{tmp_path / 'photos.parquet'}")
    assert right(data, names) and data.test is not None and len(data.train) + len(data.test) == 20
    (tmp_path / "hub" / "data").mkdir(parents=True)
    for name, start in (("train-00000-of-00002", 0), ("train-00001-of-00002", 50), ("test-00000-of-00001", 24)):
        pq.write_table(table(pictures(start=start), kind), tmp_path / "hub" / "data" / f"{name}.parquet")
    data = load(f"folder:{tmp_path / 'hub'}")
    assert data.class_names == names and data.test is not None and (len(data.train), len(data.test)) == (40, 20)


def test_a_folder_that_datasets_saved(tmp_path: Path) -> None:
    for split, start in (("train", 0), ("test", 24)):
        folder = tmp_path / "saved" / split
        folder.mkdir(parents=True)
        made = table(pictures(start=start), "named")
        with (
            pa.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as out,
            pa.ipc.new_stream(out, made.schema) as to,
        ):
            to.write_table(made)
        (folder / "state.json").write_text("{}")
        (folder / "dataset_info.json").write_text(json.dumps({"features": FEATURES}))
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    for path, tested in ((tmp_path / "saved", 20), (tmp_path / "saved" / "train", None)):
        data = load(f"folder:{path}")
        assert right(data) and data.test is not None and (tested is None) == data.held_out
        assert tested in (None, len(data.test))


def test_rows_without_a_label_or_an_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"bytes": content, "path": "x"} for _, content in pictures()]
    labels = [0 if name == "cat" else 1 for name, _ in pictures()]
    rows += [{"bytes": png(7), "path": None}, {"bytes": None, "path": "/etc/x.png"}, {"bytes": b"what?", "path": None}]
    made = pa.table({"image": rows, "label": [*labels, -1, 0, 1]}).replace_schema_metadata(INFO)
    pq.write_table(made, tmp_path / "x.parquet")
    data = load(f"folder:{tmp_path / 'x.parquet'}")
    assert right(data) and data.unlabelled is not None and len(data.unlabelled) == 1
    said = capsys.readouterr().err
    assert "1 rows without the bytes of an image" in said and "1 rows of an unknown format" in said


def test_names_of_classes_are_no_paths(tmp_path: Path) -> None:
    odd = ["../../evil", "/etc", "..", ".hidden", "a/b", "a_b", "train", "x" * 400, "tab\there", "caf\u00e9"]
    odd += ["Cat", "cat", 'a<b>:"|?*']
    rows = [{"image": png(k * 18 + i), "label": name} for k, name in enumerate(odd) for i in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    root = unpacked(tmp_path / "x.parquet")
    folders = sorted(path.name for path in root.iterdir() if path.is_dir())
    assert len({name.casefold() for name in folders}) == len(odd), "where Cat is cat too"
    assert not any(set(name) & set('<>:"|?*') for name in folders)
    assert len(folders) == len(odd) and all(len(list((root / name).iterdir())) == 3 for name in folders)
    assert len(load(f"folder:{tmp_path / 'x.parquet'}").class_names) == len(odd)
    assert not (tmp_path / "evil").exists()


# ------------------------------------------------------------------------------------------------------------- hostile


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_nothing_is_written_outside(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = {
        "../evil.png": png(1),
        "/abs.png": png(1),
        "cat/../../up.png": png(1),
        "C:\\win.png": png(1),
        "..\\w.png": png(1),
    }
    for path in (zipped(tmp_path / "x.zip", members() | bad), tarred(tmp_path / "x.tar", members() | bad)):
        before = everything(tmp_path) - everything(cache)
        assert len([p for p in unpacked(path).rglob("*.png")]) == 20
        outside = {name for name in everything(tmp_path) - before if not name.startswith("cache")}
        assert not outside and "5 paths that lead outside" in capsys.readouterr().err


def test_links_and_devices_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tarred(tmp_path / "x.tar", members())
    with tarfile.open(path, "a") as archive:
        for name, kind in (
            ("cat/s.png", tarfile.SYMTYPE),
            ("cat/h.png", tarfile.LNKTYPE),
            ("cat/d.png", tarfile.CHRTYPE),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
    assert len(list(unpacked(path).rglob("*.png"))) == 20 and "3 links and devices" in capsys.readouterr().err
    path = zipped(tmp_path / "x.zip", members())
    with zipfile.ZipFile(path, "a") as archive:
        info = zipfile.ZipInfo("cat/s.png")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc/passwd")
    assert len(list(unpacked(path).rglob("*.png"))) == 20 and "1 links" in capsys.readouterr().err


def test_a_bomb_is_stopped_and_leaves_nothing(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maelab.data.unpack._ALLOWED", 2**20)
    path = zipped(tmp_path / "x.zip", {"cat/0.bmp": bytes(2**26)})
    with pytest.raises(RunError, match="far more than it has bytes"):
        unpacked(path)
    assert not list(cache.rglob("*.bmp")) and not list(cache.rglob("*.part"))


def damaged(name: str, path: Path) -> None:
    whole = zipped(path.with_name("w.zip"), members()).read_bytes()
    if name == "encrypted.zip":
        data = bytearray(whole)
        at = data.index(b"PK\x01\x02")
        while at >= 0:  # the flag of each entry of the directory
            data[at + 8] |= 1
            at = data.find(b"PK\x01\x02", at + 4)
        path.write_bytes(bytes(data))
    elif name == "cut.zip":
        path.write_bytes(whole[: len(whole) // 2])
    elif name == "cut.tar.gz":
        path.write_bytes(tarred(path.with_name("w.tar.gz"), members()).read_bytes()[:500])
    elif name == "none.parquet":
        path.write_bytes(b"PAR1" + bytes(100) + b"PAR1")
    elif name == "text.zip":
        zipped(path, {"a.txt": b"x", "b.doc": b"y"})
    else:
        path.write_bytes(b"")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("encrypted.zip", "is encrypted"),
        ("cut.zip", "is damaged, or no .zip file"),
        ("cut.tar.gz", "is damaged, or no .gz file"),
        ("none.parquet", "is damaged, or no .parquet file"),
        ("empty.zip", "is damaged"),
        ("empty.tar", "is damaged|is an image"),
        ("text.zip", "nothing in .* is an image; left out: 1 .txt, 1 .doc"),
    ],
)
def test_what_is_damaged_is_one_line(name: str, message: str, tmp_path: Path, cache: Path) -> None:
    damaged(name, tmp_path / name)
    with pytest.raises((UsageError, RunError), match=message) as caught:
        load(f"folder:{tmp_path / name}")
    assert "\n" not in str(caught.value) and not [path for path in cache.rglob("*.png")]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"a": [1], "b": [2]}, "has no column of images"),
        ({"image": [png(1)], "fine": [1], "coarse": [2]}, "which column of .* is the class"),
    ],
)
def test_tables_that_do_not_say_what_is_what(columns: dict[str, Any], message: str, tmp_path: Path) -> None:
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    with pytest.raises(UsageError, match=message):
        load(f"folder:{tmp_path / 'x.parquet'}")


def test_a_folder_of_images_is_no_archive(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "0.png").write_bytes(png(1))
    (tmp_path / "0.png").write_bytes(png(1))
    zipped(tmp_path / "x.zip", members())
    tarred(tmp_path / "x.tar", members())
    (tmp_path / "own" / "cat").mkdir(parents=True)
    (tmp_path / "own" / "cat" / "0.png").write_bytes(png(1))
    tarred(tmp_path / "own" / "backup.tar", members())
    assert not is_archive(tmp_path / "own"), "an archive beside classes is not what is meant"
    assert not is_archive(tmp_path) and not is_archive(tmp_path / "cat") and not is_archive(tmp_path / "nowhere")
