"""A plot with two logarithmic axes as one SVG, without a library, so that it can lie beside the text that shows it."""

import itertools
import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 420, 70, 190, 16, 46
COLOURS = ("#1f77b4", "#2ca02c", "#ff7f0e", "#d62728", "#9467bd", "#8c564b")


def svg(lines: Mapping[str, Mapping[int, tuple[float, bool]]], x_title: str, y_title: str) -> str:
    """Lines by name, each from x to y > 0 and whether that was measured; if not, the way to it is dashed."""
    xs = _decades([x for line in lines.values() for x in line])
    ys = _decades([y for line in lines.values() for y, _ in line.values()])

    def place(x: float, y: float) -> tuple[float, float]:
        across = (math.log10(x) - xs[0]) / (xs[-1] - xs[0])
        up = (math.log10(y) - ys[0]) / (ys[-1] - ys[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = []
    for power in xs:
        x, bottom = place(10**power, 10 ** ys[0])
        parts.append(f'<path d="M{x:.1f} {TOP}V{bottom}" stroke="#ddd"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{10.0**power:,.10g}</text>')
    for power in ys:
        left, y = place(10 ** xs[0], 10**power)
        parts.append(f'<path d="M{left} {y:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{10.0**power:,.10g}</text>')
    for (name, line), colour in zip(lines.items(), COLOURS * len(lines), strict=False):
        points = [(*place(x, y), is_measured) for x, (y, is_measured) in sorted(line.items())]
        for (x0, y0, _), (x, y, is_measured) in itertools.pairwise(points):
            dash = "" if is_measured else ' stroke-dasharray="5 4"'
            path = f"M{x0:.1f} {y0:.1f}L{x:.1f} {y:.1f}"
            parts.append(f'<path d="{path}" stroke="{colour}" stroke-width="2"{dash}/>')
        x, y, _ = points[-1]
        parts.append(f'<text x="{x + 6:.1f}" y="{y + 4:.1f}" fill="{colour}">{escape(name)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text x="{middle[0]}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_title)}</text>')
    turn = f"translate(14 {middle[1]}) rotate(-90)"
    parts.append(f'<text transform="{turn}" text-anchor="middle">{escape(y_title)}</text>')
    view = f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {view}>'
    return "\n".join([head, f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>', *parts, "</svg>\n"])


def _decades(values: Sequence[float]) -> range:
    """The powers of ten from below the least to above the greatest."""
    low = math.floor(math.log10(min(values)))
    return range(low, max(math.ceil(math.log10(max(values))), low + 1) + 1)
