"""Runs the PPOTrainer of TRL 1.9.0 on the task and with the sizes of ppo_rlhf.py, untrained.

    PYTHON benchmarks/trl_run.py --batch-size 256 --total-episodes 2560

PYTHON is that of an environment with pip install torch==2.13.0 trl==1.9.0 tqdm tyro. The models
are GPT-2 of 2 layers, 4 heads, width 64; prompts have up to 12 tokens, responses 24 at most. Leaves
runs/trl/metrics.csv in the columns of ours, with a row ppo/episode at the end of each update.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where our scripts are
import ppo_rlhf


class Metrics(TrainerCallback):
    """Writes metrics.csv; `time` is in seconds since its construction."""

    def __init__(self, folder: Path, batch_size: int):
        folder.mkdir(parents=True)
        self.file = open(folder / "metrics.csv", "w")
        self.file.write("global_step,time,name,value\n")
        self.batch_size, self.start_time = batch_size, time.time()

    def on_step_end(self, args, state, control, **kwargs):
        episodes, seconds = state.global_step * self.batch_size, time.time() - self.start_time
        self.file.write(f"{episodes},{seconds:.3f},ppo/episode,{episodes}\n")

    def on_train_end(self, args, state, control, **kwargs):
        self.file.close()


def main(args):
    ours = ppo_rlhf.Args()
    task = ppo_rlhf.TASKS["reviews"]
    torch.manual_seed(args.seed)
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
            per_device_train_batch_size=args.batch_size,
            gradient_accumulation_steps=1,
            local_rollout_forward_batch_size=args.batch_size,
            num_ppo_epochs=ours.update_epochs,
            num_mini_batches=1,
            response_length=ours.response_length,
            stop_token="eos",
            temperature=ours.temperature,
            missing_eos_penalty=1.0,
            kl_coef=ours.kl_coef,
            learning_rate=ours.learning_rate,
        ),
        processing_class=tokenizer,
        model=GPT2LMHeadModel(config),
        ref_model=GPT2LMHeadModel(config),
        reward_model=GPT2ForSequenceClassification(config),
        value_model=GPT2ForSequenceClassification(config),
        train_dataset=Dataset.from_dict({"input_ids": [[words[x] for x in p] for p in prompts]}),
        eval_dataset=Dataset.from_dict({"input_ids": [[words[x] for x in prompts[0]]]}),
        callbacks=[Metrics(Path("runs/trl"), args.batch_size)],
    )
    trainer.train()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--total-episodes", type=int, default=2560)
    parser.add_argument("--seed", type=int, default=1)
    main(parser.parse_args())
