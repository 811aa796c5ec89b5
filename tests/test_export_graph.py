"""The ONNX graph of every kind of model computes what the model does; `to_onnx` itself refuses what differs."""

from typing import Any

import onnx
import pytest
import torch
from hugging_face import randomize

from maelab.data.decode import Reading
from maelab.export import to_onnx
from maelab.model import MaskedAutoencoderViT, VisionTransformer
from maelab.training.checkpoint import ModelSpec

SMALL: dict[str, Any] = dict(img_size=(12, 20), patch_size=4, in_chans=2, embed_dim=24, depth=2, num_heads=3)
DECODER = dict(decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)


def checked(kind: type[VisionTransformer], part: str, **arguments: Any) -> onnx.ModelProto:
    torch.manual_seed(0)
    model = kind(**SMALL | arguments).eval()
    with torch.no_grad():
        randomize(model)
    spec = ModelSpec(kind.__name__, SMALL | arguments, "mnist", (), None, reading=Reading())
    content, difference = to_onnx(model, spec, part)
    assert difference < 5e-5
    proto = onnx.load_from_string(content)
    onnx.checker.check_model(proto, full_check=True)
    return proto


@pytest.mark.parametrize("part", ["encoder", "attention"])
@pytest.mark.parametrize(
    "arguments",
    [
        {"num_classes": 5, "class_token": False, "global_pool": "avg"},
        {"num_classes": 5, "class_token": True, "global_pool": "avg", "qkv_bias": False},
        {"num_classes": 5, "reg_tokens": 3, "global_pool": "token", "learned_pos_embed": True},
        {"num_classes": 5, "reg_tokens": 3, "global_pool": "avg", "mlp_ratio": 2.0, "depth": 1},
        {"num_classes": 1, "in_chans": 1, "img_size": 8, "patch_size": 8, "global_pool": "token"},
    ],
)
def test_a_classifier(part: str, arguments: dict[str, Any]):
    proto = checked(VisionTransformer, part, **arguments)
    outputs = [[d.dim_param or d.dim_value for d in o.type.tensor_type.shape.dim] for o in proto.graph.output]
    assert outputs[0] == ["batch", arguments["num_classes"]] and len(outputs) == 1 + (part == "attention")


@pytest.mark.parametrize("part", ["encoder", "autoencoder"])
@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("decoder", [{}, {"decoder_depth": 0, "qkv_bias": False, "norm_pix_loss": True}])
def test_an_autoencoder(part: str, class_token: bool, decoder: dict[str, Any]):
    proto = checked(MaskedAutoencoderViT, part, class_token=class_token, **DECODER | decoder)
    shape = [d.dim_param or d.dim_value for d in proto.graph.output[0].type.tensor_type.shape.dim]
    assert shape == (["batch", 15, 32] if part == "autoencoder" else ["batch", 24])


def test_weights_keep_the_names_that_they_have_in_the_model():
    names = {constant.name for constant in checked(VisionTransformer, "encoder", num_classes=5).graph.initializer}
    assert {"blocks.1.attn.qkv.weight", "patch_embed.proj.bias", "norm.weight", "head.weight"} <= names
