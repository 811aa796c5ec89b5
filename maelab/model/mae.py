"""Masked autoencoder (He et al. 2021, arXiv 2111.06377), with the names of the paper's code."""

import torch
from torch import nn

from maelab.model import masks
from maelab.model.vit import LAYER_NORM_EPS, Block, VisionTransformer, take_tokens

NORM_PIX_EPS = 1e-6


def unpatchify(x: torch.Tensor, patch_size: int, grid: tuple[int, int]) -> torch.Tensor:
    """Inverse of `patchify`: (B, L, p * p * C) -> (B, C, rows * p, columns * p)."""
    B, p = x.shape[0], patch_size
    rows, columns = grid
    x = x.reshape(B, rows, columns, p, p, -1).permute(0, 5, 1, 3, 2, 4)  # (B, C, rows, p, columns, p)
    return x.reshape(B, -1, rows * p, columns * p)


def random_masking(
    x: torch.Tensor, mask_ratio: float, noise: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keep a random subset of each sample's tokens (He et al. 2021, section 3): those with the smallest noise.

    Args:
        x: (B, L, D).
        mask_ratio: share of tokens to hide; `masks.len_keep` are kept.
        noise: (B, L); drawn uniformly when None.

    Returns:
        x_visible (B, len_keep, D), mask (B, L) with 1 = hidden, ids_restore (B, L).
    """
    B, L, _ = x.shape
    len_keep = masks.len_keep(L, mask_ratio)
    if noise is None:
        noise = torch.rand(B, L, device=x.device)
    ids_shuffle = torch.argsort(noise, dim=1, stable=True)
    ids_restore = torch.argsort(ids_shuffle, dim=1)
    mask = (ids_restore >= len_keep).float()
    return take_tokens(x, ids_shuffle[:, :len_keep]), mask, ids_restore


class MaskedAutoencoderViT(VisionTransformer):
    """Masked autoencoder with a Vision Transformer encoder: hides patches, encodes the rest, rebuilds the hidden.

    Args:
        decoder_embed_dim, decoder_depth, decoder_num_heads: shape of the decoder.
        norm_pix_loss: predict each patch normalised by its own mean and variance (section 4.1).
        others: as VisionTransformer; there is no classification head.
    """

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 32,
        patch_size: int = 4,
        in_chans: int = 3,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        class_token: bool = True,
        learned_pos_embed: bool = False,
        decoder_embed_dim: int = 192,
        decoder_depth: int = 4,
        decoder_num_heads: int = 3,
        norm_pix_loss: bool = False,
    ) -> None:
        super().__init__(
            img_size=img_size, patch_size=patch_size, in_chans=in_chans, num_classes=0, embed_dim=embed_dim,
            depth=depth, num_heads=num_heads, mlp_ratio=mlp_ratio, qkv_bias=qkv_bias, class_token=class_token,
            global_pool="token" if class_token else "avg", learned_pos_embed=learned_pos_embed,
        )  # fmt: skip
        if decoder_embed_dim % decoder_num_heads:
            raise ValueError(
                f"decoder_num_heads {decoder_num_heads} does not divide decoder_embed_dim {decoder_embed_dim}"
            )
        self.norm_pix_loss = norm_pix_loss
        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = self._new_pos_embed(decoder_embed_dim)
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_embed_dim, decoder_num_heads, mlp_ratio, qkv_bias) for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim, eps=LAYER_NORM_EPS)
        self.decoder_pred = nn.Linear(decoder_embed_dim, patch_size**2 * in_chans)
        self.reset_parameters()
        nn.init.normal_(self.mask_token, std=0.02)

    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | {"mask_token", "decoder_pos_embed"}

    def _ids(
        self, imgs: torch.Tensor, mask_ratio: float, noise: torch.Tensor | None, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, int]:
        """ids_shuffle (B, L), the visible places first, and how many they are, from the caller's mask or from noise."""
        B, L = imgs.shape[0], self.num_patches
        if mask is not None:
            hidden = mask.reshape(B, L).bool().sum(dim=1)
            if not bool((hidden == hidden[0]).all()):
                raise ValueError("all masks of a batch must hide the same number of patches")
            noise, len_keep = mask.reshape(B, L).bool().to(torch.uint8), L - int(hidden[0])
        else:
            noise = torch.rand(B, L, device=imgs.device) if noise is None else noise.reshape(B, L)
            len_keep = masks.len_keep(L, mask_ratio)
        if len_keep < 1:
            raise ValueError(f"a mask ratio of {mask_ratio} leaves none of the {L} patches visible")
        return torch.argsort(noise, dim=1, stable=True), len_keep

    def forward_encoder(
        self,
        imgs: torch.Tensor,
        mask_ratio: float = 0.75,
        noise: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Encode the visible patches of images (B, C, H, W).

        Returns:
            latent (B, prefix + len_keep, D), mask (B, L) with 1 = hidden, ids_restore (B, L).
        """
        ids_shuffle, len_keep = self._ids(imgs, mask_ratio, noise, mask)
        ids_restore = torch.argsort(ids_shuffle, dim=1)  # its inverse
        latent = self.encode(self.to_patches(imgs), ids_shuffle[:, :len_keep])
        return latent, (ids_restore >= len_keep).float(), ids_restore

    def forward_decoder(self, latent: torch.Tensor, ids_restore: torch.Tensor) -> torch.Tensor:
        """Latent (B, prefix + len_keep, D) and ids_restore (B, L) -> prediction for every patch (B, L, p * p * C)."""
        prefix, L = self.num_prefix_tokens, ids_restore.shape[1]
        x = self.decoder_embed(latent)
        mask_tokens = self.mask_token.to(x.dtype).expand(x.shape[0], L + prefix - x.shape[1], -1)
        tokens = take_tokens(torch.cat([x[:, prefix:], mask_tokens], dim=1), ids_restore)  # back in grid order
        x = torch.cat([x[:, :prefix], tokens], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x[:, prefix:]))

    def target(self, patches: torch.Tensor) -> torch.Tensor:
        """What the decoder should predict for patches (..., p * p * C): their pixels, or with norm_pix_loss the pixels
        normalised by the patch's mean and (unbiased) variance."""
        if not self.norm_pix_loss:
            return patches
        mean, var = patches.mean(dim=-1, keepdim=True), patches.var(dim=-1, keepdim=True)
        return (patches - mean) / (var + NORM_PIX_EPS).sqrt()

    def forward_loss(self, imgs: torch.Tensor, pred: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Mean squared error over the hidden patches: imgs (B, C, H, W), pred (B, L, p * p * C), mask (B, L)."""
        target = self.target(self.to_patches(imgs))
        loss = (pred.float() - target).square().mean(dim=-1)  # (B, L)
        return (loss * mask).sum() / mask.sum()

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        imgs: torch.Tensor,
        mask_ratio: float = 0.75,
        noise: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Hide, encode, decode and compare.

        Args:
            imgs: (B, C, H, W) in [-1, 1].
            mask_ratio: share of patches to hide.
            noise: (B, L) that decides which; drawn when None.
            mask: (B, L), 1 = hide; used instead of ratio and noise. Every row must hide the same number.

        Returns:
            loss (scalar), pred (B, L, p * p * C), mask (B, L) with 1 = hidden.
        """
        latent, mask, ids_restore = self.forward_encoder(imgs, mask_ratio, noise, mask)
        if latent.shape[1] == self.num_prefix_tokens + self.num_patches:
            raise ValueError("no patch is hidden, so there is nothing to predict; see forward_encoder")
        pred = self.forward_decoder(latent, ids_restore)
        return self.forward_loss(imgs, pred, mask), pred, mask

    def training_loss(
        self, imgs: torch.Tensor, mask_ratio: float = 0.75, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The loss of `forward`, computing only what it reads.

        Self-attention does not mind the order of tokens, so the decoder keeps them shuffled: visible first, hidden
        last. Nothing is moved back, and the last block, the norm and the prediction run on the hidden tokens alone.
        """
        ids_shuffle, len_keep = self._ids(imgs, mask_ratio, noise, None)
        if len_keep == self.num_patches:
            raise ValueError(f"a mask ratio of {mask_ratio} hides none of the {len_keep} patches")
        patches = self.to_patches(imgs)  # (B, L, p * p * C)
        latent = self.encode(patches, ids_shuffle[:, :len_keep])

        prefix, hidden = self.num_prefix_tokens, self.num_patches - len_keep
        positions = self.decoder_pos_embed[0, prefix:][ids_shuffle]  # (B, L, D)
        x = self.decoder_embed(latent)
        visible = x[:, prefix:] + positions[:, :len_keep]
        # Expanded first over the tokens: its gradient is then summed over the batch in whole rows, 20 times faster.
        masked = self.mask_token.expand(-1, hidden, -1) + positions[:, len_keep:]
        x = torch.cat([x[:, :prefix] + self.decoder_pos_embed[:, :prefix], visible, masked.to(visible.dtype)], dim=1)
        for block in self.decoder_blocks[:-1]:
            x = block(x)
        x = self.decoder_blocks[-1](x, tail=hidden) if len(self.decoder_blocks) else x[:, x.shape[1] - hidden :]
        pred = self.decoder_pred(self.decoder_norm(x))  # (B, hidden, p * p * C)
        return (pred.float() - self.target(take_tokens(patches, ids_shuffle[:, len_keep:]))).square().mean()
