"""Runs of docs/results/long/ can go on: checkpoints fit the scripts, files belong together."""

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

import ppo_atari
from conftest import ROOT

FOLDERS = [path.parent for path in (ROOT / "docs" / "results" / "long").glob("*/checkpoint.pt")]
FOLDERS.sort()


@pytest.mark.parametrize(
    "folder",
    [FOLDERS[0], *[pytest.param(x, marks=pytest.mark.slow) for x in FOLDERS[1:]]],
    ids=lambda path: path.name,
)
def test_it_goes_on(folder):
    copy = Path(shutil.copytree(folder, folder.name))
    data = torch.load(copy / "checkpoint.pt", weights_only=True)
    with open(copy / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert int(rows[-1]["global_step"]) == data["global_step"] == data["iteration"] * 1024
    assert (copy / "metrics.csv").stat().st_size == data["metrics_bytes"]
    assert json.loads((copy / "config.json").read_text())["env_id"] == data["args"]["env_id"]
    total = str(data["global_step"] + 1024)
    plain = ["--no-cuda", "--no-compile", "--torch-threads", "1", "--vectorization", "sync"]
    args = ppo_atari.parse_args(["--resume", str(copy), "--total-timesteps", total, *plain])
    ppo_atari.train(args)
    assert torch.load(copy / "checkpoint.pt", weights_only=True)["global_step"] == int(total)
    page = (ROOT / "docs" / "results.md").read_text()
    name = f"{data['args']['env_id']}, no memory, 10M steps, bf16"
    (row,) = re.findall(rf"(?m)^\| {name}(.*?) \|", page)
    left = data["args"]["total_timesteps"] - data["global_step"]
    assert row == (f", stopped after {data['global_step']:,} steps" if left >= 1024 else "")
