"""The details R1 to R9 of continuous actions, by their numbers."""

import math
import types
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common import vec_env

import conftest
import envs
import ppo_continuous

LN2 = math.log(2)
TERMINATED = ((1.0, False, False), (1.0, False, False), (1.0, True, False))
TRUNCATED = (*TERMINATED[:2], (1.0, False, True))
ENDLESS = ((1.0, False, False),) * 2000


class Replay(envs.ScriptedBox):
    """Shows the numbers rows[seed], one after another; `shown` keeps the very arrays."""

    action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, rows, dtype=np.float64, episodes=(ENDLESS,)):
        super().__init__(episodes)
        self.rows, self.shown = rows, []
        self.observation_space = gym.spaces.Box(-1e9, 1e9, (1,), dtype)

    def observation(self):
        self.shown.append(np.array([next(self.numbers)], self.observation_space.dtype))
        return self.shown[-1]

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.numbers = iter(self.rows[seed])
        return super().reset(seed=seed, options=options)


def register(env, **kwargs):
    """Registers `env` as Test-v0, to be made with `kwargs`."""
    gym.registry.pop("Test-v0", None)
    gym.register("Test-v0", env, kwargs=kwargs)


def make(env, num_envs=1, gamma=0.99, **kwargs):
    register(env, **kwargs)
    args = ppo_continuous.Args(env_id="Test-v0", num_envs=num_envs, gamma=gamma)
    return ppo_continuous.make_envs(args)


def replay(*rows, **kwargs):
    """N environments, number i shows rows[i]. The environments and their first observations."""
    made = make(Replay, len(rows), rows=rows, **kwargs)
    return made, made.reset(seed=list(range(len(rows))))[0]


def step(made, *action):
    """One step of all environments with the same action, 0 if none is given."""
    shape = (made.num_envs, *made.single_action_space.shape)
    return made.step(np.broadcast_to(np.float32(action or 0.0), shape))


@pytest.fixture
def trained_envs(monkeypatch):
    """The environments `train` makes, in a list."""
    made, make_envs = [], ppo_continuous.make_envs

    def keep(args):
        made.append(make_envs(args))
        return made[-1]

    monkeypatch.setattr(ppo_continuous, "make_envs", keep)
    return made


def new_agent(obs_dim, action_dim):
    return ppo_continuous.Agent(
        types.SimpleNamespace(
            single_observation_space=gym.spaces.Box(-10, 10, (obs_dim,)),
            single_action_space=gym.spaces.Box(-1, 1, (action_dim,)),
        )
    )


def set_log_std(agent, *values):
    with torch.no_grad():
        agent.log_std.copy_(torch.tensor(values))


# ------------------------------------------------------------------------------------------------
# Policy


def test_r1_density_and_entropy_of_the_normal_distribution():
    agent, obs = new_agent(4, 3), torch.randn(5, 4)
    policy, _ = agent(obs)
    assert torch.equal(policy.mean, agent.actor(obs))  # not squashed
    assert policy.log_prob(policy.mean).tolist() == pytest.approx([-2.756816] * 5, abs=1e-6)
    assert policy.entropy().tolist() == pytest.approx([4.256816] * 5, abs=1e-6)
    off_by_one = policy.mean + torch.tensor([0.0, 1.0, 0.0])
    assert policy.log_prob(off_by_one).tolist() == pytest.approx([-3.256816] * 5, abs=1e-6)


def test_r1_density_and_entropy_with_other_deviations():
    agent = new_agent(4, 2)
    set_log_std(agent, LN2, -LN2)
    policy, _ = agent(torch.zeros(1, 4))
    assert policy.stddev[0].tolist() == pytest.approx([2.0, 0.5])
    log_prob = policy.log_prob(policy.mean + torch.tensor([2.0, 0.5]))  # one sigma in both
    assert log_prob.item() == pytest.approx(-1 - math.log(2 * math.pi))
    assert policy.entropy().item() == pytest.approx(1 + math.log(2 * math.pi))


def test_r2_deviation_is_a_trained_parameter_and_the_same_in_every_state():
    agent = new_agent(4, 3)
    assert agent.log_std.shape == (3,)
    assert torch.equal(agent(10 * torch.randn(2, 4))[0].stddev, torch.ones(2, 3))
    assert "log_std" in dict(agent.named_parameters())
    agent(torch.randn(2, 4))[0].log_prob(torch.randn(2, 3)).sum().backward()
    assert (agent.log_std.grad != 0).all()
    trained = conftest.train(ppo_continuous, env_id="ScriptedBox-v0")
    assert (trained.log_std != 0).all()


def test_r2_samples_have_the_deviation_of_the_parameter():
    agent = new_agent(4, 2)
    set_log_std(agent, LN2, 0.0)
    obs = np.ones((20_000, 4), np.float32)
    samples = agent.rollout_policy(np.random.default_rng(0))(obs)
    assert samples.std(0).tolist() == pytest.approx([2.0, 1.0], rel=0.02)
    assert samples.mean(0).tolist() == pytest.approx(agent.actor(torch.ones(4)).tolist(), abs=0.05)


def test_r3_log_probability_and_entropy_are_sums_over_components():
    agent, obs, actions = new_agent(4, 2), torch.randn(5, 4), torch.randn(5, 2)
    set_log_std(agent, LN2, -LN2)
    policy, _ = agent(obs)
    each = torch.distributions.Normal(agent.actor(obs), torch.tensor([2.0, 0.5]))
    assert policy.log_prob(actions).shape == policy.entropy().shape == (5,)
    torch.testing.assert_close(policy.log_prob(actions), each.log_prob(actions).sum(1))
    torch.testing.assert_close(policy.entropy(), each.entropy().sum(1))


def test_r3_ratio_is_the_product_of_the_ratios_of_the_components():
    agent = new_agent(4, 2)
    obs, actions = torch.zeros(1, 4), torch.zeros(1, 2)  # the mean is 0, too
    old = agent(obs)[0].log_prob(actions)
    set_log_std(agent, LN2, math.log(4))
    ratio = (agent(obs)[0].log_prob(actions) - old).exp()
    assert ratio.item() == pytest.approx(1 / 2 * 1 / 4)


def test_r4_two_tanh_networks_with_the_size_of_those_for_half_cheetah():
    agent = new_agent(17, 6)
    sizes = [sum(p.numel() for p in net.parameters()) for net in (agent.actor, agent.critic)]
    assert sizes == [5702, 5377]
    assert sum(p.numel() for p in agent.parameters()) == 11_085
    for net in (agent.actor, agent.critic):
        assert [type(layer).__name__ for layer in net] == ["Linear", "Tanh"] * 2 + ["Linear"]


def test_r4_policy_and_value_function_share_nothing():
    agent = new_agent(4, 2)
    policy, values = agent(torch.randn(5, 4))
    assert values.shape == (5,)
    policy.log_prob(torch.randn(5, 2)).sum().backward()
    assert all(p.grad is None for p in agent.critic.parameters())
    agent.zero_grad()
    values.sum().backward()
    assert all(p.grad is None for p in [*agent.actor.parameters(), agent.log_std])


# ------------------------------------------------------------------------------------------------
# Actions


def test_r5_environment_gets_the_clipped_action_and_the_rollout_keeps_the_sample(
    monkeypatch, trained_envs
):
    ratios, kept, ppo_loss = [], [], ppo_continuous.ppo_loss

    class FarOut(ppo_continuous.Agent):
        def __init__(self, envs):
            super().__init__(envs)
            torch.nn.init.constant_(self.actor[-1].bias, 5.0)

    def keep_ratio(agent, minibatch, *coefficients):
        obs, actions, logprobs, *_ = minibatch
        kept.append(actions)
        ratios.append((agent(obs)[0].log_prob(actions) - logprobs).exp())
        return ppo_loss(agent, minibatch, *coefficients)

    monkeypatch.setattr(ppo_continuous, "Agent", FarOut)
    monkeypatch.setattr(ppo_continuous, "ppo_loss", keep_ratio)
    conftest.train(
        ppo_continuous, env_id="ScriptedBox-v0", num_steps=64, num_minibatches=1, learning_rate=0.0
    )
    seen = np.concatenate([env.unwrapped.actions for env in trained_envs[0].env.envs])
    assert np.abs(seen).max() == 1.0
    assert np.mean(seen == 1.0) > 0.99
    assert torch.cat(kept).mean().item() == pytest.approx(5.0, abs=0.3)
    assert torch.cat(kept).std().item() == pytest.approx(1.0, abs=0.2)
    torch.testing.assert_close(torch.cat(ratios), torch.ones(4 * 128))


def test_r5_action_is_clipped_to_each_bound_and_not_altered_itself():
    made = make(envs.ScriptedBox, 2)
    made.reset(seed=[0, 1])
    action = np.array([[3.0, 0.25], [-0.5, -7.0]], np.float32)
    made.step(action)
    seen = [env.unwrapped.actions[0].tolist() for env in made.env.envs]
    assert seen == [[1.0, 0.25], [-0.5, -1.0]]
    assert action.tolist() == [[3.0, 0.25], [-0.5, -7.0]]


def test_r5_half_cheetah_does_not_pay_for_what_it_cannot_do():
    made = ppo_continuous.make_envs(ppo_continuous.Args(env_id="HalfCheetah-v5"))
    made.reset(seed=0)
    (cheetah,) = made.env.get_attr("unwrapped")
    costs, control_cost = [], cheetah.control_cost
    cheetah.control_cost = lambda action: costs.append(control_cost(action)) or costs[-1]
    step(made, 3.0)
    assert costs == pytest.approx([0.1 * 6])  # 5.4 for six actions of 3


# ------------------------------------------------------------------------------------------------
# Observations


def test_r6_first_observation():
    made, obs = replay([5.0])
    assert obs.item() == pytest.approx(0.0098058, abs=5e-8)
    assert made.single_observation_space.dtype == obs.dtype == np.float32


@pytest.mark.parametrize("rows", [[[1, 2, 3, 4]], [[1, 3], [2, 4]], [[1], [2], [3], [4]]])
def test_r6_statistics_are_of_all_environments_and_the_same_in_any_batches(rows):
    made, _ = replay(*rows)
    for _ in rows[0][1:]:
        step(made)
    rms = made.obs_rms
    assert rms.mean.item() == pytest.approx(2.4999375, abs=1e-7)
    assert rms.var.item() == pytest.approx(1.25015, abs=1e-5)
    assert rms.count == pytest.approx(4.0001, abs=1e-10)


def test_r6_same_observation_is_normalized_the_same_in_all_environments():
    made, first = replay([1.0, 7.0, 3.0], [9.0, 7.0, 3.0])
    assert first[0] != first[1]
    for _ in range(2):
        obs, *_ = step(made)
        assert obs[0] == obs[1]


def test_r6_components_have_statistics_of_their_own():
    made = make(envs.ScriptedBox, episodes=(TRUNCATED,))
    made.reset(seed=0)
    for _ in range(7):
        step(made)
    expected = np.array([[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2], [2, 0], [2, 1]])
    np.testing.assert_allclose(made.obs_rms.mean, expected.mean(0), rtol=1e-4)
    np.testing.assert_allclose(made.obs_rms.var, expected.var(0), rtol=1e-3)


def test_r6_constant_observations_divide_by_no_less_than_the_epsilon():
    made, _ = replay([5.0])
    made.obs_rms.mean, made.obs_rms.var = np.array([5.0]), np.array([0.0])
    assert made.normalize(np.array([5.0001])).item() == pytest.approx(1.0)


def test_r6_normalizing_leaves_the_raw_observations_alone():
    numbers = [4.0, -2.0, 1000.0, 3.0, 8.0]
    made, _ = replay(numbers, episodes=(TRUNCATED,))
    for _ in range(3):
        step(made)
    env = made.env.envs[0].unwrapped
    assert np.concatenate(env.shown).tolist() == numbers  # the array of 3.0 is a final_obs
    assert made.env._observations.item() == 8.0


@pytest.mark.parametrize("ends", [TERMINATED, TRUNCATED])
def test_r6_final_observation_is_normalized_but_not_counted(ends):
    made, _ = replay([1, 2, 3, 100, 4, 5], [2, 4, 6, 8, 10], episodes=(ends, ENDLESS))
    made.env.envs[1].reset()  # on to its endless episode; shows 4, unseen by the vector env
    for _ in range(2):
        info = step(made)[-1]
        assert "final_obs" not in info
    info = step(made)[-1]
    counted = np.array([1, 2, 2, 6, 3, 8, 4, 10])  # neither 100 nor 4
    rms = made.obs_rms
    assert rms.count == pytest.approx(8.0001)
    assert rms.mean.item() == pytest.approx(counted.mean(), rel=1e-4)
    final = info["final_obs"]
    assert final[1] is None
    assert final[0].dtype == np.float32
    expected = (100 - rms.mean) / np.sqrt(rms.var + 1e-8)  # with the statistics after this step
    assert final[0].item() == min(10.0, np.float32(expected.item()))


def test_r6_final_observation_takes_the_statistics_of_its_step():
    made, _ = replay([1, 2, 3, 5, 4], episodes=(TRUNCATED,))
    for _ in range(3):
        info = step(made)[-1]
    mean, var = (1 + 2 + 3 + 4) / 4, 1.25  # 4, the first observation of the next episode, counts
    assert info["final_obs"][0].item() == pytest.approx((5 - mean) / var**0.5, rel=1e-3)


def test_r6_statistics_of_float32_observations_are_float64():
    made, _ = replay([1e8], [1.0], [1.0], [-1e8], dtype=np.float32)  # in float32 they add up to 0
    rms = made.obs_rms
    for statistics in (rms, ppo_continuous.RunningMeanStd((1,))):
        assert statistics.mean.dtype == statistics.var.dtype == np.float64
    assert rms.mean.item() == pytest.approx(0.5, abs=1e-3)
    assert rms.var.item() == pytest.approx(5e15, rel=1e-4)


def test_r6_the_first_reset_counts_the_observation_it_returns():
    """A later one, of a run that goes on, does not: its statistics have seen as many."""
    made, _ = replay([1.0, 3.0, 5.0])
    for _ in range(2):
        assert made.obs_rms.count == pytest.approx(1.0001)
        assert made.obs_rms.mean.item() == pytest.approx(1.0, rel=1e-3)
        made.reset(seed=None)


def test_r7_observation_is_clipped_to_10():
    made, _ = replay([*[0, 1] * 500, 1e6, -1e6])
    for _ in range(1000):
        obs, *_ = step(made)
    assert obs.item() == 10.0
    assert step(made)[0].item() == -10.0
    assert made.single_observation_space == gym.spaces.Box(-10, 10, (1,), np.float32)


# ------------------------------------------------------------------------------------------------
# Rewards


def record_returns(made):
    """What the statistics of the returns are fed from now on, a list for each step."""
    fed, update = [], made.return_rms.update

    def recorder(x):
        fed.append(x.tolist())
        update(x)

    made.return_rms.update = recorder
    return fed


@pytest.mark.parametrize("ends", [TERMINATED, TRUNCATED, (*TERMINATED[:2], (1.0, True, True))])
def test_r8_statistics_are_of_the_discounted_return_of_each_episode(ends):
    made = make(envs.ScriptedBox, gamma=0.5, episodes=(ends,))
    made.reset(seed=0)
    fed = record_returns(made)
    for _ in range(6):
        step(made)
    assert fed == [[1.0], [1.5], [1.75]] * 2


def test_r8_return_starts_anew_where_an_episode_ended_and_nowhere_else():
    episodes = (((1.0, False, True),), TERMINATED)
    made = make(envs.ScriptedBox, 2, gamma=0.5, episodes=episodes)
    made.reset(seed=0)
    made.env.envs[1].reset()  # one episode ahead
    fed = record_returns(made)
    for _ in range(4):
        step(made)
    assert fed == [[1.0, 1.0], [1.0, 1.5], [1.5, 1.75], [1.75, 1.0]]


def test_r8_reset_starts_all_returns_anew():
    made = make(envs.ScriptedBox, 2, gamma=0.5, episodes=(TERMINATED,))
    made.reset(seed=0)
    step(made)
    made.reset(seed=0)
    fed = record_returns(made)
    step(made)
    assert fed == [[1.0, 1.0]]


def test_r8_reward_is_divided_by_the_deviation_of_the_return_and_not_centred():
    rewards = [3.0, 1.0, 2.0, 1.0, 3.0, 1.0]
    episode = tuple((r, i == 5, False) for i, r in enumerate(rewards))
    made = make(envs.ScriptedBox, gamma=0.5, episodes=(episode,))
    made.reset(seed=0)
    fed = record_returns(made)
    scaled = [step(made)[1].item() for _ in rewards]
    assert min(scaled) > 0
    assert np.ravel(fed).tolist() == [3.0, 2.5, 3.25, 2.625, 4.3125, 3.15625]
    rms = made.return_rms
    assert rms.count == pytest.approx(6.0001)
    assert rms.mean == pytest.approx(np.mean(fed), rel=1e-4)
    assert scaled[-1] == pytest.approx(1.0 / np.sqrt(rms.var))
    assert rms.var == pytest.approx(np.var(fed), rel=1e-3)


def test_r8_constant_returns_divide_by_no_less_than_the_epsilon():
    made = make(envs.ScriptedBox, episodes=(((1e-4, False, False),),))
    made.reset(seed=0)
    for name, value in {"mean": 1e-4, "var": 0.0, "count": 1e9}.items():
        getattr(made.return_rms, name)[...] = value
    assert step(made)[1].item() == pytest.approx(1.0)


@pytest.mark.parametrize("reward", [1.0, -1.0])
def test_r9_first_reward_is_clipped_to_10(reward):
    made = make(envs.ScriptedBox, episodes=(((reward, False, False),),))
    made.reset(seed=0)
    scaled = step(made)[1].item()
    assert reward / np.sqrt(made.return_rms.var + 1e-8) == pytest.approx(70.71 * reward, abs=0.01)
    assert scaled == 10.0 * reward


def test_recorded_returns_are_the_true_ones():
    register(
        envs.ScriptedBox, episodes=(((500.0, False, False), (-20.0, False, False), (3.5, 1, 0)),)
    )
    conftest.train(ppo_continuous, env_id="Test-v0")
    rows = conftest.metrics()
    returns = [value for _, _, name, value in rows if name == "charts/episodic_return"]
    lengths = [value for _, _, name, value in rows if name == "charts/episodic_length"]
    assert len(returns) == 2 * (32 // 3)
    assert set(returns) == {483.5}
    assert set(lengths) == {3}


# ------------------------------------------------------------------------------------------------
# All of the normalizer


@pytest.mark.parametrize(
    "env_id, gamma", [("Pendulum-v1", 0.9), ("InvertedPendulum-v5", 0.99), ("Hopper-v5", 0.99)]
)
def test_normalizer_agrees_with_stable_baselines3(env_id, gamma):
    """Over episodes that end by termination and by truncation, in float32 and float64."""
    N, rng = 3, np.random.default_rng(0)
    ours = ppo_continuous.make_envs(ppo_continuous.Args(env_id=env_id, num_envs=N, gamma=gamma))
    theirs = vec_env.VecNormalize(
        vec_env.DummyVecEnv([lambda: gym.make(env_id)] * N), gamma=gamma, epsilon=1e-8
    )
    theirs.seed(7)
    close = {"rtol": 1e-6, "atol": 1e-6}
    np.testing.assert_allclose(ours.reset(seed=[7, 8, 9])[0], theirs.reset(), **close)
    ends = 0
    space = ours.env.single_action_space
    for _ in range(450):
        action = rng.uniform(space.low, space.high, (N, *space.shape)).astype(np.float32)
        obs, reward, terminated, truncated, info = ours.step(action)
        their_obs, their_reward, their_dones, their_infos = theirs.step(action)
        np.testing.assert_allclose(obs, their_obs, **close)
        np.testing.assert_allclose(reward, their_reward, **close)
        assert ((terminated | truncated) == their_dones).all()
        for i in np.flatnonzero(their_dones):
            ends += 1
            their_final = their_infos[i]["terminal_observation"]
            np.testing.assert_allclose(info["final_obs"][i], their_final, **close)
    assert ends >= 2 * N
    for rms, their_rms in [(ours.obs_rms, theirs.obs_rms), (ours.return_rms, theirs.ret_rms)]:
        np.testing.assert_allclose(rms.mean, their_rms.mean, **close)
        np.testing.assert_allclose(rms.var, their_rms.var, **close)
        assert rms.count == pytest.approx(their_rms.count, rel=1e-12)


def test_checkpoint_holds_the_statistics_exactly(trained_envs):
    conftest.train(ppo_continuous, env_id="ScriptedBox-v0")
    (path,) = Path("runs").glob("*/checkpoint.pt")
    saved = torch.load(path, weights_only=True)
    made = trained_envs[0]
    for kind, rms in [("obs", made.obs_rms), ("return", made.return_rms)]:
        for name in ("mean", "var", "count"):
            value = saved[f"{kind}_{name}"]
            assert value.dtype == torch.float64
            np.testing.assert_array_equal(value.numpy(), getattr(rms, name), strict=False)
    # an observation of each environment at the reset and after each of 2 * 16 steps
    assert made.obs_rms.count == pytest.approx(2 * 33 + 1e-4)
    assert made.return_rms.count == pytest.approx(2 * 32 + 1e-4)
