"""Records, tokens, packing and order. No transformers here: the tokenizer is a stand-in of ten lines."""

import json
import random

import numpy as np
import pytest
import torch
from PIL import Image

import data
from runtime import Mistake


class Words:
    """A tokenizer of blank-separated words: ids in order of appearance, special tokens first."""

    special = ("<unk>", "</s>", "<image>", "<s>")
    unk_token_id, eos_token_id = 0, 1
    all_special_ids = (0, 1, 2, 3)

    def __init__(self):
        self.vocab = {word: i for i, word in enumerate(self.special)}

    def __call__(self, text):
        return {"input_ids": [3] + [self.vocab.setdefault(word, len(self.vocab)) for word in text.split()]}

    def convert_tokens_to_ids(self, token):
        return self.vocab[token]

    def convert_ids_to_tokens(self, ids):
        return [list(self.vocab)[i] for i in ids]


class Characters(Words):
    """A tokenizer to which a blank more is another text."""

    def __call__(self, text):
        return {"input_ids": [3] + [4 + ord(character) for character in text]}


class Merging(Words):
    """A tokenizer that puts a colon and what follows it into one token, as real ones may do."""

    def __call__(self, text):
        return super().__call__(text.replace(": ", ":"))


GOOD = {"id": "a", "image": "images/a.png", "question": "What?", "chosen": "A cup.", "rejected": "A pen."}
GOOD |= {"image_rejected": "images/b.png", "region_kind": "key", "regions": [], "source": "test"}
QUESTION = {"id": "q", "image": "images/a.png", "question": "Is it?", "kind": "yesno", "answer": "Yes"}
TEMPLATE = "USER: <image> {question} A:"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for name in "ab":
        Image.fromarray(np.full((8, 8, 3), 200, np.uint8)).save(tmp_path / "images" / f"{name}.png")
    return tmp_path


def write(folder, *lines, name="mfpo.jsonl"):
    path = folder / name
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def without(record, name):
    return {key: value for key, value in record.items() if key != name}


# ------------------------------------------------------------------------------------------ files of records


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_and_lists_are_read_alike(tmp_path, mark, end):
    items = [{"id": "ä"}, {"id": "2", "n": [1, None]}, 3]
    lines = end.join(["", json.dumps(items[0], ensure_ascii=False), "", *map(json.dumps, items[1:]), ""])
    (tmp_path / "x.jsonl").write_bytes((mark + lines).encode())
    (tmp_path / "x.json").write_bytes((mark + f" {end}" + json.dumps(items, indent=2)).encode())
    read = [list(data.read_json(tmp_path / name)) for name in ("x.jsonl", "x.json")]
    assert [[value for _, value in some] for some in read] == [items, items]
    # lines as an editor counts them, empty ones too
    assert [where for where, _ in read[0]] == [f"{tmp_path}/x.jsonl, line {n}" for n in (2, 4, 5)]
    assert [where for where, _ in read[1]] == [f"{tmp_path}/x.json, item {n}" for n in (1, 2, 3)]
    assert data.read_lines(tmp_path / "x.jsonl") == items


def test_a_broken_line_is_one_bad_record_and_the_rest_is_read(tmp_path):
    broken = ['{"id": ', "[" * 100_000, '{"id": ' + "9" * 5000 + "}"]
    path = write(tmp_path, {"id": "1"}, *broken, {"id": "2"})
    values = [value for _, value in data.read_json(path)]
    assert values[0] == {"id": "1"} and values[-1] == {"id": "2"} and len(values) == 5
    for value in values[1:-1]:
        assert isinstance(value, data.BadRecord) and value.reason == "not JSON" and len(str(value)) < 200


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"id": "1"}, {"id"', "not JSON"),
        (b'[{"id": "1"}] and more', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'["caf\xe9"]', "holds a byte that is not UTF-8"),
    ],
)
def test_files_that_cannot_be_read_are_told_in_one_line(tmp_path, content, message):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(Mistake, match=f"x.json: {message}") as error:
        list(data.read_json(tmp_path / "x.json"))
    assert "\n" not in str(error.value) and len(str(error.value)) <= 300
    with pytest.raises(Mistake, match="none.json: no such file. Name"):
        list(data.read_json(tmp_path / "none.json"))


def test_a_byte_that_is_not_utf8_spoils_its_line_only(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"id": "1", "a": 1}\n{"id": "caf\xe9", "a": 1}\n{"id": "2", "a": 1}\n')
    (_, one), (where, bad), (_, two) = data.read_json(tmp_path / "x.jsonl")
    assert (one["id"], two["id"]) == ("1", "2") and bad.reason == "not UTF-8" and where.endswith("x.jsonl, line 2")


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("form", ["list", "dict", "objects"])
def test_json_is_read_by_its_content(tmp_path, form, indent):
    rows = [{"id": str(n), "text": "a }\n{ b", "more": [{"x": 1}, {"x": 2}]} for n in range(3)]
    texts = {"list": json.dumps(rows, indent=indent), "dict": json.dumps({"data": rows}, indent=indent)}
    texts["objects"] = "\n".join(json.dumps(row, indent=indent) for row in rows)
    (tmp_path / "x").write_text(texts[form])
    assert [value for _, value in data.read_json(tmp_path / "x")] == rows


# -------------------------------------------------------------------------------------------- checked records


def test_good_records_are_read_in_order(folder):
    for records in ([GOOD, {**GOOD, "id": "b"}], [[GOOD, {**GOOD, "id": "b"}]]):
        path = write(folder, *records)
        assert [r["id"] for r in data.read_records(path, data.MFPO_FIELDS)] == ["a", "b"]


def test_images_need_only_be_there_and_those_of_the_method_alone(folder):
    """A damaged one is met where it is loaded; an attacked image is no part of a pair that MBPO trains on."""
    (folder / "images" / "a.png").write_bytes(b"not an image")
    record = {**GOOD, "image_rejected": "images/none.png", "image_attacked": "images/none.png"}
    path = write(folder, record)
    assert data.read_records(path, data.PAIR_FIELDS) == [record]
    with pytest.raises(Mistake, match="'image_rejected': .*none.png: no such image"):
        data.read_records(path, data.MFPO_FIELDS)


BAD = {
    "not JSON": ('{"id": ', "not JSON"),
    "not an object": ("[1]", "JSON object, this is a list"),
    "missing field": (without(GOOD, "chosen"), "'chosen' is missing. A record has id, image"),
    "null": ({**GOOD, "chosen": None}, "'chosen' is missing"),
    "wrong type": ({**GOOD, "question": 3}, "'question' must be a str, got '3'"),
    "wrong type and long": ({**GOOD, "question": ["x"] * 9999}, "'question' must be a str"),
    "number as id": ({**GOOD, "id": 7}, "'id' must be a str"),
    "empty answer": ({**GOOD, "rejected": "  "}, "'rejected' is empty"),
    "same answers": ({**GOOD, "rejected": "A cup. "}, "are the same"),
    "missing image": ({**GOOD, "image": "images/none.png"}, "no such image"),
    "folder as image": ({**GOOD, "image": "images"}, "no such image"),
    "dots": ({**GOOD, "image": "../a.png"}, "lies outside"),
    "absolute": ({**GOOD, "image_rejected": "/etc/passwd"}, "lies outside"),
    "zero byte": ({**GOOD, "image": "a\0.png"}, "lies outside"),
    "half a character": ({**GOOD, "chosen": "a \ud800"}, "'chosen' holds half a character"),
    "deep brackets": ("[" * 100_000, "not JSON"),
    "duplicate": ({**GOOD, "id": "first"}, "already used in .*line 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_the_first_bad_record_is_named_with_file_line_field_and_remedy(folder, case, monkeypatch):
    record, message = BAD[case]
    write(folder, {**GOOD, "id": "first"}, record, {**GOOD, "id": ""})
    monkeypatch.chdir(folder)
    with pytest.raises(Mistake, match=rf"^mfpo.jsonl, line 2: .*{message}") as error:
        data.read_records("mfpo.jsonl", data.MFPO_FIELDS)
    text = str(error.value)
    assert "\n" not in text and len(text) <= 300
    assert any(remedy in text for remedy in ("end", "elete", "ename", "Use a path", "A record has"))


def test_a_file_without_records_is_a_mistake(folder):
    with pytest.raises(Mistake, match="no such file"):
        data.read_records(folder / "mfpo.jsonl", data.MFPO_FIELDS)
    for text in ("", "\n\n", "[]"):
        with pytest.raises(Mistake, match="mfpo.jsonl: holds no records. Build it"):
            data.read_records(write(folder, text), data.MFPO_FIELDS)


def test_check_names_a_reason_by_which_drops_are_counted():
    fields = {"id": str, "objects": list, "turns": int}
    good = {"id": "a", "objects": [], "turns": 0}
    data.check(good, fields)
    reasons = {
        "not an object": [],
        "'turns' missing": without(good, "turns"),
        "'objects' of the wrong type": {**good, "objects": {}},
        "'id' empty": {**good, "id": "\t"},
        "'id' not text": {**good, "id": "\udfff"},
    }
    for reason, record in reasons.items():
        with pytest.raises(data.BadRecord) as error:
            data.check(record, fields)
        assert error.value.reason == reason
    broken = data.BadRecord("not JSON", "x")
    with pytest.raises(data.BadRecord) as error:  # as read_json gives a line that could not be read
        data.check(broken, fields)
    assert error.value is broken


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "essay"}, "no verifier for 'essay'. Use one of yesno, choice, number, word"),
        ({"answer": "maybe"}, "must be one of Yes, No, got 'maybe'"),
        ({"answer": "yes"}, "must be one of Yes, No, got 'yes'"),
        ({"kind": "choice", "answer": "E", "choices": ["a", "b"]}, "must be one of A, B, got 'E'"),
        ({"kind": "choice", "answer": "AB", "choices": ["a", "b"]}, "must be one of A, B, got 'AB'"),
        ({"kind": "choice", "answer": "A", "choices": []}, "field 'choices'"),
        ({"kind": "choice", "answer": "A", "choices": ["x"] * 27}, "field 'choices'"),
        ({"kind": "number", "answer": "two"}, "must be one of digits, got 'two'"),
        ({"kind": "number", "answer": "²"}, "must be one of digits, got '²'"),
        ({"kind": "word", "answer": "pink", "choices": ["red"]}, "must be one of red, got 'pink'"),
        ({"kind": "word", "answer": "pink", "choices": ["red" * 99]}, "must be one of red"),
        ({"choices": "red"}, "field 'choices' must be a list"),
        ({"choices": ["red", " "]}, "field 'choices' must be a list"),
        ({"choices": ["red", 3]}, "field 'choices' must be a list"),
        ({"answer": 3}, "field 'answer' must be a str"),
        ({"image": "none.png"}, "no such image"),
    ],
)
def test_questions_that_cannot_be_verified(folder, monkeypatch, change, message):
    write(folder, QUESTION, {**QUESTION, "id": "bad", **change})
    monkeypatch.chdir(folder)
    with pytest.raises(Mistake, match="^mfpo.jsonl, line 2: ") as error:
        data.read_records("mfpo.jsonl", data.QUESTION_FIELDS)
    assert message in str(error.value) and len(str(error.value)) <= 330


@pytest.mark.parametrize(
    ("kind", "choices", "answers"),
    [
        ("yesno", [], ["Yes", "No"]),
        ("choice", ["a", "b", "c"], ["A", "B", "C"]),
        ("choice", [f"option {n}" for n in range(26)], ["A", "Z"]),
        ("number", [], ["0", "17"]),
        ("word", ["red", "blue"], ["red", "blue"]),
        ("word", [], ["anything"]),
    ],
)
def test_questions_that_can_be_verified(kind, choices, answers):
    for answer in answers:
        data.check_question({**QUESTION, "kind": kind, "choices": choices, "answer": answer})
    if not choices:
        data.check_question({**QUESTION, "kind": kind, "answer": answers[0]})


# --------------------------------------------------------------------------------------------------- images


def test_images_are_upright_rgb(tmp_path):
    grey = Image.new("L", (4, 2), 100)
    exif = grey.getexif()
    exif[0x0112] = 6  # lies on its side
    grey.save(tmp_path / "g.jpg", exif=exif)
    image = data.load_image(tmp_path / "g.jpg")
    assert image.mode == "RGB" and image.size == (2, 4)
    assert torch.tensor(np.array(image)).shape == (4, 2, 3)
    with open(tmp_path / "g.jpg", "rb") as file:
        assert data.load_image(file, "row 7").size == (2, 4)


@pytest.mark.parametrize("mode", ["1", "P", "LA", "RGBA", "CMYK"])
def test_other_kinds_of_8_bits_become_rgb(tmp_path, mode):
    file = tmp_path / ("x.tiff" if mode == "CMYK" else "x.png")
    Image.new("RGB", (4, 4), (255, 255, 255)).convert(mode).save(file)
    image = data.load_image(file)
    assert image.mode == "RGB" and np.asarray(image).min() >= 254


def test_images_that_cannot_be_used_are_named_with_a_remedy(folder, monkeypatch):
    png = (folder / "images" / "a.png").read_bytes()
    (folder / "cut.png").write_bytes(png[: len(png) // 2])
    (folder / "text.png").write_text("words")
    (folder / "folder.png").mkdir()
    Image.new("I;16", (4, 4)).save(folder / "deep.png")
    Image.new("F", (4, 4)).save(folder / "float.tiff")
    Image.new("RGB", (16 * 8, 8)).save(folder / "strip.png")
    Image.new("RGB", (8, 16 * 8 + 1)).save(folder / "long.png")
    Image.new("RGB", (110, 100)).save(folder / "bomb.png")
    monkeypatch.setattr(data, "MAX_PIXELS", 100 * 110 - 1)
    assert data.MAX_ASPECT == 16 and data.load_image(folder / "strip.png").size == (128, 8)
    reasons = {
        "none.png": ("image missing", "no such image. Put it there"),
        "cut.png": ("image unreadable", "cannot be read as an image"),
        "text.png": ("image unreadable", "cannot be read as an image"),
        "folder.png": ("image unreadable", "cannot be read as an image"),
        "deep.png": ("image not of 8 bits", "has I;16 pixels, of more than 8 bits. Convert"),
        "float.tiff": ("image not of 8 bits", "has F pixels"),
        "long.png": ("image too long", "(8, 129) is over 16 times as long as wide. Crop"),
        "bomb.png": ("image too large", "(110, 100) is over 10999 pixels. Shrink"),
    }
    for name, (reason, message) in reasons.items():
        with pytest.raises(data.BadRecord) as error:
            data.load_image(folder / name)
        assert error.value.reason == reason and message in str(error.value), name
        assert str(error.value).startswith(str(folder / name)) and "\n" not in str(error.value)
    with open(folder / "text.png", "rb") as file, pytest.raises(data.BadRecord, match="^row 7: cannot be"):
        data.load_image(file, "row 7")


def test_what_is_drawn_on_nothing_is_seen_on_white(folder, recwarn):
    """A black stroke, by Pillow's own rules of each mode, and no warning of Pillow's."""
    drawing = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    drawing.paste((0, 0, 0, 255), (5, 5, 10, 10))
    modes = {"RGBA": drawing, "LA": drawing.convert("LA"), "P": drawing.quantize(8), "PA": drawing.convert("PA")}
    for mode, image in modes.items():
        image.save(folder / f"{mode}.{'tif' if mode == 'PA' else 'png'}")
    grey = Image.new("L", (20, 20), 0)
    grey.paste(255, (0, 0, 20, 5))
    grey.save(folder / "key.png", transparency=255)  # white counts as nothing
    for path in [*folder.glob("[LPR]*.png"), *folder.glob("*.tif")]:
        seen = np.asarray(data.load_image(path))
        assert seen[7, 7].max() < 20 and seen[15, 15].min() > 235, path.name
    assert np.asarray(data.load_image(folder / "key.png"))[2, 2].tolist() == [255] * 3
    assert not recwarn.list


def test_our_own_trouble_is_no_bad_image(folder, monkeypatch):
    def fail(image):
        raise MemoryError

    monkeypatch.setattr(data.ImageOps, "exif_transpose", fail)
    with pytest.raises(MemoryError):
        data.load_image(folder / "images" / "a.png")


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, KeyError])
def test_a_decoder_may_fail_as_it_likes(folder, monkeypatch, error):
    def fail(image):
        raise error("x")

    monkeypatch.setattr(data.ImageOps, "exif_transpose", fail)
    with pytest.raises(data.BadRecord, match="cannot be read as an image"):
        data.load_image(folder / "images" / "a.png")


def test_no_name_leads_out_of_the_folder(folder):
    (folder / "inside.png").symlink_to("images/a.png")
    (folder / "out").symlink_to("/etc")
    for name in ("images/a.png", "inside.png", "images/not_there_yet.png", "out/a.png"):  # links are how hubs cache
        assert data.image_path(folder, name) == folder / name
    for name in ("../x.png", "images/../images/a.png", "/etc/hostname", "a\0b", "", "x" * 256):
        with pytest.raises(data.BadRecord, match="lies outside .* relative to the data folder") as error:
            data.image_path(folder, name)
        assert error.value.reason == "image outside the folder"


# --------------------------------------------------------------------------------------------------- tokens


def test_prompt_and_answer_tokens():
    words = Words()
    encoding = data.Encoding(words, TEMPLATE, image_tokens=3)
    prompt = encoding.prompt("What is it ?")
    expected = ["<s>", "USER:", *["<image>"] * 3, "What", "is", "it", "?", "A:"]
    assert words.convert_ids_to_tokens(prompt) == expected
    assert words.convert_ids_to_tokens(encoding.answer("What is it ?", " a cup\n")) == ["a", "cup", "</s>"]
    for question, message in (("and <image> ?", "image token"), ("and </s> ?", "special token: delete it")):
        with pytest.raises(data.BadRecord, match=message):
            encoding.prompt(question)
    with pytest.raises(data.BadRecord, match=r"holds the special tokens \['</s>'\]"):
        encoding.answer("What ?", "a </s> cup")
    assert encoding.answer("What ?", "a <unk> cup")  # a word that the tokenizer does not know is no mark


def test_blanks_around_an_answer_are_not_learnt():
    encoding = data.Encoding(Characters(), TEMPLATE, 1)
    assert encoding.answer("What ?", "\n a cup ") == [4 + ord(character) for character in " a cup"] + [1]


def test_an_answer_that_merges_with_the_prompt_is_refused():
    """Cut apart, its first token would be one that the model never says behind this prompt."""
    with pytest.raises(data.BadRecord, match="merges the prompt's end with the answer 'a cup'"):
        data.Encoding(Merging(), TEMPLATE, 1).answer("What ?", "a cup")


def test_a_row_is_a_prompt_and_the_answers_that_are_named():
    encoding = data.Encoding(Words(), TEMPLATE, 2)
    record = {"id": "r7", "question": "What ?", "chosen": "a cup", "rejected": "a pen and a cup"}
    row = encoding.row(record, "chosen", "rejected")
    assert row.prefix == encoding.prompt("What ?") and row.id == "r7"
    assert row.answers == [encoding.answer("What ?", record[name]) for name in ("chosen", "rejected")]
    assert encoding.row(record) == data.Row(row.prefix, [], "r7")
    assert encoding.row(record, "rejected").answers == row.answers[1:]
    with pytest.raises(data.BadRecord, match="become the same tokens") as error:
        encoding.row({**record, "rejected": "a  cup"}, "chosen", "rejected")
    assert error.value.reason == "chosen equal to rejected"


def test_answers_are_never_cut():
    record = {"id": "r7", "question": "What ?", "chosen": "a cup", "rejected": "a pen and a cup"}
    encoding = data.Encoding(Words(), TEMPLATE, 2)
    longest = len(encoding.prompt("What ?")) + 6  # of the prompt and any one answer, not of all answers
    encoding.max_length = longest
    assert len(encoding.row(record, "chosen", "rejected").answers[1]) == 6
    encoding.max_length = longest - 1
    message = f"take {longest} tokens, --max_length is {longest - 1}"
    with pytest.raises(data.BadRecord, match=message) as error:
        encoding.row(record, "chosen", "rejected")
    assert error.value.reason == "longer than --max_length"
    encoding.row(record, "chosen")
    encoding.max_length = len(encoding.prompt("What ?")) - 1
    with pytest.raises(data.BadRecord, match="--max_length"):
        encoding.row(record)


def test_the_first_record_without_a_row_is_named_with_its_file():
    encoding = data.Encoding(Words(), TEMPLATE, 2, max_length=10)
    short = {"id": "ok", "question": "What ?", "chosen": "a cup"}
    rows = encoding.rows([short, {**short, "id": "2"}], "x.jsonl", "chosen")
    assert rows == [encoding.row(short, "chosen"), data.Row(rows[0].prefix, rows[0].answers, "2")]
    long, worse = {**short, "id": "long", "chosen": "a b c d"}, {**short, "chosen": "</s>"}
    with pytest.raises(Mistake, match="^x.jsonl, record 'long': .* take 12 tokens, --max_length is 10"):
        encoding.rows([short, long, worse], "x.jsonl", "chosen")


# -------------------------------------------------------------------------------------------------- packing


def test_packing_by_hand():
    """What the rows of the mask made of `segment` are is in test_model.py."""
    rows = [data.Row([5], [[4, 1]], "a"), data.Row([5, 6], [[7, 1], [8, 9, 1]], "b")]
    pixels = torch.rand(2, 3, 4, 4)
    batch = data.pack(rows, pixels)
    assert batch.ids.tolist() == [5, 4, 1, 5, 6, 7, 1, 8, 9, 1]
    assert batch.position.tolist() == [0, 1, 2, 0, 1, 2, 3, 2, 3, 4]  # both answers start behind the prefix
    assert batch.segment.tolist() == [[0, 1, 1, -1, -1, -1, -1], [0, 0, 1, 1, 2, 2, 2]]
    # rows of 7 slots, the first with 3 tokens
    assert batch.slot.tolist() == [0, 1, 2, 7, 8, 9, 10, 11, 12, 13]
    assert batch.before.tolist() == [0, 1, 4, 5, 4, 7, 8]  # the prefix's last token predicts each first token
    assert batch.target.tolist() == [4, 1, 7, 1, 8, 9, 1]
    assert batch.answer_mask.tolist() == [[True, True, False], [True, True, False], [True, True, True]]
    assert batch.ids_of == ["a", "b"] and batch.pixels is pixels
    moved = batch.to("meta")
    assert all(value.is_meta for value in vars(moved).values() if torch.is_tensor(value))
    assert moved.ids_of == ["a", "b"] and moved.segment.shape == (2, 7)


def test_packing_at_random_says_what_each_token_is():
    """A batch read back by its segments and slots is the rows; positions and predictors follow from them."""
    dice = random.Random(0)
    for _ in range(50):
        rows = []
        for _ in range(3):
            lengths = dice.choices(range(1, 5), k=dice.randint(1, 4))
            prefix = dice.choices(range(100), k=dice.randint(1, 6))
            rows.append(data.Row(prefix, [dice.choices(range(100), k=n) for n in lengths]))
        batch = data.pack(rows, None)
        assert len(batch.target) == len(batch.before) == batch.answer_mask.sum()
        flat, at = batch.segment.flatten(), 0
        slot_of = {slot: n for n, slot in enumerate(batch.slot.tolist())}
        for r, row in enumerate(rows):
            base = r * batch.segment.shape[1]
            for k, part in enumerate([row.prefix, *row.answers]):
                slots = [s for s in range(base, base + batch.segment.shape[1]) if flat[s] == k]
                tokens = [slot_of[s] for s in slots]
                assert batch.ids[tokens].tolist() == part
                first = len(row.prefix) if k else 0
                assert batch.position[tokens].tolist() == list(range(first, first + len(part)))
                if k:
                    last = slot_of[base + len(row.prefix) - 1]
                    assert batch.before[at : at + len(part)].tolist() == [last, *tokens[:-1]]
                    assert batch.target[at : at + len(part)].tolist() == part
                    at += len(part)


# ------------------------------------------------------------------------------------------------ the order


def test_curriculum_order():
    entropy = [0.9, 0.1, 0.5, 0.2, 0.6, 0.8]
    easy, middle, hard = {1, 3}, {2, 4}, {5, 0}
    order = data.epoch_order(entropy, epochs=2, curriculum="easy_to_hard", seed=3).tolist()
    assert [set(order[i : i + 2]) for i in range(0, 12, 2)] == [easy, easy, middle, middle, hard, hard]
    order = data.epoch_order(entropy, 1, "hard_to_easy", 3).tolist()
    assert [set(order[i : i + 2]) for i in range(0, 6, 2)] == [hard, middle, easy]
    mixed = data.epoch_order(entropy, 2, "none", 3).tolist()
    assert sorted(mixed[:6]) == sorted(mixed[6:]) == list(range(6))
    ties = data.epoch_order([1.0] * 300, 1, "easy_to_hard", 3).tolist()  # equal ones stay in the file's order
    assert [set(ties[i : i + 100]) == {*range(i, i + 100)} for i in (0, 100, 200)] == [True] * 3
    again, other = (data.epoch_order(entropy, 2, "none", seed).tolist() for seed in (3, 4))
    assert mixed == again != other
