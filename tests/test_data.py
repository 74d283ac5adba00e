"""Records, tokens, packing and order. No transformers here: the tokenizer is a stand-in of ten lines."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import data


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


GOOD = {
    "id": "a", "image": "images/a.png", "question": "What?", "chosen": "A cup.", "rejected": "A pen.",
    "image_rejected": "images/b.png", "region_kind": "key", "regions": [], "source": "test",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for name in "ab":
        Image.fromarray(np.full((8, 8, 3), 200, np.uint8)).save(tmp_path / "images" / f"{name}.png")
    return tmp_path


def write(folder, *lines):
    path = folder / "mfpo.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def test_good_records_are_read_in_order(folder):
    path = write(folder, GOOD, {**GOOD, "id": "b"})
    assert [r["id"] for r in data.read_records(path, data.MFPO_FIELDS)] == ["a", "b"]


BAD = {
    "not JSON": ('{"id": ', "not JSON"),
    "not an object": ("[1]", "JSON object"),
    "missing field": ({k: v for k, v in GOOD.items() if k != "chosen"}, "'chosen' is missing"),
    "wrong type": ({**GOOD, "question": 3}, "must be str, got int"),
    "empty answer": ({**GOOD, "rejected": "  "}, "'rejected' is empty"),
    "same answers": ({**GOOD, "rejected": "A cup. "}, "are the same"),
    "region kind": ({**GOOD, "region_kind": "corner"}, "'region_kind'"),
    "missing image": ({**GOOD, "image": "images/none.png"}, "no such image"),
    "damaged image": ({**GOOD, "image": "images/cut.png"}, "cannot be read as an image"),
    "text as image": ({**GOOD, "image": "mfpo.jsonl"}, "cannot be read as an image"),
    "bomb": ({**GOOD, "image": "images/bomb.png"}, "pixels. Shrink"),
    "dots": ({**GOOD, "image": "../a.png"}, "lies outside"),
    "absolute": ({**GOOD, "image": "/etc/passwd"}, "lies outside"),
    "link": ({**GOOD, "image": "images/link.png"}, "lies outside"),
    "zero byte": ({**GOOD, "image": "a\0.png"}, "lies outside"),
    "half a character": ({**GOOD, "chosen": "a \ud800"}, "half a character"),
    "deep brackets": ("[" * 100_000, "not JSON"),
    "huge number": ('{"id": ' + "9" * 5000 + "}", "not JSON"),
    "regions": ({**GOOD, "regions": "x"}, "'regions' must be a list"),
    "folder as image": ({**GOOD, "image": "images"}, "cannot be read as an image"),
    "duplicate": ({**GOOD, "id": "first"}, "already used"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_records_are_named_with_file_line_and_remedy(folder, case, monkeypatch):
    record, message = BAD[case]
    whole = (folder / "images" / "a.png").read_bytes()
    (folder / "images" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "images" / "link.png").symlink_to("/etc/hostname")
    if case == "bomb":
        monkeypatch.setattr(data, "MAX_PIXELS", 100)
        Image.new("RGB", (11, 10)).save(folder / "images" / "bomb.png")
    path = write(folder, {**GOOD, "id": "first"}, record)
    with pytest.raises(ValueError, match="mfpo.jsonl, line 2") as error:
        data.read_records(path, data.MFPO_FIELDS)
    assert message in str(error.value)


def test_skip_bad_counts_by_reason(folder, capsys):
    empty = {**GOOD, "chosen": ""}
    path = write(folder, GOOD, {**empty, "id": "b"}, {**empty, "id": "c"}, "{", {**GOOD, "id": "d"})
    assert [r["id"] for r in data.read_records(path, data.MFPO_FIELDS, skip_bad=True)] == ["a", "d"]
    told = capsys.readouterr().out
    assert "2 records dropped: 'chosen' empty" in told and "1 records dropped: not JSON" in told


def test_a_folder_without_records_is_an_error(folder):
    with pytest.raises(ValueError, match="no such file"):
        data.read_records(folder / "mfpo.jsonl", data.MFPO_FIELDS)
    with pytest.raises(ValueError, match="no usable records"):
        data.read_records(write(folder, "{", "{"), data.MFPO_FIELDS, skip_bad=True)


def test_prompt_and_answer_tokens():
    words = Words()
    prompt = data.encode_prompt(words, "What is it ?", "USER: <image> {question} A:", image_tokens=3)
    assert words.convert_ids_to_tokens(prompt) == ["<s>", "USER:", *["<image>"] * 3, "What", "is", "it", "?", "A:"]
    answer = data.encode_answer(words, "What is it ?", "a cup", "USER: <image> {question} A:")
    assert words.convert_ids_to_tokens(answer) == ["a", "cup", "</s>"]
    with pytest.raises(ValueError, match="image token"):
        data.encode_prompt(words, "and <image> ?", "USER: <image> {question} A:", 3)
    with pytest.raises(ValueError, match="special token: delete it"):
        data.encode_prompt(words, "and </s> ?", "USER: <image> {question} A:", 3)
    with pytest.raises(ValueError, match="special tokens"):
        data.encode_answer(words, "What ?", "a </s> cup", "USER: <image> {question} A:")


def test_answers_are_never_cut():
    row = data.Row([1] * 10, [[2] * 5, [2] * 6], "r7")
    data.check_length(row, 16)
    with pytest.raises(ValueError, match="16 tokens, --max_length is 15"):
        data.check_length(row, 15)


def test_packing_by_hand():
    rows = [data.Row([5], [[4, 1]]), data.Row([5, 6], [[7, 1], [8, 9, 1]])]
    batch = data.pack(rows, None)
    assert batch.ids.tolist() == [5, 4, 1, 5, 6, 7, 1, 8, 9, 1]
    assert batch.position.tolist() == [0, 1, 2, 0, 1, 2, 3, 2, 3, 4]  # both answers start behind the prefix
    assert batch.place.tolist() == [0, 1, 2, 7, 8, 9, 10, 11, 12, 13]  # rows of 7 places, the first with 3 tokens
    assert batch.before.tolist() == [0, 1, 4, 5, 4, 7, 8]  # the prefix's last token predicts each first token
    assert batch.target.tolist() == [4, 1, 7, 1, 8, 9, 1]
    assert batch.answer_mask.tolist() == [[True, True, False], [True, True, False], [True, True, True]]
    see = batch.mask[1, 0].int().tolist()
    assert see[3] == [1, 1, 1, 1, 0, 0, 0]  # the first answer: prefix and itself
    assert see[5] == [1, 1, 0, 0, 1, 1, 0]  # the second answer: not the first
    assert batch.mask.any(-1).all()  # softmax over an empty row is nan


def test_curriculum_order():
    entropy = [0.9, 0.1, 0.5, 0.2, 0.6, 0.8]
    easy, middle, hard = {1, 3}, {2, 4}, {5, 0}
    order = data.epoch_order(entropy, epochs=2, curriculum="easy_to_hard", seed=3).tolist()
    assert [set(order[i : i + 2]) for i in range(0, 12, 2)] == [easy, easy, middle, middle, hard, hard]
    order = data.epoch_order(entropy, 1, "hard_to_easy", 3).tolist()
    assert [set(order[i : i + 2]) for i in range(0, 6, 2)] == [hard, middle, easy]
    mixed = data.epoch_order(entropy, 2, "none", 3).tolist()
    assert sorted(mixed[:6]) == sorted(mixed[6:]) == list(range(6))
    assert mixed == data.epoch_order(entropy, 2, "none", 3).tolist() != data.epoch_order(entropy, 2, "none", 4).tolist()


def test_images_are_upright_rgb(tmp_path):
    grey = Image.new("L", (4, 2), 100)
    exif = grey.getexif()
    exif[0x0112] = 6  # lies on its side
    grey.save(tmp_path / "g.jpg", exif=exif)
    image = data.load_image(tmp_path / "g.jpg")
    assert image.mode == "RGB" and image.size == (2, 4)
    assert torch.tensor(np.array(image)).shape == (4, 2, 3)
