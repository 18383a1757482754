"""The Transformer baseline that Mamba is compared with: the same number of parameters, the same interface.

    other = parameter_matched(model)      # a RoboMamba whose language model is a Transformer
    x (B, L, D), state -> TransformerBlock -> x (B, L, D), state        state: keys and values of every token so far

extras/speed.py measures what remembering the whole past costs.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robomamba import LMConfig, RMSNorm, RoboMamba, init_weights


def parameter_matched(model: RoboMamba) -> RoboMamba:
    """A RoboMamba of the same shapes around a Transformer with as many parameters; all weights are random.

    One block replaces two Mamba blocks (Mamba paper, section 3.4). It cannot be saved as a checkpoint folder.
    """
    other = RoboMamba(model.config, model.encoding)
    other.lm.backbone.layers = transformer_blocks(model.config.lm)
    return other.eval()


def transformer_blocks(cfg: LMConfig) -> nn.ModuleList:
    """ceil(n_layer / 2) blocks with as many parameters as n_layer Mamba blocks, initialised as in robomamba.py."""
    n = math.ceil(cfg.n_layer / 2)
    blocks = nn.ModuleList(TransformerBlock(cfg, cfg.n_layer / n) for _ in range(n))
    init_weights(blocks)
    for block in blocks:
        for last in (block.mixer.out_proj, block.mlp[2]):  # so the residual stream does not grow with depth
            last.weight.data /= math.sqrt(cfg.n_layer)
    return blocks


class KeyValues(NamedTuple):
    keys: Tensor  # (B, heads, L so far, width of a head)
    values: Tensor


def append(past: Tensor, new: Tensor) -> Tensor:
    """past (B, H, L, d) and new (B, H, 1, d) joined along time.

    Copying a long past costs more than attending to it, so storage has spare capacity and the new token is written
    after the past. If another sequence that shares this past wrote there first, everything is copied.
    """
    n = past.shape[2]
    storage = getattr(past, "storage_with_room", None)  # lost, and so never shared, when rows are picked by index
    if storage is None or storage.used != n or n == storage.shape[2]:
        storage = past.new_empty(*past.shape[:2], 2 * n + 64, past.shape[3])
        storage[:, :, :n] = past
    storage[:, :, n : n + 1], storage.used = new, n + 1
    both = storage[:, :, : n + 1]
    both.storage_with_room = storage
    return both


class CausalAttention(nn.Module):
    """Multi-head causal attention, as a mixer with the interface of MambaMixer; its state grows with every token.

    No position code: the causal mask alone conveys order (arXiv 2305.19466), and this is the fastest choice.
    """

    def __init__(self, cfg: LMConfig):
        super().__init__()
        self.width = math.gcd(cfg.d_model, 64)  # of a head
        self.in_proj = nn.Linear(cfg.d_model, 3 * cfg.d_model, bias=False)
        self.out_proj = nn.Linear(cfg.d_model, cfg.d_model, bias=False)

    def forward(self, x: Tensor, state: KeyValues | None = None) -> tuple[Tensor, KeyValues]:
        """(B, L, D) and the state before it -> (B, L, D) and the state after it."""
        B, L, D = x.shape
        q, k, v = self.in_proj(x).view(B, L, 3, -1, self.width).permute(2, 0, 3, 1, 4)  # (B, heads, L, width) each
        past = state.keys.shape[2] if state else 0
        if past:
            k, v = (append(a, b) if L == 1 else torch.cat([a, b], 2) for a, b in zip(state, (k, v), strict=True))
        seen = torch.ones(L, past + L, dtype=torch.bool, device=x.device).tril(past) if past and L > 1 else None
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=not past)
        return self.out_proj(y.transpose(1, 2).reshape(B, L, D)), KeyValues(k, v)


class TransformerBlock(nn.Module):
    """Pre-norm: x + attention(norm x), then x + mlp(norm x); the same interface as MambaBlock.

    The MLP is sized to match the parameters of `stands_for` Mamba blocks, up to rounding (`tiny`: 4.6 d_model wide).
    """

    def __init__(self, cfg: LMConfig, stands_for: float = 2):
        super().__init__()
        D = cfg.d_model
        mamba = cfg.d_inner * (3 * D + 2 * cfg.rank + 3 * cfg.d_state + cfg.d_conv + 3) + D  # parameters of a block
        left = mamba * stands_for - 4 * D * D - 2 * D  # for the MLP
        hidden = max(8, 8 * round(left / (2 * D) / 8))
        self.norm = RMSNorm(D, eps=cfg.norm_eps)
        self.mlp_norm = RMSNorm(D, eps=cfg.norm_eps)
        self.mixer = CausalAttention(cfg)
        self.mlp = nn.Sequential(nn.Linear(D, hidden, bias=False), nn.GELU(), nn.Linear(hidden, D, bias=False))

    def forward(self, x: Tensor, state: KeyValues | None = None) -> tuple[Tensor, KeyValues]:
        one_token = x.ndim == 2  # (B, D)
        if one_token:
            x = x[:, None]
        y, state = self.mixer(self.norm(x.to(self.norm.weight.dtype)), state)
        x = x + y
        x = x + self.mlp(self.mlp_norm(x.to(self.norm.weight.dtype)))
        return (x[:, 0] if one_token else x), state
