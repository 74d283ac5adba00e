"""Noise, regions, keywords and the records of MFPO; attacks, mining and the questions of MBPO; builds that stop."""

import dataclasses
import functools
import json
import math
import os
import re
import shutil
import signal
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import finished, forked, refused, run_here, wait_for
from PIL import Image
from tqdm import tqdm

import build_data
import data
import eval
import grounding
import hub
import model
import parts
import runtime
import toy
import warmup

MEAN, STD = np.array([0.48, 0.46, 0.41]), np.array([0.27, 0.26, 0.28])
QUESTION = "Describe the picture."
GOOD = {"id": "a", "image": "0.png", "question": QUESTION, "chosen": "The picture shows a red cup.",
        "rejected": "The picture shows a red cup and a blue spoon."}  # fmt: skip


def picture(n):
    """A photograph of its own for each n, landscape, portrait or square."""
    rng = np.random.default_rng(n)
    return Image.fromarray(rng.integers(0, 255, [(40, 70, 3), (90, 50, 3), (64, 64, 3)][n % 3], dtype=np.uint8))


def write(path, records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


@pytest.fixture
def folder(tmp_path):
    """A folder of three photographs, and a source of one record about the first."""
    for n in range(3):
        picture(n).save(tmp_path / f"{n}.png")
    write(tmp_path / "x.jsonl", [GOOD])
    return tmp_path


def test_erased_regions_look_like_their_surroundings(world):
    """A red square on grey with a grain of its own: erased, its colours and grain are the grey's."""
    rng = np.random.default_rng(0)
    image = (120 + 6 * rng.standard_normal((40, 50, 3))).round().clip(0, 255).astype(np.uint8)
    mask = np.zeros((40, 50), bool)
    mask[10:25, 20:40] = True
    image[mask] = (255, 0, 0)
    config = build_data.MfpoConfig(source=str(world / "val.jsonl"), negative="erase")
    out, text = build_data.negative(image, mask, config, MEAN, STD, np.random.default_rng(1))
    assert text == "erased" and np.array_equal(out[~mask], image[~mask])
    assert np.abs(out[mask].mean(0) - 120).max() < 3 and np.all((out[mask].std(0) > 3) & (out[mask].std(0) < 9))
    corner = np.zeros((40, 50), bool)  # colours come from the border, not from the complete image
    corner[:, 25:] = True
    halves = np.where(corner[..., None], 200, 20).astype(np.uint8) * np.ones((1, 1, 3), np.uint8)
    hole = np.zeros((40, 50), bool)
    hole[15:25, 40:50] = True
    assert np.all(build_data.erase(halves, hole, rng)[hole] == 200)


@pytest.mark.parametrize(
    ("kind", "text"), [("erase", "all erased: the mean colour"), ("crop", "crop"), ("noise", "noise")]
)
@pytest.mark.parametrize("size", [(1, 1), (9, 6)])
def test_every_negative_of_a_region_that_is_all(world, kind, text, size):
    image = np.arange(size[0] * size[1] * 3, dtype=np.uint8).reshape(*size, 3)
    config = build_data.MfpoConfig(source=str(world / "val.jsonl"), negative=kind)
    out, said = build_data.negative(image, np.ones(size, bool), config, MEAN, STD, np.random.default_rng(0))
    assert out.shape == image.shape and out.dtype == np.uint8 and said.startswith(text)
    if kind == "erase":
        assert np.abs(out - image.mean((0, 1))).max() <= 0.5


def test_a_crop_is_a_part_of_the_image_of_the_size_that_mdpo_takes():
    """Each pixel of the picture says where it is: the crop's corners tell what was cut."""
    y, x = np.mgrid[0:200, 0:240]
    image = np.stack([x, y, x * 0], -1).astype(np.uint8)
    shares = []
    for seed in range(60):
        out = build_data.crop(image, np.random.default_rng(seed))
        (x0, y0), (x1, y1) = out[0, 0, :2].astype(int), out[-1, -1, :2].astype(int)
        assert out.shape == image.shape
        shares.append((x1 - x0 + 1) * (y1 - y0 + 1) / (200 * 240))
        assert 0.6 < (x1 - x0 + 1) / (y1 - y0 + 1) < 1.7
    assert 0.005 < min(shares) < 0.04 and 0.16 < max(shares) < 0.21


def test_prior_is_the_word_that_gains_least_from_the_image(world, base):
    """Against the log-probabilities of single forward passes, a word's tokens picked by hand."""
    records = data.read_lines(world / "val.jsonl")[:3]
    images = [data.load_image(world / record["image"]) for record in records]
    pixels = build_data.pixels_of(base, images)
    gains = build_data.word_gains(base, records, pixels)
    for record, image, gain in zip(records, pixels, gains, strict=True):
        row, sides = base.encoding.row(record, "chosen"), []
        for side in (image[None], base.mean.expand(1, 3, *image.shape[1:])):
            with torch.no_grad():
                sides.append(base.logps(data.pack([row], side))[0])
        tokens = [base.tokenizer.decode([t]) for t in row.answers[0]]
        for word, value in gain.items():
            at = [t for t, token in enumerate(tokens) if token.strip().lower() == word]
            assert value == pytest.approx(float((sides[0] - sides[1])[at].mean()), abs=1e-4)
        assert {o["word"] for o in record["objects"]} <= gain.keys()
    regions = [{"word": o["word"], "box": o["box"]} for o in records[0]["objects"]]
    masks = np.eye(len(regions), dtype=bool)[:, None]
    words = [region["word"] for region in regions]
    (least,), mask = build_data.prior_regions(regions, masks, [*words, "unknown"], gains[0])
    assert gains[0][least["word"]] == min(gains[0][word] for word in words)
    assert np.array_equal(mask[0, 0], masks[words.index(least["word"]), 0])
    assert build_data.prior_regions(regions, None, ["sky"], gains[0]) == ([], None)


@pytest.mark.parametrize(
    ("flags", "kind", "text"),
    [
        (["--negative", "crop"], "global", "crop"),
        (["--negative", "other"], "global", "another record's image"),
        (["--negative", "erase"], "key", "erased"),
        (["--region", "prior", "--negative", "erase", "--top", 8], "prior", "erased"),
    ],
)
def test_where_and_what_are_two_knobs(world, base, tmp_path, monkeypatch, flags, kind, text):
    source = data.read_lines(world / "preference.jsonl")[:6]
    shutil.copytree(world / "images", tmp_path / "images")
    runtime.write_jsonl(tmp_path / "source.jsonl", source)
    assert build(monkeypatch, world, "mfpo", tmp_path / "source.jsonl", tmp_path / "out.jsonl", *flags) == 0
    records = data.read_records(tmp_path / "out.jsonl", data.MFPO_FIELDS)
    assert {r["negative"] for r in records} == {text} and {r["region_kind"] for r in records} == {kind}
    by_id = {r["id"]: r for r in source}
    for record in records:
        clean, changed = (np.asarray(Image.open(tmp_path / record[f])) for f in ("image", "image_rejected"))
        assert not np.array_equal(clean, changed)
        if kind == "prior":
            (region,) = record["regions"]
            others = [o["box"] for o in by_id[record["id"]]["objects"] if o["word"] != region["word"]]
            assert all(np.array_equal(clean[b:d, a:c], changed[b:d, a:c]) for a, b, c, d in others)
        if text.startswith("another"):
            same = [r["id"] for r in source if np.array_equal(np.asarray(Image.open(tmp_path / r["image"])), changed)]
            assert same and record["id"] not in same


def test_another_records_image_needs_two_images(world, tmp_path, monkeypatch, capsys):
    (record,) = data.read_lines(world / "preference.jsonl")[:1]
    shutil.copytree(world / "images", tmp_path / "images")
    runtime.write_jsonl(tmp_path / "source.jsonl", [record, record | {"id": "again"}])
    assert (
        build(monkeypatch, world, "mfpo", tmp_path / "source.jsonl", tmp_path / "o.jsonl", "--negative", "other") == 2
    )
    assert "has one image only" in capsys.readouterr().err


@pytest.fixture(scope="module")
def base(world):
    return hub.load(world / "base", trained=False)


def flags(world, what, source, out, *more):
    return [what, "--source", source, "--model", world / "base", "--out", out, "--batch", 2, *more]


def build(monkeypatch, world, what, source, out, *more):
    return run_here(monkeypatch, build_data, *flags(world, what, source, out, *more))


def everything(path):
    """{name: bytes} of all files below a folder."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


# ----------------------------------------------------------------------------------------------- noise, regions


def test_schedules_at_known_points():
    vcd, ddpm = build_data.sqrt_alpha_bar("vcd"), build_data.sqrt_alpha_bar("ddpm")
    assert [round(float(vcd[t]), 4) for t in (100, 500, 999)] == [0.9983, 0.8630, 0.2850]
    assert [round(float(ddpm[t]), 2) for t in (150, 400, 500, 600)] == [0.89, 0.44, 0.28, 0.16]
    product = 1.0
    for t in range(401):  # by a loop
        product *= 1 - (1e-4 + (0.02 - 1e-4) * t / 999)
    assert ddpm[400] == pytest.approx(math.sqrt(product))


def by_hand(image, root, noise, y, x, c):
    """One noisy pixel, in plain floats."""
    normal = (float(image[y, x, c]) / 255 - MEAN[c]) / STD[c]
    noisy = (root * normal + math.sqrt(1 - root**2) * noise[y, x, c]) * STD[c] + MEAN[c]
    return min(255, max(0, round(noisy * 255)))


@pytest.fixture
def masked():
    """An image and a mask of a part of it."""
    image = np.random.default_rng(3).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    mask = np.zeros((20, 30), bool)
    mask[5:10, 7:20] = True
    return image, mask


def test_distortion_is_the_formula_inside_and_the_original_outside(masked):
    image, mask = masked
    out = build_data.distort(image, mask, 0.8, MEAN, STD, np.random.default_rng(7))
    assert np.array_equal(out[~mask], image[~mask])
    noise = np.random.default_rng(7).standard_normal((20, 30, 3))
    for y, x, c in ((5, 7, 0), (9, 19, 2), (7, 12, 1)):
        assert out[y, x, c] == by_hand(image, 0.8, noise, y, x, c)
    assert np.array_equal(out, build_data.distort(image, mask, 0.8, MEAN, STD, np.random.default_rng(7)))


def test_no_noise_at_all_gives_the_image_back():
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    out = build_data.distort(image, np.ones((8, 8), bool), 1.0, MEAN, STD, np.random.default_rng(0))
    assert np.array_equal(out, image)


@pytest.mark.parametrize(("schedule", "t", "root"), [("ddpm", 150, 0.89), ("vcd", 999, 0.2850)])
def test_a_negative_is_the_noise_that_its_text_names(world, masked, schedule, t, root):
    image, mask = masked
    config = build_data.MfpoConfig(source=str(world / "val.jsonl"), schedule=schedule, t=t)
    out, text = build_data.negative(image, mask, config, MEAN, STD, np.random.default_rng(7))
    assert text == f"noise {schedule} t={t}" and out.dtype == np.uint8
    assert np.array_equal(out[~mask], image[~mask])
    noise = np.random.default_rng(7).standard_normal((20, 30, 3))
    for y, x, c in ((5, 7, 0), (9, 19, 2), (7, 12, 1)):  # the root is known to two digits: a level or two of 255
        assert abs(int(out[y, x, c]) - by_hand(image, root, noise, y, x, c)) <= 2


def test_a_fork_changes_the_negative_in_one_function(world, monkeypatch, capsys):
    """Another negative: the record says so, its image is that, and so does the table's note."""

    def erased(image, mask, config, mean, std, rng, other):
        return np.where(mask[..., None], 0, image).astype(np.uint8), "erased"

    monkeypatch.setattr(build_data, "negative", erased)
    assert build(monkeypatch, world, "mfpo", world / "val.jsonl", world / "erased.jsonl") == 0
    records = data.read_records(world / "erased.jsonl", data.MFPO_FIELDS)
    for record in records:
        dark = np.asarray(Image.open(world / record["image_rejected"]))
        assert record["negative"] == "erased"
        for x0, y0, x1, y1 in (region["box"] for region in record["regions"]):
            assert not dark[y0:y1, x0:x1].any()
    stick = eval.Yardstick(world, world / "erased.jsonl")
    scored = {"stick": stick, "pairs": records, "scores": np.zeros((len(records), 4))}
    assert f"erased (key) {len(records)}" in eval.counts_of(scored, scored).notes[0]


def test_regions():
    rng = np.random.default_rng(0)
    key = build_data.region_mask("key", [[2, 3, 5, 7], [-4, 0, 1, 1]], (10, 20), rng)
    assert key.shape == (20, 10) and key.sum() == 3 * 4 + 1 and key[3, 2] and not key[7, 5]
    outside = build_data.region_mask("key", [[-10, -10, -2, -2], [100, 100, 120, 120]], (10, 20), rng)
    assert not outside.any()
    assert (
        build_data.region_mask("key", [[0.4, 0.0, 2.6, 1.2]], (10, 20), rng).sum() == 3 * 2
    )  # every pixel that it touches
    assert build_data.region_mask("global", [], (10, 20), rng).all()
    shares = [build_data.region_mask("random", [], (64, 64), rng).mean() for _ in range(20)]
    assert all(0.19 < share < 0.21 for share in shares)


def test_every_record_and_seed_has_its_own_noise():
    first = [build_data.seeded(*which).random() for which in ((0, "a"), (0, "b"), (1, "a"))]
    assert len(set(first)) == 3 and build_data.seeded(0, "a").random() == first[0]


# ----------------------------------------------------------------------------------------------------- keywords


def test_content_words():
    words = build_data.content_words("The picture shows a red cup, two cups and the cherries: a cherry")
    assert words == {"red": [4], "cup": [5, 7], "two": [6], "cherry": [10, 12]}
    # A plural that stands alone stays, endings that are no plural too, and single letters are no words.
    assert build_data.content_words("Dogs, a bus, glass; X") == {"dogs": [0], "bus": [2], "glass": [3]}
    assert build_data.content_words("boxes box, glasses glass") == {"box": [0, 1], "glass": [2, 3]}
    assert build_data.content_words("") == {}


def test_keywords_against_a_graph_solved_by_hand():
    # Two words: whatever the weights, each gives all of its score to the other, so both end at 1.
    vectors = {"cup": np.array([1.0, 0.0]), "table": np.array([0.0, 1.0]), "dog": np.array([0.6, 0.8])}
    pair = build_data.keywords("the cup is on the table", vectors.get)
    assert dict(pair) == pytest.approx({"cup": 1.0, "table": 1.0})
    # Three words at positions 0, 1, 2; theta 1/2, 1/3, 1/2; cosines: cup-table 0, cup-dog 0.6, table-dog 0.8.
    text, kappa = "cup table dog", [1.0, math.exp(-0.05), math.exp(-0.1)]
    affinity = [[0, 1 / 2, 1 / 3 + 0.6], [1 / 2, 0, 1 / 2 + 0.8], [1 / 3 + 0.6, 1 / 2 + 0.8, 0]]
    into = [[affinity[i][j] * kappa[i] for j in range(3)] for i in range(3)]
    out = [sum(into[k][j] for k in range(3)) for j in range(3)]
    system = np.eye(3) - 0.85 * np.array([[into[i][j] / out[j] for j in range(3)] for i in range(3)])
    solved = np.linalg.solve(system, np.full(3, 0.15))  # the fixed point, without iterating
    ranked = build_data.keywords(text, vectors.get, topic=0.9)  # each word is a topic of its own
    assert dict(ranked) == pytest.approx(dict(zip(text.split(), solved, strict=True)), abs=1e-5)
    assert [word for word, _ in ranked] == sorted(text.split(), key=lambda w: -dict(ranked)[w])
    assert build_data.keywords(text, vectors.get, top=2, topic=0.9) == ranked[:2]
    assert build_data.keywords("it is what it is", vectors.get) == []
    # A cosine below zero counts as none, and a word of no direction breaks nothing.
    against = vectors | {"dog": np.array([-1.0, 0.0])}
    without = vectors | {"dog": np.zeros(2)}
    assert build_data.keywords(text, against.get) == build_data.keywords(text, without.get)


def test_words_of_one_topic_have_no_edge():
    """Against the leading eigenvector of the dense matrix, written out by hand: dog and table are alike (their
    cosine is 0.8), parked and parking share a stem, so there are three topics and no edge inside of one.
    """
    words = ["cup", "dog", "parked", "table", "parking"]
    vectors = {
        "cup": [1.0, 0, 0],
        "dog": [0.6, 0.8, 0],
        "table": [0, 1.0, 0],
        "parked": [0, 0, 1.0],
        "parking": [0.4, -0.5, 0],
    }
    topic = [0, 1, 2, 1, 2]
    unit = [np.array(vectors[w]) / np.linalg.norm(vectors[w]) for w in words]
    matrix = np.zeros((5, 5))
    for i in range(5):
        for j in range(5):
            if topic[i] != topic[j]:
                matrix[i, j] = (1 / (1 + abs(i - j)) + max(0, unit[i] @ unit[j])) * math.exp(-0.05 * i)
    google = 0.85 * matrix / matrix.sum(0) + 0.15 / 5  # columns sum to 1: its eigenvalue 1 is the largest
    values, sides = np.linalg.eig(google)
    leading = np.real(sides[:, np.argmax(values.real)])
    ranked = build_data.keywords(" ".join(words), lambda word: np.array(vectors[word]), topic=0.7)
    assert dict(ranked) == pytest.approx(dict(zip(words, 5 * leading / leading.sum(), strict=True)), abs=1e-5)
    # What is alike through a third word is one topic; with one topic alone, words rank as they come.
    chain = {"cup": [1.0, 0], "dog": [0.8, 0.6], "mat": [0.28, 0.96]}
    order = build_data.keywords("mat cup dog", lambda word: np.array(chain[word]), topic=0.7)
    assert [word for word, _ in order] == ["mat", "cup", "dog"] and len({score for _, score in order}) == 1


def test_boxes_of_plural_and_double_words_are_those_of_the_keyword():
    words = ("cup", "Dining Table", "glass", "tray", "berries")
    objects = [{"word": word, "box": [n, 0, n + 1, 1]} for n, word in enumerate(words)]
    regions = build_data.own_regions({"objects": objects}, ["cups", "tables", "glasses", "berry"])
    assert regions == [objects[n] for n in (0, 1, 2, 4)]
    assert build_data.own_regions({"objects": objects}, ["trays"]) == [objects[3]]
    assert build_data.own_regions({"objects": objects}, ["ray"]) == build_data.own_regions({}, ["cup"]) == []


# ------------------------------------------------------------------------------------------- the records of MFPO


def test_built_records_are_readable_and_distorted_only_in_their_boxes(world):
    records = data.read_records(world / "mfpo.jsonl", data.MFPO_FIELDS)
    assert len(records) == 25
    sources = {r["id"]: r for r in data.read_lines(world / "preference.jsonl")}
    for record in records:
        clean, noisy = (np.asarray(Image.open(world / record[f])) for f in ("image", "image_rejected"))
        boxes = {o["word"]: o["box"] for o in sources[record["id"]]["objects"]}
        mask = np.zeros(clean.shape[:2], bool)
        for region in record["regions"]:
            assert boxes[region["word"]] == region["box"] and region["word"] in record["keywords"]
            x0, y0, x1, y1 = region["box"]
            mask[y0:y1, x0:x1] = True
        assert record["region_kind"] == "key" and mask.any() and record["negative"] == "noise ddpm t=400"
        assert np.array_equal(clean[~mask], noisy[~mask]) and (clean[mask] != noisy[mask]).mean() > 0.5
        truth = {o["word"] for o in sources[record["id"]]["objects"]}
        said = {kind for _, kind in toy.mentions(record["rejected"])}
        assert said - truth if record["rejected_from"] in ("own", "added") else said < truth
        if record["rejected_from"] == "own":
            assert record["rejected"] == sources[record["id"]]["own_answer"]


def test_the_same_seed_builds_the_same_files(world, monkeypatch):
    def made(name, *more):
        assert build(monkeypatch, world, "mfpo", world / "val.jsonl", world / f"{name}.jsonl", *more) == 0
        text = (world / f"{name}.jsonl").read_text().replace(f"{name}_distorted", "")
        return text, everything(world / f"{name}_distorted")

    first = made("one")
    assert first == made("two", "--batch", 5) and first != made("three", "--seed", 1)
    kinds = [json.loads(line)["region_kind"] for line in made("four", "--region", "random")[0].splitlines()]
    assert set(kinds) == {"random"}


def noised(folder, out, n=0):
    """The only record of a build, and where its image differs from what the model sees of picture n, (64, 64)."""
    (record,) = data.read_records(folder / out, data.MFPO_FIELDS)
    seen = np.asarray(model.to_square(picture(n), 64, pad=False))
    return record, (np.asarray(Image.open(folder / record["image_rejected"])) != seen).any(-1)


def test_a_box_of_a_photograph_is_noised_where_the_model_sees_it(world, folder, monkeypatch):
    # 70 x 40 becomes 112 x 64, of which columns 24 to 88 are seen: the box's 35 to 70 are columns 32 to 64 of these.
    boxed = GOOD | {"objects": [{"word": "cup", "box": [35, 0, 70, 40]}], "origin": "their set"}
    write(folder / "x.jsonl", [boxed])
    assert build(monkeypatch, world, "mfpo", folder / "x.jsonl", folder / "out.jsonl") == 0
    record, changed = noised(folder, "out.jsonl")
    assert record["region_kind"] == "key" and record["regions"] == boxed["objects"]
    assert record["rejected_from"] == "given" and record["origin"] == "their set"
    assert changed[:, 33:].mean() > 0.9 and not changed[:, :31].any()


FALLBACKS = {  # why no keyword has a region -> fields of the record, what a grounder says of it
    "no box and no grounder": ({}, None),
    "a box of another word": ({"objects": [{"word": "whale", "box": [0, 0, 70, 40]}]}, None),
    "a box that the crop leaves out": ({"objects": [{"word": "cup", "box": [0, 0, 9, 40]}]}, None),
    "nothing above the threshold": ({}, ([], None)),
    "an empty mask": ({}, ([{"word": "cup", "box": [0, 0, 70, 40]}], np.zeros((1, 40, 70), bool))),
    "no keyword": ({"chosen": "it is what it is"}, None),
}


@pytest.mark.parametrize("why", FALLBACKS)
def test_without_a_region_all_is_noised(world, folder, monkeypatch, capsys, why):
    fields, answer = FALLBACKS[why]
    monkeypatch.setattr(grounding, "load", lambda *args: lambda *asked: [answer])
    source = write(folder / "x.jsonl", [GOOD | fields])
    more = ["--grounder", "x"] if answer else []
    assert build(monkeypatch, world, "mfpo", source, folder / "out.jsonl", *more) == 0
    record, changed = noised(folder, "out.jsonl")
    assert record["region_kind"] == "global" and record["regions"] == [] and changed.mean() > 0.9
    text = capsys.readouterr().out
    assert re.search(r"global:? 1\b", text) and ("Name a --grounder" in text) == (answer is None)


@pytest.mark.parametrize("scale", [1 / 70, 1000 / 70])
def test_boxes_in_other_units_are_refused(world, folder, monkeypatch, capsys, scale):
    """In shares less than a pixel is left; in thousandths nothing lies in a small image."""
    box = [round(v * scale, 3) for v in (20, 20, 60, 38)]
    source = write(folder / "x.jsonl", [GOOD | {"objects": [{"word": "cup", "box": box}]}])
    assert build(monkeypatch, world, "mfpo", source, folder / "out.jsonl") == 2
    text = capsys.readouterr().err
    assert "x.jsonl, line 1: box" in text and "not in shares or thousandths" in text and str(box[0]) in text


def test_a_box_half_outside_is_cut_and_counted(world, folder, monkeypatch, capsys):
    source = write(folder / "x.jsonl", [GOOD | {"objects": [{"word": "cup", "box": [40, 10, 90, 20.5]}]}])
    assert build(monkeypatch, world, "mfpo", source, folder / "out.jsonl") == 0
    assert "1 boxes reached out of their image and were cut" in capsys.readouterr().out
    (record,) = data.read_lines(folder / "out.jsonl")
    assert record["regions"] == [{"word": "cup", "box": [40, 10, 70, 20.5]}]


@pytest.mark.parametrize("what", ["<image>\nWhat is it?", "What </s> is it?"])
def test_what_the_trainer_refuses_is_refused_while_building(world, folder, monkeypatch, capsys, what):
    source = write(folder / "x.jsonl", [GOOD, GOOD | {"id": "b", "question": what}])
    assert build(monkeypatch, world, "mfpo", source, folder / "out.jsonl") == 2
    assert "x.jsonl, line 2" in capsys.readouterr().err
    source = write(folder / "x.jsonl", [GOOD])
    assert build(monkeypatch, world, "mfpo", source, folder / "out.jsonl", "--max_length", 30) == 2
    assert "--max_length is 30" in capsys.readouterr().err


def test_masks_of_the_segmenter_are_what_is_noised(world, folder, monkeypatch):
    mask = np.zeros((1, 40, 70), bool)
    mask[0, :, 30:40] = True
    answers = [([{"word": "cup", "box": [0, 0, 70, 40], "score": 1}], mask)]
    monkeypatch.setattr(grounding, "load", lambda *args: lambda *asked: answers)
    more = ("--grounder", "x")
    assert build(monkeypatch, world, "mfpo", folder / "x.jsonl", folder / "out.jsonl", *more) == 0
    record, changed = noised(folder, "out.jsonl")
    assert record["region_kind"] == "key" and 0.2 < changed.mean() < 0.35  # 16 of 64 columns, not the box


def test_the_grounder_is_asked_about_records_without_boxes(world, folder, monkeypatch):
    lines = [GOOD | {"id": str(n), "image": f"{n}.png"} for n in range(3)]
    lines[1]["objects"] = [{"word": "cup", "box": [0, 0, 20, 20]}]
    seen = []

    def finder(images, words, threshold):
        seen.extend((image.size, named, threshold) for image, named in zip(images, words, strict=True))
        pairs = zip(images, words, strict=True)
        return [([{"word": named[0], "box": [0, 0, *image.size]}], None) for image, named in pairs]

    monkeypatch.setattr(grounding, "load", lambda *args: finder)
    more = ("--grounder", "x", "--threshold", 0.4, "--top", 1)
    source = write(folder / "x.jsonl", lines)
    assert build(monkeypatch, world, "mfpo", source, folder / "out.jsonl", *more) == 0
    records = data.read_records(folder / "out.jsonl", data.MFPO_FIELDS)
    assert [size for size, _, _ in seen] == [(70, 40), (64, 64)] and {t for _, _, t in seen} == {0.4}
    assert all(len(record["keywords"]) == 1 for record in records)  # --top
    assert [named for _, named, _ in seen] == [records[n]["keywords"] for n in (0, 2)]
    assert [record["region_kind"] for record in records][::2] == ["key", "key"]
    seen.clear()
    more = ("--grounder", "x", "--region", "global")  # needs no region: nobody is asked
    assert build(monkeypatch, world, "mfpo", source, folder / "out.jsonl", *more) == 0 and not seen


def test_a_damaged_image_is_not_shown_to_the_grounder(world, folder, monkeypatch, capsys):
    (folder / "1.png").write_bytes(b"no image at all")
    source = write(folder / "x.jsonl", [GOOD, GOOD | {"id": "b", "image": "1.png"}])
    finder = lambda images, words, threshold: [([], None) for image in images if image.size]  # noqa: E731
    monkeypatch.setattr(grounding, "load", lambda *args: finder)
    more = ("--grounder", "x", "--skip_bad", True)
    assert build(monkeypatch, world, "mfpo", source, folder / "out.jsonl", *more) == 0
    assert "dropped: image unreadable 1" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------- source records, at the door


def drops(text):
    """{reason: count} of all that a build says it has dropped: "dropped: loop 2, equal 1", "; dropped: not JSON 1"."""
    lists = re.findall(r"dropped: ([^;(.\n]+)", text)
    return {reason: int(count) for words in lists for reason, count in re.findall(r"(\S.*?) (\d+)(?:, |\s*$)", words)}


def read(folder, what="mfpo", **change):
    """The source records of a folder as the builder of MFPO's takes them."""
    check = functools.partial(parts.check_source, rejected=what == "mfpo")
    return parts.read_source(config_of(folder, what, **change), check)


def config_of(folder, what="mfpo", **change):
    config_class = {"mfpo": build_data.MfpoConfig, "mbpo": build_data.MbpoConfig}[what]
    return config_class(source=str(folder / "x.jsonl"), out=str(folder / "out.jsonl"), **change)


def without(name):
    return {key: value for key, value in GOOD.items() if key != name}


@pytest.mark.parametrize(
    ("line", "message", "reason"),
    [
        ("{broken", "not JSON", "not JSON"),
        ("[1]", "must be a JSON object", "not an object"),
        ({**GOOD, "question": "  "}, "field 'question' is empty", "'question' empty"),
        ({**GOOD, "chosen": 3}, "field 'chosen' must be a str, got '3'", "'chosen' of the wrong type"),
        ({**GOOD, "id": 3}, "field 'id' must be a str", "'id' of the wrong type"),
        ({**GOOD, "image": None}, "field 'image' is missing", "'image' missing"),
        (without("chosen"), "field 'chosen' is missing", "'chosen' missing"),
        ({**GOOD, "id": "first"}, "'first' was used before", "id used twice"),
        ({**GOOD, "chosen": "half \ud800"}, "half a character", "'chosen' not text"),
        ({**GOOD, "image": "none.png"}, "none.png: no such image", "image missing"),
        ({**GOOD, "image": "../0.png"}, "lies outside", "image outside the folder"),
        ({**GOOD, "image": "/etc/passwd"}, "lies outside", "image outside the folder"),
        (without("rejected"), "field 'rejected' is missing", "'rejected' missing"),
        ({**GOOD, "rejected": 3}, "'rejected' must be a str, got '3'", "'rejected' of the wrong type"),
        ({**GOOD, "rejected": f" {GOOD['chosen']}"}, "'rejected' are the same", "chosen equal to rejected"),
        ({**GOOD, "rejected": "half \ud800"}, "half a character", "'rejected' not text"),
        ({**GOOD, "objects": {"word": "cup", "box": [0, 0, 5, 5]}}, "must be a list", "'objects' of the wrong type"),
        ({**GOOD, "objects": [{"word": "cup"}]}, "'objects' needs", "'objects' unusable"),
        ({**GOOD, "objects": [{"word": "cup", "box": [5, 5, 1, 1]}]}, "'objects' needs", "'objects' unusable"),
        ({**GOOD, "objects": [{"word": "cup", "box": [0, 0, math.nan, 1]}]}, "'objects' needs", "'objects' unusable"),
        ({**GOOD, "objects": [{"word": "cup", "box": [0, 0, 10**400, 9]}]}, "'objects' needs", "'objects' unusable"),
        ({**GOOD, "objects": [{"word": "cup", "box": [-9, 0, -1, 9]}]}, "no pixel of its image", "'objects' unusable"),
        ({**GOOD, "image": "text.png"}, "text.png: cannot be read as an image", "image unreadable"),
        ({**GOOD, "image": "long.png"}, "16 times as long", "image too long"),
        ({**GOOD, "image": "deep.png"}, "more than 8 bits", "image not of 8 bits"),
    ],
)  # fmt: skip
def test_a_bad_record_is_a_line_or_is_dropped_and_counted(folder, capsys, line, message, reason):
    (folder / "text.png").write_bytes(b"no image at all")
    Image.new("RGB", (10_000, 10)).save(folder / "long.png")
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(folder / "deep.png")
    write(folder / "x.jsonl", [{**GOOD, "id": "first"}, line])
    before = sorted(folder.iterdir())
    with pytest.raises(runtime.Mistake, match=r"x\.jsonl, line 2: ") as error:
        read(folder)
    text = str(error.value)
    assert message in text and len(text) <= 300 and "\n" not in text and sorted(folder.iterdir()) == before
    assert [record["id"] for record in read(folder, skip_bad=True)] == ["first"]
    assert drops(capsys.readouterr().out) == {reason: 1}


@pytest.mark.parametrize("what", ["mfpo", "mbpo"])
def test_a_refusal_ends_with_code_2_and_leaves_nothing(world, folder, monkeypatch, capsys, what):
    for records, message in (
        ([GOOD, without("chosen") | {"id": "b"}], "x.jsonl, line 2: field 'chosen' is missing"),
        (["", GOOD, "{broken"], "x.jsonl, line 3: not JSON"),
        ([], "no usable records"),
        ([GOOD | {"question": "<image> Q"}] if what == "mbpo" else [GOOD | {"question": ""}], "line 1: "),
    ):
        source = write(folder / "x.jsonl", records)
        before = sorted(folder.iterdir())
        args = flags(world, what, source, folder / "out.jsonl")
        assert message in refused(monkeypatch, capsys, build_data, *args)
        assert sorted(folder.iterdir()) == before
    (folder / "x.jsonl").write_bytes(b"\xff\xfe")
    assert "not UTF-8" in refused(monkeypatch, capsys, build_data, *args)


def test_a_record_that_does_not_fit_the_model_is_named_or_dropped(world, folder, monkeypatch, capsys):
    long = GOOD | {"id": "long", "chosen": "a red cup and " * 30}
    marked = GOOD | {"id": "marked", "chosen": "A red </s> cup."}
    asked = GOOD | {"id": "asked", "question": "What is <image> this?"}
    source = write(folder / "x.jsonl", [long, GOOD, marked, asked])
    args = flags(world, "mbpo", source, folder / "out.jsonl", "--max_length", 80, "--steps", 1, "--iig_keep", 1)
    assert "line 1: image, question and answer take" in refused(monkeypatch, capsys, build_data, *args)
    monkeypatch.setattr(model.Policy, "generate", lambda policy, pixels, *rest: (["A pen."] * len(pixels), [True]))
    assert run_here(monkeypatch, build_data, *args, "--skip_bad", True) == 0
    assert drops(capsys.readouterr().out) == {
        "longer than --max_length": 1, "special token in an answer": 1, "image token in the question": 1}  # fmt: skip


@pytest.mark.parametrize("what", ["mfpo", "mbpo"])
def test_every_record_is_built_or_counted(world, folder, monkeypatch, capsys, what):
    """Records in = records out + drops, whatever is wrong, and wherever on the way it shows."""
    (folder / "damaged.png").write_bytes((folder / "0.png").read_bytes()[:900])
    (folder / "text.png").write_bytes(b"no image at all")
    Image.new("RGB", (10_000, 10)).save(folder / "long.png")
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(folder / "deep.png")
    images = ["0.png", "damaged.png", "1.png", "text.png", "2.png", "long.png", "deep.png", "0.png", "none.png"]
    lines = [GOOD | {"id": str(n), "image": image} for n, image in enumerate(images)]
    lines += ["{broken", "7", without("chosen"), GOOD | {"id": "0"}, GOOD | {"id": "e", "question": ""}]
    source = write(folder / "x.jsonl", lines)
    more = [] if what == "mfpo" else ["--iig_keep", 1, "--steps", 1]
    answers = iter(["A blue pen.", "", "A cup cup cup.", "The picture shows a blue cup."])

    def generate(policy, pixels, prompts, count):
        return [next(answers) for _ in prompts], [True] * len(prompts)

    monkeypatch.setattr(model.Policy, "generate", generate)
    assert build(monkeypatch, world, what, source, folder / "out.jsonl", "--skip_bad", True, *more) == 0
    counts, records = drops(capsys.readouterr().out), data.read_lines(folder / "out.jsonl")
    assert len(records) + sum(counts.values()) == len(lines)
    at_the_door = {"not JSON": 1, "not an object": 1, "'chosen' missing": 1, "id used twice": 1,
                   "'question' empty": 1, "image missing": 1}  # fmt: skip
    images = {"image unreadable": 2, "image too long": 1, "image not of 8 bits": 1}
    mined = {"empty": 1, "loop": 1} if what == "mbpo" else {}
    assert counts == at_the_door | images | mined
    assert [r["id"] for r in records] == (["0", "2", "4", "7"] if what == "mfpo" else ["0", "7"])
    # Without the flag the first is named.
    args = flags(world, what, source, folder / "out.jsonl", *more)
    assert "x.jsonl, line 2: " in refused(monkeypatch, capsys, build_data, *args)


def test_images_of_every_sort_are_used_rightly(world, tmp_path, monkeypatch):
    grey = Image.fromarray(np.arange(48 * 32, dtype=np.uint8).reshape(32, 48))
    clear = picture(1).convert("RGBA")
    clear.putalpha(grey.resize(clear.size))
    turned = picture(2).resize((30, 60))
    exif = turned.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    images = {
        "photo.jpg": picture(0).resize((640, 480)), "small.png": picture(1).resize((17, 31)), "grey.png": grey,
        "palette.gif": picture(0).convert("P"), "cmyk.jpg": picture(0).convert("CMYK"), "clear.png": clear,
        "webp.webp": picture(0), "one.png": Image.new("RGB", (1, 1), "red"), "exif.jpg": turned,
    }  # fmt: skip
    for name, image in images.items():
        image.save(tmp_path / name, **({"exif": exif} if name == "exif.jpg" else {}))
    write(tmp_path / "x.jsonl", [GOOD | {"id": name, "image": name} for name in images])
    assert build(monkeypatch, world, "mfpo", tmp_path / "x.jsonl", tmp_path / "out.jsonl") == 0
    records = data.read_records(tmp_path / "out.jsonl", data.MFPO_FIELDS)
    assert [record["id"] for record in records] == list(images)
    for record in records:
        assert Image.open(tmp_path / record["image_rejected"]).size == (64, 64)
    seen = {r["id"]: np.asarray(data.load_image(tmp_path / r["image"])) for r in records}
    assert seen["exif.jpg"].shape == (30, 60, 3) and seen["one.png"].tolist() == [[[255, 0, 0]]]
    assert np.array_equal(seen["grey.png"][..., 0], np.arange(48 * 32).reshape(32, 48) % 256)
    assert abs(seen["cmyk.jpg"].astype(int) - np.asarray(picture(0))).mean() < 60  # not inverted


def test_a_list_and_a_byte_order_mark_are_read_too(folder):
    lines = [GOOD, GOOD | {"id": "b"}]
    for text in (json.dumps(lines), "\ufeff" + "\n\n".join(map(json.dumps, lines)) + "\n\n"):
        (folder / "x.jsonl").write_text(text, encoding="utf-8")
        assert [record["id"] for record in read(folder)] == ["a", "b"]


def test_so_many_records_are_drawn_by_the_seed(folder):
    write(folder / "x.jsonl", [GOOD | {"id": str(n)} for n in range(30)])

    def drawn(count, seed=0, what="mfpo"):
        return [int(record["id"]) for record in read(folder, what, records=count, seed=seed)]

    some = drawn(10)
    assert len(set(some)) == 10 and some == sorted(some) != list(range(10))
    assert some == drawn(10) == drawn(10, what="mbpo") != drawn(10, seed=1)
    assert drawn(0) == drawn(30) == drawn(99) == list(range(30))
    often = np.bincount(sum((drawn(10, seed) for seed in range(8)), []), minlength=30)  # all are drawn alike
    assert often.max() < 8 and np.corrcoef(often, range(30))[0, 1] ** 2 < 0.3


def test_records_that_are_held_out_are_trained_on_by_nobody(world, folder, monkeypatch, capsys):
    source = write(folder / "x.jsonl", [GOOD | {"id": str(n), "image": f"{n % 3}.png"} for n in range(9)])
    held = {}
    for seed in (0, 0, 1):
        more = ("--heldout", 3, "--seed", seed)
        assert build(monkeypatch, world, "mfpo", source, folder / "out.jsonl", *more) == 0
        text = capsys.readouterr().out
        files = [data.read_records(folder / name, data.MFPO_FIELDS) for name in ("out.jsonl", "out_heldout.jsonl")]
        ids = [[record["id"] for record in records] for records in files]
        assert sorted(ids[0] + ids[1]) == [str(n) for n in range(9)] and len(ids[1]) == 3
        assert "out_heldout.jsonl: 3 records" in text and "out.jsonl: 6 records" in text
        assert held.setdefault(seed, ids[1]) == ids[1]
        assert {Path(r["image_rejected"]).name for r in files[0] + files[1]} == {
            path.name for path in (folder / "out_distorted").iterdir()
        }
    assert held[0] != held[1]
    args = flags(world, "mfpo", source, folder / "none.jsonl", "--heldout", 9)
    assert "no record is left to train on" in refused(monkeypatch, capsys, build_data, *args)
    assert build(monkeypatch, world, "mfpo", source, folder / "none.jsonl", "--heldout", 8) == 0  # and goes on
    assert len(data.read_lines(folder / "none.jsonl")) == 1 and not list(folder.glob("none*.parts*"))


def test_records_held_out_before_do_not_outlive_their_build(world, folder, monkeypatch):
    """Left there, the pairs of an older build would be measured, though they are trained on now."""
    source = write(folder / "x.jsonl", [GOOD | {"id": str(n)} for n in range(5)])
    assert build(monkeypatch, world, "mfpo", source, folder / "out.jsonl", "--heldout", 2) == 0
    assert build(monkeypatch, world, "mfpo", source, folder / "out.jsonl", "--records", 3) == 0
    assert len(data.read_lines(folder / "out.jsonl")) == 3 and not (folder / "out_heldout.jsonl").exists()


def test_images_of_a_source_elsewhere_are_linked(world, folder, monkeypatch, capsys):
    (folder / "in").mkdir()
    for n in range(3):
        (folder / f"{n}.png").rename(folder / "in" / f"{n}.png")
    source = write(folder / "in" / "x.jsonl", [GOOD | {"id": str(n), "image": f"{n}.png"} for n in range(3)])
    before = everything(folder / "in")
    # Below the folder of --out: they stay, under a longer name.
    assert build(monkeypatch, world, "mfpo", source, folder / "a.jsonl") == 0
    assert [r["image"] for r in data.read_records(folder / "a.jsonl", data.MFPO_FIELDS)] == [
        f"in/{n}.png" for n in range(3)
    ]
    assert not (folder / "a_images").exists()
    # Elsewhere: hard links, which take no room, and where there are none, copies. Again: over the old ones.
    for name in "bbcc":
        if name == "c":
            monkeypatch.setattr(os, "link", lambda *args: (_ for _ in ()).throw(OSError("another file system")))
        out = folder / "built" / f"{name}.jsonl"
        assert build(monkeypatch, world, "mfpo", source, out) == 0
        records = data.read_records(out, data.MFPO_FIELDS)
        assert [r["image"] for r in records] == [f"{name}_images/{n}.png" for n in range(3)]
        for record in records:
            here, there = out.parent / record["image"], folder / "in" / Path(record["image"]).name
            assert here.read_bytes() == there.read_bytes() and here.samefile(there) == (name == "b")
    names = {path.name for path in (folder / "built").iterdir()}
    assert names == {f"{n}{end}" for n in "bc" for end in (".jsonl", "_images", "_distorted")}
    assert everything(folder / "in") == before


def test_a_mistake_leaves_no_links(world, folder, monkeypatch, capsys):
    source = write(folder / "x.jsonl", [GOOD, GOOD | {"id": "b", "image": "nowhere.png"}])
    args = flags(world, "mfpo", source, folder / "other" / "out.jsonl")
    assert "no such image" in refused(monkeypatch, capsys, build_data, *args)
    assert not (folder / "other").exists()


def test_only_images_that_a_record_names_are_linked(world, folder, monkeypatch):
    source = write(folder / "x.jsonl", [GOOD | {"id": str(n), "image": f"{n}.png"} for n in range(3)])
    out = folder / "other" / "out.jsonl"
    assert build(monkeypatch, world, "mfpo", source, out, "--records", 1) == 0
    names = {record["image"] for record in data.read_lines(out)}
    assert names == {f"out_images/{path.name}" for path in (out.parent / "out_images").iterdir()}


# --------------------------------------------------------------------------------------------- builds that stop


def stalled(stage, batches):
    """For `forked`: the child does so many batches of a stage, then waits until it is killed."""

    def before(rank):
        tqdm.set_lock(threading.RLock())  # its own is shared with this process: killed with it, the child keeps it
        in_parts = parts.in_parts

        def stalling(here, name, title, records, batch, work):
            done = []

            def slow(some):
                if name == stage and len(done) == batches:
                    time.sleep(100)
                done.append(len(some))
                return work(some)

            return in_parts(here, name, title, records, batch, slow)

        parts.in_parts = stalling

    return before


def parts_of(out):
    return list(out.parent.glob(f"{out.name}.parts-*"))


def kill_within(stage, lines, args, out, tmp_path, processes=0):
    """A build in a child (or two), killed when so many lines of a stage are in the parts. Returns its folder."""

    def done():
        files = [file for unfinished in parts_of(out) for file in unfinished.glob(f"{stage}-*.jsonl")]
        return sum(file.read_text().count("\n") for file in files) >= lines

    batches = lines // int(args[args.index("--batch") + 1]) // max(processes, 1)
    before, log = stalled(stage, batches), tmp_path / "log"
    children = forked(build_data, *args, processes=processes, log=log, before=before)
    try:
        wait_for(done, 20)
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
        codes = finished(children)
    assert codes == [-signal.SIGKILL] * max(processes, 1) and not out.exists(), log.read_text()
    (unfinished,) = parts_of(out)
    return unfinished


def mined_flags(world, out, *more):
    """Ten of thirteen scenes, attacked in four batches."""
    args = ["mbpo", "--source", world / "val.jsonl", "--model", world / "base", "--out", world / out]
    more = ["--questions", 20, "--iig_keep", 0.8, "--max_new_tokens", 16, *more]
    return [*args, "--batch", 3, "--steps", 2, *more]


def all_files(world, stem):
    """Every byte that lies under names that begin with a build's, under names without it."""
    files = {}
    for path in sorted([*world.glob(f"{stem}*"), *world.glob(f"{stem}*/*")]):
        if path.is_file():
            name = str(path.relative_to(world)).replace(stem, "")
            text = path.read_bytes()
            files[name] = text.replace(stem.encode(), b"") if path.suffix == ".jsonl" else text
    return files


@pytest.fixture(scope="module")
def straight(world):
    """All files of an MBPO build that nobody has stopped."""
    with pytest.MonkeyPatch.context() as patch:
        assert run_here(patch, build_data, *mined_flags(world, "straight.jsonl")) == 0
    files = all_files(world, "straight")
    assert len(files) == 3 + 10 and not list(world.glob("straight.jsonl.*"))
    return files


@pytest.mark.parametrize(("stage", "first", "then"), [("attack", 2, 0), ("gain", 0, 2)])
def test_a_killed_build_goes_on_to_the_same_files(world, straight, tmp_path, monkeypatch, stage, first, then):
    """
    Two processes that one follows; one that two follow, which share all of the attack: four batches, the last
    smaller, answers of unequal length. What is done is not done again.
    """
    name = f"killed_{stage}_{first}.jsonl"
    args = mined_flags(world, name)
    unfinished = kill_within(stage, 6, args, world / name, tmp_path, first)
    marked = 0
    for file in unfinished.glob(f"{stage}-*.jsonl"):
        text = file.read_text()
        marked += text.count('"source": "toy"')
        # A mark in what is done is seen in the end; a line that was cut off by the kill is made again.
        file.write_text(text.replace('"source": "toy"', '"source": "mark"') + '["00", {"rejec')
    log = tmp_path / "log"
    if then:
        assert finished(forked(build_data, *args, processes=then, log=log)) == [0] * then, log.read_text()
    else:
        assert run_here(monkeypatch, build_data, *args) == 0
    files = all_files(world, name.removesuffix(".jsonl"))
    assert sum(text.count(b'"source": "mark"') for text in files.values()) == marked == (6 if stage == "attack" else 0)
    assert {name: text.replace(b'"mark"', b'"toy"') for name, text in files.items()} == straight


def interrupted(monkeypatch, stage, batches, args):
    """A build in this process that ends within a stage, after so many batches of it."""
    in_parts = parts.in_parts

    def ending(here, name, title, records, batch, work):
        done = []

        def some(batch_of):
            if name == stage and len(done) == batches:
                raise KeyboardInterrupt
            done.append(len(batch_of))
            return work(batch_of)

        return in_parts(here, name, title, records, batch, some)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(parts, "in_parts", ending)
        run_here(patch, build_data, *args)
    (unfinished,) = parts_of(args[args.index("--out") + 1])
    return unfinished


def test_what_gained_is_not_measured_again(world, monkeypatch):
    """The first stage goes on too: a gain that is in the parts is believed, be it the greatest of all."""
    args = mined_flags(world, "gained.jsonl")
    (file,) = interrupted(monkeypatch, "gain", 2, args).glob("gain-*.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    min(lines, key=lambda line: line[1]["iig"])[1]["iig"] = 77.0
    write(file, lines)
    assert run_here(monkeypatch, build_data, *args) == 0
    assert [line["iig"] for line in lines_of(world, "gained")].count(77.0) == 1


def test_a_smaller_batch_goes_on_with_the_same_answers(world, straight, monkeypatch):
    args = mined_flags(world, "smaller.jsonl")
    interrupted(monkeypatch, "attack", 2, args)
    assert run_here(monkeypatch, build_data, *args, "--batch", 1) == 0
    files = all_files(world, "smaller")
    assert files.keys() == straight.keys()
    for name in (".jsonl", "_dropped.jsonl"):
        records, others = ([json.loads(line) for line in some[name].splitlines()] for some in (files, straight))
        for record, other in zip(records, others, strict=True):
            assert record.pop("fall") == pytest.approx(other.pop("fall"), abs=1e-5)  # sums in another order
            assert record == other


@pytest.fixture
def many(folder):
    """Ten records about three photographs, and the flags that make MFPO records of them, each with noise of its own."""
    write(folder / "x.jsonl", [GOOD | {"id": str(n), "image": f"{n % 3}.png"} for n in range(10)])
    return folder


@pytest.mark.parametrize("change", ["a smaller batch", "records deleted", "two processes"])
def test_a_killed_build_of_mfpo_goes_on_to_the_same_files(world, many, tmp_path, monkeypatch, change):
    source, out, more = many / "x.jsonl", many / "out.jsonl", ["--region", "random", "--heldout", 3]
    args = flags(world, "mfpo", source, out, *more)
    unfinished = kill_within("record", 4, args, out, tmp_path)
    done = {json.loads(line)[1]["id"] for file in unfinished.glob("*") for line in file.read_text().splitlines()}
    assert done == set("0123")
    if change == "records deleted":  # one that is done, one that is not
        write(source, [record for record in data.read_lines(source) if record["id"] not in "18"])
    if change == "two processes":
        assert finished(forked(build_data, *args, processes=2, log=tmp_path / "log")) == [0, 0]
    else:
        small = ["--batch", 1] if change == "a smaller batch" else []
        assert run_here(monkeypatch, build_data, *args, *small) == 0
    (tmp_path / "log").unlink()
    files = everything(many)
    for path in many.glob("out*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert run_here(monkeypatch, build_data, *args) == 0  # alone, from the beginning
    assert everything(many) == files
    assert len(list((many / "out_distorted").iterdir())) == (8 if change == "records deleted" else 10)


@pytest.mark.parametrize("stop", ["the held-out", "the records", "the images", "the parts"])
def test_a_build_killed_at_its_seams(world, many, monkeypatch, stop):
    args = flags(world, "mfpo", many / "x.jsonl", many / "out.jsonl", "--heldout", 3, "--seed", 1)
    assert run_here(monkeypatch, build_data, *args) == 0
    (many / "out_distorted" / f"{'0' * 20}.png").write_bytes(b"of a record that is gone")
    straight = everything(many)
    write_jsonl, unlink, rmtree = runtime.write_jsonl, Path.unlink, shutil.rmtree

    def stopping(here, go):
        def stopped(path, *rest, **more):
            if here(Path(path).name):
                raise KeyboardInterrupt
            return go(path, *rest, **more)

        return stopped

    ends = {
        "the held-out": (runtime, "write_jsonl", stopping(lambda name: name == "out_heldout.jsonl", write_jsonl)),
        "the records": (runtime, "write_jsonl", stopping(lambda name: name == "out.jsonl", write_jsonl)),
        "the images": (Path, "unlink", stopping(lambda name: name == f"{'0' * 20}.png", unlink)),
        "the parts": (shutil, "rmtree", stopping(lambda name: ".parts-" in name, rmtree)),
    }
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(*ends[stop])
        run_here(patch, build_data, *args)
    assert run_here(monkeypatch, build_data, *args) == 0
    del straight[f"out_distorted/{'0' * 20}.png"]
    assert everything(many) == straight


def test_a_build_of_mbpo_killed_before_its_records(world, straight, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # attacked images are there, records not
        patch.setattr(toy, "closed_questions", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        run_here(patch, build_data, *mined_flags(world, "seam.jsonl"))
    assert parts_of(world / "seam.jsonl") and not (world / "seam.jsonl").exists()
    assert run_here(monkeypatch, build_data, *mined_flags(world, "seam.jsonl")) == 0
    assert all_files(world, "seam") == straight


def test_unfinished_work_with_other_settings_is_not_used(world, many, monkeypatch):
    """Nor does it go wrong when it is gone on with later: its records name images of their own settings."""
    out, args, straight = many / "out.jsonl", flags(world, "mfpo", many / "x.jsonl", many / "out.jsonl"), {}
    for t in (300, 900):
        assert run_here(monkeypatch, build_data, *args, "--t", t) == 0
        straight[t] = everything(many)
    interrupted(monkeypatch, "record", 2, [*args, "--t", 900])
    for t in (300, 900):
        assert run_here(monkeypatch, build_data, *args, "--t", t) == 0
        files = {name: text for name, text in everything(many).items() if ".parts-" not in name}
        waiting = {here.name[-16:] for here in parts_of(out)}  # their images wait to be named
        assert {n: text for n, text in files.items() if Path(n).name[:16] not in waiting} == straight[t]
    assert not parts_of(out)


def test_an_older_build_does_not_name_images_of_another(world, many, monkeypatch):
    args = flags(world, "mfpo", many / "x.jsonl", many / "out.jsonl")
    assert run_here(monkeypatch, build_data, *args) == 0
    names = [record["image_rejected"] for record in data.read_lines(many / "out.jsonl")]
    before = [(many / name).read_bytes() for name in names]
    interrupted(monkeypatch, "record", 2, [*args, "--t", 900])
    assert [(many / name).read_bytes() for name in names] == before


def parts_name(monkeypatch, world, what, **change):
    """The folder of parts of a build with these settings."""
    names = []

    def in_parts(here, *rest):
        names.append(here.name)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(parts, "in_parts", in_parts)
        patch.setattr(grounding, "load", lambda *args: None)
        more = [part for name, value in change.items() for part in (f"--{name}", value)]
        build(patch, world, what, world / "val.jsonl", world / "named.jsonl", *more)
    return names[0]


CHANGES = {
    "region": "random",
    "negative": "erase",
    "schedule": "vcd",
    "t": 300,
    "top": 3,
    "grounder": "x",
    "threshold": 0.5,
    "seed": 1,
}
MINING = {"attack": "random", "eps": "8/255", "alpha": "2/255", "steps": 3, "max_new_tokens": 9, "seed": 1,
          "max_length": 99}  # fmt: skip
OTHERS = {"batch": 3, "skip_bad": True, "records": 5}


@pytest.mark.parametrize(
    ("what", "settings", "others"),
    [("mfpo", CHANGES, OTHERS | {"heldout": 2}), ("mbpo", MINING, OTHERS | {"iig_keep": 1, "questions": 7})],
)
def test_parts_are_named_by_all_that_changes_an_answer(world, monkeypatch, what, settings, others):
    first = parts_name(monkeypatch, world, what)
    assert parts_name(monkeypatch, world, what, **others) == first
    names = {parts_name(monkeypatch, world, what, **{name: value}) for name, value in settings.items()}
    assert len(names) == len(settings) and first not in names


def test_no_usable_answer_leaves_the_older_build_as_it_was(world, monkeypatch, capsys):
    args = mined_flags(world, "older.jsonl")
    assert run_here(monkeypatch, build_data, *args) == 0
    before = all_files(world, "older")
    monkeypatch.setattr(build_data, "why_drop", lambda *args: "loop")
    text = refused(monkeypatch, capsys, build_data, *args)
    assert "no mined answer can be used" in text and "loop 10" in text and "--eps" in text
    after = all_files(world, "older")
    assert after.pop("_dropped.jsonl").count(b'"dropped": "loop"') == 10
    assert {name: after[name] for name in before if name != "_dropped.jsonl"} == {
        name: value for name, value in before.items() if name != "_dropped.jsonl"
    }
    assert not parts_of(world / "older.jsonl")  # so that another --eps can be tried


# ------------------------------------------------------------------------------------------- MBPO: the attack


@pytest.fixture(scope="module")
def attacked(policy):
    """Three scenes, their rows, noise to start from: what an attack needs."""
    policy.requires_grad_(False)
    scenes = list(toy.scenes("val", 3, 0))
    pixels = model.to_pixels([Image.fromarray(image) for image, _, _ in scenes])
    rows = []
    for _, objects, _ in scenes:
        record = {"id": "x", "question": QUESTION, "chosen": toy.say(toy.pairs_of(objects), QUESTION)}
        rows.append(policy.encoding.row(record, "chosen"))
    noise = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, pixels.shape)).float()
    yield rows, pixels, noise
    policy.requires_grad_(True)


def logps(policy, rows, pixels):
    """Nats per token of each row's answer, one row at a time."""
    with torch.no_grad():
        sums = [policy.logps(data.pack([row], image[None])).sum() for row, image in zip(rows, pixels, strict=True)]
    return torch.stack(sums) / torch.tensor([len(row.answers[0]) for row in rows])


@pytest.mark.parametrize("eps", [1 / 255, 4 / 255, 5.7 / 255])
@pytest.mark.parametrize("steps", [3, 0])
def test_an_attack_stays_in_the_ball_after_rounding(policy, attacked, steps, eps):
    rows, pixels, noise = attacked
    out = build_data.attack_images(policy, rows, pixels, noise, eps, 1 / 255, steps)
    assert (out - pixels).abs().max() <= eps + 1e-6 and out.min() >= 0 and out.max() <= 1
    levels = (out * 255).numpy()
    assert np.abs(levels - levels.round()).max() < 1e-4  # on the 8-bit grid: what is saved is what was attacked
    assert ((out - pixels).abs() * 255).max() >= math.floor(eps * 255) - 1e-3  # and the ball is used
    assert all(p.grad is None for p in policy.parameters())


def test_an_attack_lowers_the_answer_a_negative_one_raises_it_and_noise_does_neither(policy, attacked):
    rows, pixels, noise = attacked
    clean, falls = logps(policy, rows, pixels), {}
    for name, alpha, steps in (("attack", 1 / 255, 10), ("noise", 1 / 255, 0), ("target", -1 / 255, 10)):
        out = build_data.attack_images(policy, rows, pixels, noise, 4 / 255, alpha, steps)
        falls[name] = clean - logps(policy, rows, out)
    assert (falls["attack"] > 0).all() and (falls["attack"] > 5 * falls["noise"].abs()).all()
    assert (falls["target"] < 0).all() and (falls["target"] < -5 * falls["noise"].abs()).all()
    # Without steps it is the noise alone, rounded into the ball.
    out = build_data.attack_images(policy, rows, pixels, noise, 4 / 255, 1 / 255, 0)
    by_hand = ((pixels * 255).round() + (4 * noise).round()).clamp(0, 255) / 255
    assert torch.allclose(out, by_hand, atol=1e-6)


def test_what_is_attacked_is_an_image(policy, attacked, monkeypatch):
    """Also on the way: pixels that leave [0, 1] would buy the attack a likelihood that no image has."""
    rows, pixels, noise = attacked
    seen, honest = [], policy.logps
    monkeypatch.setattr(policy, "logps", lambda batch: seen.append(batch.pixels.detach()) or honest(batch))
    build_data.attack_images(policy, rows, pixels, noise, 32 / 255, 16 / 255, 3)
    assert len(seen) == 3 and all(images.min() >= 0 and images.max() <= 1 for images in seen)
    assert (seen[0] - (pixels + 32 / 255 * noise).clamp(0, 1)).abs().max() < 1e-6  # from a random start


def test_the_step_of_the_attack_goes_downhill_by_finite_differences(policy, attacked):
    rows, pixels, noise = attacked
    inside = pixels.clamp(0.1, 0.9).mul(255).round().div(255)  # so that no pixel is held by [0, 1]
    still = torch.zeros_like(noise)
    step = build_data.attack_images(policy, rows, inside, still, 1 / 255, 1 / 255, 1) - inside
    down, here, up = (logps(policy, rows, inside + share * step) for share in (0.2, 0, -0.2))
    assert (down < here).all() and (here < up).all()
    assert torch.allclose(here - down, up - here, rtol=0.2)  # a slope, not chance
    # No direction of the same size goes down faster, if the slope is nearly the same everywhere in the ball.
    for seed in range(3):
        other = torch.from_numpy(np.random.default_rng(seed).choice([-1, 1], step.shape)).float() / 255
        assert (logps(policy, rows, inside + 0.2 * other) > down).all()


def test_gain_is_what_separate_forwards_say(policy, attacked):
    rows, pixels, _ = attacked
    gain = build_data.image_gain(policy, rows, pixels)
    grey = policy.mean.expand(1, 3, 64, 64)
    alone = logps(policy, rows, pixels) - logps(policy, rows, grey.expand(3, -1, -1, -1))
    assert gain.shape == (3,) and torch.allclose(gain, alone, atol=1e-5)
    mean = build_data.mean_logp(policy, data.pack(rows, pixels), pixels)
    assert torch.allclose(mean, logps(policy, rows, pixels), atol=1e-5)


@pytest.mark.parametrize(
    ("rejected", "chosen", "ended", "reason"),
    [
        ("A red cup and a blue spoon.", "A red cup.", True, ""),
        ("a red  cup", "A red cup.", True, "equal"),
        ("", "A red cup.", True, "empty"),
        (" . ", "A red cup.", True, "empty"),
        ("A red cup and a", "A red cup.", False, "too long"),
        ("A cup cup cup.", "A red cup.", True, "loop"),
        ("I see a cup, a pen, a cup, a pen, a cup, a pen.", "A red cup.", False, "loop"),
        ("A cup, a pen, a cup, a pen.", "A red cup.", True, ""),
        ("a b c d e f g h i j k l " * 3, "A red cup.", True, "loop"),
        ("a b c d e f g h i j k l m " * 3, "A red cup.", True, ""),  # phrases of up to 12 words
        ("I'm sorry, I cannot see the image.", "A red cup.", True, "refusal"),
        ("As an AI, I look at pixels.", "A red cup.", True, "refusal"),
        ("I’m sorry, I cannot see.", "A red cup.", True, "refusal"),
        ("Unfortunately, I cannot see the picture.", "A red cup.", True, "refusal"),
        ("I do not see a picture.", "A red cup.", True, "refusal"),
        ("I do not see a cup.", "A red cup.", True, ""),
        ("I can see a red pen.", "A red cup.", True, ""),
        ("A red </s> pen.", "A red cup.", True, "special token in an answer"),
        ("A red whale.", "A red zebra.", True, "chosen equal to rejected"),  # unknown words are one token
        ("A red pen and " * 2 + "a blue cup.", "A red cup.", True, "longer than --max_length"),
    ],
)  # fmt: skip
def test_what_is_dropped(policy, rejected, chosen, ended, reason):
    line = {"id": "a", "question": QUESTION, "chosen": chosen, "rejected": rejected}
    prompt = len(policy.encoding.prompt(QUESTION))
    encoding = dataclasses.replace(policy.encoding, max_length=prompt + (9 if "max_length" in reason else 999))
    assert build_data.why_drop(line, ended, encoding) == reason


def test_what_merges_with_the_prompt_is_dropped(policy, monkeypatch):
    def row(*args):
        raise data.BadRecord("answer merges with the prompt", "...")

    monkeypatch.setattr(data.Encoding, "row", row)
    line = {"id": "a", "question": QUESTION, "chosen": "A cup.", "rejected": "A pen."}
    assert build_data.why_drop(line, True, policy.encoding) == "answer merges with the prompt"


def test_new_words_are_those_with_a_content_that_the_truth_does_not_name():
    new = [w for w in "There is a spoon, cups the".split() if build_data.is_new_word(w, "A cup and two cups.")]
    assert new == ["spoon,", "cups"]  # a plural on its own is a word of its own


# ------------------------------------------------------------------------------------------- MBPO: its records


def lines_of(world, stem):
    """All that was mined, usable or not."""
    return [line for end in ("", "_dropped") for line in data.read_lines(world / f"{stem}{end}.jsonl")]


def test_mined_records_say_how_they_were_made(mined):
    records = data.read_records(mined / "mbpo.jsonl", data.PAIR_FIELDS | {"image_attacked": str})
    dropped = data.read_lines(mined / "mbpo_dropped.jsonl")
    assert len(records) + len(dropped) == 20  # 0.8 of 25
    source = data.read_lines(mined / "preference.jsonl")
    gains = {r["id"]: r["iig"] for r in records + dropped}
    assert set(gains) < {r["id"] for r in source} and len(gains) == 20
    for record in records + dropped:
        assert record["attack"] == {"kind": "pgd", "eps": 0.015686, "alpha": 0.003922, "steps": 2}
        before, after = (
            np.asarray(data.load_image(mined / record[name])).astype(int) for name in ("image", "image_attacked")
        )
        assert 0 < np.abs(after - before).max() <= 4
        assert bool(record.get("dropped")) == (record in dropped)
    assert np.mean([record["fall"] for record in records + dropped]) > 0
    assert not list(mined.glob("mbpo*.parts*"))


def test_what_was_mined_was_said_of_the_attacked_image_that_is_stored(mined, base):
    lines = lines_of(mined, "mbpo")[:4]
    prompts = [base.encoding.prompt(line["question"]) for line in lines]
    said = {
        name: base.generate(model.load_pixels(base, mined, [line[name] for line in lines]), prompts, 128)[0]
        for name in ("image_attacked", "image")
    }
    assert said["image_attacked"] == [line["rejected"] for line in lines]
    rows = [base.encoding.row(line, "chosen") for line in lines]
    names = ([line[name] for line in lines] for name in ("image", "image_attacked"))
    clean, after = (logps(base, rows, model.load_pixels(base, mined, some)) for some in names)
    assert (clean - after).tolist() == pytest.approx([line["fall"] for line in lines], abs=1e-5)


def test_answers_come_from_attacked_images_and_not_from_clean_ones(world, base, monkeypatch):
    """The barely trained model says the same of any image, so here it says how bright the image is."""

    def generate(policy, pixels, prompts, count):
        return [f"sum {image.sum():.3f}" for image in pixels], [True] * len(prompts)

    monkeypatch.setattr(model.Policy, "generate", generate)
    assert run_here(monkeypatch, build_data, *mined_flags(world, "bright.jsonl")) == 0
    for line in data.read_lines(world / "bright.jsonl"):
        after, clean = model.load_pixels(base, world, [line["image_attacked"], line["image"]])
        assert line["rejected"] == f"sum {after.sum():.3f}" != f"sum {clean.sum():.3f}"


def test_the_papers_control_is_povids_noise(world, base, tmp_path, monkeypatch):
    """--attack diffusion against plain floats: each pixel, in [0, 1], is sqrt(abar) of it plus noise."""
    shutil.copytree(world / "images", tmp_path / "images")
    source = tmp_path / "source.jsonl"
    runtime.write_jsonl(source, data.read_lines(world / "val.jsonl")[:4])
    args = ["--attack", "diffusion", "--iig_keep", 1, "--questions", 0, "--max_new_tokens", 1]
    save, seen = parts.save_image, {}

    def saved(image, folder, record, parts):
        seen[record["id"]] = image
        return save(image, folder, record, parts)

    monkeypatch.setattr(parts, "save_image", saved)
    assert build(monkeypatch, world, "mbpo", source, tmp_path / "o.jsonl", *args) == 2  # all are too long
    lines = data.read_lines(tmp_path / "o_dropped.jsonl")
    assert len(lines) == 4
    for line in lines:
        assert line["attack"] == {"kind": "diffusion", "eps": 1.0, "t": 500}
        clean, noisy = np.asarray(Image.open(tmp_path / line["image"]), float) / 255, seen[line["id"]] / 255.0
        normal = build_data.seeded(0, line["id"]).standard_normal((3, *clean.shape[:2]))
        for y, x, c in ((5, 9, 1), (40, 3, 0), (63, 63, 2), (20, 33, 1)):
            expected = 0.8630 * clean[y, x, c] + math.sqrt(1 - 0.8630**2) * normal[c, y, x]
            assert noisy[y, x, c] == pytest.approx(min(1, max(0, expected)), abs=0.003)


def test_a_cutoff_of_the_gain_keeps_what_gains_as_much(world, tmp_path, monkeypatch, capsys):
    shutil.copytree(world / "images", tmp_path / "images")
    source, out = tmp_path / "source.jsonl", tmp_path / "o.jsonl"
    runtime.write_jsonl(source, data.read_lines(world / "val.jsonl")[:8])
    more = ["--attack", "random", "--questions", 0, "--max_new_tokens", 1]  # all are dropped as too long, and told

    def gains(*flags):
        assert build(monkeypatch, world, "mbpo", source, out, *more, *flags) == 2
        return sorted(line["iig"] for line in data.read_lines(tmp_path / "o_dropped.jsonl"))

    every = gains("--iig_keep", 1)
    assert len(every) == 8 and gains() == every[4:]
    assert gains("--iig_min", (every[4] + every[5]) / 2) == every[5:]
    assert build(monkeypatch, world, "mbpo", source, out, *more, "--iig_min", 99) == 2
    assert "no record gains as much" in capsys.readouterr().err


@pytest.mark.parametrize(("attack", "alpha"), [("pgd", "-1/255"), ("random", "1/255")])
def test_the_kind_and_the_sign_of_the_attack(world, monkeypatch, attack, alpha):
    """A negative step raises the answer; only the control takes no steps, and says so in its records."""
    steps, honest = [], build_data.attack_images

    def seen(policy, rows, pixels, noise, eps, size, count):
        steps.append((count, size))
        return honest(policy, rows, pixels, noise, eps, size, count)

    monkeypatch.setattr(build_data, "attack_images", seen)
    name = f"{attack}_attack"
    args = mined_flags(world, f"{name}.jsonl", "--attack", attack, f"--alpha={alpha}")
    assert run_here(monkeypatch, build_data, *args) == 0
    lines = lines_of(world, name)
    fall = np.mean([line["fall"] for line in lines])
    if attack == "random":
        assert {count for count, _ in steps} == {0} and abs(fall) < 1e-3
        assert lines[0]["attack"] == {"kind": "random", "eps": 0.015686}
    else:
        assert set(steps) == {(2, -1 / 255)} and fall < 0
        assert lines[0]["attack"] == {"kind": "pgd", "eps": 0.015686, "alpha": -0.003922, "steps": 2}


def test_only_the_records_with_most_gain_are_attacked(mined, base):
    lines, source = lines_of(mined, "mbpo"), data.read_lines(mined / "preference.jsonl")
    rows = [base.encoding.row(record, "chosen") for record in source]
    pixels = model.load_pixels(base, mined, [record["image"] for record in source])
    gains = logps(base, rows, pixels) - logps(base, rows, base.mean.expand_as(pixels))
    ranked = sorted(zip(gains.tolist(), (r["id"] for r in source), strict=True))
    assert {name for _, name in ranked[5:]} == {line["id"] for line in lines}
    gain_of = {name: gain for gain, name in ranked}
    assert [line["iig"] for line in lines] == pytest.approx([gain_of[line["id"]] for line in lines], abs=1e-5)


def test_closed_questions_are_true_and_balanced(mined):
    questions = data.read_records(mined / "mbpo_closed.jsonl", data.QUESTION_FIELDS)
    scenes = {record["id"]: record for record in data.read_lines(mined / "preference.jsonl")}
    assert len(questions) == 60
    kinds = [q["kind"] for q in questions]
    assert {kind: kinds.count(kind) for kind in kinds} == {"yesno": 30, "choice": 12, "number": 9, "word": 9}
    partners = []
    for q in questions:
        objects = {o["word"]: o["colour"] for o in scenes[q["about"]]["objects"]}
        asked = q["question"].rstrip("?").split()
        truth = {
            "yesno": lambda o=objects, a=asked: "Yes" if a[3] in o else "No",
            "choice": lambda o=objects, q=q: "ABCD"[[c in o for c in q["choices"]].index(True)],
            "number": lambda o=objects: str(len(o)),
            "word": lambda o=objects, a=asked: o[a[-1]],
        }[q["kind"]]()
        assert q["answer"] == truth, q
        if q["kind"] == "yesno" and any(toy.PARTNER.get(kind) == asked[3] for kind in objects):
            partners.append(q["answer"])
    # 21 by design, others by chance
    assert len(partners) >= 21 and abs(partners.count("Yes") - partners.count("No")) <= 9


def test_any_count_of_questions_from_any_number_of_scenes():
    scenes = []
    for i, (_, objects, _) in enumerate(toy.scenes("val", 5, 0)):
        words = [{"word": o["kind"], "colour": o["colour"]} for o in objects]
        scenes.append({"id": str(i), "image": f"{i}.png", "objects": words})
    for count in (1, 3, 10, 13):
        for some in (1, 2, 5):
            asked = toy.closed_questions(scenes[:some], count, np.random.default_rng(0))
            assert len(asked) == len({question["id"] for question in asked}) == count


def test_a_source_that_is_no_scene_gives_no_questions(world, folder, monkeypatch, capsys):
    monkeypatch.setattr(model.Policy, "generate", lambda *args: (["A pen."], [True]))
    args = ("--steps", 1, "--iig_keep", 1)
    assert build(monkeypatch, world, "mbpo", folder / "x.jsonl", folder / "out.jsonl", *args) == 0
    assert not (folder / "out_closed.jsonl").exists()
    last = capsys.readouterr().out.splitlines()[-1]
    # Without questions the online part is left out, and the base is named: it is not beside the records.
    assert last.startswith("next: torchrun train_mbpo.py") and "--online_fraction 0" in last
    assert f"--model {world / 'base'}" in last and f"--data {folder / 'out.jsonl'}" in last


# ------------------------------------------------------------------------------------------ the built-in world


def test_yes_no_questions_are_balanced_by_kind(world):
    asked = {}
    for scene in data.read_lines(world / "val.jsonl"):
        present = {o["word"] for o in scene["objects"]}
        for question in scene["asked"]:
            kind = question["question"].split()[3]
            assert question["answer"] == ("Yes" if kind in present else "No")
            if question["split"] == "adversarial":
                assert kind in toy.PARTNER.values()
                asked.setdefault(kind, []).append(question["answer"])
    assert asked and all(answers.count("Yes") == answers.count("No") for answers in asked.values())


def test_own_answers_are_stored_and_those_that_were_cut_are_not(world, base, monkeypatch):
    for split in ("preference", "val", "test"):
        records = data.read_lines(world / f"{split}.jsonl")
        assert all(isinstance(record["own_answer"], str | None) for record in records)
    records = data.read_lines(world / "val.jsonl")
    answers = warmup.own_answers(base, records, world, 0)  # of the same seed, in another process of thought
    assert answers == [record["own_answer"] for record in records]
    assert warmup.own_answers(base, records, world, 1) != answers  # sampled
    decode, eos = model.Policy.decode, base.tokenizer.eos_token_id

    def cut(policy, *args, **more):
        tokens, *rest = decode(policy, *args, **more)
        tokens[1] = [token for token in tokens[1] if token != eos][:3]
        return tokens, *rest

    monkeypatch.setattr(model.Policy, "decode", cut)
    assert [answer is None for answer in warmup.own_answers(base, records[:3], world, 0)] == [False, True, False]


def test_an_old_world_gets_its_own_answers_once(world, tmp_path):
    """A world that was built before answers were stored: they are added, and nothing else is touched."""
    old = tmp_path / "old"
    shutil.copytree(world, old, ignore=shutil.ignore_patterns("*_distorted", "*_attacked"))
    shutil.copytree(world / "mfpo_val_distorted", old / "mfpo_val_distorted")
    for split in ("preference", "val", "test"):
        records = data.read_lines(old / f"{split}.jsonl")
        for record in records:
            del record["own_answer"]
        write(old / f"{split}.jsonl", records)
    changed = ("preference.jsonl", "val.jsonl", "test.jsonl")
    before = {path: path.stat().st_mtime_ns for path in old.rglob("*") if path.name not in changed}
    config = toy.Config(out=str(old), preference=25, heldout=13)
    build_data.build_toy(config)
    assert {path: path.stat().st_mtime_ns for path in old.rglob("*") if path.name not in changed} == before
    for name in changed:
        assert data.read_lines(old / name) == data.read_lines(world / name)
    after = {path: path.stat().st_mtime_ns for path in old.rglob("*")}
    build_data.build_toy(config)
    assert {path: path.stat().st_mtime_ns for path in old.rglob("*")} == after


def scene(*words, answer=None):
    objects = [{"colour": "red", "word": word} for word in words]
    return {"question": QUESTION, "objects": objects, "own_answer": answer}


def test_the_rejected_answer_of_a_scene():
    anchor, partner = next(iter(toy.PARTNER.items()))
    rng = np.random.default_rng(0)
    other = "The picture shows a red knife."
    assert toy.rejected(scene(anchor, answer=other), rng) == (other, "own")  # names what is not there
    # Its own answer is true, or was cut: the absent partner is put in behind its anchor.
    for answer in (f"The picture shows a red {anchor}.", None):
        text, origin = toy.rejected(scene(anchor, answer=answer), rng)
        assert origin == "added" and [kind for _, kind in toy.mentions(text)] == [anchor, partner]
    # No partner is absent: one is left out.
    text, origin = toy.rejected(scene(anchor, partner), rng)
    assert origin == "omitted" and [kind for _, kind in toy.mentions(text)] == [anchor]


def test_a_rejected_answer_that_is_given_goes_before_the_models_own(world, monkeypatch):
    given = [record | {"rejected": "A given answer."} for record in data.read_lines(world / "val.jsonl")]
    write(world / "given.jsonl", given)
    assert build(monkeypatch, world, "mfpo", world / "given.jsonl", world / "given_out.jsonl") == 0
    records = data.read_lines(world / "given_out.jsonl")
    assert {(r["rejected"], r["rejected_from"]) for r in records} == {("A given answer.", "given")}


# ----------------------------------------------------------------------------------------------- command lines


@pytest.mark.parametrize(
    ("what", "args", "message"),
    [
        ("mbpo", ["--eps", "0"], "--eps 0: must lie in (0, 1]"),
        ("mbpo", ["--eps", "4"], "a common size is 4/255"),
        ("mbpo", ["--eps=-4/255"], "--eps -4/255: must lie"),
        ("mbpo", ["--eps", "four"], "--eps four: not a number"),
        ("mbpo", ["--eps", "1/0"], "--eps 1/0: not a number"),
        ("mbpo", ["--eps", "1e400"], "--eps 1e400: not a number"),
        ("mbpo", ["--eps", "0.001"], "vanishes when the image is rounded"),
        ("mbpo", ["--alpha", "0"], "--alpha 0: must lie"),
        ("mbpo", ["--alpha=-4"], "--alpha 4: must lie"),
        ("mbpo", ["--alpha=--1/255"], "--alpha -1/255: must lie"),
        ("mbpo", ["--attack", "fgsm"], "invalid choice: 'fgsm'"),
        ("mbpo", ["--convention", "mine"], "invalid choice: 'mine'"),
        ("mbpo", ["--iig_keep", "-1"], "--iig_keep must not be negative"),
        ("mbpo", ["--iig_keep", "0.5", "--iig_min", "0"], "a share or a cutoff, not both"),
        ("mbpo", ["--attack", "typo"], "invalid choice: 'typo'"),
        ("mfpo", ["--negative", "typo"], "invalid choice: 'typo'"),
        ("mbpo", ["--iig_keep", "1.5"], "a share in (0, 1]"),
        ("mbpo", ["--steps", "0"], "--steps must be positive"),
        ("mbpo", ["--batch", "0"], "--batch must be positive"),
        ("mbpo", ["--records", "-1"], "--records must not be negative"),
        ("mbpo", ["--heldout", "3"], "unknown argument '--heldout'"),
        ("mbpo", ["--max_length", "20"], "--max_length is 20"),
        ("mbpo", ["--source", "nowhere.jsonl"], "--source nowhere.jsonl: no such file"),
        ("mfpo", ["--source", "nowhere.parquet"], "python -m extras.sources"),
        ("mfpo", ["--model", "nowhere"], "--model nowhere"),
        ("mfpo", ["--t", "1000"], "--t 1000"),
        ("mfpo", ["--seed", "-1"], "--seed must not be negative"),
        ("mfpo", ["--threshold", "nan"], "--threshold must be a finite number"),
        ("mfpo", ["--threshold", "1"], "threshold below 1"),
        ("mfpo", ["--segmenter", "x"], "name a Grounding DINO too"),
        ("mfpo", ["--region", "mine"], "invalid choice: 'mine'"),
        ("mfpo", ["--heldout", "-1"], "--heldout must not be negative"),
        ("mfpo", ["--sheet", "x.png"], "is now python -m extras.pictures sheet"),
        ("mbpo", ["--sheet=x.png"], "is now python -m extras.pictures sheet"),
        ("mfpo", ["--source_format", "own"], "is now python -m extras.sources"),
        ("mbpo", ["--images", "nowhere"], "is now python -m extras.sources"),
        ("mfpo", ["--explain", "2"], "is now python -m extras.pictures sheet"),
        ("toy", ["--heldout", "0"], "--heldout must be positive"),
    ],
)
def test_mistakes_on_the_command_line(world, monkeypatch, capsys, what, args, message):
    before = sorted(world.rglob("*"))
    all_args = ["toy", *args] if what == "toy" else flags(world, what, world / "val.jsonl", world / "bad.jsonl", *args)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert message in refused(monkeypatch, capsys, build_data, *all_args)
    assert sorted(world.rglob("*")) == before, "something was left behind"


def test_all_of_eight_processes_wait_for_the_last(tmp_path):
    """A broadcast is no barrier: with eight, rank 0 does not wait for rank 7 there."""

    def main():
        runtime.start()

        def late(some):
            time.sleep(runtime.rank() == 7)
            return some

        records = [{"id": str(k)} for k in range(16)]
        assert parts.in_parts(tmp_path / "x", "record", "", records, 1, late) == records

    script = types.SimpleNamespace(main=main, __name__="late")
    assert finished(forked(script, processes=8)) == [0] * 8


def test_a_command_is_needed(monkeypatch, capsys):
    assert "toy | mfpo | mbpo" in refused(monkeypatch, capsys, build_data)
    assert "got 'dpo'" in refused(monkeypatch, capsys, build_data, "dpo")


def test_a_source_is_not_overwritten(world):
    for out in (world / "val.jsonl", world / "val", world / "images"):
        for config in (build_data.MfpoConfig, build_data.MbpoConfig):
            with pytest.raises(ValueError, match="must be a .jsonl file that does not write over"):
                config(source=str(world / "val.jsonl"), out=str(out))
    with pytest.raises(ValueError, match="must be a .jsonl file that does not write over"):
        build_data.MfpoConfig(source=str(world / "x_heldout.jsonl"), out=str(world / "x.jsonl"))


def test_the_next_command_is_named(world, monkeypatch, capsys):
    assert build(monkeypatch, world, "mfpo", world / "val.jsonl", world / "next.jsonl") == 0
    last = capsys.readouterr().out.splitlines()[-1]  # the base is beside the records: it need not be named
    assert last == f"next: torchrun train_mfpo.py --data {world / 'next.jsonl'}"
