"""The loss is one graph for torch.compile, in every iteration of an annealed run."""

import pytest
import torch

import ppo_atari
import ppo_continuous
import ppo_discrete
from conftest import small_agent


@pytest.mark.parametrize(
    ("script", "backend"),
    [
        (ppo_discrete, "aot_eager"),
        (ppo_continuous, "aot_eager"),
        (ppo_atari, "aot_eager"),
        (ppo_continuous, "inductor"),
    ],
)
def test_loss_compiles_whole_and_only_once(script, backend):
    """Three iterations with annealed coefficients, loss and gradients as without compiling."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    agent, envs = small_agent(script)
    compiled = torch.compile(script.ppo_loss, fullgraph=True, backend=backend)
    obs = torch.randint(0, 255, (16, *envs.single_observation_space.shape))
    obs = obs.to(torch.uint8) if script is ppo_atari else obs / 255
    for remaining in (1.0, 0.5, 0.1):
        with torch.no_grad():
            policy, values = agent(obs)
            actions = policy.sample()
            logprobs = policy.log_prob(actions) + 0.2 * torch.randn(16)
        minibatch = (obs, actions, logprobs, values, torch.randn(16), values + torch.randn(16))
        coefficients = (torch.tensor(0.2 * remaining), torch.tensor(0.01 * remaining))
        results = []
        for loss_of in (script.ppo_loss, compiled):
            with torch._dynamo.config.patch(error_on_recompile=True):
                loss, stats = loss_of(agent, minibatch, *coefficients, 0.5, True, True)
            agent.zero_grad()
            loss.backward()
            results.append([loss, *stats.values(), *(p.grad for p in agent.parameters())])
            assert not any(value.requires_grad for value in stats.values())
        for eager, fast in zip(*results, strict=True):
            torch.testing.assert_close(eager, fast, atol=1e-5, rtol=1e-5)
