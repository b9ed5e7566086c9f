"""How every figure looks: colours, symbols, margins, round ticks, and text that is safe in a label.

Knows plotly; knows nothing about runs or what a figure shows.
"""

from __future__ import annotations

import html

import plotly.graph_objects as go

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")  # Okabe and Ito, safe for colour blindness
DIVERGING = "PuOr_r"  # orange above zero, purple below
GREY, LINE = "rgba(128,128,128,.28)", "rgba(128,128,128,.75)"
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "cross")
TOP, BOTTOM = 30, 50  # margins, pixels


def styled(figure: go.Figure, height: int) -> go.Figure:
    """Transparent, with grey lines and a mid-grey font: readable on a light and on a dark page."""
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 60, "r": 20, "t": TOP, "b": BOTTOM},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": "#7a7a7a", "size": 12, "family": "system-ui, sans-serif"},
        hoverlabel={"bgcolor": "#222", "bordercolor": "#222", "font": {"color": "#fff"}, "align": "left"},
        legend={"orientation": "h", "y": 1, "yanchor": "bottom", "x": 0, "xanchor": "left"},
    )
    figure.update_annotations(font_size=13)
    figure.update_xaxes(gridcolor=GREY, zerolinecolor=LINE, automargin=True, title_standoff=8)
    figure.update_yaxes(gridcolor=GREY, zerolinecolor=LINE, automargin=True, title_standoff=14)
    return figure


def label(value: str) -> str:
    """Text from data for a figure: plotly reads `<b>`, `<a>`, entities and `$TeX$` in every label."""
    return html.escape(value, quote=False).replace("$", "&#36;")


def ticks(count: int, shift: int = 0) -> list[int]:
    """At most about twelve places, evenly spaced; with `shift`, such that place + shift is round."""
    step = -(-count // 12)
    return [place for place in range(count) if (place + shift) % step == 0 or (shift and place == 0)]
