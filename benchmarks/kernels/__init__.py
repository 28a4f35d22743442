"""Microbenchmarks of the operators."""
