"""Retrieve the train rows that are most similar to a row, by BM25 over words. Imports no torch."""

from __future__ import annotations

import numpy as np

from trainer.config import Task
from trainer.data.dataset import RowDataset
from trainer.data.examples_in_context import input_text


def retrieve(task: Task, train: RowDataset, rows: RowDataset, count: int) -> list[list[int]]:
    """Return for every row the indices of ``count`` train rows, the most similar one last.

    Train rows with the same content hash or the same text as the row are left out.

    Source: BM25 of Lucene, as implemented by bm25s (arXiv 2407.03618).
    """
    import bm25s

    texts = [input_text(task, row) for row in train]
    hashes = train.hashes()
    queries = [input_text(task, row) for row in rows]
    options = {"stopwords": None, "return_ids": False, "show_progress": False}
    index = bm25s.BM25()
    index.index(bm25s.tokenize(texts, **options), show_progress=False)
    words = bm25s.tokenize(queries, **options)
    chosen = []
    for query, of_query, own_hash in zip(queries, words, rows.hashes(), strict=True):
        scores = index.get_scores(of_query) if of_query else np.zeros(len(texts))
        order = np.argsort(-scores, kind="stable")
        similar: list[int] = []
        for number in order.tolist():
            if hashes[number] != own_hash and texts[number] != query:
                similar.append(number)
                if len(similar) == count:
                    break
        chosen.append(similar[::-1])
    return chosen
