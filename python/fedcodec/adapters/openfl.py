"""fedcodec inside OpenFL: a pipeline for its plan, in which collaborators and aggregator send deltas.

In ``plan/plan.yaml``::

    compression_pipeline:
      template: fedcodec.adapters.openfl.CodecPipeline
      settings:
        codec: int8
    collaborator:
      settings:
        use_delta_updates: true
    aggregator:
      settings:
        use_delta_updates: true

Without deltas collaborators send whole tensors uncompressed. OpenFL 1.9 fails with NumPy 2.4, which it does not say;
``fedcodec[openfl]`` does.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from openfl.pipelines.pipeline import TransformationPipeline, Transformer

import fedcodec as fc

from .models import model_codec


class CodecTransformer(Transformer):  # type: ignore[misc]
    """A tensor to a payload that says all that is needed to decode it, and back.

    OpenFL tells it neither the tensor's name nor whose it is, so there is no error feedback. It also passes whole
    models through it where it stores them, the initial one included: codecs that leave values out are refused.

    Parameters
    ----------
    codec : Codec or str
        As in "int8".

    Attributes
    ----------
    lossy : bool
        Whether floats may change; OpenFL then sends metrics and other tensors that must not without it.

    Raises
    ------
    ValueError, TypeError
        If the codec is none, the text of none, or one that would set weights to zero.

    Examples
    --------
    >>> transformer = CodecTransformer("int8")
    >>> payload, metadata = transformer.forward(np.array([1, -127], np.float32))
    >>> transformer.backward(payload, metadata), transformer.lossy
    (array([   1., -127.], dtype=float32), True)
    """

    def __init__(self, codec: fc.Codec | str) -> None:
        self.codec = model_codec(codec)
        stages = [stage for pipeline in self.codec.pipelines() for stage in pipeline.stages]
        self.lossy = not all(isinstance(stage, fc.Raw | fc.Lossless) for stage in stages)

    def forward(self, data: npt.NDArray[Any], **kwargs: Any) -> tuple[bytes, dict[str, Any]]:
        """Return the payload of a tensor, and no metadata.

        Raises
        ------
        NonFiniteError
            If a value is not finite and the codec needs that.
        TypeError
            If it has a dtype that fedcodec does not know.
        """
        array = np.asarray(data)
        # The aggregator encodes a delta twice, for itself and for others: both must come out alike.
        seed = int.from_bytes(fc.digest(array), "little")
        return self.codec.encode(array, seed=seed), {}

    def backward(self, data: bytes, metadata: dict[str, Any], **kwargs: Any) -> npt.NDArray[Any]:
        """Return what a payload stands for, in the dtype that it was encoded from.

        Raises
        ------
        DecodeError
            If it is no valid payload of one tensor.
        """
        array = fc.decode(data)
        if not isinstance(array, np.ndarray):
            raise fc.DecodeError("the payload is not that of one tensor")
        return array


class CodecPipeline(TransformationPipeline):  # type: ignore[misc]
    """What ``compression_pipeline`` of a plan names: a `CodecTransformer` alone.

    Parameters
    ----------
    codec : Codec or str
        As in "int8".

    Raises
    ------
    ValueError, TypeError
        As for `CodecTransformer`.

    Examples
    --------
    >>> CodecPipeline("int8").is_lossy(), CodecPipeline("raw | zstd").is_lossy()
    (True, False)
    """

    def __init__(self, codec: fc.Codec | str) -> None:
        super().__init__([CodecTransformer(codec)])
