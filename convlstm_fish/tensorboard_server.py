"""A TensorBoard server that lives exactly as long as the run that started it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import TracebackType

from convlstm_fish.errors import UserError

# The server waits for the end of its standard input: however this process ends, killed or not, the pipe closes.
_SERVER = """
import sys
from tensorboard import program
server = program.TensorBoard()
server.configure(argv=[None, "--logdir", sys.argv[1], "--port", "0", "--host", "localhost", "--reload_interval", "5"])
print(server.launch(), flush=True)
sys.stdin.read()
"""


class TensorBoardServer:
    """``with TensorBoardServer(folder) as server:`` serves the runs below ``folder`` at ``server.url``, on a free port.

    Args:
        folder: with event files, now or later.

    Attributes:
        url: its address, on this machine only.

    Raises:
        UserError: when the server does not start.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.url = ""
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> TensorBoardServer:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVER, str(self.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            # A Ctrl-C in the terminal is for the run, which still has something to save.
            start_new_session=True,
        )
        if self._process.stdout is not None:
            self.url = self._process.stdout.readline().strip()
        if not self.url:
            self._end()
            raise UserError(f"--tensorboard: the server for {self.folder} did not start; try: tensorboard --logdir ...")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
