"""A map of what the cells of a minigrid look like, from which observations are read off.

A map is padded by `MARGIN` cells of wall on each side, the furthest that a view reaches over the border. The rows of a
view are counted from the agent, 0 its own, and its columns from the agent's left.
"""

import functools

import numpy as np
from minigrid.core.constants import DIR_TO_VEC
from minigrid.core.grid import Grid
from minigrid.core.world_object import Wall, WorldObj

VIEW_SIZE = 7
MARGIN = VIEW_SIZE - 1
FREE, BLOCKER, BARRIER = range(3)  # nothing or an open door; an object; a wall or a door that is not open
STEPS = [tuple(map(int, vector)) for vector in DIR_TO_VEC]
EMPTY_CODE = (1, 0, 0)
COLUMNS = [[column for column in range(VIEW_SIZE) if bits >> column & 1] for bits in range(1 << VIEW_SIZE)]

_HALF = VIEW_SIZE // 2
_EVERY_COLUMN = (1 << VIEW_SIZE) - 1
_WALL_CODE = Wall().encode()


class CellMap:
    """
    What the cells of a grid look like.

    Args:
        grid (`Grid`): The grid.

    Attributes:
        codes (`np.ndarray`): The three codes of each cell that an observation shows, `(padded width, padded height,
            3)`.
        kinds (`bytearray`): How each cell is for the bot to walk: free, a blocker or a barrier.
        clear_columns, clear_rows (`list[int]`): Which cells can be looked through, the bits of a column or row.
    """

    def __init__(self, grid: Grid):
        width, height = grid.width, grid.height
        inside = (slice(MARGIN, MARGIN + width), slice(MARGIN, MARGIN + height))
        empty = np.array([cell is None for cell in grid.grid]).reshape(height, width).T
        clear = np.zeros((width + 2 * MARGIN, height + 2 * MARGIN), dtype=bool)
        clear[inside] = empty
        self.codes = np.where(clear[..., None], np.array(EMPTY_CODE, np.uint8), np.array(_WALL_CODE, np.uint8))
        self.kinds = bytearray(np.where(clear, np.uint8(FREE), np.uint8(BARRIER)).tobytes())
        self.stride = height + 2 * MARGIN
        self.clear_columns = _bits(clear)
        self.clear_rows = _bits(clear.T)
        for index, cell in enumerate(grid.grid):
            if cell is not None and not (type(cell) is Wall and cell.color == "grey"):
                self.update(index % width, index // width, cell)

    def update(self, x: int, y: int, cell: WorldObj | None) -> None:
        """Draw one cell anew; `x` and `y` are positions in the grid."""
        x, y = x + MARGIN, y + MARGIN
        self.codes[x, y] = EMPTY_CODE if cell is None else cell.encode()
        self.kinds[x * self.stride + y] = _kind(cell)
        if cell is None or cell.see_behind():
            self.clear_columns[x] |= 1 << y
            self.clear_rows[y] |= 1 << x
        else:
            self.clear_columns[x] &= ~(1 << y)
            self.clear_rows[y] &= ~(1 << x)

    def visible_rows(self, x: int, y: int, direction: int) -> list[int]:
        """The columns that an agent sees in each row of its view, as bits, as far as it sees any."""
        dx, dy = STEPS[direction]
        if dx:
            lines, ahead, first, step = self.clear_columns, x + MARGIN, y + MARGIN - _HALF, dx
        else:
            lines, ahead, first, step = self.clear_rows, y + MARGIN, x + MARGIN - _HALF, dy
        spread = _spread_tables()[direction]
        rows = []
        seen = 1 << _HALF
        for line in range(ahead, ahead + step * VIEW_SIZE, step):
            here, seen = spread[(lines[line] >> first & _EVERY_COLUMN) << VIEW_SIZE | seen]
            rows.append(here)
            if not seen:
                break
        return rows

    def image(self, x: int, y: int, direction: int, visible_rows: list[int]) -> np.ndarray:
        """The observed `(7, 7, 3)` codes of what is visible."""
        x, y = x + MARGIN, y + MARGIN
        # (column, row) of the view, its last row the agent's own
        match direction:
            case 0:
                window = self.codes[x : x + VIEW_SIZE, y - _HALF : y + _HALF + 1][::-1].swapaxes(0, 1)
            case 1:
                window = self.codes[x - _HALF : x + _HALF + 1, y : y + VIEW_SIZE][::-1, ::-1]
            case 2:
                window = self.codes[x - MARGIN : x + 1, y - _HALF : y + _HALF + 1][:, ::-1].swapaxes(0, 1)
            case _:
                window = self.codes[x - _HALF : x + _HALF + 1, y - MARGIN : y + 1]
        return np.multiply(window, _mask(tuple(visible_rows)), out=np.empty((VIEW_SIZE, VIEW_SIZE, 3), np.uint8))


def _kind(cell: WorldObj | None) -> int:
    if cell is None:
        return FREE
    if cell.type == "door":
        return FREE if cell.is_open else BARRIER
    return BARRIER if cell.type == "wall" else BLOCKER


def _bits(lines: np.ndarray) -> list[int]:
    """The bits of each line of a boolean array, the first the lowest."""
    return [int.from_bytes(line.tobytes(), "little") for line in np.packbits(lines, axis=1, bitorder="little")]


@functools.lru_cache(maxsize=1 << 14)
def _mask(visible_rows: tuple[int, ...]) -> np.ndarray:
    """The mask `(7, 7, 1)` over columns and rows of a view, in which the agent's own row is the last."""
    mask = np.zeros((VIEW_SIZE, VIEW_SIZE, 1), dtype=np.uint8)
    for distance, columns in enumerate(visible_rows):
        for column in COLUMNS[columns]:
            mask[column, VIEW_SIZE - 1 - distance] = 1
    return mask


@functools.cache
def _spread_tables() -> list[list[tuple[int, int]]]:
    """
    For each direction, what sight does in one row of a view. Index: the clear cells of the row, seven bits in the
    order of the map, before the cells that the row nearer to the agent shows, seven bits in the order of the view.
    Value: the cells that are seen in this row, and those shown in the next.
    """
    index = np.arange(1 << 2 * VIEW_SIZE)
    clear = [index >> (VIEW_SIZE + column) & 1 for column in range(VIEW_SIZE)]
    tables = []
    for order in (clear, clear[::-1]):
        seen = [index >> column & 1 for column in range(VIEW_SIZE)]
        ahead = [np.zeros_like(index) for _ in range(VIEW_SIZE)]
        for columns, side in ((range(VIEW_SIZE - 1), 1), (range(VIEW_SIZE - 1, 0, -1), -1)):
            for column in columns:
                through = seen[column] & order[column]
                seen[column + side] = seen[column + side] | through
                ahead[column + side] = ahead[column + side] | through
                ahead[column] = ahead[column] | through
        here, there = (sum(line[column] << column for column in range(VIEW_SIZE)).tolist() for line in (seen, ahead))
        tables.append(list(zip(here, there, strict=True)))
    # Facing down or left, the columns of the view run against the map's.
    return [tables[0], tables[1], tables[1], tables[0]]


class MappedGrid(Grid):
    """A grid whose changes reach its map. A grid becomes one by its class, so that nobody need replace it."""

    cell_map: "CellMap"

    def set(self, i: int, j: int, v: WorldObj | None) -> None:
        super().set(i, j, v)
        self.cell_map.update(int(i), int(j), v)
