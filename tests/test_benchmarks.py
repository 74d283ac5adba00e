"""Benchmarks by hand-made cases whose answers are known from the official definitions."""

import json
import random

import numpy as np
import pytest
from conftest import finished, forked, refused, run_here
from PIL import Image

import data
import hub
import model
import parts
import toy
import warmup
from extras import benchmarks, sources

SYNONYMS = """person, man, woman, child, children, people, passenger, baby, grandchild
car, taxi
cow, zebu
broccoli
dog, puppy, pup, corgi, doberman
toilet, urinal
chair, seat, stool
bus, minibus
tie, bow, bow tie
hot dog
cup
wine glass
elephant
train, locomotive
motorcycle,  motor bike, motor cycle
knife, pocketknife, knive
skis, ski
scissors
couch, sofa
tv, television
traffic light, street light
mouse
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "s.txt").write_text(SYNONYMS)
    return tmp_path


def lines(path, *records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def flags(files):
    return [part for name, path in files.items() for part in (f"--{name}", path)]


def score(monkeypatch, folder, bench, *more, **files):
    out = ("--json", folder / "out.json")
    assert run_here(monkeypatch, benchmarks, bench, *flags(files), *out, *more) == 0
    return json.loads((folder / "out.json").read_text())


# ------------------------------------------------------------------------------------------------------ CHAIR


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("Two dogs and a puppy.", ["dog", "dog"]),
        ("A hot dog, two hot dogs.", ["hot dog", "hot dog"]),
        ("The toilet seat is up; the seat of the toilet is white.", ["toilet", "toilet"]),
        ("A seat beside a chair.", ["chair", "chair"]),
        ("A baby elephant and its baby.", ["elephant", "person"]),
        ("The passenger trains wait for a passenger.", ["train", "person"]),
        ("A bow tie and three ties on men's shirts.", ["tie", "tie", "person"]),
        ("Buses, a bus, busses and MINIBUSES!", ["bus", "bus", "bus", "bus"]),
        ("Wine glasses, glasses and a glass of wine.", ["wine glass"]),
        ("Knives, pocketknives, scissors, skis and a ski", ["knife", "knife", "scissors", "skis", "skis"]),
        ("women,children/people: couches and TVs.The dog", ["person", "person", "person", "couch", "tv", "dog"]),
        ("a motor bike under traffic lights", ["motorcycle", "traffic light"]),
        ("The dog's bowl is a dog-bowl.", ["dog"]),
        ("Taxis and zebus, corgis, broccolis; a cross", ["car", "cow", "dog", "broccoli"]),
        ("grandchildren with dobermen: a child and children, people", ["person", "dog", "person", "person", "person"]),
        ("Two mice.", ["mouse"]),
        ("A nice view.", []),
        ("", []),
    ],
)
def test_objects_named_in_a_text(folder, text, named):
    assert [kind for _, kind in benchmarks.Objects(folder / "s.txt").mentions(text)] == named


def test_a_word_in_two_classes_is_of_the_first(tmp_path):
    (tmp_path / "s.txt").write_text("car, bus\nbus\n")
    assert benchmarks.Objects(tmp_path / "s.txt").class_of["bus"] == "car"


def test_a_plural_that_is_a_class_of_its_own_stays(tmp_path):
    (tmp_path / "s.txt").write_text("glasses, spectacles\nglass, tumbler\n")
    mentions = benchmarks.Objects(tmp_path / "s.txt").mentions("Glasses, a glass, tumblers.")
    assert mentions == [("glasses", "glasses"), ("glass", "glass"), ("tumbler", "glass")]


CAPTIONS = [  # id, objects, reference captions, answer
    (1, ["dog"], ["a puppy and a man"], "A dog, a dog and two puppies beside a woman with a cup and a cup."),
    (2, ["toilet"], [], "The toilet seat is up. The seat of the toilet is white."),
    (3, ["Hot  dog", "cup"], ["Two wine glasses"], "A nice view."),
    (4, ["bus"], ["a bus"], ""),
    (5, ["person"], [], "A man eats a hot dog."),
]


def chair_files(folder, cases=CAPTIONS):
    return {
        "answers": lines(folder / "a.jsonl", *({"id": i, "answer": answer} for i, _, _, answer in cases)),
        "objects": lines(folder / "o.jsonl", *({"id": i, "objects": o, "captions": c} for i, o, c, _ in cases)),
        "synonyms": folder / "s.txt",
    }


def test_chair_by_hand(folder, monkeypatch, capsys):
    out = score(monkeypatch, folder, "chair", **chair_files(folder))
    # 1: 3 dogs, person, 2 cups, which are wrong; 2: toilet toilet; 3, 4: none; 5: person, hot dog, a wrong one.
    assert out["chair_s"] == 2 / 5 and out["chair_i"] == 3 / 10
    # There: dog person | toilet | hot dog, cup, wine glass | bus | person; named: dog person toilet person.
    assert out["recall"] == 4 / 8 and out["coverage"] == 3 / 5
    assert out["length"] == (16 + 12 + 3 + 0 + 6) / 5
    assert out["counts"] == {
        "captions": 5,
        "hallucinated_captions": 2,
        "captions_with_objects": 3,
        "mentions": 10,
        "hallucinated_mentions": 3,
        "objects": 8,
        "objects_named": 4,
    }
    assert out["interval"]["recall"][0] < 0.5 < out["interval"]["recall"][1]
    assert "response_rate" not in out and out["settings"]["bench"] == "chair" and out["unit"] == "images"
    text = capsys.readouterr().out
    assert "recall: objects there that are named" in text and "captions 5" in text
    assert "95 % intervals" in text and f"synonyms {folder / 's.txt'}" in text


def test_object_halbench_by_hand(folder, monkeypatch):
    out = score(monkeypatch, folder, "objhal", **chair_files(folder))
    assert out["response_rate"] == 2 / 3  # of the three answers with an object at all
    # Words once an answer: dog puppy woman cup | toilet | man hot dog; of these cup and hot dog are wrong.
    assert out["mention_rate"] == 2 / 7
    assert out["chair_s"] == 2 / 5 and out["chair_i"] == 3 / 10 and out["coverage"] == 3 / 5


def test_a_plural_in_the_table_is_the_same_word(folder, monkeypatch):
    cases = [(1, ["person", "skis"], [], "A person, people, a child and children on skis, a ski; a cup.")]
    # person, child, ski, cup: one of four words is wrong, one of seven mentions.
    out = score(monkeypatch, folder, "objhal", **chair_files(folder, cases))
    assert out["mention_rate"] == 1 / 4 and out["chair_i"] == 1 / 7


def test_no_mention_in_the_corpus_is_undefined_and_said(folder, monkeypatch, capsys):
    out = score(monkeypatch, folder, "chair", **chair_files(folder, CAPTIONS[2:4]))
    assert out["chair_s"] == 0 and out["chair_i"] is None and out["recall"] == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("CHAIR_i"))
    assert row.endswith("undefined")


def test_captions_of_one_image_are_one_row(folder, monkeypatch):
    files = chair_files(folder)
    lines(files["objects"], *(record | {"image": "a.png"} for record in data.read_lines(files["objects"])))
    out = score(monkeypatch, folder, "chair", **files)
    assert out["images"] == 1 and out["chair_i"] == 3 / 10 and out["counts"]["captions"] == 5


# ------------------------------------------------------------------------------------------------------- POPE

POPE = [  # image, label, answer, how the official rule reads it
    ("a", "yes", "Yes", "yes"),
    ("a", "no", "No, there is no dog in the image.", "no"),
    ("a", "yes", "There is a dog in the image.", "yes"),
    ("b", "no", "", "yes"),
    ("b", "no", "NO", "yes"),
    ("b", "yes", "There is not, a dog.", "no"),
    ("b", "no", "I see. No.", "yes"),  # only the text before the first full stop counts
    ("b", "no", "There's nothing", "yes"),
]


def pope_files(folder, cases=POPE):
    text = "Is there a dog in the image?"
    asked = [
        {"question_id": n, "image": f"{image}.png", "text": text, "label": label}
        for n, (image, label, _, _) in enumerate(cases)
    ]
    answers = [{"question_id": n, "answer": answer} for n, (_, _, answer, _) in enumerate(cases)]
    return {"questions": lines(folder / "q.jsonl", *asked), "answers": lines(folder / "a.jsonl", *answers)}


def test_pope_by_hand(folder, monkeypatch, capsys):
    out = score(monkeypatch, folder, "pope", **pope_files(folder))
    pairs = [(label, said) for _, label, _, said in POPE]
    kinds = (("yes", "yes"), ("no", "yes"), ("yes", "no"), ("no", "no"))
    tp, fp, fn, tn = (pairs.count(pair) for pair in kinds)
    assert (tp, fp, fn, tn) == (2, 4, 1, 1)
    assert [out["counts"][name] for name in ("asked", "tp", "fp", "fn", "tn")] == [8, tp, fp, fn, tn]
    assert out["accuracy"] == 3 / 8 and out["precision"] == 2 / 6 and out["recall"] == 2 / 3
    assert out["f1"] == pytest.approx(2 * (1 / 3) * (2 / 3) / 1) and out["yes_ratio"] == 6 / 8
    assert out["neither"] == 3 and out["no_read_as_yes"] == 2 and out["images"] == 2
    text = capsys.readouterr().out
    assert "3 answers held neither a yes nor a no" in text and "2 answers say no" in text
    assert out["notes"][0] in text and out["settings"]["answers"] == str(folder / "a.jsonl")


def test_labels_of_any_case(folder, monkeypatch):
    files = pope_files(folder, [("a", "Yes", "Yes", ""), ("a", "No", "No", "")])
    assert score(monkeypatch, folder, "pope", **files)["accuracy"] == 1


def test_intervals_are_those_of_a_plain_loop_over_images(folder, monkeypatch):
    rng = random.Random(0)
    kinds = [("yes", "Yes", ""), ("no", "Yes", ""), ("no", "No", "")]
    cases = [(str(n // 4), *rng.choice(kinds)) for n in range(80)]
    interval = score(monkeypatch, folder, "pope", **pope_files(folder, cases))["interval"]["accuracy"]
    right = [[label == said.lower() for _, label, said, _ in cases[i : i + 4]] for i in range(0, 80, 4)]
    right, draw = np.array(right), np.random.default_rng(7)
    drawn = [right[draw.integers(20, size=20)].mean() for _ in range(4000)]
    assert np.allclose(interval, np.quantile(drawn, [0.025, 0.975]), atol=0.02)


def test_two_files_compared_over_the_same_images(folder, monkeypatch, capsys):
    files = pope_files(folder, POPE * 10)
    better = [{"question_id": n, "answer": case[1].capitalize()} for n, case in enumerate(POPE * 10)]
    other = lines(folder / "better.jsonl", *better)
    args = ["pope", "--questions", files["questions"], "--json", folder / "out.json"]
    assert run_here(monkeypatch, benchmarks, *args, "--compare", files["answers"], other) == 0
    out = json.loads((folder / "out.json").read_text())
    first, second, difference = out["a_b_difference"]["accuracy"]
    assert first[0] == 3 / 8 and second[0] == 1 and difference[0] == 5 / 8
    # Of image a 3 of 3 are right, of b 0 of 5: drawn are a alone, b alone or both.
    assert first[1] == [0, 1] and second[1] == [1, 1] and difference[1] == [0, 1]
    assert out["compare"] == [str(files["answers"]), str(other)] and out["settings"]["bench"] == "pope"
    assert "difference" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------ closed-ended, MME


def closed_files(folder, cases):
    asked = [{"id": str(n), **question} for n, (question, _, _) in enumerate(cases)]
    answers = [{"id": str(n), "answer": answer} for n, (_, answer, _) in enumerate(cases)]
    return {"questions": lines(folder / "q.jsonl", *asked), "answers": lines(folder / "a.jsonl", *answers)}


def choice(answer="B", **more):
    choices = ["a", "b", "c"]
    return {"image": "0.png", "question": "Q", "kind": "choice", "answer": answer, "choices": choices, **more}


def yesno(answer, image, category="existence"):
    record = {"image": image, "question": "Q", "kind": "yesno", "answer": answer}
    return record | {"category": category, "source": "mme"}


def test_letters_by_the_rule_of_llava(folder, monkeypatch):
    right = ("B", "B. b", "(B) b", "B) b", "The answer is B.", "B. C.")
    wrong = ("A", "b", "Because", "", "D", "The answer is B. The answer is A.", "It is B")
    cases = [(choice(category="x"), text, 1) for text in right]
    cases += [(choice(category="y"), text, 0) for text in wrong]
    out = score(monkeypatch, folder, "closed", **closed_files(folder, cases))
    assert out["accuracy"] == len(right) / len(cases) and out["/x"] == 1 and out["/y"] == 0
    assert out["unread"] == len(wrong) - 1 and "choice" not in out  # a kind alone is no row of its own
    assert benchmarks.letter("D", ["a", "b", "c"]) == ""


def test_yes_and_no_in_a_sentence(folder, monkeypatch):
    """Our own questions are read as the rewards read them, MME's as MME does."""
    own = {"image": "0.png", "question": "Q", "kind": "yesno", "answer": "No", "category": ""}
    files = closed_files(folder, [(own, "There is no dog.", 1), (own, "Maybe.", 0)])
    out = score(monkeypatch, folder, "closed", **files)
    assert out["accuracy"] == 1 / 2 and out["unread"] == 1 and "mme" not in out
    asked = [(yesno("No", "1"), "There is no dog.", 0), (yesno("Yes", "1"), "Yes.", 1)]
    out = score(monkeypatch, folder, "closed", **closed_files(folder, asked))
    assert out["accuracy"] == 1 / 2 and out["unread"] == 1 and out["mme"] == 50


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Yes.", "yes"),
        ("YES", "yes"),
        (" yes", "yes"),
        ("y", ""),
        ("no, it is not", "no"),
        ("it is yes", ""),
        ("know", "no"),  # by the script's letter
        ("not", "no"),
        ("", ""),
    ],
)
def test_yes_and_no_as_mme_reads_them(text, said):
    assert benchmarks.mme_answer(text) == said


def test_mme_score_by_hand(folder, monkeypatch, capsys):
    cases = [
        (yesno("Yes", "1"), "yes.", 1),
        (yesno("No", "1"), "No, it is not.", 1),  # both right
        (yesno("Yes", "2"), "yes!", 1),
        (yesno("No", "2"), "Yes", 0),
        (yesno("Yes", "3", "count"), "", 0),
        (yesno("No", "3", "count"), "No", 1),
    ]
    out = score(monkeypatch, folder, "closed", **closed_files(folder, cases))
    # existence: 3 of 4 right, 1 of 2 images; count: 1 of 2, 0 of 1.
    assert out["mme"] == 75 + 50 + 50 + 0 and out["accuracy"] == 4 / 6 and out["/count"] == 0.5
    assert "MME score, of 400" in capsys.readouterr().out


def test_half_of_mme_is_no_score(folder, monkeypatch, capsys):
    files = closed_files(folder, [(yesno("Yes", "1"), "yes", 1)])
    assert "has 1 questions, not 2" in refused(monkeypatch, capsys, benchmarks, "closed", *flags(files))


def test_closed_ended_answers_by_kind(folder, monkeypatch):
    number = {"image": "1.png", "question": "Q", "kind": "number", "answer": "2", "choices": []}
    word = {"image": "1.png", "question": "Q", "kind": "word", "answer": "red", "choices": ["red", "blue"]}
    cases = [(number, "2 cups", 1), (number, "two or three", 0), (word, "Red.", 1), (word, "red or blue", 0)]
    out = score(monkeypatch, folder, "closed", **closed_files(folder, [*cases, (choice(), "B", 1)]))
    assert (out["accuracy"], out["number"], out["word"], out["choice"], out["unread"]) == (3 / 5, 0.5, 0.5, 1, 2)


# ----------------------------------------------------------------------------------------------- AMBER, MMHal


def amber_files(folder, notes, responses, queries=None):
    files = {"annotations": notes, "answers": responses} | ({"questions": queries} if queries else {})
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return {name: folder / f"{name}.json" for name in files}


def test_amber_by_hand(folder, monkeypatch, capsys):
    cases = [  # type, truth, response
        ("discriminative-hallucination", "no", "No"),
        ("discriminative-hallucination", "no", "Yes"),
        ("discriminative-attribute-state", "yes", "No"),
        ("discriminative-attribute-number", "no", "no"),
        ("discriminative-relation", "yes", "Yes"),
        ("relation", "no", "No"),
    ]
    notes = [{"id": 1005 + n, "type": kind, "truth": truth} for n, (kind, truth, _) in enumerate(cases)]
    notes.insert(0, {"id": 1, "type": "generative", "truth": ["sky"], "hallu": ["cloud"]})
    responses = [{"id": 1005 + n, "response": response} for n, (_, _, response) in enumerate(cases)]
    responses.insert(0, {"id": 1, "response": "A sky."})
    out = score(monkeypatch, folder, "amber", **amber_files(folder, notes, responses))
    # No is positive: said 3 times, 2 rightly; true 4 times. "no" is neither: wrong, and no predicted no.
    assert out["accuracy"] == 3 / 6 and out["precision"] == 2 / 3 and out["recall"] == 2 / 4
    assert out["f1"] == pytest.approx(4 / 7) and out["counts"] == {"asked": 6, "right": 3, "no": 4, "said_no": 3}
    assert out["relation accuracy"] == 1 and out["relation f1"] == 1 and out["attribute precision"] == 0
    assert out["existence recall"] == 1 / 2 and out["existence f1"] == pytest.approx(2 / 3)
    assert out["attribute accuracy"] == 0 and out["unit"].startswith("questions")
    text = capsys.readouterr().out
    assert "1 answers were neither Yes nor No" in text
    assert "1 descriptions are for the official script" in text


def test_amber_by_images_and_without_gaps(folder, monkeypatch, capsys):
    notes = [{"id": n, "type": "relation", "truth": "no"} for n in (1, 2, 3)]
    queries = [{"id": n, "image": "a.png", "query": "Q"} for n in (1, 2)]
    responses = [{"id": n, "response": "No"} for n in (1, 2)]
    files = amber_files(folder, notes, responses, queries)
    out = score(monkeypatch, folder, "amber", **files)
    assert out["images"] == 1 and out["unit"] == "images" and "existence accuracy" not in out
    amber_files(folder, notes, responses[:1], queries)
    assert "id '2' has no answer" in refused(monkeypatch, capsys, benchmarks, "amber", *flags(files))
    assert score(monkeypatch, folder, "amber", "--skip_bad", **files)["asked"] == 1
    amber_files(folder, notes, [*responses, {"id": 3, "response": "No"}], queries)
    assert "id '3' is not asked" in refused(monkeypatch, capsys, benchmarks, "amber", *flags(files))
    amber_files(folder, notes[1:], responses, queries)
    text = refused(monkeypatch, capsys, benchmarks, "amber", *flags(files))
    assert "item 1: field 'id' must be one of" in text and "annotations.json, got '1'" in text


def test_descriptions_alone_are_not_scored(folder, monkeypatch, capsys):
    notes = [{"id": 1, "type": "generative"}, {"id": 2, "type": "relation", "truth": "no"}]
    files = amber_files(folder, notes, [{"id": 1, "response": "A sky."}])
    text = refused(monkeypatch, capsys, benchmarks, "amber", *flags(files))
    assert "answers no question that is scored here; descriptions are not" in text


@pytest.mark.parametrize(
    ("note", "message"),
    [
        ({"type": "relation", "truth": "maybe"}, "field 'truth' must be yes or no, got 'maybe'"),
        ({"type": "relation", "truth": ["yes"]}, "field 'truth' must be yes or no"),
        ({"type": "relations", "truth": "no"}, "field 'type' must be a type of AMBER's, got 'relations'"),
    ],
)
def test_mistakes_in_ambers_annotations(folder, monkeypatch, capsys, note, message):
    files = amber_files(folder, [{"id": 1, **note}], [{"id": 1, "response": "No"}])
    assert message in refused(monkeypatch, capsys, benchmarks, "amber", *flags(files))


def test_mmhal_by_hand(folder, monkeypatch, capsys):
    texts = ["Rating: 5", "explanation... rating: 2", "no number", "Rating: 3 or rating: 4"] * 24
    answers = [{"choices": [{"message": {"content": text}}]} for text in texts[:48]]
    answers += [{"answer": text} for text in texts[48:52]] + texts[52:]
    judged, other, both = (folder / f"{name}.json" for name in ("judged", "other", "both"))
    judged.write_text(json.dumps(answers))
    out = score(monkeypatch, folder, "mmhal", judged=judged, judge="gpt-4-0314")
    assert out["score"] == 7 / 4 and out["hallucination_rate"] == 3 / 4 and out["hallucinated"] == 72
    assert [out[name] for name in benchmarks.MMHAL_TYPES] == [5, 2, 0, 0] * 2 and out["unit"] == "questions"
    text = capsys.readouterr().out
    assert "judge: gpt-4-0314. 48 of its answers hold no rating" in text
    assert out["settings"]["judge"] == "gpt-4-0314"
    other.write_text(json.dumps(["rating: 6"] * 96))
    args = ("--compare", judged, other, "--judge", "x", "--json", both)
    assert run_here(monkeypatch, benchmarks, "mmhal", *args) == 0
    assert json.loads(both.read_text())["a_b_difference"]["score"][2][0] == 6 - 7 / 4
    args = ("mmhal", "--judged", judged)
    assert "--judge are needed" in refused(monkeypatch, capsys, benchmarks, *args)
    judged.write_text(json.dumps(answers[:90]))
    assert "holds 90 judge answers" in refused(monkeypatch, capsys, benchmarks, *args, "--judge", "x")
    for bad in (7, {"choices": []}, {"choices": [{"message": {"content": None}}]}, {"choices": 3}):
        judged.write_text(json.dumps([*answers[:95], bad]))
        text = refused(monkeypatch, capsys, benchmarks, *args, "--judge", "x")
        assert "judged.json, item 96: no text of a judge" in text


def test_a_rating_of_three_is_no_hallucination(folder, monkeypatch):
    (folder / "j.json").write_text(json.dumps(["rating: 3", "rating: 2"] * 48))
    assert score(monkeypatch, folder, "mmhal", judged=folder / "j.json", judge="x")["hallucination_rate"] == 0.5


# --------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("a", "{broken", "a.jsonl, line 6: not JSON"),
        ("a", {"id": 5}, "a.jsonl, line 6: has no 'answer'"),
        ("a", {"id": 6, "answer": None}, "a.jsonl, line 6: has no 'answer' that is a text"),
        ("a", {"answer": "x"}, "a.jsonl, line 6: has no 'question_id' or 'id'"),
        ("a", {"id": True, "answer": "x"}, "a.jsonl, line 6: has no 'question_id' or 'id'"),
        ("a", {"id": "1", "answer": "x"}, "a.jsonl, line 6: id '1' was used before"),
        ("a", {"id": 9, "answer": "x"}, "a.jsonl: id '9' is not asked"),
        ("a", {"id": 9, "answer": None, "text": "prompt"}, "a.jsonl, line 6: has no 'answer' that is a text"),
        ("a", {"id": 9, "text": "Is it?", "label": "no"}, "a.jsonl, line 6: is a question"),
        ("a", {"id": 9, "answer": "a", "response": "b"}, "a.jsonl, line 6: 'answer' and 'response' differ"),
        ("a", {"question_id": 1.0, "id": 9, "answer": "a"}, "a.jsonl, line 6: has no 'question_id' or 'id'"),
        ("o", {"id": 9, "objects": ["dog"], "captions": []}, "a.jsonl: id '9' has no answer"),
        ("o", {"id": 9, "objects": ["whale"], "captions": []}, "o.jsonl, line 6: field 'objects' must be classes"),
        ("o", {"id": 9, "objects": "dog", "captions": []}, "field 'objects' must be a list"),
        ("o", {"id": 9, "objects": [1], "captions": []}, "must hold texts only"),
        ("o", {"id": 9, "objects": [], "captions": [], "image": 3}, "field 'image' must be a str"),
        ("o", [1], "must be a JSON object"),
    ],
)
def test_mistakes_in_files_of_answers(folder, monkeypatch, capsys, file, line, message):
    files = chair_files(folder)
    path = folder / f"{file}.jsonl"
    path.write_text(path.read_text() + (line if isinstance(line, str) else json.dumps(line)) + "\n")
    args = ["chair", *flags(files), "--json", folder / "out.json"]
    assert message in refused(monkeypatch, capsys, benchmarks, *args) and not (folder / "out.json").exists()
    assert run_here(monkeypatch, benchmarks, *args, "--skip_bad") == 0
    assert json.loads((folder / "out.json").read_text())["chair_i"] == 3 / 10
    text = capsys.readouterr().out
    assert "1 records dropped: " in text or "1 left out, as id '9', which " in text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["bleu"], "what to do first: chair | objhal | pope | closed | amber | mmhal | llavabench | mmvet; got 'bleu'"),
        ([], "what to do first: chair | objhal"),
        (["pope"], "--answers is needed"),
        (["pope", "--answers", "a.jsonl"], "--questions is needed: name the file"),
        (["chair", "--answers", "a.jsonl", "--objects", "o.jsonl"], "--synonyms is needed"),
        (["chair", "--answers", "a", "--objects", "o.jsonl", "--synonyms", "nowhere.txt"], "'nowhere.txt'"),
        (["pope", "--compare", "a.jsonl"], "--compare takes two"),
        (["pope", "--compare", "a.jsonl", "b.jsonl", "--skip_bad"], "neither --model nor --skip_bad"),
        (["closed", "--answers", "a.jsonl", "--questions", "mme.jsonl"], "field 'category' is missing"),
        (["pope", "--answers", "a.jsonl", "--questions", "nowhere.jsonl"], "no such file"),
        (["pope", "--answers", "a.jsonl", "--questions", "q.jsonl"], "field 'label' must be yes or no"),
        (["pope", "--answers", "a.jsonl", "--questions", "q.jsonl", "--skip_bad"], "no usable records"),
        (["pope", "--answers", "a", "--batch", "0"], "--batch must be positive"),
        (["pope", "--answers", "a", "--max_new_tokens", "-1"], "--max_new_tokens must not be negative"),
        (["pope", "--answers", "a", "--convention", "mine"], "--convention"),
        (["amber", "--answers", "a", "--annotations", "notes.jsonl", "--model", "m"], "--questions is needed"),
        (["mmhal", "--answers", "a"], "--judged and --judge are needed"),
        (["mmhal", "--model", "m", "--judged", "j", "--judge", "x"], "--answers is needed"),
    ],
)
def test_mistakes_on_the_command_line(folder, monkeypatch, capsys, args, message):
    monkeypatch.chdir(folder)
    lines(folder / "q.jsonl", {"question_id": 1, "image": "a", "text": "Q", "label": "maybe"})
    mme = {"id": "1", "image": "a", "question": "Q", "kind": "yesno", "answer": "No", "source": "mme"}
    lines(folder / "mme.jsonl", mme)
    lines(folder / "notes.jsonl", {"id": 1, "type": "generative"})
    chair_files(folder)
    assert message in refused(monkeypatch, capsys, benchmarks, *args)


def test_all_answers_of_another_benchmark(folder, monkeypatch, capsys):
    files = pope_files(folder)
    lines(files["answers"], {"id": "x", "answer": "Yes"})
    text = refused(monkeypatch, capsys, benchmarks, "pope", *flags(files))
    assert "a.jsonl: answers no question" in text


def test_an_answers_file_may_carry_the_labels():
    assert benchmarks.answer_of({"answer": "Yes", "label": "no"}) == "Yes"


# -------------------------------------------------------------------------------- answering with a checkpoint


@pytest.fixture(scope="module")
def small(policy, tmp_path_factory):
    """A folder with a checkpoint of random weights, base/, and the images of five toy scenes."""
    folder = tmp_path_factory.mktemp("small")
    hub.save_new(policy, folder / "base")
    for n, (image, _, _) in enumerate(toy.scenes("val", 5, 0)):
        Image.fromarray(image).save(folder / f"{n}.png")
    return folder


@pytest.fixture
def asked(folder):
    """Questions about these images in the files of each benchmark: {bench: flags}."""
    images, ask = [f"{n}.png" for n in range(5)], "Describe the picture."
    (folder / "s.txt").write_text("cup\nbook\n")
    objects = {"objects": ["cup"], "captions": [], "question": ask}
    lines(folder / "o.jsonl", *({"id": f"x{n}", "image": name, **objects} for n, name in enumerate(images)))
    label = {"text": "Is there a cup in the picture?", "label": "no"}
    lines(folder / "q.jsonl", *({"question_id": n, "image": name, **label} for n, name in enumerate(images)))
    lines(folder / "c.jsonl", *({"id": str(n), **choice(), "image": name} for n, name in enumerate(images)))
    notes = [{"id": n, "type": "generative"} for n in (1, 2)]
    notes += [{"id": 1005, "type": "relation", "truth": "no"}]
    notes += [{"id": 1006, "type": "discriminative-relation", "truth": "yes"}]
    (folder / "notes.json").write_text(json.dumps(notes))
    queries = [{"id": note["id"], "image": "0.png", "query": ask} for note in notes]
    (folder / "queries.json").write_text(json.dumps(queries))
    template = {"question_type": "x", "image_content": ["a"], "gt_answer": "a", "model_answer": ""}
    mmhal = [{**template, "question": ask, "image_src": f"http://x/{name}"} for name in images]
    (folder / "mmhal.json").write_text(json.dumps(mmhal))
    captions = ["--objects", folder / "o.jsonl", "--synonyms", folder / "s.txt"]
    return {
        "chair": captions,
        "objhal": captions,
        "pope": ["--questions", folder / "q.jsonl"],
        "closed": ["--questions", folder / "c.jsonl"],
        "amber": ["--questions", folder / "queries.json", "--annotations", folder / "notes.json"],
        "mmhal": ["--questions", folder / "mmhal.json"],
    }


def answer(small, asked, bench, out, batch=2):
    args = [bench, "--model", small / "base", "--images", small, "--answers", out, "--batch", batch]
    return [*args, "--max_new_tokens", 20, *asked[bench]]


@pytest.mark.parametrize("bench", ["chair", "objhal", "pope", "closed", "amber", "mmhal"])
def test_a_checkpoint_answers_in_the_official_form(small, folder, asked, monkeypatch, capsys, bench):
    out = folder / "new" / "answers.json"
    assert run_here(monkeypatch, benchmarks, *answer(small, asked, bench, out)) == 0
    text = capsys.readouterr().out
    assert "were cut at 20 new tokens" in text and not list(out.parent.glob("*parts*"))
    if bench == "amber":
        answers = json.loads(out.read_text())
        assert [set(line) for line in answers] == [{"id", "response"}] * 4
        assert answers[2]["id"] == 1005 and "answers were neither Yes nor No" in text
    elif bench == "mmhal":
        answers, template = json.loads(out.read_text()), json.loads((folder / "mmhal.json").read_text())
        assert [line | {"model_answer": ""} for line in answers] == template
        assert all(type(line["model_answer"]) is str for line in answers)
        assert "next: let a judge rate" in text and "then mmhal --judged" in text
    else:
        answers = data.read_lines(out)
        name = "question_id" if bench == "pope" else "id"
        assert [set(line) for line in answers] == [{name, "answer"}] * 5
        given = data.read_lines(asked[bench][1])
        assert [line[name] for line in answers] == [line[name] for line in given]
        # What is printed is what the file alone gives.
        assert run_here(monkeypatch, benchmarks, bench, "--answers", out, *asked[bench]) == 0
        again = capsys.readouterr().out.splitlines()
        assert all(line in text for line in again[:-1]) and "max_new_tokens 20" in text
        assert "max_new_tokens" not in again[-1]


def test_answers_are_those_of_the_model(small, folder, asked, monkeypatch, policy):
    out = folder / "a.jsonl"
    assert run_here(monkeypatch, benchmarks, *answer(small, asked, "chair", out)) == 0
    prompt = policy.encoding.prompt("Describe the picture.")
    pixels = model.load_pixels(policy, small, [f"{n}.png" for n in range(5)])
    texts, _ = policy.generate(pixels, [prompt] * 5, 20)
    assert [line["answer"] for line in data.read_lines(out)] == texts


def test_answering_goes_on_after_a_stop(small, folder, asked, monkeypatch, capsys):
    straight, stopped = folder / "straight.jsonl", folder / "stopped.jsonl"
    assert run_here(monkeypatch, benchmarks, *answer(small, asked, "chair", straight)) == 0
    calls, generate = [], model.Policy.generate

    def stop(self, pixels, prompts, limit):
        calls.append(len(prompts))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(self, pixels, prompts, limit)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(model.Policy, "generate", stop)
        run_here(patch, benchmarks, *answer(small, asked, "chair", stopped))
    (part,) = folder.glob("stopped.jsonl.parts-*/*.jsonl")
    part.write_text(part.read_text().replace('"answer": "', '"answer": "marked '))  # is not done again
    # Another batch, and one of the questions that was not answered yet is gone: it goes on all the same.
    lines(folder / "o.jsonl", *data.read_lines(folder / "o.jsonl")[:4])
    capsys.readouterr()
    assert run_here(monkeypatch, benchmarks, *answer(small, asked, "chair", stopped, batch=3)) == 0
    assert "2 of 4 are done" in capsys.readouterr().out and not list(folder.glob("*parts*"))
    again = stopped.read_text()
    expected = "".join(straight.read_text().splitlines(keepends=True)[:4])
    assert again.count("marked ") == 2 and again.replace("marked ", "") == expected


def test_answers_of_two_settings_are_not_mixed(small, folder, asked, monkeypatch):
    """Parts are named by model and longest answer, inside by what is asked: a new question is asked anew."""
    folders, keys = [], []

    def stop(here, name, title, records, batch, work):
        folders.append(here)
        keys.append([parts.key_of(record) for record in records])
        raise KeyboardInterrupt

    monkeypatch.setattr(parts, "in_parts", stop)
    hub.save_new(warmup.build_policy(seed=1), folder / "other")
    text = (folder / "q.jsonl").read_text()
    (folder / "new.jsonl").write_text(text.replace("Is there", "Is here", 1))
    args = answer(small, asked, "pope", folder / "a.jsonl")
    others = ["--max_new_tokens", 9], ["--model", folder / "other"], ["--questions", folder / "new.jsonl"]
    for more in ([], ["--batch", 5, "--skip_bad"], *others):
        with pytest.raises(KeyboardInterrupt):
            run_here(monkeypatch, benchmarks, *args, *more)
    assert folders[0] == folders[1] == folders[4] and len(set(folders)) == 3
    assert keys[0] == keys[1] == keys[2] == keys[3]
    assert keys[4][0] != keys[0][0] and keys[4][1:] == keys[0][1:]


def test_a_missing_image_is_told_before_the_model_is_loaded(small, folder, asked, monkeypatch, capsys):
    question = {"text": "Q", "label": "no"}
    lines(folder / "q.jsonl", {"question_id": 1, "image": "none.png", **question})
    args = answer(small, asked, "pope", folder / "a.jsonl")
    text = refused(monkeypatch, capsys, benchmarks, *args, "--model", "nowhere")
    assert "q.jsonl, line 1: " in text and "none.png: no such image" in text
    text = refused(monkeypatch, capsys, benchmarks, *args, "--skip_bad")
    assert "no usable records" in text and "--images" in text
    lines(folder / "q.jsonl", {"question_id": 1, **question})
    assert "field 'image' is missing" in refused(monkeypatch, capsys, benchmarks, *args)


def test_damaged_images_are_left_out_and_counted(small, folder, asked, monkeypatch, capsys):
    (small / "bad.png").write_bytes((small / "0.png").read_bytes()[:200])
    question = {"text": "Q", "label": "no"}
    names = ["none.png", "bad.png", "0.png", "bad.png", "../x.png"]
    asked_of = [{"question_id": n, "image": name, **question} for n, name in enumerate(names)]
    lines(folder / "q.jsonl", *asked_of)
    args = answer(small, asked, "pope", folder / "a.jsonl")
    assert run_here(monkeypatch, benchmarks, *args, "--skip_bad") == 0
    text = capsys.readouterr().out
    assert "1 records dropped: image missing" in text and "2 records dropped: image unreadable" in text
    assert "1 records dropped: image outside the folder" in text and "asked 1" in text
    assert [line["question_id"] for line in data.read_lines(folder / "a.jsonl")] == [2]
    lines(folder / "q.jsonl", *asked_of[1:])
    text = refused(monkeypatch, capsys, benchmarks, *args)
    assert "q.jsonl, line 1: " in text and "bad.png: cannot be read as an image" in text


def test_ambers_descriptions_stay_and_its_answers_are_one_word(small, folder, asked, monkeypatch):
    def generate(policy, pixels, prompts, limit):
        return (["There is no dog."] * len(prompts), [True] * len(prompts))

    monkeypatch.setattr(model.Policy, "generate", generate)
    assert run_here(monkeypatch, benchmarks, *answer(small, asked, "amber", folder / "a.json")) == 0
    said = [line["response"] for line in json.loads((folder / "a.json").read_text())]
    assert said == ["There is no dog."] * 2 + ["No"] * 2
    item = {"id": 1, "type": "relation"}
    assert benchmarks.amber_line(item, "Maybe.")["response"] == "Maybe."  # counts as wrong
    assert benchmarks.amber_line(item, "yes it is")["response"] == "Yes"


def prompts_of(monkeypatch, args):
    records = []

    def stop(here, name, title, asked, batch, work):
        records.extend(asked)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(parts, "in_parts", stop)
        run_here(patch, benchmarks, *args)
    return [record["prompt"] for record in records]


def test_what_each_benchmark_asks(small, folder, asked, monkeypatch):
    short = f"\n{sources.SHORT_PROMPT}"  # what closed-ended questions end with already
    texts = ["Q", f"Q{short}"]
    lines(
        folder / "q.jsonl",
        *({"question_id": n, "image": "0.png", "text": t, "label": "no"} for n, t in enumerate(texts)),
    )
    args = answer(small, asked, "pope", folder / "a.jsonl")
    assert prompts_of(monkeypatch, args) == [texts[1]] * 2  # the suffix is asked once
    objects = {"image": "0.png", "objects": [], "captions": []}
    lines(folder / "o.jsonl", {"id": 1, **objects}, {"id": 2, "question": "Q", **objects})
    args = answer(small, asked, "chair", folder / "a.jsonl")
    assert prompts_of(monkeypatch, args) == ["Please describe this image in detail.", "Q"]
    args = answer(small, asked, "amber", folder / "a.json")
    ask = "Describe the picture."
    assert prompts_of(monkeypatch, args) == [ask, ask, ask + short, ask + short]
    args = answer(small, asked, "closed", folder / "a.jsonl")
    assert prompts_of(monkeypatch, args) == ["Q"] * 5


def test_the_longest_answer_is_the_benchmarks_own(small, folder, asked, monkeypatch):
    limits = []

    def generate(policy, pixels, prompts, limit):
        limits.append(limit)
        return ["Yes"] * len(prompts), [True] * len(prompts)

    monkeypatch.setattr(model.Policy, "generate", generate)
    for bench in ("chair", "objhal", "pope", "closed", "amber", "mmhal"):
        args = answer(small, asked, bench, folder / "a.json", batch=9)
        assert run_here(monkeypatch, benchmarks, *args, "--max_new_tokens", 0) == 0
    assert limits == [512, 1024, 128, 16, 512, 512]


def test_two_processes_answer_as_one(small, folder, asked, monkeypatch):
    one, two, log = folder / "one.jsonl", folder / "two.jsonl", folder / "log"
    children = forked(benchmarks, *answer(small, asked, "chair", two), processes=2, log=log)
    assert finished(children) == [0, 0], log.read_text()
    assert run_here(monkeypatch, benchmarks, *answer(small, asked, "chair", one)) == 0
    assert two.read_text() == one.read_text() and log.read_text().count("wrote") == 1


# --------------------------------------------------------------------------------- LLaVA-Bench, MM-Vet, other forms


def test_llavabench_and_mmvet_by_hand(folder, monkeypatch, capsys):
    reviews = [("conv", "8 7\nThe first ..."), ("conv", "9,8"), ("detail", " 10 5 ")]
    lines = [{"question_id": n, "category": kind, "content": text} for n, (kind, text) in enumerate(reviews)]
    (folder / "j.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = score(monkeypatch, folder, "llavabench", judged=folder / "j.jsonl", judge="x")
    assert out["score"] == pytest.approx(100 * 20 / 27) and out["convscore"] == pytest.approx(100 * 15 / 17)
    assert out["detailscore"] == 50
    (folder / "q.json").write_text(
        json.dumps(
            {
                "v1_0": {"imagename": "0.png", "question": "Q", "capability": ["ocr"]},
                "v1_1": {"imagename": "1.png", "question": "R", "capability": ["ocr", "rec"]},
            }
        )
    )
    (folder / "g.json").write_text(json.dumps({"v1_0": {"score": [0.5]}, "v1_1": {"score": [1.0]}}))
    out = score(monkeypatch, folder, "mmvet", judged=folder / "g.json", judge="x", questions=folder / "q.json")
    assert (out["score"], out["ocrscore"], out["recscore"]) == (75, 75, 100)
    (folder / "g.json").write_text(json.dumps({"v1_0": {"score": 7.5}, "v1_1": {"score": 1}}))
    assert "not of 1" in refused(
        monkeypatch, capsys, benchmarks, "mmvet", "--judged", folder / "g.json", "--judge", "x"
    )
    (folder / "g.json").write_text(json.dumps({"v1_0": {"model": "x"}}))
    assert "no review" in refused(
        monkeypatch, capsys, benchmarks, "mmvet", "--judged", folder / "g.json", "--judge", "x"
    )


@pytest.mark.parametrize("said", ["NO", "No!", "**No**", '"No"', "No:", "no.", "(No)", "The answer is no."])
def test_a_no_for_amber_is_written_as_its_script_reads_it(said):
    item = {"id": 1, "type": "discriminative-relation"}
    assert benchmarks.amber_line(item, said) == {"id": 1, "response": "No"}


def test_words_as_chair_means_them(folder):
    """Not one word of these is of the table (skies are no skis; no pairs over a stop)."""
    (folder / "s.txt").write_text(
        "person, man, baby\ncar\nskis, ski\nclock\nhot dog\ndog\nwine glass\nelephant\ntie\nbus\n"
    )
    objects = benchmarks.Objects(str(folder / "s.txt"))
    for text in ("blue skies", "long manes", "nobody cares", "three o'clock", "the weather is hot", "wine, glasses"):
        assert objects.mentions(text) == [], text
    assert [kind for _, kind in objects.mentions("It is hot. Dogs rest")] == ["dog"]
    assert [kind for _, kind in objects.mentions("a baby. Elephants walk")] == ["person", "elephant"]
    assert [kind for _, kind in objects.mentions("hot dogs, two wine glasses, buses, skis and ties")] == [
        "hot dog",
        "wine glass",
        "bus",
        "skis",
        "tie",
    ]


def test_answers_to_other_questions_are_refused(folder, monkeypatch, capsys):
    asked = [
        {"question_id": n, "image": "0.png", "text": f"Is there a {w}?", "label": "yes"}
        for n, w in enumerate(("box", "cup"))
    ]
    (folder / "q.json").write_text("".join(json.dumps(line) + "\n" for line in asked))
    official = [{"question": line["text"], "answer": "Yes"} for line in asked]  # POPE's own scripts write no ids
    (folder / "a.json").write_text("".join(json.dumps(line) + "\n" for line in official))
    assert score(monkeypatch, folder, "pope", answers=folder / "a.json", questions=folder / "q.json")["accuracy"] == 1
    other = [{"question_id": n, "question": "Is there a car?", "answer": "Yes"} for n in range(2)]
    (folder / "b.json").write_text("".join(json.dumps(line) + "\n" for line in other))
    args = ("pope", "--answers", folder / "b.json", "--questions", folder / "q.json")
    assert "answers 'Is there a car?', not 'Is there a box?'" in refused(monkeypatch, capsys, benchmarks, *args)


def test_chairs_truth_from_cocos_own_files(folder, monkeypatch):
    (folder / "s.txt").write_text("dog\ncat\nbench\n")
    images = [{"id": n, "file_name": f"COCO_{n}.jpg"} for n in (1, 2, 3)]
    notes = [{"image_id": 1, "category_id": 7}, {"image_id": 1, "category_id": 7}, {"image_id": 2, "category_id": 9}]
    kinds = [{"id": 7, "name": "dog"}, {"id": 9, "name": "cat"}]
    (folder / "i.json").write_text(
        json.dumps({"info": {}, "images": images, "annotations": notes, "categories": kinds})
    )
    captions = {"images": images, "annotations": [{"image_id": 2, "caption": "A cat on a bench."}]}
    (folder / "c.json").write_text(json.dumps(captions))
    said = [{"image_id": 1, "caption": "A dog and a bench."}, {"image_id": 2, "caption": "A bench."}]
    (folder / "a.json").write_text(json.dumps(said))
    files = {"answers": folder / "a.json", "objects": folder / "i.json", "synonyms": folder / "s.txt"}
    out = score(monkeypatch, folder, "chair", **files, annotations=folder / "c.json")
    assert (out["chair_s"], out["chair_i"], out["recall"]) == (0.5, pytest.approx(1 / 3), pytest.approx(2 / 3))


def test_a_question_that_cannot_be_asked_is_told_before_any_answer(small, folder, asked, monkeypatch, capsys):
    questions = data.read_lines(asked["pope"][1])
    questions[1]["text"] = "Is there a <image>?"
    benchmarks.runtime.write_jsonl(folder / "bad.jsonl", questions)
    args = answer(small, asked, "pope", folder / "a.jsonl")[:-1] + [folder / "bad.jsonl"]
    assert f"id '{questions[1]['question_id']}': the question" in refused(monkeypatch, capsys, benchmarks, *args)
    assert run_here(monkeypatch, benchmarks, *args, "--skip_bad", "True") == 0
    assert "left out" in capsys.readouterr().out and len(data.read_lines(folder / "a.jsonl")) == len(questions) - 1


def test_files_for_the_judges_of_llavabench_and_mmvet(small, folder, monkeypatch):
    lines = [{"question_id": n, "image": f"{n}.png", "text": "What do you see?", "category": "conv"} for n in range(2)]
    benchmarks.runtime.write_jsonl(folder / "l.jsonl", lines)
    vet = {f"v1_{n}": {"imagename": f"{n}.png", "question": "What do you see?"} for n in range(2)}
    (folder / "v.json").write_text(json.dumps(vet))
    files = {"llavabench": folder / "l.jsonl", "mmvet": folder / "v.json"}
    for bench, path in files.items():
        args = answer(small, {bench: ["--questions", path]}, bench, folder / f"{bench}.out")
        assert run_here(monkeypatch, benchmarks, *args) == 0
    said = data.read_lines(folder / "llavabench.out")
    assert [set(line) for line in said] == [{"question_id", "prompt", "text"}] * 2
    graded = json.loads((folder / "mmvet.out").read_text())
    assert list(graded) == ["v1_0", "v1_1"] and graded["v1_0"] == said[0]["text"]
