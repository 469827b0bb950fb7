"""A short `--help`: our own options first, Lightning's many reduced to those that people use."""

from __future__ import annotations

import argparse
import re

from jsonargparse import ArgumentParser, DefaultHelpFormatter

TRAINER = (
    "accelerator", "devices", "precision", "max_steps", "max_epochs", "max_time", "val_check_interval",
    "limit_val_batches", "log_every_n_steps", "accumulate_grad_batches", "fast_dev_run", "logger", "callbacks",
)  # fmt: skip


class Formatter(DefaultHelpFormatter):
    """Names of classes instead of dotted paths, and no default that is a page long."""

    def _expand_help(self, action: argparse.Action) -> str:
        text = super()._expand_help(action)
        if len(str(action.default)) > 100:
            text = re.sub(r", default: [\[{].*[\]}](?=[,)])", "", text)
        return re.sub(r"(known subclasses: )([^)]+)", lambda m: m[1] + re.sub(r"[\w.]+\.(\w+)", r"\1", m[2]), text)


def shorten(parser: ArgumentParser, verb: str) -> None:
    """Leave out of the help what few people need; every option is still accepted."""
    parser.usage = f"mmsae {verb} [--config FILE.yaml] [--option=value ...]"
    for action in parser._actions:
        group, _, name = action.dest.partition(".")
        if (group == "trainer" and name not in TRAINER) or action.dest in ("model", "data", "weights_only"):
            action.help = argparse.SUPPRESS
        if group == "trainer" and action.help is not argparse.SUPPRESS:
            action.help = re.split(r"(?<=\.)\s|\s*Default:", str(action.help))[0]
        if action.dest in ("trainer.callbacks", "trainer.logger", "model.optimizer"):
            action.help = f"{str(action.help).rstrip('.')}; see --{action.dest}.help=NAME."
    ours = {"model": 0, "data": 1, "trainer": 3}

    def place(group: argparse._ArgumentGroup) -> int:
        names = {action.dest.partition(".")[0] for action in group._group_actions}
        return min((ours[name] for name in names if name in ours), default=2)

    for group in parser._action_groups:
        if place(group) == 3:
            group.title = "Lightning's Trainer (these and all its other arguments, as --trainer.NAME)"
    parser._action_groups.sort(key=place)
