"""The memory tables of the documents are those that the code computes."""

from __future__ import annotations

import pytest

from benchmarks import memory

README, BIG_MODELS = memory.DOCUMENTS
#: Number of weights of the published models.
WEIGHTS = {
    "Llama-3.1-8B": 8_030_261_248,
    "Qwen3-32B": 32_762_123_264,
    "Llama-3.1-70B": 70_553_706_496,
    "Llama-3.1-405B": 405_853_388_800,
}


def rows(path, marker):
    """Rows of a marked table, without its head."""
    (table,) = (m[0] for m in memory.MARKED.finditer(path.read_text()) if m[2] == marker)
    return table.splitlines()[3:-1]


@pytest.mark.parametrize(("place", "name"), list(enumerate(memory.configs())))
def test_tables_are_current(place, name):
    measured = memory.measure(memory.configs()[name])
    assert measured.checkpoint == 2 * WEIGHTS[name]  # bytes in bfloat16
    expected = memory.base_row(name, measured)
    assert rows(README, "memory-base")[place] == expected, "python -m benchmarks.memory --write"
    assert rows(BIG_MODELS, "memory-base")[place] == expected
    assert rows(BIG_MODELS, "memory-batch")[place] == memory.batch_row(name, measured)
