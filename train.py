"""Train the parts that see and speak: stage 0 (vision), 1.1 (align), 1.2 (cotrain). Stage 2 is finetune_policy.py.

    python -m data.build --scenes 30000 --out data/cache/train         # once
    python -m data.build --out data/cache/val --split val --scenes 600
    python train.py --stage vision          # the shipped runs: each stage starts from the previous one
    python train.py --stage align
    python train.py --stage cotrain
    torchrun --nproc-per-node 2 train.py --stage ...    # two cores or several GPUs; same global batch

What each stage trains, and what stays frozen (RoboMamba section 3.2; frozen weights are checked bit by bit):

    stage     trained        loss (data/objectives.py); all the rest is frozen
    vision    vision         depth, normals, masks, part kind and openness; category, colour; for the part named in an
                             instruction: contact, direction, mask, motion, moment arm
    align     projector      next token of answers in words
    cotrain   projector, lm  next token of all answers, general and robot questions together
    (policy)  heads          finetune_policy.py

Differences from the paper: stage `vision` replaces CLIP's pre-training. No weights can be downloaded, so the encoder
learns from the simulator's dense labels. The language model also starts from random weights. Numbers ("37" of 00..99)
are learned with Gaussian soft labels (`--soft-numbers`), and an auxiliary head predicts all of an answer's numbers at
once from the last prompt state (`--number-weight`), which the policy head will read; both can be switched off. With
Muon (common/optim.py) the answers' loss falls in 200 steps below AdamW's after 300. NUMERIC sets the shares of
questions answered with numbers; the other types are sampled in proportion to the square root of their count, times
`--more`: when 10 % of the questions were "is there an X?" (`presence`), the model did not learn them.

Written to OUT: the checkpoint; run.json (the settings); metrics.csv (step, seconds, name, value) and curves.png:
    loss; vision: geometry, mask, movable, kinds, openness, words; of named parts (0 if there is none) contact, aim,
    motion, part, dice, arm; on --val: movable_iou, kind_accuracy, normal_degrees, category_accuracy, contact_px,
    part_iou
    align, cotrain: answer (cross-entropy), numbers (L1 as a fraction of their range) and on --val: exact.TYPE = exact
    match of answers per question type, blank.TYPE = the same with a grey picture (what the wording alone gives
    away), contact_px, contact_degrees
and answers.md: the model's answers to three fixed questions of --val, next to the truth.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from common.config import PRESETS
from common.optim import Muon, parameter_groups, set_lr
from common.scripts import cli, flag, run_main
from common.training import Processes, Run, check_frozen, cosine, finished, freeze, parts_of, rows_of_step, stop_on_nan
from common.weights import count
from data.dataset import IGNORE, Batch, Conversations, visual_tokens, ways
from data.dense import DenseBatch, DensePictures
from data.objectives import AnswerObjective, DenseObjective
from data.tokenizer import load_encoding
from data.validation import evaluate_answers, evaluate_dense, show_answers, shown_questions
from robomamba import RoboMamba, RoboMambaConfig

# The shipped runs: `--stage` on its own selects these settings.
MORE = "presence=3,possible=4,count=2,parts=2,state=3,success=4,past=4"
RECIPE = {
    "vision": dict(init="", out="runs/vision", max_steps=6000, lr=2e-3, muon=True, more=""),
    "align": dict(init="runs/vision", out="runs/align", max_steps=100, lr=1e-3, muon=False, more=""),
    "cotrain": dict(init="runs/align", out="runs/cotrain", max_steps=6000, lr=2e-3, muon=True, more=MORE),
}
TRAINED = {"vision": ("vision",), "align": ("projector",), "cotrain": ("projector", "lm")}
NUMERIC = {"align": (0.0, 0.0), "cotrain": (0.35, 0.15)}  # fractions of contact questions; of where and box questions
QUESTIONS = 4  # per picture and step
WARMUP = 80  # steps
WEIGHT_DECAY = 0.05  # matrices only
CLIP = 1.0  # maximum gradient norm
LOG_EVERY = 20  # steps
SAVE_EVERY = 200
EVAL_EVERY = 500
EVAL_RECORDS = 100  # records of --val used by align and cotrain
SHIPPED_VOCABULARY = Path(__file__).parent / "data/vocab.tiktoken"


@dataclass
class TrainConfig:
    stage: str = flag("vision", "training stage", choices=tuple(RECIPE))
    data: str = flag("data/cache/train", "folder made by data.build, or (align, cotrain) a file in LLaVA's format")
    images: str = flag("", "root folder of the image paths (default: the conversation file's folder)")
    val: str = flag("data/cache/val", 'folder made by data.build --split val; "" = no validation')
    init: str = flag("", 'checkpoint folder to start from; "" = a new model from --preset')
    preset: str = flag("tiny-rgbd", "shapes of a new model", choices=tuple(PRESETS))
    vision_weights: str = flag("", "published CLIP folder to start from; the rest follows the paper, or --preset small")
    lm_weights: str = flag("", "published Mamba folder with a tokenizer.json; requires --vision-weights")
    out: str = flag(RECIPE["vision"]["out"], "output folder for the new checkpoint")
    cache: str = flag("", "folder for cached visual tokens (default: the data folder, or OUT if that is read-only)")
    resume: bool = flag(False, "resume from OUT/checkpoint.pt, bit for bit")
    device: str = flag("auto", "where to train", choices=("auto", "cpu", "cuda"))
    workers: int = flag(0, "extra processes that prepare batches in advance, for a GPU", low=0)
    seed: int = flag(0, "random seed for weights, data order and augmentation", low=0)
    max_steps: int = flag(RECIPE["vision"]["max_steps"], "number of training steps", low=1)
    batch_size: int = flag(32, "pictures per step, over all processes", low=1, high=65536)
    lr: float = flag(RECIPE["vision"]["lr"], "peak learning rate: linear warm-up, then cosine decay", low=1e-9)
    muon: bool = flag(RECIPE["vision"]["muon"], "Muon (orthogonal updates) for wide matrices, AdamW for the rest")
    more: str = flag("", "sampling factors of question types (vision: factors of loss terms), such as plan=0,past=4")
    turns: str = flag("branch", "each turn sees the picture only, or earlier turns too", choices=("branch", "pack"))
    soft_numbers: float = flag(1.9, "std of a number's soft label, in bins of 1/100; 0 = one-hot", low=0, high=50)
    number_weight: float = flag(3.0, "loss weight of the auxiliary head for an answer's numbers; 0 = off", low=0)
    unfreeze_vision: bool = flag(False, "align, cotrain: train the encoder too (a deviation from the paper)")


def recipe(stage: str, **changes) -> TrainConfig:
    """The settings of a stage's shipped run, with changes."""
    return TrainConfig(stage=stage, **(RECIPE[stage] | changes))


# ---- training --------------------------------------------------------------------------------------------------------


def start_model(cfg: TrainConfig, vocabulary: Path) -> RoboMamba:
    """Load published parts or --init's checkpoint, or build a new --preset model with the data's vocabulary."""
    if bool(cfg.vision_weights) != bool(cfg.lm_weights):
        raise ValueError("--vision-weights and --lm-weights: give both, or neither")
    torch.manual_seed(cfg.seed)
    if cfg.vision_weights:
        try:
            from extras.published import read_parts
        except ModuleNotFoundError:
            raise ValueError("--vision-weights: read by extras/published.py, which is not here") from None
        return read_parts(cfg.vision_weights, cfg.lm_weights, cfg.preset)
    if cfg.init:
        return RoboMamba.from_pretrained(cfg.init)
    encoding = load_encoding(vocabulary)
    config = RoboMambaConfig.from_dict(PRESETS[cfg.preset].to_dict())
    config.lm.vocab_size = encoding.n_vocab
    return RoboMamba(config, encoding)


def conversation_file(data: str) -> Path:
    """--data is either this file or a folder made by data.build."""
    return Path(data) / "conversations.json" if Path(data).is_dir() else Path(data)


def set_up(cfg: TrainConfig) -> tuple[RoboMamba, dict[str, str], Run]:
    """The model with some of its parts frozen, the digests of those parts, and the run."""
    processes = Processes(cfg.device, cfg.workers)
    if cfg.batch_size % processes.size:
        raise ValueError(f"--batch-size {cfg.batch_size} does not divide among {processes.size} processes")
    vocabulary = conversation_file(cfg.data).parent / "vocab.tiktoken"
    model = start_model(cfg, vocabulary if vocabulary.exists() else SHIPPED_VOCABULARY).to(processes.device)
    trained = TRAINED[cfg.stage]
    if cfg.unfreeze_vision:
        trained = ("vision", *trained)
    frozen = freeze(model, trained)
    for part in model.vision.unread(fine=cfg.stage == "vision"):  # data parallelism refuses weights without a gradient
        part.requires_grad_(False)
    run = Run(cfg, processes, cfg.max_steps, LOG_EVERY)
    sizes = (f"{k} {count(part):,d} {'frozen' if k in frozen else 'trained'}" for k, part in parts_of(model).items())
    run.say("  ".join(sizes))
    return model, frozen, run


def prepare(cfg: TrainConfig, run: Run, objective: nn.Module) -> tuple[nn.Module, Muon, range]:
    """The objective, wrapped for data parallelism; its optimizer; the steps to do. A resumed run restores them."""
    steps = range(run.begin(), cfg.max_steps)
    objective.to(run.processes.device).train()
    optimizer = Muon(parameter_groups(objective, WEIGHT_DECAY, cfg.muon), lr=cfg.lr, betas=(0.9, 0.98))
    run.load([objective], optimizer)
    return run.processes.wrap(objective), optimizer, steps


def descend(loss: Tensor, objective: nn.Module, optimizer, step: int) -> None:
    """One optimizer step on the loss."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    stop_on_nan(step, loss, objective)
    nn.utils.clip_grad_norm_(objective.parameters(), CLIP)
    optimizer.step()


def after_step(cfg: TrainConfig, run: Run, done: int, loss, terms: dict, objective, optimizer, validate) -> dict | None:
    """Log; validate and save when due. done: steps done in the whole run. Returns new validation numbers, if any."""
    means = run.processes.mean([loss.item(), *(term.item() for term in terms.values())])
    run.log(done, **dict(zip(("loss", *terms), means, strict=True)))
    result = None
    last = done == run.total
    if cfg.val and (done % EVAL_EVERY == 0 or last):
        objective.eval()
        if run.processes.first:
            result = validate(done)
            run.write(done, **result)
            run.say(f"step {done}: " + "  ".join(f"{k} {v:.3f}" for k, v in result.items()))
        run.processes.barrier()
        objective.train()
    if done % SAVE_EVERY == 0 and not last:
        run.save(done, [objective], optimizer)
    return result


def autocast(processes: Processes):
    return torch.autocast("cuda", torch.bfloat16, enabled=processes.device.type == "cuda")


def train_vision(cfg: TrainConfig, model: RoboMamba, run: Run) -> dict:
    """Stage 0. Returns the last validation numbers."""
    vision = model.config.vision
    processes = run.processes
    data = DensePictures(cfg.data, vision.image_size, model.encoding, vision.depth)
    val = DensePictures(cfg.val, vision.image_size, model.encoding, vision.depth) if cfg.val else None
    torch.manual_seed(cfg.seed + 1)  # for the auxiliary heads
    objective = DenseObjective(model, bool(data.parts), cfg.more)

    def batch_of_step(step: int) -> DenseBatch:
        everyone = rows_of_step(cfg.seed, step, cfg.batch_size, len(data))
        return data.batch(everyone[processes.rank :: processes.size], [cfg.seed, step])

    def validate(done: int) -> dict:
        return evaluate_dense(objective, val, processes.device)

    parallel, optimizer, steps = prepare(cfg, run, objective)
    result = {}
    for step, batch in zip(steps, processes.ahead(batch_of_step, steps), strict=True):
        set_lr(optimizer, cfg.lr * cosine(step, cfg.max_steps, WARMUP))
        with autocast(processes):
            loss, terms = parallel(batch.to(processes.device))
        descend(loss, objective, optimizer, step)
        result = after_step(cfg, run, step + 1, loss, terms, objective, optimizer, validate) or result
    return result


def train_language(cfg: TrainConfig, model: RoboMamba, run: Run) -> dict:
    """Stages 1.1 and 1.2. The encoder is frozen, so its tokens are cached. Returns the last validation numbers."""
    size = model.config.vision.image_size
    processes = run.processes
    data = Conversations(conversation_file(cfg.data), model.encoding, size, cfg.images, cfg.turns, more=cfg.more)
    if data.cut:
        run.say(f"{data.cut} turns are cut: they are longer than the model is trained on")
    val = Conversations(conversation_file(cfg.val), model.encoding, size, limit=EVAL_RECORDS) if cfg.val else None
    cached = val_cached = None
    if not cfg.unfreeze_vision:
        cached = cached_tokens(cfg, model, data, run)
        val_cached = cached_tokens(cfg, model, val, run)[-1] if cfg.val else None
    shown = shown_questions(val) if cfg.val else []
    weights = (cfg.soft_numbers, cfg.number_weight) if data.has_numbers else (0.0, 0.0)
    questions = QUESTIONS if cfg.turns == "branch" else 1
    owners = torch.arange(cfg.batch_size // processes.size).repeat_interleave(questions)
    torch.manual_seed(cfg.seed + 1)  # for the auxiliary head
    objective = AnswerObjective(model, *weights)

    def batch_of_step(step: int) -> tuple[Tensor, Batch]:
        everyone = rows_of_step(cfg.seed, step, cfg.batch_size, len(data))
        rng = np.random.default_rng([cfg.seed, step])
        drawn = data.draw(everyone, rng, questions, *NUMERIC[cfg.stage])  # every process draws for the whole batch
        mine = range(processes.rank, len(everyone), processes.size)
        rows = everyone[mine]
        if cached is None:
            images = data.pictures(rows)
        else:  # an RGB-D encoder sees no depth in half of the steps
            images = torch.from_numpy(cached[step % len(cached)][rows]).float()
        return images, data.collate([drawn[i * questions + q] for i in mine for q in range(questions)])

    def validate(done: int) -> dict:
        numbers = evaluate_answers(model, val, val_cached, processes.device)
        run.add_answers(done, show_answers(model, shown))
        return numbers

    parallel, optimizer, steps = prepare(cfg, run, objective)
    result = {}
    for step, (images, b) in zip(steps, processes.ahead(batch_of_step, steps), strict=True):
        set_lr(optimizer, cfg.lr * cosine(step, cfg.max_steps, WARMUP))
        counts = processes.mean([(b.labels[:, 1:] != IGNORE).sum().item(), (~b.numbers.isnan()).sum().item()])
        inputs = (images, owners, b.tokens, b.lengths, b.labels, b.prompts, b.numbers)
        with autocast(processes):
            loss, terms = parallel(*(x.to(processes.device) for x in inputs), *(max(n, 1) for n in counts))
        descend(loss, objective, optimizer, step)
        result = after_step(cfg, run, step + 1, loss, terms, objective, optimizer, validate) or result
    return result


def cached_tokens(cfg: TrainConfig, model: RoboMamba, data: Conversations, run: Run) -> list[np.ndarray]:
    """Visual tokens of the pictures: without depth and, for an RGB-D encoder, also with depth."""
    names = [record.get("image", "") for record in data.records]
    place = (run.processes, cfg.cache, cfg.out)
    return [visual_tokens(model.vision, data.root, names, *place, way) for way in ways(model.vision, data.root, names)]


def train(cfg: TrainConfig) -> dict:
    """Run one stage; returns the last validation numbers. No bit of a frozen part may change."""
    if cfg.resume and finished(Path(cfg.out), "model.safetensors"):
        return {}
    model, frozen, run = set_up(cfg)
    with run:
        result = train_vision(cfg, model, run) if cfg.stage == "vision" else train_language(cfg, model, run)
        check_frozen(model, frozen)
        if run.processes.first:
            model.save_pretrained(run.out)
        run.finish()
        run.say(f"saved {run.out}; frozen and bit-equal: {', '.join(frozen) or 'nothing'}")
        run.processes.barrier()
    return result


def main() -> None:
    train(cli(TrainConfig, __doc__, recipes=RECIPE))


if __name__ == "__main__":
    run_main(main, "--resume goes on from the last checkpoint")
