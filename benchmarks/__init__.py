"""Runs that train and measure the networks: the `gsto` command line, trainers and benchmarks."""

import os

os.environ.setdefault(
    "KINETO_LOG_LEVEL", "99"
)  # read while torch is loaded: its profiler else tells of every start and stop
