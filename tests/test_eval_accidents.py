"""pytest tests/test_eval_accidents.py -q

The evaluation when something goes wrong: interrupted runs, objects that break, killed processes, every bad input.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from test_eval import run

import sim_eval
from common.scripts import parallel
from sim import pictures, policies
from sim.scene import Scene
from sim_eval import EvalConfig

ROOT = Path(__file__).resolve().parent.parent


def test_ctrl_c_leaves_a_partial_result_and_the_finished_one_as_it_was(tmp_path, monkeypatch, capsys):
    flags = ("--policy", "expert", "--workers", 1, "--strips", 1)
    run(tmp_path, *flags, "--episodes", 1)
    finished = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {"results.json", "table.md", "categories.md"} <= finished.keys()
    episode, calls = sim_eval.Bench.episode, []

    def interrupted(self, job):
        calls.append(job)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return episode(self, job)

    with monkeypatch.context() as patch:
        patch.setattr(sim_eval.Bench, "episode", interrupted)
        results = run(tmp_path, *flags, "--episodes", 4, code=130)
    assert results["partial"] is True and len(results["episodes"]) == 3
    assert results["splits"]["seen"]["n"] == 2 and results["splits"]["unseen"]["n"] == 1
    assert "Partial" in (tmp_path / "table.partial.md").read_text() and "3 of 8 scenes" in capsys.readouterr().err
    assert {name: (tmp_path / name).read_bytes() for name in finished} == finished
    run(tmp_path, *flags, "--episodes", 1)
    assert not list(tmp_path.glob("*partial*"))  # done now


def test_an_object_that_breaks_the_simulator_is_named_and_the_others_go_on(tmp_path, monkeypatch):
    good, bad = (sim_eval.Job("objects", name, 0, 0) for name in ("Safe", "Door"))
    one, spawn = sim_eval.Bench(EvalConfig(policy="expert")), Scene.spawn

    def hostile(self, category, seed, part=None):
        if category == "Door":
            raise RecursionError("mesh links to itself")
        return spawn(self, category, seed, part)

    monkeypatch.setattr(Scene, "spawn", hostile)
    answers = [(job, one.episode(job)) for job in (bad, good)]
    one.close()
    assert answers[0][1]["why"] == "RecursionError: mesh links to itself" and answers[1][1]["solved"]
    broken = {"7": "no mobility.urdf"}
    assert set(sim_eval.skipped(answers, broken)["objects"]) == {"7", "Door"}
    with pytest.raises(
        ValueError, match="nothing could be evaluated. Door: RecursionError: mesh .*; 7: no mobility.urdf"
    ):
        sim_eval.skipped(answers[:1], broken)


def test_workers_have_a_core_each_and_the_share_of_a_killed_one_is_done_again(capsys):
    cfg = EvalConfig(policy="expert", split="val", episodes=10, workers=2)
    jobs, answers = sim_eval.make_jobs(cfg, sim_eval.SPLITS["val"]), {}
    for job, answer in parallel(sim_eval._work, jobs, 2, sim_eval._start, (cfg,)):
        if not answers:
            workers = [worker.pid for worker in multiprocessing.active_children()]
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline:  # the second one may still be starting
                cores = [os.sched_getaffinity(pid) for pid in workers]
                if all(len(core) == 1 for core in cores):
                    break
                time.sleep(0.02)
            os.kill(workers[0], signal.SIGKILL)
        answers[job] = answer
    assert set(answers) == set(jobs) and all(answer["records"] for answer in answers.values())
    assert len(cores) == 2 and [len(core) for core in cores] == [1, 1]
    assert cores[0] != cores[1] or len(os.sched_getaffinity(0)) == 1
    assert "a worker process died" in capsys.readouterr().err


def test_workers_do_not_outlive_a_killed_parent(tmp_path):
    code = f"""
import multiprocessing, os, signal, sys
from pathlib import Path
import sim_eval
if __name__ == "__main__":
    cfg = sim_eval.EvalConfig(policy="expert", split="val", episodes=200, workers=2)
    jobs = sim_eval.make_jobs(cfg, sim_eval.SPLITS["val"])
    for job, answer in sim_eval.parallel(sim_eval._work, jobs, 2, sim_eval._start, (cfg,)):
        Path({str(tmp_path / "workers")!r}).write_text(" ".join(str(p.pid) for p in multiprocessing.active_children()))
        os.kill(os.getpid(), signal.SIGKILL)
"""
    (tmp_path / "parent.py").write_text(code)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    parent = subprocess.run([sys.executable, tmp_path / "parent.py"], env=environment, capture_output=True, timeout=60)
    workers = [int(pid) for pid in (tmp_path / "workers").read_text().split()]
    assert parent.returncode == -signal.SIGKILL and len(workers) == 2
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in workers)


def alive(pid: int) -> bool:
    """Whether a process runs (one that has ended but was not yet collected does not)."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    "flags, said",
    [
        (("--policy", "expert", "--split", "moon"), "--split moon"),
        (("--policy", "genius"), "--policy genius"),
        (("--policy", "expert,expert"), "twice"),
        (("--policy", "model", "--checkpoint", "no/such/folder"), "no/such/folder"),
        (("--policy", "other=no/such/folder"), "--policy no/such/folder"),
        (("--policy", "other="), "--policy (not given)"),
        (("--policy", "blind", "--blind-table", "no/such/table.json"), "no/such/table.json"),
        (("--policy", "blind", "--blind-table", __file__), "not valid JSON"),
        (("--policy", "blind", "--blind-table", str(ROOT / "data/paper_table2.json")), "not a table"),
        (("--policy", "model=data/pretrained/robomamba-tiny-rgbd"), "has a meaning already"),
        (("--policy", "mine=no_such_module:pick"), "No module named"),
        (("--policy", "expert", "--episodes", "0"), "--episodes 0"),
        (("--policy", "expert", "--episodes", "many"), "many"),
        (("--policy", "expert", "--workers", "-1"), "--workers -1"),
        (("--policy", "expert", "--seed", "-1"), "--seed -1"),
        (("--policy", "expert", "--strips", "-1"), "--strips -1"),
        (("--policy", "expert", "--loud"), "--loud"),
        (("--policy", "expert", "--categories", " , "), "--categories"),
        (("--policy", "expert", "--objects", "no/such/folder"), "no/such/folder"),
    ],
)
def test_bad_input_is_one_line(flags, said, tmp_path):
    with pytest.raises(ValueError) as error:
        sim_eval.main([*flags, "--out", str(tmp_path / "out")])
    assert said in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "module, flags, said",
    [
        (pictures, ["--affordance", "Spaceship"], "Spaceship"),
        (pictures, ["--seed", "3"], "nothing to draw"),
        (pictures, ["--seed", "-1", "--affordance", "Door"], "--seed -1"),
        (policies, ["--make-blind-table", "no/such.jsonl"], "no/such.jsonl"),
        (policies, [], "--make-blind-table"),
    ],
)
def test_bad_input_of_the_smaller_programs(module, flags, said):
    with pytest.raises(ValueError, match=said):
        module.main(flags)


def test_a_sheet_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(ValueError, match="sheet.pgn: not the name of a picture"):
        pictures.save(str(tmp_path / "sheet.pgn"), Image.new("RGB", (2, 2)))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file/sheet.png: cannot be written"):
        pictures.save(str(tmp_path / "file/sheet.png"), Image.new("RGB", (2, 2)))


def test_an_output_folder_that_cannot_be_written_is_named_before_the_run(tmp_path):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "out"
    with pytest.raises(ValueError, match=f"--out {out}: cannot be written"):
        sim_eval.main(["--policy", "expert", "--episodes", "100000", "--out", str(out)])
