"""What the stages of train.py minimise. The layers made here are auxiliary heads: no checkpoint keeps them.

DenseObjective    stage 0: the simulator's dense labels for each patch token; `NamedPart` asks for a part in words
AnswerObjective   stages 1.1 and 1.2: the model's own next-token loss (RoboMamba section 3.2), and its numbers
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.config import VisionConfig
from common.pointing import PointingHead, as_map, pointing_losses
from data.dataset import N_NUMBERS, factors
from data.dense import FINE, GRID, N_CATEGORIES, N_COLOURS, N_KINDS, Cells, DenseBatch, NamedParts
from data.tokenizer import NUMBERS

WEIGHTS = {"geometry": 2.0, "mask": 1.0, "movable": 1.0, "kinds": 0.3, "openness": 1.0, "words": 0.2}  # per picture
NAMED_WEIGHTS = {"contact": 1.0, "aim": 1.5, "motion": 0.5, "part": 2.0, "dice": 0.7, "arm": 0.5}  # per named part


class DenseObjective(nn.Module):
    """Stage 0, dense supervision: each patch token predicts the simulator's labels for its 2 x 2 cells (data/dense.py).

    The mean of the tokens predicts the object's category and colour; if the data have labels for named parts,
    `NamedPart` predicts those. All read-outs are auxiliary heads, discarded after the stage.
    Args: named: whether the data have labels for named parts. more: factors on loss terms, "arm=0,kinds=2".
    Raises: ValueError if the label cells do not divide evenly among the patches, and for a bad `more`.
    """

    def __init__(self, model: nn.Module, named: bool = False, more: str = ""):
        super().__init__()
        self.vision = model.vision
        weights = WEIGHTS | NAMED_WEIGHTS
        times = factors(more, weights, "term of the loss")
        self.weights = {name: weight * times.get(name, 1.0) for name, weight in weights.items()}
        W = model.config.vision.width
        self.side = model.config.vision.image_size // model.config.vision.patch_size  # patches along one side
        if GRID % self.side or (model.config.vision.fine and FINE % (4 * self.side)):
            patches = f"{self.side} x {self.side} patches do not divide the labels, {GRID} x {GRID} cells"
            raise ValueError(f"vision: {patches}, or the cells of their fine map not the raster, {FINE} x {FINE}")
        self.cells = GRID // self.side  # cells along one side of a patch
        self.dense = nn.Linear(W, self.cells**2 * (7 + N_KINDS))
        self.category = nn.Linear(W, N_CATEGORIES)
        self.colour = nn.Linear(W, N_COLOURS)
        self.named = NamedPart(model.config.lm.vocab_size, model.config.vision) if named else None
        weight = torch.tensor([0.3] + [1.0] * (N_KINDS - 1))  # most of an object is its fixed body
        self.register_buffer("kind_weight", weight, persistent=False)

    def predict(self, b: DenseBatch) -> tuple[list[Tensor], Cells, Tensor, Tensor]:
        """-> maps (B, channels, side, side): tokens and, if any, fine; predicted Cells, category and colour logits."""
        fine = self.vision.cfg.fine > 0
        seen = self.vision(b.pictures, b.geometry, fine=fine)
        x, *maps = seen if fine else (seen,)
        B, s, c = len(x), self.side, self.cells
        out = self.dense(x).view(B, s, s, c, c, -1).permute(0, 1, 3, 2, 4, 5).reshape(B, s * c, s * c, -1)
        geometry, rest, kind = out.split([4, 3, N_KINDS], -1)
        cells = Cells(geometry, *rest.unbind(-1), kind)
        return [as_map(x), *maps], cells, self.category(x.mean(1)), self.colour(x.mean(1))

    def forward(self, b: DenseBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its terms. Those of cells, but for the mask, are means over labelled cells of the object.

        Background teaches little. Every process names the same terms: 0 where no cell is labelled or no part is named.
        """
        maps, said, category, colour = self.predict(b)
        true = b.cells
        solid = true.mask > 0.5
        told = solid & (true.movable >= 0) & (true.kind >= 0)
        on_part = told & (true.kind > 0)
        none = said.movable.sum() * 0.0
        bce = F.binary_cross_entropy_with_logits
        parts = {
            "geometry": F.l1_loss(said.geometry[solid], true.geometry[solid]) if solid.any() else none,
            "mask": bce(said.mask, true.mask),
            "movable": bce(said.movable[told], true.movable[told]) if told.any() else none,
            "kinds": F.cross_entropy(said.kind[told], true.kind[told], weight=self.kind_weight) if told.any() else none,
            "openness": (said.openness - true.openness).abs()[on_part].sum() / max(on_part.sum(), 1),
            "words": F.cross_entropy(category, b.category) + F.cross_entropy(colour, b.colour),
        }
        terms = [parts]
        if self.named and b.named is not None:
            terms += self.named(maps, b.named)  # one dict of terms per map
        # Multiplied by its weight even if that is 0, so that every layer has a gradient, as data parallel requires
        loss = sum(self.weights[name] * part for term in terms for name, part in term.items())
        if len(terms) == 1:
            unused = [*maps[1:], *(self.named.parameters() if self.named else ())]
            loss = loss + 0.0 * sum(x.sum() for x in unused)
            terms.append(dict.fromkeys(NAMED_WEIGHTS, none) if self.named else {})
        return loss, parts | terms[-1]


class NamedPart(nn.Module):
    """Predicts for the part named in words: where to grip it, its mask, how each of its points moves, its moment arm.

    A bag of words replaces the language model's state as the input of a `PointingHead`. One head reads the tokens (each
    predicts its own cells of the 32 x 32 raster); if the encoder has a fine map, a second head reads that. Without this
    the encoder learns what a picture shows, but not what an instruction will ask of it.
    """

    WORDS = 64  # width of the bag of words
    CHANNELS = (1, 1, 3, 1)  # logit of the contact, logit of the mask, direction, moment arm

    def __init__(self, vocab_size: int, vision: VisionConfig):
        super().__init__()
        self.words = nn.EmbeddingBag(vocab_size, self.WORDS)
        nn.init.normal_(self.words.weight, std=0.5)
        side = vision.image_size // vision.patch_size
        maps = [(vision.width, 256, side)]  # channels, hidden channels, side
        if vision.fine:
            maps.append((vision.fine, vision.fine, 4 * side))
        self.heads = nn.ModuleList()
        for channels, hidden, side in maps:
            outputs = sum(self.CHANNELS) * (FINE // side) ** 2  # for each raster cell inside a map cell
            self.heads.append(PointingHead(self.WORDS, channels, hidden, outputs, narrow=64))

    def predict(self, maps: list[Tensor], named: NamedParts) -> list[Tensor]:
        """Maps of the pictures (tokens and, if any, fine) -> for each map (M, 6, 32, 32), see CHANNELS."""
        words = self.words(named.words, named.starts)
        out = [head(words, x[named.owners]) for head, x in zip(self.heads, maps, strict=True)]
        return [F.pixel_shuffle(x, FINE // x.shape[-1]) for x in out]

    def forward(self, maps: list[Tensor], named: NamedParts) -> list[dict[str, Tensor]]:
        """The loss terms for each map."""
        return [named_losses(out.float(), named) for out in self.predict(maps, named)]


def named_losses(out: Tensor, named: NamedParts) -> dict[str, Tensor]:
    """The loss terms of `NamedPart` for out (M, 6, 32, 32): cross-entropies in nats, the rest unitless.

    Motion and arm are means over the part's cells; dice (arXiv 1606.04797) is for parts with few cells.
    """
    heat, mask, way, arm = out.split(NamedPart.CHANNELS, 1)
    away = way - named.act.permute(0, 3, 1, 2)
    mask, arm, size = mask[:, 0], arm[:, 0], named.mask.sum().clamp(min=1)
    soft = mask.sigmoid()
    overlap = (soft * named.mask).sum((1, 2))
    contact, aim = pointing_losses(heat[:, 0], way, named.contact, named.approach)
    return {
        "contact": contact,
        "aim": aim,
        "motion": (away.abs().sum(1) * named.mask).sum() / size,
        "part": F.binary_cross_entropy_with_logits(mask, named.mask),
        "dice": (1 - (2 * overlap + 1) / (soft.sum((1, 2)) + named.mask.sum((1, 2)) + 1)).mean(),
        "arm": ((arm - named.arm).abs() * named.mask).sum() / size,
    }


class AnswerObjective(nn.Module):
    """Stages 1.1 and 1.2: the model's own next-token loss on answers, and the auxiliary head for their numbers.

    soft_numbers: standard deviation of a number's soft label in bins, 0 = one-hot. number_weight: 0 = no such head.
    """

    def __init__(self, model: nn.Module, soft_numbers: float, number_weight: float):
        super().__init__()
        self.model = model
        self.number_weight = number_weight
        if number_weight:
            D = model.config.lm.d_model
            self.numbers = nn.Sequential(nn.Linear(D, 64), nn.GELU(), nn.Linear(64, N_NUMBERS))
        bins = torch.arange(NUMBERS, dtype=torch.float32)
        soft = torch.softmax(-((bins[:, None] - bins) ** 2) / (2 * soft_numbers**2), 1) if soft_numbers else None
        self.register_buffer("soft", soft, persistent=False)  # (100, 100): row n = the target distribution of number n

    def forward(self, images, owners, tokens, lengths, labels, prompts, numbers, all_targets, all_numbers) -> tuple:
        """The loss and its terms. Args: images .. labels as in RoboMamba.forward; prompts, numbers as in Batch.

        all_targets, all_numbers: what sums are divided by, the mean counts per process, so that averaging gradients
        over processes gives the mean over all of them.
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
