"""MTR, simulation-first training (arXiv 2510.06825): QA rows in, tools and verified traces out, by rules (docs/mtr.md).

qa         QARow, one question with the data set's facts about it
readers    the official files of HotpotQA, MuSiQue, 2WikiMultiHopQA, Bamboogle, and FlashRAG's
mentions   how a question words the entities of its facts
names      names of tools
plan       which facts answer a question, in which order
tool_maker ToolMaker: the tools of a row, checked; model_tool_maker: written by a language model
auto_agent AutoAgent: complete traces, scripted from a plan or sampled from a policy
make_task  one row to one task with its trace
verify     whether a trace is kept, or the reasons why not
pipeline   a file of rows to a folder of tasks, resumable
page       the HTML report of a folder
generated  multi-hop questions made from a seed, for runs without data
"""
