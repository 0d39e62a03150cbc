"""What it means that a Hub did not give what was asked for: it was not reached, or it refused; and what to do then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shmloader.errors import AccessError, SourceError
from shmloader.sources.base import SourceRequest
from shmloader.sources.blame import chain
from shmloader.sources.patience import ServerGivenUp

#: Connection failures by the name of their class, of requests that `patience` does not make (other servers, other
#: libraries): their HTTP library changes (requests, httpx, httpx2).
_UNREACHABLE = {
    "ConnectError",
    "ConnectTimeout",
    "NetworkError",
    "OfflineModeIsEnabled",
    "PoolTimeout",
    "ReadError",
    "ReadTimeout",
    "RemoteProtocolError",
    "TimeoutException",
}
#: HTTP: the server is there, and cannot work now.
_DOWN = (429, 500, 502, 503, 504)
_REFUSED = (401, 403)
_GATED = "is a gated dataset on the Hub"


def is_unreachable(error: BaseException) -> bool:
    """Whether ``error`` comes of a server that was not reached or cannot work now, or of offline mode."""
    return any(
        isinstance(e, (ServerGivenUp, ConnectionError, TimeoutError))
        or (type(e).__name__ in _UNREACHABLE and type(e).__module__ not in ("tarfile", "shmloader.errors"))
        or _status(e) in _DOWN
        for e in chain(error)
    )


def is_refused(error: BaseException) -> bool:
    """Whether ``error`` says that the Hub does not give something to this user, though it may have it."""
    return any(
        type(e).__name__ == "GatedRepoError"
        or _GATED in str(e)
        or (_status(e) in _REFUSED and type(e).__name__ != "RepositoryNotFoundError")
        for e in chain(error)
    )


def unreachable(name: str, verb: str, detail: str, error: BaseException) -> SourceError:
    """The error for a Hub that `is_unreachable`. detail: what was tried, without secrets."""
    from huggingface_hub import constants

    offline = " Offline mode is on (HF_HUB_OFFLINE)." if constants.HF_HUB_OFFLINE else ""
    local = "" if Path(name).exists() else f" There is no local folder or file {str(Path(name).absolute())!r} either."
    given_up = next((e for e in chain(error) if isinstance(e, ServerGivenUp)), None)
    status = None if given_up is None else given_up.status
    return SourceError(
        f"Cannot {verb} {name!r}: the Hub at {constants.ENDPOINT} {state_of(status)}, so it is not known whether "
        f"the dataset exists.{offline}{local} {what_to_do(status)} ({detail})",
        dataset=name,
        endpoint=constants.ENDPOINT,
        status=status,
        detail=detail,
    )


def refused(request: SourceRequest, name: str, detail: str, error: BaseException) -> AccessError:
    """The error for a dataset that `is_refused`."""
    from huggingface_hub import constants

    page = f"{constants.ENDPOINT}/datasets/{name}"
    is_gated = any(type(e).__name__ == "GatedRepoError" or _GATED in str(e) for e in chain(error))
    what = "is gated: the Hub gives it only to users who have asked for access" if is_gated else "is not given to you"
    who = "the given token is not of such a user" if request.load.get("token") else "you are perhaps not logged in"
    return AccessError(
        f"{name} {what}, and {who}. Ask for access on {page}; log in with `hf auth login`, or set HF_TOKEN, or give "
        f'load={{"token": …}}. ({detail})',
        dataset=name,
        page=page,
        status=next((s for e in chain(error) if (s := _status(e)) is not None), None),
    )


def told_of(error: BaseException) -> dict[str, Any]:
    """For the data of an error that a reader raises: the Hub's address, if ``error`` comes of its not being reached."""
    if not is_unreachable(error):
        return {}
    from huggingface_hub import constants

    return {"endpoint": constants.ENDPOINT}


def remedy(error: BaseException, otherwise: str) -> str:
    """What to do about rows that could not be read because of ``error``."""
    if is_unreachable(error):
        return (
            "They are fetched when they are asked for again and the server is back. SHMLOADER_SOURCE_TIMEOUT_S says "
            "how long it is tried; with use_streaming=False all is here before it is needed."
        )
    if is_refused(error):
        return (
            "The Hub does not give it to you: log in with `hf auth login`, or set HF_TOKEN, or give "
            'load={"token": …}, and ask for access on the dataset\'s page.'
        )
    return otherwise


def state_of(status: int | None) -> str:
    """What a Hub does that was given up. status: its last answer; None: there was none."""
    return "cannot be reached" if status is None else f"does not do its work (HTTP {status})"


def what_to_do(status: int | None) -> str:
    """About a Hub that was given up."""
    if status == 429:
        return (
            "It limits how often you may ask: log in (`hf auth login`, HF_TOKEN), which allows more, set "
            "SHMLOADER_SOURCE_TIMEOUT_S higher, or use a local copy."
        )
    if status is not None:
        return "Try again later, set SHMLOADER_SOURCE_TIMEOUT_S higher, or use a local copy."
    return "Check the network and HF_ENDPOINT, or use a local copy."


def _status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None
