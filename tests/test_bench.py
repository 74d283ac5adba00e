"""What a run needs against sums made elsewhere, and a step of a model's size on this machine."""

import re

import pytest
import torch
from conftest import finished, forked, refused, run_here
from transformers import LlavaForConditionalGeneration

import bench
import hub
import runtime
import warmup

STEP = ["--question", 20, "--answer", 5, "--per_gpu", 2, "--repeats", 1]
# Two pairs: a row of image, question and two answers, and one of image, question and one.
TOKENS = 2 * (16 + 20 + 10) + 2 * (16 + 20 + 5)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "base"
    hub.save_new(warmup.build_policy(0), folder)
    return folder


def test_the_plan_against_sums_made_elsewhere():
    """Per GPU of 8, in GiB, as worked out by hand for 800 tokens, 3 rows a record: state 13.2 and 24.9, and so on."""
    for name, state, gathered, full in (("7b", 13.2, 3.1, 13.2), ("13b", 24.9, 4.5, 24.9)):
        size, plans = bench.plan(bench.PlanConfig(model=name))
        memory = {part: value / 2**30 for part, value in plans["MFPO"]["memory"].items()}
        assert memory["weights"] + memory["gradients"] + memory["optimiser"] == pytest.approx(state, rel=0.04)
        assert memory["gathered"] + memory["gradients in flight"] == pytest.approx(gathered, rel=0.08)
        assert 2 * size["all"] / 2**30 == pytest.approx(full, rel=0.01)
    size, _ = bench.plan(bench.PlanConfig(model="7b"))
    assert size["all"] == 7_063_427_072  # LLaVA-1.5-7B as the hub counts it
    with_lora, _ = bench.plan(bench.PlanConfig(model="7b", gpus=1, lora_rank=64))
    per_layer = 64 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
    assert with_lora["trained"] == 32 * per_layer + 64 * (1024 + 4096 + 4096 + 4096)


def test_the_printed_plan(monkeypatch, capsys):
    """The table of commit 71098b4, in which its numbers were checked."""
    assert run_here(monkeypatch, bench, "plan", "--model", "7b", "--gpus", 8) == 0
    text = capsys.readouterr().out
    assert text.startswith(
        "7b: 7.06 billion parameters, 6.760 trained (all weights but the vision tower's), on 8 GPU(s)"
    )
    table = {line[:30].strip(): line[30:].split() for line in text.splitlines()[2:]}
    assert table["GB of one GPU"] == ["MFPO", "MBPO"]
    assert table["weights"] == ["3.5", "3.5"] and table["optimiser"] == ["6.8", "6.8"]
    assert table["sampling beyond the update"] == ["0.0", "10.7"] and table["reference"] == ["0.0", "1.8"]
    assert table["activations"] == ["1.4", "0.8"] and table["together"] == ["18.6", "30.4"]
    assert table["TFLOP a record (or group)"] == ["96.2", "57.1"] and table["a second, 40% of peak"] == ["32.9", "55.4"]
    flags = ["--model", "7b", "--gpus", 1, "--lora_rank", 64, "--recompute", "False"]
    assert run_here(monkeypatch, bench, "plan", *flags) == 0
    text = capsys.readouterr().out
    assert "7.22 billion parameters, 0.161 trained (adapters of rank 64)" in text
    table = {line[:30].strip(): line[30:].split() for line in text.splitlines()[2:]}
    assert table["activations"] == ["14.9", "8.1"] and table["together"] == ["32.3", "25.4"]
    assert table["casts"] == ["0.3", "0.3"] and table["a second, 40% of peak"] == ["8.0", "11.5"]


def test_flops_are_counted():
    a, b = torch.randn(3, 5), torch.randn(5, 7)
    assert bench.flops_of(torch.matmul, a, b) == 2 * 3 * 5 * 7


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_step_of_a_models_size(base, lora_rank, monkeypatch, capsys):
    flags = ["--model", base, *STEP, "--lora_rank", lora_rank]
    assert run_here(monkeypatch, bench, "step", *flags) == 0
    text = capsys.readouterr().out
    assert f"{base} on 1 cpu, 2 pairs each, {TOKENS} tokens" in text
    assert 0 < float(re.search(r"([\d.]+) % utilisation", text)[1]) < 150


def test_a_step_of_two_processes(base, tmp_path):
    log = tmp_path / "log"
    assert finished(forked(bench, "step", "--model", base, *STEP, processes=2, log=log)) == [0, 0]
    assert f"on 2 cpu, 2 pairs each, {TOKENS} tokens" in log.read_text()


def check_random(rank):
    """In each of two processes: what no file holds, norms and biases are as in a model that was built with memory."""
    runtime.start()
    architecture = warmup.build_policy(0).hf.config
    built = LlavaForConditionalGeneration(architecture)
    policy = bench.random_policy(architecture, torch.device("cpu"), lora_rank=2)
    buffers, right = dict(policy.hf.named_buffers()), dict(built.named_buffers())
    assert buffers.keys() == right.keys() and len(right) >= 2
    assert all(torch.equal(buffers[name], value) for name, value in right.items())
    assert policy.mean.flatten().tolist() == pytest.approx([0.4815, 0.4578, 0.4082], abs=1e-4)  # CLIP's
    right = dict(built.named_parameters())
    for name, p in policy.hf.named_parameters():
        assert hasattr(p, "full_tensor") == (runtime.world() > 1)
        full = (p.full_tensor() if hasattr(p, "full_tensor") else p).detach()
        if p.ndim > 1:
            assert full.std() == pytest.approx(0.02, rel=0.2), name
        elif not name.endswith("class_embedding"):  # random in a model that was built
            assert torch.equal(full, right[name]), name
    bench.mfpo_step(policy, runtime.adamw(policy, 0.0), bench.random_pairs(policy, 1, 20, 5))


@pytest.mark.parametrize("processes", [0, 2])
def test_a_random_policy_is_a_models(processes, tmp_path):
    children = forked(bench, "plan", "--model", "7b", processes=processes, log=tmp_path / "log", before=check_random)
    assert finished(children) == [0] * (processes or 1), (tmp_path / "log").read_text()


def test_recomputing_is_the_same_step(base):
    """Of the same random numbers, with and without: the same weights after a step."""
    ends = []
    for again in (False, True):
        torch.manual_seed(0)
        policy = bench.random_policy(bench.llava(base), torch.device("cpu"), 0, again)
        packed = bench.random_pairs(policy, 1, 20, 5)
        assert len(packed.ids) == TOKENS / 2 and packed.answer_mask.sum() == 15
        bench.mfpo_step(policy, runtime.adamw(policy, 0.0), packed)
        ends.append(policy.hf.lm_head.weight.detach())
    assert torch.equal(*ends)
    torch.manual_seed(0)
    start = bench.random_policy(bench.llava(base), torch.device("cpu")).hf.lm_head.weight
    assert 0 < (ends[0] - start).abs().max() < 2e-5  # AdamW moves a weight by about its learning rate, 1e-5


def test_what_cannot_be_planned_is_refused(monkeypatch, capsys):
    for flags, words in (
        (["plan", "--question", 5], "--question 5: a prompt has 10 tokens at least"),
        (["plan", "--gpus", 0], "--gpus must be positive, got 0"),
        (["step", "--repeats", -1], "--repeats must be positive, got -1"),
        (["step", "--lora_rank", -1], "--lora_rank must not be negative, got -1"),
        (["plan", "--repeats", 3], "unknown argument '--repeats'"),
        (["--plan", "--model", "7b"], "--plan is gone: it is now python bench.py plan"),
        (["--step"], "--step is gone: it is now python bench.py step"),
        (["--speed", "--batch", 2], "--speed is gone: it is now python -m extras.contest"),
        ([], "needs what to do first: plan | step"),
    ):
        assert words in refused(monkeypatch, capsys, bench, *flags)
