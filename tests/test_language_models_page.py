"""docs/language_models.md and, of docs/migrating.md, TRL: their commands, with tiny models."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch

import make_smollm2
import ppo_rlhf
from conftest import ROOT, metrics
from test_text import requirements
from tiny import save_classifier, save_model

pytestmark = pytest.mark.xdist_group("language_models_page")
PAGES = {
    name: (ROOT / "docs" / f"{name}.md").read_text() for name in ("language_models", "migrating")
}
PAGES["migrating"] = PAGES["migrating"].partition("\n## Coming from TRL's PPOTrainer\n")[2]
FILE = r"`(\w+\.(?:jsonl|py))`:\n\n```\w+\n(.+?)^```$"
BLOCK = r"(?ms)^```(\w+)\n(.+?)^```$"
COMMANDS = [
    (name, code)
    for name, page in PAGES.items()
    for kind, code in re.findall(BLOCK, page)
    if kind == "sh" and code.startswith("python")
]
SMALL = "--total-episodes 8 --batch-size 4 --micro-batch-size 4 --eval-episodes 4 --no-cuda"
SMALL += " --response-length 8 --prompt-length 128"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """What MODEL, CHAT, SFT and RM stand for."""
    folder = tmp_path_factory.mktemp("models")
    models = {"MODEL": save_model(folder / "plain", "gpt_neox")}
    models |= {name: save_model(folder / name, "qwen2") for name in ("CHAT", "SFT")}
    return models | {"RM": save_classifier(folder / "RM", "qwen2")}


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The data and the functions of the pages, by the names that they have there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for page in PAGES.values():
        for name, code in re.findall(FILE, page, re.M | re.S):
            Path(name).write_text(code)
    return sorted(path.name for path in tmp_path.iterdir())


def test_every_row_is_used(files):
    rows = ["chats", "hh", "pairs", "posts", "questions", "sft", "sums"]
    assert files == sorted([*(f"{name}.jsonl" for name in rows), "sums.py", "brief.py"])
    text = "".join(code for _, code in COMMANDS)
    assert [name for name in files if name not in text] == []
    assert len(COMMANDS) == 5


@pytest.mark.parametrize("page, code", COMMANDS)
def test_commands(page, code, models, files, monkeypatch):
    if "DATA.jsonl" in code:
        Path("DATA.jsonl").write_text(Path("chats.jsonl").read_text())
    words = shlex.split(code.replace("\\\n", " "))
    assert words[:2] == ["python", "ppo_rlhf.py"]
    argv = [str(models.get(word, word)) for word in words[2:]] + SMALL.split()
    monkeypatch.setattr(sys, "argv", ["ppo_rlhf.py", *argv])
    args = ppo_rlhf.parse_args(argv)
    ppo_rlhf.check_args(args)
    ppo_rlhf.train(args)
    (folder,) = Path("runs").iterdir()
    assert (folder / "policy" / "model.safetensors").exists()
    assert (folder / "reward_model").exists() == ("rm" in args.stages)
    found = {name: value for *_, name, value in metrics()}
    assert "eval/ppo/proxy" in found and found["ppo/episode"] == 8


def test_verified(files):
    correct = runpy.run_path("sums.py")["correct"]
    texts = ["17 plus 25 is 42", "42, or 43", "none"]
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    assert correct(completions, ["42"] * 3) == [1.0, 0.0, 0.0]


def test_answering(files, tmp_path, capsys):
    """The program that loads what came out."""
    (code,) = [x for kind, x in re.findall(BLOCK, PAGES["language_models"]) if "AutoTokenizer" in x]
    policy = save_model(tmp_path / "llama", "llama")
    Path("policy").symlink_to(policy)
    torch.manual_seed(1)
    exec(code, {})
    assert len(capsys.readouterr().out) > 10


def test_figures_are_those_of_the_run():
    run, metrics, rows = results = make_smollm2.load()
    assert PAGES["language_models"] == make_smollm2.page(*results)
    kept = {name: make_smollm2.share(rows, name, "parses") for name in make_smollm2.POLICIES}
    assert {n for _, n in kept.values()} == {64}
    assert kept["before"][0] / 64 < 0.2 and kept["ppo"][0] / 64 > 0.8
    assert run["seconds"] < 30 * 60
    assert make_smollm2.saving(run, metrics)[1] < 0.01
    assert abs(metrics["objective/kl"][0][2]) < 1e-3
    assert max(value for *_, value in metrics["rollout/logp_mismatch"]) < 1e-3


def test_what_parses():
    parses = runpy.run_path(ROOT / "benchmarks" / "smollm2" / "format.py")["parses"]
    _, _, rows = make_smollm2.load()
    assert all(parses(row["answer"]) == (row["parses"] == "True") for row in rows)
    assert parses("answer: the Suez Canal\nconfidence: high")
    assert not parses("answer: the Suez Canal\nconfidence: high\n")


def test_packages():
    """The page and the script name the versions that are tested."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = requirements([line for line in lines if not line.startswith("#")])
    line = re.search(r"(?m)^pip install (transformers.+)$", PAGES["language_models"])[1]
    assert line.split() == [str(pins[name]) for name in ("transformers", "datasets")]


def test_defaults_in_words():
    real = ppo_rlhf.REAL
    sizes = (real["batch_size"], real["response_length"])
    page = " ".join(PAGES["language_models"].split())
    assert "batches of {} responses of up to {} tokens".format(*sizes) in page
    assert f"step size of {real['learning_rate']:.0e} for".replace("e-0", "e-") in page
    assert f"and {real['value_learning_rate']:.0e} for the value".replace("e-0", "e-") in page
    assert f"`--kl-coef {real['kl_coef']}`" in page
    assert (real["sft_epochs"], real["rm_epochs"]) == (1, 1)


def test_defaults_in_the_table_of_options():
    """TRL's, then ours, then ours with --model where that is another."""
    args, checked = ppo_rlhf.Args(), 0
    for flag, cell in re.findall(r"(?m)^\| `\w+` \| `--([a-z-]+)` \| (.+?) \|", PAGES["migrating"]):
        name = flag.replace("-", "_")
        _, *ours = re.sub(r"(?<=\d),(?=\d{3})", "", cell).split(", ")
        if not ours or isinstance(getattr(args, name), bool | str | tuple | None):
            continue
        both = [getattr(args, name), ppo_rlhf.REAL.get(name, getattr(args, name))]
        expected = both[:1] if both[0] == both[1] else both
        assert [float(x) for x in ours] == expected, flag
        checked += 1
    assert checked >= 12


def test_every_flag_is_one(files):
    """What the tables name exists."""
    flags = {flag for page in PAGES.values() for flag in re.findall(r"`(--[a-z-]+)", page)}
    fields = {f"--{name.replace('_', '-')}" for name in vars(ppo_rlhf.Args())}
    assert {flag.replace("--no-", "--") for flag in flags} - fields - {"--with"} == set()
