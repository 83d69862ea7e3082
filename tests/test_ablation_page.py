"""docs/ablation.md: its statistics by hand, its words no stronger than the intervals."""

import gzip

import ablate
import numpy as np
import pytest
from PIL import Image

import make_ablation
import make_details
from conftest import ROOT
from make_ablation import (
    RETURN,
    Compared,
    Difference,
    direction,
    effect,
    percent,
    runs_of,
    sentence,
    welch,
)

PAGE = (ROOT / "docs" / "ablation.md").read_text()
EPISODE = "charts/episodic_return"
PLAIN = ablate.ablations()[0]


def test_page_is_up_to_date():
    for path, text in make_ablation.pages().items():
        assert path.read_text() == text, "run: python docs/make_ablation.py"


def test_pictures_are_up_to_date():
    for name in ("effects.png", "curves.png"):
        with Image.open(make_ablation.PICTURES / name) as picture:
            assert picture.info["Source"] == make_ablation.source(), "run docs/make_ablation.py"


def test_interval_by_hand():
    """Means 3 and 8; variances of the means 2.5 / 5 and 4 / 4; 1.5^2 / (0.5^2 / 4 + 1 / 3) = 5.68
    degrees of freedom, quantile 2.480."""
    ours, theirs = [1, 2, 3, 4, 5], [6, 10, 7, 9]
    assert np.var(theirs, ddof=1) == pytest.approx(10 / 3)
    theirs = [8 + x * (4 / (10 / 3)) ** 0.5 for x in (-2, 2, -1, 1)]
    found = welch(ours, theirs)
    assert found[:4] == pytest.approx((8, 3, 5, 2.480 * 1.5**0.5), rel=1e-3)
    assert found.p == pytest.approx(0.00727, abs=5e-6)  # t = 4.082
    assert welch(ours, [8.0]) == (8, 3, 5, None, None)
    assert welch([500] * 4, [499] * 2)[:4] == (499, 500, -1, None)  # nothing to judge by
    assert welch([500] * 4, [500] * 2) == (500, 500, 0, 0, 1)


def test_what_is_learned_of_pong_by_hand(monkeypatch, tmp_path):
    """Ends -10 and -18, first windows -20 and -20: 6 in deviations of 32^0.5."""
    monkeypatch.setattr(make_ablation, "PICTURES", tmp_path / "ablation")
    header = "global_step,time,name,value\n8,0.5,losses/entropy,1.7\n"
    for seed, end in ((1, -10), (2, -18)):
        episodes = {19: -21, 20: -19, 21: -7, 90: 5, 91: end - 1, 100: end + 1, 101: 21}
        rows = "".join(f"{at},1.5,{EPISODE},{x}\n" for at, x in episodes.items())
        file = tmp_path / f"PongNoFrameskip-v4__ppo_atari__{seed}__7.csv.gz"
        file.write_bytes(gzip.compress((header + rows).encode()))
    assert make_ablation.pong(100) == pytest.approx(6 / 32**0.5)


def test_what_the_pilot_says():
    """Of two games that they do not rise, but for the first games of Krull, the short ones."""
    curves = {
        task: [make_ablation.windows(task, x, EPISODE) for x in runs_of(task, PLAIN).values()]
        for task in ("Pilot-Boxing", "Pilot-Krull")
    }
    assert {task: len(x) for task, x in curves.items()} == {"Pilot-Boxing": 2, "Pilot-Krull": 2}
    assert all(curve[-5:].mean() < curve[:5].mean() + 1 for curve in curves["Pilot-Boxing"])
    for curve in curves["Pilot-Krull"]:
        assert curve[-5:].mean() == pytest.approx(curve[5:10].mean(), rel=0.1)
    moved = {x: make_ablation.learned(make_ablation.scores(x)) for x in ("Breakout", "UpNDown")}
    assert moved["Breakout"] < moved["UpNDown"] < 5  # none is known


def run_of(*pairs, name=EPISODE):
    """What is kept of a run: pairs of steps and values."""
    return {name: np.array(pairs, float).T}


@pytest.fixture
def toy(monkeypatch):
    """100 steps, so a window is two; an episode that ends with step t is in window (t - 1) // 2."""
    monkeypatch.setitem(ablate.TASKS, "Toy", ablate.Task("ppo_discrete.py", "", 100, 2))


def test_windows_and_scores(toy):
    run = run_of((3, 5), (4, 7), (7, 2), (91, 10), (100, 20), (90, 99))
    curve = make_ablation.windows("Toy", run, EPISODE)
    assert list(curve[:5]) == [6, 6, 6, 2, 2]
    assert list(curve[43:]) == [2, 99, 10, 10, 10, 10, 20]
    assert make_ablation.score("Toy", run, RETURN) == (15, curve.mean(), 6)
    early = make_ablation.score("Toy", run_of((2, 7), (7, 2)), RETURN)
    assert early == (2, pytest.approx((3 * 7 + 47 * 2) / 50), 7)
    assert make_ablation.score("Toy", run_of((2, 7), name="losses/x"), RETURN) is None


@pytest.mark.parametrize("what", [make_ablation.GOLD, make_ablation.PROXY])
def test_what_is_measured_after_training_is_the_end_of_language_models(toy, what):
    name, after = what
    run = {x: run_of((50, 9), (100, 9), name=x)[x] for x in ablate.SCORES if x not in what}
    run |= run_of((50, 1), (100, 3), name=name)
    assert make_ablation.score("Toy", run, what).end == pytest.approx((4 * 1 + 3) / 5)
    run |= run_of((100, 2.5), name=after)
    assert make_ablation.score("Toy", run, what).end == 2.5
    assert make_ablation.score("Toy", run, what).area == pytest.approx((49 * 1 + 3) / 50)


def test_read(toy, tmp_path, monkeypatch):
    """What ablate.py keeps, as it keeps it."""
    monkeypatch.setattr(ablate, "RESULTS", tmp_path)
    kept = [(10, EPISODE, "7"), (10, "gold/score", "0.5"), (20, EPISODE, "8")]
    ablate.keep("Toy", PLAIN, {"seed": 3}, kept, "")
    (run,) = [make_ablation.runs_of("Toy", PLAIN)[3]]
    assert run[EPISODE].tolist() == [[10, 20], [7, 8]]
    assert run["gold/score"].tolist() == [[10], [0.5]]


def compared(
    difference, half, same=False, gain=100.0, stopped=0, without=0, sure=(False, False), area=0
):
    end = Difference(50.0 + difference, 50.0, difference, half)
    over_all = Difference(50.0 + area, 50.0, area, 5.0)
    seen = [50.0], [50.0]
    return Compared("Toy", 3, 3, end, over_all, gain, same, stopped, without, seen, sure)


@pytest.mark.parametrize(
    ("x", "expected", "words"),
    [
        (
            compared(-20, 10, sure=(True, False)),
            "lower",
            "With this change the return at the end is lower on Toy (-20 % of what is",
        ),
        (
            compared(20, 10, sure=(True, False)),
            "higher",
            "**With this change the return at the end is higher on Toy (+20 % of what is",
        ),
        (
            compared(-20, 10),
            "lower",
            "At the end it may be lower on Toy (-20 % of what is learned, -30 to",
        ),
        (
            compared(20, 10),
            "higher",
            "At the end it may be higher on Toy (+20 % of what is learned, +10 to",
        ),
        (
            compared(-20, 21),
            "open",
            "At the end it cannot be told from no change on Toy (-20 % of what is",
        ),
        (compared(20, 20), "open", "At the end it cannot be told from no change on Toy"),
        (
            compared(-4, 6),
            "little",
            "It changes little or nothing at the end on Toy (-4 % of what is",
        ),
        (compared(-4, 6.1), "open", "At the end it cannot be told"),
        (compared(-20, None), "unknown", "No interval yet on Toy: one seed, or no spread"),
        (compared(0, 0, same=True), "same", "Every return is the same on Toy, in all digits"),
        (compared(-20, 10, gain=-5), "unknown", "The unchanged script learns nothing on Toy."),
        (compared(-20, 10, without=1), "unknown", "They ended before any episode, without a"),
    ],
)
def test_words_are_no_stronger_than_the_interval(x, expected, words):
    assert effect(x) == expected
    assert sentence([x]).startswith(words)


def test_all_that_was_seen_is_said():
    sure = [compared(-20, 10, sure=(True, False)), compared(20, 10, sure=(True, False))]
    text = sentence([*sure, compared(5, 10), compared(1, None)])
    assert [text.count(x) for x in ("lower on", "**", "cannot", "No interval")] == [1, 2, 1, 1]
    assert percent(compared(-20, 10, gain=50)) == (-40, -60, -20)
    text = sentence([compared(-20, 10, stopped=2)])
    assert text.endswith("Runs that ended early, with an error: 2 of 3 on Toy.")
    text = sentence([compared(-20, 10, stopped=2, without=1)])
    assert "2 of 3 on Toy" in text and text.endswith("without a score: 1 on Toy.")


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (compared(-5, 10, area=-6), "it may be lower on Toy."),
        (compared(2, 3, area=6), "it may be higher on Toy."),
        (compared(2, 3, area=-6, sure=(False, True)), "it is lower on Toy."),
        (compared(2, 13, area=6, sure=(False, True)), "it is higher on Toy.**"),
        (compared(-20, 10, area=-6, sure=(False, True)), "it is lower on Toy."),
        (compared(-20, 10, area=6), "it may be higher on Toy."),
        (compared(-20, 10, area=-6), None),  # the end says so
        (compared(-20, 10, area=-6, sure=(True, True)), None),
        (compared(2, 3, area=4), None),
        (compared(0, 0, same=True, area=6), None),
    ],
)
def test_an_area_that_says_more_than_the_end_is_told(x, words):
    text = sentence([x])
    found = text.partition("Over the whole training, by the area, ")[2]
    assert (found == words) if words else ("area" not in text)


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (compared(-20, 10, sure=(True, True), area=-6), "Toy *-20* % (-30 to -10)"),
        (compared(20, 10), "Toy 20 % (10 to 30)"),
        (compared(20, 30, area=6), "Toy open"),
        (compared(20, 30, sure=(False, True), area=6), "Toy open at the end, higher over all"),
        (compared(2, 3, sure=(False, True), area=-6), "Toy little at the end, lower over all"),
        (compared(2, None), "Toy no interval yet"),
        (compared(0, 0, same=True), "Toy the same"),
    ],
)
def test_worth_in_short(x, words):
    assert f"Toy {make_ablation.in_short(x)}".replace("+", "") == words


def test_many_comparisons_by_hand():
    """Benjamini and Hochberg: of eight, the fourth, 0.024, is at most 4 / 8 of 0.05, so the first
    counts, too, though 0.007 is more than 1 / 8; the fifth, 0.04, is more than 5 / 8."""
    table = [(0.024, 0.04), (0.02, 0.007), (0.5, 0.6), (0.01, 0.7)]
    found = []
    for pair in table:
        end, area = (Difference(70, 50, 20, 10, p) for p in pair)
        found.append(compared(20, 10)._replace(end=end, area=area))
    found += [compared(0, 0, same=True), compared(20, None)]
    ((name, after),) = make_ablation.judged([("it", [*found, None])])
    sure = [(True, False), (True, True), (False, False), (True, False)]
    assert [x.sure for x in after[:4]] == sure
    assert [x.sure for x in after[4:6]] == [(False, False)] * 2
    assert (name, after[6]) == ("it", None)
    assert make_ablation.holm([0.03, 0.01, 0.04, 0.016]) == 2  # 0.03 is more than 0.05 / 2
    assert make_ablation.holm([0.01]) == 1


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (Difference(0, 0, 0.0219, 0.0031), "+0.0219 ± 0.0031"),
        (Difference(0, 0, -123.4, 45.6), "-123 ± 46"),
        (Difference(0, 0, 1234.0, 5.67), "+1,234.0 ± 5.7"),
        (Difference(0, 0, -0.5, None), "-0.50"),
        (Difference(0, 0, 1361.2, None), "+1,361"),
        (Difference(0, 0, 0.0, 0.0), "0.00"),
    ],
)
def test_differences_have_the_digits_of_their_interval(x, expected):
    assert make_ablation.difference(x) == expected


@pytest.fixture
def kept(toy, monkeypatch):
    """Runs of ablations: detail -> rows of the table, exit codes."""
    first, second = run_of((50, 1), (100, 2)), run_of((50, 1), (100, 3))
    known = {
        ablate.UNCHANGED: ({1: first, 2: second}, [0, 0]),
        "C12": ({1: run_of((50, 1), (100, 2))}, [0]),
        "C3": ({1: run_of((50, 1), (100, 2.1))}, [0]),
        "C8": ({2: run_of((50, 1), (100, 1.5))}, [2, 0]),
        "C9": ({}, [2, 2]),
    }
    monkeypatch.setattr(make_ablation, "runs_of", lambda task, ablation: known[ablation.detail][0])
    runs = {k: {"runs": [{"exit_code": x} for x in codes]} for k, (_, codes) in known.items()}
    monkeypatch.setattr(ablate, "stored", lambda task, ablation: runs[ablation.detail])


def of(detail):
    return make_ablation.compare("Toy", ablate.Ablation(detail, detail, ("Toy",)), RETURN)


def test_same_returns_are_compared_seed_by_seed(kept):
    """A difference to seeds that only the unchanged script has is none."""
    same, other = of("C12"), of("C3")
    assert (same.same, same.end[:4], same.seeds, same.wanted) == (True, (2, 2, 0, 0), 1, 2)
    assert same.seen == ([2], [2])
    assert not other.same
    assert other.end[:4] == pytest.approx((2.1, 2.5, -0.4, None), nan_ok=True)
    assert other.seen == ([2.1], [2, 3])
    assert other.gain == 1.5


def test_runs_without_any_episode_are_counted(kept):
    found = of("C8")
    assert (found.seeds, found.stopped, found.without) == (2, 1, 1)
    assert effect(found) == "unknown"
    assert of("C9") is None


def test_table_and_pictures_are_of_what_is_known(kept, tmp_path, monkeypatch):
    """Most harm first, details with nothing in no row; pictures of it can be drawn."""
    everything = [(ablate.Ablation(x, x, ("Toy",)), [of(x)]) for x in ("C3", "C12", "C8", "C9")]
    changed = {"end": Difference(1.1, 2.5, -1.4, 0.4), "sure": (True, False)}
    everything[0][1][0] = everything[0][1][0]._replace(**changed)
    lines = make_ablation.summary(everything)
    assert lines[2:4] == [
        "| [C3](#c3-c3) | C3 | Toy *-93* (-120 to -67) |",
        "| [C12](#c12-c12) | C12 | Toy the same |",
    ]
    assert lines[4] == ""
    drawn = []
    monkeypatch.setattr(make_ablation.plt, "close", drawn.append)
    for name, draw in (("a.png", make_ablation.effects), ("b.png", make_ablation.curves)):
        draw(everything, tmp_path / name)
        assert (tmp_path / name).exists()
    (effects,), (curves,) = (figure.axes[:1] for figure in drawn)
    assert [x.get_text() for x in effects.get_yticklabels()] == ["C8: C8", "C12: C12", "C3: C3"]
    interval = [line for line in effects.lines if list(line.get_ydata()) == [2, 2]]
    ends = [100 * (-1.4 + x) / 1.5 for x in (-0.4, 0.4)]
    assert [list(line.get_xdata()) for line in interval] == [pytest.approx(ends)]
    assert curves.lines[-1].get_ydata() == pytest.approx([1] * 25 + [1] * 24 + [2.5])
    assert [x.get_text() for x in curves.get_legend().get_texts()] == ["C3: C3"]
    over_all = {"end": Difference(1.1, 2.5, -1.4, 9.0), "sure": (False, True)}
    everything[0][1][0] = everything[0][1][0]._replace(**over_all)
    make_ablation.curves(everything, tmp_path / "c.png")  # its end is open, its area is not
    assert [x.get_text() for x in drawn[2].axes[0].get_legend().get_texts()] == ["C3: C3"]


def test_what_the_page_on_ppo_says_of_the_two_clips():
    """docs/ppo.md has it in words of its own."""
    parts = {x.detail: found for x, found in make_ablation.everything() if x.detail in ("C8", "C9")}
    clip = {x.task: (effect(x), direction(x.area), x.sure[1]) for x in parts["C8"]}
    assert clip.pop("Hopper")[1:] == ("lower", True)
    assert {words for words, *_ in clip.values()} <= {"open", "little", "same"}
    assert {effect(x) for x in parts["C9"]} <= {"open", "little", "higher"}


def test_every_detail_has_its_place_and_its_line():
    """With data, or with how far it came and the command that goes on."""
    table = ablate.ablations()[1:]
    for ablation in table:
        heading = make_ablation.heading(ablation)
        assert PAGE.count(f"\n{heading}\n") == 1, heading
        section = PAGE.split(f"\n{heading}\n")[1].split("\n### ")[0]
        missing = False
        for task in ablation.tasks:
            both = [make_ablation.runs_of(task, x) for x in (PLAIN, ablation)]
            assert (f"\n| {task} |" in section) == all(both)
            missing |= len(ablate.stored(task, ablation)["runs"]) < ablate.TASKS[task].seeds
        assert (f"--only {ablation.detail}` goes on" in section.replace("'", "")) == missing
    details = (ROOT / "docs" / "details.md").read_text()
    tags = {ablation.detail for ablation in table} & make_details.table().keys()
    assert {*make_details.of_the_37(make_details.table())} <= tags
    for tag in tags:
        section = details.split(f"\n## {tag} ")[1].split("\n## ")[0]
        assert section.count("\n- Worth: ") == 1
