"""How many words is an image worth? Train a grid of two example counts and fit what one buys of the other.

    python assets/results/exchange.py sample_configs/letters_text.py --unseen_classes=0 --seeds=3 \\
        '--image_examples=[564,1128,2256]' '--text_examples=[0,141,564,3943]'
    python assets/results/exchange.py --help

Takes exactly two lists, one of the target and one of an auxiliary; every other key is as in train.py, and
seeds, first_seed and jobs as in `probe.py compare`. Each cell of the grid is trained with every seed; when
the command is repeated, finished runs are read back. Into out_dir: exchange.json and exchange.png.
"""
import itertools
import json
import os
import shlex
import sys

import numpy as np
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
from prepare import (UserError, exit_on_user_error, load_bpe, load_split, prepare, print_help, read_meta,
                     write_json)
from probe import COMPARE_KEYS, auxiliaries_of, figure, own_keys, quiet, run_all, score_of
from train import KEYS, open_slots, read_run_config, resolve

OWN_KEYS = {key: COMPARE_KEYS[key] for key in ("seeds", "first_seed", "jobs")}


def fit_exchange(n_x, n_y, scores):
    """Fit score = b0 + b1 log(n_x + rho n_y^gamma) with b1 > 0 -> dict(rho, gamma, b0, b1, residual).

    n_x, n_y, scores: (k,) of the grid's cells. One y counts as rho x, and less the more there are if
    gamma < 1. Every gamma and rho of a fine grid is tried, b0 and b1 follow by least squares; residual is the
    root mean square error. In the linear world of theory.py the variance along one direction is
    1 / (n_x j_x + n_y j_y), so there gamma = 1 and rho = j_y / j_x exactly.
    """
    best = None
    for gamma in (1.0, 0.75, 0.5, 0.35, 0.25):
        for rho in np.concatenate([[0.0], np.geomspace(1e-5, 1e4, 181)]):
            design = np.stack([np.ones(len(n_x)), np.log(n_x + rho * n_y**gamma)], 1)  # (k, 2)
            (b0, b1), *_ = np.linalg.lstsq(design, scores, rcond=None)
            error = float(np.sqrt(np.mean((design @ (b0, b1) - scores) ** 2)))
            # of two equally good fits the earlier stays: gamma = 1, and the smaller rho
            if b1 > 0 and (best is None or error < best["residual"] * (1 - 1e-9)):
                best = dict(rho=float(rho), gamma=gamma, b0=float(b0), b1=float(b1), residual=error)
    if best is None:
        raise UserError("more examples never scored better on this grid: there is no exchange rate to fit")
    return best


def mean_words(cfg, slot):
    """Words in a training item of a text slot, on average; None for other modalities."""
    folder = prepare(cfg, slot, say=quiet)
    if "vocab" not in read_meta(folder):
        return None
    train, bpe = load_split(folder, "train"), load_bpe(folder)
    tokens = train["tokens"][np.arange(min(1000, len(train["tokens"])))]  # (n, T)
    texts = [bpe.decode(row[:length].tolist()) for row, length in zip(tokens, train["lengths"])]
    return float(np.mean([len(text.split()) for text in texts]))


def read_grid(argv):
    """The command line -> (config, own keys, the target's key, its values, the auxiliary's key, values)."""
    lists = dict(arg[2:].split("=", 1) for arg in argv if arg.startswith("--") and "=[" in arg)
    others = [arg for arg in argv if "=[" not in arg]
    cfg = read_run_config(others, dict(KEYS, **OWN_KEYS))
    own = own_keys(cfg)
    x_key = f"{cfg['target']}_examples"
    y_keys = {f"{slot}_examples" for slot in auxiliaries_of(cfg)}
    if len(lists) != 2 or x_key not in lists or not lists.keys() & y_keys:
        raise UserError(f"exchange takes exactly two lists, --{x_key}=[200,...] and "
                        "--SLOT_examples=[0,1000,...] of an auxiliary")
    (y_key,) = lists.keys() - {x_key}
    try:
        x, y = (sorted({int(value) for value in lists[key].strip("[]").split(",")}) for key in (x_key, y_key))
    except ValueError:
        raise UserError(f"the lists of exchange must hold whole numbers, found {lists}") from None
    if len(x) < 3 or len(y) < 2 or x[0] < 1 or y[0] < 0:
        raise UserError(f"no grid to fit: {x_key} needs three values above 0, {y_key} two of at least 0 (a "
                        f"number for 'all'), found {x} and {y}")
    return cfg, own, x_key, x, y_key, y


def exchange(argv):
    """Train the grid, fit it, print and write what an example of one is worth in the other."""
    cfg, own, x_key, counts_x, y_key, counts_y = read_grid(argv)
    cells = list(itertools.product(counts_x, counts_y))
    runs = [dict(cfg, **{x_key: x, y_key: y, "seed": seed}) for x, y in cells for seed in own["seeds"]]
    open_slots(resolve(runs[-1]), say=quiet)  # refuses too many examples now, not hours later
    with tqdm(total=len(runs), unit="run") as bar:
        results = run_all(runs, os.path.join(cfg["out_dir"], "compare"), own["jobs"], bar)
    split = "test" if cfg["score_test"] else "val"
    scores = np.array([score_of(result, split) for result in results]).reshape(len(cells), -1)
    path = os.path.join(cfg["out_dir"], "exchange.json")
    out = dict(kind="exchange", cells=cells, scores=scores.tolist(),
               command=shlex.join(["python", "assets/results/exchange.py", *argv]))
    write_json(path, out)  # what was measured stays, also where no fit is found

    n_x, n_y = np.array(cells, float).T
    means = scores.mean(1)  # (cells,)
    fit = fit_exchange(n_x, n_y, means)
    # what one more y is worth depends on how many there are: said for the middle of the grid
    middle = float(np.median(n_y[n_y > 0]))
    rate = fit["rho"] * fit["gamma"] * middle ** (fit["gamma"] - 1)
    words = mean_words(cfg, y_key.removesuffix("_examples"))
    explained = 1 - fit["residual"] ** 2 / means.var()
    out.update(fit=fit, at=middle, rate=rate, words_per_item=words, explained=explained)
    print(f"score = {fit['b0']:.3f} + {fit['b1']:.3f} log({x_key} + {fit['rho']:.3g} {y_key}^{fit['gamma']})"
          f", residual {fit['residual']:.4f}, {explained:.0%} of the variance explained")
    if explained < 0.9:
        print("warning: the grid does not follow this law, so the rate below means little")
    print(f"at {middle:,.0f} {y_key}, one of them is worth {rate:.3g} {x_key}")
    if words and rate:
        print(f"one {cfg['target']} example is worth {words / rate:,.0f} words")
    write_json(path, out)
    draw_exchange(os.path.join(cfg["out_dir"], "exchange.png"), cells, means, fit, x_key, y_key)
    return out


def draw_exchange(path, cells, means, fit, x_key, y_key):
    """The fitted surface as curves of equal score, the measured means as numbers."""
    n_x, n_y = np.array(cells, float).T
    grid_x = np.geomspace(n_x.min(), n_x.max(), 60)
    grid_y = np.linspace(0, n_y.max(), 60)
    counted = grid_x[None] + fit["rho"] * grid_y[:, None] ** fit["gamma"]  # (60, 60), in examples of x
    surface = fit["b0"] + fit["b1"] * np.log(counted)
    with figure(path, 6, 4.2) as (_, ax):
        ax.clabel(ax.contour(grid_x, grid_y, surface, levels=8, cmap="viridis"), fontsize=7)
        for (x, y), mean in zip(cells, means):
            ax.annotate(f"{mean:.3f}", (x, y), fontsize=7, ha="center")
        ax.set(xscale="log", xlabel=x_key, xlim=(n_x.min() / 1.3, n_x.max() * 1.3))
        ax.set(ylabel=y_key, ylim=(-0.06 * n_y.max(), 1.06 * n_y.max()))
        ax.set_title("curves of equal score of the fit; measured means as numbers", fontsize=9)
        ax.set_xticks(np.unique(n_x), [f"{n:,.0f}" for n in np.unique(n_x)])
        ax.minorticks_off()


def main():
    if "--help" in sys.argv or len(sys.argv) == 1:
        print_help(__doc__, OWN_KEYS, "Keys besides those of train.py:")
    else:
        print(json.dumps(exchange(sys.argv[1:])))


if __name__ == "__main__":
    exit_on_user_error(main)
