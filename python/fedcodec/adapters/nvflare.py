"""fedcodec inside NVFLARE: filters for the models that go down to clients and the updates that come back.

All four in a recipe's job; those for models may be left out, and so may both for updates::

    tasks = ["train"]
    recipe.add_server_output_filter(ModelEncoder("int8"), tasks=tasks)
    recipe.add_client_input_filter(ModelDecoder(), tasks=tasks)
    recipe.add_client_output_filter(UpdateEncoder("topk(0.01) | int8"), tasks=tasks)
    recipe.add_server_input_filter(UpdateDecoder(), tasks=tasks)

A payload is the one array of its DXO, whose meta marks it. It names its codec, tensors, shapes and dtypes, so decoders
take no arguments, and what is not marked passes as it is. Encoders belong last among the filters of their place,
decoders first. They are for workflows whose tasks come from the server.

NVFLARE builds only classes that a site allows. Its administrator adds ``"fedcodec.adapters.nvflare"`` to the list
``class_allow_list`` in ``local/resources.json``, beside NVFLARE's own: a list there stands in the place of the default
one. Jobs that bring code of their own (BYOC), as those do that recipes write, need the right to do so instead.
"""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path
from typing import Any

import numpy as np
from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable, get_leaf_dxos
from nvflare.apis.dxo_filter import DXOFilter
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import ReservedHeaderKey, Shareable

import fedcodec as fc

from .client_state import ClientFeedback, FileHome
from .models import model_codec

_MARK = "fedcodec"  # in a DXO's meta: the framework of its tensors
_PAYLOAD = "payload"
_TAKEN = "fedcodec.taken"  # in a task's headers: the client's last results that the server decoded
_MOST_TAKEN = 16  # other tasks may come between two of a kind
_FRAMEWORKS = ("numpy", "torch")


class ModelEncoder(DXOFilter):  # type: ignore[misc]
    """A server's output filter that encodes models, each once for all clients of a task.

    Every client needs a `ModelDecoder`. Only DXOs of kind WEIGHTS are encoded; those of the last task are held.

    Parameters
    ----------
    codec : Codec or str
        As in "int8".

    Raises
    ------
    ValueError, TypeError
        If the codec is none, the text of none, or one that would set weights to zero.

    Examples
    --------
    >>> ModelEncoder("int8").codec
    'int8'
    >>> ModelEncoder("topk(0.01)")
    Traceback (most recent call last):
        ...
    ValueError: the codec is topk(0.01): models travel whole, it would set weights to zero
    """

    def __init__(self, codec: fc.Codec | str) -> None:
        super().__init__([DataKind.WEIGHTS], None)
        self._parsed = model_codec(codec)
        self.codec = str(self._parsed)  # jobs are written with what attributes say
        self._lock = threading.Lock()
        self._task: str | None = None
        self._encoded: dict[int, tuple[Any, bytes]] = {}  # with the data, or its id could be reused

    def process_dxo(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> DXO:
        """Return a DXO with the payload of a model.

        Raises
        ------
        NonFiniteError
            If a weight is not finite and the codec needs that.
        TypeError
            If a tensor has a dtype that fedcodec does not know.
        """
        task = shareable.get_header(ReservedHeaderKey.MSG_ROOT_ID)
        with self._lock:
            if task is None or task != self._task:
                self._task, self._encoded = task, {}
            if id(dxo.data) not in self._encoded:
                payload = self._parsed.encode(dxo.data, seed=_seed(str(task)))
                self._encoded[id(dxo.data)] = dxo.data, payload
            payload = self._encoded[id(dxo.data)][1]
        return _packed(dxo, payload)


class UpdateEncoder(DXOFilter):  # type: ignore[misc]
    """A client's output filter that encodes updates for a server with an `UpdateDecoder`; for others they stay as are.

    With error feedback a WEIGHT_DIFF is sent together with what payloads before it missed, or with all of one that the
    server did not decode. That is kept in the run directory of the job, in a file for each site, task and DXO. WEIGHTS
    are encoded without error feedback, by codecs that leave none out.

    Parameters
    ----------
    codec : Codec or str
        As in "topk(0.01) | int8".
    error_feedback : bool
        Add what a payload missed to the next one.

    Raises
    ------
    ValueError, TypeError
        If the codec is none, or its text is that of none.

    Examples
    --------
    >>> UpdateEncoder("topk(0.01) | int8").error_feedback
    True
    """

    def __init__(self, codec: fc.Codec | str, error_feedback: bool = True) -> None:
        super().__init__([DataKind.WEIGHTS, DataKind.WEIGHT_DIFF], None)
        self._parsed = fc.ErrorFeedback(codec).codec  # which checks it
        self.codec = str(self._parsed)  # jobs are written with what attributes say
        self.error_feedback = error_feedback

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Note what the server says with a task: its data are gone when there is a result."""
        if event_type == EventType.BEFORE_TASK_DATA_FILTER:
            taken = fl_ctx.get_prop(FLContextKey.TASK_DATA).get_header(_TAKEN)
            fl_ctx.set_prop(_TAKEN, taken, private=True, sticky=False)

    def process_dxo(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> DXO | None:
        """Return a DXO with the payload of an update; None where the server decodes none.

        Raises
        ------
        NonFiniteError
            If a value is not finite and the codec needs that; the residual is as before.
        TypeError
            If a tensor has a dtype that fedcodec does not know.
        ValueError
            If the codec would set some of the WEIGHTS to zero.
        """
        taken = fl_ctx.get_prop(_TAKEN)
        if taken is None:
            self.log_warning(fl_ctx, "the server has no UpdateDecoder, the update travels as it is")
            return None
        ticket = fl_ctx.get_prop(FLContextKey.TASK_ID)
        if dxo.data_kind == DataKind.WEIGHT_DIFF and self.error_feedback:
            payload = ClientFeedback(_home(dxo, shareable, fl_ctx)).encode(
                self._parsed,
                dxo.data,
                ticket=ticket.encode(),
                accepted=[name.encode() for name in taken],
                framing="inline",
                seed=_seed(ticket),
            )
        else:
            if dxo.data_kind == DataKind.WEIGHTS:
                model_codec(self._parsed)  # which refuses those that leave some out
            payload = self._parsed.encode(dxo.data, seed=_seed(ticket))
        packed = _packed(dxo, payload)
        self.log_info(fl_ctx, f"the update takes {len(payload)} bytes")
        return packed


class ModelDecoder(DXOFilter):  # type: ignore[misc]
    """A client's input filter that decodes models, in the dtypes that they were encoded from.

    Parameters
    ----------
    max_bytes : int
        Of what a payload may stand for; 2 GiB by default.

    Examples
    --------
    >>> weights = {"weight": np.array([1, -127], np.float32)}
    >>> encoded = ModelEncoder("int8").process_dxo(DXO(DataKind.WEIGHTS, weights), Shareable(), FLContext())
    >>> encoded.data["payload"].dtype
    dtype('uint8')
    >>> ModelDecoder().process_dxo(encoded, Shareable(), FLContext()).data
    {'weight': array([   1., -127.], dtype=float32)}
    """

    def __init__(self, max_bytes: int = 2 << 30) -> None:
        super().__init__([DataKind.WEIGHTS, DataKind.WEIGHT_DIFF], None)
        self.max_bytes = max_bytes
        self._limits = fc.Limits(max_bytes=max_bytes)

    def process_dxo(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> DXO | None:
        """Return a DXO with what a payload stands for; None if it has none.

        Raises
        ------
        DecodeError
            If the DXO is marked, but holds no valid payload of tensors by name, or too large a one.
        BackendError
            If it holds torch's tensors and torch cannot be imported.
        """
        mark = dxo.get_meta_prop(_MARK)
        if mark is None:
            return None
        payload = dxo.data.get(_PAYLOAD)
        if not isinstance(mark, str) or mark not in _FRAMEWORKS:
            raise fc.DecodeError("the payload is marked as of an unknown framework")
        if len(dxo.data) != 1 or not isinstance(payload, np.ndarray) or payload.dtype != np.uint8:
            raise fc.DecodeError("the payload is not the one array of its DXO")
        tensors = fc.decode(payload, framework=mark, limits=self._limits)
        if not isinstance(tensors, dict):
            raise fc.DecodeError("the payload has no tensors by name")
        return _like(dxo, tensors)


class UpdateDecoder(ModelDecoder):
    """A server's input filter that decodes updates, and tells each client which one it decoded last.

    A result with a payload that is damaged counts as none: it is logged with the client's name and nothing of it is
    handed on, which NVFLARE's workflows pass over. (An error would end the job: most of them wait for all clients.)

    What was decoded counts as received, also where the workflow then rejects it or has stopped waiting. Which updates
    were decoded is kept by the process of the job: with a server that is started anew in the middle of one, an update
    of each client may count twice.

    Parameters
    ----------
    max_bytes : int
        Of what a payload may stand for; 2 GiB by default.

    Examples
    --------
    >>> decoder = UpdateDecoder()
    """

    def __init__(self, max_bytes: int = 2 << 30) -> None:
        super().__init__(max_bytes)
        self._taken: dict[str, tuple[str, ...]] = {}

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Tell a client with its next task what was decoded."""
        if event_type == EventType.BEFORE_TASK_DATA_FILTER:
            taken = self._taken.get(_peer(fl_ctx), ())
            fl_ctx.get_prop(FLContextKey.TASK_DATA).set_header(_TAKEN, list(taken))

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """Return a result with its update decoded; an empty one in place of one that is damaged."""
        client = _peer(fl_ctx)
        try:
            result = super().process(shareable, fl_ctx)
        except fc.FedcodecError as error:
            self.log_error(fl_ctx, f"the update of {client} is dropped: {error}")
            return Shareable()
        if fl_ctx.get_prop(_TAKEN):
            taken = *self._taken.get(client, ()), fl_ctx.get_prop(FLContextKey.TASK_ID)
            self._taken[client] = taken[-_MOST_TAKEN:]
        return result

    def process_dxo(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> DXO | None:
        """Return a DXO with what a payload stands for; None if it has none.

        Raises
        ------
        DecodeError, BackendError
            As for `ModelDecoder`.
        """
        decoded = super().process_dxo(dxo, shareable, fl_ctx)
        if decoded is not None:
            fl_ctx.set_prop(_TAKEN, True, private=True, sticky=False)
        return decoded


def _peer(fl_ctx: FLContext) -> str:
    return str(fl_ctx.get_peer_context().get_identity_name())


def _home(dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> FileHome:
    # A process of the simulator has another client in the next round: nothing may stay in the filter.
    folder = Path(fl_ctx.get_workspace().get_run_dir(fl_ctx.get_job_id()), "fedcodec")
    leaves, _ = get_leaf_dxos(from_shareable(shareable))
    place = next((name for name, leaf in leaves.items() if leaf is dxo), "")
    task = fl_ctx.get_prop(FLContextKey.TASK_NAME)
    return FileHome(folder / f"{fl_ctx.get_identity_name()}-{task}{place}.npz")


def _packed(dxo: DXO, payload: bytes) -> DXO:
    packed = _like(dxo, {_PAYLOAD: np.frombuffer(payload, np.uint8)})
    modules = {type(tensor).__module__ for tensor in dxo.data.values()}
    packed.set_meta_prop(_MARK, "torch" if any(m.startswith("torch") for m in modules) else "numpy")
    return packed


def _like(dxo: DXO, data: dict[str, Any]) -> DXO:
    # NVFLARE adds the history of a DXO to the one that takes its place.
    left = (_MARK, MetaKey.FILTER_HISTORY)
    meta = {key: value for key, value in dxo.meta.items() if key not in left}
    return DXO(dxo.data_kind, data, meta)


def _seed(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
