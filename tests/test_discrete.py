"""Details of ppo_discrete.py alone: several components of an action, and masks of invalid ones."""

import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import nn

import conftest
import ppo_discrete
from conftest import far_from_initial, metrics, spy
from envs import Choices


def chosen(env):
    """The environment as the script sees it."""
    env.spec = gym.envs.registration.EnvSpec("Choices-v0")
    return ppo_discrete.DiscreteActions(ppo_discrete.Watched(env, 0))


def made(**kwargs):
    """The id of a new environment, an instance of Choices."""
    env_id = f"Choices{len(gym.registry)}-v0"
    gym.register(env_id, "envs:Choices", kwargs=kwargs)
    return env_id


def choosing(*nvec):
    """An agent for actions of such components. Its weights are far from the initial ones."""
    envs = ppo_discrete.make_envs(ppo_discrete.Args(env_id=made(nvec=nvec), num_envs=1))
    envs.close()
    agent = ppo_discrete.Agent(envs)
    far_from_initial(agent)
    return agent


def observed(mask, count=1):
    """Random observations [count, 2 + len(mask)] with one mask, 1 for what is valid."""
    obs = np.random.default_rng(0).normal(size=(count, 2))
    masks = np.broadcast_to(np.where(mask, 0.0, -1e8), (count, len(mask)))
    return np.concatenate([obs, masks], axis=1, dtype=np.float32)


ALL = [1, 1, 0, 1, 1, 1]  # of nvec (2, 3): the first component has no third choice
EVERY_ACTION = torch.cartesian_prod(torch.arange(2), torch.arange(3))  # [6, 2]


def test_m1_equal_logits_give_the_product_of_uniform_components():
    agent = choosing(2, 3)
    nn.init.zeros_(agent.actor[-1].weight)
    nn.init.zeros_(agent.actor[-1].bias)
    policy, values = agent(torch.as_tensor(observed(ALL, 6)))
    assert policy.log_prob(EVERY_ACTION).tolist() == pytest.approx([-1.791759] * 6, abs=1e-6)
    assert policy.entropy().tolist() == pytest.approx([1.791759] * 6, abs=1e-6)
    assert values.shape == (6,)


def test_m1_joint_probabilities_are_products_and_add_up_to_1():
    """As many observations as components, so that the axes could be mistaken for each other."""
    agent, obs = choosing(2, 3), torch.as_tensor(observed(ALL, 2))
    logits = agent.actor(obs[:, :2])
    parts = [logits[:, :2].softmax(-1), logits[:, 3:].softmax(-1)]
    for i in range(2):
        policy, _ = agent(obs[[i] * 6])
        expected = torch.outer(parts[0][i], parts[1][i]).flatten()
        torch.testing.assert_close(policy.log_prob(EVERY_ACTION).exp(), expected)
        assert policy.log_prob(EVERY_ACTION).exp().sum().item() == pytest.approx(1, abs=1e-6)
    policy, _ = agent(obs)
    sums = [-(part * part.log()).sum(-1) for part in parts]
    torch.testing.assert_close(policy.entropy(), sums[0] + sums[1])


@pytest.mark.parametrize("mask", [ALL, [1, 1, 0, 1, 0, 1], [0, 1, 0, 1, 1, 1]])
def test_m1_rollout_policy_samples_each_component_by_itself(mask):
    agent, draws = choosing(2, 3), 40_000
    act = agent.rollout_policy(np.random.default_rng(0))
    actions = act(np.repeat(observed(mask), draws, axis=0))
    assert actions.shape == (draws, 2)
    with torch.no_grad():
        policy, _ = agent(torch.as_tensor(observed(mask)).repeat(6, 1))
    expected = policy.log_prob(EVERY_ACTION).exp().numpy()
    counts = np.bincount(actions[:, 0] * 3 + actions[:, 1], minlength=6)
    likely = expected > 1e-30
    assert counts[~likely].sum() == 0
    chi2 = ((counts - draws * expected) ** 2)[likely] / (draws * expected[likely])
    assert chi2.sum() < likely.sum() - 1 + 5 * (2 * (likely.sum() - 1)) ** 0.5


def test_m1_discrete_is_the_case_of_one_component():
    """The same seed, episodes and choices: the same run to the last digit."""

    class OneChoice(Choices):
        def __init__(self):
            super().__init__(nvec=(3,), length=5)
            self.action_space = gym.spaces.Discrete(3)

    gym.register("OneChoice-v0", OneChoice)
    tables = []
    for env_id in ("OneChoice-v0", made(nvec=(3,), length=5)):
        agent = conftest.train(ppo_discrete, env_id=env_id, seed=5)
        tables.append([p.detach().numpy() for p in agent.parameters()])
    for one, other in zip(*tables, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("nvec", "start"),
    [([2, 3], [0, 0]), ([2, 3], [5, -1]), ([[2, 3], [4, 1]], [[0, 7], [-2, 1]]), ([1], [3])],
)
def test_m1_the_environment_gets_actions_of_its_own_space(nvec, start):
    """Choices asserts that its space contains them; every one occurs."""
    env = chosen(Choices(np.array(nvec), np.array(start), length=200))
    env.reset(seed=0)
    env.action_space.seed(0)
    assert env.action_space == gym.spaces.MultiDiscrete(np.ravel(nvec))
    for _ in range(200):
        env.step(env.action_space.sample())
    actions = np.array(env.unwrapped.actions)
    assert actions.shape == (200, *np.shape(nvec))
    np.testing.assert_array_equal(actions.min(0), start)
    np.testing.assert_array_equal(actions.max(0), np.add(start, nvec) - 1)


def test_m1_training_with_components_of_different_size():
    conftest.train(ppo_discrete, env_id=made(nvec=(1, 4, 2)))
    entropies = [v for _, _, name, v in metrics() if name == "losses/entropy"]
    assert entropies == pytest.approx([math.log(4 * 2)] * 2, abs=0.01)


# ------------------------------------------------------------------------------------------------
# Masks


def test_x4_invalid_choices_have_no_probability_no_entropy_and_no_gradient():
    agent = choosing(5)
    nn.init.zeros_(agent.actor[-1].weight)
    nn.init.zeros_(agent.actor[-1].bias)
    policy, _ = agent(torch.as_tensor(observed([1, 0, 1, 0, 1])))
    probabilities = policy.base_dist.probs[0, 0]
    assert probabilities[[1, 3]].max() < 1e-30
    assert probabilities[[0, 2, 4]].tolist() == pytest.approx([1 / 3] * 3)
    assert policy.entropy().item() == pytest.approx(math.log(3), abs=1e-6)
    (policy.log_prob(torch.tensor([[2]])) + 0.3 * policy.entropy()).sum().backward()
    gradient = agent.actor[-1].bias.grad
    assert (gradient[[1, 3]] == 0).all()
    assert (gradient[[0, 2, 4]] != 0).all()


def test_x4_what_acts_in_numpy_is_what_forward_says(capsys):
    """Or the network itself would act, with a notice."""
    ppo_discrete.notice.cache_clear()
    choosing(2, 3).rollout_policy(np.random.default_rng(0))
    assert capsys.readouterr().err == ""


def test_x4_a_single_valid_choice_is_certain():
    policy, _ = choosing(5)(torch.as_tensor(observed([0, 0, 0, 1, 0])))
    assert policy.log_prob(torch.tensor([[3]])).item() == 0
    assert policy.entropy().item() == 0


def test_x4_a_thousand_samples_are_valid():
    """Even where the network would rather do something else."""
    agent = choosing(5)
    nn.init.constant_(agent.actor[-1].bias[1], 50.0)
    act = agent.rollout_policy(np.random.default_rng(0))
    assert set(act(observed([0, 0, 1, 0, 1], 1000)).ravel()) == {2, 4}
    assert set(act(observed([1, 1, 1, 1, 1], 1000)).ravel()) == {1}


def test_x4_the_networks_do_not_see_the_mask():
    agent = choosing(3)
    (one, values), (other, other_values) = (
        agent(torch.as_tensor(observed(mask, 4))) for mask in ([1, 1, 0], [1, 1, 1])
    )
    torch.testing.assert_close(values, other_values)
    ratios = [(p.base_dist.probs[:, 0, 0] / p.base_dist.probs[:, 0, 1]) for p in (one, other)]
    torch.testing.assert_close(*ratios)


MASKS = [np.array(x, np.int8) for x in ([1, 0, 1, 1, 0], [0, 1, 0, 0, 1], [1, 1, 0, 1, 0])]
TUPLES = [(mask[:2], mask[2:]) for mask in MASKS]
PADDED = np.array([[1, 0, 0, 1, 1, 0], [0, 1, 0, 0, 0, 1], [1, 1, 0, 0, 1, 0]])


@pytest.mark.parametrize("by_method", [False, True])
@pytest.mark.parametrize("masks", [MASKS, TUPLES, [mask > 0 for mask in MASKS]])
def test_x4_mask_of_each_observation_from_info_or_method(monkeypatch, masks, by_method):
    """Through the whole training: observation i comes with mask i, after a reset as well."""
    losses = spy(monkeypatch, ppo_discrete, "ppo_loss")
    env_id = made(masks=masks, by_method=by_method)  # asserts that each action is valid
    conftest.train(ppo_discrete, env_id=env_id, num_envs=1, total_timesteps=48, learning_rate=0.1)
    obs = torch.cat([args[1][0] for args, _ in losses]).numpy()
    assert len(np.unique(obs[:, 0])) == 48
    np.testing.assert_array_equal(obs[:, 2:] == 0, PADDED[obs[:, 0].astype(int) % 3])
    assert set(np.unique(obs[:, 2:])) == {0, -1e8}


def test_x4_info_goes_before_the_method():
    env = Choices(masks=MASKS)
    env.action_masks = lambda: np.ones(5)
    obs, _ = chosen(env).reset(seed=0)
    np.testing.assert_array_equal(obs[2:] == 0, PADDED[0])


def test_x4_without_masks_every_choice_that_exists_is_valid():
    env = chosen(Choices())
    assert env.observation_space == gym.spaces.Box(-np.inf, np.inf, (8,), np.float32)
    obs, _ = env.reset(seed=0)
    assert obs.tolist() == [0, 0, *np.where(ALL, 0, -1e8)]
    assert obs.dtype == np.float32


@pytest.mark.parametrize("masks", [MASKS, None])
def test_x4_the_update_replays_the_masks_of_the_rollout(monkeypatch, masks):
    """The ratio of the first minibatch is 1; with the masks of other steps it is not."""
    ratios, original = [], ppo_discrete.ppo_loss

    def ppo_loss(agent, minibatch, *coefficients):
        obs, actions, logprobs, *_ = minibatch
        for these in (obs, torch.cat([obs[:, :2], obs[:, 2:].roll(1, dims=0)], dim=1)):
            with torch.no_grad():
                ratios.append((agent(these)[0].log_prob(actions) - logprobs).exp())
        return original(agent, minibatch, *coefficients)

    monkeypatch.setattr(ppo_discrete, "ppo_loss", ppo_loss)
    conftest.train(ppo_discrete, env_id=made(masks=masks), num_minibatches=1, total_timesteps=32)
    assert (ratios[0] - 1).abs().max() < 1e-6
    assert ((ratios[1] - 1).abs().max() > 0.1) == (masks is not None)


NOTHING, ALL_FIVE = np.array([1, 1, 0, 0, 0]), np.ones(5)
WRONG = [
    ([np.ones(4)], 0, r"shape \(4,\), not \(5,\)"),
    ([np.ones((2, 3))], 0, r"shape \(2, 3\), not \(5,\)"),
    ([1], 0, r"shape \(\), not \(5,\)"),
    ([(np.ones(2), np.ones(4))], 0, r"shape \(6,\), not \(5,\)"),
    ([NOTHING], 0, r"allows nothing, sums of its components \[2 0\]"),
    ([np.zeros(5)], 0, r"allows nothing, sums of its components \[0 0\]"),
    ([ALL_FIVE, ALL_FIVE, NOTHING], 2, r"allows nothing, sums of its components \[2 0\]"),
    ([None, ALL_FIVE, None, np.ones(3)], 3, r"shape \(3,\), not \(5,\)"),
]


@pytest.mark.parametrize("by_method", [False, True])
@pytest.mark.parametrize(("masks", "step", "message"), WRONG)
def test_x4_a_wrong_mask_ends_the_run_when_it_comes(masks, step, message, by_method):
    """Whether it comes with the first observation or later, now and then or always."""
    env = chosen(Choices(masks=masks, by_method=by_method, length=9, strict=False))
    place = f"^Choices-v0, environment 0, step {step}: "
    with pytest.raises(gym.error.Error, match=f"{place}a mask .*{message}"):
        env.reset(seed=0)
        for _ in range(5):
            env.step(np.array([0, 0]))
    assert env.env.steps == step


@pytest.mark.parametrize("by_method", [False, True])
def test_x4_where_an_episode_ends_nothing_need_be_valid(by_method):
    """As on a board that is full: nobody acts on the last observation."""
    masks = [ALL_FIVE, ALL_FIVE, np.zeros(5)]  # every third is that of an end
    env_id = made(masks=masks, by_method=by_method, length=2)
    conftest.train(ppo_discrete, env_id=env_id, num_envs=1, total_timesteps=48)
    assert [name for *_, name, _ in metrics()].count("charts/episodic_return") == 24


def test_x4_a_method_that_raises_is_a_fault_of_the_environment(capsys):
    env = Choices()
    env.action_masks = lambda: {}["mask"]
    message = r"^Choices-v0, environment 0, step 0: KeyError: 'mask'$"
    with pytest.raises(gym.error.Error, match=message):
        chosen(env).reset(seed=0)
    assert "Traceback" in capsys.readouterr().err


def test_x4_switches_have_two_choices_each_in_a_mask():
    env = Choices(masks=[np.array([1, 0, 0, 1, 1, 1])])
    env.action_space = gym.spaces.MultiBinary(3)
    obs, _ = chosen(env).reset(seed=0)
    assert obs[2:].tolist() == np.where([1, 0, 0, 1, 1, 1], 0, np.float32(-1e8)).tolist()


def test_x4_learns_among_masks_that_change():
    """Two syllables out of 12 each, of which two or three are valid. At random: 0.13."""
    loop = {"num_envs": 4, "num_steps": 64, "num_minibatches": 4, "update_epochs": 4}
    conftest.train(
        ppo_discrete, env_id="MaskedGuess-v0", total_timesteps=8192, learning_rate=2.5e-3, **loop
    )
    returns = [v for _, _, name, v in metrics() if name == "charts/episodic_return"]
    assert np.mean(returns[:256]) < 0.4
    assert np.mean(returns[-256:]) > 0.9
