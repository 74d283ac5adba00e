"""Noise, regions, keywords and the records of MFPO; attacks, mining and the questions of MBPO."""

import json
import math
import os
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
from conftest import command, refused, run_here
from PIL import Image

import build_data
import data
import draw
import model
import runtime
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
    with pytest.raises(ValueError, match="bad.jsonl, line 1: field") as error:
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
    draw.draw_sheet(rows, world, tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape[0] > 3 * 192 and np.ptp(sheet) > 200


# ----------------------------------------------------------------------------------------------------- MBPO


@pytest.fixture(scope="module")
def attacked(policy):
    """Three scenes, their rows, noise to start from: what an attack needs."""
    policy.requires_grad_(False)
    scenes = list(toy.scenes("val", 3, 0))
    pixels = torch.stack([model.to_pixels(Image.fromarray(image), 64) for image, _, _ in scenes])
    question, rows = "Describe the picture.", []
    for _, objects, _ in scenes:
        record = {"id": "x", "question": question, "chosen": toy.say(toy.pairs_of(objects), question)}
        rows.append(data.chosen_row(record, policy.tokenizer, policy.template, policy.image_tokens, 999))
    noise = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, pixels.shape)).float()
    yield rows, pixels, noise
    policy.requires_grad_(True)


@pytest.mark.parametrize("eps", [1 / 255, 4 / 255, 5.7 / 255])
@pytest.mark.parametrize("kind", ["pgd", "random"])
def test_an_attack_stays_in_the_ball_after_rounding(policy, attacked, kind, eps):
    rows, pixels, noise = attacked
    out = build_data.attack_images(policy, rows, pixels, noise, kind, eps, 1 / 255, 3)
    assert (out - pixels).abs().max() <= eps + 1e-6 and out.min() >= 0 and out.max() <= 1
    levels = (out * 255).numpy()
    assert np.abs(levels - levels.round()).max() < 1e-4  # on the 8-bit grid: what is saved is what was attacked
    assert ((out - pixels).abs() * 255).max() >= math.floor(eps * 255) - 1e-3  # and the ball is used
    assert all(p.grad is None for p in policy.parameters())


def test_an_attack_lowers_the_chosen_answer_and_noise_does_not(policy, attacked):
    rows, pixels, noise = attacked
    clean = build_data.mean_logp(policy, data.pack(rows, None), pixels)
    falls = {}
    for kind in ("pgd", "random"):
        out = build_data.attack_images(policy, rows, pixels, noise, kind, 4 / 255, 1 / 255, 10)
        falls[kind] = clean - build_data.mean_logp(policy, data.pack(rows, None), out)
    assert (falls["pgd"] > 0).all() and (falls["pgd"] > 5 * falls["random"].abs()).all()


def test_what_is_attacked_is_an_image(policy, attacked, monkeypatch):
    """Also on the way: pixels that leave [0, 1] would buy the attack a likelihood that no image has."""
    rows, pixels, noise = attacked
    seen, honest = [], policy.logps
    monkeypatch.setattr(policy, "logps", lambda batch: seen.append(batch.pixels.detach()) or honest(batch))
    build_data.attack_images(policy, rows, pixels, noise, "pgd", 32 / 255, 16 / 255, 3)
    assert len(seen) == 3 and all(images.min() >= 0 and images.max() <= 1 for images in seen)
    assert (seen[0] - (pixels + 32 / 255 * noise).clamp(0, 1)).abs().max() < 1e-6  # from a random start


def test_the_step_of_the_attack_goes_downhill_by_finite_differences(policy, attacked):
    rows, pixels, noise = attacked
    inside = pixels.clamp(0.1, 0.9).mul(255).round().div(255)  # so that no pixel is held by [0, 1]
    step = build_data.attack_images(policy, rows, inside, torch.zeros_like(noise), "pgd", 1 / 255, 1 / 255, 1) - inside

    down, here, up = (
        build_data.mean_logp(policy, data.pack(rows, None), inside + share * step) for share in (0.2, 0, -0.2)
    )
    assert (down < here).all() and (here < up).all()
    assert torch.allclose(here - down, up - here, rtol=0.2)  # a slope, not chance


@pytest.mark.parametrize(
    ("mined", "chosen", "ended", "reason"),
    [
        ("A red cup and a blue spoon.", "A red cup.", True, ""),
        ("a red  cup", "A red cup.", True, "equal"),
        ("", "A red cup.", True, "empty"),
        (" . ", "A red cup.", True, "empty"),
        ("A red cup and a", "A red cup.", False, "too long"),
        ("A cup cup cup.", "A red cup.", True, "loop"),
        ("I see a cup, a pen, a cup, a pen, a cup, a pen.", "A red cup.", False, "loop"),
        ("A cup, a pen, a cup, a pen.", "A red cup.", True, ""),
        ("I'm sorry, I cannot see the image.", "A red cup.", True, "refusal"),
        ("As an AI, I look at pixels.", "A red cup.", True, "refusal"),
        ("I’m sorry, I cannot see.", "A red cup.", True, "refusal"),
        ("Unfortunately, I cannot see the picture.", "A red cup.", True, "refusal"),
        ("I do not see a picture.", "A red cup.", True, "refusal"),
        ("I do not see a cup.", "A red cup.", True, ""),
        ("I can see a red pen.", "A red cup.", True, ""),
    ],
)
def test_what_is_dropped(mined, chosen, ended, reason):
    assert build_data.why_drop(mined, chosen, ended) == reason


def test_gain_is_what_separate_forwards_say(policy, attacked):
    rows, pixels, _ = attacked
    gain, logp = (
        build_data.image_gain(policy, rows, pixels),
        build_data.mean_logp(policy, data.pack(rows, None), pixels),
    )
    grey = policy.mean.expand(1, 3, 64, 64)
    with torch.no_grad():
        alone = [policy.logps(data.pack(rows[1:2], p)).sum().item() for p in (pixels[1:2], grey)]
    count = len(rows[1].answers[0])
    assert gain[1].item() == pytest.approx((alone[0] - alone[1]) / count, abs=1e-5)
    assert logp[1].item() == pytest.approx(alone[0] / count, abs=1e-5)


def test_mined_records_say_how_they_were_made(mined):
    records = data.read_records(mined / "mbpo.jsonl", data.MBPO_FIELDS)
    dropped = [line for _, line in data.read_jsonl(mined / "mbpo_dropped.jsonl")]
    assert len(records) + len(dropped) == 20  # 0.8 of 25
    source = [record for _, record in data.read_jsonl(mined / "preference.jsonl")]
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
    assert not (mined / "mbpo.parts").exists()


def test_what_was_mined_was_said_of_the_attacked_image_that_is_kept(mined):
    policy = model.load(mined / "base").eval()
    lines = [line for name in ("mbpo", "mbpo_dropped") for _, line in data.read_jsonl(mined / f"{name}.jsonl")][:8]
    prompts = [data.encode_prompt(policy.tokenizer, r["question"], policy.template, policy.image_tokens) for r in lines]
    said = {
        name: policy.generate(model.load_pixels(policy, mined, [line[name] for line in lines]), prompts, 128)[0]
        for name in ("image_attacked", "image")
    }
    assert said["image_attacked"] == [line["rejected"] for line in lines]


def test_answers_come_from_attacked_images_and_not_from_clean_ones(world, monkeypatch, tmp_path):
    """The barely trained model says the same of any image, so here it says how bright the image is."""
    monkeypatch.setattr(
        model.Policy,
        "generate",
        lambda policy, pixels, prompts, n: ([f"sum {p.sum():.3f}" for p in pixels], [True] * n),
    )
    run_here(monkeypatch, build_data, *build_args(world, "bright.jsonl"))
    policy = model.load(world / "base")
    for _, line in data.read_jsonl(world / "bright.jsonl"):
        attacked, clean = model.load_pixels(policy, world, [line["image_attacked"], line["image"]])
        assert line["rejected"] == f"sum {attacked.sum():.3f}" != f"sum {clean.sum():.3f}"


def test_only_the_records_with_most_gain_are_kept(mined):
    kept = [line for name in ("mbpo", "mbpo_dropped") for _, line in data.read_jsonl(mined / f"{name}.jsonl")]
    policy = model.load(mined / "base").eval()
    source = [record for _, record in data.read_jsonl(mined / "preference.jsonl")]
    rows = [data.chosen_row(r, policy.tokenizer, policy.template, policy.image_tokens, 999) for r in source]
    gains = build_data.image_gain(policy, rows, model.load_pixels(policy, mined, [r["image"] for r in source]))
    best = sorted(zip(gains.tolist(), (r["id"] for r in source), strict=True))[5:]
    assert {name for _, name in best} == {line["id"] for line in kept}


def test_closed_questions_are_true_and_balanced(mined):
    questions = data.read_records(mined / "mbpo_closed.jsonl", data.QUESTION_FIELDS)
    scenes = {record["id"]: record for _, record in data.read_jsonl(mined / "preference.jsonl")}
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
    assert (
        len(partners) >= 21 and abs(partners.count("Yes") - partners.count("No")) <= 9
    )  # 21 by design, others by chance


def build_args(world, out, *more):
    args = ["mbpo", "--source", world / "preference.jsonl", "--model", world / "base", "--out", world / out]
    return [*args, "--batch", 4, "--steps", 2, "--questions", 20, "--iig_keep", 0.8, "--max_new_tokens", 30, *more]


def all_files(world, stem):
    """Every byte that a build has written, under names without its stem."""
    found = {}
    for path in sorted(
        [*world.glob(f"{stem}.jsonl"), *world.glob(f"{stem}_*.jsonl"), *world.glob(f"{stem}_attacked/*")]
    ):
        name = str(path.relative_to(world)).replace(stem, "")
        found[name] = path.read_bytes().replace(stem.encode(), b"") if path.suffix == ".jsonl" else path.read_bytes()
    return found


def test_one_process_two_processes_and_a_killed_build_give_the_same_files(world, monkeypatch):
    run_here(monkeypatch, build_data, *build_args(world, "straight.jsonl"))
    straight = all_files(world, "straight")
    assert len(straight) == 3 + 20
    # Five parts of the attack on two processes: unequal shares, with answers of unequal length.
    two = subprocess.run(
        command(build_data, *build_args(world, "two.jsonl"), processes=2), capture_output=True, text=True, timeout=120
    )
    assert all_files(world, "two") == straight, two.stderr
    parts = world / "killed.parts"
    process = subprocess.Popen(
        command(build_data, *build_args(world, "killed.jsonl")), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.time() + 60
    while not (parts / "attack_000000.jsonl").is_file() and time.time() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert parts.is_dir() and not (world / "killed.jsonl").exists(), "the build ended before it was killed"
    done = {path: path.stat().st_mtime_ns for path in parts.glob("*_0*.jsonl")}
    assert len(done) >= 8
    # What is done is not done again: a part that is there is believed, so a mark put into one is found in the end.
    marked = parts / "attack_000000.jsonl"
    marked.write_text(marked.read_text().replace('"source": "toy"', '"source": "mark"'))
    run_here(monkeypatch, build_data, *build_args(world, "killed.jsonl"))
    found = all_files(world, "killed")
    assert sum(text.count(b'"source": "mark"') for text in found.values()) == 4
    assert {name: text.replace(b'"mark"', b'"toy"') for name, text in found.items()} == straight


@pytest.mark.parametrize("stop", ["before it began", "before the records", "before the end"])
def test_a_build_killed_at_its_seams_goes_on_to_the_same_files(world, monkeypatch, stop):
    run_here(monkeypatch, build_data, *build_args(world, "seam.jsonl"))
    straight, parts = all_files(world, "seam"), world / "seam.parts"

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if stop == "before it began":  # parts of a build whose settings are gone must not be believed
            patch.setattr(runtime, "write_text", killed)
        elif stop == "before the records":  # attacked images are in place, records are not
            patch.setattr(build_data, "closed_questions", killed)
        else:
            patch.setattr(
                build_data.Path, "rename", lambda path, to: killed() if path == parts else os.rename(path, to)
            )
        run_here(patch, build_data, *build_args(world, "seam.jsonl"))
    if stop == "before it began":
        assert not parts.exists()  # it appears with its settings, or not at all
        parts.with_suffix(".parts.new").joinpath("gain_000000.jsonl").write_text("rubbish")
    run_here(monkeypatch, build_data, *build_args(world, "seam.jsonl"))
    assert all_files(world, "seam") == straight and not parts.exists() and not list(world.glob("seam.parts*"))


def test_no_usable_answer_leaves_the_older_build_whole(world, monkeypatch, capsys):
    run_here(monkeypatch, build_data, *build_args(world, "whole.jsonl"))
    before = all_files(world, "whole")
    monkeypatch.setattr(build_data, "why_drop", lambda *args: "loop")
    told = refused(monkeypatch, capsys, build_data, *build_args(world, "whole.jsonl"))
    assert "no mined answer can be used; dropped: loop 20" in told
    after = all_files(world, "whole")
    assert after.pop("_dropped.jsonl").count(b'"dropped": "loop"') == 20
    assert {name: after[name] for name in before if name != "_dropped.jsonl"} == {
        name: value for name, value in before.items() if name != "_dropped.jsonl"
    }
    assert not (world / "whole.parts").exists()  # so that another --eps can be tried


def test_any_count_of_questions_from_any_number_of_scenes():
    scenes = [
        {"id": str(i), "image": f"{i}.png", "objects": [{"word": o["kind"], "colour": o["colour"]} for o in objects]}
        for i, (_, objects, _) in enumerate(toy.scenes("val", 5, 0))
    ]
    for count in (1, 3, 10, 13):
        for some in (1, 2, 5):
            assert len(build_data.closed_questions(scenes[:some], count, np.random.default_rng(0))) == count


def test_an_unfinished_build_with_other_settings_is_not_mixed(world, monkeypatch, capsys):
    parts = world / "other.parts"
    parts.mkdir()
    (parts / "settings.json").write_text(json.dumps({"eps": "8/255"}))
    told = refused(monkeypatch, capsys, build_data, *build_args(world, "other.jsonl"))
    assert "other.parts: unfinished work with" in told and "--eps 8/255" in told and "delete that folder" in told
    assert not (world / "other.jsonl").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--eps", "0"], "--eps 0: must lie in (0, 1]"),
        (["--eps", "4"], "a common size is 4/255"),
        (["--eps", "four"], "--eps four: not a number"),
        (["--eps", "1/0"], "--eps 1/0: not a number"),
        (["--eps", "1e400"], "--eps 1e400: not a number"),
        (["--convention", "mine"], "--convention 'mine': use one of original, hub"),
        (["--eps", "0.001"], "vanishes when the image is rounded"),
        (["--alpha=-1/255"], "--alpha -1/255: must lie"),
        (["--attack", "fgsm"], "use pgd or random"),
        (["--iig_keep", "0"], "a share in (0, 1]"),
        (["--iig_keep", "1.5"], "a share in (0, 1]"),
        (["--steps", "0"], "--steps must be positive"),
        (["--sheet", "nowhere/x.png"], "lie in a folder that exists"),
        (["--source", "nowhere.jsonl"], "--source nowhere.jsonl: no such file"),
        (["--source_format", "mine"], "use one of closed, own, mdpo"),
        (["--images", "nowhere"], "--images nowhere: no such folder"),
        (["--batch", "0"], "--batch must be positive"),
        (["--max_length", "20"], "--max_length is 20"),
    ],
)
def test_mistakes_of_mbpo_on_the_command_line(world, monkeypatch, capsys, args, message):
    before = sorted(world.rglob("*"))
    assert message in refused(monkeypatch, capsys, build_data, *build_args(world, "bad.jsonl", *args))
    assert sorted(world.rglob("*")) == before, "something was left behind"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen": 3}, "field 'chosen' must be a text"),
        ({"image": "none.png"}, "no such image"),
        ({"image": "preference.jsonl"}, "cannot be read as an image"),
    ],
)
def test_mistakes_in_the_source_of_mbpo(world, monkeypatch, capsys, change, message):
    lines = (world / "preference.jsonl").read_text().splitlines()
    (world / "spoilt.jsonl").write_text("\n".join([lines[0], json.dumps(json.loads(lines[1]) | change)]))
    told = refused(monkeypatch, capsys, build_data, *build_args(world, "bad.jsonl", "--source", world / "spoilt.jsonl"))
    assert message in told and "spoilt.jsonl, line 2" in told
    lines = [json.loads(line) for line in lines[:2]]
    del lines[1]["chosen"]
    (world / "spoilt.jsonl").write_text("\n".join(map(json.dumps, lines)))
    told = refused(monkeypatch, capsys, build_data, *build_args(world, "bad.jsonl", "--source", world / "spoilt.jsonl"))
    assert "field 'chosen' is missing" in told
    (world / "spoilt.jsonl").unlink()


def test_a_sheet_of_attacks_is_drawn_with_the_invented_words_in_red(mined, tmp_path):
    rows = data.read_records(mined / "mbpo.jsonl", data.MBPO_FIELDS)[:2]
    rows[0]["rejected"] = rows[0]["chosen"]
    rows[1]["rejected"] = "The picture shows a rocket."
    draw.draw_attacks(rows, mined, tmp_path / "sheet.png", False, build_data.is_new_word)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png")).astype(int)
    text = sheet[:, 3 * 202 + 15 :]
    red = (text[..., 0] > 200) & (text[..., 1] < 80) & (text[..., 2] < 80)
    assert not red[:202].any() and red[202:].any()
    grey = sheet[15:190, 2 * 202 + 15 : 2 * 202 + 190]
    assert 100 < grey.mean() < 156 and np.ptp(grey) <= 2 * 4 * 20  # the difference, magnified around grey


def test_every_record_and_seed_has_its_own_noise():
    first = [build_data.seeded(*which).random() for which in ((0, "a"), (0, "b"), (1, "a"))]
    assert len(set(first)) == 3


def test_old_records_never_name_new_images(tmp_path, monkeypatch):
    out, parts = tmp_path / "x.jsonl", tmp_path / "x.parts"
    (parts / "distorted").mkdir(parents=True)
    out.write_text("of the older build")
    monkeypatch.setattr(runtime, "write_jsonl", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        build_data.publish(out, parts, "distorted", [])
    assert not out.exists()


def test_cut_answers_are_not_rejected_ones(world, policy, monkeypatch):
    records = [record for _, record in data.read_jsonl(world / "val.jsonl")][:3]
    monkeypatch.setattr(model.Policy, "generate", lambda *args, **more: (["a", "b", "c"], [True, False, True]))
    assert build_data.own_answers(policy, records, world, 0) == ["a", None, "c"]


def test_own_answers_are_sampled(world, policy, monkeypatch):
    records = [record for _, record in data.read_jsonl(world / "val.jsonl")][:3]
    assert build_data.own_answers(policy, records, world, 0) != build_data.own_answers(policy, records, world, 1)
    seen, generate = [], model.Policy.generate
    monkeypatch.setattr(model.Policy, "generate", lambda *args, **more: seen.append(more) or generate(*args, **more))
    build_data.own_answers(policy, records, world, 0)
    assert seen == [{"temperature": 1.0}]


@pytest.mark.parametrize("change", [{"t": 1000}, {"seed": -1}])
def test_sizes_out_of_range(world, change):
    with pytest.raises(ValueError, match="--t 1000|--seed"):
        build_data.MfpoConfig(source=str(world / "val.jsonl"), out=str(world / "x.jsonl"), **change)


def test_what_is_left_out_is_the_partner():
    anchor, partner = next(iter(toy.PARTNER.items()))
    objects = [{"colour": "red", "word": anchor}, {"colour": "blue", "word": partner}]
    record = {"question": "Describe the picture.", "objects": objects}
    text, origin = build_data.reject(record, None, np.random.default_rng(0))
    assert origin == "omitted" and [kind for _, kind in toy.mentions(text)] == [anchor]
