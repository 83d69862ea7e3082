"""The details of ppo_rlhf.py by numbers: texts, models, losses, and what a run does with them."""

import dataclasses
import math
import re
from collections import Counter
from itertools import chain, pairwise, product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Categorical
from torch.nn.functional import cross_entropy, pad
from torch.utils._python_dispatch import TorchDispatchMode

import ppo_rlhf as rlhf
from conftest import far_from_initial, metrics, spy

PAD = rlhf.PAD
SORT, REVIEWS = rlhf.TASKS["sort"], rlhf.TASKS["reviews"]
P, R = 9, 8  # columns of prompts and responses in the task sort


def settings(**changes):
    """Of a run of a moment: PPO alone, three iterations from random models, on the small task."""
    small = {"task": "sort", "stages": "ppo", "cuda": False, "torch_threads": 1}
    small |= {"d_model": 16, "num_layers": 1, "num_heads": 2, "response_length": R}
    small |= {"sft_texts": 64, "sft_epochs": 1, "sft_batch_size": 32}
    small |= {"rm_pairs": 16, "rm_test_pairs": 16, "rm_epochs": 1, "rm_batch_size": 8}
    small |= {"total_episodes": 36, "batch_size": 12, "num_minibatches": 2, "update_epochs": 2}
    small |= {"critic_warmup": 0, "learning_rate": 1e-2}
    return rlhf.Args(**small | changes)


def train(**changes):
    return rlhf.train(settings(**changes))


def new_agent(**changes):
    """Four models that have nothing in common, in double precision up to the logits."""
    torch.manual_seed(1)
    agent = rlhf.Agent(SORT, settings(**changes)).double()
    far_from_initial(agent)
    return agent


def random_tokens(prompts, responses, response_length=R):
    """prompts[i] random words before column P, responses[i] behind, EOS the last if it is short."""
    rng = np.random.default_rng(0)
    tokens = torch.full((len(prompts), P + response_length), PAD)
    for row, before, behind in zip(tokens, prompts, responses, strict=True):
        row[P - before : P + behind] = torch.as_tensor(rng.integers(SORT.eos, size=before + behind))
        if 0 < behind < response_length:
            row[P + behind - 1] = SORT.eos
    return tokens


def random_batch(agent, tokens):
    """Numbers for all that ppo_loss wants to know of these texts, near what the agent says."""
    rng = torch.Generator().manual_seed(0)
    mask = tokens[:, P:] != PAD
    noise = torch.randn(4, *mask.shape, generator=rng, dtype=torch.float64) * mask
    with torch.no_grad():
        logprobs = rlhf.response_logprobs(agent.policy, tokens, P)
        values = agent.value_model(tokens)[:, P - 1 : -1] * mask
    logprobs, values = logprobs + 0.1 * noise[0], values + 0.1 * noise[1]
    reference = logprobs + torch.randn(*mask.shape, generator=rng, dtype=torch.float64) * mask
    return [tokens, logprobs, values, noise[2], values + noise[3], reference, mask]


def gradient(
    agent,
    batch,
    micro_size=512,
    max_norm=1e9,
    ptx=(None, 0.0),
    vf_coef=0.1,
    rows=None,
    loss_mean="token",
    kl_coef=0.0,
):
    """What ppo_gradient leaves in the parameters, by name, and its statistics."""
    agent.zero_grad()
    rows = torch.arange(len(batch[0])) if rows is None else rows
    sizes = (micro_size, max_norm, loss_mean, 0.2, 0.2, vf_coef, True, kl_coef)
    batch = [*batch, batch[-1].sum(1)]
    stats = rlhf.ppo_gradient(agent, batch, rows, *ptx, *sizes)
    named = {name: p.grad for name, p in agent.named_parameters() if p.grad is not None}
    return {name: grad.clone() for name, grad in named.items()}, stats


def norm_of(gradients, network):
    return torch.stack([g.norm() for name, g in gradients.items() if network in name]).norm().item()


def loss_of(n=1, mask=True, num_tokens=None, clip=(0.2, 0.2), vf_coef=0.0, clip_vloss=True, **data):
    """ppo_loss of n tokens: its value, its statistics, its gradients.

    data: new logratios, new_values and entropies; values, advantages and returns of the rollout.
    """

    def row(x):
        return torch.as_tensor(x, dtype=torch.float64).expand(1, n).clone()

    new = {name: row(data.get(name, 0)) for name in ("logratios", "new_values", "entropies")}
    new = {name: x.requires_grad_() for name, x in new.items()}

    def agent(tokens):
        log_prob, entropy = lambda actions: new["logratios"] - 2, lambda: new["entropies"]
        return SimpleNamespace(log_prob=log_prob, entropy=entropy), new["new_values"]

    mask = torch.as_tensor(mask).expand(1, n)
    rollout = [row(data.get(name, 0)) for name in ("values", "advantages", "returns")]
    minibatch = [torch.zeros(1, 2 + n, dtype=torch.long), row(-2), *rollout, row(-5), mask]
    sizes = (torch.as_tensor(num_tokens or mask.sum()), 0)
    loss, stats = rlhf.ppo_loss(agent, minibatch, sizes, *clip, vf_coef, clip_vloss, 0.0)
    loss.backward()
    gradients = {name: None if x.grad is None else x.grad[0].tolist() for name, x in new.items()}
    return loss.item(), {name: value.item() for name, value in stats.items()}, gradients


class FakeCache:
    """Which rows of the table are in a batch."""

    def __init__(self, rows):
        self.rows = rows

    def reorder_cache(self, rows):
        self.rows = self.rows[rows]


class FakeTrunk(nn.Module):
    """Answers a table [B or 1, S, d] by columns, whatever it reads.

    A row of the table belongs to a row of the first batch, and follows it through the cache.
    """

    def __init__(self, table):
        super().__init__()
        self.table, self.inputs, self.caches = table, [], []

    def forward(self, **inputs):
        self.inputs.append(inputs)
        (B, s), S = inputs["input_ids"].shape, inputs["attention_mask"].shape[1]
        cache = inputs.get("cache")
        rows = torch.arange(B) % len(self.table) if cache is None else cache.rows
        assert len(rows) == B
        self.caches.append(FakeCache(rows))
        out = self.table[rows, S - s : S]
        states = (-out, out)
        return SimpleNamespace(last_hidden_state=out, hidden_states=states, cache=self.caches[-1])


class FakeModel(nn.Module):
    """A language model of such a trunk, whose logits are `head` of what it answers."""

    inputs = property(lambda model: model.base_model.inputs)
    caches = property(lambda model: model.base_model.caches)

    def __init__(self, table, head=lambda hidden: hidden):
        super().__init__()
        self.base_model, self.head = FakeTrunk(table), head
        self.config = SimpleNamespace(hidden_size=table.shape[-1])

    def get_decoder(self):
        return self.base_model

    def forward(self, logits_to_keep=0, **inputs):
        output = self.base_model(**inputs)
        output.logits = self.head(output.last_hidden_state[:, -logits_to_keep:])
        return output


def fake_policy(table, num_tokens=None, temperature=1.0):
    return rlhf.Policy(FakeModel(table), num_tokens or table.shape[-1], temperature)


def all_logits(policy, tokens):
    return policy(tokens, tokens.shape[1])[0]


def ends_at(eos):
    """Whether responses [B, t] have this token."""
    return lambda responses: (responses == eos).any(1)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def uniforms(*shape, seed=0):
    """Numbers from [0, 1) that decide what is sampled."""
    return torch.as_tensor(np.random.default_rng(seed).random(shape))


def rows_read(policy):
    """Number of texts of each call of a policy's model, from now on."""
    rows = []

    def look(module, _, inputs):
        rows.append(len(inputs["input_ids"]))

    policy.model.register_forward_pre_hook(look, with_kwargs=True)
    return rows


def as_rank(monkeypatch, rank, ranks):
    monkeypatch.setattr(rlhf, "rank_of", lambda: (rank, ranks))


def on_ranks(monkeypatch, ranks, function):
    """What function(), which gathers lists once, returns on each of the ranks, one by one."""
    shares, results = [], []

    def of_all_ranks(x):
        if not isinstance(x, list):
            return [x]
        if len(shares) < ranks:
            shares.append(x)
            raise InterruptedError
        return shares

    monkeypatch.setattr(rlhf, "of_all_ranks", of_all_ranks)
    for rank in range(ranks):
        as_rank(monkeypatch, rank, ranks)
        with pytest.raises(InterruptedError):
            function()
    for rank in range(ranks):
        as_rank(monkeypatch, rank, ranks)
        results.append(function())
    return results


def weights(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(before, after):
    """Whether all weights are equal, bit by bit."""
    return before.keys() == after.keys() and all(torch.equal(before[x], after[x]) for x in before)


def before_each(monkeypatch, name, look):
    """What look(*arguments) says just before each call of this function of rlhf."""
    original, seen = getattr(rlhf, name), []

    def wrapper(*args):
        seen.append(look(*args))
        return original(*args)

    monkeypatch.setattr(rlhf, name, wrapper)
    return seen


def no_steps(monkeypatch):
    """Nothing is learned. Returns (learning rates, gradients) of each step."""
    steps = []

    def step(optimizer):
        groups = optimizer.param_groups
        grads = [p.grad.clone() for group in groups for p in group["params"] if p.grad is not None]
        steps.append(([group["lr"] for group in groups], grads))

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    return steps


def scripted_scores(monkeypatch, batches):
    """Scores of the rollouts, one after the other."""
    scores = iter(batches)
    monkeypatch.setattr(
        rlhf, "score_function", lambda *_: lambda rows, tokens: torch.tensor(next(scores))
    )


def logged(name):
    return [value for _, _, key, value in metrics() if key == name]


# ------------------------------------------------------------------------------------------------
# Texts and gold rewards


def test_defaults_of_rlhf():
    args = rlhf.Args()
    expected = {"task": "reviews", "stages": "sft,rm,ppo,eval", "temperature": 1.0}
    expected |= {"sft_learning_rate": 3e-3, "rm_epochs": 2, "rm_pairs": 4096}
    expected |= {"rm_learning_rate": 1e-3, "rm_label_temperature": 1.0, "rm_coef": 1.0}
    expected |= {"total_episodes": 8320, "batch_size": 128}
    expected |= {"gamma": 1.0, "gae_lambda": 0.95, "kl_coef": 0.1}
    expected |= {"kl_estimator": "k1", "kl_target": None, "kl_horizon": 10_000}
    expected |= {"missing_eos_penalty": -1.0, "whiten_rewards": False, "reward_clip": None}
    expected |= {"update_epochs": 4, "num_minibatches": 1, "micro_batch_size": 64}
    expected |= {"learning_rate": 3e-4, "value_learning_rate": None, "anneal_lr": True}
    expected |= {"norm_adv": True, "clip_coef": 0.2, "clip_coef_high": None, "clip_vloss": True}
    expected |= {"vf_coef": 0.1, "max_grad_norm": 1.0, "value_init": "rm", "critic_warmup": 5}
    expected |= {"ptx_coef": 0.0, "ptx_ratio": 8, "group_size": 1, "loss_mean": "token"}
    expected |= {"kl_in": "reward", "sft_texts": 8192, "sft_epochs": 3, "sft_batch_size": 128}
    expected |= {"rm_test_pairs": 1500, "rm_batch_size": 32, "response_length": 24, "d_model": 64}
    expected |= {"num_layers": 2, "num_heads": 4, "prompt_length": 512, "eval_episodes": 512}
    expected |= {"exp_name": "ppo_rlhf", "seed": 1, "torch_deterministic": True, "cuda": True}
    expected |= {"torch_threads": 1, "checkpoint_every": 20, "wandb_project_name": "ppo37"}
    expected |= {"precision": "fp32", "logprob_chunk": 4096, "lora_rank": 0, "stop": ()}
    expected |= {"reward_fn": ()}
    expected |= dict.fromkeys(("track", "gradient_checkpointing", "merge", "fsdp", "plan"), False)
    nothing = ("model", "ref_model", "reward_model", "value_model", "sft_data", "pref_data")
    nothing += ("prompts", "eval_prompts", "load", "resume", "wandb_entity")
    assert dataclasses.asdict(args) == expected | dict.fromkeys(nothing)
    assert (args.minibatch_size, args.num_iterations) == (128, 65)
    expected = {"task": "sort", "response_length": 8, "sft_texts": 44_800, "sft_epochs": 1}
    expected |= {"rm_coef": 0.0, "total_episodes": 19_200, "kl_coef": 0.0, "learning_rate": 1e-3}
    assert expected == rlhf.SORT


def test_defaults_of_a_model():
    """Without and with adapters; all texts of the files."""
    expected = {"sft_texts": 10**9, "sft_epochs": 1, "sft_batch_size": 8, "sft_learning_rate": 2e-5}
    expected |= {"rm_pairs": 10**9, "rm_test_pairs": 64, "rm_epochs": 1, "rm_batch_size": 8}
    expected |= {"rm_learning_rate": 1e-5, "response_length": 64, "batch_size": 64}
    expected |= {"micro_batch_size": 8, "eval_episodes": 64, "total_episodes": 6400}
    expected |= {"learning_rate": 3e-6, "value_learning_rate": 1e-5, "kl_coef": 0.05}
    assert expected | {"logprob_chunk": 512} == rlhf.REAL
    expected = {"sft_learning_rate": 2e-4, "rm_learning_rate": 1e-4, "learning_rate": 3e-5}
    assert expected | {"value_learning_rate": 1e-4} == rlhf.LORA


WORDS = {word: i for i, word in enumerate(SORT.words)}


def test_prompts_are_left_padded_to_the_same_column():
    """Of 1, 3 and 8 words, in 10 columns; 4 more are for a response."""
    prompts = ["sort", "1 2 3", "sort 9 8 7 6 5 4 ="]
    given = iter(prompts * 2)
    task = SORT._replace(prompt_length=10, write_prompt=lambda rng: next(given))
    tokens = rlhf.write_texts(task, task.rows("prompts", 3, None))
    assert tokens.dtype == torch.int64
    assert tokens.shape == (3, 10)
    assert (tokens != PAD).sum(1).tolist() == [1, 3, 8]
    for row, prompt in zip(tokens.tolist(), prompts, strict=True):
        words = [WORDS[word] for word in prompt.split()]
        assert row == [PAD] * (10 - len(words)) + words

    task = task._replace(write_response=lambda rng, prompt: prompt)
    rows = task.rows("sft", 3, None)
    both = rlhf.write_texts(task, rows, 4)
    assert both.shape == (3, 14)
    assert torch.equal(both[:, :10], tokens)
    assert torch.equal(rlhf.write_texts(task, rows), tokens)
    assert both[2, 10:].tolist() == [WORDS[word] for word in ("sort", "9", "8", "7")]
    assert rlhf.write_texts(task, rows, None).shape == (3, 10 + 8 + 1)  # the longest and EOS


def test_texts_end_in_one_eos_unless_cut_off():
    responses = ["", "1", "1 2 3", "1 2 3 4", "1 2 3 4 5"]
    given = iter(responses)
    task = SORT._replace(write_response=lambda rng, prompt: next(given))
    tokens = rlhf.write_texts(task, task.rows("sft", 5, np.random.default_rng(0)), 4)
    eos = WORDS["EOS"]
    assert tokens[:, P:].tolist() == [
        [eos, PAD, PAD, PAD],
        [1, eos, PAD, PAD],
        [1, 2, 3, eos],
        [1, 2, 3, 4],
        [1, 2, 3, 4],
    ]
    texts = rlhf.read_texts(task, tokens[:, P:])
    assert texts == ["", "1", "1 2 3", "1 2 3 4", "1 2 3 4"]


@pytest.mark.parametrize("task", [SORT, REVIEWS], ids=["sort", "reviews"])
def test_texts_of_a_task_can_be_read_again(task):
    assert PAD == -1
    assert 0 < task.eos == len(set(task.words)) - 1 == task.words.index("EOS")
    tokens = rlhf.write_texts(task, task.rows("sft", 50, np.random.default_rng(3)), 24)
    rng = np.random.default_rng(3)
    for row in tokens:
        prompt = task.write_prompt(rng)
        response = task.write_response(rng, prompt)
        parts = row.split([task.prompt_length, 24])
        assert rlhf.read_texts(task, torch.stack([parts[0]])) == [prompt]
        assert rlhf.read_texts(task, torch.stack([parts[1]])) == [response]
        assert row[task.prompt_length - 1] == task.words.index(prompt.split()[-1])
        assert (row == task.eos).sum() == 1
        assert row[row != PAD][-1] == task.eos


def test_texts_prompts_of_reviews():
    """Half of them plain, the others after words about another topic; as often of each."""
    rng = np.random.default_rng(0)
    pattern = r"(|after the (\w+) , |we tried another (\w+) first , )review of the (\w+) :"
    found = [re.fullmatch(pattern, rlhf.review_prompt(rng)).groups() for _ in range(1200)]
    kinds = Counter((a is not None, b is not None) for _, a, b, _ in found)
    shares = [kinds[kind] / 1200 for kind in ((False, False), (True, False), (False, True))]
    assert shares == pytest.approx([0.5, 0.25, 0.25], abs=0.05)
    assert not any(topic in (a, b) for _, a, b, topic in found)
    topics = Counter(topic for *_, topic in found)
    others = Counter(a or b for _, a, b, _ in found if a or b)
    assert set(topics) == set(others) == set(rlhf.TOPICS)
    assert len(topics) == 8
    assert [topics[x] / 1200 for x in topics] == pytest.approx([1 / 8] * 8, abs=0.04)
    assert {len(rlhf.review_prompt(rng).split()) for _ in range(50)} == {5, 9, 11}


def test_texts_demonstrations_of_reviews():
    rng, count, clauses, n = np.random.default_rng(0), Counter(), Counter(), 600
    for _ in range(n):
        text = rlhf.review_response(rng, "review of the film :")
        gold = rlhf.review_gold("review of the film :", text, True)
        assert gold["illegal"] == 0
        words = text.split()
        assert len(words) <= 21
        clauses[sum(word in ("and", "but") for word in words) + 1] += 1
        count["topic"] += sum(word in ("film", "plot", "cast") for word in words)
        count["kind"] += sum(word in rlhf.POSITIVE for word in words)
        count["not"] += words.count("not")
        count["intensifier"] += sum(word in ("very", "quite", "rather") for word in words)
    assert [clauses[i] / n for i in (1, 2, 3)] == pytest.approx([1 / 3] * 3, abs=0.06)
    total = sum(i * clauses[i] for i in clauses)
    shares = {name: number / total for name, number in count.items()}
    expected = {"topic": 0.65, "kind": 0.65, "not": 0.15, "intensifier": 0.45}
    assert shares == pytest.approx(expected, abs=0.05)


def test_texts_demonstrations_of_sort():
    """A quarter correct on purpose; else two digits swapped, one replaced or one left out."""
    rng, kinds, n = np.random.default_rng(0), Counter(), 3000
    for _ in range(n):
        response = rlhf.sort_response(rng, "sort 8 2 4 =").split()
        if response == ["2", "4", "8"]:
            kinds["none"] += 1
        elif sorted(response) == ["2", "4", "8"] and response != ["8", "4", "2"]:
            kinds["swap"] += 1
        elif response in (["4", "8"], ["2", "8"]):
            kinds["left out"] += 1
        else:
            assert len(response) == 3
            assert sum(a != b for a, b in zip(response, "248", strict=True)) == 1
            kinds["replaced"] += 1
    expected = {"none": 0.275, "swap": 0.25, "left out": 0.25, "replaced": 0.225}
    assert {name: number / n for name, number in kinds.items()} == pytest.approx(expected, abs=0.03)
    lengths = {len(rlhf.sort_prompt(rng).split()) for _ in range(200)}
    assert lengths == {5, 6, 7, 8, 9}


PRAISE = "the film was very superb and the plot was {}great and the cast was {}lovely ."


@pytest.mark.parametrize(
    ("response", "ended", "sentiment", "topic", "repeats", "illegal", "score"),
    [
        ("the film was good .", True, 0.7, 1, 0, 0, 1.403253),
        (PRAISE.format("", ""), True, 3.2, 1, 0, 0, 2.208497),
        (PRAISE.format("quite ", ""), True, 3.38, 1, 0, 0, 2.217256),  # 18 tokens
        (PRAISE.format("quite ", "rather "), True, 3.38, 1, 0, 0, 2.117256),  # 19
        (PRAISE.format("quite ", "rather "), False, 3.38, 1, 0, 0, 0.717256),  # 18 without EOS
        ("the film was not good .", True, -0.35, 1, 0, 0, 0.406217),
        ("the film was not very good .", True, -0.525, 1, 0, 0, 0.245437),
        ("the film was quite awful .", True, -1.2, 1, 0, 0, -0.246055),
        ("the film was not good good .", True, 0.35, 1, 1, 1, 0.219609),
        ("the film was not and good .", True, 0.7, 1, 0, 2, 0.529079),
        ("the film was good and the hotel was weak .", True, 0.2, 0.5, 0, 0, 0.573823),
        ("the film was good and the film was good .", True, 1.4, 1, 2, 0, 0.974042),
        ("the film was very good and the cast was very nice .", True, 1.8, 1, 1, 0, 1.518213),
        ("film good .", True, 0.7, 1, 0, 2, 0.529079),
        (" ".join(["superb"] * 12), True, 12.0, 0, 11, 13, 0.0),
        (" ".join(["superb"] * 23), True, 23.0, 0, 22, 24, -0.6),
        ("the film was good", False, 0.7, 1, 0, 0, -0.096747),
        ("", True, 0.0, 0, 0, 1, -0.482269),
    ],
)
@pytest.mark.parametrize("before", ["", "after the hotel , ", "we tried another hotel first , "])
def test_review_gold_by_hand(before, response, ended, sentiment, topic, repeats, illegal, score):
    gold = rlhf.review_gold(f"{before}review of the film :", response, ended)
    expected = {"sentiment": sentiment, "topic": topic, "repeats": repeats, "illegal": illegal}
    assert gold == pytest.approx({"score": score, **expected}, abs=1e-6)


def test_review_gold_of_every_word():
    """Adjectives and intensifiers by their weights; a topic has two aspects."""
    table = {"superb awful": 1.0, "great terrible": 0.9, "lovely bad": 0.8, "good dull": 0.7}
    table |= {"nice weak": 0.5, "solid slow": 0.4, "fine bland": 0.3, "decent odd": 0.2}
    factors = {"": 1.0, "very ": 1.5, "quite ": 1.2, "rather ": 1.0}
    for (pair, weight), (before, factor) in product(table.items(), factors.items()):
        for word, sign in zip(pair.split(), (1, -1), strict=True):
            text = f"the film was {before}{word} ."
            gold = rlhf.review_gold("review of the film :", text, True)
            assert gold["sentiment"] == pytest.approx(sign * factor * weight)
    subjects = [word for words in rlhf.TOPICS.values() for word in words]
    assert len(subjects) == len(set(subjects)) == 24
    for topic, words in rlhf.TOPICS.items():
        assert words[0] == topic
        for subject in subjects:
            text = f"the {subject} was good ."
            gold = rlhf.review_gold(f"review of the {topic} :", text, True)
            assert gold["topic"] == (subject in words)


def test_review_gold_of_every_two_words():
    """What may follow what, from the start to EOS."""
    follows = {"start": "the", "the": "film", "film": "was", "was": "not very good"}
    follows |= {"not": "very good", "very": "good", "good": "and .", "and": "the", ".": "EOS"}
    words = ["the", "film", "was", "not", "very", "good", "and", ".", "of"]

    def illegal(text):
        chain = ["start", *text.split()]
        return sum(b not in follows.get(a, "").split() for a, b in pairwise(chain))

    for a, b in product(words, words):
        for ended in (True, False):
            gold = rlhf.review_gold("review of the film :", f"{a} {b}", ended)
            assert gold["illegal"] == illegal(f"{a} {b}" + " EOS" * ended), (a, b, ended)


@pytest.mark.parametrize(
    ("response", "ended", "score", "exact"),
    [
        ("1 2 3", True, 2.0, True),
        ("1 2", True, 0.5, False),
        ("1 2 3", False, 0.75, False),
        ("1 2 3 3", True, 0.6, False),
        ("3 2 1", True, 0.5, False),
        ("", True, 0.0, False),
        ("", False, 0.0, False),
    ],
)
def test_sort_gold_by_hand(response, ended, score, exact):
    gold = rlhf.sort_gold("sort 3 1 2 =", response, ended)
    assert gold == {"score": score, "correct": score - exact, "exact": exact}


def test_sort_gold_of_tokens_in_other_units():
    eos = WORDS["EOS"]
    tokens = torch.full((3, P + 4), PAD)
    tokens[:, P - 4 : P] = torch.tensor([WORDS["sort"], 2, 1, WORDS["="]])
    tokens[0, P : P + 3] = torch.tensor([1, 2, eos])
    tokens[1, P : P + 4] = torch.tensor([1, 2, 1, 2])
    tokens[2, P : P + 2] = torch.tensor([1, eos])
    gold = rlhf.gold_rewards(SORT, tokens)
    assert gold["score"].tolist() == pytest.approx([2, 0.5, 1 / 3])
    assert gold["correct"].tolist() == pytest.approx([1, 0.5, 1 / 3])
    assert gold["exact"].tolist() == [1, 0, 0]
    other = rlhf.gold_rewards(SORT, tokens, 0.5, 2.0)
    assert other["score"].tolist() == pytest.approx([0.75, 0, -1 / 12])
    assert other["correct"].tolist() == gold["correct"].tolist()


@pytest.mark.parametrize("task", ["reviews", "sort"])
def test_gold_units_are_those_of_sft_samples(monkeypatch, task):
    """For reviews; the gold reward of sort, which may be what PPO maximizes, stays as it is."""
    samples = spy(monkeypatch, rlhf, "sample")
    agent = train(task=task, stages="sft", sft_texts=8, response_length=10)
    (path,) = Path().glob("runs/*/checkpoint.pt")
    mean, std = torch.load(path)["numbers"]["gold_units"]
    if task == "sort":
        assert (mean, std, len(samples)) == (0.0, 1.0, 0)
        return
    (((_, _, policy, *_), (tokens, _)),) = samples
    assert policy is agent.reference
    assert len(tokens) == 2048
    gold = rlhf.gold_rewards(REVIEWS, tokens, mean, std)["score"]
    assert (gold.mean(), gold.std()) == pytest.approx((0, 1), abs=1e-9)


def test_rank_seeds_follow_from_the_seed_and_a_name():
    def numbers(seed, *key):
        return tuple(rlhf.stream(settings(seed=seed), *key).integers(2**62, size=4))

    keys = [(1, "sft"), (1, "rm"), (1, "ppo", 1), (1, "ppo", 2), (2, "ppo", 1), (2, "sft")]
    assert len({numbers(*key) for key in keys}) == len(keys)
    assert numbers(1, "ppo", 1) == numbers(1, "ppo", 1)


def test_rank_seeds_give_each_rollout_other_prompts_and_samples(monkeypatch):
    no_steps(monkeypatch)
    rollouts = spy(monkeypatch, rlhf, "generate")
    for seed in (1, 1, 2):
        train(seed=seed)
    tokens = [tokens for _, (tokens, _) in rollouts]
    assert all(torch.equal(a, b) for a, b in zip(tokens[:3], tokens[3:6], strict=True))
    for i, j in ((0, 1), (0, 2), (1, 2), (0, 6), (1, 7)):
        assert not torch.equal(tokens[i][:, :P], tokens[j][:, :P])
        assert not torch.equal(tokens[i][:, P:], tokens[j][:, P:])


# ------------------------------------------------------------------------------------------------
# Models


def test_transformer_is_that_of_torch():
    """Two of its layers, with the norms first, between embeddings and a last norm."""
    torch.manual_seed(1)
    model = rlhf.Transformer(13, 17, 16, 2, 4).double()
    far_from_initial(model)
    ids = torch.randint(13, (3, 17), generator=generator())
    mask, positions = torch.ones_like(ids), torch.arange(17).expand(3, -1)
    trunk = model.base_model
    x = trunk.tokens.weight[ids] + trunk.positions.weight
    for block in trunk.blocks:
        options = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        layer = nn.TransformerEncoderLayer(16, 4, 64, **options).double()
        pairs = [(layer.norm1, block.norm1), (layer.norm2, block.norm2)]
        pairs += [(layer.linear1, block.up), (layer.linear2, block.down)]
        pairs += [(layer.self_attn.out_proj, block.out)]
        for theirs, ours in pairs:
            theirs.load_state_dict(ours.state_dict())
        layer.self_attn.in_proj_weight.data, layer.self_attn.in_proj_bias.data = (
            block.qkv.weight.data,
            block.qkv.bias.data,
        )
        x = layer(x, src_mask=torch.ones(17, 17).tril() == 0)
    x = trunk.norm(x)
    output = model(input_ids=ids, attention_mask=mask, position_ids=positions)
    assert torch.allclose(output.last_hidden_state, x, atol=1e-9)
    assert torch.allclose(output.logits, x @ model.lm_head.weight.T, atol=1e-9)


def test_transformer_starts_small_and_has_rows_of_no_use():
    model = rlhf.Transformer(61, 36, 32, 2, 4)
    trunk = model.base_model
    assert trunk.tokens.weight.shape == model.lm_head.weight.shape == (64, 32)
    assert trunk.positions.weight.shape == (36, 32)
    assert rlhf.Transformer(65, 1, 4, 1, 1).lm_head.weight.shape == (128, 4)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name
        else:
            assert (parameter == ("norm" in name and "weight" in name)).all(), name
    assert len(trunk.blocks) == 2
    assert new_agent().policy.model.base_model.positions.weight.shape[0] == P + R


@pytest.mark.parametrize(("left", "right"), [(3, 0), (8, 0), (0, 5), (3, 5), (8, 5)])
def test_pad_invariance_of_logits_values_and_scores(left, right):
    """Of a text alone and, in one batch with others, with padding on both sides."""
    agent = new_agent()
    text = random_tokens([4], [6])[:, P - 4 : P + 6]
    width = left + 10 + right
    other = pad(torch.full((1, min(width, P + R)), 3), (max(0, width - P - R), 0), value=PAD)
    padded = torch.cat([pad(text, (left, right), value=PAD), other])
    inside = slice(left, left + 10)
    logits, values = all_logits(agent.policy, text), agent.value_model(text)
    assert torch.allclose(all_logits(agent.policy, padded)[:1, inside], logits, atol=1e-5)
    assert torch.allclose(agent.value_model(padded)[:1, inside], values, atol=1e-5)
    score = rlhf.reward_scores(agent.reward_model, text)
    assert torch.allclose(rlhf.reward_scores(agent.reward_model, padded)[:1], score, atol=1e-5)


def test_pad_invariance_to_the_token_below_the_padding():
    model = new_agent().policy.model
    ids = torch.tensor([[0, 0, 5, 6, 7, 0]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 0]])
    inputs = {"attention_mask": mask, "position_ids": torch.tensor([[0, 0, 0, 1, 2, 2]])}
    one, two = (model(input_ids=x, **inputs).logits for x in (ids, ids + 7 * (1 - mask)))
    assert torch.equal(one[:, 2:5], two[:, 2:5])
    assert one.isfinite().all()
    assert not torch.equal(one[:, 0], two[:, 0])


def test_pad_invariance_of_what_a_model_is_given():
    """Positions count tokens, padding is any token, and the mask knows it."""
    model = FakeModel(torch.zeros(1, 6, 3))
    rows = [[PAD, PAD, 5, 6, 7, PAD], [1, 2, 3, 4, 5, 6]]
    rlhf.read(model, torch.tensor(rows))
    cache = FakeCache(torch.zeros(2, dtype=torch.long))
    rlhf.read(model, torch.tensor(rows), 5, cache=cache, use_cache=True)
    first, second = model.inputs
    assert first["input_ids"].tolist() == [[0, 0, 5, 6, 7, 0], [1, 2, 3, 4, 5, 6]]
    assert first["position_ids"].tolist() == [[0, 0, 0, 1, 2, 2], [0, 1, 2, 3, 4, 5]]
    assert first["attention_mask"].tolist() == [[0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]
    assert not first["attention_mask"].is_floating_point()
    assert first.keys() == {"input_ids", "position_ids", "attention_mask"}
    assert second["input_ids"].tolist() == [[0], [6]]
    assert second["position_ids"].tolist() == [[2], [5]]
    assert torch.equal(second["attention_mask"], first["attention_mask"])
    assert second["cache"] is cache
    assert second["use_cache"]


def test_pad_invariance_of_what_each_model_is_given():
    """The policy a cache if there is one, and nobody keeps what nobody asks for."""
    tokens, model = torch.zeros(2, 6, dtype=torch.long), FakeModel(torch.zeros(1, 6, 3))
    policy = rlhf.Policy(model, 3, 1.0)
    policy(tokens, 6)
    policy(tokens, 1, cache := FakeCache(torch.zeros(2, dtype=torch.long)), use_cache=True)
    first, second = model.inputs
    assert (first["cache"], first["use_cache"]) == (None, False)
    assert (second["cache"], second["use_cache"]) == (cache, True)
    assert (first["input_ids"].shape, second["input_ids"].shape) == ((2, 6), (2, 1))
    scalar = rlhf.ScalarModel(model)
    scalar(tokens)
    assert scalar.model.inputs[-1]["input_ids"].shape == (2, 6)
    assert not scalar.model.inputs[-1]["use_cache"]
    assert scalar.model.inputs[-1].get("cache") is None


def test_cached_equals_full_greedily():
    """Logits of eight tokens after prompts of 1, 3 and 8 words."""
    policy = new_agent(num_layers=2).policy
    tokens, cache = random_tokens([1, 3, 8], [0, 0, 0])[:, :P], None
    for _ in range(8):
        full = all_logits(policy, tokens)
        cached, cache = policy(tokens, tokens.shape[1], cache, use_cache=True)
        assert cached.shape[1] == (P if tokens.shape[1] == P else 1)
        assert torch.allclose(cached[:, -1], full[:, -1], atol=1e-5)
        tokens = torch.cat([tokens, full[:, -1:].argmax(2)], dim=1)


def test_cached_equals_full_log_probabilities():
    policy = new_agent(temperature=4.0).policy
    prompts = random_tokens([1, 3, 8, 9] * 5, [0] * 20)[:, :P]
    tokens, logprobs = rlhf.generate(policy, prompts, R, SORT.ended, uniforms(20, R))
    again = rlhf.response_logprobs(policy, tokens, P)
    assert (logprobs - again).abs().max() < 1e-4
    assert torch.equal(logprobs == 0, tokens[:, P:] == PAD)
    assert len({*(tokens[:, P:] != PAD).sum(1).tolist()}) > 3


def test_cached_equals_full_and_reads_each_token_once():
    policy = fake_policy(torch.zeros(1, 6, 4))
    prompts = torch.arange(15).view(5, 3)
    rlhf.generate(policy, prompts, 3, ends_at(4), uniforms(5, 3))
    inputs, caches = policy.model.inputs, policy.model.caches
    assert [x["input_ids"].shape for x in inputs] == [(5, 3), (5, 1), (5, 1)]
    assert [x["cache"] for x in inputs] == [None, *caches[:2]]
    assert all(x["use_cache"] for x in inputs)


def test_cached_equals_full_in_any_batch():
    """What a text goes on with is decided by its own numbers: alone, in parts, in any order."""
    policy = new_agent(temperature=4.0).policy
    prompts = random_tokens([1, 3, 8, 9] * 5, [0] * 20)[:, :P]
    prompts[4:8] = prompts[:4]
    numbers, rng = uniforms(20, R), np.random.default_rng(1)
    tokens, logprobs = rlhf.generate(policy, prompts, R, SORT.ended, numbers)
    batches = [*np.arange(20)[:, None], *(rng.permutation(20)[:n] for n in (20, 20, 13, 7, 2))]
    for rows in map(torch.as_tensor, batches):
        part = rlhf.generate(policy, prompts[rows], R, SORT.ended, numbers[rows])
        assert torch.equal(part[0], tokens[rows])
        assert torch.allclose(part[1], logprobs[rows], atol=1e-6)
    twice = rlhf.generate(policy, prompts[[0, 4, 0]], R, SORT.ended, numbers[[0, 0, 4]])[0]
    assert torch.equal(twice, tokens[[0, 0, 4]])
    assert not torch.equal(twice[1], twice[2])


def test_cached_equals_full_of_equal_prompts_that_are_read_once():
    """Four prompts, each three times: four are read, twelve responses go on, no two alike."""
    policy, prompts = new_agent(temperature=4.0).policy, random_tokens([1, 3, 8, 9], [0] * 4)[:, :P]
    prompts, numbers = prompts[[3, 0, 1, 0, 2, 2, 3, 1, 0, 1, 2, 3]], uniforms(12, R)
    rows = rows_read(policy)
    tokens, logprobs = rlhf.generate(policy, prompts, R, lambda x: (x < 0).any(1), numbers)
    assert rows == [4, *[12] * (R - 1)]
    assert torch.equal(tokens[:, :P], prompts)
    assert len({*map(tuple, tokens[:, P:].tolist())}) == 12
    again = rlhf.response_logprobs(policy, tokens, P)
    assert torch.allclose(logprobs, again, atol=1e-5)
    for i in range(12):
        one = [prompts[i : i + 1], R, lambda x: (x < 0).any(1), numbers[i : i + 1]]
        alone = rlhf.generate(policy, *one)
        assert torch.equal(alone[0][0], tokens[i])
        assert torch.allclose(alone[1][0], logprobs[i], atol=1e-6)


def test_logit_value_alignment():
    """Logits of one column are about the next; a value is that of the state before its token."""
    tokens = random_tokens([9, 9], [8, 8])
    table = 100.0 * nn.functional.one_hot(tokens.roll(-1, dims=1))
    policy = fake_policy(table)
    assert rlhf.response_logprobs(policy, tokens, P).abs().max() < 1e-6
    agent = SimpleNamespace(policy=policy, prompt_length=P)
    agent.value_model = lambda tokens: torch.arange(tokens.shape[1]).expand(2, -1)
    distribution, values = rlhf.Agent.forward(agent, tokens)
    assert distribution.log_prob(tokens[:, P:]).abs().max() < 1e-6
    assert values.tolist() == [[*range(P - 1, P + R - 1)]] * 2


def test_logit_value_alignment_in_the_loss():
    """The actions that ppo_loss asks about are the tokens of the responses, padding any token."""
    asked = []

    def log_prob(actions):
        asked.append(actions)
        return torch.zeros(2, R, requires_grad=True)

    def agent(tokens):
        policy = SimpleNamespace(log_prob=log_prob, entropy=lambda: torch.zeros(2, R))
        return policy, torch.zeros(2, R)

    tokens = random_tokens([9, 3], [8, 2])
    mask = tokens[:, P:] != PAD
    minibatch = [tokens, *torch.zeros(5, 2, R), mask]
    rlhf.ppo_loss(agent, minibatch, (mask.sum(), 0), 0.2, 0.2, 0.1, True, 0.0)
    assert torch.equal(asked[0], tokens[:, P:].clamp(min=0))


def test_logit_value_alignment_in_a_run(monkeypatch):
    """Values of a rollout are those that the update starts from, 0 behind EOS."""

    def look(agent, minibatch, *_):
        return agent(minibatch[0])[1], minibatch

    seen = before_each(monkeypatch, "ppo_loss", look)
    train(num_minibatches=1, update_epochs=1)
    assert len(seen) == 3
    for new_values, (*_, values, _, _, _, mask) in seen:
        assert torch.allclose(values, new_values * mask, atol=1e-6)
        assert (values[~mask] == 0).all()
        assert values[mask].std() > 0


def test_vocabulary_has_no_words_of_no_use(monkeypatch):
    """Huge logits of the rows behind the last word change nothing: ratio 1, KL 0, no such token."""
    rollouts = spy(monkeypatch, rlhf, "generate")
    original = rlhf.Agent.__init__

    def init(agent, task, args):
        original(agent, task, args)
        for policy in (agent.policy, agent.reference):
            nn.init.normal_(policy.model.lm_head.weight[len(task.words) :], std=1e4)

    monkeypatch.setattr(rlhf.Agent, "__init__", init)
    train(total_episodes=12, num_minibatches=1, update_epochs=1)
    ((_, (tokens, logprobs)),) = rollouts
    assert {*tokens[:, P:].unique().tolist()} <= {PAD, *range(13)}
    assert {SORT.eos, SORT.eos - 1, 0} < {*tokens[:, P:].unique().tolist()}
    assert logprobs[tokens[:, P:] != PAD].mean() == pytest.approx(-math.log(13), abs=0.1)
    assert logged("ppo/val/ratio") == pytest.approx([1])
    assert logged("objective/kl") == [0]


def test_vocabulary_of_a_policy():
    table = torch.randn(2, 4, 64, generator=generator())
    policy = fake_policy(table, num_tokens=13)
    logits, cache = policy(torch.zeros(2, 4, dtype=torch.long), 4)
    assert torch.equal(logits, table[..., :13])
    assert cache is policy.model.caches[0]
    assert not policy.model.inputs[0]["use_cache"]
    logits, _ = policy(torch.zeros(2, 4, dtype=torch.long), 3)
    assert torch.equal(logits, table[:, 1:, :13])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_log_probabilities_are_in_single_precision(dtype):
    table = torch.randn(1, P + R, 13, generator=generator()).to(dtype)
    tokens = random_tokens([9, 3], [8, 8])
    logprobs = fake_policy(table).responses(tokens).log_prob(tokens[:, P:])
    assert logprobs.dtype == torch.float32
    exact = table.float().log_softmax(2).expand(2, -1, -1)
    wanted = exact[:, P - 1 : -1].gather(2, tokens[:, P:, None]).squeeze(2)
    assert torch.allclose(logprobs, wanted, atol=1e-6)
    values = rlhf.ScalarModel(new_agent().policy.model).to(torch.float64)(tokens)
    assert values.dtype == torch.float32


@pytest.mark.parametrize("chunk", [1, 5, 4096])
def test_chunks_of_logits_change_nothing(chunk):
    """By a model that caps and scales its logits: all is as with all logits at once."""
    tokens = random_tokens([9, 3, 5], [8, 2, 5])
    actions, rng = tokens[:, P:].clamp(min=0), generator()
    table = torch.randn(3, P + R, 6, generator=rng, dtype=torch.float64).requires_grad_()
    weight = torch.randn(20, 6, generator=rng, dtype=torch.float64).requires_grad_()
    factors = torch.randn(actions.shape, generator=rng)
    model = FakeModel(table, lambda hidden: 1.4 * (hidden @ weight.T / 2).tanh())
    policy = rlhf.Policy(model, 13, 0.7, chunk)

    def numbers(distribution):
        logprobs = distribution.log_prob(actions)
        gradients = torch.autograd.grad((factors * logprobs).sum(), (table, weight))
        return logprobs, distribution.entropy(), *gradients

    words = policy.responses(tokens)
    full = Categorical(logits=all_logits(policy, tokens[:, :-1])[:, P - 1 :])
    assert full.logits.shape == (3, R, 13)
    for ours, exact in zip(numbers(words), numbers(full), strict=True):
        assert torch.allclose(ours, exact, rtol=1e-6, atol=1e-6)
        assert exact.abs().max() > 0.1
    assert not words.entropy().requires_grad  # only to watch


@pytest.mark.parametrize("chunk", [1, 5, 4096])
def test_chunks_of_logits_are_made_of_a_text_that_is_read_once(chunk):
    tokens = random_tokens([9, 3], [8, 2])
    policy = fake_policy(torch.zeros(2, P + R, 13, requires_grad=True))
    policy.chunk, trunk = chunk, policy.model.base_model
    rlhf.response_logprobs(policy, tokens, P).sum().backward()
    assert [x["input_ids"].shape for x in policy.model.inputs] == [(2, P + R - 1)]
    assert "forward" not in vars(trunk)
    assert not trunk._forward_hooks


def test_chunks_of_logits_leave_a_model_as_it_was_if_its_head_fails():
    tokens, widths = random_tokens([9, 3], [8, 2]), []

    def head(hidden):
        widths.append(hidden.shape[1])
        return hidden if len(widths) < 2 else 1 / 0

    policy = rlhf.Policy(FakeModel(torch.zeros(2, P + R, 13), head), 13, chunk=5)
    with pytest.raises(ZeroDivisionError):
        rlhf.response_logprobs(policy, tokens, P)
    assert widths == [5, 5]
    assert "forward" not in vars(policy.model.base_model)


class RowsOfLogits(TorchDispatchMode):
    """The most rows of a tensor of numbers for each word, of all that are made under it."""

    def __init__(self, *widths):
        super().__init__()
        self.widths, self.most = widths, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        for x in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(x, torch.Tensor) and x.ndim and x.shape[-1] in self.widths:
                self.most = max(self.most, x.numel() // x.shape[-1] * x.is_floating_point())
        return made


@pytest.mark.parametrize(("chunk", "most"), [(4, 4), (5, 5), (4096, 3 * R)])
def test_chunks_of_logits_are_all_that_is_in_memory(chunk, most):
    """Forwards and backwards, in each stage; weights have four rows or columns."""
    task = SORT._replace(words=[*map(str, range(150))])
    agent = rlhf.Agent(task, settings(d_model=4, logprob_chunk=chunk))
    tokens = random_tokens([9, 3, 5], [8, 2, 5])
    batch = random_batch(agent, tokens)
    for rows in ([0, 1, 2], [0, 0, 0]):
        with RowsOfLogits(150, 192) as sft:
            rlhf.sft_loss(agent.policy, tokens[rows], P, 15).backward()
        with RowsOfLogits(150, 192) as ppo:
            gradient(agent, batch, rows=torch.tensor(rows), ptx=(tokens, 0.5))
        with RowsOfLogits(150, 192) as scoring, torch.no_grad():
            rlhf.response_logprobs(agent.policy, tokens[rows], P)
        assert (sft.most, ppo.most, scoring.most) == (most, most, most)


@pytest.mark.parametrize("chunk", [5, 23, 24])
def test_chunks_of_logits_are_not_kept_for_the_backward_pass(chunk):
    """All that is kept of 24 tokens and 150 words, if they are more than a chunk, are weights."""
    task = SORT._replace(words=[*map(str, range(150))])
    policy, kept = rlhf.Agent(task, settings(d_model=4, logprob_chunk=chunk)).policy, []

    def pack(x):
        kept.append(x.numel() // 150 if x.shape[-1:] in ((150,), (192,)) else 0)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        rlhf.sft_loss(policy, random_tokens([9, 3, 5], [8, 2, 5]), P, 15)
    assert (max(kept) >= 24) == (chunk == 24)
    assert max(kept) <= 5 or chunk == 24


def test_temperature_divides_the_logits_everywhere():
    """Logits 0 and ln 3 at 0.5: probabilities of 0.1 and 0.9, not of 0.25 and 0.75."""
    table = torch.tensor([0.0, math.log(3)]).expand(1, 8, 2)
    policy = fake_policy(table, temperature=0.5)
    prompts = torch.zeros(100, 2, dtype=torch.long)
    tokens, logprobs = rlhf.generate(policy, prompts, 6, ends_at(2), uniforms(100, 6))
    wanted = torch.where(tokens[:, 2:] == 1, math.log(0.9), math.log(0.1))
    assert torch.allclose(logprobs, wanted, atol=1e-6)
    assert (tokens[:, 2:] == 1).float().mean() == pytest.approx(0.9, abs=0.04)
    assert torch.allclose(rlhf.response_logprobs(policy, tokens, 2), wanted, atol=1e-6)
    agent = SimpleNamespace(policy=policy, prompt_length=2, value_model=lambda tokens: tokens)
    distribution, _ = rlhf.Agent.forward(agent, tokens)
    assert torch.allclose(distribution.log_prob(tokens[:, 2:]), wanted, atol=1e-6)
    assert distribution.entropy().flatten()[0].item() == pytest.approx(0.325083, abs=1e-6)


def test_temperature_is_the_same_for_policy_and_reference():
    agent, tokens = new_agent(temperature=0.7), random_tokens([9, 3], [8, 2])
    for policy in (agent.policy, agent.reference):
        logits = rlhf.read(policy.model, tokens).logits[..., :13]
        assert torch.allclose(all_logits(policy, tokens), (logits / 0.7).float(), atol=1e-6)


def test_temperature_is_1_for_demonstrations():
    """What is learned from them does not depend on how the policy will sample."""
    one, two = (train(stages="sft", temperature=t) for t in (1.0, 0.5))
    assert same(weights(one.policy), weights(two.policy))


@pytest.mark.parametrize(("temperature", "scale"), [(1.0, 0.1), (0.7, 1.0), (1.5, 1.0)])
def test_sampler_distribution_is_the_softmax(temperature, scale):
    """First and second token of 4,096 responses, from 200 words of which the last is EOS."""
    n, words = 4096, 200
    table = scale * torch.randn(1, 3, words, generator=generator(7))
    policy = fake_policy(table, temperature=temperature)
    prompts = torch.ones(n, 2, dtype=torch.long)
    numbers = uniforms(n, 2, seed=1)
    tokens, logprobs = rlhf.generate(policy, prompts, 2, ends_at(words - 1), numbers)
    assert tokens.shape == (n, 4)
    assert (tokens[:, :2] == 1).all()
    assert len(tokens[:, 2].unique()) > 150
    for column in (2, 3):
        drawn = tokens[:, column][tokens[:, column] != PAD]
        wanted = (table[0, column - 1] / temperature).softmax(0) * len(drawn)
        counts = torch.bincount(drawn, minlength=words)
        chi2 = ((counts - wanted) ** 2 / wanted).sum().item()
        assert 130 < chi2 < 280  # 199 +- 20 if it is
        said = logprobs[:, column - 2][tokens[:, column] != PAD]
        exact = (table[0, column - 1] / temperature).log_softmax(0)[drawn]
        assert torch.allclose(said, exact, atol=1e-5)
    assert torch.equal(tokens[:, 3] == PAD, tokens[:, 2] == words - 1)
    assert torch.equal(tokens[:, 2:] == PAD, logprobs == 0)
    one, two, three = (
        rlhf.generate(policy, prompts, 2, ends_at(words - 1), uniforms(n, 2, seed=seed))[0]
        for seed in (1, 1, 2)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, three)


def test_sampler_distribution_is_inverted_exactly():
    """Four of eight words have a probability of 1/4, one begins where another ends."""
    table = torch.full((1, 2, 8), -torch.inf)
    table[..., [1, 2, 4, 6]] = 0
    drawn = {0.0: 1, 0.25 - 2**-54: 1, 0.25: 2, 0.5 - 2**-53: 2, 0.5: 4}
    drawn |= {0.75 - 2**-53: 4, 0.75: 6, 1 - 2**-53: 6}
    prompts = torch.zeros(8, 2, dtype=torch.long)
    numbers = torch.tensor([*drawn], dtype=torch.float64)[:, None]
    tokens, logprobs = rlhf.generate(fake_policy(table), prompts, 1, ends_at(0), numbers)
    assert tokens[:, 2].tolist() == [*drawn.values()]
    assert torch.allclose(logprobs, torch.full((8, 1), -math.log(4)), atol=1e-6)


def test_sampler_distribution_is_inverted_in_the_order_of_the_words():
    """0.1, 0.2, 0, 0.3 and 0.4."""
    table = torch.tensor([0.1, 0.2, 0.0, 0.3, 0.4]).log().expand(1, 2, 5)
    drawn = {0.0: 0, 0.0999: 0, 0.1001: 1, 0.2999: 1, 0.3001: 3, 0.5999: 3, 0.6001: 4, 0.9999: 4}
    prompts = torch.zeros(8, 2, dtype=torch.long)
    numbers = torch.tensor([*drawn], dtype=torch.float64)[:, None]
    tokens, logprobs = rlhf.generate(fake_policy(table), prompts, 1, ends_at(5), numbers)
    assert tokens[:, 2].tolist() == [*drawn.values()]
    assert torch.equal(logprobs, table[0, 0].log_softmax(0)[tokens[:, 2:]])


def test_sampler_distribution_whose_sum_is_not_1():
    """By rounding, it is less for one table and more for the other; the last words have none."""
    sums, last = [], 2000
    extremes = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    numbers = torch.cat([extremes, uniforms(500)])[:, None]
    prompts = torch.zeros(502, 2, dtype=torch.long)
    for seed in range(10):
        table = torch.randn(1, 2, last + 6, generator=generator(seed))
        table[..., last + 1 :] = table[..., 0] = -torch.inf
        probs = Categorical(logits=table[0, 1]).probs.double().numpy()
        below = probs.cumsum()
        wanted = np.searchsorted(below, numbers[:, 0].numpy() * below[-1], side="right")
        tokens, _ = rlhf.generate(fake_policy(table), prompts, 1, ends_at(-2), numbers)
        assert tokens[:, 2].tolist() == wanted.tolist()
        assert tokens[:2, 2].tolist() == [1, last]
        sums.append(below[-1])
    assert min(sums) < 1 - 1e-9 < 1 + 1e-9 < max(sums)


def one_hot_policy(*responses):
    """Says these responses, to prompts of two tokens that are in order, with certainty."""
    table = torch.zeros(len(responses), 2 + len(responses[0]), 16)
    for row, response in zip(table, responses, strict=True):
        for t, token in enumerate(response):
            row[1 + t, token] = 1e4
    return fake_policy(table)


def test_truncate_behind_the_first_eos():
    """The token 13; without it, a response is left as it is."""
    policy = one_hot_policy([5, 13, 7, 13, 9], [5, 6, 7, 8, 9])
    prompts = torch.tensor([[PAD, 3], [2, 3]])
    tokens, logprobs = rlhf.generate(policy, prompts, 5, ends_at(13), uniforms(2, 5))
    assert tokens.tolist() == [[PAD, 3, 5, 13, PAD, PAD, PAD], [2, 3, 5, 6, 7, 8, 9]]
    assert (logprobs == 0).all()
    assert len(policy.model.inputs) == 5
    seen = [x["attention_mask"].sum(1).tolist() for x in policy.model.inputs]
    assert seen == [[1, 2], [2, 3], [4], [5], [6]]  # who has ended is read no more


def test_truncate_stops_when_all_have_ended():
    policy = one_hot_policy([5, 6, 13, 7, 9], [5, 13, 7, 7, 7])
    prompts = torch.tensor([[1, 3], [2, 3]])
    tokens, _ = rlhf.generate(policy, prompts, 5, ends_at(13), uniforms(2, 5))
    assert tokens[:, 2:].tolist() == [[5, 6, 13, PAD, PAD], [5, 13, PAD, PAD, PAD]]
    assert len(policy.model.inputs) == 3


def test_truncate_does_not_look_at_the_prompt():
    policy = one_hot_policy([5, 6, 7], [5, 13, 7])
    prompts = torch.tensor([[PAD, 13], [3, 13]])
    tokens, _ = rlhf.generate(policy, prompts, 3, ends_at(13), uniforms(2, 3))
    assert tokens[:, 2:].tolist() == [[5, 6, 7], [5, 13, PAD]]


def test_truncate_does_not_change_what_is_sampled():
    """A sampler that never stops draws the same tokens up to EOS."""
    policy = new_agent(temperature=4.0).policy
    prompts = random_tokens([1, 3, 8, 9] * 4, [0] * 16)[:, :P]
    numbers = uniforms(16, R, seed=5)
    tokens, _ = rlhf.generate(policy, prompts, R, SORT.ended, numbers)
    endless = prompts
    for t in range(R):
        below = all_logits(policy, endless)[:, -1].softmax(1).cumsum(1)
        drawn = (below <= numbers[:, t, None]).sum(1, keepdim=True)
        endless = torch.cat([endless, drawn], dim=1)
    cut = (endless[:, P:] == SORT.eos).long().cumsum(1).roll(1, dims=1)
    cut[:, 0] = 0
    endless[:, P:] = endless[:, P:].masked_fill(cut > 0, PAD)
    assert torch.equal(tokens, endless)
    assert 0 < (tokens[:, P:] == PAD).sum() < tokens[:, P:].numel() - 16


def test_truncate_leaves_only_those_in_the_batch_that_go_on():
    """The rows of each step; tokens and log-probabilities are those of a batch that stays whole."""
    policy = new_agent(temperature=4.0).policy
    prompts, numbers = random_tokens([1, 3, 8, 9] * 4, [0] * 16)[:, :P], uniforms(16, R, seed=5)
    rows = rows_read(policy)
    tokens, logprobs = rlhf.generate(policy, prompts, R, SORT.ended, numbers)
    lengths = (tokens[:, P:] != PAD).sum(1)
    assert rows == [16, *((lengths > t).sum() for t in range(1, R))]
    assert len({*rows}) > 3
    whole, logprobs_too = rlhf.generate(policy, prompts, R, ends_at(-2), numbers)
    assert rows[R:] == [16] * R
    mask = torch.arange(R) < lengths[:, None]
    assert torch.equal(tokens[:, P:], whole[:, P:].masked_fill(~mask, PAD))
    assert torch.allclose(logprobs, logprobs_too * mask, atol=1e-6)


@pytest.mark.parametrize("at", [0, 3])
def test_truncate_goes_on_for_other_ranks(monkeypatch, at):
    """As long as one of them samples, all read a row; nothing comes of it where all have ended."""
    policy = new_agent(temperature=4.0).policy
    prompts, numbers = random_tokens([1, 3, 8, 9], [0] * 4)[:, :P], uniforms(4, R)
    left = []

    def has_ended(responses):
        return torch.full((len(responses),), responses.shape[1] == at + 1)

    def of_all_ranks(x):
        left.append(x)
        return [x, 1]

    alone, rows = rlhf.generate(policy, prompts, R, has_ended, numbers), rows_read(policy)
    monkeypatch.setattr(rlhf, "of_all_ranks", of_all_ranks)
    others = rlhf.generate(policy, prompts, R, has_ended, numbers)
    assert all(map(torch.equal, others, alone))
    assert rows == [4] * (at + 1) + [1] * (R - 1 - at)
    assert left == [4] * at + [0] * (R - at)
    assert (alone[0][:, P:] != PAD).sum(1).tolist() == [at + 1] * 4


def test_post_eos_noop_in_the_sampler():
    """Whatever the model would say behind EOS: the same texts, the same log-probabilities."""
    table = torch.randn(2, P + R, 13, generator=generator())
    table[0, P + 1, SORT.eos] = 1e4
    other = table.clone()
    other[0, P + 2 :] = 5.0 * torch.randn(R - 2, 13, generator=generator(9))
    prompts, numbers = random_tokens([3, 9], [0, 0])[:, :P], uniforms(2, R)
    one, two = (
        rlhf.generate(fake_policy(x), prompts, R, SORT.ended, numbers) for x in (table, other)
    )
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
    assert one[0][0, P + 2 :].tolist() == [SORT.eos] + [PAD] * (R - 3)
    assert (one[1][0, 3:] == 0).all()


def test_post_eos_noop_of_log_probabilities():
    """They are those of the tokens, and 0 behind EOS."""
    tokens = torch.tensor([[PAD, 2, 0, 3, PAD], [1, 1, 1, 0, 3]])
    table = torch.randn(2, 5, 4, generator=generator())
    logprobs = rlhf.response_logprobs(fake_policy(table), tokens, 2)
    exact = table.log_softmax(2)
    expected = [
        [exact[0, 1, 0], exact[0, 2, 3], 0],
        [exact[1, i, x] for i, x in ((1, 1), (2, 0), (3, 3))],
    ]
    assert torch.allclose(logprobs, torch.tensor(expected), atol=1e-6)
    assert logprobs[0, 2] == 0


def test_post_eos_noop_in_rewards():
    mask = torch.tensor([[True, True, False, False], [True] * 4])
    kl, has_eos = torch.randn(2, 4, generator=generator()), torch.tensor([True, False])
    args = (torch.tensor([2.0, 3.0]), has_eos)
    one, two = (
        rlhf.token_rewards(*args, kl.masked_fill(~mask, x), mask, 0.1, -1.0) for x in (0, 7)
    )
    assert torch.equal(one, two)
    assert (one[~mask] == 0).all()
    values = torch.randn(2, 4, generator=generator()) * mask
    advantages = rlhf.response_advantages(one, values, mask, 1.0, 0.95)
    assert (advantages[~mask] == 0).all()


def test_post_eos_noop_in_the_update():
    """Nothing that a minibatch holds behind EOS changes the loss, a statistic or a gradient."""
    agent = new_agent()
    batch = random_batch(agent, random_tokens([9, 3, 5], [1, 8, 4]))
    gradients, stats = gradient(agent, batch)
    mask = batch[-1]
    other = [batch[0], *(x.masked_fill(~mask, 77.0) for x in batch[1:6]), mask]
    gradients_too, stats_too = gradient(agent, other)
    assert stats == stats_too
    assert same(gradients, gradients_too)
    assert norm_of(gradients, "policy") > 0 < norm_of(gradients, "value_model")


# ------------------------------------------------------------------------------------------------
# Stages 1 and 2


def test_sft_labels_are_the_tokens_of_the_response():
    """The mean over all of them, EOS with them; no gradient from prompts and padding."""
    tokens = torch.tensor([[PAD, 0, 1, 3, PAD, PAD], [2, 1, 0, 1, 2, 3], [1, 1, 2, 2, 2, 2]])
    table = torch.randn(3, 6, 5, generator=generator()).requires_grad_()
    policy, num_tokens = fake_policy(table, num_tokens=4), (tokens[:, 2:] != PAD).sum()
    loss = rlhf.sft_loss(policy, tokens, 2, num_tokens)
    labels = tokens[:, 2:].masked_fill(tokens[:, 2:] == PAD, -100)
    wanted = cross_entropy(table[:, 1:-1, :4].flatten(0, 1), labels.flatten())
    assert loss.item() == pytest.approx(wanted.item(), abs=1e-6)
    loss.backward()
    has_gradient = (table.grad != 0).any(2).tolist()
    assert has_gradient == [
        [False, True, True, False, False, False],
        [False, True, True, True, True, False],
        [False, True, True, True, True, False],
    ]
    assert table.grad[0, 2, 3] < 0  # of EOS
    assert (table.grad[..., 4] == 0).all()


def test_sft_labels_of_uniform_logits():
    tokens = random_tokens([9, 3, 1], [8, 2, 1])
    loss = rlhf.sft_loss(fake_policy(torch.zeros(1, P + R, 13)), tokens, P, 8 + 2 + 1)
    assert loss.item() == pytest.approx(math.log(13), abs=1e-6)


def test_permutations_of_demonstrations(monkeypatch):
    """Each pass is over all demonstrations once, the last few with them, in an order of its own."""
    losses = spy(monkeypatch, rlhf, "sft_loss")
    train(stages="sft", sft_texts=20, sft_batch_size=8, sft_epochs=2)
    batches = [args[1].tolist() for args, _ in losses]
    assert [len(batch) for batch in batches] == [8, 8, 4] * 2
    epochs = [[*chain(*batches[:3])], [*chain(*batches[3:])]]
    rng = rlhf.stream(settings(), "sft")
    texts = rlhf.write_texts(SORT, SORT.rows("sft", 20, rng), R).tolist()
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(texts)
    assert epochs[0] != epochs[1]
    assert texts not in epochs
    assert [args[2] for args, _ in losses] == [P] * 6
    for tokens, _, num_tokens in [args[1:] for args, _ in losses]:
        assert num_tokens == (tokens[:, P:] != PAD).sum()
    assert [step for step, _, name, _ in metrics() if name == "sft/loss"] == [8, 16, 20, 28, 36, 40]
    assert logged("sft/loss") == pytest.approx([loss.item() for _, loss in losses], rel=1e-6)


def test_sft_labels_are_learned_by_the_policy_and_its_reference():
    torch.manual_seed(1)
    before = weights(rlhf.Agent(SORT, settings()))
    agent = train(stages="sft")
    assert same(weights(agent.policy), weights(agent.reference))
    assert not torch.equal(agent.policy.model.lm_head.weight, before["policy.model.lm_head.weight"])
    assert not any(parameter.requires_grad for parameter in agent.reference.parameters())


class FakeReward(nn.Module):
    """Gives the rows of a batch these scores, at every column."""

    def __init__(self, *scores):
        super().__init__()
        self.scores = nn.Parameter(torch.tensor(scores, dtype=torch.float64))

    def forward(self, tokens):
        return self.scores[:, None].expand(tokens.shape)


@pytest.mark.parametrize(
    ("chosen", "rejected", "loss"),
    [
        ([0.0], [0.0], 0.693147),
        ([1.0], [0.0], 0.313262),
        ([0.0], [1.0], 1.313262),
        ([6.0], [5.0], 0.313262),
        ([5.0, 6.0], [6.0, 5.0], 0.813262),
    ],
)
def test_bt_losses(chosen, rejected, loss):
    """Two pairs: their mean. The gradient on the chosen is -(1 - sigmoid(margin))."""
    model, n = FakeReward(*chosen, *rejected), len(chosen)
    tokens = random_tokens([9] * 2 * n, [4] * 2 * n)
    value, margins = rlhf.rm_loss(model, *tokens.chunk(2), n)
    assert value.item() == pytest.approx(loss, abs=1e-6)
    assert margins.tolist() == [a - b for a, b in zip(chosen, rejected, strict=True)]
    assert not margins.requires_grad
    value.backward()
    slope = -(1 - torch.sigmoid(margins)) / n
    assert torch.allclose(model.scores.grad, torch.cat([slope, -slope]), atol=1e-9)


@pytest.mark.parametrize(("d_model", "times", "std"), [(4096, 1, 0.015623), (3, 1000, 0.5)])
def test_reward_head_std(d_model, times, std):
    torch.manual_seed(0)
    heads, trunk = [], nn.Linear(1, 1)
    config = SimpleNamespace(hidden_size=d_model)
    for _ in range(times):
        language_model = SimpleNamespace(config=config, base_model=trunk)
        model = rlhf.ScalarModel(language_model)
        assert same(weights(model.model), weights(trunk))
        assert model.model.weight is not trunk.weight
        assert model.head.bias.tolist() == [0]
        heads.append(model.head.weight.detach())
    assert torch.cat(heads).std().item() == pytest.approx(std, rel=0.05)
    assert abs(torch.cat(heads).mean().item()) < 0.05 * std


def test_reward_at_last_token_index():
    """Of texts padded on both sides, and of what is said at their last token alone."""
    rows = [[PAD, PAD, 1, 2, 3, PAD], [1, 2, 3, 4, 5, 6], [PAD, 1, PAD, PAD, PAD, PAD]]
    tokens = torch.tensor(rows)
    table = torch.arange(18.0).view(3, 6)
    scores = rlhf.reward_scores(lambda tokens: table, tokens)
    assert scores.tolist() == [4, 11, 13]
    for row, last in enumerate((4, 5, 1)):
        other = torch.randn(3, 6, generator=generator())
        other[row, last] = table[row, last]
        assert rlhf.reward_scores(lambda tokens, x=other: x, tokens)[row] == scores[row]


def test_reward_at_last_token_is_read_from_the_last_layer():
    table = torch.randn(2, 6, 4, generator=generator())
    language_model = FakeModel(table, head=nn.Linear(4, 13))
    model = rlhf.ScalarModel(language_model)
    nn.init.ones_(model.head.bias)
    expected = table @ model.head.weight[0] + 1
    assert torch.allclose(model(torch.zeros(2, 6, dtype=torch.long)), expected, atol=1e-6)


@pytest.mark.parametrize("pads", range(6))
def test_reward_at_last_token_whatever_follows(pads):
    model, text = new_agent().reward_model, random_tokens([9, 4], [8, 8])
    text[:, -1] = SORT.eos
    score = rlhf.reward_scores(model, text)
    padded = pad(text, (0, pads), value=PAD)
    assert torch.allclose(rlhf.reward_scores(model, padded), score, atol=1e-5)
    text[:, -1] = 3
    assert (rlhf.reward_scores(model, text) - score).abs().min() > 1e-3


def test_reward_at_last_token_is_of_prompt_and_response():
    model, tokens = new_agent().reward_model, random_tokens([9, 9], [5, 5])
    tokens[1, P:] = tokens[0, P:]
    scores = rlhf.reward_scores(model, tokens)
    assert abs(scores[0] - scores[1]) > 1e-3
    scores[0].backward()
    gradients = model.model.tokens.weight.grad[tokens[0, :P]]
    assert (gradients.abs().sum(1) > 0).all()


def test_reward_norm_gain_and_bias():
    """Mean 2 and standard deviation 4 before: gain 0.25 and bias -0.5."""
    model = new_agent().reward_model
    weight, bias = model.head.weight.clone(), model.head.bias.clone()
    model.normalize(torch.tensor([-2.0, 6.0]))
    assert torch.allclose(model.head.weight, weight / 4)
    assert torch.allclose(model.head.bias, bias / 4 - 0.5)
    assert model.head.weight.requires_grad


def test_reward_norm_of_equal_scores_is_finite():
    """1e-8 is added to a standard deviation of 0."""
    model = new_agent().reward_model
    weight, bias = model.head.weight.clone(), model.head.bias.clone()
    model.normalize(torch.tensor([2.0, 2.0]))
    assert torch.allclose(model.head.weight, 1e8 * weight)
    assert torch.allclose(model.head.bias, 1e8 * (bias - 2))


def test_reward_norm_once_and_again():
    model, tokens = new_agent().reward_model, random_tokens([5] * 256, [6] * 256)
    trunk = weights(model.model)
    with torch.no_grad():
        scores = rlhf.reward_scores(model, tokens)
        for _ in range(2):
            model.normalize(rlhf.reward_scores(model, tokens))
            normalized = rlhf.reward_scores(model, tokens)
            assert normalized.mean().item() == pytest.approx(0, abs=1e-5)
            assert normalized.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    order = scores.argsort()
    assert (normalized[order].diff() >= 0).all()
    assert same(trunk, weights(model.model))


def test_reward_norm_after_training_on_pairs_that_it_has_not_seen(monkeypatch):
    pairs = spy(monkeypatch, rlhf, "preference_pairs")
    agent = train(stages="sft,rm", rm_pairs=16, rm_test_pairs=10)
    ((_, (chosen, rejected, _)),) = pairs
    assert len(chosen) == len(rejected) == 26
    with torch.no_grad():
        unseen = rlhf.reward_scores(agent.reward_model, torch.cat([chosen[16:], rejected[16:]]))
        seen = rlhf.reward_scores(agent.reward_model, torch.cat([chosen[:16], rejected[:16]]))
    assert unseen.mean().item() == pytest.approx(0, abs=1e-5)
    assert unseen.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    assert seen.mean().item() != pytest.approx(0, abs=1e-3)


def test_reward_model_starts_as_the_sft_model():
    """All but the words of the one and the head of the other."""
    torch.manual_seed(1)
    initial = weights(rlhf.Agent(SORT, settings()).reward_model.model)
    agent = train(stages="sft,rm", rm_learning_rate=0.0)
    expected = weights(agent.reference.model.base_model)
    assert same(weights(agent.reward_model.model), expected)
    assert not same(expected, initial)


def test_permutations_of_pairs(monkeypatch):
    pairs = spy(monkeypatch, rlhf, "preference_pairs")
    losses = spy(monkeypatch, rlhf, "rm_loss")
    agent = train(stages="sft,rm", rm_pairs=10, rm_epochs=2, rm_batch_size=4, rm_test_pairs=50)
    chosen, rejected, _ = pairs[0][1]
    wanted = sorted(torch.cat([chosen, rejected], dim=1)[:10].tolist())
    batches = [torch.cat(args[1:3], dim=1).tolist() for args, _ in losses]
    assert [len(batch) for batch in batches] == [4, 4, 2] * 2
    assert [args[3] for args, _ in losses] == [4, 4, 2] * 2
    epochs = [[*chain(*batches[:3])], [*chain(*batches[3:])]]
    assert sorted(epochs[0]) == sorted(epochs[1]) == wanted
    assert epochs[0] != epochs[1]
    assert all(args[0] is agent.reward_model for args, _ in losses)
    accuracies = [(margins > 0).float().mean().item() for _, (_, margins) in losses]
    assert logged("rm/train_accuracy") == pytest.approx(accuracies)


def test_preference_labels_and_the_accuracy_by_hand(monkeypatch):
    """On the four pairs that it has not learned from, of seven; a tie counts half."""
    args = settings(rm_pairs=3, rm_test_pairs=4, rm_epochs=2, rm_label_temperature=2.0)
    gold_margins = np.array([5.0, 5.0, 5.0, 1.0, -1.0, -2.0, 0.0])
    pairs = (*random_tokens([9] * 14, [8] * 14).chunk(2), gold_margins)
    scores = torch.tensor([2.0, 1.0, 0.0, 3.0, 1.0, 1.0, 1.0, 0.0])
    scored = []
    monkeypatch.setattr(rlhf, "preference_pairs", lambda *_: pairs)
    monkeypatch.setattr(rlhf, "fit", lambda *_: None)
    monkeypatch.setattr(rlhf, "reward_scores", lambda _, x: scored.append(x) or scores)
    rows = []
    run = SimpleNamespace(step=0, numbers={}, warn=lambda _: None)
    run.log = lambda *row: rows.append(row)
    rlhf.train_rm(args, SORT, new_agent(), run)
    assert torch.equal(scored[0], torch.cat([pairs[0][3:], pairs[1][3:]]))
    expected = {"rm/accuracy": 0.625, "rm/accuracy_gold": 2.5 / 3, "rm/ceiling": 0.618994}
    assert run.numbers == pytest.approx(expected, abs=1e-6)
    assert rows == [(args.rm_epochs * 3, run.numbers)]


@pytest.mark.parametrize(
    ("tau", "std", "share"), [(1.0, 1.0, 0.731059), (0.5, 1.0, 0.880797), (1.0, 2.0, 0.622459)]
)
def test_preference_labels_follow_bradley_and_terry(monkeypatch, tau, std, share):
    """Gold rewards of 3 and 4 in some units: how often is the better one of two preferred?"""
    n, drawn = 6000, []

    def sample(args, task, policy, prompts, rng):
        responses = torch.as_tensor(rng.integers(3, 5, size=(len(prompts), 1)))
        drawn.append(torch.cat([prompts, responses], dim=1))
        return drawn[-1], None

    numbers = (f"sort {i} =" for i in range(10) for _ in range(n // 10))
    task = SORT._replace(write_prompt=lambda rng: next(numbers))
    task = task._replace(gold=lambda prompt, response, ended: {"score": float(response)})
    monkeypatch.setattr(rlhf, "sample", sample)
    args = settings(rm_pairs=n - 100, rm_test_pairs=100, rm_label_temperature=tau)
    run, agent = SimpleNamespace(numbers={"gold_units": [9.0, std]}), new_agent()
    chosen, rejected, margin = rlhf.preference_pairs(args, task, agent, run)
    assert chosen.shape == rejected.shape == (n, P + 1)
    assert torch.equal(chosen[:, :P], rejected[:, :P])
    gold = [x[:, -1].numpy() / std for x in (chosen, rejected)]
    assert margin.tolist() == pytest.approx((gold[0] - gold[1]).tolist())
    swapped = (chosen != drawn[0]).any(1)
    assert torch.equal(torch.where(swapped[:, None], rejected, chosen), drawn[0])
    assert torch.equal(torch.where(swapped[:, None], chosen, rejected), drawn[1])
    differ = margin != 0
    assert differ.mean() == pytest.approx(0.5, abs=0.03)
    assert (margin[differ] > 0).mean() == pytest.approx(share, abs=0.03)


def test_preference_labels_are_of_samples_of_the_sft_policy(monkeypatch):
    samples = spy(monkeypatch, rlhf, "sample")
    agent = train(stages="sft,rm")
    (first, (one, _)), (second, (two, _)) = samples
    assert first[2] is second[2] is agent.reference
    assert torch.equal(one[:, :P], two[:, :P])
    assert not torch.equal(one[:, P:], two[:, P:])


def test_score_is_the_reward_models_or_what_can_be_verified():
    agent, tokens = new_agent(), random_tokens([5, 9, 3], [2, 8, 4])
    tokens[0, P - 5 : P + 2] = torch.tensor([10, 1, 2, 3, 11, 1, SORT.eos])
    proxy = rlhf.reward_scores(agent.reward_model, tokens).detach()
    gold = torch.as_tensor(rlhf.gold_rewards(SORT, tokens)["score"]).float()
    assert gold[0] == 0.25
    rows = [{"prompt": text} for text in rlhf.read_texts(SORT, tokens[:, :P])]
    for rm_coef, wanted in ((1.0, proxy), (2.5, 2.5 * proxy), (0.0, gold)):
        args = settings(rm_coef=rm_coef)
        scores = rlhf.score_function(args, SORT, agent, None)(rows, tokens)
        assert torch.allclose(scores, wanted, atol=1e-6)
        assert not scores.requires_grad


# ------------------------------------------------------------------------------------------------
# Rewards and advantages


@pytest.mark.parametrize(("has_eos", "score"), [(True, 3.0), (False, -1.0)])
def test_missing_eos_replaces_the_score(has_eos, score):
    """A score of 3, on the last token that counts."""
    mask = torch.tensor([[True, True, True]])
    data = (torch.tensor([3.0]), torch.tensor([has_eos]), torch.zeros(1, 3), mask, 0.1)
    assert rlhf.token_rewards(*data, -1.0).tolist() == [[0, 0, score]]
    assert rlhf.token_rewards(*data, -2.5).tolist() == [[0, 0, score if has_eos else -2.5]]


def test_missing_eos_in_a_run(monkeypatch):
    """-2.5 for those without, after the scores were clipped to +-0.3."""
    rewards = spy(monkeypatch, rlhf, "token_rewards")
    rollouts = spy(monkeypatch, rlhf, "generate")
    train(missing_eos_penalty=-2.5, reward_clip=0.3, kl_coef=0.0)
    missing = []
    for (_, (tokens, _)), ((_, has_eos, *_), result) in zip(rollouts, rewards, strict=True):
        assert has_eos.tolist() == [SORT.eos in row for row in tokens[:, P:].tolist()]
        assert 0 < has_eos.sum() < len(tokens)
        assert (result.sum(1)[~has_eos] == -2.5).all()
        assert (result.sum(1)[has_eos].abs() <= 0.3 + 1e-6).all()
        missing.append(1 - has_eos.float().mean().item())
    assert logged("objective/missing_eos") == pytest.approx(missing)


def test_score_position_is_eos():
    """EOS at index 2 of 5, no KL, no values: returns s, s, s, 0, 0."""
    mask = torch.tensor([[True, True, True, False, False]])
    scores, has_eos = torch.tensor([4.0]), torch.tensor([True])
    rewards = rlhf.token_rewards(scores, has_eos, torch.zeros(1, 5), mask, 0.1, -1.0)
    assert rewards.tolist() == [[0, 0, 4, 0, 0]]
    advantages = rlhf.response_advantages(rewards, torch.zeros(1, 5), mask, 1.0, 1.0)
    assert advantages.tolist() == [[4, 4, 4, 0, 0]]


def test_score_position_and_kl_penalty():
    """Each token pays for its own KL, the last one, which has the score, too."""
    mask = torch.tensor([[True, True, False], [True, True, True], [True, False, False]])
    kl = torch.tensor([[1.0, 2.0, 9.0], [-1.0, 0.5, 3.0], [4.0, 9.0, 9.0]])
    scores, has_eos = torch.tensor([5.0, 6.0, 7.0]), torch.tensor([True, False, True])
    rewards = rlhf.token_rewards(scores, has_eos, kl, mask, 0.1, -1.0)
    expected = [[-0.1, 4.8, 0], [0.1, -0.05, -1.3], [6.6, 0, 0]]
    assert torch.allclose(rewards, torch.tensor(expected))


@pytest.mark.parametrize(
    ("estimator", "up", "down"),
    [("k1", 0.5, -0.5), ("k2", 0.125, 0.125), ("k3", 0.106531, 0.148721)],
)
def test_kl_estimators(estimator, up, down):
    result = rlhf.kl_estimate(torch.tensor([0.5, -0.5, 0.0]), estimator)
    assert result.tolist() == pytest.approx([up, down, 0], abs=1e-6)


def test_kl_estimators_without_bias():
    """k1 and k3 have the KL as mean, on four tokens, k2 does not."""
    p, q = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]], dtype=torch.float64)
    logratio = (p / q).log()
    means = {k: (p * rlhf.kl_estimate(logratio, k)).sum().item() for k in ("k1", "k2", "k3")}
    exact = 0.456435
    assert (means["k1"], means["k3"]) == pytest.approx((exact, exact), abs=1e-6)
    assert abs(means["k2"] - exact) > 0.01


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimators_in_a_run(monkeypatch, estimator):
    rewards = spy(monkeypatch, rlhf, "token_rewards")
    logprobs = spy(monkeypatch, rlhf, "response_logprobs")
    train(kl_estimator=estimator, kl_coef=0.3, total_episodes=24)
    policy, reference = (logprobs[i][1] for i in (2, 3))
    (_, _, kl, mask, kl_coef, _), _ = rewards[1]
    assert torch.equal(kl, rlhf.kl_estimate(policy - reference, estimator))
    assert kl[mask].abs().max() > 1e-3
    assert kl_coef == 0.3


@pytest.mark.parametrize(
    ("kl", "after"), [(12.0, 0.151536), (0.0, 0.148464), (6.6, 0.150768), (6.0, 0.15)]
)
def test_kl_controller(kl, after):
    assert rlhf.next_kl_coef(0.15, kl, 6.0, 10_000, 512) == pytest.approx(after, abs=1e-9)


def test_kl_controller_in_a_run(monkeypatch):
    """It sees the mean over responses of sums over tokens; the next rollout has its beta."""
    controls = spy(monkeypatch, rlhf, "next_kl_coef")
    rewards = spy(monkeypatch, rlhf, "token_rewards")
    logprobs = spy(monkeypatch, rlhf, "response_logprobs")
    train(kl_target=0.05, kl_horizon=100, kl_estimator="k2", seed=2)
    pairs = zip(logprobs[::2], logprobs[1::2], strict=True)
    kls = [(policy - reference).sum(1).mean().item() for (_, policy), (_, reference) in pairs]
    assert kls[0] == 0 < min(kls[1:])
    assert logged("objective/kl") == pytest.approx(kls, rel=1e-6)
    assert [args[1] for args, _ in controls] == pytest.approx(kls)
    assert [args[2:] for args, _ in controls] == [[0.05, 100, 12]] * 3
    used = [args[4] for args, _ in rewards]
    assert used == [0.1, *(beta for _, beta in controls[:2])]
    assert used[1] == pytest.approx(0.1 * (1 - 0.2 * 0.12))
    assert [args[0] for args, _ in controls] == used
    assert logged("objective/kl_coef") == pytest.approx(used)


def test_kl_controller_is_off_by_default(monkeypatch):
    controls = spy(monkeypatch, rlhf, "next_kl_coef")
    train(kl_coef=0.25)
    assert logged("objective/kl_coef") == [0.25] * 3
    assert not controls


def test_whiten_keeps_the_mean():
    """1, 2, 3 have a population variance of 2/3; the masked element has no influence."""
    x = torch.tensor([[1.0, 2.0], [3.0, 100.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True], [True, False]])
    result = rlhf.whiten(x, mask, shift_mean=False)
    assert result.flatten().tolist() == pytest.approx([0.775255, 2, 3.224745, 0], abs=1e-6)
    assert result[1, 1] == 0


def test_whiten_to_mean_0_and_variance_1():
    x = 5 + 3 * torch.randn(6, 4, generator=generator(), dtype=torch.float64)
    mask = torch.rand(6, 4, generator=generator()) < 0.6
    result = rlhf.whiten(x.masked_fill(~mask, 1e6), mask)
    assert result[mask].mean().item() == pytest.approx(0, abs=1e-6)
    assert result[mask].std(correction=0).item() == pytest.approx(1, abs=1e-6)
    assert (result[~mask] == 0).all()
    order = x[mask].argsort()
    assert (result[mask][order].diff() > 0).all()
    moments = rlhf.masked_moments(x.masked_fill(~mask, 1e6), mask)
    wanted = x[mask].mean(), x[mask].var(correction=0)
    assert torch.allclose(torch.stack(moments), torch.stack(wanted))


def test_whiten_leaves_equal_numbers_small():
    """1e-8 is added to a variance of 1e-8."""
    mask = torch.ones(1, 2, dtype=torch.bool)
    x = torch.tensor([[-1e-4, 1e-4]], dtype=torch.float64)
    half = 0.5**0.5
    assert rlhf.whiten(x, mask)[0].tolist() == pytest.approx([-half, half], abs=1e-9)
    assert rlhf.whiten(torch.full((1, 2), 7.0), mask).tolist() == [[0, 0]]


@pytest.mark.parametrize("whiten_rewards", [True, False])
def test_reward_whitening_of_a_run(monkeypatch, whiten_rewards):
    """Over the rollout, the mean kept, before the advantages."""
    rewards = spy(monkeypatch, rlhf, "token_rewards")
    advantages = spy(monkeypatch, rlhf, "response_advantages")
    train(whiten_rewards=whiten_rewards)
    for ((*_, mask, _, _), raw), ((used, *_), _) in zip(rewards, advantages, strict=True):
        if whiten_rewards:
            assert used[mask].std(correction=0).item() == pytest.approx(1, abs=1e-4)
            assert used[mask].mean().item() == pytest.approx(raw[mask].mean().item(), abs=1e-5)
            assert (used[~mask] == 0).all()
        else:
            assert torch.equal(used, raw)
    sums = [used.sum(1).mean().item() for (used, *_), _ in advantages]
    assert logged("objective/rlhf_reward") == pytest.approx(sums, rel=1e-5)


def test_running_moments_of_two_batches():
    """1, 3 and 5, 7: mean 4, population variance 5."""
    sums = [0, 0.0, 0.0]
    assert rlhf.running_moments(sums, torch.tensor([1.0, 3.0])) == pytest.approx((2, 1))
    moments = rlhf.running_moments(sums, torch.tensor([5.0, 7.0]))
    assert moments == pytest.approx((4, 2.236068), abs=1e-6)
    assert sums == [4, 16.0, 84.0]


def test_running_moments_of_other_numbers():
    """Mean 3, where 3 squared is not 2 to the power of 3."""
    assert rlhf.running_moments([0, 0.0, 0.0], torch.tensor([2.0, 4.0])) == pytest.approx((3, 1))


def test_running_moments_of_many_large_scores():
    """Single precision would not do for sums of squares of a million."""
    rng, sums = np.random.default_rng(0), [0, 0.0, 0.0]
    scores = (1000 + 0.1 * rng.normal(size=(5, 200))).astype(np.float32)
    for batch in scores:
        moments = rlhf.running_moments(sums, torch.as_tensor(batch))
    exact = scores.astype(np.float64)
    assert moments == pytest.approx((exact.mean(), exact.std()), rel=1e-6)


@pytest.mark.parametrize("n", [1, 7, 128, 1000])
def test_running_moments_of_equal_scores(n):
    """A variance of 0, but for rounding, in which case it might be below 0."""
    for score in (0.1, 0.7, -1 / 3, 100.1):
        mean, std = rlhf.running_moments([0, 0.0, 0.0], torch.full((n,), score))
        assert mean == pytest.approx(score, rel=1e-5)
        assert 0 <= std < 2e-3 * abs(score)


@pytest.mark.parametrize("clip", [0.3, 10.0])
def test_running_moments_in_a_run(monkeypatch, clip):
    """Scores are normalized by all so far and clipped; the KL penalty is not."""
    scripted_scores(monkeypatch, [[1.0, 3.0], [5.0, 7.0]])
    rewards = spy(monkeypatch, rlhf, "token_rewards")
    train(reward_clip=clip, batch_size=2, total_episodes=4, num_minibatches=1)
    used = [args[0].tolist() for args, _ in rewards]
    expected = [[-1, 1], [1 / 5**0.5, 3 / 5**0.5]]
    assert used[0] == pytest.approx([np.clip(x, -clip, clip) for x in expected[0]], abs=1e-5)
    assert used[1] == pytest.approx([np.clip(x, -clip, clip) for x in expected[1]], abs=1e-5)
    assert logged("objective/scores") == [2, 6]
    assert logged("objective/scores_std") == [1, 1]


def test_running_moments_of_almost_equal_scores(monkeypatch):
    """1e-8 is added to a standard deviation of 1e-8."""
    scripted_scores(monkeypatch, [[0.0, 2e-8]])
    rewards = spy(monkeypatch, rlhf, "token_rewards")
    train(reward_clip=10.0, batch_size=2, total_episodes=2, num_minibatches=1)
    assert rewards[0][0][0].tolist() == pytest.approx([-0.5, 0.5], abs=1e-4)


def test_running_moments_are_not_used_by_default(monkeypatch):
    scripted_scores(monkeypatch, [[1.0, 300.0]])
    rewards = spy(monkeypatch, rlhf, "token_rewards")
    train(batch_size=2, total_episodes=2, num_minibatches=1)
    assert rewards[0][0][0].tolist() == [1, 300]


@pytest.mark.parametrize(
    ("gamma", "gae_lambda", "expected"),
    [
        (1.0, 0.95, (0.43675, 0.565, 0.7)),
        (1.0, 1.0, (0.5, 0.6, 0.7)),
        (1.0, 0.0, (-0.1, -0.1, 0.7)),
        (0.9, 0.95, (0.2605675, 0.4685, 0.7)),
    ],
)
@pytest.mark.parametrize("padding", [0, 1, 4])
def test_gae_hand(gamma, gae_lambda, expected, padding):
    """The last token ends the episode, whether it is EOS or there was no room for more."""
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.4, 0.3]])
    rewards, values = (pad(x, (0, padding)) for x in (rewards, values))
    mask = torch.arange(3 + padding)[None] < 3
    advantages = rlhf.response_advantages(rewards, values, mask, gamma, gae_lambda)
    assert advantages[0].tolist() == pytest.approx([*expected, *[0] * padding], abs=1e-6)


def test_gae_hand_of_responses_of_all_lengths():
    """Against the definition, the sum over k of (gamma lambda)^k delta_{t+k}."""
    rng = np.random.default_rng(0)
    mask = np.arange(6) < np.arange(1, 7)[:, None]
    rewards, values = rng.normal(size=(2, 6, 6)) * mask
    expected = np.zeros((6, 6))
    for i, t in product(range(6), range(6)):
        for k in range(i + 1 - t):
            after = values[i, t + k + 1] if t + k < i else 0.0
            delta = rewards[i, t + k] + 0.9 * after - values[i, t + k]
            expected[i, t] += (0.9 * 0.8) ** k * delta
    tensors = [torch.as_tensor(x) for x in (rewards, values, mask)]
    advantages = rlhf.response_advantages(*tensors, 0.9, 0.8)
    np.testing.assert_allclose(advantages, expected, atol=1e-6)


def test_gae_hand_in_a_run(monkeypatch):
    advantages = spy(monkeypatch, rlhf, "response_advantages")
    train(gamma=0.9, gae_lambda=0.8, total_episodes=12)
    assert [args[3:] for args, _ in advantages] == [[0.9, 0.8]]


def test_returns_not_whitened(monkeypatch):
    """They are raw advantages plus values, whatever the policy loss is given."""
    updates = spy(monkeypatch, rlhf, "ppo_gradient")
    raw = spy(monkeypatch, rlhf, "response_advantages")
    for norm_adv in (True, False):
        train(norm_adv=norm_adv, total_episodes=12, num_minibatches=1, update_epochs=1)
    (one, two), unwhitened = [args[1] for args, _ in updates], raw[0][1]
    for _, _, values, _, returns, _, mask, _ in (one, two):
        assert torch.equal(returns, unwhitened + values)
        assert (returns[~mask] == 0).all()
    whitened, mask = one[3], one[6]
    assert torch.equal(two[3], unwhitened)
    assert whitened[mask].mean().item() == pytest.approx(0, abs=1e-6)
    assert whitened[mask].std(correction=0).item() == pytest.approx(1, abs=1e-4)
    assert (whitened[~mask] == 0).all()
    assert (whitened[mask] * unwhitened[mask].std() - unwhitened[mask]).std() < 0.02


def test_whiten_the_advantages_of_a_whole_rollout(monkeypatch):
    """Mean 0 is that of the rollout; those of its minibatches differ."""
    updates = spy(monkeypatch, rlhf, "ppo_gradient")
    train(total_episodes=12, num_minibatches=4, update_epochs=1)
    means = []
    for (_, batch, rows, *_), _ in updates:
        advantages, mask = batch[3], batch[6]
        assert advantages[mask].mean().item() == pytest.approx(0, abs=1e-6)
        assert advantages[mask].std(correction=0).item() == pytest.approx(1, abs=1e-4)
        means.append(advantages[rows][mask[rows]].mean().item())
    assert len(means) == 4
    assert max(map(abs, means)) > 0.01


# ------------------------------------------------------------------------------------------------
# The loss and its gradient


@pytest.mark.parametrize(
    ("new", "target", "loss", "slope"),
    [(1.0, 0.5, 0.125, 0.5), (1.0, 2.0, 1.62, 0.0), (0.1, 2.0, 1.805, -1.9), (-1.0, -2.0, 1.62, 0)],
)
def test_value_clip(new, target, loss, slope):
    """The old value is 0, and old + 1 if all are raised by 1."""
    for shift in (0.0, 1.0):
        data = {"new_values": new + shift, "values": shift, "returns": target + shift}
        value, stats, gradients = loss_of(vf_coef=1.0, **data)
        assert value == stats["loss/value"] == pytest.approx(loss)
        assert gradients["new_values"] == pytest.approx([slope])
        assert stats["val/clipfrac"] == (slope == 0)
        scaled, _, gradients = loss_of(vf_coef=0.1, **data)
        assert scaled == pytest.approx(0.1 * loss)
        assert gradients["new_values"] == pytest.approx([0.1 * slope])


def test_value_clip_has_the_range_of_the_policy():
    loss, _, _ = loss_of(vf_coef=1.0, clip=(0.5, 9.0), new_values=1.0, returns=2.0)
    assert loss == pytest.approx(0.5 * 1.5**2)


def test_value_clip_can_be_off():
    data = {"new_values": 1.0, "returns": 2.0, "vf_coef": 1.0, "clip_vloss": False}
    loss, stats, gradients = loss_of(**data)
    assert loss == pytest.approx(0.5)
    assert gradients["new_values"] == pytest.approx([-1.0])
    assert stats["val/clipfrac"] == 0


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "has_gradient"),
    [(1.5, 1, -1.2, False), (1.5, -1, 1.5, True), (0.5, -1, 0.8, False), (0.5, 1, -0.5, True)],
)
def test_policy_clip(ratio, advantage, loss, has_gradient):
    value, stats, gradients = loss_of(logratios=math.log(ratio), advantages=advantage)
    assert value == stats["loss/policy"] == pytest.approx(loss)
    assert gradients["logratios"] == pytest.approx([loss if has_gradient else 0.0])
    assert stats["policy/clipfrac"] == 1


def test_policy_clip_and_value_loss_add_up():
    data = {"advantages": 2.0, "new_values": 0.1, "returns": 0.6, "entropies": 5.0}
    loss, _, _ = loss_of(vf_coef=0.3, **data)
    assert loss == pytest.approx(-2.0 + 0.3 * 0.125)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [(1.4, 1, -1.4, 0), (1.6, 1, -1.5, 1), (0.7, 1, -0.7, 1), (0.7, -1, 0.8, 1), (0.9, -1, 0.9, 0)],
)
def test_clip_higher(ratio, advantage, loss, clipped):
    """Down by 0.2, up by 0.5."""
    data = {"logratios": math.log(ratio), "advantages": advantage, "clip": (0.2, 0.5)}
    value, stats, _ = loss_of(**data)
    assert value == pytest.approx(loss)
    assert stats["policy/clipfrac"] == clipped


@pytest.mark.parametrize(("high", "used"), [(None, 0.3), (0.5, 0.5), (0.0, 0.0)])
def test_clip_higher_in_a_run(monkeypatch, high, used):
    """And all other settings reach the update."""
    updates = spy(monkeypatch, rlhf, "ppo_gradient")
    changes = {"vf_coef": 0.7, "clip_vloss": False, "micro_batch_size": 4, "max_grad_norm": 0.6}
    train(clip_coef=0.3, clip_coef_high=high, ptx_coef=0.1, total_episodes=12, **changes)
    expected = [0.1, 4, 0.6, "token", 0.3, used, 0.7, False, 0.0]
    assert [args[4:] for args, _ in updates] == [expected] * 4


def test_approx_kl_is_k2():
    """0.1 everywhere: 0.005; what is masked does not count."""
    logratios, mask = [0.1, -0.1, 0.1, 3.0], [True, True, True, False]
    _, stats, _ = loss_of(4, mask=mask, logratios=logratios)
    assert stats["policy/approxkl"] == pytest.approx(0.005)


def test_no_entropy_bonus():
    """Without advantages the policy has no gradient; entropies are only looked at."""
    loss, stats, gradients = loss_of(2, entropies=[1.0, 3.0], logratios=[0.1, 0.0])
    assert (loss, stats["policy/entropy"]) == (0, 2)
    assert gradients["entropies"] in (None, [0, 0])
    assert gradients["logratios"] == [0, 0]
    agent = new_agent()
    batch = random_batch(agent, random_tokens([9, 3], [8, 2]))
    batch[3] = torch.zeros_like(batch[3])
    gradients, stats = gradient(agent, batch)
    assert norm_of(gradients, "policy") == stats["policy/grad_norm"] == 0
    assert norm_of(gradients, "value_model") > 0


def test_metrics_masked_by_hand():
    """Three tokens count, a fourth does not."""
    ratios = np.array([1.5, 0.5, 1.1, 9.0])
    data = {"logratios": np.log(ratios), "advantages": [1.0, 1.0, -2.0, 50.0]}
    data |= {"values": [0.0, 0.0, 1.0, 5.0], "new_values": [1.0, 0.1, 1.1, 7.0]}
    data |= {"returns": [2.0, 2.0, 1.0, 0.0], "entropies": [1.0, 2.0, 6.0, 100.0]}
    loss, stats, _ = loss_of(4, mask=[True, True, True, False], vf_coef=0.1, **data)
    expected = {
        "loss/policy": -(1.2 + 0.5 - 2.2) / 3,
        "loss/value": 0.5 * (1.8**2 + 1.9**2 + 0.1**2) / 3,
        "policy/entropy": 3.0,
        "policy/approxkl": 0.5 * (math.log(1.5) ** 2 + math.log(0.5) ** 2 + math.log(1.1) ** 2) / 3,
        "policy/clipfrac": 2 / 3,
        "val/clipfrac": 1 / 3,
        "val/ratio": 3.1 / 3,
        "val/ratio_var": (0.25 + 0.25 + 0.01) / 3,
    }
    assert stats == pytest.approx(expected)
    assert loss == pytest.approx(stats["loss/policy"] + 0.1 * stats["loss/value"])


def test_metrics_masked_do_not_see_ten_more_columns():
    agent = new_agent()
    batch = random_batch(agent, random_tokens([9, 3, 5], [1, 8, 4]))
    gradients, stats = gradient(agent, batch)
    wider = [pad(batch[0], (0, 10), value=PAD), *(pad(x, (0, 10), value=3.0) for x in batch[1:6])]
    gradients_too, stats_too = gradient(agent, [*wider, pad(batch[6], (0, 10))])
    assert {k: v.item() for k, v in stats.items()} == pytest.approx(
        {k: v.item() for k, v in stats_too.items()}, rel=1e-5, abs=1e-7
    )
    for name, grad in gradients.items():
        assert torch.allclose(grad, gradients_too[name], atol=1e-6), name


def test_metrics_masked_in_the_log(monkeypatch):
    """Each metric of a rollout, from what the functions were given and gave back."""
    rollouts = spy(monkeypatch, rlhf, "generate")
    logprobs = spy(monkeypatch, rlhf, "response_logprobs")
    rewards = spy(monkeypatch, rlhf, "token_rewards")
    updates = spy(monkeypatch, rlhf, "ppo_gradient")
    agent = train(kl_estimator="k2", kl_coef=0.3)
    for (args, _), policy in zip(logprobs, [agent.policy, agent.reference] * 3, strict=True):
        assert args[0] is policy
    steps = sorted({step for step, *_ in metrics()})
    assert steps == [12, 24, 36]
    for i, step in enumerate(steps):
        row = {name: value for at, _, name, value in metrics() if at == step}
        tokens, sampled = rollouts[i][1]
        new, old = logprobs[2 * i][1], logprobs[2 * i + 1][1]
        (scores, has_eos, kl, mask, *_), reward = rewards[i]
        _, _, values, _, returns, *_ = updates[4 * i][0][1]
        stats = [result for _, result in updates[4 * i : 4 * i + 4]]
        assert torch.equal(mask, tokens[:, P:] != PAD)
        assert torch.equal(kl, (new - old) ** 2 / 2)
        gold = rlhf.gold_rewards(SORT, tokens)
        expected = {
            "objective/kl": (new - old).sum() / 12,
            "objective/sqrt_kl": ((new - old).sum() / 12).clamp(min=0).sqrt(),
            "objective/kl_coef": 0.3,
            "objective/entropy": -new.sum() / 12,
            "objective/scores": scores.mean(),
            "objective/scores_std": scores.std(correction=0),
            "objective/non_score_reward": -0.3 * kl.sum() / 12,
            "objective/rlhf_reward": reward.sum() / 12,
            "objective/missing_eos": (~has_eos).sum() / 12,
            "ppo/val/num_eos_tokens": (tokens[:, P:] == SORT.eos).sum(),
            "ppo/val/vpred": values[mask].mean(),
            "ppo/val/var_explained": 1
            - (returns - values)[mask].var(correction=0) / returns[mask].var(correction=0),
            "ppo/episode": step,
            "response/length": mask.sum() / 12,
            "rollout/logp_mismatch": (sampled - new).abs().max(),
            **{f"gold/{name}": value.mean() for name, value in gold.items()},
            **{f"ppo/{x}": torch.stack([s[x] for s in stats]).mean() for x in stats[0]},
        }
        variance = expected["ppo/val/ratio_var"] - (expected["ppo/val/ratio"] - 1) ** 2
        expected["ppo/val/ratio_var"] = variance
        expected = {name: float(value) for name, value in expected.items()}
        assert {x: row[x] for x in expected} == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert row["objective/kl"] > 1e-3
    assert row["ppo/val/ratio_var"] > 1e-5


def test_metrics_masked_variance_of_the_ratio(monkeypatch):
    """That of all ratios of a rollout's update, around their own mean."""

    def look(agent, minibatch, *_):
        tokens, logprobs, *_, mask = minibatch
        with torch.no_grad():
            new = rlhf.response_logprobs(agent.policy, tokens, P)
        return (new - logprobs).exp()[mask]

    ratios = before_each(monkeypatch, "ppo_loss", look)
    train(total_episodes=12, num_minibatches=1, update_epochs=3)
    ratios = torch.cat(ratios).double()
    assert abs(ratios.mean() - 1) > 1e-4
    assert logged("ppo/val/ratio") == pytest.approx([ratios.mean().item()], rel=1e-6)
    assert logged("ppo/val/ratio_var") == pytest.approx([ratios.var(correction=0).item()], rel=1e-3)


@pytest.mark.parametrize("ptx", [(None, 0.0), "demonstrations"])
def test_microbatch_rank_invariance(ptx):
    """Responses of 1 to 9 tokens, one by one or together: the same gradient and statistics."""
    agent = new_agent(response_length=9)
    tokens = random_tokens([9, 3, 5, 4, 9, 6, 7, 3], [1, 9, 9, 1, 4, 2, 9, 6], 9)
    batch = random_batch(agent, tokens)
    if ptx == "demonstrations":
        ptx = (random_tokens([5, 6, 7], [2, 9, 3], 9), 0.5)
    gradients, stats = gradient(agent, batch, micro_size=512, ptx=ptx)
    for size in (1, 2, 3, 4):
        others, other_stats = gradient(agent, batch, micro_size=size, ptx=ptx)
        for name, grad in gradients.items():
            assert torch.allclose(grad, others[name], rtol=1e-6, atol=1e-6), name
        for name, value in stats.items():
            assert value.item() == pytest.approx(other_stats[name].item(), rel=1e-5, abs=1e-7)


def test_microbatches_of_the_first_stages_have_so_many_texts(monkeypatch):
    """A pair is two of them."""
    demonstrations, others = [spy(monkeypatch, rlhf, x) for x in ("sft_loss", "reward_scores")]
    train(stages="sft,rm", micro_batch_size=4)
    assert [len(args[1]) for args, _ in demonstrations] == [4] * (64 // 4)
    assert {len(args[1]) for args, _ in others} == {4}


@pytest.mark.parametrize("stage", ["sft", "rm"])
def test_microbatch_rank_invariance_of_the_first_stages(monkeypatch, stage):
    """Gradients and metrics of steps with 7, 7 and 6 texts, or pairs, of all lengths."""
    logs, runs = spy(monkeypatch, rlhf.Run, "log"), []
    changes = {"sft_texts": 20, "sft_batch_size": 7, "rm_pairs": 20, "rm_batch_size": 7}
    for size in (512, 1, 2, 4, 6):
        with monkeypatch.context() as patch:
            steps = no_steps(patch)
            train(stages=stage, micro_batch_size=size, max_grad_norm=1e9, **changes)
        runs.append(([grads for _, grads in steps], [args[2] for args, _ in logs]))
        logs.clear()
    (gradients, metrics), *others = runs
    assert len(gradients) == 3
    assert min(max(x.abs().max() for x in grads) for grads in gradients) > 1e-3
    for gradients_too, metrics_too in others:
        for a, b in zip(chain(*gradients), chain(*gradients_too), strict=True):
            assert torch.allclose(a, b, rtol=1e-6, atol=1e-6)
        for one, two in zip(metrics, metrics_too, strict=True):
            assert one == pytest.approx(two, rel=1e-5)


def losses_of(agent, kind):
    """loss(rows) of texts of all lengths, and how many there are."""
    tokens = random_tokens([9, 3, 5, 4, 8, 6, 7, 1, 2, 9], [1, 8, 4, 2, 7, 3, 8, 5, 6, 1])
    if kind == "sft":
        num_tokens = (tokens[:, P:] != PAD).sum()
        return lambda rows: rlhf.sft_loss(agent.policy, tokens[rows], P, num_tokens), 10
    chosen, rejected = tokens.chunk(2)
    model = agent.reward_model
    return lambda rows: rlhf.rm_loss(model, chosen[rows], rejected[rows], 5)[0], 5


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("kind", ["sft", "rm"])
def test_x2_gradients_of_the_first_stages_add_up(monkeypatch, kind, size, ranks):
    """Over parts and ranks, to that of all texts at once."""
    agent = new_agent()
    loss, n = losses_of(agent, kind)
    loss(torch.arange(n)).backward()
    model = agent.policy if kind == "sft" else agent.reward_model
    wanted = [p.grad.clone() for p in model.parameters()]
    agent.zero_grad()
    for rank in range(ranks):
        as_rank(monkeypatch, rank, ranks)
        for part, factor in rlhf.micro_batches(torch.arange(n), size):
            (factor * loss(part)).backward()
    for parameter, grad in zip(model.parameters(), wanted, strict=True):
        assert torch.allclose(parameter.grad, grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("ranks", [2, 3])
def test_x2_gradients_of_ppo_add_up(monkeypatch, ranks, size):
    """And statistics: seven responses and five demonstrations, parts of which each rank has."""
    agent = new_agent()
    batch = random_batch(agent, random_tokens([9, 3, 5, 4, 9, 6, 7], [1, 8, 8, 1, 4, 2, 6]))
    ptx = (random_tokens([5, 6, 7, 8, 9], [2, 8, 3, 5, 1]), 0.5)
    wanted, stats = gradient(agent, batch, ptx=ptx)
    monkeypatch.setattr(rlhf, "add_up", lambda module, stats: None)
    shares = []
    for rank in range(ranks):
        as_rank(monkeypatch, rank, ranks)
        shares.append(gradient(agent, batch, micro_size=size, ptx=ptx))
    for name, grad in wanted.items():
        total = sum(gradients[name] for gradients, _ in shares)
        assert torch.allclose(total, grad, rtol=1e-6, atol=1e-6), name
    for name, value in stats.items():
        if "grad_norm" not in name:
            total = sum(float(stats[name]) for _, stats in shares)
            assert total == pytest.approx(value.item(), rel=1e-5, abs=1e-7)


def test_x2_gradients_are_added_up_before_they_are_clipped(monkeypatch):
    """Once, with the statistics; the norm in them is that of the sum."""
    agent, given = new_agent(), []
    batch = random_batch(agent, random_tokens([9, 3, 5], [1, 8, 4]))
    plain, plain_stats = gradient(agent, batch)

    def add_up(module, stats):
        given.append((module, {*stats}))
        for parameter in module.parameters():
            if parameter.grad is not None:
                parameter.grad *= 3

    monkeypatch.setattr(rlhf, "add_up", add_up)
    norm = plain_stats["policy/grad_norm"].item()
    clipped, stats = gradient(agent, batch, max_norm=norm)
    assert given == [(agent, {x for x in plain_stats if "grad_norm" not in x})]
    assert stats["policy/grad_norm"].item() == pytest.approx(3 * norm)
    for name, grad in plain.items():
        if "policy" in name:
            assert torch.allclose(clipped[name], grad, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 12])
def test_x2_micro_batches_of_ranks(monkeypatch, n, size, ranks):
    """Each row on one rank, once; as many steps on all, some of which do not count."""
    rows, steps = 10 + torch.randperm(n, generator=generator()), []
    for rank in range(ranks):
        as_rank(monkeypatch, rank, ranks)
        parts = [(part.tolist(), factor) for part, factor in rlhf.micro_batches(rows, size)]
        steps.append(parts)
    assert {len(parts) for parts in steps} == {math.ceil(n / ranks / size)}
    counted = [part for part, factor in chain(*steps) if factor == 1]
    others = [(part, factor) for part, factor in chain(*steps) if factor != 1]
    assert sorted(chain(*counted)) == sorted(rows.tolist())
    assert max(map(len, counted)) <= size
    assert all(part == [rows[0]] and factor == 0 for part, factor in others)
    assert bool(others) == (math.ceil(n / ranks) > n // ranks and (n // ranks) % size == 0)


@pytest.mark.parametrize(
    ("rank", "ranks", "parts"),
    [
        (0, 1, [([7, 8], 1), ([9, 5], 1), ([6], 1)]),
        (0, 2, [([7, 9], 1), ([6], 1)]),
        (1, 2, [([8, 5], 1), ([7], 0)]),
        (2, 3, [([9], 1)]),
    ],
)
def test_x2_micro_batches_by_hand(monkeypatch, rank, ranks, parts):
    as_rank(monkeypatch, rank, ranks)
    given = rlhf.micro_batches(torch.tensor([7, 8, 9, 5, 6]), 2)
    assert [(part.tolist(), factor) for part, factor in given] == parts


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize(("n", "size"), [(1, 1), (2, 5), (7, 1), (7, 2), (7, 3), (8, 100)])
def test_x2_spread_is_in_order_on_all_ranks(monkeypatch, n, size, ranks):
    seen = []

    def function(x, y):
        seen.append(len(x))
        assert not torch.is_grad_enabled()
        return x + y, 2 * y

    x, y = torch.randn(n, 3, generator=generator()), torch.randn(n, 1, generator=generator(1))
    for one, two in on_ranks(monkeypatch, ranks, lambda: rlhf.spread(function, size, x, y)):
        assert torch.equal(one, x + y)
        assert torch.equal(two, 2 * y)
    assert max(seen) == min(size, math.ceil(n / ranks))
    assert len(seen) == 2 * ranks * math.ceil(n / ranks / size)


@pytest.mark.parametrize("ranks", [2, 3])
def test_x2_samples_do_not_depend_on_the_ranks(monkeypatch, ranks):
    args, policy = settings(temperature=4.0), new_agent(temperature=4.0).policy
    prompts = random_tokens([1, 3, 8, 9, 5] * 2, [0] * 10)[:, :P]
    lines = rows_read(policy)

    def sample():
        return rlhf.sample(args, SORT, policy, prompts, np.random.default_rng(3))

    tokens, logprobs = sample()
    assert lines[0] == 10
    for tokens_too, logprobs_too in on_ranks(monkeypatch, ranks, sample):
        assert torch.equal(tokens_too, tokens)
        assert torch.allclose(logprobs_too, logprobs, atol=1e-6)
    assert max(lines[R:]) == math.ceil(10 / ranks)


def test_micro_batches_are_parts_of_the_minibatch_by_length(monkeypatch):
    agent = new_agent()
    batch = random_batch(agent, random_tokens([9, 3, 5, 4, 8, 6], [1, 8, 4, 2, 7, 3]))
    losses = spy(monkeypatch, rlhf, "ppo_loss")
    rows = torch.tensor([5, 0, 3, 2])  # responses of 3, 1, 2 and 4 tokens
    gradients, _ = gradient(agent, batch, micro_size=3, rows=rows)
    for (args, _), rows_of_part, length in zip(losses, ([0, 3, 5], [2]), (3, 4), strict=True):
        tokens, *others = args[1]
        assert torch.equal(tokens, batch[0][rows_of_part, : P + length])
        for part, whole in zip(others, batch[1:], strict=True):
            assert torch.equal(part, whole[rows_of_part, :length])
    assert [args[2] for args, _ in losses] == [(3 + 1 + 2 + 4, 0)] * 2
    alone, _ = gradient(agent, [x[rows] for x in batch])
    for name, grad in gradients.items():
        assert torch.allclose(grad, alone[name], atol=1e-6), name


def test_micro_batches_bound_what_is_scored_at_once(monkeypatch):
    """Policy, reference, value and reward model; only the sampler has the whole batch."""
    read, sizes = rlhf.read, {True: [], False: []}

    def spied(model, tokens, *first, use_cache, **options):
        sizes[use_cache].append(len(tokens))
        return read(model, tokens, *first, use_cache=use_cache, **options)

    monkeypatch.setattr(rlhf, "read", spied)
    train(stages="ppo", batch_size=12, total_episodes=12, rm_coef=1.0, micro_batch_size=5)
    assert sizes[True][:2] == [12, 12]  # prompts, then first tokens
    assert max(sizes[True][2:]) <= 12
    assert max(sizes[False]) == 5


@pytest.mark.parametrize("stage", ["sft", "rm"])
@pytest.mark.parametrize(("size", "most"), [(1, 1), (2, 2), (6, 6), (512, 8)])
def test_micro_batches_bound_what_is_learned_from_at_once(monkeypatch, stage, size, most):
    """A demonstration is one text and a pair two, which are never apart."""
    sizes = before_each(monkeypatch, "response_logprobs", lambda policy, tokens, *_: len(tokens))
    pairs = before_each(monkeypatch, "rm_loss", lambda model, chosen, *_: len(chosen))
    train(stages=stage, sft_batch_size=8, rm_batch_size=4, micro_batch_size=size)
    assert {"sft": max(sizes, default=0), "rm": 2 * max(pairs, default=0)} == {
        "sft": most * (stage == "sft"),
        "rm": max(2, most) * (stage == "rm"),
    }


@pytest.mark.parametrize("size", [1, 5])
def test_micro_batches_do_not_change_a_run(size):
    one, two = train(micro_batch_size=512), train(micro_batch_size=size)
    for name, weight in weights(one).items():
        assert torch.allclose(weight, weights(two)[name], atol=1e-4), name


@pytest.mark.parametrize("large", ["policy", "value_model"])
def test_grad_clip_of_each_network_by_itself(large):
    """A gradient of norm 10 becomes one of 0.5; that of the other network, of 0.1, stays."""
    agent = new_agent()
    batch = random_batch(agent, random_tokens([9, 3, 5], [1, 8, 4]))
    gradients, _ = gradient(agent, batch, vf_coef=1.0)
    norms = {name: norm_of(gradients, name) for name in ("policy", "value_model")}
    wanted = {"policy": 0.1, "value_model": 0.1} | {large: 10.0}
    batch[3] = batch[3] * wanted["policy"] / norms["policy"]
    vf_coef = wanted["value_model"] / norms["value_model"]
    raw, _ = gradient(agent, batch, vf_coef=vf_coef)
    clipped, stats = gradient(agent, batch, vf_coef=vf_coef, max_norm=0.5)
    for name, norm in wanted.items():
        assert norm_of(raw, name) == pytest.approx(norm, rel=1e-5)
        assert norm_of(clipped, name) == pytest.approx(min(norm, 0.5), rel=1e-4)
    assert stats["policy/grad_norm"].item() == pytest.approx(wanted["policy"], rel=1e-5)
    assert stats["val/grad_norm"].item() == pytest.approx(wanted["value_model"], rel=1e-5)
    for name, grad in raw.items():
        factor = 0.05 if large in name else 1.0
        assert torch.allclose(clipped[name], factor * grad, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("stage", ["sft", "rm"])
def test_grad_clip_of_the_first_stages(monkeypatch, stage):
    """The norm in the log is that before."""
    steps = no_steps(monkeypatch)
    train(stages=stage, max_grad_norm=0.01)
    norms = [torch.stack([grad.norm() for grad in grads]).norm().item() for _, grads in steps]
    assert norms == pytest.approx([0.01] * 2, rel=1e-3)
    assert min(logged(f"{stage}/grad_norm")) > 0.02


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_grad_clip_of_gradients_that_do_not_accumulate(monkeypatch, stage):
    """Without steps, the second pass has the gradient of the first."""
    steps = no_steps(monkeypatch)
    changes = {"sft_epochs": 2, "sft_batch_size": 64, "rm_epochs": 2, "rm_batch_size": 16}
    changes |= {"update_epochs": 2, "num_minibatches": 1, "total_episodes": 12}
    train(stages=stage, max_grad_norm=1e9, **changes)
    (_, one), (_, two) = steps
    assert len(one) == len(two) > 10
    if stage != "ppo":
        norms = [torch.stack([grad.norm() for grad in x]).norm().item() for x in (one, two)]
        assert logged(f"{stage}/grad_norm") == pytest.approx(norms, rel=1e-5)
    for a, b in zip(one, two, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5)


def test_losses_of_the_two_networks_are_apart():
    """The policy has no gradient from values, the value model none from advantages."""
    agent = new_agent()
    batch = random_batch(agent, random_tokens([9, 3, 5], [1, 8, 4]))
    gradients, _ = gradient(agent, batch, vf_coef=0.0)
    assert norm_of(gradients, "value_model") == 0 < norm_of(gradients, "policy")
    more, _ = gradient(agent, batch, vf_coef=3.0)
    assert norm_of(more, "value_model") > 0
    for name in gradients:
        if "policy" in name:
            assert torch.equal(gradients[name], more[name])
    assert not any("reference" in name or "reward" in name for name in more)


def test_ptx_grad():
    """On top of PPO's: -27.8 times that of the mean log-likelihood of the demonstrations."""
    agent = new_agent()
    batch = random_batch(agent, random_tokens([9, 3, 5], [1, 8, 4]))
    demonstrations = random_tokens([5, 6, 7, 3], [2, 8, 3, 1])
    alone, _ = gradient(agent, batch)
    total, _ = gradient(agent, batch, ptx=(demonstrations, 27.8))
    agent.zero_grad()
    logprobs = rlhf.response_logprobs(agent.policy, demonstrations, P)
    (logprobs.sum() / 14).backward()
    for name, parameter in agent.named_parameters():
        if "policy" in name:
            wanted = -27.8 * parameter.grad
            assert torch.allclose(total[name] - alone[name], wanted, rtol=1e-4, atol=1e-5), name
        elif "value_model" in name:
            assert torch.equal(total[name], alone[name])


def test_ptx_grad_in_a_run(monkeypatch):
    """Eight new demonstrations for each episode of a minibatch, none in the critic's warm-up."""
    updates = spy(monkeypatch, rlhf, "ppo_gradient")
    train(ptx_coef=0.5, critic_warmup=1, total_episodes=24, ptx_ratio=8)
    given = [args[3] for args, _ in updates]
    assert given[:4] == [None] * 4
    for tokens in given[4:]:
        assert tokens.shape == (8 * 6, P + R)
        assert (tokens == SORT.eos).sum(1).tolist() == [1] * 48
    assert len({tuple(tokens.flatten().tolist()) for tokens in given[4:]}) == 4
    assert [args[4] for args, _ in updates] == [0.5] * 8


def test_ptx_grad_is_off_by_default(monkeypatch):
    updates = spy(monkeypatch, rlhf, "ppo_gradient")
    texts = spy(monkeypatch, rlhf, "write_texts")
    train()
    assert [args[3] for args, _ in updates] == [None] * 12
    assert [len(args) for args, _ in texts] == [2] * 3  # prompts alone
    assert [len(args[1]) for args, _ in texts] == [12] * 3


# ------------------------------------------------------------------------------------------------
# The loop


def test_adam_eps_step_is_one_half_on_a_gradient_of_1e_5(monkeypatch):
    made = spy(monkeypatch, torch.optim, "AdamW")
    train(stages="sft,rm,ppo", total_episodes=12)
    monkeypatch.undo()
    assert len(made) == 3
    for _, optimizer in made:
        names = ("betas", "eps", "weight_decay", "amsgrad", "maximize")
        options = {name: optimizer.defaults[name] for name in names}
        assert options["betas"] == (0.9, 0.999)
        assert options["weight_decay"] == 0.01
        parameter = nn.Parameter(torch.zeros(()))
        parameter.grad = torch.tensor(1e-5)
        torch.optim.AdamW([parameter], lr=1.0, **options).step()
        assert parameter.item() == pytest.approx(-0.5, abs=1e-6)


def test_lr_schedule_of_ppo(monkeypatch):
    """1, 0.8, 0.6, 0.4, 0.2 in five updates, the same for all minibatches of an update."""
    steps = no_steps(monkeypatch)
    train(learning_rate=1.0, value_learning_rate=0.5, total_episodes=60)
    assert len(steps) == 5 * 4
    rates = np.array([rates for rates, _ in steps])
    assert rates[:, 0] == pytest.approx(np.repeat([1, 0.8, 0.6, 0.4, 0.2], 4))
    assert rates[:, 1] == pytest.approx(rates[:, 0] / 2)
    assert logged("ppo/lr") == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])


def test_lr_schedule_can_be_off(monkeypatch):
    steps = no_steps(monkeypatch)
    train(learning_rate=0.3, value_learning_rate=0.5, anneal_lr=False)
    assert [rates for rates, _ in steps] == [[0.3, 0.5]] * 12


@pytest.mark.parametrize("anneal_lr", [True, False])
def test_lr_schedule_of_the_first_stages(monkeypatch, anneal_lr):
    """Linear to zero in six steps, whatever PPO's learning rate does."""
    steps = no_steps(monkeypatch)
    changes = {"sft_texts": 20, "sft_batch_size": 8, "sft_epochs": 2, "sft_learning_rate": 6.0}
    changes |= {"rm_pairs": 10, "rm_batch_size": 4, "rm_epochs": 2, "rm_learning_rate": 0.6}
    train(stages="sft,rm", anneal_lr=anneal_lr, **changes)
    rates = [rates for rates, _ in steps]
    assert [*chain(*rates[:6])] == pytest.approx([6, 5, 4, 3, 2, 1])
    assert [*chain(*rates[6:])] == pytest.approx([0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    assert logged("sft/lr") == pytest.approx([6, 5, 4, 3, 2, 1])
    assert logged("rm/lr") == pytest.approx([0.6, 0.5, 0.4, 0.3, 0.2, 0.1])


@pytest.mark.parametrize(
    ("policy", "value", "policy_moves", "value_moves"),
    [
        (1e-2, None, True, True),
        (0.0, None, False, False),
        (1e-2, 0.0, True, False),
        (0.0, 1e-2, False, True),
    ],
)
def test_learning_rates_of_the_two_networks(policy, value, policy_moves, value_moves):
    agent = train(learning_rate=policy, value_learning_rate=value)
    assert same(weights(agent.policy), weights(agent.reference)) != policy_moves
    assert same(weights(agent.value_model), weights(agent.reward_model)) != value_moves


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_first_ratio_is_one(monkeypatch, temperature):
    """In the first minibatch of each rollout, for every token; not in the next ones."""

    def look(agent, minibatch, *_):
        tokens, logprobs, *_, mask = minibatch
        assert agent.training
        with torch.no_grad():
            new = agent(tokens)[0].log_prob(tokens[:, P:].clamp(min=0))
        return ((new - logprobs).exp() - 1)[mask].abs().max().item()

    errors = before_each(monkeypatch, "ppo_loss", look)
    losses = spy(monkeypatch, rlhf, "ppo_loss")
    train(temperature=temperature)
    assert max(errors[::4]) < 1e-6
    assert min(errors[1:4] + errors[5:8] + errors[9:]) > 1e-3
    for _, (_, stats) in losses[::4]:
        assert stats["policy/approxkl"] < 1e-12
        assert stats["policy/clipfrac"] == 0
    assert 0 <= max(logged("rollout/logp_mismatch")) < 1e-4


def test_first_ratio_is_one_because_log_probabilities_are_computed_again(monkeypatch):
    """A sampler that is wrong by a half changes nothing but the metric that says so."""
    original, plain = rlhf.sample, train()

    def sample(*args):
        tokens, logprobs = original(*args)
        logprobs[3, 0] -= 0.5
        return tokens, logprobs

    monkeypatch.setattr(rlhf, "sample", sample)
    wrong = train(exp_name="wrong")
    assert same(weights(plain), weights(wrong))
    (path,) = Path().glob("runs/*wrong*/metrics.csv")
    mismatches = re.findall(r"rollout/logp_mismatch,(.+)", path.read_text())
    assert [float(x) for x in mismatches] == pytest.approx([0.5] * 3, abs=1e-4)


@pytest.mark.parametrize("critic_warmup", [0, 1])
def test_kl_zero_at_start(monkeypatch, critic_warmup):
    """Of every token, exactly, as long as the policy has not learned anything."""
    estimates = spy(monkeypatch, rlhf, "kl_estimate")
    train(stages="sft,ppo", temperature=0.7, critic_warmup=critic_warmup, rm_coef=0.0)
    for (logratio, _), _ in estimates[: critic_warmup + 1]:
        assert (logratio == 0).all()
    for (logratio, _), _ in estimates[critic_warmup + 1 :]:
        assert logratio.abs().max() > 1e-3


def test_kl_zero_at_start_of_a_second_run(monkeypatch):
    """PPO starts from the SFT policy, not from what PPO made of it before."""
    first = train(total_episodes=12)
    assert not same(weights(first.policy), weights(first.reference))
    (path,) = Path().glob("runs/*/checkpoint.pt")
    estimates = spy(monkeypatch, rlhf, "kl_estimate")
    second = train(total_episodes=12, load=str(path), seed=2)
    ((logratio, _), _) = estimates[0]
    assert (logratio == 0).all()
    assert same(weights(first.reference), weights(second.reference))


def test_frozen_models(monkeypatch):
    """Three updates change policy and value model, nothing else."""
    before = before_each(monkeypatch, "train_ppo", lambda args, task, agent, run: weights(agent))
    made = spy(monkeypatch, torch.optim, "AdamW")
    agent = train(stages="sft,rm,ppo")
    after = weights(agent)
    unchanged = {x for x in after if torch.equal(after[x], before[0][x])}
    assert unchanged == {x for x in after if x.startswith(("reference.", "reward_model."))}
    for model in (agent.reference, agent.reward_model):
        assert not any(p.requires_grad for p in model.parameters())
    assert all(p.grad is None for p in agent.reference.parameters())
    for model in (agent.policy, agent.value_model):
        assert all(p.requires_grad for p in model.parameters())
    groups = made[-1][1].param_groups
    assert len(groups) == 2
    for group, model in zip(groups, (agent.policy, agent.value_model), strict=True):
        assert {*map(id, group["params"])} == {*map(id, model.parameters())}


def test_attention_by_hand():
    """Softmax of q k / sqrt(d) over what is visible, two heads, then the network, both residual."""
    torch.manual_seed(3)
    block, x = rlhf.Block(8, 2).double(), torch.randn(1, 3, 8, dtype=torch.float64)
    visible = torch.ones(3, 3, dtype=torch.bool).tril()[None, None]
    q, k, v = block.qkv(block.norm1(x))[0].chunk(3, dim=1)
    heads = []
    for rows in (slice(0, 4), slice(4, 8)):
        scores = (q[:, rows] @ k[:, rows].T / 2).masked_fill(~visible[0, 0], -torch.inf)
        heads.append(scores.softmax(-1) @ v[:, rows])
    y = x + block.out(torch.cat(heads, dim=1))
    y = y + block.down(torch.nn.functional.gelu(block.up(block.norm2(y))))
    torch.testing.assert_close(block(x, visible, None)[0], y)


def test_reward_model_has_no_words():
    """A head for a number is all that its language model ends in."""
    agent = new_agent()
    for model in (agent.reward_model, agent.value_model):
        assert [name for name in model.state_dict() if "lm_head" in name] == []
    assert "model.lm_head.weight" in agent.policy.state_dict()


def test_value_init_is_the_reward_model():
    """Its normalized head with it; at EOS, both say the same. No two models share a weight."""
    agent = train(stages="sft,rm,ppo", learning_rate=0.0)
    assert same(weights(agent.value_model), weights(agent.reward_model))
    assert agent.value_model.head.bias.item() != 0
    tokens = random_tokens([9, 3], [4, 8])
    tokens[1, -1] = SORT.eos
    with torch.no_grad():
        scores = rlhf.reward_scores(agent.reward_model, tokens)
        values = agent.value_model(tokens)
    assert torch.equal(values[[0, 1], [P + 3, P + 7]], scores)
    models = (agent.policy, agent.reference, agent.reward_model, agent.value_model)
    pointers = [p.data_ptr() for model in models for p in model.parameters()]
    assert len(pointers) == len(set(pointers))


@pytest.mark.parametrize(("value_init", "rm_coef"), [("sft", 1.0), ("rm", 0.0), ("sft", 0.0)])
def test_value_init_is_zero_without_the_reward_model(monkeypatch, value_init, rm_coef):
    """The trunk of the SFT model, a head of zeros: first returns are sums of rewards to come."""
    advantages = spy(monkeypatch, rlhf, "response_advantages")
    updates = spy(monkeypatch, rlhf, "ppo_gradient")
    changes = {"value_init": value_init, "rm_coef": rm_coef, "gae_lambda": 1.0}
    agent = train(stages="sft,rm,ppo", learning_rate=0.0, total_episodes=12, **changes)
    expected = weights(agent.reference.model.base_model)
    assert same(weights(agent.value_model.model), expected)
    assert (agent.value_model.head.weight == 0).all()
    assert agent.value_model.head.bias.item() == 0
    (rewards, values, *_), _ = advantages[0]
    assert (values == 0).all()
    returns = updates[0][0][1][4]
    to_come = rewards.flip(1).cumsum(1).flip(1)
    assert torch.allclose(returns, to_come, atol=1e-5)


@pytest.mark.parametrize("k", [0, 2])
def test_critic_warmup(monkeypatch, k):
    """For k iterations the policy stays as it is, bit by bit, and the critic learns."""

    def look(agent, *_):
        return weights(agent.policy), weights(agent.value_model)

    seen = before_each(monkeypatch, "ppo_gradient", look)
    agent = train(critic_warmup=k, total_episodes=48)
    seen.append(look(agent))
    assert len(seen) == 4 * 4 + 1
    moved = [not same(a, b) for (a, _), (b, _) in pairwise(seen)]
    assert moved == [i >= 4 * k for i in range(16)]
    assert not any(same(a, b) for (_, a), (_, b) in pairwise(seen))
    norms = logged("ppo/policy/grad_norm")
    assert [norm > 0 for norm in norms] == [i >= k for i in range(4)]
    assert min(logged("ppo/val/grad_norm")) > 0


@pytest.mark.parametrize("micro_batch_size", [512, 1])
@pytest.mark.parametrize(("update_epochs", "num_minibatches"), [(4, 1), (1, 4), (3, 2)])
def test_step_count(monkeypatch, update_epochs, num_minibatches, micro_batch_size):
    steps = no_steps(monkeypatch)
    updates = spy(monkeypatch, rlhf, "ppo_gradient")
    changes = {"update_epochs": update_epochs, "num_minibatches": num_minibatches}
    train(total_episodes=30, micro_batch_size=micro_batch_size, **changes)
    assert len(steps) == len(updates) == 2 * update_epochs * num_minibatches
    rows = [args[2].tolist() for args, _ in updates]
    assert {len(row) for row in rows} == {12 // num_minibatches}
    for i in range(0, len(rows), num_minibatches):
        assert sorted(chain(*rows[i : i + num_minibatches])) == [*range(12)]


def test_step_count_each_with_a_gradient_of_its_own(monkeypatch):
    """Nothing is left of the minibatch before, in either network."""
    original, left = rlhf.ppo_gradient, []

    def ppo_gradient(agent, *args):
        left.extend(name for name, p in agent.named_parameters() if p.grad is not None)
        return original(agent, *args)

    monkeypatch.setattr(rlhf, "ppo_gradient", ppo_gradient)
    train(update_epochs=2, num_minibatches=2, critic_warmup=0)
    assert left == []


def test_step_count_of_iterations():
    """1,000 episodes are one batch of 512; what is left is not sampled."""
    assert settings(total_episodes=1000, batch_size=512).num_iterations == 1
    assert settings(total_episodes=1024, batch_size=512).num_iterations == 2
    assert settings(batch_size=512, num_minibatches=8).minibatch_size == 64
    train(total_episodes=40)
    assert logged("ppo/episode") == [12, 24, 36]


def test_permutations(monkeypatch):
    """A new one in each epoch and rollout; the same for the same seed."""
    no_steps(monkeypatch)
    updates = spy(monkeypatch, rlhf, "ppo_gradient")
    for seed in (1, 1, 2):
        train(seed=seed, total_episodes=24, num_minibatches=1, update_epochs=3)
    orders = [tuple(args[2].tolist()) for args, _ in updates]
    assert all(sorted(order) == [*range(12)] for order in orders)
    assert orders[:6] == orders[6:12]
    assert len({*orders[:6], *orders[12:]}) == 12
    assert tuple(range(12)) not in orders
    (first, *_), (other, *_) = updates[0], updates[1]
    for a, b in zip(first[1], other[1], strict=True):
        assert torch.equal(a, b)
