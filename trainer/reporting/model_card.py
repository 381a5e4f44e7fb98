"""Model cards of adapters: ``prompts/NAME/README.md``, in the form of the Hugging Face hub.

The front matter has the fields of https://huggingface.co/docs/hub/model-cards, with the scores as
model-index. The text has the data, scores beside those of the baselines, settings, and use in PEFT,
vLLM and promptshard.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from trainer.config import Prompt, RunConfig, Task, split_template
from trainer.evaluation.score_format import column_title
from trainer.evaluation.statistics import STANDARD_ERROR
from trainer.model.base_license import License
from trainer.prompts.adapter_files import SETTINGS
from trainer.reporting.html.run_warnings import DataSplit, data_splits
from trainer.reporting.markdown_text import argument, code, markdown
from trainer.reporting.result_table import ResultRow, TaskTable
from trainer.reporting.summary import RunSummary
from trainer.runtime import atomic_io
from trainer.runtime.json_file import read_json_object
from trainer.runtime.redact import printable, redact

CARD = "README.md"
#: Value of the field ``license`` if neither the run file nor the base states one.
NO_LICENSE = License("unknown")
#: Settings of a prompt that the card lists, if they are set.
_SETTINGS = (
    *("method", "encoder", "share", "num_virtual_tokens", "position", "objective", "preset"),
    *("optimizer", "relative_learning_rate", "learning_rate", "schedule", "seed"),
)
_CARD = """---
{header}
---

# {name}

{what} for the frozen base {base}, trained by promptshard. The base is unchanged.

## Training

| | |
|---|---|
{facts}

## Scores

{scores}

## Use in PEFT
{peft}
## Use in vLLM

{vllm}

## Use in promptshard

```bash
promptshard generate {run_dir} --prompt {name} --input "..."
```

## License

{license}
"""
_VLLM = """```bash
promptshard export {run_dir} {name}-vllm --prompt {name} --to vllm
vllm serve {base} --enable-prompt-embeds --no-enable-prefix-caching{options}
python {name}-vllm/vllm_client.py "..."
```"""
_NO_VLLM = "vLLM takes input embeddings, not keys and values: use PEFT or promptshard."
_GGUF = (
    "The client reads embeddings of the base from safetensors, and the base is a GGUF file: use "
    "`promptshard export --to llama-cpp`."
)
_LICENSE = {
    "run": "{license}, as the run file states. The base has its own license.",
    "base": "{license}, the license that the base states.",
    "unknown": "Not known: the base states none. Set `license` above before you publish the "
    "adapter, or `license` in the run file before you train.",
}


def write_cards(
    output: Path,
    config: RunConfig,
    summary: RunSummary,
    tables: Sequence[TaskTable],
    usages: Mapping[str, str],
    base_digest: str,
    of_base: License | None = None,
) -> None:
    """Write the card of every saved adapter.

    Args:
        usages: sections about the use in PEFT, by prompt, as ``save_peft`` returns them.
        base_digest: SHA-256 of the base's weights.
        of_base: license of the base.
    """
    splits = data_splits(output, summary)
    for table in tables:
        for row in table.prompts:
            if row.name not in usages:
                continue
            prompt = next(prompt for prompt in config.prompts if prompt.name == row.name)
            text = _card(output, config, summary, table, row, prompt, splits, base_digest, of_base)
            card = text.replace("\0usage", usages[row.name])
            atomic_io.write(output / "prompts" / row.name / CARD, card)


def _card(
    output: Path,
    config: RunConfig,
    summary: RunSummary,
    table: TaskTable,
    row: ResultRow,
    prompt: Prompt,
    splits: Sequence[DataSplit],
    base_digest: str,
    of_base: License | None,
) -> str:
    adapter = read_json_object(output / "prompts" / prompt.name / SETTINGS)
    base, run_dir = str(adapter["base_model_name_or_path"]), argument(str(output.resolve()))
    is_prefix = adapter["peft_type"] == "PREFIX_TUNING"
    kind = "keys and values" if is_prefix else "embeddings"
    options = (
        "" if config.base.revision is None else f" --revision {argument(config.base.revision)}"
    )
    if config.base.chat_template is not None:
        options += f" --chat-template {prompt.name}-vllm/chat_template.jinja"
    vllm = _VLLM.format(run_dir=run_dir, name=prompt.name, base=argument(base), options=options)
    if is_prefix or base.endswith(".gguf"):
        vllm = _NO_VLLM if is_prefix else _GGUF
    task, source, license = config.task(prompt.task), "unknown", NO_LICENSE
    if config.license is not None:
        source, license = "run", License(config.license)
    elif of_base is not None:
        source, license = "base", of_base
    return _CARD.format(
        header=_header(base, str(adapter["peft_type"]), prompt, task, table, row, license),
        what=f"{row.num_virtual_tokens} virtual tokens ({kind})",
        base=code(base),
        facts="\n".join(
            f"| {name} | {value} |"
            for name, value in [
                ("task", f"{markdown(task.name)}, metric {column_title(task.metric)}"),
                *_data_facts(splits, task),
                ("base", f"{code(base)}, revision {markdown(config.base.revision or 'none')}"),
                ("SHA-256 over the base's weight files", code(base_digest)),
                *_setting_facts(prompt, task, summary),
            ]
        ),
        scores=_scores(table, row),
        peft="\0usage",
        vllm=vllm,
        run_dir=run_dir,
        name=prompt.name,
        license=_LICENSE[source].format(license=code(license.name or license.id)),
    )


def _header(
    base: str,
    peft_type: str,
    prompt: Prompt,
    task: Task,
    table: TaskTable,
    row: ResultRow,
    license: License,
) -> str:
    """Return the front matter, without the lines around it."""
    results = [
        EvalResult(
            task_type="text-classification" if task.choices else "text-generation",
            dataset_type=task.name,
            dataset_name=task.name,
            dataset_split=column.partition("validation_")[0] + "validation",
            metric_type=column.rpartition("validation_")[2],
            metric_name=column_title(column),
            metric_value=round(value, 6),
        )
        for column, value in row.shown.items()
        if math.isfinite(value) and not column.endswith(STANDARD_ERROR)
    ]
    data = ModelCardData(
        library_name="peft",
        base_model=printable(base),
        base_model_relation="adapter",
        datasets=[source.hub for source in task.train if source.hub] or None,
        **license.fields(),
        pipeline_tag="text-generation",
        tags=[peft_type.lower().replace("_", "-"), "promptshard"],
        model_name=prompt.name,
        eval_results=results or None,
    )
    header: str = data.to_yaml()
    return header


def _data_facts(splits: Sequence[DataSplit], task: Task) -> list[tuple[str, str]]:
    return [
        (
            f"{split.split.replace('_', ' ')} rows",
            f"{split.rows or 0:,} of {code(_file(split.path or 'unknown'))}, "
            f"SHA-256 {code(split.digest)}",
        )
        for split in splits
        if split.task == task.name
    ]


def _file(path: str) -> str:
    """Return the path of a data file, or its name if the path is that of one machine only."""
    return Path(path).name if Path(path).is_absolute() else redact(path)


def _setting_facts(prompt: Prompt, task: Task, summary: RunSummary) -> list[tuple[str, str]]:
    settings = prompt.model_dump(mode="json")
    chosen = {name: settings[name] for name in _SETTINGS if settings.get(name) is not None}
    if split_template(task.input) is not None:
        chosen["position"] = "{virtual_tokens} in the input template"
    init = {name: value for name, value in settings["init"].items() if value}
    chosen["init"] = ", ".join(n if v is True else f"{n}: {v}" for n, v in init.items())
    result = summary.prompts.get(prompt.name)
    best = "" if result is None else f"{result.best_step} of {summary.steps}"
    versions = ", ".join(f"{name} {text}" for name, text in summary.versions.items())
    facts = {**chosen, "best step": best, "versions": versions}
    return [
        (name.replace("_", " "), markdown(str(value))) for name, value in facts.items() if value
    ]


def _scores(table: TaskTable, row: ResultRow) -> str:
    """Return the scores of a prompt and of the baselines, with 95% intervals."""
    lines = [
        "| | " + " | ".join(table.titles) + " |",
        "|---|" + "---|" * len(table.titles),
    ]
    for shown in (row, *table.baselines):
        name = f"**{markdown(shown.label)}**" if shown is row else markdown(shown.label)
        lines.append(f"| {name} | " + " | ".join(table.cells(shown)) + " |")
    text = "\n".join(lines)
    if table.counts:
        text += f"\n\nScores with 95% intervals, over {table.counts}."
    if row.best and table.comparison is not None:
        text += f" {markdown(table.verdict)}"
    return text
