"""EigenData: tasks with executable checkers, made by a workflow that improves itself (arXiv 2601.22607).

roles      what the engine asks of a back-end: planner, synthesiser, verifiers, agent, reflector
versions   prompts and workflow as versioned files
planner    rules: pairs of synthesis and evaluation plan that do not overlap
compose    rules: tasks composed of a domain's issues
rollout    the scripted agent, perfect or noisy, in dialogue with the user
assess     rules: scores rollouts and says who is to blame
reflect    rules: rewrites prompts and workflow from the failures
models     with a language model: the user's words, and reflection
model_tasks, model_player  with a language model: plans, solutions, second opinions; agent and user
actor      a language model that acts in JSON
backends   which back-end plays which role
generated  tasks of the small helpdesk without files, for the quickstart
engine     plan → synthesis → verification → rollout → assessment → reflection, resumable
quality    duplicates, diversity, difficulty, coverage, leakage
report     the HTML report
"""
