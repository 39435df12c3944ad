"""The text form of codecs: `topk(0.01) | int8`, as typed on a command line or sent by a server."""

from __future__ import annotations

import ast
import re
from typing import Any

from .codec import Codec
from .errors import shortened
from .registry import build, stage_class, stage_names

_NAME = r"[A-Za-z_]\w*"
_LITERAL = r'"(?:[^"\\]|\\.)*"|[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?'
_TOKEN = re.compile(rf"\s*(?:({_NAME})|({_LITERAL})|([|();,=]))")
_CONSTANTS = {"True": True, "False": False, "None": None}
_SPACE = re.compile(r"\s*")
_MAX_DEPTH = 16  # of parentheses: a text may come from a stranger


def parse(text: str) -> Codec:
    """Build a codec from its text, the inverse of `str(codec)`.

    Parameters
    ----------
    text : str
        Stages joined by `|`. Parameters are numbers, strings, True, False or None, as in Python; a string that is a
        word needs no quotes. Whole pipelines are parameters of `residual(first; second)` and
        `rules(default; "pattern" = pipeline; ...)`.

    Raises
    ------
    ValueError
        If the text is not such a form; the message says where, from character 0 on.
    TypeError
        If it is no text.

    Examples
    --------
    >>> import fedcodec as fc
    >>> fc.parse("topk(0.01) | int8(block_size=256)")
    TopK(0.01) | Int8(block_size=256)
    """
    if not isinstance(text, str):
        raise TypeError(f"expected the text of a codec, got a {type(text).__name__}")
    parser = _Parser(text)
    codec = parser.codec()
    parser.expect("")
    return codec


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self._position = 0
        self._depth = 0
        self._advance()

    def _advance(self) -> None:
        space = _SPACE.match(self._text, self._position)
        self._start = space.end() if space else self._position
        if self._start == len(self._text):
            self._token, self._is = "", "end"
            return
        match = _TOKEN.match(self._text, self._start)
        if match is None:
            raise self.error("unexpected character")
        self._start, self._position = match.start(match.lastindex or 0), match.end()
        self._token = match.group(match.lastindex or 0)
        self._is = ("end", "name", "literal", "sign")[match.lastindex or 0]

    def error(self, what: str, start: int | None = None) -> ValueError:
        self._start = self._start if start is None else start
        rest = shortened(self._text[self._start :])
        place = f"character {self._start} ({rest})" if rest else "the end"
        return ValueError(
            f"codec {shortened(repr(self._text))}, at {place}: {shortened(what, 300)}"
        )

    def take(self, token: str) -> bool:
        if self._token != token or self._is == "literal":
            return False
        if token:
            self._advance()
        return True

    def expect(self, token: str) -> None:
        if not self.take(token):
            raise self.error(f"expected {token!r}" if token else "unexpected text")

    def codec(self) -> Codec:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise self.error("too many parentheses")
        codec = self.stage()
        while self.take("|"):
            start, stage = self._start, self.stage()
            try:
                codec = codec | stage
            except ValueError as error:
                raise self.error(str(error), start) from None
        self._depth -= 1
        return codec

    def stage(self) -> Codec:
        if self._is != "name":
            raise self.error("expected a stage")
        name, start = self._token, self._start
        self._advance()
        if name == "rules":
            return self.rules()
        try:
            make = stage_class(name)
        except ValueError as error:
            raise self.error(str(error), start) from None
        positional: list[Any] = []
        named: dict[str, Any] = {}
        if self.take("("):
            while not self.take(")"):
                if positional or named:
                    self.expect(";" if self._token == ";" else ",")
                self.argument(positional, named, of_codecs=make.kind == "sum")
        try:
            return build(name, *positional, **named)
        except (TypeError, ValueError) as error:
            raise self.error(str(error), start) from None

    def argument(self, positional: list[Any], named: dict[str, Any], *, of_codecs: bool) -> None:
        if self._is == "literal" or self._token in _CONSTANTS:
            positional.append(self.value())
            return
        mark = self._position, self._start, self._token, self._is
        name = self._token
        if self._is == "name":
            self._advance()
            if self.take("="):
                if name in named:
                    raise self.error(f"{name} is given twice", mark[1])
                named[name] = self.word() if self._is == "name" else self.value()
                return
            if not of_codecs and name not in stage_names():
                positional.append(name)
                return
        self._position, self._start, self._token, self._is = mark
        positional.append(self.codec())

    def word(self) -> Any:
        word = self._token
        if word not in _CONSTANTS and word.capitalize() in _CONSTANTS:
            raise self.error(f"did you mean {word.capitalize()}?")
        self._advance()
        return _CONSTANTS.get(word, word)

    def value(self) -> Any:
        token, literal = self._token, self._is == "literal"
        if not literal and token not in _CONSTANTS:
            raise self.error("expected a number or a string")
        try:
            value = ast.literal_eval(token) if literal else _CONSTANTS[token]
        except (SyntaxError, ValueError):
            raise self.error("expected a number or a string") from None
        self._advance()
        return value

    def rules(self) -> Codec:
        self.expect("(")
        default = self.codec()
        rules: dict[str, Codec] = {}
        while self.take(";"):
            start, pattern = self._start, self.value()
            if not isinstance(pattern, str):
                raise self.error("expected a pattern in quotes", start)
            if pattern in rules:
                raise self.error(f"the pattern {pattern!r} is given twice", start)
            self.expect("=")
            rules[pattern] = self.codec()
        self.expect(")")
        return default.for_names(rules)
