"""A small world: the helpdesk of a mobile phone company, with accounts, phones and orders.

world   the customers and their data, made from a seed
desk    the tools of the agent
phone   the tools of the customer, on the phone itself
faults  issues of a line, and their fixes
orders  issues about orders
domain  all of it as a domain, and the environment
small   a smaller domain, for tiny models
"""

from pact_fast.envs.helpdesk.domain import Helpdesk, HelpdeskEnvironment
from pact_fast.envs.helpdesk.small import SmallHelpdesk, SmallHelpdeskEnvironment

__all__ = ["Helpdesk", "HelpdeskEnvironment", "SmallHelpdesk", "SmallHelpdeskEnvironment"]
