"""Settings: frozen dataclasses to command line and YAML, and back. One default in one place, the dataclass."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import inspect
import json
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from otcxr.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from jsonargparse import ArgumentParser, Namespace

__all__ = [
    "add_settings",
    "digest",
    "flatten",
    "from_files",
    "import_named",
    "make_parser",
    "parse",
    "peek",
    "read_settings",
    "to_plain",
]

T = TypeVar("T", bound="DataclassInstance")


def import_named(name: str, what: str) -> Any:
    """What ``package.module:NAME`` names; modules are searched as Python does, and in the working directory.

    Args:
        name: The name, with a colon.
        what: What is asked for, for messages: "method".
    Returns: The object, None where the module has none of this name.
    Raises: ConfigError: it is no such name, or there is no such module.
    """
    module, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in module.split(".")):
        raise ConfigError(f"{what} '{name}': give a {what} from outside as package.module:Class")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # a module that this one needs
        raise ConfigError(f"{what} '{name}': there is no module '{error.name}'; install it, or start from the folder "
                          "that holds it") from error  # fmt: skip
    return getattr(found, attribute, None)


def make_parser(command: str, text: str) -> ArgumentParser:
    """Make the parser of a subcommand: ``--config`` files, ``--a.b value`` overrides, ``--print_config``."""
    from jsonargparse import ArgumentParser

    return ArgumentParser(prog=f"otcxr {command}", description=text, exit_on_error=False, allow_abbrev=False)


def add_settings(
    parser: ArgumentParser, prefix: str, default: DataclassInstance | type[DataclassInstance], title: str = ""
) -> None:
    """Add one option ``--prefix.field`` for every field of a settings dataclass.

    Defaults are those of the instance given, or of the class where a field is required; help is the field's entry
    under "Attributes" of the class's docstring.
    """
    from docstring_parser import parse as parse_docstring

    cls = default if isinstance(default, type) else type(default)
    document = parse_docstring(inspect.cleandoc(cls.__doc__ or ""))
    about = {name: p.description or "" for p in document.params for name in p.arg_name.replace(" ", "").split(",")}
    hints = typing.get_type_hints(cls)
    group = parser.add_argument_group(title or prefix or cls.__name__, document.short_description or "")
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            continue  # a group of its own
        option = f"--{prefix}.{field.name}" if prefix else f"--{field.name}"
        text = " ".join(about.get(field.name, "").split()).replace("%", "%%")
        if isinstance(default, type) and field.default is dataclasses.MISSING:
            group.add_argument(option, type=hints[field.name], help=text, required=True)
        else:
            value = field.default if isinstance(default, type) else getattr(default, field.name)
            group.add_argument(option, type=hints[field.name], default=value, help=text)


def peek(arguments: Sequence[str], option: str, default: str) -> str:
    """Find the value that ``option`` (dotted) will have, from overrides or ``--config`` files, before parsing.

    Needed where one setting decides which others exist (the method and its settings).
    """
    value = default
    for name, given in _options(arguments):
        if name == "config" and given:
            found = flatten(_read_yaml(given)).get(option)
            value = value if found is None else str(found)
        elif name == option:
            value = given
    return value


def from_files(arguments: Sequence[str]) -> dict[str, Any]:
    """All settings of the ``--config`` files among the arguments, flat, later files before earlier ones.

    For a command that needs few of a file's settings; one that needs all leaves the files to ``parse``.
    """
    found: dict[str, Any] = {}
    for name, given in _options(arguments):
        if name == "config":
            found |= flatten(_read_yaml(given))
    return found


def _options(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Name and value of everything that begins with two dashes."""
    words = list(arguments)
    for at, word in enumerate(words):
        if word.startswith("--"):
            name, equals, inline = word[2:].partition("=")
            yield name, inline if equals else (words[at + 1] if at + 1 < len(words) else "")


def parse(parser: ArgumentParser, arguments: Sequence[str], *, whole_files: bool = True) -> Namespace:
    """Parse, and turn every mistake into one line that names the fix.

    Args:
        parser: From ``make_parser``.
        arguments: The words after the command.
        whole_files: Whether every setting of a ``--config`` file has to be one of this command.
    Raises: ConfigError: unknown setting (with the nearest known one), missing one, value of a wrong type.
    """
    import argparse

    known = {action.dest for action in parser._actions} - {"help"}
    for name, given in _options(arguments):
        _check_known(name, known)
        if name == "config" and whole_files:
            for key in flatten(_read_yaml(given)):
                _check_known(key, known, f" in {given}")
    try:
        return parser.parse_args(list(arguments))
    except (argparse.ArgumentError, TypeError, ValueError, KeyError) as error:
        raise ConfigError(_one_line(str(error))) from error


def _check_known(name: str, known: set[str], where: str = "") -> None:
    if name in known or name in ("help", "h", "print_config", "version"):
        return
    inside = sorted(key for key in known if key.startswith(f"{name}."))
    if inside:
        inside.sort(key=lambda key: key != f"{name}.name")  # "method: simclr" means method.name
        raise ConfigError(
            f"{name}{where} is a group of settings; write {inside[0]} and the like, in YAML indented below it"
        )
    group, dot, field = name.rpartition(".")
    peers = {k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == group} if dot else known
    raise ConfigError(f"unknown setting {name}{where}{did_you_mean(field or name, peers or known)}")


def _one_line(message: str) -> str:
    text = " ".join(message.split()).rstrip(":")
    text = text.replace('Parser key "', 'setting "').replace("<class '", "").replace("'>", "")
    return text + "; write it as a list, such as [a, b]" if "Expected a tuple" in text else text


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"settings file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"settings file {path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"settings file {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"settings file {path} must hold 'name: value' lines, found {type(content).__name__}")
    return content


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = value
    return flat


def read_settings(cls: type[T], values: Mapping[str, Any]) -> T:
    """Build a settings dataclass from plain values; lists become tuples. Unknown names are a ConfigError."""
    names = {field.name for field in dataclasses.fields(cls)}
    for name in values:
        if name not in names:
            raise ConfigError(f"unknown setting {name}{did_you_mean(name, names)}")
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def to_plain(value: Any) -> Any:
    """Dataclasses, tuples and paths to what YAML and JSON can hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def digest(value: Any) -> str:
    """First 16 hexadecimal digits of the SHA-256 of a plain value."""
    return hashlib.sha256(json.dumps(to_plain(value), sort_keys=True).encode()).hexdigest()[:16]
