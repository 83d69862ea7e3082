"""Runs an unchanged CleanRL or LeanRL script, written for Gymnasium 0.29, under Gymnasium 1.x.

    python benchmarks/cleanrl_shim.py CLONE/cleanrl/ppo.py --env-id CartPole-v1 --no-cuda

Gives Gymnasium the names, signatures and same-step autoreset that the script expects, and takes its
scalars as runs/{run name}/metrics.csv in the columns of ours, global_step,time,name,value, in place
of TensorBoard's files. Of LeanRL, which logs every tenth iteration to Weights & Biases, it takes
the steps and the time at the end of each iteration, where its progress bar goes on.
"""

import runpy
import sys
import time
import types
from collections import deque
from pathlib import Path

import ale_py
import cv2
import gymnasium as gym
import numpy as np
import torch  # noqa: F401  it uses the true tqdm
import tqdm


class SummaryWriter:
    """Stands in for torch.utils.tensorboard's; `time` is in seconds since its construction."""

    def __init__(self, folder):
        Path(folder).mkdir(parents=True)
        self.file = open(Path(folder) / "metrics.csv", "w")
        self.file.write("global_step,time,name,value\n")
        self.start_time = time.time()

    def add_scalar(self, name, value, step):
        seconds = time.time() - self.start_time
        self.file.write(f"{step},{seconds:.3f},{name},{float(value)!r}\n")

    def add_text(self, name, text):
        """The hyperparameters; not needed."""

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
