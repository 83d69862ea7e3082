"""Films: which games, how many pictures, how large, how fast; as they are seen, not as learned."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import imageio_ffmpeg
import numpy as np
import pytest
import torch

import ppo_atari
import ppo_continuous
import ppo_discrete
from conftest import train


class Screen(gym.Env):
    """Episodes of four steps. The picture shows the step by its brightness, 20 each."""

    observation_space = gym.spaces.Box(-1, 1, (3,), np.float32)
    metadata = {"render_modes": ["rgb_array"], "render_fps": 7}  # noqa: RUF012

    def __init__(self, actions, render_mode=None, broken=""):
        self.action_space, self.render_mode, self.broken = actions, render_mode, broken

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(3, np.float32), {}

    def step(self, action):
        self.t += 1
        return np.zeros(3, np.float32), 1.0, self.t == 4, False, {}

    def render(self):
        if self.broken == "raises":
            raise RuntimeError("no display")
        if self.broken == "is none":
            return None
        assert self.render_mode == "rgb_array"
        return np.full((64, 96, 3), 20 * self.t, np.uint8)


ACTIONS = {"ppo_discrete": gym.spaces.Discrete(3), "ppo_continuous": gym.spaces.Box(-1, 1, (2,))}
for kind, space in ACTIONS.items():
    gym.register(f"{kind}/Screen-v0", Screen, kwargs={"actions": space})
    for i, broken in enumerate(("raises", "is none")):
        how = {"actions": space, "broken": broken}
        gym.register(f"{kind}/NoScreen{i}-v0", Screen, kwargs=how)

scripts = pytest.mark.parametrize(
    "script", [ppo_discrete, ppo_continuous], ids=lambda script: script.__name__
)


def read(path):
    """Rate, size and pictures [n, height, width, 3] of a video."""
    reader = imageio_ffmpeg.read_frames(path)
    meta = next(reader)
    width, height = meta["size"]
    pictures = [np.frombuffer(x, np.uint8).reshape(height, width, 3) for x in reader]
    return meta["fps"], (width, height), np.stack(pictures)


def videos():
    (folder,) = Path().glob("runs/**/videos")
    return {path.name: path for path in folder.iterdir()}


def evaluate(script, *flags):
    (folder,) = [path.parent for path in Path().glob("runs/**/checkpoint.pt")]
    args = script.parse_args(["--evaluate", str(folder), "--capture-video", *flags])
    script.check_args(args)
    script.train(args)


@scripts
@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_games_of_the_first_environment_now_and_then(script, vectorization):
    """Numbers 0, 1 and 8 of the 16 that it plays; a picture before and after each action."""
    changes = {"env_id": f"{script.__name__}/Screen-v0", "vectorization": vectorization}
    train(script, capture_video=True, num_steps=32, total_timesteps=130, **changes)
    assert sorted(videos()) == [f"step-0-game-{n}.mp4" for n in (0, 1, 8)]
    for path in videos().values():
        fps, size, pictures = read(path)
        assert (fps, size, len(pictures)) == (7, (96, 64), 5)
        brightness = pictures.mean(axis=(1, 2, 3))
        assert brightness == pytest.approx([0, 20, 40, 60, 80], abs=3)


@scripts
def test_every_game_of_an_evaluation(script):
    train(script, env_id=f"{script.__name__}/Screen-v0")
    evaluate(script, "--eval-episodes", "5")
    expected = {f"evaluation-{i}-game-{n}.mp4" for i, n in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1))}
    assert expected <= set(videos())
    assert {len(read(path)[2]) for path in videos().values()} == {5}
    assert not [name for name in videos() if "unfinished" in name]


def test_a_run_that_goes_on_films_under_another_name():
    train(ppo_discrete, env_id="ppo_discrete/Screen-v0", capture_video=True)
    (folder,) = [path.parent for path in Path().glob("runs/**/checkpoint.pt")]
    flags = ["--resume", str(folder), "--total-timesteps", "128", "--capture-video"]
    ppo_discrete.train(ppo_discrete.parse_args(flags))
    assert {"step-0-game-0.mp4", "step-64-game-0.mp4"} <= set(videos())


def test_whole_games_of_atari_as_they_are_seen():
    """In colours and full size, 15 a second: one picture for four of the emulator."""
    gym.register_envs(ppo_atari.ale_py)
    kwargs = '{"max_num_frames_per_episode": 120}'
    changes = {"env_id": "PongNoFrameskip-v4", "env_kwargs": kwargs, "capture_video": True}
    train(ppo_atari, num_steps=32, total_timesteps=128, **changes)
    fps, size, pictures = read(videos()["step-0-game-0.mp4"])
    assert (fps, size) == (15, (160, 210))
    assert 20 <= len(pictures) <= 32
    red, _, blue = pictures[-1, 40:180].reshape(-1, 3).astype(int).T
    assert (red - blue).mean() > 20  # Pong is brown


def test_mujoco_without_a_screen(monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    kwargs = '{"max_episode_steps": 5, "width": 64, "height": 48}'
    changes = {"env_id": "InvertedPendulum-v5", "env_kwargs": kwargs, "capture_video": True}
    try:
        train(ppo_continuous, num_envs=1, **changes)
    except gym.error.Error as error:
        assert "EGL or OSMesa" in str(error)
        pytest.skip("neither EGL nor OSMesa")
    fps, size, pictures = read(videos()["step-0-game-0.mp4"])
    assert (fps, size) == (25, (64, 48))
    assert 3 <= len(pictures) <= 6
    assert pictures.std() > 5


@scripts
@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize(("number", "error"), [(0, "no display"), (1, ".*'NoneType'")])
def test_no_picture_is_one_line(script, vectorization, number, error, capfd):
    env_id = f"{script.__name__}/NoScreen{number}-v0"
    message = f"^{env_id}, environment 0, step 0: no picture, .* EGL or OSMesa .*: {error}$"
    with pytest.raises(gym.error.Error, match=message):
        train(script, env_id=env_id, capture_video=True, vectorization=vectorization)
    assert "Traceback" not in capfd.readouterr().err


def test_nothing_is_filmed_otherwise(monkeypatch):
    monkeypatch.setattr(Screen, "render", lambda self: 1 / 0)
    train(ppo_discrete, env_id="ppo_discrete/Screen-v0")
    assert not list(Path().glob("runs/**/videos"))


def test_videos_go_to_wandb(monkeypatch):
    """Each once, with the step at which it was complete, also by a run that is resumed."""
    sent = []
    run = SimpleNamespace(
        id="abc", log=sent.append, finish=lambda **kw: None, define_metric=lambda *a, **kw: None
    )
    fake = SimpleNamespace(init=lambda **kw: run, Error=KeyError, __spec__=True)
    fake.Video = lambda path: SimpleNamespace(path=path)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    train(ppo_discrete, env_id="ppo_discrete/Screen-v0", capture_video=True, track=True)
    rows = [row for row in sent if any(hasattr(x, "path") for x in row.values())]
    names = [key for row in rows for key in row if key != "global_step"]
    assert sorted(names) == ["step-0-game-0", "step-0-game-1"]
    assert all(
        re.search(r"videos/step-0-game-\d\.mp4$", row[k].path)
        for row, k in zip(rows, names, strict=True)
    )
    assert all(0 < row["global_step"] <= 64 for row in rows)
    sent.clear()
    (folder,) = [path.parent for path in Path().glob("runs/**/checkpoint.pt")]
    flags = ["--resume", str(folder), "--total-timesteps", "128", "--capture-video", "--track"]
    ppo_discrete.train(ppo_discrete.parse_args(flags))
    names = [key for row in sent for key, x in row.items() if hasattr(x, "path")]
    assert sorted(names) == ["step-64-game-0", "step-64-game-1"]


def test_videos_in_wandb_never_run_back(monkeypatch):
    """Not before what was sent until a kill; those of an evaluation meanwhile are not sent."""
    sent = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Video=str))
    envs = SimpleNamespace(num_envs=1, close=lambda: None)
    envs.unwrapped = SimpleNamespace(set_attr=lambda *args: None)
    agent = ppo_discrete.mlp(1, 1, 1.0)
    args = ppo_discrete.Args(capture_video=True)
    run = ppo_discrete.Run(args, torch.device("cpu"), envs, {"agent": agent})
    run.wandb, run.sent = SimpleNamespace(log=sent.append), 192
    for name in ("step-0-game-0", "evaluation-0-game-0", "step-0-game-1-unfinished"):
        (run.videos / f"{name}.mp4").touch()
    run.rows.append((160, 1.0, {"losses/loss": 1.0}))
    run.write()
    assert [{*row} for row in sent] == [{"global_step", "step-0-game-0"}]
    assert sent[0]["global_step"] == 192


def test_a_fault_with_a_video_that_was_not_sent_yet(monkeypatch):
    """In the step in which the game was over, before anything was logged: no other error."""
    envs = SimpleNamespace(num_envs=1, close=lambda: None)
    args = ppo_discrete.Args(capture_video=True)
    envs.unwrapped = SimpleNamespace(set_attr=lambda *args: None)
    agent = ppo_discrete.mlp(1, 1, 1.0)
    run = ppo_discrete.Run(args, torch.device("cpu"), envs, {"agent": agent})
    run.wandb = SimpleNamespace(log=None)
    (run.videos / "step-0-game-0.mp4").touch()
    with pytest.raises(SystemExit):
        run.stop("a fault")
    assert not run.rows
