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
import sys
import textwrap
from pathlib import Path

import numpy as np

from make import with_parts

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
RESULTS = DOCS / "results"
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


def wrapped(text: str) -> str:
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False) + "\n"


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
    words = (
        f"{count} of these are the same here, and mean the same: {', '.join(same)}. Their defaults"
        " are the same, too, but where the table says otherwise."
    )
    rows = table([("CleanRL", "default there", "here"), ("---",) * 3, *others])
    only = wrapped(f"Only here: {', '.join(sorted(map(flag, more)))}.")
    return f"{wrapped(words)}\n{rows}\n{only}"


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


def read(name: str) -> list[dict[str, str]]:
    with open(RESULTS / f"{name}.csv") as file:
        return list(csv.DictReader(file))


def off(peer: str, cause: str, vector: str, output: str) -> str:
    """By how much of the largest number an output of a peer is off, by one cause alone."""
    (row,) = [
        x for x in read("peers") if (x["peer"], x["vector"], x["output"]) == (peer, vector, output)
    ]
    alone = dict(zip(row["how"].split(", "), row["alone"].split(", "), strict=True))
    return f"{100 * float(alone[cause]):.3g} %"


def games(name: str) -> str:
    """Mean of the games of an evaluation, and its standard error."""
    x = np.array([float(row["episodic_return"]) for row in read(f"evaluation/{name}")])
    return f"{x.mean():,.1f} +- {x.std() / len(x) ** 0.5:.1f}"


def last_beside_mean(loss: str) -> float:
    """What the last minibatch says, over what all of them say, over the iterations of a run."""
    rows = [row for row in read("last_minibatch") if row["loss"] == loss]
    return sum(float(x["last"]) for x in rows) / sum(float(x["mean"]) for x in rows)


def cleanrl_differences() -> str:
    """What differs, by how much, and what makes ours do as CleanRL does."""
    whole = [x for x in read("peers") if (x["peer"], x["vector"]) == ("CleanRL", "iteration")]
    rest = max(float(row["rest"]) for row in whole if row["rest"])
    stacks = ("atari_breakout", "sha256_of_every_tenth")
    eight = off("CleanRL", "sample deviation", "advantage_normalization", "normalized_advantages")
    rows = [
        ("what differs", "by how much", "to do as CleanRL does"),
        ("---",) * 3,
        (
            "A time limit is an end there. Here V of the last observation is added",
            f"{off('CleanRL', 'time limit', 'gae', 'advantages')} of the advantages in"
            " [gae.json](vectors/gae.json); Pendulum-v1 is learned or not learned by it:"
            " [with and without](results.md#time-limits)",
            "`--no-bootstrap-truncation`",
        ),
        (
            "Advantages are divided by the sample's deviation there, the population's"
            " [here](details.md#c7)",
            f"{eight} in a minibatch of 8, {100 * (1 - (127 / 128) ** 0.5):.2g} % in one of 128",
            "none; `std(correction=0)` in `ppo_loss` is the place",
        ),
        (
            "Continuous: the last observation of an episode counts in the statistics there",
            f"{off('CleanRL', 'last observations', 'normalization', 'normalized_obs')} of the"
            " observations in [normalization.json](vectors/normalization.json), whose episodes"
            " are short",
            "none",
        ),
        (
            "Continuous, several environments: each has statistics of its own there",
            off("CleanRL", "statistics", "normalization", "normalized_obs") + " in the same file",
            "`--num-envs 1`, the default in both",
        ),
        (
            "Continuous: the sum that rewards are divided by starts with an episode's last reward"
            " there, and runs on across a time limit",
            off("CleanRL", "returns", "normalization", "normalized_rewards") + " of the rewards",
            "none",
        ),
        (
            "Atari: pictures are made small before they are made grey there, which rounds some"
            " pixels otherwise; the stack of a new episode is four times its first picture there,"
            " zeros and that picture here",
            f"{off('CleanRL', 'small in colour', *stacks)} of the stacks of a game of Breakout are"
            f" others by the first, {off('CleanRL', 'first frame', *stacks)} by the second; rewards"
            " and ends are equal",
            "none",
        ),
        (
            "Atari: the convolutions multiply in bf16 here where the processor can",
            "[Pong in both](results.md#atari)",
            "`--precision fp32`",
        ),
        (
            "Environment i of seed s gets seed s + i there, so of four environments seeds 1 and 2"
            " share three; here all are different",
            "one seed says nothing: lowest and mean in [results](results.md)",
            "none; compare several seeds",
        ),
        (
            "`HalfCheetah-v4` there, `-v5` here, and so on",
            "another environment",
            "`--env-id HalfCheetah-v4`",
        ),
        (
            "Losses and KL are those of the last minibatch there, means of all of an iteration"
            " here; `clipfrac` is a mean in both",
            f"`approx_kl` there is {last_beside_mean('approx_kl'):.1f} times ours,"
            f" `value_loss` {last_beside_mean('value_loss'):.2f} times, in"
            " [one run](results/last_minibatch.csv) of CartPole",
            "none",
        ),
        (
            "`--target-kl` looks at the last minibatch of an epoch there, at the epoch's mean here",
            "as above: the last one is further away",
            "a larger number",
        ),
        (
            "A saved continuous policy is played with new statistics there",
            f"{games('fresh_statistics')} in place of {games('sampled')},"
            " [HalfCheetah-v5](runs.md#it-is-judged)",
            "none; `--evaluate` plays it with its own",
        ),
    ]
    return (
        table(rows)
        + "\n"
        + wrapped(
            "The same, measured: Adam and its epsilon of 1e-5, the falling learning rate, value"
            " clipping, entropy, gradient clipping, the first weights, GAE apart from time limits."
            " With the first two rows undone, a whole iteration by CleanRL's own lines is ours to"
            f" within {rest:.0e} ([iteration.json](vectors/iteration.json), [how it was"
            " measured](check_your_own.md#what-comes-out-for-others))."
        )
    )


def sb3_differences() -> str:
    """What differs, by how much, and what makes ours do as SB3 does."""
    iteration = "change of critic.2.weight"
    rows = [
        ("what differs", "by how much", "to do as SB3 does"),
        ("---",) * 3,
        (
            "The value loss is the whole square there, half of it here",
            "a factor of 2 in `vf_coef`",
            "`--vf-coef 1` for SB3's 0.5",
        ),
        (
            "The value is not clipped there by default; with `clip_range_vf`, the loss is that of"
            " the clipped value alone, here the larger of both",
            f"{off('SB3', 'value loss', 'value_clipping', 'value_losses')} of the loss,"
            f" {off('SB3', 'value loss', 'iteration', iteration)} of an update of the critic",
            "`--no-clip-vloss` for None",
        ),
        (
            "The learning rate is constant there by default. A function is asked after a rollout:"
            " it is an iteration ahead, and the last one is 0",
            f"{off('SB3', 'schedule', 'annealing', 'learning_rates')} of the first rate in a run"
            " of 5 iterations, 1 over their number in any",
            "`--no-anneal-lr`",
        ),
        (
            "Advantages are divided by the sample's deviation",
            off("SB3", "sample deviation", "advantage_normalization", "normalized_advantages")
            + " in a minibatch of 8",
            "none",
        ),
        (
            "`evaluate_policy` plays the mode of the policy by default, `--evaluate` samples",
            f"{games('mode')} and {games('sampled')}, [HalfCheetah-v5](runs.md#it-is-judged)",
            "`--evaluate RUN --deterministic`",
        ),
        (
            "Observations and rewards are as they are there, unless `VecNormalize` is put around,"
            " saved and loaded by hand; `ppo_continuous.py` always normalizes, and the statistics"
            " are in the checkpoint",
            f"played with new statistics {games('fresh_statistics')}",
            "none",
        ),
    ]
    return (
        table(rows)
        + "\n"
        + wrapped(
            "The same, measured: advantages and returns, time limits included; the update without"
            " value clipping but for the deviation; Adam; `VecNormalize`, observations and rewards;"
            " Atari's wrappers, frame by frame; the first weights"
            " ([list](check_your_own.md#what-comes-out-for-others))."
        )
    )


PARTS = {
    "cleanrl differences": cleanrl_differences,
    "cleanrl flags": cleanrl_flags,
    "sb3 differences": sb3_differences,
    "sb3 flags": sb3_flags,
}


def pages() -> dict[Path, str]:
    return {PAGE: with_parts(PAGE, "make_migrating", PARTS)}


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    if sys.argv[1:2] == ["--cleanrl"]:
        read_cleanrl(Path(sys.argv[2]))
    for path, text in pages().items():
        path.write_text(text)
