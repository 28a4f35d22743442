"""``gsto bench``: what operators, networks and data loading cost, on which machine, and whether a change made it worse."""
