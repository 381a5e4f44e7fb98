"""JSON schema of the run file, from the models of its sections. Imports no torch.

Editors complete and check run files with it. It accepts all valid run files that spell numbers and
flags as such. It does not hold rules between settings: ``promptshard validate`` checks those.
"""

from __future__ import annotations

import json
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from trainer.config import sweep
from trainer.config.init import SHORT_FORMS
from trainer.config.run import RunConfig

#: Name of the schema's file; run files beside it name it in their first line.
FILE_NAME = "run-file.schema.json"
#: The line of a run file by which editors find the schema in the same folder.
EDITOR_LINE = f"# yaml-language-server: $schema={FILE_NAME}"

Schema = dict[str, Any]


def run_file_schema() -> Schema:
    """Return the JSON schema (draft 2020-12) of the run file."""
    schema = _tidy(RunConfig.model_json_schema(schema_generator=_Generator))
    sections = schema["$defs"]
    _allow_short_forms(sections)
    _allow_sweeps(sections["Prompt"])
    return {
        "$schema": GenerateJsonSchema.schema_dialect,
        **schema,
        "title": "Run file of promptshard",
        "description": "Checked with `promptshard validate`, explained by `promptshard settings`.",
    }


def schema_text() -> str:
    """Return the schema as the text of its file."""
    return json.dumps(run_file_schema(), indent=2, ensure_ascii=False) + "\n"


class _Generator(GenerateJsonSchema):
    """Leaves out titles, which repeat the names of settings."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


#: Limits that pydantic leaves in its own words beside a validator of ours.
_LIMITS = {
    "gt": "exclusiveMinimum",
    "ge": "minimum",
    "lt": "exclusiveMaximum",
    "le": "maximum",
}


def _tidy(node: Any) -> Any:
    """Remove titles, rename limits, and join the lines of class docstrings."""
    if isinstance(node, list):
        return [_tidy(item) for item in node]
    if not isinstance(node, dict):
        return node
    tidy = {
        _LIMITS.get(key, key): _tidy(value)
        for key, value in node.items()
        if key != "title" or not isinstance(value, str)
    }
    if isinstance(tidy.get("description"), str) and "properties" in tidy:
        paragraphs = tidy["description"].replace("``", "`").split("\n\n")
        tidy["description"] = "\n".join(" ".join(text.split()) for text in paragraphs)
    return tidy


def _allow_short_forms(sections: Schema) -> None:
    """Add what the validators of sections read beside the fields of their models."""
    init, source = sections["Init"], sections["DataSource"]
    sections["Init"] = {
        "description": init["description"],
        "anyOf": [{"enum": list(SHORT_FORMS), "type": "string"}, init | _one_of_its_fields(init)],
    }
    source |= {
        "oneOf": [
            {"required": [key], "properties": {key: {"type": "string"}}} for key in ("path", "hub")
        ]
    }
    sections["DataSource"] = {
        "description": source["description"],
        "anyOf": [{"type": "string", "format": "source"}, source],
    }
    task = sections["Task"]["properties"]
    for name in ("train", "validation", "shifted_validation"):
        one = {"$ref": "#/$defs/DataSource"}
        rest = task[name].pop("anyOf", None)
        many = {key: task[name].pop(key) for key in ("type", "items", "minItems") if not rest}
        task[name]["anyOf"] = [one, *(rest or [many])]
    # Choices are text as written: 01 and no need no quotes.
    texts = next(part for part in task["choices"]["anyOf"] if part["type"] == "array")
    texts["items"] = {"type": ["string", "number", "boolean"]}


def _one_of_its_fields(section: Schema) -> Schema:
    """Return the rule that exactly one field of a section is given: true, or a text."""
    given = {
        key: {"const": True} if field.get("type") == "boolean" else {"type": "string"}
        for key, field in section["properties"].items()
    }
    return {"oneOf": [{"required": [key], "properties": {key: given[key]}} for key in given]}


def _allow_sweeps(prompt: Schema) -> None:
    """Describe ``sweep``, which is expanded before the model of a prompt reads the data."""
    properties = prompt["properties"]
    lists = {
        name: {
            "description": "values of: " + field["description"].split("\n")[0],
            "type": "array",
            "items": {"$ref": f"#/$defs/Prompt/properties/{name}"},
            "minItems": 1,
            "uniqueItems": True,
        }
        for name, field in properties.items()
        if name not in sweep.NOT_SWEPT
    }
    forms = {
        "grid": {"type": "object", "properties": lists, "additionalProperties": False},
        "random": {"type": "integer", "exclusiveMinimum": 0},
    }
    for name, description in sweep.HOW.items():
        forms[name]["description"] = description
    swept = properties["sweep"]
    del swept["type"]
    swept["anyOf"] = [
        {
            "type": "object",
            "properties": {**forms, **lists},
            "additionalProperties": False,
            "minProperties": 1,
        },
        {"type": "null"},
    ]
    # The task may be swept too.
    prompt["required"] = [name for name in prompt["required"] if name != "task"]
    prompt["anyOf"] = [{"required": ["task"]}, {"required": ["sweep"]}]
