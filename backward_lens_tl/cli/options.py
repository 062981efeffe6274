"""Options of a command, generated from the fields and the docstring of a dataclass."""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from types import NoneType
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from backward_lens_tl.choices import Kind
from backward_lens_tl.errors import InputError
from backward_lens_tl.runs.config import Config
from backward_lens_tl.settings import members

_NAMES = {"prepend_bos": "bos"}
"""Options whose name is not the field's."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """Options of every command.

    Attributes:
        model: The facts model that ships with this package (facts), SmolLM2-135M-Instruct
            (smollm2), a local folder in Hugging Face format, a .gguf file, or a name on the hub,
            such as gpt2.
        kind: TransformerLens's model class; by default the one that it prefers.
        SETTINGS: Settings whose fields are options too.
        NO_OPTIONS: Those of its fields that are not.
        POSITIONAL: Options without a flag, in this order.
        settings: Values of `SETTINGS` passed on the command line, by name.
    """

    SETTINGS: ClassVar[type[Config] | None] = None
    NO_OPTIONS: ClassVar[tuple[str, ...]] = ()
    POSITIONAL: ClassVar[tuple[str, ...]] = ()

    model: str = "facts"
    kind: Kind | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def run(self) -> None:
        """Run the command."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class DataCommand(Command):
    """Options of commands that read a data set.

    Attributes:
        data: A .json (CounterFact), .jsonl, .csv, .tsv or .parquet file, a data set's folder or
            name on the hub, or facts, the records of the facts model.
        split: The split of a data set.
        out: The folder to write, or to resume.
        device: Such as cuda:1; by default this process's own accelerator, if it has one.
        quiet: Show no progress bars.
    """

    data: str | None = "facts"
    split: str = "train"
    out: str
    device: str | None = None
    quiet: bool = False


def add_options(parser: argparse.ArgumentParser, command: type[Command]) -> None:
    """Add the options of a command and its settings.

    Args:
        parser: The parser to add them to.
        command: The command.
    """
    own = _options(command)
    for name in command.POSITIONAL:
        parser.add_argument(name, help=_described(command)[name])
    for name, default in own.items():
        if name in command.POSITIONAL:
            continue
        _add_option(parser, command, name, default)
    if command.SETTINGS is not None:
        group = parser.add_argument_group("settings")
        for each in fields(command.SETTINGS):
            if each.name not in (*own, *command.NO_OPTIONS):
                _add_option(group, command.SETTINGS, each.name, each.default, is_setting=True)


def run_command(command: type[Command], given: dict[str, Any]) -> None:
    """Run a command.

    Args:
        command: The command.
        given: Its options and settings, by name.
    """
    own = {name: given.pop(name) for name in _options(command)}
    command(**own, settings=given).run()


def _options(command: type[Command]) -> dict[str, Any]:
    """The defaults of a command's own options."""
    return {each.name: each.default for each in fields(command) if each.name != "settings"}


def _add_option(
    parser: Any, owner: type, name: str, default: Any, *, is_setting: bool = False
) -> None:
    """Add one option. A required sequence is positional; settings that are not passed stay out."""
    kinds = members(get_type_hints(owner, include_extras=True)[name])
    sequence = next((each for each in kinds if get_origin(each) is Sequence), None)
    item = kinds[0] if sequence is None else members(get_args(sequence)[0])[0]
    option: dict[str, Any] = {"default": argparse.SUPPRESS if is_setting else default}
    if item is bool:
        is_flag = NoneType not in kinds and default is False
        option["action"] = "store_true" if is_flag else argparse.BooleanOptionalAction
    elif get_origin(item) is Literal:
        option["choices"] = get_args(item)
    elif item in (str, int, float):
        option["type"] = item
    else:
        raise InputError(
            f"{name} of {owner.__name__} is a {item}, which an option cannot hold; list it in "
            "NO_OPTIONS"
        )
    text = _described(owner)[name].replace("%", "%%").replace("`", "")
    if isinstance(default, str | int | float) and not isinstance(default, bool) and default != "":
        text += f" (default: {default})"
    flag = f"--{_NAMES.get(name, name).replace('_', '-')}"
    if default is MISSING:
        del option["default"]
        flag = flag if sequence is None else name
        option |= {"required": True} if sequence is None else {"nargs": "+"}
    elif sequence is not None:
        option["nargs"] = "*"
    if flag.startswith("--"):
        option["dest"] = name
    parser.add_argument(flag, help=text, **option)


def _described(owner: type) -> dict[str, str]:
    """The attributes of a class and those that it inherits, from their docstrings."""
    found: dict[str, str] = {}
    for each in reversed(owner.__mro__):
        section = (inspect.getdoc(each) or "").partition("Attributes:\n")[2].partition("\n\n")[0]
        for name, text in re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE):
            found[name] = " ".join(text.split()).removesuffix(".")
    return found
