"""Transformer blocks and Muon in native code, for CPUs with AMX or AVX-512: tensors and plain numbers in and out.

Optional. `available` says whether the kernels are here and `reason` why not; `refusal` names the shapes that they do
not serve. Nothing here knows the modules of `maelab.model`; `maelab.training.blocks` has those use it.
"""

from maelab.native.block import MAX_TOKENS, refusal, run_block
from maelab.native.library import available, reason, start
from maelab.native.muon import Muon

__all__ = ["MAX_TOKENS", "Muon", "available", "reason", "refusal", "run_block", "start"]
