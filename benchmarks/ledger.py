"""What does it cost to undo the defence? Every attack on three networks, with its bill.

Each network is trained on the handwritten digits, one layer deformed (top direction), and attacked by
fine-tuning to a shifted labelling; a seed is a pretrained network. Recovered is steps over those of
fine-tuning the network that was never deformed. Utility is the share of test digits still read rightly, which
that fine-tuning destroys on purpose: an attack is held against what the undefended run leaves.

    python -m benchmarks.ledger [--only NETWORK ...] [--quick]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt

import specdef_jax as sd
from benchmarks import _race_arms as arms
from benchmarks._harness import RESULTS, save
from specdef_jax import campaign, race

CONFIG: dict[str, Any] = {
    "networks": ["mlp", "cnn", "transformer"],
    "alpha": 16.0,
    "seeds": 5,
    "target": 0.1,
    "examples": 128,
    "optimizers": ["sgd", "adam"],
    "steps": 4000,
    "decades": 5.0,
    "refine": 1.5,
}


def main() -> None:
    """Print the ledgers, save JSON and a figure; `--only` keeps the rows of the other networks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--only", nargs="+", metavar="NETWORK", help="these networks, beside the saved rows")
    parser.add_argument("--quick", action="store_true", help="one small network, one seed; not saved")
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    config = CONFIG | (
        {"seeds": 1, "steps": 200, "target": 1.0, "networks": ["mlp small"]} if options.quick else {}
    )
    path = RESULTS / "ledger.json"
    rows = json.loads(path.read_text())["rows"] if options.only and path.exists() else []
    for name in options.only or config["networks"]:
        rows = [row for row in rows if row["network"] != name] + ledger_of(name, config)
        if not options.quick:
            save("ledger", config, rows, {})
            draw(rows)


def ledger_of(name: str, config: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of one network."""
    task = arms.task_of({"network": name} | {k: config[k] for k in ("seeds", "target", "examples")}, 0)
    plans = arms.plans_for(task, {})
    released = [
        sd.apply_plan(p, q.with_alpha(config["alpha"])) for p, q in zip(task.networks, plans, strict=True)
    ]
    setting = campaign.Setting(
        args=task.args,
        target=task.target,
        optimizers={n: race.FIRST_ORDER[n] for n in config["optimizers"]},
        steps=config["steps"],
        decades=config["decades"],
        refine=config["refine"],
        folder=Path("results/state/ledger"),
    )
    retained = task.facts["test accuracy"]
    book = campaign.ledger(task.loss, released, setting, utility=lambda p: float(retained(p)), progress=_told)
    strongest = {entry.attack for entry in book.strongest().values()}
    rows = []
    for entry in book.entries:
        best = entry.best
        rows.append({"network": name, "strongest": entry.attack in strongest} | entry.to_dict())
        print(
            f"{name:>12} {entry.attack:>22}  {best[1] if best else entry.refused or 'not reached'}",
            flush=True,
        )
    return rows


def _told(attack: str, done: int, total: int) -> None:
    print(f"  {attack} ({done} of {total})", flush=True)


def draw(rows: list[dict[str, Any]]) -> None:
    """Draw what each attack leaves of the slowdown, one panel per network, the best optimizer each."""
    names = list(dict.fromkeys(row["network"] for row in rows))
    attacks = list(dict.fromkeys(row["attack"] for row in rows))
    figure, axes = plt.subplots(
        1, len(names), figsize=(3 + 3 * len(names), 1 + 0.3 * len(attacks)), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for ax, name in zip(axes[0], names, strict=True):
        for y, attack in enumerate(reversed(attacks)):
            found = [r for r in rows if r["network"] == name and r["attack"] == attack]
            ratios = [r for row in found for r in row["recovered"].values() if not r["censored"]]
            if not ratios:
                ax.text(1, y, "not reached" if not any(r["refused"] for r in found) else "n/a", fontsize=7)
                continue
            one = min(ratios, key=lambda r: r["value"])
            ax.plot([one["low"], one["high"]], [y, y], color="#3b6ea8", alpha=0.5)
            ax.plot(one["value"], y, "o", color="#3b6ea8", markersize=4.5)
        ax.axvline(1, color="#bbbbbb", linewidth=0.8, zorder=0)
        ax.set_xscale("log")
        ax.set_yticks(range(len(attacks)), reversed(attacks), fontsize=8)
        ax.set_title(name, fontsize=9, loc="left")
        ax.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("steps over those of fine-tuning the undefended network (95% intervals)", fontsize=9)
    figure.savefig(RESULTS / "ledger.svg")
    plt.close(figure)


if __name__ == "__main__":
    main()
