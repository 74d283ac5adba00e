"""Metrics by hand-made cases."""

import math

import numpy as np
import pytest

import eval
import scores

OBJECTS = [("red", "cup"), ("blue", "book")]


def summed(*captions):
    rows = [eval.caption_counts(c, OBJECTS) for c in captions]
    return {name: sum(row[name] for row in rows) for name in rows[0]}


def test_chair_by_hand():
    sums = summed(
        "The picture shows a red cup and a blue book.",  # exact
        "I can see a red cup, a green spoon and a black spoon.",  # one invented kind, named twice; book missed
        "",  # no object at all: stays in the denominator of CHAIR_s
    )
    value = {name: eval.METRICS[name](sums) for name in ("chair_s", "chair_i", "recall", "exact", "words")}
    assert value == pytest.approx(
        {"chair_s": 1 / 3, "chair_i": 2 / 5, "recall": 3 / 6, "exact": 1 / 3, "words": 23 / 3}
    )
    assert eval.METRICS["object_f1"](sums) == pytest.approx(2 * 0.6 * 0.5 / 1.1)


def test_no_mention_at_all_is_undefined_not_an_error():
    sums = summed("", "nothing here")
    assert math.isnan(eval.METRICS["chair_i"](sums)) and math.isnan(eval.METRICS["object_f1"](sums))
    assert eval.METRICS["chair_s"](sums) == 0 and eval.METRICS["recall"](sums) == 0


def test_a_wrong_colour_is_not_exact_but_no_hallucination():
    sums = summed("The picture shows a blue cup and a blue book.")
    assert sums["exact"] == 0 and sums["hallucinated"] == 0 and sums["hits"] == 2


@pytest.mark.parametrize(
    ("answer", "meaning"),
    [("Yes", "Yes"), ("No", "No"), ("no, there is not", "No"), ("There is not. Yes", "No"), ("", "Yes"), ("NO", "Yes"),
     ("Yes. No", "Yes"), ("I know a nose", "Yes")],
)  # fmt: skip
def test_official_yes_no_parsing(answer, meaning):
    assert scores.yes_or_no(answer) == meaning


def test_yes_no_counts():
    counts = eval.yesno_counts(["Yes", "Yes", "No", "No", "Yes"], ["Yes", "No", "No", "Yes", "Yes"], "random")
    assert counts == {"random_asked": 5, "random_tp": 2, "random_fp": 1, "random_fn": 1, "random_tn": 1}
    assert eval.METRICS["pope_random"](counts) == pytest.approx(3 / 5)
    assert eval.METRICS["pope_random_f1"](counts) == pytest.approx(4 / 6)
    assert eval.METRICS["pope_random_yes"](counts) == pytest.approx(3 / 5)


def measured(captions, scores):
    scenes = [
        {
            "id": str(i), "image": f"{i}.png", "question": "?", "chosen": "A red cup and a blue book.",
            "objects": [{"colour": c, "word": w} for c, w in OBJECTS],
            "asked": [{"split": "random", "answer": "Yes"}, {"split": "adversarial", "answer": "No"}],
        }
        for i in range(len(captions))
    ]  # fmt: skip
    names = ("chosen", "rejected", "distorted", "information_gain")
    return {
        "split": "val",
        "scenes": scenes,
        "captions": captions,
        "answers": ["Yes", "Yes"] * len(captions),
        "closed": [{"kind": "number", "answer": "2", "scene": 0}, {"kind": "yesno", "answer": "No", "scene": 1}],
        "closed_answers": ["2", "I think not."],
        "scores": dict(zip(names, np.array(scores, float).T, strict=True)),
    }


def test_summary_of_two_models():
    base = measured(["a red cup and a blue pen"] * 2, [[-5, -5, -6, 1.0], [-5, -4, -6, 2.0]])
    final = measured(["a red cup and a blue book"] * 2, [[-4, -7, -6, 2.0], [-5, -6, -7, 4.0]])
    summary = eval.summarise(final, base)
    assert summary["chair_s"] == 0 and summary["recall"] == 1 and summary["exact"] == 1
    assert summary["pope_random"] == 1 and summary["pope_adversarial"] == 0
    assert summary["closed"] == summary["closed_yesno"] == 1 and summary["closed_in_form"] == 0.5
    assert summary["closed_choice"] is None
    # log-ratios: chosen +1, 0; rejected -2, -2; distorted 0, -1
    assert summary["text_margin"] == pytest.approx((3 + 2) / 2)
    assert summary["image_margin"] == pytest.approx((1 + 1) / 2)
    assert summary["fairness"] == pytest.approx(1 / 2.5)
    assert summary["chosen_shift"] == pytest.approx(0.5) and summary["information_gain"] == 3
    low, high = summary["interval"]["text_margin"]
    assert low == 2 and high == 3  # with two scenes, resampling ends in either of them
    assert eval.summarise(base, base)["fairness"] is None
    assert "undefined" in eval.table_text({"base": eval.summarise(base, base), "final": summary})
    assert "[pen]" in eval.samples_text({"base": base, "final": final})


def test_invented_words_are_marked():
    assert eval.marked("a red cup, a black spoon.", {"cup"}) == "a red cup, a black [spoon]."


# ----------------------------------------------------------------------------------- closed-ended questions

YESNO = {"kind": "yesno", "answer": "Yes"}
CHOICE = {"kind": "choice", "answer": "B", "choices": ["cup", "red pen", "fork"]}
NUMBER = {"kind": "number", "answer": "3"}
COLOUR = {"kind": "word", "answer": "red", "choices": ["red", "green"]}
WORD = {"kind": "word", "answer": "The Eiffel Tower"}
DARK = {"kind": "word", "answer": "dark red", "choices": ["red", "dark red"]}


@pytest.mark.parametrize(
    ("question", "text", "said", "right", "form"),
    [
        (YESNO, "Yes", "Yes", True, True),
        (YESNO, "yes.", "Yes", True, True),
        (YESNO, "Yes, there is a cup.", "Yes", True, False),
        (YESNO, "No", "No", False, True),
        (YESNO, "There is not a cup.", "No", False, False),
        (YESNO, "Yes and no", None, False, False),  # both: says nothing
        (YESNO, "There is a cup.", None, False, False),
        (YESNO, "nobody knows", None, False, False),
        (YESNO, "", None, False, False),
        (CHOICE, "B", "B", True, True),
        (CHOICE, "(B)", "B", True, True),
        (CHOICE, "B.", "B", True, True),
        (CHOICE, "B. red pen", "B", True, False),
        (CHOICE, "(A) cup", "A", False, False),
        (CHOICE, "The answer is B", "B", True, False),
        (CHOICE, "The answer is A or the answer is B", None, False, False),
        (CHOICE, "The red pen.", "B", True, False),
        (CHOICE, "A red pen", "B", True, False),  # the article is not the letter
        (CHOICE, "D", None, False, False),  # there is no D
        (CHOICE, "A, B, C", None, False, False),
        (CHOICE, "cup fork", None, False, False),
        (CHOICE, "A. B. C.", None, False, False),
        (CHOICE, "(A) (B)", None, False, False),
        (CHOICE, "B. A red pen, not vitamin C.", None, False, False),
        (NUMBER, "\u0663", None, False, False),  # digits of another script are not the form asked for
        (NUMBER, "3", "3", True, True),
        (NUMBER, "There are 3.", "3", True, False),
        (NUMBER, "03", "3", True, False),
        (NUMBER, "3 or 4", None, False, False),
        (NUMBER, "9" * 5000, "9" * 5000, False, True),
        (NUMBER, "three", None, False, False),
        (COLOUR, "red", "red", True, True),
        (COLOUR, "Red.", "red", True, True),
        (COLOUR, "It is red", "red", True, False),
        (COLOUR, "red green", None, False, False),
        (COLOUR, "reddish", None, False, False),
        (WORD, "the eiffel tower", "eiffel tower", True, True),
        (WORD, "Eiffel Tower", "eiffel tower", True, True),
        (WORD, "tower", "tower", False, False),
        (WORD, "i do not know what it is", "i do not know what it is", False, False),
        (DARK, "dark red", "dark red", True, True),
        (DARK, "it is dark red", None, False, False),  # names "red" as well
    ],
)  # fmt: skip
def test_answers_to_closed_ended_questions(question, text, said, right, form):
    assert scores.closed_answer(text, question) == said
    assert scores.is_right(text, question) is right and scores.in_form(text, question) is form


@pytest.mark.parametrize("question", [YESNO, CHOICE, NUMBER, COLOUR, WORD])
@pytest.mark.parametrize("text", ["\x00\ud800", "<image></s>", "(" * 3000, "\n", "²", "No" * 999])
def test_no_text_breaks_the_rules(question, text):
    assert not scores.is_right(text, question)


def test_the_rules_give_full_marks_to_the_truth():
    for question in (YESNO, CHOICE, NUMBER, COLOUR):
        assert scores.is_right(question["answer"], question) and scores.in_form(question["answer"], question)


def test_closed_ended_accuracy_is_pooled_over_kinds():
    sums = {f"closed_{kind}_{n}": 0.0 for kind in ("yesno", "choice", "number", "word") for n in ("asked", "right")}
    sums |= {"closed_yesno_asked": 6.0, "closed_yesno_right": 3.0, "closed_word_asked": 2.0, "closed_word_right": 2.0}
    assert eval.METRICS["closed"](sums) == 5 / 8 and eval.METRICS["closed_yesno"](sums) == 0.5
    assert math.isnan(eval.METRICS["closed_choice"](sums))
    assert eval.METRICS["closed_in_form"](sums | {"closed_in_form": 4.0}) == 0.5


def test_what_an_attack_adds_by_hand():
    truths = ["I can see a red cup and a blue book."] * 2
    clean = ["I can see a red cup and a red spoon.", "I can see a red cup and a blue book."]
    mined = ["I can see a red cup, a red spoon and a red spoon.", "I can see a red pen, a red key and a blue book."]
    values = eval.mined_values(truths, mined, clean)
    # First: the spoon is wrong but was named before. Second: pen and key are wrong and new.
    assert values["chair_s"] == 1.0 and values["adds"] == 0.5 and values["absent"] == 1.5
    assert values["recall"] == 2 / 4
    assert eval.mined_values(truths, clean, clean)["adds"] == 0
