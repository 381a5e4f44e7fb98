"""The program of ``promptshard serve``: an OpenAI-compatible HTTP server over one sharded base.

1. ``options``: command line -> ``Options``; imports no torch
2. ``program``: loads the base on all ranks. Rank 0 runs the HTTP server in its main thread and the
   ``StreamingDecoder`` in a second one; other ranks run the decoder.
3. ``access``: HTTP request -> allowed or refused: token, host, size of the body
4. ``app``: routes; ``bodies``: JSON -> ``CompletionBody`` or ``ChatBody``
5. ``service``: body -> ``GenerationRequest`` of a model; ``submission``: requests -> ``Piece``s
6. ``answers``: ``Piece``s -> JSON objects and events; ``token_texts``: token id -> text and bytes;
   ``errors``: ``ApiError`` -> JSON
7. ``metrics``: counters -> Prometheus text format
"""
