"""docs/ppo.md: its numbers come from the real functions, its runs are kept, its links are right."""

import re
import shlex

import numpy as np
import pytest
import torch

import make_ppo
import ppo_continuous
import ppo_discrete
from conftest import ROOT

TEXT = make_ppo.PAGE.read_text()
FACTS, ROWS = make_ppo.load()


def part(name):
    return re.search(rf"<!-- {name}, by make_ppo.py -->\n(.*?)<!-- end -->", TEXT, re.S)[1]


def rows(name):
    """The cells of a table of the page, without its header."""
    lines = [line for line in part(name).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_page_and_pictures_are_up_to_date():
    for path, text in make_ppo.pages().items():
        assert path.read_text() == text, path.name


def test_clip_table_is_what_ppo_loss_gives():
    """Each row of the page once more, with an agent of our own whose ratio follows from weights."""
    table = rows("clip")
    assert len(table) == 6
    signs = {(cells[0].split(":")[0], cells[1]) for cells in table}
    assert len(signs) == 6
    for cells in table:
        ratio, advantage = float(cells[0].split(":")[1]), float(cells[1])
        logits = torch.tensor([np.log(ratio * 0.5), np.log(1 - ratio * 0.5)], requires_grad=True)
        policy = torch.distributions.Categorical(logits=logits[None])
        minibatch = [None, torch.tensor([0]), torch.tensor([np.log(0.5)]), torch.zeros(1)]
        minibatch += [torch.tensor([advantage]), torch.zeros(1)]
        coefficients = (torch.tensor(0.2), torch.tensor(0.0), None, 0.0, False, False)
        loss, stats = ppo_discrete.ppo_loss(
            lambda obs, policy=policy: (policy, torch.zeros(1)), minibatch, *coefficients
        )
        loss.backward()
        of_ratio = ratio * (1 - 0.5 * ratio)  # d ratio / d logit of the action
        assert float(cells[2]) == pytest.approx(-loss.item(), abs=1e-5)
        assert float(cells[3]) == pytest.approx(-logits.grad[0].item() / of_ratio, abs=1e-5)
        assert float(cells[4]) == stats["clipfrac"].item()
    assert [float(cells[3]) for cells in table] == [1, 1, 0, 0, -1, -1]


def test_curves_of_the_picture_are_the_clipped_objective():
    for advantage, (ratios, objective) in make_ppo.clip_curves().items():
        clipped = np.clip(ratios, 0.8, 1.2)
        expected = np.minimum(ratios * advantage, clipped * advantage)
        assert np.allclose(objective, expected, atol=1e-6)


def test_gae_table_has_both_ends():
    """lambda 0 is the error of one step, lambda 1 the return less the value, by hand."""
    assert part("gae").strip() == make_ppo.gae_table().strip()  # by calls of gae
    cells = np.array([[float(x) for x in row[1:]] for row in rows("gae")])
    for table, last in ((cells[:4], 0.0), (cells[4:], 8.0)):
        deltas = np.array([0.2, 0.2, 0.2, 1 + 0.9 * last - 8])
        assert np.allclose(table[:, 1], deltas, atol=0.005)
        discounts = 0.9 ** np.arange(5)
        returns = [discounts[: 4 - t].sum() + discounts[4 - t] * last for t in range(4)]
        assert np.allclose(table[:, 3], np.array(returns) - 8, atol=0.005)
        assert (table[:, 3] == table[:, 4]).all()
        weights = 0.855 ** np.arange(4)
        expected = [(weights[: 4 - t] * deltas[t:]).sum() for t in range(4)]
        assert np.allclose(table[:, 2], expected, atol=0.005)
    assert [row[0] for row in rows("gae")] == ["dies"] * 4 + ["is cut off"] * 4


def test_links_lead_to_the_lines_with_their_words():
    links = re.findall(r"\[`([^`\n]+)`\]\(\.\./(ppo_\w+\.py)#L(\d+)\)", TEXT)
    assert len(links) >= 15
    assert len(links) == len(re.findall(r"\.py#L", TEXT))
    for words, script, number in links:
        line = (ROOT / script).read_text().splitlines()[int(number) - 1]
        assert words in line


def test_links_to_words_that_are_not_there_or_twice_are_refused():
    assert make_ppo.line_of("ppo_discrete.py", "gae") > 1
    for words in ("no such words", "import"):
        with pytest.raises(ValueError):
            make_ppo.line_of("ppo_discrete.py", words)


@pytest.mark.parametrize("case", make_ppo.CASES, ids=lambda case: case.title)
def test_failure_has_its_runs(case):
    """Its command parses, differs from that beside it, and both are kept with all seeds."""
    assert f"\n{make_ppo.command(case, 1)}\n" in part("commands")
    for seed in make_ppo.SEEDS:
        lines = [make_ppo.command(case, seed, provoked) for provoked in (True, False)]
        provoked, other = map(make_ppo.args_of, lines)
        assert provoked != other and provoked.seed == other.seed == seed
        assert provoked.total_timesteps == other.total_timesteps
        for line, args in zip(lines, (provoked, other), strict=True):
            ppo_discrete.check_args(args)
            assert re.fullmatch("[0-9a-f]{40}", FACTS[line]["git_commit"])
            steps = ROWS[line]["global_step"]
            assert len(steps) == args.num_iterations
            assert steps[-1] == args.num_iterations * args.batch_size


def test_no_run_is_kept_that_no_command_makes():
    assert list(FACTS) == make_ppo.commands() and ROWS.keys() == FACTS.keys()


@pytest.mark.parametrize("case", make_ppo.CASES, ids=lambda case: case.title)
def test_failures_are_failures(case):
    """On average the return is below that of the runs beside it; the metric shows it each time."""
    runs = [[ROWS[make_ppo.command(case, x, how)] for x in make_ppo.SEEDS] for how in (True, False)]
    there, beside = (np.array([x["return"][-1] for x in group]) for group in runs)
    assert there.mean() < beside.mean()
    signs = [[make_ppo.looked_at(x[case.metric], case.when) for x in group] for group in runs]
    assert max(signs[0]) < min(signs[1]) or min(signs[0]) > max(signs[1])


def test_seeds_that_fail_and_the_one_that_does_not():
    """As the page says of numbers 1 and 3."""
    for number, low in ((0, 20), (2, -400)):
        lines = [make_ppo.command(make_ppo.CASES[number], seed) for seed in make_ppo.SEEDS]
        assert [ROWS[line]["return"][-1] < low for line in lines] == [True, True, False]


def test_norm_of_the_gradient_that_hides_the_policy():
    """As the page says of number 7: about 30, and the other run has the same."""
    for provoked in (True, False):
        runs = [ROWS[make_ppo.command(make_ppo.CASES[-1], x, provoked)] for x in make_ppo.SEEDS]
        assert 25 < np.mean([x["grad_norm"][-10:].mean() for x in runs]) < 35


def test_k3_is_never_negative_and_k1_often():
    for line in {make_ppo.command(case, 1, False) for case in make_ppo.CASES if not case.other}:
        assert (ROWS[line]["old_approx_kl"] < 0).any()
        assert (ROWS[line]["approx_kl"] > -1e-6).all()


def test_one_sample_has_no_advantage():
    """As the page says of minibatches: over one number, normalized advantages are all 0."""
    one = torch.ones(1)
    policy = torch.distributions.Categorical(logits=torch.zeros(1, 2))
    minibatch = [None, torch.zeros(1), np.log(0.5) * one, one, 5 * one, one]
    zero = torch.tensor(0.0)
    how = (torch.tensor(0.2), zero, None, 0.0, True, False)
    loss, _ = ppo_discrete.ppo_loss(lambda obs: (policy, one), minibatch, *how)
    assert loss == 0


def test_default_values():
    for name, *values in rows("defaults"):
        field = name.strip("`")
        for args, value in zip((ppo_discrete.Args(), ppo_continuous.Args()), values, strict=False):
            assert str(value) in (f"{getattr(args, field) or 0:g}", "none")
            assert (value == "none") == (getattr(args, field) is None)


def test_not_a_number_ends_the_run_as_the_page_says(capsys):
    (line,) = re.findall(r"(?m)^`(python ppo_discrete.py --learning-rate \S+)`", TEXT)
    flags = [*shlex.split(line)[2:], "--no-compile", "--no-cuda"]
    with pytest.raises(SystemExit) as end:
        ppo_discrete.train(ppo_discrete.parse_args(flags))
    assert end.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] in TEXT


def test_sections_can_be_linked_to():
    """What people look for has a heading, and every link within the page leads to one."""
    headings = re.findall(r"(?m)^#+ (.+)$", TEXT)
    anchors = {re.sub(r"[^\w\- ]", "", x.lower()).replace(" ", "-") for x in headings}
    assert {"what-the-clip-is-for", "why-is-my-kl-negative", "when-it-goes-wrong"} <= anchors
    assert set(re.findall(r"\]\(#([^)]+)\)", TEXT)) <= anchors
