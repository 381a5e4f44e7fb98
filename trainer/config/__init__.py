"""The run file: strict and typed, with all errors reported at once. Imports no torch.

1. ``yaml_parser.py``: text -> ``Document``: plain data and the line of every value.
2. ``yaml_source.py``: file, ``key=value`` overrides -> ``YamlSource``: data with their origin.
3. ``sweep.py``: ``YamlSource`` -> ``Expansion``: one prompt per combination of a sweep.
4. ``run.py``: ``Expansion`` -> ``RunConfig``, with one class per section: ``base.py``, ``task.py``
   with ``data_source.py``, ``prompt.py`` with ``init.py`` and ``prompt_defaults.py`` (encoders are
   registered in ``encoders.py``), ``training.py``, ``tracking.py``.
5. ``explain.py``: pydantic's errors -> ``BadInput`` with line, setting, value and remedy;
   ``aliases.py`` translates names of other trainers.

Not needed to load a run file: ``schema.py`` makes a JSON schema of ``RunConfig``, and
``reference.py`` makes descriptions of all settings of that schema.

Names of settings follow PEFT and transformers. ``ranking.py`` has the rule for the best prompt.
"""

from trainer.config.base import Base, EngineConfig
from trainer.config.data_source import DataSource, WrittenSource
from trainer.config.init import Init
from trainer.config.prompt import Prompt
from trainer.config.run import (
    PROJECT_ROOT,
    SHIPPED,
    RunConfig,
    dump,
    load,
    load_output,
    load_shards,
    resolve_path,
    sweeps,
)
from trainer.config.task import (
    DEFAULT_MASK,
    DEFAULT_TOOLS,
    LOWER_IS_BETTER,
    PLACEHOLDER,
    Task,
    fixed_beginning,
    split_template,
    template_fields,
)
from trainer.config.types import check_path, expand_path, parse_bytes

__all__ = [
    "DEFAULT_MASK",
    "DEFAULT_TOOLS",
    "LOWER_IS_BETTER",
    "PLACEHOLDER",
    "PROJECT_ROOT",
    "SHIPPED",
    "Base",
    "DataSource",
    "EngineConfig",
    "Init",
    "Prompt",
    "RunConfig",
    "Task",
    "WrittenSource",
    "check_path",
    "dump",
    "expand_path",
    "fixed_beginning",
    "load",
    "load_output",
    "load_shards",
    "parse_bytes",
    "resolve_path",
    "split_template",
    "sweeps",
    "template_fields",
]
