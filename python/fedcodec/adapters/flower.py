"""fedcodec inside Flower: a mod for clients, a Grid for servers, and averaging straight from payloads.

Messages whose content has one ArrayRecord travel compressed. The server says how, in a record of its own that no app
sees: codecs, the digest of the model, a ticket for the reply, and which tickets it took. A payload is the one Array of
its ArrayRecord, with the serialization type ``fedcodec.v1``.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import hashlib
import json
import logging
import secrets
import sys
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

import fedcodec as fc

from .client_state import ClientFeedback, FileHome, StateHome
from .models import model_codec

_LOG = logging.getLogger("flwr.fedcodec")  # Flower shows what its own loggers get

_KEY = _SERIALIZATION = "fedcodec.v1"
_STATE = "fedcodec.state"
_TICKET_BYTES = 8
_TRUSTED = fc.Limits(max_bytes=sys.maxsize)  # the server's app runs here anyway

Arrays = dict[str, npt.NDArray[Any]]


def codec_mod(
    message: Message, context: Context, call_next: Callable[[Message, Context], Message]
) -> Message:
    """Decode what a `CodecGrid` sent, and encode the reply as it asks: ``ClientApp(mods=[codec_mod])``.

    It belongs first among the mods, so that all others see plain arrays. The app gets and returns weights; what travels
    back is their difference to those that came, in the dtypes of those. Where the server asks for error feedback, what
    a payload missed is kept in `Context.state`, or in a file of the folder ``state-dir`` of the node's config
    (``flower-supernode --node-config "state-dir='/var/lib/fedcodec/node-1'"``): the file outlives the SuperNode, a
    Context does not. Nodes with equal configs need folders of their own.

    From a server without a `CodecGrid`, or with one of another version, messages pass as they are, and so do replies
    that hold other tensors than came.

    Parameters
    ----------
    message : flwr.app.Message
    context : flwr.app.Context
    call_next : callable

    Returns
    -------
    flwr.app.Message

    Raises
    ------
    DecodeError
        If the model is not the one that the server sent.
    NonFiniteError
        If a weight is not finite; the residual is as before.
    ValueError
        If another node keeps its state in the same folder, or the file there is none of ours.

    Examples
    --------
    >>> from flwr.clientapp import ClientApp
    >>> app = ClientApp(mods=[codec_mod])
    """
    config = message.content.get(_KEY)
    found = _only(message.content, ArrayRecord)
    if not isinstance(config, ConfigRecord) or found is None:
        return call_next(message, context)
    key, record = found
    payload = _payload_of(record)
    base = _arrays(record) if payload is None else fc.decode(payload, limits=_TRUSTED)
    name = fc.digest(base)
    if name != config["base"]:
        raise fc.DecodeError(
            f"the model that arrived is {name.hex()}, the server sent {config['base'].hex()}"
        )
    client = _client(config, context)
    content = {item: value for item, value in message.content.items() if item != _KEY}
    content[key] = record if payload is None else _record(base)
    message.content = RecordDict(content)
    reply = call_next(message, context)
    if reply.has_error() or "uplink" not in config:
        return reply
    found = _only(reply.content, ArrayRecord)
    if found is None:
        return reply
    key, record = found
    try:
        weights = _cast(_arrays(record), fc.Spec.of(base))
    except fc.SpecMismatch as error:
        _LOG.warning("the reply travels uncompressed: %s", error)
        return reply
    data = _encode(config, _difference(weights, base), client)
    packed = _packed(config["ticket"].hex(), data)
    reply.content = RecordDict({**dict(reply.content.items()), key: packed})
    return reply


def _client(config: Mapping[str, Any], context: Context) -> ClientFeedback | None:
    """Return what a client's payloads missed, if the server wants that: before an app trains for nothing."""
    if not config.get("error-feedback", False):
        return None
    home: StateHome = _ContextHome(context.state)
    folder = context.node_config.get("state-dir")
    if folder is not None:
        if not isinstance(folder, str) or not folder:
            raise ValueError(f"state-dir in the node's config is {folder!r}, it must be a folder")
        # Nodes that share a folder have other configs; a node that is started anew has the same.
        config_digest = hashlib.sha256(json.dumps(sorted(context.node_config.items())).encode())
        name = f"run-{context.run_id}-{config_digest.hexdigest()[:16]}.npz"
        home = FileHome(Path(folder).expanduser() / name)
    node = str(context.node_id)
    client = ClientFeedback(home, owner=node)
    if config["known"] and client.last_owner is None:
        _LOG.warning(
            "node %s holds no residual of run %d any more, which starts at zero: a folder state-dir in the node's "
            "config keeps it",
            node,
            context.run_id,
        )
    elif client.last_owner is None and "accepted" in config:
        _LOG.info(
            "node %s joins run %d with a residual of zero; if it is one that was started anew, a folder state-dir in "
            "its config would have kept what it had",
            node,
            context.run_id,
        )
    elif config["known"] and client.last_owner != node:
        raise ValueError(
            f"state-dir {folder} is that of node {client.last_owner} as well as of node {node}: each needs its own"
        )
    return client


def _encode(config: Mapping[str, Any], delta: Arrays, client: ClientFeedback | None) -> bytes:
    base, ticket = config["base"], config["ticket"]
    seed = int.from_bytes(ticket, "little")
    if client is None:
        codec = fc.parse(config["uplink"])
        return codec.encode(delta, framing="reference", base=base, seed=seed)
    accepted = config.get("accepted", [])
    return client.encode(
        config["uplink"], delta, ticket=ticket, accepted=accepted, base=base, seed=seed
    )


class _ContextHome:
    """A state in the records of a Context, which Flower keeps for each run and node."""

    def __init__(self, records: RecordDict) -> None:
        self._records = records

    def load(self) -> dict[str, Any] | None:
        plain = self._records.get(_STATE)
        if plain is None:
            return None
        try:
            state: dict[str, Any] = dict(plain)
            for name in state.pop("none"):
                state[name] = None
            for name in state.pop("arrays"):
                state[name] = _arrays(self._records[f"{_STATE}.{name}"])
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{_STATE} in Context.state is no state of a client; remove it to start anew: {error!r}"
            ) from error
        return state

    def save(self, state: dict[str, Any]) -> None:
        arrays = {name: value for name, value in state.items() if isinstance(value, dict)}
        none = [name for name, value in state.items() if value is None]
        plain = {name: value for name, value in state.items() if name not in {*arrays, *none}}
        for name, value in arrays.items():
            self._records[f"{_STATE}.{name}"] = _record(value)
        self._records[_STATE] = ConfigRecord({**plain, "none": none, "arrays": list(arrays)})


@dataclass(frozen=True)
class _Model:
    """A model as it travels, against which replies are differences."""

    record: ArrayRecord
    spec: fc.Spec
    name: bytes

    @property
    def nbytes(self) -> int:
        return _nbytes(self.record)

    def arrays(self) -> Arrays:
        """Return what clients decode."""
        payload = _payload_of(self.record)
        if payload is None:
            return _arrays(self.record)
        decoded: Arrays = fc.decode(payload, like=self.spec)
        return decoded


class _Sent(NamedTuple):
    """What a ticket stands for."""

    node: int
    model: _Model
    error_feedback: bool


# The last ticket of each node that was taken, by the grid inside: a run may have one CodecGrid after another.
_accepted: WeakKeyDictionary[Grid, dict[int, bytes]] = WeakKeyDictionary()


class CodecGrid(Grid):  # type: ignore[misc]
    """A Grid through which models and replies travel compressed: ``strategy.start(grid=CodecGrid(grid, ...), ...)``.

    Strategies see plain arrays, so any of them works unchanged. Clients need `codec_mod`; those without it take part
    uncompressed as long as there is no `downlink` codec. A payload that is damaged, of another model or of another node
    becomes an error reply that names the node, and the round goes on with the others.

    Only messages to train and to evaluate are encoded. With error feedback, of a node's messages to train only the last
    one's reply counts: its payload has what those before held. A grid is for one thread.

    Models are sent in the dtypes of the first one of their names and shapes: strategies make float64 of float32 and of
    integers now and then.

    The record of metrics of every reply gets ``fedcodec.uplink-bytes`` and ``fedcodec.downlink-bytes``: the sizes of
    its arrays, and of those that the node was sent, as they travelled.

    Parameters
    ----------
    grid : flwr.serverapp.Grid
        That of the ServerApp.
    uplink : Codec or str, optional
        For what training changed, as in "topk(0.01) | int8"; None leaves replies as they are.
    downlink : Codec or str, optional
        For whole models, as in "int8"; by default they travel as they are.
    error_feedback : bool
        Clients add what a payload missed to the next one.
    poll_seconds : float
        Between two looks for replies.
    models : int
        How many of the models that were sent last replies may be against; more than 2 are for strategies that wait
        for no one.

    Raises
    ------
    ValueError, TypeError
        If a codec is none, the text of none, or one that would set weights to zero on the way down.

    Examples
    --------
    >>> from flwr.serverapp import ServerApp
    >>> app = ServerApp()
    >>> @app.main()
    ... def main(grid, context):
    ...     grid = CodecGrid(grid, uplink="topk(0.01) | int8")
    ...     FedAvg().start(grid=grid, initial_arrays=ArrayRecord([np.zeros(3)]), num_rounds=3)
    """

    def __init__(
        self,
        grid: Grid,
        *,
        uplink: fc.Codec | str | None = None,
        downlink: fc.Codec | str | None = None,
        error_feedback: bool = True,
        poll_seconds: float = 1.0,
        models: int = 2,
    ) -> None:
        if isinstance(grid, CodecGrid):
            raise TypeError("the grid is a CodecGrid already")
        self._grid = grid
        self._uplink = None if uplink is None else _by_text(fc.ErrorFeedback(uplink).codec)
        self._downlink = None if downlink is None else _by_text(model_codec(downlink))
        if models < 1:
            raise ValueError(f"models is {models}, it must be at least 1")
        if poll_seconds < 0:
            raise ValueError(f"poll_seconds is {poll_seconds}, it must not be negative")
        self.error_feedback = error_feedback
        self.poll_seconds = poll_seconds
        self._most_models = models
        self._models: OrderedDict[bytes, _Model] = OrderedDict()  # by the digest before encoding
        self._schemas: dict[tuple[Any, ...], fc.Spec] = {}  # by names and shapes
        self._tickets: dict[str, _Sent] = {}  # that wait for a reply
        self._open: dict[int, str] = {}  # the last of each node with error feedback
        self._accepted = _accepted.setdefault(grid, {})
        self._downlink_bytes: dict[int, int] = {}  # of the last message to each node

    def set_run(self, run: Any) -> None:
        """Set the run of the grid inside."""
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        """The run of the grid inside."""
        return self._grid.run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Create a message, as the grid inside does."""
        return self._grid.create_message(*args, **kwargs)

    @property
    def _newest(self) -> _Model:
        return next(reversed(self._models.values()))

    def get_node_ids(self) -> Any:
        """Return the ids of all connected nodes."""
        return self._grid.get_node_ids()

    def get_nodes(self) -> Any:
        """Return all connected nodes."""
        return self._grid.get_nodes()

    def ticket(self, message: Message) -> bytes:
        """Return the 8 bytes that name a message to train, of which stochastic stages draw: others for each."""
        return secrets.token_bytes(_TICKET_BYTES)

    def downlink_seed(self, digest: bytes) -> int:
        """Return what stochastic stages draw of on the way down, by default another for each model."""
        return int.from_bytes(digest, "little")

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send messages with their models encoded; messages and records of the caller stay as they are.

        Returns
        -------
        list of str
            The ids by which replies are pulled.

        Raises
        ------
        NonFiniteError
            If a weight is not finite and the downlink's codec needs that.
        TypeError
            If a tensor has a dtype that fedcodec does not know.
        """
        known: dict[int, tuple[ArrayRecord, _Model]] = {}  # messages share records
        sent = [self._outgoing(message, known) for message in messages]
        while len(self._models) > max(self._most_models, len(known)):
            old = self._models.popitem(last=False)[1]
            self._tickets = {
                ticket: sent for ticket, sent in self._tickets.items() if sent.model is not old
            }
        return list(self._grid.push_messages(sent))

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies that are there, decoded."""
        return [self._decoded(reply) for reply in self._grid.pull_messages(message_ids)]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send messages and return their replies, decoded, in the order of arrival.

        Parameters
        ----------
        messages : iterable of flwr.app.Message
        timeout : float, optional
            Seconds until it returns without the replies that lack.

        Returns
        -------
        iterable of flwr.app.Message
        """
        if isinstance(messages, _Streamed):
            return self.stream(messages, timeout=timeout)
        replies = self._replies(self.push_messages(messages), timeout, one_by_one=False)
        return [self._decoded(reply) for reply in replies]

    def stream(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Send messages and return their replies as they arrive, payloads as they are, for a `ReplySum`."""
        names = self.push_messages(messages)
        gc.collect(1)
        return self._replies(names, timeout, one_by_one=True)

    def _outgoing(self, message: Message, known: dict[int, tuple[ArrayRecord, _Model]]) -> Message:
        found = _only(message.content, ArrayRecord)
        kind = message.metadata.message_type.split(".")[0]
        if found is None or kind not in (MessageType.TRAIN, MessageType.EVALUATE):
            return message
        key, record = found
        if id(record) not in known:
            known[id(record)] = record, self._model(record)
        model = known[id(record)][1]
        node = message.metadata.dst_node_id
        config: dict[str, Any] = {}
        if kind == MessageType.TRAIN and self._uplink is not None:
            config = {"uplink": str(self._uplink), "ticket": self._issued(message, model)}
            config["error-feedback"] = self.error_feedback
            config["known"] = node in self._accepted
            # A node that was started anew may have another id, but what it sent last is among all that came.
            taken = self._accepted
            accepted = [taken[node]] if node in taken else list(taken.values())
            if accepted:  # Flower cannot count the bytes of empty lists
                config["accepted"] = accepted
        content = {**dict(message.content.items()), key: model.record}
        if config or self._downlink is not None:
            content[_KEY] = ConfigRecord({"base": model.name, **config})
        self._downlink_bytes[node] = model.nbytes
        sent = copy.copy(message)
        sent.content = RecordDict(content)
        return sent

    def _issued(self, message: Message, model: _Model) -> bytes:
        """Return a new ticket; with error feedback it ends the one before, of which the new payload has all."""
        node, ticket = message.metadata.dst_node_id, self.ticket(message)
        if self.error_feedback:
            self._tickets.pop(self._open.get(node, ""), None)
            self._open[node] = ticket.hex()
        self._tickets[ticket.hex()] = _Sent(node, model, self.error_feedback)
        return ticket

    def _model(self, record: ArrayRecord) -> _Model:
        arrays = _arrays(record)
        spec = fc.Spec.of(arrays)
        schema = self._schemas.setdefault(tuple(sorted(_shapes(spec).items())), spec)
        if spec != schema:
            arrays = _cast(arrays, schema)
        digest = fc.digest(arrays)
        if digest not in self._models:
            name = digest
            if self._downlink is not None:
                payload = self._downlink.encode(arrays, seed=self.downlink_seed(digest))
                travelling = _packed("model", payload)
                name = fc.digest(fc.decode(payload, like=schema))
            elif spec == schema:
                travelling = ArrayRecord(dict(record.items()))  # others may change theirs
            else:
                travelling = _record(arrays)
            self._models[digest] = _Model(travelling, schema, name)
        self._models.move_to_end(digest)
        return self._models[digest]

    def _shared(self, model: _Model) -> fc.Shared:
        """Return what makes payloads against this model valid, and no others."""
        shared = fc.Shared()
        shared.add_base({}, key=model.name)  # nobody looks for more than its name
        if self._uplink is not None:
            shared.add_rules(self._uplink, model.spec)
        return shared

    def _replies(
        self, names: Sequence[str | None], timeout: float | None, *, one_by_one: bool
    ) -> Iterator[Message]:
        end = None if timeout is None else time.monotonic() + timeout
        waiting = {name for name in names if name is not None}
        while waiting:
            for asked in [[name] for name in waiting] if one_by_one else [list(waiting)]:
                arrived = list(self._grid.pull_messages(asked))
                while arrived:
                    reply = arrived.pop(0)
                    name = reply.metadata.reply_to_message_id
                    if name in waiting:
                        waiting.remove(name)
                        yield reply
                    else:
                        _LOG.warning(
                            "node %d: a reply came twice and counts once",
                            reply.metadata.src_node_id,
                        )
                    del reply
                    if one_by_one:
                        gc.collect(1)  # Flower leaves cycles, and payloads in them
            if end is not None and time.monotonic() >= end:
                return
            if waiting:
                time.sleep(self.poll_seconds)

    def _decoded(self, reply: Message) -> Message:
        """Return a reply with the weights that its payload stands for, or an error reply in its place."""
        if reply.has_error():
            return reply
        try:
            packed = _packed_in(reply)
            if packed is None:
                return self._counted(reply)
            sent = self._sent(reply, packed)
            delta = fc.decode(packed.payload, like=sent.model.spec, shared=self._shared(sent.model))
            weights = _sum(sent.model.arrays(), delta)
        except fc.DecodeError as error:
            return self._refused(reply, error)
        self._accept(packed)
        counted = self._counted(reply)
        counted.content[packed.key] = _record(weights)
        return counted

    def _sent(self, reply: Message, packed: _Packed) -> _Sent:
        """Return what the ticket of a reply stands for."""
        sent = self._tickets.get(packed.ticket)
        if sent is None:
            raise fc.DecodeError(
                "its message was answered before, another was sent to the node since, or its model is no longer held "
                f"(models={self._most_models})"
            )
        if sent.node != reply.metadata.src_node_id:
            raise fc.DecodeError(f"it answers a message to node {sent.node}")
        if fc.inspect(packed.payload).base != sent.model.name:
            raise fc.DecodeError("it is against another model than the one that was sent")
        return sent

    def _accept(self, packed: _Packed) -> None:
        sent = self._tickets.pop(packed.ticket)
        if sent.error_feedback:
            self._accepted[sent.node] = bytes.fromhex(packed.ticket)

    def _refused(self, reply: Message, error: Exception) -> Message:
        node = reply.metadata.src_node_id
        _LOG.warning("node %d: its reply was refused: %s", node, error)
        reason = f"fedcodec refused the reply of node {node}: {error}"
        return Message(error=Error(code=0, reason=reason), metadata=reply.metadata)

    def _counted(self, reply: Message) -> Message:
        """Return a reply of which the caller may change the content, with bytes among its metrics."""
        content = dict(reply.content.items())
        found = _only(reply.content, MetricRecord)
        if found is not None:
            sizes = [
                _nbytes(record) for record in content.values() if isinstance(record, ArrayRecord)
            ]
            content[found[0]] = MetricRecord(
                {
                    **dict(found[1].items()),
                    "fedcodec.uplink-bytes": sum(sizes),
                    "fedcodec.downlink-bytes": self._downlink_bytes.get(
                        reply.metadata.src_node_id, 0
                    ),
                }
            )
        counted = copy.copy(reply)
        counted.content = RecordDict(content)
        return counted


class _Streamed(list[Message]):
    """Messages whose replies are wanted one by one, as they are."""


class StreamingFedAvg(FedAvg):  # type: ignore[misc]
    """`FedAvg` that adds payloads as they arrive, in the memory of three models however many clients reply.

    It needs a `CodecGrid`, and averages what training changed in float32: the result differs from FedAvg's by rounding.
    Integers are rounded to whole numbers. A reply that cannot be added becomes an error and the round goes on.

    Other strategies made of FedAvg stream when it stands behind them:
    ``class StreamingFedAdam(FedAdam, StreamingFedAvg): pass``. Those that look at all replies side by side (FedMedian,
    Krum) cannot.

    Examples
    --------
    >>> strategy = StreamingFedAvg(fraction_evaluate=0.5)
    """

    _grid: CodecGrid

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Configure the next round; see `FedAvg`.

        Raises
        ------
        TypeError
            If the grid is no `CodecGrid`.
        """
        if not isinstance(grid, CodecGrid):
            raise TypeError(f"StreamingFedAvg needs a CodecGrid, not a {type(grid).__name__}")
        self._grid = grid
        return _Streamed(super().configure_train(server_round, arrays, config, grid))

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Add up the replies; see `FedAvg`."""
        total = ReplySum(self._grid, self.weighted_by_key)
        valid, _ = self._check_and_log_replies(
            map(total.add, replies), is_train=True, validate=False
        )
        if not valid:
            return None, None
        contents = _alike([reply.content for reply in valid])
        metrics = self.train_metrics_aggr_fn(contents, self.weighted_by_key)
        return total.mean(), metrics


class ReplySum:
    """The weighted sum of what training changed, straight from payloads, in float32.

    Parameters
    ----------
    grid : CodecGrid
        Which `stream` the replies came from.
    weighted_by : str
        The key of the weight in a reply's metrics.
    """

    def __init__(self, grid: CodecGrid, weighted_by: str = "num-examples") -> None:
        self._grid = grid
        self._weighted_by = weighted_by
        self._model: _Model | None = None
        self._sum = fc.Aggregator()

    def add(self, reply: Message) -> Message:
        """Add a reply and return what else is in it; an error reply in its place if it cannot be added."""
        if reply.has_error():
            return reply
        try:
            weight = self._weight(reply)
            packed = _packed_in(reply)
            if packed is None:
                model = self._grid._newest
                payload = self._raw(reply, model)
            else:
                model, payload = self._grid._sent(reply, packed).model, packed.payload
            if self._model is None:
                self._model = model
                self._sum = fc.Aggregator(like=model.spec, shared=self._grid._shared(model))
            self._sum.add(payload, weight=weight)
        except (TypeError, ValueError) as error:  # a weight may be of any kind
            return self._grid._refused(reply, error)
        if packed is not None:
            self._grid._accept(packed)
        rest = self._grid._counted(reply)
        for key, record in list(rest.content.items()):
            if isinstance(record, ArrayRecord):
                del rest.content[key]
        return rest

    def change(self) -> Arrays:
        """Return the mean of what was added, and forget it.

        Raises
        ------
        ValueError
            If nothing of positive weight was added.
        """
        total, self._sum = self._sum, fc.Aggregator()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what the payloads took
        mean: Arrays = total.mean()
        return mean

    def mean(self) -> ArrayRecord | None:
        """Return the model plus that mean; None if it is not finite or nothing of positive weight was added."""
        if self._model is None or self._sum.weight == 0:
            return None
        change = self.change()
        base = self._model.arrays()
        record = ArrayRecord()
        for name in list(change):
            with np.errstate(over="ignore"):
                weights = _plus(base.pop(name), change.pop(name))
            if not np.isfinite(weights).all():
                _LOG.warning("%r would become infinite: the model stays as it was", name)
                return None
            record[name] = Array(weights)
        return record

    def _weight(self, reply: Message) -> Any:
        found = _only(reply.content, MetricRecord)
        if found is None or self._weighted_by not in found[1]:
            raise fc.DecodeError(f"it has no {self._weighted_by!r} in one record of metrics")
        return found[1][self._weighted_by]

    def _raw(self, reply: Message, model: _Model) -> bytes:
        found = _only(reply.content, ArrayRecord)
        if found is None:
            raise fc.DecodeError("it has not one ArrayRecord")
        try:
            arrays = _arrays(found[1])
        except Exception as error:  # of NumPy, about a stranger's bytes
            raise fc.DecodeError(f"an array of it cannot be read: {error}") from error
        delta = _difference(_cast(arrays, model.spec), model.arrays())
        return fc.Raw().encode(delta, framing="reference", base=model.name)


def _alike(contents: list[RecordDict]) -> list[RecordDict]:
    """Return those whose metrics have the names and lengths that most have: a mean needs that."""

    def form(content: RecordDict) -> tuple[Any, ...]:
        found = _only(content, MetricRecord)
        values = {} if found is None else dict(found[1].items())
        sizes = {key: len(v) if isinstance(v, list) else None for key, v in values.items()}
        return tuple(sorted(sizes.items(), key=str))

    forms = [form(content) for content in contents]
    most = Counter(forms).most_common(1)[0][0]
    alike = [content for content, found in zip(contents, forms, strict=True) if found == most]
    if len(alike) < len(contents):
        _LOG.warning(
            "%d replies have other metrics and are not in their mean", len(contents) - len(alike)
        )
    return alike


class _Packed(NamedTuple):
    """A payload in a reply."""

    key: str
    ticket: str
    payload: bytes


def _packed_in(reply: Message) -> _Packed | None:
    records = [
        (key, record) for key, record in reply.content.items() if isinstance(record, ArrayRecord)
    ]
    named = [(key, *item) for key, record in records for item in record.items()]
    if all(array.stype != _SERIALIZATION for _, _, array in named):
        return None
    if len(records) != 1 or len(named) != 1:
        raise fc.DecodeError("a payload must be the one Array of the one ArrayRecord")
    key, ticket, array = named[0]
    return _Packed(key, ticket, array.data)


def _payload_of(record: ArrayRecord) -> bytes | None:
    arrays = list(record.values())
    packed = len(arrays) == 1 and arrays[0].stype == _SERIALIZATION
    return bytes(arrays[0].data) if packed else None


def _packed(name: str, payload: bytes) -> ArrayRecord:
    return ArrayRecord({name: Array("uint8", (len(payload),), _SERIALIZATION, payload)})


_Record = TypeVar("_Record")


def _only(content: RecordDict, kind: type[_Record]) -> tuple[str, _Record] | None:
    """Return the one record of a kind with its key; None if there is none, or are several."""
    # RecordDict's own views would keep all records alive until the next garbage collection.
    found = [(key, record) for key, record in content.items() if isinstance(record, kind)]
    return found[0] if len(found) == 1 else None


def _arrays(record: ArrayRecord) -> Arrays:
    return {name: _view(array) for name, array in record.items()}


def _view(array: Array) -> npt.NDArray[Any]:
    """Return what `Array.numpy` does, but in the memory of the record, which stays as it is."""
    file = BytesIO(array.data)
    version = np.lib.format.read_magic(file)
    if array.stype != "numpy.ndarray" or version != (1, 0):
        copied: npt.NDArray[Any] = array.numpy()
        return copied
    shape, transposed, dtype = np.lib.format.read_array_header_1_0(file)
    flat = np.frombuffer(array.data, dtype, offset=file.tell())
    return flat.reshape(shape[::-1]).T if transposed else flat.reshape(shape)


def _record(arrays: Mapping[str, npt.NDArray[Any]]) -> ArrayRecord:
    return ArrayRecord({name: Array(np.asarray(array)) for name, array in arrays.items()})


def _nbytes(record: ArrayRecord) -> int:
    return sum(len(array.data) for array in record.values())


def _shapes(spec: fc.Spec) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tensor.shape for tensor in spec.tensors}


def _cast(arrays: Arrays, spec: fc.Spec) -> Arrays:
    """Return arrays in the order and dtypes of a spec.

    Raises
    ------
    SpecMismatch
        If they have other names or shapes.
    NonFiniteError
        If a value is not finite where the spec has integers.
    """
    if {name: array.shape for name, array in arrays.items()} != _shapes(spec):
        raise fc.SpecMismatch("the tensors have other names or shapes than those of the model")
    return {tensor.name: _as(arrays[tensor.name], tensor) for tensor in spec.tensors}


def _as(array: npt.NDArray[Any], tensor: fc.TensorSpec) -> npt.NDArray[Any]:
    wanted = np.dtype(tensor.dtype)
    if array.dtype.kind not in "biuf":
        raise fc.SpecMismatch(f"{tensor.name!r} is {array.dtype}, not {wanted}")
    if array.dtype == wanted or wanted.kind == "f":
        return array.astype(wanted, copy=False)
    if not np.isfinite(array).all():
        raise fc.NonFiniteError(f"{tensor.name!r} is not finite, it is {wanted}", tensor.name)
    return np.asarray(np.rint(array)).astype(wanted)


def _difference(new: Arrays, old: Arrays) -> Arrays:
    with np.errstate(over="ignore", invalid="ignore"):  # encode says which tensor is infinite
        return {name: _minus(new[name], old[name]) for name in old}


def _minus(new: npt.NDArray[Any], old: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.asarray(new - old) if new.dtype.kind == "f" else new


def _plus(old: npt.NDArray[Any], change: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.add(change, old, out=change) if change.dtype.kind == "f" else change


def _sum(base: Arrays, delta: Arrays) -> Arrays:
    with np.errstate(over="ignore"):
        weights = {name: _plus(base[name], delta[name]) for name in base}
    for name, array in weights.items():
        if not np.isfinite(array).all():
            raise fc.DecodeError(f"it would make {name!r} infinite")
    return weights


def _by_text(codec: fc.Codec) -> fc.Codec:
    for stage in (stage for pipeline in codec.pipelines() for stage in pipeline.stages):
        if isinstance(stage, fc.Mask | fc.AutoEncoder):
            raise ValueError(f"clients cannot make {stage} of its text: it names what they lack")
    return codec
