"""Proximal Policy Optimization for continuous actions, the whole algorithm in one file.

    python ppo_continuous.py --env-id HalfCheetah-v5 --seed 1

The PPO of openai/baselines [ppo2] as described by "The 37 Implementation Details of PPO" [37].
A tag such as [C5] marks the line that implements a detail; docs/details.md explains each.

Notation, used without exception below
    T = num_steps         steps per environment in a rollout
    N = num_envs          environments stepped in parallel
    B = T * N             transitions in a rollout, the batch
    M = B / minibatches   transitions in a minibatch
    values[t] = V(s_t)    dones[t] = 1 if the episode ended with action t

Where torchrun starts K ranks, each has N / K of the environments, M / K of a minibatch.
Left out on purpose: memory (ppo_atari_lstm.py has it), TensorBoard.
Added to [ppo2]: an episode cut off by a time limit is bootstrapped from its last observation.

References
    [PPO]   Schulman et al. 2017, Proximal Policy Optimization Algorithms, arXiv:1707.06347
    [GAE]   Schulman et al. 2016, High-Dimensional Continuous Control Using GAE, arXiv:1506.02438
    [37]    Huang et al. 2022, The 37 Implementation Details of PPO, ICLR Blog Track
    [ppo2]  github.com/openai/baselines at commit ea25b9e
"""

# /// script
# requires-python = ">=3.11"
# dependencies = ["gymnasium[mujoco,atari,classic-control]==1.4.0", "imageio-ffmpeg==0.8.1",
#   "numpy==2.4.6", "torch==2.13.0", "tqdm==4.70.1", "tyro==1.0.17", "wandb==0.31.0"]
# ///

import atexit
import contextlib
import dataclasses
import functools
import io
import json
import os
import re
import signal
import sys
import time
from multiprocessing.connection import wait
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal, get_args, get_type_hints

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import tyro
from torch import nn
from torch.distributions import Independent, Normal
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------
# Configuration

Name = Annotated[str, lambda x: re.fullmatch(r"[^/\\]+", x), "a name, no path"]
Seed = Annotated[int, lambda x: 0 <= x < 2**63, "from 0 to 2^63 - 1"]
Count = Annotated[int, lambda x: x >= 1, "at least 1"]
Fraction = Annotated[float, lambda x: 0 <= x <= 1, "from 0 to 1"]
Weight = Annotated[float, lambda x: 0 <= x < np.inf, "at least 0 and finite"]
Positive = Annotated[float, lambda x: x > 0, "above 0"]


@dataclasses.dataclass(frozen=True)
class Args:
    exp_name: Name = Path(__file__).stem  # name of the experiment, part of the run's name
    seed: Seed = 1  # seed of everything random
    torch_deterministic: bool = True  # only deterministic cuDNN kernels
    cuda: bool = True  # use the GPU if there is one
    torch_threads: Count = 1  # CPU threads of torch; networks this small are slower with more
    compile: bool = True  # compile the update, which takes a while once; needs a C++ compiler
    checkpoint_every: Count = 100  # iterations between checkpoints
    capture_video: bool = False  # film whole games into videos/, in training now and then
    resume: str | None = None  # checkpoint or folder of a run, which goes on there
    evaluate: str | None = None  # checkpoint or folder of a run, which plays and learns nothing
    eval_episodes: Count = 10  # whole games it plays
    deterministic: bool = False  # it plays the mode of the policy instead of samples
    track: bool = False  # log to Weights & Biases, too
    wandb_project_name: str = "ppo37"  # W&B project
    wandb_entity: str | None = None  # W&B team; None: your own account

    env_id: str = "HalfCheetah-v5"  # Gymnasium id of the environment, or module:id
    env_kwargs: str = "{}"  # arguments of the environment in JSON, such as '{"size": 8}'
    total_timesteps: Count = 1_000_000  # actions taken in total
    vectorization: Literal["sync", "async"] = "sync"  # one process, or one for each environment
    env_timeout: Positive = 300.0  # seconds for a step of an environment in another process
    num_envs: Count = 1  # N, environments stepped in parallel [C1]
    num_steps: Count = 2048  # T, steps per environment in a rollout
    gamma: Fraction = 0.99  # discount factor
    gae_lambda: Fraction = 0.95  # trades bias against variance of the advantages [C5]
    bootstrap_truncation: bool = True  # count on V(last observation) after a time limit

    update_epochs: Count = 10  # passes over the batch per rollout
    num_minibatches: Count = 32  # minibatches per pass [C6]
    learning_rate: Weight = 3e-4  # step size of Adam at the start [C4]
    anneal_lr: bool = True  # lower the learning rate linearly to zero [C4]
    norm_adv: bool = True  # normalize advantages in each minibatch [C7]
    clip_coef: Positive = 0.2  # epsilon, how far the policy may move per rollout [C8]
    clip_vloss: bool = True  # clip the change of the value function by epsilon, too [C9]
    ent_coef: Weight = 0.0  # c2, weight of the entropy bonus [C10]
    vf_coef: Weight = 0.5  # c1, weight of the value loss [C10]
    max_grad_norm: Positive = 0.5  # global norm the gradient is clipped to [C11]
    anneal_clip: bool = False  # lower epsilon linearly to zero, too [X1]
    target_kl: Positive | None = None  # end the update after an epoch with a larger KL [X3]
    penalty_kl: Positive | None = None  # instead of clipping, penalize the KL to keep it near [X5]
    anneal_ent: bool = False  # lower c2 linearly to zero, too [X6]

    batch_size = property(lambda args: args.num_envs * args.num_steps)
    minibatch_size = property(lambda args: args.batch_size // args.num_minibatches)
    num_iterations = property(lambda args: args.total_timesteps // args.batch_size)


# ------------------------------------------------------------------------------------------------
# Environment


class RunningMeanStd:
    """float64 mean and variance [*shape] of all samples x [n, *shape] so far, by Welford 1962."""

    def __init__(self, shape=()):
        self.mean, self.var, self.count = np.zeros(shape), np.ones(shape), np.array(1e-4)

    def update(self, x):
        """In place: the checkpoint knows the arrays."""
        _, ranks = rank_of()
        old_count = self.count.item() / ranks  # this one's share
        count = old_count + len(x)
        delta = x - self.mean
        self.mean += delta.sum(0) / count
        m2 = self.var * old_count + (delta * (x - self.mean)).sum(0)
        self.var[...] = (m2 + 0 * m2) / count  # inf + 0 inf = nan: an overflow is no variance
        self.count.fill(count * ranks)

    def merge(self):
        """The same on all ranks: the variance within them, and that of their means."""
        mean = self.mean.copy()
        average([torch.as_tensor(self.mean)])
        self.var += (mean - self.mean) ** 2
        average([torch.as_tensor(self.var)])


class VecNormalize(gym.vector.VectorWrapper):
    """Running normalization of observations and rewards, one set of statistics for all envs.

    Observations come out as float32 [N, obs_dim]; actions go in as sampled, [N, action_dim].
    """

    def __init__(self, env: gym.vector.VectorEnv, gamma: float):
        super().__init__(env)
        self.gamma, self.box = gamma, env.single_action_space
        shape = env.single_observation_space.shape
        self.single_observation_space = gym.spaces.Box(-10, 10, shape, np.float32)
        self.single_action_space = gym.spaces.Box(-np.inf, np.inf, (self.box.low.size,))
        self.obs_rms, self.return_rms = RunningMeanStd(shape), RunningMeanStd()
        self.returns = np.zeros(env.num_envs)

    def reset(self, **kwargs):
        obs, info = self.env.reset(**kwargs)
        self.returns[:] = 0.0
        if self.obs_rms.count < 1:  # else it goes on, with statistics that have seen as many
            self.obs_rms.update(obs)
        return self.normalize(obs), info

    def step(self, action):
        action = action.reshape(self.num_envs, *self.box.shape)
        action = action.clip(self.box.low, self.box.high).astype(self.box.dtype)  # [R5]
        obs, reward, terminated, truncated, info = self.env.step(action)
        self.obs_rms.update(obs)  # [R6] counted before it is normalized
        for i in np.flatnonzero(info.get("_final_obs", ())):  # normalized, but never counted
            info["final_obs"][i] = self.normalize(info["final_obs"][i])

        self.returns = self.returns * self.gamma + reward  # [R8] with the gamma of the agent
        self.return_rms.update(self.returns)
        self.returns[terminated | truncated] = 0.0
        reward = reward / np.sqrt(self.return_rms.var + 1e-8)  # [R8] scaled, not centred
        reward = reward.clip(-10, 10)  # [R9]
        return self.normalize(obs), reward, terminated, truncated, info

    def normalize(self, obs):
        """obs [*, obs_dim] -> float32 [*, obs_dim], with the statistics as they are"""
        obs = (obs - self.obs_rms.mean) / np.sqrt(self.obs_rms.var + 1e-8)  # [R6]
        obs[np.isinf(obs)] = np.nan  # clipping must not hide it
        return obs.clip(-10, 10).astype(np.float32)  # [R7]


def make_envs(args: Args) -> gym.vector.VectorEnv:
    """N environments in lockstep; when one ends, it returns the first observation of the next."""
    with contextlib.suppress(ImportError):  # Gymnasium's models have what MuJoCo calls deprecated
        import mujoco

        mujoco.set_mju_user_warning(lambda text: "deprecated" in text or notice(text))

    def vectors(env, i):
        env, space = Watched(env, i), env.action_space
        if not isinstance(space, gym.spaces.Box):
            hint = "; ppo_discrete.py has them" * (hasattr(space, "n") or hasattr(space, "nvec"))
            raise gym.error.Error(f"actions {space} are not Box{hint}")
        width = space.high - space.low
        far = (space.low >= 0) | (space.high <= 0) | (width > 20) | (width < 0.2)
        if (far & np.isfinite(width)).any():
            notice(f"actions {space} for a policy N(0, 1): see gym.wrappers.RescaleAction")
        n = gym.spaces.flatdim(env.observation_space)
        space = gym.spaces.Box(-np.inf, np.inf, (n,), np.float64)
        return gym.wrappers.TransformObservation(env, lambda x: x.ravel().astype(np.float64), space)

    return VecNormalize(lockstep(vectors, args), args.gamma)  # [C1]


# ------------------------------------------------------------------------------------------------
# Policy and value function


def layer_init(layer, gain=2**0.5):
    """[C2] Orthogonal weights scaled by `gain`, zero bias."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def mlp(inputs, outputs, gain):
    """Two hidden layers of 64 tanh units; `gain` scales the last layer."""
    return nn.Sequential(
        layer_init(nn.Linear(inputs, 64)),
        nn.Tanh(),
        layer_init(nn.Linear(64, 64)),
        nn.Tanh(),
        layer_init(nn.Linear(64, outputs), gain=gain),
    )


def in_numpy(module):
    """`module` as a function of arrays: to call torch takes longer than such small layers do."""
    if type(module) is nn.Sequential:
        return functools.reduce(lambda f, g: lambda x: g(f(x)), map(in_numpy, module))
    if type(module) is nn.Linear and module.bias is not None:
        w, b = (x.numpy(force=True).T for x in (module.weight, module.bias))
        return lambda x: x @ w + b
    known = {nn.Tanh: np.tanh, nn.ReLU: lambda x: np.maximum(x, 0)}
    to = functools.partial(torch.as_tensor, device=next(module.parameters(), torch.empty(0)).device)
    return known.get(type(module), lambda x: module(to(x)).numpy(force=True))


class Agent(nn.Module):
    """[C13] [R4] Separate networks for the policy and the value function."""

    def __init__(self, envs: gym.vector.VectorEnv):
        super().__init__()
        (self.obs_dim,) = envs.single_observation_space.shape
        (action_dim,) = envs.single_action_space.shape
        self.actor = mlp(self.obs_dim, action_dim, gain=0.01)
        self.critic = mlp(self.obs_dim, 1, gain=1.0)
        self.log_std = nn.Parameter(torch.zeros(action_dim))  # [R2] the same in every state

    def forward(self, obs):
        """obs float32 [*, obs_dim] -> distribution over actions [*, action_dim], values [*]"""
        normal = Normal(self.actor(obs), self.log_std.exp(), validate_args=False)  # [R1]
        policy = Independent(normal, 1, validate_args=False)  # [R3] sums over action components
        return policy, self.critic(obs).squeeze(-1)

    def rollout_policy(self, rng):
        """The policy as it is now, a function obs [N, obs_dim] -> actions [N, action_dim]."""
        actor = in_numpy(self.actor)

        def exact(obs):
            with torch.no_grad():
                policy = self(torch.as_tensor(obs, device=self.log_std.device))[0].base_dist
            return policy.loc.cpu().numpy(), policy.scale.cpu().numpy()

        probe = np.linspace(-3, 3, 4 * self.obs_dim, dtype=np.float32).reshape(4, -1)
        mean, std = exact(probe)
        fast = np.allclose(actor(probe), mean, atol=1e-4 * np.ptp(mean)) and (std == std[0]).all()
        if not fast:
            notice("rollout_policy does not do what forward does; the network itself acts, slower")

        def act(obs):
            mean, sigma = (actor(obs), std[0]) if fast else exact(obs)
            return mean + sigma * rng.standard_normal(mean.shape)

        return act


# ------------------------------------------------------------------------------------------------
# The algorithm


def gae(rewards, values, next_values, dones, gamma, gae_lambda):
    """[C5] Generalized advantage estimation, [PPO] equations 11 and 12, run backwards.

        delta_t = r_t + gamma V(s_{t+1}) - V(s_t)
        A_t     = delta_t + gamma lambda A_{t+1}, with A_{t+1} = 0 where the episode ended

    next_values[t] is V(s_{t+1}): 0 if the episode terminated with action t, the value of its
    last observation if it was only cut off. All arrays [T, N] -> advantages [T, N]
    """
    advantages = rewards + gamma * next_values - values
    for t in reversed(range(len(advantages) - 1)):
        advantages[t] += gamma * gae_lambda * (1.0 - dones[t]) * advantages[t + 1]
    return advantages


def ppo_loss(agent, minibatch, clip_coef, ent_coef, kl_coef, vf_coef, norm_adv, clip_vloss):
    """The objective of [PPO] equation 9, negated.

        L = E[ min(r A, clip(r, 1 - eps, 1 + eps) A) - c1 (V - R)^2 / 2 + c2 S ]

    with r = pi(a|s) / pi_old(a|s). minibatch: obs [M, ...], actions [M, ...], and, each [M], log
    pi_old(a|s), V_old(s), A and R. clip_coef (eps), ent_coef (c2) and kl_coef (beta, if any)
    are 0-d tensors, so that a new value never recompiles. -> loss [], dict of statistics []
    """
    obs, actions, logprobs, values, advantages, returns = minibatch
    policy, new_values = agent(obs)
    logratio = policy.log_prob(actions) - logprobs
    ratio = logratio.exp()
    approx_kl = ((ratio - 1) - logratio).mean()  # k3 of joschu.net/blog/kl-approx.html

    if norm_adv:  # [C7] with the population's standard deviation, as numpy and [ppo2]
        advantages = (advantages - advantages.mean()) / (advantages.std(correction=0) + 1e-8)
    clipped_ratio = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    policy_loss = -torch.min(ratio * advantages, clipped_ratio * advantages).mean()  # [C8]
    if kl_coef is not None:  # [X5] equation 8 in its place
        policy_loss = -(ratio * advantages).mean() + kl_coef * approx_kl

    value_losses = (new_values - returns) ** 2
    if clip_vloss:  # [C9] the worse of the two, so that clipping cannot hide an error
        clipped_values = values + (new_values - values).clamp(-clip_coef, clip_coef)
        value_losses = torch.max(value_losses, (clipped_values - returns) ** 2)
    value_loss = 0.5 * value_losses.mean()

    entropy = policy.entropy().mean()
    loss = policy_loss + vf_coef * value_loss - ent_coef * entropy  # [C10]

    stats = {  # [C12] what to watch
        "loss": loss,
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "entropy": entropy,
        "old_approx_kl": -logratio.mean(),  # k1
        "approx_kl": approx_kl,
        "clipfrac": ((ratio - 1).abs() > clip_coef).float().mean(),
    }
    return loss, {name: value.detach() for name, value in stats.items()}


def ppo_gradient(agent, batch, indices, max_grad_norm, *coefficients):
    """Leave the clipped gradient of ppo_loss for the minibatch batch[indices] in the parameters."""
    loss, stats = ppo_loss(agent, [x[indices] for x in batch], *coefficients)
    loss.backward()
    average([x.grad for x in agent.parameters()])  # [X2] over all ranks, before it is clipped
    norm = nn.utils.clip_grad_norm_(agent.parameters(), max_grad_norm)  # [C11]
    return stats | {"grad_norm": norm}


# ------------------------------------------------------------------------------------------------
# Training


def train(args: Args) -> Agent:
    """Learn `args.env_id`, leave a folder under runs/ behind, return the trained agent."""
    # setup
    rank, ranks = rank_of()
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    device = torch.device("cuda" if torch.cuda.is_available() and args.cuda else "cpu")
    envs = make_envs(args)
    agent = Agent(envs).to(device)
    lr, clip_coef, ent_coef = torch.zeros(3, device=device)  # set in each iteration
    kl_coef = None if args.penalty_kl is None else torch.ones((), device=device)
    coefficients = (clip_coef, ent_coef, kl_coef, args.vf_coef, args.norm_adv, args.clip_vloss)
    gradient = compiled(ppo_gradient) if args.compile else ppo_gradient
    optimizer = torch.optim.Adam(agent.parameters(), lr=lr, eps=1e-5, fused=True)  # [C3]
    saved = {"agent": agent, "optimizer": optimizer, "kl_coef": kl_coef}
    saved |= {f"obs_{k}": torch.as_tensor(x) for k, x in vars(envs.obs_rms).items()}
    saved |= {f"return_{k}": torch.as_tensor(x) for k, x in vars(envs.return_rms).items()}

    # rollout storage
    T, N, M = args.num_steps, args.num_envs // ranks, args.minibatch_size // ranks  # [X2]
    obs_space, action_space = envs.single_observation_space, envs.single_action_space
    obs = np.zeros((T + 1, N, *obs_space.shape), obs_space.dtype)
    actions = np.zeros((T, N, *action_space.shape), action_space.dtype)
    rewards, dones, final_values = np.zeros((3, T, N), np.float32)

    run = Run(args, device, envs, saved)  # with --resume, all that is saved is as it was
    seeds = np.random.SeedSequence([args.seed, rank, run.iteration])  # [seed, rank, iteration]
    obs[T], _ = envs.reset(seed=seeds.generate_state(N).tolist())
    global_step = run.iteration * args.batch_size
    for iteration in range(run.iteration + 1, args.num_iterations + 1):
        rng = np.random.default_rng([args.seed, rank, iteration])  # [seed, rank, iteration]
        remaining = 1 - (iteration - 1) / args.num_iterations
        lr.fill_(args.learning_rate * (remaining if args.anneal_lr else 1))  # [C4]
        clip_coef.fill_(args.clip_coef * (remaining if args.anneal_clip else 1))  # [X1]
        ent_coef.fill_(args.ent_coef * (remaining if args.anneal_ent else 1))  # [X6]

        # rollout: T steps in each of the N environments
        obs[0] = obs[T]  # [C1] episodes go on from one rollout to the next
        final_values[:] = 0.0
        torch.set_num_threads(1)  # the other cores belong to the environments
        act = agent.rollout_policy(rng)
        for t in range(T):
            run.check_finite(global_step, observations=obs[t])
            actions[t] = act(obs[t])
            obs[t + 1], rewards[t], terminated, truncated, info = envs.step(actions[t])
            dones[t] = terminated | truncated
            global_step += args.num_envs
            run.log_episodes(global_step, info)
            if args.bootstrap_truncation and (cut_off := truncated & ~terminated).any():
                final_obs = torch.as_tensor(np.stack(info["final_obs"][cut_off]), device=device)
                final_values[t, cut_off] = agent(final_obs)[1].detach().cpu().numpy()  # not death

        for rms in (envs.obs_rms, envs.return_rms):
            rms.merge()  # [X2]

        # log-probabilities and values under the policy that acted, which is still the current one
        torch.set_num_threads(args.torch_threads)
        batch_obs = torch.as_tensor(obs, device=device).flatten(0, 1)  # B, and N more for V(s_T)
        batch_actions = torch.as_tensor(actions, device=device).flatten(0, 1)
        with torch.no_grad():
            outputs = [agent(chunk) for chunk in batch_obs.split(M)]
            pairs = zip(outputs, batch_actions.split(M), strict=False)  # no action in s_T
            batch_logprobs = torch.cat([policy.log_prob(chunk) for (policy, _), chunk in pairs])
            batch_values = torch.cat([values for _, values in outputs])
        values = batch_values.view(T + 1, N).cpu().numpy()

        # advantages and value targets
        next_values = np.where(dones, final_values, values[1:])
        advantages = gae(rewards, values[:T], next_values, dones, args.gamma, args.gae_lambda)
        returns = advantages + values[:T]
        run.check_finite(global_step, rewards=rewards, values=values, advantages=advantages)

        # update: several epochs of minibatches drawn without replacement
        batch = [batch_obs, batch_actions, batch_logprobs, batch_values]
        batch += [torch.as_tensor(x, device=device).flatten() for x in (advantages, returns)]
        orders = [rng.permutation(T * N) for _ in range(args.update_epochs)]  # [C6]
        stats = []
        for order in torch.as_tensor(np.stack(orders), device=device):
            for indices in order.split(M):  # [C6]
                optimizer.zero_grad()
                stats.append(gradient(agent, batch, indices, args.max_grad_norm, *coefficients))
                optimizer.step()
            kl = torch.stack([s["approx_kl"] for s in stats[-args.num_minibatches :]]).mean()
            average([kl])
            if args.target_kl is not None and kl > args.target_kl:  # [X3]
                break
        if kl_coef is not None:  # [X5] beta grows after an epoch too far away, and the reverse
            kl_coef *= 2 if kl > 1.5 * args.penalty_kl else 0.5 if kl < args.penalty_kl / 1.5 else 1
            kl_coef.clamp_(1e-6, 1e6)  # from 0 or infinity it could not come back

        # log
        means = {f"losses/{k}": torch.stack([s[k] for s in stats]).mean().item() for k in stats[0]}
        run.check_finite(global_step, **means)
        errors, targets = (returns - values[:T]).var(), returns.var()  # [C12]
        means["losses/explained_variance"] = 1 - errors / targets if targets > 0 else np.nan
        charts = {"charts/learning_rate": lr, "charts/kl_coef": kl_coef}
        run.end_iteration(iteration, global_step, charts | means)

    run.close()
    return agent


# ------------------------------------------------------------------------------------------------
# Runs


def rank_of() -> tuple[int, int]:
    """The rank of this process, and how many there are: torchrun starts several."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def average(tensors: list[torch.Tensor]):
    """Over all ranks, in place."""
    if dist.is_initialized():
        means = torch.cat([x.flatten() for x in tensors]) / dist.get_world_size()
        dist.all_reduce(means)
        for x, mean in zip(tensors, means.split([x.numel() for x in tensors]), strict=True):
            x.copy_(mean.view_as(x))


def of_all_ranks(x) -> list:
    """What each rank has as x."""
    parts = [x] * rank_of()[1]
    if dist.is_initialized():
        dist.all_gather_object(parts, x)
    return parts


@functools.cache
def notice(message: str):
    """A line on what is otherwise than one would think, once."""
    if rank_of()[0] == 0:
        print("notice:", message, file=sys.stderr)


def fail(message: str):
    """Stop with one line that says what is wrong and what to do, of the rank that is first."""
    store = dist.is_initialized() and dist.distributed_c10d._get_default_store()
    if not store or store.add("failed", 1) == 1:
        print("error:", *str(message).split(), file=sys.stderr)
    sys.exit(2)


def say(*words):
    """A line on the standard output; a run goes on where that was closed, as by `| head`."""
    try:
        with tqdm.external_write_mode():
            print(*words, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


OF_ONE_COMMAND = {"resume", "evaluate", "eval_episodes", "deterministic", "capture_video"}
MAY_CHANGE = {"total_timesteps", "learning_rate", "precision", "cuda", "torch_threads", "compile"}
MAY_CHANGE |= {"vectorization", "env_timeout", "checkpoint_every", "track"}


def parse_args(argv: list[str]) -> Args:
    """Args from the command line; W&B sweeps write a boolean as --flag=True or --flag=False."""
    flag = "|".join(x.name for x in dataclasses.fields(Args) if x.type is bool).replace("_", "[-_]")
    argv = [re.sub(rf"^--({flag})=[Tt]rue$", r"--\1", arg) for arg in argv]
    argv = [re.sub(rf"^--({flag})=[Ff]alse$", r"--no-\1", arg) for arg in argv]
    args = tyro.cli(Args, args=argv, description=__doc__.splitlines()[0])
    if path := args.resume or args.evaluate:  # what the command line does not say is as it was
        old = load_checkpoint(path)["args"]
        args = tyro.cli(Args, args=argv, default=Args(**old))
        for name in [x for x in old if getattr(args, x) != old[x] and x not in OF_ONE_COMMAND]:
            change = f"--{name.replace('_', '-')} is {getattr(args, name)}, it was {old[name]}"
            if name not in MAY_CHANGE and not name.startswith("wandb_"):
                fail(f"{change}; that is another run than {path}")
            say(change + "; what is annealed follows the new total" * (name == "total_timesteps"))
    return args


def check_args(args: Args):
    """Refuse what cannot work, before any training starts and before W&B is contacted."""
    import difflib
    import importlib.util

    for name, kind in get_type_hints(Args, include_extras=True).items():
        value = getattr(args, name)
        for part in (kind, *get_args(kind)):  # X, or each of X | None
            match getattr(part, "__metadata__", ()):
                case (valid, words) if value is not None and not valid(value):
                    fail(f"--{name.replace('_', '-')} is {value}, it must be {words}")
    _, ranks = rank_of()
    if args.evaluate and (args.resume or ranks > 1):
        fail("--evaluate plays in one process, started by python, without --resume")
    for name in ("num_envs", "minibatch_size"):
        if getattr(args, name) % ranks:
            fail(f"{name} {getattr(args, name)} cannot be divided by the {ranks} ranks of torchrun")
    batch = f"a batch of {args.batch_size} (--num-envs x --num-steps)"
    if args.batch_size % args.num_minibatches:
        fail(f"{batch} cannot be divided into {args.num_minibatches} equal --num-minibatches")
    if args.total_timesteps < args.batch_size:
        fail(f"--total-timesteps {args.total_timesteps} is less than {batch}")
    if args.track and not importlib.util.find_spec("wandb"):
        fail("--track needs the package wandb: pip install wandb")
    try:
        make_envs(dataclasses.replace(args, num_envs=ranks, vectorization="sync")).close()
    except gym.error.UnregisteredEnv as error:
        near = difflib.get_close_matches(args.env_id, gym.registry, n=3, cutoff=0.5)
        hint = f"nearest: {', '.join(near)}" if near else str(error)
        if re.search("^ALE/|NoFrameskip", args.env_id) and "ALE/Pong-v5" not in gym.registry:
            hint = "ppo_atari.py plays Atari games"
        fail(f"unknown environment {args.env_id}; {hint}")
    except (gym.error.Error, ImportError, TypeError, json.JSONDecodeError) as error:
        if isinstance(error, TypeError) and not re.search("argument|mapping", str(error)):
            raise
        what = f"--env-id {args.env_id} --env-kwargs '{args.env_kwargs}'"
        fail(f"{what}: {type(error).__name__}: {error}")


def load_checkpoint(path: str) -> dict:
    """What save_checkpoint wrote; anything else is refused. `path` may be the run's folder."""
    file = Path(path) / "checkpoint.pt" if Path(path).is_dir() else Path(path)
    try:
        data = torch.load(file, map_location="cpu", weights_only=True)
        if data["version"] != 1:
            raise ValueError(f"version {data['version']}, not 1")
        Args(**data["args"])
    except Exception as error:
        fail(f"{file} is no checkpoint of this script: {type(error).__name__}: {error}")
    return data | {"path": file}


def compiled(function):
    """`function` made faster by torch.compile, or as it is where there is no compiler."""
    if whole := hasattr(torch._dynamo.config, "trace_autograd_ops"):  # new in torch 2.13
        torch._dynamo.config.trace_autograd_ops = True
    fast = torch.compile(function, fullgraph=whole)  # else up to backward(), and behind

    def call(*args):
        nonlocal fast
        try:
            return fast(*args)
        except torch._dynamo.exc.TorchDynamoException as error:
            notice(f"not compiled, slower: {str(error).splitlines()[0]}")
            fast = function
            return function(*args)

    return call


class Watched(gym.Wrapper):
    """Environment i of N, as anyone may have written it: what it hands over is checked.

    Observations become arrays of numbers, flat if they come as a Dict, a Tuple or an int. `info` is
    cut down to what is read: action_mask, and after an episode its return and length, recorded
    here, or by the environment itself as info["whole_game"] if an episode is a part of it. `film`
    is how names of videos begin; whether all games are filmed, or only numbers 0, 1, 8, 27, ...
    """

    film, writer, game = None, None, 0

    def __init__(self, env: gym.Env, i: int):
        super().__init__(env)
        self.i, self.steps, space = i, 0, env.observation_space
        refuse_what_is_no_number(space, "observation")
        is_array = isinstance(space, gym.spaces.Box)
        self.to_array = np.asarray if is_array else functools.partial(gym.spaces.flatten, space)
        self.observation_space = space if is_array else gym.spaces.flatten_space(space)
        self.shape, self.dtype = self.observation_space.shape, space.dtype if is_array else None

    def reset(self, **kwargs):
        self.score, self.length = 0.0, 0
        try:
            obs, info = self.env.reset(**kwargs)
        except Exception as error:
            self.fault(error)
        if self.film:
            self.frame()
        obs = self.checked("observation", obs, self.to_array, self.shape)
        return obs, {k: info[k] for k in ("action_mask",) if k in info}

    def step(self, action):
        self.steps += 1
        try:
            obs, reward, terminated, truncated, info = self.env.step(action)
        except Exception as error:
            self.fault(error)
        if getattr(obs, "dtype", "") != self.dtype or obs.shape != self.shape:
            obs = self.checked("observation", obs, self.to_array, self.shape)
        if not isinstance(reward, float):
            reward = float(self.checked("reward", reward, np.ravel, (1,))[0])
        self.score, self.length = self.score + reward, self.length + 1
        read = {"action_mask": info["action_mask"]} if "action_mask" in info else {}
        if terminated or truncated:
            game = info.get("whole_game", {"r": self.score, "l": self.length})
            read |= {"recorded": game} if game else {}
        if self.film:
            self.frame("recorded" in read)
        return obs, reward, bool(terminated), bool(truncated), read

    def checked(self, what, value, to_array, shape):
        with contextlib.suppress(Exception):
            x = to_array(value)
            if x.shape == shape and x.dtype.kind in "biuf":
                return x
        given = f"{type(value).__name__} {getattr(value, 'shape', '')} {value!r:.60}"
        self.fault(f"{what} is {given}, not numbers of shape {shape}")

    def frame(self, last=False):
        """Into a file that has its name once the game is over."""
        from imageio_ffmpeg import write_frames

        name, all_games = f"{self.film[0]}game-{self.game}", self.film[1]
        if all_games or round(self.game ** (1 / 3)) ** 3 == self.game:
            try:
                picture = np.ascontiguousarray(self.env.render(), np.uint8)
            except Exception as error:
                self.fault(f"no picture, MuJoCo takes them by EGL or OSMesa (libegl1): {error}")
            if self.writer is None:
                how = {"fps": self.metadata.get("render_fps", 30), "macro_block_size": 2}
                self.writer = write_frames(f"{name}-unfinished.mp4", picture.shape[1::-1], **how)
                self.writer.send(None)
            self.writer.send(picture)
        if last:
            self.game += 1
            if self.writer:
                self.writer = self.writer.close()
                os.replace(f"{name}-unfinished.mp4", f"{name}.mp4")

    def close(self):
        if self.writer:  # the game is not over
            self.writer.close()
            os.remove(f"{self.film[0]}game-{self.game}-unfinished.mp4")
        super().close()

    def fault(self, what):
        if isinstance(what, Exception):  # of the environment's own code
            sys.excepthook(*sys.exc_info())
            what = f"{type(what).__name__}: {what}"
        where = f"{self.spec.id}, environment {self.i}, step {self.steps}"
        raise gym.error.Error(f"{where}: {what}") from None


def refuse_what_is_no_number(space, name):
    """Texts, graphs and the like, also within a Dict or a Tuple."""
    if isinstance(space, gym.spaces.Dict | gym.spaces.Tuple):
        for key in space if isinstance(space, gym.spaces.Dict) else range(len(space)):
            refuse_what_is_no_number(space[key], f"{name}[{key!r}]")
    else:
        with contextlib.suppress(NotImplementedError):  # Gymnasium's word for: not by me
            if isinstance(gym.spaces.flatten_space(space), gym.spaces.Box):
                return
        raise gym.error.Error(f"{name} is {space}, no numbers; docs/your_own.md has a wrapper")


def worker(*args):
    """Of one environment. Signals are for the process that learns, with which this one ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError):  # that process has gone
        gym.vector.async_vector_env._async_worker(*args)


class Processes(gym.vector.AsyncVectorEnv):
    """A process for each environment. One that raises, hangs or dies ends the run."""

    def __init__(self, make_envs, timeout, **how):
        self.timeout, self.steps, self.parent_pipes, self.processes = timeout, 0, [], []
        atexit.register(self.close)  # or multiprocessing waits for the processes for ever
        self.answers_to(super().__init__, make_envs, worker=worker, **how)
        self.reset = functools.partial(self.answers_to, super().reset)
        gym.logger.min_level = 50  # its log of what a process raises fails at a % in it
        for process in self.processes:  # or Linux wakes them one by one on the same core
            with contextlib.suppress(AttributeError, OSError):
                os.sched_setscheduler(process.pid, os.SCHED_BATCH, os.sched_param(0))

    def step(self, actions):
        self.steps += 1
        return self.answers_to(super().step, actions)

    def answers_to(self, question, *args, **kwargs):
        try:
            return question(*args, **kwargs)
        except (EOFError, OSError):
            started = {x.sentinel: i for i, x in enumerate(self.processes) if x.pid}
            ended = sorted(started[x] for x in wait(started, 1))
            self.close()  # after what they have to say
            for i in ended:
                what = f"its process has ended, exit code {self.processes[i].exitcode}"
                raise gym.error.Error(f"environment {i}, step {self.steps}: {what}") from None
            raise

    def _check_spaces(self):
        self.get_attr("i")  # waits until they are made, no longer than for a step
        super()._check_spaces()

    def _poll_pipe_envs(self, timeout=None):
        end = time.monotonic() + min(self.timeout, 1e6)
        for i, pipe in enumerate(self.parent_pipes):
            if not pipe.poll(max(0.0, end - time.monotonic())):
                what = f"no answer in {self.timeout:g} seconds, --env-timeout"
                raise gym.error.Error(f"environment {i}, step {self.steps}: {what}")
        return True

    def close_extras(self, **kwargs):
        """Ask them to close, and do not wait for long."""
        for pipe in self.parent_pipes:
            with contextlib.suppress(OSError, AttributeError):
                pipe.send(("close", None))
        for process in [x for x in self.processes if x.pid]:  # those that were started
            process.join(1)
            process.kill()
            process.join()


def lockstep(wrapped, args: Args) -> gym.vector.VectorEnv:
    """wrapped(env, i) for i = 0 ... N - 1, one after the other or each in a process of its own."""

    def make(i):
        options = {"disable_env_checker": i > 0 or None}  # what it says is the same for all
        if args.capture_video:
            options["render_mode"] = "rgb_array"
            if sys.platform == "linux" and "DISPLAY" not in os.environ:
                os.environ.setdefault("MUJOCO_GL", "egl")  # pictures without a screen
        return wrapped(gym.make(args.env_id, **{**options, **json.loads(args.env_kwargs)}), i)

    rank, ranks = rank_of()
    n = args.num_envs // ranks
    several = [functools.partial(make, rank * n + i) for i in range(n)]
    how = {"copy": False, "autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}
    if args.vectorization == "sync":
        return gym.vector.SyncVectorEnv(several, **how)
    return Processes(several, args.env_timeout, **how)


class Run:
    """What a run leaves behind: config.json, metrics.csv, checkpoint.pt, a copy of this script."""

    now = folder = metrics = checkpoint = wandb = None  # now: the run of this process

    def __init__(self, args: Args, device: torch.device, envs, saved: dict):
        self.args, self.envs, Run.now = args, envs, self
        self.rank, self.ranks = rank_of()
        self.saved = {name: value for name, value in saved.items() if value is not None}
        self.rows, self.handlers, self.signal, self.bar = [], {}, 0, tqdm(disable=True)
        data = {"iteration": 0, "seconds": 0.0, "last_returns": []}
        if path := args.resume or args.evaluate:
            data = self.restore(load_checkpoint(path))
        self.iteration, self.wandb_id, self.sent = data["iteration"], data.get("wandb_id"), -1
        self.last_returns, done = data["last_returns"], self.iteration * args.batch_size
        with contextlib.suppress(ValueError):  # not the main thread
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers[number] = signal.signal(number, self.on_signal)
        if args.evaluate:
            self.iteration = sys.maxsize  # nothing is left to be learned
            return
        if self.rank == 0:
            try:
                config = self.open_folder(device, data)
            except (OSError, ValueError) as error:
                fail(f"a run needs a folder to write to: {error}")
            self.film([f"step-{done}-"])
        self.folder = of_all_ranks(self.folder)[0]
        if args.track and self.rank == 0:
            import wandb

            names = {"project": args.wandb_project_name, "entity": args.wandb_entity}
            names |= {"name": self.name, "id": self.wandb_id, "resume": "allow"}
            try:
                self.wandb = wandb.init(**names, config=config, save_code=True)
            except wandb.Error as error:
                fail(f"Weights & Biases: {error}")
            self.wandb.define_metric("*", step_metric="global_step")
        how = {"initial": done, "unit": "step", "disable": self.rank > 0 or None}
        self.bar = tqdm(total=args.total_timesteps, **how)
        self.start_time, self.last_line = time.time() - data["seconds"], time.time()

    def restore(self, data: dict) -> dict:
        """Everything that is saved as it was in a checkpoint."""
        self.checkpoint, self.folder = data["path"], data["path"].parent
        rates = self.saved["optimizer"].param_groups[0]["lr"]  # the tensor that is filled
        try:
            for name, x in self.saved.items():
                (x.copy_ if torch.is_tensor(x) else x.load_state_dict)(data[name])
        except (KeyError, RuntimeError, ValueError) as error:
            fail(f"{self.checkpoint} does not fit this script and environment: {error}")
        self.saved["optimizer"].param_groups[0]["lr"] = rates
        return data

    def open_folder(self, device: torch.device, data: dict) -> dict:
        """A new one, or that of the checkpoint with metrics as they were then. -> configuration"""
        args, derived = self.args, ("batch_size", "minibatch_size", "num_iterations")
        config = dataclasses.asdict(args) | {name: getattr(args, name) for name in derived}
        config |= {f"env_kwargs/{k}": v for k, v in json.loads(args.env_kwargs).items()}
        text = config | origin(device)
        if args.resume:
            self.name, self.metrics = data["name"], self.folder / "metrics.csv"
            rows, counted = self.metrics.read_bytes(), data["metrics_bytes"]
            self.bytes = rows.rindex(b"\n", 0, counted) + 1
            if self.bytes < counted:  # a folder copied while a run wrote to it
                say(f"{self.metrics} lacks rows from before the checkpoint")
            steps = re.findall(rb"(?m)^(\d+),", rows) * data["args"]["track"]
            old = json.loads((self.folder / "config.json").read_text())
            self.sent = max([old.get("sent", -1), *map(int, steps)])
            text = old | {"resumed": [*old.get("resumed", []), text], "sent": self.sent}
        else:
            for now in range(int(time.time()), sys.maxsize):  # never a folder that exists
                self.name = f"{args.env_id}__{args.exp_name}__{args.seed}__{now}"
                self.folder = Path("runs") / self.name
                with contextlib.suppress(FileExistsError):
                    self.folder.mkdir(parents=True)
                    break
            (self.folder / Path(__file__).name).write_bytes(Path(__file__).read_bytes())
            self.metrics = self.folder / "metrics.csv"
            self.bytes = self.metrics.write_text("global_step,time,name,value\n", newline="\n")
        (self.folder / "config.tmp").write_text(json.dumps(text, indent=2))
        os.replace(self.folder / "config.tmp", self.folder / "config.json")
        os.truncate(self.metrics, self.bytes)  # nothing stands twice
        return config

    def film(self, names: list[str]):
        """Tell as many environments how the names of their videos begin."""
        self.videos = self.folder / "videos"
        self.uploaded = set(self.videos.glob("*.mp4"))  # before the run was resumed
        if self.args.capture_video:
            self.videos.mkdir(exist_ok=True)
            films = [(f"{self.videos}/{name}", bool(self.args.evaluate)) for name in names]
            self.envs.unwrapped.set_attr("film", films + [None] * (self.envs.num_envs - len(names)))

    def on_signal(self, number, _):
        """Stop after this iteration; a second signal does not wait for it."""
        self.signal = number
        for number in self.handlers:
            signal.signal(number, signal.SIG_DFL if self.ranks == 1 else signal.SIG_IGN)

    def write(self):
        """A row for each metric in metrics.csv; in W&B one for all of them, and finished videos."""
        rows = [(step, t, name, x) for step, t, row in self.rows for name, x in row.items()]
        text = "".join(f"{step},{t:.3f},{name},{x:.9g}\n" for step, t, name, x in rows)
        try:
            with open(self.metrics, "a", newline="\n") as file:
                file.write(text)
            self.bytes += len(text)
        finally:
            os.truncate(self.metrics, self.bytes)  # no half row, though the disk may be full
        for step, _, row in self.rows:
            if self.wandb and step > self.sent:  # not before the run was resumed
                self.wandb.log({"global_step": step} | row)
        for x in {*self.videos.glob("s*[0-9].mp4")} - self.uploaded if self.wandb and rows else ():
            video = sys.modules["wandb"].Video(str(x))
            self.wandb.log({"global_step": max(step, self.sent), x.stem: video})
            self.uploaded.add(x)

    def log_episodes(self, global_step: int, info: dict):
        """Return and length of each episode that ended with this step, in the order of the envs."""
        for _, score, length in finished(info):
            row = {"charts/episodic_return": score, "charts/episodic_length": length}
            self.rows.append((global_step, time.time() - self.start_time, row))

    def check_finite(self, global_step: int, **data):
        """Stop before anything that is not finite is learned from, acted with or saved."""
        for name, value in data.items():
            if not np.isfinite(value).all():
                self.stop(f"{name} not finite at step {global_step}")

    def stop(self, message: str):
        """Fail, all files whole."""
        self.bar.close()
        self.envs.close()
        if self.metrics:  # of the first rank
            with contextlib.suppress(OSError):  # the disk may be full, or the folder gone
                (self.folder / "checkpoint.tmp").unlink(missing_ok=True)
                self.write()
        fail(f"{message}; last good checkpoint: {self.checkpoint or 'none yet'}")

    def end_iteration(self, iteration: int, global_step: int, metrics: dict):
        """Log, show the progress, a bar on a terminal, else plain lines; save now and then."""
        weights = nn.utils.get_total_norm(self.saved["agent"].parameters())
        self.check_finite(global_step, weights=weights.item())
        speed = int(global_step / (time.time() - self.start_time))
        metrics = {k: float(x) for k, x in metrics.items() if x is not None} | {"charts/SPS": speed}
        ranks = of_all_ranks((self.signal, self.rows, metrics))
        asked = max(number for number, _, _ in ranks)  # a signal that comes now: next time
        self.rows = sorted((row for _, rows, _ in ranks for row in rows), key=lambda row: row[0])
        returns = [row["charts/episodic_return"] for _, _, row in self.rows]
        self.last_returns = [*self.last_returns, *returns][-100:]
        means = {k: sum(x[k] for _, _, x in ranks) / len(ranks) for k in metrics}
        mean_return = sum(self.last_returns) / max(1, len(self.last_returns))
        means |= {"charts/mean_episodic_return": mean_return} if self.last_returns else {}
        self.rows.append((global_step, time.time() - self.start_time, means))
        if self.rank == 0:
            self.write()
        self.rows.clear()
        words = f"return {mean_return:.1f}" if self.last_returns else "return none yet"
        self.bar.set_postfix_str(words, refresh=False)
        self.bar.update(global_step - self.bar.n)
        last = iteration == self.args.num_iterations
        if self.bar.disable and (last or time.time() - self.last_line > 10):
            steps = f"{global_step:,} of {self.args.total_timesteps:,} steps"
            say(f"{steps}, {words}, {speed:,} steps/s")
            self.last_line = time.time()
        if last or asked or iteration % self.args.checkpoint_every == 0:
            if self.rank == 0:
                self.save_checkpoint(iteration)
            self.checkpoint = self.folder / "checkpoint.pt"
        if asked:
            self.signal = asked
            self.close()

    def save_checkpoint(self, iteration: int):
        """Atomic: whatever happens meanwhile, a complete checkpoint is there under its name."""
        args = {k: v for k, v in vars(self.args).items() if k not in OF_ONE_COMMAND}
        data = {"version": 1, "name": self.name, "iteration": iteration, "args": args}
        data |= {"seconds": time.time() - self.start_time, "last_returns": self.last_returns}
        data |= {"metrics_bytes": self.bytes, "global_step": iteration * self.args.batch_size}
        data |= {"wandb_id": self.wandb.id if self.wandb else self.wandb_id}
        data |= {k: x if torch.is_tensor(x) else x.state_dict() for k, x in self.saved.items()}
        with open(self.folder / "checkpoint.tmp", "wb") as file, open(self.metrics, "a") as rows:
            os.fsync(rows.fileno())  # what the checkpoint counts on
            torch.save(data, buffer := io.BytesIO())  # to a full disk it is no OSError
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, self.folder / "checkpoint.pt")

    def evaluate(self):
        """Whole games with what was saved, nothing is learned: a table, and eval.csv beside it."""
        N, E, envs = self.args.num_envs, self.args.eval_episodes, self.envs
        for name in {"obs_rms", "return_rms"} & vars(envs).keys():  # they stay as they are
            getattr(envs, name).update = lambda batch: None
        seeds = np.random.SeedSequence([self.args.seed, 0, 0, 1])  # of no rollout
        rng = np.random.default_rng(seeds)
        if self.args.deterministic:  # without noise, the mode
            rng = SimpleNamespace(gumbel=lambda size: 0.0, standard_normal=lambda size: 0.0)
        self.film([f"evaluation-{i}-" for i in range(min(N, E))])
        obs, _ = envs.reset(seed=seeds.generate_state(N).tolist())
        act, games = self.saved["agent"].rollout_policy(rng), []
        left, start = [E // N + (i < E % N) for i in range(N)], time.time()
        while any(left) and not self.signal:  # of each env as many, or short ones would count more
            obs, _, _, _, info = envs.step(act(obs))
            for i, score, length in finished(info):
                if left[i]:
                    left[i] -= 1
                    games.append((i, score, length))
        if any(left):
            return
        say(f"{E} episodes, {E / (time.time() - start):.2f} a second")
        for name, x in zip(("return", "length"), np.transpose(games)[1:], strict=True):
            numbers = (np.mean, np.std, np.median, np.min, np.max)
            say(f"{name:7}", *(f"{number.__name__} {number(x):.2f}" for number in numbers))
        header = "environment,episodic_return,episodic_length"
        np.savetxt(self.folder / "eval.csv", games, "%.9g", ",", header=header, comments="")

    def close(self):
        """The end of a run, its exit code that of the signal, if one asked for it."""
        self.bar.close()
        self.evaluate() if self.args.evaluate else say(f"written to {self.folder}")
        self.envs.close()
        if self.wandb:
            self.wandb.finish(exit_code=128 + self.signal if self.signal else 0)
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.signal and not self.args.evaluate:
            start = "python" if self.ranks == 1 else f"torchrun --nproc_per_node={self.ranks}"
            say(f"to go on: {start} {sys.argv[0]} --resume {str(self.folder)!r}")
        if self.signal:
            sys.exit(128 + self.signal)


def finished(info: dict):
    """Index, return and length of each episode that ended with a step."""
    if recorded := info.get("final_info", {}).get("recorded"):
        for i in np.flatnonzero(info["final_info"]["_recorded"]):
            yield int(i), float(recorded["r"][i]), int(recorded["l"][i])


def origin(device: torch.device) -> dict:
    """Where a run comes from: the machine, the versions, the commit, the script, the command."""
    import hashlib
    import platform
    import shlex
    import subprocess

    packages = ("torch", "gymnasium", "ale_py", "mujoco", "numpy")
    versions = {name: sys.modules[name].__version__ for name in packages if name in sys.modules}
    git = f"git -C {shlex.quote(str(Path(__file__).parent))} describe --always --dirty --abbrev=40"
    status, commit = subprocess.getstatusoutput(f"{git} --exclude='*'")  # whatever the tags
    where = {"device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu"}
    where |= {"cpus": os.cpu_count(), "platform": platform.platform()}
    where |= {"versions": {"ppo37": "0.1.0", "python": platform.python_version()} | versions}
    where |= {"git_commit": commit if status == 0 else None, "command": shlex.join(sys.argv)}
    return where | {"script_sha256": hashlib.sha256(Path(__file__).read_bytes()).hexdigest()}


if __name__ == "__main__":
    sys.path.insert(1, os.getcwd())  # --env-id module:id may be here
    if dist.is_torchelastic_launched():  # torchrun
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        sys.stdout = open(os.devnull, "w") if dist.get_rank() > 0 else sys.stdout
        if (local := int(os.environ["LOCAL_RANK"])) < torch.cuda.device_count():
            torch.cuda.set_device(local)
    check_args(args := parse_args(sys.argv[1:]))
    try:
        train(args)
        if dist.is_initialized():
            os._exit(0)  # else threads of gloo sometimes abort what has ended well
    except gym.error.Error as error:
        Run.now.stop(error) if Run.now else fail(error)
    except RuntimeError as error:
        if not re.search("gloo|NCCL", str(error)):
            raise
        Run.now.stop("another rank has ended")
    except OSError as error:  # a disk is full, a folder has gone
        Run.now.stop(f"{Run.now.folder} cannot be written to: {error}") if Run.now else fail(error)
