"""What next-token distributions say, alone and of each other, from their log-probabilities (nats)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

# Rows at a time: a product of two distributions over 150,000 tokens takes as much memory as either of them.
_ROWS = 64


def kl_divergence(log_p: Float[Tensor, "rows vocabulary"], log_q: Float[Tensor, "rows vocabulary"]) -> Float[Tensor, " rows"]:
    """KL(p ‖ q) = Σ_v p_v (log p_v − log q_v) of every row; (rows,) float64, nats. Products in the dtype given, sums in float64.

    A token of probability 0 under p adds 0; one that only q rules out makes the row infinite or NaN.
    """
    parts = [_kl(p, q) for p, q in zip(torch.split(log_p, _ROWS), torch.split(log_q, _ROWS), strict=True)]
    # Rounding of nearly equal distributions can give −1e-9, which no divergence is.
    return torch.cat(parts).clamp_min(0)


def entropy(log_p: Float[Tensor, "rows vocabulary"]) -> Float[Tensor, " rows"]:
    """H(p) = −Σ_v p_v log p_v of every row; (rows,) float64, nats."""
    return torch.cat([-torch.where(p > -torch.inf, p.exp() * p, 0.0).sum(-1, dtype=torch.float64) for p in torch.split(log_p, _ROWS)]).clamp_min(0)


def restricted(log_p: Float[Tensor, "rows vocabulary"], size: int) -> Float[Tensor, "rows size"]:
    """The distributions over the first `size` tokens alone, renormalised."""
    return log_p if log_p.shape[-1] == size else log_p[..., :size].log_softmax(-1)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_q), 0.0).sum(-1, dtype=torch.float64)
