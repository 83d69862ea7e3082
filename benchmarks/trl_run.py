"""Runs the PPOTrainer of TRL 1.9.0 on the task and with the sizes of ppo_rlhf.py, untrained.

    PYTHON benchmarks/trl_run.py --batch-size 256 --total-episodes 2560

PYTHON is that of an environment with pip install torch==2.13.0 trl==1.9.0 tqdm tyro. The models
are GPT-2 of 2 layers, 4 heads, width 64; prompts have up to 12 tokens, responses 24 at most. With
--model, --reward-model and --prompts, files as for ppo_rlhf.py, they are those. Leaves
runs/trl/metrics.csv in the columns of ours, with rows at the end of each update: ppo/episode, the
seconds of its phases and the length of its responses.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where our scripts are
import ppo_rlhf


class Metrics(TrainerCallback):
    """Writes metrics.csv; `time` is in seconds since its construction.

    TRL tells no phases. They begin where it calls these of its functions: `batch_generation`, what
    comes after it, and `forward` with gradients.
    """

    def __init__(self, folder: Path, batch_size: int, pad_token_id: int):
        folder.mkdir(parents=True)
        self.file = open(folder / "metrics.csv", "w")
        self.file.write("global_step,time,name,value\n")
        self.batch_size, self.start_time = batch_size, time.time()
        self.times, self.length = [], 0.0
        batch_generation, forward = ppo_trainer.batch_generation, ppo_trainer.forward

        def timed_generation(model, queries, *args):
            self.times = [time.time()]
            texts, logits = batch_generation(model, queries, *args)
            self.times.append(time.time())
            written = texts[:, queries.shape[1] :] != pad_token_id
            self.length = written.sum(1).float().mean().item()
            return texts, logits

        def timed_forward(*args):
            if torch.is_grad_enabled() and len(self.times) == 2:  # the first of training
                self.times.append(time.time())
            return forward(*args)

        ppo_trainer.batch_generation, ppo_trainer.forward = timed_generation, timed_forward

    def on_step_end(self, args, state, control, **kwargs):
        phases = np.diff([*self.times, time.time()])
        values = dict(zip(("time/gen", "time/score", "time/train"), phases, strict=True))
        episodes, seconds = state.global_step * self.batch_size, time.time() - self.start_time
        values |= {"response/length": self.length, "ppo/episode": episodes}
        for name, value in values.items():
            self.file.write(f"{episodes},{seconds:.3f},{name},{value}\n")

    def on_train_end(self, args, state, control, **kwargs):
        self.file.close()


def small_models(args, ours):
    """Tokenizer, tokens of prompts, and policy, reference, reward and value model."""
    task = ppo_rlhf.TASKS["reviews"]
    words = {word: number for number, word in enumerate([*task.words, "[PAD]"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="[PAD]")),
        eos_token="EOS",
        pad_token="[PAD]",
        padding_side="left",
    )
    rng = np.random.default_rng(args.seed)
    prompts = [task.write_prompt(rng).split() for _ in range(args.total_episodes)]
    config = GPT2Config(
        vocab_size=64,
        n_positions=task.prompt_length + ours.response_length,
        n_embd=ours.d_model,
        n_layer=ours.num_layers,
        n_head=ours.num_heads,
        bos_token_id=task.eos,
        eos_token_id=task.eos,
        pad_token_id=words["[PAD]"],
        num_labels=1,
    )
    kinds = 2 * [GPT2LMHeadModel] + 2 * [GPT2ForSequenceClassification]
    return tokenizer, [[words[x] for x in p] for p in prompts], [kind(config) for kind in kinds]


def real_models(args):
    """The same, of --model, --reward-model and --prompts."""
    task = ppo_rlhf.Texts(args.model, ppo_rlhf.Args())
    rows = [json.loads(line) for line in open(args.prompts)]
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.pad_token = tokenizer.unk_token  # TRL takes all of them for padding
    kinds = 2 * [(AutoModelForCausalLM, args.model)]
    kinds += 2 * [(AutoModelForSequenceClassification, args.reward_model)]
    found = [kind.from_pretrained(path, dtype=torch.float32) for kind, path in kinds]
    found[0].generation_config.pad_token_id = tokenizer.pad_token_id
    prompts = [task.ids({"prompt": row["prompt"]})[0] for row in rows]
    return tokenizer, prompts, found


def main(args):
    ours = ppo_rlhf.Args()
    torch.manual_seed(args.seed)
    tokenizer, prompts, networks = real_models(args) if args.model else small_models(args, ours)
    model, ref_model, reward_model, value_model = networks
    micro_batch_size = args.micro_batch_size or args.batch_size
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir="trl",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            num_sample_generations=0,
            disable_tqdm=True,
            seed=args.seed,
            total_episodes=args.total_episodes,
            per_device_train_batch_size=micro_batch_size,
            gradient_accumulation_steps=args.batch_size // micro_batch_size,
            local_rollout_forward_batch_size=args.batch_size,
            num_ppo_epochs=args.update_epochs,
            num_mini_batches=1,
            response_length=args.response_length,
            stop_token="eos",
            temperature=ours.temperature,
            missing_eos_penalty=1.0,
            kl_coef=ours.kl_coef,
            learning_rate=args.learning_rate,
        ),
        processing_class=tokenizer,
        model=model,
        ref_model=ref_model,
        reward_model=reward_model,
        value_model=value_model,
        train_dataset=Dataset.from_dict({"input_ids": prompts}),
        eval_dataset=Dataset.from_dict({"input_ids": prompts[:1]}),
        callbacks=[Metrics(Path("runs/trl"), args.batch_size, tokenizer.pad_token_id)],
    )
    trainer.train()


if __name__ == "__main__":
    ours = ppo_rlhf.Args()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--micro-batch-size", type=int)
    parser.add_argument("--response-length", type=int, default=ours.response_length)
    parser.add_argument("--update-epochs", type=int, default=ours.update_epochs)
    parser.add_argument("--learning-rate", type=float, default=ours.learning_rate)
    parser.add_argument("--total-episodes", type=int, default=2560)
    parser.add_argument("--seed", type=int, default=1)
    for name in ("--model", "--reward-model", "--prompts"):
        parser.add_argument(name)
    main(parser.parse_args())
