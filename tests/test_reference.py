"""The scripts' updates beside the same in plain numpy, and first iterations that were written down.

reference.py computes everything but the rollouts itself. A line of a script that is wrong and still
learns is seen here by its numbers.
"""

import dataclasses
import json
import os
import types
import zlib

import numpy as np
import pytest
import torch

import make_vectors
import ppo_atari
import ppo_atari_lstm
import ppo_continuous
import ppo_discrete
import reference
from conftest import far_from_initial, spy

# ------------------------------------------------------------------------------------------------
# The reference by itself


def small_params(rng, actions, log_std):
    """Random weights of networks with 3 inputs and hidden layers of 5 and 4, none of them 0."""
    params = {}
    for network, outputs in (("actor", actions), ("critic", 1)):
        sizes = (3, 5, 4, outputs)
        for i in range(3):
            params[f"{network}.{2 * i}.weight"] = rng.normal(size=(sizes[i + 1], sizes[i]))
            params[f"{network}.{2 * i}.bias"] = rng.normal(size=sizes[i + 1])
    return params | ({"log_std": rng.normal(size=actions)} if log_std else {})


def small_minibatch(rng, params, continuous):
    """40 samples of an older policy and value function, some within the clip range, some not."""
    obs = rng.normal(size=(40, 3))
    outputs = reference.forward(params, "actor", obs)[-1]
    if continuous:
        actions = outputs + np.exp(params["log_std"]) * rng.normal(size=outputs.shape)
    else:
        actions = rng.integers(outputs.shape[1], size=40)
    logprobs, *_ = reference.policy(params, outputs, actions)
    values = reference.forward(params, "critic", obs)[-1][:, 0]
    older = logprobs + 0.2 * rng.normal(size=40), values + 0.3 * rng.normal(size=40)
    return obs, actions, *older, rng.normal(size=40), values + rng.normal(size=40)


ARGS = types.SimpleNamespace(
    clip_coef=0.2, vf_coef=0.7, ent_coef=0.1, norm_adv=True, clip_vloss=True
)


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_gradients_of_the_reference_are_finite_differences_of_its_loss(continuous, seed):
    """Every parameter is moved a little up and down; clipping is at work on both sides."""
    rng = np.random.default_rng(seed)
    params = small_params(rng, 2 if continuous else 4, continuous)
    minibatch = small_minibatch(rng, params, continuous)
    gradients, stats = reference.loss_gradients(params, minibatch, ARGS)
    assert 0.1 < stats["clipfrac"] < 0.9
    assert 0.1 < stats["value_clipfrac"] < 0.9
    assert gradients.keys() == params.keys()
    for name, parameter in params.items():
        differences = np.zeros_like(parameter)
        for index in np.ndindex(parameter.shape):
            value, losses = parameter[index], []
            for step in (1e-5, -1e-5):
                parameter[index] = value + step
                losses.append(reference.loss_gradients(params, minibatch, ARGS)[1]["loss"])
            parameter[index] = value
            differences[index] = (losses[0] - losses[1]) / 2e-5
        error = np.linalg.norm(gradients[name] - differences)
        assert error < 1e-6 * np.linalg.norm(differences), name


# ------------------------------------------------------------------------------------------------
# The scripts beside the reference


def record(monkeypatch, script, prepare):
    """What the next `script.train` sees, draws and does; `prepare` sets the agent's weights."""
    seen = types.SimpleNamespace(obs=[], actions=[], rewards=[], dones=[], params=[])
    seen.gradients = spy(monkeypatch, script, "ppo_gradient")
    make_envs, adam_step = script.make_envs, torch.optim.Adam.step

    def recorded_envs(args):
        envs = make_envs(args)
        envs_reset, envs_step = envs.reset, envs.step

        def reset(**kwargs):
            obs, info = envs_reset(**kwargs)
            seen.obs.append(obs.copy())
            return obs, info

        def step(actions):
            seen.actions.append(actions.copy())
            obs, rewards, terminated, truncated, info = envs_step(actions)
            seen.obs.append(obs.copy())
            seen.rewards.append(rewards.astype(np.float32))  # all that the scripts keep
            seen.dones.append(terminated | truncated)
            return obs, rewards, terminated, truncated, info

        envs.reset, envs.step = reset, step
        return envs

    class Agent(script.Agent):
        def __init__(self, *args):
            super().__init__(*args)
            prepare(self)
            seen.agent = self
            seen.params.append(weights())

    def weights():
        named = seen.agent.named_parameters()
        return {name: value.detach().double().numpy().copy() for name, value in named}

    def recorded_step(self, *args, **kwargs):
        result = adam_step(self, *args, **kwargs)
        seen.params.append(weights())
        return result

    monkeypatch.setattr(script, "make_envs", recorded_envs)
    monkeypatch.setattr(script, "Agent", Agent)
    monkeypatch.setattr(torch.optim.Adam, "step", recorded_step)
    return seen


def updates_of_reference(seen, args):
    """(parameters, statistics) after each update by the reference, from what the script saw."""
    obs, actions, rewards, dones = (
        np.array(x, float) for x in (seen.obs, seen.actions, seen.rewards, seen.dones)
    )
    if "log_std" not in seen.params[0]:
        actions = actions[..., 0].astype(int)  # CartPole is one choice
        assert (obs[..., 4:] == 0).all()  # out of two that are always valid
        obs = obs[..., :4]
    orders = np.concatenate([indices for (_, _, indices, *_), _ in seen.gradients])
    orders = orders.reshape(-1, args.update_epochs, args.batch_size)
    return list(reference.train(seen.params[0], obs, actions, rewards, dones, orders, args))


PLAIN = {"cuda": False, "compile": False, "torch_threads": 1, "vectorization": "sync"}
ROLLOUTS = {
    ppo_discrete: {"env_id": "CartPole-v1", "num_envs": 4, "num_steps": 32},
    ppo_continuous: {"env_id": "Hopper-v5", "num_envs": 2, "num_steps": 64},
}
UPDATES = {"num_minibatches": 4, "update_epochs": 3, "total_timesteps": 4 * 128}

each_script = pytest.mark.parametrize("script", ROLLOUTS)


def compare(monkeypatch, script, tolerance, prepare=lambda agent: None, **changes):
    """Every parameter and statistic after every update. Returns the statistics as arrays."""
    seen = record(monkeypatch, script, prepare)
    settings = PLAIN | ROLLOUTS[script] | UPDATES | {"bootstrap_truncation": False} | changes
    args = script.Args(**settings)
    script.train(args)
    dones = np.array(seen.dones).reshape(-1, args.num_steps, args.num_envs)
    assert dones[:, :-1].sum() > 4  # in the middle of rollouts

    updates = updates_of_reference(seen, args)
    assert len(updates) == 4 * 3 * 4 == len(seen.gradients) == len(seen.params) - 1
    for i, (params, stats) in enumerate(updates):
        assert params.keys() == seen.params[i + 1].keys()
        for name, expected in params.items():
            where = f"{name} after update {i + 1}"
            np.testing.assert_allclose(
                seen.params[i + 1][name], expected, 0, tolerance, err_msg=where
            )
        _, theirs = seen.gradients[i]
        assert theirs.keys() == stats.keys() - {"value_clipfrac"}
        for name, value in theirs.items():
            near = pytest.approx(stats[name], rel=tolerance, abs=tolerance)
            assert value.item() == near, f"{name} of update {i + 1}"
    return {name: np.array([stats[name] for _, stats in updates]) for name in updates[0][1]}


@pytest.fixture
def float64(monkeypatch):
    """The scripts compute in float64 from the first layer on, as the reference does."""

    def in_float64(script):
        class Agent(script.Agent):
            def forward(self, obs):
                return super().forward(obs.double())

        def gae(*args):  # rewards and dones are kept as float32
            return original(*(np.asarray(x, float) for x in args))

        original = script.gae
        monkeypatch.setattr(script, "Agent", Agent)
        monkeypatch.setattr(script, "gae", gae)

    in_float64(ppo_discrete)
    in_float64(ppo_continuous)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@each_script
def test_updates_are_those_of_the_reference(monkeypatch, script):
    """From the weights a run starts with, in the scripts' float32, which is off by 4e-7."""
    compare(monkeypatch, script, 1e-5)


@each_script
def test_updates_from_other_weights_are_those_of_the_reference(monkeypatch, script):
    """Weights under which every layer matters: the policy's last one begins with almost 0."""
    stats = compare(monkeypatch, script, 1e-5, far_from_initial)
    assert 0 < stats["clipfrac"].mean() < 1
    assert 0 < stats["value_clipfrac"].mean() < 1


@each_script
def test_large_updates_are_those_of_the_reference(monkeypatch, script, float64):
    """Far beyond all clip ranges and down again to small gradients.

    In float64, where the two agree to 1e-14. In float32 they are more than 1e-3 apart for some
    seeds: a sample beside the end of a clip range falls on the other side of it, and large ratios
    multiply what comes of that. Agreement up to so much would say little.
    """
    loop = {"learning_rate": 3e-3, "ent_coef": 0.02, "max_grad_norm": 2.0}
    stats = compare(monkeypatch, script, 1e-9, far_from_initial, **loop)
    assert 0.1 < stats["clipfrac"].mean() < 0.9
    assert 0.1 < stats["value_clipfrac"].mean() < 0.9
    assert stats["grad_norm"].min() < 2.0 < stats["grad_norm"].max()


# ------------------------------------------------------------------------------------------------
# First iterations that were written down

# Each docs/vectors/first_iterations_*.json has what a script's first two iterations compute from
# weights that are set here. The usual ones are orthogonal, from torch's normal numbers and LAPACK's
# QR decomposition: machines agree on them to about 1e-6, but another version of either may well
# choose other ones. And with them the policy's last layer is almost 0, which hides most of what
# could be wrong before it. Episodes are cut off after a few steps and bootstrapped.

REWRITE = "REWRITE_VECTORS=1 pytest tests/test_reference.py -k vectors"
SHORT, SHORT_GAME = {"max_episode_steps": 5}, {"max_num_frames_per_episode": 50}
GAME = "JourneyEscapeNoFrameskip-v4"  # with a reward within 8 steps
ITERATIONS = {
    "discrete": (ppo_discrete, "CartPole-v1", SHORT, 3e-3, "C13"),
    "continuous": (ppo_continuous, "Pendulum-v1", SHORT, 1e-3, "C13 R1 R2 R3 R4 R6 R7 R8 R9"),
    "atari": (ppo_atari, GAME, SHORT_GAME, 1e-4, "A2 A5 A6 A7 A8 A9"),
    "atari_lstm": (ppo_atari_lstm, GAME, SHORT_GAME, 1e-4, "A2 A5 A6 A8 A9 L2 L3 L4 L5"),
}
ABOUT = """The first two iterations of {} with these arguments, from numpy's
default_rng(zlib.crc32(name.encode())).normal(0, (2 / fan_in) ** 0.5, shape) for each parameter;
fan_in is 100 where there is one dimension. Arrays [T, N], flat, of both iterations, those of the
update of the last; losses: one a minibatch; change: of a parameter from first to last, its sum and
norm."""


def portable_weights(agent):
    """Normal numbers of numpy, from a seed of its own for each parameter. Restarts torch's too."""
    for name, parameter in agent.named_parameters():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 100
        numbers = rng.normal(0, (2 / fan_in) ** 0.5, parameter.shape)
        parameter.data.copy_(torch.as_tensor(numbers))
    torch.manual_seed(0)


def first_iterations(monkeypatch, script, env_id, env_kwargs, learning_rate, detail):
    """As docs/make_vectors.py makes a vector, with numbers to 7 digits."""
    inputs = {"env_id": env_id, "env_kwargs": env_kwargs, "seed": 1, "num_envs": 2, "num_steps": 8}
    inputs |= {"total_timesteps": 32, "num_minibatches": 2, "update_epochs": 2}
    inputs |= {"learning_rate": learning_rate}
    settings = PLAIN | inputs | {"env_kwargs": json.dumps(env_kwargs), "precision": "fp32"}
    names = {field.name for field in dataclasses.fields(script.Args)}  # not all have a precision
    seen = record(monkeypatch, script, portable_weights)
    script.train(script.Args(**{k: v for k, v in settings.items() if k in names}))
    (_, batch, *_), _ = seen.gradients[-1]
    logprobs, values, advantages, returns = (x.flatten()[:16] for x in batch[-4:])
    outputs = {
        "mean_observations": [x.mean(dtype=float) for x in seen.obs],
        "actions": seen.actions,
        "rewards": seen.rewards,
        "dones": seen.dones,
        "logprobs": logprobs,
        "values": values,
        "advantages": advantages,
        "returns": returns,
    }
    _, statistics = zip(*seen.gradients, strict=True)
    for name in statistics[0]:  # one for each minibatch
        outputs[name] = [float(minibatch[name]) for minibatch in statistics]
    for name, before in seen.params[0].items():  # a sum and a norm: alone, a sum may cancel out
        change = seen.params[-1][name] - before
        outputs[f"change of {name}"] = [change.sum(), np.linalg.norm(change)]
    for name, x in outputs.items():
        outputs[name] = [float(f"{number:.7g}") for number in np.ravel(x).astype(float)]
    about = " ".join(ABOUT.format(f"{script.__name__}.py").split())
    detail = f"C1 C3 C4 C5 C6 C7 C8 C9 C10 C11 C12 {detail}"
    return make_vectors.vector(detail, about, inputs, outputs, tolerance=1e-4)


@pytest.mark.parametrize("name", ITERATIONS)
def test_first_iterations_equal_the_vectors(monkeypatch, name):
    """Each number to 1e-4 of the largest in its list, far more than machines differ by."""
    vector = first_iterations(monkeypatch, *ITERATIONS[name])
    path = make_vectors.FOLDER / f"first_iterations_{name}.json"
    if os.environ.get("REWRITE_VECTORS"):
        path.write_text(make_vectors.text(vector))
    stored = json.loads(path.read_text())
    hint = f"if this change is meant: {REWRITE}"
    outputs, expected = vector.pop("outputs"), stored.pop("outputs")
    assert vector == stored, hint
    assert outputs.keys() == expected.keys(), hint
    for key, numbers in expected.items():
        bound = vector["tolerance"] * np.abs(numbers).max()
        np.testing.assert_allclose(outputs[key], numbers, 0, bound, err_msg=f"{key}; {hint}")
