"""Environments of other projects, and plain Python functions, as environments of ours (docs/adapters.md).

functions   typed Python functions, and classes whose methods are tools
trl         classes written for TRL's `environment_factory`
verifiers   environments of the package verifiers
mcp         tools of MCP servers
gymnasium   text environments of the package gymnasium

arguments, callables, results, options, background
            what they share: checks of what a policy wrote, schemas, texts, settings, asyncio from threads
mcp_session, verifiers_tasks
            connections to MCP servers; what of verifiers is served, and its rows as tasks
"""

from pact_fast.envs.adapters.functions import Functions
from pact_fast.envs.adapters.gymnasium import Gymnasium
from pact_fast.envs.adapters.mcp import Mcp
from pact_fast.envs.adapters.trl import Trl
from pact_fast.envs.adapters.verifiers import Verifiers

__all__ = ["Functions", "Gymnasium", "Mcp", "Trl", "Verifiers"]
