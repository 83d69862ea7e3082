"""The update of PPO once more, in float64 numpy, to compare the scripts with.

It shares no line with them and knows neither torch nor automatic differentiation: advantages are
the sum that defines them, gradients are written out. Whatever is random comes from the caller.

Parameters are a dict of arrays by torch's names, actor.0.weight [64, obs_dim], actor.0.bias [64]
and so on; with log_std [K] the policy is a normal distribution, without it a categorical one.
`args` has the hyperparameters by the names the scripts give them. Papers and notation (T, N, M)
are those of the scripts.
"""

import numpy as np

LAYERS = ("0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias")


def forward(params, network, x):
    """x [M, inputs] -> activations x, h1 [M, 64], h2 [M, 64], y [M, outputs]

    h1 = tanh(W1 x + b1)    h2 = tanh(W2 h1 + b2)    y = W3 h2 + b3
    """
    W1, b1, W2, b2, W3, b3 = (params[f"{network}.{name}"] for name in LAYERS)
    h1 = np.tanh(x @ W1.T + b1)
    h2 = np.tanh(h1 @ W2.T + b2)
    return x, h1, h2, h2 @ W3.T + b3


def backward(params, network, activations, dy):
    """The derivatives of a loss by the parameters from dy [M, outputs], those by the output.

    With z the argument of tanh and tanh' = 1 - tanh^2, layer by layer from the last to the first.
    """
    x, h1, h2, _ = activations
    dz2 = dy @ params[f"{network}.4.weight"] * (1 - h2**2)
    dz1 = dz2 @ params[f"{network}.2.weight"] * (1 - h1**2)
    gradients = (dz1.T @ x, dz1.sum(0), dz2.T @ h1, dz2.sum(0), dy.T @ h2, dy.sum(0))
    return {f"{network}.{name}": g for name, g in zip(LAYERS, gradients, strict=True)}


def categorical(logits, actions):
    """logits z [M, n], actions [M] -> log pi(a) [M], S [M] and their derivatives by z [M, n]

    log pi(a) = z_a - log sum_j exp(z_j)       d log pi(a) / d z_j = 1[j = a] - pi_j
    S         = - sum_j pi_j log pi_j          d S / d z_j         = - pi_j (log pi_j + S)
    """
    z = logits - logits.max(axis=1, keepdims=True)
    log_pi = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
    pi = np.exp(log_pi)
    entropy = -(pi * log_pi).sum(axis=1)
    chosen = np.eye(logits.shape[1])[actions]
    return (log_pi * chosen).sum(axis=1), entropy, chosen - pi, -pi * (log_pi + entropy[:, None])


def normal(mean, log_std, actions):
    """mean, actions [M, K], log_std [K] -> log pi(a) [M], S [M], and the derivatives of log pi(a)
    by the mean and by log_std, each [M, K]. Those of S are 0 and 1.

    log pi(a) = sum_k - (a_k - mean_k)^2 / (2 std_k^2) - log std_k - log(2 pi) / 2
    S         = sum_k log std_k + (1 + log(2 pi)) / 2
    """
    std = np.exp(log_std)
    error = (actions - mean) / std
    logprobs = (-(error**2) / 2 - log_std - np.log(2 * np.pi) / 2).sum(axis=1)
    entropy = (log_std + (1 + np.log(2 * np.pi)) / 2).sum()
    return logprobs, np.full(len(mean), entropy), error / std, error**2 - 1


def policy(params, outputs, actions):
    """What the actor's outputs [M, n] say of actions [M] or [M, K]: log pi(a|s) [M], S [M], their
    derivatives by the outputs and that of log pi(a|s) by log_std, 0 where there is none.
    """
    if "log_std" not in params:
        return *categorical(outputs, actions), 0.0
    logprobs, entropy, by_mean, by_log_std = normal(outputs, params["log_std"], actions)
    return logprobs, entropy, by_mean, 0.0, by_log_std


def advantages_and_returns(rewards, values, dones, gamma, gae_lambda):
    """rewards, dones [T, N], values [T + 1, N] -> advantages, value targets, each [T, N]

    delta_t = r_t + gamma V(s_{t+1}) - V(s_t)             [PPO] equation 12
    A_t     = sum_{k >= 0} (gamma lambda)^k delta_{t+k}   [PPO] equation 11, [GAE] equation 16
    R_t     = A_t + V(s_t)

    V and the sum end with the episode.
    """
    deltas = rewards + gamma * values[1:] * (1 - dones) - values[:-1]
    advantages = np.zeros_like(deltas)
    for t in range(len(deltas)):
        weights = np.ones(deltas.shape[1])
        for k in range(t, len(deltas)):
            advantages[t] += weights * deltas[k]
            weights = weights * gamma * gae_lambda * (1 - dones[k])
    return advantages, advantages + values[:-1]


def objective(logprobs, entropy, values, minibatch, args):
    """The negated objective of [PPO] equation 9 from log pi(a|s), S and V(s), each [M].

        L = - mean_i min(r_i A_i, clip(r_i, 1 - eps, 1 + eps) A_i)
            + c1 mean_i max((V_i - R_i)^2, (V_old_i + clip(V_i - V_old_i, -eps, eps) - R_i)^2) / 2
            - c2 mean_i S_i

    minibatch: each [M], log pi_old(a|s), V_old(s), A and R. A is normalized to mean 0 and standard
    deviation 1 with args.norm_adv; without args.clip_vloss the value loss is (V_i - R_i)^2 / 2.
    -> the derivatives by log pi(a|s) and by V(s), each [M], statistics
    """
    old_logprobs, old_values, advantages, returns = minibatch
    M, eps = len(values), args.clip_coef

    normalized = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    A = normalized if args.norm_adv else advantages
    ratio = np.exp(logprobs - old_logprobs)
    plain, clipped = ratio * A, np.clip(ratio, 1 - eps, 1 + eps) * A
    policy_loss = -np.minimum(plain, clipped).mean()
    by_logprob = -np.where(plain <= clipped, plain, 0.0) / M  # d r / d log pi = r

    moved = values - old_values
    near = old_values + np.clip(moved, -eps, eps) if args.clip_vloss else values
    plain, clipped = values - returns, near - returns
    value_loss = np.maximum(plain**2, clipped**2).mean() / 2
    stopped = (np.abs(moved) > eps) & (clipped**2 > plain**2)
    by_value = args.vf_coef * np.where(stopped, 0.0, plain) / M

    stats = {
        "loss": policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy.mean(),
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "entropy": entropy.mean(),
        "old_approx_kl": np.mean(old_logprobs - logprobs),
        "approx_kl": np.mean(ratio - 1 - np.log(ratio)),
        "clipfrac": np.mean(np.abs(ratio - 1) > eps),
        "value_clipfrac": np.mean(stopped),
    }
    return by_logprob, by_value, stats


def loss_gradients(params, minibatch, args):
    """The derivatives of the objective by all parameters.

    minibatch: obs [M, obs_dim], actions [M] or [M, K] and what `objective` takes
    -> gradients, statistics
    """
    obs, actions, *data = minibatch
    actor, critic = forward(params, "actor", obs), forward(params, "critic", obs)
    logprobs, entropy, *derivatives = policy(params, actor[-1], actions)
    by_output, entropy_by_output, by_log_std = derivatives
    by_logprob, by_value, stats = objective(logprobs, entropy, critic[-1][:, 0], data, args)
    by_output = by_logprob[:, None] * by_output - args.ent_coef * entropy_by_output / len(obs)
    gradients = backward(params, "actor", actor, by_output)
    gradients |= backward(params, "critic", critic, by_value[:, None])
    if "log_std" in params:
        gradients["log_std"] = (by_logprob[:, None] * by_log_std).sum(0) - args.ent_coef
    stats["grad_norm"] = np.sqrt(sum((g**2).sum() for g in gradients.values()))
    return gradients, stats


class Adam:
    """Kingma and Ba 2015, algorithm 1, with epsilon 1e-5.

    m = b1 m + (1 - b1) g                  v = b2 v + (1 - b2) g^2
    theta = theta - lr m' / (sqrt(v') + epsilon), m' = m / (1 - b1^t), v' = v / (1 - b2^t)
    """

    def __init__(self, params):
        self.t = 0
        self.m = {name: np.zeros_like(value) for name, value in params.items()}
        self.v = {name: np.zeros_like(value) for name, value in params.items()}

    def step(self, params, gradients, lr):
        """-> new parameters"""
        b1, b2, new = 0.9, 0.999, {}
        self.t += 1
        for name, g in gradients.items():
            self.m[name] = b1 * self.m[name] + (1 - b1) * g
            self.v[name] = b2 * self.v[name] + (1 - b2) * g**2
            m, v = self.m[name] / (1 - b1**self.t), self.v[name] / (1 - b2**self.t)
            new[name] = params[name] - lr * m / (np.sqrt(v) + 1e-5)
        return new


def train(params, obs, actions, rewards, dones, permutations, args):
    """All updates of a run in I iterations; yields parameters and statistics after each of them.

    obs [I T + 1, N, obs_dim], actions [I T, N] or [I T, N, K], rewards, dones [I T, N] are what
    the environments saw and answered, permutations [I, epochs, T N] the orders of the samples.
    """
    adam, T = Adam(params), args.num_steps
    for i in range(len(permutations)):
        lr = args.learning_rate * (1 - i / len(permutations))  # annealed to 0
        now = slice(i * T, (i + 1) * T)
        visited, chosen = np.concatenate(obs[now]), np.concatenate(actions[now])
        logprobs, *_ = policy(params, forward(params, "actor", visited)[-1], chosen)
        values = forward(params, "critic", obs[i * T : (i + 1) * T + 1])[-1][..., 0]
        data = rewards[now], values, dones[now], args.gamma, args.gae_lambda
        targets = [x.ravel() for x in advantages_and_returns(*data)]
        batch = (visited, chosen, logprobs, values[:-1].ravel(), *targets)
        for permutation in permutations[i]:
            for indices in np.split(permutation, args.num_minibatches):
                minibatch = [x[indices] for x in batch]
                gradients, stats = loss_gradients(params, minibatch, args)
                factor = min(1.0, args.max_grad_norm / (stats["grad_norm"] + 1e-6))
                gradients = {name: g * factor for name, g in gradients.items()}
                params = adam.step(params, gradients, lr)
                yield params, stats
