"""Says of the stored runs whether today's scripts still do the same, bit for bit.

    python benchmarks/identical.py                      # all stored runs, a quarter of an hour
    python benchmarks/identical.py --only CartPole-v1   # the runs of an environment
    python benchmarks/identical.py --out docs/results/identical.json

A run stays in docs/results/ as a figure of today's script if that gives the same weights as the
script of the run's commit. So both are run for three iterations with the run's own command, on this
machine, and all weights are compared; ppo_rlhf.py for eight, as the first five train the value
model alone, and the policy's weights. Runs that differ in their seed alone are one comparison, by
their first seed. Runs of docs/results/long/ are compared as they began; those of docs/results/rlhf/
that go on from another, --load, are not. It needs the history: a shallow clone has none.

Prints a line for each; with --out, a file of them for docs/results.md. Exit code 0: all are the
same; 1: some are not; 2: the command is wrong.
"""

import dataclasses
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import tyro
from speed import ROOT

sys.path.insert(0, str(ROOT / "docs"))
import make_results
import make_rlhf

ITERATIONS, ITERATIONS_RLHF = 3, 8


@dataclasses.dataclass(frozen=True)
class Args:
    only: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()  # an environment; repeatable
    out: Path | None = None  # what is found, as JSON


def stored() -> list[dict]:
    """The configs of all runs that one can start anew; a task of ppo_rlhf.py is an `env_id`."""
    runs = [config for config, _ in (*make_results.load(), *make_results.load_long())]
    rlhf = [config for config, _ in make_rlhf.load()]
    return runs + [x | {"env_id": x["task"]} for x in rlhf if "--load" not in x["command"]]


def without_seed(config: dict) -> tuple:
    """What runs have in common that differ in their seed alone: script and command."""
    words = shlex.split(config["command"])
    if "--seed" in words:
        del words[words.index("--seed") : words.index("--seed") + 2]
    return config["script_sha256"], *words


def comparisons(configs: list[dict]) -> list[list[dict]]:
    """Groups of configs of which one stands for all."""
    groups = {}
    for config in configs:
        groups.setdefault(without_seed(config), []).append(config)
    return [*groups.values()]


def committed(config: dict) -> bytes | None:
    """The script of a run's commit, if the history has it."""
    name = config["command"].split()[0]
    show = ["git", "-C", str(ROOT), "show", f"{config['git_commit']}:{name}"]
    process = subprocess.run(show, check=False, capture_output=True)
    return None if process.returncode else process.stdout


def weights(text: bytes, config: dict) -> dict[str, torch.Tensor] | str:
    """What a script has learned after three iterations of a run, or the last line of its output."""
    name, *flags = shlex.split(config["command"])
    enough = ["--total-timesteps", str(ITERATIONS * config["batch_size"])]
    if rlhf := name == "ppo_rlhf.py":
        enough = ["--total-episodes", str(ITERATIONS_RLHF * config["batch_size"])]
        enough += ["--stages", "sft,rm,ppo", "--checkpoint-every", str(ITERATIONS_RLHF)]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).write_bytes(text)
        command = [sys.executable, name, *flags, *enough]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        env = os.environ | {"OMP_NUM_THREADS": str(config["torch_threads"])}
        process = subprocess.run(command, check=False, cwd=folder, env=env, **pipes)
        if process.returncode:
            return (process.stdout.strip().splitlines() or ["no output"])[-1]
        (path,) = Path(folder).glob("runs/*/checkpoint.pt")
        data = torch.load(path, weights_only=True)
        return data["models"]["policy"] if rlhf else data["agent"]


def difference(old: dict[str, torch.Tensor], new: dict[str, torch.Tensor]) -> str:
    """Nothing if all weights are the same bit for bit; else what differs first, and by how much."""
    if old.keys() != new.keys():
        return f"other weights: {', '.join(sorted(old.keys() ^ new.keys()))}"
    for name, value in old.items():
        if value.shape != new[name].shape:
            return f"{name}: {tuple(value.shape)} and {tuple(new[name].shape)}"
        if not torch.equal(value, new[name]):
            return f"{name}: by {(value - new[name]).abs().max():.1e}"
    return ""


def verdict(config: dict) -> str:
    """identical, or why not."""
    today = (ROOT / config["command"].split()[0]).read_bytes()
    text = committed(config)
    if text is None:
        return "unknown, its commit is not in this history"
    if text == today:
        return "identical, the same text"
    old, new = weights(text, config), weights(today, config)
    for which, found in (("its commit", old), ("today", new)):
        if isinstance(found, str):
            return f"unknown, the script of {which} ends with: {found}"
    different = difference(old, new)
    return f"DIFFERS, {different}" if different else "identical"


def main(args: Args) -> int:
    configs = stored()
    known = {config["env_id"] for config in configs}
    if unknown := [name for name in args.only if name not in known]:
        print(f"error: --only {unknown[0]}: no stored run has it", file=sys.stderr)
        return 2
    configs = [x for x in configs if x["env_id"] in args.only or not args.only]
    found = []
    for group in comparisons(configs):
        row = {"command": group[0]["command"], "commit": group[0]["git_commit"]}
        row |= {"verdict": verdict(group[0]), "runs": [config["run_name"] for config in group]}
        found.append(row)
        seeds, flags = " ".join(str(x["seed"]) for x in group), row["command"].partition(" ")[2]
        line = f"{group[0]['env_id']}, seeds {seeds} ({flags}): {row['verdict']}"
        print(line, flush=True)
    if args.out:
        git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
        commit = subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip()
        about = {"command": shlex.join(["python", "benchmarks/identical.py", *sys.argv[1:]])}
        about |= {"git_commit": commit, "platform": platform.platform(), "found": found}
        args.out.write_text(json.dumps(about, indent=1) + "\n")
    return int(not all(x["verdict"].startswith("identical") for x in found))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__.splitlines()[0])))
