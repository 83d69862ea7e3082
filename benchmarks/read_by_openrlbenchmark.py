"""Shows that openrlbenchmark finds and reads our runs: its own code, on runs made without network.

    python benchmarks/read_by_openrlbenchmark.py --python PYTHON --clone CLONE

PYTHON is that of an environment with pip install openrlbenchmark==0.3.1 'pandas<3'; CLONE, which
may be left out, a clone of github.com/openrlbenchmark/openrlbenchmark, whose older code then reads
the same. In both, the module openrlbenchmark.rlops is run as a program, with filters as on a
command line; only wandb.Api is another one, that of wandb_file.py, which looks into W&B's files.

Writes openrlbenchmark.csv, a row for each filter, and openrlbenchmark.json, where it comes from:

found    the runs that the filter led to
rows     the rows read of all of them
score    the mean of the last 100 rows of each run, as in openrlbenchmark's table, then their mean
ours_*   the same from metrics.csv of the runs that should have been found
"""

import csv
import dataclasses
import datetime
import json
import os
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
from importlib import metadata, util
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUNS = [  # script, flags, tag
    *(("ppo_discrete", f"--seed {seed} --total-timesteps 16384", "") for seed in (1, 2, 3)),
    ("ppo_discrete", "--exp-name ppo --total-timesteps 16384", "paper"),
    ("ppo_discrete", "--env-id Acrobot-v1 --total-timesteps 4096", ""),
    ("ppo_atari", "--env-id ALE/Breakout-v5 --total-timesteps 2048", ""),
]
METRICS = [  # what CleanRL's ppo.py logs
    *("charts/episodic_return", "charts/episodic_length", "charts/learning_rate", "charts/SPS"),
    *("losses/value_loss", "losses/policy_loss", "losses/entropy", "losses/old_approx_kl"),
    *("losses/approx_kl", "losses/clipfrac", "losses/explained_variance"),
]
RETURN = METRICS[0]
FILTERS = [  # environment, metric, filter; the numbers of the runs in RUNS that it should find
    ("CartPole-v1", RETURN, "ppo_discrete", [0, 1, 2]),
    ("CartPole-v1", RETURN, "ppo_discrete?seed=2", [1]),
    ("CartPole-v1", RETURN, "ppo", [3]),
    ("CartPole-v1", RETURN, "ppo?tag=paper", [3]),
    *(("CartPole-v1", metric, "ppo_discrete", [0, 1, 2]) for metric in METRICS[1:]),
    ("ALE/Breakout-v5", RETURN, "ppo_atari", [5]),
]
ENTITY = "team"


@dataclasses.dataclass(frozen=True)
class Args:
    python: Path  # of an environment with openrlbenchmark
    clone: Path | None = None  # of its repository
    out: Path = ROOT / "docs" / "results"  # folder of the results


def make_runs(folder: Path):
    """A folder for each of RUNS: what it left, and what W&B has of it."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    for i, (script, flags, tag) in enumerate(RUNS):
        (folder / str(i)).mkdir()
        how = {"WANDB_MODE": "offline", "WANDB_DIR": str(folder / str(i))}
        how |= {"WANDB_TAGS": tag} if tag else {}
        command = [sys.executable, ROOT / f"{script}.py", *flags.split(), "--no-cuda", "--track"]
        command += ["--no-compile", "--wandb-entity", ENTITY]
        subprocess.run(command, cwd=folder / str(i), env=env | how, check=True)


def series(folder: Path, metric: str) -> list[float]:
    """The values of a metric in metrics.csv."""
    (path,) = folder.glob("runs/**/metrics.csv")
    with open(path) as file:
        return [float(row["value"]) for row in csv.DictReader(file) if row["name"] == metric]


def summary(runs: list[list[float]]) -> tuple[int, float]:
    """Rows, and the mean over runs of the mean of the last 100."""
    return sum(map(len, runs)), statistics.mean(statistics.mean(x[-100:]) for x in runs)


def commands():
    """The arguments of openrlbenchmark for FILTERS: one command for each environment."""
    for env_id in dict.fromkeys(env_id for env_id, *_ in FILTERS):
        argv = ["--env-ids", env_id, "--scan-history", "--pc.ncols", "1"]
        for number, (env, metric, words, _) in enumerate(FILTERS):
            if env == env_id:
                where = f"?we={ENTITY}&wpn=ppo37&ceik=env_id&cen=exp_name&metric={metric}"
                name = f"{words}{'&' if '?' in words else '?'}cl={number}"  # its legend
                argv += ["--filters", where, name]
        yield argv


def read(folder: Path, package: Path) -> dict[str, list]:
    """In openrlbenchmark's environment: number of a filter -> the values of each run it led to."""
    import matplotlib
    import wandb
    from wandb_file import Api

    matplotlib.use("Agg")
    shutil.copytree(package, "openrlbenchmark")  # beside itself it keeps what it has read
    sys.path.insert(0, os.getcwd())
    wandb.Api = lambda: Api(sorted(folder.iterdir()))
    found = {}
    for argv in commands():
        sys.argv = ["rlops", *argv]
        names = runpy.run_module("openrlbenchmark.rlops", run_name="__main__")
        (experiment,) = names["exs"]
        for hypothesis in experiment.hypotheses:
            values = [run.df["charts/episodic_return"].tolist() for run in hypothesis.runs]
            found[hypothesis.name] = values
    return found


def read_elsewhere(args: Args, folder: Path) -> dict[str, dict]:
    """Version of openrlbenchmark -> what `read` returns for it."""
    found = {}
    for clone in [None, args.clone] if args.clone else [None]:
        with tempfile.TemporaryDirectory() as place:
            command = [args.python, __file__, "read", folder, *([clone] if clone else [])]
            command = [x if x == args.python else str(x) for x in command]
            with open(Path(place) / "log", "w") as log:
                subprocess.run(command, cwd=place, stdout=log, check=True)
            version, values = json.loads((Path(place) / "found.json").read_text())
        found[version] = values
    return found


def rows_of(version: str, found: dict[str, list], folder: Path) -> list[dict]:
    """Of each filter, what was read and what should have been."""
    rows = []
    for number, (env_id, metric, words, expected) in enumerate(FILTERS):
        ours = summary([series(folder / str(i), metric) for i in expected])
        count, score = summary(found[str(number)])
        row = {"version": version, "env_id": env_id, "filter": words, "metric": metric}
        row |= {"found": len(found[str(number)]), "ours_found": len(expected), "rows": count}
        row |= {"ours_rows": ours[0], "score": f"{score:.7g}", "ours_score": f"{ours[1]:.7g}"}
        rows.append(row)
    return rows


def main(args: Args):
    from speed import commit_of, machine, results_folder, without_paths

    out, commit = results_folder(args.out), commit_of(ROOT)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_runs(folder)
        found = read_elsewhere(args, folder)
        rows = [row for version, x in found.items() for row in rows_of(version, x, folder)]
    with open(out / "openrlbenchmark.csv", "w") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    packages = ("wandb", "pandas", "expt")
    code = f"from importlib.metadata import version; print(*map(version, {packages}))"
    found_versions = subprocess.check_output([args.python, "-c", code], text=True).split()
    origin = {"command": without_paths(sys.argv), "date": datetime.date.today().isoformat()}
    origin |= machine() | {"openrlbenchmark": list(found), "commit": commit}
    origin["versions"] |= {"wandb": metadata.version("wandb")}
    origin |= {"reader": dict(zip(packages, found_versions, strict=True))}
    (out / "openrlbenchmark.json").write_text(json.dumps(origin, indent=2) + "\n")


def main_of_reader(folder: str, clone: str = ""):
    """Leaves found.json, [version, what was found], in the folder in which it runs."""
    (package,) = util.find_spec("openrlbenchmark").submodule_search_locations
    version = metadata.version("openrlbenchmark")
    if clone:
        git = ["git", "-C", clone, "rev-parse", "HEAD"]
        package, version = Path(clone) / "openrlbenchmark", subprocess.check_output(git, text=True)
    found = read(Path(folder), Path(package))
    Path("found.json").write_text(json.dumps([version.strip(), found]))


if __name__ == "__main__":
    if sys.argv[1:2] == ["read"]:
        main_of_reader(*sys.argv[2:])
    else:
        import tyro

        main(tyro.cli(Args, description=__doc__.splitlines()[0]))
