"""Every number of every script has a range, on its own line of Args, and is refused outside it."""

import dataclasses
import math
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch

import ppo_atari
import ppo_atari_lstm
import ppo_continuous
import ppo_discrete
import ppo_rlhf
from conftest import small_agent

SCRIPTS = [ppo_discrete, ppo_continuous, ppo_atari, ppo_atari_lstm, ppo_rlhf]
RANGES = {  # words -> inside, outside
    "at least 1": ([1, 10**12], [0, -1]),
    "at least 0": ([0, 5], [-1]),
    "from 0 to 1": ([0.0, 0.5, 1.0], [-0.001, 1.001, math.nan, math.inf]),
    "at least 0 and finite": ([0.0, 1e30], [-1e-9, math.nan, math.inf]),
    "above 0": ([1e-9, 1.0, math.inf], [0.0, -1.0, math.nan, -math.inf]),
    "from 0 to 2^63 - 1": ([0, 2**63 - 1], [-1, 2**63]),
    "finite": ([-5.0, 0.0, 5.0], [math.nan, math.inf, -math.inf]),
    "a name, no path": (["a", "ppo-2.0", "a b"], ["", "a/b", "../a", "/a", "a\\b"]),
}
COUNTS = "total_timesteps num_envs num_steps update_epochs num_minibatches torch_threads "
COUNTS += "checkpoint_every eval_episodes total_episodes batch_size micro_batch_size sft_epochs "
COUNTS += "group_size"
EXPECTED = {
    **dict.fromkeys(COUNTS.split(), "at least 1"),
    **dict.fromkeys(("gamma", "gae_lambda"), "from 0 to 1"),
    **dict.fromkeys(("clip_coef", "clip_coef_high", "max_grad_norm", "reward_clip"), "above 0"),
    **dict.fromkeys(("target_kl", "penalty_kl", "kl_target"), "above 0"),
    **dict.fromkeys(("temperature", "rm_label_temperature"), "above 0"),
    **dict.fromkeys(("ent_coef", "vf_coef", "kl_coef", "ptx_coef"), "at least 0 and finite"),
    **dict.fromkeys(("learning_rate", "value_learning_rate"), "at least 0 and finite"),
    **dict.fromkeys(("sft_learning_rate", "rm_learning_rate"), "at least 0 and finite"),
    "critic_warmup": "at least 0",
    "missing_eos_penalty": "finite",
    "seed": "from 0 to 2^63 - 1",
    "exp_name": "a name, no path",
}


def range_of(script, name):
    """What the line of the field says: a function and its words, or None."""
    kind = get_type_hints(script.Args, include_extras=True)[name]
    for part in (kind, *get_args(kind)):
        if getattr(part, "__metadata__", ())[1:]:
            return part.__metadata__
    return None


FIELDS = [(x, name) for x in SCRIPTS for name in get_type_hints(x.Args) if range_of(x, name)]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_no_number_is_without_a_range(script):
    plain = get_type_hints(script.Args)
    numbers = [x for x, kind in plain.items() if {int, float} & {kind, *get_args(kind)}]
    assert len(numbers) >= 15
    assert [name for name in numbers if range_of(script, name) is None] == []
    defaults = {x.name: x.default for x in dataclasses.fields(script.Args)}
    for name in (*numbers, "exp_name"):
        valid, words = range_of(script, name)
        assert words == EXPECTED.get(name, words)
        assert defaults[name] is None or valid(defaults[name])


@pytest.mark.parametrize(("script", "name"), FIELDS, ids=lambda x: getattr(x, "__name__", x))
def test_what_cannot_be_meant_is_refused_in_one_line(script, name, capsys):
    """The flag, the value and the range, before anything is made."""
    valid, words = range_of(script, name)
    inside, outside = RANGES[words]
    assert all(map(valid, inside))
    for value in outside:
        with pytest.raises(SystemExit) as error:
            script.check_args(script.Args(**{name: value}))
        assert error.value.code == 2
        flag = f"--{name.replace('_', '-')}"
        line = " ".join(f"error: {flag} is {value}, it must be {words}".split())
        assert capsys.readouterr() == ("", f"{line}\n")
    assert not list(Path().iterdir())


@pytest.mark.parametrize("script", SCRIPTS[:2], ids=lambda script: script.__name__)
def test_infinity_switches_the_clipping_of_the_gradient_off(script):
    """[C11] No number large enough makes a difference; a small one does."""
    script.check_args(script.Args(max_grad_norm=math.inf))
    gradients = []
    for max_grad_norm in (math.inf, 1e9, 1e-3):
        torch.manual_seed(0)
        agent, envs = small_agent(script)
        obs = torch.rand(8, *envs.single_observation_space.shape)
        actions = agent(obs)[0].sample()
        batch = [obs, actions, *torch.rand(4, 8)]
        numbers = torch.tensor(0.2), torch.tensor(0.01), None, 0.5, True, True
        script.ppo_gradient(agent, batch, torch.arange(8), max_grad_norm, *numbers)
        gradients.append(torch.cat([x.grad.flatten() for x in agent.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)
    assert gradients[0].norm() > 100 * gradients[2].norm() > 0
