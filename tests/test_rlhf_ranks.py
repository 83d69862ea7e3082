"""[X2] ppo_rlhf.py in several processes learns what it does in one; --fsdp divides its models."""

import csv
import functools
import gc
import importlib.util
import json
import math
import multiprocessing
import os
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

import ppo_rlhf as rlhf
from conftest import ROOT
from test_ranks import lines_of_ours

pytestmark = pytest.mark.xdist_group("rlhf_ranks")

SCRIPT = str(ROOT / "ppo_rlhf.py")
needs_transformers = pytest.mark.skipif(
    not (importlib.util.find_spec("transformers") and importlib.util.find_spec("peft")),
    reason="models of Hugging Face need transformers and peft",
)

# Sizes that no number of ranks divides: the last batch of demonstrations and that of pairs have one
# row, where all ranks but the first have nothing to do; the shares of a rollout are no multiple of
# --micro-batch-size.
EMBEDDED = "--no-cuda --d-model 16 --num-layers 1 --num-heads 2 --response-length 8 "
EMBEDDED += "--sft-texts 250 --sft-epochs 2 --sft-batch-size 83 --sft-learning-rate 1e-2 "
EMBEDDED += "--rm-pairs 62 --rm-test-pairs 33 --rm-epochs 1 --rm-batch-size 61 --eval-episodes 31 "
EMBEDDED += "--batch-size 36 --num-minibatches 2 --update-epochs 2 --total-episodes 108 "
EMBEDDED += "--micro-batch-size 7 --critic-warmup 1 --learning-rate 1e-3 --no-clip-vloss "
EMBEDDED += "--ptx-coef 0.1 --ptx-ratio 1 --kl-target 0.1 --reward-clip 1 --whiten-rewards"
EMBEDDED = EMBEDDED.split()  # 8 and 2 steps of the optimizer, and 4 in each of 3 iterations
SORT = "--task sort --rm-coef 0 --kl-coef 0.1 --stages sft,ppo,eval"
SORT = [*EMBEDDED, *SORT.split()]
MODEL = "--no-cuda --response-length 10 --sft-batch-size 10 --rm-batch-size 7 --rm-test-pairs 3 "
MODEL += "--batch-size 8 --num-minibatches 2 --update-epochs 1 --micro-batch-size 5 "
MODEL += "--total-episodes 24 --eval-episodes 7 --critic-warmup 1 --sft-learning-rate 1e-3 "
MODEL += "--rm-learning-rate 1e-3 --learning-rate 1e-3 --value-learning-rate 1e-3 "
MODEL += "--no-clip-vloss --ptx-coef 0.5 --ptx-ratio 3 --kl-target 0.1 --reward-clip 1"
MODEL = MODEL.split()  # 2 and 2 steps of the optimizer, and 2 in each of 3 iterations
FUNCTIONS = """
import json, os

def remember(prompts, completions):
    with open("calls", "a") as file:
        file.write(json.dumps([os.environ.get("RANK", "0"), prompts, completions]) + "\\n")
    return [float(len(text)) for text in completions]

def fails(prompts, completions):
    if len(open("calls").readlines()) == 3:
        raise ValueError("out of\\nluck")
    return [0.0] * len(prompts)
"""


# ------------------------------------------------------------------------------------------------
# Ranks


def as_rank(rank, ranks, port, folder, argv, hook):
    """The script as torchrun starts it; without ranks, as python does."""
    os.chdir(folder)
    for fd, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{name}{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
    sys.stdout, sys.stderr, sys.argv = open(1, "w"), open(2, "w"), [SCRIPT, *argv]
    if ranks:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
        names |= {"MASTER_ADDR": "localhost", "TORCHELASTIC_RUN_ID": "test"}
        names |= {"TORCHELASTIC_USE_AGENT_STORE": True}
        os.environ |= {name: str(value) for name, value in names.items()}
    if hook:
        hook(rank)
    runpy.run_path(SCRIPT, run_name="__main__")


def after_fork(function, *args):
    torch.set_num_threads(1)  # a new pool, which threads that load weights would race to make
    function(*args)


def forked(ranks, function, *args, timeout=120):
    """The exit codes of function(rank, *args), in as many processes; nothing is imported again."""
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=after_fork, args=(function, i, *args)) for i in range(ranks)]
    for process in processes:
        process.start()
    end = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    assert None not in codes, "a rank waits for ever"
    return codes


def launch(folder, ranks, *argv, hook=None):
    """A run in `folder`: exit codes and output of its ranks, and the only folder under runs/."""
    folder.mkdir(exist_ok=True)
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    argv = [str(x) for x in argv]
    codes = forked(ranks or 1, as_rank, ranks, store.port, folder, argv, hook)
    out, err = ([path.read_text() for path in sorted(folder.glob(f"{x}?"))] for x in ("out", "err"))
    return SimpleNamespace(codes=codes, out=out, err=err, folder=its_folder(folder))


def its_folder(folder):
    found = [*folder.glob("runs/*")]
    assert len(found) <= 1
    return found[0] if found else None


def at_step(number, action, of_rank=None):
    """A hook: action() after this step of an optimizer, counted over all stages, in one rank."""

    def hook(rank):
        count = iter(range(1, 10**6))

        def after_step(*_):
            if next(count) == number and of_rank in (None, rank):
                action()

        register_optimizer_step_post_hook(after_step)

    return hook


def send(number):
    return lambda: os.kill(os.getpid(), number)


def inspect_models(rank):
    """A hook: after the first step, what this rank has in memory of each of the four models."""

    def look():
        (agent,) = [
            x
            for x in gc.get_objects()
            if type(x).__name__ == "Agent" and type(x).__module__ == "__main__"
        ]
        shapes = {}
        for name, module in agent.named_children():
            assert all(isinstance(x, DTensor) for x in module.parameters()), name
            assert all(x.placements == (Shard(0),) for x in module.parameters()), name
            shapes[name] = [(x.shape, x.to_local().shape) for x in module.parameters()]
        Path(f"shapes{rank}").write_text(json.dumps(shapes))

    at_step(1, look)(rank)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """runs(ranks, *argv): a run from start to end, made once."""

    @functools.cache
    def run(ranks, *argv):
        hook = inspect_models if "--fsdp" in argv else None
        made = launch(tmp_path_factory.mktemp("run"), ranks, *argv, hook=hook)
        assert made.codes == [0] * (ranks or 1), made.err
        return made

    return run


def torchrun(folder, ranks, *argv, **env):
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    command += ["--master_port=0", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    how |= {"cwd": folder, "start_new_session": True, "env": os.environ | env}
    return subprocess.Popen([*command, SCRIPT, *map(str, argv)], **how)


def ranks_of(process):
    """The processes that torchrun has started."""
    command = ["ps", "--ppid", str(process.pid), "-o", "pid="]
    found = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    return [int(pid) for pid in found.stdout.split()]


def finish(process, timeout=120):
    """The output of all. It has an end once nobody is left over who could write to it."""
    try:
        return process.communicate(timeout=timeout)
    finally:
        for pid in ranks_of(process) if process.poll() is None else ():
            os.kill(pid, signal.SIGKILL)
        process.kill()


def wait_for_ppo(process, folder):
    while not list(folder.glob("runs/*/reference.pt")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    time.sleep(1.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The command line for a tiny model of a kind, with texts of its own."""
    tiny = pytest.importorskip("tiny")
    folder = tmp_path_factory.mktemp("model")
    texts = [text.split() for text in tiny.TEXTS]
    halves = [[" ".join(x) for x in (x[: len(x) // 2], ["", *x[len(x) // 2 :]])] for x in texts]
    rows = {"sft": [{"prompt": a, "completion": b} for a, b in halves[1:]]}  # 11: all for ptx, too
    rows["prompts"] = [{"prompt": a} for a, _ in halves]
    other = [b for _, b in halves[1:] + halves[:1]]
    rows["pref"] = [
        {"prompt": a, "chosen": b, "rejected": c} for (a, b), c in zip(halves, other, strict=True)
    ]
    for name, lines in rows.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text)

    @functools.cache
    def argv(kind):
        path = tiny.save_model(folder / kind, kind)
        data = {"--sft-data": "sft", "--pref-data": "pref", "--prompts": "prompts"}
        data = [x for flag, name in data.items() for x in (flag, str(folder / f"{name}.jsonl"))]
        return ["--model", str(path), *data, *MODEL]

    return argv


@pytest.fixture
def functions(tmp_path):
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    return tmp_path / "functions.py"


# ------------------------------------------------------------------------------------------------
# What a run has left


def table(run):
    """(global_step, name) -> value, of all that does not tell the time."""
    with open(run.folder / "metrics.csv") as file:
        rows = [(int(x["global_step"]), x["name"], float(x["value"])) for x in csv.DictReader(file)]
    names = [(step, name) for step, name, _ in rows]
    assert len(names) == len({*names})  # nothing stands twice
    return {(a, b): value for a, b, value in rows if not b.startswith(("time/", "perf/"))}


def samples(run):
    return [json.loads(line) for line in (run.folder / "samples.jsonl").read_text().splitlines()]


def saved(folder):
    """A checkpoint with all models, those in files of their own, too."""
    data = torch.load(folder / "checkpoint.pt", weights_only=True)
    for name, expected in data["frozen"].items():
        assert rlhf.digest(folder / f"{name}.pt") == expected
        data["models"][name] = torch.load(folder / f"{name}.pt", weights_only=True)
    return data


def distance(one, other):
    """Of weights, of two runs: the largest."""
    a, b = (saved(run.folder)["models"] for run in (one, other))
    assert a.keys() == b.keys() and all(a[name].keys() == b[name].keys() for name in a)
    return max((x - b[name][k]).abs().max().item() for name in a for k, x in a[name].items())


def farthest(one, other):
    """By how much two runs differ in the row in which they do most, and this row.

    Relative to what is larger than 1. The root of a KL near zero is all rounding: it is compared
    as the KL. A share of clipped tokens may jump by one of them, 1/200.
    """
    a, b = table(one), table(other)
    assert [*a] == [*b]  # the same rows in the same order
    assert all(map(math.isfinite, [*a.values(), *b.values()]))
    differences = []
    for (step, name), x in a.items():
        y, power = b[step, name], 2 if name == "objective/sqrt_kl" else 1
        difference = abs(x**power - y**power) / max(1.0, abs(x))
        if name.endswith("clipfrac") and difference < 1 / 200:
            difference = 0.0
        differences.append((difference, step, name, x, y))
    return max(differences)


def same(one, other, rows=1e-4, weights=1e-5):
    """Whether all that two runs have left is equal, up to rounding; names of files, too."""
    assert {x.name for x in one.folder.iterdir()} == {x.name for x in other.folder.iterdir()}
    assert farthest(one, other)[0] < rows, farthest(one, other)
    assert distance(one, other) < weights
    for a, b in zip(samples(one), samples(other), strict=True):
        assert [a[k] for k in ("prompt", "response")] == [b[k] for k in ("prompt", "response")]
        assert a == pytest.approx(b, abs=rows)
    return True


def of_first_rank_only(run):
    """Whether the others said nothing."""
    return run.out[0].count("written to") == 1 and not any(run.out[1:] + run.err[1:])


# ------------------------------------------------------------------------------------------------
# The embedded tasks


@pytest.mark.parametrize(
    "ranks, how",
    [(2, []), *(pytest.param(*x, marks=pytest.mark.slow) for x in ((2, ["--fsdp"]), (3, [])))],
)
def test_x2_ranks_are_as_one_process(runs, ranks, how):
    """All stages of the reviews: each metric, the weights, the texts; one folder."""
    one, several = runs(0, *EMBEDDED), runs(ranks, *EMBEDDED, *how)
    assert same(one, several)
    assert of_first_rank_only(several)
    assert several.out[0].split("written to")[0] == one.out[0].split("written to")[0]
    ends = {len(text["response"].split()) for text in samples(one)}
    assert len(ends) > 3  # and texts of many lengths


@pytest.mark.parametrize("how", [[], pytest.param(["--fsdp"], marks=pytest.mark.slow)])
def test_x2_ranks_divide_groups(runs, how):
    """[X7] 36 responses in groups of 6, those of a group on both ranks; there is no value model."""
    groups = ["--group-size", "6", "--loss-mean", "response", "--kl-in", "loss"]
    groups += ["--no-whiten-rewards"]
    one, two = runs(0, *SORT, *groups), runs(2, *SORT, *groups, *how)
    assert same(one, two)
    assert {*saved(two.folder)["models"]} == {"policy", "reference"}
    assert 0 <= max(x for (_, name), x in table(one).items() if name == "objective/dead_groups") < 1


def test_x2_settings_of_the_first_test_leave_ranks_without_rows():
    """A batch of one row is that of the first rank; the last one takes part for nothing."""
    rows = torch.arange(1)
    shares = [[*rlhf_on(rank, 2).micro_batches(rows, 7)] for rank in range(2)]
    assert [(part.tolist(), factor) for ((part, factor),) in shares] == [([0], 1.0), ([0], 0.0)]
    assert 2 * 250 // 83 == 6 and 250 % 83 == 62 % 61 == 1


def rlhf_on(rank, ranks):
    """The script's functions as that rank has them."""
    names = runpy.run_path(SCRIPT)
    names["micro_batches"].__globals__["rank_of"] = lambda: (rank, ranks)
    return SimpleNamespace(**names)


@pytest.mark.parametrize("rows", [1, 2, 7, 36, 41])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_x2_each_row_is_one_ranks_and_all_take_as_many_steps(rows, ranks):
    """That of a factor 0 counts for nothing."""
    shares = [[*rlhf_on(rank, ranks).micro_batches(torch.arange(rows), 4)] for rank in range(ranks)]
    assert {len(share) for share in shares} == {-(-rows // ranks // 4) or 1} or rows % ranks
    assert len({len(share) for share in shares}) == 1
    counted = [row for share in shares for part, factor in share if factor for row in part.tolist()]
    assert sorted(counted) == [*range(rows)]
    assert all(0 < len(part) <= 4 for share in shares for part, _ in share)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_x2_torchrun(runs, ranks, tmp_path):
    """One rank bit for bit what python does."""
    process = torchrun(tmp_path, ranks, *EMBEDDED)
    stdout, stderr = finish(process)
    assert process.returncode == 0, stderr
    one, run = runs(0, *EMBEDDED), SimpleNamespace(folder=its_folder(tmp_path))
    assert stdout.splitlines()[:-1] == one.out[0].splitlines()[:-1]
    assert same(one, run)
    if ranks == 1:
        assert distance(one, run) == 0.0
        assert table(one) == table(run) and samples(one) == samples(run)


@pytest.mark.slow
def test_x2_one_rank_tells_wandb(tmp_path):
    pytest.importorskip("wandb")
    tracked = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path)}
    _, stderr = finish(process := torchrun(tmp_path, 2, *SORT, "--track", **tracked))
    assert process.returncode == 0, stderr
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 1


# ------------------------------------------------------------------------------------------------
# Models of Hugging Face, and FSDP

FRUGAL = ["--gradient-checkpointing", "--logprob-chunk", "5"]  # change nothing but memory
LORA = ["--lora-rank", "4"]
MODELS = [
    ("llama", [], []),
    *[
        pytest.param(kind, more, how, marks=pytest.mark.slow)
        for kind, more in (("llama", LORA), ("gpt2", []), ("gpt2", LORA), ("llama", []))
        for how in ([], ["--fsdp"], FRUGAL, ["--fsdp", *FRUGAL])
        if more or how or kind != "llama"
    ],
]


@needs_transformers
@pytest.mark.parametrize("kind, lora, how", MODELS)
def test_x2_models_of_ranks_are_as_of_one_process(runs, model, kind, lora, how):
    """Embeddings tied (gpt2) and not, whole models and adapters; also as others read them."""
    one, two = runs(0, *model(kind), *lora), runs(2, *model(kind), *lora, *how)
    assert same(one, two, weights=1e-4)
    assert of_first_rank_only(two)
    assert "Warning" not in two.err[0]
    for name in ("policy", "reward_model"):
        files = [{x.name for x in (run.folder / name).iterdir()} for run in (one, two)]
        assert files[0] == files[1]
    tokens = torch.randint(0, 320, (1, 12), generator=torch.Generator().manual_seed(0))
    both = (logits(run.folder, tokens, lora) for run in (one, two))
    for expected, got in zip(*both, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


def logits(folder, tokens, lora):
    """What transformers, and peft if there is an adapter, say of a text: policy, reward model."""
    import transformers

    load = transformers.AutoModelForCausalLM.from_pretrained
    if lora:
        load = importlib.import_module("peft").AutoPeftModelForCausalLM.from_pretrained
    scores = transformers.AutoModelForSequenceClassification.from_pretrained
    policy = load(folder / "policy", dtype=torch.float32)
    models = policy, scores(folder / "reward_model", dtype=torch.float32)
    with torch.no_grad():
        return [model.eval()(input_ids=tokens).logits for model in models]


@needs_transformers
@pytest.mark.parametrize(
    "kind, lora, how",
    [("llama", [], []), pytest.param("gpt2", LORA, FRUGAL, marks=pytest.mark.slow)],
)
def test_x2_fsdp_leaves_each_rank_its_part_of_all_four_models(runs, model, kind, lora, how):
    """Of each parameter half of the rows, adapters and what does not learn included."""
    run = runs(2, *model(kind), *lora, "--fsdp", *how)
    first, second = (json.loads((run.folder.parents[1] / f"shapes{i}").read_text()) for i in (0, 1))
    assert {*first} == {*second} == {"policy", "reference", "reward_model", "value_model"}
    for name in first:
        assert len(first[name]) > 20
        for (shape, part), (_, other) in zip(first[name], second[name], strict=True):
            assert part == [-(-shape[0] // 2), *shape[1:]]
            assert other == [shape[0] // 2, *shape[1:]]


@needs_transformers
@pytest.mark.slow
def test_x2_everything_that_saves_memory_together(runs, model):
    """bf16 in the forward passes: what is learned before a text is sampled is near."""
    how = ["--precision", "bf16", *FRUGAL]
    one, two = runs(0, *model("llama"), *how), runs(2, *model("llama"), *how, "--fsdp")
    a, b = table(one), table(two)
    assert [*a] == [*b]
    early = [x for x in a if x[1].startswith(("sft/", "rm/")) and "accuracy" not in x[1]]
    assert len(early) == 12
    for x in early:
        assert b[x] == pytest.approx(a[x], abs=0.05, rel=0.05), x
    fp32 = table(runs(0, *model("llama")))
    assert any(a[x] != pytest.approx(fp32[x], abs=1e-4) for x in early)


def hand_in(rank, folder):
    """Whether what is sharded has numbers on this rank once it is put together."""
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    sharded = distribute_tensor(torch.arange(6.0), mesh, [Shard(0)])
    found = rlhf.whole({"a": {"b": sharded, "c": 1}})["a"]
    torch.save((found["b"], found["c"]), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_x2_what_is_put_together_is_in_memory_of_the_first_rank_alone(tmp_path):
    """Or a box would have as many copies of all models and moments as it has GPUs."""
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=hand_in, args=(rank, tmp_path)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    (first, c), (second, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert (first.tolist(), c) == ([0, 1, 2, 3, 4, 5], 1)
    assert second.is_meta and second.shape == (6,)


@needs_transformers
@pytest.mark.slow
@pytest.mark.parametrize("lora", [[], LORA])
def test_x2_fsdp_of_weights_in_bf16(runs, model, lora):
    """Heads of a number stay in float32, a part of their own."""
    run = runs(2, *model("llama"), *lora, "--fsdp", "--precision", "pure-bf16")
    losses = [x for (_, name), x in table(run).items() if name == "ppo/loss/value"]
    assert len(losses) > 1 and all(map(math.isfinite, losses))


@needs_transformers
@pytest.mark.slow
def test_x2_fsdp_of_other_models_for_everything(runs, model, tmp_path_factory):
    """A reward model with other tokens, a reference and a value model from elsewhere."""
    import tiny

    folder = tmp_path_factory.mktemp("others")
    tiny.save_classifier(folder / "reward", "gpt_neox", seed=3, tokenizer_seed=1)
    tiny.save_model(folder / "reference", "llama", seed=4)
    tiny.save_model(folder / "value", "llama", seed=5)
    argv = [*model("llama"), "--stages", "sft,ppo,eval", "--reward-model", str(folder / "reward")]
    argv += ["--ref-model", str(folder / "reference"), "--value-model", str(folder / "value")]
    assert same(runs(0, *argv), runs(2, *argv, "--fsdp"), weights=1e-4)


# ------------------------------------------------------------------------------------------------
# Sampling

PROMPTS, STEPS = 7, 12


def write(rank, model, ends, how, folder):
    """Texts that end where `ends` says, by a model that is divided or not."""
    if how:
        store = dist.FileStore(str(folder / "store"), 2)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.manual_seed(0)
    made = rlhf.pretrained("AutoModelForCausalLM", model, dtype=torch.float32).eval()
    policy = rlhf.Policy(made, 320)
    args = rlhf.Args(model=str(model), fsdp=how == "fsdp")
    rlhf.frugal(policy, args, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(0, 320, (PROMPTS, 5), generator=generator)
    uniforms = torch.rand(PROMPTS, STEPS, generator=generator, dtype=torch.float64)
    some = slice(rank, None, 2) if how else slice(None)
    number = {tuple(prompt.tolist()): end for prompt, end in zip(prompts, ends, strict=True)}
    mine = [number[tuple(prompt.tolist())] for prompt in prompts[some]]

    def has_ended(responses):
        """By the first word, which says which text it is: all are different."""
        firsts = [first[row[0].item()] for row in responses]
        return torch.tensor([responses.shape[1] >= end for end in firsts])

    first = {rlhf.PAD: 0}
    with torch.no_grad():
        logits, _ = policy(prompts[some], 1)
    words = torch.distributions.Categorical(logits=logits.squeeze(1)).probs.double().cumsum(1)
    words = torch.searchsorted(words, uniforms[some][:, :1] * words[:, -1:], right=True)
    for word, end in zip(words.squeeze(1).tolist(), mine, strict=True):
        assert first.setdefault(word, end) == end
    said = rlhf.generate(policy, prompts[some], STEPS, has_ended, uniforms[some])
    torch.save(said, folder / f"{how or 'one'}{rank}.pt")
    if how:
        dist.barrier()


@needs_transformers
@pytest.mark.parametrize("how", ["ranks", "fsdp"])
@pytest.mark.parametrize(
    "ends",
    [
        pytest.param([1, 12, 1, 12, 1, 12, 1], id="the first rank at once, the other never"),
        pytest.param([12, 1, 9, 2, 5, 3, 7], id="one by one"),
    ],
)
def test_x2_ranks_whose_texts_end_at_different_steps(how, ends, tmp_path):
    """Nobody waits for ever, and the texts and their probabilities are those of one process."""
    import tiny

    path = tiny.save_model(tmp_path / "model", "llama")
    assert forked(2, write, path, ends, how, tmp_path, timeout=60) == [0, 0]
    assert forked(1, write, path, ends, None, tmp_path) == [0]
    tokens, logprobs = torch.load(tmp_path / "one0.pt")
    assert (tokens[:, 5:] != rlhf.PAD).sum(1).tolist() == ends
    for rank in range(2):
        its_tokens, its_logprobs = torch.load(tmp_path / f"{how}{rank}.pt")
        assert torch.equal(its_tokens, tokens[rank::2])
        torch.testing.assert_close(its_logprobs, logprobs[rank::2], rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------
# Reward functions


def test_x2_a_reward_function_is_called_by_the_first_rank_with_all_rows(functions, tmp_path):
    """In three iterations and for 20 tables of texts; as often, and with the same, as by one."""
    argv = [*SORT, "--reward-fn", f"{functions}:remember"]
    both = [launch(tmp_path / str(ranks), ranks, *argv) for ranks in (0, 2)]
    assert same(*both)
    calls = [(tmp_path / str(ranks) / "calls").read_text().splitlines() for ranks in (0, 2)]
    calls = [[json.loads(line) for line in lines] for lines in calls]
    assert calls[1] == calls[0]  # by rank 0
    assert [len(prompts) for _, prompts, _ in calls[1]] == [36] * 3 + [31] * 20


def whole_files(folder):
    """Whether nothing is cut off in the middle; the checkpoint, for more."""
    assert not list(folder.glob("*.tmp"))
    metrics = (folder / "metrics.csv").read_text()
    assert metrics.endswith("\n") and {x.count(",") for x in metrics.splitlines()} == {3}
    texts = (folder / "samples.jsonl").read_text()
    assert all(json.loads(line) for line in texts.splitlines())
    data = saved(folder)
    assert data["bytes"] == [len(metrics), len(texts.encode())]
    return data


def test_x2_a_reward_function_that_raises_ends_all_ranks(functions, tmp_path):
    argv = [*SORT, "--reward-fn", f"{functions}:remember", "--reward-fn", f"{functions}:fails"]
    run = launch(tmp_path, 2, *argv)
    assert run.codes == [2, 2]
    (line,) = lines_of_ours("".join(run.err))
    path = run.folder.relative_to(tmp_path) / "checkpoint.pt"
    says = f"error: {functions}:fails raised ValueError: out of luck; last good checkpoint: {path}"
    assert line == says
    data = whole_files(run.folder)
    assert (data["stage"], data["step"]) == (2, 2)


@needs_transformers
@pytest.mark.slow
def test_x2_a_reward_function_that_raises_ends_all_ranks_of_fsdp(functions, model, tmp_path):
    """By torchrun; the checkpoint, to which all contribute, is that of the step before."""
    argv = [*model("llama"), "--reward-fn", f"{functions}:remember"]
    argv += ["--reward-fn", f"{functions}:fails", "--fsdp", "--checkpoint-every", "100"]
    _, stderr = finish(process := torchrun(tmp_path, 2, *argv))
    assert process.returncode != 0
    (line,) = lines_of_ours(stderr)
    assert "fails raised ValueError: out of luck; last good checkpoint: runs/" in line
    data = whole_files(its_folder(tmp_path))
    assert (data["stage"], data["step"]) == (2, 2)
    assert all(not isinstance(x, DTensor) for x in data["models"]["policy"].values())


# ------------------------------------------------------------------------------------------------
# Going on


def stopped(folder, ranks, *argv, step):
    """A run whose last rank alone gets SIGTERM during this step of an optimizer."""
    hook = at_step(step, send(signal.SIGTERM), of_rank=max(0, ranks - 1))
    run = launch(folder, ranks, *argv, hook=hook)
    assert run.codes == [128 + signal.SIGTERM] * (ranks or 1), run.err
    assert not any(lines_of_ours(text) for text in run.err)
    return run


def go_on(folder, run, ranks, *more, hook=None):
    """A copy of a run that was stopped, to its end."""
    shutil.copytree(run.folder, folder / "runs" / run.folder.name)
    more = ["--resume", f"runs/{run.folder.name}", *more]
    again = launch(folder, ranks, *more, hook=hook)
    assert again.codes == [0] * (ranks or 1), again.err
    return again


def forget(rank):
    """A hook: what an optimizer has saved is not read."""
    Optimizer.load_state_dict = lambda *_: None


@pytest.mark.slow
@pytest.mark.parametrize("step, stage, its_step", [(15, 2, 2), (3, 0, 3), (9, 1, 1)])
def test_x2_what_ranks_began_one_process_or_ranks_end(runs, step, stage, its_step, tmp_path):
    """Stopped in each stage after a signal to one of them; and AdamW's moments do matter."""
    uninterrupted = runs(0, *EMBEDDED)
    run = stopped(tmp_path / "stopped", 2, *EMBEDDED, step=step)
    data = saved(run.folder)
    assert (data["stage"], data["step"]) == (stage, its_step)
    command = f"to go on: torchrun --nproc_per_node=2 {SCRIPT} --resume 'runs/{run.folder.name}'"
    assert command in run.out[0].splitlines()
    for ranks in (0, 2):
        assert same(uninterrupted, go_on(tmp_path / str(ranks), run, ranks))
    without = go_on(tmp_path / "without", run, 2, hook=forget)
    assert farthest(uninterrupted, without)[0] > 1e-3


@pytest.mark.slow
def test_x2_what_one_process_began_ranks_end(runs, tmp_path):
    run = stopped(tmp_path / "stopped", 0, *EMBEDDED, step=15)
    assert f"to go on: python {SCRIPT} --resume" in run.out[0]
    assert same(runs(0, *EMBEDDED), go_on(tmp_path / "on", run, 2))


FROM_FSDP = ["--fsdp"], [(0, "--no-fsdp"), (1, "--fsdp"), (2, "--fsdp")]
TO_FSDP = [], [(2, "--fsdp")]


@needs_transformers
@pytest.mark.parametrize(
    "kind, lora, step, before, after",
    [
        ("gpt2", LORA, 7, *TO_FSDP),
        *[
            pytest.param(kind, lora, step, *how, marks=pytest.mark.slow)
            for kind, lora in (("llama", LORA), ("gpt2", []), ("gpt2", LORA), ("llama", []))
            for step in (1, 3, 7)
            for how in (FROM_FSDP, TO_FSDP)
        ],
    ],
)
def test_x2_fsdp_goes_on_as_python_and_the_reverse(
    runs, model, kind, lora, step, before, after, tmp_path
):
    """Stopped in the second iteration or after a first step; python has to be told --no-fsdp."""
    uninterrupted = runs(0, *model(kind), *lora)
    ranks = 2 if before else 0
    run = stopped(tmp_path / "stopped", ranks, *model(kind), *lora, *before, step=step)
    data = saved(run.folder)
    assert (data["stage"], data["step"]) == {1: (0, 1), 3: (1, 1), 7: (2, 2)}[step]
    for ranks, flag in after:
        again = go_on(tmp_path / f"{ranks}{flag}", run, ranks, flag)
        assert same(uninterrupted, again, weights=1e-4)
    if before:
        again = launch(tmp_path / "stopped", 0, "--resume", run.folder)
        assert again.codes == [2]
        (line,) = again.err[0].splitlines()
        assert line.startswith("error: --fsdp needs torchrun")


@pytest.mark.slow
@needs_transformers
def test_x2_fsdp_takes_over_what_one_process_has_learned(runs, model, tmp_path):
    """Only PPO by FSDP: the policy does not learn yet when it is first read, and later it does."""
    run = launch(tmp_path / "first", 0, *model("llama"), "--stages", "sft,rm")
    both = []
    for ranks, more in ((0, []), (2, ["--fsdp"])):
        argv = ["--load", run.folder, "--stages", "ppo,eval", *more]
        both.append(launch(tmp_path / str(ranks), ranks, *argv))
        assert both[-1].codes == [0] * (ranks or 1), both[-1].err
    assert same(*both, weights=1e-4)
    norms = [x for (_, name), x in table(both[1]).items() if name == "ppo/policy/grad_norm"]
    assert norms[0] == 0.0 and all(norms[1:])


# ------------------------------------------------------------------------------------------------
# Ends


@pytest.mark.slow
def test_x2_a_signal_to_torchrun_and_its_ranks(tmp_path):
    """A checkpoint, the command to go on, which does; no row twice, none left out."""
    argv = ["--total-episodes", "3600000", "--no-anneal-lr", "--checkpoint-every", "1000000"]
    process = torchrun(tmp_path, 2, *SORT, *argv)
    wait_for_ppo(process, tmp_path)
    os.killpg(process.pid, signal.SIGTERM)
    stdout, stderr = finish(process)
    assert process.returncode != 0 and lines_of_ours(stderr) == []
    folder = its_folder(tmp_path)
    (line,) = [x for x in stdout.splitlines() if x.startswith("to go on: ")]
    command = ["torchrun", "--nproc_per_node=2", SCRIPT, "--resume", f"runs/{folder.name}"]
    assert shlex.split(line.removeprefix("to go on: ")) == command
    data = whole_files(folder)
    assert data["stage"] == 2 and data["step"] >= 1
    last = data["step"] + 2
    more = ["--total-episodes", str(36 * last), "--stages", "sft,ppo"]
    run = launch(tmp_path, 2, *command[3:], *more)
    assert run.codes == [0, 0], run.err
    steps = [step for step, name in table(run) if name == "ppo/episode"]
    assert steps == [36 * i for i in range(1, last + 1)]


def test_x2_where_a_rank_is_killed_the_others_end(tmp_path):
    """One line, and the checkpoint is the last one."""
    kill = at_step(16, send(signal.SIGKILL), of_rank=1)
    more = ["--total-episodes", "36000", "--checkpoint-every", "1"]
    run = launch(tmp_path, 2, *SORT, *more, hook=kill)
    assert run.codes == [2, -signal.SIGKILL]
    (line,) = lines_of_ours("".join(run.err))
    assert line.startswith("error: another rank has ended")
    assert "Traceback" not in "".join(run.err)
    data = saved(run.folder)
    assert (data["stage"], data["step"]) == (2, 1)
    assert "written to" not in run.out[0]


def of_rank(rank, process):
    """The id of a rank that torchrun has started."""
    for pid in ranks_of(process):
        if f"\0RANK={rank}\0".encode() in b"\0" + Path(f"/proc/{pid}/environ").read_bytes():
            return pid
    raise AssertionError("no such rank")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="/proc tells who is which rank")
@pytest.mark.parametrize("rank", [0, 1])
def test_x2_where_a_rank_is_killed_torchrun_ends(rank, tmp_path):
    more = ["--total-episodes", "3600000", "--checkpoint-every", "1"]
    process = torchrun(tmp_path, 2, *SORT, *more)
    wait_for_ppo(process, tmp_path)
    os.kill(of_rank(rank, process), signal.SIGKILL)
    _, stderr = finish(process)
    assert process.returncode != 0
    (line,) = lines_of_ours(stderr)
    name = f"runs/{its_folder(tmp_path).name}"
    assert line == f"error: another rank has ended; last good checkpoint: {name}/checkpoint.pt"
    assert saved(its_folder(tmp_path))["stage"] == 2


def full(rank):
    """A hook: the disk of the first rank is full when it saves the policy for the third time."""
    save, saved_before = torch.save, []

    def save_until(data, file):
        if "optimizer" in data and len(saved_before) == 2:
            raise OSError("no space left on device")
        saved_before.append(data)
        save(data, file)

    if rank == 0:
        torch.save = save_until


def test_x2_where_the_disk_is_full_all_end(tmp_path):
    run = launch(tmp_path, 2, *SORT, "--checkpoint-every", "1", hook=full)
    assert run.codes == [2, 2]
    (line,) = "".join(run.err).splitlines()
    name = f"runs/{run.folder.name}"
    cause = f"{name} cannot be written to: no space left on device"
    assert line == f"error: {cause}; last good checkpoint: {name}/checkpoint.pt"
    assert saved(run.folder)["step"] == 2


def test_x2_where_there_can_be_no_folder_all_end(tmp_path):
    (tmp_path / "runs").write_text("")
    run = launch(tmp_path, 2, *SORT)
    assert run.codes == [2, 2]
    (line,) = "".join(run.err).splitlines()
    assert line.startswith("error: a run needs a folder to write to")


@pytest.mark.parametrize(
    "ranks, changes, expected",
    [
        (2, "--batch-size 9 --num-minibatches 1", "minibatch_size 9 cannot be divided by 2 ranks"),
        (2, "--batch-size 6", "minibatch_size 3 cannot be divided by 2 ranks"),
        (2, "--batch-size 0", "--batch-size is 0, it must be at least 1"),
        (2, "--reward-fn none.py:none", "--reward-fn none.py:none: FileNotFoundError"),
        (2, "--model none --stages ppo", "--stages ppo of a --model needs --prompts"),
        (0, "--fsdp", "--fsdp needs torchrun"),
    ],
)
def test_x2_wrong_input_is_one_line(ranks, changes, expected, tmp_path):
    run = launch(tmp_path, ranks, *EMBEDDED, *changes.split())
    assert run.codes == [2] * (ranks or 1)
    (line,) = "".join(run.err).splitlines()
    assert line.startswith("error: ") and expected in line
    assert run.out == [""] * (ranks or 1) and run.folder is None
