"""pytest tests/test_extras_partnet.py -q

Objects of the user in PartNet-Mobility's layout: a hand-made cabinet with that layout's pitfalls, and every broken one.
"""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from extras.partnet import ObjectScene, find_objects, labels, read_obj, read_object
from sim import scene as world
from sim.catalogue import SEEDS, make_object
from sim.expert import expert, why_unsolved
from sim_eval import main

# The meshes: y up, front at +z, in units of a sphere, as PartNet-Mobility has them. Boxes: (centre, full extents).
W, H, D, T = 1.2, 1.0, 0.8, 0.04  # width, height, depth, wall
SHELL = [
    ((0, 0, -D / 2 + T / 2), (W, H, T)),
    *[((s * (W - T) / 2, 0, 0), (T, H, D)) for s in (-1, 1)],
    *[((0, s * (H - T) / 2, 0), (W, T, D)) for s in (-1, 1)],
]
BOXES = {
    "shell": SHELL,
    "drawer": [((0, 0.25, D / 2), (1.1, 0.42, T)), ((0, 0.25, D / 2 + 0.05), (0.5, 0.05, 0.06))],
    "door": [((0, -0.23, D / 2), (1.1, 0.46, T))],
    "grip": [((-0.45, -0.23, D / 2 + 0.05), (0.05, 0.3, 0.06))],
    "knob": [((-0.3, -0.23, D / 2 + 0.04), (0.08, 0.08, 0.05))],
}
COLOURS = {"shell": (0.1, 0.2, 0.8), "drawer": (0.9, 0.1, 0.1), "door": (0.1, 0.7, 0.2)}
HINGE = (0.55, -0.23, D / 2)  # of the door: on the right, seen from the front


def write_obj(path: Path, boxes, colour=(0.9, 0.8, 0.1)):
    """Boxes as one triangle mesh, with its material."""
    lines = [f"mtllib {path.stem}.mtl", "usemtl m"]
    for k, (centre, size) in enumerate(boxes):
        for corner in range(8):
            sign = [1 if corner >> axis & 1 else -1 for axis in range(3)]
            lines.append("v " + " ".join(f"{c + s * e / 2:.5f}" for c, s, e in zip(centre, sign, size, strict=True)))
        for a, b, c, d in ((0, 4, 6, 2), (1, 3, 7, 5), (0, 1, 5, 4), (2, 6, 7, 3), (0, 2, 3, 1), (4, 5, 7, 6)):
            lines += [f"f {8 * k + i + 1}// {8 * k + j + 1}// {8 * k + m + 1}//" for i, j, m in ((a, b, c), (a, c, d))]
    path.write_text("\n".join(lines).replace("//", "") + "\n")
    path.with_suffix(".mtl").write_text("newmtl m\nKd {} {} {}\n".format(*colour))


def link(name, *meshes, at=(0, 0, 0)):
    place = '<origin xyz="{} {} {}"/>'.format(*(-x for x in at))
    shapes = [f'{place}<geometry><mesh filename="textured_objs/{mesh}.obj"/></geometry>' for mesh in meshes]
    both = "".join(f"<visual>{shape}</visual><collision>{shape}</collision>" for shape in shapes)
    return f'<link name="{name}">{both}</link>'


def joint(name, kind, parent, child, at=(0, 0, 0), axis=None, limit=None, rpy="0 0 0"):
    place = '<origin xyz="{} {} {}" rpy="{}"/>'.format(*at, rpy)
    more = '<axis xyz="{} {} {}"/>'.format(*axis) if axis else ""
    more += '<limit lower="{}" upper="{}"/>'.format(*limit) if limit else ""
    ends = f'<parent link="{parent}"/><child link="{child}"/>'
    return f'<joint name="{name}" type="{kind}">{place}{more}{ends}</joint>'


def write_cabinet(folder: Path):
    """A drawer above a door. The body hangs on a fixed joint that turns it, the door's grip on another one (so links
    and parts are numbered differently), and a knob turns on the door."""
    (folder / "textured_objs").mkdir(parents=True)
    for name, boxes in BOXES.items():
        write_obj(folder / "textured_objs" / f"{name}.obj", boxes, COLOURS.get(name, (0.9, 0.8, 0.1)))
    knob_at = (-0.3, -0.23, D / 2)
    parts = [
        '<?xml version="1.0" ?><robot name="partnet_mobility"><link name="base"/>',
        link("link_2", "shell"),
        link("link_3", "grip", at=HINGE),
        link("link_1", "door", at=HINGE),
        link("link_0", "drawer"),
        link("link_4", "knob", at=knob_at),
        joint("joint_2", "fixed", "base", "link_2", rpy="1.570796326794897 0 -1.570796326794897"),
        joint("joint_3", "fixed", "link_1", "link_3"),
        joint("joint_1", "revolute", "link_2", "link_1", HINGE, (0, 1, 0), (0, 1.5)),
        joint("joint_0", "prismatic", "link_2", "link_0", axis=(0, 0, 1), limit=(0, 0.5)),
        joint("joint_4", "continuous", "link_1", "link_4", tuple(np.subtract(knob_at, HINGE)), (0, 0, 1)),
        "</robot>",
    ]
    (folder / "mobility.urdf").write_text("\n".join(parts))
    (folder / "semantics.txt").write_text("link_0 slider drawer\nlink_1 hinge rotation_door\nlink_4 hinge knob\n")
    (folder / "meta.json").write_text(json.dumps({"model_cat": "StorageFurniture", "anno_id": "1"}))


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """DIR with one whole object; the tests that break it make copies."""
    top = tmp_path_factory.mktemp("objects")
    write_cabinet(top / "45261")
    return top


@pytest.fixture
def scene(library):
    with ObjectScene(str(library)) as scene:
        yield scene


# ---- reading --------------------------------------------------------------------------------------------------------
def test_the_cabinet_is_read_in_the_worlds_terms(library):
    thing = read_object(library / "45261")
    door, drawer = thing.spec.parts
    assert thing.spec.category == "StorageFurniture"
    assert (door.label, door.joint, door.verb, door.primitive) == ("door", "revolute", "open", "pull")
    assert (drawer.label, drawer.joint) == ("drawer", "prismatic")
    points = np.concatenate([mesh.points for group in thing.meshes for mesh in group])
    low, high = points.min(0), points.max(0)
    assert np.linalg.norm(high - low) == pytest.approx(1.0) and np.abs(low + high).max() < 1e-9
    size = 1 / math.sqrt(W**2 + H**2 + (D + 0.08) ** 2)  # the grips stand out by 0.08
    assert (high - low).tolist() == pytest.approx([size * (D + 0.08), size * W, size * H])  # depth is x, height is z
    assert drawer.axis == pytest.approx((1, 0, 0)) and drawer.upper == pytest.approx(0.5 * size)
    assert door.axis == pytest.approx((0, 0, 1)) and door.upper == 1.5 and door.start == 0
    assert door.origin[1] == pytest.approx(0.55 * size)  # on the right, as +y is for somebody in front
    assert thing.held == 1  # the knob
    assert [len(group) for group in thing.meshes] == [1, 3, 1]  # body; door, its grip and its knob; drawer
    middle = np.mean([mesh.points.mean(0) for mesh in thing.meshes[2]], 0)
    assert middle[0] > 0.2 and middle[2] > 0.1  # the drawer is in front, above


def test_labels_say_where_a_part_is_when_its_name_is_not_enough():
    def at(*yz):
        return [np.array([0.3, y, z]) for y, z in yz]

    assert labels(["door", "drawer"], at((0, 0), (0, 0.3))) == ["door", "drawer"]
    assert labels(["door"] * 2, at((0.3, 0), (-0.3, 0.01))) == ["right door", "left door"]
    assert labels(["drawer"] * 3, at((0, -0.3), (0, 0.3), (0, 0))) == ["bottom drawer", "top drawer", "middle drawer"]
    grid = labels(["key"] * 4 + ["lid"], at((0.2, -0.2), (-0.2, 0.2), (0.2, 0.2), (-0.2, -0.2), (0, 0)))
    assert grid == ["fourth key", "first key", "second key", "third key", "lid"]
    assert len(set(labels(["key"] * 30, at(*[(0, 0)] * 30)))) == 30


def test_parts_without_names_get_what_their_joint_mostly_is(library, tmp_path):
    shutil.copytree(library / "45261", tmp_path / "a", ignore=shutil.ignore_patterns("semantics.txt", "meta.json"))
    spec = read_object(tmp_path / "a").spec
    assert [part.label for part in spec.parts] == ["door", "drawer"] and spec.category == "Object"


# ---- in the world ---------------------------------------------------------------------------------------------------
def test_pictures_rays_and_colours_agree(scene):
    shown = {-1: [], 0: [], 1: []}
    for seed in range(6):
        scene.spawn("objects/45261", seed).render()
        assert (scene.category, scene.object) == ("StorageFurniture", "objects/45261")
        for row, column in np.argwhere(scene.links != world.BACKGROUND)[::37]:
            point = scene.backproject(column, row)
            link, hit, normal = scene.rays(scene.eye, (scene.eye + 1.3 * (point - scene.eye))[None])
            shown[int(scene.links[row, column])].append((link[0] == scene.links[row, column], hit[0] - point))
            assert normal[0] @ (scene.eye - point) > -1e-6  # outwards
    for link, found in shown.items():
        assert len(found) > 20 and np.mean([same for same, _ in found]) > 0.97, link
        assert np.median([np.linalg.norm(gap) for _, gap in found]) < 1e-4, link  # the inside is not filled
    scene.spawn("objects/45261", 1, part=1).render()
    drawer = scene.rgb[scene.links == 1].astype(int)
    assert (drawer[:, 0] > 2 * drawer[:, 2]).mean() > 0.7  # red by its .mtl


def test_the_expert_opens_both_parts_and_the_knob_is_part_of_the_door(scene):
    opened = {0: [], 1: []}
    for part in opened:
        for seed in range(6):
            scene.spawn("objects/45261", seed, part=part).render()
            label = expert(scene, np.random.default_rng(seed))
            if label is not None:
                outcome = scene.act(label.u, label.v, label.approach)
                opened[part].append(outcome.long)
                # from in front: against the motion, which is +x where the part begins to open
                assert (scene.camera_rotation.T @ label.approach)[0] < -0.5
        assert len(opened[part]) >= 4 and all(opened[part])


def test_the_catalogue_looks_the_same_in_this_scene(scene):
    expected = make_object("Safe", world.stream("Safe", 5, "object"))
    assert scene.spawn("Safe", 5).spec == expected and scene.render().std() > 5 and scene.make("Safe", 5)[2] == 0
    first, other, again = (scene.spawn("objects/45261", seed).render().copy() for seed in (3, 4, 3))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


# ---- the evaluation -------------------------------------------------------------------------------------------------
def test_objects_are_a_split_and_broken_ones_are_named_and_counted(library, tmp_path, capsys):
    shutil.copytree(library / "45261", tmp_path / "in" / "1")
    write_cabinet(tmp_path / "in" / "2")
    (tmp_path / "in" / "2" / "mobility.urdf").write_text("<robot")
    (tmp_path / "in" / "3").mkdir()
    flags = ["--policy", "expert,random", "--objects", str(tmp_path / "in"), "--episodes", "3", "--workers", "1"]
    assert main([*flags, "--strips", "1", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results["splits"]) == ["objects"] and results["split"] == "objects"
    assert results["splits"]["objects"]["n"] == 3 == results["splits"]["objects"]["initial"]["k"]
    assert list(results["splits"]["objects"]["categories"]) == ["StorageFurniture"]
    assert set(results["skipped"]["objects"]) == {"2", "3"} and "not XML" in results["skipped"]["objects"]["2"]
    assert all(r["object"] == "objects/1" and r["seed"] >= SEEDS["objects"] for r in results["episodes"])
    assert results["skipped"]["held_joints"] == {"objects/1": 1}
    assert "Joints held fixed" in said.out and "(objects/1 1)" in said.out
    assert "skipped 2: " in said.err and "Skipped 2 objects" in said.out
    assert "(theirs)" not in (tmp_path / "out" / "categories.md").read_text()  # not their objects
    assert len([*(tmp_path / "out").glob("strip_*.png")]) == 1


def test_objects_beside_the_catalogue_and_in_two_workers(library, tmp_path):
    flags = ["--policy", "expert", "--objects", str(library), "--split", "unseen", "--episodes", "2"]
    for workers in ("1", "2"):
        assert main([*flags, "--workers", workers, "--out", str(tmp_path / workers)]) == 0
    one, two = (json.loads((tmp_path / workers / "results.json").read_text()) for workers in ("1", "2"))
    assert list(one["splits"]) == ["unseen", "objects"] and one["episodes"] == two["episodes"]
    plain = ["--policy", "expert", "--split", "unseen", "--episodes", "2", "--workers", "1"]
    assert main([*plain, "--out", str(tmp_path / "plain")]) == 0
    plain = json.loads((tmp_path / "plain" / "results.json").read_text())
    assert plain["episodes"] == [r for r in one["episodes"] if r["split"] == "unseen"]


def test_an_object_that_nobody_can_open_says_what_to_check(library, tmp_path):
    """A door whose positive motion goes into the cabinet: no contact, and the reason names axis and limits."""
    shutil.copytree(library / "45261", tmp_path / "a")
    change('<axis xyz="0 1 0"/>', '<axis xyz="0 -1 0"/>')(tmp_path / "a")
    said = []
    with ObjectScene(str(tmp_path)) as scene:
        for seed in range(12):
            scene.spawn("objects/a", seed, part=0).render()
            if (scene.links == 0).sum() > 100:
                assert expert(scene, np.random.default_rng(0)) is None
                said.append(why_unsolved(scene))
        scene.spawn("objects/a", 0, part=0).render()
        scene.links[:] = -2
        assert "0 pixels" in why_unsolved(scene)
    assert len(said) >= 3 and sum("blocked" in why and "check axis and limits" in why for why in said) > 0.6 * len(said)


def test_limits_and_outcomes_are_plain_numbers(scene):
    """A numpy bool in a result cannot be written as JSON, and an evaluation was lost by it."""
    scene.spawn("objects/45261", 1, part=1).render()
    drawer = scene.spec.parts[1]
    numbers = (drawer.lower, drawer.upper, drawer.start, *drawer.axis, *drawer.origin)
    assert {type(value) for value in numbers} == {float}
    label = expert(scene, np.random.default_rng(1))
    outcome = scene.act(label.u, label.v, label.approach)
    json.dumps(vars(outcome))
    assert outcome.initial is True and type(scene.long_threshold(1)) is float


def test_vertices_that_no_face_uses_do_not_count(library, tmp_path):
    shutil.copytree(library / "45261", tmp_path / "a")
    mesh = tmp_path / "a" / "textured_objs" / "drawer.obj"
    mesh.write_text(mesh.read_text() + "v 1000 1000 1000\n")
    far, near = (read_object(folder / name) for folder, name in ((tmp_path, "a"), (library, "45261")))
    assert far.spec == near.spec


def fail(*_, **__):
    raise ValueError("PyBullet cannot load it")


@pytest.mark.parametrize("name, does, said", [
    ("extras.partnet.ObjectScene.spawn", fail, "ValueError: PyBullet cannot load it"),
    ("sim_eval.expert", lambda *_, **__: None, "the expert found no contact"),
])  # fmt: skip
def test_an_object_that_cannot_be_used_is_skipped_by_name(name, does, said, library, tmp_path, monkeypatch):
    monkeypatch.setattr(name, does)
    flags = ["--policy", "expert", "--objects", str(library), "--episodes", "2", "--workers", "1"]
    with pytest.raises(ValueError, match=f"nothing could be evaluated. objects/45261: {said}"):
        main([*flags, "--out", str(tmp_path)])
    assert not (tmp_path / "results.json").exists()


# ---- everything that can be wrong -----------------------------------------------------------------------------------
def change(old, new):
    def broken(folder):
        text = (folder / "mobility.urdf").read_text()
        assert old in text
        (folder / "mobility.urdf").write_text(text.replace(old, new))

    return broken


def change_mesh(text):
    return write("textured_objs/door.obj", text.encode())


def write(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def replace(name, by):
    """A link to itself or a folder instead of a file."""

    def broken(folder):
        (folder / name).unlink()
        (folder / name).mkdir() if by == "folder" else (folder / name).symlink_to(folder / name)

    return broken


def add_drawers(folder, count):
    """That many more links with a sliding joint and a mesh."""
    text = (folder / "mobility.urdf").read_text().removesuffix("</robot>")
    for i in range(count):
        text += link(f"more_{i}", "knob")
        text += joint(f"more_{i}", "prismatic", "link_2", f"more_{i}", axis=(0, 0, 1), limit=(0, 0.5))
    (folder / "mobility.urdf").write_text(text + "</robot>")


def link_outside(folder):
    mesh = folder / "textured_objs" / "shell.obj"
    mesh.rename(folder.parent.parent / "linked.obj")
    mesh.symlink_to(folder.parent.parent / "linked.obj")


LONG = json.dumps({"model_cat": "a" * 61})
BROKEN = {
    "no urdf": (lambda folder: (folder / "mobility.urdf").unlink(), "mobility.urdf"),
    "not text": (write("mobility.urdf", b"\xff\xfe\x00\x01"), "mobility.urdf"),
    "mesh outside": (change("textured_objs/shell.obj", "../../outside.obj"), "outside"),
    "mesh elsewhere": (change("textured_objs/shell.obj", "/etc/passwd"), "outside"),
    "mesh linked": (link_outside, "outside"),
    "mesh missing": (change("textured_objs/shell.obj", "textured_objs/x.obj"), "textured_objs/x.obj"),
    "no mesh": (change('<mesh filename="textured_objs/shell.obj"/>', '<box size="1 1 1"/>'), "link_2"),
    "link": (change('<child link="link_0"/>', '<child link="link_9"/>'), "link_9"),
    "parents": (change('<child link="link_0"/>', '<child link="link_1"/>'), "two parents"),
    "circle": (change('<parent link="link_2"/><child link="link_1"/>', '<parent link="link_4"/><child link="link_1"/>'),
               "hangs on itself"),
    "type": (change('type="prismatic"', 'type="floating"'), "floating"),
    "axis": (change('<axis xyz="0 1 0"/>', '<axis xyz="0 0 0"/>'), "no length"),
    "words": (change('<axis xyz="0 1 0"/>', '<axis xyz="0 up 0"/>'), "0 up 0"),
    "limits": (change('upper="1.5"', 'upper="-1"'), "joint_1"),
    "infinite": (change('upper="1.5"', 'upper="inf"'), "inf"),
    "no limit": (change('<limit lower="0" upper="0.5"/>', ""), "<limit>"),
    "no joints": (lambda folder: [change(f'type="{kind}"', 'type="fixed"')(folder)
                                  for kind in ("prismatic", "revolute", "continuous")], "no movable joint"),
    "face": (change_mesh("v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 4\n"), "door.obj, line 4"),
    "negative face": (change_mesh("v 0 0 0\nv 1 0 0\nv 0 1 0\nf -1 -2 -4\n"), "door.obj, line 4"),
    "texture": (change_mesh("v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1/1 2/1 3/1\n"), "door.obj, line 4"),
    "vertex": (change_mesh("v 0 0 nan\n"), "door.obj, line 1"),
    "binary": (change_mesh("\x00\x01"), "door.obj: no faces"),
    "names": (write("semantics.txt", b"link_0 drawer\n"), "semantics.txt, line 1"),
    "meta": (write("meta.json", b"[]"), "meta.json"),
    "deep meta": (write("meta.json", b"[" * 100_000), "meta.json"),
    "meta bytes": (write("meta.json", b'{"model_cat": "\xff"}'), "meta.json: not UTF-8"),
    "category": (write("meta.json", b'{"model_cat": "a|b"}'), "model_cat"),
    "category script": (write("meta.json", b'{"model_cat": "<b>"}'), "model_cat"),
    "long category": (write("meta.json", LONG.encode()), "model_cat"),
    "names bytes": (write("semantics.txt", b"link_0 slider \xe9\n"), "semantics.txt"),
    "loop": (replace("textured_objs/door.obj", "link"), "door.obj"),
    "long name": (change("textured_objs/shell.obj", "a" * 5000 + ".obj"), "link_2"),
    "null in name": (change("textured_objs/shell.obj", "a&#1;.obj"), "mobility.urdf"),
    "folder for a file": (replace("meta.json", "folder"), "meta.json"),
    "deep xml": (write("mobility.urdf", b"<a>" * 100_000), "mobility.urdf"),
    "other encoding": (write("mobility.urdf", b"<?xml version='1.0' encoding='utf-7'?><a"), "mobility.urdf"),
    "no area": (change_mesh("v 0 0 0\nv 1 0 0\nv 2 0 0\nf 1 2 3\n"), "door.obj: the faces have no area"),
    "no movement": (lambda folder: [change(old, new)(folder) for old, new in (
        ('upper="1.5"', 'upper="1e-5"'), ('upper="0.5"', 'upper="1e-5"'), ('type="continuous"', 'type="fixed"'))],
        "no movable joint that moves at least 0.02"),
    "many parts": (lambda folder: add_drawers(folder, 128), "PyBullet takes at most 127"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_object_is_named(name, library, tmp_path):
    shutil.copytree(library / "45261", tmp_path / "in" / "7")
    shutil.copy(library / "45261" / "textured_objs" / "shell.obj", tmp_path / "outside.obj")
    breaks, said = BROKEN[name]
    breaks(tmp_path / "in" / "7")
    with pytest.raises(ValueError) as error:
        read_object(tmp_path / "in" / "7")
    assert said in str(error.value) and str(tmp_path / "in" / "7") in str(error.value)
    with pytest.raises(ValueError) as error:
        main(["--policy", "expert", "--objects", str(tmp_path / "in"), "--out", str(tmp_path / "out")])
    assert said in str(error.value) and not (tmp_path / "out").exists()


def test_hostile_folders_are_passed_over(library, tmp_path):
    for name, (breaks, _) in BROKEN.items():
        shutil.copytree(library / "45261", tmp_path / "in" / name)
        breaks(tmp_path / "in" / name)
    shutil.copytree(library / "45261", tmp_path / "in" / "good")
    good, bad, _ = find_objects(str(tmp_path / "in"))
    assert good == ["objects/good"] and set(bad) == set(BROKEN)


def test_127_parts_load(library, tmp_path):
    shutil.copytree(library / "45261", tmp_path / "a")
    add_drawers(tmp_path / "a", 125)
    with ObjectScene(str(tmp_path), 64) as scene:
        assert len(scene.spawn("objects/a", 0, part=126).spec.parts) == 127


def test_faces_may_count_back_and_carry_textures(tmp_path):
    (tmp_path / "a.obj").write_text("v 0 0 0\nv 1 0 0\nv 0 1 0\nvt 0 0\nvn 0 0 1\nf 1/1/1 2/1/1 3//1\nf -3 -2 -1\n")
    assert read_obj(tmp_path / "a.obj").tolist() == [[0, 0, 0], [1, 0, 0], [0, 1, 0]]


def test_a_folder_without_objects_and_a_missing_one(tmp_path, library):
    for folder, said in ((str(tmp_path), "no folders"), ("no/such", "no/such")):
        with pytest.raises(ValueError, match=said):
            find_objects(folder)
    assert find_objects(str(library / "45261"))[0] == ["objects/45261"]  # the folder of one object will do
