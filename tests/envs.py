"""Environments whose every number is known, registered in conftest.py."""

import gymnasium as gym
import numpy as np


class Scripted(gym.Env):
    """Plays the given episodes again and again, whatever the action.

    An episode is a list of (reward, terminated, truncated); the observation is
    (number of the episode, steps taken in it). `actions` keeps what the environment was given.
    """

    action_space = gym.spaces.Discrete(2)
    observation_space = gym.spaces.Box(-1e9, 1e9, (2,), np.float32)

    def __init__(self, episodes=(((1.0, False, False), (1.0, False, False), (1.0, True, False)),)):
        self.episodes, self.episode, self.t, self.actions = episodes, -1, 0, []

    def observation(self):
        return np.array([self.episode, self.t], self.observation_space.dtype)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1, 0
        return self.observation(), {}

    def step(self, action):
        self.actions.append(action)
        reward, terminated, truncated = self.episodes[self.episode % len(self.episodes)][self.t]
        self.t += 1
        return self.observation(), reward, terminated, truncated, {}


class ScriptedBox(Scripted):
    """The same in float64 with two action components within 1, as MuJoCo's tasks have them."""

    action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
    observation_space = gym.spaces.Box(-1e9, 1e9, (2,), np.float64)
