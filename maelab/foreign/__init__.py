"""Models that other libraries saved: Hugging Face's ViTMAE, ViT and DINOv2, timm's ViT, the original MAE."""

from pathlib import Path

from maelab.errors import RunError
from maelab.files import read_json
from maelab.foreign.hugging_face import from_hub, read_hugging_face, to_hugging_face
from maelab.foreign.tensors import MAX_JSON, Foreign, weights_in
from maelab.foreign.timm import read_timm

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
    path = from_hub(str(path).removeprefix("hf:")) if str(path).startswith("hf:") else Path(path)
    if path.is_file() and path.name.endswith((".safetensors", ".pth", ".pt", ".bin", ".pth.tar")):
        return read_timm(path)
    try:
        config = read_json(path / "config.json", MAX_JSON)
    except RunError:  # for others to name
        return None
    if "architecture" in config and "model_type" not in config:
        return read_timm(weights_in(path), config)
    return read_hugging_face(path) if "model_type" in config else None
