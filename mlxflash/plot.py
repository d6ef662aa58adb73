"""Pictures of what `evaluate` found: activity by layer, bytes against perplexity, new units against window size."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
    """Three panels of labelled reports of one text, the last of them the paper's rule."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    activity, cost, window = figure.subplots(1, 3)
    _activity(activity, *reports[0])
    _cost(cost, reports)
    _window(window, *reports[0])
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
