"""Benchmarks by hand-made cases whose answers are known from the official definitions."""

import copy
import json
import math
import random
import types

import numpy as np
import pytest
import test_eval
import torch
from conftest import refused, run_here
from PIL import Image

import data
import draw
import eval
import model
import runtime
import scores
import sources
import toy

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
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "s.txt").write_text(SYNONYMS)
    return tmp_path


def lines(path, *records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def score(monkeypatch, folder, bench, **files):
    args = [part for name, path in files.items() for part in (f"--{name}", path)]
    assert run_here(monkeypatch, eval, "--bench", bench, *args, "--json", folder / "out.json") == 0
    return json.loads((folder / "out.json").read_text())


# ------------------------------------------------------------------------------------------------------- CHAIR


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
        ("Buses, a bus and MINIBUSES!", ["bus", "bus", "bus"]),
        ("Wine glasses, glasses and a glass of wine.", ["wine glass"]),
        ("Knives, pocketknives, scissors, skis and a ski", ["knife", "knife", "scissors", "skis", "skis"]),
        ("women,children/people: couches and TVs.The dog", ["person", "person", "person", "couch", "tv", "dog"]),
        ("a motor bike under traffic lights", ["motorcycle", "traffic light"]),
        ("The dog's bowl is a dog-bowl.", ["dog"]),
        ("Taxis and zebus, corgis, broccolis; a cross", ["car", "cow", "dog", "broccoli"]),
        ("grandchildren with dobermen: a child and children, people", ["person", "dog", "person", "person", "person"]),
        ("A nice view.", []),
        ("", []),
    ],
)
def test_objects_named_in_a_text(folder, text, named):
    assert [kind for _, kind in scores.Objects(folder / "s.txt").mentions(text)] == named


CAPTIONS = [  # id, objects, reference captions, answer
    (1, ["dog"], ["a puppy and a man"], "A dog, a dog and two puppies beside a woman with a cup and a cup."),
    (2, ["toilet"], [], "The toilet seat is up. The seat of the toilet is white."),
    (3, ["hot dog", "cup"], ["Two wine glasses"], "A nice view."),
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
    # 1: dog dog dog person cup cup, two of them wrong; 2: toilet toilet; 3, 4: none; 5: person, hot dog, one wrong.
    assert out["chair_s"] == 2 / 5 and out["chair_i"] == 3 / 10
    # There are: dog person | toilet | hot dog, cup, wine glass | bus | person; named: dog person toilet person.
    assert out["recall"] == 4 / 8
    counts = {"captions": 5, "hallucinated_captions": 2, "captions_with_objects": 3, "mentions": 10,
              "hallucinated_mentions": 3, "objects": 8, "objects_named": 4, "lost_in_2018": 0}  # fmt: skip
    assert out["counts"] == counts and out["interval"]["recall"][0] < 0.5 < out["interval"]["recall"][1]
    told = capsys.readouterr().out
    assert "recall: objects there that are named" in told and "captions 5" in told and "95 % intervals" in told


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


def test_no_mention_in_the_whole_corpus_is_undefined_and_said(folder, monkeypatch, capsys):
    out = score(monkeypatch, folder, "chair", **chair_files(folder, CAPTIONS[2:4]))
    assert out["chair_s"] == 0 and out["chair_i"] is None and out["recall"] == 0
    assert "CHAIR_i is undefined" in capsys.readouterr().out


def test_what_the_script_of_2018_does_not_see_is_counted(folder, monkeypatch, capsys):
    cases = [(1, ["bus", "tie"], [], "A bus, two buses, ties and a tie.")]
    assert score(monkeypatch, folder, "chair", **chair_files(folder, cases))["lost_in_2018"] == 2
    assert "At least 2 mentions (bus, ties)" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------------- POPE

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
    asked = [
        {"question_id": n, "image": f"{image}.png", "text": "Is there a dog in the image?", "label": label}
        for n, (image, label, _, _) in enumerate(cases)
    ]
    answers = [{"question_id": n, "answer": answer} for n, (_, _, answer, _) in enumerate(cases)]
    return {"questions": lines(folder / "q.jsonl", *asked), "answers": lines(folder / "a.jsonl", *answers)}


def test_pope_by_hand(folder, monkeypatch, capsys):
    out = score(monkeypatch, folder, "pope", **pope_files(folder))
    pairs = [(label, said) for _, label, _, said in POPE]
    tp, fp, fn, tn = (pairs.count(pair) for pair in (("yes", "yes"), ("no", "yes"), ("yes", "no"), ("no", "no")))
    assert (tp, fp, fn, tn) == (2, 4, 1, 1)
    assert out["accuracy"] == 3 / 8 and out["precision"] == 2 / 6 and out["recall"] == 2 / 3
    assert out["f1"] == pytest.approx(2 * (1 / 3) * (2 / 3) / 1) and out["yes_ratio"] == 6 / 8
    assert out["neither"] == 3 and out["no_read_as_yes"] == 2 and out["images"] == 2
    assert "3 answers held neither a yes nor a no" in capsys.readouterr().out


def test_intervals_are_those_of_a_plain_loop_over_images(folder, monkeypatch):
    rng = random.Random(0)
    cases = [(str(n // 4), *(rng.choice([("yes", "Yes", ""), ("no", "Yes", ""), ("no", "No", "")]))) for n in range(80)]
    found = score(monkeypatch, folder, "pope", **pope_files(folder, cases))["interval"]["accuracy"]
    right = np.array([[label == said.lower() for _, label, said, _ in cases[i : i + 4]] for i in range(0, 80, 4)])
    draw = np.random.default_rng(7)
    drawn = [right[draw.integers(20, size=20)].mean() for _ in range(4000)]
    assert np.allclose(found, np.quantile(drawn, [0.025, 0.975]), atol=0.02)


def test_two_files_compared_over_the_same_images(folder, monkeypatch, capsys):
    files = pope_files(folder, POPE * 10)
    better = [{"question_id": n, "answer": label.capitalize()} for n, (_, label, _, _) in enumerate(POPE * 10)]
    other = lines(folder / "better.jsonl", *better)
    args = ["--bench", "pope", "--questions", files["questions"], "--json", folder / "out.json"]
    assert run_here(monkeypatch, eval, *args, "--compare", files["answers"], other) == 0
    first, second, difference = json.loads((folder / "out.json").read_text())["a_b_difference"]["accuracy"]
    assert first[0] == 3 / 8 and second[0] == 1 and difference[0] == 5 / 8
    # Two images, all answers of which repeat: drawing one twice gives its own difference.
    assert difference[1] == pytest.approx([1 / 3 - 1 / 3, 4 / 5], abs=0.5) and second[1] == [1, 1]
    assert "difference" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------ closed-ended, MME


def closed_files(folder, cases):
    asked = [{"id": str(n), **question} for n, (question, _, _) in enumerate(cases)]
    answers = [{"id": str(n), "answer": answer} for n, (_, answer, _) in enumerate(cases)]
    return {"questions": lines(folder / "q.jsonl", *asked), "answers": lines(folder / "a.jsonl", *answers)}


def choice(answer="B", **more):
    return {"image": "0.png", "question": "Q", "kind": "choice", "answer": answer, "choices": ["a", "b", "c"], **more}


def yesno(answer, image, category="existence"):
    return {"image": image, "question": "Q", "kind": "yesno", "answer": answer, "category": category, "source": "mme"}


def test_letters_by_the_rule_of_llava(folder, monkeypatch):
    texts = {"B": 1, "B. b": 1, "(B) b": 1, "B) b": 1, "The answer is B.": 1, "A": 0, "b": 0, "Because": 0, "": 0,
             "D": 0, "The answer is B. The answer is A.": 0, "It is B": 0}  # fmt: skip
    cases = [(choice(category="x" if right else "y"), text, right) for text, right in texts.items()]
    out = score(monkeypatch, folder, "closed", **closed_files(folder, cases))
    assert out["accuracy"] == sum(texts.values()) / len(texts) and out["/x"] == 1 and out["/y"] == 0


def test_yes_and_no_in_a_sentence(folder, monkeypatch):
    """Our own questions are read as the rewards read them, MME's as MME does."""
    own = {"image": "0.png", "question": "Q", "kind": "yesno", "answer": "No", "choices": []}
    files = closed_files(folder, [(own, "There is no dog.", 1), (own, "Maybe.", 0)])
    out = score(monkeypatch, folder, "closed", **files)
    assert out["accuracy"] == 1 / 2 and out["unread"] == 1
    asked = [(yesno("No", "1"), "There is no dog.", 0), (yesno("Yes", "1"), "Yes.", 1)]
    out = score(monkeypatch, folder, "closed", **closed_files(folder, asked))
    assert out["accuracy"] == 1 / 2 and out["unread"] == 1 and out["mme"] == 50


def test_mme_score_by_hand(folder, monkeypatch):
    cases = [
        (yesno("Yes", "1"), "yes.", 1), (yesno("No", "1"), "No, it is not.", 1),  # both right
        (yesno("Yes", "2"), "Y", 1), (yesno("No", "2"), "Yes", 0),
        (yesno("Yes", "3", "count"), "", 0), (yesno("No", "3", "count"), "n", 1),
    ]  # fmt: skip
    out = score(monkeypatch, folder, "closed", **closed_files(folder, cases))
    # existence: 3 of 4 right, 1 of 2 images; count: 1 of 2, 0 of 1.
    assert out["mme"] == 75 + 50 + 50 + 0 and out["accuracy"] == 4 / 6 and out["/count"] == 0.5


def test_closed_ended_answers_by_kind(folder, monkeypatch):
    number = {"image": "1.png", "question": "Q", "kind": "number", "answer": "2", "choices": []}
    word = {"image": "1.png", "question": "Q", "kind": "word", "answer": "red", "choices": ["red", "blue"]}
    cases = [(number, "2 cups", 1), (number, "two", 0), (word, "Red.", 1), (word, "red or blue", 0), (choice(), "B", 1)]
    out = score(monkeypatch, folder, "closed", **closed_files(folder, cases))
    assert (out["accuracy"], out["number"], out["word"], out["choice"], out["unread"]) == (3 / 5, 0.5, 0.5, 1, 2)


# ------------------------------------------------------------------------------------------------ AMBER, MMHal


def test_amber_by_hand(folder, monkeypatch, capsys):
    kinds = ["discriminative-hallucination", "discriminative-attribute-state", "discriminative-relation", "relation"]
    cases = [  # type, truth, response
        (kinds[0], "no", "No"), (kinds[0], "no", "Yes"), (kinds[1], "yes", "No"), (kinds[1], "no", "no"),
        (kinds[2], "yes", "Yes"), (kinds[3], "no", "No"),
    ]  # fmt: skip
    notes = [{"id": 1005 + n, "type": kind, "truth": truth} for n, (kind, truth, _) in enumerate(cases)]
    notes.insert(0, {"id": 1, "type": "generative", "truth": ["sky"], "hallu": ["cloud"]})
    (folder / "notes.json").write_text(json.dumps(notes))
    responses = [{"id": 1, "response": "A sky."}] + [
        {"id": 1005 + n, "response": r} for n, (_, _, r) in enumerate(cases)
    ]
    (folder / "a.json").write_text(json.dumps(responses))
    out = score(monkeypatch, folder, "amber", annotations=folder / "notes.json", answers=folder / "a.json")
    # No is positive: said 3 times, 2 rightly; true 4 times. "no" is neither: wrong, and no predicted no.
    assert out["accuracy"] == 3 / 6 and out["precision"] == 2 / 3 and out["recall"] == 2 / 4
    assert out["f1"] == pytest.approx(4 / 7) and out["relation accuracy"] == 1 and out["attribute precision"] == 0
    told = capsys.readouterr().out
    assert "1 answers were neither Yes nor No" in told and "1 descriptions are for the official script" in told


def test_mmhal_by_hand(folder, monkeypatch, capsys):
    texts = ["Rating: 5", "explanation... rating: 2", "no number", "Rating: 3 or rating: 4"] * 24
    answers = [{"choices": [{"message": {"content": text}}]} for text in texts[:48]] + texts[48:]
    (folder / "judged.json").write_text(json.dumps(answers))
    out = score(monkeypatch, folder, "mmhal", judged=folder / "judged.json", judge="gpt-4-0314")
    assert out["score"] == 7 / 4 and out["hallucination_rate"] == 3 / 4
    assert out["attribute"] == 5 and out["adversarial"] == 2 and out["comparison"] == 0 and out["relation"] == 5
    assert "gpt-4-0314" in capsys.readouterr().out and out["settings"]["judge"] == "gpt-4-0314"
    args = ("--bench", "mmhal", "--judged", folder / "judged.json")
    assert "--judge is needed" in refused(monkeypatch, capsys, eval, *args)
    (folder / "other.json").write_text(json.dumps(["rating: 6"] * 96))
    both = ["--compare", folder / "judged.json", folder / "other.json", "--judge", "x", "--json", folder / "both.json"]
    assert run_here(monkeypatch, eval, "--bench", "mmhal", *both) == 0
    assert json.loads((folder / "both.json").read_text())["a_b_difference"]["score"][2][0] == 6 - 7 / 4
    (folder / "judged.json").write_text(json.dumps(answers[:90]))
    assert "holds 90 judge answers" in refused(monkeypatch, capsys, eval, *args, "--judge", "x")


# ---------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("a", "{broken", "a.jsonl, line 6: not JSON"),
        ("a", {"id": 5}, "a.jsonl, line 6: has no 'answer'"),
        ("a", {"id": 6, "answer": None}, "a.jsonl, line 6: has no 'answer' that is a text"),
        ("a", {"answer": "x"}, "a.jsonl, line 6: has no 'question_id' or 'id'"),
        ("a", {"id": True, "answer": "x"}, "a.jsonl, line 6: has no 'question_id' or 'id'"),
        ("a", {"id": "1", "answer": "x"}, "a.jsonl, line 6: id '1' was used before"),
        ("a", {"id": 9, "answer": "x"}, "a.jsonl, line 6: id '9' is not asked"),
        ("a", {"id": 9, "answer": None, "text": "prompt"}, "a.jsonl, line 6: has no 'answer' that is a text"),
        ("a", {"id": 9, "text": "Is it?", "label": "no"}, "a.jsonl, line 6: is a question"),
        ("a", {"id": 9, "answer": "a", "response": "b"}, "a.jsonl, line 6: 'answer' and 'response' differ"),
        ("a", {"question_id": 1.0, "id": 9, "answer": "a"}, "a.jsonl, line 6: has no 'question_id' or 'id'"),
        ("o", {"id": 9, "objects": ["dog"], "captions": []}, "o.jsonl, line 6: id '9' has no answer"),
        ("o", {"id": 9, "objects": ["whale"], "captions": []}, "'whale' is not in"),
        ("o", {"id": 9, "objects": "dog", "captions": []}, "field 'objects' must be a list of texts"),
        ("o", {"id": 9, "objects": [1], "captions": []}, "field 'objects' must hold texts only"),
        ("o", [1], "must be a JSON object"),
    ],
)
def test_mistakes_in_files_of_answers(folder, monkeypatch, capsys, file, line, message):
    files = chair_files(folder)
    path = folder / f"{file}.jsonl"
    path.write_text(path.read_text() + (line if isinstance(line, str) else json.dumps(line)) + "\n")
    args = ["--bench", "chair", *(part for name, path in files.items() for part in (f"--{name}", path))]
    args += ["--json", folder / "out.json"]
    assert message in refused(monkeypatch, capsys, eval, *args) and not (folder / "out.json").exists()
    assert run_here(monkeypatch, eval, *args, "--skip_bad") == 0
    assert json.loads((folder / "out.json").read_text())["chair_i"] == 3 / 10
    told = capsys.readouterr().out
    assert "1 records dropped: " in told or "1 left out: " in told


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--bench", "bleu"], "--bench 'bleu': use one of chair"),
        (["--bench", "pope"], "--answers is needed"),
        (["--bench", "pope", "--answers", "a.jsonl"], "--questions is needed: name the file"),
        (["--bench", "chair", "--answers", "a.jsonl", "--objects", "o.jsonl"], "--synonyms is needed"),
        (["--bench", "pope", "--compare", "a.jsonl"], "--compare takes two"),
        (["--bench", "closed", "--answers", "a.jsonl", "--questions", "mme.jsonl"], "field 'category' must be a text"),
        (["--attention", "x.png"], "--attention needs a file that ends in .png and a --word"),
        (["--bench", "pope", "--answers", "a", "--json", "nowhere/x.json"], "is a folder, or lies in none"),
        (["--bench", "pope", "--answers", "a.jsonl", "--questions", "nowhere.jsonl"], "no such file"),
        (["--bench", "pope", "--answers", "a.jsonl", "--questions", "q.jsonl"], "field 'label' must be yes or no"),
    ],
)
def test_mistakes_on_the_command_line(folder, monkeypatch, capsys, args, message):
    monkeypatch.chdir(folder)
    lines(folder / "q.jsonl", {"question_id": 1, "image": "a", "text": "Q", "label": "maybe"})
    mme = {"id": "1", "image": "a", "question": "Q", "kind": "yesno", "answer": "No", "source": "mme"}
    lines(folder / "mme.jsonl", mme)
    chair_files(folder)
    assert message in refused(monkeypatch, capsys, eval, *args)


# -------------------------------------------------------------------------------- answering with a checkpoint


@pytest.fixture
def asked(folder, world):
    """A few toy scenes as the files of each benchmark: {bench: flags}."""
    scenes = [record for _, record in data.read_jsonl(world / "val.jsonl")][:5]
    kinds = sorted({o["word"] for scene in scenes for o in scene["objects"]})
    (folder / "s.txt").write_text("\n".join(kinds))
    objects = [{"id": s["id"], "image": s["image"], "objects": [o["word"] for o in s["objects"]], "captions": [],
                "question": "Describe the picture."} for s in scenes]  # fmt: skip
    questions = [{"question_id": n, "image": s["image"], "text": s["asked"][0]["question"],
                  "label": s["asked"][0]["answer"].lower()} for n, s in enumerate(scenes)]  # fmt: skip
    lines(folder / "o.jsonl", *objects)
    lines(folder / "q.jsonl", *questions)
    pairs = [{"id": n, "type": "generative"} for n in (1, 2)]
    pairs += [
        {"id": 1005, "type": "relation", "truth": "no"},
        {"id": 1006, "type": "discriminative-relation", "truth": "yes"},
    ]
    (folder / "notes.json").write_text(json.dumps(pairs))
    queries = [{"id": pair["id"], "image": scenes[0]["image"], "query": "Describe the picture."} for pair in pairs]
    (folder / "queries.json").write_text(json.dumps(queries))
    template = {"question_type": "x", "image_content": ["a"], "gt_answer": "a", "model_answer": ""}
    mmhal = [{**template, "question": "Describe the picture.", "image_src": f"http://x/{s['image']}"} for s in scenes]
    (folder / "mmhal.json").write_text(json.dumps(mmhal))
    return {
        "chair": ["--objects", folder / "o.jsonl", "--synonyms", folder / "s.txt"],
        "objhal": ["--objects", folder / "o.jsonl", "--synonyms", folder / "s.txt"],
        "pope": ["--questions", folder / "q.jsonl"],
        "amber": ["--questions", folder / "queries.json", "--annotations", folder / "notes.json"],
        "mmhal": ["--questions", folder / "mmhal.json", "--images", world / "images"],
    }


def answer(world, folder, asked, bench, out):
    args = ["--bench", bench, "--model", world / "base", "--answers", out, "--batch", 2, "--max_new_tokens", 20]
    return [*args, *([] if bench == "mmhal" else ["--images", world]), *asked[bench]]


@pytest.mark.parametrize("bench", ["chair", "objhal", "pope", "amber", "mmhal"])
def test_a_checkpoint_answers_every_benchmark_in_its_official_form(world, folder, asked, monkeypatch, capsys, bench):
    out = folder / "answers.json"
    assert run_here(monkeypatch, eval, *answer(world, folder, asked, bench, out)) == 0
    told = capsys.readouterr().out
    assert "were cut at 20 new tokens" in told and not list(folder.glob("*.parts"))
    if bench == "amber":
        found = json.loads(out.read_text())
        assert [set(line) for line in found] == [{"id", "response"}] * 4
        words = [set(line["response"].lower().replace(".", "").split()) for line in found[2:]]
        for line, said in zip(found[2:], words, strict=True):  # what says neither is kept, and counts as wrong
            assert line["response"] in ("Yes", "No") if said & {"yes", "no", "not"} else line["response"]
        assert found[2]["id"] == 1005 and "answers were neither Yes nor No" in told
    elif bench == "mmhal":
        found = json.loads(out.read_text())
        assert len(found) == 5 and all(line["model_answer"] and line["gt_answer"] == "a" for line in found)
        assert "next: let a judge rate" in told and set(found[0]) == {
            "question_type", "image_content", "gt_answer", "model_answer", "question", "image_src"}  # fmt: skip
    else:
        found = [line for _, line in data.read_jsonl(out)]
        assert [set(line) for line in found] == [{"question_id" if bench == "pope" else "id", "answer"}] * 5
        # What is printed is what the file alone gives.
        args = ["--bench", bench, "--answers", out, *asked[bench]]
        capsys.readouterr()
        assert run_here(monkeypatch, eval, *args) == 0
        again = capsys.readouterr().out.splitlines()
        assert again[0] in told and again[3] in told


def test_answering_goes_on_after_a_stop(world, folder, asked, monkeypatch):
    assert run_here(monkeypatch, eval, *answer(world, folder, asked, "chair", folder / "straight.jsonl")) == 0
    straight = (folder / "straight.jsonl").read_text()
    calls, write = [], runtime.write_jsonl

    def stopped(path, rows):
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return write(path, rows)

    args = answer(world, folder, asked, "chair", folder / "stopped.jsonl")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runtime, "write_jsonl", stopped)
        run_here(patch, eval, *args)
    part = folder / "stopped.parts" / "answers_000000.jsonl"
    part.write_text(part.read_text().replace('"answer": "', '"answer": "marked '))  # done parts are not done again
    assert run_here(monkeypatch, eval, *args) == 0
    again = (folder / "stopped.jsonl").read_text()
    assert again.count("marked ") == 2 and again.replace("marked ", "") == straight


def test_a_missing_image_is_told_before_the_model_is_loaded(world, folder, asked, monkeypatch, capsys):
    lines(folder / "q.jsonl", {"question_id": 1, "image": "none.png", "text": "Q", "label": "no"})
    args = answer(world, folder, asked, "pope", folder / "a.jsonl")
    told = refused(monkeypatch, capsys, eval, *args, "--model", "nowhere")
    assert "q.jsonl, line 1: no image" in told and "--images" in told
    assert "no item has its image" in refused(monkeypatch, capsys, eval, *args, "--skip_bad")
    scene = next(data.read_jsonl(world / "val.jsonl"))[1]["image"]
    files = [
        {"question_id": n, "image": image, "text": "Q", "label": "no"} for n, image in enumerate(["none.png", scene])
    ]
    lines(folder / "q.jsonl", *files)
    assert run_here(monkeypatch, eval, *args, "--skip_bad") == 0  # of the one that is there
    told = capsys.readouterr().out
    assert "1 not answered: image missing" in told and "1 left out: questions without an answer" in told


# --------------------------------------------------------------------------------------------------- attention


def test_attention_over_the_image_adds_up_and_is_that_of_the_model(policy):
    image, _, _ = next(iter(toy.scenes("val", 1, 0)))
    pixels = model.to_pixels(Image.fromarray(image), 64)[None]
    record = {"id": "x", "question": "Describe the picture.", "chosen": "The picture shows a red cup."}
    at, row = eval.word_in(policy, record, "cup")
    assert policy.tokenizer.decode([row.answers[0][at]]) == "cup"
    assert eval.word_in(policy, record, "the")[0] == 0 and eval.word_in(policy, record, "cu") is None
    grid, logp = policy("attention", pixels, row, at)
    assert grid.shape == (4, 4) and (grid > 0).all() and 0 < grid.sum() < 1
    batch = data.pack([row, data.Row(row.prefix, row.answers * 2)], pixels.expand(2, -1, -1, -1))  # rows of two lengths
    assert logp == pytest.approx(policy("logps", batch)[0, at].item(), abs=1e-4)
    # A model whose queries are zero looks at all tokens alike.
    even = copy.deepcopy(policy)
    with torch.no_grad():
        for layer in even.hf.model.language_model.layers:
            layer.self_attn.q_proj.weight.zero_()
    grid, _ = even("attention", pixels, row, at)
    assert np.allclose(grid, 1 / (len(row.prefix) + at), atol=1e-6)


def test_attention_is_drawn_before_and_after(world, tmp_path, monkeypatch, capsys):
    word = next(data.read_jsonl(world / "val.jsonl"))[1]["objects"][0]["word"]
    args = ["--attention", tmp_path / "look.png", "--model", world / "base", "--base", world / "base", "--data", world]
    assert run_here(monkeypatch, eval, *args, "--split", "val", "--word", word) == 0
    told = capsys.readouterr().out
    assert "on the image 0." in told and f"in the boxes of '{word}'" in told
    sheet = np.asarray(Image.open(tmp_path / "look.png")).astype(int)
    assert (sheet[..., 0] - sheet[..., 1] > 150).any()  # something is red
    assert "no record's 'chosen' holds the word 'whale'" in refused(
        monkeypatch, capsys, eval, *args, "--split", "val", "--word", "whale"
    )


def test_two_checkpoints_compared_on_the_toy_world(world, tmp_path, monkeypatch, capsys):
    args = ["--compare", world / "base", world / "base", "--base", world / "base", "--data", world, "--split", "val"]
    assert run_here(monkeypatch, eval, *args, "--json", tmp_path / "both.json") == 0
    assert json.loads((tmp_path / "both.json").read_text())["a_b_difference"]["chair_s"][2] == [0.0, [0.0, 0.0]]
    told = capsys.readouterr().out
    assert "B - A" in told and "0.000 [0.000, 0.000]" in told
    row = next(line for line in told.splitlines() if line.startswith("CHAIR_s"))
    assert row.rstrip().endswith("0.000 [0.000, 0.000]")


def test_undefined_values_have_no_interval():
    assert scores.with_interval(np.array([math.nan, 1.0, 2.0])) == (None, None)
    assert scores.with_interval(np.array([1.0, math.nan, math.nan])) == (None, None)
    assert math.isnan(scores.ratio(1, 0)) and math.isnan(scores.harmonic(0, 0)) and scores.ratio(1, 4) == 0.25


def test_commas_in_a_number():
    assert scores.closed_answer("1,200 cups", {"kind": "number", "answer": "1200"}) == "1200"


def test_y_or_n_is_neither():
    assert scores.mme_answer("Y or n") == "other"


def test_letters_end_with_the_options():
    assert scores.letter("D", ["a", "b", "c"]) == ""


def test_bow_ties_are_seen_in_2018_too(folder):
    assert scores.Objects(folder / "s.txt").lost_in_2018("Two bow ties.") == 0


def test_a_word_in_two_classes_is_of_the_first(tmp_path):
    (tmp_path / "s.txt").write_text("car, bus\nbus\n")
    assert scores.Objects(tmp_path / "s.txt").class_of["bus"] == "car"


def test_an_answers_file_may_carry_the_labels():
    assert scores.said({"answer": "Yes", "label": "no"}) == "Yes"


def test_captions_of_one_image_are_one_row(folder, monkeypatch):
    files = chair_files(folder)
    asked = [record | {"image": "a.png"} for _, record in data.read_jsonl(files["objects"])]
    lines(files["objects"], *asked)
    assert score(monkeypatch, folder, "chair", **files)["images"] == 1


def test_labels_of_any_case(folder, monkeypatch):
    assert (
        score(monkeypatch, folder, "pope", **pope_files(folder, [("a", "Yes", "Yes", ""), ("a", "No", "No", "")]))[
            "accuracy"
        ]
        == 1
    )


def test_half_of_mme_is_no_score(folder, monkeypatch, capsys):
    files = closed_files(folder, [(yesno("Yes", "1"), "yes", 1)])
    args = [part for name, path in files.items() for part in (f"--{name}", path)]
    assert "has 1 questions, not 2" in refused(monkeypatch, capsys, eval, "--bench", "closed", *args)


def test_amber_by_images_and_without_gaps(folder, monkeypatch, capsys):
    notes = [{"id": n, "type": "relation", "truth": "no"} for n in (1, 2)]
    queries = [{"id": n, "image": "a.png", "query": "Q"} for n in (1, 2)]
    for name, value in (("notes", notes), ("q", queries), ("a", [{"id": n, "response": "No"} for n in (1, 2)])):
        (folder / f"{name}.json").write_text(json.dumps(value))
    files = {"annotations": folder / "notes.json", "questions": folder / "q.json", "answers": folder / "a.json"}
    assert score(monkeypatch, folder, "amber", **files)["images"] == 1
    (folder / "a.json").write_text('[{"id": 1, "response": "No"}]')
    args = [part for name, path in files.items() for part in (f"--{name}", path)]
    assert "id '2' has no answer" in refused(monkeypatch, capsys, eval, "--bench", "amber", *args)


def test_a_rating_of_three_is_no_hallucination(folder, monkeypatch):
    (folder / "j.json").write_text(json.dumps(["rating: 3", "rating: 2"] * 48))
    assert score(monkeypatch, folder, "mmhal", judged=folder / "j.json", judge="x")["hallucination_rate"] == 0.5


def test_answers_of_two_settings_are_not_mixed(world, tmp_path, asked, monkeypatch, capsys):
    args = answer(world, tmp_path, asked, "pope", tmp_path / "a.jsonl")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runtime, "in_parts", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        run_here(patch, eval, *args)
    assert "--max_new_tokens 20" in refused(monkeypatch, capsys, eval, *args, "--max_new_tokens", 9)
    (tmp_path / "q.jsonl").write_text((tmp_path / "q.jsonl").read_text().replace("Is there", "Is here"))
    assert "another source or model" in refused(monkeypatch, capsys, eval, *args)


def test_ambers_descriptions_stay_and_its_answers_are_one_word(world, tmp_path, asked, monkeypatch):
    monkeypatch.setattr(
        model.Policy, "generate", lambda p, x, prompts, n: (["There is no dog."] * len(x), [True] * len(x))
    )
    assert run_here(monkeypatch, eval, *answer(world, tmp_path, asked, "amber", tmp_path / "a.json")) == 0
    said = [line["response"] for line in json.loads((tmp_path / "a.json").read_text())]
    assert said == ["There is no dog."] * 2 + ["No"] * 2


def test_the_suffix_is_asked_once(world, tmp_path):
    image = next(data.read_jsonl(world / "val.jsonl"))[1]["image"]
    texts = ["Q", f"Q\n{sources.SHORT_PROMPT}"]
    lines(
        tmp_path / "q.jsonl",
        *({"question_id": n, "image": image, "text": t, "label": "no"} for n, t in enumerate(texts)),
    )
    config = eval.Config(bench="pope", answers="a", questions=str(tmp_path / "q.jsonl"), images=str(world))
    assert [item["prompt"] for item in eval.benchmark_items(config)[0]] == [texts[1]] * 2


def test_the_difference_is_b_less_a(monkeypatch):
    captions = {"base": "a red cup and a blue pen", "final": "a red cup and a blue book"}
    monkeypatch.setattr(model, "load", lambda path, **more: types.SimpleNamespace(eval=lambda: path))
    monkeypatch.setattr(
        eval, "measure", lambda path, *_: test_eval.measured([captions[path]] * 2, [[-5, -5, -6, 1.0]] * 2)
    )
    told = eval.compare_text(eval.Config(base="base", compare=["base", "final"]), None)
    assert "-1.000 [-1.000, -1.000]" in next(line for line in told.splitlines() if line.startswith("CHAIR_s"))


def test_the_share_in_a_box(tmp_path, policy):
    Image.new("RGB", (64, 64), "white").save(tmp_path / "2.png")
    record = {"image": "2.png", "objects": [{"word": "Cup", "box": [0, 0, 64, 32]}]}
    assert eval.share_in_boxes(np.full((4, 4), 0.01), record, "cup", tmp_path, policy) == pytest.approx(0.5)


def test_both_maps_are_on_one_scale(tmp_path, policy):
    Image.new("RGB", (64, 64), "white").save(tmp_path / "2.png")
    grid = np.full((4, 4), 0.02)
    grids, names = [[grid], [2 * grid]], ("base", "final")
    record = {"image": "2.png", "chosen": "A cup."}
    draw.draw_maps([record], tmp_path, grids, tmp_path / "x.png", names, "cup", lambda image: image)
    sheet = np.asarray(Image.open(tmp_path / "x.png")).astype(int)
    base, final = (sheet[60:160, x : x + 100, 1].mean() for x in (260, 462))
    assert final < 5 and base > 50  # green: the one is all red, the other half
