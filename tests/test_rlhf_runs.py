"""What runs of ppo_rlhf.py leave behind, how they go on, and how they fail."""

import contextlib
import copy
import dataclasses
import hashlib
import importlib.metadata
import io
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import ppo_rlhf as rlhf
from conftest import ROOT, command_line
from test_resume import Full
from test_runs import wandb_records

TINY = {"cuda": False, "torch_threads": 1, "checkpoint_every": 2, "critic_warmup": 1}
TINY |= {"d_model": 16, "num_layers": 1, "num_heads": 2, "response_length": 8}
TINY |= {"sft_texts": 64, "sft_epochs": 1, "sft_batch_size": 16}
TINY |= {"rm_pairs": 32, "rm_test_pairs": 32, "rm_epochs": 1, "rm_batch_size": 8}
TINY |= {"total_episodes": 32, "batch_size": 8, "update_epochs": 2, "eval_episodes": 8}
SORT = TINY | {"task": "sort", "learning_rate": 3e-4, "kl_coef": 0.1}  # has a reward model
VERIFIABLE = SORT | {"rm_coef": 0.0, "stages": "sft,ppo"}
FIELDS = {field.name: getattr(rlhf.Args(), field.name) for field in dataclasses.fields(rlhf.Args)}
CHECKPOINTS = "runs/*/checkpoint.pt"

FUNCTIONS = """
import os, signal

calls = []

def count(text, word):
    return text.split().count(word)

def words(prompts, completions):
    return [len(text.split()) for text in completions]

def sevens(prompts, completions):
    assert all(text.split()[0] == "sort" for text in prompts)
    return [count(text, "7") for text in completions]

def send(prompts, completions):  # signals to this process with one of its calls
    calls.append(completions)
    if len(calls) == int(os.environ["AT"]):
        for number in os.environ["SEND"].split():
            os.kill(os.getpid(), int(number))
    return words(prompts, completions)

def fail(prompts, completions):  # with one of its calls
    calls.append(completions)
    result = [float(len(text)) for text in completions]
    if len(calls) != int(os.environ["AT"]):
        return result
    how = os.environ["HOW"]
    if how == "raise":
        raise ValueError("out of\\nluck")
    if how in ("nan", "inf"):
        return [*result[:-1], float(how)]
    return {"few": result[1:], "many": [*result, 1], "none": None, "text": ["?"] * 8}.get(how, 1.0)

def constant(prompts, completions):
    return [float(os.environ["VALUE"])] * len(prompts)
"""


def train(folder=".", args=None, **changes):
    """A run in `folder`: agent, exit code, its own folder, the optimizer at the end of stages."""
    Path(folder).mkdir(exist_ok=True)
    folders, optimizers, init, finish = [], {}, rlhf.Run.__init__, rlhf.Run.finish
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def spy_init(run, *args):
        init(run, *args)
        folders.append(run.folder.absolute())

    def spy_finish(run):
        if run.optimizer:
            optimizers[rlhf.STAGES[run.stage]] = copy.deepcopy(run.optimizer.state_dict())
        finish(run)

    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr(rlhf.Run, "__init__", spy_init)
        patch.setattr(rlhf.Run, "finish", spy_finish)
        try:
            agent, code = rlhf.train(args or rlhf.Args(**SORT | changes)), 0
        except SystemExit as error:
            agent, code = None, error.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return SimpleNamespace(agent=agent, code=code, folder=folders[0], optimizers=optimizers)


def parse(option, folder, *flags):
    """The arguments of --resume or --load with the checkpoint of a run, checked."""
    args = rlhf.parse_args([option, str(folder / "checkpoint.pt"), *flags])
    rlhf.check_args(args)
    return args


def flags(**changes):
    """Settings as W&B's sweeps write them."""
    pairs = [(k, x) for k, v in changes.items() for x in (v if isinstance(v, tuple) else (v,))]
    return [f"--{name.replace('_', '-')}={value}" for name, value in pairs]


def checkpoint(folder):
    """What a checkpoint holds, and the models beside it with those in it."""
    data = torch.load(folder / "checkpoint.pt", weights_only=True)
    for name, expected in data["frozen"].items():
        assert hashlib.sha256((folder / f"{name}.pt").read_bytes()).hexdigest() == expected
        data["models"][name] = torch.load(folder / f"{name}.pt", weights_only=True)
    return data


def sizes(folder):
    """Of the files that grow."""
    return [(folder / name).stat().st_size for name in ("metrics.csv", "samples.jsonl")]


def weights(agent, *without):
    """Those of its models, by name and as a checkpoint has them."""
    return {
        name: dict(model.state_dict())
        for name, model in agent.named_children()
        if name not in without
    }


def rows(folder, wall_clock=False):
    """(global_step, name, value) of metrics.csv as text, all but what tells the time."""
    header, *lines = (folder / "metrics.csv").read_text().splitlines()
    assert header == "global_step,time,name,value"
    cells = [line.split(",") for line in lines]
    assert all(len(cell) == 4 for cell in cells)
    times = [float(time) for _, time, *_ in cells]
    assert times == sorted(times) and times[0] >= 0
    shown = [x for x in cells if wall_clock or not x[2].startswith(("time/", "perf/"))]
    return [(int(step), name, value) for step, _, name, value in shown]


def values(folder, name):
    return [float(value) for _, other, value in rows(folder, wall_clock=True) if other == name]


def same(a, b):
    """Bit for bit, all the way down."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def same_run(a, b):
    """Weights, numbers, rows, texts, and the optimizers of the stages that both were in."""
    one, other = checkpoint(a.folder), checkpoint(b.folder)
    assert same(one["models"], other["models"])
    assert same(weights(a.agent), weights(b.agent))
    assert one["numbers"] == other["numbers"]
    assert one["stage"] == other["stage"]
    for stage in a.optimizers.keys() & b.optimizers.keys():
        assert same(a.optimizers[stage], b.optimizers[stage])
    assert rows(a.folder) == rows(b.folder)
    texts = [(x.folder / "samples.jsonl").read_text() for x in (a, b)]
    assert texts[0] == texts[1]
    return True


def finite(state):
    """Whether all tensors and numbers in a checkpoint are."""
    if isinstance(state, dict | list | tuple):
        return all(map(finite, state.values() if isinstance(state, dict) else state))
    is_number = isinstance(state, torch.Tensor | int | float)
    return not is_number or bool(torch.as_tensor(state).isfinite().all())


def during(monkeypatch, stage, step, action):
    """Call action(run) at the start of a step of a stage."""
    steps = rlhf.Run.steps

    def patched(run, name, *args):
        for number in steps(run, name, *args):
            if (name, number) == (stage, step):
                action(run)
            yield number

    monkeypatch.setattr(rlhf.Run, "steps", patched)


def error_line(capsys, function, *args, **kwargs):
    """What a call that fails prints: one line, after which it exits with code 2.

    Before it a line for each argument that a run would be resumed with and that was another.
    """
    with pytest.raises(SystemExit) as error:
        function(*args, **kwargs)
    assert error.value.code == 2
    output = capsys.readouterr()
    assert re.fullmatch(r"(--\S+ is .+, it was .+\n)*", output.out)
    (line,) = output.err.splitlines()
    assert line.startswith("error: ")
    return line


def last_error(capsys, run):
    """The same for a run that had started, as `train` returns it."""
    assert run.code == 2
    output = capsys.readouterr()
    assert "written to" not in output.out
    *_, line = [x for x in output.err.splitlines() if not x.startswith("warning: ")]
    assert line.startswith("error: ")
    return line


@pytest.fixture
def functions(tmp_path, monkeypatch):
    """The path of a file with FUNCTIONS, none of which does anything bad yet."""
    monkeypatch.setenv("AT", "0")
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    return str(tmp_path / "functions.py")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """All stages of the reviews, with what was printed."""
    printed = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed[0]):
        patch.setattr(sys, "argv", ["script.py", "--exp-name", "two words"])
        torch.set_num_threads(1)
        with contextlib.redirect_stderr(printed[1]):
            folder = tmp_path_factory.mktemp("finished")
            run = train(folder, rlhf.Args(**TINY, seed=3))
    run.out, run.err = (text.getvalue() for text in printed)
    return run


EXACT = SORT | {"sft_epochs": 2, "rm_epochs": 2, "total_episodes": 40, "num_minibatches": 2}
EXACT |= {"kl_target": 0.01, "kl_horizon": 100, "reward_clip": 0.5, "ptx_coef": 0.1}
EXACT |= {"ptx_ratio": 1, "critic_warmup": 2, "learning_rate": 3e-3, "value_learning_rate": 1e-3}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A run with everything that has a state of its own: 8 steps, 8 steps, 5 iterations."""
    torch.set_num_threads(1)
    return train(tmp_path_factory.mktemp("uninterrupted"), rlhf.Args(**EXACT))


# ------------------------------------------------------------------------------------------------
# The folder

SFT = {"sft/loss", "sft/grad_norm", "sft/lr"}
RM = {"rm/loss", "rm/grad_norm", "rm/lr", "rm/train_accuracy"}
RM_RESULTS = {"rm/accuracy", "rm/ceiling", "rm/accuracy_gold"}
GOLD = {f"gold/{name}" for name in ("score", "sentiment", "topic", "repeats", "illegal")}
PPO = """
    objective/kl objective/sqrt_kl objective/kl_coef objective/entropy objective/scores
    objective/scores_std objective/non_score_reward objective/rlhf_reward objective/missing_eos
    ppo/policy/approxkl ppo/policy/clipfrac ppo/policy/entropy ppo/policy/grad_norm
    ppo/loss/policy ppo/loss/value ppo/lr ppo/episode
    ppo/val/clipfrac ppo/val/ratio ppo/val/ratio_var ppo/val/vpred ppo/val/var_explained
    ppo/val/num_eos_tokens ppo/val/grad_norm
    response/length rollout/logp_mismatch time/gen time/score time/train perf/tokens_per_s
"""
PPO = GOLD | set(PPO.split())
COLUMNS = ("SFT", "best of 4", "best of 16", "PPO")
TABLE = ["proxy", "kl", *sorted(GOLD), "length", "missing_eos", "wins_against_sft"]
EVAL = {f"eval/{name.lower().replace(' ', '_')}/{row}" for name in COLUMNS for row in TABLE}


def test_run_name(finished):
    match = re.fullmatch(r"reviews__ppo_rlhf__3__(\d+)", finished.folder.name)
    assert match, finished.folder.name
    assert 0 <= time.time() - int(match[1]) / 1000 < 600


def test_runs_started_in_the_same_millisecond_do_not_share_a_folder(monkeypatch):
    """And one of another seed, task or model gets its own name at once."""
    now = SimpleNamespace(time_ns=lambda: 1_700_000_000_123_999_999, time=lambda: 1_700_000_000.1)
    monkeypatch.setattr(rlhf, "time", now)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    changes = [{}, {}, {}, {"seed": 4}, {"task": "sort"}, {"model": "folder/small"}]
    runs = [rlhf.Run(rlhf.Args(**change), torch.device("cpu"), None) for change in changes]
    assert [str(run.folder) for run in runs] == [
        "runs/reviews__ppo_rlhf__1__1700000000123",
        "runs/reviews__ppo_rlhf__1__1700000000124",
        "runs/reviews__ppo_rlhf__1__1700000000125",
        "runs/reviews__ppo_rlhf__4__1700000000123",
        "runs/sort__ppo_rlhf__1__1700000000123",
        "runs/small__ppo_rlhf__1__1700000000123",
    ]
    assert all(run.folder.is_dir() for run in runs)


def test_files(finished):
    names = {"config.json", "metrics.csv", "samples.jsonl", "ppo_rlhf.py"}
    names |= {"checkpoint.pt", "reference.pt", "reward_model.pt"}
    assert {path.name for path in finished.folder.iterdir()} == names
    assert (finished.folder / "ppo_rlhf.py").read_bytes() == Path(rlhf.__file__).read_bytes()


def test_config(finished):
    config = json.loads((finished.folder / "config.json").read_text())
    expected = FIELDS | TINY | {"seed": 3, "reward_fn": [], "stop": []}
    assert {name: config[name] for name in FIELDS} == expected
    assert (config["minibatch_size"], config["num_iterations"]) == (8, 4)
    assert config["device"] == "cpu"
    assert config["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert config["versions"]["torch"] == importlib.metadata.version("torch")
    script = Path(rlhf.__file__).read_bytes()
    assert config["script_sha256"] == hashlib.sha256(script).hexdigest()
    assert config["command"] == "script.py --exp-name 'two words'"


def test_config_names_the_commit(finished):
    """Or null outside a repository."""
    command = ["git", "-C", ROOT, "rev-parse", "HEAD"]
    head = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    commit = json.loads((finished.folder / "config.json").read_text())["git_commit"]
    assert commit in ((head, f"{head}-dirty") if head else (None,))


@pytest.mark.parametrize(
    "names, steps",
    [
        (SFT, [16, 32, 48, 64]),  # demonstrations
        (RM, [8, 16, 24, 32]),  # pairs
        (RM_RESULTS, [32]),
        (PPO, [8, 16, 24, 32]),  # episodes
        (EVAL, [32]),
    ],
)
def test_names_and_global_steps(finished, names, steps):
    written = rows(finished.folder, wall_clock=True)
    for name in names:
        assert [step for step, other, _ in written if other == name] == steps, name


def test_there_are_no_other_names(finished):
    written = {name for _, name, _ in rows(finished.folder, wall_clock=True)}
    assert written == SFT | RM | RM_RESULTS | PPO | EVAL


def test_stages_follow_one_another_in_metrics(finished):
    written = rows(finished.folder)
    kinds = [name.split("/")[0] for _, name, _ in written]
    order = [{"sft": 0, "rm": 1, "eval": 3}.get(kind, 2) for kind in kinds]
    assert order == sorted(order)


def test_global_step_where_batches_are_not_full():
    """50 demonstrations in batches of 16, twice: the last of an epoch has 2."""
    run = train(**VERIFIABLE | {"sft_texts": 50, "sft_epochs": 2, "stages": "sft"})
    steps = [step for step, name, _ in rows(run.folder) if name == "sft/loss"]
    assert steps == [16, 32, 48, 50, 66, 82, 98, 100]


def test_checkpoint(finished):
    """Tensors, numbers and text only. What PPO is over for, the value model, is not kept."""
    data = checkpoint(finished.folder)
    assert (data["stage"], data["step"]) == (4, 0)
    assert rlhf.Args(**data["args"]) == rlhf.Args(**TINY, seed=3)
    assert same(data["models"], weights(finished.agent, "value_model"))
    assert data["bytes"] == sizes(finished.folder)
    assert finite(data)
    assert {f"rm/{x}" for x in ("accuracy", "ceiling", "accuracy_gold")} <= data["numbers"].keys()
    assert data["models"].keys() == {"policy", "reference", "reward_model"}
    assert data["frozen"].keys() == {"reference", "reward_model"}
    alone = torch.load(finished.folder / "checkpoint.pt", weights_only=True)
    assert alone["models"].keys() == {"policy"}


@pytest.mark.parametrize("every, expected", [(2, [2, 4, 4]), (3, [3, 4]), (100, [4])])
def test_checkpoint_every(every, expected, monkeypatch):
    """Of the 4 steps of a stage, the last and the end of it always."""
    saved, models, replace = [], [], os.replace

    def spy(source, target):
        replace(source, target)
        if target.name == "checkpoint.pt":
            data = checkpoint(target.parent)  # and all that it names is there already
            saved.append((data["stage"], data["step"]))
        elif target.name != "config.json":
            models.append((target.name, len(saved)))

    monkeypatch.setattr(os, "replace", spy)
    train(**VERIFIABLE | {"checkpoint_every": every})
    steps = sorted({*expected})
    assert saved == [*[(0, n) for n in steps], (1, 0), *[(2, n) for n in steps], (3, 0)]
    assert models == [("reference.pt", len(steps))]  # once, where SFT is over


def test_interrupted_checkpoint_leaves_the_last_one_complete(monkeypatch):
    save = torch.save

    def broken(data, file):
        if (data.get("stage"), data.get("step")) == (2, 2):
            file.write(b"half a checkpoint")
            raise OSError("no space left on device")
        save(data, file)

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError, match="no space left"):
        train(**VERIFIABLE)
    (path,) = Path().glob(CHECKPOINTS)
    assert (checkpoint(path.parent)["stage"], checkpoint(path.parent)["step"]) == (1, 0)


def test_last_partial_batch_is_left_out():
    """1,000 episodes in batches of 512 are one iteration, which counts 512."""
    run = train(**VERIFIABLE | {"total_episodes": 1000, "batch_size": 512})
    assert values(run.folder, "ppo/episode") == [512]
    assert {step for step, name, _ in rows(run.folder) if name[:4] == "ppo/"} == {512}
    assert json.loads((run.folder / "config.json").read_text())["num_iterations"] == 1


def test_same_seed_same_run(uninterrupted):
    """Weights bit for bit; another seed is another run."""
    again = train("again", rlhf.Args(**EXACT))
    assert same_run(uninterrupted, again)
    other = train("other", rlhf.Args(**EXACT, seed=2))
    assert rows(other.folder) != rows(uninterrupted.folder)
    assert not same(checkpoint(other.folder)["models"], checkpoint(again.folder)["models"])
    for name in ("sft/loss", "rm/loss", "objective/scores", "eval/sft/proxy"):
        assert values(other.folder, name) != values(again.folder, name)


# ------------------------------------------------------------------------------------------------
# Going on

STOPS = [("sft", 1), ("sft", 5), ("sft", 8), ("rm", 1), ("rm", 6), ("rm", 8)]
STOPS += [("ppo", 1), ("ppo", 3), ("ppo", 4), ("ppo", 5)]


def test_there_is_something_to_resume(uninterrupted):
    """beta is adapted, the running sums and the moments of all optimizers have counted."""
    numbers = checkpoint(uninterrupted.folder)["numbers"]
    assert numbers["kl_coef"] != 0.1
    assert numbers["score_sums"][0] == 40
    steps = {
        stage: {int(moments["step"]) for moments in optimizer["state"].values()}
        for stage, optimizer in uninterrupted.optimizers.items()
    }
    assert steps == {"sft": {8}, "rm": {8}, "ppo": {20, 12}}  # the policy from the third iteration
    assert len(set(values(uninterrupted.folder, "objective/kl_coef"))) > 1


@pytest.mark.parametrize("stage, step", STOPS)
def test_resume_bitexact_after_ctrl_c(uninterrupted, stage, step, monkeypatch):
    with monkeypatch.context() as patch:
        during(patch, stage, step, lambda run: signal.raise_signal(signal.SIGINT))
        stopped = train(args=rlhf.Args(**EXACT))
    assert stopped.code == 130
    data = checkpoint(stopped.folder)
    assert (data["stage"], data["step"]) == (rlhf.STAGES.index(stage), step)
    resumed = train(args=parse("--resume", stopped.folder))
    assert same_run(uninterrupted, resumed)


class CrashError(Exception):
    pass


@pytest.mark.parametrize("stage, step", [("sft", 5), ("rm", 3), ("rm", 6), ("ppo", 3), ("ppo", 5)])
def test_resume_bitexact_after_a_crash(uninterrupted, stage, step, monkeypatch):
    """With rows of one or two steps behind the last checkpoint, and a text."""
    folders = []

    def crash(run):
        run.append("samples.jsonl", '{"global_step": 1}\n')
        folders.append(run.folder.absolute())
        raise CrashError

    with monkeypatch.context() as patch:
        during(patch, stage, step, crash)
        with pytest.raises(CrashError):
            train(args=rlhf.Args(**EXACT | {"checkpoint_every": 3}))
    (folder,) = folders
    assert all(a < b for a, b in zip(checkpoint(folder)["bytes"], sizes(folder), strict=True))
    resumed = train(args=parse("--resume", folder))
    assert same_run(uninterrupted, resumed)


def test_resume_bitexact_of_reviews(finished, monkeypatch):
    """Whose gold reward has units of its own, measured after the first stage."""
    with monkeypatch.context() as patch:
        during(patch, "rm", 3, lambda run: signal.raise_signal(signal.SIGTERM))
        stopped = train(args=rlhf.Args(**TINY, seed=3))
    assert stopped.code == 143
    resumed = train(args=parse("--resume", stopped.folder))
    assert resumed.code == 0
    assert same_run(finished, resumed)
    assert checkpoint(resumed.folder)["numbers"]["gold_units"] != [0.0, 1.0]


def test_resume_bitexact_twice(uninterrupted, monkeypatch):
    args = rlhf.Args(**EXACT)
    for stage, step in (("rm", 3), ("ppo", 2)):
        with monkeypatch.context() as patch:
            during(patch, stage, step, lambda run: signal.raise_signal(signal.SIGINT))
            stopped = train(args=args)
        args = parse("--resume", stopped.folder)
    assert same_run(uninterrupted, train(args=args))


def test_resume_bitexact_after_kill(functions, tmp_path, monkeypatch):
    """A process killed in iteration 20, 10 after its last checkpoint; this one goes on."""
    settings = VERIFIABLE | {"reward_fn": (f"{functions}:send",), "stages": "sft,ppo,eval"}
    settings |= {"total_episodes": 176, "checkpoint_every": 10, "kl_target": 0.1}
    whole = train(tmp_path / "whole", **settings)
    killed = tmp_path / "killed"
    killed.mkdir()
    monkeypatch.setenv("AT", "20")
    monkeypatch.setenv("SEND", "9")
    process = command_line("rlhf", *flags(**settings), cwd=killed)
    assert process.returncode == -9, process.stderr
    (path,) = killed.glob(CHECKPOINTS)
    data = checkpoint(path.parent)
    assert (data["stage"], data["step"]) == (2, 10)
    assert sizes(path.parent)[0] > data["bytes"][0]
    monkeypatch.setenv("AT", "0")
    resumed = train(killed, parse("--resume", path.parent))
    assert resumed.folder == path.parent
    assert same_run(whole, resumed)


def test_resume_of_a_finished_run_changes_nothing(finished):
    """But that config.json says so."""
    before = {path: path.read_bytes() for path in finished.folder.iterdir()}
    args = parse("--resume", finished.folder)
    assert args == rlhf.Args(**TINY, seed=3, resume=str(finished.folder / "checkpoint.pt"))
    run = train(args=args)
    after = {path: path.read_bytes() for path in finished.folder.iterdir()}
    configs = [json.loads(x.pop(finished.folder / "config.json")) for x in (before, after)]
    assert after == before
    assert configs[0] == {k: x for k, x in configs[1].items() if k not in ("resumed", "sent")}
    models = [weights(agent, "value_model") for agent in (run.agent, finished.agent)]
    assert same(*models)  # PPO is over: its value model is not kept


def test_resume_of_a_finished_run_with_more_episodes(finished, capsys):
    """Its value model is not kept, so PPO cannot go on."""
    folder, more = finished.folder, str(TINY["total_episodes"] + 1)
    line = error_line(capsys, parse, "--resume", folder, "--total-episodes", more)
    expected = "ppo is over, no more --total-episodes; --load does it anew"
    assert line == f"error: --resume {folder / 'checkpoint.pt'}: {expected}"
    rlhf.check_args(rlhf.parse_args(["--load", str(folder), "--total-episodes", more]))


@pytest.mark.parametrize(
    "flag, was",
    [("--seed=9", 3), ("--batch-size=4", 8), ("--task=sort", "reviews"), ("--group-size=2", 1)],
)
def test_resume_of_another_run(flag, was, finished, capsys):
    """Steps and random numbers would no longer be those of one run."""
    line = error_line(capsys, parse, "--resume", finished.folder, flag)
    name, new = flag.split("=")
    change = f"{name} is {new}, it was {was}"
    assert line == f"error: {change}; that is another run than {finished.folder}/checkpoint.pt"


@pytest.mark.parametrize(
    "stage, flags",
    [
        ("sft", ["--sft-texts=9", "--sft-batch-size=3"]),
        ("rm", ["--rm-pairs=9", "--rm-batch-size=3"]),
    ],
)
def test_resume_counts_steps_as_before(stage, flags, monkeypatch, capsys):
    """What a step or a pass of the stage under way has is as it was; of other stages it is free."""
    with monkeypatch.context() as patch:
        during(patch, stage, 2, lambda run: signal.raise_signal(signal.SIGINT))
        run = train(stages="sft,rm")
    capsys.readouterr()
    for flag in flags:
        line = error_line(capsys, parse, "--resume", run.folder, flag)
        assert line.startswith(f"error: {flag.replace('=', ' is ')}, it was ")
        assert line.endswith(f"; that is another run than {run.folder}/checkpoint.pt")
    other = {"sft": "rm", "rm": "sft"}[stage]
    parse("--resume", run.folder, f"--{other}-batch-size=3", f"--{stage}-epochs=3")


def stopped_in_ppo(monkeypatch, **changes):
    """A run that was stopped after its second iteration of four."""
    with monkeypatch.context() as patch:
        during(patch, "ppo", 2, lambda run: signal.raise_signal(signal.SIGINT))
        return train(**VERIFIABLE | changes)


def test_resume_with_more_episodes(monkeypatch):
    """What is given counts, what is not is as it was."""
    run = stopped_in_ppo(monkeypatch, anneal_lr=False)
    resumed = train(args=parse("--resume", run.folder, "--total-episodes", "48"))
    whole = train("whole", **VERIFIABLE | {"anneal_lr": False, "total_episodes": 48})
    assert same_run(whole, resumed)


@pytest.mark.parametrize(
    "flag, name, expected",
    [
        ("--learning-rate=0.25", "ppo/lr", [3e-4, 3e-4, 0.25, 0.25]),
        ("--kl-coef=0.25", "objective/kl_coef", [0.1, 0.1, 0.25, 0.25]),
    ],
)
def test_resume_with_another_setting(flag, name, expected, monkeypatch, capsys):
    """It counts from then on, and config.json has both, each with its time's versions."""
    run = stopped_in_ppo(monkeypatch, anneal_lr=False)
    capsys.readouterr()
    parse("--resume", run.folder, flag)
    assert capsys.readouterr().out == f"{flag.replace('=', ' is ')}, it was {expected[0]}\n"
    for _ in range(2):
        train(args=parse("--resume", run.folder, flag))
    assert values(run.folder, name) == pytest.approx(expected)
    config = json.loads((run.folder / "config.json").read_text())
    setting, value = flag.removeprefix("--").replace("-", "_").split("=")
    assert config[setting] == VERIFIABLE[setting]
    assert [x[setting] for x in config["resumed"]] == [float(value)] * 2
    assert config["resumed"][0].keys() == config.keys() - {"resumed", "sent"}


# ------------------------------------------------------------------------------------------------
# Signals


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_stops_after_the_step(number, code, functions, monkeypatch, tmp_path):
    """During the second rollout, whose iteration is still done and saved."""
    monkeypatch.setenv("AT", "2")
    monkeypatch.setenv("SEND", str(int(number)))
    settings = VERIFIABLE | {"reward_fn": (f"{functions}:send",), "checkpoint_every": 100}
    process = command_line("rlhf", *flags(**settings), cwd=tmp_path)
    assert process.returncode == code, process.stderr
    assert "Traceback" not in process.stderr
    (path,) = tmp_path.glob(CHECKPOINTS)
    lines = [line for line in process.stdout.splitlines() if line.startswith("written to ")]
    assert lines == [f"written to {path.parent.relative_to(tmp_path)}"]
    assert process.stdout.splitlines()[-2:-1] == lines  # and how to go on
    data = checkpoint(path.parent)
    assert (data["stage"], data["step"]) == (2, 2)
    assert values(path.parent, "ppo/episode") == [8, 16]


PROGRAMS = """
import os, signal, subprocess, sys

def ask(prompts, completions):  # a program, which the signal ends, too
    if not os.path.exists("asked"):
        open("asked", "w").close()
        number, here = os.environ["SEND"], os.getpid()
        say = f"import os, time; os.kill({here}, {number}); time.sleep(0.2); 1 / 0"
        subprocess.run([sys.executable, "-c", say], check=True, stderr=subprocess.DEVNULL)
    return [0.0] * len(completions)
"""


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_that_ends_what_a_reward_function_has_started(number, code, monkeypatch, tmp_path):
    """As Ctrl-C in a terminal does: the function fails, but the signal is why."""
    Path("programs.py").write_text(PROGRAMS)
    monkeypatch.setenv("SEND", str(int(number)))
    settings = VERIFIABLE | {"reward_fn": ("programs.py:ask",), "stages": "ppo"}
    settings |= {"checkpoint_every": 100, "load": str(train("sft", **VERIFIABLE).folder)}
    process = command_line("rlhf", *flags(**settings))
    assert process.returncode == code, process.stderr
    assert "error" not in process.stderr
    (path,) = Path().glob(CHECKPOINTS)
    data = checkpoint(path.parent)
    assert (data["stage"], data["step"]) == (2, 0)
    assert train(args=parse("--resume", path.parent)).code == 0


def test_second_signal_kills_at_once(functions, monkeypatch, tmp_path):
    monkeypatch.setenv("AT", "2")
    monkeypatch.setenv("SEND", "2 2")
    settings = VERIFIABLE | {"reward_fn": (f"{functions}:send",), "checkpoint_every": 100}
    process = command_line("rlhf", *flags(**settings), cwd=tmp_path)
    assert process.returncode == -signal.SIGINT, process.stderr
    assert "Traceback" not in process.stderr
    (path,) = tmp_path.glob(CHECKPOINTS)
    assert checkpoint(path.parent)["stage"] == 1
    assert "written to" not in process.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_after_a_signal_the_next_is_not_caught(number, monkeypatch):
    handlers = []

    def action(run):
        handlers.append(signal.getsignal(number))
        signal.raise_signal(number)
        handlers.append(signal.getsignal(number))

    during(monkeypatch, "sft", 2, action)
    train(**VERIFIABLE)
    assert handlers[0].__func__ is rlhf.Run.on_signal
    assert handlers[1] is signal.SIG_DFL


@pytest.mark.parametrize(
    "function, stage, step",
    [
        ("write_texts", 0, 1),
        ("preference_pairs", 1, 1),
        ("score_function", 2, 1),
        ("evaluate", 4, 0),
    ],
)
def test_signal_between_steps(function, stage, step, monkeypatch, capsys):
    """The next step is still done, the evaluation finished."""
    original = getattr(rlhf, function)

    def patched(*args, **kwargs):
        signal.raise_signal(signal.SIGINT)
        monkeypatch.setattr(rlhf, function, original)
        return original(*args, **kwargs)

    monkeypatch.setattr(rlhf, function, patched)
    run = train()
    assert run.code == 130
    data = checkpoint(run.folder)
    assert (data["stage"], data["step"]) == (stage, step)
    output = capsys.readouterr()
    assert output.out.splitlines()[-2] == f"written to {run.folder.relative_to(Path.cwd())}"
    assert output.out.count("written to") == 1


def test_signal_while_ranks_exchange_what_they_have_is_not_lost(monkeypatch):
    """It counts after the next step."""
    of_all_ranks, seen = rlhf.of_all_ranks, []

    def exchange(x):
        if type(x) in (int, signal.Signals):  # at the end of a step
            seen.append(int(x))
            if len(seen) == 2:
                signal.raise_signal(signal.SIGTERM)
        return of_all_ranks(x)

    monkeypatch.setattr(rlhf, "of_all_ranks", exchange)
    run = train(stages="sft")
    assert run.code == 143
    assert [x for x in seen if x in (0, 15)][-1] == 15 and checkpoint(run.folder)["step"] == 3


def test_handlers_are_as_they_were():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    rlhf.train(rlhf.Args(**SORT | {"stages": "sft"}))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_run_in_a_thread():
    """Which no signal is for."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(rlhf.train, rlhf.Args(**SORT | {"stages": "sft"})).result()
    (path,) = Path().glob(CHECKPOINTS)
    assert torch.load(path, weights_only=True)["stage"] == 1  # sft is over


def test_signal_at_the_end_of_a_step_leaves_a_checkpoint():
    class Every(int):
        """100; a signal comes when a step is divided by it."""

        def __rmod__(self, step):
            if step == 3:
                signal.raise_signal(signal.SIGINT)
            return step % 100

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataclasses, "asdict", lambda args: dict(vars(args), checkpoint_every=100))
        run = train(**VERIFIABLE | {"checkpoint_every": Every(100)})
    assert run.code == 130
    assert checkpoint(run.folder)["step"] >= 3


# ------------------------------------------------------------------------------------------------
# Stages


def test_stages_one_after_another_are_as_one_run(uninterrupted):
    """Products are taken over, and settings, as defaults."""
    folders, written, optimizers = [], [], {}
    for i, stages in enumerate(("sft", "rm", "ppo,eval")):
        if i == 0:
            args = rlhf.Args(**EXACT, stages=stages)
        else:
            args = parse("--load", folders[-1], "--stages", stages)
            assert dataclasses.replace(args, load=None) == rlhf.Args(**EXACT, stages=stages)
        run = train(str(i), args)
        folders.append(run.folder)
        written += rows(run.folder)
        optimizers |= run.optimizers
    assert written == rows(uninterrupted.folder)
    assert same(optimizers, uninterrupted.optimizers)
    last, whole = checkpoint(folders[-1]), checkpoint(uninterrupted.folder)
    assert same(last["models"], whole["models"])
    assert same(weights(run.agent), weights(uninterrupted.agent))
    assert last["numbers"] == whole["numbers"]
    assert len({*folders}) == 3


def test_ppo_again_from_the_end_of_a_run(uninterrupted):
    """Starts from the SFT policy, not from where PPO has arrived."""
    run = train(args=parse("--load", uninterrupted.folder, "--stages", "ppo,eval"))
    whole = rows(uninterrupted.folder)
    assert rows(run.folder) == [x for x in whole if x[1].split("/")[0] not in ("sft", "rm")]


def test_reward_model_again_from_the_end_of_a_run(uninterrupted):
    """With a new head, as the first time."""
    run = train(args=parse("--load", uninterrupted.folder, "--stages", "rm"))
    whole = rows(uninterrupted.folder)
    assert rows(run.folder) == [x for x in whole if x[1].startswith("rm/")]


def test_sft_cannot_be_loaded_and_run(uninterrupted, capsys):
    line = error_line(capsys, parse, "--load", uninterrupted.folder, "--stages", "sft,rm")
    assert "leave sft out of --stages" in line


def test_what_is_loaded_is_not_run_again(uninterrupted):
    assert parse("--load", uninterrupted.folder).stages == "ppo,eval"


def test_flags_win_over_what_is_loaded(uninterrupted):
    given = ["--stages=ppo", "--kl-coef=0.5", "--seed=9", "--no-anneal-lr", "--kl-target=None"]
    args = parse("--load", uninterrupted.folder, *given)
    assert (args.kl_coef, args.seed, args.anneal_lr, args.kl_target) == (0.5, 9, False, None)
    assert (args.d_model, args.task, args.reward_clip) == (16, "sort", 0.5)
    assert args.load == str(uninterrupted.folder / "checkpoint.pt")


def test_stages_without_a_reward_model():
    """It is neither trained nor asked for."""
    run = train(**SORT | {"rm_coef": 0.0, "stages": "sft,rm,ppo,eval"})
    assert not [name for _, name, _ in rows(run.folder) if name.startswith("rm/")]
    exact, scores = values(run.folder, "gold/score"), values(run.folder, "objective/scores")
    assert scores == pytest.approx(exact, abs=1e-6)


def test_evaluation_of_the_sft_policy():
    """PPO was left out, so the last column is the SFT policy, too."""
    run = train(stages="sft,rm,eval")
    assert values(run.folder, "eval/ppo/kl") == [0]


@pytest.mark.parametrize(
    "stages, hints",
    [
        ("rm,sft", ["choose from sft,rm,ppo,eval", "in this order"]),
        ("sft,rm,eval,ppo", ["in this order"]),
        ("sft,dpo", ["--stages sft,dpo", "choose from"]),
        ("sft, rm", ["choose from"]),
        ("", ["choose from"]),
        ("sft,sft", ["choose from"]),
        ("rm", ["needs what sft learns", "--load"]),
        ("ppo", ["needs what sft learns", "--load"]),
        ("ppo,eval", ["needs what sft learns"]),
        ("eval", ["needs what sft learns"]),
        ("rm,ppo", ["needs what sft learns"]),
        ("sft,ppo", ["needs what rm learns", "--load"]),
        ("sft,eval", ["needs what rm learns"]),
    ],
)
def test_stages_refused(stages, hints, capsys):
    line = error_line(capsys, rlhf.check_args, rlhf.Args(**SORT, stages=stages))
    assert all(hint in line for hint in hints), line


@pytest.mark.parametrize("stages", ["sft", "sft,rm", "sft,rm,ppo", "sft,rm,eval"])
def test_stages_accepted(stages, capsys):
    rlhf.check_args(rlhf.Args(**SORT, stages=stages))
    rlhf.check_args(rlhf.Args(**VERIFIABLE | {"stages": "sft,ppo,eval"}))
    assert capsys.readouterr() == ("", "")
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    "stop, stages, missing",
    [
        (("sft", 2), "rm", "sft"),  # half a policy
        (("rm", 2), "ppo", "rm"),
        (("rm", 2), "rm,ppo", None),
        (("ppo", 2), "ppo", None),
    ],
)
def test_product_of_the_checkpoint(stop, stages, missing, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        during(patch, *stop, lambda run: signal.raise_signal(signal.SIGINT))
        run = train()
    args = rlhf.parse_args(["--load", str(run.folder / "checkpoint.pt"), "--stages", stages])
    capsys.readouterr()
    if missing:
        assert f"needs what {missing} learns" in error_line(capsys, rlhf.check_args, args)
    else:
        rlhf.check_args(args)


@pytest.mark.parametrize("option", ["--load", "--resume"])
def test_reward_model_that_was_never_trained(option, capsys):
    run = train(**VERIFIABLE)
    path = str(run.folder / "checkpoint.pt")
    capsys.readouterr()
    args = rlhf.parse_args([option, path, "--rm-coef=1", "--stages=ppo,eval"])
    assert "needs what rm learns" in error_line(capsys, rlhf.check_args, args)


# ------------------------------------------------------------------------------------------------
# Functions as rewards


@pytest.mark.parametrize(
    "rm_coef, texts",
    [
        (0.0, ["words"]),
        (0.0, ["words:0.5"]),
        (0.0, ["words:-2"]),
        (0.0, ["words:2", "sevens:3e-1"]),
        (1.0, ["words"]),
        (0.5, ["sevens", "words:0.25"]),
        (2.0, []),
    ],
)
def test_reward_functions_add_up(rm_coef, texts, functions):
    args = rlhf.Args(**SORT | {"rm_coef": rm_coef})
    args = dataclasses.replace(args, reward_fn=tuple(f"{functions}:{text}" for text in texts))
    task = rlhf.TASKS["sort"]
    agent = rlhf.Agent(task, args)
    written = task.rows("sft", 20, np.random.default_rng(1))
    tokens = rlhf.write_texts(task, written, args.response_length)
    responses = [text.split() for text in rlhf.read_texts(task, tokens[:, task.prompt_length :])]
    expected = torch.zeros(20)
    if rm_coef:
        expected = rm_coef * rlhf.reward_scores(agent.reward_model, tokens).detach()
    for text in texts:
        name, _, weight = text.partition(":")
        rewards = [len(x) if name == "words" else x.count("7") for x in responses]
        expected = expected + float(weight or 1) * torch.tensor(rewards)
    score = rlhf.score_function(args, task, agent, run=None)
    torch.testing.assert_close(score(written, tokens), expected.float())
    assert not score(written, tokens).requires_grad


def test_reward_function_gets_texts(functions, monkeypatch):
    """By name: words with spaces in between, without padding and EOS; tokens without padding."""
    calls, load = [], rlhf.load_reward_function

    def patched(text):
        name, function, weight = load(text)

        def spy(**texts):
            calls.append(texts)
            return function(texts["prompts"], texts["completions"])

        return name, spy, weight

    monkeypatch.setattr(rlhf, "load_reward_function", patched)
    run = train(**VERIFIABLE | {"reward_fn": (f"{functions}:words:0.5",)})
    assert len(calls) == 4
    for texts in calls:
        assert texts.keys() == {"prompts", "completions", "completion_ids"}
        assert [len(texts[name]) for name in texts] == [8, 8, 8]
        assert all(re.fullmatch(r"sort( \d){3,7} =", prompt) for prompt in texts["prompts"])
        words = {word for text in texts["completions"] for word in text.split()}
        assert words <= {*rlhf.SORT_WORDS} - {"EOS"}
        for text, ids in zip(texts["completions"], texts["completion_ids"], strict=True):
            shown = [rlhf.SORT_WORDS[i] for i in ids]
            assert shown in (text.split(), [*text.split(), "EOS"])
    means = [0.5 * np.mean([len(x.split()) for x in call["completions"]]) for call in calls]
    assert values(run.folder, "objective/scores") == pytest.approx(means)


PROCESSES = """
import multiprocessing, time

def terminates(completions):
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(1000,))
    process.start()
    time.sleep(0.2)
    process.terminate()
    process.join(20)
    return [float(process.exitcode == -15)] * len(completions)
"""


def test_a_reward_function_can_end_its_processes(tmp_path):
    """They are copies of this one, but a signal ends them."""
    (tmp_path / "processes.py").write_text(PROCESSES)
    name = f"{tmp_path / 'processes.py'}:terminates"
    run = train(**VERIFIABLE | {"reward_fn": (name,), "total_episodes": 8})
    assert values(run.folder, "objective/scores") == [1.0]


def test_reward_functions_on_the_command_line(functions, uninterrupted):
    given = [f"{functions}:words", f"{functions}:sevens:0.5"]
    args = rlhf.parse_args([x for text in given for x in ("--reward-fn", text)])
    assert args.reward_fn == (*given,)
    rlhf.check_args(args)
    assert parse("--load", uninterrupted.folder, "--reward-fn", given[0]).reward_fn == (given[0],)


@pytest.mark.parametrize(
    "again",
    [
        False,
        True,
    ],
)
def test_resume_keeps_reward_functions(again, functions):
    """Also if the whole command is given again, with --resume added to it."""
    given = (f"{functions}:words",)
    run = train(**VERIFIABLE | {"reward_fn": given, "stages": "sft"})
    assert parse("--resume", run.folder, *again * flags(reward_fn=given)).reward_fn == given


@pytest.mark.parametrize(
    "how, hint",
    [
        ("raise", "raised ValueError: out of luck"),
        ("nan", "returned nan for '"),
        ("inf", "returned inf for '"),
        ("few", "returned 7 rewards for 8 completions"),
        ("many", "returned 9 rewards for 8 completions"),
        ("none", "raised TypeError: 'NoneType'"),
        ("number", "raised TypeError: 'float'"),
        ("text", "raised ValueError: could not convert"),
    ],
)
def test_reward_function_fails(how, hint, functions, monkeypatch, capsys):
    """In the third rollout; the two iterations before are kept, and the run can go on."""
    monkeypatch.setenv("HOW", how)
    settings = VERIFIABLE | {"reward_fn": (f"{functions}:fail",), "checkpoint_every": 100}
    settings |= {"reward_clip": 1.0, "kl_coef": 0.1, "kl_target": 0.1}
    monkeypatch.setenv("AT", "3")
    run = train(**settings)
    line = last_error(capsys, run)
    path = run.folder.relative_to(Path.cwd()) / "checkpoint.pt"
    assert line.startswith(f"error: {functions}:fail {hint}")
    assert line.endswith(f"; last good checkpoint: {path}")
    data = checkpoint(run.folder)
    assert (data["stage"], data["step"]) == (2, 2)
    if how == "raise":
        monkeypatch.setenv("AT", "0")
        resumed = train(args=parse("--resume", run.folder))
        assert same_run(resumed, train("whole", **settings))


def test_reward_function_fails_in_the_evaluation(functions, monkeypatch, capsys):
    monkeypatch.setenv("HOW", "raise")
    monkeypatch.setenv("AT", "1")
    settings = VERIFIABLE | {"stages": "sft,eval", "reward_fn": (f"{functions}:fail",)}
    run = train(**settings)
    assert f"{functions}:fail raised ValueError" in last_error(capsys, run)
    assert checkpoint(run.folder)["stage"] == 3


@pytest.mark.parametrize(
    "reward_clip",
    [
        None,
        1.0,
    ],
)
def test_reward_that_is_too_large(reward_clip, functions, monkeypatch, capsys):
    """For 32 bits."""
    monkeypatch.setenv("VALUE", "1e300")
    settings = {"reward_fn": (f"{functions}:constant",), "reward_clip": reward_clip}
    run = train(**VERIFIABLE | settings)
    line = last_error(capsys, run)
    assert line.startswith("error: rewards not finite at step 8; last good checkpoint: runs/")
    assert finite(checkpoint(run.folder))


@pytest.mark.parametrize(
    "text, hints",
    [
        ("missing.py:words", ["FileNotFoundError", "missing.py"]),
        ("functions.py:nothing", ["functions.py:nothing", "nothing"]),
        ("syntax.py:words", ["SyntaxError"]),
        ("raises.py:words", ["ZeroDivisionError", "by zero"]),
        ("functions.py:words:heavy", ["functions.py:words:heavy", "'heavy'"]),
        ("functions.py:words:1:2", ["write file.py:function"]),
        ("functions.py", ["write file.py:function"]),
        ("functions", ["write file.py:function"]),
        ("functions.py:", ["write file.py:function"]),
    ],
)
def test_reward_function_refused(text, hints, functions, capsys):
    Path("syntax.py").write_text("def words(:\n")
    Path("raises.py").write_text("1 / 0\n")
    line = error_line(capsys, rlhf.check_args, rlhf.Args(**SORT, reward_fn=(text,)))
    assert line.startswith(f"error: --reward-fn {text}: ")
    assert all(hint in line for hint in hints), line


@pytest.mark.parametrize(
    "text, hint",
    [
        ("functions.py:words:nan", "nan"),
        ("functions.py:words:inf", "inf"),
        ("functions.py:calls", "callable"),
        ("attribute.py:words", "has no attribute"),
    ],
)
def test_reward_function_refused_in_time(text, hint, functions, capsys):
    Path("attribute.py").write_text("import math\nmath.nothing\n")
    line = error_line(capsys, rlhf.check_args, rlhf.Args(**SORT, reward_fn=(text,)))
    assert line.startswith(f"error: --reward-fn {text}: ") and hint in line


def test_a_reward_function_has_its_neighbours():
    """Modules and files beside it, as if it was run by hand, imported early or late."""
    folder = Path("rewards")
    folder.mkdir()
    (folder / "words_of_mine.py").write_text("GOOD = 2.0\n")
    (folder / "late_words.py").write_text("MORE = 1.0\n")
    (folder / "number.txt").write_text("0.5")
    (folder / "mine.py").write_text(
        "from pathlib import Path\nfrom words_of_mine import GOOD\n"
        "NUMBER = float((Path(__file__).parent / 'number.txt').read_text())\n"
        "def score(prompts, completions):\n"
        "    from late_words import MORE\n"
        "    return [GOOD + MORE + NUMBER] * len(prompts)\n"
    )
    name, function, weight = rlhf.load_reward_function("rewards/mine.py:score:2")
    assert (name, function(["a"], ["b"]), weight) == ("rewards/mine.py:score", [3.5], 2.0)


def test_reward_clip_of_equal_scores(functions, monkeypatch):
    """Rounding makes their variance negative."""
    monkeypatch.setenv("VALUE", "0.1")
    settings = {"reward_fn": (f"{functions}:constant",), "reward_clip": 1.0}
    assert train(**VERIFIABLE | settings).code == 0


# ------------------------------------------------------------------------------------------------
# Refused before training


def test_kl_target_with_a_beta_of_0_refused(capsys):
    args = rlhf.Args(**SORT | {"kl_coef": 0.0, "kl_target": 1.0})
    assert "--kl-target" in error_line(capsys, rlhf.check_args, args)


@pytest.mark.parametrize(
    "changes, hints",
    [
        ({"d_model": 18, "num_heads": 4}, ["--d-model 18", "4 --num-heads"]),
        ({"num_minibatches": 3}, ["--batch-size 8", "no multiple of --num-minibatches 3"]),
        ({"num_minibatches": 16}, ["--batch-size 8", "no multiple of --num-minibatches 16"]),
        ({"total_episodes": 7}, ["--total-episodes 7", "--batch-size"]),
        ({"task": "reviews", "rm_coef": 0.0}, ["no reward", "--rm-coef above 0", "--reward-fn"]),
        ({"load": "nowhere.pt"}, ["nowhere.pt", "FileNotFoundError"]),
    ],
)
def test_settings_refused(changes, hints, capsys):
    line = error_line(capsys, rlhf.check_args, rlhf.Args(**SORT | changes))
    assert all(hint in line for hint in hints), line
    assert not list(Path().iterdir())


class Malicious:
    def __reduce__(self):
        return (os.mkdir, ("hacked",))


KINDS = ["missing", "folder", "empty", "text", "list", "other", "malicious", "newer"]


@pytest.mark.parametrize("option", ["--resume", "--load"])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_refused(option, kind, capsys):
    """Also one of another script, or one that would do something else when it is loaded."""
    path = Path("some.pt")
    if kind == "folder":
        path.mkdir()
    elif kind in ("empty", "text"):
        path.write_text("global_step,time,name,value\n" if kind == "text" else "")
    elif kind == "list":
        torch.save([1, 2], path)
    elif kind == "other":
        torch.save({"args": {"env_id": "CartPole-v1", "seed": 1}, "iteration": 3}, path)
    elif kind == "malicious":
        torch.save({"args": {}, "stage": 0, "numbers": {}, "x": Malicious()}, path)
    elif kind == "newer":
        args = dataclasses.asdict(rlhf.Args(**SORT))
        torch.save({"version": 2, "args": args, "stage": 0, "numbers": {}}, path)
    line = error_line(capsys, rlhf.parse_args, [option, str(path)])
    assert (kind == "newer") == line.endswith("ValueError: version 2, not 1")
    assert re.match(r"error: some\.pt(/checkpoint\.pt)? is no checkpoint of ppo_rlhf\.py: ", line)
    assert not Path("hacked").exists()


@pytest.mark.parametrize("flag", ["--d-model=32", "--num-layers=2", "--response-length=12"])
def test_checkpoint_that_does_not_fit(flag, uninterrupted, capsys):
    args = parse("--load", uninterrupted.folder, "--stages=ppo", flag)
    line = error_line(capsys, rlhf.train, args)
    assert line.startswith(f"error: {uninterrupted.folder} does not fit these settings: ")
    assert not list(Path().iterdir())


@pytest.mark.parametrize("name", ["config.json", "metrics.csv", "samples.jsonl"])
def test_resume_without_metrics(name, uninterrupted, capsys):
    shutil.copytree(uninterrupted.folder, "alone")
    Path("alone", name).unlink()
    line = error_line(capsys, rlhf.train, parse("--resume", Path("alone")))
    assert line.startswith("error: a run needs a folder to write to: ")
    assert f"'alone/{name}'" in line


@pytest.mark.parametrize("name", ["metrics.csv", "samples.jsonl"])
def test_a_folder_copied_while_its_run_wrote_to_it(name, monkeypatch, capsys):
    """A file is older than checkpoint.pt: its whole lines stay, others follow."""
    path = stopped_in_ppo(monkeypatch).folder / name
    half = path.read_bytes()[: path.stat().st_size // 2]
    assert not half.endswith(b"\n")
    path.write_bytes(half)
    capsys.readouterr()
    resumed = train(args=parse("--resume", path.parent))
    assert f"{path} lacks rows from before the checkpoint\n" in capsys.readouterr().out
    now, kept = path.read_bytes(), half[: half.rfind(b"\n") + 1]
    assert resumed.code == 0 and now.startswith(kept) and b"\0" not in now
    assert now.count(b"\n") > kept.count(b"\n") or name == "samples.jsonl"
    assert checkpoint(path.parent)["bytes"] == sizes(path.parent)


@pytest.mark.parametrize("option", ["--resume", "--load"])
@pytest.mark.parametrize("name", ["reference.pt", "reward_model.pt"])
@pytest.mark.parametrize("how", ["missing", "other"])
def test_checkpoint_without_the_models_beside_it(option, name, how, uninterrupted, capsys):
    """They are asked for by their hashes, before anything is written."""
    shutil.copytree(uninterrupted.folder, "alone")
    path = Path("alone", name)
    if how == "other":
        data = torch.load(path, weights_only=True)
        torch.save({key: 2 * tensor for key, tensor in data.items()}, path)
    else:
        path.unlink()
    before = {x: x.read_bytes() for x in Path("alone").iterdir()}
    line = error_line(capsys, rlhf.train, parse(option, Path("alone")))
    if how == "other":
        assert line == f"error: {path} is not the file that belongs to the checkpoint"
    else:
        assert line.startswith("error: alone does not fit these settings: ") and name in line
    assert {x: x.read_bytes() for x in Path("alone").iterdir()} == before
    assert [x.name for x in Path().iterdir()] == ["alone"]


def test_track_without_wandb(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    line = error_line(capsys, rlhf.check_args, rlhf.Args(**SORT, track=True))
    assert "--track" in line and "pip install wandb" in line


def test_errors_come_before_wandb_is_contacted(tmp_path):
    """On the command line: one line, nothing else, nothing left behind."""
    wandb = "from pathlib import Path\ndef init(**settings):\n    Path('contacted').touch()\n"
    (tmp_path / "wandb.py").write_text(wandb)
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    given = flags(**SORT | {"track": True, "num_minibatches": 3})
    process = command_line("rlhf", *given, cwd=tmp_path, env=env)
    assert process.returncode == 2
    assert process.stdout == ""
    (line,) = process.stderr.splitlines()
    assert line.startswith("error: --batch-size 8")
    assert {path.name for path in tmp_path.iterdir()} <= {"wandb.py", "__pycache__"}


# ------------------------------------------------------------------------------------------------
# Not finite


def no_number(*args, **kwargs):
    """Instead of the forward pass of a model."""
    return torch.full(args[0].shape, torch.nan)


def spoiled_step(network):
    """An action: the next update of the optimizer leaves a weight of the network NaN."""

    def action(run):
        step = run.optimizer.step

        def patched():
            step()
            with torch.no_grad():
                next(getattr(run.agent, network).parameters())[0, 0] = torch.nan

        run.optimizer.step = patched

    return action


def spoiled_gradient(network):
    """An action: a gradient is NaN, though the loss is not."""

    def action(run):
        parameter = next(getattr(run.agent, network).parameters())
        parameter.register_hook(lambda gradient: gradient * torch.nan)

    return action


def spoiled(name):
    """An action: what a function of the module returns, or the first of it, is NaN from now on."""

    def action(run):
        original = getattr(rlhf, name)

        def patched(*args, **kwargs):
            result = original(*args, **kwargs)
            if isinstance(result, tuple):
                return (result[0] * torch.nan, *result[1:])
            return result * np.nan

        run.monkeypatch.setattr(rlhf, name, patched)

    return action


def stopped(monkeypatch, capsys, stage, step, action, **changes):
    """The metric, step and last good checkpoint of a run that is spoiled at a step."""

    def act(run):
        run.monkeypatch = monkeypatch
        action(run)

    during(monkeypatch, stage, step, act)
    run = train(**changes)
    line = last_error(capsys, run)
    match = re.fullmatch(r"error: (.+) not finite at step (\d+); last good checkpoint: (.+)", line)
    assert match, line
    if match[3] == "none yet":
        assert not (run.folder / "checkpoint.pt").exists()
        return match[1], int(match[2]), None
    assert Path(match[3]).absolute() == run.folder / "checkpoint.pt"
    data = checkpoint(run.folder)
    assert finite(data)
    assert all(then <= now for then, now in zip(data["bytes"], sizes(run.folder), strict=True))
    return match[1], int(match[2]), (data["stage"], data["step"])


def no_values(run):
    run.agent.value_model.forward = no_number


def no_scores(run):
    run.agent.reward_model.forward = no_number


@pytest.mark.parametrize(
    "action, name, saved",
    [
        (no_values, "values", 2),  # found before the update: the last iteration is saved
        (no_scores, "rewards", 2),
        (spoiled("kl_estimate"), "rewards", 2),
        (spoiled("gae"), "advantages", 2),
        (spoiled_step("policy"), "weights", 0),  # found after it: nothing is
        (spoiled_step("value_model"), "weights", 0),
        (spoiled_gradient("policy"), "ppo/policy/grad_norm", 0),
        (spoiled_gradient("value_model"), "ppo/val/grad_norm", 0),
    ],
)
@pytest.mark.parametrize("every", [1, 100])
def test_not_finite_in_ppo(action, name, saved, every, monkeypatch, capsys):
    """In the third iteration, which has one update."""
    settings = {"checkpoint_every": every, "update_epochs": 1}
    found = stopped(monkeypatch, capsys, "ppo", 3, action, **settings)
    assert found == (name, 24, (2, 2 if every == 1 else saved))


@pytest.mark.parametrize("stage, network", [("sft", "policy"), ("rm", "reward_model")])
@pytest.mark.parametrize(
    "kind, name",
    [
        ("loss", "loss"),
        ("gradient", "grad_norm"),
        ("step", "weights"),
    ],
)
@pytest.mark.parametrize("every", [1, 2])
def test_not_finite_before_ppo(stage, network, kind, name, every, monkeypatch, capsys):
    """In the fourth step, the last, after which there would be a checkpoint."""
    actions = {
        "loss": spoiled(f"{stage}_loss"),
        "gradient": spoiled_gradient(network),
        "step": spoiled_step(network),
    }
    settings = {"checkpoint_every": every}
    found, step, saved = stopped(monkeypatch, capsys, stage, 4, actions[kind], **settings)
    assert found == name
    assert step == 4 * TINY[f"{stage}_batch_size"]
    assert saved == (rlhf.STAGES.index(stage), 3 if every == 1 else 2)


def test_not_finite_in_the_first_step(monkeypatch, capsys):
    found = stopped(monkeypatch, capsys, "sft", 1, spoiled("sft_loss"))
    assert found == ("loss", TINY["sft_batch_size"], None)


NAMES = ("sft_learning_rate", "rm_learning_rate", "learning_rate")
TOO_LARGE = [(name, value) for name in NAMES for value in (1e6, 1e10, 1e15, 1e20, 1e30)]
TOO_LARGE += [(NAMES[2], 1e38), *[(name, 1e38) for name in NAMES[:2]]]


@pytest.mark.parametrize("name, learning_rate", TOO_LARGE)
def test_learning_rate_that_is_too_large(name, learning_rate, capsys):
    """The run ends with an error of one line, or at its end; no NaN is ever saved."""
    run = train(**{name: learning_rate, "checkpoint_every": 1, "update_epochs": 1})
    assert run.code in (0, 2)
    assert not run.code or "not finite" in last_error(capsys, run)
    assert not (run.folder / "checkpoint.pt").exists() or finite(checkpoint(run.folder))


@pytest.mark.parametrize("action", [no_values, no_scores])
def test_resume_bitexact_after_what_is_not_finite(action, monkeypatch, capsys, uninterrupted):
    with monkeypatch.context() as patch:
        during(patch, "ppo", 3, action)
        run = train(args=rlhf.Args(**EXACT))
    assert "not finite" in last_error(capsys, run)
    assert finite(checkpoint(run.folder))
    assert same_run(uninterrupted, train(args=parse("--resume", run.folder)))


# ------------------------------------------------------------------------------------------------
# Warnings


def statistic(name, *numbers):
    """A patch: a statistic of the iterations, the last number for all that follow."""

    def patch(monkeypatch):
        original, calls = rlhf.ppo_gradient, []

        def patched(*args):
            calls.append(args)
            number = numbers[min(len(calls), len(numbers)) - 1]
            return original(*args) | {name: torch.tensor(number)}

        monkeypatch.setattr(rlhf, "ppo_gradient", patched)

    return patch


def mismatch(difference):
    def patch(monkeypatch):
        original = rlhf.sample

        def patched(*args):
            tokens, logprobs = original(*args)
            return tokens, logprobs + difference

        monkeypatch.setattr(rlhf, "sample", patched)

    return patch


def kl(value):
    """A patch: the KL of each response to the SFT policy, if the policy stays the same."""

    def patch(monkeypatch):
        original = rlhf.response_logprobs

        def patched(policy, tokens, prompt_length):
            logprobs = original(policy, tokens, prompt_length).clone()
            is_reference = not any(p.requires_grad for p in policy.parameters())
            logprobs[:, 0] -= value * is_reference
            return logprobs

        monkeypatch.setattr(rlhf, "response_logprobs", patched)

    return patch


def reward(value):
    """A patch: all scores are the same."""

    def patch(monkeypatch):
        score = rlhf.score_function

        def patched(*args):
            original = score(*args)
            return lambda rows, tokens: original(rows, tokens) * 0 + value

        monkeypatch.setattr(rlhf, "score_function", patched)

    return patch


RATIO = "the first ratios are not 1"
MISMATCH = "sampler and trainer log-probabilities differ"
NEGATIVE = "the KL has been negative for 10 rollouts"
EQUAL = "all scores are equal, nothing can be learned"
ENDLESS = "most responses do not end"
ENTROPY = "the entropy has collapsed"
CLIPPED = "most of the update is clipped"
CHANCE = "the reward model is no better than chance; more --rm-pairs?"


@pytest.mark.parametrize(
    "message, patch, changes, count",
    [
        (RATIO, statistic("val/ratio_var", 2e-6), {}, 1),
        (RATIO, statistic("val/ratio_var", 5e-7), {}, 0),
        (MISMATCH, mismatch(2e-3), {}, 1),
        (MISMATCH, mismatch(5e-4), {}, 0),
        (NEGATIVE, kl(-2e-3), {"total_episodes": 12 * 8}, 1),
        (NEGATIVE, kl(-2e-3), {"total_episodes": 10 * 8}, 1),
        (NEGATIVE, kl(-2e-3), {"total_episodes": 9 * 8}, 0),
        (NEGATIVE, kl(0.0), {"total_episodes": 12 * 8}, 0),
        (EQUAL, reward(0.0), {}, 1),
        (EQUAL, reward(0.3), {}, 1),
        (EQUAL, None, {}, 0),
        (ENDLESS, None, {"response_length": 2}, 1),
        (ENDLESS, None, {"response_length": 40}, 0),
        (ENTROPY, statistic("policy/entropy", 1.0, 0.04), {}, 1),
        (ENTROPY, statistic("policy/entropy", 1.0, 0.06), {}, 0),
        (CLIPPED, statistic("policy/clipfrac", 0.41), {}, 1),
        (CLIPPED, statistic("policy/clipfrac", 0.39), {}, 0),
    ],
)
def test_warnings_of_ppo(message, patch, changes, count, monkeypatch, capsys):
    """Once, though the condition holds in all iterations."""
    if patch:
        patch(monkeypatch)
    settings = {"update_epochs": 1, "critic_warmup": 0, "learning_rate": 0.0}
    train(**VERIFIABLE | settings | changes)
    lines = capsys.readouterr().err.splitlines()
    assert lines.count(f"warning: {message}") == count, lines


@pytest.mark.parametrize("sign, count", [(1, 0), (-1, 1)])
def test_warning_of_the_reward_model(sign, count, monkeypatch, capsys):
    """Which prefers all that is preferred, or nothing."""
    original = rlhf.reward_scores

    def patched(model, tokens):
        scores = original(model, tokens)  # first of the chosen, then of the rejected
        return scores + 100 * sign * (torch.arange(len(scores)) < len(scores) / 2)

    monkeypatch.setattr(rlhf, "reward_scores", patched)
    run = train(stages="sft,rm")
    assert capsys.readouterr().err.count(f"warning: {CHANCE}\n") == count
    assert values(run.folder, "rm/accuracy") == [1 - count]
    assert values(run.folder, "rm/accuracy_gold") != values(run.folder, "rm/accuracy")


def test_negative_kl_is_counted_across_resume(monkeypatch, capsys):
    settings = {"critic_warmup": 0, "learning_rate": 0.0, "total_episodes": 80}
    kl(-0.1)(monkeypatch)
    run = stopped_in_ppo(monkeypatch, **settings)
    assert NEGATIVE not in capsys.readouterr().err
    train(args=parse("--resume", run.folder))
    assert capsys.readouterr().err.splitlines().count(f"warning: {NEGATIVE}") == 1


# ------------------------------------------------------------------------------------------------
# Evaluation and what is printed


def table(text):
    """The names of the columns and the numbers of each row of what `evaluate` prints."""
    lines = text.splitlines()
    (start,) = [i for i, line in enumerate(lines) if re.match(r"\d+ prompts ", line)]
    shown = {}
    for line in lines[start + 1 : start + 1 + len(TABLE)]:
        name, *numbers = line.split()
        shown[name] = [float(x) for x in numbers]
    return re.split(r"\s{2,}", lines[start]), shown


def test_evaluation_table(finished):
    """What is printed is what is logged."""
    names, cells = table(finished.out)
    assert names == ["8 prompts", *COLUMNS]
    assert cells.keys() == {*TABLE}
    for i, column in enumerate(COLUMNS):
        for row in TABLE:
            name = f"eval/{column.lower().replace(' ', '_')}/{row}"
            (logged,) = values(finished.folder, name)
            assert cells[row][i] == pytest.approx(logged, abs=5.1e-4), name


def test_evaluation_of_best_of_n(finished):
    """Its exact KL is log n - (n - 1) / n; the proxy can only get better."""
    for run in (finished, train("sort", rlhf.Args(**SORT))):
        result = {name[5:]: float(value) for _, name, value in rows(run.folder) if "eval/" in name}
        for n in (4, 16):
            assert result[f"best_of_{n}/kl"] == pytest.approx(math.log(n) - 1 + 1 / n, abs=1e-8)
        assert result["sft/kl"] == 0
        assert result["sft/wins_against_sft"] == 0.5
        proxies = [result[f"{name}/proxy"] for name in ("sft", "best_of_4", "best_of_16")]
        assert proxies[0] < proxies[1] < proxies[2]


def test_evaluation_again(finished):
    """The columns computed once more from the four models; the same samples."""
    args, task, agent = rlhf.Args(**TINY, seed=3), rlhf.TASKS["reviews"], finished.agent
    rng = rlhf.stream(args, "evaluation")
    prompts = rlhf.write_texts(task, task.rows("eval", 8, rng))
    pool = [rlhf.sample(args, task, agent.reference, prompts, rng)[0] for _ in range(16)]
    units = checkpoint(finished.folder)["numbers"]["gold_units"]
    with torch.no_grad():
        proxies = torch.stack([rlhf.reward_scores(agent.reward_model, x) for x in pool])
    golds = np.stack([rlhf.gold_rewards(task, tokens, *units)["score"] for tokens in pool])
    _, cells = table(finished.out)
    for column, n in enumerate((1, 4, 16)):
        best = proxies[:n].argmax(0).numpy()
        gold = golds[best, np.arange(8)]
        assert cells["proxy"][column] == pytest.approx(float(proxies[:n].amax(0).mean()), abs=1e-3)
        assert cells["gold/score"][column] == pytest.approx(gold.mean(), abs=1e-3)
        wins = ((gold > golds[0]) + 0.5 * (gold == golds[0])).mean()
        assert cells["wins_against_sft"][column] == pytest.approx(wins, abs=1e-3)
    tokens, _ = rlhf.sample(args, task, agent.policy, prompts, rng)
    with torch.no_grad():
        logprobs = [rlhf.response_logprobs(x, tokens, 12) for x in (agent.policy, agent.reference)]
        proxy = rlhf.reward_scores(agent.reward_model, tokens).mean().item()
    assert cells["kl"][3] == pytest.approx((logprobs[0] - logprobs[1]).sum().item() / 8, abs=1e-3)
    assert cells["proxy"][3] == pytest.approx(proxy, abs=1e-3)


def test_evaluation_changes_nothing(uninterrupted):
    run = train(args=rlhf.Args(**EXACT, stages="sft,rm,ppo"))
    assert same(weights(run.agent), weights(uninterrupted.agent))
    whole = rows(uninterrupted.folder)
    assert rows(run.folder) == [x for x in whole if not x[1].startswith("eval/")]
    assert len(rows(run.folder)) < len(whole)


def test_texts_are_printed(finished):
    """Of four prompts, the SFT policy's and PPO's, with both rewards."""
    text = finished.out[finished.out.index("8 prompts") :]
    prompts = [line for line in text.splitlines() if line.endswith(" :")]
    number = r"[+-]\d+\.\d\d"
    shown = re.findall(rf"^  (SFT|PPO)  proxy {number}  gold {number}  .*$", text, re.MULTILINE)
    assert len(prompts) == 4
    assert shown == ["SFT", "PPO"] * 4


def test_progress_is_printed(finished):
    """The first iteration, each tenth after it and the last; at the end, where everything is."""
    number = r" +-?\d+\.\d\d"
    line = rf"^ppo: +(\d+) episodes  proxy{number}  gold{number}  KL{number}$"
    assert re.findall(line, finished.out, re.MULTILINE) == ["8", "32"]
    assert finished.out.splitlines()[-1] == f"written to runs/{finished.folder.name}"
    assert "step/s" not in finished.err  # no bar, as this is no terminal


def test_bars_on_a_terminal(monkeypatch):
    """One for each stage, up to the last of its steps."""
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    train(stages="sft,rm,ppo", sft_texts=48)
    shown = re.findall(r"(\w+): 100%.* (\d+/\d+) \[.*step", terminal.getvalue())
    assert dict(shown) == {"sft": "3/3", "rm": "4/4", "ppo": "4/4"}


# ------------------------------------------------------------------------------------------------
# Weights & Biases


@pytest.fixture
def recorders(monkeypatch):
    """The runs of something that stands in for wandb."""
    runs = []

    def init(**settings):
        def finish(exit_code):
            run.finished.append(exit_code)

        run = SimpleNamespace(settings=settings, rows=[], defined=[], finished=[], id="recorded")
        run.log = run.rows.append
        run.define_metric = lambda *args, **kwargs: run.defined.append((args, kwargs))
        run.finish = finish
        runs.append(run)
        return run

    def new_table(columns, data):
        return SimpleNamespace(columns=columns, data=data)

    wandb = SimpleNamespace(init=init, Table=new_table, Error=CrashError, __spec__=True)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    return runs


def cells(logged):
    """W&B's rows as `rows` gives those of metrics.csv."""
    return [
        (row["global_step"], name, f"{value:.9g}")
        for row in logged
        for name, value in row.items()
        if name not in ("global_step", "samples")
    ]


def test_wandb_calls(recorders):
    settings = {"wandb_project_name": "project", "wandb_entity": "team", "track": True}
    settings |= {"batch_size": 32, "total_episodes": 12 * 32}
    run = train(**settings)
    (recorder,) = recorders
    given = recorder.settings
    names = [given[key] for key in ("project", "entity", "name", "id")]
    assert names == ["project", "team", run.folder.name, None]
    assert {name: given["config"][name] for name in FIELDS} == FIELDS | SORT | settings
    assert recorder.defined == [(("*",), {"step_metric": "global_step"})]
    assert cells(recorder.rows) == rows(run.folder, wall_clock=True)
    tables = {row["global_step"]: row["samples"] for row in recorder.rows if "samples" in row}
    assert tables.keys() == {32, 11 * 32}
    assert [len(samples.data) for samples in tables.values()] == [16, 16]
    assert recorder.finished == [0]


def test_wandb_config_has_the_derived_sizes(recorders):
    train(**VERIFIABLE | {"track": True, "stages": "sft"})
    config = recorders[0].settings["config"]
    assert (config["minibatch_size"], config["num_iterations"]) == (8, 4)


def test_wandb_run_goes_on(recorders, monkeypatch):
    """In the same run, without a row twice."""
    run = stopped_in_ppo(monkeypatch, track=True)
    assert recorders[0].finished == [130]
    train(args=parse("--resume", run.folder))
    first, second = (recorder.settings for recorder in recorders)
    assert (first["id"], second["id"], second["resume"]) == (None, "recorded", "allow")
    assert second["name"] == run.folder.name
    logged = cells(recorders[0].rows + recorders[1].rows)
    assert logged == rows(run.folder, wall_clock=True)


def test_wandb_run_is_kept_in_mind_by_a_part_without_it(recorders, monkeypatch):
    run = stopped_in_ppo(monkeypatch, track=True)
    train(args=parse("--resume", run.folder, "--no-track"))
    assert len(recorders) == 1
    assert checkpoint(run.folder)["wandb_id"] == "recorded"


def test_wandb_gets_all_that_follows_a_part_without_it_that_was_killed(recorders, monkeypatch):
    """Rows behind its checkpoint were never sent."""
    run = stopped_in_ppo(monkeypatch)
    before = len(rows(run.folder, wall_clock=True))
    with open(run.folder / "metrics.csv", "a") as file:
        file.write("56,1.0,losses/x,0.1\n" * 100)
    train(args=parse("--resume", run.folder, "--track"))
    assert cells(recorders[0].rows) == rows(run.folder, wall_clock=True)[before:]


def test_wandb_gets_no_row_twice(recorders, monkeypatch):
    """Rows logged between the last checkpoint and a kill are there already, after three kills, too.

    The first comes when the first samples are logged, the second in the sixth iteration, the third
    in the fifth, before the second's was reached.
    """
    log, log_samples, kill_at = rlhf.Run.log, rlhf.Run.log_samples, ["samples", 48, 40, 0]

    class KilledError(BaseException):
        pass

    def killed(*_):
        raise KilledError

    def patched(run, global_step, metrics):
        log(run, global_step, metrics)
        assert (run.folder / "metrics.csv").read_text().count("\n") == run.lines  # at once
        if "ppo/lr" in metrics and global_step == kill_at[0]:
            kill_at.pop(0)
            raise KilledError

    def patched_samples(run, *values, **numbers):
        log_samples(run, *values, **numbers)
        if kill_at[0] == "samples":
            kill_at.pop(0)
            raise KilledError

    monkeypatch.setattr(rlhf.Run, "log", patched)
    monkeypatch.setattr(rlhf.Run, "log_samples", patched_samples)
    with pytest.raises(KilledError):
        train(track=True, checkpoint_every=10, total_episodes=80)
    (folder,) = Path().glob("runs/*")
    with pytest.raises(KilledError):
        train(args=parse("--resume", folder))
    for name in ("replace", "truncate"):  # killed while it takes the folder up again
        with monkeypatch.context() as patch, pytest.raises(KilledError):
            patch.setattr(os, name, killed)
            train(args=parse("--resume", folder))
    with pytest.raises(KilledError):
        train(args=parse("--resume", folder))
    run = train(args=parse("--resume", folder))
    first, second, third, last = (recorder.rows for recorder in recorders)
    assert third == []
    sent = first + second + last
    assert [x["global_step"] for x in sent if "ppo/lr" in x] == [*range(8, 81, 8)]
    assert [x["global_step"] for x in sent if "samples" in x] == [8]
    shown = [x for x in cells(sent) if not x[1].startswith(("time/", "perf/"))]
    assert shown == rows(run.folder)


def test_wandb_that_refuses(recorders, monkeypatch, capsys):
    def init(**settings):
        raise CrashError("no API key")

    monkeypatch.setattr(sys.modules["wandb"], "init", init)
    line = error_line(capsys, rlhf.train, rlhf.Args(**SORT, track=True))
    assert line == "error: Weights & Biases: no API key"


def tracked(path):
    """A .wandb file: id of the run, its config, rows and exit codes."""
    run = SimpleNamespace(path=path, ids=set(), config={}, rows=[], exits=[])
    for record in wandb_records(path):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            items = record.history.item
            run.rows.append(
                {x.key or ".".join(x.nested_key): json.loads(x.value_json) for x in items}
            )
        elif kind == "run":
            run.ids.add(record.run.run_id)
            run.config |= {x.key: json.loads(x.value_json) for x in record.run.config.update}
        elif kind == "exit":
            run.exits.append(record.exit.exit_code)
    return run


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """A function: a tracked process without a network. Returns it and what W&B has of it."""
    pytest.importorskip("wandb")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    seen = set()

    def offline(*flags):
        process = command_line("rlhf", *flags, cwd=tmp_path)
        (path,) = set(tmp_path.glob("wandb/offline-run-*/run-*.wandb")) - seen
        seen.add(path)
        return process, tracked(path)

    return offline


def numbers(written):
    """Rows as `rows` gives them, in an order of their own."""
    return sorted((step, name, float(value)) for step, name, value in written)


@pytest.mark.slow
def test_wandb_offline(offline, functions, monkeypatch, tmp_path):
    """A real run of W&B, stopped and resumed: together it has what metrics.csv has."""
    settings = VERIFIABLE | {"track": True, "reward_fn": (f"{functions}:send",)}
    settings |= {"total_episodes": 88, "stages": "sft,ppo,eval"}
    monkeypatch.setenv("AT", "6")
    monkeypatch.setenv("SEND", str(int(signal.SIGTERM)))
    process, first = offline(*flags(**settings))
    assert process.returncode == 143, process.stderr
    monkeypatch.setenv("AT", "0")
    (path,) = tmp_path.glob(CHECKPOINTS)
    process, second = offline("--resume", str(path))
    assert process.returncode == 0, process.stderr
    assert len(first.ids) == 1 and first.ids == second.ids == {checkpoint(path.parent)["wandb_id"]}
    saved = json.loads((path.parent / "config.json").read_text())
    assert {name: first.config[name] for name in FIELDS} == {name: saved[name] for name in FIELDS}
    assert all("global_step" in row for row in first.rows + second.rows)
    written = rows(path.parent, wall_clock=True)
    logged = [{k: v for k, v in row.items() if k[0] != "_"} for row in first.rows + second.rows]
    assert numbers(cells(row for row in logged if "samples.path" not in row)) == numbers(written)
    assert second.exits == [0]
    texts = (path.parent / "samples.jsonl").read_text().splitlines()
    texts = [row for row in map(json.loads, texts) if "policy" not in row]
    for run, step in ((first, 8), (second, 88)):
        (row,) = [row for row in run.rows if "samples.path" in row]
        assert row["global_step"] == step
        content = json.loads((run.path.parent / "files" / row["samples.path"]).read_text())
        assert content["columns"] == ["global_step", *SAMPLE]
        assert {row[0] for row in content["data"]} == {step}
        data = [row[1:] for row in content["data"]]
        check_samples(data, {name: x for n, name, x in written if n == step})
        assert data == [[x[name] for name in SAMPLE] for x in texts if x["global_step"] == step]
    assert len(texts) == 16


SAMPLE = ["prompt", "response", "score", "kl", "gold", "length"]


def check_samples(data, metrics):
    """8 texts; the means of what stands beside them are what is logged."""
    assert len(data) == 8
    for prompt, response, score, _, _, length in data:
        assert re.fullmatch(r"sort( \d){3,7} =", prompt)
        assert score == len(response.split())
        assert length - score in (0, 1)  # EOS
    means = np.mean([row[2:] for row in data], axis=0)
    names = ("objective/scores", "objective/kl", "gold/score", "response/length")
    assert means == pytest.approx([float(metrics[name]) for name in names], abs=1e-6)


@pytest.mark.slow
def test_wandb_shows_a_run_that_failed_as_failed(offline, functions, monkeypatch):
    monkeypatch.setenv("AT", "1")
    monkeypatch.setenv("HOW", "raise")
    settings = VERIFIABLE | {"track": True, "reward_fn": (f"{functions}:fail",)}
    process, run = offline(*flags(**settings))
    assert process.returncode == 2, process.stderr
    assert run.exits == [2]


# ------------------------------------------------------------------------------------------------
# The command line


def test_booleans_of_sweeps():
    given = ["--anneal_lr=False", "--norm-adv=false", "--track=True", "--cuda=true", "--seed=7"]
    args = rlhf.parse_args([*given, "--whiten-rewards=True"])
    assert (args.anneal_lr, args.norm_adv, args.track, args.cuda) == (False, False, True, True)
    assert (args.whiten_rewards, args.seed) == (True, 7)
    args = rlhf.parse_args(["--no-anneal-lr", "--whiten-rewards", "--exp-name=true"])
    assert (args.anneal_lr, args.whiten_rewards, args.exp_name) == (False, True, "true")


def test_defaults_of_the_tasks():
    assert rlhf.parse_args([]) == rlhf.parse_args(["--task=reviews"]) == rlhf.Args()
    assert rlhf.parse_args(["--task", "sort"]) == rlhf.Args(**rlhf.SORT)
    assert rlhf.parse_args(["--task=sort", "--kl-coef=0.5"]).kl_coef == 0.5
    for args in (rlhf.Args(), rlhf.Args(**rlhf.SORT)):
        rlhf.check_args(args)


@pytest.mark.parametrize("flag", ["--minibatch-size=8", "--num-iterations=8", "--ent-coef=0.1"])
def test_no_such_flag(flag, capsys):
    with pytest.raises(SystemExit) as error:
        rlhf.parse_args([flag])
    assert error.value.code == 2
    assert flag.split("=")[0] in capsys.readouterr().err


def test_help_has_every_argument(capsys):
    """With a text, the comment in the code."""
    with pytest.raises(SystemExit) as end:
        rlhf.parse_args(["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    for name in FIELDS:
        assert re.search(rf"--{name.replace('_', '-')}\b", shown), name
    words = " ".join(re.sub("[^ -~]", " ", shown).split())
    for text in ("what to run; what is left out comes from --load", "weight of the value loss"):
        assert text in words


def test_script_needs_no_other_packages(tmp_path):
    """A copy of the file alone, where what it could do without cannot be imported."""
    names = ("transformers", "gymnasium", "wandb", "peft", "vllm", "datasets", "trl")
    for name in names:
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} was imported')\n")
    script = tmp_path / "ppo_rlhf.py"
    script.write_bytes(Path(rlhf.__file__).read_bytes())
    command = [sys.executable, script, *flags(**VERIFIABLE | {"stages": "sft,ppo,eval"})]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert len(list(tmp_path.glob(CHECKPOINTS))) == 1


# ------------------------------------------------------------------------------------------------
# The folder of a run, and disks


def test_the_folder_is_as_good_as_its_checkpoint():
    """To resume and to load from; both say the same as checkpoint.pt."""
    done = train()
    folder = done.folder
    one, two = (rlhf.parse_args(["--resume", str(x)]) for x in (folder, folder / "checkpoint.pt"))
    assert dataclasses.replace(one, resume=None) == dataclasses.replace(two, resume=None)
    with pytest.raises(SystemExit):
        rlhf.parse_args(["--resume", "."])


def script(folder, *flags, largest=None):
    """The last line on the standard error of a command that fails where files are limited."""
    done = subprocess.run(
        [sys.executable, rlhf.__file__, *flags],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest)),
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


def whole_lines(folder):
    """What a run leaves that fails: no unfinished file, no half line. -> rows of metrics.csv"""
    assert not list(folder.glob("*.tmp"))
    assert all((folder / name).read_bytes()[-1:] in (b"\n", b"") for name in rlhf.FILES)
    return (folder / "metrics.csv").read_text().splitlines()[1:]


def test_a_disk_that_is_full_is_one_line(tmp_path):
    more = ["--task", "sort", "--sft-texts", "256", "--no-cuda"]
    line = script(tmp_path, *more, largest=200_000)
    (folder,) = tmp_path.glob("runs/*")
    start = f"error: {folder.relative_to(tmp_path)} cannot be written to: no space?"
    assert line.startswith(start), line
    assert line.endswith("; last good checkpoint: none yet")
    assert len(whole_lines(folder)) == 2 * 3  # of two steps, in front of the first checkpoint


@pytest.mark.slow
def test_a_disk_that_is_full_later(monkeypatch, tmp_path):
    """The checkpoint before is as it was, and named."""

    def crash(run):
        raise CrashError

    with monkeypatch.context() as patch, contextlib.suppress(CrashError):
        during(patch, "ppo", 4, crash)
        train(tmp_path, **SORT)
    (folder,) = tmp_path.glob("runs/*")
    before = (folder / "checkpoint.pt").read_bytes()
    line = script(tmp_path, "--resume", str(folder), largest=len(before) // 2)
    assert line.startswith(f"error: {folder} cannot be written to: "), line
    assert line.endswith(f"; last good checkpoint: {folder}/checkpoint.pt")
    assert (folder / "checkpoint.pt").read_bytes() == before
    assert whole_lines(folder)


@pytest.mark.parametrize("name, nth", [("metrics.csv", 12), ("samples.jsonl", 8)])
def test_no_half_line_where_the_disk_is_full_for_a_moment(name, nth, monkeypatch):
    opened = []

    def full(path, mode="r", **kwargs):
        file = open(path, mode, **kwargs)
        opened.append(Path(path).name)
        return Full(file) if opened[-1] == name and opened.count(name) == nth else file

    monkeypatch.setattr(rlhf, "open", full, raising=False)
    folder, line = faulty(OSError)
    assert line.startswith(f"error: {folder} cannot be written to: [Errno 28]")
    assert opened.count(name) == nth
    assert not [x for x in whole_lines(folder) if not re.fullmatch(r"\d+,[\d.]+,\w+/[\w/]+,\S+", x)]
    resumed = train(args=parse("--resume", folder))
    assert resumed.code == 0
    monkeypatch.undo()
    assert same_run(train(), resumed)


def faulty(error):
    """A run that meets an error, which ends it as it does at the end of the script."""
    rlhf.Run.now = None
    with pytest.raises(error) as caught:
        train()
    run, printed = rlhf.Run.now, io.StringIO()
    with contextlib.redirect_stderr(printed), pytest.raises(SystemExit) as ended:
        run.stop(f"{run.folder} cannot be written to: {caught.value}")
    assert ended.value.code == 2
    (line,) = printed.getvalue().splitlines()
    return run.folder, line


def test_a_folder_that_is_gone(monkeypatch):
    during(monkeypatch, "sft", 3, lambda run: shutil.rmtree(run.folder))
    folder, line = faulty(FileNotFoundError)
    assert f"'{folder}/metrics.csv'; last good checkpoint: " in line
    assert not folder.exists()


def test_lines_are_on_the_disk_before_the_checkpoint_that_counts_on_them(monkeypatch):
    """Or after a power cut it would speak of rows that are not there."""
    synced, fsync = [], os.fsync

    def spy(number):
        synced.append(Path(os.readlink(f"/proc/self/fd/{number}")).name)
        fsync(number)

    monkeypatch.setattr(os, "fsync", spy)
    train(stages="sft")
    saved = [i for i, name in enumerate(synced) if name == "checkpoint.pt.tmp"]
    assert len(saved) == 3
    assert all(synced[i - 2 : i] == ["metrics.csv", "samples.jsonl"] for i in saved)
