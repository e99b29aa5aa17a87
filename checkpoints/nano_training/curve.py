"""Curves as a standalone SVG picture.

Knows numbers only.
"""

from __future__ import annotations

import numpy as np

_WIDTH, _HEIGHT, _MARGIN = 720, 360, 48
_COLORS = ("#1f6feb", "#d1570c", "#2da44e")
_POINTS = 240


def draw_curve(curves: dict[str, np.ndarray]) -> str:
    """A picture of values by step, one line per name, smoothed to a few hundred points."""
    top = max(float(values.max()) for values in curves.values()) * 1.05
    steps = max(len(values) for values in curves.values())
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
    ]
    for i in range(6):
        value = top * i / 5
        y = _y(value, top)
        parts.append(
            f'<line x1="{_MARGIN}" y1="{y:.1f}" x2="{_WIDTH}" y2="{y:.1f}" stroke="#ddd"/>'
        )
        parts.append(f'<text x="8" y="{y + 4:.1f}">{value:.2f}</text>')
        x, step = _x(steps * i / 5, steps), steps * i // 5
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - 16}" text-anchor="middle">{step}</text>')
    for (name, values), color, line in zip(curves.items(), _COLORS, range(3), strict=False):
        pieces = np.array_split(values, min(len(values), _POINTS))
        starts = np.cumsum([0, *(len(piece) for piece in pieces[:-1])]).tolist()
        points = " ".join(
            f"{_x(start, steps):.1f},{_y(piece.mean(), top):.1f}"
            for start, piece in zip(starts, pieces, strict=True)
        )
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}"/>')
        parts.append(f'<text x="{_WIDTH - 140}" y="{32 + 18 * line}" fill="{color}">{name}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _x(step: float, steps: int) -> float:
    return _MARGIN + (_WIDTH - 2 * _MARGIN) * step / max(steps, 1)


def _y(value: float, top: float) -> float:
    return _HEIGHT - _MARGIN + (2 * _MARGIN - _HEIGHT) * value / top
