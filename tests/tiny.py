"""Language models of a moment, in the format of Hugging Face, each with traps of real ones.

    save_model(tmp_path / "model", "llama")
    save_classifier(tmp_path / "reward", "gpt2", tokenizer_seed=1)  # another vocabulary

Each kind is a row of KINDS; what may go wrong with it stands there. Common to all:

- weights are so large that logits differ by a nat or more, and no bias or norm is trivial
- tokens are bytes and pieces of English words: any text can be written with them; a Chinese
  letter takes three, and what stops within a letter is no text
- tokenizers pad on the right, if they can pad at all
- 32 numbers for each token, two layers, four heads; a folder has less than 0.3 MB
"""

import json
import math
import os
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # or each process started is a warning

NUM_WORDS = 320  # 256 bytes and the merges
TEXTS = [
    "the film was a delight from the first scene to the last one",
    "another review of a book that nobody wanted to finish",
    "we tried the new restaurant, and the soup was cold again",
    "She said that there would be rain tomorrow; there was none.",
    "What is the answer? The answer is what you think it is.",
    "They have been waiting for the other train since this morning",
    "to be or not to be, that is the question",
    "A reader of this sentence should find nothing in it.",
    "when the river was low, the children went over to the other side",
    "1 2 3 4 5 and then 6 7 8 9 10, in that order",
    "He thought about the weather and wrote another letter home.",
    "from here on the road goes up into the hills and the forest",
]

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for message in messages %}"
    "<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n{{ message.content | trim }}"
    "<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}"
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}\n"
    "{{ message.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"max_position_embeddings": 256, "initializer_range": 0.25}
ROTARY = SIZES | {"intermediate_size": 64, "num_key_value_heads": 2}

# special: their ids follow those of the words, so that tokenizer.vocab_size leaves them out; or,
# with first=True, they are 0, 1, ... tokens: what the tokenizer calls them. config: tokens where
# the file has their ids; generation: likewise, what generation_config.json says beyond it.
KINDS = {
    # Absolute positions: padding shifts them unless they are given, and 256 is the end. One special
    # token, no padding, no template. Embeddings tied. Dropout 0.5 in training mode.
    "gpt2": dict(
        special="<|endoftext|>",
        tokens=dict(bos_token="<|endoftext|>", eos_token="<|endoftext|>"),
        config=SIZES
        | dict(bos_token_id="<|endoftext|>", eos_token_id="<|endoftext|>", pad_token_id=None)
        | dict(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5),
    ),
    # generation_config.json would warp what a program samples with `generate`: one or two tokens
    # are left. All of it, and EOS, comes back when a GenerationConfig says eos_token_id=None. Three
    # places name EOS, no two alike. The tokenizer puts BOS before a text, and so does the template:
    # twice, if the one reads what the other wrote. The template strips what was said. No padding.
    # Embeddings not tied. bfloat16 on the disk, and in memory unless told otherwise.
    "llama": dict(
        special="<|begin_of_text|> <|end_of_text|> "
        "<|start_header_id|> <|end_header_id|> <|eot_id|>",
        tokens=dict(bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"),
        config=ROTARY
        | dict(bos_token_id="<|begin_of_text|>", eos_token_id="<|end_of_text|>", pad_token_id=None)
        | dict(tie_word_embeddings=False),
        generation=dict(eos_token_id=["<|end_of_text|>", "<|eot_id|>"], do_sample=True)
        | dict(temperature=0.6, top_k=5, top_p=0.5, repetition_penalty=1.5, min_new_tokens=4),
        bos="<|begin_of_text|>",
        template=LLAMA,
        dtype=torch.bfloat16,
    ),
    # Two EOS; the second is padding, too, whose embedding is zero and never learns. Behind the
    # tokens at least 64 unused rows, with all of the probability unless they are cut off. Loaded,
    # the tokenizer is one that changes texts to Unicode's NFC.
    "qwen2": dict(
        special="<|endoftext|> <|im_start|> <|im_end|>",
        tokens=dict(eos_token="<|im_end|>", pad_token="<|endoftext|>"),
        config=ROTARY
        | dict(bos_token_id="<|endoftext|>", eos_token_id="<|im_end|>")
        | dict(pad_token_id="<|endoftext|>", tie_word_embeddings=False),
        generation=dict(eos_token_id=["<|im_end|>", "<|endoftext|>"]),
        template=CHATML,
        unused_rows=64,
    ),
    # Padding is EOS: a mask made of `ids != pad` loses EOS, and a classifier reads the token before
    # it. And it is 0, which is false. No template. Embeddings not tied. Dropout 0.3.
    "gpt_neox": dict(
        special="<|endoftext|>",
        first=True,
        tokens=dict.fromkeys(["bos_token", "eos_token", "pad_token"], "<|endoftext|>"),
        config=SIZES
        | dict.fromkeys(["bos_token_id", "eos_token_id", "pad_token_id"], "<|endoftext|>")
        | dict(intermediate_size=64, attention_dropout=0.3, hidden_dropout=0.3)
        | dict(tie_word_embeddings=False),
    ),
    # Logits and attention go through a tanh: the head times the last hidden state is not what the
    # model says. The first layer sees 16 columns. Embeddings tied. BOS as in llama. The template
    # raises for a system and for turns out of order, and ends a turn with a token that is no EOS.
    # After .double() all is NaN as soon as there is padding.
    "gemma": dict(
        model_type="gemma2",
        special="<pad> <eos> <bos> <start_of_turn> <end_of_turn>",
        first=True,
        tokens=dict(pad_token="<pad>", eos_token="<eos>", bos_token="<bos>"),
        config=ROTARY
        | dict(pad_token_id="<pad>", eos_token_id="<eos>", bos_token_id="<bos>")
        | dict(head_dim=8, query_pre_attn_scalar=8, sliding_window=16)
        | dict(final_logit_softcapping=4.0, attn_logit_softcapping=1.0, tie_word_embeddings=True),
        bos="<bos>",
        template=GEMMA,
    ),
    # Logits, embeddings, attention and residuals are scaled, each by a number of its own. BOS, EOS
    # and padding are one token, 0, with an embedding of zero. Embeddings tied. No template.
    # transformers has no classifier of this kind.
    "granite": dict(
        special="<|end_of_text|>",
        first=True,
        tokens=dict.fromkeys(["bos_token", "eos_token", "pad_token"], "<|end_of_text|>"),
        config=ROTARY
        | dict.fromkeys(["bos_token_id", "eos_token_id", "pad_token_id"], "<|end_of_text|>")
        | dict(logits_scaling=1.5, embedding_multiplier=3.0, residual_multiplier=0.7)
        | dict(attention_multiplier=0.5, tie_word_embeddings=True),
    ),
}


def train_tokenizer(special=(), *, seed=0, first=False):
    """Byte-level BPE with NUM_WORDS tokens and the special ones -> tokenizers.Tokenizer

    Every seed has its own merges, and its own ids for the tokens all have.
    """
    rng = random.Random(seed)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_WORDS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(rng.sample(TEXTS, 8), trainer)
    learned = json.loads(tokenizer.to_str())["model"]
    words = rng.sample(sorted(learned["vocab"]), NUM_WORDS)
    vocab = {word: i for i, word in enumerate([*special, *words] if first else words)}
    tokenizer.model = models.BPE(vocab, [tuple(merge) for merge in learned["merges"]])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def save_tokenizer(folder, kind, *, seed=0, eos=False):
    """Write the tokenizer of a kind, and return it. eos: it puts EOS behind every text."""
    row = KINDS[kind]
    tokenizer = train_tokenizer(row["special"].split(), seed=seed, first=row.get("first", False))
    before, behind = row.get("bos"), row["tokens"]["eos_token"] if eos else None
    added = [token for token in (before, behind) if token]
    if added:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[token for token in (before, "$A", behind) if token],
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in added],
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        chat_template=row.get("template"),
        **row["tokens"],
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def save(auto, folder, kind, *, seed, tokenizer_seed=0, eos=False, dtype=None, **config):
    """Write a model that the class `auto` builds, and its tokenizer. Returns the folder.

    seed: of the weights. tokenizer_seed: another one, another vocabulary. eos: the tokenizer puts
    EOS behind every text. dtype: on the disk. config: changes of the configuration, such as
    vocab_size=100, which is too few for the tokenizer.
    """
    row, folder = KINDS[kind], Path(folder)
    tokenizer = save_tokenizer(folder, kind, seed=tokenizer_seed, eos=eos)
    num_tokens, unused = len(tokenizer), row.get("unused_rows", 0)

    def with_ids(settings):
        convert = tokenizer.convert_tokens_to_ids
        named = {k: v for k, v in settings.items() if k.endswith("_token_id") and v is not None}
        return settings | {name: convert(value) for name, value in named.items()}

    rows = math.ceil(num_tokens / 64) * 64 + unused if unused else num_tokens
    config = {"vocab_size": rows} | with_ids(row["config"]) | config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto.from_config(AutoConfig.for_model(row.get("model_type", kind), **config))
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases
                parameter.data += 0.1 * torch.randn_like(parameter)
    head = model.get_output_embeddings()
    if head is not None:
        head.weight.data[num_tokens:] *= 20
        model.generation_config.update(**with_ids(row.get("generation", {})))
    model.to(dtype or row.get("dtype", torch.float32)).save_pretrained(folder)
    return folder


def save_model(folder, kind, *, seed=0, **options):
    """A model and its tokenizer, for AutoModelForCausalLM and AutoTokenizer. options: of `save`."""
    return save(AutoModelForCausalLM, folder, kind, seed=seed, **options)


def save_classifier(folder, kind, *, seed=0, **options):
    """A reward model, for AutoModelForSequenceClassification: one number for a text.

    It is read at the last token that is not padding. gpt2 and llama have no padding, and refuse
    more than one text at a time.
    """
    auto = AutoModelForSequenceClassification
    return save(auto, folder, kind, seed=seed, **{"num_labels": 1} | options)
