"""Optimisers: Muon for wide matrices, AdamW for the rest, and which weights decay."""

import torch
from torch import Tensor, nn

WIDE = 32  # a matrix whose sides are both at least this long is Muon's


class Muon(torch.optim.AdamW):
    """AdamW, except in groups with `orthogonal`: there the step of a matrix is its momentum made orthogonal.

    The gradient of a weight matrix has a few large directions and many small ones. Made orthogonal, all of them step
    alike: M = U S V^T becomes nearly U V^T by five Newton-Schulz iterations, scaled so that lr means what it means to
    AdamW. torch.optim.Muon does it in bfloat16, 28 times slower than float32 on a CPU without such instructions.
    Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon; the scale is that of arXiv 2502.16982, section 2.2.
    """

    MOMENTUM = 0.95

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if group["orthogonal"] and p.grad is not None:
                    self.orthogonal_step(p, group["lr"], group["weight_decay"])
                    p.grad = None  # AdamW passes over it
        return super().step(closure)

    def orthogonal_step(self, p: nn.Parameter, lr: float, weight_decay: float) -> None:
        if not self.state[p]:  # AdamW looks for a step in every state that it loads
            self.state[p] |= {"step": torch.tensor(0.0), "momentum": torch.zeros_like(p)}
        momentum = self.state[p]["momentum"].mul_(self.MOMENTUM).add_(p.grad)
        step = self.orthogonal(p.grad + self.MOMENTUM * momentum) * 0.2 * max(p.shape) ** 0.5
        p.mul_(1 - lr * weight_decay).sub_(lr * step)

    @staticmethod
    def orthogonal(M: Tensor) -> Tensor:
        """Brings every singular value of M to about 1 (0.7 to 1.2); its singular vectors stay."""
        X = M / (M.norm() + 1e-7)  # all singular values at most 1
        tall = X.shape[0] > X.shape[1]
        for _ in range(5):
            square = X.T @ X if tall else X @ X.T  # the smaller of the two
            poly = -4.7750 * square + 2.0315 * square @ square
            X = 3.4445 * X + (X @ poly if tall else poly @ X)  # odd polynomial: acts on the singular values alone
        return X


def parameter_groups(module: nn.Module, weight_decay: float, muon: bool = False) -> list[dict]:
    """Decay for matrices only; none for A_log, D, norms, biases, embeddings, positions.

    muon: matrices of at least 32 x 32 are a group with `orthogonal`; narrow ones (dt_proj, x_proj) stay AdamW's.
    """
    decay, rest, wide = [], [], []
    for name, p in module.named_parameters():
        embedding = "embedding" in name and "patch" not in name
        if not p.requires_grad:
            continue
        if p.ndim < 2 or name.endswith("A_log") or embedding:
            rest.append(p)
        elif muon and p.ndim == 2 and min(p.shape) >= WIDE:
            wide.append(p)
        else:
            decay.append(p)
    groups = [
        {"params": decay, "weight_decay": weight_decay, "orthogonal": False},
        {"params": rest, "weight_decay": 0.0, "orthogonal": False},
    ]
    if wide:
        groups.append({"params": wide, "weight_decay": weight_decay, "orthogonal": True})
    return groups


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
