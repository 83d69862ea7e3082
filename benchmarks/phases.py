"""Where the time of an iteration goes, beside what it would take at the least.

    python benchmarks/phases.py                                       # all scripts
    python benchmarks/phases.py ppo_atari.py --no-cuda --precision bf16 --total-timesteps 20480

Runs a script with a clock at the comments of its training loop and around acting and `envs.step`.
Prints the median milliseconds of an iteration spent in each phase, and two floors: the steps of the
environments alone, with random actions, and the multiplications of the networks at the rate of one
large matrix product. Without a script, it measures all and writes phases.csv in docs/results, or in
the folder after --out.
"""

import collections
import multiprocessing
import statistics
import sys
import tempfile
import time
import types
from contextlib import chdir
from pathlib import Path

import torch
from speed import out_first, save
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
PHASES = {  # the comments of `train`, and the phase that begins there
    "# rollout: ": "rollout",
    "# log-probabilities and values ": "evaluation",
    "# advantages and value targets": "advantages",
    "# update: ": "update",
    "# log": "log",
}


TASKS = [  # what is measured if no script is named
    ("ppo_discrete.py", "--no-cuda", "--total-timesteps", "100000"),
    ("ppo_continuous.py", "--no-cuda", "--total-timesteps", "81920"),
    ("ppo_atari.py", "--no-cuda", "--precision", "fp32", "--total-timesteps", "20480"),
    ("ppo_atari.py", "--no-cuda", "--precision", "bf16", "--total-timesteps", "20480"),
]
FIELDS = ("script", "precision", "torch_threads", "phase", "milliseconds", "floor_milliseconds")


class Clock:
    """Seconds of each phase, one list entry for each iteration."""

    def __init__(self):
        self.iterations, self.phase, self.since = [], None, 0.0

    def start(self, phase: str):
        now = time.perf_counter()
        if self.phase:
            self.iterations[-1][self.phase] += now - self.since
        if phase == "rollout":
            self.iterations.append(collections.Counter())
        self.phase, self.since = phase, now

    def inside(self, phase: str, function):
        """`function`, its time taken from the phase that calls it."""

        def timed(*args, **kwargs):
            outer, start = self.phase, time.perf_counter()
            result = function(*args, **kwargs)
            seconds = time.perf_counter() - start
            self.iterations[-1][phase] += seconds
            self.iterations[-1][outer] -= seconds
            return result

        return timed


def load(path: Path, clock: Clock) -> types.ModuleType:
    """The script as a module, `clock.start(phase)` called at each comment of PHASES."""
    lines = []
    for line in path.read_text().splitlines():
        for comment, phase in PHASES.items():
            if line.startswith("        " + comment) and (phase != "log" or line.endswith("# log")):
                lines.append(f"        clock.start({phase!r})")
        lines.append(line)
    module = types.ModuleType(path.stem)
    module.__file__, module.clock = str(path), clock
    sys.modules[path.stem] = module  # where dataclasses look for it
    exec(compile("\n".join(lines), path, "exec"), module.__dict__)
    return module


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second in a product of two 2048 x 2048 matrices."""
    size = 2048
    a = torch.ones(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def measure(name: str, *argv: str) -> list[tuple]:
    """Rows of FIELDS for one script, printed as a table, too."""
    path, clock = ROOT / name, Clock()
    module = load(path, clock)
    args = module.parse_args(argv)
    make_envs, rollout_policy = module.make_envs, module.Agent.rollout_policy

    def make_timed_envs(args):
        envs = make_envs(args)
        envs.step = clock.inside("environments", envs.step)
        return envs

    def make_timed_policy(agent, rng):
        return clock.inside("acting", rollout_policy(agent, rng))

    module.make_envs, module.Agent.rollout_policy = make_timed_envs, make_timed_policy
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        agent = module.train(args)
    iterations = clock.iterations[3:-1]  # without compilation and the checkpoint
    phases = ("environments", "acting", "rollout", "evaluation", "advantages", "update", "log")
    medians = {name: 1e3 * statistics.median(x[name] for x in iterations) for name in phases}

    envs = make_envs(args)
    seeds = list(range(args.num_envs))
    envs.reset(seed=seeds)
    envs.action_space.seed(1)
    samples = [envs.action_space.sample() for _ in range(args.num_steps)]
    start = time.perf_counter()
    for actions in samples:
        envs.step(actions)
    floor = {"environments": 1e3 * (time.perf_counter() - start)}
    observation = torch.as_tensor(envs.reset(seed=seeds)[0][:1])
    envs.close()
    device = next(agent.parameters()).device
    precision = getattr(args, "precision", "fp32")
    torch.set_num_threads(args.torch_threads)
    rate = matrix_rate(device, {"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
    with FlopCounterMode(display=False) as forward:
        agent(observation.to(device))
    pass_ms = 1e3 * args.batch_size * forward.get_total_flops() / rate
    passes = {"acting": 1, "evaluation": 1, "update": 3 * args.update_epochs}
    floor |= {name: count * pass_ms for name, count in passes.items()}

    print(f"{name} {precision}, {len(iterations)} iterations of {args.batch_size} steps, {device}")
    total = sum(medians.values())
    for phase, value in medians.items():
        print(
            f"{phase:14}{value:10.1f} ms{value / total:6.0%}   floor {floor.get(phase, 0):.1f} ms"
        )
    print(f"{'sum':14}{total:10.1f} ms   {args.batch_size / total * 1e3:,.0f} steps/s")
    print(f"matrix product {rate / 1e9:,.0f} GFLOP/s, forward pass {forward.get_total_flops():,}")
    row = (name, precision, args.torch_threads)
    return [
        (*row, k, f"{v:.2f}", f"{floor[k]:.2f}" if k in floor else "") for k, v in medians.items()
    ]


def main(argv: list[str]):
    out, argv = out_first(argv)
    if argv:
        measure(*argv)
        return
    rows = []
    for task in TASKS:  # each in a process of its own, which compiles and threads as if alone
        receiver, sender = multiprocessing.Pipe()
        process = multiprocessing.Process(target=lambda x=task, y=sender: y.send(measure(*x)))
        process.start()
        sender.close()
        for row in receiver.recv():
            save(out / "phases.csv", rows, dict(zip(FIELDS, row, strict=True)))
        process.join()


if __name__ == "__main__":
    main(sys.argv[1:])
