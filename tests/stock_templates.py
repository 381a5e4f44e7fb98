"""Chat templates with the structure of those that model families ship, and what they mean.

Written for the tests: short texts in place of the long instructions of the originals.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

#: Special tokens of all families.
SPECIALS = [
    "<|im_start|>", "<|im_end|>", "<|im_sep|>", "<think>", "</think>", "<tool_call>",
    "</tool_call>", "<tool_response>", "</tool_response>", "<|start|>", "<|end|>", "<|message|>",
    "<|channel|>", "<|return|>", "<|call|>", "<|system|>", "<|user|>", "<|assistant|>",
    "<|observation|>", "[gMASK]", "<sop>", "<start_of_turn>", "<end_of_turn>",
    "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "[INST]", "[/INST]",
    "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "<|tool|>", "<|/tool|>", "<|User|>", "<|Assistant|>", "<|turn>",
    "<turn|>", "<|channel>", "<channel|>",
]  # fmt: skip


@dataclass(frozen=True)
class Stock:
    """A family's chat template.

    Attributes:
        ends: tokens at which the family's generation config stops.
        answer: what generation writes for a plain answer, with ``{}`` for its text.
        call: what generation writes for a call of the tool ``add`` with ``{"a": 1}``; None: the
            template has no tools.
        tail: what the template writes after the end of the dialogue.
        system: the template accepts a system turn.
        variables: settings of ``chat_template_kwargs`` under which all of this holds.
        rewrites: without system turn and tools, an earlier turn is written in another way than
            the last one.
        kind: of the tokenizer, as in ``tokenizers_of_families``.
    """

    source: str
    ends: tuple[str, ...]
    answer: str
    call: str | None = None
    tail: str = ""
    system: bool = True
    variables: Mapping[str, Any] = field(default_factory=dict)
    rewrites: bool = False
    kind: str = "llama3"


#: The last user's turn that is not a result of a tool; thoughts before it are left out.
_LAST_QUERY = """\
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}"""
_QWEN_HEAD = """\
{%- if tools %}{{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- '# Tools' }}{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}"""
_QWEN_TURNS = """\
{%- for m in messages %}
    {%- set content = m.content if m.content is string else '' %}
    {%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- elif m.role == 'assistant' %}
        {%- set thoughts = m.reasoning_content if m.reasoning_content is string else '' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last and (ALWAYS or loop.last or thoughts) %}
            {{- '<think>\\n' + thoughts.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content }}
        {%- for call in m.tool_calls or [] %}
            {%- if not loop.first or content %}{{- '\\n' }}{%- endif %}
            {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}{{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif m.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}"""
_QWEN_3_END = """\
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
_QWEN_3_5_END = _QWEN_3_END.replace(
    "    {%- endif %}\n{%- endif %}",
    "    {%- else %}{{- '<think>\\n' }}\n    {%- endif %}\n{%- endif %}",
)
_QWEN_3 = _QWEN_HEAD + _LAST_QUERY + _QWEN_TURNS.replace("ALWAYS", "false") + _QWEN_3_END
_QWEN_3_5 = _QWEN_HEAD + _LAST_QUERY + _QWEN_TURNS.replace("ALWAYS", "true") + _QWEN_3_5_END
_QWEN_CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>'

_GPT_OSS = """\
{{- '<|start|>system<|message|>Current date: ' + strftime_now('%Y-%m-%d') + '\\nReasoning: ' }}
{{- (reasoning_effort or 'medium') + '<|end|>' }}
{%- set first = messages[0].content if messages[0].role == 'system' else '' %}
{%- if first or tools %}
    {{- '<|start|>developer<|message|>' }}
    {%- if first %}{{- '# Instructions\\n\\n' + first }}{%- endif %}
    {%- if tools %}{{- '# Tools\\n' }}
        {%- for tool in tools %}{{- 'type ' + tool.function.name + '\\n' }}{%- endfor %}
    {%- endif %}
    {{- '<|end|>' }}
{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'user' %}{{- '<|start|>user<|message|>' + m.content + '<|end|>' }}
    {%- elif m.role == 'tool' %}
        {{- '<|start|>functions.add to=assistant<|channel|>commentary<|message|>' }}
        {{- m.content | tojson }}{{- '<|end|>' }}
    {%- elif m.role == 'assistant' and m.tool_calls %}
        {{- '<|start|>assistant to=functions.' + m.tool_calls[0].function.name }}
        {{- '<|channel|>commentary json<|message|>' }}
        {{- m.tool_calls[0].function.arguments | tojson }}{{- '<|call|>' }}
    {%- elif m.role == 'assistant' %}
        {%- if loop.last and m.thinking %}
            {{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}
        {%- endif %}
        {{- '<|start|>assistant<|channel|>final<|message|>' + m.content }}
        {{- '<|return|>' if loop.last else '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"""

_PHI_3 = """\
{% for m in messages %}{% if m.role == 'system' %}{{ '<|system|>\\n' + m.content + '<|end|>\\n' }}\
{% elif m.role == 'user' %}{{ '<|user|>\\n' + m.content + '<|end|>\\n' }}\
{% elif m.role == 'assistant' %}{{ '<|assistant|>\\n' + m.content + '<|end|>\\n' }}{% endif %}\
{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}\
{% endif %}"""
_PHI_4 = """\
{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"""

#: All system turns come first; an answer after thoughts has none of them.
_DEEPSEEK = """\
{%- set ns = namespace(system='', user=false) %}
{%- for m in messages %}{%- if m.role == 'system' %}{%- set ns.system = ns.system + m.content %}
{%- endif %}{%- endfor %}
{{- bos_token + ns.system }}
{%- for m in messages %}
    {%- if m.role == 'user' %}{%- set ns.user = true %}{{- '<|User|>' + m.content }}
    {%- elif m.role == 'assistant' %}
        {%- if ns.user %}{{- '<|Assistant|>' + CLOSED }}{%- endif %}
        {%- set ns.user = false %}
        {%- set content = m.content or '' %}
        {%- if '</think>' in content %}
            {%- set content = content.split('</think>')[-1] %}
        {%- endif %}
        {{- content }}
        {%- for call in m.tool_calls or [] %}
            {{- '<tool_call>' + call.function.name + ' ' }}
            {{- call.function.arguments | tojson }}{{- '</tool_call>' }}
        {%- endfor %}
        {{- eos_token }}
    {%- elif m.role == 'tool' %}
        {{- '<tool_response>' + m.content + '</tool_response>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt and ns.user %}{{- '<|Assistant|>' + OPENED }}{%- endif %}"""
_DEEPSEEK_V3 = _DEEPSEEK.replace("CLOSED", "''").replace("OPENED", "''")
_DEEPSEEK_V3_1 = _DEEPSEEK.replace("CLOSED", "'</think>'").replace(
    "OPENED", "('<think>' if thinking else '</think>')"
)
_DEEPSEEK_CALL = '<tool_call>add {"a": 1}</tool_call></s>'

#: Answers without thoughts have an empty block, which the prompt of generation writes otherwise.
_NEMOTRON = (
    _QWEN_HEAD
    + _LAST_QUERY
    + _QWEN_TURNS.replace("loop.index0 > ns.last and (ALWAYS or loop.last or thoughts)", "true")
    .replace(
        "'<think>\\n' + thoughts", "('<think>\\n' + thoughts + '\\n' if thoughts else '<think>')"
    )
    .replace(".strip('\\n') + '\\n</think>\\n\\n'", " + '</think>'")
    + """\
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
    {{- '<think></think>' if enable_thinking is defined and not enable_thinking else '<think>\\n' }}
{%- endif %}"""
)

#: A turn has no end mark: the next turn begins.
_GLM = (
    """\
[gMASK]<sop>
{%- if tools %}{{- '<|system|>\\n# Tools' }}
    {%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
{%- endif %}"""
    + _LAST_QUERY
    + """\
{%- for m in messages %}
    {%- if m.role == 'user' %}{{- '<|user|>\\n' + m.content }}
        {{- '/nothink' if enable_thinking is defined and not enable_thinking else '' }}
    {%- elif m.role == 'system' %}{{- '<|system|>\\n' + m.content }}
    {%- elif m.role == 'tool' %}
        {{- '<|observation|>\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
    {%- else %}
        {{- '<|assistant|>' }}
        {%- if loop.index0 > ns.last and m.reasoning_content %}
            {{- '\\n<think>' + m.reasoning_content.strip() + '</think>' }}
        {%- else %}{{- '\\n<think></think>' }}
        {%- endif %}
        {%- if m.content %}{{- '\\n' + m.content.strip() }}{%- endif %}
        {%- for call in m.tool_calls or [] %}
            {{- '\\n<tool_call>' + call.function.name + '\\n' }}
            {{- call.function.arguments | tojson }}{{- '\\n</tool_call>' }}
        {%- endfor %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}
    {{- '\\n<think></think>' if enable_thinking is defined and not enable_thinking else '' }}
{%- endif %}"""
)

_GEMMA_3 = """\
{{ bos_token }}
{%- if messages[0].role == 'system' -%}
    {%- if messages[0].content is string -%}{%- set first = messages[0].content + '\\n\\n' -%}
    {%- else -%}{%- set first = messages[0].content[0].text + '\\n\\n' -%}{%- endif -%}
    {%- set turns = messages[1:] -%}
{%- else -%}{%- set first = '' -%}{%- set turns = messages -%}
{%- endif -%}
{%- for m in turns -%}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif -%}
    {%- set role = 'model' if m.role == 'assistant' else m.role -%}
    {{ '<start_of_turn>' + role + '\\n' + (first if loop.first else '') }}
    {%- if m.content is string -%}{{ m.content | trim }}
    {%- else -%}
        {%- for part in m.content -%}{%- if part.type == 'text' -%}{{ part.text | trim }}
        {%- endif -%}{%- endfor -%}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"""

#: The generation prompt has an empty block of thoughts that no dialogue has.
_GEMMA_4 = """\
{{- bos_token }}
{%- for m in messages %}
    {{- '<|turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}
    {%- if loop.last and m.reasoning_content %}
        {{- '<|channel>thought\\n' + m.reasoning_content + '<channel|>' }}
    {%- endif %}
    {{- m.content + '<turn|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|turn>model\\n' }}
    {{- '' if enable_thinking else '<|channel>thought\\n<channel|>' }}
{%- endif %}"""

_LLAMA_3 = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}
    {%- set first = messages[0].content | trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set first = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{%- if tools %}{{- 'Environment: ipython\\n' }}{%- endif %}
{{- 'Today Date: ' + (date_string or strftime_now('%d %b %Y')) + '\\n\\n' + first + '<|eot_id|>' }}
{%- if tools and messages %}
    {%- set asked = messages[0].content | trim %}{%- set messages = messages[1:] %}
    {{- '<|start_header_id|>user<|end_header_id|>\\n\\n' }}
    {%- for tool in tools %}{{- tool | tojson }}{{- '\\n\\n' }}{%- endfor %}
    {{- asked + '<|eot_id|>' }}
{%- endif %}
{%- for m in messages %}
    {%- if m.tool_calls %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' }}
        {{- m.tool_calls[0].function.name + '", "parameters": ' }}
        {{- m.tool_calls[0].function.arguments | tojson }}{{- '}<|eot_id|>' }}
    {%- elif m.role == 'tool' %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + m.content + '<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' }}
        {{- m.content | trim }}{{- '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""

#: System turn and tools are before the last user's turn.
_MISTRAL = """\
{%- if messages[0].role == 'system' %}
    {%- set first = messages[0].content %}{%- set turns = messages[1:] %}
{%- else %}{%- set first = '' %}{%- set turns = messages %}
{%- endif %}
{%- set users = turns | selectattr('role', 'equalto', 'user') | list %}
{{- bos_token }}
{%- for m in turns %}
    {%- if m.role == 'user' %}
        {%- if tools and m == users[-1] %}
            {{- '[AVAILABLE_TOOLS] ' }}{{- tools | tojson }}{{- '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST] ' + (first + '\\n\\n' if first and m == users[-1] else '') + m.content }}
        {{- '[/INST]' }}
    {%- elif m.tool_calls %}
        {{- '[TOOL_CALLS] ' + m.tool_calls[0].function.name + ' ' }}
        {{- m.tool_calls[0].function.arguments | tojson }}{{- eos_token }}
    {%- elif m.role == 'tool' %}{{- '[TOOL_RESULTS] ' + m.content + '[/TOOL_RESULTS]' }}
    {%- else %}{{- ' ' + m.content + eos_token }}
    {%- endif %}
{%- endfor %}"""
#: The text of the system is before the user's turn that the base answers, in no other dialogue.
_MISTRAL_V3 = """\
{%- if messages[0].role == 'system' %}
    {%- set first = messages[0].content %}{%- set turns = messages[1:] %}
{%- else %}{%- set turns = messages %}
{%- endif %}
{%- set users = turns | selectattr('role', 'equalto', 'user') | list %}
{{- bos_token }}
{%- for m in turns %}
    {%- if m.role == 'user' %}
        {%- if tools and m == users[-1] %}
            {{- '[AVAILABLE_TOOLS] ' }}{{- tools | tojson }}{{- '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST] ' + (first + '\\n\\n' if loop.last and first else '') + m.content }}
        {{- '[/INST]' }}
    {%- elif m.tool_calls %}
        {%- if m.tool_calls[0].id | length != 9 %}{{ raise_exception('ids have 9 letters') }}
        {%- endif %}
        {{- '[TOOL_CALLS] [' + (m.tool_calls[0].function | tojson)[:-1] + ', "id": "' }}
        {{- m.tool_calls[0].id + '"}]' + eos_token }}
    {%- elif m.role == 'tool' %}
        {{- '[TOOL_RESULTS] {"content": ' + m.content + ', "call_id": "' + m.tool_call_id }}
        {{- '"}[/TOOL_RESULTS]' }}
    {%- else %}{{- ' ' + m.content + eos_token }}
    {%- endif %}
{%- endfor %}"""

_SMOLLM_2 = """\
{% for m in messages %}{% if loop.first and messages[0].role != 'system' %}\
{{ '<|im_start|>system\\nYou are a helpful assistant<|im_end|>\\n' }}{% endif %}\
{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
#: Turns of the assistant are marked, from their header to the line break after their end.
_SMOLLM_3 = """\
{%- set thinks = enable_thinking is not defined or enable_thinking %}
{{- '<|im_start|>system\\nToday Date: ' + strftime_now('%d %B %Y') + '\\n' }}
{{- 'Reasoning Mode: ' + ('/think' if thinks else '/no_think') + '\\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n' }}{%- endif %}
{%- for tool in xml_tools or [] %}{{- tool | tojson }}{{- '\\n' }}{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- for m in messages %}
    {%- if m.role == 'user' %}{{- '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}
    {%- elif m.role == 'assistant' %}
        {%- generation %}
        {{- '<|im_start|>assistant\\n' + ('' if thinks else '<think>\\n\\n</think>\\n') }}
        {{- m.content.lstrip('\\n') + '<|im_end|>\\n' }}
        {%- endgeneration %}
    {%- elif m.role == 'tool' %}{{- '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' + ('' if thinks else '<think>\\n\\n</think>\\n') }}
{%- endif %}"""

_OLMO_2 = """\
{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}\
{{ '<|system|>\\n' + m.content + '\\n' }}{% elif m.role == 'user' %}\
{{ '<|user|>\\n' + m.content + '\\n' }}{% elif m.role == 'assistant' %}{% if not loop.last %}\
{{ '<|assistant|>\\n' + m.content + eos_token + '\\n' }}{% else %}\
{{ '<|assistant|>\\n' + m.content + eos_token }}{% endif %}{% endif %}\
{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}{% endfor %}"""

_CHATML_ENDS = ("<|im_end|>",)
_NO_THINKING = {"enable_thinking": False}
_EMPTY = "<think>\n\n</think>\n\n"
STOCK = {
    "qwen3": Stock(
        _QWEN_3, _CHATML_ENDS, _EMPTY + "{}<|im_end|>", _EMPTY + _QWEN_CALL, "\n", rewrites=True
    ),
    "qwen3-no-thinking": Stock(
        _QWEN_3, _CHATML_ENDS, "{}<|im_end|>", _QWEN_CALL, "\n", True, _NO_THINKING, True
    ),
    "qwen3.5": Stock(
        _QWEN_3_5,
        _CHATML_ENDS,
        "\n</think>\n\n{}<|im_end|>",
        "\n</think>\n\n" + _QWEN_CALL,
        "\n",
        rewrites=True,
    ),
    "qwen3.5-no-thinking": Stock(
        _QWEN_3_5, _CHATML_ENDS, "{}<|im_end|>", _QWEN_CALL, "\n", True, _NO_THINKING, True
    ),
    "gpt-oss": Stock(
        _GPT_OSS,
        ("<|return|>", "<|call|>"),
        "<|channel|>final<|message|>{}<|return|>",
        ' to=functions.add<|channel|>commentary json<|message|>{"a": 1}<|call|>',
        variables={"reasoning_effort": "low"},
        rewrites=True,
    ),
    "phi3": Stock(_PHI_3, ("<|end|>", "</s>"), "{}<|end|>", tail="\n</s>"),
    "phi3-eos": Stock(_PHI_3, (), "{}<|end|>\n</s>", rewrites=True),
    "phi4": Stock(_PHI_4, ("<|im_end|>", "</s>"), "{}<|im_end|>"),
    "deepseek-v3": Stock(_DEEPSEEK_V3, ("</s>",), "{}</s>", _DEEPSEEK_CALL),
    "deepseek-v3.1": Stock(_DEEPSEEK_V3_1, ("</s>",), "{}</s>", _DEEPSEEK_CALL),
    "deepseek-v3.1-thinking": Stock(
        _DEEPSEEK_V3_1, ("</s>",), "</think>{}</s>", variables={"thinking": True}, rewrites=True
    ),
    "nemotron": Stock(
        _NEMOTRON,
        _CHATML_ENDS,
        "</think>{}<|im_end|>",
        "</think>" + _QWEN_CALL,
        "\n",
        rewrites=True,
    ),
    "nemotron-no-thinking": Stock(
        _NEMOTRON, _CHATML_ENDS, "{}<|im_end|>", _QWEN_CALL, "\n", True, _NO_THINKING
    ),
    "glm": Stock(
        _GLM,
        ("</s>", "<|user|>", "<|observation|>"),
        "\n<think></think>\n{}<|user|>",
        '\n<think></think>\n<tool_call>add\n{"a": 1}\n</tool_call><|observation|>',
    ),
    "glm-no-thinking": Stock(
        _GLM,
        ("</s>", "<|user|>", "<|observation|>"),
        "\n{}<|user|>",
        '\n<tool_call>add\n{"a": 1}\n</tool_call><|observation|>',
        variables=_NO_THINKING,
    ),
    "gemma3": Stock(
        _GEMMA_3, ("</s>", "<end_of_turn>"), "{}<end_of_turn>", tail="\n", kind="first"
    ),
    "llama3": Stock(
        _LLAMA_3,
        ("</s>", "<|eom_id|>", "<|eot_id|>"),
        "{}<|eot_id|>",
        '{"name": "add", "parameters": {"a": 1}}<|eot_id|>',
    ),
    "mistral": Stock(_MISTRAL, ("</s>",), " {}</s>", '[TOOL_CALLS] add {"a": 1}</s>', kind="llama"),
    "mistral-v3": Stock(
        _MISTRAL_V3,
        ("</s>",),
        " {}</s>",
        '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}, "id": "callcall0"}]</s>',
        kind="llama",
    ),
    "gemma4": Stock(
        _GEMMA_4, ("<turn|>",), "{}<turn|>", None, "\n", True, {"enable_thinking": False}, True
    ),
    "smollm2": Stock(_SMOLLM_2, _CHATML_ENDS, "{}<|im_end|>", tail="\n"),
    "smollm3": Stock(_SMOLLM_3, _CHATML_ENDS, "{}<|im_end|>", tail="\n", variables=_NO_THINKING),
    "smollm3-thinking": Stock(_SMOLLM_3, _CHATML_ENDS, "{}<|im_end|>", tail="\n"),
    "olmo2": Stock(_OLMO_2, ("</s>",), "{}</s>"),
}
