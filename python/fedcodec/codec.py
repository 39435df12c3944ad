"""Codecs: stages, pipelines of stages, and rules that give tensors their own pipelines.

A stage knows its parameters, its text and its bytes on the wire, and describes itself to the body coder (body.py,
body.cc) as a tuple. It never touches a tensor; `pipeline.py` runs what is described here.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from . import ops
from .digests import digest
from .errors import shortened
from .reader import varint

if TYPE_CHECKING:
    from .shared import Shared
    from .spec import Spec

Kind: TypeAlias = Literal["transform", "select", "quantize", "sum", "lossless"]
Determinism: TypeAlias = Literal["backend", "version", "none"]
Scope: TypeAlias = Literal["update", "tensor"]
Framing: TypeAlias = Literal["inline", "reference"]

ORDER: tuple[Kind, ...] = ("transform", "select", "quantize", "sum", "lossless")
SCOPES: tuple[Scope, ...] = ("update", "tensor")


class Draws:
    """The seeds of one encode call, handed out to the stages that draw random numbers."""

    def __init__(self, call_seed: int) -> None:
        self._call_seed = call_seed
        self._groups = 0
        self.asked = False  # whether another call seed could change what the stages say

    @property
    def call_seed(self) -> int:
        """The seed that the caller of `encode` gave."""
        self.asked = True
        return self._call_seed

    def group(self, codec_seed: int) -> int:
        """Return the seed of the next group with random selection (docs/numerics.md, section 6)."""
        self._groups += 1
        return ops.draw_seed(codec_seed, self.call_seed, self._groups - 1)


class Codec(ABC):
    """What turns an update into bytes: a stage, a pipeline, or rules.

    Codecs are immutable, hashable, picklable and safe to share between threads.
    """

    @abstractmethod
    def __str__(self) -> str:
        """Text form; `fedcodec.parse` gives the codec back."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Plain data (JSON) form; `fedcodec.from_config` gives the codec back."""

    @property
    @abstractmethod
    def determinism(self) -> Determinism:
        """What equal inputs promise.

        "backend": the same bytes on every backend, thread count and run; "version": the same bytes for the same
        version of a lossless library; "none": no promise.
        """

    @abstractmethod
    def pipelines(self) -> tuple[Pipeline, ...]:
        """Return the pipelines that tensors can be given to."""

    @abstractmethod
    def pipeline_of(self, name: str) -> int:
        """Return the number of the pipeline that codes the tensor of this name."""

    def table(self, spec: Spec) -> RuleTable:
        """Compile to the pipelines that code a tensor of a spec, and the one of each tensor."""
        pipelines = self.pipelines()
        if len(pipelines) == 1:
            return RuleTable(pipelines, (0,) * len(spec.untied))
        numbers = [self.pipeline_of(tensor.name) for tensor in spec.untied]
        used = sorted(set(numbers)) or [0]
        place = {number: i for i, number in enumerate(used)}
        return RuleTable(
            tuple(pipelines[number] for number in used), tuple(place[number] for number in numbers)
        )

    def add_shared(self, shared: Shared) -> None:
        """Put what a decoder must hold (masks) into a store."""
        for pipeline in self.pipelines():
            for stage in pipeline.stages:
                stage.add_shared(shared)

    def for_names(self, rules: Mapping[str, Codec]) -> Rules:
        """Give tensors whose names match a pattern a codec of their own.

        Parameters
        ----------
        rules : mapping of str to Codec
            Shell-style patterns (`*`, `?`, `[seq]`, case matters), tried in order; the first that matches wins.

        Examples
        --------
        >>> import fedcodec as fc
        >>> str((fc.TopK(0.01) | fc.Int8()).for_names({"*.bias": fc.Raw()}))
        'rules(topk(0.01) | int8; "*.bias" = raw)'
        """
        return Rules(as_pipeline(self), tuple((key, as_pipeline(rules[key])) for key in rules))

    def encode(
        self,
        update: Any,
        *,
        framing: Framing = "inline",
        base: bytes | None = None,
        seed: int | None = None,
    ) -> bytes:
        """Compress an update to bytes; the update is not changed.

        Parameters
        ----------
        update : dict of str to array, list of arrays, or array
            NumPy, torch, JAX or CuPy arrays, all on the CPU or all on one GPU. Floats go through the codec, integers
            and bools are lossless. Arrays that share their memory (tied) are sent once.
        framing : {"inline", "reference"}
            "reference" leaves names, shapes and dtypes to a spec that both ends hold: `decode(..., like=...)`.
        base : bytes of length 8, optional
            `fedcodec.digest` of the model that the update is a delta against.
        seed : int, optional
            From 0 to 2^64 - 1: what stochastic stages draw from, together with their own seed. Pass another one each
            round and client. The default is 0.

        Returns
        -------
        bytes

        Raises
        ------
        NonFiniteError
            If a float is infinite or not a number, or becomes infinite in a narrower dtype.
        TypeError, ValueError
            If an argument is not as above.

        Examples
        --------
        >>> import numpy as np, fedcodec as fc
        >>> payload = (fc.TopK(0.25) | fc.Int8()).encode({"weight": np.array([1, -4, 0, 2], np.float32)})
        >>> fc.decode(payload)["weight"]
        array([ 0., -4.,  0.,  0.], dtype=float32)
        """
        from . import arrays, pipeline

        read = arrays.read(update)
        return pipeline.encode(self, read.spec, read.storage, framing=framing, base=base, seed=seed)

    def __or__(self, other: Codec) -> Pipeline:
        if isinstance(other, str):
            raise TypeError(
                f"| joins codecs, not text: use fedcodec.parse({shortened(repr(other))})"
            )
        if not isinstance(other, Codec):
            return NotImplemented
        return Pipeline(stages_of(self) + stages_of(other))

    def __ror__(self, other: Any) -> Any:
        return self | other  # never a codec: refused as on the other side


class Stage(Codec):
    """One step of a pipeline; subclasses are frozen dataclasses whose fields are its parameters."""

    name: ClassVar[str]
    kind: ClassVar[Kind]
    wire_id: ClassVar[int | None] = None  # of a third party's: `fedcodec.register` sets it
    _determinism: ClassVar[Determinism] = "backend"
    _needs_all: ClassVar[str] = "it codes every value of a tensor"  # why none may be left out

    def __post_init__(self) -> None:
        """Make numbers of NumPy's scalars, so that text, JSON and bytes are those of one and the same."""
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, np.generic):
                object.__setattr__(self, field.name, value.item())

    def wire(self) -> tuple[int, bytes] | None:
        """Return id and parameters as they travel; None for nothing."""
        if self.wire_id is None:
            raise ValueError(f"{self} has no id on the wire: fedcodec.register")
        return self.wire_id, b""

    @property
    def needs_select(self) -> bool | None:
        """Whether a select stage must (True) or must not (False) stand before this one."""
        return None

    @property
    def determinism(self) -> Determinism:
        """See `Codec.determinism`."""
        return self._determinism

    def pipelines(self) -> tuple[Pipeline, ...]:
        """Return itself as the only stage of a pipeline."""
        return (Pipeline((self,)),)

    def pipeline_of(self, name: str) -> int:
        """Return 0: all tensors are treated alike."""
        return 0

    def add_shared(self, shared: Shared) -> None:
        """Do nothing; a stage that the decoder must know more of overrides this."""

    def config(self) -> dict[str, Any]:
        """Return the name and the parameters."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        values = {field.name: getattr(self, field.name) for field in fields if field.init}
        return {"stage": self.name} | {
            key: value.config() if isinstance(value, Codec) else value
            for key, value in values.items()
        }

    def __str__(self) -> str:
        return self._text(self.name)

    def __repr__(self) -> str:
        return self._text(type(self).__name__)

    def _text(self, name: str) -> str:
        arguments = []
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            text = json.dumps(value, ensure_ascii=False) if isinstance(value, str) else str(value)
            if field.default is dataclasses.MISSING:
                arguments.append(text)
            elif field.init and value != field.default:
                arguments.append(f"{field.name}={text}")
        return f"{name}({', '.join(arguments)})" if arguments or name[0].isupper() else name


class Transform(Stage):
    """A stage that puts one array of float32 in the place of all float tensors, for the stages behind it.

    It is the encoder's end: what undoes it is found by the decoder in what it holds (`fedcodec.Shared`).
    """

    kind = "transform"
    _determinism = "none"

    @property
    @abstractmethod
    def outputs(self) -> int:
        """The size of that array."""

    @abstractmethod
    def forward(self, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return the array for the values of the float tensors, put end to end.

        Raises
        ------
        ValueError
            If the values are not as many as it is made for, or the result is beyond float32.
        """

    @abstractmethod
    def inverse(self, outputs: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return what the decoder makes of such an array."""


class Select(Stage):
    """A stage that chooses which values are kept; the others decode to zero."""

    kind = "select"

    @abstractmethod
    def coder(self, sizes: Sequence[int], draws: Draws) -> tuple[Any, ...]:
        """Describe the choice to the body coder, given the number of values of each group."""

    @property
    def by_tensor(self) -> bool:
        """Whether each tensor is a group by itself."""
        return getattr(self, "scope", "update") == "tensor"


class Quantize(Stage):
    """A stage that turns kept values into codes."""

    kind = "quantize"

    @abstractmethod
    def coder(self, draws: Draws) -> Any:
        """Describe the quantizer to the body coder."""


class Lossless(Stage):
    """A stage that turns the bytes of a segment into fewer bytes.

    Third parties subclass it: `fedcodec.register`.
    """

    kind = "lossless"
    _determinism = "version"

    @abstractmethod
    def compress(self, data: bytes) -> bytes:
        """Return smaller bytes (larger ones are not used)."""

    @abstractmethod
    def decompress(self, data: bytes, size: int) -> bytes:
        """Return the `size` bytes that were compressed, or raise any exception.

        It must allocate no more than `size` bytes, whatever `data` claims.
        """


class Quantizer(Quantize):
    """A third party's quantizer, in Python: see `fedcodec.register`.

    Its bytes travel with their length, so it is free in what it writes.
    """

    @abstractmethod
    def encode_values(self, values: npt.NDArray[np.float32], seed: int) -> bytes:
        """Code the kept values of one group."""

    @abstractmethod
    def decode_values(self, data: bytes, n: int) -> npt.NDArray[np.float32]:
        """Return n finite values, or raise any exception."""

    def coder(self, draws: Draws) -> Any:
        """Return the stage itself: body.py calls it back."""
        return ("python", self, draws.call_seed)


@dataclass(frozen=True, repr=False)
class Pipeline(Codec):
    """Stages in the order transform | select | quantize | lossless, at most one of each kind.

    Raises
    ------
    ValueError
        If the stages make no sense in their order; the message says which order does.
    """

    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("a pipeline has at least one stage, such as raw")
        for before, after in zip(self.stages, self.stages[1:], strict=False):
            if ORDER.index(after.kind) <= ORDER.index(before.kind):
                raise ValueError(
                    f"{before} ({before.kind}) cannot stand before {after} ({after.kind}): "
                    "a pipeline is transform | select | quantize | lossless, one stage of each kind at most"
                )
        if self.find("sum") and any(map(self.find, ORDER[: ORDER.index("sum")])):
            raise ValueError(
                f"{self.find('sum')} holds whole pipelines: only a lossless stage may stand beside it"
            )
        selected = self.find("select") is not None
        for stage in self.stages:
            if stage.needs_select is not None and stage.needs_select != selected:
                raise ValueError(
                    f"{stage} needs a select stage before it, such as topk(0.01) | {stage}"
                    if stage.needs_select
                    else f"{stage} cannot follow a select stage: {stage._needs_all}"
                )

    def find(self, kind: Kind) -> Stage | None:
        """Return the stage of a kind, if there is one."""
        for stage in self.stages:
            if stage.kind == kind:
                return stage
        return None

    @cached_property
    def encoded(self) -> bytes:
        """The pipeline as it travels (docs/format.md, section 3)."""
        wires = [wire for stage in self.stages if (wire := stage.wire()) is not None]
        return varint(len(wires)) + b"".join(
            bytes([number]) + varint(len(parameters)) + parameters for number, parameters in wires
        )

    @property
    def determinism(self) -> Determinism:
        """The weakest promise of its stages."""
        return weakest([stage.determinism for stage in self.stages])

    def pipelines(self) -> tuple[Pipeline, ...]:
        """Return itself."""
        return (self,)

    def pipeline_of(self, name: str) -> int:
        """Return 0: all tensors are treated alike."""
        return 0

    def config(self) -> dict[str, Any]:
        """Return the configs of its stages."""
        return {"pipeline": [stage.config() for stage in self.stages]}

    def __str__(self) -> str:
        return " | ".join(str(stage) for stage in self.stages)

    def __repr__(self) -> str:
        return " | ".join(repr(stage) for stage in self.stages)


@dataclass(frozen=True, repr=False)
class Rules(Codec):
    """A pipeline for each tensor, by its name; made by `Codec.for_names`."""

    default: Pipeline
    rules: tuple[tuple[str, Pipeline], ...]

    def pipelines(self) -> tuple[Pipeline, ...]:
        """Return the default and the pipelines of the rules, in order."""
        return (self.default, *(pipeline for _, pipeline in self.rules))

    def pipeline_of(self, name: str) -> int:
        """Return the number of the first rule that matches, counted from 1, or 0 for none."""
        matches = (
            number
            for number, (pattern, _) in enumerate(self.rules, 1)
            if fnmatch.fnmatchcase(name, pattern)
        )
        return next(matches, 0)

    @property
    def determinism(self) -> Determinism:
        """The weakest promise of its pipelines."""
        return weakest([pipeline.determinism for pipeline in self.pipelines()])

    def config(self) -> dict[str, Any]:
        """Return the configs of the default and of each rule."""
        return {
            "default": self.default.config(),
            "rules": [[pattern, pipeline.config()] for pattern, pipeline in self.rules],
        }

    def __str__(self) -> str:
        rules = "".join(
            f"; {json.dumps(pattern, ensure_ascii=False)} = {pipeline}"
            for pattern, pipeline in self.rules
        )
        return f"rules({self.default}{rules})"

    def __repr__(self) -> str:
        rules = ", ".join(f"{pattern!r}: {pipeline!r}" for pattern, pipeline in self.rules)
        return f"({self.default!r}).for_names({{{rules}}})"


@dataclass(frozen=True)
class RuleTable:
    """The pipelines of a codec, and which of them codes which untied tensor of a spec."""

    pipelines: tuple[Pipeline, ...]
    assignment: tuple[int, ...]

    @cached_property
    def encoded(self) -> bytes:
        """The table as it travels (docs/format.md, section 3)."""
        out = varint(len(self.pipelines)) + b"".join(p.encoded for p in self.pipelines)
        if len(self.pipelines) > 1:
            out += b"".join(varint(number) for number in self.assignment)
        return out

    @cached_property
    def digest(self) -> bytes:
        """The 8 bytes that stand for the table in a payload framed by reference."""
        return digest("fedcodec/rules", self.encoded)


def stages_of(codec: Codec) -> tuple[Stage, ...]:
    """Return the stages of a codec without rules; alone they may not be a pipeline yet, as ternary is none."""
    return (codec,) if isinstance(codec, Stage) else as_pipeline(codec).stages


def as_pipeline(codec: Codec) -> Pipeline:
    """Return the one pipeline of a codec without rules."""
    if not isinstance(codec, Codec):
        raise TypeError(f"expected a codec, got a {type(codec).__name__}")
    pipelines = codec.pipelines()
    if len(pipelines) != 1:
        raise ValueError(f"{codec} already has rules; it cannot be part of a pipeline or of rules")
    return pipelines[0]


def weakest(promises: Sequence[Determinism]) -> Determinism:
    """Return what holds for all."""
    order: tuple[Determinism, ...] = ("backend", "version", "none")
    return max(promises, key=order.index, default="backend")
