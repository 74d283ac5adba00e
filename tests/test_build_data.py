"""Noise schedule, distortion, regions, keywords and the records they end in."""

import json
import math

import numpy as np
import pytest
from PIL import Image

import build_data
import data
import toy

MEAN, STD = np.array([0.48, 0.46, 0.41]), np.array([0.27, 0.26, 0.28])


def test_schedules_at_known_points():
    vcd, ddpm = build_data.sqrt_alpha_bar("vcd"), build_data.sqrt_alpha_bar("ddpm")
    assert [round(float(vcd[t]), 4) for t in (100, 500, 999)] == [0.9983, 0.8630, 0.2850]
    assert [round(float(ddpm[t]), 2) for t in (150, 400, 500, 600)] == [0.89, 0.44, 0.28, 0.16]
    product = 1.0
    for t in range(401):  # by a loop
        product *= 1 - (1e-4 + (0.02 - 1e-4) * t / 999)
    assert ddpm[400] == pytest.approx(math.sqrt(product))


def test_distortion_is_the_formula_inside_and_the_original_outside():
    rng = np.random.default_rng(3)
    image = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    mask = np.zeros((20, 30), bool)
    mask[5:10, 7:20] = True
    root = 0.8
    out = build_data.distort(image, mask, root, MEAN, STD, np.random.default_rng(7))
    assert np.array_equal(out[~mask], image[~mask])
    noise = np.random.default_rng(7).standard_normal((20, 30, 3))
    for y, x, c in ((5, 7, 0), (9, 19, 2), (7, 12, 1)):  # pixel by pixel, in plain floats
        normal = (float(image[y, x, c]) / 255 - MEAN[c]) / STD[c]
        noisy = (root * normal + math.sqrt(1 - root**2) * noise[y, x, c]) * STD[c] + MEAN[c]
        assert out[y, x, c] == min(255, max(0, round(noisy * 255)))
    again = build_data.distort(image, mask, root, MEAN, STD, np.random.default_rng(7))
    assert np.array_equal(out, again)


def test_no_noise_at_all_gives_the_image_back():
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    out = build_data.distort(image, np.ones((8, 8), bool), 1.0, MEAN, STD, np.random.default_rng(0))
    assert np.array_equal(out, image)


def test_regions():
    rng = np.random.default_rng(0)
    key = build_data.region_mask("key", [[2, 3, 5, 7], [-4, 0, 1, 1]], (10, 20), rng)
    assert key.shape == (20, 10) and key.sum() == 3 * 4 + 1 and key[3, 2] and not key[7, 5]
    outside = build_data.region_mask("key", [[-10, -10, -2, -2], [100, 100, 120, 120]], (10, 20), rng)
    assert not outside.any()
    assert build_data.region_mask("key", [[0.4, 0.0, 2.6, 1.2]], (10, 20), rng).sum() == 3
    assert build_data.region_mask("global", [], (10, 20), rng).all()
    shares = [build_data.region_mask("random", [], (64, 64), rng).mean() for _ in range(20)]
    assert all(0.19 < share < 0.21 for share in shares)


def test_content_words():
    found = build_data.content_words("The picture shows a red cup, two cups and the cherries: a cherry")
    assert found == {"red": [4], "cup": [5, 7], "two": [6], "cherry": [10, 12]}


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
    ranked = build_data.keywords(text, vectors.get)
    assert dict(ranked) == pytest.approx(dict(zip(text.split(), solved, strict=True)), abs=1e-5)
    assert [word for word, _ in ranked] == sorted(text.split(), key=lambda w: -dict(ranked)[w])
    assert build_data.keywords("it is what it is", vectors.get) == []


def test_built_records_are_readable_and_distorted_only_in_their_boxes(world):
    records = data.read_records(world / "mfpo.jsonl", data.MFPO_FIELDS)
    assert len(records) == 25
    sources = {r["id"]: r for _, r in data.read_jsonl(world / "preference.jsonl")}
    for record in records:
        clean, noisy = (np.asarray(Image.open(world / record[f])) for f in ("image", "image_rejected"))
        boxes = {o["word"]: o["box"] for o in sources[record["id"]]["objects"]}
        mask = np.zeros(clean.shape[:2], bool)
        for region in record["regions"]:
            assert boxes[region["word"]] == region["box"] and region["word"] in record["keywords"]
            x0, y0, x1, y1 = region["box"]
            mask[y0:y1, x0:x1] = True
        assert record["region_kind"] == "key" and mask.any()
        assert np.array_equal(clean[~mask], noisy[~mask]) and (clean[mask] != noisy[mask]).mean() > 0.5
        truth = {o["word"] for o in sources[record["id"]]["objects"]}
        said = {kind for _, kind in toy.mentions(record["rejected"])}
        assert said - truth if record["rejected_from"] in ("own", "added") else said < truth


def test_the_same_seed_builds_the_same_files(world):
    def build(name, **change):
        config = build_data.MfpoConfig(
            source=str(world / "val.jsonl"), model=str(world / "base"), out=str(world / f"{name}.jsonl"), **change
        )
        build_data.build_mfpo(config)
        text = (world / f"{name}.jsonl").read_text().replace(f"{name}_distorted", "")
        images = [p.read_bytes() for p in sorted((world / f"{name}_distorted").iterdir())]
        return text, images

    first = build("one")
    assert first == build("two") and first != build("three", seed=1)
    kinds = [json.loads(line)["region_kind"] for line in build("four", region="random")[0].splitlines()]
    assert set(kinds) == {"random"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objects": [{"word": "cup"}]}, "'objects' needs"),
        ({"objects": [{"word": "cup", "box": [5, 5, 1, 1]}]}, "'objects' needs"),
        ({"rejected": 3}, "'rejected' must be a text"),
        ({"source": "mine"}, "'rejected' is missing"),
    ],
)
def test_sources_that_cannot_be_used(world, tmp_path, change, message):
    record = {**next(data.read_jsonl(world / "val.jsonl"))[1], **change}
    (world / "bad.jsonl").write_text(json.dumps(record) + "\n")
    config = build_data.MfpoConfig(
        source=str(world / "bad.jsonl"), model=str(world / "base"), out=str(world / "bad_out.jsonl")
    )
    with pytest.raises(ValueError, match="record 'val-0'") as error:
        build_data.build_mfpo(config)
    assert message in str(error.value) and not list(world.glob("bad_out*"))


def test_a_source_is_not_overwritten(world):
    for out in (world / "val.jsonl", world / "val"):
        with pytest.raises(ValueError, match="must be a .jsonl file other than"):
            build_data.MfpoConfig(source=str(world / "val.jsonl"), out=str(out))


def test_no_box_for_any_keyword_falls_back_to_global_noise(world):
    record = next(data.read_jsonl(world / "val.jsonl"))[1]
    (world / "bare.jsonl").write_text(json.dumps({**record, "objects": [], "source": "x", "rejected": "no."}) + "\n")
    build_data.build_mfpo(
        build_data.MfpoConfig(
            source=str(world / "bare.jsonl"), model=str(world / "base"), out=str(world / "bare_out.jsonl")
        )
    )
    (made,) = data.read_records(world / "bare_out.jsonl", data.MFPO_FIELDS)
    assert made["region_kind"] == "global" and made["regions"] == []


def test_yes_no_questions_are_balanced_by_kind(world):
    asked = {}
    for _, scene in data.read_jsonl(world / "val.jsonl"):
        present = {o["word"] for o in scene["objects"]}
        for question in scene["asked"]:
            kind = question["question"].split()[3]
            assert question["answer"] == ("Yes" if kind in present else "No")
            if question["split"] == "adversarial":
                assert kind in toy.PARTNER.values()
                asked.setdefault(kind, []).append(question["answer"])
    assert asked and all(answers.count("Yes") == answers.count("No") for answers in asked.values())


def test_a_contact_sheet_is_drawn(world, tmp_path):
    rows = data.read_records(world / "mfpo.jsonl", data.MFPO_FIELDS)[:3]
    build_data.draw_sheet(rows, world, tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape[0] > 3 * 192 and np.ptp(sheet) > 200
