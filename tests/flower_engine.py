"""Flower's own processes on this machine, with counted and shaped links; all end with the block that started them."""

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

APP = Path(__file__).parent / "flower_app"
BIN = Path(sys.executable).parent
MARK = "FEDCODEC_ENGINE"


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Link(threading.Thread):
    """A TCP proxy that counts bytes and HTTP requests, and lets through so many bits a second in each direction."""

    def __init__(self, port, bits_per_second=None):
        super().__init__(daemon=True)
        self.target = port
        self.seconds_per_byte = 8 / bits_per_second if bits_per_second else 0
        self.up = self.down = self.requests = 0
        self.free_at = {"up": 0.0, "down": 0.0}  # connections share the link
        self.listens = threading.Event()
        self.start()
        self.listens.wait()

    def run(self):
        asyncio.run(self._main())

    async def _main(self):
        self.loop, self.closing = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self.listens.set()
        await self.closing.wait()
        server.close()
        serving = asyncio.all_tasks() - {asyncio.current_task()}
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)
        await asyncio.sleep(0.1)  # connections close in the loop's next turns

    def close(self):
        self.loop.call_soon_threadsafe(self.closing.set)
        self.join()

    def counts(self):
        return self.up, self.down, self.requests

    async def _serve(self, reader, writer):
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target)
            ways = (self._pump(reader, far_writer, "up"), self._pump(far_reader, writer, "down"))
            await asyncio.gather(*ways, return_exceptions=True)
        except OSError:  # the SuperLink is no more
            writer.close()

    async def _pump(self, reader, writer, way):
        tail = b""
        try:
            while data := await reader.read(1 << 16):
                setattr(self, way, getattr(self, way) + len(data))
                if way == "up":
                    self.requests += len(re.findall(rb" HTTP/1\.1\r\n", tail + data))
                    tail = data[-10:]
                if self.seconds_per_byte:
                    now = time.monotonic()
                    at = max(now, self.free_at[way]) + len(data) * self.seconds_per_byte
                    self.free_at[way] = at
                    await asyncio.sleep(at - now)
                writer.write(data)
                await writer.drain()
        finally:
            writer.close()


class Engine:
    """A SuperLink, and SuperNodes behind links of their own.

    Parameters
    ----------
    folder : Path
        For logs and Flower's own files.
    nodes : int
        0 for Flower's simulation of nodes.
    bits_per_second : float, optional
        Of each node's link.
    state : bool
        Whether nodes have a folder for their state.
    """

    def __init__(self, folder, nodes=2, bits_per_second=None, state=False):
        self.folder, self.state = Path(folder), state
        self.folder.mkdir(parents=True, exist_ok=True)
        self.mark = uuid.uuid4().hex
        self.environment = os.environ | {
            "FLWR_HOME": str(self.folder / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            MARK: self.mark,
        }
        self.port = free_port()
        (self.folder / "flwr").mkdir(exist_ok=True)
        (self.folder / "flwr" / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{self.port}"\n'
            "insecure = true\n"
        )
        self.links = [Link(self.port, bits_per_second) for _ in range(nodes)]
        self.nodes = {}
        self.runs = []

    def __enter__(self):
        simulation = [] if self.links else ["--simulation"]
        address = ["--host", "127.0.0.1", "--port", str(self.port)]
        self.superlink = self._start(
            "superlink", "flower-superlink", "--insecure", *simulation, *address
        )
        _wait(lambda: _listens(self.port), "the SuperLink does not listen", 60)
        for number in range(len(self.links)):
            self.start_node(number)
        return self

    def start_node(self, number):
        config = f"partition-id={number}"
        if self.state:
            config += f" state-dir='{self.folder}/state-{number}'"
        self.nodes[number] = self._start(
            f"node-{number}",
            *("flower-supernode", "--insecure", "--superlink"),
            f"127.0.0.1:{self.links[number].port}",
            *("--host", "127.0.0.1", "--port", str(free_port()), "--node-config", config),
        )

    def kill_node(self, number):
        """End a SuperNode and what it runs, as a power cut would."""
        os.killpg(self.nodes[number].pid, signal.SIGKILL)
        self.nodes[number].wait()

    def command(self, app, federation=None, **config):
        """Return the words that run an app, and the folder for what it writes."""
        output = self.folder / f"output-{uuid.uuid4().hex[:8]}"
        output.mkdir()
        settings = {"output": str(output), **config}
        text = " ".join(f"{key}={_toml(value)}" for key, value in settings.items())
        words = [str(BIN / "flwr"), "run", str(app), "here", "--stream", "--run-config", text]
        return words + (["--federation-config", federation] if federation else []), output

    def run(self, patience=300, app=APP, federation=None, **config):
        """Run an app to its end; return the folder with what it wrote, and what was logged."""
        words, output = self.command(app, federation, **config)
        done = subprocess.run(
            words,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=patience,
            check=False,
            start_new_session=True,
        )
        return output, done.stdout

    def begin(self, **config):
        """Start a run and do not wait for it."""
        words, output = self.command(APP, **config)
        self.runs.append(self._start("run", *words))
        return self.runs[-1], output

    def log(self, name):
        return (self.folder / f"{name}.log").read_text()

    def __exit__(self, *error):
        for process in [*self.nodes.values(), self.superlink]:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            _wait(lambda: not marked(self.mark), "processes are left", 10)
        for link in self.links:
            link.close()
        for process in marked(self.mark):
            os.kill(process, signal.SIGKILL)
        for process in [*self.runs, *self.nodes.values(), self.superlink]:
            process.wait()
        _wait(lambda: not marked(self.mark), "processes are left", 10)

    def _start(self, name, *words):
        with open(self.folder / f"{name}.log", "a") as log:
            program = words[0] if os.sep in words[0] else str(BIN / words[0])
            return subprocess.Popen(
                [program, *words[1:]],
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )


def _toml(value):
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _wait(condition, message, seconds):
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(message)
        time.sleep(0.1)


def marked(mark):
    """Return the processes that an engine started, and those that they did."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                if f"{MARK}={mark}".encode() in (entry / "environ").read_bytes() and state != "Z":
                    found.append(int(entry.name))
            except OSError:
                pass
    return found
