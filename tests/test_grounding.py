"""Words to regions with the real classes of transformers and tiny random weights: the code path, not the quality."""

import json
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from conftest import refused, run_here
from PIL import Image
from test_sources import ANSWERS, GOOD, picture, write

import build_data
import data
import grounding

NEW = [int(n) for n in transformers.__version__.split(".")[:2]] >= [5, 23]
dino_works = pytest.mark.skipif(not NEW, reason="transformers before 5.23 runs Grounding DINO wrongly")

WORDS = """a an the of on with cup spoon dog cat man woman table chair car tree book ball red blue green white black
big small dining remote control person""".split()
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


def bert_vocab():
    """Word -> id.  Grounding DINO has [CLS] 101, [SEP] 102, "." 1012 and "?" 1029 written into its code."""
    fixed = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 1010: ",", 1012: ".", 1029: "?"}
    words = iter(WORDS + [c for c in LETTERS if c not in WORDS] + ["##" + c for c in LETTERS] + ["-", "'", "##s"])
    seen, tokens = set(), []
    for i in range(1030):
        token = fixed.get(i) or next((w for w in words if w not in seen), None) or f"[unused{i}]"
        seen.add(token)
        tokens.append(token)
    return {token: i for i, token in enumerate(tokens)}


def make_grounding_dino(folder, seed=0):
    from transformers import (
        BertConfig,
        BertTokenizer,
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        GroundingDinoProcessor,
        SwinConfig,
    )
    from transformers.models.grounding_dino.image_processing_pil_grounding_dino import GroundingDinoImageProcessorPil

    vocab = bert_vocab()
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(
            image_size=64,
            embed_dim=16,
            depths=[1, 1, 1, 1],
            num_heads=[1, 1, 2, 2],
            window_size=4,
            out_indices=[2, 3, 4],
            initializer_range=0.2,
        ),
        text_config=BertConfig(
            vocab_size=len(vocab),
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
            initializer_range=0.5,
        ),
        d_model=64,
        encoder_layers=1,
        encoder_ffn_dim=32,
        encoder_attention_heads=2,
        decoder_layers=2,
        decoder_ffn_dim=32,
        decoder_attention_heads=2,
        num_queries=20,
        init_std=0.3,
    )
    torch.manual_seed(seed)
    model = GroundingDinoForObjectDetection(config).eval()
    with torch.no_grad():  # a fresh box head is zero (boxes = the anchor grid); a fresh norm makes scores of 0 or 1
        model.bbox_embed[0].layers[-1].weight.normal_(0, 0.1)
        model.model.decoder.layer_norm.weight.fill_(0.2)
    model.tie_weights()  # all layers share the first box head
    processor = GroundingDinoProcessor(
        GroundingDinoImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 128}),
        BertTokenizer(vocab=vocab, model_max_length=512),
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def make_sam(folder, seed=0, side=64):
    from transformers import (
        SamConfig,
        SamMaskDecoderConfig,
        SamModel,
        SamProcessor,
        SamPromptEncoderConfig,
        SamVisionConfig,
    )
    from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

    config = SamConfig(
        vision_config=SamVisionConfig(
            hidden_size=32,
            output_channels=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=side,
            patch_size=8,
            window_size=4,
            global_attn_indexes=[1],
            num_pos_feats=16,
            mlp_ratio=2.0,
            initializer_range=0.2,
        ),
        prompt_encoder_config=SamPromptEncoderConfig(
            hidden_size=32, image_size=side, patch_size=8, mask_input_channels=4
        ),
        mask_decoder_config=SamMaskDecoderConfig(
            hidden_size=32, mlp_dim=32, num_hidden_layers=1, num_attention_heads=2, iou_head_hidden_dim=16
        ),
        initializer_range=0.2,
    )
    torch.manual_seed(seed)
    model = SamModel(config).eval()
    processor = SamProcessor(
        SamImageProcessorPil(
            size={"longest_edge": side},
            pad_size={"height": side, "width": side},
            mask_size={"longest_edge": side // 4},
            mask_pad_size={"height": side // 4, "width": side // 4},
        )
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def make_sam3(folder, seed=0, side=56):
    """Sam3Model + a CLIP tokenizer.  Its image processor needs torchvision, so its settings are written by hand."""
    from transformers import CLIPTextConfig, CLIPTokenizer, Sam3Config, Sam3Model
    from transformers.models.sam3 import configuration_sam3 as c

    letters = [*LETTERS, ".", ",", "-", "'"]
    tokens = letters + [c + "</w>" for c in letters] + ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=32)
    cells = side // 14
    small = {"hidden_size": 32, "num_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = Sam3Config(
        vision_config=c.Sam3VisionConfig(
            backbone_config=c.Sam3ViTConfig(
                hidden_size=32,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=side,
                pretrain_image_size=side // 2,
                window_size=2,
                global_attn_indexes=[1],
                initializer_range=0.2,
            ),
            fpn_hidden_size=32,
            backbone_feature_sizes=[[cells * s, cells * s] for s in (4, 2, 1)],
        ),
        text_config=CLIPTextConfig(
            vocab_size=len(tokens),
            hidden_size=32,
            intermediate_size=32,
            projection_dim=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=32,
            bos_token_id=len(tokens) - 2,
            eos_token_id=len(tokens) - 1,
            pad_token_id=len(tokens) - 1,
        ).to_dict(),
        geometry_encoder_config=c.Sam3GeometryEncoderConfig(**small),
        detr_encoder_config=c.Sam3DETREncoderConfig(**small),
        detr_decoder_config=c.Sam3DETRDecoderConfig(**small, num_queries=8),
        mask_decoder_config=c.Sam3MaskDecoderConfig(hidden_size=32, num_attention_heads=2, num_upsampling_stages=3),
        initializer_range=0.2,
    )
    torch.manual_seed(seed)
    model = Sam3Model(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    image = {
        "image_processor_type": "Sam3ImageProcessor",
        "size": {"height": side, "width": side},
        "mask_size": {"height": cells * 4, "width": cells * 4},
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "do_convert_rgb": True,
        "resample": 2,
    }
    Path(folder, "processor_config.json").write_text(
        json.dumps(
            {"processor_class": "Sam3Processor", "image_processor": image, "target_size": side, "point_pad_value": -10},
            indent=2,
        )
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grounders")
    for name, make in (("dino", make_grounding_dino), ("sam", make_sam), ("sam3", make_sam3)):
        make(folder / name)
    return folder


IMAGES = [picture(0), picture(1), Image.new("RGB", (1, 1), "red"), Image.new("RGB", (400, 10), "blue")]
NAMED = [["cup", "spoon"], ["dog"], ["cat"], []]
CPU = torch.device("cpu")


@dino_works
def test_boxes_of_grounding_dino_lie_in_the_image_and_carry_the_asked_words(models):
    find = grounding.load(str(models / "dino"), "", CPU)
    found = find(IMAGES, NAMED, 0.3)
    assert [mask for _, mask in found] == [None] * 4 and found[3][0] == []
    for (regions, _), image, words in zip(found[:3], IMAGES, NAMED, strict=False):
        assert regions and {region["word"] for region in regions} <= set(words)
        assert all(0.3 < region["score"] <= 1 for region in regions)
        for x0, y0, x1, y1 in (region["box"] for region in regions):
            assert 0 <= x0 <= x1 <= image.width and 0 <= y0 <= y1 <= image.height
    assert find(IMAGES[:1], NAMED[:1], 0.99)[0][0] == []


@dino_works
def test_a_word_has_the_score_of_its_own_tokens(models):
    """Against transformers' own outputs, read plainly for one image and two words of one token each."""
    model = transformers.GroundingDinoForObjectDetection.from_pretrained(models / "dino").eval()
    processor = transformers.AutoProcessor.from_pretrained(models / "dino")
    inputs = processor(images=IMAGES[0], text="cup. spoon. ", return_tensors="pt")
    with torch.no_grad():
        out = model(**inputs)
    assert inputs["input_ids"].shape == (1, 6)  # [CLS] cup . spoon . [SEP]
    scores = out.logits[0, :, [1, 3]].sigmoid()  # (queries, words)
    best = {(("cup", "spoon")[row.argmax()], round(row.max().item(), 3)) for row in scores if row.max() > 0.3}
    find = grounding.load(str(models / "dino"), "", CPU)
    assert {(r["word"], r["score"]) for r in find(IMAGES[:1], NAMED[:1], 0.3)[0][0]} <= best
    top = max(find(IMAGES[:1], NAMED[:1], 0.3)[0][0], key=lambda r: r["score"])
    q = scores.max(1).values.argmax()
    x, y, w, h = (out.pred_boxes[0, q] * torch.tensor([70, 40, 70, 40])).tolist()
    assert np.allclose(
        top["box"], np.clip([x - w / 2, y - h / 2, x + w / 2, y + h / 2], 0, [70, 40, 70, 40]), atol=0.06
    )


@dino_works
def test_masks_of_sam_have_the_image_size_and_do_not_depend_on_their_neighbours(models):
    find = grounding.load(str(models / "dino"), str(models / "sam"), CPU)
    found = find(IMAGES, NAMED, 0.3)
    for (regions, masks), image in zip(found, IMAGES, strict=True):
        assert masks.shape == (len(regions), image.height, image.width) and masks.dtype == bool
    assert 0 < found[0][1].mean() < 1
    sam = transformers.SamModel.from_pretrained(models / "sam").eval()
    processor = transformers.AutoProcessor.from_pretrained(models / "sam")
    boxes = [[[5, 5, 30, 30]], [[0, 0, 20, 60], [10, 10, 40, 80]]]
    together = grounding.boxes_to_masks(sam, processor, IMAGES[:2], boxes)
    alone = [grounding.boxes_to_masks(sam, processor, [i], [b])[0] for i, b in zip(IMAGES[:2], boxes, strict=True)]
    assert all(np.array_equal(a, b) for a, b in zip(together, alone, strict=True))


def test_sam_3_finds_masks_of_words(models):
    found = grounding.load(str(models / "sam3"), "", CPU)(IMAGES, NAMED, 0.2)
    assert any(regions for regions, _ in found) and found[3][0] == []
    for (regions, masks), image, words in zip(found, IMAGES, NAMED, strict=True):
        assert masks.shape == (len(regions), image.height, image.width)
        assert {region["word"] for region in regions} <= set(words)


def test_a_thin_strip_is_filled_up_and_keeps_its_pixels():
    strip = Image.new("RGB", (400, 10), "blue")
    wide = grounding.squarer(strip)
    assert wide.size == (400, 25) and wide.crop((0, 0, 400, 10)).tobytes() == strip.tobytes()


def test_many_words_are_asked_in_several_texts(models):
    tokenizer = transformers.AutoTokenizer.from_pretrained(models / "dino")
    words = ["cup", "dining table", "spoon."] * 20
    texts = grounding.phrases(tokenizer, words, 32)
    assert [word for _, named in texts for word in named] == words and len(texts) > 3
    assert all(len(tokenizer(text)["input_ids"]) <= 32 and text.count(".") == len(named) for text, named in texts)


@pytest.mark.parametrize("how", [pytest.param("dino + sam", marks=dino_works), "sam3"])
def test_a_build_uses_the_grounder_where_records_have_no_boxes(world, models, tmp_path, monkeypatch, capsys, how):
    for n in range(3):
        picture(n).save(tmp_path / f"{n}.png")
    lines = [
        {**GOOD, "id": str(n), "image": f"{n}.png", "chosen": chosen, "rejected": rejected}
        for n, (chosen, rejected) in enumerate(ANSWERS)
    ]
    lines[2]["objects"] = [{"word": "lock", "box": [0, 0, 64, 32]}]
    source = write(tmp_path / "x.jsonl", lines)
    flags = {"dino + sam": ["--grounder", models / "dino", "--segmenter", models / "sam"]}
    flags = flags.get(how, ["--grounder", models / "sam3"])
    args = ["mfpo", "--source", source, "--model", world / "base", "--out", tmp_path / "out.jsonl", "--threshold", 0.1]
    assert run_here(monkeypatch, build_data, *args, *flags, "--sheet", tmp_path / "sheet.png") == 0
    records = data.read_records(tmp_path / "out.jsonl", data.MFPO_FIELDS)
    found = [record["regions"] for record in records]
    assert [r["region_kind"] for r in records] == ["key"] * 3 and all("score" in r for r in found[0] + found[1])
    assert found[2] == [{"word": "lock", "box": [0, 0, 64, 32]}]
    assert Image.open(tmp_path / "sheet.png").height > 3 * 192
    first = [(tmp_path / r["image_rejected"]).read_bytes() for r in records]
    # At a threshold that nothing reaches, the noise is global where there are no boxes, and that is told.
    capsys.readouterr()
    assert run_here(monkeypatch, build_data, *args, *flags, "--threshold", 0.9999) == 0
    told = capsys.readouterr().out
    assert "region: global 2" in told and "note: 2 records have global noise" in told
    records = data.read_records(tmp_path / "out.jsonl", data.MFPO_FIELDS)
    assert [r["region_kind"] for r in records] == ["global", "global", "key"]
    assert [(tmp_path / r["image_rejected"]).read_bytes() == f for r, f in zip(records, first, strict=True)][2]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--grounder", "nowhere/model"], "--grounder nowhere/model: cannot be loaded"),
        (["--grounder", "SAM"], "is a 'sam'; use a Grounding DINO or a SAM 3"),
        (["--segmenter", "SAM"], "name a Grounding DINO with --grounder too"),
        (["--grounder", "SAM3", "--segmenter", "SAM"], "SAM 3 makes masks itself"),
        pytest.param(
            ["--grounder", "DINO", "--segmenter", "DINO"], "is a 'grounding-dino'; use a SAM", marks=dino_works
        ),
        (["--grounder", "SAM3", "--threshold", "2"], "--threshold in [0, 1)"),
    ],
)
def test_grounders_that_cannot_be_used(world, models, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    picture(0).save(tmp_path / "0.png")
    source = write(tmp_path / "x.jsonl", [GOOD])
    flags = [{"SAM": models / "sam", "SAM3": models / "sam3", "DINO": models / "dino"}.get(f, f) for f in flags]
    args = ["mfpo", "--source", source, "--model", world / "base", "--out", tmp_path / "out.jsonl", *flags]
    assert message in refused(monkeypatch, capsys, build_data, *args)
    assert not list(tmp_path.glob("out*"))


def test_sam_3_against_a_plain_forward_pass(models):
    sam3 = transformers.Sam3Model.from_pretrained(models / "sam3").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(models / "sam3")
    found = grounding.text_to_masks(sam3, tokenizer, IMAGES[:2], [["cup"], ["dog"]], 0.0)
    for image, word, (regions, masks) in zip(IMAGES[:2], ("cup", "dog"), found, strict=True):
        pixels = (
            torch.from_numpy(np.asarray(image.resize((56, 56), Image.Resampling.BILINEAR)) / 127.5 - 1)
            .float()
            .permute(2, 0, 1)[None]
        )
        text = tokenizer([word], padding="max_length", max_length=32, return_tensors="pt")
        with torch.no_grad():
            out = sam3(pixel_values=pixels, input_ids=text.input_ids, attention_mask=text.attention_mask)
        sure = out.pred_logits[0].sigmoid() * out.presence_logits[0].sigmoid()
        assert [r["score"] for r in regions] == pytest.approx(sure.tolist(), abs=2e-3)
        large = torch.nn.functional.interpolate(out.pred_masks.sigmoid(), masks.shape[1:], mode="bilinear")[0] > 0.5
        assert (masks == large.numpy()).mean() > 0.99


def test_boxes_in_a_filled_up_strip_are_cut_at_its_border(models):
    find = grounding.load(str(models / "dino"), "", CPU)
    strip = picture(0).resize((400, 10))
    ((found, _),) = find([strip], [["cat"]], 0.1)
    ((whole, _),) = find([grounding.squarer(strip)], [["cat"]], 0.1)
    assert found and [r["box"] for r in found] == [
        [*r["box"][:3], min(10, r["box"][3])] for r in whole if r["box"][1] < 10
    ]
    assert [r["score"] for r in whole] == sorted((r["score"] for r in whole), reverse=True)
