"""EigenData: tasks with executable checkers, made by a workflow that improves itself (arXiv 2601.22607).

engine     plan → synthesis → verification → rollout → assessment → reflection, resumable
roles      the interface of a role: planner, synthesizer, verifiers, player, reflector
make_roles the implementation of each role: the rules, or a language model
pipeline   one attempt at a task: the stages in their order
versions   prompts and workflow as versioned files
evolution  measures proposals of the reflector on fixed probes, and keeps or rolls back
records    candidates as lines of a file
export     accepted tasks as training data
quality    duplicates, diversity, difficulty, coverage, leakage
report     the HTML report
generated  tasks of the small helpdesk without files, for the recipe `eigendata-quickstart`

The rules:

planner    pairs of synthesis and evaluation plan that do not overlap
compose    tasks composed of a domain's issues, verified by their controls
rollout    the scripted agent, with or without errors, in dialogue with the user
assess     scores of rollouts, and who is to blame for failures
reflect    changes of prompts and workflow from the failures

A language model in their place:

model_planner, model_synthesizers, model_verifiers, model_player, model_reflector
actor      lets a language model act in JSON
"""
