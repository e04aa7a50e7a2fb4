"""Make the tables, curves and figures of README.md and assets/results/README.md from the JSON files here.

    python assets/results/make.py            # rewrite both pages
    python assets/results/make.py --check    # exit 2 if that would change a word

A page holds blocks `<!-- KIND WORDS -->` ... `<!-- /KIND -->`; what stands between is written here. KIND is
    results NAME='title' ...   a table, a row a comparison, with the commands
    arms NAME='title' ...      every arm of some comparisons
    unseen NAME='title' ...    classes that had no labelled example
    curve FILE.png NAME ...    accuracy against labelled examples a class, and what an example is worth
    holm                       which of the rows above survive Holm's correction (Holm 1979)
"""
import os
import re
import shlex
import sys
import textwrap

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
sys.path.insert(0, ROOT)
from prepare import (PREPARE_KEYS, SOURCES, UserError, exit_on_user_error, read_config, read_json, read_text,
                     write_file)
from probe import figure, short_source, show_auxiliaries

PAGES = ("README.md", os.path.join("assets", "results", "README.md"))


def table_of(columns, rows):
    """Markdown lines. In what follows rows is {name: (title, result)}."""
    first, *others = ["| " + " | ".join(map(str, cells)) + " |" for cells in (columns, *rows)]
    return [first, "|---" * len(columns) + "|", *others]


def result_of(name):
    path = os.path.join(HERE, f"{name}.json")
    if not os.path.exists(path):
        raise UserError(f"a page wants {path}, which is not there: copy the run's compare.json to it")
    return read_json(path)


def percent(entry):
    """'71.2 ± 1.3' of a mean, '**+5.6** ± 1.0 (2e-06)' of a difference, '-' of nothing."""
    if not entry:
        return "-"
    half = "" if entry["half"] is None else f" ± {100 * entry['half']:.1f}"
    if "p" in entry:
        return f"**{100 * entry['mean']:+.1f}**{half} ({entry['p']:.1g})"
    return f"{100 * entry['mean']:.1f}{half}"


def convnet_of(name):
    """The reference column of TARGET_EXAMPLES...: a plain ConvNet on the same items, where it was trained."""
    path = os.path.join(HERE, f"convnet_{'_'.join(name.split('_')[:2])}.json")
    return f"{100 * np.mean(read_json(path)['scores']):.1f}" if os.path.exists(path) else "-"


def results_table(rows):
    lines = []
    for name, (title, r) in rows.items():
        alone, control, uml = (r["arms"].get(arm, {}) for arm in ("alone", "control", "uml"))
        shown = percent(alone), convnet_of(name), percent(control), percent(uml)
        above = percent(uml["minus_alone"]), percent(control.get("uml_minus"))
        speakers = f" on {r['folds']} speakers" if r.get("folds", r["seeds"]) != r["seeds"] else ""
        lines.append([title, show_auxiliaries(r), *shown, *above, f"{r['seeds']}{speakers}"])
    return table_of(["target", "beside it", "alone", "ConvNet", "control", "uml", "uml - alone (p)",
                     "uml - control (p)", "seeds"], lines)


def commands_of(rows):
    lines = [f"- {title}: `{r['command']}` ({r['hardware']})" for title, r in rows.values()]
    return ["", "<details><summary>commands and hardware</summary>", "", *lines, "", "</details>"]


def arms_table(rows):
    lines = []
    for title, r in rows.values():
        for arm, entry in r["arms"].items():
            minus = r["arms"]["uml"]["minus_alone"] if arm == "alone" else entry.get("uml_minus")
            settings = [", ".join(f"{key}={value}" for key, value in one.items()) for one in entry["settings"]]
            lines.append([title, arm, percent(entry), percent(minus), f"{entry['gflops']:,.0f}",
                          " or ".join(dict.fromkeys(settings))])
    return table_of(["", "arm", "accuracy", "uml minus it (p)", "GFLOP", "setting"], lines)


def unseen_table(rows):
    keys = dict(mean="seen among all", unseen_among_unseen="unseen among themselves",
                unseen_accuracy="unseen among all", unseen_with_offset="unseen with the offset",
                seen_with_offset="seen with the offset", harmonic_mean="harmonic mean")
    lines = []
    for title, r in rows.values():
        for arm in [arm for arm in ("alone", "control", "uml") if arm in r["arms"]]:
            lines.append([title, arm, *(f"{100 * np.mean(r['arms'][arm][key]):.1f}" for key in keys)])
    return table_of(["", "arm", *keys.values()], lines)


def per_class(r):
    """Labelled target examples of a comparison for each class that has some."""
    return r["examples"] / (round(1 / r["chance"]) - r.get("config", {}).get("unseen_classes", 0))


def worth(results):
    """One sentence: how many examples a class alone needs for what uml has, along the line through alone's
    means (logarithmic in examples). UserError where alone's line does not rise."""
    shots = np.log([per_class(r) for r in results])
    alone = [r["arms"]["alone"]["mean"] for r in results]
    if not (np.diff(alone) > 0).all():
        raise UserError(f"alone's accuracies {alone} do not rise: nothing can be read off their line")

    def needed(accuracy):
        if accuracy < alone[0]:
            return f"fewer than {np.exp(shots[0]):.3g}"
        if accuracy > alone[-1]:
            return f"more than {np.exp(shots[-1]):.3g}"
        return f"{np.exp(np.interp(accuracy, alone, shots)):.2g}"

    said = [f"{per_class(r):.3g} are worth {needed(r['arms']['uml']['mean'])}" for r in results]
    return "Examples a class with the other data, and what they are worth without: " + "; ".join(said) + "."


def draw_curve(path, results):
    """Accuracy against labelled examples a class, a line an arm: what unpaired data saves is the distance."""
    with figure(path, 6, 3.8) as (_, ax):
        for arm, style in (("alone", "C0-"), ("uml", "C1--"), ("control", "C2:")):
            points = [(per_class(r), r["arms"][arm]["mean"], r["arms"][arm]["half"] or 0)
                      for r in results if arm in r["arms"]]
            ax.errorbar(*zip(*points), fmt=style, marker="o", ms=4, capsize=3, label=arm)
        ax.axhline(results[0]["chance"], ls=":", color="grey", lw=1)
        ax.set(xscale="log", xlabel="labelled examples a class", ylabel="test accuracy", ylim=(0, None))
        ax.set_title(f"{short_source(results[0]['target'])} with {show_auxiliaries(results[0])}", fontsize=9)
        ticks = sorted({per_class(r) for r in results})
        ax.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
        ax.minorticks_off()
        ax.legend()


def draw_letters(path):
    """Pictures above, texts below, of other letters: what the two slots of letters_text.py learn from."""
    cfg = read_config([], PREPARE_KEYS)
    pictures, texts = (SOURCES["letters"][0](cfg, modality, "") for modality in ("image", "text"))
    rng = np.random.default_rng(3)
    chosen, told = rng.permutation(len(pictures["items"]))[:40], rng.permutation(len(texts["items"]))[:12]
    with figure(path, 10, 3.3, nrows=2, height_ratios=(0.62, 1)) as (_, (above, below)):
        rows = [np.concatenate(pictures["items"][chosen[i:i + 20]], 1) for i in (0, 20)]
        above.imshow(np.concatenate(rows, 0), cmap="gray", vmin=0, vmax=255)
        above.set_title("pictures: scans of typefaces, each with a label", fontsize=10)
        below.set_title("text: what the Unicode database says of letters, each with a label", fontsize=10)
        for i, document in enumerate(texts["items"][told]):
            shown, x, y = textwrap.shorten(document, 62, placeholder=" ..."), i % 2, i // 2
            below.text(0.02 + 0.5 * x, 0.92 - 0.17 * y, shown, fontsize=8, family="monospace", va="top")
        above.axis("off")
        below.axis("off")


def holm(tabled):
    """One sentence: the rows whose uml - alone, or its negative, stays below 0.05 after the correction."""
    found = [(title, r["arms"]["uml"]["minus_alone"]) for title, r in tabled]
    kept = []
    for i, (title, d) in enumerate(sorted(found, key=lambda row: row[1]["p"])):
        if d["p"] > 0.05 / (len(found) - i):
            break
        kept.append(title + (" (harm)" if d["mean"] < 0 else ""))
    return (f"The p of these {len(found)} rows are not corrected for their number. After Holm's correction "
            f"these differences to alone stay below 0.05: {'; '.join(kept)}.")


def rewrite(page, check):
    """The text of a page with every block made anew."""
    tabled = {}  # {name: (title, result)} of all tables so far

    def block(match):
        kind, *words = shlex.split(match[2])
        if kind == "curve":
            results = sorted((result_of(name) for name in words[1:]), key=lambda r: r["examples"])
            if not check:
                draw_curve(os.path.join(ROOT, "assets", words[0]), results)
            lines = [worth(results)]
        elif kind == "holm":
            lines = [holm(tabled.values())]
        else:
            rows = {name: (title, result_of(name)) for name, title in (word.split("=", 1) for word in words)}
            tabled.update(rows if kind == "results" else {})
            make = dict(results=results_table, arms=arms_table, unseen=unseen_table)[kind]
            lines = make(rows) + (commands_of(rows) if kind == "results" and "results" in page else [])
        return "\n".join([match[1], *lines, match[3]])

    blocks = r"(<!-- ((?:results|arms|unseen|curve|holm)\b.*?) -->)\n.*?(<!-- /\w+ -->)"
    return re.sub(blocks, block, read_text(page), flags=re.S)


def main():
    check = "--check" in sys.argv
    if not check:
        draw_letters(os.path.join(ROOT, "assets", "letters.png"))
    for page in PAGES:
        path = os.path.join(ROOT, page)
        text = rewrite(path, check)
        if not check:
            write_file(path, text.encode())
            print(f"rewrote the numbers of {page}")
        elif text != read_text(path):
            raise UserError(f"{page} is not what the JSON files say: python assets/results/make.py")


if __name__ == "__main__":
    exit_on_user_error(main)
