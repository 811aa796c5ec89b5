"""Models that other libraries saved: Hugging Face's ViTMAE, ViT and DINOv2, timm's ViT, the original MAE."""

from pathlib import Path

from maelab.files import read_json
from maelab.foreign.hugging_face import from_hub, read_hugging_face, to_hugging_face
from maelab.foreign.tensors import MAX_JSON, Foreign, weights_in
from maelab.foreign.timm import read_timm
from maelab.runs import saved_elsewhere

__all__ = ["Foreign", "read_foreign", "to_hugging_face"]


def read_foreign(path: str | Path) -> Foreign | None:
    """Read a model that another library saved; None if `path` is no such thing.

    Args:
        path: 'hf:NAME' for a model of the Hugging Face hub, a folder of transformers (ViTMAE, ViT, DINOv2) or timm, or
            a file (.safetensors, .pth, .pt, .bin, .pth.tar) with timm's names or the original MAE's. Pickles are read
            with weights_only=True.

    The weights are changed, exactly, to take images in [-1, 1]: see `fold_normalisation`.

    Raises:
        UsageError: if it is a model that maelab's cannot express.
        RunError: if it is damaged, too large, or cannot be fetched.
    """
    if not saved_elsewhere(path):
        return None
    path = from_hub(str(path).removeprefix("hf:")) if str(path).startswith("hf:") else Path(path)
    if path.is_file():
        return read_timm(path)
    config = read_json(path / "config.json", MAX_JSON)
    return read_hugging_face(path) if "model_type" in config else read_timm(weights_in(path), config)
