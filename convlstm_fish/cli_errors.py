"""Parsers that say in one line what is wrong with the options, and the parser of the small commands."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

from jsonargparse import ArgumentParser


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question that ends an error about an unknown name, empty where none of those known is like it."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    return f"; did you mean {close[0]}?" if close else ""


def told_shortly(message: object) -> str:
    """What jsonargparse says over many lines, in one: the option, what it expects, and what it got."""
    whole = re.sub(r'Parser key "([^"]*)" element \d+:', r'Parser key "\1":', str(message))
    keys = re.findall(r'Parser key "([^"]*)":', whole)
    text, given = whole, None
    if union := re.search(r"Errors:\n(.*?)\n\s*Given value type", whole, re.DOTALL):
        reasons = re.split(r"(?:^|\n)\s*- ", union[1])
        text = "; or ".join(r.strip() for r in reasons if r.strip() and "NoneType" not in r)
        given = re.search(r"Given value: ([^\n]*)", whole)
    text = re.sub(r'Parser key "[^"]*":', "", text)
    text = re.sub(r"Problem with given class_path '(?:[^']*\.)?([^'.]*)':", r"\1:", text)
    text = re.sub(r"[Ee]xpected an? ", "expected ", text)
    text = re.sub(r"<class '(?:[\w.]*\.)?(\w*)'>", r"\1", text).replace("typing.", "")
    text = re.sub(r"(^|\s)- ", r"\1", text)
    text = re.sub(r"Not of type \w+: (\S+) does not conform to restriction v(>=?)0$", r"\1 is not a number \2 0", text)
    text = re.sub(r"Not of type \w+: invalid literal for int\(\).*: '(.*)'$", r"expected int. Got value: \1", text)
    text = re.sub(r"expected dot import path string: (\S+)", r"no class \1 is known", text)
    if given and len(given[1]) < 80 and given[1] not in text:
        text = f"{text}. Got value: {given[1]}"
    return " ".join(f"{keys[-1]}: {text}".split()) if keys else " ".join(text.split())


class OneLineErrors:
    """A parser that says what is wrong in one line, exits with 2, and guesses no abbreviations."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print ``message`` and exit."""
        if absent := re.search(r"arguments are required: (.+)$", str(message)):
            names = [self._as_typed(name) for name in absent[1].split(", ")]
            message = f"{', '.join(names)}: must be given"
        told = told_shortly(message)
        if unknown := re.match(r"unrecognized arguments: (--[^\s=]+)", told):
            told += did_you_mean(unknown[1], (f"--{name}" for name in self._options()))
        elif unknown := re.match(r"(?:Option|Subcommand '\w+' does not accept option) '([^']+)'", told):
            told += did_you_mean(unknown[1], self._options())  # of a class, or in a config
        sys.stderr.write(f"error: {told} (see --help)\n")
        sys.exit(2)

    def _options(self) -> list[str]:
        """Of this parser and of its subcommands, without the dashes."""
        parsers: list[Any] = [self]
        for action in getattr(self, "_actions", ()):
            parsers += (getattr(action, "_name_parser_map", None) or {}).values()
        names = [name for parser in parsers for name in parser._option_string_actions]
        return [name.removeprefix("--") for name in names if name.startswith("--")]

    def _as_typed(self, name: str) -> str:
        return f"--{name}" if name in self._options() else name


class CommandParser(OneLineErrors, ArgumentParser):
    """The parser of the other commands."""
