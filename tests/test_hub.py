"""Folders in and out: we read from one what transformers reads, and it reads back what we write."""

import builtins
import hashlib
import json
import re
import shutil
from fnmatch import fnmatch
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import finished, forked
from PIL import Image
from safetensors.torch import load_file, save_file
from test_model import ANSWERS, QUESTION, TEMPLATE, change_adapters, pack_one, plain_logp, prompts_of
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoProcessor, LlavaForConditionalGeneration

import hub
import model
import runtime
import toy
import warmup
from runtime import Mistake

# transformers 5's names of a LLaVA's parts, and those of the hub's files, which are those of transformers 4.
LAYOUTS = {
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
}
HEAD, QUERY = "language_model.lm_head.weight", "language_model.model.layers.0.self_attn.q_proj.weight"


def hub_name(name):
    (start,) = (start for start in LAYOUTS if name.startswith(start))
    return LAYOUTS[start] + name.removeprefix(start)


@pytest.fixture(scope="module")
def base(policy, tmp_path_factory):
    """The toy's LLaVA as a folder: to be read only."""
    folder = tmp_path_factory.mktemp("base") / "m"
    hub.save_new(policy, folder)
    return folder


@pytest.fixture
def copy(base, tmp_path):
    """A copy of that folder, to be spoilt."""
    return shutil.copytree(base, tmp_path / "m")


@pytest.fixture(scope="module")
def image():
    return Image.fromarray(next(toy.scenes("val", 1, 0))[0])


def edit(folder, name="config.json", **changes):
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | changes))


def into_shards(folder, count=3, rename=lambda key: key, dtype=None):
    """Write a folder's weights again as `count` files with an index."""
    tensors = {}
    for key, value in load_file(folder / "model.safetensors").items():
        tensors[rename(key)] = value.to(dtype or value.dtype)
    (folder / "model.safetensors").unlink()
    index = {}
    for n in range(count):
        file = f"model-{n + 1:05}-of-{count:05}.safetensors"
        keys = list(tensors)[n::count]
        save_file({key: tensors[key] for key in keys}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(keys, file)
    text = json.dumps({"metadata": {"total_size": 0}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)


def weights_of(folder):
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def content_of(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


# --------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("layout", ["hub", "transformers 5"])
def test_loading_equals_from_pretrained_to_the_bit(copy, policy, layout):
    """Several files, half precision, and both layouts of names."""
    names = {hub_name(name): name for name, _ in policy.hf.named_parameters()}
    assert set(names) == set(weights_of(copy))
    into_shards(copy, rename=str if layout == "hub" else names.get, dtype=torch.float16)
    # LLaVA-1.5 on the hub says float16 of its parts too; we want float32 all the same.
    config = json.loads((copy / "config.json").read_text())
    parts = {name: config[name] | {"torch_dtype": "float16"} for name in ("text_config", "vision_config")}
    edit(copy, dtype="float16", **parts)
    theirs = LlavaForConditionalGeneration.from_pretrained(copy, dtype=torch.float32)
    loaded = hub.load(copy)
    assert loaded.convention == "hub" and loaded.folder == copy
    for kind in ("named_parameters", "named_buffers"):
        expected, read = (dict(getattr(hf, kind)()) for hf in (theirs, loaded.hf))
        assert set(read) == set(expected)
        for name, value in read.items():
            assert value.dtype in (torch.float32, torch.int64) and torch.equal(value, expected[name]), name
    for name, value in loaded.hf.named_parameters():
        exact = dict(policy.hf.named_parameters())[name]
        assert torch.equal(value, exact.half().float()), name
    assert torch.equal(loaded.mean, policy.mean) and torch.equal(loaded.std, policy.std)


def test_what_is_trained_is_what_was_asked_for(base):
    def trained(**settings):
        policy = hub.load(base, **settings)
        return {name.split(".")[2] for name, p in policy.hf.named_parameters(prefix="hf") if p.requires_grad}

    assert trained(trained=False) == set()
    assert trained() == {"language_model", "multi_modal_projector", "weight"}  # "weight" is the head's
    assert trained(train_vision=True) == trained() | {"vision_tower"}
    assert trained(lora_rank=2) == {"language_model", "multi_modal_projector"}


def test_recomputed_activations_give_the_same_gradients(base, image):
    gradients = []
    for recompute in (False, True):
        policy, calls = hub.load(base, recompute=recompute), []
        layer = policy.hf.model.language_model.layers[1]
        layer.self_attn.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        policy.logps(pack_one(policy, image)).sum().backward()
        assert len(calls) == (2 if recompute else 1)
        gradients.append([p.grad for p in policy.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_builder_needs_no_weights(copy, policy):
    shapes = hub.load(copy, trained=False, weights=False)
    assert all(p.is_meta for p in shapes.parameters()) and prompts_of(shapes) == prompts_of(policy)
    table = policy.hf.get_input_embeddings().weight.detach().numpy()
    assert np.array_equal(hub.embeddings(copy), table)
    names = {hub_name(name): name for name, _ in policy.hf.named_parameters()}
    into_shards(copy, rename=names.get, dtype=torch.bfloat16)
    assert np.allclose(hub.embeddings(copy), table, rtol=0.01) and hub.embeddings(copy).dtype == np.float32
    for file in copy.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(Mistake, match="hold no.*embed_tokens.weight. Fetch or export it again"):
        hub.embeddings(copy)


def test_the_convention_is_the_folders_own_unless_named(copy, monkeypatch):
    assert hub.load(copy).encoding.template == TEMPLATE and not hub.load(copy).pad
    original = model.CONVENTIONS["original"]
    assert original.pad and original.template.startswith("A chat between a curious user and an artificial")
    # A folder of others is LLaVA-1.5 as it was tuned; the toy's tokenizer does not know its words.
    with pytest.raises(Mistake, match="does not know the words of the 'original' template. Name its own"):
        hub.load(copy, convention="original")
    (copy / "convention.json").unlink()
    with pytest.raises(Mistake, match="does not know the words of the 'original' template. Name its own"):
        hub.load(copy)
    assert hub.load(copy, convention="hub").encoding.template == TEMPLATE
    monkeypatch.setitem(model.CONVENTIONS, "original", model.Convention(TEMPLATE, pad=True))
    assert hub.load(copy).pad
    (copy / "convention.json").write_text('{"convention": "own"}')
    with pytest.raises(Mistake, match="convention.json: names none of original, hub. Mend it, or use"):
        hub.load(copy)
    assert not hub.load(copy, convention="hub").pad


# -------------------------------------------------------------------------------------------------- refusals


def refusal(folder, message, monkeypatch, **settings):
    monkeypatch.chdir(folder.parent)
    with pytest.raises(Mistake, match=message) as error:
        hub.load(folder.name, **settings)
    text = str(error.value)
    assert text.startswith(f"--model {folder.name}: ") and "\n" not in text and len(text) <= 300, text


def test_folders_that_are_no_model_are_refused(tmp_path, monkeypatch):
    refusal(tmp_path / "no where", "hub id that can be had", monkeypatch)
    (tmp_path / "m").mkdir()
    refusal(tmp_path / "m", "no model's folder", monkeypatch)
    for text, message in (("{", "no model's folder"), ('{"model_type": "gpt2"}', "is a 'gpt2'")):
        (tmp_path / "m" / "config.json").write_text(text)
        refusal(tmp_path / "m", message, monkeypatch)


def test_a_hub_that_cannot_be_reached_is_told_in_one_line(monkeypatch):
    def fail(name, allow_patterns):
        files = ("config.json", "x.safetensors", "tokenizer.model", "model.bin", "code.py", "model.pth")
        assert [file for file in files if any(fnmatch(file, p) for p in allow_patterns)] == list(files[:3])
        raise OSError("no route to host\nand a page of advice")

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(Mistake, match=r"^--model llava-hf/x: .* can be had \(no route to host\)[^\n]*$"):
        hub.load("llava-hf/x")


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("vision_config", {"model_type": "siglip_vision_model"}, "a LLaVA of .*siglip_vision_model"),
        ("text_config", {"model_type": "mistral"}, "a LLaVA of .*mistral"),
        ("", {"vision_feature_layer": [-2, -1]}, r"features of layer \[-2, -1\]"),
        ("", {"vision_feature_select_strategy": "full"}, "a LLaVA of .*full"),
        ("text_config", {"num_hidden_layers": 4}, r"layers.3.* is missing; .* is missing \(9 weights\)"),
        ("text_config", {"vocab_size": 68}, r"weight is \(65, 128\), its config says \(68, 128\)"),
    ],
)
def test_another_architecture_is_refused(copy, monkeypatch, part, change, message):
    config = json.loads((copy / "config.json").read_text())
    edit(copy, **({part: config[part] | change} if part else change))
    refusal(copy, message, monkeypatch)


def test_pickles_are_refused_with_a_remedy_that_works(copy, monkeypatch):
    weights = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    refusal(copy, "holds no weights", monkeypatch)
    torch.save(weights, copy / "pytorch_model.bin")
    remedy = "AutoModelForImageTextToText.from_pretrained(folder).save_pretrained(folder)"
    refusal(copy, f"only a pickle, which can run code. If you trust it: {re.escape(remedy)}", monkeypatch)
    exec(f"from transformers import AutoModelForImageTextToText\n{remedy}", {"folder": copy})
    loaded = dict(hub.load(copy, trained=False).hf.named_parameters())
    assert torch.equal(loaded["lm_head.weight"].cpu(), weights["language_model.lm_head.weight"])


@pytest.mark.parametrize("change", [{"mm_projector_type": "mlp2x_gelu"}, {"model_type": "llava_llama"}])
def test_llavas_own_layout_is_named(copy, monkeypatch, change):
    edit(copy, architectures=["LlavaLlamaForCausalLM"], **change)
    refusal(copy, "layout of LLaVA's own code.*Name the hub's conversion, llava-hf", monkeypatch)


def test_no_code_of_a_folder_is_run(copy, monkeypatch):
    """transformers asks on a terminal whether it may; here it is answered with yes."""
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    (copy / "conf.py").write_text("raise SystemExit('the code of a folder was run')")
    edit(copy, model_type="evil", auto_map={"AutoConfig": "conf.Evil"})
    with pytest.raises(Mistake, match="no model's folder"):
        hub.load(copy)


WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("shards", "name", "spoil"),
    [
        (1, WEIGHTS, lambda content: content[:-100]),
        (1, WEIGHTS, lambda content: b""),
        (1, WEIGHTS, lambda content: b"x" * 1000),
        (3, "model-00002-of-00003.safetensors", lambda content: content[:-100]),
        (3, "model-00002-of-00003.safetensors", None),
        (3, INDEX, None),
        (3, INDEX, lambda content: content[:-100]),
        (3, INDEX, lambda content: b"{}"),
    ],
)
def test_damaged_weights_are_refused(copy, monkeypatch, shards, name, spoil):
    if shards > 1:
        into_shards(copy, shards)
    if spoil:
        (copy / name).write_bytes(spoil((copy / name).read_bytes()))
    else:
        (copy / name).unlink()
    refusal(copy, r"its weights cannot be read \(.+\). Fetch or export it again", monkeypatch)


def test_a_weight_that_is_missing_is_not_made_up(copy, monkeypatch):
    tensors = load_file(copy / WEIGHTS)
    del tensors[HEAD]
    save_file(tensors, copy / WEIGHTS, metadata={"format": "pt"})
    refusal(copy, "lm_head.weight is missing", monkeypatch)


@pytest.mark.parametrize("name", ["tokenizer.json", "processor_config.json"])
@pytest.mark.parametrize("text", [None, "{"])
def test_a_tokenizer_or_processor_that_is_missing_or_damaged(copy, monkeypatch, name, text):
    (copy / name).unlink()
    if text:
        (copy / name).write_text(text)
    refusal(copy, "no tokenizer and processor .*. Fetch it again", monkeypatch)


# ------------------------------------------------------------------------------------------------- exporting


def test_a_new_model_is_saved_under_the_hubs_names(policy, base, image, monkeypatch, tmp_path):
    tensors = weights_of(base)
    assert {hub_name(name) for name, _ in policy.hf.named_parameters()} == set(tensors)
    assert {HEAD, QUERY, "multi_modal_projector.linear_1.weight"} < set(tensors)
    assert "vision_tower.vision_model.embeddings.patch_embedding.weight" in tensors
    config = json.loads((base / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"]  # TRL and others ask for it
    hf, processor = LlavaForConditionalGeneration.from_pretrained(base), AutoProcessor.from_pretrained(base)
    again = dict(hf.named_parameters())
    assert all(torch.equal(p, again[name]) for name, p in policy.hf.named_parameters())
    loaded, batch = hub.load(base), pack_one(policy, image)
    with torch.no_grad():
        assert torch.equal(loaded.logps(batch), policy.logps(batch))
        expected = plain_logp(hf, processor, image, QUESTION, ANSWERS[0])
        assert policy.logps(batch).sum(1)[0].item() == pytest.approx(expected, abs=1e-4)
    monkeypatch.setattr(policy.hf.config, "dtype", torch.bfloat16)
    hub.save_new(policy, tmp_path / "half")
    half = weights_of(tmp_path / "half")
    assert all(torch.equal(value, tensors[name].bfloat16()) for name, value in half.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_export_is_the_base_with_what_was_trained_in_its_place(copy, image, tmp_path, monkeypatch, dtype):
    into_shards(copy, 2, dtype=dtype)
    edit(copy, dtype=str(dtype).removeprefix("torch."))
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    before, base, policy = content_of(copy), weights_of(copy), hub.load(copy)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter += 0.01
        logp = policy.logps(pack_one(policy, image))
    monkeypatch.setattr(hub, "SHARD_BYTES", 1_000_000)
    final = tmp_path / "final"
    hub.export(policy, final)

    assert content_of(copy) == before  # the base is never written
    after = weights_of(final)
    assert set(after) == set(base) and len(list(final.glob("*.safetensors"))) > 2
    trained = {hub_name(name) for name, p in policy.hf.named_parameters() if p.requires_grad}
    assert HEAD in trained and len(base) > len(trained) > 10
    for name, value in after.items():
        expected = (base[name].float() + 0.01).to(dtype) if name in trained else base[name]
        assert value.dtype == dtype and torch.equal(value, expected), name
    for name in before:
        if "safetensors" not in name and name != "config.json":
            assert content_of(final)[name] == before[name], name
    assert json.loads((final / "convention.json").read_text()) == {"convention": "hub"}

    hf, processor = LlavaForConditionalGeneration.from_pretrained(final), AutoProcessor.from_pretrained(final)
    assert hf.dtype == dtype and hf.generation_config.eos_token_id == policy.tokenizer.eos_token_id
    expected = plain_logp(hf.float(), processor, image, QUESTION, ANSWERS[0])
    assert logp.sum(1)[0].item() == pytest.approx(expected, abs=1e-3 if dtype == torch.float32 else 1)
    again = hub.load(final)
    if dtype == torch.float32:
        with torch.no_grad():
            assert torch.equal(again.logps(pack_one(again, image)), logp)


def test_an_exported_folder_says_how_it_was_asked(copy, tmp_path, monkeypatch):
    monkeypatch.setitem(model.CONVENTIONS, "original", model.Convention(TEMPLATE, pad=True))
    hub.export(hub.load(copy, convention="original", trained=False), tmp_path / "final")
    assert hub.load(tmp_path / "final").convention == "original" and hub.load(copy).convention == "hub"
    assert weights_of(tmp_path / "final")[HEAD].equal(weights_of(copy)[HEAD])


def test_adapters_are_merged_into_the_weights(base, image, tmp_path):
    tuned = hub.load(base, lora_rank=4)
    change_adapters(tuned, 0.02)
    batch = pack_one(tuned, image)
    with torch.no_grad():
        changed = tuned.logps(batch)
    hub.export(tuned, tmp_path / "merged")
    with torch.no_grad():
        merged = hub.load(tmp_path / "merged").logps(batch)
        assert torch.allclose(merged, changed, atol=1e-4)
        assert (merged - hub.load(base).logps(batch)).abs().max() > 0.01
    before, after = weights_of(base), weights_of(tmp_path / "merged")
    assert set(after) == set(before)
    adapters = [name for name, _ in tuned.hf.named_parameters() if name.endswith("lora_a")]
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {hub_name(name.replace("lora_a", "weight")) for name in adapters}


def test_an_export_that_fails_leaves_the_older_one(base, tmp_path, monkeypatch):
    policy, final = hub.load(base, trained=False), tmp_path / "run" / "final"
    hub.export(policy, final)
    (final / "mark").touch()
    before = content_of(final)

    def full_disk(*args):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(hub.runtime, "fsync_folder", full_disk)
        with pytest.raises(Mistake, match="no space left"):
            hub.export(policy, final)
    assert content_of(final) == before
    hub.export(policy, final)
    assert not (final / "mark").exists() and [path.name for path in final.parent.iterdir()] == ["final"]


def test_untrained_weights_in_other_formats_stay_behind(copy, tmp_path):
    """A clone of a hub's repository may hold its weights as pickles too."""
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.pth", "model.gguf"):
        (copy / name).write_bytes(b"weights")
    hub.export(hub.load(copy, trained=False), tmp_path / "final")
    assert {path.suffix for path in (tmp_path / "final").iterdir()} == {".json", ".safetensors"}
    assert len(list((tmp_path / "final").glob("*.index.json"))) == 0


# -------------------------------------------------------------------------------------------- half precision


def as_on_one_gpu(policy, monkeypatch):
    """What runtime.shard does for one GPU, on the CPU: autocast, and bfloat16 where nothing is trained."""
    autocast = torch.autocast
    with monkeypatch.context() as patch:
        patch.setattr(torch, "autocast", lambda kind, dtype: autocast("cpu", dtype))
        patch.setattr(policy, "to", lambda here: policy, raising=False)
        runtime.shard(policy, torch.device("cuda", 0))
    return policy


@pytest.mark.parametrize("settings", [{"lora_rank": 4}, {"trained": False}, {}])
def test_one_gpus_way_of_computing_works(policy, base, image, monkeypatch, settings):
    batch = pack_one(policy, image)
    with torch.no_grad():
        exact = policy.logps(batch).sum(1)
    other = as_on_one_gpu(hub.load(base, **settings), monkeypatch)
    assert {p.dtype for p in other.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in other.parameters() if p.requires_grad)
    logp = other.logps(batch)
    assert logp.dtype == torch.float32 and torch.allclose(logp.sum(1), exact, atol=0.5, rtol=0.01)
    assert not torch.allclose(logp.sum(1), exact, atol=1e-6)  # it is computed in half precision
    pixels, prompts = batch.pixels.clone(), prompts_of(other)[:1]
    answers, logps = other.sample(pixels, prompts, torch.rand(1, 3, 5, dtype=torch.float64))
    assert len(answers) == 3 and other.generate(pixels, prompts, 3)[0]
    if settings.get("trained", True):
        logp.sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in other.parameters() if p.requires_grad)
    else:  # an attack
        batch.pixels = pixels.requires_grad_()
        (gradient,) = torch.autograd.grad(other.logps(batch).sum(), pixels)
        assert gradient.dtype == torch.float32 and gradient.abs().max() > 0


def test_small_adapters_survive_the_export_from_one_gpu(base, tmp_path, monkeypatch):
    """There frozen weights lie in bfloat16: added up in it, most of a small change would be rounded away."""
    tuned = as_on_one_gpu(hub.load(base, lora_rank=2), monkeypatch)
    change_adapters(tuned, 1e-5)
    hub.export(tuned, tmp_path / "merged")
    before, after = weights_of(base), weights_of(tmp_path / "merged")
    attention = tuned.hf.model.language_model.layers[0].self_attn.q_proj
    change = 2.0 * attention.lora_b @ attention.lora_a
    assert torch.allclose(after[QUERY] - before[QUERY], change, atol=1e-7) and change.abs().max() > 1e-6
    for name in (HEAD, "vision_tower.vision_model.embeddings.patch_embedding.weight"):
        assert torch.equal(after[name], before[name])


def test_half_precision_does_not_touch_what_picks_the_tokens(base, image):
    """FSDP casts what its root is given: one number in 500 would become 1, and pick the last token."""
    runtime.start()
    try:
        sliced = hub.load(base, trained=False)
        runtime.slice_layers(sliced, init_device_mesh("cpu", (1,)), half=True)
        numbers = np.random.default_rng(0).random((1, 4000, 2))
        numbers[0, :100, 0] = 1 - 1e-9  # what is almost 1 picks the last token that has a share
        pixels, prompts = model.to_pixels([image]), prompts_of(sliced)[:1]
        answers, _ = sliced.sample(pixels, prompts, torch.from_numpy(numbers))
        last = max(answer[0] for answer in answers)
        assert sum(answer[0] == last for answer in answers) < 100 + 4000 / 20
        seen, layers = [], []
        tower, language = sliced.hf.model.vision_tower, sliced.hf.model.language_model
        tower.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        language.layers[0].mlp.register_forward_pre_hook(lambda _, args: layers.append(args[0].dtype))
        batch = pack_one(sliced, image)
        sliced.sample(pixels, prompts, torch.from_numpy(numbers[:, :1]))
        sliced.generate(pixels, prompts, 1)
        with torch.no_grad():
            sliced.logps(batch)
        # An attack's steps are smaller than what bfloat16 resolves.
        exact = (pixels - sliced.mean) / sliced.std
        assert len(seen) == 3 and all(torch.equal(x, exact) for x in seen)
        assert set(layers) == {torch.bfloat16}
    finally:
        dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------- two processes


def test_rank_0_alone_reads_a_model_and_the_others_get_their_slices(base, tmp_path):
    settings = {"full": {}, "lora": {"lora_rank": 3}}

    def main():
        runtime.start()
        rank, read = runtime.rank(), hub.read_weights

        def counted(*args):
            (tmp_path / f"read by {rank}").touch()
            return read(*args)

        hub.read_weights = counted
        for name, options in settings.items():
            policy = hub.load(base, **options)
            state, slices = {}, 0
            for key, parameter in policy.named_parameters():
                state[key] = parameter.full_tensor().contiguous()
                slices += parameter.to_local().numel()
            state |= {f"{key} of buffers": value.contiguous() for key, value in policy.named_buffers()}
            state["slices"] = torch.tensor(slices)
            save_file(state, tmp_path / f"{name} {rank}")
        change_adapters_alike(policy)
        hub.export(policy, tmp_path / "final")

    codes = finished(forked(SimpleNamespace(__name__="loads", main=main), processes=2, log=tmp_path / "log"))
    assert codes == [0, 0], (tmp_path / "log").read_text()
    assert sorted(path.name for path in tmp_path.glob("read by *")) == ["read by 0"]
    for name, options in settings.items():
        policy = hub.load(base, **options)
        expected = dict(policy.named_parameters())
        expected |= {f"{key} of buffers": value for key, value in policy.named_buffers()}
        sizes = []
        for rank in range(2):
            state = load_file(tmp_path / f"{name} {rank}")
            sizes.append(state.pop("slices").item())
            assert set(state) == set(expected)
            assert all(torch.equal(value, expected[key]) for key, value in state.items()), (name, rank)
        assert sum(sizes) == sum(p.numel() for p in policy.parameters()) and max(sizes) < 0.6 * sum(sizes)
    alone = hub.load(base, **settings["lora"])
    change_adapters_alike(alone)
    hub.export(alone, tmp_path / "alone")
    assert content_of(tmp_path / "final") == content_of(tmp_path / "alone")
    assert not torch.equal(weights_of(tmp_path / "final")[QUERY], weights_of(base)[QUERY])
    theirs = LlavaForConditionalGeneration.from_pretrained(base)
    full = load_file(tmp_path / "full 1")
    assert all(torch.equal(full[f"hf.{name}"], value) for name, value in theirs.named_parameters())
    assert all(torch.equal(full[f"hf.{name} of buffers"], value) for name, value in theirs.named_buffers())


def change_adapters_alike(policy):
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if name.endswith("lora_b"):
                parameter += 0.01


def test_a_mistake_of_rank_0_stops_all_ranks(copy, tmp_path):
    tensors = load_file(copy / WEIGHTS)
    del tensors[HEAD]
    save_file(tensors, copy / WEIGHTS, metadata={"format": "pt"})

    def main():
        runtime.start()
        hub.load(copy)

    codes = finished(forked(SimpleNamespace(__name__="loads", main=main), processes=2, log=tmp_path / "log"))
    text = (tmp_path / "log").read_text()
    assert codes == [2, 2] and text.count("lm_head.weight is missing") == 2 and "Traceback" not in text


# ----------------------------------------------------------------------------------------------- fingerprints


@pytest.fixture
def records(tmp_path):
    names = ("image", "image_rejected")
    for n, name in enumerate(names):
        Image.new("RGB", (8, 8), (n, 0, 0)).save(tmp_path / f"{name}.png")
    return [{"id": "a", "chosen": "x"} | {name: f"{name}.png" for name in names}]


def test_a_fingerprint_names_all_that_numbers_depend_on(copy, tmp_path, records, monkeypatch):
    def mark(policy=None):
        return hub.fingerprint(policy or hub.load(copy), tmp_path, records)

    first, marks = mark(), set()
    assert len(first) == 16 and mark() == first
    policy = hub.load(copy)
    for buffer in (policy.mean, policy.std):
        before = buffer.clone()
        buffer += 1e-3
        marks.add(mark(policy))
        buffer.copy_(before)
    changes = [(policy, "pad", True), (policy.encoding, "template", TEMPLATE + " ")]
    for owner, name, value in [*changes, (runtime, "device", lambda: torch.device("cuda"))]:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            marks.add(mark(policy))
    records[0]["chosen"] = "y"
    marks.add(mark(policy))
    records[0]["chosen"] = "x"
    for name in ("image", "image_rejected"):
        before = (tmp_path / f"{name}.png").read_bytes()
        Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / f"{name}.png")
        marks.add(mark(policy))
        (tmp_path / f"{name}.png").write_bytes(before)
    assert mark(policy) == first and len(marks | {first}) == 9
    config = json.loads((copy / "config.json").read_text())
    edit(copy, text_config=config["text_config"] | {"rms_norm_eps": 1e-5})
    marks.add(mark())
    edit(copy, text_config=config["text_config"])
    tokens = json.loads((copy / "tokenizer.json").read_text())
    vocab = tokens["model"]["vocab"]
    vocab["red"], vocab["blue"] = vocab["blue"], vocab["red"]
    edit(copy, "tokenizer.json", **tokens)
    marks.add(mark())
    vocab["red"], vocab["blue"] = vocab["blue"], vocab["red"]
    edit(copy, "tokenizer.json", **tokens)
    assert mark() == first
    tensors = load_file(copy / WEIGHTS)
    tensors[HEAD][3, 5] += 1e-6
    save_file(tensors, copy / WEIGHTS, metadata={"format": "pt"})
    marks.add(mark())
    assert len(marks | {first}) == 12


def test_a_digest_is_that_of_records_and_images(tmp_path, records):
    first = hub.digest(tmp_path, records)
    turned = dict(reversed(list(records[0].items())))  # the order of fields says nothing
    assert hub.digest(tmp_path, [turned]) == first
    assert hub.digest(tmp_path, records * 2) != first != hub.digest(tmp_path, [])
    assert hub.digest(tmp_path, [{"id": "no image"}]) != first


def test_a_warmed_up_model_reads_back_as_it_was(tmp_path, image):
    """The way of the built-in world: made from a config, saved, loaded, exported."""
    policy = warmup.build_policy(3)
    hub.save_new(policy, tmp_path / "base")
    hub.export(hub.load(tmp_path / "base"), tmp_path / "final")
    assert content_of(tmp_path / "final")[WEIGHTS] == content_of(tmp_path / "base")[WEIGHTS]
    loaded, batch = hub.load(tmp_path / "final", trained=False), pack_one(policy, image)
    with torch.no_grad():
        assert torch.equal(loaded.logps(batch), policy.eval().logps(batch))
