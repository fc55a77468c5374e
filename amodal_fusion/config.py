"""Options: one dataclass per command gives flags, YAML keys, types, defaults and help."""

import argparse
import contextlib
import dataclasses
import difflib
import math
import os
import sys
import types
import typing

import yaml

from amodal_fusion.errors import ConfigError, message_of

LARGEST_FILE = 1 << 20  # bytes; a file of options has a few dozen lines
BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
ANY_NUMBER = "…"  # last in an option's metavar: one or more values
NOTHING = ("", "~", "null", "none")  # in upper or lower case


def option(default, help, group="options", choices=None, least=None, most=math.inf, aliases=None):
    """A dataclass field with the help text, topic and allowed values of its flag; numbers from `least` to `most`.

    Args:
        choices: the allowed values; for a tuple of texts the names of its parts, ("KIND", "DIR"), or ("DIR",
            ANY_NUMBER) for one or more.
        aliases: other names, as flag and key → a note about a different meaning, or "".
    """
    limits = None if least is None else (least, most)
    metadata = {"help": help, "group": group, "choices": choices, "limits": limits, "aliases": aliases or {}}
    return dataclasses.field(default=default, metadata=metadata)


def _type_of(field):
    """(type, may be None) of `int`, `str | None` and the like."""
    if isinstance(field.type, types.UnionType):
        inner = [t for t in typing.get_args(field.type) if t is not type(None)]
        return inner[0], True
    return field.type, False


def _other_keys(config_class):
    """Keys of other programs that are not options here: name → (type, function).

    `function(value, config)` returns a note for the user, "" for none, or raises ConfigError.
    """
    return getattr(config_class, "ALIASES", {})


def _names(config_class):
    """All names of options → field and note."""
    names = {}
    for field in dataclasses.fields(config_class):
        names[field.name] = field, ""
        names |= {alias: (field, note) for alias, note in field.metadata["aliases"].items()}
    return names


def add_options(parser, config_class, shown=None):
    """Add one flag per field; flags that are not given are absent from the namespace.

    Values stay text: `check_values` converts them, as it does for a file.

    Args:
        shown: names of the options that the help shows; None: all.
    """
    groups = {}
    for field in dataclasses.fields(config_class):
        kind, _ = _type_of(field)
        topic = field.metadata["group"]
        group = groups.setdefault(topic, parser.add_argument_group(topic))
        also = "".join(f", also --{name}" for name in field.metadata["aliases"])
        text = field.metadata["help"].replace("%", "%%") + f" (default: {field.default}{also})"
        if shown is not None and field.name not in shown:
            text = argparse.SUPPRESS
        if kind is bool:
            extra = {"action": argparse.BooleanOptionalAction}
        elif kind is tuple:
            names = field.metadata["choices"]
            extra = {"nargs": "+", "metavar": names[0]} if ANY_NUMBER in names else {
                "nargs": len(names), "metavar": names}
        else:
            extra = {"choices": field.metadata["choices"], "metavar": None}
            if not field.metadata["choices"]:
                extra["metavar"] = kind.__name__.upper()
        group.add_argument(f"--{field.name}", default=argparse.SUPPRESS, help=text, **extra)
        for name in field.metadata["aliases"]:
            parser.add_argument(f"--{name}", default=argparse.SUPPRESS, help=argparse.SUPPRESS, **extra)
    for name in _other_keys(config_class):
        parser.add_argument(f"--{name}", nargs="?", const="true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)


class _TextLoader(yaml.BaseLoader):
    """Reads every value as text: no dates, no base-60 numbers, no `off` as false."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise ConfigError(f"line {key.start_mark.line + 1}: key {_shown(key.value)} is given twice")
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def yaml_fault(error):
    """One line about a YAMLError: the line in the file, the problem and, for an alias, what to do."""
    if getattr(error, "problem_mark", None) is None:
        return " ".join(str(error).split())
    began, line = getattr(error, "context_mark", None), error.problem_mark.line + 1
    text = f"line {line}: {error.problem}"
    if error.context:
        text += f", {error.context}" + (f" that begins in line {began.line + 1}" if began else "")
    return text + ("; quote a text that begins with *, as in '*>4'" if "alias" in text else "")


def read_mapping(path):
    """The 'key: value' lines of a YAML file, with keys and values as text, or lists and dicts of text.

    Raises:
        ConfigError: the file is missing or no YAML, has no such lines, or a key twice.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(LARGEST_FILE + 1)
        if len(content) > LARGEST_FILE:
            raise ConfigError(f"more than {LARGEST_FILE >> 20} MiB, which is no file of options")
        values = yaml.load(content.decode("utf-8-sig"), _TextLoader) or {}  # only text, lists and dicts
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path}: cannot be read ({reason})") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {yaml_fault(error)}") from None
    except RecursionError:
        raise ConfigError(f"{path}: endlessly nested lists; expected 'key: value' lines") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected 'key: value' lines")
    return values


def read_yaml(path, config_class):
    """Options of a YAML file as a dict, with keys and types checked.

    Raises:
        ConfigError: the file is missing or no YAML; a key is unknown or repeated, or its value has the wrong type.
    """
    path = os.path.expanduser(path)
    if not os.path.exists(path):
        raise ConfigError(f"{path}: no such file", "config")
    return check_values(read_mapping(path), config_class, path)


def check_values(values, config_class, source):
    """`values` by the options' own names, converted to their types; prints the notes of aliases.

    Args:
        values: name of an option, alias or key of another program → text, or for a flag without a value True or False.
        source: of the values, for messages; "": the command line.

    Raises:
        ConfigError: names `source` and the key.
    """
    names, others = _names(config_class), _other_keys(config_class)
    checked, given_as = {}, {}
    where, dashes = (f"{source}: ", "") if source else ("--", "--")
    for key, given in values.items():
        if key in others:
            checked[key] = _converted(given, others[key][0], False, where + key)
            continue
        if key not in names and isinstance(given, dict):
            raise ConfigError(f"{source}: unknown key {_shown(key)}, with keys below it; keys are flat here: write "
                              "each as a line of its own, without indentation")
        if key not in names:
            raise ConfigError(f"{source}: unknown key {_shown(key)}; " + _hint(str(key), {**names, **others}))
        field, remark = names[key]
        value = _checked(field, given, where + key)
        if checked.get(field.name, value) != value:
            raise ConfigError(f"{where}{given_as[field.name]} and {dashes}{key} are one option here, with two "
                              "values; remove one of them")
        checked[field.name], given_as[field.name] = value, key
        note(remark and f"{key} is {field.name} here: {remark}")
    return checked


def _checked(field, value, where):
    kind, optional = _type_of(field)
    value = _converted(value, kind, optional, where)
    choices, limits = field.metadata["choices"], field.metadata["limits"]
    if value is None:
        return None
    if kind is tuple and ANY_NUMBER not in choices and len(value) != len(choices):
        raise ConfigError(f"{where}: expected {' and '.join(choices)}, got {len(value)} values")
    if choices and kind is not tuple and value not in choices:
        raise ConfigError(f"{where}: {_shown(value)} is none of {', '.join(map(str, choices))}")
    if limits and not limits[0] <= value <= limits[1]:
        wanted = f"from {limits[0]} to {limits[1]}" if limits[1] < math.inf else f"{limits[0]} or more"
        raise ConfigError(f"{where}: expected {wanted}, got {value}")
    return value


def _converted(value, kind, optional, where):
    """Text → a value of `kind`, or None if allowed; ~ in a path becomes the home directory."""
    if isinstance(value, str) and value.strip().lower() in NOTHING:
        if optional:
            return None
        raise ConfigError(f"{where}: has no value")
    if kind is tuple and isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(map(os.path.expanduser, value))
    if kind is str and isinstance(value, str):
        return os.path.expanduser(value)
    if kind is bool and isinstance(value, str):
        value = BOOLEANS.get(value.lower(), value)
    if kind in (int, float) and isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = kind(value)
    if kind is float and isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where}: expected a finite number, got {value}")
    if type(value) is int and abs(value) >= 1 << 63:
        raise ConfigError(f"{where}: a number of {len(f'{value:x}') * 4} bits is too large; 63 bits is the limit")
    if type(value) is not kind:
        wanted = {bool: "true or false", int: "a whole number", float: "a number", str: "text",
                  tuple: "a list of texts"}[kind]
        raise ConfigError(f"{where}: expected {wanted}, got {_shown(value)}")
    return value


def _shown(value):
    """A value for a message, shortened to a line."""
    if isinstance(value, (dict, list)):
        return "a list" if isinstance(value, list) else "a mapping"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:56]} … ({len(text)} characters)"


def _hint(name, known):
    """The option of which `name` is a misspelling, else all options.

    Words are compared: log_dirs means log_dir, but val_batch_size is not batch_size, nor log_file log_every.
    """
    words = name.lower().replace("-", "_").split("_")

    def likeness(other):
        others = other.split("_")
        if len(words) != len(others):  # batchsize
            ratio = difflib.SequenceMatcher(None, "".join(words), "".join(others)).ratio()
            return ratio if ratio >= 0.9 else 0
        return min(difflib.SequenceMatcher(None, *pair).ratio() for pair in zip(words, others))

    best = max(known, key=likeness) if len(name) < 60 else None
    if best and likeness(best) >= 0.7:
        return f"did you mean {best!r}?"
    return f"known: {', '.join(known)}"


def note(text):
    """Print a note once, in the first process only."""
    me = str(os.getpid())
    if text and os.environ.get("RANK", "0") == "0" and os.environ.setdefault("AMODAL_FUSION_NOTES_BY", me) == me:
        print(f"note: {text}", file=sys.stderr)


def _parse_arguments(parser, argv):
    for stream in (sys.stdout, sys.stderr):
        # terminals of cp949 or ASCII cannot show × or –: they print a question mark
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="replace")
    given, unknown = parser.parse_known_args(argv)
    return vars(given), unknown


def _build(parser, config_class, given, unknown, path=None):
    """A config from command line, file and defaults, in this order; wrong usage exits with status 2."""
    try:
        if unknown:
            flags = [text for text in unknown if text.startswith("--")]
            hints = [_hint(flag[2:].split("=")[0], _names(config_class)) for flag in flags]
            hints = [hint.replace("'", "") for hint in hints if hint.startswith("did")]
            raise ConfigError(f"unrecognized arguments: {' '.join(unknown)}" + "".join(f"; {hint}" for hint in hints))
        values = read_yaml(path, config_class) if path else {}
        values |= check_values(given, config_class, "")
        others = {name: values.pop(name) for name in _other_keys(config_class) if name in values}
        config = config_class(**values)
        for name, value in others.items():
            note(_other_keys(config_class)[name][1](value, config))
    except ConfigError as error:
        parser.error(message_of(error))
    return config


def parse(config_class, description, argv=None, yaml_file=False):
    """Options of a command: the command line overrides the file of --config, the file overrides defaults.

    Wrong usage prints the reason and exits with status 2, as argparse does. If the config class has COMMON, names of
    options, --help shows these, and --help all shows all.
    """
    argv = sys.argv[1:] if argv is None else argv
    shown = None if "all" in argv else getattr(config_class, "COMMON", None)
    more = shown and f"{len(dataclasses.fields(config_class)) - len(shown)} more options: --help all"
    parser = argparse.ArgumentParser(
        description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=more,
        usage="%(prog)s [options]"  # argparse would print all flags before an error
    )
    if yaml_file:
        parser.add_argument("--config", metavar="YAML", help="file with 'key: value' lines, keys as the flags below")
    add_options(parser, config_class, shown)
    given, unknown = _parse_arguments(parser, argv)
    return _build(parser, config_class, given, unknown, given.pop("config", None) if yaml_file else None)


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
        subparser = subparsers.add_parser(name, help=text, description=text, allow_abbrev=False,
                                          usage="%(prog)s [options]")
        add_options(subparser, config_class)
    given, unknown = _parse_arguments(parser, argv)
    command = given.pop("command")
    return command, _build(parser, commands[command], given, unknown)
