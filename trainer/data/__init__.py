"""Files -> rows -> token ids. Imports no torch.

Steps from a file to a packed batch, with the type passed at each step:

1. ``data_files``: a setting such as ``train`` (``DataSource``) -> ``DataFile``: a text file, or a
   ``Table`` (``table_readers``: parquet, arrow, saved folder, hub data set). ``split_files`` finds
   the splits in a folder, for ``promptshard init``.
2. Readers: ``DataFile`` -> ``FileRecord`` per row, or its problem (``text_readers``,
   ``csv_reader``, ``json_reader``; tables through ``arrow_values``). JSON Lines and tables of text
   and integers take a faster path: Arrow record batches (``arrow_reader``).
3. ``row_validation``: ``FileRecord`` -> the used columns in their parsed form (``column_parsers``),
   or ``Problems``, each with ``FILE:LINE`` and remedy.
4. ``ingest``: all rows of a file -> ``IngestedFile``: memory-mapped Arrow, with a hash per row.
5. ``splits``: ``IngestedFile`` -> ``RowDataset`` (``dataset``) per split: mixes sources
   (``MixtureComponent``), holds out validation rows and applies ``max_rows`` by content hash
   (``row_hashing``), and reports validation rows that are also in train (``LeakedRows``).
6. ``tokenization``: ``RowDataset`` -> ``TokenBlock`` per batch -> ``TokenTable`` of ``Example``
   (``token_table``), kept in ``token_cache``.
   Before, ``prompt_positions`` replaces ``position: auto`` in the settings.
7. ``task_data``: the splits of a task -> ``TaskData``: a ``TokenTable`` for training, an
   ``EvalSet`` per validation split, without a prompt and after each hard prompt, and the
   ``Teacher`` of each distilled prompt (``teacher``).
   ``preview`` tokenizes the first rows only, for ``promptshard validate --preview``;
   ``examples_in_context`` and ``retrieval`` put train rows before rows, for ``evaluate``.
8. ``sampler``: ``TokenTable`` -> ``TokenBudgetSampler``: row numbers of each update.
9. ``packing.batch_source``: row numbers -> ``PackedRow`` of each prompt.
10. ``packing.planning`` and ``packing.packed_batch``: ``PackedRow`` -> ``PackedBatch``, one
    micro-batch ``[prompt segments | row segments]`` without padding.
"""
