"""Makes a workspace and a report of Weights & Biases with the panels to look at first.

    pip install wandb-workspaces==0.4.13
    python docs/wandb_workspace.py --entity YOU
    python docs/wandb_workspace.py --entity YOU --rlhf

YOU is the account or team, to which `wandb login` must have logged in. What the panels show is in
docs/dashboards.md.
"""

import dataclasses

import tyro

LEARNING = {
    "Is it learning": ["charts/episodic_return", "charts/episodic_length"],
    "Is the update sound": [
        "losses/approx_kl",
        "losses/clipfrac",
        "losses/explained_variance",
        "losses/entropy",
    ],
    "Is it fast, and what else": [
        "charts/SPS",
        "charts/learning_rate",
        "losses/value_loss",
        "losses/policy_loss",
        "losses/grad_norm",
    ],
}
RLHF = {
    "Is it learning": ["objective/scores", "objective/kl", "objective/rlhf_reward"],
    "Is the update sound": [
        "ppo/policy/approxkl",
        "ppo/policy/clipfrac",
        "ppo/val/var_explained",
        "ppo/policy/entropy",
    ],
    "What is written": ["response/length", "objective/missing_eos", "rollout/logp_mismatch"],
}
VIDEOS = [f"step-0-game-{n**3}" for n in range(6)]  # the first ones of a run
TABLE = "samples"


@dataclasses.dataclass(frozen=True)
class Args:
    entity: str  # account or team
    project: str = "ppo37"  # project of the runs, --wandb-project-name
    rlhf: bool = False  # the panels of ppo_rlhf.py


def panels(metrics: list[str]) -> list:
    """A line plot for each metric, over the steps of the environments, as CleanRL's are."""
    import wandb_workspaces.reports.v2 as wr

    return [wr.LinePlot(x="global_step", y=[metric], title=metric) for metric in metrics]


def seen(rlhf: bool) -> list:
    """The panel of what a policy does: the table of its texts, or its videos."""
    import wandb_workspaces.reports.v2 as wr

    if rlhf:
        return [wr.WeavePanelSummaryTable(table_name=TABLE)]
    return [wr.MediaBrowser(media_keys=VIDEOS)]


def workspace(args: Args):
    """A view of the project: a section for each question, runs in groups of equal exp_name."""
    import wandb_workspaces.workspaces as ws
    from wandb_workspaces import expr

    sections = {name: panels(x) for name, x in (RLHF if args.rlhf else LEARNING).items()}
    sections["What does it do"] = seen(args.rlhf)
    return ws.Workspace(
        name="PPO on language models" if args.rlhf else "PPO",
        entity=args.entity,
        project=args.project,
        sections=[ws.Section(name=name, panels=x, is_open=True) for name, x in sections.items()],
        settings=ws.WorkspaceSettings(x_axis="global_step"),
        runset_settings=ws.RunsetSettings(groupby=[expr.Config("exp_name")]),
    )


def report(args: Args):
    """A page with the same panels, for those who were not there: mean and range over the seeds."""
    import wandb_workspaces.reports.v2 as wr

    blocks = []
    for name, metrics in (RLHF if args.rlhf else LEARNING).items():
        where = {"entity": args.entity, "project": args.project}
        runs = wr.Runset(**where, groupby=["config.env_id", "config.exp_name"][args.rlhf :])
        blocks += [wr.H2(name), wr.PanelGrid(runsets=[runs], panels=panels(metrics))]
    title = "PPO on language models" if args.rlhf else "PPO"
    return wr.Report(**where, title=title, blocks=blocks)


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__.splitlines()[0])
    workspace(args).save()
    report(args).save()
