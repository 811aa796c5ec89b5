"""Constants and arguments that only a look at their own value shows: shapes, starts, momentum, names, thresholds."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from small_sets import CIFAR, MNIST, MNIST_GZ, publish_small_sets
from test_augment import noise, to_pillow

from maelab.config import AS_IT_IS, BlocksConfig, DataConfig, Reading
from maelab.data import Dataset, ImageSet, label_fraction, limit, load, split, training_sets
from maelab.data.decode import FULL_16_BITS
from maelab.data.images import read_batches, read_mask
from maelab.model import MaskedAutoencoderViT, VisionTransformer
from maelab.training.optim import build_optimizers

# --- models and optimizers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [1.5, 3.0])
def test_the_mlps_of_encoder_and_decoder_have_the_width_asked_for(ratio):
    model = MaskedAutoencoderViT(img_size=8, embed_dim=16, depth=1, num_heads=2, mlp_ratio=ratio,
                                 decoder_embed_dim=24, decoder_depth=1, decoder_num_heads=2)  # fmt: skip
    state = model.state_dict()
    assert len(state["blocks.0.mlp.fc1.weight"]) == int(16 * ratio)
    assert len(state["decoder_blocks.0.mlp.fc1.weight"]) == int(24 * ratio)


def test_tokens_start_from_a_narrow_normal_distribution():
    torch.manual_seed(0)
    model = MaskedAutoencoderViT(embed_dim=768, depth=1, decoder_embed_dim=768, decoder_depth=1)
    assert model.cls_token is not None
    for token in (model.cls_token.detach(), model.mask_token.detach()):
        assert float(token.std()) == pytest.approx(0.02, rel=0.12) and abs(float(token.mean())) < 0.003


def test_muon_averages_gradients_with_a_momentum_of_0_95():
    torch.manual_seed(0)
    model = VisionTransformer(img_size=8, embed_dim=16, depth=1, num_heads=2)
    muon, adamw = build_optimizers(model, BlocksConfig(optimizer="muon", beta2=0.98))
    matrix = model.get_parameter("blocks.0.mlp.fc1.weight")
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    first, second = torch.randn(2, *matrix.shape)
    for gradient in (first, second):
        matrix.grad = gradient.clone()
        muon.step()
    expected = 0.95 * 0.05 * first + 0.05 * second
    torch.testing.assert_close(muon.state[matrix]["momentum_buffer"], expected, rtol=1e-4, atol=1e-6)
    assert all(group["betas"] == (0.9, 0.98) for group in adamw.param_groups)


# --- data -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "files", "named"),
    [
        ("mnist", MNIST, {i: str(i) for i in range(10)}),
        ("fashion-mnist", MNIST_GZ, {0: "T-shirt/top", 1: "Trouser", 2: "Pullover", 3: "Dress", 4: "Coat", 5: "Sandal",
                                     6: "Shirt", 7: "Sneaker", 8: "Bag", 9: "Ankle boot"}),
        ("cifar10", CIFAR, {0: "airplane", 1: "automobile", 2: "bird", 3: "cat", 4: "deer", 5: "dog", 6: "frog",
                            7: "horse", 8: "ship", 9: "truck"}),
    ],
)  # fmt: skip
def test_a_built_in_set_names_its_labels(name, files, named, tmp_path, monkeypatch):
    publish_small_sets(tmp_path / "cache", monkeypatch)
    (tmp_path / "data").mkdir()
    for file, content in files.items():
        (tmp_path / "data" / file).write_bytes(content)
    assert dict(enumerate(load(name, data_dir=tmp_path / "data").class_names)) == named


@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_a_folder_come_with_the_channels_asked_for(channels, digits_folder, cifar_folder):
    for root in (digits_folder / "0", cifar_folder / "cat"):
        assert load(f"folder:{root}", img_size=(8, 8), in_chans=channels).train.images.shape[1:] == (channels, 8, 8)


def test_cuts_of_a_training_set_all_follow_the_seed_of_the_split():
    labels = torch.arange(200) % 4
    images = ImageSet(torch.arange(200, dtype=torch.uint8).view(-1, 1, 1, 1), labels)
    for seed in (0, 3):
        config = DataConfig(data="x", val_fraction=0.1, split_seed=seed, limit=30)
        train, val = training_sets(Dataset("x", images, None, (), {}), config, fraction=0.5)
        rest, held = split(images, 0.1, seed)
        assert val.images.equal(held.images)
        assert train.images.equal(limit(label_fraction(rest, 0.5, seed), 30, seed).images)


def test_a_limit_may_be_all_there_are():
    images = ImageSet(torch.arange(5, dtype=torch.uint8).view(-1, 1, 1, 1), None)
    assert sorted(limit(images, 5, 0).images.flatten().tolist()) == list(range(5))


def test_images_are_made_smaller_bicubically_around_their_centre(tmp_path):
    picture = to_pillow(noise(1, (3, 40, 56))[0])
    picture.save(tmp_path / "x.png")
    expected = np.asarray(ImageOps.fit(picture, (12, 20), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.array_equal(load(f"folder:{tmp_path}", img_size=(20, 12)).train.images[0].numpy(), expected)


def test_sixteen_bits_are_rounded_to_eight(tmp_path):
    values = np.array([[0, 128, 129, 256], [257, 385, 386, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "x.png")
    data = load(f"folder:{tmp_path}", reading=Reading(value_range=FULL_16_BITS))
    assert data.train.images[0, 0].tolist() == [[0, 0, 1, 1], [1, 1, 2, 255]]


def test_images_between_one_and_two_times_pillows_limit_are_refused_too(tmp_path):
    """Pillow itself only warns there: 10,000 x 10,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 10_000, 10_000, 1, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(10_000 * 1251)))
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b""))
    Image.new("L", (8, 8)).save(tmp_path / "y.png")
    data = load(f"folder:{tmp_path}", img_size=(8, 8), in_chans=1)
    assert len(data.train) == 1 and data.skipped[0].startswith("x.png (more than 89 megapixels")
    ((_, problem), (_, image)) = next(read_batches([tmp_path / "x.png", tmp_path / "y.png"], (8, 8), 1, AS_IT_IS, 8))
    assert (
        isinstance(problem, str) and problem.startswith("more than 89 megapixels") and isinstance(image, torch.Tensor)
    )


def test_the_larger_part_of_a_patch_decides_and_a_half_does_not_hide_it(tmp_path):
    rows = ["1100", "1100", "0101", "0111"]  # patches of 2 x 2: all, none, a half, three quarters
    (tmp_path / "mask.txt").write_text("\n".join(rows))
    assert read_mask(tmp_path / "mask.txt", (2, 2), (4, 4)).tolist() == [1, 0, 0, 1]
    pixels = np.array([[255 * (cell == "0") for cell in row] for row in rows], np.uint8)
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    assert read_mask(Path(tmp_path / "mask.png"), (2, 2), (4, 4)).tolist() == [1, 0, 0, 1]
