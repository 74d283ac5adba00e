"""Words to regions with transformers' real classes and tiny random weights: the path, not the quality."""

import json
import re

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from conftest import refused, run_here
from PIL import Image
from transformers import AutoConfig, BertTokenizer, CLIPTokenizer
from transformers.models.grounding_dino.image_processing_pil_grounding_dino import GroundingDinoImageProcessorPil
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

import build_data
import data
import grounding
from runtime import Mistake

NEW = [int(n) for n in transformers.__version__.split(".")[:2]] >= [5, 23]
dino_works = pytest.mark.skipif(not NEW, reason="transformers before 5.23 runs Grounding DINO wrongly")
CPU = torch.device("cpu")

# -------------------------------------------------------------------------------------------- tiny models

WORDS = "cup spoon dog cat book ball red blue dining table control remote person".split()
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
DINO = """
{"d_model": 64, "encoder_layers": 1, "encoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_layers": 2,
 "decoder_ffn_dim": 32, "decoder_attention_heads": 2, "num_queries": 20, "init_std": 0.3,
 "backbone_config": {"model_type": "swin", "image_size": 64, "embed_dim": 16, "depths": [1, 1, 1, 1],
    "num_heads": [1, 1, 2, 2], "window_size": 4, "out_indices": [2, 3, 4], "initializer_range": 0.2},
 "text_config": {"model_type": "bert", "vocab_size": 1030, "hidden_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "intermediate_size": 64, "initializer_range": 0.5}}
"""
SAM = """
{"initializer_range": 0.2,
 "vision_config": {"hidden_size": 32, "output_channels": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 64, "patch_size": 8, "window_size": 4, "global_attn_indexes": [1], "num_pos_feats": 16,
    "mlp_ratio": 2.0, "initializer_range": 0.2},
 "prompt_encoder_config": {"hidden_size": 32, "image_size": 64, "patch_size": 8, "mask_input_channels": 4},
 "mask_decoder_config": {"hidden_size": 32, "mlp_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "iou_head_hidden_dim": 16}}
"""
SAM_IMAGES = """
{"size": {"longest_edge": 64}, "pad_size": {"height": 64, "width": 64},
 "mask_size": {"longest_edge": 16}, "mask_pad_size": {"height": 16, "width": 16}}
"""
SAM3 = """
{"initializer_range": 0.2,
 "vision_config": {"model_type": "sam3_vision_model", "fpn_hidden_size": 32,
    "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
    "backbone_config": {"model_type": "sam3_vit_model", "hidden_size": 32, "intermediate_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "pretrain_image_size": 28,
        "window_size": 2, "global_attn_indexes": [1], "initializer_range": 0.2}},
 "text_config": {"model_type": "clip_text_model", "vocab_size": 82, "hidden_size": 32, "projection_dim": 16,
    "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32,
    "bos_token_id": 80, "eos_token_id": 81, "pad_token_id": 81},
 "geometry_encoder_config": {"hidden_size": 32, "intermediate_size": 32, "num_layers": 1,
    "num_attention_heads": 2},
 "detr_encoder_config": {"hidden_size": 32, "intermediate_size": 32, "num_layers": 1,
    "num_attention_heads": 2},
 "detr_decoder_config": {"hidden_size": 32, "intermediate_size": 32, "num_layers": 1,
    "num_attention_heads": 2, "num_queries": 8},
 "mask_decoder_config": {"hidden_size": 32, "num_attention_heads": 2, "num_upsampling_stages": 3}}
"""


def bert_vocab():
    """Word -> id. Grounding DINO has [CLS] 101, [SEP] 102, "." 1012 and "?" 1029 written into its code."""
    fixed = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 1012: ".", 1029: "?"}
    words = iter([*WORDS, *LETTERS, *(f"##{letter}" for letter in LETTERS)])
    return {fixed.get(i) or next(words, f"[unused{i}]"): i for i in range(1030)}


def made(model_class, kind, config):
    torch.manual_seed(0)
    return model_class(AutoConfig.for_model(kind, **json.loads(config))).eval()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders dino, sam and sam3, as on the hub."""
    folder = tmp_path_factory.mktemp("grounders")
    dino = made(transformers.GroundingDinoForObjectDetection, "grounding-dino", DINO)
    with torch.no_grad():  # a fresh box head is zero (boxes = the anchor grid); a fresh norm makes scores of 0 or 1
        dino.bbox_embed[0].layers[-1].weight.normal_(0, 0.1)
        dino.model.decoder.layer_norm.weight.fill_(0.2)
    dino.tie_weights()  # all layers share the first box head
    images = GroundingDinoImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 128})
    reader = transformers.GroundingDinoProcessor(images, BertTokenizer(vocab=bert_vocab(), model_max_length=512))
    cutter = transformers.SamProcessor(SamImageProcessorPil(**json.loads(SAM_IMAGES)))
    letters = [*LETTERS, ".", ",", "-", "'"]
    tokens = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=32)
    sam, sam3 = made(transformers.SamModel, "sam", SAM), made(transformers.Sam3Model, "sam3", SAM3)
    for name, parts in (("dino", (dino, reader)), ("sam", (sam, cutter)), ("sam3", (sam3, tokenizer))):
        for part in parts:
            part.save_pretrained(folder / name)
    return folder


def picture(n):
    """A photograph of its own for each n, landscape, portrait or square."""
    rng, size = np.random.default_rng(n), [(40, 70, 3), (90, 50, 3), (64, 64, 3)][n % 3]
    return Image.fromarray(rng.integers(0, 255, size, dtype=np.uint8))


# A pixel, and as thin a strip as data.load_image accepts: the processors round its short side to some pixels.
IMAGES = [picture(0), picture(1), Image.new("RGB", (1, 1), "red"), picture(2).resize((160, 10)), picture(2)]
NAMED = [["cup", "spoon"], ["dog"], ["cat"], ["red", "book"], []]


def check_regions(answers, threshold):
    assert all(regions for regions, _ in answers[:4]) and answers[4][0] == []
    for (regions, _), image, words in zip(answers, IMAGES, NAMED, strict=True):
        assert {region["word"] for region in regions} <= set(words)
        assert all(threshold < region["score"] <= 1 for region in regions)
        for x0, y0, x1, y1 in (region["box"] for region in regions):
            assert 0 <= x0 <= x1 <= image.width and 0 <= y0 <= y1 <= image.height


# ------------------------------------------------------------------------------------- what the models find


@dino_works
def test_boxes_of_grounding_dino_lie_in_the_image_and_carry_the_asked_words(models):
    assert max(IMAGES[3].size) == data.MAX_ASPECT * min(IMAGES[3].size)
    find = grounding.load(str(models / "dino"), "", CPU)
    answers = find(IMAGES, NAMED, 0.3)
    check_regions(answers, 0.3)
    assert [mask for _, mask in answers] == [None] * 5
    for regions, _ in answers:
        scores = [region["score"] for region in regions]
        assert scores == sorted(scores, reverse=True)
    assert find(IMAGES[:1], NAMED[:1], 0.99) == [([], None)] and find(IMAGES[4:], [[]], 0.0) == [([], None)]


@dino_works
def test_a_word_has_the_score_of_its_own_tokens(models):
    """Against transformers' own outputs, read plainly for one image; each word has two tokens."""
    model = transformers.GroundingDinoForObjectDetection.from_pretrained(models / "dino").eval()
    processor = transformers.AutoProcessor.from_pretrained(models / "dino")
    inputs = processor(images=IMAGES[0], text="remote control. dining table. ", return_tensors="pt")
    tokens = processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    assert tokens == ["[CLS]", "remote", "control", ".", "dining", "table", ".", "[SEP]"]
    with torch.no_grad():
        out = model(**inputs)
    expected = []
    for query in range(20):
        p = out.logits[0, query].sigmoid().tolist()
        scores = {"Remote control?": max(p[1], p[2]), "dining table": max(p[4], p[5])}
        word = max(scores, key=scores.get)
        x, y, w, h = (out.pred_boxes[0, query] * torch.tensor([70, 40, 70, 40])).tolist()
        box = np.clip([x - w / 2, y - h / 2, x + w / 2, y + h / 2], 0, [70, 40, 70, 40])
        expected.append((word, scores[word], pytest.approx(box, abs=0.06)))
    find = grounding.load(str(models / "dino"), "", CPU)
    ((regions, _),) = find(IMAGES[:1], [["Remote control?", "dining table"]], 0.3)
    expected = [region for region in sorted(expected, key=lambda region: -region[1]) if region[1] > 0.3]
    assert {word for word, *_ in expected} == {"Remote control?", "dining table"}
    assert [(region["word"], region["box"]) for region in regions] == [(word, box) for word, _, box in expected]
    assert [region["score"] for region in regions] == pytest.approx([p for _, p, _ in expected], abs=6e-4)


def test_what_grounding_dino_is_asked():
    """One text of all words; the marks that end a phrase are taken out of them."""
    words = ["cup", "dining table", "St. Bernard", "who?", " two  words "]
    assert grounding.asked_text(words) == "cup. dining table. st bernard. who. two words. "


@dino_works
def test_more_words_than_grounding_dino_reads_are_refused(models):
    find = grounding.load(str(models / "dino"), "", CPU)
    assert len(find(IMAGES[:1], [["cup"] * 127], 0.3)) == 1  # 127 words, as many dots, [CLS] and [SEP]
    with pytest.raises(Mistake, match=r"cup\. cup.* over 256 tokens\. Lower --top"):
        find(IMAGES[:1], [["cup"] * 128], 0.3)


@dino_works
def test_masks_of_sam_have_the_image_size_and_are_its_own(models):
    find = grounding.load(str(models / "dino"), str(models / "sam"), CPU)
    answers = find(IMAGES, NAMED, 0.3)
    check_regions(answers, 0.3)
    for (regions, masks), image in zip(answers, IMAGES, strict=True):
        assert masks.shape == (len(regions), image.height, image.width) and masks.dtype == bool
    assert 0 < answers[0][1].mean() < 1
    # Against a plain forward pass with one box at a time.
    sam = transformers.SamModel.from_pretrained(models / "sam").eval()
    processor = transformers.AutoProcessor.from_pretrained(models / "sam")
    for image, (regions, masks) in zip(IMAGES[:2], answers, strict=False):
        for region, mask in zip(regions[:3], masks, strict=False):
            inputs = processor(images=image, input_boxes=[[region["box"]]], return_tensors="pt")
            sizes = inputs["original_sizes"], inputs["reshaped_input_sizes"]
            with torch.no_grad():
                boxes = inputs["input_boxes"].float()
                low = sam(pixel_values=inputs["pixel_values"], input_boxes=boxes, multimask_output=False).pred_masks
            assert np.array_equal(processor.post_process_masks(low, *sizes)[0][0, 0].numpy(), mask)


def test_sam_3_finds_masks_of_words(models):
    answers = grounding.load(str(models / "sam3"), "", CPU)(IMAGES, NAMED, 0.1)
    check_regions(answers, 0.1)
    for (regions, masks), image in zip(answers, IMAGES, strict=True):
        assert masks.shape == (len(regions), image.height, image.width) and masks.dtype == bool


def test_sam_3_against_a_plain_forward_pass(models):
    """Word by word, each with an image of its own: ours shares the image's features between the words."""
    sam3 = transformers.Sam3Model.from_pretrained(models / "sam3").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(models / "sam3")
    answers = grounding.text_to_masks(sam3, tokenizer, IMAGES[:2], [["cup", "spoon"], ["dog"]], 0.0)
    for image, words, (regions, masks) in zip(IMAGES, (["cup", "spoon"], ["dog"]), answers, strict=False):
        pixels = np.asarray(image.resize((56, 56), Image.Resampling.BILINEAR)) / 127.5 - 1
        pixels = torch.tensor(pixels, dtype=torch.float32).permute(2, 0, 1)[None]
        for word in words:
            text = tokenizer([word], padding="max_length", max_length=32, return_tensors="pt")
            with torch.no_grad():
                out = sam3(pixel_values=pixels, input_ids=text.input_ids, attention_mask=text.attention_mask)
            sure = out.pred_logits[0].sigmoid() * out.presence_logits[0].sigmoid()
            own = [k for k, region in enumerate(regions) if region["word"] == word]
            assert [regions[k]["score"] for k in own] == pytest.approx(sure.tolist(), abs=2e-3)
            size = image.size[::-1]
            large = torch.nn.functional.interpolate(out.pred_masks.sigmoid(), size, mode="bilinear")[0] > 0.5
            assert (masks[own] == large.numpy()).mean() > 0.99
            boxes = out.pred_boxes[0] * torch.tensor(image.size * 2)
            boxes = boxes.clamp(min=0).minimum(torch.tensor(image.size * 2))
            assert np.allclose([regions[k]["box"] for k in own], boxes, atol=0.06)


# --------------------------------------------------------------------------------------------- in a build

GOOD = {"id": "a", "image": "0.png", "question": "Describe the picture.", "chosen": "I see a red cup."}
GOOD["rejected"] = "I see a blue spoon."


def build(world, folder, *flags):
    source, out = folder / "own.jsonl", folder / "x.jsonl"
    return "mfpo", "--source", source, "--model", world / "base", "--out", out, *flags


def test_a_build_uses_the_grounder_where_records_have_no_boxes(world, models, tmp_path, monkeypatch, capsys):
    chosen = ("The picture shows a red cup.", "I can see a blue book.", "There is a black lock in the picture.")
    lines = [{**GOOD, "id": str(n), "image": f"{n}.png", "chosen": text} for n, text in enumerate(chosen)]
    lines[2]["objects"] = [{"word": "lock", "box": [0, 0, 64, 32]}]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for n in range(3):
        picture(n).save(tmp_path / f"{n}.png")
    flags = "--grounder", models / "dino", "--segmenter", models / "sam"
    args = build(world, tmp_path, *(flags if NEW else ("--grounder", models / "sam3")))
    assert run_here(monkeypatch, build_data, *args, "--threshold", 0.1) == 0
    records = data.read_records(tmp_path / "x.jsonl", data.MFPO_FIELDS)
    assert [record["region_kind"] for record in records] == ["key"] * 3
    assert all("score" in region for record in records[:2] for region in record["regions"])
    assert records[2]["regions"] == [{"word": "lock", "box": [0, 0, 64, 32]}]
    first = (tmp_path / records[2]["image_rejected"]).read_bytes()
    # At a threshold that nothing reaches, the noise is global where there are no boxes, and that is said.
    capsys.readouterr()
    assert run_here(monkeypatch, build_data, *args, "--threshold", 0.9999) == 0
    said = capsys.readouterr().out
    assert re.search(r"global\W*2\b", said)
    records = data.read_records(tmp_path / "x.jsonl", data.MFPO_FIELDS)
    assert [record["region_kind"] for record in records] == ["global", "global", "key"]
    assert (tmp_path / records[2]["image_rejected"]).read_bytes() == first


@pytest.mark.parametrize(
    ("grounder", "segmenter", "message"),
    [
        ("nowhere", "", r"--grounder .*nowhere: cannot be loaded \(.*\)\. Name its folder"),
        ("pickled", "", r"--grounder .*pickled: cannot be loaded"),
        ("sam", "", "is a 'sam'; use a Grounding DINO or a SAM 3"),
        ("sam3", "sam", "SAM 3 makes masks itself"),
        pytest.param("dino", "dino", "is a 'grounding-dino'; use a SAM", marks=dino_works),
        pytest.param("dino", "nowhere", "--segmenter .*nowhere: cannot be loaded", marks=dino_works),
    ],
)
def test_grounders_that_cannot_be_used(models, grounder, segmenter, message):
    pickled = models / "pickled"  # is never opened: a pickle could run code
    pickled.mkdir(exist_ok=True)
    (pickled / "config.json").write_bytes((models / "dino" / "config.json").read_bytes())
    (pickled / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(Mistake, match=message) as refusal:
        grounding.load(str(models / grounder), segmenter and str(models / segmenter), CPU)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) <= 300


def test_transformers_that_run_grounding_dino_wrongly(models, monkeypatch):
    monkeypatch.setattr(grounding.transformers, "__version__", "5.22.1")
    with pytest.raises(Mistake, match=r"5\.22\.1 runs Grounding DINO wrongly: pip install -U"):
        grounding.load(str(models / "dino"), "", CPU)
    assert grounding.load(str(models / "sam3"), "", CPU)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--grounder", "nowhere/model"], "--grounder nowhere/model: cannot be loaded"),
        (["--segmenter", "nowhere/model"], "--segmenter"),
        (["--grounder", "nowhere/model", "--threshold", 2], "threshold"),
    ],
)
def test_flags_of_a_build(world, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "own.jsonl").write_text(json.dumps(GOOD))
    picture(0).save(tmp_path / "0.png")
    assert message in refused(monkeypatch, capsys, build_data, *build(world, tmp_path, *flags))
    assert {path.name for path in tmp_path.iterdir()} == {"own.jsonl", "0.png"}
