"""python -m pact_fast, for launchers: torchrun --nproc-per-node 8 -m pact_fast train …"""

from pact_fast.cli.main import entry

entry()
