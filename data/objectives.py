"""What the stages of train.py minimise. The layers made here are auxiliary heads: no checkpoint keeps them.

DenseObjective    stage 0: dense labels of the simulator for each patch token; `NamedPart` asks for a part by words
AnswerObjective   stages 1.1 and 1.2: the model's own next-token loss (RoboMamba section 3.2), and its numbers
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.dataset import N_NUMBERS
from data.dense import FINE, GRID, N_CATEGORIES, N_COLOURS, N_KINDS, Cells, DenseBatch, NamedParts
from data.tokenizer import NUMBERS


class DenseObjective(nn.Module):
    """Stage 0, dense supervision: each patch token predicts the simulator's labels for its 2 x 2 cells (data/dense.py).

    The mean of the tokens predicts category and colour of the object; where a folder tells of named parts, `NamedPart`
    asks for them. All read-outs are auxiliary heads and thrown away after the stage.
    Args: teacher: "dense", "captions" (CLIP's contrastive loss alone) or "both". named: the data tell of named parts.
    """

    def __init__(self, model: nn.Module, teacher: str = "dense", named: bool = False):
        super().__init__()
        self.vision = model.vision
        self.dense_weight = 0.0 if teacher == "captions" else 1.0
        self.contrast_weight = 0.0 if teacher == "dense" else 1.0
        W = model.config.vision.width
        self.side = model.config.vision.image_size // model.config.vision.patch_size  # patches along one side
        self.cells = GRID // self.side  # cells along one side of a patch
        self.dense = nn.Linear(W, self.cells**2 * (7 + N_KINDS))
        self.category = nn.Linear(W, N_CATEGORIES)
        self.colour = nn.Linear(W, N_COLOURS)
        self.named = NamedPart(model.config.lm.vocab_size, W, self.side) if named else None
        if self.contrast_weight:
            self.image_side = nn.Linear(W, 64)
            self.words_side = nn.EmbeddingBag(model.config.lm.vocab_size, 64)
        weight = torch.ones(N_KINDS)
        weight[0] = 0.3  # most of an object is its fixed body
        self.register_buffer("kind_weight", weight, persistent=False)

    def predict(self, b: DenseBatch) -> tuple[Tensor, Cells, Tensor, Tensor]:
        """-> tokens (B, P, W), predicted Cells, category and colour logits."""
        x = self.vision(b.pictures, b.geometry)
        B, s, c = len(x), self.side, self.cells
        out = self.dense(x).view(B, s, s, c, c, -1).permute(0, 1, 3, 2, 4, 5).reshape(B, s * c, s * c, -1)
        geometry, rest, kind = out.split([4, 3, N_KINDS], -1)
        return x, Cells(geometry, *rest.unbind(-1), kind), self.category(x.mean(1)), self.colour(x.mean(1))

    def forward(self, b: DenseBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its parts. All but the mask is averaged over the object's cells; background teaches little."""
        tokens, said, category, colour = self.predict(b)
        true = b.cells
        solid = true.mask > 0.5
        told = solid & (true.movable >= 0) & (true.kind >= 0)
        on_part = told & (true.kind > 0)
        parts = {
            "geometry": F.l1_loss(said.geometry[solid], true.geometry[solid]),
            "mask": F.binary_cross_entropy_with_logits(said.mask, true.mask),
            "movable": F.binary_cross_entropy_with_logits(said.movable[told], true.movable[told]),
            "kinds": F.cross_entropy(said.kind[told], true.kind[told], weight=self.kind_weight),
            "openness": (said.openness - true.openness).abs()[on_part].sum() / max(on_part.sum(), 1),
            "words": F.cross_entropy(category, b.category) + F.cross_entropy(colour, b.colour),
        }
        weights = {"geometry": 2.0, "mask": 1.0, "movable": 1.0, "kinds": 0.3, "openness": 1.0, "words": 0.2}
        # Times its weight also where that is 0, so that every layer has a gradient, as data parallel wants
        loss = self.dense_weight * sum(weights[name] * part for name, part in parts.items())
        if self.named and b.named is not None:
            named, more = self.named(tokens, b.named)
            loss = loss + self.dense_weight * named
            parts |= more
        elif self.named:  # a batch without any: its layers still have a gradient, as data parallel wants
            loss = loss + 0.0 * sum(p.sum() for p in self.named.parameters())
        if self.contrast_weight:
            parts["contrast"] = self.contrast(tokens, b.captions, b.caption_starts)
            loss = loss + self.contrast_weight * parts["contrast"]
        return loss, parts

    def contrast(self, tokens: Tensor, captions: Tensor, starts: Tensor) -> Tensor:
        """CLIP's loss: which caption of the batch belongs to which picture. Equal captions share the target.

        Differs: the words side is a mean of word vectors, and the temperature is fixed at 0.1.
        """
        a = F.normalize(self.image_side(tokens.mean(1)), dim=-1)
        b = F.normalize(self.words_side(captions, starts), dim=-1)
        same = (b.detach() @ b.detach().T > 1 - 1e-5).float()
        target = same / same.sum(1, keepdim=True)
        logits = a @ b.T / 0.1
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


class NamedPart(nn.Module):
    """Words pick out one part of the picture: where to grip it, its mask, how each of its points moves, its moment arm.

    A bag of words scales and shifts the tokens (FiLM, arXiv 1709.07871), and each token then predicts its own cells of
    a 32 x 32 raster. Tokens exchange nothing here, so whatever is asked for must be in the encoder's tokens. Without
    this the encoder learns what a picture shows, but not what an instruction will ask of it.
    """

    HIDDEN = 256
    SPREAD = 0.6  # standard deviation of the contact's Gaussian soft label, in cells

    def __init__(self, vocab_size: int, W: int, side: int):
        super().__init__()
        self.side = side
        self.cells = FINE // side  # along one side of a patch
        self.words = nn.EmbeddingBag(vocab_size, 64)
        self.outer = nn.Linear(64, 2 * W)
        self.inner = nn.Linear(64, 2 * self.HIDDEN)
        self.norm = nn.LayerNorm(W)
        self.hidden = nn.Linear(W, self.HIDDEN)
        self.out = nn.Linear(self.HIDDEN, self.cells**2 * 6)
        for layer in (self.words, self.outer, self.inner):
            nn.init.normal_(layer.weight, std=0.06)

    def predict(self, tokens: Tensor, named: NamedParts) -> Tensor:
        """(M, 32, 32, 6): logit of the contact, logit of the mask, direction x, y, z, moment arm."""
        words = self.words(named.words, named.starts)
        scale, offset = self.outer(words)[:, None].chunk(2, -1)
        x = self.norm(tokens)[named.owners] * (1 + scale) + offset
        scale, offset = self.inner(words)[:, None].chunk(2, -1)
        x = self.out(F.silu(self.hidden(x) * (1 + scale) + offset))
        M, s, c = len(x), self.side, self.cells
        return x.view(M, s, s, c, c, 6).permute(0, 1, 3, 2, 4, 5).reshape(M, FINE, FINE, 6)

    def soft_label(self, contact: Tensor) -> Tensor:
        """(M, 2), cells -> (M, 32 * 32) distribution about it."""
        cells = torch.arange(FINE, device=contact.device)
        column, row = (-((cells - x[:, None]) ** 2) / (2 * self.SPREAD**2) for x in contact.unbind(1))
        return torch.softmax((row[:, :, None] + column[:, None]).flatten(1), 1)

    def forward(self, tokens: Tensor, named: NamedParts) -> tuple[Tensor, dict[str, Tensor]]:
        out = self.predict(tokens, named)
        heat, mask, way, arm = out.float().split([1, 1, 3, 1], -1)
        here = named.contact.round().long().clamp(0, FINE - 1)
        aim = way[torch.arange(len(way)), here[:, 1], here[:, 0]]
        size = named.mask.sum().clamp(min=1)
        soft = mask[..., 0].sigmoid()
        overlap = (soft * named.mask).sum((1, 2))
        parts = {
            "contact": -(self.soft_label(named.contact) * heat.flatten(1).log_softmax(1)).sum(1).mean(),
            "aim": F.l1_loss(aim, named.approach) + (1 - F.cosine_similarity(aim, named.approach)).mean(),
            "motion": ((way - named.act).abs().sum(-1) * named.mask).sum() / size,
            "part": F.binary_cross_entropy_with_logits(mask[..., 0], named.mask),
            "dice": (1 - (2 * overlap + 1) / (soft.sum((1, 2)) + named.mask.sum((1, 2)) + 1)).mean(),
            "arm": ((arm[..., 0] - named.arm).abs() * named.mask).sum() / size,
        }
        weights = {"contact": 1.0, "aim": 1.5, "motion": 0.5, "part": 2.0, "dice": 0.7, "arm": 0.5}
        return sum(weights[name] * part for name, part in parts.items()), parts


class AnswerObjective(nn.Module):
    """Stages 1.1 and 1.2: the model's own next-token loss on answers, and the auxiliary head for their numbers.

    Args: soft_numbers: standard deviation of a number's soft label in bins, 0 = one-hot. number_weight: 0 = no
        auxiliary head.
    """

    def __init__(self, model: nn.Module, soft_numbers: float, number_weight: float):
        super().__init__()
        self.model = model
        self.number_weight = number_weight
        if number_weight:
            D = model.config.lm.d_model
            self.numbers = nn.Sequential(nn.Linear(D, 64), nn.GELU(), nn.Linear(64, N_NUMBERS))
        bins = torch.arange(NUMBERS, dtype=torch.float32)
        distance = bins[:, None] - bins
        soft = torch.softmax(-(distance**2) / (2 * soft_numbers**2), 1) if soft_numbers else None
        self.register_buffer("soft", soft, persistent=False)  # (100, 100): row n = the target distribution of number n

    def forward(
        self, images, owners, tokens, lengths, labels, prompts, numbers, all_targets: float, all_numbers: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Args: images, owners, .. labels as in RoboMamba.forward; prompts, numbers as in data.dataset.Batch.

        all_targets, all_numbers: what sums are divided by, the mean counts per process: averaging gradients over
        processes then gives the mean over all of them.
        """
        _, answer, states = self.model(
            images, tokens, lengths, labels, owners=owners, soft=self.soft, normalizer=all_targets, return_states=True
        )
        if not self.number_weight:
            return answer, {"answer": answer}
        state = states[torch.arange(len(states), device=states.device), prompts - 1]
        told = ~numbers.isnan()
        error = (self.numbers(state) - (2 * numbers.nan_to_num() - 1)).abs()
        error = (error * told).sum() / all_numbers
        return answer + self.number_weight * error, {"answer": answer, "numbers": error / 2}
