"""The names of the metrics: by Prometheus' conventions, in the documentation, the dashboard and the alert rules."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import prometheus_client
import pytest
import yaml

from tests.support.promlint import faults_of
from worker.metrics import FinalState, Metrics
from worker.storage.tables import STATES, UNFINISHED_STATES

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
ALERTS = ROOT / "deploy" / "alerts.yml"
DASHBOARD = ROOT / "deploy" / "grafana-dashboard.json"


@pytest.fixture
async def metrics() -> Metrics:
    """The figures of a worker that has done nothing yet; in a loop, whose tasks one of them counts."""
    made = Metrics()
    made.runs.labels("following").set(1)
    return made


def families(metrics: Metrics) -> dict[str, prometheus_client.Metric]:
    """Each metric by the name it has on the page, without a histogram's suffixes."""
    suffix = {"counter": "_total", "info": "_info"}
    return {family.name + suffix.get(family.type, ""): family for family in metrics.registry.collect()}


def series(metrics: Metrics) -> dict[str, set[str]]:
    """The name of every series there is, with its labels."""
    found: dict[str, set[str]] = {}
    for family in metrics.registry.collect():
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def table(metrics: Metrics) -> str:
    """The table of docs/metrics.md."""
    lines = ["| name | type | labels | what it is |", "| --- | --- | --- | --- |"]
    for name, family in families(metrics).items():
        values: dict[str, list[str]] = {}
        for sample in family.samples:
            for label, value in sample.labels.items():
                values.setdefault(label, []).append(value)
        values.pop("le", None)
        closed = {label: f"`{label}`: {', '.join(found)}" for label, found in values.items()}
        if name in {"letta_ingest_runs", "letta_ingest_build_info"}:
            closed = {label: f"`{label}`" for label in values}
        lines.append(f"| `{name}` | {family.type} | {'; '.join(closed.values())} | {family.documentation} |")
    return "\n".join(lines)


async def test_conventions(metrics: Metrics) -> None:
    """Promise 4: every metric has help, a type, base units, and a name as Prometheus' own linter wants it."""
    page = prometheus_client.generate_latest(metrics.registry).decode()
    assert faults_of(page) == []
    assert all(name.startswith("letta_ingest_") for name in series(metrics))


@pytest.mark.parametrize(
    ("page", "fault"),
    [
        ("# TYPE a_seconds gauge\na_seconds 1\n", "no help text"),
        ("# HELP a A.\n# TYPE a counter\na 1\n", "ends with _total"),
        ("# HELP a_total A.\n# TYPE a_total gauge\na_total 1\n", "ends with _total"),
        ("# HELP a_milliseconds A.\n# TYPE a_milliseconds gauge\na_milliseconds 1\n", "write seconds"),
        ("# HELP a_ms A.\n# TYPE a_ms gauge\na_ms 1\n", "abbreviation"),
        ("# HELP a_gauge A.\n# TYPE a_gauge gauge\na_gauge 1\n", "is its type"),
        ("# HELP aB A.\n# TYPE aB gauge\naB 1\n", "snake_case"),
        ("# HELP a_count A.\n# TYPE a_count gauge\na_count 1\n", "histogram"),
        ("# HELP a A.\n# TYPE a gauge\na 1\na 1\n", "twice"),
    ],
    ids=lambda text: text.split("\n")[0][-20:],
)
def test_the_linter_finds_faults(page: str, fault: str) -> None:
    """The rules are rules: each is broken by a page that breaks it."""
    assert any(fault in found for found in faults_of(page)), faults_of(page)


async def test_promtool_agrees(metrics: Metrics) -> None:
    """Prometheus' own tool, where there is one, finds nothing to say of the metrics and of the alert rules."""
    if shutil.which("promtool") is None:
        pytest.skip("there is no promtool here (Debian: the package prometheus)")
    page = prometheus_client.generate_latest(metrics.registry)
    for what, said in ((["metrics"], page), (["rules", "--lint=all", "--lint-fatal", str(ALERTS)], b"")):
        words = ["promtool", "check", *what]
        done = await asyncio.to_thread(subprocess.run, words, input=said, capture_output=True, check=False, timeout=30)
        assert done.returncode == 0, done.stdout + done.stderr


async def test_the_table_is_complete(metrics: Metrics) -> None:
    """docs/metrics.md lists every metric as it is, and no other."""
    page = (ROOT / "docs" / "metrics.md").read_text()
    found = re.search(r"^\| name \| type \|.*?(?=\n\n)", page, re.MULTILINE | re.DOTALL)
    assert found is not None
    assert found[0] == table(metrics), f"docs/metrics.md should hold:\n\n{table(metrics)}"


def test_states_are_those_of_the_store() -> None:
    """A run ends in one of the states the schema knows."""
    assert set(get_args(FinalState)) == set(STATES) - set(UNFINISHED_STATES)


def alert_rules() -> list[dict[str, Any]]:
    """The rules of deploy/alerts.yml."""
    rules: list[dict[str, Any]] = []
    for group in yaml.safe_load(ALERTS.read_text())["groups"]:
        rules += group["rules"]
    return rules


def panels() -> list[dict[str, Any]]:
    """The panels of the dashboard."""
    found: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    return found


def expressions() -> Iterator[str]:
    """All PromQL there is."""
    yield from (rule["expr"] for rule in alert_rules())
    yield from (target["expr"] for panel in panels() for target in panel.get("targets", []))


async def test_dashboard_and_alerts_use_what_there_is(metrics: Metrics) -> None:
    """Every series, every label and every value of one that a rule or a panel asks for is one the worker has."""
    known, used = series(metrics), set[str]()
    states = {"runs": set(STATES)}
    values = {
        name: {value for sample in family.samples for value in sample.labels.values()} | states.get(name[13:], set())
        for name, family in families(metrics).items()
    }
    for expression in expressions():
        for name, selector in re.findall(r"\b(letta_ingest_\w+)(?:\{([^}]*)\})?", expression):
            assert name in known, f"{name} in {expression}"
            used.add(re.sub("_(bucket|sum|count)$", "", name))
            for label, value in re.findall(r'(\w+)=~?"([^"]*)"', selector):
                if label not in {"instance", "job"}:
                    assert label in known[name], f"{label} in {expression}"
                    assert set(value.split("|")) <= values[name], f"{value} in {expression}"
        for grouping in re.findall(r"by \(([^)]*)\)", expression):
            labels = {"instance", "job"}.union(*known.values())
            assert set(grouping.replace(" ", "").split(",")) <= labels, expression
    assert families(metrics).keys() - used == {"letta_ingest_tasks"}, "nobody looks at it"


def test_alerts_say_what_to_do() -> None:
    """An alert has a name, a severity, a summary and a description, and most wait before they wake anybody."""
    for rule in alert_rules():
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}, rule
        assert rule["labels"]["severity"] in {"page", "ticket"}
        assert rule["annotations"].keys() == {"summary", "description"}
        assert rule.get("for") or "[" in rule["expr"], f"{rule['alert']} would come and go"


def test_panels_fit() -> None:
    """No two panels of the dashboard lie upon each other, and each has an id and a title of its own."""
    squares = [
        (x, y)
        for panel in panels()
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(squares) == len(set(squares))
    assert max(x for x, _ in squares) < 24
    for key in ("id", "title"):
        assert len({panel[key] for panel in panels()}) == len(panels())
