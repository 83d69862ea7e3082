"""What acts in numpy is what is trained, however the script is edited."""

import importlib
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

from conftest import ROOT, far_from_initial, train

LAST = "layer_init(nn.Linear(64, outputs), gain=gain)"
LAYERS = {
    "nothing": [],
    "ReLU": [("nn.Tanh()", "nn.ReLU()")],
    "SiLU": [("nn.Tanh()", "nn.SiLU()")],
    "width": [("64", "96")],
    "depth": [(LAST, f"layer_init(nn.Linear(64, 64)),\n        nn.Tanh(),\n        {LAST}")],
    "LayerNorm": [("nn.Tanh()", "nn.LayerNorm(64),\n        nn.Tanh()")],
    "no bias": [(LAST, "nn.Linear(64, outputs, bias=False)")],
    "dropout": [(LAST, f"nn.Dropout(0.0),\n        {LAST}")],
    "nested": [
        ("return nn.Sequential(", "return nn.Sequential(nn.Identity(), nn.Sequential("),
        (f"{LAST},\n    )", f"{LAST},\n    ))"),
    ],
    "weight norm": [(LAST, f"nn.utils.parametrizations.weight_norm({LAST})")],
    "one layer": [
        ("return nn.Sequential(", "return nn.Linear(inputs, outputs)\n    nn.Sequential(")
    ],
}
ACTOR = "self.actor(obs)"
FORWARD = {
    "scale": [(ACTOR, f"(3.0 * {ACTOR})")],
    "a scale that is learned": [(ACTOR, f"(self.scale * {ACTOR})")],
    "residual": [(ACTOR, f"({ACTOR} + obs[..., :1] * self.ramp)")],
    "another input": [(ACTOR, "self.actor(obs.clamp(-1, 1))")],
    "tanh": [(ACTOR, f"torch.tanh({ACTOR})")],
}
STD = {
    "softplus": [("self.log_std.exp()", "nn.functional.softplus(self.log_std)")],
    "clamped": [("self.log_std.exp()", "self.log_std.clamp(-0.1, 0.1).exp()")],
    "of the state": [("self.log_std.exp()", f"(self.log_std + {ACTOR}).exp()")],
}
MORE = """self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("ramp", torch.arange(2.0 if self.obs_dim == 4 else 6.0))
        self.critic ="""


def edited(script, replacements, start, end):
    """The script with some of its text between `start` and `end` replaced, as a module."""
    text = (ROOT / f"ppo_{script}.py").read_text()
    a, b = text.index(start), text.index(end)
    part = text[a:b]
    for old, new in replacements:
        assert old in part
        part = part.replace(old, new)
    module = types.ModuleType("edited")
    module.__file__ = str(ROOT / f"ppo_{script}.py")
    text = (text[:a] + part + text[b:]).replace("self.critic =", MORE)
    return module, text


@pytest.mark.parametrize("script", ["discrete", "continuous"])
def test_a_layer_gets_its_input_where_its_weights_are(script):
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.empty(0, device="meta"))

        def forward(self, x):
            assert x.device.type == "meta"
            return torch.ones(x.shape)

    act = importlib.import_module(f"ppo_{script}").in_numpy(nn.Sequential(nn.Tanh(), Layer()))
    np.testing.assert_array_equal(act(np.zeros((3, 2), np.float32)), np.ones((3, 2)))


class Noise:
    """A generator whose noise is one number; of logits, it keeps what the noise is added to."""

    __array_priority__ = 100

    def __init__(self, number=0.0):
        self.number = number

    def standard_normal(self, shape):
        return np.full(shape, self.number)

    def gumbel(self, size):
        return self

    def __radd__(self, logits):
        self.logits = torch.as_tensor(logits)
        return logits


def acts_and_is_trained(agent, obs):
    """Log-probabilities, or mean and standard deviation, of what acts and of what forward says."""
    policy = agent(torch.as_tensor(obs))[0].base_dist
    if hasattr(policy, "logits"):
        noise = Noise()
        agent.rollout_policy(noise)(obs)
        return noise.logits.log_softmax(-1), policy.logits
    zero, one = [torch.as_tensor(agent.rollout_policy(Noise(x))(obs)) for x in (0.0, 1.0)]
    return torch.stack([zero, one - zero]), torch.stack([policy.loc, policy.scale])


def compare(script, replacements, monkeypatch, capsys, start="def mlp(", end="class Agent("):
    """The largest difference, of the first weights and of others, and whether there is a notice."""
    module, text = edited(script, replacements, start, end)
    monkeypatch.setitem(sys.modules, "edited", module)
    exec(compile(text, module.__file__, "exec"), vars(module))
    envs = module.make_envs(module.Args(num_envs=1))
    obs = np.random.default_rng(0).normal(size=(50, *envs.single_observation_space.shape))
    if script == "discrete":
        obs[:, 4:] = 0.0  # every choice is valid
    agent, differences = module.Agent(envs), []
    for others in (False, True):
        if others:
            far_from_initial(agent)
            agent.rollouts = 0  # they are compared at 1, 2, 4, ...
        acts, is_trained = acts_and_is_trained(agent, obs.astype(np.float32))
        differences.append((acts - is_trained).abs().max().item())
    return max(differences), "notice: rollout_policy" in capsys.readouterr().err


@pytest.mark.parametrize("script", ["discrete", "continuous"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_any_kind_act_as_they_are_trained(script, name, monkeypatch, capsys):
    difference, noticed = compare(script, LAYERS[name], monkeypatch, capsys)
    assert difference < 1e-5
    assert not noticed


@pytest.mark.parametrize("script", ["discrete", "continuous"])
@pytest.mark.parametrize("name", FORWARD)
def test_a_change_of_forward_changes_what_acts(script, name, monkeypatch, capsys):
    """The network acts by itself then, and one line says so."""
    places = ("    def forward(", "    def rollout_policy(")
    difference, noticed = compare(script, FORWARD[name], monkeypatch, capsys, *places)
    assert difference < 1e-5
    assert noticed


@pytest.mark.parametrize("name", STD)
def test_a_change_of_the_standard_deviation_changes_what_acts(name, monkeypatch, capsys):
    """As long as it is the same in every state, nothing else has to act."""
    places = ("    def forward(", "    def rollout_policy(")
    difference, noticed = compare("continuous", STD[name], monkeypatch, capsys, *places)
    assert difference < 1e-5
    assert noticed == (name == "of the state")


@pytest.mark.parametrize("script", ["discrete", "continuous"])
def test_what_makes_no_odds_at_first_is_noticed_in_the_second_rollout(script, monkeypatch, capsys):
    """A factor of 1 that is learned: what acts is compared again after the first update."""
    module, text = edited(
        script, [(ACTOR, f"self.scale * {ACTOR}")], "    def forward(", "    def rollout_policy("
    )
    monkeypatch.setitem(sys.modules, "edited", module)
    exec(compile(text, module.__file__, "exec"), vars(module))
    lines, ends = [], module.Run.end_iteration

    def end_iteration(*args):
        lines.append("notice: rollout_policy" in capsys.readouterr().err)
        ends(*args)

    monkeypatch.setattr(module.Run, "end_iteration", end_iteration)
    env_id = {"discrete": "CartPole-v1", "continuous": "Pendulum-v1"}[script]
    train(module, env_id=env_id)
    assert lines == [False, True]
