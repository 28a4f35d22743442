"""``python -m gsto_ops``: what is built, what will run here, and why."""

from .backends import report

print(report())
