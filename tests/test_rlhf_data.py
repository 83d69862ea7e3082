"""Texts of files for ppo_rlhf.py: how they are read, refused, written in tokens, and rewarded."""

import contextlib
import csv
import json
import re
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import ppo_rlhf as rlhf
from conftest import spy
from test_rlhf_runs import during, error_line, last_error, same, train

pa = pytest.importorskip("pyarrow")
datasets = pytest.importorskip("datasets")
pytest.importorskip("transformers")

import pyarrow.parquet  # noqa: E402

import tiny  # noqa: E402

pytestmark = pytest.mark.xdist_group("rlhf_data")

CHAT_KINDS = ("llama", "qwen2", "gemma")
SMALL = {"cuda": False, "torch_threads": 1, "checkpoint_every": 2, "critic_warmup": 0}
SMALL |= {"total_episodes": 16, "batch_size": 8, "eval_episodes": 4, "response_length": 8}
SMALL |= {"sft_batch_size": 4, "rm_batch_size": 4, "update_epochs": 1, "prompt_length": 128}
FILES = {"sft": "sft_data", "pref": "pref_data", "prompts": "prompts", "eval": "eval_prompts"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with a model of each kind, and a tokenizer of each that appends EOS."""
    folder = tmp_path_factory.mktemp("models")
    for kind in tiny.KINDS:
        tiny.save_model(folder / kind, kind)
        tiny.save_model(folder / f"{kind}-eos", kind, eos=True)
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(name, rows):
    """A file in the current folder, .jsonl or .parquet -> its name"""
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), name)
    else:
        Path(name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return name


def load(model, **settings):
    """The task of some files."""
    args = rlhf.Args(**SMALL | {"model": str(model), "rm_coef": 0.0} | settings)
    task = rlhf.Texts(args.model, args)
    task.load(args)
    return task


def read(model, kind, rows, name="rows.jsonl"):
    """The task of one file of a kind with these rows, and its rows."""
    task = load(model, **{FILES[kind]: write(name, rows)})
    return task, task.files[kind]


def tokens_of(model, kind, rows, name="rows.jsonl"):
    """All of a file, completions included."""
    return rlhf.write_texts(*read(model, kind, rows, name), None)


def pair_tokens(model, row):
    """Of one pair: chosen, rejected."""
    task, _ = read(model, "pref", [row])
    return rlhf.preference_pairs(rlhf.Args(), task, None, SimpleNamespace(device="cpu"))[:2]


def turns(*texts):
    """user, assistant, user, ..."""
    roles = ["user", "assistant"] * len(texts)
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


def metrics(folder):
    """name -> values of metrics.csv, without what tells the time"""
    found = {}
    for row in csv.DictReader((folder / "metrics.csv").read_text().splitlines()):
        if not row["name"].startswith(("time/", "perf/")):
            found.setdefault(row["name"], []).append((int(row["global_step"]), float(row["value"])))
    return found


def samples(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------
# What a row may look like

CONVERSATIONS = [
    turns("What is the answer?", "It is what you think it is."),
    turns("Was the film good?", "No.", "Why?", "The river was low."),
    turns("To be", "or not to be,", "that is", "the question", "Is it?", "Yes."),
]


def as_messages(_, messages):
    return {"messages": messages}


def as_lists(_, messages):
    return {"prompt": messages[:-1], "completion": messages[-1:]}


def as_prompt_and_text(_, messages):
    return {"prompt": messages[:-1], "completion": messages[-1]["content"]}


def as_strings(tokenizer, messages):
    """The template's words in a text, but BOS, which the tokenizer puts there, and EOS."""
    text = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    completion = whole.removeprefix(text).split(tokenizer.eos_token)[0]
    return {"prompt": text.removeprefix(tokenizer.bos_token or ""), "completion": completion}


@pytest.mark.parametrize("kind", CHAT_KINDS)
def test_equal_batches(kind, models):
    """However the same texts are written down, they are the same tokens."""
    tokenizer, batches = load(models / kind).tokenizer, {}
    for form in (as_messages, as_lists, as_prompt_and_text, as_strings):
        rows = [form(tokenizer, messages) for messages in CONVERSATIONS]
        for name in (f"{form.__name__}.jsonl", f"{form.__name__}.parquet"):
            batches[name] = tokens_of(models / kind, "sft", rows, name)
    expected, *others = batches.values()
    assert len(others) == 7 and expected.shape[0] == 3
    for name, batch in batches.items():
        assert torch.equal(batch, expected), name
    assert len({tuple(row) for row in expected.tolist()}) == 3


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "granite"])
def test_equal_batches_of_strings(kind, models):
    """The completion of a chosen text, too; a column that has nothing in a row is none."""
    rows = [{"prompt": f"film {i}:", "completion": "good " * i + "."} for i in range(5)]
    expected = tokens_of(models / kind, "sft", rows)
    chosen = [{"prompt": x["prompt"], "chosen": x["completion"], "rejected": "no"} for x in rows]
    for name in ("rows.jsonl", "rows.parquet"):
        assert torch.equal(tokens_of(models / kind, "sft", rows, name), expected)
        assert torch.equal(tokens_of(models / kind, "sft", chosen, name), expected)
        empty = [row | {"messages": None, "id": i if i else None} for i, row in enumerate(rows)]
        task, read_rows = read(models / kind, "sft", empty, name)
        assert torch.equal(rlhf.write_texts(task, read_rows, None), expected)
        assert ["id" in row for row in read_rows] == [False, True, True, True, True]


@pytest.mark.parametrize("kind", CHAT_KINDS)
@pytest.mark.parametrize("form", [as_messages, as_lists, as_prompt_and_text, as_strings])
def test_prompts_of_demonstrations(form, kind, models):
    """Without the response in them: that is the policy's."""
    rows = [form(load(models / kind).tokenizer, x) for x in CONVERSATIONS]
    task, prompts = read(models / kind, "prompts", rows)
    P = max(len(task.ids(row)[0]) for row in prompts)
    tokens = rlhf.write_texts(task, prompts)
    assert tokens.shape == (3, P)
    assert torch.equal(tokens, tokens_of(models / kind, "sft", rows)[:, :P])


@pytest.mark.parametrize("kind", CHAT_KINDS)
def test_messages_that_end_with_a_question(kind, models):
    """They are a prompt as they are."""
    asked = [{"messages": messages[:-1]} for messages in CONVERSATIONS]
    answered = [{"messages": messages} for messages in CONVERSATIONS]
    tokens = [rlhf.write_texts(*read(models / kind, "prompts", x)) for x in (asked, answered)]
    assert torch.equal(*tokens)


@pytest.mark.parametrize(
    "path, name, split",
    [
        ("texts", "texts", "train"),
        ("some-body/texts", "some-body/texts", "train"),
        ("some-body/texts:test", "some-body/texts", "test"),
        ("some-body/texts:train[:10]", "some-body/texts", "train[:10]"),
    ],
)
def test_hub(path, name, split, models, monkeypatch):
    rows, calls = [{"messages": messages} for messages in CONVERSATIONS], []

    def load_dataset(path, split, data_files=None):
        calls.append((path, split, data_files))
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = load(models / "llama", sft_data=path)
    assert calls == [(name, split, None)]
    tokens = rlhf.write_texts(task, task.files["sft"], None)
    assert torch.equal(tokens, tokens_of(models / "llama", "sft", rows))


def test_hub_refuses(models, monkeypatch, capsys):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("there is\nno network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    line = error_line(capsys, load, models / "gpt2", prompts="some-body/texts")
    assert line == "error: some-body/texts: ConnectionError: there is no network"


@pytest.mark.parametrize("path", ["rows.parquet", "some-body/texts"])
def test_hub_needs_a_package(path, models, monkeypatch, capsys):
    monkeypatch.setitem(rlhf.sys.modules, "datasets", None)
    line = error_line(capsys, load, models / "gpt2", prompts=path)
    assert line.startswith(f"error: {path} needs the package datasets: pip install datasets")


# ------------------------------------------------------------------------------------------------
# Templates, BOS, EOS


@pytest.mark.parametrize("kind", CHAT_KINDS)
def test_chats_are_written_by_the_template(kind, models):
    task, rows = read(models / kind, "sft", [{"messages": x} for x in CONVERSATIONS])
    tokens = rlhf.write_texts(task, rows, None).tolist()
    write_ids = task.tokenizer.apply_chat_template
    for messages, row in zip(CONVERSATIONS, tokens, strict=True):
        prompt = write_ids(messages[:-1], add_generation_prompt=True, return_dict=False)
        whole = write_ids(messages, return_dict=False)
        if kind == "gemma":  # its template ends a turn with a token that is no EOS
            assert not {*whole} & {*task.ends}
            whole.append(task.tokenizer.eos_token_id)
        end = next(i for i, t in enumerate(whole) if i >= len(prompt) and t in task.ends)
        P = task.prompt_length
        assert [t for t in row[:P] if t != rlhf.PAD] == prompt
        assert row[P - len(prompt) : P] == prompt
        assert [t for t in row if t != rlhf.PAD] == whole[: end + 1]


@pytest.mark.parametrize("messages", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_bos_stands_once(kind, messages, models):
    tokenizer = load(models / kind).tokenizer
    rows = [as_messages(tokenizer, x) for x in CONVERSATIONS]
    if not messages:
        rows = [as_strings(tokenizer, x) for x in CONVERSATIONS]
        assert not any(tokenizer.bos_token in text for row in rows for text in row.values())
    for name in (kind, f"{kind}-eos"):
        tokens = tokens_of(models / name, "sft", rows)
        assert (tokens == tokenizer.bos_token_id).sum(1).tolist() == [1, 1, 1]
        first = (tokens != rlhf.PAD).int().argmax(1, keepdim=True)
        assert (tokens.gather(1, first) == tokenizer.bos_token_id).all()


@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "gpt_neox", "granite"])
def test_no_bos_where_the_tokenizer_puts_none(kind, models):
    task, rows = read(models / kind, "prompts", [{"prompt": "the film"}])
    plain = task.tokenizer("the film", add_special_tokens=False).input_ids
    assert rlhf.write_texts(task, rows).tolist() == [plain]


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_tokenizer_that_appends_eos(kind, models):
    """It puts none into the prompt, and no second one behind a response."""
    rows = [{"prompt": "the film was", "completion": text} for text in ("good", "", "so so")]
    if kind in CHAT_KINDS:
        rows += [{"messages": messages} for messages in CONVERSATIONS]
    tokenizer = load(models / f"{kind}-eos").tokenizer
    assert tokenizer("x").input_ids[-1] == tokenizer.eos_token_id  # the trap is set
    appending, plain = (tokens_of(models / x, "sft", rows) for x in (f"{kind}-eos", kind))
    assert torch.equal(appending, plain)
    task, prompts = read(models / f"{kind}-eos", "prompts", rows)
    for row, tokens in zip(prompts[:3], rlhf.write_texts(task, prompts)[:3], strict=True):
        assert not {*task.ends} & {*tokens.tolist()}, row


def test_tokenizer_that_appends_eos_to_almost_nothing(models):
    """One token is left of a prompt of one, and of one that is EOS itself."""
    for text in ("x", load(models / "gpt2").tokenizer.eos_token):
        task, rows = read(models / "gpt2-eos", "prompts", [{"prompt": text}])
        plain = task.tokenizer(text, add_special_tokens=False).input_ids
        assert len(plain) == 1
        assert rlhf.write_texts(task, rows).tolist() == [plain]


def test_chats_are_written_by_a_template_that_asks_otherwise(models):
    """What it puts before an answer to come is in no conversation: the answer follows all of it."""
    task = load(models / "qwen2")
    loop = "{% for x in messages %}[{{ x.role }}]{{ x.content }}{% endfor %}"
    task.tokenizer.chat_template = (
        loop + "{% if add_generation_prompt %}[assistant]<think>{% endif %}"
    )
    start, end = task.ids({"prompt": turns("a film")[:1], "completion": "good"})
    plain = task.tokenizer(["[user]a film[assistant]<think>", "good"]).input_ids
    assert [start, end] == [plain[0], [*plain[1], task.ends[0]]]


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_completion_ends_with_eos_once(kind, models):
    """With one of its own in the text, too; a completion that is too long has none."""
    eos = load(models / kind).tokenizer.eos_token
    texts = ["good", "", " so so\n", f"good{eos}", f"good{eos}{eos}", f"good{eos} or not"]
    rows = [{"prompt": "the film was", "completion": text} for text in texts]
    if kind in CHAT_KINDS:
        rows += [{"messages": turns("the film was", text)} for text in texts]
    task, rows = read(models / kind, "sft", rows)
    P, tokens = task.prompt_length, rlhf.write_texts(task, rows, None)
    responses = [[t for t in row if t != rlhf.PAD] for row in tokens[:, P:].tolist()]
    for row, response in zip(rows, responses, strict=True):
        is_end = [token in task.ends for token in response]
        assert is_end == [False] * (len(response) - 1) + [True], row
    good = task.tokenizer("good", add_special_tokens=False).input_ids
    assert [responses[i] for i in (0, 3, 4, 5)] == [[*good, task.tokenizer.eos_token_id]] * 4
    R = len(responses[2]) - 1
    cut = rlhf.write_texts(task, rows[2:3], R)[0, P:].tolist()
    assert cut == responses[2][:R]


# ------------------------------------------------------------------------------------------------
# Pairs without a prompt

START = "\n\nHuman: What is it?\n\nAssistant:"
LONGER = f"{START} A film.\n\nHuman: Which one?\n\nAssistant:"
HH = [  # prompt, chosen, rejected
    (START, " A film.", " A book."),
    (START, " The first one.", " The last one."),  # beyond the turn they have words in common
    (LONGER, " The first one.", " The last one."),
    (START, " A film.\n\nHuman: Which?\n\nAssistant: One.", " A book."),
    (START, " It.\n\nHuman: Why?\n\nAssistant: So.", " It.\n\nHuman: Who?\n\nAssistant: So."),
    (START, " It.\n\nHuman: Why?\n\nAssistant: So.", " It.\n\nHuman: Why?\n\nAssist: So."),
    (START, " Yes.", " Yes. No."),  # one begins as the other
    (START, " Yes. No.", " Yes."),
    (LONGER, " Yes.", ""),
]


@pytest.mark.parametrize("prompt, chosen, rejected", HH)
def test_prompt_of_two_texts(prompt, chosen, rejected, models):
    """What they have in common, up to the last turn of an assistant."""
    expected = pair_tokens(
        models / "llama", {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    )
    task, (row,) = read(
        models / "llama", "pref", [{"chosen": prompt + chosen, "rejected": prompt + rejected}]
    )
    assert (row["prompt"], row["chosen"], row["rejected"]) == (prompt, chosen, rejected)
    pair = pair_tokens(models / "llama", {"chosen": prompt + chosen, "rejected": prompt + rejected})
    assert same(pair, expected)
    assert not torch.equal(*pair)
    width = len(task.ids(row)[0])
    assert torch.equal(pair[0][0, :width], pair[1][0, :width])


@pytest.mark.parametrize("kind", CHAT_KINDS)
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_prompt_of_two_chats(messages, kind, models):
    """The messages they have in common."""
    *prompt, answer = messages
    other = {"role": "assistant", "content": f"{answer['content']} Or not."}
    expected = pair_tokens(
        models / kind, {"prompt": prompt, "chosen": answer["content"], "rejected": [other]}
    )
    pair = pair_tokens(models / kind, {"chosen": [*prompt, answer], "rejected": [*prompt, other]})
    assert same(pair, expected)
    whole = load(models / kind).tokenizer.apply_chat_template(messages, return_dict=False)
    row = [t for t in pair[0][0].tolist() if t != rlhf.PAD]
    assert row[: len(whole) - 1] == whole[: len(row)][: len(whole) - 1]
    assert not torch.equal(*pair)


BAD_PAIRS = {
    "equal texts": {"chosen": f"{START} A film.", "rejected": f"{START} A film."},
    "equal chats": {"chosen": CONVERSATIONS[1], "rejected": CONVERSATIONS[1]},
    "equal responses": {"prompt": "a film", "chosen": "good", "rejected": "good"},
    "no turn": {"chosen": "A film.", "rejected": "A book."},
    "no common turn": {
        "chosen": "\n\nHuman: What?\n\nAssistant: A film.",
        "rejected": "\n\nHuman: Who?\n\nAssistant: A film.",
    },
    "no common message": {"chosen": turns("What?", "A film."), "rejected": turns("Who?", "Me.")},
    "answers alone": {
        "chosen": [{"role": "assistant", "content": "A film."}],
        "rejected": [{"role": "assistant", "content": "A book."}],
    },
    "two more turns": {
        "chosen": turns("What?", "A film.", "Which?", "One."),
        "rejected": turns("What?", "A book.", "Which?", "One."),
    },
    "text and chat": {"chosen": f"{START} A film.", "rejected": turns("What?", "A book.")},
}


@pytest.mark.parametrize("name", BAD_PAIRS)
def test_pairs_refused(name, models, capsys):
    good = {"prompt": "a film", "chosen": "good", "rejected": "bad"}
    path = write("pairs.jsonl", [good, BAD_PAIRS[name], good])
    line = error_line(capsys, load, models / "qwen2", pref_data=path)
    assert re.match(r"error: pairs\.jsonl, line 2: \w.{9}", line), line


# ------------------------------------------------------------------------------------------------
# Files that are no good

GOOD = {"prompt": "a film", "completion": "good", "chosen": "good", "rejected": "bad"}


def without(key):
    return json.dumps({k: v for k, v in GOOD.items() if k != key}).encode()


def with_value(key, value):
    return json.dumps(GOOD | {key: value}).encode()


BAD = [  # which file, a line of it, what is said of it
    *[(kind, b"{", "JSONDecodeError") for kind in FILES],
    ("sft", b"a film", "JSONDecodeError"),
    ("prompts", b'{"prompt": "a film"', "JSONDecodeError"),
    ("prompts", b'{"prompt": "a film"} {}', "JSONDecodeError"),
    *[(kind, b'["a film", "good"]', "list") for kind in FILES],
    ("prompts", b'"a film"', "str"),
    ("prompts", b"3", "int"),
    ("sft", b"null", "None"),
    *[(kind, b"{}", "'") for kind in FILES],
    ("sft", b'{"prompt": "a film"}', "'completion'"),
    ("sft", b'{"completion": "good"}', "'prompt'"),
    ("sft", b'{"prompt": "a film", "completion": null}', "'completion'"),
    ("pref", without("chosen"), "'chosen'"),
    ("pref", without("rejected"), "'rejected'"),
    ("pref", with_value("chosen", None), "'chosen'"),
    ("pref", b'{"chosen": "good"}', "'rejected'"),
    ("prompts", without("prompt"), "'prompt'"),
    ("eval", without("prompt"), "'prompt'"),
    *[(kind, with_value("prompt", 3), "") for kind in FILES],
    *[(kind, with_value("prompt", [["a film"]]), "") for kind in FILES],
    *[(kind, with_value("prompt", ["a film"]), "") for kind in FILES],
    *[(kind, with_value("prompt", {"role": "user", "content": "x"}), "") for kind in FILES],
    *[(kind, with_value("prompt", ""), "") for kind in FILES],
    *[(kind, with_value("prompt", []), "") for kind in FILES],
    *[("sft", with_value("completion", x), "") for x in (3.5, True, ["x"], [["x"]], [], {})],
    *[("pref", with_value("chosen", x), "") for x in (3.5, ["x"], [["x"]], [], {})],
    *[("pref", with_value("rejected", x), "") for x in (3.5, ["x"], [["x"]], [], {})],
    *[(kind, with_value("prompt", [{"content": "x"}]), "'role'") for kind in FILES],
    *[(kind, with_value("prompt", [{"role": "user"}]), "'content'") for kind in FILES],
    ("sft", with_value("prompt", [{"role": "user", "content": 3}]), ""),
    ("sft", with_value("completion", [{"role": "assistant"}]), "'content'"),
    ("sft", with_value("completion", [{"content": "x"}]), "'role'"),
    ("sft", with_value("completion", turns("x", "y")), ""),
    ("sft", b'{"messages": [{"content": "x"}]}', "'role'"),
    ("sft", b'{"messages": [{"role": "user", "content": "x"}]}', ""),  # nothing to learn
    ("sft", b'{"messages": [{"role": "assistant", "content": "x"}]}', ""),  # to nothing
    ("sft", b'{"messages": "x"}', ""),
    ("sft", b'{"messages": []}', ""),
    *[(kind, b'{"prompt": "\xff", "completion": "x"}', "UnicodeDecodeError") for kind in FILES],
    *[(kind, with_value("prompt", "\ud800"), "") for kind in FILES],
    ("sft", with_value("completion", "\ud800"), ""),
    ("pref", with_value("chosen", "\ud800"), ""),
]


@pytest.mark.parametrize("kind, line, hint", BAD)
@pytest.mark.parametrize("model", ["llama"])
def test_rows_refused(model, kind, line, hint, models, capsys):
    """One line with file and line; nothing was learned or written."""
    good = write("good.jsonl", [GOOD])
    Path("bad.jsonl").write_bytes(b"\n".join([without(None), without(None), line, without(None)]))
    paths = {**dict.fromkeys(FILES.values(), good), FILES[kind]: "bad.jsonl"}
    args = rlhf.Args(**SMALL | paths, model=str(models / model))
    message = error_line(capsys, rlhf.train, args)
    assert re.match(r"error: bad\.jsonl, line 3: \w{4}", message), message
    assert hint in message
    assert not Path("runs").exists()


def test_bad_line_far_behind(models, capsys):
    """The bytes of a file come in blocks, its errors in lines."""
    lines = [without(None)] * 2000 + [b'{"prompt": "\xff"}'] + [without(None)] * 2000
    Path("bad.jsonl").write_bytes(b"\n".join(lines))
    line = error_line(capsys, load, models / "gpt2", prompts="bad.jsonl")
    assert line.startswith("error: bad.jsonl, line 2001: UnicodeDecodeError: ")


def test_bad_row_of_parquet(models, capsys):
    path = write("bad.parquet", [{"prompt": "a film"}, {"prompt": None}, {"prompt": "a book"}])
    line = error_line(capsys, load, models / "gpt2", prompts=path)
    assert re.fullmatch("error: bad.parquet, (row|line) 2: KeyError: 'prompt'", line), line


def test_template_that_refuses(models, capsys):
    """Gemma's has no system."""
    rows = [{"prompt": [{"role": "system", "content": "x"}, *turns("y")]}]
    path = write("rows.jsonl", [{"prompt": turns("x")}, *rows])
    line = error_line(capsys, load, models / "gemma", prompts=path)
    assert line.startswith("error: rows.jsonl, line 2: ")
    assert "System role not supported" in line


def test_chats_without_a_template(models, capsys):
    path = write("rows.jsonl", [{"prompt": "x"}, {"prompt": turns("x")}])
    line = error_line(capsys, load, models / "gpt2", prompts=path)
    assert line.startswith("error: rows.jsonl, line 2: ")
    assert "template" in line


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize(
    "name, content, hint",
    [
        ("none.jsonl", None, "No such file"),
        ("none.parquet", None, ""),
        ("folder/none.jsonl", None, "No such file"),
        ("empty.jsonl", b"", ""),
        ("blank.jsonl", b"\n\n \n", ""),
        ("empty.parquet", b"", ""),
        ("broken.parquet", b"PAR1 and no more", ""),
        ("text.parquet", b'{"prompt": "a film"}\n', ""),
    ],
)
def test_files_refused(kind, name, content, hint, models, capsys):
    if content is not None:
        Path(name).write_bytes(content)
    good = write("good.jsonl", [GOOD])
    paths = {**dict.fromkeys(FILES.values(), good), FILES[kind]: name}
    args = rlhf.Args(**SMALL | paths, model=str(models / "gpt2"))
    line = error_line(capsys, rlhf.train, args)
    assert line.startswith(f"error: {name}")
    assert hint in line
    assert not Path("runs").exists()


def test_byte_order_mark(models):
    """As some editors put it before the first line; and empty lines at the end."""
    Path("rows.jsonl").write_bytes(b"\xef\xbb\xbf" + without(None) + b"\r\n\r\n")
    task = load(models / "gpt2", prompts="rows.jsonl")
    assert [row["prompt"] for row in task.files["prompts"]] == ["a film"]


# ------------------------------------------------------------------------------------------------
# Prompts that are too long

LENGTHS = [3, 12, 11, 1, 30, 10, 10, 13]


@pytest.mark.parametrize("kind", FILES)
def test_h3_over_long_prompts_are_left_out(kind, models, capsys):
    """And counted; the others are as they were, none is cut."""
    rows = [GOOD | {"prompt": "9" * n, "id": i} for i, n in enumerate(LENGTHS)]
    path = write("rows.jsonl", rows)
    task = load(models / "gpt2", prompt_length=11, **{FILES[kind]: path})
    said = capsys.readouterr().out
    assert "rows.jsonl: 3 of 8 prompts are longer than 11 tokens, --prompt-length" in said
    assert [row["id"] for row in task.files[kind]] == [0, 2, 3, 5, 6]
    assert task.prompt_length == 11
    everything = load(models / "gpt2", prompt_length=30, **{FILES[kind]: path})
    assert capsys.readouterr().out == ""
    assert everything.prompt_length == 30
    rest = [row for row in everything.files[kind] if LENGTHS[row["id"]] <= 11]
    assert task.files[kind] == rest
    short, long = (rlhf.write_texts(x, rest) for x in (task, everything))
    assert torch.equal(short, long[:, 19:])
    assert (short != rlhf.PAD).sum(1).tolist() == [3, 11, 1, 10, 10]
    assert (long[:, :19] == rlhf.PAD).all()


def test_h3_nothing_but_over_long_prompts(models, capsys):
    path = write("rows.jsonl", [GOOD | {"prompt": "9" * 12}] * 3)
    good = write("good.jsonl", [GOOD])
    for kind in FILES:
        paths = {**dict.fromkeys(FILES.values(), good), FILES[kind]: path}
        args = rlhf.Args(**SMALL | paths | {"prompt_length": 11}, model=str(models / "gpt2"))
        line = error_line(capsys, rlhf.train, args)
        assert line.startswith("error: rows.jsonl has no row with a prompt of at most 11 tokens")
        assert not Path("runs").exists()


def test_h3_template_counts(models, capsys):
    """The length of a prompt is that of all it is written with."""
    prompts = [turns("9"), turns("99")]
    n = len(load(models / "llama").ids({"prompt": prompts[0]})[0])
    path = write("rows.jsonl", [{"prompt": x} for x in prompts])
    task = load(models / "llama", prompts=path, prompt_length=n)
    assert [row["prompt"] for row in task.files["prompts"]] == prompts[:1]
    assert rlhf.write_texts(task, task.files["prompts"]).shape == (1, n)
    assert "1 of 2 prompts" in capsys.readouterr().out


def test_h3_over_long_prompts_are_never_sampled(models, capsys):
    path = write("rows.jsonl", [{"prompt": "9" * n} for n in LENGTHS])
    task = load(models / "gpt2", prompts=path, prompt_length=11)
    rows = task.rows("prompts", 500, np.random.default_rng(1))
    assert {len(row["prompt"]) for row in rows} == {3, 11, 1, 10}
    assert "3 of 8" in capsys.readouterr().out


@pytest.mark.parametrize("key", ["chosen", "rejected"])
def test_pairs_longer_than_the_model_reads(key, models, capsys):
    """gpt2 has 256 positions: said before anything is learned, not by an index out of range."""
    good, bad = write("good.jsonl", [GOOD] * 2), write("bad.jsonl", [GOOD, with_long(key)])
    paths = {**dict.fromkeys(FILES.values(), good), "pref_data": bad}
    args = rlhf.Args(**SMALL | paths, model=str(models / "gpt2"))
    line = error_line(capsys, rlhf.train, args)
    assert "bad.jsonl" in line
    assert not Path("runs").exists()


def with_long(key):
    return GOOD | {key: "9" * 256}


# ------------------------------------------------------------------------------------------------
# Few rows, many rows, any text


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_files_of_one_row(kind, models, capsys):
    """All stages, with one pair too: it is what the reward model learns, and is tested on."""
    chat = kind in CHAT_KINDS
    rows = {
        "sft": {"messages": CONVERSATIONS[0]} if chat else {"prompt": "a", "completion": "b"},
        "pref": {"prompt": turns("a") if chat else "a", "chosen": "good", "rejected": "bad"},
        "prompts": {"prompt": turns("a film") if chat else "a film"},
    }
    flags = [f"--{FILES[x].replace('_', '-')}={write(f'{x}.jsonl', [rows[x]])}" for x in rows]
    flags += ["--model", str(models / kind), "--no-cuda", "--total-episodes=8", "--batch-size=4"]
    flags += ["--response-length=6", "--eval-episodes=3", "--critic-warmup=0"]
    flags += ["--rm-epochs=5", "--rm-learning-rate=0.01"]
    args = rlhf.parse_args(flags)
    rlhf.check_args(args)
    run = train(args=args)
    capsys.readouterr()
    assert run.code == 0
    found = metrics(run.folder)
    assert [step for step, _ in found["sft/loss"]] == [1]
    assert [step for step, _ in found["rm/loss"]] == [1, 2, 3, 4, 5]
    assert found["rm/accuracy"] == [(5, 1.0)]  # of that one pair
    assert [step for step, _ in found["objective/scores"]] == [4, 8]
    assert len(found["eval/ppo/proxy"]) == 1
    assert all(np.isfinite(value) for values in found.values() for _, value in values)


def test_rows_are_drawn(models):
    """None twice as long as there are others; where all are to be learned, all of them once."""
    rows = [GOOD | {"id": i} for i in range(6)]
    paths = {name: write(f"{name}.jsonl", rows) for name in FILES.values()}
    task, rng = load(models / "gpt2", **paths), np.random.default_rng(1)
    for kind in FILES:
        draws = [[row["id"] for row in task.rows(kind, 4, rng)] for _ in range(50)]
        assert all(len({*draw}) == 4 for draw in draws)
        assert {i for draw in draws for i in draw} == {*range(6)}
        assert len({tuple(draw) for draw in draws}) > 10
        many = [row["id"] for row in task.rows(kind, 30, rng)]
        assert len(many) == (6 if rlhf.KEYS[kind] else 30)
        assert {*many} == {*range(6)}
        more = [row["id"] for row in task.rows(kind, 8, rng)]
        assert sorted(more.count(i) for i in range(6))[:4] == [1] * 4
        assert len(more) == (6 if rlhf.KEYS[kind] else 8)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
@pytest.mark.parametrize("chat", [False, True])
def test_100_000_rows(name, chat, models, record_property):
    """Read and checked in less than a minute of a CPU; what is drawn of them is there at once."""
    n = 100_000
    prompts = [f"Was the film of {i} good?" for i in range(n)]
    rows = [
        {"prompt": turns(x) if chat else x, "completion": f"It was {i}.", "id": i}
        for i, x in enumerate(prompts)
    ]
    write(name, rows)
    start = time.process_time()
    task = load(models / "qwen2", sft_data=name)
    seconds = time.process_time() - start
    record_property("seconds", seconds)
    assert len(task.files["sft"]) == n
    start = time.process_time()
    drawn = [row for _ in range(20) for row in task.rows("sft", 64, np.random.default_rng(1))]
    tokens = rlhf.write_texts(task, drawn, 16)
    drawing = time.process_time() - start
    texts = rlhf.read_texts(task, tokens[:, task.prompt_length :])
    assert texts == [f"It was {row['id']}." for row in drawn]
    assert [row["prompt"] for row in drawn] == [rows[row["id"]]["prompt"] for row in drawn]
    assert seconds < 60 and drawing < 5, (seconds, drawing)


TEXTS = {
    "Chinese": ("这部电影怎么样?", "很好看,我还想再看一遍。"),
    "Arabic": ("كيف كان الفيلم؟", "كان رائعًا جدًا."),
    "emoji": ("👩‍👩‍👧‍👦 🇩🇪 👍🏽?", "🎬🍿❤️‍🔥"),
    "NUL": ("a\0b\0", "\0\0c\0"),
    "space": ("  a \t\n\n b \r\n", " \n c  "),
    "lines": ("a\u2028b\u2029c\x85d", "e\x0bf\x0cg\x1ch"),
    "quotes": ('{"a": "\\"b\\""}', "<b>&amp;</b> 'c' , . ! n't 's"),
    "rare": ("\U0010ffff\ufffd\ufeffa", "\u200bñå𠀀"),
}


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_any_text_survives(kind, models):
    """From the file into tokens and back, prompts and responses."""
    rows = [{"prompt": prompt, "completion": text} for prompt, text in TEXTS.values()]
    lines = [json.dumps(row, ensure_ascii=i % 2 == 0) for i, row in enumerate(rows * 2)]
    lines = lines[: len(rows)] + [json.dumps(row, ensure_ascii=False) for row in rows]
    Path("rows.jsonl").write_text("\n".join(lines), encoding="utf-8", newline="")
    write("rows.parquet", rows * 2)
    for name in ("rows.jsonl", "rows.parquet"):
        task = load(models / kind, sft_data=name)
        P, tokens = task.prompt_length, rlhf.write_texts(task, task.files["sft"], None)
        assert rlhf.read_texts(task, tokens) == [a + b for a, b in TEXTS.values()] * 2
        assert rlhf.read_texts(task, tokens[:, :P]) == [a for a, _ in TEXTS.values()] * 2
        assert rlhf.read_texts(task, tokens[:, P:]) == [b for _, b in TEXTS.values()] * 2


@pytest.mark.parametrize("kind", ["qwen2"])  # the other templates strip
def test_any_text_survives_in_a_chat(kind, models):
    rows = [{"messages": turns(*pair)} for pair in TEXTS.values()]
    task, rows = read(models / kind, "sft", rows)
    P, tokens = task.prompt_length, rlhf.write_texts(task, rows, None)
    assert rlhf.read_texts(task, tokens[:, P:]) == [b for _, b in TEXTS.values()]
    for (prompt, _), text in zip(TEXTS.values(), rlhf.read_texts(task, tokens[:, :P]), strict=True):
        assert text == f"user\n{prompt}\nassistant\n"


# ------------------------------------------------------------------------------------------------
# Reward functions

RECORD = """
import json

def record(name, **given):
    with open(f"{name}.jsonl", "a") as file:
        file.write(json.dumps(given) + "\\n")
"""
ANSWERS = """
def answers(prompts, completions, answer):
    record("calls", prompts=prompts, completions=completions, answer=answer)
    return [100 * number + len(text) for number, text in zip(answer, completions)]

def everything(completions, **kwargs):
    record("everything", **kwargs)
    return [0] * len(completions)
"""
OTHERS = """
def ones(completions):
    return [1.0] * len(completions)

def ids(id, prompts):
    return [float(i) for i in id]

def some(completions, id):
    return [None if i % 2 else 10.0 for i in id]

def nobody(completions):
    return [None] * len(completions)

def take(completions, prompts):
    record("calls", prompts=prompts, completions=completions)
    return [0.0] * len(completions)
"""
TRL = '''
"""As in TRL's documentation."""
import asyncio
import re

def format_reward(completions, **kwargs):
    pattern = r"^<think>.*?</think>"
    contents = [completion[0]["content"] for completion in completions]
    return [1.0 if re.match(pattern, content) else 0.0 for content in contents]

def accuracy_reward(completions, solution, log_extra=None, **kwargs):
    contents = [completion[0]["content"] for completion in completions]
    return [
        None if wanted is None else float(content.endswith(wanted))
        for content, wanted in zip(contents, solution)
    ]

class Overlong:
    def __init__(self, length):
        self.length = length

    def __call__(self, completion_ids, **kwargs):
        return [-1.0 if len(ids) > self.length else 0.0 for ids in completion_ids]

overlong = Overlong(3)

async def slow_reward(completions, **kwargs):
    await asyncio.sleep(0)
    return [float("y" in completion[0]["content"]) for completion in completions]

def question_reward(prompts, completions, solution, **kwargs):
    return [float(len(prompt[-1]["content"])) for prompt in prompts]
'''


def functions(*texts):
    """A file of reward functions in the current folder."""
    Path("functions.py").write_text("".join([RECORD, *texts]))
    return "functions.py"


def calls(name="calls"):
    return [json.loads(line) for line in Path(f"{name}.jsonl").read_text().splitlines()]


def scored(model, rows, responses, *reward_fn, **settings):
    """Scores of responses, texts or lists of tokens, to the prompts of rows."""
    task, rows = read(model, "prompts", rows)
    ids = [
        x if isinstance(x, list) else task.tokenizer(x, add_special_tokens=False).input_ids
        for x in responses
    ]
    width = max(map(len, ids))
    tokens = [[*row, *[rlhf.PAD] * (width - len(row))] for row in ids]
    tokens = torch.cat([rlhf.write_texts(task, rows), torch.tensor(tokens)], 1)
    args = rlhf.Args(model=str(model), rm_coef=0.0, reward_fn=reward_fn, **settings)
    return rlhf.score_function(args, task, None, None)(rows, tokens).tolist()


@pytest.fixture(scope="module")
def answered(models, tmp_path_factory):
    """A run whose reward functions write down what they get."""
    folder = tmp_path_factory.mktemp("answered")
    with contextlib.chdir(folder):
        rows = [{"prompt": f"film {i}:", "answer": i, "other": f"x{i}"} for i in range(40)]
        rows = [row | ({"rare": "y"} if row["answer"] % 3 == 0 else {}) for row in rows]
        path = functions(ANSWERS)
        reward_fn = (f"{path}:answers", f"{path}:everything:2")
        settings = SMALL | {"prompts": write("rows.jsonl", rows[:30]), "eval_episodes": 6}
        settings |= {"eval_prompts": write("eval.jsonl", rows[30:]), "batch_size": 20}
        settings |= {"total_episodes": 240, "rm_coef": 0.0, "reward_fn": reward_fn}
        args = rlhf.Args(**settings, model=str(models / "gpt2"), stages="ppo,eval")
        run = train(args=args)
        run.calls, run.everything = calls(), calls("everything")
    assert run.code == 0
    return run


def test_reward_function_gets_the_column_of_its_rows(answered):
    """Of 12 rollouts, then of the evaluation, whose last is PPO's."""
    evaluated = len(answered.calls) - 12
    assert evaluated >= 2
    assert [len(call["prompts"]) for call in answered.calls] == [20] * 12 + [6] * evaluated
    for i, call in enumerate(answered.calls):
        assert call["prompts"] == [f"film {answer}:" for answer in call["answer"]]
        of_evaluation = [answer >= 30 for answer in call["answer"]]
        assert of_evaluation == [i >= 12] * len(of_evaluation)
        assert len(call["completions"]) == len(call["prompts"])
    assert len({tuple(call["answer"]) for call in answered.calls[:12]}) == 12
    assert len({tuple(call["answer"]) for call in answered.calls[12:]}) == 1
    scores = [value for _, value in metrics(answered.folder)["objective/scores"]]
    for call, score in zip(answered.calls[:12], scores, strict=True):
        lengths = [len(text) for text in call["completions"]]
        assert score == pytest.approx(np.mean(lengths) + 100 * np.mean(call["answer"]))
    last = answered.calls[-1]
    lengths = [len(text) for text in last["completions"]]
    expected = np.mean(lengths) + 100 * np.mean(last["answer"])
    assert metrics(answered.folder)["eval/ppo/proxy"] == [(240, pytest.approx(expected))]


def test_reward_function_with_kwargs_gets_all_columns(answered):
    assert len(answered.everything) == len(answered.calls) > 12
    for given, call in zip(answered.everything, answered.calls, strict=True):
        assert given.keys() - {"rare"} == {"prompts", "completion_ids", "answer", "other"}
        assert given["prompts"] == call["prompts"]
        assert given["answer"] == call["answer"]
        assert given["other"] == [f"x{i}" for i in call["answer"]]
        if "rare" in given:  # it is not in every file, nor in every row
            assert given["rare"] == [None if i % 3 else "y" for i in call["answer"]]
        assert ("rare" in given) == any(i % 3 == 0 for i in call["answer"])


ROWS = [{"prompt": f"film {i}:", "id": i} for i in range(5)]


@pytest.mark.parametrize(
    "names, expected",
    [
        ("ones", [1, 1, 1, 1, 1]),
        ("ids", [0, 1, 2, 3, 4]),
        ("some", [10, 0, 10, 0, 10]),
        ("nobody", [0, 0, 0, 0, 0]),
        ("ids:0.5 ones:-2", [-2, -1.5, -1, -0.5, 0]),
        ("some:0.1 ids:10 nobody:3", [1, 10, 21, 30, 41]),
        ("ids ids", [0, 2, 4, 6, 8]),
    ],
)
def test_reward_functions_add_up(names, expected, models):
    """Each takes what its signature names, whatever else there is; None is no opinion."""
    reward_fn = [f"{functions(OTHERS)}:{name}" for name in names.split()]
    assert scored(models / "gpt2", ROWS, ["x"] * 5, *reward_fn) == pytest.approx(expected)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_reward_function_gets_texts_without_special_tokens(kind, models):
    """Nor do the prompts have any; padding is nothing."""
    tokenizer = load(models / kind).tokenizer
    special = sorted(tokenizer.all_special_ids)
    good = tokenizer("good", add_special_tokens=False).input_ids
    responses = [good, [*good, tokenizer.eos_token_id], [*special, *good, *special]]
    rows = [{"prompt": "a film"}] * 3
    scored(models / kind, rows, responses, f"{functions(OTHERS)}:take")
    assert calls() == [{"prompts": ["a film"] * 3, "completions": ["good"] * 3}]


@pytest.mark.parametrize("kind", CHAT_KINDS)
def test_reward_function_gets_messages(kind, models):
    prompts = [turns("What is it?"), turns("What?", "A film.", "Good?")]
    rows = [{"prompt": x} for x in prompts]
    scored(models / kind, rows, ["yes", "no, it was"], f"{functions(OTHERS)}:take")
    completions = [[{"role": "assistant", "content": x}] for x in ("yes", "no, it was")]
    assert calls() == [{"prompts": prompts, "completions": completions}]


@pytest.mark.parametrize(
    "names, expected",
    [
        ("format_reward", [1, 0, 0]),
        ("accuracy_reward", [1, 0, 0]),
        ("overlong", [-1, 0, 0]),
        ("slow_reward", [0, 0, 1]),
        ("accuracy_reward:3 format_reward question_reward:0.01", [4.05, 0.06, 0.07]),
    ],
)
def test_reward_functions_of_trl(names, expected, models):
    """Unchanged: chats, a column by its name, None, and more keywords than it knows."""
    rows = [
        {"prompt": turns("2 + 2"), "solution": "4", "level": 1},
        {"prompt": turns("1 - 11"), "solution": "-10", "level": 2},
        {"prompt": turns("who, me"), "solution": None, "level": 3},
    ]
    responses = ["<think>2, 2</think>4", "10", "yes"]
    reward_fn = [f"{functions(TRL)}:{name}" for name in names.split()]
    assert scored(models / "qwen2", rows, responses, *reward_fn) == pytest.approx(expected)


def test_reward_function_without_its_column(models, capsys):
    """The line says which; the run goes on from its checkpoint when there is one."""
    path, functions_file = write("rows.jsonl", [GOOD]), functions(TRL)
    settings = SMALL | {"prompts": path, "rm_coef": 0.0, "stages": "ppo"}
    settings |= {"reward_fn": (f"{functions_file}:accuracy_reward",)}
    run = train(args=rlhf.Args(**settings, model=str(models / "gpt2")))
    line = last_error(capsys, run)
    assert f"{functions_file}:accuracy_reward" in line and "'solution'" in line


BROKEN = """
import os

def often(prompts, completions, id):
    record("calls", id=id)
    if os.environ["BROKEN"] == "yes" and len(open("calls.jsonl").readlines()) == 2:
        raise ValueError("out of\\nluck")
    return [i * len(text) for i, text in zip(id, completions)]
"""


def test_reward_function_that_raises(models, monkeypatch, capsys):
    """In the second iteration: the first is kept, and the run goes on as if nothing had been."""
    path, rows = functions(BROKEN), [row | {"completion": "x"} for row in ROWS]
    settings = SMALL | {"prompts": write("rows.jsonl", rows), "sft_data": "rows.jsonl"}
    settings |= {"rm_coef": 0.0, "total_episodes": 32, "stages": "sft,ppo,eval"}
    settings |= {"checkpoint_every": 100, "reward_fn": (f"{path}:often",)}
    args = rlhf.Args(**settings, model=str(models / "gpt2"))
    monkeypatch.setenv("BROKEN", "no")
    whole = train(args=args)
    Path("calls.jsonl").unlink()
    monkeypatch.setenv("BROKEN", "yes")
    capsys.readouterr()
    failed = train(args=args)
    line = last_error(capsys, failed)
    folder = Path("runs") / failed.folder.name
    expected = f"error: {path}:often raised ValueError: out of luck; last good checkpoint: "
    assert line == f"{expected}{folder / 'checkpoint.pt'}"
    data = rlhf.load_checkpoint(str(failed.folder))
    assert (data["stage"], data["step"]) == (2, 1)
    assert len(metrics(failed.folder)["objective/scores"]) == 1
    monkeypatch.setenv("BROKEN", "no")
    args = rlhf.parse_args(["--resume", str(failed.folder)])
    rlhf.check_args(args)
    mended = train(args=args)
    assert mended.code == 0 and mended.folder == failed.folder
    assert len(metrics(whole.folder)["objective/scores"]) == 4
    assert metrics(mended.folder) == metrics(whole.folder)
    assert (mended.folder / "samples.jsonl").read_bytes() == (
        whole.folder / "samples.jsonl"
    ).read_bytes()
    assert same(dict(mended.agent.policy.state_dict()), dict(whole.agent.policy.state_dict()))


def test_reward_function_gets_tokens(answered, models):
    """Those of the response up to and including EOS."""
    task, ends = load(models / "gpt2"), 0
    for given, call in zip(answered.everything, answered.calls, strict=True):
        for ids, text in zip(given["completion_ids"], call["completions"], strict=True):
            assert 1 <= len(ids) <= 8 and rlhf.PAD not in ids
            assert not {*task.ends} & {*ids[:-1]}
            ends += ids[-1] in task.ends
            assert ids[-1] in task.ends or len(ids) == 8
            assert task.tokenizer.decode([t for t in ids if t not in task.ends]) == text
    assert ends > 10


# ------------------------------------------------------------------------------------------------
# Texts that end a response


@pytest.mark.parametrize(
    "text, expected",
    [("good", False), ("good\n", False), ("good\n\nor", True), ("a?", False), ("a ? b", True)],
)
def test_stop_ends(text, expected, models):
    task = load(models / "gpt2", stop=("\n\n", " ?"))
    ids = task.tokenizer(text).input_ids
    responses = torch.tensor([[*ids, rlhf.PAD, rlhf.PAD], [*ids, *task.ends, rlhf.PAD]])
    assert task.ended(responses).tolist() == [expected, True]
    assert load(models / "gpt2").ended(responses).tolist() == [False, True]


def test_stop_may_be_a_special_token(models):
    """Such as the one by which Gemma's template ends a turn, and which is no EOS."""
    task = load(models / "gemma", stop=("<end_of_turn>",))
    ids = task.tokenizer("good", add_special_tokens=False).input_ids
    end = task.tokenizer.convert_tokens_to_ids("<end_of_turn>")
    responses = torch.tensor([[*ids, end], [*ids, rlhf.PAD]])
    assert task.ended(responses).tolist() == [True, False]


def test_stop_in_a_run(models, monkeypatch):
    """Padding behind it, and no penalty: all that a response with EOS has."""
    stops = ("th", "e", "\n")
    settings = SMALL | {"prompts": write("rows.jsonl", ROWS), "rm_coef": 0.0, "stop": stops}
    settings |= {"batch_size": 64, "total_episodes": 128, "stages": "ppo", "kl_coef": 0.0}
    settings |= {"reward_fn": (f"{functions(OTHERS)}:ids",), "missing_eos_penalty": -100.0}
    sampled = spy(monkeypatch, rlhf, "generate")
    run = train(args=rlhf.Args(**settings, model=str(models / "gpt2")))
    assert run.code == 0 and len(sampled) == 2
    found = metrics(run.folder)
    task = load(models / "gpt2")
    by_text = by_eos = never = 0
    for i, (_, (tokens, _)) in enumerate(sampled):
        ends, worth = 0, []
        R = 8
        prompts = rlhf.read_texts(task, tokens[:, :-R])
        for prompt, response in zip(prompts, tokens[:, -R:].tolist(), strict=True):
            written = [t for t in response if t != rlhf.PAD]
            assert response == written + [rlhf.PAD] * (R - len(written))
            before, whole = task.tokenizer.decode(written[:-1]), task.tokenizer.decode(written)
            assert not any(stop in before for stop in stops)
            assert not {*written[:-1]} & {*task.ends}
            eos, stopped = written[-1] in task.ends, any(stop in whole for stop in stops)
            assert eos or stopped or len(written) == R
            by_text, by_eos = by_text + stopped, by_eos + eos
            never += not eos and not stopped
            ends += eos or stopped
            worth.append(float(re.search(r"\d", prompt)[0]) if eos or stopped else -100.0)
        assert found["ppo/val/num_eos_tokens"][i][1] == ends
        assert found["objective/missing_eos"][i][1] == pytest.approx(1 - ends / 64)
        assert found["objective/rlhf_reward"][i][1] == pytest.approx(np.mean(worth), rel=1e-5)
    assert min(by_text, by_eos, never) > 0, (by_text, by_eos, never)


def test_stop_on_the_command_line(answered):
    """Repeatable; what is given takes the place of what a checkpoint has."""
    assert rlhf.parse_args(["--stop", "a", "--stop", "\n"]).stop == ("a", "\n")
    data = torch.load(answered.folder / "checkpoint.pt", weights_only=True)
    data["args"]["stop"] = ("x", "y")
    torch.save(data, "checkpoint.pt")
    assert rlhf.parse_args(["--load", "checkpoint.pt"]).stop == ("x", "y")
    assert rlhf.parse_args(["--load", "checkpoint.pt", "--stop", "z"]).stop == ("z",)


# ------------------------------------------------------------------------------------------------
# samples.jsonl


def test_samples(answered):
    """16 texts of iterations 1 and 11, as they were rewarded; four of the evaluation, twice."""
    written, found = samples(answered.folder), metrics(answered.folder)
    written, answers = written[:32], written[32:]
    assert [row["policy"] for row in answers] == ["SFT"] * 4 + ["PPO"] * 4
    assert {row["global_step"] for row in answers} == {240}
    assert [row["prompt"] for row in answers[:4]] == [row["prompt"] for row in answers[4:]]
    assert all(row["score"] % 100 == len(row["response"]) for row in answers)
    assert [row["global_step"] for row in written] == [20] * 16 + [220] * 16
    for i, call in ((0, answered.calls[0]), (16, answered.calls[10])):
        for j, row in enumerate(written[i : i + 16]):
            assert row.keys() == {"global_step", "prompt", "response", "score", "kl", "length"}
            assert (row["prompt"], row["response"]) == (call["prompts"][j], call["completions"][j])
            assert row["score"] == 100 * call["answer"][j] + len(row["response"])
            assert type(row["length"]) is int and 1 <= row["length"] <= 8
    assert len({json.dumps(row) for row in written}) == 32
    assert [kl for kl in (row["kl"] for row in written[:16]) if abs(kl) > 1e-3] == []
    assert max(abs(row["kl"]) for row in written[16:]) > 1e-6
    assert [step for step, _ in found["objective/kl"]] == [20 * i for i in range(1, 13)]


@pytest.fixture(scope="module")
def chats(models, tmp_path_factory):
    """12 iterations of 4 chats, not stopped, as settings and the run."""
    folder = tmp_path_factory.mktemp("chats")
    with contextlib.chdir(folder):
        rows = [{"prompt": turns(f"film {i}?"), "id": i} for i in range(9)]
        path = folder / write("rows.jsonl", rows)
        reward_fn = (f"{folder / functions(OTHERS)}:ids",)
        settings = SMALL | {"prompts": str(path), "rm_coef": 0.0, "batch_size": 4}
        settings |= {"total_episodes": 48, "checkpoint_every": 10, "learning_rate": 1e-3}
        settings |= {"reward_fn": reward_fn, "stages": "ppo", "response_length": 6}
        args = rlhf.Args(**settings, model=str(models / "qwen2"))
        return SimpleNamespace(args=args, run=train(args=args))


def test_samples_of_few_chats(chats):
    """All that there are; their means are those of metrics.csv."""
    written, found = samples(chats.run.folder), metrics(chats.run.folder)
    assert [row["global_step"] for row in written] == [4] * 4 + [44] * 4
    for part, step in ((written[:4], 4), (written[4:], 44)):
        for row in part:
            (message,) = row["prompt"]
            assert message == {"role": "user", "content": f"film {row['score']:.0f}?"}
        for key, name in (
            ("score", "objective/scores"),
            ("kl", "objective/kl"),
            ("length", "response/length"),
        ):
            mean = np.mean([row[key] for row in part])
            assert mean == pytest.approx(dict(found[name])[step], abs=1e-5), name
    assert np.mean([row["kl"] for row in written[4:]]) > 0.01  # the comparison says something


def test_samples_are_not_written_twice(chats, monkeypatch):
    """A crash behind the checkpoint of iteration 10, when those of 11 are on the disk."""

    def crash(run):
        raise RuntimeError("crash")

    with monkeypatch.context() as patch:
        during(patch, "ppo", 12, crash)
        with pytest.raises(RuntimeError, match="crash"):
            train(args=chats.args)
    (path,) = Path().glob("runs/*/samples.jsonl")
    data = rlhf.load_checkpoint(str(path.parent))
    assert (data["stage"], data["step"]) == (2, 10)
    whole = (chats.run.folder / "samples.jsonl").read_bytes()
    assert path.read_bytes() == whole
    assert data["bytes"][1] < len(whole)
    path.write_bytes(whole + b'{"half a li')  # and as a kill may leave it
    resumed = train(args=rlhf.parse_args(["--resume", str(path.parent)]))
    assert resumed.code == 0
    assert path.read_bytes() == whole
    assert metrics(resumed.folder) == metrics(chats.run.folder)


# ------------------------------------------------------------------------------------------------
# Flags


@pytest.mark.parametrize(
    "flag",
    [
        "--sft-data=rows.jsonl",
        "--pref-data=rows.jsonl",
        "--prompts=rows.jsonl",
        "--eval-prompts=rows.jsonl",
        "--stop=x",
        "--ref-model=folder",
        "--reward-model=folder",
        "--value-model=folder",
    ],
)
@pytest.mark.parametrize("task", ["reviews", "sort"])
def test_flags_that_need_a_model(flag, task, capsys):
    args = rlhf.parse_args([flag, "--task", task])
    line = error_line(capsys, rlhf.check_args, args)
    assert flag.split("=")[0] in line and "--model" in line


@pytest.mark.parametrize("stage, flag", [*zip(rlhf.STAGES, FILES.values(), strict=True)])
def test_stages_without_their_file(stage, flag, models, capsys):
    path = write("rows.jsonl", [GOOD])
    given = {"sft_data": path, "pref_data": path, "prompts": path}
    flag = "prompts" if stage == "eval" else flag
    del given[flag]
    args = rlhf.Args(**SMALL | given, model=str(models / "gpt2"), stages="sft,rm,ppo,eval")
    args = rlhf.dataclasses.replace(args, stages=stage if stage == "sft" else f"sft,{stage}")
    line = error_line(capsys, rlhf.check_args, args)
    assert f"--{flag.replace('_', '-')}" in line


def test_stages_of_the_files_given(models):
    """What has a file is run, and nothing else."""
    for names, expected in (
        ("sft", "sft"),
        ("sft pref", "sft,rm"),
        ("prompts", "ppo,eval"),
        ("sft pref prompts", "sft,rm,ppo,eval"),
    ):
        flags = [f"--{FILES[x].replace('_', '-')}=x.jsonl" for x in names.split()]
        args = rlhf.parse_args(["--model", str(models / "gpt2"), *flags])
        assert (args.stages, args.rm_coef) == (expected, float("pref" in names))


def test_evaluation_has_prompts_of_its_own(models):
    """Or those of PPO."""
    one = write("one.jsonl", [{"prompt": "a film"}])
    other = write("other.jsonl", [{"prompt": "a book"}])
    rng = np.random.default_rng(1)
    for path, expected in ((None, "a film"), (other, "a book")):
        task = load(models / "gpt2", prompts=one, eval_prompts=path)
        assert [row["prompt"] for row in task.rows("eval", 3, rng)] == [expected] * 3
        assert [row["prompt"] for row in task.rows("prompts", 3, rng)] == ["a film"] * 3
