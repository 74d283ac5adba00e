"""
The built-in world's tiny LLaVA: transformers' own LLaVA, CLIP-vision and Llama classes with 1.2 million
parameters and a word tokenizer; how it learns to see well and to hallucinate by prior; what it then says.
"""

import functools
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from tqdm import tqdm

import hub
import runtime
import toy
from data import Row, pack, read_lines
from model import CONVENTIONS, Policy, load_pixels, to_pixels
from toy import CAPTIONS, CELL, COLOURS, KINDS, SIZE

TEMPLATE = CONVENTIONS["hub"].template


def build_processor():
    """A word-level tokenizer over everything the world can say, and CLIP's normalisation of its images."""
    texts = [*CAPTIONS, *CAPTIONS.values(), TEMPLATE.replace("<image>", ""), toy.yesno("it")]
    texts += ["Which of these is in the picture?", "How many objects are", "What colour is the"]
    texts += ["a , . and Yes No 2 3 4 A B C D"]
    split = pre_tokenizers.Whitespace()
    words = {word for text in texts for word, _ in split.pre_tokenize_str(text.format("", question=""))}
    marks = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    vocab = {word: i for i, word in enumerate([*marks.values(), "<image>", *sorted(words), *COLOURS, *KINDS])}
    level = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    level.pre_tokenizer = split
    level.decoder = decoders.WordPiece(prefix="##", cleanup=True)  # no blank before a comma or a full stop
    start = ("<s>", vocab["<s>"])
    level.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[start])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=level, **marks, additional_special_tokens=["<image>"]
    )
    sizes = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
    images = hub.without_warnings(lambda: transformers.CLIPImageProcessor(**sizes))  # importing it warns
    options = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return transformers.LlavaProcessor(images, tokenizer, patch_size=CELL, **options)


def build_policy(seed):
    """The tiny LLaVA with random weights: every part of LLaVA-1.5 is there, a 32nd as wide."""
    processor = build_processor()
    tokenizer = processor.tokenizer
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
    tokens = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    vision = transformers.CLIPVisionConfig(**sizes, num_hidden_layers=4, image_size=SIZE, patch_size=CELL)
    text = transformers.LlamaConfig(**sizes, **tokens, num_hidden_layers=3, max_position_embeddings=256)
    # The other values are transformers' defaults: those of LLaVA-1.5.
    options = {"image_token_index": tokenizer.convert_tokens_to_ids("<image>"), "dtype": torch.float32}
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, **options)
    torch.manual_seed(seed)
    hf = transformers.LlavaForConditionalGeneration(config)
    # Attention starts by looking for tokens like the one it stands on (keys = queries) and by copying what it
    # finds (output = values transposed): "is there a cup" has to find the patch of a cup. From plain random
    # weights that step alone takes longer than all of the warm-up. The factor 3 and the embeddings' norm of 1
    # were found by trial.
    with torch.no_grad():
        hf.get_input_embeddings().weight.normal_(std=128**-0.5)
        for attention in (layer.self_attn for layer in hf.model.language_model.layers):
            attention.q_proj.weight.mul_(3)
            attention.v_proj.weight.mul_(3)
            attention.k_proj.weight.copy_(attention.q_proj.weight)
            attention.o_proj.weight.copy_(attention.v_proj.weight.T)
    return Policy(hf, processor, train_vision=True)


def descend(modules, steps, peak, loss_of, title, until=0.0):
    """AdamW on `loss_of()`; betas, decay and clip are usual values, not tuned. With `until`, the rate stays
    at its peak and training stops once the mean of 20 losses is below it.
    """
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.01)
    losses = []
    for step in tqdm(range(steps), f"warm-up: {title}", leave=False, mininterval=1):
        for group in optimizer.param_groups:
            group["lr"] = runtime.cosine(step, steps, peak, warm=20, floor=1.0 if until else 0.05)
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.item())
        mean = sum(losses[-20:]) / len(losses[-20:])
        if step >= 20 and mean < until:
            break
    print(f"warm-up: {title}: {step + 1} steps, loss {mean:.3f}")


MIXED = {"caption": 1, "yesno": 4, "choice": 1, "number": 0.5, "word": 0.5}
# Name, steps, stop below this loss, peak rate, scenes a step, {kind of turn: how many a scene}, annotator.
STAGES = (
    ("captions", 500, 0.0, 2e-3, 16, {"caption": 1, "word": 3}, "sloppy"),
    # Yes/no stays at chance (0.347) for 100 to 300 steps, as the seed has it, then falls within 100.
    ("yes/no", 800, 0.08, 1e-3, 16, {"yesno": 8}, "careful"),
    ("mixed", 400, 0.0, 1e-3, 16, MIXED, "sloppy"),
)


def warm_up(seed, vision_steps=250, stages=STAGES, images=6000):
    """The base: a Policy that sees well and hallucinates by prior. It learns to see first, on fair scenes:
    through captions alone the tower stays poor, and every method just trades precision against recall. Then
    come the STAGES, on biased scenes. In one, yes/no questions are asked alone and answered truly: mixed with
    captions from the start, they are not learnt.
    """
    policy = build_policy(seed)
    encoding = policy.encoding
    rng = np.random.default_rng([seed, 99])
    learn_patches(policy, list(toy.scenes("train", images, seed)), vision_steps, rng)

    # The rest sees the biased world through the frozen tower, so its features are computed once.
    policy.hf.model.vision_tower.requires_grad_(False)
    world = list(toy.scenes("train", images, seed + 1000, toy.P_BIASED))
    pixels = to_pixels([image for image, _, _ in world])
    features = torch.cat([policy.vision(some) for some in pixels.split(500)])
    seen = {
        "careful": [toy.pairs_of(objects) for _, objects, _ in world],
        "sloppy": [toy.sloppy(toy.pairs_of(objects), scene_rng) for _, objects, scene_rng in world],
    }
    described = [str(scene_rng.choice(list(CAPTIONS))) for _, _, scene_rng in world]
    opening = encoding.prompt("")
    opening = opening[: opening.index(policy.image_id) + encoding.image_tokens]  # <s> USER: <image>...<image>

    @functools.cache
    def turn(question, answer):
        """Token ids of one question and its answer behind `opening`, and the length of the answer."""
        reply = encoding.answer(question, answer)
        return encoding.prompt(question)[len(opening) :] + reply, len(reply)

    def loss_of(count, kinds, annotator):
        """Mean negative log-probability of answer tokens. All turns about a scene share one row."""
        rows, lengths, picked = [], [], rng.integers(images, size=count)
        for scene in picked:
            turns, pairs = [], seen[annotator][scene]
            for kind, share in kinds.items():
                for _ in range(int(share) + (rng.random() < share % 1)):
                    if kind == "caption":
                        asked = described[scene], toy.say(pairs, described[scene])
                    else:
                        asked = toy.closed_question(kind, pairs, rng)[:2]
                    turns.append(turn(*asked))
            rows.append(Row(opening, [ids for ids, _ in turns]))
            lengths += [length for _, length in turns]
        batch = pack(rows, None)
        question_length = batch.answer_mask.sum(1) - torch.tensor(lengths)
        counted = batch.answer_mask & (torch.arange(batch.answer_mask.shape[1]) >= question_length[:, None])
        return -(policy.logps(batch, features[picked]) * counted).sum() / counted.sum()

    for name, steps, until, peak, count, kinds, annotator in stages:
        descend([policy.hf], steps, peak, functools.partial(loss_of, count, kinds, annotator), name, until)
    return policy


def learn_patches(policy, world, steps, rng):
    """Vision tower and projector learn to name each patch: its embedding is to be like those of its kind and
    colour. The head starts as a copy of the embeddings that this gives: words out are words in.
    """
    kind_of = torch.zeros(len(world), 16, dtype=torch.long)
    colour_of = torch.full_like(kind_of, -100)  # no colour to name
    for i, (_, objects, _) in enumerate(world):
        for o in objects:
            cell = o["box"][1] // CELL * 4 + o["box"][0] // CELL
            kind_of[i, cell] = 1 + KINDS.index(o["kind"])
            colour_of[i, cell] = list(COLOURS).index(o["colour"])
    # "picture" stands for no object.
    words = policy.tokenizer.convert_tokens_to_ids(["picture", *KINDS, *COLOURS])
    weight = torch.tensor([0.2] + [1.0] * len(KINDS))  # most patches hold no object
    table, projector = policy.hf.get_input_embeddings(), policy.hf.model.multi_modal_projector

    def loss_of():
        pick = rng.integers(len(world), size=64)
        patches = projector(policy.vision(to_pixels([world[i][0] for i in pick])))  # (64, 16, E)
        # (1024, 19); the factor 10: a patch of norm 1 is enough
        likeness = 10 * (patches @ table.weight[words].T).flatten(0, 1)
        kind, colour = likeness.split([1 + len(KINDS), len(COLOURS)], dim=1)
        loss = F.cross_entropy(kind, kind_of[pick].flatten(), weight)
        return loss + F.cross_entropy(colour, colour_of[pick].flatten())

    descend([policy.hf.model.vision_tower, projector, table], steps, 1e-3, loss_of, "vision")
    with torch.no_grad():
        policy.hf.lm_head.weight.copy_(table.weight)


def own_answers(policy, records, folder, seed, batch=64):
    """The model's answer to each record's question, sampled at temperature 1: text, or None if unended."""
    torch.manual_seed(seed)
    answers, eos = [], policy.tokenizer.eos_token_id

    def pick(logits, t):  # as transformers draws: with torch's own generator, a batch at a time
        return torch.multinomial(logits[:, 0].float().softmax(-1), 1)[:, None]

    for i in tqdm(range(0, len(records), batch), "the model's own answers", leave=False):
        chunk = records[i : i + batch]
        pixels = load_pixels(policy, folder, [r["image"] for r in chunk]).to(policy.mean.device)
        prompts = [policy.encoding.prompt(r["question"]) for r in chunk]
        tokens, _ = policy.decode(pixels, prompts, 1, 60, pick)
        texts = policy.texts(tokens)
        answers += [text if ids[-1] == eos else None for text, ids in zip(texts, tokens, strict=True)]
    return answers


def build_world(config):
    """Scenes and questions (toy.write), the base model in <out>/base, what it says itself ("own_answer"). All
    ranks call it; what is there already stays.
    """
    out, policy = Path(config.out), None

    def make():
        toy.write(config)
        if not (out / "base" / "config.json").is_file():
            print("warming up the base model: about 2 minutes on 2 cores, once")
            hub.save_new(warm_up(config.seed), out / "base")
            print(f"wrote {out}/base")

    runtime.first_alone(make)
    for split in ("preference", "val", "test"):
        path = out / f"{split}.jsonl"
        records = runtime.first_alone(functools.partial(read_lines, path))
        if "own_answer" not in records[0]:
            policy = policy or hub.load(out / "base", trained=False)
            with runtime.summoned(policy):  # the model is small: each rank asks it everything
                answers = own_answers(policy, records, out, config.seed)
            rows = [record | {"own_answer": said} for record, said in zip(records, answers, strict=True)]
            runtime.first_alone(functools.partial(runtime.write_jsonl, path, rows))
