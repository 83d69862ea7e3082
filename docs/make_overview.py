"""Draws docs/results/overview.png, one curve for each script, from the kept runs.

python docs/make_overview.py
"""

import matplotlib
import numpy as np

import make_results
import make_rlhf

matplotlib.use("Agg")
import matplotlib.pyplot as plt

KL_COEF = 0.1  # the default of ppo_rlhf.py


def classic(axis, runs, env_id, changes):
    """Return over steps: the IQM of the seeds with its interval, or the one seed there is."""
    of_group = make_results.select(runs, env_id, changes)
    curves = np.array([make_results.curve(*run)[1] for run in of_group])
    steps = make_results.curve(*of_group[0])[0] / 1e6
    axis.plot(steps, make_results.iqm(curves.T), "C0")
    if len(curves) > 2:
        axis.fill_between(steps, *make_results.interval(curves, 2000), alpha=0.25, lw=0)
    short = "NoFrameskip" in env_id and steps[-1] < 10  # where the references end
    of = " of 10" if short else ""
    axis.set(title=env_id.removesuffix("NoFrameskip-v4"), xlabel=f"million steps{of}")


def language(axis, runs):
    """The true reward over episodes: mean of the seeds, between the lowest and the highest."""
    of_group = make_rlhf.select(runs, "reviews", KL_COEF)
    episodes = of_group[0][1]["ppo/episode"]
    curves = np.array([make_rlhf.smooth(metrics["gold/score"]) for _, metrics in of_group])
    episodes = np.linspace(episodes[0], episodes[-1], curves.shape[1]) / 1000
    axis.plot(episodes, curves.mean(0), "C0")
    axis.fill_between(episodes, curves.min(0), curves.max(0), alpha=0.25, lw=0)
    axis.set(title="reviews", xlabel="thousand episodes")


def plot():
    runs, _, long = make_results.everything()
    figure, axes = plt.subplots(1, 5, figsize=(13, 2.6), layout="constrained")
    classic(axes[0], runs, "CartPole-v1", {})
    classic(axes[1], runs, "HalfCheetah-v5", {})
    classic(axes[2], long, "BreakoutNoFrameskip-v4", {})
    classic(axes[3], runs, "PongNoFrameskip-v4", make_results.MEMORY)
    language(axes[4], make_rlhf.load())
    scripts = ("discrete", "continuous", "atari", "atari_lstm", "rlhf")
    for axis, script in zip(axes, scripts, strict=True):
        axis.set_title(f"ppo_{script}.py\n{axis.get_title()}", fontsize="medium")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("episodic return")
    axes[4].set_ylabel("true reward")
    figure.savefig(make_results.RESULTS / "overview.png", dpi=100, metadata={"Software": None})


if __name__ == "__main__":
    plot()
