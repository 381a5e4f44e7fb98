"""The run file: strict, typed, every mistake reported at once. Imports no torch.

One class per section, in the order of the file. Field names follow PEFT and transformers where they
have one. ``load`` reads a file and its ``key=value`` overrides; ``BadInput`` carries every problem
with the line, the setting, its value and the remedy.
"""

from trainer.config.base import Base, EngineConfig
from trainer.config.prompt import Init, Prompt
from trainer.config.run import (
    PROJECT_ROOT,
    RunConfig,
    dump,
    load,
    load_output,
    load_shards,
    resolve_path,
    sweeps,
)
from trainer.config.task import (
    DEFAULT_TOOLS,
    LOWER_IS_BETTER,
    PLACEHOLDER,
    DataSource,
    Task,
    template_fields,
)
from trainer.config.types import check_path, expand_path, parse_bytes

__all__ = [
    "DEFAULT_TOOLS",
    "LOWER_IS_BETTER",
    "PLACEHOLDER",
    "PROJECT_ROOT",
    "Base",
    "DataSource",
    "EngineConfig",
    "Init",
    "Prompt",
    "RunConfig",
    "Task",
    "check_path",
    "dump",
    "expand_path",
    "load",
    "load_output",
    "load_shards",
    "parse_bytes",
    "resolve_path",
    "sweeps",
    "template_fields",
]
