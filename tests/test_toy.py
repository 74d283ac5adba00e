"""The built-in world is what it says: boxes hold the objects, the prior is in the training scenes only."""

import numpy as np
import pytest

import toy


def test_scenes_hold_two_to_four_objects_inside_their_boxes():
    empty_background = 60  # the lightest background minus noise stays well above the darkest colours
    for image, objects, _ in toy.scenes("val", 200, 0):
        assert image.shape == (64, 64, 3) and image.dtype == np.uint8
        assert 2 <= len(objects) <= 4 and len({o["kind"] for o in objects}) == len(objects)
        outside = np.ones((64, 64), bool)
        for o in objects:
            x0, y0, x1, y1 = o["box"]
            assert 0 <= x0 < x1 <= 64 and 0 <= y0 < y1 <= 64
            outside[y0:y1, x0:x1] = False
            spread = np.ptp(image[y0:y1, x0:x1].reshape(-1, 3).astype(int), axis=0).max()
            assert spread > empty_background, "nothing is drawn in this box"
        flat = image[outside].astype(int)
        assert np.abs(flat - np.median(flat, axis=0)).max() < empty_background, "something lies outside of all boxes"


def share_with_partner(split, p):
    there = [
        toy.PARTNER[o["kind"]] in {x["kind"] for x in objects}
        for _, objects, _ in toy.scenes(split, 1500, 0, p)
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
