"""Public datasets in their own shapes become our records with their images; and what must be refused."""

import copy
import datetime
import io
import json
import os
import random
import re
import sys
import threading
import tracemalloc

import numpy as np
import pytest
from conftest import refused, run_here
from PIL import Image

import data
import runtime
from extras import sources

QUESTION = "Describe the picture."
ANSWERS = [
    ("The picture shows a red cup.", "The picture shows a red cup and a blue spoon."),
    ("I can see a blue book and a green key.", "I can see a blue book."),
    ("There is a black lock in the picture.", "There is a black lock and a red key in the picture."),
]
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions. USER: <image>\n{} ASSISTANT:"
)


def picture(n):
    """A photograph of its own for each n, landscape or portrait."""
    shape = [(40, 70, 3), (90, 50, 3), (64, 64, 3)][n % 3]
    return Image.fromarray(np.random.default_rng(n).integers(0, 255, shape, dtype=np.uint8))


def encoded(image, kind="PNG"):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def embedded(n):
    return {"bytes": encoded(picture(n)), "path": f"{n}.png"}


def turns(*values):
    return [{"from": ("human", "gpt")[n % 2], "value": value} for n, value in enumerate(values)]


def message(role, text, image=False):
    parts = [{"type": "image", "text": None}] if image else []  # the null is what a parquet file gives
    return [{"role": role, "content": [*parts, {"type": "text", "text": text}]}]


def rlhf_v(n, chosen, rejected):
    inner = json.dumps({"question": QUESTION, "chosen": chosen, "rejected": rejected})
    meta = {"ds_name": "RLHF-V", "origin_dataset": "vqa", "origin_split": "{}", "image_path": f"{n}.jpg"}
    return {"image": embedded(n), "text": inner, "idx": n, **meta}


def rlaif_v(n, chosen, rejected):
    texts = {"question": QUESTION, "chosen": chosen, "rejected": rejected}
    return {"ds_name": "RLAIF-V", "image": embedded(n), **texts, "origin_dataset": "coco", "idx": str(n)}


def trl(n, chosen, rejected):
    texts = {"chosen": message("assistant", chosen), "rejected": message("assistant", rejected)}
    return {"prompt": message("user", QUESTION, image=True), "images": [embedded(n)], **texts}


def trl_inside(n, chosen, rejected):
    asked = message("user", QUESTION, True)
    chosen, rejected = (asked + message("assistant", answer) for answer in (chosen, rejected))
    return {"image": f"{n}.png", "chosen": chosen, "rejected": rejected}


def mdpo(n, chosen, rejected):
    texts = {"prompt": VICUNA.format(QUESTION), "chosen": chosen, "rejected": f" {rejected}</s>"}
    return {"img_path": f"{n}.png", **texts}


def povid(n, chosen, rejected):
    asked = f"<image>\n{QUESTION}"
    talks = {"conversations": turns(asked, chosen), "rejected_conversations": turns(asked, rejected)}
    return {"id": "same", "image": f"{n}.png", **talks}


def own(n, chosen, rejected):
    objects = [{"word": "cup", "box": [1, 2, 30, 31]}] if "cup" in chosen else []
    texts = {"question": QUESTION, "chosen": chosen, "rejected": rejected}
    return {"id": f"ours-{n}", "image": f"{n}.png", **texts, "objects": objects, "note": [n]}


PREFERENCES = {  # name -> file, what a record of that dataset looks like, what it is called there
    "rlhf-v": ("x.parquet", rlhf_v, ["0", "1", "2"]),
    "rlaif-v": ("x.parquet", rlaif_v, ["0", "1", "2"]),
    "trl": ("x.parquet", trl, [None] * 3),
    "mdpo": ("x.json", mdpo, [None] * 3),
    "povid": ("x.json", povid, ["same"] * 3),
    "trl, the prompt inside the answers": ("x.jsonl", trl_inside, [None] * 3),
    "own": ("x.jsonl", own, [None] * 3),
}


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow", reason="reading .parquet needs pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(records), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(records, indent=1))
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def folder(tmp_path):
    for n in range(3):
        picture(n).save(tmp_path / f"{n}.png")
    return tmp_path


def convert(monkeypatch, source, out, *more):
    return run_here(monkeypatch, sources, source, "--out", out, *more)


def sums(printed):
    """The printed account of records, {"written": 3, reason: number left out}; it must add up."""
    total, parts = re.search(r"(\d+) records read = (.*)", printed).groups()
    parts = {reason: int(number) for number, reason in (part.split(" ", 1) for part in parts.split(" + "))}
    assert int(total) == sum(parts.values())
    return parts


def files_in(folder):
    """Everything below a folder, with its content."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


# ------------------------------------------------------------------------------------------ the formats


@pytest.mark.parametrize("name", PREFERENCES)
def test_preferences_of_every_dataset_become_records(folder, monkeypatch, capsys, name):
    file, record_of, origins = PREFERENCES[name]
    source = write(folder / file, [record_of(n, *pair) for n, pair in enumerate(ANSWERS)])
    assert convert(monkeypatch, source, folder / "out") == 0
    out, printed = folder / "out" / "source.jsonl", capsys.readouterr().out
    assert sums(printed) == {"written": 3} and f"wrote {out}" in printed
    to = f"--model <hf id or folder> --out {folder}/out/mfpo.jsonl"
    assert printed.splitlines()[-1] == f"next: python build_data.py mfpo --source {out} {to}"
    records = data.read_records(out, data.SOURCE_FIELDS | {"rejected": str})
    texts = [(record["question"], record["chosen"], record["rejected"]) for record in records]
    assert texts == [(QUESTION, *pair) for pair in ANSWERS]
    assert [record.get("origin") for record in records] == origins
    for n, record in enumerate(records):
        assert np.array_equal(np.asarray(Image.open(out.parent / record["image"])), np.asarray(picture(n)))
        assert record["image"].startswith("images/") and record["image"].endswith(".png")
    if name == "own":
        expected = [own(n, *pair) for n, pair in enumerate(ANSWERS)]
        assert [record | {"image": f"{n}.png"} for n, record in enumerate(records)] == expected
    else:
        assert [(r["id"], r["source"]) for r in records] == [(str(n), name.split(",")[0]) for n in (1, 2, 3)]


LETTER, SHORT = sources.CHOICE_PROMPT, sources.SHORT_PROMPT
OPTIONS = "Which option?\nOptions: A: A cup is on A: book., B: A pen, red., C: No key., D: nan"
ASK_MME = "Please answer yes or no."
MATH = """Hint: Please provide the option letter, e.g., A, B, C, D, at the end.
Question: How many?
Choices:
(A) 10
(B) 15"""
CLOSED = {  # name -> a record of that dataset but for its image, what becomes of it
    "scienceqa": (
        {"question": "Which?", "choices": ["cup", "key"], "answer": 1, "hint": "Look.", "subject": "s"},
        (f"Context: Look.\nWhich?\nA. cup\nB. key\n{LETTER}", "choice", "B", ["cup", "key"]),
    ),
    "ai2d": (
        {"question": "Which?", "options": ["cup", "key", "lock"], "answer": "2"},
        (f"Which?\nA. cup\nB. key\nC. lock\n{LETTER}", "choice", "C", ["cup", "key", "lock"]),
    ),
    "mmstar": (
        {"index": 0, "question": OPTIONS, "answer": "C", "category": "coarse", "l2_category": "scene"},
        (f"{OPTIONS}\n{LETTER}", "choice", "C", ["A cup is on A: book.", "A pen, red.", "No key.", "nan"]),
    ),
    "mmstar, MathVista": (
        {"index": 1, "question": MATH, "answer": "B", "category": "m", "l2_category": "n"},
        (f"{MATH}\n{LETTER}", "choice", "B", ["10", "15"]),
    ),
    "mme": (
        {"question_id": "x/1.png", "question": f"Is it? {ASK_MME}", "answer": "No", "category": "c"},
        (f"Is it?\n{SHORT}", "yesno", "No", []),
    ),
    "closed": (
        {"id": 0, "question": "How many?", "kind": "number", "answer": "2", "category": "c"},
        ("How many?", "number", "2", []),
    ),
}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("name", CLOSED)
def test_closed_ended_sets_become_questions(folder, monkeypatch, capsys, name, suffix):
    raw, expected = CLOSED[name]
    image = embedded(0) if suffix == ".parquet" else "0.png"
    lines = [{**raw, "image": image} | ({"id": f"q{n}"} if name == "closed" else {}) for n in range(3)]
    out = folder / "out" / "questions.jsonl"
    assert convert(monkeypatch, write(folder / f"x{suffix}", lines), folder / "out", "--records", 2) == 0
    printed = capsys.readouterr().out
    assert sums(printed) == {"written": 2, "not drawn": 1}
    assert printed.endswith(f"train_mbpo.py --questions {out} --data <records mined by build_data.py mbpo>\n")
    records = data.read_records(out, data.QUESTION_FIELDS)
    assert len(records) == 2 and len({r["id"] for r in records}) == 2
    assert len(list((folder / "out" / "images").iterdir())) == 1
    for record in records:
        values = record["question"], record["kind"], record["answer"], record.get("choices", [])
        assert values == expected
        assert record.get("source", "closed") == name.split(",")[0]
        assert record.get("category") == raw.get("category", raw.get("subject"))


def test_conversations_give_their_first_turn(folder, monkeypatch, capsys):
    first = turns(f"{QUESTION}\n<image>", ANSWERS[0][0], "More?", "No.", "Why?", "So.")
    mix = [{"id": 7, "image": "1.png", "conversations": first}]
    mix += [{"id": 7, "conversations": turns("Hello?", "Hello.")}]  # LLaVA-mix: 40,688 entries have no image
    mix += [{"id": 8, "image": "2.png", "conversations": turns(f"<image>\n{QUESTION}", ANSWERS[1][0])}]
    source = write(folder / "mix.json", mix)
    assert convert(monkeypatch, source, folder) == 0  # the images lie in the data folder already
    printed = capsys.readouterr().out
    assert sums(printed) == {"written": 2, "text only": 1} and "2 later turns left out" in printed
    assert "next: python build_data.py mbpo --source" in printed and "mbpo.jsonl\n" in printed
    same = {"question": QUESTION, "source": "llava"}
    assert data.read_lines(folder / "source.jsonl") == [
        {"id": "1", "image": "1.png", "chosen": ANSWERS[0][0], "origin": "7", **same},
        {"id": "3", "image": "2.png", "chosen": ANSWERS[1][0], "origin": "8", **same},
    ]
    assert not (folder / "images").exists()


# This one needs build_data.py and a trainer: sources -> records -> one step.


def test_every_preference_format_is_built_and_trains_a_step(world, folder, monkeypatch):
    import build_data
    import train_mfpo

    lines, base = [], world / "base"
    for k, (file, record_of, _) in enumerate(PREFERENCES.values()):
        source = write(folder / str(k) / file, [record_of(n, *pair) for n, pair in enumerate(ANSWERS)])
        assert convert(monkeypatch, source, folder, "--images", folder) == 0
        lines += [line | {"id": f"{k}-{line['id']}"} for line in data.read_lines(folder / "source.jsonl")]
    source, out = write(folder / "source.jsonl", lines[:20]), folder / "mfpo.jsonl"
    args = ("--source", source, "--model", base, "--out", out)
    assert run_here(monkeypatch, build_data, "mfpo", *args, "--batch", 2) == 0
    args = ("--data", out, "--model", base, "--out", folder / "run", "--eval_split", "none", "--epochs", 1)
    assert run_here(monkeypatch, train_mfpo, *args, "--curriculum", "none", "--pairs_per_step", 20) == 0


# ------------------------------------------------------------------------------------------ texts


@pytest.mark.parametrize(
    "prompt",
    [
        QUESTION,
        f"<image>\n{QUESTION}",
        f"{QUESTION}\n<image>",
        VICUNA.format(QUESTION),
        f"USER: <image>\n{QUESTION} ASSISTANT:",
    ],
)
def test_templates_are_stripped(prompt):
    assert sources.bare_question(prompt) == QUESTION


def test_what_only_looks_like_a_template_stays():
    for text in ("Who is the USER: here?", "What does [INST] mean?", "Is ASSISTANT: a word?"):
        assert sources.bare_question(text) == text
    with pytest.raises(data.BadRecord, match="several turns"):
        sources.bare_question("USER: Hello? ASSISTANT: Hello.</s>USER: And now? ASSISTANT:")
    with pytest.raises(data.BadRecord, match="several <image>"):
        sources.bare_question("<image> <image> Which?")
    with pytest.raises(data.BadRecord, match="no question"):
        sources.bare_question("USER: <image>\n ASSISTANT:")


def test_only_an_end_mark_at_the_end_goes():
    assert sources.bare_answer("A </s> in between.") == "A </s> in between."
    assert sources.bare_answer(" A.</s> \n") == "A."


def test_turns_and_messages():
    talk = [{"from": "system", "value": "Be kind."}, *turns("Which?", "A.")]
    assert sources.first_turn({"c": talk}, "c") == ("Be kind.\nWhich?", "A.", 0)
    odd = [{"from": [], "value": "x"}] * 2
    for bad in ([], talk[:2], talk[2:], [*talk, talk[2]], [*talk, "x"], odd, "ab"):
        with pytest.raises(data.BadRecord, match="must hold turns"):
            sources.first_turn({"c": bad}, "c")
    plain = {"image": "0.png", "prompt": "Which?", "chosen": "A", "rejected": "B"}
    system = message("system", "Be kind.") + message("user", "Which?")
    assert sources.trl({**plain, "prompt": system})["question"] == "Be kind.\nWhich?"
    assert sources.image_in({**plain, "images": None}) == "0.png"
    with pytest.raises(data.BadRecord, match="has 2 images"):
        sources.image_in({**plain, "images": ["0.png", "1.png"]})
    with pytest.raises(data.BadRecord, match="mentions an image in file_name"):
        sources.image_in({"file_name": "0.png", "question": "Which?"})
    assert sources.first_turn({"system": "Be kind.", "c": talk[1:]}, "c")[0] == "Be kind.\nWhich?"
    both = message("user", "Which?") + message("assistant", "Same.")
    same = sources.trl({"image": "0.png", "chosen": both, "rejected": both})
    assert same["question"] == "Which?"
    assert same["chosen"] == same["rejected"] == "Same."  # refused as equal later
    other = message("user", "What?") + message("assistant", "Same.")
    for chosen, rejected in ((both, other), (both + both, both), (both[1:], both[1:]), ([], [])):
        with pytest.raises(data.BadRecord, match="several turns|must hold turns|'prompt' is missing"):
            sources.trl({"image": "0.png", "chosen": chosen, "rejected": rejected})


def test_two_questions_are_no_pair():
    talks = {"conversations": turns("A?", "a"), "rejected_conversations": turns("B?", "b")}
    with pytest.raises(data.BadRecord, match="different questions"):
        sources.conversation({"image": "0.png", **talks}, paired=True)


@pytest.mark.parametrize(
    ("options", "choices"),
    [
        ("Options: A: John B. Smith, B: Eve", ["John B. Smith", "Eve"]),
        ("Options: A: a (B) b, B: c", ["a (B) b", "c"]),
        ("Choices:\n(A) Options: one\n(B) 15", ["Options: one", "15"]),
    ],
)
def test_options_inside_a_question(options, choices):
    raw = {"question": f"Which, A. or B.? \n{options}", "answer": "B"}
    assert sources.mmstar(raw)["choices"] == choices


def test_small_differences_of_closed_ended_sets():
    raw = {"question": "Which?", "choices": ["a", "b"], "answer": 0, "hint": ""}
    assert sources.choice(raw, "choices")["question"].startswith("Which?\nA. a")
    for answer in (True, 2, -1, 0.0, "B", None, [0]):
        with pytest.raises(data.BadRecord, match="must be one of 0, 1, got"):
            sources.choice({**raw, "answer": answer}, "choices")
    assert sources.mme({"question": "Is it?", "answer": "yes"})["answer"] == "Yes"


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ({"question": "Which?", "answer": "A", "l2_category": "x"}, "'choices' unusable"),
        ({"question": "Which? Options: A: a, B: b", "answer": "AB", "l2_category": "x"}, "'answer' unusable"),
        ({"question": "Which?", "choices": ["a", " "], "answer": 0}, "'choices' unusable"),
        ({"question": "Which?", "choices": ["a"] * 27, "answer": 0}, "'choices' unusable"),
        ({"question": "Which?", "options": "ab", "answer": 0}, "'options' of the wrong type"),
        ({"question": "Is it?", "answer": "maybe"}, "'answer' unusable"),
        ({"question": "Is it?", "answer": "Yes", "kind": "yesno"}, "no known format"),  # ours, without its id
    ],
)
def test_questions_that_cannot_be_used(folder, raw, reason):
    source = write(folder / "x.jsonl", [{**raw, "image": "0.png"}])
    ((_, _, error, *_),) = sources.records([source], "", folder, folder)
    assert error.reason == reason


# ------------------------------------------------------------------------------------------ images


def zoo(folder):
    """Images of every sort: {name: what must become of it}; a text is a part of the refusal."""
    grey = Image.fromarray(np.arange(48 * 32, dtype=np.uint8).reshape(32, 48))
    rgba = picture(1).convert("RGBA")
    rgba.putalpha(grey.resize(rgba.size))
    turned = picture(2).resize((30, 60))
    exif = turned.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    files = {
        "photo.jpg": encoded(picture(0).resize((640, 480)), "JPEG"),
        "small.png": encoded(picture(1).resize((17, 31))),
        "grey.png": encoded(grey),
        "palette.gif": encoded(picture(0).convert("P"), "GIF"),
        "cmyk.jpg": encoded(picture(0).convert("CMYK"), "JPEG"),
        "rgba.png": encoded(rgba),
        "webp.webp": encoded(picture(0), "WEBP"),
        "one.png": encoded(Image.new("RGB", (1, 1), "red")),
        "long.png": encoded(Image.new("RGB", (10_000, 10))),
        "truncated.png": encoded(picture(0))[:900],
        "deep.png": encoded(Image.fromarray(np.full((8, 8), 40_000, np.uint16))),
        "text.png": b"no image at all",
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    turned.save(folder / "exif.jpg", exif=exif)
    bad = {
        "long.png": "times as long as wide",
        "truncated.png": "cannot be read as an image",
        "deep.png": "more than 8 bits",
        "text.png": "cannot be read as an image",
    }
    return {name: bad.get(name, "") for name in [*files, "exif.jpg"]}


@pytest.mark.parametrize("out", [".", "out"])
def test_images_of_every_sort_are_used_rightly_or_refused_by_name(tmp_path, monkeypatch, capsys, out):
    expected = zoo(tmp_path)
    line = {"question": QUESTION, "chosen": ANSWERS[0][0], "rejected": ANSWERS[0][1]}
    source = write(tmp_path / "x.jsonl", [{**line, "id": name, "image": name} for name in expected])
    for name, reason in expected.items():
        if reason:
            lines = [{**line, "id": "a", "image": "photo.jpg"}, {**line, "id": "b", "image": name}]
            bad = write(tmp_path / "bad.jsonl", lines)
            printed = refused(monkeypatch, capsys, sources, bad, "--out", tmp_path / out)
            assert "bad.jsonl, line 2" in printed and name in printed and reason in printed
            assert not (tmp_path / out / "images").exists()
    assert convert(monkeypatch, source, tmp_path / out, "--skip_bad", "True") == 0
    left_out = {"image unreadable": 2, "image too long": 1, "image not of 8 bits": 1}
    assert sums(capsys.readouterr().out) == {"written": 9, **left_out}
    records = data.read_records(tmp_path / out / "source.jsonl", data.SOURCE_FIELDS)
    assert [r["id"] for r in records] == [name for name, reason in expected.items() if not reason]
    for record in records:
        written = tmp_path / out / record["image"]
        assert written.read_bytes() == (tmp_path / record["id"]).read_bytes()
        assert written.suffix == (tmp_path / record["id"]).suffix
    seen = {r["id"]: np.asarray(data.load_image(tmp_path / out / r["image"])) for r in records}
    assert seen["exif.jpg"].shape == (30, 60, 3) and seen["one.png"].tolist() == [[[255, 0, 0]]]
    assert np.array_equal(seen["grey.png"][..., 0], np.arange(48 * 32).reshape(32, 48) % 256)
    assert abs(seen["cmyk.jpg"].astype(int) - np.asarray(picture(0))).mean() < 60  # not inverted


GOOD = {"id": "a", "image": "0.png", "question": QUESTION, "chosen": ANSWERS[0][0], "rejected": ANSWERS[0][1]}


def test_images_stay_are_linked_or_are_copied(folder, monkeypatch):
    images = folder / "pictures"
    images.mkdir()
    (folder / "0.png").rename(images / "0.png")
    (images / "link.png").symlink_to("0.png")
    names = ["0.png", str(images / "0.png"), "link.png"]  # by the full path as well
    lines = [{**GOOD, "id": str(n), "image": name} for n, name in enumerate(names)]
    source = write(folder / "x.jsonl", lines)

    def written(out, *more):
        assert convert(monkeypatch, source, folder / out, "--images", images, *more) == 0
        (name,) = {line["image"] for line in data.read_lines(folder / out / "source.jsonl")}
        return folder / out / name, os.stat(images / "0.png").st_ino

    path, node = written(".")
    assert path == images / "0.png" and not (folder / "images").exists()
    path, node = written("linked")
    assert path.parent == folder / "linked" / "images" and os.stat(path).st_ino == node
    assert written("linked") == (path, node)  # again into the same folder

    (folder / "precious").write_text("years of work")
    os.link(folder / "precious", folder / "precious.png")

    def elsewhere(*args):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", elsewhere)
    path, node = written("copied")
    assert os.stat(path).st_ino != node and path.read_bytes() == (images / "0.png").read_bytes()
    assert not path.is_symlink() and os.listdir(path.parent) == [path.name]
    path.write_bytes(path.read_bytes()[:100])  # what a kill in the middle of a copy leaves
    assert written("copied")[0].read_bytes() == (images / "0.png").read_bytes()
    (folder / "precious.png").replace(path)  # what is written over must not be written through
    assert written("copied")[0].read_bytes() == (images / "0.png").read_bytes()
    assert (folder / "precious").read_text() == "years of work"


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("../0.png", "lies outside"),
        ("/etc/passwd", "lies outside"),
        ("nowhere.png", "no such image"),
        (5, "field 'image' must be"),
        ("/", "lies outside"),
        (".", "lies outside"),
    ],
)
def test_images_outside_the_folder(folder, monkeypatch, capsys, image, message):
    (folder / "images").mkdir()
    source = write(folder / "x.jsonl", [{**GOOD, "image": image}])
    args = (source, "--images", folder / "images", "--out", folder / "bad")
    assert message in refused(monkeypatch, capsys, sources, *args) and not (folder / "bad").exists()


def test_images_inside_of_records_are_not_all_held(tmp_path, monkeypatch):
    """Of 30 MB of images only some are in memory at any time."""
    lines, image = [], encoded(picture(0))
    for n in range(300):
        lines.append({**GOOD, "id": str(n), "image": {"bytes": image + os.urandom(100_000), "path": ""}})
    source = write(tmp_path / "x.parquet", lines)
    del lines
    tracemalloc.start()
    assert convert(monkeypatch, source, tmp_path / "out") == 0
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(os.listdir(tmp_path / "out" / "images")) == 300 and peak < 20e6


# ------------------------------------------------------------------------------------------ bad records


def without(field):
    return {name: value for name, value in GOOD.items() if name != field}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "not JSON"),
        ("[1]", "must be a JSON object"),
        ({**GOOD, "question": "  "}, "field 'question' is empty"),
        ({**GOOD, "chosen": 3}, "field 'chosen' must be a str, got '3'"),
        ({**GOOD, "chosen": GOOD["rejected"]}, "'rejected' must be a text other than 'chosen'"),
        ({**GOOD, "rejected": None}, "field 'rejected' is missing"),
        ({**GOOD, "image": None}, "field 'image' is missing"),
        (without("id"), "field 'id' is missing"),
        ({**GOOD, "id": "first"}, "'first' was used before"),
        ({**GOOD, "objects": [{"word": "cup", "box": [0, 0, float("nan"), 1]}]}, "'objects' needs boxes"),
        ({**GOOD, "objects": [{"word": "cup", "box": [0, 0, 10**400, 9]}]}, "'objects' needs boxes"),
        ({**GOOD, "objects": [{"word": "cup", "box": [5, 0, 5, 9]}]}, "'objects' needs boxes"),
        ({**GOOD, "objects": [{"word": "cup", "box": [-5, -5, 0, 9]}]}, "'objects' needs boxes"),
        ({**GOOD, "objects": [{"box": [0, 0, 5, 9]}]}, "field 'word' is missing"),
        ({**GOOD, "objects": "cup"}, "field 'objects' must be a list"),
        ({**GOOD, "chosen": "half \ud800"}, "half a character"),
        ({**GOOD, "note": ["\udc80"]}, "JSON cannot hold it"),
        ({**GOOD, "\udc80": 1}, "JSON cannot hold it"),
    ],
)
def test_mistakes_are_named_with_file_and_line(folder, monkeypatch, capsys, line, message):
    text = line if isinstance(line, str) else json.dumps(line)
    (folder / "x.jsonl").write_text(json.dumps({**GOOD, "id": "first"}) + "\n" + text + "\n")
    args = (folder / "x.jsonl", "--out", folder / "out")
    before = files_in(folder)
    printed = refused(monkeypatch, capsys, sources, *args)
    assert "x.jsonl, line 2" in printed and message in printed and len(printed) < 300
    assert files_in(folder) == before
    assert run_here(monkeypatch, sources, *args, "--skip_bad", "True") == 0
    parts = sums(capsys.readouterr().out)
    assert parts.pop("written") == 1 and list(parts.values()) == [1]
    assert [line["id"] for line in data.read_lines(folder / "out" / "source.jsonl")] == ["first"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", '[{"a": 1}', "x.json: not JSON"),
        ("x.json", '[{"a": 1} {"a": 2}]', "x.json: not JSON"),
        ("x.json", "[%s] tail", "x.json: not JSON"),
        ("x.json", "[]", "no usable records"),
        ("x.jsonl", "", "no usable records"),
        ("x.jsonl", '{"a": 1}', "line 1: no known format has the fields a. Rename them or give --format"),
        ("x.parquet", "no parquet", "cannot be read as parquet"),
        ("x.jsonl", b"\xff\xfe", "not UTF-8"),
        ("x", None, "no such file, nor a folder with .parquet files"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, monkeypatch, capsys, name, content, message):
    if name == "x.parquet":
        pytest.importorskip("pyarrow", reason="reading .parquet needs pyarrow")
    if content is not None:
        content = content.replace("%s", json.dumps(GOOD)).encode() if isinstance(content, str) else content
        (tmp_path / name).write_bytes(content)
    before = files_in(tmp_path)
    assert message in refused(monkeypatch, capsys, sources, tmp_path / name, "--out", tmp_path / "a" / "b")
    assert files_in(tmp_path) == before


def test_parquet_of_other_columns_with_dates_and_without_pyarrow(folder, monkeypatch, capsys):
    source, args = folder / "x.parquet", (folder / "x.parquet", "--out", folder / "out")
    write(source, [{**GOOD, "day": datetime.date(2024, 1, 1)}])
    assert "x.parquet, row 1: JSON cannot hold it" in refused(monkeypatch, capsys, sources, *args)
    write(source, [{"picture": "a", "caption": "b"}])
    printed = refused(monkeypatch, capsys, sources, *args)
    assert "row 1: no known format has the fields picture, caption" in printed
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install pyarrow" in refused(monkeypatch, capsys, sources, *args)


def test_with_skip_bad_the_first_record_may_be_bad(folder, monkeypatch, capsys):
    lines = ["{broken", *[json.dumps({"nothing": 1})] * 200, json.dumps(GOOD)]
    (folder / "x.jsonl").write_text("\ufeff" + "\n\n".join(lines) + "\n\n", encoding="utf-8")
    args = (folder / "x.jsonl", "--out", folder / "out")
    assert "x.jsonl, line 1: not JSON" in refused(monkeypatch, capsys, sources, *args)
    assert run_here(monkeypatch, sources, *args, "--skip_bad") == 0
    assert sums(capsys.readouterr().out) == {"written": 1, "not JSON": 1, "no known format": 200}


def test_the_format_may_be_named(folder, monkeypatch, capsys):
    """What is RLAIF-V by its fields is read as TRL's, if the user says so; and must be of that form."""
    source = write(folder / "x.jsonl", [{**GOOD, "prompt": "Which?"}])
    assert convert(monkeypatch, source, folder, "--format", "trl") == 0
    (record,) = data.read_lines(folder / "source.jsonl")
    assert record["question"] == "Which?" and record["source"] == "trl"
    printed = refused(monkeypatch, capsys, sources, source, "--out", folder, "--format", "mme")
    assert "line 1: field 'answer' is missing" in printed
    assert "invalid choice" in refused(monkeypatch, capsys, sources, source, "--out", folder, "--format", "x")


def mutated(rng, value):
    """A record with something wrong somewhere, maybe."""
    odd = [None, True, 0, -1, 1e400, 10**30, "", " ", "a" * 2000, "\ud83d", "\x00", "<image>", [], {}, [[]]]
    odd += ["USER: x ASSISTANT:", {"bytes": None}, {"role": "user"}, [{"type": "text"}]]
    odd += ["../x", "/", ".", "0.png\x00"]
    value = json.loads(json.dumps(value))
    for _ in range(rng.randint(1, 3)):
        spot, key = None, None
        here = value
        while isinstance(here, dict | list) and here:
            spot, key = here, rng.choice(list(here)) if isinstance(here, dict) else rng.randrange(len(here))
            here = spot[key]
            if rng.random() < 0.4:
                break
        if spot is None:
            break
        if isinstance(spot, dict) and rng.random() < 0.3:
            del spot[key]
        else:
            spot[key] = copy.deepcopy(rng.choice(odd))
    return value


def test_thousands_of_mutated_records_and_damaged_images_are_refused_or_used(folder, monkeypatch, capsys):
    """No record, however odd, gives a traceback or is lost; and what passes has what is needed."""
    rng = random.Random(0)
    image = encoded(picture(0))
    for n in range(60):
        spoilt = bytearray(image if n % 2 else encoded(picture(0), "JPEG"))
        for _ in range(rng.randint(1, 20)):
            spoilt[rng.randrange(len(spoilt))] = rng.randrange(256)
        length = rng.randrange(len(spoilt)) if n % 3 == 0 else len(spoilt)
        (folder / f"spoilt{n}.png").write_bytes(spoilt[:length])
    objects = [{"word": "cup", "box": [0, 0, 9, 9]}]
    plain = {**GOOD, "images": ["0.png"], "prompt": QUESTION, "objects": objects}
    answers = {"chosen": message("assistant", "A."), "rejected": message("assistant", "B.")}
    examples = {
        "own": plain,
        "rlhf-v": {"image": "0.png", "text": json.dumps(GOOD)},
        "rlaif-v": GOOD,
        "mdpo": {**GOOD, "img_path": "0.png", "prompt": VICUNA.format(QUESTION)},
        "povid": povid(0, *ANSWERS[0]),
        "trl": {"image": "0.png", "prompt": message("user", QUESTION, True), **answers},
        "llava": {"image": "0.png", "conversations": turns(QUESTION, "Yes.", "And?", "No.")},
        **{name: {**raw, "image": "0.png"} for name, (raw, _) in CLOSED.items() if "," not in name},
    }
    examples["closed"] |= {"id": "a", "choices": [], "answer": "2"}
    passed = 0
    for name, example in examples.items():
        lines = [mutated(rng, example) for _ in range(200)]
        lines += [{**example, "image": f"spoilt{n}.png", "img_path": f"spoilt{n}.png"} for n in range(60)]
        lines = [{**line, "id": f"{n}"} if line.get("id") == "a" else line for n, line in enumerate(lines)]
        source, out = write(folder / "x.jsonl", lines), folder / name
        assert convert(monkeypatch, source, out, "--format", name, "--skip_bad", "True") == 0
        parts = sums(capsys.readouterr().out)
        assert sum(parts.values()) == len(lines)
        closed = name in sources.CLOSED
        fields = data.QUESTION_FIELDS if closed else data.SOURCE_FIELDS
        records = data.read_records(out / ("questions.jsonl" if closed else "source.jsonl"), fields)
        assert len(records) == parts["written"]
        assert {record["image"] for record in records} == {f"images/{f}" for f in os.listdir(out / "images")}
        for record in records:
            data.load_image(out / record["image"])
            assert closed or record.get("rejected", "").strip() != record["chosen"].strip()
        passed += len(records)
    assert passed > 300


# ------------------------------------------------------------------------------------------ the draw


def test_a_draw_is_the_same_again_in_order_and_leaves_no_other_images(tmp_path, monkeypatch, capsys):
    lines = [{"idx": n, "question": f"Is it {n}?", "image": embedded(n), "answer": "Yes"} for n in range(40)]
    lines[7]["answer"] = "maybe"
    source = write(tmp_path / "x.parquet", lines)
    for out in ("one", "two"):
        assert convert(monkeypatch, source, tmp_path / out, "--records", 9, "--skip_bad", "True") == 0
        assert sums(capsys.readouterr().out) == {"written": 9, "not drawn": 30, "'answer' unusable": 1}
    records = data.read_lines(tmp_path / "one" / "questions.jsonl")
    rows = [int(record["id"]) for record in records]
    assert rows == sorted(rows) and rows != list(range(1, 10)) and len(set(rows)) == 9 and 8 not in rows
    assert [record["origin"] for record in records] == [str(row - 1) for row in rows]
    written = {f"images/{name}" for name in os.listdir(tmp_path / "one" / "images")}
    assert {record["image"] for record in records} == written
    one, two = (list(files_in(tmp_path / out).values()) for out in ("one", "two"))
    assert one == two
    assert convert(monkeypatch, source, tmp_path / "all", "--records", 100, "--skip_bad", "True") == 0
    assert sums(capsys.readouterr().out)["written"] == 39


def test_every_record_has_the_same_chance(tmp_path, monkeypatch):
    """5 of sources of many sizes, under a seed of its own each: about as many from each quarter."""
    drawn, seeded = np.zeros(4), random.Random
    source = write(tmp_path / "x.jsonl", [])
    for size in range(40, 140):
        made = [("", "own", {"id": str(n), "image": "x", "rejected": ""}, None, None, 0) for n in range(size)]
        monkeypatch.setattr(sources, "records", lambda *args, made=made: (item for item in made))
        monkeypatch.setattr(random, "Random", lambda seed, size=size: seeded(size))
        sources.build(source, sources.Config(out=str(tmp_path), records=5))
        for record in data.read_lines(tmp_path / "source.jsonl"):
            drawn[4 * int(record["id"]) // size] += 1
    assert drawn.sum() == 500 and all(abs(drawn - 125) < 3 * np.sqrt(500 * 0.25 * 0.75))


# ------------------------------------------------------------------------------------------ the command


def names_of(folder, *files):
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    return folder


def test_splits_are_told_by_names(tmp_path):
    train = [f"train-0000{n}-of-00002-ab12.parquet" for n in range(2)]
    test = "data/test-00000-of-00001.parquet"
    hub = names_of(tmp_path / "hub", "README.md", test, *(f"data/{file}" for file in train))
    with pytest.raises(runtime.Mistake, match="--split: test, train$"):
        sources.files_of(hub)
    assert [file.name for file in sources.files_of(hub, "train")] == train
    with pytest.raises(runtime.Mistake, match="--split val: no file's name says so. Splits: test, train"):
        sources.files_of(hub, "val")
    plain = names_of(tmp_path / "plain", "train.parquet", "validation.parquet")
    with pytest.raises(runtime.Mistake, match="train, validation"):
        sources.files_of(plain)
    assert sources.files_of(plain, "val") == [plain / "validation.parquet"]
    for files in (
        ["RLAIF-V_000.parquet", "RLAIF-V_001.parquet"],
        ["0.parquet", "trained.parquet", "tests.parquet"],
        ["x-00000-of-00002.parquet", "x-00001-of-00002.parquet"],
    ):
        one = names_of(tmp_path / files[0], *files)
        assert sources.files_of(one) == [one / file for file in sorted(files)]
    with pytest.raises(runtime.Mistake, match="nor a folder with .parquet"):
        sources.files_of(names_of(tmp_path / "empty", "x.txt"))


def test_a_folder_of_parquet_files_is_read_in_order(tmp_path, monkeypatch):
    for n in (1, 0):
        lines = [{"question": f"{n}{k}", "image": embedded(0), "answer": "Yes"} for k in range(2)]
        write(tmp_path / "in" / "data" / f"train-0000{n}-of-00002.parquet", lines)
    assert convert(monkeypatch, tmp_path / "in", tmp_path / "out", "--split", "train") == 0
    records = data.read_lines(tmp_path / "out" / "questions.jsonl")
    read = [(record["id"], record["question"][:2]) for record in records]
    assert read == [("1", "00"), ("2", "01"), ("3", "10"), ("4", "11")]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "FILE must come first, got nothing. usage: python -m extras.sources FILE --out FOLDER"),
        (["--out", "x", "x.jsonl"], "FILE must come first, got --out. usage: "),
        (["x.jsonl"], "--out is missing: name a folder. usage: "),
        (["x.jsonl", "--out", "x", "--records", "-1"], "--records must not be negative"),
        (["x.jsonl", "--out", "x", "--images", "nowhere"], "--images nowhere: no such folder"),
        (["x.jsonl", "--out", "x", "--image", "."], "Did you mean --images?"),
        (["x.jsonl", "--out", "x"], "x.jsonl: no such file"),
    ],
)
def test_wrong_command_lines(tmp_path, monkeypatch, capsys, args, message):
    monkeypatch.chdir(tmp_path)
    printed = refused(monkeypatch, capsys, sources, *args)
    assert message in printed and len(printed.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_help_lists_the_flags(monkeypatch, capsys):
    assert run_here(monkeypatch, sources, "--help") == 0
    printed = capsys.readouterr().out
    assert "FILE --out FOLDER" in printed and "--skip_bad" in printed and "scienceqa" in printed


def test_the_source_itself_is_not_written_over(folder, monkeypatch, capsys):
    source = write(folder / "source.jsonl", [GOOD, {**GOOD, "id": "b", "image": "nowhere.png"}])
    before = files_in(folder)
    monkeypatch.chdir(source.parent)
    printed = refused(monkeypatch, capsys, sources, source.name, "--out", folder, "--skip_bad", "True")
    assert "would be written over" in printed and files_in(folder) == before


@pytest.mark.parametrize("stop", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("at", ["write_text", "put"])
def test_what_is_stopped_leaves_nothing_behind(folder, monkeypatch, capsys, stop, at):
    """But for what was there before: an image that an earlier run has put there stays."""
    source = write(folder / "x.jsonl", [{**GOOD, "id": f"{n}", "image": f"{n}.png"} for n in range(3)])
    write(folder / "y.jsonl", [GOOD])
    assert convert(monkeypatch, folder / "y.jsonl", folder / "old") == 0
    before, put = files_in(folder), sources.put

    def fails(*args):
        if at == "put":
            put(*args)
        raise stop

    monkeypatch.setattr(sources if at == "put" else runtime, at, fails)
    for out in ("old", "new/deep"):
        if isinstance(stop, OSError):
            assert "No space left" in refused(monkeypatch, capsys, sources, source, "--out", folder / out)
        else:
            with pytest.raises(KeyboardInterrupt):
                convert(monkeypatch, source, folder / out)
        assert files_in(folder) == before


def test_a_mistake_ends_the_threads(folder):
    """They must not be left to the garbage collector: joining them inside of it can wait for ever."""
    lines = [{**GOOD, "id": f"{n}", "chosen": "" if n == 3 else "A."} for n in range(20)]
    source = write(folder / "x.jsonl", lines)
    with pytest.raises(runtime.Mistake, match="line 4") as error:
        sources.build(source, sources.Config(out=str(folder / "out")))
    assert error and not [t for t in threading.enumerate() if t.name.startswith("ThreadPoolExecutor")]


def test_other_ranks_only_wait(folder, monkeypatch, capsys):
    monkeypatch.setattr(runtime, "rank", lambda: 1)
    assert convert(monkeypatch, write(folder / "x.jsonl", [GOOD]), folder / "out") == 0
    assert not (folder / "out").exists() and capsys.readouterr().out == ""


def test_a_disk_that_is_full_leaves_no_half_of_a_file(tmp_path):
    def rows():
        yield {"a": 1}
        raise OSError("No space left on device")

    (tmp_path / "x.jsonl").write_text("before")
    with pytest.raises(OSError, match="No space"):
        runtime.write_jsonl(tmp_path / "x.jsonl", rows())
    assert (tmp_path / "x.jsonl").read_text() == "before" and len(list(tmp_path.iterdir())) == 1
