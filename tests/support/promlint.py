"""What `promtool check metrics` would say of a page of metrics: its rules (Prometheus, util/promlint), as they stand.

Prometheus is not a package that pip has; where its promtool is installed, tests ask it too.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from prometheus_client.parser import text_string_to_metric_families

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client import Metric

NOT_BASE = {
    **dict.fromkeys(("milliseconds", "microseconds", "nanoseconds", "minutes", "hours", "days", "weeks"), "seconds"),
    **dict.fromkeys(("kilobytes", "megabytes", "gigabytes", "kibibytes", "mebibytes", "gibibytes", "bits"), "bytes"),
    **dict.fromkeys(("percent", "percents", "percentage"), "ratio"),
}
ABBREVIATIONS = {
    *("s", "ms", "us", "ns", "sec", "secs", "msec", "usec", "min", "mins", "hr", "hrs"),
    *("b", "kb", "mb", "gb", "tb", "pb", "m", "h", "d", "pct", "num", "cnt", "ts", "avg", "max", "min"),
}
TYPES = {"counter", "gauge", "histogram", "summary"}


def faults_of(page: str) -> list[str]:
    """Every breach of a rule; empty when there is none."""
    families = {family.name: family for family in text_string_to_metric_families(page)}
    found: list[str] = []
    # The parser makes every counter's name end with _total and then takes it off: the page itself says how it is.
    for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", page, re.MULTILINE):
        family = families[name.removesuffix("_total") if kind == "counter" else name]
        found += [f"{name}: {fault}" for fault in _faults(name, kind, family)]
    series = [(s.name, tuple(sorted(s.labels.items()))) for family in families.values() for s in family.samples]
    return found + [f"{name}{labels}: twice" for name, labels in {s for s in series if series.count(s) > 1}]


def _faults(name: str, kind: str, family: Metric) -> Iterator[str]:
    labels = {label for sample in family.samples for label in sample.labels}
    words = name.split("_")
    if not family.documentation:
        yield "no help text"
    if kind not in TYPES:
        yield "no type"
    if (kind == "counter") != name.endswith("_total"):
        yield "a counter, and nothing else, ends with _total"
    if not all(re.fullmatch(r"[a-z][a-z0-9_]*", text) for text in (name, *labels)):
        yield "not snake_case"
    yield from (f"{word} is its type" for word in words if word in TYPES)
    yield from (f"write {NOT_BASE[word]}, not {word}" for word in words if word in NOT_BASE)
    yield from (f"{word} is an abbreviation" for word in words if word in ABBREVIATIONS)
    if kind != "histogram" and (name.endswith(("_bucket", "_count", "_sum")) or {"le", "quantile"} & labels):
        yield "looks like a histogram"
