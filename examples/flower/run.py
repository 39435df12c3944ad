"""Start all that the app needs on this machine, run it, and end everything: python run.py simulation | deployment."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
PORT = int(os.environ.get("PORT", "18000"))  # and the next two, for the nodes
CLIENTS = 2

environment = os.environ | {
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "FLWR_HOME": str(HERE / ".flwr"),
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def main(way: str) -> int:
    """Return the exit status of the run."""
    home = HERE / ".flwr"
    home.mkdir(exist_ok=True)
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n'
        f'[superlink.here]\naddress = "127.0.0.1:{PORT}"\ninsecure = true\n'
    )
    run = ["flwr", "run", str(HERE), "here", "--stream"]
    superlink = ["flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(PORT)]
    processes = []
    try:
        if way == "simulation":
            processes.append(start(*superlink, "--simulation"))
            resources = "client-resources-num-cpus=1 init-args-num-cpus=2"
            run += ["--federation-config", f"num-supernodes={CLIENTS} {resources}"]
        else:
            processes.append(start(*superlink))
            processes += [start(*node(number)) for number in range(CLIENTS)]
        time.sleep(3)  # until the SuperLink listens
        return subprocess.run(run, env=environment, check=False).returncode
    finally:
        for process in reversed(processes):
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()


def node(number: int) -> list[str]:
    """Return the command of a SuperNode; its residual outlives it in a folder."""
    config = (
        f"partition-id={number} num-partitions={CLIENTS} state-dir='{HERE}/.flwr/node-{number}'"
    )
    return [
        *("flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{PORT}"),
        *("--host", "127.0.0.1", "--port", str(PORT + 1 + number), "--node-config", config),
    ]


def start(*command: str) -> subprocess.Popen[bytes]:
    """Start a process with a group of its own, so that it ends with all that it started."""
    with open(HERE / ".flwr" / "processes.log", "a") as log:
        return subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )


if __name__ == "__main__":
    if sys.argv[1:] not in (["simulation"], ["deployment"]):
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1]))
