"""Cross-view attention: CV-SIM, cross-viewpoint semantics infusion."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from otcxr.errors import ConfigError

__all__ = ["CrossViewAttention"]


class CrossViewAttention(nn.Module):
    """Multi-head attention from the tokens of one view to the tokens of the other one.

        R = W_o concat_h( A_h V_h ),   A_h = softmax( Q_h K_h^T / sqrt(D / heads) )  over valid keys
        Q = W_q LN(query),   K, V = W_k, W_v LN(other)

    One layer, pre-norm, no position code, the same weights in both directions. The softmax runs in at least float32.
    Source: OTCXR (WACV 2025) for cross-view attention; layer count, norm and sharing are our choices (METHOD step 3).
    """

    def __init__(self, dim: int, heads: int = 8) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ConfigError(
                f"method.heads = {heads} does not divide the {dim} channels of the last map; "
                f"use one of {[h for h in (1, 2, 4, 8, 16) if dim % h == 0]}"
            )
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, query: Tensor, other: Tensor, other_valid: Tensor) -> tuple[Tensor, Tensor]:
        """Attend.

        Args:
            query: Tokens of this view, (B, n, D).
            other: Tokens of the other view, (B, m, D).
            other_valid: (B, m) bool; False tokens are no keys. Every row needs at least one True.
        Returns: R (B, n, D) and the attention weights (B, heads, n, m), rows summing to 1.
        """
        batch, n, dim = query.shape
        m, size = other.shape[1], dim // self.heads
        q = self.query(self.norm(query)).view(batch, n, self.heads, size).transpose(1, 2)
        k, v = self.key_value(self.norm(other)).view(batch, m, 2, self.heads, size).permute(2, 0, 3, 1, 4)
        with torch.autocast(query.device.type, enabled=False):
            # at least float32: a half-precision softmax would lose the small masses
            wide = torch.promote_types(q.dtype, torch.float32)
            logits = (q.to(wide) @ k.to(wide).transpose(-1, -2)) / size**0.5
            weights = logits.masked_fill(~other_valid[:, None, None, :], float("-inf")).softmax(-1)
            infused = (weights @ v.to(wide)).transpose(1, 2).reshape(batch, n, dim)
        return self.out(infused.to(v.dtype)), weights
