"""Reads shipped configurations as the command line does."""

from functools import lru_cache

from gsto_benchmarks import configs
from gsto_benchmarks.training.cli import TrainingCLI, run_cli


class ReadOnly(TrainingCLI):
    """Reads the command line and stops there."""

    def before_instantiate_classes(self):
        pass

    def instantiate_classes(self):
        pass

    def _run_subcommand(self, subcommand):
        pass


def reader():
    """A function of a configuration's name and of options: what `gsto fit` would run with."""
    parser = run_cli(configs.resolve_config_names(["fit", "-c", "camvid"]), ReadOnly).parser

    @lru_cache
    def parse(name, *options):
        return parser.parse_args(configs.resolve_config_names(["fit", "-c", name, *options])).fit

    return lambda name, *options: parse(name, *options).clone()
