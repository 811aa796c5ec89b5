"""What a command does, as frozen dataclasses: a field exists only if it is read, and is validated on construction.

Each dataclass is flat, so that every field is a flag: `mask_ratio` is `--mask-ratio`, and the text under it its help.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from maelab.errors import UsageError

Resize = Literal["crop", "pad", "squash"]
ValueRange = tuple[tuple[float, float], ...]  # (low, high) of all channels together, or of each


@dataclass(frozen=True)
class Reading:
    """How the files of a folder become images and labels. A model keeps it, for the images that it is asked about."""

    resize: Resize = "crop"
    """how an image comes to its size; see `maelab.data.decode.to_size`"""
    value_range: ValueRange | None = None
    """what is stretched to 8 bits where numbers have more; None: to be found, or of a model, that it saw no such"""
    labels: str | None = None
    """the table that was asked for, as `--labels` says it"""
    group: str | None = None
    """what images of a group share, as `--group` says it"""


AS_IT_IS = Reading()


LARGEST = {  # of the numbers that build a model; what is beyond them takes minutes to build or refuse
    "depth": 1_000, "decoder_depth": 1_000, "embed_dim": 2**16, "decoder_embed_dim": 2**16, "num_heads": 2**12,
    "decoder_num_heads": 2**12, "patch_size": 2**12, "mlp_ratio": 2**8,
}  # fmt: skip
LARGEST_SIDE = 2**15  # of an image, pixels
LARGEST_COUNT = 2**63  # of everything that is counted; torch's seeds and sizes end here


# What is asked of a number, None apart: a test, the words for it, and the fields of which it is asked.
_BOUNDS: tuple[tuple[Callable[[Any], bool], str, frozenset[str]], ...] = (
    (lambda n: n >= 1, "be at least 1", frozenset({
        "limit", "epochs", "batch_size", "accumulate", "patch_size", "embed_dim", "depth", "num_heads",
        "decoder_embed_dim", "decoder_num_heads", "neighbours", "threads", "devices", "num_nodes",
    })),
    (lambda n: n >= 0, "be at least 0", frozenset({
        "split_seed", "seed", "blr", "weight_decay", "warmup_epochs", "clip_grad", "muon_lr", "crop_padding",
        "affine_degrees", "affine_scale", "affine_shear", "affine_translate", "elastic", "color_jitter",
        "rand_augment_ops", "rand_augment_magnitude", "decoder_depth", "reg_tokens", "knn_every", "mixup", "cutmix",
        "patience", "unlabelled",
    })),
    (lambda n: 0 < n < 1, "lie between 0 and 1", frozenset({"val_fraction", "beta2", "mask_ratio"})),
    (lambda n: 0 <= n < 1, "lie in [0, 1)", frozenset({"ema_decay", "drop_path", "patch_drop"})),
    (lambda n: 0 <= n <= 1, "lie between 0 and 1", frozenset({
        "crop_scale", "random_erasing", "label_fraction", "layer_decay", "label_smoothing",
    })),
    (lambda n: n > 0, "be above 0", frozenset({"mlp_ratio", "crop_scale", "label_fraction", "layer_decay"})),
    (lambda n: n < 1, "be below 1", frozenset({"affine_scale"})),
    (lambda n: n <= 10, "be at most 10", frozenset({"rand_augment_magnitude"})),
    (lambda n: n <= 1024, "be at most 1024", frozenset({"threads", "devices"})),
    (lambda n: n % 4 == 0, "be a multiple of 4 (position embedding)", frozenset({"embed_dim", "decoder_embed_dim"})),
    (lambda sides: min(sides) > 0, "be positive", frozenset({"img_size"})),
)  # fmt: skip
_DIVIDES = {"accumulate": "batch_size", "num_heads": "embed_dim", "decoder_num_heads": "decoder_embed_dim"}


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UsageError(message)


def _flag(field: str) -> str:
    return "--" + field.replace("_", "-")


def _in_short(value: object) -> str:
    """A wrong value, cut where it is long."""
    if isinstance(value, int) and abs(value) > 10**40:  # Python writes no number of more than 4,300 digits
        return f"a number of {int(value.bit_length() * math.log10(2)) + 1} digits"
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_count(flag: str, value: int, low: int = 0, largest: int = LARGEST_COUNT - 1) -> None:
    """Refuse a number that nothing can be counted by, or no generator of random numbers started with.

    Raises:
        UsageError: if it does not lie between `low` and `largest`.
    """
    if value < low:
        raise UsageError(f"{flag} must be at least {low}, got {_in_short(value)}")
    if value > largest:
        below = "2**63 - 1" if largest == LARGEST_COUNT - 1 else f"{largest}"
        raise UsageError(f"{flag} must be at most {below}, got {_in_short(value)}")


def _fits(value: object, kind: Any) -> bool:
    """Whether a value has the type of its field; an int serves as a float."""
    if get_origin(kind) is Literal:
        return any(value == choice and type(value) is type(choice) for choice in get_args(kind))
    if get_origin(kind) is tuple:
        parts = get_args(kind)
        return isinstance(value, tuple) and len(value) == len(parts) and all(map(_fits, value, parts))
    if options := get_args(kind):  # a union
        return any(_fits(value, option) for option in options)
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    return isinstance(value, int | float if kind is float else kind)


def _in_words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    options = [_in_words(option) for option in get_args(kind) if option is not NoneType]
    if get_origin(kind) is tuple:
        return f"{len(options)} whole numbers"
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", Path: "a path"}
    return " or ".join(options) or names.get(kind, str(kind))


_types = functools.cache(get_type_hints)


@dataclass(frozen=True, kw_only=True)
class _Config:
    def __post_init__(self) -> None:
        """Every value has its type, is neither infinite nor beyond any use, and keeps its bounds."""
        for field in dataclasses.fields(self):
            flag, value, kind = _flag(field.name), getattr(self, field.name), _types(type(self))[field.name]
            if isinstance(value, str) and Path in get_args(kind):  # a path is often written as text
                value = Path(value)
                object.__setattr__(self, field.name, value)
            _require(_fits(value, kind), f"{flag} must be {_in_words(kind)}, got {_in_short(value)}")
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, float):
                    _require(math.isfinite(number), f"{flag} must be a number, got {number}")
                if isinstance(number, int):
                    _require(abs(number) < LARGEST_COUNT, f"{flag} must be below 2**63, got {_in_short(number)}")
                largest = LARGEST_SIDE if field.name == "img_size" else LARGEST.get(field.name)
                if isinstance(number, int | float) and largest:
                    _require(number <= largest, f"{flag} must be at most {largest}, got {number}")
        values = {name: value for name, value in vars(self).items() if value is not None}
        for name, value in values.items():
            for good, words, fields in _BOUNDS:
                _require(name not in fields or good(value), f"{_flag(name)} must {words}, got {value}")
        for part, whole in _DIVIDES.items():
            if part in values:
                a, b = values[part], values[whole]
                _require(b % a == 0, f"{_flag(part)} {a} does not divide {_flag(whole)} {b}")


@dataclass(frozen=True, kw_only=True)
class DataConfig(_Config):
    """Which images a run sees."""

    data: str
    """mnist, fashion-mnist, cifar10, or folder:PATH"""
    val_fraction: float = 0.05
    """share of the training images held out for validation, where a folder has no val/ of its own"""
    split_seed: int = 0
    """seed of that split, apart from --seed so that runs with other seeds share their validation images"""
    limit: int | None = None
    """train on the first so many images of a seeded shuffle (quick tries)"""


@dataclass(frozen=True, kw_only=True)
class ReadingConfig(_Config):
    """How the files of a folder become images and labels."""

    resize: Resize = "crop"
    """how a folder's image comes to the size: crop cuts off what exceeds it, pad puts black around, squash distorts"""
    labels: str | None = None
    """table with the classes of a folder's images, PATH or PATH:COLUMN; None takes labels.csv or metadata.csv there"""
    group: str | None = None
    """keep images together on one side of every split: a column of that table, or a regular expression for what their
    paths share, such as 'video_[0-9]+'"""


@dataclass(frozen=True, kw_only=True)
class LoopConfig(_Config):
    """What the training loop reads."""

    seed: int = 0
    """seed of initialisation, order, augmentation and masks"""
    epochs: int = 10
    """passes over the training images"""
    batch_size: int = 256
    """images per optimizer step, over all processes and accumulated parts"""
    accumulate: int = 1
    """compute each batch in so many parts, to save memory"""
    blr: float = 1e-3
    """AdamW's base learning rate: the rate is blr * batch_size / 256"""
    weight_decay: float = 0.05
    """decoupled weight decay, not on norms, biases and embeddings"""
    beta2: float = 0.95
    """AdamW's second beta"""
    warmup_epochs: float = 1.0
    """linear warm-up, over half of the run at most; a cosine to zero follows"""
    clip_grad: float = 0.0
    """clip the gradient's norm; 0 is off"""
    ema_decay: float = 0.0
    """average the weights with this decay, from the start on, and use the average; 0 is off"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """arithmetic of the matrix products; auto takes bf16 where the hardware has units for it"""


@dataclass(frozen=True, kw_only=True)
class BlocksConfig(LoopConfig):
    """What the training loop reads where the model has blocks."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the matrices of the blocks, AdamW for the rest"""
    muon_lr: float = 0.02
    """Muon's learning rate"""


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(_Config):
    """Shape of the encoder."""

    img_size: tuple[int, int] | None = None
    """height and width to train at; None keeps the data's own"""
    patch_size: int = 4
    """side of a patch, pixels"""
    embed_dim: int = 192
    """width of the encoder"""
    depth: int = 12
    """blocks of the encoder"""
    num_heads: int = 3
    """attention heads of the encoder"""
    mlp_ratio: float = 4.0
    """hidden width of the MLPs over the width"""
    class_token: bool = True
    """have a class token"""
    learned_pos_embed: bool = False
    """learn the position embedding, instead of the fixed sine-cosine one"""


@dataclass(frozen=True, kw_only=True)
class Augment(_Config):
    """How training images are varied; all off by default."""

    crop_padding: int = 0
    """pad by so many black pixels on each side and crop back at random"""
    crop_scale: float = 1.0
    """random resized crop: the smallest share of the area to keep; 1 is off"""
    flip: bool = False
    """mirror left and right at random"""
    affine_degrees: float = 0.0
    """rotate by up to so many degrees"""
    affine_scale: float = 0.0
    """zoom by up to this share, in or out"""
    affine_shear: float = 0.0
    """shear by up to so many degrees"""
    affine_translate: float = 0.0
    """shift by up to this share of the width and height"""
    elastic: float = 0.0
    """elastic distortion: standard deviation of how far pixels move, as a share of the width and height"""
    color_jitter: float = 0.0
    """vary brightness, contrast and saturation by up to this share"""
    rand_augment_ops: int = 0
    """RandAugment (arXiv 1909.13719): operations per image; 0 is off"""
    rand_augment_magnitude: float = 9.0
    """RandAugment: strength of each operation, 0 to 10"""
    random_erasing: float = 0.0
    """erase a random rectangle with this probability (arXiv 1708.04896)"""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(Augment, BlocksConfig, EncoderConfig, ReadingConfig, DataConfig):
    """Pretrain a masked autoencoder on images; labels, if there are any, serve only to follow k-NN accuracy."""

    init: str = "none"
    """go on from these weights, which then decide the shape: of an autoencoder, or of an encoder alone with a new
    decoder; whatever finetune takes, other channels and image sizes included; none starts from scratch"""
    mask_ratio: float = 0.75
    """share of the patches to hide"""
    norm_pix_loss: bool = False
    """predict each patch normalised by its own mean and variance"""
    decoder_embed_dim: int = 192
    """width of the decoder"""
    decoder_depth: int = 4
    """blocks of the decoder"""
    decoder_num_heads: int = 3
    """attention heads of the decoder"""
    knn_every: int = 1
    """follow k-NN accuracy and the features' effective rank every so many epochs, where there are labels; 0 is never"""


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(Augment, BlocksConfig, EncoderConfig, ReadingConfig, DataConfig):
    """Train a classifier, from a pretrained encoder or from scratch."""

    init: str = "none"
    """where the encoder comes from: run folder or checkpoint, folder of transformers (ViTMAE, ViT, DINOv2) or hf:NAME
    from its hub, file of timm or of the original MAE; none starts from scratch"""
    adapt_patch_embed: Literal["inflate", "resize", "reinit"] = "inflate"
    """when the channels differ from --init: repeat or average the patch embedding's weights, or start it anew; resize:
    the same as inflate, and fit them to --patch-size (arXiv 2212.08013), which is otherwise that of --init"""
    adapt_pos_embed: Literal["interpolate", "reinit"] = "interpolate"
    """when the grid of patches differs from --init: resample the position embedding, or start it anew"""
    label_fraction: float = 1.0
    """train on a seeded, class-balanced share of the labelled images"""
    unlabelled: int = 0
    """for each labelled image of a step learn from so many others as well, without a look at labels, the more the surer
    the averaged model is of what they show (arXiv 2208.05688); needs --ema-decay, and --init a classifier of the same
    classes to begin with; 0 is off"""
    reg_tokens: int = 0
    """registers: learned tokens that nothing is read from (arXiv 2309.16588)"""
    global_pool: Literal["token", "avg"] = "avg"
    """classify from the class token, or from the mean of the patch tokens"""
    layer_decay: float = 1.0
    """multiply the learning rate by this for each layer below the head"""
    drop_path: float = 0.0
    """stochastic depth: rate of the last block"""
    patch_drop: float = 0.0
    """leave this share of the patches out of each training step (arXiv 2208.07220); 0 shows them all"""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: images of rare classes weigh more in the loss, so that each class counts alike"""
    label_smoothing: float = 0.0
    """share of the target spread over all classes"""
    mixup: float = 0.0
    """mixup (arXiv 1710.09412): alpha of the beta distribution; 0 is off"""
    cutmix: float = 0.0
    """cutmix (arXiv 1905.04899): alpha of the beta distribution; 0 is off"""
    patience: int = 0
    """stop when validation accuracy has not risen for so many epochs; 0 never stops early"""
    keep: Literal["best", "last"] = "best"
    """the weights of the best epoch on validation, or of the last: with few validation images the best is chance"""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.class_token or self.global_pool == "avg", "--global-pool token needs --class-token")
        _require(self.class_token or not self.reg_tokens, "--reg-tokens needs --class-token")
        _require(self.ema_decay > 0 or not self.unlabelled, "--unlabelled needs --ema-decay, such as 0.99")
        _require(self.keep == "best" or not self.patience, "--patience needs --keep best")


@dataclass(frozen=True, kw_only=True)
class ProbeConfig(LoopConfig, DataConfig):
    """Judge a frozen encoder: k-nearest neighbours and a linear classifier on its features."""

    init: str
    """run folder or checkpoint to judge"""
    data: str = "same"
    """data set to probe on; same is the one that --init was trained on"""
    label_fraction: float = 1.0
    """use a seeded, class-balanced share of the labelled training images"""
    pool: Literal["token", "avg"] = "avg"
    """features: the class token, or the mean of the patch tokens"""
    neighbours: int = 20
    """k of k-NN"""
    epochs: int = 100
    """passes over the training images"""
    blr: float = 1e-2
    """AdamW's base learning rate: the rate is blr * batch_size / 256"""


@dataclass(frozen=True, kw_only=True)
class ComputeOptions(_Config):
    """Where to compute; none of it changes what is computed, up to rounding."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """where to compute"""
    threads: int | None = None
    """CPU threads; None takes one per core"""
    kernels: Literal["auto", "torch"] = "auto"
    """auto: maelab's own kernels, in 16 bits, on a CPU with AVX2 or more, or NEON; torch: never those"""
    attention: Literal["auto", "matmul", "fused"] = "auto"
    """form of attention outside those kernels; auto: products in training on a CPU, else torch's fused kernel"""
    compile: Literal["auto", "on", "off"] = "auto"
    """auto: on CUDA, capture whole steps as graphs (several processes: torch.compile); on: compile too; off: neither"""


@dataclass(frozen=True, kw_only=True)
class DataOptions(ComputeOptions):
    """Where to compute and where the data lie."""

    data_dir: Path | None = None
    """folder that holds the data set's files already"""


@dataclass(frozen=True, kw_only=True)
class RunOptions(DataOptions):
    """Where a run happens and is kept."""

    out: Path | None = None
    """run folder; None takes the next free runs/TASK-RECIPE-N, or goes on with the last one if it is unfinished"""
    overwrite: bool = False
    """replace a complete run, or another one, in the run folder; this very run, unfinished, goes on all the same"""
    mirror: str | None = None
    """URL on object storage, e.g. s3://bucket/run, that gets a copy of the run folder at each save; what is there and
    further than the run folder is fetched first"""
    devices: int = 1
    """processes, one device each"""
    num_nodes: int = 1
    """machines"""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """of several processes: each has the whole model (ddp), or weights, gradients and AdamW's averages are shared out,
    for models that fill a device (fsdp)"""
    logger: Literal["tensorboard", "wandb", "mlflow"] = "tensorboard"
    """where curves, figures and weights go too; TensorBoard's events are always written. wandb: the run folder, to send
    later, unless WANDB_MODE is online; mlflow: mlflow.db here, unless MLFLOW_TRACKING_URI names another place"""
