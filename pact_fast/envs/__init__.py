"""Environments: they run the tools of a task and score the finished trajectory.

base          the Environment protocol
registry      environments by name, and the tasks that a configuration asks for
lookup_chain  built-in multi-hop look-ups, generated from a seed
python_tools  tools given as Python sources, run in a sandbox
simulated     tools written for a question, answered from its facts (MTR)
qa            a search tool over passages, a corpus or a retrieval server
bfcl          BFCL v4: stateful APIs, and function calls that are judged by their text
tau2          τ²-bench: airline, retail, telecom
domain        domains with a database, a policy, a user and executable checkers (EigenData)
helpdesk      the shipped domain
adapters      functions, and environments of other projects: TRL, verifiers, MCP, Gymnasium
"""
