"""Vision Transformer (Dosovitskiy et al. 2020, arXiv 2010.11929), with timm's names for arguments and state."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from maelab.model.pos_embed import sincos_pos_embed

LAYER_NORM_EPS = 1e-6


def patchify(imgs: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Cut images into patches, row by row; inside a patch the order is row, column, channel.

    Args:
        imgs: (B, C, H, W), H and W multiples of patch_size.

    Returns:
        (B, L, patch_size ** 2 * C), L = H * W / patch_size ** 2.
    """
    B, C, H, W = imgs.shape
    p = patch_size
    x = imgs.reshape(B, C, H // p, p, W // p, p).permute(0, 2, 4, 3, 5, 1)  # (B, rows, columns, p, p, C)
    return x.reshape(B, (H // p) * (W // p), p * p * C)


def take_tokens(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Tokens (B, L, D) at places `ids` (B, K) -> (B, K, D)."""
    return torch.gather(x, 1, ids.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def dot_product_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, form: Literal["auto", "matmul", "fused"] = "auto"
) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v over (B, heads, L, d), as two batched products and a softmax or as one fused kernel.

    'auto' takes the products for training on a CPU, where the backward pass of the fused kernel is several times
    slower at the lengths that small images give, and the fused kernel elsewhere.
    """
    if form == "auto":
        form = "matmul" if q.device.type == "cpu" and torch.is_grad_enabled() else "fused"
    if form == "fused":
        return F.scaled_dot_product_attention(q, k, v)
    weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, heads, L, L)
    return weights.softmax(dim=-1).to(v.dtype) @ v


class DropPath(nn.Module):
    """Stochastic depth per sample (Huang et al. 2016, arXiv 1603.09382), scaled so that the expectation is kept."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def scale(self, x: torch.Tensor) -> torch.Tensor | None:
        """The factor of each sample of x, (B, 1, 1); None where all are kept."""
        if self.rate == 0.0 or not self.training:
            return None
        keep = 1.0 - self.rate
        return x.new_empty(x.shape[0], 1, 1).bernoulli_(keep).div_(keep)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.scale(x)
        return x if scale is None else x * scale


class PatchEmbed(nn.Module):
    """Linear embedding of patches. The weight has timm's shape (D, C, p, p); input is what `patchify` returns,
    so that a masked autoencoder embeds only the patches that it shows."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        weight = self.proj.weight.permute(0, 2, 3, 1).flatten(1)  # (D, p * p * C), the order of patchify
        return F.linear(patches, weight, self.proj.bias)  # (B, L, D)


class Attention(nn.Module):
    """Multi-head self-attention; `form` may be set to force a form of `dot_product_attention`."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.form: Literal["auto", "matmul", "fused"] = "auto"
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, tail: int | None = None) -> torch.Tensor:
        B, L, D = x.shape
        qkv = self.qkv(x).reshape(B, L, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # each (B, heads, L, d)
        if tail is not None:
            q = q[:, :, L - tail :]
        x = dot_product_attention(q, k, v, self.form)
        return self.proj(x.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers with a GELU between."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm Transformer block. `fast`, where it is set, computes what it can of `forward` and returns None for the
    rest: (block, x, tail) -> tokens or None."""

    fast: "Callable[[Block, torch.Tensor, int | None], torch.Tensor | None] | None" = None

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float = 4.0, qkv_bias: bool = True, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = Attention(dim, num_heads, qkv_bias)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio + 1e-4))  # 416 / 960 * 960 is 415.99...
        self.drop_path = DropPath(drop_path)

    def forward(self, x: torch.Tensor, tail: int | None = None) -> torch.Tensor:
        """Tokens (B, L, D) -> (B, L, D); with `tail`, only the last `tail` tokens, which still attend to all."""
        if self.fast is not None and (done := self.fast(self, x, tail)) is not None:
            return done
        attended = self.drop_path(self.attn(self.norm1(x), tail))
        x = (x if tail is None else x[:, x.shape[1] - tail :]) + attended
        return x + self.drop_path(self.mlp(self.norm2(x)))


class VisionTransformer(nn.Module):
    """A Vision Transformer classifier or feature extractor for images of any channel count and size.

    Args:
        img_size: height and width in pixels, or one number for both; patch_size must divide them.
        patch_size: side of a square patch, pixels.
        in_chans: image channels.
        num_classes: outputs of the head; 0 leaves the head out.
        embed_dim: width D.
        depth: number of blocks.
        num_heads: attention heads; must divide embed_dim.
        mlp_ratio: hidden width of the MLP over D.
        qkv_bias: learn a bias for queries, keys and values.
        drop_path_rate: stochastic depth of the last block; earlier blocks rise to it linearly.
        patch_drop_rate: share of the patches that training leaves out, drawn for each image anew, as in masked
            pretraining; int(L * (1 - rate)) stay, one at least (Liu et al. 2022, arXiv 2208.07220).
        global_pool: 'token' classifies from the class token after `norm`; 'avg' from the mean of the patch tokens,
            normalised by `fc_norm`.
        class_token: have a class token; needed by global_pool='token'.
        reg_tokens: learned tokens after the class token that nothing is read from and that have no position
            (registers: Darcet et al. 2023, arXiv 2309.16588).
        learned_pos_embed: learn the position embedding, instead of the fixed sine-cosine one.

    Raises:
        ValueError: if the sizes do not fit together.
    """

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 32,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 10,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.0,
        patch_drop_rate: float = 0.0,
        global_pool: Literal["token", "avg"] = "token",
        class_token: bool = True,
        reg_tokens: int = 0,
        learned_pos_embed: bool = False,
    ) -> None:
        super().__init__()
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        if height % patch_size or width % patch_size:
            raise ValueError(f"patch_size {patch_size} does not divide the image size {height}x{width}")
        if embed_dim % num_heads:
            raise ValueError(f"num_heads {num_heads} does not divide embed_dim {embed_dim}")
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"drop_path_rate must lie in [0, 1), got {drop_path_rate}")
        if not 0 <= patch_drop_rate < 1:
            raise ValueError(f"patch_drop_rate must lie in [0, 1), got {patch_drop_rate}")
        if reg_tokens and not class_token:
            raise ValueError("reg_tokens needs class_token=True")
        if global_pool == "token" and num_classes and not class_token:
            raise ValueError("global_pool='token' needs class_token=True")
        self.img_size = (height, width)
        self.patch_size = patch_size
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.embed_dim = embed_dim
        self.global_pool = global_pool
        self.grid_size = (height // patch_size, width // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.num_prefix_tokens = int(class_token) + reg_tokens
        self.learned_pos_embed = learned_pos_embed
        self.patch_drop_rate = patch_drop_rate

        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if class_token else None
        self.reg_token = nn.Parameter(torch.zeros(1, reg_tokens, embed_dim)) if reg_tokens else None
        self.pos_embed = self._new_pos_embed(embed_dim)
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()  # numbers even for a model on "meta"
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio, qkv_bias, rate) for rate in rates)
        average = num_classes > 0 and global_pool == "avg"
        self.norm = nn.Identity() if average else nn.LayerNorm(embed_dim, eps=LAYER_NORM_EPS)
        self.fc_norm = nn.LayerNorm(embed_dim, eps=LAYER_NORM_EPS) if average else nn.Identity()
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self.reset_parameters()

    def _new_pos_embed(self, dim: int) -> nn.Parameter:
        """A position embedding of `dim` channels, (1, L, dim) or with that of a class token first, fixed unless
        learned ones were asked for."""
        embed = sincos_pos_embed(dim, self.grid_size, class_token=self.cls_token is not None)
        return nn.Parameter(embed, requires_grad=self.learned_pos_embed)

    def reset_parameters(self) -> None:
        """Initialise as in MAE: Xavier-uniform matrices (the patch embedding too), tokens from N(0, 0.02), and a
        head so small that training starts at the uniform prediction. Learned positions start from the fixed ones."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))  # a view: initialises the weight itself
        nn.init.zeros_(self.patch_embed.proj.bias)  # type: ignore[arg-type]
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=0.02)
        if self.reg_token is not None:
            nn.init.normal_(self.reg_token, std=0.02)
        if isinstance(self.head, nn.Linear):
            nn.init.trunc_normal_(self.head.weight, std=2e-5)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay leaves alone beside norms and biases."""
        return {"pos_embed", "cls_token"} | (set() if self.reg_token is None else {"reg_token"})

    def to_patches(self, imgs: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) -> patches (B, L, p * p * C).

        Raises:
            ValueError: if channels, height or width are not the model's.
        """
        expected = (self.in_chans, *self.img_size)
        if tuple(imgs.shape[1:]) != expected:
            raise ValueError(f"images of shape {tuple(imgs.shape[1:])} (C, H, W) for a model of {expected}")
        return patchify(imgs, self.patch_size)

    def embed(self, patches: torch.Tensor, ids_keep: torch.Tensor | None = None) -> torch.Tensor:
        """Embed patches, add positions and put the class token and the registers first.

        Args:
            patches: (B, L or len_keep, p * p * C).
            ids_keep: (B, len_keep) places of the patches in the grid; None means all, in order.

        Returns:
            (B, prefix + len_keep, D).
        """
        positions = self.pos_embed[0, -self.num_patches :]  # (L, D)
        x = self.patch_embed(patches) + (positions if ids_keep is None else positions[ids_keep])
        prefix = [] if self.cls_token is None else [self.cls_token + self.pos_embed[:, :1]]
        prefix += [] if self.reg_token is None else [self.reg_token]
        return torch.cat([*(token.to(x.dtype).expand(x.shape[0], -1, -1) for token in prefix), x], dim=1)

    def encode(self, patches: torch.Tensor, ids_keep: torch.Tensor | None = None) -> torch.Tensor:
        """All patches (B, L, p * p * C), and the places to show (B, len_keep), None being all
        -> tokens (B, prefix + len_keep, D)."""
        # Hidden patches are never embedded.
        x = self.embed(patches if ids_keep is None else take_tokens(patches, ids_keep), ids_keep)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward_features(self, imgs: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) in [-1, 1] -> tokens (B, prefix + L, D), unmasked but for `patch_drop_rate` in training;
        after `norm` unless it is replaced by `fc_norm`."""
        ids_keep = None
        if self.training and self.patch_drop_rate:
            noise = torch.rand(imgs.shape[0], self.num_patches, device=imgs.device)
            len_keep = max(1, int(self.num_patches * (1 - self.patch_drop_rate)))
            ids_keep = noise.argsort(dim=1)[:, :len_keep]
        return self.encode(self.to_patches(imgs), ids_keep)

    def pool(self, tokens: torch.Tensor, kind: Literal["token", "avg"] | None = None) -> torch.Tensor:
        """Tokens (B, prefix + L, D) -> (B, D): the class token, or the mean of the patch tokens."""
        if (kind or self.global_pool) == "token":
            return tokens[:, 0]
        return tokens[:, self.num_prefix_tokens :].mean(dim=1)

    def forward_head(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (B, prefix + L, D) -> logits (B, num_classes)."""
        return self.head(self.fc_norm(self.pool(tokens)))

    def forward(self, imgs: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) in [-1, 1] -> logits (B, num_classes)."""
        return self.forward_head(self.forward_features(imgs))
