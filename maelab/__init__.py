"""maelab: pretrain masked autoencoders from scratch and turn their encoders into image classifiers."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maelab.config import ComputeOptions as ComputeOptions
    from maelab.config import DataOptions as DataOptions
    from maelab.config import FinetuneConfig as FinetuneConfig
    from maelab.config import PretrainConfig as PretrainConfig
    from maelab.config import ProbeConfig as ProbeConfig
    from maelab.config import RunOptions as RunOptions
    from maelab.data import Dataset as Dataset
    from maelab.data import ImageSet as ImageSet
    from maelab.data import load as load_data  # noqa: F401
    from maelab.errors import MaelabError as MaelabError
    from maelab.fitting import fit as fit
    from maelab.inference import attention_maps as attention_maps
    from maelab.inference import class_probabilities as class_probabilities
    from maelab.inference import extract_features as extract_features
    from maelab.model import MaskedAutoencoderViT as MaskedAutoencoderViT
    from maelab.model import VisionTransformer as VisionTransformer
    from maelab.tasks.attention import attention as attention
    from maelab.tasks.evaluate import evaluate as evaluate
    from maelab.tasks.features import features as features
    from maelab.tasks.finetune import finetune as finetune
    from maelab.tasks.predict import predict as predict
    from maelab.tasks.pretrain import pretrain as pretrain
    from maelab.tasks.probe import probe as probe
    from maelab.tasks.reconstruct import reconstruct as reconstruct
    from maelab.training.checkpoint import load_model as load_model

__version__ = "1.0.0"

# Where each public name lives; loaded on first use, so that `import maelab` and `maelab --help` need no torch.
_HOME = {
    "ComputeOptions": ("maelab.config", "ComputeOptions"),
    "DataOptions": ("maelab.config", "DataOptions"),
    "Dataset": ("maelab.data", "Dataset"),
    "FinetuneConfig": ("maelab.config", "FinetuneConfig"),
    "ImageSet": ("maelab.data", "ImageSet"),
    "MaelabError": ("maelab.errors", "MaelabError"),
    "MaskedAutoencoderViT": ("maelab.model", "MaskedAutoencoderViT"),
    "PretrainConfig": ("maelab.config", "PretrainConfig"),
    "ProbeConfig": ("maelab.config", "ProbeConfig"),
    "RunOptions": ("maelab.config", "RunOptions"),
    "VisionTransformer": ("maelab.model", "VisionTransformer"),
    "attention": ("maelab.tasks.attention", "attention"),
    "attention_maps": ("maelab.inference", "attention_maps"),
    "class_probabilities": ("maelab.inference", "class_probabilities"),
    "evaluate": ("maelab.tasks.evaluate", "evaluate"),
    "extract_features": ("maelab.inference", "extract_features"),
    "features": ("maelab.tasks.features", "features"),
    "finetune": ("maelab.tasks.finetune", "finetune"),
    "fit": ("maelab.fitting", "fit"),
    "load_data": ("maelab.data", "load"),
    "load_model": ("maelab.training.checkpoint", "load_model"),
    "predict": ("maelab.tasks.predict", "predict"),
    "pretrain": ("maelab.tasks.pretrain", "pretrain"),
    "probe": ("maelab.tasks.probe", "probe"),
    "reconstruct": ("maelab.tasks.reconstruct", "reconstruct"),
}
__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __dir__() -> list[str]:
    return [*globals(), *__all__]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'maelab' has no attribute {name!r}")
    module, attribute = _HOME[name]
    return getattr(import_module(module), attribute)
