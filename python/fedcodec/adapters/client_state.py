"""Error feedback for clients that may be another process in every round, whose payloads may get lost or come twice."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Container
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

import fedcodec as fc

_LOG = logging.getLogger(__name__)


class StateHome(Protocol):
    """Where a client's state is between two rounds: texts, numbers, bytes, and NumPy arrays by name."""

    def load(self) -> dict[str, Any] | None:
        """Return what was saved last, if anything was."""

    def save(self, state: dict[str, Any]) -> None:
        """Keep a state in the place of the last one: all of it or, where this raises, nothing."""


class MemoryHome:
    """A state in this process.

    Examples
    --------
    >>> home = MemoryHome()
    >>> home.load() is None
    True
    """

    def __init__(self) -> None:
        self._state: dict[str, Any] | None = None

    def load(self) -> dict[str, Any] | None:
        """Return what was saved last, if anything was."""
        return self._state

    def save(self, state: dict[str, Any]) -> None:
        """Keep a state in the place of the last one."""
        self._state = state


class FileHome:
    """A state in a file of NumPy's .npz format, without pickles.

    A new state is written beside the old one and put in its place when it is on disk, so a process that is killed at
    any time leaves one of the two.

    Parameters
    ----------
    path : str or Path
        Folders that lack are made.

    Examples
    --------
    >>> import tempfile
    >>> home = FileHome(f"{tempfile.mkdtemp()}/states/client.npz")
    >>> home.save({"sequence": 3, "residual": {"weight": np.ones(2, np.float32)}})
    >>> home.load()
    {'sequence': 3, 'residual': {'weight': array([1., 1.], dtype=float32)}}
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __repr__(self) -> str:
        return f"FileHome({str(self.path)!r})"

    def load(self) -> dict[str, Any] | None:
        """Return what was saved last, if anything was.

        Raises
        ------
        ValueError
            If the file is not one that `save` wrote.
        """
        try:
            with np.load(self.path, allow_pickle=False) as file:
                arrays = [file[f"arr_{number}"] for number in range(len(file.files))]
            return _unpacked(arrays)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.filename is not None:
                raise
            raise self._foreign(error) from error
        except Exception as error:  # of zipfile, NumPy or json: anything may lie there
            raise self._foreign(error) from error

    def save(self, state: dict[str, Any]) -> None:
        """Keep a state in the place of the last one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        number, name = tempfile.mkstemp(dir=self.path.parent, prefix=f"{self.path.name}.")
        try:
            with open(number, "wb") as file:
                np.savez(file, *_packed(state))
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, self.path)
        except BaseException:
            os.unlink(name)
            raise

    def _foreign(self, error: Exception) -> ValueError:
        return ValueError(
            f"{self.path} is no state of a client; move it away to start anew: {error}"
        )


def _packed(state: dict[str, Any]) -> list[np.ndarray[Any, Any]]:
    """Return the arrays of a state, the first of which is JSON that says where each belongs."""
    arrays: list[np.ndarray[Any, Any]] = []

    def placed(value: Any) -> Any:
        if isinstance(value, bytes):
            arrays.append(np.frombuffer(value, np.uint8))
            return {"bytes": len(arrays)}
        if isinstance(value, dict):
            start = len(arrays) + 1
            arrays.extend(value.values())
            return {"arrays": list(value), "start": start}
        return value

    plain = {key: placed(value) for key, value in state.items()}
    return [np.frombuffer(json.dumps(plain).encode(), np.uint8), *arrays]


def _unpacked(arrays: list[np.ndarray[Any, Any]]) -> dict[str, Any]:
    def taken(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if "bytes" in value:
            return arrays[value["bytes"]].tobytes()
        start = value["start"]
        return {name: arrays[start + number] for number, name in enumerate(value["arrays"])}

    return {key: taken(value) for key, value in json.loads(arrays[0].tobytes()).items()}


class ClientFeedback:
    """`fedcodec.ErrorFeedback` whose state outlives the process, and whose payloads are pending until they are named.

    A payload has a ticket, and the receiver says later which tickets it took. What is in none of those payloads is sent
    once more with the next one: a payload that was lost loses nothing, and one that came counts once.

    Parameters
    ----------
    home : StateHome
    owner : str, optional
        Whose state it is from the next payload on.

    Attributes
    ----------
    last_owner : str or None
        Who sent the last payload; None if nobody did.

    Raises
    ------
    ValueError
        If the home holds something else.

    Examples
    --------
    >>> client = ClientFeedback(MemoryHome())
    >>> update = np.array([1, 3], np.float32)
    >>> fc.decode(client.encode("topk(0.5)", update, ticket=b"1"), like=update)
    array([0., 3.], dtype=float32)
    >>> fc.decode(client.encode("topk(0.5)", update, ticket=b"2", accepted=[]), like=update)
    array([0., 6.], dtype=float32)
    >>> fc.decode(client.encode("topk(0.5)", update, ticket=b"3", accepted=[b"2"]), like=update)
    array([3., 0.], dtype=float32)
    """

    def __init__(self, home: StateHome, owner: str = "") -> None:
        self._home = home
        self._owner = owner
        self._state = home.load()
        self.last_owner: str | None = None
        if self._state is not None:
            if not {"owner", "ticket", "codec", "payload"} <= self._state.keys():
                raise ValueError(f"what {home!r} holds is no state of a client")
            self.last_owner = self._state["owner"]

    def encode(
        self,
        codec: fc.Codec | str,
        update: Any,
        *,
        ticket: bytes,
        accepted: Container[bytes] = (),
        framing: Literal["inline", "reference"] = "reference",
        base: bytes | None = None,
        seed: int = 0,
    ) -> bytes:
        """Encode an update and what its predecessors missed, and save the state.

        Parameters
        ----------
        codec : Codec or str
            May change from call to call.
        update : update
        ticket : bytes
            Another one for each update. With that of the pending payload its bytes are returned again, whatever the
            update.
        accepted : container of bytes
            Tickets that the receiver took: that of the pending payload, if it is among them.
        framing, base, seed
            As for `Codec.encode`.

        Returns
        -------
        bytes

        Raises
        ------
        NonFiniteError, TypeError, ValueError
            As for `Codec.encode`; the state is as before.
        """
        state = self._state
        if state is None:
            feedback = fc.ErrorFeedback(codec)
        elif state["ticket"] == ticket:
            return bytes(state["payload"])
        else:
            feedback = _settled(state, codec, accepted)

        def encode() -> bytes:
            return feedback.encode(update, framing=framing, base=base, seed=seed)

        try:
            payload = encode()
        except fc.SpecMismatch as error:
            _LOG.warning("the residual is dropped, the model is another one: %s", error)
            feedback = fc.ErrorFeedback(codec)
            payload = encode()
        except fc.NonFiniteError as error:
            feedback.reset()
            payload = encode()  # which raises where the update itself is at fault
            _LOG.warning("the residual is dropped: %s", error)
        # What was encoded says it all; the residual before it is for `reject(drop=True)`.
        state = feedback.state_dict() | {"residual": None, "ticket": ticket, "owner": self._owner}
        self._home.save(state)
        self._state = state
        return payload


def _settled(
    state: dict[str, Any], codec: fc.Codec | str, accepted: Container[bytes]
) -> fc.ErrorFeedback:
    """Return the feedback of a state once it is known whether its payload arrived."""
    feedback = fc.ErrorFeedback(state["codec"])
    feedback.load_state_dict(state)
    if state["ticket"] in accepted:
        feedback.accept()
    else:
        feedback.reject()
    renamed = fc.ErrorFeedback(codec)
    if str(renamed.codec) == str(feedback.codec):
        return feedback
    renamed.load_state_dict(feedback.state_dict() | {"codec": str(renamed.codec)})
    return renamed
