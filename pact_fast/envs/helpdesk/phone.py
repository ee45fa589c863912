"""Tools of the customer, on the phone itself. The customer reports their results."""

from __future__ import annotations

from pact_fast.envs.domain.base import UserAction
from pact_fast.envs.domain.database import Database


def look_at_phone(db: Database, device: str) -> str:
    """What the phone shows."""
    handset = db["handsets"].peek(device)
    if not handset["sim_seated"]:
        sim = "no SIM card"
    else:
        sim = "a locked SIM card" if handset["sim"] == "locked" else "a SIM card"
    switches = ", ".join(
        f"{name} {'on' if handset[key] else 'off'}"
        for name, key in (("airplane mode", "airplane_mode"), ("mobile data", "mobile_data"), ("roaming", "roaming"))
    )
    return f"It shows {sim}, {switches}."


def set_airplane_mode(db: Database, device: str, on: bool) -> str:
    """Switch airplane mode.

    Args:
        on: Whether it is on.
    """
    db["handsets"][device]["airplane_mode"] = on
    return f"Airplane mode is {'on' if on else 'off'} now."


def set_mobile_data(db: Database, device: str, on: bool) -> str:
    """Switch mobile data.

    Args:
        on: Whether it is on.
    """
    db["handsets"][device]["mobile_data"] = on
    return f"Mobile data is {'on' if on else 'off'} now."


def set_phone_roaming(db: Database, device: str, on: bool) -> str:
    """Switch roaming on the phone.

    Args:
        on: Whether it is on.
    """
    db["handsets"][device]["roaming"] = on
    return f"Roaming is {'on' if on else 'off'} on my phone now."


def reseat_sim(db: Database, device: str) -> str:
    """Take the SIM card out and put it back."""
    db["handsets"][device]["sim_seated"] = True
    return "I took the SIM card out and put it back."


def restart_phone(db: Database, device: str) -> str:
    """Restart the phone, which then takes over what the network has for it."""
    handset, line = db["handsets"][device], db["lines"].peek(device)
    handset["sim"], handset["profile"] = line["sim"], line["profile"]
    handset["restarts"] += 1
    return "I restarted the phone."


TOOLS = (look_at_phone, set_airplane_mode, set_mobile_data, set_phone_roaming, reseat_sim, restart_phone)


def _switch(name: str, tool: str, words: str) -> list[UserAction]:
    return [
        UserAction(
            tool,
            {"on": on},
            f"Please turn {name} {word} on your phone.",
            rf"(?:turn|switch)(?:ing)? (?:{word} {words}|{words} {word})|{verb} {words}",
        )
        for on, word, verb in ((True, "on", "enable"), (False, "off", "disable"))
    ]


ACTIONS = (
    UserAction("look_at_phone", {}, "Please tell me what your phone shows.", r"what (?:does )?your phone shows?"),
    *_switch("airplane mode", "set_airplane_mode", r"(?:the )?(?:airplane|flight) mode"),
    *_switch("mobile data", "set_mobile_data", r"(?:the |your )?mobile data"),
    *_switch("roaming", "set_phone_roaming", r"(?:the |data )?roaming"),
    UserAction(
        "reseat_sim", {}, "Please take the SIM card out and put it back.",
        r"(?:take|remove|pull) .{0,20}sim.{0,30}(?:put|insert|back)|re-?(?:seat|insert) .{0,20}sim",
    ),
    UserAction(
        "restart_phone", {}, "Please restart your phone.", r"(?:restart|reboot) .{0,12}(?:phone|device|it\b)|power cycle"
    ),
)  # fmt: skip
