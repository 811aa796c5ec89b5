"""The graph of a model in ONNX, written node by node from `maelab.model.vit` and `maelab.model.mae`.

torch's own exporter traces any module, and takes half a minute for one of these (docs/log.md). They have one
architecture, and these lines are it.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from maelab.model import MaskedAutoencoderViT, VisionTransformer
from maelab.model.vit import Block

if TYPE_CHECKING:
    import onnx

OPSET, IR = 17, 10  # of ONNX: the first with LayerNormalization; and of the file: what onnxruntime 1.22 reads


class _Graph:
    """Nodes and constants so far. `add` returns the name of what a node computes."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}

    def constant(self, value: Any, name: str = "") -> str:
        """A number, a list of whole numbers, or a tensor, which keeps its type."""
        from onnx import numpy_helper

        array = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
        if not isinstance(value, torch.Tensor):
            array = array.astype(np.float32 if array.dtype == np.float64 else np.int64)
            name = name or f"{array.dtype}:{array.tolist()}".replace(" ", "")
        self.constants[name] = numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name)
        return name

    def add(self, op: str, *inputs: str, to: str = "", **attributes: Any) -> str:
        from onnx import helper

        name = to or f"{op}.{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], name, **attributes))
        return name

    def reshape(self, x: str, *shape: int) -> str:
        """A size of 0 stays as it is."""
        return self.add("Reshape", x, self.constant(list(shape)))

    def mean(self, x: str, axis: int) -> str:
        return self.add("ReduceMean", x, axes=[axis], keepdims=0)

    def from_place(self, x: str, start: int, axis: int) -> str:
        """What lies from `start` on along an axis."""
        if start == 0:
            return x
        return self.add("Slice", x, self.constant([start]), self.constant([2**31 - 1]), self.constant([axis]))

    def linear(self, x: str, layer: nn.Linear, name: str) -> str:
        x = self.add("MatMul", x, self.constant(layer.weight.T, f"{name}.weight"))
        return x if layer.bias is None else self.add("Add", x, self.constant(layer.bias, f"{name}.bias"))

    def norm(self, x: str, layer: nn.Module, name: str) -> str:
        if not isinstance(layer, nn.LayerNorm):
            return x  # the identity
        weights = (self.constant(layer.weight, f"{name}.weight"), self.constant(layer.bias, f"{name}.bias"))
        return self.add("LayerNormalization", x, *weights, axis=-1, epsilon=layer.eps)

    def gelu(self, x: str) -> str:
        """x (1 + erf(x / sqrt 2)) / 2; runtimes know it in this form."""
        erf = self.add("Erf", self.add("Div", x, self.constant(2**0.5)))
        return self.add("Mul", self.add("Mul", x, self.add("Add", erf, self.constant(1.0))), self.constant(0.5))

    def take_tokens(self, x: str, ids: str, width: int) -> str:
        """Tokens (B, L, D) at places `ids` (B, K) -> (B, K, D)."""
        places = self.add("Expand", self.add("Unsqueeze", ids, self.constant([2])), self.constant([1, 1, width]))
        return self.add("GatherElements", x, places, axis=1)

    def block(self, x: str, block: Block, name: str) -> tuple[str, str]:
        """Tokens (B, L, D) -> tokens, and what each attends to, (B, heads, L, L)."""
        heads, width = block.attn.num_heads, block.norm1.normalized_shape[0]
        qkv = self.linear(self.norm(x, block.norm1, f"{name}.norm1"), block.attn.qkv, f"{name}.attn.qkv")
        qkv = self.add("Transpose", self.reshape(qkv, 0, -1, 3, heads, width // heads), perm=[2, 0, 3, 1, 4])
        q, k, v = (self.add("Gather", qkv, self.constant(n), axis=0) for n in range(3))  # each (B, heads, L, d)
        q = self.add("Mul", q, self.constant((width // heads) ** -0.5))
        weights = self.add("Softmax", self.add("MatMul", q, self.add("Transpose", k, perm=[0, 1, 3, 2])), axis=-1)
        mixed = self.add("Transpose", self.add("MatMul", weights, v), perm=[0, 2, 1, 3])
        attended = self.linear(self.reshape(mixed, 0, -1, width), block.attn.proj, f"{name}.attn.proj")
        x = self.add("Add", x, attended)
        hidden = self.linear(self.norm(x, block.norm2, f"{name}.norm2"), block.mlp.fc1, f"{name}.mlp.fc1")
        return self.add("Add", x, self.linear(self.gelu(hidden), block.mlp.fc2, f"{name}.mlp.fc2")), weights

    def encoder(self, model: VisionTransformer, ids_keep: str = "") -> tuple[str, list[str]]:
        """Images, of which `ids_keep` (B, K) are seen -> tokens (B, prefix + K, D), and each block's attention."""
        p, (rows, columns), L = model.patch_size, model.grid_size, model.num_patches
        x = self.reshape("images", 0, model.in_chans, rows, p, columns, p)
        x = self.reshape(self.add("Transpose", x, perm=[0, 2, 4, 3, 5, 1]), 0, L, p * p * model.in_chans)  # patchify
        positions = self.constant(model.pos_embed[0, -L:], "pos_embed")
        if ids_keep:
            x = self.take_tokens(x, ids_keep, p * p * model.in_chans)
            positions = self.add("Gather", positions, ids_keep, axis=0)
        projection = model.patch_embed.proj
        weight = projection.weight.permute(2, 3, 1, 0).flatten(0, 2)  # (p * p * C, D), the order of patchify
        x = self.add("MatMul", x, self.constant(weight, "patch_embed.proj.weight"))
        if projection.bias is not None:
            x = self.add("Add", x, self.constant(projection.bias, "patch_embed.proj.bias"))
        x = self.add("Add", x, positions)
        prefix = [] if model.cls_token is None else [model.cls_token + model.pos_embed[:, :1]]
        prefix += [] if model.reg_token is None else [model.reg_token]
        if prefix:
            batch = self.add("Shape", "images", start=0, end=1)
            shape = self.add("Concat", batch, self.constant([1, 1]), axis=0)
            first = self.add("Expand", self.constant(torch.cat(prefix, dim=1), "prefix"), shape)
            x = self.add("Concat", first, x, axis=1)
        seen = []
        for number, block in enumerate(model.blocks):
            assert isinstance(block, Block)
            x, weights = self.block(x, block, f"blocks.{number}")
            seen.append(weights)
        return self.norm(x, model.norm, "norm"), seen

    def decoder(self, model: MaskedAutoencoderViT, latent: str) -> str:
        """Tokens (B, prefix + K, D) -> pixels of every patch, (B, L, p * p * C): `forward_decoder`."""
        prefix, width = model.num_prefix_tokens, model.decoder_embed.out_features
        x = self.linear(latent, model.decoder_embed, "decoder_embed")
        kept = self.add("Shape", "ids_keep", start=1, end=2)
        seen = self.add("Unsqueeze", self.add("Less", "ids_restore", kept), self.constant([2]))  # (B, L, 1)
        place = self.add("Min", "ids_restore", self.add("Sub", kept, self.constant([1])))
        tokens = self.take_tokens(self.from_place(x, prefix, axis=1), place, width)
        tokens = self.add("Where", seen, tokens, self.constant(model.mask_token, "mask_token"))
        if prefix:
            ends = (self.constant([0]), self.constant([prefix]), self.constant([1]))
            tokens = self.add("Concat", self.add("Slice", x, *ends), tokens, axis=1)
        x = self.add("Add", tokens, self.constant(model.decoder_pos_embed, "decoder_pos_embed"))
        for number, block in enumerate(model.decoder_blocks):
            assert isinstance(block, Block)
            x, _ = self.block(x, block, f"decoder_blocks.{number}")
        x = self.norm(self.from_place(x, prefix, axis=1), model.decoder_norm, "decoder_norm")
        return self.linear(x, model.decoder_pred, "decoder_pred")

    def pool(self, model: VisionTransformer, tokens: str, kind: str) -> str:
        if kind == "token":
            return self.add("Gather", tokens, self.constant(0), axis=1)
        return self.mean(self.from_place(tokens, model.num_prefix_tokens, axis=1), 1)

    def rollout(self, model: VisionTransformer, maps: list[str]) -> str:
        """`maelab.inference.attention_rollout` and `attention_to_patches`: (B, rows, columns)."""
        prefix, rolled = model.num_prefix_tokens, ""
        identity = self.constant(torch.eye(prefix + model.num_patches), "identity")
        for weights in maps:
            layer = self.add("Add", self.mean(weights, 1), identity)
            layer = self.add("Div", layer, self.add("ReduceSum", layer, self.constant([2]), keepdims=1))
            rolled = self.add("MatMul", layer, rolled) if rolled else layer
        if model.global_pool == "token":
            received = self.add("Gather", rolled, self.constant(0), axis=1)
        else:
            received = self.mean(self.from_place(rolled, prefix, axis=1), 1)
        return self.reshape(self.from_place(received, prefix, axis=1), 0, *model.grid_size)


def graph_of(model: VisionTransformer, part: str) -> "onnx.ModelProto":
    """The graph of a model for images (B, C, H, W) in [-1, 1], for any B.

    Args:
        model: a classifier or a masked autoencoder.
        part: 'autoencoder': (images, ids_keep, ids_restore) -> pred, for any number of patches seen; 'attention':
            images -> (logits, attention); 'encoder': images -> logits, or features where the model has no head.
    """
    from onnx import TensorProto, helper

    graph, L = _Graph(), model.num_patches
    inputs: list[tuple[str, int, list[str | int]]] = [
        ("images", TensorProto.FLOAT, ["batch", model.in_chans, *model.img_size])
    ]
    outputs: list[tuple[str, list[str | int]]]
    if part == "autoencoder":
        assert isinstance(model, MaskedAutoencoderViT)
        inputs += [("ids_keep", TensorProto.INT64, ["batch", "kept"]), ("ids_restore", TensorProto.INT64, ["batch", L])]
        latent, _ = graph.encoder(model, "ids_keep")
        made = [graph.decoder(model, latent)]
        outputs = [("pred", ["batch", L, model.patch_size**2 * model.in_chans])]
    else:
        tokens, maps = graph.encoder(model)
        if isinstance(model.head, nn.Linear):
            pooled = graph.norm(graph.pool(model, tokens, model.global_pool), model.fc_norm, "fc_norm")
            head = [graph.constant(value, f"head.{name}") for name, value in model.head.named_parameters()]
            made = [graph.add("Gemm", pooled, *head, transB=1)]  # no MatMul: pages keep it as it is
            outputs = [("logits", ["batch", model.num_classes])]
        else:
            made, outputs = [graph.pool(model, tokens, "avg")], [("features", ["batch", model.embed_dim])]
        if part == "attention":
            made.append(graph.rollout(model, maps))
            outputs.append(("attention", ["batch", *model.grid_size]))
    for name, (public, _) in zip(made, outputs, strict=True):
        graph.add("Identity", name, to=public)
    proto = helper.make_graph(
        graph.nodes,
        "maelab",
        [helper.make_tensor_value_info(*one) for one in inputs],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs],
        [*graph.constants.values()],
    )
    return helper.make_model(
        proto, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR, producer_name="maelab"
    )
