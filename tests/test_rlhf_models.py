"""Models of Hugging Face in ppo_rlhf.py by numbers: one of each kind of tiny.py, and its traps."""

import contextlib
import hashlib
import io
import json
import logging
import math
import re
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn.functional import pad

import ppo_rlhf as rlhf
import tiny
from conftest import command_line, spy

pytestmark = pytest.mark.xdist_group("rlhf_models")

PAD = rlhf.PAD
KINDS = list(tiny.KINDS)
CHATS = [kind for kind in KINDS if "template" in tiny.KINDS[kind]]
CLASSIFIERS = [kind for kind in KINDS if kind != "granite"]
TIED = ["gpt2", "gemma", "granite"]

SMALL = "--no-cuda --response-length 8 --update-epochs 1 --num-minibatches 2 --critic-warmup 0 "
SMALL += "--sft-batch-size 4 --rm-batch-size 4 --rm-pairs 64 --rm-test-pairs 4 --batch-size 8 "
SMALL += "--total-episodes 16 --eval-episodes 4 --checkpoint-every 1 --learning-rate 1e-3 "
SMALL += "--value-learning-rate 1e-3 --sft-learning-rate 1e-3 --rm-learning-rate 1e-3"
LENGTH = "def length(completions):\n    return [float(len(text)) for text in completions]\n"


# ------------------------------------------------------------------------------------------------
# Models, texts and runs that the tests share


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    """What is no folder is not looked for elsewhere."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a model of each kind, and with demonstrations, pairs and prompts."""
    folder = tmp_path_factory.mktemp("files")
    for kind in KINDS:
        tiny.save_model(folder / kind, kind)
    texts = [text.split() for text in tiny.TEXTS]
    halves = [(" ".join(x[: len(x) // 2]), " ".join(x[len(x) // 2 :])) for x in texts]
    for name in ("chat", "plain"):

        def prompt(text, chat=name == "chat"):
            return [{"role": "user", "content": text}] if chat else text

        def answer(text, chat=name == "chat"):
            return [{"role": "assistant", "content": text}] if chat else " " + text

        demonstrations = [{"prompt": prompt(a), "completion": answer(b)} for a, b in halves]
        pairs = [
            {"prompt": prompt(a), "chosen": answer(b), "rejected": answer(c)}
            for (a, b), (_, c) in zip(halves, halves[1:] + halves[:1], strict=True)
        ]
        write(folder / f"{name}-sft.jsonl", demonstrations)
        write(folder / f"{name}-pref.jsonl", pairs)
        write(folder / f"{name}-prompts.jsonl", [{"prompt": prompt(a)} for a, _ in halves])
    (folder / "length.py").write_text(LENGTH)
    return folder


def flags(files, kind, *names, model=None):
    """The command line of a small run; names: its data, `sft`, `pref`, `prompts`."""
    style = "chat" if kind in CHATS else "plain"
    flag = {"sft": "--sft-data", "pref": "--pref-data", "prompts": "--prompts"}
    data = [x for name in names for x in (flag[name], f"{files / style}-{name}.jsonl")]
    return ["--model", str(model or files / kind), *data, *SMALL.split()]


def rewarded(files):
    return ["--reward-fn", f"{files / 'length.py'}:length"]


@contextlib.contextmanager
def captured():
    """What is printed meanwhile, with what transformers logs: two strings, once it is over."""
    out, err = io.StringIO(), io.StringIO()
    handlers = [x for x in logging.getLogger("transformers").handlers if hasattr(x, "setStream")]
    streams = [handler.setStream(err) for handler in handlers]
    printed = SimpleNamespace(out="", err="")
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            yield printed
    finally:
        printed.out, printed.err = out.getvalue(), err.getvalue()
        for handler, stream in zip(handlers, streams, strict=True):
            handler.setStream(stream)


def call(*argv):
    """The command line in this process: agent, exit code, folder of the run, what was printed."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    folders, agent, code = [], None, 0
    init = rlhf.Run.__init__

    def spy_init(run, *args):
        init(run, *args)
        folders.append(run.folder.absolute())

    with pytest.MonkeyPatch.context() as patch, captured() as printed:
        patch.setattr(rlhf.Run, "__init__", spy_init)
        try:
            args = rlhf.parse_args([str(x) for x in argv])
            rlhf.check_args(args)
            agent = rlhf.train(args)
        except SystemExit as error:
            code = error.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    folder = folders[0] if folders else None
    return SimpleNamespace(agent=agent, code=code, folder=folder, **vars(printed))


def ran(*argv):
    run = call(*argv)
    assert run.code == 0, run.err
    return run


def refused(*argv):
    """The one line of a command that is refused before there is a folder."""
    run = call(*argv)
    (line,) = run.err.splitlines()
    assert (run.code, run.out, run.folder) == (2, "", None)
    assert line.startswith("error: ")
    assert not Path("runs").exists()
    return line


def start(*argv):
    """Arguments, task and models as `train` makes them, before it learns."""
    args = rlhf.parse_args([str(x) for x in argv])
    rlhf.check_args(args)
    torch.manual_seed(args.seed)
    task = rlhf.Texts(args.model, args)
    task.load(args)
    return args, task, rlhf.Agent(task, args)


def started(files, kind, *more):
    return start(*flags(files, kind, "sft", "pref", "prompts"), *more)


def twice(patch, name, seen):
    """Each call of a loss of rlhf is done twice: both results."""
    original = getattr(rlhf, name)

    def wrapper(*args):
        result, again = original(*args), original(*args)
        pair = [x[0] if isinstance(x, tuple) else x for x in (result, again)]
        seen.setdefault(name, []).append([x.item() for x in pair])
        return result

    patch.setattr(rlhf, name, wrapper)


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory):
    """All stages for a kind of model, run once, and what was seen meanwhile."""
    runs = {}

    def run(kind):
        if kind not in runs:
            folder = tmp_path_factory.mktemp(kind)
            losses, saved, save = {}, [], rlhf.Run.save_checkpoint

            def spy_save(run):
                save(run)
                data = torch.load(run.folder / "checkpoint.pt", weights_only=True)
                stats = {path.name: path.stat() for path in run.folder.glob("re*.pt")}
                stats = {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}
                saved.append((data["stage"], data["step"], {*data["models"]}, stats))

            with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
                for name in ("sft_loss", "rm_loss", "ppo_loss"):
                    twice(patch, name, losses)
                gradients = spy(patch, rlhf, "ppo_gradient")
                patch.setattr(rlhf.Run, "save_checkpoint", spy_save)
                runs[kind] = ran(*flags(files, kind, "sft", "pref", "prompts"))
            first = {name: value.item() for name, value in gradients[0][1].items()}
            vars(runs[kind]).update(losses=losses, first=first, saved=saved, cwd=folder)
        return runs[kind]

    return run


def logged(folder, name):
    """The values of a metric in a run's own folder."""
    lines = (folder / "metrics.csv").read_text().splitlines()[1:]
    cells = [line.split(",") for line in lines]
    return [float(value) for _, _, key, value in cells if key == name]


def rows(folder):
    """metrics.csv as text, all but what tells the time."""
    cells = [x.split(",") for x in (folder / "metrics.csv").read_text().splitlines()]
    return [(x[0], *x[2:]) for x in cells if not x[2].startswith(("time/", "perf/"))]


def uniforms(n, response_length, seed=0):
    """What `generate` draws n responses with."""
    return torch.as_tensor(np.random.default_rng(seed).random((n, response_length)))


def causal(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def classifier(folder):
    auto = transformers.AutoModelForSequenceClassification
    return auto.from_pretrained(folder, dtype=torch.float32)


def tokenizer_of(folder):
    return transformers.AutoTokenizer.from_pretrained(folder)


def alone(row):
    """tokens [S] -> the same without padding [1, s]"""
    return row[row != PAD][None]


@torch.no_grad()
def their_logprobs(model, num_tokens, tokens, prompt_length):
    """What transformers says of each response, read alone, without padding and cache [B, R]"""
    result = torch.zeros(tokens[:, prompt_length:].shape)
    for line, row in zip(result, tokens, strict=True):
        ids, n = alone(row), (row[prompt_length:] != PAD).sum()
        logits = model(ids).logits[0, -n - 1 : -1, :num_tokens]
        line[:n] = logits.log_softmax(-1).gather(1, ids[0, -n:, None])[:, 0]
    return result


@torch.no_grad()
def their_score(model, ids):
    """The head at the last of the ids, whatever transformers takes for padding."""
    return model.score(model.base_model(torch.tensor([ids])).last_hidden_state)[0, -1].item()


def all_logits(policy, tokens):
    """What a policy says at every column [B, S, num_tokens]"""
    return policy(tokens, tokens.shape[1])[0]


def ragged(task):
    """Demonstrations as tokens: prompts and responses of several lengths, some without EOS."""
    lengths = sorted(len(task.ids(row)[1]) for row in task.files["sft"])
    response_length = lengths[len(lengths) // 2]
    tokens = rlhf.write_texts(task, task.files["sft"], response_length)
    assert len({*(tokens[:, : task.prompt_length] == PAD).sum(1).tolist()}) > 1
    assert len({*task.ended(tokens[:, task.prompt_length :]).tolist()}) == 2
    return tokens


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ------------------------------------------------------------------------------------------------
# All stages


@pytest.mark.parametrize("kind", KINDS)
def test_all_stages(kind, finished):
    run = finished(kind)
    assert len(logged(run.folder, "sft/loss")) == 3 and len(logged(run.folder, "rm/loss")) == 2
    assert len(logged(run.folder, "objective/kl")) == 2
    assert len(logged(run.folder, "eval/ppo/proxy")) == 1
    assert "error" not in run.err and f"written to runs/{kind}__ppo_rlhf__1__" in run.out
    last = torch.load(run.folder / "checkpoint.pt", weights_only=True)
    assert last["stage"] == len(rlhf.STAGES)
    assert {line.split(":")[0] for line in run.err.splitlines()} <= {"warning"}


@pytest.mark.parametrize("kind", KINDS)
def test_first_ratio_is_one(kind, finished):
    run = finished(kind)
    assert run.first["val/ratio"] == pytest.approx(1, abs=1e-5)
    assert run.first["val/ratio_var"] < 1e-8 and run.first["policy/approxkl"] < 1e-8
    kl = logged(run.folder, "objective/kl")
    assert abs(kl[0]) < 1e-5 and abs(kl[1]) > 1e-5  # something was learned, and it is seen
    assert max(logged(run.folder, "rollout/logp_mismatch")) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_learning_rate_0_leaves_ratio_1_and_kl_0(kind, files):
    still = ["--learning-rate=0", "--update-epochs=2", *rewarded(files)]
    run = ran(*flags(files, kind, "prompts"), *still, "--stages=ppo")
    assert logged(run.folder, "ppo/val/ratio") == pytest.approx([1, 1], abs=1e-5)
    assert logged(run.folder, "ppo/policy/approxkl") == pytest.approx([0, 0], abs=1e-8)
    assert logged(run.folder, "objective/kl") == pytest.approx([0, 0], abs=1e-5)
    before = causal(files / kind)
    assert same(run.agent.policy.model.state_dict(), before.state_dict())
    assert not same(run.agent.value_model.model.state_dict(), before.base_model.state_dict())


@pytest.mark.slow
def test_subprocess_is_the_same_run(finished, files):
    """Nothing but warnings of the script on the standard error, and the same numbers."""
    done = command_line("rlhf", *flags(files, "gpt2", "sft", "pref", "prompts"))
    assert done.returncode == 0, done.stderr
    assert all(line.startswith("warning: ") for line in done.stderr.splitlines())
    (folder,) = Path("runs").iterdir()
    assert rows(folder) == rows(finished("gpt2").folder)
    one, other = (
        load_file(x / "policy/model.safetensors") for x in (folder, finished("gpt2").folder)
    )
    assert same(one, other)


@pytest.mark.parametrize("names", [["sft"], ["sft", "prompts"], ["prompts"]], ids="-".join)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_stages_without_a_reward_model(kind, names, files):
    """What is run follows from the data; --reward-fn says what a text is worth."""
    run = ran(*flags(files, kind, *names), *rewarded(files)[: 2 * ("prompts" in names)])
    assert run.agent.reward_model is None
    assert not (run.folder / "reward_model").exists() and (run.folder / "policy").exists()
    counts = [len(logged(run.folder, name)) for name in ("sft/loss", "objective/kl", "eval/ppo/kl")]
    assert counts == [3 * ("sft" in names), 2 * ("prompts" in names), "prompts" in names]
    assert (run.folder / "reference.pt").exists() and not (run.folder / "reward_model.pt").exists()
    again = ran("--resume", run.folder)
    assert same(again.agent.policy.state_dict(), run.agent.policy.state_dict())


def test_defaults_of_a_model_need_no_memory(files):
    """All pairs of a file, whatever their number is bounded by."""
    args, task, agent = started(files, "gpt2", "--rm-pairs=1000000")
    run = SimpleNamespace(device=torch.device("cpu"), numbers={})
    chosen, rejected, margins = rlhf.preference_pairs(args, task, agent, run)
    assert len(chosen) == len(rejected) == len(task.files["pref"]) == len(margins)


# ------------------------------------------------------------------------------------------------
# The sampler


@pytest.mark.parametrize("kind", KINDS)
def test_first_tokens_follow_the_softmax(kind, files):
    """Chi-squared of 4,096 tokens, against the logits of transformers' own forward."""
    _, task, agent = started(files, kind)
    ids = torch.tensor([task.ids({"prompt": "to be"})[0]])
    tokens, _ = rlhf.generate(agent.policy, ids.expand(4096, -1), 1, task.ended, uniforms(4096, 1))
    with torch.no_grad():
        logits = causal(files / kind)(ids).logits[0, -1]
    num_tokens = len(tokenizer_of(files / kind))
    expected = 4096 * logits[:num_tokens].softmax(0)
    counts = torch.bincount(tokens[:, -1], minlength=num_tokens)
    assert len(counts) == num_tokens
    often = expected >= 5
    cells = [torch.cat([x[often], x[~often].sum()[None]]) for x in (counts.float(), expected)]
    chi_squared = ((cells[0] - cells[1]) ** 2 / cells[1]).sum().item()
    freedom = len(cells[0]) - 1
    assert freedom > 20
    assert abs(chi_squared - freedom) < 5 * (2 * freedom) ** 0.5


def test_generation_config_changes_nothing(files):
    """That of llama would leave five tokens, and none of them twice."""
    config = transformers.GenerationConfig.from_pretrained(files / "llama")
    assert (config.top_k, config.min_new_tokens, config.repetition_penalty) == (5, 4, 1.5)
    _, task, agent = started(files, "llama")
    ids = torch.tensor([task.ids({"prompt": "to be"})[0]])
    tokens, _ = rlhf.generate(agent.policy, ids.expand(4096, -1), 1, task.ended, uniforms(4096, 1))
    assert len(tokens[:, -1].unique()) > 20 * config.top_k


def test_unused_rows_are_never_sampled(files):
    _, task, agent = started(files, "qwen2")
    prompts = rlhf.write_texts(task, task.files["prompts"])
    with torch.no_grad():
        logits = rlhf.read(agent.policy.model, prompts).logits[:, -1]
    num_tokens = len(tokenizer_of(files / "qwen2"))
    assert logits.shape[-1] >= num_tokens + 64
    assert logits.softmax(-1)[:, num_tokens:].sum(1).min() > 0.99
    prompts = prompts.repeat(8, 1)
    drawn = uniforms(len(prompts), 16)
    tokens, _ = rlhf.generate(agent.policy, prompts, 16, task.ended, drawn)
    assert tokens.max() < num_tokens
    assert (tokens[:, task.prompt_length :] >= num_tokens - 20).any()  # the last are no gap


@pytest.mark.parametrize(
    "kind, ends",
    [
        ("qwen2", ["<|im_end|>", "<|endoftext|>"]),
        ("llama", ["<|eot_id|>", "<|end_of_text|>"]),  # where generation_config has other plans
        ("gpt_neox", ["<|endoftext|>"]),  # which is 0, and padding
        ("gemma", ["<eos>"]),  # although the template ends a turn with another
    ],
)
def test_any_eos_ends_a_response(kind, ends, files):
    """[H4] From the first token on."""
    _, task, agent = started(files, kind)
    ends = tokenizer_of(files / kind).convert_tokens_to_ids(ends)
    assert {*task.ends} == {*ends} and task.ends[0] == ends[0]

    def more_ends(_, inputs, output):
        output.logits[..., ends] = output.logits[..., : task.num_tokens].logsumexp(-1, True) - 1.5
        return output

    agent.policy.model.register_forward_hook(more_ends)
    prompts = rlhf.write_texts(task, task.files["prompts"]).repeat(16, 1)
    tokens, logprobs = rlhf.generate(
        agent.policy, prompts, 6, task.ended, uniforms(len(prompts), 6)
    )
    responses = tokens[:, task.prompt_length :]
    is_end = torch.isin(responses, torch.tensor(ends))
    lengths = (responses != PAD).sum(1)
    assert (is_end.sum(1) <= 1).all()
    assert torch.equal(is_end.any(1), task.ended(responses)) and not is_end.any(1).all()
    at = lengths[is_end.any(1)]
    assert torch.equal(is_end[is_end.any(1)].int().argmax(1) + 1, at)  # nothing comes behind it
    assert {*at.tolist()} == {*range(1, 7)}
    assert {*responses[is_end].tolist()} == {*ends}
    assert torch.equal(logprobs == 0, responses == PAD)


def test_eos_that_is_padding_is_learned(files):
    """gpt_neox: the gradient on the logit of EOS is p - 1, where EOS comes next."""
    _, task, agent = started(files, "gpt_neox")
    assert task.tokenizer.pad_token_id == task.tokenizer.eos_token_id == 0
    tokens, P = rlhf.write_texts(task, task.files["sft"], None), task.prompt_length
    logits = []

    def keep(_, inputs, output):
        output.logits.retain_grad()
        logits.append(output.logits)

    agent.policy.model.register_forward_hook(keep)
    responses = tokens[:, P:]
    count = (responses != PAD).sum()
    rlhf.sft_loss(agent.policy, tokens, P, count).backward()
    said = logits[-1].view(*responses.shape, -1)  # of all responses at once
    grad, p = (x.view_as(said)[..., 0] for x in (logits[-1].grad, said.softmax(-1)))
    assert torch.equal((responses == 0).sum(1), torch.ones(len(tokens), dtype=torch.long))
    torch.testing.assert_close(grad[responses == 0], (p[responses == 0] - 1) / count)
    assert grad[responses == 0].abs().min() * count > 0.5


def test_eos_that_is_padding_is_judged(files):
    """gpt_neox: the reward model reads EOS; transformers would read the token before it."""
    _, task, agent = started(files, "gpt_neox")
    tokens = rlhf.write_texts(task, task.files["sft"], None)
    without = tokens.masked_fill(tokens == 0, PAD)
    with torch.no_grad():
        scores = rlhf.reward_scores(agent.reward_model, tokens)
        assert (scores - rlhf.reward_scores(agent.reward_model, without)).abs().min() > 1e-3
        for row, score in zip(tokens, scores, strict=True):
            assert row[row != PAD][-1] == 0
            hidden = agent.reward_model.model(alone(row)).last_hidden_state[0, -1]
            assert agent.reward_model.head(hidden).item() == pytest.approx(score.item(), abs=1e-5)


# ------------------------------------------------------------------------------------------------
# Padding, the cache, dropout, precision


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(kind, files):
    """[H7] Logits, values and scores: of texts alone, in a batch, with more padding on the left"""
    _, task, agent = started(files, kind)
    tokens = ragged(task)
    with torch.no_grad():
        for left in (0, 3, 8):
            batch = pad(tokens, (left, 0), value=PAD)
            logits = all_logits(agent.policy, batch)
            values = agent.value_model(batch)
            scores = rlhf.reward_scores(agent.reward_model, batch)
            for i, row in enumerate(batch):
                ids, there = alone(row), row != PAD
                expected = all_logits(agent.policy, ids)[0]
                assert expected.abs().max() > 3
                atol = 1e-5 if kind == "gpt2" else 3e-5  # the others see 1e-5 of rounding
                torch.testing.assert_close(logits[i, there], expected, rtol=0, atol=atol)
                expected = agent.value_model(ids)[0]
                torch.testing.assert_close(values[i, there], expected, rtol=0, atol=1e-5)
                expected = rlhf.reward_scores(agent.reward_model, ids)[0]
                torch.testing.assert_close(scores[i], expected, rtol=0, atol=1e-5)
                assert expected == agent.reward_model(ids)[0, -1]


@pytest.mark.parametrize("kind", KINDS)
def test_cached_is_full_is_transformers(kind, files):
    """Log-probabilities of the sampler, of the trainer and of transformers alone agree."""
    _, task, agent = started(files, kind)
    P, prompts = task.prompt_length, rlhf.write_texts(task, task.files["prompts"])
    drawn = uniforms(len(prompts), 24)
    tokens, cached = rlhf.generate(agent.policy, prompts, 24, task.ended, drawn)
    with torch.no_grad():
        full = rlhf.response_logprobs(agent.policy, tokens, P)
    assert cached.min() < -3 and tokens.shape[1] == P + 24
    torch.testing.assert_close(cached, full, rtol=0, atol=5e-5)
    model = causal(files / kind)
    theirs = their_logprobs(model, len(task.tokenizer), tokens, P)
    torch.testing.assert_close(full, theirs, rtol=0, atol=5e-5)
    if kind in ("gemma", "granite"):  # the head alone would not do
        with torch.no_grad():
            ids = alone(tokens[0])
            naive = model.lm_head(model.base_model(ids).last_hidden_state)
            assert (naive - model(ids).logits).abs().max() > 1


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_has_no_effect(kind, finished, files):
    """[H9] Each loss of a whole run, computed twice, is the same number."""
    run = finished(kind)
    for name, least in (("sft_loss", 3), ("rm_loss", 2), ("ppo_loss", 4)):
        assert len(run.losses[name]) >= least
        assert all(first == second for first, second in run.losses[name]), name
        assert len({first for first, _ in run.losses[name]}) >= least
    dropouts = [x for x in run.agent.modules() if isinstance(x, torch.nn.Dropout)]
    assert not any(dropout.training for dropout in dropouts)
    if kind in ("gpt2", "gpt_neox"):
        assert sum(dropout.p >= 0.3 for dropout in dropouts) >= 4 * 3
        _, task, agent = started(files, kind)
        tokens = ragged(task)
        with torch.no_grad():
            one, again = (all_logits(agent.policy, tokens) for _ in range(2))
            assert torch.equal(one, again)
            agent.policy.train()
            assert (
                all_logits(agent.policy, tokens) - one
            ).abs().max() > 1  # what there is to switch off


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_in_single_precision(kind, finished, files):
    """[H19] Whatever the file has; llama's has bfloat16."""
    before = load_file(files / kind / "model.safetensors")
    on_disk = torch.bfloat16 if kind == "llama" else torch.float32
    assert {x.dtype for x in before.values()} == {on_disk}
    run = finished(kind)
    names = ("policy", "reference", "reward_model", "value_model")
    for name in names:
        dtypes = {x.dtype for x in getattr(run.agent, name).parameters()}
        assert dtypes == {torch.float32}, name
    after = load_file(run.folder / "policy" / "model.safetensors")
    assert {x.dtype for x in after.values()} == {torch.float32}
    matrices = [x for x in after.values() if x.ndim == 2]
    changed = [(x.bfloat16().float() != x).float().mean() for x in matrices]
    assert min(changed) > 0.3  # no step was rounded away


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_stay_tied(kind, finished):
    run = finished(kind)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(run.folder / "policy")
    for model in (run.agent.policy.model, run.agent.reference.model, loaded):
        rows, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        assert (rows.data_ptr() == head.data_ptr()) == (kind in TIED)
        assert torch.equal(rows, head) == (kind in TIED)
        assert model.config.tie_word_embeddings == (kind in TIED)
    names = load_file(run.folder / "policy" / "model.safetensors").keys()
    assert bool(names & {"lm_head.weight", "embed_out.weight"}) == (kind not in TIED)


# ------------------------------------------------------------------------------------------------
# Export


@pytest.mark.parametrize("kind", KINDS)
def test_exported_policy(kind, finished, files):
    run = finished(kind)
    folder = run.folder / "policy"
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    task = rlhf.Texts(files / kind, SimpleNamespace(stop=()))
    ids = torch.tensor([task.ids({"prompt": tiny.TEXTS[0]})[0]])
    with torch.no_grad():
        ours, theirs, before = (
            model(ids).logits for model in (run.agent.policy.model, loaded, causal(files / kind))
        )
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-6)
    assert (before - ours).abs().max() > 1e-2
    one, other = tokenizer_of(folder), tokenizer_of(files / kind)
    assert one.chat_template == other.chat_template and len(one) == len(other)
    assert (one.chat_template is None) == (kind not in CHATS)
    for text in [*tiny.TEXTS, "雪が降る", "مرحبا 🎉 <|endoftext|>", " two  spaces\n\n"]:
        assert one(text).input_ids == other(text).input_ids
    names = ("eos_token_id", "pad_token_id", "bos_token_id", "padding_side")
    assert all(getattr(one, name) == getattr(other, name) for name in names)
    assert rlhf.Texts(folder, SimpleNamespace(stop=())).ends == task.ends


def exported_texts(task, tokenizer):
    """Texts with EOS at their end: as tokens of the script, and as the tokenizer reads them."""
    tokens = rlhf.write_texts(task, task.files["sft"], None)
    texts = [tokenizer.decode(row[row != PAD].tolist()) for row in tokens]
    batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    for ids, mask, row in zip(batch.input_ids, batch.attention_mask, tokens, strict=True):
        assert ids[mask.bool()].tolist() == row[row != PAD].tolist()
    assert (batch.attention_mask == 0).any()
    return tokens, batch


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_exported_reward_model(kind, finished, files):
    run = finished(kind)
    folder = run.folder / "reward_model"
    auto = transformers.AutoModelForSequenceClassification
    loaded, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert loaded.config.num_labels == 1 and abs(loaded.config.reward_offset) > 1e-3
    _, task, _ = started(files, kind)
    tokens, batch = exported_texts(task, tokenizer_of(folder))
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    with torch.no_grad():
        theirs = loaded(**inputs).logits[:, 0] + loaded.config.reward_offset
        ours = rlhf.reward_scores(run.agent.reward_model, tokens)
    assert ours.std() > 0.1
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    one, other = tokenizer_of(folder), tokenizer_of(files / kind)
    own = other.pad_token_id not in (None, *task.ends)  # padding that ends no text
    assert one.pad_token == (other.pad_token if own else "<|padding|>")
    assert len(one) == len(other) + (not own)
    assert one.chat_template == other.chat_template
    assert all(one(text).input_ids == other(text).input_ids for text in tiny.TEXTS)


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_exported_reward_model_again(kind, finished, files):
    """--reward-model with what a run has written: its numbers, and its tokens are the policy's."""
    run = finished(kind)
    again = ["--reward-model", run.folder / "reward_model"]
    args, task, agent = start(*flags(files, kind, "sft", "prompts"), *again)
    tokens = rlhf.write_texts(task, task.files["sft"], None)
    score = rlhf.score_function(args, task, agent, None)
    with torch.no_grad():
        expected = rlhf.reward_scores(run.agent.reward_model, tokens)
    torch.testing.assert_close(score(task.files["sft"], tokens), expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.1 and agent.reward_model.head.bias.abs() > 1e-3
    assert task.judge is task
    second = ran(*flags(files, kind, "prompts"), *again, "--total-episodes=8")
    assert same(second.agent.reward_model.state_dict(), agent.reward_model.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_no_classifier_of_granite(kind, finished):
    run, notice = finished(kind), "a granite has no sequence classifier; reward_model.pt has all"
    assert run.out.splitlines().count(notice) == (kind == "granite")
    assert (run.folder / "reward_model").exists() == (kind != "granite")
    data = torch.load(run.folder / "reward_model.pt", weights_only=True)
    assert same(data, run.agent.reward_model.state_dict())


@pytest.mark.parametrize("part", ["policy", "reward_model"])
@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_card(kind, part, finished, files):
    """README.md has the settings, the SHA-256 of the data and the last values."""
    run = finished(kind)
    text = (run.folder / part / "README.md").read_text()
    _, header, body = text.split("---\n", 2)
    assert f"base_model: {files / kind}\n" in header
    assert f"# {part} of {run.folder.name}\n" in body
    settings, hashes, last = body.split("\n## ")[1:]
    lines = settings.splitlines()
    for line in ("- sft_learning_rate: 0.001", "- num_minibatches: 2", f"- model: {files / kind}"):
        assert line in lines
    style = "chat" if kind in CHATS else "plain"
    names = ["sft", "pref", "prompts"]
    for path in [f"{files / style}-{name}.jsonl" for name in names]:
        data = Path(path).read_bytes()
        assert f"- {path}: {hashlib.sha256(data).hexdigest()}" in hashes.splitlines()
    pairs = [line[2:].split(": ") for line in last.splitlines() if line.startswith("- ")]
    values = {name: float(value) for name, value in pairs}
    assert ("objective/kl" in values) == (part == "policy")
    for name in values.keys() & {"rm/accuracy", "sft/loss", "objective/kl"}:
        assert values[name] == pytest.approx(logged(run.folder, name)[-1], rel=1e-6), name
    assert {"rm/accuracy", "sft/loss"} < values.keys()


# ------------------------------------------------------------------------------------------------
# Other models than the policy


@pytest.fixture(scope="module")
def judges(files):
    """Reward models with a vocabulary of their own, and one with that of gpt2."""
    for kind in ("gpt2", "llama", "qwen2", "gemma"):
        tiny.save_classifier(files / f"judge-{kind}", kind, seed=3, tokenizer_seed=1)
    tiny.save_classifier(files / "score-gpt2", "gpt2", seed=3)
    return files


def written(tokenizer, ends, prompt, response):
    """prompt and response as strings -> ids as a program that knows no policy would write them"""
    if isinstance(prompt, str):
        ids = tokenizer(prompt).input_ids
        return ids + tokenizer(response, add_special_tokens=False).input_ids + ends[:1]
    messages = [*prompt, {"role": "assistant", "content": response}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    start = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    n = len(tokenizer(start, add_special_tokens=False).input_ids)
    found = [i for i, token in enumerate(ids[n:], n) if token in ends]
    return ids[: found[0] + 1] if found else ids + ends[:1]


@pytest.mark.parametrize(
    "kind, judge, end",
    [
        ("llama", "qwen2", "<|im_end|>"),
        ("qwen2", "llama", "<|eot_id|>"),
        ("llama", "llama", "<|eot_id|>"),
        ("gpt2", "gpt2", "<|endoftext|>"),
        ("gpt_neox", "gemma", "<eos>"),
    ],
)
def test_h32_scores_are_those_of_the_texts(kind, judge, end, judges):
    """A reward model with another tokenizer reads the texts in its own words and template."""
    folder = judges / f"judge-{judge}"
    more = ["--reward-model", folder, "--value-init=sft"]
    args, task, agent = start(*flags(judges, kind, "sft", "prompts"), *more)
    sampled = task.files["prompts"]
    prompts = rlhf.write_texts(task, sampled)
    tokens, _ = rlhf.sample(args, task, agent.policy, prompts, np.random.default_rng(0))
    told = rlhf.write_texts(task, task.files["sft"], args.response_length)
    all_rows, all_tokens = sampled + task.files["sft"], torch.cat([tokens, told])
    scores = rlhf.score_function(args, task, agent, None)(all_rows, all_tokens)

    model, words, theirs = classifier(folder), tokenizer_of(judges / kind), []
    tokenizer = tokenizer_of(folder)
    ends = [tokenizer.convert_tokens_to_ids(end)]
    for row, line in zip(all_rows, all_tokens[:, task.prompt_length :].tolist(), strict=True):
        response = words.decode([x for x in line if x != PAD], skip_special_tokens=True)
        ids = written(tokenizer, ends, row["prompt"], response)
        theirs.append(their_score(model, ids))
    assert scores.tolist() == pytest.approx(theirs, abs=1e-5)
    assert scores.std() > 0.1
    with torch.no_grad():  # the same numbers of tokens would mean something else
        assert (rlhf.reward_scores(agent.reward_model, all_tokens) - scores).abs().max() > 0.1


@pytest.mark.parametrize("kind, judge", [("gpt2", "gpt2"), ("llama", "qwen2")])
def test_h32_value_model_cannot_be_the_reward_model(kind, judge, judges):
    argv = [*flags(judges, kind, "prompts"), "--reward-model", judges / f"judge-{judge}"]
    line = refused(*argv)
    assert "--value-init rm" in line and "tokenizer" in line
    run = ran(*argv, "--value-init=sft")
    assert logged(run.folder, "objective/scores_std")[0] > 0.1
    texts = [json.loads(x) for x in open(run.folder / "samples.jsonl")]
    scores = [text["score"] for text in texts if "policy" not in text]
    assert len(scores) == 8 and np.mean(scores) == pytest.approx(
        logged(run.folder, "objective/scores")[0], abs=1e-5
    )


def test_value_model_that_is_a_classifier(judges):
    """And not the reward model, which it would start as."""
    tiny.save_classifier("scores", "gpt2", seed=7)
    still = ["--learning-rate=0", "--value-learning-rate=0", "--reward-model=scores"]
    run = ran(*flags(judges, "gpt2", "prompts"), *still, "--value-model", judges / "score-gpt2")
    model = classifier(judges / "score-gpt2")
    assert same(run.agent.value_model.model.state_dict(), model.base_model.state_dict())
    ids = torch.arange(20)[None]
    with torch.no_grad():
        theirs = model.score(model.base_model(ids).last_hidden_state)[..., 0]
        torch.testing.assert_close(run.agent.value_model(ids), theirs, rtol=0, atol=1e-5)
        assert theirs.std() > 0.1


def test_value_model_that_is_a_causal_model(files):
    tiny.save_model("other", "gpt2", seed=5)
    still = ["--learning-rate=0", "--value-learning-rate=0", *rewarded(files), "--value-init=sft"]
    run = ran(*flags(files, "gpt2", "prompts"), *still, "--value-model=other")
    assert same(run.agent.value_model.model.state_dict(), causal("other").base_model.state_dict())
    assert same(run.agent.policy.model.state_dict(), causal(files / "gpt2").state_dict())


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_kl_is_to_the_reference_model(kind, files, monkeypatch):
    """At iteration 1, by hand, from two models as transformers loads them."""
    tiny.save_model("other", kind, seed=5)
    samples = spy(monkeypatch, rlhf, "sample")
    more = ["--learning-rate=0", "--ref-model=other", *rewarded(files), "--stages=ppo"]
    run = ran(*flags(files, kind, "prompts"), *more)
    (tokens, _), task = samples[0][1], samples[0][0][1]
    models = [causal(x) for x in (files / kind, "other")]
    ours, theirs = (
        their_logprobs(model, len(task.tokenizer), tokens, task.prompt_length) for model in models
    )
    kl = (ours - theirs).sum(1).mean().item()
    assert abs(kl) > 1
    assert logged(run.folder, "objective/kl")[0] == pytest.approx(kl, abs=1e-3)
    assert same(run.agent.reference.model.state_dict(), models[1].state_dict())
    assert same(run.agent.policy.model.state_dict(), models[0].state_dict())


def test_reference_model_stays_through_all_stages(files):
    tiny.save_model("other", "gpt2", seed=5)
    run = ran(*flags(files, "gpt2", "sft", "pref", "prompts"), "--ref-model=other")
    assert same(run.agent.reference.model.state_dict(), causal("other").state_dict())
    assert abs(logged(run.folder, "objective/kl")[0]) > 1


def test_reference_model_starts_nothing_else(files, monkeypatch):
    """Reward model and value model start as the SFT policy, not as what the KL is measured to."""
    tiny.save_model("other", "gpt2", seed=5)
    more = ["--ref-model=other", "--rm-learning-rate=0", "--learning-rate=0"]
    more += ["--value-learning-rate=0", "--value-init=sft"]
    run = ran(*flags(files, "gpt2", "sft", "pref", "prompts"), *more)
    sft = run.agent.policy.model.base_model.state_dict()
    assert same(run.agent.reward_model.model.state_dict(), sft)
    assert same(run.agent.value_model.model.state_dict(), sft)


@pytest.mark.parametrize("value_init", ["rm", "sft"])
def test_reference_model_of_another_size(value_init, files):
    tiny.save_model("other", "gpt2", seed=5, num_hidden_layers=1)
    more = ["--ref-model=other", f"--value-init={value_init}"]
    run = ran(*flags(files, "gpt2", "sft", "pref", "prompts"), *more)
    assert abs(logged(run.folder, "objective/kl")[0]) > 0.1


# ------------------------------------------------------------------------------------------------
# Checkpoints


def stop_at(patch, stage, step):
    """As a signal during this step would."""
    steps = rlhf.Run.steps

    def patched(run, name, *args):
        for number in steps(run, name, *args):
            if (name, number) == (stage, step):
                run.signal = signal.SIGINT
            yield number

    patch.setattr(rlhf.Run, "steps", patched)


@pytest.mark.parametrize("kind, stage", [("gpt2", "ppo"), ("qwen2", "ppo"), ("gemma", "rm")])
def test_resume_bitexact(kind, stage, finished, files):
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, stage, 1)
        stopped = call(*flags(files, kind, "sft", "pref", "prompts"))
    assert stopped.code == 130
    assert not (stopped.folder / "policy.pt").exists()
    before = {x.name: x.stat().st_mtime_ns for x in stopped.folder.glob("re*.pt")}
    assert len(before) == (2 if stage == "ppo" else 1)
    assert len(logged(stopped.folder, "objective/kl")) == (stage == "ppo")
    run, whole = ran("--resume", stopped.folder), finished(kind)
    assert run.folder == stopped.folder
    assert all((run.folder / name).stat().st_mtime_ns == time for name, time in before.items())
    assert rows(run.folder) == rows(whole.folder)
    assert same(run.agent.state_dict(), whole.agent.state_dict())
    for name in ("policy/model.safetensors", "reward_model/model.safetensors"):
        assert same(load_file(run.folder / name), load_file(whole.folder / name))


def test_resume_bitexact_with_a_reference_model(files):
    """What sft has learned is not what the KL is measured to, and must not be lost in rm."""
    tiny.save_model("other", "gpt2", seed=5)
    argv = [*flags(files, "gpt2", "sft", "pref", "prompts"), "--ref-model=other"]
    whole = ran(*argv)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, "rm", 1)
        stopped = call(*argv)
    assert stopped.code == 130
    run = ran("--resume", stopped.folder)
    assert rows(run.folder) == rows(whole.folder)
    assert same(run.agent.state_dict(), whole.agent.state_dict())


@pytest.mark.parametrize("flag", ["--ref-model", "--reward-model", "--value-model"])
def test_models_given_win_over_those_loaded(flag, finished, judges):
    path = judges / "score-gpt2"
    if flag == "--ref-model":
        path = tiny.save_model("other", "gpt2", seed=5)
    still = ["--stages=ppo", "--learning-rate=0", "--value-learning-rate=0"]
    run = ran("--load", finished("gpt2").folder, *still, flag, path)
    expected = causal(path) if flag == "--ref-model" else classifier(path).base_model
    part = getattr(run.agent, {"--ref-model": "reference"}.get(flag, flag[2:].replace("-", "_")))
    assert same(part.model.state_dict(), expected.state_dict())


def first_iteration(folder):
    """Of PPO: KL and score before the policy has learned."""
    return [logged(folder, name)[0] for name in ("objective/kl", "objective/scores")]


@pytest.mark.parametrize("later", [False, True])
def test_ppo_again_starts_from_sft_beside_a_reference_model(later, files):
    """Not from where PPO has arrived; whether the reference is given from the first or later."""
    tiny.save_model("other", "gpt2", seed=5)
    argv = [*flags(files, "gpt2", "sft", "prompts"), *rewarded(files)]
    reference = ["--ref-model=other"]
    first = ran(*argv, *reference * (not later))
    again = ran("--load", first.folder, "--stages=ppo", *reference)
    whole = first if not later else ran(*argv, *reference)
    assert first_iteration(again.folder) == first_iteration(whole.folder)
    assert abs(logged(whole.folder, "objective/kl")[-1] - first_iteration(whole.folder)[0]) > 0.1


def test_ppo_again_without_the_policy_of_sft_refused(files):
    """With a reference model only the run of sft has it."""
    tiny.save_model("other", "gpt2", seed=5)
    sft = ran(*flags(files, "gpt2", "sft"))
    more = ["--prompts", f"{files / 'plain'}-prompts.jsonl", *rewarded(files), "--ref-model=other"]
    ppo = ran("--load", sft.folder, "--stages=ppo", *more)
    run = call("--load", ppo.folder, "--stages=ppo")
    assert run.code == 2
    assert run.err.splitlines()[-1].endswith("has no policy but PPO's; --load the run of sft")


def test_half_of_sft_cannot_be_loaded(files):
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, "sft", 2)
        stopped = call(*flags(files, "gpt2", "sft", "prompts"), *rewarded(files))
    assert stopped.code == 130
    run = call("--load", stopped.folder, "--stages=ppo")
    assert (run.code, run.folder) == (2, None)
    assert "needs what sft learns" in run.err


def test_pairs_and_reward_models_count_after_a_run_of_sft_alone(files, judges):
    """Whose --rm-coef was 0."""
    sft = ran(*flags(files, "gpt2", "sft"))
    prompts = ["--prompts", f"{files / 'plain'}-prompts.jsonl"]
    pairs = ["--pref-data", f"{files / 'plain'}-pref.jsonl"]
    run = ran("--load", sft.folder, *prompts, *pairs, *rewarded(files))
    assert logged(run.folder, "rm/accuracy") and (run.folder / "reward_model").is_dir()
    path = judges / "score-gpt2"
    run = ran("--load", sft.folder, *prompts, "--reward-model", path, "--stages=ppo")
    assert same(run.agent.reward_model.model.state_dict(), classifier(path).base_model.state_dict())
    run = ran("--load", sft.folder, *prompts, *rewarded(files))
    assert run.agent.reward_model is None and not logged(run.folder, "rm/accuracy")


def test_a_loaded_reward_model_is_left_out_with_rm_coef_0(finished, files):
    more = ["--rm-coef=0", *rewarded(files), "--stages=ppo"]
    assert ran("--load", finished("gpt2").folder, *more).agent.reward_model is None


def test_a_head_that_nothing_trains_is_refused_after_load_too(finished, files):
    """But not that of the same model, which the run before has trained."""
    prompts = ["--prompts", f"{files / 'plain'}-prompts.jsonl", "--stages=ppo"]
    run = call("--load", finished("gpt2").folder, *prompts, "--reward-model", files / "gpt2")
    assert (run.code, run.folder) == (2, None)
    assert "has no head that says what a text is worth" in run.err
    more = ["--reward-model", files / "gpt2"]
    trained = ran(*flags(files, "gpt2", "sft", "pref", "prompts"), *more)
    again = ran("--load", trained.folder, "--stages=ppo", "--learning-rate=0")
    models = [run.agent.reward_model.state_dict() for run in (again, trained)]
    assert same(*models)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_have_what_learns(kind, finished):
    run = finished(kind)
    learns = {0: {"policy"}, 1: {"reward_model"}, 2: {"policy", "value_model"}}
    stages = [stage for stage, *_ in run.saved]
    assert stages == sorted(stages) and {*stages} == {0, 1, 2, 3, 4}
    for stage, _, models, stats in run.saved:
        assert models == learns.get(stage, {"policy"})
        names = {"reference.pt": 1, "reward_model.pt": 2}
        assert {*stats} == {name for name, since in names.items() if stage >= since}
    for name in ("reference.pt", "reward_model.pt"):
        written = [stats[name] for *_, stats in run.saved if name in stats]
        assert len(written) >= 4 and len({*written}) == 1
    data = torch.load(run.folder / "checkpoint.pt", weights_only=True)
    paths = [run.folder / f"{name}.pt" for name in ("reference", "reward_model")]
    hashes = {path.stem: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    assert data["frozen"] == hashes
    assert same(torch.load(paths[0], weights_only=True), run.agent.reference.state_dict())


@pytest.mark.parametrize("option", ["--resume", "--load"])
@pytest.mark.parametrize("how", ["changed", "missing"])
@pytest.mark.parametrize("name", ["reference.pt", "reward_model.pt"])
def test_frozen_model_refused(name, how, option, finished):
    shutil.copytree(finished("gpt2").folder, "copy")
    path = Path("copy") / name
    if how == "changed":
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    else:
        path.unlink()
    line = refused(option, "copy")
    assert name in line


# ------------------------------------------------------------------------------------------------
# What is refused


def spoil(folder, how):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    if how == "nan":
        name = sorted(tensors)[0]
        tensors[name].view(-1)[3] = math.nan
        save_file(tensors, path, metadata={"format": "pt"})
    elif how == "incomplete":
        del tensors[sorted(tensors)[0]]
        save_file(tensors, path, metadata={"format": "pt"})
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "no config":
        (folder / "config.json").unlink()


@pytest.mark.parametrize(
    "how, hints",
    [
        ("missing", ["nowhere"]),
        ("no config", ["model"]),
        ("nan", ["not finite"]),
        ("incomplete", ["lacks weights: transformer.h.0."]),
        ("truncated", ["model"]),
    ],
)
@pytest.mark.parametrize("flag", ["--model", "--ref-model", "--reward-model", "--value-model"])
def test_model_refused(how, hints, flag, files):
    folder = Path("nowhere")
    if how != "missing":
        folder = Path(shutil.copytree(files / "gpt2", "model"))
        spoil(folder, how)
    argv = flags(files, "gpt2", "pref", "prompts") + rewarded(files)
    line = refused(*argv, flag, folder)
    assert all(hint in line for hint in hints)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_too_few_rows_refused(kind, files):
    folder = tiny.save_model("model", kind, vocab_size=300)
    line = refused(*flags(files, kind, "sft", model=folder))
    assert "300 rows" in line and str(len(tokenizer_of(folder))) in line


def test_positions_that_end(files):
    """gpt2 has 256: as many are read, one more is refused."""
    argv = flags(files, "gpt2", "prompts") + rewarded(files)
    _, task, _ = start(*argv)
    room = 256 - task.prompt_length
    _, task, agent = start(*argv, f"--response-length={room}")
    whole = torch.zeros(1, 256, dtype=torch.long)
    with torch.no_grad():
        agent.policy.model(whole)
        with pytest.raises(IndexError):
            agent.policy.model(pad(whole, (0, 1)))
    line = refused(*argv, f"--response-length={room + 1}")
    assert "--response-length" in line and "256" in line


def test_pairs_longer_than_the_positions(files):
    """Of a model that reads 256 tokens: refused, or left out with a notice; no traceback."""
    long = {"prompt": "to be", "chosen": " to be" * 300, "rejected": " or"}
    short = {"prompt": "to be", "chosen": " or not", "rejected": " that is"}
    write(Path("pairs.jsonl"), [short] * 4 + [long])
    line = refused(
        *flags(files, "gpt2"), "--pref-data=pairs.jsonl", "--stages=rm", *rewarded(files)
    )
    assert "pairs.jsonl" in line and "256" in line


def test_reward_model_with_fewer_positions(files):
    """Than prompts and responses have."""
    tiny.save_classifier("short", "gpt2", max_position_embeddings=16)
    line = refused(*flags(files, "gpt2", "prompts"), "--reward-model=short")
    assert "short" in line and "16" in line


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "granite"])
@pytest.mark.parametrize("name, flag", [("sft", "--sft-data"), ("prompts", "--prompts")])
def test_chat_without_a_template_refused(name, flag, kind, files):
    path = f"{files / 'chat'}-{name}.jsonl"
    line = refused(*flags(files, kind), *rewarded(files), flag, path)
    assert f"{path}, line 1: " in line and "chat_template" in line


def test_transformers_not_installed(files, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    line = refused(*flags(files, "gpt2", "sft"))
    assert "pip install transformers" in line


def test_classifier_of_two_labels_refused(files):
    tiny.save_classifier("two", "gpt2", num_labels=2)
    line = refused(*flags(files, "gpt2", "prompts"), "--reward-model=two")
    assert "two" in line and re.search(r"\b2\b", line)


def test_classifier_with_another_head_refused(files):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_labels": 1}
    config = transformers.RobertaConfig(vocab_size=400, intermediate_size=32, **sizes)
    transformers.RobertaForSequenceClassification(config).save_pretrained("roberta")
    tokenizer = transformers.AutoTokenizer.from_pretrained(files / "gpt2")
    tokenizer.save_pretrained("roberta")
    line = refused(*flags(files, "gpt2", "prompts"), "--reward-model=roberta")
    assert line.endswith("roberta says 1 numbers of a text, not one by a layer `score`")


def test_a_model_without_keys_and_values_refused(files):
    """Its state would be forgotten from token to token."""
    config = transformers.MambaConfig(vocab_size=400, hidden_size=16, num_hidden_layers=1)
    config.eos_token_id = 256
    transformers.MambaForCausalLM(config).save_pretrained("mamba")
    transformers.AutoTokenizer.from_pretrained(files / "gpt2").save_pretrained("mamba")
    run = call(*flags(files, "gpt2", "prompts", model="mamba"), *rewarded(files))
    assert (run.code, run.folder) == (2, None)
    words = "mamba is no Transformer: no keys and values to sample with"
    assert run.err.splitlines()[-1] == f"error: {words}"


def test_a_judge_without_a_template_for_chats_refused(files, judges):
    """Before anything is learned."""
    argv = flags(files, "qwen2", "sft", "prompts")
    line = refused(*argv, "--reward-model", judges / "judge-gpt2")
    assert "chat-prompts.jsonl, line 1: " in line and "template" in line


def test_ptx_without_demonstrations_refused(files):
    line = refused(*flags(files, "gpt2", "prompts"), *rewarded(files), "--ptx-coef=0.1")
    assert line == "error: --ptx-coef of a --model needs --sft-data"


def test_an_evaluation_asks_for_each_text_once(files):
    """Two columns, two calls; one more for each iteration of PPO."""
    counting = "import pathlib\n\ndef count(completions):\n"
    counting += "    with open('calls', 'a') as file:\n        file.write('x')\n"
    Path("count.py").write_text(counting + "    return [0.0] * len(completions)\n")
    ran(*flags(files, "gpt2", "prompts"), "--reward-fn=count.py:count")
    assert Path("calls").read_text() == "x" * (2 + 2)


def test_reward_model_without_a_head_refused(files):
    """A causal model that no pairs train: its scores would be random numbers."""
    line = refused(*flags(files, "gpt2", "prompts"), "--reward-model", files / "gpt2")
    assert "--reward-model" in line or "--pref-data" in line


def test_reward_model_without_a_head_learns_from_pairs(files):
    more = ["--reward-model", files / "gpt2", "--rm-learning-rate=0"]
    run = ran(*flags(files, "gpt2", "sft", "pref", "prompts"), *more)
    trained = run.agent.reward_model.model.state_dict()
    assert same(trained, causal(files / "gpt2").base_model.state_dict())  # and not the SFT policy
    assert not same(trained, run.agent.reference.model.base_model.state_dict())
    assert len(logged(run.folder, "rm/loss")) == 2


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_classifier_as_a_model_refused(kind, files):
    """Its head for words would be random, or that of the embeddings."""
    tiny.save_classifier("classifier", kind)
    line = refused(*flags(files, kind, "sft", model="classifier"))
    assert "classifier" in line


@pytest.mark.parametrize("flag", ["--ref-model", "--value-model"])
def test_model_with_another_tokenizer_refused(flag, files):
    """It reads the tokens of the policy, which would mean something else to it."""
    tiny.save_model("other", "gpt2", tokenizer_seed=1)
    line = refused(*flags(files, "gpt2", "prompts"), *rewarded(files), flag, "other")
    assert flag in line or "other" in line
