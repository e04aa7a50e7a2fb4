"""Make the tables, curves and figures of README.md and assets/results/README.md from the JSON files here.

    python assets/results/make.py            # rewrite both pages
    python assets/results/make.py --check    # exit 2 if that would change a word

A page holds blocks `<!-- KIND WORDS -->` ... `<!-- /KIND -->`; what stands between is written here. KIND is
    summary FILE.png NAME='title' ...    all regimes in a table with a word of verdict each, and in a figure
    results NAME='title' ...   a table, a row a comparison, with the commands
    arms NAME='title' ...      every arm of some comparisons
    unseen NAME='title' ...    classes that had no labelled example
    doses FILE.png NAME='title' ...      accuracy by what the modalities share
    forecasts PREFLIGHT:NAME,NAME,... ...  what preflight said of some comparisons, and what they found
    curve FILE.png NAME ...    accuracy against labelled examples a class, and what an example is worth
    edges                      which of the rows above have a search whose best is at its edge
    holm                       which of the rows above survive Holm's correction (Holm 1979)
"""
import os
import re
import shlex
import sys

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
sys.path[:0] = [HERE, ROOT]
from figures import draw_curve, draw_doses, draw_letters, draw_summary, draw_theory, per_class
from prepare import UserError, exit_on_user_error, read_text, write_file
from probe import at_the_edge
from tables import (arms_table, commands_of, control_of, doses_table, forecasts_table, result_of,
                    results_table, summary, unseen_table)

PAGES = ("README.md", os.path.join("assets", "results", "README.md"))

# ------------------------------------------------------------------------------------------------------------
# sentences


def worth(results):
    """How many examples a class alone needs for what uml has, along the line through alone's means.

    The line is straight in the logarithm of examples. UserError where it does not rise.
    """
    shots = np.log([per_class(result) for result in results])
    alone = [result["arms"]["alone"]["mean"] for result in results]
    if not (np.diff(alone) > 0).all():
        raise UserError(f"alone's accuracies {alone} do not rise: nothing can be read off their line")

    def needed(accuracy):
        if accuracy < alone[0]:
            return f"fewer than {np.exp(shots[0]):.3g}"
        if accuracy > alone[-1]:
            return f"more than {np.exp(shots[-1]):.3g}"
        return f"{np.exp(np.interp(accuracy, alone, shots)):.2g}"

    said = []
    for result in results:
        said.append(f"{per_class(result):.3g}: {needed(result['arms']['uml']['mean'])}")
    return ("What so many labelled examples a class beside the other data are worth, in examples without it: "
            + "; ".join(said) + ".")


def holm(tabled):
    """The rows whose uml - alone, or its negative, stays below 0.05 after the correction, by their files."""
    differences = [(name, result["arms"]["uml"]["minus_alone"]) for name, (_, result) in tabled.items()]
    kept = []
    for i, (name, difference) in enumerate(sorted(differences, key=lambda row: row[1]["p"])):
        # the smallest p must be below 0.05 / n, the next below 0.05 / (n - 1), ... up to the first that fails
        if difference["p"] > 0.05 / (len(differences) - i):
            break
        kept.append(f"`{name}`" + (" (harm)" if difference["mean"] < 0 else ""))
    return (f"The p of these {len(differences)} rows are not corrected for their number. After Holm's "
            f"correction these differences to alone stay below 0.05: {', '.join(kept)}.")


def edges(tabled):
    """The rows whose search ended at its edge, and of which arms: there a wider one may find better."""
    said = []
    for name, (_, result) in tabled.items():
        if "candidates" not in result:  # the oldest rows do not say what was tried
            continue
        arms = {}  # {setting: arms}
        for arm, setting in at_the_edge(result):
            arms.setdefault(setting, []).append(arm)
        if arms:
            settings = [f"{', '.join(names)} {setting}" for setting, names in arms.items()]
            said.append(f"`{name}` ({'; '.join(settings)})")
    return ("In most searches of these the best of three or more values is the smallest or the largest: "
            + ", ".join(said) + ".")


# ------------------------------------------------------------------------------------------------------------
# pages


def rows_of(words):
    """Words NAME=title of a marker -> {name: (title, result)}."""
    titles = dict(word.split("=", 1) for word in words)
    return {name: (title, result_of(name)) for name, title in titles.items()}


def rewrite(page, check):
    """The text of a page with every block made anew."""
    tabled = {}  # {name: (title, result)} of all tables so far

    def block(match):
        kind, words = match[2], shlex.split(match[3])
        if kind == "curve":
            results = sorted((result_of(name) for name in words[1:]), key=lambda result: result["examples"])
            if not check:
                draw_curve(os.path.join(ROOT, "assets", words[0]), results)
            lines = [worth(results)]
        elif kind == "summary":
            lines, drawn = summary(rows_of(words[1:]))
            if not check:
                draw_summary(os.path.join(ROOT, "assets", words[0]), drawn)
        elif kind == "doses":
            rows = rows_of(words[1:])
            lines = doses_table(rows) + commands_of(rows)
            if not check:
                drawn = [(*row, control_of(name)) for name, row in rows.items()]
                draw_doses(os.path.join(ROOT, "assets", words[0]), drawn)
        elif kind == "forecasts":
            lines = forecasts_table(words)
        elif kind == "holm":
            lines = [holm(tabled)]
        elif kind == "edges":
            lines = [edges(tabled)]
        else:
            rows = rows_of(words)
            make = dict(results=results_table, arms=arms_table, unseen=unseen_table)[kind]
            lines = make(rows)
            if kind == "results":
                tabled.update(rows)
                lines += commands_of(rows) if "results" in page else []
        return "\n".join([match[1], *lines, match[4]])

    return re.sub(r"(<!-- (\w+)(.*?) -->)\n.*?(<!-- /\2 -->)", block, read_text(page), flags=re.S)


def main():
    if sys.argv[1:] not in ([], ["--check"]):
        raise UserError("usage: python assets/results/make.py [--check]")
    check = "--check" in sys.argv
    if not check:
        draw_letters(os.path.join(ROOT, "assets", "letters.png"))
        draw_theory(os.path.join(ROOT, "assets", "theory.png"), result_of("theory"))
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
