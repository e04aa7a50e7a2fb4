"""The figures that make.py draws: all regimes, curves of some, what letters_text.py learns from, the theory.

    python assets/results/make.py    # draws them all

Result means what a compare.json holds.
"""
import math
import textwrap

import numpy as np

from learned_world import LEARNED
from prepare import PREPARE_KEYS, SOURCES, read_config
from probe import figure, short_source, show_auxiliaries


def per_class(result):
    """Labelled target examples for each class that has some."""
    unseen = result.get("unseen_classes", result.get("config", {}).get("unseen_classes", 0))
    return result["examples"] / (round(1 / result["chance"]) - unseen)


def draw_curve(path, results):
    """Accuracy against labelled examples a class, a line an arm: what unpaired data saves is the distance."""
    first = results[0]
    with figure(path, 6, 3.8) as (_, ax):
        for arm, style in (("alone", "C0-"), ("uml", "C1--"), ("control", "C2:")):
            points = []
            for result in results:
                if entry := result["arms"].get(arm):
                    points.append((per_class(result), entry["mean"], entry["half"] or 0))
            ax.errorbar(*zip(*points), fmt=style, marker="o", ms=4, capsize=3, label=arm)
        ax.axhline(first["chance"], ls=":", color="grey", lw=1)
        ax.set(xscale="log", xlabel="labelled examples a class", ylabel="test accuracy", ylim=(0, None))
        ax.set_title(f"{short_source(first['target'])} with {show_auxiliaries(first)}", fontsize=9)
        ticks = sorted({per_class(result) for result in results})
        ax.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
        ax.minorticks_off()
        ax.legend()


MARKS = dict(alone="C0o", uml="C1s", control="C2^", convnet="C7D", nearest="C4v")  # of an arm in a summary


def draw_summary(path, rows):
    """A line a regime: its arms with 95% intervals, a bar from alone to uml, the verdict at the right.

    rows: [(title, {arm: {"mean", "half"}}, verdict)].
    """
    with figure(path, 9, 0.9 + 0.36 * len(rows)) as (_, ax):
        for i, (title, arms, verdict) in enumerate(rows):
            ends = [100 * arms[arm]["mean"] for arm in ("alone", "uml")]
            ax.plot(ends, [i, i], color="0.85", lw=6, zorder=0, solid_capstyle="butt")
            for j, (arm, mark) in enumerate(MARKS.items()):
                if entry := arms.get(arm):
                    # a little above or below the line, so that intervals do not hide each other
                    mean, half = 100 * entry["mean"], 100 * (entry["half"] or 0)
                    ax.errorbar(mean, i + 0.12 * (j - 2), xerr=half, fmt=mark, ms=4, capsize=2, lw=1)
            ax.text(1.01, i, verdict, transform=ax.get_yaxis_transform(), va="center", fontsize=8)
        for arm, mark in MARKS.items():
            ax.plot([], [], mark, label=dict(convnet="ConvNet", nearest="nearest neighbour").get(arm, arm))
        ax.set_yticks(range(len(rows)), [title for title, *_ in rows], fontsize=8)
        ax.set(xlabel="accuracy in %, with 95% intervals", xlim=(0, 100), ylim=(len(rows) - 0.5, -0.5))
        ax.grid(axis="x", color="0.9")
        ax.set_axisbelow(True)
        ax.legend(ncols=len(MARKS), fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)


# What modalities share, from nothing to the whole trunk: {arm: its name in the figure}. Nothing is shared by
# alone, which learns bit for bit what share="none" does.
DOSES = dict(alone="nothing", apart="label head", norms="+ norms", attention="+ attention",
             feedforward="+ feed-forward", added="+ added W'", uml="+ trunk")


def draw_doses(path, rows):
    """Accuracy by what is shared, a panel a regime. rows: (title, result, its controls or None) of each."""
    with figure(path, 9.2, 3.6 * math.ceil(len(rows) / 2), ncols=2, nrows=math.ceil(len(rows) / 2),
                squeeze=False) as (_, axes):
        for ax, (title, result, control) in zip(axes.flat, rows):
            for found, style, label in ((result, "C1o", "uml"), (control, "C2^", "control")):
                for i, arm in enumerate(DOSES if found else []):
                    if arm == "alone" and found is control:
                        continue  # nothing shared: no control
                    entry, named = found["arms"][arm], label if arm == "uml" else None
                    mean, half = 100 * entry["mean"], 100 * (entry["half"] or 0)
                    ax.errorbar(i, mean, half, fmt=style, ms=5, capsize=3, label=named)
            ax.axhline(100 * result["arms"]["alone"]["mean"], ls=":", color="grey", lw=1)
            ax.set_xticks(range(len(DOSES)), DOSES.values(), rotation=30, ha="right", fontsize=8)
            ax.set(ylabel="accuracy in %, with 95% intervals", ylim=(0, None))
            ax.set_title(title, fontsize=9)
            ax.legend(fontsize=8)
        for ax in axes.flat[len(rows):]:
            ax.axis("off")


def draw_letters(path):
    """Pictures above, texts below, of other letters: what the two slots of letters_text.py learn from."""
    cfg = read_config([], PREPARE_KEYS)
    pictures, texts = (SOURCES["letters"][0](cfg, modality, "") for modality in ("image", "text"))
    rng = np.random.default_rng(3)
    shown = rng.permutation(len(pictures["items"]))[:40]
    told = rng.permutation(len(texts["items"]))[:12]
    with figure(path, 10, 3.3, nrows=2, height_ratios=(0.62, 1)) as (_, (above, below)):
        # two rows of twenty pictures side by side, as one picture
        scans = [pictures["make"](pictures["items"][item]) for item in shown]
        rows = [np.concatenate(scans[i:i + 20], 1) for i in (0, 20)]
        above.imshow(np.concatenate(rows, 0), cmap="gray", vmin=0, vmax=255)
        above.set_title("pictures: scans of typefaces, each with a label", fontsize=10)
        below.set_title("text: what the Unicode database says of letters, each with a label", fontsize=10)
        for i, document in enumerate(texts["items"][told]):
            line, column = divmod(i, 2)
            words = textwrap.shorten(document, 62, placeholder=" ...")
            below.text(0.02 + 0.5 * column, 0.92 - 0.17 * line, words, fontsize=8, family="monospace",
                       va="top")
        above.axis("off")
        below.axis("off")


PANELS = {  # of what is learned, each against its own alone: what the panel is called, and its arms
    "ReLU, as many y as x": ("alone", "longer", "uml", "control"),
    "ReLU, nine y an x": ("alone", "uml 1:9", "control 1:9"),
    "no ReLU, as many y as x": ("alone linear", "uml linear", "control linear"),
}
COLORS = dict(alone="C0", uml="C1", control="C2", longer="C3")  # by the first word of an arm


def draw_theory(path, out):
    """Above: variance against Y samples, exchange rate against strength, R^2 against units that never bend.
    Below: the error of the learned arms over training, where there are any."""
    exact, learned = out["exact"], out["learned"]
    with figure(path, 12, 6.6 if learned else 3.5, nrows=2 if learned else 1, ncols=3) as (_, axes):
        left, middle, right = axes.flat[:3]
        for n, values in exact["variance"].items():
            left.plot(exact["budget"], values, label=f"{n} X samples")
        left.set(xlabel="unpaired Y samples", ylabel="bound on the variance (trace)", yscale="log")
        for noise, values in exact["curves"].items():
            middle.loglog(exact["strengths"], values, label=f"noise of Y {noise}")
        middle.axhline(1, color="grey", lw=0.8, ls=":")
        middle.set(xlabel="strength with which X shows the direction", ylabel="X samples a Y sample is worth")
        if not learned:
            right.axis("off")
        for arm, entry in learned.items():
            kind = arm.split()[0]
            if LEARNED[arm].get("relu", True):  # without ReLU no unit is ever off
                aside = 0.02 * list(COLORS).index(kind) - 0.03  # or arms would hide each other
                places = np.array([(run["always_on"] + aside, run["r2"]) for run in entry["runs"]])
                right.plot(*places.T, "o", ms=3, color=COLORS[kind], label=kind if arm == kind else None)
        right.set(xlabel="share of units on for nearly all x, ReLU", ylabel="R² of the shared latents")
        for ax, (title, arms) in zip(axes.flat[3:], PANELS.items()):
            for arm in arms:
                errors, kind = np.mean([run["errors"] for run in learned[arm]["runs"]], 0), arm.split()[0]
                ax.plot(500 * np.arange(len(errors)), errors, color=COLORS[kind], label=kind)
            ax.set(xlabel="steps", ylim=(0, None))
            ax.set_title(title, fontsize=10)
        if learned:
            axes[1, 0].set_ylabel("error on x without attenuation")
        for ax in axes.flat:
            if ax.lines:
                ax.legend(fontsize=8)
