"""Importing this module installs `pact_fast.integrations.verl`: VERL_USE_EXTERNAL_MODULES names it."""

from pact_fast.integrations.verl import install

install()
