"""Rows -> token ids, within the context and by the policy ``too_long`` of the task.

1. ``tokenize`` selects the row tokenizer of the task and passes it batches of rows, in this process
   or, for many rows, in the worker processes of ``worker_pool``.
2. A ``RowTokenizer`` (``row_tokenizer``) turns a batch of rows into a ``TokenBlock`` and a
   ``TokenizationReport``: ``TextRowTokenizer`` (``text``) for input and target,
   ``DialogueRowTokenizer`` (``chat``) for dialogues, ``TokenIdRowReader`` (``token_ids``) for rows
   that are token ids already.
3. Below them, ``TextTokenizer`` (``tokenizer``) makes a target's ids continue those of its input,
   and ``ChatTemplate`` (``chat_template``) writes dialogues as text, within a CPU time limit
   (``cpu_limit``).
4. ``tokenize`` joins the blocks into a ``TokenTable`` (memory-mapped from ``token_cache`` for many
   rows) and returns it as ``Tokenized``, or raises the problems of all rows.
"""
