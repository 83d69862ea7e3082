"""docs/paper.md: what it offers for copying is what the scripts do, compiles, and computes."""

import gzip
import importlib
import json
import re
import shutil
import subprocess
import sys
from dataclasses import fields

import pytest

import make_details
import make_paper
import make_results
from conftest import ROOT
from test_text import SOURCES, function

TEXT = make_paper.PAGE.read_text()
BLOCKS = re.findall(r"(?ms)^```(\w*)\n(.*?)^```$", TEXT)
PROGRAMS = [text for language, text in BLOCKS if language == "python"]
OUTPUTS = [text for language, text in BLOCKS if not language]
DETAILS = make_details.table()
ALL_OF_THEM = ["discrete", "continuous", "atari", "atari_lstm", "rlhf"]
CLASSIC = ALL_OF_THEM[:4]

# What paragraphs say that no argument says -> a line of the scripts that have that sentence.
CONSTANTS = {
    "two hidden layers of 64 tanh units": "layer_init(nn.Linear(64, 64)),",
    "an LSTM of 128 units": "nn.LSTM(512, 128)",
    "$1$ in the LSTM": 'nn.init.orthogonal_(parameter) if "weight" in name',
    r"a gain of $\sqrt{2}$": "def layer_init(layer, gain=2**0.5):",
    "$0.01$ for the policy": "gain=0.01)",
    "$1$ for the value": "gain=1.0)",
    r"Adam with $\epsilon = 10^{-5}$": "Adam(agent.parameters(), lr=lr, eps=1e-5",
    "the standard deviation of the population": "advantages.std(correction=0)",
    "half the squared error": "value_loss = 0.5 *",
    "1 to 30 no-ops": "integers(1, 31)",
    "four frames": "while len(rewards) < 4",
    r"$84 \times 84$": "cv2.resize(screen, (84, 84)",
    "a stack of the last four": "[*self.frames[1:], self.warp()]",
    "filled with zeros": "np.zeros((3, 84, 84), np.uint8)",
    "scaled to $[0, 1]$": "/ 255.0",
    "deviation of the discounted return and clipped to $[-10, 10]$": "reward.clip(-10, 10)",
    "standard deviation and clipped to $[-10, 10]$": "obs.clip(-10, 10)",
    r"AdamW with $\epsilon = 10^{-5}$": "AdamW",
}

each_script = pytest.mark.parametrize("script", ALL_OF_THEM)


def plain(text):
    return " ".join(text.split())


def test_page_is_up_to_date():
    assert make_paper.pages()[make_paper.PAGE] == TEXT, "run: python docs/make_paper.py"


def test_every_argument_is_in_a_table_or_left_out_on_purpose():
    modules = [importlib.import_module(f"ppo_{script}") for script in ALL_OF_THEM]
    existing = {field.name for module in modules for field in fields(module.Args)}
    named = make_paper.WORDS["names"].keys()
    assert named | make_paper.LEFT_OUT == existing
    assert named & make_paper.LEFT_OUT == set()


@pytest.mark.parametrize("script", CLASSIC)
def test_a_paragraph_names_all_of_the_37_that_the_script_has(script):
    named = {tag for x in make_paper.sentences(script) for tag in x.get("tags", [])}
    of_the_37 = make_details.of_the_37(DETAILS)
    assert named == {tag for tag in of_the_37 if script in DETAILS[tag]["scripts"]}
    assert f"the {len(named)} of the 37 implementation details" in plain(
        make_paper.paragraph(script)
    )


def test_paragraph_of_language_models_names_details_that_the_script_has():
    named = {tag for x in make_paper.sentences("rlhf") for tag in x.get("tags", [])}
    assert len(named) > 30
    assert all("rlhf" in DETAILS[tag]["scripts"] for tag in named)


@each_script
def test_what_no_argument_says_stands_in_the_script(script):
    text = plain(make_paper.paragraph(script))
    found = [words for words in CONSTANTS if words in text]
    assert len(found) >= (7 if script != "rlhf" else 2)
    for words in found:
        assert CONSTANTS[words] in SOURCES[script], words


def test_every_constant_is_said_somewhere():
    texts = [plain(make_paper.paragraph(script)) for script in ALL_OF_THEM]
    assert [words for words in CONSTANTS if not any(words in text for text in texts)] == []


def test_numbers_are_those_of_args(monkeypatch):
    before = make_paper.paragraph("discrete")
    other = make_paper.defaults("discrete") | {"gamma": 0.5, "num_steps": 77, "num_envs": 1}
    monkeypatch.setattr(make_paper, "defaults", lambda script: other)
    after = plain(make_paper.paragraph("discrete"))
    assert r"\gamma = 0.99$" in plain(before) and r"\gamma = 0.5$" in after
    assert "4 environments take rollouts of 128 steps" in plain(before)
    assert "One environment takes rollouts of 77 steps" in after


@pytest.mark.parametrize("name", ["anneal_lr", "norm_adv", "clip_vloss", "bootstrap_truncation"])
def test_a_claim_that_is_not_true_of_the_defaults_is_refused(name, monkeypatch):
    other = make_paper.defaults("atari") | {name: False}
    monkeypatch.setattr(make_paper, "defaults", lambda script: other)
    with pytest.raises(ValueError, match="not true any more"):
        make_paper.paragraph("atari")


def test_a_listing_is_the_text_of_the_script(capsys):
    make_paper.main(["listing", str(ROOT / "ppo_rlhf.py"), "gae", "ppo_loss"])
    first, *code, last = capsys.readouterr().out.rstrip("\n").split("\n")
    assert first.startswith(r"\begin{lstlisting}[") and last == r"\end{lstlisting}"
    texts = [function(SOURCES["rlhf"], name) for name in ("gae", "ppo_loss")]
    assert "\n".join(code) == "\n\n\n".join(texts)
    with pytest.raises(SystemExit, match="has no nothing"):
        make_paper.main(["listing", str(ROOT / "ppo_rlhf.py"), "nothing"])


def test_a_table_has_the_defaults_of_each_script():
    found = make_paper.rows(make_paper.columns_of([ROOT / f"ppo_{x}.py" for x in CLASSIC]))
    rows = {words: cells for words, *cells in found}
    assert rows[""] == ["discrete", "continuous", "atari", "atari lstm"]
    assert rows["Total steps"] == ["500,000", "1,000,000", "10,000,000", "10,000,000"]
    assert rows["Clip range $\\epsilon$"] == ["$0.2$", "$0.2$", "$0.1$", "$0.1$"]
    assert rows["Learning rate"][1] == r"$3 \cdot 10^{-4}$"
    assert rows["Entropy bonus $c_2$"][1] == "$0$"
    assert "Clip range falls to zero" not in rows  # off everywhere
    alone = dict(make_paper.rows(make_paper.columns_of([ROOT / "ppo_continuous.py"])))
    assert alone["Entropy bonus $c_2$"] == "$0$"  # a weight of 0 is one


def test_a_table_of_a_run_has_what_the_run_had(tmp_path, capsys):
    """What the defaults have off is there where the run has it on."""
    config = make_paper.defaults("discrete") | {"anneal_clip": True, "learning_rate": 1e-3}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config | {"versions": {"torch": "2"}, "batch_size": 512}))
    make_paper.main(["table", str(path)])
    text = capsys.readouterr().out
    assert r"Learning rate & $1 \cdot 10^{-3}$ \\" in text
    assert r"Clip range falls to zero & yes \\" in text
    assert r" & CartPole-v1 \\" in text
    assert text.count("\\\\\n") == text.count("&")


def test_every_citation_has_an_entry_and_every_number_is_the_scripts():
    entries = dict(re.findall(r"(?ms)^@misc\{(\w+),\n(.*?)^\}", make_paper.bibtex()))
    cited = {
        key for x in ALL_OF_THEM for key in re.findall(r"\\cite\{(\w+)\}", make_paper.paragraph(x))
    }
    assert cited == set(entries)
    for entry in entries.values():
        for number in re.findall(r"eprint = \{([\d.]+)\}", entry):
            assert number in SOURCES["rlhf"]
    assert make_paper.CITATION["version"] in entries["ppo37"]


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="no pdflatex: apt install texlive")
@pytest.mark.parametrize("script", ["continuous", "rlhf"])
def test_the_document_compiles(script, tmp_path, capsys):
    """Without an error, a box that is too wide or, in the end, an unknown citation."""
    for name, command in (("a.tex", ["document", f"ppo_{script}.py"]), ("ppo37.bib", ["bibtex"])):
        make_paper.main(command)
        (tmp_path / name).write_text(capsys.readouterr().out)
    latex = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "a"]
    for command in (latex, ["bibtex", "a"], latex, latex):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
        assert done.returncode == 0, done.stdout.decode(errors="replace")[-2000:]
    log = (tmp_path / "a.log").read_text(errors="replace")
    assert re.findall(r"Overfull.+|LaTeX Warning.+", log) == []
    assert (tmp_path / "a.pdf").stat().st_size > 10_000


def test_scores_are_those_of_the_page_of_results(tmp_path):
    """The program on the page, from the runs that are kept."""
    runs = [path for path in make_results.RESULTS.glob("Acrobot-v1__ppo_discrete__*.csv.gz")]
    for path in runs:
        folder = tmp_path / "runs" / path.name.removesuffix(".csv.gz")
        folder.mkdir(parents=True)
        (folder / "metrics.csv").write_bytes(gzip.decompress(path.read_bytes()))
    (program,) = [x for x in PROGRAMS if "def score" in x]
    (tmp_path / "score.py").write_text(program)
    (command,) = re.findall(r"(?m)^python (score\.py) '(.+)'$", TEXT)
    done = subprocess.run(
        [sys.executable, *command], check=False, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout == OUTPUTS[0], done.stderr
    iqm, low, high = re.search(r"IQM (\S+) \[(\S+), (\S+)\]", done.stdout).groups()
    mean, deviation = re.search(r"mean (\S+) \+- (\S+)", done.stdout).groups()
    (row,) = re.findall(r"(?m)^\| Acrobot-v1 \|.+$", (ROOT / "docs" / "results.md").read_text())
    assert f"| {mean} +- {deviation} | {iqm} [{low}, {high}] |" in row


def test_how_often_an_interval_holds_the_mean(capsys):
    (program,) = [x for x in PROGRAMS if "standard_normal" in x]
    exec(program, {})
    assert capsys.readouterr().out == OUTPUTS[1]


def test_the_licence_is_that_of_the_repository():
    (sentence,) = re.findall(r"Code of ppo37, (copyright \(c\) .+), used under the (.+)\.", TEXT)
    licence = (ROOT / "LICENSE").read_text()
    assert sentence[0].removeprefix("copyright ") in licence and sentence[1] in licence
