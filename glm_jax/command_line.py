"""What every command line of this project has in common: flags in groups, examples, a hint at the right flag.

Knows no command. Importing it loads nothing but click, so that --help is there at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click

OPTIONS = "Options"
# The first column of the help, two spaces included: the longest flag with its unit fits.
_COLUMN = 31


class Flag(click.Option):
    """An option that stands in a group of the help, with its default and its environment variable.

    Args:
      group: title of the group.
    """

    def __init__(self, *args: Any, group: str = OPTIONS, **kwargs: Any) -> None:
        super().__init__(*args, **{"show_envvar": True, "show_default": True} | kwargs)
        self.group = group

    def get_help_extra(self, ctx: click.Context) -> Any:
        """As click's, without what tells a reader nothing: the lower bound, an empty default."""
        extra = super().get_help_extra(ctx)
        if isinstance(self.show_default, str):
            extra["default"] = self.show_default
        elif self.default == "":
            extra.pop("default", None)
        bounds = self.type
        if "range" in extra and isinstance(bounds, click.IntRange | click.FloatRange):
            del extra["range"]
            if bounds.max is not None:
                extra["range"] = f"{bounds.min} … {bounds.max}"
        return extra


def flag(*names: str, group: str = OPTIONS, **kwargs: Any) -> Callable[[Any], Any]:
    """Decorates a command with a Flag; takes what click.option takes."""
    return click.option(*names, cls=Flag, group=group, **kwargs)


class _Taught(click.Command):
    """A command whose help has groups and ends with examples."""

    def __init__(self, *args: Any, examples: Sequence[tuple[str, str]] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = examples

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if isinstance(self, click.Group):
            self.format_commands(ctx, formatter)
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and not isinstance(parameter, click.Argument):
                title = parameter.group if isinstance(parameter, Flag) else OPTIONS
                groups.setdefault(title, []).append(record)
        for title, records in groups.items():
            widest = max(len(spelling) for spelling, _ in records)
            with formatter.section(title):
                # The same column in every group.
                formatter.write_dl(records, _COLUMN - 2, 2 + max(0, _COLUMN - 2 - widest))

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_epilog(ctx, formatter)
        if self.examples:
            with formatter.section("Examples"):
                for reason, command in self.examples:
                    formatter.write(f"  # {reason}\n")
                    formatter.write("".join(f"  {line}\n" for line in command.splitlines()))


class Command(_Taught):
    """A command with groups of flags and examples.

    Args:
      examples: (what for, the command), the command as one would type it.
    """


class Group(_Taught, click.Group):
    """Commands under one name; a flag of a command that is given too early is said to be one.

    Args:
      examples: as of Command.
    """

    command_class = Command
    group_class = type

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            name = error.option_name
            users = [command for command in self.commands if name in self._names_of(ctx, command)]
            if not users:
                raise
            right = " or ".join(f"{ctx.command_path} {user} {name}" for user in users)
            raise click.UsageError(f"{name} belongs behind a command: {right}", ctx) from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """As click's, but that a sentence is wrapped rather than cut short."""
        rows = [(name, self.commands[name].get_short_help_str(1000)) for name in self.commands]
        with formatter.section("Commands"):
            formatter.write_dl(sorted(rows))

    def _names_of(self, ctx: click.Context, command: str) -> list[str]:
        found = self.get_command(ctx, command)
        return [name for each in found.params for name in each.opts] if found else []
