"""Explain errors of an MLflow store, and tell refusals from outages.

An outage ends without the user: the sender tries again. A refusal lasts until the user changes a
setting, so the sender stops after a few tries, and the message has the remedy.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from trainer.runtime.errors import BadInput
from trainer.tracking.store_uri import StoreAddress, sync_command

#: HTTP status by ``error_code`` of MLflow's exceptions.
STATUS = {
    "UNAUTHENTICATED": 401,
    "CUSTOMER_UNAUTHORIZED": 401,
    "PERMISSION_DENIED": 403,
    "ENDPOINT_NOT_FOUND": 404,
}
#: Texts of OpenSSL for an answer that is not TLS.
NO_TLS = ("WRONG_VERSION_NUMBER", "record layer failure", "UNKNOWN_PROTOCOL")
NO_JSON = "not in a valid JSON format"


class Refused(Exception):
    """Nothing can be sent until the user changes something; the message has the remedy."""


def is_refusal(error: BaseException) -> bool:
    """Whether the same call fails again until the user changes something."""
    if isinstance(error, Refused | BadInput):
        return True
    return http_status(error) in STATUS.values() or _is_tls(error) or NO_JSON in str(error)


def is_busy(error: BaseException) -> bool:
    """Whether another process was writing to the store, so that a retry may succeed."""
    return getattr(error, "error_code", None) == "TEMPORARILY_UNAVAILABLE"


def explain(error: BaseException, target: StoreAddress, output_dir: Path) -> str:
    """Describe an error in one line for the user, with the remedy if it is known."""
    text = target.hide(" ".join(str(error).split())) or type(error).__name__
    text = text.partition(". Response body: '<")[0]  # a page for browsers
    remedy = _remedy(error, text, target, output_dir)
    return f"{_shortened(text, 600)}; {remedy}" if remedy else text[:1000]


def http_status(error: BaseException) -> int | None:
    """Return the HTTP status of an answer, if the error has one."""
    code = getattr(error, "error_code", None)  # of mlflow's exceptions
    if code in STATUS:
        return STATUS[code]
    if "'detail': 'Not Found'" in str(error):  # answer of a server that is not MLflow's
        return 404
    status = getattr(getattr(error, "response", None), "status_code", None)  # of requests'
    return status if isinstance(status, int) else None


def _remedy(error: BaseException, text: str, target: StoreAddress, output_dir: Path) -> str | None:
    status = http_status(error)
    if "Invalid Host header" in text:
        host = urlsplit(target.name).netloc
        return f"start the server with: mlflow server --allowed-hosts {host}"
    if status in (401, 403) and not target.trusted:
        return (
            "MLFLOW_TRACKING_USERNAME, _PASSWORD and _TOKEN were not sent, as only the folder "
            f"names this server; if it is yours, run: {sync_command(output_dir, target.name)}"
        )
    if status == 401:
        return "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or _TOKEN"
    if status == 403:
        return (
            "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or _TOKEN, of a user who "
            "may edit the experiment"
        )
    if status == 404 or NO_JSON in text:
        return (
            f"no MLflow server answers at {target.name}: correct the host, port and path of the "
            f"address ({target.name}/health must answer OK)"
        )
    if _is_tls(error) and any(words in text for words in NO_TLS):
        return "the server does not speak TLS: write http:// instead of https://"
    if _is_tls(error):
        return (
            "the server's certificate is not trusted: set MLFLOW_TRACKING_SERVER_CERT_PATH to the "
            "PEM file of its certificate authority, and use the host name of the certificate"
        )
    return None


def _is_tls(error: BaseException) -> bool:
    from requests.exceptions import SSLError

    return any(isinstance(cause, SSLError) for cause in _causes(error))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    for _ in range(10):
        if error is None:
            return
        yield error
        error = error.__cause__ or error.__context__


def _shortened(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]} …"
