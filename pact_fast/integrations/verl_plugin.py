"""Importing this module installs `pact_fast.integrations.verl`: VERL_USE_EXTERNAL_MODULES names it."""

import os

from pact_fast.integrations.verl import install, register_engines

install()
if os.environ.get("VERL_ENGINE_VENDOR", "").startswith("pact"):  # the engines are a heavy import
    register_engines()
