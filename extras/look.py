"""Look inside: pictures of what the recurrent state does while the model reads a picture and a sentence.

    python robomamba.py --image scene.png --act "Open the top drawer." --look DIR    # steps, attention, memory
    python -m extras.look --out DIR              # the same for a scene of the simulator, and a GIF: a drawer is opened

DIR/README.md says what to see in each file (CAPTIONS below). The forward pass is left as it is: a hook on every
`x_proj` keeps what enters the scan (u), and `MambaMixer.selection` makes dt, B and C of it once more.

The attention of a Mamba layer. Write the recurrence of selective_scan.py out from token 0 to token t, and it says

    y_t = sum_s M[t, s] u_s + sum_n R[t, n] h[n]       h: the state before token 0, zero at the start of a picture
    M[t, s] = sum_n C[t, n] exp(A[n] (dt_{s+1} + .. + dt_t)) dt_s B[s, n]       for s <= t, else 0
    R[t, n] = C[t, n] exp(A[n] (dt_0 + .. + dt_t))

per channel, plus D on the diagonal: a causal attention matrix that no softmax has made and that nobody stores when the
scan runs. C plays the query, dt B the key, and the exponential is the forgetting in between.

Sources: the matrix form of a selective SSM, Mamba-2 (arXiv 2405.21060, section 3) and "The Hidden Attention of Mamba
Models" (arXiv 2403.01590). Extra letters: P visual tokens, T prompt tokens, L = P + T; s written, t read.
"""

import argparse
import math
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from common.files import write_atomically, write_text
from data.dataset import read_picture
from data.prompts import contact_question

SHOWN = 4  # layers in a picture; of a deeper model these many, evenly spread
PANEL, PAD, LINE, WORD_CELL, WORD_STEP = 230, 12, 16, 11, 34  # pixels: a heat map, gaps, text, a word in the charts
MATRIX, CHART = 192, (360, 256)  # pixels that the visual tokens take of a matrix; the chart of the episode
WORDS = 240  # pixels that long prompts take of a matrix; only some of their words are named then
SPAN = 0.05  # doublings: colours never show less than this as a difference
INK, GREY, RED, BLUE = (40, 40, 40), (205, 205, 205), (220, 30, 30), (30, 90, 220)
GREEN, ORANGE, VIOLET = (20, 160, 60), (230, 130, 0), (130, 60, 170)
LINES = (BLUE, GREEN, ORANGE, VIOLET)  # one a layer
EVERY, FILM_MS, FILM_HOLD_MS, FILM_COLOURS = 12, 120, 1500, 96  # steps of the simulator and milliseconds a frame
EPISODE_SEED, EPISODE_TRIES = 10_700_000, 30  # validation scenes (sim_eval.py); how many are tried

CAPTIONS = {
    "steps.png": "Step size dt of every layer, over the patches of the picture and the words of the prompt (mean over "
    "the channels, divided by the layer's median). Red: a large step, the token is written into the state and the past "
    "fades. Blue: a small step, the token is passed over. No colour: like any other token.",
    "attention.png": "The selective scan of every layer written as a matrix, y = M u: how much of the token in a "
    "column is read at the token in a row (|M|, mean over the channels, without the skip D; darker is more). Up to the "
    "red lines the picture's tokens, row by row, then the words. Nothing above the diagonal: the scan is causal. On "
    "top, the last row laid over the picture: what the last token, of which action or answer are made, reads of each "
    "patch (red: more than of the median patch, blue: less).",
    "memory.png": "Norm |h| of the state of every layer after each token (line), and how far that token moved the "
    "state (bars, same scale). The picture is read first (a tick after each row of patches), the words come after the "
    "red line. Tall bars: tokens that change what is remembered. A level line over bars: about as much is forgotten "
    "as is written.",
    "opening.gif": "The robot pulls, and the model reads each new picture from zero. Middle: dt of the last layer over "
    "the patches, relative to its median before the pull (red: a large step, written more; blue: passed over). Right: "
    "how far the state after the picture has moved from the one before the pull, in percent of that one's norm, a line "
    "per layer; its norm now is beside the name. Black: how far the drawer is open.",
}


# ---- reading ---------------------------------------------------------------------------------------------------------


class Layer(NamedTuple):
    """What one layer's scan was given for one sequence, float64."""

    u: Tensor  # (L, E)
    dt: Tensor  # (L, E), > 0
    A: Tensor  # (E, N), < 0
    B: Tensor  # (L, N)
    C: Tensor  # (L, N)
    D: Tensor  # (E,)


@torch.inference_mode()
def read(model, rgb: np.ndarray, ids: list[int]) -> list[Layer]:
    """One forward pass of picture uint8 (S, S, 3) and prompt ids; picture and words joined to one sequence a layer."""
    mixers = [block.mixer for block in model.lm.backbone.layers]
    seen = [[] for _ in mixers]  # first the picture's u, then the words'
    hooks = [
        mixer.x_proj.register_forward_pre_hook(lambda _, args, parts=parts: parts.append(args[0]))
        for mixer, parts in zip(mixers, seen, strict=True)
    ]
    try:
        picture = torch.from_numpy(rgb.transpose(2, 0, 1).copy())[None]
        model.hidden(picture, torch.tensor([ids]))
    finally:
        for hook in hooks:
            hook.remove()
    layers = []
    for mixer, parts in zip(mixers, seen, strict=True):
        u = torch.cat(parts, 1)[0]
        layers.append(Layer(u.double(), *(x.double() for x in (*mixer.selection(u), mixer.D))))
    return layers


def scan_matrix(dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The scan as a matrix: dt (L, E), A (E, N), B, C (L, N), D (E,) or None -> M (E, L, L), R (E, L, N).

    y[t, e] = sum_s M[e, t, s] u[s, e] + sum_n R[e, t, n] state[e, n]; M is zero above its diagonal. O(L^2) memory.
    """
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
    """(L, L): |M| without D, averaged over the channels, some at a time."""
    total = torch.zeros(len(layer.dt), len(layer.dt), dtype=layer.dt.dtype)
    for dt, A in zip(layer.dt.split(channels, 1), layer.A.split(channels), strict=True):
        total += scan_matrix(dt, A, layer.B, layer.C)[0].abs().sum(0)
    return (total / len(layer.A)).numpy()


def states(layer: Layer) -> Tensor:
    """(L, E, N): the state after every token, from zero; the definition."""
    h, hs = torch.zeros_like(layer.A), []
    for u, dt, B in zip(layer.u, layer.dt, layer.B, strict=True):
        h = torch.exp(dt[:, None] * layer.A) * h + (dt * u)[:, None] * B
        hs.append(h)
    return torch.stack(hs)


def shown(layers: list) -> list[int]:
    """Which layers are drawn: at most SHOWN, first and last among them."""
    return np.unique(np.linspace(0, len(layers) - 1, min(SHOWN, len(layers))).round().astype(int)).tolist()


# ---- drawing ---------------------------------------------------------------------------------------------------------


def write(pen, x: float, y: float, text: str, size: int = 12, fill=INK, anchor: str = "la") -> None:
    pen.text((x, y), text, fill=fill, anchor=anchor, font=ImageFont.load_default(size))


def upright(sheet: Image.Image, x: int, y: int, text: str, size: int = 11) -> None:
    """`text` from bottom to top, its end at (x, y)."""
    font = ImageFont.load_default(size)
    strip = Image.new("RGB", (math.ceil(font.getlength(text)) + 2, size + 3), "white")
    write(ImageDraw.Draw(strip), 1, 0, text, size)
    sheet.paste(strip.rotate(90, expand=True), (x - (size + 3) // 2, y))


def captioned(sheet: Image.Image, name: str) -> Image.Image:
    """`sheet` with its caption written below."""
    lines = textwrap.wrap(CAPTIONS[name], max(20, (sheet.width - 2 * PAD) // 6))
    whole = Image.new("RGB", (sheet.width, sheet.height + LINE * len(lines) + PAD), "white")
    whole.paste(sheet, (0, 0))
    for i, line in enumerate(lines):
        write(ImageDraw.Draw(whole), PAD, sheet.height + i * LINE, line, 13)
    return whole


def colour(x: np.ndarray) -> np.ndarray:
    """-1 .. 1 -> (.., 4) in 0 .. 255: blue below 0, red above, more opaque with the size."""
    rgb = np.where(x[..., None] < 0, BLUE, RED)
    return np.concatenate([rgb, 230 * np.clip(np.abs(x[..., None]), 0, 1)], -1)


def over_picture(rgb: np.ndarray, values: np.ndarray, size: int) -> Image.Image:
    """The grey picture (S, S, 3) under `values` (P,), -1 .. 1, as colours of its patches; size x size pixels."""
    side = math.isqrt(len(values))
    base = Image.fromarray(rgb).convert("L").resize((size, size), Image.Resampling.BICUBIC).convert("RGBA")
    tint = Image.fromarray(colour(values.reshape(side, side)).astype(np.uint8), "RGBA")
    return Image.alpha_composite(base, tint.resize((size, size), Image.Resampling.NEAREST)).convert("RGB")


def draw_steps(rgb: np.ndarray, words: list[str], layers: list[Layer]) -> Image.Image:
    chosen, P = shown(layers), len(layers[0].dt) - len(words)
    mean = np.stack([layers[i].dt.mean(1).numpy() for i in chosen])  # (layers, L)
    middle = np.median(mean, 1, keepdims=True)
    ratio = np.log2(mean / middle)
    most = max(np.abs(ratio).max(), SPAN)  # the strongest colour
    font, width = ImageFont.load_default(13), (1 + len(chosen)) * (PANEL + PAD) + PAD
    label, gap = 60, 4
    lengths = [max(26, font.getlength(w) + 8) for w in words]
    row_of, x_of, x, row = [], [], label, 0
    for length in lengths:  # long prompts go on in a second row
        if x + length > width - PAD:
            x, row = label, row + 1
        x_of.append(x)
        row_of.append(row)
        x += length + gap
    band = (row + 1) * 36 + 6
    top = PANEL + 2 * LINE + PAD
    sheet = Image.new("RGB", (width, top + len(chosen) * band + LINE + PAD), "white")
    pen = ImageDraw.Draw(sheet)
    sheet.paste(Image.fromarray(rgb).resize((PANEL, PANEL), Image.Resampling.BICUBIC), (PAD, LINE + 4))
    write(pen, PAD, 2, "what the model sees", 13)
    for j, i in enumerate(chosen):
        x = PAD + (j + 1) * (PANEL + PAD)
        sheet.paste(over_picture(rgb, ratio[j, :P] / most, PANEL), (x, LINE + 4))
        write(pen, x, 2, f"layer {i + 1}: dt {mean[j, :P].min():.3f} to {mean[j, :P].max():.3f}", 13)
        y = top + j * band
        write(pen, PAD, y + 2, f"layer {i + 1}", 13)
        for word, x, r, length, value, t in zip(words, x_of, row_of, lengths, ratio[j, P:], mean[j, P:], strict=True):
            red, green, blue, alpha = colour(np.array(value / most))
            shade = tuple(int(255 + (c - 255) * alpha / 255) for c in (red, green, blue))
            pen.rectangle((x, y + r * 36, x + length, y + r * 36 + 19), fill=shade, outline=GREY)
            write(pen, x + 4, y + r * 36 + 2, word, 13)
            write(pen, x + length / 2, y + r * 36 + 21, f"{t:.2f}", 10, anchor="ma")
    low, high = 2**-most, 2**most
    text = f"colours: dt / median of the layer, from {low:.2f} (blue) over 1 (none) to {high:.2f} (red)"
    write(pen, PAD, sheet.height - LINE - 4, text, 13)
    return sheet


def draw_attention(rgb: np.ndarray, words: list[str], layers: list[Layer]) -> Image.Image:
    chosen, P = shown(layers), len(layers[0].dt) - len(words)
    cell = max(2, min(WORD_CELL, WORDS // len(words)))
    cells, named = np.array([max(1, MATRIX // P)] * P + [cell] * len(words)), slice(None, None, -(-WORD_CELL // cell))
    edge, side = np.concatenate([[0], np.cumsum(cells)]), int(cells.sum())
    labels = max(int(ImageFont.load_default(11).getlength(w)) for w in [*words, "picture"]) + 8
    top = LINE + PANEL + 2 * PAD + LINE
    sheet = Image.new("RGB", (labels + PAD + len(chosen) * (side + PAD), top + side + labels + PAD), "white")
    pen = ImageDraw.Draw(sheet)
    for j, i in enumerate(chosen):
        matrix, x0 = mean_matrix(layers[i]), labels + PAD + j * (side + PAD)
        last = np.log2(matrix[-1, :P] / np.median(matrix[-1, :P]))
        sheet.paste(over_picture(rgb, last / max(np.abs(last).max(), SPAN), PANEL), (x0, LINE + 4))
        write(pen, x0, 2, f"layer {i + 1}: read by the last token", 13)
        dark = np.quantile(matrix[np.tril_indices(len(matrix))], 0.98)
        grey = 255 * (1 - np.clip(matrix / dark, 0, 1) ** 0.7)
        picture = np.repeat(np.repeat(grey, cells, 0), cells, 1).astype(np.uint8)
        sheet.paste(Image.fromarray(picture), (x0, top))
        write(pen, x0, top - LINE, f"layer {i + 1}: |M|, black {dark:.2g}", 13)
        pen.rectangle((x0 - 1, top - 1, x0 + side, top + side), outline=INK)
        split = edge[P]
        pen.line((x0 + split, top, x0 + split, top + side), fill=RED)
        pen.line((x0, top + split, x0 + side, top + split), fill=RED)
        upright(sheet, x0 + split // 2, top + side + 4, "picture")
        for word, middle in list(zip(words, (edge[P:-1] + edge[P + 1 :]) // 2, strict=True))[named]:
            upright(sheet, x0 + int(middle), top + side + 4, word)
    write(pen, labels, top + edge[P] / 2, "picture", 11, anchor="rm")
    for word, middle in list(zip(words, (edge[P:-1] + edge[P + 1 :]) / 2, strict=True))[named]:
        write(pen, labels, top + middle, word, 11, anchor="rm")
    return sheet


def draw_memory(rgb: np.ndarray, words: list[str], layers: list[Layer]) -> Image.Image:
    chosen, P = shown(layers), len(layers[0].dt) - len(words)
    step = max(2, min(WORD_STEP, 3 * WORDS // len(words)))
    steps, named = np.array([max(2, 512 // P)] * P + [step] * len(words)), slice(None, None, -(-WORD_CELL // step))
    x_of, left, height = np.cumsum(steps) - steps / 2, 70, 100
    top, band = PAD, height + 2 * PAD
    bottom = max(int(ImageFont.load_default(12).getlength(w)) for w in words) + PAD
    sheet = Image.new("RGB", (left + int(steps.sum()) + PAD, top + len(chosen) * band + bottom), "white")
    pen = ImageDraw.Draw(sheet)
    for j, i in enumerate(chosen):
        h = states(layers[i])
        norm = h.flatten(1).norm(dim=1).numpy()
        moved = torch.diff(h, dim=0, prepend=torch.zeros_like(h[:1])).flatten(1).norm(dim=1).numpy()
        base, scale = top + j * band + height, height / max(norm.max(), moved.max())
        for x, wide, m in zip(left + x_of, steps, moved, strict=True):
            half = max(0, min(wide / 2 - 1, 8))
            pen.rectangle((x - half, base - scale * m, x + half, base), fill=(170, 190, 235))
        pen.line([(left + x, base - scale * n) for x, n in zip(x_of, norm, strict=True)], fill=INK, width=2)
        pen.line((left, base, sheet.width - PAD, base), fill=INK)
        border = left + int(steps[:P].sum())
        pen.line((border, base - height, border, base), fill=RED)
        for row in range(1, math.isqrt(P)):
            x = left + int(steps[: row * math.isqrt(P)].sum())
            pen.line((x, base, x, base + 4), fill=INK)
        write(pen, 4, base - height / 2, f"layer {i + 1}", 13, anchor="lm")
        write(pen, left - 4, base - scale * norm.max(), f"{norm.max():.3g}", 11, anchor="rm")
        write(pen, left - 4, base, "0", 11, anchor="rs")
    write(pen, left + steps[:P].sum() / 2, base + 8, f"{P} patches of the picture, row by row", 12, anchor="ma")
    for word, x in list(zip(words, x_of[P:], strict=True))[named]:
        upright(sheet, left + int(x), base + 4, word, 12)
    return sheet


def save_film(path: str, frames: list[Image.Image]) -> None:
    """A looping GIF. One palette for all frames, so that what does not change is stored once."""
    corners = Image.new("RGB", (frames[0].width, 3 * frames[0].height))
    for i, frame in enumerate((frames[0], frames[len(frames) // 2], frames[-1])):
        corners.paste(frame, (0, i * frame.height))
    palette = corners.quantize(FILM_COLOURS)
    few = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    times = [FILM_HOLD_MS, *[FILM_MS] * (len(few) - 2), FILM_HOLD_MS]
    few[0].save(path, format="GIF", save_all=True, append_images=few[1:], duration=times, loop=0, optimize=True)


def save(out: Path, pictures: dict[str, list[Image.Image]]) -> list[Path]:
    """OUT/README.md with the captions of what is there, then the pictures, one frame or a GIF of many.

    Raises: ValueError naming a file that cannot be written.
    """
    names = [name for name in CAPTIONS if name in pictures or (out / name).exists()]
    text = "".join(f"## {name}\n\n{CAPTIONS[name]}\n\n![{name}]({name})\n\n" for name in names)
    write_text(out / "README.md", "# Inside the model\n\n" + text)
    for name, frames in pictures.items():
        if name.endswith(".gif"):
            write_atomically(out / name, lambda tmp, frames=frames: save_film(tmp, frames))
        else:
            write_atomically(out / name, lambda tmp, frames=frames: frames[0].save(tmp, format="PNG", optimize=True))
    return [out / "README.md", *(out / name for name in pictures)]


def pictures_of(model, rgb: np.ndarray, question: str) -> dict[str, list[Image.Image]]:
    """The three pictures of one prompt, by file name."""
    ids = model.prompt(question)
    words, layers = [model.encoding.decode([i]).strip() or "_" for i in ids], read(model, rgb, ids)
    drawn = {"steps.png": draw_steps, "attention.png": draw_attention, "memory.png": draw_memory}
    return {name: [captioned(make(rgb, words, layers), name)] for name, make in drawn.items()}


def draw(model, image, question: str, out) -> list[Path]:
    """Writes steps.png, attention.png, memory.png and README.md into folder `out`; returns their paths.

    Args: image, a picture file; question, as `RoboMamba.prompt` takes it (for an action: prompts.contact_question).
    Raises: ValueError for a picture that cannot be read, an empty question, a folder that cannot be written.
    """
    rgb = np.asarray(read_picture(image, model.config.vision.image_size))
    return save(Path(out), pictures_of(model, rgb, question))


# ---- an episode ------------------------------------------------------------------------------------------------------


class Frame(NamedTuple):
    """One moment of the pull, and what the model makes of the picture of this moment alone."""

    view: Image.Image  # with the gripper, which the model is not shown
    rgb: np.ndarray  # uint8 (S, S, 3)
    opening: float  # m
    dt: np.ndarray  # (P,) of the last layer, mean over the channels
    states: dict[int, Tensor]  # layer, counted from 1: (E, N), after the picture


def film(model, scene, action, instruction: str) -> list[Frame]:
    """Carries out `action` in the scene, whose target slides; a frame every EVERY steps."""
    from sim.pictures import draw_gripper  # here: pictures of a prompt need no simulator

    ids, frames = model.prompt(contact_question(instruction)), []
    approach, start = scene.camera_rotation.T @ action.approach, scene.backproject(action.u, action.v)

    def on_frame(step, contact):
        if step % EVERY:
            return
        rgb = scene.picture()[0]
        layers = read(model, rgb, ids)
        P = len(layers[0].dt) - len(ids)
        after = {i + 1: states(layers[i])[P - 1] for i in shown(layers)}
        view = draw_gripper(scene, rgb, contact, approach, GREEN)
        opening = float(np.linalg.norm(contact - start))  # of a slide: the contact goes as far as the part
        frames.append(Frame(view, rgb, opening, layers[-1].dt[:P].mean(1).numpy(), after))

    scene.act(action.u, action.v, action.approach, on_frame=on_frame)
    return frames


def draw_film(frames: list[Frame]) -> list[Image.Image]:
    """Every frame: camera, dt over the patches, and the curves up to then."""
    first, size, (w, h) = frames[0], frames[0].view.width, CHART
    ratio = np.log2(np.stack([f.dt for f in frames]) / np.median(first.dt))  # (frames, P)
    ratio /= max(np.abs(ratio).max(), SPAN)
    norm = np.array([[h.norm() for h in f.states.values()] for f in frames])  # (frames, layers)
    change = np.array([[(f.states[i] - h).norm() for i, h in first.states.items()] for f in frames]) / norm[0]
    opening, sheets = np.array([f.opening for f in frames]), []
    most, far = max(change.max(), 0.001), max(opening.max(), 0.001)
    left, base = 2 * size + 3 * PAD + 30, LINE + 8 + h
    right = 2 * size + 3 * PAD + w - 100
    x = np.linspace(left, right, len(frames))
    for k, frame in enumerate(frames):
        sheet = Image.new("RGB", (2 * size + w + 4 * PAD, base + LINE + PAD), "white")
        pen = ImageDraw.Draw(sheet)
        for column, picture in enumerate((frame.view, over_picture(frame.rgb, ratio[k], size))):
            sheet.paste(picture, (PAD + column * (size + PAD), LINE + 8))
        write(pen, PAD, 4, "the robot pulls", 13)
        write(pen, size + 2 * PAD, 4, "step size dt, last layer", 13)
        write(pen, left - 30, 4, "the state after the picture: change in percent", 13)
        pen.line((left, base - h, left, base, right, base), fill=INK)
        for value in (0, most):
            write(pen, left - 4, base - 0.95 * h * value / most, f"{100 * value:.0f}", 11, anchor="rm")
        curves = [(change[:, j] / most, LINES[j]) for j in range(change.shape[1])]
        for curve, fill in [*curves, (opening / far, INK)]:
            points = list(zip(x, base - 0.95 * h * curve, strict=True))[: k + 1]
            pen.line(points, fill=fill, width=2)
            pen.ellipse((points[-1][0] - 3, points[-1][1] - 3, points[-1][0] + 3, points[-1][1] + 3), fill=fill)
        for j, (i, fill) in enumerate(zip(first.states, LINES, strict=False)):
            write(pen, right + 12, LINE + 12 + 44 * j, f"layer {i}", 13, fill)
            write(pen, right + 12, LINE + 28 + 44 * j, f"|h| {norm[k, j]:.1f}", 13, fill)
        write(pen, right + 12, base - 28, f"open {100 * opening[k]:.1f} cm", 13)
        write(pen, left, base + 4, "time", 11)
        sheets.append(sheet)
    return sheets


def episode(model, out, category: str, seed: int) -> list[Path]:
    """OUT/opening.gif: the model's own action on the first scene from `seed` on where it opens a drawer ("long" success
    of sim/scene.py); and the pictures of `draw` for the start of this scene.

    Raises: ValueError for an unknown category, or when no such scene is found among EPISODE_TRIES.
    """
    from sim.scene import Scene

    scene = Scene(model.config.vision.image_size)
    try:
        for k in range(seed, seed + EPISODE_TRIES):
            part = scene.spawn(category, k).spec.parts[scene.target]
            instruction = f"open the {part.label}"
            if part.joint != "prismatic" or part.primitive == "push":
                continue
            action = model.predict_action(scene.render(), instruction)
            if scene.act(action.u, action.v, action.approach).long:
                print(f'{category} {k}, "{instruction}"', flush=True)
                pictures = pictures_of(model, scene.rgb, contact_question(instruction))
                frames = draw_film(film(model, scene, action, instruction))
                break
        else:
            raise ValueError(f"no drawer that the model opens among {category} {seed} to {k}; try another --seed")
    finally:
        scene.close()
    pictures |= {"opening.gif": [captioned(frame, "opening.gif") for frame in frames]}
    return save(Path(out), pictures)


# ---- main ------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Pictures of the recurrent state, and a GIF of it while the robot opens a drawer."
    )
    parser.add_argument("--out", required=True, help="folder for the pictures and README.md")
    shipped = Path(__file__).parent.parent / "data/pretrained/robomamba-tiny"
    parser.add_argument("--checkpoint", default=shipped, help="folder written by save_pretrained")
    parser.add_argument("--category", default="StorageFurniture", help="a category with drawers (sim/objects.py)")
    parser.add_argument(
        "--seed", type=int, default=EPISODE_SEED, help="first scene tried; the default is a validation one"
    )
    args = parser.parse_args()
    try:
        from robomamba import RoboMamba  # here, as robomamba.py imports this file

        print("Written:", *episode(RoboMamba.from_pretrained(args.checkpoint), args.out, args.category, args.seed))
    except ValueError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
