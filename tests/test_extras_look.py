"""Looking inside: the scan as a matrix, hooks that leave no trace, pictures; and the planted mistakes.

pytest tests/test_extras_look.py
"""

import ast
import contextlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import robomamba
from extras import look, mistakes
from selective_scan import example_inputs, scan_chunked, scan_reference

ROOT = Path(__file__).parent.parent


def apply(M, R, u, state):
    return torch.einsum("ets,se->te", M, u) + torch.einsum("etn,en->te", R, state)


def rgb_of(size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("L, dt_range", [(1, (1e-3, 1.0)), (37, (1e-3, 1.0)), (130, (0.1, 2.0))])
def test_the_matrix_is_the_scan(L, dt_range, start, skip):
    """float64; with strong decay too, where exp(sum of dt A) of the whole sequence is 0."""
    u, dt, A, B, C, D, state = (x.detach() for x in example_inputs(1, L, 5, 3, dt_range, torch.float64))
    D, state = D if skip else None, state if start else torch.zeros_like(state)
    M, R = look.scan_matrix(dt[0], A, B[0], C[0], D)
    assert M.triu(1).abs().max() == 0
    got = apply(M, R, u[0], state[0])
    for scan in (scan_reference, scan_chunked):
        wanted = scan(u, dt, A, B, C, D, state)[0][0]
        assert (got - wanted).abs().max() <= 1e-12 * wanted.abs().max()  # sums of some hundred terms in float64


def test_the_mean_over_channels_does_not_depend_on_the_blocks():
    u, dt, A, B, C, D, _ = (x.detach() for x in example_inputs(1, 9, 7, 3, dtype=torch.float64))
    layer = look.Layer(u[0], dt[0], A, B[0], C[0], D)
    wanted = look.scan_matrix(dt[0], A, B[0], C[0])[0].abs().mean(0).numpy()
    assert all(np.allclose(look.mean_matrix(layer, channels), wanted, rtol=1e-12) for channels in (1, 3, 64))


@torch.no_grad()
def test_what_is_read_is_what_the_model_scanned(mini, picture, monkeypatch):
    """Picture and words in one sequence: the model's own outputs and states; words alone: from the picture's state."""
    ids, seen = mini.prompt("open the top drawer"), []
    right = robomamba.selective_scan

    def listening(*args):
        seen.append((args[-1], *right(*args)))
        return seen[-1][1:]

    monkeypatch.setattr(robomamba, "selective_scan", listening)
    layers = look.read(mini, picture, ids)
    n, P = len(layers), 16
    assert n == 2 and seen and len(seen) % n == 0 and len(layers[0].dt) == P + len(ids)
    for k, layer in enumerate(layers):
        passes = seen[k::n]  # the picture and then the words, or both in one pass
        y = torch.cat([y for _, y, _ in passes], 1)[0].double()
        h = look.states(layer)
        whole = apply(*look.scan_matrix(*layer[1:]), layer.u, torch.zeros_like(layer.A))
        words = layer._replace(u=layer.u[P:], dt=layer.dt[P:], B=layer.B[P:], C=layer.C[P:])
        alone = apply(*look.scan_matrix(*words[1:]), words.u, h[P - 1])
        pairs = [(h[-1], passes[-1][2][0]), (whole, y), (alone, y[P:])]
        for got, wanted in pairs:  # the model's scan is float32: sums of some ten terms
            assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@torch.no_grad()
def test_looking_changes_nothing(mini, picture):
    ids = mini.prompt("open the drawer")
    before = mini.predict_action(picture, "open the drawer")
    look.read(mini, picture, ids)
    with pytest.raises(IndexError):
        look.read(mini, picture, [10**6])  # fails inside the forward pass
    after = mini.predict_action(picture, "open the drawer")
    assert all(not block.mixer.x_proj._forward_pre_hooks for block in mini.lm.backbone.layers)
    assert (after.u, after.v) == (before.u, before.v) and np.array_equal(after.rotation, before.rotation)


def test_deep_models_are_drawn_by_some_of_their_layers():
    assert look.shown([0] * 2) == [0, 1] and look.shown([0] * 64) == [0, 21, 42, 63]


def test_a_large_step_is_red_and_a_small_one_blue():
    figure = look.new_figure(1, 1)
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1))
    look.over_picture(axes, np.full((8, 8, 3), 128, np.uint8), np.array([1.0, -1.0, 0.0, 0.5]))
    tint = np.asarray(look.as_image(figure), int)
    large, small, none, some = tint[20, 20], tint[20, 60], tint[60, 20], tint[60, 60]
    assert large[0] > large[2] + 100 and small[2] > small[0] + 100
    assert np.ptp(none) <= 2 and large[0] - large[2] > some[0] - some[2] > 20


@pytest.mark.parametrize(
    "asked", [["--ask", "What is this object, and which parts of it can move?" * 2], ["--act", "open"]]
)
def test_look_from_the_command_line(mini, picture, tmp_path, monkeypatch, shell, refused, asked):
    mini.save_pretrained(tmp_path / "m")
    Image.fromarray(picture).save(tmp_path / "p.png")

    base = ["--checkpoint", tmp_path / "m", "--image", tmp_path / "p.png", *asked]
    code, said = shell(look, *base, "--out", tmp_path / "out")
    assert not code and str(tmp_path / "out/steps.png") in said.out.splitlines()[-1]
    text = (tmp_path / "out/README.md").read_text()
    names = {"steps.png", "attention.png", "memory.png"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == names | {"README.md"} and "opening.gif" not in text
    for name in names:
        assert f"![{name}]({name})" in text and look.CAPTIONS[name] in text
        assert len(np.unique(np.asarray(Image.open(tmp_path / "out" / name)))) > 20
    (tmp_path / "file").write_text("")
    refused("README.md: cannot be written", look, *base, "--out", tmp_path / "file")
    refused("--image and one of --ask and --act go together\n", look, *asked, "--out", tmp_path / "out")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # not installed
    refused("pip install matplotlib", look, *base, "--out", tmp_path / "other")


def test_the_film_of_a_drawer(mini, tmp_path, monkeypatch):
    """Opening as the simulator counts it; colours and curves start at the first frame; the GIF holds every frame."""
    pytest.importorskip("pybullet")
    from sim.expert import expert
    from sim.scene import Scene

    monkeypatch.setattr(look, "EVERY", 40)
    monkeypatch.setattr(look, "EPISODE_TRIES", 2)
    with Scene(32) as scene:
        scene.spawn("StorageFurniture", 10_700_012).render()
        label = expert(scene, np.random.default_rng(0))
        assert scene.spec.parts[scene.target].joint == "prismatic"
        moved = scene.act(label.u, label.v, label.approach).moved
        frames = look.film(mini, scene, label, "open the drawer")
    assert frames[0].opening < 1e-6 and abs(frames[-1].opening - moved) < 5e-3 < moved  # the last frame is no last step
    assert len(frames[0].dt) == 16 and set(frames[0].states) == {1, 2}
    sheets = look.draw_film(frames)
    assert len({sheet.tobytes() for sheet in sheets}) == len(sheets) == 7
    look.save(tmp_path, {"opening.gif": sheets})
    with Image.open(tmp_path / "opening.gif") as film:
        assert film.n_frames >= len(sheets) - 1  # equal neighbours are stored as one
    with pytest.raises(ValueError, match="no drawer that the model opens among Door 5 to 6; try another --seed"):
        look.episode(mini, "Door", 5)


def test_every_test_that_is_named_exists():
    for *_, test in mistakes.MISTAKES:
        file, name = test.split("::")
        tree = ast.parse((ROOT / f"tests/test_{file}").read_text())
        assert name in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)], test


def test_a_planted_mistake_is_taken_out_again(mini, picture):
    before = mini.predict_action(picture, "open the drawer")
    for plant, *_ in mistakes.MISTAKES:
        with plant(), contextlib.suppress(ValueError):  # an action that is not finite may be refused
            mini.predict_action(picture, "open the drawer")
    after = mini.predict_action(picture, "open the drawer")
    assert np.array_equal(after.rotation, before.rotation) and np.array_equal(after.approach, before.approach)


def test_every_mistake_is_seen_and_is_caught_by_the_test_it_names(tmp_path):
    """The one slow test here, about ten seconds: the whole command in a process of its own."""
    pytest.importorskip("pybullet")
    command = [sys.executable, "-m", "extras.mistakes", "--prove", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = {row["mistake"]: row for row in json.loads((tmp_path / "mistakes.json").read_text())["rows"]}
    assert len(rows) == len(mistakes.MISTAKES) >= 6 and all(row["caught"] for row in rows.values())
    assert all(name in (tmp_path / "mistakes.md").read_text() for name in rows)
    for row in rows.values():  # None is not finite
        assert row["wrong"] is None or row["wrong"] > 1.3 * row["right"], row
    exact = rows["scan in bfloat16"], rows["conv1d centred instead of causal"]
    assert abs(exact[0]["right"] - np.exp(-1)) < 1e-3 and exact[0]["wrong"] == 1 and exact[1]["right"] == 0
