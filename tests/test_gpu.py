"""The program for a GPU machine, rehearsed on the CPU: its parts, their numbers, what fails."""

import csv
import subprocess
import sys

import gpu
import pytest
from gpu import ATARI, CARTPOLE, CHEETAH, SCRIPTS, WORDS, Args

import make_performance
from conftest import ROOT

RIGHT = {"on_gpu": 0, "checkpoint_on_cpu": 1, "first_losses_off_cpu": 0}
RIGHT |= {"same_seed_weights_apart": 0, "no_synchronization": 0}  # not shown without a GPU


def rows(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def numbers(path, script, case):
    """metric -> value of one case"""
    found = [row for row in rows(path) if (row["script"], row["case"]) == (script, case)]
    return {row["metric"]: float(row["value"]) for row in found}


def program(out, *flags, timeout):
    """The command line on the CPU. -> exit status, last line, all lines"""
    command = [sys.executable, ROOT / "benchmarks" / "gpu.py", "--device", "cpu", "--quick"]
    command += ["--out", out, *flags]
    result = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=timeout, check=False
    )
    return result.returncode, result.stdout.strip().splitlines()[-1], result.stdout


@pytest.fixture(autouse=True)
def compiling(monkeypatch):
    """Here, and in the processes of the program, torch.compile compiles."""
    monkeypatch.delenv("TORCHDYNAMO_DISABLE")


@pytest.mark.slow
def test_rehearsal(tmp_path):
    """The first call on one script, but for the ranks."""
    parts = ("facts", "right", "variants")
    flags = ("--call", "a", "--scripts", CARTPOLE, "--parts", *parts)
    status = program(tmp_path, *flags, timeout=600)
    assert status[:2] == (0, "0 parts failed"), status
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.csv" for name in parts}
    facts = {row["metric"]: row["value"] for row in rows(tmp_path / "facts.csv")}
    assert {"cpu", "cpus", "memory", "versions", "commit"} <= facts.keys()
    right = numbers(tmp_path / "right.csv", CARTPOLE, "fp32")
    assert {name: right[name] for name in RIGHT} == RIGHT
    assert abs(right["first_approx_kl"]) < 1e-6 and right["first_clipfrac"] == 0
    assert 0 < right["compiled_weights_apart"] < 1e-5
    assert right["unique_graphs"] == 1
    page = "\n".join(make_performance.gpu_section(tmp_path))
    assert f"| {CARTPOLE} | fp32 | 0 |" in page
    assert f"cpus {facts['cpus']}; " in page


@pytest.mark.slow
def test_whole_rehearsal(tmp_path):
    """Every part on every script, and the named numbers of each."""
    status = program(tmp_path, "--seconds", "3600", timeout=3700)
    assert status[:2] == (0, "0 parts failed"), status
    assert {path.stem for path in tmp_path.iterdir()} == gpu.PARTS.keys()
    for script in SCRIPTS:
        right = numbers(tmp_path / "right.csv", script, "fp32")
        assert {name: right[name] for name in RIGHT} == RIGHT
    for case in ("eager", "compiled", "reduce-overhead", "captured"):
        found = numbers(tmp_path / "variants.csv", CHEETAH, f"1 {case}")
        assert found["steps_per_second"] > 0
        assert found["shown"] == (case in ("eager", "compiled"))  # no graphs without a GPU
        assert {"environments_ms", "acting_ms", "evaluation_ms", "update_ms"} <= found.keys()
    assert numbers(tmp_path / "variants.csv", ATARI, "8")["floor_steps_per_second"] > 0
    for script in (CARTPOLE, CHEETAH, ATARI):
        one, two = (
            numbers(tmp_path / "ranks.csv", script, x) for x in ("1 rank, NCCL", "2 ranks, gloo")
        )
        assert one["weights_apart_from_python"] == 0 < two["weights_apart_from_python"]
    for case in ("4 compiled", "4 no-cuda", "128 compiled"):
        assert numbers(tmp_path / "fast.csv", CARTPOLE, case)["steps_per_second"] > 0
    learned = {(row["case"], row["metric"]) for row in rows(tmp_path / "learn.csv")}
    assert ("CartPole-v1", "mean_return") in learned
    assert ("PongNoFrameskip-v4", "steps_per_second") in learned
    words = numbers(tmp_path / "words.csv", WORDS, "fp32")
    shares = [words[f"share_{name}"] for name in ("gen", "score", "train")]
    assert sum(shares) == pytest.approx(1, abs=1e-4)
    assert words["hours_per_million_episodes"] == pytest.approx(
        words["seconds_per_update"] / 16 * 1e6 / 3600, rel=1e-4
    )
    assert "gold" in numbers(tmp_path / "words.csv", WORDS, "default")
    assert numbers(tmp_path / "words.csv", WORDS, "bf16")["seconds_per_update"] > 0
    full, lora = (numbers(tmp_path / "words.csv", WORDS, x) for x in ("SmolLM2", "SmolLM2, LoRA"))
    assert 0 < lora["planned_gpu_mb"] < full["planned_gpu_mb"] < 100
    assert full["seconds_per_update"] > 0


@pytest.mark.slow
def test_what_fails_is_in_its_table_and_counted(tmp_path):
    """A script that is missing: the parts that need it fail, the others go on."""
    status = program(tmp_path, "--call", "a", "--scripts", "ppo_none.py", timeout=300)
    assert status[:2] == (1, "1 parts failed"), status
    (failed,) = [row for row in rows(tmp_path / "right.csv") if row["metric"] == "failed"][:1]
    assert (failed["script"], failed["case"]) == ("ppo_none.py", "fp32, eager")
    assert "Traceback" in failed["value"] and "FileNotFoundError" in failed["value"]
    assert all(row["metric"] != "failed" for row in rows(tmp_path / "facts.csv"))


def test_a_part_that_raises_does_not_stop_the_next(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(gpu.PARTS, "facts", lambda part: part.row("a", "b", "c", 1) or 1 / 0)
    monkeypatch.setitem(gpu.PARTS, "right", lambda part: part.rows("d", "e", {"f": 2.5}))
    assert gpu.main(Args(out=tmp_path, device="cpu", parts=("facts", "right"))) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "1 parts failed"
    first, second = rows(tmp_path / "facts.csv")
    assert (first["script"], first["value"]) == ("a", "1")
    assert second["metric"] == "failed" and "ZeroDivisionError" in second["value"]
    assert [row["value"] for row in rows(tmp_path / "right.csv")] == ["2.5"]


def test_when_the_time_is_over_every_table_is_there(tmp_path):
    """Nothing hangs, nothing is left running."""
    out = tmp_path / "made" / "by it"
    status = program(out, "--seconds", "0", "--scripts", CHEETAH, WORDS, timeout=120)
    assert status[:2] == (3, "3 parts failed"), status
    assert {path.stem for path in out.iterdir()} == gpu.PARTS.keys()
    assert len(gpu.PARTS) <= 8
    for name in ("right", "learn", "words"):
        assert any(row["metric"] == "failed" for row in rows(out / f"{name}.csv"))
    for name in ("ranks", "variants", "fast"):
        found = [row for row in rows(out / f"{name}.csv") if row["script"] == CHEETAH]
        assert {row["metric"] for row in found} == {"left_out"}


FLAGS = ["--num-envs", "2", "--num-steps", "16", "--total-timesteps", "96", "--no-cuda"]
FLAGS += ["--num-minibatches", "2", "--torch-threads", "1"]


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["captured", "reduce-overhead"])
def test_a_variant_learns_what_the_script_learns(variant):
    """Of a captured graph only that its copies of the batch are right shows without a GPU."""
    eager = gpu.train(CARTPOLE, FLAGS, "eager")
    other = gpu.train(CARTPOLE, FLAGS, variant)
    assert gpu.weights_apart(eager, other) < 1e-6
    assert eager["losses"].keys() == other["losses"].keys()
    assert gpu.losses_apart(eager, other) < 1e-6
    assert eager["update_ms"] > 0


@pytest.mark.parametrize("script", SCRIPTS)
def test_replaced_lines_are_in_the_scripts(script):
    """Each once; what compiles is not in all of them."""
    text = (ROOT / script).read_text()
    replaced = [*gpu.NO_SYNCS]
    if script in (CARTPOLE, CHEETAH, ATARI):
        replaced += [x for lines in gpu.VARIANTS.values() for x in lines] + gpu.GLOO
    for old, _ in replaced:
        assert text.count(old) == 1, old


def test_synchronizations_are_forbidden_around_the_minibatches_only(tmp_path, monkeypatch):
    """From the first minibatch of an update to what is logged."""
    modes, load = [], gpu.load

    def loaded(path, clock):
        module = load(path, clock)
        gradient, episodes = module.ppo_gradient, module.Run.end_iteration
        module.ppo_gradient = lambda *args: modes.append("gradient") or gradient(*args)
        module.Run.end_iteration = lambda *args: modes.append("log") or episodes(*args)
        return module

    class Str(str):
        def __new__(cls, mode):
            modes.append(mode)
            return mode

    monkeypatch.setattr(gpu, "load", loaded)
    monkeypatch.setattr(gpu, "str", Str, raising=False)
    gpu.train(CARTPOLE, [*FLAGS, "--update-epochs", "1"], "eager", strict=True)
    assert modes == ["error", "gradient", "error", "gradient", "default", "log"] * 3


def test_losses_and_statistics_are_those_of_the_first_iteration_and_minibatch():
    three = gpu.train(CARTPOLE, FLAGS, "eager", first=True)
    one = gpu.train(CARTPOLE, [*FLAGS, "--total-timesteps", "32"], "eager")
    assert three["losses"] == one["losses"]
    assert three["losses"]["losses/value_loss"] > 0
    assert three["weights"] != one["weights"]
    assert abs(three["minibatch"]["approx_kl"]) < 1e-6
    assert one["minibatch"] == {}
