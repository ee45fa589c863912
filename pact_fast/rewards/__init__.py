"""Rewards of a trajectory, and advantages from them.

score       the reward of a rollout, decided in one function
matching    similarity of tool calls, and their assignment to reference calls
answers     token F1 of the final answer
qa          exact match and F1 by the rules of HotpotQA, 2WikiMultiHopQA, MuSiQue and Bamboogle
functions   the user's reward functions
advantages  group, turn and token advantages
feedback    feedback of tools, without echoes of the policy and errors
ftrl        FTRL's solve-P, solve-R and solve-F1
toolhop     ToolHop's answer correctness
"""
