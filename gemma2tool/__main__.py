"""``python -m gemma2tool``."""

from gemma2tool.cli.main import main

main()
