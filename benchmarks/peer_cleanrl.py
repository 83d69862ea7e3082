"""What the code of CleanRL says to docs/vectors/: its own lines and classes, out of a clone.

`answers(folder)` gives for each vector the function (inputs) -> (outputs, undone), where `undone`
has for differences, separated by commas, the outputs there would be without them.
"""

import itertools
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import ale_py
import cleanrl_shim
import cv2
import gymnasium as gym
import numpy as np
import torch
from peer_code import (
    COUNTED,
    DEVIATION,
    FIRST,
    LIMIT,
    SMALL,
    STATISTICS,
    SUMS,
    run,
    with_population_deviation,
)
from torch import nn, optim

import make_vectors


class Script:
    """A script of CleanRL: its text, and what it defines before its `__main__`."""

    def __init__(self, folder, name):
        path = Path(folder) / "cleanrl" / name
        self.source, self.names = path.read_text(), {"__name__": "peer", "__file__": str(path)}
        tensorboard = types.ModuleType("torch.utils.tensorboard")
        tensorboard.SummaryWriter = cleanrl_shim.SummaryWriter
        with (
            patch.dict(sys.modules, {tensorboard.__name__: tensorboard}),
            patch.object(sys, "path", [str(folder), *sys.path]),
        ):
            exec(compile(self.source, str(path), "exec"), self.names)

    def run(self, names, *lines, **until):
        """Adds to `names` what such lines make of them."""
        names.update(torch=torch, np=np, nn=nn, optim=optim, device="cpu")
        return run(self.source, names, *lines, **until)


def tensor(x, grad=False):
    return torch.tensor(np.asarray(x, float), requires_grad=grad)


def advantages(script, rewards, values, next_values, dones, **settings):
    """Its dones[t] says that observation t begins an episode."""
    dones = np.asarray(dones, float)
    names = {"args": SimpleNamespace(num_steps=len(rewards), **settings)}
    names |= {"rewards": tensor(rewards), "values": tensor(values)}
    names |= {"dones": tensor(np.roll(dones, 1, 0)), "next_done": tensor(dones[-1])}
    names |= {"next_value": tensor(next_values)[-1:]}
    return script.run(names, "advantages", "returns")


def gae(script, rewards, next_values, dones, gamma, **others):
    """Undone: the value of what was seen last is added to the last reward, by hand."""
    others |= {"next_values": next_values, "dones": dones, "gamma": gamma}
    ends = np.asarray(rewards) + gamma * np.asarray(next_values) * dones
    found = [advantages(script, rewards=x, **others)["advantages"] for x in (rewards, ends)]
    return {"advantages": found[0]}, {LIMIT: {"advantages": found[1]}}


def minibatch(script, agent, actions, logprobs, values, advantages, returns, **settings):
    """All variables after one minibatch of all samples."""
    M = len(actions)
    names = {"agent": agent, "args": SimpleNamespace(**settings), "mb_inds": np.arange(M)}
    names |= {"b_obs": torch.zeros(M, 1), "b_actions": actions, "clipfracs": []}
    columns = {"logprobs": logprobs, "values": values, "advantages": advantages, "returns": returns}
    names |= {f"b_{name}": tensor(x) for name, x in columns.items()}
    return script.run(names, "newlogprob", "loss")


def agent_of(script, new_values, **tables):
    """Its Agent, whose networks say what is given."""
    critic = {"critic": lambda obs: new_values[:, None]}
    agent = SimpleNamespace(**critic, **tables)
    method = script.names["Agent"].get_action_and_value
    agent.get_action_and_value = lambda *args: method(agent, *args)
    return agent


LOGGED = {
    "new_logprobs": "newlogprob",
    "loss": "loss",
    "policy_loss": "pg_loss",
    "value_loss": "v_loss",
    "entropy": "entropy_loss",
    "old_approx_kl": "old_approx_kl",
    "approx_kl": "approx_kl",
}


def loss(script, new_values, actions, **columns):
    leaves = {k: columns.pop(k) for k in ("logits", "mean", "log_std") if k in columns}
    columns.pop("nvec", None)

    def outputs():
        new, tensors = tensor(new_values, True), {k: tensor(x, True) for k, x in leaves.items()}
        if "logits" in leaves:
            taken, tables = torch.tensor(actions)[:, 0], {"actor": lambda _: tensors["logits"]}
        else:
            taken, tables = tensor(actions), {"actor_mean": lambda _: tensors["mean"]}
            tables["actor_logstd"] = tensors["log_std"][None]
        names = minibatch(script, agent_of(script, new, **tables), taken, **columns)
        names["loss"].backward()
        found = {ours: names[theirs].detach() for ours, theirs in LOGGED.items()}
        gradients = {f"grad_{k}": x.grad for k, x in tensors.items()} | {
            "grad_new_values": new.grad
        }
        return found | {"clipfrac": names["clipfracs"][0]} | gradients

    with with_population_deviation():
        undone = outputs()
    return outputs(), {DEVIATION: undone}


def of_logprobs(script, new_logprobs, logprobs, advantages=None, new_values=None, **changes):
    """All variables after a minibatch in which the first of two actions has these log-probs."""
    first = tensor(new_logprobs)
    logits = torch.stack([first, torch.log1p(-first.exp())], 1)
    zeros = np.zeros(len(logits))
    columns = {"values": zeros, "returns": zeros}
    columns |= {"advantages": zeros if advantages is None else advantages, "logprobs": logprobs}
    settings = {"clip_coef": 0.2, "ent_coef": 0.0, "vf_coef": 1.0}
    settings |= {"norm_adv": False, "clip_vloss": True}
    new_values = tensor(zeros if new_values is None else new_values)
    agent = agent_of(script, new_values, actor=lambda obs: logits)
    actions = torch.zeros(len(logits), dtype=int)
    return minibatch(script, agent, actions, **columns | settings | changes)


def advantage_normalization(script, advantages):
    half = np.full(len(advantages), np.log(0.5))

    def outputs():
        names = of_logprobs(script, half, half, advantages, norm_adv=True)
        return {"normalized_advantages": names["mb_advantages"]}

    with with_population_deviation():
        undone = outputs()
    return outputs(), {DEVIATION: undone}


def value_clipping(script, new_values, values, returns, clip_coef):
    half, found = [np.log(0.5)], []
    for new, value, target in zip(new_values, values, returns, strict=True):
        sample = {"new_values": [new], "values": [value], "returns": [target]}
        found.append(of_logprobs(script, half, half, clip_coef=clip_coef, **sample)["v_loss"])
    return {"value_losses": torch.stack(found)}, {}


def entropy(script, continuous, logits, log_std, **others):
    logits, zeros = tensor(logits), torch.zeros(len(logits))
    discrete = agent_of(script, zeros, actor=lambda obs: logits)
    tables = {"actor_mean": lambda obs: logits[:, :2], "actor_logstd": tensor(log_std)[None]}
    gaussian = agent_of(continuous, zeros, **tables)
    found = [agent.get_action_and_value(zeros)[2] for agent in (discrete, gaussian)]
    return dict(zip(("categorical", "gaussian"), found, strict=True)), {}


def kl(script, new_logprobs, logprobs):
    names = of_logprobs(script, new_logprobs, logprobs)
    return {name: names[name] for name in ("old_approx_kl", "approx_kl")}, {}


def clip_fraction(script, **inputs):
    return {"clipfrac": of_logprobs(script, **inputs)["clipfracs"][0]}, {}


def gradient_clipping(script, weight, bias, max_grad_norm):
    parameters = []
    for x in (weight, bias):
        parameters.append(tensor(np.zeros_like(x), True))
        parameters[-1].grad = tensor(x)
    names = {"agent": SimpleNamespace(parameters=lambda: parameters)}
    names["args"] = SimpleNamespace(max_grad_norm=max_grad_norm)
    script.run(names, "clip_grad_norm_()", "clip_grad_norm_()")
    return {"clipped_weight": parameters[0].grad, "clipped_bias": parameters[1].grad}, {}


def adam(script, parameters, gradients, learning_rate, **_):
    before, x = tensor(parameters), tensor(parameters, True)
    names = {"agent": SimpleNamespace(parameters=lambda: [x])}
    names["args"] = SimpleNamespace(learning_rate=learning_rate)
    optimizer, change = script.run(names, "optimizer", "optimizer")["optimizer"], []
    for gradient in gradients:
        x.grad = tensor(gradient)
        optimizer.step()
        change.append(x.detach() - before)
    return {"change": torch.stack(change)}, {}


def annealing(script, learning_rate, num_iterations, iterations, **_):
    args, found = SimpleNamespace(learning_rate=learning_rate, num_iterations=num_iterations), []
    for iteration in iterations:
        found.append(script.run({"args": args, "iteration": iteration}, "frac", "lrnow")["lrnow"])
    return {"learning_rates": found}, {}


def orthogonal(scripts, shapes):
    """Weights are matched by where they stand: torso, actor, critic."""
    numbers, pictures = gym.spaces.Box(-1, 1, (6,)), gym.spaces.Box(0, 255, (4, 84, 84))
    spaces = {
        "discrete": (gym.spaces.Box(-1, 1, (4,)), gym.spaces.Discrete(2)),
        "continuous": (numbers, gym.spaces.Box(-1, 1, (3,))),
        "atari": (pictures, gym.spaces.Discrete(4)),
        "atari_lstm": (pictures, gym.spaces.Discrete(4)),
    }
    found, biases = {}, 0.0
    for kind, (seen, done) in spaces.items():
        agent = scripts[kind].names["Agent"](make_vectors.spaces_of(seen, done))
        for name, x in agent.named_parameters():
            ours = name.replace("network", "torso").replace("actor_mean", "actor")
            if "weight" in name:
                values = torch.linalg.svdvals(x.detach().flatten(1))
                found[f"{kind}.{ours}"] = [values.min(), values.max()]
            elif "bias" in name:
                biases = max(biases, x.detach().abs().max().item())
    return found | {"largest_bias": biases}, {}


def lstm(script, x, starts, h, c, **weights):
    memory = nn.LSTM(2, 4).double()
    memory.load_state_dict({name: tensor(w) for name, w in weights.items()})
    agent = SimpleNamespace(lstm=memory, network=lambda pixels: 255 * pixels)
    state = tensor(h)[None], tensor(c)[None]
    with torch.no_grad():
        seen, begins = tensor(x).flatten(0, 1), tensor(starts).flatten()
        hidden, (h, c) = script.names["Agent"].get_states(agent, seen, state, begins)
    T, N, _ = np.shape(x)
    return {"hidden": hidden.view(T, N, 4), "last_h": h[0], "last_c": c[0]}, {}


def wrappers(**others):
    """Gymnasium with names that it no longer has."""
    names = ("TransformObservation", "ClipAction", "GrayScaleObservation", "FrameStack")
    known = {name: getattr(cleanrl_shim, name) for name in names}
    return patch.multiple(gym.wrappers, create=True, **known | others)


def formulas(causes, obs, final_obs, rewards, terminated, truncated, gamma):
    """What the wrappers of Gymnasium ought to say, with those of three causes that are given."""
    shape = (*rewards.shape, obs.shape[-1])
    finals, scaled = np.zeros(shape), np.zeros(rewards.shape)

    def moments(samples):
        """As if there had been 1e-4 samples of mean 0 and variance 1 before."""
        count, samples = len(samples) + 1e-4, np.array(samples)
        mean = samples.sum(0) / count
        return mean, (((samples - mean) ** 2).sum(0) + 1e-4 * (1 + mean**2)) / count

    def normalized(x, mean, var):
        return np.clip((x - mean) / np.sqrt(var + 1e-8), -10, 10)

    N, ended = rewards.shape[1], terminated | truncated
    groups = [[i] for i in range(N)] if STATISTICS in causes else [[*range(N)]]
    seen = np.zeros((len(obs), *shape[1:]))
    for group in groups:
        told, returns, sums = list(obs[0, group]), [], np.zeros(len(group))
        seen[0, group] = normalized(obs[0, group], *moments(told))
        for t, reward in enumerate(rewards[:, group]):
            last = final_obs[t, group][ended[t, group] == 1]
            before = told + list(last if COUNTED in causes else obs[t + 1, group])
            told += [*(last if COUNTED in causes else ()), *obs[t + 1, group]]
            for i, x in zip(group, final_obs[t, group], strict=True):
                finals[t, i] = normalized(x, *moments(before)) * ended[t, i]
            seen[t + 1, group] = normalized(obs[t + 1, group], *moments(told))
            goes_on = 1 - terminated[t, group] if SUMS in causes else 1
            sums = sums * gamma * goes_on + reward
            returns += list(sums)
            scaled[t, group] = np.clip(reward / np.sqrt(moments(returns)[1] + 1e-8), -10, 10)
            sums = sums * (1 if SUMS in causes else 1 - ended[t, group])
    return {"normalized_obs": seen, "normalized_final_obs": finals, "normalized_rewards": scaled}


def normalization(script, gamma, **data):
    """The wrappers are Gymnasium's, those of the version that is installed.

    Undone: less what `formulas` says of all causes, plus what it says without some of them.
    """
    data = {name: np.asarray(x) for name, x in data.items()}
    space, envs = gym.spaces.Box(-1, 1, (1,)), []
    T, N = data["rewards"].shape
    for i in range(N):
        stream = make_vectors.Stream(data, i, space)
        with wrappers(), patch.object(gym, "make", lambda _, stream=stream: stream):
            envs.append(script.names["make_env"]("", i, False, "", gamma)())
    seen, rewards = [[env.reset()[0] for env in envs]], []
    finals = np.zeros(data["final_obs"].shape)
    for t in range(T):
        steps = [env.step(np.zeros(1)) for env in envs]
        rewards.append([x[1] for x in steps])
        seen.append([x[0] for x in steps])
        for i in np.flatnonzero(data["terminated"][t] | data["truncated"][t]):
            finals[t, i], seen[-1][i] = steps[i][0], envs[i].reset()[0]
    found = {"normalized_obs": seen, "normalized_final_obs": finals, "normalized_rewards": rewards}
    causes, undone = (STATISTICS, COUNTED, SUMS), {}
    theirs = formulas(causes, gamma=gamma, **data)
    for some in (x for n in (1, 2, 3) for x in itertools.combinations(causes, n)):
        rest = formulas(set(causes) - set(some), gamma=gamma, **data)
        undone[", ".join(some)] = {k: x - theirs[k] + rest[k] for k, x in found.items()}
    return found, undone


class SmallGrey(gym.ObservationWrapper):
    """Grey first, then small."""

    def __init__(self, env, shape):
        super().__init__(env)
        self.observation_space = gym.spaces.Box(0, 255, shape, np.uint8)

    def observation(self, observation):
        grey = cv2.cvtColor(observation, cv2.COLOR_RGB2GRAY)
        return cv2.resize(grey, self.observation_space.shape, interpolation=cv2.INTER_AREA)


class ZeroFilled(cleanrl_shim.FrameStack):
    """Before the first frame there is nothing."""

    def reset(self, **kwargs):
        stack, info = super().reset(**kwargs)
        for frame in list(self.frames)[1:]:
            self.frames.append(np.zeros_like(frame))
        self.frames.append(stack[-1])
        return np.stack(self.frames), info


def atari(script, env_id, env_kwargs, noops, actions):
    """With the seed of the file, whose generator draws `noops`; the stack is made the last axis.

    Undone: other wrappers for the picture, for the stack, and for both.
    """
    gym.register_envs(ale_py)

    def outputs(**others):
        game = gym.make(env_id, **env_kwargs)
        with wrappers(**others), patch.object(gym, "make", lambda _: game):
            env = script.names["make_env"](env_id, 0, False, "")()
        frames, rewards, ends = [np.moveaxis(env.reset(seed=1)[0], 0, -1)], [], [[], []]
        for t, action in enumerate(actions):
            obs, reward, *end, _ = env.step(action)
            obs = env.reset()[0] if any(end) else obs
            frames.append(np.moveaxis(obs, 0, -1))
            rewards.append(int(reward))
            for steps, x in zip(ends, end, strict=True):
                steps.extend([t] * int(x))
        env.close()
        found = {"shape": frames[0].shape, "dtype": str(frames[0].dtype)}
        found["sha256_of_every_tenth"] = [make_vectors.digest(x.copy()) for x in frames[::10]]
        found["sha256_of_all"] = make_vectors.digest(np.stack(frames))
        return found | {"rewards": rewards, "terminated_at": ends[0], "truncated_at": ends[1]}

    small = {"ResizeObservation": SmallGrey, "GrayScaleObservation": lambda env: env}
    stack = {"FrameStack": ZeroFilled}
    undone = {SMALL: outputs(**small), FIRST: outputs(**stack)}
    return outputs(), undone | {f"{FIRST}, {SMALL}": outputs(**small, **stack)}


class Recorder:
    """Its optimiser, which notes the variables of each update."""

    def __init__(self, optimizer, names):
        self.optimizer, self.names, self.found = optimizer, names, []

    def zero_grad(self):
        self.optimizer.zero_grad()
        found = {ours: self.names[LOGGED[ours]].item() for ours in list(LOGGED)[1:]}
        self.found.append(found | {"clipfrac": self.names["clipfracs"][-1]})

    def step(self):
        self.optimizer.step()


def iteration(script, obs, actions, rewards, final_obs, terminated, truncated, **others):
    """Undone: the value of what was seen last is added to the last reward, by hand."""

    def outputs(bootstrap):
        settings = dict(others)
        shapes, permutations = settings.pop("shapes"), iter(settings.pop("permutations"))
        spaces = gym.spaces.Box(-1, 1, (3,)), gym.spaces.Discrete(3)
        agent = script.names["Agent"](make_vectors.spaces_of(*spaces)).double()
        before = {k: tensor(make_vectors.parameter_values(shape)) for k, shape in shapes.items()}
        agent.load_state_dict(before)
        names = {"obs": tensor(obs)[:-1], "actions": tensor(actions), "rewards": tensor(rewards)}
        T, N = names["actions"].shape
        with torch.no_grad():
            last = tensor(truncated) * agent.get_value(tensor(final_obs)).squeeze(-1)
            names["rewards"] += settings["gamma"] * last * bootstrap
            flat = names["obs"].flatten(0, 1), names["actions"].flatten()
            _, logprobs, _, values = agent.get_action_and_value(*flat)
            now = agent.get_value(tensor(obs)[1:]).squeeze(-1)
        names |= {"logprobs": logprobs.view(T, N), "values": values.view(T, N)}
        dones = np.asarray(terminated) | np.asarray(truncated)
        gamma = {k: settings[k] for k in ("gamma", "gae_lambda")}
        told = advantages(script, names["rewards"], names["values"], now, dones, **gamma)
        names |= {k: told[k] for k in ("advantages", "returns")} | {"agent": agent}
        sizes = {"batch_size": T * N, "minibatch_size": T * N // settings["num_minibatches"]}
        switches = {"norm_adv": True, "clip_vloss": True, "target_kl": None}
        names["args"] = SimpleNamespace(**settings, **sizes, **switches)
        names["envs"] = make_vectors.spaces_of(*spaces)
        script.run(names, "optimizer", "optimizer")
        recorder = names["optimizer"] = Recorder(names["optimizer"], names)

        def shuffle(indices):
            indices[:] = next(permutations)

        norms, clip = [], nn.utils.clip_grad_norm_

        def clip_grad_norm(*args):
            norms.append(clip(*args))

        with (
            patch.object(np.random, "shuffle", shuffle),
            patch.object(nn.utils, "clip_grad_norm_", clip_grad_norm),
        ):
            script.run(names, "b_obs", before="y_pred")
        columns = ("logprobs", "values", "advantages", "returns")
        found = {name: names[f"b_{name}"] for name in columns} | {"grad_norm": norms}
        found |= {name: [x[name] for x in recorder.found] for name in recorder.found[0]}
        for name, parameter in agent.named_parameters():
            change = (parameter.detach() - before[name]).flatten()
            found[f"change of {name}"] = [change.norm(), change.sum(), *change[:8]]
        return found

    undone = {LIMIT: outputs(True)}
    with with_population_deviation():
        undone |= {DEVIATION: outputs(False), f"{DEVIATION}, {LIMIT}": outputs(True)}
    return outputs(False), undone


def answers(folder):
    """{vector: function of its inputs}"""
    names = {"discrete": "ppo.py", "continuous": "ppo_continuous_action.py"}
    names |= {"atari": "ppo_atari.py", "atari_lstm": "ppo_atari_lstm.py"}
    scripts = {kind: Script(folder, name) for kind, name in names.items()}
    ppo, continuous = scripts["discrete"], scripts["continuous"]

    def bound(function, *args):
        return lambda **inputs: function(*args, **inputs)

    found = {name: bound(gae, ppo) for name in ("gae", "gae_lambda_0", "gae_lambda_1")}
    for name in ("gradient_clipping", "gradient_clipping_below"):
        found[name] = bound(gradient_clipping, ppo)
    simple = [
        advantage_normalization,
        value_clipping,
        kl,
        clip_fraction,
        adam,
        annealing,
        iteration,
    ]
    found |= {function.__name__: bound(function, ppo) for function in simple}
    found |= {"loss_discrete": bound(loss, ppo), "loss_gaussian": bound(loss, continuous)}
    found |= {"loss_plain": bound(loss, ppo)}
    found |= {"entropy": bound(entropy, ppo, continuous), "orthogonal": bound(orthogonal, scripts)}
    for name in ("normalization", "normalization_below"):
        found[name] = bound(normalization, continuous)
    found |= {"lstm": bound(lstm, scripts["atari_lstm"])}
    for game in ("breakout", "mspacman", "pong"):
        found[f"atari_{game}"] = bound(atari, scripts["atari"])
    return found
