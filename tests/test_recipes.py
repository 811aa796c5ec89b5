"""Recipes: each builds a config whose model fits its data, and says its command."""

from dataclasses import replace

import pytest
import torch

from maelab import recipes
from maelab.config import FinetuneConfig, PretrainConfig
from maelab.data import Dataset, ImageSet
from maelab.errors import UsageError
from maelab.model import MaskedAutoencoderViT
from maelab.runs.commands import ENCODER
from maelab.tasks import finetune, pretrain
from maelab.weights import load_encoder

SHAPES = {"mnist": (1, 28, 28), "fashion-mnist": (1, 28, 28), "cifar10": (3, 32, 32), "folder:PATH": (3, 64, 64)}
EVERY = [(task, name) for task in ("pretrain", "finetune") for name in recipes.names(task)]


def data_of(config: PretrainConfig | FinetuneConfig) -> Dataset:
    """Two blank images of the shape that the recipe's data has."""
    channels, height, width = SHAPES[config.data]
    height, width = config.img_size or (height, width)
    images = ImageSet(torch.zeros(2, channels, height, width, dtype=torch.uint8), torch.tensor([0, 1]))
    return Dataset(config.data, images, images, tuple("0123456789"), {})


def test_there_are_recipes_for_both_tasks_and_a_smoke_recipe_for_each():
    for task in ("pretrain", "finetune"):
        assert {"mnist", "cifar10", "smoke"} <= set(recipes.names(task))
    assert len(EVERY) == len({name for name in vars(recipes) if name.startswith(("pretrain_", "finetune_"))})


@pytest.mark.parametrize(("task", "name"), EVERY)
def test_recipe_builds_its_config_and_names_its_command(task, name):
    config = recipes.get(task, name)
    assert isinstance(config, PretrainConfig if task == "pretrain" else FinetuneConfig)
    assert config == recipes.get(task, name)
    text = getattr(recipes, f"{task}_{name}").__doc__
    assert text.startswith(f"`maelab {task} {name}"), text
    assert ("--init RUN" in text.split("`")[1]) == (task == "finetune")


@pytest.mark.parametrize(("task", "name"), EVERY)
def test_recipe_fits_its_data(task, name):
    config = recipes.get(task, name)
    data = data_of(config)
    images = data.train.images.float() / 127.5 - 1
    if isinstance(config, PretrainConfig):
        model = pretrain.model_spec(config, data).build()
        assert torch.isfinite(model(images, config.mask_ratio)[0])
    else:
        model = finetune.model_spec(config, data).build()
        assert model(images).shape == (2, 10)


@pytest.mark.parametrize("name", recipes.names("finetune"))
def test_fine_tuning_starts_from_the_pretraining_recipe_of_the_same_name(name):
    before, after = recipes.get("pretrain", name), recipes.get("finetune", name)
    assert isinstance(before, PretrainConfig) and isinstance(after, FinetuneConfig)
    source = pretrain.model_spec(before, data_of(before)).build()
    model = finetune.model_spec(after, data_of(after)).build()
    assert isinstance(source, MaskedAutoencoderViT)
    assert load_encoder(model, source) == []  # type: ignore[arg-type]


def test_a_digit_encoder_transfers_to_cifar10():
    """The shape comes from the initial weights; the recipe's other fields stay."""
    before, after = recipes.pretrain_mnist(), recipes.finetune_cifar10()
    init = pretrain.model_spec(before, data_of(before))
    fitted = finetune.with_encoder_of(after, init)
    assert replace(fitted, **{field: getattr(after, field) for field in ENCODER}) == after
    model, source = finetune.model_spec(fitted, data_of(after)).build(), init.build()
    adapted = load_encoder(model, source)  # type: ignore[arg-type]
    assert [phrase.split(" ")[0] for phrase in adapted] == ["position", "patch"]


def test_smoke_is_small():
    config = recipes.pretrain_smoke()
    assert config.depth == 2 and config.embed_dim == 32 and config.limit is not None and config.limit <= 1024


@pytest.mark.parametrize(
    ("task", "name", "hint"),
    [
        ("pretrain", "minst", "there is no pretrain recipe 'minst'; did you mean mnist?"),
        ("finetune", "cifar", "there is no finetune recipe 'cifar'; did you mean cifar10?"),
        ("pretrain", "?", "there is no pretrain recipe '?'; choose from mnist, "),
        ("pretrain", "__init__", "there is no pretrain recipe '__init__'"),
    ],
)
def test_an_unknown_recipe_names_the_nearest(task, name, hint):
    with pytest.raises(UsageError) as refused:
        recipes.get(task, name)
    assert str(refused.value).startswith(hint)


@pytest.mark.parametrize(("images", "grey"), [(100, False), (4_999, True), (5_000, False), (60_000, False)])
def test_recipe_folder_fine_tunes_as_it_pretrains(images, grey):
    before, after = recipes.pretrain_folder(images, 70, grey), recipes.finetune_folder(images, 70, grey)
    for field in ("val_fraction", "img_size", "patch_size", "embed_dim", "depth", "num_heads", "class_token",
                  "batch_size", "optimizer", "crop_padding", "flip"):  # fmt: skip
        assert getattr(before, field) == getattr(after, field), field
    assert before.optimizer == "muon" and before.crop_padding == 72 // 8 and before.flip is not grey
    assert before.embed_dim == (96 if images < 5_000 else 192) and before.depth == (6 if images < 50_000 else 12)
    text = recipes.explain_folder(before, images, 70, 1 if grey else 3)
    assert f"chosen for {images} images: 72x72 pixels" in text and f"in batches of {before.batch_size}" in text
    assert text.endswith(f"mirrored: {'no' if grey else 'yes'}") and ("1 channel;" in text) is grey


@pytest.mark.parametrize(
    ("images", "share"), [(1, 0.2), (5_000, 0.2), (8_000, 0.125), (12_500, 0.08), (20_000, 0.05), (10**6, 0.05)]
)
def test_about_a_thousand_images_are_for_validation_a_fifth_at_most_and_a_twentieth_at_least(images, share):
    assert recipes.pretrain_folder(images).val_fraction == recipes.finetune_folder(images).val_fraction == share


def test_a_patch_size_is_that_of_the_initial_weights_unless_they_are_resized():
    init = pretrain.model_spec(recipes.pretrain_smoke(), data_of(recipes.pretrain_smoke()))
    asked = replace(recipes.finetune_mnist(), init="x", patch_size=14)
    assert finetune.with_encoder_of(asked, init).patch_size == init.arguments["patch_size"] == 7
    resized = finetune.with_encoder_of(replace(asked, adapt_patch_embed="resize"), init)
    assert resized.patch_size == 14 and resized.embed_dim == init.arguments["embed_dim"] == 32
