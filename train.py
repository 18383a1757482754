"""Train the parts that see and speak: stage 0 (vision), 1.1 (align), 1.2 (cotrain). Stage 2 is finetune_policy.py.

    python -m data.build --scenes 20000 --out data/cache/train                                   # once
    python train.py --stage vision  --data data/cache/train --out runs/vision
    python train.py --stage align   --data data/cache/train --init runs/vision --out runs/align
    python train.py --stage cotrain --data data/cache/train --init runs/align --out runs/cotrain
    torchrun --nproc-per-node 2 train.py --stage ...    # both cores, or several GPUs: the same global batch

What each stage trains, and what stays frozen (RoboMamba section 3.2; frozen weights are compared bit by bit):

    stage     trained        frozen        loss
    vision    vision         -             depth, normals, masks, kind and openness of parts (16 x 16); category, colour
    align     projector      vision, lm    next token of answers in words
    cotrain   projector, lm  vision        next token of all answers, general and robot questions together
    (policy)  head           all the rest  finetune_policy.py

Differs from the paper. Stage `vision` stands for CLIP's pre-training: no weights can be fetched, so the encoder learns
from the simulator's own ground truth. The language model starts from nothing too. Numbers ("37" of 00..99) are learned
with a softened target (neighbouring bins share it, `--soft-numbers`), and a throw-away layer predicts all numbers of an
answer at once from the last prompt state (`--number-weight`), which is the state that the policy head will read; both
can be switched off. `--muon` halves the steps of stage 1.2 (class Muon); without it AdamW trains all weights. Families
of questions are drawn by the root of their number times `--more`: whether something is there needs a comparison, which
is not learned while one question in ten asks for it.

Logged (metrics.csv: step, seconds, name, value):
    loss; vision: geometry, mask, movable, kinds, openness, words and on --val: movable_iou, kind_accuracy,
    normal_degrees, category_accuracy
    align, cotrain: answer (cross-entropy), numbers (L1 in shares of the picture) and on --val: exact.FAMILY = share of
    answers that are right to the letter, blank.FAMILY = the same with a grey picture (what the wording alone gives
    away), contact_px, contact_degrees; and three fixed questions of --val with what the model says and what is true, on
    the console and in OUT/answers.md. At the end all curves are drawn: OUT/curves.png
"""

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.files import write_text
from common.scripts import Processes, Run, cli, cosine, digest, flag, rows_of_step, stop_on_nan
from data.dataset import GREY, IGNORE, N_NUMBERS, Conversations, read_picture, visual_tokens
from data.prompts import parse_contact
from data.tokenizer import NUMBER_BASE, NUMBERS, has_number_tokens, load_encoding
from robomamba import PRESETS, RoboMamba, RoboMambaConfig, count
from sim import objects


@dataclass
class TrainConfig:
    stage: str = flag("cotrain", "vision | align | cotrain")
    data: str = flag(
        "data/cache/train", "folder made by data.build, or a conversation file in LLaVA's layout (align, cotrain)"
    )
    images: str = flag("", "folder the image paths are relative to (default: where the conversation file lies)")
    val: str = flag("data/cache/val", 'folder made by data.build --split val; "" = no validation')
    init: str = flag("", 'checkpoint folder to start from; "" = a new model of --preset')
    preset: str = flag("tiny", "robomamba.PRESETS")
    vision_weights: str = flag("", "published CLIP folder to start from; --preset gives projector, head, position code")
    lm_weights: str = flag("", "published Mamba folder with a tokenizer.json; goes with --vision-weights")
    out: str = flag("runs/cotrain", "folder of the new checkpoint and metrics.csv")
    resume: bool = flag(False, "go on from OUT/checkpoint.pt, bit for bit")
    device: str = flag("auto", "auto | cpu | cuda")
    seed: int = flag(0, "")
    max_steps: int = flag(2000, "")
    batch_size: int = flag(32, "pictures a step, over all processes")
    lr: float = flag(1e-3, "peak; linear warm-up, then cosine")
    warmup: int = flag(80, "steps")
    muon: bool = flag(False, "wide matrices step orthogonally (class Muon), all else with AdamW; no: AdamW for all")
    weight_decay: float = flag(0.05, "matrices only: never A_log, D, norms, biases, embeddings")
    clip: float = flag(1.0, "largest gradient norm")
    dense: float = flag(1.0, "vision: weight of the dense losses")
    contrast: float = flag(0.0, "vision: weight of the picture-caption contrast (CLIP's loss)")
    probe: bool = flag(
        False, "vision: the encoder stays frozen, only the linear layers learn: what do its tokens tell?"
    )
    questions: int = flag(4, "asked of each picture in a step")
    contact: float = flag(0.35, "cotrain: chance that a question asks for a contact (five numbers)")
    grounding: float = flag(0.15, "cotrain: chance that it is another one answered with numbers (where, box)")
    skip: str = flag(
        "", "families of questions left out of training, such as plan,possible,success,past,future,contact"
    )
    more: str = flag("", "families drawn so many times as often, such as presence=4,count=2")
    turns: str = flag("branch", "branch: each turn sees the picture alone; pack: turns follow each other")
    soft_numbers: float = flag(1.9, "standard deviation of a number's target in bins of 1/100; 0 = one-hot")
    number_weight: float = flag(
        3.0, "of the throw-away layer that reads all numbers from the last prompt state; 0 = off"
    )
    unfreeze_vision: bool = flag(False, "cotrain trains the encoder too (a deviation from the paper)")
    log_every: int = flag(20, "steps")
    eval_every: int = flag(500, "steps")
    eval_records: int = flag(100, "of --val, align and cotrain")
    save_every: int = flag(200, "steps")


STAGES = {"vision": ("vision",), "align": ("projector",), "cotrain": ("projector", "lm")}
MAX_SHIFT_CELLS = 2  # vision stage: pictures are shifted by up to so many cells of 8 pixels
LIGHT_JITTER = 0.15  # vision stage: brightness and contrast vary by this share
SHOWN_TYPES = ("caption", "plan", "contact")  # answers.md: a question of each, on different pictures of --val

# ---- objectives ------------------------------------------------------------------------------------------------------


class DenseObjective(nn.Module):
    """Stage 0: patch tokens must tell what the simulator knows of their 2 x 2 cells, and their mean what the object is.

    Targets (B, 16, 16, 7) are relative depth, normal x, y, z (camera frame), object mask, movable mask, openness of the
    part; kind (B, 16, 16) is an index into objects.PART_KINDS; -1 means "not told" (pictures of unseen categories). The
    layers here are thrown away after the stage.
    """

    N_CATEGORIES = len(objects.SEEN) + len(objects.UNSEEN) + 1

    def __init__(self, model: RoboMamba, dense_weight: float = 1.0, contrast_weight: float = 0.0):
        super().__init__()
        self.vision, W = model.vision, model.config.vision.width
        self.dense_weight, self.contrast_weight = dense_weight, contrast_weight
        self.side = model.config.vision.image_size // model.config.vision.patch_size  # patches along one side
        self.cells = 16 // self.side  # cells along one side of a patch
        self.kinds = len(objects.PART_KINDS)
        self.dense = nn.Linear(W, self.cells**2 * (7 + self.kinds))
        self.category, self.colour = nn.Linear(W, self.N_CATEGORIES), nn.Linear(W, len(objects.COLOURS))
        if contrast_weight:
            self.image_side, self.words_side = nn.Linear(W, 64), nn.EmbeddingBag(model.config.lm.vocab_size, 64)
        weight = torch.ones(self.kinds)
        weight[0] = 0.3  # most of an object is its fixed body
        self.register_buffer("kind_weight", weight, persistent=False)

    def predict(self, pictures: Tensor):
        """uint8 (B, 3, S, S) -> tokens (B, P, W), cells (B, 16, 16, 7 + kinds), category and colour logits."""
        x = self.vision(pictures)
        s, c = self.side, self.cells
        cells = self.dense(x).view(len(x), s, s, c, c, -1).permute(0, 1, 3, 2, 4, 5).reshape(len(x), s * c, s * c, -1)
        return x, cells, self.category(x.mean(1)), self.colour(x.mean(1))

    def forward(self, pictures, target, kind, category, colour, captions, caption_starts):
        """All but the object mask is averaged over the object's cells; background teaches little."""
        tokens, cells, category_logits, colour_logits = self.predict(pictures)
        solid = target[..., 4] > 0.5
        told = solid & (target[..., 5] >= 0)
        geometry = F.l1_loss(cells[..., :4][solid], target[..., :4][solid])
        mask = F.binary_cross_entropy_with_logits(cells[..., 4], target[..., 4])
        movable = F.binary_cross_entropy_with_logits(cells[..., 5][told], target[..., 5][told])
        kinds = F.cross_entropy(cells[..., 7:][told], kind[told], weight=self.kind_weight)
        on_part = told & (kind > 0)
        openness = (cells[..., 6] - target[..., 6]).abs()[on_part].sum() / max(on_part.sum(), 1)
        words = F.cross_entropy(category_logits, category) + F.cross_entropy(colour_logits, colour)
        # Times its weight also where that is 0, so that every layer has a gradient, as data parallel wants
        loss = self.dense_weight * (2 * geometry + mask + movable + 0.3 * kinds + openness + 0.2 * words)
        parts = {"geometry": geometry, "mask": mask, "movable": movable, "kinds": kinds, "openness": openness}
        parts["words"] = words
        if self.contrast_weight:
            parts["contrast"] = self.contrast(tokens, captions, caption_starts)
            loss = loss + self.contrast_weight * parts["contrast"]
        return loss, parts

    def contrast(self, tokens: Tensor, captions: Tensor, starts: Tensor) -> Tensor:
        """CLIP's loss: which caption of the batch belongs to which picture. Equal captions share the target.

        Differs: the words side is a mean of word vectors, and the temperature is fixed at 0.1.
        """
        a = F.normalize(self.image_side(tokens.mean(1)), dim=-1)
        b = F.normalize(self.words_side(captions, starts), dim=-1)
        same = (b.detach() @ b.detach().T > 1 - 1e-5).float()
        logits, target = a @ b.T / 0.1, same / same.sum(1, keepdim=True)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


class AnswerObjective(nn.Module):
    """Stages 1.1 and 1.2: next token of the answers (paper section 3.2), softened for numbers, and the number layer."""

    def __init__(self, model: RoboMamba, soft_numbers: float, number_weight: float):
        super().__init__()
        self.model, self.number_weight = model, number_weight
        D = model.config.lm.d_model
        self.numbers = nn.Sequential(nn.Linear(D, 64), nn.GELU(), nn.Linear(64, N_NUMBERS)) if number_weight else None
        bins = torch.arange(NUMBERS, dtype=torch.float32)
        soft = (
            torch.softmax(-((bins[:, None] - bins) ** 2) / (2 * soft_numbers**2), 1)
            if soft_numbers
            else torch.eye(NUMBERS)
        )
        self.register_buffer("soft", soft, persistent=False)  # (100, 100): row n = the target distribution of number n

    def forward(self, images, tokens, prompts, labels, numbers, all_targets: float, all_numbers: float):
        """Sums here, divided by the mean count per process: averaging gradients then gives the global mean."""
        hidden = self.model.hidden(images, tokens)
        target = labels[:, 1:]
        rows, columns = (target != IGNORE).nonzero(as_tuple=True)
        target = target[rows, columns]
        log_p = F.log_softmax(self.model.lm.lm_head(hidden[rows, columns]).float(), -1)  # (answer tokens, V)
        number = target - NUMBER_BASE
        is_number = (number >= 0) & (number < NUMBERS)
        nll = -log_p.gather(1, target[:, None])[:, 0]
        soft = -(self.soft[number.clamp(0, NUMBERS - 1)] * log_p[:, NUMBER_BASE : NUMBER_BASE + NUMBERS]).sum(1)
        answer = torch.where(is_number, soft, nll).sum() / all_targets
        if not self.number_weight:
            return answer, {"answer": answer}
        state = hidden[torch.arange(len(hidden), device=hidden.device), prompts - 1]
        told = ~numbers.isnan()
        off = ((self.numbers(state) - (2 * numbers.nan_to_num() - 1)).abs() * told).sum() / all_numbers
        return answer + self.number_weight * off, {"answer": answer, "numbers": off / 2}


# ---- vision data -----------------------------------------------------------------------------------------------------


class DensePictures:
    """Pictures and dense targets of a data.build folder."""

    def __init__(self, folder: str, image_size: int, encoding):
        self.folder, self.size = Path(folder), image_size
        try:
            with np.load(self.folder / "dense.npz") as file:
                self.targets, self.kinds, self.category, self.colour = (
                    file[k] for k in ("targets", "kinds", "category", "colour")
                )
        except (OSError, KeyError, ValueError) as error:
            raise ValueError(
                f"{self.folder / 'dense.npz'}: cannot be read ({error}); `python -m data.build` makes it"
            ) from None
        if self.targets.shape[1:] != (16, 16, 7):
            was = f"targets {self.targets.shape}, expected (n, 16, 16, 7)"
            raise ValueError(f"{self.folder / 'dense.npz'}: {was}; remove the folder and build it anew")
        records = json.loads((self.folder / "conversations.json").read_text())  # in the order of dense.npz
        self.names = [record["image"] for record in records]
        self.captions = [encoding.encode_ordinary(caption(record)) for record in records]
        if len(self.names) != len(self.targets):
            raise ValueError(f"{self.folder}: {len(self.targets)} rows in dense.npz, {len(self.names)} conversations")

    def __len__(self) -> int:
        return len(self.names)

    def batch(self, rows, seed: list[int] | None = None) -> tuple[Tensor, ...]:
        """Tensors for DenseObjective. With a seed each picture and its targets are shifted, mirrored and relit."""
        pictures = np.stack([read_picture(self.folder / self.names[r], self.size) for r in rows])
        target, kind = self.targets[rows].astype(np.float32), self.kinds[rows].astype(np.int64)
        for i, row in enumerate(rows if seed is not None else ()):
            rng = np.random.default_rng([*seed, row])
            dy, dx = rng.integers(-MAX_SHIFT_CELLS, MAX_SHIFT_CELLS + 1, 2)
            cell = self.size // 16
            p, t, k = shift(pictures[i], dy * cell, dx * cell), shift(target[i], dy, dx), shift(kind[i], dy, dx)
            if rng.random() < 0.5:
                p, t, k = p[:, ::-1], t[:, ::-1].copy(), k[:, ::-1]
                t[..., 1] *= -1  # the normal's x
            gain, offset = rng.uniform(1 - LIGHT_JITTER, 1 + LIGHT_JITTER), rng.uniform(-127, 127) * LIGHT_JITTER
            pictures[i], target[i], kind[i] = np.clip((p - 127.0) * gain + 127 + offset, 0, 255).astype(np.uint8), t, k
        words = (torch.from_numpy(x[rows].astype(np.int64)) for x in (self.category, self.colour))
        pictures = torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2)))
        captions = [self.captions[r] for r in rows]
        starts = torch.tensor([0, *np.cumsum([len(c) for c in captions])[:-1].tolist()])
        return (
            pictures,
            torch.from_numpy(target),
            torch.from_numpy(kind),
            *words,
            torch.tensor(sum(captions, [])),
            starts,
        )


def caption(record: dict) -> str:
    """The first answer of the family "caption"; of a record without one, its first answer."""
    families = record.get("families", ())
    return record["conversations"][2 * families.index("caption") + 1 if "caption" in families else 1]["value"]


def shift(x: np.ndarray, dy: int, dx: int) -> np.ndarray:
    """(H, W, ..) moved by (dy, dx); the border is repeated."""
    H, W = x.shape[:2]
    return x[np.clip(np.arange(H) - dy, 0, H - 1)][:, np.clip(np.arange(W) - dx, 0, W - 1)]


# ---- validation ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate_vision(objective: DenseObjective, data: DensePictures, device, batch: int = 64) -> dict:
    """Movable-part IoU and kind accuracy in cells, normal error in degrees on the object, category accuracy."""
    both = either = right = parts = categories = 0
    angles = []
    for start in range(0, len(data), batch):
        rows = np.arange(start, min(start + batch, len(data)))
        pictures, target, kind, category = (x.to(device) for x in data.batch(rows)[:4])
        _, cells, category_logits, _ = objective.predict(pictures)
        said, true = (cells[..., 4] > 0) & (cells[..., 5] > 0), target[..., 5] > 0.5
        both, either = both + (said & true).sum().item(), either + (said | true).sum().item()
        on_part = kind > 0
        right, parts = right + (cells[..., 7:].argmax(-1) == kind)[on_part].sum().item(), parts + on_part.sum().item()
        solid = target[..., 4] > 0.95
        cosine_ = F.cosine_similarity(cells[..., 1:4][solid], target[..., 1:4][solid], dim=-1)
        angles.append(torch.rad2deg(torch.arccos(cosine_.clamp(-1, 1))))
        categories += (category_logits.argmax(1) == category).sum().item()
    return {
        "movable_iou": both / max(either, 1),
        "kind_accuracy": right / max(parts, 1),
        "normal_degrees": torch.cat(angles).median().item(),
        "category_accuracy": categories / len(data),
    }


@torch.no_grad()
def evaluate_answers(model: RoboMamba, data: Conversations, tokens: np.ndarray | None, device, batch: int = 32) -> dict:
    """Share of answers right to the letter, by family, with the picture and with a grey one; contact error of the
    decoded numbers.

    Args: tokens, cached visual tokens (n, P, W) of `data`; None = read the pictures.
    Every answer token is predicted from the true ones before it. All of them being right is the same as greedy decoding
    being right.
    """
    hits, blanks = {}, {}
    px, degrees = [], []
    S = model.config.vision.image_size
    grey = model.vision(torch.full((1, 3, S, S), GREY, dtype=torch.uint8, device=device))
    for start in range(0, len(data), batch):
        rows = range(start, min(start + batch, len(data)))
        flat = [(r, k) for r in rows for k in range(len(data.items[r]))]
        b = data.collate([r for r, _ in flat], [data.items[r][k] for r, k in flat])
        ids, target = b.tokens.to(device), b.labels[:, 1:]
        at = (target != IGNORE).nonzero(as_tuple=True)
        owner = torch.tensor([r - start for r, _ in flat], device=device)
        shown = data.pictures(rows) if tokens is None else torch.from_numpy(np.array(tokens[start : rows.stop])).float()
        shown = shown.to(device)
        said = [torch.full_like(target, IGNORE) for _ in range(2)]
        for guess, images, owners in zip(said, (shown, grey), (owner, torch.zeros_like(owner)), strict=True):
            guess[at] = model.lm.lm_head(model.hidden(images, ids, owners)[at]).argmax(-1).cpu()
        right, right_blank = ((guess == target).all(1).tolist() for guess in said)
        for i, (r, k) in enumerate(flat):
            family = data.records[r].get("families", ["all"] * (k + 1))[k]
            hits.setdefault(family, []).append(right[i])
            blanks.setdefault(family, []).append(right_blank[i])
            if family == "contact":
                is_answer = target[i] != IGNORE
                texts = (data.encoding.decode(x[i][is_answer][:-1].tolist()) for x in (said[0], target))
                guess, true = map(parse_contact, texts)
                if guess and true:
                    px.append(S * float(np.hypot(guess[0] - true[0], guess[1] - true[1])))
                    degrees.append(float(np.degrees(np.arccos(np.clip(np.dot(guess[2], true[2]), -1, 1)))))
    out = {f"exact.{k}": float(np.mean(v)) for k, v in sorted(hits.items())}
    out |= {f"blank.{k}": float(np.mean(v)) for k, v in sorted(blanks.items())}
    if px:
        out |= {"contact_px": float(np.median(px)), "contact_degrees": float(np.median(degrees))}
    return out


def shown_questions(data: Conversations) -> list[tuple[str, str, str]]:
    """(picture file, question, answer) of three records: of each of SHOWN_TYPES the first question there is; a file
    without families shows its first questions."""
    found: dict[int, tuple[str, str, str]] = {}
    for family in SHOWN_TYPES:
        for row, record in enumerate(data.records):
            said, families = [turn["value"] for turn in record["conversations"]], record.get("families", [family])
            if row not in found and "image" in record and family in families:
                k = 2 * families.index(family)
                question = said[k].replace("<image>", "").strip()
                found[row] = (str(data.root / record["image"]), question, said[k + 1])
                break
    return list(found.values())


def show_answers(model: RoboMamba, shown: list[tuple[str, str, str]], step: int, run: Run) -> None:
    """What the model says at this step, so that a person sees it learn: on the console and as rows of OUT/answers.md.

    Rows of the same or a later step, which a killed run may have left, are replaced.
    """
    if not shown:
        return
    images, asked, truths = (list(column) for column in zip(*shown, strict=True))
    answers = model.generate(images, asked)
    path, rows = run.out / "answers.md", []
    if path.exists():
        rows = [row for row in path.read_text().splitlines()[2:] if int(row.split("|")[1]) < step]
    for image, *texts in zip(images, asked, answers, truths, strict=True):
        cells = [" ".join(text.split()).replace("|", "\\|") for text in (Path(image).name, *texts)]
        rows.append(f"| {step} | {' | '.join(cells)} |")
        run.say("  {1}  model: {2}  truth: {3}".format(*cells))
    write_text(path, "\n".join(["| step | picture | question | model | truth |", "| --- " * 5 + "|", *rows, ""]))


# ---- main ------------------------------------------------------------------------------------------------------------


class Muon(torch.optim.AdamW):
    """AdamW, except in groups with `orthogonal`: there the step of a matrix is its momentum made orthogonal.

    The gradient of a weight matrix has a few large directions and many small ones. Made orthogonal, all of them step
    alike: M = U S V^T becomes U V^T, nearly, by five Newton-Schulz iterations, scaled so that lr means what it means to
    AdamW. torch.optim.Muon does it in bfloat16, 28 times slower than float32 on a CPU without such instructions.
    Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon; the scale is that of arXiv 2502.16982, section 2.2.
    """

    MOMENTUM = 0.95

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in (p for p in group["params"] if group["orthogonal"] and p.grad is not None):
                if not self.state[p]:  # AdamW looks for a step in every state that it loads
                    self.state[p] |= {"step": torch.tensor(0.0), "momentum": torch.zeros_like(p)}
                momentum = self.state[p]["momentum"].mul_(self.MOMENTUM).add_(p.grad)
                step = self.orthogonal(p.grad + self.MOMENTUM * momentum) * 0.2 * max(p.shape) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * step)
                p.grad = None  # AdamW passes over it
        return super().step(closure)

    @staticmethod
    def orthogonal(M: Tensor) -> Tensor:
        """Brings every singular value of M to about 1 (0.7 to 1.2); its singular vectors stay."""
        X = M / (M.norm() + 1e-7)  # all singular values at most 1
        for _ in range(5):
            square = X @ X.T if len(X) <= len(X.T) else X.T @ X  # the smaller of the two
            poly = -4.7750 * square + 2.0315 * square @ square
            X = 3.4445 * X + (poly @ X if len(X) <= len(X.T) else X @ poly)  # odd polynomial: acts on S alone
        return X


def parameter_groups(module: nn.Module, weight_decay: float, muon: bool = False) -> list[dict]:
    """Decay for matrices only; none for A_log, D, norms, biases, embeddings, positions.

    muon: matrices of at least 32 x 32 are a group with `orthogonal`; narrow ones (dt_proj, x_proj) stay AdamW's.
    """
    matrices, decay, rest = [], [], []
    for name, p in module.named_parameters():
        if p.requires_grad:
            plain = p.ndim < 2 or name.endswith("A_log") or "embedding" in name and "patch" not in name
            wide = muon and p.ndim == 2 and min(p.shape) >= 32
            (rest if plain else matrices if wide else decay).append(p)
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    groups = [g | {"orthogonal": False} for g in groups]
    return groups + [{"params": matrices, "weight_decay": weight_decay, "orthogonal": True}] * bool(matrices)


def start_model(cfg: TrainConfig, vocabulary: Path) -> RoboMamba:
    """--init's checkpoint, or published parts, or a new model of --preset with the vocabulary of the data."""
    if cfg.init:
        return RoboMamba.from_pretrained(cfg.init)
    if cfg.preset not in PRESETS:
        raise ValueError(f"--preset {cfg.preset}: expected one of {', '.join(PRESETS)}")
    if cfg.vision_weights or cfg.lm_weights:
        if not (cfg.vision_weights and cfg.lm_weights):
            raise ValueError("--vision-weights and --lm-weights: give both, or neither")
        torch.manual_seed(cfg.seed)
        return RoboMamba.from_parts(cfg.vision_weights, cfg.lm_weights, cfg.preset)
    encoding = load_encoding(vocabulary)
    config = RoboMambaConfig.from_dict(PRESETS[cfg.preset].to_dict())
    config.lm.vocab_size = encoding.n_vocab
    torch.manual_seed(cfg.seed)
    return RoboMamba(config, encoding)


def train(cfg: TrainConfig) -> dict:
    """Run one stage; returns the last validation numbers."""
    if cfg.stage not in STAGES:
        raise ValueError(f"--stage {cfg.stage}: expected one of {', '.join(STAGES)}")
    finished = Path(cfg.out) / "model.safetensors"
    if cfg.resume and finished.exists() and not (Path(cfg.out) / "checkpoint.pt").exists():
        print(f"{finished} is there and no checkpoint.pt: this run has finished; remove the folder to start anew")
        return {}
    processes = Processes(cfg.device)
    if cfg.batch_size % processes.size:
        raise ValueError(f"--batch-size {cfg.batch_size} does not divide among {processes.size} processes")
    source = Path(cfg.data)
    file, folder = (source / "conversations.json", source) if source.is_dir() else (source, source.parent)
    own_vocabulary = folder / "vocab.tiktoken"
    model = start_model(
        cfg, own_vocabulary if own_vocabulary.exists() else Path(__file__).parent / "data/vocab.tiktoken"
    ).to(processes.device)

    # What is trained and what is frozen.
    trained = () if cfg.probe else STAGES[cfg.stage] + (("vision",) if cfg.unfreeze_vision else ())
    frozen = {}
    for name in ("vision", "projector", "lm", "head"):
        part = getattr(model, name).requires_grad_(name in trained)
        if name not in trained:
            frozen[name] = digest(part)
    run = Run(cfg, processes, cfg.max_steps, cfg.log_every)
    run.say(
        "  ".join(
            f"{n} {count(getattr(model, n)):,d} {'trained' if n in trained else 'frozen'}"
            for n in ("vision", "projector", "lm", "head")
        )
    )

    # Data and objective.
    size, shown = model.config.vision.image_size, []
    torch.manual_seed(cfg.seed + 1)  # the throw-away layers
    if cfg.stage == "vision":
        objective = DenseObjective(model, cfg.dense, cfg.contrast)
        data = DensePictures(cfg.data, size, model.encoding)
        val = DensePictures(cfg.val, size, model.encoding) if cfg.val else None
        evaluate = lambda: evaluate_vision(objective, val, processes.device)  # noqa: E731
    else:
        numbers = has_number_tokens(model.encoding)  # a published vocabulary has none
        objective = AnswerObjective(model, numbers * cfg.soft_numbers, numbers * cfg.number_weight)
        data = Conversations(file, model.encoding, size, cfg.images, cfg.turns, skip=cfg.skip, more=cfg.more)
        cached = (
            None
            if cfg.unfreeze_vision
            else visual_tokens(model.vision, data.root, [r.get("image", "") for r in data.records], processes)
        )
        if cfg.val:
            val = Conversations(Path(cfg.val) / "conversations.json", model.encoding, size, limit=cfg.eval_records)
            shown = shown_questions(val)
            if cached is not None:
                val_tokens = visual_tokens(model.vision, val.root, [r["image"] for r in val.records], processes)
            else:  # the encoder is trained too: read the pictures with what it has become
                val_tokens = None
        evaluate = lambda: evaluate_answers(model, val, val_tokens, processes.device)  # noqa: E731
    objective.to(processes.device).train()
    optimizer = Muon(parameter_groups(objective, cfg.weight_decay, cfg.muon), lr=cfg.lr, betas=(0.9, 0.98))
    first = run.resume([objective], optimizer) if cfg.resume else 0
    if processes.first and not first:
        (run.out / "answers.md").unlink(missing_ok=True)  # of an earlier run in this folder
    parallel = processes.wrap(objective)
    autocast = torch.autocast("cuda", torch.bfloat16, enabled=processes.device.type == "cuda")
    result = {}

    # The loop, in time order.
    for step in range(first, cfg.max_steps):
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * cosine(step, cfg.max_steps, cfg.warmup)
        everyone = rows_of_step(cfg.seed, step, cfg.batch_size, len(data))
        rows, rng = everyone[processes.rank :: processes.size], np.random.default_rng([cfg.seed, step])
        if cfg.stage == "vision":
            inputs, counts = data.batch(rows, [cfg.seed, step]), ()
        else:
            Q = cfg.questions if cfg.turns == "branch" else 1
            shares = (cfg.contact, cfg.grounding) if cfg.stage == "cotrain" else (0.0, 0.0)
            drawn = data.draw(everyone, rng, Q, *shares)  # every process draws for all, then keeps its own rows
            mine = [drawn[i * Q + q] for i in range(processes.rank, len(everyone), processes.size) for q in range(Q)]
            b = data.collate(rows, mine)
            images = data.pictures(rows) if cached is None else torch.from_numpy(cached[rows]).float()
            inputs = (images, b.tokens, b.prompts, b.labels, b.numbers)
            counts = processes.mean([(b.labels[:, 1:] != IGNORE).sum().item(), (~b.numbers.isnan()).sum().item()])
            counts = tuple(max(n, 1) for n in counts)
        with autocast:
            loss, parts = parallel(*(x.to(processes.device) for x in inputs), *counts)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        stop_on_nan(step, loss, objective.named_parameters())
        nn.utils.clip_grad_norm_([p for p in objective.parameters() if p.requires_grad], cfg.clip)
        optimizer.step()
        means = processes.mean([loss.item(), *(v.item() for v in parts.values())])
        run.log(step + 1, **dict(zip(("loss", *parts), means, strict=True)))
        if cfg.val and ((step + 1) % cfg.eval_every == 0 or step + 1 == cfg.max_steps):
            objective.eval()
            if processes.first:
                result = evaluate()
                run.write(step + 1, **result)
                run.say(f"step {step + 1}: " + "  ".join(f"{k} {v:.3f}" for k, v in result.items()))
                show_answers(model, shown, step + 1, run)
            processes.barrier()
            objective.train()
        if (step + 1) % cfg.save_every == 0 and step + 1 < cfg.max_steps:
            run.save(step + 1, [objective], optimizer)

    # Nothing that was frozen may have moved by a single bit.
    for name, before in frozen.items():
        if digest(getattr(model, name)) != before:
            raise RuntimeError(f"{name} was frozen but has changed")
    if processes.first:
        model.save_pretrained(cfg.out)
        run.finish()
        print(f"saved {cfg.out}; frozen and bit-equal: {', '.join(frozen) or 'nothing'}", flush=True)
    processes.barrier()
    processes.close()
    return result


def main() -> None:
    cfg = cli(TrainConfig, __doc__)
    try:
        train(dataclasses.replace(cfg))
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
