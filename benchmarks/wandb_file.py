"""Runs of Weights & Biases as their own files hold them, and an API that finds them, offline.

`Api([folder])` answers what wandb.Api answers about runs, from the folders offline-run-*: runs that
were resumed are one, filters are those of W&B (MongoDB's), history is what was logged.
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace


def records(path: Path) -> Iterator:
    """The records of a .wandb file: LevelDB's log format with W&B's own header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, position, payload = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        left = 32768 - position % 32768  # in this block
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        payload += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # complete: FULL or LAST, else FIRST or MIDDLE
            yield wandb_internal_pb2.Record.FromString(payload)
            payload = b""
    assert not payload


class OfflineRun:
    """The files of one run, oldest first: more than one if it was resumed."""

    url, user = "offline", SimpleNamespace(username="offline", name="offline")

    def __init__(self, paths: list[Path]):
        self.config, self.rows, self.exits, self.paths = {}, [], [], paths
        for record in (record for path in paths for record in records(path)):
            match record.WhichOneof("record_type"):
                case "run":
                    run = record.run
                    self.id, self.name, self.tags = run.run_id, run.display_name, list(run.tags)
                    self.project, self.entity = run.project, run.entity
                    for item in run.config.update:
                        if item.key != "_wandb":
                            self.config[item.key] = json.loads(item.value_json)
                case "history":
                    items = record.history.item
                    names = [x.key or ".".join(x.nested_key) for x in items]
                    values = [json.loads(x.value_json) for x in items]
                    self.rows.append(dict(zip(names, values, strict=True)))
                case "exit":
                    self.exits.append(record.exit.exit_code)

    @property
    def path(self) -> list[str]:
        return [self.entity, self.project, self.id]

    @property
    def state(self) -> str:
        if len(self.exits) < len(self.paths):  # the last one has not ended
            return "running"
        return "failed" if self.exits[-1] else "finished"

    def scan_history(self) -> Iterator[dict]:
        """Each row."""
        return iter(self.rows)

    def history(self, samples: int = 500, keys: list[str] | None = None):
        """The rows that have all these keys, no more than `samples` of them, evenly chosen."""
        import pandas

        rows = [{k: row[k] for k in keys} for row in self.rows if set(keys) <= row.keys()]
        if len(rows) > samples:
            rows = [rows[i * len(rows) // samples] for i in range(samples)]
        return pandas.DataFrame(rows)

    def field(self, name: str):
        """What a filter means by config.env_id.value, config.env_id or tags."""
        if name.startswith("config."):
            return self.config.get(name.removeprefix("config.").removesuffix(".value"))
        return {"tags": self.tags, "username": self.user.username, "state": self.state}[name]

    def passes(self, filters: dict) -> bool:
        """Whether the run is among those that W&B's filters let through."""
        for name, wanted in filters.items():
            if name in ("$and", "$or"):
                right = (all if name == "$and" else any)(self.passes(x) for x in wanted)
            else:
                value = self.field(name)
                values = value if isinstance(value, list) else [value]
                allowed = wanted["$in"] if isinstance(wanted, dict) else [wanted]
                right = any(x in values for x in allowed)
            if not right:
                return False
        return True


class Api:
    """Takes the place of wandb.Api for runs in these folders."""

    def __init__(self, folders: list[Path]):
        paths = {}
        for folder in folders:
            for path in folder.glob("wandb/offline-run-*/run-*.wandb"):
                paths.setdefault(path.stem, []).append(path)
        together = [sorted(x, key=lambda path: path.parent.name) for x in paths.values()]
        self.all = sorted(map(OfflineRun, together), key=lambda run: run.name)

    def runs(self, path: str, filters: dict) -> list[OfflineRun]:
        entity, _, project = path.partition("/")
        mine = [run for run in self.all if (run.entity, run.project) == (entity, project)]
        return [run for run in mine if run.passes(filters)]
