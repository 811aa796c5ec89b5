"""`maelab map`: the table that embedding-atlas opens, its picture, and the viewer as a process."""

import io
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from maelab import figures
from maelab.config import ComputeOptions, DataOptions
from maelab.errors import RunError, UsageError
from maelab.tasks.features import features
from maelab.tasks.map import _places, map_images

RUN, CPU = "maelab:mnist-mae", ComputeOptions(threads=1)


@pytest.fixture(scope="module")
def folder(mnist_small, tmp_path_factory) -> Path:
    """30 digits in two folders, one that is no image, and one whose name is no UTF-8."""
    root = tmp_path_factory.mktemp("map") / "digits"
    for i, image in enumerate(mnist_small.train.images[:30]):
        place = root / ("even" if i % 2 == 0 else "odd\n")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(place / f"{i:02}.png")
    os.rename(root / "even" / "00.png", os.fsencode(root / "even") + b"/00\xff.png")
    (root / "even" / "broken.png").write_bytes(b"no image")
    return root


def test_the_table_has_paths_classes_images_and_features(folder, tmp_path):
    result = map_images(RUN, folder, out=tmp_path / "m.parquet", options=CPU)
    assert (result["images"], result["dim"], result["unreadable"]) == (30, 192, 1)
    rows = pyarrow.parquet.read_table(tmp_path / "m.parquet").to_pylist()
    features(RUN, [folder], out=tmp_path / "f.parquet", options=DataOptions(threads=1))
    expected = pyarrow.parquet.read_table(tmp_path / "f.parquet").to_pylist()
    assert [row["path"] for row in rows] == [row["path"] for row in expected]
    np.testing.assert_allclose([r["features"] for r in rows], [r["features"] for r in expected], atol=1e-5)
    for row in rows:
        name = Path(row["path"]).name
        assert row["class"] == ("even" if int(name[:2]) % 2 == 0 else "odd\n")
        if "xff" not in name:
            shown = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])).convert("L"), dtype=int)
            assert np.abs(shown - np.asarray(Image.open(row["path"]), dtype=int)).max() <= 1
    with Image.open(result["picture"]) as picture:
        assert result["picture"] == str(tmp_path / "m.parquet.png") and picture.size == (24 * 56, 24 * 56)
    assert result["open"] == f"embedding-atlas {tmp_path}/m.parquet --vector features --image image"


def test_places_are_the_ranks_along_the_two_widest_directions():
    torch.manual_seed(0)
    both = torch.randn(50, 2, dtype=torch.float64)
    both = torch.linalg.qr(both - both.mean(dim=0))[0]  # uncorrelated
    wide, second = 10 * both[:, 0], both[:, 1]
    turn = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0]
    points = torch.stack([wide, second, *torch.zeros(3, 50, dtype=torch.float64)], dim=1) @ turn + 7
    places = _places(points)
    for column, values in zip(places.T, (wide, second), strict=True):
        rank = values.argsort().argsort().numpy() / 49
        assert np.allclose(column, rank) or np.allclose(column, 1 - rank), "either way round"
    assert _places(torch.ones(1, 4)).tolist() == [[0.0, 0.0]]


def test_an_image_is_drawn_where_it_belongs(tmp_path):
    def png(colour: str) -> bytes:
        buffer = io.BytesIO()
        Image.new("RGB", (4, 4), colour).save(buffer, "PNG")
        return buffer.getvalue()

    pictures = [png(colour) for colour in ("red", "lime", "blue", "black")]
    places = np.array([[0.0, 0.0], [1.0, 1.0], [1.0, 0.0], [0.99, 0.99]])  # the last is behind the second
    figures.mosaic(tmp_path / "m.png", pictures, places, cells=2, side=10)
    with Image.open(tmp_path / "m.png") as picture:
        at = {
            name: picture.getpixel(where)
            for name, where in {"low": (5, 15), "high": (15, 5), "right": (15, 15)}.items()
        }
        assert at == {"low": (255, 0, 0), "high": (0, 255, 0), "right": (0, 0, 255)}
        assert picture.getpixel((5, 5)) == (255, 255, 255)


def test_the_viewer_is_started_if_it_is_there(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="--open needs embedding-atlas: pip install embedding-atlas"):
        map_images(RUN, folder, out=tmp_path / "m.parquet", open_=True, options=CPU)
    assert not (tmp_path / "m.parquet").exists()
    viewer = tmp_path / "embedding-atlas"
    viewer.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/asked\nexit $STATUS\n')
    viewer.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STATUS", "0")
    map_images(RUN, folder, out=Path("-m.parquet"), open_=True, options=CPU)
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked == [str(tmp_path / "-m.parquet"), "--vector", "features", "--image", "image"]
    monkeypatch.setenv("STATUS", "3")
    with pytest.raises(RunError, match="embedding-atlas ended with status 3"):
        map_images(RUN, folder, out=tmp_path / "m.parquet", open_=True, options=CPU)
    with pytest.raises(UsageError, match=r"give a name that ends in \.parquet"):
        map_images(RUN, folder, out=tmp_path / "m.csv", options=CPU)
