"""What the table counts, by hand-made cases; comparisons, runs, mined answers; pairs without scenes."""

import json
import math
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refused, run_here

import build_data
import data
import eval
import hub
import model
import tables
import toy

OBJECTS = [("red", "cup"), ("blue", "book")]
QUESTION = "Describe the picture."


def cells(line):
    """The cells of a row of a Markdown table."""
    return [cell.strip() for cell in line.strip("|").split("|")]


def captions_of(policy, records, folder):
    """[(kinds that the model names of a record, kinds that its true caption names)], asked a few at a time."""
    named = []
    for i in range(0, len(records), 5):
        some = records[i : i + 5]
        pixels = model.load_pixels(policy, folder, [record["image"] for record in some])
        texts, _ = policy.generate(pixels, [policy.encoding.prompt(record["question"]) for record in some], 60)
        named += [[{kind for _, kind in toy.mentions(text)} for text in (said, record["chosen"])]
                  for said, record in zip(texts, some, strict=True)]  # fmt: skip
    return named


def value(name, sums):
    return tables.value_of(eval.METRICS[name][2], sums)


def summed(*captions):
    rows = [eval.caption_counts(c, OBJECTS) for c in captions]
    return {name: sum(row[name] for row in rows) for name in rows[0]}


def test_chair_by_hand():
    sums = summed(
        "The picture shows a red cup and a blue book.",  # exact
        "I can see a red cup, a green spoon and a black spoon.",  # one invented kind, named twice; book missed
        "",  # no object at all: stays in the denominator of CHAIR_s
    )
    values = {name: value(name, sums) for name in ("chair_s", "chair_i", "recall", "exact", "words")}
    by_hand = {"chair_s": 1 / 3, "chair_i": 2 / 5, "recall": 3 / 6, "exact": 1 / 3, "words": 23 / 3}
    assert values == pytest.approx(by_hand)
    assert value("object_f1", sums) == pytest.approx(2 * 0.6 * 0.5 / 1.1)


def test_no_mention_at_all_is_undefined_not_an_error():
    sums = summed("", "nothing here")
    assert math.isnan(value("chair_i", sums)) and math.isnan(value("object_f1", sums))
    assert value("chair_s", sums) == 0 and value("recall", sums) == 0


def test_a_wrong_colour_is_not_exact_but_no_hallucination():
    sums = summed("The picture shows a blue cup and a blue book.")
    assert sums["exact"] == 0 and sums["hallucinated"] == 0 and sums["hits"] == 2
    twice = summed("a red cup, a red cup and a blue book")  # nor is a caption that repeats itself
    assert twice["exact"] == 0 and twice["hits"] == 2 and twice["mentions"] == 3


def test_yes_no_questions_by_hand():
    truths, answers = ["Yes", "Yes", "No", "No", "Yes"], ["Yes", "No", "No", "Yes", "Yes"]
    for split in ("random", "adversarial"):
        rows = [tables.yes_no(truth, said, f"{split}_") for truth, said in zip(truths, answers, strict=True)]
        sums = {name: sum(row[name] for row in rows) for name in rows[0]}
        assert value(f"pope_{split}", sums) == pytest.approx(3 / 5)
        assert value(f"pope_{split}_f1", sums) == pytest.approx(4 / 6)
        assert value(f"pope_{split}_yes", sums) == pytest.approx(3 / 5)


# ------------------------------------------------------------------------------------------ a measured model


def measured(captions, scores, answers=("Yes", "Yes")):
    """What a model has said of scenes that all look alike, as eval.measure gives it."""
    scenes = []
    for i in range(len(captions)):
        asked = [{"split": "random", "answer": "Yes"}, {"split": "adversarial", "answer": "No"}]
        objects = [{"colour": c, "word": w} for c, w in OBJECTS]
        scene = {"id": str(i), "image": f"{i}.png", "question": "?", "chosen": "A red cup and a blue book."}
        scenes.append(scene | {"objects": objects, "asked": asked})
    return {
        "stick": eval.Yardstick(Path("x"), Path("x/mfpo_val.jsonl"), "val"),
        "pairs": [{"negative": "noise ddpm t=400", "region_kind": "key"}] * len(captions),
        "scenes": scenes,
        "captions": captions,
        "answers": [*answers] * len(captions),
        "closed": [{"kind": "number", "answer": "2", "image": "0.png"},
                   {"kind": "yesno", "answer": "No", "image": "1.png"}],
        "closed_answers": ["2", "I think not."],
        "scores": np.array(scores, float),
    }  # fmt: skip


def two_models():
    """A base model that invents a pen, and one that does not. Scores: y_w | m, y_l | m, y_w | m', information gain."""
    base = measured(["a red cup and a blue pen"] * 2, [[-5, -5, -6, 1.0], [-5, -4, -6, 2.0]])
    final = measured(["a red cup and a blue book"] * 2, [[-4, -7, -6, 2.0], [-5, -6, -7, 4.0]])
    return base, final


def test_summary_of_two_models():
    base, final = two_models()
    text, numbers = eval.report({"base": base, "final": final})
    summary = numbers["final"]
    assert summary["chair_s"] == 0 and summary["recall"] == 1 and summary["exact"] == 1
    assert summary["pope_random"] == 1 and summary["pope_adversarial"] == 0
    assert summary["closed"] == summary["closed_yesno"] == 1 and summary["closed_in_form"] == 0.5
    assert summary["closed_choice"] is None
    # log-ratios: chosen +1, 0; rejected -2, -2; distorted 0, -1
    assert summary["text_margin"] == pytest.approx((3 + 2) / 2)
    assert summary["image_margin"] == pytest.approx((1 + 1) / 2)
    assert summary["text_margin_positive"] == summary["image_margin_positive"] == 1
    assert summary["fairness"] == pytest.approx(1 / 2.5)
    assert summary["chosen_shift"] == pytest.approx(0.5) and summary["information_gain"] == 3
    low, high = summary["interval"]["text_margin"]
    assert low == 2 and high == 3  # with two scenes, resampling ends in either of them
    assert summary["split"] == "val" and summary["scenes"] == 2
    assert numbers["base"]["fairness"] is None and numbers["base"]["text_margin"] == 0
    assert numbers["base"]["chair_s"] == 1 and numbers["base"]["text_margin_positive"] == 0
    line = next(line for line in text.splitlines() if line.startswith("fairness"))
    assert "undefined" in line and "0.400 [" in line and line.index("undefined") < line.index("0.400")
    assert "[pen]" in text and "bootstrap over 2 scenes" in text


def test_closed_ended_accuracy_is_pooled_over_kinds():
    base, _ = two_models()
    yes, no = ({"kind": "yesno", "answer": truth, "image": "0.png"} for truth in ("Yes", "No"))
    word = {"kind": "word", "answer": "red", "image": "1.png", "choices": ["red", "blue"]}
    # Yes/no: three of six right, all but one in form; words: both right, one in form.
    said = ["Yes", "No", "yes.", "Yes", "No", "Yes, there is.", "red", "It is red."]
    base |= {"closed": [yes, yes, yes, no, yes, no] + [word] * 2, "closed_answers": said}
    base["closed"][5] = yes | {"answer": "No"}
    summary = tables.summary(eval.counts_of(base, base))
    assert summary["closed_yesno"] == 2 / 6 and summary["closed_word"] == 1 and summary["closed"] == 4 / 8
    assert summary["closed_choice"] is None and summary["closed_in_form"] == 6 / 8


def test_the_note_says_which_negatives_the_pairs_have():
    base, _ = two_models()
    cases = [
        ({"negative": "noise vcd t=500", "region_kind": "key"}, "noise vcd t=500 (key) 2"),
        ({"negative": "erased", "region_kind": "global"}, "erased (global) 2"),
        ({}, "image_rejected (region not told) 2"),  # a pair that was written by hand
    ]
    for pair, note in cases:
        (said,) = eval.counts_of(base | {"pairs": [pair] * 2}, base).notes
        assert re.search(note.replace("(", r"\(").replace(")", r"\)") + "$", said) and "mfpo_val.jsonl" in said
    mixed = [{"negative": name, "region_kind": "key"} for name in "aabbbcd"]
    long = measured(["a cup"] * 7, np.zeros((7, 4))) | {"pairs": mixed}
    assert eval.counts_of(long, long).notes[0].endswith("b (key) 3, a (key) 2, c (key) 1")


def test_a_new_row_of_the_table_is_one_entry(monkeypatch, tmp_path, capsys):
    """What caption_counts counts more, and an entry that names it: table, numbers, difference and runs have the row."""
    honest = eval.caption_counts

    def with_letters(caption, objects):
        return honest(caption, objects) | {"letters": float(sum(c.isalpha() for c in caption))}

    monkeypatch.setattr(eval, "caption_counts", with_letters)
    monkeypatch.setitem(eval.METRICS, "letters", ("letters a word", "letters", ("letters", "words")))
    base, final = two_models()
    text, numbers = eval.report({"base": base, "final": final})
    row = next(line for line in text.splitlines() if line.startswith("letters a word"))
    assert numbers["base"]["letters"] == 18 / 7 and numbers["final"]["letters"] == 19 / 7
    assert "2.571 [2.571, 2.571]" in row and "2.714 [2.714, 2.714]" in row
    counts = [eval.counts_of(one, base) for one in (base, final)]
    assert tables.compare(*counts)["letters"][2][0] == pytest.approx(1 / 7)
    (tmp_path / "mfpo-0").mkdir()
    (tmp_path / "mfpo-0" / "eval.json").write_text(json.dumps(numbers))
    header, _, *rows = map(cells, eval.runs_text(tmp_path).splitlines())
    assert [row[header.index("letters")] for row in rows] == ["2.571", "2.714"]


def test_invented_words_are_marked():
    assert eval.marked("a red cup, a black spoon.", {"cup"}) == "a red cup, a black [spoon]."


def test_samples_begin_with_what_the_first_model_invents():
    base, final = two_models()
    base["captions"] = ["a red cup", "a red key"]
    lines = eval.samples_text({"base": base, "final": final}, count=1).splitlines()
    assert lines[0] == "1.png" and "truth" in lines[1] and "a red [key]" in lines[2] and "final" in lines[3]


# ---------------------------------------------------------------------------------------------- two checkpoints


def test_the_difference_is_b_less_a(monkeypatch, tmp_path, capsys):
    base, final = two_models()
    said = {"base": base, "final": final}
    monkeypatch.setattr(hub, "load", lambda path, **more: path)
    monkeypatch.setattr(eval, "measure", lambda path, stick: said[path])
    args = ["compare", "base", "final", "--base", "base", "--json", tmp_path / "both.json"]
    assert run_here(monkeypatch, eval, *args) == 0
    text = capsys.readouterr().out
    assert "-1.000 [-1.000, -1.000]" in next(line for line in text.splitlines() if line.startswith("CHAIR_s"))
    numbers = json.loads((tmp_path / "both.json").read_text())["a_b_difference"]
    assert numbers["chair_s"] == [[1.0, [1.0, 1.0]], [0.0, [0.0, 0.0]], [-1.0, [-1.0, -1.0]]]
    assert numbers["information_gain"][2][0] == 1.5 and numbers["text_margin"][2][0] == 2.5


@pytest.fixture(scope="module")
def other(policy, tmp_path_factory):
    """A checkpoint that answers otherwise than the world's base: random weights."""
    folder = tmp_path_factory.mktemp("model") / "other"
    hub.save_new(policy, folder)
    return folder


def test_a_table_of_the_built_in_world(world, other, monkeypatch, tmp_path, capsys):
    args = ["--base", world / "base", "--data", world, "--split", "val", "--json", tmp_path / "x.json"]
    assert run_here(monkeypatch, eval, "table", "--model", other, *args) == 0
    text, numbers = capsys.readouterr().out, json.loads((tmp_path / "x.json").read_text())
    for title, _, _ in eval.METRICS.values():
        assert any(line.startswith(title) for line in text.splitlines()), title
    assert set(numbers["final"]) == {*eval.METRICS, "interval", "split", "scenes"}
    assert "noise ddpm t=400 (key) 13" in text and "bootstrap over 13 scenes" in text and "truth" in text
    # The captions are greedy answers, and what they name is counted by sets.
    named = captions_of(hub.load(world / "base", trained=False), data.read_lines(world / "val.jsonl"), world)
    assert numbers["base"]["chair_s"] == pytest.approx(np.mean([bool(said - there) for said, there in named]))
    hits, kinds = (sum(len(some) for some in sets) for sets in zip(*((a & b, b) for a, b in named), strict=True))
    assert numbers["base"]["recall"] == pytest.approx(hits / kinds)


def logp(policy, record, image, answer, folder):
    """Nats of one answer to one image, by a forward of its own."""
    row = policy.encoding.row(record, answer)
    pixels = policy.mean.expand(1, 3, 64, 64) if image is None else model.load_pixels(policy, folder, [record[image]])
    with torch.no_grad():
        return policy.logps(data.pack([row], pixels)).sum().item(), len(row.answers[0])


def test_a_table_of_pairs_that_were_held_out(world, other, monkeypatch, tmp_path, capsys):
    """No scenes: margins, fairness and information gain of any MFPO records, each as separate forwards say."""
    out, more = tmp_path / "own.jsonl", {"heldout": 6, "schedule": "vcd", "t": 500, "region": "random"}
    source, base = str(world / "val.jsonl"), str(world / "base")
    build_data.build_mfpo(build_data.MfpoConfig(source=source, model=base, out=str(out), **more))
    pairs = tmp_path / "own_heldout.jsonl"
    args = ["--model", other, "--base", base, "--pairs", pairs, "--json", tmp_path / "x.json"]
    capsys.readouterr()
    assert run_here(monkeypatch, eval, "table", *args) == 0
    text, numbers = capsys.readouterr().out, json.loads((tmp_path / "x.json").read_text())
    assert set(numbers["final"]) == {*eval.PAIR_METRICS, "interval", "split", "scenes"}
    assert numbers["final"]["split"] == "heldout" and numbers["final"]["scenes"] == 6
    assert "CHAIR" not in text and "own_heldout.jsonl: noise vcd t=500 (random) 6" in text
    assert "bootstrap over 6 pairs" in text
    ratios, gains, records = [], [], data.read_lines(pairs)
    policies = [hub.load(path, trained=False) for path in (other, base)]
    sides = (("image", "chosen"), ("image", "rejected"), ("image_rejected", "chosen"))
    for record in records:
        nats = [[logp(policy, record, *side, tmp_path)[0] for side in sides] for policy in policies]
        ratios.append(np.subtract(*nats))
        grey, length = logp(policies[0], record, None, "chosen", tmp_path)
        gains.append((nats[0][0] - grey) / length)
    text_margin, image_margin = ([h[0] - h[n] for h in ratios] for n in (1, 2))
    final = numbers["final"]
    assert final["text_margin"] == pytest.approx(np.mean(text_margin), abs=1e-3)
    assert final["image_margin"] == pytest.approx(np.mean(image_margin), abs=1e-3)
    assert final["text_margin_positive"] == np.mean([margin > 0 for margin in text_margin])
    assert final["chosen_shift"] == pytest.approx(np.mean([h[0] for h in ratios]), abs=1e-3)
    assert final["information_gain"] == pytest.approx(np.mean(gains), abs=1e-4)
    assert numbers["base"]["text_margin"] == 0 and numbers["base"]["fairness"] is None
    # The same pairs compared: B against itself differs in nothing.
    args = ["compare", base, base, "--base", base, "--pairs", pairs, "--json", tmp_path / "y.json"]
    assert run_here(monkeypatch, eval, *args) == 0
    cells = json.loads((tmp_path / "y.json").read_text())["a_b_difference"]
    assert set(cells) == set(eval.PAIR_METRICS) and cells["information_gain"][2] == [0.0, [0.0, 0.0]]


def test_pairs_of_other_scenes_are_refused(world, monkeypatch, tmp_path, capsys):
    for name in ("val.jsonl", "closed_val.jsonl", "mfpo_val.jsonl"):
        shutil.copy(world / name, tmp_path / name)
    for name in ("images", "mfpo_val_distorted"):
        shutil.copytree(world / name, tmp_path / name)
    lines = (tmp_path / "mfpo_val.jsonl").read_text().splitlines()
    (tmp_path / "mfpo_val.jsonl").write_text("\n".join(lines[1:]))
    args = ["table", "--model", world / "base", "--base", world / "base", "--data", tmp_path, "--split", "val"]
    assert "was not built from val.jsonl" in refused(monkeypatch, capsys, eval, *args)


def test_what_a_run_is_measured_on(world, tmp_path, capsys):
    stick = eval.yardstick(world / "mfpo.jsonl", "val")
    assert (stick.split, stick.pairs) == ("val", world / "mfpo_val.jsonl")
    assert eval.yardstick(world / "mfpo.jsonl", "none") is None
    records = tmp_path / "own.jsonl"
    assert eval.yardstick(records, "val") is None and "own_heldout.jsonl" in capsys.readouterr().out
    assert eval.measure(None, None) is None
    (tmp_path / "own_heldout.jsonl").write_text("")
    stick = eval.yardstick(records, "val")
    assert (stick.split, stick.pairs) == ("", tmp_path / "own_heldout.jsonl")
    assert eval.yardstick(records, "none") is None


# ------------------------------------------------------------------------------------------------- over seeds


def student(freedom):
    """The 97.5 % point of Student's t: its density summed up until 0.475 lies between 0 and there."""
    scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)
    middle = (np.arange(200_000) + 0.5) * 1e-4  # midpoints of steps up to 20
    mass = np.cumsum(scale * (1 + middle**2 / freedom) ** (-(freedom + 1) / 2) * 1e-4)
    return float(middle[np.searchsorted(mass, 0.475)])


def test_students_t_is_that_of_its_density():
    for seeds, point in eval.STUDENT.items():
        assert point == pytest.approx(student(seeds - 1), abs=1e-3)


def test_mean_and_interval_by_hand():
    # Mean 0.3, deviations -0.1, 0, 0.1: a variance of 0.01 over n - 1, so a half width of 4.303 * 0.1 / sqrt(3).
    assert eval.mean_text([0.2, 0.3, 0.4], 3) == f"0.300 ± {4.303 * 0.1 / math.sqrt(3):.3f}"
    assert eval.mean_text([0.25], 2) == "0.25" and eval.mean_text([0.2, None], 3) == "undefined"
    # More seeds than are in the table: the last one's, which is a little too wide.
    many = [0.1, 0.2] * 8
    assert eval.mean_text(many, 3) == f"0.150 ± {2.262 * 0.05 * math.sqrt(16 / 15) / 4:.3f}"


def run_of(folder, name, base, final, when):
    """The eval.json of a run as a trainer writes it, with few of its numbers."""
    path = folder / name / "eval.json"
    path.parent.mkdir(parents=True)
    names = dict.fromkeys(eval.METRICS, 0.5) | {"split": "val"}
    path.write_text(json.dumps({"base": names | base, "final": names | final}))
    os.utime(path, (when, when))


def test_runs_are_rows_with_their_spread_over_seeds(tmp_path, monkeypatch, capsys):
    for seed, chair in enumerate((0.2, 0.3, 0.4)):
        base = {"chair_s": 0.6 + seed / 10, "fairness": None}
        run_of(tmp_path, f"b_arm-{seed}", base, {"chair_s": chair, "text_margin": 2.0 + seed}, 100 + seed)
        run_of(tmp_path, f"a-arm-{seed}", base, {"chair_s": 0.1}, 200 + seed)  # a dash of its own, and later
    assert run_here(monkeypatch, eval, "runs", tmp_path) == 0
    header, _, *rows = capsys.readouterr().out.strip().splitlines()
    header, rows = cells(header), [cells(row) for row in rows]
    assert [row[:2] for row in rows] == [["base", "3"], ["b_arm", "3"], ["a-arm", "3"]]
    half = 4.303 * 0.1 / math.sqrt(3)
    at = header.index("CHAIR_s")
    assert [row[at] for row in rows] == [f"0.700 ± {half:.3f}", f"0.300 ± {half:.3f}", "0.100 ± 0.000"]
    assert rows[1][header.index("text margin")] == f"3.00 ± {10 * half:.2f}"  # nats to two digits
    assert rows[0][header.index("fairness")] == "undefined" and "words per caption" not in header
    assert all(len(row) == len(header) for row in rows)


def test_runs_that_cannot_be_one_table(tmp_path, monkeypatch, capsys):
    assert "no <name>-<seed>/eval.json" in refused(monkeypatch, capsys, eval, "runs", tmp_path)
    run_of(tmp_path / "a", "mfpo-0", {}, {}, 1)
    run_of(tmp_path / "b", "mfpo-1", {"split": "test"}, {"split": "test"}, 2)
    text = refused(monkeypatch, capsys, eval, "runs", tmp_path / "a", tmp_path / "b")
    assert "mix the splits test, val" in text


# ------------------------------------------------------------------------------------------ what was mined


def test_what_an_attack_adds_by_hand():
    truths = ["I can see a red cup and a blue book."] * 2
    clean = ["I can see a red cup and a red spoon.", "I can see a red cup and a blue book."]
    mined = ["I can see a red cup, a red spoon and a red spoon.", "I can see a red pen, a red key and a blue book."]
    values = eval.mined_values(truths, mined, clean)
    # First: the spoon is wrong but was named before. Second: pen and key are wrong and new.
    assert values["chair_s"] == 1.0 and values["adds"] == 0.5 and values["absent"] == 1.5
    assert values["recall"] == 2 / 4
    # Of six mentions four are wrong: 1 - CHAIR_i is 1/3, recall 1/2.
    assert values["object_f1"] == pytest.approx(2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2))
    assert eval.mined_values(truths, clean, clean)["adds"] == 0


def test_attacks_side_by_side(mined, monkeypatch, tmp_path, capsys):
    """One row an attack, the same models' answers to clean images first; what was dropped counts too."""
    shutil.copytree(mined / "images", tmp_path / "images")
    shutil.copytree(mined / "base", tmp_path / "base")
    files = {end: data.read_lines(mined / f"mbpo{end}.jsonl") for end in ("", "_dropped")}

    def write(stem, change=lambda line: line):
        for end, lines in files.items():
            text = "".join(json.dumps(change(line)) + "\n" for line in lines)
            (tmp_path / f"attack_{stem}{end}.jsonl").write_text(text)

    write("pgd")
    noise = {"rejected": "I can see a red whale.", "fall": 0.25, "attack": {"kind": "random", "eps": 8 / 255}}
    write("noise", lambda line: line | noise)
    (tmp_path / "attack_pgd_closed.jsonl").write_text("no attack's answers")
    assert run_here(monkeypatch, eval, "mined", tmp_path) == 0
    header, _, *rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    header, rows = cells(header), [cells(row) for row in rows]
    assert [row[:2] for row in rows] == [["none", "0"], ["pgd", "4"], ["random", "8"]]
    lines = files[""] + files["_dropped"]
    kinds = [[{kind for _, kind in toy.mentions(line[side])} for line in lines] for side in ("chosen", "rejected")]
    absent = [said - there for there, said in zip(*kinds, strict=True)]
    row = dict(zip(header, rows[1], strict=True))
    assert row["names an absent object"] == f"{np.mean([bool(some) for some in absent]):.3f}"
    assert row["absent objects an answer"] == f"{np.mean([len(some) for some in absent]):.3f}"
    assert row["kept"] == f"{len(files['']) / len(lines):.3f}"
    assert row["fall of the true answer"] == f"{np.mean([line['fall'] for line in lines]):.3f}"
    row = dict(zip(header, rows[2], strict=True))
    assert row["fall of the true answer"] == "0.250" and row["recall"] == row["adds one"] == "0.000"
    assert rows[0][-2:] == ["", ""]  # nothing was attacked, nothing was dropped
    # The clean answers are the model's own.
    named = captions_of(hub.load(mined / "base", trained=False), lines, mined)
    row = dict(zip(header, rows[0], strict=True))
    assert row["names an absent object"] == f"{np.mean([bool(said - there) for said, there in named]):.3f}"
    assert row["adds one"] == "0.000"
    files[""].pop()
    write("fewer")
    text = refused(monkeypatch, capsys, eval, "mined", tmp_path)
    assert "attack_fewer.jsonl: other records than" in text or "attack_noise.jsonl: other records than" in text


# ------------------------------------------------------------------------------------------------ command lines


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "table | compare | runs | mined"),
        (["margins"], "got 'margins'"),
        (["table", "--split", "train"], "invalid choice: 'train'"),
        (["table", "--convention", "mine"], "invalid choice: 'mine'"),
        (["table", "--modle", "x"], "Did you mean --model?"),
        (["table", "--json", "nowhere/x.json"], "--json nowhere/x.json: is a folder, or lies in none"),
        (["table", "--base", "{base}", "--pairs", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["table", "--base", "nowhere"], "--model nowhere"),
        (["table", "--base", "{base}", "--data", "nowhere"], "no such file"),
        (["compare", "a"], "compare takes two checkpoints"),
        (["compare", "a", "b", "c"], "compare takes two checkpoints"),
        (["runs"], "eval.py runs out/mfpo_ablation"),
        (["mined"], "mined data/toy-0"),
        (["mined", "."], "no attack_*.jsonl in it"),
        (["--bench", "pope"], "is now python -m extras.benchmarks"),
        (["--bench=pope"], "is now python -m extras.benchmarks"),
        (["--runs", "out"], "is now python eval.py runs"),
        (["--mined", "data"], "is now python eval.py mined"),
        (["--compare", "a", "b"], "is now python eval.py compare"),
        (["--margins", "x.png"], "is now python -m extras.pictures margins"),
        (["--story", "x.png"], "is now python -m extras.pictures story"),
        (["--plot", "x.png"], "is now python -m extras.pictures curves"),
        (["--attention", "x.png"], "is gone"),
        (["table", "--model", "a", "--margins", "x.png"], "is now python -m extras.pictures margins"),
    ],
)
def test_mistakes_on_the_command_line(world, tmp_path, monkeypatch, capsys, args, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    args = [arg.replace("{base}", str(world / "base")) for arg in args]
    assert message in refused(monkeypatch, capsys, eval, *args)
    assert not list(tmp_path.iterdir())


def test_runs_are_compared_seed_by_seed(tmp_path, capsys):
    for name, value in (("a-1", 0.5), ("a-2", 0.7), ("b-1", 0.4), ("b-2", 0.5)):
        (tmp_path / name).mkdir()
        summary = {"split": "test", "chair_s": value, "fairness": None}
        (tmp_path / name / "eval.json").write_text(json.dumps({"base": summary | {"chair_s": 0.9}, "final": summary}))
    text = eval.runs_text(tmp_path, less="a")
    row = next(line for line in text.splitlines() if line.startswith("| b less a"))
    # -0.1 and -0.2: mean -0.15, half of the interval 12.706 * 0.0707 / sqrt(2) = 0.635; undefined stays out.
    assert "| 2 | -0.150 ± 0.635 |" in row and "base less" not in text and "a less a" not in text
    with pytest.raises(eval.Mistake, match="no such run. There are base, a, b"):
        eval.runs_text(tmp_path, less="c")
