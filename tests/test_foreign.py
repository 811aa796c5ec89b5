"""Models of other libraries as a start: transformers, the original MAE, timm; damaged and hostile files."""

import argparse
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hugging_face import randomize
from safetensors.torch import load_file, save_file

from maelab import runs
from maelab.errors import MaelabError
from maelab.foreign import read_foreign, tensors
from maelab.foreign.timm import IMAGENET
from maelab.model import MaskedAutoencoderViT, VisionTransformer
from maelab.training.checkpoint import load_model, read_spec
from maelab.weights import PATCH_WEIGHT

SHAPE: dict[str, Any] = {"img_size": 16, "patch_size": 4, "embed_dim": 64, "depth": 2, "num_heads": 1}
HF: dict[str, Any] = {
    "image_size": 16, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 80, "layer_norm_eps": 1e-6,
}  # fmt: skip
DECODER: dict[str, Any] = {
    "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 40, "mask_ratio": 0.5,
}  # fmt: skip
COLOURS = [torch.tensor(v).reshape(3, 1, 1) for v in IMAGENET]


def theirs(images: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] as ImageNet's mean and deviation normalise them."""
    return ((images + 1) / 2 - COLOURS[0]) / COLOURS[1]


def images(channels: int = 3, side: int = 16) -> torch.Tensor:
    return torch.rand(3, channels, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def processor(folder: Path, mean: Any = IMAGENET[0], std: Any = IMAGENET[1]) -> None:
    content = {"do_normalize": True, "image_mean": mean, "image_std": std}
    (folder / "preprocessor_config.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def vit_mae(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A small ViTMAE of transformers with ImageNet's colours, and its folder. Do not change."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    model = ViTMAEForPreTraining(ViTMAEConfig(**HF, **DECODER)).eval()
    randomize(model)
    folder = tmp_path_factory.mktemp("vit_mae") / "model"
    model.save_pretrained(folder)
    processor(folder)
    return model, folder


def test_vit_mae(vit_mae, capsys):
    model, folder = vit_mae
    ours, spec = load_model(folder)
    assert isinstance(ours, MaskedAutoencoderViT) and (spec.model, spec.mask_ratio) == ("MaskedAutoencoderViT", 0.5)
    assert not ours.pos_embed.requires_grad and ours.patch_embed.proj.weight.requires_grad
    assert "colours normalised by" in capsys.readouterr().err
    noise = torch.rand(3, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(theirs(images()), noise=noise)
        _, pred, mask = ours(images(), 0.5, noise)
        tokens = model.vit(theirs(images()), noise=noise).last_hidden_state
        latent = ours.forward_encoder(images(), 0.5, noise)[0]
    assert torch.equal(mask, expected.mask)
    torch.testing.assert_close(latent, tokens, rtol=0, atol=1e-5)
    pixels = expected.logits.reshape(3, 16, 16, 3) * COLOURS[1].flatten() + COLOURS[0].flatten()  # in [0, 1]
    torch.testing.assert_close(pred, (2 * pixels - 1).reshape(3, 16, 48), rtol=0, atol=1e-5)


def test_vit_mae_with_the_names_of_the_hub_and_without_a_decoder(vit_mae, tmp_path):
    """Older transformers wrote pickles, and `decoder_layers`; a bare ViTMAEModel has no prefix."""
    model, folder = vit_mae
    state = {
        k.replace("decoder.decoder_encoder.layer.", "decoder.decoder_layers."): v
        for k, v in load_file(folder / "model.safetensors").items()
    }
    for name in ("whole", "bare"):
        (tmp_path / name).mkdir()
        shutil.copy(folder / "config.json", tmp_path / name)
    assert any(".decoder_layers.0.attention.attention.query." in name for name in state)
    torch.save(state, tmp_path / "whole" / "pytorch_model.bin")
    bare = {k.removeprefix("vit."): v for k, v in state.items() if k.startswith("vit.")}
    save_file(bare, tmp_path / "bare" / "model.safetensors")
    with torch.no_grad():
        expected = model.vit(images(), noise=torch.arange(16.0).expand(3, -1)).last_hidden_state[:, 1:]
        for name in ("whole", "bare"):
            ours, spec = load_model(tmp_path / name)
            assert isinstance(ours, VisionTransformer)
            kind = "MaskedAutoencoderViT" if name == "whole" else "VisionTransformer"
            assert spec.model == kind and spec.arguments.get("num_classes", 0) == 0
            if isinstance(ours, MaskedAutoencoderViT):
                latent = ours.forward_encoder(images(), 0.5, torch.arange(16.0).expand(3, -1))[0]
                torch.testing.assert_close(latent[:, 1:], expected, rtol=0, atol=1e-5)
    whole = load_model(tmp_path / "whole")[0]
    assert isinstance(ours, VisionTransformer) and isinstance(whole, VisionTransformer)
    assert torch.equal(ours.forward_features(images()), whole.forward_features(images()))


@pytest.mark.parametrize("changes", [{}, {"qkv_bias": False, "image_size": [16, 24], "num_channels": 1}])
def test_vit_classifier(changes, tmp_path):
    from transformers import ViTConfig, ViTForImageClassification

    names = {0: "cat", 1: "dog", 2: "owl"}
    model = ViTForImageClassification(ViTConfig(**{**HF, **changes, "id2label": names})).eval()
    randomize(model)
    model.save_pretrained(tmp_path)
    ours, spec = load_model(tmp_path)
    assert spec.class_names == ("cat", "dog", "owl")
    x = images(spec.arguments["in_chans"], 24)[:, :, :16, : spec.arguments["img_size"][1]]
    with torch.no_grad():
        torch.testing.assert_close(ours(x), model(x).logits, rtol=0, atol=1e-5)


def dinov2(registers: int, **changes: Any) -> Any:
    """A small DINOv2 of transformers, or with its classifier where `num_labels` is given."""
    from transformers import (
        Dinov2Config,
        Dinov2ForImageClassification,
        Dinov2Model,
        Dinov2WithRegistersConfig,
        Dinov2WithRegistersModel,
    )

    shape = {"image_size": 28, "patch_size": 14, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    if registers:
        model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**shape, num_register_tokens=registers, **changes))
    else:
        classes = Dinov2ForImageClassification if "num_labels" in changes else Dinov2Model
        model = classes(Dinov2Config(**{**shape, **changes}))
    randomize(model)
    return model.eval()


@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2(registers, tmp_path):
    """LayerScale is taken up by the layers before it; registers stand between the class token and the patches."""
    model = dinov2(registers)
    assert float(model.state_dict()["encoder.layer.1.layer_scale2.lambda1"].std()) > 0.05  # randomize reached it
    model.save_pretrained(tmp_path)
    processor(tmp_path)
    ours, spec = load_model(tmp_path)
    assert isinstance(ours, VisionTransformer)
    assert (spec.model, spec.arguments.get("reg_tokens", 0)) == ("VisionTransformer", registers)
    x = images(side=28)
    with torch.no_grad():
        expected = model(theirs(x)).last_hidden_state  # (3, 1 + registers + 4, 128)
        torch.testing.assert_close(ours.forward_features(x), expected, rtol=0, atol=1e-5)
        means = ours.pool(ours.forward_features(x), "avg")
    torch.testing.assert_close(means, expected[:, 1 + registers :].mean(dim=1), rtol=0, atol=1e-5)


def test_dinov2_as_its_authors_and_timm_keep_it(tmp_path, capsys):
    """One file with timm's names; the authors' has register_tokens and a mask token, timm's no position for the class
    token."""
    model = dinov2(4)
    model.save_pretrained(tmp_path)
    processor(tmp_path)
    folder, _ = load_model(tmp_path)
    state = {k: v.clone() for k, v in folder.state_dict().items()}
    for i in range(2):  # two ways to say the same: half of the weights, and gammas of two
        for layer, gamma in (("attn.proj", "ls1"), ("mlp.fc2", "ls2")):
            state[f"blocks.{i}.{layer}.weight"] /= 2
            state[f"blocks.{i}.{layer}.bias"] /= 2
            state[f"blocks.{i}.{gamma}.gamma"] = torch.full((128,), 2.0)
    scale = [0.5 / s for s in IMAGENET[1]]  # ours takes images in [-1, 1], theirs ImageNet's colours
    weight = state["patch_embed.proj.weight"] / torch.tensor(scale).reshape(1, 3, 1, 1)
    shift = torch.tensor([(0.5 - m) / s for m, s in zip(*IMAGENET, strict=True)])
    state["patch_embed.proj.bias"] -= torch.einsum("dcij,c->d", weight, shift)
    state["patch_embed.proj.weight"] = weight
    registers = state.pop("reg_token")
    torch.save(state | {"register_tokens": registers, "mask_token": torch.zeros(1, 128)}, tmp_path / "authors.pth")
    state["cls_token"], state["pos_embed"] = state["cls_token"] + state["pos_embed"][:, :1], state["pos_embed"][:, 1:]
    save_file({k: v.contiguous() for k, v in (state | {"reg_token": registers}).items()}, tmp_path / "timm.safetensors")
    x = images(side=28)
    for name in ("authors.pth", "timm.safetensors"):
        capsys.readouterr()
        ours, _ = load_model(tmp_path / name)
        assert isinstance(ours, VisionTransformer) and isinstance(folder, VisionTransformer)
        said = capsys.readouterr().err
        assert "colours as in DINOv2" in said and "decoder" not in said
        torch.testing.assert_close(ours.forward_features(x), folder.forward_features(x), rtol=0, atol=1e-5)


def test_dinov2s_classifier_is_left_out_and_gated_mlps_are_refused(tmp_path, capsys):
    dinov2(0, num_labels=3).save_pretrained(tmp_path)
    _, spec = load_model(tmp_path)
    assert spec.arguments["num_classes"] == 0 and "its classifier is left out" in capsys.readouterr().err
    dinov2(0, use_swiglu_ffn=True).save_pretrained(tmp_path / "gated")
    with pytest.raises(MaelabError, match="gated MLPs"):
        load_model(tmp_path / "gated")


def test_a_model_with_registers_goes_on_as_a_classifier_and_not_as_an_autoencoder(
    maelab, cifar_folder, tmp_path, monkeypatch
):
    dinov2(2).save_pretrained(tmp_path / "dino")
    few = ("--data", f"folder:{cifar_folder}", "--limit", 32, "--batch-size", 16, "--epochs", 1, "--threads", 1)
    resize = ("--patch-size", 8, "--adapt-patch-embed", "resize")
    command = ("smoke", "--init", "dino", *few)
    maelab.run("finetune", *command, *resize, "--out", "run", "--json", cwd=tmp_path).json()
    ours, spec = load_model(tmp_path / "run")
    assert isinstance(ours, VisionTransformer) and ours.reg_token is not None and spec.arguments["reg_tokens"] == 2
    monkeypatch.chdir(tmp_path)
    config = json.loads((tmp_path / "run" / "config.json").read_text())  # small steps for what it has learned
    assert (config["optimizer"], config["layer_decay"]) == ("adamw", 0.75)
    assert "--layer-decay" not in runs.command(config)
    maelab.run("finetune", *command, *resize, "--layer-decay", 1, "--out", "other", cwd=tmp_path)
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    assert config["layer_decay"] == 1 and "--layer-decay 1" in runs.command(config)
    refused = maelab.run("pretrain", *command, cwd=tmp_path).error()
    assert refused == "--init dino has register tokens, which maelab does not pretrain; fine-tune it"


def test_the_original_mae(tmp_path, capsys):
    """Its own checkpoints hold a Namespace and an optimizer, and images were normalised by ImageNet's colours."""
    model = MaskedAutoencoderViT(**SHAPE).eval()
    randomize(model)
    content = {"model": model.state_dict(), "args": argparse.Namespace(lr=0.1), "optimizer": {"state": {}}, "epoch": 3}
    torch.save(content, tmp_path / "mae.pth")
    ours, spec = load_model(tmp_path / "mae.pth")
    assert isinstance(ours, VisionTransformer) and spec.arguments["num_classes"] == 0
    with torch.no_grad():
        expected = model.forward_features(theirs(images()))
        torch.testing.assert_close(ours.forward_features(images()), expected, rtol=0, atol=1e-5)
    said = capsys.readouterr().err
    assert "decoder is left out" in said and "1 attention heads, GELU" in said and "original MAE" in said


@pytest.mark.parametrize("form", ["pth", "safetensors"])
def test_timm(form, tmp_path):
    model = VisionTransformer(**{**SHAPE, "embed_dim": 128, "num_heads": 2}, num_classes=3, learned_pos_embed=True)
    randomize(model.eval())
    file = tmp_path / f"vit.{form}"
    (torch.save if form == "pth" else save_file)(model.state_dict(), file)
    with torch.no_grad():
        torch.testing.assert_close(load_model(file)[0](images()), model(images()), rtol=0, atol=1e-6)


def test_a_folder_of_timm_says_what_weights_do_not(tmp_path, capsys):
    """Heads, activation and pooling, under the names of timm's config.json."""
    model = VisionTransformer(**{**SHAPE, "embed_dim": 96, "num_heads": 3}, num_classes=3, learned_pos_embed=True)
    randomize(model.eval())
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    place = tmp_path / "config.json"
    place.write_text(json.dumps({"architecture": "x", "global_pool": "token", "model_args": {"num_heads": 3}}))
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path)[0](images()), model(images()), rtol=0, atol=1e-6)
    said = capsys.readouterr().err
    assert "attention heads" not in said and "class token assumed" not in said
    for change, message in (
        ({"num_heads": 5}, "num_heads 5 does not divide embed_dim 96"),
        ({"num_heads": 3, "act_layer": "relu"}, "has relu for an activation"),
        ({"num_heads": 3, "global_pool": "map"}, "classifies from 'map'"),
    ):
        place.write_text(json.dumps({"model_args": change}))
        with pytest.raises(MaelabError, match=message):
            load_model(tmp_path)


def test_timm_without_a_position_for_the_class_token(tmp_path):
    model = VisionTransformer(**SHAPE, num_classes=3, learned_pos_embed=True, global_pool="avg").eval()
    with torch.no_grad():
        randomize(model)
        model.pos_embed[:, 0] = 0
        state = {k: v.half() if v.ndim == 2 else v for k, v in model.state_dict().items()}
        state["pos_embed"] = state["pos_embed"][:, 1:].clone()
        save_file(state, tmp_path / "vit.safetensors")
        ours = load_model(tmp_path / "vit.safetensors")[0]
        assert {p.dtype for p in ours.parameters()} == {torch.float32}
        torch.testing.assert_close(ours(images()), model(images()), rtol=0, atol=0.02)  # half precision in between


def test_the_original_maes_command_tells_what_its_decoder_predicts(tmp_path):
    model = MaskedAutoencoderViT(**SHAPE, decoder_embed_dim=64, decoder_depth=1, decoder_num_heads=16).eval()
    randomize(model)
    command = argparse.Namespace(norm_pix_loss=False, mask_ratio=0.5)
    torch.save({"model": model.state_dict(), "args": command}, tmp_path / "mae.pth")
    ours, spec = load_model(tmp_path / "mae.pth")
    assert isinstance(ours, MaskedAutoencoderViT) and spec.mask_ratio == 0.5 and not ours.norm_pix_loss
    noise = torch.rand(3, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        _, pred, mask = ours(images(), 0.5, noise)
        _, expected, same = model(theirs(images()), 0.5, noise)
    pixels = expected.reshape(3, 16, 16, 3) * COLOURS[1].flatten() + COLOURS[0].flatten()  # in [0, 1]
    assert torch.equal(mask, same)
    torch.testing.assert_close(pred, (2 * pixels - 1).reshape(3, 16, 48), rtol=0, atol=1e-4)


@pytest.mark.parametrize("form", ["module.", "encoder.", "state_dict_ema", "pth.tar", "fine-tuned", "hub"])
def test_files_as_training_scripts_and_hubs_leave_them(form, tmp_path, capsys):
    """And what they say of their images' colours is heeded, though the positions were trained."""
    model = VisionTransformer(
        **SHAPE, num_classes=3, learned_pos_embed=True, class_token=True, global_pool="token"
    ).eval()
    randomize(model)
    state, path = model.state_dict(), tmp_path / ("vit.pth.tar" if form == "pth.tar" else "vit.pth")
    if form == "hub":
        path = tmp_path / "hub"
        path.mkdir()
        save_file(state, path / "model.safetensors")
        cfg = {"mean": IMAGENET[0], "std": IMAGENET[1], "input_size": [3, 16, 16]}
        (path / "config.json").write_text(json.dumps({"architecture": "vit_own", "pretrained_cfg": cfg}))
    elif form == "fine-tuned":
        torch.save({"model": state, "args": argparse.Namespace(nb_classes=3)}, path)
    elif form.endswith("."):
        torch.save({"state_dict": {form + name: value for name, value in state.items()}}, path)
    else:
        torch.save({form if "_" in form else "state_dict": state}, path)
    given = theirs(images()) if form in ("fine-tuned", "hub") else images()
    with torch.no_grad():
        torch.testing.assert_close(load_model(path)[0](images()), model(given), rtol=0, atol=1e-5)
    said = capsys.readouterr().err
    assert (
        "1 attention heads, GELU and layer norms with 1e-6 assumed" in said and "from the class token assumed" in said
    )


def test_what_lies_outside_the_wrapped_model_is_named(tmp_path, capsys):
    state = {f"encoder.{name}": value for name, value in state_of(num_classes=0).items()}
    torch.save(state | {"queue\x1b[2J": torch.ones(3)}, tmp_path / "moco.pth")
    load_model(tmp_path / "moco.pth")
    said = capsys.readouterr().err
    assert "left out, not under 'encoder.': queue" in said and "\x1b" not in said


# --- what is refused ------------------------------------------------------------------------------------------------


class Hostile:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("form", ["zip", "legacy", "plain"])
def test_a_hostile_pickle_is_refused_and_not_run(form, tmp_path, maelab):
    file, trace = tmp_path / "mae.pth", tmp_path / "trace"
    content = {"model": VisionTransformer(**SHAPE).state_dict(), "args": Hostile(trace)}
    if form == "plain":
        file.write_bytes(pickle.dumps(Hostile(trace)))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=form == "zip")
    ended = maelab.run("finetune", "smoke", "--init", file, "--data", "folder:nowhere", cwd=tmp_path)
    assert ended.error().startswith(f"{file} is damaged or not safe to read: ") and ended.status == 1
    assert not trace.exists()
    torch.load(file, weights_only=False) if form != "plain" else pickle.loads(file.read_bytes())
    assert trace.exists(), "so it would have been run"


def state_of(**changes: Any) -> dict[str, torch.Tensor]:
    return VisionTransformer(**{**SHAPE, "num_classes": 3, **changes}).state_dict()


def without(name: str) -> dict[str, torch.Tensor]:
    return {k: v for k, v in state_of().items() if k != name}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "no state dict"),
        ({}, "no state dict"),
        ({"a": 1}, "'a' is no plain tensor"),
        ({"a": torch.eye(3).to_sparse()}, "'a' is no plain tensor"),
        ({"a": torch.zeros(1).expand(10**6, 10**6)}, "'a' claims to be larger than the file"),
        (without(PATCH_WEIGHT), "holds no Vision Transformer under timm's names (KeyError"),
        (without("blocks.0.attn.qkv.weight"), 'Missing key(s) in state_dict: "blocks.0.attn.qkv.weight"'),
        (state_of(embed_dim=32), "does not say how many heads its blocks of width 32 have"),
        (state_of() | {"blocks.0.ls3.gamma": torch.ones(64)}, 'Unexpected key(s) in state_dict: "blocks.0.ls3.gamma"'),
        (
            state_of() | {"blocks.0.ls1.gamma": torch.ones(7)},
            "holds no Vision Transformer under timm's names (RuntimeErr",
        ),
        (state_of() | {"blocks.0.mlp.w12.weight": torch.ones(64)}, "has gated MLPs"),
        (state_of() | {"blocks.999999999.x": torch.ones(1)}, "blocks.999999999 without"),
        (state_of() | {"pos_embed": torch.ones(1, 18, 64)}, "17 positions, no square, and does not say how high"),
        (state_of() | {"norm.bias": torch.full((64,), torch.nan)}, "norm.bias has values that are no numbers"),
        (state_of(embed_dim=96), "does not say how many heads its blocks of width 96 have"),
        (state_of() | {"blocks.1.mlp.fc1.weight": torch.ones(10**6)}, "size mismatch for blocks.1.mlp.fc1.weight"),
    ],
)
def test_files_that_do_not_fit(content, message, tmp_path):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(MaelabError) as refusal:
        load_model(tmp_path / "a.pth")
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "compressed", "large"])
@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_damaged_files(name, damage, tmp_path, monkeypatch):
    file = tmp_path / name
    (torch.save if name == "a.pth" else save_file)(state_of(), file)
    content = file.read_bytes()
    if damage == "compressed" and name == "a.pth":  # a zip bomb would be one
        with zipfile.ZipFile(tmp_path / "old", "w", zipfile.ZIP_DEFLATED) as new, zipfile.ZipFile(file) as old:
            for record in old.namelist():
                new.writestr(record, old.read(record))
        content = (tmp_path / "old").read_bytes()
    file.write_bytes(
        {"cut": content[: len(content) // 2], "empty": b"", "garbage": b"\xff\0" * 99}.get(damage, content)
    )
    if damage == "large":
        monkeypatch.setattr(tensors, "MAX_WEIGHTS", 1000)
    if damage == "compressed" and name != "a.pth":
        file.write_bytes((2**62).to_bytes(8, "little") + content[8:])  # a header of 2**62 bytes
    with pytest.raises(MaelabError, match=r"a\.\w+ is damaged or not safe to read: .+"):
        load_model(file)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", {"model_type": "bert"}, "is a model of type 'bert'; of transformers, maelab reads"),
        ("config.json", {"num_attention_heads": 0}, "num_attention_heads is 0"),
        ("config.json", {"num_attention_heads": -4}, "num_attention_heads is -4"),
        ("config.json", {"num_attention_heads": "4"}, "num_attention_heads is '4'"),
        ("config.json", {"num_attention_heads": 5}, "num_heads 5 does not divide embed_dim 32"),
        ("config.json", {"image_size": 10**9}, "damaged or "),
        ("config.json", {"image_size": 64}, "size mismatch for pos_embed"),
        ("config.json", {"image_size": "big"}, "damaged or "),
        ("config.json", {"image_size": [16]}, "damaged or "),
        ("config.json", {"decoder_num_hidden_layers": 10**9}, "1000000000 decoder blocks"),
        ("config.json", {"mask_ratio": 1.5}, "mask_ratio 1.5"),
        ("config.json", {"mask_ratio": None}, "damaged or "),
        ("config.json", {"layer_norm_eps": 1e-5}, "has another activation or layer norm than maelab's"),
        ("config.json", {"hidden_act": "relu"}, "has another activation or layer norm than maelab's"),
        ("preprocessor_config.json", {"image_mean": [0.5]}, "for 3 channels"),
        ("preprocessor_config.json", {"image_std": [0.5, 0.5, 0]}, "for 3 channels"),
        ("preprocessor_config.json", {"image_mean": "x"}, "damaged or "),
    ],
)
def test_folders_of_transformers_that_do_not_fit(file, change, message, vit_mae, tmp_path):
    folder = Path(shutil.copytree(vit_mae[1], tmp_path / "model"))
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | change))
    with pytest.raises(MaelabError) as refusal:
        load_model(folder)
    assert message in str(refusal.value) and str(folder) in str(refusal.value) and "\n" not in str(refusal.value)


def test_folders_without_weights_or_with_a_damaged_config(vit_mae, tmp_path):
    folder = Path(shutil.copytree(vit_mae[1], tmp_path / "model"))
    (folder / "preprocessor_config.json").write_text("[" * 10**6)
    with pytest.raises(MaelabError, match=r"preprocessor_config\.json is damaged"):
        load_model(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(MaelabError, match=r"has neither model\.safetensors nor pytorch_model\.bin"):
        load_model(folder)
    (folder / "config.json").write_text('{"model_type": "vit"')
    assert read_foreign(folder) is None


def test_the_hub_without_a_network(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        MaelabError, match=r"^cannot get hf:facebook/vit-mae-base from the Hugging Face hub or its cache"
    ):
        read_spec("hf:facebook/vit-mae-base")
    with pytest.raises(MaelabError, match=r"^cannot get hf:../../etc from"):
        read_spec("hf:../../etc")


def test_the_cache_of_the_hub(monkeypatch, tmp_path, vit_mae):
    """What transformers fetched before is found without a network."""
    from huggingface_hub import constants

    entry = tmp_path / "models--who--mae"
    (entry / "refs").mkdir(parents=True)
    (entry / "refs" / "main").write_text("0" * 40)
    shutil.copytree(vit_mae[1], entry / "snapshots" / ("0" * 40))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    ours = load_model("hf:who/mae")[0].state_dict()
    assert all(torch.equal(value, ours[name]) for name, value in load_model(vit_mae[1])[0].state_dict().items())


# --- fine-tuning from them ------------------------------------------------------------------------------------------


def test_finetune_at_another_image_and_patch_size(maelab, vit_mae, cifar_folder, tmp_path):
    """As ImageNet's weights go to CIFAR-10: 16 x 16 images in patches of 4 -> 32 x 32 in patches of 8 or of 2."""
    few = ("--data", f"folder:{cifar_folder}", "--limit", 32, "--batch-size", 16, "--epochs", 1, "--threads", 1)
    command = ("finetune", "smoke", "--init", vit_mae[1], *few, "--kernels", "torch", "--precision", "fp32", "--json")
    refused = maelab.run(*command, "--patch-size", 2, cwd=tmp_path)
    assert refused.error().endswith("has 4; --adapt-patch-embed resize makes it fit")
    same = maelab.run(*command, "--out", "same", cwd=tmp_path).json()
    assert same["adapted"] == ["position embedding 4x4 -> 8x8: interpolate"]
    resize = ("--adapt-patch-embed", "resize", "--patch-size", 2, "--global-pool", "token", "--class-token")
    result = maelab.run(*command, *resize, "--out", "resized", cwd=tmp_path).json()
    assert result["adapted"] == ["position embedding 4x4 -> 16x16: interpolate", "patches 4x4 -> 2x2 pixels: resize"]
    spec = read_spec(tmp_path / "resized")
    assert (spec.arguments["patch_size"], spec.arguments["num_heads"]) == (2, 4)
    evaluate = maelab.run("evaluate", vit_mae[1], cwd=tmp_path)
    assert evaluate.error() == "this model comes from another library; name the data set with --data"
