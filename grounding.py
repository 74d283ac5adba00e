"""
Words -> regions of an image, for images whose records have no boxes (MFPO, "regions").

    Grounding DINO (arXiv:2303.05499)   text to boxes; with SAM (arXiv:2304.02643) the boxes become masks
    SAM 3 (arXiv:2511.16719)            text to masks in one model

The models are transformers' own, by hub id or folder: IDEA-Research/grounding-dino-base with
facebook/sam-vit-huge, or facebook/sam3. Only safetensors are read. They run in float32 on the given device.

DEVIATION: MFPO names SAM alone, which takes no words.
"""

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, Sam3Model, SamModel
from transformers import AutoModelForZeroShotObjectDetection as AutoGroundingDino

from runtime import Mistake


def load(grounder, segmenter, device):
    """find(images, words, threshold) for PIL images (RGB, at most 16:1) and the words of each. For each image

        regions   [{"word", "box": [x0, y0, x1, y1] in pixels, "score"}]
        mask      (n, H, W) bool, n masks that together cover the regions; None: the boxes are all there is

    Mistake if a model cannot be loaded.
    """
    kind = pretrained("--grounder", grounder, AutoConfig).model_type
    if kind in ("sam3", "sam3_video"):
        if segmenter:
            raise Mistake(f"--segmenter {segmenter}: SAM 3 makes masks itself. Leave it out")
        sam3 = pretrained("--grounder", grounder, Sam3Model, device)
        tokenizer = pretrained("--grounder", grounder, AutoTokenizer)
        return lambda images, words, threshold: text_to_masks(sam3, tokenizer, images, words, threshold)
    if kind not in ("grounding-dino", "mm-grounding-dino"):
        raise Mistake(f"--grounder {grounder}: is a {kind!r}; use a Grounding DINO or a SAM 3")
    version = transformers.__version__
    if [int(n) for n in version.split(".")[:2]] < [5, 23]:
        # Measured: 5.17 gives the text's dots position 0 and cuts its position embeddings to -1, 0 and 1.
        raise Mistake(f"transformers {version} runs Grounding DINO wrongly: pip install -U transformers")
    dino = pretrained("--grounder", grounder, AutoGroundingDino, device)
    reader = pretrained("--grounder", grounder, AutoProcessor)
    if segmenter:
        kind = pretrained("--segmenter", segmenter, AutoConfig).model_type
        if kind != "sam":
            raise Mistake(f"--segmenter {segmenter}: is a {kind!r}; use a SAM, or a SAM 3 as --grounder")
        sam = pretrained("--segmenter", segmenter, SamModel, device)
        cutter = pretrained("--segmenter", segmenter, AutoProcessor)

    def find(images, words, threshold):
        regions, masks = text_to_boxes(dino, reader, images, words, threshold), [None] * len(images)
        if segmenter:
            masks = boxes_to_masks(sam, cutter, images, regions)
        return list(zip(regions, masks, strict=True))

    return find


def pretrained(flag, path, auto, device=None):
    """auto.from_pretrained(path), a model on `device`; Mistake naming the flag if it cannot be had."""
    try:
        if device is None:
            return auto.from_pretrained(path, trust_remote_code=False)
        return auto.from_pretrained(path, use_safetensors=True, dtype=torch.float32).eval().to(device)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0][:150]
        raise Mistake(f"{flag} {path}: cannot be loaded ({reason}). Name its folder or hub id") from None


def asked_text(words):
    """What Grounding DINO is asked: "cup. dining table. "."""
    words = [word.lower().replace(".", " ").replace("?", " ") for word in words]  # both end a phrase
    return "".join(" ".join(word.split()) + ". " for word in words)


@torch.inference_mode()
def text_to_boxes(dino, processor, images, words, threshold):
    """Boxes of words by Grounding DINO; every box above the threshold is given to the word that fits it best.

    A word's score is the largest probability of its tokens. transformers' own reading of the labels joins words and
    marks of neighbours ("cup. [SEP]"), so the scores are read here.
    """
    tokenizer, device, regions = processor.tokenizer, dino.device, [[] for _ in images]
    asked = [i for i, named in enumerate(words) if named]
    if not asked:
        return regions
    pictures, texts = [images[i] for i in asked], [asked_text(words[i]) for i in asked]
    inputs = processor(images=pictures, text=texts, padding=True, return_tensors="pt").to(device)
    ids, limit = inputs["input_ids"], dino.config.max_text_len  # (J, L), J images that are asked about
    if ids.shape[1] > limit:
        raise Mistake(f"keywords {max(texts, key=len)[:60]!r}... take over {limit} tokens. Lower --top")
    out = dino(**inputs)
    dot = ids == tokenizer.convert_tokens_to_ids(".")
    marks = torch.tensor(sorted(set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}), device=device)
    phrase = dot.cumsum(1).masked_fill(dot | torch.isin(ids, marks), -1)  # the number of each token's word
    probability = out.logits[..., : ids.shape[1]].float().sigmoid()  # (J, Q queries, L)
    centre, size = out.pred_boxes.float().split(2, -1)  # of the image without its batch's padding, in 0..1
    boxes = torch.cat([centre - size / 2, centre + size / 2], -1)  # (J, Q, 4)
    for j, i in enumerate(asked):
        scores = [(probability[j] * (phrase[j] == n)).amax(-1) for n in range(len(words[i]))]
        best, which = torch.stack(scores, -1).max(-1)  # (Q,)
        image_size = torch.tensor(images[i].size * 2, device=device)
        box = (boxes[j] * image_size).clamp(min=0).minimum(image_size)
        sure = (best > threshold) & (box[:, 2:] > box[:, :2]).all(-1)
        for q in sure.nonzero()[:, 0].tolist():
            corners = [round(v, 1) for v in box[q].tolist()]
            regions[i].append({"word": words[i][which[q]], "box": corners, "score": round(best[q].item(), 3)})
        regions[i].sort(key=lambda region: -region["score"])
    return regions


@torch.inference_mode()
def boxes_to_masks(sam, processor, images, regions):
    """SAM's masks of the boxes of regions: of each image (n, H, W) bool, n its regions."""
    masks = [np.zeros((0, image.height, image.width), bool) for image in images]
    for i, image in enumerate(images):  # one after the other: at full size masks are large
        if boxes := [region["box"] for region in regions[i]]:
            inputs = processor(images=image, input_boxes=[boxes], return_tensors="pt")
            sizes = inputs.pop("original_sizes"), inputs.pop("reshaped_input_sizes")
            out = sam(**inputs.to(sam.device, torch.float32), multimask_output=False)
            (full,) = processor.post_process_masks(out.pred_masks.cpu(), *sizes)  # (n, 1, H, W)
            masks[i] = full[:, 0].numpy()
    return masks


@torch.inference_mode()
def text_to_masks(sam3, tokenizer, images, words, threshold):
    """SAM 3's regions and masks of words: [(regions, masks)], as `load` has it.

    Its processor needs torchvision; what it does to an image is done here: squashed to a square, in [-1, 1].
    """
    side, device, result = sam3.config.image_size, sam3.device, []
    for image, named in zip(images, words, strict=True):
        regions, masks = [], [np.zeros((0, image.height, image.width), bool)]
        if named:
            square = np.array(image.resize((side, side), Image.Resampling.BILINEAR))
            pixels = torch.from_numpy(square).permute(2, 0, 1)[None].to(device).float() / 127.5 - 1
            text = tokenizer(named, padding="max_length", truncation=True, max_length=32, return_tensors="pt")
            vision = sam3.get_vision_features(pixels)
            for part in ("fpn_hidden_states", "fpn_position_encoding"):  # one copy a word
                vision[part] = tuple(level.expand(len(named), -1, -1, -1) for level in vision[part])
            out = sam3(vision_embeds=vision, **text.to(device))
            scores = out.pred_logits.sigmoid() * out.presence_logits.sigmoid()  # (W, Q)
            size = torch.tensor(image.size * 2, device=device)
            for n, q in (scores > threshold).nonzero().tolist():
                corners = (out.pred_boxes[n, q] * size).clamp(min=0).minimum(size).tolist()
                box = [round(v, 1) for v in corners]
                regions.append({"word": named[n], "box": box, "score": round(scores[n, q].item(), 3)})
                mask = out.pred_masks[n, q][None, None].sigmoid()
                mask = F.interpolate(mask, (image.height, image.width), mode="bilinear")
                masks.append((mask[0] > 0.5).cpu().numpy())
        result.append((regions, np.concatenate(masks)))
    return result
