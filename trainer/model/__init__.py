"""The frozen base model, from its checkpoint to a forward pass with prompts.

1. ``checkpoint_files.open_base``: folder or hub id -> ``BaseFiles``: config, tokenizer and the
   headers of all weight files. ``hub`` downloads them, ``model_folder`` and ``families`` reject
   damaged or unsupported models, ``generation_config`` reads the generation config.
2. ``weight_mapping.map_weights`` (in ``open_base``): stored tensors -> ``WeightMapping``: the
   tensors that transformers loads into each parameter.
3. ``meta_model.build_meta_model``: ``BaseFiles`` -> ``PreTrainedModel`` on ``meta`` with the frozen
   layers of ``layers/`` and the attention of ``attention/``.
4. ``shard_loading.load_shards``: model on ``meta`` -> this rank's shards, read by rows
   (``tensor_locations``, ``safetensors_reader``) and quantized to int8.
5. ``prompted_model.PromptedBase``: ``PackedBatch`` and virtual tokens -> losses, hidden states or
   logits; or ``decode_step.DecodeStep`` -> logits of the next tokens.

``chat_template_file`` reads ``base.chat_template``; ``tokenizer_class`` compares the tokenizer with
its file. ``fingerprint`` hashes the files of a base; ``base_license`` reads its license.
``embedding_lookup`` reads the embeddings of some tokens without loading the base;
``embedding_table`` finds their table for other programs.
"""
