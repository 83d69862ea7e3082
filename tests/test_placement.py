"""On torch's meta device, which stands in for a GPU: a tensor left on the CPU is an error there, so
is whatever would wait for the device, such as `item`, `tolist` or an `if`.
"""

import contextlib
import types

import gymnasium as gym
import pytest
import torch

import ppo_atari
import ppo_atari_lstm
import ppo_continuous
import ppo_discrete
import ppo_rlhf
from conftest import small_agent

META = torch.device("meta")
COEFFICIENTS = (*torch.tensor([0.2, 0.01, 1.0], device=META).unbind(), 0.5, True, True)


@pytest.fixture(autouse=True)
def without_autocast(monkeypatch):
    """It does not know this device."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device=META)


def assert_gradient(parameters, stats, names):
    """It is there, and there are the statistics, all on the device."""
    parameters = list(parameters)
    assert parameters
    for x in [*(p.grad for p in parameters), *stats.values()]:
        assert x.device == META
    assert names <= stats.keys()


@pytest.mark.parametrize("script", [ppo_discrete, ppo_continuous, ppo_atari])
@pytest.mark.parametrize("penalty", [False, True])
def test_evaluation_and_gradient(script, penalty):
    envs = small_agent(script)[1]
    agent = script.Agent(envs).to(META)
    space, actions = envs.single_observation_space, envs.single_action_space
    obs = torch.empty((24, *space.shape), device=META).to(
        torch.uint8 if script is ppo_atari else torch.float32
    )
    integers = script is not ppo_continuous
    taken = meta(24, *actions.shape, dtype=torch.int64 if integers else torch.float32)
    with torch.no_grad():
        policy, values = agent(obs)
        logprobs = policy.log_prob(taken)
    assert (logprobs.device, values.device) == (META, META)
    assert logprobs.shape == values.shape == (24,)
    batch = [obs, taken, logprobs, values, meta(24), meta(24)]
    coefficients = COEFFICIENTS if penalty else (*COEFFICIENTS[:2], None, *COEFFICIENTS[3:])
    indices = meta(16, dtype=torch.int64)
    stats = script.ppo_gradient(agent, batch, indices, 0.5, *coefficients)
    assert_gradient(agent.parameters(), stats, {"loss", "approx_kl", "grad_norm"})


def test_evaluation_and_gradient_with_memory():
    """Where episodes start, and which environments come next, is known on the CPU."""
    envs = types.SimpleNamespace(single_action_space=gym.spaces.Discrete(4))
    agent = ppo_atari_lstm.Agent(envs).to(META)
    T, N = 6, 4
    starts = torch.zeros(T, N)
    starts[3, 2] = starts[5, 0] = 1
    obs, actions = meta(T, N, 84, 84, 1, dtype=torch.uint8), meta(T, N, dtype=torch.int64)
    state = [meta(1, N, 128), meta(1, N, 128)]
    policy, values, after = agent(obs, starts, state)
    assert {x.device for x in (values, *after, policy.log_prob(actions))} == {META}
    batch = [obs, starts, *state, actions, *(meta(T, N) for _ in range(4))]
    stats = ppo_atari_lstm.ppo_gradient(agent, batch, torch.tensor([2, 0]), 0.5, *COEFFICIENTS)
    assert_gradient(agent.parameters(), stats, {"loss", "approx_kl", "grad_norm"})


@pytest.mark.parametrize("demonstrations", [False, True])
def test_gradient_of_words(demonstrations):
    """Micro-batches of texts of like length, whose lengths are known on the CPU."""
    args = ppo_rlhf.Args(d_model=16, num_layers=1, num_heads=2, response_length=5)
    task = ppo_rlhf.TASKS["reviews"]
    agent = ppo_rlhf.Agent(task, args).to(META)
    n, P, R = 6, task.prompt_length, 5
    tokens, mask = meta(n, P + R, dtype=torch.int64), meta(n, R, dtype=torch.bool)
    lengths = torch.tensor([5, 1, 3, 2, 5, 4])
    batch = [tokens, *(meta(n, R) for _ in range(5)), mask, lengths]
    with torch.no_grad():
        logprobs = ppo_rlhf.response_logprobs(agent.policy, tokens, P)
    assert logprobs.device == META
    ptx = (meta(3, P + R, dtype=torch.int64), 0.5) if demonstrations else (None, 0.0)
    sizes = (2, 1.0, "response", 0.2, 0.2, 0.1, True, 0.1)
    stats = ppo_rlhf.ppo_gradient(agent, batch, torch.tensor([4, 1, 3, 5]), *ptx, *sizes)
    learning = [*agent.policy.parameters(), *agent.value_model.parameters()]
    assert_gradient(learning, stats, {"loss/policy", "policy/grad_norm", "val/grad_norm"})


def test_meta_notices_what_would_wait():
    """What these tests rest on."""
    x = meta(3)
    for wait in (x.sum().item, x.tolist, x.nonzero, x.numpy, lambda: bool(x.any())):
        with pytest.raises((RuntimeError, NotImplementedError, TypeError, ValueError)):
            wait()
    with pytest.raises(RuntimeError):
        x + torch.zeros(3)


@pytest.mark.parametrize(
    "script", [ppo_discrete, ppo_continuous, ppo_atari, ppo_atari_lstm, ppo_rlhf]
)
@pytest.mark.parametrize(
    ("there", "wanted", "kind"), [(True, True, "cuda"), (True, False, "cpu"), (False, True, "cpu")]
)
def test_a_gpu_is_used_where_there_is_one(script, there, wanted, kind, monkeypatch):
    class MovedError(Exception):
        pass

    def to(agent, device=None, **memory_format):
        if device:
            raise MovedError(device.type)
        return agent

    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(script.Agent, "to", to)
    classic = {} if script is ppo_rlhf else {"num_envs": 1, "vectorization": "sync"}
    with pytest.raises(MovedError, match=kind):
        script.train(script.Args(cuda=wanted, **classic))
