"""Writes docs/vectors/*.json from the functions of the scripts: numbers to check a PPO against.

    PYTHONPATH=. python docs/make_vectors.py

A file is one call. docs/check_your_own.md says what is in it; the first iterations of the scripts,
vectors/first_iterations_*.json, are written by tests/test_reference.py.
"""

import contextlib
import functools
import hashlib
import io
import json
import math
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import ale_py
import cv2
import gymnasium as gym
import numpy as np
import torch
from torch import nn

import ppo_atari
import ppo_atari_lstm
import ppo_continuous
import ppo_discrete
import ppo_rlhf

FOLDER = Path(__file__).parent / "vectors"
SAME_STEP = gym.vector.AutoresetMode.SAME_STEP
SCHEDULES = ("anneal_lr", "anneal_clip", "anneal_ent")


# ------------------------------------------------------------------------------------------------
# Files


def vector(detail, about, inputs, outputs, tolerance=1e-6):
    return {
        "detail": detail.split(),
        "about": about,
        "inputs": plain(inputs),
        "outputs": plain(outputs),
        "tolerance": tolerance,
    }


def plain(x):
    """Arrays as lists, numbers to nine digits, no zero below zero."""
    if isinstance(x, dict):
        return {name: plain(value) for name, value in x.items()}
    if isinstance(x, np.ndarray | torch.Tensor | np.generic):
        x = x.tolist()
    if isinstance(x, list | tuple):
        return [plain(value) for value in x]
    return float(f"{x:.9g}") + 0.0 if isinstance(x, float) else x


def text(vector):
    """JSON with a line for each input and output."""
    lines = [f'"{name}": {json.dumps(vector[name])}' for name in ("detail", "about")]
    for part in ("inputs", "outputs"):
        rows = [f'"{k}": {json.dumps(x, allow_nan=False)}' for k, x in vector[part].items()]
        lines.append(f'"{part}": {{\n' + ",\n".join(rows) + "\n}")
    lines.append(f'"tolerance": {vector["tolerance"]}')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def wave(*shape, first=0, scale=1.0):
    """scale sin(k^2) to three decimals, k = first, first + 1, ...: no pattern to be seen."""
    k = np.arange(first, first + math.prod(shape))
    return np.round(scale * np.sin(k**2), 3).reshape(shape)


# ------------------------------------------------------------------------------------------------
# Advantages


def gae(gae_lambda):
    """Environment 0 ends in the middle, 1 is cut off there, 2 ends with the last step."""
    values, dones = wave(7, 3, first=30), np.zeros((6, 3), int)
    dones[2, 0] = dones[3, 1] = dones[5, 2] = 1
    next_values = np.where(dones, 0.0, values[1:])
    next_values[3, 1] = 0.7  # the value of what was seen last
    inputs = {
        "rewards": wave(6, 3),
        "values": values[:6],
        "next_values": next_values,
        "dones": dones,
        "gamma": 0.99,
        "gae_lambda": gae_lambda,
    }
    about = "Arrays [T, N]. dones[2][0] and dones[5][2] end an episode, dones[3][1] is a time limit"
    about += " and the 0.7 in next_values the value of the last observation before it."
    return vector("C5", about, inputs, {"advantages": ppo_discrete.gae(**inputs)})


def advantage_normalization():
    """With a ratio of 1, the gradient by log pi(a|s) is - A / M."""
    advantages = torch.tensor(wave(8, first=3, scale=4.0) + 2.0)
    logprobs = torch.zeros(8, dtype=torch.float64, requires_grad=True)
    zeros = torch.zeros_like(advantages)
    agent = given(logprobs, zeros)
    minibatch = zeros, zeros, zeros, zeros, advantages, zeros
    ppo_discrete.ppo_loss(agent, minibatch, 0.2, 0.0, None, 0.0, True, False)[0].backward()
    about = "Of a minibatch, to mean 0 and the population's standard deviation 1."
    outputs = {"normalized_advantages": -8 * logprobs.grad}
    return vector("C7", about, {"advantages": advantages}, outputs)


# ------------------------------------------------------------------------------------------------
# The loss


def given(new_logprobs, new_values):
    """An agent that says this of whatever it sees."""
    zeros = torch.zeros_like(new_values)
    policy = SimpleNamespace(log_prob=lambda actions: new_logprobs, entropy=lambda: zeros)
    return lambda obs: (policy, new_values)


def spaces_of(observations, actions):
    """What an agent asks of its environments."""
    return SimpleNamespace(single_observation_space=observations, single_action_space=actions)


class Choices(gym.Env):
    """Observations of one number, which is not looked at."""

    observation_space = gym.spaces.Box(-1, 1, (1,))

    def __init__(self, nvec):
        self.action_space = gym.spaces.MultiDiscrete(nvec)


def discrete_policy(logits, nvec, mask=None):
    """ppo_discrete.Agent whose actor says `logits` [M, sum(nvec)], and what to show it."""
    env = ppo_discrete.DiscreteActions(ppo_discrete.Watched(Choices(nvec), 0))
    agent = ppo_discrete.Agent(spaces_of(env.observation_space, env.action_space))
    columns = torch.as_tensor(env.columns - 1)  # of the choices that exist
    every = torch.zeros(len(logits), math.prod(agent.choices), dtype=torch.float64)
    every = every.index_copy(1, columns, logits)
    agent.actor.forward = lambda obs: every
    masks = np.ones(logits.shape) if mask is None else mask
    obs = [env.with_mask(np.zeros(1), {"action_mask": row}) for row in masks]
    return agent, torch.as_tensor(np.stack(obs))


def gaussian_policy(mean, log_std):
    """The same of ppo_continuous.Agent."""
    space = gym.spaces.Box(-1, 1, mean.shape[1:])
    agent = ppo_continuous.Agent(spaces_of(space, space))
    del agent.log_std  # the parameter
    agent.log_std = log_std
    agent.actor.forward = lambda obs: mean
    return agent, torch.zeros(mean.shape)


MOVED = np.array([-0.4, 0.0, 0.05, 0.3, -0.25, 0.0, 0.35, 0.1])  # log-ratios, half of them clipped


def loss(script, make_policy, leaves, fixed, actions, detail, about, **switches):
    """ppo_loss and its derivatives by `leaves`, of which the policy is made, and the new values."""
    M = len(actions)
    leaves = {name: torch.tensor(x, requires_grad=True) for name, x in leaves.items()}
    new_values = torch.tensor(wave(M, first=200), requires_grad=True)
    agent, obs = make_policy(**leaves, **fixed)
    agent.critic.forward = lambda obs: new_values[:, None]
    new_logprobs = agent(obs)[0].log_prob(torch.as_tensor(actions)).detach().numpy()
    minibatch = {
        "actions": actions,
        "logprobs": np.round(new_logprobs, 3) - MOVED,
        "values": np.round(new_values.detach().numpy() - wave(M, first=240, scale=0.4), 3),
        "advantages": wave(M, first=260, scale=2.0) + 0.5,
        "returns": wave(M, first=280, scale=1.5),
    }
    coefficients = {"clip_coef": 0.2, "ent_coef": 0.05, "vf_coef": 0.5}
    coefficients |= {"norm_adv": True, "clip_vloss": True} | switches
    tensors = [obs, *map(torch.as_tensor, minibatch.values())]
    total, stats = script.ppo_loss(agent, tensors, kl_coef=None, **coefficients)
    total.backward()
    leaves["new_values"] = new_values
    gradients = {f"grad_{name}": x.grad for name, x in leaves.items()}
    inputs = {name: x.detach() for name, x in leaves.items()} | fixed | minibatch | coefficients
    outputs = {"new_logprobs": new_logprobs} | stats | gradients
    about += " grad_x are the derivatives of the loss by x."
    return vector(f"C7 C8 C9 C10 C12 {detail}", about, inputs, outputs, 1e-5)


def discrete_loss(nvec, mask, detail, about, **switches):
    """Actions are valid ones, taken in turn."""
    logits = wave(8, sum(nvec), first=100, scale=2.0)
    parts = np.split(np.ones(logits.shape) if mask is None else mask, np.cumsum(nvec)[:-1], axis=1)
    valid = [[np.flatnonzero(row) for row in part] for part in parts]
    actions = np.array([[x[i % len(x)] for i, x in enumerate(rows)] for rows in valid]).T
    fixed = {"nvec": nvec} if mask is None else {"nvec": nvec, "mask": mask}
    policy = ppo_discrete, discrete_policy, {"logits": logits}, fixed
    return loss(*policy, actions, detail, about, **switches)


def gaussian_loss():
    leaves = {"mean": wave(8, 3, first=100), "log_std": np.array([-0.5, 0.1, 0.3])}
    actions = leaves["mean"] + wave(8, 3, first=150)
    about = "A normal distribution for each of three components, log_std the same in all states."
    policy = ppo_continuous, gaussian_policy, leaves, {}
    return loss(*policy, actions, "R1 R2 R3", about)


MASK = np.array([[1, 1, 0, 1, 1], [0, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 1, 1, 1, 1]] * 2)


def value_clipping():
    """All numbers are exact in binary, so that the edge is the edge in float32, too."""
    moved = np.array([-0.5, -0.375, -0.25, -0.125, 0.0, 0.125, 0.25, 0.375, 0.5])
    returns = np.repeat([-1.0, 0.125, 0.5, 0.875, 2.0], 9)
    new_values, values = 0.5 + np.tile(moved, 5), np.full(45, 0.5)
    zeros, losses = torch.zeros(1, dtype=torch.float64), []
    columns = (torch.tensor(x).split(1) for x in (new_values, values, returns))
    for new_value, value, target in zip(*columns, strict=True):
        minibatch = zeros, zeros, zeros, value, zeros, target
        coefficients = 0.25, 0.0, None, 1.0, False, True
        _, stats = ppo_discrete.ppo_loss(given(zeros, new_value), minibatch, *coefficients)
        losses.append(stats["value_loss"])
    inputs = {"new_values": new_values, "values": values, "returns": returns, "clip_coef": 0.25}
    about = "Of each sample: half the larger square. Values that are 0.25 off are at the edge."
    return vector("C9", about, inputs, {"value_losses": torch.stack(losses)})


def entropy():
    logits = torch.tensor(wave(4, 5, first=100, scale=2.0))
    log_std = torch.tensor([-0.5, 0.3], dtype=torch.float64)
    policies = {"categorical": discrete_policy(logits, [5])}
    policies["multidiscrete"] = discrete_policy(logits, [3, 2])
    policies["masked"] = discrete_policy(logits, [5], MASK[:4])
    policies["gaussian"] = gaussian_policy(logits[:, :2], log_std)
    outputs = {name: agent(obs)[0].entropy().detach() for name, (agent, obs) in policies.items()}
    inputs = {"logits": logits, "nvec": [3, 2], "mask": MASK[:4], "log_std": log_std}
    about = "Of logits as one choice out of five, as choices out of three and two (nvec), as one"
    about += " choice with a mask, and of a normal distribution with log_std."
    return vector("C10 M1 X4 R3", about, inputs, outputs)


def minibatch_statistics(new_logprobs, logprobs):
    zeros = torch.zeros(len(logprobs), dtype=torch.float64)
    minibatch = zeros, zeros, torch.as_tensor(logprobs), zeros, zeros, zeros
    agent = given(torch.as_tensor(new_logprobs), zeros)
    return ppo_discrete.ppo_loss(agent, minibatch, 0.2, 0.0, None, 0.0, False, False)[1]


def kl():
    logprobs = wave(8, first=3) - 1.5
    new_logprobs = logprobs - np.abs(wave(8, first=20, scale=0.5)) + 0.1
    stats = minibatch_statistics(new_logprobs, logprobs)
    logratio = torch.as_tensor(logprobs - new_logprobs)
    outputs = {name: ppo_rlhf.kl_estimate(logratio, name) for name in ("k1", "k2", "k3")}
    outputs |= {name: stats[name] for name in ("old_approx_kl", "approx_kl")}
    inputs = {"new_logprobs": np.round(new_logprobs, 3), "logprobs": np.round(logprobs, 3)}
    about = "Estimates of KL(old, new) from samples of the old policy; the mean of k1 is"
    about += " old_approx_kl, that of k3 approx_kl."
    return vector("C12 H44 H62", about, inputs, outputs, 1e-5)


def clip_fraction():
    logprobs = np.full(8, -1.0)
    new_logprobs = np.array([-1.693, -1.211, -1.01, -1.0, -0.9, -0.826, -0.819, -0.738])
    stats = minibatch_statistics(new_logprobs, logprobs)
    inputs = {"new_logprobs": new_logprobs, "logprobs": logprobs, "clip_coef": 0.2}
    about = "The share of ratios farther than clip_coef from 1; of log-ratios it would be 3 in 8."
    return vector("C12", about, inputs, {"clipfrac": stats["clipfrac"]})


# ------------------------------------------------------------------------------------------------
# The step


class Leaves(nn.Module):
    """An agent whose values are its parameters."""

    def __init__(self, weight, bias):
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, obs):
        values = torch.cat([self.weight.flatten(), self.bias])
        return given(torch.zeros_like(values), values)(obs)


def gradient_clipping(max_grad_norm):
    """The gradient of the value loss is (V - R) / M, and so R is chosen."""
    gradients = {"weight": wave(2, 3, first=5), "bias": wave(3, first=50)}
    wanted = np.concatenate([x.ravel() for x in gradients.values()])
    agent = Leaves(torch.zeros(2, 3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))
    zeros = torch.zeros(9, dtype=torch.float64)
    batch = [zeros] * 5 + [torch.as_tensor(-9 * wanted)]
    coefficients = 0.2, 0.0, None, 1.0, False, False
    stats = ppo_discrete.ppo_gradient(agent, batch, torch.arange(9), max_grad_norm, *coefficients)
    outputs = {f"clipped_{name}": x.grad for name, x in agent.named_parameters()}
    outputs["grad_norm"] = stats["grad_norm"]
    about = "weight and bias are the gradients of all parameters there are; one norm for both."
    return vector("C11", about, gradients | {"max_grad_norm": max_grad_norm}, outputs)


def record(script, prepare=lambda agent: None, **settings):
    """Train. -> the agent, [(batch, indices, statistics, [learning rate, clip_coef, ent_coef])] of
    the updates, and what Adam was made with
    """
    updates, original, new_agent = [], script.ppo_gradient, script.Agent

    def ppo_gradient(agent, batch, indices, max_grad_norm, *coefficients):
        stats = original(agent, batch, indices, max_grad_norm, *coefficients)
        annealed = [x.item() for x in (adam.call_args.kwargs["lr"], *coefficients[:2])]
        updates.append((batch, indices, stats, annealed))
        return stats

    def make_agent(envs):
        agent = new_agent(envs)
        prepare(agent)
        return agent

    simple = {"cuda": False, "compile": False, "torch_threads": 1, "vectorization": "sync"}
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.chdir(stack.enter_context(tempfile.TemporaryDirectory())))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(patch.object(script, "ppo_gradient", ppo_gradient))
        stack.enter_context(patch.object(script, "Agent", make_agent))
        adam = stack.enter_context(patch.object(torch.optim, "Adam", wraps=torch.optim.Adam))
        agent = script.train(script.Args(**simple | settings))
    return agent, updates, adam.call_args.kwargs


def annealed_run(*names):
    """Five iterations of two steps."""
    schedules = {name: name in names for name in SCHEDULES}
    sizes = {"num_envs": 1, "num_steps": 2, "num_minibatches": 1, "update_epochs": 1}
    return record(ppo_discrete, total_timesteps=10, **sizes, **schedules)


def annealing():
    _, updates, _ = annealed_run(*SCHEDULES)
    args = ppo_discrete.Args()
    inputs = {"learning_rate": args.learning_rate, "clip_coef": args.clip_coef}
    inputs |= {"ent_coef": args.ent_coef, "num_iterations": 5, "iterations": [1, 3, 5]}
    rows = [updates[i - 1][3] for i in inputs["iterations"]]
    names = "learning_rates", "clip_coefs", "ent_coefs"
    about = "In the first, the middle and the last of five iterations; 0 is never reached."
    return vector("C4 X1 X6", about, inputs, dict(zip(names, zip(*rows, strict=True), strict=True)))


def annealing_one_at_a_time():
    args, outputs = ppo_discrete.Args(), {}
    inputs = {"learning_rate": args.learning_rate, "clip_coef": args.clip_coef}
    inputs |= {"ent_coef": args.ent_coef, "num_iterations": 5, "iteration": 3}
    for name in ("nothing", *SCHEDULES):
        _, updates, _ = annealed_run(name)
        outputs[name] = updates[inputs["iteration"] - 1][3]
    about = "Learning rate, clip_coef and ent_coef in that iteration, if only this is annealed."
    return vector("C4 X1 X6", about, inputs, outputs)


def adam():
    """Gradients of the size of epsilon and far from it."""
    _, _, how = annealed_run()
    parameters = torch.tensor(wave(6, first=5), requires_grad=True)
    gradients = wave(3, 6, first=40) * [1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-5]
    inputs = {"parameters": parameters.detach().clone(), "gradients": gradients}
    inputs |= {"learning_rate": 0.01, "betas": [0.9, 0.999], "eps": how["eps"]}
    optimizer = torch.optim.Adam([parameters], **how | {"lr": 0.01})
    after = []
    for gradient in gradients:
        parameters.grad = torch.as_tensor(gradient)
        optimizer.step()
        after.append(parameters.detach().clone() - inputs["parameters"])
    about = "Three steps, each with gradients [6] of its own; change[i] is what they have changed"
    about += " after i + 1 of them. Epsilon is added to the root of the corrected second moment."
    return vector("C3", about, inputs, {"change": torch.stack(after)}, 1e-5)


def orthogonal():
    """Of all weights of the classic scripts, as matrices [outputs, inputs]."""
    numbers, pictures = gym.spaces.Box(-1, 1, (6,)), gym.spaces.Box(0, 255, (84, 84, 4))
    agents = {
        "discrete": (ppo_discrete, numbers, gym.spaces.MultiDiscrete([2])),
        "continuous": (ppo_continuous, numbers, gym.spaces.Box(-1, 1, (3,))),
        "atari": (ppo_atari, pictures, gym.spaces.Discrete(4)),
        "atari_lstm": (ppo_atari_lstm, pictures, gym.spaces.Discrete(4)),
    }
    shapes, singular_values, biases = {}, {}, 0.0
    torch.manual_seed(0)  # for the last digits
    for name, (script, *spaces) in agents.items():
        for parameter, x in script.Agent(spaces_of(*spaces)).named_parameters():
            if "weight" in parameter:
                found = torch.linalg.svdvals(x.detach().flatten(1))
                shapes[f"{name}.{parameter}"] = list(x.shape)
                singular_values[f"{name}.{parameter}"] = [found.min(), found.max()]
            elif "bias" in parameter:
                biases = max(biases, x.detach().abs().max().item())
    about = "The smallest and the largest singular value of each weight, flat [outputs, inputs];"
    about += " all of a weight are its gain. The largest bias is 0."
    outputs = singular_values | {"largest_bias": biases}
    return vector("C2 L1", about, {"shapes": shapes}, outputs, 1e-5)


# ------------------------------------------------------------------------------------------------
# Environments


class Stream(gym.Env):
    """Plays column i of what `data` has, whatever the actions are."""

    def __init__(self, data, i, action_space):
        self.data, self.i, self.t, self.action_space = data, i, 0, action_space
        dtype = data["obs"].dtype
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, data["obs"].shape[2:], dtype)

    def reset(self, seed=None, options=None):
        return self.data["obs"][self.t, self.i], {}

    def step(self, action):
        now, self.t = (self.t, self.i), self.t + 1
        reward, *ends = (self.data[name][now] for name in ("rewards", "terminated", "truncated"))
        obs = self.data["final_obs"][now] if any(ends) else self.data["obs"][self.t, self.i]
        return obs, float(reward), *map(bool, ends), {}


def stream_data(dim, dtype):
    """T = 8: obs [T + 1, 2, dim], final_obs [T, 2, dim], rewards, terminated, truncated [T, 2]

    Environment 0 ends twice, environment 1 is cut off once.
    """
    T = 8
    terminated, truncated = np.zeros((2, T, 2), int)
    terminated[2, 0] = terminated[6, 0] = truncated[3, 1] = 1
    final_obs = wave(T, 2, dim, first=400, scale=2.0) * (terminated | truncated)[..., None]
    return {
        "obs": wave(T + 1, 2, dim, first=300, scale=2.0).astype(dtype),
        "final_obs": final_obs.astype(dtype),
        "rewards": wave(T, 2, first=500) + 0.5,
        "terminated": terminated,
        "truncated": truncated,
    }


def normalization(sign):
    """The first rewards and one final observation are clipped, on the side of the sign."""
    data = stream_data(2, np.float64)
    data["obs"] += [3.0, -1.0]
    data["final_obs"][3, 1] = sign * 50.0
    data["rewards"][0] = sign
    makers = [functools.partial(Stream, data, i, gym.spaces.Box(-1, 1, (1,))) for i in range(2)]
    envs = gym.vector.SyncVectorEnv(makers, autoreset_mode=SAME_STEP)
    envs = ppo_continuous.VecNormalize(envs, gamma=0.9)
    obs, rewards, final_obs = [envs.reset()[0]], [], np.zeros((8, 2, 2))
    for t in range(8):
        seen, reward, _, _, info = envs.step(np.zeros((2, 1)))
        obs.append(seen)
        rewards.append(reward)
        for i in np.flatnonzero(info.get("_final_obs", ())):
            final_obs[t, i] = info["final_obs"][i]
    outputs = {"normalized_obs": np.stack(obs), "normalized_final_obs": final_obs}
    outputs |= {"normalized_rewards": np.stack(rewards)}
    for name, rms in (("obs", envs.obs_rms), ("return", envs.return_rms)):
        outputs |= {f"{name}_mean": rms.mean, f"{name}_var": rms.var}
    about = "Two environments, eight steps. final_obs[t][i], the last one of an episode, is"
    about += " normalized and not counted (zeros where none ended); obs[t + 1][i] then begins the"
    about += " next. Statistics begin with mean 0, variance 1 and a count of 1e-4."
    return vector("R6 R7 R8 R9", about, data | {"gamma": 0.9}, outputs, 1e-5)


def digest(frames):
    return hashlib.sha256(frames.tobytes()).hexdigest()


def atari(title, num_steps, held=None, **env_kwargs):
    """Frames of every tenth step, and all of them one after the other.

    held: from step 60 on only this action, which soon loses a game.
    """
    env_id, seed = f"{title}NoFrameskip-v4", 1
    settings = {"env_id": env_id, "env_kwargs": json.dumps(env_kwargs)}
    envs = ppo_atari.make_envs(ppo_atari.Args(**settings, num_envs=1, vectorization="sync"))
    game = gym.make(env_id)  # another one, whose generator draws the same numbers
    game.reset(seed=seed)
    noops = game.unwrapped.np_random.integers(1, 31, size=2)
    actions = (wave(num_steps, scale=1000).astype(int) % envs.single_action_space.n).tolist()
    actions = actions if held is None else actions[:60] + [held] * (num_steps - 60)
    frames, rewards, ends = [envs.reset(seed=[seed])[0][0].copy()], [], [[], []]
    for t, action in enumerate(actions):
        obs, reward, *end, _ = envs.step([action])
        frames.append(obs[0].copy())
        rewards.append(int(reward[0]))
        for steps, x in zip(ends, end, strict=True):
            steps.extend([t] * int(x[0]))
    envs.close()
    inputs = {"env_id": env_id, "env_kwargs": env_kwargs, "noops": noops, "actions": actions}
    outputs = {"shape": frames[0].shape, "dtype": str(frames[0].dtype)}
    outputs |= {"sha256_of_every_tenth": [digest(x) for x in frames[::10]]}
    outputs |= {"sha256_of_all": digest(np.stack(frames))}
    outputs |= {"rewards": rewards, "terminated_at": ends[0], "truncated_at": ends[1]}
    about = "noops: how many begin each game in turn. Frames: the one after reset and one a step,"
    about += " where an episode ended the first of the next. x_at: numbers of steps, from 0."
    about += f" With ale-py {ale_py.__version__} and OpenCV {cv2.__version__}."
    return vector("A1 A2 A3 A4 A5 A6 A7", about, inputs, outputs, 0)


# ------------------------------------------------------------------------------------------------
# Memory


def lstm():
    """ppo_atari_lstm.Agent with a torso and heads that do nothing, and a small LSTM."""
    T, N = 6, 3
    x, state = wave(T, N, 2, first=10), [wave(1, N, 4, first=k) for k in (60, 80)]
    starts = np.zeros((T, N), int)
    starts[0, 0] = starts[3, 1] = starts[3, 2] = starts[5, 1] = 1
    memory = nn.LSTM(2, 4)
    named = enumerate(memory.named_parameters(), start=1)
    weights = {name: wave(*p.shape, first=100 * i) for i, (name, p) in named}
    memory.load_state_dict({name: torch.as_tensor(value) for name, value in weights.items()})
    agent = SimpleNamespace(bf16=False, torso=nn.Flatten(), lstm=memory)
    agent.actor = agent.critic = nn.Identity()
    pixels = torch.tensor(255 * x, dtype=torch.float32)[:, :, None, None]
    start = [torch.tensor(memory, dtype=torch.float32) for memory in state]
    with torch.no_grad():
        forward = ppo_atari_lstm.Agent.forward
        _, hidden, (h, c) = forward(agent, pixels, torch.as_tensor(starts), start)
    inputs = {"x": x, "starts": starts, "h": state[0][0], "c": state[1][0]} | weights
    outputs = {"hidden": hidden, "last_h": h[0], "last_c": c[0]}
    about = "x [T, N, 2] -> hidden [T, N, 4]; h and c are the state before x[0], made 0 where"
    about += " starts is 1. Rows of the weights: input, forget, cell and output gate, as in torch."
    return vector("L2 L3 L5", about, inputs, outputs)


# ------------------------------------------------------------------------------------------------
# Language models


TOKENS = np.arange(5) < np.array([[5], [3], [1], [4]])  # [B, R], those that count


def tensors(inputs):
    return {k: torch.as_tensor(x) if isinstance(x, np.ndarray) else x for k, x in inputs.items()}


def token_rewards():
    inputs = {"scores": wave(4, first=5), "has_eos": np.array([False, True, True, False])}
    inputs |= {"kl": wave(4, 5, first=20), "mask": TOKENS}
    inputs |= {"kl_coef": 0.1, "missing_eos_penalty": -1.0}
    rewards = ppo_rlhf.token_rewards(**tensors(inputs))
    about = "Arrays [B] and [B, R]. The score is on the last token that counts, the penalty in its"
    about += " place without EOS; what does not count gets 0, whatever its KL."
    return vector("H43 H44 H45 H61", about, inputs, {"rewards": rewards})


def whiten(shift_mean):
    inputs = {"x": wave(4, 5, first=20) + 0.5, "mask": TOKENS}
    inputs |= {} if shift_mean else {"shift_mean": False}
    detail = "H52" if shift_mean else "H47"
    about = "Over all tokens that count, to mean 0." if shift_mean else "The mean stays as it is."
    return vector(detail, about, inputs, {"whitened": ppo_rlhf.whiten(**tensors(inputs))})


def group_advantages(norm_adv):
    outcomes = wave(12, first=30)
    scores = outcomes + np.abs(wave(12, first=50, scale=0.2))  # there was a KL
    scores[4:8] = 0.5
    inputs = {"outcomes": outcomes, "scores": np.round(scores, 3), "group_size": 4}
    inputs |= {"norm_adv": norm_adv}
    advantages, dead = ppo_rlhf.group_advantages(**tensors(inputs))
    about = "Three groups of four; in the second all scores are equal, though outcomes differ."
    return vector("X7", about, inputs, {"advantages": advantages, "dead_groups": dead})


# ------------------------------------------------------------------------------------------------
# One iteration


def parameter_values(shape):
    """sin(k^2) / sqrt(inputs) for weights, sin(k^2) / 10 for biases, k the flat index."""
    numbers = np.sin(np.arange(math.prod(shape)) ** 2).reshape(shape)
    return numbers / (shape[1] ** 0.5 if len(shape) > 1 else 10)


def iteration():
    data = stream_data(3, np.float32)
    settings = {"gamma": 0.99, "gae_lambda": 0.95, "learning_rate": 3e-3, "clip_coef": 0.2}
    settings |= {"ent_coef": 0.01, "vf_coef": 0.5, "max_grad_norm": 0.5}
    settings |= {"update_epochs": 2, "num_minibatches": 2}
    before = {}

    def make_envs(args):
        space = gym.spaces.Discrete(3)

        def make(i):
            watched = ppo_discrete.Watched(Stream(data, i, space), i)
            return ppo_discrete.DiscreteActions(watched)

        makers = [functools.partial(make, i) for i in range(2)]
        return gym.vector.SyncVectorEnv(makers, autoreset_mode=SAME_STEP)

    def prepare(agent):
        for name, parameter in agent.named_parameters():
            parameter.data.copy_(torch.as_tensor(parameter_values(tuple(parameter.shape))))
            before[name] = parameter.detach().clone()

    sizes = {"num_envs": 2, "num_steps": 8, "total_timesteps": 16}
    with patch.object(ppo_discrete, "make_envs", make_envs):
        agent, updates, _ = record(ppo_discrete, prepare, **sizes, **settings)
    _, actions, *columns = updates[0][0]
    decimals = {name: np.round(data[name].astype(float), 3) for name in ("obs", "final_obs")}
    inputs = data | decimals | {"actions": actions[:, 0].view(8, 2)}
    inputs |= {"permutations": torch.stack([x[1] for x in updates]).view(2, 16)} | settings
    inputs |= {"shapes": {name: list(x.shape) for name, x in before.items()}}
    names = "logprobs", "values", "advantages", "returns"
    outputs = {name: x[:16] for name, x in zip(names, columns, strict=True)}
    outputs |= {name: torch.stack([x[2][name] for x in updates]) for name in updates[0][2]}
    for name, parameter in agent.named_parameters():
        change = (parameter.detach().double() - before[name]).flatten()
        outputs[f"change of {name}"] = [change.norm(), change.sum(), *change[:8]]
    about = "ppo_discrete.py with one choice out of three. A time limit counts on V(final_obs)."
    about += " Arrays [T, N], flat as T N samples in that order. shapes: of the parameters, each"
    about += " sin(k^2) / sqrt(inputs) for weights, sin(k^2) / 10 for biases, k the flat index."
    about += " Losses: one a minibatch. change: of a parameter from first to last, its norm, sum"
    about += " and first 8 values."
    detail = "C1 C3 C4 C5 C6 C7 C8 C9 C10 C11 C12 C13"
    return vector(detail, about, inputs, outputs, 1e-4)


VECTORS = {
    "gae": lambda: gae(0.95),
    "gae_lambda_0": lambda: gae(0.0),
    "gae_lambda_1": lambda: gae(1.0),
    "advantage_normalization": advantage_normalization,
    "loss_discrete": lambda: discrete_loss([5], None, "", "One choice out of five."),
    "loss_multidiscrete": lambda: discrete_loss([3, 2, 4], None, "M1", "Three choices at a time."),
    "loss_masked": lambda: discrete_loss([5], MASK, "X4", "Choices whose mask is 1 are valid."),
    "loss_gaussian": gaussian_loss,
    "loss_plain": lambda: discrete_loss(
        [5], None, "", "Advantages and value loss as they are.", norm_adv=False, clip_vloss=False
    ),
    "value_clipping": value_clipping,
    "entropy": entropy,
    "kl": kl,
    "clip_fraction": clip_fraction,
    "gradient_clipping": lambda: gradient_clipping(0.5),
    "gradient_clipping_below": lambda: gradient_clipping(10.0),
    "adam": adam,
    "annealing": annealing,
    "annealing_one_at_a_time": annealing_one_at_a_time,
    "orthogonal": orthogonal,
    "normalization": lambda: normalization(1),
    "normalization_below": lambda: normalization(-1),
    "atari_breakout": lambda: atari("Breakout", 160, held=3),
    "atari_mspacman": lambda: atari("MsPacman", 200),
    "atari_pong": lambda: atari("Pong", 150, max_num_frames_per_episode=400),
    "lstm": lstm,
    "token_rewards": token_rewards,
    "whiten": lambda: whiten(True),
    "whiten_keep_mean": lambda: whiten(False),
    "group_advantages": lambda: group_advantages(True),
    "group_advantages_not_divided": lambda: group_advantages(False),
    "iteration": iteration,
}

if __name__ == "__main__":
    for name, make in VECTORS.items():
        (FOLDER / f"{name}.json").write_text(text(make()))
