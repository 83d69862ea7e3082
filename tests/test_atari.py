"""The Atari details A1 to A9, by their numbers and frame by frame against Stable-Baselines3."""

import collections
import importlib.util
import itertools
import os
import sys
import types

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.vec_env import VecFrameStack
from torch import nn

import conftest
import ppo_atari
import ppo_atari_lstm

NOOP, FIRE, RIGHT = 0, 1, 2
ENDS = {"terminated": (True, False), "truncated": (False, True)}
SLOW = [pytest.param(x, marks=pytest.mark.slow) for x in ("BeamRider", "MsPacman", "Qbert")]
GAMES = ["Breakout", "Pong", "Seaquest", "SpaceInvaders", *SLOW]

Frame = collections.namedtuple("Frame", "shade reward lives end", defaults=(0, 0.0, None, None))


class FakeGame(gym.Env):
    """An Atari game that shows the frames in `upcoming` and then repeats the last one.

    A frame fills the screen with one grey value, one RGB colour or a whole picture, keeps the
    lives it does not give, and ends the game by one of ENDS. The game starts with 3 lives, the
    n-th one with a screen of shade 10n. `log` has the actions and "reset".
    """

    observation_space = gym.spaces.Box(0, 255, (210, 160, 3), np.uint8)
    action_space = gym.spaces.Discrete(3)

    def __init__(self, meanings=("NOOP", "FIRE", "RIGHT")):
        self.meanings, self.games = meanings, 0
        self.upcoming, self.log = collections.deque(), []
        self.ale = self  # the emulator and Gymnasium's environment in one
        self.frame = Frame(end="terminated")

    def get_action_meanings(self):
        return list(self.meanings)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.games += 1
        self.log.append("reset")
        self.frame = Frame(10 * self.games % 256, lives=3)
        return None, {"seed": seed}

    def act(self, action):
        assert not self.frame.end, "a game that is over goes on"
        self.log.append(self.meanings.index(action.name))
        frame = self.upcoming.popleft() if self.upcoming else self.frame._replace(reward=0.0)
        lives = self.frame.lives if frame.lives is None else frame.lives
        self.frame = frame._replace(lives=lives)
        return frame.reward

    def lives(self):
        return self.frame.lives

    def game_over(self, with_truncation):
        return self.frame.end in list(ENDS)[: 1 + with_truncation]

    def game_truncated(self):
        return self.frame.end == "truncated"

    def getScreenRGB(self, buffer):  # noqa: N802
        buffer[:] = self.frame.shade


def fake_game(*frames, start=True, meanings=("NOOP", "LEFT", "RIGHT"), seed=None):
    """A preprocessed game, without FIRE, its log empty after the first reset, and `frames` next."""
    game = FakeGame(meanings)
    env = ppo_atari.AtariPreprocessing(game)
    if start:
        env.reset(seed=seed)
        game.log.clear()
    game.upcoming.extend(frames)
    return env, game


def fire_game(*frames):
    return fake_game(*frames, meanings=("NOOP", "FIRE", "RIGHT"))


def first_draw(seed):
    """The number of no-ops a game seeded with `seed` draws first."""
    return int(gym.utils.seeding.np_random(seed)[0].integers(1, 31))


def shades(obs):
    """The four grey values of a stack of evenly filled frames."""
    assert obs.shape == (84, 84, 4)
    assert (obs == obs[0, 0]).all()
    return obs[0, 0].tolist()


def agent(*precision, actions=4):
    envs = types.SimpleNamespace(single_action_space=gym.spaces.Discrete(actions))
    return ppo_atari.Agent(envs, *precision)


def pictures(count):
    """Coarse random patterns uint8 [count, 84, 84, 4], as different from each other as games."""
    coarse = torch.randint(0, 256, (count, 6, 6, 4), dtype=torch.uint8)
    return coarse.repeat_interleave(14, 1).repeat_interleave(14, 2)


def args(env_id, **changes):
    return ppo_atari.Args(env_id=env_id, **{"vectorization": "sync", "num_envs": 2} | changes)


def register(env_id, **game):
    gym.register(env_id, "ale_py.env:AtariEnv", kwargs={"game": "breakout"} | game)


def runs(log):
    """[0, 0, 1] -> [(0, 2), (1, 1)]"""
    return [(action, len(list(group))) for action, group in itertools.groupby(log)]


# ------------------------------------------------------------------------------------------------
# A1, no-ops


def test_a1_noops_are_1_to_30_raw_frames_uniformly():
    env, game = fake_game(start=False)
    env.reset(seed=0)
    for _ in range(2000):
        game.upcoming.append(Frame(end="terminated"))
        env.step(RIGHT)
        env.reset()
    blocks = runs(game.log)
    assert [action for action, _ in blocks] == ["reset", NOOP, RIGHT] * 2000 + ["reset", NOOP]
    counts = np.array([count for action, count in blocks if action == NOOP])
    assert set(counts) == set(range(1, 31))
    assert abs(counts.mean() - 15.5) < 0.6  # three standard errors
    assert np.bincount(counts)[1:].min() > 35  # of 67 on average


@pytest.mark.parametrize("seed", range(10))
def test_a1_noops_are_drawn_from_the_environments_generator(seed):
    env, game = fake_game(start=False)
    env.reset(seed=seed)
    assert game.log == ["reset"] + [NOOP] * first_draw(seed)


@pytest.mark.parametrize("end", ENDS)
def test_a1_game_that_ends_in_the_noops_is_reset_again(end):
    env, game = fake_game(Frame(end=end), start=False)
    env.reset(seed=0)
    assert game.log == ["reset", NOOP, "reset"] + [NOOP] * (first_draw(0) - 1)


@pytest.mark.parametrize("end", ENDS)
def test_a1_game_that_ends_in_the_last_noop_starts_with_the_next_games_screen(end):
    last = first_draw(0) - 1
    env, game = fake_game(*[Frame(90)] * last, Frame(99, end=end), start=False)
    obs, info = env.reset(seed=0)
    assert shades(obs) == [0, 0, 0, 20]
    assert info == {}
    assert game.log == ["reset"] + [NOOP] * (last + 1) + ["reset"]


def test_a1_screen_is_that_of_the_last_noop():
    frames = map(Frame, range(200, 200 - first_draw(0), -1))
    env, _ = fake_game(*frames, start=False)
    assert shades(env.reset(seed=0)[0]) == [0, 0, 0, 201 - first_draw(0)]


# ------------------------------------------------------------------------------------------------
# A2, four frames


@pytest.mark.parametrize("action", [NOOP, FIRE, RIGHT])
def test_a2_action_is_repeated_four_times(action):
    env, game = fake_game()
    for _ in range(3):
        env.step(action)
    assert game.log == [action] * 12


@pytest.mark.parametrize(
    ("last_four", "seen"),
    [
        ((200, 10, 200, 10), 200),
        ((10, 200, 10, 200), 200),
        ((200, 10, 10, 20), 20),
        ((10, 200, 30, 20), 30),
        (((0, 0, 0), (0, 0, 0), (200, 0, 0), (0, 110, 0)), 124),  # each channel on its own
    ],
)
def test_a2_observation_is_the_maximum_of_the_last_two_screens(last_four, seen):
    env, _ = fake_game(*map(Frame, last_four))
    assert shades(env.step(RIGHT)[0])[-1] == seen


@pytest.mark.parametrize(
    ("rewards", "sign"),
    [
        ((1, 2, 3, 4), 1),
        ((3, -1, -1, 0), 1),
        ((-3, 1, 1, 0), -1),
        ((1, 1, 1, -4), -1),
        ((0, 0, 1, -1), 0),
    ],
)
def test_a2_rewards_of_the_four_frames_are_added(rewards, sign):
    env, _ = fake_game(*[Frame(reward=reward) for reward in rewards])
    assert [env.step(RIGHT)[1], env.step(RIGHT)[1]] == [sign, 0]


def test_a2_only_the_last_two_screens_are_fetched(monkeypatch):
    """Each takes the emulator as long as a fourth of a frame."""
    env, _ = fake_game(*map(Frame, range(50, 58)))
    calls = conftest.spy(monkeypatch, FakeGame, "getScreenRGB")
    assert shades(env.step(RIGHT)[0])[-1] == 53
    assert shades(env.step(RIGHT)[0])[-1] == 57
    assert len(calls) == 4


@pytest.mark.parametrize("end", ENDS)
def test_a2_skip_stops_where_the_game_ends(end):
    env, game = fake_game(Frame(90, -3.0), Frame(50, 2.0), Frame(60, 2.0, end=end), Frame(70, -9.0))
    obs, reward, terminated, truncated, _ = env.step(RIGHT)
    assert (reward, terminated, truncated) == (1, *ENDS[end])
    assert game.log == [RIGHT] * 3
    assert shades(obs)[-1] == 60


@pytest.mark.parametrize("script", [ppo_atari, ppo_atari_lstm])
def test_a2_the_game_itself_skips_no_frames(script):
    """Whatever the id asks for: v5 games skip four by themselves."""
    args = script.Args(env_id="ALE/Pong-v5", num_envs=1, vectorization="sync")
    envs = script.make_envs(args)
    envs.reset(seed=[0])
    before = envs.envs[0].unwrapped.ale.getFrameNumber()
    envs.step(np.array([0]))
    assert envs.envs[0].unwrapped.ale.getFrameNumber() - before == 4
    envs.close()


@pytest.mark.parametrize("script", [ppo_atari, ppo_atari_lstm])
def test_each_rollout_freezes_the_weights_of_its_time(script, monkeypatch):
    frozen, original = [], script.Agent.rollout_policy

    def rollout_policy(agent, rng):
        frozen.append(agent.actor.weight.detach().clone())
        return original(agent, rng)

    monkeypatch.setattr(script.Agent, "rollout_policy", rollout_policy)
    loop = {"num_envs": 2, "num_steps": 4, "num_minibatches": 1, "update_epochs": 1}
    plain = {"cuda": False, "torch_threads": 1, "vectorization": "sync", "total_timesteps": 24}
    plain |= {"precision": "fp32"}
    eager = {"compile": False} if script is ppo_atari else {}
    script.train(script.Args(**loop, **plain, **eager))
    assert len(frozen) == 3
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(frozen))


# ------------------------------------------------------------------------------------------------
# A3, a life is an episode


@pytest.mark.parametrize("frame", range(4))
def test_a3_lost_life_ends_the_episode_but_not_the_game(frame):
    env, game = fake_game(*[Frame(50, 1.0, 3)] * frame, *[Frame(60, 1.0, 2)] * (4 - frame))
    _, reward, terminated, truncated, _ = env.step(RIGHT)
    assert (reward, terminated, truncated) == (1, True, False)
    assert game.log == [RIGHT] * 4
    obs, info = env.reset(seed=7)
    assert game.log == [RIGHT] * 4 + [NOOP] * 4
    assert (game.frame.lives, shades(obs)) == (2, [0, 0, 0, 60])
    assert info == {}
    assert not env.step(RIGHT)[2]


@pytest.mark.parametrize(
    ("lives", "ends"),
    [
        ((3, 3, 2, 2, 1), (0, 0, 1, 0, 1)),
        ((3, 4, 4, 3, 3), (0, 0, 0, 1, 0)),  # a bonus life
        ((2, 0, 0, 3, 2), (1, 0, 0, 0, 1)),  # none left, but Q*bert goes on for some frames
        ((0, 0, 0, 0, 0), (0, 0, 0, 0, 0)),  # a game without lives
    ],
)
def test_a3_only_a_drop_to_at_least_one_life_ends_an_episode(lives, ends):
    env, _ = fake_game(*[Frame(lives=n) for n in lives for _ in range(4)])
    assert [env.step(RIGHT)[2] for _ in lives] == list(map(bool, ends))


def test_a3_second_reset_goes_on_with_the_game():
    env, game = fake_game()
    env.reset(seed=0)
    assert game.log == [NOOP] * 4


def test_a3_life_lost_in_the_noop_is_not_counted_again():
    env, _ = fake_game(*[Frame(lives=2)] * 4, *[Frame(lives=1)] * 4)
    assert env.step(RIGHT)[2]
    env.reset()
    assert not env.step(RIGHT)[2]


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("lives", [0, 1, 2])
def test_a3_only_a_game_that_is_over_is_reset(end, lives):
    env, game = fake_game(
        *[Frame(lives=max(1, lives))] * 4, Frame(50, lives=lives, end=end), seed=0
    )
    for _ in range(2):
        env.step(RIGHT)
    game.log.clear()
    obs, _ = env.reset(seed=0)
    assert game.log == ["reset"] + [NOOP] * first_draw(0)
    assert (game.frame.lives, shades(obs)) == (3, [0, 0, 0, 20])
    assert not env.step(RIGHT)[2]


@pytest.mark.parametrize("end", ENDS)
def test_a3_game_that_ends_in_the_noop_after_a_life_is_reset(end):
    env, game = fake_game(*[Frame(lives=2)] * 4, Frame(), Frame(end=end))
    env.step(RIGHT)
    obs, _ = env.reset(seed=0)
    assert game.log == [RIGHT] * 4 + [NOOP] * 2 + ["reset"] + [NOOP] * first_draw(0)
    assert (game.frame.lives, shades(obs)) == (3, [0, 0, 0, 20])


@pytest.mark.parametrize("end", ENDS)
def test_whole_games_are_recorded_once_with_their_raw_score(end):
    """Two games of two lives each; the no-op after the life that is lost counts, too."""
    game = FakeGame()
    envs = gym.vector.SyncVectorEnv(
        [lambda: ppo_atari.Watched(ppo_atari.AtariPreprocessing(game), 0)],
        autoreset_mode=gym.vector.AutoresetMode.SAME_STEP,
    )
    envs.reset(seed=0)
    for _ in range(2):
        start = len(game.log) - game.log[::-1].index("reset")
        game.upcoming.extend([Frame(0, 400.0), Frame(0, -0.5), Frame(), Frame(lives=2)])
        game.upcoming.extend([Frame(0, 10.0)] * 12)  # no-op, FIRE and action 2
        game.upcoming.extend([Frame(0, -200.0), Frame(0, 0.25, end=end)])
        _, reward, terminated, _, info = envs.step([RIGHT])
        assert (reward, terminated) == (1, True)
        assert "recorded" not in info["final_info"]
        length = len(game.log) - start
        _, reward, terminated, truncated, info = envs.step([RIGHT])
        assert (reward, terminated, truncated) == (-1, *ENDS[end])
        episode = info["final_info"]["recorded"]
        assert (episode["r"], episode["l"]) == (400.0 - 0.5 + 120.0 - 200.0 + 0.25, length + 2)
        assert "recorded" not in envs.step([RIGHT])[-1]


# ------------------------------------------------------------------------------------------------
# A4, FIRE


@pytest.mark.parametrize("seed", range(3))
def test_a4_fire_and_action_2_start_every_game_and_every_life(seed):
    env, game = fake_game(start=False, meanings=("NOOP", "FIRE", "RIGHT"))
    env.reset(seed=seed)
    noops = [NOOP] * first_draw(seed)
    assert game.log == ["reset", *noops] + [FIRE] * 4 + [RIGHT] * 4
    game.log.clear()
    game.upcoming.extend([Frame(lives=2)] * 4)
    env.step(NOOP)
    env.reset()
    assert game.log == [NOOP] * 4 + [NOOP] * 4 + [FIRE] * 4 + [RIGHT] * 4


@pytest.mark.parametrize("meanings", [("NOOP", "UP", "DOWN"), ("NOOP", "UPFIRE", "DOWNFIRE")])
def test_a4_no_fire_in_games_without_it(meanings):
    env, game = fake_game(start=False, meanings=meanings)
    env.reset(seed=0)
    assert set(game.log) == {"reset", NOOP}


def test_a4_observation_is_the_one_after_both_actions():
    env, _ = fire_game(*[Frame(lives=2)] * 4, *map(Frame, range(50, 62)))
    env.step(NOOP)
    assert shades(env.reset()[0]) == [0, 0, 0, 61]


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("action", [FIRE, RIGHT])
def test_a4_game_that_ends_in_the_fire_steps_gives_way_to_a_new_one(end, action):
    env, game = fire_game(*[Frame(lives=2)] * 4, *[Frame(50)] * 4 * action, Frame(60, end=end))
    env.step(NOOP)
    game.log.clear()
    obs, info = env.reset(seed=0)
    new_game = ["reset"] + [NOOP] * first_draw(0)
    if action == FIRE:
        assert game.log == [NOOP] * 4 + [FIRE, *new_game] + [RIGHT] * 4
    else:
        assert game.log == [NOOP] * 4 + [FIRE] * 4 + [RIGHT, *new_game]
    assert shades(obs) == [0, 0, 0, 20]
    assert info == {}
    assert not env.step(NOOP)[2]


def test_a4_life_lost_in_the_fire_step_starts_the_next_life():
    env, game = fire_game(*[Frame(lives=2)] * 4, *[Frame()] * 4, *[Frame(lives=1)] * 4)
    env.step(NOOP)
    game.log.clear()
    env.reset()
    assert game.log == [NOOP] * 4 + [FIRE] * 4 + [NOOP] * 4 + [RIGHT] * 4
    assert not env.step(NOOP)[2]


def test_a4_breakout_goes_on_by_itself_after_a_lost_life():
    """Without FIRE the ball never appears again and a policy that only waits loses nothing."""
    envs = ppo_atari.make_envs(args("BreakoutNoFrameskip-v4", num_envs=1))
    envs.reset(seed=[1])
    assert sum(envs.step([NOOP])[2][0] for _ in range(300)) >= 4
    envs.close()


# ------------------------------------------------------------------------------------------------
# A5, grey and small


def areas(raw, small):
    """[small, raw] share of each raw pixel in each small one."""
    left = np.arange(small)[:, None] * raw / small
    pixel = np.arange(raw)
    overlap = np.minimum(left + raw / small, pixel + 1) - np.maximum(left, pixel)
    return overlap.clip(0) * small / raw


def warped(picture):
    env, _ = fake_game(*[Frame(picture)] * 4)
    obs = env.step(RIGHT)[0]
    assert (obs.shape, obs.dtype) == ((84, 84, 4), np.uint8)
    assert env.observation_space == gym.spaces.Box(0, 255, (84, 84, 4), np.uint8)
    return obs[..., -1]


def test_a5_grey_is_the_luminance():
    assert (warped((200, 100, 50)) == 124).all()
    assert [int(warped(255 * c)[0, 0]) for c in np.eye(3, dtype=int)] == [76, 150, 29]


def test_a5_checkerboard_becomes_even_grey():
    """Averages over areas: 126 to 129. Bilinear samples would be 67 to 188, nearest 0 or 255."""
    board = 255 * (np.indices((210, 160)).sum(0) % 2)
    grey = warped(board[..., None])
    assert (grey.min(), grey.max()) == (126, 129)


def test_a5_noise_is_made_grey_first_and_averaged_then():
    noise = np.random.default_rng(0).integers(0, 256, (210, 160, 3))
    grey = np.rint(noise @ [0.299, 0.587, 0.114])
    expected = np.rint(areas(210, 84) @ grey @ areas(160, 84).T)
    assert (warped(noise) == expected).mean() > 0.99


# ------------------------------------------------------------------------------------------------
# A6, clipped rewards


@pytest.mark.parametrize(
    ("reward", "clipped"), [(-200, -1), (-0.5, -1), (0, 0), (0.3, 1), (1, 1), (400, 1)]
)
def test_a6_reward_is_its_sign(reward, clipped):
    env, _ = fake_game(Frame(reward=reward))
    assert env.step(RIGHT)[1] == clipped


def test_a6_reward_is_clipped_after_the_sum():
    env, _ = fake_game(*[Frame(reward=1)] * 4, Frame(reward=-1), Frame(reward=-1), Frame(reward=1))
    assert [env.step(RIGHT)[1] for _ in range(2)] == [1, -1]


# ------------------------------------------------------------------------------------------------
# A7, four observations


def test_a7_stack_has_the_last_four_observations_oldest_first():
    env, game = fake_game(start=False)
    stacks = [env.reset(seed=0)[0]]
    for shade in (20, 30, 40, 50):
        game.upcoming.extend([Frame(shade)] * 4)
        stacks.append(env.step(RIGHT)[0])
    expected = [(0, 0, 0, 10), (0, 0, 10, 20), (0, 10, 20, 30), (10, 20, 30, 40), (20, 30, 40, 50)]
    assert [tuple(shades(obs)) for obs in stacks] == expected


@pytest.mark.parametrize("end", [None, *ENDS])
@pytest.mark.parametrize("make", [fake_game, fire_game])
def test_a7_stack_starts_empty_in_every_episode(end, make):
    """Also after a life that is lost in the middle of the game (end None)."""
    env, _ = make(*[Frame(90)] * 16, *[Frame(91)] * 3, Frame(92, lives=2, end=end))
    for _ in range(5):
        obs = env.step(RIGHT)[0]
    assert shades(obs) == [90, 90, 90, 92]
    assert shades(env.reset()[0]) == [0, 0, 0, 20 if end else 92]


def test_a7_observations_do_not_change_later():
    env, game = fire_game()
    stacks, copies = [], []
    for step in range(1, 60):
        lives = 3 - step // 20
        game.upcoming.extend([Frame(step, lives=lives, end=step % 50 == 0 and "terminated")] * 4)
        obs, _, terminated, *_ = env.step(RIGHT)
        stacks.append(obs)
        copies.append(obs.copy())
        if terminated:
            game.upcoming.clear()
            stacks.append(env.reset()[0])
            copies.append(stacks[-1].copy())
    assert len(stacks) > 60
    assert all((stack == copy).all() for stack, copy in zip(stacks, copies, strict=True))


# ------------------------------------------------------------------------------------------------
# A8 and A9, the network


def test_a8_number_of_parameters():
    model = agent(actions=4)
    assert sum(p.numel() for p in model.torso.parameters()) == 1_684_128
    assert sum(p.numel() for p in model.parameters()) == 1_686_693


def test_a8_layers_and_what_goes_into_them():
    """The shape each layer sees, and nothing negative in it: there is a ReLU after each."""
    torch.manual_seed(0)
    model, inputs = agent(), []
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
    model(pictures(3))
    shapes = [(4, 84, 84), (32, 20, 20), (64, 9, 9), (3136,), (512,), (512,)]
    assert [tuple(x.shape[1:]) for x in inputs] == shapes
    assert all((x >= 0).all() and (x > 0).any() for x in inputs)
    assert all((x == 0).any() for x in inputs[1:])
    convolutions = [(m.kernel_size, m.stride, m.padding) for m in layers[:3]]
    assert convolutions == [((k, k), (s, s), (0, 0)) for k, s in ((8, 4), (4, 2), (3, 1))]


def test_a8_weights_are_orthogonal_and_biases_zero():
    model = agent()
    layers = [*(m for m in model.torso if hasattr(m, "weight")), model.actor, model.critic]
    for layer, gain in zip(layers, [2**0.5] * 4 + [0.01, 1.0], strict=True):
        rows = layer.weight.flatten(1)
        gram = (rows @ rows.T).detach()
        assert torch.allclose(gram, gain**2 * torch.eye(len(rows)), rtol=1e-4, atol=1e-4 * gain**2)
        assert not layer.bias.any()


@pytest.mark.parametrize("head", ["policy", "value"])
def test_a8_policy_and_value_function_share_all_convolutions(head):
    torch.manual_seed(0)
    model = agent()
    policy, values = model(pictures(3))
    assert (policy.logits.shape, values.shape) == ((3, 4), (3,))
    loss = policy.log_prob(torch.zeros(3)).sum() if head == "policy" else values.sum()
    loss.backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    heads = {"policy": {"actor.weight", "actor.bias"}, "value": {"critic.weight", "critic.bias"}}
    torso = {name for name, _ in model.named_parameters() if name.startswith("torso")}
    assert len(torso) == 8
    assert reached == torso | heads[head]


@pytest.mark.parametrize("method", ["forward", "rollout_policy"])
def test_a9_network_sees_0_to_1(method):
    model, seen = agent(), []
    model.torso[0].register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    act = model if method == "forward" else model.rollout_policy(np.random.default_rng(0))
    for level in (255, 51, 0):
        act(torch.full((1, 84, 84, 4), level, dtype=torch.uint8))
    assert [x.dtype for x in seen] == [torch.float32] * 3
    assert [x.unique().tolist() for x in seen] == [[1.0], [pytest.approx(0.2)], [0.0]]


def test_a9_features_reach_the_heads_as_they_are():
    model, seen = agent(), []
    model.torso.register_forward_hook(lambda _, x, hidden: seen.append(hidden))
    model.actor.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    model(pictures(3))
    assert torch.equal(*seen)


def test_network_sees_a_frame_as_a_channel():
    """Upright, the oldest first."""
    model, obs, seen = agent(), pictures(3), []
    model.torso[0].register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    model(obs)
    expected = np.moveaxis(obs.numpy(), -1, 1).astype(np.float32) / 255
    np.testing.assert_allclose(seen[0].numpy(), expected, rtol=1e-6)


def twins():
    """Two agents with the same weights, one of each precision."""
    torch.manual_seed(0)
    models = agent("fp32"), agent("bf16")
    conftest.far_from_initial(models[0])
    models[1].load_state_dict(models[0].state_dict())
    return models


@pytest.mark.parametrize("script", ["ppo_atari", "ppo_atari_lstm"])
@pytest.mark.parametrize(
    ("cpu", "gpu", "precision"),
    [(True, False, "bf16"), (False, False, "fp32"), (None, False, "fp32"), (True, True, "fp32")],
)
def test_bf16_is_the_default_where_the_cpu_multiplies_it(monkeypatch, script, cpu, gpu, precision):
    known = {} if cpu is None else {"avx512_bf16": cpu}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    spec = importlib.util.spec_from_file_location(script, conftest.ROOT / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, script, module)
    spec.loader.exec_module(module)
    assert module.Args().precision == precision


def test_bf16_rounds_the_torso_and_nothing_else():
    """Its outputs are near those of fp32; the heads and all parameters stay in float32."""
    (fp32, bf16), obs, hidden = twins(), pictures(16), []
    for model in (fp32, bf16):
        model.actor.register_forward_pre_hook(lambda _, x: hidden.append(x[0]))
        model.torso.register_forward_hook(lambda _, x, y: hidden.append(y))
    (policy, values), (rounded, rounded_values) = fp32(obs), bf16(obs)
    assert [x.dtype for x in hidden] == [torch.float32] * 2 + [torch.bfloat16, torch.float32]
    for exact, near in ((policy.logits, rounded.logits), (values, rounded_values)):
        assert near.dtype == torch.float32
        assert 1e-4 < (near - exact).abs().max() / exact.abs().max() < 3e-2
    rounded.entropy().sum().backward()
    assert {x.dtype for p in bf16.parameters() if p.grad is not None for x in (p, p.grad)} == {
        torch.float32
    }


@pytest.mark.parametrize("precision", [0, 1], ids=["fp32", "bf16"])
def test_rollouts_are_drawn_from_the_logits_of_forward(precision, monkeypatch):
    model, obs = twins()[precision], pictures(16)
    expected = model(obs)[0].logits
    calls = conftest.spy(monkeypatch, ppo_atari.Agent, "forward")
    model.rollout_policy(np.random.default_rng(0))(obs.numpy())
    (((_, seen), (policy, _)),) = calls
    assert torch.equal(seen, obs)
    assert (policy.logits - expected).abs().max() < (1e-5, 3e-2)[precision]
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_training_in_bf16_keeps_the_weights_in_float32():
    changes = {"num_steps": 4, "total_timesteps": 8, "update_epochs": 1}
    agents = [conftest.train(ppo_atari, precision=x, **changes) for x in ("fp32", "bf16")]
    exact, rounded = (torch.cat([p.flatten() for p in x.parameters()]) for x in agents)
    assert rounded.dtype == torch.float32
    assert 0 < (exact - rounded).abs().max() < 3e-3  # two steps of Adam


# ------------------------------------------------------------------------------------------------
# The real games


@pytest.mark.parametrize(
    ("env_id", "stickiness"), [("ALE/Pong-v5", 0.25), ("PongNoFrameskip-v4", 0.0)]
)
def test_four_frames_are_ours_and_sticky_actions_the_registered_ones(env_id, stickiness):
    envs = ppo_atari.make_envs(args(env_id))
    assert envs.num_envs == 2
    for env in envs.envs:
        assert env.unwrapped.ale.getFloat("repeat_action_probability") == stickiness
    envs.reset(seed=[3, 4])
    frames = [[env.unwrapped.ale.getEpisodeFrameNumber() for env in envs.envs]]
    for _ in range(5):
        envs.step([NOOP, RIGHT])
        frames.append([env.unwrapped.ale.getEpisodeFrameNumber() for env in envs.envs])
    assert np.array_equal(np.diff(frames, axis=0), np.full((5, 2), 4))
    assert all(8 < frame <= 38 for frame in frames[0])  # the no-ops, FIRE and action 2
    envs.close()


@pytest.mark.parametrize("script", [ppo_atari, ppo_atari_lstm])
def test_c1_games_go_on_side_by_side(script):
    """Each of the N by four frames in each step, with an observation and a reward of its own."""
    settings = {"env_id": "BreakoutNoFrameskip-v4", "num_envs": 3, "vectorization": "sync"}
    envs = script.make_envs(script.Args(**settings))
    envs.reset(seed=[1, 2, 3])
    games = [env.unwrapped.ale for env in envs.envs]
    before = np.array([game.getEpisodeFrameNumber() for game in games])
    for step in range(1, 6):
        obs, rewards, *_ = envs.step([NOOP, FIRE, RIGHT])
        assert [game.getEpisodeFrameNumber() for game in games] == (before + 4 * step).tolist()
        assert (len(obs), rewards.shape) == (3, (3,))
    assert len({x.tobytes() for x in obs}) == 3
    envs.close()


@pytest.mark.parametrize("script", [ppo_atari, ppo_atari_lstm])
def test_a_game_is_cut_off_at_its_limit_of_frames(script):
    """At 60 frames, within the four of a step: truncated, not terminated."""
    register("SixtyFrames-v0", max_num_frames_per_episode=60)
    envs = script.make_envs(script.Args(env_id="SixtyFrames-v0", num_envs=1, vectorization="sync"))
    envs.reset(seed=[1])
    ale, truncated = envs.envs[0].unwrapped.ale, False
    while not truncated:
        before = ale.getEpisodeFrameNumber()
        *_, (terminated,), (truncated,), info = envs.step([NOOP])
    assert 57 <= before < 60
    assert not terminated
    assert info["final_info"]["recorded"]["l"] == [60]
    envs.close()


def test_all_actions_of_the_full_action_space_are_played():
    """The 18 of the controller, in ALE's order."""
    register("AllActions-v0", full_action_space=True)
    envs = ppo_atari.make_envs(args("AllActions-v0", num_envs=1))
    assert envs.single_action_space.n == 18
    (env,) = envs.envs
    assert [action.value for action in env.env.actions] == list(range(18))
    envs.close()


@pytest.mark.parametrize("script", [ppo_atari, ppo_atari_lstm])
@pytest.mark.parametrize(
    "changes",
    [
        {"max_episode_steps": 100},
        {"additional_wrappers": (gym.wrappers.ClipReward.wrapper_spec(min_reward=0),)},
    ],
    ids=str,
)
def test_what_lies_around_the_emulator_is_refused(script, changes):
    gym.register("Wrapped-v0", "ale_py.env:AtariEnv", kwargs={"game": "breakout"}, **changes)
    with pytest.raises(
        gym.error.Error, match="use max_num_frames_per_episode, no max_episode_steps"
    ):
        script.make_envs(script.Args(env_id="Wrapped-v0", vectorization="sync"))


def test_next_episode_starts_in_the_step_that_ends_one():
    """SAME_STEP: the observation is the next life's, the last one of the old life is in info."""
    envs = ppo_atari.make_envs(args("BreakoutNoFrameskip-v4"))
    assert envs.metadata["autoreset_mode"] == gym.vector.AutoresetMode.SAME_STEP
    assert (envs.single_observation_space.shape, envs.single_action_space.n) == ((84, 84, 4), 4)
    previous, ends = envs.reset(seed=[1, 2])[0].copy(), 0
    for _ in range(200):
        obs, _, terminated, truncated, info = envs.step([NOOP, NOOP])
        done = terminated | truncated
        assert ("final_obs" in info) == done.any()
        for i in range(2):
            stack = info["final_obs"][i] if done[i] else obs[i]
            assert np.array_equal(stack[..., :3], previous[i, ..., 1:])
            assert stack[..., 3].any()
            assert not done[i] or (not obs[i, ..., :3].any() and obs[i, ..., 3].any())
        previous, ends = obs.copy(), ends + done
    assert min(ends) >= 3
    envs.close()


def test_async_equals_sync(monkeypatch):
    """Two games in one process."""
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    both = [
        ppo_atari.make_envs(args("BreakoutNoFrameskip-v4", vectorization=mode))
        for mode in ("sync", "async")
    ]
    rng = np.random.default_rng(0)
    first, second = (envs.reset(seed=[1, 2])[0] for envs in both)
    assert np.array_equal(first, second)
    games = 0
    for _ in range(500):
        actions = rng.integers(4, size=2)
        (*first, info), (*second, other) = (envs.step(actions) for envs in both)
        assert all(np.array_equal(x, y) for x, y in zip(first, second, strict=True))
        assert info.keys() == other.keys()
        for i in np.flatnonzero(info.get("_final_obs", [])):
            assert np.array_equal(info["final_obs"][i], other["final_obs"][i])
        if "recorded" in info.get("final_info", {}):
            scores = [x["final_info"]["recorded"] for x in (info, other)]
            assert all(np.array_equal(scores[0][key], scores[1][key]) for key in ("r", "l"))
            games += 1
    assert games >= 2
    for envs in both:
        envs.close()


@pytest.mark.parametrize("game", GAMES)
def test_every_step_equals_stable_baselines3(game):
    """Random steps in two environments, each number of each step: 500, two games and five lives.

    Whichever is reached last, within 2,000 steps; in Pong there are no lives.
    """
    env_id = f"{game}NoFrameskip-v4"
    envs = ppo_atari.make_envs(args(env_id))
    theirs = VecFrameStack(make_atari_env(env_id, n_envs=2, seed=1), n_stack=4)
    rng = np.random.default_rng(0)
    obs = envs.reset(seed=[1, 2])[0]
    assert np.array_equal(obs, theirs.reset())
    scores, lives, enough = [], 0, 0 if game == "Pong" else 5
    for step in range(2000):
        if step >= 500 and len(scores) >= 2 and lives >= enough:
            break
        actions = rng.integers(envs.single_action_space.n, size=2)
        obs, rewards, terminated, truncated, info = envs.step(actions)
        their_obs, their_rewards, their_dones, their_infos = theirs.step(actions)
        assert np.array_equal(obs, their_obs)
        assert np.array_equal(rewards, their_rewards)
        assert np.array_equal(terminated | truncated, their_dones)
        for i, their_info in enumerate(their_infos):
            assert (truncated[i] and not terminated[i]) == their_info["TimeLimit.truncated"]
            assert ("episode" in their_info) == (
                their_dones[i] and info["final_info"].get("_recorded", [False] * 2)[i]
            )
            if "episode" in their_info:
                score = {key: info["final_info"]["recorded"][key][i] for key in ("r", "l")}
                assert score == {key: their_info["episode"][key] for key in ("r", "l")}
                scores.append(score["r"])
            elif their_dones[i]:  # where a game ends, their last observation has older frames
                assert np.array_equal(info["final_obs"][i], their_info["terminal_observation"])
                lives += 1
    assert len(scores) >= 2
    assert lives >= enough
    envs.close()
    theirs.close()
