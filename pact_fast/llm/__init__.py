"""One client for every role that needs a language model: tool makers, simulators, planners, users, judges.

config      LLMConfig: endpoint, sampling, deadlines, budget, cache
client      LLMClient: complete, map; cache, retries, repairs
request     Request: one question, the body that is sent for it, and the key that it is cached under
answers     validation of answers: bounded, checked, never evaluated
cache       AnswerCache: answers on disk, the first writer wins
connection  HTTP through the `openai` package, with deadlines that hold
ledger      tokens, seconds and cost by role; the token budget
server      a vLLM server that is started for a client
errors      LLMError and its kinds, each with a reason code

Importable without openai and jsonschema (extra `llm`), which are imported when a call needs them.
"""

from pact_fast.llm.answers import Answer
from pact_fast.llm.client import Completion, LLMClient
from pact_fast.llm.config import LLMConfig
from pact_fast.llm.errors import BudgetExceeded, InvalidAnswer, LLMError, ReplayMiss, ServerFailed
from pact_fast.llm.request import Request

__all__ = [
    "Answer",
    "BudgetExceeded",
    "Completion",
    "InvalidAnswer",
    "LLMClient",
    "LLMConfig",
    "LLMError",
    "ReplayMiss",
    "Request",
    "ServerFailed",
]
