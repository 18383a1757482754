"""Stage 2: train a policy head, about 0.1 % of the parameters, to manipulate; the rest stays frozen, bit for bit.

    python finetune_policy.py --half                                    # the shipped run: minutes on two cores
    python finetune_policy.py --out runs/random --random-backbone       # baseline: a head on an untrained model
    python finetune_policy.py --checkpoint runs/policy --keep-head --unfreeze --epochs 3 --lr 3e-4 --out runs/full

The backbone never changes, so each (picture, instruction) is encoded once: its pooled state (RoboMamba section 3.3) is
cached, and the head trains on those vectors. Losses (paper Eq. 5 and 6): L1 on the pixel, here as a fraction of the
picture, plus the geodesic angle between the predicted and the true gripper rotation. A fixed rule sets the yaw about
the approach (sim.scene.rotation_from_approach), because a suction cup leaves it free: with the paper's random yaw, the
mean angle could not fall below 90 degrees.

A model with a fine map (`fine` in common/config.py) has a second head, the pointing head, about as small. It trains on
part of each batch to predict, for each cell of the map, whether it is the contact and in which direction to grip there.
An RGB-D encoder sees every picture twice, with and without depth.

Written to OUT: the checkpoint, policy.json (errors on --val, sizes, seconds), run.json, metrics.csv and curves.png:
    loss, averaged per epoch; on --val every five epochs, with depth if the encoder takes it: pixel_px (median distance
    in pixels), approach_degrees (median angle of the approach axis, which is what matters), rotation_degrees (median
    angle of the whole rotation); point_px, point_degrees: the same for the pointing head
"""

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from common.files import write_json
from common.optim import set_lr
from common.pointing import PointingHead, peak, pointing_losses
from common.scripts import cli, flag, progress, run_main
from common.training import PARTS, Processes, Run, check_frozen, cosine, finished, freeze, order_of_pass, stop_on_nan
from common.weights import count
from data.dataset import load_manipulation, pack, pad, read_picture, to_tensor, tokens_and_maps, visual_tokens, ways
from data.prompts import contact_question
from robomamba import HeadConfig, PolicyHead, RoboMamba, init_weights, rotation_from_6d

HEADS = ("head", "point")  # what is trained
WEIGHT_DECAY = 0.01
CLIP = 1.0  # maximum gradient norm with --unfreeze
EVAL_EVERY = 5  # epochs
CENTRED = 512  # samples whose mean state a new head is centred on
TURN = 4.0  # depth may turn an RGB-D model's direction by up to this many times its median error on --val
POINTED = 16  # samples per batch for the pointing head


@dataclass
class PolicyConfig:
    checkpoint: str = flag("runs/cotrain", "folder of the co-trained model")
    data: str = flag("data/cache/train", "folder made by data.build")
    val: str = flag("data/cache/val", 'folder made by data.build --split val; "" = no validation')
    out: str = flag("runs/policy", "output folder for the new checkpoint")
    cache: str = flag("", "folder for cached visual tokens (default: the data folder, or OUT if that is read-only)")
    resume: bool = flag(False, "resume from OUT/checkpoint.pt, bit for bit")
    device: str = flag("auto", "where to train", choices=("auto", "cpu", "cuda"))
    workers: int = flag(0, "extra processes that read pictures in advance, for a GPU", low=0)
    seed: int = flag(0, "random seed for the new head and the sample order", low=0)
    samples: int = flag(10_000, "number of manipulation samples to use (the paper's 10K)", low=1)
    epochs: int = flag(60, "passes over the samples", low=1)
    max_steps: int = flag(0, "number of training steps, overrides --epochs; 0 = all epochs", low=0)
    batch_size: int = flag(128, "samples per step", low=1)
    lr: float = flag(2e-3, "peak learning rate: one epoch of linear warm-up, then cosine decay", low=1e-9)
    direction_weight: float = flag(
        0.3, "weight of the angle (radians) relative to the pixel L1 (fraction of the picture)", low=0
    )
    head: str = flag("two_mlp", "two MLPs (pixel, rotation) or one (paper Table 6)", choices=("two_mlp", "one_mlp"))
    hidden: int = flag(8, "hidden width of the new head", low=1)
    pool: str = flag("last", "how text states are pooled for the head", choices=("last", "first_last", "mean"))
    keep_head: bool = flag(False, "keep training the checkpoint's head instead of a new one")
    random_backbone: bool = flag(False, "baseline: random weights in vision, projector and language model")
    unfreeze: bool = flag(False, "train all but the pointing head, from RGB (an upper reference, unlike the paper)")
    half: bool = flag(False, "save weight matrices in float16")


# ---- losses ----------------------------------------------------------------------------------------------------------


def geodesic(a: Tensor, b: Tensor) -> Tensor:
    """Angle in radians between rotations (.., 3, 3), paper Eq. 6; clamped so that its gradient stays finite."""
    # exercise 7: geodesic loss
    trace = (a * b).sum((-1, -2))  # Tr(a^T b)
    return torch.arccos(((trace - 1) / 2).clamp(-1 + 1e-6, 1 - 1e-6))
    # end of exercise 7


def policy_loss(head: PolicyHead, states: Tensor, pixel: Tensor, rotation: Tensor, direction_weight: float) -> Tensor:
    """Eq. 5 as a fraction of the picture plus Eq. 6 in radians, for states (n, D)."""
    said_pixel, r6 = head(states)
    position = (said_pixel - pixel).abs().mean() / 2
    direction = geodesic(rotation_from_6d(r6), rotation).mean()
    return position + direction_weight * direction


@torch.no_grad()
def errors(head: PolicyHead, states: Tensor, pixel: Tensor, rotation: Tensor, image_size: int) -> dict[str, float]:
    """Median errors of a head: pixels, degrees of the approach axis, degrees of the whole rotation."""
    said_pixel, r6 = head(states)
    said = rotation_from_6d(r6)
    axis = torch.arccos((said[..., 2] * rotation[..., 2]).sum(-1).clamp(-1, 1))
    return {
        "pixel_px": (said_pixel - pixel).norm(dim=-1).median().item() * image_size / 2,
        "approach_degrees": axis.median().rad2deg().item(),
        "rotation_degrees": geodesic(said, rotation).median().rad2deg().item(),
    }


def pointing_loss(point: PointingHead, states: Tensor, fine: Tensor, pixel: Tensor, rotation: Tensor) -> Tensor:
    """The pointing head's loss for states (n, D) and fine maps (n, C, H, H); see `pointing_losses`."""
    heat, way = point(states, fine).split([1, 3], 1)
    contact = (pixel + 1) * heat.shape[-1] / 2 - 0.5
    where, aim = pointing_losses(heat[:, 0], way, contact, rotation[..., 2])
    return where + aim


@torch.no_grad()
def pointing_errors(point: PointingHead, states: Tensor, fine: Tensor, pixel: Tensor, rotation: Tensor) -> tuple:
    """The pointing head's errors, (n,) each: distance (fraction of the picture), approach-axis angle (degrees)."""
    heat, way = point(states, fine).split([1, 3], 1)
    said, approach = peak(heat[:, 0], way)
    axis = torch.arccos((approach * rotation[..., 2]).sum(-1).clamp(-1, 1))
    return (said - pixel).norm(dim=-1) / 2, axis.rad2deg()


# ---- samples ---------------------------------------------------------------------------------------------------------


def targets(samples: list[dict], device) -> tuple[Tensor, Tensor]:
    """Pixels (n, 2) in -1 .. 1 and rotations (n, 3, 3) of manipulation samples."""
    pixel = torch.tensor([[s["u"], s["v"]] for s in samples]) * 2 / torch.tensor([s["size"] for s in samples]) - 1
    rotation = rotation_from_6d(torch.tensor([s["rotation6d"] for s in samples]).float())
    return pixel.float().to(device), rotation.to(device)


def text_states(model: RoboMamba, images: Tensor, samples: list[dict], owners: Tensor) -> Tensor:
    """(n, D): the pooled state after each sample's picture, images[owners], and its question."""
    device = model.lm.lm_head.weight.device
    prompts = [model.prompt(contact_question(s["instruction"])) for s in samples]
    tokens, _, lengths, _ = pad([pack([(prompt, [])]) for prompt in prompts], model.encoding.eot_token)
    lengths = lengths.to(device)
    states = model.text_states(images.to(device), tokens.to(device), owners.to(device), lengths=lengths)
    return model.pool(states, lengths)


@torch.no_grad()
def pooled_states(model: RoboMamba, tokens: np.ndarray, samples: list[dict], owners: np.ndarray, batch=64) -> Tensor:
    """(n, D): the state the head reads for each sample; tokens[owners] are their pictures' visual tokens."""
    states = []
    for start in range(0, len(samples), batch):
        shown, mine = np.unique(owners[start : start + batch], return_inverse=True)
        images = torch.from_numpy(tokens[shown]).float()
        states.append(text_states(model, images, samples[start : start + batch], torch.from_numpy(mine)))
    return torch.cat(states)


def read_states(model: RoboMamba, folder: str, samples: list[dict], rows: Tensor) -> Tensor:
    """(n, D): the same for these rows, computed from the pictures with gradients (--unfreeze)."""
    part = [samples[row] for row in rows]
    size = model.config.vision.image_size
    pictures = to_tensor([read_picture(Path(folder) / s["image"], size) for s in part])
    return text_states(model, pictures, part, torch.arange(len(part)))


class Samples(NamedTuple):
    """Manipulation samples in the form the head trains on."""

    states: Callable[[Tensor], Tensor]  # rows -> states (n, D): looked up, or computed on the fly (--unfreeze)
    pixel: Tensor  # (n, 2) in -1 .. 1
    rotation: Tensor  # (n, 3, 3)
    fine: Callable[[Tensor], Tensor] | None = None  # rows -> their fine maps (n, C, H, H)


def prepare(
    cfg: PolicyConfig, model: RoboMamba, folder: str, samples: list[dict], processes: Processes, shown: tuple
) -> Samples:
    """shown: True = the encoder sees depth, False = it does not; with both, every sample appears twice."""
    pixel, rotation = targets(samples * len(shown), processes.device)
    if cfg.unfreeze:
        return Samples(lambda rows: read_states(model, folder, samples, rows), pixel, rotation)
    names, owners = np.unique([s["image"] for s in samples], return_inverse=True)
    states, maps = [], []
    for way in shown:
        if model.point is None:
            tokens = visual_tokens(model.vision, folder, list(names), processes, cfg.cache, cfg.out, way)
        else:
            tokens, found = tokens_and_maps(model.vision, folder, list(names), processes, way)
            maps.append(torch.from_numpy(found))
        states.append(pooled_states(model, tokens, samples, owners))
    states = torch.cat(states)
    if not maps:
        return Samples(lambda rows: states[rows], pixel, rotation)
    maps = torch.cat(maps)
    at = torch.cat([torch.from_numpy(owners) + k * len(names) for k in range(len(shown))])
    return Samples(lambda rows: states[rows], pixel, rotation, lambda rows: maps[at[rows]].to(states))


@torch.no_grad()
def validate(model: RoboMamba, val: Samples) -> dict[str, float]:
    size = model.config.vision.image_size
    blocks = torch.arange(len(val.pixel)).split(64)
    states = torch.cat([val.states(rows) for rows in blocks])
    result = errors(model.head, states, val.pixel, val.rotation, size)
    if val.fine:
        found = (pointing_errors(model.point, states[i], val.fine(i), val.pixel[i], val.rotation[i]) for i in blocks)
        distances, angles = (torch.cat(x).median().item() for x in zip(*found, strict=True))
        result |= {"point_px": distances * size, "point_degrees": angles}
    return result


# ---- main ------------------------------------------------------------------------------------------------------------


def start_model(cfg: PolicyConfig, processes: Processes) -> RoboMamba:
    """The checkpoint with a new head, unless --keep-head."""
    model = RoboMamba.from_pretrained(cfg.checkpoint)
    torch.manual_seed(cfg.seed)
    if cfg.random_backbone:
        fresh = RoboMamba(model.config, model.encoding)
        model.vision, model.projector, model.lm = fresh.vision, fresh.projector, fresh.lm
    if not cfg.keep_head:
        model.config.head = HeadConfig(cfg.head, (cfg.hidden,), cfg.pool)
        model.head = PolicyHead(model.config.head, model.config.lm.d_model)
        init_weights(model.head)
        if model.point is not None and not cfg.unfreeze:
            model.point = PointingHead(model.config.lm.d_model, model.config.vision.fine)
    return model.to(processes.device).train()


@torch.no_grad()
def centre(head: PolicyHead, data: Samples) -> None:
    """Centre a new head's hidden units on the mean state, so that each ReLU is active for about half of the samples.

    The mean of the states is larger than their spread: with zero biases, most units are active for all samples or none,
    and a head of 8 units never learns directions if too many are dead (LOG.md). The paper gives no initial values.
    """
    n = len(data.pixel)
    mean = data.states(torch.linspace(0, n - 1, min(n, CENTRED)).long()).mean(0)
    for mlp in head.mlps:
        mlp[0].bias.copy_(-mlp[0].weight @ mean)


def learn(cfg: PolicyConfig, run: Run, model: RoboMamba, data: Samples, val: Samples | None) -> dict[str, float]:
    """Train, and log, validate and save between epochs. Returns the last validation errors."""
    learners = [model] if cfg.unfreeze else [getattr(model, name) for name in HEADS if getattr(model, name)]
    weights = [p for learner in learners for p in learner.parameters()]  # everything a checkpoint must hold
    optimizer = torch.optim.AdamW(weights, lr=cfg.lr, weight_decay=WEIGHT_DECAY)
    n = len(data.pixel)
    steps = math.ceil(n / cfg.batch_size)  # of an epoch
    first = run.begin()
    run.load(learners, optimizer)
    result = {}
    for epoch in range(first // steps, math.ceil(run.total / steps)):
        order = torch.from_numpy(order_of_pass(cfg.seed, epoch, n))
        batches = order.split(cfg.batch_size)[: run.total - epoch * steps]
        losses = 0.0
        for step, rows in enumerate(batches, epoch * steps):
            set_lr(optimizer, cfg.lr * cosine(step, run.total, warmup=steps))
            states = data.states(rows)
            loss = policy_loss(model.head, states, data.pixel[rows], data.rotation[rows], cfg.direction_weight)
            if data.fine:
                few = rows[:POINTED]
                fine = data.fine(few)
                loss = loss + pointing_loss(model.point, states[:POINTED], fine, data.pixel[few], data.rotation[few])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            stop_on_nan(step, loss, model)
            if cfg.unfreeze:
                nn.utils.clip_grad_norm_(model.parameters(), CLIP)
                progress(step + 1, run.total, run.start_time, "batches")
            optimizer.step()
            losses += loss.item() * len(rows)
        done = epoch * steps + len(batches)
        run.log(done, loss=losses / sum(len(rows) for rows in batches))
        if val and ((epoch + 1) % EVAL_EVERY == 0 or done == run.total):
            result = validate(model, val)
            run.write(done, **result)
        if done < run.total:
            run.save(done, learners, optimizer)
    return result


def finetune(cfg: PolicyConfig) -> dict:
    """Train the head; returns the last validation errors, sizes and seconds (also written to OUT/policy.json)."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("finetune_policy.py trains in one process: start it without torchrun")
    out = Path(cfg.out)
    if cfg.resume and finished(out, "policy.json"):
        return {}
    start = time.monotonic()
    processes = Processes(cfg.device, cfg.workers)
    samples = load_manipulation(Path(cfg.data) / "manipulation.jsonl")[: cfg.samples]
    val_samples = load_manipulation(Path(cfg.val) / "manipulation.jsonl") if cfg.val else []
    model = start_model(cfg, processes)
    frozen = freeze(model, PARTS if cfg.unfreeze else HEADS)
    heads = {name: count(getattr(model, name)) for name in HEADS if getattr(model, name)}
    shown = (False,) if cfg.unfreeze else ways(model.vision, cfg.data, [s["image"] for s in samples])
    total = cfg.max_steps or cfg.epochs * math.ceil(len(shown) * len(samples) / cfg.batch_size)
    with Run(cfg, processes, total, log_every=1) as run:
        rest = "the rest is frozen" if frozen else "the rest is trained too"
        sizes = ", ".join(f"{name} {n:,d} ({n / count(model):.3%})" for name, n in heads.items())
        run.say(f"parameters: {sizes} of {count(model):,d}; {rest}")
        data = prepare(cfg, model, cfg.data, samples, processes, shown)
        val = prepare(cfg, model, cfg.val, val_samples, processes, shown[-1:]) if cfg.val else None
        if not cfg.keep_head:
            centre(model.head, data)
        read_seconds = time.monotonic() - start
        run.say(f"encoded {len(samples)} samples in {read_seconds:.0f} s")
        result = learn(cfg, run, model, data, val)
        check_frozen(model, frozen)
        if cfg.val and model.config.vision.depth and not cfg.unfreeze:  # --unfreeze sees no depth
            error = result["point_degrees" if model.point else "approach_degrees"]
            model.config.head.turn = min(180.0, round(TURN * error, 1))
        model.save_pretrained(out, half=cfg.half)
        result |= {f"{name}_parameters": n for name, n in heads.items()}
        result |= {"head_share": heads["head"] / count(model), "samples": len(samples)}
        result |= {"read_seconds": round(read_seconds, 1), "seconds": round(time.monotonic() - start, 1)}
        write_json(out / "policy.json", result)
        run.finish()
    run.say("  ".join(f"{name} {value:.4g}" for name, value in result.items()))
    run.say(f"saved {out}; frozen and bit-equal: {', '.join(frozen) or 'nothing'}")
    return result


def main() -> None:
    finetune(cli(PolicyConfig, __doc__))


if __name__ == "__main__":
    run_main(main, "--resume goes on from the last epoch")
