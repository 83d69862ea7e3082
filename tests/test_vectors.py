"""docs/vectors/ and docs/check_your_own.md: right numbers, and a checker that sees wrong ones.

The witnesses below compute each file once more from its inputs alone, in numpy, with reference.py
and without the scripts. All comparisons are those of the page's own `check`.
"""

import hashlib
import json
import re
from types import SimpleNamespace

import ale_py
import cv2
import gymnasium as gym
import numpy as np
import pytest
import torch

import make_details
import make_vectors
import reference
from conftest import ROOT

PAGE = (ROOT / "docs" / "check_your_own.md").read_text()
BLOCKS = re.findall(r"(?ms)^```python\n(.+?)^```$", PAGE)
FILES = sorted(make_vectors.FOLDER.glob("*.json"))
REWRITE = "if this change is meant: PYTHONPATH=. python docs/make_vectors.py"

FIRST = [path.stem for path in FILES if path.stem.startswith("first_iterations_")]

each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
each_name = pytest.mark.parametrize("name", make_vectors.VECTORS)


def names_of(*blocks):
    """What blocks of the page define."""
    namespace = {}
    for block in blocks:
        exec(block, namespace)
    return namespace


check = names_of(BLOCKS[0])["check"]


def read(name):
    return json.loads((make_vectors.FOLDER / f"{name}.json").read_text())


# ------------------------------------------------------------------------------------------------
# The witnesses: inputs -> outputs


def gae(rewards, values, next_values, dones, gamma, gae_lambda):
    """Where an episode goes on, next_values are the values of the next row."""
    assert (np.where(dones, 0, next_values - np.roll(values, -1, 0))[:-1] == 0).all()
    rewards = rewards + gamma * next_values * dones  # what is known when it is cut off
    values = np.concatenate([values, next_values[-1:]])
    data = rewards, values, dones, gamma, gae_lambda
    return {"advantages": reference.advantages_and_returns(*data)[0]}


def advantage_normalization(advantages):
    deviations = advantages - np.sum(advantages) / len(advantages)
    return {"normalized_advantages": deviations / (np.mean(deviations**2) ** 0.5 + 1e-8)}


def choices(logits, nvec, actions, mask=None):
    """log pi(a) [M], S [M], their derivatives by the logits; what is not valid does not exist."""
    logprobs, entropy = np.zeros((2, len(logits)))
    by_logit = np.zeros((2, *logits.shape))
    components = np.split(np.arange(sum(nvec)), np.cumsum(nvec)[:-1])
    for i, k in np.ndindex(actions.shape):
        columns = components[k] if mask is None else components[k][mask[i, components[k]] == 1]
        action = np.flatnonzero(columns == components[k][actions[i, k]])
        log_pi, S, *derivatives = reference.categorical(logits[i : i + 1, columns], action)
        logprobs[i] += log_pi[0]
        entropy[i] += S[0]
        by_logit[:, i, columns] = np.concatenate(derivatives)
    return logprobs, entropy, *by_logit


def loss(
    new_values, actions, logprobs, values, advantages, returns, norm_adv, clip_vloss, **others
):
    coefficients = {k: others.pop(k) for k in ("clip_coef", "ent_coef", "vf_coef")}
    c = SimpleNamespace(**coefficients, norm_adv=norm_adv, clip_vloss=clip_vloss)
    minibatch = logprobs, values, advantages, returns
    if "logits" in others:
        new_logprobs, entropy, by_logit, entropy_by_logit = choices(actions=actions, **others)
    else:
        normal = reference.normal(others["mean"], others["log_std"], actions)
        new_logprobs, entropy, by_mean, by_log_std = normal
    outputs = reference.objective(new_logprobs, entropy, new_values, minibatch, c)
    by_logprob, by_value, stats = outputs
    by_logprob = by_logprob[:, None]
    if "logits" in others:
        entropy_by_logit = c.ent_coef * entropy_by_logit / len(actions)
        gradients = {"grad_logits": by_logprob * by_logit - entropy_by_logit}
    else:
        gradients = {"grad_mean": by_logprob * by_mean}
        gradients["grad_log_std"] = (by_logprob * by_log_std).sum(0) - c.ent_coef
    return stats | gradients | {"new_logprobs": new_logprobs, "grad_new_values": by_value}


def value_clipping(new_values, values, returns, clip_coef):
    near = np.minimum(np.maximum(new_values, values - clip_coef), values + clip_coef)
    worse = np.maximum(np.abs(new_values - returns), np.abs(near - returns))
    return {"value_losses": worse**2 / 2}


def entropy(logits, nvec, mask, log_std):
    def of(nvec, mask=None):
        valid = np.ones(logits.shape) if mask is None else mask
        some = np.split(valid, np.cumsum(nvec)[:-1], axis=1)
        actions = np.stack([part.argmax(1) for part in some], axis=1)  # any that is valid
        return choices(logits, nvec, actions, mask)[1]

    mean = logits[:, :2]
    return {
        "categorical": of([5]),
        "multidiscrete": of(nvec),
        "masked": of([5], mask),
        "gaussian": reference.normal(mean, log_std, mean)[1],
    }


def kl(new_logprobs, logprobs):
    k1, ratio = logprobs - new_logprobs, np.exp(new_logprobs) / np.exp(logprobs)
    k3 = ratio - 1 - np.log(ratio)
    means = {"old_approx_kl": k1.mean(), "approx_kl": k3.mean()}
    return {"k1": k1, "k2": k1 * k1 / 2, "k3": k3} | means


def clip_fraction(new_logprobs, logprobs, clip_coef):
    ratio = np.exp(new_logprobs) / np.exp(logprobs)
    return {"clipfrac": np.mean((ratio < 1 - clip_coef) | (ratio > 1 + clip_coef))}


def gradient_clipping(weight, bias, max_grad_norm):
    norm = np.sqrt((weight**2).sum() + (bias**2).sum())
    factor = max_grad_norm / (norm + 1e-6) if norm > max_grad_norm else 1.0
    return {"clipped_weight": weight * factor, "clipped_bias": bias * factor, "grad_norm": norm}


def adam(parameters, gradients, learning_rate, betas, eps):
    assert (*betas, eps) == (0.9, 0.999, 1e-5)  # those of the reference
    params, change = {"x": parameters}, []
    optimizer = reference.Adam(params)
    for gradient in gradients:
        params = optimizer.step(params, {"x": gradient}, learning_rate)
        change.append(params["x"] - parameters)
    return {"change": np.stack(change)}


def annealing(learning_rate, clip_coef, ent_coef, num_iterations, iterations):
    left = (num_iterations + 1 - iterations) / num_iterations
    names = "learning_rates", "clip_coefs", "ent_coefs"
    return dict(zip(names, np.outer([learning_rate, clip_coef, ent_coef], left), strict=True))


def annealing_one_at_a_time(learning_rate, clip_coef, ent_coef, num_iterations, iteration):
    rates, left = [learning_rate, clip_coef, ent_coef], (num_iterations + 1 - iteration)
    factors = dict(zip(("anneal_lr", "anneal_clip", "anneal_ent"), np.eye(3), strict=True))
    factors |= {"nothing": np.zeros(3)}
    left = left / num_iterations
    return {name: rates * np.where(on, left, 1.0) for name, on in factors.items()}


def orthogonal(shapes):
    """By what the weight is for."""
    outputs = {"largest_bias": 0.0}
    for name in shapes:
        is_last = re.search(r"(actor|critic)(\.4)?\.weight", name)
        gain = 2**0.5 if "lstm.weight" not in name else 1.0
        gain = {"actor": 0.01, "critic": 1.0}[is_last[1]] if is_last else gain
        outputs[name] = [gain, gain]
    return outputs


def normalization(obs, final_obs, rewards, terminated, truncated, gamma):
    """With all samples at hand, each time anew."""

    def moments(samples):
        """As if there had been 1e-4 samples of mean 0 and variance 1 before."""
        count = len(samples) + 1e-4
        mean = samples.sum(0) / count
        squares = ((samples - mean) ** 2).sum(0) + 1e-4 * (1 + mean**2)
        return mean, squares / count

    def normalize(x, mean, var):
        return np.clip((x - mean) / np.sqrt(var + 1e-8), -10, 10)

    ended = terminated | truncated
    seen, finals = [normalize(obs[0], *moments(obs[0]))], np.zeros(final_obs.shape)
    sums, all_sums, scaled = np.zeros(2), [], []
    for t, reward in enumerate(rewards):
        now = moments(np.concatenate(obs[: t + 2]))
        seen.append(normalize(obs[t + 1], *now))
        finals[t] = normalize(final_obs[t], *now) * ended[t, :, None]
        sums = sums * gamma + reward
        all_sums.append(sums)
        mean, var = moments(np.concatenate(all_sums))
        scaled.append(np.clip(reward / np.sqrt(var + 1e-8), -10, 10))
        sums = np.where(ended[t], 0, sums)
    return {
        "normalized_obs": np.stack(seen),
        "normalized_final_obs": finals,
        "normalized_rewards": np.stack(scaled),
        "obs_mean": now[0],
        "obs_var": now[1],
        "return_mean": mean,
        "return_var": var,
    }


def atari(env_id, env_kwargs, noops, actions):
    """Frame by frame, from Gymnasium's own environment; its seed is another one than the file's."""
    gym.register_envs(ale_py)
    env = gym.make(env_id, disable_env_checker=True, **env_kwargs)
    needs_fire = env.unwrapped.get_action_meanings()[1] == "FIRE"
    noops, screens = iter(noops), []

    def skip(action):
        total = 0
        for _ in range(4):
            screen, reward, terminated, truncated, _ = env.step(action)
            screens.append(screen)
            total += reward
            if terminated or truncated:
                break
        return total, terminated, truncated

    def small():
        grey = cv2.cvtColor(np.maximum(*screens[-2:]), cv2.COLOR_RGB2GRAY)
        return cv2.resize(grey, (84, 84), interpolation=cv2.INTER_AREA)

    def new_game():
        env.reset()
        for _ in range(next(noops)):
            screen = env.step(0)[0]
        screens.extend([screen, screen])

    def begin(game_over):
        new_game() if game_over else skip(0)
        for action in (1, 2) if needs_fire else ():
            skip(action)
        return [np.zeros((84, 84), np.uint8)] * 3 + [small()]

    def lives_left():
        return env.unwrapped.ale.lives()

    stack = begin(game_over=True)
    lives, frames, rewards, ends = lives_left(), [np.stack(stack, -1)], [], ([], [])
    for t, action in enumerate(actions):
        total, terminated, truncated = skip(action)
        died = 0 < lives_left() < lives
        rewards.append(np.sign(total))
        for steps, end in zip(ends, (terminated or died, truncated), strict=True):
            steps.extend([t] * end)
        game_over = terminated or truncated
        stack = begin(game_over) if game_over or died else [*stack[1:], small()]
        lives = lives_left()
        frames.append(np.stack(stack, -1))

    def digest(x):
        return hashlib.sha256(x.tobytes()).hexdigest()

    return {
        "shape": frames[0].shape,
        "dtype": frames[0].dtype.name,
        "sha256_of_every_tenth": [digest(x) for x in frames[::10]],
        "sha256_of_all": digest(np.stack(frames)),
        "rewards": rewards,
        "terminated_at": ends[0],
        "truncated_at": ends[1],
    }


def lstm(x, starts, h, c, weight_ih_l0, weight_hh_l0, bias_ih_l0, bias_hh_l0):
    def sigmoid(z):
        return 1 / (1 + np.exp(-z))

    hidden = []
    for now, start in zip(x, starts, strict=True):
        h, c = h * (1 - start)[:, None], c * (1 - start)[:, None]
        gates = now @ weight_ih_l0.T + bias_ih_l0 + h @ weight_hh_l0.T + bias_hh_l0
        i, f, g, o = np.split(gates, 4, axis=1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        hidden.append(h)
    return {"hidden": np.stack(hidden), "last_h": h, "last_c": c}


def token_rewards(scores, has_eos, kl, mask, kl_coef, missing_eos_penalty):
    rewards = np.zeros(kl.shape)
    for i, length in enumerate(mask.sum(1)):
        rewards[i, :length] = -kl_coef * kl[i, :length]
        rewards[i, length - 1] += scores[i] if has_eos[i] else missing_eos_penalty
    return {"rewards": rewards}


def whiten(x, mask, shift_mean=True):
    some = x[mask]
    result = (some - some.mean()) / np.sqrt(some.var() + 1e-8) + (0 if shift_mean else some.mean())
    whitened = np.zeros(x.shape)
    whitened[mask] = result
    return {"whitened": whitened}


def group_advantages(outcomes, scores, group_size, norm_adv):
    advantages, dead = np.zeros(len(outcomes)), 0
    for i in range(0, len(outcomes), group_size):
        group = outcomes[i : i + group_size]
        if len(set(scores[i : i + group_size])) > 1:
            advantages[i : i + group_size] = group - group.mean()
            advantages[i : i + group_size] /= group.std() + 1e-8 if norm_adv else 1
        else:
            dead += 1
    return {"advantages": advantages, "dead_groups": dead * group_size / len(outcomes)}


def iteration(
    obs, final_obs, rewards, terminated, truncated, actions, permutations, shapes, **settings
):
    """What a time limit cuts off is added to the last reward before it."""
    args = SimpleNamespace(num_steps=len(rewards), norm_adv=True, clip_vloss=True, **settings)
    params = {}
    for name, shape in shapes.items():
        k = np.arange(np.prod(shape), dtype=float)
        params[name] = np.sin(k**2).reshape(shape) / (shape[1] ** 0.5 if shape[1:] else 10)
    final_values = reference.forward(params, "critic", final_obs)[-1][..., 0]
    rewards = rewards + args.gamma * final_values * truncated
    dones = terminated | truncated
    values = reference.forward(params, "critic", obs)[-1][..., 0]
    data = rewards, values, dones, args.gamma, args.gae_lambda
    advantages, returns = reference.advantages_and_returns(*data)
    logits = reference.forward(params, "actor", np.concatenate(obs[:-1]))[-1]
    logprobs = reference.categorical(logits, actions.ravel())[0]
    batch = {"logprobs": logprobs, "values": values[:-1].ravel()}
    batch |= {"advantages": advantages.ravel(), "returns": returns.ravel()}
    orders = permutations[None]
    updates = list(reference.train(params, obs, actions, rewards, dones, orders, args))
    losses = {name: [stats[name] for _, stats in updates] for name in updates[0][1]}
    changes = {}
    for name, before in params.items():
        change = (updates[-1][0][name] - before).ravel()
        changes[f"change of {name}"] = [np.linalg.norm(change), change.sum(), *change[:8]]
    return batch | losses | changes


FUNCTIONS = [gae, advantage_normalization, loss, value_clipping, entropy, kl, clip_fraction]
FUNCTIONS += [gradient_clipping, adam, annealing, orthogonal, normalization, atari, lstm]
FUNCTIONS += [annealing_one_at_a_time]
FUNCTIONS += [token_rewards, whiten, group_advantages, iteration]


def witness(name):
    """Names of files begin with that of a function."""
    found = [f for f in FUNCTIONS if f"{name}_".startswith(f"{f.__name__}_")]
    return max(found, key=lambda f: len(f.__name__))


# ------------------------------------------------------------------------------------------------
# The files


def test_all_files_are_made_by_a_program():
    """The first iterations by test_reference.py."""
    names = {path.stem for path in FILES}
    assert names == {path.name.removesuffix(".json") for path in make_vectors.FOLDER.iterdir()}
    assert {name for name in names if not name.startswith("first_")} == set(make_vectors.VECTORS)
    assert len(names) == len(make_vectors.VECTORS) + 4


@each_file
def test_form(path):
    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")

    text = path.read_text()
    vector = json.loads(text, parse_constant=refuse)
    assert text.isascii() and len(text) < 8000
    assert text == make_vectors.text(vector)
    assert list(vector) == ["detail", "about", "inputs", "outputs", "tolerance"]
    assert vector["detail"] and set(vector["detail"]) <= set(make_details.table())
    assert vector["about"].endswith(".")
    assert 0 <= vector["tolerance"] <= 1e-4


@each_name
def test_up_to_date(name):
    """The scripts say what the file says."""
    made = json.loads(make_vectors.text(make_vectors.VECTORS[name]()))
    outputs, stored = made.pop("outputs"), read(name)
    assert check(make_vectors.FOLDER / f"{name}.json", lambda **inputs: outputs), REWRITE
    assert outputs.keys() == stored.pop("outputs").keys(), REWRITE
    assert made == stored, REWRITE


@each_name
def test_confirmed_by_the_witness(name):
    assert check(make_vectors.FOLDER / f"{name}.json", witness(name))


@pytest.mark.parametrize("name", [x for x in make_vectors.VECTORS if not x.startswith("atari_")])
def test_single_precision_is_good_enough(name):
    """Inputs rounded to float32 keep the outputs within the tolerance."""

    def rounded(x):
        x = np.asarray(x)
        return x.astype(np.float32) if x.dtype == float else x

    assert check(make_vectors.FOLDER / f"{name}.json", witness(name), rounded)


@each_file
def test_a_wrong_number_is_seen(path, capsys):
    """In each output, one after the other, its largest number; or a letter, or one is missing."""
    vector = json.loads(path.read_text())
    outputs = vector["outputs"]
    assert check(path, lambda **inputs: outputs)
    for name, expected in outputs.items():
        wrong = np.array(expected)
        flat = wrong.reshape(-1)
        if wrong.dtype.kind == "U":
            flat[-1] = flat[-1][::-1]
        elif wrong.size:
            largest = np.abs(flat).argmax()
            flat[largest] += 1.1 * vector["tolerance"] * abs(flat[largest]) or 1
        else:
            wrong = np.zeros(1)
        capsys.readouterr()
        for results in (outputs | {name: wrong}, outputs | {name: np.nan}):
            assert not check(path, lambda results=results, **inputs: results)
            marked = [x for x in capsys.readouterr().out.splitlines() if x.endswith("WRONG")]
            assert marked == [f"{path} {name}: WRONG"]
        rest = {k: x for k, x in outputs.items() if k != name}
        assert not check(path, lambda results=rest, **inputs: results)
        assert f"{path} {name}: missing" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------
# What they tell apart


def test_gae_has_all_kinds_of_ends():
    """In the middle, by a time limit, with the last step, and none."""
    x = {k: np.asarray(v) for k, v in read("gae")["inputs"].items()}
    assert x["dones"][:-1].sum(0).tolist() == [1, 1, 0] and x["dones"][-1].tolist() == [0, 0, 1]
    assert x["next_values"][x["dones"] == 1].tolist() == [0, 0.7, 0]


@pytest.mark.parametrize(
    "name", [f"loss_{x}" for x in ("discrete", "gaussian", "masked", "multidiscrete")]
)
def test_losses_are_clipped_on_both_sides(name):
    """Ratios beyond the range with advantages of both signs, values stopped and not."""
    vector = read(name)
    x = {k: np.asarray(v) for k, v in vector["inputs"].items()}
    ratio = np.exp(np.array(vector["outputs"]["new_logprobs"]) - x["logprobs"])
    signs = np.sign(x["advantages"] - x["advantages"].mean())
    beyond = np.sign(ratio - 1) * (np.abs(ratio - 1) > x["clip_coef"])
    assert {(a, b) for a in (-1, 1) for b in (-1, 0, 1)} == set(zip(signs, beyond, strict=True))
    moved = np.abs(x["new_values"] - x["values"]) > x["clip_coef"]
    stopped = np.array(vector["outputs"]["grad_new_values"]) == 0
    assert not (stopped & ~moved).any()
    assert 0 < stopped.sum() < moved.sum() < 8


def test_switches_that_are_off_are_told_from_those_that_are_on():
    """Of the same minibatch."""
    on, off = (read(f"loss_{x}") for x in ("discrete", "plain"))
    changed = {k for k, x in on["inputs"].items() if x != off["inputs"][k]}
    assert changed == {"norm_adv", "clip_vloss"}
    assert off["outputs"]["policy_loss"] != pytest.approx(on["outputs"]["policy_loss"], rel=0.01)
    assert off["outputs"]["value_loss"] < 0.99 * on["outputs"]["value_loss"]
    assert 0 not in off["outputs"]["grad_new_values"]


def test_values_are_at_the_edge_and_beyond():
    x = {k: np.asarray(v, np.float32) for k, v in read("value_clipping")["inputs"].items()}
    sides = (np.abs(x["new_values"] - x["values"]) - x["clip_coef"]).tolist()
    assert {np.sign(side) for side in sides} == {-1, 0, 1}


def test_normalization_clips_rewards_and_observations():
    for name, limit in (("normalization", 10), ("normalization_below", -10)):
        outputs = {k: np.asarray(v) for k, v in read(name)["outputs"].items()}
        assert (outputs["normalized_rewards"] == limit).sum() == 2
        assert (outputs["normalized_final_obs"] == limit).any()


def test_games_have_all_kinds_of_ends():
    """All lives and another game, a life, a game cut off and another; rewards of both signs."""
    games = [read(f"atari_{name}")["outputs"] for name in ("breakout", "mspacman", "pong")]
    ends = [(len(x["terminated_at"]), len(x["truncated_at"])) for x in games]
    assert ends == [(5, 0), (1, 0), (0, 1)]
    assert all(max(x["terminated_at"] + x["truncated_at"]) + 10 < len(x["rewards"]) for x in games)
    assert {reward for x in games for reward in x["rewards"]} == {-1, 0, 1}


def test_an_iteration_clips():
    outputs = read("iteration")["outputs"]
    assert outputs["clipfrac"][0] == 0 < outputs["clipfrac"][-1] < 1
    assert min(outputs["grad_norm"]) > 0.5


# ------------------------------------------------------------------------------------------------
# The page


def test_every_file_is_named_with_its_details():
    rows = re.findall(r"(?m)^\| \[(\w+)\]\(vectors/(\w+)\.json\) \| (.+?) \|", PAGE)
    assert all(title == name for title, name, _ in rows)
    assert [name for _, name, _ in rows] == [*make_vectors.VECTORS, *sorted(FIRST)]
    for _, name, details in rows:
        assert details.split() == read(name)["detail"], name


def test_example_is_the_file():
    (example,) = re.findall(r"(?ms)^```json\n(.+?)^```$", PAGE)
    for line in example.split("...")[0].splitlines():
        text = (make_vectors.FOLDER / "advantage_normalization.json").read_text()
        assert line in text.replace('{\n"', '{"').replace("]\n}", "]}")


def test_code_in_numpy(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    exec("".join(BLOCKS[:2]), {})
    lines = capsys.readouterr().out.splitlines()
    assert [x.split(":")[1].strip() for x in lines] == ["right"] * 11 + ["missing"] * 2
    assert len(lines) == 3 + len(read("loss_discrete")["outputs"])


def test_code_in_torch():
    """In float32; the gradients, too."""
    page = names_of(BLOCKS[0], BLOCKS[1].split("for name")[0].replace("numpy", "torch"))

    def with_gradients(logits, new_values, **others):
        leaves = [x.requires_grad_() for x in (logits, new_values)]
        results = page["loss"](*leaves, **others)
        results["loss"].backward()
        gradients = {"grad_logits": logits.grad, "grad_new_values": new_values.grad}
        return {name: x.detach() for name, x in results.items()} | gradients

    assert page["xp"] is torch
    assert check(make_vectors.FOLDER / "loss_discrete.json", with_gradients, torch.as_tensor)
    assert check(make_vectors.FOLDER / "gae.json", page["gae"], torch.as_tensor)


@pytest.mark.slow
def test_code_in_jax(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    code = "".join(BLOCKS)
    exec(code, {})
    lines = capsys.readouterr().out.splitlines()[13:]
    assert [x.split(":")[1].strip() for x in lines] == ["right"] * 11


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("(1 - dones[t]) * last", "last"),
        ("* next_values[t]", "* next_values[t] * (1 - dones[t])"),
        ("reversed(range(len(rewards)))", "reversed(range(len(rewards) - 1))"),
        ("xp.minimum(", "xp.maximum("),
        ("xp.maximum(", "xp.minimum("),
        ("(centred**2).mean()", "((centred**2).sum() / 7)"),
        ("clip(new_values - values", "clip(values - new_values"),
        (") > eps", ") > eps / 2"),
    ],
)
def test_the_checker_finds_the_usual_mistakes(monkeypatch, capsys, right, wrong):
    monkeypatch.chdir(ROOT)
    assert BLOCKS[1].count(right) == 1
    exec(BLOCKS[0] + BLOCKS[1].replace(right, wrong), {})
    assert "WRONG" in capsys.readouterr().out


def test_links_lead_to_files():
    for target in re.findall(r"\]\(([^)h][^)#]*)", PAGE):
        assert (ROOT / "docs" / target).exists(), target
