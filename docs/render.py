"""Write the files that follow from the settings: ``python docs/render.py``, or ``make docs``.

They are docs/run-file.md and examples/run-file.schema.json.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from trainer.config.aliases import all_aliases
from trainer.config.reference import Setting, SettingsSection, sections
from trainer.config.schema import EDITOR_LINE, FILE_NAME, schema_text

ROOT = Path(__file__).resolve().parents[1]

HEAD = f"""\
# The run file

A run file describes a run completely: the base model, tasks, prompts and how they are trained. This
page lists every setting. `promptshard settings NAME` prints the same in a terminal, and
`promptshard validate RUN.yaml` checks a run file and its data.

```yaml
output_dir: runs/support
base:
  model: meta-llama/Llama-3.2-3B     # a folder, or an id on the Hugging Face hub
tasks:
  - name: topics                     # any number of tasks
    train: data/train.jsonl          # rows such as {{"text": "Charged twice", "label": "billing"}}
    validation: data/valid.jsonl
    input: "{{text}}\\nTopic:"          # columns in braces
    target: " {{label}}"
    choices: [billing, technical, other]
    metric: accuracy
prompts:
  - name: short                      # any number of prompts for each task
    task: topics
    num_virtual_tokens: 5
  - name: long
    task: topics
    method: p_tuning
    num_virtual_tokens: 50
    init: {{text: "What is this message about?"}}
training:
  steps: 300
  tokens_per_step: 8192              # batch size, in text tokens
evaluation:
  every: 25
  early_stopping: {{patience: 5}}
checkpoint:
  every: 50
tracking:
  experiment: support
```

- **Names.** `prompts.init.text` is `text` in `init` of an item of the list `prompts`. The command
  line can override any setting: `promptshard train RUN.yaml training.steps=50
  prompts.short.seed=1 "prompts[1].init=vocab"`.
- **Unknown names** are errors, with the closest name or the translation of
  [another trainer's](#names-of-other-trainers).
- **`null`** means that a setting is not given; the tables say what holds then.
- **Values** follow the core schema of YAML 1.2: `yes`, `no` and dates are texts, and `1e-3` is a
  number. In the run file, ` #` begins a comment. On the command line it is part of a text.
- **Paths** are relative to the working directory. `~` and `$NAME` are expanded; `$$` is a dollar
  sign.
- **Editors** with the YAML language server (VS Code: the extension *YAML* by Red Hat) complete,
  explain and check a run file beside `{FILE_NAME}` that begins with
  `{EDITOR_LINE}`. The [examples](../examples) do;
  `promptshard schema` prints the file.

"""


def run_file_page() -> str:
    """Return the text of docs/run-file.md."""
    root, *others = sections().values()
    parts = [HEAD, *_contents(others)]
    parts += ["\n## Top level\n\n", *_table(s for s in root.settings if s.name not in sections())]
    for section in others:
        if section.like is None:
            parts += _section(section)
    return "".join([*parts, *_aliases()])


def _contents(others: list[SettingsSection]) -> Iterator[str]:
    yield "| section | |\n|---|---|\n"
    for section in others:
        if "." not in section.setting.name:
            inner = [
                _link(other.setting.name)
                for other in others
                if other.setting.name.startswith(f"{section.setting.name}.") and not other.like
            ]
            more = f" ({', '.join(inner)})" if inner else ""
            required = ", **required**" if section.setting.required else ""
            summary = _escape(section.setting.summary)
            yield f"| {_link(section.setting.name)} | {summary}{required}{more} |\n"


def _section(section: SettingsSection) -> Iterator[str]:
    setting = section.setting
    yield f"\n{'#' * (2 + setting.name.count('.'))} {setting.name}\n\n"
    kind = ", a list" if setting.type.startswith("list of mappings") else ""
    yield _capitalized(f"{_escape(setting.summary)}{kind}") + ".\n"
    for text in (setting.details, *section.about):
        yield f"\n{_escape(text)}\n" if text else ""
    yield "\n"
    yield from _table(section.settings)


def _table(settings: Iterator[Setting] | tuple[Setting, ...]) -> Iterator[str]:
    yield "| setting | default | meaning |\n|---|---|---|\n"
    for setting in settings:
        yield f"| `{setting.leaf}` | {_default(setting)} | {_meaning(setting)} |\n"


def _default(setting: Setting) -> str:
    if setting.required:
        return "**required**"
    return "" if setting.default is None else f"`{setting.default}`"


def _meaning(setting: Setting) -> str:
    if setting.name in sections():
        section = sections()[setting.name]
        lines = [f"{_escape(setting.summary)}; see {_link(section.like or setting.name)}"]
    else:
        lines = [_escape(setting.summary) + _type(setting), _escape(setting.details)]
    lines += [f"`{value}`: {_escape(text)}" for value, text in (setting.values or {}).items()]
    return "<br>".join(line for line in lines if line)


def _type(setting: Setting) -> str:
    """Return the type of a setting in brackets; empty if all its values are explained."""
    words = re.split(r", | or |; or ", setting.type)
    return "" if set(words) <= set(setting.values or {}) else f" (*{_escape(setting.type)}*)"


def _aliases() -> Iterator[str]:
    yield (
        "\n## Names of other trainers\n\n"
        "promptshard recognizes these names of transformers' TrainingArguments, TRL, PEFT, "
        "axolotl, LLaMA-Factory\nand DeepSpeed in a run file and in `promptshard settings NAME`, "
        "and says what to write instead.\n\n"
        "| name elsewhere | promptshard |\n|---|---|\n"
    )
    names: dict[str, list[str]] = {}
    for name, alias in all_aliases().items():
        text = f"`{alias.setting}`" if alias.setting else "no such setting"
        names.setdefault(f"{text}: {_escape(alias.remedy)}".removesuffix(": "), []).append(name)
    for text, others in names.items():
        yield f"| {', '.join(f'`{name}`' for name in others)} | {text} |\n"


def _link(name: str) -> str:
    return f"[`{name}`](#{name.replace('.', '')})"


def _capitalized(text: str) -> str:
    return text[0].upper() + text[1:]


def _escape(text: str) -> str:
    """Escape what is Markdown in a text."""
    for mark in ("\\", "|", "*", "<", ">"):
        text = text.replace(mark, f"\\{mark}")
    return text


def main() -> None:
    (ROOT / "docs" / "run-file.md").write_text(run_file_page(), encoding="utf-8")
    (ROOT / "examples" / FILE_NAME).write_text(schema_text(), encoding="utf-8")


if __name__ == "__main__":
    main()
