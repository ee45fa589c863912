"""Tasks, expert traces and trajectories; readers of task files; task sources. No torch, no tokenizer.

types        Task, ExpertTrace, Trajectory and their parts
branching    sequences of a rollout or an expert trace whose past was rewritten
readers      read and write task files
rows         one data row in our own columns -> Task, with every field checked
row_formats  rows of verl, FTRL and ToolHop -> rows in our own columns
sources      which tasks a training step gets
"""
