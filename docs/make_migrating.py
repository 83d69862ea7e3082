"""Makes the tables of flags in docs/migrating.md from Args, CleanRL's Args and SB3's signature.

python docs/make_migrating.py
python docs/make_migrating.py --cleanrl CLONE    reads the arguments of CleanRL anew

CleanRL's are kept in results/cleanrl_args.csv: script, name, default as its text has them.
"""

import ast
import csv
import dataclasses
import importlib
import inspect
import re
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
PAGE = DOCS / "migrating.md"
ARGUMENTS = DOCS / "results" / "cleanrl_args.csv"
SCRIPTS = {  # CleanRL's -> ours
    "ppo": "ppo_discrete",
    "ppo_continuous_action": "ppo_continuous",
    "ppo_atari": "ppo_atari",
    "ppo_atari_lstm": "ppo_atari_lstm",
}
DERIVED = ("batch_size", "minibatch_size", "num_iterations")

# What CleanRL has and we have not, or under another name.
CLEANRL = {
    "save_model": "`checkpoint.pt` is always written, with the statistics; `--evaluate` plays it",
    "upload_model": "none",
    "hf_entity": "none",
}

# SB3's arguments: ours, and what differs.
SB3 = {
    "policy": (None, "the script: `ppo_atari.py` for `CnnPolicy`; the layers are in its `Agent`"),
    "env": ("env_id", "an id, not an object; [your own](your_own.md) as `module:Env-v0`"),
    "learning_rate": ("learning_rate", "with `--anneal-lr`, a function there, it falls to 0"),
    "n_steps": ("num_steps", ""),
    "batch_size": ("num_minibatches", "their size there, their number here"),
    "n_epochs": ("update_epochs", ""),
    "gamma": ("gamma", ""),
    "gae_lambda": ("gae_lambda", ""),
    "clip_range": ("clip_coef", "with `--anneal-clip`, a function there, it falls to 0"),
    "clip_range_vf": ("clip_vloss", "None is `--no-clip-vloss`; a range of its own there"),
    "normalize_advantage": ("norm_adv", "the sample's deviation there"),
    "ent_coef": ("ent_coef", ""),
    "vf_coef": ("vf_coef", "of the whole square there, of half of it here: 0.5 there is 1 here"),
    "max_grad_norm": ("max_grad_norm", ""),
    "use_sde": (None, ""),
    "sde_sample_freq": (None, ""),
    "rollout_buffer_class": (None, ""),
    "rollout_buffer_kwargs": (None, ""),
    "target_kl": ("target_kl", "there before the step whose minibatch is above 1.5 times it; here"
                  " after an epoch whose mean is above it"),
    "stats_window_size": (None, "100, in `charts/mean_episodic_return`"),
    "tensorboard_log": (None, "[`metrics.csv`](dashboards.md#tensorboard), always written"),
    "policy_kwargs": (None, "edit `Agent`, or what it calls"),
    "verbose": (None, "a progress bar on a terminal, else lines"),
    "seed": ("seed", ""),
    "device": ("cuda", "`--no-cuda` is `cpu`"),
}  # fmt: skip


def arguments_of(source: str) -> list[tuple[str, str]]:
    """Name and default, as text, of each field of a script's class Args."""
    classes = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
    (args,) = (node for node in classes if node.name == "Args")
    fields = [node for node in args.body if isinstance(node, ast.AnnAssign)]
    return [(node.target.id, ast.unparse(node.value)) for node in fields]


def read_cleanrl(clone: Path):
    """Writes results/cleanrl_args.csv."""
    with open(ARGUMENTS, "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("script", "name", "default"))
        for script in SCRIPTS:
            source = (clone / "cleanrl" / f"{script}.py").read_text()
            writer.writerows((script, *row) for row in arguments_of(source))


def defaults_of(script: str) -> dict:
    """Of our Args, derived sizes apart."""
    args = importlib.import_module(script).Args()
    return {x.name: getattr(args, x.name) for x in dataclasses.fields(args)}


def shown(value) -> str:
    return f"{value:g}" if isinstance(value, float) else f"{value}"


def flag(name: str) -> str:
    return f"`--{name.replace('_', '-')}`"


def table(rows) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def cleanrl_flags() -> str:
    """The same names in one line, then a row for each that is not the same or begins otherwise."""
    with open(ARGUMENTS) as file:
        rows = [row for row in csv.DictReader(file) if row["name"] not in DERIVED]
    theirs = {}
    for row in rows:
        theirs.setdefault(row["name"], {})[row["script"]] = row["default"]
    ours = {script: defaults_of(name) for script, name in SCRIPTS.items()}
    same, others = [], []
    for name, defaults in theirs.items():
        if name in CLEANRL:
            assert not any(name in x for x in ours.values())
            others.append((f"`--{name.replace('_', '-')}`", "", CLEANRL[name]))
            continue
        same.append(flag(name))
        for script, text in defaults.items():
            if name != "exp_name":  # the name of the file, in both
                here, there = ours[script][name], ast.literal_eval(text)
                if here != there:
                    of = f", of `{script}.py`" if len(set(defaults.values())) > 1 else ""
                    row = (flag(name), f"`{there}`{of}", f"`{here}`")
                    others += [row] if row not in others else []
    more = {name for x in ours.values() for name in x} - theirs.keys()
    count = f"All {len(same)}" if len(same) == len(theirs) - len(CLEANRL) else "Some"
    return (
        f"{count} of these are the same here, and mean the same: {', '.join(same)}. Their defaults"
        f" are the same, too, but where the table says otherwise.\n\n"
        + table([("CleanRL", "default there", "here"), ("---",) * 3, *others])
        + f"\nOnly here: {', '.join(sorted(map(flag, more)))}.\n"
    )


def sb3_flags() -> str:
    """A row for each argument of its PPO."""
    from stable_baselines3 import PPO

    parameters = inspect.signature(PPO.__init__).parameters
    names = [name for name in parameters if name not in ("self", "_init_setup_model")]
    assert names == [*SB3], set(names) ^ set(SB3)
    scripts = ("ppo_discrete", "ppo_continuous", "ppo_atari")
    ours = [defaults_of(script) for script in scripts]
    rows = [("SB3", "here", "default there", "here: discrete, continuous, Atari", "what differs")]
    rows.append(("---",) * 5)
    for name, (own, words) in SB3.items():
        default = parameters[name].default
        there = "" if default is inspect.Parameter.empty else f"`{shown(default)}`"
        here = dict.fromkeys(shown(x[own]) for x in ours) if own else {}
        if len(here) > 1:
            here = [shown(x[own]) for x in ours]
        cells = [f"`{name}`", flag(own) if own else "none", there]
        rows.append((*cells, ", ".join(f"`{x}`" for x in here), words))
    return table(rows)


PARTS = {"cleanrl flags": cleanrl_flags, "sb3 flags": sb3_flags}


def pages() -> dict[Path, str]:
    """The page, its made parts anew."""
    text = PAGE.read_text()
    for name, part in PARTS.items():
        marks = (f"<!-- {name}, by make_migrating.py -->\n", f"<!-- end of {name} -->")
        before, _, after = re.split("|".join(map(re.escape, marks)), text)
        text = f"{before}{marks[0]}\n{part()}\n{marks[1]}{after}"
    return {PAGE: text}


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    if sys.argv[1:2] == ["--cleanrl"]:
        read_cleanrl(Path(sys.argv[2]))
    for path, text in pages().items():
        path.write_text(text)
