"""Users of an episode: a script, or a model behind an endpoint. For self-play, see `rollout/self_play.py`.

stop      the word with which a user, and only a user, ends the dialogue
script    ScriptedUser: a list of messages
model     ModelUser: a language model with a prompt, and tools, of its own
endpoint  the users of a run with `rollout.user=endpoint`
"""

from pact_fast.users.model import ModelUser
from pact_fast.users.script import ScriptedUser
from pact_fast.users.stop import STOP, read_stop

__all__ = ["STOP", "ModelUser", "ScriptedUser", "read_stop"]
