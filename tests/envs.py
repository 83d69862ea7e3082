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


class Guess(gym.Env):
    """One-step episodes: reward 1 for naming the class of the observation, else 0."""

    action_space = gym.spaces.Discrete(4)
    observation_space = gym.spaces.Box(0.0, 1.0, (4,), np.float32)

    def observation(self):
        return np.eye(4, dtype=np.float32)[self.answer]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.answer = self.np_random.integers(4)
        return self.observation(), {}

    def step(self, action):
        return self.observation(), float(action == self.answer), True, False, {}


class GuessPicture(Guess):
    """The same from pixels: one bright quarter in the newest of four frames."""

    observation_space = gym.spaces.Box(0, 255, (84, 84, 4), np.uint8)

    def observation(self):
        frames = np.zeros((84, 84, 4), np.uint8)
        row, column = divmod(int(self.answer), 2)
        frames[42 * row : 42 * row + 42, 42 * column : 42 * column + 42, 3] = 255
        return frames


class Target(gym.Env):
    """One-step episodes: the reward is minus the squared distance of the action to the target."""

    action_space = gym.spaces.Box(-2.0, 2.0, (2,), np.float32)
    observation_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float64)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.target = self.np_random.uniform(-1, 1, 2)
        return self.target.copy(), {}

    def step(self, action):
        return self.target.copy(), -float(((action - self.target) ** 2).sum()), True, False, {}


class Choices(gym.Env):
    """Takes any discrete action there is and says which choices are valid, then and only then.

    `masks` are those of one observation after the other, over and over, flat or in a tuple; the
    observation is the number of the mask. `actions` keeps what the environment was given. It fails
    when an action is not valid, if it is strict.
    """

    observation_space = gym.spaces.Box(0.0, 1e9, (2,), np.float64)

    def __init__(self, nvec=(2, 3), start=None, masks=None, by_method=False, length=3, strict=True):
        self.strict = strict
        self.action_space = gym.spaces.MultiDiscrete(nvec, start=start)
        self.masks, self.by_method, self.length = masks, by_method, length
        self.seen, self.actions = -1, []
        if masks is not None and by_method:
            self.action_masks = self.mask

    def mask(self):
        return self.masks[self.seen % len(self.masks)]

    def observe(self):
        self.seen, self.t = self.seen + 1, self.t + 1
        info = {} if self.masks is None or self.by_method else {"action_mask": self.mask()}
        return np.array([self.seen, self.t], np.float64), info

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = -1
        return self.observe()

    def step(self, action):
        self.actions.append(action)
        assert self.action_space.contains(action)
        if self.masks is not None and self.strict:
            valid = np.concatenate(self.mask()) if isinstance(self.mask(), tuple) else self.mask()
            firsts = np.cumsum([0, *self.action_space.nvec[:-1]])
            assert np.all(valid[firsts + action]), "not valid"
        obs, info = self.observe()
        return obs, 1.0, self.t == self.length, False, info


class MaskedGuess(Guess):
    """Names are two syllables out of 12; only those of four names are valid, others every time."""

    action_space = gym.spaces.MultiDiscrete((12, 12))
    names = np.array([(0, 7), (3, 2), (5, 11), (8, 1)])

    def reset(self, *, seed=None, options=None):
        obs, info = super().reset(seed=seed)
        return obs, info | {"action_mask": self.mask()}

    def mask(self):
        """The two syllables of the answer and two others for each place."""
        valid = np.zeros((2, 12), np.int8)
        for place, syllable in enumerate(self.names[self.answer]):
            valid[place, syllable] = 1
            valid[place, self.np_random.choice(12, 2, replace=False)] = 1
        self.valid = valid
        return valid.ravel()

    def step(self, action):
        assert self.valid[[0, 1], action].all(), "not valid"
        right = (action == self.names[self.answer]).all()
        return self.observation(), float(right), True, False, {"action_mask": self.mask()}
