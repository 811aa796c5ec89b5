"""What `maelab export` writes, opened by those it is for: transformers, onnxruntime, a process without torch."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hugging_face import randomize
from PIL import Image
from processes import environment
from safetensors import safe_open
from safetensors.torch import load_file

from maelab import __version__
from maelab.cli import main
from maelab.config import AS_IT_IS
from maelab.data.batches import scale
from maelab.data.images import read_all
from maelab.errors import MaelabError, RunError, UsageError
from maelab.export import export
from maelab.inference import class_probabilities, classification_scores
from maelab.model import MaskedAutoencoderViT, VisionTransformer
from maelab.training.checkpoint import ModelSpec, load_model, save_model

ROOT = Path(__file__).parents[1]
NAMES = tuple("0123456789")
SHAPE: dict[str, Any] = {
    "img_size": (28, 28),
    "patch_size": 7,
    "in_chans": 1,
    "embed_dim": 32,
    "depth": 1,
    "num_heads": 2,
}
DECODER: dict[str, Any] = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2, "norm_pix_loss": True}


def checkpoint(folder: Path, kind: type[VisionTransformer], data: str = "mnist", **changes: Any) -> Path:
    """A checkpoint of a model with random weights."""
    arguments: dict[str, Any] = SHAPE | ({"num_classes": 10} if kind is VisionTransformer else DECODER) | changes
    model = kind(**arguments)
    randomize(model)
    names = NAMES if arguments.get("num_classes") else ()
    save_model(folder, ModelSpec(kind.__name__, arguments, data, names, None if names else 0.6), model.state_dict())
    return folder


def images(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def equal(a: Path, b: Path) -> bool:
    """Whether two sources hold the same model."""
    (one, spec), (two, other) = load_model(a), load_model(b)
    assert one.state_dict().keys() == two.state_dict().keys()
    assert (spec.class_names, spec.mask_ratio) == (other.class_names, other.mask_ratio)
    return all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())


def test_an_autoencoder_for_transformers_and_back(tmp_path):
    from transformers import ViTMAEForPreTraining

    run, out = checkpoint(tmp_path / "mae", MaskedAutoencoderViT), tmp_path / "hf"
    assert export(run, format="hf", out=out) == {"run": str(run), "format": "hf", "out": str(out)}
    loaded: Any = ViTMAEForPreTraining.from_pretrained(out, output_loading_info=True)
    theirs, info = loaded
    assert not any(info.values()), info
    ours, noise = load_model(run)[0], torch.rand(3, 16)
    with torch.no_grad():
        loss, pred, mask = ours(images(3, 1, 28, 28), 0.6, noise)
        found = theirs.eval()(images(3, 1, 28, 28), noise=noise)
    assert torch.equal(found.mask, mask)
    torch.testing.assert_close(found.logits, pred, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.loss, loss, rtol=0, atol=1e-5)
    assert equal(run, out)
    theirs.save_pretrained(tmp_path / "again")  # under whatever names transformers likes
    assert equal(run, tmp_path / "again")


@pytest.mark.parametrize("size", [(28, 28), (14, 28)])
def test_a_classifier_for_transformers_and_back(size, tmp_path):
    from transformers import ViTForImageClassification

    run, out = checkpoint(tmp_path / "run", VisionTransformer, img_size=size, in_chans=3), tmp_path / "hf"
    export(run, format="hf", out=out)
    loaded: Any = ViTForImageClassification.from_pretrained(out, output_loading_info=True)
    theirs, info = loaded
    assert not any(info.values()), info
    with torch.no_grad():
        found = theirs.eval()(images(3, 3, *size)).logits
        torch.testing.assert_close(found, load_model(run)[0](images(3, 3, *size)), rtol=0, atol=1e-5)
    assert [theirs.config.id2label[i] for i in range(10)] == list(NAMES)
    assert equal(run, out)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_classifier_of_grey_images_in_a_pipeline_of_transformers(mode, tmp_path):
    from transformers import pipeline

    run = checkpoint(tmp_path / "run", VisionTransformer)
    export(run, format="hf", out=tmp_path / "hf")
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28) + (3,) * (mode == "RGB"), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "image.png")
    found = {
        one["label"]: one["score"] for one in pipeline("image-classification", str(tmp_path / "hf"))(image, top_k=10)
    }
    ours, spec = load_model(run)
    with torch.no_grad():
        grey = scale(read_all([tmp_path / "image.png"], (28, 28), 1, AS_IT_IS))
        expected = dict(zip(spec.class_names, ours(grey).softmax(1)[0].tolist(), strict=True))
    assert found == pytest.approx(expected, abs=1e-5 if mode == "L" else 5e-3)  # colours are not rounded to 8 bits


def test_images_are_prepared_alike(tmp_path, cifar_folder):
    from transformers import AutoImageProcessor

    run = checkpoint(tmp_path / "run", VisionTransformer, in_chans=3)
    export(run, format="hf", out=tmp_path / "hf")
    theirs = AutoImageProcessor.from_pretrained(tmp_path / "hf")
    image = Image.open(next((cifar_folder / "cat").iterdir()))
    # Where they crop after resizing, to whole pixels, maelab crops before: on wide images a shift below one pixel.
    for size, tolerance in (((28, 28), 1e-6), ((64, 64), 1e-6), ((90, 50), 0.1)):
        image.resize(size).save(tmp_path / "image.png")
        found = theirs(Image.open(tmp_path / "image.png"), return_tensors="pt")["pixel_values"]
        ours = scale(read_all([tmp_path / "image.png"], (28, 28), 3, AS_IT_IS))
        torch.testing.assert_close(found, ours, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (VisionTransformer, {"class_token": False, "global_pool": "avg"}, "always have a class token, which this mod"),
        (MaskedAutoencoderViT, {"class_token": False}, "train with --class-token; --format timm and onnx take it as"),
        (VisionTransformer, {"global_pool": "avg"}, "reads the class token, this model the mean of the patches: tr"),
        (MaskedAutoencoderViT, {"img_size": (14, 28)}, "takes square images, this model 14x28; --format timm and"),
        (MaskedAutoencoderViT, {"decoder_depth": 0}, "at least one decoder block, this model none"),
    ],
)
def test_what_transformers_cannot_express_is_refused(kind, changes, message, tmp_path):
    run = checkpoint(tmp_path / "run", kind, **changes)
    with pytest.raises(MaelabError, match=message):
        export(run, format="hf", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def timm_forward(state: dict[str, torch.Tensor], x: torch.Tensor, heads: int) -> torch.Tensor:
    """timm's VisionTransformer with a class token, read from its paper and names alone: x (B, C, H, W) -> logits."""
    p = state["patch_embed.proj.weight"].shape[-1]
    x = F.conv2d(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=p).flatten(2).mT
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], dim=1) + state["pos_embed"]
    (B, L, D), depth = x.shape, 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks."))

    def dense(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, (D,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    for block in (f"blocks.{i}." for i in range(depth)):
        q, k, v = dense(norm(x, block + "norm1"), block + "attn.qkv").reshape(B, L, 3, heads, -1).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        x = x + dense((weights @ v).transpose(1, 2).reshape(B, L, D), block + "attn.proj")
        x = x + dense(F.gelu(dense(norm(x, block + "norm2"), block + "mlp.fc1")), block + "mlp.fc2")
    return dense(norm(x, "norm")[:, 0], "head")


def test_timm_is_told_the_biases_and_a_ratio_whose_whole_part_is_the_hidden_width(tmp_path):
    changes = {"embed_dim": 224, "mlp_ratio": 1952 / 224, "num_heads": 7, "depth": 1, "qkv_bias": False}
    run = checkpoint(tmp_path / "run", VisionTransformer, **changes)
    arguments = export(run, format="timm", out=tmp_path / "vit.safetensors")["arguments"]
    assert int(224 * arguments["mlp_ratio"]) == 1952 and arguments["qkv_bias"] is False  # timm computes it so


def test_timm_and_back(tmp_path):
    run, out = checkpoint(tmp_path / "run", VisionTransformer, img_size=(14, 28)), tmp_path / "vit.safetensors"
    arguments = export(run, format="timm", out=out)["arguments"]
    assert (
        arguments.items() >= {"img_size": (14, 28), "num_heads": 2, "num_classes": 10, "global_pool": "token"}.items()
    )
    with torch.no_grad():
        expected = load_model(run)[0](images(3, 1, 14, 28))
    torch.testing.assert_close(timm_forward(load_file(out), images(3, 1, 14, 28), 2), expected, rtol=0, atol=1e-5)
    assert equal(run, out)
    with safe_open(out, "pt") as opened:
        assert opened.metadata()["format"] == "pt"


def test_registers_go_to_timm_and_back_and_not_to_transformers(tmp_path):
    run, out = checkpoint(tmp_path / "run", VisionTransformer, reg_tokens=2), tmp_path / "vit.safetensors"
    arguments = export(run, format="timm", out=out)["arguments"]
    assert (arguments["reg_tokens"], arguments["no_embed_class"]) == (2, True)
    state, model = load_file(out), load_model(run)[0]
    assert isinstance(model, VisionTransformer)
    assert state["pos_embed"].shape[1] == model.num_patches  # timm's, with no_embed_class
    back = load_model(out)[0]
    x = images(3, model.in_chans, *model.img_size)
    with torch.no_grad():
        torch.testing.assert_close(back(x), model(x), rtol=0, atol=1e-6)
    with pytest.raises(UsageError, match="no registers"):
        export(run, format="hf", out=tmp_path / "folder")


def test_the_encoder_of_an_autoencoder_for_timm(tmp_path):
    run, out = checkpoint(tmp_path / "mae", MaskedAutoencoderViT, class_token=False), tmp_path / "vit.safetensors"
    export(run, format="timm", out=out)
    mae, encoder = load_model(run)[0], load_model(out)[0]
    assert isinstance(encoder, VisionTransformer) and isinstance(mae, VisionTransformer)
    assert not any("decoder" in name for name in load_file(out))
    assert torch.equal(mae.forward_features(images(2, 1, 28, 28)), encoder.forward_features(images(2, 1, 28, 28)))


def test_a_portable_checkpoint(tmp_path):
    run = checkpoint(tmp_path / "run", VisionTransformer)
    export(run, format="safetensors", out=tmp_path / "copy")
    assert equal(run, tmp_path / "copy") and load_model(run)[1] == load_model(tmp_path / "copy")[1]


# --- ONNX -----------------------------------------------------------------------------------------------------------


def answer(file: Path, name: str, x: torch.Tensor) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return np.asarray(session.run([name], {"images": x.numpy()})[0])


@pytest.fixture(scope="module")
def exported(digits_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    """A classifier's checkpoint, its model.onnx in 8 bits beside one in 32, and what the export said. Read only."""
    folder = tmp_path_factory.mktemp("onnx")
    shape = {"class_token": False, "global_pool": "avg"}
    run = checkpoint(folder / "run", VisionTransformer, f"folder:{digits_folder}", **shape)
    export(run, format="onnx", out=folder / "model.onnx")
    return run, folder, export(run, format="onnx", out=folder / "int8.onnx", int8=True)


@pytest.mark.parametrize("n", [1, 5])
def test_onnx_computes_the_same(n, exported):
    run, folder, _ = exported
    with torch.no_grad():
        expected = load_model(run)[0](images(n, 1, 28, 28))
    found = answer(folder / "model.onnx", "logits", images(n, 1, 28, 28))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_int8_is_smaller_and_its_cost_is_measured(exported, digits_folder):
    from maelab.data import load

    run, folder, result = exported
    assert (result["opset"], result["max_difference"] < 1e-4) == (17, True)
    assert (folder / "int8.onnx").stat().st_size < 0.7 * (folder / "model.onnx").stat().st_size
    test = load(f"folder:{digits_folder}").test
    assert test is not None and test.labels is not None
    logits = torch.from_numpy(answer(folder / "int8.onnx", "logits", scale(test.images)))
    model = load_model(run)[0]
    assert isinstance(model, VisionTransformer)
    exact = class_probabilities(model, test)
    agreement = float((exact.argmax(1) == logits.argmax(1)).float().mean())
    assert result["int8"] == {
        "images": len(test),
        "split": "test",
        "accuracy": pytest.approx(classification_scores(logits.softmax(1), test.labels)["accuracy"]),
        "float32_accuracy": pytest.approx(classification_scores(exact, test.labels)["accuracy"]),
        "agreement": pytest.approx(agreement),
    }


@pytest.mark.parametrize("part", ["autoencoder", "attention"])
def test_other_parts_in_8_bits(part, digits_folder, tmp_path):
    kind, other = MaskedAutoencoderViT if part == "autoencoder" else VisionTransformer, tmp_path / "float.onnx"
    run, file = checkpoint(tmp_path / "run", kind, f"folder:{digits_folder}"), tmp_path / "a.onnx"
    cost = export(run, out=file, part=part, int8=True)["int8"]
    export(run, out=other, part=part)
    assert file.stat().st_size < 0.7 * other.stat().st_size
    if part == "attention":
        assert cost["agreement"] > 0.6  # of 30 images, by a model that prefers no class much
        return
    assert 0 < cost["relative_error"] < 0.2
    feed = {"images": images(2, 1, 28, 28).numpy()}
    model: Any = load_model(run)[0]
    shuffled = torch.rand(2, model.num_patches).argsort(dim=1)
    feed |= {"ids_keep": shuffled[:, :3].numpy(), "ids_restore": shuffled.argsort(dim=1).numpy()}
    import onnxruntime

    ours, exact = (np.asarray(onnxruntime.InferenceSession(name).run(None, feed)[0]) for name in (file, other))
    assert np.abs(ours - exact).max() < 0.2 * exact.std()


@pytest.mark.parametrize("class_token", [True, False])
def test_a_whole_autoencoder_in_onnx_rebuilds_from_whichever_patches_are_seen(class_token, tmp_path):
    import onnx
    import onnxruntime

    run, file = checkpoint(tmp_path / "mae", MaskedAutoencoderViT, class_token=class_token), tmp_path / "mae.onnx"
    assert export(run, out=file, part="autoencoder")["max_difference"] < 1e-4
    model: Any = load_model(run)[0]
    session = onnxruntime.InferenceSession(file)
    for batch, hidden in ((1, 1), (3, 8), (2, model.num_patches - 1)):
        mask = torch.zeros(batch, model.num_patches)
        for row in mask:
            row[torch.randperm(model.num_patches)[:hidden]] = 1
        shuffled = mask.argsort(dim=1, stable=True)  # those seen first
        given = {"images": images(batch, 1, 28, 28), "ids_keep": shuffled[:, : model.num_patches - hidden]}
        feed = {k: v.numpy() for k, v in (given | {"ids_restore": shuffled.argsort(dim=1)}).items()}
        with torch.no_grad():
            expected = model(given["images"], mask=mask)[1].numpy()
        np.testing.assert_allclose(np.asarray(session.run(None, feed)[0]), expected, rtol=0, atol=1e-4)
    proto = onnx.load(str(file))
    assert not any(a.name == "allowzero" for node in proto.graph.node for a in node.attribute)
    about = {prop.key: json.loads(prop.value) for prop in proto.metadata_props}
    assert (about["patch_size"], about["norm_pix_loss"]) == (model.patch_size, True)


def test_a_whole_autoencoder_is_for_onnx_and_of_an_autoencoder(tmp_path):
    mae, classifier = (checkpoint(tmp_path / k.__name__, k) for k in (MaskedAutoencoderViT, VisionTransformer))
    with pytest.raises(UsageError, match="is no autoencoder, which --part autoencoder asks for"):
        export(classifier, out=tmp_path / "a.onnx", part="autoencoder")
    with pytest.raises(UsageError, match="--part autoencoder goes with --format onnx, not hf"):
        export(mae, out=tmp_path / "hf", part="autoencoder", format="hf")


def test_the_encoder_of_an_autoencoder_in_onnx(tmp_path, monkeypatch, capfd):
    run = checkpoint(tmp_path / "mae", MaskedAutoencoderViT, "folder:gone")
    monkeypatch.chdir(tmp_path)
    assert main(["export", "mae", "--int8"]) == 0  # in this process, where the exporter is loaded already
    said = capfd.readouterr()
    first, second, out = said.out.splitlines()
    assert said.err == "" and out == "mae-onnx.onnx"
    assert first.startswith("opset 17, at most ") and second == "int8: cost not measured: there is no folder gone"
    model = load_model(run)[0]
    assert isinstance(model, VisionTransformer)
    with torch.no_grad():
        expected = model.pool(model.forward_features(images(3, 1, 28, 28)), "avg")
    found = answer(tmp_path / out, "features", images(3, 1, 28, 28))
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.1 * float(expected.std()))


def test_a_graph_that_computes_something_else_is_not_written(tmp_path, monkeypatch):
    """A model that was changed, from the third image of a batch on: one or two images would not show it."""
    forward_head = VisionTransformer.forward_head

    def other_than_the_graph(self: VisionTransformer, tokens: torch.Tensor) -> torch.Tensor:
        logits = forward_head(self, tokens)
        return logits + 3e-4 * (torch.ones_like(logits[:, :1]).cumsum(0) > 2)

    run = checkpoint(tmp_path / "run", VisionTransformer)
    monkeypatch.setattr(VisionTransformer, "forward_head", other_than_the_graph)
    with pytest.raises(RunError, match=r"the ONNX model differs from the original by 3\.0e-04; nothing was written"):
        export(run, format="onnx", out=tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("name", ["model", "int8"])
def test_serving_without_torch(name, exported, digits_folder):
    """examples/serve_onnx.py answers as the model does, in a process that could not import torch or maelab."""
    _, folder, _ = exported
    files = sorted(digits_folder.rglob("*.png"))[::50]
    code = f"""if True:
        import runpy, sys
        for name in ("torch", "maelab", "safetensors", "transformers", "onnx"):
            sys.modules[name] = None
        sys.argv = ["serve", {str(folder / f"{name}.onnx")!r}, *{[str(f) for f in files]!r}]
        runpy.run_path({str(ROOT / "examples" / "serve_onnx.py")!r}, run_name="__main__")"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(folder), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    logits = torch.from_numpy(answer(folder / f"{name}.onnx", "logits", scale(read_all(files, (28, 28), 1, AS_IT_IS))))
    for file, odds, line in zip(files, logits.softmax(dim=1), done.stdout.splitlines(), strict=True):
        assert line == f"{file}\t{int(odds.argmax())}\t{float(odds.max()):.4f}"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--format timm --out a.png", "--out a.png: the format is a file; give a name that ends in .safetensors"),
        ("--format hf --int8", "--int8 goes with --format onnx, not hf"),
        ("--format onnx --out run", "--out run exists; remove it or choose another name"),
        ("--format pickle", "--format must be onnx, timm, hf or safetensors, got 'pickle'"),
    ],
)
def test_bad_usage(flags, message, tmp_path, maelab):
    checkpoint(tmp_path / "run", VisionTransformer)
    ended = maelab.run("export", "run", *flags.split(), cwd=tmp_path)
    assert ended.error().startswith(message) and ended.status == 2
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_linear_probe_is_refused_and_json_is_one_object(tmp_path, maelab):
    spec = ModelSpec("Linear", {"in_features": 4, "out_features": 3}, "mnist")
    save_model(tmp_path / "probe", spec, spec.build().state_dict())
    assert "export the run that it judged" in maelab.run("export", "probe", cwd=tmp_path).error()
    checkpoint(tmp_path / "run", VisionTransformer)
    said = maelab.run("export", "run", "--format", "timm", "--json", cwd=tmp_path).json()
    assert said["out"] == "run-timm.safetensors" and json.dumps(said["arguments"])


def test_names_of_classes_are_text_that_other_tools_can_read(tmp_path):
    """Bytes of a folder's name that are no UTF-8 become \\xe9: unlike \ufffd, two such classes stay two."""
    onnx = pytest.importorskip("onnx")
    names = tuple(map(os.fsdecode, (b"caf\xe8", b"caf\xe9", "a\nb $x_{$ \N{GRINNING FACE}".encode())))
    text = [r"caf\xe8", r"caf\xe9", names[2]]
    shape = {**SHAPE, "num_classes": 3, "global_pool": "token", "class_token": True}
    spec = ModelSpec("VisionTransformer", shape, "folder:x", names)
    save_model(tmp_path / "model", spec, spec.build().state_dict())
    export(tmp_path / "model", format="onnx", out=tmp_path / "m.onnx")
    props = {prop.key: prop.value for prop in onnx.load(str(tmp_path / "m.onnx")).metadata_props}
    assert json.loads(props["class_names"]) == text
    assert json.loads(props["maelab"]) == __version__
    about = json.loads(props["preprocessing"])
    assert (about["channels"], about["height"], about["width"]) == (1, 28, 28)
    export(tmp_path / "model", format="timm", out=tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert json.loads(file.metadata()["maelab"])["class_names"] == text
    export(tmp_path / "model", format="hf", out=tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["label2id"] == {n: i for i, n in enumerate(text)}
    export(tmp_path / "model", format="safetensors", out=tmp_path / "ours")
    assert load_model(tmp_path / "ours")[1].class_names == names, "maelab's own format is exact"
