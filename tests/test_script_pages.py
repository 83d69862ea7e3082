"""docs/ppo_*.md: their tables are made from scripts and kept runs, and leave nothing out."""

import re
import shlex
import signal
from pathlib import Path

import numpy as np
import pytest
import tyro

import make_results
import make_scripts
import ppo_atari_lstm
import ppo_rlhf
from conftest import ROOT, SCRIPTS, metrics, train

MODULES = SCRIPTS | {"atari_lstm": ppo_atari_lstm, "rlhf": ppo_rlhf}
PAGES = {script: (ROOT / "docs" / f"ppo_{script}.md").read_text() for script in MODULES}
of_all_runs = pytest.mark.xdist_group("script_pages")  # which are read once
each_script = pytest.mark.parametrize("script", MODULES)
HEAD = re.compile(r"(?m)^\| (.+?) \|$\n\|[-|]+\|\n((?:^\|.+\n)+)")


def tables(script, *head):
    """All rows of the tables that begin with these columns, as lists of cells."""
    found = []
    for titles, body in HEAD.findall(PAGES[script]):
        if tuple(titles.split(" | "))[: len(head)] == head:
            found += [re.split(r" ?\| ", row[2:-1].strip() + " ") for row in body.splitlines()]
    return [[cell.strip() for cell in row] for row in found]


# ------------------------------------------------------------------------------------------------
# Pages


@of_all_runs
def test_pages_are_up_to_date():
    for path, text in make_scripts.pages().items():
        assert path.read_text() == text, path.name


@each_script
def test_details_that_are_linked_exist(script):
    details = (ROOT / "docs" / "details.md").read_text()
    linked = set(re.findall(r"details\.md#(\w+)", PAGES[script]))
    assert len(linked) > 10
    assert {x for x in linked if f'<a id="{x}"></a>' not in details} == set()


@each_script
def test_links_to_lines(script):
    """The line has the last part of a metric's name, or what the text says."""
    lines = (ROOT / f"ppo_{script}.py").read_text().splitlines()
    links = re.findall(rf"\[`([^`]+)`\]\(\.\./ppo_{script}\.py#L(\d+)\)", PAGES[script])
    assert len(links) > 30
    for text, number in links:
        line, last = lines[int(number) - 1], text.rsplit("/", 1)[-1]
        parts = [text] if "/" not in text else [f"{last}", "gold/{name}", "gold/{part}"]
        assert any(part in line for part in parts), (text, line)
        if text.isidentifier() and not line.startswith(" "):
            assert re.match(rf"(def|class) {text}\b|{text} = ", line), (text, line)


# ------------------------------------------------------------------------------------------------
# Flags


@each_script
def test_flags_are_complete(script):
    """Each field of Args stands there once, and typed as the page says it is the default."""
    module, rows = MODULES[script], tables(script, "flag", "default", "what it is")
    expected = [f"`--{name.replace('_', '-')}`" for name in vars(module.Args())]
    assert [row[0] for row in rows] == expected
    argv = []
    for flag, default, *_ in rows:
        name = flag.strip("`-")
        if default in ("on", "off"):
            argv.append(f"--{name}" if default == "on" else f"--no-{name}")
        elif default not in ("none", *make_scripts.WORDS["defaults"].values()):
            argv += [f"--{name}", re.fullmatch("`(.+)`", default)[1]]
    assert tyro.cli(module.Args, args=argv) == module.Args()


@each_script
def test_ranges_of_flags_are_those_that_are_checked(script):
    """What is said of a number is what check_args refuses by."""
    module, takes = MODULES[script], {}
    for flag, *_, allowed, _ in tables(script, "flag", "default", "what it is"):
        takes[flag.strip("`")] = allowed
    assert takes["--gamma"] == "from 0 to 1"
    assert takes["--seed"] == "from 0 to 2^63 - 1"
    assert takes["--cuda"] == "on, off"
    for flag, low in (("--learning-rate", -1.0), ("--clip-coef", 0.0), ("--num-minibatches", 0)):
        changes = {flag[2:].replace("-", "_"): low}
        with pytest.raises(SystemExit):
            module.check_args(module.Args(**changes))
        assert takes[flag] in ("at least 0 and finite", "above 0", "at least 1")


def test_other_defaults():
    """Those of the page, typed, are those that the flags bring."""
    rows = tables("rlhf", "flag", "default", "`--task sort`")
    columns = [["--task", "sort"], ["--model", "M", "--reward-model", "R"]]
    columns.append([*columns[1], "--lora-rank", "8"])
    for column, argv in enumerate(columns, 2):
        args = ppo_rlhf.parse_args(argv)
        changed = {x for x, v in vars(ppo_rlhf.Args()).items() if vars(args)[x] != v}
        given = {"task", "model", "reward_model", "lora_rank", "stages"}
        names = {row[0].strip("`-").replace("-", "_"): row[column].strip("`") for row in rows}
        assert changed - given <= names.keys()
        for name, text in names.items():
            value = getattr(args, name)
            expected = {"all": 10**9, "none": None}.get(text)
            assert value == (float(text) if expected is None and text != "none" else expected)


def test_titles_and_words_of_flags_are_all_used():
    first = {group[0]["name"] for x in MODULES for group in make_scripts.fields(x)}
    assert first == set(make_scripts.WORDS["groups"])
    sources = "".join((ROOT / f"ppo_{script}.py").read_text() for script in MODULES)
    assert all(f" = {x}  # " in sources for x in make_scripts.WORDS["defaults"])


# ------------------------------------------------------------------------------------------------
# Metrics


def written_by_a_run(script):
    """Names in metrics.csv of short runs, and those that stand in the source as a whole."""
    text = (ROOT / f"ppo_{script}.py").read_text()
    groups = "objective|ppo|rm|response|rollout|perf" if script == "rlhf" else "charts|losses"
    names = set(re.findall(rf'"((?:{groups})/[\w/]+)"', text))
    if script != "rlhf":
        own = {"num_minibatches": 2} if script == "atari_lstm" else {"penalty_kl": 0.01}
        steps = {"total_timesteps": 16, "num_steps": 8, "update_epochs": 1}
        if script == "atari_lstm":
            settings = own | steps | {"num_envs": 2, "vectorization": "sync", "cuda": False}
            ppo_atari_lstm.train(ppo_atari_lstm.Args(**settings, precision="fp32"))
        else:
            train(MODULES[script], **own | steps)
        return names | {name for _, _, name, _ in metrics()}
    small = {"d_model": 8, "num_layers": 1, "cuda": False, "eval_episodes": 4, "update_epochs": 1}
    small |= {"sft_texts": 64, "sft_epochs": 1, "rm_pairs": 32, "rm_test_pairs": 32, "rm_epochs": 1}
    small |= {"total_episodes": 16, "batch_size": 16}
    handlers = {x: signal.getsignal(x) for x in (signal.SIGINT, signal.SIGTERM)}
    ppo_rlhf.train(ppo_rlhf.Args(**small))
    ppo_rlhf.train(ppo_rlhf.Args(**ppo_rlhf.SORT | small | {"group_size": 2}))
    for number, handler in handlers.items():
        signal.signal(number, handler)
    files = [path.read_text() for path in Path("runs").glob("*/metrics.csv")]
    assert len(files) == 2
    return names | {line.split(",")[2] for text in files for line in text.splitlines()[1:]}


@each_script
def test_metrics_are_complete(script):
    """What is written stands in the table, and what stands there is written."""
    cells = [row[0] for row in tables(script, "metric", "what it is")]
    named = [re.search(r"\[`(.+?)`\]", cell)[1] for cell in cells]
    assert len(named) == len(set(named))
    written = written_by_a_run(script)
    policy, part = "(sft|best_of_4|best_of_16|ppo)", r"\w+"
    patterns = {x: x.replace("{policy}", policy).replace("{part}", part) for x in named}
    assert {x for x in written if not any(re.fullmatch(p, x) for p in patterns.values())} == set()
    assert {x for x, p in patterns.items() if not any(re.fullmatch(p, y) for y in written)} == set()


@each_script
def test_every_metric_is_explained(script):
    rows = tables(script, "metric", "what it is")
    assert all(len(row) == 4 and all(row) for row in rows)
    for row in rows:  # what is named is on this page
        for name in re.findall(r"(?<!\[)`((?:charts|losses|objective|ppo|gold)/\w[\w/]*)`", row[3]):
            assert f"[`{name}`]" in PAGES[script], name
        module = MODULES[script]
        for flag in re.findall(r"`--([a-z-]+)", " ".join(row)):
            assert flag.removeprefix("no-").replace("-", "_") in vars(module.Args()), flag


def test_same_words_for_the_same_thing():
    """On all pages that have a metric, but where the table says otherwise."""
    seen, shared = {}, 0
    for script in MODULES:
        for cell, *words in tables(script, "metric", "what it is"):
            name = re.search(r"\[`(.+?)`\]", cell)[1]
            own = make_scripts.WORDS["metrics"][name].get(script, {})
            for key, text in zip(("what", "healthy", "unhealthy"), words, strict=True):
                shared += (name, key) in seen
                assert key in own or seen.setdefault((name, key), text) == text
    assert shared > 100


def test_ranges():
    """The first, the middle and the last twentieth of each run, 5 % to 95 % of the values."""
    run = {"x": np.arange(1000.0)}
    (a, b), (c, d), (e, f) = make_scripts.ranges([run, run], "x")
    assert 0 <= a < 4 and 45 < b < 50
    assert 475 <= c < 479 and 520 < d < 525
    assert 950 <= e < 954 and 995 < f <= 999
    assert make_scripts.ranges([{"x": np.array([3.0])}], "x") == [(3.0, 3.0)] * 3


@pytest.mark.parametrize(
    ("x", "text"),
    [
        *((0.0, "0"), (-0.0, "0"), (1234.0, "1,200"), (42.4, "42"), (0.01234, "0.012")),
        *((1.0, "1"), (-0.000456, "-4.6e-4"), (3e-12, "3.0e-12"), (9.97, "10"), (-1.25, "-1.2")),
    ],
)
def test_rounded(x, text):
    assert make_scripts.rounded(x) == text


# ------------------------------------------------------------------------------------------------
# Results


def test_results_are_the_rows_of_this_script(monkeypatch):
    def run(env_id, script, seed, score):
        config = vars(MODULES["discrete"].Args()) | {"env_id": env_id, "seed": seed, "steps": 512}
        config |= {"batch_size": 512, "num_iterations": 1, "command": f"ppo_{script}.py"}
        episodes = np.arange(300), np.where(np.arange(300) < 200, -7.0, score)
        metrics = {"charts/episodic_return": np.array(episodes), "seconds": np.array([[1], [90]])}
        return config, metrics

    runs = [run("CartPole-v1", "discrete", 1, 484.0), run("CartPole-v1", "discrete", 2, 488.0)]
    runs += [run("Hopper-v5", "continuous", 1, 2000.0)]
    monkeypatch.setattr(make_scripts, "kept_results", lambda: (runs, [], []))
    text = make_scripts.results("discrete")
    (row,) = [line for line in text.splitlines() if "-v" in line and line.startswith("| ")]
    assert row.startswith("| CartPole-v1 | 1 2 | 486.0 +- 2.0 |  |  | 484.0 of 490* | 490.0 +- 6.1")
    assert row.endswith("| 1.5 |")
    assert "](results/curves_classic_control.png)" in text
    assert "Hopper-v5 | 1 | 2,000 |" in make_scripts.results("continuous")


@of_all_runs
@pytest.mark.parametrize("script", make_scripts.CLASSIC)
def test_results_of_every_kept_run_are_there(script):
    rows = [row[0].split(",")[0] for row in tables(script, "environment", "seeds", "score")]
    runs = [x for x, _ in make_scripts.kept_results()[0]]
    assert {x["env_id"] for x in runs if x["command"].startswith(f"ppo_{script}.py ")} <= {*rows}
    for picture in re.findall(r"!\[[^]]+\]\(results/(curves_\w*\.png)\)", PAGES[script]):
        assert (make_results.RESULTS / picture).exists()


# ------------------------------------------------------------------------------------------------
# Commands


@each_script
def test_commands(script):
    """Those of the page, word for word: their flags are there, and nothing is refused."""
    module = MODULES[script]
    blocks = dict.fromkeys(("sh", "text"), "")
    for kind, code in re.findall(r"(?ms)^```(sh|text)\n(.+?)^```$", PAGES[script]):
        blocks[kind] += code
    assert len(blocks["sh"].splitlines()) >= 5
    for kind, code in blocks.items():
        for line in code.splitlines():
            words = shlex.split(re.sub(r"^[A-Z_]+=\S+ ", "", line))
            assert words[:2] == ["python", f"ppo_{script}.py"]
            if kind == "sh":
                module.check_args(module.parse_args(words[2:]))
            else:  # with files that are not there
                tyro.cli(module.Args, args=words[2:])
