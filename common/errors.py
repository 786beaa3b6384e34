"""Every exception FoloVLLM raises on purpose.

FoloVLLMError
├── ConfigError          an option is wrong, or two options contradict each other (also a ValueError)
├── ModelError           a model folder, config.json or weight file cannot be used (also a ValueError)
├── RequestError         one request is refused; names the field (also a ValueError)
│   └── QueueFullError   the bounded queue is full; try again after `retry_after_s`
├── RequestFailedError   one request was accepted and then failed inside the engine (also a RuntimeError)
├── ProtocolError        a peer sent a frame that is no valid message
└── EngineError          (also a RuntimeError)
    ├── EngineStartError the engine could not start; the message holds the child's own cause
    └── EngineDeadError  the engine ended while it was in use
"""


class FoloVLLMError(Exception):
    """Base of all errors that FoloVLLM raises on purpose."""


class ConfigError(FoloVLLMError, ValueError):
    """An engine option is wrong, or two options contradict each other."""


class ModelError(FoloVLLMError, ValueError):
    """A model folder, its config.json or one of its weight files cannot be used."""


class RequestError(FoloVLLMError, ValueError):
    """One request is refused. `field` names the argument at fault, `None` where no single one is."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class QueueFullError(RequestError):
    """The bounded queue is full. `retry_after_s` is the engine's estimate of when to try again, in seconds."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RequestFailedError(FoloVLLMError, RuntimeError):
    """One request was accepted and then failed inside the engine; other requests are not affected."""


class ProtocolError(FoloVLLMError):
    """A peer sent a frame that is not a valid message of the link it came on."""


class EngineError(FoloVLLMError, RuntimeError):
    """Base of the errors that concern the engine as a whole."""


class EngineStartError(EngineError):
    """The engine could not start. The message holds the cause that the failing process reported."""


class EngineDeadError(EngineError):
    """The engine ended, or stopped answering, while it was in use."""
