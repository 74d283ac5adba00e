"""The wrapper against plain transformers code: the same numbers by another route."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

import data
import model
import toy

QUESTION = "Describe the picture."
ANSWERS = ["The picture shows a red cup.", "The picture shows a red cup, a blue spoon and a green pear."]


def rows_of(policy, question, answers):
    prefix = data.encode_prompt(policy.tokenizer, question, model.TEMPLATE, policy.image_tokens)
    replies = [data.encode_answer(policy.tokenizer, question, a, model.TEMPLATE) for a in answers]
    return data.Row(prefix, replies)


def plain_logp(hf, processor, image, question, answer):
    """Summed log-probability of one answer as a user of transformers would write it: no packing, all logits."""
    prompt = model.TEMPLATE.format(question=question)
    inputs = processor(images=image, text=prompt, return_tensors="pt")
    full = processor(images=image, text=f"{prompt} {answer}</s>", return_tensors="pt")
    start = inputs["input_ids"].shape[1]
    with torch.no_grad():
        logits = hf(**full).logits.float()
    logp = logits[0, start - 1 : -1].log_softmax(-1)
    return logp.gather(1, full["input_ids"][0, start:, None]).sum().item()


@pytest.fixture(scope="module")
def images():
    scenes = [image for image, _, _ in toy.scenes("val", 3, 0)]
    return [Image.fromarray(s) for s in scenes]


def test_packed_logps_equal_separate_forwards(policy, images):
    # Rows of unequal length and number of answers, so that there is padding and masking to get wrong.
    asked = [(QUESTION, ANSWERS), ("What do you see?", ANSWERS[::-1]), ("Is there a cup in the picture?", ["Yes"])]
    pixels = torch.stack([model.to_pixels(image, 64) for image in images])
    batch = data.pack([rows_of(policy, q, a) for q, a in asked], pixels, policy.pad_id)
    with torch.no_grad():
        logp = policy.logps(batch).sum(1).tolist()
    expected = [
        plain_logp(policy.hf, policy.processor, image, q, a)
        for image, (q, answers) in zip(images, asked, strict=True)
        for a in answers
    ]
    assert logp == pytest.approx(expected, abs=1e-4)


def test_entropy_and_logp_from_first_principles(policy, images):
    row = rows_of(policy, QUESTION, ANSWERS[:1])
    batch = data.pack([row], model.to_pixels(images[0], 64)[None], policy.pad_id)
    with torch.no_grad():
        token_logp, entropy = policy.logps(batch, entropy=True)
        ids = torch.tensor([row.prefix + row.answers[0]])
        pixels = (model.to_pixels(images[0], 64)[None] - policy.mean) / policy.std
        logits = policy.hf(input_ids=ids, pixel_values=pixels).logits[0, len(row.prefix) - 1 : -1].double().numpy()
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert entropy[0].tolist() == pytest.approx((-p * np.log(p)).sum(1).tolist(), abs=1e-4)
    assert token_logp[0].tolist() == pytest.approx(np.log(p[np.arange(len(p)), row.answers[0]]).tolist(), abs=1e-4)


def test_answers_do_not_see_each_other(policy, images):
    pixels = model.to_pixels(images[0], 64)[None]
    with torch.no_grad():
        both = policy.logps(data.pack([rows_of(policy, QUESTION, ANSWERS)], pixels, policy.pad_id)).sum(1)
        other = policy.logps(data.pack([rows_of(policy, QUESTION, ["Yes", ANSWERS[1]])], pixels, policy.pad_id)).sum(1)
    assert both[1].item() == pytest.approx(other[1].item(), abs=1e-5)


def test_known_features_give_the_same_as_pixels(policy, images):
    pixels = model.to_pixels(images[0], 64)[None]
    batch = data.pack([rows_of(policy, QUESTION, ANSWERS)], pixels, policy.pad_id)
    with torch.no_grad():
        assert torch.equal(policy.logps(batch), policy.logps(batch, vision=policy.vision(pixels)))


def test_gradients_reach_what_is_trained_and_only_that(images):
    policy = toy.build_policy(1)
    batch = data.pack([rows_of(policy, QUESTION, ANSWERS)], model.to_pixels(images[0], 64)[None], policy.pad_id)
    policy.logps(batch).sum().backward()
    for name, parameter in policy.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    frozen = model.Policy(policy.hf, policy.processor, train_vision=False)
    assert not any(p.requires_grad for p in frozen.hf.model.vision_tower.parameters())


def test_greedy_generation_equals_plain_generate(policy, images):
    prompts = [QUESTION, "Is there a cup in the picture?"]  # unequal lengths: left padding
    ids = [data.encode_prompt(policy.tokenizer, q, model.TEMPLATE, policy.image_tokens) for q in prompts]
    pixels = torch.stack([model.to_pixels(image, 64) for image in images[:2]])
    texts, _ = policy.generate(pixels, ids, 8)
    for text, question, image in zip(texts, prompts, images, strict=False):
        inputs = policy.processor(images=image, text=model.TEMPLATE.format(question=question), return_tensors="pt")
        out = policy.hf.generate(**inputs, max_new_tokens=8, do_sample=False)
        plain = policy.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert text == plain.strip()


@pytest.mark.parametrize("shard_bytes", [model.SHARD_BYTES, 1_000_000])
def test_export_is_a_hub_folder_and_reloads_to_the_same_bits(policy, images, tmp_path, monkeypatch, shard_bytes):
    monkeypatch.setattr(model, "SHARD_BYTES", shard_bytes)
    model.save(policy, tmp_path / "final")
    files = sorted(p.name for p in (tmp_path / "final").glob("*.safetensors"))
    assert len(files) > 1 if shard_bytes == 1_000_000 else files == ["model.safetensors"]
    hf = LlavaForConditionalGeneration.from_pretrained(tmp_path / "final")
    again = dict(hf.named_parameters())
    assert all(torch.equal(p, again[name]) for name, p in policy.hf.named_parameters())
    processor = AutoProcessor.from_pretrained(tmp_path / "final")
    loaded = model.load(tmp_path / "final")
    batch = data.pack([rows_of(policy, QUESTION, ANSWERS)], model.to_pixels(images[0], 64)[None], policy.pad_id)
    with torch.no_grad():
        assert torch.equal(loaded.logps(batch), policy.logps(batch))
        expected = plain_logp(hf, processor, images[0], QUESTION, ANSWERS[0])
    assert policy.logps(batch).sum(1)[0].item() == pytest.approx(expected, abs=1e-4)


def test_exported_keys_are_those_of_the_hub(policy):
    keys = {model.hub_key(name) for name, _ in policy.hf.named_parameters()}
    assert {
        "vision_tower.vision_model.embeddings.patch_embedding.weight",
        "multi_modal_projector.linear_1.weight",
        "language_model.model.layers.0.self_attn.q_proj.weight",
        "language_model.lm_head.weight",
    } <= keys


def test_pixels_equal_the_hub_processor(policy):
    rng = np.random.default_rng(0)
    for size in ((64, 64), (100, 80), (64, 200), (31, 90)):
        image = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        theirs = policy.processor.image_processor(image, return_tensors="pt")["pixel_values"][0]
        ours = (model.to_pixels(image, 64) - policy.mean) / policy.std
        assert (ours - theirs).abs().max().item() < 1e-5, size


def test_folders_that_are_no_llava_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no model folder here"):
        model.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="is a 'gpt2'"):
        model.load(tmp_path)


def test_damaged_models_are_refused(policy, tmp_path):
    model.save(policy, tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="cannot be read"):
        model.load(tmp_path / "m")
    tensors = load_file_without(whole, tmp_path, "language_model.lm_head.weight")
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lack the weights lm_head.weight"):  # else they would be random
        model.load(tmp_path / "m")


def load_file_without(whole, folder, key):
    (folder / "whole.safetensors").write_bytes(whole)
    return {name: tensor for name, tensor in load_file(folder / "whole.safetensors").items() if name != key}


# ------------------------------------------------------------------------------------------------ sampling

ASKED = ["Is there a cup in the picture?", QUESTION, "How many objects are in the picture?"]  # of unequal length


def prompts_of(policy):
    return [data.encode_prompt(policy.tokenizer, q, model.TEMPLATE, policy.image_tokens) for q in ASKED]


def test_sampled_logps_equal_those_of_the_training_pass(policy, images):
    pixels = torch.stack([model.to_pixels(image, 64) for image in images])
    prompts, group = prompts_of(policy), 3
    uniform = torch.from_numpy(np.random.default_rng(0).random((3, group, 9)))
    uniform[0, 0, 2] = 0.0  # token 0, and answers that end early, by what the random weights give
    answers, logps = policy.sample(pixels, prompts, uniform)
    rows = [data.Row(prompt, answers[k * group : (k + 1) * group]) for k, prompt in enumerate(prompts)]
    batch = data.pack(rows, pixels, policy.pad_id)
    with torch.no_grad():
        again = policy.logps(batch)
    assert len(answers) == 9 and [len(a) for a in answers] == batch.answer_mask.sum(1).tolist()
    for found, row in zip(logps, again.tolist(), strict=True):
        assert found == pytest.approx(row[: len(found)], abs=1e-4)


def test_an_answer_depends_on_its_question_and_its_numbers_only(policy, images):
    pixels = torch.stack([model.to_pixels(image, 64) for image in images])
    prompts = prompts_of(policy)
    uniform = torch.from_numpy(np.random.default_rng(1).random((3, 2, 6)))
    together, _ = policy.sample(pixels, prompts, uniform)
    alone = [policy.sample(pixels[k : k + 1], prompts[k : k + 1], uniform[k : k + 1])[0] for k in range(3)]
    assert together == [answer for answers in alone for answer in answers]


def test_samples_follow_the_models_own_distribution(policy, images):
    prompt, pixels = prompts_of(policy)[0], model.to_pixels(images[0], 64)[None]
    inputs = policy.processor(images=images[0], text=model.TEMPLATE.format(question=ASKED[0]), return_tensors="pt")
    with torch.no_grad():  # by plain transformers code
        share = policy.hf(**inputs).logits[0, -1].double().softmax(-1)
    share[policy.image_id] = 0
    share = (share / share.sum()).numpy()
    uniform = torch.from_numpy(np.random.default_rng(2).random((1, 4000, 1)))
    answers, _ = policy.sample(pixels, [prompt], uniform)
    counts = np.bincount([a[0] for a in answers], minlength=len(share))
    assert counts[policy.image_id] == 0
    assert np.abs(counts - 4000 * share).max() < 5 * np.sqrt(4000 * share.max())


def test_sampling_stops_at_the_end_token(policy, images):
    hf_head, eos = policy.hf.lm_head.weight, policy.tokenizer.eos_token_id
    before = hf_head.detach().clone()
    with torch.no_grad():
        hidden = torch.zeros_like(hf_head)
        hidden[eos] = 0  # all logits equal: every token has the same chance
        hf_head.copy_(hidden)
    try:
        count = len(before)
        uniform = torch.full((1, 2, 5), 0.5 / (count - 1), dtype=torch.float64)  # token 0
        uniform[0, 0, 2] = (eos + 0.5) / (count - 1)
        pixels = model.to_pixels(images[0], 64)[None]
        answers, logps = policy.sample(pixels, prompts_of(policy)[:1], uniform)
    finally:
        with torch.no_grad():
            hf_head.copy_(before)
    assert answers == [[0, 0, eos], [0] * 5]
    assert [v for logp in logps for v in logp] == pytest.approx([-np.log(count)] * 8, abs=1e-5)
