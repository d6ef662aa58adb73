"""Draw where a token's time goes: one bar per way of decoding, from end_to_end.py's JSON lines.

Every run in FILE, which may be the output as printed, gives two panels, since naive and hybrid take many times longer
than the others: their own scale, and one for the rest. A bar is the median token; ticks on it are what reading its
bytes and passing its weights through memory take at the measured rates.

    python benchmarks/end_to_end.py --shape opt-6.7b > run.txt
    python benchmarks/picture.py run.txt [--out benchmarks/token_time.svg]
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from mlxflash.plan import format_bytes

# Of the colours of Okabe and Ito, which differ to all eyes; grey is what a model in memory would take too.
PARTS = {"predictor": "#CC79A7", "management": "#E69F00", "wait for flash": "#0072B2", "compute": "#BFBFBF"}
LIMITS = {"io_limit_ms": ("limit: bytes / flash rate", "-"), "memory_limit_ms": ("limit: weights / memory rate", ":")}
STREAMED = ("naive", "hybrid")
ROW_INCHES = 0.32


def read_runs(file: Path) -> list[dict[str, Any]]:
    """The end_to_end runs in a file, other lines skipped. Raises ValueError where there is none."""
    found = [json.loads(line) for line in file.read_text().splitlines() if line.startswith("{")]
    runs = [run for run in found if "rows" in run and "flash_ms" in run]
    if not runs:
        raise ValueError(f"{file}: holds no JSON line of end_to_end.py")
    return runs


def parts_of(row: dict[str, Any]) -> dict[str, float]:
    """What a row's milliseconds consist of; they add up to its `ms`."""
    return {
        "predictor": row["predict_ms"],
        "management": row["manage_ms"],
        "wait for flash": row["wait_ms"],
        "compute": max(0.0, row["compute_ms"] - row["predict_ms"]),
    }


def panel(axes: Any, rows: list[dict[str, Any]], first: dict[str, Any]) -> None:
    longest = max(row["ms"] for row in rows)
    for y, row in enumerate(rows):
        left = 0.0
        for name, ms in parts_of(row).items():
            axes.barh(y, ms, 0.66, left, color=PARTS[name])
            left += ms
        limits = {key: row[key] for key in LIMITS if row[key] > 0}
        for key, ms in limits.items():
            axes.plot([ms, ms], [y - 0.45, y + 0.45], LIMITS[key][1], color="black", linewidth=1.6)
        said = [f"{row['ms']:.0f} ms", f"{format_bytes(row['bytes'])} read" if row["bytes"] else "nothing read"]
        if row is not first:
            said.append(f"{first['ms'] / row['ms']:.1f}x")
        axes.text(max(left, *limits.values()) + 0.012 * longest, y, ", ".join(said), va="center")
    axes.set_yticks(range(len(rows)), [row["mode"] for row in rows])
    axes.set_xlim(0, 1.4 * max(longest, *(row[key] for row in rows for key in LIMITS)))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def draw(runs: list[dict[str, Any]], out: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "mlxflash", "font.size": 9})
    from matplotlib import pyplot
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    groups = []
    for run in runs:
        slow = [row for row in run["rows"] if row["mode"] in STREAMED]
        groups += [(run, slow), (run, [row for row in run["rows"] if row not in slow])]
    heights = [len(rows) + 1.6 for _, rows in groups]
    size = 8.5, ROW_INCHES * sum(heights) + 0.7
    figure, panels = pyplot.subplots(len(groups), figsize=size, height_ratios=heights, layout="constrained")
    for axes, (run, rows) in zip(panels, groups, strict=True):
        panel(axes, rows, run["rows"][0])
        if rows[0]["mode"] in STREAMED:
            axes.set_title(f"{run['shape']}, {format_bytes(run['memory_bytes'])} of memory", loc="left", weight="bold")
    panels[-1].set_xlabel("milliseconds per token")
    handles: list[Any] = [Patch(color=color, label=name) for name, color in PARTS.items()]
    handles += [Line2D([], [], linestyle=style, color="black", label=label) for label, style in LIMITS.values()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(out, facecolor="white", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="output of end_to_end.py, of one or several runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("token_time.svg"))
    args = parser.parse_args()
    try:
        draw(read_runs(args.file), args.out)
    except ImportError:
        sys.exit("picture: needs matplotlib: pip install -e '.[bench]'")
    except (OSError, ValueError) as error:
        sys.exit(f"picture: {error}")


if __name__ == "__main__":
    main()
