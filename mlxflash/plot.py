"""Pictures of what `evaluate` found: activity by layer, recall against flagged, bytes against perplexity, new units
against window size, victim orders."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlxflash.evaluate import Report

FORMATS = (".svg", ".png", ".pdf")
# Of the colours of Okabe and Ito, which differ to all eyes.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")


def check_plot(file: str) -> None:
    """Raises ValueError where nothing could be drawn to `file`, before anything is measured."""
    if Path(file).suffix not in FORMATS:
        raise ValueError(f"--plot {file}: the name must end in {', '.join(FORMATS)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install 'mlxflash[plot]'") from None


def draw(reports: Sequence[tuple[str, Report]], file: str) -> None:
    """Five panels of labelled reports of one text, the last of them the paper's rule, the first with victim orders."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8), layout="constrained")
    (activity, recall, cost), (window, orders, none) = figure.subplots(2, 3)
    none.set_axis_off()
    _activity(activity, *reports[0])
    _recall(recall, reports)
    _cost(cost, reports)
    _window(window, *reports[0])
    _orders(orders, *reports[0])
    figure.suptitle(f"{reports[0][1].bundle}, {reports[0][1].tokens} tokens", fontsize=10)
    figure.savefig(file)


def _activity(axes: Any, label: str, report: Report) -> None:
    layers = range(len(report.layers))
    axes.bar(layers, [100 * layer.active for layer in report.layers], color="#BFBFBF", label="truly active")
    shares = (("flagged", "flagged"), ("ffn_share_read", "read"))
    for (name, said), colour in zip(shares, COLOURS, strict=False):
        values = [100 * getattr(layer, name) for layer in report.layers]
        axes.plot(layers, values, "o-", markersize=4, color=colour, label=said)
    axes.set(title=f"Activity by layer ({label})", xlabel="layer", ylabel="% of the layer's units", ylim=(0, None))
    axes.legend(fontsize=8, frameon=False)


def _recall(axes: Any, reports: Sequence[tuple[str, Report]]) -> None:
    """All layers together, over margins; marked is where each report was."""
    drawn: set[str] = set()
    for i, (label, report) in enumerate(reports):
        colour = COLOURS[i % len(COLOURS)]
        if report.predictor not in drawn and (margins := list(report.layers[0].margins)):
            drawn.add(report.predictor)
            units = [layer.units for layer in report.layers]
            flagged = [np.average([layer.margins[m][0] for layer in report.layers], weights=units) for m in margins]
            active = [layer.units * layer.active for layer in report.layers]
            found = [np.average([layer.margins[m][1] for layer in report.layers], weights=active) for m in margins]
            line = {"color": "#7F7F7F", "marker": ".", "linestyle": "--" if len(drawn) > 1 else "-"}
            axes.plot(
                [100 * f for f in flagged], [100 * r for r in found], label=f"{report.predictor}, margins", **line
            )
        axes.plot(100 * report.flagged, 100 * report.recall, "o", color=colour, label=label)
    axes.axvline(100 * reports[0][1].active, color="#BFBFBF", linewidth=1, zorder=0, label="truly active")
    axes.set(title="Recall against flagged", xlabel="% of the units flagged", ylabel="% of the active units found")
    axes.set(xlim=(0, 250 * reports[0][1].active), ylim=(None, 101))
    axes.legend(fontsize=8, frameon=False, loc="lower right")


def _orders(axes: Any, label: str, report: Report) -> None:
    units = sum(layer.units for layer in report.layers)
    for name, colour in zip(report.layers[0].orders, COLOURS, strict=False):
        shares = list(report.layers[0].orders[name])
        missed = [100 * sum(layer.orders[name][share] for layer in report.layers) / units for share in shares]
        bound = name.startswith("Belady")
        axes.plot(
            [100 * s for s in shares], missed, "--" if bound else "o-", color="black" if bound else colour, label=name
        )
    axes.set(
        title=f"Victim orders ({label})",
        xlabel="% of every layer's units held",
        ylabel="% of the units read per token",
        ylim=(0, None),
    )
    axes.legend(fontsize=8, frameon=False)


def _cost(axes: Any, reports: Sequence[tuple[str, Report]]) -> None:
    for i, (label, report) in enumerate(reports):
        paper = i == len(reports) - 1
        axes.errorbar(
            100 * report.ffn_share_read,
            100 * report.ppl_change,
            yerr=100 * report.ppl_change_se,
            fmt="*" if paper else "o",
            markersize=12 if paper else 6,
            color="black" if paper else COLOURS[i % len(COLOURS)],
            label=f"the paper's rule: {label}" if paper else label,
        )
    axes.axhline(0, color="#BFBFBF", linewidth=1, zorder=0)
    axes.set(title="What fewer bytes cost", xlabel="% of the FFN read per token", ylabel="perplexity change, %")
    axes.set_xlim(0, 1.15 * axes.get_xlim()[1])
    axes.legend(fontsize=8, frameon=False)


def _window(axes: Any, label: str, report: Report) -> None:
    for i, layer in enumerate(report.layers):
        spans = list(layer.new_units)
        shade = 0.15 + 0.75 * i / max(1, len(report.layers) - 1)
        axes.plot(spans, [100 * n for n in layer.new_units.values()], color=str(0.95 - shade), label=f"layer {i}")
    axes.set(
        title=f"New units against window size ({label})",
        xlabel="tokens in the window",
        ylabel="% of the layer's units new per token",
        xscale="log",
        ylim=(0, None),
    )
    axes.legend(fontsize=7, frameon=False, ncols=2)
