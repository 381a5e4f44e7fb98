"""File formats of other programs for trained prompts.

1. ``target_names``: names of the targets. Imports no torch.
2. ``exported_prompt``: ``ExportedPrompt``, the prompt and all that a target's files state about it.
3. ``peft_format``, ``vllm_format``, ``sglang_format``, ``tensorrt_llm_format``,
   ``llama_cpp_format``, ``npz_format``: each has one ``Target``: ``ExportedPrompt`` -> folder.
4. ``targets``: the table of targets. Checks a prompt and writes the folder.
5. ``clients``: scripts that are copied into the folders. They do not import promptshard.
"""
