"""The other end of a peer's process: `peer_kvpress.py` runs in an environment of its own, this in ours."""

import json
import subprocess
from pathlib import Path


class Peer:
    """kvpress in its own environment: a process that prefills under a press and then steps when told to."""

    def __init__(self, python: str, model, press: str):
        script = Path(__file__).with_name("peer_kvpress.py")
        if not Path(python).is_file():
            raise ValueError(f"no python at {python}: `make peer` builds the environment that --peer kvpress needs.")
        command = [python, str(script), model.name_or_path, str(model.dtype).removeprefix("torch."), press]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **request) -> dict:
        """One request, one answer."""
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise ValueError("the peer's process ended; what it printed above says why.")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait()
