"""Rows seen side by side are the rows themselves."""

import gc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixturekit.modeling.block_io import BLOCK
from mixturekit.modeling.row_windows import RowWindows

ROWS = 6


@given(st.lists(st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=ROWS, unique=True), max_size=8), st.data())
def test_window_and_rows_are_the_same_memory(choices, data):
    windows = RowWindows(ROWS, 3 * BLOCK, 2 * BLOCK)
    windows.memory.random_(0, 256)
    alive = []
    for rows in choices:
        window = windows.window(rows)
        assert window.shape == (len(rows), 2 * BLOCK)
        alive.append((rows, window))
        number = data.draw(st.integers(0, len(rows) - 1))
        windows.memory[rows[number], 5] = data.draw(st.integers(0, 255))
        window[number, 2 * BLOCK - 1] = data.draw(st.integers(0, 255))
        for chosen, shown in alive:
            assert torch.equal(shown, windows.memory[chosen, : 2 * BLOCK])


def mappings():
    with open("/proc/self/maps") as file:
        return sum("memfd:experts" in line for line in file)


def test_nothing_stays_mapped():
    before = mappings()
    windows = RowWindows(ROWS, BLOCK, BLOCK)
    kept = windows.window([4, 0])
    for row in range(ROWS):
        windows.window([row])
    memory = windows.memory
    del windows
    gc.collect()
    assert mappings() > before
    kept[1, 3] = 7
    assert memory[0, 3] == 7
    del kept, memory
    gc.collect()
    assert mappings() == before


def test_rows_that_are_not_there_are_refused():
    windows = RowWindows(ROWS, BLOCK, BLOCK)
    with pytest.raises(OSError, match="a window onto experts"):
        windows.window([0, -1])
