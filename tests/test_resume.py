"""Runs that are stopped, killed and broken go on where the last checkpoint was."""

import functools
import itertools
import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch

import ppo_atari
import ppo_atari_lstm
import ppo_continuous
import ppo_discrete
from conftest import ROOT

SCRIPTS = {
    "discrete": (ppo_discrete, "CartPole-v1"),
    "continuous": (ppo_continuous, "Pendulum-v1"),
    "atari": (ppo_atari, "PongNoFrameskip-v4"),
    "atari_lstm": (ppo_atari_lstm, "PongNoFrameskip-v4"),
}


class Clock(gym.Env):
    """The same eight steps for ever, whatever the seed: observations, rewards from the step."""

    observation_space = gym.spaces.Box(-9, 9, (2,), np.float32)

    def __init__(self, action_space):
        self.action_space = action_space

    def observation(self):
        return np.float32([np.sin(self.t), self.t / 4])

    def reset(self, *, seed=None, options=None):
        self.t = 0
        return self.observation(), {}

    def step(self, action):
        self.t += 1
        return self.observation(), float(np.sum(action) * self.t), self.t == 8, False, {}


CLOCKS = {"discrete": gym.spaces.Discrete(3), "continuous": gym.spaces.Box(-1, 1, (2,))}
for kind, space in CLOCKS.items():
    gym.register(f"{kind}/Clock-v0", Clock, kwargs={"action_space": space})


def settings(name, **changes):
    small = {"num_steps": 16, "num_envs": 2, "num_minibatches": 2, "update_epochs": 2}
    plain = {"cuda": False, "torch_threads": 1, "vectorization": "sync", "checkpoint_every": 2}
    plain |= {"env_id": SCRIPTS[name][1], "total_timesteps": 6 * 32}
    plain |= {} if name == "atari_lstm" else {"compile": False}
    plain |= {"precision": "fp32"} if "atari" in name else {}
    return plain | small | changes


def train(name, **changes):
    """A run of six iterations. Returns the agent and its folder."""
    agent = SCRIPTS[name][0].train(SCRIPTS[name][0].Args(**settings(name, **changes)))
    folders = [path.parent for path in Path().glob("runs/**/checkpoint.pt")]
    return agent, max(folders, key=lambda path: (path / "checkpoint.pt").stat().st_mtime_ns)


def resume(name, folder, *flags):
    script = SCRIPTS[name][0]
    args = script.parse_args(["--resume", str(folder), *flags])
    script.check_args(args)
    return script.train(args)


def rows(folder):
    """Those of metrics.csv, without times."""
    lines = (folder / "metrics.csv").read_text().splitlines()
    assert lines[0] == "global_step,time,name,value"
    found = [line.split(",") for line in lines[1:]]
    assert all(len(row) == 4 for row in found)
    return [(int(step), metric, x) for step, _, metric, x in found if metric != "charts/SPS"]


def weights(agent):
    return torch.cat([x.detach().flatten() for x in agent.parameters()])


def interrupted(name, monkeypatch, **changes):
    """The folder of a run that was stopped after four of its six iterations."""
    script = SCRIPTS[name][0]
    ends = script.Run.end_iteration

    def end_iteration(run, iteration, *rest):
        run.signal = signal.SIGTERM if iteration == 4 else 0
        ends(run, iteration, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(script.Run, "end_iteration", end_iteration)
        with pytest.raises(SystemExit) as stopped:
            train(name, **changes)
    assert stopped.value.code == 143
    (saved,) = Path().glob("runs/**/checkpoint.pt")
    return saved.parent


def error_line(capsys, function, *args):
    with pytest.raises(SystemExit) as error:
        function(*args)
    assert error.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


# ------------------------------------------------------------------------------------------------
# The same run


@pytest.mark.parametrize(
    "name", [*list(SCRIPTS)[:3], pytest.param("atari_lstm", marks=pytest.mark.slow)]
)
def test_two_runs_resumed_from_one_checkpoint_are_the_same(name, monkeypatch):
    """Bit for bit, in another folder as well; the rows of the iterations are all there, once."""
    folder = interrupted(name, monkeypatch)
    other = Path(shutil.copytree(folder, "elsewhere"))
    agents = [resume(name, path) for path in (folder, other)]
    assert torch.equal(*map(weights, agents))
    assert rows(folder) == rows(other)
    steps = [step for step, metric, _ in rows(folder) if metric == "losses/loss"]
    assert steps == [32, 64, 96, 128, 160, 192]
    assert [x for x in Path().iterdir() if x.name not in ("runs", "elsewhere")] == []
    times = [float(x.split(",")[1]) for x in (folder / "metrics.csv").read_text().splitlines()[1:]]
    assert times == sorted(times)


@pytest.mark.parametrize("name", CLOCKS)
@pytest.mark.parametrize("penalty_kl", [None, 1e-4])
def test_resumed_equals_uninterrupted(name, penalty_kl, monkeypatch):
    """Where episodes end with an iteration, all is as if nothing had been: weights, moments, beta,
    learning rate, running statistics, all rows."""
    changes = {"env_id": f"{name}/Clock-v0", "penalty_kl": penalty_kl, "learning_rate": 1e-2}
    folder = interrupted(name, monkeypatch, **changes)
    agent = resume(name, folder)
    whole, other = train(name, **changes)
    assert other != folder
    assert torch.equal(weights(agent), weights(whole))
    assert rows(folder) == rows(other)
    one, two = [torch.load(x / "checkpoint.pt", weights_only=True) for x in (folder, other)]
    for key in ("seconds", "name", "metrics_bytes"):
        one.pop(key), two.pop(key)
    assert str(one) == str(two)
    assert (penalty_kl is None) == ("kl_coef" not in one)


def test_a_finished_run_is_extended(monkeypatch, capsys):
    """The learning rate follows the new total; what changed is said in one line each."""
    _, folder = train("discrete")
    capsys.readouterr()
    resume("discrete", folder, "--total-timesteps", "384", "--learning-rate", "0.001")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "--total-timesteps is 384, it was 192; what is annealed follows the new total"
    )
    assert lines[1] == "--learning-rate is 0.001, it was 0.00025"
    rates = [float(x) for _, metric, x in rows(folder) if metric == "charts/learning_rate"]
    expected = [2.5e-4 * (1 - i / 6) for i in range(6)] + [
        1e-3 * (1 - i / 12) for i in range(6, 12)
    ]
    assert rates == pytest.approx(expected)
    config = json.loads((folder / "config.json").read_text())
    assert config["total_timesteps"] == 192
    assert [x["total_timesteps"] for x in config["resumed"]] == [384]
    resume("discrete", folder)  # nothing is left to do
    assert len([1 for _, metric, _ in rows(folder) if metric == "losses/loss"]) == 12


def test_metrics_are_cut_between_rows_where_lines_end_in_two_characters(monkeypatch):
    """As on Windows, where text files write "\\r\\n" unless they are told otherwise."""

    def on_windows(file, mode="r", *args, newline=None, **kwargs):
        writes_text = mode in ("w", "a") and newline is None
        return open(file, mode, *args, newline="\r\n" if writes_text else newline, **kwargs)

    monkeypatch.setattr(Path, "open", on_windows)
    monkeypatch.setattr(ppo_discrete, "open", on_windows, raising=False)
    _, folder = train("discrete")
    before = (folder / "metrics.csv").read_bytes()
    assert b"\r" in (folder / "config.json").read_bytes()
    assert torch.load(folder / "checkpoint.pt")["metrics_bytes"] == len(before)
    resume("discrete", folder, "--total-timesteps", "256")
    assert (folder / "metrics.csv").read_bytes().startswith(before)


def test_the_first_observations_are_not_counted_twice(monkeypatch):
    folder = interrupted("continuous", monkeypatch)
    before = torch.load(folder / "checkpoint.pt", weights_only=True)["obs_count"].item()
    counts = []
    update = ppo_continuous.RunningMeanStd.update
    monkeypatch.setattr(
        ppo_continuous.RunningMeanStd,
        "update",
        lambda rms, x: counts.append((float(rms.count), len(x))) or update(rms, x),
    )
    resume("continuous", folder)
    assert counts[0] == (before, 2)
    assert before == pytest.approx(4 * 32 + 2, abs=1e-3)


def test_another_optimizer_moment_would_be_noticed(monkeypatch):
    """The test above fails without the moments of Adam: they matter here."""
    changes = {"env_id": "discrete/Clock-v0", "learning_rate": 1e-2}
    folder = interrupted("discrete", monkeypatch, **changes)
    spoiled = Path(shutil.copytree(folder, "spoiled"))
    data = torch.load(spoiled / "checkpoint.pt", weights_only=True)
    data["optimizer"]["state"][0]["exp_avg"] *= 0
    torch.save(data, spoiled / "checkpoint.pt")
    agents = [resume("discrete", path) for path in (folder, spoiled)]
    assert not torch.equal(*map(weights, agents))


# ------------------------------------------------------------------------------------------------
# Killed


def start(*flags, script="discrete", **kwargs):
    small = "--num-envs 2 --num-steps 64 --num-minibatches 2 --no-compile --no-cuda"
    command = [sys.executable, ROOT / f"ppo_{script}.py", *small.split(), *flags]
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, start_new_session=True, **how | kwargs)


def resumed():
    """How often a run has gone on, once its configuration is written."""
    for path in Path().glob("runs/*/config.json"):
        return len(json.loads(path.read_text()).get("resumed", []))
    return -1


def killed_again_and_again(times, iterations):
    rng = np.random.default_rng(times)
    total = 128 * iterations
    flags = ["--total-timesteps", str(total), "--checkpoint-every", "3"]
    process = start(*flags)
    for n in range(times):
        end = time.time() + 60
        while not ([*Path().glob("runs/*/checkpoint.pt")] and resumed() == n) and time.time() < end:
            time.sleep(0.05)
        time.sleep(rng.uniform(0.0, 0.5))
        process.kill()
        assert process.wait() == -signal.SIGKILL
        (folder,) = Path().glob("runs/*")
        process = start("--resume", str(folder))
    stdout, stderr = process.communicate(timeout=100)
    assert process.returncode == 0, stderr
    assert stdout.splitlines()[-1] == f"written to {folder}"
    steps = [step for step, metric, _ in rows(folder) if metric == "losses/loss"]
    assert steps == list(range(128, total + 1, 128))
    (rate,) = {
        x for step, metric, x in rows(folder) if (step, metric) == (total, "charts/learning_rate")
    }
    assert float(rate) == pytest.approx(2.5e-4 / iterations)
    assert resumed() == times


def test_killed_three_times():
    killed_again_and_again(3, iterations=200)


@pytest.mark.slow
def test_killed_twenty_times():
    killed_again_and_again(20, iterations=500)


def test_killed_in_the_middle_of_a_save(monkeypatch):
    """Between write and rename: the checkpoint before is there, and the run goes on from it."""

    class KilledError(BaseException):
        pass

    replace, calls = os.replace, itertools.count()

    def kill(*args):
        if next(calls) == 2:  # the first is that of config.json
            raise KilledError
        return replace(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", kill)
        with pytest.raises(KilledError):
            train("discrete")
    (folder,) = Path().glob("runs/*")
    assert sorted(x.name for x in folder.glob("checkpoint*")) == ["checkpoint.pt", "checkpoint.tmp"]
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["iteration"] == 2
    resume("discrete", folder)
    assert [x.name for x in folder.glob("checkpoint*")] == ["checkpoint.pt"]
    steps = [step for step, metric, _ in rows(folder) if metric == "losses/loss"]
    assert steps == [32, 64, 96, 128, 160, 192]


def test_a_configuration_is_whole_whenever_a_run_is_killed(monkeypatch):
    """In the middle of the write that notes what resumes it."""
    _, folder = train("discrete")
    write_text = Path.write_text

    class KilledError(BaseException):
        pass

    def killed(path, text, **kwargs):
        write_text(path, text[:50], **kwargs)
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", killed)
        with pytest.raises(KilledError):
            resume("discrete", folder, "--total-timesteps", "224")
    assert "resumed" not in json.loads((folder / "config.json").read_text())
    resume("discrete", folder, "--total-timesteps", "224")
    assert len(json.loads((folder / "config.json").read_text())["resumed"]) == 1
    assert not list(folder.glob("*.tmp"))


def test_metrics_are_on_the_disk_before_the_checkpoint_that_counts_on_them(monkeypatch):
    """Or after a power cut it would speak of rows that are not there."""
    synced, fsync, replace = [], os.fsync, os.replace
    path = "/proc/self/fd/{}"

    def replaced(source, target):
        synced.append(Path(target).name)
        replace(source, target)

    def spy(number):
        synced.append(Path(os.readlink(path.format(number))).name)
        fsync(number)

    monkeypatch.setattr(os, "fsync", spy)
    monkeypatch.setattr(os, "replace", replaced)
    train("discrete", checkpoint_every=6)
    assert synced == ["config.json", "metrics.csv", "checkpoint.tmp", "checkpoint.pt"]


def test_a_disk_that_is_full(monkeypatch):
    """One line; the checkpoint before and the rows that were complete are as they were."""
    folder = interrupted("discrete", monkeypatch, num_steps=64, total_timesteps=6 * 128)
    before = (folder / "checkpoint.pt").read_bytes()
    half = (len(before) // 2, len(before) // 2)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, half)  # noqa: E731
    process = start("--resume", str(folder), preexec_fn=limit)
    _, stderr = process.communicate(timeout=100)
    assert process.returncode == 2
    assert (folder / "checkpoint.pt").read_bytes() == before
    (line,) = stderr.splitlines()
    assert re.match("error: .* cannot be written to: ", line)
    assert not (folder / "checkpoint.tmp").exists()
    assert (folder / "metrics.csv").read_bytes().endswith(b"\n")


@pytest.mark.slow
def test_metrics_are_whole_where_the_disk_is_full(tmp_path):
    limit = (100_000, 100_000)  # of each file: metrics.csv reaches it first
    process = start(
        "--total-timesteps",
        "1280000",
        "--checkpoint-every",
        "100000",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
    )
    _, stderr = process.communicate(timeout=100)
    assert process.returncode == 2
    (line,) = stderr.splitlines()
    assert re.match("error: .* cannot be written to: .*; last good checkpoint: none yet", line)
    (folder,) = Path().glob("runs/*")
    assert len(rows(folder)) > 100
    assert (folder / "metrics.csv").read_bytes().endswith(b"\n")


def stopped(function, *args, error=OSError, **kwargs):
    """As the end of the script does where something cannot be written."""
    with pytest.raises(error) as caught:
        function(*args, **kwargs)
    with pytest.raises(SystemExit) as ended:
        ppo_discrete.Run.now.stop(f"cannot be written to: {caught.value}")
    assert ended.value.code == 2


class Full:
    """A file on a disk that is full in the middle of a text."""

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, text):
        self.file.write(text[: len(text) // 2])
        raise OSError(28, "No space left on device")


@pytest.mark.slow
def test_writing_a_checkpoint_takes_less_than_a_percent(monkeypatch):
    """Of the time between two, here of an Atari run as it is by default, but for compilation."""
    written, ends, save = [], [], ppo_atari.Run.save_checkpoint
    end_iteration = ppo_atari.Run.end_iteration

    def timed(run, iteration):
        start = time.perf_counter()
        save(run, iteration)
        written.append(time.perf_counter() - start)

    def end(run, *rest):
        ends.append(time.perf_counter())
        end_iteration(run, *rest)

    monkeypatch.setattr(ppo_atari.Run, "save_checkpoint", timed)
    monkeypatch.setattr(ppo_atari.Run, "end_iteration", end)
    default = ppo_atari.Args(
        cuda=False, compile=False, checkpoint_every=1, total_timesteps=6 * 1024
    )
    ppo_atari.train(default)
    iteration = np.median(np.diff(ends)) - np.median(written)
    assert np.median(written) < 0.01 * ppo_atari.Args.checkpoint_every * iteration


@pytest.mark.parametrize("for_good", [False, True])
def test_metrics_are_whole_where_the_disk_is_full_for_a_moment(for_good, monkeypatch):
    """The rows of the iteration that could not be written are there once, or not at all."""
    train("discrete", exp_name="whole")
    opened = []

    def full(path, mode="r", **kwargs):
        file = open(path, mode, **kwargs)
        opened.append(mode == "a" and kwargs != {})
        third = opened.count(True) == 3 or (for_good and opened.count(True) > 3)
        return Full(file) if opened[-1] and third else file

    monkeypatch.setattr(ppo_discrete, "open", full, raising=False)
    stopped(train, "discrete")
    whole, partly = (rows(next(Path().glob(f"runs/*__{x}__*"))) for x in ("whole", "ppo_discrete"))
    last = 64 if for_good else 96
    without_times = [row for row in whole if row[0] <= last]
    assert [row[:2] for row in partly] == [row[:2] for row in without_times]


def test_a_folder_that_is_gone(monkeypatch, capsys):
    ends = ppo_discrete.Run.end_iteration

    def end_iteration(run, iteration, *rest):
        if iteration == 3:
            shutil.rmtree(run.folder)
        ends(run, iteration, *rest)

    monkeypatch.setattr(ppo_discrete.Run, "end_iteration", end_iteration)
    stopped(train, "discrete")
    (line,) = capsys.readouterr().err.splitlines()
    assert "metrics.csv" in line


@pytest.mark.parametrize("mode", ["a", "wb"])
def test_a_folder_that_is_read_only_now(mode, monkeypatch, capsys):
    """Rows and checkpoint as they were before."""
    folder = interrupted("discrete", monkeypatch)
    before = (folder / "checkpoint.pt").read_bytes(), (folder / "metrics.csv").read_bytes()

    def read_only(path, how="r", **kwargs):
        if how == mode:
            raise OSError(30, "Read-only file system", str(path))
        return open(path, how, **kwargs)

    monkeypatch.setattr(ppo_discrete, "open", read_only, raising=False)
    capsys.readouterr()
    stopped(resume, "discrete", folder)
    (line,) = capsys.readouterr().err.splitlines()
    assert "Read-only file system" in line
    assert line.endswith(f"; last good checkpoint: {folder}/checkpoint.pt")
    assert (folder / "checkpoint.pt").read_bytes() == before[0]
    assert (folder / "metrics.csv").read_bytes().startswith(before[1])
    assert rows(folder)


def test_a_folder_that_is_read_only_when_a_run_goes_on(monkeypatch, capsys):
    folder = interrupted("discrete", monkeypatch)

    def read_only(path, text, **kwargs):
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "write_text", read_only)
    capsys.readouterr()
    line = error_line(capsys, resume, "discrete", folder)
    assert line.startswith("error: a run needs a folder to write to: ")


def test_what_a_power_cut_may_leave(monkeypatch, capsys):
    """Rows behind the checkpoint that are half or empty are no matter; a lost config.json is."""
    folder = interrupted("discrete", monkeypatch, track=False)
    whole = (folder / "metrics.csv").read_bytes()
    for rest in (b"\n", b"160,1.5", b"\0" * 50, b"160,1.2,losses/loss,0.1\n\n1"):
        (folder / "metrics.csv").write_bytes(whole + rest)
        copy = Path(shutil.copytree(folder, f"copy-{len(rest)}"))
        resume("discrete", copy)
        steps = [step for step, metric, _ in rows(copy) if metric == "losses/loss"]
        assert steps == [32, 64, 96, 128, 160, 192]
    (folder / "config.json").write_text("")
    capsys.readouterr()
    line = error_line(capsys, resume, "discrete", folder)
    assert line.startswith("error: a run needs a folder to write to: ")


@pytest.mark.parametrize(
    "name",
    [
        "discrete",
        "continuous",
        *[pytest.param(x, marks=pytest.mark.slow) for x in list(SCRIPTS)[2:]],
    ],
)
def test_a_folder_copied_while_its_run_wrote_to_it(name, monkeypatch, capsys):
    """metrics.csv is older than checkpoint.pt: its whole rows stay, others follow."""
    folder = interrupted(name, monkeypatch)
    whole = (folder / "metrics.csv").read_bytes()
    half = whole[: len(whole) // 2]
    assert not half.endswith(b"\n")
    (folder / "metrics.csv").write_bytes(half)
    capsys.readouterr()
    resume(name, folder)
    said = f"{folder}/metrics.csv lacks rows from before the checkpoint"
    assert capsys.readouterr().out.splitlines()[0] == said
    now = (folder / "metrics.csv").read_bytes()
    kept = half[: half.rindex(b"\n") + 1]
    assert now.startswith(kept) and b"\0" not in now
    steps = [int(line.split(b",")[0]) for line in now[len(kept) :].splitlines()]
    assert min(steps) > 128 and max(steps) == 192


# ------------------------------------------------------------------------------------------------
# Refused


@pytest.mark.parametrize(
    ("flags", "hint"),
    [
        (["--gamma", "0.9"], "--gamma is 0.9, it was 0.99; that is another run than"),
        (["--env-id", "Acrobot-v1"], "--env-id is Acrobot-v1, it was CartPole-v1; that is another"),
        (["--num-envs", "4"], "--num-envs is 4, it was 2"),
        (["--seed", "2"], "--seed is 2, it was 1"),
        (["--no-norm-adv"], "--norm-adv is False, it was True"),
    ],
)
def test_what_may_not_change(flags, hint, monkeypatch, capsys):
    folder = interrupted("discrete", monkeypatch)
    capsys.readouterr()
    line = error_line(capsys, ppo_discrete.parse_args, ["--resume", str(folder), *flags])
    assert hint in line


def test_what_may_change(monkeypatch, capsys):
    folder = interrupted("discrete", monkeypatch)
    capsys.readouterr()
    flags = ["--torch-threads", "2", "--checkpoint-every", "7", "--vectorization", "async"]
    resume("discrete", folder, *flags)
    assert capsys.readouterr().out.splitlines()[:3] == [
        "--torch-threads is 2, it was 1",
        "--checkpoint-every is 7, it was 2",
        "--vectorization is async, it was sync",
    ]


class Malicious:
    def __reduce__(self):
        return (os.mkdir, ("hacked",))


def broken(how, folder):
    path = folder / "checkpoint.pt"
    data = torch.load(path, weights_only=True)
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("no checkpoint")
    elif how == "missing":
        path.unlink()
    elif how == "of a newer version":
        torch.save(data | {"version": 2}, path)
    elif how == "of something else":
        torch.save({"model": data["agent"]}, path)
    elif how == "with another flag":
        torch.save(data | {"args": data["args"] | {"colour": 1}}, path)
    elif how == "malicious":
        path.write_bytes(pickle.dumps(Malicious()))
    elif how == "malicious, in a checkpoint":
        torch.save(data | {"x": Malicious()}, path)


BROKEN = ["truncated", "empty", "text", "missing", "of a newer version", "of something else"]
BROKEN += ["with another flag", "malicious", "malicious, in a checkpoint"]


@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
def test_what_is_no_checkpoint(how, flag, monkeypatch, capsys):
    """Also one that would do something else when it is loaded."""
    folder = interrupted("discrete", monkeypatch)
    broken(how, folder)
    capsys.readouterr()
    line = error_line(capsys, ppo_discrete.parse_args, [flag, str(folder)])
    assert f"error: {folder}/checkpoint.pt is no checkpoint of this script: " in line
    assert not Path("hacked").exists()


@pytest.mark.parametrize("other", ["continuous", "atari", "atari_lstm"])
def test_the_checkpoint_of_another_script(other, monkeypatch, capsys):
    folder = interrupted(other, monkeypatch)
    capsys.readouterr()
    script = ppo_atari if other == "atari_lstm" else ppo_discrete

    def go_on():
        args = script.parse_args(["--resume", str(folder)])
        script.check_args(args)
        script.train(args)

    line = error_line(capsys, go_on)
    words = ["no checkpoint of this script", "ppo_continuous.py has", "does not fit this script"]
    assert any(word in line for word in words), line


# ------------------------------------------------------------------------------------------------
# Signals


def children(process):
    """Processes of the session that a run started."""
    found = subprocess.run(
        ["ps", "-s", str(process.pid), "-o", "pid="], capture_output=True, check=False
    )
    return found.stdout.decode().split()


@pytest.mark.parametrize(
    ("number", "everyone", "name"),
    [
        (signal.SIGINT, True, "discrete"),
        (signal.SIGTERM, False, "discrete"),
        pytest.param(signal.SIGINT, False, "discrete", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, True, "discrete", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, True, "atari", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, False, "atari", marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_a_run_after_its_iteration(number, everyone, name):
    """With a checkpoint, the command to go on and the signal as exit code; nobody is left over."""
    flags = ["--total-timesteps", "10000000", "--vectorization", "async", "--env-id"]
    process = start(*flags, SCRIPTS[name][1], script=name)
    while not list(Path().glob("runs/*/metrics.csv")):
        time.sleep(0.05)
    time.sleep(1.0)
    (os.killpg if everyone else os.kill)(process.pid, number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    greeting = r"A\.L\.E: .+\n\[Powered by Stella\]\n"  # of the emulator
    assert re.sub(greeting, "", stderr) == ""
    (folder,) = Path().glob("runs/*")
    *_, written, command = stdout.splitlines()
    assert written == f"written to {folder}"
    assert command == f"to go on: python {ROOT / f'ppo_{name}.py'} --resume '{folder}'"
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert rows(folder)[-1][0] == saved["global_step"] > 0
    assert children(process) == []


@pytest.mark.slow
def test_a_signal_while_the_first_iteration_compiles(tmp_path):
    """Nothing was compiled before on this machine, as it were."""
    command = [sys.executable, ROOT / "ppo_discrete.py", "--total-timesteps", "10000000"]
    fresh = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    fresh.pop("TORCHDYNAMO_DISABLE", None)
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": fresh}
    process = subprocess.Popen([*command, "--no-cuda"], start_new_session=True, **how)
    while not list(Path().glob("runs/*/metrics.csv")):
        time.sleep(0.05)
    time.sleep(1.0)
    (folder,) = Path().glob("runs/*")
    assert not rows(folder)
    os.killpg(process.pid, signal.SIGINT)
    stdout, stderr = process.communicate(timeout=300)
    assert (process.returncode, stderr) == (130, "")
    assert stdout.splitlines()[-1].startswith("to go on: ")
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["iteration"] == 1
    assert (tmp_path / "cache").exists()
    assert children(process) == []


def test_a_second_signal_does_not_wait():
    flags = ["--total-timesteps", "10000000", "--num-steps", "100000", "--vectorization", "async"]
    process = start(*flags)
    while not list(Path().glob("runs/*/metrics.csv")):
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == -signal.SIGINT
    end = time.time() + 10
    while children(process) and time.time() < end:
        time.sleep(0.1)
    assert children(process) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_is_for_the_process_that_learns(number):
    """The environments' processes get it, too, go on, and end when they are told to."""
    settings = {"env_id": "CartPole-v1", "num_envs": 2, "vectorization": "async"}
    envs = ppo_discrete.make_envs(ppo_discrete.Args(**settings))
    envs.reset(seed=[1, 2])
    for process in envs.processes:
        os.kill(process.pid, number)
    time.sleep(0.3)
    for _ in range(3):
        _, rewards, *_ = envs.step(np.zeros((2, 1), int))
        assert list(rewards) == [1, 1]
    processes = envs.processes
    envs.close()
    assert [process.exitcode for process in processes] == [0, 0]


@pytest.mark.parametrize(("raised_in", "last"), [(3, 4), (6, 6)])
def test_a_signal_while_ranks_exchange_what_they_have_is_not_lost(raised_in, last, monkeypatch):
    """It counts in the next iteration; after the last of the six, for the exit code."""
    iterations, of_all_ranks = [], ppo_discrete.of_all_ranks

    def exchange(x):
        if isinstance(x, tuple):  # at the end of an iteration
            iterations.append(x[0])
            if len(iterations) == raised_in:
                signal.raise_signal(signal.SIGTERM)
        return of_all_ranks(x)

    monkeypatch.setattr(ppo_discrete, "of_all_ranks", exchange)
    with pytest.raises(SystemExit) as ended:
        train("discrete")
    assert ended.value.code == 143
    assert iterations == [0] * raised_in + [15] * (last - raised_in)
    (path,) = Path().glob("runs/*/checkpoint.pt")
    assert torch.load(path, weights_only=True)["iteration"] == last


@pytest.mark.parametrize("vectorization", ["sync", pytest.param("async", marks=pytest.mark.slow)])
def test_ctrl_c_ends_an_evaluation(vectorization):
    """At once, without a traceback, a table or half a video."""
    _, folder = train("discrete")
    flags = ["--evaluate", str(folder), "--eval-episodes", "1000000", "--capture-video"]
    flags += ["--vectorization", vectorization]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, ROOT / "ppo_discrete.py", *flags]
    process = subprocess.Popen(command, start_new_session=True, **pipe)
    while not list(folder.glob("videos/*0.mp4")) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in err and "episodes" not in out
    assert not list(folder.glob("videos/*unfinished*")) and not (folder / "eval.csv").exists()
    assert children(process) == []


def test_handlers_are_as_they_were():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    train("discrete")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


# ------------------------------------------------------------------------------------------------
# Environments in processes of their own

FAULT = """
import os, time
import gymnasium as gym
import numpy as np

class Fault(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (3,), np.float32)
    action_space = gym.spaces.Discrete(3)
    steps = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(3, np.float32), {{}}

    def step(self, action):
        self.steps += 1
        if self.steps == 200 and self.np_random.random() >= 0:
            {what}
        return np.zeros(3, np.float32), 1.0, self.steps % 5 == 0, False, {{}}

gym.register("Fault-v0", Fault)
"""
FAULTS = {
    "dies": ("os._exit(3)", "environment [01], step 200: its process has ended, exit code 3"),
    "is killed": ("os.kill(os.getpid(), 9)", "environment [01], step 200: its process .* code -9"),
    "hangs": ("time.sleep(1000)", "environment 0, step 200: no answer in 2 seconds, --env-timeout"),
    "closes its pipe": ("os.closerange(3, 256)", "environment [01], step 200: its process has"),
    "raises": ("raise OSError('100%', 2)", r"Fault-v0, environment [01], step 200: OSError: "),
}


def failure(*flags, **kwargs):
    """What a run that has to fail says on stderr; nobody is left over."""
    process = start(*flags, **kwargs)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2
    assert children(process) == []
    return stderr


@pytest.mark.parametrize(
    "name",
    ["dies", "hangs", "raises"]
    + [pytest.param(x, marks=pytest.mark.slow) for x in ("is killed", "closes its pipe")],
)
def test_an_environment_that_fails_ends_the_run(name):
    """In one line, with its index, the step and the last good checkpoint; nobody is left over."""
    what, message = FAULTS[name]
    Path("fault.py").write_text(FAULT.format(what=what))
    flags = ["--env-id", "fault:Fault-v0", "--vectorization", "async", "--env-timeout", "2"]
    *before, line = failure(*flags, "--checkpoint-every", "1").splitlines()
    (saved,) = Path().glob("runs/*/checkpoint.pt")
    assert re.match(f"error: {message}", line), line
    assert line.endswith(f"; last good checkpoint: {saved}")
    assert bool(before) == (name == "raises")


def test_an_environment_that_dies_before_its_first_observation():
    source = FAULT.format(what="pass").replace(
        "        super().reset(seed=seed)\n",
        "        super().reset(seed=seed)\n        import multiprocessing\n"
        "        if multiprocessing.parent_process():\n            os._exit(4)\n",
    )
    Path("fault.py").write_text(source)
    stderr = failure("--env-id", "fault:Fault-v0", "--vectorization", "async")
    words = "environment [01], step 0: its process has ended, exit code 4"
    assert re.fullmatch(f"error: {words}; last good checkpoint: none yet\n", stderr)


def test_more_processes_than_files_may_be_open():
    """One line, although there is no run yet that could stop."""
    flags = ["--vectorization", "async", "--num-envs", "64"]
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_NOFILE, (90, 90))
    assert failure(*flags, preexec_fn=limit) == "error: [Errno 24] Too many open files\n"


def test_no_time_limit_for_a_step():
    settings = {"env_id": "CartPole-v1", "num_envs": 1, "vectorization": "async"}
    envs = ppo_discrete.make_envs(ppo_discrete.Args(**settings, env_timeout=np.inf))
    assert envs.reset(seed=[1])[0].shape == (1, 6)
    envs.close()


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("raise KeyError('no licence')", "its process has ended, exit code 1"),
        pytest.param(
            *("time.sleep(1000)", "no answer in 2 seconds, --env-timeout"), marks=pytest.mark.slow
        ),
    ],
)
def test_an_environment_that_cannot_be_made_in_its_process(what, words):
    """What happened there, then one line; nobody is left over."""
    source = FAULT.format(what="pass").replace(
        "    steps = 0\n",
        "    steps = 0\n\n    def __init__(self):\n        import multiprocessing\n"
        f"        if multiprocessing.parent_process():\n            {what}\n",
    )
    Path("fault.py").write_text(source)
    flags = ["--env-id", "fault:Fault-v0", "--vectorization", "async", "--env-timeout", "2"]
    stderr = failure(*flags)
    assert ("KeyError: 'no licence'" in stderr) == ("licence" in what)
    assert re.fullmatch(f"error: environment [01], step 0: {words}", stderr.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("context", ["spawn", "forkserver"])
def test_other_ways_to_start_processes(context):
    """As on Windows and macOS, and on Linux from Python 3.14."""
    code = f"""
import multiprocessing, runpy, sys
if __name__ == "__main__":
    multiprocessing.set_start_method({context!r})
    sys.argv = ["ppo_discrete.py", *"--vectorization async --num-envs 2 --no-compile".split()]
    sys.argv += "--no-cuda --num-steps 64 --num-minibatches 2 --total-timesteps 256".split()
    runpy.run_path({str(ROOT / "ppo_discrete.py")!r}, run_name="__main__")
"""
    Path("start.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "start.py"], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(list(Path().glob("runs/*/checkpoint.pt"))) == 1


def resources(processes):
    """Memory in MB, of a process that of its own alone, and open files of all."""
    folders = [Path(f"/proc/{pid}") for pid in (os.getpid(), *(x.pid for x in processes))]
    pages = [(path / "statm").read_text().split() for path in folders]
    memory = sum(int(resident) - int(shared) for _, resident, shared, *_ in pages)
    return memory * 4096 / 1e6, sum(len(list((path / "fd").iterdir())) for path in folders)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
def test_ten_thousand_episodes_leave_nothing_behind(monkeypatch):
    """Of one step each, in two processes: as many files, and no more memory than at a tenth."""
    seen, ends = [], ppo_discrete.Run.end_iteration

    def end_iteration(run, *args):
        ends(run, *args)
        seen.append(resources(run.envs.processes))

    monkeypatch.setattr(ppo_discrete.Run, "end_iteration", end_iteration)
    changes = {"env_id": "Guess-v0", "vectorization": "async", "num_steps": 128}
    _, folder = train("discrete", total_timesteps=10_240, **changes)
    assert len([1 for _, metric, _ in rows(folder) if metric == "charts/episodic_return"]) == 10_240
    memory, files = np.transpose(seen)
    assert len(memory) == 40
    assert set(files[4:]) == {files[4]}
    assert memory[-1] - memory[4] < 0.5  # 0.03 in three tries


# ------------------------------------------------------------------------------------------------
# W&B


class FakeWandb(SimpleNamespace):
    """What is asked of wandb.init, and what is logged."""

    class Error(Exception):
        pass

    __spec__ = True

    def __init__(self):
        super().__init__(calls=[], sent=[], codes=[])

    def init(self, **kwargs):
        self.calls.append(kwargs)
        nothing = lambda *a, **kw: None  # noqa: E731

        def finish(exit_code):
            self.codes.append(exit_code)

        name = kwargs["id"] or f"new-{len(self.calls)}"
        return SimpleNamespace(id=name, log=self.sent.append, finish=finish, define_metric=nothing)


def test_a_wandb_run_is_found_again_after_a_part_without_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", fake := FakeWandb())
    _, folder = train("discrete", track=True)
    resume("discrete", folder, "--total-timesteps", "256", "--no-track")
    assert len(fake.calls) == 1
    resume("discrete", folder, "--total-timesteps", "320", "--track")
    assert [call["id"] for call in fake.calls] == [None, "new-1"]
    steps = [row["global_step"] for row in fake.sent if "losses/loss" in row]
    assert steps == [32, 64, 96, 128, 160, 192, 288, 320]


def test_wandb_is_told_how_a_run_has_ended(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", fake := FakeWandb())
    folder = interrupted("discrete", monkeypatch, track=True)
    resume("discrete", folder)
    assert fake.codes == [143, 0]


def test_wandb_gets_all_that_follows_a_run_without_it_that_was_killed(monkeypatch):
    """Rows behind its checkpoint were never sent."""
    monkeypatch.setitem(sys.modules, "wandb", fake := FakeWandb())
    folder = interrupted("discrete", monkeypatch)
    with open(folder / "metrics.csv", "a") as file:
        file.write("160,1.0,losses/loss,0.1\n")
    resume("discrete", folder, "--track")
    assert [row["global_step"] for row in fake.sent if "losses/loss" in row] == [160, 192]


def test_a_wandb_run_goes_on_and_no_curve_runs_back(monkeypatch):
    """Under its id; steps that were sent before the kill are not sent again."""
    monkeypatch.setitem(sys.modules, "wandb", fake := FakeWandb())
    calls, sent = fake.calls, fake.sent
    ends = ppo_discrete.Run.end_iteration

    class KilledError(BaseException):
        pass

    def killed(*_):
        raise KilledError

    def end_iteration(run, iteration, *rest):
        if iteration == 3 and run.args.resume:
            raise KilledError  # before it has written what the first had sent
        ends(run, iteration, *rest)
        if iteration == 3:
            raise KilledError  # one iteration after the checkpoint

    with monkeypatch.context() as patch:
        patch.setattr(ppo_discrete.Run, "end_iteration", end_iteration)
        with pytest.raises(KilledError):
            train("discrete", track=True)
        (folder,) = Path().glob("runs/*")
        before = [row["global_step"] for row in sent]
        assert before[-1] == 96
        sent.clear()
        for name in ("replace", "truncate"):  # killed while it takes the folder up again
            with monkeypatch.context() as taken_up, pytest.raises(KilledError):
                taken_up.setattr(os, name, killed)
                resume("discrete", folder)
        with pytest.raises(KilledError):
            resume("discrete", folder)
    assert sent == []
    resume("discrete", folder)
    assert calls[0]["id"] is None
    for call in calls[1:]:
        again = call["id"], call["resume"], call["name"]
        assert again == ("new-1", "allow", calls[0]["name"])
    steps = [row["global_step"] for row in sent]
    assert steps == sorted(steps) and steps[0] > 96 and steps[-1] == 192
    assert [step for step, metric, _ in rows(folder) if metric == "losses/loss"][2] == 96


# ------------------------------------------------------------------------------------------------
# Evaluation


def evaluate(name, folder, capsys, *flags):
    script = SCRIPTS[name][0]
    capsys.readouterr()
    args = script.parse_args(["--evaluate", str(folder), *flags])
    script.check_args(args)
    script.train(args)
    lines = (folder / "eval.csv").read_text().splitlines()
    assert lines[0] == "environment,episodic_return,episodic_length"
    return capsys.readouterr().out.splitlines(), [line.split(",") for line in lines[1:]]


@pytest.mark.parametrize(
    "name",
    ["discrete", "continuous", "atari", pytest.param("atari_lstm", marks=pytest.mark.slow)],
)
def test_evaluation(name, capsys):
    """Whole games, a table and a row for each; nothing else in the folder changes."""
    quick = {"env_kwargs": '{"max_num_frames_per_episode": 200}'} if "atari" in name else {}
    _, folder = train(name, **quick)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    table, episodes = evaluate(name, folder, capsys, "--eval-episodes", "5")
    assert {x: x.read_bytes() for x in folder.iterdir() if x.name != "eval.csv"} == before
    assert sorted(row[0] for row in episodes) == ["0", "0", "0", "1", "1"]
    returns = np.array([float(row[1]) for row in episodes])
    numbers = f"mean {returns.mean():.2f} std {returns.std():.2f} median {np.median(returns):.2f}"
    assert table[1] == f"return  {numbers} min {returns.min():.2f} max {returns.max():.2f}"
    assert re.fullmatch(r"5 episodes, \d+\.\d\d a second", table[0])
    assert evaluate(name, folder, capsys, "--eval-episodes", "5")[1] == episodes
    modes = [evaluate(name, folder, capsys, "--deterministic")[1] for _ in range(2)]
    assert modes[0] == modes[1]
    assert len(modes[0]) == 10
    if name == "continuous":  # which no two games end alike
        assert modes[0] != evaluate(name, folder, capsys)[1]


def test_a_table_although_it_cannot_be_written(capsys):
    _, folder = train("discrete")
    (folder / "eval.csv").mkdir()
    args = ppo_discrete.parse_args(["--evaluate", str(folder)])
    capsys.readouterr()
    stopped(ppo_discrete.train, args)
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == ["10", "return", "length"]
    assert len(err.splitlines()) == 1 and "eval.csv" in err


@pytest.mark.parametrize(
    "name", [*list(SCRIPTS)[:3], pytest.param("atari_lstm", marks=pytest.mark.slow)]
)
def test_the_games_of_an_evaluation_have_seeds_of_their_own(name, capsys, monkeypatch):
    """Others than those of training, each environment another."""
    if "atari" in name:
        game, quick = SCRIPTS[name][0].AtariPreprocessing, {}
        quick = {"env_kwargs": '{"max_num_frames_per_episode": 200}'}
        function = "start_game"
    else:
        game, quick, function = SCRIPTS[name][0].Watched, {}, "reset"
    seeds, start_game = [], getattr(game, function)

    def spy(env, **kwargs):
        if kwargs.get("seed") is not None:
            seeds.append(kwargs["seed"])
        return start_game(env, **kwargs)

    monkeypatch.setattr(game, function, spy)
    _, folder = train(name, **quick)
    sequences = [np.random.SeedSequence([1, 0, n]) for n in range(100)]
    of_training = {seed for x in sequences for seed in x.generate_state(2).tolist()}
    assert {*seeds} <= of_training
    seeds.clear()
    evaluate(name, folder, capsys, "--eval-episodes", "2")
    assert len({*seeds}) == len(seeds) >= 2
    assert not {*seeds} & of_training


def test_short_episodes_are_not_preferred(capsys):
    """As many of each environment, or those of the quick ones would count more."""

    class Lengths(Clock):
        def step(self, action):
            self.t += 1
            return self.observation(), 1.0, self.t == self.length, False, {}

        def reset(self, *, seed=None, options=None):
            if seed is not None:
                self.length = 2 if seed % 2 else 40
            return super().reset(seed=seed)

    gym.register("Lengths-v0", Lengths, kwargs={"action_space": gym.spaces.Discrete(3)})
    _, folder = train("discrete", env_id="Lengths-v0", num_envs=8, num_minibatches=4)
    _, episodes = evaluate("discrete", folder, capsys, "--eval-episodes", "16")
    counts = np.bincount([int(row[0]) for row in episodes])
    assert counts.tolist() == [2] * 8
    assert {row[2] for row in episodes} == {"2", "40"}


def test_statistics_are_frozen(capsys, monkeypatch):
    _, folder = train("continuous")
    made, make_envs = [], ppo_continuous.make_envs
    monkeypatch.setattr(
        ppo_continuous, "make_envs", lambda args: made.append(make_envs(args)) or made[-1]
    )
    evaluate("continuous", folder, capsys, "--eval-episodes", "2")
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    np.testing.assert_array_equal(made[-1].obs_rms.mean, saved["obs_mean"].numpy())
    assert made[-1].obs_rms.count == saved["obs_count"]
    assert made[-1].return_rms.count == saved["return_count"]


def test_the_mode_is_played(capsys, monkeypatch):
    """Of a policy that knows what to do, but not for sure."""
    _, folder = train("discrete", env_id="Guess-v0")
    path = folder / "checkpoint.pt"
    data = torch.load(path, weights_only=True)
    for key, x in data["agent"].items():
        x.zero_()
        if key == "actor.0.weight" or key == "actor.2.weight":
            x[:4, :4] = torch.eye(4)
        if key == "actor.4.weight":
            x[:4, :4] = 2 * torch.eye(4)
    torch.save(data, path)
    _, mode = evaluate("discrete", folder, capsys, "--eval-episodes", "100", "--deterministic")
    _, samples = evaluate("discrete", folder, capsys, "--eval-episodes", "100")
    assert {row[1] for row in mode} == {"1"}
    assert {row[1] for row in samples} == {"0", "1"}


def test_a_run_that_goes_on_may_be_evaluated(monkeypatch, capsys):
    folder = interrupted("discrete", monkeypatch)
    table, _ = evaluate("discrete", folder, capsys, "--num-envs", "2")
    assert table[0].startswith("10 episodes")
    resume("discrete", folder)
