"""`GET /inspector/state`: the engine from inside, for the page. Numbers only: no prompt, no answer, no name."""

import asyncio

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from folovllm.common.messages.frontend_core import EngineSnapshot
from folovllm.frontend.server.context import ServerContext, json_response
from folovllm.frontend.server.endpoint import Endpoint
from folovllm.frontend.server.errors import unavailable
from folovllm.frontend.server.protocol.common import ErrorAnswer
from folovllm.frontend.server.protocol.inspector import EngineFacts, InspectedRequest, InspectedStep, InspectorState

_RETRY_S = 1.0


class Inspector:
    """Looks into the engine."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context

    async def state(self, _request: Request) -> Response:
        """503 if the engine does not answer in time."""
        try:
            async with asyncio.timeout(self._context.options.health_timeout_s):
                snapshot = await self._context.llm.snapshot()
        except TimeoutError as error:
            raise unavailable("the engine does not answer", "engine_stuck", _RETRY_S) from error
        return json_response(self._answer(snapshot))

    def _answer(self, snapshot: EngineSnapshot) -> InspectorState:
        info = self._context.llm.info
        stats = msgspec.structs.asdict(snapshot.stats)
        del stats["ticket"]
        return InspectorState(
            engine=EngineFacts(
                model=self._context.model_names[0],
                device=info.device,
                dtype=info.dtype,
                version=info.version,
                block_size=info.block_size,
                max_model_len=info.max_model_len,
                max_num_seqs=info.max_num_seqs,
                max_num_batched_tokens=snapshot.max_num_batched_tokens,
            ),
            stats=stats,
            requests=[InspectedRequest(**msgspec.structs.asdict(request)) for request in snapshot.requests],
            steps=[InspectedStep(**msgspec.structs.asdict(step)) for step in snapshot.steps],
            blocks="".join(map(str, snapshot.blocks)),
            block_stride=snapshot.block_stride,
        )


def endpoints(context: ServerContext) -> list[Endpoint]:
    """The endpoints of this module."""
    state = Inspector(context).state
    return [
        Endpoint(
            "GET",
            "/inspector/state",
            state,
            "The engine from inside, in numbers",
            answer=InspectorState,
            errors=((503, ErrorAnswer),),
        )
    ]
