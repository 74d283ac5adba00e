"""The contest: what is timed is the same work."""

import json
import re

import pytest
import torch
from conftest import run_here

from extras import contest
from extras.contest import MFPO, TEXT, Runner


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    config = contest.Config(batch=3, words=8, questions=2, group=3, repeats=1)
    return contest.World(config, tmp_path_factory.mktemp("contest"))


@pytest.mark.parametrize("settings", [TEXT, MFPO])
def test_our_step_and_the_plain_one_end_at_the_same_weights(world, settings):
    ours, plain = Runner(world), Runner(world)
    for pick in ([0, 1, 2], [3, 4, 5]):
        first, second = contest.pairs(ours, settings, True, pick), contest.pairs(plain, settings, False, pick)
        assert first.item() == pytest.approx(second.item(), abs=1e-5) and abs(first.item() - 0.6931) > 1e-3
    theirs = dict(plain.policy.named_parameters())
    moved = 0.0
    start = dict(world.models()[0].named_parameters())
    for name, parameter in ours.policy.named_parameters():
        assert (parameter - theirs[name]).abs().mean() < 1e-6, name
        moved = max(moved, (parameter - start[name]).abs().max().item())
    assert moved > 1e-5  # AdamW moves every weight by about its learning rate


def test_both_attacks_find_the_same_image(world):
    ours, plain = (contest.attack(Runner(world), own, [0, 1]) for own in (True, False))
    assert (ours != plain).float().mean() < 1e-3 and (ours - plain).abs().max() <= 2 / 255
    clean = world.pixels(world.models()[0], [0, 1])
    assert 0 < (ours - clean).abs().max() <= 4 / 255 + 1e-6


def test_both_samplers_answer_each_question_as_often(world):
    answers, _ = contest.sampling(Runner(world), True, [0, 1])
    theirs = contest.sampling(Runner(world), False, [0, 1])
    assert len(answers) == len(theirs) == 2 * 3 and max(map(len, answers)) <= 16
    assert theirs.shape[1] <= max(len(world.rows[i].prefix) for i in (0, 1)) + 16


def test_our_grpo_step_trains(world):
    runner = Runner(world)
    before = runner.policy.hf.lm_head.weight.clone()
    loss = contest.ours_grpo(runner, [0, 1])
    # Rewards that differ have advantages of mean 0, so that a first loss is the KL term alone: 0.04 k3, k3 > 0.
    assert 0 < loss.item() < 0.1
    moved = (runner.policy.hf.lm_head.weight - before).abs().max().item()
    assert 1e-6 < moved < 2e-5


def test_the_contest_is_printed_with_ratios_to_ours(monkeypatch, capsys, tmp_path):
    few = ("text-only DPO step", "GRPO step")
    contests = {name: dict(list(contest.CONTESTS[name].items())[:2]) for name in few}
    monkeypatch.setattr(contest, "CONTESTS", contests)
    sizes = ["--batch", 2, "--words", 6, "--questions", 1, "--group", 2, "--repeats", 1, "--json", tmp_path / "j.json"]
    assert run_here(monkeypatch, contest, *sizes) == 0
    lines = capsys.readouterr().out.splitlines()
    report = json.loads((tmp_path / "j.json").read_text())
    assert "Config(tokens=16, batch=2, words=6" in lines[1] and lines[-1] == f"wrote {tmp_path / 'j.json'}"
    rows = [(name, who) for name, contenders in report.items() for who in contenders]
    assert len(rows) == len(lines) - 3 >= 3
    for (name, who), line in zip(rows, lines[2:], strict=False):
        numbers = report[name][who]
        assert line.startswith(f"{name:19} {who:31} ") and f"{numbers['mb']:.1f} MB" in line
        assert numbers["seconds"] > 0 and 0 < float(re.search(r"(\d+) %   ", line)[1]) < 150
        assert ("first loss" in line) == (name.endswith(" step"))
        assert " 1.00 x [1.00, 1.00]" in line or who != "ours"
    # Two pairs of 3 to 6 words and an end a side, from half a word to all a word a token.
    both = report["text-only DPO step"]["ours"]
    assert 2 * 2 * 4 <= both["tokens_per_s"] * both["seconds"] <= 2 * 2 * 7
    grpo = report["GRPO step"]["ours"]
    assert grpo["tokens_per_s"] * grpo["seconds"] == pytest.approx(1 * 2 * 16)


def test_other_work_is_not_timed(world):
    broken = {"ours": (contest.pairs, TEXT, True), "plain": (contest.pairs, MFPO, False)}
    with pytest.raises(AssertionError, match="text-only DPO step: different losses"):
        contest.compete(world, "text-only DPO step", broken, 1e9)


def test_peak_memory_is_what_was_alive_together():
    def work(megabytes):
        first, second = torch.empty(1000, 1000), torch.empty(500, 1000)
        del first
        return torch.empty(megabytes, 250, 1000), second

    assert contest.peak_bytes(torch.device("cpu"), work, 1) == 6_000_000  # 4 + 2, then 2 + 1
    assert contest.peak_bytes(torch.device("cpu"), work, 9) == 11_000_000


def test_a_tiny_llava_sees_576_patches():
    policy = contest.tiny(576)
    assert policy.image_size == 336 and policy.encoding.image_tokens == 576
    with torch.no_grad():
        assert policy.vision(torch.rand(1, 3, 336, 336)).shape == (1, 576, 256)
