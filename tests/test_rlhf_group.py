"""[X7] Critic-free advantages of a group, by numbers, and what a run does with them."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

import ppo_rlhf as rlhf
from conftest import spy
from test_rlhf import (
    P,
    R,
    gradient,
    logged,
    new_agent,
    random_batch,
    random_tokens,
    same,
    settings,
    weights,
)
from test_rlhf import before_each as before


def train(**changes):
    return rlhf.train(settings(**{"group_size": 4, "rm_coef": 0.0} | changes))


def advantages_of(outcomes, group_size, norm_adv=True, scores=None):
    outcomes = torch.tensor(outcomes)
    scores = outcomes if scores is None else torch.tensor(scores)
    advantages, dead = rlhf.group_advantages(outcomes, scores, group_size, norm_adv)
    return advantages.tolist(), dead.item()


# ------------------------------------------------------------------------------------------------
# Advantages


def test_x7_advantages_by_hand():
    """Groups 1, 2, 3, 6 and 0, 0, 0, 1: means 3 and 1/4, variances 14/4 and 3/16."""
    advantages, dead = advantages_of([1.0, 2.0, 3.0, 6.0, 0.0, 0.0, 0.0, 1.0], 4)
    first, second = [x / 3.5**0.5 for x in (-2, -1, 0, 3)], [-(3**-0.5)] * 3 + [3**0.5]
    assert advantages == pytest.approx([*first, *second], rel=1e-6)
    assert dead == 0


def test_x7_advantages_without_the_deviation():
    advantages, _ = advantages_of([1.0, 2.0, 3.0, 6.0, 0.0, 0.0, 0.0, 1.0], 4, norm_adv=False)
    assert advantages == [-2, -1, 0, 3, -0.25, -0.25, -0.25, 0.75]


@pytest.mark.parametrize("norm_adv", [True, False])
@pytest.mark.parametrize("group_size", [2, 3, 7])
def test_x7_equal_scores_say_nothing(group_size, norm_adv):
    """Exactly 0, although the mean of equal numbers need not be that number once it is rounded."""
    values = [0.1, 1e6 + 0.3, -7.7]
    outcomes = [x for x in values for _ in range(group_size)]
    advantages, dead = advantages_of(outcomes, group_size, norm_adv)
    assert advantages == [0.0] * len(outcomes)
    assert dead == 1


def test_x7_equal_scores_say_nothing_whatever_the_kl():
    """Else a difference of 1e-3 in the KL would count as much as one in the score."""
    scores = [1.0, 1.0, 0.0, 1.0]
    advantages, dead = advantages_of([1.0, 0.999, -0.1, 0.9], 2, scores=scores)
    assert advantages == pytest.approx([0, 0, -1, 1], rel=1e-6)
    assert advantages[:2] == [0, 0]
    assert dead == 0.5


def test_x7_nearly_equal_scores_are_not_blown_up():
    """1e-8 beside the deviation: two scores that differ by 1e-8 are worth a third, not one."""
    outcomes = torch.tensor([0.0, 1e-8], dtype=torch.float64)
    advantages, _ = rlhf.group_advantages(outcomes, outcomes, 2, True)
    assert advantages.tolist() == pytest.approx([-1 / 3, 1 / 3])


def test_x7_groups_are_rows_side_by_side():
    rng = np.random.default_rng(0)
    outcomes = rng.normal(size=(5, 6)).astype(np.float32)
    expected = outcomes - outcomes.mean(1, keepdims=True)
    expected /= outcomes.std(1, keepdims=True) + 1e-8
    advantages, _ = advantages_of(outcomes.ravel().tolist(), 6)
    np.testing.assert_allclose(advantages, expected.ravel(), atol=1e-6)


# ------------------------------------------------------------------------------------------------
# The loss


def numpy_loss(new, old, reference, advantages, lengths, by_response, eps, eps_high, kl_coef):
    """The objective of [GRPO] equation 3, negated, and its derivative by new; all [M, R].

    d min(r A, clip(r) A) / d log pi = r A, or 0 where clipping decides; k3 of equation 4 is
    exp(d) - 1 - d with d = log pi_ref - log pi, its derivative by log pi 1 - exp(d).
    """
    mask = np.arange(new.shape[1]) < lengths[:, None]
    weights = mask / (lengths[:, None] * len(lengths) if by_response else lengths.sum())
    ratio, d = np.exp(new - old), reference - new
    clipped = np.clip(ratio, 1 - eps, 1 + eps_high)
    taken = np.minimum(ratio * advantages, clipped * advantages)
    slope = np.where(ratio * advantages <= clipped * advantages, ratio * advantages, 0.0)
    loss = (weights * (-taken + kl_coef * (np.exp(d) - 1 - d))).sum()
    return loss, weights * (-slope + kl_coef * (1 - np.exp(d)))


@pytest.mark.parametrize("kl_coef", [0.0, 0.4])
@pytest.mark.parametrize("by_response", [True, False])
def test_x7_loss_is_that_of_numpy(by_response, kl_coef):
    rng = np.random.default_rng(1)
    M = 12
    lengths = np.array([1, 8, 3, 5, 2, 8, 7, 1, 4, 6, 8, 2])
    old, noise, other, advantages = rng.normal(size=(4, M, R))
    new, reference = old + 0.3 * noise, old + 0.5 * other
    mask = torch.arange(R) < torch.as_tensor(lengths)[:, None]
    log_prob = torch.tensor(new, requires_grad=True)

    class Distribution:
        def log_prob(self, actions):
            return log_prob

        def entropy(self):
            return torch.zeros(M, R)

    def agent(tokens):
        return Distribution(), torch.zeros(M, R)

    tensors = [torch.as_tensor(x) for x in (old, 0 * old, advantages, 0 * old, reference)]
    sizes = (int(lengths.sum()), M if by_response else 0)
    minibatch = [torch.zeros(M, P + R, dtype=torch.long), *tensors, mask]
    loss, stats = rlhf.ppo_loss(agent, minibatch, sizes, 0.2, 0.28, 0.1, True, kl_coef)
    loss.backward()
    arrays = (new, old, reference, advantages, lengths)
    expected, slope = numpy_loss(*arrays, by_response, 0.2, 0.28, kl_coef)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(log_prob.grad, slope, atol=1e-15)
    assert stats["loss/value"] == 0
    one_mean, _ = numpy_loss(*arrays, by_response, 0.2, 0.28, 0.0)
    assert stats["loss/policy"].item() == pytest.approx(one_mean, rel=1e-12)  # without the KL


def test_x7_the_kl_in_the_loss_is_not_computed_where_it_does_not_count():
    """For a reference a token is e^1000 times as likely: 0 times infinity would be no number."""
    agent = new_agent(group_size=2, rm_coef=0.0)
    batch = random_batch_of(agent, random_tokens([4, 4], [1, 3]))
    expected, _ = gradient(agent, batch)
    batch[5] = batch[5] + 1000.0
    gradients, _ = gradient(agent, batch)
    assert same(gradients, expected)


def test_x7_mean_of_tokens_or_of_responses():
    """Advantages 1 for one token, -1 for three: -1/2 in the mean of tokens, 0 of responses."""
    agent = new_agent(group_size=2, rm_coef=0.0)
    tokens = random_tokens([4, 4], [1, 3])
    batch = random_batch_of(agent, tokens)
    batch[3] = torch.tensor([[1.0], [-1.0]]) * batch[-1]
    batch[1] = rlhf.response_logprobs(agent.policy, tokens, P).detach()  # ratios 1
    for loss_mean, expected in (("token", 0.5), ("response", 0.0)):
        _, stats = gradient(agent, batch, loss_mean=loss_mean)
        assert stats["loss/policy"].item() == pytest.approx(expected, abs=1e-6)


def random_batch_of(agent, tokens):
    """As random_batch, which asks the value model."""
    other = new_agent()
    other.policy = agent.policy
    return random_batch(other, tokens)


@pytest.mark.parametrize("loss_mean", ["token", "response"])
@pytest.mark.parametrize("micro_size", [1, 2, 4])
def test_x7_micro_batches_have_the_gradient_of_the_whole(micro_size, loss_mean):
    agent = new_agent(group_size=2, rm_coef=0.0)
    tokens = random_tokens([9, 3, 5, 7, 2, 4, 6], [1, 8, 4, 2, 8, 5, 3])
    batch = random_batch_of(agent, tokens)
    options = {"loss_mean": loss_mean, "kl_coef": 0.3, "rows": torch.tensor([6, 0, 2, 1, 5])}
    whole, stats = gradient(agent, batch, **options)
    parts, stats_too = gradient(agent, batch, micro_size, **options)
    assert whole.keys() == parts.keys() and all("policy" in name for name in whole)
    for name, grad in whole.items():
        assert torch.allclose(grad, parts[name], rtol=1e-6, atol=1e-9)
    assert {k: x.item() for k, x in stats.items()} == pytest.approx(
        {k: x.item() for k, x in stats_too.items()}, rel=1e-6
    )


# ------------------------------------------------------------------------------------------------
# A run


def test_x7_a_run_samples_groups_and_has_no_critic(monkeypatch):
    rollouts = spy(monkeypatch, rlhf, "generate")
    updates = spy(monkeypatch, rlhf, "ppo_gradient")
    agent = train(loss_mean="response", kl_in="loss", kl_coef=0.3)
    assert agent.value_model is None
    assert not any("value_model" in name for name, _ in agent.named_parameters())
    assert len(rollouts) == 3
    for (_, prompts, *_), (tokens, _) in rollouts:
        for group in prompts.split(4):
            assert len({*map(tuple, group.tolist())}) == 1
        assert len({*map(tuple, prompts.tolist())}) == 3
        assert len({*map(tuple, tokens.tolist())}) > 6  # responses of a group differ
    for (_, batch, *rest), stats in updates:
        tokens, _, values, advantages, returns, _, mask, _ = batch
        assert rest[5] == "response" and rest[-1] == 0.3
        assert (values == 0).all() and (returns == 0).all()
        scores = torch.as_tensor(rlhf.gold_rewards(rlhf.TASKS["sort"], tokens)["score"])
        ended = (tokens[:, P:] == rlhf.TASKS["sort"].eos).any(1)
        outcomes = scores.where(ended, -1.0).float()
        expected, _ = rlhf.group_advantages(outcomes, outcomes, 4, True)
        assert torch.allclose(advantages, expected[:, None] * mask, atol=1e-5)
        assert (advantages[~mask] == 0).all()
        assert not any(name.startswith("val/grad") for name in stats)
    assert logged("objective/non_score_reward") == [0, 0, 0]
    assert logged("objective/kl_coef") == pytest.approx([0.3] * 3)
    assert "ppo/val/grad_norm" not in Path(*Path("runs").glob("*/metrics.csv")).read_text()


def test_x7_the_kl_in_the_reward_is_in_the_outcomes(monkeypatch):
    """Summed over a response, the score beside it; whitening [H52] has nothing to do."""
    calls = spy(monkeypatch, rlhf, "group_advantages")
    whitened = spy(monkeypatch, rlhf, "whiten")
    rewards = spy(monkeypatch, rlhf, "token_rewards")
    train(kl_coef=0.5, norm_adv=False)
    assert whitened == [] and len(calls) == 3
    for ((outcomes, scores, *rest), _), (args, per_token) in zip(calls, rewards, strict=True):
        _, _, kl, _, kl_coef, _ = args
        assert kl_coef == 0.5 and rest == [4, False]
        assert torch.allclose(outcomes, per_token.sum(1))
        assert torch.allclose(outcomes, scores - 0.5 * kl.sum(1), atol=1e-5)
    assert (kl != 0).any()


def test_x7_the_policy_moves_from_the_first_iteration(monkeypatch):
    """--critic-warmup is of no concern where there is no critic."""
    seen = before(monkeypatch, "ppo_gradient", lambda agent, *_: weights(agent.policy))
    train(critic_warmup=5, total_episodes=12)
    assert len(seen) == 4
    assert not any(same(a, b) for a, b in pairwise(seen))


def test_x7_one_rate_for_one_network(monkeypatch):
    optimizers = []

    class AdamW(torch.optim.AdamW):
        def __init__(self, groups, **options):
            super().__init__(groups, **options)
            optimizers.append(self)

    monkeypatch.setattr(torch.optim, "AdamW", AdamW)
    train(learning_rate=0.01, value_learning_rate=0.5, anneal_lr=False)
    (optimizer,) = optimizers
    assert [group["lr"] for group in optimizer.param_groups] == [0.01]


def test_x7_groups_that_say_nothing_are_counted(monkeypatch, capsys):
    """One of three groups has equal scores, and in the last iteration two."""
    other = iter([[0, 1, 1, 1], [0, 0, 0, 1], [5, 5, 0, 5]] * 2)
    lists = [[*next(other), 2, 2, 2, 2, *next(other)] for _ in range(2)]
    lists.append([1.0] * 8 + [0, 1, 2, 3])
    batches = iter(lists)

    def score_function(args, task, agent, run):
        return lambda rows, tokens: torch.tensor(next(batches), dtype=torch.float32)

    monkeypatch.setattr(rlhf, "score_function", score_function)
    monkeypatch.setattr(rlhf.Task, "ended", lambda task, x: torch.ones(len(x), dtype=torch.bool))
    train()
    assert logged("objective/dead_groups") == pytest.approx([1 / 3, 1 / 3, 2 / 3])
    assert "most groups have equal scores" in capsys.readouterr().err


def test_x7_one_response_to_a_prompt_is_no_group(monkeypatch):
    """PPO as it is: values, GAE, whitening; nothing is said of groups."""
    names = ("group_advantages", "response_advantages", "whiten")
    calls = [spy(monkeypatch, rlhf, name) for name in names]
    agent = rlhf.train(settings(rm_coef=0.0, group_size=1))
    assert [len(x) for x in calls] == [0, 3, 3]
    for (_, raw), ((given, _), _) in zip(*calls[1:], strict=True):
        assert torch.equal(raw, given)
    (_, values, *_), _ = calls[1][-1]
    assert (values != 0).any()
    assert agent.value_model is not None
    assert logged("objective/dead_groups") == []
    assert len(logged("ppo/val/vpred")) == 3


def test_x7_penalty_of_an_open_end_counts_in_a_group(monkeypatch):
    """All scores are 1; who has no EOS has -1, whatever it says: the group is not dead."""
    calls = spy(monkeypatch, rlhf, "group_advantages")

    def score_function(args, task, agent, run):
        return lambda rows, tokens: torch.ones(len(tokens))

    ended = torch.tensor([True, True, False, True] * 3)
    original = rlhf.Task.ended
    monkeypatch.setattr(rlhf, "score_function", score_function)
    monkeypatch.setattr(
        rlhf.Task, "ended", lambda task, x: ended if x.shape == (12, R) else original(task, x)
    )
    train(kl_coef=0.0, total_episodes=12)
    (((outcomes, scores, *_), (advantages, dead)),) = calls
    assert scores.tolist() == outcomes.tolist() == [1, 1, -1, 1] * 3
    assert dead == 0
    assert advantages.tolist() == pytest.approx([3**-0.5, 3**-0.5, -(3**0.5), 3**-0.5] * 3)


def test_x7_resumed_is_as_not_interrupted(monkeypatch, capsys):
    """A checkpoint has no value model, and goes on bit for bit, but not as PPO."""
    options = {"checkpoint_every": 1, "loss_mean": "response", "kl_in": "loss"}
    whole = train(**options)
    (folder,) = Path("runs").iterdir()
    expected = json.loads((folder / "config.json").read_text())
    assert expected["group_size"] == 4
    rlhf_stop = rlhf.Run.save_checkpoint

    def save_once(run):
        rlhf_stop(run)
        if run.step == 2 and run.stage == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(rlhf.Run, "save_checkpoint", save_once)
    with pytest.raises(KeyboardInterrupt):
        train(**options)
    monkeypatch.setattr(rlhf.Run, "save_checkpoint", rlhf_stop)
    (part,) = [path for path in Path("runs").iterdir() if path != folder]
    data = torch.load(part / "checkpoint.pt", weights_only=True)
    assert {*data["models"]} == {"policy"}
    args = rlhf.parse_args(["--resume", str(part)])
    assert args.group_size == 4 and args.loss_mean == "response"
    with pytest.raises(SystemExit):
        rlhf.check_args(rlhf.parse_args(["--resume", str(part), "--group-size", "1"]))
    assert "--group-size is 1, it was 4; that is another run" in capsys.readouterr().err
    assert same(weights(rlhf.train(args).policy), weights(whole.policy))


def test_x7_after_a_run_with_a_critic():
    """--load brings what it needs of a run of PPO, and the other way round."""
    rlhf.train(settings(stages="sft,ppo", rm_coef=0.0))
    (first,) = Path("runs").iterdir()
    options = ["--stages", "ppo", "--load", str(first)]
    args = rlhf.parse_args([*options, "--group-size", "6"])
    rlhf.check_args(args)
    agent = rlhf.train(args)
    assert agent.value_model is None
    (second,) = [path for path in Path("runs").iterdir() if path != first]
    args = rlhf.parse_args(["--stages", "ppo", "--load", str(second), "--group-size", "1"])
    rlhf.check_args(args)
    assert rlhf.train(args).value_model is not None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--group-size 5", "--batch-size 128 is no multiple of --group-size 5"),
        ("--group-size 0", "--group-size is 0, it must be at least 1"),
        ("--group-size 256", "--batch-size 128 is no multiple of --group-size 256"),
        ("--group-size 2 --value-model x --model y", "--group-size has no --value-model"),
        ("--group-size 2 --whiten-rewards", "one reward a response, no --whiten-rewards"),
    ],
)
def test_x7_what_cannot_work_is_refused(capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        rlhf.check_args(rlhf.parse_args(flags.split()))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_x7_plan_has_no_value_model(capsys):
    shown = []
    for group_size in (1, 4):
        rlhf.plan(settings(group_size=group_size, d_model=256))
        shown.append(capsys.readouterr().out)
    assert "weights, value model" in shown[0] and "value model" not in shown[1]
    most = [float(text.rpartition("at most at a time")[2].split()[0]) for text in shown]
    assert most[1] < 0.9 * most[0]


def test_x7_learns_to_end():
    """Responses that end are worth 1: random models learn it, all that PPO does to it left out."""
    train(total_episodes=12 * 60, kl_coef=0.0, group_size=12, missing_eos_penalty=-1.0)
    missing = logged("objective/missing_eos")
    assert np.mean(missing[-10:]) < 0.5 * np.mean(missing[:5])


@pytest.mark.parametrize("group_size", [1, 4])
def test_x7_the_kl_in_the_loss_is_to_the_reference(monkeypatch, group_size):
    """With the beta of the iteration, and none of it in the rewards, with and without groups."""
    updates = spy(monkeypatch, rlhf, "ppo_gradient")
    rewards = spy(monkeypatch, rlhf, "token_rewards")
    options = {"group_size": group_size, "kl_in": "loss", "kl_coef": 0.3}
    agent = train(**options, kl_target=0.05, kl_horizon=100, num_minibatches=1, update_epochs=1)
    betas = logged("objective/kl_coef")
    assert len({*betas}) == 3
    assert [args[-1] for args, _ in updates] == pytest.approx(betas)
    assert [args[4] for args, _ in rewards] == [0, 0, 0]
    for (_, batch, *_), _ in updates:
        expected = rlhf.response_logprobs(agent.reference, batch[0], P)
        assert torch.allclose(batch[5], expected, atol=1e-5)
    assert not torch.allclose(batch[1], expected, atol=1e-3)


def test_x7_demonstrations_from_the_first_iteration(monkeypatch):
    updates = spy(monkeypatch, rlhf, "ppo_gradient")
    train(critic_warmup=5, ptx_coef=0.1, total_episodes=12)
    assert all(args[3] is not None for args, _ in updates)
