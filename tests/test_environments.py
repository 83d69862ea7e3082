"""What the scripts make of an environment: observations, actions, resets, seeds, processes."""

import copy
import os
import types

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Sequence, Text, Tuple

import conftest
import ppo_continuous
import ppo_discrete
from conftest import metrics, train
from envs import Scripted

INF = np.inf


class Anything(gym.Env):
    """Shows samples of any observation space, takes the actions of any action space.

    Episodes have three steps and end in turns by a time limit and for good. `shown` keeps the
    observations that are acted on, `final` those that end an episode.
    """

    seeds = ()  # all that any of these environments was ever given

    def __init__(self, observations, actions):
        self.observation_space, self.action_space = copy.deepcopy((observations, actions))
        self.shown, self.final, self.actions, self.episode = [], [], [], 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
            Anything.seeds += (seed,)
        self.t = 0
        self.shown.append(self.observation_space.sample())
        return self.shown[-1], {}

    def step(self, action):
        assert self.action_space.contains(np.asarray(action))
        self.actions.append(action)
        self.t += 1
        ended = self.t == 3
        self.episode += ended
        keep = self.final if ended else self.shown
        keep.append(self.observation_space.sample())
        terminated = ended and self.episode % 2 == 0
        return keep[-1], float(np.sum(action)), terminated, ended and not terminated, {}


OBSERVATIONS = {
    "Vector": Box(-1, 1, (3,), np.float32),
    "Float64": Box(-1, 1, (3,), np.float64),
    "Integers": Box(0, 255, (3,), np.uint8),
    "Matrix": Box(-1, 1, (2, 3), np.float32),
    "Image": Box(0, 255, (3, 4, 3), np.uint8),
    "Scalar": Box(-1, 1, (), np.float64),
    "Unbounded": Box(-INF, INF, (3,), np.float64),
    "Number": Discrete(4, start=2),
    "Bits": MultiBinary(3),
    "Numbers": MultiDiscrete([2, 3]),
    "Dict": Dict({"b": Box(-1, 1, (2,), np.float64), "a": Discrete(3)}),
    "Tuple": Tuple((Box(-1, 1, (2,), np.float32), Box(-1, 1, (), np.float64))),
    "Nested": Dict({"x": Tuple((Discrete(2), MultiBinary((2, 2)))), "y": Dict({"z": Box(0, 1)})}),
}
NUMBERS = {"Two": Discrete(2), "FromFive": Discrete(3, start=5), "FromMinus": Discrete(2, start=-1)}
BOXES = {
    "Pair": Box(-1, 1, (2,), np.float32),
    "Matrix": Box(-0.5, 0.5, (2, 3), np.float32),
    "Scalar": Box(-0.5, 0.5, (), np.float32),
    "Asymmetric": Box(np.float32([-0.1, -2, 0.5]), np.float32([0.3, 0, 4])),
    "Infinite": Box(np.float32([-INF, -0.2, -INF]), np.float32([INF, INF, 0.2])),
    "Float64": Box(-0.5, 0.5, (2,), np.float64),
    "Half": Box(-0.5, 0.5, (2,), np.float16),
}
OTHERS = {"Bits": MultiBinary(3), "Numbers": MultiDiscrete([2, 3]), "Tuple": Tuple((Discrete(2),))}
OTHERS |= {"Dict": Dict({"steer": Discrete(3)}), "Text": Text(5)}
ONE_ACTION = {"ppo_discrete": Discrete(2), "ppo_continuous": BOXES["Pair"]}
LONG = {"episodes": (((1.0, False, False),) * 100,)}

for kind, actions in ONE_ACTION.items():
    for name, space in OBSERVATIONS.items():
        kwargs = {"observations": space, "actions": actions}
        gym.register(f"{kind}/Sees{name}-v0", Anything, kwargs=kwargs)
for name, space in (NUMBERS | BOXES | OTHERS).items():
    kwargs = {"observations": OBSERVATIONS["Vector"], "actions": space}
    gym.register(f"Takes{name}-v0", Anything, kwargs=kwargs)
gym.register("ppo_discrete/Long-v0", "envs:Scripted", kwargs=LONG)
gym.register("ppo_continuous/Long-v0", "envs:ScriptedBox", kwargs=LONG)
gym.register("ppo_discrete/Short-v0", "envs:Scripted")
gym.register("ppo_continuous/Short-v0", "envs:ScriptedBox")


@pytest.fixture(params=[ppo_discrete, ppo_continuous], ids=lambda script: script.__name__)
def script(request):
    return request.param


@pytest.fixture
def seen(script, monkeypatch):
    """What `train` deals with: envs, obs and actions of every step, inputs of the networks."""
    seen = types.SimpleNamespace(envs=[], obs=[], actions=[], inputs=[])
    make_envs = script.make_envs

    def keep_envs(args):
        seen.envs.append(make_envs(args))
        return seen.envs[-1]

    class Agent(script.Agent):
        def __init__(self, envs):
            super().__init__(envs)
            for network in (self.actor, self.critic):
                network.register_forward_pre_hook(lambda _, args: seen.inputs.append(args[0]))

        def rollout_policy(self, rng):
            act = super().rollout_policy(rng)

            def keep_act(obs):
                seen.obs.append(obs.copy())
                seen.actions.append(act(obs))
                return seen.actions[-1].copy()

            return keep_act

    monkeypatch.setattr(script, "make_envs", keep_envs)
    monkeypatch.setattr(script, "Agent", Agent)
    return seen


@pytest.fixture
def unnormalized(monkeypatch):
    """The continuous script takes observations as they are."""

    def cast(self, obs):
        return obs.astype(np.float32)

    monkeypatch.setattr(ppo_continuous.VecNormalize, "normalize", cast)


def sub_envs(seen):
    """The environments themselves, without any wrapper."""
    return [env.unwrapped for env in seen.envs[0].unwrapped.envs]


# ------------------------------------------------------------------------------------------------
# Observations


@pytest.mark.usefixtures("unnormalized")
@pytest.mark.parametrize("name", OBSERVATIONS)
def test_any_observation_becomes_one_float32_vector(script, seen, name):
    train(script, env_id=f"{script.__name__}/Sees{name}-v0")
    space = OBSERVATIONS[name]
    size = gym.spaces.flatdim(space)
    (columns,) = seen.envs[0].single_observation_space.shape
    assert columns == size + 2 * (
        script is ppo_discrete
    )  # behind it which of two actions are valid
    for i, env in enumerate(sub_envs(seen)):
        expected = [np.float32(gym.spaces.flatten(space, x)) for x in env.shown[:32]]
        np.testing.assert_array_equal([obs[i, :size] for obs in seen.obs], expected)
        assert all((obs[i, size:] == 0).all() for obs in seen.obs)
    assert {x.shape[1:] for x in seen.inputs} == {(size,)}
    # the final observations of the episodes that a time limit cut off
    cut_off = np.float32([gym.spaces.flatten(space, x) for x in env.final[::2]])
    values_of = [x[-1].numpy() for x in seen.inputs if len(x) == 2]  # N environments at once
    for final in cut_off:
        assert any((final == x).all() for x in values_of)


@pytest.mark.parametrize("name", ["Float64", "Integers", "Number", "Nested"])
def test_networks_only_ever_see_float32(script, seen, name):
    train(script, env_id=f"{script.__name__}/Sees{name}-v0")
    assert seen.envs[0].single_observation_space.dtype == np.float32
    assert {x.dtype for x in seen.inputs} == {torch.float32}
    assert {x.dtype for x in seen.obs} == {np.dtype(np.float32)}


# ------------------------------------------------------------------------------------------------
# Actions


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("script", [ppo_discrete], indirect=True)
def test_discrete_actions_are_counted_from_the_first_of_the_environment(script, seen, name):
    train(script, env_id=f"Takes{name}-v0")
    space = NUMBERS[name]
    assert seen.envs[0].single_action_space == MultiDiscrete([space.n])
    assert set(np.ravel(seen.actions)) == set(range(space.n))
    for i, env in enumerate(sub_envs(seen)):
        assert env.actions == [action[i, 0] + space.start for action in seen.actions]
        assert all(isinstance(action, np.integer) for action in env.actions)


@pytest.mark.parametrize("name", BOXES)
@pytest.mark.parametrize("script", [ppo_continuous], indirect=True)
def test_continuous_actions_reach_the_environment_in_its_shape_and_bounds(script, seen, name):
    train(script, env_id=f"Takes{name}-v0")
    space = BOXES[name]
    given = np.array(seen.actions, np.float32)  # as the rollout keeps them
    assert given.shape == (32, 2, np.prod(space.shape, dtype=int))
    for i, env in enumerate(sub_envs(seen)):
        expected = given[:, i].reshape(32, *space.shape)
        assert (expected > space.high).any() or (expected < space.low).any()
        expected = np.minimum(np.maximum(expected, space.low), space.high)
        np.testing.assert_array_equal(env.actions, expected.astype(space.dtype))
        assert {np.shape(action) for action in env.actions} == {space.shape}
        assert {action.dtype for action in env.actions} == {space.dtype}


@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize("name", ["Two", "Pair", *OTHERS])
def test_other_actions_are_refused_with_the_script_that_has_them(script, vectorization, name):
    """A Dict, a Tuple or a Text without: none has them."""
    discrete = Discrete | MultiDiscrete | MultiBinary
    kinds, other, has = (discrete, Box, "ppo_continuous.py has Box")
    if script is ppo_continuous:
        kinds, other, has = (Box, discrete, "ppo_discrete.py has them")
    space = (NUMBERS | BOXES | OTHERS)[name]
    args = script.Args(env_id=f"Takes{name}-v0", vectorization=vectorization, num_envs=2)
    if isinstance(space, kinds):
        script.make_envs(args).close()
    else:
        with pytest.raises(gym.error.Error, match="are not") as error:
            script.make_envs(args)
        assert str(space) in str(error.value)
        assert str(error.value).endswith(has) == isinstance(space, other)
        assert ("ppo_" in str(error.value)) == isinstance(space, other)


@pytest.mark.parametrize("script", [ppo_discrete], indirect=True)
@pytest.mark.parametrize("shape", [(3,), (3, 2), 4])
def test_switches_are_choices_out_of_two(script, seen, shape):
    """Actions reach the environment in its own shape and type."""
    space = MultiBinary(shape)
    env_id = f"Switches{space.shape[0]}by{len(space.shape)}-v0"
    gym.register(env_id, Anything, kwargs={"observations": Box(-1, 1, (3,)), "actions": space})
    train(script, env_id=env_id)
    assert seen.envs[0].single_action_space == MultiDiscrete([2] * np.prod(space.shape))
    for i, env in enumerate(sub_envs(seen)):
        given = np.array([action[i] for action in seen.actions]).reshape(-1, *space.shape)
        np.testing.assert_array_equal(env.actions, given)
        assert {action.dtype for action in env.actions} == {space.dtype}
    assert np.unique(seen.actions).tolist() == [0, 1]


FAR = {
    "ZeroToOne": Box(0, 1, (2,)),
    "Wide": Box(-1000, 1000, (1,)),
    "Tiny": Box(-0.05, 0.05, (1,)),
    "OneOfTwo": Box(np.float32([-1, -300]), np.float32([1, 300])),
    "Negative": Box(-2, 0, (1,)),
}
NEAR = {
    "One": Box(-1, 1, (2,)),
    "Pendulum": Box(-2, 2, (1,)),
    "Humanoid": Box(-0.4, 0.4, (17,)),
    "Edges": Box(np.float32([-0.1, -10]), np.float32([0.1, 10])),
    "Unbounded": Box(-INF, INF, (2,)),
    "HalfBounded": Box(0, INF, (2,)),
    "Lopsided": Box(-1, 3, (1,)),
}


@pytest.mark.parametrize("name", [*FAR, *NEAR])
def test_bounds_far_from_where_the_policy_starts_are_noticed(name, capsys):
    """In one line, once a run, with the remedy."""
    env_id, kwargs = f"Bounds{name}-v0", {"observations": Box(-1, 1, (2,))}
    gym.register(env_id, Anything, kwargs=kwargs | {"actions": (FAR | NEAR)[name]})
    ppo_continuous.notice.cache_clear()
    for _ in range(2):
        ppo_continuous.make_envs(ppo_continuous.Args(env_id=env_id, num_envs=2)).close()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (name in FAR)
    assert all(x.startswith("notice: ") and "gym.wrappers.RescaleAction" in x for x in lines)


# ------------------------------------------------------------------------------------------------
# Resets and seeds


@pytest.mark.usefixtures("unnormalized")
@pytest.mark.parametrize("num_envs", [1, 3])
def test_c1_environments_go_on_from_one_rollout_to_the_next(script, seen, num_envs):
    env_id = f"{script.__name__}/Long-v0"
    train(script, env_id=env_id, num_steps=4, num_envs=num_envs, total_timesteps=99)
    rollouts = 99 // (4 * num_envs)
    assert len(seen.obs) == 4 * rollouts
    for t, obs in enumerate(seen.obs):
        assert obs[:, :2].tolist() == [[0, t]] * num_envs
    assert [env.t for env in sub_envs(seen)] == [4 * rollouts] * num_envs


@pytest.mark.usefixtures("unnormalized")
def test_an_episode_is_followed_by_the_first_observation_of_the_next(script, seen):
    train(script, env_id=f"{script.__name__}/Short-v0", num_steps=4)
    assert len(seen.obs) == 8
    for t, obs in enumerate(seen.obs):
        assert obs[:, :2].tolist() == [list(divmod(t, 3))] * 2  # (episode, step), never step 3


def test_no_environment_seed_is_shared_between_runs(script, monkeypatch):
    seeds = {}
    env_id = f"{script.__name__}/SeesVector-v0"
    for run, seed in enumerate([1, 2, 3, 1]):
        monkeypatch.setattr(Anything, "seeds", ())
        train(script, env_id=env_id, seed=seed, num_envs=8, num_steps=4)
        seeds[run] = Anything.seeds
        assert len(seeds[run]) == 8  # one for each environment, once
    assert seeds[3] == seeds[0]
    all_seeds = np.sort(np.concatenate([seeds[0], seeds[1], seeds[2]]))
    assert np.diff(all_seeds).min() > 8  # nor are any of them seed, seed + 1, ...


# ------------------------------------------------------------------------------------------------
# Processes and modules


@pytest.mark.parametrize("name", ["Vector", "Float64", "Nested"])
def test_sync_and_async_runs_are_the_same(script, seen, name, tmp_path, monkeypatch):
    """In everything but time: observations, actions and all numbers of metrics.csv."""
    rows, kinds = [], {"sync": gym.vector.SyncVectorEnv, "async": script.Processes}
    for vectorization, kind in kinds.items():
        (tmp_path / vectorization).mkdir()
        monkeypatch.chdir(tmp_path / vectorization)
        env_id = f"{script.__name__}/Sees{name}-v0"
        train(script, env_id=env_id, vectorization=vectorization, num_envs=4, num_steps=8)
        assert type(seen.envs[-1].unwrapped) is kind
        rows.append([(s, n, x) for s, _, n, x in metrics() if n != "charts/SPS"])
    assert len(rows[0]) > 20
    np.testing.assert_equal(rows[0], rows[1])
    np.testing.assert_array_equal(seen.obs[:16], seen.obs[16:])
    np.testing.assert_array_equal(seen.actions[:16], seen.actions[16:])


def test_a_process_for_each_environment_scheduled_as_a_batch():
    envs = ppo_discrete.make_envs(ppo_discrete.Args(num_envs=3, vectorization="async"))
    assert len(envs.processes) == envs.num_envs == 3
    if hasattr(os, "SCHED_BATCH"):
        kinds = {os.sched_getscheduler(process.pid) for process in envs.processes}
        assert kinds == {os.SCHED_BATCH}
    envs.close()
    assert not any(process.is_alive() for process in envs.processes)


def test_processes_work_where_they_cannot_be_a_batch(monkeypatch):
    """Other systems do not have it, sandboxes may not allow it."""
    for error in (AttributeError, PermissionError):

        def refuse(*_, error=error):
            raise error

        monkeypatch.setattr(os, "sched_setscheduler", refuse, raising=False)
        envs = ppo_discrete.make_envs(ppo_discrete.Args(num_envs=2, vectorization="async"))
        assert envs.reset(seed=[1, 2])[0].shape == (2, 6)
        envs.close()


MODULE = """
import gymnasium as gym

class {name}(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (3,))
    action_space = gym.spaces.{actions}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {{}}

    def step(self, action):
        return self.observation_space.sample(), 2.5, True, False, {{}}

gym.register("{name}-v0", {name})
"""


@pytest.mark.parametrize("vectorization", ["sync", pytest.param("async", marks=pytest.mark.slow)])
def test_environment_of_a_third_party_module(script, vectorization, tmp_path, monkeypatch):
    """Both in process (sync) and from the command line (async)."""
    kind = script.__name__.removeprefix("ppo_")
    actions = {"discrete": "Discrete(2)", "continuous": "Box(-1, 1, (2,))"}[kind]
    source = MODULE.format(name=f"Their{kind}", actions=actions)
    (tmp_path / f"their_{kind}.py").write_text(source)
    env_id = f"their_{kind}:Their{kind}-v0"
    if vectorization == "sync":
        monkeypatch.syspath_prepend(tmp_path)
        train(script, env_id=env_id)
    else:
        flags = ("--env-id", env_id, "--vectorization", "async", "--num-envs", "2", "--no-cuda")
        sizes = ("--total-timesteps", "128", "--num-steps", "32")
        finished = conftest.command_line(
            kind, *flags, *sizes, env=os.environ | {"PYTHONPATH": str(tmp_path)}
        )
        assert finished.returncode == 0, finished.stderr
    returns = {x for _, _, name, x in metrics() if name == "charts/episodic_return"}
    assert returns == {2.5}


class Awkward(Scripted):
    """Writes every observation into the same array, and has an `info["episode"]` of its own."""

    buffer = None

    def observation(self):
        if self.buffer is None:
            self.buffer = super().observation()
        self.buffer[:] = self.episode, self.t
        return self.buffer

    def step(self, action):
        *result, info = super().step(action)
        return *result, info | {"episode": "mine"}


CUT_OFF = {"episodes": (((1.0, False, False), (2.0, False, True)),)}
for kind, space in ONE_ACTION.items():
    dtype = {"ppo_discrete": np.float32, "ppo_continuous": np.float64}[kind]
    spaces = {"action_space": space, "observation_space": Box(-1e9, 1e9, (2,), dtype)}
    awkward = type("Awkward", (Awkward,), spaces)
    gym.register(f"{kind}/Awkward-v0", awkward, kwargs=CUT_OFF)


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_last_observation_is_kept_when_an_environment_reuses_its_array(
    script, unnormalized, vectorization
):
    args = script.Args(
        env_id=f"{script.__name__}/Awkward-v0", vectorization=vectorization, num_envs=1
    )
    envs = script.make_envs(args)
    envs.reset()
    actions = np.zeros((1, *envs.single_action_space.shape), envs.single_action_space.dtype)
    envs.step(actions)
    obs, *_, info = envs.step(actions)
    envs.close()
    assert info["final_obs"][0][:2].tolist() == [0, 2]
    assert obs[0, :2].tolist() == [1, 0]


def test_episodes_are_recorded_beside_those_an_environment_reports(script):
    train(script, env_id=f"{script.__name__}/Awkward-v0")
    returns = [value for *_, name, value in metrics() if name == "charts/episodic_return"]
    assert returns == [3.0] * 32


def test_observations_that_are_no_vector_are_refused(script):
    spaces = {"observations": Sequence(Discrete(3)), "actions": ONE_ACTION[script.__name__]}
    gym.register(f"{script.__name__}/Sequence-v0", Anything, kwargs=spaces)
    with pytest.raises(
        gym.error.Error, match=r"^observation is Sequence.*no numbers; docs/your_own.md"
    ):
        script.make_envs(script.Args(env_id=f"{script.__name__}/Sequence-v0", num_envs=1))
