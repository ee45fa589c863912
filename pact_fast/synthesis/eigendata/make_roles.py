"""Who plays each role: the rules, or a language model."""

from __future__ import annotations

from collections.abc import Collection

from pact_fast.errors import PactError
from pact_fast.llm import LLMClient
from pact_fast.registry import did_you_mean
from pact_fast.synthesis.eigendata.model_planner import ModelPlanner
from pact_fast.synthesis.eigendata.model_player import ModelPlayer
from pact_fast.synthesis.eigendata.model_reflector import ModelReflector
from pact_fast.synthesis.eigendata.model_synthesizers import ModelSynthesizer, ModelWording
from pact_fast.synthesis.eigendata.model_verifiers import ModelTaskVerifier, ModelTrajectoryVerifier
from pact_fast.synthesis.eigendata.pipeline import Roles

ROLES = ("planner", "synthesizer", "wording", "verifier", "agent", "user", "reflection")


def check_roles(names: Collection[str]) -> None:
    """PactError if a name is not a role."""
    for name in names:
        if name not in ROLES:
            raise PactError(f"unknown role '{name}'{did_you_mean(name, list(ROLES))}; the roles are {', '.join(ROLES)}")


def make_roles(names: Collection[str], client: LLMClient) -> Roles:
    """Roles of which those in `names` are played by a model, and all others by the rules.

    Args:
        names: Of `ROLES`. `synthesizer`: solutions; `wording`: the user's first message; `verifier`: of tasks and dialogues.
        client: The model.

    Raises:
        PactError: A name is not a role.
    """
    check_roles(names)
    roles = Roles()
    if "planner" in names:
        roles.planner = ModelPlanner(client)
    if "wording" in names:
        roles.synthesizer = ModelWording(client)
    if "synthesizer" in names:
        roles.synthesizer = ModelSynthesizer(client, roles.synthesizer)
    if "verifier" in names:
        roles.task_verifier, roles.trajectory_verifier = ModelTaskVerifier(client), ModelTrajectoryVerifier(client)
    if {"agent", "user"} & set(names):
        roles.player = ModelPlayer(client if "agent" in names else None, client if "user" in names else None)
    if "reflection" in names:
        roles.reflector = ModelReflector(client)
    return roles
