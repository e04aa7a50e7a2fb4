"""Do two modalities pull the trunk the same way, and does it change while it learns? For uml and control.

    python assets/results/gradients.py sample_configs/numbers_audio_text.py --threads=1
    python assets/results/gradients.py sample_configs/letters_text.py --threads=1 --seed=1

A run stops at the end of its warm start and ten times after it, and goes on. At each stop the gradients of
the target and of each auxiliary are compared on every block of the trunk, as sharing.py does for a finished
run: their cosine, and that of every slot with itself, which is the most that noise allows. Into out_dir:
gradients.json and gradients.png.
"""
import os
import sys

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(os.path.dirname(HERE))]
import train
from prepare import UserError, exit_on_user_error, print_help, tell, write_json
from probe import figure, quiet
from sharing import slots_agreement

POINTS = 10  # stops after the warm start, evenly spaced


def look(cfg):
    """The gradients of a run that stopped -> slots_agreement(): at its first weights and at those it has now.

    UserError where it is past the stop: an earlier call went on, and these weights are not of that step.
    """
    model, checkpoint = train.load_model(os.path.join(cfg["out_dir"], "last.pt"))
    if checkpoint["step"] != cfg["stop_after"]:
        raise UserError(f"{cfg['out_dir']} holds a run at step {checkpoint['step']}, {cfg['stop_after']} is "
                        "wanted: delete it, or choose another --out_dir")
    slots, classes = train.open_slots(checkpoint["config"], quiet)
    return slots_agreement(model, slots, checkpoint["config"], classes)


def follow(cfg):
    """Train one run and look at every stop -> ([step, ...], {pair of slots: [[cosine of a block ...] ...]}).

    Both lists begin with step 0, the fresh weights.
    """
    warm, steps, found = cfg["warm_start_steps"], [0], {}
    for k in range(POINTS + 1):
        stop = max(1, warm + cfg["steps"] * k // POINTS)  # without a warm start the first stop is step 1
        cfg = dict(cfg, stop_after=stop, resume=True)
        train.train_config(cfg, quiet)
        steps.append(stop)
        for pair, states in look(cfg).items():
            found.setdefault(pair, [states["fresh"]]).append(states["best"])
        shown = [f"{pair} {np.mean(values[-1]):+.2f}" for pair, values in found.items()]
        tell(f"{cfg['out_dir']}, step {stop}: {', '.join(shown)}")
    return steps, found


def draw(path, out):
    """A panel an arm: each pair of slots over the steps, mean over blocks; dashed: the warm start ends."""
    with figure(path, 10, 3.4, ncols=2, sharey=True) as (_, axes):
        for ax, (arm, found) in zip(axes, out["arms"].items()):
            for i, (pair, values) in enumerate(found.items()):
                ax.plot(out["steps"], np.mean(values, 1), "os^Dv"[i % 5] + "-", label=pair)
            ax.axvline(out["warm_start_steps"], color="grey", ls="--", lw=1)
            ax.axhline(0, color="grey", ls=":", lw=1)
            ax.set(title=arm, xlabel="step, warm start included", ylim=(-1.05, 1.05))
        axes[0].set_ylabel("cosine of gradients")
        axes[0].legend(fontsize=8)


def main():
    argv = sys.argv[1:]
    if "--help" in argv:
        return print_help(__doc__, {}, "Its keys are those of train.py.")
    cfg = train.read_run_config(argv)
    out = dict(kind="gradients", command="python assets/results/gradients.py " + " ".join(argv), arms={},
               seed=cfg["seed"], warm_start_steps=cfg["warm_start_steps"])
    for arm in ("uml", "control"):
        folder = os.path.join(cfg["out_dir"], arm)
        out["steps"], out["arms"][arm] = follow(dict(cfg, control=arm == "control", out_dir=folder))
    write_json(os.path.join(cfg["out_dir"], "gradients.json"), out)
    draw(os.path.join(cfg["out_dir"], "gradients.png"), out)
    tell(f"wrote gradients.json and gradients.png in {cfg['out_dir']}")


if __name__ == "__main__":
    exit_on_user_error(main)
