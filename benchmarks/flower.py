"""What fedcodec saves inside Flower: time on slow links, and the server's memory. On real SuperLinks and SuperNodes.

Usage: python benchmarks/flower.py link|memory FOLDER, in an environment with flwr[simulation] and fedcodec; see
docs/integrations.md. Writes FOLDER/link.json or FOLDER/memory.json.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from flower_app.engine_app import initial, step
from flower_engine import Engine

import fedcodec as fc

ROUNDS = 3
BITS_PER_SECOND = 20e6
CODECS = {"uplink": "int8", "downlink": "int8"}


def run(engine, **config):
    """Return what the ServerApp wrote down, and the bytes and requests of each link."""
    before = [link.counts() for link in engine.links]
    output, log = engine.run(patience=1200, **config)
    if not (output / "result.json").exists():
        raise RuntimeError(log)
    counted = np.subtract([link.counts() for link in engine.links], before)
    return json.loads((output / "result.json").read_text()), counted.tolist()


def link():
    """Whole rounds at a shaped link, and without what a round of a model of 1 kB takes."""
    found = {}
    with Engine(tempfile.mkdtemp(), bits_per_second=BITS_PER_SECOND) as engine:
        for name, codecs in (("raw", {}), ("int8", CODECS)):
            for model in ("1 kB", "48 MB"):
                result, counted = run(engine, model=model, rounds=ROUNDS, **codecs)
                seconds = statistics.median(result["seconds"])
                print(name, model, [round(s, 1) for s in result["seconds"]], flush=True)
                found[f"{name}, {model}"] = {
                    "seconds": result["seconds"],
                    "median": seconds,
                    "up, down, requests of each node": counted,
                }
    transfer = {
        name: found[f"{name}, 48 MB"]["median"] - found[f"{name}, 1 kB"]["median"]
        for name in ("raw", "int8")
    }
    found["seconds above 1 kB"] = transfer
    found["raw / int8"] = transfer["raw"] / transfer["int8"]
    found["encode + decode, seconds a round"] = sum(codec_seconds().values())
    found["encode + decode / round"] = (
        found["encode + decode, seconds a round"] / found["int8, 48 MB"]["median"]
    )
    return found


def codec_seconds():
    """Return what coding takes of a round, on one thread: the way of one model down, up and down again."""
    fc.set_num_threads(1)
    model, delta = initial("48 MB"), step("48 MB", 0, 1)
    payload = fc.parse("int8").encode(model)
    feedback = fc.ErrorFeedback("int8")

    def uplink():
        data = feedback.encode(delta, framing="reference")
        feedback.accept()
        return data

    sent = uplink()
    return {
        "server: encode, decode, digest": _median(
            lambda: fc.digest(fc.decode(fc.parse("int8").encode(model)))
        ),
        "client: decode and digest, twice": 2 * _median(lambda: fc.digest(fc.decode(payload))),
        "client: encode": _median(uplink),
        "server: decode, two clients": 2 * _median(lambda: fc.decode(sent, like=model)),
    }


def _median(call):
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def memory():
    """The ServerApp's memory with 64 replies of 16 MB each, in models above what it has when it holds the model."""
    ways = {
        "StreamingFedAvg, int8 both ways": {"streaming": True, **CODECS},
        "StreamingFedAvg, int8 up": {"streaming": True, "uplink": "int8"},
        "FedAvg, int8 both ways": CODECS,
        "FedAvg": {},
    }
    found = {}
    with Engine(tempfile.mkdtemp()) as engine:
        for name, config in ways.items():
            result, _ = run(
                engine,
                model="16 MB",
                rounds=1,
                evaluate=False,
                clients=64,
                repeat=32,
                timeout=1000.0,
                **config,
            )
            models = (result["peak"] - result["idle"]) * 1024 / 16e6
            print(name, f"{models:.2f} models", flush=True)
            found[name] = {**result, "models above idle": models}
    return found


if __name__ == "__main__":
    what, folder = sys.argv[1], Path(sys.argv[2])
    result = {"link": link, "memory": memory}[what]()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{what}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
