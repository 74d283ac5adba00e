"""The wrapper against plain transformers code: the same numbers by another route."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoProcessor, LlavaForConditionalGeneration

import data
import model
import runtime
import toy

QUESTION = "Describe the picture."
TEMPLATE = "USER: <image>\n{question} ASSISTANT:"  # of the hub's model cards
ANSWERS = ["The picture shows a red cup.", "The picture shows a red cup, a blue spoon and a green pear."]


def rows_of(policy, question, answers):
    prefix = data.encode_prompt(policy.tokenizer, question, policy.template, policy.image_tokens)
    replies = [data.encode_answer(policy.tokenizer, question, a, policy.template) for a in answers]
    return data.Row(prefix, replies)


def plain_logp(hf, processor, image, question, answer):
    """Summed log-probability of one answer as a user of transformers would write it: no packing, all logits."""
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
    scenes = [image for image, _, _ in toy.scenes("val", 3, 0)]
    return [Image.fromarray(s) for s in scenes]


def test_packed_logps_equal_separate_forwards(policy, images):
    # Rows of unequal length and number of answers, so that there is padding and masking to get wrong.
    asked = [(QUESTION, ANSWERS), ("What do you see?", ANSWERS[::-1]), ("Is there a cup in the picture?", ["Yes"])]
    pixels = torch.stack([model.to_pixels(image, 64) for image in images])
    batch = data.pack([rows_of(policy, q, a) for q, a in asked], pixels)
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
    batch = data.pack([row], model.to_pixels(images[0], 64)[None])
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
        both = policy.logps(data.pack([rows_of(policy, QUESTION, ANSWERS)], pixels)).sum(1)
        other = policy.logps(data.pack([rows_of(policy, QUESTION, ["Yes", ANSWERS[1]])], pixels)).sum(1)
    assert both[1].item() == pytest.approx(other[1].item(), abs=1e-5)


def test_known_features_give_the_same_as_pixels(policy, images):
    pixels = model.to_pixels(images[0], 64)[None]
    batch = data.pack([rows_of(policy, QUESTION, ANSWERS)], pixels)
    with torch.no_grad():
        assert torch.equal(policy.logps(batch), policy.logps(batch, vision=policy.vision(pixels)))


def test_gradients_reach_what_is_trained_and_only_that(images):
    policy = toy.build_policy(1)
    batch = data.pack([rows_of(policy, QUESTION, ANSWERS)], model.to_pixels(images[0], 64)[None])
    policy.logps(batch).sum().backward()
    for name, parameter in policy.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    frozen = model.Policy(policy.hf, policy.processor, train_vision=False)
    assert not any(p.requires_grad for p in frozen.hf.model.vision_tower.parameters())


def test_greedy_generation_equals_plain_generate(policy, images):
    prompts = [QUESTION, "Is there a cup in the picture?"]  # unequal lengths: left padding
    ids = [data.encode_prompt(policy.tokenizer, q, policy.template, policy.image_tokens) for q in prompts]
    pixels = torch.stack([model.to_pixels(image, 64) for image in images[:2]])
    texts, _ = policy.generate(pixels, ids, 8)
    for text, question, image in zip(texts, prompts, images, strict=False):
        inputs = policy.processor(images=image, text=policy.template.format(question=question), return_tensors="pt")
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
    config = json.loads((tmp_path / "final" / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"]  # TRL and others ask for it
    processor = AutoProcessor.from_pretrained(tmp_path / "final")
    loaded = model.load(tmp_path / "final")
    batch = data.pack([rows_of(policy, QUESTION, ANSWERS)], model.to_pixels(images[0], 64)[None])
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


def test_decoded_images_are_kept_as_long_as_they_fit(policy, tmp_path, monkeypatch):
    names = ["a.png", "b.png"]
    for name, colour in zip(names, ((255, 0, 51), (0, 102, 204)), strict=True):
        Image.new("RGB", (70, 64), colour).save(tmp_path / name)
    monkeypatch.setattr(policy, "decoded", {})
    monkeypatch.setattr(model, "DECODED_BYTES", 1)  # the first is kept, more are not
    fresh = model.load_pixels(policy, tmp_path, names)
    assert fresh[:, :, 0, 0].flatten().tolist() == pytest.approx([1.0, 0.0, 0.2, 0.0, 0.4, 0.8])
    (tmp_path / "a.png").unlink()
    assert torch.equal(model.load_pixels(policy, tmp_path, names), fresh)
    (tmp_path / "b.png").unlink()
    with pytest.raises(ValueError, match="b.png: no such image"):
        model.load_pixels(policy, tmp_path, names)


def test_folders_that_are_no_llava_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no model folder here, nor a Hugging Face id that can be had"):
        model.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no model's folder"):
        model.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="is a 'gpt2'"):
        model.load(tmp_path)


def test_another_architecture_and_pickles_are_refused(policy, tmp_path):
    model.save(policy, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    other = {**config, "vision_config": {**config["vision_config"], "model_type": "siglip_vision_model"}}
    (tmp_path / "m" / "config.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="a LLaVA of .'siglip_vision_model'"):
        model.load(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="no .safetensors. Other formats are refused.*save_pretrained"):
        model.load(tmp_path / "m")


def test_damaged_models_are_refused(policy, tmp_path):
    model.save(policy, tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="cannot be read"):
        model.load(tmp_path / "m")
    tensors = load_file_without(whole, tmp_path, "language_model.lm_head.weight")
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="language_model.lm_head.weight is missing"):  # else they would be random
        model.load(tmp_path / "m")


def test_a_weight_of_another_shape_is_refused(policy, tmp_path):
    model.save(policy, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["text_config"]["vocab_size"] += 3
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"embed_tokens.weight is \(\d+, 128\), its config says"):
        model.load(tmp_path / "m")


def test_loading_by_shards_equals_from_pretrained(policy, tmp_path, monkeypatch):
    """Several files, half precision, and both layouts of names: the hub's, and that of transformers 5."""
    monkeypatch.setattr(policy.hf.config, "dtype", torch.float16)
    monkeypatch.setattr(model, "SHARD_BYTES", 700_000)
    model.save(policy, tmp_path / "hub")
    assert len(list((tmp_path / "hub").glob("*.safetensors"))) > 2
    shutil.copytree(tmp_path / "hub", tmp_path / "v5")
    ours = {model.hub_key(name): name for name, _ in policy.hf.named_parameters()}
    for file in (tmp_path / "v5").glob("*.safetensors"):
        save_file({ours[key]: value for key, value in load_file(file).items()}, file, metadata={"format": "pt"})
    for layout in ("hub", "v5"):  # LLaVA-1.5 on the hub says so of its parts too; we want float32 all the same
        config = json.loads((tmp_path / layout / "config.json").read_text())
        config["text_config"]["torch_dtype"] = config["vision_config"]["torch_dtype"] = "float16"
        (tmp_path / layout / "config.json").write_text(json.dumps(config))
    index = json.loads((tmp_path / "v5" / "model.safetensors.index.json").read_text())
    index["weight_map"] = {ours[key]: file for key, file in index["weight_map"].items()}
    (tmp_path / "v5" / "model.safetensors.index.json").write_text(json.dumps(index))
    theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hub", dtype=torch.float32)
    for layout in ("hub", "v5"):
        loaded = model.load(tmp_path / layout)
        assert loaded.convention == "hub"
        for kind in ("named_parameters", "named_buffers"):
            expected = dict(getattr(theirs, kind)())
            found = dict(getattr(loaded.hf, kind)())
            assert set(found) == set(expected)
            for name, value in found.items():
                assert value.dtype in (torch.float32, torch.int64) and torch.equal(value, expected[name]), name
    assert torch.equal(loaded.mean, policy.mean) and torch.equal(loaded.std, policy.std)


def test_the_original_convention_pads_to_a_square():
    image = Image.new("RGB", (60, 20), (200, 10, 10))
    pixels = (model.to_pixels(image, 30, pad=True) * 255).round()
    assert pixels[:, 0, 0].tolist() == [122, 116, 104] and pixels[:, -1, -1].tolist() == [122, 116, 104]
    assert pixels[:, 15, 0].tolist() == [200, 10, 10]  # nothing is cut away at the border
    # 20 of 60 rows in the middle are now 10 of 30, with soft edges.
    assert (pixels[0, :8] == 122).all() and (pixels[0, 12:18] == 200).all() and (pixels[0, 22:] == 122).all()
    square = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 30, 3), dtype=np.uint8))
    assert torch.equal(model.to_pixels(square, 30, pad=True), model.to_pixels(square, 30))


def test_the_convention_is_the_folders_own_unless_named(policy, tmp_path, monkeypatch):
    model.save(policy, tmp_path / "m")
    assert model.load(tmp_path / "m").template == TEMPLATE
    original = model.CONVENTIONS["original"]
    assert original.pad and original.template.startswith("A chat between a curious user and an artificial")
    # A folder of others is LLaVA-1.5 as it was tuned; the toy's tokenizer does not know its words, which is told.
    with pytest.raises(ValueError, match="does not know the words of the 'original' template"):
        model.load(tmp_path / "m", convention="original")
    (tmp_path / "m" / "convention.json").unlink()
    with pytest.raises(ValueError, match="does not know the words of the 'original' template"):
        model.load(tmp_path / "m")
    monkeypatch.setitem(model.CONVENTIONS, "original", model.Convention(TEMPLATE, pad=True))
    assert model.load(tmp_path / "m").pad
    with pytest.raises(ValueError, match="--convention 'new': use one of original, hub"):
        model.load(tmp_path / "m", convention="new")
    for text in ("{", "{}", "[]", '{"convention": ""}', '{"convention": ["hub"]}'):
        (tmp_path / "m" / "convention.json").write_text(text)
        with pytest.raises(ValueError, match="convention.json: names none of original, hub"):
            model.load(tmp_path / "m")


def test_tokens_beyond_the_tokenizer_are_never_said(policy, tmp_path):
    """LLaVA-1.5's embeddings have 62 rows more than its tokenizer knows."""
    model.save(policy, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["text_config"]["vocab_size"] += 5
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    file = tmp_path / "m" / "model.safetensors"
    tensors = load_file(file)
    for key in ("language_model.lm_head.weight", "language_model.model.embed_tokens.weight"):
        tensors[key] = torch.cat([tensors[key], 50 * torch.randn(5, 128)])
    save_file(tensors, file, metadata={"format": "pt"})
    wide = model.load(tmp_path / "m").eval()
    prompt = data.encode_prompt(wide.tokenizer, QUESTION, wide.template, wide.image_tokens)
    pixels = torch.rand(1, 3, 64, 64)
    answers, _ = wide.sample(pixels, [prompt], torch.rand(1, 64, 3, dtype=torch.float64))
    assert max(max(answer) for answer in answers) < len(wide.tokenizer)
    assert wide.generate(pixels, [prompt], 3)[0]


# ---------------------------------------------------------------------------------------------------- LoRA


def test_adapters_start_as_nothing_and_merge_into_the_weights(policy, tmp_path, images):
    model.save(policy, tmp_path / "m")
    plain, tuned = model.load(tmp_path / "m").eval(), model.load(tmp_path / "m", lora_rank=4).eval()
    batch = data.pack([rows_of(policy, QUESTION, ANSWERS)], model.to_pixels(images[0], 64)[None])
    with torch.no_grad():
        before = plain.logps(batch)
        assert torch.equal(tuned.logps(batch), before)
        for name, parameter in tuned.named_parameters():
            if name.endswith("lora_b"):
                parameter.normal_(std=0.02)
        changed = tuned.logps(batch)
        assert (changed - before).abs().max() > 0.01
        with model.without_lora(tuned):
            assert torch.equal(tuned.logps(batch), before)
    model.save(tuned, tmp_path / "merged")
    with torch.no_grad():
        merged = model.load(tmp_path / "merged").eval().logps(batch)
    assert torch.allclose(merged, changed, atol=1e-4)
    assert set(load_file(tmp_path / "merged" / "model.safetensors")) == set(
        load_file(tmp_path / "m" / "model.safetensors")
    )


def test_only_adapters_are_trained_and_both_get_gradients(policy, tmp_path, images):
    model.save(policy, tmp_path / "m")
    tuned = model.load(tmp_path / "m", lora_rank=4)
    trained = {name for name, parameter in tuned.named_parameters() if parameter.requires_grad}
    linear = [
        n
        for n, m in tuned.hf.named_modules()
        if isinstance(m, torch.nn.Linear) and "vision" not in n and n != "lm_head"
    ]
    assert trained == {f"hf.{name}.lora_{x}" for name in linear for x in "ab"}
    batch = data.pack([rows_of(policy, QUESTION, ANSWERS)], model.to_pixels(images[0], 64)[None])
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if name.endswith("lora_b"):
                parameter.normal_()
    tuned.logps(batch).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in tuned.parameters() if p.requires_grad)


def load_file_without(whole, folder, key):
    (folder / "whole.safetensors").write_bytes(whole)
    return {name: tensor for name, tensor in load_file(folder / "whole.safetensors").items() if name != key}


# ------------------------------------------------------------------------------------------------ sampling

ASKED = ["Is there a cup in the picture?", QUESTION, "How many objects are in the picture?"]  # of unequal length


def prompts_of(policy):
    return [data.encode_prompt(policy.tokenizer, q, policy.template, policy.image_tokens) for q in ASKED]


def test_sampled_logps_equal_those_of_the_training_pass(policy, images):
    pixels = torch.stack([model.to_pixels(image, 64) for image in images])
    prompts, group = prompts_of(policy), 3
    uniform = torch.from_numpy(np.random.default_rng(0).random((3, group, 9)))
    uniform[0, 0, 2] = 0.0  # token 0, and answers that end early, by what the random weights give
    answers, logps = policy.sample(pixels, prompts, uniform)
    rows = [data.Row(prompt, answers[k * group : (k + 1) * group]) for k, prompt in enumerate(prompts)]
    batch = data.pack(rows, pixels)
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
    inputs = policy.processor(images=images[0], text=policy.template.format(question=ASKED[0]), return_tensors="pt")
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


def test_half_precision_does_not_touch_what_picks_the_tokens(policy, images, tmp_path):
    """FSDP casts what its root is given: in bfloat16 one number in 500 would become 1, and pick the last token."""
    runtime.start()
    try:
        model.save(policy, tmp_path / "m")
        sliced = model.load(tmp_path / "m", trained=False, place=place_in_half).eval()
        numbers = np.random.default_rng(0).random((1, 4000, 2))
        numbers[0, :100, 0] = 1 - 1e-9  # what is almost 1 picks the last token that has a share, and is no error
        pixels = model.to_pixels(images[0], 64)[None]
        answers, _ = sliced("sample", pixels, prompts_of(policy)[:1], torch.from_numpy(numbers))
        last = max(answer[0] for answer in answers)
        assert sum(answer[0] == last for answer in answers) < 100 + 4000 / 20
        seen = []
        vision = sliced.hf.model.vision_tower.forward
        sliced.hf.model.vision_tower.forward = lambda x, **k: seen.append(x.dtype) or vision(x, **k)
        sliced("sample", pixels, prompts_of(policy)[:1], torch.from_numpy(numbers[:, :1]))
        assert seen == [torch.float32]
    finally:
        dist.destroy_process_group()


def place_in_half(policy):
    runtime.slice_layers(policy, init_device_mesh("cpu", (1,)), half=True)
    return policy.to_empty(device="cpu")


def test_one_gpus_way_of_computing_works(policy, images, tmp_path):
    """Autocast and weights in bfloat16 where they are not trained, as on one GPU, here on the CPU."""
    model.save(policy, tmp_path / "m")
    batch = data.pack([rows_of(policy, QUESTION, ANSWERS)], model.to_pixels(images[0], 64)[None])
    with torch.no_grad():
        exact = policy.logps(batch).sum(1)
    for settings in ({"lora_rank": 4}, {"trained": False}, {}):
        other = model.load(tmp_path / "m", **settings, place=place_as_on_a_gpu)
        kinds = {p.dtype for p in other.parameters() if not p.requires_grad}
        assert kinds == {torch.bfloat16} and all(
            p.dtype == torch.float32 for p in other.parameters() if p.requires_grad
        )
        logp = other("logps", batch)
        assert logp.dtype == torch.float32 and torch.allclose(logp.sum(1), exact, atol=0.5, rtol=0.01)
        pixels, prompts = model.to_pixels(images[0], 64)[None], prompts_of(other)[:1]
        answers, logps = other("sample", pixels, prompts, torch.rand(1, 3, 5, dtype=torch.float64))
        assert len(answers) == 3 and other("generate", pixels, prompts, 3)[0]
        if settings.get("trained", True):
            logp.sum().backward()
            assert all(p.grad is not None for p in other.parameters() if p.requires_grad)
        else:  # an attack
            pixels = pixels.requires_grad_()
            row = data.pack([rows_of(policy, QUESTION, ANSWERS[:1])], pixels)
            (gradient,) = torch.autograd.grad(other("logps", row).sum(), pixels)
            assert gradient.dtype == torch.float32 and gradient.abs().max() > 0


def test_small_adapters_survive_the_export_from_one_gpu(policy, tmp_path):
    """There the frozen weights lie in bfloat16: added up in it, most of a small change would be rounded away."""
    model.save(policy, tmp_path / "m")
    tuned = model.load(tmp_path / "m", lora_rank=2, place=place_as_on_a_gpu)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if name.endswith("lora_b"):
                parameter.normal_(std=1e-5)
    model.save(tuned, tmp_path / "merged")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("m", "merged"))
    attention = tuned.hf.model.language_model.layers[0].self_attn.q_proj
    key = "language_model.model.layers.0.self_attn.q_proj.weight"
    change = 2.0 * attention.lora_b @ attention.lora_a
    assert torch.allclose(after[key] - before[key], change, atol=1e-7)
    assert torch.equal(after["language_model.lm_head.weight"], before["language_model.lm_head.weight"])
    vision = "vision_tower.vision_model.embeddings.patch_embedding.weight"
    assert torch.equal(after[vision], before[vision])


def place_as_on_a_gpu(policy):
    policy.autocast = True
    runtime.halve(policy)
    return runtime.put(policy, torch.device("cpu"))
