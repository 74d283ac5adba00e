"""
What can be checked on ONE GPU without a network and without weights, in under 8 minutes; prints one table.

    python runs/gpu_check.py                 all parts, each in a process of its own (one that dies spoils no other)
    python runs/gpu_check.py exact speed     some of them;   SMALL=1: tiny sizes, also on a CPU, to test this file
"""

import functools
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
PARTS = {"env": 50, "exact": 60, "scripts": 100, "speed": 100, "full": 40, "rollout": 60, "candidates": 70}  # s
PART = sys.argv[2] if sys.argv[1:2] == ["--part"] else ""
SMALL = bool(os.environ.get("SMALL"))
if PART:  # the parent, which only collects, leaves the GPU alone
    sys.path.insert(0, str(ROOT))
    import numpy as np
    import torch
    import torch.nn.functional as F
    import transformers
    from torch.distributed.device_mesh import init_device_mesh
    from torch.utils.checkpoint import checkpoint

    import bench
    import build_data
    import data
    import hub
    import model
    import runtime
    import warmup
    from extras import contest

    CUDA, HALF = torch.cuda.is_available(), torch.bfloat16
    CHOICES = (True, False) if CUDA else (True,)  # for cudnn
LINE = "{:10} {:62} {:>34}  {:26} {}".format  # part, what, value, expected, verdict


def row(name, value, want="", ok=None):
    """One line of the table; the parent collects them from stdout. Without `ok` it is not judged."""
    print(LINE(PART, name, value, want, "" if ok is None else "ok" if ok else "BAD"), flush=True)


def below(name, value, most, form=".1e"):
    row(name, format(float(value), form), f"< {most:g}", value < most)


def main():
    """Each part in a process of its own, with a time limit; then one table of all their rows."""
    began, table = time.time(), []
    if SMALL:
        os.environ["OMP_NUM_THREADS"] = "1"  # many threads for tiny sizes only wait for each other
    for part in sys.argv[1:] or PARTS:
        limit = PARTS[part] * (10 if SMALL else 1)
        command = ["timeout", str(limit), sys.executable, __file__, "--part", part]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        lines = done.stdout.splitlines()
        if done.returncode:
            errors = done.stderr.splitlines()[-40:] or [""]
            lines += [*errors, LINE(part, f"ended with {done.returncode}", errors[-1][:110], "", "BAD")]
        for line in lines:
            table.append(line) if line.startswith(f"{part:10} ") else print(line)
    print(LINE("part", "what", "value", "expected", "verdict"), *table, sep="\n")
    print(f"{sum(line.endswith('BAD') for line in table)} bad of {len(table)}; {time.time() - began:.0f} s")


def measured(work, repeats=3):
    """Seconds of the first call, the median of those of the following, and peak memory in GB (of a GPU)."""
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    times = bench.seconds_of(DEVICE, work, repeats)
    return times[0], float(np.median(times[1:])), runtime.memory_gb()


def cudnn(on):
    """Let torch choose cuDNN's attention, or not; returns the name of the choice."""
    torch.backends.cuda.enable_cudnn_sdp(on)
    return "as torch chooses" if on else "no cuDNN"


def big(lora_rank, layers=32):
    """A 7B with random weights; its unsayable tokens as few as LLaVA's (our tokenizer would make them 31,000)."""
    architecture = bench.llava("7b")
    architecture.text_config.num_hidden_layers = layers
    if SMALL:
        sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32, "num_hidden_layers": 2}
        architecture.text_config.update(sizes | {"num_attention_heads": 2, "num_key_value_heads": 2})
        architecture.vision_config.update({"num_hidden_layers": 2, "image_size": 56})
    policy = bench.random_policy(architecture, DEVICE, lora_rank)
    policy.unsayable = policy.unsayable[:64]
    return policy


def recompute(policy, on):
    """As runtime.shard has it, or not."""
    for layer in policy.hf.model.language_model.layers:
        layer.__dict__.pop("forward", None)
        if on:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)


def stepper(policy, optimizer, pairs, answer=100):
    """An MFPO step on `pairs` random records."""
    return functools.partial(bench.mfpo_step, policy, optimizer, bench.random_pairs(policy, pairs, 60, answer, pairs))


def timed(title, policy, optimizer, pairs, again):
    """A row of a step's time, share of the matrix rate (of what is not computed again) and memory, which it returns."""
    step = stepper(policy, optimizer, pairs)
    recompute(policy, False)
    flops = bench.flops_of(step)
    recompute(policy, again)
    _, took, most = measured(step)
    share = flops / took / bench.matrix_rate(DEVICE, HALF)
    text = f"{took:.3f} s, {pairs / took:.1f} pairs/s, {100 * share:.0f} %, {most:.1f} GB"
    row(f"{title}, {pairs} pairs, recompute {again}", text, "> 35 % of the matrix rate")
    return most


def qkv(rows, queries, keys, dim=32 if SMALL else 128):
    """Random queries, keys and values, each (rows, heads, tokens, dim), laid out as a model has them."""
    heads, options = 2 if SMALL else 32, {"device": DEVICE, "dtype": HALF}
    return [torch.randn(rows, n, heads, dim, **options).transpose(1, 2) for n in (queries, keys, keys)]


def causal(rows, queries, keys):
    """(rows, 1, queries, keys), aligned at the lower right: the last query sees all keys."""
    return torch.ones(rows, 1, queries, keys, dtype=torch.bool, device=DEVICE).tril(keys - queries)


def attend(q, k, v, mask):
    """Attention, and its backward pass where it has one."""
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    if out.requires_grad:
        out.sum().backward()
    return out.detach()


def env(_):
    """Card and versions; rates of matrix products and copies; attention at new shapes, with empty rows."""
    row("device", torch.cuda.get_device_name() if CUDA else "cpu")
    versions = torch.__version__, torch.backends.cudnn.version(), transformers.__version__
    row("torch, cuDNN, transformers", ", ".join(map(str, versions)))
    row("bf16 matrix products, TFLOP/s", f"{bench.matrix_rate(DEVICE, HALF) / 1e12:.0f}", "790 (H100)")
    if CUDA:
        a = torch.empty(2**30, device=DEVICE)
        _, took, _ = measured(a.clone)
        row("copy, TB/s read + written", f"{2 * a.nbytes / took / 1e12:.2f}", "3.0 H100, 4.3 H200")
    training, token = ((4, 26, 26), (2, 8, 21)) if SMALL else ((4, 836, 836), (2, 8, 701))
    for name in map(cudnn, CHOICES):
        for title, (rows, queries, keys) in (("training rows", training), ("next token", token)):
            for length in (keys, keys + 1):  # the first loads the kernels
                inputs = [x.requires_grad_(title == "training rows") for x in qkv(rows, queries, length)]
                first, again, _ = measured(functools.partial(attend, *inputs, causal(rows, queries, length)))
            text, ok = f"{1e3 * first:.1f} ms, {1e3 * again:.2f} ms", SMALL or first < 10 * again + 0.05
            row(f"attention, {title}, {name}: new shape, again", text, "new < 10 x again", ok)
        q, k, v = qkv(2, 200, 200)
        mask = causal(2, 200, 200)
        mask[0, :, 5:9] = False  # rows that see nothing
        out = attend(q, k, v, mask)
        off = out[1:] - attend(q[1:].float(), k[1:].float(), v[1:].float(), mask[1:])
        below(f"masked attention against float32, {name}", off.abs().max(), 3e-2)
        below(f"rows that see nothing, {name}: not finite", (~out.isfinite()).sum(), 1, ".0f")
        # pytorch issue 196678: length % 128 == 64 and a row whose logsumexp is below -88.7
        q, k, v = (x[:, :1] * size for x, size in zip(qkv(1, 704, 704, 64), (0.1, 0.1, 1), strict=True))
        q[..., 0], k[..., 0] = 1.0, -960.0
        attend(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), causal(1, 704, 704))
        bad = (~q.grad.isfinite()).sum()
        below(f"gradient at length 704, scores of -120, {name}: not finite", bad, 1, ".0f")


def exact(folder):
    """CUDA against CPU, bfloat16 against float32: log-probabilities, gradients, samples, attacks; adapters; FSDP2."""
    torch.backends.cudnn.allow_tf32 = False  # the patch embedding's convolution would not be float32
    cpu, gpu, half = (warmup.build_policy(0) for _ in range(3))
    gpu.to(DEVICE)
    runtime.shard(half, DEVICE)  # as one GPU trains
    records = contest.made_up(folder, cpu, 6, 20)
    rows = cpu.encoding.rows(records, folder, "chosen", "rejected")
    batch = model.pair_batch(gpu, records, rows, folder)
    (a, ga), (b, gb), (c, gc) = (scored(policy, batch) for policy in (cpu, gpu, half))
    below("float32: log-probabilities, CUDA against CPU", (a - b).abs().max(), 2e-3)
    below("float32: gradients, CUDA against CPU, 1 - cosine", 1 - F.cosine_similarity(ga, gb, 0), 1e-4)
    off = (a - c)[batch.answer_mask.cpu()]
    below("bfloat16 against float32: token, std", off.std(), 0.05)
    below("bfloat16 against float32: token, largest", off.abs().max(), 0.5)
    below("bfloat16 against float32: gradients, 1 - cosine", 1 - F.cosine_similarity(ga, gc, 0), 0.02)
    with torch.no_grad():
        batches = [model.pair_batch(half, [r], [row], folder) for r, row in zip(records, rows, strict=True)]
        alone = torch.cat([half.logps(each).sum(1).cpu() for each in batches])
    below("bfloat16: answers alone against in a batch, std in nats", (alone - c.sum(1)).std(), 0.1)
    pixels = model.load_pixels(cpu, folder, [record["image"] for record in records[:3]])
    exact_samples(cpu, gpu, half, rows[:3], pixels)
    exact_attacks(cpu, gpu, rows[:3], pixels)
    exact_adapters(cpu, batch, folder)
    exact_slices(batch, a, ga, rows[0].prefix, pixels[:1])


def scored(policy, batch):
    """Log-probabilities (A, T), and the gradient of their sum as one vector in float64, both on the CPU."""
    logp = policy.logps(batch.to(policy.mean.device))
    logp.sum().backward()
    grads = torch.cat([p.grad.flatten().cpu() for p in policy.parameters() if p.grad is not None])
    return logp.detach().cpu(), grads.double()


def exact_samples(cpu, gpu, half, rows, pixels):
    """CPU and GPU say the same, together and alone; in bfloat16 the sampler has training's log-probabilities."""
    here, prompts, draws = pixels.to(DEVICE), [r.prefix for r in rows], torch.rand(3, 4, 6, dtype=torch.float64)
    said, alone = gpu.sample(here, prompts, draws)[0], []
    for i in range(3):
        alone += gpu.sample(here[[i]], [prompts[i]], draws[[i]])[0]
    others = {"CUDA against CPU": cpu.sample(pixels, prompts, draws)[0], "questions together and alone": alone}
    for title, answers in others.items():
        differ = sum(x != y for x, y in zip(answers, said, strict=True))
        below(f"float32: sampled answers that differ, {title}", differ, 1, ".0f")
    answers, sampled = half.sample(here, prompts, draws)
    batch = [data.Row(prompt, answers[4 * i : 4 * i + 4]) for i, prompt in enumerate(prompts)]
    batch = data.pack(batch, here).to(DEVICE)
    with torch.no_grad():
        off = half.logps(batch)[batch.answer_mask].cpu() - torch.tensor(sum(sampled, []))
    below("bfloat16: sampler and training differ by, nats", off.abs().max(), 0.3, ".3f")


def exact_attacks(cpu, gpu, rows, pixels):
    """The same image on CPU and GPU, but for rounding."""
    noise, made = torch.rand_like(pixels) * 2 - 1, []
    rows = [data.Row(r.prefix, r.answers[:1]) for r in rows]
    for policy in (cpu, gpu):
        policy.requires_grad_(False)
        images = pixels.to(policy.mean.device), noise.to(policy.mean.device)
        made.append(build_data.attack_images(policy, rows, *images, 4 / 255, 1 / 255, 3).cpu())
    below("float32: attacked pixels that differ, CUDA, CPU", (made[0] != made[1]).float().mean(), 0.01)


def exact_adapters(policy, batch, folder):
    """Merged with the file's weights, exported and loaded, they say what they said on the GPU."""
    hub.save_new(policy, folder / "base")
    tuned = hub.load(folder / "base", lora_rank=4)
    for name, parameter in tuned.named_parameters():
        if "lora_b" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    hub.export(tuned, folder / "merged")
    with torch.no_grad():
        off = hub.load(folder / "merged", trained=False).logps(batch) - tuned.logps(batch)
    below("adapters merged, exported and loaded: log-probabilities", off.abs().max(), 0.3, ".3f")


def exact_slices(batch, right, grads, prompt, pixels):
    """FSDP2 with bfloat16 on a mesh of one: hooks, streams, casts, gathered weights."""
    sliced = warmup.build_policy(0)
    runtime.slice_layers(sliced, init_device_mesh(DEVICE.type, (1,)), half=True)
    logp, _ = scored(sliced.to(DEVICE), batch)
    norm = runtime.clip_gradients(sliced, 1.0)
    bench.descend(sliced, runtime.adamw(sliced, 0.0))
    off = (logp - right)[batch.answer_mask.cpu()]
    below("FSDP2 in bfloat16 against float32: token, std", off.std(), 0.05)
    below("FSDP2 in bfloat16 against float32: gradient norm", abs(norm / grads.norm() - 1), 0.05)
    with torch.no_grad(), runtime.summoned(sliced):
        sliced.sample(pixels.to(DEVICE), [prompt], torch.rand(1, 4, 6, dtype=torch.float64))
    sliced.logps(batch).sum().backward()
    row("FSDP2: trains again after sampling with all weights", "yes", "yes", True)


def call(title, script, *args):
    """A row of a script, which must end well: or, of random weights, with no mined answer that can be used."""
    began, command = time.time(), [sys.executable, *script.split(), *map(str, args)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    ok = done.returncode == 0 or "no mined answer can be used" in done.stderr
    row(title, f"{time.time() - began:.0f} s" if ok else " ".join(done.stderr.split())[-34:], "exit 0", ok)


def scripts(folder):
    """Both trainers, resumed and with adapters; mining; how far sampler and update differ."""
    policy = contest.tiny(16)
    hub.save_new(policy, folder / "base")
    own, base, short = folder / "own.jsonl", ["--model", folder / "base"], ["--eval_split", "none", "--save_every", 2]
    runtime.write_jsonl(own, contest.made_up(folder, policy, 32, 40))  # pairs, sources and questions at once
    runs = {"train_mfpo": "-m torch.distributed.run --standalone --nproc_per_node=1 train_mfpo.py"}
    runs["train_mfpo, adapters"] = "train_mfpo.py --lora_rank 4 --recompute True"
    for title, script in runs.items():
        run = folder / title[-8:]
        flags = ["--data", own, "--out", run, "--epochs", 1, "--pairs_per_step", 8, "--pairs_per_gpu", 4]
        call(title, script, *base, *flags, *short)
        straight = data.read_lines(run / "metrics.jsonl")[-1]["loss"]
        for gone in [*sorted(run.glob("step_*"))[-1:], run / "final"]:
            shutil.rmtree(gone)
        call(f"{title}, resumed", "train_mfpo.py", "--resume", run)
        off = abs(data.read_lines(run / "metrics.jsonl")[-1]["loss"] - straight)
        below(f"{title}: last loss, resumed against straight", off, 1e-3)
    flags = ["--source", own, "--out", folder / "mined.jsonl", "--steps", 2, "--max_new_tokens", 8]
    call("build_data mbpo (of random weights no answer need be usable)", "build_data.py mbpo", *base, *flags)
    flags = ["--data", own, "--questions", own, "--out", folder / "mbpo", "--steps", 3, "--recompute", "True"]
    call("train_mbpo", "train_mbpo.py --groups_per_step 8 --groups_per_gpu 4", *base, *flags, *short)
    gap = data.read_lines(folder / "mbpo" / "metrics.jsonl")[0]["sampler_gap"]
    below("train_mbpo: sampler and update differ by, nats", gap, 0.5, ".3f")


def speed(folder):
    """7B with adapters: seconds, share of the matrix rate, peak memory against the plan; a checkpoint."""
    policy = big(64)
    optimizer = runtime.adamw(policy, 0.0)
    for name in map(cudnn, CHOICES):
        for pairs, again in ((1, True), (2, False), (4, False)):
            most = timed(f"7B adapters, {name}", policy, optimizer, pairs, again)
            config = bench.PlanConfig(gpus=1, lora_rank=64, per_gpu=pairs, recompute=again, answer=100)
            planned = sum(bench.plan(config)[1]["MFPO"]["memory"].values()) / 1e9
            row("   peak memory, GB", f"{most:.1f}", f"plan {planned:.1f}", SMALL or abs(most / planned - 1) < 0.1)
        recompute(policy, True)
        stalls = []
        for answer in range(101, 105):  # lengths not seen before: what a real epoch has in almost every pass
            first, took, _ = measured(stepper(policy, optimizer, 1, answer), 1)
            stalls.append(first - took)
        text, ok = " ".join(f"{stall:.2f}" for stall in stalls), SMALL or max(stalls[1:]) < 0.05
        row(f"a length not seen before costs, s, {name}", text, "< 0.05, but the first", ok)

    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.time()
    runtime.save_checkpoint(folder, 1, policy, optimizer, "x")
    took, more = time.time() - began, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6
    size = sum(file.stat().st_size for file in folder.rglob("*.safetensors")) / 1e9
    text, ok = f"{size:.1f}, {took:.1f}, {more:.1f}", SMALL or more < 1.5 * size
    row("checkpoint: GB, s, host memory beyond before, GB", text, "memory < 1.5 x size", ok)


def full(_):
    """7B's width, 8 layers, all weights: the same."""
    cudnn(False)
    policy = big(0, 8)
    optimizer = runtime.adamw(policy, 0.0)
    for pairs, again in ((2, True), (2, False), (4, False)):
        timed("7B widths, 8 layers, all weights", policy, optimizer, pairs, again)


def rollout(_):
    """Milliseconds a sampled token, greedy answers, a step of the attack."""
    policy, tokens = big(64), 16
    prompts = [[7] * 5 + [policy.image_id] * policy.encoding.image_tokens + [8] * n for n in (50, 55)]
    images = torch.rand(32, 3, policy.image_size, policy.image_size, device=DEVICE)
    policy.unsayable.append(policy.tokenizer.eos_token_id)  # all answers go to the end

    def a_token(title, *work):
        first, took, _ = measured(functools.partial(*work), 2)
        text, ok = f"{first:.2f} s, {1e3 * took / tokens:.1f} ms a token", SMALL or took / tokens < 0.04
        row(f"{title} of {tokens} tokens: first, again", text, "< 40 ms a token", ok)

    draws = torch.rand(2, 8, tokens, dtype=torch.float64)
    for name in map(cudnn, CHOICES):
        for again in (False, True):
            recompute(policy, again)
            a_token(f"{name}, recompute {again}: 2 x 8 answers", policy.sample, images[:2], prompts, draws)
    cudnn(False)
    recompute(policy, False)
    policy.requires_grad_(False)
    for count in (2, 4) if SMALL else (4, 32):
        a_token(f"greedy: {count} answers", policy.generate, images[:count], prompts * (count // 2), tokens)
    rows = [data.Row(prompt, [[9] * 100]) for prompt in prompts * 2]
    pixels = (255 * images[:4]).round() / 255
    noise = torch.rand_like(pixels) * 2 - 1
    attack = functools.partial(build_data.attack_images, policy, rows, pixels, noise, 4 / 255, 1 / 255, 3)
    _, took, most = measured(attack, 1)
    row("attack, 4 images: s a step, peak GB", f"{took / 3:.3f}, {most:.1f}", "< 0.5, < 40", SMALL or took < 1.5)
    made = attack()
    below("attack: levels beyond its ball of 4", 255 * (made - pixels).abs().max() - 4, 1e-3)
    below("attack: off 8 bits, levels", (made * 255 - (made * 255).round()).abs().max(), 1e-3)
    below("attack: share of pixels that did not move", (made == pixels).float().mean(), 0.5)


def candidates(_):
    """What attention of one layer costs, forward and backward, 2 pairs of 636 + 100 + 100 tokens, by several ways."""
    heads, dim, prefix, answer = (2, 32, 40, 10) if SMALL else (32, 128, 636, 100)
    rows = [data.Row([1] * prefix, [[1] * answer] * n) for n in (2, 1, 2, 1)]
    batch = data.pack(rows, torch.zeros(1)).to(DEVICE)
    allowed, layer = model.row_mask(batch.segment), SimpleNamespace(num_key_value_groups=1, is_causal=False)
    length, count = allowed.shape[-1], len(batch.ids)

    def packed(q, k, v, beyond=0):
        """As the model does it; `beyond`: in rows that are so much longer."""
        mask = F.pad(allowed, (0, beyond, 0, beyond))
        mask[..., :1] = True
        slot = batch.slot // length * (length + beyond) + batch.slot % length
        return model.packed_attention(layer, *(x.transpose(0, 1)[None] for x in (q, k, v)), mask, slot)[0][0]

    keys, ends, at = [], [(0, 0)], 0
    for r in rows:  # an answer's queries see its prefix and itself: causal, aligned at the lower right
        start = at
        for size in (prefix, *map(len, r.answers)):
            keys += [*(range(start, start + prefix) if at > start else ()), *range(at, at + size)]
            at += size
            ends.append((at, len(keys)))
    keys, ends = torch.tensor(keys, device=DEVICE), torch.tensor(ends, device=DEVICE, dtype=torch.int32).T.contiguous()

    longer = functools.partial(packed, beyond=-length % 128)
    ways = {"memory-efficient": packed, "cuDNN": packed, "cuDNN, length of 128s": longer}
    if CUDA:
        from torch.nn.attention.varlen import varlen_attn

        sizes = {"max_q": prefix, "max_k": prefix + answer, "window_size": (-1, 0)}
        ways["varlen"] = lambda q, k, v: varlen_attn(q, k[keys], v[keys], *ends, **sizes)
    for name, attend in ways.items():
        cudnn("cuDNN" in name)
        q, k, v = (torch.randn(count, heads, dim, device=DEVICE, dtype=HALF, requires_grad=True) for _ in range(3))
        with torch.no_grad():
            off = attend(q, k, v) - packed(q.float(), k.float(), v.float())
        below(f"{name}: off from the model's in float32", off.abs().max(), 3e-2)
        first, took, _ = measured(lambda f=attend, x=(q, k, v): f(*x).sum().backward(), 10)
        row(f"{name}: both ways of a layer", f"{1e3 * took:.2f} ms (first {1e3 * first:.0f})", "the least")
    if CUDA:  # what fusing norms, rotary embedding and activation is worth
        cudnn(False)
        policy = big(64, 4)
        step = stepper(policy, runtime.adamw(policy, 0.0), 2)
        _, plain, _ = measured(step)
        for layer in policy.hf.model.language_model.layers:
            layer.forward = torch.compile(layer.forward, dynamic=True)
        first, took, _ = measured(step)
        text = f"{plain:.3f} s, {took:.3f} s ({first:.0f} s)"
        row("4 layers, adapters: eager, compiled (first)", text, "faster", took < plain)


if __name__ == "__main__":
    if not PART:
        main()
    else:
        DEVICE = runtime.start()
        with tempfile.TemporaryDirectory() as folder:
            globals()[PART](Path(folder))
        sys.stdout.flush()
        os._exit(0)  # no teardown of CUDA and NCCL that could fail after all is said
