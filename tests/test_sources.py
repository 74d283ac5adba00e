"""Public datasets in their own shapes, through the builders, a training step and eval.py; and what must be refused."""

import base64
import copy
import io
import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, command, refused, run_here
from PIL import Image

import build_data
import data
import eval
import grounding
import model
import runtime
import sources
import train_mbpo
import train_mfpo

QUESTION = "Describe the picture."
ANSWERS = [
    ("The picture shows a red cup.", "The picture shows a red cup and a blue spoon."),
    ("I can see a blue book and a green key.", "I can see a blue book."),
    ("There is a black lock in the picture.", "There is a black lock and a red key in the picture."),
]
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: <image>\n{} ASSISTANT:"
)


def picture(n):
    """A photograph of its own for each n, landscape or portrait."""
    rng = np.random.default_rng(n)
    return Image.fromarray(rng.integers(0, 255, [(40, 70, 3), (90, 50, 3), (64, 64, 3)][n % 3], dtype=np.uint8))


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
    meta = {"ds_name": "RLHF-V", "origin_dataset": "vqa", "origin_split": "{}", "idx": n, "image_path": f"{n}.jpg"}
    return {"image": embedded(n), "text": inner, **meta}


def rlaif_v(n, chosen, rejected):
    texts = {"question": QUESTION, "chosen": chosen, "rejected": rejected}
    return {"ds_name": "RLAIF-V", "image": embedded(n), **texts, "origin_dataset": "coco", "idx": str(n)}


def trl(n, chosen, rejected):
    texts = {"chosen": message("assistant", chosen), "rejected": message("assistant", rejected)}
    return {"prompt": message("user", QUESTION, image=True), "images": [embedded(n)], **texts}


PREFERENCES = {  # name -> file, what a record of that dataset looks like
    "rlhf-v": ("x.parquet", rlhf_v),
    "rlaif-v": ("x.parquet", rlaif_v),
    "trl": ("x.parquet", trl),
    "mdpo": (
        "x.json",
        lambda n, w, r: {
            "img_path": f"{n}.png",
            "prompt": VICUNA.format(QUESTION),
            "chosen": w,
            "rejected": f" {r}</s>",
        },
    ),
    "povid": (
        "x.json",
        lambda n, w, r: {
            "id": "same",
            "image": f"{n}.png",
            "conversations": turns(f"<image>\n{QUESTION}", w),
            "rejected_conversations": turns(f"<image>\n{QUESTION}", r),
        },
    ),
    "trl, the prompt inside the answers": (
        "x.jsonl",
        lambda n, w, r: {
            "image": f"{n}.png",
            "chosen": message("user", QUESTION, True) + message("assistant", w),
            "rejected": message("user", QUESTION, True) + message("assistant", r),
        },
    ),
    "own": (
        "x.jsonl",
        lambda n, w, r: {
            "id": f"mine-{n}",
            "image": f"{n}.png",
            "question": QUESTION,
            "chosen": w,
            "rejected": r,
            "objects": [{"word": "cup", "box": [1, 2, 30, 31]}] if "cup" in w else [],
        },  # fmt: skip
    ),
}


def write(path, records):
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


def build(monkeypatch, world, what, source, out, *more):
    return run_here(
        monkeypatch, build_data, what, "--source", source, "--model", world / "base", "--out", out, "--batch", 2, *more
    )


@pytest.mark.parametrize("name", PREFERENCES)
def test_preferences_of_every_dataset_become_records(world, folder, monkeypatch, name):
    file, record_of = PREFERENCES[name]
    source = write(folder / file, [record_of(n, *pair) for n, pair in enumerate(ANSWERS)])
    out = folder / "built" / "mfpo.jsonl"
    assert build(monkeypatch, world, "mfpo", source, out) == 0
    records = data.read_records(out, data.MFPO_FIELDS)
    assert [(r["question"], r["chosen"], r["rejected"]) for r in records] == [(QUESTION, *pair) for pair in ANSWERS]
    for n, record in enumerate(records):
        clean, noisy = (Image.open(out.parent / record[field]) for field in ("image", "image_rejected"))
        assert np.array_equal(np.asarray(clean), np.asarray(picture(n))) and noisy.size == (64, 64)
    key = [r["region_kind"] == "key" for r in records]
    assert key == ([True, False, False] if name == "own" else [False] * 3)
    assert len(records[0]["keywords"]) >= 2 and "cup" in records[0]["keywords"]
    if name == "own":  # what the model sees is noised, in the box, and the rest stays as it is to the bit
        seen = np.asarray(model.to_square(picture(0), 64, pad=False))
        changed = (np.asarray(Image.open(out.parent / records[0]["image_rejected"])) != seen).any(-1)
        box = np.zeros((64, 64), bool)
        # A picture of 70 x 40 is scaled by 1.6 to 112 x 64, and 24 columns are cut off on the left.
        box[int(2 * 1.6) : int(31 * 1.6) + 1, : int(30 * 1.6 - 24)] = True
        assert changed[box].mean() > 0.9 and not changed[~box].any()


CLOSED = {
    "scienceqa": (
        {"image": 0, "question": "Which is there?", "choices": ["cup", "key"], "answer": 1,
         "hint": "Look.", "subject": "s"},
        f"Context: Look.\nWhich is there?\nA. cup\nB. key\n{sources.CHOICE_PROMPT}", "choice", "B", ["cup", "key"],
    ),
    "ai2d": (
        {"image": 0, "question": "Which is there?", "options": ["cup", "key", "lock"], "answer": "2"},
        f"Which is there?\nA. cup\nB. key\nC. lock\n{sources.CHOICE_PROMPT}", "choice", "C", ["cup", "key", "lock"],
    ),
    "mmstar": (
        {"index": 0,
         "question": "Which option?\nOptions: A: The cup is on A: book., B: The pen, red., C: No key., D: nan",
         "image": 0, "answer": "C", "category": "coarse", "l2_category": "scene", "meta_info": {"source": "x"}},
        "Which option?\nOptions: A: The cup is on A: book., B: The pen, red., C: No key., D: nan\n"
        + sources.CHOICE_PROMPT, "choice", "C", ["The cup is on A: book.", "The pen, red.", "No key.", "nan"],
    ),
    "mmstar, MathVista": (
        {"index": 1, "question": "Hint: Please provide the option letter, e.g., A, B, C, D, at the end.\n"
         "Question: How many?\nChoices:\n(A) 10\n(B) 15", "image": 0, "answer": "B",
         "category": "m", "l2_category": "n"},
        "Hint: Please provide the option letter, e.g., A, B, C, D, at the end.\nQuestion: How many?\nChoices:\n(A) 10\n"
        f"(B) 15\n{sources.CHOICE_PROMPT}", "choice", "B", ["10", "15"],
    ),
    "mme": (
        {"question_id": "x/1.png", "image": 0, "question": "Is there a cup? Please answer yes or no.", "answer": "No",
         "category": "existence"},
        f"Is there a cup?\n{sources.SHORT_PROMPT}", "yesno", "No", [],
    ),
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("name", CLOSED)
def test_closed_ended_sets_become_questions(world, folder, monkeypatch, name, suffix):
    raw, question, kind, answer, choices = CLOSED[name]
    image = embedded(0) if suffix == ".parquet" else "0.png"
    source = write(folder / f"x{suffix}", [{**raw, "image": image}] * 3)
    out = folder / "questions.jsonl"
    assert build(monkeypatch, world, "mbpo", source, out, "--questions", 2) == 0
    records = data.read_records(out, data.QUESTION_FIELDS)
    assert len(records) == 2 and len({r["id"] for r in records}) == 2
    for record in records:
        assert (record["question"], record["kind"], record["answer"]) == (question, kind, answer)
        assert record.get("choices", []) == choices and record["source"] == name.split(",")[0]
        assert record.get("category") == raw.get("category", raw.get("subject"))


def test_every_format_trains_a_step_and_is_evaluated(world, folder, monkeypatch, capsys):
    """The thin path of a user: sources -> build_data.py -> one step of each trainer -> eval.py."""
    lines, asked = [], []
    for k, (file, record_of) in enumerate(PREFERENCES.values()):
        source = write(folder / file, [record_of(n, *pair) for n, pair in enumerate(ANSWERS)])
        assert build(monkeypatch, world, "mfpo", source, folder / f"{k}.jsonl") == 0
        lines += [record | {"id": f"{k}-{record['id']}"} for _, record in data.read_jsonl(folder / f"{k}.jsonl")]
    for k, (name, (raw, *_)) in enumerate(CLOSED.items()):
        category = {"category": f"{name}/{k}"} | raw
        source = write(folder / "x.jsonl", [{**category, "image": "0.png"}] * 2)
        assert build(monkeypatch, world, "mbpo", source, folder / "x_questions.jsonl") == 0
        asked += [q | {"id": f"{k}-{q['id']}"} for _, q in data.read_jsonl(folder / "x_questions.jsonl")]
    write(folder / "mfpo.jsonl", lines[:20])
    write(folder / "questions.jsonl", asked)
    run = ("--model", world / "base", "--eval_split", "none")
    args = ["--data", folder / "mfpo.jsonl", "--out", folder / "run", "--epochs", 1, "--curriculum", "none", *run]
    assert run_here(monkeypatch, train_mfpo, *args, "--pairs_per_step", 20) == 0

    mix = [{"id": 7, "image": "1.png", "conversations": turns(f"{QUESTION}\n<image>", ANSWERS[0][0], "More?", "No.")}]
    mix += [{"id": 7, "conversations": turns("Hello?", "Hello.")}]  # LLaVA-mix: 40,688 entries have no image
    mix += [{"id": 8, "image": "2.png", "conversations": turns(f"<image>\n{QUESTION}", ANSWERS[1][0])}]
    source = write(folder / "mix.json", mix)
    args = ("--iig_keep", 1, "--steps", 1, "--max_new_tokens", 20)
    assert build(monkeypatch, world, "mbpo", source, folder / "mbpo.jsonl", *args) in (0, 2)  # 2: no answer of use
    told = capsys.readouterr().out
    assert "2 records from" in told and "text only 1" in told and "a later turn of a conversation 1" in told
    kept = (folder / "mbpo.jsonl").is_file()
    args = [
        "--questions",
        folder / "questions.jsonl",
        "--out",
        folder / "run2",
        "--steps",
        1,
        "--groups_per_step",
        2,
        *run,
    ]
    args += ["--data", folder / "mbpo.jsonl", "--online_fraction", 0.5 if kept else 1, *run]
    assert run_here(monkeypatch, train_mbpo, *args) == 0

    args = ["--bench", "closed", "--questions", folder / "questions.jsonl", "--json", folder / "out.json"]
    answers = ["--answers", folder / "answers.jsonl"]
    assert run_here(monkeypatch, eval, *args, *answers, "--model", folder / "run2" / "final") == 0
    found = json.loads((folder / "out.json").read_text())
    assert found["counts"]["asked"] == 10 and 0 <= found["accuracy"] <= 1 and "mme" in found
    assert len((folder / "answers.jsonl").read_text().splitlines()) == 10


# ------------------------------------------------------------------------------------------------------- texts


@pytest.mark.parametrize(
    "prompt",
    [
        QUESTION,
        f"<image>\n{QUESTION}",
        f"{QUESTION}\n<image>",
        VICUNA.format(QUESTION),
        f"USER: <image>\n{QUESTION} ASSISTANT:",
        f"A chat. ### Human: <image>\n{QUESTION}\n### Assistant:",
        f"<s> [INST] <image>\n{QUESTION} [/INST]",
        f"<|im_start|>system\nHi.<|im_end|>\n<|im_start|>user\n<image>\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n",
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


def test_explain_prints_ranked_words_and_builds_nothing(world, folder, monkeypatch, capsys):
    source = write(folder / "x.json", [PREFERENCES["povid"][1](n, *pair) for n, pair in enumerate(ANSWERS)])
    before = sorted(folder.iterdir())
    assert build(monkeypatch, world, "mfpo", source, folder / "out.jsonl", "--explain", 2, "--top", 2) == 0
    told = capsys.readouterr().out
    assert told.count("record ") == 2 and "1 " in told and "(not used: over --top)" in told and "cup" in told
    assert sorted(folder.iterdir()) == before


# ------------------------------------------------------------------------------------------------------ images


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
        "long.png": "10000 x 10 is longer than",
        "truncated.png": "cannot be read as an image",
        "deep.png": "more than 8 bits",
        "text.png": "cannot be read as an image",
    }
    return {name: bad.get(name, "") for name in [*files, "exif.jpg"]}


def test_images_of_every_sort_are_used_rightly_or_refused_by_name(world, tmp_path, monkeypatch, capsys):
    expected = zoo(tmp_path)
    line = {"question": QUESTION, "chosen": ANSWERS[0][0], "rejected": ANSWERS[0][1]}
    write(tmp_path / "x.jsonl", [{**line, "id": name, "image": name} for name in expected])
    for name, reason in expected.items():
        if reason:
            write(
                tmp_path / "bad.jsonl", [{**line, "id": "a", "image": "photo.jpg"}, {**line, "id": "b", "image": name}]
            )
            args = ("--source", tmp_path / "bad.jsonl", "--model", world / "base", "--out", tmp_path / "out.jsonl")
            told = refused(monkeypatch, capsys, build_data, "mfpo", *args)
            assert "bad.jsonl, line 2" in told and name in told and reason in told
    assert not list(tmp_path.glob("out*"))
    assert build(monkeypatch, world, "mfpo", tmp_path / "x.jsonl", tmp_path / "out.jsonl", "--skip_bad") == 0
    told = capsys.readouterr().out
    assert "image unreadable 2" in told and "image too long 1" in told and "image not of 8 bits 1" in told
    records = data.read_records(tmp_path / "out.jsonl", data.MFPO_FIELDS)
    assert {r["id"] for r in records} == {name for name, reason in expected.items() if not reason}
    seen = {r["id"]: np.asarray(data.load_image(tmp_path / r["image"])) for r in records}
    assert seen["exif.jpg"].shape == (30, 60, 3) and seen["one.png"].tolist() == [[[255, 0, 0]]]
    assert np.array_equal(seen["grey.png"][..., 0], np.arange(48 * 32).reshape(32, 48) % 256)
    assert abs(seen["cmyk.jpg"].astype(int) - np.asarray(picture(0))).mean() < 60  # not inverted


def test_images_in_base64_and_outside_the_folder(world, folder, monkeypatch, capsys):
    line = {"id": "a", "question": QUESTION, "chosen": ANSWERS[0][0], "rejected": ANSWERS[0][1]}
    image = base64.b64encode(encoded(picture(0))).decode()
    source = write(folder / "x.jsonl", [{**line, "image": image}])
    assert build(monkeypatch, world, "mfpo", source, folder / "out.jsonl") == 0
    (record,) = data.read_records(folder / "out.jsonl", data.MFPO_FIELDS)
    assert record["image"].startswith("out_images/")
    for image, message in (
        ("../0.png", "lies outside"),
        ("/etc/passwd", "lies outside"),
        ("nowhere.png", "no such image"),
        (5, "field 'image' is a int"),
    ):
        source = write(folder / "x.jsonl", [{**line, "image": image}])
        args = ("--source", source, "--model", world / "base", "--out", folder / "bad.jsonl")
        assert message in refused(monkeypatch, capsys, build_data, "mfpo", *args)
    assert not list(folder.glob("bad*"))


# ------------------------------------------------------------------------------------------------- bad records

GOOD = {"id": "a", "image": "0.png", "question": QUESTION, "chosen": ANSWERS[0][0], "rejected": ANSWERS[0][1]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "not JSON"),
        ("[1]", "must be a JSON object"),
        ({**GOOD, "question": "  "}, "field 'question' is empty"),
        ({**GOOD, "chosen": 3}, "field 'chosen' must be a text, got int: '3'"),
        ({**GOOD, "chosen": GOOD["rejected"]}, "field 'rejected' must be a text other than 'chosen'"),
        ({**GOOD, "image": None}, "field 'image' is missing"),
        ({**GOOD, "id": "first"}, "'first' was used before"),
        ({**GOOD, "objects": [{"word": "cup", "box": [0, 0, float("nan"), 1]}]}, "'objects' needs"),
        ({**GOOD, "chosen": "half \ud800"}, "half a character"),
        ({k: v for k, v in GOOD.items() if k != "rejected"}, "field 'rejected' is missing"),
        ({**GOOD, "objects": [{"word": "cup", "box": [0, 0, 10**400, 9]}]}, "'objects' needs"),
        ({**GOOD, "note": ["\udc80"]}, "field 'note' holds half a character"),
        ({k: v for k, v in GOOD.items() if k != "rejected"} | {"source": "toy"}, "field 'source' says toy"),
    ],
)
def test_mistakes_are_named_with_file_and_line(world, folder, monkeypatch, capsys, line, message):
    text = line if isinstance(line, str) else json.dumps(line)
    (folder / "x.jsonl").write_text(json.dumps({**GOOD, "id": "first"}) + "\n" + text + "\n")
    args = ("--source", folder / "x.jsonl", "--model", world / "base", "--out", folder / "out.jsonl")
    before = sorted(folder.iterdir())
    told = refused(monkeypatch, capsys, build_data, "mfpo", *args)
    assert "x.jsonl, line 2" in told and message in told and sorted(folder.iterdir()) == before
    assert run_here(monkeypatch, build_data, "mfpo", *args, "--skip_bad") == 0
    assert "1 records from" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", '[{"a": 1}', "the file ends within it"),
        ("x.json", '[{"a": 1} {"a": 2}]', "x.json, item 1: '{\"a\": 2}]' follows"),
        ("x.json", "[%s] tail", "something follows the list's end"),
        ("x.json", '[%s, {"id" "b"}]', "x.json, item 2: not JSON"),
        ("x.json", "[]", "no usable records"),
        ("x.jsonl", "", "no usable records"),
        ("x.jsonl", '{"a": 1}', "no known format has the fields a"),
        ("x.parquet", "no parquet", "cannot be read as parquet"),
        ("x.jsonl", b"\xff\xfe", "not UTF-8"),
    ],
)
def test_files_that_cannot_be_read(world, tmp_path, monkeypatch, capsys, name, content, message):
    if name == "x.parquet":
        pytest.importorskip("pyarrow", reason="reading .parquet needs pyarrow")
    if isinstance(content, str):
        content = content.replace("%s", json.dumps({**GOOD, "image": "../data:no image is opened"})).encode()
    (tmp_path / name).write_bytes(content)
    for what in ("mfpo", "mbpo"):
        args = ("--source", tmp_path / name, "--model", world / "base", "--out", tmp_path / "out.jsonl")
        assert message in refused(monkeypatch, capsys, build_data, what, *args)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_wrong_columns_of_parquet_are_named(world, tmp_path, monkeypatch, capsys):
    write(tmp_path / "x.parquet", [{"picture": "a", "caption": "b"}])
    args = ("--source", tmp_path / "x.parquet", "--model", world / "base", "--out", tmp_path / "out.jsonl")
    told = refused(monkeypatch, capsys, build_data, "mfpo", *args)
    assert "x.parquet, row 1: no known format has the fields picture, caption" in told and "rlhf-v: image, text" in told


def test_parquet_without_pyarrow_names_the_package(tmp_path, monkeypatch):
    (tmp_path / "x.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match="pip install pyarrow"):
        next(sources.read(tmp_path / "x.parquet"))


def test_a_list_is_read_whole_at_any_size_of_block(tmp_path):
    items = [{"n": n, "text": ']},[{ \\" é ' * n} for n in range(40)] + [12345, "a", [], None]
    path = tmp_path / "x.json"
    for text in (json.dumps(items), json.dumps(items, indent=2, ensure_ascii=False), "\ufeff" + json.dumps(items)):
        path.write_text(text, encoding="utf-8")
        for block in (7, 64, 1 << 20):
            assert [item for _, item in data.read_json_list(path, block)] == items


def test_with_skip_bad_the_first_record_may_be_bad(world, folder, monkeypatch, capsys):
    lines = ["{broken", json.dumps({"nothing": 1}), json.dumps(GOOD)]
    (folder / "x.jsonl").write_text("\ufeff" + "\n\n".join(lines) + "\n\n", encoding="utf-8")
    for what in ("mfpo", "mbpo"):
        args = (what, "--source", folder / "x.jsonl", "--model", world / "base", "--out", folder / "out.jsonl")
        assert "x.jsonl, line 1: not JSON" in refused(monkeypatch, capsys, build_data, *args)
    assert build(monkeypatch, world, "mfpo", folder / "x.jsonl", folder / "out.jsonl", "--skip_bad") == 0
    told = capsys.readouterr().out
    assert "1 records from" in told and "not JSON 1" in told and "no known format 1" in told


def test_what_is_not_ours_is_not_deleted_and_a_mistake_leaves_nothing(world, folder, monkeypatch, capsys):
    (folder / "built" / "out.parts").mkdir(parents=True)
    (folder / "built" / "out.parts" / "thesis.txt").write_text("years of work")
    write(folder / "x.jsonl", [GOOD])
    args = ("mfpo", "--source", folder / "x.jsonl", "--model", world / "base", "--out", folder / "built" / "out.jsonl")
    assert "none of our folders" in refused(monkeypatch, capsys, build_data, *args)
    assert (folder / "built" / "out.parts" / "thesis.txt").read_text() == "years of work"
    write(folder / "x.jsonl", [GOOD, {**GOOD, "id": "b", "image": "nowhere.png"}])  # the first image is copied before
    args = (*args[:-1], folder / "other" / "out.jsonl")
    assert "no such image" in refused(monkeypatch, capsys, build_data, *args)
    assert not list((folder / "other").iterdir())


def test_a_decoder_may_fail_as_it_likes(folder, monkeypatch):
    for error in (RuntimeError, NotImplementedError, KeyError, MemoryError):
        monkeypatch.setattr(
            data.ImageOps, "exif_transpose", lambda image, error=error: (_ for _ in ()).throw(error("x"))
        )
        with pytest.raises(data.BadRecord, match="cannot be read as an image"):
            data.load_image(folder / "0.png")


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


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ({"question": "Which?", "answer": "A"}, "options unusable"),
        ({"question": "Which? Options: A: a, B: b", "answer": "AB"}, "options unusable"),
    ],
)
def test_options_that_cannot_be_used(raw, reason):
    with pytest.raises(data.BadRecord) as error:
        sources.mmstar(raw)
    assert error.value.reason == reason


def test_empty_answers_images_and_prompts_of_foreign_records():
    with pytest.raises(data.BadRecord, match="empty but for an end mark"):
        sources.first_turn({"c": turns("Which?", "</s>")}, "c")
    record = {"images": None, "image": "0.png", "prompt": "Which?", "chosen": "A", "rejected": "B"}
    assert sources.trl(record)["image"] == "0.png"
    both = message("user", "Which?") + message("assistant", "Same.")
    same = sources.trl({"image": "0.png", "chosen": both, "rejected": both})
    assert same["question"] == "Which?" and same["chosen"] == same["rejected"] == "Same."  # refused as equal later


def test_boxes_of_plural_and_double_words_are_those_of_the_keyword():
    objects = [{"word": word, "box": [0, 0, 1, 1]} for word in ("cup", "Dining Table", "glass", "tray")]
    found = build_data.own_regions({"objects": objects}, ["cups", "tables", "glasses"])
    assert [region["word"] for region in found] == ["cup", "Dining Table", "glass"]


def mutated(rng, value):
    """A record with something wrong somewhere, maybe."""
    odd = [None, True, 0, -1, 1e400, 10**30, "", " ", "a" * 2000, "\ud83d", "\x00", "<image>", "USER: x ASSISTANT:", [],
           {}, [[]], {"bytes": None}, {"role": "user"}, [{"type": "text"}], "../x", "/", ".", "0.png\x00"]  # fmt: skip
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


def test_thousands_of_mutated_records_and_damaged_images_are_refused_or_used(folder):
    """No record, however odd, raises anything but BadRecord; and what passes has what the builders need."""
    rng = random.Random(0)
    image = encoded(picture(0))
    for n in range(60):
        spoilt = bytearray(image if n % 2 else encoded(picture(0), "JPEG"))
        for _ in range(rng.randint(1, 20)):
            spoilt[rng.randrange(len(spoilt))] = rng.randrange(256)
        (folder / f"spoilt{n}.png").write_bytes(spoilt[: rng.randrange(len(spoilt))] if n % 3 == 0 else spoilt)
    plain = {**GOOD, "images": ["0.png"], "prompt": QUESTION, "objects": [{"word": "cup", "box": [0, 0, 9, 9]}]}
    examples = {
        "own": plain,
        "rlhf-v": {"image": "0.png", "text": json.dumps(GOOD)},
        "rlaif-v": GOOD,
        "mdpo": {**GOOD, "img_path": "0.png", "prompt": VICUNA.format(QUESTION)},
        "povid": PREFERENCES["povid"][1](0, *ANSWERS[0]),
        "trl": {"image": "0.png", "prompt": message("user", QUESTION, True), "chosen": message("assistant", "A."),
                "rejected": message("assistant", "B.")},
        "llava": {"image": "0.png", "conversations": turns(QUESTION, "Yes.", "And?", "No.")},
        "closed": {"id": "a", "image": "0.png", "question": "Is it?", "kind": "yesno", "answer": "Yes", "choices": []},
        **{name: {**raw, "image": "0.png"} for name, (raw, *_) in CLOSED.items() if "," not in name},
    }  # fmt: skip
    passed = 0
    for name, example in examples.items():
        lines = [mutated(rng, example) for _ in range(200)]
        lines += [{**example, "image": f"spoilt{n}.png", "img_path": f"spoilt{n}.png"} for n in range(60)]
        path = folder / "x.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        check = data.check_question if name in sources.CLOSED else build_data.check_source
        if name == "llava":
            check = lambda record: None  # noqa: E731
        found = list(sources.records(path, name, folder, folder, folder / "copies", check))
        assert len(found) == len(lines)
        for where, record in found:
            assert "x.jsonl, line" in where
            if not isinstance(record, data.BadRecord):
                passed += 1
                json.dumps(record)
                needed = ("question", "answer") if name in sources.CLOSED else ("question", "chosen")
                assert all(
                    isinstance(record[field], str) and record[field].strip() for field in (*needed, "image", "id")
                )
                data.load_image(folder / record["image"])
    assert passed > 300


# -------------------------------------------------------------------------------------------- size and interruption


def test_memory_does_not_grow_with_the_source(tmp_path):
    """Ten times the records, the same memory: measured in processes of their own."""
    picture(0).save(tmp_path / "0.png")
    program = (
        "import sys, resource, pathlib; sys.path.insert(0, sys.argv[1]); import sources; p = pathlib.Path(sys.argv[2]);"
        "n = sum(1 for _ in sources.records(p, '', p.parent, p.parent, None, lambda r: None));"
        "print(n, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
    )
    used = {}
    for count in (2_000, 25_000):
        path = tmp_path / "x.json"
        with open(path, "w") as file:
            file.write("[")
            for n in range(count):
                file.write(("," if n else "") + json.dumps({**PREFERENCES["povid"][1](0, "A. " * 300, "B."), "id": n}))
            file.write("]")
        done = subprocess.run([sys.executable, "-c", program, ROOT, path], capture_output=True, text=True, timeout=120)
        number, used[count] = map(int, done.stdout.split())
        assert number == count
    assert path.stat().st_size > 25e6
    assert used[25_000] - used[2_000] < 20, used  # MB; a set of 8-byte hashes of the ids is all that is kept


def test_two_processes_build_the_same_files(world, folder, monkeypatch):
    lines = [{**GOOD, "id": str(n), "image": f"{n % 3}.png", "rejected": f"A red pen {n}."} for n in range(24)]
    source = write(folder / "x.jsonl", lines)
    assert build(monkeypatch, world, "mfpo", source, folder / "straight" / "x.jsonl", "--region", "random") == 0

    def everything(name):
        files = sorted(path for path in (folder / name).rglob("*") if path.is_file())
        return {str(path.relative_to(folder / name)): path.read_bytes() for path in files}

    straight = everything("straight")
    assert len(straight) == 1 + 3 + 24
    args = ["mfpo", "--source", source, "--model", world / "base", "--batch", 2, "--region", "random"]
    two = command(build_data, *args, "--out", folder / "two" / "x.jsonl", processes=2)
    done = subprocess.run(two, capture_output=True, text=True, timeout=120)
    assert everything("two") == straight, done.stderr


@pytest.mark.parametrize("stop", ["the source", "a part", "the images", "the records", "the end"])
def test_a_build_killed_at_its_seams(world, folder, monkeypatch, stop):
    source = write(folder / "x.jsonl", [{**GOOD, "id": str(n), "image": f"{n % 3}.png"} for n in range(5)])
    out = folder / "built" / "x.jsonl"
    assert build(monkeypatch, world, "mfpo", source, out) == 0

    def everything():
        return {str(path): path.read_bytes() for path in sorted(out.parent.rglob("*")) if path.is_file()}

    straight, write_jsonl, rename = everything(), runtime.write_jsonl, os.rename

    def written(path, rows):
        names = {"the source": "source.jsonl", "a part": "record_000001.jsonl", "the records": "x.jsonl"}
        if path.name == names.get(stop):
            raise KeyboardInterrupt
        return write_jsonl(path, rows)

    def renamed(path, to):
        if path.name == {"the images": "distorted", "the end": "x.parts"}.get(stop):
            raise KeyboardInterrupt
        rename(path, to)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runtime, "write_jsonl", written)
        patch.setattr(runtime.Path, "rename", renamed)
        build(patch, world, "mfpo", source, out)
    assert build(monkeypatch, world, "mfpo", source, out) == 0
    assert everything() == straight


def test_a_disk_that_is_full_leaves_no_half_of_a_file(tmp_path):
    def rows():
        yield {"a": 1}
        raise OSError("No space left on device")

    (tmp_path / "x.jsonl").write_text("before")
    with pytest.raises(OSError, match="No space"):
        runtime.write_jsonl(tmp_path / "x.jsonl", rows())
    assert (tmp_path / "x.jsonl").read_text() == "before" and len(list(tmp_path.iterdir())) == 1


def test_only_an_end_mark_at_the_end_goes():
    assert sources.bare_answer("A </s> in between.") == "A </s> in between."


def test_system_turns_are_left_out():
    talk = [{"from": "system", "value": "Be kind."}, *turns("Which?", "A.")]
    assert sources.first_turn({"c": talk}, "c") == ("Which?", "A.", 0)


def test_system_messages_and_second_images():
    record = {
        "image": "0.png",
        "prompt": message("system", "Be kind.") + message("user", "Which?"),
        "chosen": "A",
        "rejected": "B",
    }
    assert sources.trl(record)["question"] == "Which?"
    with pytest.raises(data.BadRecord, match="has 2 images"):
        sources.trl({"images": ["0.png", "1.png"], "prompt": "Which?", "chosen": "A", "rejected": "B"})


def test_two_questions_are_no_pair():
    with pytest.raises(data.BadRecord, match="different questions"):
        sources.povid({"image": "0.png", "conversations": turns("A?", "a"), "rejected_conversations": turns("B?", "b")})


def test_an_empty_hint_is_no_context():
    raw = {"question": "Which?", "choices": ["a", "b"], "answer": 0, "hint": ""}
    assert sources.choice(raw, "choices")["question"].startswith("Which?\nA. a")


def test_mme_answers_of_any_case():
    assert sources.mme({"question": "Is it?", "answer": "yes"})["answer"] == "Yes"


def test_images_in_place_stay_and_half_copies_are_made_again(folder):
    copies = folder / "copies"
    for name in ("0.png", str(folder / "0.png")):
        assert sources.place_image(name, folder, folder, copies) == "0.png" and not copies.exists()
    content = encoded(picture(0))
    path = folder / sources.place_image(content, folder, folder, copies)
    path.write_bytes(content[:100])  # a build was killed while it wrote
    sources.place_image(content, folder, folder, copies)
    assert path.read_bytes() == content


def test_a_folder_of_parquet_files_is_read_in_order(tmp_path):
    for n in (1, 0):
        write(tmp_path / f"{n}.parquet", [{"n": n}, {"n": n}])
    assert [row["n"] for _, row in sources.read(tmp_path)] == [0, 0, 1, 1]


def test_a_wrong_file_is_not_read_to_its_end(folder):
    write(folder / "x.jsonl", [{"nothing": n} for n in range(200)])
    with pytest.raises(ValueError, match="line 100: no known format"):
        list(sources.records(folder / "x.jsonl", "", folder, folder, None, lambda record: None, skip_bad=True))


def test_parts_of_two_sources_are_not_mixed(world, folder, monkeypatch, capsys):
    source, out = write(folder / "x.jsonl", [GOOD]), folder / "out.jsonl"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runtime, "in_parts", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        build(patch, world, "mfpo", source, out)
    write(source, [{**GOOD, "chosen": "Another."}])
    args = ("mfpo", "--source", source, "--model", world / "base", "--out", out, "--batch", 2)
    assert "another source or model" in refused(monkeypatch, capsys, build_data, *args)


def test_masks_of_the_segmenter_are_what_is_noised(world, folder, monkeypatch):
    mask = np.zeros((1, 40, 70), bool)
    mask[0, :, 30:40] = True
    found = [([{"word": "cup", "box": [0, 0, 70, 40], "score": 1}], mask)]
    monkeypatch.setattr(grounding, "load", lambda *args: lambda *asked: found)
    assert (
        build(monkeypatch, world, "mfpo", write(folder / "x.jsonl", [GOOD]), folder / "out.jsonl", "--grounder", "x")
        == 0
    )
    (record,) = data.read_records(folder / "out.jsonl", data.MFPO_FIELDS)
    noisy = np.asarray(Image.open(folder / record["image_rejected"]))
    changed = (noisy != np.asarray(model.to_square(picture(0), 64, pad=False))).any(-1)
    assert record["region_kind"] == "key" and 0.2 < changed.mean() < 0.35  # 16 of 64 columns, not the box


def test_a_region_that_is_cropped_away_gives_global_noise(world, folder, monkeypatch):
    source = write(folder / "x.jsonl", [{**GOOD, "objects": [{"word": "cup", "box": [0, 0, 9, 40]}]}])
    assert build(monkeypatch, world, "mfpo", source, folder / "out.jsonl") == 0
    (record,) = data.read_records(folder / "out.jsonl", data.MFPO_FIELDS)
    assert record["region_kind"] == "global" and record["regions"] == []


def test_top_keywords(world, folder, monkeypatch):
    assert build(monkeypatch, world, "mfpo", write(folder / "x.jsonl", [GOOD]), folder / "out.jsonl", "--top", 1) == 0
    assert len(data.read_records(folder / "out.jsonl", data.MFPO_FIELDS)[0]["keywords"]) == 1


def test_a_very_long_side_is_refused():
    with pytest.raises(data.BadRecord, match="14001 x 1000 is longer"):
        data.check_shape("x", 14_001, 1000)


@pytest.mark.parametrize(
    ("text", "message"), [("[1]" + " " * 70_000 + "x", "something follows"), ('["' + "a" * (1 << 18), "Mend the file$")]
)
def test_a_list_with_a_tail_or_a_broken_text(tmp_path, text, message):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        list(data.read_json_list(tmp_path / "x.json", 1 << 16, 1 << 16))
