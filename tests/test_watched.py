"""Environments as people write them: what is odd is played, or named in one line."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete, Graph, Space, Tuple

import conftest
import ppo_atari
import ppo_atari_lstm
import ppo_continuous
import ppo_discrete
from conftest import ROOT, metrics, train

ACTIONS = {"ppo_discrete": Discrete(3), "ppo_continuous": Box(-1, 1, (2,))}


class Odd(gym.Env):
    """Episodes of three steps of ones; from step `start` on, with what is odd in its place."""

    def __init__(self, actions, observation_space=None, start=0, **odd):
        self.observation_space = observation_space or Box(-9, 9, (3,), np.float32)
        self.action_space, self.start, self.odd, self.steps = actions, start, odd, -1

    def next(self, name, default):
        value = self.odd.get(name, default) if self.steps >= self.start else default
        return value(self) if callable(value) else value

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        self.steps += self.steps < 0
        return self.next("obs", np.ones(3, np.float32)), self.next("info", {})

    def step(self, action):
        self.t += 1
        self.steps += 1
        obs, reward = self.next("obs", np.ones(3, np.float32)), self.next("reward", 1.0)
        return obs, reward, self.t == 3, False, self.next("info", {})


def made(script, **kwargs):
    """The id of a new environment, an instance of Odd."""
    env_id = f"Odd{len(gym.registry)}-v0"
    gym.register(env_id, Odd, kwargs={"actions": ACTIONS[script.__name__]} | kwargs)
    return env_id


@pytest.fixture(params=[ppo_discrete, ppo_continuous], ids=lambda script: script.__name__)
def script(request):
    return request.param


both = pytest.mark.parametrize("vectorization", ["sync", "async"])


# ------------------------------------------------------------------------------------------------
# Played


def some_info(env):
    """Something else in every step, as in many simulators."""
    odd = [
        {},
        {"x": None},
        {"x": {"y": 1}},
        {"x": "text", "path": [[1], [2, 3]]},
        {"x": np.ones(2)},
    ]
    return odd[(env.steps + env.t) % 5] | {"recorded": "mine", "final_obs": 5, "episode": object()}


REWARDS = {
    "shape (1,)": np.array([1.0]),
    "shape ()": np.array(1.0),
    "shape (1, 1)": np.ones((1, 1)),
    "bool": True,
    "int": 1,
    "numpy's bool": np.bool_(True),
    "uint8": np.uint8(1),
    "float16": np.float16(1),
    "list": [1],
}


@both
def test_info_is_the_business_of_the_environment(script, vectorization):
    train(script, env_id=made(script, info=some_info), vectorization=vectorization)
    returns = [x for *_, name, x in metrics() if name == "charts/episodic_return"]
    assert returns == [3.0] * len(returns) and len(returns) == 20


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REWARDS)
def test_rewards_are_the_numbers_that_they_are(script, name):
    train(script, env_id=made(script, reward=REWARDS[name]))
    returns = {x for *_, name, x in metrics() if name == "charts/episodic_return"}
    assert returns == {3.0}


@pytest.mark.parametrize(
    "obs", [[1, 1, 1], (1.0, 1, True), np.ones(3, np.int64), np.ones(3, ">f8")]
)
def test_observations_are_cast_to_numbers(script, obs):
    envs = script.make_envs(script.Args(env_id=made(script, obs=obs), num_envs=1))
    first, _ = envs.reset(seed=[1])
    assert first.dtype == np.float32
    if script is ppo_discrete:
        assert first[0].tolist() == [1] * 3 + [0] * 3


def test_info_is_cut_down_to_what_is_read():
    """Nothing else reaches Gymnasium's vector environments, which is faster, too."""
    env_id = made(ppo_discrete, info=lambda env: {"action_mask": np.ones(3), "x": 1})
    env = ppo_discrete.Watched(gym.make(env_id), 0)
    assert list(env.reset()[1]) == ["action_mask"]
    infos = [env.step(0)[-1] for _ in range(3)]
    assert [sorted(info) for info in infos] == [["action_mask"]] * 2 + [["action_mask", "recorded"]]
    assert infos[-1]["recorded"] == {"r": 3.0, "l": 3}
    envs = ppo_discrete.make_envs(ppo_discrete.Args(env_id=env_id, num_envs=1))
    assert envs.reset(seed=[1])[1] == {}


@pytest.mark.parametrize("game", [None, {"r": 70.0, "l": 21}])
def test_an_environment_says_itself_what_a_whole_game_is_worth(game):
    """Where its episodes are parts, as lives are: nothing while it goes on, then all of it."""
    env = ppo_discrete.Watched(gym.make(made(ppo_discrete, info={"whole_game": game})), 0)
    env.reset()
    infos = [env.step(0)[-1] for _ in range(3)]
    assert infos == [{}, {}, {"recorded": game} if game else {}]


# ------------------------------------------------------------------------------------------------
# Named

WRONG = {
    "a reward None": ({"reward": None}, r"reward is NoneType .*None, not numbers"),
    "a reward of two": ({"reward": np.ones(2)}, r"reward is ndarray \(2,\) .*, not numbers"),
    "a reward as a text": ({"reward": "1.0"}, r"reward is str .*'1.0', not numbers"),
    "a ragged reward": ({"reward": [[1], [1, 2]]}, r"reward is list .*\[\[1\], \[1, 2\]\]"),
    "another shape": ({"obs": np.ones(2)}, r"observation is ndarray \(2,\) .*shape \(3,\)"),
    "one that broadcasts": ({"obs": np.ones(1)}, r"observation is ndarray \(1,\) .*shape \(3,\)"),
    "one more axis": ({"obs": np.ones((1, 3))}, r"observation is ndarray \(1, 3\) .*shape \(3,\)"),
    "a text": ({"obs": "go"}, r"observation is str .*'go', not numbers of shape \(3,\)"),
    "texts": ({"obs": ["1", "2", "3"]}, r"observation is list .*'3'\], not numbers"),
    "nothing": ({"obs": lambda env: None}, r"observation is NoneType .*None, not numbers"),
    "a ragged list": ({"obs": [1, [2], 3]}, r"observation is list .*\[1, \[2\], 3\], not numbers"),
    "too many": ({"obs": np.ones(9_999)}, r"observation is ndarray \(9999,\) .{,70}, not numbers"),
}


@pytest.mark.filterwarnings("ignore")
@both
@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_number_is_named(script, vectorization, name, capfd):
    """Environment, step and what was handed over; before, it was a traceback of numpy's."""
    odd, message = WRONG[name]
    env_id = made(script, start=5, **odd)
    with pytest.raises(gym.error.Error, match=f"^{env_id}, environment 0, step 5: {message}"):
        train(script, env_id=env_id, num_envs=1, vectorization=vectorization)
    assert "Traceback" not in capfd.readouterr().err


class TwoArgumentsError(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} of {two}")


def fails(env):
    raise TwoArgumentsError("100 %s", env.steps)


@both
@pytest.mark.parametrize(("start", "step"), [(0, 0), (7, 7)])
def test_an_exception_of_its_own_code_keeps_its_traceback(
    script, vectorization, start, step, capfd
):
    """In a reset and in a step; also one of two arguments, from a line with a % in it."""
    env_id = made(script, start=start, obs=fails)
    message = f"^{env_id}, environment 0, step {step}: TwoArgumentsError: 100 %s of {step}$"
    with pytest.raises(gym.error.Error, match=message):
        train(script, env_id=env_id, num_envs=1, vectorization=vectorization)
    output = capfd.readouterr().err
    assert output.count("Traceback") == 1
    assert 'raise TwoArgumentsError("100 %s", env.steps)' in output
    assert "Worker" not in output


@both
def test_the_index_is_that_of_the_environment(vectorization, capfd):
    """Only the last of three goes wrong."""

    class OnlyTheLast(Odd):
        def reset(self, *, seed=None, options=None):
            obs, info = super().reset(seed=seed)
            if seed is not None:
                self.odd = {"reward": None} if seed == LAST else {}
            return obs, info

    LAST = np.random.SeedSequence([1, 0, 0]).generate_state(3)[2]
    env_id = f"OnlyTheLast{vectorization}-v0"
    gym.register(env_id, OnlyTheLast, kwargs={"actions": Discrete(3)})
    with pytest.raises(gym.error.Error, match=f"^{env_id}, environment 2, step 1: reward"):
        train(
            ppo_discrete, env_id=env_id, num_envs=3, vectorization=vectorization, num_minibatches=1
        )


MODULE = """
import gymnasium as gym
import numpy as np

class Mine(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (3,), np.float32)
    action_space = gym.spaces.{actions}
    t = 0

    def reset(self, *, seed=None, options=None):
        return np.zeros(3, np.float32), {{}}

    def step(self, action):
        self.t += 1
        if self.t == {fails_at}:
            {fails}
        return np.zeros(3, np.float32), 1.0, self.t % 5 == 0, False, {{}}

gym.register("Mine-v0", Mine)
"""
KIND = {"ppo_discrete": "Discrete(3)", "ppo_continuous": "Box(-1, 1, (2,))"}


RAISES, NONE = "raise KeyError('fuel')", "return np.zeros(3), None, 0, 0, {{}}"


@pytest.mark.parametrize(
    ("vectorization", "fails"),
    [
        ("async", RAISES),
        pytest.param("sync", NONE, marks=pytest.mark.slow),
        pytest.param("sync", RAISES, marks=pytest.mark.slow),
        pytest.param("async", NONE, marks=pytest.mark.slow),
    ],
)
def test_the_last_line_has_the_last_good_checkpoint(script, vectorization, fails, tmp_path):
    """From the command line; in --env-id, a module in the current folder is enough."""
    source = MODULE.format(actions=KIND[script.__name__], fails=fails.format(), fails_at=50)
    (tmp_path / "mine.py").write_text(source)
    sizes = "--num-envs 2 --num-steps 16 --num-minibatches 2 --total-timesteps 1024"
    flags = f"--env-id mine:Mine-v0 --vectorization {vectorization} --checkpoint-every 1 {sizes}"
    flags = f"{flags} --no-compile --no-cuda"
    done = conftest.command_line(script.__name__[4:], *flags.split(), cwd=tmp_path)
    assert done.returncode == 2
    *before, line = done.stderr.splitlines()
    (saved,) = tmp_path.glob("runs/*/checkpoint.pt")
    what = (
        "KeyError: 'fuel'"
        if "fuel" in fails
        else "reward is NoneType None, not numbers of shape (1,)"
    )
    place = r"error: Mine-v0, environment [01], step 50: "
    last = re.escape(f"{what}; last good checkpoint: {saved.relative_to(tmp_path)}")
    assert re.fullmatch(place + last, line)
    assert ("    raise KeyError('fuel')" in " ".join(before)) == ("fuel" in fails)
    assert "Worker" not in done.stderr


# ------------------------------------------------------------------------------------------------
# Spaces


class Mission(Space):
    """A space that Gymnasium cannot flatten, as MiniGrid's texts are."""

    def __repr__(self):
        return "Mission()"


PICTURE = Box(0, 255, (7, 7, 3), np.uint8)
NOT_FLAT = {
    "Mission": (Mission(), "observation is Mission()"),
    "Dict": (Dict({"image": PICTURE, "mission": Mission()}), "observation['mission'] is Mission()"),
    "Tuple": (Tuple((PICTURE, Mission())), "observation[1] is Mission()"),
    "Nested": (
        Dict({"a": PICTURE, "b": Tuple((Discrete(2), Dict({"c": Graph(Box(0, 1), None)})))}),
        "observation['b'][1]['c'] is Graph",
    ),
}


@both
@pytest.mark.parametrize("name", NOT_FLAT)
def test_spaces_that_are_no_numbers_are_refused_with_the_part(script, vectorization, name):
    space, message = NOT_FLAT[name]
    env_id = made(script, observation_space=space)
    args = script.Args(env_id=env_id, vectorization=vectorization, num_envs=2)
    with pytest.raises(gym.error.Error, match=re.escape(message)) as error:
        script.make_envs(args)
    assert str(error.value).endswith("no numbers; docs/your_own.md has a wrapper")


@both
def test_a_dict_without_one_of_its_parts_is_named(script, vectorization):
    space = Dict({"a": Box(-1, 1, (2,)), "b": Discrete(3)})
    env_id = made(script, observation_space=space, obs={"a": np.zeros(2)})
    with pytest.raises(
        gym.error.Error, match=r"observation is dict .*, not numbers of shape \(5,\)"
    ):
        unchecked = '{"disable_env_checker": true}'  # by Gymnasium, which would say it otherwise
        kwargs = {"env_id": env_id, "env_kwargs": unchecked, "vectorization": vectorization}
        train(script, num_envs=1, **kwargs)


# ------------------------------------------------------------------------------------------------
# Arguments of the environment


def error_line(script, capsys, **changes):
    with pytest.raises(SystemExit) as error:
        script.check_args(script.Args(**changes))
    assert error.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


class Sized(Odd):
    def __init__(self, actions, size, render_mode=None):
        super().__init__(actions, Box(-9, 9, (size,), np.float32), obs=np.ones(size, np.float32))


for name, actions in ACTIONS.items():
    gym.register(f"{name}/Sized-v0", Sized, kwargs={"actions": actions})


@both
def test_arguments_of_the_environment(script, vectorization):
    """To gym.make, and one key each in config.json."""
    flags = ["--env-kwargs", '{"size": 8, "render_mode": null}', "--num-envs", "2"]
    args = script.parse_args([*flags, "--env-id", f"{script.__name__}/Sized-v0"])
    script.check_args(args)
    agent = train(
        script, env_id=args.env_id, env_kwargs=args.env_kwargs, vectorization=vectorization
    )
    assert agent.obs_dim == 8
    (config,) = Path().glob("runs/**/config.json")
    config = json.loads(config.read_text())
    assert (config["env_kwargs/size"], config["env_kwargs/render_mode"]) == (8, None)
    assert config["env_kwargs"] == args.env_kwargs


@pytest.mark.parametrize(
    ("kwargs", "hints"),
    [
        ("{}", ["missing 1 required positional argument: 'size'", "--env-kwargs"]),
        ('{"size": 8, "colour": 1}', ["unexpected keyword argument 'colour'", "--env-kwargs"]),
        ('{"size": 8', ["--env-kwargs '{\"size\": 8'", "JSON", "column 11"]),
        ("size=8", ["--env-kwargs 'size=8'", "JSON"]),
        ("[8]", ["mapping", "--env-kwargs"]),
        ('{"size": 8, "id": "CartPole-v1"}', ["multiple values", "'id'"]),
        ('{"size": 8, "disable_env_checker": true, "x": 0}', ["'x'", "--env-kwargs"]),
    ],
)
def test_arguments_refused(script, kwargs, hints, capsys):
    line = error_line(script, capsys, env_id=f"{script.__name__}/Sized-v0", env_kwargs=kwargs)
    assert all(hint in line for hint in hints), line


def test_type_errors_of_its_own_code_are_shown_as_such(script):
    class Wrong(Odd):
        def __init__(self, **kwargs):
            len(5)

    gym.register(f"{script.__name__}/Wrong-v0", Wrong)
    with pytest.raises(TypeError, match="has no len"):
        script.check_args(script.Args(env_id=f"{script.__name__}/Wrong-v0"))


@pytest.mark.parametrize("script", [ppo_atari, ppo_atari_lstm], indirect=True)
@pytest.mark.parametrize("key", ["frameskip", "obs_type", "continuous", "max_episode_steps"])
def test_what_the_script_sets_itself_is_refused(script, key, capsys):
    """Frames are skipped, and screens looked at, by the script."""
    value = {"frameskip": 4, "obs_type": '"ram"', "continuous": "true", "max_episode_steps": 9}[key]
    kwargs = f'{{"{key}": {value}}}'
    line = error_line(script, capsys, env_id="PongNoFrameskip-v4", env_kwargs=kwargs)
    assert key in line


def test_arguments_of_a_game():
    script = ppo_atari
    flags = {"env_id": "PongNoFrameskip-v4", "num_envs": 1, "vectorization": "sync"}
    kwargs = '{"full_action_space": true, "repeat_action_probability": 0.25}'
    envs = script.make_envs(script.Args(**flags, env_kwargs=kwargs))
    assert envs.single_action_space.n == 18
    (env,) = envs.envs
    assert env.unwrapped.ale.getFloat("repeat_action_probability") == 0.25


# ------------------------------------------------------------------------------------------------
# Modules in the current folder


def in_folder(tmp_path, source, *flags, module="mine"):
    (tmp_path / f"{module}.py").write_text(source)
    flags = ["--env-id", f"{module}:Mine-v0", "--total-timesteps", "512", "--no-compile", *flags]
    command = [sys.executable, ROOT / "ppo_discrete.py", *flags]
    env = {x: y for x, y in os.environ.items() if x != "PYTHONPATH"}
    return subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=100
    )


def test_a_module_that_fails_is_shown_as_what_it_is(tmp_path):
    done = in_folder(tmp_path, "x = 1 / 0\n")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "ZeroDivisionError: division by zero"


def test_a_module_that_lacks_another_says_which(tmp_path):
    done = in_folder(tmp_path, "import no_such_simulator\n")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2
    assert "No module named 'no_such_simulator'" in line


def test_a_module_that_is_not_there(tmp_path):
    done = in_folder(tmp_path, "", "--env-id", "not_there:Mine-v0")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2
    assert "No module named 'not_there'" in line and "can be imported" in line
