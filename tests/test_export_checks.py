"""What an export checks before it writes, what it measures on which images, and how it says an image is prepared."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_sets import MNIST, publish_small_sets
from test_export import checkpoint

from maelab import export as module
from maelab.config import DataConfig
from maelab.data import ImageSet, load, training_sets
from maelab.data.batches import scale
from maelab.errors import UsageError
from maelab.export import _cost_of_int8, _images_at_hand, _preprocessing, export
from maelab.model import VisionTransformer
from maelab.runs import write_json
from maelab.training.checkpoint import ModelSpec, read_spec

NAMES = tuple("0123456789")


def linear(weight: np.ndarray) -> bytes:
    """An ONNX model: images (N, 1, 4, 4) -> their 16 pixels times the weight (16, classes)."""
    from onnx import TensorProto, helper, numpy_helper

    nodes = [helper.make_node("Flatten", ["images"], ["flat"]), helper.make_node("MatMul", ["flat", "w"], ["logits"])]
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 1, 4, 4])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", weight.shape[1]])
    graph = helper.make_graph(nodes, "linear", [images], [logits], [numpy_helper.from_array(weight, "w")])
    opset = helper.make_opsetid("", module.OPSET)
    return helper.make_model(graph, opset_imports=[opset], ir_version=9).SerializeToString()


def test_the_cost_of_8_bits_equals_a_loop_over_images():
    """300 images, more than a batch; the two models agree on some and are right on different ones."""
    rng = np.random.default_rng(0)
    before = rng.standard_normal((16, 3)).astype(np.float32)
    after = (before + 0.7 * rng.standard_normal((16, 3)) + 0.1).astype(np.float32)
    pixels = torch.from_numpy(rng.integers(0, 256, (300, 1, 4, 4), dtype=np.uint8))
    flat = scale(pixels).flatten(1).numpy()
    labels = (flat @ before).argmax(1) * (rng.random(300) < 0.8)  # what the first says, or class 0
    data = ImageSet(pixels, torch.from_numpy(labels))
    found = _cost_of_int8(linear(before), linear(after), data, "val", 3, {})
    exact, ours = (flat @ before).argmax(1), (flat @ after).argmax(1)
    expected = {"images": 300, "split": "val"}
    expected |= {"accuracy": sum(ours == labels) / 300, "float32_accuracy": sum(exact == labels) / 300}
    expected |= {"agreement": sum(ours == exact) / 300}
    assert found == pytest.approx(expected) and len({*found.values()}) == 5, "no two are equal by chance"

    for encoder in (ImageSet(pixels, None), data):
        error = _cost_of_int8(linear(before), linear(after), encoder, "test", 3 * (encoder.labels is None), {})
        rms = float(np.sqrt(((flat @ after - flat @ before) ** 2).mean() / ((flat @ before) ** 2).mean()))
        assert error == {"images": 300, "split": "test", "relative_error": pytest.approx(rms, rel=1e-4)}


def spec_of(data: str, **changes: Any) -> ModelSpec:
    arguments = {"img_size": (28, 28), "patch_size": 7, "in_chans": 1, "num_classes": 10, **changes}
    return ModelSpec("VisionTransformer", arguments, data, NAMES)


def test_8_bits_are_measured_on_the_runs_own_validation_images(digits_folder, tmp_path, monkeypatch):
    spec = spec_of(f"folder:{digits_folder}")
    data, config = load(spec.data), DataConfig(data=spec.data, val_fraction=0.2, split_seed=5)
    write_json(tmp_path / "config.json", {"task": "finetune", "val_fraction": 0.2, "split_seed": 5})
    part, split = _images_at_hand(spec, tmp_path, None)
    expected = training_sets(data, config)[1]
    assert split == "val" and part.images.equal(expected.images)
    assert part.labels is not None and expected.labels is not None and part.labels.equal(expected.labels)
    monkeypatch.setattr(module, "MEASURED", 7)
    assert _images_at_hand(spec, tmp_path, None)[0].images.equal(expected.images[:7])
    (tmp_path / "config.json").unlink()
    part, split = _images_at_hand(spec, tmp_path, None)
    assert split == "test" and data.test is not None and part.images.equal(data.test.images[:7])


def test_images_in_a_folder_of_the_persons_are_found_and_none_is_fetched(tmp_path, monkeypatch):
    publish_small_sets(tmp_path / "cache", monkeypatch)
    (tmp_path / "data").mkdir()
    for name, content in MNIST.items():
        (tmp_path / "data" / name).write_bytes(content)
    part, split = _images_at_hand(spec_of("mnist"), tmp_path, tmp_path / "data")
    assert (len(part), split) == (200, "test")
    with pytest.raises(UsageError, match="mnist is not on this machine"):
        _images_at_hand(spec_of("mnist"), tmp_path, None)
    assert not (tmp_path / "cache" / "mnist").exists()


def test_what_an_image_goes_through_is_written_down(tmp_path):
    """Of a model whose height, width and channels all differ."""
    model = VisionTransformer(img_size=(14, 28), patch_size=7, in_chans=2, embed_dim=8, depth=1, num_heads=1)
    about = _preprocessing(model, spec_of("folder:here"))
    assert (about["channels"], about["height"], about["width"]) == (2, 14, 28)
    assert (about["value_range"], about["resize"]) == (None, "crop")
    pixels = torch.arange(256, dtype=torch.uint8)
    said = eval(about["scale"], {"pixel": pixels.float()})
    torch.testing.assert_close(scale(pixels), said)


@pytest.mark.parametrize("size", [(14, 28), (28, 28)])
def test_an_image_processor_for_transformers_says_the_same(size, tmp_path):
    run: Path = checkpoint(tmp_path / "run", VisionTransformer, img_size=size)
    export(run, format="hf", out=tmp_path / "hf")
    about = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
    assert about["crop_size"] == {"height": size[0], "width": size[1]}
    square = size[0] == size[1]
    assert about["size"] == ({"shortest_edge": 28} if square else {"height": 14, "width": 28})
    assert about["do_center_crop"] is square and about["resample"] == 3
    pixels = torch.arange(256.0) * about["rescale_factor"]
    torch.testing.assert_close((pixels - about["image_mean"][0]) / about["image_std"][0], scale(torch.arange(256)))
    assert read_spec(tmp_path / "hf").arguments["img_size"] == size
