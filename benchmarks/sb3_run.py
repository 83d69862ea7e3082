"""Runs the PPO of Stable-Baselines3 on the task of one of our scripts, with its hyperparameters.

    python benchmarks/sb3_run.py ppo_discrete.py --env-id CartPole-v1 --total-timesteps 10000

The flags are those of our script. The environments, their wrappers and the networks are what SB3
itself offers for the task, on the CPU. Leaves runs/sb3/metrics.csv in the columns of ours, with the
row charts/SPS at the end of each rollout.
"""

import importlib
import sys
import time
from pathlib import Path

import ale_py
import gymnasium as gym
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_atari_env, make_vec_env
from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where our scripts are
gym.register_envs(ale_py)


def make_envs(script: str, args):
    """The environments as SB3's documentation makes them for this kind of task."""
    if script == "ppo_atari":
        envs = make_atari_env(args.env_id, n_envs=args.num_envs, seed=args.seed)
        return VecFrameStack(envs, n_stack=4)
    envs = make_vec_env(args.env_id, n_envs=args.num_envs, seed=args.seed)
    return VecNormalize(envs, gamma=args.gamma) if script == "ppo_continuous" else envs


class Metrics(BaseCallback):
    """Writes metrics.csv; `time` is in seconds since its construction."""

    def __init__(self, folder: Path):
        super().__init__()
        folder.mkdir(parents=True)
        self.file = open(folder / "metrics.csv", "w")
        self.file.write("global_step,time,name,value\n")
        self.start_time = time.time()

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self):
        seconds = time.time() - self.start_time
        speed = self.num_timesteps / seconds
        self.file.write(f"{self.num_timesteps},{seconds:.3f},charts/SPS,{speed:.9g}\n")

    def _on_training_end(self):
        self.file.close()


def main(script: str, argv: list[str]):
    args = importlib.import_module(script).parse_args(argv)
    model = PPO(
        "CnnPolicy" if script == "ppo_atari" else "MlpPolicy",
        make_envs(script, args),
        learning_rate=lambda remaining: args.learning_rate * (remaining if args.anneal_lr else 1),
        n_steps=args.num_steps,
        batch_size=args.minibatch_size,
        n_epochs=args.update_epochs,
        gamma=args.gamma,
        gae_lambda=args.gae_lambda,
        clip_range=args.clip_coef,
        clip_range_vf=args.clip_coef if args.clip_vloss else None,
        normalize_advantage=args.norm_adv,
        ent_coef=args.ent_coef,
        vf_coef=args.vf_coef,
        max_grad_norm=args.max_grad_norm,
        seed=args.seed,
        device="cpu",
    )
    model.learn(args.total_timesteps, callback=Metrics(Path("runs") / "sb3"))


if __name__ == "__main__":
    main(Path(sys.argv[1]).stem, sys.argv[2:])
