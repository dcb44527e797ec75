"""The same job given to dlt, a well-known loading library, as its documentation shows: a resource, a pipeline, a merge.

`python -m benchmarks.contenders.with_dlt URL DATABASE_URL RUNS`, in a virtualenv that has dlt. It loads when all is
read: dlt extracts, normalises and loads one after the other, so nothing is stored while a run is still talking.
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import dlt
import httpx
from httpx_sse import connect_sse

from benchmarks.blaster import run_id


def chunks(url: str, run: str) -> Iterator[dict[str, Any]]:
    """The chunks of one run."""
    with (
        httpx.Client(base_url=url) as client,
        connect_sse(client, "POST", f"/v1/runs/{run}/stream", json={"starting_after": 0}) as events,
    ):
        last = 0
        for event in events.iter_sse():
            if event.data == "[DONE]":
                return
            fields = json.loads(event.data)
            last = fields.get("seq_id") or last + 1
            yield {
                "run_id": run,
                "seq_id": last,
                "message_type": fields["message_type"],
                "message_id": fields.get("id"),
                "otid": fields.get("otid"),
                "step_id": fields.get("step_id"),
                "payload": event.data,
            }


def main() -> None:
    """Catch up once."""
    url, database_url, runs = sys.argv[1:]

    @dlt.resource(name="chunks", write_disposition="merge", primary_key=("run_id", "seq_id"), parallelized=True)
    def log() -> Iterator[dict[str, Any]]:
        for number in range(1, int(runs) + 1):
            yield from chunks(url, run_id(number))

    destination = (
        dlt.destinations.sqlalchemy(credentials=database_url)
        if database_url.startswith("sqlite")
        else dlt.destinations.postgres(credentials=database_url.replace("@", ":none@"))  # it insists on a password
    )
    with tempfile.TemporaryDirectory() as folder:
        dataset = "main" if database_url.startswith("sqlite") else "public"
        dlt.pipeline("bench", destination=destination, dataset_name=dataset, pipelines_dir=folder).run(log())


if __name__ == "__main__":
    main()
