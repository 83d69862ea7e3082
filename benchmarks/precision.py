"""The gradient in bf16 beside the one in fp32, on the minibatches of a real run.

    python benchmarks/precision.py --env-id PongNoFrameskip-v4 --no-cuda --total-timesteps 51200

Trains ppo_atari.py in bf16. For the first minibatch of each iteration it takes the gradient of the
same loss with the same weights in both precisions, on the same device, before it is clipped. Writes
precision.csv in docs/results, or in the folder after --out, and prints the cosines between them.
"""

import copy
import os
import shlex
import sys
import tempfile
from pathlib import Path

import torch
from speed import commit_of, out_first, save

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import ppo_atari  # noqa: E402

FIELDS = ("update", "cosine", "relative_difference", "norm_fp32", "approx_kl_bf16")
FIELDS += ("commit", "command")


def gradient(agent, minibatch, coefficients, bf16: bool) -> torch.Tensor:
    """The gradient of ppo_loss with these weights, as one vector."""
    agent = copy.deepcopy(agent)
    agent.bf16 = bf16
    loss, _ = ppo_atari.ppo_loss(agent, minibatch, *coefficients)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, tuple(agent.parameters()))])


def main(argv: list[str]):
    out, argv = out_first(argv)
    args = ppo_atari.parse_args([*argv, "--precision", "bf16", "--no-compile"])
    ppo_gradient, rows, calls = ppo_atari.ppo_gradient, [], 0
    origin = (commit_of(ROOT), shlex.join(["python", "benchmarks/precision.py", *argv]))

    def compare(agent, batch, indices, max_grad_norm, *coefficients):
        nonlocal calls
        stats = ppo_gradient(agent, batch, indices, max_grad_norm, *coefficients)
        if calls % (args.update_epochs * args.num_minibatches) == 0:
            minibatch = [x[indices] for x in batch]
            exact, rounded = (gradient(agent, minibatch, coefficients, x) for x in (False, True))
            cosine = torch.nn.functional.cosine_similarity(exact, rounded, dim=0)
            difference = (exact - rounded).norm() / exact.norm()
            values = (cosine, difference, exact.norm(), stats["approx_kl"])
            row = (calls, *(f"{value.item():.6g}" for value in values), *origin)
            save(out / "precision.csv", rows, dict(zip(FIELDS, row, strict=True)))
        calls += 1
        return stats

    ppo_atari.ppo_gradient = compare
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        ppo_atari.train(args)
        os.chdir(ROOT)
    cosines = sorted(float(row["cosine"]) for row in rows)
    print(f"{len(cosines)} minibatches of {args.env_id}: cosine of the gradients at least")
    print(f"{cosines[0]:.6f}, median {cosines[len(cosines) // 2]:.6f}")


if __name__ == "__main__":
    main(sys.argv[1:])
