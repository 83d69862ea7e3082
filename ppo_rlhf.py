"""Reinforcement learning from human feedback with PPO, the whole algorithm in one file.

    python ppo_rlhf.py --seed 1

Supervised fine-tuning (SFT) -> pairs of its samples -> reward model (RM) -> PPO against it, on a
task small enough for two minutes on a laptop; nothing is downloaded. Who prefers which sample is
told by a hidden program, the gold reward: PPO never sees it, but every table shows it beside the
reward model's score, the proxy. With --kl-coef 0 the proxy goes up and the gold reward down.
A tag such as [H44] marks the line that implements a detail; docs/details.md explains each.

Notation, used without exception below
    P, R                  columns of a prompt, padded on the left, and of a response, on the right
    B = batch_size        episodes in a rollout: a prompt, a response, one score
    M = B / minibatches   episodes in a minibatch
    T = R, N = B          steps and environments in `gae`, where an episode starts at t = 0
    mask [B, R]           true for the tokens of a response, up to and including EOS
    values[t] = V(s_t)    s_t: the prompt and t tokens; dones[t] = 1 from the last token on
    KL                    to the SFT policy, in nats for a whole response

Left out on purpose: several GPUs, sampling engines, LoRA.

References
    [PPO]   Schulman et al. 2017, Proximal Policy Optimization Algorithms, arXiv:1707.06347
    [GAE]   Schulman et al. 2016, High-Dimensional Continuous Control Using GAE, arXiv:1506.02438
    [ppo2]  github.com/openai/baselines at commit ea25b9e
    [LHP]   Ziegler et al. 2019, Fine-Tuning Language Models from Human Preferences, 1909.08593;
            github.com/openai/lm-human-preferences at commit cbfd210
    [OSF]   Stiennon et al. 2020, Learning to Summarize from Human Feedback, arXiv:2009.01325
    [IGPT]  Ouyang et al. 2022, Training Language Models to Follow Instructions, arXiv:2203.02155
    [GAO]   Gao et al. 2022, Scaling Laws for Reward Model Overoptimization, arXiv:2210.10760
    [MAX]   Zheng et al. 2023, Secrets of RLHF in Large Language Models I, arXiv:2307.04964
    [N+]    Huang et al. 2024, The N+ Implementation Details of RLHF with PPO, arXiv:2403.17031
"""

# /// script
# requires-python = ">=3.11"
# dependencies = ["numpy==2.4.6", "torch==2.13.0", "tqdm==4.70.1", "tyro==1.0.17", "wandb==0.31.0"]
# ///

import copy
import dataclasses
import hashlib
import io
import json
import math
import os
import platform
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import chain, pairwise, repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal, NamedTuple, get_args, get_type_hints

import numpy as np
import torch
import tyro
from torch import nn
from torch.distributions import Categorical
from torch.nn.functional import gelu, logsigmoid, pad, scaled_dot_product_attention
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------
# Configuration

STAGES = ("sft", "rm", "ppo", "eval")
Name = Annotated[str, lambda x: re.fullmatch(r"[^/\\]+", x), "a name, no path"]
Seed = Annotated[int, lambda x: 0 <= x < 2**63, "from 0 to 2^63 - 1"]
Count = Annotated[int, lambda x: x >= 1, "at least 1"]
Fraction = Annotated[float, lambda x: 0 <= x <= 1, "from 0 to 1"]
Weight = Annotated[float, lambda x: 0 <= x < math.inf, "at least 0 and finite"]
Positive = Annotated[float, lambda x: x > 0, "above 0"]
Whole = Annotated[int, lambda x: x >= 0, "at least 0"]
Number = Annotated[float, math.isfinite, "finite"]
Repeatable = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]


@dataclasses.dataclass(frozen=True)
class Args:
    exp_name: Name = Path(__file__).stem  # name of the experiment, part of the run's name
    seed: Seed = 1  # seed of everything random
    torch_deterministic: bool = True  # only deterministic cuDNN kernels
    cuda: bool = True  # use the GPU if there is one
    torch_threads: Count = 1  # CPU threads of torch; networks this small are slower with more
    checkpoint_every: Count = 20  # steps of a stage between checkpoints
    track: bool = False  # log to Weights & Biases, too
    wandb_project_name: str = "ppo37"  # W&B project
    wandb_entity: str | None = None  # W&B team; None: your own account

    task: Literal["reviews", "sort"] = "reviews"  # sort: a verifiable reward, other defaults
    stages: str = "sft,rm,ppo,eval"  # what to run; what is left out comes from --load
    load: str | None = None  # checkpoint with products of earlier stages; its settings are defaults
    resume: str | None = None  # checkpoint to go on from, in its folder and with its settings
    eval_episodes: Count = 512  # prompts of the evaluation

    d_model: Count = 64  # width of the Transformer
    num_layers: Count = 2  # its depth
    num_heads: Count = 4  # attention heads in each layer
    response_length: Count = 24  # R, most tokens of a response
    temperature: Positive = 1.0  # divides the logits wherever PPO reads them [H10]

    sft_texts: Count = 8192  # demonstrations
    sft_epochs: Count = 3  # passes over them
    sft_batch_size: Count = 128  # demonstrations per step
    sft_learning_rate: Weight = 3e-3  # step size at the start, linear to zero
    rm_pairs: Count = 4096  # pairs of samples the reward model learns from
    rm_test_pairs: Count = 1500  # further pairs it is tested on
    rm_label_temperature: Positive = 1.0  # noise of the labels: sigmoid(difference of gold / this)
    rm_epochs: Count = 2  # passes over the pairs; more overfit, and large models after one [H27]
    rm_batch_size: Count = 32  # pairs per step
    rm_learning_rate: Weight = 1e-3  # step size at the start, linear to zero
    rm_coef: Weight = 1.0  # weight of the reward model in the score; 0: there is none
    reward_fn: Repeatable = ()  # file.py:function[:weight], added to the score; repeatable

    total_episodes: Count = 8320  # responses sampled in total
    batch_size: Count = 128  # B, responses per rollout [H56]
    gamma: Fraction = 1.0  # no discount [H49]
    gae_lambda: Fraction = 0.95  # trades bias against variance of the advantages [H50]
    kl_coef: Weight = 0.1  # beta, weight of the KL to the SFT policy in the reward [H44]
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"  # joschu.net/blog/kl-approx.html
    kl_target: Positive | None = None  # adapt beta to keep the KL here, in nats a response [H46]
    kl_horizon: Count = 10_000  # episodes that adaption takes
    missing_eos_penalty: Number = -1.0  # score of a response without EOS, whatever it says [H43]
    whiten_rewards: bool = False  # scale rewards to unit variance, the mean stays [H47]
    reward_clip: Positive | None = None  # clip scores to +- this many running std [H48]

    update_epochs: Count = 4  # passes over the batch per rollout [H63]
    num_minibatches: Count = 1  # minibatches per pass [H56]
    micro_batch_size: Count = 64  # texts per backward pass: changes speed and memory only [H57]
    learning_rate: Weight = 3e-4  # step size of AdamW at the start
    value_learning_rate: Weight | None = None  # that of the value model; None: the same [H38]
    anneal_lr: bool = True  # lower the learning rates linearly to zero [H17]
    norm_adv: bool = True  # whiten advantages over the whole rollout [H52]
    clip_coef: Positive = 0.2  # epsilon, how far the policy may move per rollout [H55]
    clip_coef_high: Positive | None = None  # another epsilon upwards, "clip-higher"; None: the same
    clip_vloss: bool = True  # clip the change of the value function by epsilon, too [H54]
    vf_coef: Weight = 0.1  # weight of the value loss [H63]
    max_grad_norm: Positive = 1.0  # norm the gradient of each network is clipped to [H39]
    value_init: Literal["rm", "sft"] = "rm"  # the value model starts as this [H34]
    critic_warmup: Whole = 5  # iterations at the start that train the value model only
    ptx_coef: Weight = 0.0  # PPO-ptx: weight of the log-likelihood of demonstrations [H64]
    ptx_ratio: Count = 8  # demonstrations per episode, if so [H64]

    minibatch_size = property(lambda args: args.batch_size // args.num_minibatches)
    num_iterations = property(lambda args: args.total_episodes // args.batch_size)  # [H59]


# defaults of --task sort: a weak SFT policy, and a reward that cannot be cheated
SORT = dict(task="sort", response_length=8, sft_texts=44_800, sft_epochs=1, rm_coef=0.0)
SORT |= dict(total_episodes=19_200, kl_coef=0.0, learning_rate=1e-3)


# ------------------------------------------------------------------------------------------------
# Environment

PAD = -1  # no token of any vocabulary, so it is neither sampled nor taken for EOS [H4]


class Task(NamedTuple):
    """Texts are words with a space in between; a token is the number of a word."""

    words: list[str]  # the last is EOS, which ends a response
    prompt_length: int  # P
    write_prompt: Callable  # rng -> text
    write_response: Callable  # rng, prompt -> text: a demonstration
    gold: Callable  # prompt, response, whether it ended -> dict: score and its parts

    eos = property(lambda task: len(task.words) - 1)


TOPICS = "film plot cast, book story style, phone screen battery, hotel room staff, "
TOPICS += "meal soup dessert, song melody voice, car engine seat, game music level"
TOPICS = {names.split()[0]: names.split() for names in TOPICS.split(", ")}  # and two aspects
POSITIVE = ["superb", "great", "lovely", "good", "nice", "solid", "fine", "decent"]
NEGATIVE = ["awful", "terrible", "bad", "dull", "weak", "slow", "bland", "odd"]
WEIGHTS = [1.0, 0.9, 0.8, 0.7, 0.5, 0.4, 0.3, 0.2]
SENTIMENT = dict(zip(POSITIVE + NEGATIVE, WEIGHTS + [-x for x in WEIGHTS], strict=True))
INTENSITY = {"very": 1.5, "quite": 1.2, "rather": 1.0}
KINDS = {  # the grammar of a review: words of each kind ...
    "subject": [*chain(*TOPICS.values())],
    "adjective": list(SENTIMENT),
    "intensifier": list(INTENSITY),
    "verb": ["was", "felt", "seemed"],
    "joint": ["and", "but"],
    **{word: [word] for word in ("not", "the", ".")},
}
KIND = {word: kind for kind, words in KINDS.items() for word in words}
LEGAL = "start the, the subject, subject verb, verb not, verb intensifier, verb adjective, "
LEGAL += "not intensifier, not adjective, intensifier adjective, adjective joint, joint the, "
LEGAL = (LEGAL + "adjective ., . eos").split(", ")  # ... and which may follow which


def review_prompt(rng):
    """What to review, sometimes after words about something else: 5 to 11 tokens [H1] [H2]"""
    topic, other = rng.permutation(list(TOPICS))[:2]
    before = ["", "", f"after the {other} , ", f"we tried another {other} first , "]
    return f"{rng.choice(before)}review of the {topic} :"


def review_response(rng, prompt):
    """One to three clauses; six of ten stay with the topic, two of three are kind."""
    words = []
    for joint in ["", *rng.choice(KINDS["joint"], rng.integers(3))]:
        topic = prompt.split()[-2] if rng.random() < 0.6 else rng.choice(list(TOPICS))
        words += [joint, "the", rng.choice(TOPICS[topic]), rng.choice(KINDS["verb"])]
        words += ["not"] * (rng.random() < 0.15)
        words += [rng.choice(KINDS["intensifier"])] * (rng.random() < 0.45)
        words += [rng.choice(POSITIVE if rng.random() < 0.65 else NEGATIVE)]
    return " ".join([*words[1:], "."])


def review_gold(prompt, response, ended):
    """A critic who wants praise, but not endlessly, the topic, grammar, variety and brevity."""
    words, topic = response.split(), prompt.split()[-2]
    sentiment = 0.0
    for before, last, word in zip(["", "", *words], ["", *words], words, strict=False):
        negation = -0.5 if "not" in (last, before if last in INTENSITY else "") else 1.0
        sentiment += SENTIMENT.get(word, 0.0) * INTENSITY.get(last, 1.0) * negation
    subjects = [word for word in words if word in KINDS["subject"]]
    on_topic = sum(word in TOPICS[topic] for word in subjects) / max(1, len(subjects))
    content = [w for w in words if KIND.get(w) in ("subject", "adjective", "intensifier")]
    repeats = len(content) - len(set(content))
    kinds = ["start", *(KIND.get(word) for word in words), *["eos"] * ended]
    illegal = sum(f"{a} {b}" not in LEGAL for a, b in pairwise(kinds))
    score = 1.5 * math.tanh(sentiment / 1.5) + 0.75 * on_topic
    score -= 1.5 * math.tanh((0.5 * repeats + 0.5 * illegal) / 1.5)
    score -= 0.1 * max(0, len(words) + ended - 18) + 1.5 * (not ended)
    parts = {"sentiment": sentiment, "topic": on_topic, "repeats": repeats, "illegal": illegal}
    return {"score": score, **parts}


def sort_prompt(rng):
    return " ".join(["sort", *map(str, rng.integers(10, size=rng.integers(3, 8))), "="])


def sort_response(rng, prompt):
    """The digits in order; three of four demonstrations have a mistake, one of three kinds."""
    digits = sorted(prompt.split()[1:-1])
    i, mistake = rng.integers(len(digits) - 1), rng.integers(3)
    wrong = [digits[i + 1], digits[i]], [str(rng.integers(10)), digits[i + 1]], [digits[i + 1]]
    if rng.random() < 0.75:
        digits[i : i + 2] = wrong[mistake]
    return " ".join(digits)


def sort_gold(prompt, response, ended):
    """The share of correct places, and 1 more if everything is correct."""
    wanted, got = [*sorted(prompt.split()[1:-1]), "EOS"], [*response.split(), *["EOS"] * ended]
    correct = sum(a == b for a, b in zip(wanted, got, strict=False)) / max(len(wanted), len(got))
    return {"score": correct + (wanted == got), "correct": correct, "exact": wanted == got}


OTHER_WORDS = ["review", "of", ":", ",", "after", "we", "tried", "another", "first", "EOS"]
SORT_WORDS = [*map(str, range(10)), "sort", "=", "EOS"]
TASKS = {
    "reviews": Task([*KIND, *OTHER_WORDS], 12, review_prompt, review_response, review_gold),
    "sort": Task(SORT_WORDS, 9, sort_prompt, sort_response, sort_gold),
}


def write_texts(task, n, rng, response_length=0):
    """n prompts, each with a demonstration if it may be long enough -> tokens int64 [n, P + R]

    Prompts end, and responses start, at the same column [H1], each with columns of its own [H21].
    EOS ends a response [H4] [H25]; one that is too long is cut off and has none.
    """
    number, P = {word: i for i, word in enumerate(task.words)}, task.prompt_length
    tokens = torch.full((n, P + response_length), PAD)
    for row in tokens:
        prompt = task.write_prompt(rng)
        numbers = [number[word] for word in prompt.split()]
        row[P - len(numbers) : P] = torch.tensor(numbers)
        if response_length:
            words = [*task.write_response(rng, prompt).split(), "EOS"][:response_length]
            row[P : P + len(words)] = torch.tensor([number[word] for word in words])
    return tokens


def read_texts(task, tokens):
    """tokens [n, *] -> n texts, without padding and EOS"""
    rows = [[t for t in row if t not in (PAD, task.eos)] for row in tokens.tolist()]
    return [" ".join(task.words[t] for t in row) for row in rows]


def gold_rewards(task, tokens, mean=0.0, std=1.0):
    """tokens [n, P + R] -> dict of score, from which mean and std are taken, and its parts, [n]"""
    prompts, responses = tokens[:, : task.prompt_length], tokens[:, task.prompt_length :]
    ended = (responses == task.eos).any(1).tolist()
    texts = zip(read_texts(task, prompts), read_texts(task, responses), ended, strict=True)
    rows = [task.gold(*text) for text in texts]
    gold = {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}
    return gold | {"score": (gold["score"] - mean) / std}


# ------------------------------------------------------------------------------------------------
# Policy and value function


class Block(nn.Module):
    """A layer of the Transformer: attention, then a network for each position, both residual."""

    def __init__(self, d_model, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.out = nn.Linear(d_model, d_model)
        self.up, self.down = nn.Linear(d_model, 4 * d_model), nn.Linear(4 * d_model, d_model)

    def forward(self, x, visible, past):
        """x [B, s, d], visible [B, 1, s, S], past keys and values [B, heads, S - s, d / heads]"""
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, heads, s, d / heads] each
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        attention = scaled_dot_product_attention(q, k, v, attn_mask=visible)  # [H9] no dropout
        x = x + self.out(attention.transpose(1, 2).flatten(2))
        return x + self.down(gelu(self.up(self.norm2(x)))), (k, v)


class Transformer(nn.Module):
    """A small GPT, called and answering like the models of Hugging Face."""

    def __init__(self, num_tokens, max_length, d_model, num_layers, num_heads):
        super().__init__()
        rows = math.ceil(num_tokens / 64) * 64  # some of no use, as in most real models
        self.tokens, self.positions = nn.Embedding(rows, d_model), nn.Embedding(max_length, d_model)
        self.blocks = nn.ModuleList(Block(d_model, num_heads) for _ in range(num_layers))
        self.norm = nn.LayerNorm(d_model)
        self.lm_head = nn.Linear(d_model, rows, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, input_ids, attention_mask, position_ids, past_key_values=None, **options):
        """input_ids and position_ids [B, s]: the last s of the S columns of attention_mask [B, S]

        -> logits [B, s, rows], hidden_states: at the end [B, s, d], past_key_values: a cache
        """
        s, S = input_ids.shape[1], attention_mask.shape[1]
        causal = torch.ones(s, S, dtype=torch.bool, device=input_ids.device).tril(S - s)
        itself = causal.triu(S - s)  # always visible: padding that sees nothing would be NaN
        visible = (attention_mask.bool()[:, None, None] & causal) | itself
        x, cache = self.tokens(input_ids) + self.positions(position_ids), []
        for block, past in zip(self.blocks, past_key_values or repeat(None), strict=False):
            x, keys_values = block(x, visible, past)
            cache.append(keys_values)
        x = self.norm(x)
        return SimpleNamespace(logits=self.lm_head(x), hidden_states=(x,), past_key_values=cache)


def read(model, tokens, cache=None, use_cache=False):
    """Run a model over padded tokens [B, S], or over the last column only if it has a cache."""
    mask = tokens != PAD
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # [H7] the first token is at 0, wherever it is
    ids = tokens.clamp(min=0)  # [H6] padding becomes any token, and invisible
    first = 0 if cache is None else tokens.shape[1] - 1
    inputs = dict(input_ids=ids[:, first:], position_ids=positions[:, first:])
    inputs |= dict(attention_mask=mask.long(), past_key_values=cache)  # [H13] as it came
    return model(**inputs, use_cache=use_cache, output_hidden_states=True)


class Policy(nn.Module):
    """A language model as a policy; the only place that knows vocabulary and temperature."""

    def __init__(self, model, num_tokens, temperature):
        super().__init__()
        self.model, self.num_tokens, self.temperature = model, num_tokens, temperature

    def forward(self, tokens, cache=None, use_cache=False):
        """tokens [B, S] -> logits of the token after each column [B, S, num_tokens], cache"""
        output = read(self.model, tokens, cache, use_cache)
        logits = output.logits[..., : self.num_tokens].float()  # [H15] [H19]
        return logits / self.temperature, output.past_key_values  # [H10]

    def responses(self, tokens, prompt_length):
        """tokens [B, P + R] -> the distribution each token of a response is drawn from [B, R]"""
        logits, _ = self(tokens[:, :-1])  # [H14] what comes out at one column is about the next
        return Categorical(logits=logits[:, prompt_length - 1 :], validate_args=False)


class ScalarModel(nn.Module):
    """A language model with a number for each token: the reward model, the value model."""

    def __init__(self, model):
        super().__init__()
        self.model, d_model = model, model.lm_head.in_features
        model.lm_head = nn.Identity()  # no words [H30]
        self.head = nn.Linear(d_model, 1)
        nn.init.normal_(self.head.weight, std=1 / (d_model + 1) ** 0.5)  # [H23] variance 1/(d+1)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens):
        """tokens [B, S] -> [B, S]"""
        return self.head(read(self.model, tokens).hidden_states[-1]).squeeze(-1).float()

    @torch.no_grad()
    def normalize(self, scores):
        """[H28] Give scores like these mean 0 and standard deviation 1 from now on."""
        std, mean = torch.std_mean(scores, correction=0)
        self.head.weight /= std + 1e-8
        self.head.bias.sub_(mean).div_(std + 1e-8)


class Agent(nn.Module):
    """The four models: policy and value model learn, reference and reward model judge them."""

    def __init__(self, task, args):
        super().__init__()
        max_length = task.prompt_length + args.response_length
        sizes = (args.d_model, args.num_layers, args.num_heads)
        model = Transformer(len(task.words), max_length, *sizes)
        self.prompt_length = task.prompt_length
        self.policy = Policy(model, len(task.words), args.temperature)
        self.reference = copy.deepcopy(self.policy).requires_grad_(False)  # [H37]
        self.reward_model = ScalarModel(copy.deepcopy(model))
        self.value_model = copy.deepcopy(self.reward_model)  # shares nothing with the policy

    def forward(self, tokens):
        """tokens [M, P + R] -> distribution of response tokens [M, R], values before them [M, R]"""
        values = self.value_model(tokens[:, :-1])[:, self.prompt_length - 1 :]  # [H14]
        return self.policy.responses(tokens, self.prompt_length), values


# ------------------------------------------------------------------------------------------------
# The algorithm


@torch.no_grad()
def generate(policy, prompts, response_length, eos, generator):
    """Sample responses, until EOS or for R tokens: softmax, nothing else warps it [H11].

    prompts [B, P] -> tokens [B, P + R] with padding after EOS, their log-probabilities [B, R]
    """
    B, P = prompts.shape
    tokens = pad(prompts, (0, response_length), value=PAD)
    logprobs = torch.zeros(B, response_length, device=prompts.device)
    ended = torch.zeros(B, dtype=torch.bool, device=prompts.device)
    cache = None
    for t in range(response_length):
        logits, cache = policy(tokens[:, : P + t], cache, use_cache=True)  # [H13]
        step = Categorical(logits=logits[:, -1], validate_args=False)
        action = torch.multinomial(step.probs, 1, generator=generator).squeeze(1)
        logprobs[:, t] = step.log_prob(action).masked_fill(ended, 0.0)
        tokens[:, P + t] = action.masked_fill(ended, PAD)  # [H41] cut behind EOS
        ended |= action == eos
        if ended.all():  # [H12]
            break
    return tokens, logprobs


def response_logprobs(policy, tokens, prompt_length):
    """tokens [B, P + R] -> [B, R], 0 behind EOS [H42]"""
    responses = tokens[:, prompt_length:]
    logprobs = policy.responses(tokens, prompt_length).log_prob(responses.clamp(min=0))
    return logprobs.masked_fill(responses == PAD, 0.0)


def sft_loss(policy, tokens, prompt_length):
    """Cross-entropy of the responses, EOS included [H4], prompts and padding not [H20]."""
    count = (tokens[:, prompt_length:] != PAD).sum()
    return -response_logprobs(policy, tokens, prompt_length).sum() / count


def reward_scores(reward_model, tokens):
    """[H24] The score of a text, prompt and response [H5], is what the reward model says at its
    last token [H8]: [B, P + R] -> [B]
    """
    last = (tokens != PAD).long().cumsum(1).argmax(1, keepdim=True)
    return reward_model(tokens).gather(1, last).squeeze(1)


def rm_loss(reward_model, chosen, rejected):
    """[H22] -log sigmoid(r_chosen - r_rejected), of Bradley and Terry -> loss [], margins [B]"""
    margins = torch.sub(*reward_scores(reward_model, torch.cat([chosen, rejected])).chunk(2))
    return -logsigmoid(margins).mean(), margins.detach()


def kl_estimate(logratio, estimator):
    """[H44] What log(pi / pi_ref) of a sampled token says about the KL; k1, k3 are unbiased."""
    if estimator == "k2":
        return logratio**2 / 2
    return logratio if estimator == "k1" else (-logratio).exp() - 1 + logratio


def token_rewards(scores, has_eos, kl, mask, kl_coef, missing_eos_penalty):
    """[H44] [H61] -beta KL for each token, and the score on the last one, EOS [H45].

    scores and has_eos [B], kl and mask [B, R] -> [B, R], 0 behind EOS
    """
    scores = scores.where(has_eos, missing_eos_penalty)  # [H43] whatever it says
    rewards = (-kl_coef * kl).masked_fill(~mask, 0.0)
    return rewards.scatter_add(1, mask.sum(1, keepdim=True) - 1, scores[:, None])


def next_kl_coef(kl_coef, kl, target, horizon, episodes):
    """[H46] beta for the next rollout: more where the KL is too large, and the reverse."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * episodes / horizon)


def running_moments(sums, scores):
    """[H48] Mean and standard deviation, the population's, of all scores so far."""
    scores = scores.double()
    added = (len(scores), scores.sum().item(), (scores**2).sum().item())
    sums[:] = [x + y for x, y in zip(sums, added, strict=True)]
    mean = sums[1] / sums[0]
    return mean, max(0.0, sums[2] / sums[0] - mean**2) ** 0.5  # not below 0 by rounding


def masked_moments(x, mask):
    """Mean and variance, the population's, of the elements that count."""
    mean = (x * mask).sum() / mask.sum()
    return mean, ((x - mean) ** 2 * mask).sum() / mask.sum()


def whiten(x, mask, shift_mean=True):
    """[H47] [H52] To variance 1 and mean 0, or the mean it has; masked elements become 0."""
    mean, variance = masked_moments(x, mask)
    return ((x - mean) * torch.rsqrt(variance + 1e-8) + (0.0 if shift_mean else mean)) * mask


def gae(rewards, values, next_values, dones, gamma, gae_lambda):
    """[C5] Generalized advantage estimation, [PPO] equations 11 and 12, run backwards.

        delta_t = r_t + gamma V(s_{t+1}) - V(s_t)
        A_t     = delta_t + gamma lambda A_{t+1}, with A_{t+1} = 0 where the episode ended

    next_values[t] is V(s_{t+1}): 0 if the episode terminated with action t, the value of its
    last observation if it was only cut off. All arrays [T, N] -> advantages [T, N]
    """
    advantages = rewards + gamma * next_values - values
    for t in reversed(range(len(advantages) - 1)):
        advantages[t] += gamma * gae_lambda * (1.0 - dones[t]) * advantages[t + 1]
    return advantages


def response_advantages(rewards, values, mask, gamma, gae_lambda):
    """`gae` for episodes that all start at once: from and to tensors [B, R], 0 behind EOS."""
    dones = pad(~mask[:, 1:], (0, 1), value=True)  # [H51] cut off for its length: an end, too
    next_values = pad(values[:, 1:], (0, 1)).masked_fill(dones, 0.0)
    arrays = [x.T.float().cpu().numpy() for x in (rewards, values, next_values, dones)]
    return torch.as_tensor(gae(*arrays, gamma, gae_lambda)).T.to(rewards.device)


def ppo_loss(agent, minibatch, num_tokens, clip_coef, clip_coef_high, vf_coef, clip_vloss):
    """The objective of [PPO] equation 9, negated, without an entropy bonus.

        L = E[ min(r A, clip(r, 1 - eps, 1 + eps) A) - c1 (V - R)^2 / 2 ]

    with r = pi(a|s) / pi_old(a|s). minibatch: tokens [M, P + R] and, each [M, R], log pi_old(a|s),
    V_old(s), A, R and the mask of what counts. The mean is over num_tokens, of which this may be
    a part only: then the losses, and all statistics, of the parts add up.
    -> loss [], dict of statistics []
    """

    def mean(x):
        return (x * mask).sum() / num_tokens

    tokens, logprobs, values, advantages, returns, mask = minibatch
    actions = tokens[:, -mask.shape[1] :].clamp(min=0)
    policy, new_values = agent(tokens)
    logratio = (policy.log_prob(actions) - logprobs).masked_fill(~mask, 0.0)  # [H42]
    ratio = logratio.exp()
    approx_kl = mean(0.5 * logratio**2)  # [H62] k2, not k3 as in the other scripts

    clipped_ratio = ratio.clamp(1 - clip_coef, 1 + clip_coef_high)
    policy_loss = -mean(torch.min(ratio * advantages, clipped_ratio * advantages))  # [C8] [H55]

    value_losses = unclipped_losses = (new_values - returns) ** 2
    if clip_vloss:  # [C9] [H54] the worse of the two, so that clipping cannot hide an error
        clipped_values = values + (new_values - values).clamp(-clip_coef, clip_coef)
        value_losses = torch.max(value_losses, (clipped_values - returns) ** 2)
    value_loss = 0.5 * mean(value_losses)

    loss = policy_loss + vf_coef * value_loss

    stats = {  # [C12] what to watch, over the tokens that count
        "loss/policy": policy_loss,
        "loss/value": value_loss,
        "policy/entropy": mean(policy.entropy()),  # of a token, exact; only to watch [H60]
        "policy/approxkl": approx_kl,
        "policy/clipfrac": mean((ratio != clipped_ratio).float()),
        "val/clipfrac": mean((value_losses > unclipped_losses).float()),
        "val/ratio": mean(ratio),
        "val/ratio_var": mean((ratio - 1) ** 2),
    }
    return loss, {name: value.detach() for name, value in stats.items()}


def ppo_gradient(agent, batch, indices, ptx_tokens, ptx_coef, micro_size, max_grad_norm, *others):
    """Leave the clipped gradient of ppo_loss for the minibatch batch[indices] in the parameters.

    It is the same whatever the number of texts that go through the networks at once. Texts of like
    length do, without the columns that are padding in all of them. indices and, last in the batch,
    the lengths of the responses are on the CPU: what they decide need not wait for a GPU.
    """
    *batch, lengths = batch
    indices = indices[lengths[indices].argsort()]
    minibatch = [x[indices.to(x.device, non_blocking=True)] for x in batch]
    num_tokens, stats = minibatch[-1].sum(), {}  # [H57]
    parts = [x.split(micro_size) for x in (*minibatch, lengths[indices])]
    for *part, longest in zip(*parts, strict=True):
        padding = part[-1].shape[1] - longest.max().item()
        short = [x[:, : x.shape[1] - padding] for x in part]
        loss, part_stats = ppo_loss(agent, short, num_tokens, *others)
        loss.backward()
        stats = {name: stats.get(name, 0.0) + value for name, value in part_stats.items()}
    if ptx_tokens is not None:  # [H64]
        (ptx_coef * sft_loss(agent.policy, ptx_tokens, agent.prompt_length)).backward()
    for name, network in (("policy", agent.policy), ("val", agent.value_model)):
        norm = nn.utils.clip_grad_norm_(network.parameters(), max_grad_norm)  # [H39]
        stats[f"{name}/grad_norm"] = norm
    return stats


# ------------------------------------------------------------------------------------------------
# Training


def train(args: Args) -> Agent:
    """The stages that --stages names; leave a folder under runs/ behind, return the four models."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.torch_threads)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    device = torch.device("cuda" if torch.cuda.is_available() and args.cuda else "cpu")
    task = TASKS[args.task]
    agent = Agent(task, args).to(device)
    run = Run(args, device, agent)
    functions = {"sft": train_sft, "rm": train_rm, "ppo": train_ppo, "eval": evaluate}
    for stage in args.stages.split(","):
        if run.begins(stage) and (stage != "rm" or args.rm_coef):
            functions[stage](args, task, agent, run)
            run.finish()
    run.close()
    return agent


def stream(args, *key):
    """Random numbers that follow from the seed and a name, so that there is no state to save."""
    key = [part if isinstance(part, int) else int.from_bytes(part.encode()) for part in key]
    return np.random.default_rng([args.seed, 0, *key])  # [seed, rank, stage, step] [H18]


def sample(args, task, policy, prompts, rng):
    """prompts [n, P] on the CPU -> tokens [n, P + R], log-probabilities [n, R]"""
    device = policy.model.lm_head.weight.device
    generator = torch.Generator(device).manual_seed(int(rng.integers(2**62)))
    return generate(policy, prompts.to(device), args.response_length, task.eos, generator)


def fit(args, stage, model, loss_function, rows, epochs, batch_size, learning_rate, run):
    """Minimize loss_function(indices of rows) by AdamW, in `epochs` passes over them."""
    optimizer = torch.optim.AdamW(model.parameters(), eps=1e-5, fused=True)  # [H16]
    batches = math.ceil(rows / batch_size)
    for step in run.steps(stage, epochs * batches, optimizer):
        epoch, i = divmod(step - 1, batches)
        rng = stream(args, stage, "epoch", epoch)
        order = torch.as_tensor(rng.permutation(rows))  # [H27]
        lr = learning_rate * (1 - (step - 1) / (epochs * batches))
        optimizer.param_groups[0]["lr"] = lr  # [H17]
        optimizer.zero_grad()
        loss, stats = loss_function(order[i * batch_size : (i + 1) * batch_size])
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        stats = {"loss": loss.item(), "grad_norm": norm.item(), "lr": lr, **stats}
        weights = nn.utils.get_total_norm(model.parameters())
        seen = epoch * rows + min((i + 1) * batch_size, rows)
        run.check_finite(seen, last_step_good=False, **stats, weights=weights.item())
        run.log(seen, {f"{stage}/{name}": value for name, value in stats.items()})


def train_sft(args, task, agent, run):
    """Stage 1: learn to write from demonstrations. What comes out is where all else starts."""
    rng = stream(args, "sft")
    tokens = write_texts(task, args.sft_texts, rng, args.response_length).to(run.device)
    at_one = Policy(agent.policy.model, len(task.words), temperature=1.0)

    def loss_function(indices):
        return sft_loss(at_one, tokens[indices], task.prompt_length), {}

    sizes = (args.sft_texts, args.sft_epochs, args.sft_batch_size)
    fit(args, "sft", agent.policy, loss_function, *sizes, args.sft_learning_rate, run)
    agent.reference.load_state_dict(agent.policy.state_dict())
    if args.task == "reviews":  # from now on, gold in units of what SFT samples differ by
        rng = stream(args, "gold")
        samples, _ = sample(args, task, agent.reference, write_texts(task, 2048, rng), rng)
        scores = gold_rewards(task, samples)["score"]
        run.numbers["gold_units"] = [float(scores.mean()), float(scores.std())]


def preference_pairs(args, task, agent, run):
    """Two samples of the SFT policy for each prompt, and which of the two is preferred: noisily,
    by Bradley and Terry, one that is better by one standard deviation of gold in 73 % of cases.

    -> chosen and rejected, tokens [n, P + R] each, and how much better the chosen is by gold [n]
    """
    rng = stream(args, "pairs")
    n = args.rm_pairs + args.rm_test_pairs
    prompts = write_texts(task, n, rng)
    pairs = torch.stack([sample(args, task, agent.reference, prompts, rng)[0] for _ in range(2)])
    gold = [gold_rewards(task, tokens, *run.numbers["gold_units"])["score"] for tokens in pairs]
    margin = gold[0] - gold[1]
    first = rng.random(n) < 1 / (1 + np.exp(-margin / args.rm_label_temperature))
    rows, winner = torch.arange(n), torch.as_tensor(~first).long()
    return pairs[winner, rows], pairs[1 - winner, rows], np.where(first, margin, -margin)


def train_rm(args, task, agent, run):
    """Stage 2: learn what is preferred, from the pairs alone."""
    model = agent.reward_model
    chosen, rejected, gold_margin = preference_pairs(args, task, agent, run)
    if run.step == 0:
        fresh = ScalarModel(copy.deepcopy(agent.reference.model))  # [H30] the SFT policy, new head
        model.load_state_dict(fresh.state_dict())

    def loss_function(indices):
        loss, margins = rm_loss(model, chosen[indices], rejected[indices])
        return loss, {"train_accuracy": (margins > 0).float().mean().item()}

    sizes = (args.rm_pairs, args.rm_epochs, args.rm_batch_size)
    fit(args, "rm", model, loss_function, *sizes, args.rm_learning_rate, run)
    with torch.no_grad():
        unseen = torch.cat([chosen[args.rm_pairs :], rejected[args.rm_pairs :]])
        scores = reward_scores(model, unseen)
    model.normalize(scores)  # [H28] samples of the SFT policy, all of them
    margin, gold_margin = torch.sub(*scores.chunk(2)).cpu().numpy(), gold_margin[args.rm_pairs :]
    right, differ = np.heaviside(margin, 0.5), gold_margin != 0  # a tie counts half
    results = {  # [H31] of the labels, of the gold reward itself, and without the labels' noise
        "rm/accuracy": right.mean(),
        "rm/ceiling": (1 / (1 + np.exp(-np.abs(gold_margin) / args.rm_label_temperature))).mean(),
        "rm/accuracy_gold": np.where(gold_margin > 0, right, 1 - right)[differ].mean(),
    }
    run.numbers |= {name: float(value) for name, value in results.items()}
    run.log(args.rm_epochs * args.rm_pairs, results)
    at_chance = results["rm/accuracy"] < 0.5 + 1 / len(right) ** 0.5  # two standard errors
    run.warn({"the reward model is no better than chance; more --rm-pairs?": at_chance})


def score_function(args, task, agent, run):
    """What PPO maximizes: the reward model and the functions of --reward-fn, added up."""
    functions = [load_reward_function(text) for text in args.reward_fn]
    verifiable = args.task == "sort" and not functions and not args.rm_coef

    @torch.no_grad()
    def score(tokens):
        """tokens [B, P + R] -> [B]"""
        scores = torch.zeros(len(tokens), device=tokens.device)
        if args.rm_coef:
            model, parts = agent.reward_model, tokens.split(args.micro_batch_size)
            scores += args.rm_coef * torch.cat([reward_scores(model, x) for x in parts])
        if verifiable:
            scores += torch.as_tensor(gold_rewards(task, tokens)["score"]).to(scores)
        prompts = read_texts(task, tokens[:, : task.prompt_length])
        completions = read_texts(task, tokens[:, task.prompt_length :])
        for name, function, weight in functions:
            try:
                values = [float(x) for x in function(prompts=prompts, completions=completions)]
            except Exception as error:
                run.stop(f"{name} raised {type(error).__name__}: {error}")
            if len(values) != len(tokens):
                run.stop(f"{name} returned {len(values)} rewards for {len(tokens)} completions")
            if not np.isfinite(values).all():
                i = np.isfinite(values).argmin()
                run.stop(f"{name} returned {values[i]} for {completions[i]!r}")
            scores += weight * torch.tensor(values).to(scores)
        return scores

    return score


def train_ppo(args, task, agent, run):
    """Stage 3: maximize the score without straying too far from the SFT policy."""
    # setup
    policy, reference, value_model = agent.policy, agent.reference, agent.value_model
    score = score_function(args, task, agent, run)
    agent.reward_model.requires_grad_(False)  # [H30]
    if run.step == 0:
        run.numbers |= {"kl_coef": args.kl_coef, "score_sums": [0, 0.0, 0.0], "negative_kl": 0}
        policy.load_state_dict(reference.state_dict())
        value_model.load_state_dict(agent.reward_model.state_dict())  # [H34] [H36] normalized, too
        if args.value_init == "sft" or not args.rm_coef:
            fresh = ScalarModel(copy.deepcopy(reference.model)).requires_grad_(False)
            fresh.head.weight.zero_()  # [H35]
            value_model.load_state_dict(fresh.state_dict())
    value_lr = args.learning_rate if args.value_learning_rate is None else args.value_learning_rate
    clip_coef_high = args.clip_coef if args.clip_coef_high is None else args.clip_coef_high
    groups = [{"params": x.parameters()} for x in (policy, value_model)]  # [H38]
    optimizer = torch.optim.AdamW(groups, eps=1e-5, fused=True)  # [H16]
    coefficients = (args.ptx_coef, args.micro_batch_size, args.max_grad_norm)
    coefficients += (args.clip_coef, clip_coef_high, args.vf_coef, args.clip_vloss)
    B, P = args.batch_size, task.prompt_length

    for iteration in run.steps("ppo", args.num_iterations, optimizer):
        remaining = 1 - (iteration - 1) / args.num_iterations
        for group, lr in zip(optimizer.param_groups, (args.learning_rate, value_lr), strict=True):
            group["lr"] = lr * (remaining if args.anneal_lr else 1)  # [C4] [H17]
        policy.requires_grad_(iteration > args.critic_warmup)  # [H34]
        global_step, rng, times = iteration * B, stream(args, "ppo", iteration), [time.time()]

        # rollout: a response to each of B prompts
        tokens, sampled_logprobs = sample(args, task, policy, write_texts(task, B, rng), rng)
        mask = tokens[:, P:] != PAD  # [H42]
        has_eos = (tokens[:, P:] == task.eos).any(1)
        times.append(time.time())

        # log-probabilities and values under the policy that acted, which is still the current one
        with torch.no_grad():
            parts = tokens.split(args.micro_batch_size)
            logprobs = torch.cat([response_logprobs(policy, x, P) for x in parts])  # [H65] again
            logratio = logprobs - torch.cat([response_logprobs(reference, x, P) for x in parts])
            values = torch.cat([value_model(x[:, :-1]) for x in parts])[:, P - 1 :] * mask

        # rewards: the score at the end, the KL penalty all the way
        scores = final_scores = score(tokens)
        score_sums = [*run.numbers["score_sums"]]
        if args.reward_clip is not None:  # [H48]
            mean, std = running_moments(score_sums, scores)
            final_scores = (scores - mean) / (std + 1e-8)
            final_scores = final_scores.clamp(-args.reward_clip, args.reward_clip)
        kl_coef = args.kl_coef if args.kl_target is None else run.numbers["kl_coef"]
        kl = kl_estimate(logratio, args.kl_estimator)
        rewards = token_rewards(final_scores, has_eos, kl, mask, kl_coef, args.missing_eos_penalty)
        if args.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False)  # [H47]
        run.check_finite(global_step, values=values, rewards=rewards)
        times.append(time.time())

        # advantages and value targets
        advantages = response_advantages(rewards, values, mask, args.gamma, args.gae_lambda)
        returns = advantages + values  # [H53]
        if args.norm_adv:
            advantages = whiten(advantages, mask)  # [H52]
        run.check_finite(global_step, advantages=advantages)
        run.numbers["score_sums"] = score_sums

        # update: several epochs of minibatches drawn without replacement
        batch = [tokens, logprobs, values, advantages, returns, mask, mask.sum(1).cpu()]
        ptx_tokens, ptx_size = None, args.ptx_ratio * args.minibatch_size
        stats = []
        for _ in range(args.update_epochs):
            order = torch.as_tensor(rng.permutation(B))  # [H58]
            for indices in order.split(args.minibatch_size):  # [H56]
                if args.ptx_coef and iteration > args.critic_warmup:
                    ptx_tokens = write_texts(task, ptx_size, rng, args.response_length)
                    ptx_tokens = ptx_tokens.to(run.device)
                optimizer.zero_grad()
                stats.append(ppo_gradient(agent, batch, indices, ptx_tokens, *coefficients))
                optimizer.step()
        times.append(time.time())

        # log
        means = {f"ppo/{k}": torch.stack([s[k] for s in stats]).mean().item() for k in stats[0]}
        means["ppo/val/ratio_var"] -= (means["ppo/val/ratio"] - 1) ** 2  # [H68]
        weights = nn.utils.get_total_norm(agent.parameters())
        run.check_finite(global_step, last_step_good=False, **means, weights=weights.item())
        gold = gold_rewards(task, tokens, *run.numbers["gold_units"])
        response_kl = logratio.sum(1)  # [H46] in nats, a sum and no mean of tokens
        kl_mean = response_kl.mean().item()
        (_, errors), (_, variance) = [masked_moments(x, mask) for x in (returns - values, returns)]
        means |= {
            "objective/kl": kl_mean,
            "objective/sqrt_kl": max(kl_mean, 0.0) ** 0.5,
            "objective/kl_coef": kl_coef,
            "objective/entropy": -logprobs.sum(1).mean().item(),
            "objective/scores": scores.mean().item(),
            "objective/scores_std": scores.std(correction=0).item(),
            "objective/non_score_reward": -kl_coef * kl.sum(1).mean().item(),
            "objective/rlhf_reward": rewards.sum(1).mean().item(),
            "objective/missing_eos": 1 - has_eos.float().mean().item(),
            "ppo/val/num_eos_tokens": has_eos.sum().item(),
            "ppo/val/vpred": masked_moments(values, mask)[0].item(),
            "ppo/val/var_explained": 1 - (errors / variance).item() if variance > 0 else np.nan,
            "ppo/lr": optimizer.param_groups[0]["lr"],
            "ppo/episode": global_step,
            "response/length": mask.sum(1).float().mean().item(),
            "rollout/logp_mismatch": (sampled_logprobs - logprobs).abs().max().item(),
            "perf/tokens_per_s": mask.sum().item() / (times[-1] - times[0]),
            **{f"gold/{name}": float(value.mean()) for name, value in gold.items()},
            **dict(zip(("time/gen", "time/score", "time/train"), np.diff(times), strict=True)),
        }
        run.log_iteration(iteration, global_step, means)
        run.log_samples(iteration, global_step, task, tokens, scores, gold["score"], response_kl)
        run.numbers["negative_kl"] = run.numbers["negative_kl"] + 1 if kl_mean < -1e-4 else 0
        if iteration == 1:
            run.numbers["first_entropy"] = means["ppo/policy/entropy"]
        mismatch = means["rollout/logp_mismatch"]
        run.warn(
            {
                "the first ratios are not 1": stats[0]["val/ratio_var"] > 1e-6,
                "sampler and trainer log-probabilities differ": mismatch > 1e-3,
                "the KL has been negative for 10 rollouts": run.numbers["negative_kl"] >= 10,
                "all scores are equal, nothing can be learned": scores.min() == scores.max(),
                "most responses do not end": means["objective/missing_eos"] > 0.5,
                "the entropy has collapsed": means["ppo/policy/entropy"]
                < 0.05 * run.numbers["first_entropy"],
                "most of the update is clipped": means["ppo/policy/clipfrac"] > 0.4,
            }
        )
        if args.kl_target is not None:
            settings = (args.kl_target, args.kl_horizon, B)
            run.numbers["kl_coef"] = next_kl_coef(kl_coef, kl_mean, *settings)


# ------------------------------------------------------------------------------------------------
# Runs


def fail(message: str):
    """Stop with one line that says what is wrong and what to do."""
    print("error:", *str(message).split(), file=sys.stderr)
    sys.exit(2)


def say(*words):
    """A line on the standard output; a run goes on where that was closed, as by `| head`."""
    try:
        with tqdm.external_write_mode():
            print(*words, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def parse_args(argv: list[str]) -> Args:
    """Args from the command line; W&B sweeps write a boolean as --flag=True or --flag=False.

    What is not given is as in the checkpoint of --resume or --load, or as the task wants it.
    """
    names = [field.name for field in dataclasses.fields(Args) if field.type is bool]
    names = "|".join(names).replace("_", "[-_]")
    argv = [re.sub(rf"^--({names})=[Tt]rue$", r"--\1", arg) for arg in argv]
    argv = [re.sub(rf"^--({names})=[Ff]alse$", r"--no-\1", arg) for arg in argv]
    args = tyro.cli(Args, args=argv, description=__doc__.splitlines()[0])
    default = SORT if args.task == "sort" else {}
    if path := args.resume or args.load:
        data = load_checkpoint(path)
        default = data["args"] | {"resume": None, "load": None}
        if args.load:
            default["stages"] = ",".join(STAGES[min(data["stage"], 2) :])  # PPO again, at least
    if args.reward_fn:
        default = default | {"reward_fn": ()}  # what is given takes its place
    return tyro.cli(Args, args=argv, default=Args(**default))


def check_args(args: Args):
    """Refuse what cannot work, before any training starts and before W&B is contacted."""
    import importlib.util

    for name, kind in get_type_hints(Args, include_extras=True).items():
        value = getattr(args, name)
        for part in (kind, *get_args(kind)):  # X, or each of X | None
            match getattr(part, "__metadata__", ()):
                case (valid, words) if value is not None and not valid(value):
                    fail(f"--{name.replace('_', '-')} is {value}, it must be {words}")
    if args.kl_target is not None and args.kl_coef == 0:
        fail("--kl-target adapts --kl-coef, which cannot be 0 then")
    if args.d_model % args.num_heads:
        fail(f"--d-model {args.d_model} cannot be divided into {args.num_heads} --num-heads")
    if args.batch_size % args.num_minibatches:
        parts = f"{args.num_minibatches} equal --num-minibatches"
        fail(f"--batch-size {args.batch_size} cannot be divided into {parts}")
    if args.total_episodes < args.batch_size:
        fail(f"--total-episodes {args.total_episodes} is less than one --batch-size")
    stages = [stage for stage in STAGES if stage in args.stages.split(",")]
    if not stages or args.stages != ",".join(stages):
        fail(f"--stages {args.stages}: choose from {','.join(STAGES)}, in this order")
    path = args.resume or args.load
    data = load_checkpoint(path) if path else {"stage": 0, "numbers": {}}
    if args.load and stages[0] == "sft":
        fail("--load brings what sft learns; leave sft out of --stages, or --load")
    learned = {"sft": data["stage"] > 0, "rm": "rm/accuracy" in data["numbers"] or not args.rm_coef}
    for stage in STAGES[: min(2, STAGES.index(stages[-1]))]:  # sft and rm, before what is later
        ahead = stage in stages and (not args.resume or STAGES.index(stage) >= data["stage"])
        if not learned[stage] and not ahead:
            fail(f"--stages {args.stages} needs what {stage} learns; --load a checkpoint with it")
    if args.task == "reviews" and not args.rm_coef and not args.reward_fn:
        fail("--rm-coef 0 leaves no reward; add --reward-fn file.py:function")
    for text in args.reward_fn:
        load_reward_function(text)
    if args.track and not importlib.util.find_spec("wandb"):
        fail("--track needs the package wandb: pip install wandb")


def load_reward_function(text: str):
    """file.py:function[:weight] -> name, function(prompts, completions) -> numbers, weight"""
    match = re.fullmatch(r"(.+\.py):(\w+)(?::([^:]+))?", text)
    if not match:
        fail(f"--reward-fn {text}: write file.py:function or file.py:function:weight")
    path, name, weight = match.groups()
    sys.path[:0] = {str(Path(path).resolve().parent)} - set(sys.path)  # its neighbours
    try:
        function, weight = runpy.run_path(path)[name], float(weight or 1)
    except Exception as error:
        fail(f"--reward-fn {text}: {type(error).__name__}: {error}")
    if not callable(function) or not math.isfinite(weight):
        fail(f"--reward-fn {text}: {name} is not callable or its weight {weight} not finite")
    return f"{path}:{name}", function, weight


def load_checkpoint(path: str) -> dict:
    """What save_checkpoint wrote; any other file is refused. `path` may be the run's folder."""
    path = Path(path) / "checkpoint.pt" if Path(path).is_dir() else Path(path)
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
        Args(**data["args"]), data["stage"]
        return data
    except Exception as error:
        fail(f"{path} is no checkpoint of ppo_rlhf.py: {type(error).__name__}: {error}")


class Run:
    """What a run leaves behind: config.json, metrics.csv, checkpoint.pt, a copy of this script.

    global_step is what a stage has seen: demonstrations (sft/*), pairs (rm/*), episodes (others).
    """

    def __init__(self, args: Args, device: torch.device, agent: Agent):
        self.args, self.device, self.agent, self.checkpoint = args, device, agent, args.resume
        self.stage, self.step, self.optimizer, self.signal, self.warned = 0, 0, None, None, set()
        self.numbers, self.data, path = {"gold_units": [0.0, 1.0]}, {}, args.resume or args.load
        derived = {name: getattr(args, name) for name in ("minibatch_size", "num_iterations")}
        config = dataclasses.asdict(args) | derived
        if path:
            data = load_checkpoint(path)
            self.numbers = data["numbers"]
            try:
                agent.load_state_dict(data["agent"])
            except RuntimeError as error:
                fail(f"{path} does not fit these settings: {error}")
        if args.resume:
            self.data, self.stage, self.step = data, data["stage"], data["step"]  # [H69]
            resumed = Path(args.resume)
            self.folder = resumed if resumed.is_dir() else resumed.parent
            try:
                self.metrics = open(self.folder / "metrics.csv", "r+")
            except OSError as error:
                fail(f"--resume needs metrics.csv beside the checkpoint: {error}")
            self.metrics.truncate(data["metrics_bytes"])  # nothing stands twice
            self.metrics.seek(0, os.SEEK_END)
        else:
            try:
                self.folder = self.new_folder()
                text = json.dumps(config | origin(device), indent=2)
                (self.folder / "config.json").write_text(text + "\n")
                shutil.copy(__file__, self.folder)
                self.metrics = open(self.folder / "metrics.csv", "w")
            except OSError as error:
                fail(f"a run needs a folder to write to: {error}")
            self.metrics.write("global_step,time,name,value\n")
        self.wandb = None
        if args.track:
            import wandb

            names = dict(project=args.wandb_project_name, entity=args.wandb_entity)
            names |= dict(name=self.folder.name, id=self.data.get("wandb_id"), resume="allow")
            try:
                self.wandb = wandb.init(**names, config=config, save_code=True)
            except wandb.Error as error:
                if not args.resume:
                    shutil.rmtree(self.folder)
                fail(f"Weights & Biases: {error}")
            self.wandb.define_metric("*", step_metric="global_step")
        self.bar = tqdm(disable=True)
        self.start_time = time.time() - self.data.get("seconds", 0.0)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.on_signal)

    def new_folder(self) -> Path:
        """runs/{run name}, never one that exists: a millisecond later the name is another."""
        while True:
            args, now = self.args, time.time_ns() // 10**6
            folder = Path("runs") / f"{args.task}__{args.exp_name}__{args.seed}__{now}"
            try:
                folder.mkdir(parents=True)
                return folder
            except FileExistsError:
                time.sleep(0.001)

    def on_signal(self, number, _):
        """Stop after the step under way; a second signal does not wait for it."""
        self.signal = number
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)

    def begins(self, stage: str) -> bool:
        """Whether a stage is still to be done: not, if a resumed run is past it."""
        if self.stage < STAGES.index(stage):
            self.stage, self.step = STAGES.index(stage), 0
        return self.stage == STAGES.index(stage)

    def steps(self, stage: str, total: int, optimizer):
        """The steps of a stage that are left, 1 to total, with a bar and checkpoints."""
        self.optimizer = optimizer
        if self.step:
            optimizer.load_state_dict(self.data["optimizer"])
        self.bar = tqdm(total=total, initial=self.step, desc=stage, unit="step", disable=None)
        for step in range(self.step + 1, total + 1):
            yield step
            self.step = step
            self.bar.update()
            if self.signal:
                self.close()
            if step == total or step % self.args.checkpoint_every == 0:
                self.save_checkpoint()
        self.bar.close()

    def finish(self):
        """A stage is over, its product complete."""
        self.stage, self.step, self.optimizer = self.stage + 1, 0, None
        self.save_checkpoint()

    def warn(self, conditions: dict):
        """A line for each message whose condition holds, once."""
        for message in [x for x, holds in conditions.items() if holds and x not in self.warned]:
            tqdm.write(f"warning: {message}", file=sys.stderr)
            self.warned.add(message)

    def log(self, global_step: int, metrics: dict[str, float]):
        """One row for each metric in metrics.csv, one row for all of them in W&B."""
        seconds = time.time() - self.start_time
        for name, value in metrics.items():
            self.metrics.write(f"{global_step},{seconds:.3f},{name},{value:.9g}\n")
        if self.wandb:
            self.wandb.log({"global_step": global_step} | metrics)

    def log_iteration(self, iteration: int, global_step: int, metrics: dict[str, float]):
        """The metrics of one iteration; the progress, a line every ten of them."""
        self.log(global_step, metrics)
        if iteration % 10 == 1 or iteration == self.args.num_iterations:
            shown = {"proxy": "objective/scores", "gold": "gold/score", "KL": "objective/kl"}
            line = "".join(f"  {name} {metrics[key]:6.2f}" for name, key in shown.items())
            say(f"ppo: {global_step:6,} episodes{line}")

    def log_samples(self, iteration, global_step, task, tokens, *numbers):
        """[H67] Every ten iterations, a table in W&B of texts and what they were worth."""
        if self.wandb and iteration % 10 == 1:
            import wandb

            parts = tokens.split([task.prompt_length, self.args.response_length], dim=1)
            texts, lengths = [read_texts(task, x) for x in parts], (parts[1] != PAD).sum(1)
            rows = zip(*texts, *(x.tolist() for x in (*numbers, lengths)), strict=True)
            columns = ["prompt", "response", "score", "gold", "kl", "length"]
            table = wandb.Table(columns, [list(row) for row in rows][:16])
            self.wandb.log({"global_step": global_step, "samples": table})

    def check_finite(self, global_step: int, last_step_good=True, **data):
        """Stop before anything that is not finite is learned from, sampled with or saved."""
        for name, value in data.items():
            if not torch.as_tensor(value).isfinite().all():
                self.stop(f"{name} not finite at step {global_step}", save=last_step_good)

    def stop(self, message: str, save=True):
        """Fail, what was learned until the last step kept."""
        if save:
            self.save_checkpoint()
        self.bar.close()
        fail(f"{message}; last good checkpoint: {self.checkpoint or 'none yet'}")

    def save_checkpoint(self):
        """Atomic: whatever happens meanwhile, a complete checkpoint is there under its name."""
        self.metrics.flush()
        data = {"args": dataclasses.asdict(self.args), "stage": self.stage, "step": self.step}
        data |= {"agent": self.agent.state_dict(), "numbers": self.numbers}
        data |= {"metrics_bytes": self.metrics.tell(), "seconds": time.time() - self.start_time}
        data |= {"wandb_id": self.wandb.id} if self.wandb else {}
        data |= {"optimizer": self.optimizer.state_dict()} if self.optimizer else {}
        with open(self.folder / "checkpoint.tmp", "wb") as file:
            buffer = io.BytesIO()  # torch would not report a full disk as an OSError
            torch.save(data, buffer)
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, self.folder / "checkpoint.pt")
        self.checkpoint = self.folder / "checkpoint.pt"

    def close(self):
        """The end of the run; a checkpoint first if there was a signal, which is the exit code."""
        if self.signal:
            self.save_checkpoint()
        self.bar.close()
        self.metrics.close()
        code = 128 + self.signal if self.signal else 0
        if self.wandb:
            self.wandb.finish(exit_code=code)
        if code:
            say(f"to go on: python {sys.argv[0]} --resume '{self.folder}'")
        say(f"written to {self.folder}")
        if code:
            sys.exit(code)


def evaluate(args, task, agent, run):
    """A table: the SFT policy, the best of n of its samples by the score, PPO; some texts."""
    rng, P = stream(args, "evaluation"), task.prompt_length
    score = score_function(args, task, agent, run)
    prompts = write_texts(task, args.eval_episodes, rng)
    pool = torch.stack([sample(args, task, agent.reference, prompts, rng)[0] for _ in range(16)])
    scores = torch.stack([score(tokens) for tokens in pool])
    columns = {"SFT": (pool[0], 0.0)}
    for n in (4, 16):
        best, rows = scores[:n].argmax(0), torch.arange(len(prompts))
        columns[f"best of {n}"] = (pool[best, rows], math.log(n) - (n - 1) / n)  # its exact KL
    tokens, _ = sample(args, task, agent.policy, prompts, rng)
    with torch.no_grad():
        logprobs = [response_logprobs(x, tokens, P) for x in (agent.policy, agent.reference)]
    columns["PPO"] = (tokens, (logprobs[0] - logprobs[1]).sum(1).mean().item())

    table, texts = {}, {}
    sft_gold = gold_rewards(task, pool[0], *run.numbers["gold_units"])["score"]
    for name, (tokens, kl) in columns.items():
        gold = gold_rewards(task, tokens, *run.numbers["gold_units"])
        proxy, responses = score(tokens).cpu().numpy(), tokens[:, P:]
        texts[name] = list(zip(proxy, gold["score"], read_texts(task, responses), strict=True))
        table[name] = {"proxy": proxy.mean(), "kl": kl}
        table[name] |= {f"gold/{part}": value.mean() for part, value in gold.items()}
        table[name]["length"] = (responses != PAD).sum(1).float().mean().item()
        table[name]["missing_eos"] = 1 - (responses == task.eos).any(1).float().mean().item()
        table[name]["wins_against_sft"] = np.heaviside(gold["score"] - sft_gold, 0.5).mean()
    say(f"\n{f'{len(prompts)} prompts':18}", *(f"{name:>11}" for name in table))
    for row in table["SFT"]:
        say(f"{row:18}", *(f"{column[row]:11.3f}" for column in table.values()))
    say(*(f"{k} {v:.3f}" for k, v in run.numbers.items() if k.startswith("rm/")))
    for i, prompt in enumerate(read_texts(task, prompts[:4])):
        say(f"\n{prompt}")
        for name in ("SFT", "PPO"):
            say("  {}  proxy {:+.2f}  gold {:+.2f}  {}".format(name, *texts[name][i]))
    cells = [(name, row) for name in table for row in table[name]]
    results = {f"eval/{n.lower().replace(' ', '_')}/{r}": float(table[n][r]) for n, r in cells}
    run.log(args.num_iterations * args.batch_size, results)


def origin(device: torch.device) -> dict:
    """Where a run comes from: the machine, the versions, the commit, the script, the command."""
    git = f"git -C {shlex.quote(str(Path(__file__).parent))} describe"
    describe = f"{git} --always --dirty --abbrev=40 --exclude='*'"  # the commit, whatever the tags
    status, commit = subprocess.getstatusoutput(describe)
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "cpus": os.cpu_count(),
        "platform": platform.platform(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__}
        | {"numpy": np.__version__},
        "git_commit": commit if status == 0 else None,
        "script_sha256": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
        "command": shlex.join(sys.argv),
    }


if __name__ == "__main__":
    args = parse_args(sys.argv[1:])
    check_args(args)
    try:
        train(args)
    except OSError as error:  # a disk that is full, a folder that has gone
        fail(f"the run's folder cannot be written to: {error}")
