"""Names beside points, placed so that they cover neither each other nor the points."""

from collections.abc import Sequence

from matplotlib.axes import Axes

from fourfold.report.style import BASELINE_COLOUR, MUTED

Box = tuple[float, float, float, float]
"""Left, bottom, right, top; points of 1/72 inch."""
SIZE = 9.5
WIDTH, HEIGHT = 0.62 * SIZE, 1.25 * SIZE
"""About what a character and a line take, in points."""
RADIUS = 6.0
HEIGHTS = (6.0, -16.0, 20.0, -30.0, 34.0, -44.0, 48.0, -58.0, 62.0, -72.0, 76.0, -86.0)
"""Where a name may go above or below its point, nearest first: enough for six points at one place in a corner."""


def label_points(
    axes: Axes, names: Sequence[str], places: Sequence[tuple[float, float]], colours: Sequence[str]
) -> None:
    """Writes each name beside its point, in its colour; the axes' limits must be set already.

    Args:
        axes: linear axes.
        names: what to write.
        places: the points, in data coordinates.
        colours: one a name.
    """
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    figure = axes.get_figure(root=True)
    assert figure is not None
    inches = figure.get_size_inches()
    # The axes fill about nine tenths of the figure's width and three quarters of its height.
    wide, high = 0.9 * 72 * inches[0] / (right - left), 0.75 * 72 * inches[1] / (top - bottom)
    dots = [((x - left) * wide, (y - bottom) * high) for x, y in places]
    taken: list[Box] = [(x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS) for x, y in dots]
    for name, place, (x, y), colour in zip(names, places, dots, colours, strict=True):
        length = WIDTH * len(name)
        offsets = [(side, up) for side in (9.0, -9 - length) for up in HEIGHTS]
        boxes = [(x + dx, y + dy, x + dx + length, y + dy + HEIGHT) for dx, dy in offsets]
        room = (0.0, 0.0, (right - left) * wide, (top - bottom) * high)
        costs = [_outside(box, room) + sum(_overlap(box, other) for other in taken) for box in boxes]
        best = costs.index(min(costs))
        taken.append(boxes[best])
        axes.annotate(
            name,
            place,
            offsets[best],
            textcoords="offset points",
            color=MUTED if colour == BASELINE_COLOUR else colour,
            fontweight="bold",
            fontsize=SIZE,
        )


def _overlap(one: Box, two: Box) -> float:
    width = min(one[2], two[2]) - max(one[0], two[0])
    height = min(one[3], two[3]) - max(one[1], two[1])
    return max(0.0, width) * max(0.0, height)


def _outside(box: Box, room: Box) -> float:
    """Area of a box outside the room."""
    return (box[2] - box[0]) * (box[3] - box[1]) - _overlap(box, room)
