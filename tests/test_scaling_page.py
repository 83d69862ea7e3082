"""docs/scaling.md: its tables are those of the files, and what it claims of them holds."""

import re

import ranks

from conftest import ROOT

PAGE = (ROOT / "docs" / "scaling.md").read_text()
RESULTS = ROOT / "docs" / "results"


def test_tables_are_those_of_the_files():
    for table in ranks.tables(RESULTS).split("\n\n"):
        assert table in PAGE


def test_curves_of_one_and_two_ranks_are_within_noise():
    """Five seeds each: the difference at the end is less than two of its standard errors."""
    for line in ranks.curves_table(ranks.read(RESULTS / "ranks_curves.csv"))[2:]:
        difference, error = re.search(r"([+-][\d,.]+) \+- ([\d,.]+) \|$", line).groups()
        difference, error = (float(x.replace(",", "")) for x in (difference, error))
        assert abs(difference) <= 2 * error, line


def test_every_run_of_the_curves_is_there():
    rows = ranks.read(RESULTS / "ranks_curves.csv")
    runs = {(row["env_id"], row["ranks"], row["seed"]) for row in rows}
    assert len(runs) == 2 * 2 * 5 and len(rows) == 50 * len(runs)
