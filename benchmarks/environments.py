"""Steps per second of Atari's vector environment alone, with random actions, in several forms.

    python benchmarks/environments.py --rounds 7
    python benchmarks/environments.py --rounds 7 --envpool      # beside EnvPool, if installed

One after the other, in an order that turns round after each round. "Gymnasium's step" is the same
preprocessing with a step of Gymnasium for each raw frame. The script has the others, a process for
each game by default. EnvPool's preprocessing is not the same frame by frame. Writes
environments.csv, a row as soon as it is measured.
"""

import dataclasses
import os
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import tyro
from speed import ROOT, commit_of, machine, results_folder, save

sys.path.insert(0, str(ROOT))
import ppo_atari

FIELDS = ("form", "env_id", "num_envs", "round", "steps_per_second", "cpus", "cpu", "commit")


@dataclasses.dataclass(frozen=True)
class Args:
    env_id: str = "BreakoutNoFrameskip-v4"  # Gymnasium id of the game
    num_envs: int = 8  # N
    steps: int = 300  # of the vector environment in each measurement
    rounds: int = 7  # measurements of each form
    envpool: bool = False  # EnvPool, too, with one thread and with as many as cores
    out: Path = ROOT / "docs" / "results"  # folder of the results


class GymnasiumSteps(ppo_atari.AtariPreprocessing):
    """A step of Gymnasium for each raw frame, which fetches every screen."""

    def start_game(self, **kwargs):
        super().start_game(**kwargs)
        self.screen = self.ale.getScreenRGB()

    def act(self, action):
        self.screen, reward, terminated, truncated, _ = self.env.step(action)
        self.score, self.length = self.score + reward, self.length + 1
        self.game_over = terminated or truncated
        return reward

    def look(self):
        self.screens = [self.screens[1], self.screen]


def make_envs(env_id: str, n: int, vectorization: str, wrapper=ppo_atari.AtariPreprocessing, **how):
    """As the script's, with another wrapper or other arguments of the vector environment."""
    settings = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP, "copy": False} | how
    return gym.make_vec(env_id, n, vectorization, settings, [wrapper], frameskip=1)


def of_envpool(args: Args, threads: int):
    import envpool

    game = args.env_id.removesuffix("NoFrameskip-v4") + "-v5"
    return envpool.make(game, "gymnasium", num_envs=args.num_envs, num_threads=threads)


def forms(args: Args) -> dict:
    """name -> function that makes the vector environment"""
    cores, n = os.cpu_count(), args.num_envs

    def ours(vectorization):
        task = {"env_id": args.env_id, "num_envs": n, "vectorization": vectorization}
        return lambda: ppo_atari.make_envs(ppo_atari.Args(**task))

    def gymnasium(*how, **more):
        return lambda: make_envs(args.env_id, n, *how, **more)

    found = {
        "one process": ours("sync"),
        "one process, Gymnasium's step": gymnasium("sync", GymnasiumSteps),
        "a process for each game": ours("async"),
        "a process for each game, Gymnasium's step": gymnasium("async", GymnasiumSteps),
        f"a process for each game, {cores} at a time": gymnasium("async", max_concurrency=cores),
    }
    if args.envpool:
        found |= {
            f"EnvPool, threads: {n}": lambda n=n: of_envpool(args, n) for n in sorted({1, cores})
        }
    return found


def measure(make, args: Args) -> float:
    """Environment steps a second, after a fiftieth of them."""
    envs, rng = make(), np.random.default_rng(1)
    games = ppo_atari.make_envs(ppo_atari.Args(env_id=args.env_id, num_envs=1))
    number = games.single_action_space.n
    games.close()
    actions = [rng.integers(number, size=args.num_envs) for _ in range(args.steps)]
    envs.reset()
    for action in actions[:: max(1, args.steps // 50)]:
        envs.step(action)
    start = time.perf_counter()
    for action in actions:
        envs.step(action)
    speed = args.num_envs * args.steps / (time.perf_counter() - start)
    envs.close()
    return speed


def main(args: Args):
    path, rows = results_folder(args.out) / "environments.csv", []
    origin = (os.cpu_count(), machine()["cpu"], commit_of(ROOT))
    found = forms(args)
    for number in range(1, args.rounds + 1):
        for form in list(found)[:: 1 if number % 2 else -1]:
            speed = f"{measure(found[form], args):.1f}"
            row = (form, args.env_id, args.num_envs, number, speed, *origin)
            save(path, rows, dict(zip(FIELDS, row, strict=True)))


if __name__ == "__main__":
    main(tyro.cli(Args))
