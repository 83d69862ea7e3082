"""Seconds that the sampler of ppo_rlhf.py takes beside model.generate of transformers, in turn.

    python benchmarks/smollm2_model.py smollm2-135m
    python benchmarks/sampling.py --model smollm2-135m

Both write with the same model in fp32, on one CPU thread and on all, after the same prompts: random
tokens, padded on the left to different lengths. They sample from all tokens at temperature 1 and
keep keys and values in a cache.

all     nothing ends a response, every row runs for all columns
early   ours only: seven of eight rows end after 8 tokens. Rows that have ended need no more passes;
        what that saves is the share of the seconds of `all`

The order turns round after each round; a round before the first does not count. Writes
sampling.csv, a row for each run, and sampling.json: where it comes from, and the medians over the
rounds of generate's seconds by ours, and of early by all.
"""

import dataclasses
import datetime
import json
import statistics
import sys
import time
from importlib import metadata
from pathlib import Path

import torch
import tyro
from speed import ALL, ROOT, commit_of, machine, results_folder, save, without_paths

sys.path.insert(0, str(ROOT))
import ppo_rlhf

EARLY = 8  # tokens of a response that ends early, EOS included
MARK, EOS = 1, 2  # the last token of a prompt whose response ends early, and what ends it
PROGRAMS = (("all", "ours"), ("all", "generate"), ("early", "ours"))


@dataclasses.dataclass(frozen=True)
class Args:
    model: Path  # folder of a causal model of Hugging Face
    batch: int = 32  # rows
    tokens: int = 64  # columns of a response
    prompt: int = 32  # columns of a prompt; the shortest has half as many tokens
    rounds: int = 5  # runs of each program with each number of threads
    threads: tuple[int, ...] = (1, int(ALL))  # CPU threads of torch
    out: Path = ROOT / "docs" / "results"  # folder of the results


class EndsEarly(ppo_rlhf.Policy):
    """Writes EOS as the token number EARLY of the marked rows, and nowhere else.

    It looks at the tokens alone: rows that have ended may be missing from the batch.
    """

    def __init__(self, model, num_tokens: int, prompt_length: int):
        super().__init__(model, num_tokens, 1.0)
        self.prompt_length = prompt_length

    def forward(self, tokens, *args, **options):
        logits, cache = super().forward(tokens, *args, **options)
        ends = tokens[:, self.prompt_length - 1] == MARK
        ends &= tokens.shape[1] == self.prompt_length + EARLY - 1
        logits[ends] = -torch.inf
        logits[..., EOS] = torch.where(ends, 0.0, -torch.inf)[:, None]
        return logits, cache


def make_prompts(args: Args, num_tokens: int) -> torch.Tensor:
    """[B, P]: a row has from half of the columns to all, and seven of eight end with MARK."""
    prompts = torch.randint(EOS + 1, num_tokens, (args.batch, args.prompt))
    padding = torch.linspace(0, args.prompt // 2, args.batch).long()
    prompts[torch.arange(args.prompt) < padding[:, None]] = ppo_rlhf.PAD
    prompts[torch.arange(args.batch) % 8 > 0, -1] = MARK
    return prompts


def sampler(case: str, program: str, model, prompts: torch.Tensor, tokens: int):
    """A function that writes the responses once -> [B, P + R]"""
    num_tokens = model.config.vocab_size
    if program == "generate":
        mask = (prompts != ppo_rlhf.PAD).long()
        inputs = {"input_ids": prompts.clamp(min=0), "attention_mask": mask}
        return lambda: model.generate(**inputs, max_new_tokens=tokens)
    policy = ppo_rlhf.Policy(model, num_tokens, 1.0)
    if case == "early":
        policy = EndsEarly(model, num_tokens, prompts.shape[1])

    def has_ended(responses):
        return ((responses == EOS) & (case == "early")).any(1)

    def run():
        uniforms = torch.rand(len(prompts), tokens, dtype=torch.float64)
        return ppo_rlhf.generate(policy, prompts, tokens, has_ended, uniforms)[0]

    return run


def ratios(rows: list[dict]) -> dict[str, dict[int, float]]:
    """Of seconds to those of ours in case `all`: medians over the rounds, by number of threads."""
    names = ("threads", "round", "case", "program")
    seconds = {tuple(row[name] for name in names): row["seconds"] for row in rows}
    found = {"generate_by_ours": {}, "early_by_all": {}}
    for name, program in zip(found, PROGRAMS[1:], strict=True):
        pairs = {}
        for run in dict.fromkeys(key[:2] for key in seconds):
            ratio = seconds[*run, *program] / seconds[*run, *PROGRAMS[0]]
            pairs.setdefault(run[0], []).append(ratio)
        found[name] = {k: round(statistics.median(x), 3) for k, x in pairs.items()}
    return found


def main(args: Args):
    results_folder(args.out)
    model = ppo_rlhf.pretrained("AutoModelForCausalLM", args.model, dtype=torch.float32)
    from transformers import GenerationConfig

    torch.manual_seed(1)
    how = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "use_cache": True}
    # a model's own configuration: what one given to `generate` leaves out is taken from it
    model.generation_config = GenerationConfig(**how, pad_token_id=EOS)
    prompts, rows = make_prompts(args, model.config.vocab_size), []
    commit = commit_of(ROOT)
    for number in range(args.rounds + 1):
        order = [(threads, *program) for threads in args.threads for program in PROGRAMS]
        for threads, case, program in order if number % 2 else reversed(order):
            torch.set_num_threads(threads)
            run = sampler(case, program, model, prompts, args.tokens)
            start = time.perf_counter()
            texts = run()
            seconds = time.perf_counter() - start
            assert texts.shape[1] == args.prompt + args.tokens
            written = texts[:, args.prompt :] != ppo_rlhf.PAD
            row = {"case": case, "program": program, "threads": threads, "round": number}
            row["seconds"] = round(seconds, 4)
            row["tokens_per_s"] = round(written.sum().item() / seconds, 1)
            if number:
                save(args.out / "sampling.csv", rows, row | {"commit": commit})
    origin = {"command": without_paths(sys.argv), "date": datetime.date.today().isoformat()}
    origin |= machine() | {"commit": commit} | ratios(rows)
    origin["versions"]["transformers"] = metadata.version("transformers")
    (args.out / "sampling.json").write_text(json.dumps(origin, indent=2) + "\n")
    print(ratios(rows))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.splitlines()[0]))
