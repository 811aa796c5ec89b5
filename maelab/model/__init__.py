"""The networks, written from the paper (He et al. 2021, arXiv 2111.06377); imports torch only."""

from maelab.model.mae import MaskedAutoencoderViT, random_masking, unpatchify
from maelab.model.pos_embed import interpolate_pos_embed, sincos_pos_embed
from maelab.model.vit import VisionTransformer, patchify

__all__ = [
    "MaskedAutoencoderViT",
    "VisionTransformer",
    "interpolate_pos_embed",
    "patchify",
    "random_masking",
    "sincos_pos_embed",
    "unpatchify",
]
