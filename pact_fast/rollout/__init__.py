"""Rollouts: the agent loop that samples multi-turn trajectories, and the engines that generate their tokens.

agent         AgentLoop: samples many trajectories at once
turns         TurnLoop: the step after a sampled turn, such as tool calls, a user's reply, or the end
env_calls     methods of environments, run in threads where they may take long
episode       a trajectory under way, and the sides of the policies that take part in it
pending       tool calls and replies that trajectories wait for
schedule      which jobs run, and which are overdue or superfluous
engine        Engine: the interface of an inference engine; token ids in, token ids and log-probs out
registry      engines by name (`rollout.engine`), and `make_engine`
self_play     both sides of an episode in which the policy, or a frozen model, plays the user
user_engine   the engine of that frozen model, beside the policy's
engine_check  EngineSmokeTest: tries a live engine for `pact-fast doctor`
null_engine   NullEngine: stands in on ranks that sample nothing
embedded/     the training model itself as engine
vllm/         vLLM, colocated or as a server
"""
