"""An interactive web page: scenes and pictures, questions and instructions, and a robot that does what the model says.

    pip install -c constraints.txt ".[sim,play]"
    python -m extras.play         # then open http://127.0.0.1:7860; also --checkpoint DIR, --port N

`page` builds the user interface; the functions before it need no gradio. Per visitor, the page stores (category, seed);
every click respawns that scene under a lock on the process's only Scene: visitors cannot interfere. It works offline.
"""

import base64
import io
import os
import secrets
import socket
import threading
from collections import namedtuple
from dataclasses import dataclass
from functools import partial

import numpy as np

from common.scripts import cli, flag, run_main
from data.dataset import open_picture, read_picture
from data.prompts import contact_question
from extras.look import draw_read
from sim.catalogue import SEEN, UNSEEN
from sim.expert import expert, why_unsolved
from sim.pictures import BLUE, GREEN, RED, draw_contacts, play, save_gif
from sim.scene import Outcome, stream
from sim_eval import Bench, EvalConfig, Job, attempt, observe, sentence

LEAST_SIDE, MOST_CHARACTERS, MOST_SEED = 16, 300, 2**31 - 1
ROWS = ("the model (blue)", BLUE), ("vision-free baseline (red)", RED), ("oracle (green)", GREEN)
CSS = """[data-testid=block-label] {position: static} #seen img {height: 340px; object-fit: contain}
.prose th, .prose td {padding: 4px 8px !important; overflow-wrap: normal; word-break: normal} #film img {width: 100%}"""

# The result of a click: text; two pictures; the stroke as HTML; a table in Markdown
Answer = namedtuple("Answer", "said contact attention film table", defaults=(None, None, "", ""))


def new_scene(bench: Bench, category: str, seed: int | None = None) -> tuple:
    """((category, seed), picture, seed, instruction, *Answer); seed None: a validation scene that the oracle solves."""
    if seed is None:
        bench.find(Job("val", category, secrets.randbelow(MOST_SEED), 0))
        seed = bench.scene.seed
    if not 0 <= seed <= MOST_SEED:
        raise ValueError(f"the seed must be a number from 0 to {MOST_SEED:,d}")
    scene = bench.open().spawn(category, seed)
    return (category, seed), scene.render(), seed, sentence(scene, scene.target), *Answer("A new scene.")


def own_picture(bench: Bench, path: str) -> tuple:
    """(None, picture, None, instruction, *Answer) for a picture file."""
    try:
        picture = read_picture(path, bench.image_size)
    except ValueError:
        raise ValueError("this file cannot be read as a picture; try a PNG or a JPEG") from None
    with open_picture(path) as file:
        if min(file.size) < LEAST_SIDE:
            raise ValueError(f"a picture of {file.width} x {file.height} pixels; each side needs {LEAST_SIDE}")
    return None, picture, None, "open the door", *Answer("Your picture, as the model sees it.")


def begin(bench: Bench, scene: tuple | None, picture: np.ndarray | None, text: str | None) -> tuple:
    """(model, Observation of the scene or None, picture, text); the target is the part that the text names, if any."""
    text = (text or "").strip()
    if not 0 < len(text) <= MOST_CHARACTERS:
        raise ValueError(f"type a few words, {MOST_CHARACTERS} characters at most (not {len(text):,d})")
    if scene is None and picture is None:
        raise ValueError("there is no picture yet: draw a scene or drop a picture")
    (model,) = bench.models.values()
    if scene is None:
        return model, None, picture, text
    world = bench.open().spawn(*scene)
    world.render()
    labels = [part.label for part in world.spec.parts]
    named = max((label for label in labels if label in text.lower()), key=len, default=labels[world.target])
    world.target = labels.index(named)
    return model, observe(world, None, "play")._replace(instruction=text), world.rgb, text


def ask(bench: Bench, scene: tuple | None, picture: np.ndarray | None, question: str) -> Answer:
    model, _, rgb, question = begin(bench, scene, picture, question)
    return Answer(model.generate(rgb, question) or "(no words)", attention=draw_read(model, rgb, question))


def act(bench: Bench, scene: tuple | None, picture, instruction: str, use_depth: bool, do: bool = False) -> Answer:
    """The contact and approach that the model predicts; do: also carry them out."""
    model, o, rgb, instruction = begin(bench, scene, picture, instruction)
    if o is None and (use_depth or do):
        raise ValueError("only scenes have a robot and a depth image: draw one, or untick 'use depth' and press Act")
    camera = {"depth": o.depth, "intrinsics": o.intrinsics} if use_depth else {}
    u, v, _ = action = model.predict_action(rgb, instruction, **camera)
    said = f"contact u {u:.1f}, v {v:.1f} of {len(rgb)} pixels\n"
    said += "approach x {:+.2f} right, y {:+.2f} down, z {:+.2f} away".format(*action.approach)
    contact = draw_contacts(rgb, [(BLUE, (u, v, *action.approach))])
    answer = Answer(said, contact, draw_read(model, rgb, contact_question(instruction)))
    return carry_out(bench, o, answer, "model-depth" if use_depth else "model") if do else answer


def carry_out(bench: Bench, o, answer: Answer, policy: str) -> Answer:
    """The answer with the stroke, next to what the vision-free baseline and the oracle would have done."""
    scene = o.scene
    part = scene.spec.parts[o.part]
    unit = "rad" if part.joint == "revolute" else "m"
    o = o._replace(label=expert(scene, stream(scene.category, scene.seed, "expert")))
    table = f"| {part.label} | moved | at 0.01 | at {scene.long_threshold(o.part):.2g} |\n|---|---|---|---|\n"
    tried = [attempt(bench.policies[name], o, o.part) for name in (policy, "blind", "expert")]
    for (name, _), done in zip(ROWS, tried, strict=True):
        outcome = done.outcome if done else Outcome(0.0, False, False, why_unsolved(scene))
        initial = "yes" if outcome.initial else f"no: {outcome.reason}"
        table += f"| {name} | {outcome.moved:.3f} {unit} | {initial} | {'yes' if outcome.long else 'no'} |\n"
    contact = draw_contacts(scene.rgb, [(row[1], t.action) for row, t in zip(ROWS, tried, strict=True) if t])
    (u, v, *approach), outcome, *_ = tried[0]
    record = {"category": scene.category, "seed": scene.seed, "u": u, "v": v, "approach": approach}
    frames, _ = play(scene, record | vars(outcome) | {"instruction": o.instruction}, o.part)
    file = io.BytesIO()
    save_gif(file, [frames[0], *frames[1::2]], colours=256)  # with fewer the thin arrows turn grey
    film = f'<img alt="the stroke" src="data:image/gif;base64,{base64.b64encode(file.getvalue()).decode()}">'
    said = f"the {part.label} moved {outcome.moved:.3f} {unit}: {outcome.reason}\n{answer.said}"
    return answer._replace(said=said, contact=contact, film=film, table=table)


def locked(bench: Bench, lock: threading.Lock, function, kept: tuple, *values) -> tuple:
    """Runs one call of `function` at a time; for bad input, returns `kept` and an Answer that says what is wrong."""
    with lock:
        try:
            return function(bench, *values)
        except ValueError as error:
            return *kept, *Answer(f"{str(error)[:1].upper()}{str(error)[1:]}.")


def page(bench: Bench):
    """The page as a web application. Raises: ValueError if gradio is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read on import
    try:
        import gradio as gr
        from fastapi import FastAPI
    except ImportError:
        raise ValueError("the page needs gradio: pip install gradio") from None
    run, kept = partial(partial, locked, bench, threading.Lock()), (gr.skip(),) * 4
    names = [(f"{name}, {'seen' if name in SEEN else 'unseen'}", name) for name in (*SEEN, *UNSEEN)]
    fixed = {"interactive": False, "format": "png", "buttons": []}
    with gr.Blocks(title="RoboMamba", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        scene = gr.State()
        gr.Markdown("# RoboMamba\nAsk about the picture, or tell the robot what to do.")
        with gr.Row():
            with gr.Column(min_width=320):
                with gr.Row():
                    category = gr.Dropdown(names, value=SEEN[0], label="category", min_width=150)
                    seed = gr.Number(label="seed (Enter draws it)", precision=0, min_width=150)
                draw = gr.Button("New scene")
                picture = gr.Image(label="what the model sees", elem_id="seen", **fixed)
                file = gr.File(label="or drop a picture of yours", height=120)
            with gr.Column(min_width=320):
                question = gr.Textbox("What is this object?", label="question")
                instruction = gr.Textbox(label="instruction")
                use_depth = gr.Checkbox(label="use depth")
                with gr.Row():
                    look = {"variant": "primary", "min_width": 90}
                    asking, acting, doing = (gr.Button(word, **look) for word in ("Ask", "Act", "Do it"))
                said = gr.Textbox(label="answer", lines=3, interactive=False)
                table = gr.Markdown()
        with gr.Row():
            contact = gr.Image(label="contact and approach", min_width=300, **fixed)
            attention = gr.Image(label="what the last state reads, more (red) or less", min_width=300, **fixed)
            with gr.Column(min_width=300):
                film = gr.HTML(label="the stroke", show_label=True, container=True, elem_id="film")
        answer = [said, contact, attention, film, table]
        shown = [scene, picture, seed, instruction, *answer]
        inputs = [scene, picture, instruction, use_depth]
        gr.on([draw.click, category.select, blocks.load], run(new_scene, kept), category, shown, api_name="new_scene")
        seed.submit(run(new_scene, kept), [category, seed], shown, api_name="show")
        file.upload(run(own_picture, kept), file, shown, api_name="own_picture").then(lambda: None, None, file)
        gr.on([asking.click, question.submit], run(ask, ()), [scene, picture, question], answer, api_name="ask")
        gr.on([acting.click, instruction.submit], run(act, ()), inputs, answer, api_name="act")
        doing.click(run(partial(act, do=True), ()), inputs, answer, api_name="do_it")
    theme = gr.themes.Default(font=("system-ui", "sans-serif"), font_mono=("monospace",))
    options = {"show_error": False, "ssr_mode": False, "footer_links": [], "max_file_size": "20mb", "css": CSS}
    return gr.mount_gradio_app(FastAPI(), blocks, "/", theme=theme, **options)


@dataclass
class PlayConfig:
    checkpoint: str = flag("data/pretrained/robomamba-tiny-rgbd", "folder written by save_pretrained")
    port: int = flag(7860, "port on http://127.0.0.1", low=1, high=65535)


def main(argv: list[str] | None = None) -> None:
    cfg = cli(PlayConfig, __doc__, argv)
    place = socket.create_server(("127.0.0.1", cfg.port))  # fails here if the port is taken
    app = page(Bench(EvalConfig(policy="model,model-depth,blind,expert", checkpoint=cfg.checkpoint)))
    import uvicorn  # comes with gradio

    print(f"http://127.0.0.1:{cfg.port}   Ctrl-C ends it", flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1)).run(sockets=[place])


if __name__ == "__main__":
    run_main(main)
