"""Copies of a run on the Hub: its newest checkpoint while it trains, the adapter at its end. One process calls it.

The folder on disk is never touched, and training never waits: checkpoints go up in a thread of the client, one that
comes while another is on its way is left out, and one that fails is a warning.
"""

from concurrent.futures import Future
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError
from transformers.utils import logging

logger = logging.get_logger(__name__)

CHECKPOINT = "last-checkpoint"  # where it lies in the repository: the name that transformers' trainer gave it
# What the client raises: refusals and lost lines; a file that could not be sent; metadata that the Hub refuses.
FAILURES = (OSError, HTTPError, RuntimeError, ValueError)


class Upload:
    """A repository that a run is copied to.

    Args:
        name: user/name on the Hub; made, private, if it does not exist. Who may write there: HF_TOKEN, or who is logged
            in with `hf auth login`.

    Raises:
        ValueError: it cannot be made or written to, before anything is trained.
    """

    def __init__(self, name: str) -> None:
        self.name, self.api = name, HfApi()
        self.pending: Future | None = None
        try:
            self.api.create_repo(name, private=True, exist_ok=True)
        except FAILURES as error:
            raise ValueError(
                f"push_to={name!r}: {_said(error)}. Log in with `hf auth login`, or set HF_TOKEN, as somebody who may "
                "write there; or leave --push_to out."
            ) from error

    def checkpoint(self, folder: Path) -> None:
        """Begin to copy a checkpoint's folder, in place of the one before it."""
        if self.pending is not None and not self.pending.done():
            logger.warning(f"{folder} is not copied to {self.name}: the checkpoint before it is still on its way.")
            return
        self.pending = self.api.upload_folder(
            repo_id=self.name,
            folder_path=folder,
            path_in_repo=CHECKPOINT,
            commit_message=folder.name,
            run_as_future=True,
        )
        self.pending.add_done_callback(lambda done: self._tell(done, folder))

    def _tell(self, done: Future, folder: Path) -> None:
        if error := done.exception():
            logger.warning(f"{folder} was not copied to {self.name} ({_said(error)}); training goes on.")

    def wait(self) -> None:
        """Until no checkpoint is on its way."""
        if self.pending is not None:
            self.pending.exception()


def upload_adapter(name: str, folder: Path) -> str:
    """Copy an adapter's folder, without its checkpoints, to a repository, and wait for it: the commit's address.

    Raises:
        OSError: it could not be sent; the folder is whole.
    """
    try:
        done = HfApi().upload_folder(repo_id=name, folder_path=folder, ignore_patterns=["checkpoint-*"])
        return done.commit_url
    except FAILURES as error:
        raise OSError(
            f"the adapter is whole in {folder}, but was not copied to {name} ({_said(error)}). To try again: "
            f"hf upload {name} {folder} . --exclude 'checkpoint-*/*'"
        ) from error


def _said(error: BaseException) -> str:
    """The first line of what the client says, and of what is behind it."""
    first = [str(e).strip().partition("\n")[0].rstrip(".") for e in (error, error.__cause__) if e is not None]
    return ": ".join(line for line in first if line)
