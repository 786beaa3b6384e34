"""The life of one server process of several, once its libraries are there."""

import msgspec

from folovllm.common.errors import FoloVLLMError
from folovllm.common.log import get_logger, setup_logging
from folovllm.frontend.async_llm import AsyncLLM
from folovllm.frontend.server.group import ChildOptions, report_ready
from folovllm.frontend.server.run import listen, serve

logger = get_logger(__name__)


def run_child(data: bytes, number: int, stop_fd: int) -> int:
    """Serves until the parent ends or asks for the end; returns the exit code.

    Args:
        data: a ChildOptions as JSON.
        number: of the child.
        stop_fd: becomes readable when the parent ends, or asks for the end.
    """
    told = msgspec.json.decode(data, type=ChildOptions)
    setup_logging(f"server-{number}", told.log_level)
    try:
        bound = listen(told.server)
        llm = AsyncLLM(engine=told.engine, tokenizer=told.tokenizer)
        try:
            serve(llm, told.server, bound, on_ready=lambda: report_ready(told.folder, number), stop_fd=stop_fd)
        finally:
            llm.close()
    except FoloVLLMError as error:
        logger.error("%s", error)
        return 1
    return 0
