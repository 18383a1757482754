"""Stage 2: a policy head of about 0.1 % of the parameters learns to manipulate; the rest stays frozen, bit for bit.

    python finetune_policy.py --checkpoint runs/cotrain --out runs/policy                      # a minute on two cores
    python finetune_policy.py --checkpoint runs/cotrain --out runs/random --random-backbone   # the floor: never trained
    python finetune_policy.py --checkpoint runs/policy --out runs/full --unfreeze --hidden 0 --epochs 3 --lr 3e-4  # all

The backbone never changes, so each (picture, instruction) is read once: its pooled state (RoboMamba section 3.3) is
computed and kept, and the head trains on those vectors in seconds. Losses (paper Eq. 5 and 6): L1 on the pixel, here in
shares of the picture, plus the geodesic angle between the predicted and the true gripper rotation. Yaw about the
approach is filled by a fixed rule (sim.scene.rotation_from_approach), because a suction cup leaves it free: with the
paper's random yaw the angle could not fall below 90 degrees on average.

Logged (metrics.csv; drawn at the end as OUT/curves.png): loss; on --val every --eval-every epochs: pixel_px (median
distance in pixels), approach_degrees (median angle of the approach axis, which is what decides), rotation_degrees
(median angle of the whole rotation).
"""

import dataclasses
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from common.files import write_text
from common.scripts import Processes, Run, cli, cosine, digest, flag, progress, stop_on_nan
from data.dataset import load_manipulation, read_picture, visual_tokens
from data.prompts import contact_question
from robomamba import HeadConfig, PolicyHead, RoboMamba, count, init_weights, rotation_from_6d


@dataclass
class PolicyConfig:
    checkpoint: str = flag("runs/cotrain", "folder of the co-trained model")
    data: str = flag("data/cache/train", "folder made by data.build")
    val: str = flag("data/cache/val", 'folder made by data.build --split val; "" = none')
    out: str = flag("runs/policy", "folder of the new checkpoint")
    device: str = flag("auto", "auto | cpu | cuda")
    seed: int = flag(0, "")
    samples: int = flag(10_000, "manipulation samples used (the paper's 10K)")
    epochs: int = flag(60, "")
    batch_size: int = flag(128, "")
    lr: float = flag(2e-3, "peak")
    weight_decay: float = flag(0.01, "")
    direction_weight: float = flag(
        0.3, "of the geodesic angle in radians against the pixel's L1 in shares of the picture"
    )
    head: str = flag("two_mlp", "two_mlp | one_mlp | ssm (paper Table 6)")
    hidden: int = flag(
        8, "hidden width of a new head; 0 = go on with the checkpoint's own, whatever --head and --pool say"
    )
    pool: str = flag("last", "last | first_last | mean")
    random_backbone: bool = flag(False, "draw vision, projector and language model anew: the floor of the comparison")
    unfreeze: bool = flag(False, "train all parameters on the samples (upper reference; the paper freezes them)")
    eval_every: int = flag(5, "epochs")
    half: bool = flag(False, "save weight matrices in float16")


def geodesic(a: Tensor, b: Tensor) -> Tensor:
    """Angle in radians between rotations (.., 3, 3), paper Eq. 6; clamped so that its gradient stays finite."""
    # exercise 7: geodesic loss
    trace = (a * b).sum((-1, -2))  # Tr(a^T b)
    return torch.arccos(((trace - 1) / 2).clamp(-1 + 1e-6, 1 - 1e-6))
    # end of exercise 7


def targets(samples: list[dict], image_size: int) -> tuple[Tensor, Tensor]:
    """Pixels (n, 2) in -1 .. 1 and rotations (n, 3, 3) of manipulation samples."""
    pixel = torch.tensor([[s["u"], s["v"]] for s in samples]) * 2 / image_size - 1
    return pixel.float(), rotation_from_6d(torch.tensor([s["rotation6d"] for s in samples]).float())


def prompts(model: RoboMamba, samples: list[dict], device) -> tuple[Tensor, Tensor]:
    """Token numbers (n, T), right-padded, and true lengths (n,) of the samples' questions."""
    ids = [torch.tensor(model.prompt(contact_question(s["instruction"]))) for s in samples]
    padded = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=model.encoding.eot_token)
    return padded.to(device), torch.tensor([len(p) for p in ids], device=device)


def read_samples(model: RoboMamba, folder: str, samples: list[dict], rows: Tensor) -> Tensor:
    """(n, D): the states the head reads for these rows, from the pictures themselves, with gradients (--unfreeze)."""
    part, device = [samples[row] for row in rows], model.lm.lm_head.weight.device
    pictures = np.stack([read_picture(Path(folder) / s["image"], model.config.vision.image_size) for s in part])
    pictures = torch.from_numpy(pictures.transpose(0, 3, 1, 2).copy()).to(device)
    return model.pooled(pictures, *prompts(model, part, device))


@torch.no_grad()
def pooled_states(model: RoboMamba, folder: str, samples: list[dict], processes: Processes, batch: int = 64) -> Tensor:
    """(n, D): the state the head reads for each sample; (n, T, D), zeros for padding, for the head "ssm".

    Several samples of one picture share its reading.
    """
    names = list(dict.fromkeys(s["image"] for s in samples))
    tokens = visual_tokens(model.vision, folder, names, processes)
    where = {name: i for i, name in enumerate(names)}
    out = []
    for start in range(0, len(samples), batch):
        part = samples[start : start + batch]
        shown, owner = np.unique([where[s["image"]] for s in part], return_inverse=True)
        shown, owner = (
            torch.from_numpy(tokens[shown]).float().to(processes.device),
            torch.from_numpy(owner).to(processes.device),
        )
        out.extend(model.pooled(shown, *prompts(model, part, processes.device), owner))
    return nn.utils.rnn.pad_sequence(out, batch_first=True)


@torch.no_grad()
def errors(head: PolicyHead, states: Tensor, pixel: Tensor, rotation: Tensor, image_size: int) -> dict:
    """Median errors of a head: pixels, degrees of the approach axis, degrees of the whole rotation."""
    said_pixel, r6 = head(states)
    said = rotation_from_6d(r6)
    axis = torch.arccos((said[..., 2] * rotation[..., 2]).sum(-1).clamp(-1, 1))
    return {
        "pixel_px": (said_pixel - pixel).norm(dim=-1).median().item() * image_size / 2,
        "approach_degrees": axis.median().rad2deg().item(),
        "rotation_degrees": geodesic(said, rotation).median().rad2deg().item(),
    }


def finetune(cfg: PolicyConfig) -> dict:
    """Train the head; returns the last validation errors, shares and seconds (also written to OUT/policy.json)."""
    start = time.monotonic()
    processes = Processes(cfg.device)
    model = RoboMamba.from_pretrained(cfg.checkpoint).to(processes.device)
    torch.manual_seed(cfg.seed)
    if cfg.random_backbone:
        init_weights(model)
    if cfg.hidden:
        model.config.head = HeadConfig(cfg.head, (cfg.hidden,), cfg.pool)
        dataclasses.replace(model.config)  # checks the new head's names
        model.head = PolicyHead(model.config.head, model.config.lm.d_model)
        init_weights(model.head)
    model.requires_grad_(cfg.unfreeze).to(processes.device).train()
    model.head.requires_grad_(True)
    parts = ("vision", "projector", "lm")
    frozen = {} if cfg.unfreeze else {name: digest(getattr(model, name)) for name in parts}
    run = Run(cfg, processes, cfg.epochs, log_every=1)
    share = count(model.head) / count(model)
    rest = "is trained too" if cfg.unfreeze else "is frozen"
    run.say(f"head {count(model.head):,d} parameters, {100 * share:.3f} % of {count(model):,d}; the rest {rest}")

    # Read every sample once; from here on the backbone is not needed, unless it learns too.
    size = model.config.vision.image_size
    samples = load_manipulation(Path(cfg.data) / "manipulation.jsonl")[: cfg.samples]
    states = None if cfg.unfreeze else pooled_states(model, cfg.data, samples, processes)
    pixel, rotation = (x.to(processes.device) for x in targets(samples, size))
    if cfg.val:
        val_samples = load_manipulation(Path(cfg.val) / "manipulation.jsonl")
        val_states = None if cfg.unfreeze else pooled_states(model, cfg.val, val_samples, processes)
        val_targets = [x.to(processes.device) for x in targets(val_samples, size)]
    read_seconds = time.monotonic() - start
    run.say(f"read {len(samples)} samples in {read_seconds:.0f} s")

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=cfg.lr, weight_decay=cfg.weight_decay)
    steps, result = -(-len(samples) // cfg.batch_size), {}
    for epoch in range(cfg.epochs):
        order = torch.from_numpy(np.random.default_rng([cfg.seed, epoch]).permutation(len(samples)))
        total = 0.0
        for k, rows in enumerate(order.split(cfg.batch_size)):
            for group in optimizer.param_groups:
                group["lr"] = cfg.lr * cosine(epoch * steps + k, cfg.epochs * steps, warmup=steps)
            said_pixel, r6 = model.head(read_samples(model, cfg.data, samples, rows) if cfg.unfreeze else states[rows])
            l_pos = (said_pixel - pixel[rows]).abs().mean() / 2  # Eq. 5, shares of the picture
            l_dir = geodesic(rotation_from_6d(r6), rotation[rows]).mean()  # Eq. 6, radians
            loss = l_pos + cfg.direction_weight * l_dir
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            stop_on_nan(epoch * steps + k, loss, model.named_parameters())
            if cfg.unfreeze:
                nn.utils.clip_grad_norm_(trained, 1.0)
                progress(epoch * steps + k + 1, cfg.epochs * steps, start, "batches")
            optimizer.step()
            total += loss.item() * len(rows)
        run.log(epoch + 1, loss=total / len(samples))
        if cfg.val and ((epoch + 1) % cfg.eval_every == 0 or epoch + 1 == cfg.epochs):
            if cfg.unfreeze:
                chunks = torch.arange(len(val_samples)).split(64)
                with torch.no_grad():
                    val_states = torch.cat([read_samples(model, cfg.val, val_samples, rows) for rows in chunks])
            result = errors(model.head, val_states, *val_targets, size)
            run.write(epoch + 1, **result)

    for name, before in frozen.items():
        if digest(getattr(model, name)) != before:
            raise RuntimeError(f"{name} was frozen but has changed")
    model.save_pretrained(cfg.out, half=cfg.half)
    result |= {"head_parameters": count(model.head), "head_share": share, "samples": len(samples)}
    result |= {"read_seconds": round(read_seconds, 1), "seconds": round(time.monotonic() - start, 1)}
    write_text(Path(cfg.out) / "policy.json", json.dumps(result, indent=1) + "\n")
    run.finish()
    run.say("  ".join(f"{k} {v:.4g}" for k, v in result.items()))
    run.say(f"saved {cfg.out}; frozen and bit-equal: {', '.join(frozen) or 'nothing'}")
    return result


def main() -> None:
    cfg = cli(PolicyConfig, __doc__)
    try:
        finetune(cfg)
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
