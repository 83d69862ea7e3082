"""What each measure for speed gives: the scripts as they are beside copies with lines replaced.

    python benchmarks/variants.py --rounds 5

The first group takes away what is there, the second adds what was tried and left out. Each copy
runs in turn with the script itself, with the script's default number of torch threads. Writes
variants.csv: steps per second of every run as it ends, counted as in benchmarks/speed.py.
"""

import dataclasses
import itertools
import statistics
import tempfile
from pathlib import Path

import tyro
from speed import ROOT, TASKS, Program, commit_of, execute, results_folder, save, steps_per_second

FIELDS = ("script", "precision", "variant", "round", "steps_per_second", "commit")
EAGER = ("compiled(ppo_gradient) if args.compile else ppo_gradient", "ppo_gradient")
ALL_THREADS = (
    "        torch.set_num_threads(1)  # the other cores belong to the environments\n",
    "",
)
UNFUSED = ("fused=True)  # [C3]", "fused=False)  # [C3]")
NOT_CAST = ("        frozen.torso.to(", "        (lambda dtype: None)(")
CHANNELS_FIRST = [
    (
        "gym.spaces.Box(0, 255, (84, 84, 4), np.uint8)",
        "gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)",
    ),
    ("return cv2.merge(self.frames), {}", "return np.stack(self.frames), {}"),
    ("return cv2.merge(self.frames), np.sign", "return np.stack(self.frames), np.sign"),
    ("obs.permute(0, 3, 1, 2) / 255.0", "obs / 255.0"),
]
ONE_FORWARD = [  # of the whole batch
    ("for chunk in batch_obs.split(M)]", "for chunk in batch_obs.split(len(batch_obs))]"),
    ("pairs = zip(outputs, batch_actions.split(M), strict=False)", "pairs = []"),
    (
        "torch.cat([policy.log_prob(chunk) for (policy, _), chunk in pairs])",
        "Categorical(logits=outputs[0][0].logits[: args.batch_size]).log_prob(batch_actions)",
    ),
]
TORCH_ACTS = {
    "ppo_discrete.py": [
        (
            "            logits = fast(obs)\n",
            "            obs = torch.as_tensor(obs)\n"
            "            obs, mask = obs.split([self.obs_dim, self.choices[1]], 1)\n"
            "            with torch.inference_mode():\n"
            "                logits = self.actor(obs) + mask\n"
            "                return Categorical(logits=logits).sample()[:, None].numpy()\n",
        )
    ],
    "ppo_continuous.py": [
        (
            "            mean, sigma = (actor(obs), std[0]) if fast else exact(obs)\n",
            "            with torch.inference_mode():\n"
            "                mean = self.actor(torch.as_tensor(obs))\n"
            "                return Normal(mean, self.log_std.exp(), False).sample().numpy()\n",
        )
    ],
}
DISCRETE_ONLY = [
    ("self.action_space = gym.spaces.MultiDiscrete(nvec)", "self.action_space = space"),
    (
        "action = action.reshape(self.shape).astype(self.dtype) if self.shape else action[0]\n",
        "pass\n",
    ),
    ("self.env.step(self.start + action)", "self.env.step(action)"),
    (
        'row, mask = self.all_valid.copy(), info.pop("action_mask", None)',
        "return np.array(obs, np.float32)",
    ),
    ("self.all_valid.shape, np.float32)", "env.observation_space.shape, np.float32)"),
    ("nvec = envs.single_action_space.nvec", "nvec = np.ravel(envs.single_action_space.n)"),
    ("envs.single_observation_space.shape[0] - K * n", "envs.single_observation_space.shape[0]"),
    ("        obs, mask = obs[..., : self.obs_dim], obs[..., self.obs_dim :]\n", ""),
    ("logits = self.actor(obs) + mask  # [X4]", "logits = self.actor(obs)  # [X4]"),
    ("logits=logits.unflatten(-1, self.choices)", "logits=logits"),
    ("policy = Independent(each, 1, validate_args=False)", "policy = each"),
    ("actor(obs[:, : self.obs_dim]) + obs[:, self.obs_dim :]  # [X4]", "actor(obs)"),
    ("            return logits.reshape(-1, *self.choices)\n", "            return logits\n"),
    ("width = self.obs_dim + np.prod(self.choices)", "width = self.obs_dim"),
]
KEEP_MEMORY = [
    (
        "    check_args(args := parse_args(sys.argv[1:]))\n",
        "    check_args(args := parse_args(sys.argv[1:]))\n"
        "    import ctypes\n\n    libc = ctypes.CDLL(None)\n"
        "    libc.mallopt(-3, 2**30)\n    libc.mallopt(-1, 2**31 - 1)\n",
    )
]
VALUES_WHILE_ACTING = [
    ("policy, _ = frozen(", "policy, values = frozen("),
    (
        "            return np.argmax(logits + rng.gumbel(size=logits.shape), axis=-1)"
        "  # ~ softmax(logits)\n",
        "            action = np.argmax(logits + rng.gumbel(size=logits.shape), axis=-1)\n"
        "            return action, logits[range(len(action)), action], values.cpu().numpy()\n",
    ),
    (
        "    run = Run(args, device, envs, saved)",
        "    old = np.zeros((2, T + 1, N), np.float32)\n    run = Run(args, device, envs, saved)",
    ),
    ("actions[t] = act(obs[t])", "actions[t], old[0, t], old[1, t] = act(obs[t])"),
    (
        "outputs = [agent(chunk) for chunk in batch_obs.split(M)]",
        "old[1, T] = agent(batch_obs[-N:])[1].cpu().numpy()",
    ),
    ("pairs = zip(outputs, batch_actions.split(M), strict=False)", "pairs = []"),
    (
        "batch_logprobs = torch.cat([policy.log_prob(chunk) for (policy, _), chunk in pairs])",
        "batch_logprobs = torch.as_tensor(old[0], device=device).flatten()",
    ),
    (
        "batch_values = torch.cat([values for _, values in outputs])",
        "batch_values = torch.as_tensor(old[1], device=device).flatten()",
    ),
]
COMPILED_STEP = [
    ("optimizer.step()\n            kl = ", "step()\n            kl = "),
    ("    T, N, M = ", "    step = torch.compile(optimizer.step)\n    T, N, M = "),
]
BLOCKS = [  # the same products as 8 x 8 with stride 4: more channels, fewer positions
    ("nn.Conv2d(4, 32, kernel_size=8, stride=4)", "nn.Conv2d(64, 32, kernel_size=2)"),
    (
        "obs.permute(0, 3, 1, 2) / 255.0",
        "obs.view(-1, 21, 4, 21, 4, 4).transpose(2, 3).reshape(-1, 21, 21, 64)"
        ".permute(0, 3, 1, 2) / 255.0",
    ),
]
UNFILMED = [
    ("        if self.film:\n            self.frame()\n", ""),
    ('        if self.film:\n            self.frame("recorded" in read)\n', ""),
]
STEPPED = (
    "cuts = (1 + starts[1:].any(dim=1).nonzero().flatten()).tolist()",
    "cuts = list(range(1, len(starts)))",
)
COMPILED_TORSO = (
    "Agent(envs, args.precision).to(device)\n",
    "Agent(envs, args.precision).to(device)\n    agent.torso.compile()\n",
)

# script, precision where there is a choice, name of the variant, [(old text, new text), ...]
VARIANTS = [
    ("ppo_discrete.py", "", "update not compiled", [EAGER]),
    ("ppo_discrete.py", "", "torch acts", TORCH_ACTS["ppo_discrete.py"]),
    ("ppo_discrete.py", "", "Adam not fused", [UNFUSED]),
    ("ppo_discrete.py", "", "neither masks nor MultiDiscrete", DISCRETE_ONLY),
    ("ppo_continuous.py", "", "update not compiled", [EAGER]),
    ("ppo_continuous.py", "", "torch acts", TORCH_ACTS["ppo_continuous.py"]),
    ("ppo_continuous.py", "", "Adam not fused", [UNFUSED]),
    ("ppo_discrete.py", "", "nothing is ever filmed", UNFILMED),
    ("ppo_continuous.py", "", "nothing is ever filmed", UNFILMED),
    ("ppo_atari.py", "fp32", "update not compiled", [EAGER]),
    ("ppo_atari.py", "fp32", "channels first", CHANNELS_FIRST),
    ("ppo_atari.py", "fp32", "whole batch evaluated at once", ONE_FORWARD),
    ("ppo_atari.py", "fp32", "all threads while acting", [ALL_THREADS]),
    ("ppo_atari.py", "bf16", "update not compiled", [EAGER]),
    ("ppo_atari.py", "bf16", "channels first", CHANNELS_FIRST),
    ("ppo_atari.py", "bf16", "weights cast at every step", [NOT_CAST]),
    ("ppo_atari.py", "bf16", "all threads while acting", [ALL_THREADS]),
    ("ppo_atari_lstm.py", "fp32", "LSTM stepped one by one", [STEPPED]),
    ("ppo_atari_lstm.py", "bf16", "LSTM stepped one by one", [STEPPED]),
    ("ppo_discrete.py", "", "left out: Adam compiled, too", COMPILED_STEP),
    ("ppo_atari_lstm.py", "fp32", "left out: torso compiled", [COMPILED_TORSO]),
    ("ppo_atari_lstm.py", "bf16", "left out: torso compiled", [COMPILED_TORSO]),
    ("ppo_atari.py", "fp32", "left out: values stored while acting", VALUES_WHILE_ACTING),
    ("ppo_atari.py", "bf16", "left out: values stored while acting", VALUES_WHILE_ACTING),
    ("ppo_atari.py", "fp32", "left out: blocks of 4 x 4 pixels as channels", BLOCKS),
    ("ppo_atari.py", "bf16", "left out: blocks of 4 x 4 pixels as channels", BLOCKS),
    ("ppo_atari.py", "fp32", "left out: glibc keeps memory", KEEP_MEMORY),
    ("ppo_atari.py", "bf16", "left out: glibc keeps memory", KEEP_MEMORY),
]


@dataclasses.dataclass(frozen=True)
class Args:
    rounds: int = 5  # runs of each copy, and of the script beside it
    only: str = ""  # part of the script's or variant's name; empty: all variants
    out: Path = ROOT / "docs" / "results"  # folder of the results


def replaced(script: str, replacements: list[tuple[str, str]]) -> str:
    """The text of a script with other lines."""
    text = (ROOT / script).read_text()
    for old, new in replacements:
        assert text.count(old) == 1, f"{script}: {text.count(old)} times {old!r}"
        text = text.replace(old, new)
    return text


def main(args: Args):
    path, commit, rows = results_folder(args.out) / "variants.csv", commit_of(ROOT), []
    tasks = {task.script: task for task in TASKS}
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as cache:
        for script, precision, name, replacements in VARIANTS:
            if args.only not in f"{script} {precision} {name}":
                continue
            text = replaced(script, replacements)
            copy = Path(folder) / script
            copy.write_text(text)
            flags = ["--precision", precision] if precision else []
            paths, speeds = {"as it is": ROOT / script, name: copy}, {"as it is": [], name: []}
            for number, variant in itertools.product(range(1, args.rounds + 1), paths):
                program = Program(variant, precision, "default", [paths[variant], *flags], commit)
                run = execute(program, tasks[script].flags(number), cache)
                speeds[variant].append(steps_per_second(run.metrics))
                row = (script, precision, variant, number, f"{speeds[variant][-1]:.1f}", commit)
                save(path, rows, dict(zip(FIELDS, row, strict=True)))
            ratios = [a / b for a, b in zip(speeds[name], speeds["as it is"], strict=True)]
            print(f"{script} {precision} {name}: {statistics.median(ratios):.2f}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
