"""Expert traces for rows that have none: `pact-fast traces` (docs/traces.md).

transcript  the agent loop with messages in the place of tokens, so that an actor can be anything that writes messages
reference   an actor that makes a row's reference calls; its reasoning is a template
teacher     an actor behind an OpenAI-compatible endpoint
verify      whether a trace is kept, and the reasons why not
segments    where the segments of a reasoning end, as a language model sees it
pipeline    a file of rows to a folder of rows with traces, resumable
"""
