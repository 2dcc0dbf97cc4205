"""The rule table, one file per family of ops; importing it fills `fwdcompile.rule.table`."""

from __future__ import annotations

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
