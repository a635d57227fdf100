"""``python -m flows.cli``: the same as ``al-loop``."""

from flows.cli import main

main()
