"""Runs that train and measure the networks: the `gsto` command line, trainers and benchmarks."""
