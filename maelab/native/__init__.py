"""Transformer blocks and Muon in native code, on CPUs with AVX2 or more, or NEON: tensors and numbers in and out.

Optional. `available` says whether the kernels are here and `reason` why not; `refusal` names the shapes that they do
not serve. Nothing here knows the modules of `maelab.model`; `maelab.training.blocks` has those use it.
"""

from maelab.native.block import MAX_TOKENS, refusal, run_block
from maelab.native.library import available, peak_flops, reason, start, torch_multiplies_bf16
from maelab.native.muon import Muon

__all__ = [
    "MAX_TOKENS",
    "Muon",
    "available",
    "peak_flops",
    "reason",
    "refusal",
    "run_block",
    "start",
    "torch_multiplies_bf16",
]
