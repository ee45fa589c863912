"""The word by which a user ends the dialogue.

It counts only in the user's own messages, and only at their end. In other texts it is plain text: an agent
that writes it ends nothing, nor does a user who quotes it in the middle of a sentence.
"""

from __future__ import annotations

STOP = "###STOP###"  # as in tau-bench


def read_stop(message: str, *stops: str) -> tuple[str, bool]:
    """(the message without the stop word, whether the user ends the dialogue) of a message of the user.

    Args:
        message: What the user says.
        stops: The words that end the dialogue; none given: STOP.
    """
    text = message.strip()
    stop = next((word for word in stops or (STOP,) if text.endswith(word)), None)
    return (text, False) if stop is None else (text[: -len(stop)].rstrip(), True)
