"""A second way to predict the contact, besides the paper's head: point at a cell of a fine map of the picture.

    stem 32 x 32, 16 x 16 --.
    tokens 8 x 8 ------------> FineMap (B, C, 32, 32) --.
    last state of the words ----------------------------> PointingHead -> a logit and a direction per cell -> peak

The paper's head regresses one point amid all likely ones: given two good contacts, it predicts a point between them. A
map has room for both. The presets tiny, tiny-rgbd and small have these parts (`fine` in common/config.py); the sizes
above are those of tiny.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.config import VisionConfig

SPREAD = 0.6  # standard deviation of the contact's Gaussian soft label, in cells


class FineMap(nn.Module):
    """Brings the tokens to the stem's resolution, four times theirs: the map that the pointing head reads.

    Top-down as in a feature pyramid (arXiv 1612.03144): the tokens as a map, doubled in size twice, each time added to
    the stem's features at that size and mixed by a convolution. Not in the paper.
    """

    def __init__(self, cfg: VisionConfig):
        super().__init__()
        C = cfg.fine
        widths = (cfg.width, cfg.stem[-1], cfg.stem[-2])
        self.inputs = nn.ModuleList(nn.Conv2d(width, C, 1) for width in widths)
        self.mixes = nn.ModuleList(nn.Conv2d(C, C, 3, padding=1) for _ in range(2))
        self.norms = nn.ModuleList(nn.GroupNorm(8, C) for _ in range(2))

    def forward(self, tokens: Tensor, seen: list[Tensor]) -> Tensor:
        """tokens (B, P, W) and the stem's maps, each half the size of the one before -> (B, C, 4 sqrt P, 4 sqrt P)."""
        x = self.inputs[0](as_map(tokens))
        details = (seen[-1], seen[-2])
        for project, mix, norm, detail in zip(self.inputs[1:], self.mixes, self.norms, details, strict=True):
            x = F.interpolate(x, scale_factor=2.0) + project(detail)
            x = x + F.silu(norm(mix(x)))
        return x


def as_map(tokens: Tensor) -> Tensor:
    """(B, P, W) row by row -> (B, W, sqrt P, sqrt P)."""
    B, P, W = tokens.shape
    return tokens.transpose(1, 2).reshape(B, W, math.isqrt(P), -1).contiguous()


class PointingHead(nn.Module):
    """A state and a map -> for every cell of the map, whether it is the contact, and in which direction to grip there.

    The state scales and shifts the map's channels (FiLM, arXiv 1709.07871), before and after they are mixed. The state
    first passes through `narrow` units, as in the policy head: 0.1 % of the parameters in all. Not in the paper.
    """

    def __init__(self, d_model: int, channels: int, hidden: int = 16, outputs: int = 4, narrow: int = 8):
        super().__init__()
        self.state = nn.Linear(d_model, narrow)
        self.outer = nn.Linear(narrow, 2 * channels)
        self.inner = nn.Linear(narrow, 2 * hidden)
        self.mix = nn.Conv2d(channels, hidden, 1)
        self.norm = nn.GroupNorm(8, hidden)
        self.out = nn.Conv2d(hidden, outputs, 1)

    def forward(self, state: Tensor, x: Tensor) -> Tensor:
        """(n, d_model), (n, C, H, H) -> (n, outputs, H, H): logit of the contact, direction in the camera frame."""
        state = F.silu(self.state(state))
        scale, shift = self.outer(state)[..., None, None].chunk(2, 1)
        x = F.silu(x * (1 + scale) + shift)
        scale, shift = self.inner(state)[..., None, None].chunk(2, 1)
        x = F.silu(self.norm(self.mix(x)) * (1 + scale) + shift)
        return self.out(x)


def peak(heat: Tensor, way: Tensor) -> tuple[Tensor, Tensor]:
    """heat (n, H, H), way (n, 3, H, H) -> contact (n, 2) in -1 .. 1, direction (n, 3), unit.

    Both are means over the 3 x 3 cells about the highest one, weighted by the softmax of heat.
    """
    n, H, _ = heat.shape
    best = heat.flatten(1).argmax(1)
    cells = torch.arange(H, device=heat.device)
    near = ((cells - (best // H)[:, None]).abs() <= 1)[:, :, None] & ((cells - (best % H)[:, None]).abs() <= 1)[:, None]
    weight = heat.masked_fill(~near, -math.inf).flatten(1).softmax(1).view(n, H, H)
    places = (cells + 0.5) * 2 / H - 1
    point = torch.stack([weight.sum(1) @ places, weight.sum(2) @ places], 1)
    return point, F.normalize((way * weight[:, None]).sum((2, 3)), dim=1, eps=1e-6)


def pointing_losses(heat: Tensor, way: Tensor, contact: Tensor, approach: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy (nats) of heat (n, H, H) against a Gaussian about the contact; error of way (n, 3, H, H) there.

    contact: (n, 2) column and row in cells; approach: (n, 3), unit, camera frame. The error is L1 plus 1 - cosine.
    """
    H = heat.shape[-1]
    here = contact.round().long().clamp(0, H - 1)
    aim = way[torch.arange(len(way)), :, here[:, 1], here[:, 0]]
    error = F.l1_loss(aim, approach) + (1 - F.cosine_similarity(aim, approach)).mean()
    return -(soft_label(contact, H) * heat.flatten(1).log_softmax(1)).sum(1).mean(), error


def soft_label(contact: Tensor, side: int) -> Tensor:
    """(n, 2), cells -> (n, side * side) distribution about it."""
    cells = torch.arange(side, device=contact.device)
    column, row = (-((cells - x[:, None]) ** 2) / (2 * SPREAD**2) for x in contact.unbind(1))
    return torch.softmax((row[:, :, None] + column[:, None]).flatten(1), 1)
