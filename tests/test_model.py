"""The wrapper against plain transformers code: the same numbers by another route."""

import copy

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import data
import model
import toy
import warmup

QUESTION = "Describe the picture."
# Of unequal length.
ASKED = ["Is there a cup in the picture?", QUESTION, "How many objects are in the picture?"]
TEMPLATE = "USER: <image>\n{question} ASSISTANT:"  # of the hub's model cards
ANSWERS = ["The picture shows a red cup.", "The picture shows a red cup, a blue spoon and a green pear."]


def row_of(policy, question, answers):
    record = {"id": question, "question": question, **{str(n): text for n, text in enumerate(answers)}}
    return policy.encoding.row(record, *map(str, range(len(answers))))


def pack_one(policy, image, answers=ANSWERS):
    return data.pack([row_of(policy, QUESTION, answers)], model.to_pixels([image]))


def prompts_of(policy):
    return [policy.encoding.prompt(question) for question in ASKED]


def plain_logp(hf, processor, image, question, answer):
    """Log-probability of one answer as a user of transformers would write it: no packing, all logits."""
    prompt = TEMPLATE.format(question=question)
    inputs = processor(images=image, text=prompt, return_tensors="pt")
    full = processor(images=image, text=f"{prompt} {answer}</s>", return_tensors="pt")
    start = inputs["input_ids"].shape[1]
    with torch.no_grad():
        logits = hf(**full).logits.float()
    logp = logits[0, start - 1 : -1].log_softmax(-1)
    return logp.gather(1, full["input_ids"][0, start:, None]).sum().item()


@pytest.fixture(scope="module")
def images():
    return [Image.fromarray(image) for image, _, _ in toy.scenes("val", 3, 0)]


# ------------------------------------------------------------------------------------------------ log-probs


def test_the_mask_of_packed_rows_by_hand():
    rows = [data.Row([5], [[4, 1]]), data.Row([5, 6], [[7, 1], [8, 9, 1]])]
    mask = model.row_mask(data.pack(rows, None).segment)
    assert mask.shape == (2, 1, 7, 7) and mask.dtype == torch.bool
    see = mask[1, 0].int().tolist()
    assert see[0] == [1, 0, 0, 0, 0, 0, 0]
    assert see[1] == [1, 1, 0, 0, 0, 0, 0]
    assert see[3] == [1, 1, 1, 1, 0, 0, 0]  # the first answer: prefix and itself
    assert see[4] == [1, 1, 0, 0, 1, 0, 0]  # the second answer: not the first
    assert see[6] == [1, 1, 0, 0, 1, 1, 1]
    assert mask[0, 0, :3, :3].int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert not mask[0, 0, :3, 3:].any()  # nothing looks at padding
    assert mask.any(-1).all()  # softmax over an empty row is nan


def test_packed_logps_equal_separate_forwards(policy, images):
    # Rows of unequal length and number of answers, so that there is padding and masking to get wrong.
    asked = [(QUESTION, ANSWERS), ("What do you see?", [*ANSWERS[::-1], "Yes"]), (ASKED[0], ["Yes"])]
    batch = data.pack([row_of(policy, q, a) for q, a in asked], model.to_pixels(images))
    with torch.no_grad():
        token_logp = policy.logps(batch)
    assert (token_logp[~batch.answer_mask] == 0).all() and token_logp.dtype == torch.float32
    expected = [
        plain_logp(policy.hf, policy.processor, image, q, a)
        for image, (q, answers) in zip(images, asked, strict=True)
        for a in answers
    ]
    assert token_logp.sum(1).tolist() == pytest.approx(expected, abs=1e-4)


def test_entropy_and_logp_from_first_principles(policy, images):
    row, batch = row_of(policy, QUESTION, ANSWERS[:1]), pack_one(policy, images[0], ANSWERS[:1])
    with torch.no_grad():
        token_logp, entropy = policy.logps(batch, entropy=True)
        ids = torch.tensor([row.prefix + row.answers[0]])
        pixels = (model.to_pixels(images[:1]) - policy.mean) / policy.std
        logits = policy.hf(input_ids=ids, pixel_values=pixels).logits[0, len(row.prefix) - 1 : -1]
    logits = logits.double().numpy()
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    said = np.log(p[np.arange(len(p)), row.answers[0]])
    assert entropy[0].tolist() == pytest.approx((-p * np.log(p)).sum(1).tolist(), abs=1e-4)
    assert token_logp[0].tolist() == pytest.approx(said.tolist(), abs=1e-4)


def test_answers_do_not_see_each_other(policy, images):
    with torch.no_grad():
        both = policy.logps(pack_one(policy, images[0])).sum(1)
        other = policy.logps(pack_one(policy, images[0], ["Yes", ANSWERS[1]])).sum(1)
    assert both[1].item() == pytest.approx(other[1].item(), abs=1e-5)


def test_known_features_give_the_same_as_pixels(policy, images):
    batch = pack_one(policy, images[0])
    with torch.no_grad():
        assert torch.equal(policy.logps(batch), policy.logps(batch, vision=policy.vision(batch.pixels)))


def test_gradients_reach_what_is_trained_and_only_that(images):
    policy = warmup.build_policy(1)
    policy.logps(pack_one(policy, images[0])).sum().backward()
    for name, parameter in policy.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    assert any(p.requires_grad for p in policy.hf.model.vision_tower.parameters())
    frozen = model.Policy(policy.hf, policy.processor, train_vision=False)
    assert not any(p.requires_grad for p in frozen.hf.model.vision_tower.parameters())


def test_a_pair_is_both_answers_and_the_chosen_one_of_the_distorted_image(policy, images, tmp_path):
    records = []
    for n, (question, image) in enumerate(zip(ASKED, images, strict=True)):
        record = {"id": str(n), "question": question, "image": f"{n}.png", "image_rejected": f"{n}_other.png"}
        records.append(record | {"chosen": ANSWERS[n % 2], "rejected": ANSWERS[1 - n % 2]})
        image.save(tmp_path / records[-1]["image"])
        images[n - 1].save(tmp_path / records[-1]["image_rejected"])
    rows = [policy.encoding.row(record, "chosen", "rejected") for record in records]
    sides = [("image", "chosen"), ("image", "rejected"), ("image_rejected", "chosen")]
    expected = []
    for record in records:
        for side, name in sides:
            image = Image.open(tmp_path / record[side])
            answer = plain_logp(policy.hf, policy.processor, image, record["question"], record[name])
            expected.append(answer)
    with torch.no_grad():
        batch = model.pair_batch(policy, records, rows, tmp_path)
        logp = policy.logps(batch).sum(1)
        answers_alone = model.pair_batch(policy, records, rows, tmp_path, distorted=False)
        logp_alone = policy.logps(answers_alone).sum(1).view(3, 2)
    assert logp.tolist() == pytest.approx(expected, abs=1e-4)
    assert torch.allclose(logp_alone, logp.view(3, 3)[:, :2], atol=1e-4)
    assert batch.ids_of == ["0", "0", "1", "1", "2", "2"] and answers_alone.ids_of == ["0", "1", "2"]
    assert (logp[0::3] - logp[2::3]).abs().min() > 1e-3  # another image is another number


# --------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("level", ["bytes", "pieces"])
def test_where_each_token_of_an_answer_stands(level):
    """In byte-level BPE and with SentencePiece's marks, as Llama's tokenizer has them."""
    texts = ["USER: <image> What is it? ASSISTANT: A man's caf\u00e9 table isn't here, he says."] * 3
    tokenizer = Tokenizer(models.BPE())
    if level == "bytes":
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    else:
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<image>", "<s>", "</s>"]
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=45, special_tokens=special, show_progress=False)
    )
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    encoding = data.Encoding(fast, "USER: <image> {question} ASSISTANT:", image_tokens=2)
    answer = "A man's caf\u00e9 table isn't here."
    ids, spans = encoding.answer("What is it?", answer), encoding.spans("What is it?", answer)
    assert len(ids) == len(spans) and spans[-1] == (0, 0) and len(ids) > 9
    covered = "".join(answer[max(a, 0) : b] for a, b in spans)
    assert covered.replace(" ", "").startswith("Aman'scaf") and covered.endswith("here.")
    for token, (a, b) in list(zip(ids, spans, strict=True))[:-1]:
        text = fast.decode([token]).strip()
        assert "\ufffd" in text or answer[max(a, 0) : b].strip() == text


def test_pixels_equal_the_hub_processor(policy):
    rng = np.random.default_rng(0)
    for size in ((64, 64), (100, 80), (64, 200), (31, 90), (147, 49), (49, 98), *rng.integers(32, 400, (54, 2))):
        image = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        theirs = policy.processor.image_processor(image, return_tensors="pt")["pixel_values"]
        ours = (model.to_pixels([model.to_square(image, 64, pad=False)]) - policy.mean) / policy.std
        assert (ours - theirs).abs().max().item() < 1e-5, size


@pytest.mark.parametrize("size", [64, 224, 336])
def test_every_size_is_the_hub_processors(monkeypatch, size):
    """Of all pairs of sides from 32 to 1,500 the longer one as transformers computes it, int(size * long / short)."""
    sides, asked = np.arange(32, 1501), []
    long, short = np.meshgrid(sides, sides)
    theirs = (size * long / short).astype(int)
    assert np.array_equal(theirs, size * long // short)

    class Sized:
        def __init__(self, width, height):
            self.size, self.width, self.height = (width, height), width, height

        def resize(self, size, resample):
            asked.append(size)
            return Sized(*size)

        def crop(self, box):
            return box

    for width, height in [(1500, 32), (49, 147), (1103, 987), (640, 481)]:
        left, top, right, bottom = model.to_square(Sized(width, height), size, pad=False)
        w, h = asked[-1]
        assert (w, h) == (max(size, size * width // height), max(size, size * height // width))
        assert (left, top) == (int((w - size) / 2), int((h - size) / 2)) and right - left == bottom - top == size


def test_the_original_convention_pads_to_a_square():
    image = Image.new("RGB", (60, 20), (200, 10, 10))
    pixels = (model.to_pixels([model.to_square(image, 30, pad=True)])[0] * 255).round()
    assert pixels[:, 0, 0].tolist() == [122, 116, 104] and pixels[:, -1, -1].tolist() == [122, 116, 104]
    assert pixels[:, 15, 0].tolist() == [200, 10, 10]  # nothing is cut away at the border
    # 20 of 60 rows in the middle are now 10 of 30, with soft edges.
    assert (pixels[0, :8] == 122).all() and (pixels[0, 12:18] == 200).all() and (pixels[0, 22:] == 122).all()
    square = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 30, 3), dtype=np.uint8))
    for pad in (True, False):
        assert np.array_equal(model.to_square(square, 30, pad), square)


def test_images_are_loaded_in_order_and_squared_as_the_policy_has_it(policy, images, tmp_path, monkeypatch):
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 90, 3), dtype=np.uint8))
    (tmp_path / "sub").mkdir()
    wide.save(tmp_path / "sub" / "wide.png")
    images[0].save(tmp_path / "a.png")
    for pad in (False, True):
        monkeypatch.setattr(policy, "pad", pad)
        pixels = model.load_pixels(policy, tmp_path, ["sub/wide.png", "a.png"])
        assert pixels.shape == (2, 3, 64, 64) and pixels.dtype == torch.float32
        assert torch.equal(pixels[:1], model.to_pixels([model.to_square(wide, 64, pad)]))
        assert torch.equal(pixels[1], torch.tensor(np.array(images[0])).permute(2, 0, 1).float() / 255)
    with pytest.raises(data.BadRecord, match="lies outside"):
        model.load_pixels(policy, tmp_path / "sub", ["../a.png"])


def test_decoded_images_are_remembered_as_long_as_they_fit(policy, tmp_path, monkeypatch):
    names, cache = ["a.png", "b.png"], {}
    for name, colour in zip(names, ((255, 0, 51), (0, 102, 204)), strict=True):
        Image.new("RGB", (70, 64), colour).save(tmp_path / name)
    monkeypatch.setattr(model, "DECODED_BYTES", 1)  # the first is remembered, more are not
    fresh = model.load_pixels(policy, tmp_path, names, cache)
    assert fresh[:, :, 0, 0].flatten().tolist() == pytest.approx([1.0, 0.0, 0.2, 0.0, 0.4, 0.8])
    (tmp_path / "a.png").unlink()
    assert torch.equal(model.load_pixels(policy, tmp_path, names, cache), fresh)
    with pytest.raises(ValueError, match="a.png: no such image"):  # only the caller's dict remembers
        model.load_pixels(policy, tmp_path, names)
    (tmp_path / "b.png").unlink()
    with pytest.raises(ValueError, match="b.png: no such image"):
        model.load_pixels(policy, tmp_path, names, cache)


# ---------------------------------------------------------------------------------------------- generation


# These random weights never say </s>, but the other two at different times: they stand for the end here.
@pytest.mark.parametrize("end", ["</s>", "purple", "can"])
def test_greedy_generation_equals_plain_generate(policy, images, monkeypatch, end):
    eos = policy.tokenizer.convert_tokens_to_ids(end)
    monkeypatch.setattr(type(policy.tokenizer), "eos_token_id", eos, raising=False)
    prompts = prompts_of(policy)  # of unequal lengths: left padding
    texts, ended = policy.generate(model.to_pixels(images), prompts, 8)
    expected, ends = [], []
    for question, image in zip(ASKED, images, strict=True):
        inputs = policy.processor(images=image, text=TEMPLATE.format(question=question), return_tensors="pt")
        out = policy.hf.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=eos)
        said = out[0, inputs["input_ids"].shape[1] :]
        expected.append(policy.tokenizer.decode(said, skip_special_tokens=True).strip())
        ends.append(said[-1].item() == eos)
    assert texts == expected and ended == ends
    assert any(ended) == (end != "</s>")


def test_a_greedy_answer_depends_on_its_question_only(policy, images):
    pixels, prompts = model.to_pixels(images), prompts_of(policy)
    together, _ = policy.generate(pixels, prompts, 6)
    alone = [policy.generate(pixels[k : k + 1], prompts[k : k + 1], 6)[0][0] for k in range(3)]
    assert together == alone and len(set(together)) > 1
    assert [text.split()[0] for text in together] == policy.generate(pixels, prompts, 1)[0]


def test_sampled_logps_equal_those_of_the_training_pass(policy, images):
    pixels, prompts, group = model.to_pixels(images), prompts_of(policy), 3
    uniform = torch.from_numpy(np.random.default_rng(0).random((3, group, 30)))
    uniform[0, 0, 2] = 0.0  # token 0, and answers that end early, by what the random weights give
    answers, logps = policy.sample(pixels, prompts, uniform)
    rows = [data.Row(prompt, answers[k * group : (k + 1) * group]) for k, prompt in enumerate(prompts)]
    batch = data.pack(rows, pixels)
    with torch.no_grad():
        again = policy.logps(batch)
    lengths = [len(answer) for answer in answers]
    assert len(answers) == 9 and min(lengths) < max(lengths) == 30
    assert lengths == batch.answer_mask.sum(1).tolist()
    for n, row in enumerate(again.tolist()):
        assert logps[n] == pytest.approx(row[: lengths[n]], abs=1e-4)


def test_an_answer_depends_on_its_question_and_its_numbers_only(policy, images):
    pixels, prompts = model.to_pixels(images), prompts_of(policy)
    uniform = torch.from_numpy(np.random.default_rng(1).random((3, 2, 6)))
    together, _ = policy.sample(pixels, prompts, uniform)
    alone = [policy.sample(pixels[k : k + 1], prompts[k : k + 1], uniform[k : k + 1])[0] for k in range(3)]
    assert together == [answer for answers in alone for answer in answers]
    single, _ = policy.sample(pixels, prompts, uniform[:, 1:])  # nor on the others of its group
    assert single == together[1::2]


def test_samples_follow_the_models_own_distribution(policy, images):
    prompt, pixels = prompts_of(policy)[0], model.to_pixels(images[:1])
    inputs = policy.processor(images=images[0], text=TEMPLATE.format(question=ASKED[0]), return_tensors="pt")
    with torch.no_grad():  # by plain transformers code
        share = policy.hf(**inputs).logits[0, -1].double().softmax(-1)
    share[policy.image_id] = 0
    share = (share / share.sum()).numpy()
    uniform = torch.from_numpy(np.random.default_rng(2).random((1, 4000, 1)))
    answers, _ = policy.sample(pixels, [prompt], uniform)
    counts = np.bincount([a[0] for a in answers], minlength=len(share))
    assert counts[policy.image_id] == 0
    assert np.abs(counts - 4000 * share).max() < 5 * np.sqrt(4000 * share.max())


@pytest.fixture
def even(policy):
    """The policy with a head of zeros, for which every token that can be said has the same chance."""
    head = policy.hf.lm_head.weight
    before = head.detach().clone()
    with torch.no_grad():
        head.zero_()
    yield policy
    with torch.no_grad():
        head.copy_(before)


def test_sampling_stops_at_the_end_token(even, images):
    count, eos = len(even.tokenizer), even.tokenizer.eos_token_id
    uniform = torch.full((1, 2, 5), 0.5 / (count - 1), dtype=torch.float64)  # token 0
    uniform[0, 0, 2] = (eos + 0.5) / (count - 1)
    calls, pixels, prompts = [], model.to_pixels(images[:1]), prompts_of(even)[:1]
    hook = even.hf.model.language_model.register_forward_hook(lambda *_: calls.append(1))
    answers, logps = even.sample(pixels, prompts, uniform)
    assert answers == [[0, 0, eos], [0] * 5] and len(calls) == 5
    assert [v for logp in logps for v in logp] == pytest.approx([-np.log(count)] * 8, abs=1e-5)
    uniform[0, 1, 1] = (eos + 0.5) / (count - 1)  # now all have ended after three tokens
    calls.clear()
    answers, _ = even.sample(pixels, prompts, uniform)
    hook.remove()
    assert answers == [[0, 0, eos], [0, eos]] and len(calls) == 3


def test_the_least_and_the_largest_number_pick_tokens_that_can_be_said(even, images, monkeypatch):
    last = len(even.tokenizer) - 1
    # Of 65 tokens 59 are left: their shares add up to less than the largest number below 1.
    monkeypatch.setattr(even, "unsayable", [0, 1, even.image_id, 5, last - 1, last])
    assert torch.full((59,), 1 / 59, dtype=torch.float64).cumsum(0)[-1] < np.nextafter(1, 0)
    uniform = torch.tensor([[[0.0], [np.nextafter(1, 0)]]], dtype=torch.float64)
    answers, _ = even.sample(model.to_pixels(images[:1]), prompts_of(even)[:1], uniform)
    assert answers == [[2], [last - 2]]


def test_numbers_that_could_pick_no_token_are_refused(policy, images):
    for uniform in (torch.ones(1, 1, 1, dtype=torch.float64), torch.rand(1, 1, 1)):
        with pytest.raises(AssertionError):
            policy.sample(model.to_pixels(images[:1]), prompts_of(policy)[:1], uniform)


def test_tokens_beyond_the_tokenizer_are_never_said(policy, images):
    """LLaVA-1.5's embeddings have 62 rows more than its tokenizer knows."""
    hf, words = copy.deepcopy(policy.hf), len(policy.tokenizer)
    hf.resize_token_embeddings(words + 5)
    with torch.no_grad():
        hf.lm_head.weight[words:] = 50 * torch.randn(5, 128)
        hf.lm_head.weight[policy.image_id] = 50 * torch.randn(128)
    wide = model.Policy(hf, policy.processor).eval()
    pixels, prompts = model.to_pixels(images), prompts_of(policy)
    normed = (pixels[:1] - wide.mean) / wide.std
    plain = hf(input_ids=torch.tensor(prompts[:1]), pixel_values=normed).logits[0, -1]
    assert plain.argmax() >= words or plain.argmax() == policy.image_id, "nothing is forbidden here"
    answers, _ = wide.sample(pixels, prompts, torch.rand(3, 21, 3, dtype=torch.float64))
    said = {token for answer in answers for token in answer}
    assert max(said) < words and policy.image_id not in said
    chosen, _ = wide.decode(pixels, prompts, 1, 4, lambda logits, t: logits.argmax(-1, True))
    assert max(map(max, chosen)) < words and wide.generate(pixels, prompts, 3)[0]


# -------------------------------------------------------------------------------------------------- adapters


def tuned_copy(policy, rank=4):
    hf = copy.deepcopy(policy.hf)
    model.add_lora(hf, rank)
    return model.Policy(hf, policy.processor).eval()


def change_adapters(policy, std):
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if name.endswith("lora_b"):
                parameter.normal_(std=std)


def test_adapters_start_as_nothing_and_can_be_switched_off(policy, images):
    tuned, batch = tuned_copy(policy), pack_one(policy, images[0])
    with torch.no_grad():
        before = policy.logps(batch)
        assert torch.equal(tuned.logps(batch), before)
        change_adapters(tuned, 0.02)
        changed = tuned.logps(batch)
        assert (changed - before).abs().max() > 0.01
        with model.without_lora(tuned):
            assert torch.equal(tuned.logps(batch), before)
        with pytest.raises(KeyboardInterrupt), model.without_lora(tuned):
            raise KeyboardInterrupt
        assert torch.equal(tuned.logps(batch), changed)  # on again, whatever happened
    start = dict(tuned.named_parameters())
    for name, parameter in tuned_copy(policy).named_parameters():  # the same on any process
        assert name.endswith("lora_b") or torch.equal(parameter, start[name])


def test_an_adapted_layer_is_the_layer_of_the_merged_weight(policy, images):
    """W x + 2 B A x, against transformers' own layers with W + 2 B A in them."""
    tuned, merged, batch = tuned_copy(policy, 3), copy.deepcopy(policy.hf), pack_one(policy, images[0])
    change_adapters(tuned, 0.02)
    parts, weights = dict(tuned.hf.named_parameters()), dict(merged.named_parameters())
    with torch.no_grad():
        for name in [name for name in parts if name.endswith("lora_a")]:
            a, b = parts[name], parts[name.replace("lora_a", "lora_b")]
            assert len(a) == b.shape[1] == 3
            weights[name.replace("lora_a", "weight")] += 2 * torch.einsum("or,ri->oi", b, a)
        expected = [plain_logp(merged, policy.processor, images[0], QUESTION, answer) for answer in ANSWERS]
        assert tuned.logps(batch).sum(1).tolist() == pytest.approx(expected, abs=1e-3)


def test_only_adapters_are_trained_and_both_get_gradients(policy, images):
    tuned = tuned_copy(policy)
    trained = {name for name, parameter in tuned.named_parameters() if parameter.requires_grad}
    linear = []
    for name, module in tuned.hf.named_modules():
        if isinstance(module, torch.nn.Linear) and "vision" not in name and name != "lm_head":
            linear.append(name)
    assert trained == {f"hf.{name}.lora_{x}" for name in linear for x in "ab"} and len(linear) == 2 + 3 * 7
    change_adapters(tuned, 1.0)
    tuned.logps(pack_one(policy, images[0])).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in tuned.parameters() if p.requires_grad)
