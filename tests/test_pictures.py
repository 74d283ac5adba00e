"""Pictures: the right things in the right places; that they look well is for eyes."""

import importlib.util
import json
import shutil
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
from conftest import finished, forked, refused, run_here
from PIL import Image, ImageDraw

import toy
from extras import pictures


def pixels_of(path):
    return np.asarray(Image.open(path)).astype(int)


def is_red(pixels):
    return (pixels[..., 0] > 200) & (pixels[..., 1] < 80) & (pixels[..., 2] < 80)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, lines):
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def cell(drawn, row, column):
    """The pixels of an image on a sheet whose rows have no more text than fits beside an image."""
    top, left = 30 + 202 * row, 10 + 202 * column
    return drawn[top : top + 192, left : left + 192]


def text(drawn, row, columns):
    return drawn[30 + 202 * row : 232 + 202 * row, 10 + 202 * columns :]


@pytest.fixture
def record(tmp_path):
    """A record of both methods by hand: a grey image, of which the attack made the left brighter, the right darker."""
    grey = np.full((64, 64, 3), 100, np.uint8)
    Image.fromarray(grey).save(tmp_path / "image.png")
    grey[:, :32] += 8
    grey[:, 32:] -= 3
    Image.fromarray(grey).save(tmp_path / "attacked.png")
    answers = {"chosen": "The picture shows a cup.", "rejected": "The picture shows a cup and a rocket."}
    files = {"image": "image.png", "image_rejected": "attacked.png", "image_attacked": "attacked.png"}
    attack = {"kind": "pgd", "eps": 4 / 255, "alpha": 0.004, "steps": 10}
    return {"id": "a", "question": "What?", **answers, **files, "attack": attack}


def lines_of(row):
    return {who: (said, set(red)) for who, said, red in row[1]}


# ------------------------------------------------------------------------------------------------- sheets


def test_words_are_broken_before_the_edge():
    drawn = Image.new("RGB", (200, 100), "white")
    end = pictures.write_words(ImageDraw.Draw(drawn), (10, 10), 190, ["picture"] * 7 + ["rocket"], {"rocket"})
    assert end > 50 and not (np.asarray(drawn)[:, 195:] < 128).any()
    assert is_red(np.asarray(drawn).astype(int)).any()


def test_a_row_grows_with_its_text_and_a_long_text_is_cut_where_it_can_be_seen():
    white, drawn = Image.new("RGB", (64, 64), "white"), {}
    for words in (3, 60, 80, 81, 500):
        lines = [(who, "picture " * words, ()) for who in "abc"]
        drawn[words] = np.asarray(pictures.sheet(("image", "text"), [([white], lines)]))
    assert len(drawn[3]) == 30 + 192 + 10 and len(drawn[3]) < len(drawn[60]) < len(drawn[80])
    assert np.array_equal(drawn[81], drawn[500]) and not np.array_equal(drawn[80], drawn[81])  # " ..."
    narrow = pictures.sheet(("image", "text"), [([white.resize((160, 10))], [("a", "b", ())])])
    assert narrow.size == (10 + 202 + 750, 232)


def test_a_sheet_shows_image_regions_and_distorted_image(world, tmp_path, monkeypatch):
    out = tmp_path / "sheet.png"
    assert run_here(monkeypatch, pictures, "sheet", "--records", world / "mfpo.jsonl", "--out", out, "--rows", 3) == 0
    records, drawn = read(world / "mfpo.jsonl")[:3], pixels_of(out)
    assert drawn.shape == (30 + 3 * 202, 10 + 2 * 202 + 750, 3)
    for row, record in enumerate(records):
        image, distorted = (pixels_of(world / record[name]) for name in ("image", "image_rejected"))
        assert (cell(drawn, row, 1) == distorted.repeat(3, 0).repeat(3, 1)).all()
        expected = image.copy()
        for x0, y0, x1, y1 in (region["box"] for region in record["regions"]):
            expected[[y0, y1 - 1], x0:x1] = expected[y0:y1, [x0, x1 - 1]] = (255, 0, 0)
        assert record["regions"] and (cell(drawn, row, 0) == expected.repeat(3, 0).repeat(3, 1)).all()
        assert (text(drawn, row, 2) < 128).any() and not is_red(text(drawn, row, 2)).any()


def test_a_sheet_says_what_a_record_holds(record):
    image = Image.new("RGB", (64, 64))
    regions = [{"word": "cup", "box": [1, 2, 9, 9]}, {"word": "cup", "box": [20, 20, 20, 30.5], "score": 0.4}]
    built = {"keywords": ["cup", "red"], "rejected_from": "own", "region_kind": "key", "regions": regions}
    row = pictures.sheet_row({**record, **built, "negative": "erased"}, image.copy(), image, None)
    said = {who: words for who, (words, red) in lines_of(row).items() if not red}
    assert said == {
        "keywords": "cup, red",
        "chosen": "The picture shows a cup.",
        "rejected": "The picture shows a cup and a rocket. (own)",
        "negative": "erased",
        "region": "key: cup, cup",
    }
    by_hand = lines_of(pictures.sheet_row(record, image, image, None))  # no field but those that are trained on
    assert by_hand["rejected"][0].endswith("(given)") and by_hand["region"][0] == "unknown: none"
    assert by_hand["negative"][0] == "unknown"


def test_an_attack_is_shown_enlarged_with_the_invented_words_in_red(record, tmp_path, monkeypatch):
    same = {**record, "id": "b", "rejected": "A cup, the picture shows."}
    records = write(tmp_path / "mbpo.jsonl", [record, same])
    assert run_here(monkeypatch, pictures, "attack", "--records", records, "--out", tmp_path / "a.png") == 0
    drawn = pixels_of(tmp_path / "a.png")
    assert (cell(drawn, 0, 0) == 100).all()
    for column, values in ((1, (108, 97)), (2, (255, 128 - 20 * 3))):
        shown = cell(drawn, 0, column)
        assert (shown[:, :96] == values[0]).all() and (shown[:, 96:] == values[1]).all()
    assert is_red(text(drawn, 0, 3)).any() and not is_red(text(drawn, 1, 3)).any()
    config = SimpleNamespace(pad=False)
    row = pictures.attack_row(record, Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8)), config)
    assert lines_of(row)["mined"][1] == {"rocket."} and not lines_of(row)["chosen"][1]
    assert lines_of(row)["attack"][0] == "pgd, eps 4/255"


def test_an_attacked_image_is_compared_with_what_the_model_saw(record, tmp_path, monkeypatch):
    """A flat image, padded to a square by the convention "original": with CLIP's mean colour."""
    Image.new("RGB", (64, 32), (10, 20, 30)).save(tmp_path / "image.png")
    square = np.full((64, 64, 3), (122, 116, 104), np.uint8)
    square[16:48] = 10, 20, 30
    Image.fromarray(square).save(tmp_path / "attacked.png")
    args = "attack", "--records", write(tmp_path / "mbpo.jsonl", [record]), "--out", tmp_path / "a.png"
    assert run_here(monkeypatch, pictures, *args, "--pad", True) == 0
    assert (cell(pixels_of(tmp_path / "a.png"), 0, 2) == 128).all()
    assert run_here(monkeypatch, pictures, *args) == 0
    assert (cell(pixels_of(tmp_path / "a.png"), 0, 2) != 128).any()


def test_the_story_marks_what_is_not_there(world, monkeypatch, capsys, tmp_path):
    scenes, pairs, others = (read(world / f"{name}.jsonl") for name in ("val", "mfpo_val", "mfpo"))
    attack = {"kind": "pgd", "eps": 4 / 255}
    lines = [
        {**scene, "rejected": "A cup.", "image_attacked": other["image_rejected"], "attack": attack}
        for scene, other in zip(scenes[:8], others, strict=False)
    ]
    attacked = write(world / "story.jsonl", lines)
    absent = {s["image"]: next(kind for kind in toy.KINDS if kind not in s["chosen"]) for s in lines}
    truthful, asked = {lines[0]["image"]}, []  # the base invents nothing in the first scene

    def answer(policy, folder, questions, max_new_tokens, title):
        asked.append((questions, title))
        names = [name for name, _ in questions if title.endswith("base") and name not in truthful]
        return [f"A {absent[name]} is here." if name in names else "Nothing." for name, _ in questions]

    monkeypatch.setattr(pictures.eval, "answer", answer)
    (tmp_path / "run-1").mkdir()
    after = tmp_path / "run-1" / "final"
    after.symlink_to(world / "base")
    args = "story", "--data", world, "--base", world / "base", "--models", after, after, "--split", "val"
    assert run_here(monkeypatch, pictures, *args, "--attacked", attacked, "--out", tmp_path / "s.png") == 0
    assert [questions for questions, _ in asked] == [[(s["image"], s["question"]) for s in lines]] * 3
    assert [title for _, title in asked] == [f"captions of {name}" for name in (world / "base", after, after)]
    drawn = pixels_of(tmp_path / "s.png")
    assert drawn.shape == (30 + 202 * 5, 10 + 202 * 3 + 750, 3)
    for row, (line, pair) in enumerate(zip(lines[1:6], pairs[1:6], strict=True)):
        for column, name in enumerate((line["image"], pair["image_rejected"], line["image_attacked"])):
            assert (cell(drawn, row, column) == pixels_of(world / name).repeat(3, 0).repeat(3, 1)).all()
        said = text(drawn, row, 3)
        red = [is_red(said[24 * k : 24 * k + 20]).any() for k in range(6)]
        assert red == [False, True, "cup" not in line["chosen"], False, False, False]
    # Two processes answer, one draws, and it draws the same.
    monkeypatch.setattr(pictures.hub, "load", lambda name, trained: None)  # answers are given here
    two = "--attacked", attacked, "--out", tmp_path / "two.png"
    assert finished(forked(pictures, *args, *two, processes=2, log=tmp_path / "log")) == [0, 0]
    assert (tmp_path / "log").read_text().count("wrote ") == 1
    assert (tmp_path / "two.png").read_bytes() == (tmp_path / "s.png").read_bytes()

    def refusal(path):
        out = "--out", tmp_path / "no.png"
        return refused(monkeypatch, capsys, pictures, *args, "--attacked", path, *out)

    assert "field 'rejected' is missing" in refusal(world / "val.jsonl")
    preferences = write(world / "story.jsonl", [{**other, "image_attacked": other["image"]} for other in others])
    assert "no scenes of --data" in refusal(preferences)
    truthful |= set(absent)
    assert "invents nothing" in refusal(write(world / "story.jsonl", lines))
    moved = write(tmp_path / "story.jsonl", lines)
    shutil.copytree(world / "images", tmp_path / "images")
    (world / "story.jsonl").unlink()
    assert "no scenes of --data" in refusal(moved) and not (tmp_path / "no.png").exists()


@pytest.mark.parametrize(
    ("command", "change", "message"),
    [
        ("sheet", {"image_rejected": "none.png"}, "none.png: no such image"),
        ("attack", {"image_attacked": "../x.png"}, "lies outside"),
        ("attack", {"image_attacked": "broken.png"}, "record 'a': "),
        ("attack", {"image_attacked": None}, "field 'image_attacked' is missing"),
        ("attack", {"attack": {"kind": "pgd"}}, "record 'a': field 'eps' is missing"),
        ("attack", {"attack": None}, "record 'a': "),
        ("sheet", {"regions": [{"word": "cup", "box": "all"}]}, "record 'a': field 'box' must be a list"),
        ("sheet", {"regions": ["cup"]}, "record 'a': a record must be a JSON object"),
        ("sheet --out x.jpg", {}, "--out x.jpg must end in .png"),
        ("sheet --out nowhere/x.png", {}, "lie in a folder that exists"),
        ("attack --rows 0", {}, "--rows must be positive"),
        ("attack --records none.jsonl", {}, "none.jsonl: no such file"),
    ],
)
def test_mistakes(record, tmp_path, monkeypatch, capsys, command, change, message):
    (tmp_path / "broken.png").write_bytes((tmp_path / "image.png").read_bytes()[:60])
    records, (name, *flags) = write(tmp_path / "x.jsonl", [record | change]), command.split()
    args = name, "--records", records, "--out", tmp_path / "sheet.png", *flags
    assert message in refused(monkeypatch, capsys, pictures, *args)
    assert not (tmp_path / "sheet.png").exists()


def test_flags_that_are_missing(monkeypatch, capsys):
    for args, message in ((("sheet",), "--out"), (("curves", "--out", "x.png"), "--runs"), ((), "sheet | attack")):
        assert message in refused(monkeypatch, capsys, pictures, *args)


# ------------------------------------------------------------------------------------------------- curves


def summary(chair_s, margin=1.0):
    metrics = {"chair_s": chair_s, "recall": 0.5, "image_margin": margin, "information_gain": 2.0}
    return {**metrics, "split": "test"}


def runs_in(folder):
    """Two schedules over the share of the image that is left, one run of another kind."""
    for name, chair_s, margin in (
        ("0.44_ddpm_400-0", 0.1, 5.0),
        ("0.44_ddpm_400-1", 0.3, None),
        ("1_ddpm_0-0", 0.4, 1.0),
        ("0.285_vcd_999-0", 0.2, 2.0),
        ("mfpo-0", 0.9, 9.0),
    ):
        (folder / name).mkdir(parents=True)
        summaries = {"base": summary(0.5 + 0.1 * (name[-1] == "1")), "final": summary(chair_s, margin)}
        (folder / name / "eval.json").write_text(json.dumps(summaries))
    return folder


def test_curves_are_over_the_number_in_a_name(tmp_path):
    runs = pictures.eval.read_runs(runs_in(tmp_path / "runs"))
    panels = dict(pictures.curve_panels(runs))
    assert list(panels) == [pictures.eval.METRICS[metric][0] for metric in pictures.CURVES]

    def plain(title):
        return [(label, list(xs), pytest.approx(list(ys), nan_ok=True), form) for label, xs, ys, form in panels[title]]

    assert plain(pictures.eval.METRICS["chair_s"][0]) == [
        ("base", [0.285, 1], [0.55, 0.55], "k--"),  # of seeds 0 and 1
        (None, [0.44, 0.44, 1], [0.1, 0.3, 0.4], "C0."),
        ("ddpm", [0.44, 1], [0.2, 0.4], "C0-"),
        (None, [0.285], [0.2], "C1."),
        ("vcd", [0.285], [0.2], "C1-"),
    ]
    nan = float("nan")  # undefined: in one seed, so in the mean
    margins = plain(pictures.eval.METRICS["image_margin"][0])
    assert margins[1:3] == [(None, [0.44, 0.44, 1], [5, nan, 1], "C0."), ("ddpm", [0.44, 1], [nan, 1], "C0-")]


def steps(text, image):
    return [{"step": k + 1, "text_margin": text(k), "image_margin": image(k)} for k in range(40)]


def test_margins_are_means_over_ten_steps(tmp_path):
    lines = steps(lambda k: k * k, lambda k: -k)
    write(tmp_path / "metrics.jsonl", lines)
    title, ((text, text_xs, text_ys, _), (image, image_xs, image_ys, _)) = pictures.margin_panel(tmp_path)
    assert title.startswith(str(tmp_path)) and (text, image) == ("text margin (nats)", "image margin (nats)")
    assert text_xs == image_xs == list(range(10, 41))
    for x, text_y, image_y in zip(text_xs, text_ys, image_ys, strict=True):
        assert text_y == pytest.approx(sum((step - 1) ** 2 for step in range(x - 9, x + 1)) / 10)
        assert image_y == pytest.approx(-(x - 5.5))
    write(tmp_path / "metrics.jsonl", lines[:4])  # of a run of fewer steps, one mean
    assert pictures.margin_panel(tmp_path)[1][0][1:3] == ([4], [pytest.approx((0 + 1 + 4 + 9) / 4)])


def test_mistakes_in_runs(tmp_path, monkeypatch, capsys):
    out = "--out", tmp_path / "x.png"
    monkeypatch.setattr(pictures, "plot", lambda panels, **options: pytest.fail("drawn"))
    run, metrics = tmp_path / "runs" / "mfpo-0", tmp_path / "runs" / "mfpo-0" / "metrics.jsonl"
    runs_in(tmp_path / "runs")
    for path in (tmp_path / "runs").glob("[01]*"):
        path.rename(tmp_path / path.name)
    assert "begins with a number" in refused(monkeypatch, capsys, pictures, "curves", "--runs", run.parent, *out)
    assert "no such file" in refused(monkeypatch, capsys, pictures, "margins", "--runs", run, *out)
    for text, message in (
        ('{"step": 1, "text_margin": 0.0}', "no 'image_margin'"),  # text alone was trained
        ('{"step": 1, "text_margin": 0.0, "image_margin": 0.0}\n{"step": 2, "text_', "cut off"),
        ('{"step": 1, "reward": 0.0}', "no 'text_margin'"),  # an MBPO run
        ("", "no 'text_margin'"),
    ):
        metrics.write_text(text)
        refusal = refused(monkeypatch, capsys, pictures, "margins", "--runs", run, *out)
        assert message in refusal and str(run) in refusal


def test_matplotlib_is_asked_for_where_it_is_missing(tmp_path, monkeypatch, capsys):
    runs, out = runs_in(tmp_path / "runs"), tmp_path / "x.png"
    write(runs / "mfpo-0" / "metrics.jsonl", steps(float, float))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for args in (("curves", "--runs", runs), ("margins", "--runs", runs / "mfpo-0")):
        assert "pip install matplotlib" in refused(monkeypatch, capsys, pictures, *args, "--out", out)
    assert not out.exists()


def test_each_panel_gets_its_lines(tmp_path, monkeypatch):
    """With a stand-in for matplotlib, so also where it is not installed."""
    runs, out = runs_in(tmp_path / "runs"), str(tmp_path / "x.png")
    figure, axes = MagicMock(), [MagicMock() for _ in pictures.CURVES]
    figure.subplots.return_value = [axes]
    monkeypatch.setitem(sys.modules, "matplotlib", MagicMock())
    monkeypatch.setitem(sys.modules, "matplotlib.figure", SimpleNamespace(Figure=lambda **options: figure))
    assert run_here(monkeypatch, pictures, "curves", "--runs", runs, "--out", out) == 0
    for axis, metric in zip(axes, pictures.CURVES, strict=True):
        assert axis.set_title.call_args.args == (pictures.eval.METRICS[metric][0],)
        assert [call.args[2] for call in axis.plot.call_args_list] == ["k--", "C0.", "C0-", "C1.", "C1-"]
        labels = [call.kwargs["label"] for call in axis.plot.call_args_list]
        assert labels == ["base", None, "ddpm", None, "vcd"]
    figure.savefig.assert_called_once_with(out)


def test_curves_and_margins_are_drawn(tmp_path, monkeypatch, capsys):
    """By matplotlib itself where it is installed; else it is asked for."""
    runs, out = runs_in(tmp_path / "runs"), tmp_path / "x.png"
    write(runs / "mfpo-0" / "metrics.jsonl", steps(float, float))
    margins = "margins", "--runs", *[runs / "mfpo-0"] * 3
    for panels, command in ((4, ("curves", "--runs", runs)), (3, margins)):
        if importlib.util.find_spec("matplotlib"):
            assert run_here(monkeypatch, pictures, *command, "--out", out) == 0
            drawn = Image.open(out)
            assert drawn.format == "PNG" and drawn.size == (480 * panels, 360)
            assert (np.asarray(drawn.convert("RGB")) == (31, 119, 180)).all(-1).any()  # matplotlib's C0
        else:
            refusal = refused(monkeypatch, capsys, pictures, *command, "--out", out)
            assert "pip install matplotlib" in refusal
