"""The core details C1 to C13 and the options X1, X3, X5 and X6, by their numbers.

The algorithm and the training loop are the same text in the scripts (test_text.py), so most
of these tests look at one script only.
"""

import types
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Categorical

import conftest
import ppo_atari
import ppo_atari_lstm
import ppo_continuous
import ppo_discrete
from conftest import far_from_initial, metrics, small_agent, spy


class FakePolicy(nn.Module):
    """An agent that answers with the log-probabilities, values and entropies it was given."""

    def __init__(self, logprobs, values, entropies=(0.0,)):
        super().__init__()
        self.logprobs = nn.Parameter(torch.tensor(logprobs, dtype=torch.float32))
        self.values = nn.Parameter(torch.tensor(values, dtype=torch.float32))
        self.entropies = nn.Parameter(torch.tensor(entropies, dtype=torch.float32))

    def forward(self, obs):
        policy = types.SimpleNamespace(
            log_prob=lambda actions: self.logprobs, entropy=lambda: self.entropies
        )
        return policy, self.values


def loss_of(
    agent,
    old_values=0.0,
    advantages=0.0,
    returns=0.0,
    clip_coef=0.2,
    ent_coef=0.0,
    kl_coef=None,
    vf_coef=0.0,
    norm_adv=False,
    clip_vloss=True,
):
    """ppo_loss of a fake agent whose old log-probabilities are all 0; runs backward."""
    size = agent.logprobs.shape
    old_values, advantages, returns = (
        torch.as_tensor(x, dtype=torch.float32).expand(size)
        for x in (old_values, advantages, returns)
    )
    minibatch = (torch.zeros(*size, 2), torch.zeros(size), torch.zeros(size), old_values)
    loss, stats = ppo_discrete.ppo_loss(
        agent,
        (*minibatch, advantages, returns),
        torch.tensor(clip_coef),
        torch.tensor(ent_coef),
        None if kl_coef is None else torch.tensor(kl_coef),
        vf_coef,
        norm_adv,
        clip_vloss,
    )
    loss.backward()
    return loss.item(), {name: value.item() for name, value in stats.items()}


def scripted(episodes):
    """The id of a new environment that plays these episodes."""
    env_id = f"Scripted{len(gym.registry)}-v0"
    gym.register(env_id, "envs:Scripted", kwargs={"episodes": episodes})
    return env_id


def spy_steps(monkeypatch):
    """(learning rate, global norm of the gradient, the gradients) at every step of Adam."""
    steps, original = [], torch.optim.Adam.step

    def step(self, *args, **kwargs):
        (group,) = self.param_groups
        grads = [p.grad.clone() for p in group["params"]]
        norm = torch.cat([g.flatten() for g in grads]).norm().item()
        steps.append((float(group["lr"]), norm, grads))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    return steps


def test_c1_rollouts_are_consecutive_pieces_of_the_same_episodes(monkeypatch):
    """Episodes of 5 steps seen through rollouts of 4: nothing is reset or lost in between."""
    ends = [(0.0, False, False)] * 4 + [(0.0, True, False)]
    losses = spy(monkeypatch, ppo_discrete, "ppo_loss")
    gaes = spy(monkeypatch, ppo_discrete, "gae")
    conftest.train(
        ppo_discrete,
        env_id=scripted([ends]),
        num_steps=4,
        num_envs=1,
        num_minibatches=1,
        update_epochs=1,
        total_timesteps=12,
    )
    observations = [sorted(args[1][0][:, :2].tolist()) for args, _ in losses]
    assert observations[0] == [[0, 0], [0, 1], [0, 2], [0, 3]]
    assert observations[1] == [[0, 4], [1, 0], [1, 1], [1, 2]]
    assert observations[2] == [[1, 3], [1, 4], [2, 0], [2, 1]]
    dones = np.concatenate([args[3][:, 0] for args, _ in gaes])
    assert dones.tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0]


def test_c2_weights_are_orthogonal_and_biases_zero(script):
    agent, envs = small_agent(script)
    for name, layer in agent.named_modules():
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            continue
        gain = {"actor": 0.01, "critic": 1.0}.get(name, 2**0.5)
        if name in ("actor.4", "critic.4"):
            gain = {"actor.4": 0.01, "critic.4": 1.0}[name]
        weight = layer.weight.detach().flatten(1).double()
        if weight.shape[0] > weight.shape[1]:
            weight = weight.T
        expected = gain**2 * torch.eye(len(weight), dtype=torch.float64)
        assert torch.allclose(weight @ weight.T, expected, atol=1e-5 * gain**2), name
        assert (layer.bias == 0).all(), name
    if script is not ppo_continuous:
        obs = torch.as_tensor(observations(script, envs, 8))
        entropies = agent(obs)[0].entropy()
        choices = 2 if script is ppo_discrete else 4  # of CartPole and Breakout
        assert (entropies - np.log(choices)).abs().max() < 1e-3


def test_c3_adam_takes_a_first_step_of_one_half_on_a_gradient_of_1e_5(monkeypatch):
    made = spy(monkeypatch, torch.optim, "Adam")
    conftest.train(ppo_discrete)
    ((_, optimizer),) = made
    assert len(optimizer.param_groups) == 1  # one optimizer for policy and value function
    options = {key: optimizer.defaults[key] for key in ("betas", "eps", "weight_decay", "amsgrad")}
    parameter = nn.Parameter(torch.zeros(()))
    parameter.grad = torch.tensor(1e-5)
    torch.optim.Adam([parameter], lr=1.0, **options).step()
    assert parameter.item() == pytest.approx(-0.5, abs=1e-6)
    assert options["betas"] == (0.9, 0.999)
    assert options["weight_decay"] == 0


def test_c4_learning_rate_falls_linearly_once_an_iteration(monkeypatch):
    assert ppo_discrete.Args().num_iterations == 976
    steps = spy_steps(monkeypatch)
    tiny = {"num_envs": 1, "num_steps": 2, "num_minibatches": 2, "update_epochs": 1}
    conftest.train(ppo_discrete, env_id="Scripted-v0", total_timesteps=2 * 50, **tiny)
    rates = [lr for lr, *_ in steps]
    assert rates[::2] == rates[1::2]  # both minibatches of an iteration
    assert rates[::2] == pytest.approx([2.5e-4 * left / 50 for left in range(50, 0, -1)])
    logged = [value for _, _, name, value in metrics() if name == "charts/learning_rate"]
    assert logged == pytest.approx(rates[::2])


def test_c4_learning_rate_is_constant_without_annealing(monkeypatch):
    steps = spy_steps(monkeypatch)
    conftest.train(ppo_discrete, anneal_lr=False)
    assert {lr for lr, *_ in steps} == {np.float32(2.5e-4)}


REWARDS, VALUES = np.ones((3, 1)), np.array([[0.5], [0.6], [0.7]])


@pytest.mark.parametrize(
    ("dones", "expected"),
    [
        ((0, 0, 0), (3.08788445, 2.120026, 1.092)),
        ((0, 1, 0), (1.4702, 0.4, 1.092)),
        ((0, 0, 1), (2.38732857, 1.37515, 0.3)),
    ],
)
def test_c5_advantages_by_hand(dones, expected):
    dones = np.array(dones)[:, None]
    next_values = np.where(dones, 0.0, [[0.6], [0.7], [0.8]])
    advantages = ppo_discrete.gae(REWARDS, VALUES, next_values, dones, 0.99, 0.95)
    assert advantages[:, 0] == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("seed", range(10))
def test_c5_advantages_equal_their_definition_under_random_ends(seed):
    """A_t = sum_k (gamma lambda)^k delta_{t+k} up to the end of the episode, in O(T^2)."""
    rng = np.random.default_rng(seed)
    T, N = 40, 3
    gamma, gae_lambda = rng.uniform(0.5, 1.0, 2).tolist()
    rewards, values, last_values = rng.normal(size=(3, T, N))
    terminated, truncated = rng.random((2, T, N)) < 0.1
    dones = terminated | truncated
    next_values = np.where(terminated, 0.0, last_values)
    deltas = rewards + gamma * next_values - values
    expected = np.zeros((T, N))
    for t in range(T):
        for n in range(N):
            for k in range(T - t):
                expected[t, n] += (gamma * gae_lambda) ** k * deltas[t + k, n]
                if dones[t + k, n]:
                    break
    data = (rewards, values, next_values, dones)
    advantages = ppo_discrete.gae(*data, gamma, gae_lambda)
    np.testing.assert_allclose(advantages, expected, atol=1e-12)
    single = ppo_discrete.gae(*(x.astype(np.float32) for x in data), gamma, gae_lambda)
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, expected, atol=1e-4)


def test_c5_lambda_0_is_the_td_error_and_lambda_1_the_discounted_return():
    next_values = np.array([[0.6], [0.7], [0.8]])
    data = (REWARDS, VALUES, next_values, np.zeros((3, 1)), 0.9)
    np.testing.assert_allclose(ppo_discrete.gae(*data, 0.0), 1 + 0.9 * next_values - VALUES)
    returns = np.array([1 + 0.9 + 0.81 + 0.729 * 0.8, 1 + 0.9 + 0.81 * 0.8, 1 + 0.9 * 0.8])
    np.testing.assert_allclose(ppo_discrete.gae(*data, 1.0)[:, 0], returns - VALUES[:, 0])


class KnownValues(ppo_discrete.Agent):
    """V(s) is known from the observation (episode, steps) of a scripted environment."""

    def forward(self, obs):
        table = torch.tensor([0.5, 0.6, 0.7, 0.8, 0.9])
        return super().forward(obs)[0], table[obs[..., 1].long()] + 10 * obs[..., 0]


@pytest.mark.parametrize(
    ("terminated", "truncated", "bootstrap", "expected"),
    [
        (False, True, True, (2.1219665, 1.093)),
        (False, True, False, (1.4702, 0.4)),  # as Baselines
        (True, False, True, (1.4702, 0.4)),
        (True, True, True, (1.4702, 0.4)),  # died on the last step: there is no future
    ],
)
def test_truncation_is_bootstrapped_and_termination_is_not(
    monkeypatch, terminated, truncated, bootstrap, expected
):
    """Two rewards of 1, values .5 and .6, .7 at the last observation, 10.5 at the next reset."""
    episode = [(1.0, False, False), (1.0, terminated, truncated)]
    monkeypatch.setattr(ppo_discrete, "Agent", KnownValues)
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: None)
    losses = spy(monkeypatch, ppo_discrete, "ppo_loss")
    loop = {"num_envs": 1, "num_steps": 2, "num_minibatches": 1, "update_epochs": 1}
    conftest.train(
        ppo_discrete,
        env_id=scripted([episode]),
        total_timesteps=2,
        bootstrap_truncation=bootstrap,
        vf_coef=0.0,
        **loop,
    )
    *_, values, advantages, returns = losses[0][0][1]
    order = values.argsort()
    assert values[order].tolist() == pytest.approx([0.5, 0.6])
    assert advantages[order].tolist() == pytest.approx(expected, abs=1e-6)
    assert returns[order].tolist() == pytest.approx(
        [expected[0] + 0.5, expected[1] + 0.6], abs=1e-6
    )


def test_next_values_are_those_of_the_true_next_observation(monkeypatch):
    """A long random script in two environments, against the values looked up in the script."""
    rng = np.random.default_rng(0)
    episodes = []
    for _ in range(20):
        terminated, truncated = [(True, False), (False, True), (True, True)][rng.integers(3)]
        length = rng.integers(1, 5)
        episodes.append([(0.0, False, False)] * (length - 1) + [(0.0, terminated, truncated)])
    monkeypatch.setattr(ppo_discrete, "Agent", KnownValues)
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: None)
    gaes = spy(monkeypatch, ppo_discrete, "gae")
    conftest.train(ppo_discrete, env_id=scripted(episodes), num_steps=3, total_timesteps=96)
    seen = np.concatenate([args[2] for args, _ in gaes])
    table, expected = (0.5, 0.6, 0.7, 0.8, 0.9), []
    for number, episode in enumerate(episodes):
        for t, (_, terminated, _) in enumerate(episode):
            expected.append(0.0 if terminated else table[t + 1] + 10 * number)
    assert seen.shape == (48, 2)
    for n in range(2):
        assert seen[:, n].tolist() == pytest.approx(expected[:48])


def test_c6_every_epoch_is_a_new_order_of_the_whole_batch(monkeypatch):
    losses = spy(monkeypatch, ppo_discrete, "ppo_loss")
    loop = {"num_envs": 1, "num_steps": 32, "num_minibatches": 4, "update_epochs": 3}
    conftest.train(
        ppo_discrete, env_id=scripted([[(0.0, False, False)] * 999]), total_timesteps=64, **loop
    )
    chunks = [args[1][0][:, 1].tolist() for args, _ in losses]
    assert [len(chunk) for chunk in chunks] == [8] * (2 * 3 * 4)
    epochs = [[t for c in chunks[i : i + 4] for t in c] for i in range(0, len(chunks), 4)]
    for number, epoch in enumerate(epochs):
        assert sorted(epoch) == list(range(32 * (number // 3), 32 * (number // 3) + 32))
    orders = {tuple(t % 32 for t in epoch) for epoch in epochs}
    assert len(orders) == 6
    assert tuple(range(32)) not in orders


@pytest.mark.parametrize("script", [*conftest.SCRIPTS.values(), ppo_atari_lstm])
def test_c6_what_is_drawn_follows_from_seed_and_iteration(script, monkeypatch):
    """A generator for each iteration, named by [seed, rank, iteration], draws the orders, too."""

    class Reversing(np.random.Generator):
        def permutation(self, n):
            return np.arange(n)[::-1].copy()

    names = []
    monkeypatch.setattr(
        np.random, "default_rng", lambda x: names.append(x) or Reversing(np.random.PCG64(x))
    )
    gradients = spy(monkeypatch, script, "ppo_gradient")
    loop = {"num_envs": 4, "num_steps": 2, "num_minibatches": 2, "update_epochs": 2}
    changes = {"compile": False} if script is not ppo_atari_lstm else {}
    plain = {"cuda": False, "torch_threads": 1, "vectorization": "sync"} | changes
    script.train(script.Args(seed=7, total_timesteps=24, **loop, **plain))
    assert names == [[7, 0, 1], [7, 0, 2], [7, 0, 3]]
    drawn = [indices.tolist() for (_, _, indices, *_), _ in gradients]
    n = 4 if script is ppo_atari_lstm else 8
    assert [i for indices in drawn for i in indices] == list(range(n))[::-1] * 6


def test_c6_a_sample_keeps_its_own_action_value_and_return(monkeypatch):
    """Rows of a minibatch belong together: V(s), log pi(a|s) and R are those of the same s, a."""
    losses = spy(monkeypatch, ppo_discrete, "ppo_loss")
    gaes = spy(monkeypatch, ppo_discrete, "gae")
    conftest.train(ppo_discrete, env_id="CartPole-v1", total_timesteps=32)
    (rewards, old_values, *_), raw = gaes[0]
    advantage_of = dict(zip(old_values.flatten().tolist(), raw.flatten().tolist(), strict=True))
    assert len(advantage_of) == 32
    for (_, (_, _, _, values, advantages, returns), *_), _ in losses:
        looked_up = [advantage_of[value] for value in values.tolist()]
        assert advantages.tolist() == looked_up  # not normalized before the value targets
        assert torch.equal(returns, advantages + values)
    assert (rewards == 1).all()


def test_c7_advantages_have_mean_0_and_population_std_1():
    """At ratio 1 the gradient of the policy loss by log pi is minus the advantage over M."""
    agent = FakePolicy([0.0] * 4, [0.0] * 4)
    loss_of(agent, advantages=[1.0, 2.0, 3.0, 4.0], norm_adv=True)
    normalized = (-4 * agent.logprobs.grad).tolist()
    assert normalized == pytest.approx([-1.341641, -0.447214, 0.447214, 1.341641], abs=1e-5)

    agent = FakePolicy([0.0] * 4, [0.0] * 4)
    loss_of(agent, advantages=[1.0, 2.0, 3.0, 4.0], norm_adv=False)
    assert (-4 * agent.logprobs.grad).tolist() == pytest.approx([1.0, 2.0, 3.0, 4.0])


def test_c7_equal_advantages_become_zero():
    agent = FakePolicy([0.3] * 4, [0.0] * 4)
    loss, _ = loss_of(agent, advantages=[7.0] * 4, norm_adv=True)
    assert loss == 0
    assert (agent.logprobs.grad == 0).all()


def test_c7_nearly_equal_advantages_stay_small():
    """1e-8 is added to a standard deviation of 1e-8."""
    agent = FakePolicy([0.0] * 2, [0.0] * 2)
    loss_of(agent, advantages=[-1e-8, 1e-8], norm_adv=True)
    assert (-2 * agent.logprobs.grad).tolist() == pytest.approx([-0.5, 0.5], abs=1e-5)


def test_c7_minibatches_with_means_of_about_0_and_100_both_get_mean_0():
    for shift in (0.0, 100.0):
        agent = FakePolicy([0.0] * 4, [0.0] * 4)
        loss_of(agent, advantages=[shift + x for x in (1.0, 2.0, 3.0, 4.0)], norm_adv=True)
        assert agent.logprobs.grad.sum().item() == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "has_gradient"),
    [(1, 1.5, -1.2, False), (1, 0.5, -0.5, True), (-1, 1.5, 1.5, True), (-1, 0.5, 0.8, False)],
)
def test_c8_clipped_surrogate(advantage, ratio, loss, has_gradient):
    agent = FakePolicy([np.log(ratio)], [0.0])
    assert loss_of(agent, advantages=advantage)[0] == pytest.approx(loss)
    gradient = agent.logprobs.grad.item()
    assert gradient == pytest.approx(-advantage * ratio if has_gradient else 0.0)


@pytest.mark.parametrize("ratio", [0.95, 1.0, 1.05])
def test_c8_clip_range_is_clip_coef(ratio):
    agent = FakePolicy([np.log(ratio)], [0.0])
    assert loss_of(agent, advantages=1.0, clip_coef=0.01)[0] == pytest.approx(-min(ratio, 1.01))


@pytest.mark.parametrize(
    ("value", "returns", "clip_vloss", "loss", "gradient"),
    [
        (1.0, 2.0, True, 1.62, 0.0),
        (1.0, 2.0, False, 0.5, -1.0),
        (0.1, 2.0, True, 1.805, -1.9),
        (-1.0, 0.1, True, 0.605, -1.1),  # clipped only, without the maximum: 0.045
    ],
)
def test_c9_value_loss_is_the_worse_of_clipped_and_not(value, returns, clip_vloss, loss, gradient):
    agent = FakePolicy([0.0], [value])
    total, stats = loss_of(agent, returns=returns, vf_coef=1.0, clip_vloss=clip_vloss)
    assert stats["value_loss"] == total == pytest.approx(loss)
    assert agent.values.grad.item() == pytest.approx(gradient, abs=1e-6)


@pytest.mark.parametrize(
    ("value", "returns", "loss"),
    [(4.0, 5.0, 1.62), (3.1, 2.0, 0.605), (2.5, 2.0, 0.32)],  # above, within and below the range
)
def test_c9_clips_around_the_old_value(value, returns, loss):
    agent = FakePolicy([0.0], [value])
    total, _ = loss_of(agent, old_values=3.0, returns=returns, vf_coef=1.0)
    assert total == pytest.approx(loss)


def test_c10_total_loss():
    """Value error 2: half of its square, times c1. Entropy 0.7 is paid with c2."""
    agent = FakePolicy([0.0], [0.0], [0.7])
    assert loss_of(agent, returns=2.0, vf_coef=0.5, clip_vloss=False)[0] == pytest.approx(1.0)
    loss, stats = loss_of(agent, returns=2.0, vf_coef=0.5, ent_coef=0.1, advantages=3.0)
    assert loss == pytest.approx(-3.0 + 0.5 * 2.0 - 0.1 * 0.7)
    assert stats["loss"] == pytest.approx(loss)
    assert stats["policy_loss"] == pytest.approx(-3.0)
    assert stats["entropy"] == pytest.approx(0.7)


def test_c10_the_bonus_makes_a_peaked_policy_less_peaked():
    agent, _ = small_agent(ppo_discrete)
    agent.actor[-1].bias.data[0] = 3.0
    obs = torch.as_tensor([[0.0] * 6] * 4)
    policy, values = agent(obs)
    before = policy.entropy().mean().item()
    actions = torch.zeros(4, 1, dtype=torch.int64)
    zero, values = torch.zeros(4), values.detach()
    minibatch = (obs, actions, policy.log_prob(actions).detach(), values, zero, values)
    coefficients = (torch.tensor(0.2), torch.tensor(0.01), None, 0.0, False, True)
    ppo_discrete.ppo_loss(agent, minibatch, *coefficients)[0].backward()
    torch.optim.SGD(agent.actor.parameters(), lr=1.0).step()
    assert agent(obs)[0].entropy().mean().item() > before


def test_c11_gradient_is_clipped_to_a_global_norm_before_the_step(monkeypatch):
    steps = spy_steps(monkeypatch)
    conftest.train(ppo_discrete, max_grad_norm=0.01)
    assert [norm for _, norm, _ in steps] == pytest.approx([0.01] * len(steps), rel=1e-3)
    means = [value for _, _, name, value in metrics() if name == "losses/grad_norm"]
    assert min(means) > 0.05  # the norm before clipping is what is logged


def test_c11_a_small_gradient_is_left_alone_and_never_accumulates(monkeypatch):
    """One minibatch with a learning rate of 0 has the same gradient in each epoch."""
    steps = spy_steps(monkeypatch)
    loop = {"num_minibatches": 1, "update_epochs": 3, "learning_rate": 0.0}
    conftest.train(ppo_discrete, max_grad_norm=1e6, total_timesteps=32, **loop)
    (_, norm, first), *others = steps
    assert norm == pytest.approx(
        next(value for _, _, name, value in metrics() if name == "losses/grad_norm"), rel=1e-5
    )
    for _, _, grads in others:
        for a, b in zip(first, grads, strict=True):
            assert torch.allclose(a, b, atol=1e-5)


def test_c11_gradients_of_the_minibatches_of_an_epoch_are_apart(monkeypatch):
    """With a learning rate of 0 those of an epoch add up to the same, whatever its order."""
    steps = spy_steps(monkeypatch)
    loop = {"num_minibatches": 4, "update_epochs": 3, "learning_rate": 0.0, "norm_adv": False}
    conftest.train(ppo_discrete, max_grad_norm=1e6, total_timesteps=32, **loop)
    sums = [sum(g[0] for _, _, g in steps[i : i + 4]) for i in (0, 4, 8)]
    assert sums[0].norm() > 1e-3
    torch.testing.assert_close(sums[1], sums[0], atol=1e-5, rtol=0.0)
    torch.testing.assert_close(sums[2], sums[0], atol=1e-5, rtol=0.0)


def test_c12_statistics_by_hand():
    agent = FakePolicy([0.1, -0.1, 0.3], [0.0] * 3)
    _, stats = loss_of(agent)
    assert stats["old_approx_kl"] == pytest.approx(-0.1, abs=1e-6)
    assert stats["approx_kl"] == pytest.approx(0.019956, abs=1e-6)
    assert stats["clipfrac"] == pytest.approx(1 / 3)
    assert loss_of(FakePolicy([0.3, -0.3], [0.0] * 2))[1]["clipfrac"] == 1
    assert loss_of(FakePolicy([0.0], [0.0]), clip_coef=0.0)[1]["clipfrac"] == 0
    assert set(stats) == {
        *("loss", "policy_loss", "value_loss", "entropy"),
        *("old_approx_kl", "approx_kl", "clipfrac"),
    }


@pytest.mark.parametrize(("factor", "explained"), [(0.0, 1.0), (-2.0, -3.0), (1.0, 0.75)])
def test_c12_explained_variance(monkeypatch, factor, explained):
    """Returns are values plus advantages: V = R, V = -R and V = R / 2."""
    monkeypatch.setattr(ppo_discrete, "gae", lambda rewards, values, *_: factor * values)
    conftest.train(ppo_discrete, env_id="CartPole-v1", total_timesteps=32)
    (seen,) = [v for _, _, name, v in metrics() if name == "losses/explained_variance"]
    assert seen == pytest.approx(explained, abs=1e-5)


@pytest.mark.parametrize(
    ("script", "parameters"), [(ppo_discrete, 4610 + 4545), (ppo_continuous, 5702 + 5377 + 6)]
)
def test_c13_policy_and_value_function_are_separate(script, parameters):
    agent, envs = small_agent(script)
    assert sum(p.numel() for p in agent.parameters()) == parameters
    _, values = agent(torch.ones(3, *envs.single_observation_space.shape))
    values.sum().backward()
    assert all(p.grad is None for p in agent.actor.parameters())
    assert all(p.grad is not None for p in agent.critic.parameters())
    kinds = [type(layer) for layer in agent.actor]
    assert kinds == [nn.Linear, nn.Tanh, nn.Linear, nn.Tanh, nn.Linear]
    assert [agent.actor[i].out_features for i in (0, 2)] == [64, 64]


def spy_coefficients(monkeypatch):
    """What ppo_loss got with each minibatch: clip_coef, ent_coef, kl_coef as numbers, or None."""
    seen, original = [], ppo_discrete.ppo_loss

    def ppo_loss(agent, minibatch, *coefficients):
        seen.append([None if x is None else x.item() for x in coefficients[:3]])
        return original(agent, minibatch, *coefficients)

    monkeypatch.setattr(ppo_discrete, "ppo_loss", ppo_loss)
    return seen


ANNEALED = [0.2, 0.15, 0.1, 0.05]  # of 4 iterations: never zero


@pytest.mark.parametrize("flag", [None, "anneal_lr", "anneal_clip", "anneal_ent"])
def test_x1_clip_range_falls_with_its_flag_only_once_an_iteration(monkeypatch, flag):
    falls_linearly(monkeypatch, flag, "anneal_clip", 0, clip_coef=0.2)


@pytest.mark.parametrize("flag", [None, "anneal_lr", "anneal_clip", "anneal_ent"])
def test_x6_entropy_bonus_falls_with_its_flag_only_once_an_iteration(monkeypatch, flag):
    falls_linearly(monkeypatch, flag, "anneal_ent", 1, ent_coef=0.2)


def falls_linearly(monkeypatch, flag, own_flag, position, **start):
    """A coefficient that starts at 0.2, in training with one of the flags or with none."""
    seen = spy_coefficients(monkeypatch)
    flags = {"anneal_lr": False} | ({flag: True} if flag else {})
    conftest.train(ppo_discrete, total_timesteps=4 * 32, update_epochs=2, **flags, **start)
    expected = ANNEALED if flag == own_flag else [0.2] * 4
    assert [x[position] for x in seen] == pytest.approx(np.repeat(expected, 4).tolist())


@pytest.mark.parametrize(("target_kl", "epochs"), [(None, 5), (1e-9, 1), (1e9, 5)])
def test_x3_update_ends_after_an_epoch_above_the_target(monkeypatch, target_kl, epochs):
    steps = spy_steps(monkeypatch)
    loop = {"update_epochs": 5, "learning_rate": 0.01, "anneal_lr": False}
    conftest.train(ppo_discrete, target_kl=target_kl, **loop)
    assert len(steps) == 2 * epochs * 2  # iterations, epochs, minibatches


@pytest.mark.parametrize(
    ("kls", "epochs"),
    [
        ([(0.0, 0.1), (0.1, 0.0), (0.0, 0.1)], 3),
        ([(0.2, 0.0), (0.0, 0.0), (0.0, 0.0)], 1),
        ([(0.0, 0.0), (0.1, 0.1), (0.1, 0.1)], 2),
        ([(0.0625, 0.0625)] * 3, 3),  # not above the target
    ],
)
def test_x3_looks_at_the_mean_of_each_epoch(monkeypatch, kls, epochs):
    original, calls = ppo_discrete.ppo_loss, []

    def ppo_loss(*args):
        loss, stats = original(*args)
        stats["approx_kl"] = torch.tensor(kls[len(calls) // 2][len(calls) % 2])
        calls.append(args)
        return loss, stats

    monkeypatch.setattr(ppo_discrete, "ppo_loss", ppo_loss)
    conftest.train(ppo_discrete, target_kl=0.0625, update_epochs=3, total_timesteps=32)
    assert len(calls) == 2 * epochs


@pytest.mark.parametrize(("advantage", "ratio"), [(1, 1.5), (1, 0.5), (-1, 1.5), (-1, 0.5)])
def test_x5_the_penalty_takes_the_place_of_clipping(advantage, ratio):
    """beta times k3 is paid and the surrogate has a gradient everywhere."""
    agent = FakePolicy([np.log(ratio)], [0.0])
    loss, stats = loss_of(agent, advantages=advantage, kl_coef=3.0)
    kl = (ratio - 1) - np.log(ratio)
    assert stats["approx_kl"] == pytest.approx(kl)
    assert loss == stats["policy_loss"] == pytest.approx(-advantage * ratio + 3 * kl)
    gradient = agent.logprobs.grad.item()
    assert gradient == pytest.approx(-advantage * ratio + 3 * (ratio - 1), abs=1e-6)


@pytest.mark.parametrize(
    ("kls", "betas"),
    [
        ([0.29, 0.29, 0.28125], [1, 2, 4, 4]),
        ([0.12, 0.12, 0.125], [1, 0.5, 0.25, 0.25]),
        ([0.9, 0.01, 0.2], [1, 2, 1, 1]),
    ],
)
def test_x5_beta_follows_the_kl_of_the_last_epoch(monkeypatch, kls, betas):
    """Target 0.1875: it doubles above 0.28125 and is halved below 0.125, once an iteration."""
    seen, original = spy_coefficients(monkeypatch), ppo_discrete.ppo_loss

    def ppo_loss(*args):
        loss, stats = original(*args)
        iteration, minibatch = divmod(len(seen) - 1, 4)
        last = {2: 0.5 * kls[iteration], 3: 1.5 * kls[iteration]}  # two minibatches
        stats["approx_kl"] = torch.tensor(last.get(minibatch, 0.2))
        return loss, stats

    monkeypatch.setattr(ppo_discrete, "ppo_loss", ppo_loss)
    conftest.train(ppo_discrete, penalty_kl=0.1875, update_epochs=2, total_timesteps=3 * 32)
    assert [x[2] for x in seen] == np.repeat(betas[:3], 4).tolist()
    logged = [value for _, _, name, value in metrics() if name == "charts/kl_coef"]
    assert logged == betas[1:]
    (path,) = Path("runs").glob("*/checkpoint.pt")
    assert torch.load(path, weights_only=True)["kl_coef"].item() == betas[3]


@pytest.mark.parametrize(("kl", "beta"), [(9.0, 1e6), (0.0, 1e-6)])
def test_x5_beta_stays_where_it_can_come_back_from(monkeypatch, kl, beta):
    """30 times the same: 2 ** 30 and 2 ** -30 are not reached."""
    original = ppo_discrete.ppo_loss

    def ppo_loss(*args):
        loss, stats = original(*args)
        return loss, stats | {"approx_kl": torch.tensor(kl)}

    monkeypatch.setattr(ppo_discrete, "ppo_loss", ppo_loss)
    tiny = {"num_envs": 1, "num_steps": 2, "num_minibatches": 1, "update_epochs": 1}
    conftest.train(ppo_discrete, env_id="Scripted-v0", penalty_kl=0.1, total_timesteps=60, **tiny)
    logged = [value for _, _, name, value in metrics() if name == "charts/kl_coef"]
    assert logged[15] == pytest.approx(2.0 ** (16 if kl else -16))
    assert logged[-5:] == pytest.approx([beta] * 5, rel=1e-3, abs=0)


def test_x5_off_by_default(monkeypatch):
    seen = spy_coefficients(monkeypatch)
    conftest.train(ppo_discrete)
    assert {x[2] for x in seen} == {None}
    assert not [name for _, _, name, _ in metrics() if name == "charts/kl_coef"]


def test_x5_keeps_the_kl_near_the_target():
    """Seeds 1 to 5 have medians of 0.012 to 0.019, and clipped at 0.2 one of 0.005."""
    loop = {"num_steps": 128, "num_envs": 4, "num_minibatches": 4, "update_epochs": 10}
    loop |= {"learning_rate": 2.5e-3, "anneal_lr": False, "total_timesteps": 20 * 512}
    conftest.train(ppo_discrete, env_id="CartPole-v1", penalty_kl=0.02, **loop)
    kls = [value for _, _, name, value in metrics() if name == "losses/approx_kl"]
    assert 0.009 < np.median(kls[-10:]) < 0.03


@pytest.mark.parametrize(
    ("script", "changes", "tolerance"),
    [
        (ppo_discrete, {"num_steps": 128, "num_envs": 4, "num_minibatches": 4}, 1e-6),
        (ppo_continuous, {"num_steps": 512, "num_envs": 1, "num_minibatches": 8}, 1e-6),
        (ppo_atari, {"num_steps": 32, "num_minibatches": 2}, 1e-6),
        (ppo_atari, {"num_steps": 32, "num_minibatches": 2, "precision": "bf16"}, 3e-2),
    ],
)
def test_first_minibatch_of_every_rollout_is_on_policy(monkeypatch, script, changes, tolerance):
    """Before the first step of an update the ratio is 1: nothing was lost on the way to it."""
    ratios, original = [], script.ppo_loss

    def ppo_loss(agent, minibatch, *coefficients):
        obs, actions, logprobs, *_ = minibatch
        with torch.no_grad():
            ratios.append((agent(obs)[0].log_prob(actions) - logprobs).exp())
        loss, stats = original(agent, minibatch, *coefficients)
        ratios[-1] = (ratios[-1], stats)
        return loss, stats

    monkeypatch.setattr(script, "ppo_loss", ppo_loss)
    conftest.train(script, update_epochs=1, learning_rate=1e-3, **changes)
    updates = len(ratios) // 2
    for ratio, stats in (ratios[0], ratios[updates]):
        assert (ratio - 1).abs().max() < tolerance
        assert stats["approx_kl"].abs() < tolerance
        assert stats["clipfrac"] == 0
    assert (ratios[1][0] - 1).abs().max() > 1e-6  # the second is not: the policy has moved


def observations(script, envs, count):
    """Random vectors, every choice valid, or pictures of black and white quarters."""
    rng = np.random.default_rng(0)
    if script is ppo_atari:
        quarters = rng.choice(np.array([0, 255], np.uint8), (count, 2, 2, 4))
        return quarters.repeat(42, axis=1).repeat(42, axis=2)
    obs = rng.normal(size=(count, *envs.single_observation_space.shape)).astype(np.float32)
    if script is ppo_discrete:
        obs[:, -envs.single_action_space.nvec[0] :] = 0.0
    return obs


def categorical(policy):
    """The distribution of an action's only component."""
    return (
        Categorical(logits=policy.base_dist.logits[:, 0])
        if hasattr(policy, "base_dist")
        else policy
    )


def test_rollout_policy_samples_from_the_distribution_of_forward(script):
    """Thousands of draws for each of four observations, all in one call, by the latest weights."""
    torch.manual_seed(0)
    more_than_two_actions = {"env_id": "Acrobot-v1"} if script is ppo_discrete else {}
    agent, envs = small_agent(script, **more_than_two_actions)
    agent.rollout_policy(np.random.default_rng(0))  # its weights are no more
    far_from_initial(agent)
    obs, draws = observations(script, envs, 100), 1000 if script is ppo_atari else 10_000
    *_, bias = agent.actor.parameters()
    with torch.no_grad():
        policy, _ = agent(torch.as_tensor(obs))
        outputs = policy.mean if script is ppo_continuous else categorical(policy).logits
        bias -= outputs.mean(0)  # so that no action is the likeliest for all
        obs = obs[outputs[:, 0].argsort()[[0, 33, 66, 99]]]
        policy, _ = agent(torch.as_tensor(obs))
    act = agent.rollout_policy(np.random.default_rng(0))
    actions = torch.as_tensor(act(np.concatenate([obs] * draws))).unflatten(0, (draws, 4))
    if script is ppo_continuous:  # Kolmogorov-Smirnov, and no correlation
        assert torch.pdist(policy.mean).min() > 0.5
        uniform = ((torch.arange(draws) + 0.5) / draws)[:, None, None]
        shares = policy.base_dist.cdf(actions.float()).sort(dim=0).values
        assert (shares - uniform).abs().max() < 2.5 / draws**0.5
        for one in actions.unbind(1):
            correlation = torch.corrcoef(one.T) - torch.eye(one.shape[1])
            assert correlation.abs().max() < 5 / draws**0.5
    else:  # chi-squared
        probs = categorical(policy).probs
        assert torch.pdist(probs, torch.inf).min() > 0.09
        actions = actions.view(draws, 4)
        frequencies = nn.functional.one_hot(actions, probs.shape[1]).float().mean(0)
        chi2 = draws * ((frequencies - probs) ** 2 / probs).sum()
        freedom = probs.numel() - len(probs)
        assert chi2 < freedom + 5 * (2 * freedom) ** 0.5


def test_rollout_policy_draws_anew_with_every_call_and_again_with_the_same_seed(script):
    agent, envs = small_agent(script)
    obs = np.concatenate([observations(script, envs, 1)] * 20)
    first, again, other = (agent.rollout_policy(np.random.default_rng(x)) for x in (1, 1, 2))
    draws = [first(obs), first(obs)]
    assert (draws[0] != draws[1]).any()
    assert np.array_equal(draws, [again(obs), again(obs)])
    assert (draws[0] != other(obs)).any()


def test_each_rollout_has_the_weights_of_its_time_and_noise_of_its_own(monkeypatch):
    """With little noise an action is the mean of the policy, which moves far in an update."""

    class Precise(ppo_continuous.Agent):
        def __init__(self, envs):
            super().__init__(envs)
            nn.init.constant_(self.log_std, -6.0)

    def ppo_loss(agent, minibatch, *coefficients):
        obs, actions, *_ = minibatch
        with torch.no_grad():
            policy, _ = agent(obs)
        noise.append(((actions - policy.mean) / policy.stddev).flatten().sort().values)
        return original(agent, minibatch, *coefficients)

    noise, original = [], ppo_continuous.ppo_loss
    monkeypatch.setattr(ppo_continuous, "Agent", Precise)
    monkeypatch.setattr(ppo_continuous, "ppo_loss", ppo_loss)
    loop = {"num_minibatches": 1, "update_epochs": 2, "learning_rate": 0.01, "anneal_lr": False}
    conftest.train(ppo_continuous, env_id="ScriptedBox-v0", total_timesteps=96, **loop)
    assert len(noise) == 6
    assert all(x.abs().max() < 6 for x in noise[::2])  # in the first epoch
    assert all(x.abs().max() > 10 for x in noise[1::2])  # in the second
    assert torch.pdist(torch.stack(noise[::2])).min() > 0.1
