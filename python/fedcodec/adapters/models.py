"""Codecs by which whole models travel."""

from __future__ import annotations

import fedcodec as fc


def model_codec(codec: fc.Codec | str) -> fc.Codec:
    """Return a codec that leaves no value of a model out.

    Parameters
    ----------
    codec : Codec or str

    Raises
    ------
    ValueError, TypeError
        If it is none, the text of none, or one that would set weights to zero.

    Examples
    --------
    >>> str(model_codec("int8"))
    'int8'
    >>> model_codec("topk(0.01)")
    Traceback (most recent call last):
        ...
    ValueError: the codec is topk(0.01): models travel whole, it would set weights to zero
    """
    parsed = fc.ErrorFeedback(codec).codec  # which checks it
    if any(pipeline.find("select") for pipeline in parsed.pipelines()):
        raise ValueError(
            f"the codec is {parsed}: models travel whole, it would set weights to zero"
        )
    return parsed
