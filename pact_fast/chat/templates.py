"""Chat templates of ours: of models that start from random weights, and for models whose own has no tools."""

from __future__ import annotations

from pathlib import Path

SHIPPED = {path.stem: path for path in Path(__file__).parent.glob("*.jinja")}  # by name, as in model.chat_template

# ChatML turns with Hermes tool calls. Tools are written as signatures (strings have no type), to keep prompts short.
# Reasoning of earlier turns is kept.
CHATML_HERMES = """\
{%- if tools or messages[0].role == 'system' -%}
<|im_start|>system
{{ messages[0].content if messages[0].role == 'system' }}
{%- for tool in tools or [] %}
{%- set function = tool.function or tool %}
{{ '\\n' + function.name + '(' }}
{%- for name, schema in ((function.parameters or {}).properties or {}).items() %}
{{- name + (': ' + schema.type if schema.type is string and schema.type != 'string' else '') }}
{{- ', ' if not loop.last }}
{%- endfor %}
{{- ')' + (' ' + function.description if function.description else '') }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}
{{- '<|im_start|>user' if loop.first or loop.previtem.role != 'tool' }}
{{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
{{- '<|im_end|>\\n' if loop.last or loop.nextitem.role != 'tool' }}
{%- elif message.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' }}
{{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' if message.reasoning_content }}
{{- message.content or '' }}
{%- for call in message.tool_calls or [] %}
{%- set call = call.function or call %}
{{- '\\n' if message.content or not loop.first }}
{{- '<tool_call>\\n{"name": ' + call.name | tojson + ', "arguments": ' + call.arguments | tojson + '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- elif not (loop.first and message.role == 'system') %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{{- '<|im_start|>assistant\\n' if add_generation_prompt }}
"""
