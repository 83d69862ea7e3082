"""[X2] Several processes, each with its part of the environments and minibatches, learn as one."""

import multiprocessing
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

import ppo_atari
import ppo_atari_lstm
import ppo_continuous
import ppo_discrete
from conftest import ROOT, metrics, train

SCRIPTS = {
    "discrete": (ppo_discrete, {}),
    "continuous": (ppo_continuous, {"env_id": "Pendulum-v1"}),
    "atari": (ppo_atari, {"env_id": "PongNoFrameskip-v4"}),
    "atari_lstm": (ppo_atari_lstm, {"env_id": "PongNoFrameskip-v4", "num_envs": 4}),
}
each_script = pytest.mark.parametrize("name", SCRIPTS)


@pytest.mark.parametrize("name", ["discrete", "rlhf"])  # the other ones have the same lines
@pytest.mark.parametrize("gpus, device", [(0, None), (1, None), (2, 1)])
def test_what_is_on_the_cpu_can_be_exchanged_too(name, gpus, device, monkeypatch):
    """Where there are GPUs torch takes NCCL alone, unless it is told; rank 1 takes its own GPU."""
    found, devices = [], []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(dist, "init_process_group", lambda *args: found.extend(args))
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    monkeypatch.setattr(sys, "argv", [f"ppo_{name}.py", "--help"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / f"ppo_{name}.py"), run_name="__main__")
    backends = dist.distributed_c10d.BackendConfig(dist.Backend(*found)).get_device_backend_map()
    assert backends["cpu"] == "gloo"
    assert backends["cuda"] == ("nccl" if gpus else "gloo")
    assert devices == ([] if device is None else [device])


def one_rank(function, rank, args):
    dist.init_process_group(
        "gloo", init_method="file://" + os.path.abspath("store"), rank=rank, world_size=2
    )
    torch.save(function(rank, *args), f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def on_two_ranks(function, *args):
    """What function(rank, *args) returns in each of two processes."""
    for path in Path().glob("store*"):
        path.unlink()
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=one_rank, args=(function, i, args)) for i in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    return [torch.load(f"rank{i}.pt", weights_only=False) for i in range(2)]


def short_run(name, **changes):
    script, own = SCRIPTS[name]
    if script is ppo_atari_lstm:
        own = own | {"precision": "fp32", "vectorization": "sync", "cuda": False}
        own |= {"num_steps": 8, "num_minibatches": 2, "update_epochs": 2, "torch_threads": 1}
        return script.train(script.Args(**{"total_timesteps": 64} | own | changes))
    return train(script, **own | changes)


def minibatch_of(agent, envs):
    """Random numbers in place of a minibatch, in the order of ppo_loss."""
    M, rng = 32, np.random.default_rng(0)
    space, actions = envs.single_observation_space, envs.single_action_space
    if space.dtype == np.uint8:
        obs = rng.integers(0, 256, (M, *space.shape), dtype=np.uint8)
    else:
        obs = rng.normal(size=(M, *space.shape)).astype(np.float32)
        obs[:, getattr(agent, "obs_dim", obs.shape[1]) :] = 0.0  # every choice is valid
    if isinstance(actions, ppo_discrete.gym.spaces.Box):
        taken = rng.normal(size=(M, *actions.shape)).astype(np.float32)
    else:
        taken = rng.integers(0, 2, (M, *actions.shape))
    numbers = rng.normal(size=(4, M)).astype(np.float32)
    numbers[0] = -np.abs(numbers[0])
    return [torch.as_tensor(x) for x in (obs, taken, *numbers)]


COEFFICIENTS = (torch.tensor(0.2), torch.tensor(0.01), None, 0.5, False, True)


def gradient_of(rank, name, rows, max_norm):
    script, own = SCRIPTS[name]
    torch.manual_seed(1)
    envs = script.make_envs(script.Args(**own | {"num_envs": 2, "vectorization": "sync"}))
    agent = script.Agent(envs)
    batch = minibatch_of(agent, envs)
    stats = script.ppo_gradient(agent, batch, rows[rank], max_norm, *COEFFICIENTS)
    return [x.grad for x in agent.parameters()], stats["grad_norm"]


@pytest.mark.parametrize("name", ["discrete", "continuous", "atari"])
@pytest.mark.parametrize("max_norm", [float("inf"), 0.01])
def test_x2_gradient_of_the_parts_is_that_of_the_whole(name, max_norm):
    order = torch.as_tensor(np.random.default_rng(1).permutation(32))
    parts = on_two_ranks(gradient_of, name, order.split(16), max_norm)
    whole, norm = gradient_of(0, name, [order], max_norm)
    for grads, its_norm in parts:
        assert its_norm == pytest.approx(norm.item(), rel=1e-5)
        for x, y in zip(grads, whole, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-6)


def clipped(rank, name):
    """Ranks with the gradients (3, 4) and (-3, 4)."""
    script = SCRIPTS[name][0]
    module = torch.nn.Linear(2, 1, bias=False)
    own = torch.tensor([[3.0, 4.0], [-3.0, 4.0]])[rank]
    script.ppo_loss = lambda agent, *_: ((module.weight * own).sum(), {})
    arguments = [torch.zeros(1, 1)] * 9 if script is ppo_atari_lstm else [torch.zeros(1)]
    script.ppo_gradient(module, arguments, torch.tensor([0]), 0.5)
    return module.weight.grad[0].tolist()


@each_script
def test_x2_gradients_are_averaged_before_they_are_clipped(name):
    """(0, 4) becomes (0, 0.5); clipped first, the average would be (0, 0.4)."""
    for gradient in on_two_ranks(clipped, name):
        assert gradient == pytest.approx([0.0, 0.5], abs=1e-6)


def recorded(rank, name, changes):
    """The weights before and after a run, and all minibatches between."""
    script, _ = SCRIPTS[name]
    ppo_gradient, minibatches, initial = script.ppo_gradient, [], []

    def spy(agent, batch, indices, max_grad_norm, *coefficients):
        initial.append({k: x.clone() for k, x in agent.state_dict().items()})
        rows = [x[:, indices] for x in batch] if script is ppo_atari_lstm else None
        minibatches.append(rows or [x[indices] for x in batch])
        return ppo_gradient(agent, batch, indices, max_grad_norm, *coefficients)

    script.ppo_gradient = spy
    agent = short_run(name, **changes)
    return initial[0], minibatches, agent.state_dict()


@each_script
def test_x2_an_iteration_of_two_ranks_is_that_of_one_process(name):
    """Given the same transitions in the same minibatches; not, if one rank is left out."""
    script, own = SCRIPTS[name]
    one_iteration = {"norm_adv": False, "total_timesteps": 32, "seed": 3}
    (initial, first, after), (_, second, other_after) = on_two_ranks(recorded, name, one_iteration)
    assert all(torch.equal(after[k], other_after[k]) for k in after)
    envs = script.make_envs(script.Args(**own | {"num_envs": 2, "vectorization": "sync"}))
    differences = []
    for left_out in (False, True):
        agent = script.Agent(envs)
        agent.load_state_dict(initial)
        args = script.Args()
        optimizer = torch.optim.Adam(
            agent.parameters(), lr=torch.tensor(args.learning_rate), eps=1e-5, fused=True
        )
        numbers = (torch.tensor(args.clip_coef), torch.tensor(args.ent_coef), None, args.vf_coef)
        for pair in zip(first, second, strict=True):
            axis = int(script is ppo_atari_lstm)
            parts = pair[:1] if left_out else pair
            joined = [torch.cat(x, dim=axis) for x in zip(*parts, strict=True)]
            everything = torch.arange(joined[0].shape[axis])
            optimizer.zero_grad()
            script.ppo_gradient(
                agent, joined, everything, args.max_grad_norm, *numbers, False, args.clip_vloss
            )
            optimizer.step()
        weights = agent.state_dict()
        differences.append(max((weights[k] - after[k]).abs().max().item() for k in after))
    assert len(first) == 4
    assert differences[0] < 1e-5 < 1e-4 < differences[1]


def trained(rank, name, changes):
    """Weights and what was seen, and whether there is a folder's name on this rank."""
    script, _ = SCRIPTS[name]
    made, seen, make_envs = [], {}, script.make_envs

    def keep(args):
        made.append(make_envs(args))
        return made[-1]

    if script is ppo_continuous:
        update = script.RunningMeanStd.update
        script.RunningMeanStd.update = lambda rms, x: (
            seen.setdefault(id(rms), []).append(np.array(x)) or update(rms, x)
        )
    script.make_envs = keep
    agent = short_run(name, **changes)
    statistics = {}
    for kind in ("obs_rms", "return_rms") if script is ppo_continuous else ():
        rms = getattr(made[-1], kind)
        statistics[kind] = (vars(rms), np.concatenate(seen[id(rms)]))
    return agent.state_dict(), statistics


@each_script
def test_x2_ranks_stay_equal(name):
    """Weights after 52 updates, 12 of Atari, and statistics, bit for bit; one checkpoint."""
    iterations = 3 if "atari" in name else 13
    (weights, statistics), (other_weights, others) = on_two_ranks(
        trained, name, {"total_timesteps": 32 * iterations}
    )
    assert all(torch.equal(weights[k], other_weights[k]) for k in weights)
    (path,) = Path().glob("runs/*/checkpoint.pt")
    saved = torch.load(path, weights_only=True)
    assert all(torch.equal(saved["agent"][k], weights[k]) for k in weights)
    assert saved["optimizer"]["state"][0]["step"] == 4 * iterations
    for kind, (rms, seen) in statistics.items():
        both = np.concatenate([seen, others[kind][1]])
        for k, x in rms.items():
            np.testing.assert_array_equal(x, others[kind][0][k])
        n, prior = len(both), 1e-4
        mean = both.sum(0) / (n + prior)
        var = (prior * (1 + mean**2) + ((both - mean) ** 2).sum(0)) / (n + prior)
        assert rms["count"] == pytest.approx(n + prior)
        if kind == "obs_rms":
            assert not np.allclose(seen.mean(0), others[kind][1].mean(0))
        np.testing.assert_allclose(rms["mean"], mean, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(rms["var"], var, rtol=1e-9, atol=1e-9)


def decided(rank, changes):
    """Updates and beta where ranks 0 and 1 have a KL of 0 and 0.04."""
    ppo_gradient, betas = ppo_discrete.ppo_gradient, []

    def faked(*args):
        betas.append(float(args[6] if args[6] is not None else 0))
        return ppo_gradient(*args) | {"approx_kl": torch.tensor(0.04 * rank)}

    ppo_discrete.ppo_gradient = faked
    train(ppo_discrete, **changes)
    return betas


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"target_kl": 0.03}, [0.0] * 8),
        ({"target_kl": 0.01}, [0.0] * 4),
        ({"penalty_kl": 0.02}, [1.0] * 8),
        ({"penalty_kl": 0.01}, [1.0] * 4 + [2.0] * 4),
    ],
)
def test_x2_ranks_decide_alike(changes, expected):
    """By the mean over the ranks, 0.02, which for one alone would be too little or too much."""
    assert on_two_ranks(decided, changes) == [expected] * 2


def episodes(rank):
    train(ppo_discrete, env_id="Scripted-v0", num_envs=4)


def test_x2_episodes_of_all_ranks_are_logged():
    """Each of four environments ends an episode every three steps, in 32 steps ten."""
    on_two_ranks(episodes)
    steps = [step for step, _, name, _ in metrics() if name == "charts/episodic_return"]
    assert steps == [12 * k for k in range(1, 11) for _ in range(4)]


def first_actions(rank):
    envs, rollouts, gae = ppo_discrete.gym.vector.SyncVectorEnv, [], ppo_discrete.gae
    seeds, reset = [], envs.reset
    envs.reset = lambda self, *, seed, **kwargs: seeds.extend(seed) or reset(self, seed=seed)
    ppo_discrete.gae = lambda *args: rollouts.append(args[3].copy()) or gae(*args)
    train(ppo_discrete, num_envs=4, num_steps=64)
    return seeds, rollouts[0]


def test_x2_ranks_play_different_games():
    (seeds, dones), (other_seeds, other_dones) = on_two_ranks(first_actions)
    assert dones.shape == other_dones.shape == (64, 2)
    assert len({*seeds, *other_seeds}) == 4
    assert (dones != other_dones).any()


def signalled(rank):
    """Rank 1 gets SIGTERM in the second iteration. Exit code, and the updates that were made."""
    ppo_gradient, calls = ppo_discrete.ppo_gradient, []

    def count(*args):
        calls.append(1)
        if rank == 1 and len(calls) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return ppo_gradient(*args)

    ppo_discrete.ppo_gradient = count
    with pytest.raises(SystemExit) as stopped:
        train(ppo_discrete, total_timesteps=320)
    return stopped.value.code, len(calls)


def test_x2_a_signal_to_one_rank_stops_all_after_the_same_iteration():
    assert on_two_ranks(signalled) == [(128 + signal.SIGTERM, 8)] * 2
    (path,) = Path().glob("runs/*/checkpoint.pt")
    assert torch.load(path, weights_only=True)["iteration"] == 2


# ------------------------------------------------------------------------------------------------
# By torchrun

SMALL = ["--num-envs", "2", "--num-steps", "64", "--num-minibatches", "2", "--no-cuda"]
FAULT = """
import os, gymnasium as gym, numpy as np
class Fault(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (2,))
    action_space = gym.spaces.Discrete(2)
    steps = 0
    def reset(self, *, seed=None, options=None):
        return np.zeros(2, np.float32), {}
    def step(self, action):
        self.steps += 1
        if self.steps == 200 and os.environ["RANK"] == "1":
            WHAT
        return np.zeros(2, np.float32), 1.0, self.steps % 9 == 0, False, {}
gym.register("Fault-v0", Fault)
"""


def torchrun(*flags, script="discrete", **env):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command += ["--master_port=0", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        [*command, str(ROOT / f"ppo_{script}.py"), *SMALL, *flags],
        start_new_session=True,
        env=os.environ | env,
        **how,
    )


def alive(process):
    found = subprocess.run(
        ["ps", "-s", str(process.pid), "-o", "pid="], capture_output=True, check=False
    )
    return found.stdout.decode().split()


def lines_of_ours(stderr):
    return [line for line in stderr.splitlines() if line.startswith("error:")]


def finish(process, timeout=120):
    stdout, stderr = process.communicate(timeout=timeout)
    assert alive(process) == []
    return stdout, stderr


@pytest.mark.slow
def test_x2_compiled_and_eager_ranks_agree():
    """The gradient with its all-reduce is one graph: without a notice, within 1e-5 of eager.

    Of the ranks, one tells W&B.
    """
    weights = []
    tracked = {"WANDB_MODE": "offline", "WANDB_DIR": os.getcwd()}
    for more, env in (
        ([], {"TORCHDYNAMO_DISABLE": "0"}),
        (["--no-compile", "--track"], tracked),
    ):
        process = torchrun("--total-timesteps", "384", *more, **env)
        stdout, stderr = finish(process)
        assert process.returncode == 0, stderr
        assert "notice" not in stderr and stdout.count("written to") == 1
        (folder,) = Path("runs").iterdir()
        weights.append(torch.load(folder / "checkpoint.pt", weights_only=True)["agent"])
        folder.rename(f"run{len(weights)}")
    assert len(list(Path().glob("wandb/offline-run-*"))) == 1  # that of rank 0
    assert max((weights[0][k] - weights[1][k]).abs().max().item() for k in weights[0]) < 1e-5


@pytest.mark.slow
def test_x2_a_signal_stops_all_ranks_and_the_run_goes_on_with_two_or_one():
    flags = ["--total-timesteps", "5000000", "--no-compile"]
    process = torchrun(*flags, script="continuous")
    while not list(Path().glob("runs/*/metrics.csv")):
        time.sleep(0.05)
    time.sleep(1.0)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, and torchrun sends it once more
    stdout, stderr = finish(process)
    assert process.returncode != 0
    assert (
        lines_of_ours(stderr) == []
        and "Traceback (most recent call last):\n  File"
        not in (stderr.split("torch/distributed/elastic")[0])
    )
    (folder,) = Path("runs").iterdir()
    assert f"torchrun --nproc_per_node=2 {ROOT / 'ppo_continuous.py'} --resume" in stdout
    before = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert float(before["obs_count"]) == pytest.approx(before["global_step"] + 2, abs=1e-3)
    total = str(before["global_step"] + 3 * 128)
    process = torchrun("--resume", str(folder), "--total-timesteps", total, script="continuous")
    _, stderr = finish(process)
    assert process.returncode == 0, stderr
    args = ["--resume", str(folder), "--total-timesteps", str(int(total) + 3 * 128)]
    args = ppo_continuous.parse_args(args)
    ppo_continuous.train(args)
    after = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert after["global_step"] == args.total_timesteps
    assert float(after["obs_count"]) == pytest.approx(after["global_step"] + 2, abs=1e-3)
    steps = [step for step, _, name, _ in metrics() if name == "charts/SPS"]
    assert steps == list(range(128, args.total_timesteps + 1, 128))


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        pytest.param(
            *("raise KeyError('lost')", r"Fault-v0, environment 1, step 200: KeyError: 'lost'"),
            marks=pytest.mark.slow,
        ),
        ("os._exit(1)", "another rank has ended"),
    ],
)
def test_x2_a_rank_that_fails_ends_all(what, expected):
    """One line from one rank, nobody left over, no checkpoint after that."""
    Path("fault.py").write_text(FAULT.replace("WHAT", what))
    flags = ["--env-id", "fault:Fault-v0", "--total-timesteps", "64000", "--no-compile"]
    process = torchrun(*flags, "--checkpoint-every", "2")
    _, stderr = finish(process)
    (line,) = lines_of_ours(stderr)
    (path,) = Path().glob("runs/*/checkpoint.pt")
    assert re.fullmatch(rf"error: {expected}; last good checkpoint: {path}", line)
    assert torch.load(path, weights_only=True)["iteration"] == 2
    assert process.returncode != 0


@pytest.mark.slow
def test_x2_two_ranks_learn_to_balance():
    """CartPole-v1 with its default settings; seeds 1 to 5 reached 500."""
    process = torchrun("--num-envs", "4", "--num-steps", "128", "--num-minibatches", "4")
    _, stderr = finish(process, timeout=600)
    assert process.returncode == 0, stderr
    returns = [value for *_, name, value in metrics() if name == "charts/episodic_return"]
    assert np.mean(returns[-100:]) > 450


def refusal(rank, name, changes):
    script, own = SCRIPTS[name]
    with pytest.raises(SystemExit) as stopped, open(f"rank{rank}.txt", "w") as sys.stderr:
        script.check_args(script.Args(**own | changes))
    return stopped.value.code


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"num_envs": 3}, "num_envs 3 cannot be divided by the 2 ranks"),
        ({"num_envs": 2, "num_steps": 15, "num_minibatches": 6}, "minibatch_size 5 cannot be"),
        ({"evaluate": "x", "num_envs": 2}, "--evaluate plays in one process"),
        ({"env_id": "Cartpole-v1"}, "unknown environment Cartpole-v1"),
    ],
)
def test_x2_what_cannot_be_divided_is_refused_in_one_line(changes, hint):
    assert on_two_ranks(refusal, "discrete", changes) == [2, 2]
    (line,) = "".join(Path(f"rank{i}.txt").read_text() for i in range(2)).splitlines()
    assert hint in line


def test_x2_with_memory_a_minibatch_has_whole_environments_of_each_rank():
    changes = {"num_envs": 4, "num_minibatches": 4}
    assert on_two_ranks(refusal, "atari_lstm", changes) == [2, 2]
    (line,) = "".join(Path(f"rank{i}.txt").read_text() for i in range(2)).splitlines()
    assert "4 environments (--num-envs) cannot be divided into 4 equal" in line
    assert line.endswith("--num-minibatches, 2 ranks")
