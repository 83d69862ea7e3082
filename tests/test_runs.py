"""What a run leaves behind: its folder, metrics.csv, checkpoints, progress, Weights & Biases."""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import pty
import re
import subprocess
import sys
import termios
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from wandb_file import records as wandb_records

import ppo_atari_lstm
from conftest import ROOT, SCRIPTS, command_line, metrics, train
from envs import Scripted

EPISODE_METRICS = ("charts/episodic_return", "charts/episodic_length")
STATISTICS = ("loss", "policy_loss", "value_loss", "entropy", "old_approx_kl", "approx_kl")
STATISTICS = {f"losses/{name}" for name in (*STATISTICS, "clipfrac", "grad_norm")}
ITERATION_METRICS = STATISTICS | {
    "charts/learning_rate",
    "charts/SPS",
    "losses/explained_variance",
}
TINY = {
    "discrete": {"env_id": "CartPole-v1"},
    "continuous": {"env_id": "Pendulum-v1"},
    "atari": {"env_id": "BreakoutNoFrameskip-v4", "num_steps": 8},
}


def scripted(*rewards):
    """Episodes for `Scripted`, one for each list of rewards, terminated with the last of them."""
    return [[(r, t == len(rs) - 1, False) for t, r in enumerate(rs)] for rs in rewards]


# Of two environments, one plays episodes of 3 and 2 steps, the other of 3 and 5 steps.
PLAYED = (scripted([1, 2, 4], [10, 20]), scripted([100, 0, 0], [-1, -1, -1, -1, -2.5]))
TURNS = itertools.cycle(PLAYED)
gym.register("Two-v0", lambda: Scripted(next(TURNS)))
gym.register("Name/Space-v0", "envs:Scripted")


def name_of(script):
    """The key of a script in SCRIPTS."""
    return next(name for name, module in SCRIPTS.items() if module is script)


def run_folders():
    return [path.parent for path in Path("runs").rglob("metrics.csv")]


@pytest.fixture(scope="module", params=SCRIPTS)
def finished(request, tmp_path_factory):
    """A short run of each script: its module, changed flags, agent and folder."""
    script, folder = SCRIPTS[request.param], tmp_path_factory.mktemp("finished")
    flags = {"seed": 3, "learning_rate": 1e-3} | TINY[request.param]
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["script.py", "--seed", "3", "--exp-name", "two words"])
        agent = train(script, **flags)
        (run,) = run_folders()
    return SimpleNamespace(script=script, flags=flags, agent=agent, folder=folder, run=folder / run)


# ------------------------------------------------------------------------------------------------
# The folder


def test_run_name(finished):
    pattern = rf"{finished.flags['env_id']}__{finished.script.__name__}__3__(\d+)"
    match = re.fullmatch(pattern, finished.run.name)
    assert finished.run.parent == finished.folder / "runs"
    assert match, finished.run.name
    assert 0 <= time.time() - int(match[1]) < 600


def test_files(finished):
    names = {"config.json", "metrics.csv", "checkpoint.pt", f"{finished.script.__name__}.py"}
    assert {path.name for path in finished.run.iterdir()} == names
    original = Path(finished.script.__file__).read_bytes()
    assert (finished.run / f"{finished.script.__name__}.py").read_bytes() == original


def test_config(finished):
    config = json.loads((finished.run / "config.json").read_text())
    args = finished.script.Args(**json.loads(json.dumps({k: config[k] for k in fields(finished)})))
    for name, value in finished.flags.items():
        assert getattr(args, name) == config[name] == value
    assert config["batch_size"] == config["num_envs"] * config["num_steps"]
    assert config["minibatch_size"] * config["num_minibatches"] == config["batch_size"]
    assert config["num_iterations"] == 2
    for package in ("torch", "gymnasium", "numpy"):
        assert config["versions"][package] == importlib.metadata.version(package)
    assert config["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert config["device"] == "cpu"
    script = Path(finished.script.__file__).read_bytes()
    assert config["script_sha256"] == hashlib.sha256(script).hexdigest()
    assert config["command"] == "script.py --seed 3 --exp-name 'two words'"


def fields(finished):
    return [field.name for field in dataclasses.fields(finished.script.Args)]


def test_config_names_the_commit(finished):
    """As `git describe` writes it, or null outside a repository."""

    def git(revision):
        command = ["git", "-C", ROOT, "rev-parse", "--verify", f"{revision}^{{commit}}"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout

    commit = json.loads((finished.run / "config.json").read_text())["git_commit"]
    head = git("HEAD")
    assert git(commit.removesuffix("-dirty")) == head if head else commit is None


def test_commit_is_named_by_its_hash_whatever_the_tags_and_the_folder():
    """In a repository with a tag and an apostrophe in its path; then after a change."""
    folder = Path("author's copy")
    folder.mkdir()
    copy = folder / "ppo_copy.py"
    copy.write_bytes(Path(SCRIPTS["discrete"].__file__).read_bytes())
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]

    def git(*command):
        command = ["git", "-C", folder, *identity, *command]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "script")
    git("tag", "-a", "v1", "-m", "tag")
    spec = importlib.util.spec_from_file_location("ppo_copy", copy.absolute())
    script = importlib.util.module_from_spec(spec)
    sys.modules["ppo_copy"] = script  # where dataclasses look for their module
    spec.loader.exec_module(script)
    commit = git("rev-parse", "HEAD")
    assert script.origin(torch.device("cpu"))["git_commit"] == commit
    copy.write_text("changed")
    assert script.origin(torch.device("cpu"))["git_commit"] == f"{commit}-dirty"


def test_id_with_a_slash():
    train(SCRIPTS["discrete"], env_id="Name/Space-v0", exp_name="mine")
    (folder,) = run_folders()
    assert re.fullmatch(r"runs/Name/Space-v0__mine__1__\d+", folder.as_posix())


def test_runs_started_in_the_same_second_do_not_share_a_folder(script, monkeypatch):
    clock = SimpleNamespace(now=1000.0)

    def now():
        clock.now += 1e-4
        return clock.now

    def sleep(seconds):
        clock.now += seconds

    monkeypatch.setattr(script, "time", SimpleNamespace(time=now, sleep=sleep))
    changes = TINY[name_of(script)]
    train(script, **changes)
    (first,) = run_folders()
    before = {path: path.read_bytes() for path in first.iterdir()}
    train(script, **changes)
    assert sorted(f.name.rpartition("__")[2] for f in run_folders()) == ["1000", "1001"]
    assert {path: path.read_bytes() for path in first.iterdir()} == before


# ------------------------------------------------------------------------------------------------
# Checkpoints


def test_checkpoint(finished):
    checkpoint = torch.load(finished.run / "checkpoint.pt", weights_only=True)
    config = json.loads((finished.run / "config.json").read_text())
    assert (checkpoint["iteration"], checkpoint["global_step"]) == (2, 2 * config["batch_size"])
    of_one_command = {"resume", "evaluate", "eval_episodes", "deterministic", "capture_video"}
    lasting = set(fields(finished)) - of_one_command
    assert checkpoint["args"] == {name: config[name] for name in lasting}
    weights = finished.agent.state_dict()
    assert checkpoint["agent"].keys() == weights.keys()
    assert all(torch.equal(checkpoint["agent"][name], weights[name]) for name in weights)
    moments = checkpoint["optimizer"]["state"]
    assert len(moments) == len(list(finished.agent.parameters()))
    steps = 2 * config["update_epochs"] * config["num_minibatches"]
    assert all(moment["step"] == steps for moment in moments.values())


def test_checkpoint_holds_the_statistics_of_the_normalization():
    """2 environments, 2 first observations and 2 * 32 seen; the mean of ScriptedBox is known."""
    train(SCRIPTS["continuous"], env_id="ScriptedBox-v0")
    (folder,) = run_folders()
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert float(saved["obs_count"]) == pytest.approx(2 + 64, abs=1e-3)
    assert float(saved["return_count"]) == pytest.approx(64, abs=1e-3)
    steps = [t % 3 for t in range(33)]
    assert float(saved["obs_mean"][1]) == pytest.approx(np.mean(steps), abs=1e-5)
    assert float(saved["obs_var"][1]) == pytest.approx(np.var(steps), abs=1e-5)


@pytest.mark.parametrize("every, expected", [(2, [2, 4, 5]), (1, [1, 2, 3, 4, 5]), (100, [5])])
def test_checkpoint_every(every, expected, monkeypatch):
    """Also at the end. Whenever a checkpoint gets its name, it is complete."""
    saved, replace = [], os.replace

    def spy(source, target):
        replace(source, target)
        if Path(target).name != "config.json":
            assert Path(target).name == "checkpoint.pt"
            saved.append(torch.load(target, weights_only=True)["iteration"])

    monkeypatch.setattr(os, "replace", spy)
    train(SCRIPTS["discrete"], total_timesteps=5 * 32, checkpoint_every=every)
    assert saved == expected


def test_interrupted_checkpoint_leaves_the_last_one_complete(script, monkeypatch):
    save = torch.save

    def broken(state, file, *args, **kwargs):
        if state["iteration"] == 1:
            return save(state, file, *args, **kwargs)
        file.write(b"half a checkpoint")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError, match="no space left"):
        train(script, checkpoint_every=1, **TINY[name_of(script)])
    (folder,) = run_folders()
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["iteration"] == 1


def test_checkpoint_is_on_disk_before_it_gets_its_name(script, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace

    def spy_fsync(file):
        fsync(file)
        fd = file if isinstance(file, int) else file.fileno()
        events.append(("fsync", os.fstat(fd).st_ino, os.fstat(fd).st_size))

    def spy_replace(source, target):
        replace(source, target)
        if Path(target).name == "checkpoint.pt":
            events.append(("replace", os.stat(target).st_ino, os.stat(target).st_size))

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    train(script, **TINY[name_of(script)])
    (folder,) = run_folders()
    metrics = os.stat(folder / "metrics.csv").st_ino
    events = [event for event in events if event[1] != metrics]
    assert [kind for kind, *_ in events][:2] == ["fsync", "replace"]
    assert events[0][1:] == events[1][1:]


# ------------------------------------------------------------------------------------------------
# metrics.csv


def test_format_and_names(finished):
    """One value a row; 2 iterations of `batch_size` steps each."""
    lines = (finished.run / "metrics.csv").read_text().splitlines()
    assert lines[0] == "global_step,time,name,value"
    assert all(len(line.split(",")) == 4 for line in lines)
    rows = metrics(finished.folder)
    assert {name for *_, name, _ in rows} - set(EPISODE_METRICS) == ITERATION_METRICS
    config = json.loads((finished.run / "config.json").read_text())
    batch = config["batch_size"]
    for name in ITERATION_METRICS:
        assert [step for step, _, n, _ in rows if n == name] == [batch, 2 * batch]
    times = [t for _, t, *_ in rows]
    assert times == sorted(times)
    assert times[0] >= 0 and times[-1] < 600
    learning_rates = [value for *_, name, value in rows if name == "charts/learning_rate"]
    assert learning_rates == pytest.approx([1e-3, 5e-4])


def test_one_row_for_each_episode():
    """Also when several environments end an episode with the same step; in their order."""
    train(SCRIPTS["discrete"], env_id="Two-v0", num_steps=8, total_timesteps=16)
    rows = [(step, name, value) for step, _, name, value in metrics() if name in EPISODE_METRICS]
    episodes = [(6, 7, 3), (6, 100, 3), (10, 30, 2), (16, 7, 3), (16, -6.5, 5)]
    assert rows == [
        (step, name, value)
        for step, *values in episodes
        for name, value in zip(EPISODE_METRICS, values, strict=True)
    ]


def test_true_returns_of_continuous_runs():
    """Neither normalized nor clipped."""
    train(SCRIPTS["continuous"], env_id="ScriptedBox-v0")
    returns = [value for *_, name, value in metrics() if name == "charts/episodic_return"]
    assert returns == [3.0] * 20


@pytest.mark.parametrize("target_kl", [None, 0.0])
def test_losses_are_means_over_all_minibatches(script, target_kl, monkeypatch):
    """Of the iteration; `target_kl` 0 stops after the first epoch."""
    calls, batches, written = [], [], {}
    originals = script.ppo_loss, torch.nn.utils.clip_grad_norm_, script.gae

    def spy_loss(*args, **kwargs):
        loss, stats = originals[0](*args, **kwargs)
        calls.append({f"losses/{name}": float(value) for name, value in stats.items()})
        assert calls[-1]["losses/loss"] == loss.item()
        return loss, stats

    def spy_norm(*args, **kwargs):
        norm = originals[1](*args, **kwargs)
        calls[-1]["losses/grad_norm"] = float(norm)
        return norm

    def spy_gae(rewards, values, *args):
        advantages = originals[2](rewards, values, *args)
        batches.append((values.copy(), advantages + values))
        return advantages

    monkeypatch.setattr(script, "ppo_loss", spy_loss)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy_norm)
    monkeypatch.setattr(script, "gae", spy_gae)
    train(script, target_kl=target_kl, learning_rate=0.01, **TINY[name_of(script)])
    for *_, name, value in metrics():
        written.setdefault(name, []).append(value)
    count = 4 if target_kl is None else 2
    assert len(calls) == 2 * count
    for name in STATISTICS:
        expected = [np.mean([c[name] for c in part]) for part in (calls[:count], calls[count:])]
        assert written[name] == pytest.approx(expected, rel=1e-4, abs=1e-7), name
    expected = [1 - np.var(returns - values) / np.var(returns) for values, returns in batches]
    assert written["losses/explained_variance"] == pytest.approx(expected, rel=1e-3, abs=1e-4)


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_explained_variance_of_constant_returns_is_nan(script):
    """A batch of one transition, the simplest case of returns without variance."""
    train(script, **TINY[name_of(script)] | {"num_envs": 1, "num_steps": 1, "num_minibatches": 1})
    explained = [value for *_, name, value in metrics() if name == "losses/explained_variance"]
    assert len(explained) == 2
    assert all(math.isnan(value) for value in explained)


def test_same_seed_same_run(script):
    """Weights bit for bit and metrics, time and SPS apart; another seed is another run."""

    def run(folder, seed):
        Path(folder).mkdir()
        with contextlib.chdir(folder):
            agent = train(script, seed=seed, **TINY[name_of(script)])
            rows = [line.split(",") for line in run_folders()[0].joinpath("metrics.csv").open()]
        rows = [(step, *row) for step, _, *row in rows if row[0] != "charts/SPS"]
        return rows, torch.cat([x.detach().flatten() for x in agent.parameters()])

    (rows, weights), (same_rows, same_weights), (other_rows, other_weights) = (
        run(folder, seed) for folder, seed in (("a", 5), ("b", 5), ("c", 6))
    )
    assert rows == same_rows
    assert torch.equal(weights, same_weights)
    assert rows != other_rows
    assert not torch.equal(weights, other_weights)


RANDOM = {  # where each takes its seed
    "weights": (torch, "manual_seed"),
    "actions": (np.random, "default_rng"),
    "environments": (np.random, "SeedSequence"),
}


@pytest.mark.parametrize("what", RANDOM)
def test_seed_reaches(what, script, monkeypatch):
    """Two seeds lead to other losses where one thing alone is random and the others are fixed."""
    for owner, name in (RANDOM[other] for other in RANDOM.keys() - {what}):
        original = getattr(owner, name)

        def fixed(seed, original=original):
            return original(np.ones_like(seed).tolist())

        monkeypatch.setattr(owner, name, fixed)
    losses = {}
    for seed in (1, 2):
        train(script, seed=seed, exp_name=str(seed), **TINY[name_of(script)])
        (path,) = Path("runs").glob(f"*__{seed}__{seed}__*/metrics.csv")
        losses[seed] = [line.split(",")[2:] for line in path.open() if "losses/" in line]
    assert losses[1] != losses[2]


def test_torch_has_its_threads_for_the_update_and_one_for_acting(script, monkeypatch):
    """In every iteration."""
    threads = {"rollout_policy": [], "ppo_loss": []}
    for owner, name in ((script.Agent, "rollout_policy"), (script, "ppo_loss")):
        original = getattr(owner, name)

        def counted(*args, name=name, original=original):
            threads[name].append(torch.get_num_threads())
            return original(*args)

        monkeypatch.setattr(owner, name, counted)
    train(script, torch_threads=2, **TINY[name_of(script)])
    assert threads == {"rollout_policy": [1] * 2, "ppo_loss": [2] * 8}


# ------------------------------------------------------------------------------------------------
# Progress


@pytest.fixture(scope="module")
def untracked(tmp_path_factory):
    """The command line without --track, where importing wandb would end the process."""
    folder = tmp_path_factory.mktemp("untracked")
    (folder / "wandb.py").write_text("raise SystemExit('wandb was imported')\n")
    flags = ["--env-id=CartPole-v1", "--total-timesteps=2048", "--no-cuda"]
    env = os.environ | {"PYTHONPATH": str(folder)}
    return folder, command_line("discrete", *flags, cwd=folder, env=env)


@pytest.mark.xdist_group("untracked")
def test_wandb_is_not_imported_without_track(untracked):
    folder, process = untracked
    assert process.returncode == 0, process.stderr
    assert len(list(folder.glob("runs/*/checkpoint.pt"))) == 1


@pytest.mark.xdist_group("untracked")
def test_plain_lines_when_piped(untracked):
    """No bar; the last lines are the state at the end and the folder."""
    folder, process = untracked
    assert "\r" not in process.stdout + process.stderr
    assert "step/s" not in process.stderr
    *_, last, written = process.stdout.splitlines()
    assert re.fullmatch(r"2,048 of 2,048 steps, return [\d.]+, [\d,]+ steps/s", last)
    (run,) = folder.glob("runs/*")
    assert written == f"written to {run.relative_to(folder)}"


def test_plain_lines_every_ten_seconds(monkeypatch, capsys):
    """A clock that jumps 1 s an iteration: lines after more than 10 s, and at the end."""
    script = SCRIPTS["discrete"]
    clock = SimpleNamespace(now=1000.0)

    def end_iteration(*args, original=script.Run.end_iteration, **kwargs):
        clock.now += 1.0
        return original(*args, **kwargs)

    monkeypatch.setattr(script, "time", SimpleNamespace(time=lambda: clock.now))
    monkeypatch.setattr(script.Run, "end_iteration", end_iteration)
    train(script, env_id="Scripted-v0", total_timesteps=25 * 32)
    *lines, _ = capsys.readouterr().out.splitlines()
    assert [line.split(" of ")[0] for line in lines] == ["352", "704", "800"]
    assert lines[-1] == "800 of 800 steps, return 3.0, 32 steps/s"
    assert [value for *_, name, value in metrics() if name == "charts/SPS"] == [32] * 25


def on_a_terminal(folder, columns, *flags):
    """What a run shows there, each state of its bar."""
    terminal, child_side = pty.openpty()
    termios.tcsetwinsize(child_side, (24, columns))
    command = [sys.executable, ROOT / "ppo_discrete.py", "--no-cuda", *flags]
    with open(folder / "stdout", "w") as stdout:
        process = subprocess.Popen(command, cwd=folder, stdout=stdout, stderr=child_side)
    os.close(child_side)
    shown = b""
    with contextlib.suppress(OSError):  # the end of a terminal
        while chunk := os.read(terminal, 65536):
            shown += chunk
    os.close(terminal)
    assert process.wait() == 0, shown
    return shown.decode().replace("\n", "\r").strip("\r").split("\r")


def test_bar_on_a_terminal(tmp_path):
    """Steps, return of the last episodes, speed and time left; no plain lines beside it."""
    *_, last = on_a_terminal(tmp_path, 120, "--total-timesteps", "2048")
    pattern = r"100%.*2048/2048 \[\d\d:\d\d<\d\d:\d\d, +[\d.]+k?step/s, return [\d.]+\]"
    assert re.search(pattern, last), last
    assert (tmp_path / "stdout").read_text().startswith("written to runs/")


@pytest.mark.slow
@pytest.mark.parametrize("columns", [80, 40])
def test_bar_on_a_narrow_terminal_of_a_run_that_goes_on(columns, tmp_path):
    """No line is broken, or the bar would move down; it begins where the run was."""
    on_a_terminal(tmp_path, columns, "--total-timesteps", "1024")
    (folder,) = tmp_path.glob("runs/*")
    bars = on_a_terminal(tmp_path, columns, "--resume", folder, "--total-timesteps", "4096")
    assert max(map(len, bars)) <= columns
    assert re.search(r"\b25%", bars[0]) and "1024/4096" in bars[0], bars[0]
    assert re.search(r"\b100%", bars[-1]), bars[-1]


# ------------------------------------------------------------------------------------------------
# Weights & Biases


class Recorder:
    """Stands in for the run that `wandb.init` returns."""

    def __init__(self, **kwargs):
        self.settings, self.rows, self.defined, self.finished = kwargs, [], [], []
        self.id = "recorded"

    def log(self, row, **kwargs):
        assert not kwargs, "with a step, rows of the same step would merge"
        assert not self.finished
        self.rows.append(dict(row))

    def define_metric(self, *args, **kwargs):
        assert not self.rows
        self.defined.append((args, kwargs))

    def finish(self, exit_code=None, **kwargs):
        self.finished.append(exit_code)


def columns(rows):
    """(global_step, name, value as in metrics.csv) of W&B's rows, whose keys are in no order."""
    for row in rows:
        names = row.keys() - {"global_step", "_step", "_runtime", "_timestamp"}
        yield sorted((row["global_step"], name, float(f"{row[name]:.9g}")) for name in names)


def in_chunks(rows, sizes):
    """The rows of metrics.csv as `columns` gives W&B's, which hold so many metrics each."""
    rows = iter([(step, name, value) for step, _, name, value in rows])
    for size in sizes:
        yield sorted(itertools.islice(rows, size))
    assert not list(rows)


def check_rows(logged, rows):
    """W&B has what metrics.csv has, in its order, and one row for each episode and iteration."""
    logged = list(columns(logged))
    assert logged == list(in_chunks(rows, map(len, logged)))
    kinds = Counter(frozenset(name for _, name, _ in row) for row in logged)
    names = Counter(name for *_, name, _ in rows)
    episodes, iterations = names[EPISODE_METRICS[0]], names["charts/SPS"]
    assert episodes and iterations
    iteration = frozenset(ITERATION_METRICS | {"charts/mean_episodic_return"})
    assert kinds == {frozenset(EPISODE_METRICS): episodes, iteration: iterations}


@pytest.mark.parametrize("name, env_id", [("discrete", "Two-v0"), ("continuous", "ScriptedBox-v0")])
def test_wandb_calls(name, env_id, monkeypatch):
    wandb = pytest.importorskip("wandb")
    script, recorders = SCRIPTS[name], []

    def init(**kwargs):
        recorders.append(Recorder(**kwargs))
        return recorders[-1]

    monkeypatch.setattr(wandb, "init", init)
    flags = {"wandb_project_name": "project", "wandb_entity": "team"}
    train(script, env_id=env_id, track=True, **flags)
    (run,) = recorders
    (folder,) = run_folders()
    settings = run.settings
    assert (settings["project"], settings["entity"]) == ("project", "team")
    assert settings["name"] == folder.name
    config = json.loads((folder / "config.json").read_text())
    names = {field.name for field in dataclasses.fields(script.Args)}
    names |= {"batch_size", "minibatch_size", "num_iterations"}
    assert settings["config"].keys() >= names
    assert {name: settings["config"][name] for name in names} == {n: config[n] for n in names}
    assert not settings.get("monitor_gym") and not settings.get("sync_tensorboard")
    assert run.defined == [(("*",), {"step_metric": "global_step"})]
    check_rows(run.rows, metrics())
    assert run.finished in ([None], [0])


def offline(folder, *flags, **env):
    """A tracked run without a network. Returns the process, W&B's config, rows and exit codes."""
    pytest.importorskip("wandb")
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")} | env
    env |= {"WANDB_MODE": "offline", "WANDB_DIR": str(folder)}
    process = command_line("discrete", "--track", "--no-cuda", *flags, cwd=folder, env=env)
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    rows, config, exits, name = [], {}, [], None
    for record in wandb_records(path):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            rows.append(
                {(i.key or i.nested_key[0]): json.loads(i.value_json) for i in record.history.item}
            )
        elif kind == "run":
            name = record.run.display_name
            config |= {i.key: json.loads(i.value_json) for i in record.run.config.update}
        elif kind == "exit":
            exits.append(record.exit.exit_code)
    return SimpleNamespace(process=process, config=config, rows=rows, exits=exits, name=name)


def test_wandb_offline(tmp_path):
    """A real run of W&B: what its file holds is what metrics.csv holds."""
    run = offline(tmp_path, "--seed=2", "--num-steps=32", "--total-timesteps=1024")
    assert run.process.returncode == 0, run.process.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert run.name == folder.name
    assert run.config["env_id"] == "CartPole-v1"
    assert run.config["exp_name"] == "ppo_discrete"
    assert run.config["seed"] == 2
    saved = json.loads((folder / "config.json").read_text())
    for field in dataclasses.fields(SCRIPTS["discrete"].Args):
        assert run.config[field.name] == saved[field.name]
    assert not [k for k, value in run.config.items() if isinstance(value, dict) and k[0] != "_"]
    assert all("global_step" in row for row in run.rows)
    check_rows(run.rows, metrics(tmp_path))
    assert run.exits == [0]


def test_wandb_shows_a_run_that_failed_as_failed(tmp_path):
    """An exit code of 0 would be a finished run, which counts in tables of results."""
    (tmp_path / "broken.py").write_text(
        "import gymnasium as gym\n"
        "import numpy as np\n"
        "from gymnasium.envs.classic_control import CartPoleEnv\n"
        "class Broken(CartPoleEnv):\n"
        "    def step(self, action):\n"
        "        return np.full(4, np.nan, np.float32), 1.0, False, False, {}\n"
        "gym.register('Broken-v0', Broken)\n"
    )
    run = offline(tmp_path, "--env-id", "broken:Broken-v0", PYTHONPATH=str(tmp_path))
    assert run.process.returncode == 2, run.process.stderr
    assert run.exits == [2]


# ------------------------------------------------------------------------------------------------
# The command line


def test_booleans_of_sweeps(script):
    """W&B sweeps write --flag=True; tyro's own form is --flag and --no-flag."""
    flags = ["--anneal_lr=False", "--norm-adv=false", "--track=True", "--cuda=true", "--seed=7"]
    args = script.parse_args([*flags, "--clip-vloss=True"])
    assert (args.anneal_lr, args.norm_adv, args.clip_vloss) == (False, False, True)
    assert (args.track, args.cuda, args.seed) == (True, True, 7)
    assert script.parse_args(["--torch-deterministic=False"]).torch_deterministic is False
    assert [script.parse_args(x).compile for x in ([], ["--compile=False"])] == [True, False]


def test_commands_written_for_cleanrl(script):
    flags = "--env-id CartPole-v1 --num-envs 4 --no-anneal-lr --no-norm-adv --no-clip-vloss"
    args = script.parse_args(f"{flags} --target-kl 0.01 --no-cuda --total-timesteps 512".split())
    assert (args.env_id, args.num_envs, args.total_timesteps) == ("CartPole-v1", 4, 512)
    assert (args.anneal_lr, args.norm_adv, args.clip_vloss, args.cuda) == (False,) * 4
    assert args.target_kl == 0.01
    args = script.parse_args(["--env_id=A-v0", "--num_envs", "3", "--no_cuda", "--wandb_entity=me"])
    assert (args.env_id, args.num_envs, args.cuda, args.wandb_entity) == ("A-v0", 3, False, "me")


def test_text_that_looks_like_a_boolean_stays_text(script):
    assert script.parse_args(["--exp-name=true"]).exp_name == "true"


@pytest.mark.parametrize("flag", ["--batch-size", "--minibatch-size", "--num-iterations"])
def test_derived_sizes_are_no_flags(script, flag, capsys):
    with pytest.raises(SystemExit) as error:
        script.parse_args([flag, "64"])
    assert error.value.code == 2
    assert flag in capsys.readouterr().err


CLEANRL = {  # common to the three scripts, then their differences
    "seed": 1,
    "torch_deterministic": True,
    "cuda": True,
    "track": False,
    "wandb_entity": None,
    "anneal_lr": True,
    "gamma": 0.99,
    "gae_lambda": 0.95,
    "norm_adv": True,
    "clip_vloss": True,
    "vf_coef": 0.5,
    "max_grad_norm": 0.5,
    "target_kl": None,
}
VARYING = {
    "env_id": ("CartPole-v1", "HalfCheetah-v5", "BreakoutNoFrameskip-v4"),
    "total_timesteps": (500_000, 1_000_000, 10_000_000),
    "learning_rate": (2.5e-4, 3e-4, 2.5e-4),
    "num_envs": (4, 1, 8),
    "num_steps": (128, 2048, 128),
    "num_minibatches": (4, 32, 4),
    "update_epochs": (4, 10, 4),
    "clip_coef": (0.2, 0.2, 0.1),
    "ent_coef": (0.01, 0.0, 0.01),
    "batch_size": (512, 2048, 1024),
    "minibatch_size": (128, 64, 256),
    "num_iterations": (976, 488, 9765),
}


@pytest.mark.parametrize("column, name", list(enumerate(SCRIPTS)))
def test_defaults_are_cleanrls(column, name):
    script = SCRIPTS[name]
    args = script.parse_args([])
    expected = CLEANRL | {field: values[column] for field, values in VARYING.items()}
    assert {field: getattr(args, field) for field in expected} == expected
    assert args.exp_name == script.__name__ == f"ppo_{name}"
    assert args.wandb_project_name


@pytest.mark.parametrize("script", [*SCRIPTS.values(), ppo_atari_lstm])
def test_defaults_of_what_cleanrl_has_not(script):
    expected = {"wandb_project_name": "ppo37", "checkpoint_every": 100, "capture_video": False}
    expected |= {"resume": None, "evaluate": None, "eval_episodes": 10, "deterministic": False}
    expected |= {"env_kwargs": "{}", "env_timeout": 300.0, "bootstrap_truncation": True}
    expected |= {"anneal_clip": False, "anneal_ent": False, "penalty_kl": None}
    args = script.Args()
    assert {name: getattr(args, name) for name in expected} == expected
    pictures = script.__name__.startswith("ppo_atari")
    assert args.vectorization == ("async" if pictures else "sync")
    assert pictures or args.torch_threads == 1
    assert getattr(args, "compile", True)
