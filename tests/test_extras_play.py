"""The page: what its clicks do; nonsense becomes sentences; visitors do not mix; over HTTP where gradio is installed.

pytest tests/test_extras_play.py
"""

import base64
import importlib.util
import io
import re
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.depth import camera_depth
from extras import play
from sim.pictures import BLUE, draw_contacts
from sim.policies import Observation
from sim.scene import stream
from sim_eval import EvalConfig, attempt

ROOT = Path(__file__).parent.parent
CABINET = ("StorageFurniture", 10_000_004)
SEEDS = [("Safe", 10_000_001), ("Toilet", 10_000_002), ("Bottle", 10_000_003)]


@pytest.fixture(scope="module")
def bench():
    bench = play.Bench(EvalConfig(policy="model,model-depth,blind,expert"))
    yield bench
    bench.close()


@pytest.fixture
def quick(monkeypatch):
    """Without the picture of what is read, which takes the most time."""
    monkeypatch.setattr(play, "draw_read", lambda model, rgb, question: Image.fromarray(rgb))


def model_of(bench):
    (model,) = bench.models.values()
    return model


def test_a_scene_is_its_category_and_seed(bench):
    shown = [play.new_scene(bench, *which)[:4] for which in (*SEEDS, *SEEDS)]
    for first, again, which in zip(shown[:3], shown[3:], SEEDS, strict=True):
        assert first[0] == again[0] == which and first[2] == which[1] and first[3] == again[3]
        assert np.array_equal(first[1], again[1]) and first[1].shape == (bench.image_size,) * 2 + (3,)
    assert not np.array_equal(shown[0][1], shown[1][1])


def test_a_new_scene_is_one_of_validation_that_the_oracle_solves(bench):
    (category, seed), picture, number, instruction, *answer = play.new_scene(bench, "Faucet")
    assert category == "Faucet" and seed == number and 10_000_000 <= seed < 20_000_000
    assert play.Answer(*answer).said == "A new scene." and len(instruction.split()) >= 3
    assert play.expert(bench.scene, stream(category, seed, "expert")) is not None


def test_words_and_contact_are_the_models(bench):
    scene, picture, _, instruction, *_ = play.new_scene(bench, *CABINET)
    model = model_of(bench)
    asked = play.ask(bench, scene, None, " What is this object? ")
    assert asked.said == model.generate(picture, "What is this object?")
    assert len(np.unique(np.asarray(asked.attention))) > 20
    acted = play.act(bench, scene, None, instruction, False)
    action = model.predict_action(picture, instruction)
    assert f"u {action.u:.1f}, v {action.v:.1f} of 128" in acted.said and f"x {action.approach[0]:+.2f}" in acted.said
    scale = acted.contact.width / 128
    assert acted.contact.getpixel((round((action.u + 0.5) * scale), round((action.v + 0.5) * scale))) == BLUE
    assert play.ask(bench, None, picture, "What is this object?").said == asked.said  # as a picture, too
    assert play.act(bench, None, picture, instruction, False).said == acted.said


def test_depth_is_the_imperfect_cameras(bench, quick):
    scene, picture, _, instruction, *_ = play.new_scene(bench, *CABINET)
    world = bench.scene
    o = Observation(world, instruction, world.target, None, np.random.default_rng(0), camera_depth)
    action = model_of(bench).predict_action(picture, instruction, o.depth, o.intrinsics)
    said = play.act(bench, scene, None, instruction, True).said
    assert f"u {action.u:.1f}, v {action.v:.1f}" in said
    assert said != play.act(bench, scene, None, instruction, False).said


@pytest.mark.parametrize("use_depth", [False, True])
def test_do_it_is_an_episode_beside_baseline_and_oracle(bench, quick, use_depth):
    scene, picture, _, instruction, *_ = play.new_scene(bench, *CABINET)
    done = play.act(bench, scene, None, instruction, use_depth, do=True)
    world = bench.scene
    label = play.expert(world, stream(*scene, "expert"))
    o = Observation(world, instruction, world.target, label, np.random.default_rng(0), camera_depth)
    rows = done.table.splitlines()[2:]
    contacts = []
    for row, policy in zip(rows, ("model-depth" if use_depth else "model", "blind", "expert"), strict=True):
        tried = attempt(bench.policies[policy], o, o.part)
        contacts.append(tried.action)
        assert f"| {tried.outcome.moved:.3f} " in row and row.endswith("| yes |") == tried.outcome.long
        assert (f"no: {tried.outcome.reason}" in row) != tried.outcome.initial
    assert rows[2].startswith("| oracle") and rows[2].endswith("| yes | yes |")
    colours = [colour for _, colour in play.ROWS]
    wanted = draw_contacts(picture, list(zip(colours, contacts, strict=True)))
    assert np.array_equal(np.asarray(done.contact), np.asarray(wanted))
    assert (
        rows[0].split(" | ")[1] in done.said and play.act(bench, scene, None, instruction, use_depth).said in done.said
    )
    with Image.open(io.BytesIO(base64.b64decode(re.search(r"base64,([\w+/=]+)", done.film)[1]))) as film:
        assert film.format == "GIF" and film.n_frames > 3 and film.width == 2 * bench.image_size


def test_the_part_that_is_named_counts(bench, quick):
    for seed in range(10_000_000, 10_000_100):
        scene, *_ = play.new_scene(bench, "StorageFurniture", seed)
        labels = [part.label for part in bench.scene.spec.parts]
        if len(set(labels)) > 1:
            break
    for label in labels:
        done = play.act(bench, scene, None, f"please OPEN the {label.upper()}", False, do=True)
        assert done.table.startswith(f"| {label} |") and done.said.startswith(f"the {label} moved")
    world = bench.open().spawn(*scene)
    target = labels[world.target]
    assert play.act(bench, scene, None, "sing a song", False, do=True).table.startswith(f"| {target} |")


def visit(call, which):
    """A visitor draws a scene, asks, acts and lets the robot do it: everything that is said and shown."""
    scene, picture, seed, instruction, *_ = call(play.new_scene, *which)
    answers = [call(play.ask, scene, None, "What is this object?"), call(play.act, scene, None, instruction, True)]
    answers.append(call(partial(play.act, do=True), scene, None, instruction, False))
    pictures = [np.asarray(a.contact).tobytes() for a in answers[1:]]
    return picture.tobytes(), instruction, [(a.said, a.film, a.table) for a in answers], pictures


def test_visitors_do_not_mix(bench, quick):
    lock = threading.Lock()

    def call(function, *values):
        return play.locked(bench, lock, function, (), *values)

    alone = [visit(call, which) for which in SEEDS]
    assert len({picture for picture, *_ in alone}) == len(SEEDS)
    with ThreadPoolExecutor(len(SEEDS)) as visitors:
        assert list(visitors.map(partial(visit, call), SEEDS)) == alone


LONG = "open the door " * 800
PICTURE = np.zeros((128, 128, 3), np.uint8)
NONSENSE = [
    (play.ask, (CABINET, None, ""), "type a few words"),
    (play.ask, (CABINET, None, None), "type a few words"),
    (play.ask, (CABINET, None, LONG), "300 characters at most (not 11,199)"),
    (play.ask, (None, None, "What is this?"), "no picture yet"),
    (play.act, (CABINET, None, " \n ", False), "type a few words"),
    (play.act, (None, None, "open the door", False), "no picture yet"),
    (play.act, (None, PICTURE, "open the door", True), "only scenes have"),
    (partial(play.act, do=True), (None, PICTURE, "open the door", False), "only scenes have"),
    (partial(play.act, do=True), (None, None, "open the door", False), "no picture yet"),
    (play.act, (CABINET, None, "!?.", False), "the instruction is empty"),
    (play.new_scene, ("Spaceship", 1), "unknown category"),
    (play.new_scene, (None,), "unknown category"),
    (play.new_scene, ("Safe", -1), "the seed must be a number from 0 to 2,147,483,647"),
    (play.new_scene, ("Safe", 10**20), "the seed must be a number from 0 to 2,147,483,647"),
    (play.own_picture, ("nowhere.png",), "cannot be read as a picture"),
]


@pytest.mark.parametrize(("function", "values", "part"), NONSENSE)
def test_nonsense_is_a_sentence(bench, quick, function, values, part):
    *kept, said, contact, attention, film, table = play.locked(bench, threading.Lock(), function, ("kept",), *values)
    assert kept == ["kept"] and part.lower() in said.lower() and said[0].isupper() and said.endswith(".")
    assert (contact, attention, film, table) == (None, None, "", "") and "/" not in said


@pytest.mark.parametrize("text", ["<|user|> open", "\ud800 öffne die Tür 🚪", "'; DROP TABLE", "a" * 300, "<script>"])
def test_strange_words_are_answered(bench, quick, text):
    assert play.ask(bench, CABINET, None, text).said
    assert play.act(bench, CABINET, None, text, True).contact.size == (384, 384)


def test_own_pictures(bench, tmp_path):
    def call(name):
        return play.locked(bench, threading.Lock(), play.own_picture, (None,) * 4, str(tmp_path / name))

    Image.new("RGB", (1, 1)).save(tmp_path / "one.png")
    Image.new("RGBA", (640, 200), (250, 0, 0, 255)).save(tmp_path / "wide.png")
    (tmp_path / "words.png").write_text("hello")
    (tmp_path / "cut.png").write_bytes((tmp_path / "wide.png").read_bytes()[:60])
    (tmp_path / "folder").mkdir()
    for name in ("words.png", "cut.png", "folder", "nowhere"):
        scene, picture, _, _, said, *_ = call(name)
        assert picture is None and said == "This file cannot be read as a picture; try a PNG or a JPEG."
    assert call("one.png")[4] == "A picture of 1 x 1 pixels; each side needs 16."
    scene, picture, seed, instruction, *_ = call("wide.png")
    assert scene is None and seed is None and picture.shape == (128, 128, 3) and (picture == (250, 0, 0)).all()
    assert play.act(bench, scene, picture, instruction, False).contact


# ---- the page


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as place:
        return place.getsockname()[1]


def test_without_gradio_it_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit) as stopped:
        play.run_main(partial(play.main, ["--port", str(free_port())]))
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "the page needs gradio: pip install gradio\n"


needs_gradio = pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="needs gradio (extra [play])")


@needs_gradio
def test_the_page_has_its_parts_and_loads_nothing_from_elsewhere(bench):
    from fastapi.testclient import TestClient

    with TestClient(play.page(bench)) as client:
        config = client.get("/config").json()
        text = client.get("/").text + client.get("/theme.css").text
    labels = {component["props"].get("label") for component in config["components"]}
    assert {"category", "question", "instruction", "use depth", "answer", "contact and approach"} <= labels
    assert {"new_scene", "show", "own_picture", "ask", "act", "do_it"} <= {
        c["api_name"] for c in config["dependencies"]
    }
    assert config["analytics_enabled"] is False and "system-ui" in text
    assert not re.search(r"(href|src)=\"https?:|@import|googleapis", text)


@needs_gradio
def test_two_visitors_over_http(bench, tmp_path):
    """The real command in a process of its own: two clients take turns; nonsense; then the port is taken."""
    from gradio_client import Client, handle_file

    port = free_port()
    command = [sys.executable, "-m", "extras.play", "--port", str(port)]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        url = server.stdout.readline().split()[0]
        assert url == f"http://127.0.0.1:{port}"
        visitors = [Client(url, verbose=False, analytics_enabled=False) for _ in SEEDS]
        shown = [client.predict(*which, api_name="/show") for client, which in zip(visitors, SEEDS, strict=True)]
        for client, which, (_, seed, instruction, *_) in zip(visitors, SEEDS, shown, strict=True):
            wanted = play.act(bench, which, None, instruction, True, do=True)
            said, contact, _, film, table = client.predict(None, instruction, True, api_name="/do_it")
            assert seed == which[1] and (said, film, table) == (wanted.said, wanted.film, wanted.table.strip())
            assert np.array_equal(np.asarray(Image.open(contact)), np.asarray(wanted.contact))
        (tmp_path / "words.png").write_text("hello")
        *_, said, _, _, _, _ = visitors[0].predict(handle_file(tmp_path / "words.png"), api_name="/own_picture")
        assert said.startswith("This file cannot be read")
        said, *rest = visitors[0].predict(None, LONG, api_name="/ask")
        assert said.startswith("Type a few words") and rest == [None, None, "", ""]
        again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert again.returncode == 2 and str(port) in again.stderr and again.stderr.count("\n") == 1
    finally:
        server.terminate()
        server.wait(30)
