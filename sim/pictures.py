"""Pictures of the world and of what policies do in it.

    python -m sim.pictures --sheet categories.png                      # one scene of every category
    python -m sim.pictures --affordance Door,Microwave --out runs/maps # where on a part does a pull work?

draw_strips writes the pictures of `sim_eval.py --strips N`: the prediction, then what happened; plus one GIF.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from common.files import write_atomically
from common.scripts import cli, flag, listed, run_main
from sim.catalogue import NOUNS, SEEDS, SEEN, UNSEEN
from sim.expert import true_approach
from sim.grammar import ARCHETYPES, PREFIX
from sim.scene import BACKGROUND, Scene, View

ZOOM = 2  # enlargement
FRAMES = 5  # pictures in a strip after the first
CAPTION_PX = 16
EVERY = 4  # steps between two frames
NOTHING_MOVES = ("off object", "not a number", "unreachable", "on body", "no seal")  # failures without frames to show
ARROW_M = 0.18
NEEDLE = 0.24  # length as a share of the side, for an approach in the image plane
GIF_COLOURS, SHEET_COLOURS = 64, 128  # of episode.gif and strips.png
GIF_MS, GIF_HOLD = 60, 8  # per frame; number of frames for which the first and last picture are held
RED, GREEN, BLUE = (220, 30, 30), (20, 160, 60), (30, 90, 220)


def draw_gripper(scene: Scene, rgb: np.ndarray, contact, approach, colour) -> Image.Image:
    """The picture, enlarged, with an arrow of ARROW_M metres along `approach` that ends at `contact` (3,), world."""
    picture = Image.fromarray(rgb).resize((ZOOM * scene.image_size,) * 2)
    tail, head = ZOOM * (scene.project(np.array([contact - ARROW_M * approach, contact])) + 0.5)
    pen = ImageDraw.Draw(picture)
    pen.line([*tail, *head], fill=colour, width=3)
    pen.ellipse([*(head - 4), *(head + 4)], outline=colour, width=3)
    return picture


def draw_contacts(rgb: np.ndarray, grips: list[tuple], side: int = 384) -> Image.Image:
    """The picture at `side` pixels; for each (colour, (u, v, x, y, z)) a dot at the contact and a needle along the
    approach, drawn as if seen from far away, which needs no depth. The first is on top."""
    picture = Image.fromarray(rgb).resize((side, side), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(picture)
    for colour, (u, v, x, y, _) in reversed(grips):
        head = (np.array([u, v]) + 0.5) * side / len(rgb)
        tail = head - NEEDLE * side * np.array([x, y])
        wide = NEEDLE / 12 * side * np.array([-y, x])
        pen.polygon([*head, *(tail + wide), *(tail - wide)], fill=colour, outline="white")
        pen.ellipse([*(head - 6), *(head + 6)], fill=colour, outline="white", width=2)
    return picture


def grid(items: list[tuple[Image.Image, str]], columns: int = 1, width: int = 0) -> Image.Image:
    """(picture, caption) pairs, captions below, in rows of `columns`. width: minimum width of a column."""
    width = max(width, *(picture.width for picture, _ in items))
    height = max(picture.height for picture, _ in items) + CAPTION_PX
    sheet = Image.new("RGB", (min(columns, len(items)) * width, -(-len(items) // columns) * height), "white")
    for i, (picture, caption) in enumerate(items):
        x, y = i % columns * width, i // columns * height
        sheet.paste(picture, (x, y))
        ImageDraw.Draw(sheet).text((x + 4, y + height - CAPTION_PX + 2), caption, fill="black")
    return sheet


def play(scene: Scene, record: dict, part: int | None = None) -> tuple[list[Image.Image], str]:
    """Replays an episode: [the picture with the prediction, then frames of what happened], and the caption. part: the
    part whose joint counts; None: the scene's target."""
    scene.spawn(record.get("object", record["category"]), record["seed"]).render()
    scene.target = scene.target if part is None else part
    u, v, approach = record["u"], record["v"], record["approach"]
    if None in (u, v, *approach):
        return [Image.fromarray(scene.rgb).resize((ZOOM * scene.image_size,) * 2)], f"failed: {record['reason']}"
    point = scene.backproject(u, v)
    if point is None:  # beside the object: drawn at the object's distance
        f, cx, cy = scene.intrinsics
        ray = np.array([(u - cx) / f, (v - cy) / f, 1.0])
        point = scene.eye + float(np.median(scene.depth[scene.links != BACKGROUND])) * ray @ scene.camera_rotation
    arrow = scene.camera_rotation.T @ np.array(approach)
    frames = [draw_gripper(scene, scene.rgb, point, arrow, BLUE)]

    def on_frame(step, contact):
        if step % EVERY == 0:
            colour = GREEN if record["initial"] else RED
            frames.append(draw_gripper(scene, scene.picture()[0], contact, arrow, colour))

    outcome = scene.act(u, v, approach, on_frame=on_frame)
    unit_of = "rad" if scene.spec.parts[scene.target].joint == "revolute" else "m"
    done = f"moved {outcome.moved:.2f} {unit_of}" if outcome.initial else f"failed: {outcome.reason}"
    return frames, f'{record["category"]}: "{record["instruction"]}"  {done}'


def choose(records: list[dict], count: int) -> list[dict]:
    """`count` episodes: two thirds successes, the rest failures (at least one, if there is one)."""
    good = sorted((r for r in records if r["initial"]), key=lambda record: not record["long"])
    bad = sorted((r for r in records if not r["initial"]), key=lambda record: record["reason"] in NOTHING_MOVES)
    n_bad = min(len(bad), max(1, count // 3, count - len(good)))
    return [*good[: count - n_bad], *bad[:n_bad]]


def save_gif(path, frames: list[Image.Image], colours: int = GIF_COLOURS) -> None:
    """Saves a looping GIF with few colours to a path or an open file; the first and last frame are held for a while."""
    few = [frame.quantize(colours) for frame in [*frames[:1] * GIF_HOLD, *frames[1:], *frames[-1:] * GIF_HOLD]]
    few[0].save(path, "GIF", save_all=True, append_images=few[1:], duration=GIF_MS, loop=0, optimize=True)


def draw_strips(out: Path, records: list[dict], count: int, scene: Scene) -> list[Path]:
    """Writes OUT/strip_*.png for `count` of the episodes, all of them in OUT/strips.png at half size, and
    OUT/episode.gif of the first one."""
    paths, strips = [out / "episode.gif"], []
    for i, record in enumerate(choose(records, count)):
        frames, caption = play(scene, record)
        if i == 0:
            save_gif(paths[0], [frames[0], *frames[1::2]])
        moving = np.unique(np.linspace(1, len(frames) - 1, FRAMES).astype(int)) if len(frames) > 1 else ()
        strip = Image.fromarray(np.hstack([np.asarray(frames[j]) for j in (0, *moving)]))
        strips.append((strip.reduce(2), caption))
        paths.append(out / f"strip_{i}_{record['split']}_{'success' if record['initial'] else 'failure'}.png")
        grid([(strip, caption)], width=2 * strip.height).save(paths[-1], optimize=True)
    grid(strips).quantize(SHEET_COLOURS).save(out / "strips.png", optimize=True)
    return paths


def save(path: str, sheet: Image.Image) -> None:
    """Saves a picture in the format given by the file extension. Raises: ValueError naming the file."""
    kind = Image.registered_extensions().get(Path(path).suffix.lower())
    if kind is None:
        raise ValueError(f"{path}: not the name of a picture, such as sheet.png")
    write_atomically(path, lambda temporary: sheet.save(temporary, kind))


def contact_sheet(path: str, names: list[str], seed: int = 0) -> None:
    """Draw one scene for each of `names` (a repeated name gets the next seed), from a friendlier camera."""
    view = View(azimuth_deg=(15, 50), elevation_deg=(18, 35), distance=(1.5, 1.6), shift=(0, 0), roll_deg=(0, 0))
    items = []
    with Scene(image_size=192, view=view) as scene:
        for i, name in enumerate(names):
            rgb = scene.spawn(name, seed + names[:i].count(name)).render()
            items.append((Image.fromarray(rgb), f"{name} (unseen)" if name in UNSEEN else name))
    save(path, grid(items, 7))


def affordance_sheet(path: str, names: list[str], seed: int) -> None:
    """Where on a part does a pull work? Below the pictures of `names`: how far the target moves if pulled at every 4th
    pixel, in the TRUE direction of motion. Red: not at all (friction wins near a hinge); green: the long threshold."""
    items = []
    with Scene(image_size=256) as scene:
        for name in names:
            rgb = scene.spawn(name, seed).render()
            part = scene.links == scene.target
            faded = rgb // 2 + 96
            heat = faded.copy()
            for row, column in np.argwhere(part[::4, ::4]) * 4:
                approach = true_approach(scene, scene.backproject(column, row), scene.target)
                moved = 0.0 if approach is None else scene.act(column, row, approach).moved
                share = np.clip(moved / scene.long_threshold(scene.target), 0, 1)
                heat[row : row + 4, column : column + 4] = 255 * min(1, 2 - 2 * share), 255 * min(1, 2 * share), 0
            both = np.vstack([rgb, np.where(part[..., None], heat, faded)])
            items.append((Image.fromarray(both), f"{name}: {scene.spec.parts[scene.target].label}"))
    save(path, grid(items, len(items)))


@dataclass
class PicturesConfig:
    sheet: str = flag("", "draw one scene of every category to this FILE")
    grammar: bool = flag(False, "draw every archetype of the grammar instead")
    affordance: str = flag("", "comma-separated categories: draw OUT/affordance.png")
    out: str = flag("runs/maps", "folder for affordance.png")
    seed: int = flag(0, "seed of the scenes", low=0, high=2**31)


def main(argv: list[str] | None = None) -> None:
    cfg = cli(PicturesConfig, __doc__, argv)
    names = listed("--affordance", cfg.affordance, tuple(NOUNS))
    if not cfg.sheet and not names:
        raise ValueError("nothing to draw: --sheet FILE or --affordance CATEGORIES")
    if cfg.sheet:
        archetypes = [PREFIX + name for name in ARCHETYPES]
        contact_sheet(cfg.sheet, archetypes if cfg.grammar else [*SEEN, *UNSEEN], cfg.seed)
        print(cfg.sheet)
    if names:
        path = f"{cfg.out}/affordance.png"
        affordance_sheet(path, names, SEEDS["seen"] + cfg.seed)  # the test scenes of seen categories
        print(path)


if __name__ == "__main__":
    run_main(main)
