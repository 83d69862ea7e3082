"""What memory ppo_rlhf.py takes for models of 0.1 to 7 billion weights: calculated, and measured.

    python benchmarks/smollm2_model.py smollm2-135m
    python benchmarks/memory.py --model smollm2-135m

Calculated is what `ppo_rlhf.py --plan` prints, for the shapes of SmolLM2-135M and of Qwen2.5, from
their configurations alone. Measured is the largest resident set of a process that runs PPO with the
model of --model for one iteration, two epochs, less that of a process which only imports the same;
glibc is told to give back blocks of 256 KB and more (MALLOC_MMAP_THRESHOLD_), else it keeps them.

full    all weights learn, fp32
lora    adapters of rank 16 on shared weights, fp32
frugal  lora, with bf16 autocast and checkpointed layers

Writes memory.csv, a row for each model and case in GB, and memory.json, where it comes from.
"""

import dataclasses
import datetime
import json
import os
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import tyro
from speed import ROOT, commit_of, machine, results_folder, save, without_paths

QWEN = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 151936}
SMOLLM = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 49152}
NAMES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SHAPES = {  # of the configurations that their makers publish; all but the largest are tied
    "SmolLM2-135M": SMOLLM | dict(zip(NAMES, (576, 30, 9, 3), strict=True), intermediate_size=1536),
    "Qwen2.5-0.5B": QWEN | dict(zip(NAMES, (896, 24, 14, 2), strict=True), intermediate_size=4864),
    "Qwen2.5-1.5B": QWEN | dict(zip(NAMES, (1536, 28, 12, 2), strict=True), intermediate_size=8960),
    "Qwen2.5-3B": QWEN | dict(zip(NAMES, (2048, 36, 16, 2), strict=True), intermediate_size=11008),
    "Qwen2.5-7B": QWEN
    | dict(zip(NAMES, (3584, 28, 28, 4), strict=True), intermediate_size=18944, vocab_size=152064),
}
CASES = {
    "full": [],
    "lora": ["--lora-rank", "16"],
    "frugal": ["--lora-rank", "16", "--precision", "bf16", "--gradient-checkpointing"],
}
SIZES = "--batch-size 32 --micro-batch-size 8 --response-length 64 --no-cuda"
SIZES += " --total-episodes 32 --update-epochs 2"
IMPORTS = "import ppo_rlhf, transformers, peft; transformers.AutoModelForCausalLM"
PROMPTS = ROOT / "benchmarks" / "smollm2" / "prompts.jsonl"
REWARD = "def length(completions):\n    return [float(len(text)) for text in completions]\n"


@dataclasses.dataclass(frozen=True)
class Args:
    model: Path | None = None  # folder of SmolLM2-135M, to measure; None: only calculated
    prompt: int = 64  # columns of a prompt
    out: Path = ROOT / "docs" / "results"  # folder of the results


def run(command: list, folder: str) -> tuple[str, float]:
    """What a program prints, and its largest resident set in GB."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    env |= {"MALLOC_MMAP_THRESHOLD_": "262144"}
    command = [sys.executable, *map(str, command)]
    with subprocess.Popen(
        command, cwd=folder, env=env, stdout=subprocess.PIPE, text=True
    ) as process:
        text = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{command}: exit code {process.returncode}")
    return text, used.ru_maxrss * 1024 / 1e9


def calculated(text: str) -> dict[str, float]:
    """The table of --plan: name -> GB"""
    lines = [line.rsplit(maxsplit=2) for line in text.splitlines()]
    return {name: float(size) for name, size, _ in lines}


def main(args: Args):
    results_folder(args.out)
    rows, commit = [], commit_of(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "reward.py").write_text(REWARD)
        sizes = [*SIZES.split(), "--prompts", PROMPTS.resolve(), "--stages", "ppo"]
        sizes += ["--reward-fn", "reward.py:length", "--critic-warmup", "0"]
        _, imports = run(["-c", IMPORTS], folder)
        for model, shape in SHAPES.items():
            tied = {"tie_word_embeddings": shape["hidden_size"] < 3000}
            Path(folder, model).mkdir()
            Path(folder, model, "config.json").write_text(json.dumps(shape | tied))
            for case, flags in CASES.items():
                command = [ROOT / "ppo_rlhf.py", *sizes, *flags]
                plan = ["--plan", "--prompt-length", args.prompt]
                text, _ = run([*command, "--model", model, *plan], folder)
                found, row = calculated(text), {"model": model, "case": case}
                row["weights"] = round(sum(x for k, x in found.items() if "weights" in k), 3)
                row |= {name: found[name] for name in ("gradients", "moments of AdamW")}
                row |= {name: found[name] for name in ("update", "sampling")}
                row |= {"calculated": found["at most at a time"], "measured": ""}
                if args.model and model == "SmolLM2-135M":
                    _, used = run([*command, "--model", args.model.resolve()], folder)
                    row["measured"] = round(used - imports, 3)
                save(args.out / "memory.csv", rows, row | {"commit": commit})
    origin = {"command": without_paths(sys.argv), "date": datetime.date.today().isoformat()}
    origin |= machine() | {"commit": commit, "imports": round(imports, 3)}
    origin["versions"] |= {name: metadata.version(name) for name in ("transformers", "peft")}
    (args.out / "memory.json").write_text(json.dumps(origin, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.splitlines()[0]))
