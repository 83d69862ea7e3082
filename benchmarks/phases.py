"""Where the time of an iteration goes, beside what it would take at the least.

    python benchmarks/phases.py ppo_atari.py --no-cuda --total-timesteps 20480

Runs a script with a clock at the comments of its training loop and around acting and `envs.step`.
Prints the median milliseconds of an iteration spent in each phase, and two floors: the steps of the
environments alone, with random actions, and the multiplications of the networks at the rate of one
large matrix product.
"""

import collections
import statistics
import sys
import tempfile
import time
import types
from contextlib import chdir
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
PHASES = {  # the comments of `train`, and the phase that begins there
    "# rollout: ": "rollout",
    "# log-probabilities and values ": "evaluation",
    "# advantages and value targets": "advantages",
    "# update: ": "update",
    "# log": "log",
}


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
    """Floating-point operations a second in a product of two 4096 x 4096 matrices."""
    size = 4096 if device.type == "cuda" else 2048
    a = torch.ones(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def main(path: Path, argv: list[str]):
    clock = Clock()
    module = load(path, clock)
    args = module.parse_args(argv)
    make_envs, rollout_policy = module.make_envs, module.Agent.rollout_policy

    def make_timed_envs(args):
        envs = make_envs(args)
        envs.step = clock.inside("environments", envs.step)
        return envs

    module.make_envs = make_timed_envs
    module.Agent.rollout_policy = lambda self, rng: clock.inside(
        "acting", rollout_policy(self, rng)
    )
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        agent = module.train(args)
    rows = clock.iterations[3:-1]  # without compilation and the checkpoint
    names = ("environments", "acting", "rollout", "evaluation", "advantages", "update", "log")
    medians = {name: 1e3 * statistics.median(row[name] for row in rows) for name in names}

    envs = make_envs(args)
    envs.reset(seed=list(range(args.num_envs)))
    envs.action_space.seed(1)
    samples = [envs.action_space.sample() for _ in range(args.num_steps)]
    start = time.perf_counter()
    for actions in samples:
        envs.step(actions)
    floor = {"environments": 1e3 * (time.perf_counter() - start)}
    observation = torch.as_tensor(envs.reset(seed=1)[0][:1])
    envs.close()
    device = next(agent.parameters()).device
    bf16 = getattr(args, "precision", "fp32") == "bf16"
    rate = matrix_rate(device, torch.bfloat16 if bf16 else torch.float32)
    with FlopCounterMode(display=False) as forward:
        agent(observation.to(device))
    per_flop = 1e3 * args.batch_size * forward.get_total_flops() / rate
    floor |= {
        "acting": per_flop,
        "evaluation": per_flop,
        "update": 3 * args.update_epochs * per_flop,
    }

    print(f"{path.name}, {len(rows)} iterations of {args.batch_size} steps, {device}")
    print(f"{'phase':14}{'ms':>10}{'share':>8}{'floor ms':>10}")
    total = sum(medians.values())
    for name, value in medians.items():
        least = f"{floor[name]:10.1f}" if name in floor else ""
        print(f"{name:14}{value:10.1f}{value / total:8.0%}{least}")
    print(f"{'sum':14}{total:10.1f}   {args.batch_size / total * 1e3:,.0f} steps/s")
    print(f"matrix product: {rate / 1e9:,.0f} GFLOP/s; network: {forward.get_total_flops():,} FLOP")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2:])
