"""Two tasks of ablate.py for which Gymnasium has none: with memory, and with masks."""

import gymnasium as gym
import numpy as np


class Recall(gym.Env):
    """The first of five pictures has one bright half; the last action is paid 1 for naming it.

    The observation is the last `frames` pictures. A stack of four has lost the first in the end.
    """

    action_space = gym.spaces.Discrete(2)

    def __init__(self, frames=1):
        self.observation_space = gym.spaces.Box(0, 255, (84, 84, frames), np.uint8)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.answer, self.t = int(self.np_random.integers(2)), 0
        self.stack = np.zeros(self.observation_space.shape, np.uint8)
        self.stack[:, 42 * self.answer : 42 * self.answer + 42, -1] = 255
        return self.stack.copy(), {}

    def step(self, action):
        self.stack = np.roll(self.stack, -1, axis=-1)
        self.stack[..., -1] = 0
        self.t += 1
        done = self.t == 5
        return self.stack.copy(), float(done and action == self.answer), done, False, {}


class Names(gym.Env):
    """One-step episodes: 1 for the name of what is seen, two syllables out of 12 each, else 0.

    For each place the right syllable and one or two others are valid. An action that is not valid
    is a wrong name.
    """

    action_space = gym.spaces.MultiDiscrete((12, 12))
    observation_space = gym.spaces.Box(0.0, 1.0, (16,), np.float32)
    names = np.random.default_rng(0).integers(12, size=(16, 2))

    def see(self):
        """obs [16] and a mask [24]"""
        self.seen = self.np_random.integers(16)
        valid = np.zeros((2, 12), np.int8)
        for place, syllable in enumerate(self.names[self.seen]):
            valid[place, self.np_random.choice(12, 2, replace=False)] = 1
            valid[place, syllable] = 1
        return np.eye(16, dtype=np.float32)[self.seen], {"action_mask": valid.ravel()}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.see()

    def step(self, action):
        right = (action == self.names[self.seen]).all()
        obs, info = self.see()
        return obs, float(right), True, False, info


gym.register("Recall-v0", Recall)
gym.register("Names-v0", Names)
