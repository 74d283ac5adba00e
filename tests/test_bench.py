"""The contest of bench.py: what is timed is the same work."""

import re

import pytest
import torch
from conftest import run_here

import bench


@pytest.fixture(scope="module")
def contest(tmp_path_factory):
    config = bench.Config(speed=True, batch=3, words=8, questions=2, group=3, sampled=4)
    return bench.World(config, tmp_path_factory.mktemp("contest"))


@pytest.mark.parametrize("image", [False, True])
def test_our_step_and_the_plain_one_end_at_the_same_weights(contest, image):
    ours, plain = bench.Ours(contest, image), bench.Plain(contest, image)
    for pick in ([0, 1, 2], [3, 4, 5]):
        first, second = ours.step(pick), plain.step(pick)
        assert first.item() == pytest.approx(second.item(), abs=1e-5) and abs(first.item() - 0.6931) > 1e-3
    theirs = dict(plain.policy.named_parameters())
    moved = 0.0
    start = dict(contest.policy().named_parameters())
    for name, parameter in ours.policy.named_parameters():
        assert (parameter - theirs[name]).abs().mean() < 1e-6, name
        moved = max(moved, (parameter - start[name]).abs().max().item())
    assert moved > 1e-5  # AdamW moves every weight by about its learning rate


def test_both_attacks_find_the_same_image(contest):
    ours, plain = (bench.Attack(contest, ours).step([0, 1]) for ours in (True, False))
    assert (ours != plain).float().mean() < 1e-3 and (ours - plain).abs().max() <= 2 / 255


def test_the_contest_is_printed_with_ratios_to_ours(contest, capsys, monkeypatch):
    few = {"text-only DPO step": {"ours": lambda w: bench.Ours(w, False), "plain": lambda w: bench.Plain(w, False)}}
    monkeypatch.setattr(bench, "contests", lambda config: few)
    monkeypatch.setattr(bench, "World", lambda config, folder: contest)
    bench.speed(bench.Config(speed=True, batch=3, words=8, repeats=2))
    told = capsys.readouterr().out.splitlines()
    assert " 1.00 x [1.00, 1.00]" in told[1] and "plain" in told[2] and "first loss" in told[2]
    assert "tokens/s" in told[2] and 0 < float(re.search(r"(\d+) %   ", told[2])[1]) < 150
    broken = {"ours": few["text-only DPO step"]["ours"], "plain": lambda w: bench.Plain(w, True)}
    monkeypatch.setattr(bench, "contests", lambda config: {"text-only DPO step": broken})
    with pytest.raises(ValueError, match="compute different losses"):
        bench.speed(bench.Config(speed=True, batch=3, words=8, repeats=1))


def test_peak_memory_is_what_was_alive_together():
    def work(megabytes):
        first, second = torch.empty(1000, 1000), torch.empty(500, 1000)
        del first
        return torch.empty(megabytes, 250, 1000), second

    assert bench.peak_bytes(torch.device("cpu"), work, 1) == 6_000_000  # 4 + 2, then 2 + 1
    assert bench.peak_bytes(torch.device("cpu"), work, 9) == 11_000_000


def test_flops_are_counted():
    a, b = torch.randn(3, 5), torch.randn(5, 7)
    assert bench.flops_of(torch.matmul, a, b) == 2 * 3 * 5 * 7


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_step_of_a_models_size(world, lora_rank, monkeypatch, capsys):
    flags = ["--question", 20, "--answer", 5, "--per_gpu", 2, "--repeats", 1, "--lora_rank", lora_rank]
    assert run_here(monkeypatch, bench, "--step", "--model", world / "base", *flags) == 0
    told = capsys.readouterr().out
    # Two pairs: a row of image, question and two answers, and one of image, question and one.
    assert f"{2 * (16 + 20 + 10) + 2 * (16 + 20 + 5)} tokens" in told
    assert 0 < float(re.search(r"([\d.]+) % utilisation", told)[1]) < 150
