"""How figures look: Okabe and Ito's colour-blind safe palette, a bundled font, no pyplot and so no global state."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from functools import wraps
from typing import TYPE_CHECKING, Any, Literal, ParamSpec

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

P = ParamSpec("P")
Format = Literal["png", "pdf", "svg"]

BLUE, VERMILLION, GREEN, ORANGE, SKY, PURPLE = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#CC79A7"
INK, GREY, FAINT = "#1A1A1A", "#6B6B6B", "#D9D9D9"
CYCLE = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)

KINDS: Mapping[str, tuple[str, str, str]] = {
    "initial": ("s", GREEN, "initial state"),
    "final": ("s", ORANGE, "final state"),
    "endpoint": ("P", PURPLE, "relaxed end state"),
    "saddle": ("D", VERMILLION, "saddle"),
    "uncertain": ("o", BLUE, "uncertain image"),
    "data": ("v", SKY, "brought along"),
}
"""Marker, colour and name of each kind of label; the marker alone tells them apart in print."""

_RC: dict[str, Any] = {
    "font.family": "STIXGeneral",
    "mathtext.fontset": "stix",
    "font.size": 10.5,
    "axes.labelsize": 11.5,
    "axes.titlesize": 11.5,
    "legend.fontsize": 9.5,
    "axes.linewidth": 0.8,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.direction": "in",
    "ytick.direction": "in",
    "xtick.top": True,
    "ytick.right": True,
    "xtick.minor.visible": True,
    "ytick.minor.visible": True,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.5,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "pdf.fonttype": 42,
    "svg.fonttype": "path",
    "svg.hashsalt": "al-loop",
    "axes.formatter.useoffset": False,
}


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draw in the house style, whatever the user's matplotlibrc says."""

    @wraps(draw)
    def inside(*args: P.args, **kwargs: P.kwargs) -> Figure:
        import matplotlib as mpl

        # Every setting but the backend: rc_context does not give that one back, and the figure's canvas needs none.
        defaults = {name: value for name, value in mpl.rcParamsDefault.items() if name != "backend"}
        with mpl.rc_context({**defaults, **_RC}):
            return draw(*args, **kwargs)

    return inside


def new_figure(width_in: float, height_in: float) -> Figure:
    """An empty figure with an Agg canvas."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def render(figure: Figure, form: Format = "png", dpi: int = 220) -> bytes:
    """The figure as a file's bytes, the same for the same figure."""
    import matplotlib as mpl

    metadata: dict[str, Any] = {"png": {"Software": None}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}[form]
    stream = io.BytesIO()
    with mpl.rc_context(_RC):
        figure.savefig(stream, format=form, dpi=dpi, metadata=metadata)
    return stream.getvalue()


def say(axes: Axes, text: str) -> None:
    """An empty panel that says why it is empty."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=GREY, style="italic")


def panel(axes: Axes, letter: str) -> None:
    """A panel's letter, above its upper left corner."""
    axes.set_title(f"({letter})", loc="left", fontsize=11, color=INK, pad=5)


def plain_log(axes: Axes) -> None:
    """A logarithmic y axis with 1, 10, 100 written out, and 2 and 5 where it is short."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    steps = (1.0, 2.0, 5.0) if high / low < 200 else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=steps))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def whole_numbers(axes: Axes) -> None:
    """Ticks of the x axis at whole numbers only."""
    from matplotlib.ticker import MaxNLocator, NullLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.xaxis.set_minor_locator(NullLocator())
