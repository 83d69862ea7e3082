"""CONTRIBUTING.md, CHANGELOG.md, the pages of architecture and machines, and the forge's files."""

import re
from pathlib import Path

import pytest
import versions
import yaml

import make_machines
from conftest import ROOT

PAGES = ["CONTRIBUTING.md", "CHANGELOG.md", "docs/architecture.md", "docs/machines.md"]
PAGES += ["docs/paper.md"]
TEMPLATES = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
FORMS = [path for path in TEMPLATES if path.stem != "config"]
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
KINDS = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}

each_page = pytest.mark.parametrize("name", PAGES)
each_form = pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)


def anchors(text: str) -> set[str]:
    """Of the headings of a page, as a forge makes them."""
    titles = re.findall(r"(?m)^#+ (.+)$", re.sub(r"(?ms)^```.*?^```", "", text))
    words = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
    return {*words, *re.findall(r'<a id="([^"]+)"', text)}


def links(text: str) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"(?ms)^```.*?^```", "", text))


@each_page
def test_links_lead_to_files_and_headings(name):
    path = ROOT / name
    found = [link for link in links(path.read_text()) if not link.startswith("http")]
    assert found
    for link in found:
        target, _, anchor = link.partition("#")
        other = (path.parent / target).resolve() if target else path
        assert other.exists(), link
        assert not anchor or anchor in anchors(other.read_text()), link


@each_page
def test_commands_name_programs_and_flags_that_exist(name):
    text = (ROOT / name).read_text()
    commands = re.findall(r"python ((?:tests|docs|benchmarks)/\w+\.py)([^`\n#]*)", text)
    for program, rest in commands:
        assert (ROOT / program).exists(), program
        source = (ROOT / program).read_text()
        for flag in re.findall(r"--([a-z][a-z-]+)", rest):
            assert re.search(rf'"--{flag}"|\b{flag.replace("-", "_")}: |--{flag}\b', source), flag
    for path in re.findall(r"`((?:tests|docs|benchmarks)/[\w./]+\.\w+)`", text):
        assert (ROOT / path).exists(), path


def test_contributing_names_what_shows_that_a_change_is_right():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for program in ("tests/carry.py", "tests/mutate.py", "benchmarks/regress.py"):
        assert f"python {program}" in text
    for program in ("benchmarks/identical.py", "docs/make_details.py", "benchmarks/versions.py"):
        assert f"python {program}" in text
    for path in (*ROOT.glob("tests/test_text.py"), ROOT / "docs" / "details.toml"):
        assert path.relative_to(ROOT).as_posix() in text


def test_architecture_is_one_screen_and_names_what_is_there():
    text = (ROOT / "docs" / "architecture.md").read_text()
    assert len(text.splitlines()) <= 75
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in tests


# ------------------------------------------------------------------------------------------------
# Versions


def test_newest_version_of_the_changelog_is_that_of_the_citation():
    text = (ROOT / "CHANGELOG.md").read_text()
    found = re.findall(r"(?m)^## \[([^]]+)\](?: - (\d{4}-\d\d-\d\d))?$", text)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert found[0] == ("Unreleased", "")
    assert found[1] == (citation["version"], citation["date-released"].isoformat())
    versions_ = [tuple(map(int, version.split("."))) for version, _ in found[1:]]
    assert versions_ == sorted(versions_, reverse=True)
    assert all(date for _, date in found[1:])
    assert set(re.findall(r"(?m)^### (.+)$", text)) <= KINDS
    assert len(re.findall(r"(?m)^## ", text)) == len(found)


def test_rows_of_other_versions_are_of_sets_and_scripts_that_are_there():
    for name, rows in make_machines.load().items():
        assert name in {*versions.SETS, "newest"}
        for row in rows:
            assert row["outcome"] in ("runs", "fails")
            assert row["script"] in {*versions.SHORT, "installation"}
            assert row["said"] or row["outcome"] == "runs"


def test_page_of_machines_is_up_to_date():
    assert make_machines.PAGE.read_text() == make_machines.page(), "python docs/make_machines.py"


def test_versions_of_a_set_take_the_place_of_the_required_ones():
    text = "# the scripts\ngymnasium[atari]==1.4.0\ntorch==2.13.0\n# more\npytest==9\n"
    found = versions.pinned(text, {"gymnasium": "1.1.1"})
    assert found == ["gymnasium[atari]==1.1.1", "torch==2.13.0"]
    assert versions.unpinned(text) == ["gymnasium[atari]", "torch"]
    with pytest.raises(ValueError, match="pytest"):
        versions.pinned(text, {"pytest": "8"})
    required = versions.pinned((ROOT / "requirements.txt").read_text(), {})
    assert {line.partition("==")[0] for line in required} > {"torch", "numpy", "tyro", "wandb"}
    for versions_ in versions.SETS.values():
        versions.pinned((ROOT / "requirements.txt").read_text(), versions_.pins)


def test_of_a_process_the_error_is_said(tmp_path):
    def end(program):
        return versions.outcome(versions.run([versions.sys.executable, "-c", program], tmp_path))

    assert end("import sys; print('notice: slower', file=sys.stderr)") == ("runs", "notice: slower")
    assert end("import nothing_of_this_name") == (
        "fails",
        "ModuleNotFoundError: No module named 'nothing_of_this_name'",
    )
    said = "ImportError: cannot import name 'nothing' from 'json'"
    assert end("from json import nothing") == ("fails", said)  # without the path
    assert end("raise SystemExit('error: no')") == ("fails", "error: no")
    assert end("import os; os._exit(3)") == ("fails", "exit code 3")


def test_a_row_takes_the_place_of_its_older_one(tmp_path):
    path, columns = tmp_path / "rows.csv", dict.fromkeys(versions.COLUMNS, "")
    new = columns | {"set": "spawn", "script": "ppo_rlhf.py", "outcome": "fails"}
    for row in (new, new | {"set": "required"}, new | {"outcome": "runs"}):
        versions.write(path, row)
    with open(path, newline="") as file:
        rows = [*versions.csv.DictReader(file)]
    assert [(row["set"], row["outcome"]) for row in rows] == [
        ("required", "fails"),
        ("spawn", "runs"),
    ]


# ------------------------------------------------------------------------------------------------
# The forge


def steps(job: str) -> list[dict]:
    return WORKFLOW["jobs"][job]["steps"]


def test_workflow_runs_what_ci_runs():
    assert {"run": "bash .ci/run"} in steps("test")
    (python,) = [x for x in steps("test") if x.get("uses", "").startswith("actions/setup-python@")]
    assert python["with"]["python-version"] == "3.11"
    triggers = WORKFLOW[True]  # YAML 1.1 takes `on` for true
    assert triggers["push"] == {"branches": ["main"]} and "pull_request" in triggers


def test_workflow_publishes_the_site_of_main_after_the_tests():
    job = WORKFLOW["jobs"]["site"]
    assert job["needs"] == "test" and job["if"] == "github.ref == 'refs/heads/main'"
    assert job["permissions"] == {"pages": "write", "id-token": "write", "contents": "read"}
    commands = [x["run"] for x in job["steps"] if "run" in x]
    uses = [x["uses"].partition("@")[0] for x in job["steps"] if "uses" in x]
    assert uses[0] == "actions/checkout"
    assert uses[-2:] == ["actions/upload-pages-artifact", "actions/deploy-pages"]
    assert commands[0] == "pip install -r docs/requirements.txt" and "--strict" in commands[1]
    (upload,) = [x for x in job["steps"] if "upload-pages" in x.get("uses", "")]
    assert upload["with"] == {"path": "site"}
    (deploy,) = [x for x in job["steps"] if "deploy-pages" in x.get("uses", "")]
    assert f"steps.{deploy['id']}.outputs.page_url" in job["environment"]["url"]
    readme = (ROOT / "README.md").read_text()
    assert commands[1] in readme


@each_form
def test_forms_ask_for_the_configuration_of_the_run(path):
    form = yaml.safe_load(path.read_text())
    assert {"name", "description", "body"} <= set(form) <= {"name", "description", "body", "labels"}
    fields = [x for x in form["body"] if x["type"] != "markdown"]
    assert {x["type"] for x in form["body"]} <= {"markdown", "textarea", "input"}
    assert len({x["id"] for x in fields}) == len(fields)
    assert all(x["attributes"]["label"] for x in fields)
    (config,) = [x for x in fields if x["id"] == "config"]
    assert config["attributes"]["label"] == "config.json"
    assert config["attributes"]["render"] == "json"
    for document in re.findall(r"docs/\w+\.md", path.read_text()):
        assert (ROOT / document).exists()


def test_every_file_of_the_forge_is_yaml():
    assert len(FORMS) >= 3
    for path in Path(ROOT / ".github").rglob("*.y*ml"):
        assert isinstance(yaml.safe_load(path.read_text()), dict)
