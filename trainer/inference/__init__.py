"""Use trained prompts: what predict, generate, chat, serve and the Python API share.

1. ``saved_run``: output folder of a run -> ``SavedRun`` with its ``TrainedPrompt``s; no torch
2. ``loaded_base``: ``SavedRun`` or a model -> ``InferenceBase``: the sharded base on this rank,
   which encodes requests, generates texts and scores rows
3. ``unlabeled_rows``: rows without targets -> rows with placeholders that no result depends on
4. ``predictions``: rows and prompts -> ``Prediction`` per row and prompt, with the scoring and the
   generation of ``evaluation``

All methods of ``InferenceBase`` that run the base are collectives: every rank calls them with the
same arguments and receives the same results.
"""
