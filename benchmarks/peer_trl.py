"""What the code of TRL says to docs/vectors/: functions of its own, and lines of its trainers.

    PYTHON benchmarks/peer_trl.py docs/vectors ANSWERS.json

PYTHON is that of an environment with pip install torch==2.13.0 trl==1.9.0. Writes for each vector
[outputs, undone], where `undone` has for differences, separated by commas, the outputs there would
be without them, and under "version" that of TRL.
"""

import inspect
import itertools
import json
import sys
import warnings
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from peer_code import ADDED, AFTER, CLIP, DEVIATION, ENTROPY, FLOOR, K2, NORM, OFFSET, SCORES, run
from transformers import Trainer, get_scheduler

warnings.simplefilter("ignore")  # its PPO is called experimental
from trl.experimental.ppo import PPOConfig, ppo_trainer  # noqa: E402
from trl.trainer import utils  # noqa: E402

PPO = inspect.getsource(ppo_trainer)
GRPO = Path(utils.__file__).with_name("grpo_trainer.py").read_text()  # importing it takes requests


def tensor(x, grad=False):
    return torch.tensor(x, dtype=torch.float64, requires_grad=grad)


def ppo(names, *lines, **until):
    """Lines of PPOTrainer.train, which add to `names` what they make of them."""
    names.update({name: x for name, x in vars(ppo_trainer).items() if name not in names})
    return run(PPO, names, *lines, **until)


def population(function):
    """Calls it while TRL's variances divide by M."""
    var = ppo_trainer.masked_var
    biased = patch.object(ppo_trainer, "masked_var", lambda *args: var(*args, unbiased=False))
    with biased:
        return function()


def gae(rewards, values, next_values, dones, gamma, gae_lambda):
    """Each episode is a response; what comes after it is added to its last reward."""
    rewards, values = tensor(rewards), tensor(values)
    T, N = values.shape
    found = torch.zeros(T, N, dtype=torch.float64)
    args = SimpleNamespace(gamma=gamma, lam=gae_lambda)
    for i in range(N):
        first = 0
        for t in range(T):
            if dones[t][i] or t == T - 1:
                part = slice(first, t + 1), i
                told = {"values": values[part][None], "rewards": rewards[part][None].clone()}
                told["rewards"][0, -1] += gamma * next_values[t][i]
                told |= {"args": args, "responses": told["values"]}
                found[part] = ppo(told, "lastgaelam", "returns")["returns"][0] - values[part]
                first = t + 1
    return {"advantages": found}, {}


def whiten(x, mask, shift_mean=True):
    x, mask = tensor(x), torch.tensor(mask)

    def outputs():
        return {"whitened": mask * ppo_trainer.masked_whiten(x, mask, shift_mean)}

    return outputs(), {DEVIATION: population(outputs)}


def advantage_normalization(advantages):
    """It whitens those of a whole batch."""
    x = tensor(advantages)

    def outputs():
        return {"normalized_advantages": ppo_trainer.masked_whiten(x, torch.ones_like(x))}

    return outputs(), {DEVIATION: population(outputs)}


def minibatch(head, new_values, actions, logprobs, values, advantages, returns, **settings):
    """All variables after a minibatch of responses of one token, until the gradients are there."""
    M, mask = len(actions), torch.zeros(len(actions), 1, dtype=bool)
    args = {"temperature": 1.0, "vf_coef": settings["vf_coef"]}
    args |= {"cliprange": settings["clip_coef"], "cliprange_value": settings["clip_coef"]}
    names = {"args": SimpleNamespace(**args), "logits": head[:, None], "context_length": 1}
    names |= {"mb_responses": torch.as_tensor(actions), "micro_batch_inds": torch.arange(M)}
    names |= {"padding_mask": mask, "padding_mask_p1": mask}
    columns = {"logprobs": logprobs, "values": values, "advantage": advantages, "return": returns}
    names |= {f"mb_{name}": tensor(x)[:, None] for name, x in columns.items()}
    names["vpred_temp"] = torch.stack([new_values, new_values], 1)[..., None]  # one is cut off
    ppo(names, "new_logprobs", "loss")
    with torch.no_grad():
        ppo(names, "pg_clipfrac", "approxkl")
    return names


def loss(logits, new_values, actions, advantages, **others):
    """Advantages are whitened before, as it does for a batch.

    Undone: the bonus is subtracted; k3 is that of its rewards; both sides of the range count.
    """
    ent_coef, mask = others["ent_coef"], torch.ones(len(actions))

    def outputs():
        leaves = tensor(logits, True), tensor(new_values, True)
        white = ppo_trainer.masked_whiten(tensor(advantages), mask).tolist()
        names = minibatch(*leaves, actions, advantages=white, **others)
        entropy = torch.logsumexp(leaves[0], -1)
        entropy = entropy - (leaves[0].softmax(-1) * leaves[0]).sum(-1)
        bonus = ent_coef * entropy.mean()
        gradients = torch.autograd.grad(names["loss"], leaves, retain_graph=True)
        by_bonus = torch.autograd.grad(names["loss"] - bonus, leaves)
        found = {
            "new_logprobs": names["new_logprobs"][:, 0],
            "loss": names["loss"],
            "policy_loss": names["pg_loss"],
            "value_loss": names["vf_loss"],
            "entropy": names["entropy"].mean(),
            "approx_kl": names["approxkl"],
            "clipfrac": names["pg_clipfrac"],
            "grad_logits": gradients[0],
            "grad_new_values": gradients[1],
        }
        return found, {"loss": names["loss"] - bonus, "grad_logits": by_bonus[0]}

    (found, with_bonus), (plain, both) = outputs(), population(outputs)
    told = found["new_logprobs"].tolist(), others["logprobs"]
    k3 = {"approx_kl": penalty(*told, "k3").mean()}
    both_sides = {"clipfrac": clip_fraction(*told, others["clip_coef"])[1][CLIP]["clipfrac"]}
    undone = {DEVIATION: plain, ENTROPY: with_bonus, f"{DEVIATION}, {ENTROPY}": both}
    return found, undone | {K2: k3, CLIP: both_sides}


def of_logprobs(new_logprobs, logprobs, clip_coef=0.2, advantage=0.0, **columns):
    """A minibatch in which the first of two tokens has these log-probs."""
    first, zeros = tensor(new_logprobs), [0.0] * len(logprobs)
    head = torch.stack([first, torch.log1p(-first.exp())], 1)
    columns = {"values": zeros, "returns": zeros, "new_values": zeros} | columns
    columns["new_values"] = tensor(columns["new_values"])
    columns |= {"actions": [[0] for _ in zeros], "advantages": [advantage for _ in zeros]}
    return minibatch(head, logprobs=logprobs, clip_coef=clip_coef, vf_coef=1.0, **columns)


def value_clipping(new_values, values, returns, clip_coef):
    names = ("new_values", "values", "returns")
    half, found = [-0.69], []
    for sample in zip(new_values, values, returns, strict=True):
        columns = {name: [x] for name, x in zip(names, sample, strict=True)}
        found.append(of_logprobs(half, half, clip_coef, **columns)["vf_loss"])
    return {"value_losses": torch.stack(found)}, {}


def clip_fraction(new_logprobs, logprobs, clip_coef):
    """With advantages of 1. Undone: with those of -1 also."""
    shares = [
        of_logprobs(new_logprobs, logprobs, clip_coef, advantage)["pg_clipfrac"]
        for advantage in (1.0, -1.0)
    ]
    return {"clipfrac": shares[0]}, {CLIP: {"clipfrac": sum(shares)}}


def scored(names, kl_estimator="k1", kl_coef=0.0):
    """All variables of the rewards of responses."""
    settings = {"kl_estimator": kl_estimator, "kl_coef": kl_coef, "whiten_rewards": False}
    settings["missing_eos_penalty"] = names.pop("missing_eos_penalty", None)
    trainer = SimpleNamespace(args=SimpleNamespace(**settings))
    trainer.processing_class = SimpleNamespace(eos_token_id=1)
    names |= {"self": trainer, "args": trainer.args}
    return ppo(names, "contain_eos_token", before="lastgaelam")


def penalty(new_logprobs, logprobs, kind):
    """Its KL of a token, a response of one each, the old policy first."""
    tokens = torch.ones(len(logprobs), 1, dtype=torch.long)
    names = {"responses": tokens, "postprocessed_responses": tokens, "scores": torch.zeros(1)}
    names |= {"sequence_lengths": torch.zeros(len(logprobs), dtype=torch.long)}
    names |= {"logprobs": tensor(logprobs)[:, None], "ref_logprobs": tensor(new_logprobs)[:, None]}
    names["values"] = names["logprobs"]
    return scored(names, kind)["kl"][:, 0]


def kl(new_logprobs, logprobs):
    kinds = {kind: penalty(new_logprobs, logprobs, kind) for kind in ("k1", "k3")}
    found = {"approx_kl": of_logprobs(new_logprobs, logprobs)["approxkl"]}
    return kinds | found, {K2: {"approx_kl": kinds["k3"].mean()}}


def token_rewards(scores, has_eos, kl, mask, kl_coef, missing_eos_penalty):
    """Tokens: 1 is EOS, 0 padding. Its penalty is subtracted, and so positive.

    Undone: the scores of responses without EOS are 0; the score is moved to the token before.
    """
    mask = torch.tensor(mask)
    last, rows = mask.sum(1) - 1, torch.arange(len(mask))
    tokens = torch.where(mask, 2, 0)
    tokens[rows, last] = torch.where(torch.tensor(has_eos), 1, 2)

    def outputs(scores):
        names = {"responses": tokens, "postprocessed_responses": tokens, "sequence_lengths": last}
        names |= {"logprobs": tensor(kl), "ref_logprobs": torch.zeros(mask.shape).double()}
        names |= {"values": tensor(kl), "scores": tensor(scores)}
        names |= {"missing_eos_penalty": -missing_eos_penalty}
        return scored(names, kl_coef=kl_coef)

    def moved(names):
        rewards, at = names["rewards"].clone(), names["actual_end"]
        rewards[rows, at] -= names["scores"]
        rewards[rows, last] += names["scores"]
        return {"rewards": rewards}

    known = [score if eos else 0.0 for score, eos in zip(scores, has_eos, strict=True)]
    as_is, replaced = outputs(scores), outputs(known)
    undone = {AFTER: moved(as_is), ADDED: {"rewards": replaced["rewards"]}}
    return {"rewards": as_is["rewards"]}, undone | {f"{AFTER}, {ADDED}": moved(replaced)}


def gradient_clipping(weight, bias, max_grad_norm):
    """What its optimiser gets for these gradients."""
    leaves, found = [torch.zeros_like(tensor(x)).requires_grad_() for x in (weight, bias)], []
    total = sum((x * tensor(w)).sum() for x, w in zip(leaves, (weight, bias), strict=True))
    step = SimpleNamespace(
        step=lambda: found.extend(x.grad.clone() for x in leaves), zero_grad=lambda: None
    )
    accelerator = SimpleNamespace(backward=lambda loss: loss.backward())
    names = {"accelerator": accelerator, "optimizer": step, "loss": total}
    ppo(names, "backward()", "zero_grad()")
    names = "clipped_weight", "clipped_bias"
    torch.nn.utils.clip_grad_norm_(leaves, max_grad_norm)
    undone = dict(zip(names, [x.grad.clone() for x in leaves], strict=True))
    return dict(zip(names, found, strict=True)), {NORM: undone}


def config():
    return PPOConfig(output_dir="trl", use_cpu=True, bf16=False, report_to="none")


def adam(parameters, gradients, learning_rate, betas, eps):
    """The optimiser of its configuration. Undone: with this epsilon."""
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(config())
    before = tensor(parameters)

    def outputs(**others):
        x, change = tensor(parameters, True), []
        decay = {"weight_decay": config().weight_decay}
        optimizer = kind([x], **settings | decay | {"lr": learning_rate} | others)
        for gradient in gradients:
            x.grad = tensor(gradient)
            optimizer.step()
            change.append(x.detach() - before)
        return {"change": torch.stack(change)}

    return outputs(), {OFFSET: outputs(eps=eps)}


def annealing(learning_rate, num_iterations, iterations, **_):
    """The schedule of its configuration, a step after each iteration."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=learning_rate)
    warmup = config().get_warmup_steps(num_iterations)
    scheduler = get_scheduler(config().lr_scheduler_type, optimizer, warmup, num_iterations)
    rates = []
    for _ in range(num_iterations):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return {"learning_rates": [rates[i - 1] for i in iterations]}, {}


def entropy(logits, **_):
    return {"categorical": utils.entropy_from_logits(tensor(logits))}, {}


def group_advantages(outcomes, scores, group_size, norm_adv):
    """Undone: where scores are the same, so are outcomes; the population's deviation; 1e-8."""
    rewards, groups = tensor(outcomes), tensor(scores).view(-1, group_size)
    equal = (groups == groups[:, :1]).all(1).repeat_interleave(group_size)

    def outputs(*undone):
        told = torch.where(equal, 0.0, rewards) if SCORES in undone else rewards
        trainer = SimpleNamespace(scale_rewards="group" if norm_adv else "none")
        names = {"rewards": told, "num_generations": group_size, "self": trainer}
        names = run(GRPO, vars(utils) | names, "mean_grouped_rewards", "is_std_zero")
        std, advantages = names["std_rewards"], names["advantages"]
        factor = ((group_size - 1) / group_size) ** 0.5 if DEVIATION in undone else 1.0
        if norm_adv:
            advantages = advantages * (std + 1e-4)
            advantages = advantages / (factor * std + (1e-8 if FLOOR in undone else 1e-4))
        return {"advantages": advantages, "dead_groups": names["is_std_zero"].double().mean()}

    causes = DEVIATION, FLOOR, SCORES
    some = [x for n in (1, 2, 3) for x in itertools.combinations(causes, n)]
    return outputs(), {", ".join(x): outputs(*x) for x in some}


FUNCTIONS = {name: gae for name in ("gae", "gae_lambda_0", "gae_lambda_1")}
FUNCTIONS |= {"whiten_keep_mean": whiten, "gradient_clipping_below": gradient_clipping}
FUNCTIONS |= {"group_advantages_not_divided": group_advantages, "loss_discrete": loss}
SIMPLE = [advantage_normalization, value_clipping, clip_fraction, kl, token_rewards, whiten]
SIMPLE += [gradient_clipping, adam, annealing, entropy, group_advantages]
FUNCTIONS |= {function.__name__: function for function in SIMPLE}


def plain(x):
    if isinstance(x, dict):
        return {name: plain(value) for name, value in x.items()}
    if isinstance(x, list | tuple):
        return [plain(value) for value in x]
    return x.tolist() if isinstance(x, torch.Tensor) else x


if __name__ == "__main__":
    folder, path = map(Path, sys.argv[1:])
    answers = {"version": metadata.version("trl")}
    for name, function in FUNCTIONS.items():
        inputs = json.loads((folder / f"{name}.json").read_text())["inputs"]
        answers[name] = plain(function(**inputs))
    path.write_text(json.dumps(answers))
