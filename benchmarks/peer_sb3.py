"""What Stable-Baselines3 says to docs/vectors/: its PPO, buffer, distributions and wrappers.

FUNCTIONS has for each vector the function (inputs) -> (outputs, undone), where `undone` has for
differences, separated by commas, the outputs there would be without them.
"""

import contextlib
import functools
from importlib import metadata
from unittest.mock import patch

import ale_py
import gymnasium as gym
import numpy as np
import torch
from peer_code import DEVIATION, LATE, VALUE, with_population_deviation
from stable_baselines3 import PPO
from stable_baselines3.common import distributions
from stable_baselines3.common.atari_wrappers import AtariWrapper
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize
from torch import nn

import make_vectors

VERSION = metadata.version("stable-baselines3")
DEFAULT = {"n_epochs": 1, "device": "cpu"}
TABLE = {"policy_kwargs": {"net_arch": []}}  # no layers before those that are replaced


class Rows(nn.Module):
    """A layer that says row i of the joined tensors, of an observation i."""

    def __init__(self, *tensors):
        super().__init__()
        self.tensors = nn.ParameterList(torch.tensor(x, dtype=torch.float32) for x in tensors)

    def forward(self, obs):
        return torch.cat(list(self.tensors))[obs[:, 0].long()]


def numbered(*shape):
    """Observations [T, N, 1] that count from 0."""
    return np.arange(np.prod(shape), dtype=np.float32).reshape(*shape, 1)


def streams(data, action_space):
    kind = functools.partial(make_vectors.Stream, data, action_space=action_space)
    return DummyVecEnv([functools.partial(kind, i=i) for i in range(data["obs"].shape[1])])


def model_of(env, policy="MlpPolicy", **settings):
    model = PPO(policy, env, **DEFAULT | settings)
    model.set_logger(Logger(None, []))
    return model


def collected(model):
    """The buffer after a rollout."""
    _, callback = model._setup_learn(model.n_steps, None)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    return model.rollout_buffer


def gae(rewards, values, next_values, dones, gamma, gae_lambda):
    """The numbers of observations are those of rows of values, after them the last ones seen."""
    T, N = np.shape(rewards)
    dones, next_values = np.asarray(dones), np.asarray(next_values)
    data = {"obs": numbered(T + 1, N), "final_obs": numbered(T, N) + (T + 1) * N}
    data |= {"rewards": np.asarray(rewards), "truncated": dones * (next_values != 0)}
    data["terminated"] = dones - data["truncated"]
    env = streams(data, gym.spaces.Discrete(2))
    settings = {"gamma": gamma, "gae_lambda": gae_lambda, "n_steps": T, "batch_size": T * N}
    model = model_of(env, **settings, **TABLE)
    table = np.concatenate([values, next_values[-1:], next_values]).reshape(-1, 1)
    model.policy.action_net, model.policy.value_net = Rows(np.zeros((len(table), 2))), Rows(table)
    return {"advantages": collected(model).advantages}, {}


def trained(policy, value, space, columns, clip_vloss=True, norm_adv=True, log_std=None, **c):
    """A PPO after one minibatch; policy and value are layers in place of the last ones."""
    actions, logprobs, values, advantages, returns = map(np.asarray, columns)
    M = len(actions)
    data = {"obs": numbered(M + 1, 1)}
    clip = {"clip_range": c["clip_coef"], "clip_range_vf": c["clip_coef"] if clip_vloss else None}
    coefficients = {name: c[name] for name in ("ent_coef", "vf_coef")} | clip
    coefficients["learning_rate"] = 0.0  # what the layers say stays as it is
    coefficients["max_grad_norm"] = c.get("max_grad_norm", np.inf)
    sizes = {"n_steps": M, "batch_size": M, "normalize_advantage": norm_adv and M > 1}
    model = model_of(streams(data, space), **coefficients, **sizes, **TABLE)
    model.policy.action_net, model.policy.value_net = policy, value
    if log_std is not None:
        model.policy.log_std = nn.Parameter(torch.tensor(log_std, dtype=torch.float32))
    model.policy.optimizer = torch.optim.SGD(model.policy.parameters())
    buffer = model.rollout_buffer
    for i in range(M):
        told = torch.tensor([values[i]]), torch.tensor([logprobs[i]])
        buffer.add(data["obs"][i], actions[i], np.zeros(1), np.zeros(1), *told)
    buffer.advantages[:, 0], buffer.returns[:, 0] = advantages, returns
    model.train()
    return model


LOGGED = {"loss": "loss", "policy_loss": "policy_gradient_loss", "value_loss": "value_loss"}
LOGGED |= {"approx_kl": "approx_kl", "clipfrac": "clip_fraction"}


def minibatch(new_values, actions, logprobs, values, advantages, returns, **others):
    """What it logs, and the derivatives by what the layers say."""
    if "logits" in others:
        nvec, head, what = others.pop("nvec"), others.pop("logits"), "logits"
        space = gym.spaces.MultiDiscrete(nvec) if nvec[1:] else gym.spaces.Discrete(nvec[0])
    else:
        head, what = others.pop("mean"), "mean"
        space = gym.spaces.Box(-1, 1, (len(head[0]),))
    policy, value = Rows(head), Rows(np.reshape(new_values, (-1, 1)))
    columns = actions, logprobs, values, advantages, returns
    model = trained(policy, value, space, columns, **others)
    found = {ours: model.logger.name_to_value[f"train/{name}"] for ours, name in LOGGED.items()}
    found["entropy"] = -model.logger.name_to_value["train/entropy_loss"]
    seen = torch.tensor(numbered(len(actions), 1)[:, 0])
    with torch.no_grad():
        taken = torch.tensor(actions)
        taken = taken[:, 0] if isinstance(space, gym.spaces.Discrete) else taken
        found["new_logprobs"] = model.policy.evaluate_actions(seen, taken)[1]
    found["grad_new_values"] = value.tensors[0].grad[:, 0]
    found[f"grad_{what}"] = policy.tensors[0].grad
    if what == "mean":
        found["grad_log_std"] = model.policy.log_std.grad
    return found


@contextlib.contextmanager
def with_larger_value_loss(clip_coef):
    """A context in which a PPO that clips no values takes half the larger of its two losses."""
    samples, of_buffer = [], RolloutBuffer._get_samples

    def get_samples(*args, **kwargs):
        samples.append(of_buffer(*args, **kwargs))
        return samples[-1]

    def mse_loss(returns, values):
        old = samples[-1].old_values
        near = old + (values - old).clamp(-clip_coef, clip_coef)
        return torch.maximum((values - returns) ** 2, (near - returns) ** 2).mean() / 2

    with (
        patch.object(RolloutBuffer, "_get_samples", get_samples),
        patch.object(nn.functional, "mse_loss", mse_loss),
    ):
        yield


def all_ways(outputs, clip_coef):
    """What `outputs(clip_vloss)` tells, as it is and with one or both of two things put right."""
    undone = {}
    with with_population_deviation():
        undone[DEVIATION] = outputs(True)
        with with_larger_value_loss(clip_coef):
            undone[f"{DEVIATION}, {VALUE}"] = outputs(False)
    with with_larger_value_loss(clip_coef):
        undone[VALUE] = outputs(False)
    return outputs(True), undone


def loss(clip_vloss, **inputs):
    if clip_vloss:
        return all_ways(lambda clips: minibatch(clip_vloss=clips, **inputs), inputs["clip_coef"])
    plain = minibatch(clip_vloss=False, **inputs)
    with with_larger_value_loss(np.inf):  # half of the one there is
        return plain, {VALUE: minibatch(clip_vloss=False, **inputs)}


def value_clipping(new_values, values, returns, clip_coef):
    def outputs(clip_vloss):
        found = []
        for sample in zip(new_values, values, returns, strict=True):
            new, value, target = np.reshape(sample, (3, 1))
            columns = np.zeros(1), np.zeros(1), value, np.zeros(1), target
            c = {"clip_coef": clip_coef, "clip_vloss": clip_vloss, "ent_coef": 0.0, "vf_coef": 0.5}
            layers = Rows(np.zeros((1, 2))), Rows(new[:, None])
            model = trained(*layers, gym.spaces.Discrete(2), columns, **c)
            found.append(model.logger.name_to_value["train/value_loss"])
        return {"value_losses": found}

    with with_larger_value_loss(clip_coef):
        undone = outputs(False)
    return outputs(True), {VALUE: undone}


def of_logprobs(new_logprobs, logprobs, advantages=None, clip_coef=0.2, **settings):
    """A minibatch in which the first of two actions has these log-probs."""
    first, zeros = np.asarray(new_logprobs), np.zeros(len(logprobs))
    columns = {"logprobs": logprobs, "values": zeros, "returns": zeros, "new_values": zeros}
    columns["advantages"] = zeros if advantages is None else advantages
    columns["logits"] = np.stack([first, np.log1p(-np.exp(first))], 1)
    c = {"clip_coef": clip_coef, "ent_coef": 0.0, "vf_coef": 0.0, "nvec": [2]}
    return minibatch(actions=np.zeros((len(first), 1), int), **columns, **c, **settings)


def advantage_normalization(advantages):
    """With a ratio of 1 and a probability of 1 / 2, the derivative by the logit is - A / 2 M."""
    half, M = np.full(len(advantages), np.log(0.5)), len(advantages)

    def outputs():
        gradient = of_logprobs(half, half, advantages)["grad_logits"][:, 0]
        return {"normalized_advantages": -2 * M * gradient}

    with with_population_deviation():
        undone = outputs()
    return outputs(), {DEVIATION: undone}


def kl(new_logprobs, logprobs):
    return {"approx_kl": of_logprobs(new_logprobs, logprobs)["approx_kl"]}, {}


def clip_fraction(new_logprobs, logprobs, clip_coef):
    found = of_logprobs(new_logprobs, logprobs, clip_coef=clip_coef)
    return {"clipfrac": found["clipfrac"]}, {}


def entropy(logits, nvec, mask, log_std):
    logits, log_std = torch.tensor(logits), torch.tensor(log_std)
    choices = distributions.CategoricalDistribution(logits.shape[1])
    several = distributions.MultiCategoricalDistribution(nvec)
    normal = distributions.DiagGaussianDistribution(len(log_std))
    return {
        "categorical": choices.proba_distribution(logits).entropy(),
        "multidiscrete": several.proba_distribution(logits).entropy(),
        "gaussian": normal.proba_distribution(logits[:, :2], log_std).entropy(),
    }, {}


def gradient_clipping(weight, bias, max_grad_norm):
    """The gradient of its value loss is 2 vf_coef (V - R) / M, and so R is chosen."""
    wanted = np.concatenate([np.ravel(weight), bias])
    M, zeros = len(wanted), np.zeros(len(wanted))
    value = Rows(np.zeros((np.size(weight), 1)), np.zeros((len(bias), 1)))
    columns = zeros, zeros, zeros, zeros, -M * wanted
    c = {"clip_coef": 1e9, "ent_coef": 0.0, "vf_coef": 0.5, "max_grad_norm": max_grad_norm}
    trained(Rows(np.zeros((M, 2))), value, gym.spaces.Discrete(2), columns, **c)
    found = [x.grad.numpy() for x in value.tensors]
    return {
        "clipped_weight": found[0].reshape(np.shape(weight)),
        "clipped_bias": found[1][:, 0],
    }, {}


def nothing(num_steps):
    """An environment in which nothing ever happens, `num_steps` long."""
    zeros = np.zeros((num_steps, 1))
    data = {"obs": numbered(num_steps + 1, 1), "terminated": zeros, "truncated": zeros}
    return streams(data | {"rewards": zeros}, gym.spaces.Discrete(2))


def adam(parameters, gradients, learning_rate, **_):
    """The optimiser that its policy makes."""
    policy = model_of(nothing(1)).policy
    before = torch.tensor(parameters, dtype=torch.float64)
    x, change = nn.Parameter(before.clone()), []
    optimizer = policy.optimizer_class([x], lr=learning_rate, **policy.optimizer_kwargs)
    for gradient in gradients:
        x.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
        change.append(x.detach() - before)
    return {"change": torch.stack(change)}, {}


def annealing(learning_rate, clip_coef, ent_coef, num_iterations, iterations):
    """Undone: what it takes in the iteration before."""
    rates = {"learning_rates": learning_rate, "clip_coefs": clip_coef}
    schedules = {name: LinearSchedule(x, 0.0, 1.0) for name, x in rates.items()}
    settings = dict(zip(("learning_rate", "clip_range"), schedules.values(), strict=True))
    env = nothing(2 * num_iterations)
    model = model_of(env, n_steps=2, batch_size=2, **settings)
    found, train = {name: [x(1.0)] for name, x in schedules.items()}, model.train

    def noted():
        train()
        found["learning_rates"].append(model.policy.optimizer.param_groups[0]["lr"])
        found["clip_coefs"].append(model.logger.name_to_value["train/clip_range"])

    with patch.object(model, "train", noted), patch.object(model, "dump_logs"):
        model.learn(2 * num_iterations)
    now = {name: [x[i] for i in iterations] for name, x in found.items()}
    return now, {LATE: {name: [x[i - 1] for i in iterations] for name, x in found.items()}}


NAMES = {"mlp_extractor.policy_net.": "actor.", "mlp_extractor.value_net.": "critic."}
LAYERS = {"action_net": "actor.4", "value_net": "critic.4"}
CNN = {"features_extractor.cnn.": "torso.", "features_extractor.linear.0": "torso.7"}
CNN |= {"action_net": "actor", "value_net": "critic"}


def ours(name, table):
    for theirs, here in table.items():
        if name.startswith(theirs):
            return here + name.removeprefix(theirs)
    return None


class Spaces(gym.Env):
    """An environment for the shapes of a policy."""

    def __init__(self, observation_space, action_space):
        self.observation_space, self.action_space = observation_space, action_space


def orthogonal(shapes):
    numbers, pictures = gym.spaces.Box(-1, 1, (6,)), gym.spaces.Box(0, 255, (84, 84, 4), np.uint8)
    kinds = {
        "discrete": ("MlpPolicy", gym.spaces.Box(-1, 1, (4,)), gym.spaces.Discrete(2)),
        "continuous": ("MlpPolicy", numbers, gym.spaces.Box(-1, 1, (3,))),
        "atari": ("CnnPolicy", pictures, gym.spaces.Discrete(4)),
    }
    found, biases = {}, 0.0
    for kind, (policy, *spaces) in kinds.items():
        env = DummyVecEnv([functools.partial(Spaces, *spaces)])
        for name, x in model_of(env, policy).policy.named_parameters():
            mine = ours(name, CNN if kind == "atari" else NAMES | LAYERS)
            if mine and "weight" in name:
                values = torch.linalg.svdvals(x.detach().flatten(1))
                found[f"{kind}.{mine}"] = [values.min(), values.max()]
            elif mine:
                biases = max(biases, x.detach().abs().max().item())
    return found | {"largest_bias": biases}, {}


def normalization(gamma, **data):
    data = {name: np.asarray(x) for name, x in data.items()}
    N = data["rewards"].shape[1]
    env = VecNormalize(streams(data, gym.spaces.Box(-1, 1, (1,))), gamma=gamma)
    seen, rewards, finals = [env.reset()], [], np.zeros(data["final_obs"].shape)
    for t in range(len(data["rewards"])):
        obs, reward, dones, infos = env.step(np.zeros((N, 1)))
        seen.append(obs)
        rewards.append(reward)
        for i in np.flatnonzero(dones):
            finals[t, i] = infos[i]["terminal_observation"]
    found = {"normalized_obs": seen, "normalized_final_obs": finals, "normalized_rewards": rewards}
    for name, rms in (("obs", env.obs_rms), ("return", env.ret_rms)):
        found |= {f"{name}_mean": rms.mean, f"{name}_var": rms.var}
    return found, {}


def atari(env_id, env_kwargs, noops, actions):
    """With the seed of the file, whose generator draws `noops`."""
    gym.register_envs(ale_py)
    game = DummyVecEnv([lambda: AtariWrapper(gym.make(env_id, **env_kwargs))])
    env = VecFrameStack(game, 4)
    env.seed(1)
    frames, rewards, ends = [env.reset()[0]], [], ([], [])
    for t, action in enumerate(actions):
        obs, reward, dones, infos = env.step([action])
        frames.append(obs[0].copy())
        rewards.append(int(reward[0]))
        if dones[0]:
            ends[infos[0]["TimeLimit.truncated"]].append(t)
    env.close()
    found = {"shape": frames[0].shape, "dtype": str(frames[0].dtype)}
    found["sha256_of_every_tenth"] = [make_vectors.digest(x) for x in frames[::10]]
    found["sha256_of_all"] = make_vectors.digest(np.stack(frames))
    return found | {"rewards": rewards, "terminated_at": ends[0], "truncated_at": ends[1]}, {}


def iteration(obs, final_obs, actions, permutations, shapes, clip_coef, **others):
    """Its samples go environment by environment, ours step by step."""
    data = {"obs": np.asarray(obs, np.float32), "final_obs": np.asarray(final_obs, np.float32)}
    for name in ("rewards", "terminated", "truncated"):
        data[name] = np.asarray(others.pop(name))
    T, N = np.shape(actions)
    settings = {"n_epochs": others.pop("update_epochs"), "clip_range": clip_coef, "n_steps": T}
    settings |= {"batch_size": T * N // others.pop("num_minibatches")} | others
    orders = np.asarray(permutations) % N * T + np.asarray(permutations) // N

    def outputs(clip_vloss):
        env = streams(data, gym.spaces.Discrete(3))
        clip = clip_coef if clip_vloss else None
        model = model_of(env, clip_range_vf=clip, **settings)
        before, given, given_orders = {}, iter(torch.tensor(actions)), iter(orders)
        for name, parameter in model.policy.named_parameters():
            mine = ours(name, NAMES | LAYERS)
            parameter.data.copy_(torch.tensor(make_vectors.parameter_values(tuple(shapes[mine]))))
            before[mine] = parameter, parameter.detach().clone()

        def act(seen):
            now = next(given)
            values, logprobs, _ = model.policy.evaluate_actions(seen, now)
            return now, values, logprobs

        with patch.object(model.policy, "forward", act):
            buffer = collected(model)
        columns = {"logprobs": buffer.log_probs, "values": buffer.values}
        columns |= {"advantages": buffer.advantages, "returns": buffer.returns}
        found = {name: x.ravel() for name, x in columns.items()}
        with patch.object(np.random, "permutation", lambda _: next(given_orders)):
            model.train()
        for name, (parameter, start) in before.items():
            change = (parameter.detach().double() - start).flatten()
            found[f"change of {name}"] = [change.norm(), change.sum(), *change[:8]]
        return found

    return all_ways(outputs, clip_coef)


LOSSES = ("loss_discrete", "loss_multidiscrete", "loss_gaussian", "loss_plain")
FUNCTIONS = {name: gae for name in ("gae", "gae_lambda_0", "gae_lambda_1")}
FUNCTIONS |= {name: loss for name in LOSSES}
FUNCTIONS |= {f"atari_{game}": atari for game in ("breakout", "mspacman", "pong")}
FUNCTIONS |= {"gradient_clipping_below": gradient_clipping, "normalization_below": normalization}
SIMPLE = [advantage_normalization, value_clipping, entropy, kl, clip_fraction, gradient_clipping]
SIMPLE += [adam, annealing, orthogonal, normalization, iteration]
FUNCTIONS |= {function.__name__: function for function in SIMPLE}
