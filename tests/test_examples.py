"""Test the examples: the demo, the drawn ears, the benchmark."""

import json
import re
import subprocess
import sys
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_demo_runs(tmp_path, monkeypatch, capfd):
    import demo
    import steps

    small = "--people 20 --epochs 4 --backbone test_convnext --size 64"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["demo.py", "demo", *small.split()])
    monkeypatch.setattr(steps, "subprocess", forked)
    demo.steps()
    out, err = capfd.readouterr()
    assert "(interrupted: exit code 130)" in err and "restored: last.ckpt: epoch 1 of 4" in err
    folder = tmp_path / "demo"
    assert {
        "worst.png",
        "collage.png",
        "plots",
        "look-alikes.png",
        "teacher.safetensors",
        "teacher.npy",
        "teacher.csv",
        "teacher.json",
    } <= {p.name for p in folder.iterdir()}
    assert "timm alone: (1, 64)" in out
    assert re.search(r"^A: start.npy.*\nB: teacher.npy", out, re.MULTILINE)
    assert re.search(r"^rank-1( +[-+]?\d+\.\d){3} +\[", out, re.MULTILINE)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    steps.run("earteach", "--version", tee="version.txt")  # in a new process
    assert Path("version.txt").read_text(encoding="utf-8").startswith("earteach ")
    command = [sys.executable, ROOT / "examples" / "demo.py", "demo"]
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 1 and again.stderr == "demo: exists already; remove it, or give another folder\n"


def test_the_demo_runs_the_commands_of_the_readme():
    readme, demo = (ROOT / "README.md").read_text(), (ROOT / "examples" / "demo.py").read_text()
    walk_through = readme.split("## Walk-through")[1].split("\n## ")[0]
    assert set(re.findall(r"^earteach (\S+)", walk_through, re.MULTILINE)) == set(
        re.findall(r'"earteach", "([a-z-]+)"', demo)
    )


def test_drawn_ears_have_boxes_sides_and_landmarks():
    from make_sample_ears import draw_photo

    for photo in range(4):
        image, box, side, landmarks = draw_photo(0, 3, photo)
        again = draw_photo(0, 3, photo)
        assert isinstance(image, Image.Image) and image.tobytes() == again[0].tobytes()
        points = np.asarray(landmarks)
        assert points.shape == (55, 2) and side in ("left", "right")
        x1, y1, x2, y2 = box
        assert 0 <= x1 < x2 <= image.width and 0 <= y1 < y2 <= image.height
        assert (points >= [x1 - 1, y1 - 1]).all() and (points <= [x2 + 1, y2 + 1]).all()
        helix_top, lobe = points[:20, 1].min(), points[:20, 1].max()
        assert helix_top - y1 < 0.1 * (y2 - y1) and lobe > y1 + 0.6 * (y2 - y1)


def test_left_and_right_ears_face_opposite_ways():
    from make_sample_ears import draw_photo

    facing = {}
    for photo in range(4):
        _, _, side, landmarks = draw_photo(0, 5, photo)
        points = np.asarray(landmarks)
        tragus, helix = points[50:, 0].mean(), points[:20, 0].mean()
        facing.setdefault(side, set()).add(bool(tragus < helix))
    assert len(facing) == 2 and all(len(ways) == 1 for ways in facing.values())
    assert facing["left"] != facing["right"]


@pytest.mark.slow
def test_the_benchmark_runs_and_reports_every_round(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.path", [str(ROOT / "examples" / "benchmarks"), *sys.path])
    import bench

    threads = torch.get_num_threads()
    try:
        assert bench.main(["cache", "--quick", "--rounds", "2", "--json", str(tmp_path / "x.json")]) == 0
    finally:
        torch.set_num_threads(threads)
    lines = json.loads((tmp_path / "x.json").read_text())
    assert {line["part"] for line in lines} == {"cache"}
    assert all(len(line["ratios"]) == 2 and min(line["ratios"]) > 0 for line in lines)
    assert capsys.readouterr().out.count("\n| ") == len(lines) + 1
    ratios = bench.speed_up({"ours": [1.0, 2.0], "other": [3.0, 4.0]}, "ours", "other")
    line = bench.Line("a", "b", "c", ratios, 2.6, "", "")
    assert ratios == [3.0, 2.0] and line.median == 2.5 and "not met: 2.50 [2.00, 3.00]" in line.as_row()


@pytest.mark.slow
@pytest.mark.parametrize(("part", "rows"), [("step", 4), ("distilling", 2)])
def test_the_benchmark_of_a_training_step_runs_with_the_default_recipe(part, rows, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", [str(ROOT / "examples" / "benchmarks"), *sys.path])
    import bench

    threads = torch.get_num_threads()
    try:
        bench.main([part, "--quick", "--rounds", "1", "--json", str(tmp_path / "x.json")])  # its limits are not met
    finally:
        torch.set_num_threads(threads)
    lines = json.loads((tmp_path / "x.json").read_text())
    assert len(lines) == rows and {line["part"] for line in lines} == {part}


@pytest.mark.parametrize(("views", "again"), [(1, False), (2, True)])
def test_the_cost_of_training_is_measured(views, again):
    sys.path.insert(0, str(ROOT / "examples" / "benchmarks"))
    from measure_cost import measure

    found = measure("test_convnext", 64, views, 4, again, "cpu", 1)
    assert 0 < found["low"] <= found["seconds"] <= found["high"] and found["gigabytes"] > 0.1
    assert found["parameters"] == 207_128
