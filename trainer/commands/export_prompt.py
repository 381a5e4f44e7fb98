"""``promptshard export RUN_DIR OUT --prompt NAME --to TARGET``: a prompt for other programs.

Reads the adapter, the tokenizer and the config of the base, and headers of its weight files. No
weights of the base are loaded, and no ranks are started.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from trainer.config import Prompt, RunConfig, Task, load_output, split_template
from trainer.data.tokenization.chat_template import dated_template, read_chat_date
from trainer.data.tokenization.tokenize import encode_request
from trainer.evaluation.stop_criteria import StopCriteria
from trainer.model.base_tokenizer import BaseTokenizer, open_tokenizer
from trainer.model.checkpoint_files import portable_name
from trainer.model.embedding_table import find_embedding_table
from trainer.model.per_layer_inputs import id_rules
from trainer.prompts.formats.clients.prompt_stream import PromptStream
from trainer.prompts.formats.exported_prompt import ExportedPrompt
from trainer.prompts.formats.target import Target
from trainer.prompts.formats.targets import find_target, write_folder
from trainer.prompts.peft_adapter import load_peft
from trainer.prompts.saved_prompts import SEGMENT, WEIGHTS
from trainer.runtime.console import Console
from trainer.runtime.errors import BadInput, did_you_mean
from trainer.runtime.json_file import read_json_object

#: Texts for which an exported script must make the tokens of the training.
_PROBES = ("x", "One note: two words, 3 numbers.\nEnd ", "  Größe – ok?")


def export_prompt(
    run_dir: Path, out: Path, name: str, to: str, peft_type: str | None, console: Console
) -> None:
    """Write a finished prompt in the format of a target to the new folder ``out``.

    Raises:
        BadInput: unknown target or prompt, no finished prompt, ``out`` exists, or the target cannot
            express the prompt.
    """
    target = find_target(to)
    if peft_type is not None and to != "peft":
        raise BadInput(f"--peft-type: works with --to peft only, not with {to}; remove it")
    config = load_output(run_dir)
    prompt = _find_prompt(config, run_dir, name)
    adapter = run_dir / "prompts" / name
    if not (adapter / WEIGHTS).is_file():
        raise BadInput(f"{run_dir}: prompt {name!r} is not saved yet; finish the run first")
    with console.phase("reading the tokenizer of the base"):
        opened = open_tokenizer(config.base)
        exported = _collect(config, prompt, run_dir, out, opened, target, peft_type)

    def check(folder: Path) -> None:
        _check_stream(folder, target, config.task(prompt.task), prompt, run_dir, opened)

    write_folder(target, exported, out, check)
    files = sorted(path for path in out.iterdir() if path.is_file())
    size = sum(path.stat().st_size for path in files)
    console.print(
        f"{out}: {exported.prompt.num_virtual_tokens} virtual tokens of {name!r} for "
        f"{target.title}, {len(files)} files, {size / 1e6:.2f} MB; {out / 'README.md'} shows how "
        "to use them"
    )


def _find_prompt(config: RunConfig, run_dir: Path, name: str) -> Prompt:
    names = [prompt.name for prompt in config.prompts]
    if name not in names:
        raise BadInput(
            f"--prompt: {name!r} is not a prompt of {run_dir}{did_you_mean(name, names)}; known: "
            f"{', '.join(names)}"
        )
    return config.prompts[names.index(name)]


def _collect(
    config: RunConfig,
    prompt: Prompt,
    run_dir: Path,
    out: Path,
    opened: BaseTokenizer,
    target: Target,
    peft_type: str | None,
) -> ExportedPrompt:
    """Collect what the files of a target state about a prompt."""
    adapter, task = run_dir / "prompts" / prompt.name, config.task(prompt.task)
    is_segment = (adapter / SEGMENT).is_file()
    segment = read_json_object(adapter / SEGMENT) if is_segment else {"before": [], "after": []}
    placed = prompt.position != "front" or split_template(task.input) is not None
    dtype = getattr(torch, str(read_json_object(run_dir / "environment.json").get("dtype")), None)
    if not isinstance(dtype, torch.dtype):
        raise BadInput(
            f"{run_dir / 'environment.json'}: dtype is not a compute type; restore the file, or "
            "train again"
        )
    table = find_embedding_table(config.base, opened, dtype, locate=target.reads_table)
    return ExportedPrompt(
        name=prompt.name,
        prompt=load_peft(adapter),
        adapter=adapter,
        out=out,
        base=portable_name(config.base),
        revision=config.base.revision,
        model_type=opened.config.model_type,
        vocab_size=table.rows,
        fixed_ids=(list(segment["before"]), list(segment["after"])),
        is_inside=placed and not is_segment,
        embedding_tensor=table.tensor,
        embedding_problem=table.problem,
        scale=table.scale,
        has_per_layer_inputs=id_rules(opened.config).padding is not None,
        request=_request_settings(task, prompt),
        chat_template=_chat_template(config, task, run_dir, opened),
        max_new_tokens=task.max_new_tokens,
        stop=StopCriteria.of(opened.generation, opened.tokenizer, task).strings,
        peft_type=peft_type,
        metadata={
            "task": task.name,
            "method": prompt.method,
            "model_type": opened.config.model_type,
        },
    )


def _request_settings(task: Task, prompt: Prompt) -> dict[str, Any]:
    """Return the settings from which ``clients/prompt_stream.py`` makes token ids."""
    return {
        "input": task.input,
        "optional": list(task.optional),
        "chat": task.is_chat,
        "system": task.system,
        "position": prompt.position,
        "chat_template_kwargs": dict(task.chat_template_kwargs),
    }


def _chat_template(
    config: RunConfig, task: Task, run_dir: Path, opened: BaseTokenizer
) -> str | None:
    """Return the chat template that replaces that of the base's tokenizer, if one does."""
    if not task.is_chat:
        return None
    if dated := dated_template(opened.tokenizer, read_chat_date(run_dir)):
        return dated
    template = opened.tokenizer.chat_template
    return template if config.base.chat_template is not None and isinstance(template, str) else None


def _check_stream(
    folder: Path, target: Target, task: Task, prompt: Prompt, run_dir: Path, opened: BaseTokenizer
) -> None:
    """Check that the exported script makes the tokens of the training.

    Raises:
        BadInput: it does not; a script would then silently give worse answers.
    """
    if not (folder / "prompt_stream.py").is_file() or task.tokens is not None:
        return
    stream, date = PromptStream(folder), read_chat_date(run_dir)
    for text in _PROBES:
        try:
            expected = encode_request(
                opened.tokenizer, task, text, position=prompt.position, date=date
            )
        except BadInput:  # the template has several columns
            continue
        if stream.ids(text) != expected:
            raise BadInput(
                f"--to {target.name}: the exported script tokenizes {text!r} differently from the "
                f"training with the tokenizer of {opened.folder}; use --to peft"
            )
