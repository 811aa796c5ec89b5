"""Command lines from signatures: the arguments of `maelab evaluate` are those of `maelab.tasks.evaluate.evaluate`.

A parameter before the `*` is a positional argument, one after it a flag, and the docstring's Args are the help. A
parameter that is a dataclass stands for its fields: each is a flag, and the text under it its help. Functions are read
from their source and not imported, so that `--help` needs no torch.
"""

import argparse
import ast
import collections.abc
import dataclasses
import difflib
import functools
import importlib.util
import math
import os
import re
import sys
import types
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin

from maelab import config
from maelab.errors import UsageError
from maelab.names import short

REQUIRED = dataclasses.MISSING
_NAMES = {**vars(typing), **vars(collections.abc), **vars(config)}  # what annotations and defaults are written in
_WANTED = {int: "a whole number", float: "a finite number", Path: "a path"}
_SHOWN = {int: "INT", float: "FLOAT", Path: "PATH", str: "TEXT"}


@dataclass(frozen=True)
class Option:
    """An argument: of the function itself, or a field of the dataclass that its parameter `owner` takes."""

    name: str
    kind: Any
    default: Any
    help: str
    owner: str = ""
    positional: bool = False

    @property
    def label(self) -> str:
        """Its flag, or what stands for it in a usage. A list of numbers is named in the plural, its flag is not."""
        kind, count, _ = self.shape()
        if self.positional:
            return "RUN" if self.name == "init" else self.name.upper()
        name = self.name.rstrip("_")  # in_ is a word of Python's without it
        return "--" + name.removesuffix("s" if count is None and kind is float else "").replace("_", "-")

    def shape(self) -> tuple[Any, int | None, bool]:
        """What a word becomes (of several types the first), how many words (None: any), whether None is a value."""
        members = get_args(self.kind) if isinstance(self.kind, types.UnionType) else (self.kind,)
        kind = next((m for m in members if get_origin(m) in (Sequence, Iterable)), members[0])
        many = get_origin(kind) in (tuple, Sequence, Iterable)
        inner = get_args(kind)[0] if many else kind
        inner = get_args(inner)[0] if isinstance(inner, types.UnionType) else inner
        count = 1 if not many else len(get_args(kind)) if get_origin(kind) is tuple else None
        return inner, count, types.NoneType in members

    def convert(self, words: Sequence[str]) -> Any:
        """The value that these words mean.

        Raises:
            UsageError: if they mean none; names the nearest.
        """
        kind, count, optional = self.shape()
        if optional and [*words] == ["None"]:
            return None
        choices = ("false", "true") if kind is bool else get_args(kind)
        try:
            values: tuple[Any, ...] = tuple(choices[choices.index(w)] if choices else kind(w) for w in words)
            infinite = kind is float and not all(map(math.isfinite, values))
            empty = kind is Path and "" in words  # which Path takes for the working folder
            if infinite or empty or count not in (None, len(words)):
                raise ValueError
        except ValueError:
            wanted = " or ".join(", ".join(choices).rsplit(", ", 1)) if choices else _WANTED[kind]
            wanted = f"{count} of them, each {wanted}" if count not in (1, None) else wanted
            near = difflib.get_close_matches(words[-1], choices, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            got = " ".join(words)
            raise UsageError(
                f"{self.label} must be {wanted}{', or None' * optional}, got {short(repr(got), 60)}{hint}"
            ) from None
        values = tuple(value == "true" for value in values) if kind is bool else values
        return values[0] if count == 1 else values


@dataclass(frozen=True)
class Signature:
    """Of a command: what it does, its arguments, and the dataclasses that some of its parameters take."""

    command: str
    about: str
    options: tuple[Option, ...]
    owners: Mapping[str, type]

    @property
    def usage(self) -> str:
        """The command with its arguments; of the flags those that have no default."""
        words = [f"maelab {self.command}"]
        for option in sorted(self.options, key=lambda option: not option.positional):
            if option.positional or (option.default is REQUIRED and not option.owner):
                word = f"{option.label}{'' if option.positional else ' TEXT'}{'...' * (option.shape()[1] is None)}"
                words.append(word if option.default is REQUIRED else f"[{word}]")
        return " ".join(words)


def read(command: str, task: str, output: type, first: str = "") -> Signature:
    """The signature of a command.

    Args:
        command: its name.
        task: 'module:function'.
        output: the dataclass of what to print, as if the function had a parameter `output` for it.
        first: a keyword or field that is the first positional argument all the same. A keyword `recipe` is an argument
            only so: it names the config.
    """
    module, _, name = task.partition(":")
    function = _source(module, name)
    assert isinstance(function, ast.FunctionDef)
    about, _, told = (ast.get_docstring(function) or "").partition("Args:\n")
    entries = re.split(r"^ {4}(\w+): ", told.partition("\n\n")[0], flags=re.MULTILINE)
    helps = {k: " ".join(v.split()).rstrip(".") for k, v in zip(entries[1::2], entries[2::2], strict=True)}
    given = function.args
    defaults = [None] * (len(given.args) - len(given.defaults)) + given.defaults + given.kw_defaults
    options, owners = [], {}
    for i, (parameter, default) in enumerate(zip(given.args + given.kwonlyargs, defaults, strict=True)):
        name, kind = parameter.arg, eval(ast.unparse(parameter.annotation or parameter), _NAMES)
        if found := [m for m in (kind, *get_args(kind)) if dataclasses.is_dataclass(m)]:
            owners[name] = found[0]
        elif name == first or name != "recipe":
            value = REQUIRED if default is None or name == first else eval(ast.unparse(default), _NAMES)
            options.append(Option(name, kind, value, helps[name], positional=name == first or i < len(given.args)))
    owners["output"] = output
    for owner, kind in owners.items():
        options += [replace(field, owner=owner, positional=field.name == first) for field in fields(kind)]
    return Signature(command, about.strip().partition("\n\n")[0], tuple(options), owners)


def fields(kind: Any) -> list[Option]:
    """The fields of a dataclass, each with the text under it."""
    helps: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        source = _source(base.__module__, base.__name__)
        assert isinstance(source, ast.ClassDef)
        for field, text in pairwise(source.body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                helps[ast.unparse(field.target)] = " ".join(ast.literal_eval(text.value).split())
    return [Option(f.name, f.type, f.default, helps[f.name]) for f in dataclasses.fields(kind)]


@functools.cache
def _source(module: str, name: str) -> ast.stmt:
    """A function or class of a module; it alone is parsed, since the whole of all modules would take too long."""
    spec = importlib.util.find_spec(module)  # which imports the packages around it
    source = spec.loader.get_source(module)  # type: ignore[union-attr]
    found = re.search(rf"^(def|class) {name}\b.*?(?=^[^\s)]|\Z)", source, flags=re.MULTILINE | re.DOTALL)
    assert found
    return ast.parse(found[0]).body[0]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message.removeprefix('argument ')}; see {self.prog} --help")


def _parser(signature: Signature, whole: bool) -> _Parser:
    """Of the flags; the `whole` is for the help, with positional arguments and defaults."""
    parser = _Parser(
        f"maelab {signature.command}", f"{signature.usage} [flags]", signature.about,
        add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS,
    )  # fmt: skip
    titles = {"words": "arguments", "": "flags"}
    titles |= {owner: (kind.__doc__ or "").split(";")[0].strip(".") for owner, kind in signature.owners.items()}
    groups = {owner: parser.add_argument_group(title) for owner, title in titles.items()}
    for option in signature.options:
        kind, count, optional = option.shape()
        default = " ".join(map(str, option.default)) if isinstance(option.default, tuple) else str(option.default)
        usual = option.default is not REQUIRED and default and not option.positional
        more: dict[str, Any] = {"help": (option.help + f" (default: {default})" * bool(usual)).replace("%", "%%")}
        if option.positional:
            if whole:
                groups["words"].add_argument(option.label, **more)
            continue
        if kind is bool:
            more |= {"action": argparse.BooleanOptionalAction}
        else:
            name = f"{{{','.join(get_args(kind))}}}" if get_args(kind) else _SHOWN[kind]
            more |= {"metavar": name + "|None" * (optional and count == 1)}
        if count is None:
            more |= {"action": "append"} if kind is str else {"action": "extend", "nargs": "+"}
        elif count > 1:
            more |= {"nargs": count if whole else "+"}
        groups[option.owner].add_argument(option.label, dest=option.label, **more)
    if whole:
        groups[""].add_argument("-h", "--help", action="store_true", help="show this and exit")
    return parser


def help_of(signature: Signature) -> str:
    """What `--help` prints."""
    return _parser(signature, whole=True).format_help()


def parse(signature: Signature, words: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What words mean: owner -> name -> value; "" owns what is the function's own.

    Every argument of the function is there; of a dataclass only what was typed, as the rest has defaults of its own.

    Raises:
        UsageError: one line that names the nearest right flag or value.
    """
    words, after = cut(words)
    words = [re.sub(r"^--[^=]+", lambda found: found[0].replace("_", "-"), word) for word in words]
    found, rest = _parser(signature, whole=False).parse_known_args(words)
    for word in rest:
        if word.startswith("-") and word != "-":
            refuse(word.partition("=")[0], signature.options, signature.command)
    see = f"see maelab {signature.command} --help"
    rest, values = rest + after, {owner: {} for owner in ("", *signature.owners)}
    for option in signature.options:
        given: Any = getattr(found, option.label, None)
        value = option.default
        if option.positional:
            places = 1 if option.shape()[1] else len(rest)
            given, rest = rest[:places], rest[places:]
        if given not in (None, []):
            value: Any = [given] if isinstance(given, str) else given
            value = value if isinstance(given, bool) else option.convert(value)
            if Iterable in [get_origin(m) for m in (option.kind, *get_args(option.kind))]:
                value = _with_stdin(value)
        elif value is REQUIRED and (option.positional or not option.owner):
            raise UsageError(f"{signature.command} needs {option.label}: {option.help}; {see}")
        elif option.owner:
            continue
        values[option.owner][option.name] = value
    if rest:
        raise UsageError(f"unexpected {rest[0]!r}; {see}")
    return values


def cut(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words before "--", and those behind it, which are no flags whatever they look like."""
    place = [*words, "--"].index("--")
    return [*words[:place]], [*words[place + 1 :]]


def refuse(flag: str, options: Collection[Option], command: str) -> NoReturn:
    """Raise a UsageError that names the nearest of the flags that there are."""
    known = ["--help", *(option.label for option in options if not option.positional)]
    known += [option.label.replace("--", "--no-", 1) for option in options if option.kind is bool]
    near = difflib.get_close_matches(flag, known, 1)
    hint = f"did you mean {near[0]}?" if near else f"see maelab {command} --help"
    raise UsageError(f"unknown flag {flag}; {hint}")


def _with_stdin(words: Iterable[str]) -> Iterator[str]:
    """The words, with the lines of stdin in the place of each "-"."""
    for word in words:
        if word == "-":
            yield from (os.fsdecode(line.rstrip(b"\r\n")) for line in sys.stdin.buffer if line.strip())
        else:
            yield word
