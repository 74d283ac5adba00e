"""
Words -> regions of an image, for images whose records have no boxes (MFPO, "regions").

    Grounding DINO (arXiv:2303.05499)   text to boxes; with SAM (arXiv:2304.02643) the boxes become masks
    SAM 3 (arXiv:2511.16719)            text to masks in one model

The models are transformers' own, by hub id or folder: IDEA-Research/grounding-dino-base with facebook/sam-vit-huge, or
facebook/sam3. Only safetensors are read. They run in float32 on the given device.

DEVIATION: MFPO names SAM alone, which takes no words.
"""

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from transformers import AutoConfig, AutoModelForZeroShotObjectDetection, AutoProcessor, AutoTokenizer, SamModel

RATIO = 16  # the longer side over the shorter one at most: the processors fail on a side that rounds to 0 pixels


def load(grounder, segmenter, device):
    """
    find(images, words, threshold) for PIL images (RGB) and, of each, its words. It returns for each image

        regions   [{"word", "box": [x0, y0, x1, y1] in pixels, "score"}], one for each thing found
        mask      (n, H, W) bool, n masks that together cover the regions; None: the boxes are all that is known

    ValueError if a model cannot be loaded.
    """
    kind = config_of("--grounder", grounder).model_type
    if kind in ("sam3", "sam3_video"):
        if segmenter:
            raise ValueError(f"--segmenter {segmenter}: SAM 3 makes masks itself. Leave it out")
        from transformers import Sam3Model

        sam3 = pretrained("--grounder", grounder, Sam3Model, device)
        tokenizer = pretrained("--grounder", grounder, AutoTokenizer)
        return lambda images, words, threshold: text_to_masks(sam3, tokenizer, images, words, threshold)
    if kind not in ("grounding-dino", "mm-grounding-dino"):
        raise ValueError(f"--grounder {grounder}: is a {kind!r}; use a Grounding DINO or a SAM 3")
    if [int(n) for n in transformers.__version__.split(".")[:2]] < [5, 23]:
        # Measured: 5.17 gives the dots of the text position 0 and cuts its position embeddings to -1, 0 and 1.
        raise ValueError(
            f"transformers {transformers.__version__} runs Grounding DINO wrongly: pip install -U transformers"
        )
    dino = pretrained("--grounder", grounder, AutoModelForZeroShotObjectDetection, device)
    reader = pretrained("--grounder", grounder, AutoProcessor)
    if segmenter:
        if (kind := config_of("--segmenter", segmenter).model_type) != "sam":
            raise ValueError(f"--segmenter {segmenter}: is a {kind!r}; use a SAM, or a SAM 3 as --grounder alone")
        sam, cutter = (pretrained("--segmenter", segmenter, *how) for how in ((SamModel, device), (AutoProcessor,)))

    def find(images, words, threshold):
        regions = text_to_boxes(dino, reader, images, words, threshold)
        masks = [None] * len(images)
        if segmenter:
            masks = boxes_to_masks(sam, cutter, images, [[region["box"] for region in found] for found in regions])
        return list(zip(regions, masks, strict=True))

    return find


def config_of(flag, path):
    return pretrained(flag, path, AutoConfig)


def pretrained(flag, path, auto, device=None):
    """auto.from_pretrained(path), a model on `device`; ValueError naming the flag if it cannot be had."""
    try:
        if device is None:
            return auto.from_pretrained(path)
        return auto.from_pretrained(path, use_safetensors=True, dtype=torch.float32).eval().to(device)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{flag} {path}: cannot be loaded ({reason}). Name a model's folder or hub id") from None


def squarer(image):
    """A very thin strip with black below or at its right; its pixels keep their places."""
    side = -(-max(image.size) // RATIO)
    if min(image.size) >= side:
        return image
    wide = Image.new("RGB", (max(image.width, side), max(image.height, side)))
    wide.paste(image)
    return wide


def phrases(tokenizer, words, limit):
    """
    Words -> what Grounding DINO is asked, "cup. dining table. ", in texts of at most `limit` tokens:
    [(text, the words in it)].
    """
    texts, room = [], 0
    for word in words:
        phrase = " ".join(word.lower().replace(".", " ").replace("?", " ").split())  # both end a phrase
        size = len(tokenizer(phrase, add_special_tokens=False)["input_ids"]) + 1  # and the dot
        if not texts or size > room:
            texts.append(["", []])
            room = limit - 2  # begin and end
        texts[-1][0] += phrase + ". "
        texts[-1][1].append(word)
        room -= size
    return texts


@torch.inference_mode()
def text_to_boxes(dino, processor, images, words, threshold):
    """
    Boxes of words by Grounding DINO; every box that is found is given to the word that fits it best.

    A word's score is the largest probability of its tokens. transformers' own reading of the labels joins words and
    marks of neighbours ("cup. [SEP]"), so the scores are read here.
    """
    tokenizer, device, found = processor.tokenizer, dino.device, [[] for _ in images]
    limit = dino.config.max_text_len
    jobs = [(i, *text) for i, named in enumerate(words) for text in phrases(tokenizer, named, limit)]
    if not jobs:
        return found
    inputs = processor(
        images=[squarer(images[i]) for i, _, _ in jobs],
        text=[text for _, text, _ in jobs],
        padding=True,
        truncation=True,
        max_length=limit,
        return_tensors="pt",
    ).to(device)
    out = dino(**inputs)
    ids = inputs["input_ids"]  # (J, L)
    dot = ids == tokenizer.convert_tokens_to_ids(".")
    marks = torch.tensor(sorted(set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}), device=device)
    phrase = dot.cumsum(1).masked_fill(dot | torch.isin(ids, marks), -1)  # the number of each token's word
    probability = out.logits[..., : ids.shape[1]].float().sigmoid()  # (J, Q queries, L)
    centre, size = out.pred_boxes.float().split(2, -1)  # of the image without its batch's padding, in 0..1
    boxes = torch.cat([centre - size / 2, centre + size / 2], -1)  # (J, Q, 4)
    for j, (i, _, named) in enumerate(jobs):
        scores = torch.stack([(probability[j] * (phrase[j] == n)).amax(-1) for n in range(len(named))], -1)  # (Q, W)
        best, which = scores.max(-1)
        box = boxes[j] * torch.tensor(squarer(images[i]).size * 2, device=device)
        box = box.clamp(min=0).minimum(torch.tensor(images[i].size * 2, device=device))
        kept = (best > threshold) & (box[:, 2:] > box[:, :2]).all(-1)
        for q in kept.nonzero()[:, 0].tolist():
            corners = [round(v, 1) for v in box[q].tolist()]
            found[i].append({"word": named[which[q]], "box": corners, "score": round(best[q].item(), 3)})
    return [sorted(regions, key=lambda region: -region["score"]) for regions in found]


@torch.inference_mode()
def boxes_to_masks(sam, processor, images, boxes):
    """SAM's masks of boxes: of each image (n, H, W) bool, n its boxes."""
    masks = [np.zeros((0, image.height, image.width), bool) for image in images]
    some = [i for i, found in enumerate(boxes) if found]
    if not some:
        return masks
    most = max(len(boxes[i]) for i in some)
    # One array of all boxes; each is a prompt of its own, so those that fill it up change nothing.
    filled = [[list(map(float, box)) for box in boxes[i]] + [[0.0] * 4] * (most - len(boxes[i])) for i in some]
    inputs = processor(images=[squarer(images[i]) for i in some], input_boxes=filled, return_tensors="pt")
    put = {"device": sam.device, "dtype": torch.float32}
    low = sam(
        pixel_values=inputs["pixel_values"].to(**put),
        input_boxes=inputs["input_boxes"].to(**put),
        multimask_output=False,
    ).pred_masks.cpu()  # (images, boxes, 1, h, w)
    for j, i in enumerate(some):  # one image after the other: at full size masks are large
        sizes = (inputs[name][j : j + 1] for name in ("original_sizes", "reshaped_input_sizes"))
        (full,) = processor.post_process_masks([low[j, : len(boxes[i])]], *sizes)
        masks[i] = full[:, 0, : images[i].height, : images[i].width].numpy()
    return masks


@torch.inference_mode()
def text_to_masks(sam3, tokenizer, images, words, threshold):
    """
    SAM 3's regions and masks of words: [(regions, masks)], as `load` has it.

    Its processor needs torchvision; what it does to an image is done here: squashed to a square, scaled to [-1, 1].
    """
    side, device, result = sam3.config.image_size, sam3.device, []
    squares = [np.asarray(image.resize((side, side), Image.Resampling.BILINEAR)) for image in images]
    pixels = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).to(device).float() / 127.5 - 1
    vision = sam3.get_vision_features(pixels)
    for i, (image, named) in enumerate(zip(images, words, strict=True)):
        regions, masks = [], [np.zeros((0, image.height, image.width), bool)]
        if named:
            text = tokenizer(named, padding="max_length", truncation=True, max_length=32, return_tensors="pt").to(
                device
            )
            parts = ("fpn_hidden_states", "fpn_position_encoding")
            copies = {
                part: tuple(level[i : i + 1].expand(len(named), *level.shape[1:]) for level in vision[part])
                for part in parts
            }
            out = sam3(
                vision_embeds=type(vision)(**copies), input_ids=text.input_ids, attention_mask=text.attention_mask
            )
            scores = out.pred_logits.sigmoid() * out.presence_logits.sigmoid()  # (W, Q)
            size = torch.tensor(image.size * 2, device=device)
            for n, q in (scores > threshold).nonzero().tolist():
                box = (out.pred_boxes[n, q] * size).clamp(min=0).minimum(size)
                score = round(scores[n, q].item(), 3)
                regions.append({"word": named[n], "box": [round(v, 1) for v in box.tolist()], "score": score})
                mask = F.interpolate(
                    out.pred_masks[n, q][None, None].sigmoid(), (image.height, image.width), mode="bilinear"
                )
                masks.append((mask[0] > 0.5).cpu().numpy())
        result.append((regions, np.concatenate(masks)))
    return result
