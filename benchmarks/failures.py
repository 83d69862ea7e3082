"""How PPO on language goes wrong: each way provoked, and the metric that shows it first.

    python benchmarks/failures.py

Runs of ppo_rlhf.py, seed 1: `unchanged` learns SFT policy and reward model of the task `reviews`,
on which the others go on. Each of them differs from it by flags, or by one line of the script, of
which a copy then runs in which that line is replaced. Groups are those of the task `sort`.

Writes failures.csv, a row for each iteration of a case: its metric, the score and what the
unchanged run has there; and failures.json with the commands, into docs/results/rlhf/.
"""

import csv
import dataclasses
import datetime
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import tyro
from speed import ROOT, commit_of, machine, read_metrics, results_folder

COLUMNS = ("case", "metric", "episodes", "value", "score", "unchanged")
WORDS = ROOT / "benchmarks" / "words.py"


class Case(NamedTuple):
    metric: str  # that shows it first
    flags: str
    line: tuple[str, str] | None = None  # of the script, and what stands in its place


SAMPLER = "step = Categorical(logits=logits.squeeze(1){}, validate_args=False)"
CASES = {
    "reward hacking": Case("gold/score", "--kl-coef 0"),
    "length": Case("response/length", f"--kl-coef 0.02 --reward-fn {WORDS}:count:0.3"),
    "EOS never": Case("objective/missing_eos", "--kl-coef 0 --missing-eos-penalty 3"),
    "entropy collapse": Case("ppo/policy/entropy", "--kl-coef 0 --learning-rate 3e-3"),
    "a value model that lags": Case(
        "ppo/val/var_explained",
        "--value-init sft --critic-warmup 0 --value-learning-rate 3e-6",
    ),
    "negative KL": Case("objective/kl", "", (SAMPLER.format(""), SAMPLER.format(" / 2.0"))),
    "dead groups": Case("objective/dead_groups", "--task sort --group-size 4"),
}


@dataclasses.dataclass(frozen=True)
class Args:
    episodes: int = 8320  # of each run
    out: Path = ROOT / "docs" / "results" / "rlhf"  # folder of the results


def run(case: Case | None, checkpoint: Path | None, args: Args, folder: Path) -> tuple[dict, Path]:
    """{metric: {global_step: value}} of a run, and its folder."""
    text = (ROOT / "ppo_rlhf.py").read_text()
    flags = shlex.split(case.flags) if case else []
    if case and case.line:
        if text.count(case.line[0]) != 1:
            raise SystemExit(f"{text.count(case.line[0])} times {case.line[0]!r} in the script")
        text = text.replace(*case.line)
    folder.mkdir()
    (folder / "ppo_rlhf.py").write_text(text)
    if "sort" not in flags and checkpoint:
        flags += ["--stages", "ppo", "--load", str(checkpoint)]
    flags += ["--total-episodes", str(args.episodes), "--no-cuda", "--seed", "1"]
    command = [sys.executable, "ppo_rlhf.py", *flags]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL, env=one_thread)
    (found,) = (folder / "runs").iterdir()
    metrics = {}
    for step, _, name, value in read_metrics(found / "metrics.csv"):
        metrics.setdefault(name, {})[step] = value
    return metrics, found


def main(args: Args):
    path, commit = results_folder(args.out) / "failures.csv", commit_of(ROOT)
    with tempfile.TemporaryDirectory() as name, open(path, "w") as file:
        folder, writer = Path(name), csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        unchanged, found = run(None, None, args, folder / "unchanged")
        for number, (title, case) in enumerate(CASES.items()):
            metrics, _ = run(case, found, args, folder / str(number))
            for step, value in metrics[case.metric].items():
                row = {"case": title, "metric": case.metric, "episodes": step, "value": value}
                row |= {"score": metrics["objective/scores"][step]}
                row |= {"unchanged": unchanged.get(case.metric, {}).get(step, "")}
                writer.writerow(row)
            file.flush()
            print(title, case.metric, value, flush=True)
    facts = {"command": "python benchmarks/failures.py", "commit": commit}
    facts |= {"date": datetime.date.today().isoformat(), **machine()}
    facts["cases"] = {
        name: {"flags": case.flags.replace(f"{ROOT}/", ""), "line": case.line}
        for name, case in CASES.items()
    }
    path.with_suffix(".json").write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.splitlines()[0]))
