"""Write the golden files of cases that have none: `python tests/golden/add.py`. The tests never run this.

Version 1 is frozen: files are added, and none is ever changed or removed.

`<name>.fc` is a payload, `<name>.npz` what it decodes to, by the order of tensors; bfloat16 as its bits.
"""

from pathlib import Path

import numpy as np
from cases import CASES, codec_of, shared_for

import fedcodec as fc

HERE = Path(__file__).parent


def tensors_of(update):
    if isinstance(update, dict):
        return list(update.values())
    return update if isinstance(update, list) else [update]


def main():
    fc.ops.use("reference")
    for name, text, update, arguments in CASES:
        if (HERE / f"{name}.fc").exists():
            continue
        codec = codec_of(text)
        payload = codec.encode(update, **arguments)
        decoded = fc.decode(payload, like=update, shared=shared_for(codec, update))
        arrays = [np.asarray(value) for value in tensors_of(decoded)]
        (HERE / f"{name}.fc").write_bytes(payload)
        np.savez_compressed(HERE / f"{name}.npz", *arrays)
    print(f"{len(CASES)} payloads, {sum(path.stat().st_size for path in HERE.glob('*.fc'))} bytes")


if __name__ == "__main__":
    main()
