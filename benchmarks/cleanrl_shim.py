"""Runs an unchanged CleanRL or LeanRL script, written for Gymnasium 0.29, under Gymnasium 1.x.

    python benchmarks/cleanrl_shim.py CLONE/cleanrl/ppo.py --env-id CartPole-v1 --no-cuda

Gives Gymnasium the names, signatures and same-step autoreset that the script expects, and takes its
scalars as runs/{run name}/metrics.csv in the columns of ours, global_step,time,name,value, in place
of TensorBoard's files, and its hyperparameters as config.json. Of LeanRL, which logs every tenth
iteration to Weights & Biases, it takes the steps and the time at the end of each iteration, where
its progress bar goes on.
"""

import ast
import contextlib
import hashlib
import json
import os
import platform
import runpy
import shlex
import subprocess
import sys
import time
import types
from collections import deque
from pathlib import Path

import ale_py
import cv2
import gymnasium as gym
import numpy as np
import torch
import tqdm


class SummaryWriter:
    """Stands in for torch.utils.tensorboard's; `time` is in seconds since its construction."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True)
        self.file = open(self.folder / "metrics.csv", "w")
        self.file.write("global_step,time,name,value\n")
        self.start_time = time.time()

    def add_scalar(self, name, value, step):
        seconds = time.time() - self.start_time
        self.file.write(f"{step},{seconds:.3f},{name},{float(value)!r}\n")

    def add_text(self, name, text):
        """The hyperparameters, a table in Markdown: to config.json, with what ours has there."""
        script = Path(sys.argv[0]).resolve()
        rows = (line[1:-1].split("|") for line in text.splitlines()[2:])  # |key|value|
        config = dict(rows)
        for key, text_of_value in config.items():
            with contextlib.suppress(ValueError, SyntaxError):  # a string such as CartPole-v1
                config[key] = ast.literal_eval(text_of_value)
        git = ["git", "-C", str(script.parent), "rev-parse", "HEAD"]
        found = subprocess.run(git, check=False, capture_output=True, text=True)
        config["git_commit"] = found.stdout.strip()
        config["script_sha256"] = hashlib.sha256(script.read_bytes()).hexdigest()
        command = ["benchmarks/cleanrl_shim.py", f"CLONE/cleanrl/{script.name}", *sys.argv[1:]]
        config |= {"program": "CleanRL", "command": shlex.join(command), "device": "cpu"}
        config |= {"cpus": os.cpu_count(), "torch_threads": torch.get_num_threads()}
        config["versions"] = {"python": platform.python_version(), "torch": torch.__version__}
        config["versions"] |= {"gymnasium": gym.__version__, "numpy": np.__version__}
        (self.folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    def close(self):
        self.file.close()


class Progress:
    """Stands in for tqdm.tqdm around the iterations 1, 2, ... of LeanRL; `init` for wandb.init."""

    batch_size = None

    def __init__(self, iterations):
        self.iterations = iterations

    def __iter__(self):
        writer = SummaryWriter("runs/leanrl")
        for iteration in self.iterations:
            yield iteration
            step = iteration * self.batch_size
            writer.add_scalar("charts/SPS", step / (time.time() - writer.start_time), step)
        writer.close()

    def set_description(self, text):
        """What the bar shows; not needed."""

    @classmethod
    def init(cls, config, **_):
        cls.batch_size = config["batch_size"]


def info_of(infos, i):
    """The info of environment i out of Gymnasium 1.x's arrays, each with its mask."""
    return {
        key: info_of(value, i) if isinstance(value, dict) else value[i]
        for key, value in infos.items()
        if f"_{key}" in infos and infos[f"_{key}"][i]
    }


class SyncVectorEnv(gym.vector.SyncVectorEnv):
    """Same-step autoreset, and `final_info` as an array of dictionaries, None where not done."""

    def __init__(self, env_fns):
        super().__init__(env_fns, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)

    def step(self, actions):
        *result, infos = super().step(actions)
        if "final_info" in infos:
            final = np.full(self.num_envs, None)
            for i in np.flatnonzero(infos["_final_info"]):
                final[i] = info_of(infos["final_info"], i)
            infos["final_info"] = final
        return *result, infos


class TransformObservation(gym.wrappers.TransformObservation):
    """The observation space was not an argument."""

    def __init__(self, env, func):
        super().__init__(env, func, None)


class ClipAction(gym.wrappers.ClipAction):
    """The action space stayed that of the environment."""

    def __init__(self, env):
        super().__init__(env)
        self.action_space = env.action_space


class GrayScaleObservation(gym.ObservationWrapper):
    """By OpenCV."""

    def __init__(self, env):
        super().__init__(env)
        self.observation_space = gym.spaces.Box(0, 255, env.observation_space.shape[:2], np.uint8)

    def observation(self, observation):
        return cv2.cvtColor(observation, cv2.COLOR_RGB2GRAY)


class FrameStack(gym.Wrapper):
    """Oldest frame first, filled with the first one at a reset."""

    def __init__(self, env, count):
        super().__init__(env)
        self.frames = deque(maxlen=count)
        shape = (count, *env.observation_space.shape)
        self.observation_space = gym.spaces.Box(0, 255, shape, np.uint8)

    def reset(self, **kwargs):
        frame, info = self.env.reset(**kwargs)
        self.frames.extend([frame] * self.frames.maxlen)
        return np.stack(self.frames), info

    def step(self, action):
        frame, *result = self.env.step(action)
        self.frames.append(frame)
        return np.stack(self.frames), *result


if __name__ == "__main__":
    tensorboard = types.ModuleType("torch.utils.tensorboard")
    tensorboard.SummaryWriter = SummaryWriter
    sys.modules["torch.utils.tensorboard"] = tensorboard
    sys.modules["wandb"] = wandb = types.ModuleType("wandb")
    wandb.init, wandb.log = Progress.init, lambda metrics, step: None
    tqdm.tqdm = Progress
    gym.vector.SyncVectorEnv = SyncVectorEnv
    for wrapper in (TransformObservation, ClipAction, GrayScaleObservation, FrameStack):
        setattr(gym.wrappers, wrapper.__name__, wrapper)
    gym.register_envs(ale_py)
    script = Path(sys.argv[1])
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(script.parent.parent))  # where cleanrl_utils is
    runpy.run_path(str(script), run_name="__main__")
