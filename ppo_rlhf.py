"""Reinforcement learning from human feedback with PPO, the whole algorithm in one file.

    python ppo_rlhf.py --seed 1
    python ppo_rlhf.py --model M --sft-data S.jsonl --pref-data P.jsonl --prompts Q.jsonl

Supervised fine-tuning (SFT) -> pairs of its samples -> reward model (RM) -> PPO against it, on a
task small enough for three minutes on one core; nothing is downloaded. Who prefers which sample is
told by a hidden program, the gold reward: PPO never sees it, but every table shows it beside the
reward model's score, the proxy. With --kl-coef 0 the proxy goes up and the gold reward down.
With --model, the same stages for a model of Hugging Face and your texts (docs/language_models.md).
A tag such as [H44] marks the line that implements a detail; docs/details.md explains each.

Notation, used without exception below
    P, R                  columns of a prompt, padded on the left, and of a response, on the right
    B = batch_size        episodes in a rollout: a prompt, a response, one score
    M = B / minibatches   episodes in a minibatch
    T = R, N = B          steps and environments in `gae`, where an episode starts at t = 0
    mask [B, R]           true for the tokens of a response, up to and including EOS
    values[t] = V(s_t)    s_t: the prompt and t tokens; dones[t] = 1 from the last token on
    KL                    to the SFT policy, in nats for a whole response
    G = group_size        responses to one prompt, side by side in the rollout

References
    [PPO]   Schulman et al. 2017, Proximal Policy Optimization Algorithms, arXiv:1707.06347
    [GAE]   Schulman et al. 2016, High-Dimensional Continuous Control Using GAE, arXiv:1506.02438
    [ppo2]  github.com/openai/baselines at commit ea25b9e
    [LHP]   Ziegler et al. 2019, Fine-Tuning Language Models from Human Preferences, 1909.08593;
            github.com/openai/lm-human-preferences at commit cbfd210
    [OSF]   Stiennon et al. 2020, Learning to Summarize from Human Feedback, arXiv:2009.01325
    [IGPT]  Ouyang et al. 2022, Training Language Models to Follow Instructions, arXiv:2203.02155
    [GAO]   Gao et al. 2022, Scaling Laws for Reward Model Overoptimization, arXiv:2210.10760
    [N+]    Huang et al. 2024, The N+ Implementation Details of RLHF with PPO, arXiv:2403.17031
    [GRPO]  Shao et al. 2024, DeepSeekMath, arXiv:2402.03300
    [DR]    Liu et al. 2025, Understanding R1-Zero-Like Training, arXiv:2503.20783 (Dr. GRPO)
"""

# /// script
# requires-python = ">=3.11"
# dependencies = ["numpy==2.4.6", "torch==2.13.0", "tqdm==4.70.1", "tyro==1.0.17", "wandb==0.31.0"]
# ///

import asyncio
import contextlib
import copy
import dataclasses
import functools
import hashlib
import inspect
import json
import math
import os
import platform
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from itertools import chain, count, pairwise, repeat, takewhile
from operator import call
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal, NamedTuple, get_args, get_type_hints

import numpy as np
import torch
import tyro
from torch import distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributions import Categorical
from torch.nn.functional import gelu, logsigmoid, pad, scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
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

    precision: Literal["fp32", "bf16", "pure-bf16"] = "fp32"  # bf16: autocast; pure: weights, too
    gradient_checkpointing: bool = False  # keep what goes into a layer, compute the rest again
    logprob_chunk: Count = 4096  # tokens whose logits are in memory at a time
    lora_rank: Whole = 0  # train adapters of this rank only, on weights that all models share
    merge: bool = False  # write whole models, not adapters
    fsdp: bool = False  # under torchrun, each GPU holds a part of each model (FSDP2)
    plan: bool = False  # print what memory these settings need, and stop

    task: Literal["reviews", "sort"] = "reviews"  # sort: a verifiable reward, other defaults
    model: str | None = None  # causal model of Hugging Face, folder or hub id; no task then
    ref_model: str | None = None  # what the KL is measured to; None: the model, after SFT if any
    reward_model: str | None = None  # sequence classifier, or causal model that `rm` starts from
    value_model: str | None = None  # what the value model starts as; None: see --value-init
    sft_data: str | None = None  # demonstrations: .jsonl, .parquet, or hub data set, NAME[:SPLIT]
    pref_data: str | None = None  # pairs
    prompts: str | None = None  # prompts of PPO; further columns go to the reward functions
    eval_prompts: str | None = None  # prompts of the evaluation; None: the same
    prompt_length: Count = 512  # P, tokens of a prompt at most, of --prompts and the like
    stop: Repeatable = ()  # text that ends a response as EOS does; repeatable
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
    group_size: Count = 1  # G, responses to each prompt; above 1: GRPO, without value model
    loss_mean: Literal["token", "response"] = "token"  # of the policy loss; response: GRPO's
    gamma: Fraction = 1.0  # no discount [H49]
    gae_lambda: Fraction = 0.95  # trades bias against variance of the advantages [H50]
    kl_coef: Weight = 0.1  # beta, weight of the KL to the SFT policy [H44]
    kl_in: Literal["reward", "loss"] = "reward"  # where it stands; loss: GRPO's, by k3
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"  # of a reward; joschu.net/blog/kl-approx.html
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
    norm_adv: bool = True  # whiten advantages over the whole rollout [H52], or in a group
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

# defaults of --model: all texts of the files, and steps that suit weights which know a language
REAL = dict(sft_texts=10**9, sft_epochs=1, sft_batch_size=8, sft_learning_rate=2e-5)
REAL |= dict(rm_pairs=10**9, rm_test_pairs=64, rm_epochs=1, rm_batch_size=8, rm_learning_rate=1e-5)
REAL |= dict(response_length=64, batch_size=64, micro_batch_size=8, eval_episodes=64)
REAL |= dict(total_episodes=6400, learning_rate=3e-6, value_learning_rate=1e-5, kl_coef=0.05)
REAL |= dict(logprob_chunk=512)
LORA = dict(sft_learning_rate=2e-4, rm_learning_rate=1e-4)  # of adapters, which start at nothing
LORA |= dict(learning_rate=3e-5, value_learning_rate=1e-4)


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
    num_tokens = property(lambda task: len(task.words))
    judge = property(lambda task: task)  # its tokens are those of the reward model

    def rows(self, kind, n, rng):
        """n rows with a prompt and, for SFT, a completion, its demonstration; both are texts"""
        rows = []
        for _ in range(n):
            rows.append({"prompt": self.write_prompt(rng)})
            if kind == "sft":
                rows[-1]["completion"] = self.write_response(rng, rows[-1]["prompt"])
        return rows

    def ids(self, row):
        """-> tokens of a row's prompt; of its completion, if it has one, and EOS"""
        response = [*row["completion"].split(), "EOS"] if "completion" in row else []
        return [[self.words.index(x) for x in text] for text in (row["prompt"].split(), response)]

    def text(self, ids):
        return " ".join(self.words[t] for t in ids if t != self.eos)

    def ended(self, responses):
        """[B, t] -> [B]"""
        return (responses == self.eos).any(1)


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
BOTH = "--prompt-length and --response-length together"
KEYS = {"sft": ("completion",), "pref": ("chosen", "rejected"), "prompts": (), "eval": ()}


class Texts:
    """A task of files, in the tokens of a model of Hugging Face; it offers what `Task` does.

    A prompt is a text, or a list of messages {role, content}, which the model's template writes.
    """

    gold = None

    def __init__(self, path, args):
        self.tokenizer, self.judge = pretrained("AutoTokenizer", path), self
        ends = [self.tokenizer.eos_token_id, pretrained("AutoConfig", path).eos_token_id]
        with contextlib.suppress(OSError):  # some models have no such file
            generation = sys.modules["transformers"].GenerationConfig.from_pretrained(path)
            ends.append(generation.eos_token_id)
        ends = [x for end in ends for x in (end if isinstance(end, list) else [end])]
        self.ends = [*dict.fromkeys(x for x in ends if x is not None)]  # any of them is EOS
        self.num_tokens, self.stop = len(self.tokenizer), [*filter(None, args.stop)]
        self.prompt_length, self.longest = 0, (0, "")  # P, and the longest text with its source
        if not self.ends or not self.text(self.tokenizer("a word").input_ids):
            fail(f"{path} has no tokenizer, or none with a token that ends a text, EOS")

    def load(self, args):
        """Read and check all rows, before anything is learned."""
        vocabulary, template = self.tokenizer.get_vocab().items(), self.tokenizer.chat_template
        for path in filter(None, (args.ref_model, args.value_model, args.reward_model)):
            other = Texts(path, args)
            same = vocabulary <= other.tokenizer.get_vocab().items()
            if path == args.reward_model:
                same = same and template == other.tokenizer.chat_template
                self.judge = self if same else other
            elif not same:
                fail(f"{path} has another tokenizer than {args.model}")
        paths = (args.sft_data, args.pref_data, args.prompts, args.eval_prompts or args.prompts)
        self.files, self.hashes, P = {}, {}, args.prompt_length
        for kind, path in [(kind, path) for kind, path in zip(KEYS, paths, strict=True) if path]:
            rows = []
            for number, line in enumerate(read_rows(path), 1):
                if isinstance(line, bytes) and not line.strip():
                    continue
                try:
                    row = usable_row(json.loads(line) if isinstance(line, bytes) else line, kind)
                    texts = [row | {"completion": row[key]} for key in KEYS[kind]] or [row]
                    lengths = [[len(x) for x in self.ids(text)] for text in texts]
                    if self.judge is not self and kind != "sft":
                        self.judge.ids(texts[0])  # it may have no template
                    rows.append((lengths[0][0], max(map(sum, lengths)), row))
                except Exception as error:
                    fail(f"{path}, line {number}: {type(error).__name__}: {error}")
            fit = [row for row in rows if row[0] <= P]
            if not fit:
                fail(f"{path} has no row with a prompt of at most {P} tokens, --prompt-length")
            if len(fit) < len(rows):  # [H3] never cut
                long = f"{len(rows) - len(fit)} of {len(rows)} prompts are longer than {P} tokens"
                say(f"{path}: {long}, --prompt-length, and are left out")
            lengths, pairs, rows = zip(*fit, strict=True)
            self.files[kind] = [*rows]
            self.prompt_length = max(self.prompt_length, *lengths)
            if kind == "pref":
                self.longest = (max(pairs), path)
            content = hashlib.sha256(repr(rows).encode()).hexdigest()  # of a data set of the hub
            self.hashes[path] = digest(path) if Path(path).is_file() else content
        self.longest = max(self.longest, (self.prompt_length + args.response_length, BOTH))

    def rows(self, kind, n, rng):
        """n rows of a file, none twice as long as there are others; of texts to learn only these"""
        rows = self.files[kind]
        n = min(n, len(rows)) if KEYS[kind] else n
        sizes = [min(n - i, len(rows)) for i in range(0, n, len(rows))]
        return [rows[i] for m in sizes for i in rng.choice(len(rows), m, replace=False)]

    def ids(self, row):
        """[H2] A template's own words and BOS belong to the prompt, what it ends with to the end"""
        prompt, response = row["prompt"], row.get("completion")
        if isinstance(prompt, str):
            start = self.tokenizer(prompt).input_ids  # with BOS, if the model wants one ...
            while start[1:] and start[-1] in self.ends:  # ... and without EOS
                start = start[:-1]
        else:
            write = functools.partial(self.tokenizer.apply_chat_template, tokenize=False)
            text = write(prompt, add_generation_prompt=True)
            start = self.tokenizer(text, add_special_tokens=False).input_ids
            whole = write([*prompt, {"role": "assistant", "content": response or ""}])
            response = whole.removeprefix(text) if response and whole.startswith(text) else response
        if response is None:
            return start, []
        end = [*self.tokenizer(response, add_special_tokens=False).input_ids, self.ends[0]]
        return start, end[: next(i for i, token in enumerate(end) if token in self.ends) + 1]

    def text(self, ids):
        ids = [token for token in ids if token not in self.ends]
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def ended(self, responses):
        """[B, t] -> [B], by EOS or by a text of --stop"""
        ended = torch.isin(responses, torch.tensor(self.ends, device=responses.device)).any(1)
        if self.stop:
            rows = ([token for token in row if token != PAD] for row in responses.tolist())
            found = [any(x in self.tokenizer.decode(row) for x in self.stop) for row in rows]
            ended |= torch.tensor(found, device=responses.device)
        return ended


def read_rows(path):
    """Lines of .jsonl, rows of .parquet or of a data set of the hub, NAME[:SPLIT]"""
    try:
        if path.endswith((".json", ".jsonl")):
            return Path(path).read_bytes().rstrip().splitlines()
        name, _, split = path.partition(":")
        kind, files = ("parquet", path) if path.endswith(".parquet") else (name, None)
        datasets = package("datasets", path)
        datasets.disable_progress_bars()
        return datasets.load_dataset(kind, data_files=files, split=split or "train")
    except Exception as error:
        fail(f"{path}: {type(error).__name__}: {error}")


def usable_row(row, kind):
    """The row with a prompt, a text or messages, and with texts for the responses to it."""
    row = {key: value for key, value in row.items() if value is not None}
    if messages := row.pop("messages", None):
        last = len(messages) - (messages[-1]["role"] == "assistant")
        row |= {"prompt": messages[:last], "completion": messages[last:]}
    if kind == "pref" and "prompt" not in row:  # what both have in common, up to a turn
        pair = row["chosen"], row["rejected"]
        same = sum(1 for _ in takewhile(lambda x: x[0] == x[1], zip(*pair, strict=False)))
        if isinstance(pair[0], str):
            turn = "\n\nAssistant:"  # as in Anthropic's HH
            same = pair[0].rindex(turn, 0, same) + len(turn)
        row |= {"prompt": pair[0][:same], "chosen": pair[0][same:], "rejected": pair[1][same:]}
    if kind == "sft" and "chosen" in row:
        row.setdefault("completion", row["chosen"])
    if not KEYS[kind]:
        row.pop("completion", None)
    texts = [row[key] for key in ("prompt", *KEYS[kind])]
    turns = [x if isinstance(x, list) else [{"role": "", "content": x}] for x in texts]
    parts = [message[key] for turn in turns for message in turn for key in ("role", "content")]
    if not all(isinstance(part, str) for part in parts):
        raise TypeError("what is neither a text nor a message of a role and a content")
    row |= {key: message["content"] for key, (message,) in zip(KEYS[kind], turns[1:], strict=True)}
    if not row["prompt"] or (kind == "pref" and row["chosen"] == row["rejected"]):
        raise ValueError("an empty prompt, or chosen and rejected are the same")
    return row


def write_texts(task, rows, response_length=0):
    """Prompts and, where they have one and R is not 0, completions -> tokens int64 [n, P + R]

    Prompts end, and responses start, at the same column [H1], each with columns of its own [H21].
    EOS ends a response [H4] [H25]; one that is too long is cut off and has none. None: any length.
    """
    texts = [task.ids(row) for row in rows]
    P = task.prompt_length or max(len(prompt) for prompt, _ in texts)
    if response_length is None:
        response_length = max(len(response) for _, response in texts)
    tokens = torch.full((len(rows), P + response_length), PAD)
    for line, (prompt, response) in zip(tokens, texts, strict=True):
        line[P - len(prompt) : P] = torch.tensor(prompt)
        end = torch.tensor(response[:response_length])
        line[P : P + len(end)] = end
    return tokens


def read_texts(task, tokens):
    """tokens [n, *] -> n texts, without padding and EOS"""
    return [task.text([t for t in row if t != PAD]) for row in tokens.tolist()]


def gold_rewards(task, tokens, mean=0.0, std=1.0):
    """tokens [n, P + R] -> dict of score, from which mean and std are taken, and its parts, [n]"""
    if not task.gold:
        return {}
    prompts, responses = tokens[:, : task.prompt_length], tokens[:, task.prompt_length :]
    ended = task.ended(responses).tolist()
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


class Cache(list):
    """Keys and values of each layer."""

    def reorder_cache(self, rows):
        self[:] = [(k[rows], v[rows]) for k, v in self]


class Output(NamedTuple):
    """Of a Transformer, and of its trunk."""

    last_hidden_state: torch.Tensor  # [B, s, d]
    cache: Cache | None = None
    logits: torch.Tensor | None = None  # of the last columns [B, logits_to_keep or s, rows]


class Trunk(nn.Module):
    """A Transformer without a head."""

    def __init__(self, rows, max_length, d_model, num_layers, num_heads):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(rows, d_model), nn.Embedding(max_length, d_model)
        self.blocks = nn.ModuleList(Block(d_model, num_heads) for _ in range(num_layers))
        self.norm = nn.LayerNorm(d_model)

    def forward(self, input_ids, attention_mask, position_ids, cache=None, **_):
        """input_ids and position_ids [B, s]: the last s of S columns, of attention_mask [B, S]"""
        s, S = input_ids.shape[1], attention_mask.shape[1]
        causal = torch.ones(s, S, dtype=torch.bool, device=input_ids.device).tril(S - s)
        itself = causal.triu(S - s)  # always visible: padding that sees nothing would be NaN
        visible = (attention_mask.bool()[:, None, None] & causal) | itself
        x, new = self.tokens(input_ids) + self.positions(position_ids), Cache()
        for block, past in zip(self.blocks, cache or repeat(None), strict=False):
            x, keys_values = block(x, visible, past)
            new.append(keys_values)
        return Output(self.norm(x), new)


class Transformer(nn.Module):
    """A small GPT, called and answering like the models of Hugging Face."""

    get_decoder = lambda model: model.base_model  # noqa: E731

    def __init__(self, num_tokens, max_length, d_model, *sizes):
        super().__init__()
        self.config = SimpleNamespace(hidden_size=d_model)
        rows = math.ceil(num_tokens / 64) * 64  # some of no use, as in most real models
        self.base_model = Trunk(rows, max_length, d_model, *sizes)
        self.lm_head = nn.Linear(d_model, rows, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, logits_to_keep=0, **inputs):
        output = self.base_model(**inputs)
        return output._replace(logits=self.lm_head(output.last_hidden_state[:, -logits_to_keep:]))


def read(model, tokens, first=0, **options):
    """Run a model over padded tokens [B, S], from column `first` on if a cache has the others."""
    mask = tokens != PAD
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # [H7] the first token is at 0, wherever it is
    ids = tokens.clamp(min=0)  # [H6] padding becomes any token, and invisible
    inputs = dict(input_ids=ids[:, first:], position_ids=positions[:, first:])
    return model(**inputs, attention_mask=mask.long(), **options)


class Policy(nn.Module):
    """A language model as a policy; the only place that knows vocabulary and temperature."""

    def __init__(self, model, num_tokens, temperature=1.0, chunk=4096):
        super().__init__()
        self.model, self.num_tokens = model, num_tokens
        self.temperature, self.chunk = temperature, chunk
        names = inspect.signature(model.forward).parameters  # transformers before 5.24
        self.cache_name = "past_key_values" if "past_key_values" in names else "cache"

    def forward(self, tokens, columns=1, cache=None, use_cache=False, actions=None):
        """tokens [B, S] -> logits of what follows the last ones [B, columns, num_tokens], cache

        Or, of actions [B, R] that follow the last ones, log-probabilities and entropies [B x R].
        """
        if actions is not None:
            output = read(self.decoder(), tokens, use_cache=False)
            hidden = output.last_hidden_state[:, -actions.shape[1] :]  # [B, R, d]
            chunks = [x.flatten(0, 1).split(self.chunk) for x in (hidden, actions)]
            again = functools.partial(checkpoint, use_reentrant=False)
            run = again if len(chunks[0]) > 1 else call
            parts = [run(self.of_chunk, type(output), *x) for x in zip(*chunks, strict=True)]
            return [torch.cat(x) for x in zip(*parts, strict=True)]
        first = 0 if cache is None else tokens.shape[1] - 1
        options = {"use_cache": use_cache, self.cache_name: cache, "logits_to_keep": columns}
        output = read(self.model, tokens, first, **options)  # [H13]
        return self.scaled(output.logits), getattr(output, self.cache_name)

    def of_chunk(self, output, hidden, actions):
        """Of some hidden states [n, d], logits by the model's own last lines, which may cap and
        scale them, as if they came from its decoder -> log-probabilities and entropies [n]
        """
        decoder = self.decoder()
        decoder.forward = lambda *_, **__: output(last_hidden_state=hidden[None])
        try:
            logits = self.model(input_ids=actions[None], use_cache=False).logits
        finally:
            del decoder.forward
        words = Categorical(logits=self.scaled(logits[0]), validate_args=False)
        with torch.no_grad():
            entropies = words.entropy()
        return words.log_prob(actions), entropies

    def decoder(self):
        """The model without its head; before transformers 5 some call themselves their decoder."""
        both = self.model.get_decoder(), self.model.base_model
        return next(x for x in both if x is not self.model)

    def scaled(self, logits):
        return logits[..., : self.num_tokens].float() / self.temperature  # [H10] [H15] [H19]

    def responses(self, tokens):
        """tokens [B, P + R] -> the distribution each token of a response is drawn from [B, R]"""
        return Words(self, tokens[:, :-1])  # [H14] what comes out at one column is about the next


class Words:
    """Categorical(logits=...) of what follows the last tokens, without all logits in memory."""

    def __init__(self, policy, tokens):
        self.policy, self.tokens = policy, tokens

    def log_prob(self, actions):
        """[B, R] -> [B, R]; entropy() is known after it"""
        said = self.policy(self.tokens, actions=actions)
        logprobs, self.entropies = (x.view_as(actions) for x in said)
        return logprobs

    def entropy(self):
        return self.entropies


class ScalarModel(nn.Module):
    """A language model with a number for each token: the reward model, the value model."""

    def __init__(self, model):
        super().__init__()
        d_model, self.model = model.config.hidden_size, twin(model.base_model)  # no words [H30]
        self.head = nn.Linear(d_model, 1)
        nn.init.normal_(self.head.weight, std=1 / (d_model + 1) ** 0.5)  # [H23] variance 1/(d+1)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens):
        """tokens [B, S] -> [B, S]"""
        hidden = read(self.model, tokens, use_cache=False).last_hidden_state
        return self.head(hidden.to(self.head.weight.dtype)).sum(-1).float()  # FSDP2 wants no view

    @torch.no_grad()
    def normalize(self, scores):
        """[H28] Give scores like these mean 0 and standard deviation 1 from now on."""
        std, mean = (x.item() for x in torch.std_mean(scores, correction=0))
        self.head.weight /= std + 1e-8
        self.head.bias.sub_(mean).div_(std + 1e-8)


class Agent(nn.Module):
    """The four models: policy and value model learn, reference and reward model judge them."""

    def __init__(self, task, args):
        super().__init__()
        self.prompt_length, length = task.prompt_length, task.prompt_length + args.response_length
        if args.model:
            model = pretrained_model(args.model, task, args)
        else:
            sizes = (args.d_model, args.num_layers, args.num_heads)
            model = Transformer(task.num_tokens, length, *sizes)
        self.policy = Policy(model, task.num_tokens, args.temperature, args.logprob_chunk)
        self.reference, self.reward_model = twin(self.policy), None  # [H37]
        if args.rm_coef:
            path, had = args.reward_model, load_checkpoint(args.load) if args.load else None
            loaded = had and "rm/accuracy" in had["numbers"] and had["args"]["reward_model"] == path
            learns = "rm" in args.stages or args.resume or loaded
            self.reward_model = scalar_model(path, task.judge, model, args, learns)
        if args.group_size > 1:
            self.value_model = None
        elif args.value_model or args.value_init == "sft" or not args.rm_coef:
            self.value_model = scalar_model(args.value_model, task, model, args)
        elif task.judge is task:
            self.value_model = twin(self.reward_model)  # shares nothing that learns
        else:
            fail(f"--value-init rm: {args.reward_model} has another tokenizer than {args.model}")
        if args.ref_model:
            self.reference.model = pretrained_model(args.ref_model, task, args)
        self.reference.requires_grad_(False)

    def forward(self, tokens):
        """tokens [M, P + R] -> distribution of response tokens [M, R], values before them [M, R]"""
        values = self.value_model(tokens[:, :-1]) if self.value_model else 0.0 * tokens[:, 1:]
        return self.policy.responses(tokens), values[:, self.prompt_length - 1 :]  # [H14]


def twin(module):
    """A copy that shares what does not learn: of a model with adapters, all but these."""
    shared = [x for x in chain(module.parameters(), module.buffers()) if not x.requires_grad]
    return copy.deepcopy(module, {id(x): x for x in shared})


def frugal(network, args, device):
    """What saves memory, in the order in which it has to be done."""
    if args.fsdp:  # what is sharded cannot be shared
        network.model = copy.deepcopy(network.model)
    model = network.model
    layers = next(x for x in model.modules() if isinstance(x, nn.ModuleList))
    if args.precision == "pure-bf16":
        model.to(torch.bfloat16)
    how = {"use_reentrant": False, "preserve_rng_state": False}
    for layer in layers if args.gradient_checkpointing else ():
        layer.forward = functools.partial(checkpoint, layer.forward, **how)
    if args.precision == "bf16":  # but not for the head of a number
        inner = network if isinstance(network, Policy) else model
        inner.forward = torch.autocast(device.type, torch.bfloat16)(inner.forward)
    heads = filter(None, [getattr(network, "head", None)])  # in fp32, whatever the rest is in
    for module in (*layers, *heads, network) if args.fsdp else ():
        mesh = init_device_mesh(device.type, (rank_of()[1],))
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
        module.set_gradient_divide_factor(1.0)  # a sum, as in add_up
        module.set_force_sum_reduction_for_comms(True)


def pretrained(kind, path, **options):
    """transformers.{kind}.from_pretrained(path)"""
    transformers = package("transformers", path)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        return getattr(transformers, kind).from_pretrained(path, **options)
    except Exception as error:
        fail(f"{path}: {type(error).__name__}: {error}")


def pretrained_model(path, task, args, kind="CausalLM"):
    """A model with all its weights, as long and as wide as the texts need it, and an adapter."""
    options = {"dtype": torch.float32, "output_loading_info": True}  # [H19] whatever the file has
    if args.plan:  # from its config alone
        config, transformers = pretrained("AutoConfig", path), sys.modules["transformers"]
        auto, found = getattr(transformers, f"AutoModelFor{kind}"), {}
        model = auto.from_config(config, dtype=torch.float32)
    else:
        model, found = pretrained(f"AutoModelFor{kind}", path, **options)
    if found.get("missing_keys"):
        fail(f"{path} lacks weights: {', '.join(found['missing_keys'])}")
    kinds = "".join(model.config.architectures or "")
    if "Classification" in kinds and kind == "CausalLM":
        fail(f"{path} is a {kinds}, no causal language model")
    if not hasattr(model.config.get_text_config(), "num_attention_heads"):  # Mamba, RWKV
        fail(f"{path} is no Transformer: no keys and values to sample with")
    length, source = task.longest
    most = getattr(model.config, "max_position_embeddings", length)
    if most < length:
        fail(f"{path} reads {most} tokens at most, {source}: {length}")
    rows = model.get_input_embeddings().num_embeddings
    if task.num_tokens > rows:
        fail(f"{path}: {rows} rows of embeddings are too few for {task.num_tokens} tokens")
    if not (args.plan or nn.utils.get_total_norm(model.parameters()).isfinite()):
        fail(f"{path}: weights are not finite")
    if args.lora_rank:
        trunk, rank = model.requires_grad_(False).base_model, args.lora_rank
        package("peft", "--lora-rank").inject_adapter_in_model(lora_config(trunk, rank), trunk)
    return model.eval()  # [H9] no dropout


def lora_config(trunk, rank, **more):
    """Adapters for all products of the layers; their output counts twice, as is usual."""
    conv1d = sys.modules["transformers"].pytorch_utils.Conv1D  # GPT-2's, transposed
    products = {n: x for n, x in trunk.named_modules() if isinstance(x, (nn.Linear, conv1d))}
    names = {x.removesuffix(".base_layer").rpartition(".")[2] for x in products if "lora_" not in x}
    transposed = any(isinstance(x, conv1d) for x in products.values())
    names = dict(target_modules=sorted(names), fan_in_fan_out=transposed)
    return sys.modules["peft"].LoraConfig(r=rank, lora_alpha=2 * rank, **names, **more)


def scalar_model(path, task, model, args, will_learn=True):
    """A sequence classifier as it is; of a causal model, or of `model`, the head is new."""
    kinds = pretrained("AutoConfig", path).architectures if path else None
    if "Classification" not in "".join(kinds or ""):
        if path and not will_learn:
            fail(f"{path} has no head that says what a text is worth; train one with --pref-data")
        return ScalarModel(pretrained_model(path, task, args) if path else model)
    classifier = pretrained_model(path, task, args, "SequenceClassification")
    if classifier.num_labels != 1 or not hasattr(classifier, "score"):
        fail(f"{path} says {classifier.num_labels} numbers of a text, not one by a layer `score`")
    scalar = ScalarModel(classifier)
    offset = torch.tensor([getattr(classifier.config, "reward_offset", 0.0)])  # no bias there
    scalar.head.load_state_dict({"weight": classifier.score.weight, "bias": offset})
    return scalar


# ------------------------------------------------------------------------------------------------
# The algorithm


@torch.no_grad()
def generate(policy, prompts, response_length, has_ended, uniforms):
    """Sample responses, until EOS or for R tokens: softmax, nothing else warps it.

    A token is where its uniform number falls in the cumulative distribution, so what else is in
    the batch does not matter. Equal prompts are read once; a text that has ended leaves the batch.
    prompts [B, P], uniforms [B, R] from [0, 1)
    -> tokens [B, P + R] with padding after EOS, their log-probabilities [B, R]
    """
    B, P = prompts.shape
    tokens = pad(prompts, (0, response_length, 0, 1), value=PAD)  # and a row for a rank that waits
    logprobs = torch.zeros(B + 1, response_length, device=prompts.device)
    uniforms = pad(uniforms, (0, 0, 0, 1))
    prompts, rows = prompts.unique(dim=0, return_inverse=True)
    logits, cache = policy(prompts, 1, use_cache=True)
    logits, alive = logits[rows], torch.arange(B, device=prompts.device)
    cache.reorder_cache(rows)
    for t in range(response_length):
        if t > 0:
            logits, cache = policy(tokens[alive, : P + t], 1, cache, use_cache=True)  # [H13]
        step = Categorical(logits=logits.squeeze(1), validate_args=False)
        below = step.probs.double().cumsum(1)
        drawn = uniforms[alive, t, None] * below[:, -1:]
        action = torch.searchsorted(below, drawn, right=True)  # [H11]
        tokens[alive, P + t] = action.squeeze(1)  # [H41] nothing behind EOS
        logprobs[alive, t] = step.log_prob(action.squeeze(1))
        goes_on = (~has_ended(tokens[alive, P : P + t + 1]) & (alive < B)).nonzero().squeeze(1)
        if not any(of_all_ranks(len(goes_on))):  # [H12]
            break
        if len(goes_on) < len(alive):
            alive = alive[goes_on] if len(goes_on) else torch.full_like(alive[:1], B)
            cache.reorder_cache(goes_on if len(goes_on) else goes_on.new_zeros(1))
    return tokens[:B], logprobs[:B]


def response_logprobs(policy, tokens, prompt_length):
    """tokens [B, P + R] -> [B, R], 0 behind EOS [H42]"""
    responses = tokens[:, prompt_length:]
    logprobs = policy.responses(tokens).log_prob(responses.clamp(min=0))
    return logprobs.masked_fill(responses == PAD, 0.0)


def sft_loss(policy, tokens, prompt_length, num_tokens):
    """Cross-entropy of the responses, EOS included [H4], prompts and padding not [H20]."""
    return -response_logprobs(policy, tokens, prompt_length).sum() / num_tokens


def reward_scores(reward_model, tokens):
    """[H24] The score of a text, prompt and response [H5], is what the reward model says at its
    last token [H8]: [B, P + R] -> [B]
    """
    last = (tokens != PAD).long().cumsum(1).argmax(1, keepdim=True)
    return reward_model(tokens).gather(1, last).squeeze(1)


def rm_loss(reward_model, chosen, rejected, num_pairs):
    """[H22] -log sigmoid(r_chosen - r_rejected), of Bradley and Terry -> loss [], margins [B]"""
    margins = torch.sub(*reward_scores(reward_model, torch.cat([chosen, rejected])).chunk(2))
    return -logsigmoid(margins).sum() / num_pairs, margins.detach()


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


def group_advantages(outcomes, scores, group_size, norm_adv):
    """[X7] How much better a response is than others to the same prompt: there is no critic.

        A_i = (R_i - mean(R)) / (std(R) + 1e-8)    over a group, [GRPO] 4.1.2; [DR] does not divide

    outcomes R [B], the sums of the rewards, and scores [B]: what is in R but for the KL. A group
    of equal scores gets 0. -> advantages [B], the share of such groups []
    """
    outcomes, scores = outcomes.view(-1, group_size), scores.view(-1, group_size)
    advantages = outcomes - outcomes.mean(1, keepdim=True)
    if norm_adv:
        advantages = advantages / (outcomes.std(1, correction=0, keepdim=True) + 1e-8)
    equal = scores.amax(1, keepdim=True) == scores.amin(1, keepdim=True)
    return advantages.masked_fill(equal, 0.0).flatten(), equal.float().mean()


def ppo_loss(agent, minibatch, sizes, clip_coef, clip_coef_high, vf_coef, clip_vloss, kl_coef):
    """The objective of [PPO] equation 9, negated, without an entropy bonus.

        L = E[ min(r A, clip(r, 1 - eps, 1 + eps) A) - beta KL - c1 (V - R)^2 / 2 ]

    with r = pi(a|s) / pi_old(a|s); beta is 0 if the KL is in the rewards. minibatch: tokens
    [M, P + R] and, each [M, R], log pi_old(a|s), V_old(s), A, R, log pi_ref(a|s) and the mask of
    what counts. The mean is over sizes[0] tokens; that of the policy's terms, if sizes[1] is not 0,
    over so many responses, of the means of their tokens, [GRPO] equation 3. This may be a part of
    them only: then the losses, and all statistics, of the parts add up. -> loss [], statistics []
    """

    def mean(x, lengths=1, number=sizes[0]):
        return (x * mask / lengths).sum() / number

    tokens, logprobs, values, advantages, returns, reference_logprobs, mask = minibatch
    by_response = (mask.sum(1, keepdim=True), sizes[1]) if sizes[1] else ()  # [X7]
    actions = tokens[:, -mask.shape[1] :].clamp(min=0)
    policy, new_values = agent(tokens)
    new_logprobs = policy.log_prob(actions)
    logratio = (new_logprobs - logprobs).masked_fill(~mask, 0.0)  # [H42]
    ratio = logratio.exp()
    approx_kl = mean(0.5 * logratio**2)  # [H62] k2, not k3 as in the other scripts

    clipped_ratio = ratio.clamp(1 - clip_coef, 1 + clip_coef_high)
    surrogate = torch.min(ratio * advantages, clipped_ratio * advantages)  # [C8] [H55]
    policy_loss = -mean(surrogate, *by_response)

    value_losses = unclipped_losses = (new_values - returns) ** 2
    if clip_vloss:  # [C9] [H54] the worse of the two, so that clipping cannot hide an error
        clipped_values = values + (new_values - values).clamp(-clip_coef, clip_coef)
        value_losses = torch.max(value_losses, (clipped_values - returns) ** 2)
    value_loss = 0.5 * mean(value_losses)

    loss = policy_loss + vf_coef * value_loss
    if kl_coef:  # [H61] [GRPO] equation 4
        logratio = (new_logprobs - reference_logprobs).masked_fill(~mask, 0.0)
        loss = loss + kl_coef * mean(kl_estimate(logratio, "k3"), *by_response)

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


def micro_batches(rows, size):
    """[H57] Some of the rows [n] at a time, of those that are this rank's [X2], and a factor.

    All ranks take equally many steps; one that has nothing left takes a row with the factor 0.
    """
    rank, ranks = rank_of()
    for i in range(0, math.ceil(len(rows) / ranks), size):
        some = rows[rank::ranks][i : i + size]
        yield (some, 1.0) if len(some) else (rows[:1], 0.0)


def ppo_gradient(agent, batch, indices, ptx, ptx_coef, micro_size, max_norm, loss_mean, *others):
    """Leave the clipped gradient of ppo_loss for the minibatch batch[indices] in the parameters.

    It is the same whatever the number of texts that go through the networks at once. Texts of like
    length do, without the columns that are padding in all of them. indices and, last in the batch,
    the lengths of the responses are on the CPU: what they decide need not wait for a GPU.
    """
    *batch, lengths = batch
    indices = indices[lengths[indices].argsort()]
    sizes, stats = (lengths[indices].sum().item(), (loss_mean == "response") * len(indices)), {}
    for part, factor in micro_batches(indices, micro_size):
        padding = batch[-1].shape[1] - lengths[part].max().item()
        texts = [x[part.to(x.device, non_blocking=True)] for x in batch]
        short = [x[:, : x.shape[1] - padding] for x in texts]
        loss, part_stats = ppo_loss(agent, short, sizes, *others)
        (factor * loss).backward()
        stats = {name: stats.get(name, 0.0) + factor * x for name, x in part_stats.items()}
    if ptx is not None:  # [H64]
        P = agent.prompt_length
        num_tokens = (ptx[:, P:] != PAD).sum()
        for part, factor in micro_batches(ptx, micro_size):
            (ptx_coef * factor * sft_loss(agent.policy, part, P, num_tokens)).backward()
    add_up(agent, stats)  # [X2]
    for name, network in (("policy", agent.policy), ("val", agent.value_model)):
        if network:
            norm = nn.utils.clip_grad_norm_(network.parameters(), max_norm)  # [H39]
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
    if args.model:
        task = Texts(args.model, args)
        task.load(args)
    agent = Agent(task, args).to(device)
    run = Run(args, device, agent)
    for model in agent.children():
        frugal(model, args, device)
    functions = {"sft": train_sft, "rm": train_rm, "ppo": train_ppo, "eval": evaluate}
    for stage in args.stages.split(","):
        if run.begins(stage) and (stage != "rm" or args.rm_coef):
            functions[stage](args, task, agent, run)
            if args.model and stage != "eval":
                export(stage, args, task, agent, run)
            run.finish()
    run.close(run.signal)
    return agent


def stream(args, *key):
    """Random numbers that follow from the seed and a name, so that there is no state to save."""
    key = [part if isinstance(part, int) else int.from_bytes(part.encode()) for part in key]
    return np.random.default_rng([args.seed, 0, *key])  # [seed, rank, stage, step] [H18]


def spread(function, size, *tensors):
    """function(rows of the tensors), without gradients and some rows at a time, each rank its share

    -> what it says of all rows, a list of tensors [n, ...]
    """
    parts, device = [], None
    with torch.no_grad():
        for rows, factor in micro_batches(torch.arange(len(tensors[0])), size):
            outputs = function(*(x[rows.to(x.device)] for x in tensors))
            device = outputs[0].device
            parts += [(rows, *(x.cpu() for x in outputs))] if factor else []
    rows, *outputs = [torch.cat(x) for x in zip(*chain(*of_all_ranks(parts)), strict=True)]
    return [x[rows.argsort()].to(device) for x in outputs]


def sample(args, task, policy, prompts, rng):
    """prompts [n, P] on the CPU -> tokens [n, P + R], log-probabilities [n, R]"""
    device = next(policy.parameters()).device
    uniforms = torch.as_tensor(rng.random((len(prompts), args.response_length)))

    def write(prompts, uniforms):
        return generate(policy, prompts, args.response_length, task.ended, uniforms)

    return spread(write, len(prompts), prompts.to(device), uniforms.to(device))


def fit(args, stage, model, loss_function, rows, epochs, batch_size, learning_rate, run):
    """Minimize loss_function(some rows, all rows of the step) by AdamW, in `epochs` passes."""
    optimizer = torch.optim.AdamW(model.parameters(), eps=1e-5, fused=True)  # [H16]
    batches = math.ceil(rows / batch_size)
    texts = math.ceil(args.micro_batch_size / (2 if stage == "rm" else 1))  # or pairs of them
    for step in run.steps(stage, epochs * batches, optimizer):
        epoch, i = divmod(step - 1, batches)
        rng = stream(args, stage, "epoch", epoch)
        order = torch.as_tensor(rng.permutation(rows))  # [H27]
        lr = learning_rate * (1 - (step - 1) / (epochs * batches))
        optimizer.param_groups[0]["lr"] = lr  # [H17]
        optimizer.zero_grad()
        batch, stats = order[i * batch_size : (i + 1) * batch_size], {}
        for part, factor in micro_batches(batch, texts):
            loss, part_stats = loss_function(part, batch)
            (factor * loss).backward()
            part_stats = {"loss": loss.detach(), **part_stats}
            stats = {name: stats.get(name, 0.0) + factor * x for name, x in part_stats.items()}
        add_up(model, stats)  # [X2]
        norm = nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        stats = {name: x.item() for name, x in (stats | {"grad_norm": norm}).items()} | {"lr": lr}
        weights = nn.utils.get_total_norm(model.parameters())
        seen = epoch * rows + min((i + 1) * batch_size, rows)
        run.check_finite(seen, last_step_good=False, **stats, weights=weights.item())
        run.log(seen, {f"{stage}/{name}": value for name, value in stats.items()})
    optimizer.zero_grad()  # no later stage shall carry the gradients along


def train_sft(args, task, agent, run):
    """Stage 1: learn to write from demonstrations. What comes out is where all else starts."""
    rows = task.rows("sft", args.sft_texts, stream(args, "sft"))
    tokens = write_texts(task, rows, args.response_length).to(run.device)
    agent.policy.temperature = 1.0  # of demonstrations

    def loss_function(part, batch):
        num_tokens = (tokens[batch, task.prompt_length :] != PAD).sum()
        return sft_loss(agent.policy, tokens[part], task.prompt_length, num_tokens), {}

    sizes = (len(rows), args.sft_epochs, args.sft_batch_size)
    fit(args, "sft", agent.policy, loss_function, *sizes, args.sft_learning_rate, run)
    agent.policy.temperature = args.temperature
    if not args.ref_model:
        agent.reference.load_state_dict(agent.policy.state_dict())
    if task is TASKS["reviews"]:  # from now on, gold in units of what SFT samples differ by
        rng = stream(args, "gold")
        prompts = write_texts(task, task.rows("gold", 2048, rng))
        samples, _ = sample(args, task, agent.reference, prompts, rng)
        scores = gold_rewards(task, samples)["score"]
        run.numbers["gold_units"] = [float(scores.mean()), float(scores.std())]


def preference_pairs(args, task, agent, run):
    """Two samples of the SFT policy for each prompt, and which of the two is preferred: noisily,
    by Bradley and Terry, one that is better by one standard deviation of gold in 73 % of cases.
    Those of files are as they are, and say nothing of gold.

    -> chosen and rejected, tokens [n, P + R] each, and how much better the chosen is by gold [n]
    """
    rng, n = stream(args, "pairs"), args.rm_pairs + args.rm_test_pairs
    rows = task.rows("pref", n, rng)
    if not task.gold:
        texts = [row | {"completion": row[key]} for key in KEYS["pref"] for row in rows]
        return *write_texts(task.judge, texts, None).to(run.device).chunk(2), np.ones(len(rows))
    prompts = write_texts(task, rows)
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
    if run.step == 0 and not args.reward_model:
        start = agent.policy if args.ref_model else agent.reference
        model.model.load_state_dict(start.model.base_model.state_dict())  # [H30] new is the head

    def loss_function(part, batch):
        loss, margins = rm_loss(model, chosen[part], rejected[part], len(batch))
        return loss, {"train_accuracy": (margins > 0).sum() / len(batch)}

    unseen = args.rm_test_pairs if task.gold else min(args.rm_test_pairs, len(chosen) // 2)
    sizes = (len(chosen) - unseen, args.rm_epochs, args.rm_batch_size)
    fit(args, "rm", model, loss_function, *sizes, args.rm_learning_rate, run)
    last = torch.cat([x[-unseen:] for x in (chosen, rejected)])  # all of them, if there is one
    (scores,) = spread(lambda x: [reward_scores(model, x)], args.micro_batch_size, last)
    model.normalize(scores)  # [H28] samples of the SFT policy, all of them
    margin, gold_margin = torch.sub(*scores.chunk(2)).cpu().numpy(), gold_margin[-unseen:]
    right, differ = np.heaviside(margin, 0.5), gold_margin != 0  # a tie counts half
    results = {"rm/accuracy": right.mean()}  # [H31] of the labels, ...
    if task.gold:  # ... of the gold reward itself, and without the labels' noise
        ceiling = 1 / (1 + np.exp(-np.abs(gold_margin) / args.rm_label_temperature))
        accuracy = np.where(gold_margin > 0, right, 1 - right)[differ].mean()
        results |= {"rm/ceiling": ceiling.mean(), "rm/accuracy_gold": accuracy}
    run.numbers |= {name: float(value) for name, value in results.items()}
    run.log(args.rm_epochs * sizes[0], results)
    at_chance = results["rm/accuracy"] < 0.5 + 1 / len(right) ** 0.5  # two standard errors
    run.warn({"the reward model is no better than chance; more --rm-pairs?": at_chance})


def score_function(args, task, agent, run):
    """What PPO maximizes: the reward model and the functions of --reward-fn, added up."""
    functions = [load_reward_function(text) for text in args.reward_fn]
    verifiable = task.gold and not functions and not args.rm_coef

    @torch.no_grad()
    def score(rows, tokens):
        """tokens [B, P + R], the first columns written from the rows -> [B]"""
        scores = torch.zeros(len(tokens), device=tokens.device)
        texts = read_texts(task, tokens[:, task.prompt_length :])
        if args.rm_coef:
            judged = tokens
            if task.judge is not task:  # [H32] another tokenizer: the texts, in its words
                answered = [row | {"completion": x} for row, x in zip(rows, texts, strict=True)]
                judged = write_texts(task.judge, answered, None).to(tokens.device)
            model = agent.reward_model
            (said,) = spread(lambda x: [reward_scores(model, x)], args.micro_batch_size, judged)
            scores += args.rm_coef * said
        if verifiable:
            scores += torch.as_tensor(gold_rewards(task, tokens)["score"]).to(scores)
        names = {*chain(*rows)} - {"prompt", "completion"}
        columns = {name: [row.get(name) for row in rows] for name in names}
        columns["prompts"] = [row["prompt"] for row in rows]
        columns["completions"] = [
            text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": text}]
            for row, text in zip(rows, texts, strict=True)
        ]
        responses = tokens[:, task.prompt_length :].tolist()
        columns["completion_ids"] = [[t for t in row if t != PAD] for row in responses]
        for name, function, weight in functions:
            values = opinions(function, columns) if rank_of()[0] == 0 else None
            values = of_all_ranks(values)[0]  # called once, whatever it depends on
            if isinstance(values, str):
                run.stop(f"{name} {values}", save=True)
            scores += weight * torch.tensor(values).to(scores)
        return scores

    return score


def opinions(function, columns):
    """What a function says of the completions, numbers, or a text: what is wrong with it."""
    wanted, texts = inspect.signature(function).parameters.values(), columns["completions"]
    every = any(x.kind == x.VAR_KEYWORD for x in wanted)
    keys = columns.keys() if every else columns.keys() & {x.name for x in wanted}
    try:
        values = function(**{key: columns[key] for key in keys})
        values = asyncio.run(values) if inspect.iscoroutine(values) else values
        values = [0.0 if x is None else float(x) for x in values]  # None: no opinion
    except Exception as error:
        return f"raised {type(error).__name__}: {error}"
    if len(values) != len(texts):
        return f"returned {len(values)} rewards for {len(texts)} completions"
    if not np.isfinite(values).all():
        i = np.isfinite(values).argmin()
        return f"returned {values[i]} for {texts[i]!r}"
    return values


def train_ppo(args, task, agent, run):
    """Stage 3: maximize the score without straying too far from the SFT policy."""
    # setup
    policy, reference, value_model = agent.policy, agent.reference, agent.value_model
    score = score_function(args, task, agent, run)
    if args.rm_coef:
        agent.reward_model.requires_grad_(False)  # [H30]
    if run.step == 0:
        run.numbers |= {"kl_coef": args.kl_coef, "score_sums": [0, 0.0, 0.0], "negative_kl": 0}
        if not args.ref_model:
            policy.load_state_dict(reference.state_dict())
        if value_model and not args.value_model and args.value_init == "rm" and args.rm_coef:
            value_model.load_state_dict(agent.reward_model.state_dict())  # [H34] [H36]
        elif value_model and not args.value_model:
            value_model.model.load_state_dict(policy.model.base_model.state_dict())
            nn.init.zeros_(value_model.head.weight)  # [H35]
    value_lr = args.learning_rate if args.value_learning_rate is None else args.value_learning_rate
    clip_coef_high = args.clip_coef if args.clip_coef_high is None else args.clip_coef_high
    models = filter(None, (policy, value_model))
    learning = [[x for x in model.parameters() if x.requires_grad] for model in models]  # [H38]
    optimizer = torch.optim.AdamW([{"params": x} for x in learning], eps=1e-5, fused=True)  # [H16]

    def said_of(tokens):
        logprobs = [response_logprobs(x, tokens, P) for x in (policy, reference)]  # [H65] again
        return *logprobs, agent(tokens)[1]

    coefficients = (args.ptx_coef, args.micro_batch_size, args.max_grad_norm, args.loss_mean)
    coefficients += (args.clip_coef, clip_coef_high, args.vf_coef, args.clip_vloss)
    B, G, P = args.batch_size, args.group_size, task.prompt_length
    warmup = args.critic_warmup if value_model else 0

    for iteration in run.steps("ppo", args.num_iterations, optimizer):
        remaining = 1 - (iteration - 1) / args.num_iterations
        for group, lr in zip(optimizer.param_groups, (args.learning_rate, value_lr), strict=False):
            group["lr"] = lr * (remaining if args.anneal_lr else 1)  # [C4] [H17]
        for weights in learning[0]:
            weights.requires_grad_(iteration > warmup)  # [H34]
        global_step, rng, times = iteration * B, stream(args, "ppo", iteration), [time.time()]

        # rollout: B responses, G to each prompt
        rows = [row for row in task.rows("prompts", B // G, rng) for _ in range(G)]
        tokens, sampled_logprobs = sample(args, task, policy, write_texts(task, rows), rng)
        mask = tokens[:, P:] != PAD  # [H42]
        has_eos = task.ended(tokens[:, P:])
        times.append(time.time())

        # log-probabilities and values under the policy that acted, which is still the current one
        logprobs, reference_logprobs, values = spread(said_of, args.micro_batch_size, tokens)
        logratio, values = logprobs - reference_logprobs, values * mask

        # rewards: the score at the end, the KL penalty all the way
        scores = final_scores = score(rows, tokens)
        score_sums = [*run.numbers["score_sums"]]
        if args.reward_clip is not None:  # [H48]
            mean, std = running_moments(score_sums, scores)
            final_scores = (scores - mean) / (std + 1e-8)
            final_scores = final_scores.clamp(-args.reward_clip, args.reward_clip)
        kl_coef = args.kl_coef if args.kl_target is None else run.numbers["kl_coef"]
        in_reward, in_loss = (kl_coef, 0.0) if args.kl_in == "reward" else (0.0, kl_coef)  # [H61]
        kl, penalty = kl_estimate(logratio, args.kl_estimator), args.missing_eos_penalty
        rewards = token_rewards(final_scores, has_eos, kl, mask, in_reward, penalty)
        if args.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False)  # [H47]
        run.check_finite(global_step, values=values, rewards=rewards)
        times.append(time.time())

        # advantages and value targets
        if G > 1:
            outcomes, final_scores = rewards.sum(1), final_scores.where(has_eos, penalty)
            advantages, dead = group_advantages(outcomes, final_scores, G, args.norm_adv)  # [X7]
            advantages, returns = advantages[:, None] * mask, values
        else:
            advantages = response_advantages(rewards, values, mask, args.gamma, args.gae_lambda)
            returns = advantages + values  # [H53]
            if args.norm_adv:
                advantages = whiten(advantages, mask)  # [H52]
        run.check_finite(global_step, advantages=advantages)
        run.numbers["score_sums"] = score_sums

        # update: several epochs of minibatches drawn without replacement
        batch = [tokens, logprobs, values, advantages, returns, reference_logprobs, mask]
        batch, settings = [*batch, mask.sum(1).cpu()], (*coefficients, in_loss)
        stats, ptx_tokens, ptx_size = [], None, args.ptx_ratio * args.minibatch_size
        for _ in range(args.update_epochs):
            order = torch.as_tensor(rng.permutation(B))  # [H58]
            for indices in order.split(args.minibatch_size):  # [H56]
                if args.ptx_coef and iteration > warmup:
                    texts = task.rows("sft", ptx_size, rng)
                    ptx_tokens = write_texts(task, texts, args.response_length).to(run.device)
                optimizer.zero_grad()
                stats.append(ppo_gradient(agent, batch, indices, ptx_tokens, *settings))
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
        means |= {
            "objective/kl": kl_mean,
            "objective/sqrt_kl": max(kl_mean, 0.0) ** 0.5,
            "objective/kl_coef": kl_coef,
            "objective/entropy": -logprobs.sum(1).mean().item(),
            "objective/scores": scores.mean().item(),
            "objective/scores_std": scores.std(correction=0).item(),
            "objective/non_score_reward": 0.0 - in_reward * kl.sum(1).mean().item(),
            "objective/rlhf_reward": rewards.sum(1).mean().item(),
            "objective/missing_eos": 1 - has_eos.float().mean().item(),
            "ppo/val/num_eos_tokens": has_eos.sum().item(),
            "ppo/lr": optimizer.param_groups[0]["lr"],
            "ppo/episode": global_step,
            "response/length": mask.sum(1).float().mean().item(),
            "rollout/logp_mismatch": (sampled_logprobs - logprobs).abs().max().item(),
            "perf/tokens_per_s": mask.sum().item() / (times[-1] - times[0]),
            **{f"gold/{name}": float(value.mean()) for name, value in gold.items()},
            **dict(zip(("time/gen", "time/score", "time/train"), np.diff(times), strict=True)),
        }
        if value_model:
            errors, variance = [masked_moments(x, mask)[1] for x in (returns - values, returns)]
            means["ppo/val/vpred"] = masked_moments(values, mask)[0].item()
            means["ppo/val/var_explained"] = 1 - (errors / variance).item() if variance else np.nan
        else:
            means |= {"objective/dead_groups": dead.item()}
        run.log_iteration(iteration, global_step, means)
        worth = {"score": scores, "kl": response_kl} | ({"gold": gold["score"]} if gold else {})
        run.log_samples(iteration, global_step, task, rows, tokens, **worth)
        run.numbers["negative_kl"] = run.numbers["negative_kl"] + 1 if kl_mean < -1e-4 else 0
        run.numbers |= {"first_entropy": means["ppo/policy/entropy"]} if iteration == 1 else {}
        least_entropy = 0.05 * run.numbers["first_entropy"]
        conditions = {
            "the first ratios are not 1": stats[0]["val/ratio_var"] > 1e-6,
            "sampler and trainer log-probabilities differ": means["rollout/logp_mismatch"] > 1e-3,
            "the KL has been negative for 10 rollouts": run.numbers["negative_kl"] >= 10,
            "all scores are equal, nothing can be learned": scores.min() == scores.max(),
            "most groups have equal scores": means.get("objective/dead_groups", 0.0) > 0.5,
            "most responses do not end": means["objective/missing_eos"] > 0.5,
            "the entropy has collapsed": means["ppo/policy/entropy"] < least_entropy,
            "most of the update is clipped": means["ppo/policy/clipfrac"] > 0.4,
        }
        run.warn(conditions)
        if args.kl_target is not None:
            settings = (args.kl_target, args.kl_horizon, B)
            run.numbers["kl_coef"] = next_kl_coef(kl_coef, kl_mean, *settings)


# ------------------------------------------------------------------------------------------------
# Runs


def rank_of() -> tuple[int, int]:
    """The rank of this process, and how many there are: torchrun starts several."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def of_all_ranks(x) -> list:
    """What each rank has as x."""
    parts = [x] * rank_of()[1]
    if dist.is_initialized():
        dist.all_gather_object(parts, x)
    return parts


def add_up(module: nn.Module, stats: dict):
    """Gradients and numbers, over all ranks, in place; FSDP2 has added up what it shards."""
    if dist.is_initialized():
        gradients = [x.grad for x in module.parameters() if x.grad is not None]
        for x in chain(gradients, stats.values()):
            if not isinstance(x, DTensor):
                dist.all_reduce(x)


def fail(message: str):
    """Stop with one line that says what is wrong and what to do, of the rank that is first."""
    store = dist.is_initialized() and dist.distributed_c10d._get_default_store()
    if not store or store.add("failed", 1) == 1:
        print("error:", *str(message).split(), file=sys.stderr)
    sys.exit(2)


def say(*words):
    """A line on the standard output; a run goes on where that was closed, as by `| head`."""
    try:
        with tqdm.external_write_mode():
            print(*words, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def package(name: str, reason: str):
    """A package that only some flags need."""
    try:
        return __import__(name)
    except ImportError as error:
        how = f"pip install {name}, or uv run --with {name} ppo_rlhf.py"
        fail(f"{reason} needs the package {name}: {how} ({error})")


def parse_args(argv: list[str]) -> Args:
    """Args from the command line; W&B sweeps write a boolean as --flag=True or --flag=False.

    What is not given is as in the checkpoint of --resume or --load, or as the task wants it.
    """
    flag = "|".join(x.name for x in dataclasses.fields(Args) if x.type is bool).replace("_", "[-_]")
    argv = [re.sub(rf"^--({flag})=[Tt]rue$", r"--\1", arg) for arg in argv]
    argv = [re.sub(rf"^--({flag})=[Ff]alse$", r"--no-\1", arg) for arg in argv]
    args = tyro.cli(Args, args=argv, description=__doc__.splitlines()[0])
    default = SORT if args.task == "sort" else {}
    judged = float(bool(args.pref_data or args.reward_model))
    if args.model:
        data = (args.sft_data, args.pref_data, args.prompts, args.prompts)
        stages = [stage for stage, path in zip(STAGES, data, strict=True) if path]
        default = REAL | {"stages": ",".join(stages) or args.stages, "rm_coef": judged}
        default |= LORA if args.lora_rank else {}
    if path := args.resume or args.load:
        data = load_checkpoint(path)
        default = data["args"] | {"resume": None, "load": None}
        if args.load:
            default["rm_coef"] = default["rm_coef"] or judged
            stages = STAGES[min(data["stage"], 2) :]  # PPO again, at least
            none = default["model"] and not default["rm_coef"]
            default["stages"] = ",".join(stage for stage in stages if stage != "rm" or not none)
    # of what may be repeated, that which is given takes its place
    default = default | {name: () for name in ("reward_fn", "stop") if getattr(args, name)}
    return tyro.cli(Args, args=argv, default=Args(**default))


def check_args(args: Args):
    """Refuse what cannot work, before any training starts and before W&B is contacted."""
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
    for flag, size in (("num-minibatches", args.num_minibatches), ("group-size", args.group_size)):
        if args.batch_size % size:
            fail(f"--batch-size {args.batch_size} is no multiple of --{flag} {size}")
    if args.group_size > 1 and (args.value_model or args.whiten_rewards):
        fail("--group-size has no --value-model, and one reward a response, no --whiten-rewards")
    if args.total_episodes < args.batch_size:
        fail(f"--total-episodes {args.total_episodes} is less than one --batch-size")
    stages = [stage for stage in STAGES if stage in args.stages.split(",")]
    if not stages or args.stages != ",".join(stages):
        fail(f"--stages {args.stages}: choose from {','.join(STAGES)}, in this order")
    path = args.resume or args.load
    data = load_checkpoint(path) if path else {"stage": 0, "numbers": {}}
    counts = rf"{STAGES[min(data['stage'], 3)]}_(texts|pairs|batch_size)"  # steps, of this stage
    for name, old in data["args"].items() if args.resume else ():
        if name not in ("resume", "load") and (new := getattr(args, name)) != old:
            change = f"--{name.replace('_', '-')} is {new}, it was {old}"
            if re.fullmatch(f"task|model|seed|batch_size|group_size|{counts}", name):
                fail(f"{change}; that is another run than {path}")
            say(change)
    if args.resume and data["stage"] > 2 and args.total_episodes > data["args"]["total_episodes"]:
        fail(f"--resume {path}: ppo is over, no more --total-episodes; --load does it anew")
    if args.load and stages[0] == "sft":
        fail("--load brings what sft learns; leave sft out of --stages, or --load")
    learned = {"sft": data["stage"] > 0 or (args.model and not args.load)}
    learned["rm"] = "rm/accuracy" in data["numbers"] or not args.rm_coef or args.reward_model
    data_of = {"sft": "sft_data", "rm": "pref_data", "ppo": "prompts", "eval": "prompts"}
    for stage, name in data_of.items():
        if args.model and stage in stages and not getattr(args, name):
            fail(f"--stages {stage} of a --model needs --{name.replace('_', '-')}")
    if args.model and args.ptx_coef and "ppo" in stages and not args.sft_data:
        fail("--ptx-coef of a --model needs --sft-data")
    others = ("ref_model", "reward_model", "value_model", "eval_prompts", "stop", "lora_rank")
    for name in (*data_of.values(), *others):
        if getattr(args, name) and not args.model:
            fail(f"--{name.replace('_', '-')} needs a --model")
    for stage in STAGES[: min(2, STAGES.index(stages[-1]))]:  # sft and rm, before what is later
        ahead = stage in stages and (not args.resume or STAGES.index(stage) >= data["stage"])
        if not learned[stage] and not ahead:
            fail(f"--stages {args.stages} needs what {stage} learns; --load a checkpoint with it")
    rewarded = args.rm_coef or args.reward_fn or (args.task == "sort" and not args.model)
    if not rewarded and stages != ["sft"]:
        fail("no reward: --rm-coef above 0 and a reward model, or --reward-fn file.py:function")
    for text in args.reward_fn:
        load_reward_function(text)
    if args.minibatch_size % (ranks := rank_of()[1]):
        fail(f"minibatch_size {args.minibatch_size} cannot be divided by {ranks} ranks of torchrun")
    if args.fsdp and not (dist.is_initialized() or args.plan):
        fail("--fsdp needs torchrun: torchrun --nproc_per_node=2 ppo_rlhf.py --fsdp ...")
    if args.merge and not args.lora_rank:
        fail("--merge needs a --lora-rank")
    for flag, name in {"lora_rank": "peft", "track": "wandb"}.items():
        if getattr(args, flag):
            package(name, f"--{flag.replace('_', '-')}")


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
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if data.get("version", 1) != 1:
            raise ValueError(f"version {data['version']}, not 1")
        Args(**data["args"]), data["stage"]
        return data | {"folder": path.parent, "path": path}
    except Exception as error:
        fail(f"{path} is no checkpoint of ppo_rlhf.py: {type(error).__name__}: {error}")


def whole(x):
    """What is sharded, put together in memory of the first rank alone: tensors, dicts of them."""
    if isinstance(x, dict):
        return {key: whole(value) for key, value in x.items()}
    return x.full_tensor().to("meta" if rank_of()[0] else "cpu") if isinstance(x, DTensor) else x


def own_weights(model: nn.Module) -> dict:
    """All weights; where there are adapters, these and the head only."""
    state = model.state_dict()
    names = [name for name in state if "lora_" in name]
    names += [name for name in names[:1] and state if name.startswith("head.")]
    return {name: whole(state[name]) for name in names or state}


def load_optimizer(optimizer, data: dict):
    """What `whole` has put together, sharded as the parameters are."""
    optimizer.load_state_dict(data)
    for parameter, state in optimizer.state.items():
        for name, x in state.items():
            if isinstance(parameter, DTensor) and x.shape == parameter.shape:
                where = (parameter.device_mesh, parameter.placements)
                state[name] = distribute_tensor(x, *where, src_data_rank=None)


def digest(path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


FILES = ("metrics.csv", "samples.jsonl")
SAVED = (  # for each stage, the models that learn, and those that others have learned before
    (("policy",), ()),
    (("reward_model",), ("reference",)),
    (("policy", "value_model"), ("reference", "reward_model")),
    (("policy",), ("reference", "reward_model")),
)


class Run:
    """What a run leaves behind: config.json, metrics.csv, samples.jsonl, a copy of this script,
    checkpoint.pt and, beside it, the models that learn no more.

    global_step is what a stage has seen: demonstrations (sft/*), pairs (rm/*), episodes (others).
    """

    now = None  # the run of this process

    def __init__(self, args: Args, device: torch.device, agent: Agent):
        self.args, self.device, self.agent, self.checkpoint = args, device, agent, None
        self.stage, self.step, self.optimizer, self.signal, self.warned = 0, 0, None, 0, set()
        self.numbers, self.data, path = {"gold_units": [0.0, 1.0]}, {}, args.resume or args.load
        derived = {name: getattr(args, name) for name in ("minibatch_size", "num_iterations")}
        config = dataclasses.asdict(args) | derived
        self.frozen, self.last, self.folder = {}, {}, None  # hashes of models written; metrics
        if path:
            self.restore(data := load_checkpoint(path))
            self.numbers = data["numbers"]
        if args.resume:
            self.data, self.stage, self.step = data, data["stage"], data["step"]  # [H69]
            self.folder, self.frozen, self.checkpoint = data["folder"], data["frozen"], data["path"]
        self.rank, self.ranks = rank_of()
        self.lines, self.sent = 1, 0  # of metrics.csv: now, and when the run was resumed
        self.bytes = dict(zip(FILES, self.data.get("bytes", (0, 0)), strict=True))
        if self.rank == 0:  # it names, writes and shows
            self.open_folder(config | origin(device))
        self.folder = of_all_ranks(self.folder)[0]
        self.wandb, self.bar, self.handlers = None, tqdm(disable=True), {}
        if args.track and self.rank == 0:
            import wandb

            names = dict(project=args.wandb_project_name, entity=args.wandb_entity)
            names |= dict(name=self.folder.name, id=self.data.get("wandb_id"), resume="allow")
            try:
                self.wandb = wandb.init(**names, config=config, save_code=True)
            except wandb.Error as error:
                fail(f"Weights & Biases: {error}")
            self.wandb.define_metric("*", step_metric="global_step")
        self.start_time = time.time() - self.data.get("seconds", 0.0)
        with contextlib.suppress(ValueError, AttributeError):  # not the main thread; no fork
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers[number] = signal.signal(number, self.on_signal)
            # SIGTERM ends what a reward function starts
            os.register_at_fork(after_in_child=lambda: signal.signal(number, signal.SIG_DFL))
        Run.now = self

    def open_folder(self, config: dict):
        """A new one, or that of the checkpoint with its files as they were then."""
        args = self.args
        try:
            if args.resume:
                old = json.loads((self.folder / "config.json").read_text())
                texts = [(self.folder / name).read_bytes() for name in FILES]
                for (name, counted), text in zip(self.bytes.items(), texts, strict=True):
                    self.bytes[name] = text.rfind(b"\n", 0, counted) + 1
                    if self.bytes[name] < counted:  # a folder copied while a run wrote to it
                        say(f"{self.folder / name} lacks rows from before the checkpoint")
                rows, self.lines = texts[0], texts[0].count(b"\n", 0, self.bytes[FILES[0]])
                self.sent = max(old.get("sent", 0), rows.count(b"\n") * self.data["args"]["track"])
                config = old | {"resumed": [*old.get("resumed", []), config], "sent": self.sent}
            else:
                name = Path(args.model).name if args.model else args.task
                for now in count(time.time_ns() // 10**6):  # never a folder that exists
                    self.folder = Path("runs") / f"{name}__{args.exp_name}__{args.seed}__{now}"
                    with contextlib.suppress(FileExistsError):
                        self.folder.mkdir(parents=True)
                        break
                (self.folder / Path(__file__).name).write_bytes(Path(__file__).read_bytes())
            (self.folder / "config.tmp").write_text(json.dumps(config, indent=2) + "\n")
            os.replace(self.folder / "config.tmp", self.folder / "config.json")
            self.append(FILES[0], "" if args.resume else "global_step,time,name,value\n")
            self.append(FILES[1], "")  # nothing stands twice
        except (OSError, ValueError) as error:
            fail(f"a run needs a folder to write to: {error}")

    def restore(self, data: dict):
        """The models of a checkpoint and those beside it, but those that --load shall replace."""
        models, paths = {}, {"reference": "ref_model", "reward_model": "reward_model"}
        try:
            for name, expected in data["frozen"].items():
                path = data["folder"] / f"{name}.pt"
                if digest(path) != expected:
                    fail(f"{path} is not the file that belongs to the checkpoint")
                models[name] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            other = data["args"]["ref_model"]
            sft = models.get("policy") or (None if other else models.get("reference"))
            models = {"policy": sft} | models | data["models"]
            if self.args.load and data["stage"] > 1 and re.search("rm|ppo", self.args.stages):
                if not sft:  # it began with --load, too
                    fail(f"{data['folder']} has no policy but PPO's; --load the run of sft")
                models["policy"] = sft  # not where PPO has arrived
            for name, path in paths.items():
                again = name == "reward_model" and "rm" in self.args.stages  # with a new head
                if self.args.load and (again or getattr(self.args, path) != data["args"][path]):
                    models.pop(name, None)
            unused = {"value_model", *["reward_model"] * (not self.args.rm_coef)}
            for name in models.keys() - (unused if self.args.load else {}):
                model = getattr(self.agent, name)
                if models[name].keys() != own_weights(model).keys():
                    fail(f"{data['folder']} does not fit these settings: other weights")
                model.load_state_dict(model.state_dict() | models[name])
        except (AttributeError, OSError, RuntimeError) as error:
            fail(f"{data['folder']} does not fit these settings: {error}")

    def on_signal(self, number, _):
        """Stop after the step under way; a second signal does not wait for it."""
        self.signal = number
        for number in self.handlers:
            signal.signal(number, signal.SIG_DFL if self.ranks == 1 else signal.SIG_IGN)

    def begins(self, stage: str) -> bool:
        """Whether a stage is still to be done: not, if a resumed run is past it."""
        if self.stage < STAGES.index(stage):
            self.stage, self.step = STAGES.index(stage), 0
        return self.stage == STAGES.index(stage)

    def steps(self, stage: str, total: int, optimizer):
        """The steps of a stage that are left, 1 to total, with a bar and checkpoints."""
        self.optimizer = optimizer
        if self.step:
            load_optimizer(optimizer, self.data["optimizer"])
        how = {"initial": self.step, "unit": "step", "disable": self.rank > 0 or None}
        self.bar = tqdm(total=total, desc=stage, **how)
        for step in range(self.step + 1, total + 1):
            yield step
            self.step = step
            self.bar.update()
            if asked := max(of_all_ranks(self.signal)):  # a signal that comes now: next time
                self.close(asked)
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
            if self.rank == 0:
                tqdm.write(f"warning: {message}", file=sys.stderr)
            self.warned.add(message)

    def append(self, name: str, text: str):
        """Whole lines to a file of the first rank, or none: the disk may be full."""
        if self.rank == 0:
            try:
                with open(self.folder / name, "a", newline="\n") as file:
                    file.write(text)
                    if not text:
                        os.fsync(file.fileno())  # all that was written before
                self.bytes[name] += len(text)
            finally:
                os.truncate(self.folder / name, self.bytes[name])

    def log(self, global_step: int, metrics: dict[str, float]):
        """One row for each metric in metrics.csv, one row for all of them in W&B."""
        seconds = time.time() - self.start_time
        self.last |= metrics
        rows = [f"{global_step},{seconds:.3f},{name},{x:.9g}\n" for name, x in metrics.items()]
        self.append(FILES[0], "".join(rows))
        self.lines += len(rows)
        if self.wandb and self.lines > self.sent:  # no curve runs back
            self.wandb.log({"global_step": global_step} | metrics)

    def log_iteration(self, iteration: int, global_step: int, metrics: dict[str, float]):
        """The metrics of one iteration; the progress, a line every ten of them."""
        self.log(global_step, metrics)
        if iteration % 10 == 1 or iteration == self.args.num_iterations:
            shown = {"proxy": "objective/scores", "gold": "gold/score", "KL": "objective/kl"}
            words = [f"  {name} {metrics[x]:6.2f}" for name, x in shown.items() if x in metrics]
            say(f"ppo: {global_step:6,} episodes{''.join(words)}")

    def log_samples(self, iteration, global_step, task, rows, tokens, **numbers):
        """[H67] Every ten iterations, 16 texts and what they were worth; in W&B a table of them."""
        if iteration % 10 == 1:
            responses = tokens[:16, task.prompt_length :]
            numbers["length"] = (responses != PAD).sum(1)
            samples = [
                {"global_step": global_step, "prompt": rows[i]["prompt"], "response": text}
                | {name: x[i].item() for name, x in numbers.items()}
                for i, text in enumerate(read_texts(task, responses))
            ]
            self.append(FILES[1], "".join(json.dumps(sample) + "\n" for sample in samples))
            if self.wandb and self.lines > self.sent:
                table = sys.modules["wandb"].Table([*samples[0]], [[*x.values()] for x in samples])
                self.wandb.log({"global_step": global_step, "samples": table})

    def check_finite(self, global_step: int, last_step_good=True, **data):
        """Stop before anything that is not finite is learned from, sampled with or saved."""
        for name, value in data.items():
            if not torch.as_tensor(value).isfinite().all():
                self.stop(f"{name} not finite at step {global_step}", save=last_step_good)

    def stop(self, message: str, save=False):
        """Fail, what was learned until the last step kept if `save`, all files whole."""
        if save:  # a signal may have ended what a reward function had started
            asked = max(of_all_ranks(self.signal))
            self.close(asked) if asked else self.save_checkpoint()
        self.bar.close()
        for unfinished in self.folder.glob("*.tmp") if self.rank == 0 else ():
            with contextlib.suppress(OSError):  # the folder may be read-only
                unfinished.unlink()
        fail(f"{message}; last good checkpoint: {self.checkpoint or 'none yet'}")

    def save_checkpoint(self):
        """What learns, and once, in files of their own, the models that learn no more."""
        learn, rest = SAVED[min(self.stage, 3)]
        if self.stage == 1 and self.args.ref_model:  # else the reference has the same weights
            rest = (*rest, "policy")
        rest = [name for name in rest if name not in self.frozen]
        models = {x: own_weights(y) for x in (*learn, *rest) if (y := getattr(self.agent, x))}
        for name in models.keys() & rest:
            self.write(f"{name}.pt", models[name])
            self.frozen[name] = digest(self.folder / f"{name}.pt") if self.rank == 0 else ""
        data = {"args": dataclasses.asdict(self.args), "stage": self.stage, "step": self.step}
        data |= {"models": {name: models[name] for name in learn if name in models}}
        data |= {"version": 1, "numbers": self.numbers, "seconds": time.time() - self.start_time}
        data |= {"frozen": self.frozen, "bytes": [*self.bytes.values()]}
        data |= {"wandb_id": self.wandb.id if self.wandb else self.data.get("wandb_id")}
        data |= {"optimizer": whole(self.optimizer.state_dict())} if self.optimizer else {}
        for name in FILES:  # what the checkpoint counts on
            self.append(name, "")
        self.checkpoint = self.write("checkpoint.pt", data)

    def write(self, name: str, data: dict) -> Path:
        """Atomic: whatever happens meanwhile, a complete file is there under its name."""
        if self.rank == 0:
            with open(self.folder / f"{name}.tmp", "wb") as file:
                try:
                    torch.save(data, file)
                except RuntimeError as error:  # how torch reports a full disk
                    raise OSError(f"no space? {error}") from None
                file.flush()
                os.fsync(file.fileno())
            os.replace(file.name, self.folder / name)
        return self.folder / name

    def close(self, number=0):
        """The end of the run; a checkpoint first if there was a signal, which is the exit code."""
        if number:
            self.save_checkpoint()
        self.bar.close()
        if self.wandb:
            self.wandb.finish(exit_code=128 + number if number else 0)
        for caught, handler in self.handlers.items():
            signal.signal(caught, handler)
        say(f"written to {self.folder}")
        if number:
            start = "python" if self.ranks == 1 else f"torchrun --nproc_per_node={self.ranks}"
            say(f"to go on: {start} {sys.argv[0]} --resume '{self.folder}'")
            sys.exit(128 + number)


def evaluate(args, task, agent, run):
    """A table: the SFT policy, the best of n of its samples by the score, PPO; some texts."""
    rng, P = stream(args, "evaluation"), task.prompt_length
    score = score_function(args, task, agent, run)
    rows = task.rows("eval", args.eval_episodes, rng)
    prompts = write_texts(task, rows)
    size = 16 if task.gold else 1  # of a large model they would take longer than PPO
    pool = torch.stack([sample(args, task, agent.reference, prompts, rng)[0] for _ in range(size)])
    scores = torch.stack([score(rows, tokens) for tokens in pool]) if task.gold else None
    columns = {"SFT": (pool[0], 0.0)}
    for n in (4, 16) if task.gold else ():
        best = pool[scores[:n].argmax(0), torch.arange(len(prompts))]
        columns[f"best of {n}"] = (best, math.log(n) - (n - 1) / n)  # its exact KL
    tokens, _ = sample(args, task, agent.policy, prompts, rng)
    both, size = (agent.policy, agent.reference), args.micro_batch_size
    logprobs = spread(lambda x: [response_logprobs(y, x, P) for y in both], size, tokens)
    columns["PPO"] = (tokens, torch.sub(*logprobs).sum(1).mean().item())

    table, shown, before = {}, [[x] for x in read_texts(task, prompts[:4])], None
    step = args.num_iterations * args.batch_size
    for name, (tokens, kl) in columns.items():
        gold = gold_rewards(task, tokens, *run.numbers["gold_units"])
        proxy, responses = score(rows, tokens).cpu().numpy(), tokens[:, P:]
        wanted = gold.get("score", proxy)  # as far as one can know
        before = wanted if name == "SFT" else before
        table[name] = {"proxy": proxy.mean(), "kl": kl}
        table[name] |= {f"gold/{part}": value.mean() for part, value in gold.items()}
        table[name]["length"] = (responses != PAD).sum(1).float().mean().item()
        table[name]["missing_eos"] = 1 - task.ended(responses).float().mean().item()
        table[name]["wins_against_sft"] = np.heaviside(wanted - before, 0.5).mean()
        for i, text in enumerate(read_texts(task, responses[:4]) if " " not in name else ()):
            worth = f"proxy {proxy[i]:+.2f}" + (f"  gold {wanted[i]:+.2f}" if gold else "")
            shown[i].append(f"  {name}  {worth}  {text}")
            answer = {"global_step": step, "policy": name, "prompt": rows[i]["prompt"]}
            answer |= {"response": text, "score": float(proxy[i])}
            run.append(FILES[1], json.dumps(answer) + "\n")
    say(f"\n{f'{len(prompts)} prompts':18}", *(f"{name:>11}" for name in table))
    for row in table["SFT"]:
        say(f"{row:18}", *(f"{column[row]:11.3f}" for column in table.values()))
    say(*(f"{k} {v:.3f}" for k, v in run.numbers.items() if k.startswith("rm/")))
    say("\n" + "\n\n".join("\n".join(lines) for lines in shown))
    cells = [(name, row) for name in table for row in table[name]]
    results = {f"eval/{n.lower().replace(' ', '_')}/{r}": float(table[n][r]) for n, r in cells}
    run.log(step, results)


def merged_weights(model: nn.Module) -> dict:
    """All weights as they would be without adapters; the model stays as it is."""
    state, end = whole(model.state_dict()), ".lora_A.default.weight"
    for layer in [name.removesuffix(end) for name in state if name.endswith(end)]:
        adapted = model.get_submodule(layer)
        a, b = (state[f"{layer}.lora_{x}.default.weight"] for x in "AB")
        product = adapted.scaling["default"] * ((b @ a).T if adapted.fan_in_fan_out else b @ a)
        state[f"{layer}.base_layer.weight"] = state[f"{layer}.base_layer.weight"] + product
    return {k.replace(".base_layer", ""): x for k, x in state.items() if ".lora_" not in k}


def export(stage, args, task, agent, run):
    """What a stage has learned, as Hugging Face's from_pretrained takes it, and its tokenizer.

    With --lora-rank, of the policy only the adapter, but for --merge.
    """
    name, tokenizer, model = "policy", task.tokenizer, agent.policy.model
    adapter = args.lora_rank and not args.merge and stage != "rm"
    learned = agent.reward_model.model if stage == "rm" else model
    weights = own_weights(learned) if adapter else merged_weights(learned)
    head = whole(agent.reward_model.head.state_dict()) if stage == "rm" else None
    if run.rank > 0:
        return None
    if stage == "rm":
        name, tokenizer = "reward_model", copy.deepcopy(task.judge.tokenizer)
        if tokenizer.pad_token_id in (None, *task.judge.ends):  # else EOS would not be read [H8]
            tokenizer.add_special_tokens({"pad_token": "<|padding|>"})
        config, transformers = copy.deepcopy(learned.config), sys.modules["transformers"]
        if type(config) not in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
            return say(f"a {config.model_type} has no sequence classifier; reward_model.pt has all")
        config.num_labels, config.pad_token_id = 1, None
        config.reward_offset = head["bias"].item()  # its head has no bias
        model = transformers.AutoModelForSequenceClassification.from_config(config)
        model.base_model.load_state_dict(weights)
        model.score.weight.data.copy_(head["weight"])
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        model.config.pad_token_id = tokenizer.pad_token_id
        weights = model.state_dict()
    card = f"---\nlibrary_name: transformers\nbase_model: {args.model}\ntags: [ppo, rlhf]\n---\n"
    card += f"# {name} of {run.folder.name}\n\nMade by ppo_rlhf.py, stage {stage}.\n"
    parts = {"Settings": dataclasses.asdict(args), "Data, SHA-256": task.hashes}
    for title, values in (parts | {"Last metrics": run.last}).items():
        card += f"\n## {title}\n\n" + "".join(f"- {k}: {v}\n" for k, v in values.items())
    try:
        folder = run.folder / name
        if adapter:
            about = dict(task_type="CAUSAL_LM", base_model_name_or_path=args.model)
            lora_config(model.base_model, args.lora_rank, **about).save_pretrained(folder)
            names = {x: f"base_model.model.{x.replace('.default', '')}" for x in weights}
            weights = {names[x]: weights[x].contiguous() for x in weights}
            save = sys.modules["safetensors.torch"].save_file
            save(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        else:
            model.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(card)
    except Exception as error:  # a full disk has a name of its own there
        raise OSError(error) from error


class Memory(TorchDispatchMode):
    """Bytes of the tensors that are made under it: now, and the most there were at a time."""

    now, peak, known = 0, 0, frozenset()  # what is known are storages

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in args if isinstance(x, torch.Tensor)}
        for x in made if isinstance(made, (tuple, list)) else (made,):
            storage = x.untyped_storage() if isinstance(x, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.known | given:
                self.count(storage._cdata, storage.nbytes())
                weakref.finalize(storage, self.count, storage._cdata, -storage.nbytes())
        return made

    def count(self, key, size):
        self.known ^= {key}
        self.now += size
        self.peak = max(self.peak, self.now)


def plan(args: Args):
    """What memory PPO takes: its own code is run on tensors without data, nothing is downloaded."""
    R, m = args.response_length, min(args.micro_batch_size, args.minibatch_size)
    task, P = TASKS[args.task], args.prompt_length
    if args.model:
        words = pretrained("AutoConfig", args.model).get_text_config().vocab_size
        task = SimpleNamespace(num_tokens=words, prompt_length=P, longest=(P + R, BOTH))
        task.judge = task
    P, parts = task.prompt_length, rank_of()[1] if args.fsdp else 1

    def whole_mask(module, inputs, options):  # else transformers looks at the data
        S = (inputs[0] if inputs else options["input_ids"]).shape[1]
        return inputs, options | {"attention_mask": torch.ones(1, 1, S, S, dtype=torch.bool)}

    with torch.device("meta"):
        agent = Agent(task, args)
        for model in agent.children():
            frugal(model, dataclasses.replace(args, fsdp=False), torch.device("cpu"))
    with FakeTensorMode():  # of these, unlike those on `meta`, operations are as on a device
        fake = {None: None}
        for names in chain(*((x._parameters, x._buffers) for x in agent.modules())):
            for x in {*names.values()} - fake.keys():
                fake[x] = nn.Parameter(torch.empty(x.shape, dtype=x.dtype), x.requires_grad)
            names.update({name: fake[x] for name, x in names.items()})
        for model in agent.children() if args.model else ():
            trunk = model.decoder() if isinstance(model, Policy) else model.model
            trunk.register_forward_pre_hook(whole_mask, with_kwargs=True)
        tokens = torch.zeros(args.batch_size, P + R, dtype=torch.long)
        with Memory() as sampling, torch.no_grad():
            agent.policy(tokens, 1, use_cache=True)
        batch = [tokens[:m], *torch.zeros(5, m, R), torch.ones(m, R, dtype=torch.bool)]
        numbers = ((m * R, m), 0.2, 0.2, args.vf_coef, args.clip_vloss, args.kl_coef)
        with Memory() as update:
            for _ in range(2):  # the second adds to gradients that are there
                loss, _ = ppo_loss(agent, batch, *numbers)
                loss.backward()
    rows, seen, learning = {}, set(), 0
    for name, model in agent.named_children():
        new = set(model.parameters()) - seen
        seen |= new
        rows[f"weights, {name.replace('_', ' ')}"] = sum(x.nbytes for x in new) / parts
        learning += sum(x.nbytes for x in new if x.grad is not None) / parts
    rows |= {"gradients": learning, "moments of AdamW": 2 * learning}
    rows |= {"update": update.peak - learning * parts, "sampling": sampling.peak}
    total = sum(rows.values()) - min(rows["update"], rows["sampling"])
    for name, size in (rows | {"at most at a time": total}).items():
        say(f"{name:24}{size / 1e9:9.3f} GB")


def origin(device: torch.device) -> dict:
    """Where a run comes from: the machine, the versions, the commit, the script, the command."""
    git = f"git -C {shlex.quote(str(Path(__file__).parent))} describe --always --dirty --abbrev=40"
    status, commit = subprocess.getstatusoutput(f"{git} --exclude='*'")  # whatever the tags
    where = {"device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu"}
    where |= {"cpus": os.cpu_count(), "platform": platform.platform()}
    packages = [sys.modules[x] for x in ("torch", "numpy", "transformers") if x in sys.modules]
    versions = {package.__name__: package.__version__ for package in packages}
    where |= {"versions": {"ppo37": "0.1.0", "python": platform.python_version()} | versions}
    where |= {"git_commit": commit if status == 0 else None, "command": shlex.join(sys.argv)}
    return where | {"script_sha256": digest(__file__)}


if __name__ == "__main__":
    if dist.is_torchelastic_launched():  # torchrun
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        sys.stdout = open(os.devnull, "w") if dist.get_rank() > 0 else sys.stdout
        if (local := int(os.environ["LOCAL_RANK"])) < torch.cuda.device_count():
            torch.cuda.set_device(local)
    check_args(args := parse_args(sys.argv[1:]))
    try:
        (plan if args.plan else train)(args)
        if dist.is_initialized():
            os._exit(0)  # else threads of gloo sometimes abort what has ended well
    except RuntimeError as error:
        if not re.search("gloo|NCCL", str(error)):
            raise
        (Run.now.stop if Run.now else fail)("another rank has ended")
    except OSError as error:  # a disk is full, a folder has gone
        Run.now.stop(f"{Run.now.folder} cannot be written to: {error}") if Run.now else fail(error)
