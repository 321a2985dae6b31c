"""The headers of a hub model's weights files, read over the network without downloading the weights."""

from __future__ import annotations

import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from moe_svd_distill.checkpoints.hub import HubModel, Snapshot
from moe_svd_distill.checkpoints.hub_errors import hub_errors
from moe_svd_distill.errors import DistillError, RemoteError, shown
from moe_svd_distill.files.header import PREFIX_BYTES, Header, header_length, header_of

FIRST_PIECE = 256 * 1024  # nearly every header fits, so one request per file is enough
CONNECTIONS = 8
CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


def fetch_headers(
    model: HubModel, snapshot: Snapshot, files: Iterable[str], token: str | None
) -> dict[str, Header | DistillError]:
    """Each file's header, or what is wrong with it. A hub that cannot be reached is raised at once."""

    def one(name: str) -> Header | DistillError:
        try:
            return _fetch_header(model, snapshot, name, token)
        except RemoteError:
            raise
        except DistillError as fault:
            return fault

    names = list(files)
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        return dict(zip(names, pool.map(one, names), strict=True))


def _fetch_header(model: HubModel, snapshot: Snapshot, name: str, token: str | None) -> Header:
    """One header: the beginning of the file, and the rest of the header if it is longer than that."""
    path = snapshot.folder / name
    raw, file_bytes = _fetch_range(model, snapshot.commit, name, token, 0, FIRST_PIECE)
    end = PREFIX_BYTES + header_length(raw[:PREFIX_BYTES], path, file_bytes)
    if end > len(raw):
        raw += _fetch_range(model, snapshot.commit, name, token, len(raw), end)[0]
    return header_of(raw[:end], path, file_bytes)


def _fetch_range(model: HubModel, commit: str, name: str, token: str | None, begin: int, end: int) -> tuple[bytes, int]:
    """The bytes from ``begin`` to ``end`` of a remote file, as far as it has them, and the file's size."""
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

    url = hf_hub_url(model.repo, name, revision=commit)
    headers = build_hf_headers(token=token)
    headers |= {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
    with (
        hub_errors(model, token),
        get_session().stream("GET", url, headers=headers, follow_redirects=True) as response,
    ):
        hf_raise_for_status(response)
        found = CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if response.status_code != 206 or found is None or int(found[1]) != begin:
            # A server that does not know ranges would send the whole file: leave before it does.
            raise RemoteError(
                f"the hub does not send a part of {shown(name)} of {model} (status {response.status_code})",
                "Download the model and give its folder",
            )
        size = int(found[3])
        expected = min(end, size) - begin
        body = bytearray()
        for piece in response.iter_bytes():
            body += piece
            if len(body) > expected:
                break
        if len(body) != expected:
            what = f"the hub sent {len(body)} bytes of {shown(name)} of {model} (expected {expected})"
            raise RemoteError(what, "Try again later")
    return bytes(body), size
