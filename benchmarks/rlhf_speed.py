"""Episodes per second of an update of ppo_rlhf.py beside TRL's PPOTrainer, run in turn.

    python benchmarks/rlhf_speed.py --trl PYTHON    # of an environment with trl==1.9.0
    python benchmarks/rlhf_speed.py --trl PYTHON --model FOLDER --rounds 3 --updates 4 --epochs 1

An update is what PPO repeats: write responses, score them, train on them for four epochs. Both get
models of the same size, fresh from a random start, batches of 256, prompts of at most 12 and
responses of at most 24 tokens, and the CPU with one thread and with the number they choose, for
ours --torch-threads of all CPUs. The order turns round after each round. The first quarter of the
updates does not count; nor do our first two stages, cut down to one step. Ours does not train on
columns that are padding in all texts of a part of the batch, so its speed depends on how long the
responses are, which is noted, too; TRL's does not.

Writes rlhf_speed.csv, a row for each run, and rlhf_speed.json, where it comes from and the floor:
the time that the multiplications of the update take at the rate of one large matrix product.

With --model, a folder that smollm2_model.py has made, an update is that of four models of its size,
two of which learn, all in fp32: batches of 32, prompts of 35 to 42 tokens (smollm2/prompts.jsonl),
responses of 32 at most, gradients of 8 texts at a time. TRL, which has one size for both, samples
32 texts at a time as ours does, and scores 32 where ours scores 8. That is rlhf_speed_smollm2.csv
and .json.
"""

import dataclasses
import datetime
import json
import statistics
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import torch
import tyro
from phases import matrix_rate
from speed import (
    ALL,
    ROOT,
    Program,
    commit_of,
    execute,
    machine,
    results_folder,
    save,
    without_paths,
)
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(ROOT))
import ppo_rlhf

TRL = Path(__file__).with_name("trl_run.py")
BATCH = 256
COLUMNS = ("time/gen", "time/score", "time/train", "perf/tokens_per_s", "response/length")
SHORT = ["--sft-texts", "128", "--sft-epochs", "1", "--rm-pairs", "32", "--rm-test-pairs", "32"]
SHORT += ["--rm-epochs", "1", "--critic-warmup", "0", "--stages", "sft,rm,ppo", "--no-cuda"]
ONLY_PPO = ["--critic-warmup", "0", "--stages", "ppo", "--no-cuda"]
REAL = ["--batch-size", "32", "--micro-batch-size", "8", "--response-length", "32"]
REAL += ["--learning-rate", "3e-6", "--prompts", str(ROOT / "benchmarks/smollm2/prompts.jsonl")]


@dataclasses.dataclass(frozen=True)
class Args:
    trl: Path | None = None  # Python of an environment with trl==1.9.0
    rounds: int = 5  # runs of each program with each number of threads
    updates: int = 24  # of each run
    epochs: int = 4  # passes over a batch
    model: Path | None = None  # folder of SmolLM2; None: the models of the task
    out: Path = ROOT / "docs" / "results"  # folder of the results


def values(metrics, name: str) -> list[tuple[int, float, float]]:
    """(global_step, seconds, value) of a metric, the first quarter of the rows left out."""
    rows = [(step, seconds, value) for step, seconds, key, value in metrics if key == name]
    return rows[len(rows) // 4 :]


def episodes_per_second(metrics) -> float:
    rows = values(metrics, "ppo/episode")
    return (rows[-1][0] - rows[0][0]) / (rows[-1][1] - rows[0][1])


def floor(flags: list[str]) -> dict[str, float]:
    """Milliseconds of an update's phases if all there was were its products, one thread."""
    torch.set_num_threads(1)
    args = ppo_rlhf.parse_args(flags)
    task = ppo_rlhf.TASKS[args.task]
    if args.model:
        task = ppo_rlhf.Texts(args.model, args)
        task.load(args)
    agent = ppo_rlhf.Agent(task, args)
    size = (args.batch_size, task.prompt_length + args.response_length)
    tokens = torch.zeros(size, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        policy, _ = agent(tokens)  # two networks
        policy.log_prob(tokens[:, task.prompt_length :])  # and the logits, if they come this late
    pass_ms = 1e3 * counter.get_total_flops() / matrix_rate(torch.device("cpu"), torch.float32)
    # one network, each token once; three passes without, some epochs with gradients, by two
    return {"gen": pass_ms / 2, "score": 2 * pass_ms, "train": 3 * args.update_epochs * pass_ms}


def settings(args: Args, folder: Path) -> tuple[list[str], list[str]]:
    """Flags for both programs and for ours alone; a reward model is made in the folder."""
    epochs = ["--update-epochs", str(args.epochs)]
    if not args.model:
        sizes = ["--batch-size", str(BATCH), "--total-episodes", str(args.updates * BATCH)]
        return [*sizes, *epochs], SHORT
    torch.manual_seed(1)  # of its head
    options = {"num_labels": 1, "dtype": torch.float32}
    kind = "AutoModelForSequenceClassification"
    ppo_rlhf.pretrained(kind, args.model, **options).save_pretrained(folder)
    ppo_rlhf.pretrained("AutoTokenizer", args.model).save_pretrained(folder)
    models = ["--model", str(args.model.resolve()), "--reward-model", str(folder)]
    episodes = ["--total-episodes", str(args.updates * int(REAL[1]))]
    return [*REAL, *models, *episodes, *epochs], ONLY_PPO


def main(args: Args):
    results_folder(args.out)
    commit = commit_of(ROOT)  # before there are results
    rows, name = [], "rlhf_speed_smollm2" if args.model else "rlhf_speed"
    with tempfile.TemporaryDirectory() as cache, tempfile.TemporaryDirectory() as folder:
        both, only_ours = settings(args, Path(folder))
        for number in range(1, args.rounds + 1):
            order = []
            for threads in ("1", "default"):
                used = ALL if threads == "default" else threads
                command = [ROOT / "ppo_rlhf.py", *only_ours, "--torch-threads", used]
                order.append(Program("ours", "fp32", used, command, commit))
                if args.trl:
                    order.append(Program("TRL", "fp32", threads, [TRL], "1.9.0"))
            for program in order if number % 2 else reversed(order):
                python = args.trl if program.name == "TRL" else sys.executable
                flags = [*both, "--seed", str(number)]
                run = execute(program, flags, cache, python=str(python))
                row = {"program": program.name, "threads": program.threads, "round": number}
                row["episodes_per_second"] = round(episodes_per_second(run.metrics), 3)
                for column in COLUMNS:
                    found = [value for _, _, value in values(run.metrics, column)]
                    row[column] = round(statistics.median(found), 4) if found else ""
                save(args.out / f"{name}.csv", rows, row | {"commit": program.commit})
        least = floor(both)
    origin = {"command": without_paths(sys.argv), "date": datetime.date.today().isoformat()}
    commits = {"ours": commit, "TRL": "1.9.0" if args.trl else None}
    origin |= machine() | {"commits": commits, "floor_milliseconds": least}
    if args.model:
        origin["versions"]["transformers"] = metadata.version("transformers")
    (args.out / f"{name}.json").write_text(json.dumps(origin, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.splitlines()[0]))
