"""One dataclass per command is the only list of options: flags, YAML keys, types, defaults and help come from it."""

import argparse
import contextlib
import dataclasses
import difflib
import math
import types
import typing

import yaml

from fusion.errors import ConfigError


def option(default, help, group="options", choices=None, least=None, most=math.inf):
    """A dataclass field with the help text, topic and allowed values of its flag; numbers from `least` to `most`."""
    limits = None if least is None else (least, most)
    metadata = {"help": help, "group": group, "choices": choices, "limits": limits}
    return dataclasses.field(default=default, metadata=metadata)


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader keeps the last of two equal keys without a word."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError(f"line {node.start_mark.line + 1}: key {key!r} stands there twice")
        return super().construct_mapping(node, deep)


def _type_of(field):
    """(type, may be None) of `int`, `str | None` and the like."""
    if isinstance(field.type, types.UnionType):
        inner = [t for t in typing.get_args(field.type) if t is not type(None)]
        return inner[0], True
    return field.type, False


def add_options(parser, config_class):
    """Add one flag per field; flags that are not given leave no trace in the namespace."""
    groups = {}
    for field in dataclasses.fields(config_class):
        kind, _ = _type_of(field)
        topic = field.metadata["group"]
        group = groups.setdefault(topic, parser.add_argument_group(topic))
        text = field.metadata["help"].replace("%", "%%") + f" (default: {field.default})"
        if kind is bool:
            extra = {"action": argparse.BooleanOptionalAction}
        else:
            extra = {"type": kind, "choices": field.metadata["choices"], "metavar": None}
            if not field.metadata["choices"]:
                extra["metavar"] = kind.__name__.upper()
        group.add_argument(f"--{field.name}", default=argparse.SUPPRESS, help=text, **extra)


def read_yaml(path, config_class):
    """Options of a YAML file as a dict, every key and type checked.

    Raises:
        ConfigError: no such file, not YAML, a key that is unknown or stands there twice, a value of the wrong type.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            values = yaml.load(file, _StrictLoader) or {}  # a SafeLoader: no code in it is ever run
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected 'key: value' lines")
    return check_values(values, config_class, path)


def check_values(values, config_class, source):
    """`values` with every key and type checked against the dataclass; ConfigError names `source` and the key."""
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    checked = {}
    for key, value in values.items():
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields, 1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(fields)}"
            raise ConfigError(f"{source}: unknown key {key!r}{hint}")
        checked[key] = _checked(fields[key], value, source)
    return checked


def _checked(field, value, source):
    kind, optional = _type_of(field)
    if value is None and optional:
        return None
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            value = float(value)  # PyYAML reads 1e-4, which has no dot, as a string
    if type(value) is not kind:
        wanted = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind]
        raise ConfigError(f"{source}: {field.name}: expected {wanted}, got {value!r}")
    choices = field.metadata["choices"]
    if choices and value not in choices:
        raise ConfigError(f"{source}: {field.name}: {value!r} is none of {', '.join(map(str, choices))}")
    if field.metadata["limits"]:
        least, most = field.metadata["limits"]
        if not least <= value <= most or value == math.inf:  # nan is outside, too
            wanted = f"from {least} to {most}" if most < math.inf else f"{least} or more"
            raise ConfigError(f"{source}: {field.name}: expected {wanted}, got {value}")
    return value


def parse(config_class, description, argv=None, yaml_file=False):
    """Options of a command: the command line over the file given with --config over the defaults.

    Wrong usage prints the reason and exits with status 2, as argparse does.
    """
    parser = argparse.ArgumentParser(
        description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if yaml_file:
        parser.add_argument("--config", metavar="YAML", help="file with 'key: value' lines, keys as the flags below")
    add_options(parser, config_class)
    given = vars(parser.parse_args(argv))
    path = given.pop("config", None)
    try:
        from_file = read_yaml(path, config_class) if path else {}
        check_values(given, config_class, "command line")
    except ConfigError as error:
        parser.error(str(error))
    return config_class(**{**from_file, **given})


def parse_command(commands, description, argv=None):
    """Options of a script with subcommands.

    Args:
        commands: name → dataclass, whose docstring is the help.

    Returns:
        the command's name and its options.
    """
    parser = argparse.ArgumentParser(
        description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name, config_class in commands.items():
        text = config_class.__doc__
        add_options(subparsers.add_parser(name, help=text, description=text, allow_abbrev=False), config_class)
    given = vars(parser.parse_args(argv))
    command = given.pop("command")
    try:
        check_values(given, commands[command], "command line")
    except ConfigError as error:
        parser.error(str(error))
    return command, commands[command](**given)
