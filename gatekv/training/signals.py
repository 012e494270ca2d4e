"""SIGTERM and SIGINT as a wish that the loop grants at the end of a step: the checkpoint first, then out."""

import os
import signal
import threading
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
NOTICE = b"\nstopping: this step is finished and a checkpoint saved first (SIGQUIT, or Ctrl-\\, stops at once)\n"


class Stopped(Exception):
    """Training was asked to stop; a checkpoint of its last step is saved."""

    # sysexits' "temporary failure, try again": not 0, which would tell a scheduler that the job is done, and not 1,
    # which is an error that the same command would only run into again.
    exit_code = 75


class StopSignals:
    """Inside, SIGTERM and SIGINT end nothing, but `wanted` becomes True. In the main thread only: no other may ask."""

    def __init__(self) -> None:
        self.wanted = False
        self._before: dict[int, Any] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.wanted:
            os.write(2, NOTICE)  # print is not safe here: the signal may have come in the middle of another print
        self.wanted = True

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
