"""Rows of task files."""

QUESTION = [{"role": "user", "content": "How warm is Oslo?"}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": PARAMETERS}}
CALL = {"name": "weather", "arguments": {"city": "Oslo"}}
TRACE = [
    {"role": "assistant", "content": "", "reasoning_content": "Look it up.", "tool_calls": [{"function": CALL}]},
    {"role": "tool", "name": "weather", "content": "7"},
    {"role": "assistant", "content": "7 degrees"},
]
SOURCE = "import math\n\ndef helper(x):\n    return x\n\ndef {name}(x):\n    return '{text}'\n\nprint({name}(1))"


def toolhop_row():
    schema = {"description": "d", "parameters": {"type": "object", "properties": {"x": {"type": "string"}}}}
    return {
        "id": 41,
        "question": "Sum of digits?",
        "answer": "15",
        "sub_task": {"Who?": "Ada", "Digits?": "15"},
        "tools": {
            "Who?": {"name": "who", **schema},
            "Digits?": {"name": "digits", **schema},
            "Who else?": {"name": "who", **schema, "description": "later"},
        },
        "functions": [
            SOURCE.format(name="who", text="first"),
            SOURCE.format(name="digits", text="15"),
            SOURCE.format(name="who", text="last"),
        ],
        "domain": "History",
    }
