"""Small chat templates that write tool calls as well-known models do, each with a tokenizer that has its tokens."""

from __future__ import annotations

import functools
import re

from transformers import PreTrainedTokenizerFast

from tests.support.chat_tokenizers import build

_TOKEN = re.compile(r"<[|｜][^<>{}\s]+[|｜]>|</?minimax:tool_call>|\[/?[A-Z_]+\]|</?s>")

_MISTRAL = """<s>{% for m in messages %}
{%- if m.role == 'system' %}[SYSTEM_PROMPT]{{ m.content }}[/SYSTEM_PROMPT]{% endif %}
{%- if loop.first and tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}
{%- if m.role == 'user' %}[INST]{{ m.content }}[/INST]
{%- elif m.role == 'assistant' %}{{ m.content }}{% if m.tool_calls %}CALLS{% endif %}</s>
{%- elif m.role == 'tool' %}RESULT{% endif %}
{%- endfor %}"""
_NINE = "{% if m.tool_call_id | length != 9 %}{{ raise_exception('an id has nine characters') }}{% endif %}"
_LIST = """{% for c in m.tool_calls %}{% set call = c.function | tojson %}{{ call[:-1] }}, "id": "{{ c.id }}"}
{%- if not loop.last %}, {% endif %}{% endfor %}]"""
_DEEPSEEK = """<s>{% for m in messages %}
{%- if m.role == 'system' %}{{ m.content }}{% endif %}
{%- if loop.first and tools %}{{ tools | tojson }}{% endif %}
{%- if m.role == 'user' %}<｜User｜>{{ m.content }}<｜Assistant｜>
{%- elif m.role == 'assistant' %}{{ m.content }}
{%- if m.tool_calls %}<｜tool▁calls▁begin｜>{% for c in m.tool_calls %}CALL{% endfor %}<｜tool▁calls▁end｜>{% endif -%}
<｜end▁of▁sentence｜>
{%- elif m.role == 'tool' %}<｜tool▁output▁begin｜>{{ m.content }}<｜tool▁output▁end｜>{% endif %}
{%- endfor %}"""
_FENCED = """{% if not loop.first %}{{ '\\n' }}{% endif %}<｜tool▁call▁begin｜>{{ c.type }}<｜tool▁sep｜>{{ c.function.name }}
```json
{{ ARGUMENTS }}
```<｜tool▁call▁end｜>"""
_ROLES = """{% macro begin(role) %}{{ '<|start_of_role|>' + role + '<|end_of_role|>' }}{% endmacro %}
{%- if tools %}{{ begin('tools') }}{{ tools | tojson }}<|end_of_text|>
{% endif %}
{%- for m in messages %}{{ begin(m.role) }}{{ m.content }}{% if m.tool_calls %}CALLS{% endif %}<|end_of_text|>
{% endfor %}
{%- if add_generation_prompt %}{{ begin('assistant') }}{% endif %}"""
_ARRAY = "[{% for c in m.tool_calls %}{{ c.function | tojson }}{% if not loop.last %}, {% endif %}{% endfor %}]"
_INVOKE = """{{ '\\n' if m.content }}<minimax:tool_call>
{% for c in m.tool_calls %}<invoke name="{{ c.function.name }}">
{% for k, v in c.function.arguments.items() %}<parameter name="{{ k }}">
{%- if v is string %}{{ v }}{% else %}{{ v | tojson }}{% endif %}</parameter>
{% endfor %}</invoke>
{% endfor %}</minimax:tool_call>"""
_KIMI = """{% if tools %}<|im_system|>tool_declare<|im_middle|>{{ tools | tojson }}<|im_end|>{% endif %}
{%- for m in messages %}
{%- if m.role == 'user' %}<|im_user|>user<|im_middle|>{{ m.content }}
{%- elif m.role == 'assistant' %}<|im_assistant|>assistant<|im_middle|>{{ m.content }}{% if m.tool_calls %}CALLS{% endif %}
{%- elif m.role == 'tool' %}<|im_system|>{{ m.name }}<|im_middle|>## Return of {{ m.tool_call_id }}
{{ m.content }}
{%- else %}<|im_system|>system<|im_middle|>{{ m.content }}{% endif %}<|im_end|>
{%- endfor %}{% if add_generation_prompt %}<|im_assistant|>assistant<|im_middle|>{% endif %}"""
_SECTION = """<|tool_calls_section_begin|>{% for c in m.tool_calls %}<|tool_call_begin|>{{ c.id }}<|tool_call_argument_begin|>
{{- c.function.arguments | tojson }}<|tool_call_end|>{% endfor %}<|tool_calls_section_end|>"""
_PYTHON = """[{% for c in m.tool_calls %}{{ c.function.name }}(
{%- for k, v in c.function.arguments.items() %}{{ k }}=VALUE{% if not loop.last %}, {% endif %}{% endfor %})
{%- if not loop.last %}, {% endif %}{% endfor %}]"""
TEMPLATES = {
    "kimi_k2": _KIMI.replace("CALLS", _SECTION),
    "pythonic": _ROLES.replace("CALLS", _PYTHON.replace("VALUE", "{{ '%r' | format(v) }}")),
    "pythonic, quoted": _ROLES.replace("CALLS", _PYTHON.replace("VALUE", "\"{{ '%s' | format(v) }}\"")),
    "functools": _ROLES.replace("CALLS", "functools" + _ARRAY),
    "granite": _ROLES.replace("CALLS", "<|tool_call|>" + _ARRAY),
    "granite, closed": _ROLES.replace("CALLS", "<|tool_call|>" + _ARRAY + "<|/tool_call|>"),
    "minimax_m2": _ROLES.replace("CALLS", _INVOKE),
    "deepseek_v3": _DEEPSEEK.replace("CALL", _FENCED.replace("ARGUMENTS", "'' + c.function.arguments")),
    "deepseek_v3, any arguments": _DEEPSEEK.replace(
        "CALL", _FENCED.replace("ARGUMENTS", "c.function.arguments | tojson")
    ),
    "deepseek_v31": _DEEPSEEK.replace(
        "CALL",
        "{{ '<｜tool▁call▁begin｜>' + c.function.name + '<｜tool▁sep｜>' + c.function.arguments + '<｜tool▁call▁end｜>' }}",
    ),
    "mistral": _MISTRAL.replace(
        "CALLS",
        "{% for c in m.tool_calls %}[TOOL_CALLS]{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }}{% endfor %}",
    ).replace("RESULT", "[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]"),
    "mistral_json": _MISTRAL.replace("CALLS", "[TOOL_CALLS] [" + _LIST).replace(
        "RESULT",
        _NINE + '[TOOL_RESULTS] {"content": {{ m.content }}, "call_id": "{{ m.tool_call_id }}"}[/TOOL_RESULTS]',
    ),
    "mistral_json, no blank": _MISTRAL.replace("CALLS", "[TOOL_CALLS][" + _LIST).replace(
        "RESULT", _NINE + '[TOOL_RESULTS]{"content": {{ m.content }}, "call_id": "{{ m.tool_call_id }}"}[/TOOL_RESULTS]'
    ),
}


@functools.cache
def tokenizer_for(name: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE with this template, and its markers as special tokens."""
    source = TEMPLATES[name]
    special = tuple(dict.fromkeys(("<|endoftext|>", *_TOKEN.findall(source))))
    return build(source, special, (), "</s>" if "</s>" in special else "<|endoftext|>")
