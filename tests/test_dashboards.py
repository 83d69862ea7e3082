"""docs/dashboards.md: what W&B's own files hold, who reads them, and the programs of the page."""

import contextlib
import csv
import gzip
import importlib.metadata
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import pytest
import read_by_openrlbenchmark as reading
import tyro

import make_dashboards
import ppo_discrete
import wandb_workspace
from conftest import ROOT, metrics, train
from test_runs import ITERATION_METRICS

pytestmark = pytest.mark.xdist_group("dashboards")  # one run for all
PAGE = (ROOT / "docs" / "dashboards.md").read_text()
PROGRAMS = re.findall(r"(?ms)^```python\n(.+?)^```$", PAGE)
TENSORBOARD, MLFLOW, ONE_RUN, ALL_RUNS = PROGRAMS
RETURN = "charts/episodic_return"
CART_POLE = "gymnasium.envs.classic_control:CartPoleEnv"
gym.register("Slash/CartPole-v1", CART_POLE, max_episode_steps=30)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What W&B has of a run with videos that was resumed, and what its folder has."""
    pytest.importorskip("wandb")
    import wandb
    import wandb_file

    place = tmp_path_factory.mktemp("offline")
    with contextlib.chdir(place), pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            patch.delenv(name)
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_DIR", str(place))
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("WANDB_TAGS", "paper")
        wandb.teardown()
        changes = {"env_id": "Slash/CartPole-v1", "track": True, "wandb_entity": "team"}
        train(ppo_discrete, **changes, capture_video=True, total_timesteps=96)
        (folder,) = (path.parent for path in Path("runs").rglob("metrics.csv"))
        args = ["--resume", str(folder), "--total-timesteps", "192", "--capture-video"]
        ppo_discrete.train(ppo_discrete.parse_args(args))
        wandb.teardown()
        rows = metrics()
    api = wandb_file.Api([place])
    (found,) = api.all
    return SimpleNamespace(api=api, found=found, place=place, folder=place / folder, rows=rows)


def returns(run):
    return [value for *_, name, value in run.rows if name == RETURN]


# ------------------------------------------------------------------------------------------------
# W&B's own files


def test_an_id_with_a_slash_and_a_resumed_run_are_one_run(run):
    first, second = run.found.paths
    assert first.name == second.name == f"run-{run.found.id}.wandb"
    assert run.found.name == run.folder.relative_to(run.place / "runs").as_posix()
    assert run.found.name.startswith("Slash/CartPole-v1__ppo_discrete__1__")
    config = run.found.config
    assert (config["env_id"], config["exp_name"]) == ("Slash/CartPole-v1", "ppo_discrete")
    assert (config["total_timesteps"], run.found.state) == (192, "finished")
    assert run.found.exits == [0, 0]
    assert run.found.tags == ["paper"]


def test_what_was_resumed_goes_on_in_the_second_file(run):
    import wandb_file

    parts = [wandb_file.OfflineRun([path]) for path in run.found.paths]
    steps = [[row["global_step"] for row in part.rows] for part in parts]
    assert steps[0][-1] == 96 < steps[1][0] and steps[1][-1] == 192
    assert all(x == sorted(x) for x in steps)


def test_every_row_is_in_history_once(run):
    table = run.found.history(samples=1500, keys=["global_step", "_runtime", RETURN])
    assert table[RETURN].tolist() == returns(run)
    assert table["global_step"].tolist() == [s for s, _, name, _ in run.rows if name == RETURN]
    named = [name for row in run.found.scan_history() for name in row]
    assert {name: named.count(name) for name in ITERATION_METRICS} == dict.fromkeys(
        ITERATION_METRICS, 6
    )


def test_videos_have_a_key_each(run):
    names = {name for row in run.found.rows for name in row if name.endswith("._type")}
    names = {name.removesuffix("._type") for name in names}
    assert names == {path.stem for path in run.folder.glob("videos/*.mp4")}
    assert {"step-0-game-0", "step-0-game-1", "step-96-game-0"} <= names
    (row,) = [row for row in run.found.rows if "step-0-game-1.path" in row]
    assert row["step-0-game-1._type"] == "video-file" and 0 < row["global_step"] <= 96
    (file,) = run.place.glob(f"wandb/*/files/{row['step-0-game-1.path']}")
    assert file.read_bytes() == (run.folder / "videos" / "step-0-game-1.mp4").read_bytes()


# ------------------------------------------------------------------------------------------------
# openrlbenchmark


@pytest.mark.parametrize("value", ["", ".value"], ids=["0.3.1", "d67da55"])
def test_filters_find_the_run(run, value):
    """As the two versions of openrlbenchmark write them."""

    def found(env_id="Slash/CartPole-v1", exp_name="ppo_discrete", seeds=(1,), tag="paper"):
        filters = [{f"config.env_id{value}": env_id}, {f"config.exp_name{value}": exp_name}]
        filters += [{f"config.seed{value}": {"$in": list(seeds)}}, {"tags": {"$in": [tag]}}]
        return run.api.runs(path="team/ppo37", filters={"$and": filters})

    assert found() == found(seeds=(2, 1)) == [run.found]
    assert found("CartPole-v1") == found(exp_name="ppo") == found(seeds=(2,)) == []
    assert found(tag="other") == []
    assert run.api.runs("team/other", {}) == run.api.runs("other/ppo37", {}) == []
    either = {"$or": [{"config.seed": 2}, {f"config.seed{value}": 1}]}
    assert run.api.runs("team/ppo37", either) == [run.found]


def test_history_is_thinned_evenly(run):
    few = run.found.history(samples=3, keys=["global_step", RETURN])
    played = returns(run)
    assert few[RETURN].tolist() == [played[i * len(played) // 3] for i in range(3)]


@pytest.mark.parametrize("exits, state", [([0], "running"), ([0, 2], "failed")])
def test_state_is_that_of_the_last_file(run, exits, state):
    """A run that was resumed and killed has not ended; openrlbenchmark leaves it out."""
    import wandb_file

    other = wandb_file.OfflineRun(run.found.paths)
    other.exits = exits
    assert other.state == state


def test_openrlbenchmark_has_found_and_read_our_runs():
    """The stored result: what each filter leads to is what metrics.csv has, in both versions."""
    path = ROOT / "docs" / "results" / "openrlbenchmark.csv"
    with open(path) as file:
        rows = list(csv.DictReader(file))
    origin = json.loads(path.with_suffix(".json").read_text())
    assert len(origin["openrlbenchmark"]) == 2 and not origin["commit"].endswith("-dirty")
    asked = [(env_id, words, metric) for env_id, metric, words, _ in reading.FILTERS]
    for version in origin["openrlbenchmark"]:
        mine = [row for row in rows if row["version"] == version]
        assert [(row["env_id"], row["filter"], row["metric"]) for row in mine] == asked
    assert len(rows) == 2 * len(asked)
    for row in rows:
        assert row["found"] == row["ours_found"] and row["rows"] == row["ours_rows"], row
        assert float(row["score"]) == pytest.approx(float(row["ours_score"]), rel=1e-6), row
    assert {x for _, _, x in asked} - {RETURN, "charts/episodic_length"} <= ITERATION_METRICS


def test_commands_for_openrlbenchmark():
    """One for each environment; a filter's legend is its number."""
    first, second = reading.commands()
    assert first[:2] == ["--env-ids", "CartPole-v1"] and second[1] == "ALE/Breakout-v5"
    where = "?we=team&wpn=ppo37&ceik=env_id&cen=exp_name&metric=charts/episodic_return"
    assert first[first.index("--filters") :][:6] == [
        *("--filters", where, "ppo_discrete?cl=0", "--filters", where, "ppo_discrete?seed=2&cl=1")
    ]
    assert reading.summary([[1.0] * 50 + [3.0] * 100, [5.0]]) == (151, 4.0)


# ------------------------------------------------------------------------------------------------
# The workspace


def test_panels_name_what_a_run_writes(run):
    """Of ppo_rlhf.py one that is kept."""
    named = {name.removesuffix("._type") for row in run.found.rows for name in row}
    assert {x for part in wandb_workspace.LEARNING.values() for x in part} <= named
    assert set(wandb_workspace.VIDEOS[:2]) <= named
    path = next(iter(sorted((ROOT / "docs" / "results" / "rlhf").glob("*.csv.gz"))))
    with gzip.open(path, "rt") as file:
        named = {row["name"] for row in csv.DictReader(file)}
    assert {x for part in wandb_workspace.RLHF.values() for x in part} <= named
    assert f'"{wandb_workspace.TABLE}": table' in (ROOT / "ppo_rlhf.py").read_text()


@pytest.mark.parametrize("rlhf", [False, True])
def test_what_is_sent(rlhf, monkeypatch):
    """Saved with something in W&B's place: every panel is in what it gets."""
    pytest.importorskip("wandb_workspaces")
    import wandb

    sent = []

    def execute_graphql(query, variables):
        sent.append(variables)
        project = {"internalId": "1", "name": "ppo37"}
        view = {"id": "2", "name": "view", "displayName": "", "description": ""}
        view |= {"type": "runs", "spec": variables.get("spec", "{}"), "project": project}
        return {"project": project, "upsertView": {"view": view | {"entityName": "team"}}}

    service = SimpleNamespace(execute_graphql=execute_graphql, app_url="https://wandb.ai")
    projects = [SimpleNamespace(name="ppo37")]
    monkeypatch.setattr(
        wandb, "Api", lambda: SimpleNamespace(_service_api=service, projects=lambda _: projects)
    )
    args = wandb_workspace.Args(entity="team", rlhf=rlhf)
    wandb_workspace.workspace(args).save()
    with contextlib.suppress(ValueError):  # what it asks for afterwards is W&B's own
        wandb_workspace.report(args).save()
    specs = [json.loads(x["spec"]) for x in sent if "spec" in x]
    assert len(specs) == 2
    sections = wandb_workspace.RLHF if rlhf else wandb_workspace.LEARNING
    asked = [metric for part in sections.values() for metric in part]
    for spec in specs:
        text = json.dumps(spec)
        plots = re.findall(r'"metrics": \["([^"]+)"\]', text)
        assert plots == asked
        assert text.count('"xAxis": "global_step"') >= len(asked)
    text = json.dumps(specs[0])
    assert ('"samples"' in text) == rlhf and ('"step-0-game-8"' in text) != rlhf
    assert "exp_name" in text and "exp_name" in json.dumps(specs[1])


# ------------------------------------------------------------------------------------------------
# The page


def test_made_parts_are_up_to_date():
    ((path, text),) = make_dashboards.pages().items()
    assert path.read_text() == text, "python docs/make_dashboards.py"


def test_commands():
    """Each flag is one, of the scripts, of docs/wandb_workspace.py and of what was tried."""
    blocks = re.findall(r"(?ms)^```sh\n(.+?)^```$", PAGE)
    commands = "".join(blocks).replace("\\\n", " ").splitlines()
    parsed = {}
    for command in commands:
        words = [word for word in shlex.split(command) if not word.startswith("WANDB_")]
        if words[1] == "ppo_discrete.py":
            parsed["script"] = ppo_discrete.parse_args(words[2:])
            assert parsed["script"].track
        elif words[1] == "docs/wandb_workspace.py":
            parsed["workspace"] = tyro.cli(wandb_workspace.Args, args=words[2:])
        elif words[2:3] == ["openrlbenchmark.rlops"]:
            (tried, *_) = reading.commands()
            assert {x for x in words if x.startswith("--")} <= {*tried}
            parsed["filters"] = words[-2].replace("we=YOU", "we=team")
            assert parsed["filters"] in tried
        else:
            assert words[0] in ("wandb", "pip"), words
    assert parsed.keys() == {"script", "workspace", "filters"}


def execute(program, run):
    """In the folder that holds runs/, with the run as on the page."""
    code = [sys.executable, "-c", program, run.folder.relative_to(run.place).as_posix()]
    done = subprocess.run(code, cwd=run.place, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_pandas(run, monkeypatch, capsys):
    pytest.importorskip("pandas")
    monkeypatch.chdir(run.place)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setattr(sys, "argv", ["-c", str(run.folder)])
    exec(ONE_RUN, {})
    played = returns(run)[-100:]
    mean = sum(played) / len(played)
    assert capsys.readouterr().out == f"last 100 episodes: {mean:.1f}\n"
    assert Path("losses.png").stat().st_size > 10_000
    names = {}
    exec(ALL_RUNS, names)
    (score,) = names["scores"].itertuples(index=False)
    assert score == ("Slash/CartPole-v1", "ppo_discrete", 1, pytest.approx(mean))
    assert f"{mean:.2f}"[:4] in capsys.readouterr().out


def test_packages_of_the_page_are_named_as_they_were_tried():
    """Where they are installed: with other versions the page is to be tried again."""
    for name in ("tensorboard", "mlflow", "wandb-workspaces", "wandb"):
        versions = set(re.findall(rf"\b{name}(?: |\n|==)(\d+\.\d+\.\d+)", PAGE))
        assert len(versions) == 1, name
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            assert versions == {importlib.metadata.version(name)}


def test_tensorboard(run):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    execute(TENSORBOARD, run)
    events = EventAccumulator(str(run.folder), {"scalars": 0}).Reload()
    scalars = events.Scalars(RETURN)
    rows = [(step, t, value) for step, t, name, value in run.rows if name == RETURN]
    assert [(x.step, x.value) for x in scalars] == [(step, value) for step, _, value in rows]
    start = int(run.folder.name.rpartition("__")[2])
    assert [x.wall_time - start for x in scalars] == pytest.approx(
        [t for _, t, _ in rows], abs=1e-3
    )
    assert set(events.Tags()["scalars"]) == {name for *_, name, _ in run.rows}


@pytest.mark.slow
def test_mlflow(run, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{run.place}/mlflow.db")
    execute(MLFLOW, run)
    import mlflow

    client = mlflow.MlflowClient()
    (found,) = client.search_runs(["0"])
    assert found.info.run_name == run.found.name
    assert found.data.params["env_id"] == "Slash/CartPole-v1"
    assert found.data.params["minibatch_size"] == "16"
    logged = client.get_metric_history(found.info.run_id, RETURN)
    rows = {(step, value) for step, _, name, value in run.rows if name == RETURN}
    assert {(x.step, x.value) for x in logged} == rows
    assert set(found.data.metrics) == {name for *_, name, _ in run.rows}
