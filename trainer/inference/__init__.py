"""Use trained prompts: what predict, generate, chat, serve and the Python API share.

1. ``saved_run``: output folder of a run -> ``SavedRun`` with its ``TrainedPrompt``s; no torch
2. ``opened_base``: ``SavedRun`` or a model -> ``OpenedBase``, whose files are checked ->
   ``loaded_base.InferenceBase``: the sharded base on this rank, which encodes requests, generates
   texts and scores rows
3. ``input_rows``: file or rows in memory, with or without targets -> ``InputRows``; no torch
4. ``predictions``: rows and prompts -> ``Prediction`` per row and prompt, with the scoring and the
   generation of ``evaluation``
5. ``stream.StreamingDecoder``: ``GenerationRequest`` and ``Sampling`` -> ``Piece`` after ``Piece``,
   with continuous batching: requests with different prompts join and leave one running batch.
   ``stream_schedule`` decides which rank decodes a request, ``stream_batch`` holds the rows of one
   rank, ``evaluation.token_sampling`` chooses tokens, ``stream_text`` turns them into pieces of
   text.

All methods of ``InferenceBase`` that run the base are collectives: every rank calls them with the
same arguments and receives the same results.
"""
