"""Look inside: pictures of what the recurrent state does while the model reads a picture and a sentence.

    python -m extras.look --image scene.png --act "Open the top drawer." --out DIR     # steps, attention, memory
    python -m extras.look --image scene.png --ask "What is this object?" --out DIR
    python -m extras.look --out DIR              # the same for a simulated scene, and a GIF of a drawer being opened

DIR/README.md explains each file (CAPTIONS). A hook on every `x_proj` records the input of the scan (u), and
`MambaMixer.selection` recomputes dt, B and C from it; the forward pass is unchanged. Needs matplotlib.

The implicit attention of a Mamba layer: unroll the recurrence of selective_scan.py from token 0 to token t:

    y_t = sum_s M[t, s] u_s + sum_n R[t, n] h[n]       h: the state before token 0, zero at the start of a picture
    M[t, s] = sum_n C[t, n] exp(A[n] (dt_{s+1} + .. + dt_t)) dt_s B[s, n]       for s <= t, else 0
    R[t, n] = C[t, n] exp(A[n] (dt_0 + .. + dt_t))

per channel, plus D on the diagonal: a causal attention matrix without a softmax, which the scan never materialises.
C acts as the query, dt B as the key, and the exponential is the forgetting in between.

Sources: the matrix form of a selective SSM, Mamba-2 (arXiv 2405.21060, section 3) and "The Hidden Attention of Mamba
Models" (arXiv 2403.01590). Extra letters: P visual tokens, T prompt tokens, L = P + T; s token written, t token read.
"""

import argparse
import contextlib
import math
from collections import namedtuple
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.files import write_atomically, write_text
from common.plots import as_image, new_figure
from common.scripts import run_main
from data.dataset import read_picture
from data.prompts import contact_question
from selective_scan import discretise

SHIPPED = Path(__file__).parent.parent / "data/pretrained/robomamba-tiny-rgbd"
SHOWN, WORDS = 4, 40  # maximum number of layers per picture and of words per axis, evenly spread
SPAN = 0.05  # doublings: the colour scale always spans at least +- this much
EVERY = 12  # simulator steps per frame
EPISODE_SEED, EPISODE_TRIES = 10_700_000, 30  # validation scenes

CAPTIONS = {
    "steps.png": "Step size dt of every layer, over the patches and the words (mean over the channels, divided by the "
    "layer's median). Red: a large step, the token is written into the state and the past fades. Blue: a small step, "
    "the token is passed over. No colour: like any other token.",
    "attention.png": "The scan of every layer as a matrix, y = M u, its implicit attention: how much of the token in a "
    "column is read at the token in a row (|M|, mean over the channels, without the skip D; darker is more). Up to the "
    "red lines the picture's tokens, row by row, then the words. Nothing above the diagonal: the scan is causal. On "
    "top: what the last token, from which action and answer come, reads of each patch (red: more than the median).",
    "memory.png": "Norm |h| of the state of every layer after each token (line), and how far that token moved it "
    "(bars, same scale). After the red line come the words. Level line over bars: as much is forgotten as written.",
    "opening.gif": "The robot pulls, and the model reads each new picture from zero. Middle: dt of the last layer over "
    "the patches, relative to its median before the pull (red: written more). Right: how far the state after the "
    "picture has moved since then, in percent of its norm, a line per layer. Dashed: how far the drawer is open, cm.",
}


# Inputs of one layer's scan for one sequence, float64: u, dt (L, E), dt > 0; A (E, N), < 0; B, C (L, N); D (E,)
Layer = namedtuple("Layer", "u dt A B C D")

# A moment of the pull, and what the model computes from this picture alone: view, with a gripper that the model does
# not see; rgb uint8 (S, S, 3); opening, m; dt (P,) of the last layer, mean over the channels; states after the
# picture, {layer counted from 1: (E, N)}
Frame = namedtuple("Frame", "view rgb opening dt states")


@torch.inference_mode()
def read(model, rgb: np.ndarray, ids: list[int]) -> list[Layer]:
    """One forward pass on a picture uint8 (S, S, 3) and prompt ids; per layer, picture and words as one sequence."""
    seen = {block.mixer: [] for block in model.lm.backbone.layers}  # first the picture's u, then the words'
    with contextlib.ExitStack() as hooks:
        for mixer, parts in seen.items():
            hooks.enter_context(mixer.x_proj.register_forward_pre_hook(lambda _, args, to=parts: to.append(args[0])))
        model(model.image_tensor(rgb), torch.tensor([ids]), torch.tensor([len(ids)]))
    inputs = {mixer: torch.cat(parts, 1)[0] for mixer, parts in seen.items()}
    return [Layer(*(x.double() for x in (u, *mixer.selection(u), mixer.D))) for mixer, u in inputs.items()]


def scan_matrix(dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The scan as a matrix: dt (L, E), A (E, N), B, C (L, N), D (E,) or None -> M (E, L, L), R (E, L, N).

    y[t, e] = sum_s M[e, t, s] u[s, e] + sum_n R[e, t, n] state[e, n]; M is zero above its diagonal. O(L^2) memory."""
    age = dt.cumsum(0).T  # (E, L)
    gap = (age[:, :, None] - age[:, None, :]).clamp(min=0)  # (E, t, s); above the diagonal exp would overflow
    M = torch.zeros_like(gap)
    for A_n, B_n, C_n in zip(A.T, B.T, C.T, strict=True):
        M += torch.exp(A_n[:, None, None] * gap) * (C_n[:, None] * B_n)
    M = (M * dt.T[:, None, :]).tril()
    if D is not None:
        M.diagonal(dim1=1, dim2=2).add_(D[:, None])
    return M, torch.exp(age[:, :, None] * A[:, None]) * C


def mean_matrix(layer: Layer, channels: int = 64) -> np.ndarray:
    """(L, L): |M| without D, averaged over the channels, `channels` at a time."""
    total = torch.zeros(len(layer.dt), len(layer.dt), dtype=layer.dt.dtype)
    for dt, A in zip(layer.dt.split(channels, 1), layer.A.split(channels), strict=True):
        total += scan_matrix(dt, A, layer.B, layer.C)[0].abs().sum(0)
    return (total / len(layer.A)).numpy()


def states(layer: Layer) -> Tensor:
    """(L, E, N): the state after every token, starting from zero."""
    decay, write = discretise(layer.u, layer.dt, layer.A, layer.B)
    h = torch.zeros_like(layer.A)
    after = []
    for decay_t, write_t in zip(decay, write, strict=True):
        h = decay_t * h + write_t
        after.append(h)
    return torch.stack(after)


def shown(layers: list) -> list[int]:
    """Indices of the layers to draw: up to SHOWN, including the first and last."""
    return np.unique(np.linspace(0, len(layers) - 1, min(SHOWN, len(layers))).round().astype(int)).tolist()


def over_picture(axes, rgb: np.ndarray, values: np.ndarray, most: float | None = None) -> None:
    """Draws the picture (S, S, 3) in grey, with `values` (P,) as colours of its patches, 0 = no colour."""
    most = max(np.abs(values).max(), SPAN) if most is None else most
    place = (-0.5, len(rgb) - 0.5, len(rgb) - 0.5, -0.5)
    patches = values.reshape(math.isqrt(len(values)), -1)
    axes.imshow(rgb.mean(2), cmap="gray", vmin=0, vmax=255)
    axes.imshow(patches, cmap="bwr", vmin=-most, vmax=most, alpha=0.9 * np.abs(patches) / most, extent=place)
    axes.set_axis_off()


def name_words(axes, words: list[str], first: int, most: int = WORDS) -> None:
    """Sets ticks with up to `most` of the prompt's words, the first at x = `first`."""
    some = range(0, len(words), -(-len(words) // most))
    axes.set_xticks([first + k for k in some], [words[k] for k in some], rotation=90, fontsize="x-small")


def log_ratio(values: np.ndarray) -> np.ndarray:
    """Number of doublings above the median, of values (L,) or of every row of (n, L)."""
    return np.log2(values / np.median(values, -1, keepdims=True))


def draw_steps(rgb: np.ndarray, words: list[str], layers: list[Layer]):
    chosen, P = shown(layers), len(layers[0].dt) - len(words)
    figure = new_figure(3 * (1 + len(chosen)), 6)
    grid = figure.add_gridspec(2, 1 + len(chosen))
    axes = figure.add_subplot(grid[0, 0], title="what the model sees")
    axes.imshow(rgb)
    axes.set_axis_off()
    mean = np.stack([layers[i].dt.mean(1).numpy() for i in chosen])  # (layers, L)
    ratio = log_ratio(mean)
    most = max(np.abs(ratio).max(), SPAN)
    for j, i in enumerate(chosen):
        axes = figure.add_subplot(grid[0, 1 + j])
        over_picture(axes, rgb, ratio[j, :P], most)
        axes.set_title(f"layer {i + 1}: dt {mean[j, :P].min():.3f} to {mean[j, :P].max():.3f}", fontsize="small")
    axes = figure.add_subplot(grid[1, :])
    colours = axes.imshow(ratio[:, P:], cmap="bwr", vmin=-most, vmax=most, aspect="auto")
    axes.set_yticks(range(len(chosen)), [f"layer {i + 1}" for i in chosen])
    name_words(axes, words, 0)
    figure.colorbar(colours, ax=axes, label="log2 of dt / median")
    return figure


def draw_attention(rgb: np.ndarray, words: list[str], layers: list[Layer]):
    chosen, P = shown(layers), len(layers[0].dt) - len(words)
    figure = new_figure(4 * len(chosen), 7)
    for i, (above, below) in zip(chosen, figure.subplots(2, len(chosen), squeeze=False).T, strict=True):
        matrix = mean_matrix(layers[i])
        over_picture(above, rgb, log_ratio(matrix[-1, :P]))
        above.set_title(f"layer {i + 1}: read by the last token", fontsize="small")
        dark = np.quantile(matrix[np.tril_indices(len(matrix))], 0.98)
        below.imshow(np.clip(matrix / dark, 0, 1) ** 0.7, cmap="gray_r", aspect="auto")
        below.axhline(P - 0.5, color="red", linewidth=0.8)
        below.axvline(P - 0.5, color="red", linewidth=0.8)
        below.set_title(f"|M|, black: {dark:.2g}", fontsize="small")
        name_words(below, words, P, most=6)
    return figure


def draw_read(model, rgb: np.ndarray, question: str) -> Image.Image:
    """What the last token of a prompt reads from each patch: only the top row of attention.png, two layers per row."""
    ids = model.prompt(question)
    layers = read(model, rgb, ids)
    figure = new_figure(4.8, 5)
    for axes, i in zip(figure.subplots(2, SHOWN // 2).flat, shown(layers), strict=False):
        over_picture(axes, rgb, log_ratio(mean_matrix(layers[i])[-1, : -len(ids)]))
        axes.set_title(f"layer {i + 1}", fontsize="small")
    return as_image(figure)


def draw_memory(rgb: np.ndarray, words: list[str], layers: list[Layer]):
    chosen, P = shown(layers), len(layers[0].dt) - len(words)
    figure = new_figure(12, 1.8 * len(chosen) + 1)
    for i, axes in zip(chosen, figure.subplots(len(chosen), squeeze=False).flat, strict=True):
        h = states(layers[i])
        moved = torch.diff(h, dim=0, prepend=torch.zeros_like(h[:1])).flatten(1).norm(dim=1)
        axes.bar(range(len(h)), moved.numpy(), color="lightsteelblue")
        axes.plot(h.flatten(1).norm(dim=1).numpy(), color="black")
        axes.axvline(P - 0.5, color="red", linewidth=0.8)
        axes.set(ylabel=f"layer {i + 1}", xticks=[])
    name_words(axes, words, P)
    return figure


def save(out: Path, pictures: dict[str, list[Image.Image]]) -> list[Path]:
    """Writes OUT/README.md with the captions of the files present, then the pictures: one frame, or a GIF of several.
    Raises: ValueError naming a file that cannot be written."""
    names = [name for name in CAPTIONS if name in pictures or (out / name).exists()]
    text = "".join(f"## {name}\n\n{CAPTIONS[name]}\n\n![{name}]({name})\n\n" for name in names)
    write_text(out / "README.md", "# Inside the model\n\n" + text)
    for name, (first, *rest) in pictures.items():
        options = {"format": "PNG", "optimize": True}
        if rest:
            options = {"format": "GIF", "save_all": True, "append_images": rest, "duration": 120, "loop": 0}
        write_atomically(out / name, partial(first.save, **options))
    return [out / "README.md", *(out / name for name in pictures)]


def pictures_of(model, rgb: np.ndarray, question: str) -> dict[str, list[Image.Image]]:
    """The three pictures of one prompt, by file name. question: as `RoboMamba.prompt` takes it."""
    ids = model.prompt(question)
    words = [model.encoding.decode([i]).strip() or "_" for i in ids]
    layers = read(model, rgb, ids)
    drawn = {"steps.png": draw_steps, "attention.png": draw_attention, "memory.png": draw_memory}
    return {name: [as_image(draw(rgb, words, layers))] for name, draw in drawn.items()}


def film(model, scene, action, instruction: str) -> list[Frame]:
    """Executes `action` in the scene, whose target slides; one frame every EVERY steps."""
    from sim.pictures import GREEN, draw_gripper  # imported here: pictures of a prompt need no simulator

    ids = model.prompt(contact_question(instruction))
    approach = scene.camera_rotation.T @ action.approach
    start = scene.backproject(action.u, action.v)
    frames = []

    def on_frame(step, contact):
        if step % EVERY:
            return
        rgb = scene.picture()[0]
        layers = read(model, rgb, ids)
        P = len(layers[0].dt) - len(ids)
        after = {i + 1: states(layers[i])[P - 1] for i in shown(layers)}
        view = draw_gripper(scene, rgb, contact, approach, GREEN)
        opening = float(np.linalg.norm(contact - start))  # of a slide: the contact moves as far as the part
        frames.append(Frame(view, rgb, opening, layers[-1].dt[:P].mean(1).numpy(), after))

    scene.act(action.u, action.v, action.approach, on_frame=on_frame)
    return frames


def draw_film(frames: list[Frame]) -> list[Image.Image]:
    """One image per frame: camera, dt over the patches, and the curves so far."""
    first = frames[0]
    ratio = np.log2(np.stack([f.dt for f in frames]) / np.median(first.dt))  # (frames, P)
    most = max(np.abs(ratio).max(), SPAN)
    change = {i: [100 * float((f.states[i] - h).norm() / h.norm()) for f in frames] for i, h in first.states.items()}
    opening = [100 * f.opening for f in frames]
    sheets = []
    for k, frame in enumerate(frames):
        figure = new_figure(11, 3.4)
        view, patches, curves = figure.subplots(1, 3)
        view.imshow(frame.view)
        view.set_axis_off()
        view.set_title("the robot pulls")
        over_picture(patches, frame.rgb, ratio[k], most)
        patches.set_title("step size dt, last layer")
        for i, values in change.items():
            curves.plot(values[: k + 1], label=f"layer {i}")
        curves.set(xlim=(0, len(frames)), ylim=(0, 1.05 * max(0.1, *map(max, change.values()))))
        curves.set_title("change of the state, %")
        curves.legend(loc="upper left", fontsize="small")
        opened = curves.twinx()
        opened.plot(opening[: k + 1], "k--")
        opened.set(ylim=(0, 1.05 * max(0.1, *opening)), ylabel="opening, cm")
        sheets.append(as_image(figure))
    return sheets


def episode(model, category: str, seed: int) -> dict[str, list[Image.Image]]:
    """opening.gif: the model's own action in the first scene from `seed` on where it opens a drawer ("long" success in
    sim/scene.py); and the pictures of the start state of that scene. Raises: ValueError for an unknown category, or if
    none of EPISODE_TRIES scenes qualifies."""
    from sim.scene import Scene

    with Scene(model.config.vision.image_size) as scene:
        for k in range(seed, seed + EPISODE_TRIES):
            part = scene.spawn(category, k).spec.parts[scene.target]
            instruction = f"open the {part.label}"
            if part.joint != "prismatic" or part.primitive == "push":
                continue
            action = model.predict_action(scene.render(), instruction)
            if scene.act(action.u, action.v, action.approach).long:
                print(f'{category} {k}, "{instruction}"', flush=True)
                pictures = pictures_of(model, scene.rgb, contact_question(instruction))
                return pictures | {"opening.gif": draw_film(film(model, scene, action, instruction))}
    raise ValueError(f"no drawer that the model opens among {category} {seed} to {k}; try another --seed")


def main() -> None:
    parser = argparse.ArgumentParser(description="Pictures of the recurrent state; without --image, of a drawer opened")
    parser.add_argument("--out", required=True, help="folder for the pictures and README.md")
    parser.add_argument("--image", help="a picture file; needs --ask or --act")
    sentence = parser.add_mutually_exclusive_group()
    sentence.add_argument("--ask", help="a question about the picture")
    sentence.add_argument("--act", help="an instruction")
    parser.add_argument("--checkpoint", default=SHIPPED, help="folder written by save_pretrained")
    parser.add_argument("--category", default="StorageFurniture", help="without --image: a category with drawers")
    parser.add_argument("--seed", type=int, default=EPISODE_SEED, help="without --image: the first scene tried")
    args = parser.parse_args()
    if (args.ask is None and args.act is None) != (args.image is None):
        raise ValueError("--image and one of --ask and --act go together")
    from robomamba import RoboMamba

    model = RoboMamba.from_pretrained(args.checkpoint)
    if args.image:
        rgb = np.asarray(read_picture(args.image, model.config.vision.image_size))
        pictures = pictures_of(model, rgb, args.ask if args.act is None else contact_question(args.act))
    else:
        pictures = episode(model, args.category, args.seed)
    print("Written:", *save(Path(args.out), pictures))


if __name__ == "__main__":
    run_main(main)
