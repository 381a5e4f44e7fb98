"""Rows -> token ids. ``too_long`` of the task applies to rows that exceed the context.

1. ``tokenize`` selects the row tokenizer of the task and passes batches of rows to it, in this
   process or, for many rows, in the worker processes of ``worker_pool``.
2. A ``RowTokenizer`` (``row_tokenizer``) converts a batch of rows to a ``TokenBlock`` and a
   ``TokenizationReport``: ``TextRowTokenizer`` (``text``) for input and target,
   ``DialogueRowTokenizer`` (``dialogue_rows``) for dialogues, ``TokenIdRowReader``
   (``token_ids``) for tokenized rows.
3. ``DialogueEncoder`` (``chat``) finds the tokens that generation reads and writes in each learned
   turn. A dialogue whose chat template rewrites earlier turns becomes an ``Example`` with branches
   (``dialogue_tree``).
   ``ReasoningFormat`` (``reasoning``) handles generation prompts that open or close a block of
   reasoning. ``message_edits`` changes dialogues before they are encoded.
4. They use ``TextTokenizer`` (``tokenizer``), which tokenizes targets as continuations of inputs
   (dialogues by ``segments`` between special tokens), and ``ChatTemplate`` (``chat_template``),
   which writes dialogues as text within a CPU time limit (``cpu_limit``).
5. ``tokenize`` joins the blocks into a ``TokenTable`` (memory-mapped from ``token_cache`` for many
   rows) and returns it as ``Tokenized``, or raises the problems of all rows.
"""
