"""Distributed execution: DeepSpeed ZeRO-3, collectives, and detection of ranks that hang.

1. ``deepspeed_engine.Engine``: one per rank; initializes torch.distributed. Its base class
   ``collectives.Ranks`` has the collectives, each recorded in a ``watchdog.CollectiveTracker``.
2. ``model_loading.open_base_on_all``, ``fingerprint_base_on_all``: run file -> ``BaseFiles`` and
   digests, identical on all ranks.
3. ``model_loading.load_base``: ``BaseFiles`` -> ``LoadedBase``. ``placement.place`` chooses the
   shard group (``Placement``), ``deepspeed_config.resolve_policy`` completes DeepSpeed's JSON,
   ``zero3_sharder.Zero3Sharder`` builds the shards, and ``Engine.attach`` installs ZeRO-3's hooks.
   On a CPU, ``shared_shards.SharedShards`` gathers large bases from shared memory.
4. ``prefetch.StepPrefetcher``: ``BatchSource`` -> ``StepBatch``, built in a thread one step ahead.

Importing this package imports nothing: the launcher uses ``watchdog`` without torch.
"""
