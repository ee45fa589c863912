"""Questions with a search tool: over the row's passages, a local corpus, or a retrieval server (docs/evaluation.md).

env        the environment `qa`: the tool, exact match and F1
retrieval  the three places to search in
"""

from pact_fast.envs.qa.env import QuestionAnswering

__all__ = ["QuestionAnswering"]
