"""Optimisers: Muon for wide matrices, AdamW for the rest, and which weights decay."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

WIDE = 32  # Muon updates matrices with both sides at least this long


class Muon(torch.optim.AdamW):
    """AdamW, except in groups with `orthogonal`, where a matrix's step is its orthogonalised momentum.

    The gradient of a weight matrix has a few large directions and many small ones. Orthogonalised, all take equal
    steps: five Newton-Schulz iterations turn M = U S V^T into nearly U V^T, scaled so that lr means the same as in
    AdamW. torch.optim.Muon does this in bfloat16, 28 times slower than float32 on a CPU without such instructions.
    Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon; the scale is from arXiv 2502.16982, section 2.2.
    """

    MOMENTUM = 0.95

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            matrices = [p for p in group["params"] if group["orthogonal"] and p.grad is not None]
            if matrices:
                self.orthogonal_step(matrices, group["lr"], group["weight_decay"])
        return super().step(closure)

    def orthogonal_step(self, matrices: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        """One step for each matrix (m, n), in place; sizes may differ, each has a gradient.

        Of several processes, which have the same gradients, each orthogonalises its share; their sum has every step.
        """
        alike: dict = {}  # grouped by shape on a GPU, for one batched product; a CPU is faster one by one
        steps = {}
        for p in matrices:
            if not self.state[p]:  # AdamW expects a step in every state that it loads
                self.state[p] |= {"step": torch.tensor(0.0), "momentum": torch.zeros_like(p)}
            momentum = self.state[p]["momentum"].mul_(self.MOMENTUM).add_(p.grad)
            steps[p] = p.grad + self.MOMENTUM * momentum
            p.grad = None  # so that AdamW skips it
            alike.setdefault(p if p.device.type == "cpu" else p.shape, []).append(p)
        alone = not (dist.is_available() and dist.is_initialized())
        rank, processes = (0, 1) if alone else (dist.get_rank(), dist.get_world_size())
        for number, same in enumerate(alike.values()):
            M = torch.stack([steps[p] for p in same])
            M = self.orthogonal(M) if number % processes == rank else torch.zeros_like(M)
            steps |= zip(same, M * 0.2 * max(M.shape[1:]) ** 0.5, strict=True)
        flat = torch.cat([steps[p].flatten() for p in matrices])
        if not alone:
            dist.all_reduce(flat)
        for p, step in zip(matrices, flat.split([p.numel() for p in matrices]), strict=True):
            p.mul_(1 - lr * weight_decay).sub_(lr * step.view_as(p))

    @staticmethod
    def orthogonal(M: Tensor) -> Tensor:
        """Brings singular values of M (.., m, n) above 0.003 |M| to 0.7 .. 1.2, smaller ones less far; vectors stay."""
        X = M / (M.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # all singular values at most 1
        tall = X.shape[-2] > X.shape[-1]
        for _ in range(5):
            square = X.mT @ X if tall else X @ X.mT  # the smaller of the two
            poly = -4.7750 * square + 2.0315 * square @ square
            X = 3.4445 * X + (X @ poly if tall else poly @ X)  # odd polynomial: acts on the singular values alone
        return X


def parameter_groups(module: nn.Module, weight_decay: float, muon: bool = False) -> list[dict]:
    """Weight decay for matrices only; none for A_log, D, norms, biases, and embeddings other than of patches.

    muon: matrices of at least 32 x 32 form a group with `orthogonal`; narrow ones such as dt_proj stay with AdamW.
    """
    decay = {"params": [], "weight_decay": weight_decay, "orthogonal": False}
    rest = {"params": [], "weight_decay": 0.0, "orthogonal": False}
    wide = {"params": [], "weight_decay": weight_decay, "orthogonal": True}
    for name, p in module.named_parameters():
        if not p.requires_grad:
            continue
        if p.ndim < 2 or name.endswith("A_log") or ("embedding" in name and "patch" not in name):
            group = rest
        elif muon and p.ndim == 2 and min(p.shape) >= WIDE:
            group = wide
        else:
            group = decay
        group["params"].append(p)
    return [decay, rest, wide] if wide["params"] else [decay, rest]


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
