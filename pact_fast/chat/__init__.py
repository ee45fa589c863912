"""Messages to token ids and back, through the model's own chat template.

rendering        ChatRenderer: prompts, turns, bridge tokens, trace contexts, parsing of sampled turns
chat_template    the tokenizer's template: end of turn, text between turns
named_templates  which of several templates renders a conversation
template_variables
                 variables of the template, and the date that it writes
call_ids         ids of calls and results, for templates that need them
history          earlier turns as a template rewrites them when the user speaks again: branches of rollouts and traces
trace_context    the expert trace as tokens after its prompt, and its branches
structure        the tokens that stand around turns and never in one
encoding         text to ids, with control over which strings may become control tokens
token_bytes      ids to bytes
formats          how tool calls are written and parsed, one file each
tool_schema      checks a call against the tools' JSON schemas
segments         sentences and items of a reasoning text, and its supervised prefix
template_check   the check at start-up that turns can be appended, or that rollouts can branch
row_check        renders and measures a data row
templates        templates of ours, for models without one and for models whose own has no tools
"""
