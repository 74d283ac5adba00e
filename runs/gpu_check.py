"""
What can be checked on ONE GPU without a network and without weights, in under 8 minutes; prints one table.

    python runs/gpu_check.py                 all parts, each in a process of its own (one that dies spoils no other)
    python runs/gpu_check.py exact speed     some of them;   SMALL=1: tiny sizes, also on a CPU, to test this file
"""

import functools
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
PARTS = {"env": 50, "exact": 60, "scripts": 100, "speed": 100, "full": 40, "rollout": 60, "candidates": 70}  # seconds
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


def row(name, value, want="", ok=None):
    """One line of the table; the parent collects them from stdout. Without `ok` it is not judged."""
    verdict = "" if ok is None else "ok" if ok else "BAD"
    print("ROW " + json.dumps([PART, name, value, want, verdict]), flush=True)


def below(name, value, most, form=".1e"):
    row(name, format(value, form), f"< {most:g}", value < most)


def run(part):
    """The rows of a part, and what else it printed."""
    began, limit = time.time(), PARTS[part] * (3 if SMALL else 1)
    command = ["timeout", str(limit), sys.executable, __file__, "--part", part]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines, errors = done.stdout.splitlines(), done.stderr.splitlines() or [""]
    rows = [json.loads(line[4:]) for line in lines if line.startswith("ROW ")]
    others = [line for line in lines if not line.startswith("ROW ")]
    if done.returncode:
        title = f"ended with {done.returncode} after {time.time() - began:.0f} s"
        rows.append([part, title, errors[-1][:110], "", "BAD"])
        others += errors[-40:]
    return rows, others


def main():
    began = time.time()
    if SMALL:
        os.environ["OMP_NUM_THREADS"] = "1"
    with ThreadPoolExecutor(2 if SMALL else 1) as pool:  # two at a time where times do not count
        parts = list(pool.map(run, sys.argv[1:] or PARTS))
    rows = [each for rows, _ in parts for each in rows]
    print("\n".join(line for _, others in parts for line in others))
    print(f"{'part':10} {'what':62} {'value':>34}  {'expected':26} verdict")
    for part, name, value, want, verdict in rows:
        print(f"{part:10} {name:62} {value:>34}  {want:26} {verdict}")
    print(f"{sum(each[4] == 'BAD' for each in rows)} bad of {len(rows)}; {time.time() - began:.0f} s")


def measured(work, repeats=3):
    """Seconds of the first call, the median of those of the following, and peak memory in GB (of a GPU)."""
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    times = bench.seconds_of(DEVICE, work, repeats)
    return times[0], float(np.median(times[1:])), runtime.memory_gb()


def cudnn(*choices):
    """Let torch choose cuDNN's attention, or not, one after the other; yields the name of the choice."""
    for on in choices if CUDA else choices[:1]:
        torch.backends.cuda.enable_cudnn_sdp(on)
        yield "as torch chooses" if on else "no cuDNN"


def big(lora_rank, layers=32):
    """A 7B with random weights; its unsayable tokens as few as LLaVA's (our tokenizer would make them 31,000)."""
    architecture = bench.llava("7b")
    text, vision = architecture.text_config, architecture.vision_config
    if SMALL:
        layers, sizes = 2, {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32}
        text.update(sizes | {"num_attention_heads": 2, "num_key_value_heads": 2})
        vision.update({"num_hidden_layers": 2, "image_size": 56})
    text.num_hidden_layers = layers
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


def env(_):
    """Card and versions; rates of matrix products and copies; attention at new shapes, with empty rows."""
    row("device", torch.cuda.get_device_name() if CUDA else "cpu")
    versions = torch.__version__, str(torch.backends.cudnn.version()), transformers.__version__
    row("torch, cuDNN, transformers", ", ".join(versions))
    row("bf16 matrix products, TFLOP/s", f"{bench.matrix_rate(DEVICE, HALF) / 1e12:.0f}", "790 (H100)")
    if CUDA:
        a = torch.empty(2**30, device=DEVICE)
        _, took, _ = measured(a.clone)
        row("copy, TB/s read + written", f"{2 * a.nbytes / took / 1e12:.2f}", "3.0 H100, 4.3 H200")
        del a

    def qkv(rows, queries, keys, dim=32 if SMALL else 128):
        heads, options = 2 if SMALL else 32, {"device": DEVICE, "dtype": HALF}
        return [torch.randn(rows, n, heads, dim, **options).transpose(1, 2) for n in (queries, keys, keys)]

    def attention(rows, queries, keys, grad):
        q, k, v = (x.requires_grad_(grad) for x in qkv(rows, queries, keys))
        mask = torch.ones(rows, 1, queries, keys, dtype=torch.bool, device=DEVICE).tril(keys - queries)

        def work():
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            if grad:
                out.backward(torch.ones_like(out))

        return work

    for name in cudnn(True, False):
        kinds = {"training rows": (4, 836, 836, True), "next token": (2, 8, 701, False)}
        for title, (rows, queries, keys, grad) in kinds.items():
            queries, keys = (max(8, n // 32) if SMALL else n for n in (queries, keys))
            measured(attention(rows, queries, keys, grad), 1)  # loads the kernels
            first, again, _ = measured(attention(rows, queries, keys + 1, grad))
            text, ok = f"{1e3 * first:.1f} ms, {1e3 * again:.2f} ms", SMALL or first < 10 * again + 0.05
            row(f"attention, {title}, {name}: new shape, again", text, "new < 10 x again", ok)
        q, k, v = qkv(2, 200, 200)
        mask = torch.ones(2, 1, 200, 200, dtype=torch.bool, device=DEVICE).tril()
        mask[0, :, 5:9] = False  # rows that see nothing
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        right = F.scaled_dot_product_attention(q[1:].float(), k[1:].float(), v[1:].float(), attn_mask=mask[1:])
        below(f"masked attention against float32, {name}", (out[1:] - right).abs().max().item(), 3e-2)
        below(f"rows that see nothing, {name}: not finite", (~out.isfinite()).sum().item(), 1, "d")
        # pytorch issue 196678: length % 128 == 64 and a row whose logsumexp is below -88.7
        q, k, v = (x[:, :1] * size for x, size in zip(qkv(1, 704, 704, 64), (0.1, 0.1, 1), strict=True))
        q[..., 0], k[..., 0] = 1.0, -960.0
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        mask = torch.ones(1, 1, 704, 704, dtype=torch.bool, device=DEVICE).tril()
        F.scaled_dot_product_attention(q, k, v, attn_mask=mask).sum().backward()
        bad = (~q.grad.isfinite()).sum().item()
        below(f"gradient at length 704, scores of -120, {name}: not finite", bad, 1, "d")


def exact(folder):
    """CUDA against CPU, bfloat16 against float32: log-probabilities, gradients, samples, attacks; adapters; FSDP2."""
    torch.backends.cudnn.allow_tf32 = False  # the patch embedding's convolution would not be float32
    cpu, gpu, half = (warmup.build_policy(0) for _ in range(3))
    gpu.to(DEVICE)
    runtime.shard(half, DEVICE)  # as one GPU trains
    records = contest.made_up(folder, cpu, 6, 20)
    rows = cpu.encoding.rows(records, folder, "chosen", "rejected")

    def scored(policy):
        batch = model.pair_batch(policy, records, rows, folder)
        logp = policy.logps(batch)
        logp.sum().backward()
        grads = torch.cat([p.grad.flatten().cpu() for p in policy.parameters() if p.grad is not None])
        return logp.detach().cpu(), grads.double(), batch.answer_mask.cpu()

    (a, ga, mask), (b, gb, _), (c, gc, _) = scored(cpu), scored(gpu), scored(half)
    below("float32: log-probabilities, CUDA against CPU", (a - b).abs().max().item(), 2e-3)
    below("float32: gradients, CUDA against CPU, 1 - cosine", 1 - F.cosine_similarity(ga, gb, dim=0).item(), 1e-4)
    below("bfloat16 against float32: token, std", (a - c)[mask].std().item(), 0.05)
    below("bfloat16 against float32: token, largest", (a - c)[mask].abs().max().item(), 0.5)
    below("bfloat16 against float32: gradients, 1 - cosine", 1 - F.cosine_similarity(ga, gc, dim=0).item(), 0.02)
    with torch.no_grad():
        batches = [model.pair_batch(half, [r], [row], folder) for r, row in zip(records, rows, strict=True)]
        alone = torch.cat([half.logps(batch).sum(1).cpu() for batch in batches])
    below("bfloat16: answers alone against in a batch, std in nats", (alone - c.sum(1)).std().item(), 0.1)

    pixels = model.load_pixels(cpu, folder, [r["image"] for r in records[:3]])
    prompts, draws = [r.prefix for r in rows[:3]], torch.rand(3, 4, 6, dtype=torch.float64)
    said = [p.sample(pixels.to(p.mean.device), prompts, draws) for p in (cpu, gpu, half)]
    some = [slice(i, i + 1) for i in range(3)]
    alone = sum([gpu.sample(pixels[i].to(DEVICE), prompts[i], draws[i])[0] for i in some], [])
    for title, answers in (("CUDA against CPU", said[0][0]), ("questions together and alone", alone)):
        differ = sum(x != y for x, y in zip(answers, said[1][0], strict=True))
        below(f"float32: sampled answers that differ, {title}", differ, 1, "d")
    answered = [data.Row(prompt, said[2][0][4 * i : 4 * i + 4]) for i, prompt in enumerate(prompts)]
    batch = data.pack(answered, pixels).to(DEVICE)
    with torch.no_grad():
        trained = half.logps(batch)[batch.answer_mask].cpu()
    gap = (trained - torch.tensor(sum(said[2][1], []))).abs().max().item()
    below("bfloat16: sampler and training differ by, nats", gap, 0.3, ".3f")
    noise, made, chosen = torch.rand(pixels.shape) * 2 - 1, [], [data.Row(r.prefix, r.answers[:1]) for r in rows[:3]]
    for p in (cpu, gpu):
        p.requires_grad_(False)
        images = pixels.to(p.mean.device), noise.to(p.mean.device)
        made.append(build_data.attack_images(p, chosen, *images, 4 / 255, 1 / 255, 3).cpu())
    below("float32: attacked pixels that differ, CUDA, CPU", (made[0] != made[1]).float().mean().item(), 0.01)

    hub.save_new(cpu, folder / "base")
    tuned = hub.load(folder / "base", lora_rank=4)
    batch = model.pair_batch(tuned, records, rows, folder)
    with torch.no_grad():  # of a weight of the file and adapters of the GPU
        for name, p in tuned.named_parameters():
            if "lora_b" in name:
                p.normal_(0, 0.02)
        hub.export(tuned, folder / "merged")
        off = hub.load(folder / "merged", trained=False).logps(batch) - tuned.logps(batch)
    below("adapters merged, exported and loaded: log-probabilities", off.abs().max().item(), 0.3, ".3f")

    # FSDP2 with bfloat16 on a mesh of one: hooks, streams, casts, gathered weights
    sliced = warmup.build_policy(0)
    runtime.slice_layers(sliced, init_device_mesh(DEVICE.type, (1,)), half=True)
    sliced.to(DEVICE)
    logp = sliced.logps(batch)
    logp.sum().backward()
    norm = runtime.clip_gradients(sliced, 1.0)
    bench.descend(sliced, runtime.adamw(sliced, 0.0))
    below("FSDP2 in bfloat16 against float32: token, std", (logp.detach().cpu() - a)[mask].std().item(), 0.05)
    below("FSDP2 in bfloat16 against float32: gradient norm", abs(norm / ga.norm().item() - 1), 0.05)
    with torch.no_grad(), runtime.summoned(sliced):
        sliced.sample(pixels.to(DEVICE), prompts, draws)
    sliced.logps(batch).sum().backward()
    row("FSDP2: trains again after sampling with all weights", "yes", "yes", True)


def scripts(folder):
    """Both trainers, resumed and with adapters; mining; how far sampler and update differ."""
    policy = contest.tiny(16)
    hub.save_new(policy, folder / "base")
    records = contest.made_up(folder, policy, 32, 40)
    own, base, short = folder / "own.jsonl", ["--model", folder / "base"], ["--eval_split", "none", "--save_every", 2]
    runtime.write_jsonl(own, records)  # the same lines are pairs, sources and questions

    def call(title, *args, torchrun=False):
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"] if torchrun else []
        command, began = [sys.executable, *launch, *map(str, args)], time.time()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        last = (done.stderr.strip().splitlines() or [""])[-1]
        ok = done.returncode == 0 or "no mined answer can be used" in last
        row(title, f"{time.time() - began:.0f} s" if ok else last[-34:], "exit 0", ok)

    def steps(run):
        return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]

    for title, more in (("train_mfpo", []), ("train_mfpo, adapters", ["--lora_rank", 4, "--recompute", "True"])):
        run = folder / title[-8:]
        flags = ["--data", own, "--out", run, "--epochs", 1, "--pairs_per_step", 8, "--pairs_per_gpu", 4]
        call(title, "train_mfpo.py", *base, *flags, *short, *more, torchrun=not more)
        straight = steps(run)[-1]["loss"]
        for gone in [*sorted(run.glob("step_*"))[-1:], run / "final"]:
            shutil.rmtree(gone)
        call(f"{title}, resumed", "train_mfpo.py", "--resume", run)
        below(f"{title}: last loss, resumed against straight", abs(steps(run)[-1]["loss"] - straight), 1e-3)
    flags = ["--source", own, "--out", folder / "mined.jsonl", "--steps", 2, "--max_new_tokens", 8]
    call("build_data mbpo (of random weights no answer need be usable)", "build_data.py", "mbpo", *base, *flags)
    flags = ["--data", own, "--questions", own, "--out", folder / "mbpo", "--steps", 3, "--recompute", "True"]
    call("train_mbpo", "train_mbpo.py", *base, *flags, "--groups_per_step", 8, "--groups_per_gpu", 4, *short)
    below("train_mbpo: sampler and update differ by, nats", steps(folder / "mbpo")[0]["sampler_gap"], 0.5, ".3f")


def speed(folder):
    """7B with adapters: seconds, share of the matrix rate, peak memory against the plan; a checkpoint."""
    policy = big(64)
    optimizer = runtime.adamw(policy, 0.0)
    for name in cudnn(True, False):
        for pairs, again in ((1, True), (2, False), (4, False)):
            try:
                most = timed(f"7B adapters, {name}", policy, optimizer, pairs, again)
            except torch.OutOfMemoryError:
                row(f"7B adapters, {name}, {pairs} pairs, recompute {again}", "out of memory")
                continue
            config = bench.PlanConfig(gpus=1, lora_rank=64, per_gpu=pairs, recompute=again, answer=100)
            planned = sum(bench.plan(config)[1]["MFPO"]["memory"].values()) / 1e9
            row("   peak memory, GB", f"{most:.1f}", f"plan {planned:.1f}", SMALL or abs(most / planned - 1) < 0.1)
        recompute(policy, True)
        stalls = []
        for answer in (101, 102, 103, 104):  # lengths not seen before: what a real epoch has in almost every pass
            first, took, _ = measured(stepper(policy, optimizer, 1, answer), 1)
            stalls.append(first - took)
        text, ok = " ".join(f"{stall:.2f}" for stall in stalls), SMALL or max(stalls[1:]) < 0.05
        row(f"a length not seen before costs, s, {name}", text, "< 0.05, but the first", ok)

    def host():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6

    before, began = host(), time.time()
    runtime.save_checkpoint(folder, 1, policy, optimizer, "x")
    size, more = sum(f.stat().st_size for f in folder.rglob("*.safetensors")) / 1e9, host() - before
    text, ok = f"{size:.1f}, {time.time() - began:.1f}, {more:.1f}", SMALL or more < 1.5 * size
    row("checkpoint: GB, s, host memory beyond before, GB", text, "memory < 1.5 x size", ok)
    if not CUDA:
        return
    recompute(policy, False)
    step = stepper(policy, optimizer, 2)
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    events, shares = profiler.key_averages(), []
    kinds = "gemm nvjet tensorop xmma", "fmha flash sdpa attention", "Memcpy copy cat index", "elementwise reduce"
    for words in kinds:
        spent = sum(e.self_device_time_total for e in events if any(word in e.key for word in words.split()))
        shares.append(f"{words.split()[0]} {100 * spent / sum(e.self_device_time_total for e in events):.0f}")
    row("GPU time by kind, %, 2 pairs", ", ".join(shares))
    print(events.table(sort_by="self_device_time_total", row_limit=25, max_name_column_width=70))


def full(_):
    """7B's width, 8 layers, all weights: the same."""
    next(cudnn(False))
    policy = big(0, 8)
    optimizer = runtime.adamw(policy, 0.0)
    for pairs, again in ((2, True), (2, False), (4, False)):
        timed("7B widths, 8 layers, all weights", policy, optimizer, pairs, again)


def rollout(_):
    """Milliseconds a sampled token, greedy answers, a step of the attack."""
    policy, tokens = big(64), 16
    prompts = [[7] * 5 + [policy.image_id] * policy.encoding.image_tokens + [8] * n for n in (50, 55)]
    shape = 3, policy.image_size, policy.image_size
    pixels, draws = torch.rand(2, *shape, device=DEVICE), torch.rand(2, 8, tokens, dtype=torch.float64)
    policy.unsayable.append(policy.tokenizer.eos_token_id)  # all answers go to the end

    def a_token(title, work, repeats):
        first, took, _ = measured(work, repeats)
        text, ok = f"{first:.2f} s, {1e3 * took / tokens:.1f} ms a token", SMALL or took / tokens < 0.04
        row(f"{title} of {tokens} tokens: first, again", text, "< 40 ms a token", ok)

    for name in cudnn(True, False):
        for again in (False, True):
            recompute(policy, again)
            sample = functools.partial(policy.sample, pixels, prompts, draws)
            a_token(f"{name}, recompute {again}: 2 x 8 answers", sample, 2)
    next(cudnn(False))
    recompute(policy, False)
    policy.requires_grad_(False)
    for count in (2, 4) if SMALL else (4, 32):
        images, many = torch.rand(count, *shape, device=DEVICE), prompts * (count // 2)
        a_token(f"greedy: {count} answers", functools.partial(policy.generate, images, many, tokens), 1)
    rows = [data.Row(prompt, [[9] * 100]) for prompt in prompts * 2]
    pixels = torch.randint(0, 256, (4, *shape), device=DEVICE).float() / 255
    noise = torch.rand_like(pixels) * 2 - 1
    attack = functools.partial(build_data.attack_images, policy, rows, pixels, noise, 4 / 255, 1 / 255, 3)
    _, took, most = measured(attack, 1)
    row("attack, 4 images: s a step, peak GB", f"{took / 3:.3f}, {most:.1f}", "< 0.5, < 40", SMALL or took < 1.5)
    made = attack()
    below("attack: levels beyond its ball of 4", 255 * (made - pixels).abs().max().item() - 4, 1e-3)
    below("attack: off 8 bits, levels", (made * 255 - (made * 255).round()).abs().max().item(), 1e-3)
    below("attack: share of pixels that did not move", (made == pixels).float().mean().item(), 0.5)


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
        next(cudnn("cuDNN" in name))
        q, k, v = (torch.randn(count, heads, dim, device=DEVICE, dtype=HALF, requires_grad=True) for _ in range(3))
        with torch.no_grad():
            off = attend(q, k, v) - packed(q.float(), k.float(), v.float())
        below(f"{name}: off from the model's in float32", off.abs().max().item(), 3e-2)
        first, took, _ = measured(lambda f=attend, x=(q, k, v): f(*x).sum().backward(), 10)
        row(f"{name}: both ways of a layer", f"{1e3 * took:.2f} ms (first {1e3 * first:.0f})", "the least")
    if CUDA:  # what fusing norms, rotary embedding and activation is worth
        next(cudnn(False))
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
