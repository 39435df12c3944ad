"""Which stage has which name and which ids on the wire."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

from .codec import Codec, Kind, Lossless, Pipeline, Quantizer, Stage, stages_of
from .errors import DecodeError, shortened
from .reader import Reader

_T = TypeVar("_T", bound=type[Stage])

THIRD_PARTY_IDS = range(0x80, 0xC0)
_NAME = re.compile(r"[A-Za-z_]\w*")
_RESERVED = {"rules", "True", "False", "None"}


class WireStage(NamedTuple):
    """A stage as a decoder sees it: `coder` is for the body coder, or a `Lossless` stage."""

    kind: Kind
    text: str
    coder: Any


WireReader = Callable[[Reader], WireStage]

_by_name: dict[str, type[Stage]] = {}
_by_id: dict[int, WireReader] = {}


def builtin(**readers: WireReader) -> Callable[[_T], _T]:
    """Register a stage of this library; `readers` are its ids in hexadecimal, as `id_20=...`."""

    def decorate(cls: _T) -> _T:
        _by_name[cls.name] = cls
        _by_id.update({int(key.removeprefix("id_"), 16): reader for key, reader in readers.items()})
        return cls

    return decorate


def register(wire_id: int) -> Callable[[_T], _T]:
    """Register a third party's `Quantizer` or `Lossless` stage under an id and its `name`.

    The class is a frozen dataclass. Its parameters are the encoder's matter; where the decoder needs them, it overrides
    `wire`, to give the id and their bytes, and adds a class method `from_wire(parameters: bytes)`, which may raise any
    exception.

    Parameters
    ----------
    wire_id : int
        From 0x80 to 0xBF, the same at both ends.

    Raises
    ------
    ValueError
        If the id is outside that range, id or name are taken, or the name cannot stand in a codec's text.
    TypeError
        If the class is neither a `Quantizer` nor a `Lossless`, or no frozen dataclass.

    Examples
    --------
    >>> from dataclasses import dataclass
    >>> import zlib, fedcodec as fc
    >>> @fc.register(0x80)
    ... @dataclass(frozen=True, repr=False)
    ... class Deflate(fc.Lossless):
    ...     name = "deflate"
    ...     def compress(self, data):
    ...         return zlib.compress(data)
    ...     def decompress(self, data, size):
    ...         return zlib.decompressobj().decompress(data, size)
    >>> str(fc.parse("topk(0.1) | deflate"))
    'topk(0.1) | deflate'
    """

    def decorate(cls: _T) -> _T:
        if not issubclass(cls, (Quantizer, Lossless)):
            raise TypeError(f"{cls.__name__} is neither a Quantizer nor a Lossless stage")
        if "__dataclass_params__" not in vars(cls) or not vars(cls)["__dataclass_params__"].frozen:
            raise TypeError(f"{cls.__name__} is not a frozen dataclass (register goes above it)")
        name = getattr(cls, "name", None)
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name in _RESERVED:
            raise ValueError(f"{cls.__name__}: the name {name!r} cannot stand in a codec's text")
        if wire_id not in THIRD_PARTY_IDS:
            raise ValueError(f"id {wire_id:#x} is not from 0x80 to 0xbf")
        if wire_id in _by_id or cls.name in _by_name:
            raise ValueError(f"id {wire_id:#x} or the name {cls.name!r} is taken")

        def read(reader: Reader) -> WireStage:
            parameters = bytes(reader.take(reader.remaining))
            make = getattr(cls, "from_wire", None)
            if parameters and make is None:
                raise DecodeError(f"stage {cls.name!r} has no parameters", offset=reader.offset)
            try:
                stage = make(parameters) if make else cls()
                if not isinstance(stage, cls):
                    raise TypeError(f"from_wire gave a {type(stage).__name__}")
                text = str(stage)
            except Exception as error:
                raise DecodeError(f"stage {cls.name!r}: {error}", offset=reader.offset) from error
            coder = stage if isinstance(stage, Lossless) else ("python", stage)
            return WireStage(stage.kind, text, coder)

        cls.wire_id = wire_id
        _by_name[cls.name] = cls
        _by_id[wire_id] = read
        return cls

    return decorate


def stage_class(name: str) -> type[Stage]:
    """Return the class of a stage's name.

    Raises
    ------
    ValueError
        If there is none; the message says which is meant, or lists all.
    """
    if name not in _by_name:
        raise ValueError(f"unknown stage {shortened(repr(name))}{_meant(name, _by_name)}")
    return _by_name[name]


def build(name: str, *positional: Any, **named: Any) -> Stage:
    """Make a stage by its name and parameters.

    Raises
    ------
    ValueError
        If there is no such stage, or its parameters make no sense.
    TypeError
        If it has no such parameter; the message says which is meant, or lists all.
    """
    cls = stage_class(name)
    try:
        return cls(*positional, **named)
    except TypeError as error:
        known = [field.name for field in dataclasses.fields(cls) if field.init]  # type: ignore[arg-type]
        for key in named:
            if key not in known:
                message = f"{name} has no parameter {shortened(repr(key))}{_meant(key, known)}"
                raise TypeError(message) from None
        fields = [field for field in dataclasses.fields(cls) if field.init]  # type: ignore[arg-type]
        for field in fields[len(positional) :]:
            factory = field.default_factory is not dataclasses.MISSING
            if field.default is dataclasses.MISSING and not factory and field.name not in named:
                raise TypeError(f"{name} needs {field.name}") from None
        raise TypeError(str(error).removeprefix(f"{cls.__name__}.__init__() ")) from None


def _meant(word: object, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(word)[:80].lower(), known, 1)
    return f"; did you mean {close[0]}?" if close else f"; there are {', '.join(sorted(known))}"


def stage_names() -> list[str]:
    """Return the names of all stages, third parties' included."""
    return sorted(_by_name)


def wire_reader(wire_id: int) -> WireReader | None:
    """Return what reads a stage's parameters, or None for an unknown id."""
    return _by_id.get(wire_id)


def from_config(config: dict[str, Any]) -> Codec:
    """Build a codec from its plain data form, the inverse of `Codec.config`.

    Raises
    ------
    ValueError
        If a stage is unknown or its parameters make no sense.
    TypeError
        If a stage has no such parameter, or something is not of its type.

    Examples
    --------
    >>> import fedcodec as fc
    >>> fc.from_config((fc.TopK(0.01) | fc.Int8()).config())
    TopK(0.01) | Int8()
    """
    if not isinstance(config, Mapping):
        raise TypeError(f"config is a {type(config).__name__}, it must be a dict")
    for key in ("rules", "pipeline"):
        if not isinstance(config.get(key, []), (list, tuple)):
            raise TypeError(f"config: {key} is {shortened(repr(config[key]))}, it must be a list")
    if "rules" in config:
        if "default" not in config:
            raise ValueError("config: rules need the key 'default'")
        pairs = []
        for rule in config["rules"]:
            if (
                not isinstance(rule, (list, tuple))
                or len(rule) != 2
                or not isinstance(rule[0], str)
            ):
                raise ValueError(
                    f"config: the rule {shortened(repr(rule))} is no [pattern, config]"
                )
            pairs.append((rule[0], from_config(rule[1])))
        return from_config(config["default"]).for_names(dict(pairs))
    if "pipeline" in config:
        stages: list[Stage] = []
        for inner in config["pipeline"]:
            stages.extend(stages_of(from_config(inner)))
        return Pipeline(tuple(stages))
    if "stage" not in config:
        raise ValueError("config: needs one of the keys 'stage', 'pipeline', 'rules'")
    parameters = {
        key: from_config(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key != "stage"
    }
    return build(config["stage"], **parameters)
