"""A very small SVG writer: shapes are appended as escaped text, and `document` closes the file."""

from __future__ import annotations

from collections.abc import Iterable
from xml.sax.saxutils import escape, quoteattr

PAPER, INK, SOFT = "#fbfaf6", "#22262b", "#5b6470"
FONT = "'DejaVu Sans', Verdana, 'Segoe UI', system-ui, sans-serif"


def number(value: float) -> str:
    """A coordinate with at most two decimals."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


class Canvas:
    """An SVG of `width` by `height` units, on its own light ground so that dark viewers can't swallow ink.

    `title` and `description` are read aloud by screen readers.
    """

    def __init__(self, width: int, height: int, title: str, description: str) -> None:
        self._out = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}"'
            f' height="{height}" role="img" aria-labelledby="title description" font-family="{FONT}">',
            f'<title id="title">{escape(title)}</title>',
            f'<desc id="description">{escape(description)}</desc>',
        ]
        self.rect(0, 0, width, height, PAPER, radius=14)

    def rect(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        fill: str,
        radius: float = 0.0,
        opacity: float = 1.0,
    ) -> None:
        """A filled rectangle."""
        corner = f' rx="{number(radius)}"' if radius else ""
        see = f' fill-opacity="{number(opacity)}"' if opacity != 1.0 else ""
        box = f'x="{number(x)}" y="{number(y)}" width="{number(width)}" height="{number(height)}"'
        self._out.append(f"<rect {box}{corner} fill={quoteattr(fill)}{see}/>")

    def text(
        self,
        x: float,
        y: float,
        words: str,
        size: float = 12.5,
        fill: str = INK,
        weight: int = 400,
        anchor: str = "start",
    ) -> None:
        """Words whose baseline starts (or, by `anchor`, is centred or ends) at a point."""
        bold = f' font-weight="{weight}"' if weight != 400 else ""
        side = f' text-anchor="{anchor}"' if anchor != "start" else ""
        where = f'x="{number(x)}" y="{number(y)}" font-size="{number(size)}"'
        self._out.append(f"<text {where}{bold}{side} fill={quoteattr(fill)}>{escape(words)}</text>")

    def line(self, x1: float, y1: float, x2: float, y2: float, stroke: str, width: float) -> None:
        """A straight line."""
        ends = f'x1="{number(x1)}" y1="{number(y1)}" x2="{number(x2)}" y2="{number(y2)}"'
        self._out.append(f'<line {ends} stroke={quoteattr(stroke)} stroke-width="{number(width)}"/>')

    def path(self, d: str, stroke: str, width: float = 1.0) -> None:
        """An unfilled path of the given commands."""
        wide = f' stroke-width="{number(width)}"' if width != 1.0 else ""
        self._out.append(f'<path d={quoteattr(d)} fill="none" stroke={quoteattr(stroke)}{wide}/>')

    def polygon(self, points: Iterable[tuple[float, float]], fill: str, opacity: float) -> None:
        """A filled polygon."""
        listed = " ".join(f"{number(x)},{number(y)}" for x, y in points)
        self._out.append(
            f'<polygon points="{listed}" fill={quoteattr(fill)} fill-opacity="{number(opacity)}"/>'
        )

    def document(self) -> str:
        """The whole file."""
        return "\n".join([*self._out, "</svg>\n"])
