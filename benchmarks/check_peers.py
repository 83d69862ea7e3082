"""What other implementations say to docs/vectors/: their own code, run on the inputs of each file.

    python benchmarks/check_peers.py --cleanrl PATH --trl PYTHON

Stable-Baselines3 as installed; CleanRL, a clone of github.com/vwxyzjn/cleanrl, whose formulas are
taken out of its scripts at run time; TRL by the Python of an environment with pip install
torch==2.13.0 trl==1.9.0. What a vector takes as other arguments is translated as
docs/check_your_own.md says.

Writes peers.csv, a row for each output of a vector, and peers.json, where it comes from:

deviation  the largest one, divided by the largest number that is right (of texts: the share of
           wrong ones); inf where the shape is another one
verdict    same: the deviation is no more than the vector's tolerance; else differs
how        what is done in another way, separated by commas
alone      the deviation by each of these, the others undone
rest       the deviation that is left once all of them are undone
"""

import csv
import dataclasses
import datetime
import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
import tyro
from speed import ROOT, commit_of, machine, results_folder, without_paths

sys.path[:0] = [str(ROOT), str(ROOT / "docs")]
VECTORS = ROOT / "docs" / "vectors"


@dataclasses.dataclass(frozen=True)
class Args:
    cleanrl: Path | None = None  # a clone of github.com/vwxyzjn/cleanrl
    trl: Path | None = None  # the Python of an environment with TRL
    out: Path = ROOT / "docs" / "results"  # folder of the results


def deviation(result, expected) -> float:
    """The largest one, divided by the largest number expected."""
    expected = np.asarray(expected)
    result = np.asarray(result)
    if result.shape != expected.shape:
        return np.inf
    if expected.dtype.kind == "U":
        return float((result != expected).mean())
    largest = np.abs(result - expected.astype(float)).max(initial=0)
    return float(largest / np.abs(expected).max(initial=0)) if largest else 0.0


def plain(x):
    """Tensors as arrays, also within lists."""
    if isinstance(x, list | tuple):
        return [plain(value) for value in x]
    return x.detach().numpy() if isinstance(x, torch.Tensor) else x


def rows_of(peer: str, version: str, name: str, function) -> list[dict]:
    """What a function says to the vector `name`; of what it does not say there is no row."""
    vector, rows = json.loads((VECTORS / f"{name}.json").read_text()), []
    outputs, undone = function(**vector["inputs"])
    for output, expected in vector["outputs"].items():
        if output not in outputs:
            continue
        found = deviation(plain(outputs[output]), expected)
        right = found <= vector["tolerance"]
        row = {"peer": peer, "version": version, "vector": name, "output": output}
        row |= {"verdict": "same" if right else "differs", "deviation": f"{found:.3g}"}
        row |= {"tolerance": vector["tolerance"], "how": "", "alone": "", "rest": ""}
        if not right:
            lefts = {frozenset(): found}
            for how, other in undone.items():
                if output in other:
                    left = deviation(plain(other[output]), expected)
                    lefts[frozenset(how.split(", "))] = left
            row |= explained(lefts, vector["tolerance"])
        rows.append(row)
    return rows


def explained(lefts: dict[frozenset, float], tolerance: float) -> dict[str, str]:
    """How, alone and rest, from the deviations that are left when some causes are undone.

    The fewest causes that are enough, or those that leave least.
    """

    def order(causes):
        return lefts[causes] > tolerance, len(causes), lefts[causes]

    best = min((causes for causes in lefts if causes), key=order, default=frozenset())
    if not best:
        return {}
    names = sorted(best)
    alone = [lefts.get(best - {name}, np.nan) for name in names]
    alone = ", ".join(f"{x:.3g}" for x in alone)
    return {"how": ", ".join(names), "alone": alone, "rest": f"{lefts[best]:.3g}"}


def trl_functions(python: Path):
    """Its version, and the functions; they are asked for once, in a process of theirs."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "answers.json"
        command = [str(python), str(ROOT / "benchmarks" / "peer_trl.py"), str(VECTORS), str(path)]
        subprocess.run(command, check=True, cwd=folder)
        answers = json.loads(path.read_text())
    version = answers.pop("version")
    return version, {name: lambda _=x, **inputs: _ for name, x in answers.items()}


def peers(args: Args):
    """(name, version, {vector: function}) of those that are there, one after the other."""
    try:
        import peer_sb3

        yield "SB3", peer_sb3.VERSION, peer_sb3.FUNCTIONS
    except ModuleNotFoundError as error:
        print(f"skipped: Stable-Baselines3, {error}")
    if args.cleanrl:
        import peer_cleanrl

        yield "CleanRL", commit_of(args.cleanrl), peer_cleanrl.answers(args.cleanrl)
    else:
        print("skipped: CleanRL, without --cleanrl PATH")
    if args.trl:
        yield "TRL", *trl_functions(args.trl)
    else:
        print("skipped: TRL, without --trl PYTHON")


def main(args: Args):
    folder, rows, versions = results_folder(args.out), [], {}
    commit = commit_of(ROOT)
    torch.set_num_threads(1)
    for peer, version, functions in peers(args):
        versions[peer] = version
        for path in sorted(VECTORS.glob("*.json")):
            if path.stem in functions:
                torch.manual_seed(0)  # for the last digits
                np.random.seed(0)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # small batches
                    found = rows_of(peer, version, path.stem, functions[path.stem])
                for row in found:
                    print(*(x for name, x in row.items() if name != "version" and x != ""))
                rows += found
    if not rows:
        sys.exit("no peer is there")
    with open(folder / "peers.csv", "w") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    origin = {"command": without_paths(sys.argv), "date": datetime.date.today().isoformat()}
    origin |= machine() | {"peers": versions, "commit": commit}
    (folder / "peers.json").write_text(json.dumps(origin, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.splitlines()[0]))
