"""The scripts on a GPU: are they right, how fast, do they learn? Prepared for a few minutes there.

    python3 benchmarks/gpu.py --call a --seconds 300 --out A      # facts, right, ranks, variants
    python3 benchmarks/gpu.py --call b --seconds 240 --variant V --out B    # fast, learn, words
    python benchmarks/gpu.py --device cpu --quick --out DIR       # rehearsal of all parts

On a machine without network that has torch, numpy, OpenCV and tqdm, with the wheels of gymnasium,
ale-py, mujoco, mujoco-core, glfw, pyopengl, farama-notifications, cloudpickle, tyro,
docstring-parser and typeguard in .whl/, which git ignores, one line installs and starts it:

    python3 -m pip install -q --no-index --no-deps --no-compile --target "$HOME/site" .whl/*.whl &&
    PYTHONPATH="$HOME/site" python3 benchmarks/gpu.py --call a --seconds 300 --out "$OUT"

Each part writes a table of its name with the columns script, case, metric, value, step, seconds as
it goes, so that a cut loses one part at most. A run that fails leaves its traceback in the table,
and the others go on. The last line counts the parts that failed and is the exit code.

facts     the machine
right     eager beside compiled, GPU beside CPU, ratio 1 at first, the same seed twice, memory, no
          synchronization in the update, a checkpoint from the GPU read on the CPU
ranks     torchrun: one rank by NCCL is one process, two by gloo on one GPU stay equal
variants  Atari at 8 and 64 environments, HalfCheetah at 1, by how the update is compiled: VARIANTS
          puts other lines into a copy of the script; what is not seen to work is not in the script
fast      by --variant: more environments, with and without GPU, the floor of random actions, and
          LeanRL's HalfCheetah from --leanrl PATH in turn (needs tensordict 0.13.0 and pyvers)
learn     CartPole, HalfCheetah and Pong as far as the time goes, side by side with
words     ppo_rlhf.py as it is, with 12 layers of 768 on 50,257 words as in the 2019 paper, and with
          SmolLM2's shape, all weights and LoRA; memory beside what --plan says of it
"""

import contextlib
import csv
import dataclasses
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import tyro
from phases import Clock, load
from speed import (
    BAR,
    ROOT,
    SHIM,
    clock,
    commit_of,
    machine,
    reach,
    read_metrics,
    results_folder,
    steps_per_second,
)
from variants import replaced

FIELDS = ("script", "case", "metric", "value", "step", "seconds")
CALLS = {  # groups of parts that run side by side, and their shares of the time
    "a": {("facts",): 1, ("right",): 4, ("ranks",): 3, ("variants",): 6},
    "b": {("fast",): 6, ("learn", "words"): 6},
}
ATARI, CHEETAH, CARTPOLE, WORDS = (
    f"ppo_{name}.py" for name in ("atari", "continuous", "discrete", "rlhf")
)
SCRIPTS = (CARTPOLE, CHEETAH, ATARI, "ppo_atari_lstm.py", WORDS)

LEANRL_ATARI = 6809  # its README: steps/s of Breakout, 8 environments, one H100
LHP_SECONDS = 16_212  # of 1M episodes on 8 V100: the code of arXiv:1909.08593, run by Huang et al.

COMPILE = "fast = torch.compile(function, fullgraph=whole)"
KEPT = "gradient(agent, batch, indices, args.max_grad_norm, *coefficients)"
STEP = "                optimizer.zero_grad()\n"
LOG = "        # log\n"
SMOLLM = {"model_type": "llama", "vocab_size": 49_152, "hidden_size": 576}
SMOLLM |= {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
SMOLLM |= {"intermediate_size": 1536, "tie_word_embeddings": True}

VARIANTS = {  # how the update is compiled: [(old text, new text), ...]
    "eager": [],  # and --no-compile
    "compiled": [],
    "reduce-overhead": [
        (COMPILE, 'fast = torch.compile(function, fullgraph=whole, mode="reduce-overhead")'),
        (KEPT, f"cloned({KEPT})"),  # the next replay overwrites what this one returns
    ],
    "captured": [
        ("compiled(ppo_gradient) if", "Captured(ppo_gradient) if"),
        (STEP, ""),  # a replay overwrites the gradient
    ],
}
NO_SYNCS = [  # a synchronization between these lines is an error
    (STEP, f'{STEP[:16]}syncs("error")\n{STEP}'),
    (LOG, f'{LOG[:8]}syncs("default")\n{LOG}'),
]


END = "    run.close()\n    return agent\n"
EQUAL = """    weights = torch.cat([x.detach().flatten().cpu() for x in agent.parameters()])
    assert all(torch.equal(weights, x) for x in of_all_ranks(weights))
"""
GLOO = [  # NCCL wants a GPU for each rank
    (END, EQUAL + END),  # or the run fails
    ('"cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"', '"gloo"'),
]


@dataclasses.dataclass(frozen=True)
class Args:
    out: Path = Path("gpu")  # folder of the tables
    call: str = "ab"  # the parts of call a, of call b, or of both
    device: str = "cuda"  # or cpu, to rehearse
    quick: bool = False  # few steps
    seconds: float = 600.0  # of all parts together
    variant: str = "compiled"  # of call b: the fastest of call a
    leanrl: Path | None = None  # a clone of github.com/pytorch-labs/LeanRL
    scripts: tuple[str, ...] = SCRIPTS  # of ours, which
    parts: tuple[str, ...] = ()  # which; empty: all of the call
    job: str = ""  # JSON: what a process of this program does for another one


# ------------------------------------------------------------------------------------------------
# Jobs: what runs in a process of its own


def cloned(stats: dict) -> dict:
    return {name: value.clone() for name, value in stats.items()}


class Captured:
    """`ppo_gradient` as one CUDA graph: captured at the first call, replayed at all others.

    Batch and indices are copied to where the graph reads them. On the CPU, to rehearse this, the
    function is called anew with the same copies.
    """

    def __init__(self, function):
        self.function, self.source = function, None

    def __call__(self, agent, batch, indices, *rest):
        if self.source is None:
            self.batch, self.indices = [x.clone() for x in batch], indices.clone()
            self.replay = lambda: self.gradient(agent, *rest)
            if indices.device.type == "cuda":
                self.capture(agent, *rest)
        if batch is not self.source:
            self.source = batch
            for copy, x in zip(self.batch, batch, strict=True):
                copy.copy_(x)
        self.indices.copy_(indices)
        self.replay()
        return cloned(self.stats)

    def gradient(self, agent, *rest):
        agent.zero_grad()
        self.stats = self.function(agent, self.batch, self.indices, *rest)

    def capture(self, agent, *rest):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.gradient(agent, *rest)
        torch.cuda.current_stream().wait_stream(side)
        agent.zero_grad()  # so that the graph writes gradients, not adds
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.stats = self.function(agent, self.batch, self.indices, *rest)
        self.replay = graph.replay


class DeviceClock(Clock):
    """A phase ends when the GPU has done its part."""

    def start(self, phase: str):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        super().start(phase)


def module_of(script: str, replacements: list, phases: Clock):
    """The script as a module, with other lines, its phases timed by the clock."""
    Path(script).write_text(replaced(script, replacements))
    module = load(Path(script).resolve(), phases)
    module.cloned, module.Captured = cloned, Captured
    module.syncs = torch.cuda.set_sync_debug_mode if torch.cuda.is_available() else str
    return module


def train(script: str, flags: list, variant="compiled", exact=False, strict=False, first=False):
    """Numbers of a run in the current folder. -> dict

    exact: without TF32. strict: a synchronization in the update is an error. first: with the
    statistics of the first minibatch.
    """
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    if exact:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    captured, phases, gpu = [], DeviceClock(), torch.cuda.is_available()
    if gpu:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.reset_peak_memory_stats()
        end = torch.cuda.CUDAGraph.capture_end
        torch.cuda.CUDAGraph.capture_end = lambda graph: captured.append(1) or end(graph)
    module = module_of(script, VARIANTS[variant] + (NO_SYNCS if strict else []), phases)
    if script in (CARTPOLE, CHEETAH, ATARI) and variant == "eager":
        flags = [*flags, "--no-compile"]
    args, minibatches = module.parse_args(flags), []
    if script != WORDS:
        time_inside(module, phases)
    if first:
        watch(module, minibatches)
    start = time.perf_counter()
    agent = module.train(args)
    seconds = time.perf_counter() - start
    (folder,) = Path("runs").iterdir()
    folder = folder.rename("finished")
    rows = read_metrics(folder / "metrics.csv")
    numbers = {
        "wall_seconds": seconds,
        "on_gpu": int(next(agent.parameters()).is_cuda),
        "unique_graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
        "cuda_graphs_captured": len(captured),
        "peak_gpu_mb": torch.cuda.max_memory_allocated() / 1e6 if gpu else 0.0,
        "losses": {name: value for _, _, name, value in reversed(rows) if "loss" in name},
        "minibatch": minibatches[0] if minibatches else {},
        "weights": some_weights(agent),
        "checkpoint_on_cpu": int(same_on_cpu(agent, folder / "checkpoint.pt")),
    }
    if script != WORDS:
        ends = clock(rows)
        numbers["steps_per_second"] = steps_per_second(rows) if len(ends) > 2 else 0.0
        kept = phases.iterations[2:-1] or phases.iterations
        for phase in ("environments", "acting", "rollout", "evaluation", "update"):
            numbers[f"{phase}_ms"] = 1e3 * statistics.median(x[phase] for x in kept)
    shutil.rmtree(folder)
    return numbers


def some_weights(agent, count=20_000) -> list[float]:
    """Evenly spread over all of them, and all where there are few."""
    weights = torch.cat([p.detach().flatten() for p in agent.parameters()])
    return weights[:: max(1, len(weights) // count)].tolist()


def time_inside(module, phases: Clock):
    """The steps of the environments and acting are phases of their own."""
    make_envs, rollout_policy = module.make_envs, module.Agent.rollout_policy

    def timed_envs(args):
        envs = make_envs(args)
        envs.step = phases.inside("environments", envs.step)
        return envs

    def timed_policy(agent, rng):
        return phases.inside("acting", rollout_policy(agent, rng))

    module.make_envs, module.Agent.rollout_policy = timed_envs, timed_policy


def watch(module, minibatches: list):
    """The statistics of each minibatch, eager, as numbers."""
    gradient = module.ppo_gradient

    def watched(*args):
        stats = gradient(*args)
        minibatches.append({name: value.item() for name, value in stats.items()})
        return stats

    module.ppo_gradient = watched


def same_on_cpu(agent, path: Path) -> bool:
    """Whether a checkpoint has the agent's weights, on the CPU wherever they were written."""
    data = torch.load(path, map_location="cpu", weights_only=True)
    models = data.get("models", {})  # of ppo_rlhf.py, and beside them those that learn no more
    for name in data.get("frozen", ()):
        models[name] = torch.load(path.parent / f"{name}.pt", map_location="cpu", weights_only=True)
    parts = {f"{model}.{name}": x for model in models for name, x in models[model].items()}
    saved, state = data.get("agent", parts), agent.state_dict()
    if models:  # its value model is not kept to the end
        state = {name: x for name, x in state.items() if not name.startswith("value_model.")}
    return saved.keys() == state.keys() and all(
        saved[name].device.type == "cpu" and torch.equal(saved[name], value.cpu())
        for name, value in state.items()
    )


def floor(script: str, flags: list, steps: int):
    """Steps per second of the script's vector environment with random actions. -> dict"""
    module = module_of(script, [], Clock())
    args = module.parse_args(flags)
    envs = module.make_envs(args)
    envs.action_space.seed(1)
    envs.reset(seed=list(range(args.num_envs)))
    actions = [envs.action_space.sample() for _ in range(steps)]
    start = time.perf_counter()
    for action in actions:
        envs.step(action)
    seconds = time.perf_counter() - start
    envs.close()
    return {"floor_steps_per_second": steps * args.num_envs / seconds}


class Words(list):
    """As many as a real model has: the number of a word is looked up, not searched for."""

    def __init__(self, words):
        super().__init__(words)
        self.index = {word: i for i, word in enumerate(self)}.__getitem__


def long_words(words: int, prompt_length: int, flags: list, tf32: bool):
    """ppo_rlhf.py on prompts of random words, its PPO stage alone. -> dict of medians

    The reward is the share of different words in a response: what is measured is the time.
    """
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    module = module_of(WORDS, [], Clock())
    names = Words(f"w{i}" for i in range(words))

    def text(rng, *_):
        return " ".join(names[i] for i in rng.integers(words - 1, size=prompt_length))

    def gold(prompt, response, ended):
        return {"score": len(set(response.split())) / max(1, len(response.split()))}

    module.TASKS["sort"] = module.Task(names, prompt_length, text, text, gold)
    args = module.parse_args(["--task", "sort", *flags])
    module.train_sft = lambda *_: None  # random weights
    module.train(args)
    return seconds_and_memory(args.batch_size)


def real_words(shape: dict, flags: list):
    """PPO of ppo_rlhf.py alone on a model of Hugging Face with random weights -> dict of medians

    Beside the largest memory what `--plan` says of it.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    numbers = {f"w{i}" if i else "<end>": i for i in range(shape["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    fast.save_pretrained("model")
    config = AutoConfig.for_model(**shape, eos_token_id=0)
    AutoModelForCausalLM.from_config(config).save_pretrained("model")
    texts = (
        " ".join(f"w{(i * j) % len(numbers) or 1}" for j in range(1, 33)) for i in range(2, 130)
    )
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": x}) + "\n" for x in texts))
    Path("reward.py").write_text(
        "def f(completions):\n    return [x.count('7') for x in completions]"
    )
    files = "--model model --prompts prompts.jsonl --reward-fn reward.py:f --prompt-length 32"
    command = [*files.split(), "--stages", "ppo", "--critic-warmup", "0", *flags]
    module = module_of(WORDS, [], Clock())
    args = module.parse_args(command)
    module.train(args)
    found = seconds_and_memory(args.batch_size)
    plan = [sys.executable, ROOT / WORDS, *command, "--plan"]
    lines = subprocess.run(plan, capture_output=True, text=True, check=True).stdout.splitlines()
    return found | {"planned_gpu_mb": 1e3 * float(lines[-1].split()[-2])}


def seconds_and_memory(batch_size: int):
    """Of the run in the current folder, and of this process."""
    (folder,) = Path("runs").iterdir()
    rows = read_metrics(folder / "metrics.csv")
    found = {}
    for _, _, name, value in rows:
        if name in ("time/gen", "time/score", "time/train"):
            found.setdefault(name, []).append(value)
    medians = {name: statistics.median(values[1:] or values) for name, values in found.items()}
    update = sum(medians.values())
    memory = torch.cuda.max_memory_allocated() / 1e6 if torch.cuda.is_available() else 0.0
    return {
        "seconds_per_update": update,
        "hours_per_million_episodes": update / batch_size * 1e6 / 3600,
        "peak_gpu_mb": memory,
        **{name.replace("time/", "share_"): value / update for name, value in medians.items()},
    }


def several(script: str, runs: list) -> list:
    """Some runs of `train` in this process; one that fails is its traceback, not a dict."""
    results = []
    for options in runs:
        try:
            results.append(train(script, **options))
        except BaseException:
            results.append(traceback.format_exc())
        shutil.rmtree("runs", ignore_errors=True)
    return results


JOBS = {x.__name__: x for x in (train, several, floor, long_words, real_words)}


# ------------------------------------------------------------------------------------------------
# Parts: each yields rows of FIELDS


class Part:
    """A table, the time that is left for it, and the processes that work for it."""

    def __init__(self, name: str, args: Args, deadline: float):
        self.name, self.args, self.deadline, self.failed = name, args, deadline, 0
        self.file = open(args.out / f"{name}.csv", "w")
        self.writer = csv.writer(self.file, lineterminator="\n")
        self.row(*FIELDS)

    def row(self, script, case, metric, value, step="", seconds=""):
        self.writer.writerow((script, case, metric, value, step, seconds))
        self.file.flush()

    def rows(self, script, case, numbers: dict):
        for metric, value in numbers.items():
            self.row(script, case, metric, f"{value:.6g}")

    def failure(self, script: str, case: str, text: str):
        self.failed += 1
        self.row(script, case, "failed", text.strip()[-3000:])
        print(self.name, script, case, "failed:", text.strip().splitlines()[-1], flush=True)

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def start(self, name: str, *arguments, **options):
        """A job in a process and a folder of its own."""
        job = json.dumps({"name": name, "arguments": arguments, "options": options})
        return self.process([Path(__file__).resolve(), "--device", self.args.device, "--job", job])

    def process(self, command: list, **env):
        """Python in a folder of its own, in a group that can be ended as a whole."""
        folder = Path(tempfile.mkdtemp(prefix="gpu-"))
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if self.args.device == "cpu" else {}
        process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=folder,
            env=os.environ | hidden | env,
            stdout=open(folder / "output", "w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        process.folder = folder
        return process

    def wait(self, process) -> int:
        """Until it ends or the time is over; then it and what it started are ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, self.left()))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        return process.wait()

    def result(self, process) -> dict:
        """What a job found."""
        status = self.wait(process)
        output = (process.folder / "output").read_text(errors="replace")
        path = process.folder / "result.json"
        found = json.loads(path.read_text()) if status == 0 and path.exists() else None
        shutil.rmtree(process.folder, ignore_errors=True)
        if found is None:
            raise RuntimeError(output[-3000:] + f"\nexit status {status}, {self.left():.0f} s left")
        return found

    def attempt(self, script: str, case: str, process, use):
        """`use` the result of a job, or write down why there is none."""
        try:
            use(self.result(process))
        except Exception:
            self.failure(script, case, traceback.format_exc())


def facts(part: Part):
    for name, value in (machine() | {"commit": commit_of(ROOT), "memory": memory_gb()}).items():
        part.row("", "machine", name, json.dumps(value))
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        part.row("", "machine", "gpu", card.name)
        part.row("", "machine", "gpu_memory_gb", f"{card.total_memory / 1e9:.1f}")
        part.row("", "machine", "cuda", torch.version.cuda)
        driver = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=False,
        )
        part.row("", "machine", "driver", driver.stdout.strip())
    elif part.args.device == "cuda":
        part.failure("", "machine", "no GPU is found by torch")


def memory_gb() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)


def short(script: str, args: Args, precision: str) -> list[str]:
    """Flags of a run of three iterations."""
    if script == WORDS:
        small = "--sft-texts 256 --rm-pairs 128 --rm-test-pairs 64 --eval-episodes 64"
        return f"{small} --total-episodes 192 --batch-size 64 --micro-batch-size 32".split()
    N, T = (4, 16) if args.quick else (8, 128)
    size = f"--num-envs {N} --num-steps {T} --total-timesteps {3 * N * T} --num-minibatches 2"
    exact = ["--precision", precision] if "atari" in script else []
    return [*size.split(), "--vectorization", "sync", "--torch-threads", "1", *exact]


def right(part: Part):
    """Every script, fp32 and for Atari bf16; on a GPU side by side."""
    jobs = []
    for script in part.args.scripts:
        for precision in ("fp32", "bf16") if "atari" in script else ("fp32",):
            flags = short(script, part.args, precision)
            eager = {"flags": flags, "variant": "eager", "exact": True}
            runs = [
                eager | {"first": True},
                eager | {"flags": [*flags, "--no-cuda"]},
                eager | {"strict": True},
                eager | {"variant": "compiled"},
            ]
            jobs.append((script, precision, part.start("several", script, runs)))
            if part.args.device == "cpu":  # few cores
                compare(part, *jobs.pop())
    for job in jobs:
        compare(part, *job)


def compare(part: Part, script: str, precision: str, process):
    """What the runs of `right` say of each other."""

    def rows(results: list):
        names = ("eager", "on the CPU", "without synchronization", "compiled")
        for name, result in zip(names, results, strict=True):
            if isinstance(result, str):
                part.failure(script, f"{precision}, {name}", result)
        eager, cpu, strict, fast = [x if isinstance(x, dict) else None for x in results]
        if eager:
            numbers = {x: eager[x] for x in ("on_gpu", "peak_gpu_mb", "checkpoint_on_cpu")}
            for name in ("approx_kl", "clipfrac", "policy/approxkl", "policy/clipfrac"):
                if name in eager["minibatch"]:
                    numbers[f"first_{name.split('/')[-1]}"] = eager["minibatch"][name]
            part.rows(script, precision, numbers)
        if eager and cpu:
            part.rows(script, precision, {"first_losses_off_cpu": losses_apart(eager, cpu)})
        if eager and strict:
            part.rows(script, precision, {"same_seed_weights_apart": weights_apart(eager, strict)})
            part.rows(script, precision, {"no_synchronization": strict["on_gpu"]})
        if eager and fast and script in (CARTPOLE, CHEETAH, ATARI):
            part.rows(script, precision, {"compiled_weights_apart": weights_apart(eager, fast)})
            part.rows(script, precision, {"unique_graphs": fast["unique_graphs"]})

    part.attempt(script, precision, process, rows)


def losses_apart(a: dict, b: dict) -> float:
    """Largest relative difference of the first iteration's losses, absolute below 1."""
    pairs = [(x, b["losses"][name]) for name, x in a["losses"].items()]
    return max(abs(x - y) / max(1.0, abs(y)) for x, y in pairs if not math.isnan(x))


def weights_apart(a: dict, b: dict) -> float:
    return max(abs(x - y) for x, y in zip(a["weights"], b["weights"], strict=True))


def ranks(part: Part):
    """The same run by python and by torchrun: distance of the weights, speeds."""
    for script in (CARTPOLE, CHEETAH, ATARI):
        if script not in part.args.scripts:
            continue
        if part.left() < 15:
            part.row(script, "torchrun", "left_out", 1)
            continue
        flags = short(script, part.args, "fp32")
        plain, _ = by_torchrun(part, script, "python", 0, [], flags)
        for case, number, lines in (("1 rank, NCCL", 1, []), ("2 ranks, gloo", 2, GLOO)):
            weights, speed = by_torchrun(part, script, case, number, lines, flags)
            if plain is None or weights is None:
                continue
            apart = max((weights[k].cpu() - plain[k].cpu()).abs().max().item() for k in plain)
            numbers = {"weights_apart_from_python": apart, "steps_per_second": speed}
            part.rows(script, case, numbers)


def by_torchrun(part: Part, script: str, case: str, number: int, lines: list, flags: list):
    """Weights at the end and steps per second of a script with other lines in so many ranks."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / script
        path.write_text(replaced(script, lines))
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={number}"]
        process = part.process([*torchrun * (number > 0), path, *flags])
        status = part.wait(process)
    try:
        assert status == 0, f"exit status {status}"
        (path,) = process.folder.glob("runs/*/checkpoint.pt")
        weights = torch.load(path, map_location="cpu", weights_only=True)["agent"]
        speed = steps_per_second(read_metrics(path.parent / "metrics.csv"))
        return weights, speed
    except Exception:
        output = (process.folder / "output").read_text(errors="replace")
        part.failure(script, case, output + traceback.format_exc())
        return None, None
    finally:
        shutil.rmtree(process.folder, ignore_errors=True)


def sized(script: str, num_envs: int, iterations: int, args: Args, *more: str) -> list[str]:
    """Flags of a run of some iterations with the script's number of steps."""
    steps = {CARTPOLE: 128, CHEETAH: 2048 // num_envs, ATARI: 128}[script]
    if args.quick:
        steps, iterations, more = 16, 4, (*more, "--num-minibatches", "2")
    total = ("--total-timesteps", iterations * steps * num_envs)
    flags = ("--num-envs", num_envs, "--num-steps", steps, *total, *more)
    return [str(flag) for flag in flags]


def variants(part: Part):
    """How the update is compiled decides; one run after the other."""
    cases = [(ATARI, 8, 30), (CHEETAH, 1, 16), (ATARI, 64, 6)]
    if part.args.quick:
        cases = cases[:2]
    cases = [case for case in cases if case[0] in part.args.scripts]
    for script, num_envs, iterations in cases:
        flags = sized(script, num_envs, iterations, part.args)
        for variant in VARIANTS:
            measure(part, script, f"{num_envs} {variant}", flags, variant)
        random_actions(part, script, num_envs)
    for script, num_envs, iterations in cases:
        if script == ATARI and not part.args.quick:
            flags = sized(script, num_envs, iterations, part.args, "--precision", "bf16")
            for variant in VARIANTS:
                measure(part, script, f"{num_envs} {variant} bf16", flags, variant)


def measure(part: Part, script: str, case: str, flags: list, variant: str):
    """One run: its speed, phases, memory and what ran; left out where the time is too short."""
    if part.left() < 15:
        part.row(script, case, "left_out", 1)
        return

    def rows(numbers: dict):
        graphs, captured = numbers["unique_graphs"], numbers["cuda_graphs_captured"]
        needs = {"eager": True, "compiled": graphs, "reduce-overhead": captured and graphs}
        numbers["shown"] = int(bool(needs.get(variant, captured)))
        for name in ("losses", "minibatch", "weights", "checkpoint_on_cpu"):
            del numbers[name]
        part.rows(script, case, numbers)

    process = part.start("train", script, flags, variant=variant)
    part.attempt(script, case, process, rows)


def random_actions(part: Part, script: str, num_envs: int):
    """The floor: what the environments alone would allow."""
    if part.left() < 5:
        part.row(script, num_envs, "left_out", 1)
        return
    flags = sized(script, num_envs, 1, part.args)
    process = part.start("floor", script, flags, 20 if part.args.quick else 1000)
    part.attempt(script, f"{num_envs}", process, lambda found: part.rows(script, num_envs, found))


def fast(part: Part):
    """By the variant that call a found: more environments, without the GPU, beside LeanRL."""
    cases = [(CHEETAH, 1, 16), (CARTPOLE, 4, 100), (ATARI, 128, 16), (CHEETAH, 1, 16)]
    cases += [(CARTPOLE, 128, 20), (CHEETAH, 16, 16), (ATARI, 16, 12)]
    done = set()
    for script, num_envs, iterations in cases:
        if script not in part.args.scripts:
            continue
        again = (script, num_envs) in done
        done.add((script, num_envs))
        flags = sized(script, num_envs, iterations, part.args)
        name = f"{num_envs}{' again' if again else ''}"
        measure(part, script, f"{name} {part.args.variant}", flags, part.args.variant)
        if script != ATARI:
            measure(part, script, f"{name} no-cuda", [*flags, "--no-cuda"], "compiled")
        if script == CHEETAH and num_envs == 1 and part.args.leanrl:
            leanrl(part, name, iterations)
        if not again:
            random_actions(part, script, num_envs)
    part.row(ATARI, "LeanRL, published", "steps_per_second", LEANRL_ATARI)


def leanrl(part: Part, name: str, iterations: int):
    """LeanRL's script, compiled and with CUDA graphs, as it is."""
    script = part.args.leanrl.resolve() / "leanrl" / "ppo_continuous_action_torchcompile.py"
    flags = ["--env-id", "HalfCheetah-v5", "--total-timesteps", iterations * 2048]
    flags += ["--compile", "--cudagraphs"] if part.args.device == "cuda" else ["--no-cuda"]
    case = f"{name} LeanRL"
    process = part.process([SHIM, script, *flags])
    status = part.wait(process)
    try:
        (path,) = process.folder.glob("runs/**/metrics.csv")
        assert status == 0, f"exit status {status}"
        part.rows(CHEETAH, case, {"steps_per_second": steps_per_second(read_metrics(path))})
    except Exception:
        output = (process.folder / "output").read_text(errors="replace")
        part.failure(CHEETAH, case, output + traceback.format_exc())
    shutil.rmtree(process.folder, ignore_errors=True)


def learn(part: Part):
    """The scripts as they are, until the time is over: returns over steps and seconds."""
    runs = [
        (CARTPOLE, "CartPole-v1", 500_000),
        (CHEETAH, "HalfCheetah-v5", 1_000_000),
        (ATARI, "PongNoFrameskip-v4", 10_000_000),
    ]
    processes = []
    for script, env_id, steps in runs:
        if script in part.args.scripts:
            total = 4096 if part.args.quick else steps
            flags = ["--env-id", env_id, "--total-timesteps", total]
            processes.append((script, env_id, part.process([ROOT / script, *flags])))
            if part.args.device == "cpu":  # few cores
                curve(part, *processes.pop())
    for process in processes:
        curve(part, *process)


def curve(part: Part, script: str, env_id: str, process):
    """Twenty points of a run that has ended, or was ended where it was."""
    status = part.wait(process)
    try:
        assert status in (0, -signal.SIGKILL), f"exit status {status}"
        (path,) = process.folder.glob("runs/**/metrics.csv")
        rows = read_metrics(path)
        returns = [row for row in rows if row[2] == "charts/episodic_return"]
        for i in range(len(returns) - 1, -1, -max(1, len(returns) // 20)):
            last = [row[3] for row in returns[max(0, i - 99) : i + 1]]
            step, seconds, *_ = returns[i]
            part.row(script, env_id, "mean_return", f"{statistics.fmean(last):.6g}", step, seconds)
        if env_id == "CartPole-v1" and reach(rows, BAR):
            step, seconds = reach(rows, BAR)
            part.row(script, env_id, f"reaches_{BAR}", 1, step, seconds)
        step, seconds = clock(rows)[-1]
        part.row(script, env_id, "steps_per_second", f"{step / seconds:.6g}", step, seconds)
    except Exception:
        output = (process.folder / "output").read_text(errors="replace")
        part.failure(script, env_id, output + traceback.format_exc())
    shutil.rmtree(process.folder, ignore_errors=True)


def words(part: Part):
    """ppo_rlhf.py: the default run, a model of GPT-2's size, one of SmolLM2's shape."""
    if WORDS not in part.args.scripts:
        return
    default = part.process(
        [ROOT / WORDS, *(short(WORDS, part.args, "") if part.args.quick else [])]
    )
    since = time.monotonic()
    status = part.wait(default)
    try:
        assert status == 0, f"exit status {status}"
        (path,) = default.folder.glob("runs/**/metrics.csv")
        rows = [row for row in read_metrics(path) if row[2] == "eval/ppo/gold/score"]
        part.rows(WORDS, "default", {"wall_seconds": time.monotonic() - since, "gold": rows[-1][3]})
    except Exception:
        output = (default.folder / "output").read_text(errors="replace")
        part.failure(WORDS, "default", output + traceback.format_exc())
    shutil.rmtree(default.folder, ignore_errors=True)
    size = (50_257, 64, "--d-model 768 --num-layers 12 --num-heads 12 --response-length 24")
    loop = "--batch-size 512 --update-epochs 4 --total-episodes 1536 --micro-batch-size 128"
    if part.args.quick:
        size = (500, 8, "--d-model 32 --num-layers 2 --num-heads 2 --response-length 6")
        loop = "--batch-size 16 --update-epochs 2 --total-episodes 48"
    flags = f"{size[2]} {loop} --sft-texts 128 --eval-episodes 64 --stages sft,ppo".split()
    bf16 = [*flags, "--precision", "bf16"]
    for case, tf32, more in (("fp32", False, flags), ("TF32", True, flags), ("bf16", True, bf16)):
        process = part.start("long_words", size[0], size[1], more, tf32)
        part.attempt(WORDS, case, process, lambda x, case=case: part.rows(WORDS, case, x))
    loop = "--batch-size 64 --micro-batch-size 16 --response-length 64 --total-episodes 192"
    shape = SMOLLM
    if part.args.quick:
        loop = "--batch-size 8 --micro-batch-size 4 --response-length 6 --total-episodes 16"
        shape = SMOLLM | {"vocab_size": 500, "hidden_size": 36, "num_hidden_layers": 2}
    for case, more in (("SmolLM2", []), ("SmolLM2, LoRA", ["--lora-rank", "16"])):
        process = part.start("real_words", shape, [*loop.split(), *more])
        part.attempt(WORDS, case, process, lambda x, case=case: part.rows(WORDS, case, x))
    part.row(WORDS, "8 V100, published", "hours_per_million_episodes", f"{LHP_SECONDS / 3600:.3g}")


PARTS = {x.__name__: x for x in (facts, right, ranks, variants, fast, learn, words)}


def run(name: str, args: Args, deadline: float) -> bool:
    """One part. Returns whether something in it failed."""
    part = Part(name, args, deadline)
    try:
        PARTS[name](part)
    except Exception:
        part.failure("", "", traceback.format_exc())
    part.file.close()
    return part.failed > 0


def main(args: Args) -> int:
    """The parts that are asked for. Returns how many of them failed."""
    results_folder(args.out)
    shares = {k: v for call in CALLS if call in args.call for k, v in CALLS[call].items()}
    if args.parts:
        shares = {k: v for k, v in shares.items() if set(k) & set(args.parts)}
    failed, end = 0, time.monotonic() + args.seconds
    while shares:
        names, share = next(iter(shares.items()))
        names = [name for name in names if not args.parts or name in args.parts]
        now = time.monotonic()
        deadline = now + (end - now) * share / sum(shares.values())
        with ThreadPoolExecutor() as pool:
            failed += sum(pool.map(lambda name, d=deadline: run(name, args, d), names))
        del shares[next(iter(shares))]
    print(f"{failed} parts failed")
    return failed


def work(job: str):
    """What `Part.start` asks for; the result is a file."""
    job = json.loads(job)
    found = JOBS[job["name"]](*job["arguments"], **job["options"])
    Path("result.json").write_text(json.dumps(found))


if __name__ == "__main__":
    arguments = tyro.cli(Args)
    sys.exit(work(arguments.job) if arguments.job else main(arguments))
