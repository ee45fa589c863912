"""MTR, simulation-first training (arXiv 2510.06825), with rules and no model: QA rows in, verified traces out (docs/mtr.md).

qa         QARow, one question with what its data set states about it
readers    the official files of HotpotQA, MuSiQue, 2WikiMultiHopQA, Bamboogle, and FlashRAG's
plan       which facts answer a question, in which order
tool_maker ToolMaker: the tools of a row, checked
auto_agent AutoAgent: complete traces, scripted from a plan or sampled from a policy
verify     whether a trace is kept, or the reasons why not
pipeline   a file of rows to a folder of tasks, resumable
page       the HTML report of a folder
generated  multi-hop questions made from a seed, for runs without data
"""
