"""What comes out for others in docs/check_your_own.md: it is what the table says, and is so."""

import csv
import json
import re
import sys
from importlib import metadata
from pathlib import Path
from unittest.mock import patch

import check_peers
import numpy as np
import peer_cleanrl
import peer_code
import peer_sb3
import pytest

import make_check
import make_vectors

ROWS, ORIGIN = make_check.load("peers")
TEXT = make_check.PAGE.read_text()
SECTION = TEXT.partition(make_check.MARKS[0])[2].partition(make_check.MARKS[1])[0]
FILES = {path.stem: json.loads(path.read_text()) for path in make_vectors.FOLDER.glob("*.json")}

# Of what Stable-Baselines3 is asked here once more: fast ones, of each kind.
ONCE_MORE = ["gae", "gae_lambda_0", "advantage_normalization", "loss_discrete", "loss_gaussian"]
ONCE_MORE += ["entropy", "kl", "gradient_clipping", "adam", "annealing", "normalization"]


def rows_of(name, function):
    return check_peers.rows_of("SB3", peer_sb3.VERSION, name, function)


# ------------------------------------------------------------------------------------------------
# The page


def test_page_is_up_to_date():
    assert make_check.page() == TEXT


def test_every_file_has_a_row():
    rows = re.findall(r"(?m)^\| (\w+) \| (.+) \|$", SECTION)
    cells = {name: rest.split(" | ") for name, rest in rows if name != "vector"}
    assert cells.keys() == FILES.keys()
    for name, told in cells.items():
        for peer, cell in zip(make_check.PEERS, told, strict=True):
            own = [row for row in ROWS if (row["peer"], row["vector"]) == (peer, name)]
            if own:
                assert cell.startswith(("same", "differs"))
                assert ("differs" in cell) == any(row["verdict"] == "differs" for row in own)
                assert ("same" in cell) == any(row["verdict"] == "same" for row in own)
            else:
                assert cell in ("not run", "not there")


def test_every_difference_is_explained():
    told = {cause for row in ROWS for cause in make_check.causes(row)}
    assert told == make_check.MEANS.keys()
    assert re.findall(r"(?m)^(\d+)\. ", SECTION) == [str(i + 1) for i in range(len(told))]


# ------------------------------------------------------------------------------------------------
# The table


def test_outputs_are_those_of_the_files():
    keys = [(row["peer"], row["vector"], row["output"]) for row in ROWS]
    assert len(keys) == len(set(keys))
    assert {peer for peer, _, _ in keys} == set(make_check.PEERS)
    for row in ROWS:
        vector = FILES[row["vector"]]
        assert row["output"] in vector["outputs"]
        assert float(row["tolerance"]) == vector["tolerance"]
        assert row["version"] == ORIGIN["peers"][row["peer"]]


def test_verdicts_follow_from_deviations():
    for row in ROWS:
        same = float(row["deviation"]) <= float(row["tolerance"])
        assert row["verdict"] == ("same" if same else "differs"), row
        assert bool(row["how"]) is not same, row
        for alone in make_check.causes(row).values():
            assert alone > float(row["tolerance"]), row


def test_nothing_is_left_once_the_differences_are_put_right():
    for row in ROWS:
        if row["verdict"] == "differs":
            assert float(row["rest"]) <= float(row["tolerance"]), row


# ------------------------------------------------------------------------------------------------
# How it is measured


@pytest.mark.parametrize("name", ONCE_MORE)
def test_stable_baselines3_says_so(name):
    if ORIGIN["peers"]["SB3"] != metadata.version("stable-baselines3"):
        pytest.skip("another version")
    stored = [row for row in ROWS if (row["peer"], row["vector"]) == ("SB3", name)]
    found = rows_of(name, peer_sb3.FUNCTIONS[name])
    columns = ("vector", "output", "verdict", "how")
    assert [[x[k] for k in columns] for x in found] == [[x[k] for k in columns] for x in stored]
    for now, then in zip(found, stored, strict=True):
        bound = {"rel": 1e-2, "abs": now["tolerance"]}
        assert float(now["deviation"]) == pytest.approx(float(then["deviation"]), **bound)


def test_a_wrong_peer_is_told_from_a_right_one():
    """Its environments take a time limit for an end; its values are not clipped."""
    step = make_vectors.Stream.step

    def ends(self, action):
        obs, reward, terminated, truncated, info = step(self, action)
        return obs, reward, terminated or truncated, False, info

    (right,) = rows_of("gae", peer_sb3.gae)
    with patch.object(make_vectors.Stream, "step", ends):
        (wrong,) = rows_of("gae", peer_sb3.gae)
    (theirs,) = [x for x in ROWS if (x["peer"], x["vector"]) == ("CleanRL", "gae")]
    assert [right["verdict"], wrong["verdict"]] == ["same", "differs"]
    assert float(wrong["deviation"]) == pytest.approx(float(theirs["deviation"]), rel=1e-2)
    assert wrong["how"] == ""  # nobody says why


def test_a_wrong_number_is_seen_in_each_output():
    outputs = FILES["loss_discrete"]["outputs"]
    assert {row["verdict"] for row in rows_of("loss_discrete", lambda **_: (outputs, {}))} == {
        "same"
    }
    for name, expected in outputs.items():
        wrong = outputs | {name: np.array(expected) * (1 + 1.1e-5)}
        rows = rows_of("loss_discrete", lambda wrong=wrong, **_: (wrong, {}))
        assert [row["output"] for row in rows if row["verdict"] == "differs"] == [name]


@pytest.mark.parametrize(
    ("result", "expected", "found"),
    [
        ([1.0, 2.5], [1.0, 2.0], 0.25),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        (0.1, 0.0, np.inf),
        (np.nan, 1.0, np.nan),
        ([1.0], [1.0, 2.0], np.inf),
        (["a", "b"], ["a", "c"], 0.5),
        ([], [], 0.0),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_deviation(result, expected, found):
    assert check_peers.deviation(result, expected) == pytest.approx(found, nan_ok=True)


def test_the_fewest_causes_that_are_enough():
    def explained(**lefts):
        lefts = {frozenset(x.replace("none", "")): y for x, y in lefts.items()}
        return check_peers.explained(lefts, 1e-6)

    assert explained(none=0.5) == {}
    found = explained(none=0.5, a=0.2, b=0.3, ab=1e-7)
    assert found == {"how": "a, b", "alone": "0.3, 0.2", "rest": "1e-07"}
    assert explained(none=0.5, a=0.5, b=1e-7, ab=0.0)["how"] == "b"
    assert explained(none=0.5, a=0.3, b=0.2)["how"] == "b"


SOURCE = """
def train(self):
    kl = 0
    for step in range(2):
        with guard():
            kl, more = step, 1
            total.add_(kl)
        a[0] = kl
        kl = 5 if a else f(lambda: 0)
        self.finish(kl)
        kl = 7
"""


def test_excerpts():
    class Total(list):
        add_ = list.append

    names = {"step": 3, "total": Total()}
    assert peer_code.run(SOURCE, names, "more", "add_()")["total"] == [3]
    names = {"a": [1], "kl": 3}
    assert peer_code.run(SOURCE, names, "kl", before="finish()")["kl"] == 5
    with pytest.raises(LookupError, match="from kl to nothing"):
        peer_code.excerpt(SOURCE, "kl", "nothing")


CLEAN = """
class Agent:
    pass

if __name__ == "__main__":
    with torch.no_grad():
        advantages, last = torch.zeros_like(rewards), 0
        for t in reversed(range(args.num_steps)):
            begins = dones[t + 1] if t + 1 < len(dones) else next_done
            following = values[t + 1] if t + 1 < len(dones) else next_value
            delta = rewards[t] + args.gamma * following * (1 - begins) - values[t]
            last = delta + args.gamma * args.gae_lambda * (1 - begins) * last
            advantages[t] = last
        returns = advantages + values
"""


def test_lines_of_a_script_stand_for_a_function():
    """A script in the form of CleanRL's, which takes a time limit for an end."""
    Path("cleanrl").mkdir()
    Path("cleanrl/ppo.py").write_text(CLEAN)
    script = peer_cleanrl.Script(".", "ppo.py")
    (row,) = rows_of("gae", lambda **inputs: peer_cleanrl.gae(script, **inputs))
    assert (row["verdict"], row["how"]) == ("differs", "time limit")
    assert float(row["rest"]) <= row["tolerance"]
    Path("cleanrl/ppo.py").write_text(CLEAN.replace("* last\n", "\n"))
    script = peer_cleanrl.Script(".", "ppo.py")
    (row,) = rows_of("gae", lambda **inputs: peer_cleanrl.gae(script, **inputs))
    assert float(row["rest"]) > row["tolerance"]


def test_what_is_not_given_is_skipped_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(peer_sb3, "FUNCTIONS", {"gae": peer_sb3.gae})
    monkeypatch.setattr(sys, "argv", ["check_peers.py", "--out", "there"])
    check_peers.main(check_peers.Args(out=Path("there")))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("SB3 gae advantages same")
    assert lines[1:] == [
        "skipped: CleanRL, without --cleanrl PATH",
        "skipped: TRL, without --trl PYTHON",
    ]
    (row,) = csv.DictReader(open("there/peers.csv"))
    assert row.keys() == ROWS[0].keys() and row["verdict"] == "same"
    origin = json.loads(Path("there/peers.json").read_text())
    assert origin.keys() == ORIGIN.keys() and origin["peers"] == {"SB3": peer_sb3.VERSION}


def test_answers_of_another_python():
    """`python` stands for one; it is given the script, the vectors and a file to write."""
    answers = {"version": "9", "gae": [{"advantages": [1]}, {}], "whiten": [{}, {}]}
    Path("answers.json").write_text(json.dumps(answers))
    python = Path("python").absolute()
    python.write_text(f'#!/bin/sh\ntest -d "$2" && cp {Path("answers.json").absolute()} "$3"\n')
    python.chmod(0o755)
    version, functions = check_peers.trl_functions(python)
    assert version == "9" and functions.keys() == {"gae", "whiten"}
    assert functions["gae"](**FILES["gae"]["inputs"]) == [{"advantages": [1]}, {}]
    assert functions["whiten"](**FILES["whiten"]["inputs"]) == [{}, {}]
