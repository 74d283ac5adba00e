"""
Counts -> values with intervals -> a table, a paired difference.

What was measured turns into counts, one row for each image, and each metric is a function of the sums of these
rows: so an interval is a bootstrap over images, and the difference of two models one over the same images.
"""

import math
from dataclasses import dataclass, field

import numpy as np

RESAMPLES = 1000


def ratio(a, b):
    """a / b; nan where there is nothing to divide by. Of numbers or arrays."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    return np.where(b > 0, a / np.where(b > 0, b, 1), math.nan)[()]


@dataclass
class Counts:
    """What was counted, and what to make of it."""

    rows: list  # of {name: float}, one for each image
    metrics: dict  # name -> (title, value): value is a pair of names, sum over sum, or a function of {name: sum}
    notes: list = field(default_factory=list)  # sentences below the table
    totals: tuple = ()  # names of sums that the table tells too
    unit: str = "images"  # what a row is of

    def sum(self, name):
        return sum(row.get(name, 0.0) for row in self.rows)


def value_of(metric, sums):
    """A metric's value from {name: sum}, numbers or arrays."""
    return metric(sums) if callable(metric) else ratio(*(sums[name] for name in metric))


def yes_no(truth, said, prefix=""):
    """The counts of one yes/no answer, as floats, yes being positive."""
    kind = ("t" if said == truth else "f") + ("p" if said == "Yes" else "n")
    return {f"{prefix}{name}": float(name in ("asked", kind)) for name in ("asked", "tp", "fp", "fn", "tn")}


def yes_no_metrics(p=""):
    """POPE's five numbers as functions of the sums of `yes_no` under a prefix."""
    return {
        "accuracy": lambda s: ratio(s[f"{p}tp"] + s[f"{p}tn"], s[f"{p}asked"]),
        "precision": lambda s: ratio(s[f"{p}tp"], s[f"{p}tp"] + s[f"{p}fp"]),
        "recall": lambda s: ratio(s[f"{p}tp"], s[f"{p}tp"] + s[f"{p}fn"]),
        "f1": lambda s: ratio(2 * s[f"{p}tp"], 2 * s[f"{p}tp"] + s[f"{p}fp"] + s[f"{p}fn"]),
        "yes_ratio": lambda s: ratio(s[f"{p}tp"] + s[f"{p}fp"], s[f"{p}asked"]),
    }


def values(counts):
    """{metric: (RESAMPLES + 1,) array}: the value, then its resamples; which rows are drawn depends on their number."""
    count = len(counts.rows)
    picks = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    picks = np.vstack([np.ones(count), picks])  # how often each row is taken; first, each once
    names = {name for row in counts.rows for name in row}
    sums = {name: picks @ np.array([row.get(name, 0.0) for row in counts.rows]) for name in names}
    with np.errstate(invalid="ignore"):
        return {name: value_of(metric, sums) for name, (_, metric) in counts.metrics.items()}


def with_interval(drawn):
    """(RESAMPLES + 1,) -> value and 95 % interval as floats, None where undefined."""
    if np.isnan(drawn[0]) or np.isnan(drawn[1:]).all():
        return None, None
    return float(drawn[0]), np.nanquantile(drawn[1:], (0.025, 0.975)).tolist()


def summary(counts):
    """{metric: value} with {"interval": {metric: [low, high]}}: what is written as JSON; undefined is null."""
    pairs = {name: with_interval(drawn) for name, drawn in values(counts).items()}
    intervals = {name: interval for name, (_, interval) in pairs.items()}
    return {name: value for name, (value, _) in pairs.items()} | {"interval": intervals}


def lines_of(metrics, titles, rows, width):
    """Titles of columns (none for a lone unnamed one), then a line a metric: {name: [(value, interval)]}."""
    first = 2 + max(len(title) for title, _ in metrics.values())
    lines = [" " * first + "".join(title.rjust(width) for title in titles)] if any(titles) else []
    for name, cells in rows.items():
        line = metrics[name][0].ljust(first)
        for value, interval in cells:
            text = "undefined" if value is None else f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"
            line += text.rjust(width)
        lines.append(line)
    return lines


def table(counts, columns):
    """Summaries side by side, columns = {title: summary}, with sums and notes below."""
    rows = {}
    for name in counts.metrics:
        rows[name] = [(summary[name], summary["interval"][name]) for summary in columns.values()]
    lines = lines_of(counts.metrics, columns, rows, 26)
    if counts.totals:
        lines.append(", ".join(f"{name.replace('_', ' ')} {counts.sum(name):.0f}" for name in counts.totals))
    return "\n".join([*lines, *counts.notes, f"95 % intervals: bootstrap over {len(counts.rows)} {counts.unit}"])


def compare(a, b):
    """{metric: (value of a, of b, of b - a)}, each with its interval; the same rows are drawn for both."""
    one, two = values(a), values(b)
    return {n: tuple(with_interval(d) for d in (one[n], two[n], two[n] - one[n])) for n in one if n in two}


def compare_table(a, b, names):
    """The table of two counts over the same rows, with the paired difference, and its numbers."""
    numbers = compare(a, b)
    lines = lines_of(a.metrics, [*names, "difference"], numbers, 28)
    foot = f"95 % intervals: bootstrap over the same {len(a.rows)} {a.unit} for both"
    return "\n".join([*lines, foot]), numbers
