"""Retrieve the train rows that are most similar to a row. Imports no torch.

Shape letters: A train rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from trainer.config import Task
from trainer.data.dataset import RowDataset
from trainer.data.examples_in_context import input_text
from trainer.data.row_hashing import mix_bits

Scores = NDArray[np.float32]
#: Words of at least two letters. Chinese and Japanese have no spaces: each character is a word.
WORD = r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]{2,}"


def retrieve(
    task: Task,
    train: RowDataset,
    rows: RowDataset,
    count: int,
    similarities: Iterable[Scores] | None = None,
) -> list[list[int]]:
    """Return for every row the indices of ``count`` train rows, the most similar one last.

    Train rows with the same content hash or the same text as the row are left out. Rows that are
    not similar, such as those without a common word, follow in an order by hash: a file may have
    its rows sorted by class.

    Args:
        similarities: of every row to all train rows, [A]; default: BM25 over words.
    """
    texts = [input_text(task, row) for row in train]
    hashes = train.hashes()
    queries = [input_text(task, row) for row in rows]
    if similarities is None:
        similarities = bm25(texts, queries)
    place_A = np.arange(len(hashes))
    by_hash_A = np.argsort(np.argsort(mix_bits(hashes), kind="stable"))
    chosen = []
    for query, scores_A, own_hash in zip(queries, similarities, rows.hashes(), strict=True):
        order = np.lexsort((np.where(scores_A > 0, place_A, by_hash_A), -scores_A))
        similar: list[int] = []
        for number in order.tolist():
            if hashes[number] != own_hash and texts[number] != query:
                similar.append(number)
                if len(similar) == count:
                    break
        chosen.append(similar[::-1])
    return chosen


def bm25(texts: Sequence[str], queries: Sequence[str]) -> Iterator[Scores]:
    """Yield the similarity of every query to all texts, [A].

    Source: BM25 of Lucene, as implemented by bm25s (arXiv 2407.03618).
    """
    import bm25s

    options = {"token_pattern": WORD, "stopwords": None, "return_ids": False}
    options["show_progress"] = False
    index = bm25s.BM25()
    index.index(bm25s.tokenize(texts, **options), show_progress=False)
    for words in bm25s.tokenize(queries, **options):
        yield index.get_scores(words) if words else np.zeros(len(texts), np.float32)
