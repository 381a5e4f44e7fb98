"""Parse the Jinja source of a chat template. Imports neither torch nor transformers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from jinja2 import TemplateSyntaxError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from trainer.runtime.errors import did_you_mean

#: What transformers passes to every template: the dialogue, and functions.
_PASSED = frozenset(
    {"add_generation_prompt", "documents", "messages", "raise_exception", "strftime_now", "tools"}
)


class _Generation(Extension):
    """Accepts ``{% generation %}``, which marks the turns of the assistant in transformers."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def environment() -> ImmutableSandboxedEnvironment:
    """Return an environment that accepts the same syntax as transformers."""
    return ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )


@cache
def variables(source: str) -> frozenset[str] | None:
    """Return the variables that a template reads; None if its syntax is not valid.

    Without those that transformers passes to every template. Special tokens are included, such as
    ``bos_token``.
    """
    parser = environment()
    try:
        return frozenset(meta.find_undeclared_variables(parser.parse(source))) - _PASSED
    except TemplateSyntaxError:
        return None


def variable_problem(name: str, sources: Sequence[str]) -> str | None:
    """Describe a variable that none of some templates reads; None if one does."""
    read = [variables(source) for source in sources]
    if any(names is None or name in names for names in read):
        return None
    settings = sorted(set[str]().union(*map(_settings, sources)))
    known = f"it reads {', '.join(settings)}" if settings else "it reads none"
    hint = did_you_mean(name, settings) or f"; {known}"
    return f"the chat template reads no such variable{hint}; correct the name or remove it"


def _settings(source: str) -> set[str]:
    """Return the variables of a template that a user may set.

    Those that it does not assign itself, or tests for being defined; without special tokens.
    """
    tree = environment().parse(source)
    names = {node.name for node in tree.find_all(nodes.Name) if node.ctx == "store"}
    tests = (node.node for node in tree.find_all(nodes.Test) if node.name.endswith("defined"))
    tested = {node.name for node in tests if isinstance(node, nodes.Name)}
    read = variables(source) or frozenset()
    return {name for name in read if name not in names - tested and not name.endswith("_token")}
