"""How far the losses of the last minibatch, which CleanRL logs, are from the mean, which we log.

    python benchmarks/last_minibatch.py

One run of ppo_discrete.py with default settings but for its length. Writes last_minibatch.csv, a
row for each iteration and loss, and last_minibatch.json, where it comes from.
"""

import csv
import dataclasses
import datetime
import json
import os
import sys
import tempfile
from pathlib import Path

import tyro
from speed import ROOT, commit_of, machine, results_folder, without_paths

sys.path.insert(0, str(ROOT))
LOSSES = ("value_loss", "policy_loss", "entropy", "old_approx_kl", "approx_kl")


@dataclasses.dataclass(frozen=True)
class Args:
    total_timesteps: int = 102_400  # 200 iterations
    out: Path = ROOT / "docs" / "results"  # folder of the results


def losses(total_timesteps: int) -> list[dict[str, list[float]]]:
    """Of each iteration, the losses of its minibatches in their order."""
    import ppo_discrete as script

    gradient, calls = script.ppo_gradient, []

    def counted(*args):
        stats = gradient(*args)
        calls.append({name: stats[name].item() for name in LOSSES})
        return stats

    script.ppo_gradient = counted
    args = script.Args(total_timesteps=total_timesteps, compile=False, cuda=False)
    script.train(args)
    script.ppo_gradient = gradient
    n = args.update_epochs * args.num_minibatches
    iterations = [calls[i : i + n] for i in range(0, len(calls), n)]
    return [{name: [x[name] for x in part] for name in LOSSES} for part in iterations]


def main(args: Args):
    folder, commit, here = results_folder(args.out).resolve(), commit_of(ROOT), os.getcwd()
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        found = losses(args.total_timesteps)
        os.chdir(here)
    with open(folder / "last_minibatch.csv", "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("iteration", "loss", "mean", "last"))
        for i, iteration in enumerate(found, 1):
            for name, x in iteration.items():
                writer.writerow((i, name, f"{sum(x) / len(x):.6g}", f"{x[-1]:.6g}"))
    origin = {"command": without_paths(sys.argv), "date": datetime.date.today().isoformat()}
    origin |= machine() | {"commit": commit}
    (folder / "last_minibatch.json").write_text(json.dumps(origin, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.splitlines()[0]))
