"""Do copied scripts run with other versions of Python, torch and Gymnasium? Tries it.

    python benchmarks/versions.py                          # every set of versions, hours
    python benchmarks/versions.py --only gymnasium-1.1.1   # one of them, minutes
    python benchmarks/versions.py --newest                 # the newest of all that is pinned

For each set it makes a virtual environment with the packages that requirements.txt names for the
scripts, some in other versions, copies the five scripts to an empty folder, trains each for two
iterations or more, and starts once more from its checkpoint, with environments in processes of
their own. Updates are not compiled, but for another training of ppo_discrete.py with other Pythons
and torches. The environment is removed in the end; with a torch for GPUs it takes six gigabytes
meanwhile, and nearly as much to download.

The sets spawn and forkserver start those processes as macOS and Windows do, and as Linux does from
Python 3.14 on, where Linux forks by default up to 3.13.

Packages come by uv where it is there, which is faster, and else by pip. A set needs its Python on
the PATH as python3.X; one that is not there is named and left out. Rows go to
docs/results/machines.csv in place of older ones of the same set and script.
"""

import csv
import dataclasses
import datetime
import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro
from speed import ROOT

RESULTS = ROOT / "docs" / "results" / "machines.csv"
PACKAGES = ("torch", "gymnasium", "numpy", "ale_py", "mujoco")
COLUMNS = ("set", "date", "system", "python", *PACKAGES, "script", "outcome", "said")
TIMEOUT = 1200  # seconds for one command; what compiles on a busy machine takes minutes


class Versions(NamedTuple):
    python: str
    pins: dict[str, str]  # package -> version, where it is not the one of requirements.txt
    start: str | None = None  # how processes are started; None: as this Python does


SETS = {
    "required": Versions("3.11", {}),
    "spawn": Versions("3.11", {}, "spawn"),
    "forkserver": Versions("3.11", {}, "forkserver"),
    "gymnasium-1.3.0": Versions("3.11", {"gymnasium": "1.3.0"}),
    "gymnasium-1.2.3": Versions("3.11", {"gymnasium": "1.2.3"}),
    "gymnasium-1.1.1": Versions("3.11", {"gymnasium": "1.1.1"}),
    "gymnasium-1.0.0": Versions("3.11", {"gymnasium": "1.0.0"}),
    "torch-2.14.1": Versions("3.11", {"torch": "2.14.1"}),
    "torch-2.6.0": Versions("3.11", {"torch": "2.6.0"}),
    "torch-2.5.1": Versions("3.11", {"torch": "2.5.1"}),
    "python-3.12": Versions("3.12", {}),
    "python-3.13": Versions("3.13", {}),
    "python-3.14": Versions("3.14", {}),
}
WITHOUT_COMPILER = ("gymnasium", "spawn", "forkserver")  # sets to which it makes no difference
ON = ("--resume", "{}", "--vectorization", "async", "--total-timesteps")
EAGER = ("--no-cuda", "--no-compile", "--total-timesteps")
SHORT = {  # script -> what makes its training short, and how it goes on from its checkpoint {}
    "ppo_discrete.py": ((*EAGER, "2048"), (*ON, "2560")),
    "ppo_continuous.py": ((*EAGER, "4096"), (*ON, "6144")),
    "ppo_atari.py": ((*EAGER, "2048"), (*ON, "3072")),
    "ppo_atari_lstm.py": (("--no-cuda", "--total-timesteps", "2048"), (*ON, "3072")),
    "ppo_rlhf.py": (
        (
            *("--sft-texts", "256", "--rm-pairs", "64", "--rm-test-pairs", "64"),
            *("--eval-episodes", "16", "--total-episodes", "256", "--no-cuda"),
        ),
        ("--load", "{}", "--eval-episodes", "16", "--total-episodes", "256", "--no-cuda"),
    ),
    "ppo_discrete.py --compile": (("--no-cuda", "--total-timesteps", "2048"), (*ON, "2560")),
}


@dataclasses.dataclass(frozen=True)
class Args:
    only: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()  # a set; repeatable
    newest: bool = False  # instead of the sets, the newest version of each package
    out: Path = RESULTS  # where the rows go


def pinned(text: str, pins: dict[str, str]) -> list[str]:
    """What requirements.txt names for the scripts, with the versions of a set."""
    lines = text.split("\n#")[0].splitlines()[1:]
    found = [re.fullmatch(r"([\w-]+)(\[.+\])?==(.+)", line).groups("") for line in lines]
    if unknown := pins.keys() - {name for name, _, _ in found}:
        raise ValueError(f"{unknown} is not among the packages of the scripts")
    return [f"{name}{extras}=={pins.get(name, pin)}" for name, extras, pin in found]


def unpinned(text: str) -> list[str]:
    """The same packages without their versions."""
    return [line.partition("==")[0] for line in pinned(text, {})]


def outcome(process: subprocess.CompletedProcess | None) -> tuple[str, str]:
    """runs or fails, and what was said: notices, or the line that names the error."""
    if process is None:
        return "fails", f"no end within {TIMEOUT} seconds"
    stderr = re.sub(r" \(/\S+\)", "", process.stderr)  # where a package lies on this machine
    lines = [line.strip() for line in stderr.splitlines() if re.search(r"\w", line)]
    if process.returncode == 0:
        return "runs", "; ".join(line for line in lines if line.startswith("notice:"))
    named = [line for line in lines if re.match(r"(error:|[\w.]*(Error|Exception|Exit)\b)", line)]
    return "fails", (named or lines or [f"exit code {process.returncode}"])[-1]


def run(command: list, folder: Path) -> subprocess.CompletedProcess | None:
    how = {"cwd": folder, "capture_output": True, "text": True, "timeout": TIMEOUT}
    try:
        return subprocess.run(command, check=False, **how)
    except subprocess.TimeoutExpired:
        return None


def installed(python: Path, folder: Path) -> dict[str, str]:
    """The versions that an environment has got."""
    program = (
        "import importlib.metadata as m, json, platform; print(json.dumps({'python': "
        f"platform.python_version()}} | {{x: m.version(x) for x in {PACKAGES}}}))"
    )
    return json.loads(run([python, "-c", program], folder).stdout)


def try_script(python: Path, name: str, folder: Path) -> tuple[str, str]:
    """Trains, and goes on from the checkpoint, in a folder of its own."""
    script, (train, go_on) = name.split()[0], SHORT[name]
    folder = folder / name.replace(" ", "")
    folder.mkdir()
    shutil.copy(ROOT / script, folder)
    found = outcome(run([python, script, *train], folder))
    if found[0] == "runs":
        (path,) = folder.glob("runs/*/checkpoint.pt")
        again = outcome(run([python, script, *(x.format(path) for x in go_on)], folder))
        found = found if again[0] == "runs" else ("fails", f"{go_on[0]}: {again[1]}")
    return found


def try_set(name: str, python: str, packages: list[str], start: str | None):
    """A row for each script."""
    first = {"set": name, "date": datetime.date.today().isoformat()}
    first["system"] = f"{platform.system()} {platform.machine()}"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        subprocess.run([python, "-m", "venv", folder / "venv"], check=True)
        python = folder / "venv" / "bin" / "python"
        pip = [python, "-m", "pip"]
        if shutil.which("uv"):
            pip = ["uv", "pip"]
            packages = ["--python", python, *packages]
        found = outcome(run([*pip, "install", "--quiet", *packages], folder))
        if found[0] == "fails":
            yield first | {"script": "installation", "outcome": found[0], "said": found[1]}
            return
        if start:
            (site,) = folder.glob("venv/lib/python*/site-packages")
            lines = f"import multiprocessing\nmultiprocessing.set_start_method({start!r})\n"
            (site / "sitecustomize.py").write_text(lines)
        first |= installed(python, folder)
        for script in SHORT:
            if "--compile" in script and name.startswith(WITHOUT_COMPILER):
                continue
            found = try_script(python, script, folder)
            yield first | {"script": script, "outcome": found[0], "said": found[1]}


def write(path: Path, new: dict[str, str]):
    """A row, in place of the older one of the same set and script."""
    rows = []
    if path.exists():
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
    rows = [row for row in rows if (row["set"], row["script"]) != (new["set"], new["script"])]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted([*rows, new], key=place))


def place(row: dict[str, str]) -> tuple[int, int]:
    """Rows stand in the order of SETS and scripts; the newest versions come last."""
    sets, scripts = [*SETS, row["set"]], [*SHORT, row["script"]]
    return sets.index(row["set"]), scripts.index(row["script"])


def main(args: Args) -> int:
    if unknown := [name for name in args.only if name not in SETS]:
        print(f"error: --only {unknown[0]}: it must be one of {', '.join(SETS)}", file=sys.stderr)
        return 2
    text = (ROOT / "requirements.txt").read_text()
    sets = {name: (x.python, pinned(text, x.pins), x.start) for name, x in SETS.items()}
    sets = {name: x for name, x in sets.items() if name in args.only or not args.only}
    if args.newest:
        sets = {"newest": (SETS["required"].python, unpinned(text), None)}
    failed = False
    for name, (version, packages, start) in sets.items():
        python = shutil.which(f"python{version}")
        if python is None:
            print(f"{name}: left out, no python{version} here")
            continue
        for row in try_set(name, python, packages, start):
            write(args.out, row)
            failed |= row["outcome"] != "runs"
            print(f"{name}, {row['script']}: {row['outcome']} {row['said']}".rstrip(), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__.splitlines()[0])))
