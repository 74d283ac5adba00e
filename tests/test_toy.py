"""The built-in world is what it says, and its model is made as described."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import data
import model
import toy
import warmup

# --------------------------------------------------------------------------------------------------- scenes


QUESTION = "Describe the picture."


def test_scenes_hold_two_to_four_objects_inside_their_boxes():
    empty = 60  # the lightest background minus noise stays well above the darkest colours
    for image, objects, _ in toy.scenes("val", 200, 0):
        assert image.shape == (64, 64, 3) and image.dtype == np.uint8
        assert 2 <= len(objects) <= 4 and len({o["kind"] for o in objects}) == len(objects)
        outside = np.ones((64, 64), bool)
        for o in objects:
            x0, y0, x1, y1 = o["box"]
            assert 0 <= x0 < x1 <= 64 and 0 <= y0 < y1 <= 64
            outside[y0:y1, x0:x1] = False
            spread = np.ptp(image[y0:y1, x0:x1].reshape(-1, 3).astype(int), axis=0).max()
            assert spread > empty, "nothing is drawn in this box"
        flat = image[outside].astype(int)
        assert np.abs(flat - np.median(flat, axis=0)).max() < empty, "something lies outside of all boxes"


def share_with_partner(split, p):
    there = [
        toy.PARTNER[o["kind"]] in {x["kind"] for x in objects}
        for _, objects, _ in toy.scenes(split, 800, 0, p)
        for o in objects
        if o["kind"] in toy.PARTNER
    ]
    return np.mean(there)


def test_partners_co_occur_in_training_scenes_and_not_in_test_scenes():
    assert 0.84 < share_with_partner("train", toy.P_BIASED) < 0.91
    assert 0.46 < share_with_partner("test", toy.P_FAIR) < 0.55


def test_splits_share_no_scene():
    first = {split: next(toy.scenes(split, 1, 0))[0].tobytes() for split in toy.SPLIT_SEEDS}
    assert len(set(first.values())) == len(first)


def test_captions_say_what_is_there_and_are_read_back():
    for _, objects, _ in toy.scenes("val", 50, 0):
        pairs = toy.pairs_of(objects)
        for question in toy.CAPTIONS:
            assert toy.mentions(toy.say(pairs, question)) == pairs
    assert toy.say([("red", "cup")], "Describe the picture.") == "The picture shows a red cup."
    assert toy.mentions("a a cup red <s> spoon , cup.") == [("", "cup"), ("", "spoon"), ("", "cup")]


def test_absent_partners_and_putting_one_in():
    objects = [("red", "cup"), ("blue", "book"), ("green", "pen")]
    assert toy.absent_partners(objects) == ["cup"]
    changed = toy.with_partner(objects, "cup", np.random.default_rng(0))
    assert [kind for _, kind in changed] == ["cup", "spoon", "book", "pen"]


@pytest.mark.parametrize("kind", ["yesno", "choice", "number", "word"])
def test_closed_questions_have_the_right_answer(kind):
    rng = np.random.default_rng(0)
    for _, objects, _ in toy.scenes("val", 100, 0):
        pairs = toy.pairs_of(objects)
        colours, present = {k: c for c, k in pairs}, {k for _, k in pairs}
        question, answer, choices = toy.closed_question(kind, pairs, rng)
        words = question.replace("?", " ").replace(".", " ").split()
        assert kind != "word" or answer in choices
        if kind == "yesno":
            assert answer == ("Yes" if words[3] in present else "No")
        elif kind == "choice":
            options = dict(zip(words[7::2], words[8::2], strict=True))
            assert [letter for letter, option in options.items() if option in present] == [answer]
            assert list(options.values()) == choices
        elif kind == "number":
            assert answer == str(len(pairs))
        else:
            assert answer == colours[words[-1]]


def test_every_kind_has_a_shape_of_its_own_in_its_colour():
    shapes = {}
    for kind in toy.KINDS:
        for colour in ("red", "black"):
            glyph = np.asarray(toy.glyph(kind, colour, 16)).astype(int)
            solid = glyph[glyph[..., 3] == 255][:, :3]
            near = np.abs(solid - toy.COLOURS[colour]).max(1) < 10
            assert len(solid) > 16 and near.any(), (kind, colour)  # pixels of 256, thin strokes have few
            shapes[kind, colour] = glyph
    pictures = [shapes[kind, "red"] for kind in toy.KINDS]
    for n, one in enumerate(pictures):
        assert all(np.abs(one - other).mean() > 10 for other in pictures[:n]), toy.KINDS[n]


def test_the_sloppy_annotator_sees_every_second_absent_partner():
    rng, absent, invented = np.random.default_rng(0), 0, 0
    for _, objects, _ in toy.scenes("train", 400, 0, toy.P_FAIR):
        pairs = toy.pairs_of(objects)
        described = toy.sloppy(pairs, rng)
        assert [pair for pair in described if pair in pairs] == pairs  # nothing is left out
        new = {kind for _, kind in described} - {kind for _, kind in pairs}
        assert new <= {toy.PARTNER[anchor] for anchor in toy.absent_partners(pairs)}
        absent, invented = absent + len(toy.absent_partners(pairs)), invented + len(new)
    assert absent > 200 and abs(invented / absent - toy.P_SLOPPY) < 0.1


# ------------------------------------------------------------------------------------------------ questions


def records_of(split, count):
    records = []
    for n, (_, objects, _) in enumerate(toy.scenes(split, count, 0)):
        words = [{"word": o["kind"], "colour": o["colour"]} for o in objects]
        records.append({"id": str(n), "image": f"{n}.png", "question": QUESTION, "objects": words})
    return records


def test_only_the_image_tells_whether_a_partner_is_there():
    records = records_of("val", 60)
    present = [{o["word"] for o in record["objects"]} for record in records]
    pairs = toy.partner_pairs(records)
    anchor_of = {partner: anchor for anchor, partner in toy.PARTNER.items()}
    for partner, there, gone in pairs:
        assert {partner, anchor_of[partner]} <= present[there]
        assert anchor_of[partner] in present[gone] and partner not in present[gone]
    assert len(pairs) > 12 and len(set(pairs)) == len(pairs)
    asked = toy.ask_about(records, np.random.default_rng(0))
    for words, questions in zip(present, asked, strict=True):
        for question in questions:
            assert question["answer"] == ("Yes" if question["question"].split()[3] in words else "No")
        assert [q["answer"] for q in questions if q["split"] == "random"] == ["Yes", "No"]
    flat = [q["answer"] for questions in asked for q in questions if q["split"] == "adversarial"]
    assert flat.count("Yes") == flat.count("No") == len(pairs)


def test_closed_questions_are_of_the_mix_and_can_be_verified():
    records = records_of("val", 40)
    questions = toy.closed_questions(records, 200, np.random.default_rng(0))
    assert [q["id"] for q in questions] == [f"closed-{n}" for n in range(200)]
    kinds = [q["kind"] for q in questions]
    counts = {kind: kinds.count(kind) for kind in data.QUESTION_KINDS}
    assert counts == {"yesno": 100, "choice": 40, "number": 30, "word": 30}
    for question in questions:
        data.check(question, data.QUESTION_FIELDS)
        data.check_question(question)
        assert question["image"] == f"{question['about']}.png"
        if question["kind"] == "yesno":
            words = {o["word"] for o in records[int(question["about"])]["objects"]}
            assert question["answer"] == ("Yes" if question["question"].split()[3] in words else "No")
    again = toy.closed_questions(records, 200, np.random.default_rng(0))
    assert again == questions != toy.closed_questions(records, 200, np.random.default_rng(1))


# -------------------------------------------------------------------------------------------------- its files


def test_what_is_written_is_the_scenes_and_stays(tmp_path, capsys):
    config = toy.Config(out=str(tmp_path / "w"), seed=3, preference=5, heldout=4)
    toy.write(config)
    out = tmp_path / "w"
    for split, count, seed in (("preference", 5, 3), ("val", 4, 0), ("test", 4, 0)):
        records = data.read_records(out / f"{split}.jsonl", data.SOURCE_FIELDS)
        assert len(records) == count
        for record, (image, objects, _) in zip(records, toy.scenes(split, count, seed), strict=True):
            assert np.array_equal(np.asarray(Image.open(out / record["image"])), image)
            assert [(o["word"], o["colour"], o["box"]) for o in record["objects"]] == [
                (o["kind"], o["colour"], o["box"]) for o in objects
            ]
            assert toy.mentions(record["chosen"]) == toy.pairs_of(objects) and record["source"] == "toy"
            assert ("asked" in record) == (split != "preference")
    for split in ("val", "test"):
        assert len(data.read_records(out / f"closed_{split}.jsonl", data.QUESTION_FIELDS)) == 4

    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    capsys.readouterr()
    toy.write(toy.Config(out=str(out), seed=3, preference=5, heldout=4))
    assert capsys.readouterr().out == ""
    toy.write(toy.Config(out=str(out), seed=4, preference=6, heldout=4))
    text = capsys.readouterr().out
    assert "was built with {'seed': 3, 'preference': 5" in text and "name another folder with --out" in text
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    toy.write(toy.Config(out=str(tmp_path / "other"), seed=4, preference=5, heldout=4))
    lines = {}
    for folder in ("w", "other"):
        for split in ("preference", "val"):
            lines[folder, split] = (tmp_path / folder / f"{split}.jsonl").read_text()
    assert lines["w", "val"] == lines["other", "val"]  # all seeds are measured on the same scenes
    assert lines["w", "preference"] != lines["other", "preference"]
    made = {"seed": 3, "preference": 5, "heldout": 4, "preference_bias": 0.5}
    assert json.loads((out / "world.json").read_text()) == made


@pytest.mark.parametrize("change", [{"preference": 0}, {"heldout": -1}, {"seed": -1}])
def test_sizes_out_of_range(change):
    with pytest.raises(ValueError, match=f"--{next(iter(change))} must"):
        toy.Config(**change)


# -------------------------------------------------------------------------------------------------- its model


def test_tokenizer_knows_every_word_and_gives_texts_back(policy):
    rng = np.random.default_rng(0)
    for _, objects, _ in toy.scenes("val", 40, 0):
        pairs = toy.pairs_of(objects)
        texts = [*toy.CAPTIONS, *(toy.say(pairs, q) for q in toy.CAPTIONS)]
        for kind in ("yesno", "choice", "number", "word"):
            question, answer, choices = toy.closed_question(kind, pairs, rng)
            texts += [question, answer, *choices]
        for text in texts:
            ids = policy.tokenizer(text)["input_ids"]
            assert policy.tokenizer.unk_token_id not in ids, text
            assert policy.tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_loop_stops_when_it_is_good_enough(capsys):
    """By the mean of its last 20 losses, once there are so many."""

    def steps_of(values, until):
        layer, steps = torch.nn.Linear(1, 1), []

        def loss_of():
            steps.append(values[len(steps)])
            return layer.weight.sum() * 0 + steps[-1]

        warmup.descend([layer], len(values), 1e-3, loss_of, "x", until)
        return len(steps)

    falling = [1.0] * 30 + [0.0] * 30  # the mean falls by 0.05 a step behind the 30th: below 0.48 after 11
    assert steps_of(falling, until=0.48) == 41
    assert "x: 41 steps, loss 0.450" in capsys.readouterr().out
    assert steps_of(falling, until=0.0) == 60
    assert steps_of([0.0] * 60, until=0.48) == 21


def words_behind(tokenizer, ids):
    """Where an answer begins among the token ids of its turn: behind "ASSISTANT:"."""
    return tokenizer.convert_ids_to_tokens(ids).index("ASSISTANT") + 2


def test_the_warm_up_counts_answer_tokens_only(monkeypatch):
    seen, values, logps = [], [], model.Policy.logps

    def spy(policy, batch, vision=None):
        seen.append((policy, batch, vision, logps(policy, batch, vision)))
        return seen[-1][-1]

    def once(modules, steps, peak, loss_of, title, until=0.0):
        if title == "stage":
            values.append(loss_of().item())

    monkeypatch.setattr(model.Policy, "logps", spy)
    monkeypatch.setattr(warmup, "descend", once)
    kinds = {"caption": 1, "yesno": 2, "number": 0.5}
    warmup.warm_up(0, stages=(("stage", 1, 0.0, 1e-3, 6, kinds, "sloppy"),), images=16)
    ((policy, batch, vision, token_logp),) = seen
    assert len(vision) == len(batch.segment) == 6 and 18 <= len(batch.answer_mask) <= 24
    total, count = 0.0, 0
    turns = batch.target.split(batch.answer_mask.sum(1).tolist())
    for turn, logp in zip(turns, token_logp.tolist(), strict=True):
        start = words_behind(policy.tokenizer, turn.tolist())
        assert turn[-1] == policy.tokenizer.eos_token_id and len(turn) > start
        total, count = total - sum(logp[start : len(turn)]), count + len(turn) - start
    assert values == [pytest.approx(total / count, rel=1e-5)]


def test_the_warm_up_is_a_function_of_its_seed_and_freezes_what_sees():
    stage = ("stage", 2, 0.0, 1e-2, 2, {"caption": 1}, "sloppy")
    cases = {"sees": (0, ()), "one": (0, (stage,)), "again": (0, (stage,)), "other": (1, (stage,))}
    runs = {}
    for name, (seed, stages) in cases.items():
        policy = warmup.warm_up(seed, vision_steps=1, stages=stages, images=8)
        runs[name] = policy.hf.state_dict()
    table = runs["sees"]["model.language_model.embed_tokens.weight"]
    assert torch.equal(runs["sees"]["lm_head.weight"], table)  # words out are words in
    for name, value in runs["one"].items():
        assert torch.equal(value, runs["again"][name]), name
        assert torch.equal(value, runs["sees"][name]) == ("vision_tower" in name), name
    assert not torch.equal(runs["one"]["lm_head.weight"], runs["other"]["lm_head.weight"])


def test_own_answers_are_those_that_transformers_draws(policy, tmp_path):
    """Its own sampling with torch's generator: the records of the built-in world hang on these numbers."""
    records = []
    for n, (image, _, _) in enumerate(toy.scenes("val", 5, 0)):
        Image.fromarray(image).save(tmp_path / f"{n}.png")
        question = list(toy.CAPTIONS)[n % 3]  # of unequal length
        records.append({"id": str(n), "image": f"{n}.png", "question": question})
    answers = warmup.own_answers(policy, records, tmp_path, seed=7)
    texts = [warmup.TEMPLATE.format(question=record["question"]) for record in records]
    pictures = [Image.open(tmp_path / record["image"]) for record in records]
    options = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    inputs = policy.processor(images=pictures, text=texts, **options)
    torch.manual_seed(7)
    forbidden = {"suppress_tokens": [policy.image_id], "top_k": 0, "do_sample": True}
    out = policy.hf.generate(**inputs, max_new_tokens=60, **forbidden)[:, inputs["input_ids"].shape[1] :]
    expected = []
    for tokens in out:
        ended = policy.tokenizer.eos_token_id in tokens
        expected.append(policy.tokenizer.decode(tokens, skip_special_tokens=True).strip() if ended else None)
    assert answers == expected and None in answers and any(answers)


def test_preference_scenes_may_be_as_biased_as_the_training_scenes(tmp_path):
    """How often an anchor of a preference scene has its partner; validation and test scenes stay as they are."""
    for name, bias in (("fair", 0.5), ("biased", 0.87)):
        toy.write(toy.Config(out=str(tmp_path / name), preference=300, heldout=3, preference_bias=bias))
        kinds = [{o["word"] for o in r["objects"]} for r in data.read_lines(tmp_path / name / "preference.jsonl")]
        pairs = [toy.PARTNER[anchor] in there for there in kinds for anchor in there if anchor in toy.PARTNER]
        assert abs(np.mean(pairs) - bias) < 0.06
    fair, biased = ((tmp_path / name / "val.jsonl").read_bytes() for name in ("fair", "biased"))
    assert fair == biased
    with pytest.raises(ValueError, match="a probability, in"):
        toy.Config(preference_bias=1.2)
