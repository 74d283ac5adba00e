"""Counts, values, intervals: against closed forms and plain loops."""

import math
import random

import numpy as np
import pytest

import tables
from tables import Counts, ratio


def counts(rows, **metrics):
    metrics = metrics or {"share": ("share, in all", ("a", "n"))}
    return Counts([{"a": float(a), "n": float(n)} for a, n in rows], metrics)


def test_ratios_of_numbers_and_arrays():
    assert ratio(1, 4) == 0.25 and math.isnan(ratio(1, 0)) and math.isnan(ratio(0, 0))
    shares = ratio([1, 2, 3], [2, 0, 4])
    assert shares[0] == 0.5 and math.isnan(shares[1]) and shares[2] == 0.75


def test_the_interval_of_a_proportion_is_that_of_the_normal_approximation():
    """400 images with one answer each, 120 right: 0.3 +- 1.96 sqrt(0.3 * 0.7 / 400)."""
    table = counts([(1, 1)] * 120 + [(0, 1)] * 280)
    summary = tables.summary(table)
    half = 1.96 * math.sqrt(0.3 * 0.7 / 400)
    assert summary["share"] == 0.3
    assert summary["interval"]["share"] == pytest.approx([0.3 - half, 0.3 + half], abs=0.006)


def test_the_interval_of_a_ratio_is_that_of_a_plain_loop():
    """Images with different numbers of answers: sums first, one division last."""
    rng, draw = random.Random(3), np.random.default_rng(5)
    rows = [(rng.randint(0, n), n) for n in (rng.randint(1, 9) for _ in range(50))]
    low, high = tables.summary(counts(rows))["interval"]["share"]
    array, drawn = np.array(rows, float), []
    for _ in range(4000):
        a, n = array[draw.integers(50, size=50)].sum(0)
        drawn.append(a / n)
    assert np.allclose([low, high], np.quantile(drawn, [0.025, 0.975]), atol=0.01)
    assert low < sum(a for a, _ in rows) / sum(n for _, n in rows) < high


def test_pairs_and_functions_agree():
    rows = [(1, 2), (0, 3), (2, 2)]
    table = counts(rows, pair=("pair", ("a", "n")), made=("made", lambda s: ratio(s["a"], s["n"])))
    summary = tables.summary(table)
    assert summary["pair"] == summary["made"] == 3 / 7
    assert summary["interval"]["pair"] == summary["interval"]["made"]


def test_undefined_is_none_and_said():
    table = counts([(0, 0), (0, 0)])
    summary = tables.summary(table)
    assert summary["share"] is None and summary["interval"]["share"] is None
    assert "undefined" in tables.table(table, {"": summary})
    assert tables.with_interval(np.array([math.nan, 1.0, 2.0])) == (None, None)
    assert tables.with_interval(np.array([1.0, math.nan, math.nan])) == (None, None)
    # Resamples in which there is nothing to divide by are left out, the others stay.
    value, interval = tables.with_interval(np.array([0.5, math.nan, 0.25, 0.25]))
    assert value == 0.5 and interval == [0.25, 0.25]


def test_one_image_has_no_spread():
    assert tables.summary(counts([(1, 2)]))["interval"]["share"] == [0.5, 0.5]


def test_the_difference_of_equal_counts_is_zero():
    rng = random.Random(0)
    table = counts([(rng.randint(0, 3), 3) for _ in range(40)])
    first, second, difference = tables.compare(table, table)["share"]
    assert first == second and difference == (0.0, [0.0, 0.0])


def test_the_difference_is_paired_and_b_less_a():
    """b answers one more in every image: the difference is certain, though both values are not."""
    rng = random.Random(0)
    rows = [(rng.randint(0, 3), 4) for _ in range(40)]
    a, b = counts(rows), counts([(right + 1, n) for right, n in rows])
    first, second, difference = tables.compare(a, b)["share"]
    assert first[1][0] < first[0] < first[1][1] and second[0] == pytest.approx(first[0] + 0.25)
    assert difference[0] == pytest.approx(0.25) and difference[1] == pytest.approx([0.25, 0.25])
    text, numbers = tables.compare_table(a, b, ("old.jsonl", "new.jsonl"))
    assert numbers["share"] == (first, second, difference)
    head, row, foot = text.splitlines()
    assert head.split() == ["old.jsonl", "new.jsonl", "difference"] and row.startswith("share, in all ")
    assert row.endswith("0.250 [0.250, 0.250]") and "the same 40 images for both" in foot


def test_the_draws_are_the_same_in_every_run():
    rows = [(n % 3, 3) for n in range(30)]
    assert tables.summary(counts(rows)) == tables.summary(counts(rows))


def test_yes_and_no_by_hand():
    pairs = [("Yes", "Yes"), ("Yes", "Yes"), ("No", "Yes"), ("Yes", "No"), ("No", "No"), ("No", "No"), ("No", "No")]
    rows = [tables.yes_no(truth, said, "x_") for truth, said in pairs]
    assert rows[2] == {"x_asked": 1.0, "x_tp": 0.0, "x_fp": 1.0, "x_fn": 0.0, "x_tn": 0.0}
    metrics = {name: (name, value) for name, value in tables.yes_no_metrics("x_").items()}
    summary = tables.summary(Counts(rows, metrics))
    # 2 of 3 that are there are said, 3 of 4 that are not are denied.
    assert summary["accuracy"] == 5 / 7 and summary["precision"] == 2 / 3 and summary["recall"] == 2 / 3
    assert summary["f1"] == pytest.approx(2 / 3) and summary["yes_ratio"] == 3 / 7


def test_a_table_of_several_columns_with_sums_and_notes():
    table = counts([(1, 2), (1, 2)], share=("share", ("a", "n")), mean=("mean", lambda s: s["n"] / 2))
    table.totals, table.notes, table.unit = ("n",), ["A note."], "scenes"
    assert table.sum("n") == 4
    before = {"share": None, "mean": None, "interval": {"share": None, "mean": None}}  # undefined
    lines = tables.table(table, {"base": before, "final": tables.summary(table)}).splitlines()
    assert lines[0].split() == ["base", "final"]
    assert lines[1].split() == ["share", "undefined", "0.500", "[0.500,", "0.500]"]
    assert lines[2].split() == ["mean", "undefined", "2.000", "[2.000,", "2.000]"]
    assert lines[3:] == ["n 4", "A note.", "95 % intervals: bootstrap over 2 scenes"]
    assert tables.table(table, {"": before}).splitlines()[0].startswith("share")  # one column needs no head
