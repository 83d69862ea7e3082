"""Trains the cheap tasks once more, and says whether each still learns as the stored runs did.

    python benchmarks/regress.py                      # all four; the stored runs took ten minutes
    python benchmarks/regress.py --only CartPole-v1   # a minute
    python benchmarks/regress.py --seed 102           # with another new seed

The tasks are CartPole-v1, Acrobot-v1 and InvertedPendulum-v5, with the scores of docs/results.md,
and reviews, the default of ppo_rlhf.py, whose score is PPO's gold/score in docs/rlhf.md: standard
deviations of what the SFT policy writes, from its mean, so what was gained over it. Each runs with
its default settings on one CPU thread.

A score is compared with the 95 % prediction interval for one more run, from the scores of the n
stored seeds: mean +- t s sqrt(1 + 1/n), where t is the 0.975 quantile with n - 1 degrees of
freedom. The interval is widened where it leaves out a stored score or the least score that
docs/results.md asks of a seed: all stored runs of CartPole-v1 score 500, which by itself would be
an interval without width.

A run outside its interval fails, and so does one that ends in an error. Above it is not worse, but
not as the stored runs either: then they, and what the pages say of them, have to be made anew. If
scores are normally distributed, one run in 20 lies outside. At most one in 20 of the stored runs
may, each compared with the others of its task, which a test counts: none of the 30 does. They are
few, and half of them score the most there is: of the other 15, a rate of 18 % would show none in
one case of 20. Whoever sees an alarm trains with another seed; two in a row are hardly an accident.

Prints a line for each task and writes nothing but a temporary folder. Exit code 0: all are inside;
1: some are not; 2: the command is wrong.
"""

import dataclasses
import math
import statistics
import sys
import tempfile
from typing import Annotated

import tyro
from speed import ROOT, Program, execute

sys.path.insert(0, str(ROOT / "docs"))
import make_results
import make_rlhf

TASKS = {  # script, flag that names the task, metric, how many of its last values are the score
    "CartPole-v1": ("ppo_discrete.py", "--env-id", "charts/episodic_return", 100),
    "Acrobot-v1": ("ppo_discrete.py", "--env-id", "charts/episodic_return", 100),
    "InvertedPendulum-v5": ("ppo_continuous.py", "--env-id", "charts/episodic_return", 100),
    "reviews": ("ppo_rlhf.py", "--task", "eval/ppo/gold/score", 1),
}
KL_COEF = 0.1  # the default; runs with other coefficients are stored, too

# 0.975 quantiles of Student's t with 1, 2, 3, ... degrees of freedom: NIST/SEMATECH e-Handbook of
# Statistical Methods, 1.3.6.7.2, https://www.itl.nist.gov/div898/handbook/eda/section3/eda3672.htm
T = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228]
T += [2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086]


@dataclasses.dataclass(frozen=True)
class Args:
    only: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()  # a task; repeatable
    seed: int = 101  # one that no stored run has


def fail(message: str):
    print("error:", message, file=sys.stderr)
    sys.exit(2)


def stored(name: str) -> dict[int, float]:
    """seed -> score of the stored runs of a task."""
    if name == "reviews":
        runs = make_rlhf.select(make_rlhf.load(), name, KL_COEF)
        return {config["seed"]: metrics[TASKS[name][2]][-1] for config, metrics in runs}
    runs = make_results.load(name)
    return {config["seed"]: make_results.last_100(metrics) for config, metrics in runs}


def least_asked(name: str) -> float:
    """The least score of a seed in docs/results.md; infinite where none is asked for."""
    asked = [least for env_id, _, least, *_ in make_results.GROUPS if env_id == name]
    return min((x for x in asked if x is not None), default=math.inf)


def interval(scores: list[float], least: float = math.inf) -> tuple[float, float]:
    """Where 95 % of further runs lie, no narrower than the scores and the least one asked for."""
    n, mean = len(scores), statistics.fmean(scores)
    quantile = T[min(n - 1, len(T)) - 1]  # of more seeds, too wide by 7 % at most
    half = quantile * statistics.stdev(scores) * math.sqrt(1 + 1 / n)
    return min(mean - half, least, *scores), max(mean + half, *scores)


def verdict(score: float, low: float, high: float) -> str:
    if score > high:
        return "ABOVE"
    return "inside" if score >= low else "BELOW"  # NaN is, too


def command(name: str, seed: int) -> list[str]:
    """The script with its default settings, as a user would start it."""
    script, flag, *_ = TASKS[name]
    return [script, flag, name, "--seed", str(seed), "--no-cuda", "--torch-threads", "1"]


def score_of(name: str, metrics: list[tuple]) -> float:
    """Of a new run, from the rows of its metrics.csv."""
    *_, metric, count = TASKS[name]
    return statistics.fmean([value for *_, key, value in metrics if key == metric][-count:])


def compare(name: str, seed: int, scores: list[float], cache: str) -> bool:
    """Train, and print what came out. Returns whether it is outside."""
    script, *flags = command(name, seed)
    low, high = interval(scores, least_asked(name))
    expected = f"{low:.2f} to {high:.2f} from {len(scores)} seeds"
    try:
        run = execute(Program("ours", "fp32", "1", [ROOT / script], ""), flags, cache)
    except SystemExit as error:  # the other tasks are still of interest
        print(f"{name}: no score, interval {expected}: FAILED", flush=True)
        print(error, file=sys.stderr)
        return True
    score = score_of(name, run.metrics)
    found = verdict(score, low, high)
    seconds = f"{run.wall_seconds:.0f} s"
    print(f"{name}: {score:.2f}, interval {expected}: {found}, {seconds}", flush=True)
    return found != "inside"


def main(args: Args) -> int:
    if unknown := [name for name in args.only if name not in TASKS]:
        fail(f"--only {unknown[0]}: it must be one of {', '.join(TASKS)}")
    if not 0 <= args.seed < 2**63:
        fail(f"--seed is {args.seed}, it must be from 0 to 2^63 - 1")
    tasks = {name: stored(name) for name in TASKS if name in args.only or not args.only}
    for name, scores in tasks.items():
        if args.seed in scores:
            fail(f"--seed {args.seed}: a stored run of {name} has it, give another")
        if len(scores) < 2:
            fail(f"{name}: an interval needs two stored runs in docs/results/, not {len(scores)}")
    with tempfile.TemporaryDirectory() as cache:
        outside = [compare(name, args.seed, [*x.values()], cache) for name, x in tasks.items()]
    return int(any(outside))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__.splitlines()[0])))
