"""Rollouts: the agent loop that samples multi-turn trajectories, and the engines that generate their tokens.

agent         AgentLoop: renders prompts, asks an engine for turns, runs tool calls, records trajectories
engine        Engine: the interface of an inference engine; token ids in, token ids and log-probs out
registry      engines by name (`rollout.engine`), and `make_engine`
self_play     both sides of an episode in which the policy, or a frozen model, plays the user
user_engine   the engine of that frozen model, beside the policy's
engine_check  EngineSmokeTest: tries a live engine for `pact-fast doctor`
null_engine   NullEngine: stands in on ranks that sample nothing
embedded/     the training model itself as engine
vllm/         vLLM, colocated or as a server
"""
