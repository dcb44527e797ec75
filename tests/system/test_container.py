"""The image's and Kubernetes' files, as far as they can be held against the worker without a container runtime."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import yaml

from tests.support.shell import SECRET, Shell, free_address
from worker import config, monitor, service, unit
from worker.demo.fake_letta import FakeLetta
from worker.storage import engine

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

DEPLOY = Path(__file__).parents[2] / "deploy"
CONTAINERFILE = (DEPLOY / "Containerfile").read_text()
OBJECTS: dict[str, Any] = {
    found["kind"]: found for found in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
}
POD = OBJECTS["Deployment"]["spec"]["template"]["spec"]
(WORKER,) = POD["containers"]
PROBES = [WORKER[name] for name in ("startupProbe", "livenessProbe", "readinessProbe")]


@pytest.fixture
async def letta() -> AsyncIterator[FakeLetta]:
    """A fake server that asks for a key."""
    async with FakeLetta(keepalive_interval=0.2, password=SECRET, seed=1) as server:
        yield server


def instruction(name: str) -> str:
    """What the last such instruction of the Containerfile says."""
    found: list[str] = re.findall(rf"^{name} (.*)$", CONTAINERFILE, re.MULTILINE)
    return found[-1]


async def test_the_pod_works(letta: FakeLetta, database_url: str, tmp_path: Path) -> None:
    """The ConfigMap's file and the Secret's values make a worker that answers every probe with 200 (promise 4)."""
    shell = Shell(letta, tmp_path, database_url)
    shell.listen = free_address()
    key_file = tmp_path / "key"
    key_file.write_text(SECRET)
    text = OBJECTS["ConfigMap"]["data"]["config.toml"]
    for was, becomes in (("http://letta:8283", letta.url), ("/run/secrets/letta-ingest/api-key", str(key_file))):
        assert text.count(was) == 1
        text = text.replace(was, becomes)
    (variable,) = [entry["name"] for entry in WORKER["env"]]
    (listen, _) = instruction("ENV").split("=")
    environ = {variable: database_url, listen: shell.listen}
    (migrate,) = POD["initContainers"]
    assert (await shell.do(migrate["args"][0], config=text, environ=environ)).code == 0
    life = shell.start(json.loads(instruction("CMD"))[0], config=text, environ=environ)
    run = letta.new_run()
    run.say("hello")
    run.complete()
    await shell.until_logged(life, "run.finished")
    async with httpx.AsyncClient(base_url=f"http://{shell.listen}", trust_env=False) as client:
        for probe in PROBES:
            assert (await client.get(probe["httpGet"]["path"])).status_code == 200
    assert await shell.stop(life) == 0


def test_times_and_ports_are_the_workers() -> None:
    """Grace period, probe time-outs and port are those the worker goes by."""
    assert POD["terminationGracePeriodSeconds"] >= service.DRAIN_SECONDS + 2 * engine.GOODBYE_SECONDS + 5
    assert all(probe.get("timeoutSeconds", 1) > monitor.ANSWER_SECONDS for probe in PROBES[1:])
    liveness = WORKER["livenessProbe"]
    assert liveness["periodSeconds"] * liveness["failureThreshold"] >= 60
    port = config.Service().listen.rpartition(":")[2]
    assert instruction("ENV").endswith(f"=0.0.0.0:{port}")
    assert instruction("EXPOSE") == port
    assert WORKER["ports"] == [{"name": "http", "containerPort": int(port)}]
    assert {probe["httpGet"]["port"] for probe in PROBES} == {"http"}


def test_one_at_a_time() -> None:
    """One worker, and the old one goes before the new one comes."""
    spec = OBJECTS["Deployment"]["spec"]
    assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})
    assert spec["selector"]["matchLabels"] == spec["template"]["metadata"]["labels"]


def test_secrets_are_secrets() -> None:
    """I10: key and database URL are in the Secret, and nothing else refers to one that is not there."""
    secrets = OBJECTS["Secret"]["stringData"]
    assert secrets.keys() == {"api-key", "database-url"}
    volumes = {volume["name"]: volume for volume in POD["volumes"]}
    assert [item["key"] for item in volumes["key"]["secret"]["items"]] == ["api-key"]
    assert [entry["valueFrom"]["secretKeyRef"]["key"] for entry in WORKER["env"]] == ["database-url"]
    names = {OBJECTS["Secret"]["metadata"]["name"], OBJECTS["ConfigMap"]["metadata"]["name"]}
    assert names == {volumes["key"]["secret"]["secretName"], volumes["config"]["configMap"]["name"]}
    assert {mount["name"] for mount in WORKER["volumeMounts"]} == set(volumes)
    assert not any(value in OBJECTS["ConfigMap"]["data"]["config.toml"] for value in secrets.values())


def test_the_image_runs_the_worker() -> None:
    """The image starts `run` with the configuration where the Pod mounts it, as a user without privileges."""
    assert json.loads(instruction("ENTRYPOINT")) == [unit.EXECUTABLE]
    assert json.loads(instruction("CMD")) == ["run", "--config", unit.CONFIG]
    assert POD["initContainers"][0]["args"] == ["migrate", "--config", unit.CONFIG]
    (folder,) = [mount["mountPath"] for mount in WORKER["volumeMounts"] if mount["name"] == "config"]
    assert folder == str(Path(unit.CONFIG).parent)
    context = POD["securityContext"]
    assert instruction("USER") == f"{context['runAsUser']}:{context['runAsGroup']}"
    assert context["runAsNonRoot"]
    assert WORKER["securityContext"]["readOnlyRootFilesystem"]
