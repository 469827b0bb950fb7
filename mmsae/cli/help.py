"""A short `--help`: our own options first, Lightning's many reduced to those that people use."""

from __future__ import annotations

import argparse
import re

from jsonargparse import ArgumentParser, DefaultHelpFormatter

TRAINER = (
    "accelerator", "devices", "precision", "max_steps", "max_epochs", "max_time", "val_check_interval",
    "limit_val_batches", "log_every_n_steps", "accumulate_grad_batches", "fast_dev_run", "logger", "callbacks",
)  # fmt: skip


CROWDS = ("trainer.callbacks", "trainer.logger", "trainer.accelerator", "model.optimizer", "model.also")
CHECKPOINT = "Checkpoint to begin from, such as runs/version_0/checkpoints/last.ckpt."


class Formatter(DefaultHelpFormatter):
    """Names of classes instead of dotted paths; no types and defaults that take lines to read."""

    def _expand_help(self, action: argparse.Action) -> str:
        text = super()._expand_help(action)
        if len(str(action.default)) > 100:
            text = re.sub(r", default: [\[{].*[\]}](?=[,)])", "", text)
        text = re.sub(r"type: \w+\[.*?(?:, (?=default: |known subclasses: )|(?=\)$))", "", text)
        if action.dest in CROWDS:
            text = re.sub(r", known subclasses: [^)]+|known subclasses: [^)]+", "", text)
        text = re.sub(r"(known subclasses: )([^)]+)", lambda m: m[1] + re.sub(r"[\w.]+\.(\w+)", r"\1", m[2]), text)
        return text.replace("known subclasses: ", "one of: ").removesuffix(" ()")


def shorten(parser: ArgumentParser, verb: str) -> None:
    """Leave out of the help what few people need; every option is still accepted."""
    parser.usage = f"mmsae {verb} [--config FILE.yaml] [--option=value ...]"
    for action in parser._actions:
        group, _, name = action.dest.partition(".")
        text, hidden = str(action.help), action.dest in ("model", "weights_only", "model.spec")
        if group == "trainer":
            text, hidden = re.split(r"(?<=\.)\s|\s*Default:", text)[0], name not in TRAINER
        elif group == "model" and name.endswith(".help"):
            hidden = name != "core.help"
        if action.dest in ("trainer.callbacks", "trainer.logger", "model.optimizer"):
            text = f"{text.rstrip('.')}; --{action.dest}.help=NAME shows one."
        action.help = argparse.SUPPRESS if hidden else CHECKPOINT if action.dest == "ckpt_path" else text
    order = {"model": 0, "data": 1, "trainer": 3}

    def place(group: argparse._ArgumentGroup) -> int:
        names = {action.dest.partition(".")[0] for action in group._group_actions}
        return min((order[name] for name in names if name in order), default=2)

    for section in parser._action_groups:
        if place(section) == 3:
            section.title = "Lightning's Trainer (these and all its other arguments, as --trainer.NAME)"
        if any(action.dest == "ckpt_path" for action in section._group_actions):
            section.title = "Checkpoint"
    parser._action_groups.sort(key=place)  # type: ignore[attr-defined,unused-ignore]
