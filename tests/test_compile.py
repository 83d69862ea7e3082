"""The update under torch.compile: one graph, compiled once, with the numbers it has without."""

import os
import types

import pytest
import torch

import conftest
import ppo_atari
import ppo_continuous
import ppo_discrete
from conftest import far_from_initial, metrics, small_agent

NOTICE = "notice: not compiled, slower: "
BROKEN_COMPILER = """#!/bin/sh
case "$*" in *version*) exit 0;; esac
echo "fatal error: Python.h: No such file or directory" >&2
exit 1
"""


@pytest.fixture(autouse=True)
def compiling(monkeypatch):
    """Here torch.compile compiles, and is to do so only once for a function."""
    monkeypatch.delenv("TORCHDYNAMO_DISABLE")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(trace_autograd_ops=False, error_on_recompile=True):
        yield


@pytest.mark.parametrize(
    ("script", "backend", "precision", "penalty"),
    [
        (ppo_discrete, "aot_eager", (), False),
        (ppo_discrete, "aot_eager", (), True),
        (ppo_continuous, "aot_eager", (), False),
        (ppo_atari, "aot_eager", (), False),
        (ppo_atari, "aot_eager", ("bf16",), False),
        pytest.param(ppo_continuous, "inductor", (), False, marks=pytest.mark.slow),
    ],
)
def test_gradient_compiles_whole_and_only_once(script, backend, precision, penalty):
    """Iterations with annealed coefficients, statistics and gradients as without compiling.

    The coefficients are filled in place in the first three iterations and new ones in the last.
    """
    torch.manual_seed(0)
    envs = small_agent(script)[1]
    agent = script.Agent(envs, *precision)
    far_from_initial(agent)
    fast = torch.compile(script.ppo_gradient, fullgraph=True, backend=backend)
    obs = torch.randint(0, 256, (24, *envs.single_observation_space.shape))
    obs = obs.to(torch.uint8) if script is ppo_atari else obs / 128 - 1
    coefficients = torch.tensor([0.2, 0.01, 1.0]).unbind()
    for remaining in (1.0, 0.5, 0.1, 0.05):
        if remaining == 0.05:
            coefficients = (torch.tensor(0.01), torch.tensor(0.0005), torch.tensor(3.0))
        coefficients[0].fill_(0.2 * remaining)
        coefficients[1].fill_(0.01 * remaining)
        annealed = coefficients if penalty else (*coefficients[:2], None)
        with torch.no_grad():
            policy, values = agent(obs)
            actions = policy.sample()
            logprobs = policy.log_prob(actions) + 0.2 * torch.randn(24)
        values = values + torch.randn(24)
        batch = [obs, actions[:20], logprobs[:20], values, *torch.randn(2, 20)]
        indices, results = torch.randperm(20)[:16], []
        for gradient in (script.ppo_gradient, fast):
            agent.zero_grad()
            with torch._dynamo.config.patch(trace_autograd_ops=True):
                stats = gradient(agent, batch, indices, 0.1, *annealed, 0.5, True, True)
            assert not any(value.requires_grad for value in stats.values())
            assert stats["grad_norm"] > 0.1  # there was something to clip
            results.append(stats | {name: p.grad for name, p in agent.named_parameters()})
        eager, compiled = results
        assert eager.keys() == compiled.keys()
        for name, expected in eager.items():
            torch.testing.assert_close(compiled[name], expected, atol=1e-6, rtol=1e-5, msg=name)


SLOW = [pytest.param(x, marks=pytest.mark.slow) for x in (ppo_discrete, ppo_atari)]


@pytest.mark.parametrize("script", [ppo_continuous, *SLOW])
def test_ten_compiled_updates_are_those_without_compiling(script, monkeypatch, capsys):
    """Two rollouts of five minibatches. The first of each is on-policy, to 1e-5 in every ratio."""
    stats, make = [], script.compiled

    def recorded(function):
        fast = make(function)

        def call(agent, batch, indices, max_grad_norm, clip_coef, *coefficients):
            if len(stats) % 5 == 0:  # clipfrac is then the share of ratios off by more than 1e-5
                strict = torch.full_like(clip_coef, 1e-5)
                first = fast(agent, batch, indices, max_grad_norm, strict, *coefficients)
                assert first["clipfrac"] == 0
                assert first["approx_kl"].abs() < 1e-5
                agent.zero_grad()
            stats.append(fast(agent, batch, indices, max_grad_norm, clip_coef, *coefficients))
            return stats[-1]

        return call

    monkeypatch.setattr(script, "compiled", recorded)
    loop = {"num_steps": 20, "num_minibatches": 5, "update_epochs": 1, "learning_rate": 1e-3}
    fast, eager = (conftest.train(script, compile=x, **loop).state_dict() for x in (True, False))
    assert capsys.readouterr().err == ""
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert len(stats) == 10
    assert stats[1]["approx_kl"] > 1e-6  # the policy has moved
    for name, expected in eager.items():
        torch.testing.assert_close(fast[name], expected, atol=1e-5, rtol=0.0, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("script", [ppo_discrete, ppo_continuous, ppo_atari])
def test_without_autograd_in_the_graph_loss_and_clipping_are_compiled(script, monkeypatch, capsys):
    """As torch before 2.13 has it: two graphs, backward() between them, the numbers of eager."""
    loop = {"num_steps": 20, "num_minibatches": 5, "update_epochs": 1, "learning_rate": 1e-3}
    eager = conftest.train(script, **loop).state_dict()
    dynamo = types.SimpleNamespace(config=None, exc=torch._dynamo.exc)
    hidden = types.SimpleNamespace(_dynamo=dynamo, compile=torch.compile)
    function = script.compiled
    compiled = types.FunctionType(function.__code__, function.__globals__ | {"torch": hidden})
    monkeypatch.setattr(script, "compiled", compiled)
    fast = conftest.train(script, compile=True, **loop).state_dict()
    assert capsys.readouterr().err == ""
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    for name, expected in eager.items():
        torch.testing.assert_close(fast[name], expected, atol=1e-5, rtol=0.0, msg=name)


@pytest.fixture(scope="module")
def eager_rows(tmp_path_factory):
    """What a short run logs without compiling, time and speed apart."""
    folder = tmp_path_factory.mktemp("eager")
    return logged(folder, "--no-compile")


def logged(folder, *flags, stderr="", **env):
    """The metrics of a short run of the command line whose stderr begins like this."""
    flags = ("--total-timesteps=1024", "--seed=3", "--no-cuda", *flags)
    env = {k: v for k, v in os.environ.items() if k != "TORCHDYNAMO_DISABLE"} | env
    process = conftest.command_line("discrete", *flags, cwd=folder, env=env)
    assert process.returncode == 0, process.stderr
    assert process.stderr.startswith(stderr)
    assert len(process.stderr.splitlines()) == bool(stderr), process.stderr
    return [(step, name, x) for step, _, name, x in metrics(folder) if name != "charts/SPS"]


@pytest.mark.xdist_group("eager_rows")
@pytest.mark.slow
@pytest.mark.parametrize("compiler", [None, BROKEN_COMPILER], ids=["none", "broken"])
def test_without_a_compiler_a_run_is_slower_and_says_so(compiler, eager_rows, tmp_path):
    """One line on stderr, and the metrics of --no-compile."""
    folder = tmp_path / "bin"  # all there is on the path
    folder.mkdir()
    if compiler:
        (folder / "c++").write_text(compiler)
        (folder / "c++").chmod(0o755)
    env = {"PATH": str(folder), "CXX": str(folder / "c++")}
    env["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path / "cache")
    assert logged(tmp_path, stderr=NOTICE, **env) == eager_rows
