"""Points of a chart as SVG paths, in the forms that the palette names."""

from __future__ import annotations

from fedlora.reporting.palette import Marker


def marker_path(marker: Marker, x: float, y: float, radius: float = 3.0) -> str:
    """The outline of a point as an SVG path; `plus` and `cross` are strokes."""
    r, half = radius, round(radius * 0.85, 2)
    shapes = {
        "circle": f"m-{r} 0a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0-{2 * r} 0z",
        "square": f"m-{half}-{half}h{2 * half}v{2 * half}h-{2 * half}z",
        "triangle": f"m0-{r}l{r} {2 * half}h-{2 * r}z",
        "triangle down": f"m0 {r}l{r}-{2 * half}h-{2 * r}z",
        "diamond": f"m0-{r}l{r} {r}l-{r} {r}l-{r}-{r}z",
        "plus": f"m-{r} 0h{2 * r}m-{r}-{r}v{2 * r}",
        "cross": f"m-{half}-{half}l{2 * half} {2 * half}m0-{2 * half}l-{2 * half} {2 * half}",
    }
    return f"M{x:g} {y:g}{shapes[marker]}"
