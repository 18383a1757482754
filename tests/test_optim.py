"""Which records a step visits, the learning rate, which weights decay, Muon.

pytest tests/test_optim.py
"""

import numpy as np
import pytest
import torch
from torch import nn

from common import optim
from common.optim import Muon, parameter_groups
from common.training import cosine, rows_of_step


def test_rows_of_step_visits_every_record_once_a_pass():
    visited = np.concatenate([rows_of_step(3, step, 4, 10) for step in range(5)])
    assert sorted(visited[:10]) == sorted(visited[10:]) == list(range(10))
    assert not np.array_equal(visited[:10], visited[10:])
    assert np.array_equal(rows_of_step(3, 2, 4, 10), visited[8:12])


def test_cosine_warms_up_and_comes_down():
    rates = [cosine(s, 100, 10) for s in range(100)]
    assert rates[0] == 0.1 and rates[9] == rates[10] == 1.0 == max(rates) and 0.02 <= rates[-1] < 0.03


def test_no_weight_decay_on_a_log_d_norms_biases_embeddings(mini):
    decay, rest = parameter_groups(mini, 0.1)
    names = {id(p): n for n, p in mini.named_parameters()}
    decayed = {names[id(p)] for p in decay["params"]}
    assert decay["weight_decay"] == 0.1 and rest["weight_decay"] == 0.0 and len(decayed) > 10
    forbidden = ("A_log", ".D", "norm", "bias", "embedding.weight", "class_embedding", "position_embedding")
    assert not [n for n in decayed if any(f in n for f in forbidden)]
    assert "lm.backbone.layers.0.mixer.in_proj.weight" in decayed
    assert len(decay["params"]) + len(rest["params"]) == len(names)
    wide = parameter_groups(mini, 0.1, muon=True)[2]
    assert wide["orthogonal"] and {id(p) for p in wide["params"]} < {id(p) for p in decay["params"]}
    assert "lm.backbone.layers.0.mixer.in_proj.weight" in {names[id(p)] for p in wide["params"]}
    assert not [p for p in wide["params"] if p.ndim != 2 or min(p.shape) < 32]


@pytest.mark.parametrize("shape", [(40, 96), (96, 40), (64, 64)])
def test_muon_steps_along_the_orthogonal_part_of_the_momentum(shape):
    """U V^T of the gradient, scaled to a root mean square of about 0.2; and three steps equal torch's, which rounds the
    iterations to bfloat16: singular values scatter there by a hundredth, so steps of 0.01 by some 1e-4."""
    torch.manual_seed(0)
    start, gradients = torch.randn(shape), torch.randn(3, *shape)
    U, S, V = torch.linalg.svd(Muon.orthogonal(gradients[0]), full_matrices=False)
    u, _, v = torch.linalg.svd(gradients[0], full_matrices=False)
    assert 0.6 < S.min() and S.max() < 1.3
    assert (U @ V - u @ v).abs().max() < 1e-4
    ours, torchs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    one = Muon([{"params": [ours], "orthogonal": True}], lr=0.01, weight_decay=0.05)
    other = torch.optim.Muon([torchs], lr=0.01, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    for gradient in gradients:
        for p, optimizer in ((ours, one), (torchs, other)):
            p.grad = gradient.clone()
            optimizer.step()
    assert 0.01 < (ours - start).abs().max() and (ours - torchs).abs().max() < 1e-3


class Peers:
    """Stands for torch.distributed in one of several processes: keeps its vector, and hands it `total` as their sum."""

    def __init__(self, rank: int, size: int, total=None):
        self.is_available = self.is_initialized = lambda: True
        self.get_rank = lambda: rank
        self.get_world_size = lambda: size
        self.total = total

    def all_reduce(self, flat):
        self.share = flat.clone()
        if self.total is not None:
            flat.copy_(self.total)


def test_muon_shares_its_work_among_processes_and_takes_the_same_steps(monkeypatch):
    """Of five matrices two of three processes orthogonalise two, the third one; the sum has every step, bit by bit."""
    torch.manual_seed(0)
    start, gradients = ([torch.randn(40, n) for n in (96, 96, 40, 96, 40)] for _ in range(2))

    def step(peers=None):
        if peers is not None:
            monkeypatch.setattr(optim, "dist", peers)
        matrices = [nn.Parameter(x.clone()) for x in start]
        for p, gradient in zip(matrices, gradients, strict=True):
            p.grad = gradient.clone()
        Muon([{"params": matrices, "orthogonal": True}], lr=0.01, weight_decay=0.05).step()
        return matrices

    alone = step()
    peers = [Peers(rank, 3) for rank in range(3)]
    for one in peers:
        step(one)
    shares = [one.share for one in peers]
    assert [int((share != 0).sum()) for share in shares] == [2 * 40 * 96, 40 * 96 + 40 * 40, 40 * 40]
    assert len(sum(shares)) == 3 * 40 * 96 + 2 * 40 * 40
    for rank in range(3):
        together = step(Peers(rank, 3, sum(shares)))
        assert all(torch.equal(a, b) and not torch.equal(a, c) for a, b, c in zip(alone, together, start, strict=True))


def test_muon_leaves_the_other_groups_to_adamw():
    torch.manual_seed(0)
    start, gradient = torch.randn(5, 7), torch.randn(5, 7)
    ours, torchs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    one = Muon([{"params": [ours], "orthogonal": False}], lr=0.01)
    other = torch.optim.AdamW([torchs], lr=0.01)
    for p, optimizer in ((ours, one), (torchs, other)):
        p.grad = gradient.clone()
        optimizer.step()
    assert torch.equal(ours, torchs) and not torch.equal(ours, start)


def test_muon_leaves_matrices_without_a_gradient():
    start = torch.ones(40, 40)
    ours = nn.Parameter(start.clone())
    Muon([{"params": [ours], "orthogonal": True}], lr=0.01, weight_decay=0.05).step()
    assert torch.equal(ours, start)
