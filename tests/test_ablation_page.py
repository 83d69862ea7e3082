"""docs/ablation.md: its statistics by hand, its words no stronger than the intervals."""

import ablate
import numpy as np
import pytest

import make_ablation
import make_details
from conftest import ROOT
from make_ablation import Compared, effect, part, sentence, welch

PAGE = (ROOT / "docs" / "ablation.md").read_text()
EPISODE = "charts/episodic_return"


def test_page_is_up_to_date():
    for path, text in make_ablation.pages().items():
        assert path.read_text() == text, "run: python docs/make_ablation.py"


def test_interval_by_hand():
    """Means 3 and 8; variances of the means 2.5 / 5 and 4 / 4; 1.5^2 / (0.5^2 / 4 + 1 / 3) = 5.68
    degrees of freedom, of which five count, quantile 2.571."""
    ours, theirs = [1, 2, 3, 4, 5], [6, 10, 7, 9]
    assert np.var(theirs, ddof=1) == pytest.approx(10 / 3)
    theirs = [8 + x * (4 / (10 / 3)) ** 0.5 for x in (-2, 2, -1, 1)]
    assert welch(ours, theirs) == pytest.approx((8, 3, 5, 2.571 * 1.5**0.5))
    assert welch(ours, [8.0]) == (8, 3, 5, None)
    assert welch([500] * 4, [499] * 2) == (499, 500, -1, 0)


def rows(seed, values, name=EPISODE):
    return [
        {"seed": str(seed), "global_step": str(step), "name": name, "value": str(x)}
        for step, x in values
    ]


@pytest.fixture
def toy(monkeypatch):
    """100 steps, so a window is two; an episode that ends with step t is in window (t - 1) // 2."""
    monkeypatch.setitem(ablate.TASKS, "Toy", ablate.Task("ppo_discrete.py", "", 100, 2))


def test_windows_and_scores(toy):
    found = rows(3, [(1, 5.0), (2, 7.0), (7, 2.0), (91, 10.0), (100, 20.0), (90, 99.0)])
    curve = make_ablation.windows("Toy", found)
    assert list(curve[:5]) == [6, 6, 6, 2, 2]
    assert list(curve[43:]) == [2, 99, 10, 10, 10, 10, 20]
    (score,) = make_ablation.scores("Toy", found).values()
    assert score == (15, curve.mean(), 6)
    early = make_ablation.scores("Toy", rows(3, [(2, 7.0), (7, 2.0)]))[3]
    assert early == (2, pytest.approx((3 * 7 + 47 * 2) / 50), 7)


def test_held_out_reward_is_the_end_of_language_models(monkeypatch):
    task = ablate.Task("ppo_rlhf.py", "", 100, 2, ablate.SCORES)
    monkeypatch.setitem(ablate.TASKS, "Toy", task)
    found = rows(1, [(50, 1.0), (100, 3.0)], "gold/score") + rows(1, [(100, 9.0)], "objective/x")
    found += rows(1, [(100, 2.5)], make_ablation.HELD_OUT)
    assert make_ablation.scores("Toy", found)[1][0] == 2.5
    assert make_ablation.scores("Toy", found)[1].area == pytest.approx((49 * 1 + 3) / 50)


def compared(difference, half, same=False, gain=100.0, stopped=0):
    end = (50.0 + difference, 50.0, difference, half)
    return Compared("Toy", 3, 3, end, end, gain, same, stopped)


@pytest.mark.parametrize(
    ("x", "expected", "words"),
    [
        (compared(-20, 10), "less", "Without it the return is lower on Toy (-20 % of what is"),
        (compared(20, 10), "more", "**Without it the return is higher on Toy (+20 % of what is"),
        (compared(-20, 21), "nothing", "Nothing is seen on Toy (-20 % of what is learned, -41 to"),
        (compared(20, 20), "nothing", "Nothing is seen"),
        (compared(-20, None), "unknown", "One seed, so no interval yet, on Toy."),
        (compared(0, 0, same=True), "same", "On Toy every return is the same, bit for bit."),
        (compared(-1, 0), "less", "Without it the return is lower"),
    ],
)
def test_words_are_no_stronger_than_the_interval(x, expected, words):
    assert effect(x) == expected
    assert sentence([x]).startswith(words)


def test_all_that_was_seen_is_said():
    text = sentence([compared(-20, 10), compared(20, 10), compared(5, 10), compared(1, None)])
    assert [text.count(x) for x in ("lower on", "**", "Nothing", "One seed")] == [1, 2, 1, 1]
    text = sentence([compared(-20, 10, stopped=2)])
    assert text.endswith("Runs that ended early, with an error: 2 of 3 on Toy.")
    assert part(compared(-20, 10, gain=50)) == (-40, -60, -20)


def test_same_returns_are_compared_seed_by_seed(toy, monkeypatch):
    plain = rows(1, [(50, 1.0), (100, 2.0)]) + rows(2, [(50, 1.0), (100, 3.0)])
    known = {ablate.UNCHANGED: plain, "C12": plain[:2], "C3": plain[:1] + rows(1, [(100, 2.1)])}
    monkeypatch.setattr(ablate, "rows_of", lambda task, ablation: known[ablation.detail])
    runs = {"runs": [{"exit_code": 0}, {"exit_code": 2}]}
    monkeypatch.setattr(ablate, "stored", lambda task, ablation: runs)
    for detail, same in (("C12", True), ("C3", False)):
        found = make_ablation.compare("Toy", ablate.Ablation(detail, "", ("Toy",)))
        assert (found.same, found.seeds, found.of, found.stopped) == (same, 1, 2, 1)
        assert found.end[1] == 2.5
        assert found.gain == 1.5


def test_every_detail_has_its_place_and_its_line():
    """With data, or with how far it came and the command that goes on."""
    table = ablate.table()[1:]
    for ablation in table:
        heading = make_ablation.heading(ablation)
        assert PAGE.count(f"\n{heading}\n") == 1, heading
        part = PAGE.split(f"\n{heading}\n")[1].split("\n### ")[0]
        there = len(ablate.rows_of(ablation.tasks[0], ablation)) > 0
        assert there == ("| task |" in part) or "goes on" in part
    details = (ROOT / "docs" / "details.md").read_text()
    tags = {ablation.detail for ablation in table} & make_details.table().keys()
    assert {*make_details.of_the_37(make_details.table())} <= tags
    for tag in tags:
        part = details.split(f"\n## {tag} ")[1].split("\n## ")[0]
        assert part.count("\n- Worth: ") == 1
