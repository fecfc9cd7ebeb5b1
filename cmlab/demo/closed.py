"""What gradio would fetch for a visitor who names an address, it does not: pictures are uploaded, and this machine asks nobody."""

from __future__ import annotations

import gradio
from fastapi import HTTPException
from gradio import processing_utils, routes


def close() -> None:
    """Lets gradio refuse addresses in the inputs of jobs, and at /gradio_api/file=.

    Raises AttributeError for a gradio that has these functions no more: else they would be fetched.
    """
    for module, name, refuse in (
        (processing_utils, "async_ssrf_protected_download", _refuse_input),
        (routes, "secure_url_stream_response", _refuse_file),
    ):
        getattr(module, name)
        setattr(module, name, refuse)


async def _refuse_input(url: str, **where) -> str:
    raise gradio.Error("addresses are not fetched: upload the picture", print_exception=False)


async def _refuse_file(url: str, *rest):
    raise HTTPException(403, "addresses are not fetched")
