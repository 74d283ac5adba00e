"""Pictures: the right things in the right places; that they look well is for eyes."""

import json

import numpy as np
import pytest
from conftest import refused, run_here
from PIL import Image

import build_data
import draw
import eval


def pixels_of(path):
    return np.asarray(Image.open(path)).astype(int)


def is_red(sheet):
    return (sheet[..., 0] > 200) & (sheet[..., 1] < 80) & (sheet[..., 2] < 80)


def test_margins_are_drawn_to_one_scale(monkeypatch, capsys, tmp_path):
    steps = [{"step": i + 1, "text_margin": 1.0 * i, "image_margin": 0.0} for i in range(40)]
    for name, lines in (("a", steps), ("b", [{**s, "text_margin": s["text_margin"] / 2} for s in steps])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    folders = [tmp_path / "a", tmp_path / "b"]
    assert run_here(monkeypatch, eval, "--margins", tmp_path / "m.png", *folders) == 0
    sheet = pixels_of(tmp_path / "m.png")
    blue = (sheet[..., 2] > 200) & (sheet[..., 0] < 80)
    tops = [np.flatnonzero(blue[45:295, left : left + 370].any(1)).min() for left in (55, 485)]
    # Smoothed over 10 steps, the highest is 34.5 (the scale's top) and 17.25 (its middle).
    assert tops[0] == 0 and tops[1] == pytest.approx(125, abs=4)
    text_only = [{"step": 1, "text_margin": 0.0}]
    (tmp_path / "b" / "metrics.jsonl").write_text("\n".join(map(json.dumps, text_only)))
    assert "measured no image margin" in refused(monkeypatch, capsys, eval, "--margins", tmp_path / "m.png", *folders)
    (tmp_path / "b" / "metrics.jsonl").write_text('{"step": 1, "text_')
    assert "no whole" in refused(monkeypatch, capsys, eval, "--margins", tmp_path / "m.png", *folders)
    told = refused(monkeypatch, capsys, eval, "--margins", tmp_path / "m.png", tmp_path / "none")
    assert "holds no whole metrics.jsonl" in told


def test_the_story_marks_what_is_not_there(world, monkeypatch, capsys, tmp_path):
    mined = world / "story.jsonl"
    config = {"source": str(world / "val.jsonl"), "model": str(world / "base"), "out": str(mined), "steps": 1}
    build_data.build_mbpo(build_data.MbpoConfig(**config, iig_keep=1, questions=0, batch=13))
    scenes = [json.loads(line) for line in (world / "val.jsonl").read_text().splitlines()]
    invented = {s["image"]: f"A {next(k for k in eval.toy.KINDS if k not in s['chosen'])}." for s in scenes}
    images = [json.loads(line)["image"] for line in mined.read_text().splitlines()]
    monkeypatch.setattr(eval, "answer_all", lambda *args: [invented[image] for image in images])
    args = ["--data", world, "--base", world / "base", "--compare", world / "base", world / "base", "--split", "val"]
    assert run_here(monkeypatch, eval, *args, "--attacked", mined, "--story", tmp_path / "s.png") == 0
    sheet = pixels_of(tmp_path / "s.png")
    assert is_red(sheet[30:, 520:]).any() and sheet.shape == (30 + 170 * min(5, len(images)), 3 * 170 + 640, 3)
    for other in ("preference.jsonl", "mfpo_val.jsonl"):
        told = refused(monkeypatch, capsys, eval, *args, "--attacked", world / other, "--story", tmp_path / "s.png")
        assert "mines no scene" in told
    monkeypatch.setattr(eval, "answer_all", lambda *args: ["Nothing."] * len(images))
    told = refused(monkeypatch, capsys, eval, *args, "--attacked", mined, "--story", tmp_path / "s.png")
    assert "invents nothing" in told


def test_words_are_broken_before_the_edge():
    sheet = Image.new("RGB", (200, 100), "white")
    end = draw.write_words(draw.ImageDraw.Draw(sheet), (10, 10), 190, ["picture"] * 8, [False] * 7 + [True])
    assert end > 50 and not (np.asarray(sheet)[:, 195:] < 128).any() and is_red(np.asarray(sheet).astype(int)).any()
