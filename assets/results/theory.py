"""What unpaired data adds in a linear world: worked out exactly, measured, and learned by a small network.

    python assets/results/theory.py              # a few seconds, then about two minutes of learning
    python assets/results/theory.py --seeds=0    # the exact part alone
    python assets/results/theory.py --seeds=8    # what the page of results shows

A sample of X is x = A_c theta_c + A_x theta_x + e with noise e ~ N(0, noise^2 I). A_c = shared (D, d) shows
theta_c, which Y shows too; A_x = private (D, p) shows theta_x, which we do not want to know (a nuisance). A
sample of Y is made likewise, with a nuisance of its own. No sample of X belongs to a sample of Y. Prints the
numbers and writes out/theory/theory.json and theory.png. The learned part is learned_world.py.
"""
import os
import sys

import numpy as np
import torch

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(os.path.dirname(HERE))]
from figures import draw_theory
from learned_world import LEARNED, learned_world
from prepare import UserError, at_least, exit_on_user_error, print_help, read_config, write_json

FOLDER = "out/theory"
KEYS = dict(seeds=(1, "seeds of the learned part (0: leave it out)", at_least(0)),
            repetitions=(100_000, "of the Monte Carlo estimate", at_least(2)))


def information(shared, private, noise):
    """Fisher information (d, d) that ONE sample gives about theta_c: j = I_cc - I_cx I_xx^+ I_xc.

    The blocks are I_cx = A_c' A_x / noise^2 and so on; subtracting removes what theta_x could explain as well
    (the Schur complement). N samples give N j. Two modalities share neither nuisance nor noise, hence
    J_{X,Y} = J_X + J_Y: never less than J_X in the Loewner order, and strictly more in every direction v
    with J_Y v != 0 (Gupta et al. 2025, section 3).
    """
    if not noise > 0:
        raise UserError(f"noise={noise} must be positive: without it one sample would say everything")
    project = np.eye(len(shared)) - private @ np.linalg.pinv(private)  # (D, D), removes the nuisance
    return shared.T @ project @ shared / noise**2


def exchange_rates(j_x, j_y):
    """What a Y sample is worth in X samples -> (rates (d,), the directions they hold for (d, d)).

    The directions solve j_Y v = rate j_X v. Both informations are diagonal there, so a ratio of informations
    is also one of variances. With S = j_X + j_Y and S^(-1/2) j_X S^(-1/2) = U mu U', v = S^(-1/2) u and
    rate = (1 - mu) / mu, which is infinite where X is blind (mu = 0).
    """
    value, vector = np.linalg.eigh(j_x + j_y)
    if value[0] < 1e-9 * value[-1]:
        unseen = np.round(vector[:, 0], 2).tolist()
        raise UserError(f"no modality sees the direction {unseen} of theta_c: nothing can estimate it")
    root = vector / np.sqrt(value) @ vector.T  # S^(-1/2)
    mu, u = np.linalg.eigh(root @ j_x @ root)
    mu = np.where(mu < 1e-9, 0, mu)
    with np.errstate(divide="ignore"):
        return (1 - mu) / mu, root @ u


def monte_carlo(sides, repetitions, seed=0):
    """Estimate theta_c by maximum likelihood, many times -> (squared error, its standard error).

    sides: [(shared, private, noise, N)]. The mean of N samples is all that matters of them. The estimate
    solves (sum J) theta = sum N A_c' M mean / noise^2, where M removes the nuisance. Its covariance is the
    Cramer-Rao bound (sum J)^-1, so the squared error, summed over d, should be the trace of that.
    """
    rng = np.random.default_rng(seed)
    truth = rng.normal(0, 1, sides[0][0].shape[1])  # (d,)
    total, score = 0, 0
    for shared, private, noise, n in sides:
        means = shared @ truth + private @ rng.normal(0, 1, private.shape[1])  # (D,)
        means = means + rng.normal(0, noise / n**0.5, (repetitions, len(shared)))  # (repetitions, D)
        project = np.eye(len(shared)) - private @ np.linalg.pinv(private)
        total = total + n * information(shared, private, noise)
        score = score + n * means @ project @ shared / noise**2  # (repetitions, d)
    squares = ((score @ np.linalg.inv(total) - truth) ** 2).sum(1)
    return squares.mean(), squares.std() / repetitions**0.5


def best_rate(strength, noise_x, noise_y, width=4, private=3, draws=20):
    """The largest rate where X shows one direction with this strength; geometric mean over random worlds."""
    rng, logs = np.random.default_rng(1), []
    weak = np.where(np.arange(width) < width - 1, 1, strength)
    for _ in range(draws):
        x, x_own, y, y_own = (rng.normal(0, 1, (24, k)) for k in (width, private, width, private))
        rates, _ = exchange_rates(information(x * weak, x_own, noise_x), information(y, y_own, noise_y))
        logs.append(np.log(rates.max()))
    return float(np.exp(np.mean(logs)))


def exact_theory(repetitions):
    """Bounds, blind directions and exchange rates of one small linear world, in float64; prints them."""
    rng, directions, observed, nuisances, noise = np.random.default_rng(0), 6, 12, 3, 0.5
    n_x, n_y = 200, 200
    widths = (nuisances, nuisances, directions, directions)
    a_x, b_y, b_c, full = (rng.normal(0, 1, (observed, width)) for width in widths)
    weak = np.array([1, 1, 0.5, 0.2, 0.05, 0.0])  # how strongly X shows each direction
    a_c = full * weak
    j_x, j_y = information(a_c, a_x, noise), information(b_c, b_y, noise)  # (6, 6)
    print(f"theta_c has {directions} directions; X shows them with strengths {weak.tolist()}, Y in full; "
          f"{n_x} samples of either, noise {noise}")
    gain = np.linalg.eigvalsh(n_y * j_y)  # J_XY - J_X, since informations of independent samples add up
    print(f"1. J_XY - J_X has eigenvalues from {gain[0]:.1f} to {gain[-1]:.1f}: all positive, so adding Y "
          "helps in every direction")

    # the five directions that X sees at all
    x_seen, y_seen = (a_c[:, :5], a_x, noise), (b_c[:, :5], b_y, noise)

    def bound(n, y):
        """Trace of the Cramer-Rao bound with n samples of X and y of Y."""
        return np.trace(np.linalg.inv(n * information(*x_seen) + y * information(*y_seen)))

    traces = []
    for label, n, y in (("X alone", n_x, 0), ("Y alone", 0, n_y), ("X and Y, unpaired", n_x, n_y)):
        sides = [(*side, count) for side, count in ((x_seen, n), (y_seen, y)) if count]
        measured, error = monte_carlo(sides, repetitions)
        traces.append(dict(data=label, bound=bound(n, y), measured=measured, error=error))
        print(f"   {label:18} trace of the covariance: Cramer-Rao {bound(n, y):.5f}, "
              f"measured {measured:.5f} +- {error:.5f}")

    print("2. information about the worst direction: no number of X samples identifies what X is blind to")
    blind = []
    for n in (10, 1000, 100000):
        alone = float(np.linalg.eigvalsh(n * j_x)[0])
        both = float(np.linalg.eigvalsh(n * j_x + n_y * j_y)[0])
        blind.append(dict(n_x=n, x_alone=alone, x_and_y=both))
        print(f"   N_x = {n}: {abs(alone):.1g} from X alone, {both:.3g} with {n_y} Y")

    rates, _ = exchange_rates(j_x, j_y)
    shown = ["unbounded" if np.isinf(rate) else f"{rate:.3g}" for rate in rates]
    print("3. one Y sample is worth this many X samples, along each generalised eigenvector: "
          + ", ".join(shown))
    strengths = np.geomspace(0.02, 1, 25)
    curves = {noise_y: [best_rate(strength, noise, noise_y) for strength in strengths]
              for noise_y in (0.25, 0.5, 1.0)}
    slope = np.polyfit(np.log(strengths[:8]), np.log(curves[0.5][:8]), 1)[0]
    print(f"   the best rate grows as strength^{slope:.2f}; quieter Y is worth more")
    budget = list(range(0, 401, 25))
    return dict(traces=traces, loewner_gain=[gain[0], gain[-1]], blind=blind, slope=slope, budget=budget,
                variance={n: [bound(n, y) for y in budget] for n in (50, 200)},
                strengths=strengths.tolist(), curves=curves,
                exchange_rates=[None if np.isinf(rate) else rate for rate in rates])


def theory(argv):
    cfg = read_config(argv, KEYS)
    os.makedirs(FOLDER, exist_ok=True)
    torch.set_num_threads(1)
    out = dict(kind="theory", exact=exact_theory(cfg["repetitions"]), learned={})
    for arm, setting in LEARNED.items() if cfg["seeds"] else ():
        runs = [learned_world(seed=seed, **setting) for seed in range(cfg["seeds"])]
        out["learned"][arm] = dict(runs=runs)
        r2, clear, error = (np.mean([run[key] for run in runs]) for key in ("r2", "r2_clear", "error"))
        counts = f"{setting['n_x']:,} x + {setting['n_y']:,} y"
        print(f"4. {arm:12} {counts}: R^2 of the shared latents {r2:.3f} as trained, {clear:.3f} on x "
              f"without attenuation, which is rebuilt with error {error:.2f}", flush=True)
    draw_theory(os.path.join(FOLDER, "theory.png"), out)
    write_json(os.path.join(FOLDER, "theory.json"), out)
    print(f"wrote theory.png and theory.json in {FOLDER}")
    return out


def main():
    if "--help" in sys.argv:
        print_help(__doc__, KEYS)
    else:
        theory(sys.argv[1:])


if __name__ == "__main__":
    exit_on_user_error(main)
