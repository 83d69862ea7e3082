"""All three stages of ppo_rlhf.py on SmolLM2-135M, and what it answers before, between and after.

    python benchmarks/smollm2_model.py smollm2-135m
    python benchmarks/smollm2_train.py smollm2-135m

The model learns the format of smollm2/format.py: SFT from 96 demonstrations, the reward model from
pairs.jsonl, PPO from prompts.jsonl. The 64 other questions of held_out.jsonl are then answered by
the model as it was, by the SFT policy and by what the run has exported, each loaded and sampled by
transformers.

Writes answers.csv, metrics.csv and samples.jsonl of the run, and run.json with the command, the
machine, the largest memory of the process and the seconds of each checkpoint, all into
docs/results/smollm2/. The run itself is left in runs/. Other flags of ppo_rlhf.py can be added.
"""

import csv
import importlib.util
import json
import resource
import runpy
import shutil
import sys
import time
from pathlib import Path

import torch
from speed import ROOT, commit_of, machine
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

TEXTS = Path(__file__).parent / "smollm2"
OUT = ROOT / "docs" / "results" / "smollm2"
DATA = {
    "--sft-data": "pairs.jsonl",
    "--pref-data": "pairs.jsonl",
    "--prompts": "prompts.jsonl",
    "--eval-prompts": "held_out.jsonl",
}
FLAGS = """--torch-threads 2 --response-length 24
--sft-texts 96 --sft-learning-rate 5e-5 --rm-learning-rate 2e-5
--batch-size 32 --num-minibatches 4 --update-epochs 1 --total-episodes 512 --critic-warmup 1
--learning-rate 2e-5 --value-learning-rate 5e-5"""


def command(model: str, *more: str) -> list[str]:
    """The command line, its files relative to the repository."""
    files = [x for flag, name in DATA.items() for x in (flag, f"benchmarks/smollm2/{name}")]
    return ["--model", model, *files, *FLAGS.split(), *more]


@torch.no_grad()
def answers(model, tokenizer, batch_size: int = 16) -> list[tuple[str, str, bool]]:
    """Question, answer and whether it ended, for each row of held_out.jsonl; temperature 1."""
    torch.manual_seed(1)
    lines = (TEXTS / "held_out.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines]
    template = dict(add_generation_prompt=True, tokenize=False)
    texts = [tokenizer.apply_chat_template(prompt, **template) for prompt in prompts]
    tokenizer.padding_side, found = "left", []
    for i in range(0, len(texts), batch_size):
        batch = texts[i : i + batch_size]
        inputs = tokenizer(batch, padding=True, add_special_tokens=False, return_tensors="pt")
        how = dict(do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=24)
        output = model.generate(**inputs, **how)[:, inputs["input_ids"].shape[1] :]
        ended = (output == tokenizer.eos_token_id).any(1).tolist()
        found += zip(tokenizer.batch_decode(output, skip_special_tokens=True), ended, strict=True)
    questions = [prompt[-1]["content"] for prompt in prompts]
    return [(question, *answer) for question, answer in zip(questions, found, strict=True)]


def main(model: str, *more: str):
    logging.disable_progress_bar()
    parses = runpy.run_path(TEXTS / "format.py")["parses"]
    spec = importlib.util.spec_from_file_location("ppo_rlhf", ROOT / "ppo_rlhf.py")
    ppo_rlhf = sys.modules["ppo_rlhf"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ppo_rlhf)
    saves, save = [], ppo_rlhf.Run.save_checkpoint

    def timed_save(run):
        start = time.perf_counter()
        save(run)
        size = (run.folder / "checkpoint.pt").stat().st_size
        saves.append({"stage": run.stage, "seconds": time.perf_counter() - start, "bytes": size})

    ppo_rlhf.Run.save_checkpoint = timed_save
    sys.argv = ["ppo_rlhf.py", *command(model, *more)]
    start = time.perf_counter()
    args = ppo_rlhf.parse_args(sys.argv[1:])
    ppo_rlhf.check_args(args)
    ppo_rlhf.train(args)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    folder = max(Path("runs").iterdir(), key=lambda path: path.stat().st_mtime)

    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    policies = {"before": AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)}
    policies["sft"] = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    weights = torch.load(folder / "reference.pt", weights_only=True)
    policies["sft"].load_state_dict({k.removeprefix("model."): x for k, x in weights.items()})
    policies["ppo"] = AutoModelForCausalLM.from_pretrained(folder / "policy")
    rows = [(name, *x) for name, policy in policies.items() for x in answers(policy, tokenizer)]

    OUT.mkdir(parents=True, exist_ok=True)
    with open(OUT / "answers.csv", "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("policy", "question", "answer", "ended", "parses"))
        writer.writerows((*row, parses(row[2])) for row in rows)
    for name in ("metrics.csv", "samples.jsonl"):
        shutil.copy(folder / name, OUT)
    config = json.loads((folder / "config.json").read_text())
    facts = {"command": f"python ppo_rlhf.py {' '.join(command('smollm2-135m', *more))}"}
    facts |= {"seconds": seconds, "peak_gib": peak, "saves": saves, "commit": commit_of(ROOT)}
    facts |= {"versions": config["versions"], "machine": machine()}
    (OUT / "run.json").write_text(json.dumps(facts, indent=2) + "\n")
    for name in policies:
        parsed = [parses(row[2]) for row in rows if row[0] == name]
        print(f"{name}: {sum(parsed)} of {len(parsed)} answers have the format")


if __name__ == "__main__":
    main(*sys.argv[1:])
